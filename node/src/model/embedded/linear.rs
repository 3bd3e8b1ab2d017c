//! The arithmetic: threads, matrix products on candle's quantised kernels, and what lies between.
//!
//! A matrix is split by rows into one shard per thread, and a thread multiplies all of its share
//! without waiting for others. Each number of a product is one dot product of a row of activations
//! and a row of weights, computed by the same kernel however many rows come with it: so what one
//! sequence gets does not depend on what else is in the batch (a test holds candle to that).
//!
//! candle's kernels would split each product over a pool of their own, one per process, whose size
//! comes from the environment (`CANDLE_NUM_THREADS`, else `RAYON_NUM_THREADS`, else the cores).
//! Where that pool is empty (`CANDLE_NUM_THREADS=1`) the threads are ours and as many as asked
//! for; else candle's are used, as many as it has, because the two would only be in each other's
//! way.

use std::borrow::Cow;
use std::sync::OnceLock;

use candle_core::quantized::{GgmlDType, GgmlType, QTensor};
use candle_core::utils::barrier_pool;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Tensor};
use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

use super::gguf::{Entry, File, LoadError, broken};

/// Why a computation failed: only when a model is not what it was checked to be.
#[derive(Debug, thiserror::Error)]
#[error("the computation failed: {0}")]
pub struct ComputeError(pub(super) String);

impl From<candle_core::Error> for ComputeError {
    fn from(error: candle_core::Error) -> Self {
        Self(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

/// The threads of one model.
#[derive(Debug)]
pub(super) enum Workers {
    Own(rayon::ThreadPool),
    /// Those that candle started for the whole process.
    Candle,
}

impl Workers {
    /// At most so many threads, at least one.
    pub(super) fn new(threads: usize) -> Result<Self, LoadError> {
        let others = barrier_pool().n_workers();
        if others > 0 {
            if others + 1 != threads {
                tracing::warn!(
                    asked = threads,
                    used = others + 1,
                    "CANDLE_NUM_THREADS is not 1: all models share the threads of candle"
                );
            }
            return Ok(Self::Candle);
        }
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.clamp(1, 256))
            .thread_name(|index| format!("model-{index}"))
            .build()
            .map(Self::Own)
            .map_err(|error| LoadError::Io(std::io::Error::other(error)))
    }

    /// Into how many parts a matrix is split.
    pub(super) fn shards(&self) -> usize {
        match self {
            Self::Own(pool) => pool.current_num_threads(),
            Self::Candle => 1,
        }
    }

    /// Runs `f` among the workers, so that the parts of it begin without a hand-over.
    pub(super) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Own(pool) => pool.install(f),
            Self::Candle => f(),
        }
    }

    /// The results of `f` for `0..n`, in order. `f` may use kernels that split themselves.
    fn each<T: Send>(&self, n: usize, f: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
        match self {
            Self::Own(_) if n > 1 => (0..n).into_par_iter().with_max_len(1).map(f).collect(),
            _ => (0..n).map(f).collect(),
        }
    }

    /// The results of `f` for `0..n`, in order. `f` may not use kernels that split themselves.
    pub(super) fn spread<T: Send + Sync>(
        &self,
        n: usize,
        f: impl Fn(usize) -> T + Sync + Send,
    ) -> Vec<T> {
        if matches!(self, Self::Own(_)) || n <= 1 {
            return self.each(n, f);
        }
        let slots: Vec<OnceLock<T>> = (0..n).map(|_| OnceLock::new()).collect();
        barrier_pool().execute_chunked(n, |range| {
            for index in range {
                // Each index is handed out once.
                let _ = slots[index].set(f(index));
            }
        });
        slots.into_iter().filter_map(OnceLock::into_inner).collect()
    }
}

/// Activations: `rows` rows of `width` numbers.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    data: CpuStorage,
    rows: usize,
    width: usize,
}

impl Rows {
    pub(super) fn new(data: Vec<f32>, width: usize) -> Self {
        let rows = data.len() / width.max(1);
        Self { data: CpuStorage::F32(data), rows, width }
    }

    /// The same with zeros added to each row, if rows of `width` are wanted.
    fn filled(&self, width: usize) -> Cow<'_, Self> {
        if width == self.width {
            return Cow::Borrowed(self);
        }
        let mut data = vec![0.0; self.rows * width];
        let rows = self.as_slice().chunks_exact(self.width);
        for (to, from) in data.chunks_exact_mut(width).zip(rows) {
            to[..from.len()].copy_from_slice(from);
        }
        Cow::Owned(Self::new(data, width))
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        match &self.data {
            CpuStorage::F32(data) => data,
            _ => &[],
        }
    }
}

/// A matrix of weights, applied to rows of activations.
#[derive(Debug)]
pub(super) struct Linear {
    shards: Vec<QTensor>,
    outputs: usize,
    inputs: usize,
    /// The columns in memory: `inputs`, or more where zeros were added.
    columns: usize,
}

