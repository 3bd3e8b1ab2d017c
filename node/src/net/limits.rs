//! What a peer may make this node do: every bound of the links, in one place.
//!
//! A peer is *unadmitted* from the moment its connection is up until the loop says
//! [`NetCommand::Admit`](super::NetCommand::Admit). The worst that strangers can make this node
//! hold is `unadmitted_links * connection_window` of unread QUIC data plus
//! `unadmitted_links * unadmitted_requests * frame_unadmitted` of frames.

use std::time::Duration;

/// The bounds of the links. `Limits::default()` is what a node runs with.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The largest frame taken from an admitted peer, and the largest one sent, in bytes
    /// (256 KiB). A peer that announces a longer one has broken the rules and is disconnected.
    pub frame_admitted: usize,
    /// The largest frame read from an unadmitted peer, in bytes (16 KiB). A longer one stays
    /// unread, with nothing allocated for it, until the peer is admitted.
    pub frame_unadmitted: usize,
    /// Requests read from an unadmitted peer (4). Further ones stay unread until it is admitted.
    pub unadmitted_requests: usize,
    /// How long a link may last without admission (5 s); then it is closed.
    pub unadmitted_time: Duration,
    /// Unadmitted peers that came in, at the same time (64). Further ones are turned away.
    pub unadmitted_links: usize,
    /// The same from one IP address (8). Loopback is exempt: who is on this host already can
    /// cost it more in other ways, and a fleet on one host shares one address.
    pub unadmitted_links_per_ip: usize,
    /// Incoming handshakes at the same time (16). Each further one costs a packet's handling and
    /// is dropped; libp2p's QUIC cannot ask for proof of address (Retry) first.
    pub pending_incoming: u32,
    /// Outgoing handshakes at the same time (64).
    pub pending_outgoing: u32,
    /// Connections per peer (2: one from each end when both dial at once).
    pub connections_per_peer: u32,
    /// Connections in total (1,024).
    pub connections: u32,
    /// Requests that are being written, read or answered on one connection, both directions
    /// together (256).
    pub streams: usize,
    /// Streams that a peer may hold open towards this node on one connection (64).
    pub streams_incoming: u32,
    /// How long a request may take until its answer is there, dialing included (10 s), and how
    /// long a ticket stays good for a reply.
    pub request_timeout: Duration,
    /// Requests of this node that wait for an answer (4,096). A further one is not sent.
    pub asks: usize,
    /// Requests of peers that wait for this node's reply (4,096). A further one is dropped.
    pub tickets: usize,
    /// Bytes of frames of one peer that are read but not yet handed to the loop (8 MiB).
    pub held_per_peer: usize,
    /// The same for all peers together (64 MiB).
    pub held: usize,
    /// Peers whose addresses are remembered (8,192). Beyond that the one fed longest ago goes.
    pub book_peers: usize,
    /// Addresses remembered for each (8), the newest first.
    pub book_addresses: usize,
    /// A silent connection is dead after this long (3 s).
    pub idle_timeout: Duration,
    /// QUIC keep-alive interval (1 s). It must be below both ends' idle timeout.
    pub keep_alive: Duration,
    /// A handshake may take this long (5 s; QUIC bounds it by `idle_timeout` too).
    pub handshake_timeout: Duration,
    /// Unread bytes that a peer may have in flight on one stream (1 MiB).
    pub stream_window: u32,
    /// Unread bytes that a peer may have in flight on one connection (4 MiB).
    pub connection_window: u32,
    /// Commands that wait for the net (1,024); beyond that `Net::send` says busy.
    pub commands: usize,
    /// Events that wait for the loop (1,024); beyond that the net stops reading from peers.
    pub events: usize,
}

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame_admitted: 256 * KIB,
            frame_unadmitted: 16 * KIB,
            unadmitted_requests: 4,
            unadmitted_time: Duration::from_secs(5),
            unadmitted_links: 64,
            unadmitted_links_per_ip: 8,
            pending_incoming: 16,
            pending_outgoing: 64,
            connections_per_peer: 2,
            connections: 1024,
            streams: 256,
            streams_incoming: 64,
            request_timeout: Duration::from_secs(10),
            asks: 4096,
            tickets: 4096,
            held_per_peer: 8 * MIB,
            held: 64 * MIB,
            book_peers: 8192,
            book_addresses: 8,
            idle_timeout: Duration::from_secs(3),
            keep_alive: Duration::from_secs(1),
            handshake_timeout: Duration::from_secs(5),
            stream_window: MIB as u32,
            connection_window: 4 * MIB as u32,
            commands: 1024,
            events: 1024,
        }
    }
}
