//! Files to and from the node: hashed before they are sent, so that what the node has is not sent
//! again, and checked when they come back.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::future::ready;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use hyper::{Method, StatusCode};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use leasehold_keys::exit::Exit;
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;

use super::output::Out;
use super::{Failure, Session};
use crate::api::body::{Fetching, Uploaded};
use crate::api::want::PayloadText;
use crate::client::{ClientError, escaped};

/// How much is read at once.
const PIECE: usize = 256 * 1024;
/// A download of which nothing came for this long is given up. The node may have to fetch the
/// whole from the lessor before its first byte.
const STALL: Duration = Duration::from_secs(60);
/// How long a download may take to begin.
const BEGIN: Duration = Duration::from_secs(600);
/// The longest line that is read of a fetch.
const MAX_LINE: usize = 64 * 1024;
/// How often a download is tried.
const TRIES: u32 = 3;

/// From how many bytes on the node is asked to clone a file before it is sent.
const CLONED_FROM: u64 = 1 << 20;
/// How many files are asked for, or sent, at once: what each small one waits for is the node's disk.
const AT_ONCE: usize = 8;

/// Bytes of this machine, by their content.
#[derive(Clone, Debug)]
pub(super) struct Local {
    pub(super) source: Source,
    pub(super) payload: PayloadText,
}

/// Where they are.
#[derive(Clone, Debug)]
pub(super) enum Source {
    File(PathBuf),
    Memory(Bytes),
}

impl Local {
    /// Bytes that are in no file.
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        let (root, size) = (blake3::hash(&bytes).to_string(), bytes.len() as u64);
        Self { source: Source::Memory(bytes.into()), payload: PayloadText { root, size } }
    }
}

/// Hashes a file.
pub(super) async fn hash(path: &Path) -> Result<Local, Failure> {
    let of = path.to_path_buf();
    let hashed = tokio::task::spawn_blocking(move || hash_now(&of)).await;
    let hashed = hashed.map_err(io::Error::other).flatten();
    let (root, size) = hashed.map_err(|why| Failure::file("cannot read", path, &why))?;
    let payload = PayloadText { root: root.to_string(), size };
    Ok(Local { source: Source::File(path.into()), payload })
}

fn hash_now(path: &Path) -> io::Result<(blake3::Hash, u64)> {
    let mut file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hasher.finalize(), hasher.count())),
            n => hasher.update(buffer.get(..n).unwrap_or_default()),
        };
    }
}

/// A bar for bytes on standard error; hidden where nobody watches.
pub(super) fn bar(out: &Out, message: &str, size: u64) -> ProgressBar {
    let hidden = !out.watched() || out.json;
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let bar = ProgressBar::with_draw_target(Some(size), target);
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_message(message.to_string());
    bar
}

fn watched(
    source: impl Stream<Item = io::Result<Bytes>>,
    bar: ProgressBar,
) -> impl Stream<Item = io::Result<Bytes>> {
    source.inspect(move |piece| {
        if let Ok(piece) = piece {
            bar.inc(piece.len() as u64);
        }
    })
}

/// Sends what the node does not hold. Gives the bytes that were sent.
pub(super) async fn upload(session: &Session, all: &[Local]) -> Result<u64, Failure> {
    let mut seen = HashSet::new();
    let once = all.iter().filter(|local| seen.insert(&local.payload.root));
    let asked = once.map(|local| async move {
        let path = format!("/v1/payloads/{}", local.payload.root);
        let held = session.client.has(&path).await?;
        Ok::<_, Failure>((!held).then_some(local))
    });
    let asked = stream::iter(asked).buffer_unordered(AT_ONCE);
    let missing: Vec<_> = asked.try_filter_map(|local| ready(Ok(local))).try_collect().await?;
    let total = missing.iter().map(|local| local.payload.size).sum();
    let bar = bar(&session.out, "uploading", total);
    let sent = stream::iter(missing).map(|local| send(session, local, &bar));
    let sent = sent.buffer_unordered(AT_ONCE).try_fold(0, |sum, sent| ready(Ok(sum + sent)));
    let sent = sent.await?;
    bar.finish_and_clear();
    Ok(sent)
}

