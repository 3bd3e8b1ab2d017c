//! The command line: what there is, and how an answer or a failure is written.
//!
//! On standard output stands data and nothing else: text, or with `--json` exactly one object.
//! Messages go to standard error. The exit code says what happened ([`Exit`]).

mod draft;
mod key;
mod object;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand};
use leasehold_keys::disk::{Existing, ReadError, WriteError};
use leasehold_keys::exit::Exit;
use leasehold_keys::passphrase::{PassphraseError, Source};
use leasehold_keys::{armor, file, issue, text};
use leasehold_proto::Wall;
use serde_json::{Value, json};

/// Keys and signatures of a Leasehold fabric, on a machine without a network.
#[derive(Debug, Parser)]
#[command(name = "leasehold-keys", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 ok, 1 a check said no, 2 usage, 3 input or output, \
    4 locked or wrong passphrase, 5 refused by policy, 7 exists already.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print one JSON object
    #[arg(long, global = true)]
    json: bool,
    /// Take this as the time (2026-11-24T00:00:00Z, or milliseconds since 1970)
    #[arg(long, global = true, value_name = "TIME", value_parser = text::wall)]
    now: Option<Wall>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a key and print its id
    New(key::New),
    /// Show a key file's id and protection, without its passphrase
    Show(key::Show),
    /// Take a key of another tool (PKCS#8) into a key file
    Import(key::Import),
    /// Write a key for another tool (PKCS#8), in clear
    Export(key::Export),
    /// Print any signed object, draft or proof as a person reads it
    Inspect(object::Inspect),
    /// Sign a charter, certificate, mandate, order or reinstatement, after showing it
    Sign(object::Sign),
    /// Check a proof or signed objects, with no network and no node
    Verify(object::Verify),
    /// Drafts of charters
    #[command(subcommand)]
    Charter(draft::CharterCommand),
    /// Drafts of certificates
    #[command(subcommand)]
    Certificate(draft::CertificateCommand),
    /// Drafts of mandates
    #[command(subcommand)]
    Mandate(draft::MandateCommand),
    /// Drafts of reinstatements
    #[command(subcommand)]
    Reinstatement(draft::ReinstatementCommand),
}

/// Where a passphrase comes from; asked on the terminal when nothing is said.
#[derive(Debug, Args)]
#[group(multiple = false)]
struct Unlock {
    /// Read the passphrase from the first line of this file (mode 0600)
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// Read the passphrase from this open file descriptor
    #[arg(long, value_name = "N")]
    passphrase_fd: Option<u32>,
}

impl Unlock {
    fn source(&self) -> Source {
        match (&self.passphrase_file, self.passphrase_fd) {
            (Some(path), _) => Source::File(path.clone()),
            (None, Some(number)) => Source::Descriptor(number),
            (None, None) => Source::Terminal,
        }
    }
}

/// How a new key file is protected.
#[derive(Debug, Args)]
struct Protect {
    #[command(flatten)]
    unlock: Unlock,
    /// Store the key in clear: whoever reads the file has the key
    #[arg(long, conflicts_with_all = ["passphrase_file", "passphrase_fd", "strong"])]
    no_passphrase: bool,
    /// For a node, which starts unattended: store it in clear, as --no-passphrase does
    #[arg(long, conflicts_with_all = ["passphrase_file", "passphrase_fd", "strong"])]
    node: bool,
    /// Make guessing the passphrase cost 2 GiB of memory a try instead of 64 MiB
    #[arg(long)]
    strong: bool,
}

impl Protect {
    fn protection(&self, what: &str) -> Result<file::Protection, Failure> {
        if self.node || self.no_passphrase {
            return Ok(file::Protection::Clear);
        }
        let chosen = self.unlock.source().choose(what);
        let passphrase = chosen.map_err(|why| match why {
            // A key that does not exist yet is not locked: the command line lacks something.
            PassphraseError::NoTerminal(_) => Failure::new(
                Exit::Usage,
                anyhow::anyhow!(
                    "no terminal to ask for a passphrase on: give --passphrase-file FILE, \
                     --passphrase-fd N or --no-passphrase"
                ),
            ),
            other => other.into(),
        })?;
        let kdf = if self.strong { file::Kdf::STRONG } else { file::Kdf::DEFAULT };
        Ok(file::Protection::Passphrase(passphrase, kdf))
    }
}

/// What a command has to say in the end.
#[derive(Debug)]
struct Answer {
    text: String,
    json: Value,
    exit: Exit,
}

impl Answer {
    const fn new(text: String, json: Value) -> Self {
        Self { text, json, exit: Exit::Ok }
    }
}

/// Why a command failed.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    error: anyhow::Error,
    /// The object that says so with `--json`, where a command has its own.
    json: Option<Value>,
}

impl Failure {
    fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), json: None }
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
    armor::ArmorError armor::SaveError file::CreateError file::LoadError issue::IssueError
    issue::NotSignable PassphraseError ReadError WriteError
}

const fn existing(force: bool) -> Existing {
    if force { Existing::Replace } else { Existing::Keep }
}

/// Says something to the person, on standard error.
fn tell(message: &str) {
    // Where standard error is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{}", message.trim_end());
}

/// Runs one command and writes its answer.
pub(crate) fn run(cli: Cli) -> Exit {
    let Cli { command, json, now } = cli;
    if let Some(now) = now {
        tell(&format!("warning: taking {now} as the time, not the clock's"));
    }
    let now = now.unwrap_or_else(clock);
    let result = match command {
        Command::New(args) => args.run(),
        Command::Show(args) => args.run(),
        Command::Import(args) => args.run(),
        Command::Export(args) => args.run(),
        Command::Inspect(args) => args.run(now),
        Command::Sign(args) => args.run(now),
        Command::Verify(args) => args.run(now),
        Command::Charter(args) => args.run(now),
        Command::Certificate(args) => args.run(now),
        Command::Mandate(args) => args.run(now),
        Command::Reinstatement(args) => args.run(now),
    };
    let (text, value, exit) = match result {
        Ok(answer) => (answer.text, answer.json, answer.exit),
        Err(Failure { exit, error, json }) => {
            let message = text::causes(error.as_ref());
            tell(&format!("error: {}", text::shown(&message)));
            let code = exit.code();
            let value = json.unwrap_or_else(|| json!({ "error": message, "exit": code }));
            (String::new(), value, exit)
        }
    };
    let data = if json { text::json(&value) + "\n" } else { text };
    let mut out = std::io::stdout().lock();
    match out.write_all(data.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => exit,
        Err(why) => {
            tell(&format!("error: cannot write the answer: {why}"));
            if exit == Exit::Ok { Exit::Io } else { exit }
        }
    }
}

fn clock() -> Wall {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Wall(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
