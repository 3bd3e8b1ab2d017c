//! The runner's cage: what is left of a process once it may only compute, read its inputs and
//! write its outputs.
//!
//! The WebAssembly sandbox is assumed to be escapable, so the process around it is confined as if
//! it ran native code. Each layer is tried, and only what really took hold is reported, as words:
//!
//! | word | meaning |
//! |---|---|
//! | `wasm` | the program is WebAssembly |
//! | `cgroup2`, `cgroup1`, `cgroup1-partial` | the kernel bounds cpu, memory, pids (or some) |
//! | `rlimits` | no core dumps; file size, address space and open files are bounded |
//! | `netns`, `ipcns` | a network with nothing in it, and System V IPC of its own |
//! | `uid` | a user id that nothing else on the host has |
//! | `nocaps` | no capabilities, and none to be had |
//! | `no_new_privs` | no set-user-id program gives any back |
//! | `landlockN` | files: inputs readable, outputs writable, nothing else (ABI N of the kernel) |
//! | `seccomp` | an allow-list of the system calls that computing needs |
//!
//! Everything here is per thread or inherited by threads made later, so it must be called while
//! the process has one thread. [`probe`] uses the same fact to try the layers out in a thread of
//! the node that is thrown away afterwards.
//!
//! Sources: capabilities(7), landlock(7), seccomp(2), user_namespaces(7), PR_SET_PDEATHSIG(2const).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What the cage must leave open, and how wide it is.
#[derive(Debug)]
pub(super) struct Cage<'a> {
    /// The directory that may be read.
    pub(super) read: &'a Path,
    /// The directory that may be written.
    pub(super) write: &'a Path,
    /// The user to turn into, where that is possible.
    pub(super) uid: Option<u32>,
    /// The longest file that may be written, in bytes.
    pub(super) file_size: u64,
    /// The address space, in bytes.
    pub(super) address_space: u64,
    /// Whether this is the whole process, or a thread that only probes.
    pub(super) probing: bool,
}

/// The first of the user ids that jobs run under. Ids from here to 2,147,352,575 are used by
/// nobody (systemd, "Users, Groups, UIDs and GIDs"), and stay clear of container ranges.
const FIRST_UID: u32 = 0x7000_0000;

/// The user id of one lease's runner.
pub(super) fn uid_of(lease: &str) -> u32 {
    let hash = blake3::hash(lease.as_bytes());
    let bytes = hash.as_bytes();
    FIRST_UID + u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0])
}

/// Confines the calling thread and all that it starts later. Returns the words for what took
/// hold, in the order of the table above.
pub(super) fn enter(cage: &Cage<'_>) -> Vec<String> {
    let mut words = Vec::new();
    let mut had = |word: &str, held: bool| {
        if held {
            words.push(word.to_owned());
        }
    };
    // Rules name open directories, which must be opened while that is still allowed.
    let roots = (PathFd::new(cage.read), PathFd::new(cage.write));
    // Limits belong to the whole process, so a probe takes their presence for granted.
    had("rlimits", cage.probing || limit(cage));
    let apart = namespaces(cage.probing);
    had("netns", apart.is_some());
    had("ipcns", apart.is_some());
    let changed = match (apart, cage.uid) {
        // A user namespace of our own has no other ids to turn into.
        (Some(Apart::ByUser), _) | (_, None) => false,
        (_, Some(uid)) => turn_into(uid),
    };
    had("uid", changed);
    had("nocaps", drop_capabilities());
    if !cage.probing {
        // Turning into another user has cleared it.
        let _ = die_with_parent();
        // A warden of the same user counts what its runner holds open, which the kernel shows of
        // a dumpable process only; seccomp keeps others from tracing it either way.
        if changed {
            use rustix::process::{DumpableBehavior, set_dumpable_behavior};
            let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
        }
    }
    had("no_new_privs", rustix::thread::set_no_new_privs(true).is_ok());
    if let (Ok(read), Ok(write)) = roots
        && let Some(abi) = landlock(read, write)
    {
        had(&format!("landlock{abi}"), true);
    }
    had("seccomp", seccomp());
    words
}

