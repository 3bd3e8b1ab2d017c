//! What a lessee asks its own node for, and a host that may have it.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::contract::{Class, Reason};
use super::model::ModelTerms;
use crate::base::id::{Hash, KeyId};
use crate::base::money::Amount;
use crate::base::resource::Resources;
use crate::base::time::Span;

/// What a lessee wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// How much; nothing where it is a model.
    pub shape: Resources,
    /// The model whose tokens are wanted, on the terms that its lessor offers.
    pub model: Option<ModelTerms>,
    /// How firmly.
    pub class: Class,
    /// For how long.
    pub term: Span,
    /// To what term it may be renewed; at least `term`.
    pub longest: Span,
    /// Within what time it will be claimed.
    pub claim_within: Span,
    /// The most it may cost per hour.
    pub max_hourly: Amount,
    /// The most it may cost in all.
    pub budget: Amount,
    /// The most that may stand unacknowledged.
    pub exposure: Amount,
    /// How often a receipt is wanted.
    pub receipt_every: Span,
    /// The runtime it needs.
    pub runtime: String,
    /// Only these hosts, by key, asked in this order; empty: any.
    pub lessors: Vec<KeyId>,
    /// Only hosts with these labels.
    pub labels: Vec<(String, String)>,
    /// Only hosts that confine jobs in all of these ways.
    pub isolation: Vec<String>,
}

/// A host worth asking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Its key.
    pub lessor: KeyId,
    /// Its name.
    pub name: String,
    /// The offer to order from.
    pub offer: Hash,
    /// What the shape costs there per hour.
    pub rate: Amount,
    /// The most the lease can cost there.
    pub worst_case: Amount,
    /// Lower is better: thousandths of the cheapest price, with what speaks for and against.
    pub score: u64,
    /// Why it stands where it stands.
    pub why: String,
}

impl Choice {
    /// Puts those that somebody named before all others, but for those whose lessor was `asked`
    /// already.
    pub fn put_first(
        ranked: &mut VecDeque<Self>,
        named: Vec<Self>,
        asked: impl Fn(&KeyId) -> bool,
    ) {
        let named: Vec<_> = named.into_iter().filter(|choice| !asked(&choice.lessor)).collect();
        ranked.retain(|choice| named.iter().all(|named| named.lessor != choice.lessor));
        for choice in named.into_iter().rev() {
            ranked.push_front(choice);
        }
    }
}

/// What one lessor said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Who.
    pub lessor: KeyId,
    /// Its name.
    pub name: String,
    /// Why not; `None` when it did not answer.
    pub reason: Option<Reason>,
    /// In words.
    pub detail: String,
}
