//! Planted bugs: the switch by which the simulation proves that its checks can fail.
//!
//! Without the cargo feature `planted` a [`Plant`] is empty and cannot be anything else; the
//! simulation turns the feature on for itself and plants one bug by name per run.

/// Which bug is planted, if any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plant(Option<&'static str>);

impl Plant {
    /// No bug.
    pub const NONE: Self = Self(None);

    /// Every bug that can be planted, with the invariant of the design that it breaks.
    pub const ALL: [(&'static str, &'static str); 18] = [
        ("oversell", "1: promised <= capacity"),
        ("send-before-durable", "2: what was seen outside survives a crash"),
        ("forget-conflicts", "3: one (lessee, request id) makes at most one lease"),
        ("outlive-term", "4: a job ends before term + grace"),
        ("reword-repeats", "3: a repeat gets the same bytes"),
        ("rely-from-grant", "5: the lessee stops relying before the lessor stops honouring"),
        ("claim-after-lapse", "6: ended is final"),
        ("never-lapse", "6: an unclaimed grant lapses"),
        ("free-at-term", "7: capacity returns when the runner is reaped"),
        ("same-epoch", "8: the epoch rises at every start"),
        ("ignore-twin", "8: of two nodes with one key neither goes on granting"),
        ("inflate-receipts", "9: receipts never exceed what was leased"),
        ("renew-stale", "6: versions compare-and-set"),
        ("renew-shorter", "6: renewal never shortens"),
        ("renew-ended", "6: ended is final"),
        ("renew-unacknowledged", "4: the warden has a new deadline before the renewal is sent"),
        ("start-uncommitted", "10: no job of a gang starts before all have committed"),
        ("hide-freed", "liveness: what is free again is advertised again"),
    ];

    /// Plants the bug called `name`; `None` when there is no such bug.
    #[cfg(feature = "planted")]
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(known, _)| Self(Some(known)))
    }

    /// Whether the bug called `name` is planted.
    #[must_use]
    pub fn is(self, name: &str) -> bool {
        self.0 == Some(name)
    }
}
