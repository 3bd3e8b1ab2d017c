//! One language for what happens to a fabric: who is there, what they ask of each other, and what
//! goes wrong when. A scenario is plain data, all of it derived from one seed, so that printing it
//! says everything about a run and running it again says it again.

use std::fmt;
use std::path::Path;

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::plant::Plant;
use leasehold_proto::base::time::Span;
use serde::{Deserialize, Serialize};

/// What happens to a fabric.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// From which everything else is derived.
    pub seed: u64,
    /// How many nodes there are.
    pub nodes: usize,
    /// How long there is load and faults.
    pub length: Span,
    /// How long there is neither afterwards: by its end all must be well.
    pub quiet: Span,
    /// A planted bug.
    #[serde(with = "plant_by_name")]
    pub plant: Plant,
    /// How messages travel.
    pub network: Network,
    /// How long a sync takes, at least and at most, in microseconds.
    pub sync_us: (u64, u64),
    /// What lessees ask for.
    pub load: Load,
    /// Who is not honest, and how.
    pub vices: Vec<(usize, Vice)>,
    /// What goes wrong, in order of time.
    pub steps: Vec<(Span, Step)>,
}

/// What a node does that no honest one does. It runs the same core as all; its words are changed
/// on their way out, and signed with its own key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vice {
    /// As a lessor it promises twice what it has.
    Oversells,
    /// It tells some peers one thing and others another, under one version.
    Equivocates,
    /// As a lessor it bills more time than has passed, or more money than that costs.
    Inflates,
    /// As a lessor it grants for less than was ordered, or as of an earlier time.
    Backdates,
    /// As a lessor it never tells that a lease has ended.
    NeverTells,
    /// It sends again what it and others sent.
    Replays,
    /// As a lessee it claims and renews what it may not: after the end, of an older version, for
    /// longer or shorter, under leases of others.
    Exceeds,
    /// As a lessee it never countersigns a receipt.
    NeverAcknowledges,
}

impl Vice {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Oversells,
        Self::Equivocates,
        Self::Inflates,
        Self::Backdates,
        Self::NeverTells,
        Self::Replays,
        Self::Exceeds,
        Self::NeverAcknowledges,
    ];
}

/// How messages travel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The one-way delay between two hosts, at least and at most, in microseconds.
    pub latency_us: (u64, u64),
    /// How much a single message may be later than that, in microseconds.
    pub jitter_us: u64,
    /// How many packets of a thousand are lost.
    pub loss: u64,
    /// How many packets of a thousand arrive twice.
    pub doubled: u64,
    /// How many packets of a thousand take a detour, so that later ones overtake them.
    pub strayed: u64,
    /// How much later those arrive, at most, in microseconds.
    pub detour_us: u64,
    /// How many orders, claims and releases of a thousand arrive twice.
    pub twice: u64,
    /// Whether every message is encoded into a frame and decoded again.
    pub frames: bool,
}

/// What lessees ask for. Every node has a lessee of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// The nodes whose lessees ask for nothing.
    pub idle: Vec<usize>,
    /// The mean time between two orders of one lessee.
    pub every: Span,
    /// The term of a lease, at least and at most.
    pub term: (Span, Span),
    /// The time to claim, at least and at most.
    pub claim_within: (Span, Span),
    /// How many orders of a thousand the lessee signs itself, elsewhere.
    pub offline: u64,
    /// How many leases of a thousand are never claimed, or too late.
    pub unclaimed: u64,
    /// How many are given back before their term.
    pub released: u64,
    /// How many jobs of a thousand never end by themselves.
    pub endless: u64,
}

