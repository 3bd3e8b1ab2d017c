//! Jobs: the edge that runs a tenant's program under a lease.
//!
//! From a job's start until it is reaped two processes belong to it. The **warden** (module
//! `warden`) holds the deadline, the meter and a unix socket; below it the **runner** (module
//! `runner`), confined and in a cgroup of its own, executes the program and dies with the warden.
//! Neither needs the node: after a crash of the node the job goes on and still ends in time, and
//! everything about it lies in its directory. The next run of the node takes it back
//! ([`Work::adopt`]).
//!
//! ```text
//! JOBS/<lease>/            0700
//!   spec.json              what to run, written by the node before the warden starts
//!   status.json            where it stands, replaced whole by the warden
//!   lock                   held by the warden while it lives, then by who reaped the job
//!   socket                 the warden's, gone when the job has ended
//!   in/  out/              the guest's directories, gone when the job has ended; `in/.notice`
//!                          comes and goes while it runs
//!   stdout  stderr         bounded logs
//!   outputs/               the declared outputs, once the job has ended
//! ```
//!
//! Node, warden and runner are one executable that starts itself with the hidden arguments
//! `__warden DIR START` and `__runner DIR`; its `main` must hand these to [`warden_main`] and
//! [`runner_main`] before it starts any thread, [`hidden`] does that.

mod adopt;
mod cgroup;
mod confine;
mod disk;
mod meter;
mod process;
mod runner;
mod spec;
mod warden;
mod wasm;
mod watched;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

pub use adopt::{Adopted, Reaped};
pub use cgroup::Cgroup;
pub use process::Process;
pub use runner::runner_main;
#[cfg(test)]
pub(crate) use spec::tests::spec as example;
pub use spec::{
    DEFAULT_LOG_LIMIT, Input, MAX_ARGUMENT_BYTES, MAX_DEPTH, MAX_INPUTS, MAX_LOG_LIMIT, MAX_NAME,
    MAX_OUTPUTS, MAX_PROGRAM, MAX_REASON, MAX_TOKEN, MIN_MEMORY, NOTICE, NOTICE_VARIABLE, Notice,
    Outcome, OutputFile, Runtime, Spec, SpecError, State, Status, Usage, boot_ms, check_name,
};
pub use warden::warden_main;

use spec::{Answer, Ask, JobFile, MAX_JSON, boot_id, file, read_json, write_json};
use watched::Watched;

/// How long a new warden may take to answer.
const WARDEN_STARTS: Duration = Duration::from_secs(20);
/// How long a warden may take to answer anything later.
const WARDEN_ANSWERS: Duration = Duration::from_secs(5);
/// How long a killed process may take to be gone.
const DIES: Duration = Duration::from_secs(10);
/// Between two looks at what nobody tells about.
const POLL: Duration = Duration::from_millis(50);
/// The most that one read of a log returns.
const MAX_CHUNK: usize = 1 << 20;

/// If this process was started as a warden or a runner, does that work and returns its exit code;
/// otherwise returns none. `args` are the process's arguments after the leading ones of [`Exec`].
pub fn hidden(mut args: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let what = args.next()?;
    let (dir, more) = (args.next(), args.next());
    Some(match (what.to_str()?, dir, more) {
        ("__warden", Some(dir), Some(start)) => warden_main(Path::new(&dir), &start),
        ("__runner", Some(dir), None) => runner_main(Path::new(&dir)),
        ("__warden" | "__runner", ..) => ExitCode::from(2),
        _ => return None,
    })
}

/// The levels of isolation that this host gives to a job, each found by doing it: see the table
/// in `confine`. Where the node is not privileged, name spaces are left out, since only a fresh
/// process can try them: a job may get more than this says, and its status says what it got.
///
/// Takes some milliseconds; meant for the start of a node.
pub fn isolation() -> Vec<String> {
    let mut words = vec!["wasm".to_owned()];
    words.extend(cgroup::probe().map(str::to_owned));
    let root = rustix::process::geteuid().is_root();
    words.extend(confine::probe(root.then(|| confine::uid_of("probe"))));
    words
}

