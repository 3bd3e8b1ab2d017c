//! The data plane: payloads and streams between nodes, over one QUIC endpoint of its own.
//!
//! | file | what it is about |
//! |---|---|
//! | [`frame`] | the first bytes of every stream, and the codes streams end with |
//! | `tls` | who is at the other end |
//! | `dial` | connections to others |
//! | `serve` | what others are answered |
//! | `fetch` | a payload from its holders to a verified file |
//! | `have` | what of a payload a node has, told to those who want it |
//! | `buffers` | memory for groups, used again and again |
//! | `stream` | the halves of a stream, and the pace they keep |
//!
//! ```text
//!    fetch, open                        one thread, one endpoint                   arriving
//!  ───────────────> dial ──────────> ┌───────────────────────────┐ ──> serve ──> the node
//!                                    │ packets, crypto, streams  │        │
//!  <─────────────── verified files   └───────────────────────────┘ <──────┘ payloads
//!                   by blocking threads                    read by blocking threads
//! ```
//!
//! The endpoint lives on a thread of its own with a single-threaded runtime: sealing packets is
//! steady work that one core does best without waking others (measured on two cores: a fifth
//! faster than with two workers), and nothing else the node does can hold up its
//! acknowledgements. Disks are read, hashed and written on blocking threads, through short queues.
//! Everything a peer can make this node hold is bounded by [`DataConfig`].

pub mod frame;

mod buffers;
mod dial;
mod fetch;
mod have;
mod serve;
pub mod socket;
mod stream;
#[cfg(test)]
mod tests;
mod throttle;
mod tls;

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use quinn::{EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt, congestion::CubicConfig};
use thiserror::Error;
use tokio::{
    runtime::{Builder, Handle},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

use crate::payload::{PayloadStore, Root};

pub(crate) use self::serve::chunk_ranges;
use self::{
    buffers::Buffers,
    dial::Pool,
    fetch::{Transfers, Wanted},
    frame::{Code, Open, Request, Response},
    serve::{Examined, Served},
    throttle::Throttle,
    tls::Identity,
};
pub use self::{
    dial::LinkError,
    fetch::{FetchError, FetchStats, Holder, Progress},
    serve::Arriving,
    stream::{RecvHalf, SendHalf},
    tls::IdentityError,
};

/// Asked after every handshake and for every stream: is this Ed25519 key admitted now? It must
/// answer at once, from memory.
pub type Admit = Arc<dyn Fn([u8; 32]) -> bool + Send + Sync>;

/// How much unacknowledged data connections may hold, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// What one stream of a dialed connection may have sent us unread. Bandwidth times round
    /// trip: 16 MiB are 1 Gb/s over 130 ms.
    pub stream_receive: u32,
    /// What all streams of a dialed connection may have sent us unread.
    pub receive: u32,
    /// What a connection that we serve may have in flight to the peer.
    pub send: u32,
    /// What all served connections together may have in flight, and likewise all dialed ones
    /// unread. With many connections each gets its share, but at least [`Windows::LEAST`].
    pub budget: u64,
}

impl Windows {
    /// The least that a connection gets, however many there are: 1 MiB.
    pub const LEAST: u64 = 1 << 20;
    /// What a peer may send on streams it opened here: requests, and the input of a job. The
    /// bulk goes the other way.
    const REQUESTS: u32 = 4 << 20;
}

impl Default for Windows {
    fn default() -> Self {
        Self { stream_receive: 16 << 20, receive: 32 << 20, send: 16 << 20, budget: 512 << 20 }
    }
}

