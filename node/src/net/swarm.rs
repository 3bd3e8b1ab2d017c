//! The task that owns the swarm: commands in, events out, and the tables between them.
//!
//! ```text
//!   a dial     started --connected--> (Linked)      --failed--> next address or DialFailed
//!   an ask     open --response--> Answered          --failure, deadline--> Unanswered
//!   a ticket   open --Reply--> written              --deadline--> dropped, counted
//!   a link     unadmitted --Admit--> admitted --last connection gone--> Unlinked
//!                   `--deadline--> leaving(NotAdmitted) --last connection gone--> Unlinked
//! ```
//! All deadlines of a kind have the same length, so each kind keeps them in a queue; entries whose
//! subject is settled are dropped when they come to the front.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::SocketAddr,
    num::NonZeroUsize,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use futures::StreamExt;
use libp2p::{
    PeerId, Swarm, Transport, TransportError,
    core::{ConnectedPoint, muxing::StreamMuxerBox, upgrade},
    identity::Keypair,
    quic,
    request_response::{self, OutboundFailure, OutboundRequestId, ResponseChannel},
    swarm::{
        self, ConnectionError, ConnectionId, DialError, ListenError, SwarmEvent,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, trace};

use super::{
    AskFailure, DialFailure, Limits, Net, NetCommand, NetConfig, NetError, NetEvent, NetStats,
    UnlinkReason, Violation,
    address::{AddressBook, key_of, multiaddr_of, peer_of, socket_of},
    behaviour::{Behaviour, BehaviourEvent},
    codec::Frame,
    stats::count,
    terms::Shared,
};

/// How often deadlines are looked at: the grain of all timeouts here.
const TICK: Duration = Duration::from_millis(200);

/// How long closing waits for the connections, and then for QUIC's tasks to send what they have:
/// libp2p does not pass on quinn's `wait_idle`.
const CLOSE: Duration = Duration::from_millis(700);
const LINGER: Duration = Duration::from_millis(100);

/// Events that may wait for room in the channel before commands wait too.
const OUTBOX: usize = 1024;

/// Events and commands buffered between the swarm and each connection's task.
const CONNECTION_BUFFER: usize = 64;

/// Longer than any link lives: whether one is wanted is the loop's to say.
const NEVER_IDLE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

type FrameEvent = request_response::Event<Frame, Frame>;
type Broken = (PeerId, Violation);

pub(super) async fn start(
    config: NetConfig,
) -> Result<(Net, mpsc::Receiver<NetEvent>, Vec<SocketAddr>), NetError> {
    let NetConfig { seed, listen, limits } = config;
    let pair = Keypair::ed25519_from_bytes(seed).expect("any 32 bytes are an Ed25519 seed");
    let me = pair.public().to_peer_id();
    let key = key_of(&me).expect("the key pair is Ed25519");

    let stats = Arc::new(NetStats::default());
    let (commands, commanded) = mpsc::channel(limits.commands.max(1));
    let (events, told) = mpsc::channel(limits.events.max(1));
    let (shared, broken) = Shared::new(limits, Arc::clone(&stats));
    let closing = CancellationToken::new();
    let closed = CancellationToken::new();

    let mut edge = Edge {
        book: AddressBook::new(shared.limits.book_peers, shared.limits.book_addresses),
        swarm: swarm(&pair, Arc::clone(&shared)),
        me,
        shared,
        commands: commanded,
        events,
        broken,
        closing: closing.clone(),
        outbox: VecDeque::new(),
        links: HashMap::new(),
        unadmitted: VecDeque::new(),
        dials: HashMap::new(),
        asks: HashMap::new(),
        ask_deadlines: VecDeque::new(),
        tickets: HashMap::new(),
        ticket_deadlines: VecDeque::new(),
        next_ticket: 1,
    };
    let bound = edge.listen(&listen).await?;

    let ended = closed.clone().drop_guard();
    tokio::spawn(async move {
        edge.run().await;
        drop(ended);
    });
    Ok((Net { commands, closing, closed, stats, key }, told, bound))
}

fn swarm(pair: &Keypair, shared: Arc<Shared>) -> Swarm<Behaviour> {
    let limits = &shared.limits;
    let mut quic = quic::Config::new(pair);
    quic.handshake_timeout = limits.handshake_timeout;
    quic.max_idle_timeout = u32::try_from(limits.idle_timeout.as_millis()).unwrap_or(u32::MAX);
    quic.keep_alive_interval = limits.keep_alive;
    quic.max_concurrent_stream_limit = limits.streams_incoming;
    quic.max_stream_data = limits.stream_window;
    quic.max_connection_data = limits.connection_window;
    let transport = quic::tokio::Transport::new(quic)
        .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
        .boxed();
    let buffer = NonZeroUsize::new(CONNECTION_BUFFER).unwrap_or(NonZeroUsize::MIN);
    let config = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(NEVER_IDLE)
        // There is one protocol, so the request travels with the proposal of it: one round trip.
        .with_substream_upgrade_protocol_override(upgrade::Version::V1Lazy)
        .with_notify_handler_buffer_size(buffer)
        .with_per_connection_event_buffer_size(CONNECTION_BUFFER);
    Swarm::new(transport, Behaviour::new(shared), pair.public().to_peer_id(), config)
}

struct Edge {
    swarm: Swarm<Behaviour>,
    me: PeerId,
    shared: Arc<Shared>,
    book: AddressBook,
    commands: mpsc::Receiver<NetCommand>,
    events: mpsc::Sender<NetEvent>,
    broken: mpsc::Receiver<Broken>,
    closing: CancellationToken,
    /// Events that found the channel full. While there are any, the swarm is not polled.
    outbox: VecDeque<NetEvent>,

    links: HashMap<PeerId, Link>,
    /// When the link of which peer, up since when, must have been admitted.
    unadmitted: VecDeque<(Instant, PeerId, Instant)>,
    dials: HashMap<ConnectionId, Attempt>,
    asks: HashMap<OutboundRequestId, Asking>,
    ask_deadlines: VecDeque<(Instant, OutboundRequestId)>,
    tickets: HashMap<u64, ResponseChannel<Frame>>,
    ticket_deadlines: VecDeque<(Instant, u64)>,
    next_ticket: u64,
}

/// A peer with at least one connection.
struct Link {
    since: Instant,
    admitted: bool,
    /// Its connections, the newest last.
    connections: Vec<ConnectionId>,
    /// Why its connections are being closed, if they are.
    leaving: Option<UnlinkReason>,
}

/// A dial that the loop asked for.
struct Attempt {
    peer: Option<PeerId>,
    addresses: Vec<SocketAddr>,
    /// For an unknown peer: the addresses not tried yet.
    left: VecDeque<SocketAddr>,
}

/// A request that waits for its answer.
struct Asking {
    peer: PeerId,
    token: u64,
}

impl Edge {
    /// Binds each address and waits until it is told which one it really is.
    async fn listen(&mut self, addresses: &[SocketAddr]) -> Result<Vec<SocketAddr>, NetError> {
        let mut bound = Vec::with_capacity(addresses.len());
        for address in addresses.iter().copied() {
            let listener = self.swarm.listen_on(multiaddr_of(&address)).map_err(|error| {
                let source = io_error(error);
                match source.kind() {
                    io::ErrorKind::AddrInUse => NetError::PortInUse { address },
                    _ => NetError::Listen { address, source },
                }
            })?;
            let named = loop {
                match self.swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr { listener_id, address: named }
                        if listener_id == listener =>
                    {
                        break socket_of(&named);
                    }
                    SwarmEvent::ListenerClosed { listener_id, reason, .. }
                        if listener_id == listener =>
                    {
                        let source = reason.err().unwrap_or_else(|| io::Error::other("closed"));
                        return Err(NetError::Listen { address, source });
                    }
                    other => self.on_swarm(other),
                }
            };
            // A wildcard is told as one of the host's addresses; what was bound is the wildcard.
            let port = named.map_or(address.port(), |named| named.port());
            bound.push(SocketAddr::new(address.ip(), port));
        }
        Ok(bound)
    }

    async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.flush();
            let room = self.outbox.is_empty();
            tokio::select! {
                () = self.closing.cancelled() => break,
                open = has_room(&self.events), if !room => {
                    if !open {
                        break; // the loop is gone
                    }
                }
                command = self.commands.recv(), if self.outbox.len() < OUTBOX => match command {
                    Some(command) => self.on_command(command),
                    None => break, // the last handle is gone
                },
                Some((peer, violation)) = self.broken.recv() => {
                    self.leave(&peer, UnlinkReason::BrokeRules(violation));
                }
                event = self.swarm.select_next_some(), if room => self.on_swarm(event),
                _ = tick.tick() => self.expire(Instant::now()),
            }
        }
        self.close().await;
    }

    /// Ends all links in such a way that the peers learn of it at once.
    async fn close(&mut self) {
        self.closing.cancel(); // whatever it was that ended the loop: no further links
        let peers: Vec<PeerId> = self.links.keys().copied().collect();
        for peer in &peers {
            self.leave(peer, UnlinkReason::Closing);
        }
        let _ = timeout(CLOSE, async {
            while !self.links.is_empty() {
                let event = self.swarm.select_next_some().await;
                self.on_swarm(event);
            }
        })
        .await;
        self.flush();
        if !peers.is_empty() {
            sleep(LINGER).await;
        }
    }

    // --- events to the loop ---

    fn tell(&mut self, event: NetEvent) {
        self.outbox.push_back(event);
    }

    /// Moves the outbox into the channel as far as there is room.
    fn flush(&mut self) {
        while !self.outbox.is_empty() {
            let Ok(permit) = self.events.try_reserve() else { return };
            if let Some(event) = self.outbox.pop_front() {
                permit.send(event);
            }
        }
    }

    // --- commands from the loop ---

    fn on_command(&mut self, command: NetCommand) {
        match command {
            NetCommand::Dial { peer, addresses } => {
                let peer = peer.as_ref().map(peer_of);
                let left = if peer.is_none() { addresses.clone().into() } else { VecDeque::new() };
                self.dial(Attempt { peer, addresses, left });
            }
            NetCommand::Ask { peer, token, frame } => self.ask(peer_of(&peer), token, frame),
            NetCommand::Reply { ticket, frame } => self.reply(ticket, frame),
            NetCommand::Disconnect { peer, why } => {
                self.leave(&peer_of(&peer), UnlinkReason::Disconnected(why));
            }
            NetCommand::CloseOlder { peer } => self.close_older(&peer_of(&peer)),
            NetCommand::Admit { peer } => self.admit(&peer_of(&peer)),
            NetCommand::AddAddresses { peer, addresses } => {
                self.book.add(peer_of(&peer), &addresses);
            }
        }
    }

    fn dial(&mut self, mut attempt: Attempt) {
        let mut failure = DialFailure::NoAddress;
        loop {
            let options = match attempt.peer {
                Some(peer) => {
                    self.book.add(peer, &attempt.addresses);
                    let known = self.book.of(&peer).iter().map(multiaddr_of).collect();
                    DialOpts::peer_id(peer)
                        .condition(PeerCondition::Disconnected)
                        .addresses(known)
                        .build()
                }
                None => match attempt.left.pop_front() {
                    Some(next) => DialOpts::unknown_peer_id().address(multiaddr_of(&next)).build(),
                    None => return self.dial_failed(attempt, failure),
                },
            };
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => {
                    self.dials.insert(connection, attempt);
                    return;
                }
                Err(DialError::DialPeerConditionFalse(_)) => return, // linked already
                // The swarm leaves out the addresses that this node listens on.
                Err(DialError::NoAddresses) if !attempt.addresses.is_empty() => {
                    failure = DialFailure::Myself;
                }
                Err(error) => failure = dial_failure(&error),
            }
            if attempt.peer.is_some() {
                return self.dial_failed(attempt, failure);
            }
        }
    }

    fn dial_failed(&mut self, attempt: Attempt, why: DialFailure) {
        let Attempt { peer, addresses, .. } = attempt;
        self.tell(NetEvent::DialFailed { peer: peer.as_ref().and_then(key_of), addresses, why });
    }

    fn ask(&mut self, peer: PeerId, token: u64, frame: Vec<u8>) {
        let Limits { frame_admitted: bound, asks, request_timeout, .. } = self.shared.limits;
        if peer == self.me {
            return self.unanswered(&peer, token, AskFailure::Myself);
        }
        if frame.len() > bound {
            let why = AskFailure::TooLarge { length: frame.len(), bound };
            return self.unanswered(&peer, token, why);
        }
        if self.asks.len() >= asks {
            count(&self.shared.stats.busy);
            return self.unanswered(&peer, token, AskFailure::Busy);
        }
        let addresses = if self.links.contains_key(&peer) {
            Vec::new()
        } else {
            self.book.of(&peer).iter().map(multiaddr_of).collect()
        };
        let frames = self.swarm.behaviour_mut().frames.inner();
        let id = frames.send_request_with_addresses(&peer, Frame::outgoing(frame), addresses);
        self.asks.insert(id, Asking { peer, token });
        self.ask_deadlines.push_back((Instant::now() + request_timeout, id));
        while self.ask_deadlines.front().is_some_and(|(_, id)| !self.asks.contains_key(id)) {
            self.ask_deadlines.pop_front();
        }
    }

    fn unanswered(&mut self, peer: &PeerId, token: u64, why: AskFailure) {
        if let Some(peer) = key_of(peer) {
            self.tell(NetEvent::Unanswered { peer, token, why });
        }
    }

    fn reply(&mut self, ticket: u64, frame: Vec<u8>) {
        let Some(channel) = self.tickets.remove(&ticket) else {
            return count(&self.shared.stats.late_replies);
        };
        let (length, bound) = (frame.len(), self.shared.limits.frame_admitted);
        if length > bound {
            debug!(length, bound, "a reply above the bound is not sent");
            return; // dropping the channel ends the stream: the peer sees that no reply comes
        }
        let frames = self.swarm.behaviour_mut().frames.inner();
        if frames.send_response(channel, Frame::outgoing(frame)).is_err() {
            count(&self.shared.stats.late_replies);
        }
    }

    fn admit(&mut self, peer: &PeerId) {
        if let Some(link) = self.links.get_mut(peer) {
            link.admitted = true;
            self.swarm.behaviour_mut().frames.admit(peer);
        }
    }

    /// Closes the connections of a peer but for the newest.
    fn close_older(&mut self, peer: &PeerId) {
        let Some(link) = self.links.get(peer) else { return };
        let Some((_newest, older)) = link.connections.split_last() else { return };
        for connection in older {
            self.swarm.close_connection(*connection);
        }
    }

    /// Closes all connections of a peer; `Unlinked` follows with the last.
    fn leave(&mut self, peer: &PeerId, why: UnlinkReason) {
        if let Some(link) = self.links.get_mut(peer) {
            link.leaving.get_or_insert(why);
            let _ = self.swarm.disconnect_peer_id(*peer); // an error says that it is gone already
        }
    }

    // --- deadlines ---

    fn expire(&mut self, now: Instant) {
        while let Some((_, peer, since)) = due(&mut self.unadmitted, now, |entry| entry.0) {
            if self.links.get(&peer).is_some_and(|link| !link.admitted && link.since == since) {
                count(&self.shared.stats.not_admitted);
                self.leave(&peer, UnlinkReason::NotAdmitted);
            }
        }
        while let Some((_, id)) = due(&mut self.ask_deadlines, now, |entry| entry.0) {
            if let Some(Asking { peer, token }) = self.asks.remove(&id) {
                self.unanswered(&peer, token, AskFailure::TimedOut);
            }
        }
        while let Some((_, ticket)) = due(&mut self.ticket_deadlines, now, |entry| entry.0) {
            if self.tickets.remove(&ticket).is_some() {
                count(&self.shared.stats.expired);
            }
        }
    }

    // --- events from the swarm ---

    fn on_swarm(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Frames(event)) => self.on_frame(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.connected(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. } => {
                self.unlinked(&peer_id, cause);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, .. } => {
                if let Some(link) = self.links.get_mut(&peer_id) {
                    link.connections.retain(|known| *known != connection_id);
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                self.not_connected(connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                if let ListenError::Denied { cause } = &error {
                    count(&self.shared.stats.turned_away);
                    debug!(from = %send_back_addr, %cause, "turned a connection away");
                } else {
                    debug!(from = %send_back_addr, %error, "an incoming handshake failed");
                }
            }
            SwarmEvent::ListenerError { error, .. } => debug!(%error, "a listener's error"),
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::error!(?addresses, ?reason, "a listener closed; restart the node");
            }
            other => trace!(?other, "swarm"),
        }
    }

    fn connected(&mut self, peer: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        self.dials.remove(&connection);
        let address = socket_of(endpoint.get_remote_address());
        let (Some(key), Some(address)) = (key_of(&peer), address) else {
            // The gate lets neither in; close what it should have.
            self.swarm.close_connection(connection);
            return;
        };
        let outbound = endpoint.is_dialer();
        if outbound {
            self.book.add(peer, &[address]);
        }
        let leaving = match self.links.get(&peer) {
            Some(link) => link.leaving.is_some(),
            None => self.closing.is_cancelled(),
        };
        if leaving {
            self.swarm.close_connection(connection);
        }
        if leaving {
            return;
        }
        if let Some(link) = self.links.get_mut(&peer) {
            link.connections.push(connection);
            return;
        }
        let (since, connections) = (Instant::now(), vec![connection]);
        self.links.insert(peer, Link { since, admitted: false, connections, leaving: None });
        self.unadmitted.push_back((since + self.shared.limits.unadmitted_time, peer, since));
        self.shared.stats.links.fetch_add(1, Relaxed);
        self.tell(NetEvent::Linked { peer: key, address, outbound });
    }

    fn unlinked(&mut self, peer: &PeerId, cause: Option<ConnectionError>) {
        let (Some(link), Some(key)) = (self.links.remove(peer), key_of(peer)) else { return };
        self.shared.stats.links.fetch_sub(1, Relaxed);
        let why = link.leaving.unwrap_or_else(|| {
            UnlinkReason::Lost(cause.map_or_else(|| "closed".into(), |cause| cause.to_string()))
        });
        debug!(peer = %peer, %why, "unlinked");
        self.tell(NetEvent::Unlinked { peer: key, why });
    }

    fn not_connected(&mut self, connection: ConnectionId, error: &DialError) {
        // A dial made for an ask is not in the table; its asks fail by themselves.
        let Some(attempt) = self.dials.remove(&connection) else { return };
        if attempt.peer.is_some_and(|peer| self.links.contains_key(&peer)) {
            return; // the peer's own dial was faster, and `Linked` has been told
        }
        if attempt.left.is_empty() {
            self.dial_failed(attempt, dial_failure(error));
        } else {
            self.dial(attempt);
        }
    }

    fn on_frame(&mut self, event: FrameEvent) {
        match event {
            FrameEvent::Message { peer, message, .. } => match message {
                request_response::Message::Request { request, channel, .. } => {
                    self.asked(&peer, request, channel);
                }
                request_response::Message::Response { request_id, response } => {
                    let asking = self.asks.remove(&request_id);
                    if let (Some(Asking { token, .. }), Some(peer)) = (asking, key_of(&peer)) {
                        let frame = response.into_bytes();
                        self.tell(NetEvent::Answered { peer, token, frame });
                    }
                }
            },
            FrameEvent::OutboundFailure { request_id, error, .. } => {
                if let Some(Asking { peer, token }) = self.asks.remove(&request_id) {
                    self.unanswered(&peer, token, ask_failure(&error));
                }
            }
            FrameEvent::InboundFailure { peer, error, .. } => {
                debug!(%peer, %error, "a request was not answered");
            }
            FrameEvent::ResponseSent { .. } => {}
        }
    }

    fn asked(&mut self, peer: &PeerId, request: Frame, channel: ResponseChannel<Frame>) {
        let Limits { tickets, request_timeout, .. } = self.shared.limits;
        if self.tickets.len() >= tickets {
            return count(&self.shared.stats.busy);
        }
        let Some(peer) = key_of(peer) else { return };
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, channel);
        self.ticket_deadlines.push_back((Instant::now() + request_timeout, ticket));
        while self.ticket_deadlines.front().is_some_and(|(_, id)| !self.tickets.contains_key(id)) {
            self.ticket_deadlines.pop_front();
        }
        self.tell(NetEvent::Asked { peer, ticket, frame: request.into_bytes() });
    }
}

