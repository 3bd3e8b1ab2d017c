//! What goes wrong in a run of chaos, when and for how long: plain data from one seed. Which node
//! a fault meets may differ where the one it names is down already.

use std::fmt;
use std::time::Duration;

use leasehold_proto::base::dice::Dice;

use crate::relay::Way;

/// Something that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and a start after a while.
    Kill {
        /// Which node.
        node: usize,
        /// How long until it is started again.
        down: Duration,
    },
    /// SIGSTOP, and SIGCONT after a while.
    Pause {
        /// Which node.
        node: usize,
        /// For how long.
        lasts: Duration,
    },
    /// Some cannot reach others.
    Cut {
        /// In which manner.
        how: Cut,
        /// Who cannot reach whom.
        ways: Vec<(usize, usize)>,
        /// For how long.
        lasts: Duration,
    },
    /// Packets from a node and to it are late, lost, doubled and out of order.
    Rough {
        /// Which node.
        node: usize,
        /// How rough.
        way: Way,
        /// For how long.
        lasts: Duration,
    },
    /// A node's disk is full to the last byte.
    FillDisk {
        /// Which node.
        node: usize,
        /// For how long.
        lasts: Duration,
    },
    /// A node's wall clock is set wrong.
    SetClock {
        /// Which node.
        node: usize,
        /// By how many milliseconds.
        by: i64,
        /// For how long.
        lasts: Duration,
    },
}

/// Manners of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Two sides, nothing between them.
    Full,
    /// One side does not hear the other, which hears it.
    OneWay,
    /// Two sides, and one node that reaches both.
    Bridge,
}

/// What to plan for.
#[derive(Clone, Debug)]
pub struct Frame {
    /// How many nodes.
    pub nodes: usize,
    /// How long things go wrong.
    pub length: Duration,
    /// Nodes whose disks can be filled.
    pub disks: Vec<usize>,
}

fn between(dice: &mut Dice, least: u64, most: u64) -> Duration {
    Duration::from_millis(least + dice.below(most.saturating_sub(least) + 1))
}

/// From `least` to `most` milliseconds, short ones as likely as long ones.
fn of_any_size(dice: &mut Dice, least: u64, most: u64) -> Duration {
    let doublings = u64::from((most / least.max(1)).max(1).ilog2());
    let low = least << dice.below(doublings + 1);
    between(dice, low, (2 * low).min(most))
}

/// Makes up what goes wrong, in order of time.
#[must_use]
pub fn plan(seed: u64, frame: &Frame) -> Vec<(Duration, Fault)> {
    let mut dice = Dice::new(seed);
    let mut faults = Vec::new();
    // Mean distances of 6, 18, 16, 20, 40 and 30 seconds: 10 kills a minute, and 3 each of pauses
    // and partitions.
    type Make = fn(&mut Dice, &Frame) -> Option<Fault>;
    let sorts: [(u64, Make); 6] = [
        (6_000, kill),
        (18_000, pause),
        (16_000, cut),
        (20_000, rough),
        (40_000, fill_disk),
        (30_000, set_clock),
    ];
    for (every, make) in sorts {
        let mut at = between(&mut dice, every / 4, every);
        while at < frame.length {
            faults.extend(make(&mut dice, frame).map(|fault| (at, fault)));
            at += between(&mut dice, every / 2, every + every / 2);
        }
    }
    faults.sort_by_key(|(at, _)| *at);
    faults
}

fn node(dice: &mut Dice, frame: &Frame) -> usize {
    usize::try_from(dice.below(frame.nodes as u64)).unwrap_or(0)
}

fn kill(dice: &mut Dice, frame: &Frame) -> Option<Fault> {
    Some(Fault::Kill { node: node(dice, frame), down: of_any_size(dice, 20, 6_000) })
}

fn pause(dice: &mut Dice, frame: &Frame) -> Option<Fault> {
    Some(Fault::Pause { node: node(dice, frame), lasts: of_any_size(dice, 50, 20_000) })
}

