//! Small fabrics of real nodes in one process: real sockets on 127.0.0.1, real disks, and jobs as
//! real processes; this executable is also their warden and runner, so it has a `main` of its own.
//!
//! `cargo test -p leasehold-node --test fabric [NAME]` runs those whose name contains NAME.

#[path = "common/founded.rs"]
mod founded;

use std::ffi::OsString;
use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use founded::Fabric;
use leasehold_keys::file::Secret;
use leasehold_node::Node;
use leasehold_node::attach::{self, Frame};
use leasehold_node::config::Config;
use leasehold_node::data::LinkError;
use leasehold_node::data::frame::Refusal as Turned;
use leasehold_node::home::{Allowance, Home, mandate};
use leasehold_node::net::{Limits, Net, NetCommand, NetConfig, NetError, NetEvent};
use leasehold_node::node::StartError;
use leasehold_node::payload::{self, Declared, PayloadStore};
use leasehold_node::work::{Exec, hidden};
use leasehold_proto::core::{Command, Ended, Failure, Leased, Reply, View};
use leasehold_proto::proof;
use leasehold_proto::words::charter::{Certificate, Role};
use leasehold_proto::words::contract::{
    Authority, Claim, Class, EndReason, JobSpec, Order, Reason, Refusal,
};
use leasehold_proto::words::message::{self, Message, RecordName};
use leasehold_proto::words::object::{Envelope, Extension, Kind, key_subject, order_subject};
use leasehold_proto::words::record::{Addresses, HostRecord, Offer};
use leasehold_proto::words::sign::{Draft, Hand, HeaderOf, Signature, Signed};
use leasehold_proto::words::usage::Outcome;
use leasehold_proto::words::want::Want;
use leasehold_proto::words::wire;
use leasehold_proto::{
    Amount, FabricId, Hash, KeyId, LeaseId, Payload, RequestId, Resources, Span,
};

/// Nothing here waits for a fixed time; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

type Test = fn() -> Pin<Box<dyn Future<Output = ()> + Send>>;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = hidden(args.iter().cloned()) {
        return code;
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    let tests: Vec<(&str, Test)> = vec![
        ("a_lease_end_to_end", || Box::pin(end_to_end())),
        ("a_full_node_refuses_and_another_is_found", || Box::pin(full_node())),
        ("a_restarted_node_keeps_what_it_granted", || Box::pin(restart())),
        ("a_job_that_was_not_begun_is_begun_after_a_restart", || Box::pin(not_begun())),
        ("a_node_starts_again_over_hundreds_of_lapsed_leases", || Box::pin(many_lapsed())),
        ("what_cannot_start_says_why", || Box::pin(cannot_start())),
        ("bad_orders_get_signed_refusals", || Box::pin(bad_orders())),
        ("bad_words_cost_the_link_and_nothing_else", || Box::pin(bad_words())),
        ("a_full_disk_is_met_by_a_refusal", || Box::pin(full_disk())),
        ("of_two_nodes_with_one_key_neither_goes_on_granting", || Box::pin(twins())),
        ("strangers_are_turned_away", || Box::pin(strangers())),
        ("records_of_the_unadmitted_are_not_taken", || Box::pin(records_of_strangers())),
        ("packets_of_strangers_change_nothing", || Box::pin(packets_of_strangers())),
        ("only_the_delegate_follows_a_job", || Box::pin(followers())),
        ("padding_stops_nobody", || Box::pin(padding())),
    ];
    let filter = args.iter().filter_map(|arg| arg.to_str()).find(|arg| !arg.starts_with('-'));
    let filter = filter.unwrap_or("").to_string();
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in tests.into_iter().filter(|(name, _)| name.contains(&filter)) {
        let ran = runtime.block_on(async { tokio::spawn(test()).await });
        let word = if ran.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word}");
        *(if ran.is_ok() { &mut passed } else { &mut failed }) += 1;
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {word}. {passed} passed; {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}

// ---------------------------------------------------------------- a fabric

fn config(name: &str, cpu: &str, price: &str, join: &[&Node]) -> Config {
    let any = "127.0.0.1:0".parse().expect("address");
    let mut config = Config::default();
    config.node.name = name.into();
    config.listen.link = any;
    config.listen.probe = any;
    config.listen.data = any;
    config.fabric.join = join.iter().map(|node| node.handle().facts().link[0]).collect();
    config.offer.sell = cpu != "0";
    config.offer.cpu = cpu.into();
    config.offer.memory = "512M".into();
    config.offer.disk = "256M".into();
    config.offer.cpu_hour = price.into();
    config.offer.min_disk_free = "1M".into();
    config
}

async fn start(home: &Home, config: &Config) -> Node {
    Node::start(home, config, Exec::default()).await.expect("starts")
}

/// Starts a node on ports that it had before. Until it is there, one of them may be where somebody
/// calls from, such as a peer that tries to reach it.
async fn start_where_it_was(home: &Home, config: &Config) -> Node {
    let begun = Instant::now();
    loop {
        match Node::start(home, config, Exec::default()).await {
            Err(StartError::Net(NetError::PortInUse { .. })) if begun.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            started => return started.expect("starts"),
        }
    }
}

/// Waits until `holds` of the node's view.
async fn until(node: &Node, what: &str, holds: impl Fn(&View) -> bool) -> View {
    let begun = Instant::now();
    loop {
        let view = node.handle().view().await.expect("view");
        if holds(&view) {
            return view;
        }
        assert!(begun.elapsed() < PATIENCE, "gave up on: {what}\n{view:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn want(cpu_milli: u64, max_hourly: &str) -> Want {
    Want {
        model: None,
        shape: Resources::new(cpu_milli, 64 << 20, 1 << 20),
        class: Class::Firm,
        term: Span::secs(60),
        longest: Span::secs(60),
        claim_within: Span::secs(20),
        max_hourly: max_hourly.parse().expect("amount"),
        budget: Amount(10_000_000),
        exposure: Amount(10_000_000),
        receipt_every: Span::millis(300),
        runtime: "wasm".into(),
        lessors: Vec::new(),
        labels: Vec::new(),
        isolation: Vec::new(),
    }
}

async fn lease(node: &Node, want: Want) -> Result<Leased, Failure> {
    match node.handle().ask(Command::Lease(want)).await {
        Ok(Reply::Leased(leased)) => Ok(*leased),
        Err(leasehold_node::handle::AskError::Failed(failure)) => Err(failure),
        other => panic!("{other:?}"),
    }
}

/// A program that prints its input file's length class and exits with 7: it reads `/in/data`
/// whole and writes `hello` and then what it read.
const PROGRAM: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 2)
  (data (i32.const 64) "hello ")
  (func $say (param $at i32) (param $len i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $len))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "_start")
    (call $say (i32.const 64) (i32.const 6))
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.const 4096))
    (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (call $say (i32.const 1024) (i32.load (i32.const 8)))
    (call $exit (i32.const 7))))"#;

