//! etcd, the peer of the benchmark of leases: one member with its own defaults, as a process of its
//! own, asked over gRPC.
//!
//! ```text
//! client --HTTP/2--> etcd        LeaseGrant   raft entry, WAL synced, applied
//!        <-- lease --
//!        -- Put under it -->     Put          raft entry, WAL synced, applied
//! ```
//!
//! What is said is a handful of small messages of its version 3 API, encoded here by hand: only
//! numbers and byte strings, of protobuf's wire format.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use hyper::{HeaderMap, Method, Request, StatusCode};
use tempfile::TempDir;
use tokio::{net::TcpStream, time::timeout};

use super::{
    api::{Door, metric},
    load::Client,
    peer::{self, Running},
    temporary,
};
use crate::fleet::{Usage, usage};

/// What it is called in the lines.
pub(super) const NAME: &str = "etcd";
/// How long it may take to start.
const STARTS: Duration = Duration::from_secs(30);
/// How often it is asked meanwhile.
const LOOK: Duration = Duration::from_millis(20);
/// How often it may find that a port was taken meanwhile.
const TRIES: usize = 3;
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(20);
/// What is put under a lease.
const VALUE: [u8; 64] = [b'v'; 64];
/// The longest answer that is read.
const MAX_ANSWER: usize = 64 << 10;

/// An etcd that is installed.
#[derive(Debug)]
pub(super) struct Etcd {
    pub(super) version: String,
}

impl Etcd {
    /// The one on the PATH, if there is one.
    pub(super) fn find() -> Option<Self> {
        let output = Command::new(NAME).arg("--version").stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.lines().find_map(|line| line.strip_prefix("etcd Version: "))?;
        Some(Self { version: version.trim().to_owned() })
    }

    /// Starts a member of its own, whose data are below `base`, and waits until it makes leases.
    pub(super) async fn start(&self, base: &Path) -> anyhow::Result<Member> {
        for _ in 1..TRIES {
            match self.try_start(base).await {
                Err(error) => eprintln!("{error:#}; once more"),
                started => return started,
            }
        }
        self.try_start(base).await
    }

    async fn try_start(&self, base: &Path) -> anyhow::Result<Member> {
        let dir = temporary(base)?;
        // It takes no port 0. Two that were free just now are most likely free still.
        let free: Vec<_> = (0..2)
            .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .collect::<io::Result<_>>()?;
        let at: Vec<_> = free.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
        drop(free);
        let [at, others] = at[..] else { bail!("two sockets have two addresses") };
        let (url, others) = (format!("http://{at}"), format!("http://{others}"));
        let log = dir.path().join("log");
        let mut command = peer::command(NAME);
        command.args(["--name", "peer", "--logger", "zap", "--log-outputs", "stderr"]);
        command.arg("--data-dir").arg(dir.path().join("data"));
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        command.args(["--listen-peer-urls", &others, "--initial-advertise-peer-urls", &others]);
        command.args(["--initial-cluster", &format!("peer={others}")]);
        // It takes settings from the environment, too.
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"ETCD_") {
                command.env_remove(name);
            }
        }
        let log_file = File::create(&log).context("etcd's log")?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file).process_group(0);
        let process = Running::start(&mut command).context("cannot start etcd")?;
        let mut member = Member { process, at, dir };
        member.ready().await.with_context(|| format!("etcd at {at}"))?;
        Ok(member)
    }
}

/// A member that runs.
#[derive(Debug)]
pub(super) struct Member {
    // Its data go with it.
    process: Running,
    at: SocketAddr,
    dir: TempDir,
}

impl Member {
    async fn ready(&mut self) -> anyhow::Result<()> {
        let (at, log) = (self.at, self.dir.path().join("log"));
        let asked = async || {
            let mut lessee = Lessee { at, calls: dial(at).await?, ttl_s: 600, number: 0 };
            lessee.ask().await.map(drop)
        };
        self.process.answers(&log, (LOOK, STARTS), asked).await
    }

    /// Those who ask it for leases that live for so long; so many of them share a connection.
    pub(super) async fn lessees(
        &self,
        count: usize,
        ttl_s: u64,
        share: usize,
    ) -> anyhow::Result<Vec<Lessee>> {
        let mut lessees = Vec::with_capacity(count);
        let mut calls = dial(self.at).await?;
        for number in 0..count {
            if number > 0 && number % share == 0 {
                calls = dial(self.at).await?;
            }
            // Each has keys of its own.
            let number = (number as u64 + 1) << 40;
            lessees.push(Lessee { at: self.at, calls: calls.clone(), ttl_s, number });
        }
        Ok(lessees)
    }

    /// Where its data are.
    pub(super) fn data(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(super) fn usage(&self) -> Option<Usage> {
        usage(self.process.pid())
    }

    /// How often it has synced its log.
    pub(super) async fn syncs(&self) -> anyhow::Result<Option<f64>> {
        let text = Door::open_to_all(self.at).get("/metrics").await?;
        Ok(metric(&text, "etcd_disk_wal_fsync_duration_seconds_count"))
    }
}

async fn dial(at: SocketAddr) -> anyhow::Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(at).await?;
    stream.set_nodelay(true)?;
    let (calls, connection) = h2::client::handshake(stream).await?;
    // It ends once nobody can call any more; why it broke is what the next call says.
    tokio::spawn(connection);
    Ok(calls)
}

