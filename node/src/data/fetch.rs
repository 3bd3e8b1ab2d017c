//! The asking side: a payload from a holder to a verified file.
//!
//! ```text
//!   network                        data thread                       blocking thread
//! ┌─────────┐  packets  ┌───────────────────────────────┐ queue  ┌─────────────────────────┐
//! │ holder  │ ────────> │ pairs and one group, gathered │ ─────> │ verify, write, at the   │
//! └─────────┘           │ in one buffer; pace is kept   │  of 4  │ end sync and rename     │
//!                       └───────────────────────────────┘        └─────────────────────────┘
//! ```
//!
//! Root and size are the caller's, from an order or a signed index; the holder's word counts for
//! nothing. Every group is verified before it is written, so a wrong byte costs at most one group
//! and names the holder that sent it. What memory a transfer takes is the stream's window and the
//! queue, whatever the payload's size.
//!
//! What was verified stays when a transfer ends early, and the next one, from whomever, asks for the
//! rest ([`crate::payload`]).
//!
//! Those who want the same payload at the same time share one transfer; if it fails, each of the
//! others tries the holder that it named itself. A transfer that nobody waits for any more is
//! given up.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bao_tree::{
    BaoTree, ChunkRanges,
    io::{
        BaoContentItem, DecodeError,
        fsm::{ResponseDecoder, ResponseDecoderNext},
    },
    iter::{BaoChunk, ResponseIter},
};
use bytes::{Bytes, BytesMut};
use iroh_io::AsyncStreamReader;
use quinn::ReadError;
use thiserror::Error;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::spawn_blocking,
};
use tracing::{debug, warn};

use super::{
    Shared,
    dial::{Answered, LinkError, link_error},
    frame::{Code, Get, MAX_RANGES, Refusal, Refused, Request, Response},
    lock, name,
    serve::chunk_ranges,
    stream::{Pace, Stalled},
};
use crate::payload::{PayloadError, Receiving, Root};

/// How many gathered groups may wait to be verified and written.
const WRITE_BEHIND: usize = 4;

/// How many received segments are taken from a stream at once.
const SEGMENTS: usize = 64;

/// What a fetch took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchStats {
    /// Bytes of payload that came over the network: zero if it was held before.
    pub bytes: u64,
    /// From the request to the durable file.
    pub took: Duration,
    /// Whether this fetch waited for a transfer that another one had begun.
    pub joined: bool,
}

/// Why a payload did not come. What was verified of it is kept for another try.
#[derive(Debug, Clone, Error)]
pub enum FetchError {
    /// The holder could not be asked, or said no.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The holder does not have it.
    #[error("{} does not hold payload {root}", name(peer))]
    NotHeld {
        /// The holder that was asked.
        peer: [u8; 32],
        /// The payload.
        root: Root,
    },
    /// The holder's size is another than the one the caller knows.
    #[error("{} has payload {root} as {actual} bytes, not {expected}", name(peer))]
    WrongSize {
        /// The holder.
        peer: [u8; 32],
        /// The payload.
        root: Root,
        /// The size in bytes that the caller knows.
        expected: u64,
        /// The size in bytes that the holder says.
        actual: u64,
    },
    /// The holder sent bytes that do not match the root.
    #[error("{} sent wrong bytes for payload {root}, in the group at {offset}", name(peer))]
    Corrupt {
        /// The holder that sent them.
        peer: [u8; 32],
        /// The payload.
        root: Root,
        /// Where the group or the subtree begins, in bytes.
        offset: u64,
    },
    /// The holder ended the stream before the payload's end.
    #[error("{} ended payload {root} after {received} bytes of the transfer", name(peer))]
    Truncated {
        /// The holder.
        peer: [u8; 32],
        /// The payload.
        root: Root,
        /// Bytes that came, hash pairs included.
        received: u64,
    },
    /// The holder sent more than the payload.
    #[error("{} sent more than payload {root}", name(peer))]
    Trailing {
        /// The holder.
        peer: [u8; 32],
        /// The payload.
        root: Root,
    },
    /// The holder gave the transfer up.
    #[error(
        "{} gave up sending payload {root}: {}",
        name(peer), code.map_or("unknown code", Code::reason)
    )]
    GivenUp {
        /// The holder.
        peer: [u8; 32],
        /// The payload.
        root: Root,
        /// Its code, if it is a known one.
        code: Option<Code>,
    },
    /// The holder sent too little for too long.
    #[error("{} sends payload {root} too slowly: cut off after {received} bytes", name(peer))]
    Stalled {
        /// The holder.
        peer: [u8; 32],
        /// The payload.
        root: Root,
        /// Bytes that came, hash pairs included.
        received: u64,
    },
    /// Our own store cannot take it.
    #[error(transparent)]
    Store(Arc<PayloadError>),
}

