//! Jobs whose wardens are played by the test: what a warden is told, in which order, and what
//! follows when it does not answer.

use std::fs::{self, File};
use std::path::Path;
use std::process::Child;

use leasehold_proto::words::contract::JobSpec;
use leasehold_proto::{Hash, Resources};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::data::{Data, DataConfig};
use crate::payload::{Declared, Limits};
use crate::work::{Exec, Process, State, Status};

/// When to give up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long something that must not happen is given to happen.
const MOMENT: Duration = Duration::from_millis(300);

const LEASE: LeaseId = LeaseId(Hash([7; 32]));
const DELEGATE: KeyId = KeyId([9; 32]);
const DEADLINE: u64 = u64::MAX / 2;

/// What a warden was asked, and where its answer goes; none breaks the connection off.
type Asking = (Value, oneshot::Sender<Option<Value>>);

fn spec(dir: &Path) -> Spec {
    Spec {
        lease: LEASE.to_string(),
        program: dir.join("program"),
        deadline_boot_ms: DEADLINE,
        ..work::example()
    }
}

fn status(warden: Process, deadline: u64) -> Status {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Status {
        lease: LEASE.to_string(),
        token: "c0ffee".into(),
        state: State::Running,
        frozen: false,
        boot_id: boot_id.trim().to_owned(),
        warden,
        runner: None,
        cgroup: None,
        isolation: vec![],
        deadline_boot_ms: deadline,
        started_boot_ms: 1,
        usage: work::Usage::default(),
        outcome: None,
        outputs: vec![],
        outputs_missing: vec![],
    }
}

/// A warden that does what the test says.
struct Warden {
    asked: mpsc::UnboundedReceiver<Asking>,
    _lock: File,
    /// Ends all conversations.
    _open: DropGuard,
}

impl Warden {
    /// Takes its place in a job directory: `warden` is the process that passes for it.
    fn in_place(dir: &Path, status: &Status) -> Self {
        fs::write(dir.join("status.json"), serde_json::to_vec(status).expect("json"))
            .expect("written");
        let lock = File::options().write(true).create(true).truncate(false).open(dir.join("lock"));
        let lock = lock.expect("a lock");
        lock.try_lock().expect("nobody else is the warden");
        let (asks, asked) = mpsc::unbounded_channel();
        let listener = UnixListener::bind(dir.join("socket")).expect("listens");
        let status = serde_json::to_value(status).expect("json");
        let open = CancellationToken::new();
        let closed = open.clone();
        tokio::spawn(closed.clone().run_until_cancelled_owned(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serving = serve(stream, asks.clone(), status.clone());
                tokio::spawn(closed.clone().run_until_cancelled_owned(serving));
            }
        }));
        Self { asked, _lock: lock, _open: open.drop_guard() }
    }

    /// The next thing it is asked, and where to say what comes of it.
    async fn asked(&mut self) -> (String, Value, oneshot::Sender<Option<Value>>) {
        let asked = timeout(PATIENCE, self.asked.recv()).await.expect("in time");
        let (ask, answer) = asked.expect("its door is open");
        (ask["ask"].as_str().expect("a word").to_owned(), ask, answer)
    }

    /// The next thing it is asked, which it does.
    async fn does(&mut self) -> (String, Value) {
        let (word, ask, answer) = self.asked().await;
        answer.send(Some(done())).expect("somebody waits");
        (word, ask)
    }

    /// Whether nobody asks it anything for a moment.
    async fn is_left_alone(&mut self) -> bool {
        timeout(MOMENT, self.asked.recv()).await.is_err()
    }
}

fn done() -> Value {
    json!({"answer": "done", "deadline_boot_ms": DEADLINE})
}

fn refused() -> Value {
    json!({"answer": "refused", "why": "the test says so"})
}

async fn serve(stream: UnixStream, asks: mpsc::UnboundedSender<Asking>, status: Value) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
        let ask: Value = serde_json::from_str(&line).expect("a line of json");
        line.clear();
        let answer = if ask["ask"] == "watch" {
            json!({"answer": "status", "status": status})
        } else {
            let (answer, answered) = oneshot::channel();
            if asks.send((ask, answer)).is_err() {
                return;
            }
            let Ok(Some(answer)) = answered.await else { return };
            answer
        };
        let mut answer = answer.to_string();
        answer.push('\n');
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn data_plane(dir: &Path, seed: u8) -> (Data, PayloadStore) {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    let payloads = PayloadStore::open_dir(dir, limits).expect("opens");
    let config = DataConfig::new(([127, 0, 0, 1], 0).into());
    let admit = Arc::new(|_| true);
    let (data, _) = Data::start(config, [seed; 32], payloads.clone(), admit).expect("starts");
    (data, payloads)
}

