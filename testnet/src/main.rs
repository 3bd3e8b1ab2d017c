//! `leasehold-testnet`: fleets of nodes on one machine.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use leasehold_testnet::sim;

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
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Sim(args) => sim::main(&args),
    }
}
