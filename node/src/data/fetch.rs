//! The asking side: a payload from all who hold it to a verified file.
//!
//! ```text
//!  those who want it        one task for each payload                     holders
//! ┌──────────────────┐     ┌─────────────────────────────┐   ask     ┌──────────────┐
//! │ fetch: progress, │ <── │ what of whom: the mind in   │ ────────> │ runs of      │
//! │ and how it ended │ ──> │ proto decides, this does    │   have    │ groups; what │
//! └──────────────────┘     │ and tells it what came of it│ ────────> │ each has     │
//!        holders           └─────────────────────────────┘           └──────────────┘
//! ```
//!
//! Root and size are the caller's, from an order or a signed index; a holder's word counts for
//! nothing. Every group is verified before it is written ([`ask`]), so a wrong byte costs at most one
//! group and names the holder that sent it. What memory an ask takes is the stream's window and a
//! short queue, whatever the payload's size.
//!
//! A holder that the caller says has all of it is asked at once. Of any other one it is first asked
//! what it has, and it tells as that becomes more ([`super::have`]).
//!
//! What was verified stays when a transfer ends early, and the next one, from whomever, asks for the
//! rest ([`crate::payload`]). Those who want the same payload at the same time share one transfer and
//! the holders that each of them knows. A transfer that nobody waits for any more is given up.

mod ask;
pub(super) mod size;

use std::{
    collections::HashMap,
    mem,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use leasehold_proto::KeyId;
use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::groups::{GROUP_BYTES, Groups, groups_of};
use leasehold_proto::base::time::{Boot, Span};
use leasehold_proto::minds::transfer::{AskId, Do, End, Transfer};
use thiserror::Error;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::ask::Ask;
use super::{
    Shared,
    dial::LinkError,
    frame::{Code, Refusal, Refused, Response},
    have, lock, name,
};
use crate::clock;
use crate::payload::{PayloadError, Receiving, Root};

/// How much may have happened that the transfer has not looked at.
const EVENTS: usize = 256;
/// How many holders may wait to be taken note of.
const NEWCOMERS: usize = 64;
/// How many are asked what they have, in one transfer.
const MAX_WATCHED: usize = 32;
/// How many times in a row a holder may be lost before it is given up.
const MAX_LOST: u32 = 3;
/// How many times in a row it may be too busy: with the rests in between, about a minute and a half.
const MAX_BUSY: u32 = 16;
/// For how long a holder that has brought something is waited for when it cannot be reached.
const COMES_BACK: Duration = Duration::from_secs(30);
/// After how long a holder that was given up may be tried again, when it is named again.
const AGAIN: Duration = Duration::from_millis(900);
/// How long a transfer of the same payload that is being wound up is waited for, at a time.
const WIND_UP: Duration = Duration::from_millis(10);

/// One who has a payload, or some of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its key.
    pub key: [u8; 32],
    /// Where it serves payloads, best first.
    pub addresses: Vec<SocketAddr>,
    /// Whether it is known to have all of it, so that it need not be asked what it has.
    pub whole: bool,
}

/// How far a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes that are here and verified, with those of an earlier try.
    pub bytes: u64,
    /// Bytes in all, as far as is known: what an index names is known once that is here.
    pub size: u64,
    /// Holders that something is under way from.
    pub holders: usize,
}

/// What a fetch took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchStats {
    /// Bytes of payload that came over the network: zero if it was held before.
    pub bytes: u64,
    /// From the request to the durable file.
    pub took: Duration,
    /// Whether this fetch waited for a transfer that another one had begun.
    pub joined: bool,
    /// The keys of the holders that sent some of it.
    pub holders: Vec<[u8; 32]>,
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
    /// Nobody is known who holds it.
    #[error("nobody is known who holds payload {root}")]
    NoHolder {
        /// The payload.
        root: Root,
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
            Self::Link(_)
            | Self::NotHeld { .. }
            | Self::NoHolder { .. }
            | Self::GivenUp { .. }
            | Self::Store(_) => None,
        }
    }
}