fn payload(node: &Node, bytes: &[u8]) -> Payload {
    let size = Declared::Exactly(bytes.len() as u64);
    let imported = node.handle().payloads().import(bytes, size).expect("imports");
    Payload { root: Hash(*imported.root.as_bytes()), size: imported.size }
}

fn job(node: &Node) -> JobSpec {
    let program = payload(node, &wat::parse_str(PROGRAM).expect("program"));
    JobSpec { stdin: Some(payload(node, b"world")), ..job_of(program) }
}

fn job_of(program: Payload) -> JobSpec {
    JobSpec {
        runtime: "wasm".into(),
        program,
        args: Vec::new(),
        env: Vec::new(),
        stdin: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
        release_after: false,
    }
}

async fn claim(node: &Node, lease: LeaseId, job: JobSpec) -> KeyId {
    match node.handle().ask(Command::Claim { lease, job }).await.expect("claims") {
        Reply::Claimed(lessor) => lessor,
        other => panic!("{other:?}"),
    }
}

/// Follows a job to its end: what it wrote, and how it ended.
async fn follow(node: &Node, lease: LeaseId) -> (Vec<u8>, Outcome) {
    let mut attached = node.handle().attach(lease, 0, 0).await.expect("attaches");
    let mut stdout = Vec::new();
    while let Some(frame) = attached.next().await.expect("follows") {
        match frame {
            Frame::Stdout(bytes) => stdout.extend(bytes),
            Frame::Stderr(_) => {}
            Frame::End(end) => return (stdout, end.outcome),
        }
    }
    panic!("no end came");
}

async fn release(node: &Node, lease: LeaseId) -> Ended {
    let released = node.handle().ask(Command::Release(lease)).await.expect("releases");
    assert!(matches!(released, Reply::Released), "{released:?}");
    let ended = tokio::time::timeout(PATIENCE, node.handle().ask(Command::AwaitEnd(lease))).await;
    match ended.expect("ends in time").expect("ends") {
        Reply::Ended(ended) => ended,
        other => panic!("{other:?}"),
    }
}

// ---------------------------------------------------------------- the tests

async fn end_to_end() {
    let fabric = Fabric::new();
    let seller = start(&fabric.home("seller"), &config("seller", "1", "0.02", &[])).await;
    let buyer = start(&fabric.home("buyer"), &config("buyer", "0", "0.02", &[&seller])).await;
    until(&buyer, "the buyer sees the seller's offer", |view| {
        view.nodes.iter().any(|node| node.name == "seller" && node.up && !node.shapes.is_empty())
    })
    .await;
    let leased = lease(&buyer, want(500, "0.05")).await.expect("granted");
    assert_eq!(leased.choice.lessor, seller.handle().facts().me);
    let job = job(&buyer);
    claim(&buyer, leased.lease, job.clone()).await;
    let (stdout, outcome) = follow(&buyer, leased.lease).await;
    assert_eq!((stdout.as_slice(), outcome), (&b"hello world"[..], Outcome::Exited(7)));
    let ended = release(&buyer, leased.lease).await;
    assert_eq!(
        (ended.reason, ended.outcome.clone()),
        (EndReason::Released, Some(Outcome::Exited(7)))
    );
    assert!(ended.receipts >= 1 && ended.charge > Amount::ZERO, "{ended:?}");

    // Both sides hold a proof that verifies, and they tell the same.
    until(&seller, "the final receipt is countersigned", |view| {
        view.lent.iter().any(|lent| lent.id == leased.lease && lent.acknowledged == lent.receipts)
    })
    .await;
    let mut verdicts = Vec::new();
    for node in [&seller, &buyer] {
        let proof = node.handle().proof(leased.lease).await.expect("proof");
        let verdict = proof::check(&proof).expect("verifies");
        assert!(verdict.price_checked && verdict.acknowledged == verdict.receipts, "{verdict:?}");
        assert_eq!(verdict.charge, ended.charge);
        verdicts.push(verdict);
    }
    assert_eq!(verdicts[0], verdicts[1]);

    // The same program again: nothing is sent twice.
    let sent = buyer.handle().data().stats().payload_sent;
    let again = lease(&buyer, want(500, "0.05")).await.expect("granted");
    claim(&buyer, again.lease, job).await;
    let (_, outcome) = follow(&buyer, again.lease).await;
    assert_eq!(outcome, Outcome::Exited(7));
    assert_eq!(buyer.handle().data().stats().payload_sent, sent);
    release(&buyer, again.lease).await;
    buyer.shutdown().await;
    seller.shutdown().await;
}

