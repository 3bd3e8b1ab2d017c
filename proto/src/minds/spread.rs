//! The map: everybody's records, newest wins, and who has to hear of which.
//!
//! ```text
//! new here --batched--> Announce(names) --> Pull(those new there) --> Records      (what changes)
//! Digest(256 hashes) --> Differ(names) --> Pull / Records      (on link-up, and every minute)
//! ```
//!
//! Announce-then-pull sends each record once per node that lacks it, not once per link; hashes by
//! bucket find what was missed. A record's version is (epoch, seq) by its signer. Two different
//! bodies under one version prove that the signer equivocates; both are kept.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::id::{Hash, KeyId};
use crate::base::time::{Boot, Span, Wall};
use crate::words::charter::Certificate;
use crate::words::message::{BUCKETS, MAX_NAMES, MAX_RECORDS, RecordName, RecordSaid};
use crate::words::object::Kind;
use crate::words::record::{HostRecord, Offer};
use crate::words::sign::{Signed, Verified};

/// How long news are collected before they are announced: three or four hops and as many pulls stay
/// well within a second, and in a busy fabric a link carries ten batches a second, not twenty.
const BATCH: Span = Span::millis(100);
/// How many bytes of records one message may carry.
const MAX_BATCH_BYTES: usize = 200 * 1024;
/// The longest a record may claim to live: a forged date must not outlast its signer for long.
const MAX_LIFE: Span = Span::secs(2 * 3600);
/// The most records of kinds unknown here that are kept and relayed.
const MAX_UNREAD: usize = 4_096;

/// The map of records.
#[derive(Debug, Default)]
pub struct Spread {
    records: BTreeMap<(KeyId, Kind), Held>,
    /// For each link, the records that it has not heard of from here.
    news: BTreeMap<KeyId, BTreeSet<(KeyId, Kind)>>,
    due: Option<Boot>,
    unread: usize,
}

#[derive(Debug)]
struct Held {
    said: RecordSaid,
    heard: Boot,
    /// Over version and content: whoever knows another content under this version is noticed.
    print: u64,
}

/// What became of a record.
#[derive(Debug)]
pub enum Taken {
    /// It is newer than what was known.
    New,
    /// Nothing new.
    Known,
    /// It is outdated or reaches too far into the future.
    Refused,
    /// The signer said two different things under one version: here are both.
    Equivocation(Signed, Signed),
}

impl Spread {
    /// Takes a record that `from` sent (`None`: this node's own).
    pub fn take(&mut self, now: Boot, wall: Wall, said: RecordSaid, from: Option<&KeyId>) -> Taken {
        let name = said.name();
        let not_after = match &said {
            RecordSaid::Host(record, _) => record.header().not_after,
            RecordSaid::Offer(record) => record.header().not_after,
            RecordSaid::Payloads(record) => record.header().not_after,
            RecordSaid::Unread(record) => record.header().not_after,
        };
        if not_after < wall || not_after > wall + MAX_LIFE {
            return Taken::Refused;
        }
        let slot = (name.key, name.kind);
        // A new life is told back to its own link as well: should it be another's, it must hear.
        let before = self.records.get(&slot).map(|known| known.said.name().epoch);
        let reborn = before.is_some_and(|epoch| epoch < name.epoch);
        if let Some(known) = self.records.get(&slot) {
            let was = known.said.name();
            match (name.epoch, name.seq).cmp(&(was.epoch, was.seq)) {
                std::cmp::Ordering::Less => return Taken::Known,
                std::cmp::Ordering::Equal if known.said.signed().id() == said.signed().id() => {
                    return Taken::Known;
                }
                std::cmp::Ordering::Equal => {
                    let pair = (known.said.signed().clone(), said.signed().clone());
                    return Taken::Equivocation(pair.0, pair.1);
                }
                std::cmp::Ordering::Greater => {}
            }
        } else if matches!(name.kind, Kind::Unknown(_)) {
            if self.unread >= MAX_UNREAD {
                return Taken::Refused;
            }
            self.unread += 1;
        }
        let print = fingerprint(&name);
        self.records.insert(slot, Held { said, heard: now, print });
        for (link, news) in &mut self.news {
            if Some(link) != from || reborn {
                news.insert(slot);
                self.due.get_or_insert(now + BATCH);
            }
        }
        Taken::New
    }

    /// A link to `peer` is up and admitted: from now on it hears news.
    pub fn linked(&mut self, peer: KeyId) {
        self.news.entry(peer).or_default();
    }

