//! A payload that is arriving, verified group by group, and what of it outlives its transfer and
//! the process.
//!
//! ```text
//! DIR/partial/<root>-<size>.data        as they will be held; the room is taken at once
//! DIR/partial/<root>-<size>.outboard
//! DIR/partial/<root>-<size>.groups      the marks: which groups are there
//!
//!           first group                    all are there
//!   taken ───────────────> marked at times ──────────────> held
//!     │                        │   ^
//!     │ given up: gone         v   │ received again: goes on
//!     '                     resting ──(room is wanted, or a week is over)──> gone
//! ```
//!
//! Marks are written every 4 MiB and when the transfer ends, so a process that is killed has lost
//! little: what it wrote before is the kernel's. A power cut may take more; so the marks say beside
//! what was there which of it had been synced, every 64 MiB, and in which boot they were written.
//! In that boot the first counts, in a later one the second. Marks that are torn, or of files that
//! are not there as they should be, are not used: then all is fetched again.
//!
//! Root and size together name what arrives, and it is received once at a time. A size that is a lie
//! verifies no group, so nothing rests of it. What is there can be passed on while the rest arrives.

use std::collections::btree_map::Entry;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use bao_tree::BaoTree;
use bao_tree::io::{Leaf, Parent};
use leasehold_proto::base::groups::{GROUP_BYTES, Groups, groups_of};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::clock;

use super::{
    Imported, Inner, Partial, Payload, PayloadError, PayloadStore, Reservation, Root, Unlink,
    io_error, lock, on_disk, sync_dir, tree,
};

/// After how many groups the marks are written: 4 MiB.
const MARK_EVERY: u64 = 16;
/// After how many groups files and marks are synced: 64 MiB. So the disk writes while more comes, and
/// little is left to the last sync.
const SYNC_EVERY: u64 = 256;
/// Bytes of a hash pair.
const PAIR: usize = 64;
/// How long what rests is kept at a start, since its last mark.
const REST_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// The first bytes of a file of marks; the last is their version.
const MAGIC: &[u8; 8] = b"LHMARKS1";
/// The most runs of groups in one list: a payload in more pieces than that is not marked further.
const MAX_RUNS: usize = 65_536;
/// Bytes of a file of marks at most.
const MAX_MARKS: u64 = 8 + 32 + 8 + 16 + 2 * (4 + 16 * MAX_RUNS as u64) + 4;

/// What arrives.
pub(super) type Name = (Root, u64);

/// A payload that is arriving. Its bytes must have been verified against its root before they are
/// given here, by as many threads as there are holders that send them.
#[derive(Debug)]
pub(crate) struct Receiving {
    root: Root,
    tree: BaoTree,
    data: File,
    outboard: File,
    data_path: PathBuf,
    outboard_path: PathBuf,
    here: Arc<Mutex<Groups>>,
    changed: watch::Sender<()>,
    /// None once it is kept.
    claim: Mutex<Option<Claim>>,
    /// Held while the files are synced, and whether that ever failed: the system says so once, and
    /// only to one who asks.
    failed_to_sync: Mutex<bool>,
}

/// What of a payload is there, seen as it becomes more.
#[derive(Debug)]
pub(crate) struct Part {
    here: Arc<Mutex<Groups>>,
    changed: watch::Receiver<()>,
}

/// The files of what arrives, and the right to go on with them.
#[derive(Debug)]
struct Claim {
    partial: Partial,
    marks: Marks,
}

/// The right to what arrives under a name, and its marks.
#[derive(Debug)]
struct Marks {
    store: Arc<Inner>,
    name: Name,
    file: Unlink,
    path: PathBuf,
    boot: [u8; 16],
    synced: Groups,
    unmarked: u64,
    unsynced: u64,
}

/// What rests in the store: bytes on disk, and how recently something came of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resting {
    pub(super) bytes: u64,
    pub(super) turn: u64,
}

