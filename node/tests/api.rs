//! The API and the command line against real nodes: the `leasehold` binary as processes, on
//! ports of 127.0.0.1 that the system chooses.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use leasehold_keys::armor::{self, Item};
use leasehold_keys::file::{Protection, Secret};
use leasehold_node::api::token;
use leasehold_node::cli::up::NodeFile;
use leasehold_node::config::Config;
use leasehold_node::home::{Allowance, Founder, Founding, Home, mandate};
use leasehold_proto::words::charter::Role;
use leasehold_proto::{Amount, Span, Wall};
use serde_json::{Value, json};

/// Nothing here waits for a fixed time; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Copies standard input to standard output and to `/out/copy`, and exits with 7.
const COPY: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $path_open
    (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 2)
  (data (i32.const 64) "copy")
  (data (i32.const 96) "noted")
  (func $write (param $fd i32) (param $at i32) (param $len i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $len))
    (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.const 4096))
    (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)))
    (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 16)))
    (call $write (i32.const 2) (i32.const 96) (i32.const 5))
    (if (i32.eqz (call $path_open (i32.const 4) (i32.const 0) (i32.const 64) (i32.const 4)
          (i32.const 1) (i64.const 64) (i64.const 64) (i32.const 0) (i32.const 32)))
      (then (call $write (i32.load (i32.const 32)) (i32.const 1024) (i32.load (i32.const 16)))))
    (call $exit (i32.const 7))))"#;

/// Says that it began and goes on for ever.
const ENDLESS: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "begun\n")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 6))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
    (loop $on (br $on))))"#;

/// Says that it began, and six seconds later that it is done, and exits with 3.
const SLOW: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $now (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "begun\n")
  (data (i32.const 80) "done\n")
  (func $say (param $at i32) (param $len i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $len))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "_start") (local $until i64)
    (call $say (i32.const 64) (i32.const 6))
    (drop (call $now (i32.const 1) (i64.const 1) (i32.const 32)))
    (local.set $until (i64.add (i64.load (i32.const 32)) (i64.const 6000000000)))
    (loop $on
      (drop (call $now (i32.const 1) (i64.const 1) (i32.const 32)))
      (br_if $on (i64.lt_u (i64.load (i32.const 32)) (local.get $until))))
    (call $say (i32.const 80) (i32.const 5))
    (call $exit (i32.const 3))))"#;

// ---------------------------------------------------------------- a fabric of processes

struct Fabric {
    founder: Founder,
    room: tempfile::TempDir,
    now: Wall,
}

/// A node as a process, ended when dropped.
struct Node {
    process: Child,
    file: NodeFile,
    dir: PathBuf,
    state: PathBuf,
}

impl Fabric {
    fn new() -> Self {
        let now = leasehold_node::clock::now().wall;
        let root = Secret::generate().expect("randomness");
        let founding = Founding {
            fabric: "test".into(),
            currency: "USD".into(),
            organisation: "acme".into(),
            max_term: Span::secs(3600),
            max_order_life: Span::secs(600),
        };
        let founder = Founder::found(root, &founding, now).expect("founds");
        Self { founder, room: tempfile::tempdir().expect("room"), now }
    }

    fn node(&self, name: &str, cpu: &str, join: &[&Node]) -> Node {
        let home = Home::at(self.room.path().join(name));
        home.create().expect("home");
        let key = home.new_key("node.key", &Protection::Clear).expect("key");
        let certificate = self.founder.admit(key.id(), Role::Node, name, self.now).expect("admits");
        home.put("charter", &self.founder.charter).expect("charter");
        home.put("certificate", &certificate).expect("certificate");
        let tenant = Secret::generate().expect("randomness");
        let admitted = self.founder.admit(tenant.id(), Role::Tenant, "tenant", self.now);
        let admitted = admitted.expect("admits");
        let allowance = Allowance {
            max_hourly: Amount(u64::MAX),
            max_total: Amount(u64::MAX),
            max_term: Span::secs(3600),
        };
        let mandate = mandate(&tenant, &admitted, key.id(), allowance, self.now).expect("mandate");
        home.put("mandate", &mandate).expect("mandate");
        self.up(&home, name, cpu, join, "127.0.0.1:0".parse().expect("address"))
    }

