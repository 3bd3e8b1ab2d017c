//! Which models there are at this node, and whether and at what price they are sold: a file in the
//! node's directory, `models.json`, written whole and atomically with every change.
//!
//! Weights are payloads, pinned while a model names them. What a model is, is read from its weights
//! here, not believed; an upstream server says it, or the operator does.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use leasehold_keys::disk::{self, Existing};
use leasehold_proto::words::index::{self, Index};
use leasehold_proto::words::model::{Endpoint, MAX_MODEL_NAME, MAX_MODELS, ModelState, TokenRates};
use leasehold_proto::{Hash, Payload};
use serde::{Deserialize, Serialize};

use super::embedded::{Info, LoadError, Model};
use super::engine::{Engine, Load};
use super::hold;
use super::local::{self, Local};
use super::upstream::{self, Address, Key, Upstream};
use crate::openai::Needs;
use crate::payload::{PayloadError, PayloadStore, Root};

/// The file's name in the node's directory.
pub const FILE: &str = "models.json";
/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// How many tokens an upstream is thought to look back on where neither its operator nor it says so.
pub(super) const CONTEXT: u32 = 32_768;
/// Below how many requests under way what can wait is begun: half of what the embedded engine answers
/// at once, and so few of a server of which nothing is said that others hardly feel it.
const SLACK_REQUESTS: u32 = 4;
/// What a sentence encoder is made of: these files of its index.
const ENCODER: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

/// What answers for a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The embedded engine, with weights as one GGUF file of the llama family.
    Weights(Payload),
    /// The embedded engine, with a sentence encoder of the BERT family: an index of its files.
    Encoder(Payload),
    /// An OpenAI-compatible server.
    Upstream {
        /// Where: `http://host:port/v1`.
        url: String,
        /// What the model is called there, if not as here.
        model: Option<String>,
        /// The file that holds its API key, if it wants one.
        key_file: Option<PathBuf>,
    },
}

/// A model at this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What it is called.
    pub name: String,
    /// What it is.
    pub digest: Hash,
    /// What answers for it.
    pub source: Source,
    /// What its tokens cost.
    pub rates: TokenRates,
    /// What they cost whoever can wait, in thousandths of that; none where it is not sold so.
    #[serde(default)]
    pub slack_permille: Option<u16>,
    /// Requests that can wait are begun while fewer than this are under way; at least one.
    #[serde(default = "slack_requests")]
    pub slack_requests: u32,
    /// Whether it is sold to others.
    pub serve: bool,
    /// Whether its weights are kept from peers who ask for them.
    pub private: bool,
    /// Whether it is there to show how things work.
    pub demo: bool,
    /// How its weights are kept.
    pub quantisation: String,
    /// The most tokens of prompt and answer together; zero of an upstream of which nothing is said: as
    /// many as it says itself.
    pub context: u32,
    /// What can be asked of it.
    pub endpoints: Vec<Endpoint>,
    /// Whether its operator said that of an upstream; else it is what it is found to have.
    #[serde(default)]
    pub endpoints_said: bool,
    /// What it can do beyond plain text, as in an offer.
    pub abilities: u64,
    /// How many weights it has; zero where that is not known.
    pub parameters: u64,
    /// Under which licence its weights are, where they say it.
    pub licence: Option<String>,
}

const fn slack_requests() -> u32 {
    SLACK_REQUESTS
}

/// What a model costs of which nothing is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prices {
    /// What its tokens cost.
    pub rates: TokenRates,
    /// What they cost whoever can wait, in thousandths of that; none where it is not sold so.
    pub slack_permille: Option<u16>,
}

/// What an operator says of a model. What is not said stays as it was, or is found out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// What answers for it; it must be said of a new one.
    pub source: Option<Source>,
    /// What its tokens cost.
    pub rates: Option<TokenRates>,
    /// What they cost whoever can wait, in thousandths of that; none inside where it is not to be
    /// sold so.
    pub slack_permille: Option<Option<u16>>,
    /// Below how many requests under way what can wait is begun.
    pub slack_requests: Option<u32>,
    /// Whether it is sold.
    pub serve: Option<bool>,
    /// Whether its weights are kept from peers.
    pub private: Option<bool>,
    /// Whether it is there to show how things work.
    pub demo: Option<bool>,
    /// How its weights are kept, for an upstream.
    pub quantisation: Option<String>,
    /// How many tokens it looks back on, for an upstream.
    pub context: Option<u32>,
    /// What can be asked of it, for an upstream.
    pub endpoints: Option<Vec<Endpoint>>,
    /// What it can do, for an upstream.
    pub abilities: Option<u64>,
}

