//! Connections to others: one per key, dialed when first wanted, kept while in use and a while
//! longer.
//!
//! ```text
//!            connect                 handshake, the key is the expected one
//!   (none) ──────────> Dialing ──────────────────────────────────────────────> Open <──┐ in use
//!      ^                  │ no address answers, another key                      │ └───────┘
//!      └──────────────────┴──── lost, closed by the peer, idle or evicted ───────┘
//! ```
//!
//! Addresses are tried in their order, each a little after the one before it, and the first to
//! finish its handshake wins. A request that meets a connection which died since its last use is
//! asked once more on a new one, where asking twice cannot do twice.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use quinn::{ConnectionError, VarInt};
use thiserror::Error;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::debug;

use super::{
    Shared,
    frame::{Code, FrameError, MAX_RESPONSE, Refused, Response},
    lock, name,
    stream::{FrameReadError, RecvHalf, SendHalf, read_frame},
    tls::Met,
};

/// How long after one address the next is tried (RFC 8305 recommends 250 ms).
const STAGGER: Duration = Duration::from_millis(250);

/// The most addresses of one peer that are tried.
const MAX_ADDRESSES: usize = 8;

/// Why a peer could not be asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LinkError {
    /// No address answered.
    #[error("{} cannot be reached: {reason}", name(peer))]
    Unreachable {
        /// The key that was dialed.
        peer: [u8; 32],
        /// What each address said.
        reason: String,
    },
    /// Someone else answered.
    #[error("{} was dialed and {} answered", name(expected), name(found))]
    WrongKey {
        /// The key that was dialed.
        expected: [u8; 32],
        /// The key that was met.
        found: [u8; 32],
    },
    /// The peer does not admit this node.
    #[error("{} does not admit this node", name(peer))]
    NotAdmitted {
        /// The key that was dialed.
        peer: [u8; 32],
    },
    /// The connection ended before the answer.
    #[error("the connection to {} was lost: {reason}", name(peer))]
    Lost {
        /// The peer.
        peer: [u8; 32],
        /// How it ended.
        reason: String,
    },
    /// The peer gave the stream up instead of answering.
    #[error("{} gave the stream up: {}", name(peer), code.map_or("unknown code", Code::reason))]
    Reset {
        /// The peer.
        peer: [u8; 32],
        /// Its code, if it is a known one.
        code: Option<Code>,
    },
    /// The peer said no.
    #[error("{} refused: {refused}", name(peer))]
    Refused {
        /// The peer.
        peer: [u8; 32],
        /// What it said.
        refused: Refused,
    },
    /// The peer's answer is no frame.
    #[error("{} answered with a malformed frame: {error}", name(peer))]
    Malformed {
        /// The peer.
        peer: [u8; 32],
        /// What is wrong with it.
        error: FrameError,
    },
    /// The peer did not answer in time.
    #[error("{} did not answer within {} s", name(peer), after.as_secs_f32())]
    Silent {
        /// The peer.
        peer: [u8; 32],
        /// How long it had.
        after: Duration,
    },
    /// The request itself is over its bound.
    #[error("the request cannot be sent: {0}")]
    Request(FrameError),
    /// As many connections as allowed are in use.
    #[error("all {0} outgoing connections are in use: try again later")]
    Busy(usize),
    /// The data plane of this node is closed.
    #[error("the data plane of this node is closed")]
    Closed,
}

/// A connection that was dialed. Those who use it hold a clone; the pool holds one more.
#[derive(Debug)]
pub(super) struct Dialed {
    pub(super) connection: quinn::Connection,
    idle_since: Mutex<Option<Instant>>,
}

/// Keeps a dialed connection from being closed as idle.
pub(super) type InUse = Arc<Dialed>;

type Slot = Arc<tokio::sync::Mutex<Option<InUse>>>;

/// The dialed connections, by key.
#[derive(Debug, Default)]
pub(super) struct Pool {
    slots: Mutex<HashMap<[u8; 32], Slot>>,
}

/// A stream on which a request was answered.
pub(super) struct Answered {
    pub(super) send: SendHalf,
    pub(super) recv: RecvHalf,
    pub(super) response: Response,
}

/// A request that failed, and whether the peer can have acted on it.
struct Failed {
    error: LinkError,
    /// The connection broke: a new one may do better.
    lost: bool,
    /// The peer may have seen the request.
    seen: bool,
}

