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
//! what was there which of it had been synced, every 256 MiB, and in which boot they were written.
//! In that boot the first counts, in a later one the second. Marks that are torn, or of files that
//! are not there as they should be, are not used: then all is fetched again.
//!
//! Root and size together name what arrives. Of two transfers of the same at a time the second one
//! leaves nothing behind, unless it is through first. A size that is a lie verifies no group, so
//! nothing rests of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bao_tree::BaoTree;
use bao_tree::io::outboard::PreOrderOutboard;
use bao_tree::io::{Leaf, Parent, sync};
use leasehold_proto::base::groups::{GROUP_BYTES, Groups, groups_of};
use tracing::{debug, warn};

use crate::clock;

use super::{
    Imported, Inner, Partial, PayloadError, PayloadStore, Reservation, Root, Unlink, io_error,
    lock, on_disk, sync_dir, tree,
};

/// After how many groups the marks are written: 4 MiB.
const MARK_EVERY: u64 = 16;
/// After how many groups files and marks are synced: 256 MiB.
const SYNC_EVERY: u64 = 1024;
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
/// given here.
#[derive(Debug)]
pub(crate) struct Receiving {
    /// None once it is kept.
    partial: Option<Partial>,
    root: Root,
    tree: BaoTree,
    outboard: PreOrderOutboard<File>,
    here: Groups,
    /// None where another transfer of the same has them.
    marks: Option<Marks>,
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
    /// is there already.
    pub(crate) fn receive(&self, root: Root, size: u64) -> Result<Receiving, PayloadError> {
        let marks = Marks::claim(&self.inner, (root, size));
        let resumed = marks.as_ref().and_then(|marks| {
            let resumed = marks.resume(root, size);
            resumed.inspect_err(|e| debug!(%root, error = %e, "nothing to go on from")).ok()
        });
        let (partial, outboard, here) = match resumed {
            Some(resumed) => resumed,
            None => {
                let mut partial = match &marks {
                    Some(marks) => Partial::named(&self.inner, size, &marks.path)?,
                    None => Partial::new(&self.inner, size)?,
                };
                partial.allocate(size)?;
                let outboard = partial.outboard_of(root.hash(), size)?;
                (partial, outboard, Groups::new())
            }
        };
        let partial = Some(partial);
        Ok(Receiving { partial, root, tree: tree(size), outboard, here, marks })
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
            let Some(marks) = Marks::claim(&self.inner, name) else { continue };
            // Dropped at once, it rests, or is removed.
            match marks.resume(name.0, name.1) {
                Ok((partial, outboard, here)) if young(&since) => drop(Receiving {
                    partial: Some(partial),
                    root: name.0,
                    tree: tree(name.1),
                    outboard,
                    here,
                    marks: Some(marks),
                }),
                _ => {}
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
    pub(crate) fn root(&self) -> Root {
        self.root
    }

    pub(crate) fn tree(&self) -> BaoTree {
        self.tree
    }

    /// Which groups are there.
    pub(crate) fn here(&self) -> &Groups {
        &self.here
    }

    /// How many bytes are there.
    pub(crate) fn bytes(&self) -> u64 {
        let size = self.tree.size();
        let missing: u64 = self.missing().iter().map(|range| range.end - range.start).sum();
        size - missing
    }

    /// The bytes that are missing, in runs of whole groups, ascending.
    pub(crate) fn missing(&self) -> Vec<Range<u64>> {
        let size = self.tree.size();
        let bytes = |gap: Range<u64>| gap.start * GROUP_BYTES..(gap.end * GROUP_BYTES).min(size);
        self.here.gaps(0..groups_of(size)).map(bytes).collect()
    }

    /// Writes a verified group.
    pub(crate) fn group(&mut self, leaf: &Leaf) -> Result<(), PayloadError> {
        let partial = self.partial()?;
        let written = partial.data.write_all_at(&leaf.data, leaf.offset);
        written.map_err(io_error("writing", &partial.data_path))?;
        let group = leaf.offset / GROUP_BYTES;
        let new = self.here.insert(group..group + 1);
        if let (Some(marks), Some(partial)) = (&mut self.marks, &self.partial) {
            marks.came(new, &self.here, partial)?;
        }
        Ok(())
    }

    /// Writes a verified hash pair.
    pub(crate) fn pair(&mut self, parent: &Parent) -> Result<(), PayloadError> {
        let written = sync::OutboardMut::save(&mut self.outboard, parent.node, &parent.pair);
        written.map_err(io_error("writing", &self.partial()?.outboard_path))
    }

    /// Makes the payload durable and held, if all groups came.
    pub(crate) fn keep(mut self) -> Result<Imported, PayloadError> {
        let size = self.tree.size();
        if self.here.len() != groups_of(size) {
            let actual = self.here.len().saturating_mul(GROUP_BYTES).min(size);
            return Err(PayloadError::WrongSize { expected: size, actual });
        }
        match self.partial.take() {
            Some(partial) => partial.keep(self.root, size),
            None => Err(PayloadError::NotHeld(self.root)),
        }
    }

    fn partial(&self) -> Result<&Partial, PayloadError> {
        self.partial.as_ref().ok_or(PayloadError::NotHeld(self.root))
    }
}

impl Drop for Receiving {
    /// What came rests, if something came and the disk is not wanted for other things.
    fn drop(&mut self) {
        let (Some(partial), Some(marks)) = (&mut self.partial, &mut self.marks) else { return };
        if self.here.is_empty() || !marks.store.has_room_to_rest() {
            return;
        }
        if let Err(e) = marks.write(&self.here, false) {
            debug!(root = %self.root, error = %e, "what came of a payload is not kept");
            return;
        }
        partial.leave();
        marks.leave(on_disk(self.tree.size()));
    }
}

impl Marks {
    /// Takes the right to what arrives under `name`, unless somebody has it.
    fn claim(store: &Arc<Inner>, name: Name) -> Option<Self> {
        if !lock(&store.held).arriving.insert(name) {
            return None;
        }
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
    fn resume(
        &self,
        root: Root,
        size: u64,
    ) -> Result<(Partial, PreOrderOutboard<File>, Groups), PayloadError> {
        let read = read_marks(&self.path).map_err(io_error("reading", &self.path))?;
        let marked = decode(&read, &self.name, &self.boot).ok_or(PayloadError::NotHeld(root))?;
        let reservation = Reservation::of_resting(&self.store, size, &self.name);
        let partial = Partial::resume(reservation, &self.path)?;
        let outboard = partial.outboard_of(root.hash(), size)?;
        Ok((partial, outboard, marked))
    }

    /// So many groups came, which makes it all those in `here`. Marks that cannot be written, on a
    /// disk that is full, say, are not worth the transfer.
    fn came(&mut self, new: u64, here: &Groups, partial: &Partial) -> Result<(), PayloadError> {
        self.unmarked += new;
        self.unsynced += new;
        let durably = self.unsynced >= SYNC_EVERY;
        if durably {
            let sync =
                |file: &File, path: &Path| file.sync_data().map_err(io_error("syncing", path));
            sync(&partial.data, &partial.data_path)?;
            sync(&partial.outboard, &partial.outboard_path)?;
            self.synced = here.clone();
            self.unsynced = 0;
        }
        if durably || self.unmarked >= MARK_EVERY {
            self.unmarked = 0;
            if let Err(error) = self.write(here, durably) {
                debug!(root = %self.name.0, %error, "what came of a payload is not marked");
            }
        }
        Ok(())
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
        held.turn += 1;
        let turn = held.turn;
        held.resting.insert(self.name, Resting { bytes, turn });
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        lock(&self.store.held).arriving.remove(&self.name);
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

/// What can be gone on with by these marks in this boot; none when they are not whole, of something
/// else, or say what cannot be.
fn decode(bytes: &[u8], (root, size): &Name, boot: &[u8; 16]) -> Option<Groups> {
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
    let known = if same_boot { here } else { synced };
    (rest.is_empty() && !known.is_empty()).then_some(known)
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
    fn come(receiving: &mut Receiving, groups: Range<u64>) {
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
        let mut receiving = store.receive(root(1), SIZE).expect("room");
        assert_eq!(receiving.bytes(), 0);
        assert!(receiving.missing().into_iter().eq(std::iter::once(0..SIZE)));
        come(&mut receiving, 0..3);
        come(&mut receiving, 5..6);
        drop(receiving);
        let here: Groups = [0..3, 5..6].into_iter().collect();
        for store in [store.clone(), again(&store)] {
            assert_eq!((files(&store), store.stats().reserved), (3, 0));
            let receiving = store.receive(root(1), SIZE).expect("room");
            assert_eq!(receiving.here(), &here);
            assert_eq!(receiving.bytes(), 4 * GROUP_BYTES);
            let after = 3 * GROUP_BYTES..5 * GROUP_BYTES;
            assert_eq!(receiving.missing(), [after, 6 * GROUP_BYTES..SIZE]);
            // Another size of the same root is something else, and so is a second transfer.
            for size in [SIZE, SIZE - 1] {
                let other = store.receive(root(1), size).expect("room");
                assert!(other.here().is_empty());
            }
        }
        // One of which nothing came leaves nothing.
        drop(store.receive(root(2), SIZE).expect("room"));
        assert_eq!(files(&store), 3);
        assert!(matches!(
            store.receive(root(1), SIZE).expect("room").keep(),
            Err(PayloadError::WrongSize { .. })
        ));
        let mut receiving = store.receive(root(1), SIZE).expect("room");
        come(&mut receiving, 0..GROUPS);
        assert!(receiving.missing().is_empty());
        receiving.keep().expect("all is there");
        assert_eq!((files(&store), store.has(root(1))), (0, Some(SIZE)));
    }

    #[test]
    fn a_process_that_is_killed_has_lost_four_mebibytes_at_most() {
        let (_dir, store) = store();
        let mut receiving = store.receive(root(1), SIZE).expect("room");
        for came in 1..=GROUPS {
            come(&mut receiving, came - 1..came);
            let marks = store.inner.stem(&(root(1), SIZE)).with_extension("groups");
            let here = read_marks(&marks).ok();
            let here = here.and_then(|read| decode(&read, &(root(1), SIZE), &clock::boot_id().0));
            let known = here.map_or(0, |here| here.len());
            assert!(known + MARK_EVERY > came, "{known} of {came}");
        }
    }

    #[test]
    fn marks_count_in_their_boot_and_what_was_synced_after_it() {
        let name = (root(1), SIZE);
        let read = encode(&name, &[1; 16], &Groups::first(3), &Groups::first(9));
        assert_eq!(decode(&read, &name, &[1; 16]), Some(Groups::first(9)));
        assert_eq!(decode(&read, &name, &[2; 16]), Some(Groups::first(3)));
        assert_eq!(decode(&read, &(root(2), SIZE), &[1; 16]), None);
        assert_eq!(decode(&read, &(root(1), SIZE + 1), &[1; 16]), None);
        let nothing_synced = encode(&name, &[1; 16], &Groups::new(), &Groups::first(9));
        assert_eq!(decode(&nothing_synced, &name, &[2; 16]), None);
        // A boot that cannot be told is none that could be the same.
        let unknown = encode(&name, &[0; 16], &Groups::first(3), &Groups::first(9));
        assert_eq!(decode(&unknown, &name, &[0; 16]), Some(Groups::first(3)));
        let beyond = encode(&name, &[1; 16], &Groups::first(3), &Groups::first(GROUPS + 1));
        assert_eq!(decode(&beyond, &name, &[1; 16]), None);
        for cut in 0..read.len() {
            assert_eq!(decode(&read[..cut], &name, &[1; 16]), None, "cut at {cut}");
            let mut flipped = read.clone();
            flipped[cut] ^= 1;
            assert_eq!(decode(&flipped, &name, &[1; 16]), None, "flipped at {cut}");
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
            let mut receiving = store.receive(root(1), SIZE).expect("room");
            come(&mut receiving, 0..3);
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
            come(&mut store.receive(root(n), SIZE).expect("room"), 0..1);
        }
        assert_eq!(files(&store), 9);
        // The one that came longest ago goes; the one that goes on stays.
        let goes_on = store.receive(root(1), SIZE).expect("its own room");
        store.check_room(2 * SIZE - GROUP_BYTES).expect("there would be room");
        assert!(matches!(store.check_room(3 * SIZE), Err(PayloadError::NoSpace { .. })));
        let fourth = store.receive(root(4), SIZE).expect("room");
        assert_eq!(files(&store), 3 + 3 + 2);
        assert_eq!(store.receive(root(3), SIZE).expect("room").here(), &Groups::first(1));
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
            prop_assert_eq!(decode(&read, &name, &[1; 16]), Some(here));
            let later = (!synced.is_empty()).then_some(synced);
            prop_assert_eq!(decode(&read, &name, &[2; 16]), later);
            prop_assert_eq!(decode(&bytes, &name, &[1; 16]), None);
        }
    }
}
