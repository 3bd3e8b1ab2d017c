//! The whole node, without its hands: one event in, effects out.
//!
//! The contract with the shell around it:
//!
//! - [`Core::handle`] is given the time and one event; it never waits and reads nothing else. It
//!   appends effects, whose order is meaning: see [`effect`].
//! - For every question asked by [`Effect::Ask`] the shell hands back exactly one
//!   [`Event::Answered`] or [`Event::Unanswered`]; for every [`Effect::StartJob`] one
//!   [`Event::JobEnded`], once nothing of the job is left.
//! - Every [`Effect::Dial`] that names a peer is followed by [`Event::Linked`] or
//!   [`Event::DialFailed`], unless there is a link already.
//! - [`Core::next_wake`] says when [`Event::Woke`] is due; waking early is harmless.
//!
//! The core is a `match`, not a mind: it hands one mind what it needs of another. `links` does
//! membership and the map, `lessor` the leases granted here, `lessee` those held from here, `gang`
//! what binds several of either together, `operator` what the host's owner wants back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;

pub mod effect;
pub mod event;
mod gang;
pub mod kept;
mod lessee;
mod lessor;
mod links;
mod models;
mod operator;
mod payloads;
pub mod view;

pub use effect::{Effect, ModelLease, Notice, Notified, StartJob};
pub use event::{
    Command, CommandId, Ended, Event, Failure, InUse, Leased, Reply, Seller, Ticket, Token,
};
pub use kept::{Holdback, Kept};
pub use view::View;

use crate::base::dice::Dice;
use crate::base::due::Due;
use crate::base::id::{Hash, KeyId, LeaseId};
use crate::base::plant::Plant;
use crate::base::resource::Resources;
use crate::base::time::{Boot, BootId, Now, Span, Wall};
use crate::minds::admission::{Admission, CharterError, NotAdmitted};
use crate::minds::assembly::{Assembly, Whole};
use crate::minds::book::{self, Book, Lent};
use crate::minds::conduct::Conduct;
use crate::minds::holdings::{self, Held, Holdings};
use crate::minds::member::{Membership, Peer, Timing};
use crate::minds::pricing::{Policy, Pricing};
use crate::minds::seek::Pursuit;
use crate::minds::spread::Spread;
use crate::words::charter::{Certificate, Role};
use crate::words::contract::Mandate;
use crate::words::equivocation::Equivocation;
use crate::words::message::{Utterance, verify_grant};
use crate::words::model::{Served, Tally};
use crate::words::object::body_in;
use crate::words::record::{Addresses, HostRecord};
use crate::words::sign::{Draft, Hand, Signed, Verified, VerifyError};
use crate::words::usage::{Outcome, Usage};

use view::Counters;

/// How often what has no deadline of its own is looked after.
const TICK: Span = Span::secs(1);
/// How many long-lived links a node seeks.
const DEGREE: usize = 8;

/// Who a node is and what it is to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its key.
    pub me: KeyId,
    /// Its name.
    pub name: String,
    /// The boot this process runs in.
    pub boot: BootId,
    /// The charter of its fabric.
    pub charter: Signed,
    /// The certificate that admits it.
    pub certificate: Signed,
    /// The mandate under which it may order, if any.
    pub mandate: Option<Signed>,
    /// Where it is reached; its first probe address is the one that counts.
    pub addresses: Addresses,
    /// All that the host has.
    pub hardware: Resources,
    /// What of it may be lent.
    pub capacity: Resources,
    /// The processor's name.
    pub processor: String,
    /// The software's version.
    pub version: String,
    /// What the operator says about the host.
    pub labels: Vec<(String, String)>,
    /// What is sold and at what price.
    pub policy: Policy,
    /// How liveness is watched.
    pub timing: Timing,
    /// How long a job may take to end after its term.
    pub grace: Span,
    /// Nodes to join by.
    pub join: Vec<SocketAddr>,
    /// The highest epoch of this node that is noted outside its data directory; zero where there
    /// is no such note.
    pub noted_epoch: u64,
    /// The seed of all dice.
    pub seed: u64,
    /// A planted bug; none outside the simulation.
    pub plant: Plant,
}

