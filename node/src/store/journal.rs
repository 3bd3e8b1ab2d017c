//! The journal: preallocated segments, written in a circle, that take every batch first.
//!
//! ```text
//!  journal-0   | header | group | group | group | ............ zeros or older groups ....... |
//!              0      4 KiB                                                       segment_bytes
//!
//!  group       | mark 16 | first u64 | count u32 | length u32 | crc32c u32 | batches ... | pad
//! ```
//!
//! A *group* is what one sync makes durable: one or more batches with consecutive sequence
//! numbers, `first .. first + count`, starting on a 4 KiB block of its own. Four rules carry
//! the rest:
//!
//! 1. **A block that was acknowledged is never written again** until its segment is free, so a
//!    torn write can only harm what nobody was told about. (Price: a lone small batch takes
//!    4 KiB. Under load a group holds many.)
//! 2. **One group is in flight at a time**: written, synced, then the next. So after a power
//!    cut only the newest group may be torn, and a missing group with later ones behind it is
//!    damage, never an accident of timing.
//! 3. **Sequence numbers rise for ever.** What an earlier turn of the circle left in a segment
//!    has numbers that the checkpoint already covers, so it is never taken for something new.
//!    A segment is written again only when the checkpoint covers all of it, and a new run
//!    starts in the segment after the newest group: the newest group is always on the disk, so
//!    how far the store had come is always known.
//! 4. **The mark is 16 random bytes**, chosen when the journal is made and known only to its
//!    owner. Values hold bytes that strangers chose; without the mark, a value could carry the
//!    image of a group at a block boundary and have it found there after its segment was
//!    partly overwritten.
//!
//! The header of a segment is written once and never again. Segments are filled with zeros
//! when they are made, see [`super::disk::zero_fill`] for why and for what it saves.
//!
//! Not told apart: a torn newest group and one whose bytes were changed on the disk later.
//! Both end the journal, and the bytes given up are reported. A changed byte anywhere before
//! that is an error that names the place.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::disk::{Disk, DiskFile, Fault, zero_fill};
use super::write::{self, Write, take};

/// Groups start on multiples of this, and the header fills the first.
pub(super) const BLOCK: u64 = 4096;

/// Batches in one group, at most.
pub(super) const GROUP_BATCHES: usize = 256;

/// Bytes of batches in one group, at most (less where segments are small).
pub(super) const GROUP_BYTES: u64 = 1024 * 1024;

const GROUP_HEADER: usize = 16 + 8 + 4 + 4 + 4;

/// Format version of header, journal and checkpoint together.
pub(super) const VERSION: u16 = 1;

const MAGIC: [u8; 16] = *b"leasehold-store\0";

/// What was chosen when the store was made. It stands in the file `format` and at the head of
/// every segment, where `index` says which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) owner: [u8; 32],
    pub(super) mark: [u8; 16],
    pub(super) segments: u16,
    pub(super) segment_bytes: u64,
    pub(super) index: u16,
}

/// Why a header was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HeaderError {
    Damaged(&'static str),
    Version(u16),
    Foreign([u8; 32]),
}

