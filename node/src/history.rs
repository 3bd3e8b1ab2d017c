//! The history of one node: what it read back, kept, signed, was asked and saw, a JSON line each,
//! for a checker that judges many nodes together. Off unless `node.history` names a file.
//!
//! ```text
//! started   who runs, in which epoch, and what it read back: keys, and the hashes of values
//! kept      what is handed to the store next, whole        before it can be durable
//! signed    an object of this node, and what it answers    before it can be sent
//! asked     a command, by number and name
//! answered  the same number
//! job       started, to be stopped, ended
//! view      how things stand: thin twice a second, whole as often as its size allows
//! halted    nothing is granted any more
//! full      the file may not grow any more: the history ends here
//! ```
//!
//! A line is one write(2), made before what it tells of can be seen outside, so a node killed at
//! any instant leaves every line but perhaps a part of the last; the next start begins a new line.
//! A node that cannot write its history stops: a gap would look like a broken promise.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::BootId;
use leasehold_proto::core::{Command, Core, Effect, Event, Kept, LentStage, Notice, Ticket, View};
use leasehold_proto::words::message::Said;
use leasehold_proto::words::sign::Signed;
use leasehold_proto::words::wire::{self, MAX_OBJECT};
use leasehold_proto::{Hash, KeyId, LeaseId, Span};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::store::Write;

/// The longest encoding of a signed object, in bytes.
pub const MAX_SIGNED: usize = MAX_OBJECT + 128;
/// The longest history of one node, in bytes.
pub const MAX_FILE: u64 = 4 << 30;
/// The most questions that wait for their signed answers.
const MAX_QUESTIONS: usize = 4_096;
/// Between two thin views, in microseconds.
const THIN_US: u64 = 500_000;
/// How fast whole views may make the file grow, in bytes a second.
const WHOLE_RATE: u64 = 64 * 1024;

/// Bytes, in hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Octets(#[serde(with = "wire::octets")] pub Vec<u8>);

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// When it was written, in microseconds of CLOCK_BOOTTIME: true time among the nodes of one
    /// host. That of a view was read before the view was made.
    pub at: u64,
    /// What it tells.
    pub saw: Saw,
}

/// What a line tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saw {
    /// The node starts.
    Started {
        /// Its key.
        key: KeyId,
        /// Its process.
        pid: u32,
        /// The host's boot.
        boot: BootId,
        /// Its epoch, which may not be durable yet.
        epoch: u64,
        /// What it may lend.
        capacity: Resources,
        /// What it read back: keys, and the hashes of their values.
        read: Vec<(Octets, Hash)>,
    },
    /// This goes to the store: keys, and values or none where one is taken away.
    Kept(Vec<(Octets, Option<Octets>)>),
    /// This was signed and leaves.
    Signed {
        /// The object, as it travels.
        object: Octets,
        /// The object that it answers.
        answers: Option<Hash>,
    },
    /// A command was given. Those that only look are left out.
    Asked {
        /// By which its reply is known.
        command: u64,
        /// What.
        what: String,
    },
    /// A command was replied to.
    Answered {
        /// Which.
        command: u64,
    },
    /// A job under this lease.
    Job(LeaseId, JobStep),
    /// How things stand.
    View {
        /// Whether it names everything; else the map and what is over are left out.
        whole: bool,
        /// How.
        view: Box<View>,
    },
    /// It grants nothing any more.
    Halted,
    /// The file is as long as it may be.
    Full,
}

/// What became of a job, as the node knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStep {
    /// It is to be started.
    Start,
    /// Its warden has taken the deadline that it was last given.
    Deadline,
    /// It is to be stopped.
    Stop,
    /// It has ended.
    Ended,
}

/// Why there is no history.
#[derive(Debug, thiserror::Error)]
#[error("history {}: {source}", path.display())]
pub struct HistoryError {
    /// Where it should be.
    path: PathBuf,
    /// Why it is not.
    source: io::Error,
}

/// The history of a running node.
#[derive(Debug)]
pub struct History(Option<Writer>);

#[derive(Debug)]
struct Writer {
    file: File,
    length: u64,
    /// What was read back, until the start is told.
    read: Vec<(Octets, Hash)>,
    /// The objects in questions that wait for an answer.
    questions: BTreeMap<Ticket, Hash>,
    next_thin: u64,
    next_whole: u64,
}

impl History {
    /// None is written.
    #[must_use]
    pub const fn off() -> Self {
        Self(None)
    }

