//! Order to grant: how many leases a second two nodes make with each other, and how long one
//! takes.
//!
//! ```text
//! client --HTTP, kept open--> lessee --order--> lessor
//!   ^                           |  ^              | judged, kept, synced
//!   '------- 201 ---------------'  '--grant-------'
//!        grant verified, kept, synced
//! ```
//!
//! A client asks for the next lease as soon as it has one. Nothing is claimed, so grants lapse and
//! give their capacity back: that work, too, is done while the next ones are made.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use serde::Serialize;
use tokio::{task::JoinSet, time::sleep};

use super::{
    api::{Door, Kept, metric},
    line, machine, percentile, rounded,
};
use crate::fleet::{Fleet, Plan, config};

/// What comes before it counts: links open, caches warm, the first grants lapsed.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long a grant waits to be claimed. Short: so much capacity is promised at once.
const CLAIM_WITHIN: &str = "250ms";
/// How long two nodes may take to see each other.
const MAP: Duration = Duration::from_secs(30);
/// How many errors a client meets before it gives up.
const MAX_ERRORS: u64 = 1_000;

/// Options of `bench lease`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How long each case is measured, in seconds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// How many clients ask at once, case by case.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=512))]
    clients: Vec<u16>,
    /// Where the nodes live, and their journals [default: the directory for temporary files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct CaseLine {
    bench: &'static str,
    clients: u16,
    grants_per_s: f64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
    /// Grants for each sync of the lessor's journal.
    grants_per_sync: Option<f64>,
    /// Grants for each sync of the lessee's journal.
    grants_per_lessee_sync: Option<f64>,
    errors: u64,
    seconds: u64,
    /// Processor time per grant of each process, lapses included.
    lessor_cpu_ms: Option<f64>,
    lessee_cpu_ms: Option<f64>,
    client_cpu_ms: Option<f64>,
    /// What the journals are on.
    journal_on: String,
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    // One thread: the cores are the nodes'.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for clients in &options.clients {
            let measured = Box::pin(case(options, *clients)).await;
            line(&measured.with_context(|| format!("with {clients} clients"))?)?;
        }
        Ok(())
    })
}

async fn case(options: &Options, clients: u16) -> anyhow::Result<CaseLine> {
    let mut lessor = config("lessor");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    lessor.offer.cpu = cores.to_string();
    lessor.offer.memory = "1G".into();
    let mut lessee = config("lessee");
    lessee.offer.sell = false;
    let room = match &options.dir {
        Some(dir) => Some(tempfile::Builder::new().prefix("leasehold-bench-").tempdir_in(dir)?),
        None => None,
    };
    let mut plan = Plan::new(vec![lessor, lessee]);
    plan.dir = room.as_ref().map(|room| room.path().to_path_buf());
    let fleet = Fleet::start(plan).await?;
    let measured = measure(&fleet, options.seconds, clients).await;
    let stopped = fleet.stop().await;
    let measured = measured?;
    stopped?;
    Ok(measured)
}

/// What a process had done and used at some instant.
#[derive(Debug)]
struct Mark {
    grants: Option<f64>,
    syncs: Option<f64>,
    cpu: Duration,
}

async fn mark(fleet: &Fleet, index: usize, kept: &mut Kept) -> anyhow::Result<Mark> {
    let text = kept.get("/metrics").await?;
    Ok(Mark {
        grants: metric(&text, "leasehold_grants_total"),
        syncs: metric(&text, "leasehold_store_syncs_total"),
        cpu: fleet.member(index)?.usage()?.cpu,
    })
}