/// How this executable starts itself again.
#[derive(Clone, Debug)]
pub struct Exec {
    /// The executable; `/proc/self/exe` names the running one even if its file was replaced.
    pub program: PathBuf,
    /// Arguments before the hidden ones, for an executable that is more than a node.
    pub prefix: Vec<String>,
    /// Whether to use cgroups where the host has them. Off only to try the degraded level.
    pub cgroups: bool,
}

impl Default for Exec {
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), prefix: vec![], cgroups: true }
    }
}

/// What happened to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkEvent {
    /// The runner is confined and the program runs.
    Started {
        /// Under this lease.
        lease: String,
    },
    /// A new sample of the meter, about each second. Samples are cumulative, and one is left out
    /// when the receiver is behind.
    Usage {
        /// Under this lease.
        lease: String,
        /// So far.
        usage: Usage,
    },
    /// The job is reaped: runner and warden are gone and the cgroup is removed.
    Ended {
        /// Under this lease.
        lease: String,
        /// How.
        outcome: Outcome,
        /// In all.
        usage: Usage,
    },
}

/// Why the directory of jobs cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {} as the directory of jobs: {source}", path.display())]
pub struct OpenError {
    /// The directory.
    path: PathBuf,
    /// What the system says.
    source: io::Error,
}

/// Why a job did not start. No process of it is left; its directory is where it was there before,
/// or where a warden lived: then it is a job that has ended and waits to be forgotten.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The specification breaks a limit.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The lease has had its job.
    #[error("lease {0} has a job directory already")]
    Exists(String),
    /// An input cannot be read.
    #[error("cannot place input {name:?}: {source}")]
    Input {
        /// Its name.
        name: String,
        /// What the system says.
        source: io::Error,
    },
    /// The job directory cannot be made.
    #[error("cannot {what}: {source}")]
    Directory {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The warden did not come up.
    #[error("the warden did not start: {0}")]
    Warden(String),
}

/// Why something could not be asked of a running job.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no such job here.
    #[error("there is no job under lease {0}")]
    Unknown(String),
    /// The warden said no.
    #[error("the warden refused: {0}")]
    Refused(String),
    /// The warden did not answer.
    #[error("the warden did not answer: {0}")]
    Silent(#[from] io::Error),
}

/// Why a job directory is not removed.
#[derive(Debug, thiserror::Error)]
pub enum ForgetError {
    /// Its job is not reaped.
    #[error("the job under lease {0} is not reaped yet")]
    Running(String),
    /// The system refused.
    #[error("cannot remove the job directory of lease {lease}: {source}")]
    Remove {
        /// The lease.
        lease: String,
        /// What the system says.
        source: io::Error,
    },
}

/// A job directory that an earlier run of the node left.
#[derive(Clone, Debug)]
pub struct Orphan {
    /// The lease.
    pub lease: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Whether its warden lives: the very process of its status, with the lock in its hand.
    pub live: bool,
    /// Its newest status; none if the warden never wrote one.
    pub status: Option<Status>,
}

/// One of a job's logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// What the program wrote to standard output.
    Stdout,
    /// What the program wrote to standard error.
    Stderr,
}

/// A part of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The bytes from the offset asked for.
    pub bytes: Vec<u8>,
    /// Whether nothing follows, now or later.
    pub end: bool,
}

/// The jobs of this node. A clone is another handle to the same jobs.
#[derive(Clone, Debug)]
pub struct Work {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// This node's level in the cgroup tree, from where its jobs lie.
    node: String,
    exec: Exec,
    events: mpsc::Sender<WorkEvent>,
    jobs: Mutex<BTreeMap<String, Job>>,
    orphans: Mutex<BTreeMap<String, PathBuf>>,
    /// Held by who takes orphans back or ends them.
    adopting: tokio::sync::Mutex<()>,
}

