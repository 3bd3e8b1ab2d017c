//! The payload store: bytes named by their BLAKE3 root, as files, with their hash trees beside.
//!
//! ```text
//! DIR/<root>.data       the bytes
//! DIR/<root>.outboard   the hash pairs of their BLAKE3 tree in pre-order, one per 256 KiB group
//! DIR/private/<root>    an empty file for each that peers do not get, also before its bytes are here
//! DIR/partial/          what is still arriving, or had come when its transfer ended
//! DIR/aside/            what no longer matches its root; kept for whoever wants to look
//!
//!   reserve ──> partial ──(all bytes hashed, both files synced)──> rename ──> sync DIR ──> held
//!      │            │                                                                       │
//!   NoSpace     dropped: an import's files go; what was verified of a       aside <─ corrupt┘
//!               transfer rests, until it goes on or its room is wanted
//! ```
//!
//! A payload is held, and said to be held, only after its bytes are on disk under its name: the
//! outboard is renamed first and the data last, so a `.data` file is the mark of a whole one.
//! A start looks at every payload's right-most path down the tree, which proves its size; that
//! all bytes are still right is proven by whoever receives them, and by [`PayloadStore::verify`]
//! where a reader complained or a read failed.
//!
//! Nothing here knows a network. All calls block on the disk, except
//! [`PayloadStore::import_stream`]; asynchronous callers wrap them in `spawn_blocking`. A store is used by one process at a time;
//! the lock is the data directory's.

mod arriving;
mod index;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bao_tree::{
    BaoTree, BlockSize, ChunkNum, ChunkRanges,
    io::{EncodeError, outboard::PreOrderOutboard, sync},
};
use bytes::{Bytes, BytesMut};
use leasehold_proto::Hash;
use leasehold_proto::base::groups::GROUP_BYTES;
use leasehold_proto::words::index::IndexError;
use rustix::fs::FallocateFlags;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::{mpsc, watch},
};
use tracing::{info, warn};

pub(crate) use arriving::{Part, Receiving, marks_roundtrip};

/// [`GROUP_BYTES`] in bao-tree's terms: 2^8 chunks of 1024 bytes.
pub(crate) const GROUP: BlockSize = BlockSize::from_chunk_log(8);

/// How exactly a file's time says when its payload was last used.
const USED_WITHIN: Duration = Duration::from_secs(3600);

/// Room for an import of unknown size is taken in steps of this many bytes.
const STEP: u64 = 16 << 20;

/// The name of a payload: the BLAKE3 hash of its bytes. Its text form is 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Root([u8; 32]);

impl Root {
    /// The root that these 32 bytes are.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The root of the payload `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn hash(self) -> blake3::Hash {
        blake3::Hash::from_bytes(self.0)
    }
}

impl From<Hash> for Root {
    fn from(hash: Hash) -> Self {
        Self(hash.0)
    }
}

impl From<Root> for Hash {
    fn from(root: Root) -> Self {
        Self(root.0)
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({self})")
    }
}

/// A text is not a payload's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a payload's name is 64 lower-case hexadecimal digits")]
pub struct NotARoot;

impl FromStr for Root {
    type Err = NotARoot;

    fn from_str(text: &str) -> Result<Self, NotARoot> {
        let digits: &[u8; 64] = text.as_bytes().try_into().map_err(|_| NotARoot)?;
        let digit = |d: u8| match d {
            b'0'..=b'9' => Ok(d - b'0'),
            b'a'..=b'f' => Ok(d - b'a' + 10),
            _ => Err(NotARoot),
        };
        let mut root = [0; 32];
        for (byte, pair) in root.iter_mut().zip(digits.as_chunks::<2>().0) {
            let [high, low] = *pair;
            *byte = digit(high)? << 4 | digit(low)?;
        }
        Ok(Self(root))
    }
}

/// How much a store may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes that all payloads together may have on disk, outboards included.
    pub quota: u64,
    /// Bytes of the file system that are left free for others.
    pub keep_free: u64,
    /// The most bytes one payload may have.
    pub max_payload: u64,
    /// Whether what arrives is dropped once it is verified, and never held: for measuring what there is
    /// besides files.
    pub discard: bool,
}

impl Default for Limits {
    /// No quota, payloads up to 1 TiB, and 256 MiB of the disk left alone, so that the journal
    /// can always grow.
    fn default() -> Self {
        Self { quota: u64::MAX, keep_free: 256 << 20, max_payload: 1 << 40, discard: false }
    }
}

/// What a sender says about the size of an import, and is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// Exactly this many bytes. Room for all is taken first, and one pass over them is enough.
    Exactly(u64),
    /// Unknown, at most this many bytes. Room is taken in steps; the bytes are read once more
    /// from disk to hash them.
    AtMost(u64),
}

/// A payload that is now held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// Its name.
    pub root: Root,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it was held before, so that nothing was kept of this import.
    pub already_held: bool,
}

/// A payload that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub root: Root,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it begins as an index does, so that [`PayloadStore::index`] may read it as one.
    pub index: bool,
}

/// What a store holds, for metrics and people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreStats {
    /// Payloads held.
    pub payloads: u64,
    /// Their bytes on disk, outboards included.
    pub bytes: u64,
    /// Bytes of room taken by payloads still arriving.
    pub reserved: u64,
    /// Payloads set aside since the start because they did not match their root.
    pub set_aside: u64,
}

/// Why the store could not do something. Nothing is kept of what failed.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// The quota or the disk is too full.
    #[error(
        "no space for {need} bytes, {available} are available: remove payloads or raise the quota"
    )]
    NoSpace {
        /// Bytes wanted, outboard included.
        need: u64,
        /// Bytes that could be taken now.
        available: u64,
    },
    /// Over the limit for one payload, or over what was declared.
    #[error("the payload is larger than the {limit} bytes allowed for it")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The source had more or fewer bytes than declared. `actual` stops counting one past
    /// `expected`.
    #[error("{expected} bytes were declared and {actual} came")]
    WrongSize {
        /// Bytes declared.
        expected: u64,
        /// Bytes that came.
        actual: u64,
    },
    /// No payload of this name is held.
    #[error("payload {0} is not held")]
    NotHeld(Root),
    /// It is on its way already.
    #[error("payload {0} is on its way already")]
    Arriving(Root),
    /// The bytes on disk do not match their name. They were set aside.
    #[error("payload {0} no longer matches its name on disk; it was set aside")]
    Corrupt(Root),
    /// It is here, but is no index.
    #[error("payload {root}: {why}")]
    NotAnIndex {
        /// Its name.
        root: Root,
        /// What is wrong with it.
        why: IndexError,
    },
    /// The file system cannot share the blocks of a file with the store.
    #[error("it cannot be cloned into the store: {0}")]
    NotCloned(#[source] io::Error),
    /// What the payload is imported from failed.
    #[error("reading the source failed: {0}")]
    Source(#[source] io::Error),
    /// The disk failed.
    #[error("{doing} {path}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// For `map_err`: names what was done to which path. A full disk is told as such; by then only
/// that one more byte did not fit is known.
fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PayloadError {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            PayloadError::NoSpace { need: 1, available: 0 }
        }
        _ => PayloadError::Io { doing, path: path.to_owned(), source },
    }
}

/// The payloads of one directory. Clones share it.
#[derive(Debug, Clone)]
pub struct PayloadStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    limits: Limits,
    held: Mutex<Held>,
    /// Told whenever something is held or arrives that was not, or no longer is.
    changed: watch::Sender<()>,
    /// Held while files are renamed in `dir`, so that two imports of the same bytes, or an import
    /// and a removal, do not mix their renames.
    renames: Mutex<()>,
    /// Held while payloads are removed to make room.
    making_room: Mutex<()>,
    /// Numbers the partial files of this run.
    next_partial: AtomicU64,
    set_aside: AtomicU64,
    /// What peers do not get.
    private: Mutex<HashSet<Root>>,
    /// Held while a mark of that is made or taken away.
    marks: Mutex<()>,
}