/// Something that goes wrong, or is put right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// The node is killed (SIGKILL) and started again in the same boot.
    Crash {
        /// Which.
        node: usize,
        /// How long until it is started.
        down: Span,
        /// Whether it is killed in the middle of the next sync, not at once.
        syncing: bool,
    },
    /// The host loses power and boots.
    Reboot {
        /// Which.
        node: usize,
        /// How long that takes.
        down: Span,
    },
    /// The node is killed and not started again.
    Die {
        /// Which.
        node: usize,
    },
    /// The node is stopped (SIGSTOP) and continued.
    Pause {
        /// Which.
        node: usize,
        /// For how long.
        lasts: Span,
    },
    /// Some nodes and the others cannot reach each other.
    Cut {
        /// Those on one side.
        island: Vec<usize>,
        /// For how long.
        lasts: Span,
    },
    /// What some nodes say does not reach the others; what those say does reach them.
    CutOneWay {
        /// Those who are not heard.
        island: Vec<usize>,
        /// For how long.
        lasts: Span,
    },
    /// Everything to and from a node may be late, each message and packet for itself, so that
    /// they overtake each other; packets may be lost or arrive twice.
    Rough {
        /// Which.
        node: usize,
        /// How late at most.
        late: Span,
        /// How many packets of a thousand are lost.
        lost: u64,
        /// How many of a thousand arrive twice.
        doubled: u64,
        /// For how long.
        lasts: Span,
    },
    /// Everything to and from a node takes longer.
    Slow {
        /// Which.
        node: usize,
        /// How much longer, one way.
        by: Span,
        /// For how long.
        lasts: Span,
    },
    /// A host's wall clock is set, and set right later.
    SetClock {
        /// Which.
        node: usize,
        /// By how many milliseconds.
        by: i64,
        /// When it is set right.
        lasts: Span,
    },
    /// A host's disk is full.
    FillDisk {
        /// Which.
        node: usize,
        /// For how long.
        lasts: Span,
    },
    /// A node sends again what others once sent to somebody.
    Replay {
        /// Which node does.
        node: usize,
    },
    /// The node is killed and started from a copy of its directory that was made a while ago.
    Restore {
        /// Which.
        node: usize,
        /// How long until it is started.
        down: Span,
    },
    /// Its directory is copied to another host and started there as well.
    Twin {
        /// Which.
        node: usize,
    },
}

impl Step {
    /// The one node that it is about; none for cuts.
    #[must_use]
    pub const fn node(&self) -> Option<usize> {
        match self {
            Self::Crash { node, .. }
            | Self::Reboot { node, .. }
            | Self::Die { node }
            | Self::Pause { node, .. }
            | Self::Rough { node, .. }
            | Self::Slow { node, .. }
            | Self::SetClock { node, .. }
            | Self::FillDisk { node, .. }
            | Self::Replay { node }
            | Self::Restore { node, .. }
            | Self::Twin { node } => Some(*node),
            Self::Cut { .. } | Self::CutOneWay { .. } => None,
        }
    }
}

/// Why a file is not taken as a scenario, or none is written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read or written.
    #[error("{path}: {why}")]
    File {
        /// The file.
        path: String,
        /// Why.
        why: std::io::Error,
    },
    /// It is no scenario.
    #[error("{path}: not a scenario: {why}")]
    Form {
        /// The file.
        path: String,
        /// Why.
        why: serde_json::Error,
    },
    /// What it says cannot be.
    #[error("{path}: {why}")]
    Sense {
        /// The file.
        path: String,
        /// Why.
        why: SenseError,
    },
}

/// Why a scenario makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SenseError {
    /// Too few nodes or too many.
    #[error("{0} nodes: give 1 to {MAX_NODES}")]
    Nodes(usize),
    /// Something is about a node that is not there.
    #[error("there is no node {0}: they are counted from 0")]
    NoSuchNode(usize),
    /// A range ends before it begins.
    #[error("{0} goes from more to less")]
    Range(&'static str),
    /// A length of time that is none.
    #[error("{0} is longer than nothing and at most a month")]
    Time(&'static str),
}

/// The frame in which a scenario is made up.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// How many nodes.
    pub nodes: usize,
    /// How long there is load and faults.
    pub length: Span,
    /// A planted bug.
    pub plant: Plant,
}