    /// The link to `peer` is gone.
    pub fn unlinked(&mut self, peer: &KeyId) {
        self.news.remove(peer);
    }

    /// What to announce to whom, if it is time.
    pub fn announcements(&mut self, now: Boot) -> Vec<(KeyId, Vec<RecordName>)> {
        if self.due.is_none_or(|due| due > now) {
            return Vec::new();
        }
        self.due = None;
        let records = &self.records;
        let mut out = Vec::new();
        for (link, news) in &mut self.news {
            if news.is_empty() {
                continue;
            }
            let slots = std::mem::take(news);
            let names: Vec<_> =
                slots.iter().filter_map(|slot| Some(records.get(slot)?.said.name())).collect();
            out.extend(names.chunks(MAX_NAMES).map(|chunk| (*link, chunk.to_vec())));
        }
        out
    }

    /// When the next announcement is due.
    #[must_use]
    pub const fn next_wake(&self) -> Option<Boot> {
        self.due
    }

    /// `from` knows `names`: what is not newer here need not be told to it.
    pub fn known_to(&mut self, from: &KeyId, names: &[RecordName]) {
        let Some(news) = self.news.get_mut(from) else { return };
        for name in names {
            let slot = (name.key, name.kind);
            let ours = self.records.get(&slot).map(|held| held.said.name());
            if ours.is_some_and(|ours| (ours.epoch, ours.seq) <= (name.epoch, name.seq)) {
                news.remove(&slot);
            }
        }
    }

    /// Of `names`, those that are newer than what is known here.
    #[must_use]
    pub fn lacking(&self, names: &[RecordName]) -> Vec<RecordName> {
        let newer = |name: &&RecordName| {
            self.records.get(&(name.key, name.kind)).is_none_or(|known| {
                let was = known.said.name();
                // Of the same version but another body: to be looked at, as proof.
                (was.epoch, was.seq) < (name.epoch, name.seq)
                    || (was.epoch, was.seq) == (name.epoch, name.seq) && was.tag != name.tag
            })
        };
        names.iter().filter(newer).take(MAX_NAMES).copied().collect()
    }

    /// The records named (at whatever version is known now), in messages of bounded size.
    #[must_use]
    pub fn batches(&self, names: &[RecordName]) -> Vec<Vec<Signed>> {
        let mut batches = vec![];
        let (mut batch, mut size) = (Vec::new(), 0);
        for name in names.iter().take(MAX_NAMES) {
            let Some(held) = self.records.get(&(name.key, name.kind)) else { continue };
            let signed = held.said.signed();
            let bytes = signed.envelope.len() + 80;
            if batch.len() == MAX_RECORDS || size + bytes > MAX_BATCH_BYTES {
                batches.push(std::mem::take(&mut batch));
                size = 0;
            }
            size += bytes;
            batch.push(signed.clone());
        }
        if !batch.is_empty() {
            batches.push(batch);
        }
        batches
    }

    /// One hash per bucket over all versions known here.
    #[must_use]
    pub fn digest(&self) -> Vec<u64> {
        let mut buckets = vec![0u64; BUCKETS];
        for held in self.records.values() {
            let name = held.said.name();
            if let Some(bucket) = buckets.get_mut(usize::from(name.key.0[0])) {
                *bucket ^= held.print;
            }
        }
        buckets
    }

    /// The buckets where `theirs` differs, as many as one message can name whole, and all names
    /// here in them.
    #[must_use]
    pub fn differing(&self, theirs: &[u64]) -> (Vec<u8>, Vec<RecordName>) {
        let ours = self.digest();
        let differs =
            |bucket: &u8| ours.get(usize::from(*bucket)) != theirs.get(usize::from(*bucket));
        let (mut buckets, mut names) = (Vec::new(), Vec::new());
        // From another bucket each time, so that in a busy fabric the last have their turn too.
        let start = theirs.iter().fold(0, |mixed, hash| mixed ^ hash).to_le_bytes()[0];
        for bucket in (0..=u8::MAX).map(|n| start.wrapping_add(n)).filter(differs) {
            let more: Vec<_> = self.in_buckets(&[bucket]).take(MAX_NAMES).collect();
            if names.len() + more.len() > MAX_NAMES {
                break;
            }
            buckets.push(bucket);
            names.extend(more);
        }
        (buckets, names)
    }

