//! Who belongs to a fabric: the charter and the certificates signed under it.
//!
//! A charter names the organisations with their root keys, the currency and the limits. The
//! fabric's id is the hash of its first charter, so it cannot be changed; later charters will
//! chain to it by `previous`, signed by a quorum of organisations. A certificate says that an
//! organisation admits a key in a role. Chains have a fixed length: root key, certificate.

use serde::{Deserialize, Serialize};

use crate::base::id::{Hash, KeyId};
use crate::base::time::{Span, Wall};

/// The most organisations one charter names.
pub const MAX_ORGANISATIONS: usize = 64;
/// The longest name of anything, in bytes.
pub const MAX_NAME: usize = 64;

/// What founds a fabric.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charter {
    /// The fabric's name, for people.
    pub name: String,
    /// The currency that amounts count in, as ISO 4217 writes it or a name of your own.
    pub currency: String,
    /// One for the first charter, then rising by one.
    pub number: u32,
    /// The charter before this one; `None` in the first.
    pub previous: Option<Hash>,
    /// Who may admit nodes and tenants.
    pub organisations: Vec<Organisation>,
    /// What nobody may exceed.
    pub limits: Limits,
}

/// One organisation of a fabric.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Organisation {
    /// Its name, unique in the charter.
    pub name: String,
    /// The key that signs its certificates; it can stay offline.
    pub root: KeyId,
    /// How many nodes it may admit.
    pub max_nodes: u32,
}

/// Limits that hold in the whole fabric.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The longest term of a lease.
    pub max_term: Span,
    /// How far into the future an order's validity may reach.
    pub max_order_life: Span,
}

/// What a key is admitted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It names a node: it may gossip, offer, grant and be a delegate.
    Node,
    /// It names a lessee: it may sign mandates and orders.
    Tenant,
}

/// That an organisation admits a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The organisation, as the charter names it.
    pub organisation: String,
    /// What the key is called, for people.
    pub name: String,
    /// What it is admitted as.
    pub role: Role,
    /// The key.
    pub key: KeyId,
    /// From when on it is valid; until the envelope's `not_after`.
    pub not_before: Wall,
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control)
}

impl Charter {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let orgs = &self.organisations;
        if !is_name(&self.name) || !is_name(&self.currency) {
            return Err("a charter's name and currency are 1 to 64 bytes without controls");
        }
        if orgs.is_empty() || orgs.len() > MAX_ORGANISATIONS {
            return Err("a charter names 1 to 64 organisations");
        }
        if !orgs.iter().all(|org| is_name(&org.name)) {
            return Err("an organisation's name is 1 to 64 bytes without controls");
        }
        let repeated = |i: usize, org: &Organisation| {
            orgs[..i].iter().any(|other| other.name == org.name || other.root == org.root)
        };
        if orgs.iter().enumerate().any(|(i, org)| repeated(i, org)) {
            return Err("a charter names each organisation and root key once");
        }
        if (self.number == 1) != self.previous.is_none() || self.number == 0 {
            return Err("the first charter has number 1 and no predecessor, later ones have one");
        }
        Ok(())
    }

    /// The organisation whose root key this is.
    #[must_use]
    pub fn organisation_of(&self, root: &KeyId) -> Option<&Organisation> {
        self.organisations.iter().find(|org| org.root == *root)
    }
}

impl Certificate {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if is_name(&self.organisation) && is_name(&self.name) {
            Ok(())
        } else {
            Err("a certificate's names are 1 to 64 bytes without controls")
        }
    }
}