async fn measure(fleet: &Fleet, seconds: u64, clients: u16) -> anyhow::Result<CaseLine> {
    fleet.map(MAP).await?;
    let (lessor, lessee) = (fleet.member(0)?, fleet.member(1)?);
    let pids = (lessor.file()?.pid, lessee.file()?.pid);
    eprintln!("{clients} clients: lessor is process {}, lessee {}", pids.0, pids.1);
    let want = want(&lessor.file()?.id.to_string());
    let door = Door::of(lessee)?;
    let mut of_lessor = Door::of(lessor)?.open().await?;
    let mut of_lessee = door.open().await?;
    ready(&mut of_lessee, &want).await?;

    // Figures of the nodes are read outside the time that is measured: a look costs them a little.
    let before = [mark(fleet, 0, &mut of_lessor).await?, mark(fleet, 1, &mut of_lessee).await?];
    let cpu_before = machine::cpu_s();
    let from = Instant::now() + WARM_UP;
    let until = from + Duration::from_secs(seconds);
    let mut asking = JoinSet::new();
    for _ in 0..clients {
        let (door, want) = (door.clone(), want.clone());
        asking.spawn(async move { client(&door, &want, from, until).await });
    }
    let mut all = Asked::default();
    while let Some(asked) = asking.join_next().await {
        let Asked { took_ms, granted, errors } = asked??;
        all.took_ms.extend(took_ms);
        all.granted += granted;
        all.errors += errors;
    }
    let cpu = machine::cpu_s() - cpu_before;
    let after = [mark(fleet, 0, &mut of_lessor).await?, mark(fleet, 1, &mut of_lessee).await?];

    let Asked { mut took_ms, granted, errors } = all;
    took_ms.sort_by(f64::total_cmp);
    let of = |share| percentile(&took_ms, share).map(|ms| rounded(ms, 2));
    let [lessor_before, lessee_before] = before;
    let [lessor_after, lessee_after] = after;
    let grants = difference(lessor_before.grants, lessor_after.grants);
    let per_sync = |before: &Mark, after: &Mark| {
        let syncs = difference(before.syncs, after.syncs)?;
        (syncs > 0.0).then(|| rounded(grants.unwrap_or_default() / syncs, 2))
    };
    let per_grant = |s: f64| (granted > 0).then(|| rounded(s * 1e3 / granted as f64, 3));
    let used =
        |before: &Mark, after: &Mark| per_grant(after.cpu.saturating_sub(before.cpu).as_secs_f64());
    Ok(CaseLine {
        bench: "lease",
        clients,
        grants_per_s: rounded(took_ms.len() as f64 / seconds as f64, 1),
        p50_ms: of(0.5),
        p99_ms: of(0.99),
        max_ms: of(1.0),
        grants_per_sync: per_sync(&lessor_before, &lessor_after),
        grants_per_lessee_sync: per_sync(&lessee_before, &lessee_after),
        errors,
        seconds,
        lessor_cpu_ms: used(&lessor_before, &lessor_after),
        lessee_cpu_ms: used(&lessee_before, &lessee_after),
        client_cpu_ms: per_grant(cpu),
        journal_on: machine::file_system(fleet.root()),
    })
}

fn difference(before: Option<f64>, after: Option<f64>) -> Option<f64> {
    Some(after? - before?)
}

/// A thousandth of a core and 64 KiB: what limits is the protocol, not the host's size.
fn want(lessor: &str) -> Bytes {
    let want = serde_json::json!({ "want": {
        "cpu": "1m", "memory": "64K", "disk": "0", "ttl": "60s", "claim_within": CLAIM_WITHIN,
        "max_price": "1000000", "budget": "1000000", "lessors": [lessor],
    } });
    Bytes::from(want.to_string())
}

/// Waits until a lease can be had: a map comes before a link, and an offer somewhat later.
async fn ready(lessee: &mut Kept, want: &Bytes) -> anyhow::Result<()> {
    let deadline = Instant::now() + MAP;
    loop {
        match lessee.create("/v1/leases", want).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// What clients met.
#[derive(Debug, Default)]
struct Asked {
    /// How long each lease took that was asked for and came in the time that counts.
    took_ms: Vec<f64>,
    /// All leases.
    granted: u64,
    /// All that did not come.
    errors: u64,
}

async fn client(door: &Door, want: &Bytes, from: Instant, until: Instant) -> anyhow::Result<Asked> {
    let mut kept = door.open().await?;
    let mut asked = Asked::default();
    loop {
        let start = Instant::now();
        if start >= until {
            return Ok(asked);
        }
        match kept.create("/v1/leases", want).await {
            Ok(_) => {
                let end = Instant::now();
                asked.granted += 1;
                if start >= from && end <= until {
                    asked.took_ms.push((end - start).as_secs_f64() * 1e3);
                }
            }
            Err(error) => {
                asked.errors += 1;
                if asked.errors == 1 {
                    eprintln!("a client's first error: {error:#}");
                }
                if asked.errors >= MAX_ERRORS {
                    return Err(error);
                }
                sleep(Duration::from_millis(20)).await;
                kept = door.open().await?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use leasehold_node::api::body::LeaseRequest;

    use super::*;

    #[test]
    fn what_is_wanted_is_understood() {
        let key = leasehold_proto::words::sign::Signer::from_seed(&[3; 32]).id().to_string();
        let request: LeaseRequest = serde_json::from_slice(&want(&key)).expect("a request");
        let want = request.want.expect("a want").parse().expect("sound");
        assert_eq!((want.shape.cpu_milli, want.shape.memory), (1, 64 << 10));
    }
}
