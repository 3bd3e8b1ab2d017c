//! Batches: many requests in one file, answered when there is time, within a day.
//!
//! ```text
//! file (JSONL) --validated--> in_progress --each line asked--> output file, error file --> completed
//!                 \--failed         \--cancelling--> cancelled      \--a day is over--> expired
//! ```
//!
//! Everything is kept in `batches/` in the node's directory: a batch as JSON, written whole with every
//! change of its state; files as they are; results appended line by line. A node that was killed goes on
//! where the results end: what has a result is not asked again, a torn line is taken away. At most
//! [`AT_ONCE`] requests of each batch are under way, and of those that are asked firmly a few of all, so
//! that those who wait for an answer come first.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use leasehold_keys::disk::{self, Existing};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::openai::{Endpoint, Fault};

/// Requests of one batch that are under way at once.
pub const AT_ONCE: usize = 4;
/// The longest file, in bytes, and the most requests in one.
pub const MAX_FILE: u64 = 200 << 20;
const MAX_LINES: usize = 50_000;
/// The longest line, in bytes.
const MAX_LINE: u64 = 4 << 20;
/// How many files and batches a node keeps, and how many bytes of files.
const MAX_KEPT: usize = 10_000;
const MAX_BYTES: u64 = 8 << 30;
/// The window in which a batch is answered, in seconds: the only one that OpenAI has.
const WINDOW: u64 = 24 * 3_600;
/// How many mistakes in a file are told.
const MAX_ERRORS: usize = 100;
/// How often one request is tried where nobody can answer it now.
const TRIES: u32 = 20;
/// The longest pause between two tries.
const PAUSE: Duration = Duration::from_secs(60);
/// How often it is looked meanwhile whether the batch is over.
const LOOK: Duration = Duration::from_secs(1);
/// How long after its start a node may not know yet who sells what, in seconds.
const SETTLES: u64 = 120;
/// How many batches are answered side by side.
const SIDE_BY_SIDE: usize = 64;

/// Whose a file or batch is: an API key's hash, or `operator`.
pub type Owner = String;

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// `file-…`
    pub id: String,
    /// Whose.
    pub owner: Owner,
    /// How long.
    pub bytes: u64,
    /// When it came, in seconds since 1970.
    pub created_at: u64,
    /// What it was called.
    pub filename: String,
    /// `batch`, or `batch_output`.
    pub purpose: String,
}

/// Where a batch stands, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its file breaks a rule.
    Failed,
    /// Its requests are being asked.
    InProgress,
    /// Every request has a result.
    Completed,
    /// Its window is over.
    Expired,
    /// It is to be cancelled; what is under way is awaited.
    Cancelling,
    /// It was cancelled.
    Cancelled,
}

impl Status {
    /// Whether something of it is still to be asked or awaited.
    pub(crate) const fn is_open(self) -> bool {
        matches!(self, Self::InProgress | Self::Cancelling)
    }
}

/// A mistake in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mistake {
    /// A stable word.
    pub code: String,
    /// Which line, counting from one.
    pub line: Option<u64>,
    /// For people.
    pub message: String,
    /// The field that is to blame.
    pub param: Option<String>,
}

/// A batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// `batch_…`
    pub id: String,
    /// Whose.
    pub owner: Owner,
    /// What is asked.
    pub endpoint: Endpoint,
    /// The file with its requests.
    pub input: String,
    /// The files with its results.
    pub output: String,
    /// Those that came to nothing.
    pub error: String,
    /// Where it stands.
    pub status: Status,
    /// What was wrong with its file.
    pub mistakes: Vec<Mistake>,
    /// When it was made, in seconds since 1970.
    pub created_at: u64,
    /// When its window is over.
    pub expires_at: u64,
    /// When it came to its end.
    pub ended_at: Option<u64>,
    /// How many requests it has, how many were answered, and how many came to nothing.
    pub total: u64,
    /// Answered.
    pub completed: u64,
    /// Came to nothing.
    pub failed: u64,
    /// What its owner says about it.
    pub metadata: Option<BTreeMap<String, String>>,
}

