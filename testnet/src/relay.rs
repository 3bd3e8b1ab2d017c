//! A relay between the UDP sockets of nodes on loopback, which can cut, delay, lose, double and
//! reorder what one node sends to another, each way by itself.
//!
//! ```text
//! node a                     relay                      node b
//! back(a) --to front(b)-->  front(b)
//!                           front(a) --from front(a)--> back(b)
//! ```
//!
//! A node listens on its *back* and advertises its *front*, one for each plane, so others know
//! nothing but fronts. Nodes send from the sockets that they listen on, so the source of a packet
//! says who sent it; it is passed on from that node's own front, which is where the answer then
//! goes. So no table of connections is needed, and both see the other where it says it is. What
//! comes from elsewhere is dropped.
//!
//! Memory is bounded: what cannot be passed on at once, or is one delayed packet too many, is
//! dropped, as a network would.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use leasehold_proto::base::dice::Dice;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// How many sockets a node has: for links, for liveness packets, for data.
pub const PLANES: usize = 3;
/// The longest packet on loopback, in bytes.
const MAX_PACKET: usize = 65_536;
/// The most packets that wait for their time.
const MAX_LATE: usize = 8_192;
/// How much one socket holds of what was not read yet, in bytes.
const BUFFER: usize = 4 << 20;

/// What happens to packets from one node to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Nothing gets through.
    pub cut: bool,
    /// How much later they arrive, at least and at most: packets overtake each other.
    pub delay: (Duration, Duration),
    /// How many of a thousand are lost.
    pub loss: u64,
    /// How many of a thousand arrive twice.
    pub twice: u64,
}

impl Way {
    fn and(self, other: Self) -> Self {
        Self {
            cut: self.cut || other.cut,
            delay: (self.delay.0 + other.delay.0, self.delay.1 + other.delay.1),
            loss: self.loss.max(other.loss),
            twice: self.twice.max(other.twice),
        }
    }
}

/// Where a node is: its sockets in the order of the planes.
pub type Places = [SocketAddr; PLANES];

/// What the relay did, in packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relayed {
    /// Passed on.
    pub passed: u64,
    /// Dropped because a way was cut or lost them.
    pub dropped: u64,
    /// Dropped for want of room.
    pub overflowed: u64,
    /// Dropped because nobody known sent them.
    pub strange: u64,
}

#[derive(Debug, Default)]
struct Counts {
    passed: AtomicU64,
    dropped: AtomicU64,
    overflowed: AtomicU64,
    strange: AtomicU64,
}

/// Disturbances, by whoever began them, and what they come to.
#[derive(Debug)]
struct Ways {
    begun: BTreeMap<u64, Vec<(usize, usize, Way)>>,
    /// By sender and receiver.
    now: Vec<Vec<Way>>,
    dice: Dice,
}

#[derive(Debug)]
struct Shared {
    backs: Vec<Places>,
    fronts: Vec<Vec<UdpSocket>>,
    ways: Mutex<Ways>,
    counts: Counts,
}

/// A packet that waits for its time.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    due: Instant,
    from: usize,
    to: usize,
    plane: usize,
    bytes: Vec<u8>,
}

/// A running relay. It ends when it is dropped.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bind(place: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(place), Type::DGRAM, Some(Protocol::UDP))?;
    // As much as the system lets us have; packets come in bursts.
    let _ = socket.set_recv_buffer_size(BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&place.into())?;
    UdpSocket::from_std(socket.into())
}

