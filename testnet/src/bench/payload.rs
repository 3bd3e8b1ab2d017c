//! Memory to verified file: what the data plane moves, and what the same QUIC settings move with
//! nothing around them.
//!
//! ```text
//!  case "leasehold"                              case "quinn"
//!  payload store in memory (tmpfs)               one buffer of 1 MiB, sent again and again
//!     | read, hash pairs, frames                    |
//!     v                                             v
//!  data plane ===== QUIC, loopback =====>        raw stream ===== QUIC, loopback =====>
//!     | every group verified against the root       |
//!     v                                             v
//!  file on disk, fdatasync, renamed              dropped
//! ```
//!
//! Each run is two fresh processes, so that peaks of memory are of one transfer. The two cases
//! take turns, so that what else happens on the machine hits both alike.

use std::{
    io::{self, BufRead as _, BufReader, Read},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::{Args, Subcommand};
use leasehold_node::{
    data::{Data, DataConfig, Holder},
    payload::{Declared, Limits, PayloadStore, Root},
};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key},
    pki_types::{
        CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
    },
    server::AlwaysResolvesServerRawPublicKeys,
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Spread, line, machine, rounded, temporary};

/// How long one transfer may take before the benchmark gives up: 4 MB/s and half a minute.
fn limit(size: u64) -> Duration {
    Duration::from_secs(30 + size / 4_000_000)
}

/// What raw QUIC sends, again and again.
const BUFFER: usize = 1 << 20;

/// The keys of the two sides. Nothing is kept under them but what the benchmark made up.
const SENDER: [u8; 32] = [1; 32];
const RECEIVER: [u8; 32] = [2; 32];

/// Options of `bench payload`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Bytes to move: 1G, 64M.
    #[arg(long, value_parser = size, default_value = "1G")]
    size: u64,
    /// Runs of each case; they take turns.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Where the receiver's files go [default: the directory for temporary files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

fn size(text: &str) -> Result<u64, String> {
    let size = leasehold_node::quantity::bytes(text)?;
    let bounds = 1..=1 << 40;
    if bounds.contains(&size) { Ok(size) } else { Err("expected 1 byte to 1 TiB".into()) }
}

/// One side of a transfer, in a process of its own.
#[derive(Debug, Args)]
pub(super) struct Side {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serves the payloads in `store` on the data plane.
    Serve { store: PathBuf },
    /// Fetches a payload into `store`.
    Fetch { store: PathBuf, address: SocketAddr, key: String, root: Root, size: u64 },
    /// Sends what it is asked for over a raw stream.
    RawServe,
    /// Asks for `size` bytes and drops them.
    RawFetch { address: SocketAddr, size: u64 },
}

/// What a serving side says once it listens.
#[derive(Debug, Serialize, Deserialize)]
struct Listens {
    address: SocketAddr,
    key: String,
}

/// What a side says at its end.
#[derive(Debug, Serialize, Deserialize)]
struct Ended {
    seconds: f64,
    cpu_s: f64,
    peak_mb: Option<f64>,
    /// The size of packets that the path was found to take.
    mtu: Option<u16>,
}

/// One run of one case.
#[derive(Debug)]
struct Run {
    sender: Ended,
    receiver: Ended,
}

#[derive(Debug, Serialize)]
struct CaseLine {
    bench: &'static str,
    case: &'static str,
    size: u64,
    /// Megabytes (10^6 bytes) a second: median, and the slowest and fastest run.
    mb_per_s: f64,
    min: f64,
    max: f64,
    runs: usize,
    /// Processor seconds of both sides for 10^9 bytes, median.
    cpu_s_per_gb: f64,
    /// The most of all runs.
    peak_mb_sender: Option<f64>,
    peak_mb_receiver: Option<f64>,
    mtu: Option<u16>,
    cipher: &'static str,
    /// What the receiver does with the bytes.
    sink: String,
}

