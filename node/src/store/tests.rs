//! The store as a whole: random batches, kills, power cuts, damage, full disks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write as _};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::disk::DiskFile;
use super::*;

const OWNER: [u8; 32] = [7; 32];
const SEGMENT: u64 = 64 * 1024;

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// Something done to a file behind the store's back.
type Harm = fn(&Path);

/// A small store, whose journal turns round often.
fn small() -> Config {
    Config {
        segments: 3,
        segment_bytes: SEGMENT,
        reserve_bytes: 0,
        min_disk_free: 0,
        rewrite_min: 4 * 1024,
        checkpoint_every: Duration::from_secs(3600),
        fatal: FatalHook::new(|fault| panic!("{fault}")),
        ..Config::new(OWNER)
    }
}

fn open(dir: &Path) -> (Store, Opened) {
    Store::open(dir, small()).unwrap_or_else(|error| panic!("{error}"))
}

fn open_error(dir: &Path) -> OpenError {
    Store::open(dir, small()).expect_err("the store must not open")
}

fn model_of(opened: &Opened) -> Model {
    assert!(opened.entries.is_sorted_by(|a, b| a.0 < b.0), "entries are sorted, keys are unique");
    opened.entries.iter().cloned().collect()
}

fn apply(model: &mut Model, batch: &[Write]) {
    for write in batch {
        match &write.value {
            Some(value) => model.insert(write.key.clone(), value.clone()),
            None => model.remove(&write.key),
        };
    }
}

/// A small generator of the tests' own: same seed, same run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        // splitmix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: u64) -> u64 {
        self.roll() % most
    }
}

/// The batch with this number, in tests that must know what any prefix adds up to.
fn numbered(seq: u64) -> Vec<Write> {
    let mut dice = Dice(seq);
    let mut batch = vec![Write::put("seq", seq.to_le_bytes())];
    for _ in 0..dice.below(4) {
        let key = format!("key-{}", dice.below(40));
        let length = dice.below(3_000) as usize;
        batch.push(match dice.below(4) {
            0 => Write::remove(key),
            _ => Write::put(key, vec![seq as u8; length]),
        });
    }
    batch
}

fn prefix(seq: u64) -> Model {
    let mut model = Model::new();
    for seq in 1..=seq {
        apply(&mut model, &numbered(seq));
    }
    model
}

/// The number of the last batch in a state made of numbered ones.
fn reached(model: &Model) -> u64 {
    let seq = model.get(b"seq".as_slice()).map(|bytes| bytes.as_slice().try_into().unwrap());
    seq.map_or(0, u64::from_le_bytes)
}

fn commit_numbered(store: &Store, seqs: impl IntoIterator<Item = u64>) {
    for seq in seqs {
        assert_eq!(store.commit_blocking(numbered(seq)).unwrap().seq, seq);
    }
}

/// Waits for something that another thread does.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !holds() {
        assert!(Instant::now() < deadline, "still not: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(0o700)).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// What a process killed now would leave: no last checkpoint.
fn snapshot(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_dir(dir, copy.path());
    copy
}

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], offset).unwrap();
}

// --- the ordinary way ---

#[derive(Debug, Clone)]
enum Step {
    Commit(Vec<Write>),
    Close,
    /// Go on with a copy of the directory as it is while the store is open.
    Crash,
}

fn any_write() -> impl Strategy<Value = Write> {
    let key = prop_oneof![
        4 => (0u8..12).prop_map(|key| vec![key]),
        1 => proptest::collection::vec(any::<u8>(), 0..=KEY_MAX),
    ];
    let value = prop_oneof![
        1 => Just(None),
        4 => proptest::collection::vec(any::<u8>(), 0..200).prop_map(Some),
        1 => (any::<u8>(), 0usize..4_000).prop_map(|(byte, length)| Some(vec![byte; length])),
    ];
    (key, value).prop_map(|(key, value)| Write { key, value })
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => proptest::collection::vec(any_write(), 0..4).prop_map(Step::Commit),
        1 => Just(Step::Close),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_batches_are_there_after_any_restart(
        steps in proptest::collection::vec(any_step(), 1..120),
    ) {
        let mut dir = tempfile::tempdir().unwrap();
        let (mut store, opened) = open(dir.path());
        prop_assert!(opened.recovered.created && opened.entries.is_empty());
        let mut model = Model::new();
        for step in steps {
            match step {
                Step::Commit(batch) => {
                    store.commit_blocking(batch.clone()).unwrap();
                    apply(&mut model, &batch);
                    continue;
                }
                Step::Close => store.close_blocking(),
                Step::Crash => {
                    // Copying is not atomic: nothing may be under way meanwhile.
                    settle(&store);
                    let copy = snapshot(dir.path());
                    store.close_blocking();
                    dir = copy;
                }
            }
            let (again, opened) = open(dir.path());
            prop_assert_eq!(model_of(&opened), model.clone());
            prop_assert_eq!(opened.recovered.torn_bytes, 0);
            store = again;
        }
        store.close_blocking();
        let (store, opened) = open(dir.path());
        prop_assert_eq!(model_of(&opened), model);
        prop_assert_eq!(opened.recovered, Recovery::default());
        store.close_blocking();
    }
}

/// Waits until no checkpoint is under way: the files no longer change.
fn settle(store: &Store) {
    eventually("no checkpoint is under way", || {
        // The second barrier is answered by a writer that has heard of what was finished before
        // the first, and has asked for what it still wanted.
        if store.stats().checkpointing {
            return false;
        }
        store.barrier_blocking().unwrap();
        store.barrier_blocking().unwrap();
        !store.stats().checkpointing
    });
}

