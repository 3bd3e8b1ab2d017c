//! What lessees and operators do meanwhile: each node's lessee orders leases from whoever is best,
//! claims most of them with real programs, renews some, gives some back early, and lets others run
//! to their term or lapse; now and then it wants a gang. Each node's operator takes slack back, or
//! drains the host, and sells again.
//!
//! Nothing here judges an answer: a node that was killed gives none. What a node was asked and
//! answered is in its history.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream;
use leasehold_node::api::body::{
    ClaimRequest, Claimed, DrainRequest, EndLine, GangRequest, Ganged, LeaseRequest, Leased,
    OnLoss, ReclaimRequest, Reclaimed, Released, RenewRequest, Renewed, Resumed, Uploaded,
};
use leasehold_node::api::want::{ClassText, JobText, PayloadText, Text, WantText};
use leasehold_node::client::{Client, ClientError};
use leasehold_proto::base::dice::Dice;
use tokio::time::{sleep, timeout};

/// How long an answer is waited for: a node that was killed or stands still gives none.
const PATIENCE: Duration = Duration::from_secs(15);

/// A program that says something ten times a second, so often.
const TICKER: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write"
    (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "tick\n")
  (data (i32.const 16) "\00\00\00\00\05\00\00\00")
  (func (export "_start") (local $left i32)
    ;; A subscription to the monotonic clock, a tenth of a second from now.
    (i32.store (i32.const 80) (i32.const 1))
    (i64.store (i32.const 88) (i64.const 100000000))
    (local.set $left (i32.const TICKS))
    (loop $again
      (drop (call $write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 32)))
      (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))
      (local.set $left (i32.sub (local.get $left) (i32.const 1)))
      (br_if $again (local.get $left)))))"#;
/// A program that never ends and never waits: it has to be ended.
const SPINNER: &str = r#"(module
  (memory (export "memory") 1)
  (func (export "_start") (loop $again (br $again))))"#;

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// The longest term, in milliseconds.
    pub(super) term_ms: u64,
    /// The mean time between two orders of one lessee.
    pub(super) every: Duration,
    /// When no new lease is ordered any more.
    pub(super) until: Instant,
}

/// What lessees were told.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) leases: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) failed: AtomicU64,
}

/// The programs, as WebAssembly: short, longer than most terms, and endless.
pub(super) fn programs() -> Result<Vec<Bytes>, wat::Error> {
    let ticker = |ticks: &str| TICKER.replace("TICKS", ticks);
    let texts = [ticker("10"), ticker("40"), ticker("1000"), SPINNER.to_string()];
    texts.iter().map(|text| wat::parse_str(text).map(Bytes::from)).collect()
}

async fn patiently<T>(
    asked: impl Future<Output = Result<T, ClientError>>,
) -> Option<Result<T, ClientError>> {
    timeout(PATIENCE, asked).await.ok()
}

/// One lessee, until its time is over. Its leases may last longer.
pub(super) async fn lessee(
    client: Client,
    seed: u64,
    load: Load,
    programs: Arc<Vec<Bytes>>,
    told: Arc<Told>,
) {
    let mut dice = Dice::new(seed);
    while Instant::now() < load.until {
        let every = u64::try_from(load.every.as_millis()).unwrap_or(1_000);
        sleep(Duration::from_millis(every / 2 + dice.below(every.max(1)))).await;
        let (lease, seed) = (want(&mut dice, load.term_ms), dice.number());
        let client = client.clone();
        let (programs, told) = (Arc::clone(&programs), Arc::clone(&told));
        // Beside the next one: an order to a host that is gone takes a while.
        if dice.chance(1, 8) {
            tokio::spawn(async move { gang(&client, lease, seed, &programs, &told).await });
            continue;
        }
        tokio::spawn(async move {
            let request = LeaseRequest { want: Some(lease), order: None };
            let asked = client.post::<Leased>("/v1/leases", &request);
            let count = match patiently(asked).await {
                Some(Ok(leased)) => {
                    told.leases.fetch_add(1, Ordering::Relaxed);
                    return use_lease(&client, &leased.lease, seed, &programs).await;
                }
                Some(Err(ClientError::Answer { .. })) => &told.refused,
                _ => &told.failed,
            };
            count.fetch_add(1, Ordering::Relaxed);
        });
    }
}

fn want(dice: &mut Dice, term_ms: u64) -> WantText {
    let millis = |ms: u64| Text(format!("{ms}ms"));
    // Renewals fit into the longest term.
    let term = 2_000 + dice.below((term_ms / 2).saturating_sub(2_000).max(1));
    WantText {
        class: if dice.chance(1, 3) { ClassText::Slack } else { ClassText::Firm },
        max_ttl: dice.chance(1, 2).then(|| millis(2 * term)),
        cpu: Text("0.1".into()),
        memory: Text("96M".into()),
        disk: Text("4M".into()),
        ttl: millis(term),
        claim_within: millis((500 + dice.below(4_000)).min(term)),
        receipt_every: millis(500 + dice.below(3_000)),
        ..WantText::new("100", "100")
    }
}

