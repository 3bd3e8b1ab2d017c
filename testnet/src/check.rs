//! The invariants of DESIGN.md §6, checked over a history of observations.
//!
//! The check knows no world: whoever runs nodes, virtual or real, tells it what was seen (objects
//! that were signed and left a node, what a node's book says, jobs that started and ended, nodes
//! that stopped and what they read back) and it says what must not be. Nothing in here asks a
//! node's minds what they think of it: sums, deadlines and chains are computed anew.
//!
//! Some nodes may be known to be dishonest ([`Seen::Dishonest`]): nothing is asked of what those
//! sign, and everything still of what the others make of it.
//!
//! | invariant | what it is checked by |
//! |---|---|
//! | 1 capacity | the sum over leases not ended, at every change and against every view |
//! | 2 durability | everything that left is among what a node reads back at its start |
//! | 3 idempotence | one (lessee, request) has one grant per lessor; the answer is to the question |
//! | 4 bounded life | the end of every job against term and grace |
//! | 5 the lessee stops first | every view of a held lease against its lessor's deadline |
//! | 6 ended is final | stages only rise; what is not claimed lapses in time; terms never shrink, and each renewal is of the version that it names |
//! | 7 reap before reuse | no lease is over while its job is there |
//! | 8 epochs | one body per (signer, kind, subject, epoch, seq); every start in a higher epoch |
//! | 9 receipts | numbers, hashes and charges computed anew; every proof verifies |
//! | 9 receipts, among the dishonest | nobody honest countersigns more than was used or agreed, or is owed more than the exposure |
//! | 10 gangs | no job of a gang starts before every member of it has committed |
//! | 11 others' leases | what a lessor accepts is its lessee's |
//! | liveness | [`Check::settled`]: what must be so once all is quiet |

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use leasehold_proto::base::id::{Hash, KeyId, LeaseId, RequestId};
use leasehold_proto::base::money::HOUR_MS;
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::{Boot, BootId, Span};
use leasehold_proto::core::{Kept, LentStage, View};
use leasehold_proto::minds::book::{self, Lent};
use leasehold_proto::words::contract::{
    Acceptance, Gang, Grant, Member, Order, Refusal, Renew, Renewal, Termination,
};
use leasehold_proto::words::object::{Envelope, Kind, body_in};
use leasehold_proto::words::sign::Signed;
use leasehold_proto::words::usage::{Acknowledgement, Objection, ObjectionReason, Receipt};

/// How late a node may act on a deadline: a second, as people would say "at once".
const PROMPT_US: u64 = 1_000_000;
/// How long a lessee is given to countersign, in milliseconds, after a receipt that may wait for
/// its interval first.
const ANSWER_MS: u64 = 4_000;
/// The most violations that are collected.
const MAX_VIOLATIONS: usize = 20;

/// Where something was seen, and when.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// True time, in microseconds from the start of the run.
    pub us: u64,
    /// Which process's host, counting from zero. Two hosts may have one key.
    pub host: usize,
    /// What that host's boot clock read.
    pub boot: Boot,
}

/// Something that was seen.
#[derive(Debug)]
pub enum Seen<'a> {
    /// A node started, in this boot and epoch, and read this back.
    Started {
        /// Its key.
        key: KeyId,
        /// The host's boot.
        boot: BootId,
        /// Its epoch.
        epoch: u64,
        /// What it may lend.
        capacity: &'a Resources,
        /// What it read back.
        kept: &'a [Kept],
    },
    /// It was killed.
    Stopped,
    /// It stands still.
    Paused,
    /// It goes on.
    Resumed,
    /// It runs, or will, beside or after a copy of itself: what it signs may be contradicted.
    Copied,
    /// This key's holder is not honest: what it signs is not judged, what others do with it is.
    Dishonest(KeyId),
    /// It is about to claim a lease that it holds.
    Claiming(LeaseId),
    /// It says that it grants nothing any more.
    Halted,
    /// Its book says this of a lease.
    Lent(LeaseId, &'a Lent),
    /// It signed this, and it left in answer to the object called so.
    Signed(&'a Signed, Option<Hash>),
    /// A job was started.
    JobStarted(LeaseId),
    /// A job's warden has taken a deadline.
    JobDeadline(LeaseId),
    /// A job's last process is gone.
    JobEnded(LeaseId),
    /// How things stand there.
    View(&'a View),
}

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which, by its number and name in DESIGN.md.
    pub invariant: &'static str,
    /// When it was noticed, in true milliseconds from the start of the run.
    pub at_ms: u64,
    /// On which host.
    pub host: usize,
    /// What was found.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { invariant, at_ms, host, what } = self;
        write!(f, "invariant {invariant}: at {at_ms}ms on host {host}: {what}")
    }
}

