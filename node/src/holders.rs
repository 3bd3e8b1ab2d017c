//! Who has a payload: those it was named for, and those who say so by gossip; the room for one that
//! is to come; and all that an index names, fetched together.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use leasehold_proto::base::dice::Dice;
use leasehold_proto::core::{Command, Event, InUse, Reply};
use leasehold_proto::words::index::{Index, IndexError, MAX_BYTES};
use leasehold_proto::words::record::{MAX_PAYLOADS, Payloads};
use leasehold_proto::{Hash, Payload};
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::data::{Data, FetchError, FetchStats, Holder, Progress};
use crate::handle::Asked;
use crate::payload::{PayloadError, PayloadStore, Room, Root};

/// How long those who are named have before others are looked for: a small payload is here by then.
const ALONE: Duration = Duration::from_millis(100);
/// How often others are looked for while a payload is on its way.
const LOOK: Duration = Duration::from_secs(1);
/// How long a holder is looked for where none is known.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many holders are asked for a payload's size.
const MAX_ASKED: usize = 8;
/// How many payloads are remembered as awaited.
const MAX_AWAITED: usize = 1_024;
/// How many payloads that one index names are fetched at once: small ones wait for the disk more than
/// for the network.
const AT_ONCE: usize = 16;
/// How often room is made for one payload that others may take.
const TRIES: u32 = 5;
/// How long changes of what is held wait for others.
const BATCH: Duration = Duration::from_millis(50);

/// Fetches payloads from all who have them.
#[derive(Clone, Debug)]
pub(crate) struct Holders {
    data: Data,
    payloads: PayloadStore,
    commands: mpsc::Sender<Asked>,
    /// Payloads that somebody is to come for, the newest last.
    awaited: Arc<Mutex<VecDeque<Root>>>,
    /// What the indexes name that are on their way, for as long as they are.
    arriving: Arc<Mutex<Vec<Weak<HashSet<Root>>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard is never left half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far an index and what it names are, together.
struct Moved<F> {
    now: Progress,
    tell: F,
}

impl<F: FnMut(Progress)> Moved<F> {
    /// Of one payload so many bytes are here instead of so many.
    fn on(&mut self, before: u64, bytes: u64, holders: usize) {
        self.now.bytes = (self.now.bytes + bytes).saturating_sub(before);
        self.now.holders = holders;
        (self.tell)(self.now);
    }
}

impl Holders {
    pub(crate) fn new(data: Data, payloads: PayloadStore, commands: mpsc::Sender<Asked>) -> Self {
        Self { data, payloads, commands, awaited: Arc::default(), arriving: Arc::default() }
    }

    /// Somebody is to come for this payload: others make room before it does, as long as it is one
    /// of the newest.
    pub(crate) fn awaits(&self, root: Root) {
        let mut awaited = lock(&self.awaited);
        awaited.retain(|known| *known != root);
        if awaited.len() == MAX_AWAITED {
            awaited.pop_front();
        }
        awaited.push_back(root);
    }

    async fn ask(&self, command: Command) -> Option<Reply> {
        let (reply, answer) = oneshot::channel();
        self.commands.send((command, reply)).await.ok()?;
        answer.await.ok()?.ok()
    }

    /// Which payloads are not to be removed, with those that the indexes among them name, but for
    /// `without` and what only that names; none when that cannot be told.
    pub(crate) async fn in_use(&self, without: Option<Root>) -> Option<InUse> {
        let Some(Reply::InUse(in_use)) = self.ask(Command::InUse).await else { return None };
        let payloads = self.payloads.clone();
        let named = move || {
            let all = |roots: BTreeSet<Hash>| {
                let roots = roots.into_iter().map(Root::from);
                let roots = payloads.with_named(roots.filter(|root| Some(*root) != without))?;
                Ok::<_, PayloadError>(roots.into_iter().map(Hash::from).collect())
            };
            Ok(InUse { pinned: all(in_use.pinned)?, leased: all(in_use.leased)? })
        };
        let named = self.blocking(named).await;
        named.inspect_err(|error| warn!(%error, "what indexes name cannot be told")).ok()
    }