impl Header {
    /// `index` in the file `format`, which is no segment.
    pub(super) const FORMAT: u16 = u16::MAX;
    const LEN: usize = 16 + 2 + 2 + 2 + 8 + 32 + 16 + 4;

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.index.to_le_bytes());
        bytes.extend_from_slice(&self.segments.to_le_bytes());
        bytes.extend_from_slice(&self.segment_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.owner);
        bytes.extend_from_slice(&self.mark);
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header at the front of `bytes` and checks that it is `owner`'s.
    pub(super) fn decode(bytes: &[u8], owner: &[u8; 32]) -> Result<Self, HeaderError> {
        const SHORT: HeaderError = HeaderError::Damaged("the header is cut off");
        let signed = bytes.get(..Self::LEN - 4).ok_or(SHORT)?;
        let mut rest = bytes;
        if take(&mut rest) != Some(MAGIC) {
            return Err(HeaderError::Damaged("this is no file of a store"));
        }
        let version = u16::from_le_bytes(take(&mut rest).ok_or(SHORT)?);
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        let header = Self {
            index: u16::from_le_bytes(take(&mut rest).ok_or(SHORT)?),
            segments: u16::from_le_bytes(take(&mut rest).ok_or(SHORT)?),
            segment_bytes: u64::from_le_bytes(take(&mut rest).ok_or(SHORT)?),
            owner: take(&mut rest).ok_or(SHORT)?,
            mark: take(&mut rest).ok_or(SHORT)?,
        };
        if u32::from_le_bytes(take(&mut rest).ok_or(SHORT)?) != crc32c::crc32c(signed) {
            return Err(HeaderError::Damaged("the header's checksum does not hold"));
        }
        if header.owner != *owner {
            return Err(HeaderError::Foreign(header.owner));
        }
        Ok(header)
    }

    /// Bytes of batches that one group may hold here.
    pub(super) fn group_bytes(&self) -> u64 {
        GROUP_BYTES.min(self.segment_bytes / 4)
    }

    /// Bytes that all segments together can hold.
    pub(super) fn capacity(&self) -> u64 {
        (self.segment_bytes - BLOCK).saturating_mul(u64::from(self.segments))
    }
}

/// The path of segment `index`.
pub(super) fn segment_path(dir: &Path, index: u16) -> PathBuf {
    dir.join(format!("journal-{index}"))
}

/// Makes all segments, zero-filled and synced. Their names become durable with the directory.
pub(super) fn create(disk: &dyn Disk, dir: &Path, header: &Header) -> Result<(), Fault> {
    for index in 0..header.segments {
        let path = segment_path(dir, index);
        let mut file = disk.create(&path).map_err(Fault::write(&path))?;
        zero_fill(file.as_mut(), header.segment_bytes).map_err(Fault::write(&path))?;
        let head = Header { index, ..*header }.encode();
        file.write_at(0, &head).map_err(Fault::write(&path))?;
        file.sync().map_err(Fault::sync(&path))?;
    }
    Ok(())
}

/// One group being put together: the bytes of its batches after room for its header.
#[derive(Debug)]
pub(super) struct Group {
    bytes: Vec<u8>,
    mark: [u8; 16],
    first: u64,
    count: u32,
}

impl Group {
    pub(super) fn new(mark: [u8; 16]) -> Self {
        Self { bytes: Vec::new(), mark, first: 0, count: 0 }
    }

    /// Starts over; the next batch gets `first`.
    pub(super) fn begin(&mut self, first: u64) {
        self.bytes.clear();
        self.bytes.resize(GROUP_HEADER, 0);
        self.first = first;
        self.count = 0;
    }

    /// Adds a batch and returns its sequence number.
    pub(super) fn push(&mut self, batch: &[Write]) -> u64 {
        self.bytes.extend_from_slice(&(batch.len() as u32).to_le_bytes());
        for write in batch {
            write::encode(&write.key, write.value.as_deref(), &mut self.bytes);
        }
        self.count += 1;
        self.last()
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// The highest sequence number given out, `first - 1` while there is none.
    pub(super) fn last(&self) -> u64 {
        self.first + u64::from(self.count) - 1
    }

    /// Bytes of batches so far.
    pub(super) fn batch_bytes(&self) -> u64 {
        (self.bytes.len() - GROUP_HEADER) as u64
    }

    /// Writes the header and returns the whole group.
    fn seal(&mut self) -> &[u8] {
        let length = (self.bytes.len() - GROUP_HEADER) as u32;
        let mut head = Vec::with_capacity(GROUP_HEADER);
        head.extend_from_slice(&self.mark);
        head.extend_from_slice(&self.first.to_le_bytes());
        head.extend_from_slice(&self.count.to_le_bytes());
        head.extend_from_slice(&length.to_le_bytes());
        let (front, batches) = self.bytes.split_at_mut(GROUP_HEADER);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head), batches);
        head.extend_from_slice(&crc.to_le_bytes());
        front.copy_from_slice(&head);
        &self.bytes
    }
}

