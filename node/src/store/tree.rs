//! The state in sled, the only file that names it.
//!
//! sled is used with care, because of what version 0.34.7 is known for:
//!
//! - `flush()` ends in `sync_file_range`, which writes neither the file's size nor the drive's
//!   cache. So after it we call `fdatasync` through a descriptor of our own on the same file,
//!   held open since before the first write: Linux reports a write-back error once per open
//!   file, so sled's own background sync cannot swallow one meant for us.
//! - It may lose more in a power cut than it should, and need not notice. So every batch we
//!   give it carries a [`Sum`] of the state after it; at open all entries are read and summed.
//!   A database that does not match is not used.
//! - It may panic, or worse, on damaged files. Panics are caught, and a mark (`sled.opening`)
//!   stands beside the directory while it is being opened: when the process died then, the
//!   next one does not try again but rebuilds.
//! - Values over 128 KiB become files without any sync: ours are below 64 KiB.
//! - Its file is only cleaned by its background thread, so that stays on; every five seconds
//!   is enough for a database that is written at checkpoints.
//!
//! Keys: `0` alone holds sequence number and sum; `1 ++ key` holds an entry.

use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::checkpoint::{Changes, Entries};
use super::disk::Fault;
use super::write::{Sum, take};

const META: &[u8] = &[0];
const ENTRY: u8 = 1;

/// Entries given to sled at once: enough to be quick, few enough for its 512 KiB segments.
const CHUNK_ENTRIES: usize = 512;
const CHUNK_BYTES: usize = 256 * 1024;

/// What sled is to keep in memory of what it has read. Little: it is read at the start, and then
/// what a checkpoint replaces, once each. It keeps more: each of its 256 shards its newest page,
/// of up to 16 entries, and what was read since the shard last looked, which is every 64 times.
const CACHE_BYTES: u64 = 2 * 1024 * 1024;

/// How long a database that was just closed in this process may keep its file locked: sled's
/// threads let go of it a little after the last handle is dropped.
const LOCKED_FOR: Duration = Duration::from_secs(10);

/// How many databases that were set aside are kept for a look at them.
const KEPT_ASIDE: usize = 2;

/// The open database.
#[derive(Debug)]
pub(super) struct Tree {
    path: PathBuf,
    db: sled::Db,
    /// Our descriptor on sled's file, for the sync that sled does not do.
    file: File,
    seq: u64,
    sum: Sum,
}

/// The sum of the state after each of some changes.
#[derive(Debug)]
pub(super) struct Sums {
    each: Vec<Sum>,
    /// After all of them.
    pub(super) last: Sum,
}

/// What a database turned out to be.
#[derive(Debug)]
pub(super) enum Opened {
    /// Whole; these are its entries.
    Whole(Box<Tree>, Entries),
    /// There is none.
    Absent,
    /// Not to be used; it is still where it was.
    Broken(String),
}

impl Tree {
    /// Opens and checks the database in `path`, if there is one.
    pub(super) fn open(path: &Path) -> io::Result<Opened> {
        let mark = path.with_extension("opening");
        if !path.exists() {
            remove_if_there(&mark)?;
            return Ok(Opened::Absent);
        }
        if mark.exists() {
            return Ok(Opened::Broken("the last process died while opening it".to_owned()));
        }
        place_mark(&mark)?;
        let opened = catch_unwind(AssertUnwindSafe(|| Self::open_and_check(path)));
        let opened = match opened {
            Ok(Ok((tree, entries))) => Opened::Whole(Box::new(tree), entries),
            Ok(Err(Unusable::Sled(sled::Error::Io(error)))) if not_its_fault(&error) => {
                remove_if_there(&mark)?;
                return Err(error);
            }
            Ok(Err(Unusable::Sled(error))) => Opened::Broken(error.to_string()),
            Ok(Err(Unusable::Sum)) => Opened::Broken("entries were lost from it".to_owned()),
            Err(_) => Opened::Broken("it panicked while it was opened".to_owned()),
        };
        remove_if_there(&mark)?;
        Ok(opened)
    }

    /// Makes a new database in `path`, where there is none, with `entries` as of batch `seq`.
    pub(super) fn create(path: &Path, seq: u64, entries: &Entries) -> Result<Self, Fault> {
        let db = open_sled(path).map_err(|error| failed(path, error))?;
        let file = File::open(path.join("db")).map_err(|error| failed(path, error))?;
        let mut tree = Self { path: path.to_owned(), db, file, seq: 0, sum: Sum::default() };
        let mut sum = Sum::default();
        let entries = entries.iter().map(|(key, value)| {
            sum.add(key, value);
            (key, Some(value), sum)
        });
        tree.write(seq, entries)?;
        tree.sync()?;
        Ok(tree)
    }