/// What the node knows of one job.
#[derive(Clone, Debug)]
struct Job {
    dir: PathBuf,
    /// The newest status; ended only once the job is reaped and the warden gone.
    view: watch::Receiver<Status>,
    /// Held once the job is reaped, against a warden that starts late.
    _lock: Option<Arc<File>>,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Maps under these locks are changed by single calls that cannot leave them half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Work {
    /// Opens the directory of jobs, making it if need be, and looks for orphans. Starts nothing
    /// and ends nothing. Events go to the channel, which should hold some dozens.
    pub fn open(
        dir: PathBuf,
        exec: Exec,
        events: mpsc::Sender<WorkEvent>,
    ) -> Result<Self, OpenError> {
        let open = || -> io::Result<(PathBuf, BTreeMap<String, PathBuf>)> {
            DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
            let dir = fs::canonicalize(&dir)?;
            let mut orphans = BTreeMap::new();
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                if let Some(lease) = entry.file_name().to_str()
                    && spec::check_lease(lease).is_ok()
                    && entry.file_type()?.is_dir()
                {
                    orphans.insert(lease.to_owned(), entry.path());
                }
            }
            Ok((dir, orphans))
        };
        let (path, orphans) = open().map_err(|source| OpenError { path: dir.clone(), source })?;
        let node = blake3::hash(path.as_os_str().as_encoded_bytes());
        let node = node.to_hex().get(..16).unwrap_or("node").to_owned();
        Ok(Self {
            inner: Arc::new(Inner {
                dir: path,
                node,
                exec,
                events,
                jobs: Mutex::default(),
                orphans: Mutex::new(orphans),
                adopting: tokio::sync::Mutex::default(),
            }),
        })
    }

    /// Starts a job. Returns when its warden lives and answers; the program itself starts a
    /// little later, with [`WorkEvent::Started`].
    pub async fn start(&self, spec: Spec) -> Result<(), StartError> {
        spec.check()?;
        // In a task of its own: a caller who gives up halfway must not leave half a job.
        let work = self.clone();
        let started = tokio::spawn(async move { work.start_checked(spec).await });
        started.await.unwrap_or_else(|error| Err(StartError::Warden(error.to_string())))
    }

    async fn start_checked(&self, spec: Spec) -> Result<(), StartError> {
        let lease = spec.lease.clone();
        let dir = self.inner.dir.join(&lease);
        make(&dir)?;
        let started = self.start_in(&dir, spec).await;
        if started.is_err() {
            // The lock keeps a late warden from starting it after all.
            let (status, lock) = bury_until_gone(&lease, &dir).await;
            if status.warden.pid == 0 {
                let _ = self.remove(&lease).await;
            } else {
                // A warden lived, and may have run something: that is to be seen until it is
                // forgotten, also by the next run of the node.
                self.keep_ended(lease, dir, status, lock);
            }
        }
        started
    }

    /// Makes a buried job one that has ended: its output can be read, and it waits to be forgotten.
    fn keep_ended(&self, lease: String, dir: PathBuf, status: Status, lock: File) {
        let (_, view) = watch::channel(status);
        let job = Job { dir, view, _lock: Some(Arc::new(lock)) };
        hold(&self.inner.jobs).insert(lease, job);
    }

