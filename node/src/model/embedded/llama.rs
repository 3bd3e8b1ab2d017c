//! The forward pass of models of the `llama` architecture, on the CPU.
//!
//! One pass takes any number of sequences with any number of new tokens each. The matrices are
//! applied to all their rows at once, since reading the weights is what takes the time when tokens
//! come one by one; only attention looks at each sequence alone. A token's result has the same bits
//! whatever else is in the pass and however its prompt was cut: attention walks the blocks of
//! [`super::kv`] from the first on, and those lie at the same positions each time.

use std::sync::Arc;

use super::gguf::{File, LoadError, broken};
use super::kv::{BLOCK, Cache, Shape};
use super::linear::{ComputeError, Linear, Rows, Workers, apply, dot, gated, rms_norm};

/// The numbers that describe a model, all within bounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) layers: usize,
    pub(super) width: usize,
    heads: usize,
    kv_heads: usize,
    head_width: usize,
    hidden: usize,
    rope_width: usize,
    rope_base: f64,
    /// Positions are divided by it.
    rope_stretch: f64,
    epsilon: f32,
    /// In tokens.
    pub(super) context: usize,
    pub(super) vocabulary: usize,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    feed_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// The weights of a model: shared by all sequences, never changed.
#[derive(Debug)]
pub(super) struct Llama {
    config: Config,
    /// A row for each token, still quantised; none where those of `head` serve for both.
    embeddings: Option<Linear>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Linear,
    /// What each pair of a head turns by from one position to the next.
    turns: Vec<f64>,
    workers: Arc<Workers>,
}

/// A sequence in a pass: its new tokens, and what it remembers of those before.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) cache: &'a mut Cache,
    /// Whether the logits after the last token are wanted.
    pub(super) logits: bool,
}

impl Config {
    fn read(file: &File) -> Result<Self, LoadError> {
        let architecture = file.text("general.architecture").unwrap_or("none");
        if architecture != "llama" {
            return Err(LoadError::Unsupported(format!(
                "the model's architecture is {architecture}; the embedded engine runs llama \
                 (among them SmolLM2, Llama 2 and 3, TinyLlama)"
            )));
        }
        let number = |key: &str, most: u64| -> Result<Option<usize>, LoadError> {
            let Some(n) = file.number(&format!("llama.{key}")) else { return Ok(None) };
            match usize::try_from(n) {
                Ok(small) if (1..=most).contains(&n) => Ok(Some(small)),
                _ => Err(broken!("llama.{key} is {n}, not within 1 and {most}")),
            }
        };
        let missing = |key: &str| broken!("llama.{key} is missing");
        let needed = |key: &str, most: u64| number(key, most)?.ok_or_else(|| missing(key));
        let width = needed("embedding_length", 1 << 16)?;
        let heads = needed("attention.head_count", 1 << 10)?;
        let kv_heads = number("attention.head_count_kv", 1 << 10)?.unwrap_or(heads);
        let head_width = match number("attention.key_length", 1 << 10)? {
            Some(width) => width,
            None if width.is_multiple_of(heads) => width / heads,
            None => return Err(broken!("{width} dimensions in {heads} heads")),
        };
        if number("attention.value_length", 1 << 10)?.is_some_and(|n| n != head_width) {
            return Err(LoadError::Unsupported("keys and values of different lengths".into()));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(broken!("{heads} heads share {kv_heads} keys"));
        }
        if number("expert_count", 1 << 10)?.is_some() {
            return Err(LoadError::Unsupported("models of experts are not supported".into()));
        }
        let rope_width = number("rope.dimension_count", 1 << 10)?.unwrap_or(head_width);
        if rope_width > head_width || !rope_width.is_multiple_of(2) {
            return Err(broken!("{rope_width} of {head_width} dimensions turn"));
        }
        let float = |key: &str| file.float(&format!("llama.{key}"));
        let rope_stretch = match file.text("llama.rope.scaling.type") {
            None | Some("none") => 1.0,
            Some("linear") => float("rope.scaling.factor").unwrap_or(1.0),
            Some(other) => {
                return Err(LoadError::Unsupported(format!(
                    "positions scaled by {other} are not supported"
                )));
            }
        };
        let rope_base = float("rope.freq_base").unwrap_or(10_000.0);
        let epsilon = float("attention.layer_norm_rms_epsilon").unwrap_or(1e-5);
        let sound = |x: f64, least: f64, most: f64| (least..=most).contains(&x);
        if !sound(rope_base, 1.0, 1e12)
            || !sound(rope_stretch, 1e-3, 1e6)
            || !sound(epsilon, 0.0, 1.0)
        {
            return Err(broken!("rope {rope_base}, {rope_stretch} or epsilon {epsilon}"));
        }
        let embeddings = file
            .entry("token_embd.weight")
            .ok_or_else(|| broken!("tensor token_embd.weight is missing"))?;
        Ok(Self {
            layers: needed("block_count", 1 << 10)?,
            width,
            heads,
            kv_heads,
            head_width,
            hidden: needed("feed_forward_length", 1 << 20)?,
            rope_width,
            rope_base,
            rope_stretch,
            epsilon: epsilon as f32,
            context: needed("context_length", 1 << 24)?,
            vocabulary: embeddings.dims.first().copied().unwrap_or(0),
        })
    }
}

