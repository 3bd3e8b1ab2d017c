//! Real sockets on loopback: nets with each other, and nets with a peer that keeps no rules.

use std::{
    collections::{HashMap, HashSet},
    io::{BufRead, BufReader, Read},
    net::{Ipv4Addr, UdpSocket},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt};
use libp2p::{
    PeerId, StreamProtocol, Swarm, Transport,
    core::muxing::StreamMuxerBox,
    identity::Keypair,
    quic,
    request_response::{self, Message, ProtocolSupport},
    swarm::{self, SwarmEvent},
};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use super::*;

/// Long enough for any step on a loaded machine; reaching it is a failure.
const LONG: Duration = Duration::from_secs(60);

/// The usual limits with all the time in the world, for what is not about time.
fn calm() -> Limits {
    Limits {
        unadmitted_time: LONG,
        request_timeout: LONG,
        handshake_timeout: LONG,
        idle_timeout: LONG,
        ..Limits::default()
    }
}

struct Node {
    net: Net,
    events: mpsc::Receiver<NetEvent>,
    address: SocketAddr,
}

fn local() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

async fn node(seed: u8, limits: Limits) -> Node {
    let config = NetConfig { seed: [seed; 32], listen: vec![local()], limits };
    let (net, events, bound) = Net::start(config).await.expect("loopback can be listened on");
    Node { net, events, address: bound[0] }
}

impl Node {
    fn key(&self) -> PeerKey {
        self.net.key()
    }

    fn send(&self, command: NetCommand) {
        self.net.send(command).expect("room for a command");
    }

    fn dial(&self, other: &Self) {
        self.send(NetCommand::Dial { peer: Some(other.key()), addresses: vec![other.address] });
    }

    fn admit(&self, peer: PeerKey) {
        self.send(NetCommand::Admit { peer });
    }

    fn ask(&self, peer: PeerKey, token: u64, frame: impl Into<Vec<u8>>) {
        self.send(NetCommand::Ask { peer, token, frame: frame.into() });
    }

    fn reply(&self, ticket: u64, frame: impl Into<Vec<u8>>) {
        self.send(NetCommand::Reply { ticket, frame: frame.into() });
    }

    async fn next(&mut self) -> NetEvent {
        timeout(LONG, self.events.recv()).await.expect("an event in time").expect("an open net")
    }

    /// The next event is that `peer` is linked.
    async fn linked(&mut self, peer: PeerKey) {
        match self.next().await {
            NetEvent::Linked { peer: linked, .. } if linked == peer => {}
            other => panic!("not linked but {other:?}"),
        }
    }

    async fn unlinked(&mut self, peer: PeerKey) -> UnlinkReason {
        match self.next().await {
            NetEvent::Unlinked { peer: gone, why } if gone == peer => why,
            other => panic!("not unlinked but {other:?}"),
        }
    }

    async fn asked(&mut self) -> (u64, Vec<u8>) {
        match self.next().await {
            NetEvent::Asked { ticket, frame, .. } => (ticket, frame),
            other => panic!("not asked but {other:?}"),
        }
    }

    async fn unanswered(&mut self, token: u64) -> AskFailure {
        match self.next().await {
            NetEvent::Unanswered { token: of, why, .. } if of == token => why,
            other => panic!("not unanswered but {other:?}"),
        }
    }

    async fn dial_failed(&mut self) -> DialFailure {
        match self.next().await {
            NetEvent::DialFailed { why, .. } => why,
            other => panic!("no failed dial but {other:?}"),
        }
    }

    /// Polls until the counters are as wanted.
    async fn counts(&self, wanted: impl Fn(NetCounts) -> bool) -> NetCounts {
        let deadline = Instant::now() + LONG;
        loop {
            let counts = self.net.stats().snapshot();
            if wanted(counts) {
                return counts;
            }
            assert!(Instant::now() < deadline, "still {counts:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Answers every request with the request's own bytes, from now on.
    fn echo(self) -> JoinHandle<()> {
        let Self { net, mut events, .. } = self;
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    NetEvent::Linked { peer, .. } => send(&net, NetCommand::Admit { peer }).await,
                    NetEvent::Asked { ticket, frame, .. } => {
                        send(&net, NetCommand::Reply { ticket, frame }).await;
                    }
                    _ => {}
                }
            }
        })
    }
}