async fn full_node() {
    let fabric = Fabric::new();
    let cheap = start(&fabric.home("cheap"), &config("cheap", "1", "0.01", &[])).await;
    let dear = start(&fabric.home("dear"), &config("dear", "1", "0.04", &[&cheap])).await;
    let buyer = start(&fabric.home("buyer"), &config("buyer", "0", "0", &[&cheap])).await;
    until(&buyer, "both offers are known", |view| {
        view.nodes.iter().filter(|node| node.up && !node.shapes.is_empty()).count() == 2
    })
    .await;
    let first = lease(&buyer, want(900, "0.1")).await.expect("granted");
    assert_eq!(first.choice.lessor, cheap.handle().facts().me, "the cheap one first");
    let second = lease(&buyer, want(900, "0.1")).await.expect("granted elsewhere");
    assert_eq!(second.choice.lessor, dear.handle().facts().me);
    let third = lease(&buyer, want(900, "0.1")).await;
    assert!(matches!(third, Err(Failure::NothingFits(_) | Failure::Refused(_))), "{third:?}");
    let dearer = lease(&buyer, want(100, "0.0001")).await;
    let Err(Failure::NothingFits(against)) = dearer else { panic!("{dearer:?}") };
    assert!(against.iter().any(|host| host.reasons.iter().any(|why| why.contains("price"))));
    for node in [buyer, dear, cheap] {
        node.shutdown().await;
    }
}

async fn restart() {
    let fabric = Fabric::new();
    let home = fabric.home("seller");
    let selling = config("seller", "1", "0.02", &[]);
    let seller = start(&home, &selling).await;
    let at = seller.handle().facts().link[0];
    let buyer = start(&fabric.home("buyer"), &config("buyer", "0", "0.02", &[&seller])).await;
    until(&buyer, "the offer is known", |view| view.nodes.iter().any(|n| !n.shapes.is_empty()))
        .await;
    let leased = lease(&buyer, want(500, "0.05")).await.expect("granted");
    let before = seller.handle().view().await.expect("view");
    seller.shutdown().await;
    let mut same = selling.clone();
    same.listen.link = at;
    let seller = start_where_it_was(&home, &same).await;
    let after = seller.handle().view().await.expect("view");
    assert!(after.epoch > before.epoch);
    assert_eq!(after.promised, before.promised);
    assert!(after.lent.iter().any(|lent| lent.id == leased.lease));
    // It is still good for what it was granted for.
    until(&buyer, "the buyer is linked again", |view| view.links == 1).await;
    claim(&buyer, leased.lease, job(&buyer)).await;
    let (_, outcome) = follow(&buyer, leased.lease).await;
    assert_eq!(outcome, Outcome::Exited(7));
    release(&buyer, leased.lease).await;
    buyer.shutdown().await;
    seller.shutdown().await;
}

/// A node that has said yes to claims is gone before their jobs are begun. Those that no warden had
/// taken up run after the restart; where a warden has said so something may have run.
async fn not_begun() {
    let fabric = Fabric::new();
    let home = fabric.home("seller");
    let selling = config("seller", "1", "0.02", &[]);
    let seller = start(&home, &selling).await;
    until(&seller, "it offers", |view| view.nodes.iter().any(|node| node.offer.is_some())).await;
    // The delegate has no host record: where to fetch the program from is not known.
    let mut peer = Peer::linked_to(&fabric, &seller).await;
    let mandate = mandate_for(&fabric, peer.secret.id(), Amount(10_000_000_000));
    let scratch = fabric.room.path().join("scratch");
    let scratch = PayloadStore::open_dir(scratch, payload::Limits::default()).expect("opens");
    let program = wat::parse_str(PROGRAM).expect("program");
    let size = Declared::Exactly(program.len() as u64);
    let held = scratch.import(program.as_slice(), size).expect("imports");
    let job = job_of(Payload { root: Hash(*held.root.as_bytes()), size: held.size });
    let mut leases = Vec::new();
    for _ in 0..3 {
        leases.push(peer.lease_and_claim(&seller, &mandate, &job).await);
    }
    let (untouched, made, touched) = (leases[0], leases[1], leases[2]);
    peer.net.close().await;
    seller.shutdown().await;
    let jobs = home.path("jobs");
    assert_eq!(std::fs::read_dir(&jobs).expect("listed").count(), 0, "nothing was begun");
    for lease in [made, touched] {
        std::fs::create_dir(jobs.join(lease.to_string())).expect("made");
    }
    let status = jobs.join(touched.to_string()).join("status.json");
    std::fs::write(status, "what cannot be read any more").expect("written");
    let payloads = PayloadStore::open_dir(home.path("payloads"), payload::Limits::default());
    payloads.expect("opens").import(program.as_slice(), size).expect("imports");

    let seller = start(&home, &selling).await;
    let of = |view: &View, lease| {
        let lent = view.lent.iter().find(|lent| lent.id == lease).expect("known");
        (lent.end, lent.outcome.clone())
    };
    let view = until(&seller, "all have an end", |view| {
        view.lent.iter().all(|lent| lent.outcome.is_some())
    })
    .await;
    for lease in [untouched, made] {
        assert_eq!(of(&view, lease), (None, Some(Outcome::Exited(7))));
    }
    assert_eq!(of(&view, touched), (Some(EndReason::Lost), Some(Outcome::Lost)));
    seller.shutdown().await;
}

