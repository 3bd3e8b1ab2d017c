//! The daemon as an operator meets it: founding and joining a fabric, settings, what `up` refuses
//! and why, and jobs that end badly or lose their node.

#[path = "common/processes.rs"]
mod processes;

use std::io::Read as _;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use leasehold_keys::armor::{self, Item};
use leasehold_keys::disk::Existing;
use leasehold_keys::file::{self, Secret};
use leasehold_keys::issue::{self, NewReinstatement};
use leasehold_keys::passphrase::Source;
use leasehold_node::cli::up::NodeFile;
use leasehold_node::home::{Allowance, Home, mandate};
use leasehold_proto::words::sign::Signed;
use leasehold_proto::{Amount, Span};
use processes::{Fabric, Node, PATIENCE, WANT, program, stderr, terminate, until, until_within};
use serde_json::{Value, json};

/// A place with nothing in it, and the command line in it.
struct Room {
    dir: tempfile::TempDir,
}

/// A daemon that was started by its command line alone.
struct Daemon {
    process: Child,
    file: NodeFile,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Room {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a room") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_leasehold"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LEASEHOLD_")) {
            command.env_remove(name);
        }
        command
            .args(args)
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_DATA_HOME", self.path("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command that must end by itself.
    fn run(&self, args: &[&str]) -> Output {
        ended(self.command(args), &args.join(" "))
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    /// Starts the daemon of `dir` on ports that the system chooses, and waits until it is ready.
    fn up(&self, dir: &str, more: &[&str]) -> Daemon {
        self.up_with(dir, more, &[])
    }

    /// The same with these variables in its environment.
    fn up_with(&self, dir: &str, more: &[&str], variables: &[(&str, &str)]) -> Daemon {
        let any = "127.0.0.1:0";
        let path = self.text(dir);
        let mut args = vec!["up", "--dir", &path, "--listen-link", any, "--listen-probe", any];
        args.extend(["--listen-data", any, "--listen-api", any]);
        args.extend(more);
        let log = std::fs::File::create(self.path(&format!("{dir}.log"))).expect("a log");
        let mut command = self.command(&args);
        command.envs(variables.iter().copied());
        let mut process = command.stdout(Stdio::null()).stderr(log).spawn().expect("starts");
        let file = until("the daemon is ready", || {
            let over = process.try_wait().expect("asked");
            let log = || std::fs::read_to_string(self.path(&format!("{dir}.log")));
            assert!(over.is_none(), "{dir} ended: {:?}", log());
            let text = std::fs::read(self.path(dir).join("node.json")).ok()?;
            serde_json::from_slice::<NodeFile>(&text).ok()
        });
        Daemon { process, file }
    }

    fn log(&self, dir: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{dir}.log"))).expect("a log")
    }
}

fn ended(mut command: Command, what: &str) -> Output {
    let mut process = command.spawn().expect("starts");
    let begun = Instant::now();
    while process.try_wait().expect("asked").is_none() {
        if begun.elapsed() > PATIENCE {
            let _ = process.kill();
            panic!("it goes on: {what}");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    process.wait_with_output().expect("read")
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

fn stop(daemon: &mut Daemon) {
    terminate(&daemon.process);
    let ended = until("it stops", || daemon.process.try_wait().expect("asked"));
    assert!(ended.success(), "{ended:?}");
}

/// Asserts that `output` failed with `exit` and says all of `parts`.
fn refused(output: &Output, exit: i32, parts: &[&str]) {
    assert_eq!(code(output), exit, "{output:?}");
    for part in parts {
        assert!(stderr(output).contains(part), "'{part}' in {}", stderr(output));
    }
}

/// Signs the one draft in `request` as an organisation would on its own machine.
fn signed(request: &Path, key: &Secret) -> Signed {
    let items = armor::read_objects(request).expect("reads");
    let [Item::Draft(draft)] = items.as_slice() else { panic!("{items:?}") };
    key.signer().sign(draft).expect("signs")
}

fn put(path: &Path, signed: Signed) -> String {
    armor::write_objects(path, &[Item::Signed(signed)], Existing::Replace).expect("written");
    path.display().to_string()
}

// ---------------------------------------------------------------- founding and joining

#[test]
fn a_fabric_is_founded_and_its_node_runs_and_stops() {
    let room = Room::new();
    let home = room.text("home");
    let long = "x".repeat(65);
    // What is refused leaves nothing behind that the next try would stumble over.
    for wrong in [vec!["--fabric", &long], vec!["--name", "a\u{7}b"], vec!["--currency", ""]] {
        let mut args = vec!["init", "--dir", &home, "--no-passphrase"];
        args.extend(wrong);
        assert_ne!(code(&room.run(&args)), 0, "{args:?}");
        assert!(!room.path("home").join("org.key").exists());
    }
    let founded = room.json(&["init", "--dir", &home, "--no-passphrase", "--sell", "--json"]);
    let again = room.run(&["init", "--dir", &home, "--no-passphrase"]);
    refused(&again, 7, &["holds a node already", "--dir"]);
    assert_eq!(Home::at(&home).identity().expect("whole").secret.id().to_string(), founded["node"]);

    let mut daemon = room.up("home", &[]);
    let api = format!("http://{}", daemon.file.api);
    let nodes = room.json(&["--dir", &home, "--api", &api, "nodes", "--json"]);
    assert_eq!(nodes["nodes"][0]["id"], founded["node"]);
    until("it sells", || {
        let offers = room.json(&["--dir", &home, "--api", &api, "offers", "--json"]);
        (offers["offers"].as_array().map(Vec::len) == Some(1)).then_some(())
    });
    let begun = Instant::now();
    stop(&mut daemon);
    assert!(begun.elapsed() < PATIENCE, "it stops when told to");
    assert!(!room.path("home").join("node.json").exists(), "nothing says that it runs");
}

#[test]
fn keys_of_a_fabric_are_locked_by_the_passphrase_given() {
    let room = Room::new();
    let passphrase = room.path("passphrase");
    leasehold_keys::disk::write_atomic(&passphrase, b"correct horse\n", 0o600, Existing::Keep)
        .expect("written");
    let (home, given) = (room.text("home"), passphrase.display().to_string());
    let founded = room.run(&["init", "--dir", &home, "--passphrase-file", &given]);
    assert!(founded.status.success(), "{founded:?}");
    let load = |name: &str, source: &Source| file::load(&room.path("home").join(name), source);
    assert!(load("org.key", &Source::Nowhere).is_err(), "locked");
    assert!(load("org.key", &Source::File(passphrase.clone())).is_ok());
    assert!(load("node.key", &Source::Nowhere).is_ok(), "a node starts unattended");
    let nobody = room.run(&["init", "--dir", &room.text("other")]);
    refused(&nobody, 4, &["no terminal", "--passphrase-file"]);
    let said = stderr(&nobody);
    assert_eq!(said.matches("no terminal").count(), 1, "said once: {said}");
    assert!(!room.path("other").join("node.key").exists());
}

#[test]
fn a_second_host_joins_by_the_charters_fingerprint() {
    let room = Room::new();
    let (first, second) = (room.text("first"), room.text("second"));
    let founded = room.json(&["init", "--dir", &first, "--no-passphrase", "--json"]);
    let fabric = founded["fabric"].as_str().expect("an id").to_string();
    let other = room.json(&["init", "--dir", &room.text("alien"), "--no-passphrase", "--json"]);
    let charter = room.path("first").join("charter").display().to_string();
    let join = |more: &[&str]| {
        let mut args = vec!["join", "--dir", &second];
        args.extend(more);
        room.run(&args)
    };

    refused(&join(&[]), 2, &["--charter", "--certificate"]);
    let alien = other["fabric"].as_str().expect("an id");
    let begin = ["--charter", &charter, "--fingerprint"];
    refused(&join(&[&begin[..], &[alien]].concat()), 1, &["do not join by it"]);
    let wrong = [&begin[..], &[&fabric, "--organisation", "nobody"]].concat();
    assert_ne!(code(&join(&wrong)), 0);
    assert!(!room.path("second").join("node.key").exists(), "nothing is made by a wrong word");
    let begun = join(&[&begin[..], &[&fabric, "--name", "second"]].concat());
    assert!(begun.status.success(), "{begun:?}");
    refused(&join(&[&begin[..], &[&fabric]].concat()), 7, &["holds a node already"]);
    // It cannot run before it is admitted.
    refused(&room.run(&["up", "--dir", &second]), 3, &["certificate"]);

    let request = room.path("second").join("certificate.request");
    let key = |home: &str, name: &str| {
        file::load(&room.path(home).join(name), &Source::Nowhere).expect("loads")
    };
    let forged = put(&room.path("forged"), signed_by_stranger(&request, &key("alien", "org.key")));
    assert_ne!(code(&join(&["--certificate", &forged])), 0, "another organisation's signature");
    let admitted = put(&room.path("admitted"), signed(&request, &key("first", "org.key")));
    let joined = join(&["--certificate", &admitted]);
    assert!(joined.status.success(), "{joined:?}");

    // A mandate for another delegate is none for this node.
    let tenant = key("first", "tenant.key");
    let papers = Home::at(&first).get("tenant.certificate", "certificate").expect("reads");
    let allowance =
        Allowance { max_hourly: Amount(1), max_total: Amount(1), max_term: Span::secs(60) };
    let now = leasehold_node::clock::now().wall;
    let given = |delegate| mandate(&tenant, &papers, delegate, allowance, now).expect("signs");
    let others = put(&room.path("others"), given(key("first", "node.key").id()));
    refused(&join(&["--mandate", &others]), 5, &["not for this node"]);
    let own = put(&room.path("own"), given(key("second", "node.key").id()));
    assert!(join(&["--mandate", &own]).status.success());

    let mut one = room.up("first", &[]);
    let mut two = room.up("second", &["--join", &one.file.link[0].to_string()]);
    for (home, daemon) in [(&first, &one), (&second, &two)] {
        let api = format!("http://{}", daemon.file.api);
        until("both see both", || {
            let nodes = room.json(&["--dir", home, "--api", &api, "nodes", "--json"]);
            let up = |node: &&Value| node["up"] == true;
            (nodes["nodes"].as_array()?.iter().filter(up).count() == 2).then_some(())
        });
    }
    stop(&mut two);
    stop(&mut one);
}

/// The draft for another signer's name, signed by that signer: a certificate of another fabric's
/// organisation.
fn signed_by_stranger(request: &Path, stranger: &Secret) -> Signed {
    let items = armor::read_objects(request).expect("reads");
    let [Item::Draft(draft)] = items.as_slice() else { panic!("{items:?}") };
    let mut envelope =
        leasehold_proto::words::object::Envelope::decode(&draft.envelope).expect("an envelope");
    envelope.header.signer = stranger.id();
    let envelope = leasehold_proto::words::wire::encode::<65_536>(&envelope).expect("it fits");
    let draft = leasehold_proto::words::sign::Draft { envelope: envelope.into() };
    stranger.signer().sign(&draft).expect("signs")
}

// ---------------------------------------------------------------- settings

#[test]
fn flags_and_variables_go_before_the_file() {
    let room = Room::new();
    let home = room.text("home");
    let founded = room.run(&["init", "--dir", &home, "--no-passphrase", "--name", "filed"]);
    assert!(founded.status.success(), "{founded:?}");
    let mut daemon = room.up("home", &["--set", "node.labels.zone=a", "--log-format", "json"]);
    let api = format!("http://{}", daemon.file.api);
    let nodes = room.json(&["--dir", &home, "--api", &api, "nodes", "--json"]);
    assert_eq!(nodes["nodes"][0]["labels"]["zone"], "a", "{nodes}");
    stop(&mut daemon);
    let log = room.log("home");
    assert!(log.lines().count() > 1);
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(line["level"].is_string(), "{line}");
    }
    // The environment alone.
    let mut command = room.command(&["up", "--dir", &home]);
    command.env("LEASEHOLD_OFFER_SELL", "perhaps");
    refused(&ended(command, "a variable that does not suit"), 2, &["LEASEHOLD_OFFER_SELL"]);
    for plane in ["LINK", "PROBE", "DATA", "API"] {
        assert!(!log.contains(&format!("LEASEHOLD_LISTEN_{plane}")));
    }
}

#[test]
fn a_flag_goes_before_a_variable_and_that_before_the_file() {
    let room = Room::new();
    let home = room.text("home");
    let founded = room.run(&["init", "--dir", &home, "--no-passphrase", "--name", "filed"]);
    assert!(founded.status.success(), "{founded:?}");
    let variables = [("LEASEHOLD_NAME", "varied"), ("LEASEHOLD_LOG_FORMAT", "json")];
    for (flags, variables, name) in [
        (&[][..], &[][..], "filed"),
        (&[], &variables, "varied"),
        (&["--name", "flagged", "--log-format", "human"], &variables, "flagged"),
    ] {
        let mut daemon = room.up_with("home", flags, variables);
        assert_eq!(daemon.file.name, name);
        stop(&mut daemon);
        let log = room.log("home");
        let json = log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok());
        assert_eq!(json, name == "varied", "{log}");
    }
    // A variable that does not read is named, and so is the one that a flag would replace.
    let mut command = room.command(&["up", "--dir", &home]);
    command.env("LEASEHOLD_LOG_FORMAT", "xml");
    refused(&ended(command, "a variable that does not read"), 2, &["xml", "--log-format"]);
}

#[test]
fn what_up_cannot_use_it_names_and_the_directory_stays_good() {
    let room = Room::new();
    let home = room.text("home");
    refused(&room.run(&["up", "--dir", &home]), 3, &["leasehold init"]);
    let founded = room.run(&["init", "--dir", &home, "--no-passphrase"]);
    assert!(founded.status.success(), "{founded:?}");
    let any = "127.0.0.1:0";
    let up = |more: &[&str]| {
        let mut args = vec!["up", "--dir", &home, "--listen-link", any, "--listen-probe", any];
        args.extend(["--listen-data", any, "--listen-api", any]);
        // A flag said twice is an error of its own: the last words replace those.
        for pair in more.chunks(2) {
            if let [flag, value] = pair
                && let Some(at) = args.iter().position(|arg| arg == flag)
            {
                args[at + 1] = value;
            } else {
                args.extend(pair);
            }
        }
        room.run(&args)
    };

    // The configuration.
    let config = room.path("home").join("leasehold.toml");
    let good = std::fs::read(&config).expect("reads");
    std::fs::write(&config, "[offer]\nsel = true\n").expect("written");
    refused(&up(&[]), 2, &["sel", "sell", "leasehold.toml"]);
    std::fs::write(&config, vec![b'#'; 300 * 1024]).expect("written");
    refused(&up(&[]), 2, &["longer than"]);
    std::fs::write(&config, "[node]\nname = \"a\\u0007b\"\n").expect("written");
    refused(&up(&[]), 2, &["name"]);
    std::fs::write(&config, &good).expect("written");
    refused(&up(&["--config", "/nowhere/at.all"]), 2, &["/nowhere/at.all"]);
    refused(&up(&["--set", "offer.cpu=4000"]), 2, &["offer.cpu"]);
    refused(&up(&["--log", "no=such=filter"]), 2, &["no=such=filter"]);

    // Ports: taken ones, and one that others could reach.
    let udp = UdpSocket::bind(any).expect("binds");
    let taken = udp.local_addr().expect("bound").to_string();
    for flag in ["--listen-link", "--listen-probe", "--listen-data"] {
        refused(&up(&[flag, &taken]), 7, &[taken.rsplit(':').next().expect("a port")]);
    }
    let tcp = TcpListener::bind(any).expect("binds");
    let taken = tcp.local_addr().expect("bound").to_string();
    refused(&up(&["--listen-api", &taken]), 7, &[&taken, "--listen-api"]);
    refused(&up(&["--listen-api", "0.0.0.0:0"]), 5, &["loopback"]);

    // What others could read, or somebody damaged.
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set");
    };
    let key = room.path("home").join("node.key");
    mode(&key, 0o640);
    refused(&up(&[]), 5, &["node.key"]);
    mode(&key, 0o600);
    mode(&room.path("home"), 0o755);
    refused(&up(&[]), 5, &["chmod 700"]);
    mode(&room.path("home"), 0o700);
    for name in ["charter", "certificate", "mandate", "node.key"] {
        let path = room.path("home").join(name);
        let good = std::fs::read(&path).expect("reads");
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] = if bad[middle] == b'A' { b'B' } else { b'A' };
        std::fs::write(&path, &bad).expect("written");
        let output = up(&[]);
        assert!(code(&output) > 0, "{name}: {output:?}");
        assert!(stderr(&output).contains(name), "{name} is named: {output:?}");
        std::fs::write(&path, &good).expect("written");
    }

