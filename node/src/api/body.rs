//! The JSON bodies of the API, as both its server and the command line's client see them. Names
//! and units are stable: money is a decimal text in the fabric's currency, spans end in `_ms`,
//! sizes are bytes, instants are RFC 3339 in UTC, keys are PeerIds, ids are hex.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use leasehold_proto::Amount;
use leasehold_proto::Resources;
use leasehold_proto::base::resource::Rates;
use leasehold_proto::base::time::Boot;
use leasehold_proto::core::view::{Counters, HeldView, LentView, NodeView};
use leasehold_proto::core::{Ended, View};
use leasehold_proto::minds::book::ReclaimPlan;
use leasehold_proto::placement::{Against, Ranking};
use leasehold_proto::words::contract::Reason;
use leasehold_proto::words::model::ModelTerms;
use leasehold_proto::words::usage::{Outcome, Usage};
use leasehold_proto::words::want::{Choice, Heard};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use utoipa::ToSchema;

use super::error::ErrorInside;
use super::want::{JobText, Text, WantText};

/// Money as a decimal text, exact to the billionth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Money(pub Amount);

impl std::fmt::Display for Money {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Money {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Self).map_err(de::Error::custom)
    }
}

impl utoipa::PartialSchema for Money {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        use utoipa::openapi::schema::{ObjectBuilder, Type};
        ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some(r"^[0-9]+(\.[0-9]{1,9})?$"))
            .description(Some("An amount in the fabric's currency."))
            .into()
    }
}

impl ToSchema for Money {}

/// A quantity of every resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quantity {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of disk.
    pub disk: u64,
    /// GPUs by kind.
    pub gpus: BTreeMap<String, u32>,
}

impl From<&Resources> for Quantity {
    fn from(of: &Resources) -> Self {
        let gpus = of.gpus.iter().map(|gpu| (gpu.kind.clone(), gpu.count)).collect();
        Self { cpu_milli: of.cpu_milli, memory: of.memory, disk: of.disk, gpus }
    }
}

/// Prices per resource and hour.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Prices {
    /// Per core and hour.
    pub cpu_hour: Money,
    /// Per GiB of memory and hour.
    pub memory_gib_hour: Money,
    /// Per GiB of disk and hour.
    pub disk_gib_hour: Money,
    /// Per GPU and hour, by kind.
    pub gpu_hour: BTreeMap<String, Money>,
}

impl From<&Rates> for Prices {
    fn from(rates: &Rates) -> Self {
        Self {
            cpu_hour: Money(rates.cpu_hour),
            memory_gib_hour: Money(rates.memory_gib_hour),
            disk_gib_hour: Money(rates.disk_gib_hour),
            gpu_hour: rates.gpu_hour.iter().map(|r| (r.kind.clone(), Money(r.hour))).collect(),
        }
    }
}

/// Where a node is reached, per plane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Planes {
    /// Links (QUIC).
    #[schema(value_type = Vec<String>)]
    pub link: Vec<SocketAddr>,
    /// Liveness packets (UDP).
    #[schema(value_type = Vec<String>)]
    pub probe: Vec<SocketAddr>,
    /// Payloads and job streams (QUIC).
    #[schema(value_type = Vec<String>)]
    pub data: Vec<SocketAddr>,
}

/// What was counted since the node started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counted {
    /// Orders heard.
    pub orders: u64,
    /// Grants given.
    pub grants: u64,
    /// Orders refused.
    pub refusals: u64,
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
    /// Proofs of equivocation kept.
    pub equivocations: u64,
}

impl From<&Counters> for Counted {
    fn from(of: &Counters) -> Self {
        Self {
            orders: of.orders,
            grants: of.grants,
            refusals: of.refusals,
            ended: of.ended,
            lapsed: of.lapsed,
            receipts: of.receipts,
            acknowledged: of.acknowledged,
            objections: of.objections,
            offers: of.offers,
            equivocations: of.equivocations,
        }
    }
}

