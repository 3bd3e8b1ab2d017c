//! The part of a job directory that a program writes to: counting it, keeping what was declared,
//! and clearing it, all against a program that would rather have it otherwise.
//!
//! The program may leave a million files, a directory chain deeper than any path may be long, or
//! symbolic links to anywhere. Nothing here follows a link, recurses, or holds more than two
//! levels of a path at once. Keeping and clearing run only after the runner is reaped.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use super::spec::{MAX_DEPTH, OutputFile};

/// The most files and directories that a program may have below `/out`.
pub(super) const MAX_ENTRIES: u64 = 65_536;

/// What was found below a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Bytes really taken on disk.
    pub(super) bytes: u64,
    /// Whether there are more entries, or deeper ones, than are allowed.
    pub(super) too_many: bool,
}

/// Counts what is below a directory, while the program may be changing it: what vanishes between
/// two looks is simply not counted. Stops counting as soon as `bytes` is above `enough`.
pub(super) fn measure(dir: &Path, enough: u64) -> Found {
    let mut found = Found::default();
    let mut entries = 0u64;
    let mut todo = vec![(dir.to_owned(), 0usize)];
    while let Some((dir, depth)) = todo.pop() {
        let list = match fs::read_dir(&dir) {
            Ok(list) => list,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            // A path too long to follow, or one that was closed to us, would hide what is in it.
            Err(_) => {
                found.too_many = true;
                return found;
            }
        };
        for entry in list.flatten() {
            entries += 1;
            if entries > MAX_ENTRIES || depth > 2 * MAX_DEPTH {
                found.too_many = true;
                return found;
            }
            let Ok(meta) = entry.metadata() else { continue };
            found.bytes = found.bytes.saturating_add(meta.blocks().saturating_mul(512));
            if found.bytes > enough {
                return found;
            }
            if meta.is_dir() {
                todo.push((entry.path(), depth + 1));
            }
        }
    }
    found
}

/// Bytes that a process holds in open files which have no name any more: they take disk until it
/// closes them, and no directory shows them. Counts nothing where the kernel does not let us look.
pub(super) fn unlinked(pid: i32) -> u64 {
    let Ok(list) = fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    // Following such a link leads to the open file itself, whatever its name was.
    let open = list.flatten().filter_map(|entry| fs::metadata(entry.path()).ok());
    let nameless: std::collections::BTreeMap<(u64, u64), u64> = open
        .filter(|meta| meta.is_file() && meta.nlink() == 0)
        .map(|meta| ((meta.dev(), meta.ino()), meta.blocks().saturating_mul(512)))
        .collect();
    nameless.into_values().fold(0, u64::saturating_add)
}

/// Moves the declared regular files from one directory to another, in the order they were
/// declared, as long as their lengths together stay within `quota`. Returns those kept and the
/// names of the others.
pub(super) fn keep(
    from: &Path,
    to: &Path,
    declared: &[String],
    quota: u64,
) -> (Vec<OutputFile>, Vec<String>) {
    let (mut kept, mut missing, mut left) = (Vec::new(), Vec::new(), quota);
    for name in declared {
        match keep_one(from, to, name, left) {
            Ok(size) => {
                left = left.saturating_sub(size);
                kept.push(OutputFile { name: name.clone(), size });
            }
            Err(_) => missing.push(name.clone()),
        }
    }
    (kept, missing)
}

fn keep_one(from: &Path, to: &Path, name: &str, left: u64) -> io::Result<u64> {
    // Every directory on the way must be a real one: a link there could lead anywhere.
    let mut source = from.to_owned();
    let mut target = to.to_owned();
    let mut parts = Path::new(name).components().peekable();
    while let Some(part) = parts.next() {
        source.push(part);
        let meta = fs::symlink_metadata(&source)?;
        if parts.peek().is_some() {
            if !meta.is_dir() {
                return Err(io::ErrorKind::NotADirectory.into());
            }
            target.push(part);
            if !target.is_dir() {
                fs::create_dir(&target)?;
            }
            continue;
        }
        // A second link to the same bytes would let another name change them afterwards.
        if !meta.is_file() || meta.nlink() != 1 || meta.len() > left {
            return Err(io::ErrorKind::InvalidData.into());
        }
        target.push(part);
        if target.exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        fs::rename(&source, &target)?;
        fs::set_permissions(&target, Permissions::from_mode(0o600))?;
        let file = OpenOptions::new().read(true).custom_flags(nofollow()).open(&target)?;
        own(&file)?;
        file.sync_all()?;
        return Ok(file.metadata()?.len());
    }
    Err(io::ErrorKind::InvalidInput.into())
}

/// The program wrote under a user of its own; what is kept belongs to the node.
fn own(file: &File) -> io::Result<()> {
    let me = rustix::process::geteuid().as_raw();
    if file.metadata()?.uid() == me {
        return Ok(());
    }
    fchown(file, Some(me), Some(rustix::process::getegid().as_raw()))
}

fn nofollow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}