#[derive(Debug, Default)]
struct Held {
    payloads: BTreeMap<Root, Known>,
    /// Bytes of them on disk.
    bytes: u64,
    /// Bytes promised to partial files.
    reserved: u64,
    /// The part of `reserved` that the file system has not set apart yet.
    unallocated: u64,
    /// What a transfer has under way.
    arriving: BTreeMap<arriving::Name, Weak<Receiving>>,
    /// What came of payloads whose transfer ended.
    resting: AtRest,
    /// Numbers the uses of payloads, and what rests.
    turn: u64,
}

/// What is known of a payload that is held.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// In bytes.
    size: u64,
    /// When it was last read, or came: the higher the later.
    used: u64,
    /// Whether it begins as an index does.
    index: bool,
}

impl Held {
    fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }
}

type AtRest = BTreeMap<arriving::Name, arriving::Resting>;

// Every update of what these locks guard is a few assignments that cannot panic half-way, so a
// poisoned lock holds nothing broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tree(size: u64) -> BaoTree {
    BaoTree::new(size, GROUP)
}

/// Bytes on disk of a payload of `size` bytes and its outboard.
fn on_disk(size: u64) -> u64 {
    size.saturating_add(tree(size).outboard_size())
}

fn all_on_disk(sizes: &[u64]) -> u64 {
    sizes.iter().fold(0, |sum, size| sum.saturating_add(on_disk(*size)))
}