    // After all that it runs, and a second one beside it does not.
    let mut daemon = room.up("home", &[]);
    let pid = daemon.process.id().to_string();
    refused(&up(&[]), 7, &[&pid]);
    stop(&mut daemon);
}

// ---------------------------------------------------------------- jobs that end badly

/// Wants ever more memory and traps where it gets none.
const HUNGRY: &str = r#"(module
  (memory (export "memory") 1)
  (func (export "_start")
    (loop $on
      (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))
      (br $on))))"#;

/// Writes for ever.
const FLOOD: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 65536))
    (loop $on
      (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
      (br $on))))"#;

/// Traps at once.
const TRAPS: &str = "(module (func (export \"_start\") unreachable))";

/// Never ends.
const ENDLESS: &str = "(module (func (export \"_start\") (loop $on (br $on))))";

#[test]
fn bad_programs_end_with_their_name_and_an_agreed_receipt() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let text = fabric.room.path().join("text.wasm");
    std::fs::write(&text, "#!/bin/sh\n").expect("written");
    let text = text.display().to_string();
    let mut args = vec!["run", "--yes"];
    args.extend(WANT);
    args.push(&text);
    refused(&buyer.cli(&args), 2, &["not WebAssembly", "wasm32-wasip1"]);
    std::fs::write(&text, b"\0asm\x01\0\0\0\xff\xff").expect("written");
    let table = [
        ("not_runnable", text, "60s", "not valid WebAssembly"),
        ("trapped", program(&fabric, "traps.wasm", TRAPS), "60s", "unreachable"),
        ("out_of_memory", program(&fabric, "hungry.wasm", HUNGRY), "60s", "memory"),
        ("deadline", program(&fabric, "endless.wasm", ENDLESS), "2s", "end of its lease"),
        ("deadline", program(&fabric, "flood.wasm", FLOOD), "2s", "end of its lease"),
    ];
    for (kind, path, ttl, says) in table {
        let mut args = vec!["run", "--yes", "--json"];
        args.extend(WANT);
        let at = args.iter().position(|arg| *arg == "--ttl").expect("there");
        args[at + 1] = ttl;
        args.push(&path);
        let output = buyer.cli(&args);
        assert_eq!(code(&output), 1, "{kind}: {}", stderr(&output));
        let run: Value = serde_json::from_slice(&output.stdout).expect("one object");
        assert_eq!(run["outcome"]["kind"], kind, "{run}");
        let said = run["outcome"]["text"].as_str().expect("words");
        assert!(said.contains(says), "'{says}' in {said}");
        assert!(run["stdout"].as_str().is_some_and(|out| out.len() <= 2 << 20));
        let lease = run["lease"].as_str().expect("a lease");
        for node in [&buyer, &seller] {
            let name = format!("proof-{kind}-{}-{}", node.file.name, &lease[..8]);
            let proof = fabric.room.path().join(name).display().to_string();
            let exported = node.cli(&["lease", "export", lease, "--out", &proof]);
            assert!(exported.status.success(), "{exported:?}");
            assert_eq!(node.cli_json(&["verify", "--json", &proof])["verified"], true);
        }
        assert_eq!(seller.get("/healthz").status, 200, "the node is as well as before");
    }
}