#[test]
fn the_journal_turns_round_and_the_checkpoint_stays_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    commit_numbered(&store, 1..=600);
    let stats = store.stats();
    assert!(stats.checkpoints > 10, "{stats:?}");
    assert!(stats.journal_used <= stats.journal_capacity, "{stats:?}");
    eventually("a rewrite", || store.stats().rewrites > 0);
    store.close_blocking();
    let stats = store.stats();
    assert_eq!((stats.commits, stats.last_seq), (600, 600));
    assert_eq!(stats.journal_used, store.stats().journal_used);
    let files = checkpoint::list(dir.path()).unwrap();
    assert_eq!(files.len(), 1, "one generation is kept: {files:?}");
    let length = fs::metadata(&files[0].1).unwrap().len();
    let state: usize = prefix(600).iter().map(|(key, value)| key.len() + value.len()).sum();
    assert!(length < 4 * state as u64 + 2 * SEGMENT, "{length} bytes for {state} of state");

    let (store, opened) = open(dir.path());
    assert_eq!(opened.recovered, Recovery::default(), "a clean end leaves nothing to do");
    assert_eq!(model_of(&opened), prefix(600));
    assert_eq!(store.commit_blocking(vec![]).unwrap().seq, 601, "numbers go on");
    store.close_blocking();
}

#[test]
fn batches_that_wait_together_share_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let order = runtime.block_on(async {
        let mut waiting = Vec::new();
        for seq in 1..=400 {
            waiting.push(store.submit(numbered(seq)).await.unwrap());
        }
        let barrier = store.barrier().await.unwrap();
        assert!(barrier.seq >= 400);
        let mut order = Vec::new();
        for pending in waiting {
            order.push(pending.await.unwrap().seq);
        }
        order
    });
    assert_eq!(order, (1..=400).collect::<Vec<_>>(), "numbers follow the order of submission");
    let stats = store.stats();
    assert_eq!(stats.commits, 400);
    assert!(stats.syncs <= stats.commits, "{stats:?}");
    runtime.block_on(store.close());
    assert_eq!(model_of(&open(dir.path()).1), prefix(400));
}

#[test]
fn what_is_too_long_is_refused_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let key = store.commit_blocking(vec![Write::put("ok", ""), Write::put([0; 129], "")]);
    assert_eq!(key, Err(CommitError::TooLong(TooLong::Key { bytes: 129 })));
    let value = store.commit_blocking(vec![Write::put("a", vec![0; VALUE_MAX + 1])]);
    assert_eq!(value, Err(CommitError::TooLong(TooLong::Value { bytes: VALUE_MAX + 1 })));
    let batch = store.commit_blocking(vec![Write::put("a", vec![0; 9_000]); 2]);
    assert!(matches!(batch, Err(CommitError::BatchTooLong { most: 16_384, .. })), "{batch:?}");
    let most = vec![0; 16_384 - 4 - 5 - 1];
    store.commit_blocking(vec![Write::put("a", most)]).unwrap();
    store.close_blocking();
    assert_eq!(store.commit_blocking(vec![]), Err(CommitError::Closed));
    store.close_blocking();
    assert_eq!(open(dir.path()).1.entries.len(), 1);
}

#[test]
fn more_than_a_batch_holds_is_kept_in_its_order() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let submit = |writes| runtime.block_on(async { store.submit_all(writes).await?.await });
    // Ten batches' worth, each key written twice, the second time far from the first.
    let twice =
        (0..2u8).flat_map(|turn| (0..80u8).map(move |key| Write::put([key], vec![turn; 1_000])));
    submit(twice.collect()).unwrap();
    submit((0..100u8).map(|turn| Write::put("one", vec![turn; 1_000])).collect()).unwrap();
    assert!(store.stats().bytes < 400_000, "of writes to one key in one batch the last is kept");
    submit(vec![Write::put([3], ""), Write::remove([3]), Write::put([4], "last")]).unwrap();
    let long = submit(vec![Write::put([5], ""), Write::put([0; 129], "")]);
    assert_eq!(long, Err(CommitError::TooLong(TooLong::Key { bytes: 129 })));
    store.close_blocking();
    let model = model_of(&open(dir.path()).1);
    assert_eq!(model.len(), 80, "79 of the 80, and one");
    assert!((0..80).all(|key| model.get(&vec![key]).is_none_or(|value| value.first() != Some(&0))));
    assert_eq!(model.get(&vec![4]).map(Vec::as_slice), Some(&b"last"[..]));
    assert_eq!(model.get(&vec![3]), None);
    assert_eq!(model.get(b"one".as_slice()).and_then(|value| value.first()), Some(&99));
}

#[test]
fn the_last_handle_dropped_closes_in_its_own_time() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    commit_numbered(&store, 1..=5);
    drop(store);
    eventually("unlocked", || match Store::open(dir.path(), small()) {
        Ok((_, opened)) => {
            assert_eq!(model_of(&opened), prefix(5));
            true
        }
        Err(OpenError::Locked { .. }) => false,
        Err(error) => panic!("{error}"),
    });
}

#[test]
fn batches_without_writes_take_their_turn_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    for seq in 1..=100 {
        assert_eq!(store.commit_blocking(vec![]).unwrap().seq, seq);
    }
    assert!(store.stats().checkpoints > 2, "{:?}", store.stats());
    store.close_blocking();
    assert_eq!(open(dir.path()).1.recovered, Recovery::default());
}

#[test]
fn the_timer_makes_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { checkpoint_every: Duration::from_millis(5), ..small() };
    let (store, _) = Store::open(dir.path(), config).unwrap();
    commit_numbered(&store, 1..=1);
    eventually("a checkpoint", || store.stats().checkpoints > 0);
    store.close_blocking();
}