/// Sends bytes, if the node cannot have the file without. Gives how many.
async fn send(session: &Session, local: &Local, bar: &ProgressBar) -> Result<u64, Failure> {
    let PayloadText { root, size } = &local.payload;
    // A megabyte a second is slow for one's own node.
    let wait = Duration::from_secs(size >> 20);
    let to = format!("/v1/payloads?size={size}");
    let path = match &local.source {
        Source::Memory(bytes) => {
            let source = stream::once(ready(Ok(bytes.clone())));
            let _: Uploaded = session.client.upload(&to, source, wait).await?;
            return Ok(*size);
        }
        Source::File(path) => path,
    };
    // Whatever stands against it, there is the other way.
    if *size >= CLONED_FROM
        && let Ok(whole) = std::fs::canonicalize(path)
        && let Some(whole) = whole.to_str()
    {
        let clone = format!("/v1/payloads/{root}/clone?size={size}&path={}", escaped(whole));
        if session.client.act(Method::POST, &clone, wait).await.is_ok() {
            bar.inc(*size);
            return Ok(0);
        }
    }
    let opened = tokio::fs::File::open(path).await;
    let opened = opened.map_err(|why| Failure::file("cannot read", path, &why))?;
    let source = watched(ReaderStream::with_capacity(opened, PIECE), bar.clone());
    let sent: Uploaded = session.client.upload(&to, source, wait).await?;
    if sent.root == *root {
        return Ok(*size);
    }
    let message = format!("{} changed while it was sent: run the command again", path.display());
    Err(Failure::say(Exit::Io, message))
}

/// Sends standard input, to its end.
pub(super) async fn upload_stdin(session: &Session) -> Result<PayloadText, Failure> {
    let source = ReaderStream::with_capacity(tokio::io::stdin(), PIECE);
    // Whoever writes it decides how long that takes.
    let wait = Duration::from_secs(86_400);
    let sent: Uploaded = session.client.upload("/v1/payloads", source, wait).await?;
    Ok(PayloadText { root: sent.root, size: sent.size })
}

/// What a fetch by the node came to.
pub(super) struct Fetched {
    pub(super) size: u64,
    pub(super) received: u64,
    pub(super) holders: usize,
    pub(super) took_ms: u64,
}

/// Has the node fetch a payload, or an index and all that it names, and shows how far it is.
pub(super) async fn get(
    session: &Session,
    root: &str,
    size: Option<u64>,
    index: bool,
) -> Result<Fetched, Failure> {
    let size = size.map(|size| format!("&size={size}")).unwrap_or_default();
    let path = format!("/v1/payloads/{root}/fetch?index={index}{size}");
    let stream = session.client.follow(&path, BEGIN, None).await?;
    let mut stream = std::pin::pin!(stream);
    let bar = bar(&session.out, "fetching", 0);
    let mut text = Vec::new();
    let broken = |why: String| {
        let message = format!("the node at {} broke off: {why}", session.client.at());
        Failure::say(Exit::Remote, message)
    };
    while let Some(piece) = stream.next().await {
        text.extend_from_slice(&piece.map_err(|why| broken(why.to_string()))?);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let line = serde_json::from_slice(&line).map_err(|why| broken(why.to_string()))?;
            match line {
                Fetching::Moving { bytes, size, holders } => {
                    bar.set_length(size);
                    bar.set_position(bytes);
                    bar.set_message(match holders {
                        1 => "from 1 holder".to_string(),
                        n => format!("from {n} holders"),
                    });
                }
                Fetching::Failed { error } => {
                    bar.finish_and_clear();
                    let status = StatusCode::BAD_GATEWAY;
                    return Err(ClientError::Answer { status, inside: error }.into());
                }
                Fetching::Done { size, received, holders, took_ms } => {
                    bar.finish_and_clear();
                    return Ok(Fetched { size, received, holders, took_ms });
                }
            }
        }
        if text.len() > MAX_LINE {
            return Err(broken("it says too much in one line".into()));
        }
    }
    Err(broken("it did not say how the fetch ended".into()))
}

/// Writes a payload that the node holds to `path`, checked against its root; the file appears whole
/// or not at all. `-` is standard output, which learns of a mismatch only at the end.
pub(super) async fn export(
    session: &Session,
    root: &str,
    size: u64,
    path: &Path,
) -> Result<(), Failure> {
    let from = format!("/v1/payloads/{root}");
    let wrong = |trouble: Trouble| trouble.of(root, path);
    let payload = PayloadText { root: root.to_string(), size };
    let bar = bar(&session.out, root, size);
    if path.as_os_str() == "-" {
        let mut out = io::stdout();
        return take(session, &from, &payload, &bar, &mut out).await.map_err(wrong);
    }
    let name = path.file_name().and_then(|name| name.to_str());
    let Some(name) = name else {
        let message = format!("'{}' names no file", path.display());
        return Err(Failure::say(Exit::Usage, message));
    };
    let partial = Partial::create(parent(path), name).map_err(Trouble::Disk).map_err(wrong)?;
    take(session, &from, &payload, &bar, &mut &partial.file).await.map_err(wrong)?;
    partial.keep(path).map_err(Trouble::Disk).map_err(wrong)
}

/// The directory that a file or directory is to lie in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A fetched output as `--json` shows it.
pub(super) fn line(name: &str, path: &Path, payload: &PayloadText) -> Value {
    json!({ "name": name, "path": path, "size": payload.size, "root": payload.root })
}