/// Why the catalog is not as it was to be. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is none of this version's.
    #[error("{}: it does not read as a list of models: {why}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Too many models.
    #[error("a node has at most {MAX_MODELS} models: remove one first")]
    Full,
    /// The name is none.
    #[error("a model's name has 1 to {MAX_MODEL_NAME} letters, digits and the signs . _ - / @")]
    Name,
    /// What is said of it breaks a rule of offers.
    #[error("{0}")]
    Rule(&'static str),
    /// A new model says nothing of what answers for it.
    #[error("there is no model '{0}' here yet: say where its weights or its server are")]
    NoSource(String),
    /// A model that is to be sold is not here.
    #[error(
        "there is no model '{0}' at this node: start it without that, and run `leasehold model \
         pull` or `model add`"
    )]
    NotHere(String),
    /// The weights are not among the payloads.
    #[error("the weights {0} are not here: import or fetch them first")]
    NotHeld(Root),
    /// The weights cannot be read.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// They are no model that the embedded engine runs.
    #[error("these weights are no model that runs here: {0}")]
    Weights(#[from] LoadError),
    /// They are no sentence encoder.
    #[error("this is no sentence encoder: {0}")]
    Encoder(String),
    /// The server's address is none, or its key cannot be read.
    #[error("the upstream cannot be used: {0}")]
    Upstream(String),
}

impl CatalogError {
    /// A thread that was to do it ended instead.
    pub(super) fn panicked(error: tokio::task::JoinError) -> Self {
        Self::Io { path: PathBuf::from(FILE), source: io::Error::other(error) }
    }
}

/// The models of a node. Clones share them.
#[derive(Clone, Debug)]
pub struct Catalog {
    dir: PathBuf,
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
    /// What a model costs where nothing is said.
    prices: Prices,
}