async fn use_lease(client: &Client, lease: &str, seed: u64, programs: &[Bytes]) {
    let mut dice = Dice::new(seed);
    let nth = usize::try_from(dice.below(programs.len() as u64)).unwrap_or(0);
    let Some(program) = programs.get(nth) else { return };
    let follows = match dice.below(10) {
        // Never claimed: it lapses.
        0 => return,
        1..=3 => Follows::Release(Duration::from_millis(dice.below(4_000))),
        4..=7 => Follows::AwaitEnd,
        _ => Follows::Nothing,
    };
    let release_after = dice.chance(1, 2);
    if !claim(client, lease, program, release_after).await {
        return;
    }
    if dice.chance(1, 2) {
        sleep(Duration::from_millis(dice.below(3_000))).await;
        // To more than was agreed now and then, which must be refused.
        let ttl = Text(format!("{}ms", 4_000 + dice.below(16_000)));
        let path = format!("/v1/leases/{lease}/renew");
        let _ = patiently(client.post::<Renewed>(&path, &RenewRequest { ttl })).await;
    }
    match follows {
        Follows::Nothing => {}
        Follows::AwaitEnd => {
            let path = format!("/v1/leases/{lease}/end?timeout_s=30");
            let _ = timeout(2 * PATIENCE, client.get::<EndLine>(&path)).await;
        }
        Follows::Release(after) => {
            sleep(after).await;
            let path = format!("/v1/leases/{lease}/release");
            let _ = patiently(client.post::<Released>(&path, &())).await;
        }
    }
}

enum Follows {
    Nothing,
    AwaitEnd,
    Release(Duration),
}

/// Leases on two or three hosts, each with the same job, together or not at all.
async fn gang(client: &Client, want: WantText, seed: u64, programs: &[Bytes], told: &Told) {
    let mut dice = Dice::new(seed);
    let nth = usize::try_from(dice.below(programs.len() as u64)).unwrap_or(0);
    let Some(program) = programs.get(nth) else { return };
    let Some(job) = job(client, program, dice.chance(1, 2)).await else { return };
    let nodes = if dice.chance(1, 3) { 3 } else { 2 };
    let want = WantText { claim_within: Text("4s".into()), ttl: Text("8s".into()), ..want };
    let on_loss = if dice.chance(1, 2) { OnLoss::End } else { OnLoss::Continue };
    let request =
        GangRequest { want: WantText { max_ttl: None, ..want }, nodes, job: Some(job), on_loss };
    let asked = client.post::<Ganged>("/v1/gangs", &request);
    let count = match timeout(2 * PATIENCE, asked).await {
        Ok(Ok(_)) => &told.leases,
        Ok(Err(ClientError::Answer { .. })) => &told.refused,
        _ => &told.failed,
    };
    count.fetch_add(1, Ordering::Relaxed);
}

/// One host's operator, until its time is over: takes slack back or drains, and sells again.
pub(super) async fn operator(client: Client, seed: u64, until: Instant) {
    let mut dice = Dice::new(seed);
    while Instant::now() < until {
        sleep(Duration::from_millis(5_000 + dice.below(15_000))).await;
        let within = Text(format!("{}ms", dice.below(8_000)));
        if dice.chance(1, 3) {
            let request = DrainRequest { within, revoke: dice.chance(1, 2), dry_run: false };
            let _ = patiently(client.post::<Reclaimed>("/v1/drain", &request)).await;
        } else {
            let cpu = Some(Text("0.3".into()));
            let (memory, disk, dry_run) = (None, None, dice.chance(1, 5));
            let request = ReclaimRequest { cpu, memory, disk, within, dry_run };
            let _ = patiently(client.post::<Reclaimed>("/v1/reclaim", &request)).await;
        }
        sleep(Duration::from_millis(dice.below(6_000))).await;
        // However long the node is away: a host that sells nothing has nothing to judge.
        while !matches!(patiently(client.post::<Resumed>("/v1/resume", &())).await, Some(Ok(_))) {
            sleep(Duration::from_millis(500)).await;
        }
    }
}

/// Uploads the program and claims the lease with it. Whether that was answered with a yes.
async fn claim(client: &Client, lease: &str, program: &Bytes, release_after: bool) -> bool {
    let Some(job) = job(client, program, release_after).await else { return false };
    let path = format!("/v1/leases/{lease}/claim");
    let request = ClaimRequest { job };
    let asked = client.post::<Claimed>(&path, &request);
    matches!(patiently(asked).await, Some(Ok(_)))
}

/// Uploads the program for a job.
async fn job(client: &Client, program: &Bytes, release_after: bool) -> Option<JobText> {
    let body = stream::iter([Ok(program.clone())]);
    let path = format!("/v1/payloads?size={}", program.len());
    let uploaded = client.upload::<Uploaded>(&path, body, PATIENCE);
    let Some(Ok(Uploaded { root, size, .. })) = patiently(uploaded).await else { return None };
    Some(JobText {
        runtime: "wasm".into(),
        program: PayloadText { root, size },
        args: Vec::new(),
        env: std::collections::BTreeMap::new(),
        stdin: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
        release_after,
    })
}