/// How many nodes one fabric may have.
pub const MAX_NODES: usize = 4_096;

impl Scenario {
    /// Makes up a scenario.
    #[must_use]
    pub fn random(seed: u64, frame: Frame) -> Self {
        let mut dice = Dice::new(seed);
        let Frame { nodes, length, plant } = frame;
        let nodes = nodes.clamp(1, MAX_NODES);
        let large = nodes > 20;
        let mut between = |low: u64, high: u64| low + dice.below(high - low + 1);
        let network = Network {
            latency_us: (200, between(400, 5_000)),
            jitter_us: between(50, 2_000),
            loss: between(0, 30),
            doubled: between(0, 30),
            strayed: between(0, 50),
            detour_us: between(1_000, 400_000),
            twice: 30,
            frames: between(0, 3) == 0,
        };
        let longest = if large { 60 } else { 30 };
        let load = Load {
            idle: Vec::new(),
            every: Span::millis(if large { 60_000 } else { between(800, 4_000) }),
            term: (Span::secs(2), Span::secs(longest)),
            claim_within: (Span::secs(1), Span::secs(between(3, 10))),
            offline: between(50, 200),
            unclaimed: between(50, 300),
            released: between(100, 600),
            endless: between(100, 500),
        };
        let sync_us = (300, between(800, 3_000));
        let steps = faults(&mut dice, nodes, length);
        let vices = vices(seed, nodes, &steps);
        let copies = steps.iter().any(|(_, step)| matches!(step, Step::Twin { .. }));
        // Two holders of one key hear of each other by the comparison that is made every minute.
        // Who hears of a dead node only by its record, after everybody has stopped speaking of it,
        // finds out by a probe of its own: one round of them takes half a second a node.
        let round = nodes as u64 / 2;
        // A lease may be renewed to three times its term.
        let quiet = Span::secs(3 * longest + round + if copies { 140 } else { 60 });
        Self { seed, nodes, length, quiet, plant, network, sync_us, load, vices, steps }
    }

    /// Reads one from a file, as [`Scenario::write`] writes it.
    ///
    /// # Errors
    /// When the file cannot be read, or holds no scenario that can be run.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let shown = || path.display().to_string();
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|why| FileError::File { path: shown(), why })?;
        let scenario: Self =
            serde_json::from_str(&text).map_err(|why| FileError::Form { path: shown(), why })?;
        scenario.check().map_err(|why| FileError::Sense { path: shown(), why })?;
        Ok(scenario)
    }

    /// Writes it to a file, from which it can be run again.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        let shown = || path.display().to_string();
        let text = serde_json::to_string_pretty(self);
        let text = text.map_err(|why| FileError::Form { path: shown(), why })?;
        std::fs::write(path, text + "\n").map_err(|why| FileError::File { path: shown(), why })
    }

    /// Whether it can be run: what comes from a file may say anything.
    ///
    /// # Errors
    /// What makes no sense.
    pub fn check(&self) -> Result<(), SenseError> {
        if self.nodes == 0 || self.nodes > MAX_NODES {
            return Err(SenseError::Nodes(self.nodes));
        }
        let steps = self.steps.iter().flat_map(|(_, step)| match step {
            Step::Cut { island, .. } | Step::CutOneWay { island, .. } => island.clone(),
            step => step.node().into_iter().collect(),
        });
        let vices = self.vices.iter().map(|(node, _)| *node);
        let mut named = steps.chain(vices).chain(self.load.idle.iter().copied());
        if let Some(node) = named.find(|node| *node >= self.nodes) {
            return Err(SenseError::NoSuchNode(node));
        }
        let (load, network) = (&self.load, &self.network);
        let ranges = [
            ("network.latency_us", network.latency_us),
            ("sync_us", self.sync_us),
            ("load.term", (load.term.0.as_millis(), load.term.1.as_millis())),
            (
                "load.claim_within",
                (load.claim_within.0.as_millis(), load.claim_within.1.as_millis()),
            ),
        ];
        if let Some((what, _)) = ranges.into_iter().find(|(_, (low, high))| low > high) {
            return Err(SenseError::Range(what));
        }
        let month = Span::secs(31 * 24 * 3600);
        let times = [
            ("length", self.length),
            ("quiet", self.quiet),
            ("load.every", load.every),
            ("load.term", load.term.0),
        ];
        let mut wrong = times.into_iter().filter(|(_, span)| *span == Span::ZERO || *span > month);
        wrong.next().map_or(Ok(()), |(what, _)| Err(SenseError::Time(what)))
    }

    /// Whether all signatures of this node may be contradicted by an older or second copy of it.
    #[must_use]
    pub fn copied(&self, node: usize) -> bool {
        self.steps.iter().any(|(_, step)| match step {
            Step::Restore { node: copied, .. } | Step::Twin { node: copied } => *copied == node,
            _ => false,
        })
    }
}

