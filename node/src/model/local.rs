//! The embedded engine behind the interface of all engines: OpenAI's requests in, its shapes out.
//!
//! ```text
//! cold --first request, or told to serve--> loading --> warm --request--> prompt --> tokens --> chunks
//! ```
//!
//! A model is loaded once, and stays. Prompts are rendered and encoded on threads that may block;
//! tokens come from the engine's own thread.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use leasehold_proto::Hash;
use tokio::sync::{Mutex, mpsc};
use tokio::task::spawn_blocking;

use super::embedded::{
    EmbedError, Embedder, EncodeError, Engine as Batch, Generation, Limits, Logprob,
    Message as Said, Model, Reason, Refused, Request as Wanted, Sampling, Step, TemplateError,
};
use super::engine::{Ask, Engine, Load, Nature, Piece, Pieces, State, WAITING, share};
use super::hold;
use crate::openai::answer::{self, ChatChoice, Chosen, Chunk, Finish, Head, Likely, TextChoice};
use crate::openai::message::{Part, Role};
use crate::openai::request::{Input, Prompt};
use crate::openai::{Counted, Endpoint, Fault, Need, Needs, Request};

/// What the embedded engine can do beyond plain text.
pub(crate) const ABILITIES: Needs = Needs::PLAIN
    .with(Need::Logprobs)
    .with(Need::LogitBias)
    .with(Need::PresencePenalty)
    .with(Need::FrequencyPenalty)
    .with(Need::TokenPrompt);
/// Batches of texts to embed that wait; more are refused.
const EMBED_QUEUE: usize = 64;
/// When one that is refused as busy may come again.
const AGAIN: Duration = Duration::from_secs(2);

type Sender = mpsc::Sender<Result<Piece, Fault>>;

/// A model whose weights are here.
#[derive(Debug)]
pub(crate) struct Local {
    name: String,
    /// Answers with the same seed are the same only while this is.
    fingerprint: String,
    what: What,
    threads: usize,
    loading: AtomicBool,
    /// Held while it is loaded.
    turn: Mutex<()>,
    ready: OnceLock<Ready>,
    /// Why it could not be loaded when that was tried last.
    trouble: std::sync::Mutex<Option<String>>,
}

#[derive(Debug)]
enum What {
    Chat(Option<PathBuf>),
    /// Files by what they are called.
    Encoder(Vec<(String, PathBuf)>),
}

#[derive(Clone, Debug)]
enum Ready {
    Chat(Arc<Batch>),
    Encoder(Arc<Embedder>),
}

/// A model that cannot answer, and why.
#[derive(Debug)]
pub(crate) struct Gone(pub(crate) String);

impl Engine for Gone {
    fn ask(&self, _: Ask) -> BoxFuture<'_, Result<Pieces, Fault>> {
        let fault = Fault::unavailable(format!("The model cannot be used: {}.", self.0));
        futures::future::ready(Err(fault)).boxed()
    }

    fn load(&self) -> Load {
        Load::default()
    }

    fn nature(&self) -> Nature {
        Nature { trouble: Some(self.0.clone()), ..Nature::default() }
    }
}

impl Local {
    fn new(name: String, digest: Hash, what: What, threads: usize) -> Self {
        let short: String = digest.to_string().chars().take(12).collect();
        Self {
            name,
            fingerprint: format!("lh_{short}"),
            what,
            threads,
            loading: AtomicBool::new(false),
            turn: Mutex::default(),
            ready: OnceLock::new(),
            trouble: std::sync::Mutex::default(),
        }
    }

    pub(super) fn chat(
        name: String,
        digest: Hash,
        weights: Option<PathBuf>,
        threads: usize,
    ) -> Self {
        Self::new(name, digest, What::Chat(weights), threads)
    }

    pub(super) fn encoder(
        name: String,
        digest: Hash,
        files: Vec<(String, PathBuf)>,
        threads: usize,
    ) -> Self {
        Self::new(name, digest, What::Encoder(files), threads)
    }