impl Shared {
    /// Sends `frame` to `peer` and reads the response. `repeatable` says that the peer may be
    /// asked twice where a connection breaks between request and response.
    pub(super) async fn request(
        self: &Arc<Self>,
        peer: [u8; 32],
        addresses: &[SocketAddr],
        frame: &[u8],
        repeatable: bool,
    ) -> Result<Answered, LinkError> {
        let (link, reused) = self.connect(peer, addresses).await?;
        match self.ask(peer, &link, frame).await {
            Err(failed) if reused && failed.lost && (repeatable || !failed.seen) => {
                debug!(peer = %name(&peer), error = %failed.error, "dialing once more");
                drop(link);
                let (link, _) = self.connect(peer, addresses).await?;
                self.ask(peer, &link, frame).await.map_err(|failed| failed.error)
            }
            asked => asked.map_err(|failed| failed.error),
        }
    }

    async fn ask(&self, peer: [u8; 32], link: &InUse, frame: &[u8]) -> Result<Answered, Failed> {
        let after = self.config.stall;
        let silent = |seen| Failed { error: LinkError::Silent { peer, after }, lost: false, seen };
        let (send, recv) = match timeout(after, link.connection.open_bi()).await {
            Ok(Ok(halves)) => halves,
            Ok(Err(e)) => return Err(lost(peer, &e, false)),
            Err(_) => return Err(silent(false)),
        };
        let mut send = SendHalf::new(send, Some(link.clone()));
        let mut recv = RecvHalf::new(recv, Some(link.clone()));
        let exchange = async {
            // A write fails where the peer stops the stream; its response says why.
            let written = send.stream.write_all(frame).await;
            if let Err(quinn::WriteError::ConnectionLost(e)) = written {
                return Err(lost(peer, &e, false));
            }
            let frame = read_frame(&mut recv.stream, MAX_RESPONSE).await.map_err(|e| {
                let error = match e {
                    FrameReadError::Frame(error) => LinkError::Malformed { peer, error },
                    FrameReadError::Read(quinn::ReadError::ConnectionLost(e)) => {
                        return lost(peer, &e, true);
                    }
                    FrameReadError::Read(quinn::ReadError::Reset(code)) => {
                        LinkError::Reset { peer, code: Code::from_u64(code.into_inner()) }
                    }
                    e => LinkError::Lost { peer, reason: e.to_string() },
                };
                Failed { error, lost: false, seen: true }
            })?;
            Response::decode(&frame).map_err(|error| Failed {
                error: LinkError::Malformed { peer, error },
                lost: false,
                seen: true,
            })
        };
        let response = timeout(after, exchange).await.map_err(|_| silent(true))??;
        Ok(Answered { send, recv, response })
    }

    /// The open connection to `peer`, or a new one; and whether it was there before.
    async fn connect(
        self: &Arc<Self>,
        peer: [u8; 32],
        addresses: &[SocketAddr],
    ) -> Result<(InUse, bool), LinkError> {
        let slot = self.slot(peer)?;
        // Held while dialing, so that two who want the same peer share one connection.
        let mut open = slot.lock().await;
        if let Some(dialed) = open.as_ref().filter(|d| d.connection.close_reason().is_none()) {
            return Ok((dialed.clone(), true));
        }
        let connection = self.dial(peer, addresses).await?;
        let dialed = Arc::new(Dialed { connection, idle_since: Mutex::default() });
        *open = Some(dialed.clone());
        drop(open);
        self.share_windows();
        Ok((dialed, false))
    }

    fn slot(&self, peer: [u8; 32]) -> Result<Slot, LinkError> {
        let max = self.config.max_dialed;
        let mut slots = lock(&self.pool.slots);
        if !slots.contains_key(&peer) && slots.len() >= max {
            slots.retain(|_, slot| !close_unused(slot, Duration::ZERO));
            if slots.len() >= max {
                return Err(LinkError::Busy(max));
            }
        }
        Ok(slots.entry(peer).or_default().clone())
    }