/// The bounds of a data plane. The default is for hosts in data centers.
#[derive(Debug, Clone)]
pub struct DataConfig {
    /// Where to listen (UDP). Port 0 takes a free one.
    pub listen: SocketAddr,
    /// How much data connections may hold.
    pub windows: Windows,
    /// The socket's buffers each way, in bytes. The kernel may give less (`net.core.rmem_max`,
    /// `wmem_max`), which costs throughput and is warned of.
    pub socket_buffer: usize,
    /// The largest UDP payload that a path is tried for, in bytes, and that is taken from a peer. What a
    /// path does not carry costs a few lost probes.
    pub mtu: u16,
    /// Streams that one connection may have open at once.
    pub max_streams: u32,
    /// Connections served at once.
    pub max_connections: usize,
    /// Of them, connections of one key.
    pub max_connections_per_key: usize,
    /// Connections to others at once.
    pub max_dialed: usize,
    /// Handshakes answered at once; beyond, connections are refused.
    pub max_handshakes: usize,
    /// Handshakes at once above which a peer first has to prove its address (a QUIC Retry).
    pub retry_above: usize,
    /// Payloads sent at once.
    pub max_serving: usize,
    /// Payloads fetched at once; more wait.
    pub max_fetching: usize,
    /// Payloads that one peer may be sent at once.
    pub max_serving_per_key: usize,
    /// Parts of payloads that are asked for at once; more wait.
    pub max_asking: usize,
    /// Of them, those asked of one holder: a slow one holds up its own only.
    pub max_asking_per_key: usize,
    /// Payloads of which one holder is asked at once what it has: each is a stream that waits.
    pub max_watching_per_key: usize,
    /// For how long more is hoped for from holders that lack what is missing, but may yet get it.
    pub hope: Duration,
    /// Bytes of payloads sent to others per second, all together; none for as much as there is.
    pub upload_rate: Option<u64>,
    /// Streams to the node that wait to be taken up; more are refused as busy.
    pub max_arriving: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How long a peer may take to send its request on a stream.
    pub request_timeout: Duration,
    /// A connection on which nothing is heard for this long is lost.
    pub idle_timeout: Duration,
    /// How often a dialed connection shows that it lives.
    pub keep_alive: Duration,
    /// A dialed connection that nobody used for this long is closed.
    pub idle_close: Duration,
    /// The window in which a transfer must make `min_rate`, and an answer must come.
    pub stall: Duration,
    /// The least bytes per second that a transfer must make.
    pub min_rate: u64,
}

/// The least that QUIC asks of any path, in bytes of UDP payload (RFC 9000, section 14).
const MIN_MTU: u16 = 1_200;

impl DataConfig {
    /// What an Ethernet frame of 9,000 bytes carries besides the headers of IPv6 and UDP.
    pub const MTU: u16 = 8_952;

    /// The defaults, listening on `listen`.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            windows: Windows::default(),
            socket_buffer: 4 << 20,
            mtu: Self::MTU,
            // Each request to a model is one for as long as it is answered.
            max_streams: 512,
            max_connections: 256,
            max_connections_per_key: 4,
            max_dialed: 128,
            max_handshakes: 256,
            retry_above: 32,
            max_serving: 32,
            max_fetching: 32,
            max_serving_per_key: 8,
            max_asking: 64,
            max_asking_per_key: 8,
            max_watching_per_key: 16,
            hope: Duration::from_secs(30),
            upload_rate: None,
            max_arriving: 256,
            handshake_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(20),
            keep_alive: Duration::from_secs(5),
            idle_close: Duration::from_secs(60),
            stall: Duration::from_secs(10),
            min_rate: 16 << 10,
        }
    }

    fn transport(&self) -> TransportConfig {
        let mut transport = TransportConfig::default();
        let mut congestion = CubicConfig::default();
        // 128 KiB at once instead of 14: the paths are data-center networks, and most payloads
        // and all of their first round trips get faster.
        congestion.initial_window(128 << 10);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.mtu.max(MIN_MTU));
        transport
            .mtu_discovery_config(Some(discovery))
            .max_concurrent_uni_streams(0u32.into())
            .datagram_receive_buffer_size(None)
            .max_idle_timeout(Some(milliseconds(self.idle_timeout).into()))
            .congestion_controller_factory(Arc::new(congestion))
            .allow_spin(false);
        transport
    }

    fn served_transport(&self) -> TransportConfig {
        let mut transport = self.transport();
        transport
            .max_concurrent_bidi_streams(self.max_streams.into())
            .stream_receive_window((Windows::LEAST as u32).into())
            .receive_window(Windows::REQUESTS.into())
            .send_window(self.windows.send.into());
        transport
    }

    fn dialed_transport(&self) -> TransportConfig {
        let mut transport = self.transport();
        transport
            // Who was dialed answers; it opens nothing.
            .max_concurrent_bidi_streams(0u32.into())
            .stream_receive_window(self.windows.stream_receive.into())
            .receive_window(self.windows.receive.into())
            .send_window(Windows::REQUESTS.into())
            .keep_alive_interval(Some(self.keep_alive));
        transport
    }
}

