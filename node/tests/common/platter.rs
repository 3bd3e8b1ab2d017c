//! A disk as a power cut leaves it, worked out from recorded calls.
//!
//! What was synced is there. Of everything else any part may be: of the writes any sectors, of
//! names made, changed and removed any. That is harsher than any file system in use (those keep
//! the order of names at least), so what holds here holds on all of them. `sync_file_range`
//! counts for nothing, and a file's own sync not for its name.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::calls::{Number, Step};
use super::dice::Dice;

const SECTOR: usize = 512;

/// A name: the directory that it is in, and how it is spelled there.
type Name = (Number, OsString);

/// What is on the platter, and what is still on its way there.
#[derive(Debug, Default)]
pub(crate) struct Platter {
    below: PathBuf,
    files: BTreeMap<Number, Vec<u8>>,
    dirs: BTreeSet<Number>,
    names: BTreeMap<Name, Number>,
    /// The names as running processes see them.
    live: BTreeMap<Name, Number>,
    /// What was not synced: the number of the step, and what it did.
    pending: Vec<(usize, Change)>,
    steps: usize,
}

#[derive(Debug)]
enum Change {
    Write { file: Number, offset: u64, bytes: Vec<u8> },
    Length { file: Number, length: u64, cuts: bool },
    Link { name: Name, file: Number },
    Rename { from: Name, to: Name, file: Number },
    Unlink { name: Name, file: Number },
}

impl Change {
    /// The file or directory whose sync makes it durable.
    fn of(&self) -> Number {
        match self {
            Self::Write { file, .. } | Self::Length { file, .. } => *file,
            Self::Link { name, .. } | Self::Unlink { name, .. } => name.0,
            Self::Rename { to, .. } => to.0,
        }
    }
}

/// What becomes of that which was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Lost,
    Landed,
    /// By dice with this seed: some lost, some landed, some torn.
    Chance(u64),
}

/// A directory's files, and directories as none.
pub(crate) type Image = BTreeMap<PathBuf, Option<Vec<u8>>>;

impl Platter {
    /// The disk of a recorder that watches `below`.
    pub(crate) fn new(below: &Path) -> Self {
        let below = below.canonicalize().expect("the directory is there");
        Self { below, dirs: BTreeSet::from([0]), ..Self::default() }
    }

    /// Takes the next recorded step.
    pub(crate) fn step(&mut self, step: &Step) {
        let number = self.steps;
        self.steps += 1;
        let change = match step {
            Step::Create { file, path, dir } => {
                if *dir {
                    self.dirs.insert(*file);
                }
                let name = self.resolve(path);
                self.live.insert(name.clone(), *file);
                Change::Link { name, file: *file }
            }
            Step::Write { file, offset, bytes } => {
                Change::Write { file: *file, offset: *offset, bytes: bytes.clone() }
            }
            Step::Truncate { file, length } => {
                Change::Length { file: *file, length: *length, cuts: true }
            }
            Step::Allocate { file, length } => {
                Change::Length { file: *file, length: *length, cuts: false }
            }
            Step::Rename { from, to } => {
                let (from, to) = (self.resolve(from), self.resolve(to));
                assert_eq!(from.0, to.0, "renamed into another directory");
                let file = self.live.remove(&from).expect("a known name");
                self.live.insert(to.clone(), file);
                Change::Rename { from, to, file }
            }
            Step::Remove { path } => {
                let name = self.resolve(path);
                let file = self.live.remove(&name).expect("a known name");
                Change::Unlink { name, file }
            }
            Step::Sync { file, since } => {
                let all = std::mem::take(&mut self.pending);
                for (at, change) in all {
                    if at < *since && change.of() == *file {
                        land(&mut self.files, &mut self.names, &change, |_| true);
                    } else {
                        self.pending.push((at, change));
                    }
                }
                return;
            }
            Step::Nudge { .. } | Step::Said(_) | Step::Sent => return,
        };
        self.pending.push((number, change));
    }

