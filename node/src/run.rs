//! The loop: inputs, the core, effects. One task owns the core; nobody else touches it.
//!
//! ```text
//! links, packets --verify (2 workers, a link always the same)--.
//! API commands, jobs, timer ----------------------------------->  core.handle  --> effects
//!                                                                     |
//!       packets: signed and sent at once                              |
//!       Keep: one batch to the store --------------------.            |
//!       the rest: queued behind that batch, performed in order once it is durable
//! ```
//!
//! The queue keeps the contract of `proto::core::effect`: nothing but liveness packets leaves
//! before everything kept before it is on disk. Batches are in flight at the same time, so the
//! store groups their syncs; effects are still performed in the order they were decided.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use leasehold_proto::core::{
    CommandId, Core, Effect, Event, Failure, Notice, Reply, Ticket, Token,
};
use leasehold_proto::words::message::{self, Utterance};
use leasehold_proto::words::sign::{Signer, VerifyError};
use leasehold_proto::{KeyId, LeaseId, Span};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::handle::Asked;
use crate::history::History;
use crate::home::Home;
use crate::jobs::Jobs;
use crate::model::Models;
use crate::net::{Net, NetCommand, NetEvent, SendError};
use crate::probe::Probe;
use crate::store::{Pending, Store, Write};
use crate::verify::{Checked, Verifiers};
use crate::work::Reaped;

/// The most events handled before their effects are taken care of.
const BATCH: usize = 64;
/// The most batches waiting to become durable before no new input is taken.
const MAX_QUEUED: usize = 512;
/// The most commands to the links kept for another try.
const MAX_UNSENT: usize = 4_096;
/// How often the disk is looked at.
const LOOK_AT_DISK: Duration = Duration::from_secs(2);

/// What the loop counts, for metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Events handled.
    pub events: AtomicU64,
    /// Batches kept.
    pub batches: AtomicU64,
    /// Frames and packets whose signature or form did not hold.
    pub rejected: AtomicU64,
    /// Frames to peers dropped because the links were too busy.
    pub dropped: AtomicU64,
}

/// Keys that are admitted now, shared with the data plane.
pub(crate) type Admitted = Arc<RwLock<BTreeSet<[u8; 32]>>>;

/// Everything the loop has its hands on.
pub(crate) struct Loop {
    pub(crate) core: Core,
    pub(crate) signer: Signer,
    pub(crate) store: Store,
    pub(crate) net: Net,
    pub(crate) probe: Probe,
    pub(crate) jobs: Jobs,
    pub(crate) models: Models,
    pub(crate) verifiers: Verifiers,
    pub(crate) admitted: Admitted,
    pub(crate) counts: Arc<Counts>,
    pub(crate) min_disk_free: u64,
    pub(crate) home: Home,
    pub(crate) history: History,
    /// Jobs of an earlier run that have ended, with who may follow them.
    pub(crate) reaped: Vec<(Reaped, Option<KeyId>)>,
}

/// Where the loop's input comes from.
pub(crate) struct Inputs {
    pub(crate) net: mpsc::Receiver<NetEvent>,
    pub(crate) packets: mpsc::Receiver<(SocketAddr, Vec<u8>)>,
    pub(crate) checked: mpsc::Receiver<Checked>,
    pub(crate) commands: mpsc::Receiver<Asked>,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) shutdown: CancellationToken,
}

/// Effects behind what must be durable first.
struct Behind {
    pending: Option<Pending>,
    effects: Vec<Effect>,
}

/// The parts of the loop that change.
struct State {
    waiting: BTreeMap<CommandId, oneshot::Sender<Result<Reply, Failure>>>,
    commands: u64,
    queue: VecDeque<Behind>,
    unsent: VecDeque<NetCommand>,
    /// Questions that were not asked, of which the core is told next.
    lost: VecDeque<(Token, String)>,
    /// Tickets at or above this are of questions that this node asked itself.
    own_tickets: u64,
    own: BTreeMap<u64, u64>,
    disk_full: bool,
    admissions: u64,
}

/// Tickets of links stay below this; those of questions to oneself begin here.
const OWN: u64 = 1 << 63;