async fn many_lapsed() {
    const LEASES: usize = 600;
    let fabric = Fabric::new();
    let home = fabric.home("node");
    let selling = config("node", "1", "0.02", &[]);
    let node = start(&home, &selling).await;
    until(&node, "its own offer is known", |view| view.nodes.iter().any(|n| !n.shapes.is_empty()))
        .await;
    let claim_within = Span::secs(5);
    let shape = Resources::new(1, 64 << 10, 1 << 10);
    let small = Want { shape, claim_within, ..want(1, "0.05") };
    let mut last = leasehold_node::clock::boot();
    for _ in 0..LEASES / 30 {
        let asked = (0..30).map(|_| lease(&node, small.clone()));
        for granted in futures::future::join_all(asked).await {
            granted.expect("granted");
        }
        last = leasehold_node::clock::boot();
    }
    node.shutdown().await;
    // All of them lapse while it is down: their ends are one batch at the next start.
    while leasehold_node::clock::boot() < last + claim_within {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let node = start(&home, &selling).await;
    let view = until(&node, "all have ended", |view| view.promised.is_nothing()).await;
    assert!(view.counters.lapsed > 350, "more than one batch holds: {:?}", view.counters);
    node.shutdown().await;
    start(&home, &selling).await.shutdown().await;
}

async fn cannot_start() {
    let fabric = Fabric::new();
    let home = fabric.home("one");
    let node = start(&home, &config("one", "1", "0.02", &[])).await;
    // The directory is in use.
    let twice = Node::start(&home, &config("one", "1", "0.02", &[]), Exec::default()).await;
    let error = twice.expect_err("locked");
    assert!(matches!(error, StartError::Store(_)), "{error}");
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    // The port is in use.
    let mut taken = config("two", "1", "0.02", &[]);
    taken.listen.link = node.handle().facts().link[0];
    let error = Node::start(&fabric.home("two"), &taken, Exec::default()).await;
    let error = error.expect_err("the port is taken").to_string();
    assert!(error.contains(&taken.listen.link.port().to_string()), "{error}");
    // The store is another node's.
    let other = fabric.home("three");
    node.shutdown().await;
    std::fs::rename(home.path("store"), other.path("store")).expect("moves");
    let error = Node::start(&other, &config("three", "1", "0.02", &[]), Exec::default()).await;
    let error = error.expect_err("foreign").to_string();
    assert!(error.contains("belongs to the node"), "{error}");
    // Another fabric's certificate.
    let stranger = Fabric::new();
    let home = fabric.home("four");
    home.put("charter", &stranger.founder.charter).expect("charter");
    let error = Node::start(&home, &config("four", "1", "0.02", &[]), Exec::default()).await;
    let error = error.expect_err("not admitted");
    assert!(matches!(error, StartError::Core(_)), "{error}");
    // Nothing there at all.
    let empty = Home::at(fabric.room.path().join("empty"));
    let error = Node::start(&empty, &Config::default(), Exec::default()).await;
    assert!(error.expect_err("empty").to_string().contains("leasehold init"));
}

// ---------------------------------------------------------------- a peer that misbehaves

/// A member of the fabric that speaks for itself: a key, a certificate, a link, and no manners.
struct Peer {
    net: Net,
    events: tokio::sync::mpsc::Receiver<NetEvent>,
    secret: Secret,
    certificate: Signed,
    fabric: FabricId,
    charter: Hash,
    tokens: u64,
    /// Whether the link went down, which may be told before or after a question's end.
    gone: bool,
}

impl Peer {
    async fn linked_to(fabric: &Fabric, node: &Node) -> Self {
        let secret = Secret::generate().expect("randomness");
        let admitted = fabric.founder.admit(secret.id(), Role::Node, "peer", fabric.now);
        let mut peer = Self::alone(fabric, secret, admitted.expect("admits")).await;
        peer.dial(node).await;
        let hello = peer.hello();
        match peer.ask(node, &hello).await {
            Some(Message::Hello { .. }) => peer,
            other => panic!("no greeting: {other:?}"),
        }
    }

    async fn alone(fabric: &Fabric, secret: Secret, certificate: Signed) -> Self {
        let seed = *secret.seed();
        let listen = vec!["127.0.0.1:0".parse().expect("address")];
        let config = NetConfig { seed, listen, limits: Limits::default() };
        let (net, events, _) = Net::start(config).await.expect("starts");
        let charter = fabric.founder.charter.id();
        let fabric = FabricId(charter);
        Self { net, events, secret, certificate, fabric, charter, tokens: 0, gone: false }
    }

    fn hello(&self) -> Message {
        Message::Hello {
            charter: self.charter,
            certificate: self.certificate.clone(),
            epoch: 1,
            seen: None,
        }
    }

    async fn dial(&mut self, node: &Node) {
        let facts = node.handle().facts();
        let (peer, addresses) = (Some(facts.me.0), facts.link.clone());
        self.net.send(NetCommand::Dial { peer, addresses }).expect("dials");
        self.until(|event| matches!(event, NetEvent::Linked { .. })).await;
        self.net.send(NetCommand::Admit { peer: facts.me.0 }).expect("admits");
    }

    async fn until(&mut self, wanted: impl Fn(&NetEvent) -> bool) -> NetEvent {
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                let event = self.events.recv().await.expect("the net lives");
                self.gone |= matches!(event, NetEvent::Unlinked { .. });
                // The node greets too; it gets no answer from here, which is not its business.
                if wanted(&event) {
                    return event;
                }
            }
        });
        waited.await.expect("in time")
    }

    /// Waits until the node has ended the link.
    async fn until_gone(&mut self) {
        if !self.gone {
            self.until(|event| matches!(event, NetEvent::Unlinked { .. })).await;
        }
    }

    /// Asks in raw bytes; none when the node gave no answer.
    async fn ask_raw(&mut self, node: &Node, frame: Vec<u8>) -> Option<Message> {
        self.tokens += 1;
        let (peer, token) = (node.handle().facts().me.0, self.tokens);
        self.net.send(NetCommand::Ask { peer, token, frame }).expect("asks");
        let about = |event: &NetEvent| match event {
            NetEvent::Answered { token: of, .. } | NetEvent::Unanswered { token: of, .. } => {
                *of == token
            }
            _ => false,
        };
        match self.until(about).await {
            NetEvent::Answered { frame, .. } => Some(message::decode(&frame).expect("decodes")),
            _ => None,
        }
    }

    async fn ask(&mut self, node: &Node, what: &Message) -> Option<Message> {
        self.ask_raw(node, message::encode(what).expect("encodes")).await
    }

    /// Takes a lease from `node` and has a job run under it: the node has said yes to both.
    async fn lease_and_claim(&mut self, node: &Node, mandate: &Signed, job: &JobSpec) -> LeaseId {
        let order = self.order(node, mandate, |_, _| {}).await;
        let answer = self.ask(node, &Message::Order(order)).await;
        let Some(Message::Granted(grant)) = answer else { panic!("{answer:?}") };
        let lease = LeaseId(grant.id());
        let claim = Claim { lease, act: RequestId([1; 16]), job: job.clone() };
        let header = HeaderOf {
            fabric: self.fabric,
            signer: self.secret.id(),
            subject: lease.0,
            epoch: 1,
            seq: 0,
            not_after: leasehold_node::clock::now().wall + Span::secs(30),
        };
        let claim = Draft::new(header, &claim).expect("fits");
        let claim = self.secret.signer().sign(&claim).expect("signs");
        let answer = self.ask(node, &Message::Claim(claim)).await;
        assert!(matches!(answer, Some(Message::Accepted(_))), "{answer:?}");
        lease
    }

    /// An order to `node` under its newest offer, changed by `change`, signed by this peer.
    async fn order(
        &self,
        node: &Node,
        mandate: &Signed,
        change: impl FnOnce(&mut Order, &mut HeaderOf),
    ) -> Signed {
        let view = node.handle().view().await.expect("view");
        let me = view.nodes.iter().find(|other| other.id == view.me).expect("knows itself");
        let lessee = mandate.header().expect("header").signer;
        let now = leasehold_node::clock::now().wall;
        let want = want(100, "1");
        let mut order = Order {
            model: None,
            lessee,
            delegate: self.secret.id(),
            authority: Authority::Mandate(mandate.clone()),
            lessor: view.me,
            offer: me.offer.expect("offers"),
            request: RequestId::derive(&[&now.0.to_le_bytes(), &self.tokens.to_le_bytes()]),
            shape: want.shape,
            class: want.class,
            term: want.term,
            longest: want.longest,
            gang: None,
            claim_within: want.claim_within,
            ceiling: want.max_hourly,
            cap: want.budget,
            exposure: want.exposure,
            receipt_every: want.receipt_every,
            placed: now,
        };
        let mut header = HeaderOf {
            fabric: self.fabric,
            signer: self.secret.id(),
            subject: order_subject(&lessee, &order.request),
            epoch: 1,
            seq: 0,
            not_after: now + Span::secs(30),
        };
        change(&mut order, &mut header);
        let draft = Draft::new(header, &order).expect("fits");
        self.secret.signer().sign(&draft).expect("signs")
    }
}