    fn resolve(&self, path: &Path) -> Name {
        let below = path.strip_prefix(&self.below).expect("below the directory");
        let mut parts: Vec<OsString> = below.iter().map(OsString::from).collect();
        let last = parts.pop().expect("a name");
        let mut dir = 0;
        for part in parts {
            dir = *self.live.get(&(dir, part)).expect("a known directory");
        }
        (dir, last)
    }

    /// How many changes are on their way.
    pub(crate) fn unsynced(&self) -> usize {
        self.pending.len()
    }

    /// The disk after a power cut now.
    pub(crate) fn cut(&self, fate: Fate) -> Image {
        let mut files = self.files.clone();
        let mut names = self.names.clone();
        let mut dice = Dice(if let Fate::Chance(seed) = fate { seed } else { 0 });
        // Sometimes nearly all was written, sometimes hardly anything.
        let odds = [1, 4, 7][dice.below(3) as usize];
        let torn = dice.below(2) == 0;
        for (_, change) in &self.pending {
            let whole = dice.below(8) < odds;
            land(&mut files, &mut names, change, |data| match fate {
                Fate::Lost => false,
                Fate::Landed => true,
                Fate::Chance(_) if data && torn => dice.below(8) < odds,
                Fate::Chance(_) => whole,
            });
        }
        let mut image = Image::new();
        let mut open = vec![(0, PathBuf::new())];
        while let Some((dir, path)) = open.pop() {
            for ((_, name), file) in names.iter().filter(|((parent, _), _)| *parent == dir) {
                let path = path.join(name);
                if self.dirs.contains(file) {
                    open.push((*file, path.clone()));
                    image.insert(path, None);
                } else {
                    image.insert(path, Some(files.get(file).cloned().unwrap_or_default()));
                }
            }
        }
        image
    }
}

/// A change reaches the platter where `reaches` says so; it is asked about each sector of a write,
/// with true, or about the whole.
fn land(
    files: &mut BTreeMap<Number, Vec<u8>>,
    names: &mut BTreeMap<Name, Number>,
    change: &Change,
    mut reaches: impl FnMut(bool) -> bool,
) {
    match change {
        Change::Write { file, offset, bytes } => {
            let content = files.entry(*file).or_default();
            let mut at = 0;
            while at < bytes.len() {
                let start = *offset as usize + at;
                let length = (SECTOR - start % SECTOR).min(bytes.len() - at);
                if reaches(true) {
                    if content.len() < start + length {
                        content.resize(start + length, 0);
                    }
                    content[start..start + length].copy_from_slice(&bytes[at..at + length]);
                }
                at += length;
            }
        }
        _ if !reaches(false) => {}
        Change::Length { file, length, cuts } => {
            let content = files.entry(*file).or_default();
            if *cuts || content.len() < *length as usize {
                content.resize(*length as usize, 0);
            }
        }
        Change::Link { name, file } => {
            names.insert(name.clone(), *file);
        }
        Change::Rename { from, to, file } => {
            if names.get(from) == Some(file) {
                names.remove(from);
            }
            names.insert(to.clone(), *file);
        }
        Change::Unlink { name, file } => {
            if names.get(name) == Some(file) {
                names.remove(name);
            }
        }
    }
}

/// Tells images apart.
pub(crate) fn print_of(image: &Image) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for (path, content) in image {
        hasher.update(path.as_os_str().as_encoded_bytes());
        hasher.update(&[0, u8::from(content.is_some())]);
        let content = content.as_deref().unwrap_or_default();
        hasher.update(&(content.len() as u64).to_le_bytes());
        hasher.update(content);
    }
    hasher.finalize().into()
}

/// Makes `dir`, which is empty, hold `image`.
pub(crate) fn lay_out(image: &Image, dir: &Path) {
    fs::set_permissions(dir, Permissions::from_mode(0o700)).expect("made private");
    // Paths are sorted: a directory comes before what is in it.
    for (path, content) in image {
        let path = dir.join(path);
        match content {
            Some(content) => fs::write(&path, content).expect("written"),
            None => fs::create_dir(&path).expect("made"),
        }
    }
}
