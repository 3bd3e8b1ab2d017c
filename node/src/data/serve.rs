//! The answering side: who may connect, and what a stream is answered with.
//!
//! ```text
//! Initial packet ── too many handshakes ──> refused        (above a threshold: Retry first,
//!       │                                                   so that the address is proven)
//!   handshake ───── slow, no sound certificate ──> dropped
//!       │ key proven
//!   admission ───── not admitted, too many in all ──> closed with a code; too many of this key:
//!       │                                              its oldest is
//!       │
//!    streams ────── asked again for every stream: who is not admitted any more is closed
//!     │    └─ Open ──> Arriving, to the node, which accepts or refuses it
//!     ├─ Have ──> Ready, what is here, and more as it comes
//!     └─ Get ──> Ready, the tree and the groups, then the asker's verdict
//! ```
//!
//! Groups are sent as they lie on disk. The asker verifies every one, and where one is wrong it
//! says so by resetting its side of the stream; then, or when a read fails here, the payload is
//! verified here and set aside if it is bad, so that a holder with a rotten disk stops being one.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bao_tree::{
    ChunkNum, ChunkRanges,
    io::{EncodeError, fsm, outboard::PreOrderOutboard},
};
use bytes::{Bytes, BytesMut};
use iroh_io::{AsyncSliceReader, AsyncStreamWriter};
use quinn::{ReadError, WriteError};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
    task::spawn_blocking,
    time::{Instant, timeout},
};
use tracing::{debug, warn};

use super::{
    Shared,
    buffers::Buffers,
    dial::close,
    frame::{Code, Get, MAX_REQUEST, Open, Refusal, Refused, Request, Response},
    have, lock, name,
    stream::{FrameReadError, Pace, RecvHalf, SendHalf, Stalled, read_frame},
    throttle::Throttle,
    tls::peer_key,
};
use crate::payload::{Payload, PayloadError, Root};

/// How many groups are handed to the network together, and how many such hand-overs are read ahead.
const TOGETHER: usize = 4;
const READ_AHEAD: usize = 2;

/// A payload that a receiver complained of is not verified again within this time.
const TRUST: Duration = Duration::from_secs(600);

/// A stream that a peer opened to something that is not a payload. Dropped unanswered, it is
/// refused as unsupported.
#[derive(Debug)]
pub struct Arriving {
    /// The proven key of the peer.
    pub peer: [u8; 32],
    /// What kind of stream it asks for.
    pub channel: u8,
    /// What it says about it: at most [`MAX_BODY`](super::frame::MAX_BODY) bytes, as the peer
    /// sent them.
    pub body: Vec<u8>,
    halves: Option<(SendHalf, RecvHalf)>,
}

impl Arriving {
    /// Takes the stream. Fails where the peer is gone.
    pub async fn accept(mut self) -> io::Result<(SendHalf, RecvHalf)> {
        let Some((mut send, recv)) = self.halves.take() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let ready = Response::Ready { size: 0 }.encode().map_err(io::Error::other)?;
        send.stream.write_all(&ready).await?;
        Ok((send, recv))
    }

    /// Refuses the stream; `detail` is for a person at the other end.
    pub fn refuse(mut self, why: Refusal, detail: &str) {
        self.refuse_now(why, detail);
    }

    fn refuse_now(&mut self, why: Refusal, detail: &str) {
        let Some((mut send, mut recv)) = self.halves.take() else { return };
        let refused = Refused { why, figure: 0, detail: detail.to_owned() };
        let Ok(frame) = Response::Refused(refused).encode() else { return };
        recv.stop(Code::Done);
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let _ = timeout(Duration::from_secs(5), send.stream.write_all(&frame)).await;
                send.finish();
            });
        }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.refuse_now(Refusal::Unsupported, "");
    }
}

/// The connections that others made, by key.
#[derive(Debug, Default)]
pub(super) struct Served {
    by_key: HashMap<[u8; 32], Vec<quinn::Connection>>,
}