    /// Loads it, unless it is there.
    async fn ready(&self) -> Result<Ready, Fault> {
        if let Some(ready) = self.ready.get() {
            return Ok(ready.clone());
        }
        let _turn = self.turn.lock().await;
        if let Some(ready) = self.ready.get() {
            return Ok(ready.clone());
        }
        self.loading.store(true, Ordering::Relaxed);
        let threads = self.threads;
        let began = std::time::Instant::now();
        let loaded = match &self.what {
            What::Chat(None) => Err("its weights are not here any more".to_owned()),
            What::Chat(Some(path)) => {
                let path = path.clone();
                let load = move || load_chat(&path, threads);
                spawn_blocking(load).await.unwrap_or_else(|error| Err(error.to_string()))
            }
            What::Encoder(files) => {
                let files = files.clone();
                let load = move || load_encoder(&files, threads);
                spawn_blocking(load).await.unwrap_or_else(|error| Err(error.to_string()))
            }
        };
        self.loading.store(false, Ordering::Relaxed);
        match loaded {
            Ok(ready) => {
                let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::info!(model = self.name, took_ms, "a model is loaded");
                *hold(&self.trouble) = None;
                Ok(self.ready.get_or_init(|| ready).clone())
            }
            Err(why) => {
                tracing::warn!(model = self.name, why, "a model cannot be loaded");
                *hold(&self.trouble) = Some(why.clone());
                Err(Fault::unavailable(format!("The model cannot be loaded: {why}.")))
            }
        }
    }

    async fn answer(&self, ask: Ask) -> Result<Pieces, Fault> {
        let request = Request::parse(ask.endpoint, &ask.body)?;
        let ready = self.ready().await?;
        let (sender, pieces) = mpsc::channel(WAITING);
        match (ready, ask.endpoint) {
            (Ready::Chat(batch), Endpoint::Chat | Endpoint::Completions) => {
                request.check(ABILITIES, &self.name)?;
                let (generation, batch, prompt) = submit(batch, &request).await?;
                let writer = Writer {
                    name: self.name.clone(),
                    fingerprint: self.fingerprint.clone(),
                    id: id(ask.endpoint),
                    created: now(),
                    request,
                    batch,
                    prompt,
                };
                tokio::spawn(writer.run(generation, sender));
            }
            (Ready::Encoder(embedder), Endpoint::Embeddings) => {
                request.check(Needs::PLAIN, &self.name)?;
                let Input::Prompts(prompts) = &request.input else {
                    return Err(Fault::missing("input"));
                };
                let texts = prompts.iter().map(|prompt| match prompt {
                    Prompt::Text(text) => Ok(text.clone()),
                    Prompt::Tokens(_) => Err(Fault::unsupported("input", &self.name)),
                });
                let texts = texts.collect::<Result<Vec<_>, _>>()?;
                let embedded = embedder.submit(texts).map_err(refused_texts)?;
                let embedded = embedded.get().await.map_err(refused_texts)?;
                let prompt = embedded.tokens as u64;
                let text =
                    answer::embeddings(&self.name, &embedded.vectors, request.encoding, prompt);
                let counted = Counted { prompt, cached: 0, completion: 0 };
                // There is room for both.
                let _ = sender.try_send(Ok(Piece::Data(text)));
                let _ = sender.try_send(Ok(Piece::Done(counted)));
            }
            _ => {
                let why = format!("The model '{}' does not answer this.", self.name);
                return Err(Fault::invalid(Some("unsupported_endpoint"), why).at("model"));
            }
        }
        Ok(pieces)
    }
}

