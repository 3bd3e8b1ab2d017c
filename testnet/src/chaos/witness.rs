//! Sees from outside which jobs run: looks through the processes of this host for runners below
//! the fleet's directory, and asks neither nodes nor wardens.
//!
//! A time that is noted was read before the process was looked for, and the process was still
//! there: so a job is there at least as long as the witness says, never shorter.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use leasehold_node::clock;
use leasehold_proto::LeaseId;

use crate::fleet::NODE;
use crate::judge::{Outside, Sight};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
struct Seen {
    outside: Vec<Outside>,
    /// Jobs that were there at the last look, with when they were seen last.
    there: BTreeMap<(usize, LeaseId), u64>,
}

/// A witness, while it looks.
#[derive(Debug)]
pub(super) struct Witness {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    looks: Option<JoinHandle<()>>,
}

fn hold(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Witness {
    /// Begins to look for jobs of the nodes that live in these directories.
    pub(super) fn start(nodes: Vec<PathBuf>) -> Self {
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let (told, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let looks = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                look(&nodes, &told);
                std::thread::sleep(LOOK);
            }
        });
        Self { seen, stop, looks: Some(looks) }
    }

    /// Jobs that were there at the last look.
    pub(super) fn there(&self) -> Vec<(usize, LeaseId)> {
        hold(&self.seen).there.keys().copied().collect()
    }

    /// Looks no more, and tells what was seen.
    pub(super) fn tell(mut self) -> Vec<Outside> {
        self.stop();
        let mut seen = hold(&self.seen);
        std::mem::take(&mut seen.outside)
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(looks) = self.looks.take() {
            let _ = looks.join();
        }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whose job the process is that has this command line.
fn job(line: &[u8], nodes: &[PathBuf]) -> Option<(usize, LeaseId)> {
    let mut args = line.split(|byte| *byte == 0).skip(1);
    if args.next()? != NODE.as_bytes() || args.next()? != b"__runner" {
        return None;
    }
    let dir = Path::new(OsStr::from_bytes(args.next()?));
    let lease = dir.file_name()?.to_str()?.parse().ok()?;
    let node = nodes.iter().position(|node| dir.starts_with(node))?;
    Some((node, lease))
}

fn look(nodes: &[PathBuf], seen: &Mutex<Seen>) {
    let mut now: BTreeMap<(usize, LeaseId), u64> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !name.as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let at = clock::boot_us();
        // One that has ended, but was not waited for yet, has no command line any more.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        if let Some(job) = job(&line, nodes) {
            now.insert(job, at);
        }
    }
    let mut seen = hold(seen);
    let seen = &mut *seen;
    let there = std::mem::take(&mut seen.there);
    for ((host, lease), at) in &there {
        if !now.contains_key(&(*host, *lease)) {
            let (at, host, saw) = (*at, *host, Sight::JobGone(*lease));
            seen.outside.push(Outside { at, host, saw });
        }
    }
    for ((host, lease), at) in &now {
        if !there.contains_key(&(*host, *lease)) {
            let (at, host, saw) = (*at, *host, Sight::JobThere(*lease));
            seen.outside.push(Outside { at, host, saw });
        }
    }
    seen.there = now;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_runners_of_these_nodes_are_jobs() {
        let nodes = [PathBuf::from("/t/fleet/a"), PathBuf::from("/t/fleet/b")];
        let id = "11".repeat(32);
        let line = |text: String| text.replace(' ', "\0").into_bytes();
        let of = |text: String| job(&line(text), &nodes);
        let lease: LeaseId = id.parse().expect("an id");
        assert_eq!(of(format!("testnet node __runner /t/fleet/b/jobs/{id}")), Some((1, lease)));
        assert_eq!(of(format!("testnet node __warden /t/fleet/b/jobs/{id}")), None);
        assert_eq!(of(format!("testnet node __runner /t/fleet/c/jobs/{id}")), None);
        assert_eq!(of("testnet node __runner /t/fleet/a/jobs/x".into()), None);
        assert_eq!(of(String::new()), None);
    }
}
