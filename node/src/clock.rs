//! The only reader of time: the boot clock for deadlines, the wall clock for signed fields.

use std::time::{SystemTime, UNIX_EPOCH};

use leasehold_proto::base::time::{Boot, BootId, Now, Wall};
use rustix::time::{ClockId, clock_gettime};

/// Both clocks, now.
#[must_use]
pub fn now() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { boot: boot(), wall: Wall(u64::try_from(wall.as_millis()).unwrap_or(u64::MAX)) }
}

/// CLOCK_BOOTTIME: it counts suspend, and nobody can step it.
#[must_use]
pub fn boot() -> Boot {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Boot(seconds * 1000 + nanos / 1_000_000)
}

/// Which boot this is (`/proc/sys/kernel/random/boot_id`); all zero where the host does not say,
/// so that every start counts as the same boot only there.
#[must_use]
pub fn boot_id() -> BootId {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id = digits.parse::<leasehold_proto::RequestId>();
    BootId(id.map(|id| id.0).unwrap_or_default())
}
