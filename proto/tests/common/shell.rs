//! A core with a disk that never fails, and with peers that the test plays.
//! (A module of the other test files, not a test of its own.)
#![allow(dead_code, unreachable_pub)] // each test file uses its part

use std::collections::BTreeMap;

use leasehold_proto::base::id::KeyId;
use leasehold_proto::base::plant::Plant;
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::{Boot, BootId, Now, Span};
use leasehold_proto::core::kept::Kept;
use leasehold_proto::core::{
    Command, CommandId, Config, Core, Effect, Event, Failure, Orphans, Reply, Ticket, Token, View,
};
use leasehold_proto::minds::member::Timing;
use leasehold_proto::minds::pricing::Policy;
use leasehold_proto::words::message::{self, Message, RecordSaid, Said, Utterance};
use leasehold_proto::words::record::Addresses;
use leasehold_proto::words::sign::{Signed, Signer};

use super::people::{BOOT, People, WALL};

/// What a core keeps, by key, as a disk would.
pub type Disk = BTreeMap<Vec<u8>, Kept>;

pub struct Shell<'a> {
    pub people: &'a People,
    pub me: &'a Signer,
    pub core: Core,
    pub disk: Disk,
    /// The boot clock, in milliseconds.
    pub at: u64,
    /// By how much the wall clock is ahead of that, beyond the usual.
    pub ahead: u64,
    boot: BootId,
    /// The records of its own that it signed in this run.
    own: Vec<Signed>,
    asked: u64,
}

/// What a node of `people` is told at its start.
pub fn config(people: &People, me: &Signer) -> Config {
    let lends = me.id() != people.delegate.id();
    let name = if lends { me.id().short() } else { "delegate".into() };
    let port = 7_000 + 10 * u16::from(me.id().0[0]);
    let address = |port: u16| vec![([127, 0, 0, 1], port).into()];
    let capacity = Resources::new(if lends { 4_000 } else { 0 }, 4 << 30, 0);
    Config {
        me: me.id(),
        certificate: people.certificate(me.id(), &name),
        name,
        boot: BOOT,
        charter: people.charter.clone(),
        mandate: (!lends).then(|| people.mandate.clone()),
        addresses: Addresses {
            link: address(port),
            probe: address(port + 1),
            data: address(port + 2),
        },
        hardware: capacity.clone(),
        capacity,
        processor: "a processor".into(),
        version: "0.1.0".into(),
        labels: Vec::new(),
        policy: Policy {
            selling: lends,
            rates: People::rates(),
            slack_permille: Some(500),
            early: People::early(),
            max_term: Span::secs(3600),
            max_claim_within: Span::secs(60),
            runtimes: vec!["wasm".into()],
            isolation: Vec::new(),
        },
        timing: Timing::default(),
        grace: Span::secs(2),
        join: Vec::new(),
        noted_epoch: 0,
        seed: 1,
        plant: Plant::NONE,
    }
}

impl<'a> Shell<'a> {
    /// Starts a node from what `disk` keeps.
    pub fn start(people: &'a People, me: &'a Signer, disk: Disk, at: u64) -> Self {
        Self::start_with(people, me, config(people, me), disk, at)
    }

    pub fn start_with(
        people: &'a People,
        me: &'a Signer,
        config: Config,
        disk: Disk,
        at: u64,
    ) -> Self {
        Self::begin(people, me, config, disk, (at, 0), &Orphans::new()).0
    }

    /// Starts a node, with what it wants of others at once.
    pub fn begin(
        people: &'a People,
        me: &'a Signer,
        config: Config,
        disk: Disk,
        (at, ahead): (u64, u64),
        orphans: &Orphans,
    ) -> (Self, Vec<Effect>) {
        let mut out = Vec::new();
        let saved: Vec<_> = disk.values().cloned().collect();
        let boot = config.boot;
        let time = Now { boot: Boot(at), wall: WALL + Span::millis(at + ahead) };
        let core = Core::new(config, saved, orphans, time, &mut out).expect("it starts");
        let mut shell = Self { people, me, core, disk, at, ahead, boot, own: Vec::new(), asked: 0 };
        let outward = shell.carry_out(out);
        (shell, outward)
    }

    /// The same node after its process ended.
    pub fn again(self) -> Self {
        let (people, me, at) = (self.people, self.me, self.at);
        Self::start(people, me, self.disk, at)
    }

    /// What is left for others of what the core wants.
    fn carry_out(&mut self, effects: Vec<Effect>) -> Vec<Effect> {
        let mut outward = Vec::new();
        let mut todo: std::collections::VecDeque<_> = effects.into();
        while let Some(effect) = todo.pop_front() {
            match effect {
                Effect::Keep(kept) => {
                    if kept.value().expect("it fits").is_some() {
                        self.disk.insert(kept.key(), kept);
                    } else {
                        self.disk.remove(&kept.key());
                    }
                }
                Effect::Record(draft) => {
                    let signed = self.me.sign(&draft).expect("its own");
                    let said = message::verify_record(&signed, &self.people.fabric);
                    self.own.push(signed);
                    let mut more = Vec::new();
                    let own = Event::Own(said.expect("it holds"));
                    self.core.handle(self.now(), own, &mut more);
                    todo.extend(more);
                }
                other => outward.push(other),
            }
        }
        outward
    }