    fn up(&self, home: &Home, name: &str, cpu: &str, join: &[&Node], api: SocketAddr) -> Node {
        let any: SocketAddr = "127.0.0.1:0".parse().expect("address");
        // What a killed node left behind says nothing of the next one.
        let _ = std::fs::remove_file(home.dir().join("node.json"));
        let mut config = Config::default();
        config.node.name = name.into();
        (config.listen.link, config.listen.probe) = (any, any);
        (config.listen.data, config.listen.api) = (any, api);
        config.fabric.join = join.iter().map(|node| node.file.link[0]).collect();
        config.offer.sell = cpu != "0";
        config.offer.cpu = cpu.into();
        config.offer.memory = "512M".into();
        config.offer.disk = "256M".into();
        config.offer.cpu_hour = "0.02".into();
        config.offer.min_disk_free = "1M".into();
        let text = toml::to_string(&config).expect("a configuration");
        std::fs::write(home.dir().join("leasehold.toml"), text).expect("written");
        let state = self.room.path().join("state");
        let log = std::fs::File::create(self.room.path().join(format!("{name}.log")));
        let process = Command::new(env!("CARGO_BIN_EXE_leasehold"))
            .args(["up", "--dir"])
            .arg(home.dir())
            .env("XDG_STATE_HOME", &state)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a log"))
            .spawn()
            .expect("starts");
        let mut node = Starting { process: Some(process) };
        let file = until("the node says where it listens", || {
            let process = node.process.as_mut().expect("it runs");
            assert!(process.try_wait().expect("asked").is_none(), "{name} ended: see {name}.log");
            let text = std::fs::read(home.dir().join("node.json")).ok()?;
            serde_json::from_slice::<NodeFile>(&text).ok()
        });
        let process = node.process.take().expect("it runs");
        Node { process, file, dir: home.dir().into(), state }
    }
}

/// Ends a process that did not come up.
struct Starting {
    process: Option<Child>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "gave up on: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn terminate(process: &Child) {
    let pid = i32::try_from(process.id()).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::TERM)
        .expect("signalled");
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            terminate(&self.process);
        }
        let _ = self.process.wait();
    }
}

/// An answer as it came over the socket.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn code(&self) -> String {
        self.json()["error"]["code"].as_str().expect("a code").to_string()
    }
}

impl Node {
    fn token(&self) -> String {
        token::load_or_create(&self.dir).expect("a token").reveal().to_string()
    }