/// Sends a command, again and again while the net is busy.
async fn send(net: &Net, mut command: NetCommand) {
    loop {
        match net.send(command) {
            Ok(()) | Err(SendError::Closed(_)) => return,
            Err(SendError::Busy(back)) => command = back,
        }
        tokio::task::yield_now().await;
    }
}

/// Two nets, linked and each admitted by the other.
async fn pair(limits: Limits) -> (Node, Node) {
    let (mut a, mut b) = (node(1, limits.clone()).await, node(2, limits).await);
    a.dial(&b);
    a.linked(b.key()).await;
    b.linked(a.key()).await;
    a.admit(b.key());
    b.admit(a.key());
    (a, b)
}

#[tokio::test]
async fn two_nets_link_ask_and_answer() {
    let (mut a, mut b) = (node(1, calm()).await, node(2, calm()).await);
    assert_ne!(a.address.port(), 0);
    a.dial(&b);
    assert_eq!(
        a.next().await,
        NetEvent::Linked { peer: b.key(), address: b.address, outbound: true }
    );
    // Nodes dial from the port they listen on.
    assert_eq!(
        b.next().await,
        NetEvent::Linked { peer: a.key(), address: a.address, outbound: false }
    );
    a.admit(b.key());
    b.admit(a.key());
    for (asker, replier, size) in [(0, 1, 5), (1, 0, 0), (0, 1, 256 * 1024), (1, 0, 17_000)] {
        let nodes = &mut [&mut a, &mut b];
        let (request, response) = (vec![1; size], vec![2; size]);
        let (from, to) = (nodes[asker].key(), nodes[replier].key());
        nodes[asker].ask(to, 77, request.clone());
        match nodes[replier].next().await {
            NetEvent::Asked { peer, ticket, frame } => {
                assert_eq!((peer, &frame), (from, &request));
                nodes[replier].reply(ticket, response.clone());
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(
            nodes[asker].next().await,
            NetEvent::Answered { peer: to, token: 77, frame: response }
        );
    }
    let bytes = 5 + 256 * 1024 + 17_000;
    let counts = a.counts(|counts| counts.frames_out == 4).await;
    assert_eq!((counts.frames_in, counts.bytes_in, counts.bytes_out), (4, bytes, bytes));
    assert_eq!(counts.links, 1);
}

#[tokio::test]
async fn a_thousand_asks_in_flight_are_all_answered() {
    let (mut a, b) = (node(1, calm()).await, node(2, calm()).await);
    let key = b.key();
    // The first ask dials, since there is no link yet.
    a.send(NetCommand::AddAddresses { peer: key, addresses: vec![b.address] });
    let _echo = b.echo();
    for token in 0..1000u64 {
        a.ask(key, token, token.to_le_bytes());
    }
    let mut open: HashSet<u64> = (0..1000).collect();
    let mut answered = 0;
    while !open.is_empty() {
        match a.next().await {
            NetEvent::Linked { peer, .. } => a.admit(peer),
            NetEvent::Answered { token, frame, .. } => {
                assert!(open.remove(&token), "{token} twice");
                assert_eq!(frame, token.to_le_bytes());
                answered += 1;
            }
            // On a machine too slow for the timeout; exactly one of both is what counts.
            NetEvent::Unanswered { token, .. } => assert!(open.remove(&token), "{token} twice"),
            other => panic!("{other:?}"),
        }
    }
    assert!(answered > 0);
}

#[tokio::test]
async fn more_asks_than_the_bound_are_told_busy() {
    let (mut a, mut b) = pair(Limits { asks: 2, ..calm() }).await;
    for token in 0..3 {
        a.ask(b.key(), token, "wait");
    }
    assert_eq!(a.unanswered(2).await, AskFailure::Busy);
    for _ in 0..2 {
        let (ticket, _) = b.asked().await;
        b.reply(ticket, "done");
        assert!(matches!(a.next().await, NetEvent::Answered { .. }));
    }
    a.ask(b.key(), 3, "room again");
    assert_eq!(b.asked().await.1, b"room again");
}

#[tokio::test]
async fn an_ask_that_cannot_arrive_is_unanswered() {
    let limits = Limits { handshake_timeout: Duration::from_millis(500), ..calm() };
    let mut a = node(1, limits).await;
    let mute = UdpSocket::bind(local()).unwrap();
    let nobody = [9; 32];
    a.ask(nobody, 1, "no address");
    assert_eq!(a.unanswered(1).await, AskFailure::Unreachable);
    let addresses = vec![mute.local_addr().unwrap()];
    a.send(NetCommand::AddAddresses { peer: nobody, addresses });
    a.ask(nobody, 2, "nobody there");
    assert_eq!(a.unanswered(2).await, AskFailure::Unreachable);
    a.ask(a.key(), 3, "myself");
    assert_eq!(a.unanswered(3).await, AskFailure::Myself);
    a.ask(nobody, 4, vec![0; 256 * 1024 + 1]);
    let (length, bound) = (256 * 1024 + 1, 256 * 1024);
    assert_eq!(a.unanswered(4).await, AskFailure::TooLarge { length, bound });
}

#[tokio::test]
async fn replies_to_tickets_that_are_not_open_are_ignored() {
    let (mut a, mut b) = pair(calm()).await;
    b.reply(12345, "to nobody");
    a.ask(b.key(), 1, "once");
    let (ticket, _) = b.asked().await;
    b.reply(ticket, "first");
    b.reply(ticket, "second");
    assert!(matches!(a.next().await, NetEvent::Answered { frame, .. } if frame == b"first"));
    b.counts(|counts| counts.late_replies == 2).await;
    // A reply above the bound is not sent, and the asker is told.
    a.ask(b.key(), 2, "too much");
    let (ticket, _) = b.asked().await;
    b.reply(ticket, vec![0; 256 * 1024 + 1]);
    assert_eq!(a.unanswered(2).await, AskFailure::NoReply);
}

#[tokio::test]
async fn a_ticket_lapses_and_the_table_is_bounded() {
    let (mut a, mut b) = (
        node(1, calm()).await,
        node(2, Limits { tickets: 1, request_timeout: Duration::from_secs(2), ..calm() }).await,
    );
    a.dial(&b);
    a.linked(b.key()).await;
    b.linked(a.key()).await;
    b.admit(a.key());
    a.ask(b.key(), 1, "left lying");
    let (ticket, _) = b.asked().await;
    a.ask(b.key(), 2, "no place");
    assert_eq!(a.unanswered(2).await, AskFailure::NoReply);
    assert_eq!(b.counts(|counts| counts.busy == 1).await.expired, 0);
    assert_eq!(a.unanswered(1).await, AskFailure::NoReply);
    b.counts(|counts| counts.expired == 1).await;
    b.reply(ticket, "too late");
    b.counts(|counts| counts.late_replies == 1).await;
    a.ask(b.key(), 3, "a place again");
    assert_eq!(b.asked().await.1, b"a place again");
}

#[tokio::test]
async fn an_ask_times_out_when_no_reply_comes() {
    let (mut a, mut b) = (
        node(1, Limits { request_timeout: Duration::from_secs(1), ..calm() }).await,
        node(2, calm()).await,
    );
    a.dial(&b);
    a.linked(b.key()).await;
    b.linked(a.key()).await;
    a.ask(b.key(), 1, "hello?");
    b.asked().await;
    assert_eq!(a.unanswered(1).await, AskFailure::TimedOut);
}

#[tokio::test]
async fn a_disconnect_ends_the_link_on_both_sides_and_its_asks() {
    let (mut a, mut b) = pair(calm()).await;
    a.ask(b.key(), 1, "will not be answered");
    b.asked().await;
    b.send(NetCommand::Disconnect { peer: a.key(), why: "tired".into() });
    assert_eq!(b.unlinked(a.key()).await, UnlinkReason::Disconnected("tired".into()));
    let mut seen = Vec::new();
    for _ in 0..2 {
        seen.push(match a.next().await {
            NetEvent::Unlinked { why: UnlinkReason::Lost(_), .. } => "unlinked",
            NetEvent::Unanswered { token: 1, why: AskFailure::LinkClosed, .. } => "unanswered",
            // The stream's end may be seen before the connection's.
            NetEvent::Unanswered { token: 1, why: AskFailure::Stream(_), .. } => "unanswered",
            other => panic!("{other:?}"),
        });
    }
    seen.sort_unstable();
    assert_eq!(seen, ["unanswered", "unlinked"]);
    assert_eq!(a.net.stats().snapshot().links, 0);
    // Linked again, the peer is a stranger again.
    a.dial(&b);
    a.linked(b.key()).await;
    b.linked(a.key()).await;
    a.ask(b.key(), 2, vec![0; 17_000]);
    b.counts(|counts| counts.held_back == 1).await;
}

#[tokio::test]
async fn closing_is_seen_by_peers_at_once() {
    // No idle timeout could be the reason here.
    let (mut a, mut b) = pair(Limits { idle_timeout: 10 * LONG, ..calm() }).await;
    a.net.close().await;
    assert_eq!(a.unlinked(b.key()).await, UnlinkReason::Closing);
    assert_eq!(timeout(LONG, a.events.recv()).await.unwrap(), None);
    assert!(matches!(b.unlinked(a.key()).await, UnlinkReason::Lost(_)));
    let admit = NetCommand::Admit { peer: b.key() };
    assert_eq!(a.net.send(admit.clone()), Err(SendError::Closed(admit)));
    a.net.close().await; // a second time is no harm
    // Dropping the last handle closes too.
    let Node { net, .. } = b;
    let closed = net.closed.clone();
    drop(net);
    timeout(LONG, closed.cancelled()).await.unwrap();
}

#[tokio::test]
async fn a_peer_whose_runtime_died_is_unlinked() {
    let mut a = node(1, Limits::default()).await;
    let address = a.address;
    let key = a.key();
    let (up, is_up) = oneshot::channel();
    let (end, ended) = oneshot::channel::<()>();
    let other = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let b = runtime.block_on(async {
            let mut b = node(2, Limits::default()).await;
            b.send(NetCommand::Dial { peer: Some(key), addresses: vec![address] });
            b.linked(key).await;
            b
        });
        up.send(b.key()).unwrap();
        let _ = ended.blocking_recv();
        runtime.shutdown_background();
        drop(b);
    });
    let peer = is_up.await.unwrap();
    a.linked(peer).await;
    a.admit(peer);
    end.send(()).unwrap();
    assert!(matches!(a.unlinked(peer).await, UnlinkReason::Lost(_)));
    other.join().unwrap();
}

