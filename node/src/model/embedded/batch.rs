//! Runs the requests to one model together, on a thread of its own.
//!
//! ```text
//!  submit ──> waiting ──admit──> reading the prompt ──> writing ──> finished
//!               │  (memory for all       │ (a chunk        │ (a token      │
//!               │   it may need)         │  a pass)        │  a pass)      └─> its memory is kept
//!             refused                    └───> ended: nobody listens, or it broke
//! ```
//!
//! Each pass through the model takes one token of every sequence that writes and a chunk of one
//! prompt that is read, in turns: so a long prompt holds up nobody, and the weights are read from
//! memory once for all. What comes out for one request does not depend on the others.
//!
//! Everything is bounded: the queue, the sequences, the memory they may ever need (it is set aside
//! before one begins, so none is stopped midway for want of it) and what waits to be read. Who does
//! not read what is written for him pauses only himself, and for a minute at most.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::Model;
use super::kv::{BLOCK, Cache, Counter};
use super::llama::Part;
use super::sampling::{Logprob, Sampler, Sampling};
use super::text::Text;

/// How much an engine takes on.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests that wait; more are refused.
    pub queue: usize,
    /// Sequences that run at the same time.
    pub active: usize,
    /// Bytes for what running sequences remember.
    pub memory: usize,
    /// Bytes for what finished ones remembered, for prompts that begin as theirs did.
    pub kept: usize,
    /// How long one may leave what is written for him unread.
    pub patience: Duration,
}

impl Default for Limits {
    /// For a small model on a small host.
    fn default() -> Self {
        Self {
            queue: 64,
            active: 8,
            memory: 1 << 30,
            kept: 256 << 20,
            patience: Duration::from_secs(60),
        }
    }
}

/// What is asked of a model.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The prompt, as tokens of the model.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The most tokens to write; none for as many as the context has room for.
    pub max_tokens: Option<usize>,
    /// Texts that end it, at most [`Request::MAX_STOPS`] of [`Request::MAX_STOP_BYTES`] each. They
    /// are not part of what is written.
    pub stop: Vec<String>,
}

impl Request {
    /// The most stop strings.
    pub const MAX_STOPS: usize = 4;
    /// The longest stop string, in bytes.
    pub const MAX_STOP_BYTES: usize = 256;
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many wait already; later it may be taken.
    #[error("{0} requests wait already")]
    Busy(usize),
    /// It cannot be taken, whenever it comes.
    #[error("the prompt has {prompt} tokens, and the model's context is {context}")]
    TooLong {
        /// The tokens of the prompt.
        prompt: usize,
        /// Those of the context, of which one at least must be left to write.
        context: usize,
    },
    /// The prompt and what may be written need more memory than all sequences may have.
    #[error("{needed} bytes would be remembered, and this node allows {allowed}")]
    TooLarge {
        /// What it would need, in bytes.
        needed: usize,
        /// What there is.
        allowed: usize,
    },
    /// Something in it is out of range.
    #[error("{0}")]
    Invalid(String),
    /// The engine is shutting down.
    #[error("the model is being unloaded")]
    Closed,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The model said that it is done, or a stop string came.
    Stop,
    /// As many tokens as were asked for, or as the context has room for.
    Length,
}

/// Why a sequence broke off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The engine is shutting down.
    #[error("the model is being unloaded")]
    Closed,
    /// What was written was not read for too long.
    #[error("what was written was not read in time")]
    Unread,
    /// The model gave no usable result.
    #[error("{0}")]
    Broken(String),
}

/// What a generation gives, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A token was written.
    Token {
        /// Its number in the vocabulary.
        id: u32,
        /// The text that may leave now: empty while a character or a possible stop string is not
        /// complete, and then more than this token's.
        text: String,
        /// How likely it was, if that was asked.
        logprob: Option<Logprob>,
    },
    /// It is done; nothing comes after this.
    Finished {
        /// Why.
        reason: Reason,
        /// The rest of the text, that had been held back.
        text: String,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Those of them that another sequence had read before.
        cached_tokens: usize,
        /// Tokens that were written, the one that ended it included.
        completion_tokens: usize,
    },
    /// It broke off; nothing comes after this.
    Failed(Failure),
}