impl From<PayloadError> for FetchError {
    fn from(e: PayloadError) -> Self {
        Self::Store(Arc::new(e))
    }
}

/// What a transfer's end was when it did not bring the payload.
#[derive(Debug, Default)]
pub(super) struct Failed {
    /// What ended it for everybody.
    all: Option<FetchError>,
    /// What each holder came to.
    of: HashMap<[u8; 32], FetchError>,
}

impl Failed {
    fn all(error: impl Into<FetchError>) -> Self {
        Self { all: Some(error.into()), of: HashMap::new() }
    }

    /// Whether one of these was tried, or none could have helped.
    fn speaks_for(&self, holders: &[Holder]) -> bool {
        self.all.is_some()
            || holders.is_empty()
            || holders.iter().any(|h| self.of.contains_key(&h.key))
    }

    /// What to tell one who named these holders.
    fn error(&self, root: Root, holders: &[Holder]) -> FetchError {
        let own = holders.iter().find_map(|holder| self.of.get(&holder.key));
        let any = self.all.as_ref().or(own).or_else(|| self.of.values().next());
        any.cloned().unwrap_or(FetchError::NoHolder { root })
    }
}

/// Where a transfer is.
#[derive(Debug, Clone)]
pub(super) enum State {
    Moving(Progress),
    Ended(Result<FetchStats, Arc<Failed>>),
}

/// The transfers under way. Two sizes of one root are two transfers: one of them is a lie, and must
/// not spoil the other.
pub(super) type Transfers = HashMap<(Root, u64), Running>;

/// A transfer under way, as those who want its payload see it.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub(super) state: watch::Sender<State>,
    holders: mpsc::Sender<Holder>,
}

/// What to fetch, and from whom.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) root: Root,
    pub(super) size: u64,
    pub(super) holders: Vec<Holder>,
}

/// Fetches `wanted`, or waits for whoever is fetching it. `progress` hears how far it is.
pub(super) async fn fetch(
    shared: &Arc<Shared>,
    runtime: &Handle,
    wanted: Wanted,
    mut progress: impl FnMut(Progress),
) -> Result<FetchStats, FetchError> {
    let Wanted { root, size, .. } = wanted;
    loop {
        if let Some(actual) = shared.store.has(root) {
            if actual != size {
                return Err(PayloadError::WrongSize { expected: size, actual }.into());
            }
            let took = Duration::ZERO;
            return Ok(FetchStats { bytes: 0, took, joined: false, holders: Vec::new() });
        }
        let (mut transfer, joined) = join_or_begin(shared, runtime, &wanted);
        let ended = loop {
            // Cloned, so that a slow listener does not hold up the transfer.
            let state = transfer.borrow_and_update().clone();
            match state {
                State::Moving(now) => progress(now),
                State::Ended(ended) => break ended,
            }
            if transfer.changed().await.is_err() {
                return Err(LinkError::Closed.into());
            }
        };
        match ended {
            Ok(stats) => return Ok(FetchStats { joined, ..stats }),
            // It was over before it took note of who is named here.
            Err(failed) if joined && !failed.speaks_for(&wanted.holders) => {}
            Err(failed) => return Err(failed.error(root, &wanted.holders)),
        }
    }
}

/// Names more holders of a payload to the transfer that fetches it, if one does.
pub(super) fn name_holders(shared: &Shared, root: Root, size: u64, holders: Vec<Holder>) {
    let transfers = lock(&shared.transfers);
    let Some(running) = transfers.get(&(root, size)) else { return };
    for holder in holders {
        // Who does not fit is named again, or is one of very many.
        let _ = running.holders.try_send(holder);
    }
}

