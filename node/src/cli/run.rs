//! `leasehold run`: a program on leased capacity, from the plan to the proof.
//!
//! ```text
//! hash files -> plan -> ask -> upload what is missing -> lease -> claim -> follow
//!                                                                           |-- Ctrl-C: release
//!   exit code <- cost <- end of the lease <- release <- fetch outputs <- job's end
//! ```
//!
//! Whatever fails after the lease was granted gives the lease back.

mod gang;

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use leasehold_keys::exit::Exit;
use leasehold_keys::text::{causes, shown};
use serde_json::{Map, Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::directory::{self, Directory};
use super::follow::{self, Kept, Sink};
use super::output::{Out, page, short_key, span};
use super::transfer::{self, Local};
use super::want::{GangArgs, WantArgs, pair};
use super::{Failure, Session, find};
use crate::api::body::{
    ChoiceLine, ClaimRequest, Claimed, EndLine, LeaseLine, LeaseRequest, Leased, OutcomeLine, Plan,
    PlanRequest, Released, Side,
};
use crate::api::want::{InputText, JobText, PayloadText, WantText};
use crate::attach::End;

/// How long the lease's end may take after it was given back: the lessor reaps the job, and both
/// sign the final receipt.
const CLOSING: Duration = Duration::from_secs(60);
/// How long output may still come after the lease is over.
const LATE: Duration = Duration::from_secs(5);
/// The longest line that waits for its end before it is written behind its label, in bytes.
const MAX_LINE: usize = 64 * 1024;
/// What a shell shows for a program that a signal ended: 128 and the signal's number.
const SIGNALLED: u8 = 128;

/// Run a program on leased capacity.
///
/// Uploads the program and its inputs to the node, shows what it would cost where and asks, leases
/// from the best host, runs, prints the output, fetches the declared outputs, gives the lease back
/// and says what it cost. Ends with the program's own exit code; with 1 and a reason when it was
/// ended otherwise; with 130 on Ctrl-C.
#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    want: Option<WantArgs>,
    /// Use this lease, which was requested before, or its first digits
    #[arg(long, value_name = "LEASE", conflicts_with = "WantArgs")]
    lease: Option<String>,
    #[command(flatten)]
    gang: GangArgs,
    /// A file or a directory that the program finds as /in/NAME; may be repeated
    #[arg(long, value_name = "NAME=PATH", value_parser = pair)]
    input: Vec<(String, String)>,
    /// What the program reads from standard input; '-' is ours, to its end
    #[arg(long, value_name = "FILE")]
    stdin: Option<PathBuf>,
    /// A variable of the program's environment; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// A file that the program writes as /out/NAME, to be fetched; may be repeated
    #[arg(long, value_name = "NAME")]
    output: Vec<String>,
    /// Where outputs go
    #[arg(long, value_name = "DIR", default_value = ".")]
    output_dir: PathBuf,
    /// Print the lease's id once the program runs, and leave it running
    #[arg(short, long)]
    detach: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// The program
    program: PathBuf,
    /// Its arguments
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
}

/// The files that the job needs.
struct Files {
    program: Local,
    inputs: Vec<InputText>,
    /// Those of them that are files, and those that are directories.
    files: Vec<Local>,
    directories: Vec<Directory>,
    stdin: Option<Local>,
}

impl Files {
    /// Sends what the node does not hold. Gives the bytes that were sent.
    async fn upload(&self, session: &Session) -> Result<u64, Failure> {
        let mut sent = 0;
        for directory in &self.directories {
            sent += directory::upload(session, directory).await?;
        }
        let rest = [&self.program].into_iter().chain(&self.files).chain(&self.stdin);
        let rest: Vec<_> = rest.cloned().collect();
        Ok(sent + transfer::upload(session, &rest).await?)
    }
}