/// Starts an endless job and gives its lease, once a receipt of it is countersigned.
fn begun(buyer: &Node, program: &str) -> String {
    let mut args = vec!["run", "--yes", "-d", "--max-ttl", "5m"];
    args.extend(WANT);
    args.push(program);
    let output = buyer.cli(&args);
    assert!(output.status.success(), "{output:?}");
    let lease = String::from_utf8(output.stdout).expect("text").trim().to_string();
    until("a receipt is countersigned", || (receipts(buyer, &lease)() > 0).then_some(()));
    lease
}

fn receipts<'a>(buyer: &'a Node, lease: &'a str) -> impl Fn() -> u64 + 'a {
    move || {
        let shown = buyer.cli_json(&["lease", "show", "--json", lease]);
        shown["receipts"].as_u64().unwrap_or(0)
    }
}

fn status_of(seller: &Node, lease: &str) -> Value {
    let path = seller.dir.join("jobs").join(lease).join("status.json");
    serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("parses")
}

/// Whether this process is one of that lease's.
fn is_of(pid: &Value, lease: &str) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).contains(lease)
}

#[test]
fn a_seller_killed_with_running_jobs_takes_them_back() {
    let fabric = Fabric::new();
    let mut seller = fabric.node("seller", "2", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let program = program(&fabric, "begun.wasm", processes::ENDLESS);
    let (kept, lost) = (begun(&buyer, &program), begun(&buyer, &program));
    let (before, doomed) = (status_of(&seller, &kept), status_of(&seller, &lost));
    seller.process.kill().expect("killed");
    seller.process.wait().expect("gone");
    // One of the two loses its warden while there is no node.
    let warden = i32::try_from(doomed["warden"]["pid"].as_i64().expect("a pid")).expect("small");
    let warden = rustix::process::Pid::from_raw(warden).expect("a pid");
    assert!(is_of(&doomed["warden"]["pid"], &lost));
    rustix::process::kill_process(warden, rustix::process::Signal::KILL).expect("killed");
    let home = Home::at(&seller.dir);
    let api = seller.file.api;
    let seller = fabric.up(&home, "seller", "2", &[&buyer], api);

    let ended = |lease: &str| {
        let end = buyer.get(&format!("/v1/leases/{lease}/end?timeout_s=5")).json();
        (end["ended"] == true).then_some(end)
    };
    let end = until("the buyer learns that one is lost", || ended(&lost));
    assert_eq!((&end["reason"], &end["outcome"]["kind"]), (&json!("lost"), &json!("lost")));
    assert!(!is_of(&doomed["runner"]["pid"], &lost), "nothing of it is left");
    // The other goes on under the same warden: receipts follow those of before, its deadline is
    // in force, and its output is there from the beginning.
    let after = status_of(&seller, &kept);
    assert_eq!((&after["warden"], &after["runner"]), (&before["warden"], &before["runner"]));
    assert_eq!(after["deadline_boot_ms"], before["deadline_boot_ms"]);
    let receipts = receipts(&buyer, &kept);
    let had = receipts();
    until("receipts go on", || (receipts() > had).then_some(()));
    let mut logs = buyer.command();
    logs.args(["logs", "-f", &kept]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut logs = Follower(logs.spawn().expect("starts"));
    let mut begun = [0; 6];
    logs.0.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("it follows");
    assert_eq!(&begun, b"begun\n");
    // It is made longer through the warden that was taken back, and given back.
    let renewed = buyer.cli_json(&["lease", "renew", "--json", "--ttl", "100s", &kept]);
    assert_eq!((&renewed["version"], &renewed["term_ms"]), (&json!(1), &json!(100_000)));
    let longer = status_of(&seller, &kept)["deadline_boot_ms"].as_u64().expect("a deadline");
    assert!(longer > before["deadline_boot_ms"].as_u64().expect("a deadline"));
    assert!(buyer.cli(&["lease", "release", &kept]).status.success());
    let end = until("the buyer learns of the end", || ended(&kept));
    assert_eq!(end["reason"], "released");
    for lease in [&kept, &lost] {
        until("the final receipt is countersigned", || {
            let shown = seller.cli_json(&["lease", "show", "--json", lease]);
            (shown["receipts"] == shown["acknowledged"] && shown["stage"] == "ended").then_some(())
        });
        for node in [&buyer, &seller] {
            let proof = format!("{}-{}.proof", node.file.name, &lease[..8]);
            let proof = fabric.room.path().join(proof).display().to_string();
            assert!(node.cli(&["lease", "export", lease, "--out", &proof]).status.success());
            assert_eq!(node.cli_json(&["verify", "--json", &proof])["verified"], true);
        }
    }
    let node = seller.get("/v1/node").json();
    assert_eq!(node["promised"]["cpu_milli"], 0, "its capacity is free again");
}

#[test]
fn an_operator_takes_slack_back_and_sells_again() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "2", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let endless = program(&fabric, "begun.wasm", processes::ENDLESS);
    let args = [&["run", "--yes", "-d", "--class", "slack"], &WANT[..], &[&endless]].concat();
    let output = buyer.cli(&args);
    assert!(output.status.success(), "{output:?}");
    let lease = String::from_utf8(output.stdout).expect("text").trim().to_string();
    until("a receipt is countersigned", || (receipts(&buyer, &lease)() > 0).then_some(()));

    let reclaim = |cpu: &str, within: &str, more: &[&str]| {
        seller.cli(&[&["reclaim", "--json", "--cpu", cpu, "--within", within], more].concat())
    };
    for (cpu, within) in [("9", "60s"), ("1.8", "1s")] {
        let no = reclaim(cpu, within, &[]);
        assert_eq!(code(&no), 7, "{}", stderr(&no));
        assert!(stderr(&no).contains("cannot be had back"), "{}", stderr(&no));
    }
    assert_eq!(code(&reclaim("0", "60s", &[])), 2, "nothing is wanted");
    let dry = reclaim("1.8", "30s", &["--dry-run"]);
    let dry: Value = serde_json::from_slice(&dry.stdout).expect("JSON");
    assert_eq!(dry["leases"].as_array().map(Vec::len), Some(1), "{dry}");
    assert_eq!((&dry["leases"][0]["reason"], &dry["dry_run"]), (&json!("reclaimed"), &json!(true)));
    let shown = seller.cli_json(&["lease", "show", "--json", &lease]);
    assert_eq!((&shown["stage"], &shown["ends_early"]), (&json!("active"), &Value::Null));
    // What is free is enough: nobody is disturbed, and it is not sold any more.
    assert!(reclaim("1", "30s", &[]).status.success());
    let free = || {
        // The buyer has an offer too, of nothing: which comes first, their keys decide.
        let all = buyer.get("/v1/offers").json();
        let mut offers = all["offers"].as_array().expect("offers").iter();
        let offer = offers.find(|offer| offer["name"] == "seller").expect("the seller's");
        offer["shapes"][0]["cpu_milli"].as_u64()
    };
    until("less is offered", || (free() == Some(500)).then_some(()));
    let done = reclaim("0.8", "2s", &[]);
    assert!(done.status.success(), "{}", stderr(&done));
    let end = until("the lease is reclaimed", || {
        let end = buyer.get(&format!("/v1/leases/{lease}/end?timeout_s=5")).json();
        (end["ended"] == true).then_some(end)
    });
    assert_eq!(end["reason"], "reclaimed", "{end}");
    let amount = |of: &Value| of.as_str().expect("text").parse::<Amount>().expect("an amount");
    assert!(amount(&end["credit"]) > Amount::ZERO, "{end}");
    assert!(amount(&end["credit"]) <= amount(&end["charge"]), "{end}");
    for node in [&buyer, &seller] {
        let proof = fabric.room.path().join(format!("{}.proof", node.file.name));
        let proof = proof.display().to_string();
        until("the last receipt is countersigned", || {
            let shown = node.cli_json(&["lease", "show", "--json", &lease]);
            (shown["receipts"] == shown["acknowledged"]).then_some(())
        });
        assert!(node.cli(&["lease", "export", &lease, "--out", &proof]).status.success());
        let verdict = node.cli_json(&["verify", "--json", &proof]);
        assert_eq!(verdict["verified"], true, "{verdict}");
    }
    until("what is left of it is offered", || (free() == Some(200)).then_some(()));

    // Drained, nothing is granted; resumed, everything is for sale again.
    assert!(seller.cli(&["drain", "--by", "10s"]).status.success());
    until("nothing is offered", || free().is_none().then_some(()));
    let request = [&["lease", "request"], &WANT[..]].concat();
    assert_eq!(code(&buyer.cli(&request)), 5);
    assert!(seller.cli(&["resume"]).status.success());
    until("all is offered", || (free() == Some(2000)).then_some(()));
    until("it is granted", || buyer.cli(&request).status.success().then_some(()));
}

#[test]
fn a_gang_runs_on_several_hosts_or_on_none() {
    let fabric = Fabric::new();
    let first = fabric.node("first", "1", &[]);
    let others = ["second", "third"].map(|name| fabric.node(name, "1", &[&first]));
    let buyer = fabric.node("buyer", "0", &[&first]);
    for name in ["first", "second", "third"] {
        buyer.sees_offer_of(name);
    }
    let environment = program(&fabric, "environment.wasm", ENVIRONMENT);
    let gang = |nodes: &str, more: &[&str]| {
        let args = [&["run", "--yes", "--nodes", nodes], more, &WANT[..], &[&environment]];
        buyer.cli(&args.concat())
    };
    let ran = gang("3", &[]);
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
    let out = String::from_utf8_lossy(&ran.stdout).replace('\0', "\n");
    for rank in 0..3 {
        let said = format!("LEASEHOLD_RANK={rank}");
        assert_eq!(out.matches(&said).count(), 1, "{said} in {out}");
        assert!(out.contains(&format!("[{rank}] ")), "{out}");
    }
    assert_eq!(out.matches("LEASEHOLD_SIZE=3").count(), 3, "{out}");
    assert_eq!(out.matches("LEASEHOLD_HOSTS=127.0.0.1,127.0.0.1,127.0.0.1").count(), 3, "{out}");
    // More than there are: none at all, and it says so.
    let too_many = gang("4", &[]);
    assert_eq!(code(&too_many), 5, "{}", stderr(&too_many));
    assert!(stderr(&too_many).contains("gang needs 4"), "{}", stderr(&too_many));
    for node in [&first, &others[0], &others[1]] {
        until("its capacity is free again", || {
            let node = node.get("/v1/node").json();
            (node["promised"]["cpu_milli"] == 0).then_some(())
        });
    }
    assert_eq!(code(&gang("0", &[])), 2);
    // Leases without jobs, each to be used as its holder likes.
    let leases =
        buyer.cli_json(&[&["lease", "request", "--json", "--nodes", "2"], &WANT[..]].concat());
    let lease = leases["leases"][1]["lease"].as_str().expect("an id");
    let ran = buyer.cli(&["run", "--yes", "--lease", lease, &environment]);
    assert_eq!(code(&ran), 0, "{}", stderr(&ran));
    let out = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(out.contains("LEASEHOLD_RANK=1") && out.contains("LEASEHOLD_SIZE=2"), "{out}");
}

/// Copies a node's directory as a backup would.
fn copied(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("runs");
    assert!(copied.success());
}

fn shut(node: &mut Node) {
    terminate(&node.process);
    until("it ends", || node.process.try_wait().expect("asked"));
}

#[test]
fn a_directory_that_is_an_older_copy_grants_nothing_until_its_organisation_says_so() {
    let fabric = Fabric::new();
    let mut seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let (dir, backup) = (seller.dir.clone(), fabric.room.path().join("backup"));
    shut(&mut seller);
    copied(&dir, &backup);
    let (home, api) = (Home::at(&dir), seller.file.api);
    // It lives on for two starts, then its directory is lost and the backup put in its place.
    let mut epoch = 0;
    for _ in 0..2 {
        let mut seller = fabric.up(&home, "seller", "1", &[&buyer], api);
        epoch = seller.get("/v1/node").json()["epoch"].as_u64().expect("an epoch");
        shut(&mut seller);
    }
    std::fs::remove_dir_all(&dir).expect("removed");
    copied(&backup, &dir);
    // Nobody is there to tell it: the note beside its directory does.
    let mut seller = fabric.up(&home, "seller", "1", &[], api);
    let node = seller.get("/v1/node").json();
    let why = node["halted"].as_str().expect("it says why");
    assert!(why.contains("older copy"), "{why}");
    for ask in [&["nodes"][..], &["quarantine", "list"]] {
        let listed = seller.cli(ask);
        assert_eq!(code(&listed), 0);
        assert!(stderr(&listed).contains("this node grants nothing"), "{}", stderr(&listed));
    }
    assert!(node["epoch"].as_u64().expect("an epoch") > epoch, "nothing is signed twice");
    let request = [&["lease", "request", "--on", "seller"], &WANT[..]].concat();
    assert_ne!(code(&seller.cli(&request)), 0);
    // Its organisation has looked into it, and declares what was signed before void.
    let above = node["epoch"].as_u64().expect("an epoch");
    let key = node["id"].as_str().expect("a key").parse().expect("a key");
    let new = NewReinstatement { organisation: "acme".into(), key, above, valid: Span::secs(60) };
    let draft = issue::reinstatement(&fabric.founder.charter, new, fabric.now).expect("a draft");
    let wrong = fabric.room.path().join("wrong");
    let right = fabric.room.path().join("right");
    let root = fabric.founder.root.signer().sign(&draft).expect("signs");
    let existing = Existing::Replace;
    armor::write_objects(&right, &[Item::Signed(root)], existing).expect("written");
    armor::write_objects(&wrong, &[Item::Draft(draft)], existing).expect("written");
    let lift = |seller: &Node, file: &Path| {
        seller.cli(&["quarantine", "reinstate", &file.display().to_string()])
    };
    assert_eq!(code(&lift(&seller, &wrong)), 2, "it is not signed");
    let lifted = lift(&seller, &right);
    assert_eq!(code(&lifted), 0, "{}", stderr(&lifted));
    shut(&mut seller);
    let seller = fabric.up(&home, "seller", "1", &[&buyer], api);
    assert_eq!(seller.get("/v1/node").json()["halted"], Value::Null);
    assert_eq!(stderr(&seller.cli(&["nodes"])), "");
    buyer.sees_offer_of("seller");
    until("it grants again", || buyer.cli(&request).status.success().then_some(()));
}

#[test]
fn of_two_nodes_with_one_key_neither_goes_on_and_the_proof_stands_by_itself() {
    let fabric = Fabric::new();
    let mut seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    let third = fabric.node("third", "0", &[&buyer]);
    buyer.sees_offer_of("seller");
    shut(&mut seller);
    let twin = fabric.room.path().join("twin");
    copied(&seller.dir, &twin);
    let (home, api) = (Home::at(&seller.dir), seller.file.api);
    // Both start from the same state, so both live in the same epoch.
    let seller = fabric.up(&home, "seller", "1", &[&buyer], api);
    let any = "127.0.0.1:0".parse().expect("an address");
    let twin = fabric.up(&Home::at(&twin), "seller", "1", &[&third], any);
    for node in [&seller, &twin] {
        let halted = || node.get("/v1/node").json()["halted"].as_str().map(drop);
        // What goes astray between two holders of one name is made up for within a minute.
        until_within(3 * PATIENCE, "it is halted", halted);
    }
    for (nth, node) in [&buyer, &third].into_iter().enumerate() {
        let listed = until("the proof is here", || {
            let listed = node.cli_json(&["quarantine", "list", "--json"]);
            listed["keys"].as_array().is_some_and(|keys| keys.len() == 1).then_some(listed)
        });
        let key = listed["keys"][0]["key"].as_str().expect("a key").to_string();
        let proof = fabric.room.path().join(format!("lie-{nth}")).display().to_string();
        let exported = node.cli(&["quarantine", "export", &key, "--out", &proof]);
        assert!(exported.status.success(), "{}", stderr(&exported));
        let verdict = node.cli_json(&["verify", "--json", &proof]);
        let convicted = &verdict["items"][0];
        assert_eq!((&verdict["verified"], &convicted["signer"]), (&json!(true), &json!(key)));
    }
}

/// Writes its environment, each variable with a zero after it.
const ENVIRONMENT: &str = r#"(module
  (import "wasi_snapshot_preview1" "environ_sizes_get"
    (func $sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "_start")
    (drop (call $sizes (i32.const 0) (i32.const 4)))
    (drop (call $get (i32.const 1024) (i32.const 8192)))
    (i32.store (i32.const 16) (i32.const 8192))
    (i32.store (i32.const 20) (i32.load (i32.const 4)))
    (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 24)))))"#;

