//! Counters of the links, for `/metrics` and for tests. They only rise, except `links`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The running counters. Share it by `Arc`; read it with [`NetStats::snapshot`].
#[derive(Debug, Default)]
pub struct NetStats {
    pub(super) links: AtomicU64,
    pub(super) frames_in: AtomicU64,
    pub(super) frames_out: AtomicU64,
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
    pub(super) oversize: AtomicU64,
    pub(super) trailing: AtomicU64,
    pub(super) truncated: AtomicU64,
    pub(super) held_back: AtomicU64,
    pub(super) not_admitted: AtomicU64,
    pub(super) over_budget: AtomicU64,
    pub(super) turned_away: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) late_replies: AtomicU64,
    pub(super) busy: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Peers linked now.
    pub links: u64,
    /// Whole frames read.
    pub frames_in: u64,
    /// Whole frames written.
    pub frames_out: u64,
    /// Bytes of those frames, without their length prefixes.
    pub bytes_in: u64,
    /// The same, written.
    pub bytes_out: u64,
    /// Frames announced longer than the bound; each cost its peer the link.
    pub oversize: u64,
    /// Frames followed by more bytes; each cost its peer the link.
    pub trailing: u64,
    /// Streams that ended inside a frame. An honest peer that gives up leaves such a stream.
    pub truncated: u64,
    /// Frames of unadmitted peers that were left unread until admission.
    pub held_back: u64,
    /// Links closed because admission did not come in time.
    pub not_admitted: u64,
    /// Frames dropped because too many bytes waited for the loop already.
    pub over_budget: u64,
    /// Connections turned away by a connection limit.
    pub turned_away: u64,
    /// Requests of peers that the loop left without a reply for too long.
    pub expired: u64,
    /// Replies that came too late, twice or to a ticket that never was.
    pub late_replies: u64,
    /// Requests and asks dropped because too many were open.
    pub busy: u64,
}

impl NetStats {
    /// Reads all counters, each on its own: they may be a few events apart.
    pub fn snapshot(&self) -> NetCounts {
        NetCounts {
            links: self.links.load(Relaxed),
            frames_in: self.frames_in.load(Relaxed),
            frames_out: self.frames_out.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            oversize: self.oversize.load(Relaxed),
            trailing: self.trailing.load(Relaxed),
            truncated: self.truncated.load(Relaxed),
            held_back: self.held_back.load(Relaxed),
            not_admitted: self.not_admitted.load(Relaxed),
            over_budget: self.over_budget.load(Relaxed),
            turned_away: self.turned_away.load(Relaxed),
            expired: self.expired.load(Relaxed),
            late_replies: self.late_replies.load(Relaxed),
            busy: self.busy.load(Relaxed),
        }
    }

    pub(super) fn read(&self, bytes: usize) {
        count(&self.frames_in);
        self.bytes_in.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn wrote(&self, bytes: usize) {
        count(&self.frames_out);
        self.bytes_out.fetch_add(bytes as u64, Relaxed);
    }
}

/// One more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}
