//! `leasehold-keys` as a person meets it: the real binary, its exit codes, what it says on
//! standard error, and that nothing but data stands on standard output.

#[path = "../../../proto/tests/common/story.rs"]
mod story;

mod ceremony;
mod key_files;
mod objects;
mod proofs;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use leasehold_keys::armor::{self, Item};
use leasehold_keys::disk::Existing;
use leasehold_keys::file::{self, Protection, Secret};
use zeroize::Zeroizing;

/// A directory to work in.
struct Desk {
    dir: tempfile::TempDir,
}

/// How a run of the binary ended.
#[derive(Debug)]
struct Run {
    code: i32,
    out: String,
    err: String,
}

impl Desk {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file with mode 0600.
    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        let bytes = bytes.as_ref();
        leasehold_keys::disk::write_atomic(&path, bytes, 0o600, Existing::Replace)
            .expect("written");
        path
    }

    fn objects(&self, name: &str, items: &[Item]) {
        armor::write_objects(&self.path(name), items, Existing::Replace).expect("written");
    }

    /// A node's key file from a seed.
    fn key(&self, name: &str, seed: [u8; 32]) {
        let secret = Secret::from_seed(Zeroizing::new(seed));
        file::create(&self.path(name), &secret, &Protection::Clear, Existing::Replace)
            .expect("created");
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect("read")
    }

    /// Runs the binary with `line` split at spaces.
    fn run(&self, line: &str) -> Run {
        self.run_with(line, None)
    }

    /// The same with something on standard input.
    fn run_with(&self, line: &str, input: Option<&str>) -> Run {
        let command = Command::new(env!("CARGO_BIN_EXE_leasehold-keys"));
        self.finish(command, line, input)
    }

    /// The same where there is no terminal to ask on: in a session of its own, if this one has a
    /// terminal.
    fn run_without_terminal(&self, line: &str) -> Run {
        if std::fs::File::open("/dev/tty").is_err() {
            return self.run(line);
        }
        let mut command = Command::new("setsid");
        command.arg("--wait").arg(env!("CARGO_BIN_EXE_leasehold-keys"));
        self.finish(command, line, None)
    }

    fn finish(&self, mut command: Command, line: &str, input: Option<&str>) -> Run {
        let mut child = command
            .args(line.split_whitespace())
            .current_dir(self.dir.path())
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(input.as_bytes()).expect("written");
        }
        let output = child.wait_with_output().expect("the binary ends");
        Run {
            code: output.status.code().expect("no signal"),
            out: String::from_utf8(output.stdout).expect("text"),
            err: String::from_utf8(output.stderr).expect("text"),
        }
    }
}

impl Run {
    /// It succeeded; gives standard output.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// It failed with `code`, said `text`, and printed no data.
    #[track_caller]
    fn fails(self, code: i32, text: &str) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(text), "expected {text:?} in {self:?}");
        assert!(self.out.is_empty(), "{self:?}");
    }

    /// Standard output is exactly one JSON object.
    #[track_caller]
    fn json(&self) -> serde_json::Value {
        assert_eq!(self.out.lines().count(), 1, "{self:?}");
        let value: serde_json::Value = serde_json::from_str(&self.out).expect("JSON");
        assert!(value.is_object());
        value
    }
}

#[test]
fn wrong_command_lines_are_usage_errors() {
    let desk = Desk::new();
    let key = "12D3KooW";
    for line in [
        "",
        "frobnicate",
        "new --passphrase secret",
        "new --node --passphrase-file p",
        "new --no-passphrase --strong",
        "new --passphrase-file p --passphrase-fd 3",
        "new --node --now yesterday",
        "show",
        "sign draft",
        "verify x --fabric abc",
        "import x --format openssh",
        "charter new --name n --currency EUR",
        "charter new --name n --currency EUR --organisation quay",
        "certificate new --charter c --organisation q --role king --key k --name n",
    ] {
        let run = desk.run(line);
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{line}: {run:?}");
        assert!(!run.err.is_empty(), "{line}");
    }
    let line = format!("charter new --name n --currency EUR --organisation quay={key}");
    desk.run(&line).fails(2, "is no key");
    assert_eq!(std::fs::read_dir(desk.dir.path()).expect("list").count(), 0, "nothing is made");
}

#[test]
fn help_names_every_command_and_exit_code() {
    let help = Desk::new().run("--help").ok();
    for word in
        ["new", "show", "inspect", "sign", "verify", "import", "export", "charter", "4 locked"]
    {
        assert!(help.contains(word), "{word}: {help}");
    }
}