/// What a node's payload store holds and its data plane moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// Payloads held.
    pub held: u64,
    /// Their bytes on disk.
    pub bytes: u64,
    /// Bytes of payloads sent to other nodes since the start.
    pub bytes_sent: u64,
    /// Bytes of payloads received from other nodes since the start.
    pub bytes_received: u64,
}

/// This node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeInfo {
    /// Its key.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The version of its software.
    pub version: String,
    /// Rises with each start.
    pub epoch: u64,
    /// The fabric's id.
    pub fabric: String,
    /// The fabric's name.
    pub fabric_name: String,
    /// The currency of every amount.
    pub currency: String,
    /// Whether it has joined.
    pub joined: bool,
    /// Why it grants nothing, if so.
    pub halted: Option<String>,
    /// Whether it has a mandate to order in a lessee's name.
    pub can_order: bool,
    /// Where it listens.
    pub addresses: Planes,
    /// Links that are up.
    pub links: usize,
    /// Records known of all nodes.
    pub records: usize,
    /// All it lends.
    pub capacity: Quantity,
    /// What is promised of it.
    pub promised: Quantity,
    /// What the operator keeps out of new leases.
    pub withheld: Quantity,
    /// Whether nothing is granted or renewed, by the operator's will.
    pub drained: bool,
    /// Orders that wait for an answer.
    pub pursuits: usize,
    /// What was counted.
    pub counters: Counted,
    /// Payloads.
    pub payloads: Moved,
}

/// A node as this node's map shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeLine {
    /// Its key.
    pub id: String,
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
    pub hardware: Quantity,
    /// What it has free, in leasable shapes.
    pub shapes: Vec<Quantity>,
    /// Its prices.
    pub prices: Option<Prices>,
    /// What its operator says about it.
    pub labels: BTreeMap<String, String>,
    /// Where it is reached.
    pub addresses: Planes,
}

impl From<&NodeView> for NodeLine {
    fn from(of: &NodeView) -> Self {
        let at = &of.addresses;
        let (link, probe, data) = (at.link.clone(), at.probe.clone(), at.data.clone());
        Self {
            id: of.id.to_string(),
            name: of.name.clone(),
            up: of.up,
            linked: of.linked,
            version: of.version.clone(),
            organisation: of.organisation.clone(),
            hardware: (&of.hardware).into(),
            shapes: of.shapes.iter().map(Into::into).collect(),
            prices: of.rates.as_ref().map(Into::into),
            labels: of.labels.iter().cloned().collect(),
            addresses: Planes { link, probe, data },
        }
    }
}

/// Every node that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Nodes {
    /// The currency of every amount.
    pub currency: String,
    /// The nodes.
    pub nodes: Vec<NodeLine>,
}

/// What a node offers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OfferLine {
    /// Who lends.
    pub lessor: String,
    /// Its name.
    pub name: String,
    /// Whether it is held to be alive.
    pub up: bool,
    /// The offer's id.
    pub offer: String,
    /// How long ago it came to this node.
    pub age_ms: u64,
    /// What is free, in leasable shapes.
    pub shapes: Vec<Quantity>,
    /// Its prices of firm capacity.
    pub prices: Prices,
    /// What slack capacity costs of that, in percent; absent when none is sold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slack_percent: Option<f32>,
    /// How long before it stands still a job is told that its lease is taken back.
    pub notice_ms: u64,
    /// How long it then stands frozen before it is ended.
    pub freeze_ms: u64,
    /// What a lessee gets back of the price of the time it misses then, in percent.
    pub credit_percent: f32,
    /// The longest term it grants.
    pub max_term_ms: u64,
    /// The runtimes it has.
    pub runtimes: Vec<String>,
    /// What confines a job there.
    pub isolation: Vec<String>,
    /// What its operator says about it.
    pub labels: BTreeMap<String, String>,
}

/// Thousandths as percent: exact to the one decimal that they have.
fn percent(permille: u16) -> f32 {
    f32::from(permille) / 10.0
}