fn mandate_for(fabric: &Fabric, delegate: KeyId, max_hourly: Amount) -> Signed {
    let tenant = Secret::generate().expect("randomness");
    let admitted = fabric.founder.admit(tenant.id(), Role::Tenant, "tenant", fabric.now);
    let allowance =
        Allowance { max_hourly, max_total: Amount(u64::MAX), max_term: Span::secs(3600) };
    mandate(&tenant, &admitted.expect("admits"), delegate, allowance, fabric.now).expect("mandate")
}

async fn bad_orders() {
    let fabric = Fabric::new();
    let seller = start(&fabric.home("seller"), &config("seller", "1", "0.02", &[])).await;
    until(&seller, "it offers", |view| view.nodes.iter().any(|node| node.offer.is_some())).await;
    let mut peer = Peer::linked_to(&fabric, &seller).await;
    let mandate = mandate_for(&fabric, peer.secret.id(), Amount(10_000_000_000));
    let lessor = seller.handle().facts().me;
    let hour = Span::secs(3600).as_millis();
    type Change = Box<dyn FnOnce(&mut Order, &mut HeaderOf) + Send>;
    let cases: Vec<(Reason, Change)> = vec![
        (Reason::Capacity, Box::new(|order, _| order.shape.disk = 1 << 40)),
        (Reason::Price, Box::new(|order, _| order.ceiling = Amount(1))),
        (Reason::Expired, Box::new(move |_, header| header.not_after.0 -= hour)),
        (Reason::Expired, Box::new(move |_, header| header.not_after.0 += 24 * hour)),
        (Reason::WrongLessor, Box::new(|order, _| order.lessor = KeyId([9; 32]))),
        (Reason::StaleOffer, Box::new(|order, _| order.offer = Hash([9; 32]))),
        (Reason::Mandate, Box::new(|order, _| order.ceiling = Amount(11_000_000_000))),
        (Reason::NotOffered, Box::new(|order, _| order.receipt_every = Span::millis(1))),
        (Reason::NotOffered, Box::new(|order, _| order.longest = Span::secs(40 * 24 * 3600))),
        (Reason::NotAdmitted, Box::new(|order, _| order.lessee = KeyId([9; 32]))),
    ];
    for (expected, change) in cases {
        let order = peer.order(&seller, &mandate, change).await;
        let answer = peer.ask(&seller, &Message::Order(order.clone())).await;
        let Some(Message::Refused(refused)) = answer else { panic!("{expected:?}: {answer:?}") };
        let refusal = refused.verify::<Refusal>(&peer.fabric).expect("signed");
        assert_eq!((refusal.body().reason, refusal.body().of), (expected, order.id()));
        assert_eq!(refusal.signer(), lessor);
    }
    // One that is right is granted; again it is the same grant; changed under its id a conflict.
    let request = RequestId([7; 16]);
    let set = |order: &mut Order, header: &mut HeaderOf| {
        order.request = request;
        header.subject = order_subject(&order.lessee, &request);
    };
    let order = peer.order(&seller, &mandate, set).await;
    let first = peer.ask(&seller, &Message::Order(order.clone())).await;
    assert!(matches!(first, Some(Message::Granted(_))), "{first:?}");
    assert_eq!(peer.ask(&seller, &Message::Order(order)).await, first, "byte for byte");
    let other = peer.order(&seller, &mandate, |order, header| {
        set(order, header);
        order.shape.memory += 1;
    });
    let answer = peer.ask(&seller, &Message::Order(other.await)).await;
    let Some(Message::Refused(refused)) = answer else { panic!("{answer:?}") };
    let refusal = refused.verify::<Refusal>(&peer.fabric).expect("signed");
    assert_eq!(refusal.body().reason, Reason::Conflict);
    let view = seller.handle().view().await.expect("view");
    assert_eq!(view.counters.grants, 1);
    peer.net.close().await;
    seller.shutdown().await;
}

