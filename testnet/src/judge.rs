//! Judges a fabric of real nodes: merges what they wrote about themselves with what was seen from
//! outside, by time, and hands it to [`Check`], which judges the virtual world as well.
//!
//! ```text
//! NAME.jsonl  NAME.jsonl ...   each node's own history      \
//!                                                            merge by time --> Check --> Verdict
//! Outside: killed, paused, jobs' processes there and gone   /
//! ```
//!
//! Times are microseconds of CLOCK_BOOTTIME, which all processes of one host share. A node's lines
//! stand in the order in which things happened there; where two sources have the same time, what
//! was seen from outside comes first.
//!
//! Beside the invariants of the check it judges that nothing leaves a node that it had not given to
//! its store before, and that what it reads back is the fold of some first part of what it gave,
//! in order, batch by batch.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use leasehold_node::history::{JobStep, Line, MAX_SIGNED, Octets, Saw};
use leasehold_proto::base::time::{Boot, Span};
use leasehold_proto::core::{Kept, View};
use leasehold_proto::minds::book::Lent;
use leasehold_proto::words::chain;
use leasehold_proto::words::contract::Grant;
use leasehold_proto::words::object::body_in;
use leasehold_proto::words::sign::Signed;
use leasehold_proto::words::usage::Outcome;
use leasehold_proto::words::wire;
use leasehold_proto::{Hash, KeyId, LeaseId};
use serde::{Deserialize, Serialize};

use crate::check::{At, Check, Evidence, Seen, Settled, Violation, recovered};

/// Something that was seen from outside of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outside {
    /// When, in microseconds of CLOCK_BOOTTIME.
    pub at: u64,
    /// At which node, by its number.
    pub host: usize,
    /// What.
    pub saw: Sight,
}

/// What can be seen from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sight {
    /// The process is gone.
    Stopped,
    /// The process is about to stand still.
    Paused,
    /// The process goes on.
    Resumed,
    /// A process of this job is there: nothing of a node or warden said so.
    JobThere(LeaseId),
    /// This was the last time that one was.
    JobGone(LeaseId),
    /// Something that must not be, in words.
    Wrong(Invariant, String),
}

/// Which invariant something breaks that only the outside can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Invariant {
    /// A job outlives its lease.
    BoundedLife,
    /// Something does not go on as it should.
    Liveness,
}

impl Invariant {
    /// As the check calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BoundedLife => "4 (bounded life)",
            Self::Liveness => "liveness",
        }
    }
}

/// What is to be judged.
#[derive(Debug)]
pub struct Case<'a> {
    /// The history of each node, by its number.
    pub histories: &'a [PathBuf],
    /// What was seen from outside.
    pub outside: &'a [Outside],
    /// How much later than promptly things may be done on this machine.
    pub slack: Span,
    /// Whether nodes adopt jobs when they start again, so that none may be lost; wardens are not
    /// killed, and hosts not booted. On a host named here the disk was full, and with it what a
    /// warden wants to write.
    pub adopts: Option<&'a [usize]>,
    /// From when on all was quiet, if it is to be judged whether all came to rest: every node
    /// that runs must have said how things stand after that.
    pub quiet: Option<u64>,
    /// When the case was closed, in microseconds of CLOCK_BOOTTIME: what nodes do later, such as
    /// to stop, is not judged.
    pub closed: u64,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// What does not hold. Times count from the first thing that was seen.
    pub violations: Vec<Violation>,
    /// How many leases there were.
    pub leases: usize,
    /// How many jobs nodes started.
    pub jobs: usize,
    /// Of how many gangs a job was seen at work, and in how many of those not every member's was.
    pub gangs: (usize, usize),
    /// How many of them were seen at work from outside.
    pub witnessed: usize,
    /// How many were lost unseen, since their node came back too late to begin them.
    pub unbegun: usize,
    /// How many starts of nodes there were.
    pub starts: usize,
    /// How many lines were read.
    pub lines: usize,
    /// The time from which the times of violations count.
    pub began: u64,
}