/// Milliseconds as QUIC's idle timeout wants them.
fn milliseconds(time: Duration) -> VarInt {
    VarInt::from_u32(u32::try_from(time.as_millis()).unwrap_or(u32::MAX))
}

/// Why a data plane did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("cannot listen on UDP {address}: {source}")]
    Listen {
        /// The address from the configuration.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The node's key does not make an identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its thread or runtime cannot be had.
    #[error("cannot start the data plane's thread: {0}")]
    Thread(io::Error),
}

/// Figures since the start, and of now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DataStats {
    /// Bytes of payloads sent, without hash pairs and headers.
    pub payload_sent: u64,
    /// Bytes of payloads received and verified.
    pub payload_received: u64,
    /// Connections served now.
    pub serving: usize,
    /// Dialed connections open now.
    pub dialed: usize,
    /// Connections taken up.
    pub accepted: u64,
    /// Connections and streams refused because their key was not admitted.
    pub not_admitted: u64,
    /// Connections refused because there were too many.
    pub too_many: u64,
    /// Handshakes that failed, were too slow or too many.
    pub handshakes_failed: u64,
    /// Streams that others opened.
    pub streams: u64,
    /// Payloads fetched.
    pub fetched: u64,
    /// Fetches that failed.
    pub fetches_failed: u64,
    /// Holders that nothing more of a payload was taken from, since what they sent was not of it.
    pub bad_holders: u64,
}

#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct Counters {
    payload_sent: Counter,
    payload_received: Counter,
    accepted: Counter,
    not_admitted: Counter,
    too_many: Counter,
    handshakes_failed: Counter,
    streams: Counter,
    fetched: Counter,
    fetches_failed: Counter,
    bad_holders: Counter,
}

/// At most so many at once for each peer.
struct PerKey {
    most: usize,
    of: Mutex<HashMap<[u8; 32], Arc<Semaphore>>>,
}

impl PerKey {
    /// How many peers are remembered before those without anything under way are forgotten.
    const KNOWN: usize = 1_024;

    fn new(most: usize) -> Self {
        Self { most, of: Mutex::default() }
    }

    fn of(&self, key: &[u8; 32]) -> Arc<Semaphore> {
        let mut of = lock(&self.of);
        if of.len() > Self::KNOWN {
            of.retain(|_, room| Arc::strong_count(room) > 1);
        }
        Arc::clone(of.entry(*key).or_insert_with(|| Arc::new(Semaphore::new(self.most))))
    }
}

/// What the tasks of a data plane share.
struct Shared {
    config: DataConfig,
    identity: Identity,
    /// Nothing once the data plane is closed: whoever holds the endpoint holds its port.
    endpoint: Mutex<Option<quinn::Endpoint>>,
    dialed_transport: Arc<TransportConfig>,
    store: PayloadStore,
    admit: Admit,
    arriving: mpsc::Sender<Arriving>,
    counters: Counters,
    pool: Pool,
    served: Mutex<Served>,
    transfers: Mutex<Transfers>,
    serving: Arc<Semaphore>,
    /// Of them, those that may be for payloads that are not this node's own to deliver.
    serving_others: Arc<Semaphore>,
    fetching: Semaphore,
    asking: Semaphore,
    serving_each: PerKey,
    asking_each: PerKey,
    watching_each: PerKey,
    upload: Throttle,
    /// Payloads that this node itself wants delivered.
    own: Mutex<Arc<HashSet<Root>>>,
    /// For groups that are read to be sent, and for those that are gathered.
    reading: Buffers,
    gathering: Buffers,
    examining: Arc<Semaphore>,
    examined: Mutex<Examined>,
}

impl Shared {
    fn endpoint(&self) -> Option<quinn::Endpoint> {
        lock(&self.endpoint).clone()
    }

