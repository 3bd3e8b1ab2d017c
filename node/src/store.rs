//! What a node keeps: one map from keys to values, written in batches, each durable before it
//! is answered.
//!
//! ```text
//!              batches                         every full segment, every 30 s
//!  Store ---> journal-0 .. journal-3  ------------------+------------------------.
//!             preallocated, checksummed                 v                        v
//!             answered after one fdatasync       checkpoint-N                  sled/
//!                                                the state in one file,    the state as a
//!                                                checksummed frames         database
//! ```
//!
//! **The journal is what makes a batch durable.** A batch waits for one write and one
//! `fdatasync` in a preallocated file, together with whatever else was waiting; nothing else is
//! on its way. Details: `store/journal.rs`, `store/commit.rs`.
//!
//! **The state lives twice**, since the journal is a circle and forgets: in sled, which is read
//! at the start, and in the checkpoint file, from which sled is rebuilt. Each carries the
//! number of the last batch it is sure to hold, and a sum over its entries. Either one, with
//! the journal after it, is the whole state; they fail independently; and both are checked at
//! every start, so a damaged one is replaced while the other is whole.
//!
//! **A checkpoint** happens when a segment is full, when 30 s have passed with something new,
//! at a start that had to replay, and at the end. It takes the last write to each key since
//! the one before, appends them to the checkpoint file (sync), applies them to sled (flush,
//! then a sync of our own, because sled's flush is none), and then the journal's segments up
//! to there are free. Its cost follows what changed, not the size of the state: on average at
//! most three bytes written to the checkpoint file for each byte changed (once as a change,
//! twice when the file is rewritten, which happens when changes outgrow the state), and sled's
//! own share. A start reads both copies once.
//!
//! **A start** goes like this:
//!
//! 1. Take the lock, check the owner, read the journal's groups with their checksums.
//! 2. Open sled, sum its entries. Read the checkpoint file, check its frames.
//! 3. A copy can be used if the journal has every batch after it, without a gap. sled is
//!    preferred; if only the checkpoint can be used, sled is moved to `sled.broken-N` and
//!    rebuilt. If neither can, the start is refused, naming the file and the place: nothing is
//!    ever dropped silently. A torn end is dropped, being what was never answered, and counted.
//! 4. Bring both copies up to the end of the journal, sync. Only now is anything handed out:
//!    what a start shows survives whatever comes next.
//!
//! **Faults.** A failed sync, or a database that fails while in use, ends the process (see
//! [`Config::fatal`]): what the disk holds is then unknown to us, and a start finds out. A full
//! disk is met before: the journal's space was taken when the store was made, a reserve lets
//! the next checkpoint still be written, and [`Store::admit`] says no to new work while the
//! batches of what was promised go on being kept. If even that is used up, batches wait.

mod checkpoint;
mod commit;
mod disk;
mod journal;
mod lock;
#[cfg(test)]
mod tests;
mod tree;
mod write;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use checkpoint::{Changes, Checkpoint, Entries, Extent};
use commit::{Checkpointer, Counters, Message, Reserve, Writer};
use disk::{Disk, Os};
use journal::{BLOCK, Broken, Damage, Group, Header, HeaderError, Journal, Scan};
use lock::{Lock, LockError};
use tree::Tree;
use write::Sum;

pub use disk::{Fault, durable_file};
pub use write::{KEY_MAX, TooLong, VALUE_MAX, Write};

/// What is called when the disk or the database failed under the store. It is not meant to
/// return; if it does (in a test), the store stops, and whoever waits hears
/// [`CommitError::Closed`].
#[derive(Clone)]
pub struct FatalHook(Arc<dyn Fn(&Fault) + Send + Sync>);

impl FatalHook {
    /// Calls `hook`, from one of the store's threads.
    pub fn new(hook: impl Fn(&Fault) + Send + Sync + 'static) -> Self {
        Self(Arc::new(hook))
    }

    /// Logs the fault and aborts the process, so that a clean start finds out what the disk
    /// holds.
    pub fn abort() -> Self {
        Self::new(|fault| {
            tracing::error!(%fault, "the store failed: ending the process");
            std::process::abort();
        })
    }

    fn call(&self, fault: &Fault) {
        (self.0)(fault);
    }
}

impl fmt::Debug for FatalHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FatalHook")
    }
}