/// By what right a node acts.
#[derive(Debug)]
pub struct Standing {
    admission: Admission,
    certificate: Verified<Certificate>,
    mandate: Option<Verified<Mandate>>,
}

impl Config {
    /// What the node tells about itself; `returns`: how often it came back in this epoch.
    #[must_use]
    pub fn host_record(&self, returns: u32) -> HostRecord {
        HostRecord {
            name: self.name.clone(),
            version: self.version.clone(),
            addresses: self.addresses.clone(),
            hardware: self.hardware.clone(),
            processor: self.processor.clone(),
            labels: self.labels.clone(),
            cell: 0,
            returns,
            certificate: self.certificate.clone(),
        }
    }

    /// Checks the papers, as [`Core::new`] does: for a shell that must know before it touches
    /// anything.
    ///
    /// # Errors
    /// When charter, certificate or mandate do not hold.
    pub fn standing(&self, now: Now) -> Result<Standing, StartError> {
        let admission = Admission::found(&self.charter)?;
        let fabric = admission.fabric();
        let certificate = self.certificate.verify(&fabric).map_err(StartError::Certificate)?;
        admission.admits(&certificate, &self.me, Role::Node, now.wall)?;
        let mandate = self.mandate.as_ref().map(|mandate| mandate.verify(&fabric));
        let mandate = mandate.transpose().map_err(StartError::Mandate)?;
        Ok(Standing { admission, certificate, mandate })
    }
}

/// Why a core cannot start. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The charter founds no fabric.
    #[error("charter: {0}")]
    Charter(#[from] CharterError),
    /// The node's certificate does not verify.
    #[error("node certificate: {0}")]
    Certificate(VerifyError),
    /// The node is not admitted.
    #[error("node certificate: {0}")]
    NotAdmitted(#[from] NotAdmitted),
    /// The mandate does not verify.
    #[error("mandate: {0}")]
    Mandate(VerifyError),
    /// There is no probe address.
    #[error("no address for liveness packets")]
    NoProbe,
    /// A kept record contradicts itself.
    #[error("lease {0} was kept in a form that does not decode")]
    Kept(LeaseId),
}

/// What became of a job while no node watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Orphan {
    /// It ended, or was ended: how, and what it used.
    Ended(Outcome, Usage),
    /// It runs on under its warden, which this node watches again: what it used so far, and
    /// whether it stands still.
    Adopted(Usage, bool),
}

/// The jobs of an earlier run, by lease: all that a warden had taken up. A job that is not in here
/// was never begun, or its end was kept.
pub type Orphans = BTreeMap<LeaseId, Orphan>;

/// The leases whose jobs may still run in this boot, by what was kept, with the claim that each
/// job was started for: of what wardens are found these are adopted, and all others ended.
pub fn adoptable(saved: &[Kept], boot: BootId) -> BTreeMap<LeaseId, Hash> {
    let lent = saved.iter().filter_map(|kept| match kept {
        Kept::Lent(lease, lent) => Some((*lease, book::running_claim(lent, boot)?)),
        _ => None,
    });
    lent.collect()
}

/// By what a key is admitted.
#[derive(Clone, Debug)]
struct Admitted {
    /// The end of its certificate.
    until: Wall,
    /// Who gave it.
    organisation: String,
}

/// What a question was about.
#[derive(Clone, Debug)]
enum Pending {
    Hello(KeyId),
    Announce(KeyId),
    Pull,
    Records,
    Digest(KeyId),
    Order(Hash),
    Claim(LeaseId),
    Release(LeaseId),
    Renew(LeaseId),
    Gang(LeaseId),
    Conduct,
    Commits(LeaseId),
    Words(LeaseId),
    Receipt(LeaseId),
    Termination(LeaseId),
    Inquire(LeaseId),
}

/// A peer with a link.
#[derive(Debug, Default)]
struct Link {
    admitted: bool,
    /// The peer's epoch, as it last greeted.
    epoch: u64,
}

/// A question that waits for a link.
#[derive(Debug)]
struct Waiting {
    token: Token,
    what: Utterance,
}

/// An act of this node's that waits for the lessor's answer.
#[derive(Debug)]
struct Acting {
    commands: Vec<CommandId>,
    tries: u32,
}