impl Llama {
    /// Reads the weights. Beside them it holds one shard of a tensor in memory.
    pub(super) fn load(file: &mut File, workers: Arc<Workers>) -> Result<Self, LoadError> {
        let config = Config::read(file)?;
        let shards = workers.shards();
        let width = config.width;
        // Each tensor is read once, and what is not read would be missing in the result.
        let mut read = vec!["output_norm.weight".to_owned(), "rope_freqs.weight".to_owned()];
        let mut matrix = |file: &mut File, name: String, shape| {
            let matrix = Linear::load(file, &name, shape, shards);
            read.push(name);
            matrix
        };
        let queries = config.heads * config.head_width;
        let keys = config.kv_heads * config.head_width;
        let hidden = config.hidden;
        let mut layers = Vec::new();
        for n in 0..config.layers {
            layers.push(Layer {
                attention_norm: vector(file, &format!("blk.{n}.attn_norm.weight"), width)?,
                query: matrix(file, format!("blk.{n}.attn_q.weight"), (queries, width))?,
                key: matrix(file, format!("blk.{n}.attn_k.weight"), (keys, width))?,
                value: matrix(file, format!("blk.{n}.attn_v.weight"), (keys, width))?,
                output: matrix(file, format!("blk.{n}.attn_output.weight"), (width, queries))?,
                feed_norm: vector(file, &format!("blk.{n}.ffn_norm.weight"), width)?,
                gate: matrix(file, format!("blk.{n}.ffn_gate.weight"), (hidden, width))?,
                up: matrix(file, format!("blk.{n}.ffn_up.weight"), (hidden, width))?,
                down: matrix(file, format!("blk.{n}.ffn_down.weight"), (width, hidden))?,
            });
        }
        let shape = (config.vocabulary, width);
        let embeddings = "token_embd.weight".to_owned();
        let (head, embeddings) = if file.entry("output.weight").is_some() {
            let head = matrix(file, "output.weight".to_owned(), shape)?;
            (head, Some(matrix(file, embeddings, shape)?))
        } else {
            (matrix(file, embeddings, shape)?, None)
        };
        let norm = vector(file, "output_norm.weight", width)?;
        for n in 0..config.layers {
            read.push(format!("blk.{n}.attn_norm.weight"));
            read.push(format!("blk.{n}.ffn_norm.weight"));
        }
        read.sort_unstable();
        for entry in file.entries() {
            if read.binary_search(&entry.name).is_err() {
                return Err(LoadError::Unsupported(format!(
                    "the model has a tensor {} that this engine would ignore",
                    entry.name
                )));
            }
        }
        let turns = turns(file, &config)?;
        Ok(Self { config, embeddings, layers, norm, head, turns, workers })
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// What a sequence has to remember.
    pub(super) fn memory(&self) -> Shape {
        let Config { layers, kv_heads, head_width, .. } = self.config;
        Shape { layers, heads: kv_heads, width: head_width }
    }

    /// Takes the new tokens of each part in, and gives the logits of those that want them. The
    /// tokens must be of the vocabulary and fit the context.
    pub(super) fn forward(
        &self,
        parts: &mut [Part<'_>],
    ) -> Result<Vec<Option<Vec<f32>>>, ComputeError> {
        self.workers.clone().enter(|| self.pass(parts))
    }

    fn pass(&self, parts: &mut [Part<'_>]) -> Result<Vec<Option<Vec<f32>>>, ComputeError> {
        let Config { width, epsilon, .. } = self.config;
        let tokens: Vec<u32> = parts.iter().flat_map(|part| part.tokens).copied().collect();
        let mut x = self.embed(&tokens)?;
        let positions: Vec<usize> = parts
            .iter()
            .flat_map(|part| (0..part.tokens.len()).map(|n| part.cache.len() + n))
            .collect();
        let turned = self.angles(&positions);
        for part in parts.iter_mut() {
            part.cache.reserve(part.tokens.len());
        }
        for (number, layer) in self.layers.iter().enumerate() {
            let normed = Rows::new(rms_norm(&x, &layer.attention_norm, epsilon), width);
            let projections = [&layer.query, &layer.key, &layer.value];
            let [mut q, mut k, v] = apply(&self.workers, projections, &normed)?;
            self.turn(&mut q, &turned);
            self.turn(&mut k, &turned);
            self.remember(number, parts, &k, &v)?;
            let attended = self.attend(number, parts, &q);
            let attended = Rows::new(attended, self.config.heads * self.config.head_width);
            let [out] = apply(&self.workers, [&layer.output], &attended)?;
            add(&mut x, &out);
            let normed = Rows::new(rms_norm(&x, &layer.feed_norm, epsilon), width);
            let inner = gated(&self.workers, &layer.gate, &layer.up, &normed)?;
            let [out] = apply(&self.workers, [&layer.down], &inner)?;
            add(&mut x, &out);
        }
        let mut last = Vec::new();
        let mut row = 0;
        for part in parts.iter_mut() {
            row += part.tokens.len();
            part.cache.advance(part.tokens.len());
            if part.logits && row > 0 {
                last.extend_from_slice(&x[(row - 1) * width..row * width]);
            }
        }
        let last = Rows::new(rms_norm(&last, &self.norm, epsilon), width);
        let logits = if last.as_slice().is_empty() {
            Vec::new()
        } else {
            let [logits] = apply(&self.workers, [&self.head], &last)?;
            logits
        };
        let mut rows = logits.chunks_exact(self.head.outputs());
        Ok(parts
            .iter()
            .map(|part| if part.logits { rows.next().map(<[f32]>::to_vec) } else { None })
            .collect())
    }

    fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, ComputeError> {
        let matrix = self.embeddings.as_ref().unwrap_or(&self.head);
        let mut out = Vec::with_capacity(tokens.len() * self.config.width);
        for token in tokens {
            matrix.row(*token as usize, &mut out)?;
        }
        Ok(out)
    }

    /// The cosine and sine of each pair at each position.
    fn angles(&self, positions: &[usize]) -> Vec<(f32, f32)> {
        let mut angles = Vec::with_capacity(positions.len() * self.turns.len());
        for position in positions {
            angles.extend(self.turns.iter().map(|turn| {
                let (sin, cos) = (*position as f64 * turn).sin_cos();
                (cos as f32, sin as f32)
            }));
        }
        angles
    }

    /// Turns the pairs of all heads by their positions. A pair is two neighbours: files of this
    /// architecture have their rows ordered so.
    fn turn(&self, x: &mut [f32], angles: &[(f32, f32)]) {
        if self.turns.is_empty() || angles.is_empty() {
            return;
        }
        let rows = angles.len() / self.turns.len();
        let row_width = x.len() / rows;
        for (row, angles) in x.chunks_exact_mut(row_width).zip(angles.chunks(self.turns.len())) {
            for head in row.chunks_exact_mut(self.config.head_width) {
                let (pairs, _) = head.as_chunks_mut::<2>();
                for ([a, b], (cos, sin)) in pairs.iter_mut().zip(angles) {
                    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                }
            }
        }
    }

    fn remember(
        &self,
        layer: usize,
        parts: &mut [Part<'_>],
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), ComputeError> {
        let Config { kv_heads, head_width, .. } = self.config;
        let row_width = kv_heads * head_width;
        let mut rows = keys.chunks_exact(row_width).zip(values.chunks_exact(row_width));
        for part in parts {
            for n in 0..part.tokens.len() {
                let Some((keys, values)) = rows.next() else { break };
                let heads = keys.chunks_exact(head_width).zip(values.chunks_exact(head_width));
                for (head, (key, value)) in heads.enumerate() {
                    let position = part.cache.len() + n;
                    if !part.cache.write((layer, head), position, key, value) {
                        return Err(ComputeError("a block of memory is shared".into()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Each row of queries attends to what its sequence remembers up to its own position.
    fn attend(&self, layer: usize, parts: &[Part<'_>], queries: &[f32]) -> Vec<f32> {
        let Config { heads, kv_heads, head_width, .. } = self.config;
        let group = heads / kv_heads;
        let row_width = heads * head_width;
        // A task is a head of keys with some rows of one sequence, few enough to balance threads.
        const ROWS: usize = 16;
        let mut tasks = Vec::new();
        let mut first = 0;
        for part in parts {
            let count = part.tokens.len();
            for from in (0..count).step_by(ROWS) {
                let rows = from..count.min(from + ROWS);
                tasks.extend((0..kv_heads).map(|head| (&*part.cache, first, rows.clone(), head)));
            }
            first += count;
        }
        let results = self.workers.spread(tasks.len(), |task| {
            let (cache, first, rows, head) = &tasks[task];
            let mut out = Vec::with_capacity(rows.len() * group * head_width);
            for row in rows.clone() {
                let at = (first + row) * row_width + head * group * head_width;
                let query = &queries[at..at + group * head_width];
                let seen = cache.len() + row + 1;
                for query in query.chunks_exact(head_width) {
                    attend_row(cache, (layer, *head), query, seen, &mut out);
                }
            }
            out
        });
        let mut out = vec![0.0; queries.len()];
        for ((_, first, rows, head), result) in tasks.iter().zip(results) {
            let results = result.chunks_exact(group * head_width);
            for (row, result) in rows.clone().zip(results) {
                let at = (first + row) * row_width + head * group * head_width;
                out[at..at + group * head_width].copy_from_slice(result);
            }
        }
        out
    }
}

/// One query over the first `seen` positions, block by block: the weights are kept relative to the
/// largest so far, so that no more than a block of them is ever in memory.
fn attend_row(cache: &Cache, at: (usize, usize), query: &[f32], seen: usize, out: &mut Vec<f32>) {
    let width = query.len();
    let scale = (width as f32).sqrt().recip();
    let start = out.len();
    out.resize(start + width, 0.0);
    let sum = &mut out[start..];
    let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0f32);
    for block in 0..seen.div_ceil(BLOCK) {
        let (keys, values) = cache.block(at, block);
        let mut weights = [0.0; BLOCK];
        let here = (seen - block * BLOCK).min(BLOCK);
        let mut most = largest;
        for (weight, key) in weights[..here].iter_mut().zip(keys.chunks_exact(width)) {
            *weight = dot(query, key) * scale;
            most = most.max(*weight);
        }
        if most > largest {
            let shrink = (largest - most).exp();
            total *= shrink;
            sum.iter_mut().for_each(|sum| *sum *= shrink);
            largest = most;
        }
        for weight in &mut weights[..here] {
            *weight = (*weight - largest).exp();
            total += *weight;
        }
        for (sum, values) in sum.iter_mut().zip(values.chunks_exact(BLOCK)) {
            *sum += dot(&weights, values);
        }
    }
    sum.iter_mut().for_each(|sum| *sum /= total);
}

/// What each pair turns by per position, slowed by the factors of the file where it has them.
fn turns(file: &mut File, config: &Config) -> Result<Vec<f64>, LoadError> {
    let pairs = config.rope_width / 2;
    let factors = match file.entry("rope_freqs.weight") {
        Some(_) => vector(file, "rope_freqs.weight", pairs)?,
        None => vec![1.0; pairs],
    };
    if factors.iter().any(|factor| !factor.is_finite() || *factor <= 0.0) {
        return Err(broken!("rope_freqs.weight holds numbers that are no factors"));
    }
    let exponent = |pair: usize| -2.0 * pair as f64 / config.rope_width as f64;
    let turn = |(pair, factor): (usize, &f32)| {
        config.rope_base.powf(exponent(pair)) / f64::from(*factor) / config.rope_stretch
    };
    Ok(factors.iter().enumerate().map(turn).collect())
}

fn vector(file: &mut File, name: &str, length: usize) -> Result<Vec<f32>, LoadError> {
    let entry = file.entry(name).ok_or_else(|| broken!("tensor {name} is missing"))?;
    // Before it is read: it need not be as large as it should.
    if entry.dims != [1, length] {
        return Err(broken!("tensor {name} is {:?}, not {length}", entry.dims));
    }
    file.floats(name)
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
