//! What a job is: its specification, its status, its usage and its outcome, as they stand in the
//! job directory, and the limits that every specification is held to.
//!
//! These are the only types that the node, the warden and the runner share. They travel as JSON
//! files and JSON lines between processes of one host, never over the network.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use super::process::Process;

/// The bound of each of a job's two log files when the specification says nothing else: 16 MiB.
pub const DEFAULT_LOG_LIMIT: u64 = 16 << 20;
/// The largest log bound that is accepted: 1 GiB.
pub const MAX_LOG_LIMIT: u64 = 1 << 30;
/// The largest program that is accepted: 64 MiB. Compiling costs many times the program's size.
pub const MAX_PROGRAM: u64 = 64 << 20;
/// The smallest memory limit: one page of WebAssembly, 64 KiB.
pub const MIN_MEMORY: u64 = 64 << 10;
/// The most inputs of one job: an index alone may name 65,536.
pub const MAX_INPUTS: usize = 1 << 17;
/// The most declared outputs of one job.
pub const MAX_OUTPUTS: usize = 1024;
/// The most bytes that arguments and environment may have together.
pub const MAX_ARGUMENT_BYTES: usize = 1 << 20;
/// The longest relative file name, in bytes.
pub const MAX_NAME: usize = 1024;
/// The deepest relative file name, in components.
pub const MAX_DEPTH: usize = 16;
/// The longest token, in hexadecimal digits.
pub const MAX_TOKEN: usize = 128;
/// The name below `/in` under which a job finds a notice. No input may have it.
pub const NOTICE: &str = ".notice";
/// The variable that tells a program where it would find a notice, unless its specification sets
/// the variable itself.
pub const NOTICE_VARIABLE: &str = "LEASEHOLD_NOTICE";
/// The longest reason of a notice, in characters; a longer one is cut.
pub const MAX_REASON: usize = 256;
/// The longest JSON line or file that one of the three processes takes from another.
pub(super) const MAX_JSON: u64 = 8 << 20;

/// Names of what lies in a job directory.
pub(super) mod file {
    /// The job as the node wrote it, before the warden was started.
    pub(crate) const JOB: &str = "spec.json";
    /// The newest status, replaced whole by the warden.
    pub(crate) const STATUS: &str = "status.json";
    /// Held exclusively by the warden for its whole life, and by the node once a job is reaped.
    pub(crate) const LOCK: &str = "lock";
    /// The warden's unix socket.
    pub(crate) const SOCKET: &str = "socket";
    /// What the program wrote to its standard output.
    pub(crate) const STDOUT: &str = "stdout";
    /// What the program wrote to its standard error.
    pub(crate) const STDERR: &str = "stderr";
    /// The guest's `/in`.
    pub(crate) const IN: &str = "in";
    /// The next notice, until it is moved into the guest's `/in` as a whole.
    pub(crate) const NOTICE: &str = "notice";
    /// The guest's `/out`, while it runs.
    pub(crate) const OUT: &str = "out";
    /// The declared outputs, once the job has ended.
    pub(crate) const OUTPUTS: &str = "outputs";
    /// What the node says about the job's end, once its outputs are kept elsewhere.
    pub(crate) const END: &str = "end.json";
    /// What the warden itself has to complain about.
    pub(crate) const WARDEN_LOG: &str = "warden.log";
}

/// Which engine runs the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    /// A WASI preview 1 program (a core WebAssembly module with a `_start` export).
    Wasm,
}

/// One file that the program finds below `/in`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Its relative name below `/in`.
    pub name: String,
    /// Where its bytes lie on this host.
    pub path: PathBuf,
}

