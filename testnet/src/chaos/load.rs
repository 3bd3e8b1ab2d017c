//! What lessees do meanwhile: each node's lessee orders leases from whoever is best, claims most of
//! them with real programs, gives some back early, and lets others run to their term or lapse.
//!
//! Nothing here judges an answer: a node that was killed gives none. What a node was asked and
//! answered is in its history.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream;
use leasehold_node::api::body::{
    ClaimRequest, Claimed, EndLine, LeaseRequest, Leased, Released, Uploaded,
};
use leasehold_node::api::want::{JobText, PayloadText, Text, WantText};
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
    let term = 2_000 + dice.below(term_ms.saturating_sub(2_000).max(1));
    WantText {
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

/// Uploads the program and claims the lease with it. Whether that was answered with a yes.
async fn claim(client: &Client, lease: &str, program: &Bytes, release_after: bool) -> bool {
    let body = stream::iter([Ok(program.clone())]);
    let path = format!("/v1/payloads?size={}", program.len());
    let uploaded = client.upload::<Uploaded>(&path, body, PATIENCE);
    let Some(Ok(Uploaded { root, size, .. })) = patiently(uploaded).await else { return false };
    let job = JobText {
        runtime: "wasm".into(),
        program: PayloadText { root, size },
        args: Vec::new(),
        env: std::collections::BTreeMap::new(),
        stdin: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
        release_after,
    };
    let path = format!("/v1/leases/{lease}/claim");
    let request = ClaimRequest { job };
    let asked = client.post::<Claimed>(&path, &request);
    matches!(patiently(asked).await, Some(Ok(_)))
}