#[cfg(test)]
impl Group {
    pub(super) fn sealed_for_test(&mut self) -> &[u8] {
        self.seal()
    }
}

#[cfg(test)]
impl Scan {
    /// Path, offset and length of the group that holds batch `seq`.
    pub(super) fn place_of(&self, seq: u64) -> Option<(PathBuf, u64, u64)> {
        let holds = |group: &&Found| (group.first..=group.last).contains(&seq);
        let group = self.groups.iter().find(holds)?;
        Some((group.path.clone(), group.offset, group.length))
    }
}

/// Bytes of one batch inside a group.
pub(super) fn batch_len(batch: &[Write]) -> u64 {
    4 + batch.iter().map(|write| write.encoded_len() as u64).sum::<u64>()
}

/// The segments, open for writing.
#[derive(Debug)]
pub(super) struct Journal {
    segments: Vec<Segment>,
    active: usize,
    offset: u64,
    segment_bytes: u64,
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: Box<dyn DiskFile>,
    /// The highest sequence number written here in this run, 0 for none.
    last: u64,
    /// Bytes of groups written here in this run.
    used: u64,
}

impl Journal {
    /// Opens all segments; the first group goes to the one after `newest`. The caller's
    /// checkpoint covers everything in them.
    pub(super) fn open(
        disk: &dyn Disk,
        dir: &Path,
        header: &Header,
        newest: Option<u16>,
    ) -> Result<Self, Fault> {
        let mut segments = Vec::new();
        for index in 0..header.segments {
            let path = segment_path(dir, index);
            let file = disk.open(&path).map_err(Fault::write(&path))?;
            segments.push(Segment { path, file, last: 0, used: 0 });
        }
        let active = newest.map_or(0, |newest| usize::from(newest) + 1) % segments.len().max(1);
        Ok(Self { segments, active, offset: BLOCK, segment_bytes: header.segment_bytes })
    }

    /// Whether `group` still fits into the active segment.
    pub(super) fn fits(&self, group: &Group) -> bool {
        self.offset + blocks(group.bytes.len() as u64) <= self.segment_bytes
    }

    /// Whether the next segment may be written again, given what the checkpoint covers.
    pub(super) fn next_is_free(&self, checkpointed: u64) -> bool {
        self.segments.get(self.next()).is_some_and(|segment| segment.last <= checkpointed)
    }

    /// Goes on in the next segment, which must be free. Costs nothing: its groups stay what
    /// they were until they are overwritten, and their numbers are all below the checkpoint's.
    pub(super) fn rotate(&mut self) {
        self.active = self.next();
        self.offset = BLOCK;
        if let Some(segment) = self.segments.get_mut(self.active) {
            segment.last = 0;
            segment.used = 0;
        }
    }

    /// Writes `group`, which fits, and syncs it. Returns the bytes taken.
    pub(super) fn append(&mut self, group: &mut Group) -> Result<u64, Fault> {
        let last = group.last();
        let bytes = group.seal();
        let taken = blocks(bytes.len() as u64);
        let Some(segment) = self.segments.get_mut(self.active) else { return Ok(0) };
        segment.file.write_at(self.offset, bytes).map_err(Fault::write(&segment.path))?;
        segment.file.sync().map_err(Fault::sync(&segment.path))?;
        self.offset += taken;
        segment.last = last;
        segment.used += taken;
        Ok(taken)
    }

    /// Bytes held by groups that the checkpoint does not cover, counted by whole segments, but
    /// for the active one, which gives nothing back before it is full.
    pub(super) fn used(&self, checkpointed: u64) -> u64 {
        self.segments
            .iter()
            .enumerate()
            .filter(|(index, segment)| *index == self.active || segment.last > checkpointed)
            .map(|(_, segment)| segment.used)
            .sum()
    }