impl Run {
    /// Runs the program and gives the process's exit code.
    pub(super) async fn run(self, session: &Session) -> Result<u8, Failure> {
        self.check_asking()?;
        let begun = Instant::now();
        let files = self.files(session).await?;
        let want = match &self.want {
            Some(want) => {
                let text = want.text(session).await?;
                let plan: Plan =
                    session.client.post("/v1/plan", &PlanRequest { want: text.clone() }).await?;
                show(session, want, &plan, self.yes)?;
                if !self.yes && !agreed().await {
                    let object = json!({ "error": "the plan was not agreed to", "exit": 1 });
                    session.out.answer(&object, String::new)?;
                    session.out.tell("nothing was leased");
                    return Ok(Exit::No.code());
                }
                // What was agreed to is asked for: these hosts, in this order.
                let lessors = plan.choices.into_iter().map(|choice| choice.lessor).collect();
                Some(WantText { lessors, ..text })
            }
            None => None,
        };
        // From here on Ctrl-C must not leave a lease behind.
        let stop = stop_signal()?;
        let (uploaded, stdin) = tokio::select! {
            uploaded = self.upload(session, &files) => uploaded?,
            () = stop.cancelled() => return Err(interrupted()),
        };
        if let (Some(nodes), Some(want)) = (self.gang.nodes, &want) {
            let job = self.job(&files, stdin);
            let run = gang::Launch { args: &self, session, stop: &stop, begun, uploaded };
            return run.run(want.clone(), nodes, job).await;
        }
        let ordered = Instant::now();
        let leased = match (want, &self.lease) {
            (None, Some(lease)) => held(session, lease).await?,
            (want, _) => {
                session.client.post("/v1/leases", &LeaseRequest { want, order: None }).await?
            }
        };
        let lease_ms = millis(ordered);
        let mut running = Running { session, leased: &leased, stop: &stop };
        let job = self.job(&files, stdin);
        let claimed = running.claim(job).await;
        if let Err(failure) = claimed {
            running.give_back().await;
            return Err(failure);
        }
        if self.detach {
            let object = json!({
                "lease": leased.lease, "lessor": leased.choice.lessor,
                "lessor_name": leased.choice.name, "rate": leased.choice.rate,
                "worst_case": leased.choice.worst_case, "currency": leased.currency,
                "bytes_uploaded": uploaded, "lease_ms": lease_ms,
            });
            session.out.answer(&object, || format!("{}\n", leased.lease))?;
            session.out.tell(&format!(
                "it runs on {}: `leasehold logs -f {}` follows it, `leasehold lease release` ends \
                 it",
                shown(&leased.choice.name),
                leased.lease.get(..12).unwrap_or(&leased.lease),
            ));
            return Ok(Exit::Ok.code());
        }
        let mut sink = Output::new(session.out, None);
        let told = running.follow(&mut sink).await;
        let Told { end, over, interrupted } = match told {
            Ok(told) => told,
            Err(failure) => {
                running.give_back().await;
                return Err(failure);
            }
        };
        let run_ms = millis(begun);
        let fetched = if interrupted {
            Ok(Vec::new())
        } else {
            self.fetch(session, &leased.lease, &self.output_dir, end.as_ref()).await
        };
        let over = match over {
            Some(over) => Some(over),
            None => running.close(interrupted).await,
        };
        let outcome = outcome(end.as_ref(), over.as_ref());
        let code = exit_code(outcome.as_ref(), interrupted);
        if session.out.json {
            let mut object = Map::new();
            let mut put = |name: &str, value: Value| object.insert(name.into(), value);
            put("lease", leased.lease.clone().into());
            put("lessor", leased.choice.lessor.clone().into());
            put("lessor_name", leased.choice.name.clone().into());
            put("exit_code", json!(outcome.as_ref().and_then(|outcome| outcome.code)));
            put("outcome", json!(outcome));
            put("end", json!(over.as_ref().and_then(|over| over.reason.clone())));
            put("charge", json!(over.as_ref().map(|over| over.charge)));
            put("receipts", json!(over.as_ref().map(|over| over.receipts)));
            put("rate", json!(leased.choice.rate));
            put("worst_case", json!(leased.choice.worst_case));
            put("currency", leased.currency.clone().into());
            put("bytes_uploaded", uploaded.into());
            put("outputs", fetched.as_ref().map_or(Value::Null, |fetched| json!(fetched)));
            put("output_bytes_dropped", json!(end.as_ref().map(|end| end.dropped)));
            put("lease_ms", lease_ms.into());
            put("run_ms", run_ms.into());
            sink.stdout.put("stdout", &mut object);
            sink.stderr.put("stderr", &mut object);
            session.out.object(&Value::Object(object))?;
        } else {
            report(&session.out, &leased, outcome.as_ref(), over.as_ref(), run_ms);
        }
        if let Err(failure) = fetched {
            if session.out.json {
                // The object is out already: only one may stand on standard output.
                session.out.error(&causes(failure.error.as_ref()));
                return Ok(if code == 0 { failure.exit.code() } else { code });
            }
            return Err(if code == 0 { failure } else { failure.with_code(code) });
        }
        Ok(code)
    }

