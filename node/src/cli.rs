//! The `leasehold` command line: what there is, how an answer or a failure is written, and how a
//! command finds its node.
//!
//! On standard output stands data and nothing else: text, or with `--json` one object. Messages,
//! tables of a plan and progress go to standard error. The exit code says what happened
//! ([`Exit`]); `run` exits with the program's own.

mod api_key;
mod blob;
mod directory;
mod explain;
mod find;
mod follow;
pub mod init;
pub mod join;
mod lease;
mod logs;
mod model;
mod nodes;
mod offers;
mod operator;
mod order;
mod output;
mod outputs;
mod ps;
mod quarantine;
mod receipts;
mod replay;
mod run;
mod transfer;
pub mod up;
mod verify;
mod want;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use leasehold_keys::exit::Exit;
use leasehold_keys::{armor, disk, text};
use serde_json::{Value, json};

use self::output::{Color, Out};
use crate::api::body::NodeInfo;
use crate::api::token::TokenError;
use crate::client::{Client, ClientError, DEFAULT_API};
use crate::home::Home;
use crate::work::Exec;

/// Lease idle capacity of a fabric's hosts, run programs there, and keep proof of what was used.
#[derive(Debug, Parser)]
#[command(name = "leasehold", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 ok, 1 a check said no, 2 usage, 3 input or output, \
    4 locked or wrong passphrase, 5 refused by policy, 6 remote or network, 7 conflict; \
    `run` exits with the program's own.")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// The API of the node to talk to
    #[arg(long, global = true, value_name = "URL", env = "LEASEHOLD_API",
        default_value = DEFAULT_API)]
    pub(crate) api: String,
    /// The node's directory [default: ~/.local/share/leasehold]
    #[arg(long, global = true, value_name = "DIR", env = "LEASEHOLD_DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Read the API's token from this file (mode 0600)
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Colours: off also where NO_COLOR is set
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    color: Color,
}

impl Global {
    /// The node's directory, as said or by default; none where there is no home directory.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let set =
            |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let data = || set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")));
        self.dir.clone().or_else(|| Some(data()?.join("leasehold")))
    }

    /// The node's directory, as a home.
    fn home(&self) -> Result<Home, Failure> {
        let message = "there is no home directory: say where the node lives with --dir DIR";
        let dir = self.directory().ok_or_else(|| Failure::say(Exit::Usage, message))?;
        Ok(Home::at(dir))
    }

    /// How a command writes.
    pub(crate) fn out(&self) -> Out {
        Out::new(self.json, self.color)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Found a fabric and make this host its first node
    Init(init::Init),
    /// Make this host a node of a fabric that exists
    Join(join::Join),
    /// Run the node
    Up(Box<up::Up>),
    /// List the nodes that the node knows
    Nodes(nodes::Nodes),
    /// List what is offered, and at what price
    Offers(offers::Offers),
    /// Run a program on leased capacity
    Run(Box<run::Run>),
    /// Orders for a lessee to sign elsewhere
    #[command(subcommand)]
    Order(order::Order),
    /// Request, show, list, renew, release, revoke and export leases
    #[command(subcommand)]
    Lease(lease::Lease),
    /// Take slack capacity back, cheapest credit first
    Reclaim(operator::Reclaim),
    /// Grant and renew nothing any more, and empty the host
    Drain(operator::Drain),
    /// End a drain or reclaim
    Resume(operator::Resume),
    /// Keys that were convicted of saying two different things
    #[command(subcommand)]
    Quarantine(quarantine::Quarantine),
    /// List jobs that run on the node or under leases it holds
    Ps(ps::Ps),
    /// Print a job's output
    Logs(logs::Logs),
    /// Fetch what a job left behind
    Outputs(outputs::Outputs),
    /// Import, get, export, list, pin, verify and remove payloads
    #[command(subcommand)]
    Blob(blob::Blob),
    /// Pull, add, price, list and remove the models of this node
    #[command(subcommand)]
    Model(model::Model),
    /// List the models that can be asked through this node
    Models(model::Models),
    /// Make, list and remove keys for the models' API
    #[command(subcommand)]
    ApiKey(api_key::ApiKey),
    /// List the receipts of a lease
    Receipts(receipts::Receipts),
    /// Check proofs and signed objects, with no node and no network
    Verify(verify::Verify),
    /// Say per host what speaks for and against it
    Explain(explain::Explain),
}

