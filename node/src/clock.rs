//! The only reader of time: the boot clock for deadlines, the wall clock for signed fields.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use leasehold_proto::base::time::{Boot, BootId, Now, Wall};
use rustix::time::{ClockId, clock_gettime};

/// For tests only: the variable that names a file with milliseconds, by which the wall clock of
/// this process is wrong. The file is looked at again and again, so that a clock can jump.
pub const TEST_WALL: &str = "LEASEHOLD_TEST_WALL";
/// Between two looks at that file, in microseconds.
const LOOK_US: u64 = 100_000;

/// Both clocks, now.
#[must_use]
pub fn now() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
    let us = boot_us();
    Now { boot: Boot(us / 1000), wall: Wall(wall.saturating_add_signed(wrong(us))) }
}

/// By how many milliseconds a test wants the wall clock to be wrong.
fn wrong(us: u64) -> i64 {
    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static WRONG: AtomicI64 = AtomicI64::new(0);
    let Some(file) = FILE.get_or_init(|| std::env::var_os(TEST_WALL).map(PathBuf::from)) else {
        return 0;
    };
    if NEXT.load(Ordering::Relaxed) <= us {
        NEXT.store(us + LOOK_US, Ordering::Relaxed);
        let text = std::fs::read_to_string(file).unwrap_or_default();
        WRONG.store(text.trim().parse().unwrap_or(0), Ordering::Relaxed);
    }
    WRONG.load(Ordering::Relaxed)
}

/// CLOCK_BOOTTIME: it counts suspend, and nobody can step it.
#[must_use]
pub fn boot() -> Boot {
    Boot(boot_us() / 1000)
}

/// The same in microseconds, for histories.
#[must_use]
pub fn boot_us() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds * 1_000_000 + nanos / 1000
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
