//! What the core is told: one enum, and the commands that people and programs give.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::base::id::{Hash, KeyId, LeaseId};
use crate::base::money::Amount;
use crate::base::resource::Resources;
use crate::base::time::{Boot, Span};
use crate::minds::book::ReclaimPlan;
use crate::placement::{Against, Ranking};
use crate::words::contract::{EndReason, JobSpec, Reason};
use crate::words::message::{OrderPapers, RecordSaid, Said};
use crate::words::model::{ModelOffer, Served, Service};
use crate::words::sign::{Draft, Signed, Verified};
use crate::words::usage::{Outcome, Usage};
use crate::words::want::{Choice, Heard, Want};

use super::view::View;

/// Names a question that this node asked over a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// Names a question that was asked of this node and waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Names a command that waits for its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// Everything that can happen to a core.
#[allow(clippy::large_enum_variant)] // few are alive at once, each is moved once
#[derive(Debug)]
pub enum Event {
    /// A link is up; nothing is known yet but the peer's key.
    Linked(KeyId),
    /// A link is gone.
    Unlinked(KeyId),
    /// A peer asked something.
    Heard {
        /// Who.
        from: KeyId,
        /// What, every signature checked.
        said: Said,
        /// Where the answer goes.
        ticket: Ticket,
    },
    /// A peer answered.
    Answered {
        /// Who.
        from: KeyId,
        /// Which question.
        token: Token,
        /// What, every signature checked.
        said: Said,
    },
    /// A question will not be answered: the peer cannot be reached, took too long, or what it
    /// said does not verify.
    Unanswered {
        /// Which question.
        token: Token,
        /// In words.
        why: String,
    },
    /// A peer could not be dialled.
    DialFailed(KeyId),
    /// A liveness packet whose signature holds.
    Packet {
        /// Who signed it.
        from: KeyId,
        /// The packet.
        bytes: Vec<u8>,
    },
    /// A record of this node's own, signed.
    Own(RecordSaid),
    /// Somebody at this node asks for something.
    Asked {
        /// Where the reply goes.
        command: CommandId,
        /// What.
        what: Command,
    },
    /// What a job used so far.
    Usage(LeaseId, Usage),
    /// Whether a job's warden has this deadline in force, or a later one, or there is nothing left
    /// that it would end.
    Extended(LeaseId, Boot, bool),
    /// A job has a warden, and with it a place on the host that shows as much: it is not to be
    /// started again, whatever happens.
    JobBegun(LeaseId),
    /// A job's processes are gone.
    JobEnded(LeaseId, Outcome, Usage),
    /// Whether the disk has room for what new leases would write.
    DiskFull(bool),
    /// Which payloads this node has now, or is fetching, the last used first: what stands for each
    /// in a record.
    Payloads(Vec<u64>),
    /// Which models are served here now, sorted by name.
    Models(Vec<ModelOffer>),
    /// Time has passed.
    Woke,
    /// The node is about to stop.
    Leave,
}

/// What can be asked of a node.
#[derive(Debug)]
pub enum Command {
    /// Rank the hosts for this.
    Plan(Want),
    /// Get a lease on this, from the best that says yes.
    Lease(Want),
    /// Get leases on so many hosts, together or not at all.
    Gang {
        /// What each of them is to be.
        want: Want,
        /// How many.
        size: u16,
        /// What each of them runs; then they are claimed as well.
        job: Option<JobSpec>,
        /// Whether all are given back when one is lost.
        together: bool,
    },
    /// Get a lease by an order that the lessee signed elsewhere.
    LeaseBy(Box<OrderPapers>),
    /// Draft an order for a lessee to sign elsewhere.
    DraftOrder {
        /// What is wanted.
        want: Want,
        /// Who will sign.
        lessee: KeyId,
        /// The certificate that admits the lessee.
        certificate: Signed,
    },
    /// Use a lease.
    Claim {
        /// Which.
        lease: LeaseId,
        /// What runs.
        job: JobSpec,
    },
    /// Give a lease back.
    Release(LeaseId),
    /// Make a lease longer.
    Renew {
        /// Which.
        lease: LeaseId,
        /// Its new term, from the lessor's decision about the order on.
        term: Span,
    },
    /// Take back a lease that this node granted, after its notice.
    Revoke(LeaseId),
    /// Take back slack capacity, cheapest credit first, and keep it out of new leases.
    Reclaim {
        /// How much.
        shape: Resources,
        /// In what time it must be back.
        within: Span,
        /// Whether only to say what that would come to.
        dry_run: bool,
    },
    /// Grant and renew nothing any more, and take slack back.
    Drain {
        /// In what time the host is to be empty.
        within: Span,
        /// Whether firm leases that end later are revoked too.
        revoke: bool,
        /// Whether only to say what that would come to.
        dry_run: bool,
    },
    /// End a drain or reclaim: sell again, and leave what is not ended yet.
    Resume,
    /// Believe a quarantined key again, as its organisation says.
    Reinstate(Box<Signed>),
    /// Tell when a held lease has ended.
    AwaitEnd(LeaseId),
    /// Tell who lends a held lease, and where that node serves its data plane.
    Lessor(LeaseId),
    /// Tell where a node serves its data plane.
    Reach(KeyId),
    /// Keep a payload whatever else needs its room, or no longer.
    Pin(Hash, bool),
    /// Tell which payloads are not to be removed.
    InUse,
    /// Tell who may have a payload, and where these nodes serve their data planes.
    Holders(Hash),
    /// A request was served under a lease on a model that this node granted.
    Serve(LeaseId, Service),
    /// The record of a request under a lease on a model that this node holds: it says what this node
    /// asked, was answered and counted.
    Consume(Box<Verified<Served>>),
    /// Tell who sells models: every node, also those that sell none.
    Sellers,
    /// Tell how things stand.
    View,
}