// --- who may open ---

#[test]
fn a_second_process_is_told_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let error = open_error(dir.path());
    assert!(
        matches!(error, OpenError::Locked { pid: Some(pid), .. } if pid == std::process::id()),
        "{error:?}"
    );
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    store.close_blocking();
    open(dir.path()).0.close_blocking();
}

#[test]
fn a_descriptor_that_a_child_inherited_does_not_keep_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let lock = Lock::take(&path).unwrap();
    let inherited = lock.duplicate_for_test();
    assert!(matches!(Lock::take(&path), Err(LockError::Held(Some(_)))));
    drop(lock);
    Lock::take(&path).unwrap();
    drop(inherited);
}

#[test]
fn another_nodes_store_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    commit_numbered(&store, 1..=3);
    store.close_blocking();
    let other = Config { owner: [8; 32], ..small() };
    let error = Store::open(dir.path(), other.clone()).unwrap_err();
    assert!(
        matches!(error, OpenError::Foreign { owner: Owner(OWNER), expected: Owner([8, ..]), .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains(&"07".repeat(32)), "{error}");

    // A single segment of another's is found too.
    let theirs = tempfile::tempdir().unwrap();
    Store::open(theirs.path(), other).unwrap().0.close_blocking();
    fs::copy(theirs.path().join("journal-1"), dir.path().join("journal-1")).unwrap();
    let error = open_error(dir.path());
    let names = |path: &Path| path.ends_with("journal-1");
    assert!(matches!(&error, OpenError::Foreign { path, .. } if names(path)), "{error:?}");
}

#[test]
fn the_directory_is_private() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("deep/store");
    open(&dir).0.close_blocking();
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    for file in ["format", "journal-0", "checkpoint-1", "lock"] {
        let mode = fs::metadata(dir.join(file)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{file}");
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o750)).unwrap();
    let error = open_error(&dir);
    assert!(matches!(error, OpenError::Mode { mode: 0o750, .. }), "{error:?}");
    assert!(error.to_string().contains("chmod 700"), "{error}");

    let empty = parent.path().join("empty");
    fs::create_dir(&empty).unwrap();
    fs::set_permissions(&empty, fs::Permissions::from_mode(0o755)).unwrap();
    open(&empty).0.close_blocking();
    assert_eq!(fs::metadata(&empty).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn figures_out_of_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for config in [
        Config { segments: 1, ..small() },
        Config { segments: 65, ..small() },
        Config { segment_bytes: 4096, ..small() },
        Config { segment_bytes: SEGMENT + 1, ..small() },
        Config { queue: 0, ..small() },
    ] {
        let error = Store::open(dir.path(), config).unwrap_err();
        assert!(matches!(error, OpenError::Config(_)), "{error:?}");
    }
}

// --- damage ---

/// A directory as a killed process leaves it: batches 1 to 6 in checkpoint and database, 7 to
/// 12 in the journal alone, one group each.
fn crashed() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    commit_numbered(&store, 1..=6);
    store.close_blocking();
    let (store, _) = open(dir.path());
    commit_numbered(&store, 7..=12);
    settle(&store);
    let copy = snapshot(dir.path());
    store.close_blocking();
    copy
}

/// Where the group that holds batch `seq` is.
fn group_of(dir: &Path, seq: u64) -> (PathBuf, u64, u64) {
    let format = Header::decode(&fs::read(dir.join("format")).unwrap(), &OWNER).unwrap();
    Scan::read(dir, &format).unwrap().place_of(seq).expect("the batch is in the journal")
}

#[test]
fn the_journal_is_replayed() {
    let dir = crashed();
    let (store, opened) = open(dir.path());
    assert_eq!(opened.recovered, Recovery { replayed: 6, ..Recovery::default() });
    assert_eq!(model_of(&opened), prefix(12));
    store.close_blocking();
    assert_eq!(open(dir.path()).1.recovered, Recovery::default());
}

#[test]
fn a_torn_tail_is_dropped_and_counted() {
    let dir = crashed();
    let (path, offset, length) = group_of(dir.path(), 12);
    for torn in 0..length {
        // Every byte of the newest group; the rest of it stays.
        if torn > 60 && torn + 60 < length && torn % 97 != 0 {
            continue;
        }
        let copy = snapshot(dir.path());
        flip(&copy.path().join(path.file_name().unwrap()), offset + torn);
        let (store, opened) = open(copy.path());
        assert_eq!(model_of(&opened), prefix(11), "byte {torn}");
        assert_eq!(opened.recovered.replayed, 5);
        // Where the header still says that a group was begun, it is counted.
        if torn >= 36 {
            assert_eq!(opened.recovered.torn_bytes, length, "byte {torn}");
        }
        store.close_blocking();
        // What follows takes its number, and the torn one is never mistaken for it.
        let (store, _) = open(copy.path());
        commit_numbered(&store, 12..=14);
        settle(&store);
        let later = snapshot(copy.path());
        store.close_blocking();
        assert_eq!(model_of(&open(later.path()).1), prefix(14));
    }
}

#[test]
fn a_changed_byte_before_the_newest_group_is_an_error_that_names_the_place() {
    let dir = crashed();
    let (path, offset, length) = group_of(dir.path(), 9);
    for at in (0..length).step_by(11) {
        let copy = snapshot(dir.path());
        let path = copy.path().join(path.file_name().unwrap());
        flip(&path, offset + at);
        let before = fs::read(&path).unwrap();
        match open_error(copy.path()) {
            OpenError::Corrupt { path: named, offset: place, what } => {
                assert_eq!((named, place), (path.clone(), offset), "byte {at}");
                assert!(what.contains("batch 9"), "{what}");
            }
            other => panic!("byte {at}: {other:?}"),
        }
        assert_eq!(fs::read(&path).unwrap(), before, "nothing was changed");
        flip(&path, offset + at);
        let (store, opened) = open(copy.path());
        assert_eq!(model_of(&opened), prefix(12), "once restored, all is there");
        store.close_blocking();
    }
}

