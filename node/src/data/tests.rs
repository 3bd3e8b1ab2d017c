//! Real endpoints on loopback, in one process: honest ones on both sides, and hand-made peers
//! that lie, stall and send rubbish.

#![allow(clippy::single_range_in_vec_init, reason = "one range is what is meant")]

use std::{
    collections::HashSet,
    fs::OpenOptions,
    io::Cursor,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicUsize},
};

use bao_tree::{
    BaoTree, ChunkRanges,
    io::{outboard::PreOrderMemOutboard, sync},
};
use leasehold_proto::base::groups::GROUP_BYTES;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Notify,
    time::sleep,
};

use super::{
    frame::{Get, MAX_REQUEST, MAX_RESPONSE, Refusal, Refused},
    serve::chunk_ranges,
    stream::read_frame,
    tls::Met,
    *,
};
use crate::payload::{Declared, GROUP, Limits, PayloadError};

const G: usize = GROUP_BYTES as usize;

struct Node {
    data: Data,
    arrivals: mpsc::Receiver<Arriving>,
    store: PayloadStore,
    dir: tempfile::TempDir,
}

impl Node {
    fn new(seed: u8) -> Self {
        Self::with(seed, |_| {}, Limits { keep_free: 0, ..Limits::default() }, Arc::new(|_| true))
    }

    fn with(
        seed: u8,
        configure: impl FnOnce(&mut DataConfig),
        limits: Limits,
        admit: Admit,
    ) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self::start(dir, seed, configure, limits, admit)
    }

    fn start(
        dir: tempfile::TempDir,
        seed: u8,
        configure: impl FnOnce(&mut DataConfig),
        limits: Limits,
        admit: Admit,
    ) -> Self {
        let store = PayloadStore::open_dir(dir.path(), limits).expect("a store");
        let mut config = DataConfig::new(([127, 0, 0, 1], 0).into());
        configure(&mut config);
        let (data, arrivals) =
            Data::start(config, [seed; 32], store.clone(), admit).expect("starts");
        Self { data, arrivals, store, dir }
    }

    /// The same node after its process ended.
    async fn again(self, seed: u8) -> Self {
        let Self { data, store, dir, .. } = self;
        data.close().await;
        drop((data, store));
        let limits = Limits { keep_free: 0, ..Limits::default() };
        Self::start(dir, seed, |_| {}, limits, Arc::new(|_| true))
    }

    fn import(&self, content: &[u8]) -> (Root, u64) {
        let size = Declared::Exactly(content.len() as u64);
        let held = self.store.import(Cursor::new(content), size).expect("imports");
        (held.root, held.size)
    }

    fn key(&self) -> [u8; 32] {
        self.data.public_key()
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        vec![self.data.local_addr()]
    }

    async fn fetch_from(
        &self,
        holder: &Node,
        (root, size): (Root, u64),
    ) -> Result<FetchStats, FetchError> {
        self.data.fetch(vec![holder.holder()], root, size, |_| {}).await
    }

    fn holder(&self) -> Holder {
        Holder { key: self.key(), addresses: self.addresses(), whole: true }
    }

    fn partial_files(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("partial")).expect("lists").count()
    }

    fn flip(&self, root: Root, ending: &str, offset: u64) {
        let path: PathBuf = self.dir.path().join(format!("{root}.{ending}"));
        let file = OpenOptions::new().read(true).write(true).open(path).expect("opens");
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("reads");
        file.write_all_at(&[byte[0] ^ 0x40], offset).expect("writes");
    }
}

/// Bytes that no one could guess, the same every time.
fn content(len: usize) -> Vec<u8> {
    let mut content = vec![0; len];
    blake3::Hasher::new().update(&len.to_le_bytes()).finalize_xof().fill(&mut content);
    content
}

fn store_error(fetched: &Result<FetchStats, FetchError>) -> Option<&PayloadError> {
    match fetched {
        Err(FetchError::Store(e)) => Some(e),
        _ => None,
    }
}

/// Waits for `done`, with a deadline that only a hang meets.
async fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A peer made by hand: real handshakes, and `answer` for every stream.
struct Liar {
    key: [u8; 32],
    address: SocketAddr,
    streams: Arc<AtomicUsize>,
    _endpoint: quinn::Endpoint,
}

impl Liar {
    fn new<F>(
        seed: u8,
        answer: impl Fn(quinn::SendStream, quinn::RecvStream) -> F + Clone + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let identity = Identity::new([seed; 32]).expect("an identity");
        let crypto = identity.server().expect("a configuration");
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(DataConfig::new(loopback()).served_transport()));
        let endpoint = quinn::Endpoint::server(config, loopback()).expect("an endpoint");
        let streams = Arc::new(AtomicUsize::new(0));
        let (accepting, count) = (endpoint.clone(), streams.clone());
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let Ok(connection) = incoming.await else { continue };
                let (answer, count) = (answer.clone(), count.clone());
                tokio::spawn(async move {
                    while let Ok((send, recv)) = connection.accept_bi().await {
                        count.fetch_add(1, Ordering::Relaxed);
                        tokio::spawn(answer(send, recv));
                    }
                });
            }
        });
        let address = endpoint.local_addr().expect("an address");
        Self { key: identity.public, address, streams, _endpoint: endpoint }
    }

    /// One that answers every request with `header`, then `body`, and then does `end`.
    fn sending<F>(
        seed: u8,
        header: Response,
        body: Vec<u8>,
        end: impl Fn(quinn::SendStream) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let header = header.encode().expect("encodes");
        Self::new(seed, move |mut send, mut recv| {
            let (header, body, end) = (header.clone(), body.clone(), end.clone());
            async move {
                read_frame(&mut recv, MAX_REQUEST).await.expect("a request");
                send.write_all(&header).await.expect("sends");
                if send.write_all(&body).await.is_ok() {
                    end(send).await;
                }
                // Until the asker's verdict: a dropped half would end the stream early.
                let _ = recv.read_to_end(10).await;
            }
        })
    }

    async fn feed(&self, to: &Node, root: Root, size: u64) -> Result<FetchStats, FetchError> {
        to.data.fetch(vec![self.holder()], root, size, |_| {}).await
    }

    fn holder(&self) -> Holder {
        Holder { key: self.key, addresses: vec![self.address], whole: true }
    }
}

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// A connection to `node` made by hand, with a proven key.
async fn connect(seed: u8, node: &Node) -> quinn::Connection {
    let identity = Identity::new([seed; 32]).expect("an identity");
    let crypto = identity.client(node.key(), Met::default()).expect("a configuration");
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(DataConfig::new(loopback()).dialed_transport()));
    let endpoint = quinn::Endpoint::client(loopback()).expect("an endpoint");
    let address = node.data.local_addr();
    endpoint.connect_with(config, address, "anyone").expect("dials").await.expect("connects")
}