#[tokio::test]
async fn a_killed_process_is_unlinked_within_the_idle_timeout() {
    let (mut child, said) = peer_in_a_process(&[]);
    let address = said.strip_prefix("listening on ").expect("the child listens").parse().unwrap();
    let mut a = node(1, Limits::default()).await;
    a.send(NetCommand::Dial { peer: None, addresses: vec![address] });
    let peer = match a.next().await {
        NetEvent::Linked { peer, .. } => peer,
        other => panic!("{other:?}"),
    };
    a.admit(peer);
    // The link is more than a handshake: a frame has gone both ways.
    a.ask(peer, 1, "alive?");
    assert!(matches!(a.next().await, NetEvent::Answered { .. }));
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let killed = Instant::now();
    assert!(matches!(a.unlinked(peer).await, UnlinkReason::Lost(_)));
    // 3 s in QUIC; the rest is for a loaded machine.
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
}

#[test]
fn session_keys_are_never_written_out() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let keys = file.path().to_str().unwrap();
    let (mut child, said) = peer_in_a_process(&[("SSLKEYLOGFILE", keys)]);
    child.wait().unwrap();
    assert!(said.contains("unset"), "{said}");
    assert_eq!(std::fs::read(file.path()).unwrap(), b"");
}

/// Runs `peer_process` and waits for the line in which it says how it fares.
fn peer_in_a_process(environment: &[(&str, &str)]) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["net::tests::peer_process", "--exact", "--ignored", "--nocapture"])
        .env("LEASEHOLD_TEST_PEER", "1")
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let said = output
        .by_ref()
        .lines()
        .map_while(Result::ok)
        .find_map(|line| line.split_once("PEER: ").map(|(_, said)| said.to_owned()))
        .expect("the child says how it fares");
    child.stdout = Some(output.into_inner()); // open, for what its test harness still says
    (child, said)
}