#[test]
fn damage_that_the_checkpoint_covers_is_no_damage() {
    let dir = crashed();
    let (path, offset, _) = group_of(dir.path(), 3);
    flip(&path, offset + 40);
    assert_eq!(model_of(&open(dir.path()).1), prefix(12));
}

#[test]
fn a_segment_cut_or_gone_or_headless_is_an_error() {
    let dir = crashed();
    for (name, harm) in [
        (
            "cut",
            (|path: &Path| {
                OpenOptions::new().write(true).open(path).unwrap().set_len(5_000).unwrap();
            }) as Harm,
        ),
        ("gone", |path| fs::remove_file(path).unwrap()),
        ("headless", |path| flip(path, 30)),
    ] {
        let copy = snapshot(dir.path());
        harm(&copy.path().join("journal-1"));
        let error = open_error(copy.path());
        assert!(error.to_string().contains("journal-1"), "{name}: {error}");
    }
    let copy = snapshot(dir.path());
    fs::remove_file(copy.path().join("format")).unwrap();
    let error = open_error(copy.path());
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
}

#[test]
fn groups_of_an_earlier_turn_are_not_replayed() {
    // The same key in every batch: one old batch replayed would show.
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    for seq in 1..=200u64 {
        store.commit_blocking(vec![Write::put("key", seq.to_le_bytes())]).unwrap();
        if seq % 7 == 0 {
            settle(&store);
            let copy = snapshot(dir.path());
            let (again, opened) = open(copy.path());
            assert_eq!(opened.entries, [(b"key".to_vec(), seq.to_le_bytes().to_vec())]);
            again.close_blocking();
        }
    }
    store.close_blocking();
}

#[test]
fn a_value_that_looks_like_a_group_is_not_one() {
    // A value that carries the image of a group, with a checksum that holds, where a block will
    // begin; then the circle comes round and overwrites only the front of the real group, so
    // that a block begins with the image. Whoever sends such a value does not know the mark.
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let mut forged = Group::new([0; 16]);
    forged.begin(1_000);
    forged.push(&[Write::put("forged", "x")]);
    let before_value = 36 + 4 + 5 + "key".len();
    let mut value = vec![0; 3 * 4096];
    let image = forged.sealed_for_test();
    for block in 1..3 {
        let at = block * 4096 - before_value;
        value[at..at + image.len()].copy_from_slice(image);
    }
    store.commit_blocking(vec![Write::put("key", value.clone())]).unwrap();
    // The value took 4 blocks of the first segment's 15; 41 more fill the circle.
    for _ in 0..42 {
        store.commit_blocking(vec![Write::put("small", "")]).unwrap();
    }
    settle(&store);
    let image_at_block = |block: u64| {
        let bytes = fs::read(dir.path().join("journal-0")).unwrap();
        bytes[(block * BLOCK) as usize..].starts_with(image)
    };
    assert!(image_at_block(2) && image_at_block(3), "the images are where groups begin");
    let copy = snapshot(dir.path());
    store.close_blocking();
    let (store, opened) = open(copy.path());
    let expected = [(b"key".to_vec(), value), (b"small".to_vec(), vec![])];
    assert_eq!(opened.entries, expected);
    assert_eq!(store.commit_blocking(vec![]).unwrap().seq, 44);
    store.close_blocking();
}

#[test]
fn a_broken_database_is_rebuilt_and_nothing_is_lost() {
    let db = |dir: &Path| dir.join("sled/db");
    let harms: [(&str, Harm); 7] = [
        ("garbage", |db| {
            let length = fs::metadata(db).unwrap().len();
            let mut dice = Dice(1);
            let bytes: Vec<u8> = (0..length).map(|_| dice.roll() as u8).collect();
            fs::write(db, bytes).unwrap();
        }),
        ("zeros", |db| {
            let length = fs::metadata(db).unwrap().len() as usize;
            fs::write(db, vec![0; length]).unwrap();
        }),
        ("empty", |db| fs::write(db, b"").unwrap()),
        ("cut", |db| OpenOptions::new().write(true).open(db).unwrap().set_len(300).unwrap()),
        ("flips", |db| {
            let length = fs::metadata(db).unwrap().len();
            let mut dice = Dice(2);
            (0..400).for_each(|_| flip(db, dice.below(length)));
        }),
        ("gone", |db| fs::remove_dir_all(db.parent().unwrap()).unwrap()),
        ("died while opening", |db| {
            fs::write(db.parent().unwrap().with_extension("opening"), b"").unwrap();
        }),
    ];
    let closed = tempfile::tempdir().unwrap();
    let (store, _) = open(closed.path());
    commit_numbered(&store, 1..=12);
    store.close_blocking();
    for (start, replayed) in [(crashed(), 6), (closed, 0)] {
        for (name, harm) in harms {
            let copy = snapshot(start.path());
            harm(&db(copy.path()));
            let (store, opened) = open(copy.path());
            assert_eq!(model_of(&opened), prefix(12), "{name}");
            match opened.recovered.rebuilt {
                Some(Rebuilt { set_aside: Some(aside), .. }) => {
                    assert_eq!(opened.recovered.replayed, replayed, "{name}");
                    assert!(aside.ends_with("sled.broken-1") && aside.exists(), "{name}");
                }
                Some(_) => assert_eq!(name, "gone"),
                // sled lost its newest part without a word and the journal still has it, or
                // the flips met only bytes that sled does not use.
                None => {
                    assert!(["cut", "flips"].contains(&name), "{name}");
                    assert!(name == "flips" || opened.recovered.replayed > replayed);
                }
            }
            commit_numbered(&store, 13..=20);
            store.close_blocking();
            let (store, opened) = open(copy.path());
            assert_eq!(opened.recovered, Recovery::default(), "{name}");
            assert_eq!(model_of(&opened), prefix(20), "{name}");
            store.close_blocking();
        }
    }
}

