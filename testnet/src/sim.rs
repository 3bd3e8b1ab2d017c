//! `leasehold-testnet sim`: scenarios in the virtual world, seed after seed.
//!
//! A failure prints its seed with everything derived from it and the invariant that does not hold;
//! `sim --seed S` with the same options runs it again exactly, and so does `sim --scenario FILE`
//! with the file that was written, whatever becomes of the generator. A smaller scenario that
//! fails in the same way is looked for and written beside it. With `--plant` a bug is planted and
//! the runs stop at the first seed that shows it: then *not* finding one is the failure.
//!
//! ```text
//! seeds of this shard -> --jobs threads, a seed at a time -> in the order of seeds: sums, failures
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use leasehold_proto::base::id::Hash;
use leasehold_proto::base::plant::Plant;
use leasehold_proto::base::time::Span;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

pub mod shrink;

use crate::check::Violation;
use crate::scenario::{FileError, Frame, MAX_NODES, Scenario, planted};
use crate::virtual_world::{self, Counts, Report, WorldError};
use shrink::{Bound, Shrunk};

/// How many runs shrinking takes at most.
const SHRINK_RUNS: u32 = 2_000;

/// What to simulate.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// How many nodes a fabric has.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=MAX_NODES as i64))]
    pub nodes: u32,
    /// How many seeds to run.
    #[arg(long, default_value_t = 1)]
    pub seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How long there is load and faults, in simulated minutes.
    #[arg(long, default_value_t = 10.0)]
    pub minutes: f64,
    /// Into how many shards the seeds are divided.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub shards: u64,
    /// Which of the shards to run, counted from 0.
    #[arg(long, default_value_t = 0)]
    pub shard: u64,
    /// How many seeds to run at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub jobs: u16,
    /// Run the scenario in this file, not those of seeds.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["plant", "write_scenario"])]
    pub scenario: Option<PathBuf>,
    /// Write the scenario of the first seed to this file and run nothing.
    #[arg(long, value_name = "FILE")]
    pub write_scenario: Option<PathBuf>,
    /// Where scenarios that fail are written; without it, below the system's temporary directory.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// For how many seconds to look for a smaller scenario, for the first seed that fails by an
    /// invariant; 0 for not at all.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub shrink: u64,
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
    /// Into how many shards they were divided.
    pub shards: u64,
    /// Which of them was run.
    pub shard: u64,
    /// How much time passed in all fabrics together, in seconds.
    pub simulated_s: f64,
    /// How much time passed outside, in seconds.
    pub real_s: f64,
    /// How much processor time that took, in seconds.
    pub cpu_s: f64,
    /// How many simulated seconds went into one of processor time.
    pub speed: f64,
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
    /// The invariants by which some scenario failed that was shrunk.
    #[serde(skip)]
    shrunk: BTreeSet<&'static str>,
}

