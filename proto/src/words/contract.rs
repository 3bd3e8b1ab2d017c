//! The words of a lease: mandate, order, grant, refusal, and the acts under it.
//!
//! ```text
//! lessee key --mandate--> delegate --order--> lessor --grant--> (order + grant = the lease)
//!                                      |--------refusal-->
//! delegate --claim, release--> lessor --acceptance | refusal-->          lessor --termination-->
//! delegate --renew-----------> lessor --renewal | refusal-->
//! delegate --gang------------> lessors --commit--> each other       (many leases, all or none)
//! ```
//!
//! One message each way. An order names one lessor and one of its offers by hash: that fixes the
//! price. A grant repeats every term, so that order and grant alone say what was agreed; later
//! only the term can change, by a renewal that both have signed.

use serde::{Deserialize, Serialize};

use super::model::ModelTerms;
use super::sign::Signed;
use super::usage::Outcome;
use crate::base::id::{ActId, Hash, KeyId, LeaseId, Payload, RequestId};
use crate::base::money::Amount;
use crate::base::resource::Resources;
use crate::base::time::{Span, Wall};

/// The most lessors a mandate may name.
pub const MAX_LESSORS: usize = 64;
/// The most arguments, variables, inputs or outputs of a job.
pub const MAX_JOB_ITEMS: usize = 256;
/// The longest argument, variable or file name of a job, in bytes.
pub const MAX_JOB_TEXT: usize = 4096;
/// The most referrals in a refusal.
pub const MAX_REFERRALS: usize = 4;
/// How many bytes of program and inputs any lease may bring beyond its disk: they are kept for
/// whoever brings the same ones next.
pub const FREE_PAYLOADS: u64 = 64 << 20;
/// The most members of a gang.
pub const MAX_GANG: usize = 64;
/// The shortest interval between receipts that may be asked for.
pub const MIN_RECEIPT_EVERY: Span = Span::millis(200);

/// How firmly capacity is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Until its term.
    Firm,
    /// Until its term, unless the operator reclaims it after a notice, against a credit.
    Slack,
}

/// What holds when the lessor's side ends a lease before its term. Part of an offer, and repeated
/// in every grant from it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct EarlyEnd {
    /// How long before it stands still a job is told that its lease is taken back.
    pub notice: Span,
    /// How long it then stands frozen, unbilled, before it is ended. A job of a tenant who does
    /// not countersign is frozen for as long.
    pub freeze: Span,
    /// What the lessee gets back, in thousandths of the price of the time that it misses; never
    /// more than it was charged.
    pub credit_permille: u16,
}

/// Of which gang a lease is to be a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GangOf {
    /// The gang, by the number that its lessee chose.
    pub gang: RequestId,
    /// How many members it will have.
    pub size: u16,
}

/// What a lessee's key lets a delegate do in its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mandate {
    /// Who may order: usually the lessee's node.
    pub delegate: KeyId,
    /// The certificate that admits the lessee as a tenant.
    pub certificate: Signed,
    /// From when on it holds; until the envelope's `not_after`.
    pub not_before: Wall,
    /// The most that one lease may cost per hour.
    pub max_hourly: Amount,
    /// The most that one lease may cost in all.
    pub max_total: Amount,
    /// The longest term of one lease.
    pub max_term: Span,
    /// With whom; empty: with any node of the fabric.
    pub lessors: Vec<KeyId>,
}

/// By what right an order is signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Authority {
    /// The delegate signs, under this mandate of the lessee.
    Mandate(Signed),
    /// The lessee signs itself (offline, say), admitted by this certificate.
    Lessee(Signed),
}