impl Linear {
    /// Reads the tensor `name`, which must be a matrix of that shape.
    pub(super) fn load(
        file: &mut File,
        name: &str,
        (outputs, inputs): (usize, usize),
        shards: usize,
    ) -> Result<Self, LoadError> {
        let entry: Entry =
            file.entry(name).ok_or_else(|| broken!("tensor {name} is missing"))?.clone();
        if entry.dims != [outputs, inputs] {
            let dims = &entry.dims;
            return Err(broken!("tensor {name} is {dims:?}, not {outputs} by {inputs}"));
        }
        let columns = columns(entry.kind, (outputs, inputs));
        let mut parts = Vec::new();
        for range in split(outputs, shards) {
            parts.push(file.padded_rows(&entry, range, columns)?);
        }
        Ok(Self { shards: parts, outputs, inputs, columns })
    }

    /// From plain numbers, row by row.
    pub(super) fn from_floats(
        weights: &[f32],
        (outputs, inputs): (usize, usize),
        shards: usize,
    ) -> Result<Self, LoadError> {
        if weights.len() != outputs * inputs || weights.is_empty() {
            return Err(broken!("a matrix of {} is not {outputs} by {inputs}", weights.len()));
        }
        let mut parts = Vec::new();
        for range in split(outputs, shards) {
            let part = &weights[range.start * inputs..range.end * inputs];
            let shape = (range.len(), inputs);
            let part = Tensor::from_slice(part, shape, &Device::Cpu)?;
            parts.push(QTensor::quantize(&part, GgmlDType::F32)?);
        }
        Ok(Self { shards: parts, outputs, inputs, columns: inputs })
    }

    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Appends a row of the matrix as plain numbers.
    pub(super) fn row(&self, mut row: usize, out: &mut Vec<f32>) -> Result<(), ComputeError> {
        for shard in &self.shards {
            let (rows, _) = shard.shape().dims2()?;
            if row < rows {
                let id = Tensor::new(&[row as u32], &Device::Cpu)?;
                let found = shard.embedding(&id)?.flatten_all()?.to_vec1::<f32>()?;
                out.extend_from_slice(&found[..self.inputs]);
                return Ok(());
            }
            row -= rows;
        }
        Err(ComputeError("a row that the matrix does not have".into()))
    }
}

/// Rows of weights that the packed kernels take together.
const TILE: usize = 16;

/// Rows in shards that are multiples of 16, which is what the packed kernels take: a matrix that
/// does not come apart like that stays whole, so that the kernel for a row never depends on the
/// number of threads.
fn split(rows: usize, shards: usize) -> Vec<std::ops::Range<usize>> {
    if shards <= 1 || !rows.is_multiple_of(TILE) {
        return std::iter::once(0..rows).collect();
    }
    let each = rows.div_ceil(shards).next_multiple_of(TILE);
    (0..rows).step_by(each).map(|start| start..rows.min(start + each)).collect()
}

/// The columns that a matrix has in memory. candle's fastest kernel for Q8_0 takes rows in pieces
/// of 256 numbers only, and reads prompts more than twice as fast as the other: so it pays to fill
/// a row up with zeros, unless they would be more than half as much again.
///
/// It has its price. That kernel rounds activations to 8 bits by one scale for 256 of them, not for
/// 32, and the filled matrix is in memory twice, as it was read and packed. SmolLM2-135M predicts
/// texts 0.3 to 1.4 % worse than llama.cpp does (in nats per token); without the filling it is 0.1
/// in place of 0.3 % on the same text, for the matrices whose rows are whole pieces anyway.
fn columns(kind: GgmlDType, (outputs, inputs): (usize, usize)) -> usize {
    const PIECE: usize = 256;
    #[cfg(target_arch = "x86_64")]
    let packs = is_x86_feature_detected!("avx512vnni") || is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    let packs = false;
    let filled = inputs.next_multiple_of(PIECE);
    let pays = packs && outputs.is_multiple_of(TILE) && filled <= inputs + inputs / 2;
    if kind == GgmlDType::Q8_0 && pays { filled } else { inputs }
}

/// `x` times one shard.
fn multiply(shard: &QTensor, x: &Rows) -> Result<Vec<f32>, ComputeError> {
    // Where candle chooses the kernel by the number of rows, the number is kept on one side of its
    // choice: Q6_K has a kernel of its own for one row, Q4_K one for 32 and more on some
    // processors.
    let (rows, width) = (x.rows, x.width);
    match shard.dtype() {
        GgmlDType::Q6K if rows == 1 => {
            let mut twice = x.as_slice().to_vec();
            twice.extend_from_within(..);
            let mut out = run(shard, &CpuStorage::F32(twice), 2, width)?;
            out.truncate(out.len() / 2);
            Ok(out)
        }
        GgmlDType::Q4K if rows >= 32 => {
            let mut out = Vec::new();
            for part in x.as_slice().chunks(31 * width) {
                let rows = part.len() / width;
                out.extend(run(shard, &CpuStorage::F32(part.to_vec()), rows, width)?);
            }
            Ok(out)
        }
        _ => run(shard, &x.data, rows, width),
    }
}

