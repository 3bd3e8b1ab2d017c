//! Control groups of a runner, version 2 and version 1: limits, meter, and the sure kill.
//!
//! A job's group is `leasehold/<node>/<lease>`, below the group that the node itself is in, so
//! that whatever bounds the node bounds its jobs too. Version 2 allows no processes in inner
//! groups, so there the job's group hangs below the node's parent, unless the node sits in the
//! root. On hosts that mount version 1 the controllers each have their own tree; a host may have
//! some and not others, and what is missing is reported, never pretended.
//!
//! Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/*.rst of Linux.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Version 1 controllers that are used where they are mounted.
const V1: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "freezer"];
/// Controllers without which a group does not bound a job.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];
/// The key of a version 2 group among [`Cgroup::dirs`].
const UNIFIED: &str = "unified";
/// The period of the processor quota, in microseconds: the kernel's own default.
const PERIOD_US: u64 = 100_000;
/// How long freezing may take where it only helps to kill.
const FREEZES_TO_KILL: Duration = Duration::from_millis(20);

/// The group of one runner: a directory per controller, or the one of version 2.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Controller (or `unified`) to directory.
    pub dirs: BTreeMap<String, PathBuf>,
}

/// What a group holds its members to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Thousandths of a core.
    pub(super) cpu_milli: u64,
    /// Bytes.
    pub(super) memory: u64,
    /// Processes and threads.
    pub(super) pids: u64,
}

/// One hierarchy of this host, as the calling process stands in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    /// The controllers, or only [`UNIFIED`].
    controllers: Vec<String>,
    /// Where it is mounted.
    mount: PathBuf,
    /// The calling process's group, relative to the mount.
    own: PathBuf,
}

/// Matches proc_pid_mountinfo(5) with proc_pid_cgroup(5).
fn hierarchies(mountinfo: &str, membership: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let Some((front, back)) = line.split_once(" - ") else { continue };
        let front: Vec<&str> = front.split(' ').collect();
        let back: Vec<&str> = back.split(' ').collect();
        let (Some(root), Some(mount), Some(kind)) = (front.get(3), front.get(4), back.first())
        else {
            continue;
        };
        let names: Vec<String> = match *kind {
            "cgroup2" => vec![UNIFIED.to_owned()],
            "cgroup" => back
                .get(2)
                .map(|options| options.split(',').filter(|o| V1.contains(o)))
                .into_iter()
                .flatten()
                .map(str::to_owned)
                .collect(),
            _ => continue,
        };
        let own = membership.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (id, list, path) = (parts.next()?, parts.next()?, parts.next()?);
            let unified = id == "0" && list.is_empty();
            let hit = if *kind == "cgroup2" {
                unified
            } else {
                names.first().is_some_and(|name| list.split(',').any(|c| c == name))
            };
            hit.then_some(path)
        });
        if let (false, Some(own)) = (names.is_empty(), own) {
            // In a container the mount may show only a part of the tree.
            let own = Path::new(own);
            let own = own.strip_prefix(root).or_else(|_| own.strip_prefix("/")).unwrap_or(own);
            found.push(Hierarchy {
                controllers: names,
                mount: PathBuf::from(mount),
                own: own.to_owned(),
            });
        }
    }
    found
}

/// Where version 2 groups go: beside the node's own, since inner groups hold no processes.
fn unified_base(hierarchy: &Hierarchy) -> PathBuf {
    match hierarchy.own.parent() {
        Some(parent) => hierarchy.mount.join(parent),
        None => hierarchy.mount.clone(),
    }
}