/// Waits for room in the channel; `false` when nobody reads it any more.
async fn has_room(events: &mpsc::Sender<NetEvent>) -> bool {
    events.reserve().await.is_ok()
}

/// Takes the front entry if its time has come.
fn due<T>(queue: &mut VecDeque<T>, now: Instant, at: impl Fn(&T) -> Instant) -> Option<T> {
    queue.pop_front_if(|entry| at(entry) <= now)
}

fn dial_failure(error: &DialError) -> DialFailure {
    match error {
        DialError::LocalPeerId { .. } => DialFailure::Myself,
        DialError::NoAddresses => DialFailure::NoAddress,
        DialError::WrongPeerId { obtained, address } => match socket_of(address) {
            Some(address) => DialFailure::WrongKey { found: key_of(obtained), address },
            None => DialFailure::Unreachable(error.to_string()),
        },
        DialError::Denied { cause } => DialFailure::TurnedAway(innermost(cause)),
        DialError::Transport(errors) => DialFailure::Unreachable(match errors.last() {
            Some((address, TransportError::Other(error))) => {
                format!("{address}: {}", innermost(error))
            }
            Some((_, error)) => error.to_string(),
            None => error.to_string(),
        }),
        DialError::Aborted | DialError::DialPeerConditionFalse(_) => {
            DialFailure::Unreachable(error.to_string())
        }
    }
}

