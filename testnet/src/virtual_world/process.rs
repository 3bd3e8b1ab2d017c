//! A node's process in the virtual world: the core, and what of its effects has not left yet.
//!
//! ```text
//! core --effects--> [Keep Out Out Keep Out ...]  --out, once every Keep before it is durable-->
//!                     |                   one sync at a time takes all Keeps that wait
//!                     '--> disk
//! ```
//!
//! That is the barrier of `core::effect`, as the real loop keeps it: packets never wait, and a
//! process that is killed loses what was not synced, except for as much of the sync under way as
//! had reached the disk.

use std::collections::{BTreeMap, HashMap, VecDeque};

use leasehold_proto::base::id::{Hash, KeyId};
use leasehold_proto::base::time::Span;
use leasehold_proto::core::{Core, Effect, Event, Token};
use leasehold_proto::words::message::Message;

use super::host::Write;
use super::load::Purpose;
use super::network::LinkId;

/// What reaches a process.
#[derive(Debug)]
pub(super) enum Input {
    /// Something the core hears as it is.
    Event(Box<Event>),
    /// A question over a link, or from the process itself.
    Question(Box<Question>),
    /// The answer to one.
    Answer(KeyId, Token, Box<Carried>),
    /// The sync under way is over.
    Synced,
    /// A question has waited for its answer long enough.
    Timeout(Token),
    /// Time has passed.
    Wake,
}

/// A question with the way back.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) from: KeyId,
    pub(super) back: Back,
    pub(super) what: Carried,
}

/// Where an answer goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Back {
    pub(super) host: usize,
    pub(super) life: u64,
    /// None for what a process asks itself.
    pub(super) link: Option<LinkId>,
    /// None when nobody waits for the answer.
    pub(super) token: Option<Token>,
    /// The signed object in the question.
    pub(super) about: Option<Hash>,
}

/// A message on its way: as a value, or as the bytes of a frame.
#[derive(Clone, Debug)]
pub(super) enum Carried {
    Message(Message),
    Frame(Vec<u8>),
}

/// A step in the order of effects.
#[allow(clippy::large_enum_variant)] // few are alive at once, each is moved once
#[derive(Debug)]
enum Item {
    Keep,
    Out(Effect),
}

/// A node's process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) core: Core,
    /// Which process this is, of all that ever ran: what is meant for an earlier one is void.
    pub(super) life: u64,
    pub(super) paused: bool,
    /// It is killed in the middle of its next sync, and started after this long.
    pub(super) doomed: Option<Span>,
    /// What arrived while it stood still.
    pub(super) inbox: VecDeque<Input>,
    /// Questions that wait for their answers, with the links they went over.
    pub(super) asked: BTreeMap<Token, Option<LinkId>>,
    /// Questions of others that wait for this one's answers.
    pub(super) tickets: HashMap<u64, Back>,
    pub(super) next_ticket: u64,
    /// Commands that wait for their replies.
    pub(super) commands: BTreeMap<u64, Purpose>,
    pub(super) next_command: u64,
    /// When it is woken at the latest.
    pub(super) wake_us: u64,
    /// How often it was woken within one millisecond.
    pub(super) spins: (u64, u32),
    /// Hosts that it is dialling, and whom it expects there.
    pub(super) dialling: Vec<(usize, Option<KeyId>)>,
    pipe: VecDeque<Item>,
    unsynced: VecDeque<Write>,
    syncing: usize,
    synced: usize,
}

impl Process {
    pub(super) fn new(core: Core, life: u64) -> Self {
        Self {
            core,
            life,
            paused: false,
            doomed: None,
            inbox: VecDeque::new(),
            asked: BTreeMap::new(),
            tickets: HashMap::new(),
            next_ticket: 0,
            commands: BTreeMap::new(),
            next_command: 0,
            wake_us: u64::MAX,
            spins: (0, 0),
            dialling: Vec::new(),
            pipe: VecDeque::new(),
            unsynced: VecDeque::new(),
            syncing: 0,
            synced: 0,
        }
    }

    /// Commands that wait for their replies still.
    pub(super) fn unanswered(&self) -> Vec<String> {
        self.commands.values().map(|purpose| format!("{purpose:?}")).collect()
    }

    /// Something is to be made durable.
    pub(super) fn keep(&mut self, write: Write) {
        self.unsynced.push_back(write);
        self.pipe.push_back(Item::Keep);
    }

    /// Something is to leave.
    pub(super) fn leave(&mut self, effect: Effect) {
        self.pipe.push_back(Item::Out(effect));
    }

    /// Begins a sync of all that waits for one. False when there is nothing, or one is under way.
    pub(super) fn begin_sync(&mut self) -> bool {
        let begins = self.syncing == 0 && !self.unsynced.is_empty();
        if begins {
            self.syncing = self.unsynced.len();
        }
        begins
    }

    /// The sync is over: what it made durable.
    pub(super) fn end_sync(&mut self) -> Vec<Write> {
        let done = std::mem::take(&mut self.syncing);
        self.synced += done;
        self.unsynced.drain(..done).collect()
    }

    /// The next effect that may leave.
    pub(super) fn next_out(&mut self) -> Option<Effect> {
        loop {
            match self.pipe.front()? {
                Item::Keep if self.synced == 0 => return None,
                Item::Keep => self.synced -= 1,
                Item::Out(_) => {}
            }
            if let Some(Item::Out(effect)) = self.pipe.pop_front() {
                return Some(effect);
            }
        }
    }

    /// What the sync under way may have written when the process is killed: some first part of it.
    pub(super) fn torn(mut self, part: impl FnOnce(usize) -> usize) -> Vec<Write> {
        let part = part(self.syncing).min(self.syncing);
        self.unsynced.drain(..part).collect()
    }
}