/// One request of a batch.
#[derive(Clone, Debug)]
pub(crate) struct Asking {
    /// For whom it is asked.
    pub(crate) owner: Owner,
    /// What.
    pub(crate) endpoint: Endpoint,
    /// Its JSON.
    pub(crate) body: Vec<u8>,
    /// Half of the batch's time is over: it waits no more for a lower price.
    pub(crate) hurry: bool,
}

impl Batch {
    /// Whether nothing of it is to be asked any more.
    fn is_over(&self) -> bool {
        self.status != Status::InProgress || now() >= self.expires_at
    }
}

/// What asks one request, and gives the answer's JSON.
pub(crate) type Ask =
    Arc<dyn Fn(Asking) -> BoxFuture<'static, Result<Vec<u8>, Fault>> + Send + Sync>;

/// The batches and files of a node. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Batches {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    state: Mutex<State>,
    changed: Notify,
    /// When they were opened, in seconds since 1970.
    started: u64,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Kept>,
    batches: BTreeMap<String, Batch>,
}

/// A line of an input file.
#[derive(Clone, Debug, Deserialize)]
struct Line {
    custom_id: String,
    method: String,
    url: String,
    body: serde_json::Map<String, Value>,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

fn new_id(what: &str) -> String {
    let mut bytes = [0; 12];
    // Where there is no randomness the time tells names apart.
    if getrandom::fill(&mut bytes).is_err() {
        bytes[..8].copy_from_slice(&now().to_le_bytes());
    }
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{what}{hex}")
}

/// Whether a name is one that was made here: it becomes part of a path.
fn is_id(id: &str, what: &str) -> bool {
    id.strip_prefix(what)
        .is_some_and(|rest| rest.len() == 24 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

impl Batches {
    /// What is kept in `dir`. Blocks.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let mut state = State::default();
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let bytes = std::fs::read(&path)?;
            if is_id(name, "batch_") {
                let batch: Batch = serde_json::from_slice(&bytes)?;
                state.batches.insert(batch.id.clone(), batch);
            } else if is_id(name, "file-") {
                let file: Kept = serde_json::from_slice(&bytes)?;
                state.files.insert(file.id.clone(), file);
            }
        }
        let inner = Inner { dir, state: Mutex::new(state), changed: Notify::new(), started: now() };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn path(&self, id: &str, extension: &str) -> PathBuf {
        self.inner.dir.join(format!("{id}.{extension}"))
    }

    fn write(&self, id: &str, value: &impl Serialize) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(value)?;
        let path = self.path(id, "json");
        disk::write_atomic(&path, &bytes, 0o600, Existing::Replace).map_err(io::Error::other)
    }

    /// Where the bytes of a file that is coming are put, under a new name.
    ///
    /// # Errors
    /// 429 where there are too many, 500 where it cannot be made.
    pub(crate) fn arriving(&self) -> Result<(String, File), Fault> {
        let state = hold(&self.inner.state);
        let bytes: u64 = state.files.values().map(|file| file.bytes).sum();
        if state.files.len() >= MAX_KEPT || bytes >= MAX_BYTES {
            let why = "This node keeps no more files: delete some.";
            return Err(Fault::rate_limit(crate::openai::Kind::RateLimit, why, PAUSE));
        }
        drop(state);
        let id = new_id("file-");
        let mut options = OpenOptions::new();
        let opened = options.write(true).create_new(true).mode(0o600).open(self.path(&id, "jsonl"));
        Ok((id, opened.map_err(|error| broken(&error))?))
    }

    /// A file has come.
    ///
    /// # Errors
    /// 500 where it cannot be kept.
    pub(crate) fn keep(&self, id: String, mut kept: Kept, file: &File) -> Result<Kept, Fault> {
        file.sync_all().map_err(|error| broken(&error))?;
        kept.id.clone_from(&id);
        kept.created_at = now();
        self.write(&id, &kept).map_err(|error| broken(&error))?;
        hold(&self.inner.state).files.insert(id, kept.clone());
        Ok(kept)
    }

    /// One that was to come and did not.
    pub(crate) fn forget(&self, id: &str) {
        let _ = std::fs::remove_file(self.path(id, "jsonl"));
    }

    /// The files of an owner, or all where none is named.
    pub(crate) fn files(&self, owner: Option<&str>) -> Vec<Kept> {
        let state = hold(&self.inner.state);
        let theirs = |file: &&Kept| owner.is_none_or(|owner| file.owner == owner);
        state.files.values().filter(theirs).cloned().collect()
    }

    /// One file.
    pub(crate) fn file(&self, owner: Option<&str>, id: &str) -> Option<Kept> {
        let state = hold(&self.inner.state);
        let file = state.files.get(id);
        file.filter(|file| owner.is_none_or(|owner| file.owner == owner)).cloned()
    }

    /// Where its bytes are.
    pub(crate) fn content(&self, file: &Kept) -> PathBuf {
        self.path(&file.id, "jsonl")
    }

    /// Removes a file. False when there is none.
    ///
    /// # Errors
    /// 400 where a batch still needs it, 500 where it cannot be removed.
    pub(crate) fn remove(&self, owner: Option<&str>, id: &str) -> Result<bool, Fault> {
        let Some(file) = self.file(owner, id) else { return Ok(false) };
        let mut state = hold(&self.inner.state);
        let needs = |batch: &&Batch| {
            batch.status.is_open()
                && [&batch.input, &batch.output, &batch.error].contains(&&file.id)
        };
        if let Some(batch) = state.batches.values().find(needs) {
            let why = format!("The batch '{}' still needs this file.", batch.id);
            return Err(Fault::invalid(Some("file_in_use"), why));
        }
        for extension in ["json", "jsonl"] {
            match std::fs::remove_file(self.path(id, extension)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(broken(&error));
                }
                _ => {}
            }
        }
        state.files.remove(id);
        Ok(true)
    }

