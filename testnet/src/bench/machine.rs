//! The machine that figures are of: without it they say nothing.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde::Serialize;

/// The first line of every benchmark's output.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    bench: &'static str,
    /// Cores that this process may use.
    cores: usize,
    cpu: String,
    kernel: String,
    /// Bytes.
    memory: Option<u64>,
    /// What the benchmark was started in, where that is a git checkout.
    commit: Option<String>,
    /// `release`, or `debug`, whose figures mean nothing.
    build: &'static str,
}

impl Machine {
    pub(super) fn look() -> Self {
        let uname = rustix::system::uname();
        if cfg!(debug_assertions) {
            eprintln!("this is a debug build: its figures mean nothing (cargo run --release)");
        }
        Self {
            bench: "machine",
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: leasehold_node::host::processor(),
            kernel: format!(
                "{} {}",
                uname.sysname().to_string_lossy(),
                uname.release().to_string_lossy()
            ),
            memory: memory(),
            commit: commit(),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
        }
    }
}

fn memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn commit() -> Option<String> {
    let git = |args: &[&str]| {
        let mut git = Command::new("git");
        let output = git.args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() { commit } else { format!("{commit}-dirty") })
}

/// Seconds of processor time that this process has used, all its threads, in user and kernel mode.
pub(super) fn cpu_s() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The most memory that this process ever had resident, in MB (10^6 bytes); shared pages of files
/// count only where they are mapped (proc_pid_status(5), `VmHWM`).
pub(super) fn peak_mb() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?;
    Some((kib * 1024) as f64 / 1e6)
}

/// The file system's name, as far as it is a usual one: a sync is free on some.
pub(super) fn file_system(dir: &Path) -> String {
    // statfs(2)
    const NAMES: [(i64, &str); 6] = [
        (0xEF53, "ext4"),
        (0x0102_1994, "tmpfs"),
        (0x5846_5342, "xfs"),
        (0x9123_683E, "btrfs"),
        (0x794C_7630, "overlayfs"),
        (0x2FC1_2FC1, "zfs"),
    ];
    let Ok(found) = rustix::fs::statfs(dir) else { return "an unknown file system".into() };
    let kind = found.f_type;
    let known = NAMES.iter().find(|(magic, _)| *magic == kind);
    known.map_or_else(|| format!("file system {kind:#x}"), |(_, name)| (*name).to_owned())
}