    /// Uploads what the node lacks: how many bytes that was, and what standard input became.
    async fn upload(
        &self,
        session: &Session,
        files: &Files,
    ) -> Result<(u64, Option<PayloadText>), Failure> {
        let uploaded = files.upload(session).await?;
        Ok(match &self.stdin {
            Some(path) if path.as_os_str() == "-" => {
                let payload = transfer::upload_stdin(session).await?;
                (uploaded + payload.size, Some(payload))
            }
            _ => (uploaded, files.stdin.as_ref().map(|local| local.payload.clone())),
        })
    }

    /// Without `--yes` a person must be there to be asked.
    fn check_asking(&self) -> Result<(), Failure> {
        if self.detach && self.output_dir.as_os_str() != "." {
            let message = "a run that is left alone fetches nothing: say --output NAME without \
                --output-dir, and `leasehold outputs LEASE --output-dir DIR` once it has ended";
            return Err(Failure::say(Exit::Usage, message));
        }
        if self.want.is_none() && self.lease.is_none() {
            let message = "say what is wanted with --max-price and --budget, or which lease to \
                use with --lease";
            return Err(Failure::say(Exit::Usage, message));
        }
        // What a lease that was requested before costs was agreed to then.
        if self.yes || self.want.is_none() {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            let message = "there is no terminal to ask on whether the plan is right: say --yes to \
                accept any plan within --max-price and --budget";
            return Err(Failure::say(Exit::Usage, message));
        }
        if self.stdin.as_ref().is_some_and(|path| path.as_os_str() == "-") {
            let message = "--stdin - takes the terminal that the question would be asked on: say \
                --yes as well";
            return Err(Failure::say(Exit::Usage, message));
        }
        Ok(())
    }

    async fn files(&self, session: &Session) -> Result<Files, Failure> {
        self.check_program()?;
        let program = transfer::hash(&self.program).await?;
        let (mut inputs, mut files, mut directories) = (Vec::new(), Vec::new(), Vec::new());
        for (name, path) in &self.input {
            let path: &Path = path.as_ref();
            let (payload, index) = if path.is_dir() {
                let directory = directory::hash(session, path).await?;
                let found = (directory.local.payload.clone(), Some(directory.index.size()));
                directories.push(directory);
                found
            } else {
                let local = transfer::hash(path).await?;
                let payload = local.payload.clone();
                files.push(local);
                (payload, None)
            };
            let PayloadText { root, size } = payload;
            inputs.push(InputText { name: name.clone(), root, size, index });
        }
        let stdin = match &self.stdin {
            Some(path) if path.as_os_str() != "-" => Some(transfer::hash(path).await?),
            _ => None,
        };
        let files = Files { program, inputs, files, directories, stdin };
        // What breaks a rule is said before anything is leased.
        let stdin = files.stdin.as_ref().map(|local| local.payload.clone());
        self.job(&files, stdin).parse().map_err(|why| Failure::new(Exit::Usage, why))?;
        Ok(files)
    }

    /// What can be told from the first bytes is told before anything is leased.
    fn check_program(&self) -> Result<(), Failure> {
        use std::io::Read as _;
        let wasm = self.want.as_ref().is_none_or(|want| want.runtime == "wasm");
        let mut first = [0; 4];
        let read = std::fs::File::open(&self.program).and_then(|mut file| file.read(&mut first));
        if wasm && read.is_ok() && first != *b"\0asm" {
            let message = format!(
                "{} is not WebAssembly: build it for wasm32-wasip1 (WASI preview 1)",
                self.program.display()
            );
            return Err(Failure::say(Exit::Usage, message));
        }
        Ok(())
    }

