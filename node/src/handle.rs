//! What the inside of a running node looks like from the API: a bounded way to ask the loop, and
//! the data plane beside it. Nobody outside holds the core or a lock on it.

use std::net::SocketAddr;
use std::sync::Arc;

use leasehold_proto::core::{Command, Failure, InUse, Reply, View};
use leasehold_proto::proof::Proof;
use leasehold_proto::words::index::Index;
use leasehold_proto::words::sign::{Signed, Signer};
use leasehold_proto::{KeyId, LeaseId};
use tokio::sync::{mpsc, oneshot};

use crate::api_key::Keys;
use crate::attach::{self, AttachError, Attached};
use crate::batch::Batches;
use crate::data::{Data, FetchError, FetchStats, Holder, Progress};
use crate::gateway;
use crate::holders::Holders;
use crate::model::Models;
use crate::payload::{PayloadError, PayloadStore, Room, Root};
use crate::records::{self, ProofError};
use crate::run::Counts;
use crate::store::Store;

/// A command with the way its reply goes back.
pub(crate) type Asked = (Command, oneshot::Sender<Result<Reply, Failure>>);

/// A running node, seen from its API. Clones share it.
#[derive(Clone, Debug)]
pub struct Handle {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    commands: mpsc::Sender<Asked>,
    facts: Facts,
    signer: Arc<Signer>,
    store: Store,
    payloads: PayloadStore,
    data: Data,
    holders: Holders,
    models: Hosted,
    counts: Arc<Counts>,
}

/// What belongs to hosted models.
#[derive(Clone, Debug)]
pub(crate) struct Hosted {
    pub(crate) models: Models,
    pub(crate) keys: Keys,
    pub(crate) batches: Batches,
    /// On what terms models of other nodes are asked.
    pub(crate) terms: gateway::Terms,
    /// What that has counted, once it is there.
    pub(crate) asked: Arc<gateway::Counts>,
}

/// What does not change while a node runs.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its key.
    pub me: KeyId,
    /// Its name.
    pub name: String,
    /// The software's version.
    pub version: &'static str,
    /// Where links are taken.
    pub link: Vec<SocketAddr>,
    /// Where liveness packets are taken.
    pub probe: SocketAddr,
    /// Where payloads and job streams are served.
    pub data: SocketAddr,
    /// The fabric's first charter.
    pub charter: Signed,
    /// The currency of every amount: a fabric's never changes.
    pub currency: String,
    /// The mandate under which this node orders, if any.
    pub mandate: Option<Signed>,
}

/// Why the loop gave no reply.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The command came to nothing.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopped,
}

impl Handle {
    pub(crate) fn new(
        commands: mpsc::Sender<Asked>,
        facts: Facts,
        signer: Arc<Signer>,
        store: Store,
        payloads: PayloadStore,
        (data, holders, models): (Data, Holders, Hosted),
        counts: Arc<Counts>,
    ) -> Self {
        let inner =
            Inner { commands, facts, signer, store, payloads, data, holders, models, counts };
        Self { inner: Arc::new(inner) }
    }

