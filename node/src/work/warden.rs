//! The warden: the process that answers for one job from its start until it is reaped.
//!
//! ```text
//!         __warden DIR START                     Confined
//!  (spawned) ------------> Starting ---------------------------> Running
//!                             |                                     |
//!                             |  Ended / Interrupted, runner gone,  |
//!                             |  deadline, stop, disk limit         |
//!                             +------------------+------------------+
//!                                                v
//!                              ending: thaw if frozen, Stop, then SIGKILL
//!                                                |  runner reaped, cgroup empty
//!                                                v
//!                                        Exited | Failed  (final, then the warden ends)
//! ```
//!
//! It owns its session, so it outlives the node. It measures time on `CLOCK_BOOTTIME`, which
//! goes on while the host sleeps, and enforces the deadline itself, so that a job ends in time
//! whether or not there is a node. Everything it does happens in one loop over one bounded
//! channel; the threads around it only wait for one thing each.
//!
//! It can freeze the runner, as a whole where there is a cgroup that does it and by SIGSTOP where
//! not, and puts notices where the program finds them.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::Serialize;

use super::cgroup::{Cgroup, Limits};
use super::meter::Meter;
use super::process::{self, Process};
use super::runner::{Line, send};
use super::spec::{
    Answer, Ask, JobFile, MAX_PROGRAM, MAX_REASON, NOTICE, Notice, Outcome, Said, Spec, State,
    Status, Tell, Usage, boot_id, boot_ms, file, read_json, unix_ms, write_json,
};
use super::{confine, disk, wasm};

/// Between two samples of the meter.
const SAMPLE_MS: u64 = 1000;
/// Between two looks at the disk, unless looking takes long.
const LOOK_MS: u64 = 100;
/// Between asking a runner to go, or killing it, and doing so again.
const AGAIN_MS: u64 = 200;
/// How long a runner that said its end may take to go.
const GO_MS: u64 = 2000;
/// Connections that the socket serves at once.
const MAX_CONNECTIONS: usize = 32;
/// How long one who asked may take to read the answer.
const SLOW_READER: Duration = Duration::from_secs(5);
/// How long freezing the runner, or thawing it, may take until it is refused.
const FREEZES: Duration = Duration::from_millis(500);
/// Threads that the runner needs beside the program's own.
const RUNNER_THREADS: u64 = 16;

/// Runs the warden of the job in this directory, until the job is reaped. To be called from
/// `main`, before any thread is started.
pub fn warden_main(dir: &Path, start: &OsStr) -> ExitCode {
    match warden(dir, start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the job's warden.log.
            let _ = writeln!(io::stderr(), "warden: {error}");
            ExitCode::FAILURE
        }
    }
}

