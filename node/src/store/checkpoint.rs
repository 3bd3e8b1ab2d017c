//! The checkpoint: the whole state as one checksummed file, from which the database is rebuilt
//! when it cannot be trusted.
//!
//! ```text
//!  checkpoint-7 | header | frame .. frame END | frame END | frame frame END | ...
//!                          the whole state      what changed   what changed
//!
//!  frame        | length u32 | seq u64 | end u32 | entries u64 | hash u128 | crc32c u32 | writes
//! ```
//!
//! The first run of frames holds a whole state, each later run what one checkpoint changed; a
//! run counts once its END frame is there, and then the state is that after batch `seq`.
//! The file only grows, so a torn end harms nothing before it. When the changes have outgrown
//! the state they started from, the whole state is written to a new file that takes the old
//! one's place. So a byte of change is written here three times at most on average (once as a
//! change, at most twice when the whole is rewritten), whatever the size of the state.
//!
//! One generation is kept. An older one would be of no use: the journal since then is gone.
//! The second, independent copy of the state is the database itself.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::disk::{Disk, DiskFile, Fault, put_in_place, temporary};
use super::journal::{Header, HeaderError};
use super::write::{self, Sum, Write, take};

/// A state: what each key is set to.
pub(super) type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// What changed since a checkpoint: the last write to each key.
pub(super) type Changes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

const FRAME_HEADER: usize = 4 + 8 + 4 + 8 + 16 + 4;

/// A frame is closed when it has grown past this, in bytes.
const FRAME_BYTES: usize = 256 * 1024;

/// No frame is longer: one write over [`FRAME_BYTES`].
const FRAME_MAX: usize = FRAME_BYTES + 5 + write::KEY_MAX + write::VALUE_MAX;

/// What a checkpoint file was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// The state is that after this batch.
    pub(super) seq: u64,
    /// Where the first run ends.
    base_end: u64,
    /// Where the last whole run ends.
    end: u64,
    pub(super) sum: Sum,
}

/// Why a checkpoint file was not taken.
#[derive(Debug)]
pub(super) enum Unusable {
    Io(io::Error),
    Header(HeaderError),
    Damaged { offset: u64 },
}

/// The checkpoint files in `dir`, newest first.
pub(super) fn list(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("checkpoint-"));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            found.push((number, entry.path()));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

fn path_of(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("checkpoint-{number}"))
}

/// Reads a file from end to end and checks every frame; a run that is not whole ends it.
pub(super) fn inspect(path: &Path, owner: &[u8; 32]) -> Result<Extent, Unusable> {
    let mut extent: Option<Extent> = None;
    let mut offset = 0;
    let reached = read(path, owner, |frame, _| {
        offset = frame.end_offset;
        if frame.end {
            let base_end = extent.map_or(frame.end_offset, |extent| extent.base_end);
            let (seq, sum) = (frame.seq, frame.sum);
            extent = Some(Extent { seq, base_end, end: frame.end_offset, sum });
        }
        true
    })?;
    extent.ok_or(Unusable::Damaged { offset: offset.max(reached) })
}

/// The state that an inspected file holds.
pub(super) fn load(path: &Path, owner: &[u8; 32], extent: &Extent) -> Result<Entries, Unusable> {
    let mut entries = Entries::new();
    read(path, owner, |frame, writes| {
        if frame.end_offset > extent.end {
            return false;
        }
        for Write { key, value } in writes {
            match value {
                Some(value) => entries.insert(key, value),
                None => entries.remove(&key),
            };
        }
        true
    })?;
    if Sum::of(entries.iter()) != extent.sum {
        return Err(Unusable::Damaged { offset: extent.end });
    }
    Ok(entries)
}

struct Frame {
    seq: u64,
    end: bool,
    sum: Sum,
    end_offset: u64,
}