    pub fn tell(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        self.core.handle(self.now(), event, &mut out);
        self.carry_out(out)
    }

    /// Time passes in steps of 50 ms.
    pub fn pass(&mut self, span: Span) -> Vec<Effect> {
        let (end, mut out) = (self.at + span.as_millis(), Vec::new());
        while self.at < end {
            self.at = (self.at + 50).min(end);
            out.extend(self.tell(Event::Woke));
        }
        out
    }

    pub fn now(&self) -> Now {
        Now { boot: Boot(self.at), wall: WALL + Span::millis(self.at + self.ahead) }
    }

    pub fn said(&self, message: &Message) -> Said {
        message::verify(message, &self.people.fabric).expect("it verifies")
    }

    pub fn hears(&mut self, from: KeyId, message: &Message) -> Vec<Effect> {
        self.asked += 1;
        let (said, ticket) = (self.said(message), Ticket(self.asked));
        self.tell(Event::Heard { from, said, ticket })
    }

    pub fn answered(&mut self, from: KeyId, token: Token, message: &Message) -> Vec<Effect> {
        let said = self.said(message);
        self.tell(Event::Answered { from, token, said })
    }

    /// Links with a peer, which greets and shows `seen` of this node's own.
    pub fn met(
        &mut self,
        peer: &KeyId,
        certificate: &Signed,
        seen: Option<&Signed>,
    ) -> Vec<Effect> {
        let mut out = self.tell(Event::Linked(*peer));
        let hello = Message::Hello {
            charter: self.people.charter.id(),
            certificate: certificate.clone(),
            epoch: 1,
            seen: seen.map(|seen| Box::new(seen.clone())),
        };
        out.extend(self.hears(*peer, &hello));
        out
    }

    /// The record of a host that runs as `me` would in `epoch`.
    pub fn record(people: &People, me: &Signer, epoch: u64, seq: u64, returns: u32) -> Signed {
        use leasehold_proto::words::object::key_subject;
        use leasehold_proto::words::sign::Hand;
        let hand = Hand { fabric: people.fabric, me: me.id(), epoch };
        let body = config(people, me).host_record(returns);
        let until = WALL + Span::secs(3600);
        let draft = hand.draft(key_subject(&me.id()), seq, until, &body).expect("it fits");
        me.sign(&draft).expect("its own")
    }

    pub fn ask(&mut self, what: Command) -> Result<Reply, Failure> {
        let out = self.tell(Event::Asked { command: CommandId(self.at), what });
        let answer = out.into_iter().find_map(|effect| match effect {
            Effect::Answer(_, answer) => Some(answer),
            _ => None,
        });
        answer.expect("it is answered at once")
    }

    /// The records of its own that it signed in this run.
    pub fn own_records(&self) -> Vec<Signed> {
        self.own.clone()
    }

    /// The host records among them.
    pub fn host_records(&self) -> Vec<Signed> {
        let hosts = self.own.iter().filter(|signed| {
            let said = message::verify_record(signed, &self.people.fabric);
            matches!(said, Ok(RecordSaid::Host(..)))
        });
        hosts.cloned().collect()
    }

    /// What the core wants to say, signed.
    pub fn carry(&self, what: Utterance) -> Message {
        what.carry(|draft| self.me.sign(draft)).expect("its own")
    }

    pub fn view(&self) -> View {
        self.core.view(self.now())
    }

    pub fn halted(&self) -> Option<String> {
        self.view().halted
    }
}

/// Nodes with links between all of them, each over a wire that can be cut.
pub struct Net<'a> {
    pub nodes: Vec<Shell<'a>>,
    /// Whether a message is lost on its way, by who says it.
    pub lost: fn(usize, &Message) -> bool,
    /// What the nodes want that is neither said nor kept, in order.
    pub wanted: Vec<(usize, Effect)>,
    /// How many messages of each kind were carried or lost, by a debug name.
    pub said: Vec<(usize, Message)>,
    tickets: u64,
}

impl<'a> Net<'a> {
    pub fn of(nodes: Vec<Shell<'a>>) -> Self {
        let mut net =
            Self { nodes, lost: |_, _| false, wanted: Vec::new(), said: Vec::new(), tickets: 0 };
        for from in 0..net.nodes.len() {
            for to in 0..net.nodes.len() {
                if from != to {
                    let peer = net.nodes[to].me.id();
                    net.tell(from, Event::Linked(peer));
                }
            }
        }
        net
    }

    fn index(&self, key: &KeyId) -> Option<usize> {
        self.nodes.iter().position(|node| node.me.id() == *key)
    }