impl PayloadStore {
    /// Takes room for a payload that will arrive verified, group by group; what came of it before
    /// is there already. Fails as [`PayloadError::Arriving`] while somebody else does.
    pub(crate) fn receive(&self, root: Root, size: u64) -> Result<Arc<Receiving>, PayloadError> {
        let name = (root, size);
        let mut marks = Marks::claim(&self.inner, name).ok_or(PayloadError::Arriving(root))?;
        let resumed = marks.resume(root, size);
        let resumed =
            resumed.inspect_err(|e| debug!(%root, error = %e, "nothing to go on from")).ok();
        let (partial, here) = match resumed {
            Some(resumed) => resumed,
            None => {
                let reservation = Reservation::new(&self.inner, size)?;
                let mut partial = Partial::named(reservation, &marks.path)?;
                if !self.inner.limits.discard {
                    partial.allocate(size)?;
                }
                (partial, Groups::new())
            }
        };
        let receiving = Arc::new(Receiving::new(root, size, here, Claim { partial, marks })?);
        lock(&self.inner.held).arriving.insert(name, Arc::downgrade(&receiving));
        self.inner.changed.send_replace(());
        Ok(receiving)
    }

    /// What of a payload is there that is arriving now; none when it is not.
    pub(crate) fn part(&self, root: Root, size: u64) -> Option<Part> {
        let receiving = self.inner.arriving(&(root, size))?;
        let changed = receiving.changed.subscribe();
        Some(Part { here: Arc::clone(&receiving.here), changed })
    }

    /// The size in bytes of a payload that is arriving and of which some is there: a size that is a
    /// lie verifies no group.
    pub(crate) fn arriving_size(&self, root: Root) -> Option<u64> {
        let held = lock(&self.inner.held);
        let sizes = held.arriving.range((root, 0)..=(root, u64::MAX));
        let known: Vec<_> = sizes.filter_map(|(_, of)| of.upgrade()).collect();
        drop(held);
        let some = known.iter().find(|receiving| !lock(&receiving.here).is_empty());
        some.map(|receiving| receiving.tree.size())
    }

    /// Opens a payload that is arriving, for reading `ranges` of it, in bytes, all of which must be
    /// there. None at all is all of it.
    pub(crate) fn open_part(
        &self,
        root: Root,
        size: u64,
        ranges: &[Range<u64>],
    ) -> Result<Payload, PayloadError> {
        let receiving = self.inner.arriving(&(root, size)).ok_or(PayloadError::NotHeld(root))?;
        let all = std::iter::once(0..size);
        let wanted: Vec<_> = if ranges.is_empty() { all.collect() } else { ranges.to_vec() };
        let here = lock(&receiving.here);
        let is_here = |range: &Range<u64>| {
            here.covers(range.start / GROUP_BYTES..groups_of(range.end.max(1)))
        };
        if !wanted.iter().all(is_here) {
            return Err(PayloadError::NotHeld(root));
        }
        drop(here);
        let clone =
            |file: &File, path: &Path| file.try_clone().map_err(io_error("duplicating", path));
        let data = clone(&receiving.data, &receiving.data_path)?;
        let outboard = clone(&receiving.outboard, &receiving.outboard_path)?;
        Ok(Payload { root, size, data, outboard })
    }

    /// Looks at what rests since an earlier run, and removes what cannot be gone on with.
    pub(super) fn take_up_resting(&self) -> Result<(), PayloadError> {
        let dir = self.inner.dir.join("partial");
        let mut found = Vec::new();
        let listed = fs::read_dir(&dir).map_err(io_error("listing", &dir))?;
        for entry in listed {
            let path = entry.map_err(io_error("listing", &dir))?.path();
            if let Some(name) =
                name_of(&path).filter(|_| path.extension() == Some("groups".as_ref()))
            {
                let since = fs::metadata(&path).and_then(|about| about.modified()).ok();
                found.push((since.unwrap_or(SystemTime::UNIX_EPOCH), name));
            }
        }
        found.sort_by_key(|(since, _)| *since);
        let young = |since: &SystemTime| since.elapsed().map_or(true, |age| age < REST_FOR);
        for (since, name) in found {
            let Some(mut marks) = Marks::claim(&self.inner, name) else { continue };
            // Dropped at once, it rests, or is removed.
            if let Ok((partial, here)) = marks.resume(name.0, name.1)
                && young(&since)
            {
                drop(Receiving::new(name.0, name.1, here, Claim { partial, marks }));
            }
        }
        let resting = lock(&self.inner.held).resting.clone();
        for entry in fs::read_dir(&dir).map_err(io_error("listing", &dir))? {
            let path = entry.map_err(io_error("listing", &dir))?.path();
            let name = name_of(&path).filter(|_| {
                let ending = path.extension().and_then(|ending| ending.to_str());
                matches!(ending, Some("groups" | "data" | "outboard"))
            });
            if name.is_none_or(|name| !resting.contains_key(&name)) {
                debug!(path = %path.display(), "removing what was still arriving");
                fs::remove_file(&path).map_err(io_error("removing", &path))?;
            }
        }
        Ok(())
    }
}

