//! Embeddings of sentences by models of the BERT family, such as all-MiniLM-L6-v2.
//!
//! A folder holds `model.safetensors`, `config.json`, `tokenizer.json` and, if the model was made
//! for sentences, `sentence_bert_config.json`, which says at how many word pieces text is cut. The
//! embedding of a text is the mean of what the last layer gives for its word pieces, at length 1:
//! what sentence-transformers does with such a folder. Texts are not padded to the length of each
//! other, so one does not depend on what else is asked.

use std::collections::VecDeque;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;

use candle_core::cpu::erf::erf_f32;
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device};
use serde::Deserialize;
use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};
use tokio::sync::oneshot;

use super::gguf::{LoadError, broken};
use super::linear::{ComputeError, Linear, Rows, Workers, apply, dot};
use super::tokenizer::MAX_TEXT;

/// What embeddings are made of some texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedded {
    /// One for each text, in order, each of length 1.
    pub vectors: Vec<Vec<f32>>,
    /// The word pieces that were read, special ones included.
    pub tokens: usize,
}

/// Why texts get no embeddings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmbedError {
    /// Too many wait already; later it may be taken.
    #[error("{0} requests wait already")]
    Busy(usize),
    /// The request is out of bounds.
    #[error("{0}")]
    Invalid(String),
    /// The model gave no usable result.
    #[error("{0}")]
    Failed(String),
    /// The model is being unloaded.
    #[error("the model is being unloaded")]
    Closed,
}

/// The answer to one request, when it comes. Dropping it takes the request back.
#[derive(Debug)]
pub struct Embedding(oneshot::Receiver<Result<Embedded, EmbedError>>);

impl Embedding {
    /// Waits for it.
    ///
    /// # Errors
    /// When the model is unloaded meanwhile, or gave nothing usable.
    pub async fn get(self) -> Result<Embedded, EmbedError> {
        self.0.await.unwrap_or(Err(EmbedError::Closed))
    }

    /// The same for threads that may block.
    ///
    /// # Errors
    /// As [`Embedding::get`].
    pub fn wait(self) -> Result<Embedded, EmbedError> {
        self.0.blocking_recv().unwrap_or(Err(EmbedError::Closed))
    }
}

/// A model of embeddings at work, on a thread of its own.
#[derive(Debug)]
pub struct Embedder {
    /// None once it is being dropped.
    jobs: Option<mpsc::SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    queue: usize,
    dimensions: usize,
    longest: usize,
}

#[derive(Debug)]
struct Job {
    texts: Vec<String>,
    answer: oneshot::Sender<Result<Embedded, EmbedError>>,
}

impl Embedder {
    /// The most texts in one request.
    pub const MAX_TEXTS: usize = 2048;
    /// Texts that are computed together, at most.
    const BATCH: usize = 8;

    /// Reads the model in the folder `path` and starts its thread. At most `queue` requests wait.
    /// Takes seconds: not for the asynchronous threads.
    ///
    /// # Errors
    /// When a file cannot be read, is broken, or holds what this engine does not run.
    pub fn load(path: &Path, threads: usize, queue: usize) -> Result<Self, LoadError> {
        let model = Bert::load(path, threads)?;
        let (dimensions, longest) = (model.config.hidden_size, model.longest);
        let queue = queue.clamp(1, 1 << 12);
        let (jobs, receiver) = mpsc::sync_channel(queue);
        let thread = std::thread::Builder::new()
            .name("embeddings".into())
            .spawn(move || run(&model, &receiver))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), queue, dimensions, longest })
    }

    /// The numbers in one embedding.
    #[must_use]
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// The word pieces of a text that are read; what comes after them is cut off.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Asks for the embeddings of some texts.
    ///
    /// # Errors
    /// When there are none or too many, or too many requests wait.
    pub fn submit(&self, texts: Vec<String>) -> Result<Embedding, EmbedError> {
        if !(1..=Self::MAX_TEXTS).contains(&texts.len()) {
            let most = Self::MAX_TEXTS;
            return Err(EmbedError::Invalid(format!("1 to {most} texts, not {}", texts.len())));
        }
        let bytes: usize = texts.iter().map(String::len).sum();
        if bytes > MAX_TEXT {
            let text = format!("the texts have {bytes} bytes, more than the {MAX_TEXT} allowed");
            return Err(EmbedError::Invalid(text));
        }
        let (answer, receiver) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(EmbedError::Closed)?;
        match jobs.try_send(Job { texts, answer }) {
            Ok(()) => Ok(Embedding(receiver)),
            Err(mpsc::TrySendError::Full(_)) => Err(EmbedError::Busy(self.queue)),
            Err(mpsc::TrySendError::Disconnected(_)) => Err(EmbedError::Closed),
        }
    }
}