impl PayloadStore {
    /// Opens the store in `dir`, creating it where it is missing, removes what was still arriving
    /// when the last run ended and cannot be gone on with, and sets aside what cannot be whole.
    pub fn open_dir(dir: impl Into<PathBuf>, limits: Limits) -> Result<Self, PayloadError> {
        let dir = dir.into();
        for path in [dir.clone(), dir.join("private"), dir.join("partial"), dir.join("aside")] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(io_error("creating", &path))?;
        }
        let inner = Inner {
            dir,
            limits,
            held: Mutex::default(),
            changed: watch::channel(()).0,
            renames: Mutex::default(),
            making_room: Mutex::default(),
            next_partial: AtomicU64::new(0),
            set_aside: AtomicU64::new(0),
            private: Mutex::default(),
            marks: Mutex::default(),
        };
        let store = Self { inner: Arc::new(inner) };
        store.scan()?;
        store.take_up_resting()?;
        store.take_up_private()?;
        Ok(store)
    }

    /// Keeps a payload from peers, whoever asks for it, from now on: whether its bytes are here, arrive, are
    /// yet to come or come again. A start forgets that of which nothing is here. Where it cannot be kept on
    /// disk it holds until the process ends.
    pub fn keep_private(&self, root: Root) -> Result<(), PayloadError> {
        let _marking = lock(&self.inner.marks);
        if lock(&self.inner.private).insert(root) {
            self.inner.changed.send_replace(());
        }
        let path = self.inner.private_path(root);
        if path.exists() {
            return Ok(());
        }
        File::create(&path).map_err(io_error("creating", &path))?;
        sync_dir(&self.inner.dir.join("private"))
    }

    /// Lets peers have a payload again.
    pub fn publish(&self, root: Root) -> Result<(), PayloadError> {
        let _marking = lock(&self.inner.marks);
        let path = self.inner.private_path(root);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("removing", &path)(e));
            }
            _ => {}
        }
        lock(&self.inner.private).remove(&root);
        self.inner.changed.send_replace(());
        Ok(())
    }

    /// Whether a payload is kept from peers.
    pub fn is_private(&self, root: Root) -> bool {
        lock(&self.inner.private).contains(&root)
    }

    /// The size in bytes of a payload that is held.
    pub fn has(&self, root: Root) -> Option<u64> {
        lock(&self.inner.held).payloads.get(&root).map(|known| known.size)
    }

    /// Where the bytes of a payload lie, for handing them to a program; none when it is not held.
    /// The file is the payload itself: whoever changes it changes the payload.
    pub fn path(&self, root: Root) -> Option<PathBuf> {
        self.inner.used(root).map(|_| self.inner.data_path(root))
    }

    /// All payloads, by name.
    pub fn list(&self) -> Vec<Stored> {
        let held = lock(&self.inner.held);
        let stored = |(root, known): (&Root, &Known)| Stored {
            root: *root,
            size: known.size,
            index: known.index,
        };
        held.payloads.iter().map(stored).collect()
    }

    /// What can be had from here, or soon can: the names of at most `most` payloads that arrive or
    /// are held, those that were used last first. Indexes come before others, up to half of all: by
    /// them is found what they name, which may be more than fits.
    pub fn newest(&self, most: usize) -> Vec<Root> {
        let held = lock(&self.inner.held);
        let mut known: Vec<_> = held.payloads.iter().collect();
        known.sort_unstable_by_key(|(_, known)| Reverse(known.used));
        let (indexes, others): (Vec<_>, Vec<_>) = known.into_iter().partition(|(_, k)| k.index);
        let (first, last) = indexes.split_at(indexes.len().min(most / 2));
        let arriving = held.arriving.keys().map(|(root, _)| *root);
        let root_of = |(root, _): &(&Root, &Known)| **root;
        let first = first.iter().map(root_of).chain(arriving);
        first.chain(others.iter().chain(last).map(root_of)).take(most).collect()
    }

    /// Hears when [`Self::newest`] may have changed by more than its order.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.inner.changed.subscribe()
    }

    /// What is held and reserved now.
    pub fn stats(&self) -> StoreStats {
        let held = lock(&self.inner.held);
        StoreStats {
            payloads: held.payloads.len() as u64,
            bytes: held.bytes,
            reserved: held.reserved,
            set_aside: self.inner.set_aside.load(Ordering::Relaxed),
        }
    }

    /// Whether payloads of these sizes in bytes could be taken now, to be asked before they are
    /// promised room. Nothing is reserved by asking.
    pub fn check_room(&self, sizes: &[u64]) -> Result<(), PayloadError> {
        sizes.iter().try_for_each(|size| self.inner.check_payload(*size))?;
        let held = lock(&self.inner.held);
        // What rests makes room.
        let rests = held.resting.values().map(|resting| resting.bytes).sum();
        self.inner.check_room(&held, all_on_disk(sizes), rests)
    }

    /// Opens a payload for reading. The handle stays good when the payload is removed.
    pub fn open(&self, root: Root) -> Result<Payload, PayloadError> {
        let size = self.inner.used(root).ok_or(PayloadError::NotHeld(root))?;
        let payload = self.open_files(root, size)?;
        // So that the next run knows as well, within an hour. Failing to say so costs little.
        let now = SystemTime::now();
        let since = payload.data.metadata().and_then(|about| about.modified());
        if since.is_ok_and(|since| since + USED_WITHIN < now) {
            let _ = payload.data.set_modified(now);
        }
        Ok(payload)
    }

    fn open_files(&self, root: Root, size: u64) -> Result<Payload, PayloadError> {
        let open = |path: PathBuf| File::open(&path).map_err(io_error("opening", &path));
        let data = open(self.inner.data_path(root))?;
        let outboard = open(self.inner.outboard_path(root))?;
        Ok(Payload { root, size, data, outboard })
    }

    /// Imports what `source` yields until its end.
    pub fn import(&self, source: impl Read, size: Declared) -> Result<Imported, PayloadError> {
        match size {
            Declared::Exactly(size) => {
                let reservation = Reservation::new(&self.inner, size)?;
                self.import_sized(source, Room { reservation })
            }
            Declared::AtMost(limit) => self.import_unsized(source, limit),
        }
    }

    /// Imports a file: as a clone where the file system can share its blocks, else as a copy, and
    /// then it must not change meanwhile.
    pub fn import_path(&self, path: &Path) -> Result<Imported, PayloadError> {
        let file = File::open(path).map_err(PayloadError::Source)?;
        let about = file.metadata().map_err(PayloadError::Source)?;
        if !about.is_file() {
            return self.import(file, Declared::AtMost(self.inner.limits.max_payload));
        }
        let room = Room { reservation: Reservation::new(&self.inner, about.len())? };
        match self.import_cloned(&file, room, None) {
            Err(PayloadError::NotCloned(_)) => self.import(file, Declared::Exactly(about.len())),
            imported => imported,
        }
    }

    /// Imports the file at `path`, whose bytes are known to be `root`, as a clone that shares its
    /// blocks: so nothing is copied.
    ///
    /// # Errors
    /// [`PayloadError::NotCloned`] where the file system cannot do that; that the file is another one.
    pub fn clone_path(
        &self,
        path: &Path,
        root: Root,
        room: Room,
    ) -> Result<Imported, PayloadError> {
        // Whatever else is there must not be waited for.
        let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
        let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path);
        self.import_cloned(&file.map_err(PayloadError::Source)?, room, Some(root))
    }

    fn import_cloned(
        &self,
        file: &File,
        room: Room,
        known: Option<Root>,
    ) -> Result<Imported, PayloadError> {
        let size = room.reservation.size;
        let about = file.metadata().map_err(PayloadError::Source)?;
        if !about.is_file() || about.len() != size {
            return Err(PayloadError::WrongSize { expected: size, actual: about.len() });
        }
        let partial = Partial::new(room.reservation)?;
        rustix::fs::ioctl_ficlone(&partial.data, file)
            .map_err(|e| PayloadError::NotCloned(e.into()))?;
        // The clone is nobody else's: what becomes of the file does not change it.
        let (root, size) = partial.hashed()?;
        if size != about.len() {
            return Err(PayloadError::WrongSize { expected: about.len(), actual: size });
        }
        if known.is_some_and(|known| known != root) {
            return Err(PayloadError::Source(io::Error::other("its bytes have another root")));
        }
        partial.keep(root, size)
    }

    /// Imports what an asynchronous `source` yields until its end. Dropping the future drops what
    /// came so far.
    pub async fn import_stream(
        &self,
        source: impl AsyncRead + Unpin,
        size: Declared,
    ) -> Result<Imported, PayloadError> {
        let store = self.clone();
        self.import_queue(source, move |source| store.import(source, size)).await
    }

    /// The same where room was taken for it: exactly so many bytes.
    pub async fn import_into(
        &self,
        room: Room,
        source: impl AsyncRead + Unpin,
    ) -> Result<Imported, PayloadError> {
        let store = self.clone();
        self.import_queue(source, move |source| store.import_sized(source, room)).await
    }

    async fn import_queue(
        &self,
        mut source: impl AsyncRead + Unpin,
        import: impl FnOnce(QueueReader) -> Result<Imported, PayloadError> + Send + 'static,
    ) -> Result<Imported, PayloadError> {
        let (pieces, queue) = mpsc::channel(4);
        let mut import = tokio::task::spawn_blocking(move || {
            import(QueueReader { queue, piece: Bytes::new(), ended: false })
        });
        let feed = async move {
            loop {
                let mut piece = BytesMut::with_capacity(GROUP_BYTES as usize);
                let mut read = Ok(1);
                while piece.len() < piece.capacity() && matches!(read, Ok(1..)) {
                    read = source.read_buf(&mut piece).await;
                }
                let ended = matches!(read, Ok(0));
                let failed = read.is_err();
                let sent = match read {
                    Err(e) => pieces.send(Piece::Failed(e)).await,
                    Ok(_) if piece.is_empty() => Ok(()),
                    Ok(_) => pieces.send(Piece::Bytes(piece.freeze())).await,
                };
                if failed || sent.is_err() {
                    break;
                }
                if ended {
                    // Told apart from a feed that was dropped half-way.
                    let _ = pieces.send(Piece::End).await;
                    break;
                }
            }
            // The importer may still be busy: keep nothing of it waiting on this end.
        };
        let imported = tokio::select! {
            imported = &mut import => imported,
            () = feed => import.await,
        };
        imported.map_err(|e| PayloadError::Source(io::Error::other(e)))?
    }

    /// The content of a payload of at most `limit` bytes, verified.
    pub fn read(&self, root: Root, limit: u64) -> Result<Vec<u8>, PayloadError> {
        let payload = self.open(root)?;
        if payload.size > limit {
            return Err(PayloadError::TooLarge { limit });
        }
        self.read_all(&payload)
    }

    fn read_all(&self, payload: &Payload) -> Result<Vec<u8>, PayloadError> {
        let mut content = Vec::with_capacity(usize::try_from(payload.size).unwrap_or(0));
        self.copy_verified(payload, &mut content, &self.inner.data_path(payload.root))?;
        Ok(content)
    }

    /// Writes a payload to `path`, verified, in place of what is there. The file appears whole
    /// or not at all.
    pub fn export(&self, root: Root, path: &Path) -> Result<(), PayloadError> {
        let payload = self.open(root)?;
        let beside = path.with_added_extension(format!("{}.partial", self.inner.number()));
        let temporary = Unlink::new(beside.clone());
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&beside)
            .map_err(io_error("creating", &beside))?;
        self.copy_verified(&payload, &mut file, &beside)?;
        file.sync_all().map_err(io_error("syncing", &beside))?;
        fs::rename(&beside, path).map_err(io_error("renaming to", path))?;
        drop(temporary);
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        sync_dir(parent.unwrap_or(Path::new(".")))
    }

    /// Removes a payload; whoever has it open keeps reading. Whether it was held.
    pub fn remove(&self, root: Root) -> Result<bool, PayloadError> {
        let _renaming = lock(&self.inner.renames);
        if self.has(root).is_none() {
            return Ok(false);
        }
        // The data first: without it the outboard is a leftover that a start removes.
        for path in [self.inner.data_path(root), self.inner.outboard_path(root)] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("removing", &path)(e));
                }
                _ => {}
            }
        }
        self.inner.forget(root);
        sync_dir(&self.inner.dir)?;
        Ok(true)
    }

    /// Makes room for payloads of these sizes in bytes by removing others, those that were not used for
    /// longest first, but for those in `spared`, or none where that is not said. Nothing is removed
    /// where that would not do. How many were. Others may take the room that was made.
    pub fn make_room(
        &self,
        sizes: &[u64],
        spared: Option<&HashSet<Root>>,
    ) -> Result<usize, PayloadError> {
        let made = self.making_room(sizes, spared, || self.check_room(sizes))?;
        Ok(made.1)
    }

    /// The same for one payload, whose room is taken.
    pub fn take_room(
        &self,
        size: u64,
        spared: Option<&HashSet<Root>>,
    ) -> Result<Room, PayloadError> {
        let take = || {
            // What rests does not go for something that has no room even so.
            self.check_room(&[size])?;
            Reservation::new(&self.inner, size)
        };
        let (reservation, _) = self.making_room(&[size], spared, take)?;
        Ok(Room { reservation })
    }

    /// Removes payloads until `taken` is.
    fn making_room<T>(
        &self,
        sizes: &[u64],
        spared: Option<&HashSet<Root>>,
        taken: impl Fn() -> Result<T, PayloadError>,
    ) -> Result<(T, usize), PayloadError> {
        // One after another: what one removes another must not count on.
        let _turn = lock(&self.inner.making_room);
        let (full, mut before) = match taken() {
            Ok(taken) => return Ok((taken, 0)),
            Err(full @ PayloadError::NoSpace { available, .. }) => (full, available),
            Err(error) => return Err(error),
        };
        let held = lock(&self.inner.held);
        let goes = |root: &Root| spared.is_some_and(|spared| !spared.contains(root));
        let may_go = held.payloads.iter().filter(|(root, _)| goes(root));
        let mut may_go: Vec<_> =
            may_go.map(|(root, known)| (known.used, *root, known.size)).collect();
        let rests: u64 = held.resting.values().map(|resting| resting.bytes).sum();
        let most = may_go.iter().fold(rests, |sum, (.., size)| sum.saturating_add(on_disk(*size)));
        let would_do = self.inner.check_room(&held, all_on_disk(sizes), most).is_ok();
        drop(held);
        if !would_do {
            return Err(full);
        }
        may_go.sort_unstable();
        for (removed, (_, root, _)) in (1..).zip(may_go) {
            info!(%root, "removing a payload that was not used for long: its room is wanted");
            self.remove(root)?;
            match taken() {
                Ok(taken) => return Ok((taken, removed)),
                // What somebody has open, or has under another name, frees nothing.
                Err(PayloadError::NoSpace { available, .. }) if available > before => {
                    before = available;
                }
                Err(error) => return Err(error),
            }
        }
        Err(full)
    }

    /// Reads all of a payload against its root, and sets it aside if it does not match.
    pub fn verify(&self, root: Root) -> Result<(), PayloadError> {
        let payload = self.open(root)?;
        self.judge(root, payload.check(&ChunkRanges::all()))
    }

    fn import_sized(&self, source: impl Read, room: Room) -> Result<Imported, PayloadError> {
        let size = room.reservation.size;
        let mut partial = Partial::new(room.reservation)?;
        partial.allocate(size)?;
        let mut outboard = partial.outboard_of(blake3::Hash::from_bytes([0; 32]), size)?;
        let mut tee = Tee { source, sink: &partial.data, passed: 0, sink_failed: None };
        let hashed = sync::outboard(&mut tee, tree(size), &mut outboard);
        let Tee { mut source, passed, sink_failed, .. } = tee;
        if let Some(e) = sink_failed {
            return Err(io_error("writing", &partial.data_path)(e));
        }
        let hash = match hashed {
            Ok(hash) => hash,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(PayloadError::WrongSize { expected: size, actual: passed });
            }
            Err(e) => return Err(PayloadError::Source(e)),
        };
        if fill(&mut source, &mut [0])? > 0 {
            return Err(PayloadError::WrongSize { expected: size, actual: size.saturating_add(1) });
        }
        partial.keep(Root(*hash.as_bytes()), size)
    }

    fn import_unsized(&self, mut source: impl Read, limit: u64) -> Result<Imported, PayloadError> {
        let limit = limit.min(self.inner.limits.max_payload);
        let mut partial = Partial::new(Reservation::new(&self.inner, 0)?)?;
        let mut buffer = vec![0; GROUP_BYTES as usize];
        let mut size: u64 = 0;
        loop {
            let got = fill(&mut source, &mut buffer)?;
            let piece = buffer.get(..got).unwrap_or_default();
            let grown = size + got as u64;
            if grown > limit {
                return Err(PayloadError::TooLarge { limit });
            }
            partial.reservation.cover(grown)?;
            let written = partial.data.write_all_at(piece, size);
            written.map_err(io_error("writing", &partial.data_path))?;
            size = grown;
            if piece.len() < buffer.len() {
                break;
            }
        }
        partial.reservation.exactly(size)?;
        let (root, size) = partial.hashed()?;
        partial.keep(root, size)
    }

    fn copy_verified(
        &self,
        payload: &Payload,
        to: &mut impl Write,
        path: &Path,
    ) -> Result<(), PayloadError> {
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        while offset < payload.size {
            let len = GROUP_BYTES.min(payload.size - offset) as usize;
            let piece = match payload.read_at(offset, len) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
                read => read.map_err(io_error("reading", &self.inner.data_path(payload.root)))?,
            };
            hasher.update(&piece);
            to.write_all(&piece).map_err(io_error("writing", path))?;
            offset += len as u64;
        }
        let whole = offset == payload.size && hasher.finalize() == payload.root.hash();
        self.judge(payload.root, if whole { Ok(true) } else { Ok(false) })
    }

    /// Acts on what a check of `root` found: a mismatch sets it aside.
    fn judge(&self, root: Root, matches: io::Result<bool>) -> Result<(), PayloadError> {
        match matches {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.set_aside(root)?;
                Err(PayloadError::Corrupt(root))
            }
            Err(e) => Err(io_error("reading", &self.inner.data_path(root))(e)),
        }
    }

    fn set_aside(&self, root: Root) -> Result<(), PayloadError> {
        let _renaming = lock(&self.inner.renames);
        warn!(%root, "a payload does not match its name: set aside");
        self.inner.forget(root);
        self.inner.set_aside.fetch_add(1, Ordering::Relaxed);
        let aside = self.inner.dir.join("aside");
        for path in [self.inner.data_path(root), self.inner.outboard_path(root)] {
            let Some(name) = path.file_name() else { continue };
            match fs::rename(&path, aside.join(name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("setting aside", &path)(e));
                }
                _ => {}
            }
        }
        sync_dir(&self.inner.dir)
    }

    fn scan(&self) -> Result<(), PayloadError> {
        let dir = &self.inner.dir;
        let (mut outboards, mut payloads) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(dir).map_err(io_error("listing", dir))? {
            let entry = entry.map_err(io_error("listing", dir))?;
            let name = entry.file_name();
            let Some((stem, ending)) = name.to_str().and_then(|name| name.split_once('.')) else {
                continue;
            };
            match (stem.parse::<Root>(), ending) {
                (Ok(root), "data") => {
                    let since = entry.metadata().and_then(|about| about.modified()).ok();
                    payloads.push((since.unwrap_or(SystemTime::UNIX_EPOCH), root));
                }
                (Ok(root), "outboard") => outboards.push(root),
                _ => warn!(path = %entry.path().display(), "no payload: left alone"),
            }
        }
        // In the order of their last use.
        payloads.sort_unstable();
        payloads.into_iter().try_for_each(|(_, root)| self.take_up(root))?;
        // An outboard alone is what a crash between two renames, or two removals, leaves.
        for root in outboards {
            let alone = self.has(root).is_none();
            let path = self.inner.outboard_path(root);
            if alone && path.exists() {
                fs::remove_file(&path).map_err(io_error("removing", &path))?;
            }
        }
        Ok(())
    }

    /// Whether something of a payload had come when its transfer ended.
    fn rests(&self, root: Root) -> bool {
        lock(&self.inner.held).resting.keys().any(|(of, _)| *of == root)
    }

    /// Reads which payloads peers do not get. Where nothing is held of one and nothing rests, its mark says
    /// nothing any more.
    fn take_up_private(&self) -> Result<(), PayloadError> {
        let dir = self.inner.dir.join("private");
        for entry in fs::read_dir(&dir).map_err(io_error("listing", &dir))? {
            let entry = entry.map_err(io_error("listing", &dir))?;
            let root = entry.file_name().to_str().and_then(|name| name.parse::<Root>().ok());
            match root {
                Some(root) if self.has(root).is_some() || self.rests(root) => {
                    lock(&self.inner.private).insert(root);
                }
                Some(root) => self.publish(root)?,
                None => warn!(path = %entry.path().display(), "no payload's name: left alone"),
            }
        }
        Ok(())
    }

    /// Holds the payload `root` found on disk if it can be whole: an outboard of the right size,
    /// and a right-most path down the tree that matches the root, which no other size does.
    fn take_up(&self, root: Root) -> Result<(), PayloadError> {
        let data_path = self.inner.data_path(root);
        let data = File::open(&data_path).map_err(io_error("opening", &data_path))?;
        let size = data.metadata().map_err(io_error("inspecting", &data_path))?.len();
        let outboard_path = self.inner.outboard_path(root);
        let matches = match File::open(&outboard_path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => return Err(io_error("opening", &outboard_path)(e)),
            Ok(outboard) => {
                let found = outboard.metadata().map_err(io_error("inspecting", &outboard_path))?;
                if found.len() == tree(size).outboard_size() {
                    let last = ChunkNum((size.saturating_sub(1)) / 1024);
                    let payload = Payload { root, size, data, outboard };
                    payload.check(&ChunkRanges::from(last..))
                } else {
                    Ok(false)
                }
            }
        };
        match self.judge(root, matches) {
            Ok(()) => self.inner.remember(root, size),
            Err(PayloadError::Corrupt(_)) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

impl Inner {
    fn data_path(&self, root: Root) -> PathBuf {
        self.dir.join(format!("{root}.data"))
    }

    fn private_path(&self, root: Root) -> PathBuf {
        self.dir.join("private").join(root.to_string())
    }

    fn outboard_path(&self, root: Root) -> PathBuf {
        self.dir.join(format!("{root}.outboard"))
    }

    fn number(&self) -> u64 {
        self.next_partial.fetch_add(1, Ordering::Relaxed)
    }

    fn remember(&self, root: Root, size: u64) {
        let index = self.begins_as_index(root, size);
        let mut held = lock(&self.held);
        let used = held.next_turn();
        if held.payloads.insert(root, Known { size, used, index }).is_none() {
            held.bytes = held.bytes.saturating_add(on_disk(size));
        }
        drop(held);
        self.changed.send_replace(());
    }

    /// The size of a payload that is held, which is used now.
    fn used(&self, root: Root) -> Option<u64> {
        let mut held = lock(&self.held);
        let turn = held.next_turn();
        let known = held.payloads.get_mut(&root)?;
        known.used = turn;
        Some(known.size)
    }

    fn forget(&self, root: Root) {
        let mut held = lock(&self.held);
        if let Some(known) = held.payloads.remove(&root) {
            held.bytes = held.bytes.saturating_sub(on_disk(known.size));
        }
        drop(held);
        self.changed.send_replace(());
    }

    fn check_payload(&self, size: u64) -> Result<(), PayloadError> {
        let limit = self.limits.max_payload;
        if size > limit { Err(PayloadError::TooLarge { limit }) } else { Ok(()) }
    }

    /// Whether `need` more bytes fit the quota and the disk, once `less` are gone from there.
    fn check_room(&self, held: &Held, need: u64, less: u64) -> Result<(), PayloadError> {
        let rests: u64 = held.resting.values().map(|resting| resting.bytes).sum();
        let taken = held.bytes.saturating_add(held.reserved).saturating_add(rests);
        let under_quota = self.limits.quota.saturating_sub(taken.saturating_sub(less));
        let disk = rustix::fs::statvfs(&self.dir)
            .map_err(|e| io_error("asking for the free space of", &self.dir)(e.into()))?;
        let on_disk = disk.f_bavail.saturating_mul(disk.f_frsize).saturating_add(less);
        let free = on_disk.saturating_sub(self.limits.keep_free).saturating_sub(held.unallocated);
        let available = under_quota.min(free);
        if need > available { Err(PayloadError::NoSpace { need, available }) } else { Ok(()) }
    }
}

/// A held payload, open.
#[derive(Debug)]
pub struct Payload {
    root: Root,
    size: u64,
    data: File,
    outboard: File,
}

impl Payload {
    /// Its name.
    pub fn root(&self) -> Root {
        self.root
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Exactly `len` bytes from `offset` on, as the disk has them: not verified.
    pub fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let mut bytes = BytesMut::zeroed(len);
        self.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.freeze())
    }

    /// Fills `buffer` from `offset` on, as the disk has the bytes: not verified.
    pub(crate) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.data.read_exact_at(buffer, offset)
    }

    pub(crate) fn tree(&self) -> BaoTree {
        tree(self.size)
    }

    /// Up to `len` bytes of the outboard from `offset` on.
    pub(crate) fn outboard_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let mut bytes = BytesMut::zeroed(len);
        match self.outboard.read_exact_at(&mut bytes, offset) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Bytes::new()),
            Err(e) => Err(e),
            Ok(()) => Ok(bytes.freeze()),
        }
    }

    /// Whether the bytes in `ranges` match the root.
    fn check(&self, ranges: &ChunkRanges) -> io::Result<bool> {
        let outboard =
            PreOrderOutboard { root: self.root.hash(), tree: self.tree(), data: &self.outboard };
        match sync::encode_ranges_validated(&self.data, outboard, ranges, io::sink()) {
            Ok(()) => Ok(true),
            Err(EncodeError::Io(e)) if e.kind() != io::ErrorKind::UnexpectedEof => Err(e),
            Err(_) => Ok(false),
        }
    }
}

