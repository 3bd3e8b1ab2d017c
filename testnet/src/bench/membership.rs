//! Who is there: how fast a fleet of real nodes finds itself, notices a death and spreads an
//! offer, and what it costs to stand by.
//!
//! ```text
//! spawn all ──> every node sees every node up                              full_map_ms
//! spawn one ──> it sees all, all see it                                    late_joiner_ms
//! a lease   ──> 99 of 100 nodes see what its lessor still has free         offer_p99_ms
//! SIGKILL   ──> each other node says that the node is down                 dead_p50_ms, dead_max_ms
//! nothing   ──> bytes on loopback, memory and processor time of each node  idle
//! ```
//!
//! What nodes see is read from their APIs, one request at a time and none to a node that has
//! already seen: asking costs the nodes some of the time that is measured, so figures are bounds
//! from above. The resolution is one round over those that have not seen yet.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::{
    Spread,
    api::{Door, Kept},
    block_on, line, percentile, rounded, settled, temporary,
};
use crate::fleet::{Fleet, Plan, config};

/// How long the fleet may take for any one thing.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long the fleet is left alone before it counts as idle.
const SETTLE: Duration = Duration::from_secs(5);
/// The pause between two rounds of questions.
const ROUND: Duration = Duration::from_millis(10);
/// How often an offer is changed; the median is given.
const OFFERS: usize = 3;

/// Options of `bench membership`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How many nodes, case by case.
    #[arg(long, value_delimiter = ',', default_value = "20,50")]
    #[arg(value_parser = clap::value_parser!(u16).range(3..=500))]
    nodes: Vec<u16>,
    /// How long the idle fleet is watched, in seconds.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=600))]
    idle: u64,
    /// Where the nodes live [default: the directory for temporary files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct CaseLine {
    bench: &'static str,
    nodes: u16,
    full_map_ms: f64,
    /// Processor time of each node up to then, on average: what a faster machine divides.
    start_cpu_ms: f64,
    /// From its start to it seeing all and all seeing it.
    late_joiner_ms: f64,
    dead_p50_ms: Option<f64>,
    dead_max_ms: Option<f64>,
    offer_p99_ms: Option<f64>,
    /// Bytes a second and node on the loopback interface, each counted once.
    idle_bytes_per_s: Option<f64>,
    /// Megabytes (10^6 bytes) of memory of each node, pages shared with others by share (PSS).
    rss_mb: Option<f64>,
    /// The same with shared pages counted whole in each.
    rss_whole_mb: Option<f64>,
    /// Processor time of each idle node, in hundredths of a core.
    cpu_percent: Option<f64>,
    threads: Option<f64>,
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    block_on(async {
        for nodes in &options.nodes {
            let measured = Box::pin(case(options, *nodes)).await;
            line(&measured.with_context(|| format!("with {nodes} nodes"))?)?;
        }
        Ok(())
    })
}

async fn case(options: &Options, nodes: u16) -> anyhow::Result<CaseLine> {
    let room = options.dir.as_deref().map(temporary).transpose()?;
    // The last one joins late.
    let configs = (1..nodes).map(|n| config(&format!("n{n:03}"))).collect();
    let mut plan = Plan::new(configs);
    plan.dir = room.as_ref().map(|room| room.path().to_path_buf());
    let mut fleet = Fleet::found(plan)?;
    let measured = measure(&mut fleet, options, nodes).await;
    settled(measured, fleet.stop().await)
}

