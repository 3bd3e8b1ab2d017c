//! Payloads between real processes that are killed, stopped and lie: what arrives is right to the
//! byte, and little of it comes twice.
//!
//! Each side is this test executable once more, with a payload store and a data plane of its own; it
//! says on standard output where it listens and how far it is.

#[path = "common/dice.rs"]
mod dice;

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use dice::Dice;
use leasehold_node::data::{Data, DataConfig, FetchError, Holder};
use leasehold_node::payload::{Declared, Limits, PayloadStore, Root};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

const GROUP: u64 = 256 * 1024;
/// What a kill may cost: marks are written every 4 MiB, and what is on its way to being verified and
/// written when it comes is lost as well.
const LOST: u64 = 8 << 20;
/// Nothing here waits for a fixed time; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(120);
/// Which part a child process plays, as JSON.
const PART: &str = "LEASEHOLD_PAYLOAD_PART";

/// What a process does.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    store: PathBuf,
    seed: u8,
    listen: SocketAddr,
    /// Bytes a second that it sends, so that there is time to kill somebody.
    upload: Option<u64>,
    /// What it fetches.
    fetch: Option<Wanted>,
    /// How many bytes the disk has that its store is on, and when they run out; any disk if not said.
    disk: Option<(u64, Full)>,
}

/// When somebody else takes what is left of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Full {
    /// Nobody does.
    Never,
    /// Once something has come.
    Meanwhile,
    /// Before, until the fetch has failed; then there is room again and it is tried once more.
    Before,
}