/// Why nothing can be judged.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    /// A history cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line in the middle of a run does not read.
    #[error("{path}:{line}: {why}")]
    Line {
        /// In which history.
        path: PathBuf,
        /// Its number.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// A node wrote more than a history may hold.
    #[error("{0} is full: what came later was not written")]
    Full(PathBuf),
}

/// Reads one history, line by line.
struct Reader {
    path: PathBuf,
    lines: io::Split<BufReader<File>>,
    number: usize,
    /// A line that was read ahead.
    ahead: Option<Line>,
    newest: u64,
}

impl Reader {
    fn open(path: &Path) -> Result<Self, JudgeError> {
        let file =
            File::open(path).map_err(|source| JudgeError::Io { path: path.into(), source })?;
        let lines = BufReader::with_capacity(1 << 20, file).split(b'\n');
        Ok(Self { path: path.into(), lines, number: 0, ahead: None, newest: 0 })
    }

    /// The next line. One that a killed node did not finish is the last before its next start,
    /// and told nothing.
    fn next(&mut self) -> Result<Option<Line>, JudgeError> {
        if let Some(line) = self.ahead.take() {
            return Ok(Some(self.in_order(line)));
        }
        match self.read()? {
            None => Ok(None),
            Some(Ok(line)) => Ok(Some(self.in_order(line))),
            Some(Err(torn)) => match self.read()? {
                None => Ok(None),
                Some(Ok(line)) if matches!(line.saw, Saw::Started { .. }) => {
                    Ok(Some(self.in_order(line)))
                }
                Some(_) => Err(torn),
            },
        }
    }

    /// A view's time was read a moment before what stands above it was written.
    fn in_order(&mut self, mut line: Line) -> Line {
        self.newest = self.newest.max(line.at);
        if !matches!(line.saw, Saw::View { .. }) {
            line.at = self.newest;
        }
        line
    }

    fn read(&mut self) -> Result<Option<Result<Line, JudgeError>>, JudgeError> {
        let Some(bytes) = self.lines.next() else { return Ok(None) };
        let bytes = bytes.map_err(|source| JudgeError::Io { path: self.path.clone(), source })?;
        self.number += 1;
        let line = serde_json::from_slice::<Line>(&bytes);
        Ok(Some(line.map_err(|error| JudgeError::Line {
            path: self.path.clone(),
            line: self.number,
            why: error.to_string(),
        })))
    }
}

/// What a node gave to its store, as far as it can still matter.
#[derive(Debug, Default)]
struct Given {
    /// What it read back at its latest start.
    state: BTreeMap<Vec<u8>, Hash>,
    /// What it gave since, batch by batch.
    batches: VecDeque<Vec<(Vec<u8>, Option<Hash>)>>,
    /// Every value in there.
    values: HashMap<Hash, Vec<u8>>,
    /// What may leave, since it was given before or read back.
    evidence: BTreeSet<(Evidence, Hash)>,
}

impl Given {
    /// What is wrong with reading back `read`, if anything. From then on that is what is there.
    fn read_back(&mut self, read: BTreeMap<Vec<u8>, Hash>) -> Option<String> {
        let unknown = read.values().filter(|hash| !self.values.contains_key(*hash)).count();
        let mut differ: BTreeSet<&[u8]> = BTreeSet::new();
        let keys = self.state.keys().chain(read.keys());
        differ.extend(keys.filter(|key| self.state.get(*key) != read.get(*key)).map(Vec::as_slice));
        let mut prefix = differ.is_empty();
        let mut least = differ.len();
        for batch in self.batches.iter() {
            for (key, value) in batch {
                if *value == read.get(key).copied() {
                    differ.remove(key.as_slice());
                } else {
                    differ.insert(key);
                }
            }
            prefix |= differ.is_empty();
            least = least.min(differ.len());
        }
        let wrong = if unknown > 0 {
            Some(format!("{unknown} of the records that it reads back were never kept"))
        } else if prefix {
            None
        } else {
            Some(format!(
                "what it reads back is no first part of what it kept: {least} records differ from \
                 the most similar one"
            ))
        };
        self.batches.clear();
        let there: BTreeSet<Hash> = read.values().copied().collect();
        self.values.retain(|hash, _| there.contains(hash));
        self.state = read;
        wrong
    }
}