/// What is being written for one request. Dropping it stops that.
#[derive(Debug)]
pub struct Generation {
    steps: mpsc::Receiver<Step>,
}

impl Generation {
    /// The next step; none after the last.
    pub async fn next(&mut self) -> Option<Step> {
        self.steps.recv().await
    }

    /// The same for threads that may block.
    pub fn wait(&mut self) -> Option<Step> {
        self.steps.blocking_recv()
    }
}

/// How busy an engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests that wait.
    pub queued: usize,
    /// Sequences that run.
    pub active: usize,
    /// Tokens that all sequences together write in a second, of late.
    pub decode: f64,
    /// Tokens of prompts that are read in a second, of late.
    pub prefill: f64,
    /// Seconds from a request to its first token, of late.
    pub first_token: f64,
    /// Bytes that sequences remember, running and kept ones.
    pub memory: usize,
    /// Tokens that were asked since the start.
    pub asked: u64,
    /// Of them, those that were known from an earlier request.
    pub cached: u64,
}

/// Steps that wait to be read, of one sequence.
const UNREAD: usize = 64;
/// Tokens of a prompt in one pass, while others write: some tenths of a second for them to wait.
const CHUNK_AMONG_OTHERS: usize = 32;
/// The same while nobody else waits for a token.
const CHUNK_ALONE: usize = 128;
/// How often to look whether somebody has read, when all wait for that.
const LOOK: Duration = Duration::from_millis(5);
/// The part that the newest measurement has in a figure "of late".
const NEWEST: f64 = 0.2;

#[derive(Debug)]
struct Pending {
    request: Request,
    max_tokens: usize,
    steps: mpsc::Sender<Step>,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Pending>,
    closing: bool,
    load: Load,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is sound after every statement, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A model at work. Dropping it breaks off what it was writing, and waits for the pass that runs:
/// some tenths of a second.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    limits: Limits,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn start(model: Arc<Model>, limits: Limits) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let runner = Runner {
            model: model.clone(),
            limits: limits.clone(),
            shared: shared.clone(),
            active: Vec::new(),
            kept: VecDeque::new(),
            counter: Counter::default(),
            turn: 0,
        };
        let thread =
            std::thread::Builder::new().name("model".into()).spawn(move || runner.run())?;
        Ok(Self { model, limits, shared, thread: Some(thread) })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// How busy it is.
    #[must_use]
    pub fn load(&self) -> Load {
        let state = self.shared.lock();
        Load { queued: state.waiting.len(), ..state.load }
    }

    /// Hands a request in.
    ///
    /// # Errors
    /// When it cannot be taken now, or ever: see [`Refused`].
    pub fn submit(&self, request: Request) -> Result<Generation, Refused> {
        let max_tokens = self.check(&request)?;
        let mut state = self.shared.lock();
        if state.closing {
            return Err(Refused::Closed);
        }
        // Who gave up meanwhile does not stand in anybody's way.
        state.waiting.retain(|pending| !pending.steps.is_closed());
        if state.waiting.len() >= self.limits.queue {
            return Err(Refused::Busy(state.waiting.len()));
        }
        let (sender, steps) = mpsc::channel(UNREAD);
        let since = Instant::now();
        state.waiting.push_back(Pending { request, max_tokens, steps: sender, since });
        drop(state);
        self.shared.changed.notify_all();
        Ok(Generation { steps })
    }

    /// The most tokens that will be written, if the request is sound.
    fn check(&self, request: &Request) -> Result<usize, Refused> {
        let vocabulary = self.model.tokenizer.vocabulary();
        let context = self.model.info.context;
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(Refused::Invalid("the prompt is empty".into()));
        }
        if prompt >= context {
            return Err(Refused::TooLong { prompt, context });
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= vocabulary) {
            return Err(Refused::Invalid(format!("there is no token {id}")));
        }
        if let Some(fault) = request.sampling.fault(vocabulary) {
            return Err(Refused::Invalid(fault));
        }
        if request.stop.len() > Request::MAX_STOPS {
            return Err(Refused::Invalid(format!("at most {} stops", Request::MAX_STOPS)));
        }
        let length = 1..=Request::MAX_STOP_BYTES;
        if request.stop.iter().any(|stop| !length.contains(&stop.len())) {
            let most = Request::MAX_STOP_BYTES;
            return Err(Refused::Invalid(format!("a stop has 1 to {most} bytes")));
        }
        let room = context - prompt;
        let max_tokens = request.max_tokens.unwrap_or(room).min(room);
        if max_tokens == 0 {
            return Err(Refused::Invalid("max_tokens must be at least 1".into()));
        }
        let block = self.model.weights.memory().block_bytes();
        let needed = (prompt + max_tokens).div_ceil(BLOCK) * block;
        if needed > self.limits.memory {
            return Err(Refused::TooLarge { needed, allowed: self.limits.memory });
        }
        Ok(max_tokens)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of it was logged where it happened.
            let _ = thread.join();
        }
    }
}

