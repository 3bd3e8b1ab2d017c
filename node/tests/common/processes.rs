//! A fabric of real nodes: the `leasehold` binary as processes, on ports of 127.0.0.1 that the
//! system chooses, each ended when dropped.

#![allow(dead_code)] // each test executable uses a part of it

#[path = "founded.rs"]
mod founded;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) use founded::Fabric;
use leasehold_node::api::token;
use leasehold_node::cli::up::NodeFile;
use leasehold_node::config::Config;
use leasehold_node::home::Home;
use serde_json::{Value, json};

/// Nothing here waits for a fixed time; this is only when to give up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Copies standard input to standard output and to `/out/copy`, and exits with 7.
pub(crate) const COPY: &str = r#"(module
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
pub(crate) const ENDLESS: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "begun\n")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 6))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
    (loop $on (br $on))))"#;

/// Says that it began, and six seconds later that it is done, and exits with 3.
pub(crate) const SLOW: &str = r#"(module
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

/// A node as a process, ended when dropped.
pub(crate) struct Node {
    pub(crate) process: Child,
    pub(crate) file: NodeFile,
    pub(crate) dir: PathBuf,
    pub(crate) state: PathBuf,
}

impl Fabric {
    pub(crate) fn node(&self, name: &str, cpu: &str, join: &[&Node]) -> Node {
        let home = self.home(name);
        self.up(&home, name, cpu, join, "127.0.0.1:0".parse().expect("address"))
    }

    pub(crate) fn up(
        &self,
        home: &Home,
        name: &str,
        cpu: &str,
        join: &[&Node],
        api: SocketAddr,
    ) -> Node {
        let join = join.iter().map(|node| node.file.link[0]).collect();
        self.up_at(home, name, cpu, join, api)
    }

    /// A node that only buys, and joins at these addresses.
    pub(crate) fn up_knowing(&self, home: &Home, name: &str, join: &[SocketAddr]) -> Node {
        self.up_at(home, name, "0", join.to_vec(), "127.0.0.1:0".parse().expect("address"))
    }

    fn up_at(
        &self,
        home: &Home,
        name: &str,
        cpu: &str,
        join: Vec<SocketAddr>,
        api: SocketAddr,
    ) -> Node {
        let any: SocketAddr = "127.0.0.1:0".parse().expect("address");
        let mut config = Config::default();
        config.node.name = name.into();
        (config.offer.notice, config.offer.freeze) = ("200ms".into(), "200ms".into());
        config.offer.grace = "1s".into();
        config.offer.credit = "50%".into();
        (config.listen.link, config.listen.probe) = (any, any);
        (config.listen.data, config.listen.api) = (any, api);
        config.fabric.join = join;
        config.offer.sell = cpu != "0";
        config.offer.cpu = cpu.into();
        config.offer.memory = "512M".into();
        config.offer.disk = "256M".into();
        config.offer.cpu_hour = "0.02".into();
        config.offer.min_disk_free = "1M".into();
        let text = toml::to_string(&config).expect("a configuration");
        std::fs::write(home.dir().join("leasehold.toml"), text).expect("written");
        self.again(home, name)
    }

    /// A node as it is configured already.
    pub(crate) fn again(&self, home: &Home, name: &str) -> Node {
        // What one before it left behind says nothing of this one.
        let _ = std::fs::remove_file(home.dir().join("node.json"));
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
pub(crate) struct Starting {
    pub(crate) process: Option<Child>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

pub(crate) fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, look)
}

#[allow(dead_code)] // not every test needs it
pub(crate) fn until_within<T>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < patience, "gave up on: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn terminate(process: &Child) {
    signal(process, rustix::process::Signal::TERM);
}

/// What Ctrl-C sends.
pub(crate) fn interrupt(process: &Child) {
    signal(process, rustix::process::Signal::INT);
}

fn signal(process: &Child, signal: rustix::process::Signal) {
    let pid = i32::try_from(process.id()).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("a pid"), signal).expect("signalled");
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            terminate(&self.process);
        }
        let begun = Instant::now();
        while self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            if begun.elapsed() > PATIENCE {
                eprintln!("{} does not stop when told to", self.file.name);
                let _ = self.process.kill();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.process.wait();
    }
}

/// An answer as it came over the socket.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn code(&self) -> String {
        self.json()["error"]["code"].as_str().expect("a code").to_string()
    }
}

impl Node {
    pub(crate) fn token(&self) -> String {
        token::load_or_create(&self.dir).expect("a token").reveal().to_string()
    }

    /// Sends these bytes and reads to the end.
    pub(crate) fn raw(&self, request: &[u8]) -> Answer {
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
    pub(crate) fn call(&self, line: &str, headers: &[&str], body: &[u8]) -> Answer {
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

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.call(&format!("GET {path}"), &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        let json = body.to_string();
        self.call(&format!("POST {path}"), &["Content-Type: application/json"], json.as_bytes())
    }

    /// The command line, talking to this node.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_leasehold"));
        command
            .env("LEASEHOLD_API", format!("http://{}", self.file.api))
            .env("XDG_STATE_HOME", &self.state)
            .env_remove("LEASEHOLD_TOKEN")
            .env_remove("LEASEHOLD_DIR")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        self.command().args(args).output().expect("runs")
    }

    pub(crate) fn cli_json(&self, args: &[&str]) -> Value {
        let output = self.cli(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    pub(crate) fn sees_offer_of(&self, name: &str) {
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

pub(crate) fn program(fabric: &Fabric, name: &str, text: &str) -> String {
    let path = fabric.room.path().join(name);
    std::fs::write(&path, wat::parse_str(text).expect("a program")).expect("written");
    path.display().to_string()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn want() -> Value {
    json!({ "cpu": 0.5, "memory": "64M", "disk": "1M", "ttl": "60s", "max_price": "0.05",
        "budget": "0.01" })
}

pub(crate) const WANT: [&str; 12] = [
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