#[test]
fn few_broken_databases_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for round in 1..=5u64 {
        let (store, _) = open(dir.path());
        commit_numbered(&store, [round]);
        store.close_blocking();
        fs::write(dir.path().join("sled/db"), b"").unwrap();
    }
    let aside = |number| dir.path().join(format!("sled.broken-{number}")).exists();
    assert_eq!([1, 2, 3, 4].map(aside), [false, false, true, true]);
}

#[test]
fn an_older_database_does_not_take_the_state_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    commit_numbered(&store, 1..=20);
    store.close_blocking();
    let old = snapshot(dir.path());
    let (store, _) = open(dir.path());
    commit_numbered(&store, 21..=300);
    store.close_blocking();
    fs::remove_dir_all(dir.path().join("sled")).unwrap();
    copy_dir(&old.path().join("sled"), &dir.path().join("sled"));
    let (store, opened) = open(dir.path());
    assert_eq!(model_of(&opened), prefix(300));
    let rebuilt = opened.recovered.rebuilt.expect("the old database is not used");
    assert!(rebuilt.why.contains("too old"), "{}", rebuilt.why);
    store.close_blocking();
}

#[test]
fn a_broken_checkpoint_is_written_again_from_the_database() {
    let start = crashed();
    let files = checkpoint::list(start.path()).unwrap();
    let name = files[0].1.file_name().unwrap();
    let length = fs::metadata(&files[0].1).unwrap().len();
    for at in (0..length).step_by(length as usize / 40) {
        let copy = snapshot(start.path());
        flip(&copy.path().join(name), at);
        let opened = Store::open(copy.path(), small());
        // A flipped bit in owner or version is told as what it seems to be.
        let Ok((store, opened)) = opened else {
            assert!(at < 96, "byte {at}: {opened:?}");
            continue;
        };
        assert_eq!(model_of(&opened), prefix(12), "byte {at}");
        store.close_blocking();
        fs::remove_dir_all(copy.path().join("sled")).unwrap();
        let (store, opened) = open(copy.path());
        assert_eq!(model_of(&opened), prefix(12), "byte {at}, then without the database");
        store.close_blocking();
    }
    let copy = snapshot(start.path());
    fs::remove_file(copy.path().join(name)).unwrap();
    let (store, opened) = open(copy.path());
    assert!(opened.recovered.checkpoint_rewritten);
    assert_eq!(model_of(&opened), prefix(12));
    store.close_blocking();
}

#[test]
fn both_copies_broken_is_an_error_not_an_empty_store() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    commit_numbered(&store, 1..=300);
    store.close_blocking();
    fs::write(dir.path().join("sled/db"), b"").unwrap();
    let files = checkpoint::list(dir.path()).unwrap();
    flip(&files[0].1, 700);
    let error = open_error(dir.path());
    assert!(error.to_string().contains("checkpoint-"), "{error}");
}

#[test]
fn the_checkpoint_speaks_where_journal_and_database_stayed_behind() {
    // Killed after the checkpoint was written and before the database was, and then the
    // newest group was damaged: only the checkpoint knows how far the store had come.
    let dir = crashed();
    let old = snapshot(dir.path());
    let (store, _) = open(dir.path());
    store.close_blocking();
    fs::remove_dir_all(dir.path().join("sled")).unwrap();
    copy_dir(&old.path().join("sled"), &dir.path().join("sled"));
    let (path, offset, _) = group_of(dir.path(), 12);
    flip(&path, offset + 40);
    let (store, opened) = open(dir.path());
    assert_eq!(model_of(&opened), prefix(12));
    assert!(opened.recovered.rebuilt.is_some());
    assert_eq!(store.commit_blocking(vec![]).unwrap().seq, 13);
    store.close_blocking();
}

// --- kill -9 ---

const CHILD: &str = "LEASEHOLD_STORE_TEST_DIR";

/// Not a test of its own: the process that [`killed_at_any_moment`] starts and kills.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let config = Config { checkpoint_every: Duration::from_millis(20), ..small() };
    let (store, opened) = Store::open(Path::new(&dir), config).unwrap();
    let mut next = reached(&model_of(&opened)) + 1;
    let mut out = io::stdout().lock();
    writeln!(out, "\nack={}", next - 1).unwrap();
    loop {
        let some = next % 9 + 1;
        let waiting: Vec<_> =
            (next..next + some).map(|seq| store.submit_blocking(numbered(seq)).unwrap()).collect();
        for pending in waiting {
            writeln!(out, "ack={}", pending.wait().unwrap().seq).unwrap();
        }
        next += some;
    }
}