impl OfferLine {
    /// The offer of a node that has one.
    #[must_use]
    pub fn of(of: &NodeView) -> Option<Self> {
        Some(Self {
            lessor: of.id.to_string(),
            name: of.name.clone(),
            up: of.up,
            offer: of.offer?.to_string(),
            age_ms: of.offer_age.unwrap_or_default().as_millis(),
            shapes: of.shapes.iter().map(Into::into).collect(),
            prices: of.rates.as_ref()?.into(),
            slack_percent: of.slack_permille.map(percent),
            notice_ms: of.early.notice.as_millis(),
            freeze_ms: of.early.freeze.as_millis(),
            credit_percent: percent(of.early.credit_permille),
            max_term_ms: of.max_term.as_millis(),
            runtimes: of.runtimes.clone(),
            isolation: of.isolation.clone(),
            labels: of.labels.iter().cloned().collect(),
        })
    }
}

/// Every offer that is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Offers {
    /// The currency of every amount.
    pub currency: String,
    /// The offers.
    pub offers: Vec<OfferLine>,
}

/// Whether the node is ready to order and to lend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ready {
    /// Whether it is.
    pub ready: bool,
    /// Why not.
    pub why: Vec<String>,
}

/// That the node answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Healthy {
    /// Always true: a node that does not answer says nothing.
    pub ok: bool,
}

/// A payload that the node holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PayloadLine {
    /// Its BLAKE3 root.
    pub root: String,
    /// How many bytes.
    pub size: u64,
    /// Whether the operator wants it kept, whatever else needs its room.
    pub pinned: bool,
    /// Whether it belongs to a lease that this node holds, or to a job that it has yet to begin.
    pub leased: bool,
    /// Whether peers who ask for it do not get it.
    pub private: bool,
    /// Whether it begins as an index does: a payload that names others.
    pub index: bool,
}

/// What an index says, in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IndexStat {
    /// How many files it names.
    pub files: usize,
    /// How many payloads these are.
    pub payloads: usize,
    /// How many bytes these payloads have together.
    pub size: u64,
    /// How many of these payloads are not here.
    pub missing: usize,
}

/// A node that says it has a payload, or is fetching it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HolderLine {
    /// Its key.
    pub id: String,
    /// Its name.
    pub name: String,
}

/// A payload, as this node and the fabric have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PayloadStat {
    /// Its BLAKE3 root.
    pub root: String,
    /// How many bytes, where this node holds it.
    pub size: Option<u64>,
    /// Whether the operator wants it kept here.
    pub pinned: bool,
    /// Whether it belongs to a lease that this node holds, or to a job that it has yet to begin.
    pub leased: bool,
    /// What it names, where it is an index and here.
    pub index: Option<IndexStat>,
    /// Other nodes that say they have it, at most 64 of them.
    pub holders: Vec<HolderLine>,
}

/// Where a fetch stands: one line of many, the last of which is `done` or `failed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Fetching {
    /// It is on its way.
    Moving {
        /// Bytes that are here and verified.
        bytes: u64,
        /// Bytes in all, as far as is known: what an index names is known once that is here.
        size: u64,
        /// Holders that something is under way from.
        holders: usize,
    },
    /// It is held.
    Done {
        /// Bytes in all.
        size: u64,
        /// Bytes that came over the network.
        received: u64,
        /// Holders that sent some of it.
        holders: usize,
        /// How long it took, in milliseconds.
        took_ms: u64,
    },
    /// It did not come. What did rests for another try.
    Failed {
        /// What went wrong.
        error: ErrorInside,
    },
}

/// Every payload that the node holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Payloads {
    /// The payloads.
    pub payloads: Vec<PayloadLine>,
}

/// A payload that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Uploaded {
    /// Its BLAKE3 root.
    pub root: String,
    /// How many bytes.
    pub size: u64,
    /// Whether the node did not hold it before.
    pub new: bool,
}

