//! The two threads that keep things: the *writer* makes batches durable in the journal, the
//! *checkpointer* moves what has gathered there into checkpoint and database.
//!
//! ```text
//!  submit -> [ bounded queue ] -> writer: take what waits -> one group -> write, sync -> answer
//!                                   |  changes since the last checkpoint, in memory
//!                                   v
//!                                 checkpointer: append to checkpoint, sync
//!                                   |           apply to the database, flush, sync
//!                                   v
//!                                 "covered up to batch N": segments up to N are free again
//! ```
//!
//! The writer never waits to gather a group: a batch that comes alone is written alone, and
//! while a sync runs the next group gathers by itself. It waits for the checkpointer only when
//! the next segment is not free yet, which is the store's back-pressure: nothing is refused
//! for space after it was accepted, it takes longer.
//!
//! The checkpointer gets one checkpoint at a time. It is asked for one when a segment is full
//! and when its timer says so; meanwhile changes gather, the newest per key, so a key that is
//! written often costs one write per checkpoint.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::FatalHook;
use super::checkpoint::{Changes, Checkpoint};
use super::disk::{Disk, Fault};
use super::journal::{GROUP_BATCHES, Group, Journal};
use super::lock::Lock;
use super::tree::{Tree, View};
use super::write::{self, Write};

/// How long the checkpointer waits before it tries a full disk again.
const FULL_DISK_RETRY: Duration = Duration::from_secs(1);

/// What the writer is asked.
#[derive(Debug)]
pub(super) enum Message {
    /// Make it durable, then answer with its number.
    Commit(Vec<Write>, u64, oneshot::Sender<u64>),
    /// Answer when everything before is durable.
    Barrier(oneshot::Sender<u64>),
    /// Answer with what is kept under a prefix.
    Look(Vec<u8>, oneshot::Sender<Look>),
    /// The checkpointer is done with one, or its timer asks for one.
    Checkpointer { due: bool },
    /// Checkpoint, end, then answer.
    Close(oneshot::Sender<()>),
}

/// Figures that anybody may read at any time.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) commits: AtomicU64,
    pub(super) syncs: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) last_seq: AtomicU64,
    pub(super) checkpoints: AtomicU64,
    /// Checkpoints handed to the checkpointer, and those it is done with altogether.
    pub(super) asked: AtomicU64,
    pub(super) tidied: AtomicU64,
    pub(super) checkpoint_bytes: AtomicU64,
    pub(super) rewrites: AtomicU64,
    pub(super) journal_used: AtomicU64,
    /// The checkpointer waits for space on the disk.
    pub(super) starved: AtomicBool,
    /// The store is being closed: do not wait for space any more.
    pub(super) closing: AtomicBool,
}

fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Why the writer stops without having been asked to.
enum Halt {
    /// The disk failed under it.
    Fault(Fault),
    /// The checkpointer is gone: it has reported its own fault.
    Checkpointer,
    /// Closed while the journal is full and the disk too.
    NoSpace,
}

impl From<Fault> for Halt {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Everything the writer starts with.
pub(super) struct Writer {
    pub(super) queue: mpsc::Receiver<Message>,
    pub(super) journal: Journal,
    pub(super) group: Group,
    pub(super) group_bytes: u64,
    pub(super) last_seq: u64,
    pub(super) counters: Arc<Counters>,
    pub(super) fatal: FatalHook,
    pub(super) lock: Lock,
    pub(super) checkpoints: Checkpoints,
}

/// The writer's end of the checkpointer.
pub(super) struct Checkpoints {
    jobs: SyncSender<Job>,
    done: Receiver<Done>,
    thread: JoinHandle<()>,
    /// Up to here everything is in checkpoint and database.
    covered: u64,
    counters: Arc<Counters>,
    /// Up to here a checkpoint was asked for.
    asked: u64,
    busy: bool,
    wanted: bool,
    /// A checkpoint was given up, so what gathers now does not follow on what is covered: there
    /// will be no other in this run.
    given_up: bool,
    /// What was committed since the last checkpoint was asked for.
    changes: Changes,
    /// What the checkpoint under way is about: until it is done the database may lack it.
    under_way: Arc<Changes>,
    /// The database, for looking.
    view: View,
}

/// What is kept under a prefix: a view of the database, and what it may not have yet.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) view: View,
    pub(super) newer: Changes,
}