fn join_or_begin(
    shared: &Arc<Shared>,
    runtime: &Handle,
    wanted: &Wanted,
) -> (watch::Receiver<State>, bool) {
    let key = (wanted.root, wanted.size);
    let mut transfers = lock(&shared.transfers);
    if let Some(running) = transfers.get(&key) {
        let watching = running.state.subscribe();
        for holder in &wanted.holders {
            let _ = running.holders.try_send(holder.clone());
        }
        return (watching, true);
    }
    let (state, watching) = watch::channel(State::Moving(Progress::default()));
    let (holders, newcomers) = mpsc::channel(NEWCOMERS);
    transfers.insert(key, Running { state: state.clone(), holders });
    drop(transfers);
    let entry = Entry { shared: shared.clone(), key, state };
    let wanted = wanted.clone();
    runtime.spawn(async move {
        let Some(ended) = transfer(&entry, wanted, newcomers).await else { return };
        let Entry { shared, state, key: (root, _) } = &entry;
        let state = state.clone();
        match &ended {
            Ok(stats) => {
                shared.counters.fetched.add(1);
                debug!(%root, bytes = stats.bytes, took = ?stats.took, "fetched");
            }
            Err(failed) => {
                shared.counters.fetches_failed.add(1);
                let error = failed.error(*root, &[]);
                warn!(%root, %error, "fetch failed");
            }
        }
        // Out of the list first: whoever comes now begins anew, or finds the payload held.
        drop(entry);
        state.send_replace(State::Ended(ended.map_err(Arc::new)));
    });
    (watching, false)
}

/// A transfer's place in the list, given up when dropped, by whatever end.
struct Entry {
    shared: Arc<Shared>,
    key: (Root, u64),
    state: watch::Sender<State>,
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
        if transfers.get(&self.key).is_some_and(|known| known.state.same_channel(&self.state)) {
            transfers.remove(&self.key);
        }
    }
}

/// One payload from its holders to the disk. None when nobody wants it any more.
async fn transfer(
    entry: &Entry,
    wanted: Wanted,
    newcomers: mpsc::Receiver<Holder>,
) -> Option<Result<FetchStats, Failed>> {
    let Wanted { root, size, holders } = wanted;
    let shared = &entry.shared;
    let abandoned = entry.abandoned();
    tokio::pin!(abandoned);
    let beginning = async {
        let slot = shared.fetching.acquire().await.map_err(|_| Failed::all(LinkError::Closed))?;
        // Room first: nothing is asked for that could not be kept.
        Ok((slot, Instant::now(), receive(shared, root, size).await?))
    };
    let begun = tokio::select! {
        begun = beginning => begun,
        () = &mut abandoned => return None,
    };
    let (_slot, start, receiving) = match begun {
        Ok(begun) => begun,
        Err(failed) => return Some(Err(failed)),
    };
    let mut drive = Drive::new(shared, receiving, newcomers, entry.state.clone());
    holders.into_iter().for_each(|holder| drive.meet(holder));
    let came = tokio::select! {
        came = drive.until_whole() => came,
        () = &mut abandoned => {
            drive.wind_up().await;
            return None;
        }
    };
    let kept = match came {
        Ok(()) => drive.keep().await,
        Err(failed) => Err(failed),
    };
    let (bytes, holders) = drive.brought();
    drive.wind_up().await;
    Some(kept.map(|()| FetchStats { bytes, took: start.elapsed(), joined: false, holders }))
}

/// Takes room for a payload. Another transfer of it may still be winding up.
async fn receive(shared: &Shared, root: Root, size: u64) -> Result<Arc<Receiving>, Failed> {
    loop {
        let store = shared.store.clone();
        let taken = spawn_blocking(move || store.receive(root, size)).await;
        match taken.map_err(|_| Failed::all(LinkError::Closed))? {
            Ok(receiving) => return Ok(receiving),
            Err(PayloadError::Arriving(_)) => sleep(WIND_UP).await,
            Err(error) => return Err(Failed::all(error)),
        }
    }
}

/// What follows from the answer to a question about a payload of `size` bytes, before its content.
pub(super) fn ready(
    response: Response,
    peer: [u8; 32],
    root: Root,
    size: u64,
) -> Result<(), FetchError> {
    match response {
        Response::Ready { size: actual } if actual == size => Ok(()),
        Response::Ready { size: actual }
        | Response::Refused(Refused { why: Refusal::WrongSize, figure: actual, .. }) => {
            Err(FetchError::WrongSize { peer, root, expected: size, actual })
        }
        Response::Refused(Refused { why: Refusal::NotHeld, .. }) => {
            Err(FetchError::NotHeld { peer, root })
        }
        Response::Refused(refused) => Err(LinkError::Refused { peer, refused }.into()),
    }
}