/// A delegate that serves the program of a job.
struct Delegate {
    data: Data,
    program: Payload,
    _room: tempfile::TempDir,
}

impl Delegate {
    fn new() -> Self {
        let room = tempfile::tempdir().expect("a room");
        let (data, payloads) = data_plane(room.path(), 4);
        let bytes = b"a program".as_slice();
        let size = Declared::Exactly(bytes.len() as u64);
        let held = payloads.import(bytes, size).expect("imports");
        let program = Payload { root: held.root.into(), size: held.size };
        Self { data, program, _room: room }
    }

    fn address(&self) -> SocketAddr {
        self.data.local_addr()
    }

    /// A claim's job, of which the lessor knows this of where the delegate is.
    fn claims(&self, sources: Vec<SocketAddr>) -> StartJob {
        StartJob {
            model: None,
            lease: LEASE,
            claim: Hash([1; 32]),
            delegate: KeyId(self.data.public_key()),
            sources,
            job: JobSpec {
                runtime: "wasm".into(),
                program: self.program,
                args: vec![],
                env: vec![],
                stdin: None,
                inputs: vec![],
                outputs: vec![],
                release_after: false,
            },
            shape: Resources::new(1000, 1 << 20, 1 << 20),
            deadline: Boot(DEADLINE),
            grace: Span::secs(1),
        }
    }
}

/// A node's jobs, in a room of their own.
struct Room {
    jobs: Jobs,
    events: mpsc::Receiver<Event>,
    /// What the jobs ask the core.
    commands: mpsc::Receiver<Asked>,
    room: tempfile::TempDir,
    /// The process that passes for an adopted warden.
    warden: Option<Child>,
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(warden) = &mut self.warden {
            let _ = warden.kill();
            let _ = warden.wait();
        }
    }
}

impl Room {
    fn open(room: tempfile::TempDir) -> (Self, Work) {
        // It ends by itself once its directory is gone with the room, or when it is told to.
        let script = "while [ -d \"$1\" ] && [ ! -e \"$1/../gone\" ]; do /bin/sleep 0.05; done";
        let prefix = vec!["-c".into(), script.into()];
        let exec = Exec { program: "/bin/sh".into(), prefix, cgroups: false };
        let (work_events, mut heard) = mpsc::channel(64);
        let work = Work::open(room.path().join("jobs"), exec, work_events).expect("opens");
        let (data, payloads) = data_plane(&room.path().join("payloads"), 3);
        let (events_in, events) = mpsc::channel(64);
        let (commands_in, commands) = mpsc::channel(64);
        let inputs = (events_in, commands_in);
        // Nobody else has the payloads.
        let holders = Holders::new(data, payloads.clone(), mpsc::channel(1).0);
        let jobs = Jobs::new(work.clone(), holders, (payloads, KeyId([9; 32])), inputs, vec![]);
        let tell = jobs.clone();
        tokio::spawn(async move {
            while let Some(event) = heard.recv().await {
                tell.heard(event).await;
            }
        });
        (Self { jobs, events, commands, room, warden: None }, work)
    }

    /// With one running job that was adopted.
    async fn adopted() -> (Self, Warden) {
        let room = tempfile::tempdir().expect("a room");
        let dir = room.path().join("jobs").join(LEASE.to_string());
        fs::create_dir_all(&dir).expect("made");
        let file = json!({"spec": spec(&dir), "prefix": [], "node": "n", "cgroups": false});
        fs::write(dir.join("spec.json"), file.to_string()).expect("written");
        let child = std::process::Command::new("/bin/sleep").arg("600").spawn().expect("sleeps");
        let process = Process::of(i32::try_from(child.id()).expect("a pid")).expect("alive");
        let warden = Warden::in_place(&dir, &status(process, DEADLINE));
        let (mut room, work) = Self::open(room);
        room.warden = Some(child);
        let adopted = work.adopt(|_| true).await.expect("adopts");
        assert_eq!(adopted.running.len(), 1, "{adopted:?}");
        let running = adopted.running.into_iter().map(|status| (status, DELEGATE)).collect();
        room.jobs.adopt(running);
        (room, warden)
    }

