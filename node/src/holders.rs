//! Who has a payload: those it was named for, and those who say so by gossip; and the room for one
//! that is to come.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use leasehold_proto::core::{Command, Event, InUse, Reply};
use leasehold_proto::words::record::{MAX_PAYLOADS, Payloads};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::data::{Data, FetchError, FetchStats, Holder, Progress};
use crate::handle::Asked;
use crate::payload::{PayloadError, PayloadStore, Root};

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
}

impl Holders {
    pub(crate) fn new(data: Data, payloads: PayloadStore, commands: mpsc::Sender<Asked>) -> Self {
        Self { data, payloads, commands, awaited: Arc::default() }
    }

    /// Somebody is to come for this payload: others make room before it does, as long as it is one
    /// of the newest.
    pub(crate) fn awaits(&self, root: Root) {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// Which payloads are not to be removed.
    pub(crate) async fn in_use(&self) -> InUse {
        match self.ask(Command::InUse).await {
            Some(Reply::InUse(in_use)) => in_use,
            _ => InUse::default(),
        }
    }

    /// Sees to room for a payload of `size` bytes, at the cost of those that nobody uses.
    ///
    /// # Errors
    /// When there is not enough for it, whatever is removed.
    pub(crate) async fn make_room(&self, size: u64) -> Result<(), PayloadError> {
        match self.payloads.check_room(size) {
            Err(PayloadError::NoSpace { .. }) => {}
            checked => return checked,
        }
        let Some(Reply::InUse(in_use)) = self.ask(Command::InUse).await else {
            return self.payloads.check_room(size);
        };
        let spared = in_use.pinned.into_iter().chain(in_use.leased);
        let mut spared: HashSet<_> = spared.map(Root::from).collect();
        spared.extend(self.awaited.lock().unwrap_or_else(PoisonError::into_inner).iter());
        let payloads = self.payloads.clone();
        let made = tokio::task::spawn_blocking(move || payloads.make_room(size, &spared)).await;
        made.map_err(|error| PayloadError::Source(std::io::Error::other(error)))?.map(drop)
    }

    /// The same for a payload that is known by its root: one that is here or on its way has its room.
    ///
    /// # Errors
    /// As for [`Self::make_room`].
    pub(crate) async fn make_room_for(&self, root: Root, size: u64) -> Result<(), PayloadError> {
        if self.payloads.has(root).is_some() || self.payloads.part(root, size).is_some() {
            return Ok(());
        }
        self.make_room(size).await
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

    /// Fetches a payload from those named and from whoever else has some of it.
    ///
    /// # Errors
    /// When nobody brings it: with what came of those who were named, if they were.
    pub(crate) async fn fetch(
        &self,
        mut named: Vec<Holder>,
        root: Root,
        size: u64,
        mut progress: impl FnMut(Progress),
    ) -> Result<FetchStats, FetchError> {
        self.make_room_for(root, size).await?;
        let mut pause = ALONE;
        if named.is_empty() {
            named = self.of(root).await;
            pause = LOOK;
        }
        let looking = async {
            loop {
                tokio::time::sleep(pause).await;
                pause = LOOK;
                self.data.name_holders(root, size, self.of(root).await);
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
                let mut others = self.of(root).await;
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