/// What happens in a transfer.
pub(super) enum Event {
    /// Another group of an ask came, of so many bytes: so far all before the one with this number.
    Came(AskId, u64, u64),
    /// An ask is over.
    Ended(AskId, Result<(), FetchError>),
    /// A holder will say what it has.
    Answers([u8; 32]),
    /// A holder has these groups, too.
    Has([u8; 32], Groups),
    /// A holder says no more about what it has: all is told, or something went wrong.
    Told([u8; 32], Result<(), FetchError>),
    /// What is here is on disk, or could not be brought there.
    Synced(Result<(), PayloadError>),
}

/// A holder, as far as the mind does not know it.
#[derive(Debug, Default)]
struct Source {
    addresses: Vec<SocketAddr>,
    /// What it said that it has; not used of one that was said to have all.
    has: Groups,
    /// While it is asked what it has.
    watch: Option<Watch>,
    /// How many asks in a row it was lost, or too busy.
    failures: u32,
    /// Bytes that came from it.
    bytes: u64,
    /// When something last did.
    brought: Option<Instant>,
    /// When it was given up.
    out: Option<Instant>,
    error: Option<FetchError>,
}

#[derive(Debug)]
struct Watch {
    answered: bool,
    unwanted: CancellationToken,
}

/// A transfer's shell: what the mind wants done is done here, and it is told what came of it.
struct Drive<'a> {
    shared: &'a Arc<Shared>,
    mind: Transfer,
    receiving: Arc<Receiving>,
    sources: HashMap<[u8; 32], Source>,
    asks: HashMap<AskId, ([u8; 32], CancellationToken)>,
    tasks: JoinSet<()>,
    events: mpsc::Sender<Event>,
    happened: mpsc::Receiver<Event>,
    newcomers: mpsc::Receiver<Holder>,
    state: watch::Sender<State>,
    /// When more was here, or to be had, than before.
    gained: Instant,
    syncing: bool,
}

impl<'a> Drive<'a> {
    fn new(
        shared: &'a Arc<Shared>,
        receiving: Arc<Receiving>,
        newcomers: mpsc::Receiver<Holder>,
        state: watch::Sender<State>,
    ) -> Self {
        let (events, happened) = mpsc::channel(EVENTS);
        let mut seed = [0; 8];
        // Dice that fall alike everywhere would only cost speed.
        let _ = getrandom::fill(&mut seed);
        let groups = groups_of(receiving.tree().size());
        let mind = Transfer::new(groups, receiving.here(), Dice::new(u64::from_le_bytes(seed)));
        let drive = Self {
            shared,
            mind,
            receiving,
            sources: HashMap::new(),
            asks: HashMap::new(),
            tasks: JoinSet::new(),
            events,
            happened,
            newcomers,
            state,
            gained: Instant::now(),
            syncing: false,
        };
        drive.tell();
        drive
    }

    /// Asks for what is missing until nothing is, or nobody is left who could bring it.
    async fn until_whole(&mut self) -> Result<(), Failed> {
        let mut look_at = Boot(0);
        loop {
            if self.mind.is_whole() {
                return Ok(());
            }
            let now = clock::boot();
            if look_at <= now {
                let todo = self.mind.next(now);
                self.act(todo);
                if self.is_over() {
                    return Err(self.failed());
                }
                look_at = self.look_at(now);
            }
            let looks = tokio::select! {
                biased;
                Some(event) = self.happened.recv() => self.take(event).map_err(Failed::all)?,
                Some(holder) = self.newcomers.recv() => {
                    self.meet(holder);
                    true
                }
                () = sleep(Duration::from_millis(look_at.since(now).as_millis())) => true,
            };
            if looks {
                look_at = Boot(0);
            }
            while self.tasks.try_join_next().is_some() {}
        }
    }