/// A renewal that waits for the job's warden.
#[derive(Debug)]
struct Extending {
    ticket: Ticket,
    deadline: Boot,
    answer: Draft,
}

/// An ended lease that was dropped from memory.
#[derive(Debug)]
struct Past {
    view: view::LentView,
    termination: Option<Draft>,
}

/// What is known about a host's behaviour towards this node.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    failed: u64,
    all: u64,
    avoid_until: Boot,
}

/// A node's decisions.
#[derive(Debug)]
pub struct Core {
    config: Config,
    hand: Hand,
    admission: Admission,
    certificate: Verified<Certificate>,
    mandate: Option<Verified<Mandate>>,
    dice: Dice,
    membership: Membership,
    spread: Spread,
    pricing: Pricing,
    book: Book,
    holdings: Holdings,
    pursuits: BTreeMap<CommandId, Pursuit>,
    links: BTreeMap<KeyId, Link>,
    /// For each key the host record of its newest epoch, also when it is no longer valid: what
    /// shows a node that was set up from an older copy that it is one.
    lives: BTreeMap<KeyId, (u64, Signed)>,
    waiting: BTreeMap<KeyId, Vec<Waiting>>,
    pending: BTreeMap<Token, Pending>,
    claims: BTreeMap<LeaseId, Acting>,
    releases: BTreeMap<LeaseId, Acting>,
    /// Releases that no lessor has answered yet, also of earlier runs: when each is sent again,
    /// with the tries so far; `None` once it was answered.
    returning: BTreeMap<LeaseId, Option<(Boot, u32)>>,
    renewals: BTreeMap<LeaseId, Acting>,
    /// Renewals that are durable and wait for the job's warden to take a deadline.
    extending: BTreeMap<LeaseId, Vec<Extending>>,
    holdback: Holdback,
    /// Leases whose jobs were accepted before the start and not begun.
    unbegun: BTreeSet<LeaseId>,
    /// Members of gangs that wait for the words of the others.
    gathering: BTreeMap<LeaseId, gang::Gathering>,
    /// Gangs that are being brought together here.
    assemblies: BTreeMap<CommandId, Assembly>,
    /// Their certificates, while members are asked to commit.
    certificates: BTreeMap<Hash, Draft>,
    /// Gangs of leases that are held here, by certificate, and the gang of each lease.
    gangs: BTreeMap<Hash, Whole>,
    gang_members: BTreeMap<LeaseId, Hash>,
    /// The words of whole gangs, for members that have not confirmed that they have them.
    passing: BTreeMap<LeaseId, gang::Passing>,
    awaiting_end: BTreeMap<LeaseId, Vec<CommandId>>,
    /// Held leases whose end is overdue: when to ask next, and how often that failed.
    inquiries: BTreeMap<LeaseId, (Boot, u32)>,
    /// Terminations that the delegate has not confirmed, with the tries so far.
    untold: BTreeMap<LeaseId, u32>,
    untold_due: Due<LeaseId>,
    /// Leases with a receipt on its way, or the time before which none is sent again.
    receipts_out: BTreeMap<LeaseId, Option<Boot>>,
    /// Ended leases dropped from memory are remembered by their last view.
    history: VecDeque<Past>,
    records: BTreeMap<KeyId, Record>,
    halted: Option<String>,
    /// The highest epoch because of which it is, or was; kept.
    halted_above: u64,
    /// The host records that were said in this epoch, with their numbers.
    said_hosts: VecDeque<(u64, Hash)>,
    /// Whose word does not count.
    conduct: Conduct,
    /// Peers that have greeted since the start, and when the first did: each of them would have
    /// shown a later life of this node's.
    greeted: BTreeSet<KeyId>,
    greeted_at: Option<Boot>,
    /// Enough of them have: from then on this node sells.
    vouched: bool,
    /// The highest epoch in which the last word about this key was said.
    last_word: u64,
    disk_full: bool,
    leaving: bool,
    tokens: u64,
    host_seq: u64,
    tick_at: Boot,
    started: Boot,
    /// Both clocks at the last tick.
    clocks: Now,
    reconcile_at: Boot,
    /// When a neighbour is told again whose word does not count.
    conduct_at: Boot,
    expire_at: Boot,
    host_record_at: Boot,
    /// What it says of its payloads.
    stock: payloads::Stock,
    /// How often this node had come back when it last said so.
    returns_said: u32,
    counters: Counters,
    /// Keys whose certificate was shown on a link or in a host record, and judged.
    admitted: BTreeMap<KeyId, Admitted>,
    /// What was heard about the conduct of keys that nobody has vouched for yet.
    early: VecDeque<(Option<KeyId>, links::Early)>,
    /// Rises with every change of who is admitted.
    admissions: u64,
}

