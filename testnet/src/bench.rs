//! Benchmarks: what the fabric does in a second, as JSON lines on stdout.
//!
//! | file | what it measures |
//! |---|---|
//! | `gang` | leases on several hosts, together or not at all, while several lessees compete |
//! | `lease` | order to verified, durable grant between two nodes, beside etcd |
//! | `memory` | what a node needs for the leases that it knows |
//! | `model` | hosted models: the engine beside llama.cpp, the gateway beside LiteLLM |
//! | `membership` | a fleet that finds itself, loses one, spreads an offer, stands by |
//! | `payload` | memory to verified file over the data plane, beside raw QUIC |
//! | `restart` | a killed lessor grants again, its leases and jobs kept |
//! | `machine` | the machine that the figures are of |
//! | `api` | how nodes are asked |
//! | `pair` | a lessor and a lessee, and leases between them |
//! | `peer` | other programs beside which something is measured, as processes |
//! | `etcd` | the peer of `lease`: starting it, asking it |
//! | `load` | clients that ask for one thing after the other |
//!
//! Every benchmark starts real processes of this same binary, bounds what it does in count and
//! time, and leaves nothing running: a process that it starts ends when its standard input does,
//! which also happens when the benchmark itself is killed. Nothing here asserts: figures are for
//! people to judge, see docs/bench.md.

mod api;
mod etcd;
mod gang;
mod iroh;
mod lease;
mod load;
mod machine;
mod membership;
mod memory;
mod model;
mod pair;
mod payload;
mod peer;
mod restart;
mod scp;

use std::{io::Write as _, path::Path, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use leasehold_keys::exit::Exit;
use serde::Serialize;

/// What to measure.
#[derive(Debug, Args)]
pub struct Bench {
    /// As everywhere; a benchmark prints JSON lines without it too
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Leases on several hosts that exist together or not at all, with several lessees competing.
    Gang(gang::Options),
    /// Order to verified, durable grant between two nodes, with several clients at once, and the
    /// same of etcd.
    Lease(lease::Options),
    /// What a node needs for the leases that it knows.
    Memory(memory::Options),
    /// A fleet finds itself, notices a death, spreads an offer, and stands by.
    Membership(membership::Options),
    /// What the embedded engine does in a second, and what asking a model through the fabric adds.
    Model(model::Options),
    /// A payload from memory to a verified file on disk, and the same bytes over raw QUIC.
    Payload(payload::Options),
    /// A lessor is killed and started again, with leases that live and jobs that run.
    Restart(restart::Options),
    /// One side of the payload benchmark, started by it.
    #[command(hide = true)]
    PayloadSide(payload::Side),
    /// Becomes a peer that ends with this process, started by a benchmark.
    #[command(hide = true)]
    Peer(peer::Peer),
}

impl Bench {
    /// Runs the benchmark. It takes the thread, and must not be called from within a runtime.
    #[must_use]
    pub fn main(self) -> ExitCode {
        match self.run() {
            Ok(()) => Exit::Ok.into(),
            Err(error) => {
                // What was measured until then has been printed.
                eprintln!("leasehold-testnet bench: {error:#}");
                Exit::Io.into()
            }
        }
    }

    fn run(self) -> anyhow::Result<()> {
        match self.what {
            What::Gang(options) => {
                line(&machine::Machine::look())?;
                gang::run(&options)
            }
            What::Lease(options) => {
                line(&machine::Machine::look())?;
                lease::run(&options)
            }
            What::Membership(options) => {
                line(&machine::Machine::look())?;
                membership::run(&options)
            }
            What::Model(options) => {
                model::settle_threads()?;
                line(&machine::Machine::look())?;
                model::run(&options)
            }
            What::Payload(options) => {
                line(&machine::Machine::look())?;
                payload::run(&options)
            }
            What::Memory(options) => {
                line(&machine::Machine::look())?;
                memory::run(&options)
            }
            What::Restart(options) => {
                line(&machine::Machine::look())?;
                restart::run(&options)
            }
            What::PayloadSide(side) => payload::run_side(side),
            What::Peer(peer) => peer.run(),
        }
    }
}

/// Prints one figure's line, at once: who reads along sees each case as it is done.
fn line(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value).context("cannot print a line")?;
    out.write_all(b"\n").and_then(|()| out.flush()).context("cannot print a line")
}

/// Runs a benchmark on this thread.
fn block_on<T>(benchmark: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(benchmark)
}

/// What was measured, once all that it was measured with has been stopped: of two errors the first
/// one is told.
fn settled<T, S>(
    measured: anyhow::Result<T>,
    stopped: Result<S, impl Into<anyhow::Error>>,
) -> anyhow::Result<T> {
    let measured = measured?;
    stopped.map_err(Into::into)?;
    Ok(measured)
}

/// A directory in `base` that is gone in the end.
fn temporary(base: &Path) -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("leasehold-bench-")
        .tempdir_in(base)
        .with_context(|| format!("cannot make a directory in {}", base.display()))
}

/// The middle, the least and the most of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// Of no figures at all there is none.
    fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted.get(sorted.len() / 2)?;
        let lower = sorted.get((sorted.len() - 1) / 2)?;
        Some(Self { median: (lower + upper) / 2.0, min, max })
    }
}

/// The figure below which a share of `sorted` lies, by the nearest rank.
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(sorted.len().checked_sub(1)?)).copied()
}

/// Rounds to what a reader can use.
fn rounded(figure: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (figure * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_some_figures() {
        for (figures, wanted) in [
            (vec![], None),
            (vec![3.0], Some((3.0, 3.0, 3.0))),
            (vec![4.0, 1.0], Some((2.5, 1.0, 4.0))),
            (vec![9.0, 1.0, 2.0], Some((2.0, 1.0, 9.0))),
        ] {
            let spread = Spread::of(figures.clone()).map(|s| (s.median, s.min, s.max));
            assert_eq!(spread, wanted, "{figures:?}");
        }
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let figures: Vec<f64> = (1..=100).map(f64::from).collect();
        for (share, wanted) in [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)] {
            assert_eq!(percentile(&figures, share), Some(wanted), "{share}");
        }
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
    }
}