impl Engine for Local {
    fn ask(&self, ask: Ask) -> BoxFuture<'_, Result<Pieces, Fault>> {
        self.answer(ask).boxed()
    }

    fn warm(&self) -> BoxFuture<'_, ()> {
        self.ready().map(|_| ()).boxed()
    }

    fn nature(&self) -> Nature {
        Nature { trouble: hold(&self.trouble).clone(), ..Nature::default() }
    }

    fn load(&self) -> Load {
        let state = match self.ready.get() {
            Some(_) => State::Warm,
            None if self.loading.load(Ordering::Relaxed) => State::Loading,
            None if matches!(&self.what, What::Chat(None)) => State::Down,
            None => State::Cold,
        };
        let Some(Ready::Chat(batch)) = self.ready.get() else {
            return Load { state, ..Load::default() };
        };
        let load = batch.load();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        // Rates are far below what a u32 holds, and not negative.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rate = |per_second: f64| per_second.max(0.0) as u32;
        Load {
            state,
            active: count(load.active),
            queued: count(load.queued),
            tokens_per_second: rate(load.decode / load.active.max(1) as f64),
            prefill_per_second: rate(load.prefill),
            cached_permille: share(load.cached, load.asked),
            first_token: Duration::try_from_secs_f64(load.first_token).unwrap_or_default(),
        }
    }
}

fn load_chat(path: &Path, threads: usize) -> Result<Ready, String> {
    let model = Model::load(path, threads).map_err(|error| error.to_string())?;
    let batch = Batch::start(Arc::new(model), Limits::default());
    Ok(Ready::Chat(Arc::new(batch.map_err(|error| error.to_string())?)))
}