/// A question for a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// What is wanted.
    pub want: WantText,
}

/// A host worth asking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChoiceLine {
    /// Its key.
    pub lessor: String,
    /// Its name.
    pub name: String,
    /// The offer to order from.
    pub offer: String,
    /// What it costs there per hour.
    pub rate: Money,
    /// The most that the lease can cost there.
    pub worst_case: Money,
    /// Lower is better.
    pub score: u64,
    /// Why it stands where it stands.
    pub why: String,
}

impl From<&Choice> for ChoiceLine {
    fn from(of: &Choice) -> Self {
        Self {
            lessor: of.lessor.to_string(),
            name: of.name.clone(),
            offer: of.offer.to_string(),
            rate: Money(of.rate),
            worst_case: Money(of.worst_case),
            score: of.score,
            why: of.why.clone(),
        }
    }
}

/// A host that is not worth asking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgainstLine {
    /// Its key.
    pub lessor: String,
    /// Its name.
    pub name: String,
    /// What speaks against it.
    pub reasons: Vec<String>,
}

impl From<&Against> for AgainstLine {
    fn from(of: &Against) -> Self {
        let (lessor, name) = (of.lessor.to_string(), of.name.clone());
        Self { lessor, name, reasons: of.reasons.clone() }
    }
}

/// The hosts, ranked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// The currency of every amount.
    pub currency: String,
    /// Worth asking, best first.
    pub choices: Vec<ChoiceLine>,
    /// Not worth asking.
    pub against: Vec<AgainstLine>,
    /// How many fitted but were not in the sample.
    pub unsampled: usize,
}

impl Plan {
    /// A ranking in this currency.
    #[must_use]
    pub fn of(ranking: &Ranking, currency: String) -> Self {
        Self {
            currency,
            choices: ranking.choices.iter().map(Into::into).collect(),
            against: ranking.against.iter().map(Into::into).collect(),
            unsampled: ranking.unsampled,
        }
    }
}

/// A question for an order that a lessee signs elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OrderRequest {
    /// What is wanted.
    pub want: WantText,
    /// The key that will sign.
    pub lessee: String,
    /// The certificate that admits it, as text (`LEASEHOLD SIGNED CERTIFICATE`).
    pub certificate: String,
}

/// An order to be signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OrderDraft {
    /// The unsigned order, as text (`LEASEHOLD UNSIGNED ORDER`).
    pub order: String,
    /// Whom it names.
    pub choice: ChoiceLine,
    /// The currency of every amount.
    pub currency: String,
}

/// A question for a lease: by a want or by a signed order, not both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseRequest {
    /// What is wanted, ordered under the node's mandate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub want: Option<WantText>,
    /// An order that the lessee signed, as text (`LEASEHOLD SIGNED ORDER`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
}

/// What a host said that was asked before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeardLine {
    /// Its key.
    pub lessor: String,
    /// Its name.
    pub name: String,
    /// Why not; absent when it did not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub reason: Option<Reason>,
    /// In words.
    pub detail: String,
}

impl From<&Heard> for HeardLine {
    fn from(of: &Heard) -> Self {
        let (lessor, name) = (of.lessor.to_string(), of.name.clone());
        Self { lessor, name, reason: of.reason, detail: of.detail.clone() }
    }
}

/// A granted lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Leased {
    /// Its id.
    pub lease: String,
    /// The order behind it.
    pub order: String,
    /// Who lends, and why that one.
    pub choice: ChoiceLine,
    /// Who said no before.
    pub heard: Vec<HeardLine>,
    /// The currency of every amount.
    pub currency: String,
}

/// Which side of a lease this node is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// It borrows.
    Held,
    /// It lends.
    Lent,
}

/// What was used, by the latest receipt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Used {
    /// How long was billed.
    pub billed_ms: u64,
    /// CPU time of the job.
    pub cpu_ms: u64,
    /// Memory over time.
    pub memory_mib_ms: u64,
    /// The most memory at once, in bytes.
    pub memory_peak: u64,
}