/// The tree and the groups of `content`, as an honest holder sends them.
fn encoded(content: &[u8], ranges: &ChunkRanges) -> Vec<u8> {
    let outboard = PreOrderMemOutboard::create(content, GROUP);
    let mut encoded = Vec::new();
    sync::encode_ranges(content, outboard, ranges, &mut encoded).expect("encodes");
    encoded
}

#[tokio::test]
async fn payloads_of_every_size_arrive_and_none_is_sent_twice() {
    let (holder, asker) = (Node::new(1), Node::new(2));
    let mut sent = 0;
    for len in [0, 1, 1023, 1024, 1025, G - 1, G, G + 1, 2 * G, 5 * G + 3, 9_000_001] {
        let bytes = content(len);
        let (root, size) = holder.import(&bytes);
        let mut seen = 0;
        let fetched = asker.data.fetch(vec![holder.holder()], root, size, |at| {
            assert!(at.bytes >= seen, "progress went back");
            seen = at.bytes;
        });
        let fetched = fetched.await.unwrap_or_else(|e| panic!("{len} bytes: {e}"));
        assert_eq!((fetched.bytes, fetched.joined), (size, false));
        assert_eq!(asker.store.read(root, size).expect("reads"), bytes);
        asker.store.verify(root).expect("its outboard is right, too");
        sent += size;
        let again = asker.fetch_from(&holder, (root, size)).await.expect("is held");
        assert_eq!(again.bytes, 0);
        assert_eq!(holder.data.stats().payload_sent, sent);
        assert_eq!(asker.data.stats().payload_received, sent);
    }
    assert_eq!(holder.data.stats().accepted, 1, "one connection carries all");
    assert_eq!(asker.partial_files(), 0);
    // What was fetched can be passed on.
    let third = Node::new(3);
    let (root, size) = (Root::of(&content(9_000_001)), 9_000_001);
    third.fetch_from(&asker, (root, size)).await.expect("fetches from the fetcher");
    third.store.verify(root).expect("verifies");
}

#[tokio::test]
async fn who_is_not_admitted_gets_nothing() {
    let admitted = Arc::new(AtomicBool::new(false));
    let asked = admitted.clone();
    let admit: Admit = Arc::new(move |_| asked.load(Ordering::SeqCst));
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let (holder, asker) = (Node::with(1, |_| {}, limits, admit), Node::new(2));
    let wanted = holder.import(&content(100));
    let refused = asker.fetch_from(&holder, wanted).await;
    let peer = holder.key();
    assert!(
        matches!(&refused, Err(FetchError::Link(LinkError::NotAdmitted { peer: p })) if *p == peer),
        "{refused:?}"
    );
    assert_eq!(holder.data.stats().payload_sent, 0);
    assert_eq!(holder.data.stats().not_admitted, 1);
    assert_eq!(asker.partial_files(), 0);

    admitted.store(true, Ordering::SeqCst);
    asker.fetch_from(&holder, wanted).await.expect("is admitted now");

    // Admission ends while the connection is open.
    admitted.store(false, Ordering::SeqCst);
    let other = holder.import(&content(101));
    let refused = asker.fetch_from(&holder, other).await;
    assert!(matches!(refused, Err(FetchError::Link(LinkError::NotAdmitted { .. }))), "{refused:?}");
    until("the connection is closed", || holder.data.stats().serving == 0).await;
}

#[tokio::test]
async fn another_key_than_the_expected_one_is_refused() {
    let (holder, asker, other) = (Node::new(1), Node::new(2), Node::new(3));
    let (root, size) = holder.import(&content(100));
    let posing = Holder { addresses: holder.addresses(), ..other.holder() };
    let fetched = asker.data.fetch(vec![posing], root, size, |_| {}).await;
    let (expected, found) = (other.key(), holder.key());
    assert!(
        matches!(
            fetched,
            Err(FetchError::Link(LinkError::WrongKey { expected: e, found: f }))
                if e == expected && f == found
        ),
        "{fetched:?}"
    );
    assert_eq!(holder.data.stats().streams, 0);
}

#[tokio::test]
async fn a_wrong_byte_names_the_holder_and_the_holder_finds_it() {
    for (len, ending, at, group) in [
        (5 * G, "data", 3 * GROUP_BYTES + 17, 3 * GROUP_BYTES),
        (700, "data", 699, 0),
        (5 * G, "outboard", 70, 0),
    ] {
        let (holder, asker) = (Node::new(1), Node::new(2));
        let wanted = holder.import(&content(len));
        holder.flip(wanted.0, ending, at);
        let fetched = asker.fetch_from(&holder, wanted).await;
        let peer = holder.key();
        assert!(
            matches!(
                &fetched,
                Err(FetchError::Corrupt { peer: p, offset, .. }) if *p == peer && *offset == group
            ),
            "{ending} {at}: {fetched:?}"
        );
        assert_eq!(fetched.expect_err("fails").blames(), Some(peer));
        assert_eq!(asker.store.has(wanted.0), None);
        // What came before the wrong byte rests, with its marks.
        let rests = if group > 0 { 3 } else { 0 };
        until("the transfer is over", || asker.partial_files() == rests).await;
        // The complaint makes the holder look, and set its copy aside.
        until("the holder sets it aside", || holder.store.has(wanted.0).is_none()).await;
        let fetched = asker.fetch_from(&holder, wanted).await;
        assert!(matches!(fetched, Err(FetchError::NotHeld { .. })), "{fetched:?}");
        // Somebody else has the rest.
        let honest = Node::new(3);
        honest.import(&content(len));
        let fetched = asker.fetch_from(&honest, wanted).await.expect("fetches");
        assert_eq!(fetched.bytes, wanted.1 - group);
        asker.store.verify(wanted.0).expect("it is whole");
        until("nothing is left of the transfer", || asker.partial_files() == 0).await;
    }
}

/// Three transfers that each end early, by a holder that has only so much, and a start in between.
#[tokio::test]
async fn a_payload_comes_in_parts_and_each_part_once() {
    let bytes = content(40 * G + 11);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    let mut asker = Node::new(2);
    let mut came = 0;
    for (seed, groups) in [(20, 5_u64), (21, 23), (22, 39)] {
        let holder = Node::new(seed);
        holder.import(&bytes);
        let path = holder.dir.path().join(format!("{root}.data"));
        let file = OpenOptions::new().write(true).open(path).expect("opens");
        file.set_len(groups * GROUP_BYTES).expect("truncates");
        let fetched = asker.fetch_from(&holder, (root, size)).await;
        assert!(matches!(fetched, Err(FetchError::GivenUp { .. })), "{fetched:?}");
        // What the holder had sent and took back with the stream may or may not have come.
        came += asker.data.stats().payload_received;
        assert!(came <= groups * GROUP_BYTES, "{came} of {groups} groups");
        asker = asker.again(2).await;
    }
    let holder = Node::new(1);
    holder.import(&bytes);
    let mut heard = Vec::new();
    let fetched = asker.data.fetch(vec![holder.holder()], root, size, |at| {
        heard.push(at.bytes);
    });
    assert_eq!(fetched.await.expect("fetches").bytes, size - came);
    assert!(heard.iter().all(|at| *at == 0 || *at >= came), "progress counts what was there");
    asker.store.verify(root).expect("it is whole");
    assert_eq!(holder.data.stats().payload_sent, size - came);
    until("nothing is left of the transfers", || asker.partial_files() == 0).await;
}