/// The other process of the tests above: echoes until its standard input ends.
#[test]
#[ignore = "started by tests that need a peer in another process"]
fn peer_process() {
    if std::env::var_os("LEASEHOLD_TEST_PEER").is_none() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let config = NetConfig { seed: [3; 32], listen: vec![local()], limits: Limits::default() };
    match runtime.block_on(Net::start(config)) {
        Ok((net, events, bound)) => {
            println!("PEER: listening on {}", bound[0]);
            let _in_runtime = runtime.enter();
            Node { net, events, address: bound[0] }.echo();
            let _ = io::stdin().read_to_end(&mut Vec::new());
        }
        Err(error) => println!("PEER: {error}"),
    }
}

#[tokio::test]
async fn a_dial_from_both_ends_makes_one_link() {
    for round in 0..5u8 {
        let limits = calm();
        let (mut a, mut b) =
            (node(10 + round, limits.clone()).await, node(20 + round, limits).await);
        a.dial(&b);
        b.dial(&a);
        a.linked(b.key()).await;
        b.linked(a.key()).await;
        a.admit(b.key());
        b.admit(a.key());
        // Frames go over whichever connection; no second `Linked` comes between.
        for token in 0..20 {
            a.ask(b.key(), token, "ping");
            let (ticket, _) = b.asked().await;
            b.reply(ticket, "pong");
            assert!(matches!(a.next().await, NetEvent::Answered { token: of, .. } if of == token));
        }
        assert_eq!(a.net.stats().snapshot().links, 1);
        // A dial of a linked peer is nothing; one `Unlinked` ends the link.
        a.dial(&b);
        a.send(NetCommand::Disconnect { peer: b.key(), why: "".into() });
        a.unlinked(b.key()).await;
        b.unlinked(a.key()).await;
        assert_eq!(b.net.stats().snapshot().links, 0);
    }
}

