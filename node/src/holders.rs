//! Who has a payload: those it was named for, and those who say so by gossip.

use std::time::Duration;

use leasehold_proto::Hash;
use leasehold_proto::core::{Command, Event, Reply};
use leasehold_proto::words::record::{MAX_PAYLOADS, Payloads};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::data::{Data, FetchError, FetchStats, Holder, Progress};
use crate::handle::Asked;
use crate::payload::{PayloadStore, Root};

/// How long those who are named have before others are looked for: a small payload is here by then.
const ALONE: Duration = Duration::from_millis(100);
/// How often others are looked for while a payload is on its way.
const LOOK: Duration = Duration::from_secs(1);
/// How long changes of what is held wait for others.
const BATCH: Duration = Duration::from_millis(50);

/// Fetches payloads from all who have them.
#[derive(Clone, Debug)]
pub(crate) struct Holders {
    data: Data,
    commands: mpsc::Sender<Asked>,
}

impl Holders {
    pub(crate) const fn new(data: Data, commands: mpsc::Sender<Asked>) -> Self {
        Self { data, commands }
    }

    /// Who says that it has this payload, or is fetching it.
    pub(crate) async fn of(&self, root: Root) -> Vec<Holder> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Holders(Hash(*root.as_bytes()));
        if self.commands.send((command, reply)).await.is_err() {
            return Vec::new();
        }
        let Ok(Ok(Reply::Holders(found))) = answer.await else { return Vec::new() };
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
        progress: impl FnMut(Progress),
    ) -> Result<FetchStats, FetchError> {
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
        tokio::select! {
            fetched = self.data.fetch(named, root, size, progress) => fetched,
            never = looking => never,
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
        let mut roots: Vec<_> =
            newest.map(|root| Payloads::brief(&Hash(*root.as_bytes()))).collect();
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