    fn next(&self) -> usize {
        (self.active + 1) % self.segments.len().max(1)
    }
}

fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK) * BLOCK
}

/// Damage, and where.
#[derive(Debug)]
pub(super) struct Damage {
    pub(super) path: PathBuf,
    pub(super) offset: u64,
    pub(super) what: Broken,
}

#[derive(Debug)]
pub(super) enum Broken {
    Header(HeaderError),
    Io(io::Error),
    Other(String),
}

/// All that the segments hold, whole or not.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Whole groups, by rising sequence number.
    groups: Vec<Found>,
    /// What begins like a group but does not end like one.
    torn: Vec<Found>,
}

/// Where a group was found.
#[derive(Debug, Clone)]
struct Found {
    first: u64,
    last: u64,
    segment: u16,
    path: PathBuf,
    offset: u64,
    /// With its header.
    length: u64,
}

impl Scan {
    /// Reads all segments of `format`'s journal, one at a time.
    pub(super) fn read(dir: &Path, format: &Header) -> Result<Self, Damage> {
        let mut scan = Self::default();
        for index in 0..format.segments {
            let path = segment_path(dir, index);
            let damage = |offset, what| Damage { path: path.clone(), offset, what };
            let mut file = File::open(&path).map_err(|error| damage(0, Broken::Io(error)))?;
            let length = file.metadata().map_err(|error| damage(0, Broken::Io(error)))?.len();
            if length != format.segment_bytes {
                let what = format!("{length} bytes long instead of {}", format.segment_bytes);
                return Err(damage(length.min(format.segment_bytes), Broken::Other(what)));
            }
            let mut bytes = Vec::with_capacity(length as usize);
            let read = file.by_ref().take(length).read_to_end(&mut bytes);
            read.map_err(|error| damage(0, Broken::Io(error)))?;
            let header = Header::decode(&bytes, &format.owner)
                .map_err(|error| damage(0, Broken::Header(error)))?;
            if header != (Header { index, ..*format }) {
                let what = "a segment of another journal of the same owner".to_owned();
                return Err(damage(0, Broken::Other(what)));
            }
            scan.segment(&path, index, &bytes, &format.mark);
        }
        scan.groups.sort_by_key(|group| group.first);
        Ok(scan)
    }

    fn segment(&mut self, path: &Path, segment: u16, bytes: &[u8], mark: &[u8; 16]) {
        let mut offset = BLOCK;
        while let Some(rest) = bytes.get(offset as usize..)
            && !rest.is_empty()
        {
            offset += match inspect(rest, mark) {
                None => BLOCK,
                Some(Inspected { first, count, length, whole }) => {
                    let last = first + u64::from(count) - 1;
                    let path = path.to_owned();
                    let found = Found { first, last, segment, path, offset, length };
                    if whole {
                        self.groups.push(found);
                        blocks(length)
                    } else {
                        self.torn.push(found);
                        BLOCK
                    }
                }
            };
        }
    }

    /// The highest sequence number that a whole group holds, 0 for none.
    pub(super) fn newest(&self) -> u64 {
        self.groups.last().map_or(0, |group| group.last)
    }

    /// The segment that holds the newest group.
    pub(super) fn newest_segment(&self) -> Option<u16> {
        self.groups.last().map(|group| group.segment)
    }

    /// Bytes of the group after `last` that did not reach the disk whole.
    pub(super) fn torn_after(&self, last: u64) -> u64 {
        let torn = self.torn.iter().filter(|torn| torn.first == last + 1);
        torn.map(|torn| torn.length).max().unwrap_or(0)
    }

