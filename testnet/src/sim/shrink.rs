//! Makes a failing scenario smaller while it fails in the same way: what is left is what matters.
//!
//! ```text
//! steps after the violation -> steps, by halves down to single ones -> vices -> load of nodes
//!   ^                                                                            |
//!   '--- again, while anything went --- the last node <- the network's tricks <- length
//! ```
//!
//! A scenario with a step less throws its dice otherwise from there on, so that some tries fail
//! for no better reason; what is found is small, not smallest.

use std::time::{Duration, Instant};

use leasehold_proto::base::time::Span;

use crate::scenario::{Scenario, Step};
use crate::virtual_world::Report;

/// How long and how often may be tried.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// For how long.
    pub time: Duration,
    /// How many runs at most.
    pub runs: u32,
}

/// What shrinking came to.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The smallest scenario found that fails in the same way.
    pub scenario: Scenario,
    /// How many runs that took.
    pub runs: u32,
}

struct Search<'a> {
    best: Scenario,
    invariant: &'static str,
    bound: Bound,
    until: Instant,
    runs: u32,
    run: &'a dyn Fn(&Scenario) -> Option<Report>,
}

/// Makes `scenario`, of which `report` says what does not hold, smaller within `bound`.
#[must_use]
pub fn shrink(
    scenario: &Scenario,
    report: &Report,
    bound: Bound,
    run: &dyn Fn(&Scenario) -> Option<Report>,
) -> Shrunk {
    let Some(first) = report.violations.first() else {
        return Shrunk { scenario: scenario.clone(), runs: 0 };
    };
    let mut search = Search {
        best: scenario.clone(),
        invariant: first.invariant,
        bound,
        until: Instant::now() + bound.time,
        runs: 0,
        run,
    };
    let seen = Span::millis(first.at_ms);
    search.attempt(|smaller| smaller.steps.retain(|(at, _)| *at <= seen));
    while search.pass() {}
    Shrunk { scenario: search.best, runs: search.runs }
}

impl Search<'_> {
    /// Takes what `change` makes of the best so far, if that is another scenario and fails too.
    fn attempt(&mut self, change: impl FnOnce(&mut Scenario)) -> bool {
        let mut smaller = self.best.clone();
        change(&mut smaller);
        let over = self.runs >= self.bound.runs || Instant::now() >= self.until;
        if over || smaller == self.best || smaller.check().is_err() {
            return false;
        }
        self.runs += 1;
        let report = (self.run)(&smaller);
        let violations = report.map(|report| report.violations).unwrap_or_default();
        let same = violations.first().is_some_and(|first| first.invariant == self.invariant);
        if same {
            self.best = smaller;
        }
        same
    }

    /// Tries everything once; whether anything went.
    fn pass(&mut self) -> bool {
        let mut went = self.thin_out(|scenario| &mut scenario.steps);
        went |= self.thin_out(|scenario| &mut scenario.vices);
        for node in 0..self.best.nodes {
            went |= self.attempt(|smaller| {
                if !smaller.load.idle.contains(&node) {
                    smaller.load.idle.push(node);
                }
            });
        }
        while self.attempt(|smaller| {
            smaller.length = Span::millis(smaller.length.as_millis() / 2);
            let length = smaller.length;
            smaller.steps.retain(|(at, _)| *at < length);
        }) {
            went = true;
        }
        went |= self.attempt(|smaller| {
            let network = &mut smaller.network;
            (network.loss, network.twice, network.doubled, network.strayed) = (0, 0, 0, 0);
            network.frames = false;
        });
        while self.attempt(without_last_node) {
            went = true;
        }
        went
    }

    /// Leaves out parts of a list: first halves of it, at last single items.
    fn thin_out<T>(&mut self, list: impl Fn(&mut Scenario) -> &mut Vec<T>) -> bool {
        let mut went = false;
        let mut part = list(&mut self.best).len();
        while part > 0 {
            let mut begin = 0;
            while begin < list(&mut self.best).len() {
                let gone = self.attempt(|smaller| {
                    let items = list(smaller);
                    let end = (begin + part).min(items.len());
                    items.drain(begin..end);
                });
                went |= gone;
                begin += if gone { 0 } else { part };
            }
            part /= 2;
        }
        went
    }
}

fn without_last_node(scenario: &mut Scenario) {
    scenario.nodes = scenario.nodes.saturating_sub(1);
    let left = scenario.nodes;
    scenario.load.idle.retain(|node| *node < left);
    scenario.vices.retain(|(node, _)| *node < left);
    scenario.steps.retain_mut(|(_, step)| match step {
        Step::Cut { island, .. } | Step::CutOneWay { island, .. } => {
            island.retain(|node| *node < left);
            true
        }
        step => step.node().is_none_or(|node| node < left),
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Violation;
    use crate::scenario::Frame;
    use crate::virtual_world::Counts;
    use leasehold_proto::base::id::Hash;
    use leasehold_proto::base::plant::Plant;

    #[test]
    fn what_does_not_matter_goes() {
        let frame = Frame { nodes: 7, length: Span::secs(120), plant: Plant::NONE };
        let scenario = (1..).map(|seed| Scenario::random(seed, frame)).find(|scenario| {
            scenario.steps.iter().any(|(_, step)| matches!(step, Step::Pause { node: 2, .. }))
        });
        let scenario = scenario.expect("some seed has it");
        // It "fails" while node 2 is stopped at some time and node 1's lessee asks for something.
        let run = |scenario: &Scenario| {
            let pause = |(_, step): &(Span, Step)| matches!(step, Step::Pause { node: 2, .. });
            let fails = scenario.steps.iter().any(pause) && !scenario.load.idle.contains(&1);
            let (invariant, what) = ("made up", String::new());
            let violation = Violation { invariant, at_ms: 120_000, host: 2, what };
            let violations = if fails { vec![violation] } else { Vec::new() };
            let (trace, counts) = (Hash::default(), Counts::default());
            Some(Report { violations, trace, simulated: Span::ZERO, counts })
        };
        let report = run(&scenario).expect("it is always run");
        let bound = Bound { time: Duration::from_secs(60), runs: 1_000 };
        let Shrunk { scenario, .. } = shrink(&scenario, &report, bound, &run);
        assert_eq!(scenario.steps.len(), 1, "{scenario}");
        assert_eq!(scenario.nodes, 3, "{scenario}");
        assert_eq!(scenario.load.idle, [0, 2]);
        assert_eq!(scenario.network.loss, 0);
    }
}