/// A sequence that runs.
#[derive(Debug)]
struct Sequence {
    steps: mpsc::Sender<Step>,
    since: Instant,
    /// The prompt, and what was written after it.
    tokens: Vec<u32>,
    prompt: usize,
    cached: usize,
    max_tokens: usize,
    cache: Cache,
    sampler: Sampler,
    text: Text,
    /// Blocks that it may come to need.
    reserved: usize,
    /// Since when nothing is read.
    unread: Option<Instant>,
}

impl Sequence {
    fn reads(&self) -> bool {
        self.cache.len() + 1 < self.tokens.len()
            || self.cache.len() < self.prompt && self.tokens.len() == self.prompt
    }

    /// Whether the next token and the end would both find room.
    fn is_read(&self) -> bool {
        self.steps.capacity() >= 2
    }

    fn fail(&self, failure: Failure) {
        // Full or closed: then nobody would read it.
        let _ = self.steps.try_send(Step::Failed(failure));
    }
}

/// What a finished sequence remembered.
#[derive(Debug)]
struct Kept {
    tokens: Vec<u32>,
    cache: Cache,
}

/// The thread's own.
struct Runner {
    model: Arc<Model>,
    limits: Limits,
    shared: Arc<Shared>,
    active: Vec<Sequence>,
    /// The most lately used last.
    kept: VecDeque<Kept>,
    counter: Counter,
    /// Which prompt is read next.
    turn: usize,
}

impl Runner {
    fn run(mut self) {
        while self.admit() {
            self.dismiss();
            let pass = self.plan();
            if pass.is_empty() {
                let mut state = self.shared.lock();
                self.tell(&mut state);
                if self.active.is_empty() && state.waiting.is_empty() && !state.closing {
                    drop(self.shared.changed.wait(state));
                } else if !self.active.is_empty() && !state.closing {
                    drop(self.shared.changed.wait_timeout(state, LOOK));
                }
                continue;
            }
            let done = catch_unwind(AssertUnwindSafe(|| self.pass(&pass)));
            let broken = match done {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the computation panicked".to_owned(),
            };
            // Nothing tells whose fault it was, and what they remember may be half written.
            tracing::error!(
                model = self.model.info.name,
                broken,
                "a pass through the model failed"
            );
            for sequence in self.active.drain(..) {
                sequence.fail(Failure::Broken(broken.clone()));
            }
            self.kept.clear();
        }
    }