    /// Checks that every batch after `base` is there once, up to the newest.
    pub(super) fn bridges_from(&self, base: u64) -> Result<(), Damage> {
        let mut last = base;
        let mut before: Option<&Found> = None;
        for group in &self.groups {
            if group.last <= base {
                before = Some(group);
                continue;
            }
            if group.first > last + 1 {
                return Err(self.hole(last + 1, group, before));
            }
            if before.is_some_and(|before| group.first <= before.last) {
                let what = format!("batch {} is there twice", group.first);
                let (path, offset) = (group.path.clone(), group.offset);
                return Err(Damage { path, offset, what: Broken::Other(what) });
            }
            last = group.last;
            before = Some(group);
        }
        Ok(())
    }

    /// Says where batch `missing` should be: where a damaged group says it is it, or else
    /// behind the one before.
    fn hole(&self, missing: u64, next: &Found, before: Option<&Found>) -> Damage {
        let torn = self.torn.iter().find(|torn| (torn.first..=torn.last).contains(&missing));
        let (path, offset) = match (torn, before) {
            (Some(torn), _) => (torn.path.clone(), torn.offset),
            (None, Some(before)) if before.last + 1 == missing => {
                (before.path.clone(), before.offset + blocks(before.length))
            }
            (None, _) => (next.path.clone(), next.offset),
        };
        let what = format!(
            "batch {missing} is damaged or gone, although batch {} was written after it",
            next.first
        );
        Damage { path, offset, what: Broken::Other(what) }
    }

    /// Calls `each` with every batch after `base`, in order.
    pub(super) fn replay(
        &self,
        base: u64,
        mut each: impl FnMut(u64, Vec<Write>),
    ) -> Result<(), Damage> {
        for group in self.groups.iter().filter(|group| group.last > base) {
            let damage = |what| Damage { path: group.path.clone(), offset: group.offset, what };
            let file = File::open(&group.path).map_err(|error| damage(Broken::Io(error)))?;
            let mut bytes = vec![0; group.length as usize];
            file.read_exact_at(&mut bytes, group.offset)
                .map_err(|error| damage(Broken::Io(error)))?;
            let mut rest = bytes.get(GROUP_HEADER..).unwrap_or_default();
            for seq in group.first..=group.last {
                let Some(batch) = decode_batch(&mut rest) else {
                    let what = format!("batch {seq} has a valid checksum but cannot be read");
                    return Err(damage(Broken::Other(what)));
                };
                if seq > base {
                    each(seq, batch);
                }
            }
        }
        Ok(())
    }
}

fn decode_batch(bytes: &mut &[u8]) -> Option<Vec<Write>> {
    let count = u32::from_le_bytes(take(bytes)?);
    // The count is not trusted for an allocation: each write takes five bytes at least.
    if count as usize > bytes.len() / 5 {
        return None;
    }
    (0..count).map(|_| write::decode(bytes)).collect()
}

struct Inspected {
    first: u64,
    count: u32,
    length: u64,
    whole: bool,
}

/// What a block begins with, when it begins with a group's header.
fn inspect(bytes: &[u8], mark: &[u8; 16]) -> Option<Inspected> {
    let mut rest = bytes;
    if take::<16>(&mut rest)? != *mark {
        return None;
    }
    let first = u64::from_le_bytes(take(&mut rest)?);
    let count = u32::from_le_bytes(take(&mut rest)?);
    let length = u32::from_le_bytes(take(&mut rest)?) as usize;
    let signed = bytes.get(..GROUP_HEADER - 4)?;
    let crc = u32::from_le_bytes(take(&mut rest)?);
    let plausible = first > 0 && (1..=GROUP_BATCHES as u32).contains(&count);
    if !plausible || first.checked_add(u64::from(count)).is_none() {
        return None;
    }
    let whole = rest
        .get(..length)
        .is_some_and(|batches| crc32c::crc32c_append(crc32c::crc32c(signed), batches) == crc);
    let length = (GROUP_HEADER + length.min(rest.len())) as u64;
    Some(Inspected { first, count, length, whole })
}