    /// Makes a batch of a file; its lines are looked at. Blocks.
    ///
    /// # Errors
    /// 400 where the file is none, 429 where there are too many, 500 where it cannot be kept.
    pub(crate) fn make(
        &self,
        owner: Owner,
        endpoint: Endpoint,
        input: &str,
        metadata: Option<BTreeMap<String, String>>,
    ) -> Result<Batch, Fault> {
        let asks_all = owner == OPERATOR;
        let file = self.file((!asks_all).then_some(owner.as_str()), input).ok_or_else(|| {
            let why = format!("There is no file '{input}'.");
            Fault::invalid(Some("invalid_input_file"), why).at("input_file_id")
        })?;
        if hold(&self.inner.state).batches.len() >= MAX_KEPT {
            let why = "This node keeps no more batches.";
            return Err(Fault::rate_limit(crate::openai::Kind::RateLimit, why, PAUSE));
        }
        let (total, mistakes) =
            look(&self.content(&file), endpoint).map_err(|error| broken(&error))?;
        let status = if mistakes.is_empty() { Status::InProgress } else { Status::Failed };
        let at = now();
        let batch = Batch {
            id: new_id("batch_"),
            owner,
            endpoint,
            input: file.id,
            output: new_id("file-"),
            error: new_id("file-"),
            status,
            mistakes,
            created_at: at,
            expires_at: at + WINDOW,
            ended_at: (status == Status::Failed).then_some(at),
            total,
            completed: 0,
            failed: 0,
            metadata,
        };
        self.write(&batch.id, &batch).map_err(|error| broken(&error))?;
        hold(&self.inner.state).batches.insert(batch.id.clone(), batch.clone());
        self.inner.changed.notify_one();
        Ok(batch)
    }

    /// The batches of an owner, or all where none is named, the newest first.
    pub(crate) fn list(&self, owner: Option<&str>) -> Vec<Batch> {
        let state = hold(&self.inner.state);
        let theirs = |batch: &&Batch| owner.is_none_or(|owner| batch.owner == owner);
        let mut list: Vec<_> = state.batches.values().filter(theirs).cloned().collect();
        list.sort_by(|one, next| (next.created_at, &next.id).cmp(&(one.created_at, &one.id)));
        list
    }