impl Inner {
    /// Who receives what has this name, if somebody does.
    fn arriving(&self, name: &Name) -> Option<Arc<Receiving>> {
        lock(&self.held).arriving.get(name)?.upgrade()
    }

    /// Where the files of what arrives under a name lie, without their ending.
    fn stem(&self, (root, size): &Name) -> PathBuf {
        self.dir.join("partial").join(format!("{root}-{size}"))
    }

    /// Removes the oldest of what rests. False when nothing does.
    pub(super) fn drop_resting(&self, resting: &mut super::AtRest) -> bool {
        let oldest = resting.iter().min_by_key(|(_, resting)| resting.turn).map(|(name, _)| *name);
        let Some(name) = oldest else { return false };
        resting.remove(&name);
        debug!(root = %name.0, "giving up what had come of a payload: its room is wanted");
        let stem = self.stem(&name);
        for ending in ["groups", "data", "outboard"] {
            drop(Unlink::new(stem.with_extension(ending)));
        }
        true
    }
}

impl Receiving {
    fn new(root: Root, size: u64, here: Groups, claim: Claim) -> Result<Self, PayloadError> {
        let Partial { data, outboard, data_path, outboard_path, .. } = &claim.partial;
        let clone = |file: &File, path: &Path| {
            let cloned = if claim.marks.store.limits.discard {
                OpenOptions::new().write(true).open("/dev/null")
            } else {
                file.try_clone()
            };
            cloned.map_err(io_error("duplicating", path))
        };
        Ok(Self {
            root,
            tree: tree(size),
            data: clone(data, data_path)?,
            outboard: clone(outboard, outboard_path)?,
            data_path: data_path.clone(),
            outboard_path: outboard_path.clone(),
            here: Arc::new(Mutex::new(here)),
            changed: watch::channel(()).0,
            claim: Mutex::new(Some(claim)),
            failed_to_sync: Mutex::new(false),
        })
    }

    pub(crate) fn root(&self) -> Root {
        self.root
    }

    pub(crate) fn tree(&self) -> BaoTree {
        self.tree
    }

    /// Which groups are there.
    pub(crate) fn here(&self) -> Groups {
        lock(&self.here).clone()
    }

    /// Writes a verified group. The hash pairs above it must have been written.
    pub(crate) fn group(&self, leaf: &Leaf) -> Result<(), PayloadError> {
        let written = self.data.write_all_at(&leaf.data, leaf.offset);
        written.map_err(io_error("writing", &self.data_path))?;
        let group = leaf.offset / GROUP_BYTES;
        let mut claim = lock(&self.claim);
        let new = lock(&self.here).insert(group..group + 1);
        if let Some(Claim { marks, .. }) = &mut *claim
            && marks.came(new)
        {
            marks.mark(&self.here());
        }
        drop(claim);
        self.changed.send_replace(());
        Ok(())
    }

    /// Writes a verified hash pair.
    pub(crate) fn pair(&self, parent: &Parent) -> Result<(), PayloadError> {
        let Some(at) = self.tree.pre_order_offset(parent.node) else { return Ok(()) };
        let mut pair = [0; PAIR];
        let (left, right) = pair.split_at_mut(PAIR / 2);
        left.copy_from_slice(parent.pair.0.as_bytes());
        right.copy_from_slice(parent.pair.1.as_bytes());
        let written = self.outboard.write_all_at(&pair, at * PAIR as u64);
        written.map_err(io_error("writing", &self.outboard_path))
    }

    /// Whether so much came since the last [`Self::sync`] that it is time for one.
    pub(crate) fn wants_sync(&self) -> bool {
        let claim = lock(&self.claim);
        claim.as_ref().is_some_and(|Claim { marks, .. }| {
            marks.unsynced >= SYNC_EVERY && !marks.store.limits.discard
        })
    }