impl Drop for Embedder {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is left of a request.
struct Task {
    job: Job,
    done: Embedded,
}

/// Requests that are worked at in turns; the others wait in the channel.
const AT_ONCE: usize = 4;

/// Computes a few texts of each request in turn, so that a large one does not hold up small ones.
fn run(model: &Bert, jobs: &mpsc::Receiver<Job>) {
    let mut tasks: VecDeque<Task> = VecDeque::new();
    let mut open = true;
    while open || !tasks.is_empty() {
        let next = match tasks.len() {
            0 => jobs.recv().map_err(|_| mpsc::TryRecvError::Disconnected),
            AT_ONCE.. => Err(mpsc::TryRecvError::Empty),
            _ => jobs.try_recv(),
        };
        match next {
            Ok(job) => {
                let done = Embedded { vectors: Vec::new(), tokens: 0 };
                tasks.push_back(Task { job, done });
            }
            Err(mpsc::TryRecvError::Disconnected) => {
                open = false;
                // Who waits is told by the dropped channels.
                tasks.clear();
            }
            Err(mpsc::TryRecvError::Empty) => {}
        }
        let Some(mut task) = tasks.pop_front() else { continue };
        if task.job.answer.is_closed() {
            continue;
        }
        let first = task.done.vectors.len();
        let last = task.job.texts.len().min(first + Embedder::BATCH);
        let texts = &task.job.texts[first..last];
        let computed = catch_unwind(AssertUnwindSafe(|| model.embed(texts)));
        let failed = match computed {
            Ok(Ok(more)) => {
                task.done.vectors.extend(more.vectors);
                task.done.tokens += more.tokens;
                if last < task.job.texts.len() {
                    tasks.push_back(task);
                } else {
                    let _ = task.job.answer.send(Ok(task.done));
                }
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the computation panicked".to_owned(),
        };
        tracing::error!(failed, "embeddings could not be computed");
        let _ = task.job.answer.send(Err(EmbedError::Failed(failed)));
    }
}

/// `config.json`.
#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    vocab_size: usize,
    layer_norm_eps: f64,
    hidden_act: String,
    position_embedding_type: Option<String>,
}

/// `sentence_bert_config.json`.
#[derive(Debug, Default, Deserialize)]
struct Sentences {
    max_seq_length: Option<usize>,
}

/// `1_Pooling/config.json`, of which only one kind is known here.
#[derive(Debug, Deserialize)]
struct Pooling {
    pooling_mode_mean_tokens: bool,
}

/// A matrix with a vector that is added.
#[derive(Debug)]
struct Affine {
    matrix: Linear,
    bias: Vec<f32>,
}

/// What brings the numbers of a row to mean 0 and variance 1, and then to its own.
#[derive(Debug)]
struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    epsilon: f32,
}

#[derive(Debug)]
struct Layer {
    query: Affine,
    key: Affine,
    value: Affine,
    output: Affine,
    attention_norm: Norm,
    inner: Affine,
    outer: Affine,
    norm: Norm,
}

#[derive(Debug)]
struct Bert {
    config: Config,
    tokenizer: tokenizers::Tokenizer,
    /// The word pieces of a text that are read.
    longest: usize,
    words: Vec<f32>,
    positions: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    workers: Workers,
}

/// The largest of the small files, in bytes.
const MAX_JSON: u64 = 64 << 20;
/// The largest file of weights, in bytes: such models are small.
const MAX_WEIGHTS: u64 = 4 << 30;

