//! `leasehold-testnet up`: a fleet to play with, until Ctrl-C or SIGTERM ends it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args as ClapArgs;
use leasehold_keys::disk::{Existing, WriteError, write_atomic};
use leasehold_keys::exit::Exit;
use serde::Serialize;

use crate::fleet::{self, Fleet, FleetError, Plan};
use crate::report::{self, Report};
use crate::signal;

/// The file in the fleet's directory that says where its nodes are.
pub const FILE: &str = "testnet.json";
/// The most nodes of one fleet on one machine.
const MOST: u32 = 500;
/// How long the nodes may take to see each other, beside some time for each.
const SEES: Duration = Duration::from_secs(60);

/// Run a fleet of real nodes on this machine until Ctrl-C or SIGTERM.
#[derive(ClapArgs, Debug)]
pub struct Args {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    nodes: u32,
    /// Where the fleet lives and testnet.json is written; used again when it held a fleet before
    /// [default: a temporary directory that goes at the end]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON object once all nodes see all
    #[arg(long)]
    json: bool,
}

/// One node, in `testnet.json`.
#[derive(Clone, Debug, Serialize)]
struct Line {
    /// Its key.
    id: String,
    /// Its name.
    name: String,
    /// The URL of its API.
    api: String,
    /// Its process.
    pid: u32,
    /// Its directory.
    dir: PathBuf,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Object<'a> {
    dir: &'a std::path::Path,
    map_ms: u64,
    nodes: &'a [Line],
}

/// Why there is no fleet.
#[derive(Debug, thiserror::Error)]
enum UpError {
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    File(#[from] WriteError),
    #[error("cannot listen for signals: {0}")]
    Signal(std::io::Error),
    #[error("cannot write: {0}")]
    Output(std::io::Error),
}

/// Runs the command.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let ran = match runtime {
        Ok(runtime) => runtime.block_on(run(args)),
        Err(error) => Err(UpError::Signal(error)),
    };
    match ran {
        Ok(()) => Exit::Ok.into(),
        Err(error) => {
            eprintln!("leasehold-testnet up: {error}");
            match error {
                UpError::Fleet(FleetError::InUse(_)) => Exit::Conflict.into(),
                _ => Exit::Io.into(),
            }
        }
    }
}

async fn run(args: &Args) -> Result<(), UpError> {
    let report = Report::new(args.json);
    let mut stop = signal::Stop::listen().map_err(UpError::Signal)?;
    let nodes = (1..=args.nodes).map(config).collect();
    let mut fleet = Fleet::found(Plan { dir: args.dir.clone(), ..Plan::new(nodes) })?;
    let file = fleet.root().join(FILE);
    // Who waits for the file must not find an earlier fleet's.
    let _ = std::fs::remove_file(&file);
    let started = tokio::select! {
        started = start(&mut fleet, args, report) => started,
        () = stop.asked() => {
            report.say("stopping before all nodes were up");
            fleet.stop().await?;
            return Ok(());
        }
    };
    if let Err(error) = started {
        // The reason counts; what cannot be ended in order is ended by the fleet's drop.
        let _ = fleet.stop().await;
        return Err(error);
    }
    stop.asked().await;
    report.say("stopping");
    let _ = std::fs::remove_file(&file);
    let stopped = fleet.stop().await?;
    if stopped.forced > 0 {
        report.say(format_args!("{} nodes did not stop in time and were killed", stopped.forced));
    }
    report.say("nothing is left running");
    Ok(())
}

/// The node with this number: they cost a little more one after the other, so that there is a
/// market.
fn config(number: u32) -> leasehold_node::config::Config {
    let mut config = fleet::config(&format!("node-{number}"));
    config.offer.cpu_hour = format!("0.{:03}", 15 + number);
    config
}

async fn start(fleet: &mut Fleet, args: &Args, report: Report) -> Result<(), UpError> {
    fleet.start_all().await?;
    let took = fleet.map(SEES + Duration::from_secs(u64::from(args.nodes))).await?;
    let mut lines = Vec::new();
    for member in fleet.members() {
        let file = member.file()?;
        lines.push(Line {
            id: file.id.to_string(),
            name: member.name().into(),
            api: member.api()?,
            pid: file.pid,
            dir: member.dir().into(),
        });
    }
    let text = serde_json::to_vec_pretty(&lines).unwrap_or_default();
    write_atomic(&fleet.root().join(FILE), &text, 0o600, Existing::Replace)?;
    let rows = fleet.members().iter().zip(&lines).filter_map(|(member, line)| {
        let file = member.file().ok()?;
        let link = file.link.first().map(ToString::to_string).unwrap_or_default();
        let [pid, probe, data] =
            [line.pid.to_string(), file.probe.to_string(), file.data.to_string()];
        Some([line.name.clone(), pid, line.api.clone(), link, probe, data])
    });
    report.say(report::table(["NODE", "PID", "API", "LINK", "PROBE", "DATA"], rows));
    let map_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    report.say(format_args!(
        "\n{} nodes see each other, {}.{:03} s after the first was started; they live in {}",
        lines.len(),
        map_ms / 1000,
        map_ms % 1000,
        fleet.root().display(),
    ));
    if let Some(first) = lines.first() {
        report.say("Talk to one of them in another terminal; Ctrl-C here ends them all:");
        report.say(format_args!("  export LEASEHOLD_API={}", first.api));
        report.say(format_args!("  export LEASEHOLD_DIR={}", first.dir.display()));
        report.say("  leasehold nodes");
    }
    let object = Object { dir: fleet.root(), map_ms, nodes: &lines };
    report.object(&object).map_err(UpError::Output)
}