/// A seed in which something was found.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// The seed.
    pub seed: u64,
    /// What was found, a line each.
    pub violations: Vec<String>,
    /// The file that the scenario was written to.
    pub scenario: Option<PathBuf>,
    /// The file with a smaller one that fails in the same way.
    pub shrunk: Option<PathBuf>,
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
    /// There is no such shard.
    #[error("--shard {0}: the shards are counted from 0 to {1}")]
    Shard(u64, u64),
    /// A scenario could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
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
    if let Some(path) = &args.write_scenario {
        eprintln!("the scenario of seed {} is in {}", args.seed, path.display());
        return;
    }
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
        "{} seeds of {} nodes: {:.0} simulated seconds in {:.1} ({:.0} a second of processor \
         time), {} leases, {} proofs, {} violations",
        summary.seeds,
        summary.nodes,
        summary.simulated_s,
        summary.real_s,
        summary.speed,
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
    if args.shard >= args.shards {
        return Err(SimError::Shard(args.shard, args.shards - 1));
    }
    if let Some(path) = &args.write_scenario {
        let plant = args.plant.as_deref().and_then(planted).unwrap_or(Plant::NONE);
        scenario(args, args.seed, plant).write(path)?;
    }
    let (started, busy) = (Instant::now(), processor_s());
    let mut summary = Summary {
        sim: "sim",
        nodes: args.nodes,
        seeds: 0,
        first_seed: args.seed,
        shards: args.shards,
        shard: args.shard,
        simulated_s: 0.0,
        real_s: 0.0,
        cpu_s: 0.0,
        speed: 0.0,
        violations: 0,
        events: 0,
        messages: 0,
        packets: 0,
        leases: 0,
        proofs: 0,
        failed: Vec::new(),
        planted: Vec::new(),
        shrunk: BTreeSet::new(),
        gangs: 0,
        partial_gangs: 0,
    };
    match (&args.plant, &args.scenario) {
        _ if args.write_scenario.is_some() => {}
        (Some(name), _) => {
            let found = in_order(
                args.jobs,
                plants(name)?.into_iter(),
                |(name, breaks)| hunt(args, name, breaks),
                |found| {
                    let (planted, reports) = found?;
                    reports.iter().for_each(|report| summary.add(report));
                    summary.planted.push(planted);
                    Ok(())
                },
            );
            found?;
        }
        (None, Some(path)) => {
            let scenario = Scenario::read(path)?;
            summary.nodes = u32::try_from(scenario.nodes).unwrap_or(u32::MAX);
            summary.first_seed = scenario.seed;
            let report = play(&scenario)?;
            summary.add(&report);
            if !report.violations.is_empty() {
                summary.fail(&scenario, &report, args, Some(path))?;
            }
        }
        (None, None) => in_order(
            args.jobs,
            seeds(args),
            |seed| {
                let scenario = scenario(args, seed, Plant::NONE);
                play(&scenario).map(|report| (scenario, report))
            },
            |played| {
                let (scenario, report) = played?;
                summary.add(&report);
                if report.violations.is_empty() {
                    return Ok(());
                }
                summary.fail(&scenario, &report, args, None)
            },
        )?,
    }
    summary.real_s = started.elapsed().as_secs_f64();
    summary.cpu_s = processor_s() - busy;
    summary.speed = summary.simulated_s / summary.cpu_s.max(0.001);
    Ok(summary)
}

/// The processor time of this process so far, in seconds.
fn processor_s() -> f64 {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(spent).unwrap_or_default().as_secs_f64()
}

/// The seeds of this shard.
fn seeds(args: &Args) -> impl Iterator<Item = u64> + Send + use<> {
    let step = usize::try_from(args.shards).unwrap_or(usize::MAX);
    let all = args.seed..args.seed.saturating_add(args.seeds);
    all.skip(usize::try_from(args.shard).unwrap_or(usize::MAX)).step_by(step)
}