#[tokio::test]
async fn of_two_processes_with_one_key_the_newest_can_be_kept_alone() {
    let (mut a, mut old) = pair(calm()).await;
    let mut new = node(2, calm()).await;
    assert_eq!(new.key(), old.key());
    new.dial(&a);
    new.linked(a.key()).await;
    new.admit(a.key());
    // A frame over it: from here on both ends have it.
    new.ask(a.key(), 1, "here I am");
    let (ticket, _) = a.asked().await;
    a.reply(ticket, "welcome");
    assert!(matches!(new.next().await, NetEvent::Answered { token: 1, .. }));
    a.send(NetCommand::CloseOlder { peer: new.key() });
    old.unlinked(a.key()).await;
    for token in 2..22 {
        a.ask(new.key(), token, "ping");
        let (ticket, _) = new.asked().await;
        new.reply(ticket, "pong");
        assert!(matches!(a.next().await, NetEvent::Answered { token: of, .. } if of == token));
    }
    // With one connection there is none to be closed, with none there is nothing.
    a.send(NetCommand::CloseOlder { peer: new.key() });
    a.send(NetCommand::CloseOlder { peer: [9; 32] });
    a.ask(new.key(), 22, "ping");
    new.asked().await;
    assert_eq!(a.net.stats().snapshot().links, 1);
}

#[tokio::test]
async fn a_dial_that_meets_another_key_fails() {
    let (mut a, b) = (node(1, calm()).await, node(2, calm()).await);
    let wrong = [9; 32];
    a.send(NetCommand::Dial { peer: Some(wrong), addresses: vec![b.address] });
    assert_eq!(
        a.next().await,
        NetEvent::DialFailed {
            peer: Some(wrong),
            addresses: vec![b.address],
            why: DialFailure::WrongKey { found: Some(b.key()), address: b.address },
        }
    );
}

