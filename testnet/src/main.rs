//! The `leasehold-testnet` command.

use clap::{Parser, Subcommand};
use leasehold_testnet::bench::Bench;

#[derive(Debug, Parser)]
#[command(name = "leasehold-testnet", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(Bench),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Bench(bench) => bench.run(),
    }
}