/// A command came to nothing.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) error: anyhow::Error,
    /// More lines for a person.
    more: Vec<String>,
    /// The figures, with `--json`.
    detail: Value,
    /// The exit code of a program that ran, where it is not one of ours.
    code: Option<u8>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), more: Vec::new(), detail: Value::Null, code: None }
    }

    /// A failure in words.
    pub(crate) fn say(exit: Exit, message: impl Into<String>) -> Self {
        Self::new(exit, anyhow::Error::msg(message.into()))
    }

    fn with_more(mut self, more: Vec<String>) -> Self {
        self.more = more;
        self
    }

    /// A file that cannot be read or written.
    fn file(doing: &str, path: &std::path::Path, why: &std::io::Error) -> Self {
        Self::say(Exit::Io, format!("{doing} {}: {why}", path.display()))
    }

    /// The same, ending with another exit code.
    const fn with_code(mut self, code: u8) -> Self {
        self.code = Some(code);
        self
    }
}

macro_rules! failures {
    ($($error:ty)*) => { $( impl From<$error> for Failure {
        fn from(error: $error) -> Self {
            Self::new(error.exit(), error)
        }
    } )* };
}
failures! {
    armor::ArmorError armor::SaveError disk::ReadError disk::WriteError
    init::InitError join::JoinError up::UpError
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let mut failure = Self::new(error.exit(), anyhow::Error::msg(error.to_string()));
        if let ClientError::Answer { inside, .. } = error {
            failure.more = said_against(&inside.detail);
            failure.detail = inside.detail;
        }
        failure
    }
}

impl From<TokenError> for Failure {
    fn from(error: TokenError) -> Self {
        let exit = match &error {
            TokenError::Read(why) => why.exit(),
            TokenError::Write(why) => why.exit(),
            _ => Exit::Io,
        };
        Self::new(exit, error)
    }
}

/// What spoke against each host, as the API's `detail` has it.
fn said_against(detail: &Value) -> Vec<String> {
    let text = |value: &Value| text::shown(value.as_str().unwrap_or_default());
    let mut lines = Vec::new();
    for line in detail["against"].as_array().into_iter().flatten().take(20) {
        let reasons = line["reasons"].as_array().into_iter().flatten().map(text);
        let reasons = reasons.collect::<Vec<_>>().join("; ");
        lines.push(format!("{}: {reasons}", text(&line["name"])));
    }
    for line in detail["heard"].as_array().into_iter().flatten().take(20) {
        let said = line["reason"].as_str().map_or("no answer", |reason| reason);
        let (name, detail) = (text(&line["name"]), text(&line["detail"]));
        lines.push(format!("{name}: {}: {detail}", text::shown(said)));
    }
    lines
}

/// What a command talks to and writes with.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) out: Out,
    pub(crate) client: Client,
}

impl Session {
    fn open(global: &Global) -> Result<Self, Failure> {
        Ok(Self { out: global.out(), client: find::client(global)? })
    }

    /// Says so where the node grants nothing, and why.
    async fn warn_if_halted(&self) -> Result<(), Failure> {
        let node: NodeInfo = self.client.get("/v1/node").await?;
        if let Some(why) = node.halted {
            self.out.warn(&format!("this node grants nothing: {why}"));
        }
        Ok(())
    }
}

/// Runs one command line. `exec` says how this executable starts itself again for a job's
/// processes; `args` are the process's, its name first.
pub fn main(args: impl Iterator<Item = OsString>, exec: Exec) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are data and go to standard output, with exit code 0.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Ok.into() };
        }
    };
    let out = cli.global.out();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(dispatch(cli, exec));
            // A blocked read of standard input must not hold the process.
            runtime.shutdown_background();
            result
        }
        Err(why) => Err(Failure::say(Exit::Io, format!("cannot start threads: {why}"))),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.error.is::<output::Closed>() => Exit::Ok.into(),
        Err(failure) => {
            let message = text::causes(failure.error.as_ref());
            out.error(&message);
            for line in &failure.more {
                out.tell(&format!("  {line}"));
            }
            let code = failure.code.unwrap_or(failure.exit.code());
            if out.json {
                let value = json!({ "error": message, "exit": code, "detail": failure.detail });
                // The exit code says it as well where nobody reads this any more.
                let _ = out.object(&value);
            }
            ExitCode::from(code)
        }
    }
}

fn init(args: &init::Init, global: &Global) -> Result<Exit, Failure> {
    let (out, founded) = (global.out(), args.run(&global.home()?)?);
    out.answer(&founded, || {
        output::page(&[
            ("directory", founded.dir.display().to_string()),
            ("fabric", founded.fabric.clone()),
            ("node", founded.node.clone()),
            ("lessee", founded.lessee.clone()),
        ])
    })?;
    out.tell("start it with `leasehold up`; others join by the charter and the fabric's id");
    Ok(Exit::Ok)
}

fn join(args: &join::Join, global: &Global) -> Result<Exit, Failure> {
    let (out, joined) = (global.out(), args.run(&global.home()?)?);
    out.answer(&joined, || {
        let mut lines = vec![
            ("directory", joined.dir.display().to_string()),
            ("fabric", joined.fabric.clone()),
            ("node", joined.node.clone()),
        ];
        lines.extend(joined.request.as_ref().map(|path| ("request", path.display().to_string())));
        output::page(&lines)
    })?;
    out.tell(if joined.ready {
        "start it with `leasehold up`"
    } else {
        "let the organisation sign the request with `leasehold-keys sign`, then run `leasehold \
         join --certificate FILE`"
    });
    Ok(Exit::Ok)
}