/// A host as the check remembers it.
#[derive(Debug, Default)]
struct Host {
    key: KeyId,
    boot: BootId,
    epoch: u64,
    capacity: Resources,
    promised: Resources,
    /// Since when it runs without a break, in true time.
    running_since: Option<u64>,
    copied: bool,
    /// It was started in an epoch that its key had lived through already.
    outdated: bool,
    halted: bool,
    /// Leases in its book.
    leases: BTreeSet<LeaseId>,
    /// What it signed and sent, by what it must be found as after a restart.
    left: BTreeSet<(Evidence, Hash)>,
    /// The highest epoch under anything it signed.
    signed_epoch: u64,
    /// The highest epoch in which it was seen at work. One that was killed while it started may
    /// not have made its epoch durable, and then starts in the same one again.
    lived_epoch: u64,
}

/// As what an object must be found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Evidence {
    Grant,
    Acceptance,
    Receipt,
    Termination,
    Claim,
    Release,
    Acknowledgement,
    Commit,
}

impl Evidence {
    /// As what an object of this kind must be found; none where nothing depends on it.
    pub(crate) const fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Grant => Some(Self::Grant),
            Kind::Acceptance | Kind::Renewal => Some(Self::Acceptance),
            Kind::Commit => Some(Self::Commit),
            Kind::Receipt => Some(Self::Receipt),
            Kind::Termination => Some(Self::Termination),
            Kind::Claim => Some(Self::Claim),
            Kind::Release => Some(Self::Release),
            Kind::Acknowledgement => Some(Self::Acknowledgement),
            _ => None,
        }
    }
}

/// A lease as the check remembers it.
#[derive(Debug)]
struct Lease {
    host: usize,
    grant: Grant,
    request: RequestId,
    boot: BootId,
    decided: Boot,
    /// How long its term is now, and how often that was changed.
    term: Span,
    version: u64,
    /// Whether its term was changed and its job's warden has not taken a deadline since.
    unextended: bool,
    /// The end of its term, in true time.
    term_end_us: u64,
    /// Until when it may be claimed, in true time.
    claim_by_us: u64,
    /// The gang that it has committed to, with its members.
    gang: Option<(Hash, Vec<Member>)>,
    stage: LentStage,
    claimed: bool,
    claimed_us: Option<u64>,
    running: bool,
    chain: Chain,
}

/// Where the receipts stand, computed anew.
#[derive(Debug, Default)]
struct Chain {
    ids: Vec<Hash>,
    billed: Span,
    closed: bool,
    termination: Option<Hash>,
}

/// One body: signer, kind, subject, epoch, seq.
type Version = (KeyId, Kind, Hash, u64, u64);

/// How a node stands once all is quiet.
#[derive(Debug)]
pub struct Settled {
    /// Its host.
    pub host: usize,
    /// Its key.
    pub key: KeyId,
    /// How things stand there; `None` when it does not run.
    pub view: Option<View>,
    /// Its commands that were never answered, in words.
    pub unanswered: Vec<String>,
}

/// The history, as far as it is needed.
#[derive(Debug, Default)]
pub struct Check {
    hosts: BTreeMap<usize, Host>,
    leases: HashMap<LeaseId, Lease>,
    requests: HashMap<(KeyId, KeyId, RequestId), LeaseId>,
    versions: HashMap<Version, Hash>,
    /// When a lease that is not claimed must have lapsed.
    lapses: BTreeSet<(u64, LeaseId)>,
    copied: BTreeSet<KeyId>,
    /// Who is known to be dishonest.
    liars: BTreeSet<KeyId>,
    /// The receipts that those have signed.
    dubious: HashMap<Hash, Receipt>,
    /// When and in which boot somebody first claimed a lease.
    claims: HashMap<LeaseId, (u64, BootId)>,
    /// The longest term that a lessee asked a lease to be renewed to.
    asked_terms: HashMap<LeaseId, Span>,
    /// What was agreed to be owed, by lease.
    agreed: HashMap<LeaseId, u64>,
    /// What was refused.
    refused: HashSet<Hash>,
    /// Who signed an act.
    actors: HashMap<Hash, KeyId>,
    /// How often a dishonest lessor promised more than it has.
    oversold: usize,
    /// How much later than promptly a node and its wardens may act on a deadline, where the
    /// machine is slow and its processes wait for each other.
    slack_us: u64,
    /// The highest epoch in which a node of this key was started.
    epochs: BTreeMap<KeyId, u64>,
    /// Of which version each renewal that was asked for is.
    renews: HashMap<Hash, u64>,
    /// The members whose jobs were started, by gang.
    started: BTreeMap<Hash, (usize, BTreeSet<LeaseId>)>,
    violations: Vec<Violation>,
}

/// Whether `owed` is more than the lessor may be left with: the limit, and what runs up while the
/// lessee is given time to answer.
fn exposed(grant: &Grant, owed: u64, slack_us: u64) -> bool {
    let answer_ms = u128::from(ANSWER_MS + slack_us / 1000);
    let meanwhile = u128::from(grant.rate.0) * answer_ms / u128::from(HOUR_MS) + 1;
    u128::from(owed) > u128::from(grant.exposure.0) + meanwhile
}

impl Check {
    /// A check of a world in which everybody may be `slack` later than in an ideal one.
    #[must_use]
    pub fn with_slack(slack: Span) -> Self {
        Self { slack_us: slack.as_millis() * 1000, ..Self::default() }
    }