impl Relay {
    /// Begins to pass packets between nodes, given for each the fronts to be bound and the backs
    /// that it listens on. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When a front cannot be bound, or is not on loopback.
    pub fn start(nodes: &[(Places, Places)], seed: u64) -> io::Result<Self> {
        let mut fronts = Vec::with_capacity(nodes.len());
        for (places, backs) in nodes {
            if places.iter().chain(backs).any(|place| !place.ip().is_loopback()) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "not on loopback"));
            }
            fronts.push(places.iter().map(|place| bind(*place)).collect::<io::Result<Vec<_>>>()?);
        }
        let now = vec![vec![Way::default(); nodes.len()]; nodes.len()];
        let ways = Ways { begun: BTreeMap::new(), now, dice: Dice::new(seed) };
        let shared = Arc::new(Shared {
            backs: nodes.iter().map(|(_, backs)| *backs).collect(),
            fronts,
            ways: Mutex::new(ways),
            counts: Counts::default(),
        });
        let (late, waiting) = mpsc::channel(MAX_LATE);
        let mut tasks = vec![tokio::spawn(pass_late(Arc::clone(&shared), waiting))];
        for to in 0..nodes.len() {
            for plane in 0..PLANES {
                let (shared, late) = (Arc::clone(&shared), late.clone());
                tasks.push(tokio::spawn(pass(shared, to, plane, late)));
            }
        }
        Ok(Self { shared, tasks })
    }

    /// Disturbs some ways until [`Relay::end`] is called with the same number. Disturbances add
    /// up.
    pub fn begin(&self, number: u64, ways: Vec<(usize, usize, Way)>) {
        let mut held = hold(&self.shared.ways);
        held.begun.insert(number, ways);
        held.sum();
    }

    /// Ends a disturbance.
    pub fn end(&self, number: u64) {
        let mut held = hold(&self.shared.ways);
        held.begun.remove(&number);
        held.sum();
    }

    /// What it did so far.
    #[must_use]
    pub fn relayed(&self) -> Relayed {
        let counts = &self.shared.counts;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Relayed {
            passed: read(&counts.passed),
            dropped: read(&counts.dropped),
            overflowed: read(&counts.overflowed),
            strange: read(&counts.strange),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Ways {
    fn sum(&mut self) {
        self.now.iter_mut().flatten().for_each(|way| *way = Way::default());
        for (from, to, way) in self.begun.values().flatten() {
            if let Some(now) = self.now.get_mut(*from).and_then(|row| row.get_mut(*to)) {
                *now = now.and(*way);
            }
        }
    }

    /// What becomes of one packet: after how long it arrives, as often as it does.
    fn fate(&mut self, from: usize, to: usize) -> Vec<Duration> {
        let way = self.now.get(from).and_then(|row| row.get(to)).copied().unwrap_or_default();
        if way == Way::default() {
            return vec![Duration::ZERO];
        }
        if way.cut || self.dice.chance(way.loss, 1000) {
            return Vec::new();
        }
        let copies = 1 + u64::from(self.dice.chance(way.twice, 1000));
        let (least, most) = way.delay;
        let between = u64::try_from(most.saturating_sub(least).as_micros()).unwrap_or(u64::MAX);
        let mut delay = |_| least + Duration::from_micros(self.dice.below(between.max(1)));
        (0..copies).map(&mut delay).collect()
    }
}

impl Shared {
    fn send(&self, from: usize, to: usize, plane: usize, bytes: &[u8]) {
        let front = self.fronts.get(from).and_then(|fronts| fronts.get(plane));
        let back = self.backs.get(to).and_then(|backs| backs.get(plane));
        let (Some(front), Some(back)) = (front, back) else { return };
        let sent = front.try_send_to(bytes, *back).is_ok();
        let counts = &self.counts;
        let count = if sent { &counts.passed } else { &counts.overflowed };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Passes on what comes to one front.
async fn pass(shared: Arc<Shared>, to: usize, plane: usize, late: mpsc::Sender<Late>) {
    let Some(front) = shared.fronts.get(to).and_then(|fronts| fronts.get(plane)) else { return };
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        // What the kernel says of packets that nobody took is no concern of ours.
        let Ok((length, source)) = front.recv_from(&mut buffer).await else {
            tokio::task::yield_now().await;
            continue;
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        let from = shared.backs.iter().position(|backs| backs.get(plane) == Some(&source));
        let Some(from) = from else {
            shared.counts.strange.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let fate = hold(&shared.ways).fate(from, to);
        if fate.is_empty() {
            shared.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
        for delay in fate {
            if delay.is_zero() {
                shared.send(from, to, plane, bytes);
                continue;
            }
            let due = Instant::now() + delay;
            let packet = Late { due, from, to, plane, bytes: bytes.to_vec() };
            if late.try_send(packet).is_err() {
                shared.counts.overflowed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Passes on delayed packets when their time has come.
async fn pass_late(shared: Arc<Shared>, mut waiting: mpsc::Receiver<Late>) {
    let mut heap: BinaryHeap<Reverse<Late>> = BinaryHeap::new();
    loop {
        let due = heap.peek().map(|Reverse(packet)| packet.due);
        let wait = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            packet = waiting.recv() => match packet {
                Some(packet) if heap.len() < MAX_LATE => heap.push(Reverse(packet)),
                Some(_) => {
                    shared.counts.overflowed.fetch_add(1, Ordering::Relaxed);
                }
                None => return,
            },
            () = wait => {
                if let Some(Reverse(packet)) = heap.pop() {
                    shared.send(packet.from, packet.to, packet.plane, &packet.bytes);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    async fn socket() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        let place = socket.local_addr().expect("bound");
        (socket, place)
    }

    /// Free ports; the relay binds them.
    async fn fronts() -> Places {
        let mut places = ["127.0.0.1:0".parse().expect("an address"); PLANES];
        let mut held = Vec::new();
        for place in &mut places {
            let (socket, at) = socket().await;
            held.push(socket);
            *place = at;
        }
        places
    }

    async fn hears(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 100];
        let heard = tokio::time::timeout(PATIENCE, socket.recv_from(&mut buffer)).await;
        let (length, from) = heard.expect("in time").expect("hears");
        (buffer[..length].to_vec(), from)
    }

    #[tokio::test]
    async fn packets_pass_from_front_to_front_and_ways_are_cut_one_by_one() {
        let ((a, back_a), (b, back_b)) = (socket().await, socket().await);
        let (front_a, front_b) = (fronts().await, fronts().await);
        let nodes = [(front_a, [back_a; PLANES]), (front_b, [back_b; PLANES])];
        let relay = Relay::start(&nodes, 7).expect("starts");
        // Whom nobody knows is not heard.
        let (stranger, _) = socket().await;
        stranger.send_to(b"stranger", front_b[0]).await.expect("sends");
        a.send_to(b"one", front_b[0]).await.expect("sends");
        let (said, from) = hears(&b).await;
        assert_eq!((said.as_slice(), from), (&b"one"[..], front_a[0]));
        // The answer goes where the question came from.
        b.send_to(b"two", from).await.expect("sends");
        assert_eq!(hears(&a).await, (b"two".to_vec(), front_b[0]));
        // One way is cut, the other is not.
        relay.begin(1, vec![(0, 1, Way { cut: true, ..Way::default() })]);
        a.send_to(b"lost", front_b[0]).await.expect("sends");
        b.send_to(b"three", front_a[1]).await.expect("sends");
        assert_eq!(hears(&a).await, (b"three".to_vec(), front_b[1]));
        while relay.relayed().dropped == 0 {
            tokio::task::yield_now().await;
        }
        relay.end(1);
        // Late and twice.
        let delay = Duration::from_millis(50);
        let way = Way { delay: (delay, delay), twice: 1000, ..Way::default() };
        relay.begin(2, vec![(0, 1, way)]);
        let begun = Instant::now();
        a.send_to(b"four", front_b[2]).await.expect("sends");
        for _ in 0..2 {
            assert_eq!(hears(&b).await, (b"four".to_vec(), front_a[2]));
        }
        assert!(begun.elapsed() >= delay);
        let Relayed { passed, dropped, overflowed, strange } = relay.relayed();
        assert_eq!((passed, dropped, overflowed, strange), (5, 1, 0, 1));
    }

    #[tokio::test]
    async fn nothing_but_loopback_is_relayed() {
        let mut outside = fronts().await;
        outside[1].set_ip([192, 0, 2, 1].into());
        let error = Relay::start(&[(outside, fronts().await)], 7).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
