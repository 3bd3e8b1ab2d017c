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
//! take turns, so that what else happens on the machine hits both alike. With `--case memory` the
//! receiver drops what it has verified, and writes nothing.
//!
//! Two more cases have more processes: `holders`, one receiver and several senders that each send
//! so much a second at most, beside the sum of that; `fan-out`, one sender and several receivers
//! that know of each other, and how many copies of the payload the sender sends.

use std::{
    io::{self, BufRead as _, BufReader, Read, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};
use leasehold_node::{
    data::{Data, DataConfig, Holder, socket},
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

use super::{
    Spread, iroh, line, machine, rounded,
    scp::{self, OpenSsh},
    temporary,
};

/// How long one transfer may take before the benchmark gives up: 4 MB/s and half a minute.
pub(super) fn limit(size: u64) -> Duration {
    Duration::from_secs(30 + size / 4_000_000)
}

/// How often a receiver is told again who else there is.
const LOOK: Duration = Duration::from_secs(1);

/// What raw QUIC sends, again and again.
const BUFFER: usize = 1 << 20;

/// The key of raw QUIC's sender, and of the side with number one. Nothing is kept under such keys
/// but what the benchmark made up.
const SENDER: [u8; 32] = [1; 32];

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
    /// What to measure.
    #[arg(long, value_enum, default_value_t = Case::File)]
    case: Case,
    /// Senders of `holders`, receivers of `fan-out`.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=32))]
    hosts: u32,
    /// The largest packets, in bytes of UDP payload: 1452 is what fits Ethernet's usual frames.
    #[arg(long, default_value_t = DataConfig::MTU, value_parser = clap::value_parser!(u16).range(1_200..))]
    mtu: u16,
    /// The program of `iroh-blobs`.
    #[arg(long, default_value = iroh::PROGRAM)]
    peer: PathBuf,
    /// Bytes a second that each sends at most, in `holders` and, if said, in `fan-out`.
    #[arg(long, value_parser = size)]
    upload: Option<u64>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Memory to a verified file, synced, beside raw QUIC.
    File,
    /// Memory to verified bytes that are dropped, beside raw QUIC.
    Memory,
    /// Several holders of limited speed, to one.
    Holders,
    /// One holder, to several that feed each other.
    FanOut,
    /// A file to a verified file, synced, beside scp with the same cipher.
    Scp,
    /// The same beside iroh-blobs, from one file store to another.
    IrohBlobs,
}

fn size(text: &str) -> Result<u64, String> {
    let size = leasehold_node::quantity::bytes(text)?;
    let bounds = 1..=1 << 40;
    if bounds.contains(&size) { Ok(size) } else { Err("expected 1 byte to 1 TiB".into()) }
}

/// One side of a transfer, in a process of its own.
#[derive(Debug, Args)]
pub(super) struct Side {
    /// The largest packets.
    #[arg(long)]
    mtu: u16,
    /// Whether what arrives is dropped once it is verified.
    #[arg(long)]
    discard: bool,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serves the payloads in `store` on the data plane, as the node with this number.
    Serve { store: PathBuf, number: u8, upload: Option<u64> },
    /// Fetches a payload into `store`, from the holders that are said on standard input, and serves
    /// it.
    Fetch { store: PathBuf, number: u8, root: Root, size: u64, upload: Option<u64> },
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
    /// Bytes of payloads that it sent.
    #[serde(default)]
    sent: u64,
    cpu_s: f64,
    peak_mb: Option<f64>,
    /// The size of packets that the path was found to take.
    mtu: Option<u16>,
}

/// Whom a fetching side is to ask.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    address: SocketAddr,
    key: String,
    /// Whether it has the payload already.
    whole: bool,
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

#[derive(Debug, Serialize)]
struct PeerLine {
    bench: &'static str,
    case: &'static str,
    peer: &'static str,
    version: String,
    cipher: &'static str,
    size: u64,
    mb_per_s: f64,
    peer_mb_per_s: f64,
    /// The medians' ratio; the least and most of runs next to each other.
    ratio: f64,
    min: f64,
    max: f64,
    runs: usize,
}

#[derive(Debug, Serialize)]
struct SeveralLine {
    bench: &'static str,
    case: &'static str,
    peer: &'static str,
    hosts: u32,
    size: u64,
    mb_per_s: f64,
    min: f64,
    max: f64,
    peer_mb_per_s: f64,
    ratio: f64,
    runs: usize,
    peak_mb_receiver: Option<f64>,
}

#[derive(Debug, Serialize)]
struct FanOutLine {
    bench: &'static str,
    case: &'static str,
    hosts: u32,
    size: u64,
    /// Bytes that the origin sent, by the payload's size: median, least and most.
    copies_of_origin: f64,
    min: f64,
    max: f64,
    /// Until the last had it, median.
    seconds: f64,
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
    let target = match options.case {
        Case::File | Case::Scp | Case::IrohBlobs => temporary(&base)?,
        _ => temporary(memory.as_deref().unwrap_or(&base))?,
    };
    let root = prepare(held.path(), size)?;
    let payload = Payload {
        held: held.path(),
        target: target.path(),
        root,
        size,
        mtu: options.mtu,
        discard: options.case == Case::Memory,
    };
    match options.case {
        Case::File | Case::Memory => beside_quinn(options, &payload),
        Case::Holders => from_several(options, &payload),
        Case::FanOut => to_several(options, &payload),
        Case::Scp => beside_scp(options, &payload),
        Case::IrohBlobs => beside_iroh(options, &payload),
    }
}

/// What is moved, from where to where.
struct Payload<'a> {
    held: &'a Path,
    target: &'a Path,
    root: Root,
    size: u64,
    mtu: u16,
    /// Whether receivers drop what they have verified.
    discard: bool,
}