    /// How late somebody may act on a deadline, in microseconds.
    const fn prompt_us(&self) -> u64 {
        PROMPT_US + self.slack_us
    }

    /// What was found so far.
    #[must_use]
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// How many leases were seen.
    #[must_use]
    pub fn leases(&self) -> usize {
        self.leases.len()
    }

    /// How often a dishonest lessor promised more than it has.
    #[must_use]
    pub const fn oversold(&self) -> usize {
        self.oversold
    }

    /// Whether what this key signs is not judged.
    fn is_spared(&self, key: &KeyId) -> bool {
        self.copied.contains(key) || self.liars.contains(key)
    }

    /// Notes what somebody else found.
    pub fn found(&mut self, invariant: &'static str, at: At, what: String) {
        if self.violations.len() < MAX_VIOLATIONS {
            let (at_ms, host) = (at.us / 1000, at.host);
            self.violations.push(Violation { invariant, at_ms, host, what });
        }
    }

    /// Takes one observation.
    pub fn see(&mut self, at: At, seen: Seen<'_>) {
        match seen {
            Seen::Started { key, boot, epoch, capacity, kept } => {
                self.started(at, key, boot, epoch, capacity, kept);
            }
            Seen::Stopped | Seen::Paused => {
                self.hosts.entry(at.host).or_default().running_since = None;
            }
            Seen::Resumed => {
                self.hosts.entry(at.host).or_default().running_since = Some(at.us);
            }
            Seen::Copied => {
                let host = self.hosts.entry(at.host).or_default();
                host.copied = true;
                self.copied.insert(host.key);
            }
            Seen::Dishonest(key) => {
                self.liars.insert(key);
            }
            Seen::Claiming(lease) => {
                let boot = self.hosts.get(&at.host).map(|host| host.boot).unwrap_or_default();
                self.claims.entry(lease).or_insert((at.us, boot));
            }
            Seen::Halted => self.hosts.entry(at.host).or_default().halted = true,
            Seen::Lent(id, lent) => self.lent(at, id, lent),
            Seen::Signed(signed, answers) => self.signed(at, signed, answers),
            Seen::JobStarted(id) => self.job(at, id, true),
            Seen::JobDeadline(id) => {
                if let Some(lease) = self.leases.get_mut(&id) {
                    lease.unextended = false;
                }
            }
            Seen::JobEnded(id) => self.job(at, id, false),
            Seen::View(view) => self.view(at, view),
        }
    }

    fn started(
        &mut self,
        at: At,
        key: KeyId,
        boot: BootId,
        epoch: u64,
        capacity: &Resources,
        kept: &[Kept],
    ) {
        let host = self.hosts.entry(at.host).or_default();
        let mut host = std::mem::take(host);
        let copied = host.copied || self.copied.contains(&key);
        let spared = copied || self.liars.contains(&key);
        if epoch <= host.lived_epoch.max(host.signed_epoch) && !spared {
            let was = host.lived_epoch.max(host.signed_epoch);
            self.found("8 (epochs)", at, format!("it started in epoch {epoch} after {was}"));
        }
        // What an earlier run asked for it may have said, too, as far as it knows itself.
        for kept in kept {
            if let Kept::Held(_, held) = kept
                && let (Some((_, term)), Some(grant)) = (&held.renew, &held.grant)
            {
                let longest = self.asked_terms.entry(LeaseId(grant.id())).or_default();
                *longest = (*term).max(*longest);
            }
        }
        let (found, leases) = recovered(kept);
        if !spared {
            // A claim that was refused may have given way to another one.
            let gone = |(what, id): &&(Evidence, Hash)| {
                *what != Evidence::Claim || !self.refused.contains(id)
            };
            let forgotten: Vec<_> = host.left.difference(&found).filter(gone).copied().collect();
            for (what, id) in forgotten {
                let what = format!("a {what:?} ({}) left and is forgotten", id.short());
                self.found("2 (durability)", at, what);
            }
        }
        for id in std::mem::take(&mut host.leases) {
            // What was decided but neither kept nor sent never was.
            if !leases.contains_key(&id) && !copied {
                self.leases.remove(&id);
            }
        }
        let top = self.epochs.entry(key).or_default();
        host.outdated = epoch <= *top;
        *top = epoch.max(*top);
        host.promised = Resources::default();
        host.key = key;
        host.boot = boot;
        host.epoch = epoch;
        host.capacity = capacity.clone();
        host.running_since = Some(at.us);
        host.halted = false;
        self.hosts.insert(at.host, host);
        for (id, lent) in leases {
            if let Some(known) = self.leases.get_mut(&id) {
                known.stage = lent.stage;
                (known.term, known.version) = (lent.term, lent.version);
                known.claimed = lent.claimed.is_some();
            }
            self.lent(at, id, lent);
        }
    }

