//! The few things the store does to a disk, as a trait, so that a test can record each of them
//! and build the disk a power cut would have left; and [`durable_file`] for small files.
//!
//! Only what changes the disk goes through here. Reading back uses `std::fs`.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A directory's worth of changes.
pub(super) trait Disk: Debug + Send + Sync {
    /// A new, empty file that only its owner may read or write; one that was there is emptied.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// A file that is there, to be written in place.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// `rename(2)`: replaces what was there.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// `unlink(2)`.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Bytes that an unprivileged process may still write on the file system of `dir`.
    fn available(&self, dir: &Path) -> io::Result<u64>;
}

/// One file that the store writes.
pub(super) trait DiskFile: Debug + Send {
    /// `pwrite(2)` of all of `bytes`.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Cuts the file, or fills it with a hole up to `length`.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
    /// Sets blocks aside up to `length` without writing them.
    fn allocate(&mut self, length: u64) -> io::Result<()>;
    /// `fdatasync(2)`: data, and the metadata needed to read it.
    fn sync(&mut self) -> io::Result<()>;
}

/// A change to the disk that did not happen.
#[derive(Debug, Error)]
pub enum Fault {
    /// A write, a rename or the like.
    #[error("cannot write {path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A sync. After it nobody knows what the disk holds, and a second try would report success
    /// without having written (the kernel marks the pages clean).
    #[error(
        "cannot sync {path}: {source}; what the disk holds is unknown, the node must restart",
        path = path.display()
    )]
    Sync {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The database failed while it was in use.
    #[error(
        "the database in {path} failed: {source}; a restart rebuilds it",
        path = path.display()
    )]
    Tree {
        /// Its directory.
        path: PathBuf,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A thread of the store panicked; its message is on stderr.
    #[error("the store's {thread} thread panicked, the node must restart")]
    Panicked {
        /// Which.
        thread: &'static str,
    },
}

impl Fault {
    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + use<'_> {
        |source| Self::Write { path: path.to_owned(), source }
    }

    pub(super) fn sync(path: &Path) -> impl FnOnce(io::Error) -> Self + use<'_> {
        |source| Self::Sync { path: path.to_owned(), source }
    }

    /// Whether nothing happened because the disk is full, so that it can be tried again. A sync
    /// that says so is not meant: it had already accepted the data.
    pub(super) fn is_full(&self) -> bool {
        matches!(self, Self::Write { source, .. } if is_full(source))
    }
}

/// Whether an error means: no space, or none for this user.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The operating system's disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Os;

impl Disk for Os {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        Ok(Box::new(OsFile(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(OsFile(OpenOptions::new().read(true).write(true).open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn available(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

#[derive(Debug)]
struct OsFile(File);

impl DiskFile for OsFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn allocate(&mut self, length: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), 0, length) {
            // Where the file system has no fallocate, zeros take the space just as well.
            Err(rustix::io::Errno::OPNOTSUPP) => zero_fill(self, length),
            other => Ok(other?),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Writes zeros over `[0, length)`.
///
/// Blocks that were only set aside are "unwritten": the first write into each makes the sync
/// commit metadata too. Measured on ext4 with 600-byte records, p50 of write + fdatasync:
/// 145 us on a growing file, 150 us after fallocate, 97 us in a zero-filled file.
pub(super) fn zero_fill(file: &mut dyn DiskFile, length: u64) -> io::Result<()> {
    const ZEROS: &[u8] = &[0; 256 * 1024];
    let mut offset = 0;
    while offset < length {
        let piece = ZEROS.len().min((length - offset).try_into().unwrap_or(usize::MAX));
        file.write_at(offset, ZEROS.get(..piece).unwrap_or(ZEROS))?;
        offset += piece as u64;
    }
    Ok(())
}

/// Replaces a small file so that a power cut leaves the old or the new content, never a mix:
/// a temporary file beside it (mode 0600), sync, rename, sync of the directory.
///
/// # Errors
/// What the file system says; the old content is then still there, unless the very last step
/// failed ([`Fault::Sync`] naming the directory), after which either may be.
pub fn durable_file(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    replace(&Os, path, bytes)
}

/// [`durable_file`] on a disk of choice.
pub(super) fn replace(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    let temporary = temporary(path);
    let mut file = disk.create(&temporary).map_err(Fault::write(&temporary))?;
    file.write_at(0, bytes).map_err(Fault::write(&temporary))?;
    file.sync().map_err(Fault::sync(&temporary))?;
    put_in_place(disk, &temporary, path)
}

/// The name under which a file is written before it takes its place.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

/// Gives a synced file its final name, durably.
pub(super) fn put_in_place(disk: &dyn Disk, from: &Path, to: &Path) -> Result<(), Fault> {
    disk.rename(from, to).map_err(Fault::write(to))?;
    let dir = match to.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    disk.sync_dir(dir).map_err(Fault::sync(dir))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_durable_file_replaces_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small");
        durable_file(&path, b"one").unwrap();
        durable_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_durable_file_that_cannot_be_written_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let fault = durable_file(&dir.path().join("missing/small"), b"x").unwrap_err();
        assert!(matches!(fault, Fault::Write { .. }));
        assert!(fault.to_string().contains("missing/small.tmp"), "{fault}");
    }
}
