//! Jobs as real processes: this executable is node, warden and runner in one, as `leasehold` is,
//! so it has a `main` of its own instead of the usual test harness.
//!
//! `cargo test -p leasehold-node --test work [NAME]` runs those whose name contains NAME.

use std::ffi::OsString;
use std::fs;
use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use leasehold_node::work::{
    Adopted, AskError, DEFAULT_LOG_LIMIT, Exec, Input, MAX_REASON, NOTICE, NOTICE_VARIABLE, Notice,
    Orphan, Outcome, Process, Runtime, Spec, StartError, State, Status, Stream, Usage, Work,
    WorkEvent, boot_ms, hidden, isolation,
};
use tokio::sync::mpsc;

/// Nothing here waits for a fixed time; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = hidden(args.iter().cloned()) {
        return code;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let text: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    match text.as_slice() {
        ["__node", dir] => return runtime.block_on(be_a_node(Path::new(dir))),
        ["__unprivileged", dir] => return runtime.block_on(be_unprivileged(Path::new(dir))),
        _ => {}
    }
    let tests: Vec<(&str, Test)> = vec![
        ("output_and_exit_code", |room| Box::pin(output_and_exit_code(room))),
        ("arguments_environment_stdin", |room| Box::pin(arguments_environment_stdin(room))),
        ("only_declared_outputs_are_kept", |room| Box::pin(only_declared_outputs_are_kept(room))),
        ("every_bad_end_has_its_name", |room| Box::pin(every_bad_end_has_its_name(room))),
        ("what_is_no_program_is_named", |room| Box::pin(what_is_no_program_is_named(room))),
        ("endless_loop_ends_at_the_deadline", |room| Box::pin(endless_loop(room))),
        ("memory_is_bounded", |room| Box::pin(memory_is_bounded(room))),
        ("disk_is_bounded", |room| Box::pin(disk_is_bounded(room))),
        ("a_flood_of_output_is_bounded", |room| Box::pin(flood(room))),
        ("stop_ends_a_loop_and_a_sleep", |room| Box::pin(stop(room))),
        ("extend_moves_the_deadline", |room| Box::pin(extend(room))),
        ("output_is_followed_while_it_runs", |room| Box::pin(follow(room))),
        ("a_killed_warden_takes_the_runner_along", |room| Box::pin(killed_warden(room))),
        ("a_frozen_warden_is_ended_by_stop", |room| Box::pin(frozen_warden(room))),
        ("a_frozen_warden_is_ended_after_its_deadline", |room| {
            Box::pin(frozen_past_deadline(room))
        }),
        ("a_killed_node_leaves_the_deadline_in_force", |room| Box::pin(killed_node(room))),
        ("orphans_are_found_and_reaped", |room| Box::pin(orphans(room))),
        ("a_late_warden_leaves_a_later_start_alone", |room| Box::pin(late_warden(room))),
        ("an_orphan_that_ended_keeps_its_outcome", |room| Box::pin(ended_orphan(room))),
        ("a_running_job_is_adopted_whole", |room| Box::pin(adopted(room))),
        ("a_frozen_job_is_adopted_frozen", |room| Box::pin(adopted_frozen(room))),
        ("only_what_lives_and_is_wanted_is_adopted", |room| Box::pin(adopted_or_reaped(room))),
        ("what_ends_while_it_is_adopted_is_told_once", |room| Box::pin(adopted_ending(room))),
        ("many_jobs_are_adopted_at_once", |room| Box::pin(adopted_many(room))),
        ("bad_specifications_leave_nothing", |room| Box::pin(bad_specifications(room))),
        ("required_isolation_is_required", |room| Box::pin(required_isolation(room))),
        ("it_works_without_cgroups", |room| Box::pin(without_cgroups(room))),
        ("it_works_without_privilege", |room| Box::pin(without_privilege(room))),
        ("words_at_a_wardens_door_disturb_no_job", |room| Box::pin(wardens_door(room))),
        ("two_jobs_run_side_by_side", |room| Box::pin(side_by_side(room))),
        ("a_frozen_job_uses_no_processor", |room| Box::pin(frozen(room))),
        ("a_frozen_job_ends_in_order_at_its_deadline", |room| Box::pin(frozen_at_deadline(room))),
        ("a_killed_warden_takes_a_frozen_runner_along", |room| Box::pin(killed_frozen(room))),
        ("a_notice_is_found_and_only_read", |room| Box::pin(noticed(room))),
        ("a_notice_is_replaced_whole", |room| Box::pin(notice_whole(room))),
    ];
    let filter = text.iter().find(|arg| !arg.starts_with('-')).copied().unwrap_or("");
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in tests.into_iter().filter(|(name, _)| name.contains(filter)) {
        let ran = runtime.block_on(async { tokio::spawn(test(Room::new())).await });
        let word = if ran.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word}");
        *(if ran.is_ok() { &mut passed } else { &mut failed }) += 1;
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {word}. {passed} passed; {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}

type Test = fn(Room) -> Pin<Box<dyn Future<Output = ()> + Send>>;

// ---------------------------------------------------------------- programs, as text