#[tokio::test]
async fn dials_without_an_expected_key() {
    let limits = Limits { handshake_timeout: Duration::from_millis(500), ..calm() };
    let (mut a, b) = (node(1, limits).await, node(2, calm()).await);
    let mute = UdpSocket::bind(local()).unwrap();
    let dead = mute.local_addr().unwrap();
    // The second address answers.
    a.send(NetCommand::Dial { peer: None, addresses: vec![dead, b.address] });
    a.linked(b.key()).await;
    // None answers; none is given; the only one is this node's own.
    a.send(NetCommand::Dial { peer: None, addresses: vec![dead, dead] });
    assert!(matches!(a.dial_failed().await, DialFailure::Unreachable(_)));
    a.send(NetCommand::Dial { peer: None, addresses: Vec::new() });
    assert_eq!(a.dial_failed().await, DialFailure::NoAddress);
    a.send(NetCommand::Dial { peer: Some([9; 32]), addresses: Vec::new() });
    assert_eq!(a.dial_failed().await, DialFailure::NoAddress);
    for peer in [None, Some([9; 32])] {
        a.send(NetCommand::Dial { peer, addresses: vec![a.address] });
        assert_eq!(a.dial_failed().await, DialFailure::Myself);
    }
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = UdpSocket::bind(local()).unwrap();
    let address = taken.local_addr().unwrap();
    let config = NetConfig { seed: [1; 32], listen: vec![local(), address], limits: calm() };
    let error = Net::start(config).await.unwrap_err();
    assert!(matches!(error, NetError::PortInUse { address: named } if named == address));
    assert!(error.to_string().contains(&address.port().to_string()), "{error}");
}

#[tokio::test]
async fn a_wildcard_keeps_its_address_and_gets_a_port() {
    let listen = vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), local()];
    let config = NetConfig { seed: [1; 32], listen, limits: calm() };
    let (_net, _events, bound) = Net::start(config).await.unwrap();
    assert!(bound[0].ip().is_unspecified());
    assert!(bound.iter().all(|address| address.port() != 0));
}