/// Room that was taken for a payload to come, given back when dropped.
#[derive(Debug)]
pub struct Room {
    reservation: Reservation,
}

/// Room in the store, given back when dropped.
#[derive(Debug)]
struct Reservation {
    store: Arc<Inner>,
    /// Bytes counted in [`Held::reserved`].
    bytes: u64,
    /// The part of them counted in [`Held::unallocated`].
    unallocated: u64,
    /// Bytes of data that the room is for.
    size: u64,
}

impl Reservation {
    fn new(store: &Arc<Inner>, size: u64) -> Result<Self, PayloadError> {
        store.check_payload(size)?;
        let mut room = Self { store: store.clone(), bytes: 0, unallocated: 0, size: 0 };
        room.exactly(size)?;
        Ok(room)
    }

    /// Sees to room for at least `size` bytes of data, a step ahead where that much is left.
    fn cover(&mut self, size: u64) -> Result<(), PayloadError> {
        if size <= self.size {
            return Ok(());
        }
        self.exactly(size.saturating_add(STEP)).or_else(|_| self.exactly(size))
    }

    /// Makes the room exactly that of `size` bytes of data and their outboard.
    fn exactly(&mut self, size: u64) -> Result<(), PayloadError> {
        let limit = self.store.limits.max_payload;
        if size > limit.saturating_add(STEP) {
            return Err(PayloadError::TooLarge { limit });
        }
        let need = on_disk(size);
        let mut held = lock(&self.store.held);
        let more = need.saturating_sub(self.bytes);
        while let Err(full) = self.store.check_room(&held, more, 0) {
            let can_wait = matches!(full, PayloadError::NoSpace { .. });
            if !can_wait || !self.store.drop_resting(&mut held.resting) {
                return Err(full);
            }
        }
        held.reserved = held.reserved.saturating_sub(self.bytes).saturating_add(need);
        held.unallocated = held.unallocated.saturating_sub(self.unallocated).saturating_add(need);
        self.bytes = need;
        self.unallocated = need;
        self.size = size;
        Ok(())
    }