/// How a store is kept. [`Config::new`] has values for a node; the tests use smaller ones.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whose state this is: the node's public key. A store of another owner is refused.
    pub owner: [u8; 32],
    /// Segments of the journal, 2 to 64; 4. Used when the store is made; a store that is there
    /// keeps its own.
    pub segments: u16,
    /// Bytes of each, a multiple of 4 KiB from 64 KiB to 1 GiB; 8 MiB, which holds 2,000 lone
    /// batches or some 16,000 in groups. Larger ones make checkpoints rarer and starts slower.
    /// Used when the store is made, like `segments`.
    pub segment_bytes: u64,
    /// Batches that may wait for the writer before [`Store::submit`] waits, at least 1; 1,024.
    pub queue: usize,
    /// How long a change may stay in the journal alone; 30 s. Shorter makes starts after a crash
    /// quicker and writes a key that changes often more often.
    pub checkpoint_every: Duration,
    /// Disk space set aside for finishing a checkpoint on a full disk, in bytes; 16 MiB.
    pub reserve_bytes: u64,
    /// Free disk space, in bytes, below which [`Store::admit`] refuses; 64 MiB.
    pub min_disk_free: u64,
    /// The checkpoint file is not rewritten before its changes have come to this many bytes;
    /// 1 MiB.
    pub rewrite_min: u64,
    /// What happens when the disk fails; [`FatalHook::abort`].
    pub fatal: FatalHook,
    disk: Arc<dyn Disk>,
}

impl Config {
    /// The values above, for `owner`.
    pub fn new(owner: [u8; 32]) -> Self {
        Self {
            owner,
            segments: 4,
            segment_bytes: 8 * 1024 * 1024,
            queue: 1024,
            checkpoint_every: Duration::from_secs(30),
            reserve_bytes: 16 * 1024 * 1024,
            min_disk_free: 64 * 1024 * 1024,
            rewrite_min: 1024 * 1024,
            fatal: FatalHook::abort(),
            disk: Arc::new(Os),
        }
    }

    fn check(&self) -> Result<(), OpenError> {
        if !(2..=64).contains(&self.segments) {
            return Err(OpenError::Config("segments must be 2 to 64"));
        }
        let range = 64 * 1024..=1024 * 1024 * 1024;
        if !range.contains(&self.segment_bytes) || !self.segment_bytes.is_multiple_of(BLOCK) {
            return Err(OpenError::Config(
                "segment_bytes must be a multiple of 4096 from 64 KiB to 1 GiB",
            ));
        }
        if self.queue == 0 {
            return Err(OpenError::Config("queue must be at least 1"));
        }
        Ok(())
    }
}

/// Why a store was not opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// A value of [`Config`] is out of its range.
    #[error("the store's configuration: {0}")]
    Config(&'static str),
    /// The file system said no.
    #[error("cannot use {path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than the owner can look into the directory.
    #[error(
        "{dir} has mode {mode:04o}, others can get at it; make it private: chmod 700 {dir}",
        dir = dir.display()
    )]
    Mode {
        /// The directory.
        dir: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Another process has it open.
    #[error(
        "{dir} is in use by {holder}; one node at a time can have it",
        dir = dir.display(),
        holder = pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// The process, where it had written its number.
        pid: Option<u32>,
    },
    /// It is another node's.
    #[error(
        "{path} belongs to the node with the key {owner}, not to {expected}; give this node its \
         own directory, or the key that goes with this one",
        path = path.display()
    )]
    Foreign {
        /// The file that says so.
        path: PathBuf,
        /// Whose it is.
        owner: Owner,
        /// Whose it should be.
        expected: Owner,
    },
    /// Another version wrote it.
    #[error(
        "{path} has format version {found}, this program reads {}; use the program that wrote it",
        journal::VERSION,
        path = path.display()
    )]
    Version {
        /// The file that says so.
        path: PathBuf,
        /// Its version.
        found: u16,
    },
    /// Something that was kept is damaged, and no whole copy of it is left.
    #[error(
        "{path} is damaged at byte {offset}: {what}; nothing was changed, restore the directory \
         from a copy",
        path = path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// The disk is too full to start.
    #[error(
        "no space for the store in {dir}: {needed} bytes are needed, {free} are free; free some, \
         or choose another directory",
        dir = dir.display()
    )]
    NoSpace {
        /// The directory.
        dir: PathBuf,
        /// About how many bytes are needed.
        needed: u64,
        /// How many there are.
        free: u64,
    },
}

/// A node's public key, as an error shows it: in hexadecimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner(pub [u8; 32]);

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why a batch was not kept. It was then not kept in part either.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CommitError {
    /// A key or value is over its bound.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The whole batch is over its bound.
    #[error("a batch of {bytes} bytes: at most {most} are kept at once")]
    BatchTooLong {
        /// Its length.
        bytes: u64,
        /// The bound.
        most: u64,
    },
    /// The store was closed, or failed, before the batch was known to be durable.
    #[error("the store is closed")]
    Closed,
}

/// Why nothing new should be promised now.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The disk is nearly full, or the checkpoint waits for space.
    #[error(
        "the store is short of space: {} bytes free on the disk, {} in the journal; free some \
         space on the file system of the data directory",
        room.disk_free, room.journal_free
    )]
    NoSpace {
        /// What there is.
        room: Room,
    },
    /// The file system does not say how much is free.
    #[error("cannot ask for the free space of the data directory: {0}")]
    Unknown(io::ErrorKind),
}

/// Why what is kept cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReadFault {
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
    /// The database failed.
    #[error("the database cannot be read: {0}")]
    Fault(String),
}

