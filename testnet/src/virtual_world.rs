//! The virtual world: many real cores in one process, one heap of events, two virtual clocks per
//! host, everything from one seed.
//!
//! ```text
//!   heap --event--> process (paused? inbox) --> core.handle --> effects --barrier--> network,
//!    ^                                                              |    jobs, load --.
//!    '---------------------------- what follows, when --------------+----------------'
//!                                                       check <-- what was seen
//! ```
//!
//! It plays the part of a node's shell as faithfully as it can: the durability barrier, one answer
//! or none per question, links that keep order and die, wardens that outlive the node. Objects are
//! signed and verified with real keys, once each; only liveness packets are taken on trust, since
//! their signatures are the edge's business and would cost more than all the rest together.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::net::SocketAddr;

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::{Hash, KeyId, LeaseId};
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::{Boot, Span};
use leasehold_proto::core::{
    self, Command, CommandId, Config, Core, Effect, Event, Kept, Notice, Orphan, Orphans,
    StartError, Ticket, Token,
};
use leasehold_proto::minds::member::Timing;
use leasehold_proto::minds::pricing::Policy;
use leasehold_proto::proof::{self, Proof};
use leasehold_proto::words::charter::Certificate;
use leasehold_proto::words::message::{self, Message, RecordSaid, Said, Utterance, Word};
use leasehold_proto::words::object::Kind;
use leasehold_proto::words::record::{Addresses, Payloads};
use leasehold_proto::words::sign::{Draft, Papers, Signature, Signed, Verified, VerifyError};
use leasehold_proto::words::usage::{Outcome, Usage};

mod fabric;
mod host;
mod load;
mod network;
mod process;
mod vice;

pub use fabric::FabricError;
use fabric::{Fabric, Identity};
use host::{Clock, Disk, Job, Jobs, Write};
use load::Purpose;
use network::{IDLE_US, LinkId, Network, Rough};
use process::{Back, Carried, Input, Process, Question};

use crate::check::{At, Check, Seen, Settled, Violation};
use crate::scenario::{Scenario, Step, Vice};

/// How long a question waits for its answer, in microseconds.
const ANSWER_US: u64 = 10_000_000;
/// How often views are looked at, in microseconds.
const LOOK_US: u64 = 500_000;
/// How many wake-ups within one millisecond are one too many.
const MAX_SPINS: u32 = 64;
/// How many recorded questions can be replayed.
const MAX_RECORDED: usize = 256;
/// How many leases at most are proven at the end of a run.
const MAX_PROOFS: usize = 400;
/// The most that waits for a process that stands still.
const MAX_INBOX: usize = 100_000;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Report {
    /// What does not hold.
    pub violations: Vec<Violation>,
    /// A hash over everything that happened: two runs of one scenario have the same.
    pub trace: Hash,
    /// How much time passed in there.
    pub simulated: Span,
    /// What was counted.
    pub counts: Counts,
}

/// What was counted in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Events that a core handled.
    pub events: u64,
    /// Messages over links.
    pub messages: u64,
    /// Liveness packets.
    pub packets: u64,
    /// Leases granted.
    pub leases: u64,
    /// Jobs started.
    pub jobs: u64,
    /// Processes started.
    pub starts: u64,
    /// Leases whose proof was checked.
    pub proofs: u64,
    /// Commands replied to.
    pub replies: u64,
    /// Gangs of which a job was started.
    pub gangs: u64,
    /// Gangs of which not every member's job was started.
    pub partial_gangs: u64,
    /// How often a dishonest lessor promised more than it has.
    pub oversold: u64,
    /// Words of dishonest nodes that were changed, kept back or made up.
    pub lies: u64,
    /// How often somebody honest kept a proof that a dishonest node said two things at once.
    pub equivocations: u64,
}

/// Why a run could not even begin, or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// The fabric could not be founded.
    #[error(transparent)]
    Fabric(#[from] FabricError),
}

/// Runs `scenario` until its end or the first violation.
///
/// # Errors
/// When the fabric could not be founded; what goes wrong after that is a violation.
pub fn run(scenario: &Scenario) -> Result<Report, WorldError> {
    let mut world = World::new(scenario)?;
    world.run();
    Ok(world.report())
}

/// Something that will happen.
#[derive(Debug)]
enum What {
    /// Something reaches the process of a host, if it is still in that life.
    Input(usize, u64, Input),
    /// Something arrives over a link, if that is still there.
    Arrives(LinkId, usize, Input),
    Start(usize),
    Dies(usize, u64, Span),
    Dialled {
        from: usize,
        life: u64,
        to: Option<usize>,
        peer: Option<KeyId>,
    },
    LinkDies(LinkId),
    LinkIdles(LinkId),
    JobBegins(usize, LeaseId),
    JobEnds(usize, LeaseId, u64),
    Meter(usize, LeaseId),
    Fault(usize),
    Undo(usize),
    Load(usize),
    Give(usize, Purpose, Box<Command>),
    /// A host says something over a link that its core knows nothing of.
    Says(usize, LinkId, Box<Question>),
    Look,
}

/// Everything that will happen, by time and, within one instant, by order of planning.
#[derive(Debug, Default)]
struct Agenda {
    /// What is due when, by its place below: entries are small, since they move a lot.
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    /// What is planned; the free places are listed.
    places: Vec<Option<What>>,
    free: Vec<usize>,
    /// When questions have waited long enough: all equally long, so in order by themselves.
    timeouts: VecDeque<(u64, u64, usize, u64, Token)>,
    planned: u64,
}

impl Agenda {
    fn plan(&mut self, us: u64, what: What) {
        self.planned += 1;
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.places.push(None);
                self.places.len() - 1
            }
        };
        if let Some(slot) = self.places.get_mut(place) {
            *slot = Some(what);
        }
        self.heap.push(Reverse((us, self.planned, place)));
    }

    fn plan_timeout(&mut self, us: u64, host: usize, life: u64, token: Token) {
        self.planned += 1;
        self.timeouts.push_back((us, self.planned, host, life, token));
    }

    fn next(&mut self) -> Option<(u64, What)> {
        let heap = self.heap.peek().map(|Reverse((us, order, _))| (*us, *order));
        let timeout = self.timeouts.front().map(|(us, order, ..)| (*us, *order));
        if timeout.is_some_and(|timeout| heap.is_none_or(|heap| timeout < heap)) {
            let (us, _, host, life, token) = self.timeouts.pop_front()?;
            return Some((us, What::Input(host, life, Input::Timeout(token))));
        }
        let Reverse((us, _, place)) = self.heap.pop()?;
        self.free.push(place);
        let what = self.places.get_mut(place)?.take()?;
        Some((us, what))
    }
}

/// A host with all that is on it.
struct Host {
    /// Which identity its node has: a twin has another host's.
    identity: usize,
    clock: Clock,
    disk: Disk,
    /// An older state of the disk, for those who restore a backup.
    backup: Option<Disk>,
    jobs: Jobs,
    process: Option<Process>,
    hardware: Resources,
    policy: Policy,
    /// What its lessee does is thrown with dice of its own: the same whatever happens elsewhere.
    lessee: Dice,
    /// The probes of this host go to and come from here.
    addresses: Addresses,
}

/// Which process was told which record of whom: host, life, key, kind.
type Told = (usize, u64, KeyId, Kind);