/// A job, completely: what runs, on what, within which limits, until when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The lease the job runs under: its id in lowercase hexadecimal, 8 to 128 digits.
    pub lease: String,
    /// What the node's books know this job by, beside its lease: at most [`MAX_TOKEN`] lowercase
    /// hexadecimal digits, chosen by the node and handed back in [`Status`]. It means nothing here.
    #[serde(default)]
    pub token: String,
    /// The engine.
    pub runtime: Runtime,
    /// The file that holds the program.
    pub program: PathBuf,
    /// All arguments, the program's name first.
    pub args: Vec<String>,
    /// The environment, complete: nothing of the host's is added, only [`NOTICE_VARIABLE`].
    pub env: Vec<(String, String)>,
    /// The file that standard input reads from; none means an empty one.
    pub stdin: Option<PathBuf>,
    /// What the program finds below `/in`. It lies there before the warden is started, which has no
    /// use for the list.
    #[serde(skip)]
    pub inputs: Vec<Input>,
    /// Relative names below `/out` that are kept when the job has ended.
    pub outputs: Vec<String>,
    /// Processor share, in thousandths of a core.
    pub cpu_milli: u64,
    /// Memory of the program, in bytes.
    pub memory: u64,
    /// Disk below `/out`, in bytes.
    pub disk: u64,
    /// Processes and threads that the program may have. The runner's own few are added.
    pub pids: u64,
    /// When the job's term ends, in milliseconds of `CLOCK_BOOTTIME`.
    pub deadline_boot_ms: u64,
    /// How long after the deadline, or after a stop, the job may still take to end.
    pub grace_ms: u64,
    /// The bound of each log file, in bytes; what does not fit is counted and dropped.
    pub log_limit: u64,
    /// Words of isolation (see [`super::isolation`]) without which the program must not start.
    #[serde(default)]
    pub require: Vec<String>,
}

/// Why a specification is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// The lease id would not be a safe directory name.
    #[error("lease id {0:?} is not 8 to 128 lowercase hexadecimal digits")]
    Lease(String),
    /// The token is not what a token may be.
    #[error("the token is not at most {MAX_TOKEN} lowercase hexadecimal digits")]
    Token,
    /// An input would lie where notices are put.
    #[error("no input may be called {0:?}: notices are put at `{NOTICE}`")]
    Reserved(String),
    /// A file name is not relative and plain.
    #[error("file name {0:?} is not a plain relative name (no leading slash, no `.` or `..`)")]
    Name(String),
    /// Two inputs, or two outputs, have one name.
    #[error("file name {0:?} is given twice")]
    Twice(String),
    /// There are too many inputs or outputs.
    #[error("{0} inputs or outputs are more than {1}")]
    Files(usize, usize),
    /// Arguments and environment are too long.
    #[error("arguments and environment are longer than {MAX_ARGUMENT_BYTES} bytes together")]
    Arguments,
    /// An argument or a variable holds a zero byte, or a variable has no proper name.
    #[error("argument or environment variable {0:?} holds a zero byte or has no proper name")]
    Argument(String),
    /// The memory limit is too small to hold anything.
    #[error("memory limit of {0} bytes is below {MIN_MEMORY} bytes")]
    Memory(u64),
    /// The log bound is out of range.
    #[error("log limit of {0} bytes is above {MAX_LOG_LIMIT} bytes")]
    Log(u64),
}

impl Spec {
    /// Checks everything that can be checked without looking at the host.
    pub fn check(&self) -> Result<(), SpecError> {
        check_lease(&self.lease)?;
        if self.token.len() > MAX_TOKEN || !hexadecimal(&self.token) {
            return Err(SpecError::Token);
        }
        let inputs: Vec<&str> = self.inputs.iter().map(|input| input.name.as_str()).collect();
        let outputs: Vec<&str> = self.outputs.iter().map(String::as_str).collect();
        check_names(&inputs, MAX_INPUTS)?;
        check_names(&outputs, MAX_OUTPUTS)?;
        if let Some(name) = inputs.iter().find(|name| Path::new(name).starts_with(NOTICE)) {
            return Err(SpecError::Reserved((*name).to_owned()));
        }
        let mut bytes = 0usize;
        for arg in &self.args {
            bytes = bytes.saturating_add(arg.len() + 1);
            if arg.contains('\0') {
                return Err(SpecError::Argument(arg.clone()));
            }
        }
        for (name, value) in &self.env {
            bytes = bytes.saturating_add(name.len() + value.len() + 2);
            if name.is_empty() || name.contains(['\0', '=']) || value.contains('\0') {
                return Err(SpecError::Argument(name.clone()));
            }
        }
        if bytes > MAX_ARGUMENT_BYTES {
            return Err(SpecError::Arguments);
        }
        if self.memory < MIN_MEMORY {
            return Err(SpecError::Memory(self.memory));
        }
        if self.log_limit > MAX_LOG_LIMIT {
            return Err(SpecError::Log(self.log_limit));
        }
        Ok(())
    }
}

