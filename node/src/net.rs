//! The links between nodes: opaque frames, asked and answered, over QUIC.
//!
//! This edge knows nothing of what frames mean. The loop decodes and verifies them, decides which
//! peers are admitted, and closes what it does not want.
//!
//! ```text
//!   loop --NetCommand--> [bounded] --> the swarm's task --> libp2p: QUIC, request-response
//!   loop <--NetEvent---- [bounded] <--      (edge)      <-- its connections' tasks
//! ```
//! * One link per peer, however many connections it is made of: two nodes that dial each other at
//!   once have two, and that is normal. [`NetEvent::Linked`] comes with the first,
//!   [`NetEvent::Unlinked`] with the end of the last.
//! * Every [`NetCommand::Ask`] is followed by exactly one [`NetEvent::Answered`] or
//!   [`NetEvent::Unanswered`] with its token, until the net closes. An `Unanswered` does not tell
//!   whether the peer has seen the request.
//! * A request of a peer gets a ticket. The loop answers with [`NetCommand::Reply`]; a ticket that
//!   is not used within [`Limits::request_timeout`] lapses.
//! * A peer is unadmitted until [`NetCommand::Admit`]: until then little is read from it (see
//!   [`Limits`]), and without it the link ends after [`Limits::unadmitted_time`]. Admission ends
//!   with the link. A peer that breaks the frame rules loses the link at once.
//! * *Back-pressure.* When the loop is slow, its event channel fills, the swarm is no longer
//!   polled, the connections' tasks wait, and QUIC's windows close towards the peers. Links stay
//!   up meanwhile, since QUIC's own tasks send the keep-alives. [`Net::send`] never waits: a loop
//!   that waited for the net while the net waits for the loop would stand still for ever.
//!
//! libp2p is named in this module only.

mod address;
mod behaviour;
mod codec;
mod limits;
mod stats;
mod swarm;
mod terms;
#[cfg(test)]
mod tests;

use std::{borrow::Cow, fmt, io, net::SocketAddr, sync::Arc};

use thiserror::Error;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_util::sync::CancellationToken;

pub use limits::Limits;
pub use stats::{NetCounts, NetStats};

/// A node's raw Ed25519 public key.
pub type PeerKey = [u8; 32];

/// What [`Net::start`] needs.
#[derive(Clone)]
pub struct NetConfig {
    /// The node's Ed25519 seed (RFC 8032 private key), 32 bytes.
    pub seed: [u8; 32],
    /// Where to listen, UDP. Port 0 takes a free one. Empty: the node only dials.
    pub listen: Vec<SocketAddr>,
    /// The bounds of the links.
    pub limits: Limits,
}

impl fmt::Debug for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetConfig")
            .field("listen", &self.listen)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What the loop tells the net to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetCommand {
    /// Makes a link. Followed by [`NetEvent::Linked`] or [`NetEvent::DialFailed`]; by neither if
    /// the peer is linked already.
    Dial {
        /// Who is expected there. `None`: whoever it is, as with a first address from a person;
        /// the addresses are then tried one after another until one answers.
        peer: Option<PeerKey>,
        /// Where. For a known peer the addresses fed earlier are tried too.
        addresses: Vec<SocketAddr>,
    },
    /// Sends a request. A peer without a link is dialed first, at the addresses known of it.
    Ask {
        /// Whom.
        peer: PeerKey,
        /// Comes back with the answer.
        token: u64,
        /// At most [`Limits::frame_admitted`] bytes.
        frame: Vec<u8>,
    },
    /// Answers a request. A ticket that is unknown, used or lapsed is ignored and counted.
    Reply {
        /// From [`NetEvent::Asked`].
        ticket: u64,
        /// At most [`Limits::frame_admitted`] bytes.
        frame: Vec<u8>,
    },
    /// Ends the link with a peer, all its connections.
    Disconnect {
        /// With whom.
        peer: PeerKey,
        /// Why, for [`NetEvent::Unlinked`] and the log. The peer is not told.
        why: Cow<'static, str>,
    },
    /// Closes the connections of a peer but for the newest: its process is another one since, and
    /// what is said over the others is heard by nobody until they time out.
    CloseOlder {
        /// Whose.
        peer: PeerKey,
    },
    /// Lifts the limits of an unadmitted peer for as long as it stays linked.
    Admit {
        /// Whom.
        peer: PeerKey,
    },
    /// Remembers where a peer is.
    AddAddresses {
        /// Who.
        peer: PeerKey,
        /// Where, the best first.
        addresses: Vec<SocketAddr>,
    },
}