/// A request for a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Who borrows and owes.
    pub lessee: KeyId,
    /// Who signs every later act under the lease.
    pub delegate: KeyId,
    /// By what right it is signed.
    pub authority: Authority,
    /// Who is asked.
    pub lessor: KeyId,
    /// Which of its offers, by hash: that fixes the price.
    pub offer: Hash,
    /// Chosen by the lessee; at this lessor it makes at most one lease.
    pub request: RequestId,
    /// What is asked for; nothing where it is a model.
    pub shape: Resources,
    /// The model that is asked for, on the terms of the offer; then no capacity is.
    pub model: Option<ModelTerms>,
    /// How firmly.
    pub class: Class,
    /// For how long, from the lessor's decision on.
    pub term: Span,
    /// To what term it may be renewed at the same price, from the decision on; at least `term`.
    pub longest: Span,
    /// The gang that it is for, if it is.
    pub gang: Option<GangOf>,
    /// Within what time of the decision it will be claimed; else it lapses, unbilled.
    pub claim_within: Span,
    /// The most it may cost per hour.
    pub ceiling: Amount,
    /// The most it may cost in all: the lease ends when the charge reaches it.
    pub cap: Amount,
    /// How much may be owed without the lessee's countersignature before the lease ends.
    pub exposure: Amount,
    /// How often a receipt is wanted; the lessor may stretch it.
    pub receipt_every: Span,
    /// When it was placed.
    pub placed: Wall,
}

/// Orders the holders of one slot: compare only within one lessor.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Fence {
    /// The lessor's epoch.
    pub epoch: u64,
    /// Rises with every grant of that epoch.
    pub number: u64,
}

/// The yes to an order. Its hash is the lease's id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The order that is granted.
    pub order: Hash,
    /// Who borrows, as in the order.
    pub lessee: KeyId,
    /// Who acts for it, as in the order.
    pub delegate: KeyId,
    /// What is lent.
    pub shape: Resources,
    /// The model whose tokens are lent, as in the order.
    pub model: Option<ModelTerms>,
    /// How firmly.
    pub class: Class,
    /// The price per hour for the whole shape, from the offer; at most the order's ceiling.
    pub rate: Amount,
    /// The most that will be charged in all.
    pub cap: Amount,
    /// How much may stand unacknowledged.
    pub exposure: Amount,
    /// For how long, from `decided` on, unless it is renewed.
    pub term: Span,
    /// To what term it may be renewed at this price, from `decided` on.
    pub longest: Span,
    /// What holds if the lessor's side ends it earlier.
    pub early: EarlyEnd,
    /// The gang that it is for: then no job starts before every member has committed.
    pub gang: Option<GangOf>,
    /// Within what time of `decided` it must be claimed.
    pub claim_within: Span,
    /// How long a job may take to end after the term before it is killed.
    pub grace: Span,
    /// How often receipts come.
    pub receipt_every: Span,
    /// A later grant of this lessor has a higher one.
    pub fence: Fence,
    /// When the lessor decided, for observers; deadlines run on its boot clock.
    pub decided: Wall,
    /// The certificate that admits the lessor.
    pub certificate: Signed,
}

/// Why an order or an act is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// There is not enough free; the figures say what of.
    Capacity,
    /// The offer's price is above the order's ceiling.
    Price,
    /// The offer named is not one that this node still honours.
    StaleOffer,
    /// The order names another lessor.
    WrongLessor,
    /// The order's validity is over, or reaches too far.
    Expired,
    /// Signer, delegate or lessee is not admitted to the fabric, or not in that role.
    NotAdmitted,
    /// The mandate does not allow this order.
    Mandate,
    /// The same request or act id came with another body.
    Conflict,
    /// The term, class, runtime or interval is not one that this node sells.
    NotOffered,
    /// The node takes on nothing new: its disk is full.
    DiskFull,
    /// The node takes on nothing new: it is starting or stopping.
    NotReady,
    /// The lease is not known here.
    UnknownLease,
    /// The lease has ended or lapsed.
    Ended,
    /// The lease is already in use.
    InUse,
    /// The job's description breaks a rule.
    BadJob,
    /// Too many requests wait here.
    Busy,
    /// The lease is not in the version that the act is about; the figures say in which it is.
    Version,
    /// The new term is shorter than the present one, or longer than the lease allows.
    Term,
    /// The operator is taking the capacity back.
    Withdrawn,
    /// Not every member of the gang has committed.
    NotCommitted,
    /// The gang is not the one that was ordered, or not made up of its members.
    BadGang,
    /// Who asks was convicted of saying two different things, and is not believed.
    Quarantined,
}