#[derive(Debug, Serialize)]
struct RatioLine {
    bench: &'static str,
    case: &'static str,
    /// The medians' ratio; the least and most of runs next to each other.
    ratio: f64,
    min: f64,
    max: f64,
    runs: usize,
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let size = options.size;
    let memory = in_memory(size);
    if memory.is_none() {
        eprintln!("no room in /dev/shm: the payload is held in a file, warm in the page cache");
    }
    let base = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let held = temporary(memory.as_deref().unwrap_or(&base))?;
    let target = temporary(&base)?;
    let root = prepare(held.path(), size)?;
    let runs = options.runs as usize;
    let (mut ours, mut raw) = (Vec::with_capacity(runs), Vec::with_capacity(runs));
    for turn in 0..options.runs {
        // Who goes first takes turns, too.
        for first in [true, false] {
            if first == (turn % 2 == 0) {
                ours.push(leasehold(held.path(), target.path(), root, size)?);
            } else {
                raw.push(quinn_alone(size)?);
            }
        }
        let speed = |runs: &[Run]| runs.last().map_or(0.0, |run| speed(run, size));
        eprintln!(
            "run {} of {runs}: leasehold {:.0} MB/s, quinn {:.0} MB/s",
            turn + 1,
            speed(&ours),
            speed(&raw)
        );
    }
    let mtu = raw.iter().find_map(|run| run.sender.mtu);
    let sink = format!("verified file on {}, synced", machine::file_system(target.path()));
    // The packets of both are of one size, by the same configuration.
    line(&case("leasehold", &ours, size, mtu, sink))?;
    line(&case("quinn", &raw, size, mtu, "dropped".to_owned()))?;
    let ratio = |a: &Run, b: &Run| speed(a, size) / speed(b, size);
    let pairs = Spread::of(ours.iter().zip(&raw).map(|(a, b)| ratio(a, b)));
    let medians = [&ours, &raw].map(|runs| Spread::of(runs.iter().map(|run| speed(run, size))));
    if let (Some(pairs), [Some(ours), Some(raw)]) = (pairs, medians) {
        line(&RatioLine {
            bench: "payload",
            case: "ratio",
            ratio: rounded(ours.median / raw.median, 3),
            min: rounded(pairs.min, 3),
            max: rounded(pairs.max, 3),
            runs,
        })?;
    }
    Ok(())
}

fn speed(run: &Run, size: u64) -> f64 {
    size as f64 / 1e6 / run.receiver.seconds
}

fn case(name: &'static str, runs: &[Run], size: u64, mtu: Option<u16>, sink: String) -> CaseLine {
    let none = Spread { median: 0.0, min: 0.0, max: 0.0 };
    let speeds = Spread::of(runs.iter().map(|run| speed(run, size))).unwrap_or(none);
    let cpu = |run: &Run| (run.sender.cpu_s + run.receiver.cpu_s) / (size as f64 / 1e9);
    let peak = |side: fn(&Run) -> &Ended| {
        let peaks = Spread::of(runs.iter().filter_map(|run| side(run).peak_mb));
        peaks.map(|peaks| rounded(peaks.max, 1))
    };
    CaseLine {
        bench: "payload",
        case: name,
        size,
        mb_per_s: rounded(speeds.median, 1),
        min: rounded(speeds.min, 1),
        max: rounded(speeds.max, 1),
        runs: runs.len(),
        cpu_s_per_gb: rounded(Spread::of(runs.iter().map(cpu)).unwrap_or(none).median, 3),
        peak_mb_sender: peak(|run| &run.sender),
        peak_mb_receiver: peak(|run| &run.receiver),
        mtu,
        cipher: "TLS_AES_128_GCM_SHA256",
        sink,
    }
}

/// Where files are memory, if there is room for `size` bytes.
fn in_memory(size: u64) -> Option<PathBuf> {
    let dir = PathBuf::from("/dev/shm");
    let free = leasehold_node::host::disk_free(&dir).ok()?;
    // Half of it stays for whoever else is there.
    (free / 2 > size).then_some(dir)
}

