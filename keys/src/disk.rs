//! Reading files with a cap, and writing them all or nothing.
//!
//! A file is read only up to a limit that its reader names, before memory is taken. A file is
//! written to a temporary name beside its place, synced, renamed, and its directory synced: after
//! a crash there is the old file or the new one, never half of one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags};
use zeroize::Zeroizing;

use crate::exit::Exit;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The system said no.
    #[error("cannot read {}: {why}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        why: io::Error,
    },
    /// It is longer than anything of its sort.
    #[error("{} is longer than {limit} bytes: it is not what is expected here", .path.display())]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// How long it may be, in bytes.
        limit: usize,
    },
    /// It is a symbolic link.
    #[error("{} is a symbolic link: name the file itself", .path.display())]
    Link {
        /// Which file.
        path: PathBuf,
    },
    /// It is a directory, a pipe, a device.
    #[error("{} is not a regular file", .path.display())]
    NotAFile {
        /// Which file.
        path: PathBuf,
    },
    /// Others than its owner may use it.
    #[error(
        "{} has mode {mode:04o}: group or others can use it; run: chmod 600 {}",
        .path.display(), .path.display()
    )]
    Mode {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("{} belongs to user {owner}, not to you or root", .path.display())]
    Owner {
        /// Which file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
}

impl ReadError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Io { .. } | Self::TooLong { .. } | Self::NotAFile { .. } => Exit::Io,
            Self::Link { .. } | Self::Mode { .. } | Self::Owner { .. } => Exit::Policy,
        }
    }
}

/// Why a file was not written. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// There is one already.
    #[error("{} exists: give another name, or --force to replace it", .path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// The system said no.
    #[error("cannot write {}: {why}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        why: io::Error,
    },
}

impl WriteError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Exists { .. } => Exit::Conflict,
            Self::Io { .. } => Exit::Io,
        }
    }
}

/// Whether an existing file may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// An existing file stays and is an error, also when it appears at the last moment.
    Keep,
    /// An existing file is replaced.
    Replace,
}

/// Reads at most `limit` bytes of a file that anyone may see.
///
/// # Errors
/// When it cannot be read, is not a regular file or is longer.
pub fn read(path: &Path, limit: usize) -> Result<Vec<u8>, ReadError> {
    let (file, _) = open(path, OFlags::empty())?;
    drain(path, file, limit).map(|mut bytes| std::mem::take(&mut *bytes))
}

/// Reads at most `limit` bytes of a secret file: a regular file of ours or root's that only its
/// owner can use, and no symbolic link. The bytes leave memory when dropped.
///
/// # Errors
/// As for [`read`], and when another rule is broken.
pub fn read_private(path: &Path, limit: usize) -> Result<Zeroizing<Vec<u8>>, ReadError> {
    let (file, metadata) = open(path, OFlags::NOFOLLOW)?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(ReadError::Mode { path: path.into(), mode });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(ReadError::Owner { path: path.into(), owner });
    }
    drain(path, file, limit)
}

/// Opens a regular file. Not blocking, so that a pipe in its place cannot hang us.
fn open(path: &Path, more: OFlags) -> Result<(File, std::fs::Metadata), ReadError> {
    let failed = |why: io::Error| match why.raw_os_error() {
        Some(code) if code == rustix::io::Errno::LOOP.raw_os_error() => {
            ReadError::Link { path: path.into() }
        }
        _ => ReadError::Io { path: path.into(), why },
    };
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY | more).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_file() {
        Ok((file, metadata))
    } else {
        Err(ReadError::NotAFile { path: path.into() })
    }
}

/// Reads to the end or fails. The buffer is never moved while it grows, so that no copy of a
/// secret stays behind: its full size is known before.
fn drain(path: &Path, file: File, limit: usize) -> Result<Zeroizing<Vec<u8>>, ReadError> {
    let failed = |why| ReadError::Io { path: path.into(), why };
    let size = usize::try_from(file.metadata().map_err(failed)?.len()).unwrap_or(usize::MAX);
    if size > limit {
        return Err(ReadError::TooLong { path: path.into(), limit });
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(size + 1));
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    file.take(most).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit {
        return Err(ReadError::TooLong { path: path.into(), limit });
    }
    Ok(bytes)
}

