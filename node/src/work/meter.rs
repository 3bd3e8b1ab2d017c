//! The meter of one job: samples of the clock, the processor and memory, added up so that usage
//! never falls.

use super::cgroup::Cgroup;
use super::process::Process;
use super::spec::Usage;

const MIB: u128 = 1 << 20;

/// Adds up one job's usage. Reads the cgroup where there is one, else the runner's `/proc` entry.
#[derive(Debug)]
pub(super) struct Meter {
    started_ms: u64,
    sampled_ms: u64,
    byte_ms: u128,
    usage: Usage,
}

impl Meter {
    /// A meter that starts now, at this boot time.
    pub(super) fn new(now_ms: u64) -> Self {
        Self { started_ms: now_ms, sampled_ms: now_ms, byte_ms: 0, usage: Usage::default() }
    }

    /// Takes a sample at this boot time and returns the usage so far.
    pub(super) fn sample(
        &mut self,
        now_ms: u64,
        runner: Option<&Process>,
        cgroup: Option<&Cgroup>,
    ) -> Usage {
        let cpu = cgroup
            .and_then(Cgroup::cpu_ms)
            .or_else(|| runner.and_then(Process::cpu_ms))
            .unwrap_or(0);
        let memory = cgroup.and_then(Cgroup::memory).or_else(|| runner.and_then(Process::memory));
        self.add(now_ms, cpu, memory)
    }

    fn add(&mut self, now_ms: u64, cpu_ms: u64, memory: Option<(u64, u64)>) -> Usage {
        let span = u128::from(now_ms.saturating_sub(self.sampled_ms));
        // What was in use at the last sample is what counts for the time since then.
        self.byte_ms = self.byte_ms.saturating_add(u128::from(self.usage.memory) * span);
        self.sampled_ms = self.sampled_ms.max(now_ms);
        let usage = &mut self.usage;
        usage.wall_ms = usage.wall_ms.max(now_ms.saturating_sub(self.started_ms));
        usage.cpu_ms = usage.cpu_ms.max(cpu_ms);
        if let Some((now, peak)) = memory {
            usage.memory = now;
            usage.memory_peak = usage.memory_peak.max(peak).max(now);
        }
        usage.memory_mib_ms = u64::try_from(self.byte_ms / MIB).unwrap_or(u64::MAX);
        *usage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_adds_up_and_never_falls() {
        let mut meter = Meter::new(1000);
        meter.add(1000, 0, Some((10 << 20, 12 << 20)));
        let usage = meter.add(3000, 500, Some((20 << 20, 20 << 20)));
        assert_eq!((usage.wall_ms, usage.cpu_ms, usage.memory_mib_ms), (2000, 500, 20_000));
        // A source that has gone away, and a clock read out of order.
        let later = meter.add(2000, 0, None);
        assert_eq!(later, usage);
        let later = meter.add(4000, 600, None);
        assert_eq!((later.wall_ms, later.cpu_ms, later.memory_mib_ms), (3000, 600, 40_000));
        assert_eq!(later.memory_peak, 20 << 20);
    }
}
