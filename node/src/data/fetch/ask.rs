//! One ask: a run of groups from one holder, verified and written.
//!
//! ```text
//!   network                        data thread                       blocking thread
//! ┌─────────┐  packets  ┌───────────────────────────────┐ queue  ┌─────────────────────────┐
//! │ holder  │ ────────> │ pairs and one group, gathered │ ─────> │ verify, write, tell the │
//! └─────────┘           │ in one buffer; pace is kept   │        │ transfer what came      │
//!                       └───────────────────────────────┘        └─────────────────────────┘
//! ```
//!
//! Waking another thread costs as much as a good part of a group does, so where groups come fast some
//! are handed over together.

use std::{
    cell::Cell, collections::VecDeque, io, mem, net::SocketAddr, ops::Range, rc::Rc, sync::Arc,
    time::Duration,
};

use bao_tree::{
    BaoTree, ChunkRanges,
    io::{
        BaoContentItem, DecodeError,
        fsm::{ResponseDecoder, ResponseDecoderNext},
    },
    iter::{BaoChunk, ResponseIter},
};
use bytes::Bytes;
use iroh_io::AsyncStreamReader;
use leasehold_proto::base::groups::GROUP_BYTES;
use leasehold_proto::minds::transfer::AskId;
use quinn::ReadError;
use tokio::{
    runtime::Handle,
    sync::mpsc,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{Event, FetchError, ready};
use crate::data::{
    Shared,
    buffers::Buffers,
    dial::{Answered, LinkError, link_error},
    frame::{Code, Get, Request},
    serve::chunk_ranges,
    stream::{Pace, Stalled},
};
use crate::payload::{PayloadError, Receiving};

/// How many groups are handed over together at most, and how long the first of them waits for others.
const TOGETHER: usize = 4;
const GATHER_FOR: Duration = Duration::from_millis(10);

/// How many such hand-overs may wait to be verified and written.
const WRITE_BEHIND: usize = 2;

/// How many received segments are taken from a stream at once.
const SEGMENTS: usize = 64;

/// What is asked of whom.
pub(super) struct Ask {
    pub(super) id: AskId,
    pub(super) peer: [u8; 32],
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) run: Range<u64>,
    pub(super) receiving: Arc<Receiving>,
    pub(super) events: mpsc::Sender<Event>,
    /// Cancelled when what would still come is not wanted any more.
    pub(super) unwanted: CancellationToken,
}