    fn job(&self, files: &Files, stdin: Option<PayloadText>) -> JobText {
        JobText {
            runtime: self.want.as_ref().map_or_else(|| "wasm".into(), |want| want.runtime.clone()),
            program: files.program.payload.clone(),
            args: self.args.clone(),
            env: self.env.iter().cloned().collect(),
            stdin,
            inputs: files.inputs.clone(),
            outputs: self.output.clone(),
            // Attached, the lease is given back once the outputs are here.
            release_after: self.detach,
        }
    }

    /// Fetches the declared outputs that the job wrote.
    async fn fetch(
        &self,
        session: &Session,
        lease: &str,
        dir: &Path,
        end: Option<&End>,
    ) -> Result<Vec<Value>, Failure> {
        let mut fetched = Vec::new();
        for name in &self.output {
            // Only what was declared here is taken, under the name that was declared here.
            let written = end.and_then(|end| end.outputs.iter().find(|file| file.name == *name));
            let Some(file) = written else {
                session.out.warn(&format!("the program did not write /out/{name}"));
                continue;
            };
            let payload = PayloadText::of(&file.payload);
            let path = transfer::download(session, lease, name, &payload, dir).await?;
            fetched.push(transfer::line(name, &path, &payload));
        }
        Ok(fetched)
    }
}

/// Shows the plan; without a choice there is none. Who asks for JSON sees it only to agree to it.
fn show(session: &Session, want: &WantArgs, plan: &Plan, agreed: bool) -> Result<(), Failure> {
    let against = |against: &crate::api::body::AgainstLine| {
        format!("{}: {}", shown(&against.name), shown(&against.reasons.join("; ")))
    };
    let Some(best) = plan.choices.first() else {
        let message = "no host that is up offers what is asked for";
        let more = plan.against.iter().take(20).map(against).collect();
        return Err(Failure::say(Exit::Policy, message).with_more(more));
    };
    if session.out.json && agreed {
        return Ok(());
    }
    let currency = &plan.currency;
    let (max_price, budget) = want.limits();
    let others: Vec<_> = plan
        .choices
        .iter()
        .skip(1)
        .map(|other| format!("{} at {}", other.name, other.rate))
        .collect();
    let mut else_ = if others.is_empty() { "nobody".into() } else { others.join(", ") };
    if plan.unsampled > 0 {
        else_.push_str(&format!(", {} more that fit", plan.unsampled));
    }
    if !plan.against.is_empty() {
        let not = plan.against.len();
        else_.push_str(&format!("; {not} cannot (`leasehold explain` says why)"));
    }
    session.out.tell(&session.out.bold("plan"));
    session.out.tell(&page(&[
        ("  host", format!("{} (…{})", best.name, short_key(&best.lessor))),
        ("  price", format!("{} {currency}/h (limit {max_price})", best.rate)),
        ("  at most", format!("{} {currency} in all (budget {budget})", best.worst_case)),
        ("  why", best.why.clone()),
        ("  else", else_),
    ]));
    Ok(())
}

/// A lease that this node holds, as if it had just been granted.
async fn held(session: &Session, lease: &str) -> Result<Leased, Failure> {
    let id = find::lease(session, lease).await?;
    let line: LeaseLine = session.client.get(&format!("/v1/leases/{id}")).await?;
    if line.side != Side::Held {
        let message = format!("lease {lease} was granted by this node: it is another's to use");
        return Err(Failure::say(Exit::Policy, message));
    }
    let worst_case = line.worst_case.unwrap_or(line.charge);
    let choice = ChoiceLine {
        name: short_key(&line.lessor),
        lessor: line.lessor,
        offer: String::new(),
        rate: line.rate,
        worst_case,
        score: 0,
        why: "requested before".into(),
    };
    let (order, currency) = (line.order, line.currency);
    Ok(Leased { lease: id, order, choice, heard: Vec::new(), currency })
}

/// Asks on the terminal.
async fn agreed() -> bool {
    let _ = write!(std::io::stderr(), "go ahead? [y/N] ");
    let _ = std::io::stderr().flush();
    let line = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line)
    });
    match line.await {
        Ok(Ok(line)) => matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"),
        _ => false,
    }
}

/// Cancelled by the first SIGINT or SIGTERM; a second one ends the process at once.
fn stop_signal() -> Result<CancellationToken, Failure> {
    let failed = |why| Failure::say(Exit::Io, format!("cannot listen for signals: {why}"));
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            if first {
                stopped.cancel();
            }
        }
        // Not through the runtime: it may be held by a write to a terminal that stands still.
        std::process::exit((SIGNALLED + 2).into());
    });
    Ok(stop)
}

