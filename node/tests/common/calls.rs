//! The calls with which a process changes files, makes them durable, speaks and sends, written
//! down in the order in which the kernel took them, whoever in the process made them: the store,
//! sled or one of its threads.
//!
//! This is ptrace(2), as strace uses it, in the test itself: a thread is held before and after
//! every call until it has been written down, so what one thread does because of another's call
//! comes after that call here too. No tool is needed, bytes arrive whole, and the process can be
//! killed before a call of choice. (Shims would have to be libraries of C, and a layer in the
//! store sees nothing of sled.) Children of the process are not followed.

#![allow(dead_code)] // each test executable uses a part of it
#![allow(unsafe_code)] // ptrace and waitpid have no safe form in the crates at hand

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::Sender;

use std::ffi::OsString;

use libc::{c_int, c_long, c_void, pid_t};

/// A file or directory, under whatever name; the directory that is watched is 0.
pub(crate) type Number = u64;

/// What was done. A change stands where its call returned; what can be seen from outside, where
/// its call began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// A file or directory was made.
    Create {
        file: Number,
        path: PathBuf,
        dir: bool,
    },
    Write {
        file: Number,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// Cut, or filled with zeros, to this length.
    Truncate {
        file: Number,
        length: u64,
    },
    /// Space was set aside: it is no shorter than this.
    Allocate {
        file: Number,
        length: u64,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Remove {
        path: PathBuf,
    },
    /// A sync of a file or directory returned; it began before step `since`, so what was done from
    /// there on it need not have seen.
    Sync {
        file: Number,
        since: usize,
    },
    /// `sync_file_range`, which promises nothing.
    Nudge {
        file: Number,
    },
    /// Standard output.
    Said(Vec<u8>),
    /// A packet, or several, on a socket.
    Sent,
}

/// Writes down what processes do below one directory, one process after the other.
#[derive(Debug)]
pub(crate) struct Recorder {
    below: PathBuf,
    device: u64,
    /// By inode, which a new file may have taken over from an old one.
    numbers: HashMap<u64, Number>,
    next: Number,
    pub(crate) steps: Vec<Step>,
    /// Kills the process before the step that would be this one.
    pub(crate) kill_before: Option<usize>,
}

/// A call that has begun.
#[derive(Debug)]
enum Begun {
    Open { path: PathBuf, there: bool, flags: u64 },
    Mkdir { path: PathBuf },
    Write { file: Number, offset: u64, parts: Vec<(u64, u64)> },
    Truncate { file: Number, length: u64 },
    Allocate { file: Number, length: u64 },
    Rename { from: PathBuf, to: PathBuf },
    Remove { path: PathBuf },
    Sync { file: Number, since: usize },
    Nudge { file: Number },
}

impl Recorder {
    /// Watches `below`. What is there already has numbers too, but no steps that made it.
    pub(crate) fn new(below: &Path) -> Self {
        let below = below.canonicalize().expect("the directory is there");
        let metadata = fs::metadata(&below).expect("the directory is there");
        let mut recorder = Self {
            below: below.clone(),
            device: metadata.dev(),
            numbers: HashMap::from([(metadata.ino(), 0)]),
            next: 1,
            steps: Vec::new(),
            kill_before: None,
        };
        recorder.find(&below).expect("the directory can be read");
        recorder
    }

    /// Runs `command` to its end and returns its wait status. Its number goes to `started`.
    pub(crate) fn run(&mut self, mut command: Command, started: Option<&Sender<u32>>) -> c_int {
        // SAFETY: the one call between fork and exec is a bare system call.
        unsafe {
            command.pre_exec(|| ptrace(libc::PTRACE_TRACEME, 0, 0).map(drop));
        }
        #[allow(clippy::zombie_processes)] // waited for below
        let child = command.spawn().expect("starts; tracing must be allowed here");
        let leader = child.id() as pid_t;
        assert_eq!(wait_for(leader), (leader, libc::SIGTRAP << 8 | 0x7f), "the stop after exec");
        let options =
            libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
        ptrace(libc::PTRACE_SETOPTIONS, leader, options as usize).expect("tracing is allowed");
        if let Some(started) = started {
            let _ = started.send(child.id());
        }
        let memory = File::open(format!("/proc/{leader}/mem")).expect("readable while traced");
        let mut traced = Traced { recorder: self, leader, memory, begun: HashMap::new() };
        traced.go_on(leader, 0);
        loop {
            let (thread, status) = wait_for(-1);
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                if let Some(Some(begun)) = traced.begun.remove(&thread) {
                    traced.cut_off(begun);
                }
                if thread == leader {
                    return status;
                }
                continue;
            }
            let signal = libc::WSTOPSIG(status);
            let pass_on = match signal {
                _ if signal == libc::SIGTRAP | 0x80 => {
                    traced.call(thread);
                    0
                }
                // A new thread, or the clone that made it.
                libc::SIGSTOP | libc::SIGTRAP => 0,
                other => other,
            };
            traced.go_on(thread, pass_on);
        }
    }

    fn number_of(&self, inode: u64) -> Option<Number> {
        self.numbers.get(&inode).copied()
    }

    fn find(&mut self, dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            self.number(metadata.ino());
            if metadata.is_dir() {
                self.find(&entry.path())?;
            }
        }
        Ok(())
    }

    fn number(&mut self, inode: u64) -> Number {
        let file = self.next;
        self.next += 1;
        self.numbers.insert(inode, file);
        file
    }

    /// A file that is still there, by its number.
    fn open(&self, file: Number) -> Option<File> {
        let mut dirs = vec![self.below.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).expect("the directory can be read").flatten() {
                let metadata = entry.metadata().ok()?;
                if metadata.is_dir() {
                    dirs.push(entry.path());
                } else if self.number_of(metadata.ino()) == Some(file) {
                    return File::open(entry.path()).ok();
                }
            }
        }
        None
    }

    fn length(&self, file: Number) -> Option<u64> {
        Some(self.open(file)?.metadata().ok()?.len())
    }

    fn made(&mut self, inode: u64, path: PathBuf, dir: bool) {
        let file = self.number(inode);
        self.steps.push(Step::Create { file, path, dir });
    }
}

