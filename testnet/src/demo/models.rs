//! `leasehold-testnet demo --models`: hosted models, end to end, between real nodes on this machine.
//!
//! ```text
//! map      five nodes find each other
//! models   two take up the same chat model, at two prices, the second one from the first; a third one
//!          takes up a model for embeddings
//! chat     the official OpenAI SDK, pointed at a node that has none: the cheap node answers
//! killed   that node is killed: the dear one answers the next request
//! within   it is back, and killed again while it holds a request, before its first byte: the dear one
//!          answers that very request
//! proof    the receipts of every lease that was taken, checked with no node
//! ```

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use leasehold_node::api::body::{LeaseLine, Leases};
use leasehold_node::openai::catalogue::Catalogue;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::time::{sleep, timeout};

use super::{DemoError, Step, millis, seconds, verify};
use crate::fleet::{self, Fleet, Plan};
use crate::report::Report;
use crate::signal;

/// The nodes: who asks, the cheap and the dear one, who embeds, and one who only watches.
const NODES: [&str; 5] = ["amber", "birch", "cedar", "dogwood", "elder"];
const ASKS: usize = 0;
const CHEAP: usize = 1;
const DEAR: usize = 2;
const EMBEDS: usize = 3;
/// The models, by the names that `leasehold model pull` knows.
const CHAT: &str = "smollm2-135m-instruct";
const ENCODER: &str = "all-minilm-l6-v2";
/// The SDK, and the script that uses it.
const SDK: &str = "openai==3.57.0";
const SCRIPT: &str = include_str!("chat.py");
/// How long a model may take to be fetched, and the SDK.
const FETCH: Duration = Duration::from_secs(300);
/// How long anything else may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What `--json` prints.
#[derive(Debug, Default, Serialize)]
pub(super) struct Object {
    /// How many nodes took part.
    nodes: usize,
    /// From the first process's start to every node seeing every other one.
    map_ms: u64,
    /// Which node answered the first request.
    first: Option<Answer>,
    /// Which one after that was killed.
    killed: Option<Answer>,
    /// Which one when it was killed within a request.
    within: Option<Answer>,
    /// What embeddings came to.
    embedded: Option<Answer>,
    /// How many leases were checked, and how many requests under them, one by one.
    leases: usize,
    requests_checked: u64,
}

/// What the SDK was answered.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Answer {
    said: String,
    node: String,
    cost: String,
    tokens: u64,
    took_ms: u64,
}

struct Demo {
    fleet: Fleet,
    report: Report,
    python: PathBuf,
    object: Object,
}

/// None when it was interrupted.
pub(super) async fn run(
    dir: Option<PathBuf>,
    report: Report,
) -> Result<Option<Object>, (Step, DemoError)> {
    let at_map = |error: DemoError| (Step::Map, error);
    let mut stop = signal::Stop::listen().map_err(|error| at_map(DemoError::Output(error)))?;
    let configs = NODES.iter().map(|name| fleet::config(name)).collect();
    let plan = Plan { dir, ..Plan::new(configs) };
    let fleet = Fleet::found(plan).map_err(|error| at_map(error.into()))?;
    let python = fleet.root().join("sdk").join("bin").join("python");
    let mut demo = Demo { fleet, report, python, object: Object::default() };
    let told = tokio::select! {
        told = demo.tell() => Some(told),
        () = stop.asked() => None,
    };
    let Demo { fleet, object, .. } = demo;
    let stopped = fleet.stop().await;
    match told {
        None => {
            report.say("interrupted; nothing is left running");
            return Ok(None);
        }
        Some(Err(error)) => return Err((Step::Models, error)),
        Some(Ok(())) => {}
    }
    stopped.map_err(|error| (Step::End, error.into()))?;
    report.say("end     five nodes stopped, nothing is left running");
    Ok(Some(object))
}

impl Demo {
    async fn tell(&mut self) -> Result<(), DemoError> {
        self.fleet.start_all().await?;
        let map = self.fleet.map(PATIENCE).await?;
        self.object.nodes = NODES.len();
        self.object.map_ms = u64::try_from(map.as_millis()).unwrap_or(u64::MAX);
        self.report.say(format_args!(
            "map     five nodes see each other after {}",
            seconds(self.object.map_ms)
        ));
        self.models().await?;
        self.sdk().await?;
        self.chats().await?;
        self.proof().await
    }