    /// Gives every connection its share of the windows' budget. A narrower window takes effect
    /// as what is in flight drains.
    fn share_windows(&self) {
        let windows = self.config.windows;
        let share = |connections: usize, most: u32| {
            let share = windows.budget / (connections as u64).max(1);
            share.clamp(Windows::LEAST, u64::from(most).max(Windows::LEAST))
        };
        let served = lock(&self.served);
        let send = share(served.len(), windows.send);
        served.all().for_each(|connection| connection.set_send_window(send));
        drop(served);
        let dialed = self.dialed();
        let receive = share(dialed.len(), windows.receive);
        let receive = VarInt::from_u64(receive).unwrap_or(windows.receive.into());
        dialed.iter().for_each(|connection| connection.set_receive_window(receive));
    }
}

/// A running data plane. Clones share it; when the last one is dropped, it closes.
#[derive(Clone)]
pub struct Data {
    shared: Arc<Shared>,
    runtime: Handle,
    address: SocketAddr,
    _stop: Arc<DropGuard>,
    ended: CancellationToken,
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Data").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Data {
    /// Starts the data plane of the node whose Ed25519 secret key is `seed`. It serves the
    /// payloads in `store` to whoever `admit` admits. The receiver gets the streams that are not
    /// for payloads.
    pub fn start(
        config: DataConfig,
        seed: [u8; 32],
        store: PayloadStore,
        admit: Admit,
    ) -> Result<(Self, mpsc::Receiver<Arriving>), StartError> {
        let identity = Identity::new(seed)?;
        let server = identity.server()?;
        let endpoint_config = endpoint_config(&seed, &config);
        let listen = |source| StartError::Listen { address: config.listen, source };

        let socket = socket::open(&config).map_err(listen)?;
        let address = socket.local_addr().map_err(listen)?;

        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server
            .transport_config(Arc::new(config.served_transport()))
            // Hosts do not move, and an address that changes is not worth an attack surface.
            .migration(false)
            .max_incoming(config.max_handshakes)
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(8 << 20);

        let runtime = Builder::new_current_thread()
            .enable_all()
            // A reader per payload sent, a verifier per part asked for, and short errands.
            .max_blocking_threads(config.max_serving + config.max_asking + 16)
            .thread_name("data-disk")
            .build()
            .map_err(StartError::Thread)?;
        let entered = runtime.enter();
        let socket = socket::for_quinn(socket).map_err(listen)?;
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config,
            Some(server),
            socket,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(listen)?;
        drop(entered);

        let (arriving, arrivals) = mpsc::channel(config.max_arriving);
        let shared = Arc::new(Shared {
            identity,
            endpoint: Mutex::new(Some(endpoint.clone())),
            dialed_transport: Arc::new(config.dialed_transport()),
            store,
            admit,
            arriving,
            counters: Counters::default(),
            pool: Pool::default(),
            served: Mutex::default(),
            transfers: Mutex::default(),
            serving: Arc::new(Semaphore::new(serving(&config))),
            serving_others: Arc::new(Semaphore::new(serving_others(&config))),
            fetching: Semaphore::new(config.max_fetching),
            serving_each: PerKey::new(serving_each(&config)),
            asking: Semaphore::new(config.max_asking),
            asking_each: PerKey::new(config.max_asking_per_key),
            watching_each: PerKey::new(config.max_watching_per_key),
            upload: Throttle::new(config.upload_rate),
            own: Mutex::default(),
            reading: Buffers::default(),
            gathering: Buffers::default(),
            examining: Arc::new(Semaphore::new(1)),
            examined: Mutex::default(),
            config,
        });
        let stop = CancellationToken::new();
        let ended = CancellationToken::new();
        let data = Self {
            shared: shared.clone(),
            runtime: runtime.handle().clone(),
            address,
            _stop: Arc::new(stop.clone().drop_guard()),
            ended: ended.clone(),
        };
        let running = move || {
            let _ended = ended.drop_guard();
            runtime.block_on(run(shared, endpoint, stop));
            // What still writes to disk may finish its group; what waits finds its queue closed.
            runtime.shutdown_timeout(Duration::from_secs(1));
        };
        thread::Builder::new()
            .name("data".to_owned())
            .spawn(running)
            .map_err(StartError::Thread)?;
        debug!(%address, "data plane listens");
        Ok((data, arrivals))
    }