    async fn event(&mut self) -> Event {
        timeout(PATIENCE, self.events.recv()).await.expect("in time").expect("jobs live")
    }

    /// Without any job.
    fn empty() -> Self {
        Self::open(tempfile::tempdir().expect("a room")).0
    }

    /// The next thing that the core is asked, which must be where a node is: says so.
    async fn tells_where(&mut self, node: KeyId, at: Vec<SocketAddr>) {
        let asked = timeout(PATIENCE, self.commands.recv()).await.expect("in time");
        let (command, reply) = asked.expect("jobs live");
        assert!(matches!(command, Command::Reach(of) if of == node), "{command:?}");
        let _ = reply.send(Ok(Reply::Reached(node, at)));
    }

    /// The deadline that a job was given to a warden with, once it was.
    async fn given(&self) -> u64 {
        let path = self.room.path().join("jobs").join(LEASE.to_string()).join("spec.json");
        let begun = Instant::now();
        loop {
            if let Ok(bytes) = fs::read(&path) {
                let job: Value = serde_json::from_slice(&bytes).expect("it is written whole");
                return job["spec"]["deadline_boot_ms"].as_u64().expect("a deadline");
            }
            assert!(begun.elapsed() < PATIENCE, "no warden was given the job");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// The warden of a job that was given to one begins to answer.
    fn warden_arrives(&self) -> Warden {
        let dir = self.room.path().join("jobs").join(LEASE.to_string());
        // Its process is none that anybody could end.
        Warden::in_place(&dir, &status(Process { pid: 0, start: 0 }, DEADLINE))
    }

    /// The next word about a deadline.
    async fn extended(&mut self) -> (Boot, bool) {
        loop {
            if let Event::Extended(LEASE, deadline, done) = self.event().await {
                return (deadline, done);
            }
        }
    }
}

#[tokio::test]
async fn a_thaw_does_not_overtake_a_freeze() {
    let (room, mut warden) = Room::adopted().await;
    room.jobs.freeze(LEASE, true);
    let (word, _, answer) = warden.asked().await;
    assert_eq!(word, "freeze");
    // The warden takes its time, and the freeze is lifted meanwhile.
    room.jobs.freeze(LEASE, false);
    assert!(warden.is_left_alone().await, "it is told something else before it has answered");
    answer.send(Some(done())).expect("somebody waits");
    assert_eq!(warden.does().await.0, "thaw");
    assert!(warden.is_left_alone().await, "all is as it is wanted");
}

#[tokio::test]
async fn only_the_last_of_many_instructions_counts() {
    let (room, mut warden) = Room::adopted().await;
    room.jobs.freeze(LEASE, true);
    let (_, _, answer) = warden.asked().await;
    for frozen in [false, true, false, true, false] {
        room.jobs.freeze(LEASE, frozen);
    }
    answer.send(Some(done())).expect("somebody waits");
    assert_eq!(warden.does().await.0, "thaw");
    assert!(warden.is_left_alone().await, "what was lifted again is not told");
}

#[tokio::test]
async fn an_instruction_that_failed_is_given_again() {
    let (room, mut warden) = Room::adopted().await;
    let notified = Notified { why: EndReason::Reclaimed, end: Boot(DEADLINE) };
    for word in ["freeze", "notice", "thaw"] {
        match word {
            "notice" => room.jobs.notify(LEASE, Some(notified)),
            word => room.jobs.freeze(LEASE, word == "freeze"),
        }
        // First a no, then no answer, then it is done.
        for answer in [Some(refused()), None, Some(done())] {
            let (asked, _, to) = warden.asked().await;
            assert_eq!(asked, word);
            to.send(answer).expect("somebody waits");
        }
    }
    assert!(warden.is_left_alone().await, "all is as it is wanted");
}

/// A freeze that nobody answered may be in force: lifting it must be told, although it never
/// counted as done.
#[tokio::test]
async fn what_was_not_answered_may_be_in_force() {
    let (room, mut warden) = Room::adopted().await;
    room.jobs.freeze(LEASE, true);
    let (word, _, answer) = warden.asked().await;
    assert_eq!(word, "freeze");
    room.jobs.freeze(LEASE, false);
    answer.send(None).expect("somebody waits");
    assert_eq!(warden.does().await.0, "thaw");
}

#[tokio::test]
async fn a_deadline_that_is_not_taken_is_given_again() {
    let (mut room, mut warden) = Room::adopted().await;
    let later = Boot(DEADLINE + 1000);
    room.jobs.extend(LEASE, later);
    let (word, ask, answer) = warden.asked().await;
    assert_eq!((word.as_str(), &ask["deadline_boot_ms"]), ("extend", &json!(later.0)));
    answer.send(Some(refused())).expect("somebody waits");
    assert_eq!(room.extended().await, (later, false), "who waits for it asks again");
    assert_eq!(warden.does().await.0, "extend", "also if nobody asks");
    room.jobs.extend(LEASE, later);
    assert_eq!(room.extended().await, (later, true));
    assert!(warden.is_left_alone().await, "it has the deadline");
}

#[tokio::test]
async fn a_stop_waits_for_nothing() {
    let (room, mut warden) = Room::adopted().await;
    room.jobs.freeze(LEASE, true);
    let (word, _, unanswered) = warden.asked().await;
    assert_eq!(word, "freeze");
    room.jobs.stop(LEASE, EndReason::Term);
    assert_eq!(warden.does().await.0, "stop");
    room.jobs.freeze(LEASE, false);
    assert!(warden.is_left_alone().await, "after a stop there is nothing to be told");
    drop(unanswered);
}

#[tokio::test]
async fn a_delegate_whose_address_is_not_known_yet_is_waited_for() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let start = delegate.claims(vec![]);
    let node = start.delegate;
    room.jobs.start(start);
    for _ in 0..3 {
        room.tells_where(node, vec![]).await;
    }
    room.tells_where(node, vec![delegate.address()]).await;
    assert_eq!(room.given().await, DEADLINE);
}

#[tokio::test]
async fn a_delegate_that_has_moved_is_found_again() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    // Nobody answers there: what is bound and never read takes the port.
    let gone = std::net::UdpSocket::bind(("127.0.0.1", 0)).expect("binds");
    let start = delegate.claims(vec![gone.local_addr().expect("an address")]);
    let node = start.delegate;
    room.jobs.start(start);
    room.tells_where(node, vec![delegate.address()]).await;
    assert_eq!(room.given().await, DEADLINE);
}