impl Payload<'_> {
    /// The file with its bytes.
    fn data(&self) -> PathBuf {
        self.held.join(format!("{}.data", self.root))
    }
}

fn beside_quinn(options: &Options, payload: &Payload<'_>) -> anyhow::Result<()> {
    let (size, runs) = (payload.size, options.runs as usize);
    let (mut ours, mut raw) = (Vec::with_capacity(runs), Vec::with_capacity(runs));
    for turn in 0..options.runs {
        for ours_is_next in in_turn(turn) {
            if ours_is_next {
                ours.push(leasehold(payload)?);
            } else {
                raw.push(quinn_alone(payload.mtu, size)?);
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
    let sink = match payload.discard {
        true => "verified, dropped".to_owned(),
        false => format!("verified file on {}, synced", machine::file_system(payload.target)),
    };
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

/// Whether ours goes first, and second: who does takes turns.
const fn in_turn(turn: u32) -> [bool; 2] {
    [turn.is_multiple_of(2), !turn.is_multiple_of(2)]
}

fn beside_scp(options: &Options, payload: &Payload<'_>) -> anyhow::Result<()> {
    let Some(ssh) = OpenSsh::find() else {
        bail!("there is no OpenSSH server and client here: apt-get install openssh-server")
    };
    let server = ssh.start(payload.target)?;
    let from = payload.data();
    let to = payload.target.join("copied");
    let peer = Peer { name: scp::NAME, version: ssh.version, cipher: scp::CIPHER };
    beside(options, payload, peer, || {
        let seconds = server.copy(&from, &to)?;
        std::fs::remove_file(&to)?;
        Ok(seconds)
    })
}

fn beside_iroh(options: &Options, payload: &Payload<'_>) -> anyhow::Result<()> {
    let serving = iroh::Serving::start(&options.peer, &payload.data(), payload.held)?;
    let version = iroh::VERSION.to_owned();
    let peer = Peer { name: iroh::NAME, version, cipher: iroh::CIPHER };
    beside(options, payload, peer, || serving.fetch(payload.target, payload.size))
}

/// What else moves the same bytes.
struct Peer {
    name: &'static str,
    version: String,
    cipher: &'static str,
}

/// Ours and a peer take turns; `theirs` gives the seconds that it took.
fn beside(
    options: &Options,
    payload: &Payload<'_>,
    peer: Peer,
    mut theirs: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<()> {
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    let mb = payload.size as f64 / 1e6;
    for turn in 0..options.runs {
        for ours_is_next in in_turn(turn) {
            if ours_is_next {
                ours.push(speed(&leasehold(payload)?, payload.size));
            } else {
                others.push(mb / theirs()?);
            }
        }
        let last = |runs: &[f64]| runs.last().copied().unwrap_or_default();
        let (ours, theirs) = (last(&ours), last(&others));
        eprintln!("run {}: leasehold {ours:.0} MB/s, {} {theirs:.0} MB/s", turn + 1, peer.name);
    }
    let pairs = Spread::of(ours.iter().zip(&others).map(|(a, b)| a / b));
    let pairs = pairs.context("there was no run")?;
    let median = |runs: Vec<f64>| Spread::of(runs).map_or(0.0, |spread| spread.median);
    let (ours, theirs) = (median(ours), median(others));
    line(&PeerLine {
        bench: "payload",
        case: peer.name,
        peer: peer.name,
        version: peer.version,
        cipher: peer.cipher,
        size: payload.size,
        mb_per_s: rounded(ours, 1),
        peer_mb_per_s: rounded(theirs, 1),
        ratio: rounded(ours / theirs, 3),
        min: rounded(pairs.min, 3),
        max: rounded(pairs.max, 3),
        runs: options.runs as usize,
    })
}

/// One receiver, and several senders that each send so much a second at most.
fn from_several(options: &Options, payload: &Payload<'_>) -> anyhow::Result<()> {
    let upload = options.upload.unwrap_or(50_000_000);
    let (mut speeds, mut peaks) = (Vec::new(), Vec::new());
    for turn in 1..=options.runs {
        let mut senders = Vec::new();
        let mut known = Vec::new();
        for number in 1..=options.hosts {
            // Each has it all, in the same files.
            let copy = temporary(payload.target)?;
            link(payload, copy.path())?;
            let (sender, listens) = sending(payload.mtu, copy.path(), number, Some(upload))?;
            known.push(Known { address: listens.address, key: listens.key, whole: true });
            senders.push((sender, copy));
        }
        let store = temporary(payload.target)?;
        let mut receiver = fetching(store.path(), 0, payload, None)?.0;
        receiver.tell(&known)?;
        let ended: Ended = receiver.says(limit(payload.size)).context("the receiver")?;
        let speed = payload.size as f64 / 1e6 / ended.seconds;
        eprintln!("run {turn} of {}: {speed:.0} MB/s", options.runs);
        speeds.push(speed);
        peaks.extend(ended.peak_mb);
    }
    let sum = f64::from(options.hosts) * upload as f64 / 1e6;
    let speeds = Spread::of(speeds).context("there was no run")?;
    line(&SeveralLine {
        bench: "payload",
        case: "holders",
        peer: "the sum of what they may send",
        hosts: options.hosts,
        size: payload.size,
        mb_per_s: rounded(speeds.median, 1),
        min: rounded(speeds.min, 1),
        max: rounded(speeds.max, 1),
        peer_mb_per_s: rounded(sum, 1),
        ratio: rounded(speeds.median / sum, 3),
        runs: options.runs as usize,
        peak_mb_receiver: Spread::of(peaks).map(|peaks| rounded(peaks.max, 1)),
    })
}

/// One sender, and several receivers that know of each other.
fn to_several(options: &Options, payload: &Payload<'_>) -> anyhow::Result<()> {
    let (mut copies, mut took) = (Vec::new(), Vec::new());
    for turn in 1..=options.runs {
        let (mut origin, listens) = sending(payload.mtu, payload.held, 1, options.upload)?;
        let origin_known = Known { address: listens.address, key: listens.key, whole: true };
        let mut receivers = Vec::new();
        let mut all = vec![origin_known];
        for number in 0..options.hosts {
            let store = temporary(payload.target)?;
            let (receiver, listens) = fetching(store.path(), number + 2, payload, options.upload)?;
            all.push(Known { address: listens.address, key: listens.key, whole: false });
            receivers.push((receiver, store));
        }
        for (receiver, _) in &mut receivers {
            receiver.tell(&all)?;
        }
        let mut last: f64 = 0.0;
        for (receiver, _) in &mut receivers {
            // They share the machine.
            let within = limit(payload.size.saturating_mul(options.hosts.into()));
            let ended: Ended = receiver.says(within).context("a receiver")?;
            last = last.max(ended.seconds);
        }
        drop(receivers);
        origin.stdin.take();
        let ended: Ended = origin.says(limit(0)).context("the origin")?;
        let sent = ended.sent as f64 / payload.size as f64;
        eprintln!("run {turn} of {}: {sent:.2} copies, all after {last:.1} s", options.runs);
        copies.push(sent);
        took.push(last);
    }
    let copies = Spread::of(copies).context("there was no run")?;
    line(&FanOutLine {
        bench: "payload",
        case: "fan-out",
        hosts: options.hosts,
        size: payload.size,
        copies_of_origin: rounded(copies.median, 2),
        min: rounded(copies.min, 2),
        max: rounded(copies.max, 2),
        seconds: rounded(Spread::of(took).map_or(0.0, |took| took.median), 2),
        runs: options.runs as usize,
    })
}

/// Another store with the same payload, in the same files.
fn link(payload: &Payload<'_>, to: &Path) -> anyhow::Result<()> {
    for ending in ["data", "outboard"] {
        let name = format!("{}.{ending}", payload.root);
        let (from, to) = (payload.held.join(&name), to.join(&name));
        if std::fs::hard_link(&from, &to).is_err() {
            std::fs::copy(&from, &to).with_context(|| format!("cannot copy {name}"))?;
        }
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
    open_to(dir, false)
}

fn open_to(dir: &Path, discard: bool) -> anyhow::Result<PayloadStore> {
    let limits = Limits { keep_free: 0, discard, ..Limits::default() };
    PayloadStore::open_dir(dir, limits)
        .with_context(|| format!("cannot open the payload store at {}", dir.display()))
}

/// One transfer over the data plane.
fn leasehold(payload: &Payload<'_>) -> anyhow::Result<Run> {
    let store = temporary(payload.target)?;
    let (mut sender, Listens { address, key }) = sending(payload.mtu, payload.held, 1, None)?;
    let mut receiver = fetching(store.path(), 2, payload, None)?.0;
    receiver.tell(&[Known { address, key, whole: true }])?;
    finish(&mut sender, &mut receiver, payload.size)
}

/// Starts a side that serves, with this number.
fn sending(
    mtu: u16,
    store: &Path,
    number: u32,
    upload: Option<u64>,
) -> anyhow::Result<(Process, Listens)> {
    let (number, upload) = (number.to_string(), upload.map(|rate| rate.to_string()));
    let mut args = vec!["serve".as_ref(), store.as_os_str(), number.as_ref()];
    args.extend(upload.as_deref().map(std::ffi::OsStr::new));
    let mut process = Process::start(mtu, false, &args)?;
    let listens = process.says(limit(0))?;
    Ok((process, listens))
}

/// Starts a side that fetches once it is told from whom.
fn fetching(
    store: &Path,
    number: u32,
    payload: &Payload<'_>,
    upload: Option<u64>,
) -> anyhow::Result<(Process, Listens)> {
    let (number, root, size) =
        (number.to_string(), payload.root.to_string(), payload.size.to_string());
    let upload = upload.map(|rate| rate.to_string());
    let mut args =
        vec!["fetch".as_ref(), store.as_os_str(), number.as_ref(), root.as_ref(), size.as_ref()];
    args.extend(upload.as_deref().map(std::ffi::OsStr::new));
    let mut process = Process::start(payload.mtu, payload.discard, &args)?;
    let listens = process.says(limit(0))?;
    Ok((process, listens))
}

/// One transfer over QUIC alone.
fn quinn_alone(mtu: u16, size: u64) -> anyhow::Result<Run> {
    let mut sender = Process::start(mtu, false, &["raw-serve".as_ref()])?;
    let Listens { address, .. } = sender.says(limit(0))?;
    let (address, asked) = (address.to_string(), size.to_string());
    let args = ["raw-fetch".as_ref(), address.as_ref(), asked.as_ref()];
    let mut receiver = Process::start(mtu, false, &args)?;
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
pub(super) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: std::sync::mpsc::Receiver<io::Result<String>>,
}

impl Process {
    fn start(mtu: u16, discard: bool, args: &[&std::ffi::OsStr]) -> anyhow::Result<Self> {
        let this = std::env::current_exe().context("cannot find this program's own file")?;
        let mtu = mtu.to_string();
        let mut all = vec!["bench".as_ref(), "payload-side".as_ref()];
        all.extend(["--mtu".as_ref(), std::ffi::OsStr::new(&mtu)]);
        if discard {
            all.push("--discard".as_ref());
        }
        all.extend(args);
        Self::start_program(&this, &all)
    }

    /// Starts another program that behaves as a side does.
    pub(super) fn start_program(program: &Path, args: &[&std::ffi::OsStr]) -> anyhow::Result<Self> {
        let mut child = Command::new(program)
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

    /// Tells it whom to ask.
    fn tell(&mut self, known: &[Known]) -> anyhow::Result<()> {
        let mut text = serde_json::to_string(known)?;
        text.push('\n');
        let stdin = self.stdin.as_mut().context("it is told no more")?;
        stdin.write_all(text.as_bytes()).context("cannot tell a process whom to ask")
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
    pub(super) fn says<T: DeserializeOwned>(&mut self, within: Duration) -> anyhow::Result<T> {
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
    let (lines, told) = tokio::sync::mpsc::channel(1);
    let orphaned = std::thread::spawn(move || end_of_input(&lines));
    let Side { mtu, discard, role } = side;
    runtime.block_on(async move {
        match role {
            Role::Serve { store, number, upload } => {
                serve(&store, Plane { mtu, discard, number, upload }, orphaned).await
            }
            Role::Fetch { store, number, root, size, upload } => {
                let how = Plane { mtu, discard, number, upload };
                fetch(&store, how, (root, size), told, orphaned).await
            }
            Role::RawServe => raw_serve(mtu, orphaned).await,
            Role::RawFetch { address, size } => raw_fetch(mtu, address, size).await,
        }
    })
}

/// Passes on what is said on standard input. Returns when whoever started this process wants it to
/// end, or is gone.
fn end_of_input(lines: &tokio::sync::mpsc::Sender<String>) {
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        let _ = lines.blocking_send(line);
    }
}

async fn ended(input: std::thread::JoinHandle<()>) {
    let _ = tokio::task::spawn_blocking(move || input.join()).await;
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

/// How the data plane of a side runs.
#[derive(Clone, Copy)]
struct Plane {
    mtu: u16,
    discard: bool,
    number: u8,
    upload: Option<u64>,
}

fn settings(mtu: u16) -> DataConfig {
    let mut settings = DataConfig::new(loopback());
    settings.mtu = mtu;
    settings
}

fn plane(store: &Path, plane: Plane) -> anyhow::Result<Data> {
    let Plane { mtu, discard, number, upload } = plane;
    let mut config = settings(mtu);
    config.upload_rate = upload;
    let store = open_to(store, discard)?;
    let (data, _arriving) = Data::start(config, [number; 32], store, Arc::new(|_| true))?;
    Ok(data)
}

async fn serve(store: &Path, how: Plane, input: std::thread::JoinHandle<()>) -> anyhow::Result<()> {
    let data = plane(store, how)?;
    let before = machine::cpu_s();
    let start = Instant::now();
    line(&Listens { address: data.local_addr(), key: hex(&data.public_key()) })?;
    ended(input).await;
    line(&Ended {
        seconds: start.elapsed().as_secs_f64(),
        sent: data.stats().payload_sent,
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: None,
    })
}

/// Fetches when it is told from whom, and serves what it has until its input ends.
async fn fetch(
    store: &Path,
    how: Plane,
    (root, size): (Root, u64),
    mut told: tokio::sync::mpsc::Receiver<String>,
    input: std::thread::JoinHandle<()>,
) -> anyhow::Result<()> {
    let data = plane(store, how)?;
    line(&Listens { address: data.local_addr(), key: hex(&data.public_key()) })?;
    let known = told.recv().await.context("nobody said whom to ask")?;
    let known: Vec<Known> =
        serde_json::from_str(&known).context("whom to ask is not understood")?;
    let holder = |Known { address, key, whole }: Known| {
        let key = unhex(&key).context("a holder's key is no key")?;
        Ok(Holder { key, addresses: vec![address], whole })
    };
    let holders = known.into_iter().map(holder).collect::<anyhow::Result<Vec<_>>>()?;
    let before = machine::cpu_s();
    let start = Instant::now();
    // As a node looks for others by gossip while it fetches.
    let naming = async {
        loop {
            tokio::time::sleep(LOOK).await;
            data.name_holders(root, size, holders.clone());
        }
    };
    tokio::select! {
        fetched = data.fetch(holders.clone(), root, size, |_| {}) => { fetched?; },
        never = naming => never,
    }
    line(&Ended {
        seconds: start.elapsed().as_secs_f64(),
        sent: data.stats().payload_sent,
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: None,
    })?;
    ended(input).await;
    Ok(())
}

fn hex(bytes: &[u8; 32]) -> String {
    Root::from_bytes(*bytes).to_string()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    text.parse::<Root>().ok().map(|bytes| *bytes.as_bytes())
}

/// Serves one connection, and on it one stream.
async fn raw_serve(mtu: u16, input: std::thread::JoinHandle<()>) -> anyhow::Result<()> {
    let settings = settings(mtu);
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(server_tls()?));
    let mut transport = transport(&settings);
    transport.send_window(settings.windows.send.into());
    config.transport_config(Arc::new(transport)).migration(false);
    let socket = socket::for_quinn(socket::open(&settings)?)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint_config = endpoint_config(&settings)?;
    let endpoint =
        quinn::Endpoint::new_with_abstract_socket(endpoint_config, Some(config), socket, runtime)?;
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
        sent: 0,
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: Some(connection.stats().path.current_mtu),
    })
}

async fn raw_fetch(mtu: u16, address: SocketAddr, size: u64) -> anyhow::Result<()> {
    let settings = settings(mtu);
    let mut config = quinn::ClientConfig::new(Arc::new(client_tls()?));
    let mut transport = transport(&settings);
    transport
        .stream_receive_window(settings.windows.stream_receive.into())
        .receive_window(settings.windows.receive.into());
    config.transport_config(Arc::new(transport));
    let socket = socket::for_quinn(socket::open(&settings)?)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint_config = endpoint_config(&settings)?;
    let endpoint =
        quinn::Endpoint::new_with_abstract_socket(endpoint_config, None, socket, runtime)?;
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
        sent: 0,
        cpu_s: machine::cpu_s() - before,
        peak_mb: machine::peak_mb(),
        mtu: Some(connection.stats().path.current_mtu),
    })
}

/// What the data plane sets for both sides (node/src/data.rs): the rest is quinn's default there,
/// too.
fn transport(settings: &DataConfig) -> quinn::TransportConfig {
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(128 << 10);
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(settings.mtu);
    let mut transport = quinn::TransportConfig::default();
    transport
        .mtu_discovery_config(Some(discovery))
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(congestion))
        .allow_spin(false);
    transport
}

/// What both sides set of the endpoint.
fn endpoint_config(settings: &DataConfig) -> anyhow::Result<quinn::EndpointConfig> {
    let mut config = quinn::EndpointConfig::default();
    config.max_udp_payload_size(settings.mtu)?;
    Ok(config)
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