    /// That of what rests under a name, which the file system has set apart.
    fn of_resting(store: &Arc<Inner>, size: u64, name: &arriving::Name) -> Self {
        let bytes = on_disk(size);
        let mut held = lock(&store.held);
        held.resting.remove(name);
        held.reserved = held.reserved.saturating_add(bytes);
        drop(held);
        Self { store: store.clone(), bytes, unallocated: 0, size }
    }

    /// The file system has set the room apart.
    fn allocated(&mut self) {
        let mut held = lock(&self.store.held);
        held.unallocated = held.unallocated.saturating_sub(self.unallocated);
        self.unallocated = 0;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut held = lock(&self.store.held);
        held.reserved = held.reserved.saturating_sub(self.bytes);
        held.unallocated = held.unallocated.saturating_sub(self.unallocated);
    }
}

/// The two files of a payload that is not whole yet; gone when dropped.
#[derive(Debug)]
struct Partial {
    reservation: Reservation,
    data: File,
    outboard: File,
    data_path: PathBuf,
    outboard_path: PathBuf,
    unlink: (Unlink, Unlink),
}

impl Partial {
    fn new(reservation: Reservation) -> Result<Self, PayloadError> {
        let store = &reservation.store;
        let stem = store.dir.join("partial").join(store.number().to_string());
        Self::named(reservation, &stem)
    }

