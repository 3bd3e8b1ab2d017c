//! Whose word does not count: keys that were convicted of saying two things, until their
//! organisation reinstates them.
//!
//! ```text
//! good --two bodies under one version--> quarantined --reinstated above that epoch--> good again,
//!                                            ^                                       in later epochs
//!                                            '--convicted of something later---------'
//! ```
//!
//! One proof is enough until it is lifted: a node that lies a thousand times fills no disk here,
//! and nothing of it is told on.

use std::collections::BTreeMap;

use crate::base::id::KeyId;
use crate::words::equivocation::{Conviction, Reinstatement};
use crate::words::sign::{Signed, Verified};

/// The most keys of which something is remembered.
const MAX_KEYS: usize = 16_384;

/// What is known of keys' conduct.
#[derive(Clone, Debug, Default)]
pub struct Conduct {
    convicted: BTreeMap<KeyId, Conviction>,
    reinstated: BTreeMap<KeyId, Verified<Reinstatement>>,
}

impl Conduct {
    /// Takes a proof. True when it is news: the key is quarantined by it, and was not before.
    pub fn convict(&mut self, conviction: Conviction) -> bool {
        let (key, epoch) = (conviction.signer(), conviction.header().epoch);
        let news = epoch > self.floor(&key) || !self.reinstated.contains_key(&key);
        let room = self.convicted.contains_key(&key) || self.convicted.len() < MAX_KEYS;
        if !news || !room || self.is_quarantined(&key) {
            return false;
        }
        self.convicted.insert(key, conviction);
        true
    }

    /// Takes a reinstatement, whose right to be given was judged. True when it is news.
    pub fn reinstate(&mut self, reinstatement: Verified<Reinstatement>) -> bool {
        let (key, above) = (reinstatement.body().key, reinstatement.body().above);
        let known = self.reinstated.get(&key).map(|known| known.body().above);
        let room = known.is_some() || self.reinstated.len() < MAX_KEYS;
        if known.is_some_and(|known| known >= above) || !room {
            return false;
        }
        self.reinstated.insert(key, reinstatement);
        true
    }

    /// Whether the key's word does not count: it was convicted, and not reinstated since.
    #[must_use]
    pub fn is_quarantined(&self, key: &KeyId) -> bool {
        self.convicted(key).is_some()
    }

    /// The epoch of what the key was convicted of, if it was not reinstated since.
    #[must_use]
    pub fn convicted(&self, key: &KeyId) -> Option<u64> {
        let reinstated = self.reinstated.get(key).map(|known| known.body().above);
        let convicted = self.convicted.get(key).map(|known| known.header().epoch);
        convicted.filter(|epoch| reinstated.is_none_or(|above| above < *epoch))
    }

    /// The highest epoch in which what the key signed is void; zero where none is.
    #[must_use]
    pub fn floor(&self, key: &KeyId) -> u64 {
        self.reinstated.get(key).map_or(0, |known| known.body().above)
    }

    /// Every proof that counts still.
    pub fn convictions(&self) -> impl Iterator<Item = &Conviction> {
        self.convicted.values().filter(|known| self.is_quarantined(&known.signer()))
    }

    /// Every reinstatement, as signed.
    pub fn reinstatements(&self) -> impl Iterator<Item = &Signed> {
        self.reinstated.values().map(Verified::signed)
    }
}