impl Ask {
    /// Asks, and returns when all has come or nothing more will. Nothing is written afterwards.
    pub(super) async fn make(self, shared: &Arc<Shared>) -> Result<(), FetchError> {
        let Self { peer, run, receiving, .. } = &self;
        let (peer, root, size) = (*peer, receiving.root(), receiving.tree().size());
        let closed = |_| LinkError::Closed;
        let own = shared.asking_each.of(&peer);
        let unwanted = self.unwanted.clone();
        let permits = async {
            let own = own.acquire().await.map_err(closed)?;
            Ok::<_, LinkError>((own, shared.asking.acquire().await.map_err(closed)?))
        };
        let _permits = tokio::select! {
            permits = permits => permits?,
            () = unwanted.cancelled() => return Ok(()),
        };
        let bytes = run.start * GROUP_BYTES..(run.end * GROUP_BYTES).min(size);
        // Of an empty payload, which has one group without bytes, all is asked for.
        let ranges = if size == 0 { Vec::new() } else { vec![bytes] };
        let get = Request::Get(Get { root, size, ranges: ranges.clone() });
        let frame = get.encode().map_err(LinkError::Request)?;
        let asked = tokio::select! {
            asked = shared.request(peer, &self.addresses, &frame, true) => asked,
            () = unwanted.cancelled() => return Ok(()),
        };
        let Answered { mut send, mut recv, response } = asked.map_err(|e| match e {
            LinkError::Reset { peer, code } => FetchError::GivenUp { peer, root, code },
            e => e.into(),
        })?;
        ready(response, peer, root, size)?;

        let (groups, queue) = mpsc::channel(WRITE_BEHIND);
        let (tree, ranges) = (receiving.tree(), chunk_ranges(&ranges, size));
        let mut verified = self.verifier(shared, ranges.clone(), queue);
        let mut gather = Gather {
            stream: &mut recv.stream,
            segments: VecDeque::new(),
            staged: 0,
            received: 0,
            buffers: shared.gathering.clone(),
            pace: Pace::new(shared.config.stall, shared.config.min_rate),
            together: Vec::new(),
            since: Instant::now(),
        };
        // The verifier ends first where it finds a wrong byte or the disk fails: then its reason
        // counts, and waiting for more of the stream would be waiting for nothing.
        let (gathered, verified) = tokio::select! {
            biased;
            verified = &mut verified => (Ok(()), verified),
            gathered = gather.all(tree, ranges, groups) => (gathered, verified.await),
            () = unwanted.cancelled() => (Err(NotGathered::Unwanted), verified.await),
        };
        let received = gather.received;
        let outcome = match (verified, gathered) {
            (Err(_), _) => Err(LinkError::Closed.into()),
            (Ok(Err(Unverified::Store(e))), _) => Err(e.into()),
            (Ok(Err(Unverified::Corrupt { offset })), _) => {
                Err(FetchError::Corrupt { peer, root, offset })
            }
            (Ok(Ok(())), _) => Ok(()),
            (Ok(Err(Unverified::Short)), Err(why)) => match why {
                NotGathered::Unwanted => {
                    send.reset(Code::Cancelled);
                    recv.stop(Code::Cancelled);
                    return Ok(());
                }
                NotGathered::Stalled => Err(FetchError::Stalled { peer, root, received }),
                NotGathered::Trailing => Err(FetchError::Trailing { peer, root }),
                NotGathered::Read(ReadError::ConnectionLost(e)) => Err(link_error(peer, &e).into()),
                NotGathered::Read(ReadError::Reset(code)) => {
                    let code = Code::from_u64(code.into_inner());
                    Err(FetchError::GivenUp { peer, root, code })
                }
                NotGathered::Ended | NotGathered::Read(_) => {
                    Err(FetchError::Truncated { peer, root, received })
                }
            },
            (Ok(Err(Unverified::Short)), Ok(())) => {
                Err(FetchError::Truncated { peer, root, received })
            }
        };
        // The verdict, for the holder.
        match &outcome {
            Ok(()) => send.finish(),
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

    fn verifier(
        &self,
        shared: &Arc<Shared>,
        ranges: ChunkRanges,
        queue: mpsc::Receiver<Gathered>,
    ) -> JoinHandle<Result<(), Unverified>> {
        let (shared, receiving) = (Arc::clone(shared), Arc::clone(&self.receiving));
        let (id, events) = (self.id, self.events.clone());
        spawn_blocking(move || {
            Handle::current().block_on(verify(&shared, &receiving, ranges, queue, id, &events))
        })
    }
}

/// Why not all of a payload's stream was gathered.
enum NotGathered {
    Ended,
    Trailing,
    Stalled,
    Unwanted,
    Read(ReadError),
}

/// Gathers the stream's segments into one buffer per group, with the hash pairs before it.
struct Gather<'a> {
    stream: &'a mut quinn::RecvStream,
    segments: VecDeque<Bytes>,
    /// Bytes in `segments`.
    staged: usize,
    received: u64,
    buffers: Buffers,
    pace: Pace,
    /// Groups that are not handed over yet, and since when the first of them is there.
    together: Vec<Bytes>,
    since: Instant,
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
                    let group = self.take(len + size, &groups).await?;
                    // An empty payload has one group, of no bytes.
                    if !group.is_empty() && !self.hand_over(group, &groups).await {
                        // The verifier has ended and knows why.
                        return Ok(());
                    }
                    len = 0;
                }
            }
        }
        if !self.flush(&groups).await {
            return Ok(());
        }
        if self.staged > 0 || self.more().await? {
            return Err(NotGathered::Trailing);
        }
        let _ = groups.send(Gathered::End).await;
        Ok(())
    }

    /// Passes a group on together with those before it that wait, or has it wait for those that
    /// follow. Whether somebody takes it.
    async fn hand_over(&mut self, group: Bytes, groups: &mpsc::Sender<Gathered>) -> bool {
        if self.together.is_empty() {
            self.since = Instant::now();
        }
        self.together.push(group);
        self.together.len() < TOGETHER || self.flush(groups).await
    }

    async fn flush(&mut self, groups: &mpsc::Sender<Gathered>) -> bool {
        let together = mem::take(&mut self.together);
        together.is_empty() || groups.send(Gathered::Groups(together)).await.is_ok()
    }

    async fn take(
        &mut self,
        len: usize,
        groups: &mpsc::Sender<Gathered>,
    ) -> Result<Bytes, NotGathered> {
        while self.staged < len {
            // What is there does not wait for long.
            let more = if self.together.is_empty() {
                self.more().await
            } else {
                let until = self.since + GATHER_FOR;
                match timeout_at(until, self.more()).await {
                    Ok(more) => more,
                    Err(_) => {
                        self.flush(groups).await;
                        continue;
                    }
                }
            };
            match more {
                Ok(true) => {}
                ended => {
                    // What came before the end is good.
                    self.flush(groups).await;
                    return Err(ended.err().unwrap_or(NotGathered::Ended));
                }
            }
        }
        let mut taken = self.buffers.empty();
        while taken.len() < len {
            let Some(mut segment) = self.segments.pop_front() else { break };
            let wanted = len - taken.len();
            if segment.len() > wanted {
                self.segments.push_front(segment.split_off(wanted));
            }
            taken.add(&segment);
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
    Groups(Vec<Bytes>),
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

/// Verifies and writes what comes through `queue`. Blocks on the disk, and is only polled on a
/// thread for that.
async fn verify(
    shared: &Shared,
    receiving: &Receiving,
    ranges: ChunkRanges,
    queue: mpsc::Receiver<Gathered>,
    id: AskId,
    events: &mpsc::Sender<Event>,
) -> Result<(), Unverified> {
    let root = receiving.root().hash();
    let waiting = Rc::new(Cell::new(0));
    let source = Source { queue, groups: VecDeque::new(), waiting: waiting.clone() };
    let mut decoder = ResponseDecoder::new(root, ranges, receiving.tree(), source);
    // What was written and is not told yet: where the next group begins, and how many bytes it was.
    let mut written = None;
    let mut ended = loop {
        let item = match decoder.next().await {
            ResponseDecoderNext::Done(source) => break Ok(source),
            ResponseDecoderNext::More((next, item)) => {
                decoder = next;
                item
            }
        };
        match item.map_err(unverified) {
            Err(why) => break Err(why),
            Ok(BaoContentItem::Parent(parent)) => {
                if let Err(error) = receiving.pair(&parent) {
                    break Err(Unverified::Store(error));
                }
            }
            Ok(BaoContentItem::Leaf(leaf)) => {
                if let Err(error) = receiving.group(&leaf) {
                    break Err(Unverified::Store(error));
                }
                let bytes = leaf.data.len() as u64;
                shared.counters.payload_received.add(bytes);
                let before = written.map_or(0, |(_, bytes)| bytes);
                written = Some((leaf.offset / GROUP_BYTES + 1, before + bytes));
                if waiting.get() == 0 && !tell(id, events, &mut written).await {
                    break Err(Unverified::Short);
                }
            }
        }
    };
    // What came before something went wrong has come.
    if !tell(id, events, &mut written).await {
        ended = Err(Unverified::Short);
    }
    match ended?.queue.recv().await {
        Some(Gathered::End) => Ok(()),
        Some(Gathered::Groups(_)) | None => Err(Unverified::Short),
    }
}

/// Tells the transfer what was written, if anything was. Whether somebody wants more of it.
async fn tell(id: AskId, events: &mpsc::Sender<Event>, written: &mut Option<(u64, u64)>) -> bool {
    let Some((next, bytes)) = written.take() else { return true };
    events.send(Event::Came(id, next, bytes)).await.is_ok()
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
    groups: VecDeque<Bytes>,
    /// How many groups are here that were not begun, for the verifier to see.
    waiting: Rc<Cell<usize>>,
}

impl AsyncStreamReader for Source {
    async fn read_bytes(&mut self, len: usize) -> io::Result<Bytes> {
        while len > 0 && self.groups.front().is_none_or(Bytes::is_empty) {
            self.groups.pop_front();
            if self.groups.is_empty() {
                match self.queue.recv().await {
                    Some(Gathered::Groups(groups)) => self.groups = groups.into(),
                    Some(Gathered::End) | None => return Ok(Bytes::new()),
                }
            }
        }
        self.waiting.set(self.groups.len().saturating_sub(1));
        let Some(group) = self.groups.front_mut() else { return Ok(Bytes::new()) };
        Ok(group.split_to(len.min(group.len())))
    }

    async fn read<const L: usize>(&mut self) -> io::Result<[u8; L]> {
        let bytes = self.read_bytes(L).await?;
        bytes.as_ref().try_into().map_err(|_| io::ErrorKind::UnexpectedEof.into())
    }
}