fn cut(dice: &mut Dice, frame: &Frame) -> Option<Fault> {
    if frame.nodes < 2 {
        return None;
    }
    let lasts = of_any_size(dice, 500, 12_000);
    let first = node(dice, frame);
    let how = match dice.below(3) {
        0 => Cut::Full,
        1 => Cut::OneWay,
        _ if frame.nodes >= 3 => Cut::Bridge,
        _ => Cut::Full,
    };
    // Around a circle from `first`: one side, the bridge, the other side.
    let bridge = usize::from(how == Cut::Bridge);
    let sizes = (frame.nodes - 1 - bridge) as u64;
    let size = 1 + usize::try_from(dice.below(sizes)).unwrap_or(0);
    let one: Vec<_> = (0..size).map(|n| (first + n) % frame.nodes).collect();
    let other: Vec<_> = (size + bridge..frame.nodes).map(|n| (first + n) % frame.nodes).collect();
    let mut ways = Vec::new();
    for a in &one {
        for b in &other {
            ways.push((*a, *b));
            if how != Cut::OneWay {
                ways.push((*b, *a));
            }
        }
    }
    Some(Fault::Cut { how, ways, lasts })
}

fn rough(dice: &mut Dice, frame: &Frame) -> Option<Fault> {
    let (least, lasts) = (between(dice, 0, 200), between(dice, 2_000, 10_000));
    let way = Way {
        cut: false,
        delay: (least, least + between(dice, 0, 200)),
        loss: dice.below(200),
        twice: dice.below(200),
    };
    Some(Fault::Rough { node: node(dice, frame), way, lasts })
}

fn fill_disk(dice: &mut Dice, frame: &Frame) -> Option<Fault> {
    let nth = usize::try_from(dice.below(frame.disks.len().max(1) as u64)).unwrap_or(0);
    let node = *frame.disks.get(nth)?;
    Some(Fault::FillDisk { node, lasts: between(dice, 1_000, 8_000) })
}

fn set_clock(dice: &mut Dice, frame: &Frame) -> Option<Fault> {
    let far = i64::try_from(1_000 + dice.below(3_600_000)).unwrap_or(0);
    let by = if dice.chance(1, 2) { far } else { -far };
    Some(Fault::SetClock { node: node(dice, frame), by, lasts: between(dice, 1_000, 12_000) })
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { node, down } => write!(f, "SIGKILL to {node}, up again in {down:?}"),
            Self::Pause { node, lasts } => write!(f, "SIGSTOP to {node} for {lasts:?}"),
            Self::Cut { how, ways, lasts } => write!(f, "{how:?} cut of {ways:?} for {lasts:?}"),
            Self::Rough { node, way, lasts } => {
                let Way { delay: (least, most), loss, twice, .. } = way;
                write!(
                    f,
                    "rough to and from {node} for {lasts:?}: {least:?} to {most:?} late, {loss}/1000 \
                     lost, {twice}/1000 twice"
                )
            }
            Self::FillDisk { node, lasts } => write!(f, "disk of {node} full for {lasts:?}"),
            Self::SetClock { node, by, lasts } => {
                write!(f, "wall clock of {node} wrong by {by}ms for {lasts:?}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_an_hour_has_as_many_faults_as_it_should() {
        let length = Duration::from_secs(30 * 60);
        let frame = Frame { nodes: 5, length, disks: vec![0, 2] };
        for seed in 1..20 {
            let faults = plan(seed, &frame);
            let count = |is: fn(&Fault) -> bool| faults.iter().filter(|(_, f)| is(f)).count();
            assert!(count(|fault| matches!(fault, Fault::Kill { .. })) >= 240);
            assert!(count(|fault| matches!(fault, Fault::Pause { .. })) >= 70);
            assert!(count(|fault| matches!(fault, Fault::Cut { .. })) >= 70);
            assert!(count(|fault| matches!(fault, Fault::FillDisk { .. })) >= 20);
            assert!(count(|fault| matches!(fault, Fault::SetClock { .. })) >= 20);
            assert_eq!(faults, plan(seed, &frame));
        }
    }

    #[test]
    fn a_cut_has_two_sides_and_a_bridge_reaches_both() {
        let frame = Frame { nodes: 5, length: Duration::from_secs(600), disks: Vec::new() };
        for (_, fault) in plan(3, &frame) {
            let Fault::Cut { how, ways, .. } = fault else { continue };
            let back = |(a, b): &(usize, usize)| ways.contains(&(*b, *a));
            let touched: std::collections::BTreeSet<_> =
                ways.iter().flat_map(|(a, b)| [*a, *b]).collect();
            assert!(!ways.is_empty() && ways.iter().all(|(a, b)| a != b));
            assert_eq!(ways.iter().all(back), how != Cut::OneWay);
            assert_eq!(touched.len(), if how == Cut::Bridge { 4 } else { 5 });
        }
    }
}