/// Takes all that is left of the disk that `dir` is on.
fn fill(dir: &Path) {
    let mut file = fs::File::create(dir.join("filler")).expect("made");
    for piece in [1 << 16, 1 << 10, 1] {
        while file.write_all(&vec![1; piece]).is_ok() {}
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Wanted {
    root: String,
    size: u64,
    holders: Vec<(SocketAddr, [u8; 32])>,
}

/// What a process says.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Said {
    Listens(SocketAddr, [u8; 32]),
    /// So many bytes came over the network in this process, so many are here.
    Moving(u64, u64),
    /// How it ended: how many bytes came over the network, or what went wrong.
    Ended(Result<u64, String>),
}

fn any() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn open(dir: &Path) -> PayloadStore {
    let limits = Limits { keep_free: 0, ..Limits::default() };
    PayloadStore::open_dir(dir, limits).expect("a store")
}

/// Not a test of its own: what [`Side::start`] starts.
#[test]
fn child_process() {
    let Ok(part) = std::env::var(PART) else { return };
    let part: Part = serde_json::from_str(&part).expect("a part");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(play(part));
}

fn say(what: &Said) {
    let text = serde_json::to_string(what).expect("JSON");
    // Whoever reads it may be gone: then this process soon is, too.
    let _ = io::stdout().write_all(format!("\n>{text}\n").as_bytes());
}

async fn play(part: Part) {
    let store = open(&part.store);
    let mut config = DataConfig::new(part.listen);
    config.upload_rate = part.upload;
    // A peer that was killed is to be noticed soon.
    config.idle_timeout = Duration::from_millis(800);
    config.keep_alive = Duration::from_millis(200);
    config.handshake_timeout = Duration::from_secs(1);
    let held = store.clone();
    let (data, _arrivals) =
        Data::start(config, [part.seed; 32], store, Arc::new(|_| true)).expect("starts");
    say(&Said::Listens(data.local_addr(), data.public_key()));
    if let Some(Wanted { root, size, holders }) = part.fetch {
        let holders = holders.into_iter();
        let holders =
            holders.map(|(address, key)| Holder { key, addresses: vec![address], whole: true });
        let root = root.parse().expect("a root");
        let progress = |now: leasehold_node::data::Progress| {
            say(&Said::Moving(data.stats().payload_received, now.bytes));
        };
        let holders: Vec<_> = holders.collect();
        let beside = part.store.parent().expect("a directory").to_path_buf();
        let full = part.disk.map_or(Full::Never, |(_, full)| full);
        let mut filled = false;
        let progress = |now: leasehold_node::data::Progress| {
            if full == Full::Meanwhile && now.bytes > 0 && !filled {
                fill(&beside);
                filled = true;
            }
            progress(now);
        };
        if full == Full::Before {
            fill(&beside);
            let error = data.fetch(holders.clone(), root, size, |_| {}).await.expect_err("no room");
            assert!(error.to_string().contains("no space"), "{error}");
            assert_eq!(data.stats().payload_received, 0, "nothing is asked for that has no room");
            fs::remove_file(beside.join("filler")).expect("removed");
        }
        let fetched = data.fetch(holders, root, size, progress).await;
        // The disk of its own goes with this process.
        if part.disk.is_some() && fetched.is_ok() {
            held.verify(root).expect("its bytes are on disk");
        }
        let ended = fetched.map(|_| data.stats().payload_received);
        say(&Said::Ended(ended.map_err(|error: FetchError| error.to_string())));
    }
    // Until whoever started this process lets go of it.
    let _ = tokio::task::spawn_blocking(|| io::copy(&mut io::stdin(), &mut io::sink())).await;
}

/// Mounts memory of so many bytes at a directory, and goes on with what follows.
const MOUNTS: &str = r#"mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@""#;

/// One process, killed when dropped.
struct Side {
    child: Child,
    _stdin: Option<ChildStdin>,
    heard: Receiver<Said>,
    address: SocketAddr,
    key: [u8; 32],
}

impl Side {
    fn start(part: &Part) -> Self {
        let exe = std::env::current_exe().expect("this executable");
        let mut command = match part.disk {
            None => Command::new(exe),
            Some((size, _)) => {
                // A disk of its own, seen by nobody else, which goes with it.
                let dir = part.store.parent().expect("a directory");
                let mut command = Command::new("unshare");
                command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]).arg(MOUNTS);
                command.args(["sh", &size.to_string()]).arg(dir).arg(exe);
                command
            }
        };
        let mut child = command
            .args(["--exact", "child_process", "--nocapture", "--test-threads", "1"])
            .env(PART, serde_json::to_string(part).expect("JSON"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (told, heard) = sync_channel(100_000);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let said = line.strip_prefix('>').map(serde_json::from_str);
                if let Some(Ok(said)) = said
                    && told.send(said).is_err()
                {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        let mut side = Self { child, _stdin: stdin, heard, address: any(), key: [0; 32] };
        match side.next() {
            Some(Said::Listens(address, key)) => (side.address, side.key) = (address, key),
            other => panic!("it does not listen: {other:?}"),
        }
        side
    }

    /// The next that it says; none when it is gone.
    fn next(&self) -> Option<Said> {
        match self.heard.recv_timeout(PATIENCE) {
            Ok(said) => Some(said),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("it says nothing any more"),
        }
    }

    /// Listens until so many bytes are here. How it ended, if it did before.
    fn until_here(&self, bytes: u64) -> Option<Result<u64, String>> {
        loop {
            match self.next() {
                Some(Said::Moving(_, here)) if here >= bytes => return None,
                Some(Said::Ended(ended)) => return Some(ended),
                Some(_) => {}
                None => panic!("it ended by itself"),
            }
        }
    }

    fn kill(mut self) -> (u64, u64) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
        let (mut received, mut here) = (0, 0);
        while let Ok(said) = self.heard.recv() {
            if let Said::Moving(over, of) = said {
                (received, here) = (over, of);
            }
        }
        (received, here)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A payload in a store of its own.
struct Origin {
    room: TempDir,
    root: Root,
    size: u64,
    bytes: Vec<u8>,
}

impl Origin {
    fn new(size: u64) -> Self {
        let room = room();
        let mut bytes = vec![0; usize::try_from(size).expect("it fits")];
        blake3::Hasher::new().update(b"payload").finalize_xof().fill(&mut bytes);
        let store = open(&room.path().join("origin"));
        let held = store.import(&bytes[..], Declared::Exactly(size)).expect("imports");
        Self { room, root: held.root, size, bytes }
    }

    /// A process that serves a copy of it.
    fn serve(&self, seed: u8, listen: SocketAddr, upload: u64) -> Side {
        let store = self.room.path().join(format!("copy-{seed}"));
        if !store.exists() {
            fs::create_dir(&store).expect("a directory");
            for ending in ["data", "outboard"] {
                let name = format!("{}.{ending}", self.root);
                let from = self.room.path().join("origin").join(&name);
                fs::copy(from, store.join(&name)).expect("copied");
            }
        }
        Side::start(&Part { store, seed, listen, upload: Some(upload), fetch: None, disk: None })
    }

    fn wanted(&self, holders: &[&Side]) -> Wanted {
        let holders = holders.iter().map(|side| (side.address, side.key)).collect();
        Wanted { root: self.root.to_string(), size: self.size, holders }
    }

    fn fetch(&self, store: &Path, seed: u8, wanted: &Wanted) -> Side {
        self.fetch_onto(None, store, seed, wanted)
    }

    fn fetch_onto(
        &self,
        disk: Option<(u64, Full)>,
        store: &Path,
        seed: u8,
        wanted: &Wanted,
    ) -> Side {
        let (store, fetch) = (store.to_path_buf(), Some(wanted.clone()));
        Side::start(&Part { store, seed, listen: any(), upload: None, fetch, disk })
    }

    /// What a store holds is this payload, and nothing else lies there.
    fn is_in(&self, store: &Path) {
        let held = open(store);
        assert_eq!(held.read(self.root, self.size).expect("it is held"), self.bytes);
        held.verify(self.root).expect("its hashes are right, too");
        let left = fs::read_dir(store.join("partial")).expect("lists").count();
        assert_eq!(left, 0, "something is left of the transfer");
    }
}

/// A directory in memory where there is one: kills lose nothing that the kernel has.
fn room() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::tempdir_in(memory);
    made.or_else(|_| tempfile::tempdir()).expect("a directory")
}

#[test]
fn a_receiver_that_is_killed_goes_on_and_little_comes_twice() {
    let origin = Origin::new(24 * (1 << 20) + 5);
    let mut dice = Dice(1);
    let (mut kills, mut twice) = (0, 0);
    for round in 0..60 {
        let holder = origin.serve(1, any(), 400_000_000);
        let wanted = origin.wanted(&[&holder]);
        let store = origin.room.path().join(format!("receiver-{round}"));
        let (mut received, mut lives, mut here) = (0, 0, 0);
        loop {
            let receiver = origin.fetch(&store, 2, &wanted);
            lives += 1;
            // Somewhere on the rest of the way, or not at all.
            let until = here + dice.below((origin.size - here + 4 * GROUP).max(1));
            match receiver.until_here(until) {
                Some(ended) => {
                    received += ended.expect("fetches");
                    break;
                }
                None => {
                    let (over, of) = receiver.kill();
                    received += over;
                    here = of.min(origin.size);
                    kills += 1;
                }
            }
            assert!(lives < 200, "it gets nowhere");
        }
        let again = received.saturating_sub(origin.size);
        // What a process had not said yet when it was killed is not counted here.
        assert!(again <= (lives - 1) * LOST, "round {round}: {again} bytes again in {lives} lives");
        twice += again;
        origin.is_in(&store);
        fs::remove_dir_all(&store).expect("removed");
    }
    assert!(kills >= 60, "{kills} kills are too few");
    eprintln!("{kills} kills, {} bytes of {} fetched again", twice, 60 * origin.size);
}

#[test]
fn a_sender_that_is_killed_is_waited_for() {
    let origin = Origin::new(16 << 20);
    let mut dice = Dice(2);
    for round in 0..15 {
        let mut holder = origin.serve(1, any(), 200_000_000);
        let (address, wanted) = (holder.address, origin.wanted(&[&holder]));
        let store = origin.room.path().join(format!("receiver-{round}"));
        let receiver = origin.fetch(&store, 2, &wanted);
        let mut ended = receiver.until_here(1 + dice.below(origin.size / 2));
        for _ in 0..2 {
            if ended.is_some() {
                break;
            }
            holder.kill();
            // The same node at the same address.
            holder = origin.serve(1, address, 200_000_000);
            ended = receiver.until_here(1 + origin.size / 2 + dice.below(origin.size / 2));
        }
        let ended = ended.unwrap_or_else(|| receiver.until_here(u64::MAX).expect("it ends"));
        let received = ended.expect("fetches");
        assert!(received <= origin.size + LOST, "round {round}: {received}");
        drop(receiver);
        origin.is_in(&store);
    }
}

#[test]
fn of_several_holders_some_may_be_killed() {
    let origin = Origin::new(24 << 20);
    let mut dice = Dice(3);
    for round in 0..25 {
        let mut holders: Vec<_> = (1..=4).map(|n| origin.serve(n, any(), 40_000_000)).collect();
        let wanted = origin.wanted(&holders.iter().collect::<Vec<_>>());
        let store = origin.room.path().join(format!("receiver-{round}"));
        let begun = Instant::now();
        let receiver = origin.fetch(&store, 9, &wanted);
        let mut ended = None;
        // Three of the four go, at random moments.
        for nth in 1..=3 {
            ended = receiver.until_here(dice.below(nth * origin.size / 4) + 1);
            if ended.is_some() {
                break;
            }
            let victim = usize::try_from(dice.below(holders.len() as u64)).expect("small");
            holders.remove(victim).kill();
        }
        let ended = ended.unwrap_or_else(|| receiver.until_here(u64::MAX).expect("it ends"));
        let received = ended.unwrap_or_else(|why| panic!("round {round}: {why}"));
        assert!(received <= origin.size + 3 * LOST, "round {round}: {received}");
        drop(receiver);
        origin.is_in(&store);
        fs::remove_dir_all(&store).expect("removed");
        assert!(begun.elapsed() < PATIENCE);
    }
}

/// Bytes that are not what they should be, in one of three holders: on its disk, at the end of its
/// file, or of another payload altogether.
#[test]
fn of_several_holders_one_may_have_a_bad_disk() {
    let origin = Origin::new(24 << 20);
    let data = |seed: u8| {
        let name = format!("{}.data", origin.root);
        origin.room.path().join(format!("copy-{seed}")).join(name)
    };
    type Spoil = fn(&Path);
    let spoils: [Spoil; 3] = [
        |path| {
            let mut bytes = fs::read(path).expect("reads");
            bytes.iter_mut().step_by(1 << 20).for_each(|byte| *byte ^= 1);
            fs::write(path, bytes).expect("writes");
        },
        |path| {
            let file = fs::OpenOptions::new().write(true).open(path).expect("opens");
            file.set_len(GROUP).expect("cut");
        },
        |path| fs::remove_file(path).expect("removed"),
    ];
    for (round, spoil) in spoils.into_iter().enumerate() {
        let holders: Vec<_> = (1..=3).map(|n| origin.serve(n, any(), 60_000_000)).collect();
        // After its start, which would have found the last two.
        spoil(&data(2));
        let wanted = origin.wanted(&holders.iter().collect::<Vec<_>>());
        let store = origin.room.path().join(format!("receiver-{round}"));
        let receiver = origin.fetch(&store, 9, &wanted);
        receiver.until_here(u64::MAX).expect("it ends").expect("the others have it");
        drop((receiver, holders));
        origin.is_in(&store);
        fs::remove_dir_all(origin.room.path().join("copy-2")).expect("removed");
    }
}

#[test]
fn a_disk_may_be_full() {
    let namespaces = ["--user", "--map-root-user", "--mount", "true"];
    if !Command::new("unshare").args(namespaces).status().is_ok_and(|status| status.success()) {
        eprintln!("not tested: this kernel lets nobody have a disk of its own");
        return;
    }
    let origin = Origin::new(24 << 20);
    let holder = origin.serve(1, any(), 100_000_000);
    let wanted = origin.wanted(&[&holder]);
    let cases = [
        // Too small: it is said before anything is asked for.
        (16 << 20, Full::Never, Err("no space")),
        // Others take the rest while it comes: its own room was taken before, and what is not
        // marked any more costs only a crash.
        (26 << 20, Full::Meanwhile, Ok(origin.size)),
        // Full at first, and with room again.
        (26 << 20, Full::Before, Ok(origin.size)),
    ];
    for (nth, (size, full, right)) in cases.into_iter().enumerate() {
        let disk = origin.room.path().join(format!("disk-{nth}"));
        fs::create_dir(&disk).expect("made");
        let store = disk.join("store");
        let receiver = origin.fetch_onto(Some((size, full)), &store, 9, &wanted);
        match (receiver.until_here(u64::MAX).expect("it ends"), right) {
            (Ok(received), Ok(all)) => assert_eq!(received, all, "{full:?}"),
            (Err(why), Err(part)) => assert!(why.contains(part), "{full:?}: {why}"),
            (ended, _) => panic!("{full:?} on {size} bytes: {ended:?}"),
        }
    }
}

#[test]
fn a_store_that_was_moved_goes_on_where_it_was() {
    let origin = Origin::new(24 << 20);
    let holder = origin.serve(1, any(), 100_000_000);
    let wanted = origin.wanted(&[&holder]);
    let (first, moved) = (origin.room.path().join("first"), origin.room.path().join("moved"));
    let receiver = origin.fetch(&first, 2, &wanted);
    assert!(receiver.until_here(origin.size / 2).is_none(), "it was too quick");
    let (_, here) = receiver.kill();
    fs::rename(&first, &moved).expect("moved");
    // Another node's now.
    let receiver = origin.fetch(&moved, 3, &wanted);
    let received = receiver.until_here(u64::MAX).expect("it ends").expect("fetches");
    assert!(received <= origin.size - here + LOST, "{received} after {here}");
    drop(receiver);
    origin.is_in(&moved);
}