impl Served {
    pub(super) fn len(&self) -> usize {
        self.by_key.values().map(Vec::len).sum()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &quinn::Connection> {
        self.by_key.values().flatten()
    }

    pub(super) fn of(&self, peer: &[u8; 32]) -> &[quinn::Connection] {
        self.by_key.get(peer).map(Vec::as_slice).unwrap_or_default()
    }
}

/// A connection's place in [`Served`], given up when dropped.
struct Place<'a> {
    shared: &'a Shared,
    peer: [u8; 32],
    id: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut served = lock(&self.shared.served);
        if let Some(connections) = served.by_key.get_mut(&self.peer) {
            connections.retain(|c| c.stable_id() != self.id);
            if connections.is_empty() {
                served.by_key.remove(&self.peer);
            }
        }
        drop(served);
        self.shared.share_windows();
    }
}

/// One more in a count, for as long as this lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one_more(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes up connections until the endpoint closes.
pub(super) async fn accept(shared: Arc<Shared>, endpoint: quinn::Endpoint) {
    let handshaking = Arc::new(AtomicUsize::new(0));
    while let Some(incoming) = endpoint.accept().await {
        let pending = handshaking.load(Ordering::Relaxed);
        if pending >= shared.config.max_handshakes {
            shared.counters.handshakes_failed.add(1);
            incoming.refuse();
        } else if pending >= shared.config.retry_above && !incoming.remote_address_validated() {
            // Cannot fail: an address that is not validated may be asked to retry.
            let _ = incoming.retry();
        } else {
            let in_handshake = Counted::one_more(&handshaking);
            tokio::spawn(serve_connection(shared.clone(), incoming, in_handshake));
        }
    }
}

async fn serve_connection(shared: Arc<Shared>, incoming: quinn::Incoming, handshake: Counted) {
    let from = incoming.remote_address();
    let connected = match incoming.accept() {
        Ok(connecting) => timeout(shared.config.handshake_timeout, connecting).await,
        Err(e) => Ok(Err(e)),
    };
    drop(handshake);
    let connection = match connected {
        Ok(Ok(connection)) => connection,
        failed => {
            shared.counters.handshakes_failed.add(1);
            let reason = failed.map_or("too slow".to_owned(), |e| format!("{:?}", e.err()));
            debug!(%from, reason, "handshake failed");
            return;
        }
    };
    let Some(peer) = peer_key(&connection) else {
        // The verifier has seen the certificate; without a key there was none.
        shared.counters.handshakes_failed.add(1);
        return close(&connection, Code::NotAdmitted);
    };
    if !(shared.admit)(peer) {
        debug!(%from, peer = %name(&peer), "not admitted");
        shared.counters.not_admitted.add(1);
        return close(&connection, Code::NotAdmitted);
    }
    let Some(place) = take_place(&shared, peer, &connection) else {
        debug!(%from, peer = %name(&peer), "too many connections");
        shared.counters.too_many.add(1);
        return close(&connection, Code::TooMany);
    };
    shared.counters.accepted.add(1);
    shared.share_windows();
    debug!(%from, peer = %name(&peer), "connected");
    // QUIC bounds the streams that are open; this bounds the work behind them, which can outlive
    // its stream for a moment.
    let room = Arc::new(Semaphore::new(shared.config.max_streams as usize));
    while let Ok(permit) = room.clone().acquire_owned().await {
        let Ok((send, recv)) = connection.accept_bi().await else { break };
        if !(shared.admit)(peer) {
            shared.counters.not_admitted.add(1);
            close(&connection, Code::NotAdmitted);
            break;
        }
        let shared = shared.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let halves = (SendHalf::new(send, None), RecvHalf::new(recv, None));
            serve_stream(shared, peer, halves).await;
        });
    }
    drop(place);
}

fn take_place<'a>(
    shared: &'a Shared,
    peer: [u8; 32],
    connection: &quinn::Connection,
) -> Option<Place<'a>> {
    let mut served = lock(&shared.served);
    // Of one key the newest count: those before are most likely of a process that is no more, which
    // shows only after a while.
    let own = served.of(&peer);
    let oldest = own.first().filter(|_| own.len() >= shared.config.max_connections_per_key);
    if let Some(oldest) = oldest.cloned() {
        shared.counters.too_many.add(1);
        close(&oldest, Code::TooMany);
        served.by_key.entry(peer).or_default().retain(|c| c.stable_id() != oldest.stable_id());
    }
    if served.len() >= shared.config.max_connections {
        return None;
    }
    served.by_key.entry(peer).or_default().push(connection.clone());
    Some(Place { shared, peer, id: connection.stable_id() })
}

