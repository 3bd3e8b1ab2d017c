//! `leasehold-testnet sim`: scenarios in the virtual world, seed after seed.
//!
//! A failure prints its seed with everything derived from it and the invariant that does not hold;
//! `sim --seed S` with the same options runs it again exactly. With `--plant` a bug is planted and
//! the runs stop at the first seed that shows it: then *not* finding one is the failure.

use std::process::ExitCode;
use std::time::Instant;

use clap::Args as ClapArgs;
use leasehold_proto::base::plant::Plant;
use leasehold_proto::base::time::Span;
use serde::Serialize;

use crate::scenario::{Frame, MAX_NODES, Scenario};
use crate::virtual_world::{self, Counts, Report, WorldError};

/// What to simulate.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// How many nodes a fabric has.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=MAX_NODES as i64))]
    pub nodes: u32,
    /// How many seeds to run, one after another.
    #[arg(long, default_value_t = 1)]
    pub seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How long there is load and faults, in simulated minutes.
    #[arg(long, default_value_t = 10.0)]
    pub minutes: f64,
    /// Plant a bug by its name, or each of them in turn with `all`, and find it.
    #[arg(long, value_name = "NAME")]
    pub plant: Option<String>,
    /// Print one JSON object on stdout, and nothing else there.
    #[arg(long)]
    pub json: bool,
}

/// What was found, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// What this is: `sim`.
    pub sim: &'static str,
    /// How many nodes a fabric had.
    pub nodes: u32,
    /// How many seeds were run.
    pub seeds: u64,
    /// The first of them.
    pub first_seed: u64,
    /// How much time passed in all fabrics together, in seconds.
    pub simulated_s: f64,
    /// How much time passed outside, in seconds.
    pub real_s: f64,
    /// How many violations were found.
    pub violations: usize,
    /// Events that a core handled.
    pub events: u64,
    /// Messages over links.
    pub messages: u64,
    /// Liveness packets.
    pub packets: u64,
    /// Leases granted.
    pub leases: u64,
    /// Leases whose proof was checked.
    pub proofs: u64,
    /// Gangs of which a job was started.
    pub gangs: u64,
    /// Gangs of which, under faults, not every member's job was started.
    pub partial_gangs: u64,
    /// Seeds in which something was found.
    pub failed: Vec<Failed>,
    /// Bugs that were planted, and what became of them.
    pub planted: Vec<Planted>,
}

/// A seed in which something was found.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// The seed.
    pub seed: u64,
    /// What was found, a line each.
    pub violations: Vec<String>,
}

/// A planted bug.
#[derive(Clone, Debug, Serialize)]
pub struct Planted {
    /// Its name.
    pub name: String,
    /// The invariant that it breaks.
    pub breaks: String,
    /// The first seed in which it was found; none if it was not.
    pub found_in: Option<u64>,
    /// By what.
    pub by: Option<String>,
}

/// Why a simulation could not be run.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// No bug has this name.
    #[error("no planted bug is called '{0}'; there are: all, {1}")]
    NoSuchPlant(String, String),
    /// The length makes no sense.
    #[error("--minutes {0}: give a number above 0 and up to 10000")]
    Minutes(f64),
    /// A fabric could not be founded.
    #[error(transparent)]
    World(#[from] WorldError),
}