/// How much can still be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes that the journal takes before it must wait for a checkpoint.
    pub journal_free: u64,
    /// Bytes free for this user on the disk.
    pub disk_free: u64,
}

/// Figures since the store was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Batches made durable.
    pub commits: u64,
    /// Syncs of the journal that did it. `commits / syncs` is how well groups form.
    pub syncs: u64,
    /// Bytes written to the journal, in whole blocks.
    pub bytes: u64,
    /// The number of the newest durable batch, counted since the store was made.
    pub last_seq: u64,
    /// Checkpoints made.
    pub checkpoints: u64,
    /// One is being made, or tidied up after.
    pub checkpointing: bool,
    /// Bytes written to checkpoint files.
    pub checkpoint_bytes: u64,
    /// Times the checkpoint file was rewritten whole.
    pub rewrites: u64,
    /// Bytes of the journal that wait for a checkpoint.
    pub journal_used: u64,
    /// Bytes the journal can hold.
    pub journal_capacity: u64,
    /// The checkpoint waits for space on the disk.
    pub starved: bool,
}

/// What a start found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovery {
    /// The store was made by this start.
    pub created: bool,
    /// Batches that were in the journal alone.
    pub replayed: u64,
    /// Bytes of the last group that had not reached the disk whole, and were given up: nobody
    /// had been answered for them.
    pub torn_bytes: u64,
    /// The database was rebuilt.
    pub rebuilt: Option<Rebuilt>,
    /// The checkpoint file was damaged or gone, and was written again from the database.
    pub checkpoint_rewritten: bool,
}

/// Why the database was rebuilt, and where the old one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    /// What was wrong with it.
    pub why: String,
    /// The directory it was moved to; `None` when it was gone.
    pub set_aside: Option<PathBuf>,
}

/// The state at the start.
#[derive(Debug)]
pub struct Opened {
    /// All entries, sorted by key.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
    /// How the start went.
    pub recovered: Recovery,
}

/// A batch that is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    /// Its number: batches are numbered from 1 in the order in which they were submitted, and
    /// after any crash the state is that of a run of batches from the first on, without a gap.
    pub seq: u64,
}

/// A batch on its way to the disk. Dropping this does not call it back.
#[derive(Debug)]
#[must_use = "a batch is durable only when this says so"]
pub struct Pending(oneshot::Receiver<u64>);

impl Future for Pending {
    type Output = Result<Durable, CommitError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0)
            .poll(cx)
            .map(|seq| seq.map(|seq| Durable { seq }).map_err(|_| CommitError::Closed))
    }
}

impl Pending {
    /// Blocks until it is durable. Not for async code, where it panics.
    ///
    /// # Errors
    /// [`CommitError::Closed`].
    pub fn wait(self) -> Result<Durable, CommitError> {
        self.0.blocking_recv().map(|seq| Durable { seq }).map_err(|_| CommitError::Closed)
    }
}

/// A handle to the store; clones are handles to the same one.
///
/// When the last handle is dropped without [`Store::close`], the store makes its last
/// checkpoint and unlocks the directory in its own time.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    queue: mpsc::Sender<Message>,
    counters: Arc<Counters>,
    thread: Mutex<Option<JoinHandle<()>>>,
    batch_most: u64,
    capacity: u64,
    min_disk_free: u64,
    disk: Arc<dyn Disk>,
}

