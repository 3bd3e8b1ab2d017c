//! Writes a model file that is small and knows nothing, for tests: a sound GGUF in every respect,
//! with random weights from a seed.
//!
//! Its vocabulary is the 256 bytes, some pairs of them, and the control tokens of ChatML. What it
//! says is noise, but the same noise each time.

use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::gguf::{ALIGNMENT, kind_number};
use super::tokenizer::spell;

/// What kind of model to write.
#[derive(Clone, Debug)]
pub struct Tiny {
    /// The same seed gives the same file.
    pub seed: u64,
    /// The context in tokens.
    pub context: u32,
    /// The layers.
    pub layers: u32,
    /// Whether its matrices are Q4_1, the kind that an import converts; else they are Q8_0.
    pub slow: bool,
    /// The chat template, if it has one.
    pub template: Option<String>,
}

impl Default for Tiny {
    fn default() -> Self {
        let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\
            \n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        Self { seed: 1, context: 256, layers: 2, slow: false, template: Some(template.into()) }
    }
}

const WIDTH: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HIDDEN: usize = 128;
/// What the model was "trained" on: the pairs of bytes of its vocabulary.
const PAIRS: [&str; 24] = [
    "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed",
    "is", "it", "al", "ar", "st", "to", "nt", "ng",
];
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

impl Tiny {
    /// Writes it to `path`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        std::fs::write(path, self.bytes().map_err(std::io::Error::other)?)
    }

    /// The bytes of the file.
    fn bytes(&self) -> candle_core::Result<Vec<u8>> {
        let tokens = tokens();
        let tensors = self.tensors(tokens.len())?;
        let mut values = Values::default();
        values.text("general.architecture", "llama");
        values.text("general.name", "Tiny");
        values.text("general.license", "apache-2.0");
        let word = |n: u32| (4, n.to_le_bytes());
        for (key, value) in [
            ("llama.block_count", word(self.layers)),
            ("llama.context_length", word(self.context)),
            ("llama.embedding_length", word(WIDTH as u32)),
            ("llama.feed_forward_length", word(HIDDEN as u32)),
            ("llama.attention.head_count", word(HEADS as u32)),
            ("llama.attention.head_count_kv", word(KV_HEADS as u32)),
            ("llama.attention.layer_norm_rms_epsilon", (6, 1e-5f32.to_le_bytes())),
            ("llama.rope.freq_base", (6, 10_000f32.to_le_bytes())),
            ("tokenizer.ggml.bos_token_id", word(1)),
            ("tokenizer.ggml.eos_token_id", word(2)),
        ] {
            values.add(key, value.0, &value.1);
        }
        values.text("tokenizer.ggml.model", "gpt2");
        values.text("tokenizer.ggml.pre", "smollm");
        values.texts("tokenizer.ggml.tokens", &tokens);
        let merges: Vec<String> =
            PAIRS.iter().map(|pair| format!("{} {}", &pair[..1], &pair[1..])).collect();
        values.texts("tokenizer.ggml.merges", &merges);
        let mut kinds = 5u32.to_le_bytes().to_vec();
        kinds.extend((tokens.len() as u64).to_le_bytes());
        for id in 0..tokens.len() {
            kinds.extend(if id < CONTROL.len() { 3u32 } else { 1 }.to_le_bytes());
        }
        values.add("tokenizer.ggml.token_type", 9, &kinds);
        if let Some(template) = &self.template {
            values.text("tokenizer.chat_template", template);
        }

        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((tensors.len() as u64).to_le_bytes());
        file.extend(values.count.to_le_bytes());
        file.extend(values.bytes);
        let mut data = Vec::new();
        for (name, rank, tensor) in &tensors {
            file.extend((name.len() as u64).to_le_bytes());
            file.extend(name.as_bytes());
            file.extend((*rank as u32).to_le_bytes());
            for dim in tensor.shape().dims().iter().rev().take(*rank) {
                file.extend((*dim as u64).to_le_bytes());
            }
            file.extend(kind_number(tensor.dtype()).to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend_from_slice(&tensor.data()?);
            data.resize(data.len().next_multiple_of(ALIGNMENT as usize), 0);
        }
        file.resize(file.len().next_multiple_of(ALIGNMENT as usize), 0);
        file.extend(data);
        Ok(file)
    }

    /// Names, ranks and weights.
    fn tensors(&self, vocabulary: usize) -> candle_core::Result<Vec<(String, usize, QTensor)>> {
        let mut dice = ChaCha8Rng::seed_from_u64(self.seed);
        let mut tensors = Vec::new();
        let mut add = |name: String, rank: usize, shape: (usize, usize), kind| {
            let deviation = (shape.1 as f32).sqrt().recip() * 2.0;
            let weights: Vec<f32> = (0..shape.0 * shape.1)
                .map(|_| if rank == 1 { 1.0 } else { deviation * signed(&mut dice) })
                .collect();
            let plain = Tensor::from_vec(weights, shape, &Device::Cpu)?;
            tensors.push((name, rank, QTensor::quantize(&plain, kind)?));
            Ok::<_, candle_core::Error>(())
        };
        let matrix = if self.slow { GgmlDType::Q4_1 } else { GgmlDType::Q8_0 };
        let keys = WIDTH / HEADS * KV_HEADS;
        add("token_embd.weight".into(), 2, (vocabulary, WIDTH), GgmlDType::Q8_0)?;
        for n in 0..self.layers {
            for norm in ["attn_norm", "ffn_norm"] {
                add(format!("blk.{n}.{norm}.weight"), 1, (1, WIDTH), GgmlDType::F32)?;
            }
            for (name, shape) in [
                ("attn_q", (WIDTH, WIDTH)),
                ("attn_k", (keys, WIDTH)),
                ("attn_v", (keys, WIDTH)),
                ("attn_output", (WIDTH, WIDTH)),
                ("ffn_gate", (HIDDEN, WIDTH)),
                ("ffn_up", (HIDDEN, WIDTH)),
                ("ffn_down", (WIDTH, HIDDEN)),
            ] {
                add(format!("blk.{n}.{name}.weight"), 2, shape, matrix)?;
            }
        }
        add("output_norm.weight".into(), 1, (1, WIDTH), GgmlDType::F32)?;
        Ok(tensors)
    }
}

fn tokens() -> Vec<String> {
    let control = CONTROL.iter().map(|name| (*name).to_owned());
    let bytes = (0..=u8::MAX).map(|byte| spell(&[byte]));
    control.chain(bytes).chain(PAIRS.iter().map(|pair| (*pair).to_owned())).collect()
}

/// Evenly from -1 to 1.
fn signed(dice: &mut ChaCha8Rng) -> f32 {
    (dice.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// The metadata as it is written.
#[derive(Default)]
struct Values {
    bytes: Vec<u8>,
    count: u64,
}

impl Values {
    fn add(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.bytes.extend((key.len() as u64).to_le_bytes());
        self.bytes.extend(key.as_bytes());
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
        self.count += 1;
    }

    fn text(&mut self, key: &str, text: &str) {
        let mut value = (text.len() as u64).to_le_bytes().to_vec();
        value.extend(text.as_bytes());
        self.add(key, 8, &value);
    }

    fn texts(&mut self, key: &str, texts: &[String]) {
        let mut value = 8u32.to_le_bytes().to_vec();
        value.extend((texts.len() as u64).to_le_bytes());
        for text in texts {
            value.extend((text.len() as u64).to_le_bytes());
            value.extend(text.as_bytes());
        }
        self.add(key, 9, &value);
    }
}