/// Runs the subcommand. Exits with 0 when all is well, 1 when a check said no, 2 on bad usage.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    match run(args) {
        Ok(summary) => {
            print(args, &summary);
            let missed = summary.planted.iter().any(|planted| planted.found_in.is_none());
            if missed || !summary.failed.is_empty() { ExitCode::from(1) } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn print(args: &Args, summary: &Summary) {
    for planted in &summary.planted {
        match (&planted.found_in, &planted.by) {
            (Some(seed), Some(by)) => eprintln!("{}: found in seed {seed}: {by}", planted.name),
            _ => eprintln!("{}: NOT found ({})", planted.name, planted.breaks),
        }
    }
    if args.json {
        let json = serde_json::to_string(summary);
        println!("{}", json.unwrap_or_default());
        return;
    }
    println!(
        "{} seeds of {} nodes: {:.0} simulated seconds in {:.1}, {} leases, {} proofs, \
         {} violations",
        summary.seeds,
        summary.nodes,
        summary.simulated_s,
        summary.real_s,
        summary.leases,
        summary.proofs,
        summary.violations
    );
}

/// Runs what `args` say.
///
/// # Errors
/// When they make no sense. What a simulation finds is in the summary.
pub fn run(args: &Args) -> Result<Summary, SimError> {
    if !(args.minutes > 0.0 && args.minutes <= 10_000.0) {
        return Err(SimError::Minutes(args.minutes));
    }
    let started = Instant::now();
    let mut summary = Summary {
        sim: "sim",
        nodes: args.nodes,
        seeds: 0,
        first_seed: args.seed,
        simulated_s: 0.0,
        real_s: 0.0,
        violations: 0,
        events: 0,
        messages: 0,
        packets: 0,
        leases: 0,
        proofs: 0,
        failed: Vec::new(),
        planted: Vec::new(),
        gangs: 0,
        partial_gangs: 0,
    };
    match &args.plant {
        None => {
            for seed in args.seed..args.seed.saturating_add(args.seeds) {
                let scenario = scenario(args, seed, Plant::NONE);
                let report = virtual_world::run(&scenario)?;
                summary.add(&report);
                if !report.violations.is_empty() {
                    summary.fail(&scenario, &report, args);
                }
            }
        }
        Some(name) => {
            for (name, breaks) in plants(name)? {
                let planted = hunt(args, name, breaks, &mut summary)?;
                summary.planted.push(planted);
            }
        }
    }
    summary.real_s = started.elapsed().as_secs_f64();
    Ok(summary)
}

fn scenario(args: &Args, seed: u64, plant: Plant) -> Scenario {
    // Minutes are bounded above, so the product is a small positive number.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let length = Span::millis((args.minutes * 60_000.0) as u64);
    Scenario::random(seed, Frame { nodes: args.nodes as usize, length, plant })
}

fn plants(name: &str) -> Result<Vec<(&'static str, &'static str)>, SimError> {
    let found: Vec<_> =
        Plant::ALL.into_iter().filter(|(known, _)| name == "all" || *known == name).collect();
    if found.is_empty() {
        let names = Plant::ALL.map(|(known, _)| known).join(", ");
        return Err(SimError::NoSuchPlant(name.into(), names));
    }
    Ok(found)
}

/// Runs seeds with one bug planted until it is found.
fn hunt(
    args: &Args,
    name: &'static str,
    breaks: &'static str,
    summary: &mut Summary,
) -> Result<Planted, SimError> {
    let plant = planted(name)?;
    let mut planted =
        Planted { name: name.into(), breaks: breaks.into(), found_in: None, by: None };
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        let report = virtual_world::run(&scenario(args, seed, plant))?;
        summary.add(&report);
        if let Some(violation) = report.violations.first() {
            planted.found_in = Some(seed);
            planted.by = Some(violation.to_string());
            break;
        }
    }
    Ok(planted)
}

#[cfg(feature = "planted")]
fn planted(name: &'static str) -> Result<Plant, SimError> {
    Plant::named(name).ok_or_else(|| SimError::NoSuchPlant(name.into(), String::new()))
}

#[cfg(not(feature = "planted"))]
fn planted(name: &'static str) -> Result<Plant, SimError> {
    Err(SimError::NoSuchPlant(name.into(), "none, without the cargo feature 'planted'".into()))
}

impl Summary {
    fn add(&mut self, report: &Report) {
        let Counts { events, messages, packets, leases, proofs, .. } = report.counts;
        let Counts { gangs, partial_gangs, .. } = report.counts;
        self.gangs += gangs;
        self.partial_gangs += partial_gangs;
        self.seeds += 1;
        self.simulated_s += report.simulated.duration().as_secs_f64();
        self.violations += report.violations.len();
        self.events += events;
        self.messages += messages;
        self.packets += packets;
        self.leases += leases;
        self.proofs += proofs;
    }

    fn fail(&mut self, scenario: &Scenario, report: &Report, args: &Args) {
        let Args { nodes, minutes, .. } = args;
        eprint!("{scenario}");
        for violation in &report.violations {
            eprintln!("  {violation}");
        }
        let seed = scenario.seed;
        eprintln!(
            "  again: leasehold-testnet sim --nodes {nodes} --minutes {minutes} --seed {seed}"
        );
        let violations = report.violations.iter().map(ToString::to_string).collect();
        self.failed.push(Failed { seed, violations });
    }
}
