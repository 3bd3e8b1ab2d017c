//! What can be leased: quantities of CPU, memory, disk and GPUs, as integers.
//!
//! CPU counts in thousandths of a core, memory and disk in bytes, GPUs in whole devices of a
//! kind. The units are part of the wire and cannot change.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::money::Amount;

/// One gibibyte, in bytes: the unit of memory and disk rates.
pub const GIB: u64 = 1 << 30;

/// The longest list of GPU kinds that one host or one order may name.
pub const MAX_GPU_KINDS: usize = 16;
/// The longest name of a GPU kind, in bytes.
pub const MAX_GPU_NAME: usize = 64;

/// So many GPUs of one kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpus {
    /// The kind as its driver names it, lower case with dashes: `nvidia-h100-80gb-hbm3`.
    pub kind: String,
    /// How many devices.
    pub count: u32,
}

/// A quantity of every resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a CPU core.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of disk.
    pub disk: u64,
    /// GPUs by kind, sorted by kind, no kind twice, no zero counts.
    pub gpus: Vec<Gpus>,
}

impl Resources {
    /// CPU, memory and disk without GPUs.
    #[must_use]
    pub const fn new(cpu_milli: u64, memory: u64, disk: u64) -> Self {
        Self { cpu_milli, memory, disk, gpus: Vec::new() }
    }

    /// True when nothing is asked for or left.
    #[must_use]
    pub const fn is_nothing(&self) -> bool {
        self.cpu_milli == 0 && self.memory == 0 && self.disk == 0 && self.gpus.is_empty()
    }

    /// Whether the GPU list keeps its rules (sorted, unique, no zero, within bounds).
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        self.gpus.len() <= MAX_GPU_KINDS
            && self.gpus.iter().all(|g| g.count > 0 && g.kind.len() <= MAX_GPU_NAME)
            && self.gpus.windows(2).all(|pair| pair[0].kind < pair[1].kind)
    }

    /// How many GPUs of `kind` are in here.
    #[must_use]
    pub fn gpu_count(&self, kind: &str) -> u32 {
        self.gpus.iter().find(|g| g.kind == kind).map_or(0, |g| g.count)
    }

    /// Whether `self` can be taken out of `room`, in every resource.
    #[must_use]
    pub fn fits(&self, room: &Self) -> bool {
        self.cpu_milli <= room.cpu_milli
            && self.memory <= room.memory
            && self.disk <= room.disk
            && self.gpus.iter().all(|g| g.count <= room.gpu_count(&g.kind))
    }

    /// The sum, saturating.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let mut gpus = self.gpus.clone();
        for more in &other.gpus {
            match gpus.iter_mut().find(|g| g.kind == more.kind) {
                Some(have) => have.count = have.count.saturating_add(more.count),
                None => gpus.push(more.clone()),
            }
        }
        gpus.sort();
        Self {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory: self.memory.saturating_add(other.memory),
            disk: self.disk.saturating_add(other.disk),
            gpus,
        }
    }

    /// The larger of both, resource by resource.
    #[must_use]
    pub fn at_least(&self, other: &Self) -> Self {
        self.plus(&other.minus(self))
    }

    /// What is left of `self` after `other` is taken; a resource that runs short is zero.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let gpus = self
            .gpus
            .iter()
            .map(|g| Gpus {
                kind: g.kind.clone(),
                count: g.count.saturating_sub(other.gpu_count(&g.kind)),
            })
            .filter(|g| g.count > 0)
            .collect();
        Self {
            cpu_milli: self.cpu_milli.saturating_sub(other.cpu_milli),
            memory: self.memory.saturating_sub(other.memory),
            disk: self.disk.saturating_sub(other.disk),
            gpus,
        }
    }

    /// The resources that `self` asks for and `room` lacks, in words: `memory: have 1GiB, need
    /// 2GiB`. Empty when it fits.
    #[must_use]
    pub fn shortage(&self, room: &Self) -> Vec<String> {
        let mut short = Vec::new();
        if self.cpu_milli > room.cpu_milli {
            short.push(format!("cpu: have {}, need {}", cpu(room.cpu_milli), cpu(self.cpu_milli)));
        }
        for (name, need, have) in
            [("memory", self.memory, room.memory), ("disk", self.disk, room.disk)]
        {
            if need > have {
                short.push(format!("{name}: have {}, need {}", bytes(have), bytes(need)));
            }
        }
        for gpu in &self.gpus {
            let have = room.gpu_count(&gpu.kind);
            if gpu.count > have {
                short.push(format!("gpu {}: have {have}, need {}", gpu.kind, gpu.count));
            }
        }
        short
    }
}

/// Thousandths of a core as people write them: `1.5`.
#[must_use]
pub fn cpu(milli: u64) -> String {
    if milli.is_multiple_of(1000) {
        return (milli / 1000).to_string();
    }
    format!("{}.{:03}", milli / 1000, milli % 1000).trim_end_matches('0').to_string()
}

