//! A virtual host: its clocks, its disk, and the wardens with their jobs. All of it outlives the
//! node's process; only the disk outlives a boot.

use std::collections::BTreeMap;

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::LeaseId;
use leasehold_proto::base::time::{Boot, BootId, Now, Span, Wall};
use leasehold_proto::core::kept::ReadError;
use leasehold_proto::core::{Kept, StartJob};
use leasehold_proto::words::usage::{Outcome, Usage};

/// What all wall clocks read at the start of a run.
pub(super) const START: Wall = Wall(1_790_000_000_000);

/// A host's two clocks, as functions of true time in microseconds.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    /// Names the boot.
    pub(super) boot: BootId,
    /// When the host booted.
    booted_us: u64,
    /// How much faster than true time the boot clock runs, in parts per million.
    ppm: i64,
    /// How far off the wall clock is, in milliseconds.
    off: i64,
    /// By how much it was set wrong, in milliseconds.
    step: i64,
}

impl Clock {
    /// A host that has been up for a while: its clock is off by up to a second and up to 100 ppm
    /// fast or slow, so that two of them drift apart by no more than 200 ppm.
    pub(super) fn new(dice: &mut Dice) -> Self {
        let mut around = |limit: u64| {
            let n = dice.below(2 * limit + 1);
            i64::try_from(n).unwrap_or(0) - i64::try_from(limit).unwrap_or(0)
        };
        let (ppm, off) = (around(100), around(1_000));
        Self { boot: boot_id(dice), booted_us: 0, ppm, off, step: 0 }
    }

    pub(super) fn reboot(&mut self, us: u64, dice: &mut Dice) {
        self.boot = boot_id(dice);
        self.booted_us = us;
    }

    pub(super) fn set_wrong(&mut self, by: i64) {
        self.step = by;
    }

    /// Both clocks at true time `us`.
    pub(super) fn now(&self, us: u64) -> Now {
        let wall = START.0.saturating_add(us / 1000);
        let wall = wall.saturating_add_signed(self.off).saturating_add_signed(self.step);
        Now { boot: self.boot(us), wall: Wall(wall) }
    }

    /// How fast the boot clock runs, in millionths of true time.
    fn rate(&self) -> u64 {
        1_000_000u64.saturating_add_signed(self.ppm)
    }

    /// Exact in 64 bits for some five thousand hours.
    pub(super) fn boot(&self, us: u64) -> Boot {
        Boot(us.saturating_sub(self.booted_us).saturating_mul(self.rate()) / 1_000_000_000)
    }

    /// The earliest true time at which the boot clock reads at least `boot`.
    pub(super) fn when(&self, boot: Boot) -> u64 {
        let up = boot.0.saturating_mul(1_000_000_000).div_ceil(self.rate());
        self.booted_us.saturating_add(up)
    }
}

fn boot_id(dice: &mut Dice) -> BootId {
    BootId(dice.request().0)
}

/// What is durable on a host.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    entries: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// One write: where, and what; nothing takes away what was.
pub(super) type Write = (Vec<u8>, Option<Vec<u8>>);

impl Disk {
    pub(super) fn write(&mut self, (key, value): Write) {
        match value {
            Some(value) => self.entries.insert(key, value),
            None => self.entries.remove(&key),
        };
    }

    /// Everything, read back as a node does at its start.
    pub(super) fn read(&self) -> Result<Vec<Kept>, ReadError> {
        self.entries.iter().map(|(key, value)| Kept::read(key, value)).collect()
    }
}

/// A job under its warden.
#[derive(Debug)]
pub(super) struct Job {
    started_us: u64,
    /// When it ends, as things stand.
    pub(super) ends_us: u64,
    /// How.
    pub(super) outcome: Outcome,
    /// Rises when the end is moved: an event for an earlier plan is void.
    pub(super) plan: u64,
    /// When it ended.
    pub(super) ended_us: Option<u64>,
    /// Whether it ignores being asked to end.
    stubborn: bool,
    grace: Span,
    /// Of a thousand, how busy it is.
    busy: u64,
    memory: u64,
}

impl Job {
    /// Starts one that ends by itself unless it is `endless`.
    pub(super) fn start(
        us: u64,
        what: &StartJob,
        clock: &Clock,
        endless: u64,
        dice: &mut Dice,
    ) -> Self {
        let left = clock.when(what.deadline).saturating_sub(us);
        let stubborn = dice.chance(1, 4);
        let late =
            if stubborn { what.grace.as_millis() * 1000 } else { 1_000 + dice.below(300_000) };
        let deadline = us + left + late.min(what.grace.as_millis() * 1000);
        let fetched = us + 1_000 + dice.below(50_000);
        let (ends, outcome) = if dice.chance(1, 30) {
            (fetched, Outcome::NoPayload("no holder answers".into()))
        } else if dice.chance(endless, 1000) {
            (u64::MAX, Outcome::Deadline)
        } else {
            let code = i32::try_from(dice.below(3)).unwrap_or(0);
            (fetched + dice.below(left.max(1) * 3 / 2 + 1), Outcome::Exited(code))
        };
        let outcome = if ends <= deadline { outcome } else { Outcome::Deadline };
        Self {
            started_us: us,
            ends_us: ends.min(deadline),
            outcome,
            plan: 0,
            ended_us: None,
            stubborn,
            grace: what.grace,
            busy: dice.below(1_001),
            memory: dice.below(what.shape.memory.max(1)),
        }
    }

    /// It is asked to end. True when that moves its end.
    pub(super) fn stop(&mut self, us: u64, dice: &mut Dice) -> bool {
        let grace = self.grace.as_millis() * 1000;
        let late = if self.stubborn { grace } else { (1_000 + dice.below(300_000)).min(grace) };
        if self.ended_us.is_some() || self.ends_us <= us + late {
            return false;
        }
        self.ends_us = us + late;
        self.outcome = Outcome::Stopped;
        self.plan += 1;
        true
    }

    /// It is killed.
    pub(super) fn kill(&mut self, us: u64) {
        if self.ended_us.is_none() {
            self.ended_us = Some(us);
            self.outcome = Outcome::Lost;
            self.plan += 1;
        }
    }

    /// What it used by `us`.
    pub(super) fn usage(&self, us: u64) -> Usage {
        let ran = self.ended_us.unwrap_or(us).saturating_sub(self.started_us) / 1000;
        Usage {
            billed: Span::ZERO,
            cpu: Span::millis(ran * self.busy / 1000),
            memory_mib_ms: (self.memory >> 20).saturating_mul(ran),
            memory_peak: self.memory,
        }
    }
}

/// The wardens of one host.
pub(super) type Jobs = BTreeMap<LeaseId, Job>;