fn ask_failure(error: &OutboundFailure) -> AskFailure {
    match error {
        OutboundFailure::DialFailure => AskFailure::Unreachable,
        OutboundFailure::Timeout => AskFailure::TimedOut,
        OutboundFailure::ConnectionClosed => AskFailure::LinkClosed,
        OutboundFailure::UnsupportedProtocols => AskFailure::Stream(error.to_string()),
        OutboundFailure::Io(error) => {
            let violation = error.get_ref().and_then(|inner| inner.downcast_ref::<Violation>());
            match (violation, error.kind()) {
                (Some(violation), _) => AskFailure::BrokeRules(*violation),
                (None, io::ErrorKind::UnexpectedEof) => AskFailure::NoReply,
                (None, io::ErrorKind::ResourceBusy) => AskFailure::Busy,
                (None, _) => AskFailure::Stream(innermost(error)),
            }
        }
    }
}

/// What the last error of a chain says: the outer ones of libp2p repeat it or say little.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// The system's error inside what libp2p's transports wrap around it.
fn io_error(error: TransportError<io::Error>) -> io::Error {
    let TransportError::Other(error) = error else {
        return io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
    };
    match error.get_ref().and_then(|inner| inner.downcast_ref::<quic::Error>()) {
        Some(quic::Error::Io(inner)) => io::Error::new(inner.kind(), inner.to_string()),
        _ => error,
    }
}