    /// The address listened on, with its port.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The Ed25519 key that others meet here.
    pub fn public_key(&self) -> [u8; 32] {
        self.shared.identity.public
    }

    /// Fetches the payload `root` of `size` bytes from `holders` into the store: verified, and on
    /// disk when this returns. Root and size must come from an order or a signed index. A payload
    /// that is held costs nothing; one that is on its way is waited for, and `holders` are asked,
    /// too. `progress` hears how far it is. Dropping the future gives the transfer up, unless
    /// others wait for it too.
    pub async fn fetch(
        &self,
        holders: Vec<Holder>,
        root: Root,
        size: u64,
        progress: impl FnMut(Progress),
    ) -> Result<FetchStats, FetchError> {
        let wanted = Wanted { root, size, holders };
        fetch::fetch(&self.shared, &self.runtime, wanted, progress).await
    }

    /// How many bytes the payload `root` has, as `holder` proves: for one of which only the name
    /// is known.
    pub async fn size_of(&self, holder: &Holder, root: Root) -> Result<u64, FetchError> {
        let (shared, holder) = (self.shared.clone(), holder.clone());
        let asking = async move { fetch::size::of(&shared, &holder, root).await };
        self.on_its_thread(asking).await?
    }

    /// Says which payloads this node itself wants delivered: what others want of it waits for them.
    pub fn put_first(&self, own: HashSet<Root>) {
        *lock(&self.shared.own) = Arc::new(own);
    }

    /// Names more holders of a payload, for the case that it is being fetched.
    pub fn name_holders(&self, root: Root, size: u64, holders: Vec<Holder>) {
        fetch::name_holders(&self.shared, root, size, holders);
    }

    /// Opens a stream to what `channel` means at `peer`, with at most
    /// [`MAX_BODY`](frame::MAX_BODY) bytes to say what is wanted. Returns when the peer has
    /// accepted.
    pub async fn open(
        &self,
        peer: [u8; 32],
        addresses: Vec<SocketAddr>,
        channel: u8,
        body: Vec<u8>,
    ) -> Result<(SendHalf, RecvHalf), LinkError> {
        let frame = Request::Open(Open { channel, body }).encode().map_err(LinkError::Request)?;
        let shared = self.shared.clone();
        let asking = async move { shared.request(peer, &addresses, &frame, false).await };
        let answered = self.on_its_thread(asking).await??;
        match answered.response {
            // Streams to the node come before payloads on a connection that both share.
            Response::Ready { .. } => {
                let _ = answered.send.stream.set_priority(1);
                Ok((answered.send, answered.recv))
            }
            Response::Refused(refused) => Err(LinkError::Refused { peer, refused }),
        }
    }

    /// Runs `work` on the endpoint's own thread, so that its connection is driven there, too; it is
    /// given up with the future that waits for it.
    async fn on_its_thread<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, LinkError> {
        let (mut answer, answered) = oneshot::channel();
        self.runtime.spawn(async move {
            tokio::select! {
                done = work => drop(answer.send(done)),
                () = answer.closed() => {}
            }
        });
        answered.await.map_err(|_| LinkError::Closed)
    }

    /// Closes every connection with `peer`, for one that is no longer admitted.
    pub fn disconnect(&self, peer: [u8; 32]) {
        let served = lock(&self.shared.served).of(&peer).to_vec();
        served.iter().for_each(|connection| dial::close(connection, Code::NotAdmitted));
        self.shared.close_dialed(peer, Code::Done);
    }

    /// Figures since the start, and of now.
    pub fn stats(&self) -> DataStats {
        let counters = &self.shared.counters;
        DataStats {
            payload_sent: counters.payload_sent.get(),
            payload_received: counters.payload_received.get(),
            serving: lock(&self.shared.served).len(),
            dialed: self.shared.dialed().len(),
            accepted: counters.accepted.get(),
            not_admitted: counters.not_admitted.get(),
            too_many: counters.too_many.get(),
            handshakes_failed: counters.handshakes_failed.get(),
            streams: counters.streams.get(),
            fetched: counters.fetched.get(),
            fetches_failed: counters.fetches_failed.get(),
            bad_holders: counters.bad_holders.get(),
        }
    }