struct World<'a> {
    scenario: &'a Scenario,
    now: u64,
    end: u64,
    agenda: Agenda,
    dice: Dice,
    fabric: Fabric,
    identities: Vec<Identity>,
    hosts: Vec<Host>,
    places: HashMap<SocketAddr, usize>,
    network: Network<Input>,
    lives: u64,
    records: HashMap<Hash, RecordSaid>,
    certificates: HashMap<Hash, Verified<Certificate>>,
    /// Papers that come with every order and grant: their signatures are checked once.
    papers: Papers,
    /// What was signed, by its identity, which names its signer.
    signatures: HashMap<Hash, Signature>,
    recorded: VecDeque<(KeyId, Message)>,
    /// What is dishonest about each host.
    vices: Vec<Vec<Vice>>,
    /// The newest version of each record that each process was told.
    met: HashMap<Told, (u64, u64, Hash)>,
    /// Who was told two bodies under one version, and by whose key.
    contradicted: BTreeSet<(usize, KeyId)>,
    /// Who said that it noticed.
    noticed: BTreeSet<(usize, KeyId)>,
    looked: usize,
    check: Check,
    counts: Counts,
    trace: blake3::Hasher,
    effects: Vec<Effect>,
}

fn address(host: usize, port: u16) -> SocketAddr {
    let [_, high, middle, low] = u32::try_from(host).unwrap_or(u32::MAX).to_be_bytes();
    SocketAddr::from(([10, high, middle, low], port))
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario) -> Result<Self, WorldError> {
        let mut dice = Dice::new(scenario.seed ^ 0x0005_eed0_fa11);
        let fabric = Fabric::found(&mut dice)?;
        let twins = scenario.steps.iter().filter(|(_, step)| matches!(step, Step::Twin { .. }));
        let count = scenario.nodes + twins.count();
        let mut identities = Vec::new();
        for nth in 0..scenario.nodes {
            identities.push(fabric.member(&mut dice, nth)?);
        }
        let hosts = (0..count).map(|nth| Host {
            identity: nth,
            clock: Clock::new(&mut dice),
            disk: Disk::default(),
            backup: None,
            jobs: Jobs::new(),
            process: None,
            hardware: load::hardware(&mut dice),
            policy: load::policy(&mut dice),
            lessee: Dice::new(dice.number()),
            addresses: Addresses {
                link: vec![address(nth, 7000)],
                probe: vec![address(nth, 7001)],
                data: vec![address(nth, 7002)],
            },
        });
        let hosts: Vec<_> = hosts.collect();
        let places = hosts.iter().enumerate().flat_map(|(nth, host)| {
            let Addresses { link, probe, .. } = &host.addresses;
            link.iter().chain(probe).map(move |place| (*place, nth)).collect::<Vec<_>>()
        });
        let mut world = Self {
            scenario,
            now: 0,
            end: (scenario.length + scenario.quiet).as_millis() * 1000,
            agenda: Agenda::default(),
            network: Network::new(scenario.network.clone(), count, &mut dice),
            places: places.collect(),
            dice,
            fabric,
            identities,
            hosts,
            lives: 0,
            records: HashMap::new(),
            certificates: HashMap::new(),
            papers: Papers::default(),
            signatures: HashMap::new(),
            recorded: VecDeque::new(),
            vices: vec![Vec::new(); count],
            met: HashMap::new(),
            contradicted: BTreeSet::new(),
            noticed: BTreeSet::new(),
            looked: 0,
            check: Check::default(),
            counts: Counts::default(),
            trace: blake3::Hasher::new(),
            effects: Vec::new(),
        };
        for host in 0..scenario.nodes {
            let start = world.dice.below(500_000);
            world.push(start, What::Start(host));
            let first = 3_000_000 + world.dice.below(2_000_000);
            if !scenario.load.idle.contains(&host) {
                world.push(first, What::Load(host));
            }
        }
        for (node, vice) in &scenario.vices {
            world.vices[*node].push(*vice);
            let key = world.key(*node);
            world.see(*node, Seen::Dishonest(key));
        }
        for (nth, (at, _)) in scenario.steps.iter().enumerate() {
            world.push(at.as_millis() * 1000, What::Fault(nth));
        }
        world.push(LOOK_US, What::Look);
        Ok(world)
    }

    fn push(&mut self, us: u64, what: What) {
        self.agenda.plan(us.max(self.now), what);
    }

    fn run(&mut self) {
        while let Some((us, what)) = self.agenda.next() {
            if us > self.end || !self.check.violations().is_empty() {
                break;
            }
            self.now = us;
            self.happen(what);
            self.check.passed(self.now);
        }
        if self.check.violations().is_empty() {
            self.now = self.end;
            self.settle();
        }
    }

    fn report(mut self) -> Report {
        self.counts.leases = self.check.leases() as u64;
        let (gangs, partial) = self.check.gangs();
        (self.counts.gangs, self.counts.partial_gangs) = (gangs as u64, partial as u64);
        self.counts.oversold = self.check.oversold() as u64;
        Report {
            violations: self.check.violations().to_vec(),
            trace: Hash(*self.trace.finalize().as_bytes()),
            simulated: Span::millis(self.now / 1000),
            counts: self.counts,
        }
    }

    fn at(&self, host: usize) -> At {
        let boot = self.hosts.get(host).map_or(Boot(0), |host| host.clock.boot(self.now));
        At { us: self.now, host, boot }
    }

    fn see(&mut self, host: usize, seen: Seen<'_>) {
        let at = self.at(host);
        self.check.see(at, seen);
    }

    fn found(&mut self, host: usize, invariant: &'static str, what: String) {
        let at = self.at(host);
        self.check.found(invariant, at, what);
    }

    fn process(&mut self, host: usize) -> Option<&mut Process> {
        self.hosts.get_mut(host)?.process.as_mut()
    }

    fn has(&self, host: usize, vice: Vice) -> bool {
        self.vices.get(host).is_some_and(|vices| vices.contains(&vice))
    }

    fn life(&self, host: usize) -> Option<u64> {
        Some(self.hosts.get(host)?.process.as_ref()?.life)
    }

    fn key(&self, host: usize) -> KeyId {
        self.identity(host).key
    }

    fn identity(&self, host: usize) -> &Identity {
        &self.identities[self.hosts[host].identity]
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Input(host, life, input) => {
                if self.life(host) == Some(life) {
                    self.reach(host, input);
                }
            }
            What::Arrives(link, host, input) => {
                let Some(known) = self.network.get(link) else { return };
                let end = usize::from(known.ends[1] == host);
                if self.life(host) == Some(known.lives[end]) {
                    self.reach(host, input);
                }
            }
            What::Start(host) => self.start(host),
            What::Dies(host, life, down) => {
                if self.life(host) == Some(life) && self.kill(host) {
                    self.push(self.now + down.as_millis() * 1000, What::Start(host));
                }
            }
            What::Dialled { from, life, to, peer } => self.dialled(from, life, to, peer),
            What::LinkDies(link) => self.link_dies(link),
            What::LinkIdles(link) => {
                if self.network.is_severed(&link) {
                    self.link_dies(link);
                }
            }
            What::JobBegins(host, lease) => self.job_begins(host, lease),
            What::JobEnds(host, lease, plan) => self.job_ends(host, lease, plan),
            What::Meter(host, lease) => self.meter(host, lease),
            What::Fault(nth) => self.fault(nth),
            What::Undo(nth) => self.undo(nth),
            What::Load(host) => self.load(host),
            What::Give(host, purpose, command) => self.give(host, purpose, *command),
            What::Says(host, link, question) => self.send(host, link, Input::Question(question)),
            What::Look => self.look(),
        }
    }

    /// Something reaches a process; one that stands still finds it later.
    fn reach(&mut self, host: usize, input: Input) {
        let Some(process) = self.process(host) else { return };
        if process.paused {
            if process.inbox.len() < MAX_INBOX {
                process.inbox.push_back(input);
            }
            return;
        }
        match input {
            Input::Event(event) => self.handle(host, *event),
            Input::Question(question) => self.questioned(host, *question),
            Input::Answer(from, token, what) => self.answered(host, from, token, *what),
            Input::Synced => self.synced(host),
            Input::Timeout(token) => {
                if process.asked.remove(&token).is_some() {
                    let why = "no answer within 10 s".into();
                    self.handle(host, Event::Unanswered { token, why });
                }
            }
            Input::Wake => self.woken(host),
        }
    }

    fn woken(&mut self, host: usize) {
        let now = self.now;
        let boot = self.hosts[host].clock.boot(now);
        let Some(process) = self.process(host) else { return };
        if process.wake_us > now {
            // An earlier wake-up was planned since, and has planned the next.
            return;
        }
        process.wake_us = u64::MAX;
        if process.core.next_wake().is_some_and(|at| at > boot) {
            self.plan_wake(host);
            return;
        }
        let spins = match process.spins {
            (at, n) if at == now / 1000 => n + 1,
            _ => 1,
        };
        process.spins = (now / 1000, spins);
        if spins > MAX_SPINS {
            let what = format!("it wants to be woken {spins} times within a millisecond");
            self.found(host, "liveness", what);
            return;
        }
        self.handle(host, Event::Woke);
    }

    fn plan_wake(&mut self, host: usize) {
        let now = self.now;
        let Some(known) = self.hosts.get_mut(host) else { return };
        let Some(process) = &mut known.process else { return };
        let Some(at) = process.core.next_wake() else { return };
        let us = known.clock.when(at).max(now + 1);
        if us < process.wake_us {
            process.wake_us = us;
            let life = process.life;
            self.push(us, What::Input(host, life, Input::Wake));
        }
    }

    /// The core takes one event, and what it wants of the world is queued behind the barrier.
    fn handle(&mut self, host: usize, event: Event) {
        let mut out = std::mem::take(&mut self.effects);
        let us = self.now;
        let Some(known) = self.hosts.get_mut(host) else { return };
        let Some(process) = &mut known.process else { return };
        let tag = tag(&event);
        process.core.handle(known.clock.now(us), event, &mut out);
        self.counts.events += 1;
        let mut line = [0; 24];
        line[..8].copy_from_slice(&us.to_le_bytes());
        line[8..16].copy_from_slice(&(host as u64).to_le_bytes());
        line[16] = tag;
        line[17..21].copy_from_slice(&u32::try_from(out.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.trace.update(&line);
        self.take(host, &mut out);
        self.effects = out;
        self.plan_wake(host);
    }

    fn take(&mut self, host: usize, out: &mut Vec<Effect>) {
        let hasty = self.scenario.plant.is("send-before-durable");
        for effect in out.drain(..) {
            match effect {
                Effect::Keep(kept) => self.keep(host, &kept),
                Effect::Packet { to, bytes } => self.packet(host, to, bytes),
                effect if hasty => self.perform(host, effect),
                effect => {
                    if let Some(process) = self.process(host) {
                        process.leave(effect);
                    }
                }
            }
        }
        self.release(host);
    }

    fn keep(&mut self, host: usize, kept: &Kept) {
        if let Kept::Lent(id, lent) = kept {
            self.see(host, Seen::Lent(*id, lent));
        }
        if let Kept::Held(_, held) = kept
            && held.claim.is_some()
            && let Some(grant) = &held.grant
        {
            self.see(host, Seen::Claiming(LeaseId(grant.id())));
        }
        let write: Write = match kept.value() {
            Ok(value) => (kept.key(), value),
            Err(error) => return self.found(host, "2 (durability)", error.to_string()),
        };
        if let Some(process) = self.process(host) {
            process.keep(write);
        }
    }

    /// Lets leave what may, and syncs what must be durable before the rest.
    fn release(&mut self, host: usize) {
        while let Some(effect) = self.process(host).and_then(Process::next_out) {
            self.perform(host, effect);
        }
        let (low, high) = self.scenario.sync_us;
        let Some(process) = self.process(host) else { return };
        if process.begin_sync() {
            let (life, doomed) = (process.life, process.doomed);
            let takes = low + self.dice.below(high - low + 1);
            if let Some(down) = doomed {
                let dies = self.now + self.dice.below(takes);
                self.push(dies, What::Dies(host, life, down));
            }
            self.push(self.now + takes, What::Input(host, life, Input::Synced));
        }
    }

    fn synced(&mut self, host: usize) {
        let Some(known) = self.hosts.get_mut(host) else { return };
        let Some(process) = &mut known.process else { return };
        for write in process.end_sync() {
            known.disk.write(write);
        }
        self.release(host);
    }

    fn perform(&mut self, host: usize, effect: Effect) {
        match effect {
            Effect::Keep(_) | Effect::Packet { .. } => {}
            // A link of a dead process is closed by the next start of its host here.
            Effect::Admit(_) | Effect::Restarted(_) => {}
            Effect::Ask { to, token, what } => self.ask(host, to, token, what),
            Effect::Reply { ticket, what } => self.reply(host, ticket, what),
            Effect::Dial { peer, addresses } => self.dial(host, peer, &addresses),
            Effect::Disconnect(peer, _) => {
                let link = self.link_to(host, &peer);
                if let Some(link) = link {
                    self.push(self.now, What::LinkDies(link));
                }
            }
            Effect::Record(draft) => {
                if let Some(signed) = self.sign(host, &draft, None)
                    && let Some(said) = self.record(host, &signed)
                {
                    let life = self.life(host).unwrap_or(0);
                    let own = Input::Event(Box::new(Event::Own(said)));
                    self.push(self.now, What::Input(host, life, own));
                }
            }
            Effect::StartJob(job) => self.start_job(host, &job),
            Effect::StopJob(lease, _) => self.stop_job(host, lease),
            Effect::ExtendJob(lease, deadline) => self.extend_job(host, lease, deadline),
            Effect::FreezeJob(lease) => self.freeze_job(host, lease, true),
            Effect::ThawJob(lease) => self.freeze_job(host, lease, false),
            Effect::NotifyJob(..) | Effect::JobNoted(_) => {}
            Effect::Answer(command, reply) => {
                self.counts.replies += 1;
                let Some(process) = self.process(host) else { return };
                let Some(purpose) = process.commands.remove(&command.0) else {
                    let what = format!("command {} is replied to twice", command.0);
                    return self.found(host, "liveness", what);
                };
                let known = &mut self.hosts[host];
                let who = &self.identities[known.identity];
                let (load, dice) = (&self.scenario.load, &mut known.lessee);
                for later in load::go_on(load, &self.fabric, who, &purpose, &reply, dice) {
                    let at = self.now + later.after_us;
                    let command = Box::new(later.command);
                    self.push(at, What::Give(host, later.purpose, command));
                }
            }
            Effect::Notice(Notice::Twin { .. }) => self.see(host, Seen::Halted),
            Effect::Notice(Notice::Equivocation(key)) => {
                self.counts.equivocations += 1;
                self.noticed.insert((host, key));
            }
            Effect::Notice(_) => {}
        }
    }

    fn sign(&mut self, host: usize, draft: &Draft, answers: Option<Hash>) -> Option<Signed> {
        let twisted = vice::twisted(&self.vices[host], draft, &mut self.hosts[host].lessee);
        self.counts.lies += u64::from(twisted.is_some());
        let draft = twisted.as_ref().unwrap_or(draft);
        let id = draft.id();
        let known = self.signatures.get(&id).map(|signature| known(draft, *signature));
        match known.map_or_else(|| self.identity(host).node.sign(draft), Ok) {
            Ok(signed) => {
                self.signatures.insert(id, signed.signature);
                self.trace.update(&id.0);
                self.see(host, Seen::Signed(&signed, answers));
                Some(signed)
            }
            Err(error) => {
                self.found(host, "words", format!("a draft cannot be signed: {error}"));
                None
            }
        }
    }

    fn utter(&mut self, host: usize, what: Utterance, answers: Option<Hash>) -> Option<Message> {
        match what {
            Utterance::Plain(message) => Some(message),
            Utterance::Signs(word, draft) => {
                self.sign(host, &draft, answers).map(|signed| word.carry(signed))
            }
            Utterance::Gang(gang, claim) => {
                let gang = self.sign(host, &gang, answers)?;
                let claim = match claim {
                    Some(claim) => Some(self.sign(host, &claim, answers)?),
                    None => None,
                };
                Some(Message::Gang(gang, claim))
            }
            Utterance::Commits(lease, mut commits, own) => {
                if let Some(own) = own {
                    commits.push(self.sign(host, &own, answers)?);
                }
                Some(Message::Commits(lease, commits))
            }
        }
    }

    fn carry(&mut self, host: usize, message: Message) -> Option<Carried> {
        self.counts.messages += 1;
        if !self.scenario.network.frames {
            return Some(Carried::Message(message));
        }
        match message::encode(&message) {
            Ok(frame) => Some(Carried::Frame(frame)),
            Err(error) => {
                self.found(host, "words", format!("a message is too long: {error}"));
                None
            }
        }
    }

    fn link_to(&self, host: usize, peer: &KeyId) -> Option<LinkId> {
        self.network.of(host).find(|(_, other)| self.key(*other) == *peer).map(|(link, _)| link)
    }

    fn ask(&mut self, host: usize, to: KeyId, token: Token, what: Utterance) {
        let Some(message) = self.utter(host, what, None) else { return };
        let message = self.contradict(host, &to, message);
        let (me, life) = (self.key(host), self.life(host).unwrap_or(0));
        let about = object_of(&message);
        let kept_back =
            matches!(message, Message::Terminated(_)) && self.has(host, Vice::NeverTells);
        self.counts.lies += u64::from(kept_back);
        if about.is_some() && self.has(host, Vice::Exceeds) {
            self.exceed(host, to, &message);
        }
        let twice = about.is_some() && self.dice.chance(self.scenario.network.twice, 1000);
        if about.is_some() {
            self.recorded.push_back((to, message.clone()));
            if self.recorded.len() > MAX_RECORDED {
                self.recorded.pop_front();
            }
        }
        let Some(what) = self.carry(host, message) else { return };
        let link = if to == me { None } else { self.link_to(host, &to) };
        if link.is_none() && to != me {
            let why = "there is no link to it".into();
            let event = Input::Event(Box::new(Event::Unanswered { token, why }));
            self.push(self.now, What::Input(host, life, event));
            return;
        }
        if let Some(process) = self.process(host) {
            process.asked.insert(token, link);
        }
        self.agenda.plan_timeout(self.now + ANSWER_US, host, life, token);
        if kept_back {
            return;
        }
        let back = Back { host, life, link, token: Some(token), about };
        let again = twice.then(|| what.clone());
        for what in [Some(what), again].into_iter().flatten() {
            let question = Input::Question(Box::new(Question { from: me, back, what }));
            match link {
                None => self.push(self.now + 20, What::Input(host, life, question)),
                Some(link) => self.send(host, link, question),
            }
        }
    }

    fn send(&mut self, host: usize, link: LinkId, what: Input) {
        let Some(known) = self.network.get(link) else { return };
        let to = if known.ends[0] == host { known.ends[1] } else { known.ends[0] };
        let (now, dice) = (self.now, &mut self.dice);
        if let Some((at, what)) = self.network.send(now, link, to, what, dice) {
            self.push(at, What::Arrives(link, to, what));
        }
    }

    fn reply(&mut self, host: usize, ticket: Ticket, what: Utterance) {
        let back = self.process(host).and_then(|process| process.tickets.remove(&ticket.0));
        let Some(back) = back else { return };
        let kept_back = match &what {
            Utterance::Signs(Word::Acknowledged, _) => self.has(host, Vice::NeverAcknowledges),
            Utterance::Signs(Word::Terminated, _) => self.has(host, Vice::NeverTells),
            _ => false,
        };
        if kept_back {
            self.counts.lies += 1;
            return;
        }
        let Some(message) = self.utter(host, what, back.about) else { return };
        let peer = self.key(back.host);
        let message = self.contradict(host, &peer, message);
        let Some(token) = back.token else { return };
        let Some(what) = self.carry(host, message) else { return };
        let answer = Input::Answer(self.key(host), token, Box::new(what));
        match back.link {
            None => self.push(self.now + 20, What::Input(back.host, back.life, answer)),
            Some(link) => self.send(host, link, answer),
        }
    }

    /// What an equivocator says to `to` in place of `message`: half of its peers are told other
    /// records.
    fn contradict(&mut self, host: usize, to: &KeyId, message: Message) -> Message {
        let Message::Records(records) = message else { return message };
        let me = self.key(host);
        if to.0[0].is_multiple_of(2) || !self.has(host, Vice::Equivocates) {
            return Message::Records(records);
        }
        let mut told = Vec::new();
        for record in records {
            let mine = record.header().is_ok_and(|header| header.signer == me);
            let other = Some(&record).filter(|_| mine).and_then(vice::contradicted);
            self.counts.lies += u64::from(other.is_some());
            told.push(other.and_then(|draft| self.sign(host, &draft, None)).unwrap_or(record));
        }
        Message::Records(told)
    }

    /// Sends acts to `to` that nobody is entitled to, made of one that is.
    fn exceed(&mut self, host: usize, to: KeyId, of: &Message) {
        let wall = self.hosts[host].clock.now(self.now).wall;
        let me = self.key(host);
        let (Some(life), Some(link)) = (self.life(host), self.link_to(host, &to)) else { return };
        for (word, draft) in vice::forged(of, me, wall, &mut self.hosts[host].lessee) {
            let Some(signed) = self.sign(host, &draft, None) else { return };
            self.counts.lies += 1;
            let about = Some(signed.id());
            let Some(what) = self.carry(host, word.carry(signed)) else { return };
            let back = Back { host, life, link: Some(link), token: None, about };
            let question = Box::new(Question { from: me, back, what });
            if word == Word::Claim {
                // A claim of a gang's member goes before the certificate that it is made of.
                self.send(host, link, Input::Question(question));
            } else {
                self.push(self.now + 20_000, What::Says(host, link, question));
            }
        }
    }

    /// Notes which records an honest node was told: whoever was told two under one version must
    /// notice.
    fn meet(&mut self, host: usize, said: &Said) {
        let Said::Records(records) = said else { return };
        let steady = !self.hosts[host].clock.is_wrong();
        let life = self.life(host).unwrap_or(0);
        for record in records {
            let name = record.name();
            let Some(known) = self.identities.iter().position(|who| who.key == name.key) else {
                continue;
            };
            if !steady || self.vices[known].is_empty() {
                continue;
            }
            let version = (name.epoch, name.seq, record.signed().id());
            let newest = self.met.entry((host, life, name.key, name.kind)).or_insert(version);
            match (version.0, version.1).cmp(&(newest.0, newest.1)) {
                std::cmp::Ordering::Greater => *newest = version,
                std::cmp::Ordering::Equal if newest.2 != version.2 => {
                    self.contradicted.insert((host, name.key));
                }
                _ => {}
            }
        }
    }

    /// Verifies what arrived, as the edge does; an honest node's words must verify.
    fn hear(&mut self, host: usize, what: Carried) -> Option<Said> {
        let message = match what {
            Carried::Message(message) => Ok(message),
            Carried::Frame(frame) => message::decode(&frame).map_err(VerifyError::from),
        };
        let said = message.and_then(|message| self.verify(&message));
        match said {
            Ok(said) => {
                if !self.scenario.vices.is_empty() {
                    self.meet(host, &said);
                }
                Some(said)
            }
            Err(error) => {
                self.found(host, "words", format!("what it was told does not verify: {error}"));
                None
            }
        }
    }

    /// [`message::verify`], with records and certificates verified once in a run.
    fn verify(&mut self, message: &Message) -> Result<Said, VerifyError> {
        match message {
            Message::Hello { charter, certificate, epoch, seen } => {
                let (charter, epoch) = (*charter, *epoch);
                let seen = match seen {
                    Some(seen) => Some(Box::new(self.verify_record(seen)?)),
                    None => None,
                };
                let id = certificate.id();
                let known = self.certificates.get(&id);
                let certificate = match known.filter(|known| known.signed() == certificate) {
                    Some(known) => known.clone(),
                    None => {
                        let verified: Verified<Certificate> =
                            certificate.verify(&self.fabric.id)?;
                        self.certificates.insert(id, verified.clone());
                        verified
                    }
                };
                Ok(Said::Hello { charter, certificate, epoch, seen })
            }
            Message::Records(records) => {
                let records = records.iter().map(|signed| self.verify_record(signed));
                Ok(Said::Records(records.collect::<Result<_, _>>()?))
            }
            other => message::verify_among(other, &self.fabric.id, &mut self.papers),
        }
    }

    fn verify_record(&mut self, signed: &Signed) -> Result<RecordSaid, VerifyError> {
        let id = signed.id();
        if let Some(known) = self.records.get(&id).filter(|known| known.signed() == signed) {
            return Ok(known.clone());
        }
        let said = message::verify_record(signed, &self.fabric.id)?;
        self.records.insert(id, said.clone());
        Ok(said)
    }

    fn record(&mut self, host: usize, signed: &Signed) -> Option<RecordSaid> {
        match self.verify_record(signed) {
            Ok(said) => Some(said),
            Err(error) => {
                self.found(host, "words", format!("its own record does not verify: {error}"));
                None
            }
        }
    }

    fn questioned(&mut self, host: usize, question: Question) {
        let Question { from, back, what } = question;
        let Some(said) = self.hear(host, what) else { return };
        let Some(process) = self.process(host) else { return };
        process.next_ticket += 1;
        let ticket = process.next_ticket;
        process.tickets.insert(ticket, back);
        self.handle(host, Event::Heard { from, said, ticket: Ticket(ticket) });
    }

    fn answered(&mut self, host: usize, from: KeyId, token: Token, what: Carried) {
        let Some(process) = self.process(host) else { return };
        if process.asked.remove(&token).is_none() {
            return;
        }
        if let Some(said) = self.hear(host, what) {
            self.handle(host, Event::Answered { from, token, said });
        }
    }

    fn packet(&mut self, host: usize, to: SocketAddr, bytes: Vec<u8>) {
        self.counts.packets += 1;
        let Some(to) = self.places.get(&to).copied() else { return };
        if self.network.blocked(host, to) {
            return;
        }
        let Some(life) = self.life(to) else { return };
        let from = self.key(host);
        let mut arrive = |after: u64, bytes: Vec<u8>| {
            let event = Input::Event(Box::new(Event::Packet { from, bytes }));
            self.agenda.plan(self.now + after, What::Input(to, life, event));
        };
        let [first, again] = self.network.packet(host, to, &mut self.dice);
        if let Some(after) = again {
            arrive(after, bytes.clone());
        }
        if let Some(after) = first {
            arrive(after, bytes);
        }
    }

    fn dial(&mut self, host: usize, peer: Option<KeyId>, addresses: &[SocketAddr]) {
        let to = addresses.first().and_then(|place| self.places.get(place)).copied();
        if to == Some(host) || to.is_some_and(|to| self.network.of(host).any(|(_, o)| o == to)) {
            return;
        }
        let Some(process) = self.process(host) else { return };
        let life = process.life;
        let wait = match to {
            Some(to) if process.dialling.contains(&(to, peer)) => return,
            Some(to) => {
                process.dialling.push((to, peer));
                let reached = self.life(to).is_some() && !self.network.severed(host, to);
                let there = self.network.delay(host, to, &mut self.dice);
                // A handshake is three ways; who is not there is waited for.
                if reached { 3 * there } else { 1_000_000 + self.dice.below(2_000_000) }
            }
            None => 1_000,
        };
        self.push(self.now + wait, What::Dialled { from: host, life, to, peer });
    }

    fn dialled(&mut self, from: usize, life: u64, to: Option<usize>, peer: Option<KeyId>) {
        if self.life(from) != Some(life) {
            return;
        }
        if let Some(process) = self.process(from) {
            process.dialling.retain(|(host, whom)| (Some(*host), *whom) != (to, peer));
        }
        let other = to.filter(|to| !self.network.severed(from, *to));
        let other = other.filter(|to| peer.is_none_or(|peer| self.key(*to) == peer));
        // Nobody links with who shows the very same key.
        let other = other.filter(|to| self.key(*to) != self.key(from));
        let paused = |host: &Host| host.process.as_ref().is_some_and(|process| process.paused);
        let other = other.filter(|to| !self.hosts.get(*to).is_some_and(paused));
        let Some((to, there)) = other.and_then(|to| Some((to, self.life(to)?))) else {
            if let Some(peer) = peer {
                let event = Input::Event(Box::new(Event::DialFailed(peer)));
                self.push(self.now, What::Input(from, life, event));
            }
            return;
        };
        if self.network.of(from).any(|(_, other)| other == to) {
            return;
        }
        for (host, life, peer) in [(to, there, from), (from, life, to)] {
            let key = self.key(peer);
            if self.link_to(host, &key).is_none() {
                let event = Input::Event(Box::new(Event::Linked(key)));
                self.push(self.now, What::Input(host, life, event));
            }
        }
        self.network.connect([from, to], [life, there]);
    }

    /// A link is gone: what was asked over it is not answered any more.
    fn link_dies(&mut self, id: LinkId) {
        let Some(link) = self.network.remove(id) else { return };
        for (end, other) in [(0, 1), (1, 0)] {
            let (host, peer) = (link.ends[end], link.ends[other]);
            if self.life(host) != Some(link.lives[end]) {
                continue;
            }
            let Some(process) = self.process(host) else { continue };
            let lost = process.asked.iter().filter(|(_, over)| **over == Some(id));
            let lost: Vec<_> = lost.map(|(token, _)| *token).collect();
            for token in &lost {
                process.asked.remove(token);
            }
            process.tickets.retain(|_, back| back.link != Some(id));
            let mut inputs: Vec<_> = lost
                .into_iter()
                .map(|token| Event::Unanswered { token, why: "the link is gone".into() })
                .collect();
            let key = self.key(peer);
            if self.link_to(host, &key).is_none() {
                inputs.push(Event::Unlinked(key));
            }
            for event in inputs {
                let event = Input::Event(Box::new(event));
                self.push(self.now, What::Input(host, link.lives[end], event));
            }
        }
    }

    fn config(&mut self, host: usize) -> Config {
        let join = [0, 1, 2].into_iter().filter(|seed| *seed != host && *seed < self.hosts.len());
        let join = join.map(|seed| address(seed, 7000)).collect();
        let seed = self.dice.number();
        let known = &self.hosts[host];
        let who = &self.identities[known.identity];
        Config {
            me: who.key,
            name: format!("node-{}", known.identity),
            boot: known.clock.boot,
            charter: self.fabric.charter.clone(),
            certificate: who.certificate.clone(),
            mandate: Some(who.mandate.clone()),
            addresses: known.addresses.clone(),
            hardware: known.hardware.clone(),
            capacity: known.hardware.clone(),
            processor: "virtual".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            labels: vec![("zone".into(), format!("z{}", known.identity % 3))],
            policy: known.policy.clone(),
            timing: Timing::default(),
            grace: Span::secs(2),
            join,
            noted_epoch: 0,
            seed,
            plant: self.scenario.plant,
        }
    }

    fn start(&mut self, host: usize) {
        if self.life(host).is_some() {
            return;
        }
        // Whoever still believes in a link to the process before learns better now.
        let links: Vec<_> = self.network.of(host).map(|(link, _)| link).collect();
        for link in links {
            self.link_dies(link);
        }
        let mut config = self.config(host);
        let capacity = config.capacity.clone();
        if self.has(host, Vice::Oversells) {
            config.capacity = capacity.plus(&capacity);
            config.hardware = config.capacity.clone();
        }
        let us = self.now;
        let known = &mut self.hosts[host];
        let (now, kept) = (known.clock.now(us), known.disk.read());
        let kept = match kept {
            Ok(kept) => kept,
            Err(error) => return self.found(host, "2 (durability)", error.to_string()),
        };
        let orphans = self.take_up(host, &kept);
        let mut out = Vec::new();
        let boot = config.boot;
        let core: Result<Core, StartError> =
            Core::new(config, kept.iter().cloned(), &orphans, now, &mut out);
        let core = match core {
            Ok(core) => core,
            Err(error) => {
                return self.found(host, "liveness", format!("it does not start: {error}"));
            }
        };
        let epoch = core.hand().epoch;
        let key = self.key(host);
        self.lives += 1;
        self.counts.starts += 1;
        self.hosts[host].process = Some(Process::new(core, self.lives));
        let seen = Seen::Started { key, boot, epoch, capacity: &capacity, kept: &kept };
        self.see(host, seen);
        self.take(host, &mut out);
        self.plan_wake(host);
    }

    /// The wardens that a new process finds: those of leases that may still run are adopted, but
    /// for the few that do not answer; what is left of the others is killed before anything else.
    fn take_up(&mut self, host: usize, kept: &[Kept]) -> Orphans {
        let us = self.now;
        let mut orphans = Orphans::new();
        let mut killed = Vec::new();
        let known = &mut self.hosts[host];
        let adoptable = core::adoptable(kept, known.clock.boot);
        // What was being fetched for is gone with the process, and has left nothing.
        let unbegun = |job: &mut Job| job.begins().is_none_or(|at| at > us);
        let vanished: Vec<_> = known.jobs.extract_if(.., |_, job| unbegun(job)).collect();
        for (lease, job) in &mut known.jobs {
            let theirs = adoptable.get(lease) == Some(&job.claim);
            if job.ended_us.is_none() && (!theirs || self.dice.chance(1, 20)) {
                job.kill(us);
                killed.push(*lease);
            }
            let orphan = match job.ended_us {
                None => Orphan::Adopted(job.usage(us), job.frozen.is_some()),
                Some(_) => Orphan::Ended(job.outcome.clone(), job.usage(us)),
            };
            orphans.insert(*lease, orphan);
        }
        let open = vanished.into_iter().filter(|(_, job)| job.ended_us.is_none());
        for lease in killed.into_iter().chain(open.map(|(lease, _)| lease)) {
            self.see(host, Seen::JobEnded(lease));
        }
        orphans
    }

    /// The process is killed: what was not durable is lost, except for a part of the sync that
    /// was under way.
    fn kill(&mut self, host: usize) -> bool {
        let Some(process) = self.hosts.get_mut(host).and_then(|host| host.process.take()) else {
            return false;
        };
        let dice = &mut self.dice;
        let torn = process.torn(|all| usize::try_from(dice.below(all as u64 + 1)).unwrap_or(0));
        for write in torn {
            self.hosts[host].disk.write(write);
        }
        self.see(host, Seen::Stopped);
        self.contradicted.retain(|(told, _)| *told != host);
        let links: Vec<_> = self.network.of(host).map(|(link, _)| link).collect();
        for link in links {
            let notices = self.now + self.dice.below(IDLE_US);
            self.push(notices, What::LinkDies(link));
        }
        true
    }

    fn fault(&mut self, nth: usize) {
        let Some((at, step)) = self.scenario.steps.get(nth) else { return };
        let at = at.as_millis() * 1000;
        let undo = |lasts: &Span| at + lasts.as_millis() * 1000;
        match step {
            Step::Crash { node, down, syncing: false } => {
                if self.kill(*node) {
                    self.push(undo(down), What::Start(*node));
                }
            }
            Step::Crash { node, down, syncing: true } => {
                if let Some(process) = self.process(*node) {
                    process.doomed = Some(*down);
                }
            }
            Step::Reboot { node, down } => {
                if self.kill(*node) {
                    self.power_off(*node);
                    self.push(undo(down), What::Undo(nth));
                }
            }
            Step::Die { node } => {
                self.kill(*node);
            }
            Step::Pause { node, lasts } => {
                if let Some(process) = self.process(*node).filter(|process| !process.paused) {
                    process.paused = true;
                    self.see(*node, Seen::Paused);
                    let links: Vec<_> = self.network.of(*node).map(|(link, _)| link).collect();
                    if lasts.as_millis() * 1000 > IDLE_US {
                        for link in links {
                            self.push(self.now + IDLE_US, What::LinkDies(link));
                        }
                    }
                    self.push(undo(lasts), What::Undo(nth));
                }
            }
            Step::Cut { island, lasts } | Step::CutOneWay { island, lasts } => {
                let one_way = matches!(step, Step::CutOneWay { .. });
                for link in self.network.cut(nth, island, one_way) {
                    self.push(self.now + IDLE_US, What::LinkIdles(link));
                }
                self.push(undo(lasts), What::Undo(nth));
            }
            Step::Rough { node, late, lost, doubled, lasts } => {
                let late_us = late.as_millis() * 1000;
                let how = Rough { late_us, lost: *lost, doubled: *doubled };
                self.network.roughen(nth, *node, how);
                self.push(undo(lasts), What::Undo(nth));
            }
            Step::Slow { node, by, lasts } => {
                self.network.slow(*node, signed_us(*by));
                self.push(undo(lasts), What::Undo(nth));
            }
            Step::SetClock { node, by, lasts } => {
                self.hosts[*node].clock.set_wrong(*by);
                self.push(undo(lasts), What::Undo(nth));
            }
            Step::FillDisk { node, lasts } => {
                self.disk_full(*node, true);
                self.push(undo(lasts), What::Undo(nth));
            }
            Step::Replay { node } => self.replay(*node),
            Step::Restore { node, down } => {
                if self.kill(*node) {
                    let backup = self.hosts[*node].backup.clone();
                    if let Some(backup) = backup {
                        self.see(*node, Seen::Copied);
                        self.hosts[*node].disk = backup;
                    }
                    self.push(undo(down), What::Start(*node));
                }
            }
            Step::Twin { node } => self.twin(*node),
        }
    }

    fn undo(&mut self, nth: usize) {
        let Some((_, step)) = self.scenario.steps.get(nth) else { return };
        match step {
            Step::Reboot { node, .. } => {
                let (now, dice) = (self.now, &mut self.dice);
                self.hosts[*node].clock.reboot(now, dice);
                self.start(*node);
            }
            Step::Pause { node, .. } => self.resume(*node),
            Step::Rough { .. } => self.network.smooth(nth),
            Step::Cut { .. } | Step::CutOneWay { .. } => {
                for (link, to, what) in self.network.heal(nth) {
                    let (now, dice) = (self.now, &mut self.dice);
                    if let Some((at, what)) = self.network.send(now, link, to, what, dice) {
                        self.push(at, What::Arrives(link, to, what));
                    }
                }
            }
            Step::Slow { node, by, .. } => self.network.slow(*node, -signed_us(*by)),
            Step::SetClock { node, .. } => self.hosts[*node].clock.set_wrong(0),
            Step::FillDisk { node, .. } => self.disk_full(*node, false),
            _ => {}
        }
    }

    fn resume(&mut self, host: usize) {
        let Some(process) = self.process(host).filter(|process| process.paused) else { return };
        process.paused = false;
        let life = process.life;
        let inbox = std::mem::take(&mut process.inbox);
        self.see(host, Seen::Resumed);
        for input in inbox {
            self.push(self.now, What::Input(host, life, input));
        }
        self.push(self.now, What::Input(host, life, Input::Wake));
    }

    /// All that ran on the host is gone with its power.
    fn power_off(&mut self, host: usize) {
        let us = self.now;
        let jobs = std::mem::take(&mut self.hosts[host].jobs);
        for (lease, mut job) in jobs {
            if job.ended_us.is_none() {
                job.kill(us);
                self.see(host, Seen::JobEnded(lease));
            }
        }
    }

    fn disk_full(&mut self, host: usize, full: bool) {
        if let Some(life) = self.life(host) {
            let event = Input::Event(Box::new(Event::DiskFull(full)));
            self.push(self.now, What::Input(host, life, event));
        }
    }

    /// A node says again what somebody once said to somebody.
    fn replay(&mut self, host: usize) {
        for _ in 0..8 {
            let nth = usize::try_from(self.dice.below(self.recorded.len() as u64)).unwrap_or(0);
            let Some((to, message)) = self.recorded.get(nth).cloned() else { return };
            let Some(life) = self.life(host) else { return };
            let Some(link) = self.link_to(host, &to) else { continue };
            let about = object_of(&message);
            let Some(what) = self.carry(host, message) else { return };
            let back = Back { host, life, link: Some(link), token: None, about };
            let question = Question { from: self.key(host), back, what };
            self.send(host, link, Input::Question(Box::new(question)));
        }
    }

    fn twin(&mut self, node: usize) {
        // Spare hosts come after the nodes; each is used once.
        let spare = (self.scenario.nodes..self.hosts.len()).find(|host| self.life(*host).is_none());
        let Some(spare) = spare else { return };
        let disk = self.hosts[node].disk.clone();
        self.see(node, Seen::Copied);
        self.hosts[spare].identity = node;
        self.hosts[spare].hardware = self.hosts[node].hardware.clone();
        self.hosts[spare].disk = disk;
        self.start(spare);
        self.see(spare, Seen::Copied);
    }

    fn start_job(&mut self, host: usize, job: &core::StartJob) {
        let us = self.now;
        self.counts.jobs += 1;
        let lease = job.lease;
        let known = &mut self.hosts[host];
        if known.jobs.contains_key(&lease) {
            let what = format!("the job of {lease} is started twice");
            return self.found(host, "3 (idempotence)", what);
        }
        let endless = self.scenario.load.endless;
        let mut started = Job::start(us, job, &known.clock, endless, &mut self.dice);
        if known.clock.when(job.deadline) <= us {
            // Its node stood still since it decided that: nothing is begun whose time is over.
            started.outcome = Outcome::Deadline;
            started.ended_us = Some(us);
            known.jobs.insert(lease, started);
            if let Some(life) = self.life(host) {
                let over = Event::JobEnded(lease, Outcome::Deadline, Usage::default());
                self.push(us, What::Input(host, life, Input::Event(Box::new(over))));
            }
            return;
        }
        let (begins, ends, plan) = (started.begins(), started.ends_us, started.plan);
        known.jobs.insert(lease, started);
        self.see(host, Seen::JobStarted(lease));
        self.see(host, Seen::JobDeadline(lease));
        // Each job has a payload of its own, and a host room for one.
        if let Some(life) = self.life(host) {
            let has = Event::Payloads(vec![Payloads::brief(&lease.0)]);
            self.push(us, What::Input(host, life, Input::Event(Box::new(has))));
        }
        if let Some(begins) = begins {
            self.push(begins, What::JobBegins(host, lease));
        }
        self.push(ends, What::JobEnds(host, lease, plan));
        self.push(us + 1_000_000, What::Meter(host, lease));
    }

    fn job_begins(&mut self, host: usize, lease: LeaseId) {
        let us = self.now;
        let begun = self.hosts[host].jobs.get(&lease).is_some_and(|job| job.begins() == Some(us));
        if let Some(life) = self.life(host).filter(|_| begun) {
            let event = Input::Event(Box::new(Event::JobBegun(lease)));
            self.push(us, What::Input(host, life, event));
        }
    }

    fn stop_job(&mut self, host: usize, lease: LeaseId) {
        let us = self.now;
        let Some(job) = self.hosts[host].jobs.get_mut(&lease) else {
            let what = format!("a job of {lease} is to end that was never started");
            return self.found(host, "liveness", what);
        };
        if job.stop(us) {
            let (ends, plan) = (job.ends_us, job.plan);
            self.push(ends, What::JobEnds(host, lease, plan));
        }
    }

    fn extend_job(&mut self, host: usize, lease: LeaseId, deadline: Boot) {
        let known = &mut self.hosts[host];
        // Now and then a warden does not answer in time: its node says so, and is asked again.
        let done = !self.dice.chance(1, 20);
        let deadline_us = known.clock.when(deadline);
        if let Some(job) = known.jobs.get_mut(&lease).filter(|_| done) {
            job.extend(deadline_us);
            self.see(host, Seen::JobDeadline(lease));
        }
        self.plan_end(host, lease);
        if let Some(life) = self.life(host) {
            let after = self.now + 500 + self.dice.below(20_000);
            let event = Input::Event(Box::new(Event::Extended(lease, deadline, done)));
            self.push(after, What::Input(host, life, event));
        }
    }

    fn freeze_job(&mut self, host: usize, lease: LeaseId, frozen: bool) {
        let us = self.now;
        if let Some(job) = self.hosts[host].jobs.get_mut(&lease) {
            if frozen {
                job.freeze(us);
            } else {
                job.thaw(us);
            }
        }
        self.plan_end(host, lease);
    }

    /// A job's end may have moved.
    fn plan_end(&mut self, host: usize, lease: LeaseId) {
        let job = self.hosts[host].jobs.get(&lease).filter(|job| job.ended_us.is_none());
        if let Some((ends, plan)) = job.map(|job| (job.ends_us, job.plan)) {
            self.push(ends, What::JobEnds(host, lease, plan));
        }
    }

    fn job_ends(&mut self, host: usize, lease: LeaseId, plan: u64) {
        let us = self.now;
        let known = &mut self.hosts[host];
        let Some(job) = known.jobs.get_mut(&lease) else { return };
        if job.plan != plan || job.ended_us.is_some() {
            return;
        }
        job.ended_us = Some(us);
        let (outcome, usage) = (job.outcome.clone(), job.usage(us));
        self.see(host, Seen::JobEnded(lease));
        if let Some(life) = self.life(host) {
            let event = Input::Event(Box::new(Event::JobEnded(lease, outcome, usage)));
            self.push(us, What::Input(host, life, event));
        }
    }

    fn meter(&mut self, host: usize, lease: LeaseId) {
        let us = self.now;
        let known = &self.hosts[host];
        let Some(job) = known.jobs.get(&lease).filter(|job| job.ended_us.is_none()) else { return };
        let usage = job.usage(us);
        if let Some(life) = self.life(host) {
            let event = Input::Event(Box::new(Event::Usage(lease, usage)));
            self.push(us, What::Input(host, life, event));
        }
        self.push(us + 1_000_000, What::Meter(host, lease));
    }

    fn load(&mut self, host: usize) {
        let load = &self.scenario.load;
        let every = load.every.as_millis() * 1000;
        let known = &mut self.hosts[host];
        let next = self.now + every / 2 + known.lessee.below(every);
        if self.now >= self.scenario.length.as_millis() * 1000 {
            return;
        }
        let who = &self.identities[known.identity];
        let (purpose, command) = load::begin(load, who, &mut known.lessee);
        self.give(host, purpose, command);
        self.push(next, What::Load(host));
    }

    fn give(&mut self, host: usize, purpose: Purpose, command: Command) {
        let Some(process) = self.process(host) else { return };
        process.next_command += 1;
        let (id, life) = (process.next_command, process.life);
        process.commands.insert(id, purpose);
        let event = Event::Asked { command: CommandId(id), what: command };
        self.push(self.now, What::Input(host, life, Input::Event(Box::new(event))));
    }

    /// Looks at how things stand at some nodes, and makes a backup now and then.
    fn look(&mut self) {
        let count = self.hosts.len().div_ceil(100).max(self.hosts.len().min(4));
        for _ in 0..count {
            self.looked = (self.looked + 1) % self.hosts.len();
            let host = self.looked;
            let now = self.hosts[host].clock.now(self.now);
            let Some(process) = self.process(host).filter(|process| !process.paused) else {
                continue;
            };
            let view = process.core.view(now);
            self.see(host, Seen::View(&view));
            let copied = self.scenario.copied(host);
            if copied && self.dice.chance(1, 20) {
                let disk = self.hosts[host].disk.clone();
                self.hosts[host].backup = Some(disk);
            }
        }
        // An order that was signed elsewhere is good for a day: who sends one again in the quiet
        // makes a lease that outlasts it.
        let quiet = self.now >= self.scenario.length.as_millis() * 1000;
        for host in if quiet { 0..0 } else { 0..self.vices.len() } {
            if self.has(host, Vice::Replays) && self.dice.chance(1, 8) {
                self.replay(host);
            }
            if self.has(host, Vice::Exceeds) && self.dice.chance(1, 4) {
                let nth = usize::try_from(self.dice.below(self.recorded.len() as u64));
                let heard = self.recorded.get(nth.unwrap_or(0)).cloned();
                if let Some((to, message)) = heard {
                    self.exceed(host, to, &message);
                }
            }
        }
        self.push(self.now + LOOK_US, What::Look);
    }

    /// The end: what must be so once all is quiet, and whether every lease can be proven.
    fn settle(&mut self) {
        let us = self.now;
        let nodes = self.hosts.iter().enumerate().map(|(host, known)| Settled {
            host,
            key: self.identities.get(known.identity).map(|who| who.key).unwrap_or_default(),
            view: known.process.as_ref().map(|process| process.core.view(known.clock.now(us))),
            unanswered: known.process.iter().flat_map(Process::unanswered).collect(),
        });
        let nodes: Vec<_> =
            nodes.filter(|node| node.host < self.scenario.nodes || node.view.is_some()).collect();
        self.check.settled(us, &nodes);
        let blind = self.contradicted.difference(&self.noticed).copied().collect::<Vec<_>>();
        for (host, key) in blind {
            // A copy may have a proof from before it was one.
            let copied = self.is_copied(&self.key(host));
            if self.vices[host].is_empty() && !copied {
                let what = format!("{} told it two things under one version", key.short());
                self.found(host, "8 (equivocation)", what);
            }
        }
        self.prove();
    }

    fn is_copied(&self, key: &KeyId) -> bool {
        let mut who = self.identities.iter().enumerate();
        who.any(|(nth, who)| who.key == *key && self.scenario.copied(nth))
    }

    fn prove(&mut self) {
        let mut left = MAX_PROOFS;
        for host in 0..self.scenario.nodes {
            if self.scenario.copied(host) || !self.vices[host].is_empty() {
                continue;
            }
            let Ok(kept) = self.hosts[host].disk.read() else { continue };
            for proof in self.proofs(host, &kept, &mut left) {
                self.counts.proofs += 1;
                if let Err(error) = proof::check(&proof) {
                    let what = format!("the proof of {} fails: {error}", proof.grant.id());
                    self.found(host, "9 (receipts)", what);
                }
            }
        }
    }

    /// What a lessor and a lessee would export, each from what it kept.
    fn proofs(&self, host: usize, kept: &[Kept], left: &mut usize) -> Vec<Proof> {
        let me = &self.identity(host).node;
        let sign = |draft: &Draft| match self.signatures.get(&draft.id()) {
            Some(signature) => Some(known(draft, *signature)),
            None => me.sign(draft).ok(),
        };
        let charter = self.fabric.charter.clone();
        let mut proofs = BTreeMap::new();
        for kept in kept {
            let proof = match kept {
                Kept::Held(_, held) if self.is_copied(&held.lessor) => None,
                Kept::Lent(id, lent) => Some((
                    (0, *id),
                    lent.offer.as_ref().and_then(sign),
                    Some(lent.order.clone()),
                    sign(&lent.grant),
                    lent.renew.clone().into_iter().collect(),
                    lent.termination.as_ref().and_then(sign),
                )),
                Kept::Held(_, held) => held.grant.as_ref().map(|grant| {
                    let order = match &held.order {
                        leasehold_proto::minds::holdings::Placed::Here(draft) => sign(draft),
                        leasehold_proto::minds::holdings::Placed::Elsewhere(signed) => {
                            Some(signed.clone())
                        }
                    };
                    let id = LeaseId(grant.id());
                    let end = held.closing().cloned();
                    let renew = held.renew.as_ref().and_then(|(renew, _)| sign(renew));
                    let renewals = renew.into_iter().chain(held.renewal.clone()).collect();
                    ((1, id), held.offer.clone(), order, Some(grant.clone()), renewals, end)
                }),
                _ => None,
            };
            if let Some((id, offer, Some(order), Some(grant), renewals, termination)) = proof
                && *left > 0
            {
                *left -= 1;
                let charter = charter.clone();
                let (receipts, acknowledgements) = (Vec::new(), Vec::new());
                let proof = Proof {
                    served: Vec::new(),
                    charter,
                    offer,
                    order,
                    grant,
                    renewals,
                    receipts,
                    acknowledgements,
                    termination,
                };
                proofs.insert(id, proof);
            }
        }
        // Both directories and both halves of this one are in the order of their keys.
        for kept in kept {
            match kept {
                Kept::Receipt(id, _, draft) => {
                    if let Some(proof) = proofs.get_mut(&(0, *id)) {
                        proof.receipts.extend(sign(draft));
                    }
                }
                Kept::Acknowledged(id, _, signed) => {
                    if let Some(proof) = proofs.get_mut(&(0, *id)) {
                        proof.acknowledgements.push(signed.clone());
                    }
                }
                Kept::Countersigned(id, _, receipt, answer) => {
                    if let Some(proof) = proofs.get_mut(&(1, *id)) {
                        proof.receipts.push(receipt.clone());
                        proof.acknowledgements.extend(sign(answer));
                    }
                }
                _ => {}
            }
        }
        proofs.into_values().collect()
    }
}

/// A draft that was signed before: the same draft has the same signature.
fn known(draft: &Draft, signature: Signature) -> Signed {
    Signed { envelope: draft.envelope.clone(), signature }
}

/// The signed object that an answer to `message` must be about.
fn object_of(message: &Message) -> Option<Hash> {
    match message {
        Message::Order(signed)
        | Message::Claim(signed)
        | Message::Release(signed)
        | Message::Renew(signed)
        | Message::Gang(signed, _) => Some(signed.id()),
        _ => None,
    }
}

fn signed_us(span: Span) -> i64 {
    i64::try_from(span.as_millis() * 1000).unwrap_or(i64::MAX)
}

/// A number for each sort of event, for the trace.
const fn tag(event: &Event) -> u8 {
    match event {
        Event::Linked(_) => 1,
        Event::Unlinked(_) => 2,
        Event::Heard { .. } => 3,
        Event::Answered { .. } => 4,
        Event::Unanswered { .. } => 5,
        Event::DialFailed(_) => 6,
        Event::Packet { .. } => 7,
        Event::Own(_) => 8,
        Event::Asked { .. } => 9,
        Event::Usage(..) => 10,
        Event::JobEnded(..) => 11,
        Event::DiskFull(_) => 12,
        Event::Woke => 13,
        Event::Leave => 14,
        Event::Extended(..) => 15,
        Event::JobBegun(_) => 16,
        Event::Payloads(_) => 17,
        Event::Models(_) => 18,
    }
}