impl FetchError {
    /// The holder to be held responsible, if it is one: it sent what it must not, or nothing.
    pub fn blames(&self) -> Option<[u8; 32]> {
        match self {
            Self::Corrupt { peer, .. }
            | Self::WrongSize { peer, .. }
            | Self::Truncated { peer, .. }
            | Self::Trailing { peer, .. }
            | Self::Stalled { peer, .. }
            | Self::Link(LinkError::Malformed { peer, .. }) => Some(*peer),
            Self::Link(_) | Self::NotHeld { .. } | Self::GivenUp { .. } | Self::Store(_) => None,
        }
    }
}

impl From<PayloadError> for FetchError {
    fn from(e: PayloadError) -> Self {
        Self::Store(Arc::new(e))
    }
}

/// Where a transfer is.
#[derive(Debug, Clone)]
pub(super) enum Transfer {
    /// So many bytes are verified.
    Moving(u64),
    Ended(Result<FetchStats, FetchError>),
}

/// The transfers under way. Two sizes of one root are two transfers: one of them is a lie, and
/// must not spoil the other. So are two holders: a slow one must not hold up who named a quick one.
pub(super) type Transfers = std::collections::HashMap<Key, watch::Sender<Transfer>>;

/// What is fetched from whom.
type Key = ([u8; 32], Root, u64);

/// What to fetch, and where.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) peer: [u8; 32],
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) root: Root,
    pub(super) size: u64,
}

/// Fetches `wanted`, or waits for whoever is fetching it. `progress` hears the verified bytes.
pub(super) async fn fetch(
    shared: &Arc<Shared>,
    runtime: &Handle,
    wanted: Wanted,
    mut progress: impl FnMut(u64),
) -> Result<FetchStats, FetchError> {
    loop {
        if let Some(actual) = shared.store.has(wanted.root) {
            let expected = wanted.size;
            if actual != expected {
                return Err(PayloadError::WrongSize { expected, actual }.into());
            }
            return Ok(FetchStats { bytes: 0, took: Duration::ZERO, joined: false });
        }
        let (mut transfer, joined) = join_or_begin(shared, runtime, &wanted);
        let ended = loop {
            // Cloned, so that a slow listener does not hold up the transfer.
            let state = transfer.borrow_and_update().clone();
            match state {
                Transfer::Moving(bytes) => progress(bytes),
                Transfer::Ended(ended) => break ended,
            }
            if transfer.changed().await.is_err() {
                break Err(LinkError::Closed.into());
            }
        };
        match ended {
            // Whose fault it was may be another holder's than the one named here.
            Err(e) if joined && !matches!(e, FetchError::Link(LinkError::Closed)) => {
                debug!(root = %wanted.root, error = %e, "the transfer that was joined failed");
            }
            ended => return ended.map(|stats| FetchStats { joined, ..stats }),
        }
    }
}

fn join_or_begin(
    shared: &Arc<Shared>,
    runtime: &Handle,
    wanted: &Wanted,
) -> (watch::Receiver<Transfer>, bool) {
    let key = (wanted.peer, wanted.root, wanted.size);
    let mut transfers = lock(&shared.transfers);
    if let Some(state) = transfers.get(&key) {
        return (state.subscribe(), true);
    }
    let (state, watching) = watch::channel(Transfer::Moving(0));
    transfers.insert(key, state.clone());
    drop(transfers);
    let entry = Entry { shared: shared.clone(), key, state: state.clone() };
    let wanted = wanted.clone();
    runtime.spawn(async move {
        let ended = tokio::select! {
            ended = transfer(&entry.shared, &wanted, &state) => ended,
            () = entry.abandoned() => return,
        };
        match &ended {
            Ok(stats) => {
                entry.shared.counters.fetched.add(1);
                debug!(root = %wanted.root, bytes = stats.bytes, took = ?stats.took, "fetched");
            }
            Err(e) => {
                entry.shared.counters.fetches_failed.add(1);
                warn!(root = %wanted.root, error = %e, "fetch failed");
            }
        }
        // Out of the list first: whoever comes now begins anew, or finds the payload held.
        drop(entry);
        state.send_replace(Transfer::Ended(ended));
    });
    (watching, false)
}

