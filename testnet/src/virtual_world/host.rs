//! A virtual host: its clocks, its disk, and the wardens with their jobs. All of it outlives the
//! node's process; only the disk outlives a boot.

use std::collections::BTreeMap;

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::{Hash, LeaseId};
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

    pub(super) const fn is_wrong(&self) -> bool {
        self.step != 0
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
    /// The claim that it was started for.
    pub(super) claim: Hash,
    started_us: u64,
    /// When it has a warden, and a directory; never where its payloads cannot be had.
    begins_us: Option<u64>,
    /// When it ends, as things stand.
    pub(super) ends_us: u64,
    /// How.
    pub(super) outcome: Outcome,
    /// Rises when the end is moved: an event for an earlier plan is void.
    pub(super) plan: u64,
    /// When it ended.
    pub(super) ended_us: Option<u64>,
    /// When and how it would end by itself, while it is not frozen.
    own: Option<(u64, Outcome)>,
    /// When it was stopped, with the time that takes.
    stopped: Option<u64>,
    deadline_us: u64,
    /// How long it takes to end once it is asked to.
    late_us: u64,
    /// Since when it stands still.
    pub(super) frozen: Option<u64>,
    /// For how long it stood still before.
    paused_us: u64,
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
        let deadline_us = clock.when(what.deadline).max(us);
        let grace = what.grace.as_millis() * 1000;
        let stubborn = dice.chance(1, 4);
        let late = if stubborn { grace } else { 1_000 + dice.below(300_000) };
        // Most programs are small or held already; a few take long to come.
        let most = if dice.chance(1, 8) { 5_000_000 } else { 50_000 };
        let fetched = us + 1_000 + dice.below(most);
        let left = (deadline_us - us).max(1);
        let mut begins_us = Some(fetched);
        let own = if dice.chance(1, 30) {
            begins_us = None;
            Some((fetched, Outcome::NoPayload("no holder answers".into())))
        } else if dice.chance(endless, 1000) {
            None
        } else {
            let code = i32::try_from(dice.below(3)).unwrap_or(0);
            Some((fetched + dice.below(left * 3 / 2 + 1), Outcome::Exited(code)))
        };
        let mut job = Self {
            claim: what.claim,
            started_us: us,
            begins_us,
            ends_us: 0,
            outcome: Outcome::Deadline,
            // Started anew under one lease, it has none of the plans that it had before.
            plan: us,
            ended_us: None,
            own,
            stopped: None,
            deadline_us,
            late_us: late.min(grace),
            frozen: None,
            paused_us: 0,
            busy: dice.below(1_001),
            memory: dice.below(what.shape.memory.max(1)),
        };
        job.replan();
        job
    }

    /// When it is begun, if it ends no earlier.
    pub(super) fn begins(&self) -> Option<u64> {
        self.begins_us.filter(|at| *at < self.ended_us.unwrap_or(self.ends_us))
    }

    /// Finds out when it ends from what is known now.
    fn replan(&mut self) {
        let own = self.own.clone().filter(|_| self.frozen.is_none());
        let stopped = self.stopped.map(|at| (at, Outcome::Stopped));
        let deadline = (self.deadline_us + self.late_us, Outcome::Deadline);
        let first = own.into_iter().chain(stopped).chain([deadline]).min_by_key(|(at, _)| *at);
        if let Some((at, outcome)) = first {
            (self.ends_us, self.outcome) = (at, outcome);
        }
        self.plan += 1;
    }

    /// It is asked to end; what is frozen is thawed for that. True when that moves its end.
    pub(super) fn stop(&mut self, us: u64) -> bool {
        if self.ended_us.is_some() || self.stopped.is_some() {
            return false;
        }
        self.thaw(us);
        self.stopped = Some(us + self.late_us);
        self.replan();
        true
    }

    /// Its warden takes a later deadline.
    pub(super) fn extend(&mut self, deadline_us: u64) {
        if self.ended_us.is_none() {
            self.deadline_us = self.deadline_us.max(deadline_us);
            self.replan();
        }
    }

    /// It stands still from now on.
    pub(super) fn freeze(&mut self, us: u64) {
        if self.ended_us.is_none() && self.stopped.is_none() && self.frozen.is_none() {
            self.frozen = Some(us);
            self.replan();
        }
    }

    /// It goes on.
    pub(super) fn thaw(&mut self, us: u64) {
        if let Some(since) = self.frozen.take() {
            self.paused_us += us - since;
            if let Some((at, _)) = &mut self.own {
                *at += us - since;
            }
            self.replan();
        }
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
        let until = self.ended_us.unwrap_or(us);
        let still = self.paused_us + self.frozen.map_or(0, |since| until.saturating_sub(since));
        let ran = until.saturating_sub(self.started_us).saturating_sub(still) / 1000;
        Usage {
            billed: Span::ZERO,
            cpu: Span::millis(ran * self.busy / 1000),
            memory_mib_ms: (self.memory >> 20).saturating_mul(ran),
            memory_peak: self.memory,
            ..Usage::default()
        }
    }
}

/// The wardens of one host.
pub(super) type Jobs = BTreeMap<LeaseId, Job>;