impl Loop {
    /// Runs until the node is told to stop; `first` are the effects of the core's start.
    pub(crate) async fn run(mut self, mut inputs: Inputs, first: Vec<Effect>) {
        let mut state = State {
            waiting: BTreeMap::new(),
            commands: 0,
            queue: VecDeque::new(),
            unsent: VecDeque::new(),
            lost: VecDeque::new(),
            own_tickets: OWN,
            own: BTreeMap::new(),
            disk_full: false,
            admissions: 0,
        };
        let mut look = tokio::time::interval(LOOK_AT_DISK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut first = first;
        self.look_at_disk(&mut state, &mut first);
        self.history.started(&self.core);
        // The epoch is on disk before anything is signed in it, liveness packets included.
        let (kept, rest) = first.into_iter().partition(|effect| matches!(effect, Effect::Keep(_)));
        self.take_care(&mut state, kept).await;
        while !state.queue.is_empty() {
            if front(&mut state.queue).await.is_err() {
                tracing::error!("the store has closed: nothing can be promised any more");
                return;
            }
        }
        // Noted elsewhere as well before anything is signed: a directory that is restored from an
        // older copy is known by that.
        let hand = self.core.hand();
        if let Err(error) = self.home.note_epoch(hand.me, hand.epoch) {
            tracing::warn!(%error, "the epoch cannot be noted beside the node's directory");
        }
        // What became of earlier jobs is kept now: what is left of them may go.
        tokio::spawn(self.jobs.clone().take_back(std::mem::take(&mut self.reaped)));
        self.take_care(&mut state, rest).await;
        loop {
            let mut out = Vec::new();
            let room = state.queue.len() < MAX_QUEUED;
            let idle = state.unsent.is_empty();
            let wake = self.sleep();
            let lost = state.lost.pop_front();
            if let Some((token, why)) = lost {
                self.handle(Event::Unanswered { token, why }, &mut out);
                self.take_care(&mut state, out).await;
                continue;
            }
            tokio::select! {
                durable = front(&mut state.queue) => match durable {
                    Ok(effects) => {
                        for effect in effects {
                            self.perform(&mut state, effect).await;
                        }
                        continue;
                    }
                    Err(()) => {
                        tracing::error!("the store has closed: nothing can be promised any more");
                        return;
                    }
                },
                Some(event) = inputs.net.recv(), if room => self.net_event(event, &mut out).await,
                Some((_, packet)) = inputs.packets.recv(), if room => {
                    self.verifiers.packet(packet);
                }
                Some(checked) = inputs.checked.recv(), if room => {
                    self.checked(checked, &mut state, &mut out);
                }
                Some(event) = inputs.events.recv(), if room => self.handle(event, &mut out),
                Some(asked) = inputs.commands.recv(), if room && idle => {
                    self.command(asked, &mut state, &mut out);
                }
                () = wake => self.handle(Event::Woke, &mut out),
                () = tokio::time::sleep(Duration::from_millis(2)), if !idle => {
                    self.flush(&mut state);
                }
                _ = look.tick() => self.look_at_disk(&mut state, &mut out),
                () = inputs.shutdown.cancelled() => break,
            }
            self.drain(&mut inputs, &mut state, &mut out).await;
            self.take_care(&mut state, out).await;
            self.history.look(&self.core);
        }
        self.stop(state).await;
    }

    /// Takes what else is there already, so that it shares one sync.
    async fn drain(&mut self, inputs: &mut Inputs, state: &mut State, out: &mut Vec<Effect>) {
        for _ in 0..BATCH {
            if let Ok(checked) = inputs.checked.try_recv() {
                self.checked(checked, state, out);
            } else if let Ok(event) = inputs.net.try_recv() {
                self.net_event(event, out).await;
            } else if state.unsent.is_empty()
                && let Ok(asked) = inputs.commands.try_recv()
            {
                self.command(asked, state, out);
            } else if let Ok(event) = inputs.events.try_recv() {
                self.handle(event, out);
            } else {
                return;
            }
        }
    }

    fn sleep(&self) -> impl Future<Output = ()> + use<> {
        let now = clock::boot();
        let due = self.core.next_wake().unwrap_or(now + Span::secs(1));
        // Never shorter than the clock's own grain, never longer than a suspend may hide.
        let span = due.since(now).as_millis().clamp(1, 1_000);
        tokio::time::sleep(Duration::from_millis(span))
    }

    fn handle(&mut self, event: Event, out: &mut Vec<Effect>) {
        self.counts.events.fetch_add(1, Ordering::Relaxed);
        self.history.heard(&event);
        self.core.handle(clock::now(), event, out);
    }

    fn command(&mut self, (what, reply): Asked, state: &mut State, out: &mut Vec<Effect>) {
        state.commands += 1;
        let command = CommandId(state.commands);
        state.waiting.insert(command, reply);
        // Whoever hung up waits no more; their command still runs its course.
        if state.commands.is_multiple_of(256) {
            state.waiting.retain(|_, reply| !reply.is_closed());
        }
        self.handle(Event::Asked { command, what }, out);
    }

    async fn net_event(&mut self, event: NetEvent, out: &mut Vec<Effect>) {
        match event {
            NetEvent::Linked { peer, .. } => {
                self.handle(Event::Linked(KeyId(peer)), out);
            }
            NetEvent::Unlinked { peer, why } => {
                tracing::debug!(peer = %KeyId(peer), ?why, "a link is gone");
                self.handle(Event::Unlinked(KeyId(peer)), out);
            }
            NetEvent::Asked { peer, ticket, frame } => {
                self.verifiers.asked(KeyId(peer), Ticket(ticket), frame).await;
            }
            NetEvent::Answered { peer, token, frame } => {
                self.verifiers.answered(KeyId(peer), Token(token), frame).await;
            }
            NetEvent::Unanswered { token, why, .. } => {
                let why = format!("{why}");
                self.handle(Event::Unanswered { token: Token(token), why }, out);
            }
            NetEvent::DialFailed { peer, addresses, why } => {
                tracing::debug!(?addresses, %why, "a peer cannot be dialled");
                if let Some(peer) = peer {
                    self.handle(Event::DialFailed(KeyId(peer)), out);
                }
            }
        }
    }

    fn checked(&mut self, checked: Checked, state: &mut State, out: &mut Vec<Effect>) {
        match checked {
            Checked::Asked { from, ticket, said } => {
                self.handle(Event::Heard { from, said: *said, ticket }, out);
            }
            Checked::Answered { from, token, said } => {
                self.handle(Event::Answered { from, token, said: *said }, out);
            }
            Checked::BadAnswer { token, why } => {
                self.counts.rejected.fetch_add(1, Ordering::Relaxed);
                self.handle(Event::Unanswered { token, why }, out);
            }
            Checked::BadQuestion { from, ticket, why } => {
                self.counts.rejected.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(peer = %from, why, "a peer sent what does not verify");
                state.own.remove(&ticket.0);
                let why = "its message does not verify".into();
                self.send(state, NetCommand::Disconnect { peer: from.0, why });
            }
            Checked::Packet { from, bytes } => self.handle(Event::Packet { from, bytes }, out),
            Checked::BadPacket => {
                self.counts.rejected.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn look_at_disk(&mut self, state: &mut State, out: &mut Vec<Effect>) {
        let free = crate::host::disk_free(self.home.dir()).unwrap_or(0);
        let full = free < self.min_disk_free || self.store.admit().is_err();
        if full != state.disk_full {
            state.disk_full = full;
            if full {
                let need = self.min_disk_free;
                tracing::warn!(free, need, "the disk is too full: nothing new is promised");
            } else {
                tracing::info!(free, "the disk has room again");
            }
            self.handle(Event::DiskFull(full), out);
        }
    }

    /// Sends packets, submits what must be kept, and queues the rest behind it.
    async fn take_care(&mut self, state: &mut State, effects: Vec<Effect>) {
        if effects.is_empty() {
            return;
        }
        let mut writes = Vec::new();
        let mut rest = Vec::new();
        for effect in effects {
            match effect {
                Effect::Packet { to, bytes } => self.send_packet(to, &bytes),
                Effect::Keep(kept) => match kept.value() {
                    Ok(value) => writes.push(Write { key: kept.key(), value }),
                    Err(error) => {
                        // Going on would promise what is not kept.
                        tracing::error!(%error, ?kept, "a record does not fit: stopping");
                        std::process::abort();
                    }
                },
                other => rest.push(other),
            }
        }
        self.share_admitted(state);
        self.history.kept(&writes);
        let pending = if writes.is_empty() {
            None
        } else {
            self.counts.batches.fetch_add(1, Ordering::Relaxed);
            match self.store.submit_all(writes).await {
                Ok(pending) => Some(pending),
                Err(error) => {
                    tracing::error!(%error, "the store takes nothing: stopping");
                    std::process::abort();
                }
            }
        };
        if pending.is_none() && state.queue.is_empty() {
            for effect in rest {
                self.perform(state, effect).await;
            }
        } else {
            state.queue.push_back(Behind { pending, effects: rest });
        }
    }

    fn send_packet(&self, to: SocketAddr, bytes: &[u8]) {
        let fabric = self.core.hand().fabric;
        let signature = self.signer.sign_packet(&fabric, bytes);
        let mut packet = Vec::with_capacity(96 + bytes.len());
        packet.extend_from_slice(&self.signer.id().0);
        packet.extend_from_slice(&signature.0);
        packet.extend_from_slice(bytes);
        if let Err(error) = self.probe.send(to, &packet) {
            tracing::debug!(%to, %error, "a liveness packet was not sent");
        }
    }

    /// Lets the data plane know who is admitted, when that changed.
    fn share_admitted(&self, state: &mut State) {
        let admissions = self.core.admissions();
        if admissions != state.admissions {
            state.admissions = admissions;
            let keys = self.core.admitted().map(|key| key.0).collect();
            *self.admitted.write().unwrap_or_else(PoisonError::into_inner) = keys;
        }
    }

    /// Signs what is to be said and encodes it.
    fn frame(&mut self, what: Utterance, answers: Option<Ticket>) -> Result<Vec<u8>, VerifyError> {
        let (signer, history) = (&self.signer, &mut self.history);
        let message = what.carry(|draft| {
            let signed = signer.sign(draft)?;
            history.signed(&signed, answers);
            Ok::<_, VerifyError>(signed)
        })?;
        message::encode(&message).map_err(|_| VerifyError::Version(0))
    }

    async fn perform(&mut self, state: &mut State, effect: Effect) {
        self.history.leaves(&effect);
        match effect {
            Effect::Ask { to, token, what } => self.ask(state, to, token, what).await,
            Effect::Reply { ticket, what } => self.reply(state, ticket, what).await,
            Effect::Dial { peer, addresses } => {
                let peer = peer.map(|peer| peer.0);
                self.send(state, NetCommand::Dial { peer, addresses });
            }
            Effect::Admit(peer) => self.send(state, NetCommand::Admit { peer: peer.0 }),
            Effect::Restarted(peer) => self.send(state, NetCommand::CloseOlder { peer: peer.0 }),
            Effect::Disconnect(peer, why) => {
                tracing::debug!(%peer, why, "closing a link");
                self.send(state, NetCommand::Disconnect { peer: peer.0, why: why.into() });
            }
            Effect::Record(draft) => self.own_record(state, &draft).await,
            Effect::StartJob(start) if start.model.is_some() => self.models.start(*start),
            Effect::StartJob(start) => self.jobs.start(*start),
            Effect::ExtendJob(lease, deadline) => {
                if !self.models.extend(lease, deadline) {
                    self.jobs.extend(lease, deadline);
                }
            }
            Effect::FreezeJob(lease) => self.freeze(lease, true),
            Effect::ThawJob(lease) => self.freeze(lease, false),
            Effect::NotifyJob(lease, notified) => self.jobs.notify(lease, notified),
            Effect::StopJob(lease, why) => {
                if !self.models.stop(lease) {
                    self.jobs.stop(lease, why);
                }
            }
            Effect::JobNoted(lease) => self.jobs.noted(lease),
            Effect::Answer(command, reply) => {
                if let Some(waiting) = state.waiting.remove(&command) {
                    let _ = waiting.send(reply);
                }
            }
            Effect::Notice(notice) => tell(&notice),
            Effect::Keep(_) | Effect::Packet { .. } => {}
        }
    }

    fn freeze(&self, lease: LeaseId, frozen: bool) {
        if !self.models.freeze(&lease, frozen) {
            self.jobs.freeze(lease, frozen);
        }
    }

    async fn ask(&mut self, state: &mut State, to: KeyId, token: Token, what: Utterance) {
        let frame = match self.frame(what, None) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "a question could not be signed");
                state.lost.push_back((token, error.to_string()));
                return;
            }
        };
        if to == self.signer.id() {
            state.own_tickets += 1;
            state.own.insert(state.own_tickets, token.0);
            self.verifiers.asked(to, Ticket(state.own_tickets), frame).await;
        } else {
            self.send(state, NetCommand::Ask { peer: to.0, token: token.0, frame });
        }
    }

    async fn reply(&mut self, state: &mut State, ticket: Ticket, what: Utterance) {
        let frame = match self.frame(what, Some(ticket)) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "an answer could not be signed");
                return;
            }
        };
        if ticket.0 >= OWN {
            if let Some(token) = state.own.remove(&ticket.0) {
                self.verifiers.answered(self.signer.id(), Token(token), frame).await;
            }
        } else {
            self.send(state, NetCommand::Reply { ticket: ticket.0, frame });
        }
    }

    async fn own_record(&mut self, state: &mut State, draft: &leasehold_proto::words::sign::Draft) {
        let fabric = self.core.hand().fabric;
        let signed = self.signer.sign(draft);
        signed.iter().for_each(|signed| self.history.signed(signed, None));
        match signed.and_then(|signed| message::verify_record(&signed, &fabric)) {
            Ok(record) => {
                let mut out = Vec::new();
                self.handle(Event::Own(record), &mut out);
                Box::pin(self.take_care(state, out)).await;
            }
            Err(error) => tracing::error!(%error, "this node's own record does not verify"),
        }
    }

    /// Hands a command to the links, or keeps it for another try when they are busy.
    fn send(&mut self, state: &mut State, command: NetCommand) {
        if !state.unsent.is_empty() {
            self.keep_unsent(state, command);
            return;
        }
        match self.net.send(command) {
            Ok(()) => {}
            Err(SendError::Closed(command)) => not_sent(state, command, "the links are closed"),
            Err(SendError::Busy(command)) => self.keep_unsent(state, command),
        }
    }

    fn keep_unsent(&self, state: &mut State, command: NetCommand) {
        if state.unsent.len() >= MAX_UNSENT {
            // Of a reply: the peer asks again, or its patience ends. What was promised is on disk.
            // Of a question that was not asked the core is told.
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
            not_sent(state, command, "the links are too busy");
            return;
        }
        state.unsent.push_back(command);
    }

    fn flush(&mut self, state: &mut State) {
        while let Some(command) = state.unsent.pop_front() {
            if let Err(SendError::Busy(command)) = self.net.send(command) {
                state.unsent.push_front(command);
                return;
            }
        }
    }

    /// Says goodbye, finishes what is under way, and closes the store.
    async fn stop(mut self, mut state: State) {
        let mut out = Vec::new();
        self.handle(Event::Leave, &mut out);
        self.take_care(&mut state, out).await;
        let finish = async {
            while !state.queue.is_empty() {
                let Ok(effects) = front(&mut state.queue).await else { return };
                for effect in effects {
                    self.perform(&mut state, effect).await;
                }
            }
            self.flush(&mut state);
        };
        if tokio::time::timeout(Duration::from_secs(2), finish).await.is_err() {
            tracing::warn!("not everything could be said before stopping");
        }
        state.waiting.clear();
        self.net.close().await;
        self.store.close().await;
    }
}

