//! `leasehold-keys`: makes, shows, inspects, signs and verifies, on a machine without a network.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // A crash must not write a secret to disk. Best effort: where it fails, nothing is lost.
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    cli::run(cli::Cli::parse()).into()
}