    /// Sees to room for payloads of these sizes in bytes, at the cost of those that nobody uses.
    ///
    /// # Errors
    /// When there is not enough for them, whatever is removed.
    pub(crate) async fn make_room(&self, sizes: Vec<u64>) -> Result<(), PayloadError> {
        match self.payloads.check_room(&sizes) {
            Err(PayloadError::NoSpace { .. }) => {}
            checked => return checked,
        }
        let (payloads, spared) = (self.payloads.clone(), self.spared().await);
        self.blocking(move || payloads.make_room(&sizes, spared.as_ref())).await.map(drop)
    }

    /// Takes room for a payload of `size` bytes, at the cost of those that nobody uses.
    ///
    /// # Errors
    /// When there is not enough for it, whatever is removed.
    pub(crate) async fn take_room(&self, size: u64) -> Result<Room, PayloadError> {
        let payloads = self.payloads.clone();
        match self.blocking(move || payloads.take_room(size, None)).await {
            Err(PayloadError::NoSpace { .. }) => {}
            taken => return taken,
        }
        let (payloads, spared) = (self.payloads.clone(), self.spared().await);
        self.blocking(move || payloads.take_room(size, spared.as_ref())).await
    }

    /// What is not to make room; none when that cannot be told, so that nothing is.
    async fn spared(&self) -> Option<HashSet<Root>> {
        let in_use = self.in_use(None).await?;
        let spared = in_use.pinned.into_iter().chain(in_use.leased);
        let mut spared: HashSet<_> = spared.map(Root::from).collect();
        spared.extend(lock(&self.awaited).iter());
        for arriving in lock(&self.arriving).iter().filter_map(Weak::upgrade) {
            spared.extend(arriving.iter());
        }
        Some(spared)
    }