async fn bad_words() {
    let fabric = Fabric::new();
    let seller = start(&fabric.home("seller"), &config("seller", "1", "0.02", &[])).await;
    until(&seller, "it offers", |view| view.nodes.iter().any(|node| node.offer.is_some())).await;
    let good = {
        let peer = Peer::linked_to(&fabric, &seller).await;
        let mandate = mandate_for(&fabric, peer.secret.id(), Amount(10_000_000_000));
        let order = peer.order(&seller, &mandate, |_, _| {}).await;
        peer.net.close().await;
        message::encode(&Message::Order(order)).expect("encodes")
    };
    let mut trailing = good.clone();
    trailing.push(0);
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let elsewhere = {
        let peer = Peer::linked_to(&fabric, &seller).await;
        let mandate = mandate_for(&fabric, peer.secret.id(), Amount(10_000_000_000));
        let moved = |_: &mut Order, header: &mut HeaderOf| header.fabric = FabricId(Hash([3; 32]));
        let order = peer.order(&seller, &mandate, moved).await;
        peer.net.close().await;
        message::encode(&Message::Order(order)).expect("encodes")
    };
    let bad = [
        ("garbage", vec![0xff; 64]),
        ("cut short", good[..good.len() - 1].to_vec()),
        ("trailing", trailing),
        ("a flipped bit", flipped),
        ("another fabric", elsewhere),
        ("an answer as a question", message::encode(&Message::Done).expect("encodes")),
    ];
    for (what, frame) in bad {
        let mut peer = Peer::linked_to(&fabric, &seller).await;
        assert_eq!(peer.ask_raw(&seller, frame).await, None, "{what}");
        peer.until_gone().await;
        peer.net.close().await;
    }
    // Nothing was lost, and the next one is served.
    let view = seller.handle().view().await.expect("view");
    assert_eq!((view.counters.grants, view.halted), (0, None));
    let mut peer = Peer::linked_to(&fabric, &seller).await;
    let mandate = mandate_for(&fabric, peer.secret.id(), Amount(10_000_000_000));
    let order = peer.order(&seller, &mandate, |_, _| {}).await;
    let answer = peer.ask(&seller, &Message::Order(order)).await;
    assert!(matches!(answer, Some(Message::Granted(_))), "{answer:?}");
    peer.net.close().await;
    seller.shutdown().await;
}

async fn strangers() {
    let fabric = Fabric::new();
    let seller = start(&fabric.home("seller"), &config("seller", "1", "0.02", &[])).await;
    let stranger = Fabric::new();
    let secret = Secret::generate().expect("randomness");
    let admitted = stranger.founder.admit(secret.id(), Role::Node, "x", stranger.now);
    // A certificate of another fabric, one of the right fabric for another key, and one as tenant.
    let foreign = admitted.expect("admits");
    let other = Secret::generate().expect("randomness");
    let borrowed = fabric.founder.admit(other.id(), Role::Node, "y", fabric.now).expect("admits");
    let tenant = fabric.founder.admit(secret.id(), Role::Tenant, "z", fabric.now).expect("admits");
    for certificate in [foreign, borrowed, tenant] {
        let copy = Secret::from_seed(zeroize::Zeroizing::new(*secret.seed()));
        let mut peer = Peer::alone(&fabric, copy, certificate).await;
        peer.dial(&seller).await;
        let hello = peer.hello();
        assert_eq!(peer.ask(&seller, &hello).await, None);
        peer.until_gone().await;
        peer.net.close().await;
    }
    let view = seller.handle().view().await.expect("view");
    assert_eq!(view.links, 0);
    seller.shutdown().await;
}

async fn full_disk() {
    let fabric = Fabric::new();
    let home = fabric.home("seller");
    let mut selling = config("seller", "1", "0.02", &[]);
    let seller = start(&home, &selling).await;
    let buyer = start(&fabric.home("buyer"), &config("buyer", "0", "0.02", &[&seller])).await;
    until(&buyer, "the offer is known", |view| view.nodes.iter().any(|n| !n.shapes.is_empty()))
        .await;
    let leased = lease(&buyer, want(100, "0.05")).await.expect("there is room");
    seller.shutdown().await;
    // The same node, with more space wanted than the disk has.
    selling.offer.min_disk_free = "900T".into();
    let seller = start(&home, &selling).await;
    until(&seller, "what was granted is still there", |view| {
        view.lent.iter().any(|lent| lent.id == leased.lease)
    })
    .await;
    assert_eq!(order_refused(&fabric, &seller).await, Some(Reason::DiskFull));
    // It orders nothing either: the lease that it holds would have to be kept.
    let own = lease(&seller, want(100, "0.05")).await;
    assert!(matches!(own, Err(Failure::DiskFull)), "{own:?}");
    buyer.shutdown().await;
    seller.shutdown().await;
}

/// Why a node refuses an order that is good; none when it grants it.
async fn order_refused(fabric: &Fabric, node: &Node) -> Option<Reason> {
    let mut peer = Peer::linked_to(fabric, node).await;
    let mandate = mandate_for(fabric, peer.secret.id(), Amount(10_000_000_000));
    let order = peer.order(node, &mandate, |_, _| {}).await;
    let answer = peer.ask(node, &Message::Order(order)).await;
    let reason = match answer {
        Some(Message::Refused(refused)) => {
            Some(refused.verify::<Refusal>(&peer.fabric).expect("signed").body().reason)
        }
        Some(Message::Granted(_)) => None,
        other => panic!("{other:?}"),
    };
    peer.net.close().await;
    reason
}