/// Checks that a lease id can name a directory and a cgroup.
pub(super) fn check_lease(lease: &str) -> Result<(), SpecError> {
    if hexadecimal(lease) && (8..=128).contains(&lease.len()) {
        Ok(())
    } else {
        Err(SpecError::Lease(lease.to_owned()))
    }
}

fn hexadecimal(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn check_names(names: &[&str], most: usize) -> Result<(), SpecError> {
    if names.len() > most {
        return Err(SpecError::Files(names.len(), most));
    }
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        check_name(name)?;
        if !seen.insert(*name) {
            return Err(SpecError::Twice((*name).to_owned()));
        }
    }
    Ok(())
}

/// Checks that a name stays below the directory it is used in, spelled in the one plain way.
pub fn check_name(name: &str) -> Result<(), SpecError> {
    let bad = || SpecError::Name(name.to_owned());
    if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
        return Err(bad());
    }
    let path = Path::new(name);
    let mut plain = PathBuf::new();
    let mut depth = 0usize;
    for part in path.components() {
        match part {
            Component::Normal(part) if part.len() <= 255 => plain.push(part),
            _ => return Err(bad()),
        }
        depth += 1;
    }
    // `components` forgives `a//b`, `a/./b` and `a/`: those are second spellings of a name.
    if depth > MAX_DEPTH || plain.as_os_str() != path.as_os_str() {
        return Err(bad());
    }
    Ok(())
}

/// What a job has used so far. Cumulative: it never falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Milliseconds of boot time since the runner was started.
    pub wall_ms: u64,
    /// Milliseconds of processor time, user and system.
    pub cpu_ms: u64,
    /// Memory in use at the last sample, in bytes.
    pub memory: u64,
    /// The most memory in use at any time, in bytes.
    pub memory_peak: u64,
    /// Memory over time, in MiB-milliseconds.
    pub memory_mib_ms: u64,
    /// Bytes below `/out` at the last look.
    pub disk: u64,
    /// Bytes of output that did not fit into the bounded logs.
    pub log_dropped: u64,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    /// The program ended by itself, with this code (0 to 125).
    Exited {
        /// The exit code.
        code: i32,
    },
    /// The program did something that WebAssembly forbids.
    Trapped {
        /// What it did.
        message: String,
    },
    /// The program never started: it is no program, or none that this runtime can run.
    NotRunnable {
        /// Why.
        message: String,
    },
    /// The program wanted more memory than the lease has.
    OutOfMemory {
        /// The limit, in bytes.
        limit: u64,
    },
    /// The program wrote more below `/out` than the lease has disk for.
    OutOfDisk {
        /// The limit, in bytes.
        limit: u64,
    },
    /// The term ended first.
    Deadline,
    /// It was stopped on request.
    Stopped {
        /// Who or what asked for it.
        why: String,
    },
    /// Nobody knows: the warden or the runner died without a word.
    Lost {
        /// What is known.
        message: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { code } => write!(f, "exited with code {code}"),
            Self::Trapped { message } => write!(f, "trapped: {message}"),
            Self::NotRunnable { message } => write!(f, "not runnable: {message}"),
            Self::OutOfMemory { limit } => write!(f, "memory limit of {limit} bytes reached"),
            Self::OutOfDisk { limit } => write!(f, "disk limit of {limit} bytes reached"),
            Self::Deadline => write!(f, "ended at its deadline"),
            Self::Stopped { why } => write!(f, "stopped: {why}"),
            Self::Lost { message } => write!(f, "lost: {message}"),
        }
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The warden lives; the runner is not confined yet.
    Starting,
    /// The runner is confined and runs the program.
    Running,
    /// Reaped, after the program ended by itself.
    Exited,
    /// Reaped, after anything else.
    Failed,
}

impl State {
    /// Whether the job is reaped.
    pub fn ended(self) -> bool {
        matches!(self, Self::Exited | Self::Failed)
    }
}

/// A declared output that was kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputFile {
    /// Its relative name.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
}