impl Config {
    fn check(&self) -> Result<(), LoadError> {
        if self.model_type != "bert" {
            return Err(LoadError::Unsupported(format!(
                "the model is of the type {}; for embeddings the engine runs bert",
                self.model_type
            )));
        }
        if self.hidden_act != "gelu" {
            let act = &self.hidden_act;
            return Err(LoadError::Unsupported(format!("the activation {act} is not supported")));
        }
        if self.position_embedding_type.as_deref().is_some_and(|kind| kind != "absolute") {
            return Err(LoadError::Unsupported("only absolute positions are supported".into()));
        }
        for (name, value, most) in [
            ("hidden_size", self.hidden_size, 1 << 14),
            ("intermediate_size", self.intermediate_size, 1 << 16),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 8),
            ("num_attention_heads", self.num_attention_heads, 1 << 8),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 16),
            ("vocab_size", self.vocab_size, 1 << 22),
        ] {
            if !(1..=most).contains(&value) {
                return Err(broken!("{name} is {value}, not within 1 and {most}"));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let (width, heads) = (self.hidden_size, self.num_attention_heads);
            return Err(broken!("{width} dimensions in {heads} heads"));
        }
        if !(0.0..=1.0).contains(&self.layer_norm_eps) {
            return Err(broken!("layer_norm_eps is {}", self.layer_norm_eps));
        }
        Ok(())
    }
}

/// The content of a file that is no longer than that.
fn bounded(path: &Path, most: u64) -> Result<Vec<u8>, LoadError> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() || meta.len() > most {
        return Err(broken!("{} is no file of at most {most} bytes", path.display()));
    }
    Ok(fs::read(path)?)
}

fn json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, LoadError> {
    serde_json::from_slice(&bounded(path, MAX_JSON)?)
        .map_err(|error| broken!("{}: {error}", path.display()))
}

impl Bert {
    fn load(folder: &Path, threads: usize) -> Result<Self, LoadError> {
        let config: Config = json(&folder.join("config.json"))?;
        config.check()?;
        let sentences = folder.join("sentence_bert_config.json");
        let sentences: Sentences =
            if sentences.exists() { json(&sentences)? } else { Sentences::default() };
        let pooling = folder.join("1_Pooling/config.json");
        if pooling.exists() && !json::<Pooling>(&pooling)?.pooling_mode_mean_tokens {
            return Err(LoadError::Unsupported("only the mean of all tokens is known".into()));
        }
        let most = config.max_position_embeddings;
        let longest = sentences.max_seq_length.unwrap_or(most).min(most);
        let tokenizer = tokenizer(&bounded(&folder.join("tokenizer.json"), MAX_JSON)?, longest)?;
        let workers = Workers::new(threads)?;
        let bytes = bounded(&folder.join("model.safetensors"), MAX_WEIGHTS)?;
        let tensors = Tensors(BufferedSafetensors::new(bytes)?);
        let (width, hidden) = (config.hidden_size, config.intermediate_size);
        let shards = workers.shards();
        let affine = |name: &str, shape: (usize, usize)| -> Result<Affine, LoadError> {
            let weights = tensors.floats(&format!("{name}.weight"), &[shape.0, shape.1])?;
            let bias = tensors.floats(&format!("{name}.bias"), &[shape.0])?;
            Ok(Affine { matrix: Linear::from_floats(&weights, shape, shards)?, bias })
        };
        let epsilon = config.layer_norm_eps as f32;
        let norm = |name: &str| -> Result<Norm, LoadError> {
            let weight = tensors.floats(&format!("{name}.weight"), &[width])?;
            let bias = tensors.floats(&format!("{name}.bias"), &[width])?;
            Ok(Norm { weight, bias, epsilon })
        };
        let mut layers = Vec::new();
        for n in 0..config.num_hidden_layers {
            let name = |part: &str| format!("encoder.layer.{n}.{part}");
            layers.push(Layer {
                query: affine(&name("attention.self.query"), (width, width))?,
                key: affine(&name("attention.self.key"), (width, width))?,
                value: affine(&name("attention.self.value"), (width, width))?,
                output: affine(&name("attention.output.dense"), (width, width))?,
                attention_norm: norm(&name("attention.output.LayerNorm"))?,
                inner: affine(&name("intermediate.dense"), (hidden, width))?,
                outer: affine(&name("output.dense"), (width, hidden))?,
                norm: norm(&name("output.LayerNorm"))?,
            });
        }
        let words =
            tensors.floats("embeddings.word_embeddings.weight", &[config.vocab_size, width])?;
        let mut positions =
            tensors.floats("embeddings.position_embeddings.weight", &[most, width])?;
        // Every text is the first sentence of its pair, so its type is part of its positions.
        let kinds = tensors.first_row("embeddings.token_type_embeddings.weight", width)?;
        for row in positions.chunks_exact_mut(width) {
            row.iter_mut().zip(&kinds).for_each(|(x, kind)| *x += kind);
        }
        let norm = norm("embeddings.LayerNorm")?;
        Ok(Self { config, tokenizer, longest, words, positions, norm, layers, workers })
    }