/// Bytes that do not repeat or compress, the same every time.
struct Noise {
    bytes: blake3::OutputReader,
    left: u64,
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let (filled, _) = buffer.split_at_mut(len);
        self.bytes.fill(filled);
        self.left -= len as u64;
        Ok(len)
    }
}

/// Puts a payload of `size` bytes into the store at `dir`.
fn prepare(dir: &Path, size: u64) -> anyhow::Result<Root> {
    let store = open(dir)?;
    let bytes = blake3::Hasher::new_derive_key("leasehold bench payload").finalize_xof();
    let imported = store.import(Noise { bytes, left: size }, Declared::Exactly(size));
    Ok(imported.context("cannot make the payload")?.root)
}

fn open(dir: &Path) -> anyhow::Result<PayloadStore> {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    PayloadStore::open_dir(dir, limits)
        .with_context(|| format!("cannot open the payload store at {}", dir.display()))
}

/// One transfer over the data plane.
fn leasehold(held: &Path, target: &Path, root: Root, size: u64) -> anyhow::Result<Run> {
    let store = temporary(target)?;
    let mut sender = Process::start(&["serve".as_ref(), held.as_os_str()])?;
    let Listens { address, key } = sender.says(limit(0))?;
    let (root, address) = (root.to_string(), address.to_string());
    let mut receiver = Process::start(&[
        "fetch".as_ref(),
        store.path().as_os_str(),
        address.as_ref(),
        key.as_ref(),
        root.as_ref(),
        size.to_string().as_ref(),
    ])?;
    finish(&mut sender, &mut receiver, size)
}

/// One transfer over QUIC alone.
fn quinn_alone(size: u64) -> anyhow::Result<Run> {
    let mut sender = Process::start(&["raw-serve".as_ref()])?;
    let Listens { address, .. } = sender.says(limit(0))?;
    let (address, asked) = (address.to_string(), size.to_string());
    let mut receiver = Process::start(&["raw-fetch".as_ref(), address.as_ref(), asked.as_ref()])?;
    finish(&mut sender, &mut receiver, size)
}

fn finish(sender: &mut Process, receiver: &mut Process, size: u64) -> anyhow::Result<Run> {
    let received: Ended = receiver.says(limit(size)).context("the receiver")?;
    sender.stdin.take();
    let sent: Ended = sender.says(limit(0)).context("the sender")?;
    Ok(Run { sender: sent, receiver: received })
}

/// A side in its own process. It ends when its standard input does, and at the latest when this
/// is dropped.
struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: std::sync::mpsc::Receiver<io::Result<String>>,
}