    /// Takes in what waits and fits. Whether to go on.
    fn admit(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        if state.closing {
            for pending in state.waiting.drain(..) {
                let _ = pending.steps.try_send(Step::Failed(Failure::Closed));
            }
            for sequence in self.active.drain(..) {
                sequence.fail(Failure::Closed);
            }
            return false;
        }
        state.waiting.retain(|pending| !pending.steps.is_closed());
        let shape = self.model.weights.memory();
        let allowed = self.limits.memory / shape.block_bytes();
        while self.active.len() < self.limits.active.max(1) {
            let Some(first) = state.waiting.front() else { break };
            let needed = (first.request.prompt.len() + first.max_tokens).div_ceil(BLOCK);
            let reserved: usize = self.active.iter().map(|sequence| sequence.reserved).sum();
            // In order: a large one would else wait for ever behind small ones.
            if reserved + needed > allowed {
                break;
            }
            let Some(pending) = state.waiting.pop_front() else { break };
            let prompt = pending.request.prompt;
            let cache = self.remembered(&prompt);
            state.load.asked += prompt.len() as u64;
            state.load.cached += cache.len() as u64;
            self.active.push(Sequence {
                steps: pending.steps,
                since: pending.since,
                prompt: prompt.len(),
                cached: cache.len(),
                tokens: prompt,
                max_tokens: pending.max_tokens,
                cache,
                sampler: Sampler::new(pending.request.sampling),
                text: Text::new(pending.request.stop),
                reserved: needed,
                unread: None,
            });
        }
        self.tell(&mut state);
        true
    }

    /// Brings what others may see up to date.
    fn tell(&self, state: &mut State) {
        state.load.active = self.active.len();
        state.load.memory = self.counter.blocks() * self.model.weights.memory().block_bytes();
    }

    /// What is known of the beginning of a prompt. Its last token is always read again, for what
    /// comes after it.
    fn remembered(&mut self, prompt: &[u32]) -> Cache {
        let common = |kept: &Kept| {
            let most = kept.cache.len().min(prompt.len() - 1);
            kept.tokens[..most].iter().zip(prompt).take_while(|(a, b)| a == b).count()
        };
        let best = self.kept.iter().map(common).enumerate().max_by_key(|(_, common)| *common);
        match best {
            Some((index, common)) if common > 0 => {
                let cache = self.kept[index].cache.prefix(common);
                if let Some(used) = self.kept.remove(index) {
                    self.kept.push_back(used);
                }
                cache
            }
            _ => Cache::new(self.model.weights.memory(), &self.counter),
        }
    }

    /// Ends those for which nobody listens.
    fn dismiss(&mut self) {
        let (now, patience) = (Instant::now(), self.limits.patience);
        self.active.retain_mut(|sequence| {
            if sequence.steps.is_closed() {
                return false;
            }
            if sequence.is_read() {
                sequence.unread = None;
                return true;
            }
            let since = *sequence.unread.get_or_insert(now);
            if now.duration_since(since) < patience {
                return true;
            }
            sequence.fail(Failure::Unread);
            false
        });
    }

    /// Who is in the next pass, with how many tokens.
    fn plan(&mut self) -> Vec<(usize, usize)> {
        let indices = 0..self.active.len();
        let mut pass: Vec<(usize, usize)> = indices
            .clone()
            .filter(|index| !self.active[*index].reads() && self.active[*index].is_read())
            .map(|index| (index, 1))
            .collect();
        let readers: Vec<usize> = indices.filter(|index| self.active[*index].reads()).collect();
        let chunk = if pass.is_empty() { CHUNK_ALONE } else { CHUNK_AMONG_OTHERS };
        // In turns, and whatever one leaves of the chunk is for the next.
        let mut left = chunk;
        for n in 0..readers.len() {
            let index = readers[(self.turn + n) % readers.len()];
            let sequence = &self.active[index];
            let count = (sequence.tokens.len() - sequence.cache.len()).min(left);
            if count == 0 {
                break;
            }
            pass.push((index, count));
            left -= count;
        }
        self.turn = self.turn.wrapping_add(1);
        pass.sort_unstable();
        pass
    }