#[tokio::test]
async fn what_is_kept_from_peers_no_job_of_theirs_gets() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let payloads = &room.jobs.inner.payloads;
    let own = payloads.import(b"own weights".as_slice(), Declared::Exactly(11)).expect("imports");
    payloads.keep_private(own.root).expect("marked");
    let mut start = delegate.claims(vec![delegate.address()]);
    // Its root is known from an offer, its size is guessed.
    let payload = Payload { root: own.root.into(), size: 7 };
    start.job.inputs = vec![Input { name: "weights".into(), payload, index: None }];
    let mut right = start.clone();
    right.job.inputs[0].payload.size = 11;
    for start in [start, right] {
        room.jobs.start(start);
        let ended = room.event().await;
        let Event::JobEnded(LEASE, Outcome::NoPayload(why), _) = &ended else {
            panic!("{ended:?}")
        };
        // Not even how long it is.
        assert_eq!(*why, PayloadError::NotHeld(own.root).to_string());
        room.jobs.remember(LEASE).await;
    }
}

#[tokio::test]
async fn a_delegate_that_is_gone_is_not_waited_for() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let gone = std::net::UdpSocket::bind(("127.0.0.1", 0)).expect("binds");
    let at = vec![gone.local_addr().expect("an address")];
    let start = delegate.claims(at.clone());
    let node = start.delegate;
    room.jobs.start(start);
    room.tells_where(node, at).await;
    let ended = room.event().await;
    assert!(matches!(ended, Event::JobEnded(LEASE, Outcome::NoPayload(_), _)), "{ended:?}");
}

#[tokio::test]
async fn a_job_is_stopped_while_its_delegate_is_looked_for() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let start = delegate.claims(vec![]);
    let node = start.delegate;
    room.jobs.start(start);
    room.tells_where(node, vec![]).await;
    room.jobs.stop(LEASE, EndReason::Released);
    let ended = room.event().await;
    assert!(matches!(ended, Event::JobEnded(LEASE, Outcome::Stopped, _)), "{ended:?}");
}

