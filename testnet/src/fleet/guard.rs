//! Ending a fleet: whatever works under its root, in order, and the guard that does it where the
//! fleet's own process cannot any more.
//!
//! ```text
//! guard <--pipe-- fleet      "done": nothing is left to do
//!                            "ends": end everything; the fleet waits, and holds the lock
//!                            closed:  its process is gone: take the lock, end everything
//! ```

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::time::Instant;

use leasehold_node::work::{self, Exec, Process, Work};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::{FleetError, GUARD, LOOK, NODE, STOPS, io_at, lock};

/// What the guard is told when the fleet has ended in order.
const DONE: &[u8] = b"done";
/// What it is told when it should end the fleet for one that still holds the lock.
const ENDS: &[u8] = b"ends";

/// What a process does under a fleet's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Node,
    Job,
}

/// What a command line says that the process does under `root`, if anything.
fn part_of<'a>(mut args: impl Iterator<Item = &'a [u8]>, root: &Path) -> Option<Part> {
    let under = |path: Option<&[u8]>| {
        path.is_some_and(|path| Path::new(OsStr::from_bytes(path)).starts_with(root))
    };
    if args.nth(1)? != NODE.as_bytes() {
        return None;
    }
    match args.next()? {
        b"up" => (args.next()? == b"--dir" && under(args.next())).then_some(Part::Node),
        b"__warden" | b"__runner" => under(args.next()).then_some(Part::Job),
        _ => None,
    }
}

/// The processes of this host whose command lines say what is looked for.
fn scan<T>(look: impl Fn(&[u8]) -> Option<T>) -> Vec<(Process, T)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        // First who it is, then what it does: a pid that changes hands between is not meant.
        let process = Process::of(pid).filter(Process::alive)?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let found = look(&line)?;
        (Process::of(pid) == Some(process)).then_some((process, found))
    })
    .collect()
}

/// The processes that work under `root`: this fleet's, since a root has one fleet at a time.
fn processes(root: &Path) -> Vec<(Process, Part)> {
    scan(|line| part_of(line.split(|byte| *byte == 0), root))
}

/// The wardens of the jobs of the node that lives in `node`, by the names of the jobs.
pub(super) fn wardens(node: &Path) -> BTreeMap<String, Process> {
    let jobs = scan(|line| warden_of(line.split(|byte| *byte == 0), node));
    jobs.into_iter().map(|(process, job)| (job, process)).collect()
}

/// The job whose warden has this command line, if it is one of the node's in `node`.
fn warden_of<'a>(mut args: impl Iterator<Item = &'a [u8]>, node: &Path) -> Option<String> {
    if args.nth(1)? != NODE.as_bytes() || args.next()? != b"__warden" {
        return None;
    }
    let dir = Path::new(OsStr::from_bytes(args.next()?));
    dir.starts_with(node).then(|| dir.file_name()?.to_str().map(str::to_owned)).flatten()
}

/// Ends whatever works under `root`: nodes first, then what jobs they left. Gives how many jobs.
pub(super) async fn end_processes(root: &Path) -> Result<usize, FleetError> {
    let nodes = || processes(root).into_iter().filter(|(_, part)| *part == Part::Node);
    for (process, _) in nodes() {
        if let Some(pid) = Pid::from_raw(process.pid).filter(|_| process.alive()) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
    let begun = Instant::now();
    while nodes().next().is_some() && begun.elapsed() < STOPS {
        sleep(LOOK / 2).await;
    }
    for (process, _) in nodes() {
        let _ = process.kill();
    }
    // Through the node's own way, which also removes the jobs' cgroups.
    let mut ended = 0;
    for entry in fs::read_dir(root).map_err(io_at(root))?.flatten() {
        let jobs = entry.path().join("jobs");
        if fs::read_dir(&jobs).is_ok_and(|mut entries| entries.next().is_some()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            ended += end_jobs(jobs).await.map_err(|source| FleetError::Jobs { name, source })?;
        }
    }
    for (process, _) in processes(root) {
        let _ = process.kill();
    }
    let begun = Instant::now();
    loop {
        let left: Vec<i32> = processes(root).iter().map(|(process, _)| process.pid).collect();
        if left.is_empty() {
            return Ok(ended);
        }
        if begun.elapsed() > STOPS {
            return Err(FleetError::Stays(left));
        }
        sleep(LOOK / 2).await;
    }
}

/// Ends what jobs an ended node left, and gives how many still ran.
async fn end_jobs(jobs: PathBuf) -> Result<usize, work::OpenError> {
    let (events, _receiver) = mpsc::channel(16);
    let exec = Exec { prefix: vec![NODE.into()], ..Exec::default() };
    let work = Work::open(jobs, exec, events)?;
    let running = work.orphans().iter().filter(|orphan| orphan.live).count();
    work.reap_orphans().await?;
    Ok(running)
}

/// Unmounts what is mounted below `root`.
pub(super) fn unmount_below(root: &Path) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    // Names with a space or a backslash are written as octal numbers, and are none of ours.
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    let below: Vec<_> = places.filter(|place| place.starts_with(root)).collect();
    for place in below.iter().rev() {
        unmount(*place, UnmountFlags::empty())?;
    }
    Ok(())
}