    async fn start_in(&self, dir: &Path, spec: Spec) -> Result<(), StartError> {
        let grace_ms = spec.grace_ms;
        let job = JobFile {
            spec,
            prefix: self.inner.exec.prefix.clone(),
            node: self.inner.node.clone(),
            cgroups: self.inner.exec.cgroups,
            start: format!("{}-{}", std::process::id(), crate::clock::boot_us()),
        };
        let start = job.start.clone();
        let filled = dir.to_owned();
        tokio::task::spawn_blocking(move || fill(&filled, &job).map(|()| job.spec.lease))
            .await
            .map_err(|error| StartError::Warden(error.to_string()))??;
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(dir.join(file::WARDEN_LOG))
            .map_err(|source| StartError::Directory { what: "open the warden's log", source })?;
        let mut child = Command::new(&self.inner.exec.program)
            .args(&self.inner.exec.prefix)
            .arg("__warden")
            .arg(dir)
            .arg(start)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| {
                let program = self.inner.exec.program.display();
                StartError::Warden(format!("cannot run {program}: {error}"))
            })?;
        let (stream, status) = match timeout(WARDEN_STARTS, greet(dir, &mut child)).await {
            Ok(Ok(greeted)) => greeted,
            Ok(Err(why)) => return Err(StartError::Warden(why)),
            Err(_) => {
                let _ = child.start_kill();
                let _ = timeout(DIES, child.wait()).await;
                let seconds = WARDEN_STARTS.as_secs();
                return Err(StartError::Warden(format!("no answer within {seconds} s")));
            }
        };
        let lease = status.lease.clone();
        let (show, view) = watch::channel(status);
        hold(&self.inner.jobs).insert(lease, Job { dir: dir.to_owned(), view, _lock: None });
        let (dir, warden) = (dir.to_owned(), Watched::Child(child));
        let following = Following { dir, grace_ms, warden, show, started: false };
        tokio::spawn(follow(self.clone(), following, stream));
        Ok(())
    }

    fn job(&self, lease: &str) -> Result<Job, AskError> {
        let job = hold(&self.inner.jobs).get(lease).cloned();
        job.ok_or_else(|| AskError::Unknown(lease.to_owned()))
    }

    /// The newest status of a job that this run of the node started, took back or reaped.
    pub fn status(&self, lease: &str) -> Option<Status> {
        self.job(lease).ok().map(|job| job.view.borrow().clone())
    }

    /// Leases of all jobs that are known and not forgotten.
    pub fn leases(&self) -> Vec<String> {
        hold(&self.inner.jobs).keys().cloned().collect()
    }

    /// Stops a job: its program is interrupted at once and killed after its grace. Returns when
    /// the warden knows; the end is [`WorkEvent::Ended`]. A job that is unknown or has ended is
    /// left as it is, and a warden that does not answer is killed, which ends its runner too.
    pub async fn stop(&self, lease: &str, why: &str) {
        let Ok(job) = self.job(lease) else { return };
        if job.view.borrow().state.ended() {
            return;
        }
        if ask(&job.dir, &Ask::Stop { why: why.to_owned() }).await.is_ok() {
            return;
        }
        // It may be ending by itself just now, with its socket gone already.
        let mut view = job.view.clone();
        let ended = view.wait_for(|status| status.state.ended());
        if timeout(WARDEN_ANSWERS, ended).await.is_err() {
            let warden = job.view.borrow().warden;
            tracing::warn!(lease, pid = warden.pid, "the warden does not answer and is killed");
            if let Err(error) = warden.kill() {
                tracing::error!(lease, pid = warden.pid, %error, "the warden cannot be killed");
            }
        }
    }

    /// Moves a job's deadline back, and returns when the warden has it in force and on disk.
    /// A deadline is never moved forward, and not after the job began to end.
    pub async fn extend(&self, lease: &str, deadline_boot_ms: u64) -> Result<(), AskError> {
        self.request(lease, Ask::Extend { deadline_boot_ms }).await
    }

    /// Freezes a job: returns when its program runs no instruction any more, until it is thawed.
    /// Its term goes on, and so does its use of memory; its end, whatever brings it, thaws it.
    /// Freezing what is frozen changes nothing. Refused once the job began to end.
    pub async fn freeze(&self, lease: &str) -> Result<(), AskError> {
        self.request(lease, Ask::Freeze).await
    }

    /// Lets a frozen job run on, and returns when it does. Thawing what is not frozen changes
    /// nothing.
    pub async fn thaw(&self, lease: &str) -> Result<(), AskError> {
        self.request(lease, Ask::Thaw).await
    }

    /// Tells a program, in its file `/in/.notice`, why and when it will be ended; returns when it
    /// can read that. The file holds one JSON object, `{"reason": "...", "ends_in_ms": N,
    /// "ends_at_unix_ms": N}`, and a later notice replaces it whole. Nothing else follows from a
    /// notice: the deadline stays as it is. Refused once the job began to end.
    pub async fn notice(&self, lease: &str, notice: Notice) -> Result<(), AskError> {
        self.request(lease, Ask::Notice { notice: Some(notice) }).await
    }

    /// Takes a notice back. Where there is none, nothing changes.
    pub async fn unnotice(&self, lease: &str) -> Result<(), AskError> {
        self.request(lease, Ask::Notice { notice: None }).await
    }

    /// Asks a warden for something that it does or refuses.
    async fn request(&self, lease: &str, request: Ask) -> Result<(), AskError> {
        let job = self.job(lease)?;
        if job.view.borrow().state.ended() {
            return Err(AskError::Refused("the job has ended".to_owned()));
        }
        match ask(&job.dir, &request).await? {
            Answer::Done { .. } => Ok(()),
            Answer::Refused { why } => Err(AskError::Refused(why)),
            Answer::Status { .. } => {
                Err(AskError::Silent(io::Error::other("it answered something else")))
            }
        }
    }

    /// A reader of a job's logs, also of one that has ended.
    pub fn output(&self, lease: &str) -> Result<Output, AskError> {
        let job = self.job(lease)?;
        Ok(Output { dir: job.dir, view: job.view })
    }

    /// Where a kept output lies. None unless the job has ended and kept a file of this name.
    pub fn output_file(&self, lease: &str, name: &str) -> Option<PathBuf> {
        let job = self.job(lease).ok()?;
        let kept = job.view.borrow().outputs.iter().any(|output| output.name == name);
        kept.then(|| job.dir.join(file::OUTPUTS).join(name))
    }

    /// What earlier runs of the node left, as [`Work::open`] found it and it now stands.
    pub fn orphans(&self) -> Vec<Orphan> {
        let orphans = hold(&self.inner.orphans).clone();
        orphans
            .into_iter()
            .map(|(lease, dir)| {
                let status: Option<Status> = read_json(&dir.join(file::STATUS)).ok();
                let live = status.as_ref().is_some_and(|status| {
                    status.boot_id == boot_id() && status.warden.alive() && locked(&dir)
                });
                Orphan { lease, dir, live, status }
            })
            .collect()
    }

    /// Keeps what the node has to say about a job's end beside it, and gives back the disk that
    /// its outputs took here: they are kept elsewhere by now.
    pub async fn conclude<T: Serialize + Send + Sync + 'static>(
        &self,
        lease: &str,
        end: T,
    ) -> io::Result<()> {
        let dir = self.job(lease).map_err(io::Error::other)?.dir;
        let conclude = move || {
            write_json(&dir.join(file::END), &end, true)?;
            disk::clear(&dir.join(file::OUTPUTS))
        };
        tokio::task::spawn_blocking(conclude).await.map_err(io::Error::other)?
    }

    /// What [`Work::conclude`] kept, if it came to that.
    pub fn conclusion<T: DeserializeOwned>(&self, lease: &str) -> Option<T> {
        read_json(&self.job(lease).ok()?.dir.join(file::END)).ok()
    }

    /// Removes the directory of a job that has ended, with its logs and outputs.
    pub async fn forget(&self, lease: &str) -> Result<(), ForgetError> {
        let orphan = hold(&self.inner.orphans).contains_key(lease);
        let job = hold(&self.inner.jobs).get(lease).cloned();
        match job {
            Some(job) if !job.view.borrow().state.ended() => {
                return Err(ForgetError::Running(lease.to_owned()));
            }
            None if orphan => return Err(ForgetError::Running(lease.to_owned())),
            None => return Ok(()),
            Some(_) => {}
        }
        let removed = self.remove(lease).await;
        removed.map_err(|source| ForgetError::Remove { lease: lease.to_owned(), source })?;
        hold(&self.inner.jobs).remove(lease);
        Ok(())
    }

    async fn remove(&self, lease: &str) -> io::Result<()> {
        let dir = self.inner.dir.join(lease);
        tokio::task::spawn_blocking(move || disk::clear(&dir)).await.map_err(io::Error::other)?
    }
}