    /// Makes durable what is there, beside whoever writes more of it. When that fails nothing of it
    /// is believed any more: the next transfer begins anew.
    pub(crate) fn sync(&self) -> Result<(), PayloadError> {
        let before = self.here();
        if let Some(Claim { marks, .. }) = &mut *lock(&self.claim) {
            marks.unsynced = 0;
        }
        let sync = |file: &File, path: &Path| file.sync_data().map_err(io_error("syncing", path));
        let mut failed = lock(&self.failed_to_sync);
        let synced = sync(&self.data, &self.data_path);
        let synced = synced.and_then(|()| sync(&self.outboard, &self.outboard_path));
        *failed |= synced.is_err();
        drop(failed);
        let mut claim = lock(&self.claim);
        let Some(Claim { marks, .. }) = &mut *claim else { return synced };
        if synced.is_err() {
            *lock(&self.here) = Groups::new();
            return synced;
        }
        marks.synced = before;
        let here = self.here();
        if let Err(error) = marks.write(&here, true) {
            debug!(root = %self.root, %error, "what came of a payload is not marked");
        }
        Ok(())
    }

    /// Makes the payload durable and held, if all groups came.
    pub(crate) fn keep(&self) -> Result<Imported, PayloadError> {
        let size = self.tree.size();
        let here = lock(&self.here).len();
        if here != groups_of(size) {
            let actual = here.saturating_mul(GROUP_BYTES).min(size);
            return Err(PayloadError::WrongSize { expected: size, actual });
        }
        let failed = lock(&self.failed_to_sync);
        if *failed {
            let error = io::Error::other("an earlier sync of it failed");
            return Err(io_error("keeping", &self.data_path)(error));
        }
        let claim = lock(&self.claim).take().ok_or(PayloadError::NotHeld(self.root))?;
        let Claim { partial, marks } = claim;
        if marks.store.limits.discard {
            return Ok(Imported { root: self.root, size, already_held: false });
        }
        let kept = partial.keep(self.root, size);
        // It is found as arriving until it is found as held.
        drop(marks);
        kept
    }
}

impl Drop for Receiving {
    /// What came rests, if something came and the disk is not wanted for other things.
    fn drop(&mut self) {
        let Some(mut claim) = lock(&self.claim).take() else { return };
        let here = self.here();
        let Claim { partial, marks } = &mut claim;
        if here.is_empty() || !marks.store.has_room_to_rest() {
            return;
        }
        // What nothing was added to is marked already.
        if marks.unmarked > 0
            && let Err(e) = marks.write(&here, false)
        {
            debug!(root = %self.root, error = %e, "what came of a payload is not kept");
            return;
        }
        partial.leave();
        marks.leave(on_disk(self.tree.size()));
    }
}

impl Part {
    /// What is there and not in `told`.
    pub(crate) fn news(&mut self, told: &Groups) -> Groups {
        self.changed.mark_unchanged();
        let here = lock(&self.here);
        here.runs().flat_map(|run| told.gaps(run)).collect()
    }

    /// Waits until there is more. False when no more comes.
    pub(crate) async fn more(&mut self) -> bool {
        self.changed.changed().await.is_ok()
    }
}

impl Marks {
    /// Takes the right to what arrives under `name`, unless somebody has it.
    fn claim(store: &Arc<Inner>, name: Name) -> Option<Self> {
        match lock(&store.held).arriving.entry(name) {
            Entry::Occupied(_) => return None,
            // Until there is something to be seen of it.
            Entry::Vacant(free) => free.insert(Weak::new()),
        };
        let path = store.stem(&name).with_extension("groups");
        Some(Self {
            store: store.clone(),
            name,
            file: Unlink::new(path.clone()),
            path,
            boot: clock::boot_id().0,
            synced: Groups::new(),
            unmarked: 0,
            unsynced: 0,
        })
    }

    /// Opens what came under this name before.
    fn resume(&mut self, root: Root, size: u64) -> Result<(Partial, Groups), PayloadError> {
        let read = read_marks(&self.path).map_err(io_error("reading", &self.path))?;
        let marked = decode(&read, &self.name, &self.boot).ok_or(PayloadError::NotHeld(root))?;
        let reservation = Reservation::of_resting(&self.store, size, &self.name);
        let partial = Partial::resume(reservation, &self.path)?;
        let Marked { synced, here } = marked;
        self.synced = synced;
        Ok((partial, here))
    }

    /// So many groups came. Whether it is time to mark them.
    fn came(&mut self, new: u64) -> bool {
        self.unmarked += new;
        self.unsynced += new;
        self.unmarked >= MARK_EVERY
    }