/// What `status.json` says: all that a node needs to watch, adopt or reap the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The lease.
    pub lease: String,
    /// The token of the specification.
    #[serde(default)]
    pub token: String,
    /// Where the job stands.
    pub state: State,
    /// Whether the program is frozen: it is there, and runs no instruction until it is thawed.
    #[serde(default)]
    pub frozen: bool,
    /// The boot that pids and boot times belong to; of another boot, no process is left.
    pub boot_id: String,
    /// The warden.
    pub warden: Process,
    /// The runner, once it is started.
    pub runner: Option<Process>,
    /// The runner's cgroup, where the host gave one.
    pub cgroup: Option<Cgroup>,
    /// The isolation that this job really got.
    pub isolation: Vec<String>,
    /// The deadline that the warden enforces, in milliseconds of `CLOCK_BOOTTIME`.
    pub deadline_boot_ms: u64,
    /// When the runner was started, in milliseconds of `CLOCK_BOOTTIME`; 0 before that.
    pub started_boot_ms: u64,
    /// What was used.
    pub usage: Usage,
    /// How it ended; none until it is reaped.
    pub outcome: Option<Outcome>,
    /// The declared outputs that were kept.
    pub outputs: Vec<OutputFile>,
    /// The declared outputs that were not there, not regular files, or over the disk limit.
    pub outputs_missing: Vec<String>,
}

/// What a node has to tell a running program: why it will be ended, and when. The program finds it
/// as a JSON object in the file [`NOTICE`] below `/in`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// Why, in words for whoever wrote the program; cut at [`MAX_REASON`] characters.
    pub reason: String,
    /// When, in milliseconds of `CLOCK_BOOTTIME`.
    pub end_boot_ms: u64,
}

/// What `spec.json` holds: the specification and what the warden needs beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct JobFile {
    pub(super) spec: Spec,
    /// Arguments that come before the hidden one when this executable starts itself.
    pub(super) prefix: Vec<String>,
    /// This node's part of the cgroup path.
    pub(super) node: String,
    /// Whether to use cgroups.
    pub(super) cgroups: bool,
    /// Which start this is, as the warden's command line says: one that comes late must not take a
    /// later start in a directory of the same name for its own.
    #[serde(default)]
    pub(super) start: String,
}

/// What the node asks a warden, one JSON line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub(super) enum Ask {
    /// One status line.
    Status,
    /// Status lines, one at every change and every sample, until the job has ended.
    Watch,
    /// A later deadline; answered when it is in force.
    Extend { deadline_boot_ms: u64 },
    /// An early end.
    Stop { why: String },
    /// No instruction until told otherwise; answered when it is in force.
    Freeze,
    /// On with a frozen program; answered when it is in force.
    Thaw,
    /// What the program is to find in its notice file, or that there is to be none; answered when
    /// it is so.
    Notice { notice: Option<Notice> },
}

/// What a warden answers, one JSON line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    Status { status: Box<Status> },
    Done { deadline_boot_ms: u64 },
    Refused { why: String },
}

/// What the warden tells its runner, one JSON line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "snake_case")]
pub(super) enum Tell {
    /// The limits are in place: confine yourself and run.
    Go {
        /// The user the runner turns into, where it may.
        uid: Option<u32>,
        /// Whether a cgroup bounds the real memory, so that address space may be generous.
        memory_bounded: bool,
        /// The word of isolation for that cgroup.
        cgroup: Option<String>,
    },
    /// Interrupt the program.
    Stop,
    /// Your end is noted: go.
    Bye,
}

/// What a runner tells its warden, one JSON line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "said", rename_all = "snake_case")]
pub(super) enum Said {
    /// Confined; the program starts now.
    Confined { isolation: Vec<String> },
    /// The program ended.
    Ended { outcome: Outcome },
    /// The program was interrupted, as told.
    Interrupted,
}

/// Now, in milliseconds of `CLOCK_BOOTTIME`: the clock that counts while the host sleeps and that
/// nobody can set (clock_gettime(2)).
pub fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000)
}