impl Core {
    /// Starts a node from what was kept, in a new epoch. The epoch is the first thing emitted, but
    /// for what keeps the node from granting.
    ///
    /// # Errors
    /// When charter, certificate, mandate or what was kept do not hold.
    pub fn new(
        config: Config,
        saved: impl IntoIterator<Item = Kept>,
        orphans: &Orphans,
        now: Now,
        out: &mut Vec<Effect>,
    ) -> Result<Self, StartError> {
        let Standing { admission, certificate, mandate } = config.standing(now)?;
        let fabric = admission.fabric();
        let probe = *config.addresses.probe.first().ok_or(StartError::NoProbe)?;
        let saved = Saved::sort(saved);
        let conduct = saved.conduct(&admission);
        let floor = conduct.floor(&config.me);
        let last = saved.epoch.max(config.noted_epoch).max(floor);
        let epoch = last + u64::from(!config.plant.is("same-epoch"));
        let epoch = epoch.max(1);
        let halted = saved.halted(&config, &conduct);
        let hand = Hand { fabric, me: config.me, epoch };
        let mut dice = Dice::new(config.seed);
        let peer = Peer { key: config.me, epoch, rejoin: 0, probe };
        let membership = Membership::new(peer, &config.timing, dice.number());
        let book = Book::new(
            hand.clone(),
            config.certificate.clone(),
            config.boot,
            config.grace,
            config.capacity.clone(),
            config.plant,
        );
        let organisation = certificate.body().organisation.clone();
        let admitted = Admitted { until: Wall(u64::MAX), organisation };
        let mut core = Self {
            pricing: Pricing::new(config.policy.clone()),
            hand,
            admission,
            certificate,
            mandate,
            dice,
            membership,
            spread: Spread::default(),
            book,
            holdings: Holdings::default(),
            pursuits: BTreeMap::new(),
            links: BTreeMap::new(),
            lives: BTreeMap::new(),
            waiting: BTreeMap::new(),
            pending: BTreeMap::new(),
            claims: BTreeMap::new(),
            releases: BTreeMap::new(),
            returning: BTreeMap::new(),
            renewals: BTreeMap::new(),
            extending: BTreeMap::new(),
            holdback: Holdback::default(),
            unbegun: BTreeSet::new(),
            gathering: BTreeMap::new(),
            assemblies: BTreeMap::new(),
            certificates: BTreeMap::new(),
            gangs: BTreeMap::new(),
            gang_members: BTreeMap::new(),
            passing: BTreeMap::new(),
            awaiting_end: BTreeMap::new(),
            inquiries: BTreeMap::new(),
            untold: BTreeMap::new(),
            untold_due: Due::default(),
            receipts_out: BTreeMap::new(),
            history: VecDeque::new(),
            records: BTreeMap::new(),
            halted: None,
            halted_above: saved.halted,
            said_hosts: VecDeque::new(),
            conduct,
            greeted: BTreeSet::new(),
            greeted_at: None,
            vouched: false,
            last_word: 0,
            disk_full: false,
            leaving: false,
            tokens: 0,
            host_seq: 0,
            tick_at: now.boot,
            started: now.boot,
            clocks: now,
            reconcile_at: now.boot + Span::secs(60),
            conduct_at: now.boot,
            expire_at: now.boot,
            host_record_at: now.boot,
            stock: payloads::Stock::default(),
            returns_said: 0,
            counters: Counters::default(),
            admitted: BTreeMap::from([(config.me, admitted)]),
            early: VecDeque::new(),
            admissions: 1,
            config,
        };
        // Before the epoch, which alone would make an older copy look like the newest.
        if let Some((above, why)) = halted {
            core.halt(above, why, out);
        }
        out.push(Effect::Keep(Kept::Epoch(core.hand.epoch)));
        core.restore(saved, orphans, now, out)?;
        core.handle(now, Event::Woke, out);
        Ok(core)
    }