#[tokio::test]
async fn a_payload_cut_short_on_the_holders_disk_is_given_up_and_found() {
    let (holder, asker) = (Node::new(1), Node::new(2));
    let wanted = holder.import(&content(6 * G));
    let path = holder.dir.path().join(format!("{}.data", wanted.0));
    let file = OpenOptions::new().write(true).open(path).expect("opens");
    file.set_len(4 * GROUP_BYTES).expect("truncates");
    let fetched = asker.fetch_from(&holder, wanted).await;
    assert!(
        matches!(fetched, Err(FetchError::GivenUp { code: Some(Code::Internal), .. })),
        "{fetched:?}"
    );
    until("the holder sets it aside", || holder.store.has(wanted.0).is_none()).await;
}

#[tokio::test]
async fn what_is_private_is_refused_to_whoever_names_it() {
    let (from, to) = (Node::new(1), Node::new(2));
    let (root, size) = from.import(b"own");
    from.store.keep_private(root).expect("marked");
    let refused = to.fetch_from(&from, (root, size)).await;
    assert!(matches!(refused, Err(FetchError::NotHeld { .. })), "{refused:?}");
    // Not even whether it is guessed right.
    let refused = to.fetch_from(&from, (root, size + 1)).await;
    assert!(matches!(refused, Err(FetchError::NotHeld { .. })), "{refused:?}");
    from.store.publish(root).expect("published");
    to.fetch_from(&from, (root, size)).await.expect("it is anybody's");
}

#[tokio::test]
async fn a_size_that_is_not_the_payloads_is_refused() {
    let (holder, asker) = (Node::new(1), Node::new(2));
    let bytes = content(3 * G);
    let (root, size) = holder.import(&bytes);
    // The caller is wrong about it.
    for wrong in [0, size - 1, size + 1, 1 << 30] {
        let fetched = asker.fetch_from(&holder, (root, wrong)).await;
        assert!(
            matches!(fetched, Err(FetchError::WrongSize { actual, .. }) if actual == size),
            "{wrong}: {fetched:?}"
        );
    }
    assert_eq!(holder.data.stats().payload_sent, 0);
    // The holder is.
    let ready = |size| Response::Ready { size };
    let liar = Liar::sending(7, ready(size + 1), vec![], |_| async {});
    let fetched = liar.feed(&asker, root, size).await;
    assert!(matches!(fetched, Err(FetchError::WrongSize { .. })), "{fetched:?}");
    // The holder says the right size and sends a tree of another.
    let shorter = encoded(&bytes[..2 * G], &ChunkRanges::all());
    let liar = Liar::sending(8, ready(size), shorter, |mut send| async move {
        let _ = send.finish();
    });
    let fetched = liar.feed(&asker, root, size).await;
    assert_eq!(fetched.expect_err("fails").blames(), Some(liar.key));
    // A caller that asks for a held payload by another size is told so.
    asker.fetch_from(&holder, (root, size)).await.expect("fetches");
    let fetched = asker.fetch_from(&holder, (root, size + 1)).await;
    assert!(matches!(store_error(&fetched), Some(PayloadError::WrongSize { .. })), "{fetched:?}");
}

#[tokio::test]
async fn streams_that_end_wrong_are_told_apart() {
    // Each time another one: what came of one transfer would be gone on from in the next.
    let asker = || Node::new(2);
    let bytes = content(4 * G + 5);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    let whole = encoded(&bytes, &ChunkRanges::all());
    let ready = Response::Ready { size };

    let half = whole[..whole.len() / 2].to_vec();
    let sent = half.len() as u64;
    let finish = |mut send: quinn::SendStream| async move {
        let _ = send.finish();
    };
    let liar = Liar::sending(10, ready.clone(), half.clone(), finish);
    let fetched = liar.feed(&asker(), root, size).await;
    assert!(
        matches!(fetched, Err(FetchError::Truncated { received, .. }) if received == sent),
        "{fetched:?}"
    );

    let mut longer = whole.clone();
    longer.push(0);
    let liar = Liar::sending(11, ready.clone(), longer, finish);
    // What comes after the last group is not waited for.
    liar.feed(&asker(), root, size).await.expect("all of it came");

    let go = Arc::new(Notify::new());
    let ready_to_go = go.clone();
    let liar = Liar::sending(12, ready.clone(), half, move |mut send| {
        let go = ready_to_go.clone();
        async move {
            go.notified().await;
            let _ = send.reset(VarInt::from_u32(Code::Closing as u32));
        }
    });
    let waiting = asker();
    let fetched = waiting.data.fetch(vec![liar.holder()], root, size, |at| {
        if at.bytes > 0 {
            go.notify_one();
        }
    });
    let fetched = fetched.await;
    assert!(
        matches!(fetched, Err(FetchError::GivenUp { code: Some(Code::Closing), .. })),
        "{fetched:?}"
    );

    // A response that is no frame, and one that announces more than any response has.
    for broken in [vec![1, 0, 0, 0, 99], vec![255, 255, 255, 255]] {
        let liar = Liar::new(13, move |mut send, _recv| {
            let broken = broken.clone();
            async move {
                send.write_all(&broken).await.expect("sends");
                let _ = send.finish();
                let _ = send.stopped().await;
            }
        });
        let fetched = liar.feed(&asker(), root, size).await;
        assert!(
            matches!(fetched, Err(FetchError::Link(LinkError::Malformed { .. }))),
            "{fetched:?}"
        );
    }

    assert_eq!(waiting.store.list(), []);
    // The same bytes, sent well, are taken from the same kind of peer.
    let honest = Liar::sending(14, ready, whole, finish);
    assert_eq!(honest.feed(&asker(), root, size).await.expect("fetches").bytes, size);
}