    /// Files beside `stem`, in place of what is left there.
    fn named(reservation: Reservation, stem: &Path) -> Result<Self, PayloadError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        Self::open(reservation, stem, &options)
    }

    /// What lies beside `stem`, of the sizes that it was made with.
    fn resume(reservation: Reservation, stem: &Path) -> Result<Self, PayloadError> {
        let size = reservation.size;
        let partial = Self::open(reservation, stem, OpenOptions::new().read(true).write(true))?;
        let len = |file: &File, path| file.metadata().map_err(io_error("inspecting", path));
        let data = len(&partial.data, &partial.data_path)?.len();
        let outboard = len(&partial.outboard, &partial.outboard_path)?.len();
        if (data, outboard) != (size, tree(size).outboard_size()) {
            return Err(PayloadError::WrongSize { expected: size, actual: data });
        }
        Ok(partial)
    }

    fn open(
        reservation: Reservation,
        stem: &Path,
        options: &OpenOptions,
    ) -> Result<Self, PayloadError> {
        let open = |path: &Path| options.open(path).map_err(io_error("opening", path));
        let data_path = stem.with_extension("data");
        let outboard_path = stem.with_extension("outboard");
        let unlink = (Unlink::new(data_path.clone()), Unlink::new(outboard_path.clone()));
        let data = open(&data_path)?;
        let outboard = open(&outboard_path)?;
        Ok(Self { reservation, data, outboard, data_path, outboard_path, unlink })
    }

    /// The files stay when this is dropped.
    fn leave(&mut self) {
        self.unlink.0.leave();
        self.unlink.1.leave();
    }

    /// Has the file system set the room apart now, so that it cannot run out half-way. File
    /// systems that cannot do this are only reserved in our own books.
    fn allocate(&mut self, size: u64) -> Result<(), PayloadError> {
        let both = [(&self.data, size), (&self.outboard, tree(size).outboard_size())];
        for (file, len) in both.into_iter().filter(|(_, len)| *len > 0) {
            match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
                Ok(()) => {}
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => return Ok(()),
                Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => {
                    return Err(PayloadError::NoSpace { need: on_disk(size), available: 0 });
                }
                Err(e) => return Err(io_error("allocating", &self.data_path)(e.into())),
            }
        }
        self.reservation.allocated();
        Ok(())
    }

    /// Hashes the bytes that are there into the outboard: their root, and how many they are.
    fn hashed(&self) -> Result<(Root, u64), PayloadError> {
        let path = &self.data_path;
        let data = File::open(path).map_err(io_error("opening", path))?;
        let size = data.metadata().map_err(io_error("inspecting", path))?.len();
        let mut outboard = self.outboard_of(blake3::Hash::from_bytes([0; 32]), size)?;
        let hashed = sync::outboard(data, tree(size), &mut outboard);
        let hash = hashed.map_err(io_error("hashing", path))?;
        Ok((Root(*hash.as_bytes()), size))
    }

    fn outboard_of(
        &self,
        root: blake3::Hash,
        size: u64,
    ) -> Result<PreOrderOutboard<File>, PayloadError> {
        let data = self.outboard.try_clone();
        let data = data.map_err(io_error("duplicating", &self.outboard_path))?;
        Ok(PreOrderOutboard { root, tree: tree(size), data })
    }

    /// The order is the promise: bytes durable, then names, then the directory, and only then
    /// is the payload held.
    fn keep(self, root: Root, size: u64) -> Result<Imported, PayloadError> {
        let store = self.reservation.store.clone();
        self.data.set_len(size).map_err(io_error("trimming", &self.data_path))?;
        self.data.sync_all().map_err(io_error("syncing", &self.data_path))?;
        self.outboard.sync_all().map_err(io_error("syncing", &self.outboard_path))?;
        let _renaming = lock(&store.renames);
        let already_held = lock(&store.held).payloads.contains_key(&root);
        if !already_held {
            let (data, outboard) = (store.data_path(root), store.outboard_path(root));
            // Under both names until the data is there: who is killed in between goes on from the
            // partial files.
            let _ = fs::remove_file(&outboard);
            fs::hard_link(&self.outboard_path, &outboard)
                .or_else(|_| fs::rename(&self.outboard_path, &outboard))
                .map_err(io_error("renaming to", &outboard))?;
            fs::rename(&self.data_path, &data).map_err(io_error("renaming to", &data))?;
            sync_dir(&store.dir)?;
            store.remember(root, size);
        }
        Ok(Imported { root, size, already_held })
    }
}

/// Removes a file when dropped, if it is still there and was not left.
#[derive(Debug)]
struct Unlink(Option<PathBuf>);

fn sync_dir(dir: &Path) -> Result<(), PayloadError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("syncing", dir))
}

/// Reads until `buffer` is full or the source ends.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> Result<usize, PayloadError> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match source.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(PayloadError::Source(e)),
        }
    }
    Ok(filled)
}

/// Passes on what is read from `source`, after writing it to `sink`.
struct Tee<'a, R> {
    source: R,
    sink: &'a File,
    passed: u64,
    sink_failed: Option<io::Error>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        let piece = buffer.get(..read).unwrap_or_default();
        if let Err(e) = self.sink.write_all_at(piece, self.passed) {
            self.sink_failed = Some(e);
            return Err(io::ErrorKind::Other.into());
        }
        self.passed += read as u64;
        Ok(read)
    }
}

enum Piece {
    Bytes(Bytes),
    Failed(io::Error),
    End,
}

/// The blocking end of [`PayloadStore::import_stream`].
struct QueueReader {
    queue: mpsc::Receiver<Piece>,
    piece: Bytes,
    ended: bool,
}

impl Read for QueueReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.queue.blocking_recv() {
                Some(Piece::Bytes(piece)) => self.piece = piece,
                Some(Piece::Failed(e)) => return Err(e),
                Some(Piece::End) => self.ended = true,
                None => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        let n = self.piece.len().min(buffer.len());
        let head = self.piece.split_to(n);
        if let Some(into) = buffer.get_mut(..n) {
            into.copy_from_slice(&head);
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    const G: usize = GROUP_BYTES as usize;
    const SIZES: [usize; 9] = [0, 1, 1024, G - 1, G, G + 1, 2 * G, 3 * G + 7, 5_000_003];

    fn content(len: usize) -> Vec<u8> {
        let mut content = vec![0; len];
        let mut stream = blake3::Hasher::new().update(&len.to_le_bytes()).finalize_xof();
        stream.fill(&mut content);
        content
    }

    fn roomy() -> Limits {
        Limits { keep_free: 0, ..Limits::default() }
    }

    fn store(limits: Limits) -> (tempfile::TempDir, PayloadStore) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = PayloadStore::open_dir(dir.path().join("payloads"), limits).expect("opens");
        (dir, store)
    }