/// What the net tells the loop.
#[derive(Debug, PartialEq, Eq)]
pub enum NetEvent {
    /// There is a link with this peer now.
    Linked {
        /// Its key, proven in the handshake.
        peer: PeerKey,
        /// Its address. Nodes dial from the port they listen on, so it can be dialed back.
        address: SocketAddr,
        /// Whether this node dialed.
        outbound: bool,
    },
    /// The last connection of the link is gone.
    Unlinked {
        /// Whose.
        peer: PeerKey,
        /// Why.
        why: UnlinkReason,
    },
    /// A peer asks.
    Asked {
        /// Who.
        peer: PeerKey,
        /// For [`NetCommand::Reply`].
        ticket: u64,
        /// Its bytes, unverified.
        frame: Vec<u8>,
    },
    /// The answer to an [`NetCommand::Ask`].
    Answered {
        /// Who answered.
        peer: PeerKey,
        /// From the ask.
        token: u64,
        /// Its bytes, unverified.
        frame: Vec<u8>,
    },
    /// There will be no answer to an [`NetCommand::Ask`].
    Unanswered {
        /// Who was asked.
        peer: PeerKey,
        /// From the ask.
        token: u64,
        /// Why.
        why: AskFailure,
    },
    /// A [`NetCommand::Dial`] has not led to a link.
    DialFailed {
        /// From the dial.
        peer: Option<PeerKey>,
        /// From the dial.
        addresses: Vec<SocketAddr>,
        /// Why; for several addresses, why the last one failed.
        why: DialFailure,
    },
}

/// Why a link ended.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UnlinkReason {
    /// The loop said so.
    #[error("disconnected: {0}")]
    Disconnected(Cow<'static, str>),
    /// The peer was not admitted in time.
    #[error("not admitted in time")]
    NotAdmitted,
    /// The peer broke the frame rules.
    #[error("broke the frame rules: {0}")]
    BrokeRules(Violation),
    /// This node's net closes.
    #[error("this node closes")]
    Closing,
    /// The peer closed it, fell silent for [`Limits::idle_timeout`], or its host cannot be
    /// reached; the text says which, for people.
    #[error("lost: {0}")]
    Lost(String),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AskFailure {
    /// No link, and no known address of the peer led to one.
    #[error("the peer cannot be reached at any known address")]
    Unreachable,
    /// No answer within [`Limits::request_timeout`].
    #[error("no answer in time")]
    TimedOut,
    /// The link ended first.
    #[error("the link ended before the answer")]
    LinkClosed,
    /// The peer dropped the request without an answer: it is overloaded, or its loop let the
    /// ticket lapse.
    #[error("the peer dropped the request")]
    NoReply,
    /// The answer broke the frame rules. The link is closed.
    #[error("the answer broke the frame rules: {0}")]
    BrokeRules(Violation),
    /// The frame is above [`Limits::frame_admitted`]; it was not sent.
    #[error("the frame has {length} bytes, above the bound of {bound}; send less at once")]
    TooLarge {
        /// Of the frame, in bytes.
        length: usize,
        /// The bound, in bytes.
        bound: usize,
    },
    /// Too much is in flight on this node already: ask later.
    #[error("too much in flight on this node; ask later")]
    Busy,
    /// The peer is this node.
    #[error("a node does not ask itself")]
    Myself,
    /// The peer's end of the stream failed; the text is for people.
    #[error("the stream failed: {0}")]
    Stream(String),
}

/// Why a dial failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DialFailure {
    /// Another key answered there.
    #[error("another key answers at {address}; the peer's address is out of date")]
    WrongKey {
        /// The key that answered, if it is an Ed25519 key.
        found: Option<PeerKey>,
        /// Where.
        address: SocketAddr,
    },
    /// This node answered itself.
    #[error("the address is this node's own")]
    Myself,
    /// No address given and none known.
    #[error("no address is known; give one")]
    NoAddress,
    /// A connection limit of this node, or the other end's key type, said no.
    #[error("turned away by this node: {0}")]
    TurnedAway(String),
    /// Nobody answered; the text is for people.
    #[error("unreachable: {0}")]
    Unreachable(String),
}

