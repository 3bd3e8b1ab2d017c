//! Processes by pid *and* start time, so that a recycled pid is never taken for the one meant.
//!
//! A pid alone names whoever has it now. A pid with the start time of proc_pid_stat(5) names one
//! process for as long as the host is up, and a pidfd (pidfd_open(2)) holds on to it: open the
//! pidfd first, then compare the start time, then signal through the pidfd, and nothing can come
//! between.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Clock ticks per second in proc_pid_stat(5). `USER_HZ` is fixed at 100 on every architecture
/// that this program is built for.
const USER_HZ: u64 = 100;

/// One process of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Its start time in clock ticks since boot: field 22 of proc_pid_stat(5).
    pub start: u64,
}

/// What proc_pid_stat(5) says that matters here.
struct Stat {
    state: char,
    cpu_ms: u64,
    start: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in field 2 is the process's own choice and may hold anything, parentheses too: the
/// fields that count begin after the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let rest = text.get(text.rfind(')')? + 1..)?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |n: usize| fields.get(n).and_then(|field| field.parse::<u64>().ok());
    // Field 3 (state) is index 0 here; 14 utime, 15 stime, 22 starttime.
    Some(Stat {
        state: fields.first()?.chars().next()?,
        cpu_ms: (number(11)? + number(12)?).saturating_mul(1000 / USER_HZ),
        start: number(19)?,
    })
}

impl Process {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|stat| Self { pid, start: stat.start })
    }

    /// The calling process.
    pub fn current() -> Option<Self> {
        i32::try_from(std::process::id()).ok().and_then(Self::of)
    }

    /// Whether it can still run instructions: a zombie cannot.
    pub fn alive(&self) -> bool {
        stat(self.pid).is_some_and(|s| s.start == self.start && !matches!(s.state, 'Z' | 'X'))
    }

    /// Processor time so far, of all its threads, in milliseconds; also of a zombie.
    pub(super) fn cpu_ms(&self) -> Option<u64> {
        stat(self.pid).filter(|s| s.start == self.start).map(|s| s.cpu_ms)
    }

    /// Resident memory now and at its peak, in bytes; none for a zombie.
    pub(super) fn memory(&self) -> Option<(u64, u64)> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
            Some(kib.saturating_mul(1024))
        };
        Some((field("VmRSS:")?, field("VmHWM:")?))
    }

    /// Whether all its threads are stopped by a signal (SIGSTOP, signal(7)).
    pub(super) fn stopped(&self) -> bool {
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        let stopped = threads.flatten().all(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat"));
            // One that ended between the two looks runs no more.
            stat.ok().and_then(|text| parse_stat(&text)).is_none_or(|stat| stat.state == 'T')
        });
        stopped && self.alive()
    }

    /// A descriptor that holds on to this process; none if it is gone, also if another process
    /// has its pid by now.
    pub(super) fn pidfd(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = (self.pid > 0).then(|| Pid::from_raw(self.pid)).flatten() else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            // It is gone; and so it is where its number is that of some other process's thread by
            // now, which has no pidfd of this sort: EINVAL, on newer kernels ENOENT.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(self.alive().then_some(fd))
    }

    /// Kills it, if it is still there; a process that only has the same pid is not touched.
    pub fn kill(&self) -> io::Result<()> {
        let Some(fd) = self.pidfd()? else { return Ok(()) };
        match pidfd_send_signal(&fd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it runs no more, at most so long. True when it is gone.
    pub(super) fn wait_gone(&self, at_most: Duration) -> bool {
        let end = Instant::now() + at_most;
        while self.alive() {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

/// Closes every descriptor above standard error. Rust opens all its own close-on-exec, but the
/// node may have inherited others from whoever started it, and a job must not see those.
///
/// To be called first thing in a fresh process, while it has one thread and nothing open.
#[allow(unsafe_code)]
pub(super) fn close_inherited() -> io::Result<()> {
    let open: Vec<RawFd> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // The listing itself held one of these; it is closed by now.
        if fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok() {
            // SAFETY: nothing in this process owns `fd`. It is a fresh process with one thread
            // that has opened nothing yet, so an open descriptor here came through execve.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_calls_itself_names_with_parentheses_is_read_right() {
        let text = "7 (a) S (b)) R 1 7 7 0 -1 4194304 1 0 0 0 12 30 0 0 20 0 1 0 4242 1 1";
        let stat = parse_stat(text).expect("a line");
        assert_eq!((stat.state, stat.cpu_ms, stat.start), ('R', 420, 4242));
        assert!(parse_stat("").is_none());
        assert!(parse_stat("7 (a) R 1 2").is_none());
    }

    #[test]
    fn a_stopped_process_is_seen_to_be_stopped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let process = Process::of(i32::try_from(child.id()).expect("a pid")).expect("alive");
        let fd = process.pidfd().expect("asked").expect("alive");
        for (signal, stopped) in [(Signal::STOP, true), (Signal::CONT, false)] {
            pidfd_send_signal(&fd, signal).expect("sent");
            let end = Instant::now() + Duration::from_secs(30);
            while process.stopped() != stopped {
                assert!(Instant::now() < end, "{signal:?} is not seen");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert!(!process.stopped(), "what is gone is not stopped");
        assert!(process.pidfd().expect("asked").is_none());
    }

    #[test]
    fn another_start_time_is_another_process() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = i32::try_from(child.id()).expect("a pid");
        let process = Process::of(pid).expect("alive");
        let stranger = Process { pid, start: process.start + 1 };
        assert!(process.alive() && !stranger.alive());
        stranger.kill().expect("nothing to do");
        assert!(process.alive(), "a recycled pid was killed");
        process.kill().expect("killed");
        assert!(process.wait_gone(Duration::from_secs(30)), "a zombie counts as gone");
        child.wait().expect("reaped");
        process.kill().expect("killing twice is no error");
    }

    #[test]
    fn a_pid_that_is_a_thread_by_now_is_nobody_to_kill() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get()).expect("heard");
            let _ = ended.recv();
        });
        let pid = told.recv().expect("runs");
        let process = Process { pid, start: 1 };
        process.kill().expect("nothing to do");
        assert!(process.wait_gone(Duration::ZERO));
        drop(end);
        thread.join().expect("was not killed");
    }
}