    fn restore(
        &mut self,
        saved: Saved,
        orphans: &Orphans,
        now: Now,
        out: &mut Vec<Effect>,
    ) -> Result<(), StartError> {
        let Saved { lent, held, mut receipts, mut claimed, holdback, gangs, pinned, .. } = saved;
        let (mut served, mut consumed) = (saved.served, saved.consumed);
        self.stock.pinned = pinned;
        self.book.withhold(holdback.withheld.clone());
        self.holdback = holdback;
        let mut offers: BTreeMap<Hash, Draft> = BTreeMap::new();
        for (id, mut kept) in lent {
            let receipts = receipts.remove(&id).unwrap_or_default();
            if book::is_past(&kept, now.wall) {
                continue;
            }
            // What many leases hold they share.
            if let Some(offer) = &mut kept.offer {
                *offer = offers.entry(offer.id()).or_insert_with(|| offer.clone()).clone();
            }
            let restored = self.book.restore(now.boot, kept, receipts);
            restored.ok_or(StartError::Kept(id))?;
            if let Some(tally) = served.remove(&id) {
                self.book.restore_tally(&id, tally);
            }
            if let Some(claim) = claimed.remove(&id) {
                let claim = claim.verify(&self.hand.fabric);
                self.book.set_pending(&id, claim.ok());
            }
            self.resume_lent(now, &id, orphans.get(&id), out);
        }
        // What is promised is there, however much the host was found to have this time.
        let capacity = self.book.capacity().at_least(self.book.promised());
        self.book.set_capacity(capacity);
        for (order, kept) in held {
            let here = matches!(kept.order, holdings::Placed::Here(_));
            if kept.stage == holdings::Stage::Ordered && here {
                // Nobody waits for its grant any more; should one come, it lapses unbilled.
                out.push(Effect::Keep(Kept::DropHeld(order)));
                continue;
            }
            let grant = kept.grant.as_ref().map(|grant| verify_grant(grant, &self.hand.fabric));
            let terms = grant
                .and_then(Result::ok)
                .map(|papers| (LeaseId(papers.grant.id()), papers.grant.body().clone()));
            let tallies = terms.as_ref().and_then(|(lease, _)| consumed.remove(lease));
            self.holdings.restore(kept, terms, tallies.unwrap_or_default());
        }
        for (certificate, (draft, together)) in gangs {
            self.restore_gang(certificate, &draft, together);
        }
        Ok(())
    }

    /// Takes one event.
    pub fn handle(&mut self, now: Now, event: Event, out: &mut Vec<Effect>) {
        match event {
            Event::Linked(peer) => self.linked(peer, out),
            Event::Unlinked(peer) => self.unlinked(&peer, out),
            Event::Heard { from, said, ticket } => self.heard(now, from, said, ticket, out),
            Event::Answered { from, token, said } => self.answered(now, from, token, said, out),
            Event::Unanswered { token, why } => self.unanswered(now, token, &why, out),
            Event::DialFailed(peer) => self.dial_failed(now, &peer, out),
            Event::Packet { from, bytes } => self.packet(now, from, &bytes, out),
            Event::Own(said) => self.own_record(now, said),
            Event::Asked { command, what } => self.asked(now, command, what, out),
            Event::Usage(lease, usage) => self.book.report(&lease, usage),
            Event::Extended(lease, deadline, done) => {
                self.extended(&lease, deadline, done, out);
            }
            Event::JobBegun(lease) => self.drop_pending(&lease, out),
            Event::JobEnded(lease, outcome, usage) => {
                self.job_ended(now, &lease, outcome, usage, out);
            }
            Event::DiskFull(full) => self.disk_full = full,
            Event::Payloads(roots) => self.has_payloads(now, roots),
            Event::Models(models) => self.pricing.set_models(models),
            Event::Woke => {}
            Event::Leave => self.leave(now, out),
        }
        self.wake(now, out);
    }