impl Writer {
    /// The writer's life.
    pub(super) fn run(mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let answer = match ended {
            Ok(Ok(answer)) => answer,
            Ok(Err(Halt::Fault(fault))) => {
                self.fatal.call(&fault);
                None
            }
            Ok(Err(Halt::Checkpointer)) => None,
            Ok(Err(Halt::NoSpace)) => {
                tracing::error!("closed with a full disk: the last batches were refused");
                None
            }
            Err(_) => {
                self.fatal.call(&Fault::Panicked { thread: "store" });
                None
            }
        };
        let Self { queue, journal, lock, checkpoints, .. } = self;
        let Checkpoints { jobs, thread, .. } = checkpoints;
        // The order matters: the checkpointer ends when `jobs` is gone, and only when nobody
        // touches the directory any more is it unlocked. Who waits in the queue hears it last.
        drop(jobs);
        let _ = thread.join();
        drop(journal);
        drop(lock);
        drop(queue);
        if let Some(answer) = answer {
            let _ = answer.send(());
        }
    }

    fn serve(&mut self) -> Result<Option<oneshot::Sender<()>>, Halt> {
        let mut next = None;
        let mut answers = Vec::new();
        let mut batches = Vec::new();
        loop {
            let Some(first) = next.take().or_else(|| self.queue.blocking_recv()) else {
                self.finish()?;
                return Ok(None);
            };
            let mut close = None;
            let mut message = Some(first);
            self.group.begin(self.last_seq + 1);
            while let Some(current) = message.take() {
                match current {
                    Message::Commit(batch, bytes, done) => {
                        let full = self.group.count() as usize >= GROUP_BATCHES
                            || self.group.batch_bytes() + bytes > self.group_bytes;
                        if full && self.group.count() > 0 {
                            next = Some(Message::Commit(batch, bytes, done));
                            break;
                        }
                        answers.push((self.group.push(&batch), done));
                        batches.push(batch);
                    }
                    Message::Barrier(done) => answers.push((self.group.last(), done)),
                    Message::Look(prefix, answer) => {
                        // What this very group holds is not durable yet and is not shown.
                        let _ = answer.send(self.checkpoints.look(&prefix));
                    }
                    Message::Checkpointer { due } => self.checkpoints.wanted |= due,
                    Message::Close(answer) => {
                        close = Some(answer);
                        break;
                    }
                }
                message = self.queue.try_recv().ok();
            }
            if self.group.count() > 0 {
                self.write_group()?;
            }
            for (seq, answer) in answers.drain(..) {
                // Who does not wait for the answer any more has still had it kept.
                let _ = answer.send(seq);
            }
            for write in batches.drain(..).flatten() {
                self.checkpoints.changes.insert(write.key, write.value);
            }
            self.checkpoints.settle()?;
            if self.checkpoints.wanted {
                self.checkpoints.ask(self.last_seq)?;
            }
            self.count_used();
            if let Some(answer) = close {
                self.finish()?;
                return Ok(Some(answer));
            }
        }
    }

    fn write_group(&mut self) -> Result<(), Halt> {
        if !self.journal.fits(&self.group) {
            self.checkpoints.ask(self.last_seq)?;
            while !self.journal.next_is_free(self.checkpoints.covered) {
                self.count_used();
                self.checkpoints.ask(self.last_seq)?;
                if !self.checkpoints.wait()? {
                    return Err(Halt::NoSpace);
                }
            }
            self.journal.rotate();
        }
        let bytes = self.journal.append(&mut self.group)?;
        self.last_seq = self.group.last();
        add(&self.counters.syncs, 1);
        add(&self.counters.commits, u64::from(self.group.count()));
        add(&self.counters.bytes, bytes);
        self.counters.last_seq.store(self.last_seq, Ordering::Relaxed);
        Ok(())
    }

    /// One last checkpoint, so that the next start has nothing to replay. Where the disk is
    /// full it is left out: the journal has everything.
    fn finish(&mut self) -> Result<(), Halt> {
        self.queue.close();
        self.counters.closing.store(true, Ordering::Relaxed);
        while self.checkpoints.covered < self.last_seq {
            self.checkpoints.ask(self.last_seq)?;
            if !self.checkpoints.wait()? {
                break;
            }
        }
        self.count_used();
        Ok(())
    }

    fn count_used(&self) {
        let used = self.journal.used(self.checkpoints.covered);
        self.counters.journal_used.store(used, Ordering::Relaxed);
    }
}