impl Process {
    fn start(args: &[&std::ffi::OsStr]) -> anyhow::Result<Self> {
        let this = std::env::current_exe().context("cannot find this program's own file")?;
        let mut child = Command::new(this)
            .args(["bench", "payload-side"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a process")?;
        let stdin = child.stdin.take();
        let (lines, heard) = std::sync::mpsc::sync_channel(4);
        let process = Self { child, stdin, lines: heard };
        Ok(process.reading(lines))
    }

    fn reading(mut self, lines: std::sync::mpsc::SyncSender<io::Result<String>>) -> Self {
        if let Some(stdout) = self.child.stdout.take() {
            // Reads on a thread of its own, so that a side that hangs is met by a deadline. Ends
            // with the process.
            std::thread::spawn(move || read_lines(stdout, &lines));
        }
        self
    }

    /// The next line it says.
    fn says<T: DeserializeOwned>(&mut self, within: Duration) -> anyhow::Result<T> {
        match self.lines.recv_timeout(within) {
            Ok(text) => {
                let text = text.context("cannot read what a process says")?;
                serde_json::from_str(&text).with_context(|| format!("it said {text:?}"))
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                bail!("a process said nothing within {} s", within.as_secs())
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                bail!("a process ended early; its own message is above")
            }
        }
    }
}

fn read_lines(stdout: ChildStdout, lines: &std::sync::mpsc::SyncSender<io::Result<String>>) {
    // A line of ours has some hundred bytes.
    for text in BufReader::new(stdout.take(1 << 16)).lines() {
        if lines.send(text).is_err() {
            return;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stdin.take();
        // Whoever has ended well is only reaped by this.
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs one side.
pub(super) fn run_side(side: Side) -> anyhow::Result<()> {
    // Like the data plane's own thread: all that is not the disk on one.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let orphaned = std::thread::spawn(end_of_input);
    runtime.block_on(async move {
        match side.role {
            Role::Serve { store } => serve(&store, orphaned).await,
            Role::Fetch { store, address, key, root, size } => {
                fetch(&store, address, &key, root, size).await
            }
            Role::RawServe => raw_serve(orphaned).await,
            Role::RawFetch { address, size } => raw_fetch(address, size).await,
        }
    })
}

/// Returns when whoever started this process wants it to end, or is gone.
fn end_of_input() {
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
}

async fn ended(input: std::thread::JoinHandle<()>) {
    let _ = tokio::task::spawn_blocking(move || input.join()).await;
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

async fn serve(store: &Path, input: std::thread::JoinHandle<()>) -> anyhow::Result<()> {
    let config = DataConfig::new(loopback());
    let (data, _arriving) = Data::start(config, SENDER, open(store)?, Arc::new(|_| true))?;
    let before = machine::cpu_s();
    let start = Instant::now();
    line(&Listens { address: data.local_addr(), key: hex(&data.public_key()) })?;
    ended(input).await;
    line(&Ended {
        seconds: start.elapsed().as_secs_f64(),
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: None,
    })
}

async fn fetch(
    store: &Path,
    address: SocketAddr,
    key: &str,
    root: Root,
    size: u64,
) -> anyhow::Result<()> {
    let config = DataConfig::new(loopback());
    let (data, _arriving) = Data::start(config, RECEIVER, open(store)?, Arc::new(|_| true))?;
    let key = unhex(key).context("the sender's key is no key")?;
    let before = machine::cpu_s();
    let start = Instant::now();
    let holders = vec![Holder { key, addresses: vec![address], whole: true }];
    data.fetch(holders, root, size, |_| {}).await?;
    line(&Ended {
        seconds: start.elapsed().as_secs_f64(),
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: None,
    })
}

fn hex(bytes: &[u8; 32]) -> String {
    Root::from_bytes(*bytes).to_string()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    text.parse::<Root>().ok().map(|bytes| *bytes.as_bytes())
}

/// Serves one connection, and on it one stream.
async fn raw_serve(input: std::thread::JoinHandle<()>) -> anyhow::Result<()> {
    let settings = DataConfig::new(loopback());
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(server_tls()?));
    let mut transport = transport();
    transport.send_window(settings.windows.send.into());
    config.transport_config(Arc::new(transport)).migration(false);
    let socket = socket(&settings)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint =
        quinn::Endpoint::new(quinn::EndpointConfig::default(), Some(config), socket, runtime)?;
    let before = machine::cpu_s();
    let start = Instant::now();
    line(&Listens { address: endpoint.local_addr()?, key: String::new() })?;
    let connection = endpoint.accept().await.context("the endpoint is closed")?.await?;
    let (mut send, mut recv) = connection.accept_bi().await?;
    let mut asked = [0; 8];
    recv.read_exact(&mut asked).await?;
    let mut left = u64::from_le_bytes(asked);
    let mut buffer = vec![0; BUFFER];
    blake3::Hasher::new().finalize_xof().fill(&mut buffer);
    let buffer = Bytes::from(buffer);
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(BUFFER);
        send.write_chunk(buffer.slice(..len)).await?;
        left -= len as u64;
    }
    send.finish()?;
    ended(input).await;
    line(&Ended {
        seconds: start.elapsed().as_secs_f64(),
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: Some(connection.stats().path.current_mtu),
    })
}

async fn raw_fetch(address: SocketAddr, size: u64) -> anyhow::Result<()> {
    let settings = DataConfig::new(loopback());
    let mut config = quinn::ClientConfig::new(Arc::new(client_tls()?));
    let mut transport = transport();
    transport
        .stream_receive_window(settings.windows.stream_receive.into())
        .receive_window(settings.windows.receive.into());
    config.transport_config(Arc::new(transport));
    let socket = socket(&settings)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint = quinn::Endpoint::new(quinn::EndpointConfig::default(), None, socket, runtime)?;
    let before = machine::cpu_s();
    let start = Instant::now();
    let connection = endpoint.connect_with(config, address, "localhost")?.await?;
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&size.to_le_bytes()).await?;
    send.finish()?;
    let mut received = 0;
    let mut chunks = [const { Bytes::new() }; 64];
    while let Some(count) = recv.read_chunks(&mut chunks).await? {
        received += chunks.iter().take(count).map(Bytes::len).sum::<usize>() as u64;
    }
    ensure!(received == size, "{received} bytes came of {size}");
    line(&Ended {
        seconds: start.elapsed().as_secs_f64(),
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: Some(connection.stats().path.current_mtu),
    })
}

/// What the data plane sets for both sides (node/src/data.rs): the rest is quinn's default there,
/// too.
fn transport() -> quinn::TransportConfig {
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(128 << 10);
    let mut transport = quinn::TransportConfig::default();
    transport
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(congestion))
        .allow_spin(false);
    transport
}

fn socket(settings: &DataConfig) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(settings.socket_buffer)?;
    socket.set_send_buffer_size(settings.socket_buffer)?;
    socket.bind(&settings.listen.into())?;
    Ok(socket.into())
}

/// The cipher that the data plane prefers.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![ring::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..ring::default_provider()
    })
}