/// A transfer's place in the list, given up when dropped, by whatever end.
struct Entry {
    shared: Arc<Shared>,
    key: Key,
    state: watch::Sender<Transfer>,
}

impl Entry {
    /// Waits until nobody waits for the transfer any more, and takes it off the list.
    async fn abandoned(&self) {
        loop {
            self.state.closed().await;
            let mut transfers = lock(&self.shared.transfers);
            // Under the lock nobody joins.
            if self.state.receiver_count() == 0 {
                transfers.remove(&self.key);
                return;
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut transfers = lock(&self.shared.transfers);
        if transfers.get(&self.key).is_some_and(|state| state.same_channel(&self.state)) {
            transfers.remove(&self.key);
        }
    }
}

async fn transfer(
    shared: &Arc<Shared>,
    wanted: &Wanted,
    state: &watch::Sender<Transfer>,
) -> Result<FetchStats, FetchError> {
    let Wanted { peer, root, size, .. } = *wanted;
    let closed = |_| LinkError::Closed;
    let own = shared.fetching_each.of(&peer);
    let _own = own.acquire().await.map_err(closed)?;
    let _slot = shared.fetching.acquire().await.map_err(closed)?;
    let start = Instant::now();
    // Room first: nothing is asked for that could not be kept.
    let store = shared.store.clone();
    let receiving = spawn_blocking(move || store.receive(root, size)).await;
    let receiving = receiving.map_err(|_| LinkError::Closed)??;
    let ranges = wanted_of(&receiving);
    if ranges.as_ref().is_some_and(Vec::is_empty) {
        // All of it had come when the last transfer ended.
        let kept = spawn_blocking(move || receiving.keep()).await;
        kept.map_err(|_| LinkError::Closed)??;
        return Ok(FetchStats { bytes: 0, took: start.elapsed(), joined: false });
    }
    let ranges = ranges.unwrap_or_default();
    let bytes = if ranges.is_empty() { size } else { ranges.iter().map(|r| r.end - r.start).sum() };
    if !ranges.is_empty() {
        debug!(%root, bytes, of = size, "goes on with a payload");
    }

    let get = Request::Get(Get { root, size, ranges: ranges.clone() });
    let frame = get.encode().map_err(LinkError::Request)?;
    let asked = shared.request(peer, &wanted.addresses, &frame, true).await;
    let Answered { mut send, mut recv, response } = asked.map_err(|e| match e {
        LinkError::Reset { peer, code } => FetchError::GivenUp { peer, root, code },
        e => e.into(),
    })?;
    match response {
        Response::Ready { size: actual } if actual == size => {}
        Response::Ready { size: actual }
        | Response::Refused(Refused { why: Refusal::WrongSize, figure: actual, .. }) => {
            return Err(FetchError::WrongSize { peer, root, expected: size, actual });
        }
        Response::Refused(Refused { why: Refusal::NotHeld, .. }) => {
            return Err(FetchError::NotHeld { peer, root });
        }
        Response::Refused(refused) => return Err(LinkError::Refused { peer, refused }.into()),
    }

    let (groups, queue) = mpsc::channel(WRITE_BEHIND);
    let (tree, ranges) = (receiving.tree(), chunk_ranges(&ranges, size));
    let (verifier, progress) = (shared.clone(), state.clone());
    let verified_ranges = ranges.clone();
    let mut verified = spawn_blocking(move || {
        let verifying = verify(&verifier, receiving, verified_ranges, queue, progress);
        Handle::current().block_on(verifying)
    });
    let mut gather = Gather {
        stream: &mut recv.stream,
        segments: VecDeque::new(),
        staged: 0,
        received: 0,
        pace: Pace::new(shared.config.stall, shared.config.min_rate),
    };
    // The verifier ends first where it finds a wrong byte or the disk fails: then its reason
    // counts, and waiting for more of the stream would be waiting for nothing.
    let (gathered, verified) = tokio::select! {
        biased;
        verified = &mut verified => (Ok(()), verified),
        gathered = gather.all(tree, ranges, groups) => (gathered, verified.await),
    };
    let received = gather.received;
    let outcome = match verified {
        Err(_) => Err(LinkError::Closed.into()),
        Ok(Err(Unverified::Store(e))) => Err(e.into()),
        Ok(Err(Unverified::Corrupt { offset })) => Err(FetchError::Corrupt { peer, root, offset }),
        Ok(Err(Unverified::Short)) => Err(match gathered {
            Err(NotGathered::Stalled) => FetchError::Stalled { peer, root, received },
            Err(NotGathered::Trailing) => FetchError::Trailing { peer, root },
            Err(NotGathered::Read(ReadError::ConnectionLost(e))) => link_error(peer, &e).into(),
            Err(NotGathered::Read(ReadError::Reset(code))) => {
                FetchError::GivenUp { peer, root, code: Code::from_u64(code.into_inner()) }
            }
            Err(NotGathered::Ended | NotGathered::Read(_)) | Ok(()) => {
                FetchError::Truncated { peer, root, received }
            }
        }),
        Ok(Ok(())) => Ok(FetchStats { bytes, took: start.elapsed(), joined: false }),
    };
    // The verdict, for the holder.
    match &outcome {
        Ok(_) => send.finish(),
        Err(e) => {
            let code = match e {
                FetchError::Corrupt { .. } => Code::Corrupt,
                FetchError::Stalled { .. } => Code::Stalled,
                FetchError::Trailing { .. } => Code::Malformed,
                _ => Code::Cancelled,
            };
            send.reset(code);
            recv.stop(code);
        }
    }
    outcome
}

/// What of a payload is to be asked for: none when that is all of it, an empty list when nothing is.
fn wanted_of(receiving: &Receiving) -> Option<Vec<Range<u64>>> {
    if receiving.here().is_empty() {
        return None;
    }
    let mut missing = receiving.missing();
    if missing.len() > MAX_RANGES {
        // What lies between the last of them comes again.
        let end = missing.last().map_or(0, |range| range.end);
        missing.truncate(MAX_RANGES);
        if let Some(last) = missing.last_mut() {
            last.end = end;
        }
    }
    Some(missing)
}

/// Why not all of a payload's stream was gathered.
enum NotGathered {
    Ended,
    Trailing,
    Stalled,
    Read(ReadError),
}

/// Gathers the stream's segments into one buffer per group, with the hash pairs before it.
struct Gather<'a> {
    stream: &'a mut quinn::RecvStream,
    segments: VecDeque<Bytes>,
    /// Bytes in `segments`.
    staged: usize,
    received: u64,
    pace: Pace,
}

impl Gather<'_> {
    async fn all(
        &mut self,
        tree: BaoTree,
        ranges: ChunkRanges,
        groups: mpsc::Sender<Gathered>,
    ) -> Result<(), NotGathered> {
        // The tree says what comes: nothing that is sent decides how much is taken.
        let mut len = 0;
        for item in ResponseIter::new(tree, ranges) {
            match item {
                BaoChunk::Parent { .. } => len += 64,
                BaoChunk::Leaf { size, .. } => {
                    let group = self.take(len + size).await?;
                    // An empty payload has one group, of no bytes.
                    if !group.is_empty() && groups.send(Gathered::Group(group)).await.is_err() {
                        // The verifier has ended and knows why.
                        return Ok(());
                    }
                    len = 0;
                }
            }
        }
        if self.staged > 0 || self.more().await? {
            return Err(NotGathered::Trailing);
        }
        let _ = groups.send(Gathered::End).await;
        Ok(())
    }