#[test]
fn killed_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(u64::from(std::process::id()));
    let mut model = (0, Model::new());
    for round in 0..16 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::child_that_writes_until_it_is_killed"])
            .args(["--nocapture", "--test-threads", "1"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Some are killed as soon as they show up, before or while they open; most while they
        // write.
        let until = if round % 4 == 3 { 0 } else { 1 + dice.below(400) };
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = None;
        let mut seen = 0;
        let mut note = |line: io::Result<String>| {
            let line = line.unwrap();
            if let Some(seq) = line.strip_prefix("ack=").and_then(|seq| seq.parse::<u64>().ok()) {
                acknowledged = acknowledged.max(Some(seq));
                seen += 1;
            }
            seen
        };
        if until > 0 {
            for line in lines.by_ref() {
                if note(line) >= until {
                    break;
                }
            }
        } else {
            eventually("the child holds the lock", || {
                fs::metadata(dir.path().join("lock")).is_ok_and(|lock| lock.len() > 0)
            });
        }
        child.kill().unwrap();
        // Lines cut in the middle were not acknowledged to anybody.
        lines.for_each(|line| {
            note(line);
        });
        child.wait().unwrap();

        let (store, opened) = open(dir.path());
        let found = model_of(&opened);
        let seq = reached(&found);
        assert!(Some(seq) >= acknowledged, "{acknowledged:?} was acknowledged, {seq} is there");
        assert!(seq >= model.0, "what was there once stays");
        for seq in model.0 + 1..=seq {
            apply(&mut model.1, &numbered(seq));
        }
        model.0 = seq;
        assert_eq!(found, model.1, "round {round}: the state is that of the first {seq} batches");
        store.close_blocking();
    }
    assert!(model.0 > 0);
}

// --- power cuts ---

/// A disk that does what it is asked and writes down each step, so that the disk a power cut
/// would have left at any of them can be built; and that fails on request.
#[derive(Debug, Default)]
struct Tape {
    steps: Mutex<Vec<Mark>>,
    next_file: AtomicU64,
    full: AtomicBool,
    fail_sync: AtomicBool,
    /// The checkpoint's syncs take so long that the journal overtakes it.
    slow_checkpoint: AtomicBool,
}

#[derive(Debug, Clone)]
enum Mark {
    Create(u64, PathBuf),
    Write(u64, u64, Vec<u8>),
    Truncate(u64, u64),
    Sync(u64),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncDir,
    /// Batch so-and-so was answered.
    Answered(u64),
}

#[derive(Debug, Clone)]
struct TapeDisk(Arc<Tape>);

#[derive(Debug)]
struct TapeFile {
    tape: Arc<Tape>,
    id: u64,
    checkpoint: bool,
    file: Box<dyn DiskFile>,
}

impl Tape {
    fn note(&self, step: Mark) {
        self.steps.lock().unwrap().push(step);
    }

    /// The identity of a file that is there, under whatever name it was made.
    fn id_of(&self, path: &Path) -> u64 {
        let mut names: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for step in self.steps.lock().unwrap().iter() {
            match step {
                Mark::Create(id, path) => {
                    names.insert(path.clone(), *id);
                }
                Mark::Rename(from, to) => {
                    let id = names.remove(from).unwrap();
                    names.insert(to.clone(), id);
                }
                _ => {}
            }
        }
        names[path]
    }
}

impl TapeDisk {
    fn file(&self, id: u64, path: &Path, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        let checkpoint = path.to_string_lossy().contains("checkpoint-");
        Box::new(TapeFile { tape: Arc::clone(&self.0), id, checkpoint, file })
    }
}

impl Disk for TapeDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let id = self.0.next_file.fetch_add(1, Ordering::Relaxed);
        self.0.note(Mark::Create(id, path.to_owned()));
        Ok(self.file(id, path, Os.create(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let id = self.0.id_of(path);
        Ok(self.file(id, path, Os.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.note(Mark::Rename(from.to_owned(), to.to_owned()));
        Os.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        Os.remove(path)?;
        self.0.note(Mark::Remove(path.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        Os.sync_dir(dir)?;
        self.0.note(Mark::SyncDir);
        Ok(())
    }

    fn available(&self, dir: &Path) -> io::Result<u64> {
        if self.0.full.load(Ordering::Relaxed) { Ok(0) } else { Os.available(dir) }
    }
}

impl DiskFile for TapeFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.checkpoint && self.tape.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.tape.note(Mark::Write(self.id, offset, bytes.to_vec()));
        self.file.write_at(offset, bytes)
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.tape.note(Mark::Truncate(self.id, length));
        self.file.truncate(length)
    }

    fn allocate(&mut self, length: u64) -> io::Result<()> {
        self.file.allocate(length)
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.tape.fail_sync.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(5));
        }
        if self.checkpoint && self.tape.slow_checkpoint.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.file.sync()?;
        self.tape.note(Mark::Sync(self.id));
        Ok(())
    }
}

/// What is on the platter, and what is still on its way there.
#[derive(Debug, Default, Clone)]
struct Platter {
    files: BTreeMap<u64, (Vec<u8>, Vec<Mark>)>,
    names: BTreeMap<PathBuf, u64>,
    names_pending: Vec<Mark>,
    answered: u64,
}

/// How a power cut treats what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Nothing,
    Everything,
    Torn(u64),
}

impl Platter {
    fn step(&mut self, step: &Mark) {
        match step {
            Mark::Create(id, _) => {
                self.files.insert(*id, Default::default());
                self.names_pending.push(step.clone());
            }
            Mark::Write(id, ..) | Mark::Truncate(id, _) => {
                self.files.get_mut(id).unwrap().1.push(step.clone());
            }
            Mark::Sync(id) => {
                let (bytes, pending) = self.files.get_mut(id).unwrap();
                pending.drain(..).for_each(|step| land(bytes, &step, |_| true));
            }
            Mark::Rename(..) | Mark::Remove(_) => self.names_pending.push(step.clone()),
            Mark::SyncDir => {
                let pending = std::mem::take(&mut self.names_pending);
                pending.iter().for_each(|step| self.name(step));
            }
            Mark::Answered(seq) => self.answered = *seq,
        }
    }