    fn files(store: &PayloadStore, sub: &str) -> usize {
        fs::read_dir(store.inner.dir.join(sub)).expect("lists").count()
    }

    fn flip(path: &Path, offset: u64) {
        let file = OpenOptions::new().read(true).write(true).open(path).expect("opens");
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("reads");
        file.write_all_at(&[byte[0] ^ 1], offset).expect("writes");
    }

    #[test]
    fn what_is_private_stays_so_until_it_is_published_or_gone() {
        let (room, store) = store(roomy());
        let root = Root::of(&content(5_000));
        store.keep_private(root).expect("marked");
        assert!(store.is_private(root) && store.has(root).is_none(), "before it is here");
        store.import(Cursor::new(content(5_000)), Declared::Exactly(5_000)).expect("held");
        let never = Root::of(b"never comes");
        store.keep_private(never).expect("marked");
        let again = |store: PayloadStore| {
            drop(store);
            PayloadStore::open_dir(room.path().join("payloads"), roomy()).expect("opens")
        };
        let store = again(store);
        assert!(store.is_private(root), "after a restart");
        assert!(!store.is_private(never) && files(&store, "private") == 1);
        store.publish(root).expect("published");
        let store = again(store);
        assert!(!store.is_private(root) && files(&store, "private") == 0);
        store.keep_private(root).expect("marked");
        assert!(store.remove(root).expect("removed"));
        assert!(store.is_private(root), "it may come again");
        let store = again(store);
        assert!(!store.is_private(root) && files(&store, "private") == 0);
    }

    #[test]
    fn a_root_is_its_text() {
        let root = Root::of(b"leasehold");
        assert_eq!(root.to_string().parse(), Ok(root));
        let text = root.to_string();
        for bad in ["", &text[1..], &text.to_uppercase(), &format!("{}g", &text[1..])] {
            assert_eq!(bad.parse::<Root>(), Err(NotARoot), "{bad:?}");
        }
    }

    #[test]
    fn every_way_in_gives_the_same_payload() {
        let (dir, store) = store(roomy());
        for len in SIZES {
            let bytes = content(len);
            let root = Root::of(&bytes);
            let path = dir.path().join("input");
            fs::write(&path, &bytes).expect("writes");
            let size = len as u64;
            let first = store.import_path(&path).expect("imports a file");
            assert_eq!(first, Imported { root, size, already_held: false });
            let outboard = fs::read(store.inner.outboard_path(root)).expect("reads");
            assert!(store.remove(root).expect("removes"));
            let atmost = store.import(Cursor::new(&bytes), Declared::AtMost(size));
            assert_eq!(atmost.expect("imports at most"), first);
            assert_eq!(fs::read(store.inner.outboard_path(root)).expect("reads"), outboard);
            let again = store.import(Cursor::new(&bytes), Declared::Exactly(size));
            assert!(again.expect("imports once more").already_held);

            assert_eq!(store.has(root), Some(size));
            assert_eq!(store.read(root, size).expect("reads"), bytes);
            store.verify(root).expect("verifies");
            let out = dir.path().join("output");
            store.export(root, &out).expect("exports");
            assert_eq!(fs::read(&out).expect("reads"), bytes);
        }
        assert_eq!(store.list().len(), SIZES.len());
        assert_eq!(files(&store, "partial"), 0);
        assert_eq!(store.stats().reserved, 0);
        let before = store.stats();
        let reopened = PayloadStore::open_dir(&store.inner.dir, roomy()).expect("opens again");
        assert_eq!(reopened.list(), store.list());
        assert_eq!(reopened.stats().bytes, before.bytes);
    }

    #[test]
    fn a_source_is_held_to_its_word() {
        let (_dir, store) = store(roomy());
        let bytes = content(G + 10);
        let import = |size| store.import(Cursor::new(&bytes), size);
        let size = bytes.len() as u64;
        assert!(matches!(
            import(Declared::Exactly(size - 1)),
            Err(PayloadError::WrongSize { expected, actual }) if actual == expected + 1
        ));
        assert!(matches!(
            import(Declared::Exactly(size + 1)),
            Err(PayloadError::WrongSize { actual, .. }) if actual == size
        ));
        assert!(matches!(
            import(Declared::AtMost(size - 1)),
            Err(PayloadError::TooLarge { limit }) if limit == size - 1
        ));
        assert_eq!(store.stats(), StoreStats::default());
        assert_eq!(files(&store, "partial"), 0);
    }

    #[test]
    fn no_space_is_said_before_a_byte_is_taken() {
        let limits = Limits { quota: 3 * GROUP_BYTES, ..roomy() };
        let (_dir, small) = store(limits);
        let held = small.import(Cursor::new(content(G)), Declared::Exactly(GROUP_BYTES));
        let held = held.expect("fits");
        let unread = Cursor::new(content(3 * G));
        let mut source = unread.clone();
        let refused = small.import(&mut source, Declared::Exactly(3 * GROUP_BYTES));
        assert!(matches!(refused, Err(PayloadError::NoSpace { .. })), "{refused:?}");
        assert_eq!(source.position(), 0);
        let refused = small.import(unread, Declared::AtMost(u64::MAX));
        assert!(matches!(refused, Err(PayloadError::NoSpace { .. })), "{refused:?}");
        assert!(matches!(small.check_room(&[2 * GROUP_BYTES]), Err(PayloadError::NoSpace { .. })));
        small.check_room(&[GROUP_BYTES]).expect("one more fits");

        // Room that a payload still arriving has taken is not given twice.
        let arriving = small.receive(Root::of(b"x"), GROUP_BYTES + 1).expect("room");
        assert!(matches!(small.check_room(&[GROUP_BYTES]), Err(PayloadError::NoSpace { .. })));
        drop(arriving);
        small.remove(held.root).expect("removes");
        assert_eq!(small.stats(), StoreStats::default());

        let (_dir, full) = store(Limits { keep_free: u64::MAX, ..Limits::default() });
        assert!(matches!(full.check_room(&[1]), Err(PayloadError::NoSpace { available: 0, .. })));
        let (_dir, picky) = store(Limits { max_payload: 9, ..roomy() });
        assert!(matches!(picky.check_room(&[10]), Err(PayloadError::TooLarge { limit: 9 })));
    }