/// Writes `bytes` to `path` all or nothing, with permission bits `mode` (less the umask).
///
/// # Errors
/// When there is a file already and `existing` says to keep it, or the system says no.
pub fn write_atomic(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    existing: Existing,
) -> Result<(), WriteError> {
    let failed = |why| WriteError::Io { path: path.into(), why };
    // A cheap look first, so that nothing is written in vain; the rename decides.
    if existing == Existing::Keep && path.symlink_metadata().is_ok() {
        return Err(WriteError::Exists { path: path.into() });
    }
    let Some(name) = path.file_name() else {
        return Err(failed(io::Error::from(io::ErrorKind::IsADirectory)));
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut random = [0u8; 8];
    getrandom::fill(&mut random).map_err(|why| failed(io::Error::other(why)))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{:016x}.tmp", u64::from_le_bytes(random)));
    let temporary = directory.join(temporary);
    let result = put(&temporary, bytes, mode)
        .map_err(failed)
        .and_then(|()| rename(&temporary, path, existing));
    if result.is_err() {
        // Best effort: what is left would be a stray file of a failed write.
        let _ = std::fs::remove_file(&temporary);
        return result;
    }
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn put(temporary: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn rename(temporary: &Path, path: &Path, existing: Existing) -> Result<(), WriteError> {
    use rustix::io::Errno;
    let failed = |why: io::Error| WriteError::Io { path: path.into(), why };
    if existing == Existing::Replace {
        return std::fs::rename(temporary, path).map_err(failed);
    }
    match rustix::fs::renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(WriteError::Exists { path: path.into() }),
        // A file system without it: take the name first, exclusively, then rename over it.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            let taken = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            match taken {
                Err(why) if why.kind() == io::ErrorKind::AlreadyExists => {
                    Err(WriteError::Exists { path: path.into() })
                }
                Err(why) => Err(failed(why)),
                Ok(_) => std::fs::rename(temporary, path).map_err(failed),
            }
        }
        Err(why) => Err(failed(why.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_existing_file_is_kept_unless_told_otherwise() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x");
        write_atomic(&path, b"one", 0o600, Existing::Keep).expect("written");
        let error = write_atomic(&path, b"two", 0o600, Existing::Keep).expect_err("kept");
        assert_eq!(error.exit(), Exit::Conflict);
        assert_eq!(read(&path, 10).expect("read"), b"one");
        write_atomic(&path, b"two", 0o600, Existing::Replace).expect("replaced");
        assert_eq!(read(&path, 10).expect("read"), b"two");
        let left: Vec<_> = std::fs::read_dir(dir.path()).expect("list").collect();
        assert_eq!(left.len(), 1, "no temporary file stays behind: {left:?}");
    }

    #[test]
    fn the_rename_decides_when_a_file_appears_at_the_last_moment() {
        let dir = tempfile::tempdir().expect("a directory");
        let (temporary, path) = (dir.path().join("t"), dir.path().join("x"));
        std::fs::write(&temporary, "new").expect("written");
        std::fs::write(&path, "there").expect("written");
        let error = rename(&temporary, &path, Existing::Keep).expect_err("kept");
        assert_eq!(error.exit(), Exit::Conflict);
        assert_eq!(std::fs::read(&path).expect("read"), b"there");
    }

    #[test]
    fn secrets_are_read_only_where_nobody_else_can() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x");
        write_atomic(&path, b"secret", 0o600, Existing::Keep).expect("written");
        assert_eq!(&**read_private(&path, 10).expect("read"), b"secret");
        for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644] {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&path, permissions).expect("chmod");
            let error = read_private(&path, 10).expect_err("refused");
            assert_eq!(error.exit(), Exit::Policy);
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        assert!(matches!(read_private(&link, 10), Err(ReadError::Link { .. })));
        assert!(read(&link, 10).is_ok(), "what is public may be a link");
    }

    #[test]
    fn what_is_no_file_or_too_long_is_refused_without_reading_it() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(matches!(read(dir.path(), 10), Err(ReadError::NotAFile { .. })));
        assert!(matches!(read(Path::new("/dev/zero"), 10), Err(ReadError::NotAFile { .. })));
        let path = dir.path().join("x");
        std::fs::write(&path, "12345678901").expect("written");
        assert!(matches!(read(&path, 10), Err(ReadError::TooLong { limit: 10, .. })));
        assert!(matches!(read(&dir.path().join("y"), 10), Err(ReadError::Io { .. })));
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("a pipe");
        assert!(matches!(read_private(&fifo, 10), Err(ReadError::NotAFile { .. })));
    }
}
