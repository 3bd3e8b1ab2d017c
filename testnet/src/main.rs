//! `leasehold-testnet`: fleets of nodes on one machine.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use leasehold_testnet::{bench, chaos, demo, fleet, sim, up};

/// Fleets of Leasehold nodes on one machine.
#[derive(Debug, Parser)]
#[command(name = "leasehold-testnet", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one lease end to end between five real nodes, and tell what happens
    Demo(demo::Args),
    /// Run many nodes in virtual time, with faults, and check the invariants after every step.
    Sim(sim::Args),
    /// Run real nodes and jobs, let things go wrong at random, and judge what they did
    Chaos(chaos::Args),
    /// Measure this machine, as JSON lines: one a case, the first about the machine.
    Bench(bench::Bench),
    /// Run a fleet of real nodes on this machine until Ctrl-C or SIGTERM
    Up(up::Args),
}

fn main() -> ExitCode {
    // The nodes of a fleet, and what they start, are this executable too.
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = fleet::hidden(&args) {
        return code;
    }
    match Cli::parse().command {
        Command::Demo(args) => demo::main(&args),
        Command::Sim(args) => sim::main(&args),
        Command::Chaos(args) => chaos::main(&args),
        Command::Bench(bench) => bench.main(),
        Command::Up(args) => up::main(&args),
    }
}