    /// When to look at the whole at the latest.
    fn look_at(&self, now: Boot) -> Boot {
        let hope = u64::try_from(self.shared.config.hope.as_millis()).unwrap_or(u64::MAX);
        let hope = now + Span::millis((hope / 10).max(1));
        self.mind.wake(now).map_or(hope, |wake| wake.min(hope))
    }

    /// Takes note of what happened. Whether there may be more to do.
    fn take(&mut self, event: Event) -> Result<bool, FetchError> {
        match event {
            Event::Came(id, next, bytes) => {
                let Some((key, _)) = self.asks.get(&id) else { return Ok(false) };
                if let Some(source) = self.sources.get_mut(key) {
                    source.failures = 0;
                    source.bytes += bytes;
                    source.brought = Some(Instant::now());
                }
                self.gained = Instant::now();
                let todo = self.mind.came(clock::boot(), id, next);
                self.act(todo);
                self.tell();
                self.sync();
                Ok(false)
            }
            Event::Ended(id, ended) => {
                // One that was cancelled is over already.
                let Some((key, _)) = self.asks.remove(&id) else { return Ok(false) };
                self.ended(id, key, ended)?;
                self.tell();
                Ok(true)
            }
            Event::Answers(key) => {
                let watch = self.sources.get_mut(&key).and_then(|source| source.watch.as_mut());
                watch.into_iter().for_each(|watch| watch.answered = true);
                Ok(false)
            }
            Event::Has(key, more) => {
                let Some(source) = self.sources.get_mut(&key) else { return Ok(false) };
                source.has.extend(more.runs());
                // Of what is here already nobody brings more.
                if more.runs().any(|run| !self.mind.here().covers(run)) {
                    self.gained = Instant::now();
                }
                self.mind.holds(KeyId(key), source.has.clone());
                Ok(true)
            }
            Event::Told(key, told) => {
                let Some(source) = self.sources.get_mut(&key) else { return Ok(false) };
                source.watch = None;
                if let Err(error) = told {
                    debug!(peer = %name(&key), %error, "a holder does not say what it has");
                    self.give_up(key, error);
                }
                Ok(true)
            }
            Event::Synced(synced) => {
                self.syncing = false;
                Ok(synced.map(|()| false)?)
            }
        }
    }

    /// An ask is over: what that says about its holder.
    fn ended(
        &mut self,
        id: AskId,
        key: [u8; 32],
        ended: Result<(), FetchError>,
    ) -> Result<(), FetchError> {
        let now = clock::boot();
        let Err(error) = ended else {
            let todo = self.mind.ended(now, id, End::Done);
            self.act(todo);
            return Ok(());
        };
        let source = self.sources.entry(key).or_default();
        let lately = source.brought.is_some_and(|at| at.elapsed() < COMES_BACK);
        source.failures += 1;
        let judged = match &error {
            FetchError::Store(_) | FetchError::Link(LinkError::Closed | LinkError::Request(_)) => {
                return Err(error);
            }
            FetchError::Corrupt { .. }
            | FetchError::WrongSize { .. }
            | FetchError::Truncated { .. }
            | FetchError::Trailing { .. }
            | FetchError::Link(LinkError::Malformed { .. }) => Some(End::Wrong),
            // It may have some of it, or has lost what it had: it is asked what.
            FetchError::NotHeld { .. } if source.has.is_empty() || source.failures < MAX_LOST => {
                source.error = Some(error);
                self.forget(key);
                self.watch(key);
                return Ok(());
            }
            FetchError::NotHeld { .. } => None,
            FetchError::Link(LinkError::Refused { refused, .. })
                if refused.why == Refusal::Busy =>
            {
                (source.failures < MAX_BUSY).then_some(End::Busy)
            }
            FetchError::Link(LinkError::Busy(_)) => {
                (source.failures < MAX_LOST).then_some(End::Busy)
            }
            FetchError::Link(LinkError::Unreachable { .. }) => lately.then_some(End::Lost),
            FetchError::Link(LinkError::Lost { .. } | LinkError::Reset { .. }) => {
                (lately || source.failures < MAX_LOST).then_some(End::Lost)
            }
            FetchError::GivenUp { code: Some(Code::Closing | Code::Internal), .. } => None,
            FetchError::GivenUp { .. } => (source.failures < MAX_LOST).then_some(End::Lost),
            FetchError::Stalled { .. } | FetchError::NoHolder { .. } | FetchError::Link(_) => None,
        };
        debug!(peer = %name(&key), %error, ?judged, "a holder did not bring what it was asked for");
        match judged {
            Some(End::Wrong) => {
                warn!(peer = %name(&key), %error, "nothing more of a payload is taken from a holder");
                self.shared.counters.bad_holders.add(1);
                source.error = Some(error);
                source.out = Some(Instant::now());
                let todo = self.mind.ended(now, id, End::Wrong);
                self.act(todo);
                self.unwatch(key);
            }
            Some(end) => {
                source.error = Some(error);
                let todo = self.mind.ended(now, id, end);
                self.act(todo);
            }
            None => self.give_up(key, error),
        }
        Ok(())
    }