async fn serve_stream(shared: Arc<Shared>, peer: [u8; 32], halves: (SendHalf, RecvHalf)) {
    let (mut send, mut recv) = halves;
    shared.counters.streams.add(1);
    let reading = read_frame(&mut recv.stream, MAX_REQUEST);
    let request = match timeout(shared.config.request_timeout, reading).await {
        Ok(Ok(frame)) => Request::decode(&frame),
        Ok(Err(FrameReadError::Frame(e))) => Err(e),
        Ok(Err(e)) => {
            debug!(peer = %name(&peer), error = %e, "a stream ended before its request");
            return send.reset(Code::Malformed);
        }
        Err(_) => {
            recv.stop(Code::Stalled);
            return send.reset(Code::Stalled);
        }
    };
    match request {
        Ok(Request::Get(get)) => serve_get(&shared, peer, get, send, recv).await,
        Ok(Request::Have(have)) => have::serve(&shared, peer, have, send, recv).await,
        Ok(Request::Open(Open { channel, body })) => {
            let arriving = Arriving { peer, channel, body, halves: Some((send, recv)) };
            match shared.arriving.try_send(arriving) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(arriving)) => {
                    arriving.refuse(Refusal::Busy, "too many streams wait to be taken up");
                }
                Err(mpsc::error::TrySendError::Closed(arriving)) => {
                    arriving.refuse(Refusal::Unsupported, "");
                }
            }
        }
        Err(e) => {
            debug!(peer = %name(&peer), error = %e, "malformed request");
            recv.stop(Code::Malformed);
            refuse(&shared, &mut send, Refusal::BadRequest, 0, &e.to_string()).await;
        }
    }
}

pub(super) async fn refuse(
    shared: &Shared,
    send: &mut SendHalf,
    why: Refusal,
    figure: u64,
    detail: &str,
) {
    let refused = Response::Refused(Refused { why, figure, detail: detail.to_owned() });
    if let Ok(frame) = refused.encode() {
        let _ = timeout(shared.config.stall, send.stream.write_all(&frame)).await;
        send.finish();
    }
}

/// How a `Get` ended early.
pub(super) enum Broken {
    /// The asker found bytes that do not match the root.
    Complaint,
    /// The asker does not want the rest, or its connection is gone.
    Unwanted,
    /// The asker sends where it should only listen.
    Malformed,
    Stalled,
    /// Reading here failed.
    Unreadable,
}

impl From<Stalled> for Broken {
    fn from(_: Stalled) -> Self {
        Self::Stalled
    }
}

async fn serve_get(
    shared: &Arc<Shared>,
    peer: [u8; 32],
    get: Get,
    mut send: SendHalf,
    mut recv: RecvHalf,
) {
    let Get { root, size, ranges } = get;
    let own = lock(&shared.own).contains(&root);
    let mut places = vec![shared.serving_each.of(&peer), shared.serving.clone()];
    if !own {
        places.push(shared.serving_others.clone());
    }
    let places = places.into_iter().map(Semaphore::try_acquire_owned);
    let Ok(places) = places.collect::<Result<Vec<_>, _>>() else {
        return refuse(shared, &mut send, Refusal::Busy, 0, "too many payloads are on their way")
            .await;
    };
    if shared.store.is_private(root) {
        return refuse(shared, &mut send, Refusal::NotHeld, 0, "").await;
    }
    let (store, wanted) = (shared.store.clone(), ranges.clone());
    let opened = spawn_blocking(move || match store.open(root) {
        // What of it is here already may be had while the rest arrives; once more for what was held
        // in between.
        Err(PayloadError::NotHeld(_)) => {
            store.open_part(root, size, &wanted).or_else(|_| store.open(root))
        }
        opened => opened,
    });
    let payload = match opened.await {
        Ok(Ok(payload)) if payload.size() == size => payload,
        Ok(Ok(payload)) => {
            let held = payload.size();
            return refuse(shared, &mut send, Refusal::WrongSize, held, "").await;
        }
        Ok(Err(PayloadError::NotHeld(_))) => {
            return refuse(shared, &mut send, Refusal::NotHeld, 0, "").await;
        }
        Ok(Err(e)) => {
            warn!(%root, error = %e, "cannot open a payload to serve it");
            return refuse(shared, &mut send, Refusal::Internal, 0, "").await;
        }
        Err(_) => return,
    };
    let sent = {
        let sending = send_payload(shared, payload, ranges, (peer, own), &mut send);
        // The verdict on what was sent may come before all is sent, if it is bad.
        tokio::select! {
            sent = sending => sent,
            broken = verdict(&mut recv) => Err(broken.err().unwrap_or(Broken::Unwanted)),
        }
    };
    drop(places);
    let ended = match sent {
        Ok(()) => {
            send.finish();
            let waiting = timeout(shared.config.stall, verdict(&mut recv)).await;
            waiting.unwrap_or(Err(Broken::Stalled))
        }
        broken => broken,
    };
    match ended {
        Ok(()) => {}
        Err(Broken::Complaint) => {
            warn!(%root, peer = %name(&peer), "a receiver complains of wrong bytes");
            send.reset(Code::Corrupt);
            examine(shared.clone(), root);
        }
        Err(Broken::Unreadable) => {
            send.reset(Code::Internal);
            examine(shared.clone(), root);
        }
        Err(Broken::Stalled) => send.reset(Code::Stalled),
        Err(Broken::Malformed) => {
            recv.stop(Code::Malformed);
            send.reset(Code::Malformed);
        }
        Err(Broken::Unwanted) => send.reset(Code::Cancelled),
    }
}