    /// One batch.
    pub(crate) fn get(&self, owner: Option<&str>, id: &str) -> Option<Batch> {
        let state = hold(&self.inner.state);
        let batch = state.batches.get(id);
        batch.filter(|batch| owner.is_none_or(|owner| batch.owner == owner)).cloned()
    }

    /// Cancels a batch: what is under way is awaited.
    ///
    /// # Errors
    /// 404 where there is none, 409 where it is over.
    pub(crate) fn cancel(&self, owner: Option<&str>, id: &str) -> Result<Batch, Fault> {
        let none = || Fault::no_such_path("POST", "/v1/batches");
        let batch = self.get(owner, id).ok_or_else(none)?;
        if batch.status != Status::InProgress {
            let why = "The batch is over already.";
            let mut fault = Fault::invalid(Some("batch_not_cancellable"), why);
            fault.status = 409;
            return Err(fault);
        }
        self.change(id, |batch| batch.status = Status::Cancelling).ok_or_else(none)
    }

    /// Changes a batch, and keeps it.
    fn change(&self, id: &str, change: impl FnOnce(&mut Batch)) -> Option<Batch> {
        let mut state = hold(&self.inner.state);
        let batch = state.batches.get_mut(id)?;
        change(batch);
        let batch = batch.clone();
        drop(state);
        if let Err(error) = self.write(id, &batch) {
            tracing::warn!(batch = id, %error, "where a batch stands cannot be kept");
        }
        self.inner.changed.notify_one();
        Some(batch)
    }

    /// Answers batches until `shutdown`: the oldest ones that are open, so many of them side by side, so
    /// that one that has to wait holds up nobody else's.
    pub(crate) async fn run(self, ask: Ask, shutdown: CancellationToken) {
        let (mut under_way, mut answering) = (BTreeMap::new(), FuturesUnordered::new());
        loop {
            while let Some(batch) = self.next(&under_way) {
                under_way.insert(batch.id.clone(), batch.owner.clone());
                answering.push(self.answer_or_pause(batch, &ask));
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.inner.changed.notified() => {}
                Some(id) = answering.next(), if !answering.is_empty() => {
                    under_way.remove(&id);
                }
            }
        }
    }

    /// The next one to be answered beside those under way: what is over already and only has to be ended,
    /// then the oldest of the owner of whom the fewest are.
    fn next(&self, under_way: &BTreeMap<String, Owner>) -> Option<Batch> {
        let state = hold(&self.inner.state);
        let open = state.batches.values().filter(|batch| batch.status.is_open());
        let open = open.filter(|batch| !under_way.contains_key(&batch.id));
        let room = under_way.len() < SIDE_BY_SIDE;
        let open = open.filter(|batch| room || batch.is_over());
        let theirs = |owner: &Owner| under_way.values().filter(|other| *other == owner).count();
        let next = open.min_by_key(|batch| {
            (!batch.is_over(), theirs(&batch.owner), batch.created_at, &batch.id)
        });
        next.cloned()
    }

    async fn answer_or_pause(&self, batch: Batch, ask: &Ask) -> String {
        if let Err(error) = self.answer(&batch, ask).await {
            tracing::warn!(batch = batch.id, %error, "a batch cannot be answered now");
            tokio::time::sleep(PAUSE).await;
        }
        batch.id
    }