/// The core is told of every question that will not be asked.
fn not_sent(state: &mut State, command: NetCommand, why: &str) {
    if let NetCommand::Ask { token, .. } = command {
        state.lost.push_back((Token(token), why.into()));
    }
}

/// Waits until what stands first in the queue may leave. Cancel-safe: the entry stays until then.
async fn front(queue: &mut VecDeque<Behind>) -> Result<Vec<Effect>, ()> {
    let Some(first) = queue.front_mut() else { return std::future::pending().await };
    if let Some(pending) = &mut first.pending {
        pending.await.map_err(|_| ())?;
        first.pending = None;
    }
    Ok(queue.pop_front().map(|behind| behind.effects).unwrap_or_default())
}

/// Logs what an operator should know.
fn tell(notice: &Notice) {
    match notice {
        Notice::Twin { seen, mine } => tracing::error!(
            seen,
            mine,
            "another node runs with this key, or this data directory is an older copy: \
             nothing is granted any more; stop one of the two, or restore the newest copy"
        ),
        Notice::Equivocation(key) => {
            tracing::error!(node = %key, "a node signed two different records; the proof is kept");
        }
        Notice::TurnedAway(key, why) => tracing::warn!(peer = %key, why, "turned a peer away"),
        Notice::Objected(lease) => tracing::warn!(%lease, "a receipt is not agreed on"),
        Notice::Granted(lease) => tracing::info!(%lease, "granted"),
        Notice::Frozen(lease, why) => tracing::info!(%lease, ?why, "frozen"),
        Notice::Thawed(lease) => tracing::info!(%lease, "goes on"),
        Notice::Ended(lease, reason) => tracing::info!(%lease, ?reason, "ended"),
        Notice::Up(key) => tracing::info!(node = %key, "a node is up"),
        Notice::Down(key) => tracing::warn!(node = %key, "a node is down"),
    }
}