/// Waits for the asker's side of the stream to end: cleanly if all is well, by a reset if not.
pub(super) async fn verdict(recv: &mut RecvHalf) -> Result<(), Broken> {
    match recv.stream.read_chunk(1, true).await {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(Broken::Malformed),
        Err(ReadError::Reset(code)) if code.into_inner() == Code::Corrupt as u64 => {
            Err(Broken::Complaint)
        }
        Err(_) => Err(Broken::Unwanted),
    }
}

async fn send_payload(
    shared: &Shared,
    payload: Payload,
    ranges: Vec<Range<u64>>,
    (peer, own): ([u8; 32], bool),
    send: &mut SendHalf,
) -> Result<(), Broken> {
    let mut pace = Pace::new(shared.config.stall, shared.config.min_rate);
    let ready = Response::Ready { size: payload.size() }.encode();
    let ready = ready.map_err(|_| Broken::Unreadable)?;
    let mut header = [Bytes::from(ready)];
    write(send, &mut pace, &mut header).await?;

    let (pieces, mut read) = mpsc::channel(READ_AHEAD);
    let buffers = shared.reading.clone();
    let together = if shared.upload.is_on() { 1 } else { TOGETHER };
    let encoder = spawn_blocking(move || {
        let queue = Queue { pieces, pairs: BytesMut::new(), waiting: Vec::new(), together };
        let encoded = Handle::current().block_on(encode(&payload, &ranges, buffers, queue));
        encoded.map_err(|e| (payload.root(), e))
    });
    let mut next = Vec::new().into_iter();
    loop {
        let Some(Piece { pairs, group }) = next.next() else {
            match read.recv().await {
                Some(pieces) => next = pieces.into_iter(),
                None => break,
            }
            continue;
        };
        let bytes = group.len() as u64;
        if shared.upload.is_on() {
            write(send, &mut pace, &mut [pairs]).await?;
            for from in (0..group.len()).step_by(Throttle::SLICE) {
                let slice = group.slice(from..group.len().min(from + Throttle::SLICE));
                shared.upload.take(peer, own, slice.len()).await;
                write(send, &mut pace, &mut [slice]).await?;
            }
        } else {
            write(send, &mut pace, &mut [pairs, group]).await?;
        }
        shared.counters.payload_sent.add(bytes);
    }
    match encoder.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err((root, e))) => {
            warn!(%root, error = %e, "cannot read a payload to serve it");
            Err(Broken::Unreadable)
        }
        Err(_) => Err(Broken::Unreadable),
    }
}

async fn write(
    send: &mut SendHalf,
    pace: &mut Pace,
    mut pieces: &mut [Bytes],
) -> Result<(), Broken> {
    while !pieces.is_empty() {
        let written = match pace.during(send.stream.write_chunks(pieces)).await? {
            Ok(written) => written,
            Err(WriteError::Stopped(code)) if code.into_inner() == Code::Corrupt as u64 => {
                return Err(Broken::Complaint);
            }
            Err(_) => return Err(Broken::Unwanted),
        };
        pace.moved(written.bytes as u64);
        pieces = pieces.get_mut(written.chunks..).unwrap_or_default();
    }
    Ok(())
}