fn lost() -> Outcome {
    Outcome::Lost { message: "its warden died".to_owned() }
}

fn make(dir: &Path) -> Result<(), StartError> {
    DirBuilder::new().mode(0o700).create(dir).map_err(|source| {
        if source.kind() == io::ErrorKind::AlreadyExists {
            let lease = dir.file_name().unwrap_or_default().to_string_lossy();
            return StartError::Exists(lease.into_owned());
        }
        StartError::Directory { what: "make the job directory", source }
    })
}

/// Fills a new job directory, so that the warden finds all it needs.
fn fill(dir: &Path, job: &JobFile) -> Result<(), StartError> {
    let directory = |what| move |source| StartError::Directory { what, source };
    File::create_new(dir.join(file::LOCK)).map_err(directory("make the lock file"))?;
    let input = dir.join(file::IN);
    DirBuilder::new().create(&input).map_err(directory("make the input directory"))?;
    fs::set_permissions(&input, Permissions::from_mode(0o755))
        .map_err(directory("open the input directory"))?;
    for Input { name, path } in &job.spec.inputs {
        disk::place(path, &input, name)
            .map_err(|source| StartError::Input { name: name.clone(), source })?;
    }
    write_json(&dir.join(file::JOB), job, true).map_err(directory("write the specification"))
}