impl Checkpoints {
    /// Hands over what has gathered up to batch `seq`, or remembers to as soon as the
    /// checkpointer is free.
    fn ask(&mut self, seq: u64) -> Result<(), Halt> {
        self.wanted = self.busy;
        if self.busy || self.given_up || seq <= self.asked {
            return Ok(());
        }
        self.under_way = Arc::new(std::mem::take(&mut self.changes));
        let job = Job { seq, changes: Arc::clone(&self.under_way) };
        add(&self.counters.asked, 1);
        self.jobs.send(job).map_err(|_| Halt::Checkpointer)?;
        self.asked = seq;
        self.busy = true;
        Ok(())
    }

    /// What is kept under `prefix`, without reading the database: that is the asker's work.
    fn look(&self, prefix: &[u8]) -> Look {
        let mut newer = Changes::new();
        for changes in [&*self.under_way, &self.changes] {
            let from = changes.range(prefix.to_vec()..);
            let under = from.take_while(|(key, _)| key.starts_with(prefix));
            newer.extend(under.map(|(key, value)| (key.clone(), value.clone())));
        }
        Look { view: self.view.clone(), newer }
    }

    /// Hears of a finished checkpoint, if there is one.
    fn settle(&mut self) -> Result<(), Halt> {
        match self.done.try_recv() {
            Ok(done) => {
                self.note(done);
                Ok(())
            }
            Err(std::sync::mpsc::TryRecvError::Empty) => Ok(()),
            Err(std::sync::mpsc::TryRecvError::Disconnected) => Err(Halt::Checkpointer),
        }
    }

    /// Waits for the checkpoint that is under way; false when it was given up for want of
    /// space, or there is none.
    fn wait(&mut self) -> Result<bool, Halt> {
        if !self.busy {
            return Ok(false);
        }
        let done = self.done.recv().map_err(|_| Halt::Checkpointer)?;
        Ok(self.note(done))
    }

    fn note(&mut self, done: Done) -> bool {
        self.busy = false;
        match done {
            Done::Covered(seq) => {
                self.under_way = Arc::default();
                self.covered = seq;
                true
            }
            Done::NoSpace => {
                self.given_up = true;
                false
            }
        }
    }
}

/// A checkpoint to be made: everything up to batch `seq`.
struct Job {
    seq: u64,
    changes: Arc<Changes>,
}

/// What became of it.
enum Done {
    Covered(u64),
    /// Closing, and the disk is full.
    NoSpace,
}

/// Space set aside on the disk, given up when a checkpoint meets a full disk, so that it can
/// still be finished and the journal be freed.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
}

impl Reserve {
    pub(super) fn new(dir: &Path, bytes: u64) -> Self {
        Self { path: dir.join("reserve"), bytes }
    }

    /// Sets the space aside where there is plenty. Not being able to is no error: what is free
    /// is looked at before anything is promised.
    pub(super) fn keep(&self, disk: &dyn Disk, dir: &Path) {
        let held = self.path.metadata().is_ok_and(|metadata| metadata.len() >= self.bytes);
        let plenty = || disk.available(dir).is_ok_and(|free| free > self.bytes.saturating_mul(4));
        if self.bytes == 0 || held || !plenty() {
            return;
        }
        let kept = disk.create(&self.path).and_then(|mut file| file.allocate(self.bytes));
        if let Err(error) = kept {
            tracing::warn!(%error, path = %self.path.display(), "cannot set disk space aside");
            let _ = disk.remove(&self.path);
        }
    }

    /// Gives the space up; false when there was none.
    pub(super) fn release(&self, disk: &dyn Disk) -> bool {
        disk.remove(&self.path).is_ok()
    }
}

/// Everything the checkpointer starts with.
pub(super) struct Checkpointer {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) checkpoint: Checkpoint,
    pub(super) tree: Tree,
    pub(super) reserve: Reserve,
    pub(super) every: Duration,
    pub(super) rewrite_min: u64,
    pub(super) counters: Arc<Counters>,
    pub(super) fatal: FatalHook,
    pub(super) writer: mpsc::WeakSender<Message>,
}

