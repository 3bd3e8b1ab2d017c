//! What nodes tell everybody about themselves: up to three signed records each.
//!
//! The *host record* changes rarely: addresses, hardware, labels, certificate. The *offer* is
//! small and changes with every lease: what is free, in which shapes, at what price. The *payloads*
//! say what can be fetched from it. Of each, the one with the highest (epoch, seq) counts.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

use super::charter::MAX_NAME;
use super::contract::{Class, EarlyEnd};
use super::model::{MAX_MODELS, ModelOffer, ModelTerms};
use super::sign::Signed;
use crate::base::id::Hash;
use crate::base::money::Amount;
use crate::base::resource::{Rates, Resources};
use crate::base::time::Span;

/// The most addresses per plane.
pub const MAX_ADDRESSES: usize = 8;
/// The most labels of a host.
pub const MAX_LABELS: usize = 32;
/// The most shapes in an offer.
pub const MAX_SHAPES: usize = 16;
/// The most runtimes, classes or isolation words in an offer.
pub const MAX_WORDS: usize = 24;

/// The most payloads that a node names.
pub const MAX_PAYLOADS: usize = 512;

/// A node's slow record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// What the operator calls the host.
    pub name: String,
    /// The version of the software it runs, so that vulnerable hosts can be listed.
    pub version: String,
    /// Where it is reached, by plane.
    pub addresses: Addresses,
    /// All that the host has, leased or not.
    pub hardware: Resources,
    /// The processor as its maker names it.
    pub processor: String,
    /// What the operator says about it (`zone=a`), sorted by name.
    pub labels: Vec<(String, String)>,
    /// The cell it belongs to; zero where the fabric is one cell.
    pub cell: u32,
    /// How often the node came back in this epoch after it was held down, when this was signed:
    /// what others say of that is believed only a little beyond it.
    pub returns: u32,
    /// The certificate that admits it.
    pub certificate: Signed,
}

/// Where a node is reached, by plane, best first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Links (libp2p over QUIC).
    pub link: Vec<SocketAddr>,
    /// Liveness packets (UDP).
    pub probe: Vec<SocketAddr>,
    /// Payloads and job streams (QUIC).
    pub data: Vec<SocketAddr>,
}

/// What a node has free, and its price.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The largest shapes that can be leased now, not sums over fragments.
    pub shapes: Vec<Resources>,
    /// The prices of firm capacity, in the charter's currency.
    pub rates: Rates,
    /// What slack capacity costs, in thousandths of that.
    pub slack_permille: u16,
    /// The classes it sells.
    pub classes: Vec<Class>,
    /// What holds if it ends a lease before its term.
    pub early: EarlyEnd,
    /// The longest term it grants.
    pub max_term: Span,
    /// The runtimes it has: `wasm`, ….
    pub runtimes: Vec<String>,
    /// What confines a job here, as probed by doing: `wasm`, `cgroup1`, `landlock7`, ….
    pub isolation: Vec<String>,
    /// The models it serves, sorted by name.
    pub models: Vec<ModelOffer>,
}

/// Which payloads a node has, or is fetching. It is a hint where to ask; what somebody really has,
/// and whether it is what it should be, shows when it is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payloads {
    /// The first eight bytes of their roots, as little-endian numbers, ascending; of more than
    /// [`MAX_PAYLOADS`] those that were used last.
    pub roots: Vec<u64>,
}

impl Payloads {
    /// What stands for `root` in a record.
    #[must_use]
    pub fn brief(root: &Hash) -> u64 {
        root.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    pub(super) fn check(&self) -> Result<(), &'static str> {
        let sorted = self.roots.is_sorted_by(|one, next| one < next);
        if self.roots.len() > MAX_PAYLOADS || !sorted {
            return Err("a node names at most 512 payloads, sorted, each once");
        }
        Ok(())
    }

    /// Whether a payload with this root is among them, or one whose root begins like it.
    #[must_use]
    pub fn may_have(&self, root: &Hash) -> bool {
        self.roots.binary_search(&Self::brief(root)).is_ok()
    }
}

fn is_text(text: &str) -> bool {
    text.len() <= MAX_NAME && !text.chars().any(char::is_control)
}

impl HostRecord {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let Addresses { link, probe, data } = &self.addresses;
        if [link, probe, data].iter().any(|plane| plane.len() > MAX_ADDRESSES) {
            return Err("a host record names at most 8 addresses per plane");
        }
        if self.labels.len() > MAX_LABELS
            || !self.labels.iter().all(|(name, value)| is_text(name) && is_text(value))
            || !self.labels.windows(2).all(|pair| pair[0].0 < pair[1].0)
        {
            return Err("a host has at most 32 labels of 64 bytes, sorted, each once");
        }
        if ![&self.name, &self.version, &self.processor].iter().all(|text| is_text(text)) {
            return Err("a host's name, version and processor are at most 64 bytes each");
        }
        if !self.hardware.is_well_formed() {
            return Err("a host's GPUs are listed sorted, each kind once");
        }
        Ok(())
    }
}

impl Offer {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.shapes.len() > MAX_SHAPES || !self.shapes.iter().all(Resources::is_well_formed) {
            return Err("an offer has at most 16 well-formed shapes");
        }
        if self.classes.len() > MAX_WORDS
            || self.runtimes.len() > MAX_WORDS
            || self.isolation.len() > MAX_WORDS
            || !self.runtimes.iter().chain(&self.isolation).all(|word| is_text(word))
        {
            return Err("an offer has at most 24 classes, runtimes and isolation words");
        }
        if self.rates.gpu_hour.len() > crate::base::resource::MAX_GPU_KINDS {
            return Err("an offer has at most 16 GPU rates");
        }
        let sorted = self
            .models
            .is_sorted_by(|one, next| one.terms.name.as_str() < next.terms.name.as_str());
        if self.models.len() > MAX_MODELS || !sorted {
            return Err("an offer has at most 32 models, sorted, each name once");
        }
        self.models.iter().try_for_each(ModelOffer::check)?;
        if self.slack_permille > 1000 {
            return Err("slack costs no more than firm capacity");
        }
        self.early.check()
    }

    /// What `shape` costs per hour in `class`; `None` when it has no price.
    #[must_use]
    pub fn hourly(&self, shape: &Resources, class: Class) -> Option<Amount> {
        let firm = self.rates.hourly(shape)?;
        Some(match class {
            Class::Firm => firm,
            Class::Slack => firm.permille(self.slack_permille),
        })
    }

    /// Whether a model is sold in `class` on these very terms.
    #[must_use]
    pub fn sells_model(&self, terms: &ModelTerms, class: Class) -> bool {
        let ModelTerms { name, digest, rates } = terms;
        self.models.iter().any(|model| {
            let same = model.terms.name == *name && model.terms.digest == *digest;
            same && model.rates_in(class) == Some(*rates)
        })
    }

    /// Whether `shape` fits one of the shapes.
    #[must_use]
    pub fn fits(&self, shape: &Resources) -> bool {
        self.shapes.iter().any(|room| shape.fits(room))
    }
}