    fn open_and_check(path: &Path) -> Result<(Self, Entries), Unusable> {
        let db = open_sled(path)?;
        let file = File::open(path.join("db")).map_err(sled::Error::Io)?;
        let meta = db.get(META)?.ok_or(Unusable::Sum)?;
        let (seq, sum) = decode_meta(&meta).ok_or(Unusable::Sum)?;
        let mut entries = Entries::new();
        for entry in db.range([ENTRY]..) {
            let (key, value) = entry?;
            let key = key.get(1..).unwrap_or_default().to_vec();
            entries.insert(key, value.to_vec());
        }
        if Sum::of(entries.iter()) != sum {
            return Err(Unusable::Sum);
        }
        Ok((Self { path: path.to_owned(), db, file, seq, sum }, entries))
    }

    /// It holds everything up to this batch.
    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    pub(super) fn sum(&self) -> Sum {
        self.sum
    }

    /// The sum after each of `changes`, without making them. It reads what they replace, so it is
    /// asked for once, and then handed to [`Self::apply`].
    pub(super) fn sums_after(&self, changes: &Changes) -> Result<Sums, Fault> {
        let mut sum = self.sum;
        let mut sums = Vec::with_capacity(changes.len());
        for (key, value) in changes {
            let old = self.db.get(spelled(key)).map_err(|error| failed(&self.path, error))?;
            if let Some(old) = old {
                sum.subtract(key, &old);
            }
            if let Some(value) = value {
                sum.add(key, value);
            }
            sums.push(sum);
        }
        Ok(Sums { each: sums, last: sum })
    }

    /// Makes `changes`, after which it holds everything up to batch `seq`. Changes that it has
    /// already are no harm. `sums` are those after `changes`, with nothing done in between.
    pub(super) fn apply(&mut self, seq: u64, changes: &Changes, sums: &Sums) -> Result<(), Fault> {
        let changes = changes.iter().zip(&sums.each);
        self.write(seq, changes.map(|((key, value), sum)| (key, value.as_ref(), *sum)))
    }

    /// Writes entries, each with the sum after it.
    fn write<'a>(
        &mut self,
        seq: u64,
        changes: impl Iterator<Item = (&'a Vec<u8>, Option<&'a Vec<u8>>, Sum)>,
    ) -> Result<(), Fault> {
        let mut batch = sled::Batch::default();
        let (mut entries, mut bytes) = (0, 0);
        let mut sum = self.sum;
        for (key, value, after) in changes {
            let value = value.map(Vec::as_slice);
            sum = after;
            match value {
                Some(value) => batch.insert(spelled(key), value),
                None => batch.remove(spelled(key)),
            }
            entries += 1;
            bytes += key.len() + value.map_or(0, <[u8]>::len);
            if entries >= CHUNK_ENTRIES || bytes >= CHUNK_BYTES {
                // Not all of it yet: the number stays, the sum is that of what is there.
                self.commit(std::mem::take(&mut batch), self.seq, sum)?;
                (entries, bytes) = (0, 0);
            }
        }
        self.commit(batch, seq, sum)
    }

    fn commit(&mut self, mut batch: sled::Batch, seq: u64, sum: Sum) -> Result<(), Fault> {
        batch.insert(META, encode_meta(seq, sum));
        self.db.apply_batch(batch).map_err(|error| failed(&self.path, error))?;
        (self.seq, self.sum) = (seq, sum);
        Ok(())
    }

    /// Makes all of it durable.
    pub(super) fn sync(&self) -> Result<(), Fault> {
        self.db.flush().map_err(|error| failed(&self.path, error))?;
        let path = self.path.join("db");
        self.file.sync_data().map_err(Fault::sync(&path))
    }

    /// A view for other threads.
    pub(super) fn view(&self) -> View {
        View { path: self.path.clone(), db: self.db.clone() }
    }

    /// All entries, in order.
    pub(super) fn entries(&self) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), Fault>> {
        self.db.range([ENTRY]..).map(|entry| {
            let (key, value) = entry.map_err(|error| failed(&self.path, error))?;
            Ok((key.get(1..).unwrap_or_default().to_vec(), value.to_vec()))
        })
    }
}

/// A database to look into while another thread writes it.
#[derive(Clone, Debug)]
pub(super) struct View {
    path: PathBuf,
    db: sled::Db,
}