struct Traced<'a> {
    recorder: &'a mut Recorder,
    leader: pid_t,
    memory: File,
    /// By thread; none for a call that is of no interest.
    begun: HashMap<pid_t, Option<Begun>>,
}

impl Traced<'_> {
    fn go_on(&self, thread: pid_t, signal: c_int) {
        // It may have been killed meanwhile, which the next wait tells.
        let _ = ptrace(libc::PTRACE_SYSCALL, thread, signal as usize);
    }

    fn call(&mut self, thread: pid_t) {
        let Some(info) = info(thread) else { return };
        match info.op {
            libc::PTRACE_SYSCALL_INFO_ENTRY => {
                // SAFETY: `op` says that this is the variant.
                let entry = unsafe { info.u.entry };
                let begun = self.begin(entry.nr as c_long, entry.args);
                self.begun.insert(thread, begun);
            }
            libc::PTRACE_SYSCALL_INFO_EXIT => {
                // SAFETY: `op` says that this is the variant.
                let result = unsafe { info.u.exit }.sval;
                if let Some(Some(begun)) = self.begun.remove(&thread)
                    && result >= 0
                {
                    self.end(begun, result as u64);
                }
            }
            _ => {}
        }
    }

    fn note(&mut self, step: Step) {
        self.recorder.steps.push(step);
        self.kill_if_due();
    }

    fn kill_if_due(&self) {
        if self.recorder.kill_before.is_some_and(|at| self.recorder.steps.len() >= at) {
            // SAFETY: a signal to a process that is our child and was not waited for.
            unsafe { libc::kill(self.leader, libc::SIGKILL) };
        }
    }

    fn begin(&mut self, call: c_long, args: [u64; 6]) -> Option<Begun> {
        #[cfg(target_arch = "x86_64")]
        let (call, args) = modern(call, args);
        let [first, second, third, fourth, ..] = args;
        let since = self.recorder.steps.len();
        match call {
            libc::SYS_openat => {
                let path = self.path(first, second)?;
                let there = path.exists();
                Some(Begun::Open { path, there, flags: third })
            }
            libc::SYS_mkdirat => Some(Begun::Mkdir { path: self.path(first, second)? }),
            libc::SYS_renameat | libc::SYS_renameat2 => {
                let (from, to) = (self.path(first, second), self.path(third, fourth));
                assert_eq!(from.is_some(), to.is_some(), "renamed across the border");
                Some(Begun::Rename { from: from?, to: to? })
            }
            libc::SYS_unlinkat => Some(Begun::Remove { path: self.path(first, second)? }),
            libc::SYS_write | libc::SYS_writev | libc::SYS_pwrite64 | libc::SYS_pwritev => {
                self.begin_write(call, first, second, third, fourth)
            }
            libc::SYS_ftruncate => {
                Some(Begun::Truncate { file: self.file(first)?, length: second })
            }
            libc::SYS_fallocate => {
                let file = self.file(first)?;
                assert_eq!(second, 0, "a kind of fallocate that is not known here");
                Some(Begun::Allocate { file, length: third + fourth })
            }
            libc::SYS_fsync | libc::SYS_fdatasync => {
                Some(Begun::Sync { file: self.file(first)?, since })
            }
            libc::SYS_sync_file_range => Some(Begun::Nudge { file: self.file(first)? }),
            libc::SYS_sendto | libc::SYS_sendmsg | libc::SYS_sendmmsg => {
                self.note(Step::Sent);
                None
            }
            // What would change files in a way that is not written down.
            libc::SYS_mmap => {
                let written = third & libc::PROT_WRITE as u64 != 0;
                let shared = fourth & libc::MAP_SHARED as u64 != 0;
                let ours = written && shared && self.file(args[4]).is_some();
                assert!(!ours, "a file is written through memory");
                None
            }
            libc::SYS_linkat | libc::SYS_symlinkat | libc::SYS_truncate => {
                let ours = self.path(first, second).or_else(|| self.path(third, fourth));
                assert!(ours.is_none(), "call {call} is not known here: {ours:?}");
                None
            }
            libc::SYS_copy_file_range | libc::SYS_splice => {
                assert!(self.file(third).is_none(), "call {call} is not known here");
                None
            }
            libc::SYS_pwritev2 | libc::SYS_sendfile => {
                assert!(self.file(first).is_none(), "call {call} is not known here");
                None
            }
            libc::SYS_io_uring_setup => panic!("io_uring is not known here"),
            _ => None,
        }
    }

    fn begin_write(
        &mut self,
        call: c_long,
        descriptor: u64,
        at: u64,
        length: u64,
        offset: u64,
    ) -> Option<Begun> {
        let file = self.file(descriptor);
        if file.is_none() && descriptor != 1 {
            return None;
        }
        let parts = match call {
            libc::SYS_write | libc::SYS_pwrite64 => vec![(at, length)],
            _ => {
                let table = self.bytes(at, length * 16);
                let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight"));
                table.chunks_exact(16).map(|part| (word(&part[..8]), word(&part[8..]))).collect()
            }
        };
        let Some(file) = file else {
            let said = parts.iter().flat_map(|(at, length)| self.bytes(*at, *length)).collect();
            self.note(Step::Said(said));
            return None;
        };
        let offset = match call {
            libc::SYS_pwrite64 | libc::SYS_pwritev => offset,
            _ => self.position(descriptor),
        };
        Some(Begun::Write { file, offset, parts })
    }

    /// The call came back with success.
    fn end(&mut self, begun: Begun, result: u64) {
        match begun {
            Begun::Open { path, there, flags } => {
                let descriptor = self.proc(&format!("fd/{result}"));
                let metadata = fs::metadata(&descriptor).expect("a file just opened");
                let of = |flag: c_int| flags & flag as u64 == flag as u64;
                let writes = flags & libc::O_ACCMODE as u64 != libc::O_RDONLY as u64;
                assert!(!(writes && of(libc::O_DSYNC)), "writes that sync are not known here");
                assert!(!(writes && of(libc::O_TMPFILE)), "nameless files are not known here");
                if of(libc::O_CREAT) && !there {
                    self.recorder.made(metadata.ino(), path, false);
                    self.kill_if_due();
                } else if of(libc::O_TRUNC) && writes {
                    let file = self.recorder.number_of(metadata.ino()).expect("a known file");
                    self.note(Step::Truncate { file, length: 0 });
                }
            }
            Begun::Mkdir { path } => {
                let metadata = fs::metadata(&path).expect("a directory just made");
                self.recorder.made(metadata.ino(), path, true);
                self.kill_if_due();
            }
            Begun::Write { file, offset, parts } => {
                let mut bytes: Vec<u8> =
                    parts.iter().flat_map(|(at, length)| self.bytes(*at, *length)).collect();
                bytes.truncate(result as usize);
                self.note(Step::Write { file, offset, bytes });
            }
            Begun::Truncate { file, length } => self.note(Step::Truncate { file, length }),
            Begun::Allocate { file, length } => self.note(Step::Allocate { file, length }),
            Begun::Rename { from, to } => self.note(Step::Rename { from, to }),
            Begun::Remove { path } => self.note(Step::Remove { path }),
            Begun::Sync { file, since } => self.note(Step::Sync { file, since }),
            Begun::Nudge { file } => self.note(Step::Nudge { file }),
        }
    }

    /// The thread died in a call, which the kernel may have carried out: what is found of it afterwards
    /// is written down. Where it was not carried out that changes nothing.
    fn cut_off(&mut self, begun: Begun) {
        let inode_of = |path: &Path| fs::symlink_metadata(path).ok().map(|about| about.ino());
        match begun {
            Begun::Open { path, there: false, .. } | Begun::Mkdir { path } => {
                let new = inode_of(&path).filter(|inode| self.recorder.number_of(*inode).is_none());
                if let Some(inode) = new {
                    let dir = path.is_dir();
                    self.recorder.made(inode, path, dir);
                }
            }
            Begun::Open { path, flags, .. } if flags & libc::O_TRUNC as u64 != 0 => {
                let file = inode_of(&path).and_then(|inode| self.recorder.number_of(inode));
                let known = file.and_then(|file| Some((file, self.recorder.length(file)?)));
                if let Some((file, length)) = known {
                    self.recorder.steps.push(Step::Truncate { file, length });
                }
            }
            Begun::Rename { from, to } if inode_of(&from).is_none() => {
                self.recorder.steps.push(Step::Rename { from, to });
            }
            Begun::Remove { path } if inode_of(&path).is_none() => {
                self.recorder.steps.push(Step::Remove { path });
            }
            Begun::Write { file, offset, parts } => {
                let length: u64 = parts.iter().map(|(_, length)| length).sum();
                let mut bytes = Vec::new();
                if let Some(mut found) = self.recorder.open(file) {
                    let sought = found.seek(io::SeekFrom::Start(offset));
                    sought.and_then(|_| found.take(length).read_to_end(&mut bytes)).expect("read");
                }
                self.recorder.steps.push(Step::Write { file, offset, bytes });
            }
            Begun::Truncate { file, .. } => {
                if let Some(length) = self.recorder.length(file) {
                    self.recorder.steps.push(Step::Truncate { file, length });
                }
            }
            Begun::Allocate { file, .. } => {
                if let Some(length) = self.recorder.length(file) {
                    self.recorder.steps.push(Step::Allocate { file, length });
                }
            }
            // What had been there before, what was not done, and what promises nothing unless it
            // returned.
            Begun::Open { .. }
            | Begun::Rename { .. }
            | Begun::Remove { .. }
            | Begun::Sync { .. }
            | Begun::Nudge { .. } => {}
        }
    }

    /// The file behind a descriptor, if it is below the directory, or was.
    fn file(&self, descriptor: u64) -> Option<Number> {
        let metadata = fs::metadata(self.proc(&format!("fd/{}", descriptor as i32))).ok()?;
        let ours = metadata.dev() == self.recorder.device;
        self.recorder.number_of(metadata.ino()).filter(|_| ours)
    }

    /// The path that a call names, if it is below the directory.
    fn path(&self, dir: u64, at: u64) -> Option<PathBuf> {
        let mut name = Vec::new();
        let mut byte = [0];
        let mut at = at;
        // A byte at a time would be slow; a page at a time may reach into nothing.
        while name.len() < 4096 {
            let mut piece = [0; 64];
            let length = 64 - (at % 64) as usize;
            let piece = &mut piece[..length];
            self.memory.read_exact_at(piece, at).ok()?;
            if let Some(end) = piece.iter().position(|byte| *byte == 0) {
                name.extend_from_slice(&piece[..end]);
                byte = [1];
                break;
            }
            name.extend_from_slice(piece);
            at += length as u64;
        }
        if byte == [0] || name.is_empty() {
            return None;
        }
        let named = PathBuf::from(OsString::from_vec(name));
        let path = if named.is_absolute() {
            named
        } else if dir as i32 == libc::AT_FDCWD {
            fs::read_link(self.proc("cwd")).ok()?.join(named)
        } else {
            fs::read_link(self.proc(&format!("fd/{}", dir as i32))).ok()?.join(named)
        };
        // The directory's own parents may be links; below it there are none.
        let parent = path.parent()?.canonicalize().ok()?;
        let path = parent.join(path.file_name()?);
        (path.starts_with(&self.recorder.below) && path != self.recorder.below).then_some(path)
    }

    /// Where the next write to a descriptor goes.
    fn position(&self, descriptor: u64) -> u64 {
        let text = fs::read_to_string(self.proc(&format!("fdinfo/{descriptor}"))).expect("open");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).expect("a field of fdinfo").to_owned()
        };
        let flags = i32::from_str_radix(&field("flags:"), 8).expect("octal");
        if flags & libc::O_APPEND == 0 {
            return field("pos:").parse().expect("a number");
        }
        fs::metadata(self.proc(&format!("fd/{descriptor}"))).expect("open").len()
    }

    fn bytes(&self, at: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        // What cannot be read by us could not be read by the kernel, which then says so.
        let _ = self.memory.read_exact_at(&mut bytes, at);
        bytes
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.leader))
    }
}