impl Reason {
    /// Whether what stands against an act may pass, or seem to, as a wall clock that is set back:
    /// then the same act would be taken later, were the no not remembered.
    #[must_use]
    pub const fn may_pass(self) -> bool {
        matches!(
            self,
            Self::DiskFull
                | Self::Expired
                | Self::NotCommitted
                | Self::NotOffered
                | Self::NotReady
                | Self::Quarantined
                | Self::Withdrawn
        )
    }

    /// What it means, for a person who asked.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Capacity => "it has too little free",
            Self::Price => "its price is above the limit",
            Self::StaleOffer => "its offer has changed since",
            Self::WrongLessor => "the order names another host",
            Self::Expired => "the order's validity is over, or reaches too far",
            Self::NotAdmitted => "it does not admit who asks",
            Self::Mandate => "the mandate does not allow this order",
            Self::Conflict => "another order had the same request id",
            Self::NotOffered => "it does not sell this",
            Self::DiskFull => "its disk is full",
            Self::NotReady => "it takes on nothing new now",
            Self::UnknownLease => "it does not know the lease",
            Self::Ended => "the lease is over",
            Self::InUse => "the lease is in use already",
            Self::BadJob => "the job breaks a rule",
            Self::Busy => "too many requests wait there",
            Self::Version => "the lease has changed since",
            Self::Term => "the new term is shorter than the old one, or longer than agreed",
            Self::Withdrawn => "its operator is taking the capacity back",
            Self::NotCommitted => "not every member of the gang has committed",
            Self::Quarantined => "who asks was convicted of saying two different things",
            Self::BadGang => "it is no member of that gang",
        }
    }
}

/// What ran short.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Figure {
    /// Of what: `cpu_milli`, `memory`, `rate`, ….
    pub of: String,
    /// What there is.
    pub have: u64,
    /// What was asked for.
    pub need: u64,
}

/// The no to an order or an act: it carries the truth, so that a race settles in one round trip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The order or act that is refused.
    pub of: Hash,
    /// Why.
    pub reason: Reason,
    /// The figures behind it.
    pub figures: Vec<Figure>,
    /// What this node offers now.
    pub offer: Option<Signed>,
    /// Nodes that may have what was asked for.
    pub referrals: Vec<KeyId>,
}

/// First use of a lease, with what is to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Which lease.
    pub lease: LeaseId,
    /// A repeat of this act is answered with the same bytes.
    pub act: ActId,
    /// What runs.
    pub job: JobSpec,
}

/// What runs under a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// The runtime: `wasm`, ….
    pub runtime: String,
    /// The program.
    pub program: Payload,
    /// Its arguments, without the program's own name.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// What it reads from standard input; nothing when absent.
    pub stdin: Option<Payload>,
    /// Files and directories it finds under `/in`.
    pub inputs: Vec<Input>,
    /// Files it writes under `/out` that are kept for fetching.
    pub outputs: Vec<String>,
    /// Whether the lease is given back by itself once the job has ended.
    pub release_after: bool,
}

/// A file that a job finds, or a directory of files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Input {
    /// Its name under `/in`.
    pub name: String,
    /// Its bytes.
    pub payload: Payload,
    /// Where they are an index ([`super::index`]) and the directory of its files is wanted: how many
    /// bytes its files have together.
    pub index: Option<u64>,
}

/// That an act was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptance {
    /// Which lease.
    pub lease: LeaseId,
    /// Which act.
    pub act: ActId,
    /// The act's object.
    pub of: Hash,
}

/// The lessee gives the lease back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Which lease.
    pub lease: LeaseId,
    /// A repeat of this act is answered with the same bytes.
    pub act: ActId,
}