    /// Tells every peer, ends all streams and transfers, and returns when the port is free; a
    /// half of a stream that someone still holds keeps it taken.
    pub async fn close(&self) {
        if let Some(endpoint) = self.shared.endpoint() {
            close(&endpoint);
        }
        self.ended.cancelled().await;
    }
}

/// How many payloads are sent at once: no more than each get eight times the least that a transfer
/// must make. So one of two to the same peer still gets twice that while the node's own have half.
fn serving(config: &DataConfig) -> usize {
    let each = config.min_rate.saturating_mul(8).max(1);
    let paced = config.upload_rate.map_or(u64::MAX, |rate| rate / each);
    usize::try_from(paced).unwrap_or(usize::MAX).clamp(1, config.max_serving)
}

/// How many of them may be for payloads that are not the node's own to deliver.
fn serving_others(config: &DataConfig) -> usize {
    let all = serving(config);
    if all > 1 { all - (all / 4).max(1) } else { all }
}

/// How many of them may be to one peer: where little is sent they share the peer's turns.
fn serving_each(config: &DataConfig) -> usize {
    let most = config.max_serving_per_key;
    if config.upload_rate.is_some() { most.min(2) } else { most }
}

/// What the data thread does until `stop`.
async fn run(shared: Arc<Shared>, endpoint: quinn::Endpoint, stop: CancellationToken) {
    let accepting = tokio::spawn(serve::accept(shared.clone(), endpoint.clone()));
    let idling = tokio::spawn(shared.clone().close_idle());
    tokio::select! {
        () = stop.cancelled() => {}
        // The endpoint was closed, or lost its socket.
        _ = accepting => {}
    }
    idling.abort();
    lock(&shared.endpoint).take();
    close(&endpoint);
    let _ = timeout(Duration::from_secs(2), endpoint.wait_idle()).await;
    shared.forget_dialed();
}

fn close(endpoint: &quinn::Endpoint) {
    endpoint.close(VarInt::from_u32(Code::Closing as u32), Code::Closing.reason().as_bytes());
}

/// Connection ids are random, and the key of stateless resets comes from the node's: a peer that
/// still talks to this node's last run is told at once that it is over, not after its timeout.
fn endpoint_config(seed: &[u8; 32], data: &DataConfig) -> EndpointConfig {
    let key = blake3::derive_key("leasehold data plane 1: stateless resets", seed);
    let mut config = EndpointConfig::new(Arc::new(ResetKey(key)));
    config.cid_generator(|| Box::new(RandomIds::default()));
    // Fails only below the least that QUIC allows, and then that stays.
    let _ = config.max_udp_payload_size(data.mtu.max(MIN_MTU));
    config
}

struct ResetKey([u8; 32]);

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], out: &mut [u8]) {
        let mut mac = blake3::Hasher::new_keyed(&self.0);
        mac.update(data).finalize_xof().fill(out);
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), quinn::crypto::CryptoError> {
        // Hashes compare in constant time.
        let signature = blake3::Hash::from_slice(signature);
        let same = signature.is_ok_and(|s| s == blake3::keyed_hash(&self.0, data));
        if same { Ok(()) } else { Err(quinn::crypto::CryptoError) }
    }
}

/// Random ids, all of which may be ours: quinn's own default drops packets whose id it did not
/// make in this run, where a stateless reset is wanted.
#[derive(Debug, Default)]
struct RandomIds {
    made: u64,
}

impl quinn::ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> quinn::ConnectionId {
        // The count stands in for randomness that cannot be had: quinn wants ids that differ.
        self.made = self.made.wrapping_add(1);
        let mut id = self.made.to_le_bytes();
        let _ = getrandom::fill(&mut id);
        quinn::ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A key as people know it: its PeerId.
fn name(key: &[u8; 32]) -> String {
    use libp2p::identity::{PublicKey, ed25519};
    match ed25519::PublicKey::try_from_bytes(key) {
        Ok(key) => PublicKey::from(key).to_peer_id().to_string(),
        Err(_) => "a key that is not on the curve".to_owned(),
    }
}

// What these locks guard is changed in single steps, so a poisoned one holds nothing broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
