//! What was used, agreed by both: receipts, acknowledgements, objections.
//!
//! Receipts are cumulative and chained by hash: acknowledging one covers all before it. Their
//! numbers start at one and have no gaps. A countersigned receipt proves that both agreed, not
//! that the work was right.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::contract::EndReason;
use super::model::Tally;
use crate::base::id::{Hash, LeaseId};
use crate::base::money::Amount;
use crate::base::time::{Span, Wall};

/// The longest message in an outcome, in bytes.
pub const MAX_OUTCOME_TEXT: usize = 1024;

/// Cumulative usage of one lease, from its claim on.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Usage {
    /// How long the lease has been billed: the time since its claim.
    pub billed: Span,
    /// CPU time that the job took.
    pub cpu: Span,
    /// Memory over time, in MiB-milliseconds.
    pub memory_mib_ms: u64,
    /// The most memory at once, in bytes.
    pub memory_peak: u64,
    /// What was served of a model; nothing under any other lease.
    pub tally: Tally,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// By itself, with this exit code.
    Exited(i32),
    /// It broke a rule of its runtime.
    Trapped(String),
    /// It could not be started.
    NotRunnable(String),
    /// A payload that it needs could not be had.
    NoPayload(String),
    /// It wanted more memory than leased.
    OutOfMemory,
    /// The lease's end came first.
    Deadline,
    /// It was stopped: by the lessee, or because the lease ended before its term.
    Stopped,
    /// Its processes vanished.
    Lost,
    /// It wrote more than the disk leased.
    OutOfDisk,
}

impl Outcome {
    /// The word for it.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Exited(_) => "exited",
            Self::Trapped(_) => "trapped",
            Self::NotRunnable(_) => "not_runnable",
            Self::NoPayload(_) => "no_payload",
            Self::OutOfMemory => "out_of_memory",
            Self::Deadline => "deadline",
            Self::Stopped => "stopped",
            Self::Lost => "lost",
            Self::OutOfDisk => "out_of_disk",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with {code}"),
            Self::Trapped(text) => write!(f, "trapped: {text}"),
            Self::NotRunnable(text) => write!(f, "could not be run: {text}"),
            Self::NoPayload(text) => {
                write!(f, "could not be run: a payload could not be had: {text}")
            }
            Self::OutOfMemory => f.write_str("wanted more memory than leased"),
            Self::Deadline => f.write_str("was ended at the end of its lease"),
            Self::Stopped => f.write_str("was stopped"),
            Self::Lost => f.write_str("was lost with its host or node"),
            Self::OutOfDisk => f.write_str("wrote more than the disk leased"),
        }
    }
}

/// Cumulative usage, signed by the lessor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Which lease.
    pub lease: LeaseId,
    /// One for the first, then without gaps.
    pub number: u64,
    /// The receipt before this one; zero for the first.
    pub previous: Hash,
    /// What was used since the claim.
    pub usage: Usage,
    /// What is owed since the claim: the rate over `usage.billed`, and what the tokens of
    /// `usage.tally` cost, at most the cap.
    pub charge: Amount,
    /// Why the lease ended, in its final receipt.
    pub end: Option<EndReason>,
    /// When it was written, for observers.
    pub at: Wall,
}

/// The lessee's countersignature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledgement {
    /// Which lease.
    pub lease: LeaseId,
    /// Which receipt, by number.
    pub number: u64,
    /// Which receipt, by hash.
    pub receipt: Hash,
    /// What the lessee agrees to owe up to here.
    pub charge: Amount,
}

/// Why a receipt is not countersigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectionReason {
    /// It does not follow from the receipt before it.
    Chain,
    /// It bills more time than has passed here since the claim was sent.
    Time,
    /// The charge is not the rate over the billed time, within the cap.
    Charge,
    /// It says more than the lease allows.
    Limit,
    /// It counts requests or tokens that were not agreed on one by one.
    Tokens,
}

/// The lessee's disagreement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objection {
    /// Which lease.
    pub lease: LeaseId,
    /// Which receipt.
    pub receipt: Hash,
    /// What is wrong with it.
    pub reason: ObjectionReason,
    /// The most that the lessee agrees to owe.
    pub charge: Amount,
}

macro_rules! nothing_to_check {
    ($($name:ident)*) => { $( impl $name {
        #[allow(clippy::unnecessary_wraps, clippy::unused_self)] // one signature for every kind
        pub(super) fn check(&self) -> Result<(), &'static str> { Ok(()) }
    } )* };
}
nothing_to_check!(Receipt Acknowledgement Objection);