impl From<&Usage> for Used {
    fn from(of: &Usage) -> Self {
        Self {
            billed_ms: of.billed.as_millis(),
            cpu_ms: of.cpu.as_millis(),
            memory_mib_ms: of.memory_mib_ms,
            memory_peak: of.memory_peak,
        }
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OutcomeLine {
    /// `exited`, `trapped`, `not_runnable`, `no_payload`, `out_of_memory`, `out_of_disk`,
    /// `deadline`, `stopped` or `lost`.
    pub kind: String,
    /// Its exit code, when it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// In words.
    pub text: String,
}

impl From<&Outcome> for OutcomeLine {
    fn from(of: &Outcome) -> Self {
        let code = if let Outcome::Exited(code) = of { Some(*code) } else { None };
        Self { kind: of.word().into(), code, text: of.to_string() }
    }
}

/// An early end that was announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EarlyLine {
    /// `reclaimed`, `revoked` or `exposure`.
    pub reason: String,
    /// In what time its job is ended.
    pub in_ms: u64,
}

/// A lease, from either side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeaseLine {
    /// Its id; absent while only ordered.
    pub lease: Option<String>,
    /// The order behind it.
    pub order: String,
    /// Which side this node is on.
    pub side: Side,
    /// `ordered`, `granted`, `claimed` and `ended` when held; `granted`, `active`, `draining`
    /// and `ended` when lent.
    pub stage: String,
    /// Who lends.
    pub lessor: String,
    /// Who borrows, when lent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lessee: Option<String>,
    /// What is lent.
    pub shape: Quantity,
    /// The model whose tokens are lent, if it is one, and how many of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelUse>,
    /// `firm` or `slack`.
    pub class: String,
    /// The price per hour.
    pub rate: Money,
    /// The most it can cost, when held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_case: Option<Money>,
    /// When it was granted.
    pub decided: String,
    /// For how long.
    pub term_ms: u64,
    /// To what term it may be renewed.
    pub max_term_ms: u64,
    /// How often it was renewed.
    pub version: u64,
    /// How much of that is left.
    pub left_ms: u64,
    /// Whether a job's processes exist here, when lent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<bool>,
    /// Whether its job stands still, unbilled, when lent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<bool>,
    /// Why it is to end early, when lent and when that was announced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_early: Option<EarlyLine>,
    /// What was used.
    pub used: Used,
    /// What is owed.
    pub charge: Money,
    /// How many receipts there are.
    pub receipts: u64,
    /// Up to which the lessee countersigned.
    pub acknowledged: u64,
    /// What was wrong with the last receipt, if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objection: Option<String>,
    /// Why it ended.
    pub end: Option<String>,
    /// How its job ended.
    pub outcome: Option<OutcomeLine>,
    /// The currency of every amount.
    pub currency: String,
}