const IMPORTS: &str = r#"
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $env_sizes
    (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $env (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_unlink_file" (func $unlink
    (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $open
    (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
"#;

/// Small functions that the programs share. `$say fd at len` writes all or traps; `$create dir
/// name len` opens a new file below a preopened directory and returns the error, with the
/// descriptor at address 32; `$write_open` and `$read_open` do so with one that is there.
/// `$nap nanoseconds` sleeps inside a host call.
const FUNCTIONS: &str = r#"
  (func $say (param $fd i32) (param $at i32) (param $len i32)
    (block $done (loop $more
      (br_if $done (i32.eqz (local.get $len)))
      (i32.store (i32.const 0) (local.get $at))
      (i32.store (i32.const 4) (local.get $len))
      (if (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))
        (then unreachable))
      (local.set $at (i32.add (local.get $at) (i32.load (i32.const 8))))
      (local.set $len (i32.sub (local.get $len) (i32.load (i32.const 8))))
      (br $more))))
  (func $create (param $dir i32) (param $name i32) (param $len i32) (result i32)
    (call $open (local.get $dir) (i32.const 0) (local.get $name) (local.get $len)
      (i32.const 9) (i64.const 64) (i64.const 64) (i32.const 0) (i32.const 32)))
  (func $write_open (param $dir i32) (param $name i32) (param $len i32) (result i32)
    (call $open (local.get $dir) (i32.const 0) (local.get $name) (local.get $len)
      (i32.const 0) (i64.const 64) (i64.const 64) (i32.const 0) (i32.const 32)))
  (func $read_open (param $dir i32) (param $name i32) (param $len i32) (result i32)
    (call $open (local.get $dir) (i32.const 0) (local.get $name) (local.get $len)
      (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 32)))
  (func $copy (param $from i32) (param $to i32)
    (block $done (loop $more
      (i32.store (i32.const 16) (i32.const 4096))
      (i32.store (i32.const 20) (i32.const 4096))
      (if (call $fd_read (local.get $from) (i32.const 16) (i32.const 1) (i32.const 24))
        (then unreachable))
      (br_if $done (i32.eqz (i32.load (i32.const 24))))
      (call $say (local.get $to) (i32.const 4096) (i32.load (i32.const 24)))
      (br $more))))
  ;; A subscription: userdata 0, tag 0 (clock), id 1 (monotonic), timeout at 24.
  (func $nap (param $ns i64)
    (i32.store (i32.const 1040) (i32.const 1))
    (i64.store (i32.const 1048) (local.get $ns))
    (if (call $poll (i32.const 1024) (i32.const 2048) (i32.const 1) (i32.const 40))
      (then unreachable)))
"#;

/// A program with this body of `_start`, and these bytes at address 64.
fn program(data: &str, body: &str) -> Vec<u8> {
    let text = format!(
        "(module {IMPORTS} (memory (export \"memory\") 4) (data (i32.const 64) \"{data}\")
         {FUNCTIONS} (func (export \"_start\") {body}))"
    );
    wat::parse_str(text).expect("a program")
}

fn hello() -> Vec<u8> {
    program(
        "hello\\n",
        "(call $say (i32.const 1) (i32.const 64) (i32.const 6)) (call $exit (i32.const 7))",
    )
}

fn forever() -> Vec<u8> {
    program("", "(loop $l (br $l))")
}

/// Says "tick", then loops for ever.
fn tick_forever() -> Vec<u8> {
    program("tick", "(call $say (i32.const 1) (i32.const 64) (i32.const 4)) (loop $l (br $l))")
}

/// Grows memory until that is refused, and then does as an allocator does.
fn hog() -> Vec<u8> {
    program(
        "",
        "(loop $l
           (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))
           (i32.store (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 4))
                      (i32.const 1))
           (br $l))",
    )
}

/// Sleeps for an hour inside a host call.
fn sleeper() -> Vec<u8> {
    program(
        "zzz",
        "(call $say (i32.const 1) (i32.const 64) (i32.const 3))
         (call $nap (i64.const 3600000000000))",
    )
}

/// Says the same line for ever, a little after a little.
fn talker() -> Vec<u8> {
    program(
        "abcdefghijklmnopqrstuvwxyz\\n",
        "(loop $l
           (call $say (i32.const 1) (i32.const 64) (i32.const 27))
           (call $nap (i64.const 5000000))
           (br $l))",
    )
}

/// Waits for a notice, tries everything but reading on it, and copies it to standard output.
fn reads_its_notice() -> Vec<u8> {
    program(
        ".noticeready",
        "(local $fd i32)
         (call $say (i32.const 2) (i32.const 71) (i32.const 5))
         (block $there (loop $again
           (br_if $there (i32.eqz (call $read_open (i32.const 3) (i32.const 64) (i32.const 7))))
           (call $nap (i64.const 5000000))
           (br $again)))
         (local.set $fd (i32.load (i32.const 32)))
         (if (i32.eqz (call $create (i32.const 3) (i32.const 64) (i32.const 7)))
           (then (call $exit (i32.const 90))))
         (if (i32.eqz (call $write_open (i32.const 3) (i32.const 64) (i32.const 7)))
           (then (call $exit (i32.const 91))))
         (if (i32.eqz (call $unlink (i32.const 3) (i32.const 64) (i32.const 7)))
           (then (call $exit (i32.const 92))))
         (call $copy (local.get $fd) (i32.const 1))",
    )
}

/// Waits for a notice, reads it over and over, and ends when it is gone: with code 0 if each time
/// it began with a brace and ended with one.
fn reads_until_it_is_gone() -> Vec<u8> {
    program(
        ".noticex",
        "(local $spoke i32) (local $fd i32)
         (loop $again
           (if (call $read_open (i32.const 3) (i32.const 64) (i32.const 7))
             (then
               (if (local.get $spoke) (then (call $exit (i32.const 0))))
               (call $nap (i64.const 5000000))
               (br $again)))
           (local.set $fd (i32.load (i32.const 32)))
           (i32.store (i32.const 16) (i32.const 4096))
           (i32.store (i32.const 20) (i32.const 4096))
           (if (call $fd_read (local.get $fd) (i32.const 16) (i32.const 1) (i32.const 24))
             (then unreachable))
           (if (i32.eqz (i32.load (i32.const 24))) (then (call $exit (i32.const 80))))
           (if (i32.ne (i32.load8_u (i32.const 4096)) (i32.const 123))
             (then (call $exit (i32.const 81))))
           (if (i32.ne (i32.load8_u (i32.add (i32.const 4095) (i32.load (i32.const 24))))
                       (i32.const 125))
             (then (call $exit (i32.const 82))))
           (if (call $close (local.get $fd)) (then unreachable))
           (if (i32.eqz (local.get $spoke))
             (then (call $say (i32.const 1) (i32.const 71) (i32.const 1))))
           (local.set $spoke (i32.const 1))
           (br $again))",
    )
}

// ---------------------------------------------------------------- rooms to run jobs in

/// A directory of jobs, with what it takes to start and watch them.
struct Room {
    root: tempfile::TempDir,
    work: Work,
    events: mpsc::Receiver<WorkEvent>,
}

impl Room {
    fn new() -> Self {
        Self::with(Exec::default())
    }

    fn with(exec: Exec) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        // Longer than an address of a unix socket may be.
        let long = "x".repeat(120);
        let (sender, events) = mpsc::channel(64);
        let work = Work::open(root.path().join(long).join("jobs"), exec, sender).expect("opened");
        Self { root, work, events }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.root.path().join(name);
        fs::write(&path, bytes).expect("written");
        path
    }

    fn spec(&self, lease: &str, program: &[u8]) -> Spec {
        spec(lease, self.file(&format!("{lease}.wasm"), program))
    }

    /// Runs a job to its end.
    async fn run(&mut self, spec: Spec) -> (Outcome, Usage) {
        let lease = spec.lease.clone();
        self.work.start(spec).await.expect("started");
        self.end(&lease).await
    }

    /// Waits for the end of a job, and checks that nothing of it is left.
    async fn end(&mut self, lease: &str) -> (Outcome, Usage) {
        let ended = async {
            loop {
                match self.events.recv().await.expect("an event") {
                    WorkEvent::Ended { lease: of, outcome, usage } if of == lease => {
                        return (outcome, usage);
                    }
                    _ => {}
                }
            }
        };
        let ended = tokio::time::timeout(PATIENCE, ended).await.expect("the job ends");
        let status = self.work.status(lease).expect("known");
        assert!(status.state.ended() && status.outcome.as_ref() == Some(&ended.0));
        nothing_left(&status);
        ended
    }

    async fn text(&self, lease: &str, stream: Stream) -> String {
        let mut output = self.work.output(lease).expect("known");
        let mut text = Vec::new();
        loop {
            let chunk = output.read(stream, text.len() as u64, 1000).await.expect("read");
            text.extend(chunk.bytes);
            if chunk.end {
                return String::from_utf8(text).expect("text");
            }
        }
    }

    /// The first sample of the meter, of those taken from now on, that is as wanted.
    async fn sample(&mut self, lease: &str, wanted: impl Fn(&Usage) -> bool) -> Usage {
        let now = boot_ms() - self.work.status(lease).expect("known").started_boot_ms;
        let sampled = async {
            loop {
                match self.events.recv().await.expect("an event") {
                    WorkEvent::Usage { lease: of, usage }
                        if of == lease && usage.wall_ms > now && wanted(&usage) =>
                    {
                        return usage;
                    }
                    WorkEvent::Ended { outcome, .. } => panic!("it ended: {outcome}"),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, sampled).await.expect("a sample")
    }

    /// Waits until the program has written to its standard output.
    async fn spoke(&self, lease: &str) {
        self.spoke_to(lease, Stream::Stdout).await;
    }

    async fn spoke_to(&self, lease: &str, stream: Stream) {
        let mut output = self.work.output(lease).expect("known");
        let chunk = tokio::time::timeout(PATIENCE, output.read(stream, 0, 100)).await;
        assert!(!chunk.expect("in time").expect("read").bytes.is_empty(), "it ended silently");
    }
}

fn spec(lease: &str, program: PathBuf) -> Spec {
    Spec {
        lease: lease.to_owned(),
        token: String::new(),
        runtime: Runtime::Wasm,
        program,
        args: vec!["program".into()],
        env: vec![],
        stdin: None,
        inputs: vec![],
        outputs: vec![],
        cpu_milli: 1000,
        memory: 32 << 20,
        disk: 4 << 20,
        pids: 4,
        deadline_boot_ms: boot_ms() + 600_000,
        grace_ms: 10_000,
        log_limit: DEFAULT_LOG_LIMIT,
        require: vec![],
    }
}

fn nothing_left(status: &Status) {
    assert!(!status.warden.alive(), "the warden lives");
    assert!(!status.runner.is_some_and(|runner| runner.alive()), "the runner lives");
    assert_eq!(status.cgroup, None, "a cgroup is left");
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

// ---------------------------------------------------------------- what a program sees

async fn output_and_exit_code(mut room: Room) {
    let spec = room.spec("00000001", &hello());
    room.work.start(spec.clone()).await.expect("started");
    let first = room.events.recv().await.expect("an event");
    assert!(matches!(first, WorkEvent::Started { .. }), "{first:?}");
    let (outcome, usage) = room.end("00000001").await;
    assert_eq!(outcome, Outcome::Exited { code: 7 });
    assert_eq!(outcome.to_string(), "exited with code 7");
    assert_eq!(room.text("00000001", Stream::Stdout).await, "hello\n");
    assert_eq!(room.text("00000001", Stream::Stderr).await, "");
    assert!(usage.memory_peak > 0 && usage.log_dropped == 0, "{usage:?}");
    let status = room.work.status("00000001").expect("known");
    assert_eq!(status.state, State::Exited);
    // What the offer says is what the job got, or less than it.
    let offered = isolation();
    assert!(offered.iter().all(|word| status.isolation.contains(word)), "{offered:?} {status:?}");
    // A lease has one job.
    assert!(matches!(room.work.start(spec).await, Err(StartError::Exists(_))));
    room.work.forget("00000001").await.expect("forgotten");
    assert_eq!(room.work.status("00000001"), None);
    assert!(room.work.leases().is_empty());
}

async fn arguments_environment_stdin(mut room: Room) {
    let echo = program(
        "",
        "(drop (call $args_sizes (i32.const 1024) (i32.const 1028)))
         (drop (call $args (i32.const 2048) (i32.const 8192)))
         (call $say (i32.const 1) (i32.const 8192) (i32.load (i32.const 1028)))
         (drop (call $env_sizes (i32.const 1024) (i32.const 1028)))
         (drop (call $env (i32.const 2048) (i32.const 8192)))
         (call $say (i32.const 2) (i32.const 8192) (i32.load (i32.const 1028)))
         (call $copy (i32.const 0) (i32.const 1))
         ;; chance and clocks work
         (if (call $random (i32.const 1024) (i32.const 8)) (then unreachable))
         (if (call $clock (i32.const 0) (i64.const 1) (i32.const 1032)) (then unreachable))
         (if (i64.eqz (i64.load (i32.const 1032))) (then unreachable))",
    );
    let mut spec = room.spec("00000002", &echo);
    let long = "0123456789".repeat(2000);
    spec.args = vec!["name".into(), "a b".into(), String::new()];
    spec.env = vec![("COLOUR".into(), "blue".into()), ("EMPTY".into(), String::new())];
    spec.stdin = Some(room.file("stdin", long.as_bytes()));
    let (outcome, _) = room.run(spec).await;
    assert_eq!(outcome, Outcome::Exited { code: 0 });
    let stdout = room.text("00000002", Stream::Stdout).await;
    assert_eq!(stdout, format!("name\0a b\0\0{long}"));
    // Where a notice would be is the one thing that is added, and only where it is not said.
    let stderr = room.text("00000002", Stream::Stderr).await;
    assert_eq!(stderr, "COLOUR=blue\0EMPTY=\0LEASEHOLD_NOTICE=/in/.notice\0");
    let mut spec = room.spec("00000004", &echo);
    spec.env = vec![(NOTICE_VARIABLE.into(), "elsewhere".into())];
    assert_eq!(room.run(spec).await.0, Outcome::Exited { code: 0 });
    let stderr = room.text("00000004", Stream::Stderr).await;
    assert_eq!(stderr, "LEASEHOLD_NOTICE=elsewhere\0");
}

async fn only_declared_outputs_are_kept(mut room: Room) {
    // Descriptor 3 is /in, 4 is /out. Names: kept (64), junk (68), data (72), ../x (76).
    let writer = program(
        "keptjunkdata../x",
        "(if (call $create (i32.const 4) (i32.const 64) (i32.const 4)) (then unreachable))
         (call $say (i32.load (i32.const 32)) (i32.const 64) (i32.const 4))
         (if (call $create (i32.const 4) (i32.const 68) (i32.const 4)) (then unreachable))
         ;; inputs can be read, and not be written or added to
         (if (i32.eqz (call $create (i32.const 3) (i32.const 68) (i32.const 4)))
           (then (call $exit (i32.const 90))))
         (if (i32.eqz (call $create (i32.const 3) (i32.const 72) (i32.const 4)))
           (then (call $exit (i32.const 91))))
         ;; nothing is above
         (if (i32.eqz (call $read_open (i32.const 3) (i32.const 76) (i32.const 4)))
           (then (call $exit (i32.const 92))))
         (if (call $read_open (i32.const 3) (i32.const 72) (i32.const 4)) (then unreachable))
         (call $copy (i32.load (i32.const 32)) (i32.const 1))
         ;; there is no third directory
         (if (i32.eqz (call $read_open (i32.const 5) (i32.const 72) (i32.const 4)))
           (then (call $exit (i32.const 93))))",
    );
    let mut spec = room.spec("00000003", &writer);
    // One that everybody may read, and one that only its owner may.
    let input = room.file("input", b"some input");
    let closed = room.file("closed", b"closed");
    let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode;
    fs::set_permissions(&input, mode(0o644)).expect("set");
    fs::set_permissions(&closed, mode(0o600)).expect("set");
    spec.inputs = vec![
        Input { name: "data".into(), path: closed.clone() },
        Input { name: "sub/dir/data".into(), path: input.clone() },
    ];
    spec.outputs = vec!["kept".into(), "never/made".into()];
    let (outcome, _) = room.run(spec).await;
    assert_eq!(outcome, Outcome::Exited { code: 0 });
    assert_eq!(room.text("00000003", Stream::Stdout).await, "closed");
    let status = room.work.status("00000003").expect("known");
    let names: Vec<&str> = status.outputs.iter().map(|output| output.name.as_str()).collect();
    assert_eq!((names, status.outputs_missing), (vec!["kept"], vec!["never/made".to_owned()]));
    let kept = room.work.output_file("00000003", "kept").expect("kept");
    assert_eq!(fs::read(&kept).expect("read"), b"kept");
    let job = kept.parent().and_then(Path::parent).expect("the job directory").to_owned();
    for gone in ["in", "out", "socket", "outputs/junk"] {
        assert!(!job.join(gone).exists(), "{gone} is left");
    }
    assert_eq!(room.work.output_file("00000003", "junk"), None);
    // The inputs themselves are as they were.
    assert_eq!(fs::read(&closed).expect("read"), b"closed");
    assert_eq!(fs::read(&input).expect("read"), b"some input");
}

// ---------------------------------------------------------------- bad ends

async fn every_bad_end_has_its_name(mut room: Room) {
    let (outcome, _) = room.run(room.spec("00000010", &program("", "unreachable"))).await;
    let Outcome::Trapped { message } = outcome else { panic!("{outcome:?}") };
    assert!(message.contains("unreachable"), "{message}");

    let deep = "(module (memory (export \"memory\") 1) (func $f (call $f) (call $f))
                (func (export \"_start\") (call $f)))";
    let deep = wat::parse_str(deep).expect("a program");
    let (outcome, _) = room.run(room.spec("00000011", &deep)).await;
    let Outcome::Trapped { message } = outcome else { panic!("{outcome:?}") };
    assert!(message.contains("stack"), "{message}");

    let code = program("", "(call $exit (i32.const 200))");
    let (outcome, _) = room.run(room.spec("00000012", &code)).await;
    assert!(matches!(outcome, Outcome::Exited { code: 200 }), "{outcome:?}");
    let status = room.work.status("00000012").expect("known");
    assert_eq!(status.state, State::Exited);
}

async fn what_is_no_program_is_named(mut room: Room) {
    let text = |text: &str| wat::parse_str(text).expect("a module");
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("00000020", b"#!/bin/sh\nexit 0\n".to_vec(), "not WebAssembly"),
        ("00000021", vec![], "not WebAssembly"),
        ("00000022", b"\0asm\x0d\0\x01\0".to_vec(), "component"),
        ("00000023", b"\0asm\x01\0\0\0\xff\xff\xff".to_vec(), "not valid WebAssembly"),
        ("00000024", text("(module)"), "_start"),
        (
            "00000025",
            text("(module (import \"env\" \"f\" (func)) (func (export \"_start\")))"),
            "env",
        ),
        ("00000026", text("(module (func (export \"_start\") (param i32)))"), "_start"),
    ];
    for (lease, bytes, word) in cases {
        let (outcome, _) = room.run(room.spec(lease, &bytes)).await;
        let Outcome::NotRunnable { message } = outcome else { panic!("{lease}: {outcome:?}") };
        assert!(message.contains(word), "{lease}: {message}");
    }
    let mut gone = room.spec("00000027", b"");
    gone.program = room.root.path().join("no such file");
    let (outcome, _) = room.run(gone).await;
    let Outcome::NotRunnable { message } = outcome else { panic!("{outcome:?}") };
    assert!(message.contains("cannot read the program"), "{message}");
}

async fn endless_loop(mut room: Room) {
    let mut spec = room.spec("00000030", &forever());
    spec.deadline_boot_ms = boot_ms() + 2000;
    let deadline = spec.deadline_boot_ms;
    let (outcome, usage) = room.run(spec).await;
    assert_eq!(outcome, Outcome::Deadline);
    assert!(boot_ms() >= deadline, "it ended before its deadline");
    assert!(usage.cpu_ms > 0 && usage.wall_ms > 0, "{usage:?}");

    // Inside a start function, and with a deadline that has passed already.
    let start = "(module (func $s (loop $l (br $l))) (start $s) (func (export \"_start\")))";
    let mut spec = room.spec("00000031", &wat::parse_str(start).expect("a module"));
    spec.deadline_boot_ms = 1;
    let (outcome, _) = room.run(spec).await;
    assert_eq!(outcome, Outcome::Deadline);
}

async fn memory_is_bounded(mut room: Room) {
    let (outcome, usage) = room.run(room.spec("00000040", &hog())).await;
    assert_eq!(outcome, Outcome::OutOfMemory { limit: 32 << 20 });
    assert_eq!(outcome.to_string(), "memory limit of 33554432 bytes reached");
    assert!(usage.memory_peak > 0, "{usage:?}");
    // More than there ever can be, from the first page on.
    let large = "(module (memory (export \"memory\") 60000) (func (export \"_start\")))";
    let large = wat::parse_str(large).expect("a module");
    let (outcome, _) = room.run(room.spec("00000041", &large)).await;
    assert_eq!(outcome, Outcome::OutOfMemory { limit: 32 << 20 });
}

async fn disk_is_bounded(mut room: Room) {
    // One file that grows for ever.
    let grows = program(
        "f",
        "(if (call $create (i32.const 4) (i32.const 64) (i32.const 1)) (then unreachable))
         (loop $l (call $say (i32.load (i32.const 32)) (i32.const 64) (i32.const 65536)) (br $l))",
    );
    let mut spec = room.spec("00000050", &grows);
    spec.outputs = vec!["f".into()];
    let (outcome, _) = room.run(spec).await;
    assert_eq!(outcome, Outcome::OutOfDisk { limit: 4 << 20 });
    let status = room.work.status("00000050").expect("known");
    assert!(status.outputs.iter().all(|output| output.size <= 4 << 20), "{status:?}");

    // Files that lose their names while they are open, and their bytes with them.
    let nameless = program(
        "f",
        "(loop $l
           (if (call $create (i32.const 4) (i32.const 64) (i32.const 1)) (then unreachable))
           (if (call $unlink (i32.const 4) (i32.const 64) (i32.const 1)) (then unreachable))
           (call $say (i32.load (i32.const 32)) (i32.const 64) (i32.const 131072))
           (br $l))",
    );
    let (outcome, _) = room.run(room.spec("00000052", &nameless)).await;
    // Either it is seen, or it runs out of descriptors first: 256 of them.
    let seen = outcome == Outcome::OutOfDisk { limit: 4 << 20 };
    assert!(seen || matches!(outcome, Outcome::Trapped { .. }), "{outcome:?}");

    // Ever more files, each small: the name is a counter of four letters.
    let many = program(
        "aaaa",
        "(local $n i32)
         (loop $l
           (i32.store (i32.const 64) (i32.add (i32.const 0x61616161)
             (i32.or (i32.and (local.get $n) (i32.const 0xf))
             (i32.or (i32.shl (i32.and (local.get $n) (i32.const 0xf0)) (i32.const 4))
                     (i32.shl (i32.and (local.get $n) (i32.const 0xf00)) (i32.const 8))))))
           (if (i32.eqz (call $create (i32.const 4) (i32.const 64) (i32.const 4)))
             (then (call $say (i32.load (i32.const 32)) (i32.const 64) (i32.const 65536))
                   (local.set $n (i32.add (local.get $n) (i32.const 1)))))
           (br $l))",
    );
    let (outcome, _) = room.run(room.spec("00000051", &many)).await;
    assert_eq!(outcome, Outcome::OutOfDisk { limit: 4 << 20 });
}

async fn flood(mut room: Room) {
    // 256 times 64 KiB to standard output, the same to standard error.
    let flood = program(
        "x",
        "(local $n i32)
         (loop $l
           (call $say (i32.const 1) (i32.const 64) (i32.const 65536))
           (call $say (i32.const 2) (i32.const 64) (i32.const 65536))
           (local.set $n (i32.add (local.get $n) (i32.const 1)))
           (br_if $l (i32.lt_u (local.get $n) (i32.const 256))))
         (call $exit (i32.const 3))",
    );
    let mut spec = room.spec("00000060", &flood);
    spec.log_limit = 100_000;
    let (outcome, usage) = room.run(spec).await;
    assert_eq!(outcome, Outcome::Exited { code: 3 }, "a full log must not end the program");
    assert_eq!(usage.log_dropped, 2 * (256 * 65536 - 100_000));
    assert_eq!(room.text("00000060", Stream::Stdout).await.len(), 100_000);
    assert_eq!(room.text("00000060", Stream::Stderr).await.len(), 100_000);
}

// ---------------------------------------------------------------- while it runs

async fn stop(mut room: Room) {
    let started = Instant::now();
    for (lease, program) in [("00000070", tick_forever()), ("00000071", sleeper())] {
        let mut spec = room.spec(lease, &program);
        // If stopping needed the deadline or the grace, this would run out of patience.
        spec.grace_ms = 3_600_000;
        spec.deadline_boot_ms = boot_ms() + 3_600_000;
        room.work.start(spec).await.expect("started");
        room.spoke(lease).await;
        room.work.stop(lease, "the tenant asked").await;
        let (outcome, _) = room.end(lease).await;
        assert_eq!(outcome, Outcome::Stopped { why: "the tenant asked".into() });
        // Stopping what has ended, and what never was, does nothing.
        room.work.stop(lease, "again").await;
        room.work.stop("ffffffff", "nobody").await;
    }
    assert!(started.elapsed() < PATIENCE);
}

/// Says something at a warden's door, which stays open as long as what is returned.
fn knock(dir: &Path, words: &[u8]) -> UnixStream {
    // An address of a unix socket is short: through the open directory, as the node does it.
    let open = fs::File::open(dir).expect("opens");
    let path = format!("/proc/self/fd/{}/socket", open.as_raw_fd());
    let mut stream = UnixStream::connect(path).expect("connects");
    // A warden that has heard enough hangs up.
    let _ = stream.write_all(words);
    stream
}

async fn wardens_door(mut room: Room) {
    let mut spec = room.spec("00000075", &tick_forever());
    spec.grace_ms = 120_000;
    spec.deadline_boot_ms = boot_ms() + 120_000;
    room.work.start(spec).await.expect("started");
    room.spoke("00000075").await;
    let dir = room.root.path().join("x".repeat(120)).join("jobs/00000075");
    let long = vec![b'a'; 2 << 20];
    let mut doors = Vec::new();
    for words in [
        &b"\n"[..],
        b"no json\n",
        b"{\"stop\":{}}\n",
        b"{\"unheard_of\":1}\n",
        b"[[[[[[[[[[[[[[[[[[",
        b"{\"stop\":{\"why\":\"half a li",
        &[0xff; 300],
        &long,
        b"",
    ] {
        doors.push(knock(&dir, words));
    }
    // Those stay open, and the job goes on as if nobody had knocked.
    let running =
        || room.work.status("00000075").map(|status| status.state) == Some(State::Running);
    // What its program said may be there before its warden's word.
    until("it runs", running).await;
    room.work.extend("00000075", boot_ms() + 240_000).await.expect("it hears its node");
    room.work.stop("00000075", "enough").await;
    let (outcome, _) = room.end("00000075").await;
    assert_eq!(outcome, Outcome::Stopped { why: "enough".into() });
    drop(doors);
}

async fn extend(mut room: Room) {
    let mut spec = room.spec("00000080", &tick_forever());
    let first = boot_ms() + 60_000;
    spec.deadline_boot_ms = first;
    room.work.start(spec).await.expect("started");
    let refused = room.work.extend("00000080", first - 1).await;
    assert!(matches!(refused, Err(AskError::Refused(_))), "{refused:?}");
    room.work.extend("00000080", first + 60_000).await.expect("extended");
    room.spoke("00000080").await;
    // The status says so as soon as it is acknowledged.
    let path = room.root.path().join("x".repeat(120)).join("jobs/00000080/status.json");
    let status: Status = serde_json::from_slice(&fs::read(path).expect("read")).expect("a status");
    assert_eq!(status.deadline_boot_ms, first + 60_000);
    let error = room.work.forget("00000080").await.expect_err("it runs");
    assert!(error.to_string().contains("not reaped"), "{error}");
    room.work.stop("00000080", "enough").await;
    room.end("00000080").await;
    assert!(room.work.extend("00000080", first + 120_000).await.is_err());
    assert!(matches!(room.work.extend("ffffffff", 0).await, Err(AskError::Unknown(_))));

    // It really holds: a short deadline is passed alive, and the longer one then ends it. On a
    // slow machine the short one may pass before it can be moved: then with more room.
    for (n, room_ms) in [3000, 12_000, 60_000].into_iter().enumerate() {
        let lease = format!("0000008{}", n + 1);
        let mut spec = room.spec(&lease, &tick_forever());
        let short = boot_ms() + room_ms;
        spec.deadline_boot_ms = short;
        room.work.start(spec).await.expect("started");
        let extended = room.work.extend(&lease, short + 2000).await;
        let (outcome, _) = room.end(&lease).await;
        assert_eq!(outcome, Outcome::Deadline);
        if extended.is_ok() {
            assert!(boot_ms() >= short + 2000, "it ended at its old deadline");
            return;
        }
    }
    panic!("no deadline could be moved in time");
}

async fn follow(mut room: Room) {
    room.work.start(room.spec("00000090", &tick_forever())).await.expect("started");
    let mut output = room.work.output("00000090").expect("known");
    let mut text = Vec::new();
    while text.len() < 4 {
        let chunk = output.read(Stream::Stdout, text.len() as u64, 1).await.expect("read");
        assert!(chunk.bytes.len() == 1 && !chunk.end);
        text.extend(chunk.bytes);
    }
    assert_eq!(text, b"tick");
    // The next read waits for more, and hears of the end.
    let waits = tokio::spawn(async move { output.read(Stream::Stdout, 4, 10).await });
    room.work.stop("00000090", "enough").await;
    room.end("00000090").await;
    let last = waits.await.expect("joined").expect("read");
    assert!(last.bytes.is_empty() && last.end);
}

async fn side_by_side(mut room: Room) {
    let leases: Vec<String> = (0..4).map(|n| format!("000000a{n}")).collect();
    for lease in &leases {
        room.work.start(room.spec(lease, &tick_forever())).await.expect("started");
    }
    for lease in &leases {
        room.spoke(lease).await;
    }
    for lease in &leases {
        room.work.stop(lease, "enough").await;
        let (outcome, _) = room.end(lease).await;
        assert_eq!(outcome, Outcome::Stopped { why: "enough".into() });
    }
}

// ---------------------------------------------------------------- frozen, and told

async fn frozen(mut room: Room) {
    uses_no_processor_while_frozen(&mut room, "00000130").await;
    let unknown = room.work.freeze("ffffffff").await;
    assert!(matches!(unknown, Err(AskError::Unknown(_))), "{unknown:?}");
    // Where no cgroup freezes, a signal does.
    let mut room = Room::with(Exec { cgroups: false, ..Exec::default() });
    uses_no_processor_while_frozen(&mut room, "00000131").await;
}

async fn uses_no_processor_while_frozen(room: &mut Room, lease: &str) {
    let mut spec = room.spec(lease, &tick_forever());
    // If its end needed the grace, this would run out of patience.
    spec.grace_ms = 3_600_000;
    let deadline = spec.deadline_boot_ms;
    room.work.start(spec).await.expect("started");
    room.spoke(lease).await;
    for _ in 0..2 {
        room.work.freeze(lease).await.expect("frozen");
        room.work.freeze(lease).await.expect("still frozen");
        until("the status", || room.work.status(lease).is_some_and(|status| status.frozen)).await;
        // The first sample from now on may hold what the kernel had not counted yet.
        let first = room.sample(lease, |_| true).await;
        let second = room.sample(lease, |_| true).await;
        let third = room.sample(lease, |_| true).await;
        assert_eq!((second.cpu_ms, third.cpu_ms), (first.cpu_ms, first.cpu_ms));
        assert!(third.wall_ms > first.wall_ms && third.memory_mib_ms > first.memory_mib_ms);
        room.work.thaw(lease).await.expect("thawed");
        room.work.thaw(lease).await.expect("still thawed");
        until("the status", || room.work.status(lease).is_some_and(|status| !status.frozen)).await;
        room.sample(lease, |usage| usage.cpu_ms > third.cpu_ms).await;
    }
    // Its term is its term, and it ends in order, frozen or not.
    room.work.freeze(lease).await.expect("frozen");
    room.work.extend(lease, deadline + 1).await.expect("extended");
    room.work.stop(lease, "enough").await;
    let (outcome, _) = room.end(lease).await;
    assert_eq!(outcome, Outcome::Stopped { why: "enough".into() });
    assert!(room.work.status(lease).is_some_and(|status| !status.frozen));
    let ended = room.work.freeze(lease).await;
    assert!(matches!(ended, Err(AskError::Refused(_))), "{ended:?}");
}

async fn frozen_at_deadline(mut room: Room) {
    // On a slow machine the deadline may pass before it is frozen: then with more room.
    for (n, room_ms) in [3000, 12_000, 60_000].into_iter().enumerate() {
        let lease = format!("0000014{n}");
        let mut spec = room.spec(&lease, &tick_forever());
        // If it were not thawed, only the end of the grace would end it.
        spec.grace_ms = 3_600_000;
        spec.deadline_boot_ms = boot_ms() + room_ms;
        let deadline = spec.deadline_boot_ms;
        room.work.start(spec).await.expect("started");
        let frozen = room.work.freeze(&lease).await;
        let (outcome, _) = room.end(&lease).await;
        assert_eq!(outcome, Outcome::Deadline);
        assert!(boot_ms() >= deadline, "it ended before its deadline");
        if frozen.is_ok() {
            return;
        }
    }
    panic!("no job could be frozen in time");
}

async fn killed_frozen(mut room: Room) {
    for (lease, cgroups) in [("00000150", true), ("00000151", false)] {
        if !cgroups {
            room = Room::with(Exec { cgroups, ..Exec::default() });
        }
        room.work.start(room.spec(lease, &tick_forever())).await.expect("started");
        room.spoke(lease).await;
        room.work.freeze(lease).await.expect("frozen");
        let status = room.work.status(lease).expect("known");
        status.warden.kill().expect("killed");
        let (outcome, _) = room.end(lease).await;
        assert!(matches!(outcome, Outcome::Lost { .. }), "{outcome:?}");
        assert!(room.work.status(lease).is_some_and(|status| !status.frozen));
    }
}

/// Runs a program that waits for its notice, and checks what it read.
async fn finds_its_notice(room: &mut Room, lease: &str) {
    let job = room.work.start(room.spec(lease, &reads_its_notice())).await;
    job.expect("started");
    room.spoke_to(lease, Stream::Stderr).await;
    let reason = "the owner's own work\nis \"back\" ".to_owned() + &"ä".repeat(300);
    let before = unix_ms();
    let notice = Notice { reason: reason.clone(), end_boot_ms: boot_ms() + 300_000 };
    room.work.notice(lease, notice).await.expect("put");
    let after = unix_ms();
    assert_eq!(room.end(lease).await.0, Outcome::Exited { code: 0 });
    let text = room.text(lease, Stream::Stdout).await;
    let read: serde_json::Value = serde_json::from_str(&text).expect("json");
    let short: String = reason.chars().take(MAX_REASON).collect();
    assert_eq!(read["reason"], short);
    let ends_in_ms = read["ends_in_ms"].as_u64().expect("a number");
    let ends_at = read["ends_at_unix_ms"].as_u64().expect("a number");
    assert!(ends_in_ms <= 300_000, "{text}");
    assert!((before..=after).contains(&(ends_at - ends_in_ms)), "{before} {text} {after}");
    assert_eq!(read.as_object().map(serde_json::Map::len), Some(3), "{text}");
    let ended = room.work.unnotice(lease).await;
    assert!(matches!(ended, Err(AskError::Refused(_))), "{ended:?}");
}

fn unix_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.expect("after 1970").as_millis()).expect("fits")
}

async fn noticed(mut room: Room) {
    finds_its_notice(&mut room, "00000160").await;

    // Nobody but the warden's user could change it, even without WebAssembly around the program.
    room.work.start(room.spec("00000161", &sleeper())).await.expect("started");
    room.spoke("00000161").await;
    let path = room.root.path().join("x".repeat(120)).join("jobs/00000161/in/.notice");
    // Where there is none, there is none to take back.
    room.work.unnotice("00000161").await.expect("nothing to do");
    let notice = Notice { reason: "r".into(), end_boot_ms: 0 };
    room.work.notice("00000161", notice.clone()).await.expect("put");
    let (file, dir) = (fs::metadata(&path), fs::metadata(path.parent().expect("a parent")));
    let (file, dir) = (file.expect("put"), dir.expect("there"));
    assert_eq!((file.mode() & 0o7777, dir.mode() & 0o7777), (0o444, 0o755));
    let me = rustix::process::geteuid().as_raw();
    assert_eq!((file.uid(), dir.uid()), (me, me));
    let text = fs::read_to_string(&path).expect("read");
    assert!(text.contains("\"ends_in_ms\":0,"), "a time that has passed is now: {text}");
    // It can be put while nothing runs, and taken back.
    room.work.freeze("00000161").await.expect("frozen");
    let again = Notice { reason: "other".into(), ..notice };
    room.work.notice("00000161", again).await.expect("put");
    assert!(fs::read_to_string(&path).expect("read").contains("\"other\""));
    room.work.unnotice("00000161").await.expect("taken back");
    assert!(!path.exists());
    room.work.stop("00000161", "enough").await;
    room.end("00000161").await;
    assert!(!path.parent().is_some_and(Path::exists));
}

async fn notice_whole(mut room: Room) {
    let mut spec = room.spec("00000170", &reads_until_it_is_gone());
    spec.cpu_milli = 2000;
    room.work.start(spec).await.expect("started");
    let notice = |n: usize| Notice { reason: "r".repeat(n), end_boot_ms: boot_ms() };
    room.work.notice("00000170", notice(1)).await.expect("put");
    room.spoke("00000170").await;
    for n in 0..400 {
        room.work.notice("00000170", notice(1 + 250 * (n % 2))).await.expect("put");
    }
    room.work.unnotice("00000170").await.expect("taken back");
    assert_eq!(room.end("00000170").await.0, Outcome::Exited { code: 0 });
}

// ---------------------------------------------------------------- processes that die

async fn killed_warden(mut room: Room) {
    room.work.start(room.spec("000000b0", &tick_forever())).await.expect("started");
    room.spoke("000000b0").await;
    let status = room.work.status("000000b0").expect("known");
    let runner = status.runner.expect("a runner");
    assert!(runner.alive() && status.warden.alive());
    status.warden.kill().expect("killed");
    let (outcome, usage) = room.end("000000b0").await;
    assert!(matches!(outcome, Outcome::Lost { .. }), "{outcome:?}");
    assert!(!runner.alive(), "the runner outlives its warden");
    if root() && status.cgroup.is_some() {
        assert!(usage.cpu_ms > 0, "the cgroup's last count is lost: {usage:?}");
    }
    room.work.forget("000000b0").await.expect("forgotten");
}

async fn frozen_warden(mut room: Room) {
    room.work.start(room.spec("000000b1", &tick_forever())).await.expect("started");
    room.spoke("000000b1").await;
    let warden = room.work.status("000000b1").expect("known").warden;
    let pid = rustix::process::Pid::from_raw(warden.pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    room.work.stop("000000b1", "enough").await;
    let (outcome, _) = room.end("000000b1").await;
    assert!(matches!(outcome, Outcome::Lost { .. }), "{outcome:?}");
}

async fn frozen_past_deadline(mut room: Room) {
    let mut spec = room.spec("000000b2", &tick_forever());
    spec.deadline_boot_ms = boot_ms() + 3000;
    spec.grace_ms = 1000;
    room.work.start(spec).await.expect("started");
    let warden = room.work.status("000000b2").expect("known").warden;
    let pid = rustix::process::Pid::from_raw(warden.pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    let (outcome, _) = room.end("000000b2").await;
    assert!(matches!(outcome, Outcome::Lost { .. }), "{outcome:?}");
}

/// A node in a process of its own: starts the jobs that lie ready, freezes those that are to be,
/// says so, and waits.
async fn be_a_node(dir: &Path) -> ExitCode {
    let read = |name: &str| fs::read(dir.join(name)).expect("read");
    let specs: Vec<Spec> = serde_json::from_slice(&read("specs")).expect("jobs");
    let frozen: Vec<String> = serde_json::from_slice(&read("frozen")).expect("leases");
    let (sender, mut events) = mpsc::channel(64);
    let work = Work::open(dir.join("jobs"), Exec::default(), sender).expect("opened");
    let heard = tokio::spawn(async move { while events.recv().await.is_some() {} });
    for spec in specs {
        work.start(spec).await.expect("started");
    }
    for lease in frozen {
        let mut output = work.output(&lease).expect("known");
        output.read(Stream::Stdout, 0, 1).await.expect("it speaks");
        work.freeze(&lease).await.expect("frozen");
    }
    println!("started");
    heard.await.expect("it hears for ever");
    ExitCode::SUCCESS
}

/// Has another node start jobs, kills that node, and returns their status.
fn start_all_and_kill_the_node(dir: &Path, specs: &[Spec], frozen: &[&str]) -> Vec<Status> {
    let write = |name: &str, json: serde_json::Result<Vec<u8>>| {
        fs::write(dir.join(name), json.expect("json")).expect("written");
    };
    write("specs", serde_json::to_vec(specs));
    write("frozen", serde_json::to_vec(frozen));
    let mut node = Command::new("/proc/self/exe")
        .arg("__node")
        .arg(dir)
        .stdout(Stdio::piped())
        .spawn()
        .expect("a node");
    let mut line = String::new();
    let stdout = node.stdout.take().expect("piped");
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    assert_eq!(line, "started\n");
    node.kill().expect("killed");
    node.wait().expect("reaped");
    specs.iter().map(|spec| status_of(dir, &spec.lease)).collect()
}

fn start_and_kill_the_node(dir: &Path, spec: &Spec) -> Status {
    start_all_and_kill_the_node(dir, std::slice::from_ref(spec), &[]).remove(0)
}

fn status_of(dir: &Path, lease: &str) -> Status {
    let path = dir.join("jobs").join(lease).join("status.json");
    serde_json::from_slice(&fs::read(path).expect("read")).expect("a status")
}

async fn killed_node(room: Room) {
    let dir = room.root.path();
    let mut spec = room.spec("000000c0", &tick_forever());
    spec.deadline_boot_ms = boot_ms() + 6000;
    let status = start_and_kill_the_node(dir, &spec);
    let alive = status.warden.alive() || boot_ms() >= spec.deadline_boot_ms;
    assert!(alive, "the warden died with the node");
    until("the deadline", || status_of(dir, "000000c0").state.ended()).await;
    assert!(boot_ms() >= spec.deadline_boot_ms);
    until("the warden's end", || !status.warden.alive()).await;
    let last = status_of(dir, "000000c0");
    assert_eq!(last.outcome, Some(Outcome::Deadline));
    nothing_left(&last);
}

async fn orphans(room: Room) {
    let dir = room.root.path();
    let spec = room.spec("000000d0", &tick_forever());
    let status = start_and_kill_the_node(dir, &spec);
    until("the program", || {
        fs::read(dir.join("jobs/000000d0/stdout")).is_ok_and(|b| !b.is_empty())
    })
    .await;
    // Beside it, one that was never started, and one whose pids belong to others by now.
    fs::create_dir(dir.join("jobs/000000d1")).expect("made");
    let me = Process::current().expect("this process");
    let mut stale = status_of(dir, "000000d0");
    stale.lease = "000000d2".into();
    stale.warden = Process { pid: me.pid, start: me.start + 1 };
    stale.runner = Some(Process { pid: me.pid, start: me.start + 1 });
    stale.cgroup = None;
    fs::create_dir(dir.join("jobs/000000d2")).expect("made");
    let path = dir.join("jobs/000000d2/status.json");
    fs::write(path, serde_json::to_vec(&stale).expect("json")).expect("written");

    let (sender, _events) = mpsc::channel(64);
    let work = Work::open(dir.join("jobs"), Exec::default(), sender).expect("opened");
    let found: Vec<(String, bool)> =
        work.orphans().into_iter().map(|orphan| (orphan.lease, orphan.live)).collect();
    let expected = [("000000d0", true), ("000000d1", false), ("000000d2", false)];
    assert_eq!(found, expected.map(|(lease, live)| (lease.to_owned(), live)));
    assert!(work.forget("000000d0").await.is_err(), "an orphan is no job that has ended");
    let reaped = work.reap_orphans().await.expect("reaped");
    let leases: Vec<_> = reaped.iter().map(|one| one.lease.as_str()).collect();
    assert_eq!(leases, ["000000d0", "000000d2"]);
    assert!(!dir.join("jobs/000000d1").exists(), "no warden had taken it up");
    assert!(reaped.iter().all(|one| matches!(one.outcome, Outcome::Lost { .. })), "{reaped:?}");
    assert!(reaped.first().is_some_and(|one| one.usage.memory_peak > 0), "{reaped:?}");
    assert!(work.orphans().is_empty());
    assert!(!status.warden.alive());
    nothing_left(&work.status("000000d0").expect("known"));
    // What it had written until then can still be read.
    let chunk = work.output("000000d0").expect("known").read(Stream::Stdout, 0, 10).await;
    assert_eq!(chunk.expect("read").bytes, b"tick");
    for lease in work.leases() {
        work.forget(&lease).await.expect("forgotten");
    }
    assert_eq!(fs::read_dir(dir.join("jobs")).expect("listed").count(), 0);
}

/// A warden whose node was killed before it came to life finds that its job was started anew: it
/// leaves that alone, although the directory has the same name.
async fn late_warden(mut room: Room) {
    let lease = "000000d8";
    room.work.start(room.spec(lease, &tick_forever())).await.expect("started");
    room.spoke(lease).await;
    let dir = room.root.path().join("x".repeat(120)).join("jobs").join(lease);
    let before: Status = serde_json::from_slice(&fs::read(dir.join("status.json")).expect("read"))
        .expect("a status");
    let late = Command::new(std::env::current_exe().expect("this"))
        .args(["__warden", dir.to_str().expect("text"), "1-1"])
        .output()
        .expect("runs");
    assert!(!late.status.success());
    let said = String::from_utf8_lossy(&late.stderr);
    assert!(said.contains("started anew"), "{said}");
    let after: Status = serde_json::from_slice(&fs::read(dir.join("status.json")).expect("read"))
        .expect("a status");
    assert_eq!(after.warden, before.warden);
    room.work.stop(lease, "enough").await;
    let (outcome, _) = room.end(lease).await;
    assert_eq!(outcome, Outcome::Stopped { why: "enough".into() });
}

async fn ended_orphan(room: Room) {
    let dir = room.root.path();
    let spec = room.spec("000000e0", &hello());
    let status = start_and_kill_the_node(dir, &spec);
    until("the warden's end", || !status.warden.alive()).await;
    let (sender, _events) = mpsc::channel(64);
    let work = Work::open(dir.join("jobs"), Exec::default(), sender).expect("opened");
    let reaped = work.reap_orphans().await.expect("reaped");
    let outcomes: Vec<&Outcome> = reaped.iter().map(|one| &one.outcome).collect();
    assert_eq!(outcomes, [&Outcome::Exited { code: 7 }]);
}

// ---------------------------------------------------------------- jobs that outlive their node

impl Room {
    /// A job that another node starts, and that ends in time only if it ends in order.
    fn orphan(&self, lease: &str, program: &[u8], token: &str) -> Spec {
        let mut spec = self.spec(lease, program);
        spec.token = token.into();
        spec.grace_ms = 3_600_000;
        spec
    }

    /// The directory of an orphan's job.
    fn orphan_dir(&self, lease: &str) -> PathBuf {
        self.root.path().join("jobs").join(lease)
    }

    /// Waits until an orphan's program runs and has said something.
    async fn orphan_spoke(&self, lease: &str) {
        let dir = self.orphan_dir(lease);
        until("the program", || fs::read(dir.join("stdout")).is_ok_and(|b| !b.is_empty())).await;
        // The warden's own word that it runs is older, and on disk.
        assert_eq!(status_of(self.root.path(), lease).state, State::Running);
    }

    /// The node after its restart.
    fn restarted(self) -> Self {
        let (sender, events) = mpsc::channel(64);
        let work = Work::open(self.root.path().join("jobs"), Exec::default(), sender);
        Self { work: work.expect("opened"), events, root: self.root }
    }

    async fn adopt(&self, keep: impl Fn(&Orphan) -> bool + Send) -> Adopted {
        let adopted = tokio::time::timeout(PATIENCE, self.work.adopt(keep)).await;
        adopted.expect("in time").expect("adopted")
    }

    /// All events that are still to come until nobody is left to send one.
    async fn last_words(self) -> Vec<WorkEvent> {
        let Self { work, mut events, root: _root } = self;
        drop(work);
        let mut words = Vec::new();
        let all = async {
            while let Some(event) = events.recv().await {
                words.push(event);
            }
        };
        tokio::time::timeout(PATIENCE, all).await.expect("everybody has gone");
        words
    }
}

/// How often a job's end was told.
fn ends(words: &[WorkEvent], of: &str) -> usize {
    let ended = |word: &&WorkEvent| matches!(word, WorkEvent::Ended { lease, .. } if lease == of);
    words.iter().filter(ended).count()
}

async fn adopted(room: Room) {
    let lease = "00000180";
    let spec = room.orphan(lease, &talker(), "c0ffee");
    let deadline = spec.deadline_boot_ms;
    let before = start_and_kill_the_node(room.root.path(), &spec);
    room.orphan_spoke(lease).await;
    // By a node that stops in order while the job runs, which changes nothing for the job.
    let room = room.restarted();
    let jobs = room.root.path().join("jobs");
    let one = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (sender, _events) = mpsc::channel(64);
        runtime.block_on(async move {
            let work = Work::open(jobs, Exec::default(), sender).expect("opened");
            work.adopt(|_| true).await.expect("adopted")
        })
    });
    let adopted = one.join().expect("joined");
    assert_eq!(adopted.running.len(), 1, "{adopted:?}");
    // By another one: in a task, as a node does it.
    let work = room.work.clone();
    let adopting = tokio::spawn(async move {
        work.adopt(|orphan| orphan.status.as_ref().is_some_and(|s| s.token == "c0ffee")).await
    });
    let adopted = adopting.await.expect("joined").expect("adopted");
    let [status] = adopted.running.as_slice() else { panic!("{adopted:?}") };
    assert_eq!((status.lease.as_str(), status.token.as_str()), (lease, "c0ffee"));
    assert_eq!((status.state, status.frozen), (State::Running, false));
    assert_eq!((status.warden, status.deadline_boot_ms), (before.warden, deadline));
    assert!(adopted.reaped.is_empty() && room.work.orphans().is_empty());
    assert_eq!(room.adopt(|_| true).await, Adopted::default(), "nothing is left to do");

    // It is a job like any other.
    assert_eq!(room.work.status(lease).map(|status| status.state), Some(State::Running));
    assert_eq!(room.work.leases(), [lease]);
    assert!(room.work.forget(lease).await.is_err(), "it runs");
    room.work.extend(lease, deadline + 1).await.expect("extended");
    assert_eq!(status_of(room.root.path(), lease).deadline_boot_ms, deadline + 1);
    room.work.freeze(lease).await.expect("frozen");
    until("the status", || room.work.status(lease).is_some_and(|status| status.frozen)).await;
    room.work.thaw(lease).await.expect("thawed");
    until("the status", || room.work.status(lease).is_some_and(|status| !status.frozen)).await;
    let notice = Notice { reason: "r".into(), end_boot_ms: deadline };
    room.work.notice(lease, notice).await.expect("put");
    assert!(room.orphan_dir(lease).join("in/.notice").exists());

    // Its output is whole, from the beginning on, and goes on.
    let so_far = fs::metadata(room.orphan_dir(lease).join("stdout")).expect("there").len();
    let mut output = room.work.output(lease).expect("known");
    let mut text = Vec::new();
    while text.len() as u64 <= so_far + 27 {
        let chunk = output.read(Stream::Stdout, text.len() as u64, 1000).await.expect("read");
        assert!(!chunk.end);
        text.extend(chunk.bytes);
    }
    room.work.stop(lease, "enough").await;
    let ended = tokio::time::timeout(PATIENCE, output.ended()).await.expect("it ends");
    assert_eq!(ended.outcome, Some(Outcome::Stopped { why: "enough".into() }));
    nothing_left(&ended);
    let line = b"abcdefghijklmnopqrstuvwxyz\n";
    let text = room.text(lease, Stream::Stdout).await;
    assert!(text.bytes().zip(line.iter().cycle()).all(|(byte, expected)| byte == *expected));
    let words = room.last_words().await;
    assert_eq!(ends(&words, lease), 1, "{words:?}");
    let told = |is: fn(&WorkEvent) -> bool| words.iter().any(is);
    assert!(told(|word| matches!(word, WorkEvent::Usage { .. })), "{words:?}");
    assert!(!told(|word| matches!(word, WorkEvent::Started { .. })), "it is told twice: {words:?}");
}

async fn adopted_frozen(room: Room) {
    let leases = ["00000190", "00000191"];
    let specs = leases.map(|lease| room.orphan(lease, &tick_forever(), ""));
    start_all_and_kill_the_node(room.root.path(), &specs, &leases[..1]);
    room.orphan_spoke(leases[1]).await;
    let mut room = room.restarted();
    let adopted = room.adopt(|_| true).await;
    let frozen: Vec<bool> = adopted.running.iter().map(|status| status.frozen).collect();
    assert_eq!(frozen, [true, false], "{adopted:?}");
    let first = room.sample(leases[0], |_| true).await;
    let second = room.sample(leases[0], |_| true).await;
    assert_eq!(first.cpu_ms, second.cpu_ms);
    room.work.thaw(leases[0]).await.expect("thawed");
    room.sample(leases[0], |usage| usage.cpu_ms > second.cpu_ms).await;
    room.work.stop(leases[0], "enough").await;
    assert_eq!(room.end(leases[0]).await.0, Outcome::Stopped { why: "enough".into() });
    // A warden of another parent is missed as soon as one's own child.
    let status = room.work.status(leases[1]).expect("known");
    status.warden.kill().expect("killed");
    let (outcome, _) = room.end(leases[1]).await;
    assert!(matches!(outcome, Outcome::Lost { .. }), "{outcome:?}");
    let words = room.last_words().await;
    assert_eq!(leases.map(|lease| ends(&words, lease)), [0, 0], "{words:?}");
}

async fn adopted_or_reaped(room: Room) {
    let jobs = [
        ("000001a0", "aa"), // wanted
        ("000001a1", "bb"), // unknown to the books
        ("000001a2", "aa"), // its warden is frozen
        ("000001a3", "aa"), // its warden dies before it is asked
        ("000001a4", "aa"), // it ends in order before it is asked
        ("000001a5", ""),   // its specification is of a version without tokens
    ];
    let specs = jobs.map(|(lease, token)| room.orphan(lease, &tick_forever(), token));
    let statuses = start_all_and_kill_the_node(room.root.path(), &specs, &[]);
    for (lease, _) in jobs {
        room.orphan_spoke(lease).await;
    }
    // One that was never started.
    fs::create_dir(room.orphan_dir("000001a6")).expect("made");
    let path = room.orphan_dir("000001a5").join("spec.json");
    let text = fs::read_to_string(&path).expect("read");
    assert!(text.contains("\"token\":\"\","), "{text}");
    fs::write(&path, text.replace("\"token\":\"\",", "")).expect("written");

    let mut room = room.restarted();
    let [_, _, frozen, killed, stopped, _] = statuses.as_slice() else { panic!("{statuses:?}") };
    let pid = rustix::process::Pid::from_raw(frozen.warden.pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    killed.warden.kill().expect("killed");
    let _door = knock(&room.orphan_dir("000001a4"), b"{\"ask\":\"stop\",\"why\":\"enough\"}\n");
    until("their ends", || !killed.warden.alive() && !stopped.warden.alive()).await;

    let asked = std::sync::Mutex::new(Vec::new());
    let keep = |orphan: &Orphan| {
        let status = orphan.status.as_ref().expect("it lives");
        asked.lock().expect("whole").push(orphan.lease.clone());
        ["aa", ""].contains(&status.token.as_str())
    };
    let adopted = room.adopt(keep).await;
    let running: Vec<&str> = adopted.running.iter().map(|status| status.lease.as_str()).collect();
    assert_eq!(running, ["000001a0", "000001a5"]);
    let reaped: Vec<(&str, Option<&str>)> = adopted
        .reaped
        .iter()
        .map(|one| match &one.outcome {
            Outcome::Stopped { why } => (one.lease.as_str(), Some(why.as_str())),
            Outcome::Lost { .. } => (one.lease.as_str(), None),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected =
        [("000001a1", None), ("000001a2", None), ("000001a3", None), ("000001a4", Some("enough"))];
    assert_eq!(reaped, expected);
    assert!(!room.orphan_dir("000001a6").exists(), "nothing is left of what was never started");
    // Only those are asked about that could be kept.
    let asked = asked.into_inner().expect("whole");
    assert_eq!(asked, ["000001a0", "000001a1", "000001a2", "000001a5"]);
    // Of those that are not adopted nothing runs, and what they said can be read.
    for (lease, _) in &expected {
        let known = statuses.iter().find(|status| status.lease == *lease).expect("started");
        assert!(!known.warden.alive() && !known.runner.is_some_and(|runner| runner.alive()));
        nothing_left(&room.work.status(lease).expect("known"));
        assert_eq!(room.text(lease, Stream::Stdout).await, "tick");
        room.work.forget(lease).await.expect("forgotten");
    }
    // The others run on, undisturbed.
    for lease in ["000001a0", "000001a5"] {
        room.sample(lease, |usage| usage.cpu_ms > 0).await;
        room.work.stop(lease, "enough").await;
        assert_eq!(room.end(lease).await.0, Outcome::Stopped { why: "enough".into() });
    }
}

async fn adopted_ending(room: Room) {
    let leases: Vec<String> = (0..6).map(|n| format!("000001b{n}")).collect();
    let specs: Vec<Spec> =
        leases.iter().map(|lease| room.orphan(lease, &tick_forever(), "")).collect();
    start_all_and_kill_the_node(room.root.path(), &specs, &[]);
    for lease in &leases {
        room.orphan_spoke(lease).await;
    }
    let room = room.restarted();
    // Told to stop at the moment they are looked for: each may be found at any point of its end.
    let stop =
        |lease: &String| knock(&room.orphan_dir(lease), b"{\"ask\":\"stop\",\"why\":\"enough\"}\n");
    let _doors: Vec<UnixStream> = leases.iter().map(stop).collect();
    let adopted = room.adopt(|_| true).await;
    assert!(adopted.running.iter().all(|status| !status.state.ended()), "{adopted:?}");
    let reaped: Vec<String> = adopted.reaped.iter().map(|one| one.lease.clone()).collect();
    for lease in &leases {
        let mut output = room.work.output(lease).expect("known");
        let ended = tokio::time::timeout(PATIENCE, output.ended()).await.expect("it ends");
        assert_eq!(ended.outcome, Some(Outcome::Stopped { why: "enough".into() }));
    }
    let words = room.last_words().await;
    for lease in &leases {
        assert_eq!(ends(&words, lease), usize::from(!reaped.contains(lease)), "{words:?}");
    }
}

async fn adopted_many(room: Room) {
    let leases: Vec<String> = (0..24).map(|n| format!("000001c0{n:02}")).collect();
    let specs: Vec<Spec> = leases.iter().map(|lease| room.orphan(lease, &sleeper(), "")).collect();
    start_all_and_kill_the_node(room.root.path(), &specs, &[]);
    let room = room.restarted();
    let adopted = room.adopt(|_| true).await;
    let running: Vec<&String> = adopted.running.iter().map(|status| &status.lease).collect();
    assert!(running.iter().copied().eq(&leases), "{adopted:?}");
    for lease in &leases {
        room.spoke(lease).await;
        room.work.stop(lease, "enough").await;
    }
    let words = room.last_words().await;
    for lease in &leases {
        assert_eq!(ends(&words, lease), 1, "{words:?}");
    }
}

// ---------------------------------------------------------------- refusals and lower levels

async fn bad_specifications(room: Room) {
    let jobs = room.root.path().join("x".repeat(120)).join("jobs");
    let mut climbs = room.spec("000000f0", &hello());
    climbs.outputs = vec!["../../etc/passwd".into()];
    assert!(matches!(room.work.start(climbs).await, Err(StartError::Spec(_))));
    let mut input = room.spec("000000f1", &hello());
    input.inputs = vec![Input { name: "x".into(), path: "/no/such/file".into() }];
    let error = room.work.start(input).await.expect_err("refused");
    assert!(matches!(&error, StartError::Input { name, .. } if name == "x"), "{error}");
    let mut device = room.spec("000000f2", &hello());
    device.inputs = vec![Input { name: "x".into(), path: "/dev/zero".into() }];
    assert!(matches!(room.work.start(device).await, Err(StartError::Input { .. })));
    let mut notice = room.spec("000000f5", &hello());
    notice.inputs = vec![Input { name: NOTICE.into(), path: "/dev/null".into() }];
    let error = room.work.start(notice).await.expect_err("refused");
    assert!(error.to_string().contains("notices are put"), "{error}");
    assert_eq!(fs::read_dir(&jobs).expect("listed").count(), 0, "something is left");

    let exec = Exec { program: "/no/such/program".into(), ..Exec::default() };
    let broken = Room::with(exec);
    let error = broken.work.start(broken.spec("000000f3", &hello())).await.expect_err("refused");
    assert!(error.to_string().contains("/no/such/program"), "{error}");
    // An executable that is no node at all, and says so.
    let exec = Exec { program: "/bin/false".into(), ..Exec::default() };
    let broken = Room::with(exec);
    let error = broken.work.start(broken.spec("000000f4", &hello())).await.expect_err("refused");
    assert!(matches!(error, StartError::Warden(_)), "{error}");
    assert!(broken.work.leases().is_empty());
}

async fn required_isolation(mut room: Room) {
    let mut spec = room.spec("00000100", &hello());
    spec.require = vec!["wasm".into(), "no_new_privs".into()];
    assert_eq!(room.run(spec).await.0, Outcome::Exited { code: 7 });
    let mut spec = room.spec("00000101", &hello());
    spec.require = vec!["vm".into()];
    let (outcome, _) = room.run(spec).await;
    let Outcome::NotRunnable { message } = outcome else { panic!("{outcome:?}") };
    assert!(message.contains("\"vm\""), "{message}");
}

async fn without_cgroups(_room: Room) {
    let mut room = Room::with(Exec { cgroups: false, ..Exec::default() });
    assert_eq!(room.run(room.spec("00000110", &hello())).await.0, Outcome::Exited { code: 7 });
    let status = room.work.status("00000110").expect("known");
    assert!(status.isolation.iter().all(|word| !word.starts_with("cgroup")), "{status:?}");
    let (outcome, usage) = room.run(room.spec("00000111", &hog())).await;
    assert_eq!(outcome, Outcome::OutOfMemory { limit: 32 << 20 });
    assert!(usage.memory_peak > 0, "metered without cgroups: {usage:?}");
    let mut spec = room.spec("00000112", &tick_forever());
    spec.deadline_boot_ms = boot_ms() + 3000;
    let (outcome, usage) = room.run(spec).await;
    assert_eq!(outcome, Outcome::Deadline);
    assert!(usage.cpu_ms > 0, "{usage:?}");
}

/// The same as an ordinary user, in a process of its own.
async fn be_unprivileged(dir: &Path) -> ExitCode {
    let (sender, events) = mpsc::channel(64);
    let work = Work::open(dir.join("jobs"), Exec::default(), sender).expect("opened");
    let root = tempfile::tempdir_in(dir).expect("a directory");
    let mut room = Room { root, work, events };
    assert_eq!(room.run(room.spec("00000120", &hello())).await.0, Outcome::Exited { code: 7 });
    let status = room.work.status("00000120").expect("known");
    assert!(status.isolation.iter().all(|word| word != "uid"), "{status:?}");
    let offered = isolation();
    assert!(offered.iter().all(|word| status.isolation.contains(word)), "{offered:?} {status:?}");
    let outcome = room.run(room.spec("00000121", &hog())).await.0;
    assert_eq!(outcome, Outcome::OutOfMemory { limit: 32 << 20 });
    uses_no_processor_while_frozen(&mut room, "00000122").await;
    finds_its_notice(&mut room, "00000123").await;
    ExitCode::SUCCESS
}

async fn without_privilege(room: Room) {
    let dir = room.root.path();
    if !root() {
        assert_eq!(be_unprivileged(dir).await, ExitCode::SUCCESS);
        return;
    }
    let nobody = 65_534;
    std::os::unix::fs::chown(dir, Some(nobody), Some(nobody)).expect("given");
    let exit = Command::new("/proc/self/exe")
        .arg("__unprivileged")
        .arg(dir)
        .current_dir("/")
        .env_remove("TMPDIR")
        .uid(nobody)
        .gid(nobody)
        .status()
        .expect("run as an ordinary user");
    assert!(exit.success(), "{exit}");
}
