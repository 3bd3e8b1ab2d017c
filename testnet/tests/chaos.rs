//! Chaos: a short run with real processes is clean and leaves nothing behind, and what it wrote down
//! is no longer clean once it is changed: each invariant notices.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use leasehold_node::history::{Line, MAX_SIGNED, Octets, Saw};
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::Span;
use leasehold_proto::core::{Kept, LentStage};
use leasehold_proto::words::contract::Grant;
use leasehold_proto::words::object::{Envelope, Kind};
use leasehold_proto::words::sign::{Draft, HeaderOf, Signature, Signed};
use leasehold_proto::words::wire::{self, MAX_OBJECT};
use leasehold_proto::{Hash, LeaseId};
use leasehold_testnet::chaos::{self, Kept as Case};
use leasehold_testnet::judge::{Outside, Sight};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

fn chaos(room: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leasehold-testnet"));
    command.arg("chaos").args(args).env("TMPDIR", room);
    command
}

/// Command lines of processes that name something below `room`.
fn below(room: &Path) -> Vec<String> {
    let room = room.display().to_string();
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let lines = entries.filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(&room).then_some(line)
    });
    lines.collect()
}

fn names(room: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(room).expect("room").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What a run wrote down, to be changed.
struct Evidence {
    room: PathBuf,
    case: Case,
    histories: Vec<Vec<Line>>,
    outside: Vec<Outside>,
}

impl Evidence {
    fn read(dir: &Path, room: &Path) -> Self {
        let (case, paths, outside) = Case::read(dir).expect("a case");
        let history = |path: &PathBuf| {
            let text = std::fs::read_to_string(path).expect("a history");
            // A killed node may have left a part of a line.
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
        };
        let histories = paths.iter().map(history).collect();
        Self { room: room.into(), case, histories, outside }
    }

    /// The invariants that do not hold once everything was changed so.
    fn changed(&self, change: impl FnOnce(&mut Vec<Vec<Line>>, &mut Vec<Outside>)) -> Vec<String> {
        let (mut histories, mut outside) = (self.histories.clone(), self.outside.clone());
        change(&mut histories, &mut outside);
        let dir = tempfile::tempdir_in(&self.room).expect("room");
        let write = |name: &str, lines: Vec<String>| {
            std::fs::write(dir.path().join(name), lines.join("\n")).expect("writes");
        };
        for (name, lines) in self.case.nodes.iter().zip(&histories) {
            let lines = lines.iter().map(|line| serde_json::to_string(line).expect("a line"));
            write(&format!("{name}.jsonl"), lines.collect());
        }
        let lines = outside.iter().map(|seen| serde_json::to_string(seen).expect("a line"));
        write("outside.jsonl", lines.collect());
        write("case.json", vec![serde_json::to_string(&self.case).expect("a case")]);
        let verdict = chaos::judge_kept(dir.path()).expect("judges");
        verdict.violations.iter().map(ToString::to_string).collect()
    }

    /// The first line of any history that `is` such a one: whose, and which.
    fn find(&self, is: impl Fn(&Line, &[Line]) -> bool) -> (usize, usize) {
        for (host, lines) in self.histories.iter().enumerate() {
            let found = lines.iter().enumerate().find(|(nth, line)| {
                let rest = lines.get(nth + 1..).unwrap_or_default();
                line.at <= self.case.closed && is(line, rest)
            });
            if let Some((nth, _)) = found {
                return (host, nth);
            }
        }
        panic!("there is no such line in this run");
    }
}

/// What a line says of leases that were granted.
fn lent(line: &Line) -> Vec<Kept> {
    let Saw::Kept(entries) = &line.saw else { return Vec::new() };
    let entries = entries.iter().filter_map(|(Octets(key), value)| {
        Kept::read(key, &value.as_ref()?.0).ok().filter(|kept| matches!(kept, Kept::Lent(..)))
    });
    entries.collect()
}

fn lent_at(line: &Line, stage: LentStage) -> Option<LeaseId> {
    lent(line).iter().find_map(|kept| match kept {
        Kept::Lent(id, lent) if lent.stage == stage => Some(*id),
        _ => None,
    })
}

fn signed(line: &Line) -> Option<(Kind, Signed)> {
    let Saw::Signed { object: Octets(object), .. } = &line.saw else { return None };
    let signed = wire::decode::<MAX_SIGNED, Signed>(object).expect("an object");
    Some((signed.header().expect("an envelope").kind, signed))
}

fn is_start(line: &Line) -> bool {
    matches!(line.saw, Saw::Started { .. })
}

/// The same lease under another grant, with the grant as it would leave.
fn second_grant(kept: &Kept, after: &Line) -> [Line; 2] {
    let Kept::Lent(_, lent) = kept else { panic!("a lease") };
    let Envelope { header, body, .. } = Envelope::decode(&lent.grant.envelope).expect("decodes");
    let grant = wire::decode::<MAX_OBJECT, Grant>(&body).expect("decodes");
    let header = HeaderOf { seq: header.seq + 1_000_000, ..HeaderOf::from(&header) };
    let draft = Draft::new(header, &grant).expect("encodes");
    let object = Signed { envelope: draft.envelope.clone(), signature: Signature([0; 64]) };
    let object = Octets(wire::encode::<MAX_SIGNED>(&object).expect("encodes"));
    let mut lent = lent.clone();
    lent.grant = draft.clone();
    let kept = Kept::Lent(LeaseId(draft.id()), lent);
    let value = kept.value().expect("fits").map(Octets);
    let line = |saw| Line { at: after.at, saw };
    [
        line(Saw::Kept(vec![(Octets(kept.key()), value)])),
        line(Saw::Signed { object, answers: None }),
    ]
}

fn noticed(broken: &[String], invariant: &str) {
    assert!(broken.iter().any(|what| what.contains(invariant)), "{invariant}: {broken:?}");
}

/// Each change is one that a node would have to make that breaks its word.
fn changed_histories_are_noticed(run: &Evidence) {
    // A record that was not kept before its grant left, and one that is read back.
    let (host, nth) = run.find(|line, _| lent_at(line, LentStage::Granted).is_some());
    noticed(&run.changed(|lines, _| drop(lines[host].remove(nth))), "2 (durability)");
    let (host, nth) = run.find(|line, rest| {
        let life: Vec<_> = rest.iter().take_while(|line| !is_start(line)).collect();
        let restarted = rest.get(life.len()).is_some_and(|line| line.at <= run.case.closed);
        restarted && !lent(line).is_empty() && life.into_iter().all(|line| lent(line).is_empty())
    });
    noticed(&run.changed(|lines, _| drop(lines[host].remove(nth))), "2 (durability)");

    let small = Resources::new(50, 1 << 20, 1 << 20);
    let less = |lines: &mut Vec<Vec<Line>>| {
        for line in lines.iter_mut().flatten() {
            if let Saw::Started { capacity, .. } = &mut line.saw {
                capacity.clone_from(&small);
            }
        }
    };
    noticed(&run.changed(|lines, _| less(lines)), "1 (capacity)");

    let (host, nth) = run.find(|line, _| lent_at(line, LentStage::Granted).is_some());
    let after = |line: &Line| matches!(signed(line), Some((Kind::Grant, _)));
    let left = nth + run.histories[host][nth..].iter().position(after).expect("it left");
    let kept = lent(&run.histories[host][nth]).remove(0);
    let twice = second_grant(&kept, &run.histories[host][left]);
    let broken = run.changed(|lines, _| {
        lines[host].splice(left + 1..left + 1, twice);
    });
    noticed(&broken, "3 (idempotence)");

    let answer = |line: &Line, _: &[Line]| matches!(&line.saw, Saw::Signed { answers: Some(_), .. } if after(line));
    let (host, nth) = run.find(answer);
    let broken = run.changed(|lines, _| {
        if let Saw::Signed { answers, .. } = &mut lines[host][nth].saw {
            *answers = Some(Hash([7; 32]));
        }
    });
    noticed(&broken, "3 (idempotence)");

    let gone = |seen: &&mut Outside| matches!(seen.saw, Sight::JobGone(_));
    let late = |seen: &mut Vec<Outside>| {
        let gone = seen.iter_mut().find(gone).expect("a job ended");
        gone.at += 120_000_000;
    };
    let broken = run.changed(|_, seen| late(seen));
    noticed(&broken, "4 (bounded life)");
    noticed(&broken, "7 (reap before reuse)");

    let relies = |line: &Line, _: &[Line]| matches!(&line.saw, Saw::View { view, .. } if view.held.iter().any(|held| held.left > Span::secs(1) && held.id.is_some()));
    let (host, nth) = run.find(relies);
    let broken = run.changed(|lines, _| {
        if let Saw::View { view, .. } = &mut lines[host][nth].saw {
            view.held.iter_mut().for_each(|held| held.left += Span::secs(60));
        }
    });
    noticed(&broken, "5 (the lessee stops first)");

    let (host, granted) = run.find(|line, rest| {
        let id = lent_at(line, LentStage::Granted);
        let ends = |line: &Line| lent_at(line, LentStage::Ended) == id;
        let life: Vec<_> = rest.iter().take_while(|line| !is_start(line)).collect();
        id.is_some() && life.into_iter().any(ends)
    });
    let lines = &run.histories[host];
    let id = lent_at(&lines[granted], LentStage::Granted);
    let ends = |line: &Line| lent_at(line, LentStage::Ended) == id;
    let ended = granted + lines[granted..].iter().position(ends).expect("it ended");
    let again = Line { at: lines[ended].at, ..lines[granted].clone() };
    let broken = run.changed(|lines, _| lines[host].insert(ended + 1, again));
    noticed(&broken, "6 (ended is final)");

    let (host, nth) = run.find(|line, rest| is_start(line) && rest.iter().any(is_start));
    let broken = run.changed(|lines, _| {
        for line in &mut lines[host][nth + 1..] {
            if let Saw::Started { epoch, .. } = &mut line.saw {
                *epoch = 1;
            }
        }
    });
    noticed(&broken, "8 (epochs)");

    let receipt = |line: &Line| matches!(signed(line), Some((Kind::Receipt, _)));
    let lease =
        |line: &Line| signed(line).and_then(|(_, signed)| Some(signed.header().ok()?.subject));
    let (host, nth) = run.find(|line, rest| {
        let same = |other: &Line| receipt(other) && lease(other) == lease(line);
        receipt(line) && rest.iter().any(|other| same(other) && other.at <= run.case.closed)
    });
    let subject = lease(&run.histories[host][nth]);
    let number = signed(&run.histories[host][nth]).map(|(_, signed)| signed.id());
    let broken = run.changed(|lines, _| {
        lines[host].retain(|line| {
            let this = signed(line).map(|(_, signed)| signed.id()) == number;
            !(this && lease(line) == subject)
        });
    });
    noticed(&broken, "9 (receipts)");

    let answered = |line: &Line, rest: &[Line]| {
        matches!(line.saw, Saw::Answered { .. }) && !rest.iter().any(is_start)
    };
    let (host, nth) = run.find(answered);
    noticed(&run.changed(|lines, _| drop(lines[host].remove(nth))), "liveness");
}

#[test]
fn a_short_run_is_clean_and_what_it_wrote_is_not_once_it_is_changed() {
    let room = tempfile::tempdir().expect("room");
    let keep = room.path().join("kept");
    let kept = keep.display().to_string();
    let args = ["--minutes", "0.4", "--seed", "7", "--nodes", "3", "--json", "--keep", &kept];
    let output = chaos(room.path(), &args).output().expect("runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let object: Value = serde_json::from_slice(&output.stdout).expect("one object");
    let number = |name: &str| object[name].as_u64().unwrap_or_else(|| panic!("{name}: {object}"));
    assert_eq!(
        (object["chaos"].as_str(), number("seed"), number("violations")),
        (Some("chaos"), 7, 0)
    );
    for counted in ["sigkills", "sigstops", "partitions", "leases", "jobs", "witnessed", "lines"] {
        assert!(number(counted) > 0, "{counted}: {object}");
    }
    assert!(number("starts") > 3, "{object}");
    assert_eq!(names(room.path()), ["kept"], "nothing else is left");
    assert!(below(room.path()).is_empty(), "{:?}", below(room.path()));

    let run = Evidence::read(&keep, room.path());
    let unchanged = run.changed(|_, _| {});
    assert!(unchanged.is_empty(), "{unchanged:?}");
    changed_histories_are_noticed(&run);
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let room = tempfile::tempdir().expect("room");
    let mut child = chaos(room.path(), &["--nodes", "2", "--minutes", "5"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let begun = Instant::now();
    let nodes = || below(room.path()).iter().filter(|line| line.contains(" node up ")).count();
    while nodes() < 2 {
        assert!(begun.elapsed() < PATIENCE, "nodes do not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_child(&child), Signal::INT).expect("is there");
    let status = child.wait().expect("ends");
    assert_eq!(status.code(), Some(130));
    while !below(room.path()).is_empty() {
        assert!(begun.elapsed() < PATIENCE, "still there: {:?}", below(room.path()));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(names(room.path()).is_empty(), "{:?}", names(room.path()));
}

#[test]
fn what_makes_no_run_says_why() {
    let room = tempfile::tempdir().expect("room");
    for (args, why) in [
        (vec!["--minutes", "0"], "--minutes"),
        (vec!["--minutes", "nan"], "--minutes"),
        (vec!["--nodes", "1"], "--nodes"),
        (vec!["--judge", "/nonexistent"], "case.json"),
    ] {
        let output = chaos(room.path(), &args).output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(why), "{args:?}: {said}");
        assert!(names(room.path()).is_empty());
    }
}