/// The snake-case word for a unit variant, as its serialisation has it.
pub(super) fn word(of: impl Serialize) -> String {
    match serde_json::to_value(of) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// A variant's name in snake case, for enums that serialise otherwise.
fn named(of: impl std::fmt::Debug) -> String {
    let mut name = String::new();
    for letter in format!("{of:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

/// What was used of a model under a lease, by its latest receipt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelUse {
    /// What it is called.
    pub name: String,
    /// What it is.
    pub digest: String,
    /// Price of a million tokens that are asked.
    pub prompt_million: Money,
    /// Price of a million tokens that are answered.
    pub completion_million: Money,
    /// How many requests.
    pub requests: u64,
    /// Tokens that were asked.
    pub prompt_tokens: u64,
    /// Tokens that were answered.
    pub completion_tokens: u64,
}

impl ModelUse {
    fn of(terms: &ModelTerms, usage: &Usage) -> Self {
        Self {
            name: terms.name.clone(),
            digest: terms.digest.to_string(),
            prompt_million: Money(terms.rates.prompt),
            completion_million: Money(terms.rates.completion),
            requests: usage.tally.requests,
            prompt_tokens: usage.tally.prompt_tokens,
            completion_tokens: usage.tally.completion_tokens,
        }
    }
}

impl LeaseLine {
    /// A lease this node holds.
    #[must_use]
    pub fn held(of: &HeldView, view: &View) -> Self {
        Self {
            lease: of.id.map(|id| id.to_string()),
            order: of.order.to_string(),
            side: Side::Held,
            stage: named(of.stage),
            lessor: of.lessor.to_string(),
            lessee: None,
            shape: (&of.shape).into(),
            model: of.model.as_ref().map(|terms| ModelUse::of(terms, &of.usage)),
            class: named(of.class),
            rate: Money(of.rate),
            worst_case: Some(Money(of.worst_case)),
            decided: of.decided.to_string(),
            term_ms: of.term.as_millis(),
            max_term_ms: of.longest.as_millis(),
            version: of.version,
            left_ms: if of.end.is_some() { 0 } else { of.left.as_millis() },
            running: None,
            frozen: None,
            ends_early: None,
            used: (&of.usage).into(),
            charge: Money(of.charge),
            receipts: of.receipts,
            acknowledged: of.receipts,
            objection: of.objection.map(word),
            end: of.end.map(word),
            outcome: of.outcome.as_ref().map(Into::into),
            currency: view.currency.clone(),
        }
    }

    /// A lease this node granted, as of `now`.
    #[must_use]
    pub fn lent(of: &LentView, view: &View, now: Boot) -> Self {
        Self {
            lease: Some(of.id.to_string()),
            order: of.order.to_string(),
            side: Side::Lent,
            stage: named(of.stage),
            lessor: view.me.to_string(),
            lessee: Some(of.lessee.to_string()),
            shape: (&of.shape).into(),
            model: of.model.as_ref().map(|terms| ModelUse::of(terms, &of.usage)),
            class: named(of.class),
            rate: Money(of.rate),
            worst_case: None,
            decided: of.decided.to_string(),
            term_ms: of.term.as_millis(),
            max_term_ms: of.longest.as_millis(),
            version: of.version,
            left_ms: if of.end.is_some() { 0 } else { of.term_end.since(now).as_millis() },
            running: Some(of.running),
            frozen: Some(of.frozen),
            ends_early: of.ends_early.filter(|_| of.end.is_none()).map(|(why, end)| EarlyLine {
                reason: word(why),
                in_ms: end.since(now).as_millis(),
            }),
            used: (&of.usage).into(),
            charge: Money(of.charge),
            receipts: of.receipts,
            acknowledged: of.acknowledged,
            objection: None,
            end: of.end.map(word),
            outcome: of.outcome.as_ref().map(Into::into),
            currency: view.currency.clone(),
        }
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stage == "ended"
    }
}

/// Leases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Leases {
    /// The leases, those that are held first.
    pub leases: Vec<LeaseLine>,
}

/// First use of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClaimRequest {
    /// What runs.
    pub job: JobText,
}

/// That a claim was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Claimed {
    /// Which lease.
    pub lease: String,
    /// Who runs the job.
    pub lessor: String,
}

/// That a release was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Released {
    /// Which lease.
    pub lease: String,
}

/// How long a lease is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenewRequest {
    /// Its new time in all, from when it was granted.
    #[schema(example = "1h")]
    pub ttl: Text,
}

/// That a lease was made longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Renewed {
    /// Which lease.
    pub lease: String,
    /// How often it was renewed.
    pub version: u64,
    /// How long it is in all.
    pub term_ms: u64,
    /// How much of that is left.
    pub left_ms: u64,
}

/// Leases on several hosts that exist together or not at all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GangRequest {
    /// What each of them is to be.
    pub want: WantText,
    /// How many.
    #[schema(example = 8)]
    pub nodes: u16,
    /// What each of them runs; without it they wait to be claimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobText>,
    /// What follows when one is lost.
    #[serde(default)]
    pub on_loss: OnLoss,
}