impl Checkpointer {
    /// Starts the thread; everything up to `covered` is already in checkpoint and database.
    pub(super) fn start(self, covered: u64) -> std::io::Result<Checkpoints> {
        let (jobs, todo) = sync_channel(1);
        let (finished, done) = sync_channel(1);
        let view = self.tree.view();
        let counters = Arc::clone(&self.counters);
        let thread = std::thread::Builder::new()
            .name("store-checkpoint".to_owned())
            .spawn(move || self.run(&todo, &finished))?;
        let changes = Changes::new();
        let under_way = Arc::default();
        let (busy, wanted, given_up) = (false, false, false);
        let asked = covered;
        Ok(Checkpoints {
            jobs,
            done,
            thread,
            covered,
            counters,
            asked,
            busy,
            wanted,
            given_up,
            changes,
            under_way,
            view,
        })
    }

    fn run(mut self, todo: &Receiver<Job>, finished: &SyncSender<Done>) {
        loop {
            match todo.recv_timeout(self.every) {
                Ok(job) => {
                    let done = catch_unwind(AssertUnwindSafe(|| self.make(&job)))
                        .unwrap_or(Err(Fault::Panicked { thread: "store-checkpoint" }));
                    let done = match done {
                        Ok(done) => done,
                        Err(fault) => {
                            self.fatal.call(&fault);
                            return;
                        }
                    };
                    if finished.send(done).is_err() {
                        return;
                    }
                    self.wake_writer(false);
                    if let Err(fault) = self.tidy() {
                        self.fatal.call(&fault);
                        return;
                    }
                    add(&self.counters.tidied, 1);
                }
                Err(RecvTimeoutError::Timeout) => self.wake_writer(true),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// A full queue needs no waking.
    fn wake_writer(&self, due: bool) {
        if let Some(writer) = self.writer.upgrade() {
            let _ = writer.try_send(Message::Checkpointer { due });
        }
    }

    /// One checkpoint. Until both copies are synced the journal keeps what is in them.
    fn make(&mut self, job: &Job) -> Result<Done, Fault> {
        let sums = self.tree.sums_after(&job.changes)?;
        let bytes: usize =
            job.changes.iter().map(|(key, value)| write::encoded_len(key, value.as_deref())).sum();
        loop {
            // sled does not come back from a full disk, so it is not led there: twice the
            // changes and a few of its segments must be free before anything is written.
            let needed = (bytes as u64).saturating_mul(3).saturating_add(4 * 1024 * 1024);
            let free = self.disk.available(&self.dir).unwrap_or(u64::MAX);
            let written = if free < needed {
                None
            } else {
                match self.checkpoint.append(job.seq, &job.changes, sums.last) {
                    Ok(written) => Some(written),
                    Err(fault) if fault.is_full() => None,
                    Err(fault) => return Err(fault),
                }
            };
            if let Some(written) = written {
                add(&self.counters.checkpoint_bytes, written);
                break;
            }
            if self.reserve.release(self.disk.as_ref()) {
                tracing::warn!("the disk is full: using the space that was set aside");
                continue;
            }
            if !self.counters.starved.swap(true, Ordering::Relaxed) {
                tracing::error!(
                    dir = %self.dir.display(), free, needed,
                    "the disk is full: nothing new is taken on until there is space"
                );
            }
            if self.counters.closing.load(Ordering::Relaxed) {
                return Ok(Done::NoSpace);
            }
            std::thread::sleep(FULL_DISK_RETRY);
        }
        self.tree.apply(job.seq, &job.changes, &sums)?;
        self.tree.sync()?;
        self.counters.starved.store(false, Ordering::Relaxed);
        add(&self.counters.checkpoints, 1);
        Ok(Done::Covered(job.seq))
    }

    /// What can wait until the journal is free again.
    fn tidy(&mut self) -> Result<(), Fault> {
        let room = self.disk.available(&self.dir).unwrap_or(u64::MAX);
        // The new file stands beside the old one for a while.
        let fits = room > self.checkpoint.len().saturating_add(4 * 1024 * 1024);
        if fits && self.checkpoint.wants_rewrite(self.rewrite_min) {
            let entries = self.tree.entries();
            match self.checkpoint.rewrite(
                self.disk.as_ref(),
                self.tree.seq(),
                self.tree.sum(),
                entries,
            ) {
                Ok(written) => {
                    add(&self.counters.rewrites, 1);
                    add(&self.counters.checkpoint_bytes, written);
                }
                // The old file is as good, only longer.
                Err(fault) if fault.is_full() => {}
                Err(fault) => return Err(fault),
            }
        }
        self.reserve.keep(self.disk.as_ref(), &self.dir);
        Ok(())
    }
}