    /// What does not change.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    /// Gives a command and waits for what it comes to.
    ///
    /// # Errors
    /// When it came to nothing, or the node is stopping.
    pub async fn ask(&self, command: Command) -> Result<Reply, AskError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.inner.commands.send((command, reply)).await;
        sent.map_err(|_| AskError::Stopped)?;
        Ok(answer.await.map_err(|_| AskError::Stopped)??)
    }

    /// How things stand now.
    ///
    /// # Errors
    /// When the node is stopping.
    pub async fn view(&self) -> Result<View, AskError> {
        match self.ask(Command::View).await? {
            Reply::View(view) => Ok(*view),
            _ => Err(AskError::Stopped),
        }
    }

    /// The payloads held here.
    #[must_use]
    pub fn payloads(&self) -> &PayloadStore {
        &self.inner.payloads
    }

    /// The data plane, for its figures.
    #[must_use]
    pub fn data(&self) -> &Data {
        &self.inner.data
    }

    /// The models of this node, and what it asks of others.
    #[must_use]
    pub(crate) fn hosted(&self) -> &Hosted {
        &self.inner.models
    }

    /// The store, for its figures.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// What the loop counts.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.inner.counts
    }

    /// Opens the output of the job under a held lease, from the given offsets on, and follows it
    /// until the job has ended. The last frame says how.
    ///
    /// # Errors
    /// When this node does not hold the lease, or the lessor cannot be reached or refuses.
    pub async fn attach(
        &self,
        lease: LeaseId,
        stdout: u64,
        stderr: u64,
    ) -> Result<Attached, AttachError> {
        let (lessor, addresses) = match self.ask(Command::Lessor(lease)).await {
            Ok(Reply::Reached(lessor, addresses)) => (lessor, addresses),
            Err(AskError::Failed(_)) => return Err(AttachError::NotHeld(lease)),
            _ => return Err(AttachError::Stopped),
        };
        attach::open(&self.inner.data, lessor, addresses, lease, stdout, stderr).await
    }

    /// Fetches a payload, verified while it streams, from `holder` if one is named, which should
    /// have all of it, and from whoever else has some; nothing is sent when it is here already.
    ///
    /// # Errors
    /// When nobody can be reached who holds it, or those who do send wrong bytes.
    pub async fn fetch(
        &self,
        holder: Option<KeyId>,
        root: Root,
        size: u64,
        progress: impl FnMut(Progress),
    ) -> Result<FetchStats, FetchError> {
        let mut named = Vec::new();
        if let Some(holder) = holder {
            let addresses = match self.ask(Command::Reach(holder)).await {
                Ok(Reply::Reached(_, addresses)) => addresses,
                _ => Vec::new(),
            };
            named.push(Holder { key: holder.0, addresses, whole: true });
        }
        self.inner.holders.fetch(named, root, size, progress).await
    }

    /// Fetches an index of `size` bytes and all that it names, from whoever has some of it.
    ///
    /// # Errors
    /// When it is no index, when there is no room for all of it, or when nobody brings some of it:
    /// what came stays.
    pub async fn fetch_index(
        &self,
        root: Root,
        size: u64,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<(Index, FetchStats), FetchError> {
        self.inner.holders.fetch_index(Vec::new(), (root, size), u64::MAX, progress).await
    }

    /// Which payloads are not to be removed, with those that the indexes among them name, but for
    /// `without` and what only that names.
    ///
    /// # Errors
    /// When that cannot be told, because the node stops or an index cannot be read.
    pub async fn in_use(&self, without: Option<Root>) -> Result<InUse, AskError> {
        self.inner.holders.in_use(without).await.ok_or(AskError::Stopped)
    }

    /// Who else says that it has a payload, or is fetching it.
    pub async fn holders(&self, root: Root) -> Vec<KeyId> {
        let holders = self.inner.holders.of(root).await;
        holders.into_iter().map(|holder| KeyId(holder.key)).collect()
    }

    /// How many bytes a payload has, as one of its holders proves.
    ///
    /// # Errors
    /// When nobody is known who has it, or none proves a size.
    pub async fn size_of(&self, root: Root) -> Result<u64, FetchError> {
        self.inner.holders.size_of(root).await
    }

    /// Takes room for a payload of so many bytes.
    ///
    /// # Errors
    /// When there is not enough for it, whatever is removed.
    pub async fn take_room(&self, size: u64) -> Result<Room, PayloadError> {
        self.inner.holders.take_room(size).await
    }

    /// Sees to room for a payload that is known by its root, unless it is here or on its way.
    ///
    /// # Errors
    /// As for [`Handle::take_room`].
    pub async fn make_room_for(&self, root: Root, size: u64) -> Result<(), PayloadError> {
        self.inner.holders.make_room_for(root, size).await
    }

    /// Everything that proves a lease this node granted or holds, as kept on disk.
    ///
    /// # Errors
    /// When no such lease was ever kept here, or what was kept does not read.
    pub async fn proof(&self, lease: LeaseId) -> Result<Proof, ProofError> {
        let Inner { store, signer, facts, .. } = &*self.inner;
        records::proof(store, signer, &facts.charter, lease).await
    }
}