/// One who asks for a lease, and puts something under it.
#[derive(Debug)]
pub(super) struct Lessee {
    at: SocketAddr,
    calls: SendRequest<Bytes>,
    ttl_s: u64,
    /// Of the next key.
    number: u64,
}

impl Lessee {
    async fn call(&mut self, method: &str, message: &[u8]) -> anyhow::Result<Bytes> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://{}/etcdserverpb.{method}", self.at))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let asked = async {
            let mut calls = self.calls.clone().ready().await?;
            let (response, mut body) = calls.send_request(request, false)?;
            body.send_data(framed(message), true)?;
            let response = response.await?;
            ensure!(response.status() == StatusCode::OK, "status {}", response.status());
            let (head, mut stream) = response.into_parts();
            let mut answer = BytesMut::new();
            while let Some(chunk) = stream.data().await {
                let chunk = chunk?;
                stream.flow_control().release_capacity(chunk.len())?;
                ensure!(answer.len() + chunk.len() <= MAX_ANSWER, "the answer is too long");
                answer.extend_from_slice(&chunk);
            }
            let trailers = stream.trailers().await?;
            well(trailers.as_ref().unwrap_or(&head.headers))?;
            unframed(answer.freeze())
        };
        match timeout(ANSWER, asked).await {
            Ok(answer) => answer.with_context(|| method.to_owned()),
            Err(_) => bail!("no answer to {method} within {} s", ANSWER.as_secs()),
        }
    }
}

impl Client for Lessee {
    async fn ask(&mut self) -> anyhow::Result<Option<Instant>> {
        let granted = self.call("Lease/LeaseGrant", &lease_grant(self.ttl_s)).await?;
        let lease = number(&granted, 2).context("a grant without a lease")?;
        self.number += 1;
        let key = self.number.to_be_bytes();
        self.call("KV/Put", &put(&key, &VALUE, lease)).await?;
        Ok(Some(Instant::now()))
    }

    async fn again(&mut self) -> anyhow::Result<()> {
        self.calls = dial(self.at).await?;
        Ok(())
    }
}

/// One message as gRPC frames it: not compressed, its length, itself.
fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(0);
    // Messages of this file are short.
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

fn unframed(mut frame: Bytes) -> anyhow::Result<Bytes> {
    ensure!(frame.len() >= 5 && frame.get_u8() == 0, "not one plain message");
    let length = frame.get_u32();
    ensure!(u32::try_from(frame.len()) == Ok(length), "not one whole message");
    Ok(frame)
}

/// Whether a call went well, by its trailers.
fn well(trailers: &HeaderMap) -> anyhow::Result<()> {
    let text = |name| trailers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        Some("0") => Ok(()),
        Some(status) => bail!("status {status}: {}", text("grpc-message").unwrap_or_default()),
        None => bail!("no status came"),
    }
}

/// `LeaseGrantRequest { TTL = 1 }`; the server chooses the id.
fn lease_grant(ttl_s: u64) -> Vec<u8> {
    let mut message = Vec::new();
    put_number(&mut message, 1, ttl_s);
    message
}

/// `PutRequest { key = 1, value = 2, lease = 3 }`.
fn put(key: &[u8], value: &[u8], lease: u64) -> Vec<u8> {
    let mut message = Vec::new();
    put_bytes(&mut message, 1, key);
    put_bytes(&mut message, 2, value);
    put_number(&mut message, 3, lease);
    message
}

fn put_varint(message: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        message.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    message.push(number as u8);
}

fn put_number(message: &mut Vec<u8>, field: u64, number: u64) {
    put_varint(message, field << 3);
    put_varint(message, number);
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(message, field << 3 | 2);
    put_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = message.split_off_first()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The number in a field of a message.
fn number(mut message: &[u8], field: u64) -> Option<u64> {
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        match tag & 7 {
            0 => {
                let number = varint(&mut message)?;
                if tag >> 3 == field {
                    return Some(number);
                }
            }
            1 => message.split_off(..8).map(drop)?,
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message.split_off(..length).map(drop)?;
            }
            5 => message.split_off(..4).map(drop)?,
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_protobuf_writes_them() {
        assert_eq!(lease_grant(60), [0x08, 60]);
        assert_eq!(lease_grant(300), [0x08, 0xac, 0x02]);
        let message = put(b"k", b"vv", 0x1234);
        assert_eq!(message, [0x0a, 1, b'k', 0x12, 2, b'v', b'v', 0x18, 0xb4, 0x24]);
        assert_eq!(number(&message, 3), Some(0x1234));
        assert_eq!(number(&message, 4), None);
        let mut most = Vec::new();
        put_number(&mut most, 2, u64::MAX);
        assert_eq!(number(&most, 2), Some(u64::MAX));
    }

    #[test]
    fn what_is_cut_short_is_no_message() {
        let message = put(b"key", b"value", 7);
        for length in 0..message.len() {
            assert_eq!(number(&message[..length], 3), None, "{length}");
        }
        let frame = framed(&message);
        assert_eq!(unframed(frame.clone()).expect("whole"), message);
        for length in 0..frame.len() {
            assert!(unframed(frame.slice(..length)).is_err(), "{length}");
        }
    }

    #[test]
    fn only_a_status_of_zero_is_well() {
        let trailers = |status| {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", status);
            trailers
        };
        assert!(well(&trailers("0".parse().expect("a value"))).is_ok());
        assert!(well(&trailers("14".parse().expect("a value"))).is_err());
        assert!(well(&HeaderMap::new()).is_err());
    }
}