/// What follows when a member of a gang is lost.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// The others are given back.
    #[default]
    End,
    /// The others go on.
    Continue,
}

/// A gang that is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ganged {
    /// Its certificate.
    pub gang: String,
    /// Its members in the order of their ranks.
    pub leases: Vec<Leased>,
    /// Who said no before.
    pub heard: Vec<HeardLine>,
    /// The currency of every amount.
    pub currency: String,
}

/// Capacity that the operator wants back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReclaimRequest {
    /// Cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "16")]
    pub cpu: Option<Text>,
    /// Bytes of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "64G")]
    pub memory: Option<Text>,
    /// Bytes of disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Text>,
    /// In what time.
    #[schema(example = "60s")]
    pub within: Text,
    /// Whether only to say what that would come to.
    #[serde(default)]
    pub dry_run: bool,
}

/// That a host is to be emptied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// In what time.
    #[schema(example = "30m")]
    pub within: Text,
    /// Whether firm leases that end later are revoked too.
    #[serde(default)]
    pub revoke: bool,
    /// Whether only to say what that would come to.
    #[serde(default)]
    pub dry_run: bool,
}

/// What is taken back, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reclaimed {
    /// Whether it was only asked what that would come to.
    pub dry_run: bool,
    /// The leases that end.
    pub leases: Vec<ReclaimedLine>,
    /// What is free already.
    pub free: Quantity,
    /// All credits together.
    pub credit: Money,
    /// The currency of every amount.
    pub currency: String,
}

/// A lease that ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReclaimedLine {
    /// Which.
    pub lease: String,
    /// What comes back.
    pub shape: Quantity,
    /// `firm` or `slack`.
    pub class: String,
    /// `term`, `reclaimed`, `revoked` or what ends it already.
    pub reason: String,
    /// In what time it is back at the latest.
    pub within_ms: u64,
    /// What its lessee is credited.
    pub credit: Money,
}

impl Reclaimed {
    /// What `plan` comes to.
    #[must_use]
    pub fn of(plan: &ReclaimPlan, dry_run: bool, currency: String) -> Self {
        let line = |lease: &leasehold_proto::minds::book::Reclaimed| ReclaimedLine {
            lease: lease.lease.to_string(),
            shape: (&lease.shape).into(),
            class: word(lease.class),
            reason: word(lease.why),
            within_ms: lease.within.as_millis(),
            credit: Money(lease.credit),
        };
        Self {
            dry_run,
            leases: plan.leases.iter().map(line).collect(),
            free: (&plan.free).into(),
            credit: Money(plan.credit),
            currency,
        }
    }
}

/// Keys whose word does not count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quarantine {
    /// Each of them.
    pub keys: Vec<QuarantineLine>,
}

/// A key that was convicted of saying two different things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuarantineLine {
    /// The key.
    pub key: String,
    /// The name of its node, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What both objects say they are.
    pub kind: String,
    /// In which epoch.
    pub epoch: u64,
    /// Under which number.
    pub number: u64,
    /// Both objects, as text: `leasehold-keys verify` checks them.
    pub proof: String,
}

/// What an organisation says about a quarantined key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReinstateRequest {
    /// The signed reinstatement, as text.
    pub reinstatement: String,
}

/// That a key is believed again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reinstated {
    /// The key.
    pub key: String,
    /// In epochs above this.
    pub above: u64,
}

/// That the host sells again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resumed {
    /// How many leases are not taken back after all.
    pub lifted: usize,
}

/// How a held lease ended, or that it has not yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EndLine {
    /// Whether it ended within the time asked for.
    pub ended: bool,
    /// Why.
    pub reason: Option<String>,
    /// How its job ended.
    pub outcome: Option<OutcomeLine>,
    /// What is owed.
    pub charge: Money,
    /// What is owed back, because the lessor's side ended it early.
    pub credit: Money,
    /// How many receipts were countersigned.
    pub receipts: u64,
    /// The currency of every amount.
    pub currency: String,
}