    /// Answers one batch to its end.
    async fn answer(&self, batch: &Batch, ask: &Ask) -> io::Result<()> {
        let mut results =
            Results::open(&self.path(&batch.output, "jsonl"), &self.path(&batch.error, "jsonl"))?;
        let (mut completed, mut failed) = (results.completed, results.failed);
        let input = BufReader::new(File::open(self.path(&batch.input, "jsonl"))?);
        let known = std::mem::take(&mut results.known);
        let id = batch.id.clone();
        let over = || self.get(None, &id).is_none_or(|batch| batch.is_over());
        // One that was here before the node was: who sells what is not heard of yet.
        let settled = match batch.created_at < self.inner.started {
            true => self.inner.started + SETTLES,
            false => 0,
        };
        let lines = input.lines().map_while(Result::ok).filter(|line| !line.trim().is_empty());
        let lines = lines.filter_map(|line| serde_json::from_str::<Line>(&line).ok());
        let left = lines.filter(|line| !known.contains(&line.custom_id));
        let left = left.take_while(|_| !over());
        let asking = futures::stream::iter(left).map(|line| async {
            (line.custom_id, one((batch, settled), ask, line.body, &over).await)
        });
        let mut asking = std::pin::pin!(asking.buffer_unordered(AT_ONCE));
        while let Some((custom_id, answer)) = asking.next().await {
            // What was not answered before the batch was over has no result.
            let Some(answer) = answer else { continue };
            results.put(&custom_id, &answer)?;
            *(if answer.is_ok() { &mut completed } else { &mut failed }) += 1;
            let mut state = hold(&self.inner.state);
            if let Some(batch) = state.batches.get_mut(&batch.id) {
                (batch.completed, batch.failed) = (completed, failed);
            }
        }
        let expired = now() >= batch.expires_at;
        let cancelled = self.get(None, &batch.id).is_none_or(|b| b.status == Status::Cancelling);
        results.sync()?;
        for (id, count) in [(&batch.output, completed), (&batch.error, failed)] {
            if count > 0 {
                let bytes = std::fs::metadata(self.path(id, "jsonl"))?.len();
                let kept = Kept {
                    id: id.clone(),
                    owner: batch.owner.clone(),
                    bytes,
                    created_at: now(),
                    filename: format!("{}.jsonl", batch.id),
                    purpose: "batch_output".into(),
                };
                self.write(id, &kept)?;
                hold(&self.inner.state).files.insert(id.clone(), kept);
            } else {
                let _ = std::fs::remove_file(self.path(id, "jsonl"));
            }
        }
        self.change(&batch.id, |batch| {
            batch.status = if cancelled {
                Status::Cancelled
            } else if expired && completed + failed < batch.total {
                Status::Expired
            } else {
                Status::Completed
            };
            batch.ended_at = Some(now());
            (batch.completed, batch.failed) = (completed, failed);
        });
        Ok(())
    }
}

/// Who may do everything.
pub(crate) const OPERATOR: &str = "operator";

fn broken(error: &io::Error) -> Fault {
    tracing::error!(%error, "a file of a batch cannot be kept or read");
    Fault::internal()
}