#[tokio::test]
async fn a_loop_that_is_slow_keeps_its_links_and_loses_nothing() {
    let idle_timeout = Limits::default().idle_timeout;
    let limits = Limits { events: 2, idle_timeout, ..calm() };
    let (mut a, b) = (node(1, calm()).await, node(2, limits).await);
    a.dial(&b);
    a.linked(b.key()).await;
    a.admit(b.key());
    b.admit(a.key());
    let key = b.key();
    for token in 0..200u64 {
        a.ask(key, token, "slowly");
    }
    // Longer than the idle timeout nobody reads at `b`: what is tested is that time passes.
    tokio::time::sleep(idle_timeout + Duration::from_secs(1)).await;
    let _echo = b.echo();
    for _ in 0..200 {
        match a.next().await {
            NetEvent::Answered { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn an_unadmitted_peer_is_heard_little_until_it_is_admitted() {
    let (mut a, mut b) = (node(1, calm()).await, node(2, calm()).await);
    a.dial(&b);
    a.linked(b.key()).await;
    b.linked(a.key()).await;
    a.ask(b.key(), 0, vec![0; 16 * 1024]);
    a.ask(b.key(), 1, vec![0; 16 * 1024 + 1]);
    a.ask(b.key(), 2, "third");
    a.ask(b.key(), 3, "fourth");
    a.ask(b.key(), 4, "fifth");
    // The one that is too long and the last of the five are left unread.
    let mut sizes = HashMap::new();
    for _ in 0..3 {
        let (_, frame) = b.asked().await;
        *sizes.entry(frame.len()).or_insert(0) += 1;
    }
    let counts = b.counts(|counts| counts.held_back == 2).await;
    assert_eq!(counts.frames_in, 3);
    assert!(!sizes.contains_key(&(16 * 1024 + 1)), "{sizes:?}");
    b.admit(a.key());
    for _ in 0..2 {
        let (_, frame) = b.asked().await;
        *sizes.entry(frame.len()).or_insert(0) += 1;
    }
    assert_eq!(sizes, HashMap::from([(16 * 1024, 1), (16 * 1024 + 1, 1), (5, 2), (6, 1)]));
}

#[tokio::test]
async fn a_peer_that_is_not_admitted_in_time_is_unlinked() {
    let limits = Limits { unadmitted_time: Duration::from_millis(500), ..calm() };
    let (mut a, mut b) = (node(1, calm()).await, node(2, limits).await);
    let mut c = node(3, calm()).await;
    a.dial(&b);
    a.linked(b.key()).await;
    b.linked(a.key()).await;
    b.admit(a.key());
    c.dial(&b);
    c.linked(b.key()).await;
    b.linked(c.key()).await;
    assert_eq!(b.unlinked(c.key()).await, UnlinkReason::NotAdmitted);
    assert!(matches!(c.unlinked(b.key()).await, UnlinkReason::Lost(_)));
    assert_eq!(b.net.stats().snapshot().not_admitted, 1);
    // The admitted one stays.
    a.ask(b.key(), 1, "still here");
    b.asked().await;
}

#[tokio::test]
async fn strangers_are_few_at_a_time() {
    let (a, mut b) =
        (node(1, calm()).await, node(2, Limits { unadmitted_links: 1, ..calm() }).await);
    let mut c = node(3, calm()).await;
    a.dial(&b);
    b.linked(a.key()).await;
    c.dial(&b);
    b.counts(|counts| counts.turned_away == 1).await;
    // The dialer's handshake was complete before it was turned away, or was not.
    match c.next().await {
        NetEvent::Linked { .. } => {
            assert!(matches!(c.unlinked(b.key()).await, UnlinkReason::Lost(_)));
        }
        NetEvent::DialFailed { .. } => {}
        other => panic!("{other:?}"),
    }
    b.admit(a.key());
    a.ask(b.key(), 1, "the admission is through when this is read");
    b.asked().await;
    c.dial(&b);
    b.linked(c.key()).await;
}

// --- a peer that keeps no rules ---

/// Writes requests and responses to the stream as they are, without a frame around them.
#[derive(Clone, Default)]
struct Raw;

impl request_response::Codec for Raw {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = Vec<u8>;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut bytes = Vec::new();
        io.read_to_end(&mut bytes).await?;
        Ok(bytes)
    }

    async fn read_response<T>(&mut self, p: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        self.read_request(p, io).await
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        bytes: Vec<u8>,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&bytes).await
    }

    async fn write_response<T>(
        &mut self,
        p: &StreamProtocol,
        io: &mut T,
        bytes: Vec<u8>,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        self.write_request(p, io, bytes).await
    }
}

/// Dials `node`, sends `request` (if any) and answers every request with `response`.
fn raw(node: &Node, request: Option<Vec<u8>>, response: Vec<u8>) -> (PeerKey, JoinHandle<()>) {
    let keys = Keypair::ed25519_from_bytes([99; 32]).unwrap();
    let me = keys.public().to_peer_id();
    let transport = quic::tokio::Transport::new(quic::Config::new(&keys))
        .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
        .boxed();
    let behaviour = request_response::Behaviour::<Raw>::new(
        [(codec::PROTOCOL, ProtocolSupport::Full)],
        request_response::Config::default(),
    );
    let config = swarm::Config::with_tokio_executor().with_idle_connection_timeout(10 * LONG);
    let mut swarm = Swarm::new(transport, behaviour, me, config);
    let peer: PeerId = address::peer_of(&node.key());
    swarm.add_peer_address(peer, address::multiaddr_of(&node.address));
    match request {
        Some(bytes) => {
            swarm.behaviour_mut().send_request(&peer, bytes);
        }
        None => swarm.dial(peer).unwrap(),
    }
    let task = tokio::spawn(async move {
        loop {
            if let SwarmEvent::Behaviour(request_response::Event::Message {
                message: Message::Request { channel, .. },
                ..
            }) = swarm.select_next_some().await
            {
                let _ = swarm.behaviour_mut().send_response(channel, response.clone());
            }
        }
    });
    (address::key_of(&me).unwrap(), task)
}

/// A length prefix and bytes that need not fit it.
fn announced(length: u32, bytes: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes(), bytes].concat()
}

#[tokio::test]
async fn requests_that_break_the_frame_rules_cost_the_link() {
    let bound = 256 * 1024;
    let table = [
        // No byte follows: what is refused is the announcement.
        (announced(bound + 1, b""), Some(Violation::Oversize { length: 262_145, bound: 262_144 })),
        (
            announced(u32::MAX, b"a few"),
            Some(Violation::Oversize { length: u32::MAX as usize, bound: 262_144 }),
        ),
        (announced(3, b"four"), Some(Violation::Trailing)),
        (announced(0, b"!"), Some(Violation::Trailing)),
        // An honest peer that gives up leaves these.
        (announced(9, b"short"), None),
        (vec![1, 0], None),
        (Vec::new(), None),
    ];
    for admitted in [false, true] {
        for (bytes, violation) in table.clone() {
            let case = format!("{violation:?}, admitted: {admitted}");
            let mut a = node(1, calm()).await;
            let (peer, task) = raw(&a, Some(bytes), Vec::new());
            a.linked(peer).await;
            if admitted {
                a.admit(peer);
            }
            match violation {
                Some(violation) => {
                    assert_eq!(
                        a.unlinked(peer).await,
                        UnlinkReason::BrokeRules(violation),
                        "{case}"
                    );
                    let counts = a.net.stats().snapshot();
                    assert_eq!(counts.oversize + counts.trailing, 1, "{case}");
                }
                None => {
                    a.admit(peer);
                    a.ask(peer, 1, "still linked?");
                    // The raw peer answers with no frame at all.
                    assert_eq!(a.unanswered(1).await, AskFailure::NoReply, "{case}");
                    assert_eq!(a.net.stats().snapshot().links, 1, "{case}");
                }
            }
            assert_eq!(a.net.stats().snapshot().frames_in, 0, "{case}");
            task.abort();
        }
    }
}

#[tokio::test]
async fn answers_that_break_the_frame_rules_cost_the_link() {
    let table = [
        (announced(262_145, b""), Violation::Oversize { length: 262_145, bound: 262_144 }),
        (announced(1, b"two"), Violation::Trailing),
    ];
    for (bytes, violation) in table {
        let mut a = node(1, calm()).await;
        let (peer, task) = raw(&a, None, bytes);
        a.linked(peer).await;
        a.admit(peer);
        a.ask(peer, 1, "what do you say");
        let mut seen = Vec::new();
        for _ in 0..2 {
            match a.next().await {
                NetEvent::Unanswered { token: 1, why, .. } => {
                    // The link's end may be seen first.
                    assert!(
                        why == AskFailure::BrokeRules(violation) || why == AskFailure::LinkClosed,
                        "{why:?}"
                    );
                    seen.push("unanswered");
                }
                NetEvent::Unlinked { why, .. } => {
                    assert_eq!(why, UnlinkReason::BrokeRules(violation));
                    seen.push("unlinked");
                }
                other => panic!("{other:?}"),
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, ["unanswered", "unlinked"]);
        task.abort();
    }
}

#[tokio::test]
async fn frames_that_wait_for_the_loop_are_bounded_in_bytes() {
    // Room for one frame of 100 bytes and not for one more beside it.
    let limits = Limits { held_per_peer: 150, ..calm() };
    let mut a = node(1, limits).await;
    // 200 bytes are above what may ever be held: dropped, but no rule is broken.
    let (peer, task) = raw(&a, Some(announced(200, &[0; 200])), Vec::new());
    a.linked(peer).await;
    a.admit(peer);
    a.counts(|counts| counts.over_budget == 1).await;
    assert_eq!(a.net.stats().snapshot().links, 1);
    task.abort();

    // What was handed over no longer counts.
    let mut b = node(2, calm()).await;
    b.send(NetCommand::AddAddresses { peer: a.key(), addresses: vec![a.address] });
    for token in 0..5 {
        b.ask(a.key(), token, vec![0; 100]);
        loop {
            match a.next().await {
                NetEvent::Linked { peer, .. } => a.admit(peer),
                NetEvent::Asked { ticket, .. } => break a.reply(ticket, "ok"),
                NetEvent::Unlinked { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        loop {
            match b.next().await {
                NetEvent::Linked { peer, .. } => b.admit(peer),
                NetEvent::Answered { .. } => break,
                other => panic!("{other:?}"),
            }
        }
    }
}