    fn embed(&self, texts: &[String]) -> Result<Embedded, ComputeError> {
        let failed = |error: tokenizers::Error| ComputeError(error.to_string());
        let mut lengths = Vec::new();
        let mut tokens: Vec<u32> = Vec::new();
        for text in texts {
            let encoding = self.tokenizer.encode_fast(text.as_str(), true).map_err(failed)?;
            let ids = encoding.get_ids();
            if ids.len() > self.longest || ids.is_empty() {
                return Err(ComputeError(format!("a text of {} word pieces", ids.len())));
            }
            lengths.push(ids.len());
            tokens.extend_from_slice(ids);
        }
        let vectors = self.workers.enter(|| self.pass(&tokens, &lengths))?;
        Ok(Embedded { vectors, tokens: tokens.len() })
    }

    fn pass(&self, tokens: &[u32], lengths: &[usize]) -> Result<Vec<Vec<f32>>, ComputeError> {
        let width = self.config.hidden_size;
        let mut x = Vec::with_capacity(tokens.len() * width);
        let positions = lengths.iter().flat_map(|length| 0..*length);
        for (token, position) in tokens.iter().zip(positions) {
            let at = *token as usize * width;
            let word = self.words.get(at..at + width);
            let word = word.ok_or_else(|| ComputeError(format!("no word piece {token}")))?;
            let place = &self.positions[position * width..(position + 1) * width];
            x.extend(word.iter().zip(place).map(|(word, place)| word + place));
        }
        self.norm.apply(&mut x);
        for layer in &self.layers {
            let rows = Rows::new(x.clone(), width);
            let matrices = [&layer.query.matrix, &layer.key.matrix, &layer.value.matrix];
            let [mut q, mut k, mut v] = apply(&self.workers, matrices, &rows)?;
            add(&mut q, &layer.query.bias);
            add(&mut k, &layer.key.bias);
            add(&mut v, &layer.value.bias);
            let attended = self.attend(&q, &k, &v, lengths);
            let out = layer.output.apply(&self.workers, attended)?;
            x.iter_mut().zip(out).for_each(|(x, y)| *x += y);
            layer.attention_norm.apply(&mut x);
            let mut inner = layer.inner.apply(&self.workers, x.clone())?;
            for x in &mut inner {
                *x *= 0.5 * (1.0 + erf_f32(*x * std::f32::consts::FRAC_1_SQRT_2));
            }
            let out = layer.outer.apply(&self.workers, inner)?;
            x.iter_mut().zip(out).for_each(|(x, y)| *x += y);
            layer.norm.apply(&mut x);
        }
        let mut rows = x.as_slice();
        let mut vectors = Vec::new();
        for length in lengths {
            let (text, rest) = rows.split_at(length * width);
            rows = rest;
            vectors.push(mean(text, width)?);
        }
        Ok(vectors)
    }

