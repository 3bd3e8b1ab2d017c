//! Memory: what a node needs for the leases that it knows, on either side of them.
//!
//! ```text
//! two nodes ──> some leases, held             live: as many as the lessor has capacity for
//!           ──> given back, and more          all: ended ones, the last ones live
//!           ──> given back                    ended
//!           ──> killed and started again      restarted
//! ```
//!
//! A lessor knows a lease that is over until its order can no longer be repeated, some half a
//! minute, or its last receipt is countersigned, if that is later; a lessee knows the latest
//! thousand. So the benchmark has to be quick, and says how many leases the nodes said they know.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use tokio::time::sleep;

use super::{
    api::{Door, Kept, metric},
    block_on, line, machine,
    pair::{Pair, cores, each, obtain},
    rounded, settled,
};

/// How long nothing happens before memory is read.
const SETTLE: Duration = Duration::from_secs(2);
/// How long the leases are, and may wait to be claimed: longer than the benchmark.
const LONG: &str = "1h";

/// Options of `bench memory`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How many leases are made.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    leases: u32,
    /// Where the nodes live, and their journals [default: the directory for temporary files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// What a node has at some moment.
#[derive(Debug, Clone, Copy, Serialize)]
struct Look {
    /// Leases that were made so far, those of them that it knows, and those that are not over.
    made: usize,
    known: u32,
    live: u32,
    /// Resident memory, 10^6 bytes.
    rss_mb: f64,
    /// What 10,000 of those that were made take, by the difference to the idle node.
    mb_per_10k: Option<f64>,
}

#[derive(Debug, Serialize)]
struct SideLine {
    bench: &'static str,
    /// `lessor` or `lessee`.
    side: &'static str,
    idle_mb: f64,
    live: Look,
    all: Look,
    ended: Look,
    restarted: Look,
    /// What the journals are on.
    journal_on: String,
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    block_on(async {
        for side in Box::pin(case(options)).await? {
            line(&side)?;
        }
        Ok(())
    })
}

async fn case(options: &Options) -> anyhow::Result<[SideLine; 2]> {
    let mut pair = Pair::start(options.dir.as_deref(), Some(LONG)).await?;
    let measured = measure(&mut pair, options).await;
    settled(measured, pair.stop().await)
}

async fn measure(pair: &mut Pair, options: &Options) -> anyhow::Result<[SideLine; 2]> {
    let want = pair.want(1, "64K", LONG, LONG)?;
    // What a lessor with so many cores can promise at once, less what else is asked for.
    let room = cores() * 1000 - 50;
    let all = usize::try_from(options.leases)?;
    let door = Door::of(pair.lessee()?)?;
    let first = obtain(&door, &want, 1).await?;
    each(&door, &first, give_back).await?;
    let idle = look(pair, 1, None).await?;

    let mut held = obtain(&door, &want, room.min(all)).await?;
    let mut made = held.len();
    let live = look(pair, made, Some(&idle)).await?;
    while made < all {
        each(&door, &held, give_back).await?;
        held = obtain(&door, &want, room.min(all - made)).await?;
        made += held.len();
    }
    eprintln!("{made} leases were made");
    let many = look(pair, made, Some(&idle)).await?;
    each(&door, &held, give_back).await?;
    let ended = look(pair, made, Some(&idle)).await?;
    pair.restart().await?;
    let restarted = look(pair, made, Some(&idle)).await?;

    let journal_on = machine::file_system(pair.fleet.root());
    let side = |n: usize, side| {
        let of = |looks: &[Look; 2]| looks.get(n).copied().context("two sides");
        anyhow::Ok(SideLine {
            bench: "memory",
            side,
            idle_mb: of(&idle)?.rss_mb,
            live: of(&live)?,
            all: of(&many)?,
            ended: of(&ended)?,
            restarted: of(&restarted)?,
            journal_on: journal_on.clone(),
        })
    };
    Ok([side(0, "lessor")?, side(1, "lessee")?])
}

async fn give_back(kept: &mut Kept, lease: &str) -> anyhow::Result<()> {
    kept.release(lease).await
}

/// What both have now, the lessor first.
async fn look(pair: &Pair, made: usize, idle: Option<&[Look; 2]>) -> anyhow::Result<[Look; 2]> {
    sleep(SETTLE).await;
    let mut looks = Vec::new();
    for (member, name) in [(pair.lessor()?, "lent"), (pair.lessee()?, "held")] {
        let resident = member.usage()?.resident as f64 / 1e6;
        let text = Door::of(member)?.get("/metrics").await?;
        let count = |stage: &str| {
            let name = format!("leasehold_leases_{name}{{stage=\"{stage}\"}}");
            metric(&text, &name).unwrap_or_default() as u32
        };
        let live: u32 = ["granted", "active", "draining", "ordered", "claimed"]
            .iter()
            .map(|stage| count(stage))
            .sum();
        let known = live + count("ended");
        let before = idle.and_then(|idle| idle.get(looks.len())).map(|idle| idle.rss_mb);
        let mb_per_10k =
            before.map(|before| rounded((resident - before) / made as f64 * 10_000.0, 1));
        looks.push(Look { made, known, live, rss_mb: rounded(resident, 1), mb_per_10k });
    }
    looks.try_into().ok().context("two sides")
}