async fn records_of_strangers() {
    let fabric = Fabric::new();
    let node = start(&fabric.home("node"), &config("node", "1", "0.02", &[])).await;
    until(&node, "it offers", |view| view.nodes.iter().any(|node| node.offer.is_some())).await;
    let view = node.handle().view().await.expect("view");
    let facts = node.handle().facts();
    let id = FabricId(fabric.founder.charter.id());
    let stranger = Secret::generate().expect("randomness");
    let hand = Hand { fabric: id, me: stranger.id(), epoch: 1 };
    let until_when = fabric.now + Span::secs(600);
    let says = |draft: Draft| stranger.signer().sign(&draft).expect("signs");
    let subject = key_subject(&stranger.id());
    // Everything is signed as it should be; what is missing is somebody who vouches for the key.
    let own = node.handle().view().await.expect("view").nodes[0].clone();
    let offer = Offer {
        models: Vec::new(),
        shapes: own.shapes,
        rates: own.rates.expect("rates"),
        slack_permille: 1000,
        early: own.early,
        classes: vec![Class::Firm],
        max_term: Span::secs(60),
        runtimes: own.runtimes,
        isolation: own.isolation,
    };
    let offer = says(hand.draft(subject, 1, until_when, &offer).expect("fits"));
    let itself = Certificate {
        organisation: "acme".into(),
        name: "x".into(),
        role: Role::Node,
        key: stranger.id(),
        not_before: fabric.now,
    };
    let itself = says(hand.draft(subject, 0, until_when, &itself).expect("fits"));
    let host = |certificate| HostRecord {
        name: "x".into(),
        version: "0".into(),
        addresses: Addresses { link: facts.link.clone(), ..Addresses::default() },
        hardware: Resources::new(1, 1, 1),
        processor: String::new(),
        labels: Vec::new(),
        cell: 0,
        returns: 0,
        certificate,
    };
    let by_itself = says(hand.draft(subject, 1, until_when, &host(itself)).expect("fits"));
    let mut peer = Peer::linked_to(&fabric, &node).await;
    for records in [vec![offer.clone()], vec![by_itself.clone()], vec![by_itself, offer]] {
        let answer = peer.ask(&node, &Message::Records(records)).await;
        assert_eq!(answer, Some(Message::Done), "heard, and not believed");
    }
    let after = node.handle().view().await.expect("view");
    assert_eq!((after.records, after.nodes.len()), (view.records, view.nodes.len()));
    peer.net.close().await;

    // What breaks a rule costs the link.
    let alien = Fabric::new();
    let foreign = alien.founder.admit(stranger.id(), Role::Node, "x", alien.now).expect("admits");
    let foreign = says(hand.draft(subject, 1, until_when, &host(foreign)).expect("fits"));
    let name = |n| RecordName { key: stranger.id(), kind: Kind::Offer, epoch: n, seq: 0, tag: 0 };
    for (what, message) in [
        ("a certificate of another fabric", Message::Records(vec![foreign])),
        ("too many names", Message::Announce((0..2_049).map(name).collect())),
        ("a digest of another size", Message::Digest(vec![0; 255])),
        ("an order as a record", Message::Records(vec![fabric.founder.charter.clone()])),
    ] {
        let mut peer = Peer::linked_to(&fabric, &node).await;
        assert_eq!(peer.ask(&node, &message).await, None, "{what}");
        peer.until_gone().await;
        peer.net.close().await;
    }
    assert_eq!(node.handle().view().await.expect("view").records, view.records);
    node.shutdown().await;
}