impl Catalog {
    /// The catalog in `dir`, empty where there is no file yet; models of which nothing is said have
    /// these prices.
    ///
    /// # Errors
    /// When there is a file and it does not read.
    pub fn open(dir: &Path, prices: Prices) -> Result<Self, CatalogError> {
        let path = dir.join(FILE);
        let read = || -> Result<Vec<Entry>, CatalogError> {
            let io = |source| CatalogError::Io { path: path.clone(), source };
            let length = match std::fs::metadata(&path) {
                Ok(file) => file.len(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(io(error)),
            };
            let wrong = |why: String| CatalogError::Read { path: path.clone(), why };
            if length > MAX_FILE {
                return Err(wrong("it is longer than 1 MiB".into()));
            }
            let bytes = std::fs::read(&path).map_err(io)?;
            serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))
        };
        let entries = read()?.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let entries = Arc::new(Mutex::new(entries));
        Ok(Self { dir: dir.to_owned(), entries, prices })
    }

    /// Every model.
    #[must_use]
    pub fn list(&self) -> Vec<Entry> {
        hold(&self.entries).values().cloned().collect()
    }

    /// Adds a model, or changes the one of that name. Reads weights: not for asynchronous threads.
    ///
    /// # Errors
    /// When what it names is not here or not a model, or the file cannot be written.
    pub fn put(
        &self,
        name: &str,
        spec: &Spec,
        payloads: &PayloadStore,
    ) -> Result<Entry, CatalogError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/@".contains(c);
        if name.is_empty() || name.len() > MAX_MODEL_NAME || !name.chars().all(plain) {
            return Err(CatalogError::Name);
        }
        let known = hold(&self.entries).get(name).cloned();
        let mut entry = match (&spec.source, known) {
            (Some(source), known) => {
                let entry = self.describe(name, source, payloads)?;
                let private = entry.private || known.is_some_and(|known| known.private);
                Entry { private, ..entry }
            }
            (None, Some(known)) => known,
            (None, None) => return Err(CatalogError::NoSource(name.to_owned())),
        };
        if let Source::Upstream { model, .. } = &entry.source {
            entry.quantisation = spec.quantisation.clone().unwrap_or(entry.quantisation);
            entry.context = spec.context.unwrap_or(entry.context);
            entry.endpoints_said |= spec.endpoints.is_some();
            entry.endpoints = spec.endpoints.clone().unwrap_or(entry.endpoints);
            entry.endpoints.sort();
            entry.endpoints.dedup();
            entry.abilities = spec.abilities.unwrap_or(entry.abilities);
            // What it is, is what its operator says.
            let model = model.as_deref().unwrap_or(name);
            let said = format!("upstream\n{model}\n{}", entry.quantisation);
            entry.digest = Hash::of(said.as_bytes());
        }
        entry.rates = spec.rates.unwrap_or(entry.rates);
        entry.slack_permille = spec.slack_permille.unwrap_or(entry.slack_permille);
        entry.slack_requests = spec.slack_requests.unwrap_or(entry.slack_requests);
        entry.serve = spec.serve.unwrap_or(entry.serve);
        entry.private = spec.private.unwrap_or(entry.private);
        entry.demo = spec.demo.unwrap_or(entry.demo);
        entry.sound().map_err(CatalogError::Rule)?;
        let mut entries = hold(&self.entries);
        if entries.len() >= MAX_MODELS && !entries.contains_key(name) {
            return Err(CatalogError::Full);
        }
        let mut changed = entries.clone();
        changed.insert(name.to_owned(), entry.clone());
        self.write(&changed)?;
        *entries = changed;
        Ok(entry)
    }

    /// Sells a model that is here.
    ///
    /// # Errors
    /// When it is not, or the file cannot be written.
    pub fn serve(&self, name: &str) -> Result<(), CatalogError> {
        let mut entries = hold(&self.entries);
        let mut changed = entries.clone();
        let Some(entry) = changed.get_mut(name) else {
            return Err(CatalogError::NotHere(name.to_owned()));
        };
        if !std::mem::replace(&mut entry.serve, true) {
            self.write(&changed)?;
            *entries = changed;
        }
        Ok(())
    }

    /// Removes a model. False when there is none of that name.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn remove(&self, name: &str) -> Result<bool, CatalogError> {
        let mut entries = hold(&self.entries);
        let mut changed = entries.clone();
        if changed.remove(name).is_none() {
            return Ok(false);
        }
        self.write(&changed)?;
        *entries = changed;
        Ok(true)
    }

    fn write(&self, entries: &BTreeMap<String, Entry>) -> Result<(), CatalogError> {
        let path = self.dir.join(FILE);
        let list: Vec<_> = entries.values().collect();
        let io = |source| CatalogError::Io { path: path.clone(), source };
        let bytes = serde_json::to_vec_pretty(&list).map_err(|error| io(error.into()))?;
        disk::write_atomic(&path, &bytes, 0o600, Existing::Replace)
            .map_err(|error| io(io::Error::other(error)))
    }

    /// What a source is, as far as it can be found out here.
    fn describe(
        &self,
        name: &str,
        source: &Source,
        payloads: &PayloadStore,
    ) -> Result<Entry, CatalogError> {
        let mut entry = Entry {
            name: name.to_owned(),
            digest: Hash::default(),
            source: source.clone(),
            rates: self.prices.rates,
            slack_permille: self.prices.slack_permille,
            slack_requests: SLACK_REQUESTS,
            serve: false,
            private: false,
            demo: false,
            quantisation: String::new(),
            context: 0,
            endpoints: Vec::new(),
            endpoints_said: false,
            abilities: 0,
            parameters: 0,
            licence: None,
        };
        match source {
            Source::Weights(weights) => {
                let root = Root::from(weights.root);
                let path = payloads.path(root).ok_or(CatalogError::NotHeld(root))?;
                let Info { quantisation, context, parameters, licence, has_chat_template, .. } =
                    Model::inspect(&path)?;
                let chat = has_chat_template.then_some(Endpoint::Chat);
                entry.digest = weights.root;
                entry.quantisation = quantisation;
                entry.context = u32::try_from(context).unwrap_or(u32::MAX);
                entry.endpoints = chat.into_iter().chain([Endpoint::Completions]).collect();
                entry.abilities = local::ABILITIES.bits();
                (entry.parameters, entry.licence) = (parameters, licence);
                // Below this it talks, and is of no use.
                entry.demo = parameters < 500_000_000;
            }
            Source::Encoder(files) => {
                encoder(files, payloads)?;
                entry.digest = files.root;
                entry.quantisation = "f32".into();
                entry.context = 256;
                entry.endpoints = vec![Endpoint::Embeddings];
            }
            Source::Upstream { url, model, key_file } => {
                open_upstream(url, model.as_deref().unwrap_or(name), key_file.as_deref())?;
                entry.endpoints = vec![Endpoint::Chat, Endpoint::Completions];
                entry.abilities = Needs::UPSTREAM.bits();
            }
        }
        // What was kept from peers before stays so until it is said otherwise.
        entry.private = entry.pins().is_some_and(|root| payloads.is_private(root.into()));
        Ok(entry)
    }
}