    fn wake(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.wake_links(now, out);
        self.wake_payloads(now, out);
        self.wake_lessor(now, out);
        self.wake_lessee(now, out);
        self.wake_gangs(now, out);
    }

    /// When [`Event::Woke`] is due at the latest.
    #[must_use]
    pub fn next_wake(&self) -> Option<Boot> {
        [
            Some(self.tick_at),
            self.membership.next_wake(),
            self.spread.next_wake(),
            self.book.next_wake(),
            self.untold_due.next(),
            self.stock.next_wake(),
            Some(self.pricing.next_wake().max(self.last_publish_floor())),
            self.next_pursuit(),
            self.next_gang(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Publishing is looked at with every event; it never needs a wake-up more often than this.
    fn last_publish_floor(&self) -> Boot {
        self.tick_at - TICK + Span::millis(50)
    }

    fn asked(&mut self, now: Now, command: CommandId, what: Command, out: &mut Vec<Effect>) {
        let failed = match what {
            Command::View => {
                let view = Box::new(self.view(now));
                out.push(Effect::Answer(command, Ok(Reply::View(view))));
                return;
            }
            Command::Plan(want) => {
                let ranking = self.rank(now, &want);
                out.push(Effect::Answer(command, Ok(Reply::Plan(ranking))));
                return;
            }
            Command::Reach(node) => {
                out.push(Effect::Answer(command, Ok(self.reached(node))));
                return;
            }
            Command::Holders(root) => {
                let holders = self.holders(now, &root);
                out.push(Effect::Answer(command, Ok(Reply::Holders(holders))));
                return;
            }
            Command::Lessor(lease) => {
                let lessor = self.holdings.get(&lease).map(|holding| holding.kept.lessor);
                let reached = lessor.map(|lessor| self.reached(lessor));
                out.push(Effect::Answer(command, reached.ok_or(Failure::UnknownLease)));
                return;
            }
            Command::InUse => {
                let in_use = self.payloads_in_use();
                out.push(Effect::Answer(command, Ok(Reply::InUse(in_use))));
                return;
            }
            Command::Sellers => {
                let sellers = self.sellers(now);
                out.push(Effect::Answer(command, Ok(Reply::Sellers(sellers))));
                return;
            }
            _ if self.leaving && !what.counts() => Err(Failure::Halted("it is stopping".into())),
            Command::Lease(_) | Command::LeaseBy(_) | Command::Gang { .. } if self.disk_full => {
                Err(Failure::DiskFull)
            }
            Command::Lease(want) => self.seek(now, command, want, out),
            Command::Gang { want, size, job, together } => {
                self.gang(now, command, (want, size), (job, together), out)
            }
            Command::LeaseBy(papers) => self.lease_by(now, command, &papers, out),
            Command::DraftOrder { want, lessee, certificate } => {
                self.draft_for(now, command, &want, lessee, certificate, out)
            }
            Command::Claim { lease, job } => self.claim(now, command, lease, &job, out),
            Command::Release(lease) => self.release(now, command, lease, out),
            Command::Renew { lease, term } => self.renew(now, command, lease, term, out),
            Command::Revoke(lease) => self.revoke(now, command, lease, out),
            Command::Reclaim { shape, within, dry_run } => {
                self.reclaim(now, command, &shape, within, dry_run, out);
                Ok(())
            }
            Command::Drain { within, revoke, dry_run } => {
                self.drain(now, command, within, (revoke, dry_run), out);
                Ok(())
            }
            Command::Pin(root, pinned) => self.pin(command, root, pinned, out),
            Command::Reinstate(signed) => self.reinstate(now, command, &signed, out),
            Command::Resume => {
                self.resume(now, command, out);
                Ok(())
            }
            Command::AwaitEnd(lease) => self.await_end(command, lease, out),
            Command::Serve(lease, service) => self.serve(now, command, (lease, service), out),
            Command::Consume(served) => self.consume(command, &served, out),
        };
        if let Err(failure) = failed {
            out.push(Effect::Answer(command, Err(failure)));
        }
    }

    /// Asks an admitted peer now, or once there is a link to it.
    fn ask(&mut self, to: KeyId, about: Pending, what: Utterance, out: &mut Vec<Effect>) {
        self.tokens += 1;
        let token = Token(self.tokens);
        self.pending.insert(token, about);
        let linked = self.links.get(&to).is_some_and(|link| link.admitted);
        if linked || to == self.config.me {
            self.leaves(to, token, what, out);
            return;
        }
        let first = !self.waiting.contains_key(&to);
        self.waiting.entry(to).or_default().push(Waiting { token, what });
        if first && !self.links.contains_key(&to) {
            let host = self.spread.host(&to);
            let addresses = host.map(|host| host.body().addresses.link.clone());
            out.push(Effect::Dial { peer: Some(to), addresses: addresses.unwrap_or_default() });
        }
    }

    /// Hands a question to the link that its peer has.
    fn leaves(&mut self, to: KeyId, token: Token, what: Utterance, out: &mut Vec<Effect>) {
        if let Some(Pending::Renew(lease)) = self.pending.get(&token)
            && let Some(holding) = self.holdings.get_mut(lease)
        {
            holding.renew_left = true;
        }
        out.push(Effect::Ask { to, token, what });
    }

    /// How things stand.
    #[must_use]
    pub fn view(&self, now: Now) -> View {
        let charter = self.admission.charter();
        View {
            fabric: self.hand.fabric,
            fabric_name: charter.name.clone(),
            currency: charter.currency.clone(),
            me: self.config.me,
            epoch: self.hand.epoch,
            halted: self.halted(),
            joined: self.config.join.is_empty() || self.admitted_links() > 0,
            links: self.admitted_links(),
            records: self.spread.len(),
            packets_refused: self.membership.refused(),
            capacity: self.book.capacity().clone(),
            promised: self.book.promised().clone(),
            withheld: self.book.withheld().clone(),
            drained: self.holdback.drained,
            nodes: self.view_nodes(now),
            lent: self.view_lent(),
            held: self.view_held(now),
            pursuits: self.pursuits.len(),
            quarantine: self.conduct.convictions().map(|known| known.proof().clone()).collect(),
            counters: self.counters,
        }
    }

    /// Who this node is.
    #[must_use]
    pub const fn hand(&self) -> &Hand {
        &self.hand
    }

    /// Who acts for the lessee of a lease that this node granted.
    #[must_use]
    pub fn delegate_of(&self, lease: &LeaseId) -> Option<KeyId> {
        self.book.get(lease).map(|known| known.terms.delegate)
    }

    /// What this node is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// The fabric it belongs to.
    #[must_use]
    pub const fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Whether `key` has shown a certificate that admits it as a node.
    #[must_use]
    pub fn is_admitted(&self, key: &KeyId) -> bool {
        self.admitted.contains_key(key)
    }

    /// Every key that has shown such a certificate, while that is valid.
    pub fn admitted(&self) -> impl Iterator<Item = &KeyId> {
        self.admitted.keys()
    }

    /// A number that rises with every change of [`Core::admitted`].
    #[must_use]
    pub const fn admissions(&self) -> u64 {
        self.admissions
    }

    fn reached(&self, node: KeyId) -> Reply {
        Reply::Reached(node, self.data_addresses(&node))
    }

    /// The data-plane addresses of `key`, as its host record says.
    #[must_use]
    pub fn data_addresses(&self, key: &KeyId) -> Vec<SocketAddr> {
        let host = self.spread.host(key);
        host.map(|host| host.body().addresses.data.clone()).unwrap_or_default()
    }
}

/// What was kept, sorted by what it is.
#[derive(Default)]
struct Saved {
    epoch: u64,
    halted: u64,
    lent: BTreeMap<LeaseId, Lent>,
    held: BTreeMap<Hash, Held>,
    receipts: BTreeMap<LeaseId, VecDeque<(u64, Draft)>>,
    claimed: BTreeMap<LeaseId, Signed>,
    holdback: Holdback,
    gangs: BTreeMap<Hash, (Draft, bool)>,
    proofs: Vec<Equivocation>,
    reinstated: Vec<Signed>,
    pinned: BTreeSet<Hash>,
    /// What was served under leases on models that this node granted.
    served: BTreeMap<LeaseId, Tally>,
    /// What was agreed on under leases on models that it holds, record by record.
    consumed: BTreeMap<LeaseId, Vec<Tally>>,
}

impl Saved {
    /// Why a node that starts with this may not grant, and above which epoch its organisation has
    /// to reinstate it: its key was convicted, its directory is an older copy, or it was halted in
    /// an earlier run.
    fn halted(&self, config: &Config, conduct: &Conduct) -> Option<(u64, String)> {
        if config.plant.is("ignore-twin") {
            return None;
        }
        let (noted, saved, floor) = (config.noted_epoch, self.epoch, conduct.floor(&config.me));
        let older = || {
            format!(
                "this node was in epoch {noted} once, and its data directory says {saved}: the \
                 directory is an older copy"
            )
        };
        let halted = "this node was halted in an earlier run: its key, or its data directory, was \
                      found to be a copy";
        // Of several reasons the one that is hardest to lift counts.
        [
            Some((self.halted, halted.to_string())),
            (noted > saved).then(|| (noted, older())),
            conduct.convicted(&config.me).map(|epoch| (epoch, links::CONVICTED.to_string())),
        ]
        .into_iter()
        .flatten()
        .filter(|(above, _)| *above > floor)
        .max_by_key(|(above, _)| *above)
    }

    /// Whose word does not count, by what was kept.
    fn conduct(&self, admission: &Admission) -> Conduct {
        let (mut conduct, fabric) = (Conduct::default(), admission.fabric());
        for signed in &self.reinstated {
            if let Some(lifted) = signed.verify(&fabric).ok().filter(|l| admission.reinstates(l)) {
                conduct.reinstate(lifted);
            }
        }
        for proof in &self.proofs {
            if let Ok(conviction) = proof.check(&fabric) {
                conduct.convict(conviction);
            }
        }
        conduct
    }

    fn sort(saved: impl IntoIterator<Item = Kept>) -> Self {
        let mut sorted = Self::default();
        for kept in saved {
            match kept {
                Kept::Epoch(epoch) => sorted.epoch = sorted.epoch.max(epoch),
                Kept::Halted(above) => sorted.halted = sorted.halted.max(above),
                Kept::Lent(id, lent) => {
                    sorted.lent.insert(id, *lent);
                }
                Kept::Held(order, held) => {
                    sorted.held.insert(order, *held);
                }
                Kept::Receipt(lease, number, draft) => {
                    sorted.receipts.entry(lease).or_default().push_back((number, draft));
                }
                Kept::Equivocation(first, second) => {
                    sorted.proofs.push(Equivocation { first, second });
                }
                Kept::Reinstated(_, signed) => sorted.reinstated.push(signed),
                Kept::Claimed(lease, claim) => {
                    sorted.claimed.insert(lease, claim);
                }
                Kept::Holdback(holdback) => sorted.holdback = holdback,
                Kept::Gang(certificate, draft, together) => {
                    sorted.gangs.insert(certificate, (draft, together));
                }
                Kept::Pinned(root) => {
                    sorted.pinned.insert(root);
                }
                Kept::Served(lease, number, draft) => {
                    let known = sorted.served.entry(lease).or_default();
                    if number > known.requests
                        && let Some(served) = body_in::<Served>(&draft.envelope)
                    {
                        *known = served.tally(draft.id());
                    }
                }
                Kept::Consumed(lease, _, signed) => {
                    if let Some(served) = body_in::<Served>(&signed.envelope) {
                        let tallies = sorted.consumed.entry(lease).or_default();
                        tallies.push(served.tally(signed.id()));
                    }
                }
                Kept::DropHeld(_)
                | Kept::Unpinned(_)
                | Kept::DropClaimed(_)
                | Kept::DropGang(_)
                | Kept::Acknowledged(..)
                | Kept::Countersigned(..)
                | Kept::Objected(..) => {}
            }
        }
        sorted
    }
}

const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Core>();
};

// A request is remembered for as long as the offer that its order names is honoured.
const _: () = assert!(
    crate::minds::pricing::HONOUR.as_millis() <= book::REMEMBER.as_millis(),
    "a forgotten request could be granted a second time"
);

/// Where a lease stands at its lessor, re-exported for those who read a [`View`].
pub use book::Stage as LentStage;
/// Where a lease stands at its lessee, re-exported for those who read a [`View`].
pub use holdings::Stage as HeldStage;