/// Has the kernel kill this process when the thread that started it ends.
pub(super) fn die_with_parent() -> rustix::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
}

/// The words for what this host allows, found by doing it all to a thread that ends at once.
pub(super) fn probe(uid: Option<u32>) -> Vec<String> {
    let probing = std::thread::Builder::new().name("isolation-probe".into()).spawn(move || {
        enter(&Cage {
            read: Path::new("/"),
            write: Path::new("/"),
            uid,
            file_size: 0,
            address_space: 0,
            probing: true,
        })
    });
    probing.ok().and_then(|thread| thread.join().ok()).unwrap_or_default()
}

fn limit(cage: &Cage<'_>) -> bool {
    let fixed = |n: u64| Rlimit { current: Some(n), maximum: Some(n) };
    [
        (Resource::Core, 0),
        (Resource::Nofile, 256),
        (Resource::Fsize, cage.file_size),
        (Resource::As, cage.address_space),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ]
    .into_iter()
    // All of them, not up to the first that fails.
    .fold(true, |all, (resource, n)| setrlimit(resource, fixed(n)).is_ok() && all)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Apart {
    /// The process had the privilege itself.
    ByPrivilege,
    /// A user namespace of its own gave it.
    ByUser,
}

fn namespaces(probing: bool) -> Option<Apart> {
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    if unshare(flags).is_ok() {
        return Some(Apart::ByPrivilege);
    }
    // A process with more than one thread cannot enter a user namespace (unshare(2)), so a
    // probe cannot find out, and promises nothing.
    if probing {
        return None;
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(flags | UnshareFlags::NEWUSER).ok()?;
    // Unmapped ids would still work, as the overflow user; then files look like anybody's.
    let _ = fs::write("/proc/self/setgroups", "deny");
    let _ = fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"));
    let _ = fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"));
    Some(Apart::ByUser)
}

#[allow(unsafe_code)]
fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: unsafe only because of `UnshareFlags::FILES`, which no caller passes.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

fn turn_into(uid: u32) -> bool {
    let (user, group) = (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(uid));
    rustix::thread::set_thread_groups(&[]).is_ok()
        && rustix::thread::set_thread_res_gid(group, group, group).is_ok()
        && rustix::thread::set_thread_res_uid(user, user, user).is_ok()
}

fn drop_capabilities() -> bool {
    let _ = rustix::thread::clear_ambient_capability_set();
    // Taking one from the bounding set needs a capability itself; without it there is none to
    // take, and `no_new_privs` keeps it so.
    for bit in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if rustix::thread::capability_is_in_bounding_set(one).unwrap_or(false) {
            let _ = rustix::thread::remove_capability_from_bounding_set(one);
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).is_ok()
}

/// Returns the kernel's ABI, where the rules hold.
fn landlock(read: PathFd, write: PathFd) -> Option<u32> {
    let abi = ABI::V7;
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    // No devices, sockets or pipes: an output is a file.
    let no: BitFlags<AccessFs> = AccessFs::MakeChar
        | AccessFs::MakeBlock
        | AccessFs::MakeSock
        | AccessFs::MakeFifo
        | AccessFs::Execute
        | AccessFs::IoctlDev;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::from_all(abi)))
        .and_then(|rules| rules.create())
        .and_then(|rules| rules.add_rule(PathBeneath::new(read, reading)))
        .and_then(|rules| rules.add_rule(PathBeneath::new(write, AccessFs::from_all(abi) & !no)))
        .and_then(|rules| rules.restrict_self())
        .ok()?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => None,
        (_, LandlockStatus::Available { effective_abi, .. }) => Some(effective_abi as u32),
        _ => None,
    }
}

/// An allow-list: what is not needed to compute, to read and write open files, to wait and to
/// end is answered with `EPERM`.
fn seccomp() -> bool {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return false };
    let (Some(absent), Some(allowed)) = (absent(arch), allowed(arch)) else { return false };
    // The one that allows little comes last: installing a filter takes a call that it forbids.
    seccompiler::apply_filter(&absent).is_ok() && seccompiler::apply_filter(&allowed).is_ok()
}