    fn lent(&mut self, at: At, id: LeaseId, lent: &Lent) {
        let prompt_us = self.prompt_us();
        let Some(host) = self.hosts.get_mut(&at.host) else { return };
        let copied = host.copied || self.copied.contains(&host.key);
        let spared = copied || self.liars.contains(&host.key);
        if !self.leases.contains_key(&id) {
            let grant = body_in::<Grant>(&lent.grant.envelope);
            let order = body_in::<Order>(&lent.order.envelope);
            let (Some(grant), Some(order)) = (grant, order) else {
                self.found("3 (idempotence)", at, format!("lease {id} does not decode"));
                return;
            };
            if order.lessor != host.key || grant.order != lent.order.id() {
                self.found("3 (idempotence)", at, format!("lease {id} is of another order"));
                return;
            }
            let us = |boot: Boot| {
                let ahead = (boot.since(at.boot).as_millis() * 1000).saturating_add(at.us);
                ahead.saturating_sub(at.boot.since(boot).as_millis() * 1000)
            };
            let term_end_us = us(lent.decided + lent.term);
            if host.halted && lent.stage == LentStage::Granted {
                self.found("8 (epochs)", at, format!("{id} was granted by a halted node"));
                return;
            }
            let claim_by = us(lent.decided + grant.claim_within.min(grant.term));
            self.lapses.insert((claim_by + prompt_us, id));
            let lease = Lease {
                host: at.host,
                grant,
                request: order.request,
                boot: lent.boot,
                decided: lent.decided,
                term: lent.term,
                version: lent.version,
                unextended: false,
                gang: None,
                term_end_us,
                claim_by_us: claim_by,
                stage: LentStage::Granted,
                claimed: false,
                claimed_us: None,
                running: false,
                chain: Chain::default(),
            };
            self.leases.insert(id, lease);
        }
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let mut wrong = None;
        if lent.stage < lease.stage && !spared {
            let what = format!("lease {id} went from {:?} to {:?}", lease.stage, lent.stage);
            wrong = Some(("6 (ended is final)", what));
        }
        if lent.stage == LentStage::Ended && lease.running && lease.host == at.host {
            wrong = Some(("7 (reap before reuse)", format!("lease {id} ended with its job there")));
        }
        if (lent.term < lease.term || lent.version < lease.version) && !spared {
            let what = format!("the term of {id} went from {} to {}", lease.term, lent.term);
            wrong = Some(("6 (ended is final)", what));
        }
        // A renewal to the same term asks nothing of the warden: it has that deadline.
        lease.unextended |= lent.term > lease.term && lease.running;
        if lent.term != lease.term {
            (lease.term, lease.term_end_us) = (lent.term, {
                let end = lent.decided + lent.term;
                let ahead = (end.since(at.boot).as_millis() * 1000).saturating_add(at.us);
                ahead.saturating_sub(at.boot.since(end).as_millis() * 1000)
            });
        }
        lease.version = lent.version;
        if lease.gang.is_none()
            && let Some(joined) = &lent.joined
            && let Some(gang) = body_in::<Gang>(&joined.gang.envelope)
        {
            lease.gang = Some((joined.gang.id(), gang.members));
        }
        lease.stage = lent.stage;
        lease.claimed |= lent.claimed.is_some();
        if lent.claimed.is_some() {
            lease.claimed_us.get_or_insert(at.us);
        }
        if lease.boot != lent.boot {
            // After a reboot its deadlines were set anew.
            (lease.boot, lease.decided) = (lent.boot, lent.decided);
        }
        let counted = host.leases.contains(&id);
        match (lent.stage == LentStage::Ended, counted) {
            (false, false) => {
                host.leases.insert(id);
                host.promised = host.promised.plus(&lease.grant.shape);
            }
            (true, true) => {
                host.leases.remove(&id);
                host.promised = host.promised.minus(&lease.grant.shape);
            }
            _ => {}
        }
        let oversold = !host.promised.fits(&host.capacity);
        if oversold && self.liars.contains(&host.key) {
            self.oversold += 1;
        } else if oversold {
            let what = format!("promised {} of {}", host.promised, host.capacity);
            wrong = Some(("1 (capacity)", what));
        }
        if let Some((invariant, what)) = wrong {
            self.found(invariant, at, what);
        }
    }