/// The lessee, or its delegate, makes a lease longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// Which lease.
    pub lease: LeaseId,
    /// A repeat of this act is answered with the same bytes.
    pub act: ActId,
    /// In which version it must be for that: zero as granted, then one more with every renewal.
    pub version: u64,
    /// The new term, from the lessor's decision about the order on: not shorter than the present
    /// one.
    pub term: Span,
}

/// That a lease was made longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// Which lease.
    pub lease: LeaseId,
    /// Which act.
    pub act: ActId,
    /// The act's object.
    pub of: Hash,
    /// The version in which the lease is now.
    pub version: u64,
    /// Its term now.
    pub term: Span,
}

/// That leases exist together or not at all: signed by their delegate over the grants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gang {
    /// The gang, by the number in its orders.
    pub gang: RequestId,
    /// Whose it is.
    pub lessee: KeyId,
    /// Who acts for it.
    pub delegate: KeyId,
    /// Its members in the order of their ranks.
    pub members: Vec<Member>,
}

/// A member of a gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Who lends.
    pub lessor: KeyId,
    /// Which lease.
    pub lease: LeaseId,
}

/// A lessor's word that its lease is a member of a gang, durably.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The gang's certificate.
    pub gang: Hash,
    /// Which lease of it.
    pub lease: LeaseId,
}

/// Why a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Not claimed in time: unbilled.
    Lapsed,
    /// Its term is over.
    Term,
    /// The lessee gave it back.
    Released,
    /// The operator took slack back, after notice, against a credit.
    Reclaimed,
    /// The lessor or an organisation took it back.
    Revoked,
    /// The charge reached the cap.
    Budget,
    /// Too much stood unacknowledged.
    Exposure,
    /// The lessor or its host failed: what ran is gone.
    Lost,
}

/// How and why a lease ended, and what that means in money.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Termination {
    /// Which lease.
    pub lease: LeaseId,
    /// Why.
    pub reason: EndReason,
    /// Who brought it about.
    pub by: KeyId,
    /// When, for observers.
    pub at: Wall,
    /// How long it was billed.
    pub billed: Span,
    /// What is owed for it.
    pub charge: Amount,
    /// How much of its term is missing because the lessor's side ended it: what the credit is for.
    pub missed: Span,
    /// What the lessor owes back.
    pub credit: Amount,
    /// The final receipt; zero when the lease lapsed.
    pub receipt: Hash,
    /// How the job ended, when there was one.
    pub outcome: Option<Outcome>,
}

fn are_texts<'a>(texts: impl IntoIterator<Item = &'a String>) -> bool {
    texts.into_iter().all(|text| text.len() <= MAX_JOB_TEXT && !text.contains('\0'))
}

/// Whether `name` names one file in a directory and nothing else.
#[must_use]
pub fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != "."
        && name != ".."
        && !name.contains(['/', '\0'])
        && !name.chars().any(char::is_control)
}

impl Mandate {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.lessors.len() > MAX_LESSORS {
            return Err("a mandate names at most 64 lessors");
        }
        Ok(())
    }
}

impl Order {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if !self.shape.is_well_formed() {
            return Err("an order's GPUs are listed sorted, each kind once");
        }
        match &self.model {
            Some(_) if !self.shape.is_nothing() || self.gang.is_some() => {
                return Err("an order for a model asks for no capacity, and for no gang");
            }
            Some(model) => model.check()?,
            None if self.shape.cpu_milli == 0 || self.shape.memory == 0 => {
                return Err("an order asks for some CPU and some memory");
            }
            None => {}
        }
        if self.term == Span::ZERO {
            return Err("an order's term is longer than nothing");
        }
        if self.longest < self.term {
            return Err("an order's longest term is not shorter than its term");
        }
        if self.gang.is_some_and(|of| of.size == 0 || usize::from(of.size) > MAX_GANG) {
            return Err("a gang has 1 to 64 members");
        }
        Ok(())
    }
}