fn run(
    shard: &QTensor,
    x: &CpuStorage,
    rows: usize,
    width: usize,
) -> Result<Vec<f32>, ComputeError> {
    match shard.cpu_fwd(x, &Layout::contiguous((rows, width)))?.0 {
        CpuStorage::F32(out) => Ok(out),
        _ => Err(ComputeError("a product of another type".into())),
    }
}

/// Products of shards side by side, as the rows of one matrix.
fn join(mut parts: Vec<Vec<f32>>, rows: usize, outputs: usize) -> Vec<f32> {
    if parts.len() == 1 {
        return parts.pop().unwrap_or_default();
    }
    let mut out = Vec::with_capacity(rows * outputs);
    for row in 0..rows {
        for part in &parts {
            let width = part.len() / rows.max(1);
            out.extend_from_slice(&part[row * width..(row + 1) * width]);
        }
    }
    out
}

/// `x` times each of some matrices, in one go.
pub(super) fn apply<const N: usize>(
    workers: &Workers,
    matrices: [&Linear; N],
    x: &Rows,
) -> Result<[Vec<f32>; N], ComputeError> {
    if matrices.iter().any(|matrix| matrix.inputs != x.width) {
        return Err(ComputeError(format!("rows of {} do not fit a matrix", x.width)));
    }
    let filled = matrices.map(|matrix| x.filled(matrix.columns));
    let tasks: Vec<(&QTensor, &Rows)> = matrices
        .iter()
        .zip(&filled)
        .flat_map(|(matrix, x)| matrix.shards.iter().map(move |shard| (shard, &**x)))
        .collect();
    let products = workers.each(tasks.len(), |task| multiply(tasks[task].0, tasks[task].1));
    let mut products = products.into_iter();
    let mut out = [const { Vec::new() }; N];
    for (matrix, out) in matrices.iter().zip(&mut out) {
        let parts = products.by_ref().take(matrix.shards.len()).collect::<Result<Vec<_>, _>>()?;
        *out = join(parts, x.rows, matrix.outputs);
    }
    Ok(out)
}

/// `silu(x gate) * (x up)`: the inner half of a gated layer.
pub(super) fn gated(
    workers: &Workers,
    gate: &Linear,
    up: &Linear,
    x: &Rows,
) -> Result<Rows, ComputeError> {
    let (for_gate, for_up) = (x.filled(gate.columns), x.filled(up.columns));
    let parts = workers.each(gate.shards.len(), |shard| {
        let mut out = multiply(&gate.shards[shard], &for_gate)?;
        let up = multiply(&up.shards[shard], &for_up)?;
        for (gate, up) in out.iter_mut().zip(up) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        Ok::<_, ComputeError>(out)
    });
    let parts = parts.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(Rows::new(join(parts, x.rows, gate.outputs), gate.outputs))
}

/// The dot product of two rows of the same length.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // The kernel itself trusts the length that it is told.
    let length = a.len().min(b.len());
    <f32 as GgmlType>::vec_dot(length, a, b)
}

/// Each row divided by its root mean square, times `weight`.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let scale = (dot(row, row) / row.len() as f32 + epsilon).sqrt().recip();
        out.extend(row.iter().zip(weight).map(|(x, weight)| x * scale * weight));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -1 and 1 that look random.
    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    /// A product of many rows has the same bits as the product of each row alone: for the kinds
    /// and shapes that meet each of candle's kernels (rows of 256 are packed, 192 are not).
    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        use GgmlDType as D;
        let kinds = [D::F32, D::F16, D::BF16, D::Q4_0, D::Q8_0, D::Q4K, D::Q5K, D::Q6K];
        for (kind, inputs) in kinds.into_iter().flat_map(|kind| [(kind, 256usize), (kind, 192)]) {
            if !inputs.is_multiple_of(kind.block_size()) {
                continue;
            }
            let weights = noise(48 * inputs, 7);
            let weights = Tensor::from_vec(weights, (48, inputs), &Device::Cpu).unwrap();
            let shard = QTensor::quantize(&weights, kind).unwrap();
            let x = noise(67 * inputs, 9);
            let all = multiply(&shard, &Rows::new(x.clone(), inputs)).unwrap();
            for (row, together) in x.chunks(inputs).zip(all.chunks(48)) {
                let alone = multiply(&shard, &Rows::new(row.to_vec(), inputs)).unwrap();
                assert_eq!(alone, together, "{kind:?} with rows of {inputs}");
            }
        }
    }

    #[test]
    fn shards_and_threads_change_no_bit() {
        let weights = noise(96 * 64, 3);
        let x = Rows::new(noise(5 * 64, 4), 64);
        let one = Workers::new(1).unwrap();
        let whole = Linear::from_floats(&weights, (96, 64), 1).unwrap();
        let [expected] = apply(&one, [&whole], &x).unwrap();
        for shards in [2, 3, 4, 6] {
            let matrix = Linear::from_floats(&weights, (96, 64), shards).unwrap();
            assert!(matrix.shards.len() > 1);
            let workers = Workers::new(shards).unwrap();
            let [out] = workers.enter(|| apply(&workers, [&matrix], &x)).unwrap();
            assert_eq!(out, expected);
        }
        assert_eq!(split(40, 2).len(), 1, "not in sixteens: kept whole");
    }
}