/// Now, in milliseconds since 1970, as this host's wall clock has it: for people and programs to
/// read, never to decide by.
pub(super) fn unix_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// The id of this boot (random(4)); empty where the host has none.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// Replaces a file as a whole: a reader sees the old or the new content, never a part. With
/// `durable`, the new content survives a power cut once this returns.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T, durable: bool) -> io::Result<()> {
    let bytes = serde_json::to_vec(value)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&bytes)?;
    if durable {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    if durable && let Some(parent) = path.parent() {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Reads a JSON file of at most [`MAX_JSON`] bytes.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let mut bytes = Vec::new();
    let length = File::open(path)?.take(MAX_JSON + 1).read_to_end(&mut bytes)?;
    if u64::try_from(length).unwrap_or(u64::MAX) > MAX_JSON {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "file is too long"));
    }
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn spec() -> Spec {
        Spec {
            lease: "00112233".into(),
            token: "c0ffee".into(),
            runtime: Runtime::Wasm,
            program: "/dev/null".into(),
            args: vec!["program".into()],
            env: vec![("A".into(), "b".into())],
            stdin: None,
            inputs: vec![],
            outputs: vec![],
            cpu_milli: 1000,
            memory: 1 << 20,
            disk: 1 << 20,
            pids: 1,
            deadline_boot_ms: 0,
            grace_ms: 1000,
            log_limit: DEFAULT_LOG_LIMIT,
            require: vec![],
        }
    }

    #[test]
    fn names_stay_below_their_directory() {
        for good in ["a", "a/b", "a.txt", ".hidden", "..a", "a b", "ä", "a/b/c/d"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        let deep = "a/".repeat(MAX_DEPTH) + "a";
        let long = "a".repeat(256);
        for bad in
            ["", "/", "/a", "..", ".", "a/..", "../a", "a/../b", "./a", "a/./b", "a//b", "a/"]
        {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        for bad in ["a\0b", deep.as_str(), long.as_str()] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_specification_is_held_to_its_limits() {
        assert_eq!(spec().check(), Ok(()));
        type Edit = fn(&mut Spec);
        let bad: [(&str, Edit); 16] = [
            ("lease with a slash", |s| s.lease = "../../../etc".into()),
            ("lease in capitals", |s| s.lease = "AABBCCDD".into()),
            ("short lease", |s| s.lease = "aa".into()),
            ("token in capitals", |s| s.token = "AA".into()),
            ("long token", |s| s.token = "a".repeat(MAX_TOKEN + 1)),
            ("input where notices are put", |s| {
                s.inputs = vec![Input { name: ".notice".into(), path: "/x".into() }];
            }),
            ("input below where notices are put", |s| {
                s.inputs = vec![Input { name: ".notice/x".into(), path: "/x".into() }];
            }),
            ("output that climbs", |s| s.outputs = vec!["../x".into()]),
            ("output twice", |s| s.outputs = vec!["x".into(), "x".into()]),
            ("too many outputs", |s| s.outputs = (0..2000).map(|n| n.to_string()).collect()),
            ("input that is absolute", |s| {
                s.inputs = vec![Input { name: "/x".into(), path: "/x".into() }];
            }),
            ("argument with a zero", |s| s.args = vec!["a\0".into()]),
            ("variable with an equals sign", |s| s.env = vec![("A=B".into(), "c".into())]),
            ("arguments too long", |s| s.args = vec!["a".repeat(MAX_ARGUMENT_BYTES)]),
            ("no memory", |s| s.memory = 0),
            ("log without bound", |s| s.log_limit = u64::MAX),
        ];
        for (what, edit) in bad {
            let mut spec = spec();
            edit(&mut spec);
            assert!(spec.check().is_err(), "{what}");
        }
    }

    #[test]
    fn what_an_earlier_version_wrote_is_read() {
        let mut job = serde_json::to_value(spec()).expect("json");
        let gone = job.as_object_mut().and_then(|job| job.remove("token"));
        assert_eq!(gone, Some("c0ffee".into()));
        let read: Spec = serde_json::from_value(job).expect("a specification");
        assert_eq!(read, Spec { token: String::new(), ..spec() });

        let text = r#"{"lease":"00112233","state":"running","boot_id":"b","warden":{"pid":1,
            "start":2},"runner":null,"cgroup":null,"isolation":[],"deadline_boot_ms":1,
            "started_boot_ms":1,"usage":{"wall_ms":0,"cpu_ms":0,"memory":0,"memory_peak":0,
            "memory_mib_ms":0,"disk":0,"log_dropped":0},"outcome":null,"outputs":[],
            "outputs_missing":[]}"#;
        let status: Status = serde_json::from_str(text).expect("a status");
        assert_eq!((status.token.as_str(), status.frozen), ("", false));
    }

    #[test]
    fn json_files_are_replaced_whole_and_bounded() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.json");
        write_json(&path, &vec![1, 2, 3], true).expect("written");
        assert_eq!(read_json::<Vec<i32>>(&path).expect("read"), [1, 2, 3]);
        fs::write(&path, vec![b' '; usize::try_from(MAX_JSON).expect("fits") + 1]).expect("write");
        assert!(read_json::<Vec<i32>>(&path).is_err());
    }
}