/// A planted bug in a file, by its name.
mod plant_by_name {
    use leasehold_proto::base::plant::Plant;
    use serde::{Deserialize, Deserializer, Serialize as _, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
    pub(super) fn serialize<S: Serializer>(plant: &Plant, to: S) -> Result<S::Ok, S::Error> {
        let name = Plant::ALL.iter().map(|(name, _)| *name).find(|name| plant.is(name));
        name.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Plant, D::Error> {
        let name = Option::<String>::deserialize(from)?;
        name.map_or(Ok(Plant::NONE), |name| {
            let unknown = || serde::de::Error::custom(format!("no bug '{name}' can be planted"));
            super::planted(&name).ok_or_else(unknown)
        })
    }
}

/// Plants the bug called `name`; `None` when there is none, or none can be planted.
#[cfg(feature = "planted")]
#[must_use]
pub fn planted(name: &str) -> Option<Plant> {
    Plant::named(name)
}

/// Plants the bug called `name`; `None` when there is none, or none can be planted.
#[cfg(not(feature = "planted"))]
#[must_use]
pub fn planted(_: &str) -> Option<Plant> {
    None
}

fn faults(dice: &mut Dice, nodes: usize, length: Span) -> Vec<(Span, Step)> {
    let minutes = length.as_millis().div_ceil(60_000);
    let per_minute = if nodes > 20 { nodes as u64 / 10 } else { nodes as u64 };
    let count = minutes * per_minute.max(2);
    // The first seconds belong to the fabric's coming together, faults end before the load does.
    let last = length.as_millis().saturating_sub(5_000).max(6_000);
    let mut steps: Vec<_> = (0..count)
        .map(|_| {
            let at = Span::millis(4_000 + dice.below(last - 4_000));
            (at, fault(dice, nodes, at, Span::millis(last)))
        })
        .collect();
    // A copy contradicts its original for good, so only one in four runs has one, and but one.
    if nodes > 2 && dice.chance(1, 4) {
        let node = pick(dice, nodes);
        let step = match dice.below(2) {
            0 => Step::Restore { node, down: Span::millis(200 + dice.below(5_000)) },
            _ => Step::Twin { node },
        };
        steps.push((Span::millis(last / 2 + dice.below(last / 4)), step));
    }
    if nodes > 3 && dice.chance(1, 3) {
        let at = Span::millis(last / 2 + dice.below(last / 2));
        steps.push((at, Step::Die { node: pick(dice, nodes) }));
    }
    steps.sort_by_key(|(at, _)| *at);
    steps
}

/// Who is not honest: nobody in half of the runs, else one or two, and never more than a third.
fn vices(seed: u64, nodes: usize, steps: &[(Span, Step)]) -> Vec<(usize, Vice)> {
    // Dice of their own: the rest of a scenario is the same with and without.
    let mut dice = Dice::new(seed ^ 0x00de_ce17);
    let mut vices = Vec::new();
    if nodes < 3 || !dice.chance(1, 2) {
        return vices;
    }
    let most = (nodes / 3).min(if nodes > 20 { nodes / 10 } else { 2 });
    for _ in 0..=dice.below(most as u64) {
        let node = pick(&mut dice, nodes);
        let copied = |(_, step): &(Span, Step)| match step {
            Step::Twin { node: copied } | Step::Restore { node: copied, .. } => *copied == node,
            _ => false,
        };
        let known = vices.iter().any(|(known, _)| *known == node);
        let liars: std::collections::BTreeSet<_> = vices.iter().map(|(node, _)| *node).collect();
        if steps.iter().any(copied) || (!known && liars.len() >= most) {
            continue;
        }
        // One as a lessor, one as a lessee; those who exceed are worth most.
        let lessor = Vice::ALL[usize::try_from(dice.below(5)).unwrap_or(0)];
        let lessee = [Vice::Replays, Vice::Exceeds, Vice::Exceeds, Vice::NeverAcknowledges];
        let lessee = lessee[usize::try_from(dice.below(4)).unwrap_or(0)];
        let both = match dice.below(3) {
            0 => vec![lessor],
            1 => vec![lessee],
            _ => vec![lessor, lessee],
        };
        vices.extend(both.into_iter().map(|vice| (node, vice)));
    }
    vices.sort();
    vices.dedup();
    vices
}

fn pick(dice: &mut Dice, nodes: usize) -> usize {
    usize::try_from(dice.below(nodes as u64)).unwrap_or(0)
}

fn fault(dice: &mut Dice, nodes: usize, at: Span, last: Span) -> Step {
    let node = pick(dice, nodes);
    let left = last.saturating_sub(at).as_millis().max(200);
    let mut lasts = |low: u64, high: u64| Span::millis((low + dice.below(high - low)).min(left));
    match lasts(0, 100).as_millis() {
        0..25 => {
            Step::Crash { node, down: lasts(50, 15_000), syncing: lasts(0, 100).as_millis() < 60 }
        }
        25..33 => Step::Reboot { node, down: lasts(2_000, 20_000) },
        33..50 => Step::Pause { node, lasts: lasts(50, 15_000) },
        50..64 => {
            let lasts = lasts(100, 15_000);
            let island = (0..nodes).filter(|_| dice.chance(1, 3)).collect();
            if dice.chance(2, 5) {
                Step::CutOneWay { island, lasts }
            } else {
                Step::Cut { island, lasts }
            }
        }
        64..70 => {
            let (late, lasts) = (lasts(5, 400), lasts(500, 10_000));
            Step::Rough { node, late, lost: dice.below(300), doubled: dice.below(300), lasts }
        }
        70..76 => Step::Slow { node, by: lasts(20, 1_500), lasts: lasts(500, 8_000) },
        76..83 => {
            let hour = dice.below(7_200_000);
            let by = i64::try_from(hour).unwrap_or(0) - 3_600_000;
            Step::SetClock { node, by, lasts: Span::millis((500 + dice.below(20_000)).min(left)) }
        }
        83..90 => Step::FillDisk { node, lasts: lasts(500, 8_000) },
        _ => Step::Replay { node },
    }
}

impl fmt::Display for Scenario {
    /// Everything about the run, a line each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, nodes, length, quiet, network, sync_us, load, vices, steps, .. } = self;
        writeln!(f, "seed {seed}: {nodes} nodes, {length} of load and faults, then {quiet} quiet")?;
        writeln!(f, "  {network:?}")?;
        writeln!(f, "  {load:?}, sync {sync_us:?} us")?;
        for (node, vice) in vices {
            writeln!(f, "  node {node} is not honest: {vice:?}")?;
        }
        steps.iter().try_for_each(|(at, step)| writeln!(f, "  at {at}: {step:?}"))
    }
}