impl View {
    /// All entries whose key starts with `prefix`, in order.
    pub(super) fn under(&self, prefix: &[u8]) -> Result<Entries, Fault> {
        let spelled = spelled(prefix);
        let entry = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (key, value) = entry.map_err(|error| failed(&self.path, error))?;
            Ok((key.get(1..).unwrap_or_default().to_vec(), value.to_vec()))
        };
        self.db.scan_prefix(spelled).map(entry).collect()
    }
}

/// Why a database is not used.
enum Unusable {
    Sled(sled::Error),
    Sum,
}

impl From<sled::Error> for Unusable {
    fn from(error: sled::Error) -> Self {
        Self::Sled(error)
    }
}

fn open_sled(path: &Path) -> sled::Result<sled::Db> {
    let config = sled::Config::new()
        .path(path)
        .mode(sled::Mode::LowSpace)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(Some(5_000));
    let started = Instant::now();
    loop {
        match config.open() {
            // Ours is the only process (`lock`), so this can only be an earlier handle of our
            // own on its way out.
            Err(sled::Error::Io(error))
                if error.to_string().contains("could not acquire lock")
                    && started.elapsed() < LOCKED_FOR =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Whether an error speaks of the machine, not of the files: setting them aside would not help.
fn not_its_fault(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    super::disk::is_full(error)
        || error.to_string().contains("could not acquire lock")
        || matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::ACCESS))
}

fn failed(path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Fault {
    Fault::Tree { path: path.to_owned(), source: Box::new(error) }
}

fn spelled(key: &[u8]) -> Vec<u8> {
    let mut spelled = Vec::with_capacity(1 + key.len());
    spelled.push(ENTRY);
    spelled.extend_from_slice(key);
    spelled
}

fn encode_meta(seq: u64, sum: Sum) -> Vec<u8> {
    let mut bytes = seq.to_le_bytes().to_vec();
    bytes.extend_from_slice(&sum.entries.to_le_bytes());
    bytes.extend_from_slice(&sum.hash.to_le_bytes());
    bytes
}

fn decode_meta(mut bytes: &[u8]) -> Option<(u64, Sum)> {
    let seq = u64::from_le_bytes(take(&mut bytes)?);
    let entries = u64::from_le_bytes(take(&mut bytes)?);
    let hash = u128::from_le_bytes(take(&mut bytes)?);
    bytes.is_empty().then_some((seq, Sum { entries, hash }))
}

fn place_mark(mark: &Path) -> io::Result<()> {
    match fs::write(mark, b"") {
        // A full disk: then without.
        Err(error) if super::disk::is_full(&error) => Ok(()),
        other => other,
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Moves the database in `path` to `sled.broken-N`, and forgets the oldest of those.
pub(super) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let prefix = format!("{}.broken-", name.display());
    let mut aside = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        if let Some(number) = number.and_then(|number| number.parse::<u64>().ok()) {
            aside.push((number, entry.path()));
        }
    }
    aside.sort();
    let number = aside.last().map_or(1, |(number, _)| number.saturating_add(1));
    let spare = (aside.len() + 1).saturating_sub(KEPT_ASIDE);
    for (_, oldest) in aside.iter().take(spare) {
        fs::remove_dir_all(oldest)?;
    }
    let target = dir.join(format!("{prefix}{number}"));
    fs::rename(path, &target)?;
    remove_if_there(&path.with_extension("opening"))?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_lost_an_entry_without_noticing_is_not_used() {
        let room = tempfile::tempdir().unwrap();
        let path = room.path().join("sled");
        let entry = |key: &str| (key.as_bytes().to_vec(), b"value".to_vec());
        let entries: Entries = ["a", "b", "c"].map(entry).into();
        let changes: [fn(&sled::Db); 3] = [
            |db| drop(db.remove(spelled(b"b")).unwrap()),
            |db| drop(db.insert(spelled(b"b"), b"valuf").unwrap()),
            |db| drop(db.remove(META).unwrap()),
        ];
        for change in changes {
            let tree = Tree::create(&path, 3, &entries).unwrap();
            change(&tree.db);
            tree.sync().unwrap();
            drop(tree);
            let opened = Tree::open(&path).unwrap();
            let Opened::Broken(why) = opened else { panic!("{opened:?}") };
            assert_eq!(why, "entries were lost from it");
            fs::remove_dir_all(&path).unwrap();
        }
        drop(Tree::create(&path, 3, &entries).unwrap());
        assert!(matches!(Tree::open(&path).unwrap(), Opened::Whole(_, found) if found == entries));
    }
}