/// The ranges of a payload of `size` bytes in bao-tree's terms. None at all is all. What reaches to
/// the end has none: with one there bao-tree takes the last group for one that is asked for in part.
pub(crate) fn chunk_ranges(ranges: &[Range<u64>], size: u64) -> ChunkRanges {
    if ranges.is_empty() {
        return ChunkRanges::all();
    }
    ranges.iter().fold(ChunkRanges::empty(), |all, range| {
        let start = ChunkNum(range.start / 1024);
        all | if range.end >= size {
            ChunkRanges::from(start..)
        } else {
            ChunkRanges::from(start..ChunkNum(range.end.div_ceil(1024)))
        }
    })
}

/// A group and the hash pairs that come before it.
struct Piece {
    pairs: Bytes,
    group: Bytes,
}

/// Reads the tree and the groups, one after the other, into the queue.
async fn encode(
    payload: &Payload,
    ranges: &[Range<u64>],
    buffers: Buffers,
    mut queue: Queue,
) -> Result<(), EncodeError> {
    let root = payload.root().hash();
    let outboard = PreOrderOutboard { root, tree: payload.tree(), data: Pairs(payload) };
    let chunks = chunk_ranges(ranges, payload.size());
    let groups = Groups { payload, buffers };
    let encoded = fsm::encode_ranges(groups, outboard, &chunks, &mut queue).await;
    // What was read before something went wrong is good.
    let handed_over = queue.hand_over().await;
    encoded.and(handed_over.map_err(EncodeError::Io))
}

/// Reads groups. Blocks, and is only polled on a thread for that.
struct Groups<'a> {
    payload: &'a Payload,
    buffers: Buffers,
}

impl AsyncSliceReader for Groups<'_> {
    async fn read_at(&mut self, offset: u64, len: usize) -> io::Result<Bytes> {
        let mut group = self.buffers.filled(len);
        self.payload.read_exact_at(group.as_mut(), offset)?;
        Ok(group.freeze())
    }

    async fn size(&mut self) -> io::Result<u64> {
        Ok(self.payload.size())
    }
}

/// Reads hash pairs, likewise.
struct Pairs<'a>(&'a Payload);

impl AsyncSliceReader for Pairs<'_> {
    async fn read_at(&mut self, offset: u64, len: usize) -> io::Result<Bytes> {
        self.0.outboard_at(offset, len)
    }

    async fn size(&mut self) -> io::Result<u64> {
        Ok(self.0.tree().outboard_size())
    }
}

struct Queue {
    pieces: mpsc::Sender<Vec<Piece>>,
    pairs: BytesMut,
    /// What is not handed over yet, and how much is at a time: waking another thread costs as much as
    /// a good part of reading a group does.
    waiting: Vec<Piece>,
    together: usize,
}

impl Queue {
    async fn hand_over(&mut self) -> io::Result<()> {
        let pieces = std::mem::take(&mut self.waiting);
        if pieces.is_empty() {
            return Ok(());
        }
        // This kind is how bao-tree knows that the reader is gone, not the disk.
        self.pieces.send(pieces).await.map_err(|_| io::ErrorKind::ConnectionReset.into())
    }
}

impl AsyncStreamWriter for &mut Queue {
    /// Pairs wait for the group that they come before.
    async fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.pairs.extend_from_slice(data);
        Ok(())
    }

    async fn write_bytes(&mut self, group: Bytes) -> io::Result<()> {
        self.waiting.push(Piece { pairs: self.pairs.split().freeze(), group });
        if self.waiting.len() < self.together { Ok(()) } else { self.hand_over().await }
    }

    async fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Payloads that were verified after a complaint, and when.
pub(super) type Examined = HashMap<Root, Instant>;

/// Verifies a payload that is under suspicion: one at a time, and none twice within [`TRUST`], so
/// that complaints cannot be made a burden.
fn examine(shared: Arc<Shared>, root: Root) {
    let Ok(permit) = shared.examining.clone().try_acquire_owned() else { return };
    let now = Instant::now();
    let mut examined = lock(&shared.examined);
    examined.retain(|_, when| now.duration_since(*when) < TRUST);
    if examined.insert(root, now).is_some() {
        return;
    }
    drop(examined);
    spawn_blocking(move || {
        let _permit = permit;
        match shared.store.verify(root) {
            Ok(()) => debug!(%root, "a payload under suspicion is sound"),
            Err(e) => warn!(%root, error = %e, "a payload under suspicion"),
        }
    });
}
