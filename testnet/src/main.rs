//! `leasehold-testnet`: fleets of nodes on one machine.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use leasehold_testnet::{bench, sim};

/// Fleets of Leasehold nodes on one machine.
#[derive(Debug, Parser)]
#[command(name = "leasehold-testnet", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run many nodes in virtual time, with faults, and check the invariants after every step.
    Sim(sim::Args),
    /// Measure this machine, as JSON lines: one a case, the first about the machine.
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Sim(args) => sim::main(&args),
        Command::Bench(bench) => bench.main(),
    }
}