/// Removes everything below a directory, and the directory, however deep it is: what lies two
/// levels down is moved up one, so that no path grows and nothing recurses.
pub(super) fn clear(dir: &Path) -> io::Result<()> {
    match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(meta) if !meta.is_dir() => return fs::remove_file(dir),
        Ok(_) => open_up(dir),
    }
    let mut moved = 0u64;
    loop {
        let mut progress = false;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            progress = true;
            if !entry.file_type()?.is_dir() {
                fs::remove_file(entry.path())?;
                continue;
            }
            open_up(&entry.path());
            for inner in fs::read_dir(entry.path())? {
                let inner = inner?;
                if inner.file_type()?.is_dir() {
                    fs::rename(inner.path(), free_name(dir, &mut moved))?;
                } else {
                    fs::remove_file(inner.path())?;
                }
            }
            fs::remove_dir(entry.path())?;
        }
        if !progress {
            return fs::remove_dir(dir);
        }
    }
}

/// The program may have taken away its own directory's permissions. It is dead by now, and the
/// caller knows that this is a directory and no link.
fn open_up(dir: &Path) {
    let _ = fs::set_permissions(dir, Permissions::from_mode(0o700));
}

fn free_name(dir: &Path, counter: &mut u64) -> PathBuf {
    loop {
        *counter += 1;
        let name = dir.join(format!(".clear-{counter}"));
        if fs::symlink_metadata(&name).is_err() {
            return name;
        }
    }
}

/// Puts a file below `dir`, under a checked relative name, where the runner can read it: by a
/// hard link when that needs no other permissions, else as a copy.
pub(super) fn place(from: &Path, dir: &Path, name: &str) -> io::Result<()> {
    let meta = fs::metadata(from)?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let to = &dir.join(name);
    let mut at = dir.to_owned();
    for part in Path::new(name).parent().into_iter().flat_map(Path::components) {
        at.push(part);
        if !at.is_dir() {
            fs::create_dir(&at)?;
            fs::set_permissions(&at, Permissions::from_mode(0o755))?;
        }
    }
    let readable = meta.mode() & 0o004 != 0 || !rustix::process::geteuid().is_root();
    let real = fs::symlink_metadata(from)?.is_file();
    if readable && real && fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to)?;
    fs::set_permissions(to, Permissions::from_mode(0o444))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_declared_regular_files_are_kept_within_the_quota() {
        let root = tempfile::tempdir().expect("a directory");
        let (out, kept) = (root.path().join("out"), root.path().join("outputs"));
        fs::create_dir_all(out.join("real")).expect("made");
        fs::create_dir(&kept).expect("made");
        let secret = root.path().join("secret");
        fs::write(&secret, "secret").expect("written");
        fs::write(out.join("a"), "aaaa").expect("written");
        fs::write(out.join("real/b"), "bb").expect("written");
        fs::write(out.join("big"), "0123456789").expect("written");
        fs::write(out.join("undeclared"), "u").expect("written");
        symlink(&secret, out.join("link")).expect("linked");
        symlink(root.path(), out.join("up")).expect("linked");
        fs::write(out.join("twin"), "t").expect("written");
        fs::hard_link(out.join("twin"), out.join("twin2")).expect("linked");
        let names = ["a", "real/b", "big", "link", "up/secret", "real", "gone", "twin"];
        let declared: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let (files, missing) = keep(&out, &kept, &declared, 10);
        let files: Vec<(&str, u64)> = files.iter().map(|f| (f.name.as_str(), f.size)).collect();
        assert_eq!(files, [("a", 4), ("real/b", 2)]);
        assert_eq!(missing, ["big", "link", "up/secret", "real", "gone", "twin"]);
        assert_eq!(fs::read(kept.join("real/b")).expect("kept"), b"bb");
        assert_eq!(fs::read(&secret).expect("untouched"), b"secret");
        clear(&out).expect("cleared");
        assert!(!out.exists() && secret.exists());
    }

    #[test]
    fn a_chain_deeper_than_any_path_is_measured_and_cleared() {
        let root = tempfile::tempdir().expect("a directory");
        let top = root.path().join("out");
        fs::create_dir(&top).expect("made");
        // Built from the inside out, so that no path gets long while building.
        let name = "d".repeat(120);
        for n in 0..40 {
            let next = root.path().join("next");
            fs::create_dir(&next).expect("made");
            fs::write(next.join(format!("file{n}")), "x").expect("written");
            fs::rename(&top, next.join(&name)).expect("moved");
            fs::rename(&next, &top).expect("moved");
        }
        assert!(measure(&top, u64::MAX).too_many);
        clear(&top).expect("cleared");
        assert!(!top.exists());
        clear(&top).expect("clearing nothing is no error");
    }

    #[test]
    fn files_without_a_name_are_counted() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("a");
        let mut file = File::create(&path).expect("made");
        fs::remove_file(&path).expect("removed");
        io::Write::write_all(&mut file, &[1; 200_000]).expect("written");
        file.sync_all().expect("synced");
        let me = i32::try_from(std::process::id()).expect("a pid");
        assert!(unlinked(me) >= 200_000);
    }

    #[test]
    fn disk_is_counted_by_what_it_takes_and_no_further_than_needed() {
        let root = tempfile::tempdir().expect("a directory");
        fs::write(root.path().join("a"), vec![1u8; 100_000]).expect("written");
        fs::create_dir(root.path().join("d")).expect("made");
        fs::write(root.path().join("d/b"), vec![1u8; 100_000]).expect("written");
        File::open(root.path().join("a")).expect("open").sync_all().expect("synced");
        File::open(root.path().join("d/b")).expect("open").sync_all().expect("synced");
        let all = measure(root.path(), u64::MAX);
        assert!(all.bytes >= 200_000 && !all.too_many, "{all:?}");
    }
}