fn here() -> Vec<Hierarchy> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    hierarchies(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A `key value` line of a flat keyed file.
fn keyed(path: &Path, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
}

impl Cgroup {
    /// The group of a lease as far as it is there, whoever made it.
    pub(super) fn existing(node: &str, lease: &str) -> Option<Self> {
        let tail = Path::new("leasehold").join(node).join(lease);
        let mut dirs = BTreeMap::new();
        for hierarchy in here() {
            for controller in &hierarchy.controllers {
                let dir = match controller.as_str() {
                    UNIFIED => unified_base(&hierarchy).join(&tail),
                    _ => hierarchy.mount.join(&hierarchy.own).join(&tail),
                };
                if dir.is_dir() {
                    dirs.insert(controller.clone(), dir);
                }
            }
        }
        (!dirs.is_empty()).then_some(Self { dirs })
    }

    /// Makes a group with these limits, or as much of one as this host allows. None where it
    /// allows nothing.
    pub(super) fn create(node: &str, lease: &str, limits: Limits) -> Option<Self> {
        let tail = Path::new("leasehold").join(node).join(lease);
        let here = here();
        // Another job's end may remove the node's empty level just now: see `remove`.
        (0..3)
            .find_map(|_| Self::create_v2(&here, &tail, limits))
            .or_else(|| Self::create_v1(&here, &tail, limits))
    }

    fn create_v2(here: &[Hierarchy], tail: &Path, limits: Limits) -> Option<Self> {
        let hierarchy = here.iter().find(|h| h.controllers.iter().any(|c| c == UNIFIED))?;
        let base = unified_base(hierarchy);
        let available = fs::read_to_string(base.join("cgroup.controllers")).ok()?;
        if !NEEDED.iter().all(|c| available.split_ascii_whitespace().any(|a| a == *c)) {
            return None;
        }
        // Controllers are handed down level by level.
        let mut dir = base;
        for part in tail.components() {
            fs::write(dir.join("cgroup.subtree_control"), "+cpu +memory +pids").ok()?;
            dir.push(part);
            match fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return None,
                _ => {}
            }
        }
        let group = Self { dirs: BTreeMap::from([(UNIFIED.to_owned(), dir.clone())]) };
        let quota = quota_us(limits.cpu_milli);
        let done = fs::write(dir.join("cpu.max"), format!("{quota} {PERIOD_US}"))
            .and_then(|()| fs::write(dir.join("memory.max"), limits.memory.to_string()))
            .and_then(|()| fs::write(dir.join("pids.max"), limits.pids.to_string()));
        // Swap may be compiled out; a group kill on memory exhaustion is a refinement.
        let _ = fs::write(dir.join("memory.swap.max"), "0");
        let _ = fs::write(dir.join("memory.oom.group"), "1");
        if done.is_err() {
            group.remove(Duration::from_secs(1));
            return None;
        }
        Some(group)
    }

    fn create_v1(here: &[Hierarchy], tail: &Path, limits: Limits) -> Option<Self> {
        let mut dirs = BTreeMap::new();
        for hierarchy in here {
            for controller in hierarchy.controllers.iter().filter(|c| *c != UNIFIED) {
                let dir = hierarchy.mount.join(&hierarchy.own).join(tail);
                if !(0..3).any(|_| fs::create_dir_all(&dir).is_ok()) {
                    continue;
                }
                let set = match controller.as_str() {
                    "cpu" => fs::write(dir.join("cpu.cfs_period_us"), PERIOD_US.to_string())
                        .and_then(|()| {
                            let quota = quota_us(limits.cpu_milli).to_string();
                            fs::write(dir.join("cpu.cfs_quota_us"), quota)
                        }),
                    "memory" => {
                        let limit = limits.memory.to_string();
                        let set = fs::write(dir.join("memory.limit_in_bytes"), &limit);
                        // Swap accounting may be off; it can only be set after the limit itself.
                        let _ = fs::write(dir.join("memory.memsw.limit_in_bytes"), &limit);
                        set
                    }
                    "pids" => fs::write(dir.join("pids.max"), limits.pids.to_string()),
                    _ => Ok(()),
                };
                if set.is_ok() {
                    dirs.insert(controller.clone(), dir);
                } else {
                    let _ = fs::remove_dir(&dir);
                }
            }
        }
        (!dirs.is_empty()).then_some(Self { dirs })
    }

    /// The word of isolation for what this group does: `cgroup2`, `cgroup1`, or
    /// `cgroup1-partial` where the host lacks one of the controllers that bound a job.
    pub(super) fn word(&self) -> &'static str {
        if self.dirs.contains_key(UNIFIED) {
            "cgroup2"
        } else if NEEDED.iter().all(|c| self.dirs.contains_key(*c)) {
            "cgroup1"
        } else {
            "cgroup1-partial"
        }
    }

    /// Whether the group bounds memory.
    pub(super) fn bounds_memory(&self) -> bool {
        self.dirs.contains_key(UNIFIED) || self.dirs.contains_key("memory")
    }

    /// Moves a process into the group. A controller that does not take it is given up, so that
    /// the group promises only what it does. False when none took it.
    pub(super) fn add(&mut self, pid: i32) -> bool {
        self.dirs.retain(|_, dir| {
            let taken = fs::write(dir.join("cgroup.procs"), pid.to_string()).is_ok();
            if !taken {
                let _ = fs::remove_dir(dir);
            }
            taken
        });
        !self.dirs.is_empty()
    }

    /// Processor time of all members that ever were, in milliseconds.
    pub(super) fn cpu_ms(&self) -> Option<u64> {
        if let Some(dir) = self.dirs.get(UNIFIED) {
            return keyed(&dir.join("cpu.stat"), "usage_usec ").map(|us| us / 1000);
        }
        number(&self.dirs.get("cpuacct")?.join("cpuacct.usage")).map(|ns| ns / 1_000_000)
    }

    /// Memory charged now and at its peak, in bytes.
    pub(super) fn memory(&self) -> Option<(u64, u64)> {
        if let Some(dir) = self.dirs.get(UNIFIED) {
            let now = number(&dir.join("memory.current"))?;
            // memory.peak came with Linux 5.19.
            return Some((now, number(&dir.join("memory.peak")).unwrap_or(now)));
        }
        let dir = self.dirs.get("memory")?;
        let now = number(&dir.join("memory.usage_in_bytes"))?;
        Some((now, number(&dir.join("memory.max_usage_in_bytes")).unwrap_or(now)))
    }

    /// Whether the kernel killed a member for the group's memory limit.
    pub(super) fn out_of_memory(&self) -> bool {
        let kills = if let Some(dir) = self.dirs.get(UNIFIED) {
            keyed(&dir.join("memory.events"), "oom_kill ")
        } else {
            self.dirs.get("memory").and_then(|d| keyed(&d.join("memory.oom_control"), "oom_kill "))
        };
        kills.is_some_and(|kills| kills > 0)
    }

    fn members(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for dir in self.dirs.values() {
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Kills all members, until none is left or the time is over. True when none is left.
    ///
    /// Version 2 has one file for it. On version 1 the group is frozen first, so that members
    /// can neither fork away nor end and leave their pid to another while the list is read.
    pub(super) fn kill(&self, at_most: Duration) -> bool {
        let end = Instant::now() + at_most;
        loop {
            if let Some(dir) = self.dirs.get(UNIFIED) {
                // cgroup.kill came with Linux 5.14; the loop below does without.
                let _ = fs::write(dir.join("cgroup.kill"), "1");
            }
            self.freeze(true, FREEZES_TO_KILL);
            for pid in self.members() {
                let Some(pid) = (pid > 0).then(|| rustix::process::Pid::from_raw(pid)).flatten()
                else {
                    continue;
                };
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            // On version 1 also the killed end only when thawed.
            self.freeze(false, Duration::ZERO);
            if self.members().is_empty() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Freezes all members, or lets them run on, and waits until that is in force, at most so long.
    /// False where it is not, and where this group cannot freeze.
    pub(super) fn freeze(&self, on: bool, at_most: Duration) -> bool {
        let (path, word) = if let Some(dir) = self.dirs.get(UNIFIED) {
            (dir.join("cgroup.freeze"), if on { "1" } else { "0" })
        } else if let Some(dir) = self.dirs.get("freezer") {
            (dir.join("freezer.state"), if on { "FROZEN" } else { "THAWED" })
        } else {
            return false;
        };
        // The file of version 2 came with Linux 5.2.
        if fs::write(&path, word).is_err() {
            return false;
        }
        // Neither version freezes at once: a member in an uninterruptible wait delays it.
        let end = Instant::now() + at_most;
        while self.frozen() != Some(on) {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Whether this group can freeze its members as a whole.
    pub(super) fn freezes(&self) -> bool {
        self.frozen().is_some()
    }

    /// Whether all members are frozen; none where this group cannot freeze.
    fn frozen(&self) -> Option<bool> {
        if let Some(dir) = self.dirs.get(UNIFIED) {
            return keyed(&dir.join("cgroup.events"), "frozen ").map(|frozen| frozen == 1);
        }
        let state = fs::read_to_string(self.dirs.get("freezer")?.join("freezer.state")).ok()?;
        Some(state.trim() == "FROZEN")
    }

    /// Removes the directories of an empty group. A zombie still counts as a member, so this may
    /// have to wait. True when nothing is left.
    pub(super) fn remove(&self, at_most: Duration) -> bool {
        let end = Instant::now() + at_most;
        for dir in self.dirs.values() {
            loop {
                match fs::remove_dir(dir) {
                    Ok(()) => break,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                    Err(_) if Instant::now() >= end => return false,
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
            // The node's own level goes with its last job; it fails while others are there.
            if let Some(node) = dir.parent()
                && fs::remove_dir(node).is_ok()
                && let Some(all) = node.parent()
            {
                let _ = fs::remove_dir(all);
            }
        }
        true
    }
}

/// At least 1 ms per period: less than that the kernel refuses.
fn quota_us(cpu_milli: u64) -> u64 {
    cpu_milli.saturating_mul(PERIOD_US / 1000).max(1000)
}

/// The word for what groups this host gives, found by making one and removing it again.
pub(super) fn probe() -> Option<&'static str> {
    let name = format!("probe-{}", std::process::id());
    let limits = Limits { cpu_milli: 1000, memory: 64 << 20, pids: 16 };
    let group = Cgroup::create(&name, "0", limits)?;
    let word = group.word();
    group.remove(Duration::from_secs(1));
    Some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_common_hosts_are_understood() {
        let v1 = "30 29 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                  31 29 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  32 29 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                  33 29 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                  34 29 0:30 / /proc rw - proc proc rw\n garbage";
        let own = "3:cpu,cpuacct:/a/b\n2:memory:/\n1:name=systemd:/x\n0::/c\ngarbage";
        let found = hierarchies(v1, own);
        let short: Vec<(String, &Path)> =
            found.iter().map(|h| (h.controllers.join(","), h.own.as_path())).collect();
        assert_eq!(
            short,
            [
                ("cpu,cpuacct".to_owned(), Path::new("a/b")),
                ("memory".to_owned(), Path::new("")),
                ("unified".to_owned(), Path::new("c")),
            ]
        );
        // A container that sees only its own part of the tree.
        let part = "30 29 0:26 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup rw";
        let found = hierarchies(part, "0::/docker/1/inner");
        assert_eq!(found.first().map(|h| h.own.as_path()), Some(Path::new("inner")));
    }

    #[test]
    fn a_group_can_be_made_filled_killed_and_removed_where_the_host_allows() {
        let node = format!("test-{}", std::process::id());
        let limits = Limits { cpu_milli: 500, memory: 64 << 20, pids: 32 };
        let Some(mut group) = Cgroup::create(&node, "00112233", limits) else {
            assert_eq!(probe(), None, "the probe promises what cannot be had");
            return;
        };
        assert_eq!(probe(), Some(group.word()));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = i32::try_from(child.id()).expect("a pid");
        assert!(group.add(pid));
        assert!(group.members().contains(&pid));
        if group.freezes() {
            let long = Duration::from_secs(30);
            assert!(group.freeze(true, long) && group.frozen() == Some(true));
            assert!(group.freeze(false, long) && group.frozen() == Some(false));
            // The frozen are killed like others.
            assert!(group.freeze(true, long));
        }
        let waiter = std::thread::spawn(move || child.wait().expect("reaped"));
        assert!(group.kill(Duration::from_secs(30)));
        assert!(!waiter.join().expect("joined").success());
        assert!(group.remove(Duration::from_secs(30)));
        assert!(group.dirs.values().all(|dir| !dir.exists()));
    }
}