/// Does `work` for all `items`, `jobs` at once, and hands the results on in the order of items,
/// until one is an error.
fn in_order<T: Send, R: Send>(
    jobs: u16,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T) -> R + Sync,
    mut take: impl FnMut(R) -> Result<(), SimError>,
) -> Result<(), SimError> {
    let queue = Mutex::new(items.enumerate());
    let (done, results) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            let (done, queue, work) = (done.clone(), &queue, &work);
            scope.spawn(move || {
                let next = || queue.lock().ok()?.next();
                while let Some((nth, item)) = next() {
                    if done.send((nth, work(item))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        let mut early = BTreeMap::new();
        let mut due = 0;
        for (nth, result) in results {
            early.insert(nth, result);
            while let Some(result) = early.remove(&due) {
                take(result)?;
                due += 1;
            }
        }
        Ok(())
    })
}

/// Runs a scenario; a panic in there is a violation like any other.
fn play(scenario: &Scenario) -> Result<Report, WorldError> {
    catch_unwind(AssertUnwindSafe(|| virtual_world::run(scenario))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let what = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        let what = what.unwrap_or_else(|| "in words unknown".into());
        let violation = Violation { invariant: "no panic", at_ms: 0, host: 0, what };
        let (trace, counts) = (Hash::default(), Counts::default());
        Ok(Report { violations: vec![violation], trace, simulated: Span::ZERO, counts })
    })
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
) -> Result<(Planted, Vec<Report>), SimError> {
    let nobody = "none, without the cargo feature 'planted'";
    let plant = planted(name).ok_or_else(|| SimError::NoSuchPlant(name.into(), nobody.into()))?;
    let mut planted =
        Planted { name: name.into(), breaks: breaks.into(), found_in: None, by: None };
    let mut reports = Vec::new();
    for seed in seeds(args) {
        let report = play(&scenario(args, seed, plant))?;
        if let Some(violation) = report.violations.first() {
            planted.found_in = Some(seed);
            planted.by = Some(violation.to_string());
        }
        reports.push(report);
        if planted.found_in.is_some() {
            break;
        }
    }
    Ok((planted, reports))
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

    /// Says what does not hold, and writes down how to see it again: all of it, and what matters.
    fn fail(
        &mut self,
        scenario: &Scenario,
        report: &Report,
        args: &Args,
        from: Option<&Path>,
    ) -> Result<(), SimError> {
        eprint!("{scenario}");
        for violation in &report.violations {
            eprintln!("  {violation}");
        }
        let Scenario { seed, .. } = scenario;
        let kept = args.keep.clone().unwrap_or_else(|| std::env::temp_dir().join("leasehold-sim"));
        let file = |path: &Path, why| FileError::File { path: path.display().to_string(), why };
        std::fs::create_dir_all(&kept).map_err(|why| file(&kept, why))?;
        let stem = from.and_then(Path::file_stem).map(|stem| stem.to_string_lossy().into_owned());
        let stem = stem.unwrap_or_else(|| format!("{}-nodes-seed-{seed}", scenario.nodes));
        let written = match from {
            Some(path) => path.to_path_buf(),
            None => {
                let path = kept.join(format!("{stem}.json"));
                scenario.write(&path)?;
                path
            }
        };
        eprintln!("  again: leasehold-testnet sim --scenario {}", written.display());
        let violations = report.violations.iter().map(ToString::to_string).collect();
        let mut failed = Failed { seed: *seed, violations, scenario: None, shrunk: None };
        failed.scenario = Some(written);
        let kinds = report.violations.first().map(|first| first.invariant);
        if args.shrink > 0 && kinds.is_some_and(|kind| self.shrunk.insert(kind)) {
            let bound = Bound { time: Duration::from_secs(args.shrink), runs: SHRINK_RUNS };
            let run = |scenario: &Scenario| play(scenario).ok();
            let Shrunk { scenario, runs } = shrink::shrink(scenario, report, bound, &run);
            let path = kept.join(format!("{stem}.small.json"));
            scenario.write(&path)?;
            let steps = scenario.steps.len();
            eprintln!("  smaller, after {runs} runs, with {steps} faults: {}", path.display());
            failed.shrunk = Some(path);
        }
        self.failed.push(failed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &str) -> Args {
        use clap::Parser as _;
        Line::parse_from(["sim"].into_iter().chain(line.split_whitespace())).args
    }

    #[test]
    fn shards_are_all_of_the_seeds_each_once() {
        let shard =
            |nth: u64| seeds(&args(&format!("--seed 5 --seeds 11 --shards 3 --shard {nth}")));
        let mut all: Vec<_> = (0..3).flat_map(shard).collect();
        assert!((0..3).all(|nth| shard(nth).count() >= 3));
        all.sort_unstable();
        assert_eq!(all, (5..16).collect::<Vec<_>>());
        let refused = run(&args("--shards 3 --shard 3"));
        assert!(matches!(refused, Err(SimError::Shard(3, 2))));
    }

    #[test]
    fn results_come_in_the_order_of_seeds() {
        let slow = |n: u64| {
            std::thread::sleep(Duration::from_millis(20 - n));
            n
        };
        let mut seen = Vec::new();
        let took = in_order(4, 0..20, slow, |n| {
            seen.push(n);
            Ok(())
        });
        assert!(took.is_ok());
        assert_eq!(seen, (0..20).collect::<Vec<_>>());
    }
}