/// A broken frame rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Violation {
    /// A frame was announced longer than the bound.
    #[error("a frame of {length} bytes was announced, above the bound of {bound}")]
    Oversize {
        /// As announced, in bytes.
        length: usize,
        /// The bound, in bytes.
        bound: usize,
    },
    /// More bytes came behind the frame.
    #[error("bytes came behind the frame")]
    Trailing,
}

/// Why the net did not start.
#[derive(Debug, Error)]
pub enum NetError {
    /// The port is taken.
    #[error(
        "UDP port {} of {} is in use: stop what runs there (another node?) or listen elsewhere",
        address.port(), address.ip()
    )]
    PortInUse {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// What was to be bound.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The TLS library would write session keys to a file.
    #[error("SSLKEYLOGFILE is set, which would write the keys of all links to a file: unset it")]
    KeyLog,
}

/// Why a command was not taken. It comes back inside.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SendError {
    /// The command queue is full: keep the command and send it later.
    #[error("the net is busy; send the command later")]
    Busy(NetCommand),
    /// The net has closed.
    #[error("the net has closed")]
    Closed(NetCommand),
}

/// The handle to the running net. Clones share it; when the last one is dropped the net closes.
#[derive(Debug, Clone)]
pub struct Net {
    commands: mpsc::Sender<NetCommand>,
    closing: CancellationToken,
    closed: CancellationToken,
    stats: Arc<NetStats>,
    key: PeerKey,
}

impl Net {
    /// Binds the addresses and runs the swarm in a task of the ambient tokio runtime.
    ///
    /// Also returns the events, which the loop has to keep reading, and the addresses that were
    /// really bound, in the order of `config.listen`.
    ///
    /// # Errors
    /// An address cannot be bound, or the environment would leak session keys ([`NetError`]).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn start(
        config: NetConfig,
    ) -> Result<(Self, mpsc::Receiver<NetEvent>, Vec<SocketAddr>), NetError> {
        // libp2p-tls installs rustls' `KeyLogFile`, which this variable switches on.
        if std::env::var_os("SSLKEYLOGFILE").is_some() {
            return Err(NetError::KeyLog);
        }
        swarm::start(config).await
    }

    /// Gives a command to the net, without waiting.
    ///
    /// # Errors
    /// The queue is full or the net has closed; the command comes back ([`SendError`]).
    pub fn send(&self, command: NetCommand) -> Result<(), SendError> {
        self.commands.try_send(command).map_err(|refused| match refused {
            TrySendError::Full(command) => SendError::Busy(command),
            TrySendError::Closed(command) => SendError::Closed(command),
        })
    }

    /// This node's public key.
    pub fn key(&self) -> PeerKey {
        self.key
    }

    /// The running counters.
    pub fn stats(&self) -> &Arc<NetStats> {
        &self.stats
    }

    /// Ends all links, so that peers see it at once, and the task. Takes at most a second. The
    /// loop sees [`NetEvent::Unlinked`] where its channel has room, then the channel's end.
    pub async fn close(&self) {
        self.closing.cancel();
        self.closed.cancelled().await;
    }
}