    /// Names here in `buckets` that `theirs`, which is all that is known there in them, lacks or
    /// has older, or under the same version with another tag: then somebody said two things under
    /// one version, and what is known here is shown, so that both are seen side by side.
    #[must_use]
    pub fn ahead_of(&self, buckets: &[u8], theirs: &[RecordName]) -> Vec<RecordName> {
        let known: BTreeMap<_, _> =
            theirs.iter().map(|n| ((n.key, n.kind), (n.epoch, n.seq, n.tag))).collect();
        self.in_buckets(buckets)
            .filter(|name| match known.get(&(name.key, name.kind)) {
                None => true,
                Some((epoch, seq, tag)) => {
                    (*epoch, *seq) < (name.epoch, name.seq)
                        || (*epoch, *seq) == (name.epoch, name.seq) && *tag != name.tag
                }
            })
            .take(MAX_NAMES)
            .collect()
    }

    fn in_buckets(&self, buckets: &[u8]) -> impl Iterator<Item = RecordName> {
        let wanted: BTreeSet<u8> = buckets.iter().copied().collect();
        wanted.into_iter().flat_map(|bucket| {
            let edge = |byte: u8| {
                let mut key = [byte; 32];
                key[0] = bucket;
                KeyId(key)
            };
            let range = (edge(0), Kind::from_number(0))..=(edge(u8::MAX), Kind::Unknown(u16::MAX));
            self.records.range(range).map(|(_, held)| held.said.name())
        })
    }

    /// Forgets records that are over.
    pub fn expire(&mut self, wall: Wall) {
        let unread = &mut self.unread;
        self.records.retain(|(_, kind), held| {
            let keep = match &held.said {
                RecordSaid::Host(record, _) => record.header().not_after >= wall,
                RecordSaid::Offer(record) => record.header().not_after >= wall,
                RecordSaid::Payloads(record) => record.header().not_after >= wall,
                RecordSaid::Unread(record) => record.header().not_after >= wall,
            };
            if !keep && matches!(kind, Kind::Unknown(_)) {
                *unread = unread.saturating_sub(1);
            }
            keep
        });
    }

    /// The slow record of `key`.
    #[must_use]
    pub fn host(&self, key: &KeyId) -> Option<&Verified<HostRecord>> {
        match &self.records.get(&(*key, Kind::HostRecord))?.said {
            RecordSaid::Host(record, _) => Some(record),
            _ => None,
        }
    }

    /// The newest offer of `key`, and when it was heard.
    #[must_use]
    pub fn offer(&self, key: &KeyId) -> Option<(&Verified<Offer>, Boot)> {
        let held = self.records.get(&(*key, Kind::Offer))?;
        match &held.said {
            RecordSaid::Offer(offer) => Some((offer, held.heard)),
            _ => None,
        }
    }

    /// Who said last that it has this payload, or is fetching it.
    pub fn holders(&self, root: &Hash) -> impl Iterator<Item = KeyId> {
        self.records.iter().filter_map(|((key, _), held)| match &held.said {
            RecordSaid::Payloads(payloads) => payloads.body().may_have(root).then_some(*key),
            _ => None,
        })
    }

    /// Every host whose slow record is known.
    pub fn hosts(&self) -> impl Iterator<Item = &Verified<HostRecord>> {
        self.records.values().filter_map(|held| match &held.said {
            RecordSaid::Host(record, _) => Some(record),
            _ => None,
        })
    }

    /// The keys of those hosts, beginning somewhere in the middle that `start` decides.
    pub fn hosts_from(&self, start: u64) -> impl Iterator<Item = KeyId> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&start.to_be_bytes());
        let from = (KeyId(key), Kind::HostRecord);
        let after = self.records.range(from..);
        let all = after.chain(self.records.range(..from));
        all.filter(|(_, held)| matches!(held.said, RecordSaid::Host(..))).map(|((key, _), _)| *key)
    }

    /// Every host whose slow record is known, with the certificate that admits it.
    pub fn certified(
        &self,
    ) -> impl Iterator<Item = (&Verified<HostRecord>, &Verified<Certificate>)> {
        self.records.values().filter_map(|held| match &held.said {
            RecordSaid::Host(record, certificate) => Some((record, certificate)),
            _ => None,
        })
    }

    /// How many records are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether no record is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

fn fingerprint(name: &RecordName) -> u64 {
    let mut bytes = Vec::with_capacity(58);
    bytes.extend_from_slice(&name.key.0);
    bytes.extend_from_slice(&name.kind.number().to_le_bytes());
    bytes.extend_from_slice(&name.epoch.to_le_bytes());
    bytes.extend_from_slice(&name.seq.to_le_bytes());
    bytes.extend_from_slice(&name.tag.to_le_bytes());
    let hash = Hash::of(&bytes).0;
    u64::from_le_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
}