/// Connects to a warden's socket. The path is taken through the open directory, because the
/// address of a unix socket holds 107 bytes (unix(7)) and a path may be longer.
async fn connect(dir: &Path) -> io::Result<UnixStream> {
    let dir = File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), file::SOCKET);
    UnixStream::connect(path).await
}

async fn tell(stream: &mut UnixStream, ask: &Ask) -> io::Result<()> {
    let mut line = serde_json::to_vec(ask)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

/// The next answer on a warden's socket.
async fn heard(stream: &mut BufReader<UnixStream>) -> io::Result<Answer> {
    let mut line = Vec::new();
    (&mut *stream).take(MAX_JSON).read_until(b'\n', &mut line).await?;
    match line.strip_suffix(b"\n") {
        Some(line) => Ok(serde_json::from_slice(line)?),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

async fn ask(dir: &Path, ask: &Ask) -> io::Result<Answer> {
    let asked = async {
        let mut stream = connect(dir).await?;
        tell(&mut stream, ask).await?;
        heard(&mut BufReader::new(stream)).await
    };
    timeout(WARDEN_ANSWERS, asked).await.map_err(io::Error::from)?
}

/// Whether somebody holds the lock of a job directory: its warden, if that is alive.
fn locked(dir: &Path) -> bool {
    let lock = OpenOptions::new().write(true).open(dir.join(file::LOCK));
    // Who takes it here lets it go at once: nobody starts a warden for an orphan.
    lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Asks a warden for every status from now on, and hears the first.
async fn knock(dir: &Path) -> io::Result<(BufReader<UnixStream>, Status)> {
    let mut stream = connect(dir).await?;
    tell(&mut stream, &Ask::Watch).await?;
    let mut stream = BufReader::new(stream);
    match heard(&mut stream).await? {
        Answer::Status { status } => Ok((stream, *status)),
        _ => Err(io::Error::other("it answered something else")),
    }
}

/// Waits for a new warden's first status.
async fn greet(
    dir: &Path,
    child: &mut tokio::process::Child,
) -> Result<(BufReader<UnixStream>, Status), String> {
    loop {
        if let Ok(heard) = knock(dir).await {
            return Ok(heard);
        }
        // A job may be over before it is ever heard of: then its warden is gone, but it wrote.
        if let Ok(Some(exit)) = child.try_wait() {
            if let Ok(status) = read_json::<Status>(&dir.join(file::STATUS))
                && status.state.ended()
                && let Ok((stream, _)) = UnixStream::pair()
            {
                return Ok((BufReader::new(stream), Status { state: State::Running, ..status }));
            }
            let log = fs::read(dir.join(file::WARDEN_LOG)).unwrap_or_default();
            let log = String::from_utf8_lossy(log.get(..log.len().min(1024)).unwrap_or_default());
            return Err(format!("{exit}: {}", log.trim()));
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// A job that is followed until it is reaped.
struct Following {
    dir: PathBuf,
    grace_ms: u64,
    warden: Watched,
    show: watch::Sender<Status>,
    /// Whether it was told already that the program runs.
    started: bool,
}

/// Follows one job until it is reaped. The stream is one on which its warden was asked to say
/// every status.
async fn follow(work: Work, mut job: Following, stream: BufReader<UnixStream>) {
    let (lease, dir) = (job.show.borrow().lease.clone(), job.dir.clone());
    let events = &work.inner.events;
    let (show, grace_ms) = (job.show.clone(), job.grace_ms);
    tokio::select! {
        () = listen(&mut job, &lease, stream, events) => {}
        () = overdue(&dir, grace_ms, &show) => {
            tracing::error!(%lease, "the warden has let the deadline pass and is killed");
        }
    }
    if timeout(2 * DIES, job.warden.gone()).await.is_err() {
        job.warden.kill();
        job.warden.gone().await;
    }
    let (status, lock) = bury_until_gone(&lease, &dir).await;
    let (outcome, usage) = (status.outcome.clone().unwrap_or_else(lost), status.usage);
    // A short job may have ended between two looks.
    if !job.started && !status.isolation.is_empty() {
        let _ = events.send(WorkEvent::Started { lease: lease.clone() }).await;
    }
    if let Some(job) = hold(&work.inner.jobs).get_mut(&lease) {
        job._lock = Some(Arc::new(lock));
    }
    job.show.send_replace(status);
    let _ = events.send(WorkEvent::Ended { lease, outcome, usage }).await;
}

/// Listens to a warden until it says that the job has ended, or is gone itself.
async fn listen(
    job: &mut Following,
    lease: &str,
    mut stream: BufReader<UnixStream>,
    events: &mpsc::Sender<WorkEvent>,
) {
    loop {
        if !job.started && job.show.borrow().state == State::Running {
            job.started = true;
            // Fails only when nobody listens any more; the job is still followed to its end.
            let _ = events.send(WorkEvent::Started { lease: lease.to_owned() }).await;
        }
        match heard(&mut stream).await {
            Ok(Answer::Status { status }) if status.state.ended() => return,
            Ok(Answer::Status { status }) => {
                let usage = status.usage;
                job.show.send_replace(*status);
                if job.started {
                    let _ = events.try_send(WorkEvent::Usage { lease: lease.to_owned(), usage });
                }
            }
            // It drops those who do not read for long, which a node that was frozen did not.
            _ => loop {
                if let Ok(mut again) = connect(&job.dir).await
                    && tell(&mut again, &Ask::Watch).await.is_ok()
                {
                    stream = BufReader::new(again);
                    break;
                }
                tokio::select! {
                    () = job.warden.gone() => return,
                    () = sleep(POLL) => {}
                }
            },
        }
    }
}

/// Returns when a job's deadline and grace are well past: its warden should have ended it, but a
/// process can be frozen. What counts is the deadline on disk, which no acknowledgement precedes.
async fn overdue(dir: &Path, grace_ms: u64, show: &watch::Sender<Status>) {
    loop {
        sleep(WARDEN_ANSWERS).await;
        let past = |deadline: u64| {
            let slack = u64::try_from(WARDEN_ANSWERS.as_millis()).unwrap_or(5000);
            boot_ms() > deadline.saturating_add(grace_ms).saturating_add(slack)
        };
        if past(show.borrow().deadline_boot_ms)
            && let Ok(status) = read_json::<Status>(&dir.join(file::STATUS))
            && past(status.deadline_boot_ms)
        {
            // One whose runner is dead is clearing up, which may take its time.
            if status.runner.is_none_or(|runner| runner.alive()) {
                let _ = status.warden.kill();
                return;
            }
        }
    }
}

/// Buries a job, however long that takes: capacity must not return while something of it may still
/// run.
async fn bury_until_gone(lease: &str, dir: &Path) -> (Status, File) {
    loop {
        let at = dir.to_owned();
        let buried = tokio::task::spawn_blocking(move || bury(&at))
            .await
            .map_err(io::Error::other)
            .and_then(|buried| buried);
        match buried {
            Ok(buried) => return buried,
            Err(error) => tracing::error!(%lease, %error, "the job cannot be reaped yet"),
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// Sees to it that nothing of a job is left but its directory, whatever state it was in, and
/// returns its final status and the lock that keeps a late warden from starting it again.
fn bury(dir: &Path) -> io::Result<(Status, File)> {
    let path = dir.join(file::STATUS);
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(dir.join(file::LOCK))?;
    let end = std::time::Instant::now() + 2 * DIES;
    let mut status: Option<Status> = None;
    // Who holds the lock is a warden. It writes who it is right after taking it.
    while lock.try_lock().is_err() {
        status = read_json(&path).ok();
        if let Some(status) = &status
            && status.boot_id == boot_id()
        {
            status.warden.kill()?;
        }
        if std::time::Instant::now() >= end {
            return Err(io::Error::other("its warden holds the lock and cannot be ended"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if let Ok(newest) = read_json(&path) {
        status = Some(newest);
    }
    let Some(mut status) = status else {
        // The node died before the warden lived: nothing ever ran.
        let job: Option<JobFile> = read_json(&dir.join(file::JOB)).ok();
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let status = Status {
            lease: job.as_ref().map_or(name, |job| job.spec.lease.clone()),
            token: job.map(|job| job.spec.token).unwrap_or_default(),
            state: State::Failed,
            frozen: false,
            boot_id: boot_id(),
            warden: Process { pid: 0, start: 0 },
            runner: None,
            cgroup: None,
            isolation: vec![],
            deadline_boot_ms: 0,
            started_boot_ms: 0,
            usage: Usage::default(),
            outcome: Some(Outcome::Lost { message: "it was never started".to_owned() }),
            outputs: vec![],
            outputs_missing: vec![],
        };
        note(&path, &status);
        return Ok((status, lock));
    };
    let this_boot = status.boot_id == boot_id();
    let mut changed = false;
    // A warden may have died between making a group and writing that it did.
    let job: Option<JobFile> = read_json(&dir.join(file::JOB)).ok();
    let left = || job.and_then(|job| Cgroup::existing(&job.node, &status.lease));
    let group = status.cgroup.take().or_else(left);
    if this_boot {
        if !status.warden.wait_gone(DIES) {
            return Err(io::Error::other("its warden does not end"));
        }
        // The kernel has killed the runner with its parent; this makes sure and waits. In a frozen
        // group of version 1 also the killed stay, until killing the group as a whole thaws it.
        if let Some(runner) = &status.runner {
            runner.kill()?;
        }
        if let Some(group) = &group
            && !group.kill(DIES)
        {
            return Err(io::Error::other("its cgroup does not become empty"));
        }
        if let Some(runner) = &status.runner
            && !runner.wait_gone(DIES)
        {
            return Err(io::Error::other("its runner does not end"));
        }
    }
    if let Some(group) = group {
        changed = true;
        if this_boot {
            if !status.state.ended() {
                // The kernel counted on after the warden's last sample.
                let usage = &mut status.usage;
                usage.cpu_ms = usage.cpu_ms.max(group.cpu_ms().unwrap_or(0));
                let peak = group.memory().map_or(0, |(_, peak)| peak);
                usage.memory_peak = usage.memory_peak.max(peak);
            }
            if !group.remove(DIES) {
                return Err(io::Error::other("its cgroup cannot be removed"));
            }
        }
    }
    if status.frozen {
        changed = true;
        status.frozen = false;
    }
    if !status.state.ended() {
        changed = true;
        status.state = State::Failed;
        status.outcome = Some(lost());
    }
    // What only the running job needed. A warden that ended in order has done it.
    disk::clear(&dir.join(file::OUT))?;
    disk::clear(&dir.join(file::IN))?;
    if changed {
        note(&path, &status);
    }
    Ok((status, lock))
}

/// Writes how a job that is gone has ended. On a full disk the next start finds it out again: its
/// processes are gone, which is what counts.
fn note(path: &Path, status: &Status) {
    if let Err(error) = write_json(path, status, true) {
        tracing::warn!(lease = status.lease, %error, "how a job ended cannot be written down");
    }
}

/// A reader of one job's logs, which follows them until the job has ended.
#[derive(Clone, Debug)]
pub struct Output {
    dir: PathBuf,
    view: watch::Receiver<Status>,
}

impl Output {
    /// Reads from an offset, at most `max` bytes (and never more than 1 MiB). Waits while there
    /// is nothing yet and the job still runs.
    pub async fn read(&mut self, stream: Stream, offset: u64, max: usize) -> io::Result<Chunk> {
        let name = match stream {
            Stream::Stdout => file::STDOUT,
            Stream::Stderr => file::STDERR,
        };
        let path = self.dir.join(name);
        loop {
            // Asked before reading: what was written before the end is then surely seen.
            let ended = self.view.borrow_and_update().state.ended();
            let bytes = match tokio::fs::File::open(&path).await {
                Ok(mut file) => {
                    file.seek(io::SeekFrom::Start(offset)).await?;
                    let mut bytes = Vec::new();
                    let max = u64::try_from(max.clamp(1, MAX_CHUNK)).unwrap_or(1);
                    file.take(max).read_to_end(&mut bytes).await?;
                    bytes
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => vec![],
                Err(error) => return Err(error),
            };
            if !bytes.is_empty() || ended {
                let end = ended && bytes.is_empty();
                return Ok(Chunk { bytes, end });
            }
            let wake = Instant::now() + POLL;
            tokio::select! {
                _ = self.view.changed() => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Waits until the job has ended, and returns its final status.
    pub async fn ended(&mut self) -> Status {
        // An error says that nobody will change it any more.
        let _ = self.view.wait_for(|status| status.state.ended()).await;
        self.view.borrow().clone()
    }
}