    fn pass(&mut self, pass: &[(usize, usize)]) -> Result<(), super::linear::ComputeError> {
        let start = Instant::now();
        let mut parts = Vec::with_capacity(pass.len());
        let mut counts = pass.iter().peekable();
        for (index, sequence) in self.active.iter_mut().enumerate() {
            let Some((_, count)) = counts.next_if(|(of, _)| *of == index) else { continue };
            let from = sequence.cache.len();
            let logits = from + count == sequence.tokens.len();
            let tokens = &sequence.tokens[from..from + count];
            parts.push(Part { tokens, cache: &mut sequence.cache, logits });
        }
        let results = self.model.weights.forward(&mut parts)?;
        let took = start.elapsed();
        let mut done = Vec::new();
        let (mut read, mut written) = (0, 0);
        for ((index, count), logits) in pass.iter().zip(results) {
            let sequence = &mut self.active[*index];
            if sequence.tokens.len() == sequence.prompt {
                read += count;
            } else {
                written += 1;
            }
            let Some(mut logits) = logits else { continue };
            if sequence.tokens.len() == sequence.prompt {
                let waited = sequence.since.elapsed().as_secs_f64();
                blend(&mut self.shared.lock().load.first_token, waited);
            }
            let next = advance(sequence, &self.model, &mut logits);
            if next != Next::Goes {
                done.push((*index, next));
            }
        }
        self.measure(read, written, took);
        for (index, next) in done.into_iter().rev() {
            let sequence = self.active.swap_remove(index);
            if next == Next::Ended {
                self.keep(sequence);
            }
        }
        Ok(())
    }

    /// A pass that reads is no measure of writing, nor the other way round.
    fn measure(&self, read: usize, written: usize, took: Duration) {
        let mut state = self.shared.lock();
        let seconds = took.as_secs_f64().max(1e-9);
        if read == 0 && written > 0 {
            blend(&mut state.load.decode, written as f64 / seconds);
        }
        // A short prompt says little of how fast long ones are read.
        if written == 0 && read >= CHUNK_AMONG_OTHERS {
            blend(&mut state.load.prefill, read as f64 / seconds);
        }
    }

    /// Keeps what a finished sequence remembered, and forgets what was used longest ago.
    fn keep(&mut self, sequence: Sequence) {
        let Sequence { mut tokens, cache, .. } = sequence;
        tokens.truncate(cache.len());
        // What this one continues is in it.
        self.kept.retain(|kept| !tokens.starts_with(&kept.tokens));
        self.kept.push_back(Kept { tokens, cache });
        let block = self.model.weights.memory().block_bytes();
        let bytes = |kept: &VecDeque<Kept>| {
            kept.iter().map(|kept| kept.cache.blocks()).sum::<usize>() * block
        };
        while bytes(&self.kept) > self.limits.kept {
            self.kept.pop_front();
        }
    }
}

/// What becomes of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Goes,
    Ended,
    Broke,
}

/// Chooses the next token of a sequence and passes it on.
fn advance(sequence: &mut Sequence, model: &Model, logits: &mut [f32]) -> Next {
    let Some((id, logprob)) = sequence.sampler.choose(logits) else {
        sequence.fail(Failure::Broken("the model's results are no numbers".into()));
        return Next::Broke;
    };
    sequence.tokens.push(id);
    let written = sequence.tokens.len() - sequence.prompt;
    let stops = model.tokenizer.stops().contains(&id);
    let (text, stopped) =
        if stops { (String::new(), true) } else { sequence.text.push(&model.tokenizer, id) };
    // There is room for two steps, see `is_read`; if nobody listens any more, `dismiss` sees it.
    let _ = sequence.steps.try_send(Step::Token { id, text, logprob });
    let reason = match (stopped, written >= sequence.max_tokens) {
        (true, _) => Reason::Stop,
        (false, true) => Reason::Length,
        (false, false) => return Next::Goes,
    };
    let _ = sequence.steps.try_send(Step::Finished {
        reason,
        text: sequence.text.finish(),
        prompt_tokens: sequence.prompt,
        cached_tokens: sequence.cached,
        completion_tokens: written,
    });
    Next::Ended
}

/// Moves a figure towards its newest measurement; the first one sets it.
fn blend(figure: &mut f64, newest: f64) {
    *figure = if *figure == 0.0 { newest } else { *figure + NEWEST * (newest - *figure) };
}
