//! The small UDP socket for liveness packets, apart from the links and the data plane, so that a
//! probe never waits behind bulk data.
//!
//! ```text
//!   socket --too large--> counted    --source over its rate--> counted
//!          `-------------> [bounded channel to the loop] --full--> counted
//! ```
//! Packets are opaque here: the loop signs and verifies them. What is dropped here costs no
//! signature check, which is what a flood aims at. A source's rate bounds one sender, not one
//! attacker: UDP sources can be forged, so the bounded channel is the last word on what the loop
//! is made to look at. A lost probe is nothing new to the loop: SWIM is made for it.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, UdpSocket as StdSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use thiserror::Error;
use tokio::{net::UdpSocket, sync::mpsc, task::AbortHandle};

/// The largest packet, in bytes: fits an Ethernet frame with IPv6 and UDP headers, so that
/// losing one fragment never loses a probe.
pub const MAX_PACKET: usize = leasehold_proto::words::wire::MAX_PACKET;

/// What a probe socket lets through. `ProbeLimits::default()` is what a node runs with.
#[derive(Debug, Clone, Copy)]
pub struct ProbeLimits {
    /// Packets per second from one source address, over time (200).
    pub rate: u32,
    /// Packets from one source address at once (200).
    pub burst: u32,
    /// Source addresses whose rates are kept apart (4,096). When all places are taken by sources
    /// that were heard lately, further ones share one rate.
    pub sources: usize,
    /// Packets that wait for the loop (1,024).
    pub queue: usize,
}

impl Default for ProbeLimits {
    fn default() -> Self {
        Self { rate: 200, burst: 200, sources: 4096, queue: 1024 }
    }
}

/// Why a packet was not sent.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The packet is above [`MAX_PACKET`].
    #[error("a liveness packet of {0} bytes; {MAX_PACKET} is the most")]
    TooLarge(usize),
    /// The system did not take it. A full socket buffer is no error: the packet is dropped and
    /// counted, as the network would.
    #[error("cannot send a liveness packet to {to}: {source}")]
    Send {
        /// Whom it was for.
        to: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
}

/// Why the socket was not bound.
#[derive(Debug, Error)]
pub enum ProbeBindError {
    /// The port is taken.
    #[error(
        "UDP port {} of {} is in use: stop what runs there (another node?) or probe elsewhere",
        address.port(), address.ip()
    )]
    PortInUse {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// The address cannot be bound.
    #[error("cannot bind the liveness socket to {address}: {source}")]
    Bind {
        /// What was to be bound.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
}

/// The running counters; they only rise.
#[derive(Debug, Default)]
pub struct ProbeStats {
    received: AtomicU64,
    sent: AtomicU64,
    too_large: AtomicU64,
    over_rate: AtomicU64,
    loop_behind: AtomicU64,
    send_dropped: AtomicU64,
    errors: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProbeCounts {
    /// Packets handed to the loop.
    pub received: u64,
    /// Packets given to the system.
    pub sent: u64,
    /// Packets dropped because they were above [`MAX_PACKET`].
    pub too_large: u64,
    /// Packets dropped because their source sent too many.
    pub over_rate: u64,
    /// Packets dropped because the loop was behind.
    pub loop_behind: u64,
    /// Own packets dropped because the socket's buffer was full.
    pub send_dropped: u64,
    /// Errors of the socket while receiving.
    pub errors: u64,
}

impl ProbeStats {
    /// Reads all counters, each on its own: they may be a few packets apart.
    pub fn snapshot(&self) -> ProbeCounts {
        ProbeCounts {
            received: self.received.load(Relaxed),
            sent: self.sent.load(Relaxed),
            too_large: self.too_large.load(Relaxed),
            over_rate: self.over_rate.load(Relaxed),
            loop_behind: self.loop_behind.load(Relaxed),
            send_dropped: self.send_dropped.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }
}

/// A packet and the address it came from, which is not proof of anything.
pub type Packet = (SocketAddr, Vec<u8>);

/// The socket. Dropping it ends its receiving task and, with that, the channel of packets.
#[derive(Debug)]
pub struct Probe {
    /// The same socket as the receiving task's, for sends that never wait.
    socket: StdSocket,
    stats: Arc<ProbeStats>,
    receiving: AbortHandle,
}

impl Probe {
    /// Binds a socket and starts to receive, in a task of the ambient tokio runtime. Also returns
    /// the packets and the address that was really bound.
    ///
    /// # Errors
    /// The address cannot be bound.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(
        address: SocketAddr,
        limits: ProbeLimits,
    ) -> Result<(Self, mpsc::Receiver<Packet>, SocketAddr), ProbeBindError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ProbeBindError::PortInUse { address },
            _ => ProbeBindError::Bind { address, source },
        };
        let socket = StdSocket::bind(address).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let bound = socket.local_addr().map_err(failed)?;
        let receiver = socket.try_clone().and_then(UdpSocket::from_std).map_err(failed)?;
        let stats = Arc::new(ProbeStats::default());
        let (packets, received) = mpsc::channel(limits.queue.max(1));
        let task = tokio::spawn(receive(receiver, packets, limits, Arc::clone(&stats)));
        Ok((Self { socket, stats, receiving: task.abort_handle() }, received, bound))
    }

    /// Sends one packet, without waiting.
    ///
    /// # Errors
    /// The packet is too large, or the system refuses it ([`ProbeError`]).
    pub fn send(&self, to: SocketAddr, packet: &[u8]) -> Result<(), ProbeError> {
        if packet.len() > MAX_PACKET {
            return Err(ProbeError::TooLarge(packet.len()));
        }
        match self.socket.send_to(packet, to) {
            Ok(_) => {
                count(&self.stats.sent);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                count(&self.stats.send_dropped);
                Ok(())
            }
            Err(source) => Err(ProbeError::Send { to, source }),
        }
    }

    /// The running counters.
    pub fn stats(&self) -> &Arc<ProbeStats> {
        &self.stats
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.receiving.abort();
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// How long the receiving task rests after an error of the socket, so that one that stays does
/// not make it spin.
const ERROR_REST: Duration = Duration::from_millis(10);

async fn receive(
    socket: UdpSocket,
    packets: mpsc::Sender<Packet>,
    limits: ProbeLimits,
    stats: Arc<ProbeStats>,
) {
    let mut rates = Rates::new(limits);
    // One byte more than allowed: a packet that fills it was too large.
    let mut buffer = [0; MAX_PACKET + 1];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                count(&stats.errors);
                tracing::debug!(%error, "the liveness socket's error");
                tokio::time::sleep(ERROR_REST).await;
                continue;
            }
        };
        if !rates.take(from, Instant::now()) {
            count(&stats.over_rate);
            continue;
        }
        let Some(packet) = buffer.get(..length).filter(|packet| packet.len() <= MAX_PACKET) else {
            count(&stats.too_large);
            continue;
        };
        match packets.try_reserve() {
            Ok(permit) => {
                permit.send((from, packet.to_vec()));
                count(&stats.received);
            }
            Err(mpsc::error::TrySendError::Full(())) => count(&stats.loop_behind),
            Err(mpsc::error::TrySendError::Closed(())) => return,
        }
    }
}