/// clone3(2) hides its flags behind a pointer, where no filter can look. It must seem absent
/// (`ENOSYS`), so that the C library falls back to clone(2). This takes a filter of its own,
/// since one filter has one answer for all that it does not allow; of two answers the stricter
/// one wins, so the other filter allows it.
fn absent(arch: TargetArch) -> Option<BpfProgram> {
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, vec![])]),
        SeccompAction::Allow,
        SeccompAction::Errno(u32::try_from(libc::ENOSYS).ok()?),
        arch,
    );
    BpfProgram::try_from(filter.ok()?).ok()
}

fn allowed(arch: TargetArch) -> Option<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in PLAIN.iter().chain(PLAIN_HERE) {
        rules.insert(*call, vec![]);
    }
    let is = |arg, value: u64| {
        SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let rule = |conditions: Vec<SeccompCondition>| SeccompRule::new(conditions).ok();

    // A new thread, not a new process; the kernel itself refuses namespaces to threads.
    let thread = u64::try_from(libc::CLONE_THREAD | libc::CLONE_VM).ok()?;
    let threads =
        SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), thread);
    rules.insert(libc::SYS_clone, vec![rule(vec![threads.ok()?])?]);
    // Signals to itself: that is how a program aborts.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![rule(vec![is(0, own).ok()?])?]);
    // Asking for its own limits, not setting them (the third argument would be the new ones).
    let unset = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0).ok()?;
    rules.insert(libc::SYS_prlimit64, vec![rule(vec![is(0, 0).ok()?, unset])?]);
    // Naming a thread, and nothing else of prctl(2).
    let name = u64::try_from(libc::PR_SET_NAME).ok()?;
    rules.insert(libc::SYS_prctl, vec![rule(vec![is(0, name).ok()?])?]);
    // Whether a descriptor is a terminal, and how much there is to read.
    let asks = [libc::TCGETS, libc::FIONREAD];
    let asks: Option<Vec<SeccompRule>> =
        asks.into_iter().map(|ask| rule(vec![is(1, ask).ok()?])).collect();
    rules.insert(libc::SYS_ioctl, asks?);
    // The control line is a socket that is open already: no address may be named.
    let nowhere = |arg| SeccompCondition::new(arg, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0);
    rules.insert(libc::SYS_sendto, vec![rule(vec![nowhere(4).ok()?])?]);
    rules.insert(libc::SYS_recvfrom, vec![rule(vec![nowhere(4).ok()?])?]);

    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(u32::try_from(libc::EPERM).ok()?),
        SeccompAction::Allow,
        arch,
    );
    BpfProgram::try_from(filter.ok()?).ok()
}

/// Calls that are allowed with any arguments, on every architecture.
#[rustfmt::skip]
const PLAIN: &[i64] = &[
    // open files
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_pread64,
    libc::SYS_pwrite64, libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_preadv2,
    libc::SYS_pwritev2, libc::SYS_lseek, libc::SYS_close, libc::SYS_dup, libc::SYS_dup3,
    libc::SYS_fcntl, libc::SYS_fstat, libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_ftruncate,
    libc::SYS_fallocate, libc::SYS_fadvise64, libc::SYS_getdents64, libc::SYS_shutdown,
    libc::SYS_copy_file_range,
    // names, below what Landlock leaves open
    libc::SYS_openat, libc::SYS_openat2, libc::SYS_newfstatat, libc::SYS_statx,
    libc::SYS_mkdirat, libc::SYS_unlinkat, libc::SYS_renameat2, libc::SYS_linkat,
    libc::SYS_symlinkat, libc::SYS_readlinkat, libc::SYS_utimensat, libc::SYS_faccessat,
    libc::SYS_faccessat2, libc::SYS_fstatfs,
    // memory
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_madvise,
    libc::SYS_brk, libc::SYS_membarrier,
    // threads, signals, ends
    libc::SYS_futex, libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_set_tid_address,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack, libc::SYS_sched_yield, libc::SYS_sched_getaffinity,
    libc::SYS_restart_syscall, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_clone3,
    // time, chance, facts
    libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep, libc::SYS_gettimeofday, libc::SYS_getrandom, libc::SYS_getpid,
    libc::SYS_getppid, libc::SYS_gettid, libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid,
    libc::SYS_getegid, libc::SYS_uname, libc::SYS_sysinfo, libc::SYS_getrusage,
    // waiting
    libc::SYS_ppoll, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait,
    libc::SYS_eventfd2, libc::SYS_pipe2,
];