    fn signed(&mut self, at: At, signed: &Signed, answers: Option<Hash>) {
        let Ok(header) = signed.header() else { return };
        let id = signed.id();
        let host = self.hosts.entry(at.host).or_default();
        let copied = self.copied.contains(&header.signer);
        let spared = host.copied || copied || self.liars.contains(&header.signer);
        host.lived_epoch = host.lived_epoch.max(host.epoch);
        if header.signer == host.key {
            host.signed_epoch = host.signed_epoch.max(header.epoch);
        }
        let version = (header.signer, header.kind, header.subject, header.epoch, header.seq);
        let known = *self.versions.entry(version).or_insert(id);
        if known != id && !spared {
            let (kind, epoch, seq) = (header.kind, header.epoch, header.seq);
            let what = format!("two bodies of a {kind} in epoch {epoch} with number {seq}");
            self.found("8 (epochs)", at, what);
        }
        if matches!(header.kind, Kind::Claim | Kind::Renew | Kind::Release) {
            self.actors.insert(id, header.signer);
        }
        if header.kind == Kind::Refusal
            && let Some(refusal) = body_in::<Refusal>(&signed.envelope)
        {
            self.refused.insert(refusal.of);
        }
        if header.kind == Kind::Renew {
            return self.asked_to_renew(signed);
        }
        if header.kind == Kind::Receipt && self.liars.contains(&header.signer) {
            let receipt = body_in::<Receipt>(&signed.envelope);
            self.dubious.extend(receipt.map(|receipt| (id, receipt)));
        }
        let Some(evidence) = Evidence::of(header.kind) else {
            if header.kind == Kind::Objection && !spared {
                self.objected(at, signed);
            }
            return;
        };
        if let Some(host) = self.hosts.get_mut(&at.host) {
            host.left.insert((evidence, id));
        }
        if evidence == Evidence::Acknowledgement
            && let Some(ack) = body_in::<Acknowledgement>(&signed.envelope)
        {
            let agreed = self.agreed.entry(ack.lease).or_default();
            *agreed = ack.charge.0.max(*agreed);
        }
        if spared {
            return;
        }
        match evidence {
            Evidence::Grant => self.granted(at, signed, answers),
            Evidence::Acceptance if header.kind == Kind::Renewal => self.renewed(at, signed),
            Evidence::Acceptance => self.accepted(at, signed, answers),
            Evidence::Receipt => self.receipt(at, signed),
            Evidence::Termination => self.terminated(at, signed),
            Evidence::Acknowledgement => self.acknowledged(at, signed),
            _ => {}
        }
    }

    fn granted(&mut self, at: At, signed: &Signed, answers: Option<Hash>) {
        let Ok(envelope) = Envelope::decode(&signed.envelope) else { return };
        let Ok(grant) = envelope.read::<Grant>() else { return };
        let id = LeaseId(signed.id());
        if answers.is_some_and(|order| order != grant.order) {
            let what = format!("an order is answered with the grant of another one ({id})");
            self.found("3 (idempotence)", at, what);
        }
        let signer = envelope.header.signer;
        if let Some(request) = self.leases.get(&id).map(|lease| lease.request) {
            let known = *self.requests.entry((signer, grant.lessee, request)).or_insert(id);
            if known != id {
                let what = format!("one request has two leases: {known} and {id}");
                self.found("3 (idempotence)", at, what);
            }
        }
    }

    fn accepted(&mut self, at: At, signed: &Signed, answers: Option<Hash>) {
        let Some(acceptance) = body_in::<Acceptance>(&signed.envelope) else { return };
        if answers.is_some_and(|act| act != acceptance.of) {
            let what = "an act is answered with the acceptance of another one".to_string();
            self.found("3 (idempotence)", at, what);
        }
        self.by_its_lessee(at, acceptance.lease, &acceptance.of);
    }

    /// What was accepted under a lease must have been asked by who acts for its lessee.
    fn by_its_lessee(&mut self, at: At, lease: LeaseId, act: &Hash) {
        let known = self.leases.get(&lease).map(|lease| &lease.grant);
        let (Some(grant), Some(actor)) = (known, self.actors.get(act)) else { return };
        if *actor != grant.delegate && *actor != grant.lessee {
            let what = format!("an act of {actor} is accepted under {lease}, which is another's");
            self.found("11 (others' leases)", at, what);
        }
    }

    fn asked_to_renew(&mut self, signed: &Signed) {
        if let Some(renew) = body_in::<Renew>(&signed.envelope) {
            self.renews.insert(signed.id(), renew.version);
            let longest = self.asked_terms.entry(renew.lease).or_default();
            *longest = renew.term.max(*longest);
        }
    }

    /// An honest lessee countersigns: what its lessor wrote, honest or not, must be what was used
    /// at most, and what that costs.
    fn acknowledged(&mut self, at: At, signed: &Signed) {
        let Some(ack) = body_in::<Acknowledgement>(&signed.envelope) else { return };
        let Some(receipt) = self.dubious.get(&ack.receipt) else { return };
        let Some(lease) = self.leases.get(&ack.lease) else { return };
        let (grant, billed) = (&lease.grant, receipt.usage.billed);
        let exact = u128::from(grant.rate.0) * u128::from(billed.as_millis());
        let due = (exact / u128::from(HOUR_MS)).min(u128::from(grant.cap.0));
        let asked = self.asked_terms.get(&ack.lease).copied().unwrap_or_default();
        let term = grant.term.max(asked).max(lease.term);
        let boot = self.hosts.get(&at.host).map(|host| host.boot);
        // After a reboot the lessee has but its wall clock, which may be wrong.
        let claimed = self.claims.get(&ack.lease).filter(|(_, of)| Some(*of) == boot);
        let wrong = if u128::from(receipt.charge.0) != due || ack.charge != receipt.charge {
            Some("costs something else than what it bills")
        } else if billed > term {
            Some("bills more than the term")
        } else if claimed.is_some_and(|(us, _)| us + billed.as_millis() * 1000 > at.us + PROMPT_US)
        {
            Some("bills more than has passed since its claim")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let what =
                format!("receipt {} of {} {wrong}: it is countersigned", ack.number, ack.lease);
            self.found("9 (receipts)", at, what);
        }
    }