    /// Tells a node something, and carries all that follows from it.
    pub fn tell(&mut self, node: usize, event: Event) {
        let effects = self.nodes[node].tell(event);
        for effect in effects {
            self.carry(node, effect);
        }
    }

    fn carry(&mut self, node: usize, effect: Effect) {
        let me = self.nodes[node].me.id();
        match effect {
            Effect::Ask { to, token, what } => {
                let message = self.nodes[node].carry(what);
                self.said.push((node, message.clone()));
                let lost = (self.lost)(node, &message);
                let reply = self.index(&to).filter(|_| !lost).and_then(|other| {
                    self.tickets += 1;
                    let (said, ticket) = (self.nodes[other].said(&message), Ticket(self.tickets));
                    let out = self.nodes[other].tell(Event::Heard { from: me, said, ticket });
                    let (mut reply, mut rest) = (None, Vec::new());
                    for effect in out {
                        match effect {
                            Effect::Reply { ticket: of, what } if of == ticket => {
                                reply = Some(self.nodes[other].carry(what));
                            }
                            effect => rest.push(effect),
                        }
                    }
                    let reply = reply.filter(|reply| {
                        self.said.push((other, reply.clone()));
                        !(self.lost)(other, reply)
                    });
                    // The answer goes before what else follows, as on one link.
                    if let Some(reply) = &reply {
                        let said = self.nodes[node].said(reply);
                        self.tell(node, Event::Answered { from: to, token, said });
                    }
                    rest.into_iter().for_each(|effect| self.carry(other, effect));
                    reply
                });
                if reply.is_none() {
                    self.tell(node, Event::Unanswered { token, why: "it was lost".into() });
                }
            }
            Effect::Dial { peer: Some(peer), .. } if self.index(&peer).is_none() => {
                self.tell(node, Event::DialFailed(peer));
            }
            Effect::Packet { to, bytes } => {
                let mut hosts = self.nodes.iter();
                let other = hosts
                    .position(|other| config(other.people, other.me).addresses.probe.contains(&to));
                if let Some(other) = other.filter(|other| *other != node) {
                    self.tell(other, Event::Packet { from: me, bytes });
                }
            }
            other => self.wanted.push((node, other)),
        }
    }

    /// Time passes for all, in steps of 50 ms.
    pub fn pass(&mut self, span: Span) {
        for _ in 0..span.as_millis().div_ceil(50) {
            for node in 0..self.nodes.len() {
                self.nodes[node].at += 50;
                self.tell(node, Event::Woke);
            }
        }
    }

    /// Gives a command and lets time pass until it is answered.
    pub fn ask(&mut self, node: usize, what: Command) -> Result<Reply, Failure> {
        self.tickets += 1;
        let command = CommandId(self.tickets);
        self.tell(node, Event::Asked { command, what });
        for _ in 0..2_000 {
            let answered = |(by, effect): &(usize, Effect)| {
                *by == node && matches!(effect, Effect::Answer(of, _) if *of == command)
            };
            if let Some(found) = self.wanted.iter().position(answered)
                && let (_, Effect::Answer(_, answer)) = self.wanted.remove(found)
            {
                return answer;
            }
            self.pass(Span::millis(50));
        }
        panic!("it is never answered");
    }

    /// A process ends, and the next one starts from what was kept.
    pub fn restart(&mut self, node: usize, orphans: &Orphans) {
        let Shell { at, ahead, boot, .. } = self.nodes[node];
        self.start_again(node, (at, ahead), boot, orphans);
    }

    /// A host goes down, and is up again after so long: its boot clock begins anew.
    pub fn reboot(&mut self, node: usize, after: Span) {
        let Shell { at, ahead, boot, .. } = self.nodes[node];
        let (up, boot) = (3_000, BootId(boot.0.map(|byte| byte + 1)));
        self.start_again(node, (up, at + ahead + after.as_millis() - up), boot, &Orphans::new());
    }

    fn start_again(&mut self, node: usize, clocks: (u64, u64), boot: BootId, orphans: &Orphans) {
        let (people, me) = (self.nodes[node].people, self.nodes[node].me);
        let disk = std::mem::take(&mut self.nodes[node].disk);
        let peers: Vec<_> = self.nodes.iter().map(|node| node.me.id()).collect();
        for (other, _) in peers.iter().enumerate().filter(|(other, _)| *other != node) {
            self.tell(other, Event::Unlinked(me.id()));
        }
        let config = Config { boot, ..config(people, me) };
        let (shell, effects) = Shell::begin(people, me, config, disk, clocks, orphans);
        self.nodes[node] = shell;
        for effect in effects {
            self.carry(node, effect);
        }
        for (other, peer) in peers.iter().enumerate().filter(|(other, _)| *other != node) {
            self.tell(node, Event::Linked(*peer));
            self.tell(other, Event::Linked(me.id()));
        }
    }
}