    /// Goes on with the file at `path`, which is made if need be; with none where the path is
    /// empty.
    ///
    /// # Errors
    /// When the file cannot be used.
    pub fn open(path: &Path) -> Result<Self, HistoryError> {
        if path.as_os_str().is_empty() {
            return Ok(Self::off());
        }
        let open = || -> io::Result<Writer> {
            let mut options = OpenOptions::new();
            let mut file = options.read(true).append(true).create(true).mode(0o600).open(path)?;
            let length = file.seek(SeekFrom::End(0))?;
            let mut writer = Writer {
                file,
                length,
                read: Vec::new(),
                questions: BTreeMap::new(),
                next_thin: 0,
                next_whole: 0,
            };
            writer.end_torn_line()?;
            Ok(writer)
        };
        let opened = open().map_err(|source| HistoryError { path: path.into(), source })?;
        Ok(Self(Some(opened)))
    }

    /// What the store gave back at this start.
    pub fn read_back(&mut self, kept: &[Kept]) {
        let Some(writer) = &mut self.0 else { return };
        let entries = kept.iter().filter_map(|kept| {
            let value = kept.value().ok()??;
            Some((Octets(kept.key()), Hash::of(&value)))
        });
        writer.read = entries.collect();
    }

    /// The node starts: nothing was kept or sent in this run.
    pub fn started(&mut self, core: &Core) {
        let Some(writer) = &mut self.0 else { return };
        let view = core.view(clock::now());
        let read = std::mem::take(&mut writer.read);
        writer.write(&Saw::Started {
            key: view.me,
            pid: std::process::id(),
            boot: clock::boot_id(),
            epoch: view.epoch,
            capacity: view.capacity,
            read,
        });
    }

    /// This goes to the store next.
    pub fn kept(&mut self, writes: &[Write]) {
        let Some(writer) = &mut self.0 else { return };
        if !writes.is_empty() {
            let writes = writes.iter().map(|Write { key, value }| {
                (Octets(key.clone()), value.as_ref().map(|value| Octets(value.clone())))
            });
            writer.write(&Saw::Kept(writes.collect()));
        }
    }

    /// This was signed, and leaves next, as an answer to the question of `ticket` if there is one.
    pub fn signed(&mut self, signed: &Signed, ticket: Option<Ticket>) {
        let Some(writer) = &mut self.0 else { return };
        let answers = ticket.and_then(|ticket| writer.questions.remove(&ticket));
        match wire::encode::<MAX_SIGNED>(signed) {
            Ok(object) => writer.write(&Saw::Signed { object: Octets(object), answers }),
            Err(error) => stop(&error),
        }
    }

    /// The core hears this next.
    pub fn heard(&mut self, event: &Event) {
        let Some(writer) = &mut self.0 else { return };
        match event {
            Event::Heard { said, ticket, .. } => {
                let object = match said {
                    Said::Order(papers) => papers.order.id(),
                    Said::Claim(claim) => claim.id(),
                    Said::Release(release) => release.id(),
                    Said::Renew(renew) => renew.id(),
                    Said::Gang(gang, _) => gang.id(),
                    _ => return,
                };
                if writer.questions.len() >= MAX_QUESTIONS {
                    writer.questions.pop_first();
                }
                writer.questions.insert(*ticket, object);
            }
            Event::Asked { command, what } => {
                if let Some(what) = name(what) {
                    writer.write(&Saw::Asked { command: command.0, what });
                }
            }
            Event::Extended(lease, _, true) => {
                writer.write(&Saw::Job(*lease, JobStep::Deadline));
            }
            Event::JobEnded(lease, ..) => writer.write(&Saw::Job(*lease, JobStep::Ended)),
            _ => {}
        }
    }

    /// This leaves next.
    pub fn leaves(&mut self, effect: &Effect) {
        let Some(writer) = &mut self.0 else { return };
        match effect {
            Effect::StartJob(start) => writer.write(&Saw::Job(start.lease, JobStep::Start)),
            Effect::StopJob(lease, _) => writer.write(&Saw::Job(*lease, JobStep::Stop)),
            Effect::Answer(command, _) => writer.write(&Saw::Answered { command: command.0 }),
            Effect::Notice(Notice::Twin { .. }) => writer.write(&Saw::Halted),
            _ => {}
        }
    }

    /// Looks at how things stand, when it is time to. All that was decided must be told before.
    pub fn look(&mut self, core: &Core) {
        let Some(writer) = &mut self.0 else { return };
        // Before the view: what it says is relied on is relied on from its own time.
        let at = clock::boot_us();
        if at < writer.next_thin {
            return;
        }
        writer.next_thin = at + THIN_US;
        let mut view = core.view(clock::now());
        let whole = at >= writer.next_whole;
        if !whole {
            view.nodes.clear();
            view.lent.retain(|lent| lent.stage != LentStage::Ended);
            view.held.retain(|held| held.left > Span::ZERO);
        }
        let before = writer.length;
        writer.write_at(at, &Saw::View { whole, view: Box::new(view) });
        if whole {
            let took = (writer.length - before).saturating_mul(1_000_000) / WHOLE_RATE;
            writer.next_whole = at + took.max(THIN_US);
        }
    }
}