    /// Two nodes take up the chat model, one the encoder.
    async fn models(&mut self) -> Result<(), DemoError> {
        for (node, model, price, told) in [
            (CHEAP, CHAT, "0.05/0.20", "as it is packaged"),
            (DEAR, CHAT, "0.08/0.30", "from the first one, by its hash"),
            (EMBEDS, ENCODER, "0.01/0", "as it is packaged"),
        ] {
            let begun = Instant::now();
            let args = ["model", "pull", model, "--serve", "--price", price];
            let line: Value = self.leasehold(node, &args, FETCH).await?;
            let digest = line["digest"].as_str().unwrap_or_default();
            self.report.say(format_args!(
                "models  {} takes up {model} {told}: {}, {price} USD for 1M tokens asked and \
                 answered, after {}",
                NODES[node],
                digest.get(..12).unwrap_or_default(),
                seconds(millis(begun)),
            ));
        }
        self.until("both models to be offered", |models| {
            let providers = |name: &str| {
                models.data.iter().find(|model| model.id == name).map_or(0, |model| model.warm)
            };
            providers(CHAT) == 2 && providers(ENCODER) == 1
        })
        .await
    }

    /// Waits until the asking node's list of models is as it should be.
    async fn until(&self, what: &str, is: impl Fn(&Catalogue) -> bool) -> Result<(), DemoError> {
        let client = self.fleet.member(ASKS)?.client()?;
        let begun = Instant::now();
        loop {
            let models: Catalogue = client.get("/v1/models").await?;
            if is(&models) {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                return Err(DemoError::Unlike(format!("waited in vain for {what}: {models:?}")));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Installs the official SDK into a place of its own.
    async fn sdk(&self) -> Result<(), DemoError> {
        let room = self.fleet.root().join("sdk");
        self.report.say(format_args!("sdk     {SDK}, through pip"));
        let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
        let mut venv = tokio::process::Command::new(python);
        venv.args(["-m", "venv"]).arg(&room);
        finish("python3 -m venv", venv, FETCH, None).await?;
        let mut pip = tokio::process::Command::new(&self.python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", SDK]);
        finish("pip install", pip, FETCH, None).await?;
        Ok(())
    }

    /// Asks through the SDK, at the node that has no model.
    async fn ask(&self, what: Value) -> Result<Answer, DemoError> {
        let node = self.fleet.member(ASKS)?;
        let path = node.dir().join("api.token");
        let token =
            std::fs::read_to_string(&path).map_err(|source| DemoError::File { path, source })?;
        let mut ask = what;
        ask["base_url"] = format!("{}/v1", node.api()?).into();
        ask["api_key"] = token.trim().into();
        let mut command = tokio::process::Command::new(&self.python);
        command.arg("-c").arg(SCRIPT);
        let line = "the OpenAI SDK";
        let printed = finish(line, command, PATIENCE, Some(ask.to_string())).await?;
        serde_json::from_slice(&printed)
            .map_err(|source| DemoError::Printed { line: line.into(), source })
    }

    fn tell_of(&self, step: &str, answer: &Answer) {
        self.report.say(format_args!(
            "{step:<7} {} answers for {} USD, {} tokens, in {}: {:?}",
            answer.node,
            answer.cost,
            answer.tokens,
            seconds(answer.took_ms),
            answer.said,
        ));
    }

    async fn chats(&mut self) -> Result<(), DemoError> {
        let ask = |content: &str| json!({ "model": CHAT, "content": content });
        let by = |answer: &Answer, node: usize| {
            if answer.node == NODES[node] {
                return Ok(());
            }
            let (named, found) = (NODES[node], &answer.node);
            Err(DemoError::Unlike(format!("{named} should have answered, and {found} did")))
        };
        let first = self.ask(ask("What is the capital of France?")).await?;
        self.tell_of("chat", &first);
        by(&first, CHEAP)?;
        let embeds = json!({ "model": ENCODER, "input": ["a lantern", "a lamp", "a herring"] });
        let embedded = self.ask(embeds).await?;
        self.tell_of("embed", &embedded);
        by(&embedded, EMBEDS)?;

        self.fleet.kill(CHEAP)?;
        self.report.say(format_args!("killed  {} is killed", NODES[CHEAP]));
        let killed = self.ask(ask("What is the capital of Italy?")).await?;
        self.tell_of("killed", &killed);
        by(&killed, DEAR)?;

        self.fleet.start_one(CHEAP).await?;
        self.fleet.map(PATIENCE).await?;
        self.until("the cheap node to be back", |models| {
            models.data.iter().any(|model| model.id == CHAT && model.warm == 2)
        })
        .await?;
        // It was avoided for a while: until it is asked again, the dear one answers.
        let begun = Instant::now();
        while self.ask(ask("Say hello.")).await?.node != NODES[CHEAP] {
            if begun.elapsed() > PATIENCE {
                let why = format!("{} is not asked again", NODES[CHEAP]);
                return Err(DemoError::Unlike(why));
            }
        }
        // It stands still with the request, and never begins to answer.
        self.fleet.pause(CHEAP)?;
        self.report.say(format_args!(
            "within  {} is back; it stands still with a request, and is killed",
            NODES[CHEAP]
        ));
        let question = ask("What is the capital of Spain?");
        let within = self.killed_within(question).await?;
        self.fleet.kill(CHEAP)?;
        self.tell_of("within", &within);
        by(&within, DEAR)?;
        self.object.first = Some(first);
        self.object.embedded = Some(embedded);
        self.object.killed = Some(killed);
        self.object.within = Some(within);
        Ok(())
    }

    /// Asks while the cheap node, which stands still, is killed.
    async fn killed_within(&self, question: Value) -> Result<Answer, DemoError> {
        let asking = self.ask(question);
        tokio::pin!(asking);
        let early = timeout(Duration::from_secs(1), &mut asking).await;
        if let Ok(answer) = early {
            let why = format!("it was answered too early: {:?}", answer?);
            return Err(DemoError::Unlike(why));
        }
        end(self.fleet.member(CHEAP)?.file()?.pid)?;
        asking.await
    }

    /// Every lease that was taken, checked offline.
    async fn proof(&mut self) -> Result<(), DemoError> {
        let client = self.fleet.member(ASKS)?.client()?;
        let begun = Instant::now();
        // The nodes that live have their receipts countersigned; the killed one cannot ask any more.
        let mut living = Vec::new();
        for member in self.fleet.members() {
            living.extend(member.info().await.ok().map(|info| info.id));
        }
        let leases = loop {
            let leases: Leases = client.get("/v1/leases").await?;
            let agreed = |lease: &LeaseLine| {
                let used = lease.model.as_ref().is_some_and(|model| model.requests > 0);
                used || !living.contains(&lease.lessor)
            };
            if leases.leases.iter().all(agreed) || begun.elapsed() > PATIENCE {
                break leases;
            }
            sleep(Duration::from_millis(200)).await;
        };
        for lease in leases.leases {
            let Some(id) = lease.lease.clone() else { continue };
            let path = self.fleet.root().join(format!("{id}.proof"));
            let out = path.display().to_string();
            let args = ["lease", "export", &id, "--out", &out];
            self.leasehold::<Value>(ASKS, &args, PATIENCE).await?;
            let verdict = verify(&path)?;
            self.report.say(format_args!(
                "proof   lease {}: {} receipts, {} requests checked one by one, {} USD \
                 countersigned: it holds",
                id.get(..12).unwrap_or_default(),
                verdict.receipts,
                verdict.requests_checked,
                verdict.acknowledged_charge,
            ));
            self.object.leases += 1;
            self.object.requests_checked += verdict.requests_checked;
        }
        if self.object.requests_checked < 4 {
            let why = format!("only {} requests were proven", self.object.requests_checked);
            return Err(DemoError::Unlike(why));
        }
        Ok(())
    }

    /// A `leasehold` command at one of the nodes, for its JSON object.
    async fn leasehold<T: for<'de> Deserialize<'de>>(
        &self,
        node: usize,
        args: &[&str],
        patience: Duration,
    ) -> Result<T, DemoError> {
        let line = format!("leasehold {}", args.join(" "));
        self.report.command(&line);
        let member = self.fleet.member(node)?;
        let mut command = fleet::leasehold(self.fleet.program());
        command.env("LEASEHOLD_API", member.api()?).env("LEASEHOLD_DIR", member.dir());
        command.arg("--json").args(args);
        let command = tokio::process::Command::from(command);
        let printed = finish(&line, command, patience, None).await?;
        serde_json::from_slice(&printed).map_err(|source| DemoError::Printed { line, source })
    }
}

/// Ends a process of the fleet that stands still.
fn end(pid: u32) -> Result<(), DemoError> {
    let none = || DemoError::Unlike("a node has no process".into());
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).ok_or_else(none)?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        .map_err(|error| DemoError::Start("kill".into(), error.into()))
}

/// Runs a command with that on its standard input, and gives what it printed.
async fn finish(
    line: &str,
    mut command: tokio::process::Command,
    patience: Duration,
    input: Option<String>,
) -> Result<Vec<u8>, DemoError> {
    let start = |error| DemoError::Start(line.into(), error);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(start)?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(text.as_bytes()).await.map_err(start)?;
    }
    let output = timeout(patience, child.wait_with_output()).await;
    let output = output.map_err(|_| DemoError::Slow { line: line.into() })?.map_err(start)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let code = output.status.code().unwrap_or(-1);
    let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(DemoError::Command { line: line.into(), code, said })
}