/// Bytes as people write them: the largest binary unit that keeps two decimals.
#[must_use]
pub fn bytes(n: u64) -> String {
    for (unit, name) in [(1u64 << 40, "TiB"), (GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
        if n >= unit {
            let hundredths = u128::from(n) * 100 / u128::from(unit);
            let (whole, part) = (hundredths / 100, hundredths % 100);
            return match part {
                0 => format!("{whole}{name}"),
                _ => format!("{whole}.{part:02}{name}"),
            };
        }
    }
    format!("{n}B")
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (memory, disk) = (bytes(self.memory), bytes(self.disk));
        write!(f, "{} cpu, {memory} memory, {disk} disk", cpu(self.cpu_milli))?;
        self.gpus.iter().try_for_each(|g| write!(f, ", {}x {}", g.count, g.kind))
    }
}

/// An hourly price for one GPU of a kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpuRate {
    /// The kind, as in [`Gpus::kind`].
    pub kind: String,
    /// Per device and hour.
    pub hour: Amount,
}

/// Prices per resource and hour, in the charter's currency.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rates {
    /// Per core and hour.
    pub cpu_hour: Amount,
    /// Per GiB of memory and hour.
    pub memory_gib_hour: Amount,
    /// Per GiB of disk and hour.
    pub disk_gib_hour: Amount,
    /// Per GPU and hour, by kind, sorted; a kind without a rate is not for sale.
    pub gpu_hour: Vec<GpuRate>,
}

impl Rates {
    /// The hourly price of `shape`, rounded up to the next billionth (once, here), so that no
    /// shape is free by rounding. `None` when it names a GPU kind that has no rate, or is beyond
    /// all that exists.
    #[must_use]
    pub fn hourly(&self, shape: &Resources) -> Option<Amount> {
        // Exact in units of a billionth / (1000 * GiB): every term is an integer there.
        let gib = u128::from(GIB);
        let cpu = u128::from(self.cpu_hour.0).checked_mul(u128::from(shape.cpu_milli))?;
        let mut exact = cpu.checked_mul(gib)?;
        let thousand = |rate: Amount, bytes: u64| {
            u128::from(rate.0).checked_mul(u128::from(bytes))?.checked_mul(1000)
        };
        exact = exact.checked_add(thousand(self.memory_gib_hour, shape.memory)?)?;
        exact = exact.checked_add(thousand(self.disk_gib_hour, shape.disk)?)?;
        for gpu in &shape.gpus {
            let rate = self.gpu_hour.iter().find(|rate| rate.kind == gpu.kind)?;
            let term = u128::from(rate.hour.0) * u128::from(gpu.count);
            exact = exact.checked_add(term.checked_mul(1000 * gib)?)?;
        }
        Some(Amount(u64::try_from(exact.div_ceil(1000 * gib)).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rates() -> Rates {
        Rates {
            cpu_hour: Amount(20_000_000),
            memory_gib_hour: Amount(4_000_000),
            disk_gib_hour: Amount(100_000),
            gpu_hour: vec![GpuRate { kind: "h100".into(), hour: Amount(2_000_000_000) }],
        }
    }

    #[test]
    fn a_shape_has_one_hourly_price() {
        let shape = Resources {
            gpus: vec![Gpus { kind: "h100".into(), count: 2 }],
            ..Resources::new(1500, GIB / 2, 10 * GIB)
        };
        assert_eq!(
            rates().hourly(&shape),
            Some(Amount(30_000_000 + 2_000_000 + 1_000_000 + 4_000_000_000))
        );
        let unknown = Resources {
            gpus: vec![Gpus { kind: "b200".into(), count: 1 }],
            ..Resources::default()
        };
        assert_eq!(rates().hourly(&unknown), None);
        assert_eq!(rates().hourly(&Resources::new(0, 1, 0)), Some(Amount(1)), "never free");
    }

    #[test]
    fn a_shortage_names_each_resource() {
        let need = Resources::new(2000, 2 * GIB, 5);
        assert_eq!(
            need.shortage(&Resources::new(1500, GIB, 5)),
            ["cpu: have 1.5, need 2", "memory: have 1GiB, need 2GiB"]
        );
        assert!(need.shortage(&need).is_empty());
    }

    proptest! {
        #[test]
        fn what_fits_can_be_taken_and_put_back(
            a in 0u64..1000, b in 0u64..1000, c in 0u32..9, d in 0u32..9,
        ) {
            let gpus = |count| if count == 0 { vec![] } else {
                vec![Gpus { kind: "x".into(), count }]
            };
            let room = Resources { gpus: gpus(c), ..Resources::new(a, a, a) };
            let need = Resources { gpus: gpus(d), ..Resources::new(b, b, b) };
            prop_assert_eq!(need.fits(&room), b <= a && d <= c);
            prop_assert_eq!(need.fits(&room), need.shortage(&room).is_empty());
            if need.fits(&room) {
                prop_assert_eq!(room.minus(&need).plus(&need), room);
            }
        }
    }
}
