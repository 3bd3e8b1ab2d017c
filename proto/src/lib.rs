//! What the peers of a Leasehold fabric say to each other, and how each of them decides.
//!
//! This crate is pure: no sockets, files, clocks, threads or dice of its own. Time comes in as an
//! argument, randomness from a seed. That is what lets a thousand nodes run in one process in
//! virtual time, and a failure be replayed from its seed.
//!
//! The layers, each using only those before it (`tests/layers.rs` checks it):
//!
//! ```text
//! base       time, id, money, resource, ...   quantities and names
//! words      wire, sign, object, message, ...   what can be said, and who said it
//! minds      admission, member, spread, pricing, book (lessor), seek and holdings (lessee),
//!            transfer, ...                    one state machine each; they do not know each other
//! placement  (offers, want) -> ranked choice  a pure function with a reason
//! core       one Event in, Effects out        hands one mind what it needs of another
//! ```
//!
//! Read [`core::Core`] for the contract between this crate and the shell around it, and
//! [`words::object`] for everything that is ever signed.

pub mod base {
    //! Quantities and names: the vocabulary that everything else counts in.
    pub mod dice;
    pub mod due;
    pub mod groups;
    pub mod id;
    pub mod money;
    pub mod plant;
    pub mod resource;
    pub mod time;
}

pub mod words {
    //! What peers can say: encoding, signatures, signed objects and messages.
    pub mod chain;
    pub mod charter;
    pub mod contract;
    pub mod equivocation;
    pub mod index;
    pub mod message;
    pub mod model;
    pub mod object;
    pub mod record;
    pub mod sign;
    pub mod usage;
    pub mod want;
    pub mod wire;
}

pub mod minds {
    //! The state machines. Each decides one thing and none imports another.
    pub mod admission;
    pub mod assembly;
    pub mod book;
    pub mod conduct;
    pub mod holdings;
    pub mod member;
    pub mod pricing;
    pub mod route;
    pub mod seek;
    pub mod spread;
    pub mod transfer;
}

pub mod core;
pub mod placement;
pub mod proof;

pub use base::{id::*, money::*, resource::*, time::*};
