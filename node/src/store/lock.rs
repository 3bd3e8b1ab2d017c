//! One process per directory: an exclusive `flock(2)` on `lock`, with the owner's pid inside.
//!
//! The kernel releases the lock with the process, however it ends, so a stale file never keeps
//! anybody out; the pid is only for the message. The file is never removed: removing it would
//! let two processes lock two files of the same name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Held for as long as it lives.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

/// Unlocks in words. Closing alone would leave the lock to whoever holds a copy of the
/// descriptor: a child between its fork and its exec.
impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

/// Why the lock was not taken.
#[derive(Debug)]
pub(super) enum LockError {
    /// Somebody has it; the pid where it could be read.
    Held(Option<u32>),
    /// The file could not be opened, locked or written.
    Io(io::Error),
}

impl Lock {
    pub(super) fn take(path: &Path) -> Result<Self, LockError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LockError::Held(holder(&mut file))),
            Err(TryLockError::Error(error)) => return Err(LockError::Io(error)),
        }
        match file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())) {
            Ok(()) => Ok(Self { file }),
            // A full disk must not keep a node from starting: the pid is only for a message.
            Err(error) if super::disk::is_full(&error) => Ok(Self { file }),
            Err(error) => Err(LockError::Io(error)),
        }
    }
}

#[cfg(test)]
impl Lock {
    /// What a child gets when it is forked.
    pub(super) fn duplicate_for_test(&self) -> File {
        self.file.try_clone().expect("a descriptor is free")
    }
}

fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