    fn renewed(&mut self, at: At, signed: &Signed) {
        let Some(renewal) = body_in::<Renewal>(&signed.envelope) else { return };
        let lease = self.leases.get(&renewal.lease);
        if lease.is_some_and(|lease| lease.unextended && lease.running) {
            let what = format!("{} was renewed before its warden knew", renewal.lease);
            self.found("4 (bounded life)", at, what);
        }
        let asked = self.renews.get(&renewal.of).copied();
        if asked.is_none_or(|version| version + 1 != renewal.version) {
            let lease = renewal.lease;
            let what = format!("{lease} was renewed to {} by {asked:?}", renewal.version);
            self.found("6 (ended is final)", at, what);
        }
        self.by_its_lessee(at, renewal.lease, &renewal.of);
    }

    /// Nobody has a reason to object to what an honest lessor wrote, unless it was copied.
    fn objected(&mut self, at: At, signed: &Signed) {
        let Some(objection) = body_in::<Objection>(&signed.envelope) else { return };
        // After a reboot a lessee has but its wall clock to judge time by, which may be wrong.
        let boot = self.hosts.get(&at.host).map(|host| host.boot);
        let rebooted = self.claims.get(&objection.lease).is_some_and(|(_, of)| Some(*of) != boot);
        if rebooted && objection.reason == ObjectionReason::Time {
            return;
        }
        let lessor = self.leases.get(&objection.lease).and_then(|l| self.hosts.get(&l.host));
        if lessor.is_some_and(|lessor| !lessor.copied && !self.is_spared(&lessor.key)) {
            let what =
                format!("a receipt of {} is objected: {:?}", objection.lease, objection.reason);
            self.found("9 (receipts)", at, what);
        }
    }

    fn receipt(&mut self, at: At, signed: &Signed) {
        let Some(receipt) = body_in::<Receipt>(&signed.envelope) else { return };
        let agreed = self.agreed.get(&receipt.lease).copied().unwrap_or(0);
        let since = self.hosts.get(&at.host).and_then(|host| host.running_since);
        let slack_us = self.prompt_us();
        let Some(lease) = self.leases.get_mut(&receipt.lease) else { return };
        // A lessor that stood still could not freeze what nobody pays for.
        let watched = lease.claimed_us.zip(since).is_some_and(|(claimed, since)| since <= claimed);
        let (chain, grant) = (&mut lease.chain, &lease.grant);
        let id = signed.id();
        let index = usize::try_from(receipt.number).unwrap_or(usize::MAX).saturating_sub(1);
        let wrong = match chain.ids.get(index) {
            Some(known) if *known == id => None,
            Some(_) => Some("two receipts have one number"),
            None if index > chain.ids.len() => Some("a receipt is missing before it"),
            None if chain.closed => Some("it follows the final one"),
            None if receipt.previous != chain.ids.last().copied().unwrap_or_default() => {
                Some("it names another predecessor")
            }
            None => {
                let exact = u128::from(grant.rate.0) * u128::from(receipt.usage.billed.as_millis());
                let due = (exact / u128::from(HOUR_MS)).min(u128::from(grant.cap.0));
                let whole = u128::from(grant.rate.0) * u128::from(lease.term.as_millis());
                let wrong = if receipt.usage.billed < chain.billed {
                    Some("it takes back billed time")
                } else if receipt.usage.billed > lease.term {
                    Some("it bills more than the term")
                } else if u128::from(receipt.charge.0) != due {
                    Some("its charge is not the rate over the billed time")
                } else if u128::from(receipt.charge.0) > whole / u128::from(HOUR_MS) {
                    Some("its charge exceeds term x rate")
                } else if watched
                    && exposed(grant, receipt.charge.0.saturating_sub(agreed), slack_us)
                {
                    Some("more is owed and not agreed to than the lease allows")
                } else {
                    None
                };
                chain.ids.push(id);
                chain.billed = receipt.usage.billed;
                chain.closed = receipt.end.is_some();
                wrong
            }
        };
        if let Some(wrong) = wrong {
            let what = format!("receipt {} of {}: {wrong}", receipt.number, receipt.lease);
            self.found("9 (receipts)", at, what);
        }
    }

    fn terminated(&mut self, at: At, signed: &Signed) {
        let Some(end) = body_in::<Termination>(&signed.envelope) else { return };
        let Some(lease) = self.leases.get_mut(&end.lease) else { return };
        let known = *lease.chain.termination.get_or_insert(signed.id());
        let stage = lease.stage;
        if known != signed.id() {
            self.found("6 (ended is final)", at, format!("lease {} ended twice", end.lease));
        }
        if stage != LentStage::Ended {
            let what = format!("lease {} is {stage:?} and its end was told", end.lease);
            self.found("6 (ended is final)", at, what);
        }
    }

