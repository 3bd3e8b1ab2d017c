//! Which connections are let in, and on what terms their frames are read.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId, connection_limits,
    core::{Endpoint, transport::PortUse},
    request_response::{self, ProtocolSupport},
    swarm::{
        ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
        THandlerOutEvent, ToSwarm,
    },
};
use thiserror::Error;

use super::{
    address::{key_of, socket_of},
    codec::{FrameCodec, PROTOCOL, Seat},
    limits::Limits,
    terms::{Shared, Terms},
};

/// The behaviour of the swarm.
///
/// The order of the fields is meaning: each may refuse a connection, in this order, and
/// request-response takes a connection for established as soon as it was asked. So it comes last,
/// behind everything that can still say no.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    /// How many connections there may be.
    limits: connection_limits::Behaviour,
    /// Frames, one request and one response per stream.
    pub(super) frames: Frames,
}

impl Behaviour {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let limits = &shared.limits;
        let connections = connection_limits::ConnectionLimits::default()
            .with_max_pending_incoming(Some(limits.pending_incoming))
            .with_max_pending_outgoing(Some(limits.pending_outgoing))
            .with_max_established_per_peer(Some(limits.connections_per_peer))
            .with_max_established(Some(limits.connections));
        Self { limits: connection_limits::Behaviour::new(connections), frames: Frames::new(shared) }
    }
}

type RequestResponse = request_response::Behaviour<FrameCodec>;

/// request-response, with terms for each peer and a gate before it.
pub(super) struct Frames {
    inner: RequestResponse,
    seat: Seat,
    /// The terms of every linked peer.
    terms: HashMap<PeerId, Arc<Terms>>,
    /// Peers that came in and are not admitted yet.
    strangers: HashMap<PeerId, IpAddr>,
    shared: Arc<Shared>,
}

/// Why the gate turned a connection away.
#[derive(Debug, Error)]
enum TurnedAway {
    #[error("its key is not an Ed25519 key")]
    KeyType,
    #[error("its address has no IP")]
    Address,
    #[error("{0} unadmitted peers are linked already")]
    Strangers(usize),
    #[error("{0} unadmitted peers from this address are linked already")]
    StrangersPerIp(usize),
}

impl Frames {
    fn new(shared: Arc<Shared>) -> Self {
        let seat = Seat::new(Mutex::new(None));
        let config = request_response::Config::default()
            .with_request_timeout(shared.limits.request_timeout)
            .with_max_concurrent_streams(shared.limits.streams);
        let inner = RequestResponse::with_codec(
            FrameCodec::Template(Arc::clone(&seat)),
            [(PROTOCOL, ProtocolSupport::Full)],
            config,
        );
        Self { inner, seat, terms: HashMap::new(), strangers: HashMap::new(), shared }
    }

    pub(super) fn inner(&mut self) -> &mut RequestResponse {
        &mut self.inner
    }

    /// Lifts the limits of an unadmitted peer, for as long as it stays linked.
    pub(super) fn admit(&mut self, peer: &PeerId) {
        self.strangers.remove(peer);
        if let Some(terms) = self.terms.get(peer) {
            terms.admit();
        }
    }

    /// Whether a peer that came in from `remote` may stay, as a stranger.
    fn gate(&self, peer: &PeerId, remote: &Multiaddr) -> Result<Option<IpAddr>, TurnedAway> {
        if self.terms.contains_key(peer) {
            return Ok(None);
        }
        let Limits { unadmitted_links, unadmitted_links_per_ip, .. } = self.shared.limits;
        let ip = socket_of(remote).ok_or(TurnedAway::Address)?.ip();
        if self.strangers.len() >= unadmitted_links {
            return Err(TurnedAway::Strangers(unadmitted_links));
        }
        let same = self.strangers.values().filter(|other| **other == ip).count();
        if same >= unadmitted_links_per_ip && !ip.is_loopback() {
            return Err(TurnedAway::StrangersPerIp(unadmitted_links_per_ip));
        }
        Ok(Some(ip))
    }

    /// Makes a handler whose codec reads on the terms of `peer`.
    fn on_terms(
        &mut self,
        peer: PeerId,
        handler: impl FnOnce(
            &mut RequestResponse,
        ) -> Result<THandler<RequestResponse>, ConnectionDenied>,
    ) -> Result<THandler<RequestResponse>, ConnectionDenied> {
        let shared = &self.shared;
        let terms = self.terms.entry(peer).or_insert_with(|| Terms::new(peer, Arc::clone(shared)));
        let seat = |terms| *self.seat.lock().unwrap_or_else(PoisonError::into_inner) = terms;
        seat(Some(Arc::clone(terms)));
        let made = handler(&mut self.inner);
        seat(None);
        made
    }
}

impl NetworkBehaviour for Frames {
    type ConnectionHandler = THandler<RequestResponse>;
    type ToSwarm = <RequestResponse as NetworkBehaviour>::ToSwarm;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        key_of(&peer).ok_or_else(|| ConnectionDenied::new(TurnedAway::KeyType))?;
        let stranger = self.gate(&peer, remote).map_err(ConnectionDenied::new)?;
        let handler = self.on_terms(peer, |inner| {
            inner.handle_established_inbound_connection(connection, peer, local, remote)
        })?;
        if let Some(ip) = stranger {
            self.strangers.insert(peer, ip);
        }
        Ok(handler)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.inner.handle_pending_outbound_connection(connection, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        key_of(&peer).ok_or_else(|| ConnectionDenied::new(TurnedAway::KeyType))?;
        self.on_terms(peer, |inner| {
            inner.handle_established_outbound_connection(connection, peer, address, role, port_use)
        })
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        if let FromSwarm::ConnectionClosed(closed) = &event
            && closed.remaining_established == 0
        {
            self.terms.remove(&closed.peer_id);
            self.strangers.remove(&closed.peer_id);
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.inner.on_connection_handler_event(peer, connection, event);
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner.poll(context)
    }
}