/// Looks at the lines of a file: how many, and what is wrong with them.
fn look(path: &Path, endpoint: Endpoint) -> io::Result<(u64, Vec<Mistake>)> {
    let (mut total, mut mistakes, mut ids) = (0, Vec::new(), BTreeSet::new());
    let mut input = BufReader::new(File::open(path)?);
    let mut number = 0;
    loop {
        let mut line = Vec::new();
        number += 1;
        if (&mut input).take(MAX_LINE + 1).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let mut wrong = |code: &str, message: String, param: Option<&str>| {
            let param = param.map(str::to_owned);
            mistakes.push(Mistake { code: code.into(), line: Some(number), message, param });
        };
        if line.len() as u64 > MAX_LINE {
            wrong("line_too_long", format!("A line has at most {MAX_LINE} bytes."), None);
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        total += 1;
        match serde_json::from_slice::<Line>(&line) {
            Err(error) => {
                wrong("invalid_json_line", format!("The line does not read: {error}."), None)
            }
            Ok(line) => {
                if line.method != "POST" {
                    wrong("invalid_method", "Only POST is taken.".into(), Some("method"));
                }
                if line.url != endpoint.path() {
                    let why = format!("The batch is for {}, not {}.", endpoint.path(), line.url);
                    wrong("mismatched_url", why, Some("url"));
                }
                if line.body.get("stream").is_some_and(|stream| stream != &Value::Bool(false)) {
                    wrong("invalid_request", "A batch has no streams.".into(), Some("body.stream"));
                }
                if line.custom_id.is_empty() || line.custom_id.len() > 512 {
                    wrong("invalid_custom_id", "It has 1 to 512 bytes.".into(), Some("custom_id"));
                } else if !ids.insert(line.custom_id) {
                    let why = "Another line has this custom_id.";
                    wrong("duplicate_custom_id", why.into(), Some("custom_id"));
                }
            }
        }
        if total as usize > MAX_LINES {
            wrong("too_many_tasks", format!("A batch has at most {MAX_LINES} requests."), None);
        }
        if mistakes.len() >= MAX_ERRORS || total as usize > MAX_LINES {
            break;
        }
    }
    if total == 0 && mistakes.is_empty() {
        let message = "The file has no requests.".to_owned();
        mistakes.push(Mistake { code: "empty_file".into(), line: None, message, param: None });
    }
    Ok((total, mistakes))
}

/// Asks one request, again while nobody can answer it now; none where the batch is over before that.
async fn one(
    (batch, settled): (&Batch, u64),
    ask: &Ask,
    body: serde_json::Map<String, Value>,
    over: &impl Fn() -> bool,
) -> Option<Result<Vec<u8>, Fault>> {
    let body = serde_json::to_vec(&Value::Object(body)).unwrap_or_default();
    let mut pause = Duration::from_secs(1);
    let mut tries = 0;
    loop {
        if over() {
            return None;
        }
        let hurry = now() >= batch.created_at + (batch.expires_at - batch.created_at) / 2;
        let (owner, endpoint) = (batch.owner.clone(), batch.endpoint);
        let answered = ask(Asking { owner, endpoint, body: body.clone(), hurry }).await;
        let early = now() < settled;
        let may_change = |fault: &Fault| match fault.status {
            404 => early,
            status => matches!(status, 408 | 429 | 502 | 503),
        };
        // A limit is waited for as long as the batch has time: what fills it ends or passes.
        let waits = |fault: &Fault| fault.status == 429 || early;
        tries += u32::from(answered.as_ref().is_err_and(|fault| !waits(fault)));
        match answered {
            Err(fault) if may_change(&fault) && tries < TRIES => {
                let wait = fault.retry_after.unwrap_or(pause).clamp(LOOK, PAUSE);
                let again = Instant::now() + wait;
                while Instant::now() < again {
                    if over() {
                        return None;
                    }
                    tokio::time::sleep(LOOK.min(again - Instant::now())).await;
                }
                pause = (pause * 2).min(PAUSE);
            }
            answered => return Some(answered),
        }
    }
}

/// The two files that results are appended to.
struct Results {
    output: File,
    error: File,
    /// What has a result already.
    known: BTreeSet<String>,
    completed: u64,
    failed: u64,
}

impl Results {
    fn open(output: &Path, error: &Path) -> io::Result<Self> {
        let mut known = BTreeSet::new();
        let (output, completed) = go_on(output, &mut known)?;
        let (error, failed) = go_on(error, &mut known)?;
        Ok(Self { output, error, known, completed, failed })
    }

    fn put(&mut self, custom_id: &str, answer: &Result<Vec<u8>, Fault>) -> io::Result<()> {
        let (status, body) = match answer {
            Ok(body) => (200, serde_json::from_slice::<Value>(body).unwrap_or_default()),
            Err(fault) => (fault.status, serde_json::from_slice(&fault.body()).unwrap_or_default()),
        };
        let line = json!({
            "id": new_id("batch_req_"),
            "custom_id": custom_id,
            "response": { "status_code": status, "request_id": new_id("req_"), "body": body },
            "error": null,
        });
        let file = if answer.is_ok() { &mut self.output } else { &mut self.error };
        // One write: a torn line is known by its missing end.
        file.write_all(format!("{line}\n").as_bytes())
    }

    fn sync(&self) -> io::Result<()> {
        self.output.sync_all()?;
        self.error.sync_all()
    }
}

/// Opens a file of results to go on with it, without a torn last line; what is in it is known.
fn go_on(path: &Path, known: &mut BTreeSet<String>) -> io::Result<(File, u64)> {
    let mut options = OpenOptions::new();
    let mut file =
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let (mut whole, mut count) = (0, 0);
    let mut reader = BufReader::new(&file);
    loop {
        let mut line = String::new();
        let read = reader.read_line(&mut line)?;
        if read == 0 || !line.ends_with('\n') {
            break;
        }
        whole += read as u64;
        count += 1;
        if let Ok(Value::Object(line)) = serde_json::from_str(&line)
            && let Some(Value::String(id)) = line.get("custom_id")
        {
            known.insert(id.clone());
        }
    }
    file.set_len(whole)?;
    file.seek(SeekFrom::End(0))?;
    Ok((file, count))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn lines(n: usize) -> String {
        let line = |n| {
            format!(
                "{{\"custom_id\":\"r{n}\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\
                 \"body\":{{\"n\":{n}}}}}\n"
            )
        };
        (0..n).map(line).collect()
    }

    fn put(batches: &Batches, text: &str) -> Kept {
        let (id, mut file) = batches.arriving().expect("room");
        file.write_all(text.as_bytes()).expect("written");
        let kept = Kept {
            id: String::new(),
            owner: "ada".into(),
            bytes: text.len() as u64,
            created_at: 0,
            filename: "in.jsonl".into(),
            purpose: "batch".into(),
        };
        batches.keep(id, kept, &file).expect("kept")
    }

    fn make(batches: &Batches, file: &Kept) -> Batch {
        batches.make("ada".into(), Endpoint::Chat, &file.id, None).expect("made")
    }

    /// Every third request comes to nothing; counts those that were asked.
    fn asks(asked: Arc<AtomicUsize>) -> Ask {
        Arc::new(move |Asking { body, .. }| {
            asked.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                let body: Value = serde_json::from_slice(&body).expect("JSON");
                if body["n"].as_u64().is_some_and(|n| n % 3 == 2) {
                    return Err(Fault::invalid(None, "it is a third one"));
                }
                Ok(json!({ "echo": body["n"] }).to_string().into_bytes())
            })
        })
    }

    async fn until_over(batches: &Batches, id: &str) -> Batch {
        loop {
            let batch = batches.get(None, id).expect("it is there");
            if batch.ended_at.is_some() {
                return batch;
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn every_line_has_a_result_and_a_restart_asks_none_twice() {
        let room = tempfile::tempdir().expect("room");
        let batches = Batches::open(room.path().join("b")).expect("opens");
        let file = put(&batches, &lines(9));
        let batch = make(&batches, &file);
        assert_eq!((batch.status, batch.total), (Status::InProgress, 9));
        // An earlier run got as far as two results and a torn one.
        let done = "{\"custom_id\":\"r0\"}\n{\"custom_id\":\"r1\"}\n{\"custom_id\":\"r3";
        std::fs::write(batches.path(&batch.output, "jsonl"), done).expect("written");
        drop(batches);
        let batches = Batches::open(room.path().join("b")).expect("opens");
        let (asked, shutdown) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let running = tokio::spawn(batches.clone().run(asks(Arc::clone(&asked)), shutdown.clone()));
        let batch = until_over(&batches, &batch.id).await;
        shutdown.cancel();
        running.await.expect("it ends");
        assert_eq!((batch.status, batch.completed, batch.failed), (Status::Completed, 6, 3));
        assert_eq!(asked.load(Ordering::Relaxed), 7);
        let output = batches.file(Some("ada"), &batch.output).expect("there is one");
        let text = std::fs::read_to_string(batches.content(&output)).expect("reads");
        assert_eq!((text.lines().count(), text.len() as u64), (6, output.bytes));
        let all = text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok());
        assert!(all && text.contains("\"r3\"") && !text.contains("\"r2\""));
        assert!(batches.file(Some("ada"), &batch.error).is_some());
        assert!(batches.file(Some("eve"), &batch.output).is_none(), "not hers");
    }

    #[tokio::test]
    async fn a_cancelled_batch_asks_nothing_more() {
        let room = tempfile::tempdir().expect("room");
        let batches = Batches::open(room.path().join("b")).expect("opens");
        let file = put(&batches, &lines(50));
        let batch = make(&batches, &file);
        assert!(batches.remove(Some("ada"), &file.id).is_err(), "it is needed");
        let cancelled = batches.cancel(Some("ada"), &batch.id).expect("it is open");
        assert_eq!(cancelled.status, Status::Cancelling);
        let (asked, shutdown) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        tokio::spawn(batches.clone().run(asks(Arc::clone(&asked)), shutdown.clone()));
        let batch = until_over(&batches, &batch.id).await;
        assert_eq!((batch.status, asked.load(Ordering::Relaxed)), (Status::Cancelled, 0));
        assert!(batches.cancel(Some("ada"), &batch.id).is_err() && batches.files(None).len() == 1);
        assert!(batches.remove(Some("ada"), &file.id).expect("removed"));
        shutdown.cancel();
    }

    #[tokio::test]
    async fn one_that_waits_holds_up_nobody_and_can_be_cancelled() {
        let room = tempfile::tempdir().expect("room");
        let batches = Batches::open(room.path().join("b")).expect("opens");
        let (slow, quick) = (put(&batches, &lines(8)), put(&batches, &lines(3)));
        let slow = make(&batches, &slow);
        let quick = batches.make("bob".into(), Endpoint::Chat, &quick.id, None);
        assert!(quick.is_err(), "it is not his");
        let mut kept = put(&batches, &lines(3));
        kept.owner = "bob".into();
        hold(&batches.inner.state).files.insert(kept.id.clone(), kept.clone());
        let quick = batches.make("bob".into(), Endpoint::Chat, &kept.id, None).expect("made");
        // Nobody has time for ada's.
        let ask: Ask = Arc::new(|Asking { owner, hurry, .. }| {
            assert!(!hurry, "there is nearly a day left");
            Box::pin(async move {
                match owner.as_str() {
                    "ada" => Err(Fault::no_slack(Duration::from_secs(3_600))),
                    _ => Ok(b"{}".to_vec()),
                }
            })
        });
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(batches.clone().run(ask, shutdown.clone()));
        assert_eq!(until_over(&batches, &quick.id).await.status, Status::Completed);
        batches.cancel(Some("ada"), &slow.id).expect("it is open");
        let slow = until_over(&batches, &slow.id).await;
        assert_eq!((slow.status, slow.completed, slow.failed), (Status::Cancelled, 0, 0));
        shutdown.cancel();
        running.await.expect("it ends");
    }

    #[test]
    fn mistakes_are_told_by_line() {
        let room = tempfile::tempdir().expect("room");
        let batches = Batches::open(room.path().join("b")).expect("opens");
        let stream = lines(1).replace("\"n\":0", "\"stream\":true").replace("r0", "r7");
        for (text, code, line) in [
            (String::new(), "empty_file", None),
            (format!("{}nonsense\n", lines(1)), "invalid_json_line", Some(2)),
            (lines(1).replace("POST", "GET"), "invalid_method", Some(1)),
            (lines(1).replace("chat/", ""), "mismatched_url", Some(1)),
            (format!("{}{}", lines(1), lines(1)), "duplicate_custom_id", Some(2)),
            (stream, "invalid_request", Some(1)),
        ] {
            let file = put(&batches, &text);
            let batch = make(&batches, &file);
            assert_eq!(batch.status, Status::Failed, "{code}");
            let first = batch.mistakes.first().expect("there is one");
            assert_eq!((first.code.as_str(), first.line), (code, line), "{first:?}");
        }
        let none = batches.make("ada".into(), Endpoint::Chat, "file-../../etc", None);
        assert_eq!(none.expect_err("no such file").status, 400);
    }
}