    fn give_up(&mut self, key: [u8; 32], error: FetchError) {
        let source = self.sources.entry(key).or_default();
        source.error = Some(error);
        source.out = Some(Instant::now());
        self.forget(key);
        self.unwatch(key);
    }

    /// Nothing is asked of a holder any more, as long as nothing new is heard of it.
    fn forget(&mut self, key: [u8; 32]) {
        self.mind.gone(&KeyId(key));
        self.asks.retain(|_, (of, unwanted)| {
            if *of == key {
                unwanted.cancel();
            }
            *of != key
        });
    }

    fn act(&mut self, todo: Vec<Do>) {
        for what in todo {
            match what {
                Do::Ask(id, KeyId(peer), run) => {
                    let unwanted = CancellationToken::new();
                    self.asks.insert(id, (peer, unwanted.clone()));
                    let source = self.sources.get(&peer);
                    let ask = Ask {
                        id,
                        peer,
                        addresses: source.map(|s| s.addresses.clone()).unwrap_or_default(),
                        run,
                        receiving: self.receiving.clone(),
                        events: self.events.clone(),
                        unwanted,
                    };
                    let (shared, events) = (self.shared.clone(), self.events.clone());
                    self.tasks.spawn(async move {
                        let ended = ask.make(&shared).await;
                        let _ = events.send(Event::Ended(id, ended)).await;
                    });
                }
                Do::Cancel(id) => {
                    if let Some((_, unwanted)) = self.asks.remove(&id) {
                        unwanted.cancel();
                    }
                }
            }
        }
    }

    /// Takes note of a holder.
    fn meet(&mut self, holder: Holder) {
        let Holder { key, addresses, whole } = holder;
        if key == self.shared.identity.public || self.mind.is_banned(&KeyId(key)) {
            return;
        }
        let known = self.sources.values().filter(|source| source.out.is_none()).count();
        let groups = groups_of(self.receiving.tree().size());
        let source = match self.sources.get_mut(&key) {
            Some(source) => source,
            None if !whole && known >= MAX_WATCHED => return,
            None => self.sources.entry(key).or_default(),
        };
        if !addresses.is_empty() {
            source.addresses = addresses;
        }
        // Who named it as having all of it knows better than what was seen of it before.
        let again = source.out.is_none_or(|out| whole || out.elapsed() >= AGAIN);
        let idle = source.watch.is_none() && source.has.is_empty();
        if source.out.is_some() && again {
            (source.out, source.failures) = (None, 0);
        }
        if whole && again {
            self.mind.holds(KeyId(key), Groups::first(groups));
        } else if !whole && again && idle && !self.mind.holders().any(|(of, ..)| of.0 == key) {
            self.watch(key);
        }
    }