fn context(what: &str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn warden(dir: &Path, start: &OsStr) -> io::Result<()> {
    process::close_inherited()?;
    // Already leading a session is no failure: then somebody else detached it.
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let dir = fs::canonicalize(dir)?;
    std::env::set_current_dir(&dir)?;
    // Before the lock: who is late must not hold it where the job is started anew.
    let job: JobFile = read_json(Path::new(file::JOB)).map_err(context("cannot read the job"))?;
    if job.start.as_str() != start {
        return Err(io::Error::other("the job was started anew since"));
    }
    // The node made this file; who reaps the job takes its lock, and then nobody starts it.
    let lock = OpenOptions::new().write(true).open(file::LOCK).map_err(context("no lock"))?;
    lock.try_lock().map_err(|_| io::Error::other("the job has a warden already, or is reaped"))?;
    let me = Process::current().ok_or_else(|| io::Error::other("/proc is not there"))?;
    let status = Status {
        lease: job.spec.lease.clone(),
        token: job.spec.token.clone(),
        state: State::Starting,
        frozen: false,
        boot_id: boot_id(),
        warden: me,
        runner: None,
        cgroup: None,
        isolation: vec![],
        deadline_boot_ms: job.spec.deadline_boot_ms,
        started_boot_ms: 0,
        usage: Usage::default(),
        outcome: None,
        outputs: vec![],
        outputs_missing: vec![],
    };
    write_json(Path::new(file::STATUS), &status, true)?;
    let board = Arc::new(Board::new(status));
    let result = Warden::start(&dir, job, &board).and_then(|mut warden| {
        let watched = warden.watch();
        if watched.is_err() {
            // Also where the job directory itself is gone, nothing stays behind.
            warden.abandon();
        }
        watched
    });
    if let Err(error) = &result {
        // Whatever is left dies with this process, and the node clears up behind it.
        let mut status = board.read();
        status.state = State::Failed;
        status.frozen = false;
        status.outcome = Some(Outcome::Lost { message: format!("the warden failed: {error}") });
        board.post(status.clone());
        write_json(Path::new(file::STATUS), &status, true)?;
    }
    result
}

/// The newest status, for those who read it from other threads.
struct Board {
    newest: Mutex<(u64, Status)>,
    changed: Condvar,
}

impl Board {
    fn new(status: Status) -> Self {
        Self { newest: Mutex::new((0, status)), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, (u64, Status)> {
        // A status is replaced whole, so one that a panicking thread left is still a status.
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Status {
        self.lock().1.clone()
    }

    fn post(&self, status: Status) {
        let mut newest = self.lock();
        newest.0 += 1;
        newest.1 = status;
        self.changed.notify_all();
    }

    /// The first status newer than `seen`.
    fn newer(&self, seen: Option<u64>) -> (u64, Status) {
        let mut newest = self.lock();
        while seen == Some(newest.0) {
            newest = self.changed.wait(newest).unwrap_or_else(PoisonError::into_inner);
        }
        newest.clone()
    }
}

/// What the loop waits for.
enum Event {
    Tick,
    Said(Said),
    RunnerGone,
    Asked(Ask, SyncSender<Answer>),
}

/// Why a job is being ended before its program is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cause {
    Deadline,
    Stopped(String),
    Disk,
}

struct Warden {
    spec: Spec,
    board: Arc<Board>,
    status: Status,
    events: Receiver<Event>,
    timer: File,
    child: Child,
    control: UnixStream,
    cgroup: Option<Cgroup>,
    meter: Meter,
    dropped: Arc<AtomicU64>,
    logs: Receiver<()>,
    cause: Option<Cause>,
    /// What the runner said of its end; `Some(None)` is "interrupted".
    said: Option<Option<Outcome>>,
    kill_at: Option<u64>,
    next_sample: u64,
    next_look: u64,
}

impl Warden {
    fn start(dir: &Path, job: JobFile, board: &Arc<Board>) -> io::Result<Self> {
        let mut status = board.read();
        let spec = job.spec;
        // From here on the node can ask.
        let _ = fs::remove_file(file::SOCKET);
        let listener = UnixListener::bind(file::SOCKET).map_err(context("cannot listen"))?;
        let (sender, events) = mpsc::sync_channel(64);
        accept(listener, board, &sender)?;

        let uid = make_out(&spec.lease).map_err(context("cannot make the output directory"))?;
        let program = fs::metadata(&spec.program).map_or(0, |meta| meta.len()).min(MAX_PROGRAM);
        let mut cgroup = if job.cgroups {
            let limits = Limits {
                cpu_milli: spec.cpu_milli,
                memory: wasm::memory_with_runner(spec.memory, program),
                pids: spec.pids.saturating_add(RUNNER_THREADS),
            };
            Cgroup::create(&job.node, &spec.lease, limits)
        } else {
            None
        };
        // Written before there is anything in it, so that it is never left without an owner.
        status.cgroup.clone_from(&cgroup);
        write_json(Path::new(file::STATUS), &status, true)?;

        let (control, theirs) = UnixStream::pair()?;
        let (stdout, stdout_in) = io::pipe()?;
        let (stderr, stderr_in) = io::pipe()?;
        // This very executable, also when the file it came from was replaced meanwhile. The
        // kernel kills the child when the thread that starts it ends: this is the main thread.
        let child = Command::new("/proc/self/exe")
            .args(&job.prefix)
            .arg("__runner")
            .arg(dir)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(stdout_in)
            .stderr(stderr_in)
            .spawn()
            .map_err(context("cannot start the runner"))?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        if let Some(group) = &mut cgroup
            && !group.add(pid)
        {
            cgroup = None;
        }
        // Where the whole host runs out of memory, a tenant's program goes first.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "500");
        let now = boot_ms();
        status.runner = Process::of(pid);
        status.cgroup.clone_from(&cgroup);
        status.started_boot_ms = now;
        board.post(status.clone());
        write_json(Path::new(file::STATUS), &status, true)?;

        let dropped = Arc::new(AtomicU64::new(0));
        let (done, logs) = mpsc::sync_channel(2);
        log(stdout, file::STDOUT, spec.log_limit, &dropped, &done)?;
        log(stderr, file::STDERR, spec.log_limit, &dropped, &done)?;
        let timer = timer(&sender)?;
        hear(control.try_clone()?, &sender)?;
        wait(pid, &sender)?;
        control.set_write_timeout(Some(SLOW_READER))?;
        let go = Tell::Go {
            uid,
            memory_bounded: cgroup.as_ref().is_some_and(Cgroup::bounds_memory),
            cgroup: cgroup.as_ref().map(|group| group.word().to_owned()),
        };
        // Nothing is begun whose time is over: the loop ends its runner, which waits for this. One
        // that is gone already is met there, too.
        if boot_ms() < spec.deadline_boot_ms {
            let _ = send(&control, &go);
        }
        Ok(Self {
            spec,
            board: Arc::clone(board),
            status,
            events,
            timer,
            child,
            control,
            cgroup,
            meter: Meter::new(now),
            dropped,
            logs,
            cause: None,
            said: None,
            kill_at: None,
            next_sample: now,
            next_look: now,
        })
    }

    fn watch(&mut self) -> io::Result<()> {
        loop {
            let now = boot_ms();
            if self.cause.is_none() && now >= self.status.deadline_boot_ms {
                self.end(Cause::Deadline, now);
            }
            if now >= self.next_look {
                self.look(now);
            }
            if now >= self.next_sample {
                self.next_sample = now + SAMPLE_MS;
                self.sample(now);
                // A full disk must not end the watch over a running job.
                let _ = self.post(false);
            }
            if self.kill_at.is_some_and(|at| now >= at) {
                self.kill();
                self.kill_at = Some(now + AGAIN_MS);
            }
            self.arm()?;
            match self.events.recv().map_err(io::Error::other)? {
                Event::Tick => {}
                Event::Said(said) => self.hear(said),
                Event::Asked(ask, answer) => {
                    let _ = answer.try_send(self.answer(ask));
                }
                Event::RunnerGone => return self.reap(),
            }
        }
    }

    /// The latest time at which the runner may still be there.
    fn last_ms(&self) -> u64 {
        // The last instruction comes before the end of the grace, so the kill comes a little
        // earlier.
        let grace = self.spec.grace_ms;
        self.status.deadline_boot_ms.saturating_add(grace - grace.div_euclid(8).min(250))
    }

    /// Sets the timer to whatever is due next.
    fn arm(&self) -> io::Result<()> {
        let mut due = self.next_sample.min(self.next_look);
        if self.cause.is_none() {
            due = due.min(self.status.deadline_boot_ms);
        }
        if let Some(at) = self.kill_at {
            due = due.min(at);
        }
        // Zero would disarm it (timerfd_settime(2)).
        let due = due.max(1);
        let value = Timespec {
            tv_sec: i64::try_from(due / 1000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(due % 1000).unwrap_or(0) * 1_000_000,
        };
        let every = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval: every, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec)?;
        Ok(())
    }

    /// Begins to end the job.
    fn end(&mut self, cause: Cause, now: u64) {
        let kill_at = match cause {
            // What is over its limit goes on writing while it is asked politely.
            Cause::Disk => now,
            Cause::Deadline => self.last_ms(),
            Cause::Stopped(_) => now.saturating_add(self.spec.grace_ms).min(self.last_ms()),
        };
        self.cause = Some(cause);
        self.thaw_to_end(now);
        self.kill_at = Some(self.kill_at.map_or(kill_at, |at| at.min(kill_at)));
        if send(&self.control, &Tell::Stop).is_err() {
            self.kill_at = Some(now);
        }
    }

    /// Freezes the runner or thaws it, and waits until that is in force. False where it did not
    /// come to that; a runner that cannot be frozen is left running.
    fn freeze(&mut self, on: bool, now: u64) -> bool {
        // The deadline does not wait for this.
        let left = Duration::from_millis(self.status.deadline_boot_ms.saturating_sub(now));
        let at_most = if self.cause.is_none() { FREEZES.min(left) } else { FREEZES };
        let done = self.try_freeze(on, at_most);
        if on && !done {
            self.try_freeze(false, Duration::ZERO);
        }
        if on || done {
            self.status.frozen = on && done;
        }
        done
    }

    fn try_freeze(&self, on: bool, at_most: Duration) -> bool {
        if let Some(group) = self.cgroup.as_ref().filter(|group| group.freezes()) {
            return group.freeze(on, at_most);
        }
        let Some(runner) = self.status.runner else { return false };
        // Not yet waited for, so the pid is still its own. Whoever is stopped so cannot say no.
        let signal = if on { Signal::STOP } else { Signal::CONT };
        let Some(pid) = Pid::from_raw(runner.pid) else { return false };
        if kill_process(pid, signal).is_err() {
            return false;
        }
        let end = Instant::now() + at_most;
        while runner.stopped() != on {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Lets a frozen runner run on, because it cannot end in order unless it does.
    fn thaw_to_end(&mut self, now: u64) {
        if self.status.frozen {
            self.freeze(false, now);
            let _ = self.post(false);
        }
    }

    fn kill(&mut self) {
        // Not yet waited for, so the pid is still its own.
        let _ = self.child.kill();
        if let Some(group) = &self.cgroup {
            group.kill(Duration::from_millis(AGAIN_MS));
        }
    }

    fn sample(&mut self, now: u64) {
        let usage = self.meter.sample(now, self.status.runner.as_ref(), self.cgroup.as_ref());
        let disk = self.status.usage.disk;
        let log_dropped = self.dropped.load(Ordering::Relaxed);
        self.status.usage = Usage { disk, log_dropped, ..usage };
    }

    /// Looks at what the program has written so far.
    fn look(&mut self, now: u64) {
        let began = Instant::now();
        let mut found = disk::measure(Path::new(file::OUT), self.spec.disk);
        if let Some(runner) = &self.status.runner {
            found.bytes = found.bytes.saturating_add(disk::unlinked(runner.pid));
        }
        let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        // However many files there are, looking takes a small part of one core.
        self.next_look = now.saturating_add(LOOK_MS.max(took.saturating_mul(20)));
        self.status.usage.disk = found.bytes;
        if self.cause.is_none() && (found.too_many || found.bytes > self.spec.disk) {
            self.end(Cause::Disk, now);
        }
    }

    /// Writes the status, then shows it: what was seen is on disk.
    fn post(&mut self, durable: bool) -> io::Result<()> {
        let written = write_json(Path::new(file::STATUS), &self.status, durable);
        self.board.post(self.status.clone());
        written
    }

    fn hear(&mut self, said: Said) {
        let now = boot_ms();
        match said {
            Said::Confined { isolation } if self.status.state == State::Starting => {
                self.status.isolation = isolation;
                self.status.isolation.truncate(32);
                self.status.state = State::Running;
                self.sample(now);
                let _ = self.post(true);
            }
            Said::Confined { .. } => {}
            Said::Ended { .. } | Said::Interrupted if self.said.is_some() => {}
            Said::Ended { outcome } => self.go(Some(outcome), now),
            Said::Interrupted => self.go(None, now),
        }
    }

    /// Notes the program's end, meters the runner once more while it is whole, and lets it go.
    fn go(&mut self, outcome: Option<Outcome>, now: u64) {
        self.said = Some(outcome);
        self.sample(now);
        self.thaw_to_end(now);
        let _ = send(&self.control, &Tell::Bye);
        let kill_at = now + GO_MS;
        self.kill_at = Some(self.kill_at.map_or(kill_at, |at| at.min(kill_at)));
    }

    fn answer(&mut self, ask: Ask) -> Answer {
        let refused = |why: &str| Answer::Refused { why: why.to_owned() };
        let now = boot_ms();
        match ask {
            Ask::Extend { .. } | Ask::Freeze | Ask::Notice { .. } if self.ending() => {
                refused("the job is already ending")
            }
            Ask::Extend { deadline_boot_ms } if deadline_boot_ms < self.status.deadline_boot_ms => {
                refused("a deadline is never moved forward")
            }
            Ask::Extend { deadline_boot_ms } if deadline_boot_ms <= now => {
                refused("the new deadline has passed")
            }
            Ask::Extend { deadline_boot_ms } => {
                let old = self.status.deadline_boot_ms;
                self.status.deadline_boot_ms = deadline_boot_ms;
                if let Err(error) = self.post(true) {
                    self.status.deadline_boot_ms = old;
                    return refused(&format!("it cannot be written down: {error}"));
                }
                self.done()
            }
            Ask::Freeze | Ask::Thaw => {
                let on = matches!(ask, Ask::Freeze);
                let done = self.freeze(on, now);
                self.sample(now);
                // What is in force is in force, also where no disk is left to say so.
                let _ = self.post(false);
                match (done, on) {
                    (true, _) => self.done(),
                    (false, true) => refused("the program cannot be frozen"),
                    (false, false) => refused("the program cannot be thawed"),
                }
            }
            Ask::Notice { notice } => match put_notice(notice, now) {
                Ok(()) => self.done(),
                Err(error) => refused(&format!("the notice cannot be put: {error}")),
            },
            Ask::Stop { why } => {
                if self.cause.is_none() {
                    let why = why.chars().take(256).collect();
                    self.end(Cause::Stopped(why), now);
                }
                self.done()
            }
            Ask::Status | Ask::Watch => Answer::Status { status: Box::new(self.status.clone()) },
        }
    }

    fn done(&self) -> Answer {
        Answer::Done { deadline_boot_ms: self.status.deadline_boot_ms }
    }

    fn ending(&self) -> bool {
        self.cause.is_some() || self.said.is_some()
    }

    /// Ends the runner without a word, because this warden cannot go on.
    fn abandon(&mut self) {
        self.kill();
        let _ = self.child.wait();
        if let Some(group) = self.cgroup.take() {
            group.kill(Duration::from_secs(5));
            group.remove(Duration::from_secs(5));
        }
    }

    /// The runner is gone: takes the last measures, clears up, and says how it ended.
    fn reap(&mut self) -> io::Result<()> {
        // Whatever it may have left behind goes before its last numbers are read.
        if let Some(group) = &self.cgroup {
            group.kill(Duration::from_secs(5));
        }
        self.status.frozen = false;
        self.sample(boot_ms());
        let starved = self.cgroup.as_ref().is_some_and(Cgroup::out_of_memory);
        let exit = self.child.wait()?;
        for _ in 0..2 {
            // The logs end with their writers, and those are dead.
            let _ = self.logs.recv_timeout(Duration::from_secs(5));
        }
        self.status.usage.log_dropped = self.dropped.load(Ordering::Relaxed);
        let found = disk::measure(Path::new(file::OUT), u64::MAX);
        self.status.usage.disk = found.bytes;
        if let Some(group) = &self.cgroup
            && group.remove(Duration::from_secs(5))
        {
            self.status.cgroup = None;
        }

        let (out, outputs) = (Path::new(file::OUT), Path::new(file::OUTPUTS));
        fs::create_dir(outputs).or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        })?;
        let (kept, missing) = disk::keep(out, outputs, &self.spec.outputs, self.spec.disk);
        self.status.outputs = kept;
        self.status.outputs_missing = missing;
        disk::clear(out)?;
        disk::clear(Path::new(file::IN))?;

        let outcome = self.outcome(starved, exit.signal());
        self.status.state = match outcome {
            Outcome::Exited { .. } => State::Exited,
            _ => State::Failed,
        };
        self.status.outcome = Some(outcome);
        let _ = fs::remove_file(file::SOCKET);
        self.post(true)
    }

    fn outcome(&mut self, starved: bool, signal: Option<i32>) -> Outcome {
        let limit = self.spec.disk;
        match (self.said.take().flatten(), self.cause.take()) {
            // An end of its own counts, also if it came while the job was being ended.
            (Some(outcome), cause) if cause != Some(Cause::Disk) => outcome,
            (_, Some(Cause::Disk)) => Outcome::OutOfDisk { limit },
            (_, Some(Cause::Deadline)) => Outcome::Deadline,
            (_, Some(Cause::Stopped(why))) => Outcome::Stopped { why },
            _ if signal == Some(libc::SIGXFSZ) => Outcome::OutOfDisk { limit },
            _ if starved => Outcome::OutOfMemory { limit: self.spec.memory },
            _ => Outcome::Lost {
                message: match signal {
                    Some(signal) => format!("the runner was killed by signal {signal}"),
                    None => "the runner ended without a word".to_owned(),
                },
            },
        }
    }
}

/// What a program reads in its notice file. Times are given twice, since a program has no boot
/// clock: how long from when this was written, and when by the host's wall clock.
#[derive(Serialize)]
struct NoticeFile {
    reason: String,
    ends_in_ms: u64,
    ends_at_unix_ms: u64,
}

/// Puts a notice where the program finds it, or takes it away. A program that looks sees the old
/// one or the new one, never a part: the file is made outside, and moved in when it is whole.
fn put_notice(notice: Option<Notice>, now: u64) -> io::Result<()> {
    let to = Path::new(file::IN).join(NOTICE);
    let Some(Notice { reason, end_boot_ms }) = notice else {
        return match fs::remove_file(to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    let ends_in_ms = end_boot_ms.saturating_sub(now);
    let notice = NoticeFile {
        reason: reason.chars().take(MAX_REASON).collect(),
        ends_in_ms,
        ends_at_unix_ms: unix_ms().saturating_add(ends_in_ms),
    };
    let from = Path::new(file::NOTICE);
    write_json(from, &notice, false)?;
    // The runner is another user, and has no more than reading to do with it.
    fs::set_permissions(from, fs::Permissions::from_mode(0o444))?;
    fs::rename(from, to)
}

/// Makes the directory that the guest writes to, and returns the user that the runner turns into
/// where this process may give files away.
fn make_out(lease: &str) -> io::Result<Option<u32>> {
    disk::clear(Path::new(file::OUT))?;
    fs::create_dir(file::OUT)?;
    fs::set_permissions(file::OUT, fs::Permissions::from_mode(0o700))?;
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let uid = confine::uid_of(lease);
    Ok(std::os::unix::fs::chown(file::OUT, Some(uid), Some(uid)).is_ok().then_some(uid))
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

/// Copies a pipe into a bounded file. What does not fit, or cannot be written, is counted and
/// dropped: the program is never made to wait for its log.
fn log(
    mut pipe: PipeReader,
    name: &str,
    limit: u64,
    dropped: &Arc<AtomicU64>,
    done: &SyncSender<()>,
) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(PathBuf::from(name))?;
    let (dropped, done) = (Arc::clone(dropped), done.clone());
    thread(name, move || {
        let mut left = limit;
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            let read = match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let fits = usize::try_from(left).unwrap_or(usize::MAX).min(read);
            let (keep, mut lost) = (buffer.get(..fits).unwrap_or_default(), read - fits);
            if file.write_all(keep).is_ok() {
                left -= u64::try_from(fits).unwrap_or(left);
            } else {
                lost = read;
            }
            dropped.fetch_add(u64::try_from(lost).unwrap_or(0), Ordering::Relaxed);
        }
        let _ = done.try_send(());
    })
}

/// A timer on the boot clock, and a thread that turns it into events.
fn timer(events: &SyncSender<Event>) -> io::Result<File> {
    let timer = File::from(timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC)?);
    let mut waits = timer.try_clone()?;
    let events = events.clone();
    thread("timer", move || {
        let mut count = [0u8; 8];
        while waits.read(&mut count).is_ok() && events.send(Event::Tick).is_ok() {}
    })?;
    Ok(timer)
}

fn hear(control: UnixStream, events: &SyncSender<Event>) -> io::Result<()> {
    let events = events.clone();
    thread("control", move || {
        let mut line = Line::new(control);
        while let Ok(Some(said)) = line.next() {
            if events.send(Event::Said(said)).is_err() {
                return;
            }
        }
    })
}

/// Waits for the runner's end without reaping it, so that its numbers can still be read.
fn wait(pid: i32, events: &SyncSender<Event>) -> io::Result<()> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("the runner has no pid"))?;
    let events = events.clone();
    thread("wait", move || {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while waitid(WaitId::Pid(pid), options).is_err_and(|e| e == rustix::io::Errno::INTR) {}
        let _ = events.send(Event::RunnerGone);
    })
}

/// Serves the socket. The directory is open to its owner only, and so is the socket.
fn accept(
    listener: UnixListener,
    board: &Arc<Board>,
    events: &SyncSender<Event>,
) -> io::Result<()> {
    let (board, events) = (Arc::clone(board), events.clone());
    let busy = Arc::new(AtomicUsize::new(0));
    thread("accept", move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            };
            if busy.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                busy.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (board, events, busy_here) = (Arc::clone(&board), events.clone(), busy.clone());
            let served = thread("connection", move || {
                let _ = serve(&stream, &board, &events);
                busy_here.fetch_sub(1, Ordering::Relaxed);
            });
            if served.is_err() {
                busy.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })
}

fn serve(stream: &UnixStream, board: &Board, events: &SyncSender<Event>) -> io::Result<()> {
    stream.set_write_timeout(Some(SLOW_READER))?;
    let mut line = Line::new(stream);
    while let Some(ask) = line.next::<Ask>()? {
        if matches!(ask, Ask::Watch) {
            let mut seen = None;
            loop {
                let (version, status) = board.newer(seen);
                seen = Some(version);
                let ended = status.state.ended();
                send(stream, &Answer::Status { status: Box::new(status) })?;
                if ended {
                    return Ok(());
                }
            }
        }
        let (answer, answered) = mpsc::sync_channel(1);
        events.send(Event::Asked(ask, answer)).map_err(io::Error::other)?;
        let answer = answered.recv_timeout(SLOW_READER).map_err(io::Error::other)?;
        send(stream, &answer)?;
    }
    Ok(())
}
