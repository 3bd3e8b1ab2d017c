//! Directories to and from the node: as an index ([`leasehold_proto::words::index`]) and the payloads
//! that it names.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use leasehold_keys::exit::Exit;
use leasehold_proto::words::index::{
    Index, IndexError, IndexedFile, MAX_BYTES, MAX_DEPTH, MAX_FILES,
};
use leasehold_proto::{Hash, Payload};

use super::transfer::{self, Local, Trouble};
use super::{Failure, Session};
use crate::api::body::PayloadStat;
use crate::api::want::PayloadText;
use crate::client::escaped;

/// A directory of this machine, by its content.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    /// What it is.
    pub(super) index: Index,
    /// The index itself.
    pub(super) local: Local,
    /// What the index names.
    pub(super) files: Vec<Local>,
}

/// A file found in a directory.
struct Found {
    path: String,
    at: PathBuf,
    executable: bool,
    size: u64,
}

/// Hashes a directory: its files, and those that links in it lead to.
pub(super) async fn hash(session: &Session, path: &Path) -> Result<Directory, Failure> {
    let of = path.to_path_buf();
    let walked = tokio::task::spawn_blocking(move || {
        let mut found = Vec::new();
        walk(&of, "", 1, &mut found).map(|()| found)
    });
    let walked = walked.await.map_err(|why| Failure::new(Exit::Io, why))?;
    let found = walked.map_err(|(at, why)| Failure::file("cannot read", &at, &why))?;
    let bar = transfer::bar(&session.out, "hashing", found.iter().map(|file| file.size).sum());
    let (mut files, mut named) = (Vec::with_capacity(found.len()), Vec::new());
    for Found { path, at, executable, .. } in found {
        let local = transfer::hash(&at).await?;
        let PayloadText { root, size } = &local.payload;
        bar.inc(*size);
        let root = root.parse::<Hash>().map_err(|why| Failure::new(Exit::Io, why))?;
        named.push(IndexedFile { path, executable, payload: Payload { root, size: *size } });
        files.push(local);
    }
    bar.finish_and_clear();
    let index = Index::new(named).map_err(|why| {
        Failure::say(Exit::Usage, format!("{} makes no index: {why}", path.display()))
    })?;
    Ok(Directory { local: Local::of(index.to_bytes()), index, files })
}

/// Adds the files below a directory, in whatever order. What cannot be in an index is an error, with
/// where it lies.
fn walk(
    dir: &Path,
    below: &str,
    depth: usize,
    found: &mut Vec<Found>,
) -> Result<(), (PathBuf, io::Error)> {
    let failed = |at: &Path| {
        let at = at.to_path_buf();
        move |why| (at, why)
    };
    let wrong = |at: PathBuf, why: String| Err((at, io::Error::other(why)));
    for entry in fs::read_dir(dir).map_err(failed(dir))? {
        let entry = entry.map_err(failed(dir))?;
        let at = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            return wrong(at, "its name is not UTF-8".into());
        };
        let path = if below.is_empty() { name } else { format!("{below}/{name}") };
        let link = entry.file_type().map_err(failed(&at))?.is_symlink();
        let about = fs::metadata(&at).map_err(failed(&at))?;
        if about.is_dir() && link {
            return wrong(at, "a link to a directory cannot be in an index".into());
        } else if about.is_dir() {
            if depth == MAX_DEPTH {
                return wrong(at, format!("an index has at most {MAX_DEPTH} names in a path"));
            }
            walk(&at, &path, depth + 1, found)?;
        } else if !about.is_file() {
            return wrong(at, "it is no file, directory, or link to a file".into());
        } else if found.len() == MAX_FILES {
            return wrong(dir.into(), IndexError::TooMany(MAX_FILES + 1).to_string());
        } else {
            let executable = about.permissions().mode() & 0o111 != 0;
            found.push(Found { path, at, executable, size: about.len() });
        }
    }
    Ok(())
}

/// Sends a directory, and sees to it that all of it is there then. Gives the bytes that were sent.
pub(super) async fn upload(session: &Session, directory: &Directory) -> Result<u64, Failure> {
    let mut sent = transfer::upload(session, &directory.files).await?;
    // What it names first: an index is of no use without.
    sent += transfer::upload(session, std::slice::from_ref(&directory.local)).await?;
    let root = &directory.local.payload.root;
    let stat: PayloadStat = session.client.get(&format!("/v1/payloads/{root}/holders")).await?;
    match stat.index.map_or(directory.index.payloads().len(), |index| index.missing) {
        0 => Ok(sent),
        missing => {
            let message = format!(
                "the node has no room for all of it: of {} payloads {missing} had to go again; raise \
                 payloads.quota, or remove others",
                directory.index.payloads().len()
            );
            Err(Failure::say(Exit::Policy, message))
        }
    }
}