/// The same for calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const PLAIN_HERE: &[i64] = &[
    libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_open, libc::SYS_stat, libc::SYS_lstat,
    libc::SYS_access, libc::SYS_readlink, libc::SYS_mkdir, libc::SYS_rmdir, libc::SYS_unlink,
    libc::SYS_rename, libc::SYS_renameat, libc::SYS_dup2, libc::SYS_getdents,
];
#[cfg(not(target_arch = "x86_64"))]
const PLAIN_HERE: &[i64] = &[];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_of_jobs_are_in_nobodys_range() {
        for lease in ["00112233", "ffffffff", "", "x"] {
            let uid = uid_of(lease);
            assert!((0x7000_0000..0x7100_0000).contains(&uid), "{uid}");
        }
        assert_ne!(uid_of("00112233"), uid_of("00112234"));
    }

    /// Runs in threads of their own: what a cage takes, it takes for good.
    fn caged<T: Send + 'static>(
        check: impl FnOnce(Vec<String>, String) -> T + Send + 'static,
    ) -> T {
        // Removed from out here: from inside the cage nobody could.
        let root = tempfile::tempdir().expect("a directory");
        let (read, write) = (root.path().join("in"), root.path().join("out"));
        std::thread::spawn(move || {
            fs::create_dir(&read).expect("made");
            fs::create_dir(&write).expect("made");
            // Opened while that is still allowed, read when it counts.
            let mut status = fs::File::open("/proc/thread-self/status").expect("open");
            let words = enter(&Cage {
                read: &read,
                write: &write,
                uid: None,
                file_size: 0,
                address_space: 0,
                probing: true,
            });
            let mut text = String::new();
            std::io::Read::read_to_string(&mut status, &mut text).expect("read");
            check(words, text)
        })
        .join()
        .expect("the thread")
    }

    #[test]
    fn the_words_are_true() {
        caged(|words, status| {
            let has = |word: &str| words.iter().any(|w| w.starts_with(word));
            assert!(has("no_new_privs"), "{words:?}");
            for (word, line) in [
                ("nocaps", "CapEff:\t0000000000000000"),
                ("nocaps", "CapPrm:\t0000000000000000"),
                ("no_new_privs", "NoNewPrivs:\t1"),
                ("seccomp", "Seccomp:\t2"),
            ] {
                assert!(!has(word) || status.lines().any(|l| l == line), "{word}: {status}");
            }
            if has("landlock") {
                assert!(fs::read_dir("/etc").is_err());
                assert!(fs::File::open("/proc/self/status").is_err());
            }
            if has("seccomp") {
                assert!(
                    std::net::TcpStream::connect("127.0.0.1:1")
                        .is_err_and(|error| { error.raw_os_error() == Some(libc::EPERM) })
                );
                assert!(std::process::Command::new("/bin/true").spawn().is_err());
                assert!(unshare(UnshareFlags::NEWNET).is_err());
                let parent = rustix::process::getppid().expect("a parent");
                assert_eq!(
                    rustix::process::test_kill_process(parent),
                    Err(rustix::io::Errno::PERM)
                );
                assert!(
                    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
                        .is_err()
                );
                // Threads, which are needed, still start.
                std::thread::spawn(|| ()).join().expect("a thread in the cage");
            }
        });
    }

    #[test]
    fn a_probe_leaves_the_process_as_it_was() {
        let before = fs::read_to_string("/proc/self/status").expect("readable");
        let words = probe(Some(uid_of("00112233")));
        let after = fs::read_to_string("/proc/self/status").expect("readable");
        let keep = |text: &str| {
            text.lines()
                .filter(|l| {
                    ["Uid", "CapEff", "NoNewPrivs", "Seccomp:"].iter().any(|p| l.starts_with(p))
                })
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(keep(&before), keep(&after), "{words:?}");
    }
}