    fn name(&mut self, step: &Mark) {
        match step {
            Mark::Create(id, path) => {
                self.names.insert(path.clone(), *id);
            }
            Mark::Rename(from, to) => {
                let id = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), id);
            }
            Mark::Remove(path) => {
                self.names.remove(path);
            }
            _ => {}
        }
    }

    /// The directory after a power cut now. sled's part is lost altogether.
    fn cut(mut self, cut: Cut) -> tempfile::TempDir {
        let mut dice = Dice(if let Cut::Torn(seed) = cut { seed } else { 0 });
        // Names reach the disk in order; so some first part of what was pending did.
        let names = std::mem::take(&mut self.names_pending);
        let some = match cut {
            Cut::Nothing => 0,
            Cut::Everything => names.len(),
            Cut::Torn(_) => dice.below(names.len() as u64 + 1) as usize,
        };
        names.iter().take(some).for_each(|step| self.name(step));
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        for (path, id) in &self.names {
            let (mut bytes, pending) = self.files[id].clone();
            for step in &pending {
                // Sectors reach it in any order, so any of them may be missing.
                land(&mut bytes, step, |_| match cut {
                    Cut::Nothing => false,
                    Cut::Everything => true,
                    Cut::Torn(_) => dice.below(2) == 0,
                });
            }
            fs::write(dir.path().join(path.file_name().unwrap()), bytes).unwrap();
        }
        dir
    }
}

/// A pending write reaches the platter, but for the sectors that `reaches` says no to.
fn land(bytes: &mut Vec<u8>, step: &Mark, mut reaches: impl FnMut(usize) -> bool) {
    const SECTOR: usize = 512;
    match step {
        Mark::Write(_, offset, new) => {
            let mut at = 0;
            while at < new.len() {
                let start = *offset as usize + at;
                let length = (SECTOR - start % SECTOR).min(new.len() - at);
                if reaches(start) {
                    if bytes.len() < start + length {
                        bytes.resize(start + length, 0);
                    }
                    bytes[start..start + length].copy_from_slice(&new[at..at + length]);
                }
                at += length;
            }
        }
        Mark::Truncate(_, length) if reaches(0) => bytes.resize(*length as usize, 0),
        _ => {}
    }
}

#[test]
fn a_power_cut_at_any_step_loses_nothing_that_was_answered() {
    let tape = Arc::new(Tape::default());
    tape.slow_checkpoint.store(true, Ordering::Relaxed);
    let taped = || Config {
        disk: Arc::new(TapeDisk(Arc::clone(&tape))),
        rewrite_min: 3 * SEGMENT,
        ..small()
    };
    let dir = tempfile::tempdir().unwrap();
    // Two runs, groups of one and of several; enough to turn round, checkpoint and rewrite.
    let mut seq = 0;
    for until in [60, 240] {
        let (store, _) = Store::open(dir.path(), taped()).unwrap();
        while seq < until {
            let some = seq % 5 + 1;
            let waiting: Vec<_> = (seq + 1..=seq + some)
                .map(|seq| store.submit_blocking(numbered(seq)).unwrap())
                .collect();
            for pending in waiting {
                seq = pending.wait().unwrap().seq;
                tape.note(Mark::Answered(seq));
            }
        }
        store.close_blocking();
    }
    let steps = tape.steps.lock().unwrap().clone();
    let removed = steps.iter().any(|step| matches!(step, Mark::Remove(_)));
    assert!(removed, "the run is long enough to have rewritten the checkpoint");

    let mut platter = Platter::default();
    let mut dice = Dice(3);
    let mut seen = BTreeSet::new();
    for (number, step) in steps.iter().enumerate() {
        platter.step(step);
        let cuts = match step {
            Mark::Write(..) => {
                vec![Cut::Torn(dice.roll()), Cut::Torn(dice.roll()), Cut::Everything]
            }
            // A cut here is that of the step before, once more.
            Mark::Answered(_) | Mark::Create(..) => vec![Cut::Nothing],
            _ => vec![Cut::Nothing, Cut::Torn(dice.roll())],
        };
        for cut in cuts {
            let dir = platter.clone().cut(cut);
            let (store, opened) = Store::open(dir.path(), small())
                .unwrap_or_else(|error| panic!("step {number} {cut:?}: {error}"));
            let found = model_of(&opened);
            let reached = reached(&found);
            assert!(
                reached >= platter.answered,
                "step {number} {cut:?}: {} was answered, {reached} is there",
                platter.answered
            );
            assert_eq!(found, prefix(reached), "step {number} {cut:?}");
            seen.insert(reached);
            store.close_blocking();
        }
    }
    assert!(seen.contains(&0) && seen.len() > 50, "{seen:?}");
}

// --- faults ---

#[test]
fn a_failed_sync_is_fatal_and_answers_nobody() {
    let tape = Arc::new(Tape::default());
    let faults = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&faults);
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        disk: Arc::new(TapeDisk(Arc::clone(&tape))),
        fatal: FatalHook::new(move |fault| heard.lock().unwrap().push(fault.to_string())),
        ..small()
    };
    let (store, _) = Store::open(dir.path(), config).unwrap();
    commit_numbered(&store, 1..=3);
    tape.fail_sync.store(true, Ordering::Relaxed);
    assert_eq!(store.commit_blocking(numbered(4)), Err(CommitError::Closed));
    assert_eq!(store.commit_blocking(numbered(5)), Err(CommitError::Closed));
    store.close_blocking();
    let faults = faults.lock().unwrap().clone();
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].contains("cannot sync") && faults[0].contains("journal-0"), "{faults:?}");

    // A start finds every batch that was answered; the one that was not may be there.
    let (store, opened) = open(dir.path());
    let found = model_of(&opened);
    assert!((3..=4).contains(&reached(&found)));
    assert_eq!(found, prefix(reached(&found)));
    store.close_blocking();
}