fn interrupted() -> Failure {
    Failure::say(Exit::No, "interrupted: nothing was leased").with_code(SIGNALLED + 2)
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Where the program's output goes: through, line by line behind a label where several write at
/// once, or with `--json` into the object.
struct Output {
    out: Out,
    label: Option<String>,
    stdout: Kept,
    stderr: Kept,
    /// Lines that are not whole yet.
    begun: [Vec<u8>; 2],
}

impl Output {
    fn new(out: Out, label: Option<String>) -> Self {
        let (stdout, stderr) = (Kept::default(), Kept::default());
        Self { out, label, stdout, stderr, begun: [Vec::new(), Vec::new()] }
    }

    /// Whole lines with the label before each; what is left waits for its end.
    fn labelled(&mut self, which: usize, bytes: &[u8], end: bool) -> Vec<u8> {
        let Some(label) = &self.label else { return bytes.to_vec() };
        let Some(begun) = self.begun.get_mut(which) else { return Vec::new() };
        begun.extend_from_slice(bytes);
        let whole = match begun.iter().rposition(|byte| *byte == b'\n') {
            _ if end || begun.len() > MAX_LINE => begun.len(),
            Some(at) => at + 1,
            None => 0,
        };
        let mut lines = Vec::new();
        for line in begun.drain(..whole).as_slice().split_inclusive(|byte| *byte == b'\n') {
            lines.extend_from_slice(label.as_bytes());
            lines.extend_from_slice(line);
            if !line.ends_with(b"\n") {
                lines.push(b'\n');
            }
        }
        lines
    }

    /// Nothing more comes: what is left is written.
    fn finish(&mut self) -> Result<(), Failure> {
        let (stdout, stderr) = (self.labelled(0, &[], true), self.labelled(1, &[], true));
        if !stdout.is_empty() {
            self.out.data(&stdout)?;
        }
        if stderr.is_empty() { Ok(()) } else { self.out.raw_stderr(&stderr) }
    }
}

impl Sink for Output {
    fn stdout(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.out.json {
            self.stdout.take(bytes);
            return Ok(());
        }
        let bytes = self.labelled(0, bytes, false);
        self.out.data(&bytes)
    }

    fn stderr(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.out.json {
            self.stderr.take(bytes);
            return Ok(());
        }
        let bytes = self.labelled(1, bytes, false);
        self.out.raw_stderr(&bytes)
    }
}

/// A lease in use.
struct Running<'a> {
    session: &'a Session,
    leased: &'a Leased,
    stop: &'a CancellationToken,
}

/// What following a job came to.
struct Told {
    end: Option<End>,
    over: Option<EndLine>,
    interrupted: bool,
}