#[tokio::test]
async fn a_sender_that_stalls_is_cut_off() {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let quick = |config: &mut DataConfig| config.stall = Duration::from_millis(200);
    let asker = Node::with(2, quick, limits, Arc::new(|_| true));
    let bytes = content(2 * G);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    let some = encoded(&bytes, &ChunkRanges::all())[..G].to_vec();
    let wait = |send: quinn::SendStream| async move {
        let _ = send.stopped().await;
    };
    let liar = Liar::sending(10, Response::Ready { size }, some, wait);
    let fetched = liar.feed(&asker, root, size).await;
    assert!(matches!(fetched, Err(FetchError::Stalled { .. })), "{fetched:?}");
    // One that says nothing at all.
    let silent = Liar::new(11, |send, _recv| async move {
        let _ = send.stopped().await;
    });
    let fetched = silent.feed(&asker, root, size).await;
    assert!(matches!(fetched, Err(FetchError::Link(LinkError::Silent { .. }))), "{fetched:?}");
    // And a reader that does not read: the holder lets go of it.
    let holder = Node::with(3, quick, limits, Arc::new(|_| true));
    let (root, size) = holder.import(&content(40 << 20));
    let connection = connect(12, &holder).await;
    let (mut send, mut recv) = connection.open_bi().await.expect("opens");
    let get = Request::Get(Get { root, size, ranges: vec![] }).encode().expect("encodes");
    send.write_all(&get).await.expect("asks");
    let cut = recv.received_reset().await.expect("the stream ends");
    assert_eq!(cut, Some(VarInt::from_u32(Code::Stalled as u32)));
    assert!(holder.data.stats().payload_sent < size);
}

#[tokio::test]
async fn rubbish_is_refused_and_the_rest_goes_on() {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let quick = |config: &mut DataConfig| config.request_timeout = Duration::from_millis(300);
    let node = Node::with(1, quick, limits, Arc::new(|_| true));
    let (root, size) = node.import(&content(3 * G));
    let connection = connect(9, &node).await;
    let get = |ranges| Request::Get(Get { root, size, ranges }).encode().expect("encodes");
    let whole = get(vec![]);
    let mut longer = whole.clone();
    longer[0] += 1;
    longer.push(0);
    let backwards = std::ops::Range { start: GROUP_BYTES, end: 0 };

    // Each is answered with a refusal that says what is wrong.
    for rubbish in [
        vec![0, 0, 0, 0],
        vec![1, 0, 0, 0, 77],
        vec![255, 255, 255, 255, 1, 2, 3],
        longer,
        get(vec![1..size]),
        get(vec![0..size + 1]),
        get(vec![backwards]),
    ] {
        let (mut send, mut recv) = connection.open_bi().await.expect("opens");
        send.write_all(&rubbish).await.expect("sends");
        let frame = read_frame(&mut recv, MAX_RESPONSE).await.expect("a response");
        let response = Response::decode(&frame).expect("decodes");
        let Response::Refused(refused) = response else { panic!("{rubbish:?} was taken") };
        assert_eq!(refused.why, Refusal::BadRequest, "{rubbish:?}");
        assert!(!refused.detail.is_empty());
    }
    // A request that never ends, and one that ends inside.
    for finish in [false, true] {
        let (mut send, mut recv) = connection.open_bi().await.expect("opens");
        send.write_all(&whole[..20]).await.expect("sends");
        if finish {
            send.finish().expect("finishes");
        }
        assert!(read_frame(&mut recv, MAX_RESPONSE).await.is_err());
    }
    // Bytes after a whole request.
    let (mut send, mut recv) = connection.open_bi().await.expect("opens");
    let mut trailing = whole.clone();
    trailing.extend([0; 9]);
    send.write_all(&trailing).await.expect("sends");
    assert!(recv.read_to_end(usize::MAX).await.is_err());

    // The same connection still serves.
    let (mut send, mut recv) = connection.open_bi().await.expect("opens");
    send.write_all(&whole).await.expect("sends");
    read_frame(&mut recv, MAX_RESPONSE).await.expect("a response");
    let body = recv.read_to_end(10 * G).await.expect("the payload");
    assert_eq!(body, encoded(&content(3 * G), &ChunkRanges::all()));
}

#[tokio::test]
async fn ranges_are_served_and_verify_alone() {
    let node = Node::new(1);
    let bytes = content(7 * G + 100);
    let (root, size) = node.import(&bytes);
    let connection = connect(9, &node).await;
    let g = GROUP_BYTES;
    for ranges in [vec![0..g], vec![g..3 * g, 5 * g..6 * g], vec![7 * g..size], vec![0..size]] {
        let (mut send, mut recv) = connection.open_bi().await.expect("opens");
        let get = Request::Get(Get { root, size, ranges: ranges.clone() });
        send.write_all(&get.encode().expect("encodes")).await.expect("asks");
        read_frame(&mut recv, MAX_RESPONSE).await.expect("a response");
        let body = recv.read_to_end(10 * G).await.expect("the ranges");
        let (chunks, tree) = (chunk_ranges(&ranges, size), BaoTree::new(size, GROUP));
        let items = sync::DecodeResponseIter::new(root.hash(), tree, &body[..], &chunks);
        let mut expected = ranges.iter().flat_map(|r| r.clone().step_by(G));
        for item in items {
            if let bao_tree::io::BaoContentItem::Leaf(leaf) = item.expect("verifies") {
                assert_eq!(Some(leaf.offset), expected.next());
                let at = leaf.offset as usize;
                assert_eq!(leaf.data, bytes[at..at + leaf.data.len()]);
            }
        }
        assert_eq!(expected.next(), None, "a group is missing");
    }
}