    fn job(&mut self, at: At, id: LeaseId, started: bool) {
        let late = Span::millis(self.prompt_us() / 1000);
        let Some(host) = self.hosts.get(&at.host) else { return };
        // An older copy of a directory may know an earlier term than the job's warden.
        let (boot, spared) = (Some(host.boot), host.copied || self.is_spared(&host.key));
        let Some(lease) = self.leases.get_mut(&id) else {
            if started && !spared {
                self.found("7 (reap before reuse)", at, format!("a job runs under no lease: {id}"));
            }
            return;
        };
        lease.running = started;
        if started && lease.stage == LentStage::Ended && lease.host == at.host && !spared {
            let what = format!("the job of {id} starts after the lease has ended");
            return self.found("7 (reap before reuse)", at, what);
        }
        if started && lease.grant.gang.is_some() {
            return self.gang_started(at, id);
        }
        let over = lease.decided + lease.term + lease.grant.grace + late;
        if boot == Some(lease.boot) && over < at.boot && !started && !spared {
            let late = at.boot.since(lease.decided + lease.term);
            let what = format!("the job of {id} ended {late} after its term");
            self.found("4 (bounded life)", at, what);
        }
    }

    /// No job of a gang starts before every member of it has committed.
    fn gang_started(&mut self, at: At, id: LeaseId) {
        let gang = self.leases.get(&id).and_then(|lease| lease.gang.clone());
        let Some((certificate, members)) = gang else {
            let what = format!("the job of {id} was started, and its gang is not committed to");
            return self.found("10 (gangs)", at, what);
        };
        let committed = |member: &&Member| {
            let lease = self.leases.get(&member.lease);
            lease.and_then(|lease| lease.gang.as_ref()).is_some_and(|(of, _)| *of == certificate)
        };
        let count = members.iter().filter(committed).count();
        let started = self.started.entry(certificate).or_default();
        started.0 = members.len();
        started.1.insert(id);
        if count < members.len() {
            let all = members.len();
            let what = format!("the job of {id} was started when {count} of {all} had committed");
            self.found("10 (gangs)", at, what);
        }
    }

    /// How many gangs had a job started, and in how many of them not every member's was.
    #[must_use]
    pub fn gangs(&self) -> (usize, usize) {
        let partial = self.started.values().filter(|(size, begun)| begun.len() < *size);
        (self.started.len(), partial.count())
    }

    fn view(&mut self, at: At, view: &View) {
        let Some(host) = self.hosts.get_mut(&at.host) else { return };
        host.lived_epoch = host.lived_epoch.max(host.epoch);
        if host.promised != view.promised {
            let what = format!(
                "it says that {} is promised, its leases come to {}",
                view.promised, host.promised
            );
            self.found("7 (reap before reuse)", at, what);
            return;
        }
        host.halted |= view.halted.is_some();
        for held in view.held.iter().filter(|held| held.left > Span::ZERO) {
            let Some(lease) = held.id.and_then(|id| self.leases.get(&id)) else { continue };
            let lessor = self.hosts.get(&lease.host);
            let honoured = matches!(lease.stage, LentStage::Granted | LentStage::Active)
                && lessor.is_some_and(|lessor| lessor.boot == lease.boot && !lessor.copied);
            let drift = held.left.scale(250, 1_000_000);
            let relied = at.us + held.left.saturating_sub(drift).as_millis() * 1000;
            if honoured && relied > lease.term_end_us {
                let what = format!(
                    "it relies on {:?} for {}ms longer than its lessor honours it",
                    held.id,
                    (relied - lease.term_end_us) / 1000
                );
                self.found("5 (the lessee stops first)", at, what);
                return;
            }
        }
    }

    /// Time has passed: what should have happened by now?
    pub fn passed(&mut self, us: u64) {
        let prompt_us = self.prompt_us();
        while let Some((due, id)) = self.lapses.first().copied().filter(|(due, _)| *due <= us) {
            self.lapses.remove(&(due, id));
            let Some(lease) = self.leases.get(&id) else { continue };
            let host = lease.host;
            let copied = self.hosts.get(&host).is_some_and(|host| host.copied);
            if lease.stage != LentStage::Granted || copied {
                continue;
            }
            // A member of a gang waits for the words of the others a while longer.
            let later = lease.claim_by_us + book::GATHER_FOR.as_millis() * 1000 + prompt_us;
            if lease.gang.is_some() && due < later {
                self.lapses.insert((later, id));
                continue;
            }
            let since = self.hosts.get(&host).and_then(|host| host.running_since);
            match since {
                Some(since) if since + prompt_us <= due => {
                    let at = At { us, host, boot: Boot(0) };
                    let what = format!("lease {id} was not claimed in time and did not lapse");
                    self.found("6 (ended is final)", at, what);
                }
                Some(since) => {
                    self.lapses.insert((since + prompt_us, id));
                }
                None => {
                    self.lapses.insert((us + prompt_us, id));
                }
            }
        }
    }