/// A token bucket for each source address, in a bounded table.
struct Rates {
    limits: ProbeLimits,
    sources: HashMap<SocketAddr, Bucket>,
    /// What the sources without a place share.
    others: Option<Bucket>,
    swept: Option<Instant>,
}

/// How often a full table may be searched for sources that fell silent.
const SWEEP: Duration = Duration::from_secs(1);

impl Rates {
    fn new(limits: ProbeLimits) -> Self {
        Self { limits, sources: HashMap::new(), others: None, swept: None }
    }

    /// Whether a packet from `from` passes.
    fn take(&mut self, from: SocketAddr, now: Instant) -> bool {
        let limits = self.limits;
        if let Some(bucket) = self.sources.get_mut(&from) {
            return bucket.take(&limits, now);
        }
        let full = self.sources.len() >= limits.sources;
        if full && self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
            // A bucket that is full again tells nothing that a new one would not.
            self.sources.retain(|_, bucket| bucket.refill(&limits, now) < bucket.most(&limits));
            self.swept = Some(now);
        }
        if self.sources.len() < limits.sources {
            self.sources.entry(from).or_insert(Bucket::new(&limits, now)).take(&limits, now)
        } else {
            self.others.get_or_insert(Bucket::new(&limits, now)).take(&limits, now)
        }
    }
}

/// A token bucket in thousandths of a packet.
struct Bucket {
    tokens: u64,
    filled: Instant,
}

const PACKET: u64 = 1000;

impl Bucket {
    fn new(limits: &ProbeLimits, now: Instant) -> Self {
        Self { tokens: u64::from(limits.burst) * PACKET, filled: now }
    }

    fn most(&self, limits: &ProbeLimits) -> u64 {
        u64::from(limits.burst) * PACKET
    }

    /// Adds what has flowed in and returns what is there.
    fn refill(&mut self, limits: &ProbeLimits, now: Instant) -> u64 {
        let millis = now.saturating_duration_since(self.filled).as_millis() as u64;
        if millis > 0 {
            // `rate` packets a second are `rate` thousandths of a packet a millisecond.
            let inflow = millis.saturating_mul(u64::from(limits.rate));
            self.tokens = self.tokens.saturating_add(inflow).min(self.most(limits));
            self.filled += Duration::from_millis(millis);
        }
        self.tokens
    }

    fn take(&mut self, limits: &ProbeLimits, now: Instant) -> bool {
        if self.refill(limits, now) < PACKET {
            return false;
        }
        self.tokens -= PACKET;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn local() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
    }

    async fn next(packets: &mut mpsc::Receiver<Packet>) -> Packet {
        timeout(LONG, packets.recv()).await.expect("a packet in time").expect("an open channel")
    }