    async fn take(&mut self, len: usize) -> Result<Bytes, NotGathered> {
        while self.staged < len {
            if !self.more().await? {
                return Err(NotGathered::Ended);
            }
        }
        let mut taken = BytesMut::with_capacity(len);
        while taken.len() < len {
            let Some(mut segment) = self.segments.pop_front() else { break };
            let wanted = len - taken.len();
            if segment.len() > wanted {
                self.segments.push_front(segment.split_off(wanted));
            }
            taken.extend_from_slice(&segment);
        }
        self.staged -= taken.len();
        Ok(taken.freeze())
    }

    /// Waits for more of the stream. Whether there was more.
    async fn more(&mut self) -> Result<bool, NotGathered> {
        let mut segments = [const { Bytes::new() }; SEGMENTS];
        let read = self.pace.during(self.stream.read_chunks(&mut segments)).await;
        let read = match read {
            Err(Stalled) => return Err(NotGathered::Stalled),
            Ok(read) => read.map_err(NotGathered::Read)?,
        };
        let Some(count) = read else { return Ok(false) };
        let came: usize = segments.iter().map(Bytes::len).sum();
        self.segments.extend(segments.into_iter().take(count));
        self.staged += came;
        self.received += came as u64;
        self.pace.moved(came as u64);
        Ok(true)
    }
}