/// Writes the files of an index that the node holds to `dir`, each checked against its root. The
/// directory appears whole or not at all: it must not be there, or be empty.
pub(super) async fn export(
    session: &Session,
    root: &str,
    size: u64,
    dir: &Path,
) -> Result<(), Failure> {
    check_new(dir)?;
    let index = index(session, root, size).await?;
    let partial = Partial::create(dir)?;
    let bar = transfer::bar(&session.out, "writing", index.size());
    for file in index.files() {
        let at = partial.dir.join(&file.path);
        let trouble = |trouble: Trouble| trouble.of(&file.path, &at);
        if let Some(above) = at.parent() {
            fs::create_dir_all(above).map_err(Trouble::Disk).map_err(trouble)?;
        }
        let mode = if file.executable { 0o755 } else { 0o644 };
        let created = OpenOptions::new().write(true).create_new(true).mode(mode).open(&at);
        let mut to = created.map_err(Trouble::Disk).map_err(trouble)?;
        let payload = PayloadText::of(&file.payload);
        let from = format!("/v1/payloads/{}", escaped(&payload.root));
        transfer::take(session, &from, &payload, &bar, &mut to).await.map_err(trouble)?;
    }
    bar.finish_and_clear();
    partial.keep(dir)
}

/// That `dir` is free to become the directory.
pub(super) fn check_new(dir: &Path) -> Result<(), Failure> {
    let message = match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => return Ok(()),
        Ok(false) => format!("{} is there and not empty: name a new directory", dir.display()),
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(why) => return Err(Failure::file("cannot write", dir, &why)),
    };
    Err(Failure::say(Exit::Conflict, message))
}

/// What an index that the node holds says.
pub(super) async fn index(session: &Session, root: &str, size: u64) -> Result<Index, Failure> {
    let not =
        |why: &dyn std::fmt::Display| Failure::say(Exit::No, format!("payload {root}: {why}"));
    if size > MAX_BYTES as u64 {
        return Err(not(&IndexError::NoIndex));
    }
    let mut bytes = Vec::new();
    let payload = PayloadText { root: root.to_string(), size };
    let from = format!("/v1/payloads/{}", escaped(root));
    let bar = transfer::bar(&session.out, root, size);
    let taken = transfer::take(session, &from, &payload, &bar, &mut bytes).await;
    bar.finish_and_clear();
    taken.map_err(|trouble| trouble.of(root, Path::new("memory")))?;
    Index::from_bytes(&bytes).map_err(|why| not(&why))
}

/// A directory that is not whole yet; gone when dropped.
struct Partial {
    dir: PathBuf,
}

impl Partial {
    /// Makes one beside `dir`.
    fn create(dir: &Path) -> Result<Self, Failure> {
        let Some(name) = dir.file_name().and_then(|name| name.to_str()) else {
            let message = format!("'{}' names no directory", dir.display());
            return Err(Failure::say(Exit::Usage, message));
        };
        let beside = transfer::parent(dir).join(format!(".{name}.{}.part", std::process::id()));
        fs::create_dir(&beside).map_err(|why| Failure::file("cannot write", &beside, &why))?;
        Ok(Self { dir: beside })
    }

    fn keep(self, dir: &Path) -> Result<(), Failure> {
        fs::rename(&self.dir, dir).map_err(|why| Failure::file("cannot write", dir, &why))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Best effort: what stays is named .part.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn walked(dir: &Path) -> Result<Vec<(String, bool)>, String> {
        let mut found = Vec::new();
        walk(dir, "", 1, &mut found).map_err(|(at, why)| format!("{}: {why}", at.display()))?;
        let mut files: Vec<_> = found.into_iter().map(|f| (f.path, f.executable)).collect();
        files.sort();
        Ok(files)
    }

    #[test]
    fn a_directory_is_its_files_and_where_links_lead() {
        let room = tempfile::tempdir().expect("a directory");
        let dir = room.path().join("d");
        fs::create_dir_all(dir.join("sub/empty")).expect("made");
        fs::write(room.path().join("outside"), "x").expect("written");
        fs::write(dir.join("sub/run"), "x").expect("written");
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(dir.join("sub/run"), mode).expect("set");
        symlink("../outside", dir.join("link")).expect("linked");
        let files = walked(&dir).expect("walks");
        assert_eq!(files, [("link".into(), false), ("sub/run".into(), true)]);

        symlink("sub", dir.join("round")).expect("linked");
        let round = walked(&dir).expect_err("a link to a directory");
        assert!(round.contains("d/round: a link to a directory"), "{round}");
        fs::remove_file(dir.join("round")).expect("removed");
        symlink("nowhere", dir.join("dead")).expect("linked");
        let dead = walked(&dir).expect_err("a link to nothing");
        assert!(dead.contains("d/dead: No such file"), "{dead}");
        fs::remove_file(dir.join("dead")).expect("removed");
        fs::create_dir_all(dir.join(vec!["n"; MAX_DEPTH].join("/"))).expect("made");
        let deep = walked(&dir).expect_err("too deep");
        assert!(deep.contains("at most"), "{deep}");
    }

    #[test]
    fn what_is_there_is_not_written_over() {
        let room = tempfile::tempdir().expect("a directory");
        let dir = room.path().join("d");
        check_new(&dir).expect("not there");
        fs::create_dir(&dir).expect("made");
        check_new(&dir).expect("empty");
        let partial = Partial::create(&dir).expect("made");
        fs::write(partial.dir.join("a"), "x").expect("written");
        partial.keep(&dir).expect("kept");
        assert!(dir.join("a").exists());
        assert_eq!(check_new(&dir).expect_err("not empty").exit, Exit::Conflict);
        drop(Partial::create(&dir).expect("made"));
        assert_eq!(fs::read_dir(room.path()).expect("lists").count(), 1, "nothing is left");
        assert!(Partial::create(Path::new("/")).is_err(), "no name");
    }
}