    /// Polls until the counters are as wanted.
    async fn until(probe: &Probe, wanted: impl Fn(ProbeCounts) -> bool) -> ProbeCounts {
        let deadline = Instant::now() + LONG;
        loop {
            let counts = probe.stats().snapshot();
            if wanted(counts) {
                return counts;
            }
            assert!(Instant::now() < deadline, "still {counts:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn packets_go_both_ways() {
        let (a, mut at_a, a_address) = Probe::bind(local(), ProbeLimits::default()).unwrap();
        let (b, mut at_b, b_address) = Probe::bind(local(), ProbeLimits::default()).unwrap();
        a.send(b_address, b"are you there").unwrap();
        assert_eq!(next(&mut at_b).await, (a_address, b"are you there".to_vec()));
        b.send(a_address, &[7; MAX_PACKET]).unwrap();
        assert_eq!(next(&mut at_a).await, (b_address, vec![7; MAX_PACKET]));
        b.send(a_address, b"").unwrap();
        assert_eq!(next(&mut at_a).await, (b_address, Vec::new()));
        assert_eq!(b.stats().snapshot().sent, 2);
    }

    #[tokio::test]
    async fn a_packet_too_large_is_neither_sent_nor_taken() {
        let (probe, mut packets, address) = Probe::bind(local(), ProbeLimits::default()).unwrap();
        let big = [1; MAX_PACKET + 1];
        assert!(matches!(
            probe.send(address, &big),
            Err(ProbeError::TooLarge(length)) if length == MAX_PACKET + 1
        ));
        let stranger = StdSocket::bind(local()).unwrap();
        stranger.send_to(&big, address).unwrap();
        stranger.send_to(&[1; 9000], address).unwrap();
        stranger.send_to(b"small", address).unwrap();
        assert_eq!(next(&mut packets).await.1, b"small");
        assert_eq!(probe.stats().snapshot().too_large, 2);
    }

    #[tokio::test]
    async fn a_flood_is_dropped_and_others_are_heard() {
        // A rate of 0 makes the bucket's size exact.
        let limits = ProbeLimits { rate: 0, burst: 10, ..ProbeLimits::default() };
        let (probe, mut packets, address) = Probe::bind(local(), limits).unwrap();
        let flood = StdSocket::bind(local()).unwrap();
        for _ in 0..50 {
            flood.send_to(b"flood", address).unwrap();
        }
        let honest = StdSocket::bind(local()).unwrap();
        honest.send_to(b"honest", address).unwrap();
        let counts = until(&probe, |counts| counts.received == 11).await;
        assert_eq!(counts.over_rate, 40);
        for _ in 0..10 {
            assert_eq!(next(&mut packets).await.1, b"flood");
        }
        assert_eq!(next(&mut packets).await, (honest.local_addr().unwrap(), b"honest".to_vec()));
    }

    #[tokio::test]
    async fn a_loop_that_is_behind_loses_packets_not_memory() {
        let limits = ProbeLimits { queue: 3, ..ProbeLimits::default() };
        let (probe, mut packets, address) = Probe::bind(local(), limits).unwrap();
        for n in 0..20 {
            probe.send(address, &[n]).unwrap();
        }
        let counts = until(&probe, |counts| counts.received + counts.loop_behind == 20).await;
        assert_eq!(counts.received, 3);
        for n in 0..3 {
            assert_eq!(next(&mut packets).await.1, [n]);
        }
        probe.send(address, b"again").unwrap();
        assert_eq!(next(&mut packets).await.1, b"again");
    }

    #[tokio::test]
    async fn a_taken_port_is_named_and_a_dropped_probe_frees_it() {
        let (probe, mut packets, address) = Probe::bind(local(), ProbeLimits::default()).unwrap();
        let error = Probe::bind(address, ProbeLimits::default()).unwrap_err();
        assert!(matches!(error, ProbeBindError::PortInUse { address: named } if named == address));
        assert!(error.to_string().contains(&address.port().to_string()), "{error}");
        drop(probe);
        assert_eq!(timeout(LONG, packets.recv()).await.unwrap(), None);
        let deadline = Instant::now() + LONG;
        while Probe::bind(address, ProbeLimits::default()).is_err() {
            assert!(Instant::now() < deadline, "the port stays taken");
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn rates_refill_and_the_table_is_bounded() {
        let limits = ProbeLimits { rate: 100, burst: 2, sources: 2, queue: 1 };
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut rates = Rates::new(limits);
        let mut takes = |port, millis| rates.take(at(port), after(millis));
        // Two at once, then one each 10 ms.
        assert_eq!([takes(1, 0), takes(1, 0), takes(1, 0)], [true, true, false]);
        assert_eq!([takes(1, 9), takes(1, 10), takes(1, 10)], [false, true, false]);
        assert!(takes(2, 10));
        // The table is full of sources heard lately: the others share one bucket.
        assert_eq!([takes(3, 10), takes(4, 10), takes(5, 10)], [true, true, false]);
        // After a silence the two places are free again.
        assert_eq!([takes(6, 2000), takes(7, 2000), takes(6, 2000)], [true, true, true]);
        assert_eq!(rates.sources.len(), 2);
        // A clock that stands still or goes back fills nothing and panics nowhere.
        assert!(!rates.take(at(6), after(1999)));
    }
}