    /// Marks all that is there. Marks that cannot be written, on a disk that is full, say, are not
    /// worth the transfer.
    fn mark(&mut self, here: &Groups) {
        self.unmarked = 0;
        if let Err(error) = self.write(here, false) {
            debug!(root = %self.name.0, %error, "what came of a payload is not marked");
            self.unmarked = 1;
        }
    }

    fn write(&self, here: &Groups, durably: bool) -> Result<(), PayloadError> {
        if here.runs().len() > MAX_RUNS {
            return Ok(());
        }
        let bytes = encode(&self.name, &self.boot, &self.synced, here);
        let beside = self.path.with_extension("groups-new");
        let mut file = OpenOptions::new();
        let file = file.write(true).create(true).truncate(true).mode(0o600).open(&beside);
        let mut file = file.map_err(io_error("creating", &beside))?;
        file.write_all(&bytes).map_err(io_error("writing", &beside))?;
        if durably {
            file.sync_data().map_err(io_error("syncing", &beside))?;
        }
        fs::rename(&beside, &self.path).map_err(io_error("renaming to", &self.path))?;
        if durably { self.path.parent().map_or(Ok(()), sync_dir) } else { Ok(()) }
    }

    /// The files stay.
    fn leave(&mut self, bytes: u64) {
        self.file.leave();
        let mut held = lock(&self.store.held);
        let turn = held.next_turn();
        held.resting.insert(self.name, Resting { bytes, turn });
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        lock(&self.store.held).arriving.remove(&self.name);
        self.store.changed.send_replace(());
    }
}

/// The name that a file in the directory of what arrives has, if it has one.
fn name_of(path: &Path) -> Option<Name> {
    let (root, size) = path.file_stem()?.to_str()?.split_once('-')?;
    Some((root.parse().ok()?, size.parse().ok()?))
}

fn read_marks(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    if len > MAX_MARKS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too long for marks"));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn encode((root, size): &Name, boot: &[u8; 16], synced: &Groups, here: &Groups) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(root.as_bytes());
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(boot);
    for groups in [synced, here] {
        let count = u32::try_from(groups.runs().len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&count.to_le_bytes());
        for run in groups.runs() {
            bytes.extend_from_slice(&run.start.to_le_bytes());
            bytes.extend_from_slice(&run.end.to_le_bytes());
        }
    }
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// What marks say.
#[derive(Debug, PartialEq, Eq)]
struct Marked {
    synced: Groups,
    /// What can be gone on with.
    here: Groups,
}

/// What these marks say in this boot; none when they are not whole, of something else, or say what
/// cannot be, and when nothing can be gone on with.
fn decode(bytes: &[u8], (root, size): &Name, boot: &[u8; 16]) -> Option<Marked> {
    let (bytes, sum) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(bytes) != u32::from_le_bytes(*sum) {
        return None;
    }
    let rest = bytes.strip_prefix(MAGIC)?.strip_prefix(root.as_bytes())?;
    let rest = rest.strip_prefix(&size.to_le_bytes())?;
    let (of, mut rest) = rest.split_first_chunk::<16>()?;
    let mut lists = [Groups::new(), Groups::new()];
    for list in &mut lists {
        let (count, mut runs) = rest.split_first_chunk::<4>()?;
        for _ in 0..u32::from_le_bytes(*count) {
            let (start, more) = runs.split_first_chunk::<8>()?;
            let (end, more) = more.split_first_chunk::<8>()?;
            let run = u64::from_le_bytes(*start)..u64::from_le_bytes(*end);
            if run.start >= run.end || run.end > groups_of(*size) {
                return None;
            }
            list.insert(run);
            runs = more;
        }
        rest = runs;
    }
    let [synced, here] = lists;
    let same_boot = of == boot && *boot != [0; 16];
    let here = if same_boot { here } else { synced.clone() };
    (rest.is_empty() && !here.is_empty()).then_some(Marked { synced, here })
}

/// For fuzzing: reads marks that are what `content` says between their first bytes and their sum. What
/// is read is of the payload that they name, and written it reads again.
pub(crate) fn marks_roundtrip(content: &[u8]) {
    let Some((root, rest)) = content.split_first_chunk::<32>() else { return };
    let Some((size, rest)) = rest.split_first_chunk::<8>() else { return };
    let Some(boot) = rest.first_chunk::<16>() else { return };
    let name = (Root::from_bytes(*root), u64::from_le_bytes(*size));
    let mut bytes = [MAGIC.as_slice(), content].concat();
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    if let Some(Marked { synced, here }) = decode(&bytes, &name, boot) {
        assert!(!here.is_empty() && here.runs().all(|run| run.end <= groups_of(name.1)));
        let again = encode(&name, boot, &synced, &here);
        assert_eq!(decode(&again, &name, boot).map(|marked| marked.synced), Some(synced));
    }
}

impl Inner {
    /// Whether what came may lie there: nothing does on a disk that is too full for new work.
    fn has_room_to_rest(&self) -> bool {
        rustix::fs::statvfs(&self.dir)
            .is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= self.limits.keep_free)
    }
}

