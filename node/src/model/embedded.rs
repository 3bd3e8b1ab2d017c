//! Models that this node runs itself, on its CPUs, from files: no GPU, no other program.
//!
//! ```text
//! gguf ──> tokenizer, template ──┐
//!   │                            ├──> Model ──> batch::Engine ──> Generation
//!   └────> llama (linear, kv) ───┘                (sampling, text)
//! safetensors ──> bert ──> Embedder
//! ```
//!
//! A [`Model`] is read from one GGUF file; an [`Engine`] runs requests to it. [`import`] rewrites
//! files that would run slowly. candle, which has the kernels, is named below here only.

mod batch;
mod bert;
mod gguf;
pub mod import;
mod kv;
mod linear;
mod llama;
mod sampling;
mod template;
mod text;
pub mod tiny;
mod tokenizer;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub use batch::{Engine, Failure, Generation, Limits, Load, Reason, Refused, Request, Step};
pub use bert::{EmbedError, Embedded, Embedder, Embedding};
pub use gguf::LoadError;
pub use linear::ComputeError;
pub use sampling::{Logprob, Sampling};
pub use template::{Message, TemplateError};
pub use tokenizer::{EncodeError, MAX_TEXT, Tokenizer, spell};

use gguf::{File, broken, kind_name};
use linear::Workers;
use llama::Llama;
use template::Template;

/// What a model file says of itself, and what was found in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// `general.name`, or the file's.
    pub name: String,
    /// `general.architecture`: llama.
    pub architecture: String,
    /// The kind that most of the weights have, such as Q8_0.
    pub quantisation: String,
    /// The most tokens of prompt and answer together.
    pub context: usize,
    /// How many weights there are.
    pub parameters: u64,
    /// How many tokens there are.
    pub vocabulary: usize,
    /// `general.license`, where the file has it.
    pub licence: Option<String>,
    /// Whether the file has a template for chats.
    pub has_chat_template: bool,
}

/// A model in memory.
#[derive(Debug)]
pub struct Model {
    info: Info,
    tokenizer: Tokenizer,
    template: Option<Template>,
    weights: Llama,
}

impl Model {
    /// Reads a GGUF file. It takes as much memory as the file is long, and up to as much again for
    /// the matrices that are packed for the processor. `threads` are what its computations may use
    /// (see the module `linear` for when they are shared). Takes seconds: not for the asynchronous
    /// threads.
    ///
    /// # Errors
    /// When the file cannot be read, is broken, or holds what this engine does not run.
    pub fn load(path: &Path, threads: usize) -> Result<Self, LoadError> {
        let mut file = File::open(path)?;
        let info = info(&file, path);
        let tokenizer = Tokenizer::load(&file)?;
        let template = Template::load(file.text("tokenizer.chat_template"), &tokenizer)?;
        let weights = Llama::load(&mut file, Arc::new(Workers::new(threads)?))?;
        if weights.config().vocabulary != tokenizer.vocabulary() {
            let (rows, tokens) = (weights.config().vocabulary, tokenizer.vocabulary());
            return Err(broken!("{rows} embeddings for {tokens} tokens"));
        }
        let info = Info { context: weights.config().context, ..info };
        Ok(Self { info, tokenizer, template, weights })
    }

    /// Reads what a GGUF file says of itself, without its weights. It may still be one that cannot
    /// be loaded.
    ///
    /// # Errors
    /// When the file cannot be read, or its header is broken.
    pub fn inspect(path: &Path) -> Result<Info, LoadError> {
        Ok(info(&File::open(path)?, path))
    }

    /// What it is.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Its words.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The prompt for what the assistant says next in a chat. Text in the messages never becomes a
    /// control token. May take some milliseconds.
    ///
    /// # Errors
    /// When the model does not take such messages: the fault of who sent them.
    pub fn chat(&self, messages: &[Message]) -> Result<Vec<u32>, TemplateError> {
        let template = self.template.as_ref().ok_or(TemplateError::None)?;
        template.render(messages, &self.tokenizer)
    }

    /// The logits after the last token of a prompt, for tests and measurements.
    ///
    /// # Errors
    /// When the prompt is empty, longer than the context, or has tokens that are none.
    pub fn logits(&self, prompt: &[u32]) -> Result<Vec<f32>, ComputeError> {
        if prompt.is_empty() || prompt.len() > self.info.context {
            return Err(ComputeError(format!("a prompt of {} tokens", prompt.len())));
        }
        let mut cache = kv::Cache::new(self.weights.memory(), &kv::Counter::default());
        let part = llama::Part { tokens: prompt, cache: &mut cache, logits: true };
        let mut logits = self.weights.forward(&mut [part])?;
        logits.pop().flatten().ok_or_else(|| ComputeError("no result".into()))
    }
}

fn info(file: &File, path: &Path) -> Info {
    let mut by_kind: BTreeMap<&str, u64> = BTreeMap::new();
    for entry in file.entries() {
        let elements: u64 = entry.dims.iter().map(|dim| *dim as u64).product();
        *by_kind.entry(kind_name(entry.kind)).or_default() += elements;
    }
    let most = by_kind.iter().max_by_key(|(_, elements)| **elements).map_or("none", |(k, _)| k);
    let named = || path.file_stem().map(|name| name.to_string_lossy().into_owned());
    let text = |key: &str| file.text(key).map(str::to_owned);
    let architecture = text("general.architecture").unwrap_or_default();
    let context = file.number(&format!("{architecture}.context_length")).unwrap_or(0);
    Info {
        name: text("general.name").or_else(named).unwrap_or_default(),
        quantisation: most.to_owned(),
        context: usize::try_from(context).unwrap_or(usize::MAX),
        architecture,
        parameters: by_kind.values().sum(),
        vocabulary: file.texts("tokenizer.ggml.tokens").map_or(0, <[String]>::len),
        licence: text("general.license"),
        has_chat_template: file.text("tokenizer.chat_template").is_some(),
    }
}