/// Ends a process that a failed test would leave behind.
struct Follower(Child);

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_node_told_to_stop_does_not_wait_for_those_who_follow() {
    let fabric = Fabric::new();
    let mut seller = fabric.node("seller", "1", &[]);
    let mut buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let endless = program(&fabric, "begun.wasm", processes::ENDLESS);
    let output = buyer.cli(&[&["run", "--yes", "-d"], &WANT[..], &[&endless]].concat());
    assert!(output.status.success(), "{output:?}");
    let lease = String::from_utf8(output.stdout).expect("text").trim().to_string();
    let mut logs = buyer.command();
    logs.args(["logs", "-f", &lease]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut logs = Follower(logs.spawn().expect("starts"));
    let mut begun = [0; 6];
    logs.0.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("it follows");
    let _silent =
        [&seller, &buyer].map(|node| TcpStream::connect(node.file.api).expect("connects"));
    let status = std::fs::read(seller.dir.join("jobs").join(&lease).join("status.json"));
    let status: Value = serde_json::from_slice(&status.expect("reads")).expect("parses");

    for node in [&mut buyer, &mut seller] {
        terminate(&node.process);
        let ended = until("it ends", || node.process.try_wait().expect("asked"));
        assert!(ended.success(), "{}: {ended:?}", node.file.name);
    }
    assert!(logs.0.try_wait().expect("asked").is_none(), "it waits for its node to come back");
    let command = std::fs::read(format!("/proc/{}/cmdline", status["warden"]["pid"]));
    let command = String::from_utf8(command.unwrap_or_default()).expect("text");
    assert!(command.contains(&lease), "the job goes on under its warden");
    // The next start takes the job back.
    let (home, api) = (Home::at(&seller.dir), seller.file.api);
    let seller = fabric.up(&home, "seller", "1", &[], api);
    until("the job runs on", || {
        let shown = seller.cli_json(&["lease", "show", "--json", &lease]);
        (shown["stage"] == "active" && shown["running"] == true).then_some(())
    });
    assert_eq!(status_of(&seller, &lease)["warden"], status["warden"]);
    assert!(seller.cli(&["lease", "revoke", &lease]).status.success(), "and is not left behind");
    until("it has ended", || {
        let shown = seller.cli_json(&["lease", "show", "--json", &lease]);
        (shown["end"] == "revoked").then_some(())
    });
}