    async fn dial(
        self: &Arc<Self>,
        peer: [u8; 32],
        addresses: &[SocketAddr],
    ) -> Result<quinn::Connection, LinkError> {
        let mut attempts = JoinSet::new();
        for (i, address) in (0u32..).zip(addresses.iter().copied().take(MAX_ADDRESSES)) {
            let shared = self.clone();
            attempts.spawn(async move {
                sleep(STAGGER * i).await;
                shared.attempt(peer, address).await
            });
        }
        let mut reasons = Vec::new();
        while let Some(attempt) = attempts.join_next().await {
            match attempt {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(LinkError::Unreachable { reason, .. })) => reasons.push(reason),
                // Someone answered: that says more than the silence of other addresses.
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(LinkError::Closed),
            }
        }
        if reasons.is_empty() {
            reasons.push("no address of it is known".to_owned());
        }
        Err(LinkError::Unreachable { peer, reason: reasons.join("; ") })
    }

    async fn attempt(
        &self,
        peer: [u8; 32],
        address: SocketAddr,
    ) -> Result<quinn::Connection, LinkError> {
        let unreachable = |why: &dyn std::fmt::Display| LinkError::Unreachable {
            peer,
            reason: format!("{address}: {why}"),
        };
        let met = Met::default();
        let tls = self.identity.client(peer, met.clone()).map_err(|e| unreachable(&e))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(self.dialed_transport.clone());
        // The name is not sent and not checked: the key is.
        let endpoint = self.endpoint().ok_or(LinkError::Closed)?;
        let connecting = match endpoint.connect_with(config, address, "leasehold") {
            Err(quinn::ConnectError::EndpointStopping) => return Err(LinkError::Closed),
            connecting => connecting.map_err(|e| unreachable(&e))?,
        };
        match timeout(self.config.handshake_timeout, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(e)) => Err(match (met.get(), &e) {
                (Some(found), _) if *found != peer => {
                    LinkError::WrongKey { expected: peer, found: *found }
                }
                (_, ConnectionError::LocallyClosed) => LinkError::Closed,
                (_, ConnectionError::ApplicationClosed(_)) => lost(peer, &e, false).error,
                _ => unreachable(&e),
            }),
            Err(_) => Err(unreachable(&"no answer")),
        }
    }

    /// Closes dialed connections that nobody uses, from time to time.
    pub(super) async fn close_idle(self: Arc<Self>) {
        loop {
            sleep(self.config.idle_close / 4).await;
            let idle = self.config.idle_close;
            lock(&self.pool.slots).retain(|_, slot| !close_unused(slot, idle));
            self.share_windows();
        }
    }

    /// The open dialed connections.
    pub(super) fn dialed(&self) -> Vec<quinn::Connection> {
        let slots = lock(&self.pool.slots);
        let open = slots.values().filter_map(|slot| {
            let connection = slot.try_lock().ok()?.as_ref()?.connection.clone();
            connection.close_reason().is_none().then_some(connection)
        });
        open.collect()
    }

    /// Forgets all dialed connections, which lets go of the endpoint's socket.
    pub(super) fn forget_dialed(&self) {
        lock(&self.pool.slots).clear();
    }

    pub(super) fn close_dialed(&self, peer: [u8; 32], code: Code) {
        let slot = lock(&self.pool.slots).get(&peer).cloned();
        if let Some(open) = slot.as_ref().and_then(|slot| slot.try_lock().ok())
            && let Some(dialed) = open.as_ref()
        {
            close(&dialed.connection, code);
        }
    }
}

/// Closes the connection in `slot` if nobody has used it for `idle`. Whether the slot is empty
/// now, and not wanted.
fn close_unused(slot: &Slot, idle: Duration) -> bool {
    // Whoever waits for the slot, or dials in it, holds a clone.
    if Arc::strong_count(slot) > 1 {
        return false;
    }
    let Ok(open) = slot.try_lock() else { return false };
    let Some(dialed) = open.as_ref() else { return true };
    if dialed.connection.close_reason().is_some() {
        return true;
    }
    let mut since = lock(&dialed.idle_since);
    if Arc::strong_count(dialed) > 1 {
        *since = None;
        return false;
    }
    if since.get_or_insert_with(Instant::now).elapsed() < idle {
        return false;
    }
    close(&dialed.connection, Code::Idle);
    true
}

pub(super) fn close(connection: &quinn::Connection, code: Code) {
    connection.close(VarInt::from_u32(code as u32), code.reason().as_bytes());
}

/// What a broken connection means for a request. After a stateless reset the peer knows nothing
/// of the connection, so it cannot have acted on what was sent there.
fn lost(peer: [u8; 32], e: &ConnectionError, seen: bool) -> Failed {
    let seen = seen && *e != ConnectionError::Reset;
    Failed { error: link_error(peer, e), lost: true, seen }
}

/// What a broken connection is called.
pub(super) fn link_error(peer: [u8; 32], e: &ConnectionError) -> LinkError {
    match e {
        ConnectionError::LocallyClosed => LinkError::Closed,
        ConnectionError::ApplicationClosed(closed) => {
            match Code::from_u64(closed.error_code.into_inner()) {
                Some(Code::NotAdmitted) => LinkError::NotAdmitted { peer },
                // Our own words for the code; the peer's stay unread.
                Some(code) => LinkError::Lost { peer, reason: code.reason().to_owned() },
                None => LinkError::Lost { peer, reason: "closed for an unknown reason".to_owned() },
            }
        }
        ConnectionError::Reset => {
            LinkError::Lost { peer, reason: "the peer has restarted".to_owned() }
        }
        e => LinkError::Lost { peer, reason: e.to_string() },
    }
}