#[tokio::test]
async fn streams_to_the_node_echo() {
    let (mut server, client) = (Node::new(1), Node::new(2));
    let caller = client.key();
    let mut arrivals = std::mem::replace(&mut server.arrivals, mpsc::channel(1).1);
    let serving = tokio::spawn(async move {
        while let Some(arriving) = arrivals.recv().await {
            assert_eq!(arriving.peer, caller);
            match arriving.channel {
                1 => {
                    let body = arriving.body.clone();
                    let (mut send, mut recv) = arriving.accept().await.expect("accepts");
                    send.write_all(&body).await.expect("echoes the body");
                    tokio::io::copy(&mut recv, &mut send).await.expect("echoes");
                    send.finish();
                }
                2 => arriving.refuse(Refusal::Denied, "not\nyours"),
                3 => {
                    let (mut send, mut recv) = arriving.accept().await.expect("accepts");
                    send.write_all(b"half").await.expect("writes");
                    recv.read_u8().await.expect("the client has read it");
                    // Dropped without an end.
                }
                _ => drop(arriving),
            }
        }
    });
    let open = |channel, body| client.data.open(server.key(), server.addresses(), channel, body);

    let (mut send, mut recv) = open(1, b"hello ".to_vec()).await.expect("opens");
    let input = content(3_000_000);
    let writing = async {
        send.write_all(&input).await.expect("writes");
        send.finish();
    };
    let mut output = Vec::new();
    let reading = recv.read_to_end(&mut output);
    let ((), read) = tokio::join!(writing, reading);
    read.expect("reads");
    assert!(output.starts_with(b"hello "));
    assert_eq!(output[6..], input);

    let refused = open(2, vec![]).await.expect_err("is refused");
    let LinkError::Refused { refused, .. } = refused else { panic!("{refused:?}") };
    assert_eq!((refused.why, refused.detail.as_str()), (Refusal::Denied, "notyours"));
    let refused = open(9, vec![]).await.expect_err("nobody answers");
    let LinkError::Refused { refused, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(refused.why, Refusal::Unsupported);

    // A torn end is never taken for the end.
    let (mut send, mut recv) = open(3, vec![]).await.expect("opens");
    let mut half = [0; 4];
    recv.read_exact(&mut half).await.expect("half of it");
    send.write_u8(1).await.expect("says so");
    let torn = recv.read_to_end(&mut Vec::new()).await.expect_err("is torn");
    assert_eq!(torn.kind(), io::ErrorKind::ConnectionReset);

    let (_send, _recv) = open(1, vec![7; frame::MAX_BODY]).await.expect("a full body fits");
    let refused = open(1, vec![7; frame::MAX_BODY + 1]).await.expect_err("one more does not");
    assert!(matches!(refused, LinkError::Request(_)), "{refused:?}");
    serving.abort();
}

#[tokio::test]
async fn two_who_want_the_same_share_one_transfer() {
    let asker = Node::new(2);
    let bytes = content(6 * G);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    let whole = encoded(&bytes, &ChunkRanges::all());
    // The holder waits with the second half until both are waiting for it.
    let go = Arc::new(Notify::new());
    let (first, rest) = (whole[..G].to_vec(), whole[G..].to_vec());
    let ready = go.clone();
    let holder = Liar::sending(7, Response::Ready { size }, first, move |mut send| {
        let (ready, rest) = (ready.clone(), rest.clone());
        async move {
            ready.notified().await;
            let _ = send.write_all(&rest).await;
            let _ = send.finish();
        }
    });
    let fetch = || holder.feed(&asker, root, size);
    let both = async { tokio::join!(fetch(), fetch(), fetch()) };
    let release = async {
        until("all three wait", || {
            let transfers = lock(&asker.data.shared.transfers);
            transfers.values().map(|known| known.state.receiver_count()).sum::<usize>() == 3
        })
        .await;
        go.notify_one();
    };
    let ((a, b, c), ()) = tokio::join!(both, release);
    let joined = [a, b, c].map(|fetched| fetched.expect("fetches").joined);
    assert_eq!(joined.iter().filter(|joined| **joined).count(), 2);
    assert_eq!(holder.streams.load(Ordering::Relaxed), 1);
    assert_eq!(asker.data.stats().payload_received, size);
    assert!(lock(&asker.data.shared.transfers).is_empty());
}

#[tokio::test]
async fn one_bad_holder_does_not_hold_up_those_who_know_a_good_one() {
    let (holder, asker) = (Node::new(1), Node::new(2));
    let bytes = content(2 * G);
    let (root, size) = holder.import(&bytes);
    let go = Arc::new(Notify::new());
    let ready = go.clone();
    let liar = Liar::sending(7, Response::Ready { size }, vec![], move |mut send| {
        let ready = ready.clone();
        async move {
            ready.notified().await;
            let _ = send.write_all(&[0; 3 * G]).await;
        }
    });
    let bad = liar.feed(&asker, root, size);
    let good = async {
        until("the bad one is asked", || liar.streams.load(Ordering::Relaxed) == 1).await;
        // It keeps silent all the while: what it was asked for is taken over.
        let good = asker.fetch_from(&holder, (root, size)).await;
        go.notify_one();
        good
    };
    let (bad, good) = tokio::join!(bad, good);
    // Both have the payload: they share the transfer, and who they know.
    assert!(!bad.expect("fetches").joined);
    let good = good.expect("fetches");
    assert_eq!((good.joined, good.bytes, good.holders.len()), (true, size, 1));
}

/// A relay's transfer goes on as long as it is let: what it has is passed on meanwhile.
#[tokio::test]
async fn what_is_here_is_passed_on_while_the_rest_arrives() {
    let bytes = content(30 * G + 5);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    // It sends the first half of whatever it is asked for, and then waits.
    let go = Arc::new(Notify::new());
    let (ready, all) = (go.clone(), bytes.clone());
    let origin = Liar::new(7, move |mut send, mut recv| {
        let (go, bytes) = (ready.clone(), all.clone());
        async move {
            let frame = read_frame(&mut recv, MAX_REQUEST).await.expect("a request");
            let Ok(Request::Get(get)) = Request::decode(&frame) else { return };
            let ready = Response::Ready { size: bytes.len() as u64 }.encode().expect("encodes");
            send.write_all(&ready).await.expect("sends");
            let ranges = chunk_ranges(&get.ranges, bytes.len() as u64);
            let body = encoded(&bytes, &ranges);
            let _ = send.write_all(&body[..body.len() / 2]).await;
            go.notified().await;
            go.notify_one();
            let _ = send.write_all(&body[body.len() / 2..]).await;
            let _ = send.finish();
            let _ = recv.read_to_end(10).await;
        }
    });
    let (relay, asker) = (Node::new(1), Node::new(2));
    let first = origin.feed(&relay, root, size);
    let second = async {
        until("some of it is there", || relay.data.stats().payload_received > 0).await;
        // It is not said to have all of it: it is asked.
        let part = Holder { whole: false, ..relay.holder() };
        let fetching = asker.data.fetch(vec![part], root, size, |_| {});
        let release = async {
            until("it is passed on", || asker.data.stats().payload_received > 0).await;
            assert_eq!(relay.store.has(root), None);
            go.notify_one();
        };
        tokio::join!(fetching, release).0
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!(first.expect("fetches").bytes, size);
    let second = second.expect("fetches from the one that fetches");
    assert_eq!((second.bytes, second.holders.len()), (size, 1));
    asker.store.verify(root).expect("it is whole");
    assert_eq!(relay.data.stats().payload_sent, size);
}

#[tokio::test]
async fn a_payload_comes_from_all_who_hold_it_and_a_bad_one_is_dropped() {
    let bytes = content(64 * G + 1);
    let holders: Vec<Node> = (1..=4).map(Node::new).collect();
    let mut wanted = (Root::of(&bytes), 0);
    for holder in &holders {
        wanted = holder.import(&bytes);
    }
    // One of them has a bad disk: every piece of 2 MiB has a flipped bit.
    let bad = &holders[2];
    for piece in 0..8 {
        bad.flip(wanted.0, "data", piece * 8 * GROUP_BYTES + 77);
    }
    bad.flip(wanted.0, "data", 64 * GROUP_BYTES);
    let asker = Node::new(9);
    let known: Vec<_> = holders.iter().map(Node::holder).collect();
    let stats = asker.data.fetch(known, wanted.0, wanted.1, |_| {}).await.expect("fetches");
    asker.store.verify(wanted.0).expect("it is whole");
    assert_eq!((stats.holders.len(), asker.data.stats().bad_holders), (3, 1), "{stats:?}");
    let sent: Vec<_> = holders.iter().map(|holder| holder.data.stats().payload_sent).collect();
    assert!(sent.iter().all(|sent| *sent > 0 && *sent < wanted.1), "{sent:?}");
    until("the bad one looks at its own", || bad.store.has(wanted.0).is_none()).await;
}

#[tokio::test]
async fn hosts_that_want_the_same_feed_each_other() {
    let bytes = content(80 * G);
    let origin = Node::new(1);
    let (root, size) = origin.import(&bytes);
    let hosts: Vec<Node> = (2..6).map(Node::new).collect();
    let known: Vec<Holder> = hosts.iter().map(Node::holder).collect();
    let fetches = hosts.iter().map(|host| {
        let others = known.iter().map(|other| Holder { whole: false, ..other.clone() });
        let holders = std::iter::once(origin.holder()).chain(others).collect();
        host.data.fetch(holders, root, size, |_| {})
    });
    for fetched in futures::future::join_all(fetches).await {
        fetched.expect("fetches");
    }
    for host in &hosts {
        host.store.verify(root).expect("it is whole");
    }
    let passed_on: u64 = hosts.iter().map(|host| host.data.stats().payload_sent).sum();
    assert!(passed_on > 0, "none passed anything on");
}

/// The one holder goes away half-way and comes back at the same address.
#[tokio::test]
async fn a_holder_that_restarts_is_waited_for() {
    let bytes = content(64 * G);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    let holder = Node::new(1);
    holder.import(&bytes);
    let address = holder.data.local_addr();
    let quick = |config: &mut DataConfig| config.handshake_timeout = Duration::from_millis(200);
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let asker = Node::with(2, quick, limits, Arc::new(|_| true));
    let fetching = asker.data.fetch(vec![holder.holder()], root, size, |_| {});
    let restarting = async {
        until("some of it is there", || asker.data.stats().payload_received > 0).await;
        let Node { data, store, dir, .. } = holder;
        data.close().await;
        drop((data, store));
        Node::start(dir, 1, |config| config.listen = address, limits, Arc::new(|_| true))
    };
    let (fetched, _holder) = tokio::join!(fetching, restarting);
    assert_eq!(fetched.expect("fetches").bytes, size);
    asker.store.verify(root).expect("it is whole");
}

/// Two that each wait for the other to get what both lack do not wait for ever, nor does one that
/// nobody knows a holder for.
#[tokio::test]
async fn who_has_no_holder_is_told_so() {
    let asker = Node::new(2);
    let (root, size) = (Root::of(b"x"), 5);
    for holders in [vec![], vec![asker.holder()]] {
        let fetched = asker.data.fetch(holders, root, size, |_| {}).await;
        assert!(matches!(fetched, Err(FetchError::NoHolder { .. })), "{fetched:?}");
    }
    // Two that know only each other hope for a while, and no longer.
    let impatient = |seed| {
        let limits = Limits { keep_free: 0, ..Limits::default() };
        let soon = |config: &mut DataConfig| config.hope = Duration::from_millis(300);
        Node::with(seed, soon, limits, Arc::new(|_| true))
    };
    let (one, two) = (impatient(4), impatient(5));
    let fetch = |of: &Node, from: &Node| {
        let (data, holder) = (of.data.clone(), Holder { whole: false, ..from.holder() });
        async move {
            loop {
                // The other one may not have begun.
                let fetched = data.fetch(vec![holder.clone()], root, size, |_| {}).await;
                if !matches!(fetched, Err(FetchError::NotHeld { .. })) {
                    return fetched;
                }
            }
        }
    };
    let (first, _) = (timeout(Duration::from_secs(60), fetch(&one, &two)), ());
    let second = timeout(Duration::from_secs(60), fetch(&two, &one));
    tokio::select! {
        ended = first => drop(ended.expect("it ends").expect_err("nobody has it")),
        ended = second => drop(ended.expect("it ends").expect_err("nobody has it")),
    }
    let other = Node::new(3);
    for whole in [true, false] {
        let holder = Holder { whole, ..other.holder() };
        let fetched = asker.data.fetch(vec![holder], root, size, |_| {}).await;
        assert!(matches!(fetched, Err(FetchError::NotHeld { .. })), "{fetched:?}");
    }
}

#[tokio::test]
async fn a_size_is_proven_or_not_believed() {
    let (holder, asker) = (Node::new(1), Node::new(2));
    for len in [0, 1, G - 1, G, G + 1, 3 * G, 9 * G + 7] {
        let (root, size) = holder.import(&content(len));
        let proven = asker.data.size_of(&holder.holder(), root).await;
        assert_eq!(proven.expect("is proven"), size);
    }
    let unknown = asker.data.size_of(&holder.holder(), Root::of(b"x")).await;
    assert!(matches!(unknown, Err(FetchError::NotHeld { .. })), "{unknown:?}");
    // One that says another size, and shows a part of the payload for it, or nothing, or too much.
    let bytes = content(3 * G);
    let root = Root::of(&bytes);
    let shown = |bytes: &[u8]| {
        let last = (bytes.len() as u64 - 1) / GROUP_BYTES * GROUP_BYTES;
        encoded(bytes, &chunk_ranges(&[last..bytes.len() as u64], bytes.len() as u64))
    };
    for (seed, size, body) in [
        (10, 2 * G as u64, shown(&bytes[..2 * G])),
        (11, 3 * G as u64 - 1, shown(&bytes)),
        (12, 3 * G as u64 + 1, shown(&bytes)),
        (13, 3 * G as u64, vec![]),
        (14, 3 * G as u64, vec![0; 2 * G]),
        (15, u64::MAX, shown(&bytes)),
    ] {
        let liar = Liar::new(seed, move |mut send, mut recv| {
            let body = body.clone();
            async move {
                let frame = read_frame(&mut recv, MAX_REQUEST).await.expect("a request");
                let response = match Request::decode(&frame).expect("decodes") {
                    Request::Get(_) => Response::Ready { size },
                    _ => Response::Refused(Refused {
                        why: Refusal::WrongSize,
                        figure: size,
                        detail: String::new(),
                    }),
                };
                send.write_all(&response.encode().expect("encodes")).await.expect("sends");
                if matches!(response, Response::Ready { .. }) {
                    let _ = send.write_all(&body).await;
                }
                let _ = send.finish();
                let _ = recv.read_to_end(10).await;
            }
        });
        let believed = asker.data.size_of(&liar.holder(), root).await;
        assert!(matches!(believed, Err(FetchError::Corrupt { .. })), "{seed}: {believed:?}");
    }
    let honest = asker.data.size_of(&holder.holder(), root).await;
    assert_eq!(honest.expect("is proven"), 3 * GROUP_BYTES);
}

#[tokio::test]
async fn rubbish_about_what_is_there_is_not_believed() {
    let bytes = content(4 * G);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    let honest = Node::new(1);
    honest.import(&bytes);
    let runs = |runs: &[(u32, u32)]| {
        let body: Vec<u8> =
            runs.iter().flat_map(|(a, b)| [a.to_le_bytes(), b.to_le_bytes()]).flatten().collect();
        [(body.len() as u32).to_le_bytes().to_vec(), body].concat()
    };
    for (seed, told) in [
        (10, runs(&[(0, 5)])),
        (11, runs(&[(3, 3)])),
        (12, runs(&[])),
        (13, vec![255; 4]),
        (14, vec![3, 0, 0, 0, 1, 2, 3]),
        // Well formed, and a lie: it is asked, and what it sends then is none of the payload.
        (15, runs(&[(0, 4)])),
    ] {
        let liar = Liar::sending(seed, Response::Ready { size }, told, |_| async {});
        let holder = Holder { whole: false, ..liar.holder() };
        let asker = Node::with(
            2,
            |config| config.stall = Duration::from_millis(300),
            Limits { keep_free: 0, ..Limits::default() },
            Arc::new(|_| true),
        );
        let fetched = asker.data.fetch(vec![holder.clone()], root, size, |_| {}).await;
        assert!(fetched.is_err(), "{seed}: {fetched:?}");
        let both = vec![holder, honest.holder()];
        asker.data.fetch(both, root, size, |_| {}).await.expect("the honest one has it");
    }
}

#[tokio::test]
async fn a_fetch_that_nobody_waits_for_is_given_up() {
    let asker = Node::new(2);
    let bytes = content(2 * G);
    let (root, size) = (Root::of(&bytes), bytes.len() as u64);
    let stopped = Arc::new(AtomicBool::new(false));
    let told = stopped.clone();
    let liar = Liar::sending(7, Response::Ready { size }, vec![], move |send| {
        let told = told.clone();
        async move {
            let _ = send.stopped().await;
            told.store(true, Ordering::SeqCst);
        }
    });
    let fetching = timeout(Duration::from_secs(3600), liar.feed(&asker, root, size));
    let mut fetching = Box::pin(fetching);
    until_polled(&mut fetching, || liar.streams.load(Ordering::Relaxed) == 1).await;
    drop(fetching);
    until("the holder is told", || stopped.load(Ordering::SeqCst)).await;
    until("nothing is left", || {
        asker.partial_files() == 0
            && asker.store.stats().reserved == 0
            && lock(&asker.data.shared.transfers).is_empty()
    })
    .await;
}

/// Drives `future` until `done`; it must not end before.
async fn until_polled(future: &mut (impl Future + Unpin), done: impl Fn() -> bool) {
    tokio::select! {
        _ = future => panic!("it ended"),
        () = until("it gets there", done) => {}
    }
}

#[tokio::test]
async fn no_room_is_said_before_anything_is_asked() {
    let limits = Limits { quota: 1000, keep_free: 0, ..Limits::default() };
    let (holder, asker) = (Node::new(1), Node::with(2, |_| {}, limits, Arc::new(|_| true)));
    let fetched = asker.fetch_from(&holder, holder.import(&content(1001))).await;
    assert!(matches!(store_error(&fetched), Some(PayloadError::NoSpace { .. })), "{fetched:?}");
    assert_eq!(holder.data.stats().accepted, 0);
    asker.fetch_from(&holder, holder.import(&content(1000))).await.expect("just fits");
}

#[tokio::test]
async fn connections_of_one_key_are_bounded() {
    let node = Node::new(1);
    let allowed = DataConfig::new(loopback()).max_connections_per_key;
    let mut open = Vec::new();
    for _ in 0..allowed {
        open.push(connect(9, &node).await);
    }
    until("all are taken up", || node.data.stats().serving == allowed).await;
    // One more takes the place of the oldest.
    let one_more = connect(9, &node).await;
    let closed = open.remove(0).closed().await;
    assert!(
        matches!(
            &closed,
            quinn::ConnectionError::ApplicationClosed(c)
                if c.error_code == VarInt::from_u32(Code::TooMany as u32)
        ),
        "{closed:?}"
    );
    // Another key still gets in, and a place that is given up is free again.
    let other = connect(10, &node).await;
    until("another key is taken up", || node.data.stats().serving == allowed + 1).await;
    drop(other);
    open.pop();
    until("places are free again", || node.data.stats().serving < allowed).await;
    open.push(connect(9, &node).await);
    open.push(one_more);
    until("all are taken up", || node.data.stats().serving == allowed).await;
    assert_eq!(node.data.stats().too_many, 1);

    node.data.disconnect(Identity::new([9; 32]).expect("an identity").public);
    for connection in open {
        assert!(matches!(connection.closed().await, quinn::ConnectionError::ApplicationClosed(_)));
    }
}

#[tokio::test]
async fn the_first_address_that_answers_wins() {
    let (holder, asker) = (Node::new(1), Node::new(2));
    let (root, size) = holder.import(&content(100));
    // Bound and never answered.
    let deaf = std::net::UdpSocket::bind(loopback()).expect("binds");
    let addresses = vec![deaf.local_addr().expect("an address"), holder.data.local_addr()];
    let elsewhere = Holder { addresses, ..holder.holder() };
    asker.data.fetch(vec![elsewhere], root, size, |_| {}).await.expect("fetches");

    let limits = Limits { keep_free: 0, ..Limits::default() };
    let quick = |config: &mut DataConfig| config.handshake_timeout = Duration::from_millis(100);
    let hasty = Node::with(3, quick, limits, Arc::new(|_| true));
    let nowhere = vec![deaf.local_addr().expect("an address")];
    for addresses in [nowhere, vec![]] {
        let elsewhere = Holder { addresses, ..holder.holder() };
        let fetched = hasty.data.fetch(vec![elsewhere], root, size, |_| {}).await;
        assert!(
            matches!(fetched, Err(FetchError::Link(LinkError::Unreachable { .. }))),
            "{fetched:?}"
        );
    }
}

/// A holder is killed and comes back at the same address: the asker's old connection is told by
/// a stateless reset, and the next request is asked again on a new one, at once.
#[tokio::test]
async fn a_restarted_peer_is_found_at_once() {
    let (first, second) = (Node::new(1), Node::new(1));
    let slow = |config: &mut DataConfig| {
        // Only the reset can end the connection in time.
        config.idle_timeout = Duration::from_secs(3600);
        config.stall = Duration::from_secs(3600);
    };
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let asker = Node::with(2, slow, limits, Arc::new(|_| true));

    // A relay stands for the address that both runs of the holder have.
    let relay = tokio::net::UdpSocket::bind(loopback()).await.expect("binds");
    let address = relay.local_addr().expect("an address");
    let (runs, killed) =
        ([first.data.local_addr(), second.data.local_addr()], AtomicBool::new(false));
    let killed = Arc::new(killed);
    let (asked, dead) = (asker.data.local_addr(), killed.clone());
    let relaying = tokio::spawn(async move {
        let mut packet = vec![0; 65536];
        while let Ok((len, from)) = relay.recv_from(&mut packet).await {
            let run = runs[usize::from(dead.load(Ordering::SeqCst))];
            if from == asked {
                let _ = relay.send_to(&packet[..len], run).await;
            } else if from == run {
                let _ = relay.send_to(&packet[..len], asked).await;
            }
        }
    });
    let relayed = Holder { addresses: vec![address], ..first.holder() };
    let fetch = |(root, size)| asker.data.fetch(vec![relayed.clone()], root, size, |_| {});
    fetch(first.import(&content(100))).await.expect("fetches from the first run");
    killed.store(true, Ordering::SeqCst);
    let wanted = second.import(&content(2 * G));
    fetch(wanted).await.expect("fetches from the second run");
    assert_eq!(second.data.stats().accepted, 1);
    relaying.abort();
}

#[tokio::test]
async fn closing_frees_the_port_and_ends_what_waits() {
    let (holder, asker) = (Node::new(1), Node::new(2));
    let address = holder.data.local_addr();
    let wanted = holder.import(&content(10));
    asker.fetch_from(&holder, wanted).await.expect("fetches");
    let silent = Liar::new(7, |send, _recv| async move {
        let _ = send.stopped().await;
    });
    let waiting = silent.feed(&asker, Root::of(b"x"), 1);
    let closing = async {
        until("it is asked", || silent.streams.load(Ordering::Relaxed) == 1).await;
        asker.data.close().await;
    };
    let (waited, ()) = tokio::join!(waiting, closing);
    assert!(matches!(waited, Err(FetchError::Link(_))), "{waited:?}");
    let fetched = asker.fetch_from(&holder, (Root::of(b"y"), 1)).await;
    assert!(matches!(fetched, Err(FetchError::Link(LinkError::Closed))), "{fetched:?}");

    let taken =
        Data::start(DataConfig::new(address), [1; 32], holder.store.clone(), Arc::new(|_| true));
    assert!(matches!(taken, Err(StartError::Listen { address: a, .. }) if a == address));
    holder.data.close().await;
    let again =
        Data::start(DataConfig::new(address), [1; 32], holder.store.clone(), Arc::new(|_| true));
    let (again, _arrivals) = again.expect("the port is free");
    assert_eq!(again.local_addr(), address);
}

#[tokio::test]
async fn under_many_handshakes_an_address_is_proven_first_and_then_none_is_taken() {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let wary = Node::with(1, |config| config.retry_above = 0, limits, Arc::new(|_| true));
    let asker = Node::new(2);
    let (root, size) = wary.import(&content(G + 1));
    asker.fetch_from(&wary, (root, size)).await.expect("proves its address and fetches");

    let full = Node::with(3, |config| config.max_handshakes = 0, limits, Arc::new(|_| true));
    let quick = |config: &mut DataConfig| config.handshake_timeout = Duration::from_millis(200);
    let hasty = Node::with(4, quick, limits, Arc::new(|_| true));
    let fetched = hasty.fetch_from(&full, full.import(&content(1))).await;
    assert!(matches!(fetched, Err(FetchError::Link(LinkError::Unreachable { .. }))), "{fetched:?}");
    assert_eq!(full.data.stats().accepted, 0);
}

#[tokio::test]
async fn dialed_connections_are_bounded_and_idle_ones_make_room() {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let (first, mut second) = (Node::new(1), Node::new(2));
    let asker = Node::with(3, |config| config.max_dialed = 1, limits, Arc::new(|_| true));
    asker.fetch_from(&first, first.import(&content(10))).await.expect("fetches");
    // Nobody uses the first connection any more: it makes room.
    let opening = asker.data.open(second.key(), second.addresses(), 5, vec![]);
    let accepting = async { second.arrivals.recv().await.expect("arrives").accept().await };
    let (opened, accepted) = tokio::join!(opening, accepting);
    let (opened, _accepted) = (opened.expect("opens"), accepted.expect("accepts"));
    until("the first is closed", || first.data.stats().serving == 0).await;
    // The second is in use as long as a half of its stream is held.
    let fetched = asker.fetch_from(&first, first.import(&content(11))).await;
    assert!(matches!(fetched, Err(FetchError::Link(LinkError::Busy(1)))), "{fetched:?}");
    drop(opened);
    asker.fetch_from(&first, first.import(&content(11))).await.expect("has room again");

    let brief = |config: &mut DataConfig| config.idle_close = Duration::from_millis(40);
    let asker = Node::with(4, brief, limits, Arc::new(|_| true));
    asker.fetch_from(&first, first.import(&content(12))).await.expect("fetches");
    until("it is closed as idle", || asker.data.stats().dialed == 0).await;
    asker.fetch_from(&first, first.import(&content(13))).await.expect("dials again");
}

/// What the node awaits can move between its threads.
#[tokio::test]
async fn its_futures_are_send() {
    fn is_send<T: Send>(future: T) -> T {
        future
    }
    let node = Node::new(1);
    drop(is_send(node.data.fetch(vec![], Root::of(b""), 0, |_| {})));
    drop(is_send(node.data.open([0; 32], vec![], 0, vec![])));
    drop(is_send(node.data.close()));
    drop(is_send(node.store.import_stream(&b""[..], Declared::AtMost(0))));
}

#[tokio::test]
async fn what_a_node_wants_delivered_does_not_wait_for_strangers() {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let slow = |config: &mut DataConfig| {
        config.max_serving = 4;
        config.upload_rate = Some(300_000);
    };
    let holder = Node::with(1, slow, limits, Arc::new(|_| true));
    let (stranger, lessor) = (Node::new(2), Node::new(3));
    let own = holder.import(&content(60_000));
    holder.data.put_first(HashSet::from([own.0]));
    // They would take twenty seconds, and all the places that there are for such.
    let theirs: Vec<_> = (0..3).map(|n| holder.import(&content(2_000_000 + n))).collect();
    let fetches = theirs.iter().map(|wanted| stranger.fetch_from(&holder, *wanted));
    let strangers = futures::future::join_all(fetches);
    let delivered = async {
        until("they are served", || holder.data.stats().payload_sent > 0).await;
        lessor.fetch_from(&holder, own).await
    };
    tokio::select! {
        _ = strangers => panic!("strangers come first"),
        delivered = delivered => assert_eq!(delivered.expect("comes").bytes, own.1),
    }
}