#[test]
fn a_failed_sync_of_the_checkpoint_is_fatal_too() {
    let tape = Arc::new(Tape::default());
    let faults = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&faults);
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        disk: Arc::new(TapeDisk(Arc::clone(&tape))),
        fatal: FatalHook::new(move |fault| heard.lock().unwrap().push(fault.to_string())),
        ..small()
    };
    let (store, _) = Store::open(dir.path(), config).unwrap();
    commit_numbered(&store, 1..=3);
    tape.fail_sync.store(true, Ordering::Relaxed);
    store.close_blocking();
    let faults = faults.lock().unwrap().clone();
    assert!(faults.len() == 1 && faults[0].contains("checkpoint-1"), "{faults:?}");
    let (store, opened) = open(dir.path());
    assert_eq!(model_of(&opened), prefix(3), "the journal had it");
    store.close_blocking();
}

#[test]
fn a_full_disk_is_met_before_anything_is_promised() {
    let tape = Arc::new(Tape::default());
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        disk: Arc::new(TapeDisk(Arc::clone(&tape))),
        min_disk_free: 1,
        checkpoint_every: Duration::from_millis(5),
        ..small()
    };
    let (store, _) = Store::open(dir.path(), config.clone()).unwrap();
    commit_numbered(&store, 1..=5);
    store.admit().unwrap();
    tape.full.store(true, Ordering::Relaxed);
    let refusal = store.admit().unwrap_err();
    assert!(matches!(&refusal, StoreError::NoSpace { room } if room.disk_free == 0), "{refusal}");
    // What was promised before goes on being kept.
    commit_numbered(&store, 6..=12);
    eventually("the checkpoint waits", || store.stats().starved);
    tape.full.store(false, Ordering::Relaxed);
    eventually("the checkpoint is made", || !store.stats().starved);
    store.admit().unwrap();

    // Full until the journal is full too: batches wait, and go on when there is space.
    tape.full.store(true, Ordering::Relaxed);
    let waiting: Vec<_> =
        (13..=120).map(|seq| store.submit_blocking(numbered(seq)).unwrap()).collect();
    eventually("the checkpoint waits", || store.stats().starved);
    tape.full.store(false, Ordering::Relaxed);
    for pending in waiting {
        pending.wait().unwrap();
    }

    store.close_blocking();

    // Closed while it is full: the journal has it, and the start says what is needed. (A store
    // that was just opened has its whole journal free: these batches do not wait.)
    let (store, _) = Store::open(dir.path(), config.clone()).unwrap();
    tape.full.store(true, Ordering::Relaxed);
    commit_numbered(&store, 121..=123);
    store.close_blocking();
    let error = Store::open(dir.path(), config).unwrap_err();
    assert!(matches!(error, OpenError::NoSpace { free: 0, .. }), "{error:?}");
    let (store, opened) = open(dir.path());
    assert_eq!(model_of(&opened), prefix(123));
    assert!(opened.recovered.replayed >= 3, "{:?}", opened.recovered);
    store.close_blocking();
}

#[test]
fn a_full_disk_refuses_a_new_store() {
    let tape = Arc::new(Tape::default());
    tape.full.store(true, Ordering::Relaxed);
    let dir = tempfile::tempdir().unwrap();
    let config = Config { disk: Arc::new(TapeDisk(tape)), ..small() };
    let error = Store::open(dir.path(), config).unwrap_err();
    assert!(matches!(error, OpenError::NoSpace { needed, free: 0, .. } if needed == 3 * SEGMENT));
    // Once there is space, nothing of the attempt is in the way.
    open(dir.path()).0.close_blocking();
}

#[test]
fn the_reserve_lets_a_checkpoint_be_finished() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { reserve_bytes: 1024 * 1024, ..small() };
    let (store, _) = Store::open(dir.path(), config).unwrap();
    let path = dir.path().join("reserve");
    let taken = || {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(&path).map(|metadata| metadata.blocks() * 512)
    };
    assert!(taken().unwrap() >= 1024 * 1024, "the space is really taken");
    let reserve = Reserve::new(dir.path(), 1024 * 1024);
    assert!(reserve.release(&Os));
    assert!(!reserve.release(&Os), "it can be given up once");
    commit_numbered(&store, 1..=100);
    eventually("the reserve is back", || taken().is_ok_and(|taken| taken >= 1024 * 1024));
    store.close_blocking();
}

/// What is kept under a prefix is seen wherever it lies: in the database, in a checkpoint under
/// way, or in the journal alone; what was removed is not.
#[tokio::test]
async fn a_scan_sees_everything_durable() {
    let room = tempfile::tempdir().expect("room");
    let config = || Config::new([7; 32]);
    let (store, _) = Store::open(room.path(), config()).expect("opens");
    let put = |key: &str, value: &str| Write::put(key.as_bytes(), value.as_bytes());
    store
        .commit(vec![put("a1", "old"), put("a2", "gone"), put("b1", "other")])
        .await
        .expect("kept");
    store.close().await;
    let (store, _) = Store::open(room.path(), config()).expect("opens again");
    let batch = vec![put("a1", "new"), Write::remove(b"a2".to_vec()), put("a3", "more")];
    store.commit(batch).await.expect("kept");
    let seen = store.scan(b"a").await.expect("reads");
    let expected = [("a1", "new"), ("a3", "more")];
    let expected: Vec<_> =
        expected.iter().map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec())).collect();
    assert_eq!(seen, expected);
    assert!(store.scan(b"c").await.expect("reads").is_empty());
    store.close().await;
    assert_eq!(store.scan(b"a").await, Err(ReadFault::Closed));
}