    /// Sends these bytes and reads to the end.
    fn raw(&self, request: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.file.api).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        // A node that refuses early may close before all was sent.
        let _ = stream.write_all(request);
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let at = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
        let head = String::from_utf8_lossy(&bytes[..at]).into_owned();
        let status = head[9..12].parse().expect("a status");
        Answer { status, head, body: bytes[at + 4..].to_vec() }
    }

    /// A request with the right Host and token, and these headers besides.
    fn call(&self, line: &str, headers: &[&str], body: &[u8]) -> Answer {
        let mut request = format!(
            "{line} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\
             Content-Length: {}\r\n",
            self.file.api,
            self.token(),
            body.len()
        );
        for header in headers {
            request.push_str(&format!("{header}\r\n"));
        }
        request.push_str("\r\n");
        self.raw(&[request.as_bytes(), body].concat())
    }

    fn get(&self, path: &str) -> Answer {
        self.call(&format!("GET {path}"), &[], b"")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        let json = body.to_string();
        self.call(&format!("POST {path}"), &["Content-Type: application/json"], json.as_bytes())
    }

    /// The command line, talking to this node.
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_leasehold"));
        command
            .env("LEASEHOLD_API", format!("http://{}", self.file.api))
            .env("XDG_STATE_HOME", &self.state)
            .env_remove("LEASEHOLD_TOKEN")
            .env_remove("LEASEHOLD_DIR")
            .stdin(Stdio::null());
        command
    }

    fn cli(&self, args: &[&str]) -> Output {
        self.command().args(args).output().expect("runs")
    }

    fn cli_json(&self, args: &[&str]) -> Value {
        let output = self.cli(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    fn sees_offer_of(&self, name: &str) {
        until("the offer is known", || {
            let offers = self.get("/v1/offers").json();
            let good = |offer: &&Value| {
                let free = offer["shapes"].as_array().is_some_and(|shapes| !shapes.is_empty());
                offer["name"] == name && offer["up"] == true && free
            };
            offers["offers"].as_array()?.iter().find(good).map(|_| ())
        });
    }
}

fn program(fabric: &Fabric, name: &str, text: &str) -> String {
    let path = fabric.room.path().join(name);
    std::fs::write(&path, wat::parse_str(text).expect("a program")).expect("written");
    path.display().to_string()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn want() -> Value {
    json!({ "cpu": 0.5, "memory": "64M", "disk": "1M", "ttl": "60s", "max_price": "0.05",
        "budget": "0.01" })
}

const WANT: [&str; 12] = [
    "--cpu",
    "0.5",
    "--memory",
    "64M",
    "--disk",
    "1M",
    "--ttl",
    "60s",
    "--max-price",
    "0.05/h",
    "--budget",
    "0.01",
];

// ---------------------------------------------------------------- the API by itself

#[test]
fn the_api_lets_in_only_whom_it_should_and_says_why_not() {
    let fabric = Fabric::new();
    let node = fabric.node("alone", "1", &[]);
    let api = node.file.api;
    let raw = |text: String| node.raw(text.as_bytes());
    let close = "Connection: close\r\n\r\n";

    for path in ["/healthz", "/readyz", "/openapi.json"] {
        let answer = raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{close}"));
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
    }
    for path in ["/v1/node", "/metrics", "/v1/leases", "/v1/payloads", "/nothing"] {
        let answer = raw(format!("GET {path} HTTP/1.1\r\nHost: {api}\r\n{close}"));
        assert_eq!((answer.status, answer.code().as_str()), (401, "unauthorized"), "{path}");
        assert!(answer.head.to_lowercase().contains("www-authenticate: bearer"), "{answer:?}");
    }
    let wrong = "Authorization: Bearer abcdefghijklmnopqrstuvwxyz";
    let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {api}\r\n{wrong}\r\n{close}"));
    assert_eq!(answer.status, 401);
    let token = format!("Authorization: Bearer {}", node.token());
    for host in ["evil.example", "evil.example:7700", "10.1.2.3"] {
        let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {host}\r\n{token}\r\n{close}"));
        assert_eq!((answer.status, answer.code().as_str()), (403, "wrong_host"), "{host}");
        let answer = raw(format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\n{close}"));
        assert_eq!(answer.status, 403, "also where no token is needed");
    }

    assert_eq!(node.get("/v1/node").json()["name"], "alone");
    assert_eq!(node.get("/v1/nothing").code(), "not_found");
    assert_eq!(node.call("DELETE /v1/node", &[], b"").code(), "method_not_allowed");
    assert_eq!(node.get("/v1/leases?al=true").code(), "bad_request");
    assert_eq!(node.get("/v1/leases/xyz").json()["error"]["detail"]["field"], "lease");
    let unknown = "ab".repeat(32);
    for what in ["", "/receipts", "/proof", "/output", "/end"] {
        let answer = node.get(&format!("/v1/leases/{unknown}{what}"));
        assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"), "{what}");
    }

    let plan = |body: Value| node.post("/v1/plan", &body);
    assert_eq!(plan(json!({ "want": want() })).status, 200);
    for (body, named) in [
        (json!({}), "want"),
        (json!({ "want": { "max_price": "1", "budget": "1", "cpus": 2 } }), "cpus"),
        (json!({ "want": { "max_price": "x", "budget": "1" } }), "want.max_price"),
        (json!({ "want": { "max_price": "1", "budget": "1", "cpu": [] } }), "want.cpu"),
    ] {
        let answer = plan(body.clone());
        assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{body}");
        assert!(answer.json()["error"].to_string().contains(named), "{answer:?}");
    }
    let text = ["Content-Type: text/plain"];
    assert_eq!(node.call("POST /v1/plan", &text, b"{}").code(), "unsupported_media_type");
    let json = ["Content-Type: application/json"];
    assert_eq!(node.call("POST /v1/plan", &json, b"{").code(), "bad_request");
    let long = vec![b' '; 300 * 1024];
    assert_eq!(node.call("POST /v1/plan", &json, &long).status, 413);
    let order = node.post("/v1/leases", &json!({ "order": "no armour" }));
    assert_eq!(order.json()["error"]["detail"]["field"], "order");
    let both = node.post("/v1/leases", &json!({ "order": "x", "want": want() }));
    assert_eq!(both.code(), "bad_request");
    let dear = node.post("/v1/leases", &json!({ "want": { "max_price": "0", "budget": "1" } }));
    assert_eq!((dear.status, dear.code().as_str()), (422, "nothing_fits"));

    let metrics = String::from_utf8(node.get("/metrics").body).expect("text");
    for line in ["leasehold_nodes{state=\"up\"} 1", "leasehold_store_syncs_total ", "# EOF"] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }

    // More header lines than are read, and a head that never ends.
    let many = "X: y\r\n".repeat(200);
    let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {api}\r\n{token}\r\n{many}{close}"));
    assert_eq!(answer.status, 431);
    let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {api}\r\nX: {}", "y".repeat(99_999)));
    assert_eq!(answer.status, 431);
}

#[test]
fn payloads_go_in_and_out_as_they_are() {
    let fabric = Fabric::new();
    let node = fabric.node("alone", "0", &[]);
    let bytes: Vec<u8> = (0..700_000u32).map(|n| (n % 251) as u8).collect();
    let root = blake3::hash(&bytes).to_string();
    let path = format!("/v1/payloads/{root}");
    assert_eq!(node.get(&path).status, 404);
    let sent = node.call("POST /v1/payloads", &[], &bytes);
    assert_eq!(sent.status, 201);
    assert_eq!(sent.json(), json!({ "root": root, "size": 700_000, "new": true }));
    let again = node.call("POST /v1/payloads?size=700000", &[], &bytes);
    assert_eq!((again.status, &again.json()["new"]), (200, &json!(false)));
    let got = node.get(&path);
    assert_eq!(got.body, bytes);
    let head = node.call(&format!("HEAD {path}"), &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    let listed = node.get("/v1/payloads").json();
    assert_eq!(listed, json!({ "payloads": [{ "root": root, "size": 700_000 }] }));
    assert_eq!(node.call("POST /v1/payloads?size=3", &[], b"four").code(), "bad_request");
    assert_eq!(node.get("/v1/payloads/xyz").json()["error"]["detail"]["field"], "root");
    // Chunks without any length, and a body that is cut.
    let head = format!(
        "POST /v1/payloads HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\
         Connection: close\r\n",
        node.token()
    );
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    assert_eq!(node.raw(chunked.as_bytes()).json()["root"], blake3::hash(b"abc").to_string());
    let mut stream = TcpStream::connect(node.file.api).expect("connects");
    stream.write_all(format!("{head}Content-Length: 9\r\n\r\nhalf").as_bytes()).expect("sent");
    drop(stream);
    until("nothing of a cut body is kept", || {
        let listed = node.get("/v1/payloads").json();
        (listed["payloads"].as_array()?.len() == 2).then_some(())
    });
}

// ---------------------------------------------------------------- the command line

#[test]
fn a_run_goes_on_over_a_killed_node() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let mut buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let slow = program(&fabric, "slow.wasm", SLOW);
    let mut args = vec!["run", "--yes"];
    args.extend(WANT);
    args.push(&slow);
    let mut run = buyer
        .command()
        .args(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut begun = [0; 6];
    run.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("it begins");
    buyer.process.kill().expect("killed");
    buyer.process.wait().expect("gone");
    let (home, api) = (Home::at(&buyer.dir), buyer.file.api);
    let _buyer = fabric.up(&home, "buyer", "0", &[&seller], api);
    let output = run.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(output.stdout, b"done\n", "each byte once");
    assert!(stderr(&output).contains("cost "), "{output:?}");
}

#[test]
fn an_order_signed_on_another_machine_gets_a_lease() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let lessee = Secret::generate().expect("randomness");
    let certificate =
        fabric.founder.admit(lessee.id(), Role::Tenant, "elsewhere", fabric.now).expect("admits");
    let file = |name: &str| fabric.room.path().join(name);
    let text = |name: &str| file(name).display().to_string();
    let keep = leasehold_keys::disk::Existing::Keep;
    armor::write_objects(&file("certificate"), &[Item::Signed(certificate)], keep)
        .expect("written");
    let (key, certificate, draft) = (lessee.id().to_string(), text("certificate"), text("draft"));
    let mut args = vec!["order", "new", "--lessee", &key, "--certificate", &certificate];
    args.extend(["--out", &draft]);
    args.extend(WANT);
    let output = buyer.cli(&args);
    assert!(output.status.success(), "{output:?}");

    let unsigned = buyer.cli(&["lease", "request", "--order", &draft]);
    assert_eq!(unsigned.status.code(), Some(2), "{unsigned:?}");
    assert!(stderr(&unsigned).contains("leasehold-keys sign"), "{unsigned:?}");
    let items = armor::read_objects(&file("draft")).expect("reads");
    let [Item::Draft(order)] = items.as_slice() else { panic!("{items:?}") };
    let signed = lessee.signer().sign(order).expect("signs");
    armor::write_objects(&file("order"), &[Item::Signed(signed)], keep).expect("written");
    let order = text("order");
    let leased = buyer.cli_json(&["lease", "request", "--json", "--order", &order]);
    assert_eq!(leased["choice"]["lessor"], seller.file.id.to_string());
    let lease = leased["lease"].as_str().expect("a lease");
    let shown = seller.cli_json(&["lease", "show", "--json", lease]);
    assert_eq!((&shown["side"], &shown["lessee"]), (&json!("lent"), &json!(key)));
    assert!(buyer.cli(&["lease", "release", lease]).status.success());
}

#[test]
fn a_program_runs_from_plan_to_proof() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let copy = program(&fabric, "copy.wasm", COPY);
    let input = fabric.room.path().join("input");
    std::fs::write(&input, b"what is to be copied").expect("written");
    let results = fabric.room.path().join("results");
    let (input, results) = (input.display().to_string(), results.display().to_string());

    let mut args = vec!["run", "--yes", "--json", "--stdin", &input, "--output", "copy"];
    args.extend(["--output-dir", &results]);
    args.extend(WANT);
    args.push(&copy);
    let output = buyer.cli(&args);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let run: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(run["exit_code"], 7);
    assert_eq!(run["stdout"], "what is to be copied");
    assert_eq!(run["stderr"], "noted");
    assert_eq!(run["outcome"]["kind"], "exited");
    assert_eq!(run["end"], "released");
    assert_eq!(run["lessor"], seller.file.id.to_string());
    assert!(run["receipts"].as_u64().expect("a count") >= 1, "{run}");
    assert!(run["bytes_uploaded"].as_u64().expect("a count") > 20, "{run}");
    let copied = std::fs::read(Path::new(&results).join("copy")).expect("the output");
    assert_eq!(copied, b"what is to be copied");

    // The same again, as a person sees it: data alone on standard output.
    let mut args = vec!["run", "-y", "--stdin", &input];
    args.extend(WANT);
    args.push(&copy);
    let output = buyer.cli(&args);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(output.stdout, b"what is to be copied");
    let said = stderr(&output);
    for part in ["plan", "seller", "noted", "cost ", "USD"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert!(!said.contains('\u{1b}'), "no colours into a pipe: {said}");

    // What was run can be shown, read and proven.
    let lease = run["lease"].as_str().expect("a lease");
    let shown = buyer.cli_json(&["lease", "show", "--json", &lease[..12]]);
    assert_eq!((&shown["stage"], &shown["charge"]), (&json!("ended"), &run["charge"]));
    let listed = buyer.cli_json(&["lease", "list", "--all", "--json"]);
    assert_eq!(listed["leases"].as_array().map(Vec::len), Some(2));
    assert_eq!(buyer.cli_json(&["lease", "list", "--json"])["leases"], json!([]));
    let receipts = buyer.cli_json(&["receipts", "--json", lease]);
    let last = receipts["receipts"].as_array().and_then(|all| all.last()).expect("a receipt");
    assert_eq!((&last["end"], &last["countersigned"]), (&json!("released"), &json!(true)));
    assert_eq!(last["charge"], run["charge"]);
    let proof = fabric.room.path().join("proof").display().to_string();
    let exported = buyer.cli(&["lease", "export", lease, "--out", &proof]);
    assert!(exported.status.success(), "{exported:?}");
    let again = buyer.cli(&["lease", "export", lease, "--out", &proof]);
    assert_eq!(again.status.code(), Some(7), "an existing file is not replaced");
    let verified = buyer.cli_json(&["verify", "--json", &proof]);
    assert_eq!(verified["verified"], true);
    assert_eq!(verified["items"][0]["lease"], lease);
    let other = "cd".repeat(32);
    let elsewhere = buyer.cli(&["verify", "--fabric", &other, &proof]);
    assert_eq!(elsewhere.status.code(), Some(1));
    for table in [vec!["nodes"], vec!["offers"], vec!["ps"], vec!["receipts", lease]] {
        let output = buyer.cli(&table);
        assert!(output.status.success() && !output.stdout.is_empty(), "{output:?}");
    }
    let mut explain = vec!["explain", "--json"];
    explain.extend(WANT);
    let plan = buyer.cli_json(&explain);
    assert_eq!(plan["choices"][0]["name"], "seller");
}

#[test]
fn a_detached_job_is_followed_and_ctrl_c_gives_its_lease_back() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let endless = program(&fabric, "endless.wasm", ENDLESS);

    let mut args = vec!["run", "--yes", "-d", "--on", "seller"];
    args.extend(WANT);
    args.push(&endless);
    let output = buyer.cli(&args);
    assert!(output.status.success(), "{output:?}");
    let lease = String::from_utf8(output.stdout).expect("text").trim().to_string();
    until("the job's output is there", || {
        let output = buyer.cli(&["logs", &lease]);
        (output.status.success() && output.stdout == b"begun\n").then_some(())
    });
    until("the job is listed on both sides", || {
        let on = |node: &Node| node.cli_json(&["ps", "--json"])["jobs"].as_array().map(Vec::len);
        (on(&buyer) == Some(1) && on(&seller) == Some(1)).then_some(())
    });
    let twice = buyer.post(
        &format!("/v1/leases/{lease}/claim"),
        &json!({ "job": { "program":
        { "root": blake3::hash(b"abc").to_string(), "size": 3 } } }),
    );
    assert_eq!(twice.status, 400, "a payload that is not here: {twice:?}");
    let released = buyer.cli(&["lease", "release", &lease]);
    assert!(released.status.success(), "{released:?}");
    let end = buyer.get(&format!("/v1/leases/{lease}/end?timeout_s=60")).json();
    assert_eq!((&end["ended"], &end["reason"]), (&json!(true), &json!("released")));
    assert_eq!(end["outcome"]["kind"], "stopped");

    // Attached, and interrupted.
    let mut args = vec!["run", "--yes"];
    args.extend(WANT);
    args.push(&endless);
    let mut run = buyer
        .command()
        .args(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut begun = [0; 6];
    run.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("it begins");
    assert_eq!(&begun, b"begun\n");
    terminate(&run);
    let output = run.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(stderr(&output).contains("cost "), "{output:?}");
    until("the seller has its capacity back", || {
        let node = seller.get("/v1/node").json();
        (node["promised"]["cpu_milli"] == 0).then_some(())
    });
}

#[test]
fn what_goes_wrong_says_what_to_do() {
    let fabric = Fabric::new();
    let node = fabric.node("alone", "0", &[]);
    let copy = program(&fabric, "copy.wasm", COPY);
    let code = |output: &Output| output.status.code().expect("a code");

    // No terminal and no --yes.
    let mut args = vec!["run"];
    args.extend(WANT);
    args.push(&copy);
    let output = node.cli(&args);
    assert_eq!(code(&output), 2, "{output:?}");
    assert!(stderr(&output).contains("--yes"), "{output:?}");

    // Nobody sells.
    args.insert(1, "--yes");
    let output = node.cli(&args);
    assert_eq!(code(&output), 5, "{output:?}");
    assert!(stderr(&output).contains("alone"), "it says what spoke against it: {output:?}");

    // No such program.
    let mut missing = vec!["run", "--yes"];
    missing.extend(WANT);
    missing.push("/nowhere.wasm");
    assert_eq!(code(&node.cli(&missing)), 3);

    // A wrong token, and none.
    let token = fabric.room.path().join("token");
    leasehold_keys::disk::write_atomic(
        &token,
        b"abcdefghijklmnopqrstuvwxyz",
        0o600,
        leasehold_keys::disk::Existing::Keep,
    )
    .expect("written");
    let output = node.cli(&["--token-file", token.to_str().expect("text"), "nodes"]);
    assert_eq!(code(&output), 5, "{output:?}");
    assert!(stderr(&output).contains("--token-file"), "{output:?}");
    let elsewhere = fabric.room.path().join("elsewhere");
    let output = node
        .command()
        .env("XDG_STATE_HOME", &elsewhere)
        .env("XDG_DATA_HOME", &elsewhere)
        .args(["nodes", "--json"])
        .output()
        .expect("runs");
    assert_eq!(code(&output), 5, "{output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(said["exit"], 5);

    // Nobody there.
    let api = format!("http://{}", node.file.api);
    let published = node.state.join("leasehold/api").join(format!(
        "{}-{}",
        node.file.api.ip(),
        node.file.api.port()
    ));
    assert!(published.exists());
    drop(node);
    assert!(!published.exists(), "the token goes with its node");
    let output = Command::new(env!("CARGO_BIN_EXE_leasehold"))
        .args(["--api", &api, "nodes"])
        .env("XDG_STATE_HOME", &elsewhere)
        .output()
        .expect("runs");
    assert_eq!(code(&output), 6, "{output:?}");
    assert!(stderr(&output).contains("leasehold up"), "{output:?}");
}