/// A node as the judge follows it.
#[derive(Debug, Default)]
struct Node {
    key: KeyId,
    running: bool,
    given: Given,
    asked: BTreeMap<u64, String>,
    whole: Option<(u64, Box<View>)>,
    /// The jobs that it started, with the run in which it last did.
    jobs: BTreeMap<LeaseId, u64>,
    /// How often it was started.
    runs: u64,
}

impl Node {
    /// What is wrong with this leaving, if it was not given to the store before.
    fn hasty(&self, signed: &Signed) -> Option<String> {
        let header = signed.header().ok().filter(|header| header.signer == self.key)?;
        let evidence = Evidence::of(header.kind)?;
        let id = signed.id();
        let given = self.given.evidence.contains(&(evidence, id));
        (!given).then(|| format!("a {evidence:?} ({}) leaves that was not kept", id.short()))
    }
}

/// When the job of a claimed lease must be over: by its term or its cap.
fn deadline(lent: &Lent) -> Option<Boot> {
    let terms: Grant = body_in(&lent.grant.envelope)?;
    let capped = lent.claimed? + lent.paused + chain::billable(&terms, lent.term);
    Some(capped.min(lent.decided + lent.term))
}

struct Judge<'a> {
    case: &'a Case<'a>,
    check: Check,
    nodes: Vec<Node>,
    witnessed: BTreeSet<LeaseId>,
    /// Leases whose jobs were lost unseen, since their node came back too late to begin them.
    unbegun: BTreeSet<LeaseId>,
    /// Leases whose jobs ended as lost although they had been at work.
    lost: BTreeSet<LeaseId>,
    verdict: Verdict,
}

/// Judges `case`.
///
/// # Errors
/// When a history cannot be read. What the nodes did wrong is in the verdict.
pub fn judge(case: &Case<'_>) -> Result<Verdict, JudgeError> {
    let mut judge = Judge {
        case,
        check: Check::with_slack(case.slack),
        nodes: case.histories.iter().map(|_| Node::default()).collect(),
        witnessed: BTreeSet::new(),
        unbegun: BTreeSet::new(),
        lost: BTreeSet::new(),
        verdict: Verdict::default(),
    };
    judge.run()?;
    Ok(judge.conclude())
}

/// Whether all has come to rest at nodes that see things like this; what has not, in words.
#[must_use]
pub fn restless(views: &[(usize, View)]) -> Vec<String> {
    let settled = |(host, view): &(usize, View)| Settled {
        host: *host,
        key: view.me,
        view: Some(view.clone()),
        unanswered: Vec::new(),
    };
    let nodes: Vec<_> = views.iter().map(settled).collect();
    let mut check = Check::default();
    check.settled(0, &nodes);
    check.violations().iter().map(ToString::to_string).collect()
}

/// The newest whole view in a history, with its time; none where there is none, also among what
/// a killed node left.
///
/// # Errors
/// When the history cannot be read.
pub fn newest_view(path: &Path) -> Result<Option<(u64, View)>, JudgeError> {
    let io = |source| JudgeError::Io { path: path.into(), source };
    let text = tail(path).map_err(io)?;
    for line in text.rsplit(|byte| *byte == b'\n') {
        // Most lines are others: they need not be read to see that.
        if !line.windows(12).take(64).any(|part| part == b"\"whole\":true") {
            continue;
        }
        if let Ok(Line { at, saw: Saw::View { whole: true, view } }) = serde_json::from_slice(line)
        {
            return Ok(Some((at, *view)));
        }
    }
    Ok(None)
}