/// A job is begun once there is a warden, and its directory stays until its end is kept: before the
/// one and after the other a node that starts would take it for one that was not begun.
#[tokio::test]
async fn a_job_leaves_traces_from_its_warden_until_its_end_is_kept() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let dir = room.room.path().join("jobs").join(LEASE.to_string());
    room.jobs.start(delegate.claims(vec![delegate.address()]));
    room.given().await;
    let early = timeout(MOMENT, room.event()).await;
    assert!(early.is_err(), "there is no warden yet: {early:?}");
    let warden = room.warden_arrives();
    let begun = room.event().await;
    assert!(matches!(begun, Event::JobBegun(LEASE)) && dir.exists(), "{begun:?}");
    // The warden is gone, and more jobs end than are kept for late readers.
    drop(warden);
    fs::write(room.room.path().join("jobs").join("gone"), b"").expect("written");
    let ended = room.event().await;
    assert!(matches!(ended, Event::JobEnded(LEASE, Outcome::Lost, _)), "{ended:?}");
    let others = |from: u64| (from..=from + MAX_ENDED as u64).map(|n| Hash::of(&n.to_le_bytes()));
    for other in others(0).map(LeaseId) {
        room.jobs.remember(other).await;
    }
    assert!(dir.exists(), "its end is not kept, and nothing says any more that it was begun");
    room.jobs.noted(LEASE);
    let begun = Instant::now();
    while dir.exists() {
        assert!(begun.elapsed() < PATIENCE, "it stays although its end is kept");
        tokio::task::yield_now().await;
        for other in others(1000).map(LeaseId) {
            room.jobs.remember(other).await;
        }
    }
}

/// Whoever started may have run something, also if the node never heard of it.
#[tokio::test]
async fn a_warden_that_never_answered_leaves_traces() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let dir = room.room.path().join("jobs").join(LEASE.to_string());
    room.jobs.start(delegate.claims(vec![delegate.address()]));
    room.given().await;
    let status = status(Process { pid: 7, start: 0 }, DEADLINE);
    fs::write(dir.join("status.json"), serde_json::to_vec(&status).expect("json"))
        .expect("written");
    fs::write(room.room.path().join("jobs").join("gone"), b"").expect("written");
    let ended = room.event().await;
    assert!(matches!(ended, Event::JobEnded(LEASE, Outcome::NotRunnable(_), _)), "{ended:?}");
    assert!(dir.exists(), "nothing says any more that it was begun");
}

#[tokio::test]
async fn a_warden_starts_with_the_newest_deadline() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let start = delegate.claims(vec![]);
    let node = start.delegate;
    room.jobs.start(start);
    room.tells_where(node, vec![]).await;
    // Renewed while the program is still being fetched: there is nothing to be ended too early.
    let later = Boot(DEADLINE + 1000);
    room.jobs.extend(LEASE, later);
    assert_eq!(room.extended().await, (later, true));
    // A shorter one that comes late changes nothing.
    room.jobs.extend(LEASE, Boot(DEADLINE + 500));
    assert!(room.extended().await.1);
    room.tells_where(node, vec![delegate.address()]).await;
    assert_eq!(room.given().await, later.0, "its warden would end it too early");
}

/// A node that stood still between the decision and this, or that fetched for long.
#[tokio::test]
async fn a_job_whose_time_is_over_is_not_begun() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    let over = Boot(work::boot_ms());
    room.jobs.start(StartJob { deadline: over, ..delegate.claims(vec![delegate.address()]) });
    let ended = room.event().await;
    assert!(matches!(ended, Event::JobEnded(LEASE, Outcome::Deadline, _)), "{ended:?}");
    let jobs = room.room.path().join("jobs").join(LEASE.to_string());
    assert!(!jobs.exists(), "no warden was given it");
}

#[tokio::test]
async fn while_a_warden_starts_no_deadline_is_agreed_to() {
    let (delegate, mut room) = (Delegate::new(), Room::empty());
    room.jobs.start(delegate.claims(vec![delegate.address()]));
    assert_eq!(room.given().await, DEADLINE);
    // The job is written down with the old deadline, and its warden is not there yet.
    let later = Boot(DEADLINE + 1000);
    room.jobs.extend(LEASE, later);
    let early = timeout(MOMENT, room.extended()).await;
    assert!(early.is_err(), "nobody has {early:?} in force");
    let mut warden = room.warden_arrives();
    let (word, ask, answer) = warden.asked().await;
    assert_eq!((word.as_str(), &ask["deadline_boot_ms"]), ("extend", &json!(later.0)));
    let early = timeout(MOMENT, room.extended()).await;
    assert!(early.is_err(), "nobody has {early:?} in force");
    answer.send(Some(done())).expect("somebody waits");
    assert_eq!(room.extended().await, (later, true));
}