/// Calls `each` with every whole frame until it says no, and returns where reading ended.
fn read(
    path: &Path,
    owner: &[u8; 32],
    mut each: impl FnMut(Frame, Vec<Write>) -> bool,
) -> Result<u64, Unusable> {
    let mut file = BufReader::new(File::open(path).map_err(Unusable::Io)?);
    let mut head = vec![0; HEADER];
    if !fill(&mut file, &mut head)? {
        return Err(Unusable::Header(HeaderError::Damaged("the header is cut off")));
    }
    Header::decode(&head, owner).map_err(Unusable::Header)?;
    let mut offset = HEADER as u64;
    let mut head = [0; FRAME_HEADER];
    while fill(&mut file, &mut head)? {
        let Some((length, mut frame, crc)) = frame_header(&head) else { break };
        let mut bytes = vec![0; length];
        if !fill(&mut file, &mut bytes)? {
            break;
        }
        let signed = head.get(..FRAME_HEADER - 4).unwrap_or_default();
        if crc32c::crc32c_append(crc32c::crc32c(signed), &bytes) != crc {
            break;
        }
        let Some(writes) = decode_all(&bytes) else { break };
        offset += (FRAME_HEADER + length) as u64;
        frame.end_offset = offset;
        if !each(frame, writes) {
            break;
        }
    }
    Ok(offset)
}

fn frame_header(mut head: &[u8]) -> Option<(usize, Frame, u32)> {
    let length = u32::from_le_bytes(take(&mut head)?) as usize;
    let seq = u64::from_le_bytes(take(&mut head)?);
    let end = u32::from_le_bytes(take(&mut head)?) != 0;
    let entries = u64::from_le_bytes(take(&mut head)?);
    let hash = u128::from_le_bytes(take(&mut head)?);
    let crc = u32::from_le_bytes(take(&mut head)?);
    let frame = Frame { seq, end, sum: Sum { entries, hash }, end_offset: 0 };
    (length <= FRAME_MAX).then_some((length, frame, crc))
}

fn decode_all(mut bytes: &[u8]) -> Option<Vec<Write>> {
    let mut writes = Vec::new();
    while !bytes.is_empty() {
        writes.push(write::decode(&mut bytes)?);
    }
    Some(writes)
}

/// Fills `bytes`; false when the file ends first.
fn fill(file: &mut impl Read, bytes: &mut [u8]) -> Result<bool, Unusable> {
    match file.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(Unusable::Io(error)),
    }
}

/// The header is the store's own, in one block.
const HEADER: usize = 512;

/// A checkpoint file, open for appending.
#[derive(Debug)]
pub(super) struct Checkpoint {
    dir: PathBuf,
    header: Header,
    number: u64,
    path: PathBuf,
    file: Box<dyn DiskFile>,
    base_end: u64,
    end: u64,
}

impl Checkpoint {
    /// Opens an inspected file and cuts off what follows its last whole run.
    pub(super) fn open(
        disk: &dyn Disk,
        dir: &Path,
        header: &Header,
        number: u64,
        extent: &Extent,
    ) -> Result<Self, Fault> {
        let path = path_of(dir, number);
        let mut file = disk.open(&path).map_err(Fault::write(&path))?;
        file.truncate(extent.end).map_err(Fault::write(&path))?;
        Ok(Self {
            dir: dir.to_owned(),
            header: *header,
            number,
            path,
            file,
            base_end: extent.base_end,
            end: extent.end,
        })
    }