impl Grant {
    #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // one signature for every kind
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if !self.shape.is_well_formed() {
            return Err("a grant's GPUs are well formed");
        }
        if let Some(model) = &self.model {
            model.check()?;
        }
        self.early.check()
    }

    /// How many bytes of program and inputs a job under it may bring, each counted once: its disk
    /// and [`FREE_PAYLOADS`].
    #[must_use]
    pub const fn payload_room(&self) -> u64 {
        self.shape.disk.saturating_add(FREE_PAYLOADS)
    }

    /// The most that this lease can cost unless it is renewed: its cap, or its whole term at its
    /// rate.
    #[must_use]
    pub fn worst_case(&self) -> Amount {
        self.worst_case_over(self.term)
    }

    /// The most that it can cost over `term`; tokens can be used up however short it is.
    #[must_use]
    pub fn worst_case_over(&self, term: Span) -> Amount {
        match self.model {
            Some(_) => self.cap,
            None => self.rate.per_hour_over(term).min(self.cap),
        }
    }
}

impl EarlyEnd {
    pub(super) const fn check(&self) -> Result<(), &'static str> {
        if self.credit_permille > 1000 {
            return Err("a credit is at most the whole price");
        }
        Ok(())
    }
}

impl Gang {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.members.is_empty() || self.members.len() > MAX_GANG {
            return Err("a gang has 1 to 64 members");
        }
        let mut lessors: Vec<_> = self.members.iter().map(|member| member.lessor).collect();
        lessors.sort();
        if lessors.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("the members of a gang are on different hosts");
        }
        Ok(())
    }
}

impl Refusal {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.figures.len() > 32 || self.figures.iter().any(|f| f.of.len() > 80) {
            return Err("a refusal has at most 32 figures");
        }
        if self.referrals.len() > MAX_REFERRALS {
            return Err("a refusal refers to at most 4 nodes");
        }
        Ok(())
    }
}

impl Claim {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        self.job.check()
    }
}

impl JobSpec {
    /// Checks what the types alone cannot say.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn check(&self) -> Result<(), &'static str> {
        let counts = [self.args.len(), self.env.len(), self.inputs.len(), self.outputs.len()];
        if counts.iter().any(|n| *n > MAX_JOB_ITEMS) {
            return Err("a job has at most 256 arguments, variables, inputs and outputs each");
        }
        let env = self.env.iter().flat_map(|(name, value)| [name, value]);
        if !are_texts(&self.args) || !are_texts(env) {
            return Err("a job's arguments and variables are at most 4096 bytes, without NUL");
        }
        if self.env.iter().any(|(name, _)| name.is_empty() || name.contains('=')) {
            return Err("a variable's name is not empty and has no '='");
        }
        let files = self.inputs.iter().map(|input| &input.name).chain(&self.outputs);
        if !files.clone().all(|name| is_file_name(name)) {
            return Err("inputs and outputs are plain file names, without '/' and not '..'");
        }
        if self.runtime.is_empty() || self.runtime.len() > 32 {
            return Err("a job names its runtime");
        }
        let mut names: Vec<_> = self.inputs.iter().map(|input| &input.name).collect();
        names.sort();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("each input has a name of its own");
        }
        Ok(())
    }

    /// How many bytes of program and inputs the job brings.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        let named = self.inputs.iter().filter_map(|input| input.index);
        let sizes = self.payloads().map(|payload| payload.size).chain(named);
        sizes.fold(0, u64::saturating_add)
    }

    /// Every payload the job names, the program first: what its indexes name comes besides.
    pub fn payloads(&self) -> impl Iterator<Item = Payload> + '_ {
        let inputs = self.inputs.iter().map(|input| input.payload);
        [self.program].into_iter().chain(self.stdin).chain(inputs)
    }
}

macro_rules! nothing_to_check {
    ($($name:ident)*) => { $( impl $name {
        #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // one signature for every kind
        pub(super) fn check(&self) -> Result<(), &'static str> { Ok(()) }
    } )* };
}
nothing_to_check!(Acceptance Release Termination Renew Renewal Commit);