async fn packets_of_strangers() {
    let fabric = Fabric::new();
    let node = start(&fabric.home("node"), &config("node", "1", "0.02", &[])).await;
    until(&node, "it is up", |view| view.nodes.len() == 1).await;
    let to = node.handle().facts().probe;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("binds");
    let id = FabricId(fabric.founder.charter.id());
    let stranger = Secret::generate().expect("randomness");
    let signed = |fabric: &FabricId, bytes: &[u8]| {
        let signature = stranger.signer().sign_packet(fabric, bytes);
        [&stranger.id().0[..], &signature.0, bytes].concat()
    };
    let mut flipped = signed(&id, b"content");
    flipped[100] ^= 1;
    let elsewhere = signed(&FabricId(Hash([9; 32])), b"content");
    let bad = [vec![], vec![1; 95], vec![0xff; 300], flipped, elsewhere];
    let counts = || node.handle().counts().rejected.load(std::sync::atomic::Ordering::Relaxed);
    let before = counts();
    for packet in bad.iter().filter(|packet| !packet.is_empty()) {
        socket.send_to(packet, to).await.expect("sent");
    }
    let begun = Instant::now();
    while counts() < before + 4 {
        assert!(begun.elapsed() < PATIENCE, "{} were rejected", counts() - before);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Well signed by a key that nobody admitted, with whatever in it.
    socket.send_to(&signed(&id, &[0; 40]), to).await.expect("sent");
    socket.send_to(&signed(&id, b""), to).await.expect("sent");
    let view = node.handle().view().await.expect("view");
    assert_eq!((view.nodes.len(), view.packets_refused, view.halted), (1, 0, None));
    assert_eq!(order_refused(&fabric, &node).await, None, "it works on");
    node.shutdown().await;
}

async fn followers() {
    let fabric = Fabric::new();
    let seller = start(&fabric.home("seller"), &config("seller", "1", "0.02", &[])).await;
    let buyer = start(&fabric.home("buyer"), &config("buyer", "0", "0.02", &[&seller])).await;
    let other = start(&fabric.home("other"), &config("other", "0", "0.02", &[&seller])).await;
    for node in [&buyer, &other] {
        until(node, "the offer is known", |view| view.nodes.iter().any(|n| !n.shapes.is_empty()))
            .await;
    }
    let leased = lease(&buyer, want(500, "0.05")).await.expect("granted");
    claim(&buyer, leased.lease, job(&buyer)).await;
    let (key, at) = (seller.handle().facts().me.0, vec![seller.handle().facts().data]);
    let lease = leased.lease;
    let good = attach::Request { lease, stdout: 0, stderr: 0 }.encode();
    let unknown = attach::Request { lease: LeaseId(Hash([7; 32])), stdout: 0, stderr: 0 }.encode();
    let mut long = good.clone();
    long.push(0);
    for (what, node, channel, body, why) in [
        ("another node", &other, attach::ATTACH, good.clone(), Turned::Denied),
        ("no such lease", &buyer, attach::ATTACH, unknown, Turned::Denied),
        ("another channel", &buyer, 200, good.clone(), Turned::BadRequest),
        ("a cut request", &buyer, attach::ATTACH, good[..47].to_vec(), Turned::BadRequest),
        ("a trailing byte", &buyer, attach::ATTACH, long, Turned::BadRequest),
    ] {
        let opened = node.handle().data().open(key, at.clone(), channel, body).await;
        match opened {
            Err(LinkError::Refused { refused, .. }) => assert_eq!(refused.why, why, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    // The delegate follows, also again after the end.
    for _ in 0..2 {
        let (stdout, outcome) = follow(&buyer, lease).await;
        assert_eq!((stdout.as_slice(), outcome), (&b"hello world"[..], Outcome::Exited(7)));
    }
    release(&buyer, lease).await;
    for node in [other, buyer, seller] {
        node.shutdown().await;
    }
}

async fn padding() {
    let fabric = Fabric::new();
    let seller = start(&fabric.home("seller"), &config("seller", "1", "0.02", &[])).await;
    until(&seller, "it offers", |view| view.nodes.iter().any(|node| node.offer.is_some())).await;
    let limit = Kind::Order.max_len();
    for (len, granted) in [(limit, true), (limit + 1, false), (60 * 1024, false)] {
        let mut peer = Peer::linked_to(&fabric, &seller).await;
        let mandate = mandate_for(&fabric, peer.secret.id(), Amount(10_000_000_000));
        let order = peer.order(&seller, &mandate, |_, _| {}).await;
        let mut envelope = Envelope::decode(&order.envelope).expect("an envelope");
        let extension = |bytes| Extension { tag: 9, critical: false, bytes };
        envelope.extensions = vec![extension(vec![])];
        let encode = |envelope: &Envelope| wire::encode::<65_536>(envelope).expect("it fits");
        let bare = encode(&envelope).len();
        envelope.extensions = vec![extension(vec![0; len - bare])];
        // Signed by hand: an honest signer would not sign what is too long.
        let padded = encode(&envelope);
        let order = sign_anything(&peer.secret, padded);
        let answer = peer.ask(&seller, &Message::Order(order)).await;
        if granted {
            assert!(matches!(answer, Some(Message::Granted(_))), "{answer:?}");
        } else {
            assert_eq!(answer, None);
            peer.until_gone().await;
        }
        peer.net.close().await;
    }
    let view = seller.handle().view().await.expect("it lives");
    assert_eq!(view.counters.grants, 1);
    seller.shutdown().await;
}

/// The signature that [`leasehold_proto::words::sign`] describes, over any envelope.
fn sign_anything(secret: &Secret, envelope: Vec<u8>) -> Signed {
    let decoded: Envelope = wire::decode::<65_536, _>(&envelope).expect("an envelope");
    let id = Hash::of(&envelope);
    let kind = decoded.header.kind.name().into_owned();
    let mut text = Vec::new();
    for part in [&b"leasehold/v1"[..], kind.as_bytes(), &decoded.header.fabric.0.0, &id.0] {
        text.extend((part.len() as u64).to_le_bytes());
        text.extend(part);
    }
    let key = ed25519_dalek::SigningKey::from_bytes(secret.seed());
    let signature = Signature(ed25519_dalek::Signer::sign(&key, &text).to_bytes());
    Signed { envelope: envelope.into(), signature }
}

async fn twins() {
    let fabric = Fabric::new();
    let witness = start(&fabric.home("witness"), &config("witness", "0", "0", &[])).await;
    let home = fabric.home("original");
    let copy = Home::at(fabric.room.path().join("copy"));
    copy.create().expect("home");
    for file in ["node.key", "charter", "certificate", "mandate"] {
        std::fs::copy(home.path(file), copy.path(file)).expect("copies");
    }
    let original = start(&home, &config("original", "1", "0.02", &[&witness])).await;
    until(&witness, "the original is known", |view| {
        view.nodes.iter().any(|node| node.name == "original" && !node.shapes.is_empty())
    })
    .await;
    let twin = start(&copy, &config("copy", "1", "0.01", &[&witness])).await;
    let view = until(&twin, "the copy finds out", |view| view.halted.is_some()).await;
    // Whichever comes first: the other's records, or a third's proof against the key.
    let why = view.halted.expect("why");
    let told = ["two nodes run with one key", "convicted of saying two different things"];
    assert!(told.iter().any(|reason| why.contains(reason)), "{why}");
    until(&original, "the original finds out", |view| view.halted.is_some()).await;
    until(&witness, "the proof is kept", |view| view.counters.equivocations > 0).await;
    until(&witness, "nobody is sent there any more", |view| {
        view.nodes.iter().all(|node| node.shapes.is_empty())
    })
    .await;
    for node in [&twin, &original] {
        assert_eq!(order_refused(&fabric, node).await, Some(Reason::NotReady));
    }
    twin.shutdown().await;
    original.shutdown().await;
    witness.shutdown().await;
}
