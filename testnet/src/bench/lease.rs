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
use tokio::time::sleep;

use super::{
    api::{Door, Kept, metric},
    line,
    load::{Client, drive},
    machine, rounded, temporary,
};
use crate::fleet::{Fleet, Member, Plan, config};

/// What comes before it counts: links open, caches warm, the first grants lapsed.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long a grant waits to be claimed. Short: so much capacity is promised at once.
const CLAIM_WITHIN: &str = "250ms";
/// How long two nodes may take to see each other.
const MAP: Duration = Duration::from_secs(30);

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
    let room = options.dir.as_deref().map(temporary).transpose()?;
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

async fn mark(member: &Member) -> anyhow::Result<Mark> {
    let text = Door::of(member)?.get("/metrics").await?;
    Ok(Mark {
        grants: metric(&text, "leasehold_grants_total"),
        syncs: metric(&text, "leasehold_store_syncs_total"),
        cpu: member.usage()?.cpu,
    })
}

async fn measure(fleet: &Fleet, seconds: u64, clients: u16) -> anyhow::Result<CaseLine> {
    fleet.map(MAP).await?;
    let (lessor, lessee) = (fleet.member(0)?, fleet.member(1)?);
    let pids = (lessor.file()?.pid, lessee.file()?.pid);
    eprintln!("{clients} clients: lessor is process {}, lessee {}", pids.0, pids.1);
    let want = want(&lessor.file()?.id.to_string());
    let door = Door::of(lessee)?;
    ready(&mut door.open().await?, &want).await?;
    let mut asking = Vec::new();
    for _ in 0..clients {
        asking.push(Lessee { kept: door.open().await?, want: want.clone() });
    }

    // Figures of the nodes are read outside the time that is measured: a look costs them a little.
    let before = [mark(lessor).await?, mark(lessee).await?];
    let cpu_before = machine::cpu_s();
    let from = Instant::now() + WARM_UP;
    let until = from + Duration::from_secs(seconds);
    let (_, asked) = drive(asking, from, until).await?;
    let cpu = machine::cpu_s() - cpu_before;
    let after = [mark(lessor).await?, mark(lessee).await?];

    let [p50_ms, p99_ms, max_ms] = asked.percentiles([0.5, 0.99, 1.0]);
    let [lessor_before, lessee_before] = before;
    let [lessor_after, lessee_after] = after;
    let grants = difference(lessor_before.grants, lessor_after.grants);
    let per_sync = |before: &Mark, after: &Mark| {
        let syncs = difference(before.syncs, after.syncs)?;
        (syncs > 0.0).then(|| rounded(grants.unwrap_or_default() / syncs, 2))
    };
    let per_grant = |s: f64| (asked.came > 0).then(|| rounded(s * 1e3 / asked.came as f64, 3));
    let used =
        |before: &Mark, after: &Mark| per_grant(after.cpu.saturating_sub(before.cpu).as_secs_f64());
    Ok(CaseLine {
        bench: "lease",
        clients,
        grants_per_s: rounded(asked.took_ms.len() as f64 / seconds as f64, 1),
        p50_ms,
        p99_ms,
        max_ms,
        grants_per_sync: per_sync(&lessor_before, &lessor_after),
        grants_per_lessee_sync: per_sync(&lessee_before, &lessee_after),
        errors: asked.errors,
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

/// Asks the lessee, on a connection of its own.
struct Lessee {
    kept: Kept,
    want: Bytes,
}

impl Client for Lessee {
    async fn ask(&mut self) -> anyhow::Result<Option<Instant>> {
        self.kept.create("/v1/leases", &self.want).await?;
        Ok(Some(Instant::now()))
    }

    async fn again(&mut self) -> anyhow::Result<()> {
        self.kept.again().await
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
