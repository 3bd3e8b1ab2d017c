//! What the core wants of the world, in an order that has meaning.
//!
//! No effect but [`Effect::Packet`] may leave before every [`Effect::Keep`] emitted before it, in
//! this batch or an earlier one, is durable. Drafts are signed by the shell after that barrier.

use std::net::SocketAddr;

use crate::base::id::{Hash, KeyId, LeaseId};
use crate::base::money::Amount;
use crate::base::resource::Resources;
use crate::base::time::{Boot, Span};
use crate::words::contract::{Class, EndReason, JobSpec};
use crate::words::message::Utterance;
use crate::words::model::{ModelTerms, Tally};
use crate::words::sign::Draft;

use super::event::{CommandId, Failure, Reply, Ticket, Token};
use super::kept::Kept;

/// One thing to do.
#[derive(Debug)]
pub enum Effect {
    /// Make this durable.
    Keep(Kept),
    /// Ask an admitted peer something; an answer or [`super::Event::Unanswered`] must follow.
    Ask {
        /// Whom.
        to: KeyId,
        /// By which the answer is known.
        token: Token,
        /// What.
        what: Utterance,
    },
    /// Answer a peer's question.
    Reply {
        /// Which question.
        ticket: Ticket,
        /// What.
        what: Utterance,
    },
    /// Try to link with a peer.
    Dial {
        /// Whom; `None` when only an address is known.
        peer: Option<KeyId>,
        /// Where.
        addresses: Vec<SocketAddr>,
    },
    /// The peer has shown its certificate: it may say more.
    Admit(KeyId),
    /// The peer runs in a later epoch than before: what is said over its older connections is
    /// heard by nobody.
    Restarted(KeyId),
    /// Close a link.
    Disconnect(KeyId, &'static str),
    /// Sign and send a liveness packet; exempt from the barrier.
    Packet {
        /// Where to.
        to: SocketAddr,
        /// What.
        bytes: Vec<u8>,
    },
    /// Sign a record of this node's own and hand it back as [`super::Event::Own`].
    Record(Draft),
    /// Fetch what a job needs and start it.
    StartJob(Box<StartJob>),
    /// Give a job's warden a later deadline; [`super::Event::Extended`] must follow once it is in
    /// force there, or cannot be.
    ExtendJob(LeaseId, Boot),
    /// Freeze a job: it keeps its memory and takes no CPU.
    FreezeJob(LeaseId),
    /// Let a frozen job go on.
    ThawJob(LeaseId),
    /// Tell a job that its lease is taken back, or that it is not after all.
    NotifyJob(LeaseId, Option<Notified>),
    /// End a job; [`super::Event::JobEnded`] must follow.
    StopJob(LeaseId, EndReason),
    /// How a job ended is kept: what is left of it may go. While that is there it shows, after a
    /// crash, that the job was begun.
    JobNoted(LeaseId),
    /// Reply to a command.
    Answer(CommandId, Result<Reply, Failure>),
    /// Something an operator should know.
    Notice(Notice),
}

/// What a job is told about its lease's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notified {
    /// Why.
    pub why: EndReason,
    /// When it is frozen or ended, on the boot clock.
    pub end: Boot,
}

/// What a lease on a model allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLease {
    /// The model, and what its tokens cost.
    pub terms: ModelTerms,
    /// Whether its requests can wait for others.
    pub class: Class,
    /// The most that may be charged in all.
    pub cap: Amount,
    /// What was served so far.
    pub tally: Tally,
}

/// A job to start.
#[derive(Clone, Debug)]
pub struct StartJob {
    /// Under which lease.
    pub lease: LeaseId,
    /// The claim that it is started for: what tells its warden from one of another claim.
    pub claim: Hash,
    /// Who may attach to it.
    pub delegate: KeyId,
    /// Where the delegate serves payloads.
    pub sources: Vec<SocketAddr>,
    /// What runs.
    pub job: JobSpec,
    /// With what.
    pub shape: Resources,
    /// The model to which it admits requests, where it is no job of the runner's.
    pub model: Option<ModelLease>,
    /// When its last instruction must be over, on the boot clock.
    pub deadline: Boot,
    /// How long it may take to end after that before it is killed.
    pub grace: Span,
}

/// Something an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A node with this node's key is running elsewhere, or this data directory is an older copy:
    /// nothing is granted any more.
    Twin {
        /// The epoch that was seen elsewhere.
        seen: u64,
        /// This node's.
        mine: u64,
    },
    /// A node signed two different things under one version; both are kept.
    Equivocation(KeyId),
    /// A peer was turned away.
    TurnedAway(KeyId, String),
    /// A lessee does not agree with a receipt.
    Objected(LeaseId),
    /// A lease was granted.
    Granted(LeaseId),
    /// A job stands still.
    Frozen(LeaseId, EndReason),
    /// It goes on.
    Thawed(LeaseId),
    /// A lease ended.
    Ended(LeaseId, EndReason),
    /// A node came up or went down.
    Up(KeyId),
    /// A node is held down.
    Down(KeyId),
}