    /// Writes a whole state, whose sum is `sum`, to a new file and gives it its place. Files of
    /// lower numbers stay until [`Self::remove_older`].
    pub(super) fn create(
        disk: &dyn Disk,
        dir: &Path,
        header: &Header,
        number: u64,
        seq: u64,
        sum: Sum,
        entries: impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), Fault>>,
    ) -> Result<Self, Fault> {
        let path = path_of(dir, number);
        let unfinished = temporary(&path);
        let write = || {
            let mut file = disk.create(&unfinished).map_err(Fault::write(&unfinished))?;
            let mut head = header.encode();
            head.resize(HEADER, 0);
            file.write_at(0, &head).map_err(Fault::write(&unfinished))?;
            let mut read = Sum::default();
            let mut frames = Frames { end: HEADER as u64, bytes: Vec::new(), seq };
            for entry in entries {
                let (key, value) = entry?;
                read.add(&key, &value);
                frames
                    .push(file.as_mut(), &key, Some(&value))
                    .map_err(Fault::write(&unfinished))?;
            }
            if read != sum {
                // The state that was to be written is not the one that was kept: the database
                // lost something while in use. The file that is there stays.
                let what = "entries are missing from the state to be written".into();
                return Err(Fault::Tree { path: dir.to_owned(), source: what });
            }
            let end = frames.finish(file.as_mut(), sum).map_err(Fault::write(&unfinished))?;
            file.sync().map_err(Fault::sync(&unfinished))?;
            put_in_place(disk, &unfinished, &path)?;
            Ok((file, end))
        };
        let written = write();
        if written.is_err() {
            // On a full disk what was written so far is what is lacking.
            let _ = disk.remove(&unfinished);
        }
        let (file, end) = written?;
        let (dir, header) = (dir.to_owned(), *header);
        Ok(Self { dir, header, number, path, file, base_end: end, end })
    }

    /// Appends what changed up to batch `seq` and syncs it; `sum` is the state's after that.
    /// When the disk is full nothing has happened and it can be tried again. Returns the bytes
    /// written.
    pub(super) fn append(&mut self, seq: u64, changes: &Changes, sum: Sum) -> Result<u64, Fault> {
        let mut frames = Frames { end: self.end, bytes: Vec::new(), seq };
        let mut write = || {
            for (key, value) in changes {
                frames.push(self.file.as_mut(), key, value.as_deref())?;
            }
            frames.finish(self.file.as_mut(), sum)
        };
        let end = match write() {
            Ok(end) => end,
            Err(source) => {
                let fault = Fault::write(&self.path)(source);
                self.file.truncate(self.end).map_err(Fault::write(&self.path))?;
                return Err(fault);
            }
        };
        self.file.sync().map_err(Fault::sync(&self.path))?;
        let written = end - self.end;
        self.end = end;
        Ok(written)
    }

    /// How long the file is, in bytes: the state alone is no longer.
    pub(super) const fn len(&self) -> u64 {
        self.end
    }

    /// Whether the changes have outgrown the state they started from, and `least` bytes.
    pub(super) fn wants_rewrite(&self, least: u64) -> bool {
        self.end - self.base_end > self.base_end.max(least)
    }

    /// A new file with the whole state, which takes this one's place. Returns its bytes.
    pub(super) fn rewrite(
        &mut self,
        disk: &dyn Disk,
        seq: u64,
        sum: Sum,
        entries: impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), Fault>>,
    ) -> Result<u64, Fault> {
        let number = self.number + 1;
        *self = Self::create(disk, &self.dir, &self.header, number, seq, sum, entries)?;
        self.remove_older(disk)?;
        Ok(self.end)
    }

    /// Removes the files that this one replaces.
    pub(super) fn remove_older(&self, disk: &dyn Disk) -> Result<(), Fault> {
        let older = list(&self.dir).map_err(Fault::write(&self.dir))?;
        for (_, path) in older.into_iter().filter(|(number, _)| *number < self.number) {
            disk.remove(&path).map_err(Fault::write(&path))?;
        }
        Ok(())
    }
}

/// Frames on their way into a file.
struct Frames {
    end: u64,
    bytes: Vec<u8>,
    seq: u64,
}

impl Frames {
    fn push(
        &mut self,
        file: &mut dyn DiskFile,
        key: &[u8],
        value: Option<&[u8]>,
    ) -> io::Result<()> {
        if self.bytes.is_empty() {
            self.bytes.resize(FRAME_HEADER, 0);
        }
        write::encode(key, value, &mut self.bytes);
        if self.bytes.len() > FRAME_HEADER + FRAME_BYTES {
            self.write(file, false, Sum::default())?;
        }
        Ok(())
    }

    fn finish(&mut self, file: &mut dyn DiskFile, sum: Sum) -> io::Result<u64> {
        if self.bytes.is_empty() {
            self.bytes.resize(FRAME_HEADER, 0);
        }
        self.write(file, true, sum)?;
        Ok(self.end)
    }

    fn write(&mut self, file: &mut dyn DiskFile, end: bool, sum: Sum) -> io::Result<()> {
        let (front, writes) = self.bytes.split_at_mut(FRAME_HEADER);
        let mut head = Vec::with_capacity(FRAME_HEADER);
        head.extend_from_slice(&(writes.len() as u32).to_le_bytes());
        head.extend_from_slice(&self.seq.to_le_bytes());
        head.extend_from_slice(&u32::from(end).to_le_bytes());
        head.extend_from_slice(&sum.entries.to_le_bytes());
        head.extend_from_slice(&sum.hash.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head), writes);
        head.extend_from_slice(&crc.to_le_bytes());
        front.copy_from_slice(&head);
        file.write_at(self.end, &self.bytes)?;
        self.end += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}
