//! How things stand at a node: what API, console, metrics and the invariant checks read.

use serde::{Deserialize, Serialize};

use crate::base::id::{FabricId, Hash, KeyId, LeaseId, RequestId};
use crate::base::money::Amount;
use crate::base::resource::{Rates, Resources};
use crate::base::time::{Boot, Span, Wall};
use crate::minds::{book, holdings};
use crate::words::contract::{Class, EarlyEnd, EndReason};
use crate::words::equivocation::Equivocation;
use crate::words::model::{ModelOffer, ModelTerms};
use crate::words::record::Addresses;
use crate::words::usage::{ObjectionReason, Outcome, Usage};

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// The fabric.
    pub fabric: FabricId,
    /// Its name.
    pub fabric_name: String,
    /// The currency of every amount.
    pub currency: String,
    /// This node.
    pub me: KeyId,
    /// Its epoch.
    pub epoch: u64,
    /// Why nothing is granted, if so.
    pub halted: Option<String>,
    /// Whether it has joined: it has a link, or nobody to join.
    pub joined: bool,
    /// How many links are up and admitted.
    pub links: usize,
    /// How many records are known.
    pub records: usize,
    /// How many liveness packets were refused.
    pub packets_refused: u64,
    /// All there is to lend.
    pub capacity: Resources,
    /// What is promised of it.
    pub promised: Resources,
    /// What the operator keeps out of new leases.
    pub withheld: Resources,
    /// Whether nothing is granted or renewed, by the operator's will.
    pub drained: bool,
    /// Every node that is known, this one included.
    pub nodes: Vec<NodeView>,
    /// Leases this node granted.
    pub lent: Vec<LentView>,
    /// Leases this node holds.
    pub held: Vec<HeldView>,
    /// Orders that wait for an answer.
    pub pursuits: usize,
    /// Proofs that keys said two different things, of those that are not reinstated.
    pub quarantine: Vec<Equivocation>,
    /// Counters since the start.
    pub counters: Counters,
}

/// What was counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Orders heard.
    pub orders: u64,
    /// Grants given.
    pub grants: u64,
    /// Orders refused.
    pub refusals: u64,
    /// Leases made longer.
    pub renewals: u64,
    /// Leases ended.
    pub ended: u64,
    /// Leases that lapsed unclaimed.
    pub lapsed: u64,
    /// Receipts written.
    pub receipts: u64,
    /// Receipts countersigned by lessees.
    pub acknowledged: u64,
    /// Objections heard.
    pub objections: u64,
    /// Offers published.
    pub offers: u64,
    /// Requests to models served.
    pub served: u64,
    /// Requests to models of others of which the record was agreed on.
    pub consumed: u64,
    /// Proofs of equivocation kept.
    pub equivocations: u64,
}

/// A node as the map shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its key.
    pub id: KeyId,
    /// Its name.
    pub name: String,
    /// Whether it is held to be alive.
    pub up: bool,
    /// Whether there is a link to it.
    pub linked: bool,
    /// The version of its software.
    pub version: String,
    /// The organisation that admits it.
    pub organisation: String,
    /// All that it has.
    pub hardware: Resources,
    /// What it has free, in leasable shapes.
    pub shapes: Vec<Resources>,
    /// Its prices of firm capacity.
    pub rates: Option<Rates>,
    /// What slack costs of that, in thousandths; `None` when it sells none.
    pub slack_permille: Option<u16>,
    /// What holds when it ends a lease before its term.
    pub early: EarlyEnd,
    /// Its newest offer.
    pub offer: Option<Hash>,
    /// How old that offer is here.
    pub offer_age: Option<Span>,
    /// The longest term it grants.
    pub max_term: Span,
    /// The runtimes it has.
    pub runtimes: Vec<String>,
    /// What confines a job there.
    pub isolation: Vec<String>,
    /// The models it serves.
    pub models: Vec<ModelOffer>,
    /// What its operator says about it.
    pub labels: Vec<(String, String)>,
    /// Where it is reached.
    pub addresses: Addresses,
    /// Whether its word does not count: it was convicted of saying two different things.
    pub quarantined: bool,
}

/// A lease this node granted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentView {
    /// Its id.
    pub id: LeaseId,
    /// The order behind it.
    pub order: Hash,
    /// The lessee's request id.
    pub request: RequestId,
    /// Where it stands.
    pub stage: book::Stage,
    /// Who borrows.
    pub lessee: KeyId,
    /// Who acts for it.
    pub delegate: KeyId,
    /// What is lent.
    pub shape: Resources,
    /// The model whose tokens are lent, if it is one.
    pub model: Option<ModelTerms>,
    /// How firmly.
    pub class: Class,
    /// The price per hour.
    pub rate: Amount,
    /// When it was decided, for observers.
    pub decided: Wall,
    /// When its term ends, on this node's boot clock.
    pub term_end: Boot,
    /// How long it is.
    pub term: Span,
    /// To what term it may be renewed.
    pub longest: Span,
    /// How often it was renewed.
    pub version: u64,
    /// Whether a job's processes exist.
    pub running: bool,
    /// Whether it stands still, unbilled.
    pub frozen: bool,
    /// Why it is to end early, and when on this node's boot clock.
    pub ends_early: Option<(EndReason, Boot)>,
    /// Usage by the latest receipt.
    pub usage: Usage,
    /// What is owed by the latest receipt.
    pub charge: Amount,
    /// How many receipts were written.
    pub receipts: u64,
    /// Up to which the lessee countersigned.
    pub acknowledged: u64,
    /// Why it ended.
    pub end: Option<EndReason>,
    /// How its job ended.
    pub outcome: Option<Outcome>,
}

/// A lease this node holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldView {
    /// Its id, once granted.
    pub id: Option<LeaseId>,
    /// The order behind it.
    pub order: Hash,
    /// Who lends.
    pub lessor: KeyId,
    /// Where it stands.
    pub stage: holdings::Stage,
    /// What is lent.
    pub shape: Resources,
    /// The model whose tokens are lent, if it is one.
    pub model: Option<ModelTerms>,
    /// How firmly.
    pub class: Class,
    /// The price per hour.
    pub rate: Amount,
    /// The most it can cost.
    pub worst_case: Amount,
    /// When it was granted, by the lessor's wall clock.
    pub decided: Wall,
    /// How long it is.
    pub term: Span,
    /// To what term it may be renewed.
    pub longest: Span,
    /// How often it was renewed.
    pub version: u64,
    /// How much of what may be relied on is left.
    pub left: Span,
    /// Usage by the latest receipt.
    pub usage: Usage,
    /// What was agreed to be owed.
    pub charge: Amount,
    /// How many receipts were countersigned.
    pub receipts: u64,
    /// What was wrong with the last receipt, if it was not.
    pub objection: Option<ObjectionReason>,
    /// Why it ended.
    pub end: Option<EndReason>,
    /// How its job ended.
    pub outcome: Option<Outcome>,
}