    /// Every word piece attends to all of its text, head by head.
    fn attend(&self, q: &[f32], k: &[f32], v: &[f32], lengths: &[usize]) -> Vec<f32> {
        let (width, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let head_width = width / heads;
        let scale = (head_width as f32).sqrt().recip();
        let mut tasks = Vec::new();
        let mut first = 0;
        for length in lengths {
            tasks.extend((0..heads).map(|head| (first..first + length, head * head_width)));
            first += length;
        }
        let part = |x: &'_ [f32], row: usize, at: usize| -> std::ops::Range<usize> {
            debug_assert!(row * width + at < x.len());
            row * width + at..row * width + at + head_width
        };
        let results = self.workers.spread(tasks.len(), |task| {
            let (rows, at) = tasks[task].clone();
            // By dimension, so that their sums are dot products of what lies together.
            let values: Vec<Vec<f32>> = (0..head_width)
                .map(|n| rows.clone().map(|row| v[part(v, row, at)][n]).collect())
                .collect();
            let mut out = Vec::with_capacity(rows.len() * head_width);
            let mut weights = Vec::with_capacity(rows.len());
            for row in rows.clone() {
                let query = &q[part(q, row, at)];
                weights.clear();
                weights
                    .extend(rows.clone().map(|other| dot(query, &k[part(k, other, at)]) * scale));
                let most = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                weights.iter_mut().for_each(|weight| *weight = (*weight - most).exp());
                let total: f32 = weights.iter().sum();
                out.extend(values.iter().map(|values| dot(&weights, values) / total));
            }
            out
        });
        let mut out = vec![0.0; q.len()];
        for ((rows, at), result) in tasks.into_iter().zip(results) {
            for (row, result) in rows.zip(result.chunks_exact(head_width)) {
                let to = part(q, row, at);
                out[to].copy_from_slice(result);
            }
        }
        out
    }
}

impl Affine {
    fn apply(&self, workers: &Workers, x: Vec<f32>) -> Result<Vec<f32>, ComputeError> {
        let inputs = self.matrix.inputs();
        let [mut out] = apply(workers, [&self.matrix], &Rows::new(x, inputs))?;
        add(&mut out, &self.bias);
        Ok(out)
    }
}

impl Norm {
    fn apply(&self, x: &mut [f32]) {
        let width = self.weight.len();
        for row in x.chunks_exact_mut(width) {
            let mean = row.iter().sum::<f32>() / width as f32;
            let spread = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / width as f32;
            let scale = (spread + self.epsilon).sqrt().recip();
            for ((x, weight), bias) in row.iter_mut().zip(&self.weight).zip(&self.bias) {
                *x = (*x - mean) * scale * weight + bias;
            }
        }
    }
}

/// The weights in the file, by name.
struct Tensors(BufferedSafetensors);

impl Tensors {
    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        // Some files have the name of the model before that of the tensor.
        let found = self.0.load(name, &Device::Cpu);
        let tensor = found.or_else(|_| self.0.load(&format!("bert.{name}"), &Device::Cpu))?;
        if tensor.dims() != shape {
            return Err(broken!("tensor {name} is {:?}, not {shape:?}", tensor.dims()));
        }
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    fn first_row(&self, name: &str, width: usize) -> Result<Vec<f32>, LoadError> {
        for rows in 1..=2 {
            if let Ok(mut floats) = self.floats(name, &[rows, width]) {
                floats.truncate(width);
                return Ok(floats);
            }
        }
        Err(broken!("tensor {name} is missing, or not 2 by {width}"))
    }
}

fn tokenizer(json: &[u8], longest: usize) -> Result<tokenizers::Tokenizer, LoadError> {
    let broken = |error: tokenizers::Error| broken!("tokenizer.json: {error}");
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(broken)?;
    let truncation = TruncationParams {
        direction: TruncationDirection::Right,
        max_length: longest,
        strategy: TruncationStrategy::LongestFirst,
        stride: 0,
    };
    // In place of what the file says: it cuts and fills up to a length that was good for training.
    tokenizer.with_truncation(Some(truncation)).map_err(broken)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// The mean of the rows, at length 1.
fn mean(rows: &[f32], width: usize) -> Result<Vec<f32>, ComputeError> {
    let mut sum = vec![0.0f32; width];
    for row in rows.chunks_exact(width) {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    let length = sum.iter().map(|x| x * x).sum::<f32>().sqrt();
    if !length.is_finite() || length == 0.0 {
        return Err(ComputeError("the model's results are no numbers".into()));
    }
    sum.iter_mut().for_each(|x| *x /= length);
    Ok(sum)
}

fn add(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    }
}