    /// Tells the data plane, as long as others are served, which payloads go first: what a lease of
    /// this node needs at its lessor, and what somebody is to come for.
    pub(crate) async fn put_first(self, shutdown: CancellationToken) {
        let mut last = (BTreeSet::new(), VecDeque::new());
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = shutdown.cancelled() => return,
            }
            if self.data.stats().serving == 0 {
                continue;
            }
            let Some(Reply::InUse(InUse { leased, .. })) = self.ask(Command::InUse).await else {
                continue;
            };
            let now = (leased, lock(&self.awaited).clone());
            if now == last {
                continue;
            }
            let (leased, awaited) = now.clone();
            let roots: Vec<_> = leased.into_iter().map(Root::from).chain(awaited).collect();
            // What an index names that is still to come is known later.
            let all_here = roots.iter().all(|root| self.payloads.has(*root).is_some());
            let payloads = self.payloads.clone();
            let own = self.blocking(move || payloads.with_named(roots)).await;
            if all_here && own.is_ok() {
                last = now;
            }
            if let Ok(own) = own {
                self.data.put_first(own);
            }
        }
    }

    /// Has these spared when room is made, for as long as what this gives is kept.
    fn spare(&self, roots: HashSet<Root>) -> Arc<HashSet<Root>> {
        let roots = Arc::new(roots);
        let mut arriving = lock(&self.arriving);
        arriving.retain(|known| known.strong_count() > 0);
        arriving.push(Arc::downgrade(&roots));
        roots
    }

    /// Work on the store, where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, PayloadError> + Send + 'static,
    ) -> Result<T, PayloadError> {
        let done = spawn_blocking(work).await;
        done.map_err(|error| PayloadError::Source(std::io::Error::other(error)))?
    }

    /// The same for a payload that is known by its root: one that is here or on its way has its room.
    ///
    /// # Errors
    /// As for [`Self::make_room`].
    pub(crate) async fn make_room_for(&self, root: Root, size: u64) -> Result<(), PayloadError> {
        if self.payloads.has(root).is_some() || self.payloads.part(root, size).is_some() {
            return Ok(());
        }
        self.make_room(vec![size]).await
    }

    /// The size of a payload in bytes, as one of its holders can prove.
    ///
    /// # Errors
    /// When nobody is known who has it, or none of them proves a size.
    pub(crate) async fn size_of(&self, root: Root) -> Result<u64, FetchError> {
        if let Some(size) = self.payloads.has(root) {
            return Ok(size);
        }
        let until = Instant::now() + PATIENCE;
        loop {
            let mut last = FetchError::NoHolder { root };
            for holder in self.of(root).await.into_iter().take(MAX_ASKED) {
                match self.data.size_of(&holder, root).await {
                    Ok(size) => return Ok(size),
                    Err(error) => last = error,
                }
            }
            // Who has just got it may not have been heard of.
            let none = matches!(last, FetchError::NoHolder { .. });
            if !none || Instant::now() >= until {
                return Err(last);
            }
            tokio::time::sleep(PATIENCE / 10).await;
        }
    }

    /// Who says that it has this payload, or is fetching it.
    pub(crate) async fn of(&self, root: Root) -> Vec<Holder> {
        let command = Command::Holders(root.into());
        let Some(Reply::Holders(found)) = self.ask(command).await else { return Vec::new() };
        let holder = |(key, addresses): (leasehold_proto::KeyId, _)| Holder {
            key: key.0,
            addresses,
            whole: false,
        };
        found.into_iter().map(holder).collect()
    }

    /// The same of a payload that has it under any of these roots.
    async fn of_any(&self, roots: &[Root]) -> Vec<Holder> {
        let mut all: Vec<Holder> = Vec::new();
        for root in roots {
            for holder in self.of(*root).await {
                if all.iter().all(|known| known.key != holder.key) {
                    all.push(holder);
                }
            }
        }
        all
    }

    /// Fetches a payload from those named and from whoever else has some of it.
    ///
    /// # Errors
    /// When nobody brings it: with what came of those who were named, if they were.
    pub(crate) async fn fetch(
        &self,
        named: Vec<Holder>,
        root: Root,
        size: u64,
        progress: impl FnMut(Progress),
    ) -> Result<FetchStats, FetchError> {
        self.fetch_known_by(&[root], named, (root, size), progress).await
    }

    /// Fetches an index and all that it names: gives what it says, and what it took. `size` is the
    /// index's own, in bytes.
    ///
    /// Whoever has an index is asked for what it names as well. Each comes in an order of its own to
    /// that, so that those who fetch it at the same time soon have different parts of it.
    ///
    /// # Errors
    /// When it is no index, when its files have more than `most` bytes together, when there is no room
    /// for all of it, or when one payload does not come. What came stays.
    pub(crate) async fn fetch_index(
        &self,
        named: Vec<Holder>,
        (root, size): (Root, u64),
        most: u64,
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<(Index, FetchStats), FetchError> {
        let began = Instant::now();
        if size > MAX_BYTES as u64 {
            return Err(PayloadError::NotAnIndex { root, why: IndexError::NoIndex }.into());
        }
        let mut stats = self.fetch(named.clone(), root, size, &mut progress).await?;
        let payloads = self.payloads.clone();
        let index = self.blocking(move || payloads.index(root)).await?;
        if index.size() > most {
            return Err(PayloadError::TooLarge { limit: most }.into());
        }
        // What is here already and what comes first is not to make room for the rest.
        let named_roots = index.payloads().iter().map(|payload| payload.root.into());
        let _spared = self.spare([root].into_iter().chain(named_roots).collect());
        let held =
            |payload: &&Payload| self.payloads.has(payload.root.into()) == Some(payload.size);
        let mut missing: Vec<_> = index.payloads().iter().filter(|p| !held(p)).copied().collect();
        // What is on its way for somebody else has its room.
        let arriving = |p: &Payload| self.payloads.part(p.root.into(), p.size).is_some();
        let to_come = missing.iter().filter(|payload| !arriving(payload));
        self.make_room(to_come.map(|payload| payload.size).collect()).await?;
        let missing_bytes: u64 = missing.iter().map(|payload| payload.size).sum();
        let all = index.payload_bytes().saturating_add(size);
        let now = Progress { bytes: all - missing_bytes, size: all, holders: 0 };
        let moved = Mutex::new(Moved { now, tell: progress });
        let mut seed = [0; 8];
        // Dice that fall alike everywhere would only cost speed.
        let _ = getrandom::fill(&mut seed);
        Dice::new(u64::from_le_bytes(seed)).shuffle(&mut missing);
        let fetches = missing.into_iter().map(|payload| {
            let (named, moved, of) = (named.clone(), &moved, (payload.root.into(), payload.size));
            async move {
                let mut before = 0;
                let told = |now: Progress| {
                    lock(moved).on(before, now.bytes, now.holders);
                    before = now.bytes;
                };
                let fetched = self.fetch_known_by(&[of.0, root], named, of, told).await?;
                lock(moved).on(before, payload.size, 0);
                Ok::<_, FetchError>(fetched)
            }
        });
        let mut fetches = stream::iter(fetches).buffer_unordered(AT_ONCE);
        while let Some(fetched) = fetches.next().await {
            let FetchStats { bytes, holders, .. } = fetched?;
            stats.bytes += bytes;
            for holder in holders {
                if !stats.holders.contains(&holder) {
                    stats.holders.push(holder);
                }
            }
        }
        drop(fetches);
        stats.took = began.elapsed();
        Ok((index, stats))
    }

    /// Fetches a payload that is found by any of these roots.
    async fn fetch_known_by(
        &self,
        known_by: &[Root],
        named: Vec<Holder>,
        (root, size): (Root, u64),
        mut progress: impl FnMut(Progress),
    ) -> Result<FetchStats, FetchError> {
        let mut tries = 1;
        loop {
            self.make_room_for(root, size).await?;
            let fetched = self.bring(known_by, named.clone(), (root, size), &mut progress).await;
            match fetched {
                // Somebody else took the room that was made.
                Err(FetchError::Store(error))
                    if matches!(*error, PayloadError::NoSpace { .. }) && tries < TRIES =>
                {
                    tries += 1;
                }
                fetched => return fetched,
            }
        }
    }

    async fn bring(
        &self,
        known_by: &[Root],
        mut named: Vec<Holder>,
        (root, size): (Root, u64),
        mut progress: impl FnMut(Progress),
    ) -> Result<FetchStats, FetchError> {
        let mut pause = ALONE;
        if named.is_empty() {
            named = self.of_any(known_by).await;
            pause = LOOK;
        }
        let looking = async {
            loop {
                tokio::time::sleep(pause).await;
                pause = LOOK;
                self.data.name_holders(root, size, self.of_any(known_by).await);
            }
        };
        tokio::pin!(looking);
        let fetching = self.data.fetch(named.clone(), root, size, &mut progress);
        let fetched = tokio::select! {
            fetched = fetching => fetched,
            never = &mut looking => never,
        };
        match fetched {
            // Who was named may have said no before others were looked for.
            Err(error) if !matches!(error, FetchError::Store(_)) => {
                let mut others = self.of_any(known_by).await;
                others.retain(|found| named.iter().all(|known| known.key != found.key));
                if others.is_empty() {
                    return Err(error);
                }
                let fetching = self.data.fetch(others, root, size, progress);
                let again = tokio::select! {
                    fetched = fetching => fetched,
                    never = looking => never,
                };
                // What was wrong with the one that was named says more.
                again.map_err(|_| error)
            }
            fetched => fetched,
        }
    }
}

/// Tells the loop which payloads can be had here, whenever that changes.
pub(crate) async fn tell(
    payloads: PayloadStore,
    events: mpsc::Sender<Event>,
    shutdown: CancellationToken,
) {
    let mut changes = payloads.changes();
    let mut told = Vec::new();
    loop {
        changes.mark_unchanged();
        let newest = payloads.newest(MAX_PAYLOADS).into_iter();
        let newest = newest.filter(|root| !payloads.is_private(*root));
        let mut roots: Vec<_> = newest.map(|root| Payloads::brief(&root.into())).collect();
        roots.sort_unstable();
        if roots != told {
            told.clone_from(&roots);
            if events.send(Event::Payloads(roots)).await.is_err() {
                return;
            }
        }
        let more = async {
            tokio::time::sleep(BATCH).await;
            changes.changed().await
        };
        tokio::select! {
            more = more => if more.is_err() { return },
            () = shutdown.cancelled() => return,
        }
    }
}