impl EndLine {
    /// An end.
    #[must_use]
    pub fn of(ended: &Ended, currency: String) -> Self {
        Self {
            ended: true,
            reason: Some(word(ended.reason)),
            outcome: ended.outcome.as_ref().map(Into::into),
            charge: Money(ended.charge),
            credit: Money(ended.credit),
            receipts: ended.receipts,
            currency,
        }
    }

    /// No end yet.
    #[must_use]
    pub fn not_yet(currency: String) -> Self {
        let charge = Money::default();
        let credit = Money::default();
        Self { ended: false, reason: None, outcome: None, charge, credit, receipts: 0, currency }
    }
}

/// A receipt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReceiptLine {
    /// One for the first.
    pub number: u64,
    /// Its id.
    pub receipt: String,
    /// What was used since the claim.
    pub used: Used,
    /// What is owed since the claim.
    pub charge: Money,
    /// When it was written.
    pub at: String,
    /// Why the lease ended, in its final receipt.
    pub end: Option<String>,
    /// Whether the lessee countersigned it, or one after it.
    pub countersigned: bool,
}

/// The receipts of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receipts {
    /// Which lease.
    pub lease: String,
    /// The receipts in order.
    pub receipts: Vec<ReceiptLine>,
    /// The currency of every amount.
    pub currency: String,
}

/// A job that runs here, or elsewhere under a lease that this node holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobLine {
    /// The lease it runs under.
    pub lease: String,
    /// Which side of the lease this node is on.
    pub side: Side,
    /// Where it runs.
    pub lessor: String,
    /// Who borrows, when lent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lessee: Option<String>,
    /// What is lent.
    pub shape: Quantity,
    /// How much of the term is left.
    pub left_ms: u64,
    /// What was used, by the latest receipt.
    pub used: Used,
    /// What is owed, by the latest receipt.
    pub charge: Money,
    /// The currency of every amount.
    pub currency: String,
}

/// Jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Jobs {
    /// The jobs, those under held leases first.
    pub jobs: Vec<JobLine>,
}

impl JobLine {
    /// The job under a lease, if one runs.
    #[must_use]
    pub fn of(line: LeaseLine) -> Option<Self> {
        let runs = match line.side {
            Side::Held => line.stage == "claimed" && line.outcome.is_none(),
            Side::Lent => line.running == Some(true),
        };
        if !runs {
            return None;
        }
        Some(Self {
            lease: line.lease?,
            side: line.side,
            lessor: line.lessor,
            lessee: line.lessee,
            shape: line.shape,
            left_ms: line.left_ms,
            used: line.used,
            charge: line.charge,
            currency: line.currency,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_exact_text() {
        let text = serde_json::to_string(&Money(Amount(50_000_001))).expect("JSON");
        assert_eq!(text, "\"0.050000001\"");
        assert_eq!(serde_json::from_str::<Money>(&text).expect("money").0, Amount(50_000_001));
        assert!(serde_json::from_str::<Money>("\"-1\"").is_err());
    }

    #[test]
    fn an_outcome_names_its_kind_and_code() {
        let exited = OutcomeLine::from(&Outcome::Exited(3));
        assert_eq!((exited.kind.as_str(), exited.code), ("exited", Some(3)));
        let memory = OutcomeLine::from(&Outcome::OutOfMemory);
        assert_eq!((memory.kind.as_str(), memory.code), ("out_of_memory", None));
    }

    #[test]
    fn requests_refuse_unknown_fields_by_name() {
        let text = r#"{"want": {"max_price": "1", "budget": "1"}, "mood": "good"}"#;
        let error = serde_json::from_str::<LeaseRequest>(text).expect_err("refused");
        assert!(error.to_string().contains("mood"), "{error}");
    }
}