/// Fetches a declared output into `dir`, checked against its root. The file appears whole or not
/// at all, in place of one that is there.
pub(super) async fn download(
    session: &Session,
    lease: &str,
    name: &str,
    payload: &PayloadText,
    dir: &Path,
) -> Result<PathBuf, Failure> {
    let to = dir.join(name);
    let mut tries = 1;
    loop {
        match try_download(session, lease, name, payload, dir, &to).await {
            Ok(()) => return Ok(to),
            Err(Trouble::Client(error)) if error.may_pass() && tries < TRIES => tries += 1,
            Err(Trouble::Broken(_)) if tries < TRIES => tries += 1,
            Err(trouble) => return Err(trouble.of(&format!("output {name}"), &to)),
        }
    }
}

/// Why bytes of the node did not come, or could not be kept.
pub(super) enum Trouble {
    Client(ClientError),
    Broken(io::Error),
    Disk(io::Error),
    Wrong,
}

impl Trouble {
    /// What it comes to when `what` was to be written to `to`.
    pub(super) fn of(self, what: &str, to: &Path) -> Failure {
        match self {
            Self::Client(error) => error.into(),
            Self::Broken(why) => Failure::say(Exit::Remote, format!("{what} broke off: {why}")),
            Self::Disk(why) => Failure::file("cannot write", to, &why),
            Self::Wrong => {
                let message = format!("what the node sent of {what} does not match its root");
                Failure::say(Exit::No, message)
            }
        }
    }
}

async fn try_download(
    session: &Session,
    lease: &str,
    name: &str,
    payload: &PayloadText,
    dir: &Path,
    to: &Path,
) -> Result<(), Trouble> {
    let PayloadText { root, size } = payload;
    let from = format!("/v1/leases/{lease}/outputs/{}?root={root}&size={size}", escaped(name));
    std::fs::create_dir_all(dir).map_err(Trouble::Disk)?;
    let partial = Partial::create(dir, name).map_err(Trouble::Disk)?;
    let bar = bar(&session.out, &leasehold_keys::text::shown(name), *size);
    take(session, &from, payload, &bar, &mut &partial.file).await?;
    partial.keep(to).map_err(Trouble::Disk)
}

/// Writes what the API gives at `from` to `out`, and checks it against its root.
pub(super) async fn take(
    session: &Session,
    from: &str,
    payload: &PayloadText,
    bar: &ProgressBar,
    out: &mut impl io::Write,
) -> Result<(), Trouble> {
    let PayloadText { root, size } = payload;
    let stream = session.client.stream(from, BEGIN, Some(STALL)).await;
    let mut stream = std::pin::pin!(stream.map_err(Trouble::Client)?);
    let mut hasher = blake3::Hasher::new();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(Trouble::Broken)?;
        hasher.update(&piece);
        if hasher.count() > *size {
            return Err(Trouble::Wrong);
        }
        out.write_all(&piece).map_err(Trouble::Disk)?;
        bar.inc(piece.len() as u64);
    }
    if hasher.count() != *size || hasher.finalize().to_string() != *root {
        return Err(Trouble::Wrong);
    }
    out.flush().map_err(Trouble::Disk)
}

/// A file that is not whole yet; gone when dropped.
struct Partial {
    file: File,
    path: Option<PathBuf>,
}

impl Partial {
    fn create(dir: &Path, name: &str) -> io::Result<Self> {
        let path = dir.join(format!(".{name}.{}.part", std::process::id()));
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o644).open(&path)?;
        Ok(Self { file, path: Some(path) })
    }

    fn keep(mut self, to: &Path) -> io::Result<()> {
        if let Some(path) = &self.path {
            std::fs::rename(path, to)?;
        }
        self.path = None;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Best effort: what stays is named .part.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn a_file_is_known_by_its_content() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x");
        std::fs::write(&path, b"abc").expect("written");
        let local = hash(&path).await.expect("hashed");
        assert_eq!(local.payload.size, 3);
        assert_eq!(local.payload.root, blake3::hash(b"abc").to_string());
        let missing = hash(&dir.path().join("y")).await.expect_err("not there");
        assert_eq!(missing.exit, Exit::Io);
        assert!(hash(dir.path()).await.is_err(), "a directory is no file");
    }

    #[test]
    fn what_is_not_whole_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let partial = Partial::create(dir.path(), "o").expect("made");
        (&partial.file).write_all(b"half").expect("written");
        drop(partial);
        assert_eq!(std::fs::read_dir(dir.path()).expect("read").count(), 0);
        let partial = Partial::create(dir.path(), "o").expect("made");
        partial.keep(&dir.path().join("o")).expect("kept");
        assert!(dir.path().join("o").exists());
    }
}