    /// Asks a holder what it has, anew if it was asked before.
    fn watch(&mut self, key: [u8; 32]) {
        self.unwatch(key);
        let source = self.sources.entry(key).or_default();
        let unwanted = CancellationToken::new();
        source.watch = Some(Watch { answered: false, unwanted: unwanted.clone() });
        let (root, size) = (self.receiving.root(), self.receiving.tree().size());
        let (addresses, events) = (source.addresses.clone(), self.events.clone());
        let shared = self.shared.clone();
        self.tasks.spawn(async move {
            let asking = have::ask(&shared, key, &addresses, (root, size), &events);
            tokio::select! {
                told = asking => drop(events.send(Event::Told(key, told)).await),
                () = unwanted.cancelled() => {}
            }
        });
    }

    fn unwatch(&mut self, key: [u8; 32]) {
        let Some(source) = self.sources.get_mut(&key) else { return };
        source.has = Groups::new();
        if let Some(watch) = source.watch.take() {
            watch.unwanted.cancel();
        }
    }

    /// Whether nobody is left who could bring what is missing.
    fn is_over(&self) -> bool {
        let mut watches = self.sources.values().filter_map(|source| source.watch.as_ref());
        let hoped = self.gained.elapsed() < self.shared.config.hope;
        self.asks.is_empty()
            && !watches.any(|watch| !watch.answered || hoped)
            && self.mind.is_hopeless()
    }

    fn failed(&mut self) -> Failed {
        let errors = self.sources.iter_mut();
        let of = errors.filter_map(|(key, source)| Some((*key, source.error.take()?)));
        Failed { all: None, of: of.collect() }
    }

    /// Tells those who wait how far it is.
    fn tell(&self) {
        let (here, size) = (self.mind.here(), self.receiving.tree().size());
        let groups = groups_of(size);
        // The last group may be shorter than the others.
        let short = if here.covers(groups - 1..groups) { groups * GROUP_BYTES - size } else { 0 };
        let bytes = (here.len() * GROUP_BYTES).saturating_sub(short);
        let mut asked: Vec<_> = self.asks.values().map(|(key, _)| *key).collect();
        asked.sort_unstable();
        asked.dedup();
        self.state.send_replace(State::Moving(Progress { bytes, size, holders: asked.len() }));
    }

    /// Brings what is here to the disk from time to time, beside what comes.
    fn sync(&mut self) {
        if self.syncing || !self.receiving.wants_sync() {
            return;
        }
        self.syncing = true;
        let (receiving, events) = (self.receiving.clone(), self.events.clone());
        self.tasks.spawn(async move {
            let Ok(synced) = spawn_blocking(move || receiving.sync()).await else { return };
            let _ = events.send(Event::Synced(synced)).await;
        });
    }

    /// How many bytes came over the network, and from whom.
    fn brought(&self) -> (u64, Vec<[u8; 32]>) {
        let brought = self.sources.iter().filter(|(_, source)| source.bytes > 0);
        let bytes = brought.clone().map(|(_, source)| source.bytes).sum();
        (bytes, brought.map(|(key, _)| *key).collect())
    }

    /// Makes the payload held. What is still under way brings nothing new: it writes what is there.
    async fn keep(&mut self) -> Result<(), Failed> {
        let receiving = self.receiving.clone();
        let kept = spawn_blocking(move || receiving.keep()).await;
        kept.map_err(|_| Failed::all(LinkError::Closed))?.map(drop).map_err(Failed::all)
    }

    /// Ends what is under way, and waits until nothing is.
    async fn wind_up(mut self) {
        self.happened.close();
        self.asks.values().for_each(|(_, unwanted)| unwanted.cancel());
        for source in self.sources.values_mut() {
            if let Some(watch) = source.watch.take() {
                watch.unwanted.cancel();
            }
        }
        let mut tasks = mem::take(&mut self.tasks);
        while tasks.join_next().await.is_some() {}
        // What came rests with its marks, or goes: that is the disk's work.
        let receiving = self.receiving;
        let _ = spawn_blocking(move || drop(receiving)).await;
    }
}