/// A key without a certificate (RFC 7250): the handshake is a millisecond of each run.
fn key(seed: &[u8; 32]) -> anyhow::Result<Arc<CertifiedKey>> {
    // RFC 8410 section 7: an Ed25519 private key in PKCS#8.
    let mut der = vec![
        0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04,
        0x20,
    ];
    der.extend_from_slice(seed);
    let key = ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(der))?;
    let public = key.public_key().context("the key has no public form")?;
    let public = CertificateDer::from(public.to_vec());
    Ok(Arc::new(CertifiedKey::new(vec![public], key)))
}

fn server_tls() -> anyhow::Result<QuicServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key(&SENDER)?)));
    config.send_tls13_tickets = 0;
    Ok(QuicServerConfig::try_from(config)?)
}

fn client_tls() -> anyhow::Result<QuicClientConfig> {
    let expected = key(&SENDER)?.cert.first().context("no key")?.clone();
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Expected(expected)))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(QuicClientConfig::try_from(config)?)
}

/// Takes the one key that the sender has.
#[derive(Debug)]
struct Expected(CertificateDer<'static>);

impl ServerCertVerifier for Expected {
    fn verify_server_cert(
        &self,
        found: &CertificateDer<'_>,
        _more: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if found.as_ref() == self.0.as_ref() {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General("another key answered than the sender's".into()))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature_with_raw_key(
            message,
            &SubjectPublicKeyInfoDer::from(certificate.as_ref()),
            signed,
            &ring::default_provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_of_its_size_and_does_not_repeat() {
        let bytes = blake3::Hasher::new().finalize_xof();
        let mut read = Vec::new();
        Noise { bytes, left: 100_000 }.read_to_end(&mut read).expect("reads");
        assert_eq!(read.len(), 100_000);
        assert_ne!(read[..50_000], read[50_000..]);
    }

    #[test]
    fn sizes_have_bounds() {
        for (text, wanted) in [("1", Some(1)), ("1G", Some(1 << 30)), ("0", None), ("2T", None)] {
            assert_eq!(size(text).ok(), wanted, "{text}");
        }
    }
}