/// Runs the command and gives the process's exit code.
async fn dispatch(cli: Cli, exec: Exec) -> Result<u8, Failure> {
    let Cli { global, command } = cli;
    let exit = match command {
        Command::Init(args) => init(&args, &global)?,
        Command::Join(args) => join(&args, &global)?,
        Command::Up(args) => {
            args.run(&global.home()?, exec).await?;
            Exit::Ok
        }
        Command::Verify(args) => args.run(&global.out())?,
        Command::Nodes(args) => args.run(&Session::open(&global)?).await?,
        Command::Offers(args) => args.run(&Session::open(&global)?).await?,
        Command::Order(args) => args.run(&Session::open(&global)?).await?,
        Command::Lease(args) => args.run(&Session::open(&global)?).await?,
        Command::Reclaim(args) => args.run(&Session::open(&global)?).await?,
        Command::Drain(args) => args.run(&Session::open(&global)?).await?,
        Command::Resume(args) => args.run(&Session::open(&global)?).await?,
        Command::Quarantine(args) => args.run(&Session::open(&global)?).await?,
        Command::Ps(args) => args.run(&Session::open(&global)?).await?,
        Command::Logs(args) => args.run(&Session::open(&global)?).await?,
        Command::Outputs(args) => args.run(&Session::open(&global)?).await?,
        Command::Blob(args) => args.run(&Session::open(&global)?).await?,
        Command::Model(args) => args.run(&Session::open(&global)?).await?,
        Command::Models(args) => args.run(&Session::open(&global)?).await?,
        Command::ApiKey(args) => args.run(&Session::open(&global)?).await?,
        Command::Receipts(args) => args.run(&Session::open(&global)?).await?,
        Command::Explain(args) => args.run(&Session::open(&global)?).await?,
        Command::Run(args) => return args.run(&Session::open(&global)?).await,
    };
    Ok(exit.code())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_the_readme_shows_is_understood() {
        for line in [
            "leasehold nodes --json",
            "leasehold --api http://127.0.0.1:9 offers",
            "leasehold run --cpu 1 --memory 256M --disk 64M --ttl 60s --max-price 0.05/h \
             --budget 0.01 --input a=/x --stdin - --env K=V --output o --output-dir d \
             --label k=v --on n --yes p.wasm -- a -b --c",
            "leasehold run --max-price 1 --budget 1 -d p.wasm",
            "leasehold order new --max-price 1 --budget 1 --lessee k --certificate c --out f",
            "leasehold lease request --order f",
            "leasehold lease request --max-price 1 --budget 1",
            "leasehold lease show abcd",
            "leasehold lease list --all",
            "leasehold lease release abcd",
            "leasehold lease export abcd --out f",
            "leasehold ps",
            "leasehold logs abcd -f --stderr",
            "leasehold receipts abcd",
            "leasehold verify f",
            "leasehold explain --max-price 1 --budget 1",
            "leasehold blob import a b -",
            "leasehold blob get \
             ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f -o -",
            "leasehold blob export abcd f",
            "leasehold blob list --json",
            "leasehold blob stat abcd",
            "leasehold blob pin abcd efgh",
            "leasehold blob unpin abcd",
            "leasehold blob verify",
            "leasehold blob rm abcd --force",
        ] {
            assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err());
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "leasehold",
            "leasehold dance",
            "leasehold run p.wasm",
            "leasehold run --max-price x --budget 1 p.wasm",
            "leasehold run --max-price 1 --budget 1 --cpu lots p.wasm",
            "leasehold run --max-price 1 --budget 1 --input nofile p.wasm",
            "leasehold run --max-price 1 --budget 1 p.wasm arg",
            "leasehold lease request --order f --max-price 1",
            "leasehold lease export abcd",
            "leasehold blob",
            "leasehold blob get abcd",
            "leasehold blob import",
            "leasehold blob rm",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn what_hosts_said_becomes_lines() {
        let detail = json!({
            "against": [{ "name": "a\u{1b}[2J", "reasons": ["too small", "too dear"] }],
            "heard": [{ "name": "b", "reason": "capacity", "detail": "cpu" }, { "name": "c" }],
        });
        let lines = said_against(&detail);
        assert_eq!(lines.len(), 3);
        assert!(lines[0].ends_with(": too small; too dear") && !lines[0].contains('\u{1b}'));
        assert_eq!(lines[1], "b: capacity: cpu");
        assert!(lines[2].starts_with("c: no answer"));
        assert!(said_against(&Value::Null).is_empty());
    }
}