impl Running<'_> {
    async fn claim(&mut self, job: JobText) -> Result<(), Failure> {
        let path = format!("/v1/leases/{}/claim", self.leased.lease);
        let mut tries = 3;
        loop {
            let claimed: Result<Claimed, _> =
                self.session.client.post(&path, &ClaimRequest { job: job.clone() }).await;
            match claimed {
                Ok(_) => return Ok(()),
                // The same claim again is the same act: it cannot start a second job.
                Err(error) if error.may_pass() && tries > 1 => {
                    tries -= 1;
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Follows the job until it has ended, or the lease has, or somebody pressed Ctrl-C and the
    /// lease is given back.
    async fn follow(&mut self, sink: &mut Output) -> Result<Told, Failure> {
        let (client, lease) = (&self.session.client, &self.leased.lease);
        let mut told = Told { end: None, over: None, interrupted: false };
        let mut output = std::pin::pin!(follow::output(client, lease, sink));
        let mut over = std::pin::pin!(follow::end(client, lease));
        tokio::select! {
            end = &mut output => told.end = end?,
            line = &mut over => {
                told.over = Some(line?);
                // What it wrote last may still be on its way.
                if let Ok(end) = timeout(LATE, &mut output).await {
                    told.end = end.unwrap_or_default();
                }
            }
            () = self.stop.cancelled() => {
                told.interrupted = true;
                self.session.out.tell("interrupted: giving the lease back; again to leave at once");
                self.give_back().await;
                if let Ok(line) = timeout(CLOSING, &mut over).await {
                    told.over = line.ok();
                }
                return Ok(told);
            }
        }
        if told.end.is_none() && told.over.is_none() {
            // There is nothing to follow any more, so the lease is over or soon will be.
            told.over = timeout(CLOSING, &mut over).await.ok().transpose()?;
        }
        Ok(told)
    }

    /// Releases the lease; what fails is said, and the lease ends by itself at its term.
    async fn give_back(&self) {
        let path = format!("/v1/leases/{}/release", self.leased.lease);
        let mut tries = 5;
        loop {
            match self.session.client.post::<Released>(&path, &json!({})).await {
                Ok(_) => return,
                Err(error) if error.may_pass() && tries > 1 => {
                    tries -= 1;
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                Err(error) => {
                    self.session.out.warn(&format!(
                        "lease {} could not be given back: {error}; it ends at its term, or by \
                         `leasehold lease release`",
                        self.leased.lease
                    ));
                    return;
                }
            }
        }
    }

    /// Gives the lease back and waits for its final receipt.
    async fn close(&self, released: bool) -> Option<EndLine> {
        if !released {
            self.give_back().await;
        }
        let ended = timeout(CLOSING, follow::end(&self.session.client, &self.leased.lease)).await;
        match ended {
            Ok(Ok(line)) => Some(line),
            Ok(Err(error)) => {
                self.session.out.warn(&format!("the lease's end is not known: {error}"));
                None
            }
            Err(_) => {
                let lease = &self.leased.lease;
                self.session.out.warn(&format!(
                    "the lease's final receipt did not come within {} s: `leasehold lease show \
                     {lease}` will have it",
                    CLOSING.as_secs()
                ));
                None
            }
        }
    }
}

fn outcome(end: Option<&End>, over: Option<&EndLine>) -> Option<OutcomeLine> {
    let by_output = end.map(|end| OutcomeLine::from(&end.outcome));
    by_output.or_else(|| over.and_then(|over| over.outcome.clone()))
}

/// The program's own code; 130 when interrupted, 1 when it was ended otherwise or its code does
/// not fit.
fn exit_code(outcome: Option<&OutcomeLine>, interrupted: bool) -> u8 {
    if interrupted {
        return SIGNALLED + 2;
    }
    let code = outcome.and_then(|outcome| outcome.code);
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Says how it ended and what it cost.
fn report(
    out: &Out,
    leased: &Leased,
    outcome: Option<&OutcomeLine>,
    over: Option<&EndLine>,
    run_ms: u64,
) {
    match outcome {
        Some(outcome) if outcome.code == Some(0) => {}
        Some(outcome) => out.warn(&format!("the program {}", outcome.text)),
        None => {
            let reason = over.and_then(|over| over.reason.as_deref()).unwrap_or("unknown");
            out.warn(&format!("how the program ended is not known; the lease ended: {reason}"));
        }
    }
    let Some(over) = over else { return };
    let receipts = if over.receipts == 1 { "receipt" } else { "receipts" };
    out.tell(&format!(
        "cost {} {} on {} in {}, {} {receipts}; proof: leasehold lease export {} --out FILE",
        over.charge,
        leased.currency,
        shown(&leased.choice.name),
        span(run_ms),
        over.receipts,
        leased.lease.get(..12).unwrap_or(&leased.lease),
    ));
}

#[cfg(test)]
mod tests {
    use leasehold_proto::words::usage::Outcome;

    use super::*;

    #[test]
    fn it_ends_as_the_program_did() {
        let code = |outcome: &Outcome| exit_code(Some(&OutcomeLine::from(outcome)), false);
        assert_eq!(code(&Outcome::Exited(0)), 0);
        assert_eq!(code(&Outcome::Exited(42)), 42);
        assert_eq!(code(&Outcome::Exited(256)), 1, "never 0 by wrapping round");
        assert_eq!(code(&Outcome::Exited(-1)), 1);
        assert_eq!(code(&Outcome::OutOfMemory), 1);
        assert_eq!(exit_code(None, false), 1, "an unknown end is no success");
        assert_eq!(exit_code(Some(&OutcomeLine::from(&Outcome::Exited(0))), true), 130);
    }
}