impl Store {
    /// Opens the store in `dir`, making it where there is none, and returns what it holds.
    /// Blocks: for reading the state, and for filling the journal with zeros the first time.
    ///
    /// # Errors
    /// See [`OpenError`]. After [`OpenError::Corrupt`] the directory is as it was, except that
    /// sled has opened its own.
    pub fn open(dir: &Path, config: Config) -> Result<(Self, Opened), OpenError> {
        config.check()?;
        private_dir(dir)?;
        let lock = Lock::take(&dir.join("lock")).map_err(|error| match error {
            LockError::Held(pid) => OpenError::Locked { dir: dir.to_owned(), pid },
            LockError::Io(source) => OpenError::Io { path: dir.join("lock"), source },
        })?;
        let opening = Opening { dir, config: &config };
        let Ready { header, entries, recovered, seq, newest_segment, checkpoint, tree } =
            opening.recover()?;
        let disk = Arc::clone(&config.disk);
        let reserve = opening.reserve();
        reserve.keep(disk.as_ref(), dir);
        let journal = Journal::open(disk.as_ref(), dir, &header, newest_segment)
            .map_err(|fault| opening.fault(fault, 0))?;

        let (sender, queue) = mpsc::channel(config.queue);
        let counters = Arc::new(Counters::default());
        counters.last_seq.store(seq, Ordering::Relaxed);
        let threads = |source| OpenError::Io { path: dir.to_owned(), source };
        let checkpoints = Checkpointer {
            disk: Arc::clone(&disk),
            dir: dir.to_owned(),
            checkpoint,
            tree,
            reserve,
            every: config.checkpoint_every,
            rewrite_min: config.rewrite_min,
            counters: Arc::clone(&counters),
            fatal: config.fatal.clone(),
            writer: sender.downgrade(),
        }
        .start(seq)
        .map_err(threads)?;
        let writer = Writer {
            queue,
            journal,
            group: Group::new(header.mark),
            group_bytes: header.group_bytes(),
            last_seq: seq,
            counters: Arc::clone(&counters),
            fatal: config.fatal.clone(),
            lock,
            checkpoints,
        };
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writer.run())
            .map_err(threads)?;
        let store = Self(Arc::new(Inner {
            dir: dir.to_owned(),
            queue: sender,
            counters,
            thread: Mutex::new(Some(thread)),
            batch_most: header.group_bytes(),
            capacity: header.capacity(),
            min_disk_free: config.min_disk_free,
            disk,
        }));
        Ok((store, Opened { entries: entries.into_iter().collect(), recovered }))
    }

    /// Queues a batch: all of it is kept, or nothing. When this returns its place in the order
    /// is fixed; the result says when it is durable. Waits while the queue is full; a call that
    /// is dropped while it waits has queued nothing.
    ///
    /// # Errors
    /// [`CommitError`]; then nothing was queued.
    pub async fn submit(&self, batch: Vec<Write>) -> Result<Pending, CommitError> {
        let (message, pending) = self.message(batch)?;
        self.0.queue.send(message).await.map_err(|_| CommitError::Closed)?;
        Ok(pending)
    }

    /// Queues any number of writes in their order, as few batches as hold them; the result says
    /// when the last of them is durable, and with it all before. After a crash some first part of
    /// them may be kept. Of several writes to one key in one batch only the last is kept.
    ///
    /// # Errors
    /// [`CommitError`]; then some first part of them was queued.
    pub async fn submit_all(&self, writes: Vec<Write>) -> Result<Pending, CommitError> {
        let mut batch: Vec<Write> = Vec::with_capacity(writes.len());
        let mut places: HashMap<Vec<u8>, usize> = HashMap::new();
        let mut bytes = journal::batch_len(&[]);
        for write in writes {
            let more = write.encoded_len() as u64;
            if bytes + more > self.0.batch_most && !batch.is_empty() {
                // The writer keeps batches in order: the last one's answer is enough.
                drop(self.submit(std::mem::take(&mut batch)).await?);
                places.clear();
                bytes = journal::batch_len(&[]);
            }
            match places.get(&write.key).and_then(|place| batch.get_mut(*place)) {
                Some(place) => {
                    bytes = bytes + more - place.encoded_len() as u64;
                    *place = write;
                }
                None => {
                    bytes += more;
                    places.insert(write.key.clone(), batch.len());
                    batch.push(write);
                }
            }
        }
        self.submit(batch).await
    }

    /// [`Store::submit`], then waits until it is durable.
    ///
    /// # Errors
    /// [`CommitError`]. After [`CommitError::Closed`] it is not known whether the batch was
    /// kept; the next start tells.
    pub async fn commit(&self, batch: Vec<Write>) -> Result<Durable, CommitError> {
        self.submit(batch).await?.await
    }

    /// Waits until everything that was submitted before is durable; returns the number of the
    /// last of it.
    ///
    /// # Errors
    /// [`CommitError::Closed`].
    pub async fn barrier(&self) -> Result<Durable, CommitError> {
        let (answer, pending) = oneshot::channel();
        let sent = self.0.queue.send(Message::Barrier(answer)).await;
        sent.map_err(|_| CommitError::Closed)?;
        Pending(pending).await
    }

    /// Everything durable whose key starts with `prefix`, sorted by key. Reads the database on a
    /// thread of its own; the writer is asked only for what the database may not have yet.
    ///
    /// # Errors
    /// [`ReadFault`].
    pub async fn scan(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>, ReadFault> {
        let (answer, look) = oneshot::channel();
        let message = Message::Look(prefix.to_vec(), answer);
        self.0.queue.send(message).await.map_err(|_| ReadFault::Closed)?;
        let commit::Look { view, newer } = look.await.map_err(|_| ReadFault::Closed)?;
        let prefix = prefix.to_vec();
        let read = tokio::task::spawn_blocking(move || {
            let mut entries = view.under(&prefix)?;
            for (key, value) in newer {
                match value {
                    Some(value) => entries.insert(key, value),
                    None => entries.remove(&key),
                };
            }
            Ok(entries.into_iter().collect())
        });
        match read.await {
            Ok(entries) => entries.map_err(|fault: Fault| ReadFault::Fault(fault.to_string())),
            Err(_) => Err(ReadFault::Closed),
        }
    }

    /// [`Store::submit`] outside async code, where it panics.
    ///
    /// # Errors
    /// As there.
    pub fn submit_blocking(&self, batch: Vec<Write>) -> Result<Pending, CommitError> {
        let (message, pending) = self.message(batch)?;
        self.0.queue.blocking_send(message).map_err(|_| CommitError::Closed)?;
        Ok(pending)
    }

    /// [`Store::commit`] outside async code, where it panics.
    ///
    /// # Errors
    /// As there.
    pub fn commit_blocking(&self, batch: Vec<Write>) -> Result<Durable, CommitError> {
        self.submit_blocking(batch)?.wait()
    }

    /// [`Store::barrier`] outside async code, where it panics.
    ///
    /// # Errors
    /// As there.
    pub fn barrier_blocking(&self) -> Result<Durable, CommitError> {
        let (answer, pending) = oneshot::channel();
        let sent = self.0.queue.blocking_send(Message::Barrier(answer));
        sent.map_err(|_| CommitError::Closed)?;
        Pending(pending).wait()
    }

    fn message(&self, batch: Vec<Write>) -> Result<(Message, Pending), CommitError> {
        batch.iter().try_for_each(Write::check)?;
        let (bytes, most) = (journal::batch_len(&batch), self.0.batch_most);
        if bytes > most {
            return Err(CommitError::BatchTooLong { bytes, most });
        }
        let (answer, pending) = oneshot::channel();
        Ok((Message::Commit(batch, bytes, answer), Pending(pending)))
    }

    /// How much can still be kept.
    ///
    /// # Errors
    /// What the file system says when asked for its free space.
    pub fn room(&self) -> io::Result<Room> {
        let used = self.0.counters.journal_used.load(Ordering::Relaxed);
        Ok(Room {
            journal_free: self.0.capacity.saturating_sub(used),
            disk_free: self.0.disk.available(&self.0.dir)?,
        })
    }

    /// Whether there is space to take on something new. To be asked before a promise is made:
    /// once accepted, a batch is never refused for space.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] below [`Config::min_disk_free`], or while a checkpoint waits for
    /// space.
    pub fn admit(&self) -> Result<(), StoreError> {
        let room = self.room().map_err(|error| StoreError::Unknown(error.kind()))?;
        let starved = self.0.counters.starved.load(Ordering::Relaxed);
        if starved || room.disk_free < self.0.min_disk_free {
            return Err(StoreError::NoSpace { room });
        }
        Ok(())
    }

    /// Figures since the store was opened.
    pub fn stats(&self) -> Stats {
        let counters = &self.0.counters;
        Stats {
            commits: counters.commits.load(Ordering::Relaxed),
            syncs: counters.syncs.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
            last_seq: counters.last_seq.load(Ordering::Relaxed),
            checkpoints: counters.checkpoints.load(Ordering::Relaxed),
            checkpointing: counters.tidied.load(Ordering::Relaxed)
                < counters.asked.load(Ordering::Relaxed),
            checkpoint_bytes: counters.checkpoint_bytes.load(Ordering::Relaxed),
            rewrites: counters.rewrites.load(Ordering::Relaxed),
            journal_used: counters.journal_used.load(Ordering::Relaxed),
            journal_capacity: self.0.capacity,
            starved: counters.starved.load(Ordering::Relaxed),
        }
    }

    /// Keeps what is queued, makes the last checkpoint, ends both threads and unlocks the
    /// directory. Other handles get [`CommitError::Closed`] from then on. Closing twice is no
    /// error.
    pub async fn close(&self) {
        self.0.counters.closing.store(true, Ordering::Relaxed);
        let (answer, closed) = oneshot::channel();
        if self.0.queue.send(Message::Close(answer)).await.is_ok() {
            let _ = closed.await;
        }
        self.join();
    }

    /// [`Store::close`] outside async code, where it panics.
    pub fn close_blocking(&self) {
        self.0.counters.closing.store(true, Ordering::Relaxed);
        let (answer, closed) = oneshot::channel();
        if self.0.queue.blocking_send(Message::Close(answer)).is_ok() {
            let _ = closed.blocking_recv();
        }
        self.join();
    }

    /// The writer has answered or is about to end: this waits for its last few instructions.
    fn join(&self) {
        let thread = self.0.thread.lock().ok().and_then(|mut thread| thread.take());
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// Makes `dir` with mode 0700, or checks that it has no other.
fn private_dir(dir: &Path) -> Result<(), OpenError> {
    let io = |source| OpenError::Io { path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
    let mode = fs::metadata(dir).map_err(io)?.permissions().mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    // An empty one has nothing to hide yet.
    if fs::read_dir(dir).map_err(io)?.next().is_none() {
        return fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(io);
    }
    Err(OpenError::Mode { dir: dir.to_owned(), mode })
}

/// A store being opened.
struct Opening<'a> {
    dir: &'a Path,
    config: &'a Config,
}

/// What opening leads to.
struct Ready {
    header: Header,
    entries: Entries,
    recovered: Recovery,
    seq: u64,
    newest_segment: Option<u16>,
    checkpoint: Checkpoint,
    tree: Tree,
}

/// The checkpoint file as it was found.
struct Kept {
    number: u64,
    path: PathBuf,
    extent: Extent,
}

impl Opening<'_> {
    fn recover(&self) -> Result<Ready, OpenError> {
        let mut recovered = Recovery::default();
        self.remove_unfinished()?;
        let header = match self.format()? {
            Some(header) => header,
            None => {
                recovered.created = true;
                self.create()?
            }
        };
        let scan = Scan::read(self.dir, &header).map_err(|damage| self.damage(damage))?;
        let (newest_file, kept) = self.checkpoint()?;
        let sled = self.dir.join("sled");
        let tree = Tree::open(&sled)
            .map_err(|source| self.io_or_space(&sled, source, header.segment_bytes))?;

        // How far the store had come, by all that can be read. A copy can be used if it came
        // as far itself, or if the journal goes on where it ends and leads there.
        let (tree, mut why) = match tree {
            tree::Opened::Whole(tree, entries) => (Some((tree, entries)), None),
            tree::Opened::Absent => (None, None),
            tree::Opened::Broken(why) => (None, Some(why)),
        };
        let tree_seq = tree.as_ref().map_or(0, |(tree, _)| tree.seq());
        let kept_seq = kept.as_ref().map_or(0, |kept| kept.extent.seq);
        let seq = scan.newest().max(tree_seq).max(kept_seq);
        let kept = kept.and_then(|kept| {
            let reaches = self.reaches(kept.extent.seq, seq, &scan, &kept.path);
            reaches.map(|()| kept)
        });
        let tree = tree.filter(|(tree, _)| {
            let twin = kept.as_ref().ok().filter(|kept| kept.extent.seq == tree.seq());
            if let Err(error) = self.reaches(tree.seq(), seq, &scan, &sled) {
                why = Some(format!("it is too old: {error}"));
            } else if twin.is_some_and(|kept| kept.extent.sum != tree.sum()) {
                why = Some("its entries are not those of the checkpoint".to_owned());
            }
            why.is_none()
        });
        let (base, tree, mut entries, kept) = match (tree, kept) {
            (Some((tree, entries)), kept) => (tree.seq(), Some(tree), entries, kept.ok()),
            (None, Ok(kept)) => {
                let entries = checkpoint::load(&kept.path, &self.config.owner, &kept.extent)
                    .map_err(|unusable| self.unusable(&kept.path, unusable))?;
                (kept.extent.seq, None, entries, Some(kept))
            }
            (None, Err(error)) => return Err(error),
        };

        // What both copies lack of the journal.
        let oldest = kept.as_ref().map_or(base, |kept| kept.extent.seq.min(base));
        let mut changes = Changes::new();
        scan.replay(oldest, |number, batch| {
            recovered.replayed += u64::from(number > base);
            for Write { key, value } in batch {
                match &value {
                    Some(value) => entries.insert(key.clone(), value.clone()),
                    None => entries.remove(&key),
                };
                changes.insert(key, value);
            }
        })
        .map_err(|damage| self.damage(damage))?;
        recovered.torn_bytes = scan.torn_after(scan.newest());
        let sum = Sum::of(entries.iter());

        // Both are brought there, the checkpoint first: it is what the database is rebuilt from.
        let needed = changes
            .iter()
            .map(|(key, value)| write::encoded_len(key, value.as_deref()) as u64)
            .sum::<u64>();
        let whole = entries.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum();
        let disk = self.config.disk.as_ref();
        let checkpoint = match kept.filter(|kept| kept.number == newest_file) {
            Some(kept) => self.with_space(needed, || {
                let Kept { number, extent, .. } = &kept;
                let mut file = Checkpoint::open(disk, self.dir, &header, *number, extent)?;
                if extent.seq < seq {
                    file.append(seq, &changes, sum)?;
                }
                Ok(file)
            })?,
            None => {
                recovered.checkpoint_rewritten = true;
                self.with_space(whole, || {
                    let number = newest_file + 1;
                    let entries =
                        entries.iter().map(|(key, value)| Ok((key.clone(), value.clone())));
                    Checkpoint::create(disk, self.dir, &header, number, seq, sum, entries)
                })?
            }
        };
        checkpoint.remove_older(disk).map_err(|fault| self.fault(fault, needed))?;
        let tree = match tree {
            Some(mut tree) => {
                if tree.seq() < seq {
                    self.sled_space(needed)?;
                    let applied = tree.sums_after(&changes);
                    let applied = applied.and_then(|sums| tree.apply(seq, &changes, &sums));
                    applied.map_err(|fault| self.fault(fault, needed))?;
                    tree.sync().map_err(|fault| self.fault(fault, needed))?;
                }
                *tree
            }
            None => {
                self.sled_space(whole)?;
                recovered.rebuilt = self.set_aside(&sled, why, recovered.created)?;
                let tree = Tree::create(&sled, seq, &entries);
                let tree = tree.map_err(|fault| self.fault(fault, whole))?;
                for dir in [sled.as_path(), self.dir] {
                    disk.sync_dir(dir).map_err(|source| self.io(dir, source))?;
                }
                tree
            }
        };
        self.report(&recovered);
        let newest_segment = scan.newest_segment();
        Ok(Ready { header, entries, recovered, seq, newest_segment, checkpoint, tree })
    }

    fn report(&self, recovered: &Recovery) {
        let dir = self.dir.display();
        if recovered.torn_bytes > 0 {
            let bytes = recovered.torn_bytes;
            tracing::warn!(%dir, bytes, "the journal's last write was unfinished and was given up");
        }
        if let Some(Rebuilt { why, set_aside }) = &recovered.rebuilt {
            tracing::warn!(%dir, %why, ?set_aside, "the database was rebuilt from the checkpoint");
        }
        if recovered.checkpoint_rewritten {
            tracing::warn!(%dir, "the checkpoint was damaged and was written again");
        }
        if recovered.replayed > 0 {
            tracing::info!(%dir, batches = recovered.replayed, "replayed the journal");
        }
    }

    /// The file `format`: written last when a store is made, so where it is, everything is.
    fn format(&self) -> Result<Option<Header>, OpenError> {
        let path = self.dir.join("format");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.check_nothing_is_kept().map(|()| None);
            }
            Err(source) => return Err(self.io(&path, source)),
        };
        let header = Header::decode(&bytes, &self.config.owner)
            .map_err(|error| self.header(&path, error))?;
        let sound = header.index == Header::FORMAT
            && (2..=64).contains(&header.segments)
            && (64 * 1024..=1024 * 1024 * 1024).contains(&header.segment_bytes)
            && header.segment_bytes.is_multiple_of(BLOCK);
        if !sound {
            let what = "its figures are out of range".to_owned();
            return Err(OpenError::Corrupt { path, offset: 0, what });
        }
        Ok(Some(header))
    }

    /// Without `format` there is no store here, or one that was not finished being made; both
    /// hold nothing. If something is held after all, somebody removed the file.
    fn check_nothing_is_kept(&self) -> Result<(), OpenError> {
        let files = checkpoint::list(self.dir).map_err(|source| self.io(self.dir, source))?;
        let kept = files.iter().any(|(_, path)| {
            let found = checkpoint::inspect(path, &self.config.owner);
            matches!(found, Ok(extent) if extent.seq > 0)
        });
        if kept || self.dir.join("sled").exists() {
            let what = "it is gone, although the directory holds a store".to_owned();
            return Err(OpenError::Corrupt { path: self.dir.join("format"), offset: 0, what });
        }
        Ok(())
    }

    /// Makes an empty store; `format` comes last.
    fn create(&self) -> Result<Header, OpenError> {
        let (disk, dir) = (self.config.disk.as_ref(), self.dir);
        let mut mark = [0; 16];
        getrandom::fill(&mut mark).map_err(|error| self.io(dir, io::Error::from(error)))?;
        let header = Header {
            owner: self.config.owner,
            mark,
            segments: self.config.segments,
            segment_bytes: self.config.segment_bytes,
            index: Header::FORMAT,
        };
        let needed = header.segment_bytes.saturating_mul(u64::from(header.segments));
        let free = disk.available(dir).map_err(|source| self.io(dir, source))?;
        if free < needed {
            return Err(OpenError::NoSpace { dir: dir.to_owned(), needed, free });
        }
        let made = journal::create(disk, dir, &header)
            .and_then(|()| {
                let nothing = std::iter::empty();
                Checkpoint::create(disk, dir, &header, 1, 0, Sum::default(), nothing)
            })
            .and_then(|_| disk::replace(disk, &dir.join("format"), &header.encode()));
        made.map_err(|fault| self.fault(fault, needed))?;
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_dir(parent).map_err(|source| self.io(parent, source))?;
        }
        Ok(header)
    }

    /// Files that a crash left half written under a name that nothing reads.
    fn remove_unfinished(&self) -> Result<(), OpenError> {
        let io = |source| self.io(self.dir, source);
        for entry in fs::read_dir(self.dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name();
            let ours = name.to_str().is_some_and(|name| {
                name == "format.tmp" || (name.starts_with("checkpoint-") && name.ends_with(".tmp"))
            });
            if ours {
                self.config.disk.remove(&entry.path()).map_err(io)?;
            }
        }
        Ok(())
    }

    /// The newest checkpoint file that is whole, and the highest number in use: a crash may
    /// leave the file before the newest, which then ends where the newest begins.
    fn checkpoint(&self) -> Result<(u64, Result<Kept, OpenError>), OpenError> {
        let files = checkpoint::list(self.dir).map_err(|source| self.io(self.dir, source))?;
        let newest = files.first().map_or(0, |(number, _)| *number);
        let mut found = None;
        for (number, path) in files {
            match checkpoint::inspect(&path, &self.config.owner) {
                Ok(extent) => return Ok((newest, Ok(Kept { number, path, extent }))),
                Err(checkpoint::Unusable::Header(HeaderError::Foreign(owner))) => {
                    return Err(self.header(&path, HeaderError::Foreign(owner)));
                }
                Err(unusable) => {
                    found.get_or_insert_with(|| self.unusable(&path, unusable));
                }
            }
        }
        let none = || OpenError::Corrupt {
            path: self.dir.join("checkpoint-1"),
            offset: 0,
            what: "there is no checkpoint file".to_owned(),
        };
        Ok((newest, Err(found.unwrap_or_else(none))))
    }

    /// Whether the copy in `path`, which ends with batch `copy`, and the journal after it lead
    /// up to batch `end` without a gap.
    fn reaches(&self, copy: u64, end: u64, scan: &Scan, path: &Path) -> Result<(), OpenError> {
        if copy >= end {
            return Ok(());
        }
        scan.bridges_from(copy).map_err(|damage| self.damage(damage))?;
        if scan.newest() < end {
            let what = format!("it ends with batch {copy}, and batch {end} was kept after it");
            return Err(OpenError::Corrupt { path: path.to_owned(), offset: 0, what });
        }
        Ok(())
    }

    fn set_aside(
        &self,
        sled: &Path,
        why: Option<String>,
        created: bool,
    ) -> Result<Option<Rebuilt>, OpenError> {
        if !sled.exists() {
            let why = "it was gone".to_owned();
            return Ok((!created).then_some(Rebuilt { why, set_aside: None }));
        }
        let aside = tree::set_aside(sled).map_err(|source| self.io(sled, source))?;
        Ok(Some(Rebuilt { why: why.unwrap_or_default(), set_aside: Some(aside) }))
    }

    /// Runs `step`; on a full disk once more with the reserve given up.
    fn with_space<T>(
        &self,
        needed: u64,
        mut step: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T, OpenError> {
        let mut done = step();
        if matches!(&done, Err(fault) if fault.is_full())
            && self.reserve().release(self.config.disk.as_ref())
        {
            done = step();
        }
        done.map_err(|fault| self.fault(fault, needed))
    }

    /// sled does not come back from a full disk, so it is not led there.
    fn sled_space(&self, bytes: u64) -> Result<(), OpenError> {
        let needed = bytes.saturating_mul(2).saturating_add(4 * 1024 * 1024);
        let disk = self.config.disk.as_ref();
        let free = || disk.available(self.dir).map_err(|source| self.io(self.dir, source));
        if free()? < needed {
            self.reserve().release(disk);
        }
        match free()? {
            free if free < needed => {
                Err(OpenError::NoSpace { dir: self.dir.to_owned(), needed, free })
            }
            _ => Ok(()),
        }
    }

    fn reserve(&self) -> Reserve {
        Reserve::new(self.dir, self.config.reserve_bytes)
    }

    fn io(&self, path: &Path, source: io::Error) -> OpenError {
        OpenError::Io { path: path.to_owned(), source }
    }

    fn io_or_space(&self, path: &Path, source: io::Error, needed: u64) -> OpenError {
        if !disk::is_full(&source) {
            return self.io(path, source);
        }
        let free = self.config.disk.available(self.dir).unwrap_or(0);
        OpenError::NoSpace { dir: self.dir.to_owned(), needed, free }
    }

    fn fault(&self, fault: Fault, needed: u64) -> OpenError {
        match fault {
            Fault::Write { path, source } => self.io_or_space(&path, source, needed),
            Fault::Sync { path, source } => self.io(&path, source),
            Fault::Tree { path, source } => self.io(&path, io::Error::other(source)),
            Fault::Panicked { thread } => self.io(self.dir, io::Error::other(thread)),
        }
    }

    fn damage(&self, damage: Damage) -> OpenError {
        let Damage { path, offset, what } = damage;
        match what {
            Broken::Header(error) => self.header(&path, error),
            Broken::Io(source) => OpenError::Io { path, source },
            Broken::Other(what) => OpenError::Corrupt { path, offset, what },
        }
    }

    fn header(&self, path: &Path, error: HeaderError) -> OpenError {
        let path = path.to_owned();
        match error {
            HeaderError::Damaged(what) => {
                OpenError::Corrupt { path, offset: 0, what: what.to_owned() }
            }
            HeaderError::Version(found) => OpenError::Version { path, found },
            HeaderError::Foreign(owner) => {
                OpenError::Foreign { path, owner: Owner(owner), expected: Owner(self.config.owner) }
            }
        }
    }

    fn unusable(&self, path: &Path, unusable: checkpoint::Unusable) -> OpenError {
        match unusable {
            checkpoint::Unusable::Io(source) => self.io(path, source),
            checkpoint::Unusable::Header(error) => self.header(path, error),
            checkpoint::Unusable::Damaged { offset } => OpenError::Corrupt {
                path: path.to_owned(),
                offset,
                what: "its frames end before its state does".to_owned(),
            },
        }
    }
}
