//! Fleets of real processes: they find each other, run, crash, come back with every grant they
//! had sent, and leave nothing behind.
//!
//! Nothing here waits for a fixed time; patience only says when to give up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use leasehold_node::api::body::{LeaseRequest, Leased, Leases, Side};
use leasehold_node::api::want::{Text, WantText};
use leasehold_node::client::Client;
use leasehold_node::config::Config;
use leasehold_proto::base::dice::Dice;
use leasehold_testnet::fleet::{self, Fleet, FleetError, Plan};
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(60);

fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_leasehold-testnet").into()
}

fn plan(nodes: Vec<Config>) -> Plan {
    Plan { program: program(), ..Plan::new(nodes) }
}

fn three() -> Vec<Config> {
    ["one", "two", "three"].map(fleet::config).into()
}

/// Command lines of processes that name something below `root`, whatever they are.
fn below(root: &Path) -> Vec<String> {
    let root = root.display().to_string();
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let lines = entries.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        (pid != std::process::id() && line.contains(&root)).then_some(line)
    });
    lines.collect()
}

/// Waits until nothing works below `root` any more and, where it should be gone, it is.
fn gone(root: &Path, temporary: bool) {
    let begun = Instant::now();
    while !below(root).is_empty() || (temporary && root.exists()) {
        assert!(begun.elapsed() < PATIENCE, "still there: {:?}", below(root));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A want for as little as can be had, so that many fit.
fn little(lessor: &str) -> WantText {
    WantText {
        cpu: Text("0.001".into()),
        memory: Text("64K".into()),
        disk: Text("0".into()),
        ttl: Text("30m".into()),
        claim_within: Text("20m".into()),
        lessors: vec![lessor.into()],
        ..WantText::new("100", "100")
    }
}

async fn leases(client: &Client, side: Side) -> BTreeSet<String> {
    let all: Leases = client.get("/v1/leases?all=true").await.expect("leases");
    let of_side = all.leases.into_iter().filter(|line| line.side == side);
    of_side.filter_map(|line| line.lease).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_find_each_other_and_leave_nothing() {
    let mut fleet = Fleet::start(plan(three())).await.expect("starts");
    let root = fleet.root().to_path_buf();
    let took = fleet.map(PATIENCE).await.expect("all see all");
    assert!(took > Duration::ZERO && took < PATIENCE, "{took:?}");
    for member in fleet.members() {
        let usage = member.usage().expect("runs");
        assert!(usage.resident > 1 << 20 && usage.cpu > Duration::ZERO, "{usage:?}");
        assert!(member.info().await.expect("answers").joined);
    }
    // One that comes later sees all, and is seen.
    let late = fleet.add(fleet::config("late")).expect("admits");
    fleet.start_one(late).await.expect("starts");
    fleet.map(PATIENCE).await.expect("all see all");
    // A restarted one is the same, on the same ports.
    let before = fleet.member(1).expect("two").file().expect("runs").clone();
    assert!(fleet.stop_one(1).await.expect("runs"), "it had to be killed");
    assert!(matches!(fleet.member(1).expect("two").file(), Err(FleetError::Down(_))));
    fleet.start_all().await.expect("starts again");
    fleet.map(PATIENCE).await.expect("all see all");
    let after = fleet.member(1).expect("two").file().expect("runs").clone();
    assert_eq!((before.id, before.api, before.link), (after.id, after.api, after.link));
    assert_ne!(before.pid, after.pid);
    assert!(below(&root).len() > 4, "nodes and guard: {:?}", below(&root));
    let stopped = fleet.stop().await.expect("stops");
    assert_eq!((stopped.forced, stopped.jobs), (0, 0));
    assert!(!root.exists() && below(&root).is_empty(), "{:?}", below(&root));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_fleet_is_gone() {
    let fleet = Fleet::start(plan(three())).await.expect("starts");
    let root = fleet.root().to_path_buf();
    assert!(!below(&root).is_empty());
    drop(fleet);
    gone(&root, true);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_fleet_says_why() {
    let room = tempfile::tempdir().expect("room");
    let at = |nodes| Plan { dir: Some(room.path().into()), ..plan(nodes) };
    for name in ["", "..", "a/b", "fabric"] {
        let error = Fleet::found(at(vec![fleet::config(name)])).expect_err("no name");
        assert!(matches!(error, FleetError::Plan(_)), "{error}");
    }
    let twice = vec![fleet::config("a"), fleet::config("a")];
    assert!(matches!(Fleet::found(at(twice)), Err(FleetError::Plan(_))));
    let first = Fleet::found(at(vec![fleet::config("a")])).expect("founds");
    let second = Fleet::found(at(vec![fleet::config("a")]));
    assert!(matches!(second, Err(FleetError::InUse(_))));
    drop(first);
    // What a node says when it cannot start is passed on.
    let mut wrong = fleet::config("a");
    wrong.offer.cpu = "1000000".into();
    let error = Fleet::start(at(vec![wrong])).await.expect_err("too much").to_string();
    assert!(error.contains("offer.cpu") && error.contains("node.log"), "{error}");
    gone(room.path(), false);
}

/// A node killed with SIGKILL at any moment comes back with every grant that it had sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_keeps_every_grant_it_sent() {
    const ROUNDS: u32 = 4;
    const CLIENTS: usize = 8;
    let mut buys = fleet::config("buyer");
    buys.offer.sell = false;
    // Nothing may lapse while the test runs.
    let mut sells = fleet::config("seller");
    sells.offer.max_claim_within = "20m".into();
    let nodes = vec![sells, buys, fleet::config("other")];
    let mut fleet = Fleet::start(plan(nodes)).await.expect("starts");
    let root = fleet.root().to_path_buf();
    fleet.map(PATIENCE).await.expect("all see all");
    let seller = fleet.member(0).expect("seller").file().expect("runs").id.to_string();
    let mut dice = Dice::new(u64::from(std::process::id()));
    let mut granted = 0;
    for round in 0..ROUNDS {
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = tokio::task::JoinSet::new();
        let (first, mut answered) = tokio::sync::mpsc::channel::<()>(1);
        for _ in 0..CLIENTS {
            let client = fleet.member(1).expect("buyer").client().expect("runs");
            let request = LeaseRequest { want: Some(little(&seller)), order: None };
            let (stop, first) = (Arc::clone(&stop), first.clone());
            clients.spawn(async move {
                let mut mine = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    match client.post::<Leased>("/v1/leases", &request).await {
                        Ok(leased) => {
                            mine.push(leased.lease);
                            let _ = first.try_send(());
                        }
                        // Down, avoided for a moment, or its offer has not come round again.
                        Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                    }
                }
                mine
            });
        }
        // Grants flow; one of the next is cut off in the middle.
        let flows = tokio::time::timeout(PATIENCE, answered.recv()).await;
        assert!(flows.is_ok(), "no grant came in round {round}");
        tokio::time::sleep(Duration::from_micros(dice.below(60_000))).await;
        fleet.kill(0).expect("runs");
        stop.store(true, Ordering::Relaxed);
        fleet.start_one(0).await.expect("starts again");
        let mut told = BTreeSet::new();
        while let Some(mine) = clients.join_next().await {
            told.extend(mine.expect("no panic"));
        }
        // What clients were told is held, and what is held was granted by the seller.
        let buyer = fleet.member(1).expect("buyer").client().expect("runs");
        let held = leases(&buyer, Side::Held).await;
        let lessor = fleet.member(0).expect("seller").client().expect("runs");
        let lent = leases(&lessor, Side::Lent).await;
        assert!(!told.is_empty() && told.is_subset(&held), "{told:?} {held:?}");
        let lost: Vec<_> = held.difference(&lent).collect();
        assert!(lost.is_empty(), "round {round}: granted, sent and forgotten: {lost:?}");
        assert!(lent.len() > granted, "round {round} granted nothing");
        granted = lent.len();
    }
    fleet.map(PATIENCE).await.expect("all see all again");
    let stopped = fleet.stop().await.expect("stops");
    assert_eq!(stopped.jobs, 0);
    gone(&root, true);
}

/// The command line's `up`, as a process of its own.
struct Up {
    process: Child,
    dir: tempfile::TempDir,
}

impl Up {
    fn start(nodes: &str) -> Self {
        let dir = tempfile::tempdir().expect("room");
        let mut command = Command::new(program());
        command.args(["up", "--json", "--nodes", nodes, "--dir"]).arg(dir.path());
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
        let mut up = Self { process, dir };
        let begun = Instant::now();
        while up.nodes().is_empty() {
            let ended = up.process.try_wait().expect("waits");
            assert!(ended.is_none(), "it ended: {ended:?}");
            assert!(begun.elapsed() < PATIENCE, "no testnet.json");
            std::thread::sleep(Duration::from_millis(20));
        }
        up
    }

    fn nodes(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read(self.dir.path().join("testnet.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("signals");
    }
}

#[test]
fn up_ends_in_order_on_a_signal() {
    let mut up = Up::start("2");
    let nodes = up.nodes();
    assert_eq!(nodes.len(), 2);
    for node in &nodes {
        let text = |field: &str| node[field].as_str().expect("a text").to_string();
        assert!(text("api").starts_with("http://127.0.0.1:") && !text("id").is_empty());
        assert!(node["pid"].as_u64().is_some_and(|pid| pid > 1));
        // What a person would type.
        let mut command = fleet::leasehold(&program());
        command.args(["nodes", "--json", "--api", &text("api"), "--dir", &text("dir")]);
        let output = command.output().expect("runs");
        assert!(output.status.success(), "{output:?}");
    }
    up.signal(Signal::INT);
    assert!(up.process.wait().expect("ends").success());
    assert!(below(up.dir.path()).is_empty(), "{:?}", below(up.dir.path()));
    assert!(up.nodes().is_empty(), "testnet.json names what is gone");
}

#[test]
fn up_that_is_killed_leaves_nothing_either() {
    let mut up = Up::start("2");
    up.signal(Signal::KILL);
    up.process.wait().expect("ends");
    gone(up.dir.path(), false);
}

#[test]
fn the_demonstration_comes_to_its_end() {
    let output = Command::new(program()).args(["demo", "--json"]).output().expect("runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!((object["nodes"].as_u64(), object["verified"].as_bool()), (Some(5), Some(true)));
    assert_eq!(object["cached_bytes_sent"].as_u64(), Some(0));
    assert!(object["payload_bytes"].as_u64().is_some_and(|bytes| bytes > 1_000_000));
    assert!(object["receipts"].as_u64().is_some_and(|receipts| receipts > 0));
    assert!(said.contains("nothing is left running"), "{said}");
}