/// What a command comes to.
#[derive(Clone, Debug)]
pub enum Reply {
    /// The hosts, ranked.
    Plan(Ranking),
    /// A lease was granted.
    Leased(Box<Leased>),
    /// A gang is whole.
    Ganged {
        /// Its certificate.
        gang: Hash,
        /// Its members in the order of their ranks.
        leases: Vec<Leased>,
        /// Who said no before.
        heard: Vec<Heard>,
    },
    /// An order to sign elsewhere, and whom it names.
    Drafted(Draft, Choice),
    /// The claim was accepted: the job is being started.
    Claimed(KeyId),
    /// The release was accepted.
    Released,
    /// The lease was made longer.
    Renewed {
        /// In which version it is now.
        version: u64,
        /// Its term now.
        term: Span,
        /// How much of what may be relied on is left.
        left: Span,
    },
    /// Capacity is being taken back, or would be. Where some is short nothing was done.
    Reclaim(ReclaimPlan),
    /// The key is believed again, in epochs above this.
    Reinstated(KeyId, u64),
    /// This node sells again.
    Resumed {
        /// How many leases are not taken back after all.
        lifted: usize,
    },
    /// The lease has ended.
    Ended(Ended),
    /// A node, and where it serves its data plane.
    Reached(KeyId, Vec<SocketAddr>),
    /// A payload is pinned, or no longer.
    Pinned,
    /// The payloads that are not to be removed.
    InUse(InUse),
    /// Nodes that are up and may have the payload, in random order, at most 64, and where they serve
    /// their data planes.
    Holders(Vec<(KeyId, Vec<SocketAddr>)>),
    /// The record of a request, kept, to be signed.
    Served(Draft),
    /// The record is agreed on.
    Consumed,
    /// Who sells models.
    Sellers(Vec<Seller>),
    /// How things stand.
    View(Box<View>),
}

/// A node and the models that it sells, as the map shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seller {
    /// Its key.
    pub key: KeyId,
    /// Its name.
    pub name: String,
    /// Whether it is held to be alive, and believed.
    pub up: bool,
    /// The longest term of a lease.
    pub max_term: Span,
    /// What it sells.
    pub models: Vec<ModelOffer>,
    /// Where it serves its data plane.
    pub addresses: Vec<SocketAddr>,
}

/// Payloads that are not to be removed, by their roots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// Those that the operator pinned.
    pub pinned: BTreeSet<Hash>,
    /// Those of jobs under leases that this node holds, or that it granted and has not begun.
    pub leased: BTreeSet<Hash>,
}

/// A granted lease.
#[derive(Clone, Debug)]
pub struct Leased {
    /// Its id.
    pub lease: LeaseId,
    /// The order behind it.
    pub order: Hash,
    /// The grant.
    pub grant: Signed,
    /// Who lends, and why that one.
    pub choice: Choice,
    /// Who said no before.
    pub heard: Vec<Heard>,
}

/// How a held lease ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Why.
    pub reason: EndReason,
    /// How its job ended.
    pub outcome: Option<Outcome>,
    /// What is owed.
    pub charge: Amount,
    /// What is owed back, because the lessor's side ended it.
    pub credit: Amount,
    /// How many receipts were countersigned.
    pub receipts: u64,
}

/// Why a command comes to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// This node may not order for anybody.
    #[error("this node has no mandate to order in a lessee's name")]
    NoMandate,
    /// No host fits.
    #[error("no host that is up offers what is asked for")]
    NothingFits(Vec<Against>),
    /// Fewer hosts fit than a gang has members.
    #[error("{have} hosts that are up offer what is asked for, and the gang needs {need}")]
    TooFew {
        /// How many fit.
        have: usize,
        /// How many are needed.
        need: usize,
        /// What spoke against the others.
        against: Vec<Against>,
    },
    /// Everybody who was asked said no, or nothing.
    #[error("every host that was asked refused or did not answer")]
    Refused(Vec<Heard>),
    /// The lessor refused an act.
    #[error("the lessor refused: {0:?}")]
    Act(Reason),
    /// The lessor cannot be reached.
    #[error("the lessor cannot be reached: {0}")]
    Unreachable(String),
    /// The lease is not one that this node holds.
    #[error("this node holds no such lease")]
    UnknownLease,
    /// The lease is over, or may not be relied on any more.
    #[error("the lease is over")]
    Over,
    /// The lease is in use already.
    #[error("the lease is in use already")]
    InUse,
    /// An earlier renewal may or may not have been granted.
    #[error("an earlier renewal, to {0}, was not answered: ask for that one again first")]
    Unanswered(Span),
    /// A lease cannot be made that long, or that short.
    #[error("the term can be renewed to between {least} and {most}, not to {asked}")]
    Term {
        /// Its term now.
        least: Span,
        /// The longest that its order and grant allow.
        most: Span,
        /// What was asked for.
        asked: Span,
    },
    /// The job's description breaks a rule.
    #[error("the job is not acceptable: {0}")]
    BadJob(String),
    /// A record of a request to a model does not follow from those before it.
    #[error("the record of a request is not one to agree on: {0}")]
    BadRecord(&'static str),
    /// The order is not one that this node can carry.
    #[error("the order cannot be used: {0}")]
    BadOrder(String),
    /// This node's disk is too full to keep what a new lease would write.
    #[error("this node's disk is too full to take on anything new: make room on it")]
    DiskFull,
    /// Too many commands wait already.
    #[error("too many requests wait at this node: try again")]
    Busy,
    /// This node is stopping, or must not act.
    #[error("this node takes on nothing: {0}")]
    Halted(String),
}