    /// On a file system that shares blocks (`TMPDIR` on XFS or Btrfs) this is about clones, elsewhere
    /// about what is done instead.
    #[test]
    fn a_file_is_cloned_where_its_blocks_can_be_shared() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = PayloadStore::open_dir(dir.path().join("store"), roomy()).expect("opens");
        let bytes: Vec<u8> = (0..3 * GROUP_BYTES as u32 + 7).map(|n| (n >> 5) as u8).collect();
        let (path, size) = (dir.path().join("file"), bytes.len() as u64);
        fs::write(&path, &bytes).expect("writes");
        let root = Root::of(&bytes);
        let room = |size| store.take_room(size, None).expect("room");
        for (path, wrong) in [(&path, size - 1), (&dir.path().join("none"), size)] {
            let refused = store.clone_path(path, root, room(wrong));
            let told =
                matches!(refused, Err(PayloadError::WrongSize { .. } | PayloadError::Source(_)));
            assert!(told, "{refused:?}");
        }
        match store.clone_path(&path, root, room(size)) {
            Err(PayloadError::NotCloned(_)) => assert_eq!(store.has(root), None),
            cloned => {
                assert_eq!(cloned.expect("clones"), Imported { root, size, already_held: false });
                let other = store.clone_path(&path, Root::of(b"x"), room(size));
                assert!(matches!(other, Err(PayloadError::Source(_))), "{other:?}");
                // What becomes of the file is nothing to the payload.
                fs::write(&path, b"overwritten").expect("writes");
                store.verify(root).expect("as it was");
                store.remove(root).expect("removes");
                fs::write(&path, &bytes).expect("writes");
            }
        }
        assert_eq!(store.import_path(&path).expect("imports").root, root);
        assert_eq!(store.read(root, size).expect("reads"), bytes);
        store.verify(root).expect("its outboard is right, too");
        assert_eq!((files(&store, "partial"), store.stats().reserved), (0, 0));
    }

    #[test]
    fn the_least_recently_used_make_room_and_what_is_spared_stays() {
        let each = on_disk(GROUP_BYTES);
        // And a hash pair.
        let limits = Limits { quota: 4 * each + 64, ..roomy() };
        let (_dir, store) = store(limits);
        let import = |n: u8| {
            let bytes = vec![n; G];
            store.import(Cursor::new(&bytes), Declared::Exactly(GROUP_BYTES)).expect("fits").root
        };
        let roots = [1, 2, 3, 4].map(import);
        let held = || roots.map(|root| store.has(root).is_some());
        let spared = HashSet::from([roots[1]]);
        assert_eq!(store.make_room(&[0], Some(&spared)).expect("there is room"), 0);
        // Not enough, whatever goes: then nothing does.
        let refused = store.make_room(&[4 * GROUP_BYTES], Some(&spared));
        assert!(matches!(refused, Err(PayloadError::NoSpace { .. })), "{refused:?}");
        assert_eq!(held(), [true; 4]);
        // The first was used since.
        store.open(roots[0]).expect("opens");
        assert_eq!(store.make_room(&[GROUP_BYTES], Some(&spared)).expect("makes room"), 1);
        assert_eq!(held(), [true, true, false, true]);
        assert_eq!(store.make_room(&[2 * GROUP_BYTES], Some(&spared)).expect("makes room"), 1);
        assert_eq!(held(), [true, true, false, false]);
        // The order outlives the process: files keep their times.
        let day = Duration::from_secs(86_400);
        for (root, days) in [(roots[0], 1), (roots[1], 2)] {
            let file = File::open(store.inner.data_path(root)).expect("opens");
            file.set_modified(SystemTime::now() - day * days).expect("dated");
        }
        let reopened = PayloadStore::open_dir(&store.inner.dir, limits).expect("opens again");
        assert_eq!(reopened.newest(9), [roots[0], roots[1]]);
        reopened.open(roots[1]).expect("opens");
        let reopened = PayloadStore::open_dir(&store.inner.dir, limits).expect("opens again");
        assert_eq!(reopened.newest(9), [roots[1], roots[0]]);
    }

    #[test]
    fn what_is_not_whole_is_set_aside_at_a_start() {
        let (_dir, before) = store(roomy());
        let import = |n: usize| {
            let declared = Declared::Exactly(n as u64);
            before.import(Cursor::new(content(n)), declared).expect("imports").root
        };
        let good = import(2 * G + 1);
        let truncated = import(2 * G + 9);
        let without_outboard = import(G + 3);
        let short_outboard = import(4 * G);
        let bad_end = import(3 * G);
        let file = OpenOptions::new().write(true).open(before.inner.data_path(truncated));
        // Within the same number of groups: the outboard's size alone does not tell.
        file.expect("opens").set_len(2 * GROUP_BYTES + 8).expect("truncates");
        fs::remove_file(before.inner.outboard_path(without_outboard)).expect("removes");
        let file = OpenOptions::new().write(true).open(before.inner.outboard_path(short_outboard));
        file.expect("opens").set_len(64).expect("truncates");
        flip(&before.inner.data_path(bad_end), 3 * GROUP_BYTES - 1);
        let stray = Root::of(b"stray");
        fs::write(before.inner.outboard_path(stray), [0; 64]).expect("writes");
        fs::write(before.inner.dir.join("partial/9.data"), b"half").expect("writes");

        let after = PayloadStore::open_dir(&before.inner.dir, roomy()).expect("opens");
        let only = Stored { root: good, size: 2 * GROUP_BYTES + 1, index: false };
        assert_eq!(after.list(), [only]);
        assert_eq!(after.stats().set_aside, 4);
        assert_eq!(files(&after, "aside"), 7);
        assert_eq!(files(&after, "partial"), 0);
        assert!(!after.inner.outboard_path(stray).exists());
        // What was set aside can come back as itself.
        assert_eq!(import(3 * G), bad_end);
    }

    #[test]
    fn a_flipped_byte_is_found_by_every_verified_read() {
        let (dir, store) = store(roomy());
        let bytes = content(2 * G);
        let size = bytes.len() as u64;
        let out = dir.path().join("output");
        let reads: [&dyn Fn(Root) -> Result<(), PayloadError>; 3] =
            [&|root| store.verify(root), &|root| store.read(root, size).map(|_| ()), &|root| {
                store.export(root, &out)
            }];
        for (i, read) in reads.iter().enumerate() {
            let held = store.import(Cursor::new(&bytes), Declared::Exactly(size)).expect("imports");
            flip(&store.inner.data_path(held.root), 77);
            assert!(matches!(read(held.root), Err(PayloadError::Corrupt(r)) if r == held.root));
            assert_eq!(store.has(held.root), None);
            assert_eq!(store.stats().set_aside, i as u64 + 1);
            assert!(matches!(store.verify(held.root), Err(PayloadError::NotHeld(_))));
        }
        assert!(!out.exists());
        assert_eq!(store.stats().bytes, 0);
    }

    #[test]
    fn an_open_payload_outlives_its_removal() {
        let (_dir, store) = store(roomy());
        let held =
            store.import(Cursor::new(b"still here"), Declared::Exactly(10)).expect("imports");
        let open = store.open(held.root).expect("opens");
        assert!(store.remove(held.root).expect("removes"));
        assert!(!store.remove(held.root).expect("is gone"));
        assert_eq!(open.read_at(6, 4).expect("reads"), b"here"[..]);
    }

    #[tokio::test]
    async fn a_stream_is_imported_and_a_dropped_one_is_not() {
        let (_dir, store) = store(roomy());
        for len in SIZES {
            let bytes = content(len);
            for size in [Declared::AtMost(1 << 30), Declared::Exactly(len as u64)] {
                let held = store.import_stream(&bytes[..], size).await.expect("imports");
                assert_eq!(held.root, Root::of(&bytes));
                store.remove(held.root).expect("removes");
            }
        }
        let (mut feed, source) = tokio::io::duplex(64);
        tokio::io::AsyncWriteExt::write_all(&mut feed, b"half of it").await.expect("writes");
        let importing = store.clone();
        let importing = tokio::spawn(async move {
            importing.import_stream(source, Declared::AtMost(100)).await.map(|_| ())
        });
        while files(&store, "partial") == 0 {
            tokio::task::yield_now().await;
        }
        // The caller loses interest.
        importing.abort();
        while files(&store, "partial") > 0 || store.stats().reserved > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(store.list(), []);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_bytes_come_back_as_they_were(len in 0usize..3 * G, short_reads in 1usize..70_000) {
            /// Gives fewer bytes than asked for, as pipes do.
            struct Dribble<'a>(&'a [u8], usize);
            impl Read for Dribble<'_> {
                fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                    let n = buffer.len().min(self.1);
                    Read::read(&mut self.0, &mut buffer[..n])
                }
            }
            let (_dir, store) = store(roomy());
            let bytes = content(len);
            let source = Dribble(&bytes, short_reads);
            let held = store.import(source, Declared::AtMost(u64::MAX)).expect("imports");
            prop_assert_eq!(held.root, Root::of(&bytes));
            prop_assert_eq!(store.read(held.root, len as u64).expect("reads"), bytes);
            store.verify(held.root).expect("verifies");
        }
    }
}