/// What a command is called; none for one that only looks.
fn name(command: &Command) -> Option<String> {
    let of = |word: &str, lease: &LeaseId| Some(format!("{word} {lease}"));
    match command {
        Command::Lease(_) => Some("lease".into()),
        Command::LeaseBy(_) => Some("lease by an order".into()),
        Command::Claim { lease, .. } => of("claim", lease),
        Command::Release(lease) => of("release", lease),
        Command::Renew { lease, .. } => of("renew", lease),
        Command::Revoke(lease) => of("revoke", lease),
        Command::Gang { size, .. } => Some(format!("a gang of {size}")),
        Command::Reclaim { .. } => Some("reclaim".into()),
        Command::Drain { .. } => Some("drain".into()),
        Command::Resume => Some("resume".into()),
        Command::Reinstate(_) => Some("reinstate".into()),
        Command::Pin(..) => Some("pin".into()),
        Command::AwaitEnd(lease) => of("await the end of", lease),
        Command::DraftOrder { .. } => Some("draft an order".into()),
        Command::Serve(lease, _) => of("count a request under", lease),
        Command::Consume(served) => of("agree on a request under", &served.body().lease),
        Command::Plan(_)
        | Command::Lessor(_)
        | Command::Reach(_)
        | Command::Holders(_)
        | Command::InUse
        | Command::Sellers
        | Command::View => None,
    }
}

fn stop(error: &dyn std::fmt::Display) {
    tracing::error!(%error, "the history cannot be written: stopping");
    std::process::abort();
}

impl Writer {
    /// What a killed node wrote of its last line must not swallow the next one.
    fn end_torn_line(&mut self) -> io::Result<()> {
        if self.length == 0 {
            return Ok(());
        }
        let mut last = [0];
        self.file.seek(SeekFrom::End(-1))?;
        self.file.read_exact(&mut last)?;
        if last != *b"\n" {
            self.file.write_all(b"\n")?;
            self.length += 1;
        }
        Ok(())
    }

    fn write(&mut self, saw: &Saw) {
        self.write_at(clock::boot_us(), saw);
    }

    fn write_at(&mut self, at: u64, saw: &Saw) {
        /// Like [`Line`], of what is borrowed.
        #[derive(Serialize)]
        struct LineOf<'a> {
            at: u64,
            saw: &'a Saw,
        }
        if self.length >= MAX_FILE {
            return;
        }
        let line = match serde_json::to_vec(&LineOf { at, saw }) {
            Ok(line) => line,
            Err(error) => return stop(&error),
        };
        self.put(line);
        if self.length >= MAX_FILE {
            tracing::warn!(bytes = self.length, "the history is as long as it may be: it ends");
            self.put(format!("{{\"at\":{at},\"saw\":\"full\"}}").into_bytes());
        }
    }

    fn put(&mut self, mut line: Vec<u8>) {
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            stop(&error);
        }
        self.length = self.length.saturating_add(line.len() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_back_and_a_torn_one_swallows_nothing() {
        let room = tempfile::tempdir().expect("room");
        let path = room.path().join("history.jsonl");
        let write = |n: u8| Write::put([b'e', n], [n]);
        History::open(&path).expect("opens").kept(&[write(1), Write::remove([2])]);
        let mut whole = std::fs::read(&path).expect("reads");
        whole.extend_from_slice(b"{\"at\":7,\"saw\":{\"ke");
        std::fs::write(&path, &whole).expect("writes");
        History::open(&path).expect("opens").kept(&[write(3)]);
        let text = std::fs::read_to_string(&path).expect("reads");
        let lines: Vec<_> = text.lines().map(serde_json::from_str::<Line>).collect();
        let [Ok(first), Err(_), Ok(last)] = &lines[..] else { panic!("{lines:?}") };
        assert!(first.at > 0 && first.at <= last.at);
        let Saw::Kept(entries) = &first.saw else { panic!("{first:?}") };
        assert_eq!(entries[0], (Octets(vec![b'e', 1]), Some(Octets(vec![1]))));
        assert_eq!(entries[1], (Octets(vec![2]), None));
    }

    #[test]
    fn without_a_path_nothing_is_written() {
        let mut history = History::open(Path::new("")).expect("is off");
        history.kept(&[Write::remove([2])]);
        assert!(history.0.is_none());
    }
}