/// The last part of a file.
fn tail(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    const TAIL: u64 = 32 << 20;
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Judge<'_> {
    fn run(&mut self) -> Result<(), JudgeError> {
        let mut readers = Vec::new();
        for path in self.case.histories {
            readers.push(Reader::open(path)?);
        }
        let mut outside: Vec<&Outside> = self.case.outside.iter().collect();
        outside.sort_by_key(|seen| seen.at);
        let mut outside = outside.into_iter().peekable();
        let mut next: Vec<Option<Line>> = Vec::new();
        let mut heap = BinaryHeap::new();
        for (host, reader) in readers.iter_mut().enumerate() {
            let line = reader.next()?;
            heap.extend(line.iter().map(|line| Reverse((line.at, host))));
            next.push(line);
        }
        let lines = heap.peek().map(|Reverse((at, _))| *at);
        let began = lines.into_iter().chain(outside.peek().map(|seen| seen.at)).min();
        self.verdict.began = began.unwrap_or(0);
        loop {
            let line = heap.peek().map(|Reverse((at, _))| *at);
            let line = line.filter(|at| *at <= self.case.closed);
            if let Some(seen) = outside.next_if(|seen| line.is_none_or(|line| seen.at <= line)) {
                self.check.passed(seen.at);
                self.outside(seen);
                continue;
            }
            let Some(Reverse((at, host))) = heap.pop().filter(|_| line.is_some()) else { break };
            let (Some(slot), Some(reader)) = (next.get_mut(host), readers.get_mut(host)) else {
                break;
            };
            let Some(line) = slot.take() else { continue };
            if matches!(line.saw, Saw::Full) {
                return Err(JudgeError::Full(reader.path.clone()));
            }
            self.check.passed(at);
            self.line(host, line);
            *slot = reader.next()?;
            heap.extend(slot.iter().map(|line| Reverse((line.at, host))));
        }
        self.check.passed(self.case.closed);
        Ok(())
    }

    fn at(at: u64, host: usize) -> At {
        At { us: at, host, boot: Boot(at / 1000) }
    }

    fn outside(&mut self, seen: &Outside) {
        let at = Self::at(seen.at, seen.host);
        match &seen.saw {
            Sight::Stopped => {
                self.check.see(at, Seen::Stopped);
                if let Some(node) = self.nodes.get_mut(seen.host) {
                    node.running = false;
                }
            }
            Sight::Paused => self.check.see(at, Seen::Paused),
            Sight::Resumed => self.check.see(at, Seen::Resumed),
            Sight::JobThere(lease) => {
                self.witnessed.insert(*lease);
                self.check.see(at, Seen::JobStarted(*lease));
            }
            Sight::JobGone(lease) => self.check.see(at, Seen::JobEnded(*lease)),
            Sight::Wrong(invariant, what) => self.check.found(invariant.name(), at, what.clone()),
        }
    }

    fn line(&mut self, host: usize, line: Line) {
        self.verdict.lines += 1;
        let at = Self::at(line.at, host);
        let Some(node) = self.nodes.get_mut(host) else { return };
        match line.saw {
            Saw::Started { key, boot, epoch, capacity, read, .. } => {
                self.verdict.starts += 1;
                node.runs += 1;
                (node.key, node.running, node.whole) = (key, true, None);
                node.asked.clear();
                let entries = read.iter().map(|(Octets(key), hash)| (key.clone(), *hash));
                let entries: BTreeMap<_, _> = entries.collect();
                let mut kept = Vec::with_capacity(entries.len());
                let mut wrong = Vec::new();
                for (key, hash) in &entries {
                    let value = node.given.values.get(hash);
                    match value.map(|value| Kept::read(key, value)) {
                        Some(Ok(entry)) => kept.push(entry),
                        Some(Err(error)) => wrong.push(error.to_string()),
                        // Told by what follows.
                        None => {}
                    }
                }
                wrong.extend(node.given.read_back(entries));
                node.given.evidence = recovered(&kept).0;
                let seen = Seen::Started { key, boot, epoch, capacity: &capacity, kept: &kept };
                self.check.see(at, seen);
                for what in wrong {
                    self.check.found("2 (durability)", at, what);
                }
            }
            Saw::Kept(entries) => {
                let mut batch = Vec::with_capacity(entries.len());
                for (Octets(key), value) in entries {
                    let value = value.map(|Octets(value)| (Hash::of(&value), value));
                    let kept = value.as_ref().map(|(_, value)| Kept::read(&key, value));
                    if let Some(Ok(kept)) = &kept {
                        node.given.evidence.extend(recovered(std::slice::from_ref(kept)).0);
                    }
                    match kept {
                        Some(Ok(Kept::Lent(id, lent))) => {
                            self.check.see(at, Seen::Lent(id, &lent));
                            let adopts = self.case.adopts.is_some_and(|full| !full.contains(&host));
                            // What was not begun when its node died is begun by the next run, if
                            // that comes in time.
                            if adopts && lent.outcome == Some(Outcome::Lost) {
                                let late = deadline(&lent).is_none_or(|end| end <= at.boot);
                                if late && !self.witnessed.contains(&id) {
                                    self.unbegun.insert(id);
                                } else if self.lost.insert(id) {
                                    let what =
                                        format!("the job of {id} was lost, not adopted or begun");
                                    self.check.found("adoption", at, what);
                                }
                            }
                        }
                        Some(Err(error)) => {
                            self.check.found("2 (durability)", at, error.to_string());
                        }
                        _ => {}
                    }
                    batch.push((key, value.as_ref().map(|(hash, _)| *hash)));
                    node.given.values.extend(value);
                }
                node.given.batches.push_back(batch);
            }
            Saw::Signed { object: Octets(object), answers } => {
                match wire::decode::<MAX_SIGNED, Signed>(&object) {
                    Ok(signed) => {
                        if let Some(what) = node.hasty(&signed) {
                            self.check.found("2 (durability)", at, what);
                        }
                        self.check.see(at, Seen::Signed(&signed, answers));
                    }
                    Err(error) => self.check.found("words", at, error.to_string()),
                }
            }
            Saw::Asked { command, what } => {
                node.asked.insert(command, what);
            }
            Saw::Answered { command } => {
                node.asked.remove(&command);
            }
            Saw::Job(lease, JobStep::Start) => {
                // In another run again, if nothing of it had been begun.
                let earlier = node.jobs.insert(lease, node.runs);
                self.verdict.jobs += usize::from(earlier.is_none());
                let anew = earlier.is_none_or(|earlier| earlier != node.runs);
                if !anew || earlier.is_some() && self.witnessed.contains(&lease) {
                    let what = format!("the job of {lease} is started twice");
                    self.check.found("3 (idempotence)", at, what);
                }
            }
            Saw::Job(lease, JobStep::Deadline) => self.check.see(at, Seen::JobDeadline(lease)),
            Saw::Job(..) | Saw::Full => {}
            Saw::View { whole, view } => {
                self.check.see(at, Seen::View(&view));
                if whole {
                    node.whole = Some((line.at, view));
                }
            }
            Saw::Halted => self.check.see(at, Seen::Halted),
        }
    }

    /// What must be so at the end.
    fn conclude(mut self) -> Verdict {
        if let Some(quiet) = self.case.quiet {
            let mut settled = Vec::new();
            for (host, node) in self.nodes.iter_mut().enumerate() {
                let view = node.whole.take().filter(|_| node.running);
                let view = view.filter(|(at, _)| *at >= quiet).map(|(_, view)| *view);
                if node.running && view.is_none() {
                    let what = "it does not say how things stand at the end".to_string();
                    self.check.found("liveness", Self::at(self.case.closed, host), what);
                }
                let unanswered = node.asked.values().cloned().collect();
                settled.push(Settled { host, key: node.key, view, unanswered });
            }
            self.check.settled(self.case.closed, &settled);
        }
        let began = self.verdict.began / 1000;
        let violations = self.check.violations().iter().map(|violation| Violation {
            at_ms: violation.at_ms.saturating_sub(began),
            ..violation.clone()
        });
        self.verdict.violations = violations.collect();
        self.verdict.leases = self.check.leases();
        self.verdict.gangs = self.check.gangs();
        self.verdict.witnessed = self.witnessed.len();
        self.verdict.unbegun = self.unbegun.len();
        self.verdict
    }
}