/// The engine wants its files in a directory, by their names: payloads lie under their roots.
fn load_encoder(files: &[(String, PathBuf)], threads: usize) -> Result<Ready, String> {
    let dir = std::env::temp_dir();
    let dir = dir.join(format!("leasehold-encoder-{}-{}", std::process::id(), random()));
    let load = || -> Result<Embedder, String> {
        std::fs::create_dir(&dir).map_err(|error| error.to_string())?;
        for (name, path) in files.iter().filter(|(name, _)| !name.contains('/')) {
            std::os::unix::fs::symlink(path, dir.join(name)).map_err(|error| error.to_string())?;
        }
        Embedder::load(&dir, threads, EMBED_QUEUE).map_err(|error| error.to_string())
    };
    let loaded = load();
    let _ = std::fs::remove_dir_all(&dir);
    Ok(Ready::Encoder(Arc::new(loaded?)))
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // Where there is none, the time is what is left.
    if getrandom::fill(&mut bytes).is_err() {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        return now.map_or(0, |now| u64::from(now.subsec_nanos()));
    }
    u64::from_le_bytes(bytes)
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

fn id(endpoint: Endpoint) -> String {
    let word = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
    format!("{word}-{:016x}", random())
}

fn refused_texts(error: EmbedError) -> Fault {
    match error {
        EmbedError::Busy(_) => Fault::overloaded(AGAIN),
        EmbedError::Invalid(why) => Fault::invalid(None, why).at("input"),
        other => Fault::unavailable(format!("{other}.")),
    }
}

/// What is generated, by what, and how many tokens were asked.
type Submitted = (Generation, Arc<Batch>, u64);

/// Renders and encodes the prompt, and gives it to the engine.
async fn submit(batch: Arc<Batch>, request: &Request) -> Result<Submitted, Fault> {
    enum Asked {
        Chat(Vec<Said>),
        Text(String),
        Tokens(Vec<u32>),
    }
    let asked = match &request.input {
        Input::Messages(messages) => {
            let said = messages.iter().map(|message| {
                if message.parts.iter().any(|part| matches!(part, Part::Other(_))) {
                    return Err(Fault::unsupported("messages", &request.model));
                }
                // Most templates know the older name only.
                let role =
                    if message.role == Role::Developer { Role::System } else { message.role };
                Ok(Said { role: role.word().into(), content: message.text() })
            });
            Asked::Chat(said.collect::<Result<_, _>>()?)
        }
        Input::Prompts(prompts) => match prompts.first() {
            Some(Prompt::Text(text)) => Asked::Text(text.clone()),
            Some(Prompt::Tokens(tokens)) => Asked::Tokens(tokens.clone()),
            None => return Err(Fault::missing("prompt")),
        },
        Input::Opaque => return Err(Fault::missing("messages")),
    };
    let sampling = sampling_of(request);
    let max_tokens = request.sampling.max_tokens.map(|most| most as usize);
    let stop = request.sampling.stop.clone();
    let work = move || -> Result<Submitted, Fault> {
        let model = batch.model();
        let prompt = match asked {
            Asked::Chat(messages) => model.chat(&messages).map_err(refused_template)?,
            Asked::Text(text) => model.tokenizer().encode_prompt(&text).map_err(refused_text)?,
            Asked::Tokens(tokens) => tokens,
        };
        let length = prompt.len() as u64;
        let ask = Wanted { prompt, sampling, max_tokens, stop };
        let generation = batch.submit(ask).map_err(|refused| match refused {
            Refused::Busy(_) => Fault::overloaded(AGAIN),
            Refused::TooLong { context, .. } => {
                Fault::context_length(context as u64, length, max_tokens.unwrap_or(1) as u64)
            }
            Refused::Closed => Fault::unavailable("The model is being unloaded."),
            other => Fault::invalid(None, format!("{other}.")),
        })?;
        Ok((generation, batch, length))
    };
    spawn_blocking(work).await.map_err(|_| Fault::internal())?
}

fn refused_template(error: TemplateError) -> Fault {
    match error {
        TemplateError::Encode(error) => refused_text(error),
        other => Fault::invalid(None, format!("{other}.")).at("messages"),
    }
}

fn refused_text(error: EncodeError) -> Fault {
    Fault::invalid(None, format!("{error}."))
}

fn sampling_of(request: &Request) -> Sampling {
    let said = &request.sampling;
    // All are within a few units of zero: the request was read.
    #[allow(clippy::cast_possible_truncation)]
    let number = |value: Option<f64>, usual: f32| value.map_or(usual, |value| value as f32);
    #[allow(clippy::cast_possible_truncation)]
    let bias = |(token, bias): &(u32, f64)| (*token, *bias as f32);
    Sampling {
        temperature: number(said.temperature, 1.0),
        top_p: number(said.top_p, 1.0),
        seed: said.seed.map_or_else(random, i64::cast_unsigned),
        presence_penalty: number(said.presence_penalty, 0.0),
        frequency_penalty: number(said.frequency_penalty, 0.0),
        logit_bias: said.logit_bias.iter().map(bias).collect(),
        logprobs: said.logprobs.map(|most| most as usize),
    }
}

/// Writes what is generated in OpenAI's shapes.
struct Writer {
    name: String,
    fingerprint: String,
    id: String,
    created: u64,
    request: Request,
    batch: Arc<Batch>,
    /// How many tokens were asked.
    prompt: u64,
}

/// What was written so far.
#[derive(Default)]
struct Written {
    text: String,
    logprobs: Vec<Chosen>,
    /// Characters that left before.
    offset: usize,
}

impl Writer {
    fn head(&self) -> Head<'_> {
        let fingerprint = Some(self.fingerprint.as_str());
        Head { id: &self.id, created: self.created, model: &self.name, fingerprint }
    }

    async fn run(self, mut generation: Generation, sender: Sender) {
        let stream = self.request.stream;
        if sender.send(Ok(Piece::Prompt(self.prompt))).await.is_err() {
            return;
        }
        let mut written = Written::default();
        let mut begun = false;
        loop {
            let step = tokio::select! {
                step = generation.next() => step,
                // To drop the generation is to stop it.
                () = sender.closed() => return,
            };
            let piece = match step {
                Some(Step::Token { id, text, logprob }) => {
                    self.token(&mut written, id, &text, logprob);
                    let pause = written.text.is_empty() && written.logprobs.is_empty();
                    if !stream || (pause && begun) {
                        continue;
                    }
                    if !begun && self.request.endpoint == Endpoint::Chat {
                        let first = self.chunk().begin();
                        if sender.send(Ok(Piece::Data(first))).await.is_err() {
                            return;
                        }
                    }
                    begun = true;
                    if pause {
                        continue;
                    }
                    self.flush(&mut written, None)
                }
                Some(Step::Finished {
                    reason,
                    text,
                    prompt_tokens,
                    cached_tokens,
                    completion_tokens,
                }) => {
                    written.text.push_str(&text);
                    let finish = match reason {
                        Reason::Stop => Finish::Stop,
                        Reason::Length => Finish::Length,
                    };
                    let counted = Counted {
                        prompt: prompt_tokens as u64,
                        cached: cached_tokens as u64,
                        completion: completion_tokens as u64,
                    };
                    self.finish(&mut written, finish, counted, &sender, begun).await;
                    return;
                }
                Some(Step::Failed(why)) => {
                    let _ = sender.send(Err(Fault::unavailable(format!("{why}.")))).await;
                    return;
                }
                None => {
                    let _ = sender.send(Err(Fault::internal())).await;
                    return;
                }
            };
            if sender.send(Ok(Piece::Data(piece))).await.is_err() {
                return;
            }
        }
    }

    fn token(&self, written: &mut Written, id: u32, text: &str, logprob: Option<Logprob>) {
        written.text.push_str(text);
        if let Some(Logprob { chosen, top }) = logprob {
            let tokenizer = self.batch.model().tokenizer();
            let likely =
                |id: u32, logprob: f32| Likely { bytes: tokenizer.bytes(id).to_vec(), logprob };
            let top = top.into_iter().map(|(id, logprob)| likely(id, logprob)).collect();
            written.logprobs.push(Chosen { token: likely(id, chosen), top });
        }
    }

    fn chunk(&self) -> Chunk<'_> {
        Chunk { head: self.head(), index: 0, usage_follows: self.request.include_usage }
    }

    /// A chunk with what was written since the last one.
    fn flush(&self, written: &mut Written, finish: Option<Finish>) -> bytes::Bytes {
        let text = std::mem::take(&mut written.text);
        let chosen = std::mem::take(&mut written.logprobs);
        let logprobs = self.request.sampling.logprobs.map(|_| chosen.as_slice());
        let piece = if self.request.endpoint == Endpoint::Chat {
            self.chunk().text(&text, logprobs)
        } else {
            let offset = written.offset;
            let choice = TextChoice { text: &text, logprobs, offset, finish };
            answer::text_chunk(self.head(), 0, &choice, self.request.include_usage)
        };
        written.offset += text.chars().count();
        piece
    }

    async fn finish(
        &self,
        written: &mut Written,
        finish: Finish,
        counted: Counted,
        sender: &Sender,
        begun: bool,
    ) {
        let chat = self.request.endpoint == Endpoint::Chat;
        let mut pieces = Vec::new();
        if self.request.stream {
            if !begun && chat {
                pieces.push(self.chunk().begin());
            }
            if chat {
                if !written.text.is_empty() || !written.logprobs.is_empty() {
                    pieces.push(self.flush(written, None));
                }
                pieces.push(self.chunk().end(finish));
            } else {
                pieces.push(self.flush(written, Some(finish)));
            }
            if self.request.include_usage {
                pieces.push(if chat {
                    answer::chat_usage(self.head(), counted)
                } else {
                    answer::text_usage(self.head(), counted)
                });
            }
        } else {
            let (text, chosen) = (&written.text, &written.logprobs);
            let logprobs = self.request.sampling.logprobs.map(|_| chosen.as_slice());
            pieces.push(if chat {
                let choice = ChatChoice { content: text, logprobs, finish };
                answer::chat(self.head(), &[choice], counted)
            } else {
                let choice = TextChoice { text, logprobs, offset: 0, finish: Some(finish) };
                answer::text(self.head(), &[choice], counted)
            });
        }
        for piece in pieces {
            if sender.send(Ok(Piece::Data(piece))).await.is_err() {
                return;
            }
        }
        let _ = sender.send(Ok(Piece::Done(counted))).await;
    }
}