/// The older forms of calls, which newer machines lack, as the newer ones.
#[cfg(target_arch = "x86_64")]
fn modern(call: c_long, args: [u64; 6]) -> (c_long, [u64; 6]) {
    let [first, second, third, ..] = args;
    let here = libc::AT_FDCWD as u64;
    match call {
        libc::SYS_open => (libc::SYS_openat, [here, first, second, third, 0, 0]),
        libc::SYS_creat => {
            let flags = (libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC) as u64;
            (libc::SYS_openat, [here, first, flags, second, 0, 0])
        }
        libc::SYS_mkdir => (libc::SYS_mkdirat, [here, first, second, 0, 0, 0]),
        libc::SYS_rename => (libc::SYS_renameat, [here, first, here, second, 0, 0]),
        libc::SYS_unlink | libc::SYS_rmdir => (libc::SYS_unlinkat, [here, first, 0, 0, 0, 0]),
        libc::SYS_link | libc::SYS_symlink => (libc::SYS_linkat, [here, first, here, second, 0, 0]),
        // `truncate` has one path: there is none to look for in the second place.
        libc::SYS_truncate => (libc::SYS_truncate, [here, first, here, 0, 0, 0]),
        other => (other, args),
    }
}

fn ptrace(request: libc::c_uint, thread: pid_t, data: usize) -> io::Result<c_long> {
    // SAFETY: none of the requests made through this writes to our memory.
    let result = unsafe {
        libc::ptrace(request, thread, std::ptr::null_mut::<c_void>(), data as *mut c_void)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// What a thread that stands at a call is about to do, or did.
fn info(thread: pid_t) -> Option<libc::ptrace_syscall_info> {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    let size = size_of::<libc::ptrace_syscall_info>();
    // SAFETY: the kernel writes at most `size` bytes, and zeros are a value of this type too.
    let (length, info) = unsafe {
        let length = libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size, info.as_mut_ptr());
        (length, info.assume_init())
    };
    (length > 0).then_some(info)
}

/// The next thread that stopped or ended, among those that the calling thread traces.
fn wait_for(which: pid_t) -> (pid_t, c_int) {
    let mut status = 0;
    loop {
        // SAFETY: `status` is ours.
        let thread =
            unsafe { libc::waitpid(which, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        if thread > 0 {
            return (thread, status);
        }
        let error = io::Error::last_os_error();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}");
    }
}