/// What the data thread hands to the verifier.
enum Gathered {
    Group(Bytes),
    /// The stream ended where it should.
    End,
}

/// Why a payload was not kept.
enum Unverified {
    Corrupt {
        offset: u64,
    },
    /// Not all was gathered; the gatherer knows why.
    Short,
    Store(PayloadError),
}

/// Verifies and writes what comes through `queue`, and keeps the payload when all has come. Blocks
/// on the disk, and is only polled on a thread for that.
async fn verify(
    shared: &Shared,
    mut receiving: Receiving,
    ranges: ChunkRanges,
    queue: mpsc::Receiver<Gathered>,
    progress: watch::Sender<Transfer>,
) -> Result<(), Unverified> {
    let root = receiving.root().hash();
    let source = Source { queue, group: Bytes::new() };
    let mut decoder = ResponseDecoder::new(root, ranges, receiving.tree(), source);
    let mut verified = receiving.bytes();
    let mut source = loop {
        match decoder.next().await {
            ResponseDecoderNext::Done(source) => break source,
            ResponseDecoderNext::More((next, item)) => {
                match item.map_err(unverified)? {
                    BaoContentItem::Parent(parent) => {
                        receiving.pair(&parent).map_err(Unverified::Store)?;
                    }
                    BaoContentItem::Leaf(leaf) => {
                        receiving.group(&leaf).map_err(Unverified::Store)?;
                        let bytes = leaf.data.len() as u64;
                        shared.counters.payload_received.add(bytes);
                        verified += bytes;
                        progress.send_replace(Transfer::Moving(verified));
                    }
                }
                decoder = next;
            }
        }
    };
    match source.queue.recv().await {
        Some(Gathered::End) => {}
        Some(Gathered::Group(_)) | None => return Err(Unverified::Short),
    }
    receiving.keep().map(|_| ()).map_err(Unverified::Store)
}

fn unverified(e: DecodeError) -> Unverified {
    match e {
        DecodeError::ParentHashMismatch(node) => {
            Unverified::Corrupt { offset: node.chunk_range().start.to_bytes() }
        }
        DecodeError::LeafHashMismatch(chunk) => Unverified::Corrupt { offset: chunk.to_bytes() },
        DecodeError::ParentNotFound(_) | DecodeError::LeafNotFound(_) | DecodeError::Io(_) => {
            Unverified::Short
        }
    }
}

/// The gathered groups as bao-tree reads them. Gathering follows the same tree, so no read
/// crosses from one buffer into the next, and none is copied.
struct Source {
    queue: mpsc::Receiver<Gathered>,
    group: Bytes,
}

impl AsyncStreamReader for Source {
    async fn read_bytes(&mut self, len: usize) -> io::Result<Bytes> {
        if self.group.is_empty() && len > 0 {
            match self.queue.recv().await {
                Some(Gathered::Group(group)) => self.group = group,
                Some(Gathered::End) | None => return Ok(Bytes::new()),
            }
        }
        Ok(self.group.split_to(len.min(self.group.len())))
    }

    async fn read<const L: usize>(&mut self) -> io::Result<[u8; L]> {
        let bytes = self.read_bytes(L).await?;
        bytes.as_ref().try_into().map_err(|_| io::ErrorKind::UnexpectedEof.into())
    }
}