    /// What must be so once all has been quiet for a while.
    pub fn settled(&mut self, us: u64, nodes: &[Settled]) {
        for node in nodes {
            let Some(view) = &node.view else { continue };
            let at = At { us, host: node.host, boot: Boot(0) };
            if self.liars.contains(&node.key) {
                continue;
            }
            if let Some(host) = self.hosts.get(&node.host).filter(|host| host.copied) {
                let newer = self.epochs.get(&host.key).copied().unwrap_or(0) > host.epoch;
                let same = |other: &&Settled| other.key == node.key && other.view.is_some();
                let shared = nodes.iter().filter(same).count() > 1;
                let must = newer || host.outdated || shared;
                if must && view.halted.is_none() && view.links > 0 {
                    let what = "another life of its key was seen, it goes on granting".to_string();
                    self.found("8 (epochs)", at, what);
                }
                continue;
            }
            let mut wrong = self.members(view, nodes);
            wrong.extend(self.leases_of(view, nodes));
            if !node.unanswered.is_empty() {
                wrong.push(format!("never answered: {}", node.unanswered.join(", ")));
            }
            if !view.promised.is_nothing() {
                let open = view.lent.iter().filter(|lent| lent.stage != LentStage::Ended);
                let open: Vec<_> = open
                    .map(|lent| {
                        format!("{} ({:?}, until {})", lent.id, lent.stage, lent.term_end.0)
                    })
                    .collect();
                wrong.push(format!("{} is promised still: {}", view.promised, open.join(", ")));
            }
            for what in wrong {
                self.found("liveness", at, what);
            }
        }
    }

    /// Who is up and what they have free, as `view` shows it and as it is.
    fn members(&self, view: &View, nodes: &[Settled]) -> Vec<String> {
        let mut wrong = Vec::new();
        for other in nodes.iter().filter(|other| !self.is_spared(&other.key)) {
            let shown = view.nodes.iter().find(|shown| shown.id == other.key);
            let up = shown.is_some_and(|shown| shown.up);
            if up != other.view.is_some() {
                let is = if up { "up" } else { "down" };
                wrong.push(format!("it holds host {} to be {is}", other.host));
            }
            let Some(theirs) = &other.view else { continue };
            let free = theirs.capacity.minus(&theirs.promised).minus(&theirs.withheld);
            let sells = !theirs.drained && free.cpu_milli > 0 && free.memory > 0;
            let expected: &[Resources] = if sells { std::slice::from_ref(&free) } else { &[] };
            let advertised = shown.map(|shown| &shown.shapes);
            if advertised.is_some_and(|shapes| shapes.as_slice() != expected) {
                wrong.push(format!("host {} has {free} free, the map says else", other.host));
            }
        }
        wrong
    }

    /// Receipts not agreed and ends not heard.
    fn leases_of(&self, view: &View, nodes: &[Settled]) -> Vec<String> {
        let view_of = |key: &KeyId| {
            let honest = nodes.iter().filter(|node| !self.is_spared(&node.key));
            let node = honest.into_iter().find(|node| node.key == *key);
            node.and_then(|node| node.view.as_ref())
        };
        let mut wrong = Vec::new();
        for lent in view.lent.iter().filter(|lent| lent.acknowledged != lent.receipts) {
            let theirs = view_of(&lent.delegate);
            if theirs.is_some_and(|view| view.held.iter().any(|held| held.id == Some(lent.id))) {
                let (agreed, all) = (lent.acknowledged, lent.receipts);
                wrong.push(format!("{agreed} of {all} receipts of {} are agreed", lent.id));
            }
        }
        for held in view.held.iter().filter(|held| held.end.is_none() && held.receipts > 0) {
            if view_of(&held.lessor).is_some() {
                wrong.push(format!("it never heard how {:?} ended", held.id));
            }
        }
        wrong
    }
}

/// Everything that must be found again, among what a node read back.
pub(crate) fn recovered(kept: &[Kept]) -> (BTreeSet<(Evidence, Hash)>, BTreeMap<LeaseId, &Lent>) {
    let mut found = BTreeSet::new();
    let mut leases = BTreeMap::new();
    for kept in kept {
        match kept {
            Kept::Lent(id, lent) => {
                found.insert((Evidence::Grant, lent.grant.id()));
                found.extend(lent.acts.iter().map(|a| (Evidence::Acceptance, a.answer.id())));
                found.extend(lent.termination.iter().map(|t| (Evidence::Termination, t.id())));
                found.extend(lent.joined.iter().map(|j| (Evidence::Commit, j.commit.id())));
                leases.insert(*id, &**lent);
            }
            Kept::Held(_, held) => {
                let drafts = [
                    (Evidence::Claim, held.claim.as_ref()),
                    (Evidence::Release, held.release.as_ref()),
                    (Evidence::Acknowledgement, held.acknowledgement.as_ref()),
                ];
                let drafts =
                    drafts.into_iter().filter_map(|(what, draft)| Some((what, draft?.id())));
                found.extend(drafts);
            }
            Kept::Receipt(_, _, draft) => {
                found.insert((Evidence::Receipt, draft.id()));
            }
            Kept::Countersigned(_, _, _, answer) => {
                found.insert((Evidence::Acknowledgement, answer.id()));
            }
            _ => {}
        }
    }
    (found, leases)
}
