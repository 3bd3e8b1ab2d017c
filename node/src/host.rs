//! What the host has: cores, memory, disk, GPUs, measured and never assumed.

use std::path::Path;

use leasehold_proto::{Gpus, Resources};

use crate::config::Measured;

/// Measures the host; `dir` says which file system counts.
///
/// # Errors
/// When the host does not say how much memory or disk it has.
pub fn measure(dir: &Path) -> std::io::Result<Measured> {
    let cores = std::thread::available_parallelism()?.get() as u64;
    let disk = rustix::fs::statvfs(dir)?;
    let hardware = Resources {
        cpu_milli: cores * 1000,
        memory: memory()?,
        disk: disk.f_blocks.saturating_mul(disk.f_frsize),
        gpus: gpus(),
    };
    Ok(Measured { hardware, disk_free: disk.f_bavail.saturating_mul(disk.f_frsize) })
}

/// Bytes free for this user on the file system of `dir`.
///
/// # Errors
/// When the file system does not say.
pub fn disk_free(dir: &Path) -> std::io::Result<u64> {
    let disk = rustix::fs::statvfs(dir)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn memory() -> std::io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| std::io::Error::other("/proc/meminfo does not say MemTotal"))
}

/// The processor as its maker names it, at most 64 bytes.
#[must_use]
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = |line: &str| {
        let (key, value) = line.split_once(':')?;
        matches!(key.trim(), "model name" | "Hardware" | "Processor").then(|| value.trim().into())
    };
    let mut name: String = text.lines().find_map(named).unwrap_or_else(|| "unknown".into());
    name.truncate((0..=64).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0));
    name
}

/// The host's own name.
#[must_use]
pub fn name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "node".into() } else { name.chars().take(60).collect() }
}

/// GPUs through NVML, where its library is there; none otherwise.
fn gpus() -> Vec<Gpus> {
    let Ok(nvml) = nvml_wrapper::Nvml::init() else { return Vec::new() };
    let mut found: Vec<Gpus> = Vec::new();
    for index in 0..nvml.device_count().unwrap_or(0) {
        let Ok(name) = nvml.device_by_index(index).and_then(|device| device.name()) else {
            continue;
        };
        let kind = kind_of(&name);
        match found.iter_mut().find(|gpus| gpus.kind == kind) {
            Some(gpus) => gpus.count += 1,
            None => found.push(Gpus { kind, count: 1 }),
        }
    }
    found.sort();
    found.truncate(leasehold_proto::MAX_GPU_KINDS);
    found
}

/// A driver's name as a kind: `NVIDIA H100 80GB HBM3` is `nvidia-h100-80gb-hbm3`.
fn kind_of(name: &str) -> String {
    let mut kind: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .collect();
    kind.truncate(leasehold_proto::MAX_GPU_NAME);
    kind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_something() {
        let measured = measure(Path::new("/")).expect("measures");
        assert!(measured.hardware.cpu_milli >= 1000);
        assert!(measured.hardware.memory > 64 << 20);
        assert!(measured.hardware.disk >= measured.disk_free);
        assert!(!name().is_empty() && processor().len() <= 64);
    }

    #[test]
    fn kinds_are_lower_case_with_dashes() {
        assert_eq!(kind_of("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3");
    }
}