async fn measure(fleet: &mut Fleet, options: &Options, nodes: u16) -> anyhow::Result<CaseLine> {
    let begin = Instant::now();
    fleet.start_all().await?;
    eprintln!("{nodes} nodes: {} listen after {:.1} s", nodes - 1, begin.elapsed().as_secs_f64());
    let all = others(fleet, None)?;
    let mut watch = Watch::over(fleet, None).await?;
    let map = seen(&mut watch, begin, |map| all.iter().all(|id| map.up(id))).await?;
    let full_map_ms = map.last().copied().context("there are no nodes")?;
    let start_cpu_ms = cpu(fleet)?.as_secs_f64() * 1e3 / f64::from(nodes - 1);
    eprintln!("{nodes} nodes: all see all after {full_map_ms:.0} ms");

    let late = fleet.add(config("late"))?;
    let begin = Instant::now();
    fleet.start_one(late).await?;
    let joiner = fleet.member(late)?.file()?.id.to_string();
    let mut own = Watch { eyes: vec![Door::of(fleet.member(late)?)?.open().await?] };
    let sees = seen(&mut own, begin, |map| all.iter().all(|id| map.up(id))).await?;
    let seen_by = seen(&mut watch, begin, |map| map.up(&joiner)).await?;
    let late_joiner_ms = sees.iter().chain(&seen_by).copied().fold(0.0, f64::max);
    eprintln!("{nodes} nodes: a late one is in after {late_joiner_ms:.0} ms");

    let mut offers = Vec::new();
    for turn in 0..OFFERS {
        sleep(Duration::from_secs(2)).await;
        offers.push(offer(fleet, turn % usize::from(nodes - 1)).await?);
    }
    let offer_p99_ms = Spread::of(offers).map(|spread| rounded(spread.median, 0));

    drop((watch, own));
    let idle = idle(fleet, options.idle).await?;

    let mut watch = Watch::over(fleet, Some(late)).await?;
    let begin = Instant::now();
    fleet.kill(late)?;
    let mut dead = seen(&mut watch, begin, |map| map.down(&joiner)).await?;
    dead.sort_by(f64::total_cmp);
    let of = |share| percentile(&dead, share).map(|ms| rounded(ms, 0));
    Ok(CaseLine {
        bench: "membership",
        nodes,
        full_map_ms: rounded(full_map_ms, 0),
        start_cpu_ms: rounded(start_cpu_ms, 1),
        late_joiner_ms: rounded(late_joiner_ms, 0),
        dead_p50_ms: of(0.5),
        dead_max_ms: of(1.0),
        offer_p99_ms,
        idle_bytes_per_s: idle.bytes_per_s.map(|bytes| rounded(bytes, 0)),
        rss_mb: idle.pss.map(|bytes| rounded(bytes / 1e6, 1)),
        rss_whole_mb: idle.rss.map(|bytes| rounded(bytes / 1e6, 1)),
        cpu_percent: Some(rounded(idle.cpu_percent, 2)),
        threads: idle.threads.map(|threads| rounded(threads, 1)),
    })
}

/// The ids of all running nodes but one.
fn others(fleet: &Fleet, but: Option<usize>) -> anyhow::Result<Vec<String>> {
    let members = fleet.members().iter().enumerate().filter(|(index, _)| Some(*index) != but);
    members.map(|(_, member)| Ok(member.file()?.id.to_string())).collect()
}

/// Open connections to the nodes that are asked.
struct Watch {
    eyes: Vec<Kept>,
}

impl Watch {
    async fn over(fleet: &Fleet, but: Option<usize>) -> anyhow::Result<Self> {
        let mut eyes = Vec::new();
        for (index, member) in fleet.members().iter().enumerate() {
            if Some(index) != but {
                eyes.push(Door::of(member)?.open().await?);
            }
        }
        Ok(Self { eyes })
    }
}

/// What of a node's map is looked at.
#[derive(Debug, Deserialize)]
struct Map {
    nodes: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    id: String,
    up: bool,
    shapes: Vec<Shape>,
}

#[derive(Debug, Deserialize)]
struct Shape {
    cpu_milli: u64,
}

impl Map {
    fn of(body: &Bytes) -> anyhow::Result<Self> {
        serde_json::from_slice(body).context("a node's map")
    }

    fn entry(&self, id: &str) -> Option<&Entry> {
        self.nodes.iter().find(|entry| entry.id == id)
    }

    fn up(&self, id: &str) -> bool {
        self.entry(id).is_some_and(|entry| entry.up)
    }

    /// Down, or forgotten.
    fn down(&self, id: &str) -> bool {
        !self.up(id)
    }

    fn free(&self, id: &str) -> Option<u64> {
        self.entry(id)?.shapes.first().map(|shape| shape.cpu_milli)
    }
}

/// Asks each node until it sees what is to be seen; gives after how many milliseconds since
/// `begin` each did, in the order in which they did.
async fn seen(
    watch: &mut Watch,
    begin: Instant,
    what: impl Fn(&Map) -> bool,
) -> anyhow::Result<Vec<f64>> {
    let mut after = Vec::with_capacity(watch.eyes.len());
    let mut left: Vec<&mut Kept> = watch.eyes.iter_mut().collect();
    while !left.is_empty() {
        if begin.elapsed() > PATIENCE {
            bail!("{} nodes have not seen it after {} s", left.len(), PATIENCE.as_secs());
        }
        let mut still = Vec::new();
        for eye in left {
            let map = Map::of(&eye.get("/v1/nodes").await?)?;
            if what(&map) {
                after.push(begin.elapsed().as_secs_f64() * 1e3);
            } else {
                still.push(eye);
            }
        }
        left = still;
        if !left.is_empty() {
            sleep(ROUND).await;
        }
    }
    Ok(after)
}