/// A failure to remove is told, not returned: nobody waits for it.
impl Unlink {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(Some(path))
    }

    /// The file stays.
    pub(super) fn leave(&mut self) {
        self.0 = None;
    }
}

impl Drop for Unlink {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                warn!(path = %path.display(), error = %e, "cannot remove a partial file");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::payload::Limits;

    const GROUPS: u64 = 40;
    const SIZE: u64 = GROUPS * GROUP_BYTES;

    /// What can be gone on with by these marks.
    fn known(bytes: &[u8], name: &Name, boot: &[u8; 16]) -> Option<Groups> {
        decode(bytes, name, boot).map(|marked| marked.here)
    }

    fn limits() -> Limits {
        Limits { keep_free: 0, ..Limits::default() }
    }

    fn store() -> (tempfile::TempDir, PayloadStore) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = PayloadStore::open_dir(dir.path(), limits()).expect("opens");
        (dir, store)
    }

    fn again(store: &PayloadStore) -> PayloadStore {
        PayloadStore::open_dir(&store.inner.dir, limits()).expect("opens again")
    }

    fn root(n: u8) -> Root {
        Root::from_bytes([n; 32])
    }

    /// Groups come, of which nobody looks at the bytes here.
    fn come(receiving: &Receiving, groups: Range<u64>) {
        for group in groups {
            let data = Bytes::from(vec![7; GROUP_BYTES as usize]);
            let leaf = Leaf { offset: group * GROUP_BYTES, data };
            receiving.group(&leaf).expect("is written");
        }
    }

    fn files(store: &PayloadStore) -> usize {
        fs::read_dir(store.inner.dir.join("partial")).expect("lists").count()
    }

    #[test]
    fn what_came_rests_and_is_gone_on_with() {
        let (_dir, store) = store();
        let receiving = store.receive(root(1), SIZE).expect("room");
        assert!(receiving.here().is_empty());
        come(&receiving, 0..3);
        come(&receiving, 5..6);
        drop(receiving);
        let here: Groups = [0..3, 5..6].into_iter().collect();
        for store in [store.clone(), again(&store)] {
            assert_eq!((files(&store), store.stats().reserved), (3, 0));
            let receiving = store.receive(root(1), SIZE).expect("room");
            assert_eq!(receiving.here(), here);
            // Another size of the same root is something else; the same is received once.
            let other = store.receive(root(1), SIZE - 1).expect("room");
            assert!(other.here().is_empty());
            let again = store.receive(root(1), SIZE);
            assert!(matches!(again, Err(PayloadError::Arriving(r)) if r == root(1)), "{again:?}");
        }
        // One of which nothing came leaves nothing.
        drop(store.receive(root(2), SIZE).expect("room"));
        assert_eq!(files(&store), 3);
        assert!(matches!(
            store.receive(root(1), SIZE).expect("room").keep(),
            Err(PayloadError::WrongSize { .. })
        ));
        let receiving = store.receive(root(1), SIZE).expect("room");
        come(&receiving, 0..GROUPS);
        assert_eq!(receiving.here(), Groups::first(GROUPS));
        receiving.keep().expect("all is there");
        assert_eq!((files(&store), store.has(root(1))), (0, Some(SIZE)));
    }

    #[tokio::test]
    #[allow(clippy::single_range_in_vec_init, reason = "one range is what is meant")]
    async fn what_is_there_is_passed_on_while_the_rest_arrives() {
        let (_dir, store) = store();
        let receiving = store.receive(root(1), SIZE).expect("room");
        assert!(store.part(root(1), SIZE + 1).is_none() && store.part(root(2), SIZE).is_none());
        let mut part = store.part(root(1), SIZE).expect("it arrives");
        let mut told = Groups::new();
        assert!(part.news(&told).is_empty());
        come(&receiving, 0..3);
        come(&receiving, 9..10);
        assert!(part.more().await);
        let news = part.news(&told);
        assert_eq!(news, [0..3, 9..10].into_iter().collect());
        told.extend(news.runs());
        come(&receiving, 2..4);
        assert!(part.more().await);
        assert_eq!(part.news(&told), [3..4].into_iter().collect());

        let bytes = |run: Range<u64>| run.start * GROUP_BYTES..run.end * GROUP_BYTES;
        let open = |runs: &[Range<u64>]| {
            let ranges: Vec<_> = runs.iter().cloned().map(bytes).collect();
            store.open_part(root(1), SIZE, &ranges)
        };
        let opened = open(&[0..4, 9..10]).expect("all of that is there");
        for lacking in [vec![], vec![3..5], vec![0..1, 8..9], vec![9..11]] {
            let refused = open(&lacking);
            assert!(matches!(refused, Err(PayloadError::NotHeld(_))), "{lacking:?}: {refused:?}");
        }
        // What was opened stays readable, whatever becomes of the transfer.
        drop(receiving);
        assert!(!part.more().await);
        assert!(store.part(root(1), SIZE).is_none());
        let read = opened.read_at(9 * GROUP_BYTES, 5).expect("reads");
        assert_eq!(read, [7; 5][..]);
    }

    #[test]
    fn what_is_synced_outlives_the_boot() {
        let (_dir, store) = store();
        let receiving = store.receive(root(1), SIZE).expect("room");
        come(&receiving, 0..5);
        receiving.sync().expect("syncs");
        come(&receiving, 5..9);
        drop(receiving);
        let marks = store.inner.stem(&(root(1), SIZE)).with_extension("groups");
        let read = read_marks(&marks).expect("reads");
        let name = (root(1), SIZE);
        assert_eq!(known(&read, &name, &clock::boot_id().0), Some(Groups::first(9)));
        assert_eq!(known(&read, &name, &[1; 16]), Some(Groups::first(5)));
        // Also when it is gone on with, by a start or a transfer that brings nothing or a little.
        let since = fs::metadata(&marks).and_then(|about| about.modified()).expect("dated");
        let store = again(&store);
        drop(store.receive(root(1), SIZE).expect("room"));
        let after = fs::metadata(&marks).and_then(|about| about.modified()).expect("dated");
        assert_eq!(after, since, "nothing came, so it has rested since");
        come(&store.receive(root(1), SIZE).expect("room"), 9..11);
        let read = read_marks(&marks).expect("reads");
        assert_eq!(known(&read, &name, &clock::boot_id().0), Some(Groups::first(11)));
        assert_eq!(known(&read, &name, &[1; 16]), Some(Groups::first(5)));
    }

    #[test]
    fn a_process_that_is_killed_has_lost_four_mebibytes_at_most() {
        let (_dir, store) = store();
        let receiving = store.receive(root(1), SIZE).expect("room");
        for came in 1..=GROUPS {
            come(&receiving, came - 1..came);
            let marks = store.inner.stem(&(root(1), SIZE)).with_extension("groups");
            let here = read_marks(&marks).ok();
            let here = here.and_then(|read| known(&read, &(root(1), SIZE), &clock::boot_id().0));
            let marked = here.map_or(0, |here| here.len());
            assert!(marked + MARK_EVERY > came, "{marked} of {came}");
        }
    }

    #[test]
    fn marks_count_in_their_boot_and_what_was_synced_after_it() {
        let name = (root(1), SIZE);
        let read = encode(&name, &[1; 16], &Groups::first(3), &Groups::first(9));
        assert_eq!(known(&read, &name, &[1; 16]), Some(Groups::first(9)));
        assert_eq!(known(&read, &name, &[2; 16]), Some(Groups::first(3)));
        assert_eq!(known(&read, &(root(2), SIZE), &[1; 16]), None);
        assert_eq!(known(&read, &(root(1), SIZE + 1), &[1; 16]), None);
        let nothing_synced = encode(&name, &[1; 16], &Groups::new(), &Groups::first(9));
        assert_eq!(known(&nothing_synced, &name, &[2; 16]), None);
        // A boot that cannot be told is none that could be the same.
        let unknown = encode(&name, &[0; 16], &Groups::first(3), &Groups::first(9));
        assert_eq!(known(&unknown, &name, &[0; 16]), Some(Groups::first(3)));
        let beyond = encode(&name, &[1; 16], &Groups::first(3), &Groups::first(GROUPS + 1));
        assert_eq!(known(&beyond, &name, &[1; 16]), None);
        for cut in 0..read.len() {
            assert_eq!(known(&read[..cut], &name, &[1; 16]), None, "cut at {cut}");
            let mut flipped = read.clone();
            flipped[cut] ^= 1;
            assert_eq!(known(&flipped, &name, &[1; 16]), None, "flipped at {cut}");
        }
    }

    #[test]
    fn files_that_are_not_as_they_should_be_are_not_gone_on_with() {
        type Spoil = fn(&Path);
        let spoils: [(&str, Spoil); 4] = [
            ("groups", |path| fs::write(path, b"no marks").expect("writes")),
            ("groups", |path| fs::remove_file(path).expect("removes")),
            ("data", |path| {
                File::options().write(true).open(path).expect("opens").set_len(9).expect("cuts")
            }),
            ("outboard", |path| fs::remove_file(path).expect("removes")),
        ];
        for (ending, spoil) in spoils {
            let (_dir, store) = store();
            let receiving = store.receive(root(1), SIZE).expect("room");
            come(&receiving, 0..3);
            drop(receiving);
            spoil(&store.inner.stem(&(root(1), SIZE)).with_extension(ending));
            let reopened = again(&store);
            assert_eq!(files(&reopened), 0, "{ending}");
            for store in [store, reopened] {
                let receiving = store.receive(root(1), SIZE).expect("room");
                assert!(receiving.here().is_empty(), "{ending}");
            }
        }
    }

    #[test]
    fn what_rests_makes_room() {
        let dir = tempfile::tempdir().expect("a directory");
        let each = on_disk(SIZE);
        let limits = Limits { quota: 3 * each, ..limits() };
        let store = PayloadStore::open_dir(dir.path(), limits).expect("opens");
        for n in 1..=3 {
            come(&store.receive(root(n), SIZE).expect("room"), 0..1);
        }
        assert_eq!(files(&store), 9);
        // The one that came longest ago goes; the one that goes on stays.
        let goes_on = store.receive(root(1), SIZE).expect("its own room");
        store.check_room(&[2 * SIZE - GROUP_BYTES]).expect("there would be room");
        assert!(matches!(store.check_room(&[3 * SIZE]), Err(PayloadError::NoSpace { .. })));
        // Nothing goes for what has no room even so.
        let refused = store.take_room(3 * SIZE, None);
        assert!(matches!(refused, Err(PayloadError::NoSpace { .. })), "{refused:?}");
        assert_eq!(files(&store), 9);
        let fourth = store.receive(root(4), SIZE).expect("room");
        assert_eq!(files(&store), 3 + 3 + 2);
        assert_eq!(store.receive(root(3), SIZE).expect("room").here(), Groups::first(1));
        let fifth = store.receive(root(5), SIZE).expect("room");
        assert!(matches!(store.receive(root(6), SIZE), Err(PayloadError::NoSpace { .. })));
        drop((goes_on, fourth, fifth));
        assert_eq!(store.stats().reserved, 0);
    }

    proptest! {
        #[test]
        fn marks_come_back_as_they_were(
            synced in proptest::collection::vec((0..GROUPS, 1..9u64), 0..9),
            here in proptest::collection::vec((0..GROUPS, 1..9u64), 1..9),
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let groups = |runs: Vec<(u64, u64)>| -> Groups {
                runs.into_iter().map(|(start, len)| start..(start + len).min(GROUPS)).collect()
            };
            let (synced, here, name) = (groups(synced), groups(here), (root(1), SIZE));
            let read = encode(&name, &[1; 16], &synced, &here);
            prop_assert_eq!(known(&read, &name, &[1; 16]), Some(here));
            let later = (!synced.is_empty()).then_some(synced);
            prop_assert_eq!(known(&read, &name, &[2; 16]), later);
            prop_assert_eq!(known(&bytes, &name, &[1; 16]), None);
        }
    }
}