/// An adapter for a server at `url`, which has the model under that name.
fn open_upstream(
    url: &str,
    model: &str,
    key_file: Option<&Path>,
) -> Result<Upstream, CatalogError> {
    let wrong = |why: String| CatalogError::Upstream(why);
    let address: Address = url.parse().map_err(|error| wrong(format!("{error}")))?;
    let mut config = upstream::Config::new(address);
    config.model = Some(model.to_owned());
    config.key = key_file.map(Key::read).transpose().map_err(|error| wrong(error.to_string()))?;
    Upstream::new(config).map_err(|error| wrong(error.to_string()))
}

/// The files of a sentence encoder, by what they are called in its index.
fn encoder(
    files: &Payload,
    payloads: &PayloadStore,
) -> Result<Vec<(String, PathBuf)>, CatalogError> {
    let root = Root::from(files.root);
    payloads.has(root).ok_or(CatalogError::NotHeld(root))?;
    let bytes = payloads.read(root, index::MAX_BYTES as u64)?;
    let index = Index::from_bytes(&bytes).map_err(|why| CatalogError::Encoder(why.to_string()))?;
    let named = index.files().iter();
    if let Some(missing) = ENCODER.iter().find(|name| !named.clone().any(|f| f.path == **name)) {
        return Err(CatalogError::Encoder(format!("it has no file '{missing}'")));
    }
    let here = named.map(|file| {
        let root = Root::from(file.payload.root);
        let path = payloads.path(root).ok_or(CatalogError::NotHeld(root))?;
        Ok((file.path.clone(), path))
    });
    here.collect()
}

impl Entry {
    /// Whether what is said of it can stand in an offer: one that cannot would take all else that the node
    /// offers with it.
    fn sound(&self) -> Result<(), &'static str> {
        if self.slack_requests == 0 {
            return Err("of requests that can wait one at least is begun where there is none");
        }
        self.offer(ModelState::Cold, &Load::default()).sound()
    }

    /// The payloads that its weights are.
    pub(crate) fn payloads(&self, payloads: &PayloadStore) -> Vec<Root> {
        match &self.source {
            Source::Weights(weights) => vec![weights.root.into()],
            Source::Encoder(files) => {
                let root = Root::from(files.root);
                let read = payloads.index(root).ok();
                let named = read.iter().flat_map(Index::payloads).map(|p| Root::from(p.root));
                named.chain([root]).collect()
            }
            Source::Upstream { .. } => Vec::new(),
        }
    }

    /// Whether it is got ready before anybody asks: what is sold, and servers, which may come and go.
    pub(crate) const fn is_tended(&self) -> bool {
        self.serve || matches!(self.source, Source::Upstream { .. })
    }

    /// What pins its weights, if it has some here.
    pub(crate) const fn pins(&self) -> Option<Hash> {
        match &self.source {
            Source::Weights(weights) | Source::Encoder(weights) => Some(weights.root),
            Source::Upstream { .. } => None,
        }
    }

    /// What answers for it, which may use so many threads.
    pub(crate) fn engine(&self, payloads: &PayloadStore, threads: usize) -> Arc<dyn Engine> {
        let (name, digest) = (self.name.clone(), self.digest);
        match &self.source {
            Source::Weights(weights) => {
                let path = payloads.path(weights.root.into());
                Arc::new(Local::chat(name, digest, path, threads))
            }
            Source::Encoder(files) => match encoder(files, payloads) {
                Ok(files) => Arc::new(Local::encoder(name, digest, files, threads)),
                Err(error) => Arc::new(local::Gone(error.to_string())),
            },
            Source::Upstream { url, model, key_file } => {
                let model = model.as_deref().unwrap_or(&self.name);
                match open_upstream(url, model, key_file.as_deref()) {
                    Ok(upstream) => Arc::new(upstream),
                    Err(error) => Arc::new(local::Gone(error.to_string())),
                }
            }
        }
    }
}