/// Takes a quarter of a core at one node by way of another, and sees how the news spreads: the
/// milliseconds from the lease to when 99 of 100 other nodes know what is still free.
async fn offer(fleet: &Fleet, lessor: usize) -> anyhow::Result<f64> {
    let lessee = usize::from(lessor == 0);
    let id = fleet.member(lessor)?.file()?.id.to_string();
    let mut watch = Watch::over(fleet, Some(lessor)).await?;
    let mut ordering = Door::of(fleet.member(lessee)?)?.open().await?;
    let before = Map::of(&ordering.get("/v1/nodes").await?)?.free(&id);
    let before = before.context("the lessor offers nothing")?;
    let want = serde_json::json!({ "want": {
        "cpu": "250m", "memory": "16M", "disk": "0", "ttl": "120s", "claim_within": "60s",
        "max_price": "1000000", "budget": "1000000", "lessors": [id],
    } });
    let want = Bytes::from(want.to_string());
    ordering.create("/v1/leases", &want).await.context("a lease to change an offer")?;
    let begin = Instant::now();
    let mut after = seen(&mut watch, begin, |map| map.free(&id) == Some(before - 250)).await?;
    after.sort_by(f64::total_cmp);
    percentile(&after, 0.99).context("there are no other nodes")
}

/// What each node costs while nothing happens, on average.
struct Idle {
    bytes_per_s: Option<f64>,
    pss: Option<f64>,
    rss: Option<f64>,
    cpu_percent: f64,
    threads: Option<f64>,
}

async fn idle(fleet: &Fleet, seconds: u64) -> anyhow::Result<Idle> {
    sleep(SETTLE).await;
    let count = fleet.members().len() as f64;
    let (start, cpu_before, sent_before) = (Instant::now(), cpu(fleet)?, loopback_bytes());
    sleep(Duration::from_secs(seconds)).await;
    let (sent_after, cpu_after) = (loopback_bytes(), cpu(fleet)?);
    let span = start.elapsed().as_secs_f64();
    let sent = sent_before.zip(sent_after).map(|(before, after)| after.saturating_sub(before));
    let pids: Vec<u32> = fleet
        .members()
        .iter()
        .map(|member| Ok(member.file()?.pid))
        .collect::<anyhow::Result<_>>()?;
    let mean = |figure: &dyn Fn(u32) -> Option<f64>| {
        let all: Option<Vec<f64>> = pids.iter().map(|pid| figure(*pid)).collect();
        all.map(|all| all.iter().sum::<f64>() / count)
    };
    let memory = |pid: u32, field: &str| {
        kib(&std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, field)
    };
    Ok(Idle {
        bytes_per_s: sent.map(|bytes| bytes as f64 / span / count),
        pss: mean(&|pid| memory(pid, "Pss:")),
        rss: mean(&|pid| memory(pid, "Rss:")),
        cpu_percent: cpu_after.saturating_sub(cpu_before).as_secs_f64() / span / count * 100.0,
        threads: mean(&|pid| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("Threads:"))?;
            line.trim().parse().ok()
        }),
    })
}

/// Processor time of all running nodes so far.
fn cpu(fleet: &Fleet) -> anyhow::Result<Duration> {
    let mut all = Duration::ZERO;
    for member in fleet.members().iter().filter(|member| member.file().is_ok()) {
        all += member.usage()?.cpu;
    }
    Ok(all)
}

/// A field in kB of a file in /proc, in bytes.
fn kib(text: &str, field: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().trim_end_matches("kB").trim().parse::<f64>().ok().map(|kib| kib * 1024.0)
}

/// Bytes sent on the loopback interface so far, with all headers.
fn loopback_bytes() -> Option<u64> {
    sent_on(&std::fs::read_to_string("/proc/net/dev").ok()?, "lo")
}

/// proc_pid_net(5): eight figures of what was received come before those of what was sent.
fn sent_on(text: &str, interface: &str) -> Option<u64> {
    let figures = text.lines().find_map(|line| {
        let (name, figures) = line.split_once(':')?;
        (name.trim() == interface).then_some(figures)
    })?;
    figures.split_ascii_whitespace().nth(8)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_says_is_read() {
        let net = "Inter-|   Receive\n face |bytes\n    lo: 1 2 3 4 5 6 7 8 99 10\n eth0: 1 2\n";
        assert_eq!(sent_on(net, "lo"), Some(99));
        assert_eq!(sent_on(net, "eth0"), None);
        assert_eq!(sent_on(net, "wlan0"), None);
        let smaps = "55-7f [rollup]\nRss:      2048 kB\nPss:       512 kB\nPss_Dirty:  1 kB\n";
        assert_eq!(kib(smaps, "Pss:"), Some(512.0 * 1024.0));
        assert_eq!(kib(smaps, "Swap:"), None);
    }

    #[test]
    fn a_map_tells_who_is_up_and_what_is_free() {
        let body = Bytes::from_static(
            br#"{"currency":"USD","nodes":[{"id":"a","up":true,"shapes":[{"cpu_milli":750}]},
                {"id":"b","up":false,"shapes":[]}]}"#,
        );
        let map = Map::of(&body).expect("a map");
        assert!(map.up("a") && map.down("b") && map.down("c"));
        assert_eq!((map.free("a"), map.free("b")), (Some(750), None));
    }
}