/// The process that ends the fleet when this one cannot any more.
#[derive(Debug)]
pub(super) struct Guard {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    pub(super) fn start(program: &Path, root: &Path, temporary: bool) -> Result<Self, FleetError> {
        let mut command = Command::new(program);
        command.arg0("leasehold-testnet").arg(GUARD).arg(root).arg(if temporary {
            "temporary"
        } else {
            "kept"
        });
        // Signals of the terminal are not for it.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let spawned = command.spawn();
        let spawned = spawned
            .map_err(|source| FleetError::Spawn { what: "the fleet's guard".into(), source });
        let mut process = spawned?;
        let pipe = process.stdin.take();
        Ok(Self { process, pipe })
    }

    /// All has ended: it may go.
    pub(super) fn dismiss(&mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(DONE);
            drop(pipe);
            let _ = self.process.wait();
        }
    }

    /// Lets it end what still runs, if anything, and waits for it. Once only.
    pub(super) fn alarm(&mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(ENDS);
            drop(pipe);
            let _ = self.process.wait();
        }
    }
}

/// Takes the lock of a fleet whose process is gone. The system lets go of a process's files one
/// after the other, so the lock may come a moment after the pipe has closed. None where another
/// fleet has the directory by now: that one ended what it found there before it began.
fn take_over(root: &Path) -> Option<File> {
    let begun = Instant::now();
    loop {
        match lock(root) {
            Ok(file) => return Some(file),
            Err(FleetError::InUse(_)) if begun.elapsed() < STOPS => std::thread::sleep(LOOK),
            Err(_) => return None,
        }
    }
}

/// The guard's whole life.
pub(super) fn guard_main<'a>(mut args: impl Iterator<Item = &'a OsString>) -> ExitCode {
    let Some(root) = args.next().map(PathBuf::from).filter(|root| root.is_absolute()) else {
        return ExitCode::from(2);
    };
    let temporary = args.next().is_some_and(|kind| kind == "temporary");
    let mut said = Vec::new();
    let heard = io::stdin().take(DONE.len() as u64).read_to_end(&mut said);
    if heard.is_ok() && said == DONE {
        return ExitCode::SUCCESS;
    }
    let held = if said == ENDS { None } else { take_over(&root) };
    if said != ENDS && held.is_none() {
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.is_ok_and(|runtime| runtime.block_on(end_processes(&root)).is_ok());
    if temporary && ended && unmount_below(&root).is_ok() {
        let _ = fs::remove_dir_all(&root);
    }
    if ended { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(line: &str) -> Option<Part> {
        part_of(line.split(' ').map(str::as_bytes), Path::new("/tmp/fleet"))
    }

    #[test]
    fn only_what_works_under_the_root_is_meant() {
        assert_eq!(part("testnet node up --dir /tmp/fleet/a"), Some(Part::Node));
        assert_eq!(part("testnet node __warden /tmp/fleet/a/jobs/1"), Some(Part::Job));
        assert_eq!(part("testnet node __runner /tmp/fleet/a/jobs/1"), Some(Part::Job));
        for other in [
            "",
            "testnet",
            "testnet node",
            "testnet node up",
            "testnet node up --dir",
            "testnet node up --dir /tmp/fleet2/a",
            "testnet node up --dir /home/tmp/fleet/a",
            "testnet node nodes --dir /tmp/fleet/a",
            "testnet up --dir /tmp/fleet/a",
            "testnet __fleet /tmp/fleet",
            "less /tmp/fleet/a/node.log",
        ] {
            assert_eq!(part(other), None, "{other}");
        }
    }

    #[test]
    fn a_warden_names_its_job() {
        let warden = |line: &str| warden_of(line.split(' ').map(str::as_bytes), Path::new("/t/a"));
        assert_eq!(warden("testnet node __warden /t/a/jobs/1"), Some("1".into()));
        for other in ["testnet node __warden /t/ab/jobs/1", "testnet node __runner /t/a/jobs/1", ""]
        {
            assert_eq!(warden(other), None, "{other}");
        }
    }
}
