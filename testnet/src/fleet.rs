//! A fleet: real node processes on loopback, each in a directory of its own, under one founder.
//!
//! ```text
//! ROOT/               0700; a temporary one goes at the end
//!   lock              held while the fleet runs: one fleet per directory
//!   fabric/           the organisation's key and its charter
//!   NAME/             one node's directory, as `leasehold init` would make it, and its node.log;
//!                     maybe a file system of its own
//!
//! this process --pipe--> guard                  ends the fleet when the pipe closes unannounced
//!       |
//!       +--> node, node, node --> wardens --> runners
//! ```
//!
//! Nothing stays behind, however this process ends: [`Fleet::stop`] ends everything in order,
//! dropping a fleet ends it too, and where this process is killed, the guard does it. Each of them
//! ends only nodes and jobs whose command lines say that they work under ROOT.

mod guard;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use leasehold_keys::file::Protection;
use leasehold_node::api::body::{NodeInfo, Nodes};
use leasehold_node::api::token::{self, Token, TokenError};
use leasehold_node::cli;
use leasehold_node::cli::up::{NODE_FILE, NodeFile};
use leasehold_node::client::{self, Client, ClientError};
use leasehold_node::clock;
use leasehold_node::config::{Config, FILE};
use leasehold_node::home::{Allowance, Founder, Founding, Home, HomeError, mandate};
use leasehold_node::work::{self, Exec, Process};
use leasehold_proto::base::time::Wall;
use leasehold_proto::words::charter::Role;
use leasehold_proto::{Amount, Span};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use self::guard::{Guard, end_processes, guard_main, unmount_below};

/// The first argument that makes this executable a node.
pub const NODE: &str = "node";
/// The first argument that makes this executable the guard of a fleet.
const GUARD: &str = "__fleet";
/// How many nodes may be starting at once: each takes a core for a while, and a node lets only 16
/// strangers shake hands at a time.
const STARTING: usize = 8;
/// How long a node may take until it listens.
const LISTENS: Duration = Duration::from_secs(60);
/// How long a node gets to stop by itself.
const STOPS: Duration = Duration::from_secs(5);
/// Between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(20);
/// The name of the fleet's organisation.
const ORGANISATION: &str = "testnet";
/// How many nodes a node joins by, where it may choose.
const JOINS: usize = 3;

/// What fleet is wanted.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where it lives; a temporary directory, gone at the end, when not said.
    pub dir: Option<PathBuf>,
    /// The executable that plays the nodes: one whose `main` begins with [`hidden`].
    pub program: PathBuf,
    /// The nodes, each with a name of its own; see [`config`]. The first one is who the others
    /// join by.
    pub nodes: Vec<Config>,
    /// The name of the fabric.
    pub fabric: String,
    /// How long ago charter and certificates were made, by what they say: nodes whose clocks are
    /// slow find those of just now not valid yet.
    pub age: Span,
}

impl Plan {
    /// A fleet of these nodes in a temporary directory, played by this executable.
    #[must_use]
    pub fn new(nodes: Vec<Config>) -> Self {
        let (program, fabric) = ("/proc/self/exe".into(), "testnet".into());
        Self { dir: None, program, nodes, fabric, age: Span::ZERO }
    }
}

/// The configuration of a node that listens on free ports of 127.0.0.1 and sells one core, 512 MiB
/// and 256 MiB of disk at the default prices.
#[must_use]
pub fn config(name: &str) -> Config {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config = Config::default();
    config.node.name = name.into();
    config.listen.link = any;
    config.listen.probe = any;
    config.listen.data = any;
    config.listen.api = any;
    config.offer.sell = true;
    config.offer.cpu = "1".into();
    config.offer.memory = "512M".into();
    config.offer.disk = "256M".into();
    config.offer.min_disk_free = "64M".into();
    config
}

/// Why a fleet, or one of its nodes, is not as wanted.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// A file or directory.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// Another fleet runs in the directory.
    #[error("a fleet runs in {0}, or is just ending there; end it, or choose another directory")]
    InUse(PathBuf),
    /// The plan makes no sense.
    #[error("{0}")]
    Plan(String),
    /// A node's directory.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// A configuration cannot be written as text.
    #[error("configuration of {name}: {source}")]
    Config {
        /// Whose.
        name: String,
        /// Why not.
        source: toml::ser::Error,
    },
    /// A process cannot be started.
    #[error("cannot start {what}: {source}")]
    Spawn {
        /// What was to be started.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A node ended while it started.
    #[error("{name} ended with {status} while it started; {log} ends with:\n{tail}")]
    Ended {
        /// Which one.
        name: String,
        /// How.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// A node does not come to listen.
    #[error("{name} did not listen within {} s; see {log}", LISTENS.as_secs())]
    Silent {
        /// Which one.
        name: String,
        /// Its log.
        log: PathBuf,
    },
    /// A node that must run does not.
    #[error("{0} does not run")]
    Down(String),
    /// A node's token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A node's API.
    #[error("{name}: {source}")]
    Client {
        /// Whose.
        name: String,
        /// What it said.
        source: ClientError,
    },
    /// The nodes do not find each other.
    #[error("after {} s {name} still does not see {missing}", after.as_secs())]
    Map {
        /// Who looks.
        name: String,
        /// Who is missing.
        missing: String,
        /// How long was waited.
        after: Duration,
    },
    /// Jobs of an ended node.
    #[error("jobs of {name}: {source}")]
    Jobs {
        /// Whose.
        name: String,
        /// Why they stay.
        source: work::OpenError,
    },
    /// Something runs on.
    #[error("processes {0:?} of the fleet do not end")]
    Stays(Vec<i32>),
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> FleetError + '_ {
    move |source| FleetError::Io { path: path.into(), source }
}

/// One node of a fleet.
#[derive(Debug)]
pub struct Member {
    name: String,
    home: Home,
    config: Config,
    process: Option<Child>,
    file: Option<NodeFile>,
    /// Where its log is.
    log: PathBuf,
    /// The file that says how wrong its wall clock is, where a test wants that.
    wall: Option<PathBuf>,
}

/// What a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory, in bytes.
    pub resident: u64,
    /// User and system CPU time since it started.
    pub cpu: Duration,
}

impl Member {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.home.dir()
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.log.clone()
    }

    /// Its configuration, with the ports it listens on once it has started.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Who and where it is, while it runs.
    ///
    /// # Errors
    /// When it does not run.
    pub fn file(&self) -> Result<&NodeFile, FleetError> {
        self.file.as_ref().ok_or_else(|| FleetError::Down(self.name.clone()))
    }

    /// The URL of its API, while it runs.
    ///
    /// # Errors
    /// When it does not run.
    pub fn api(&self) -> Result<String, FleetError> {
        Ok(format!("http://{}", self.file()?.api))
    }

    /// A client of its API.
    ///
    /// # Errors
    /// When it does not run or its token cannot be read.
    pub fn client(&self) -> Result<Client, FleetError> {
        let token = Token::read(&self.home.path(token::FILE))?;
        let url = self.api()?;
        let authority = client::parse_url(&url).map_err(|source| self.said(source))?;
        Ok(Client::new(authority, Some(token)))
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// When it does not run or does not answer.
    pub async fn info(&self) -> Result<NodeInfo, FleetError> {
        self.client()?.get("/v1/node").await.map_err(|source| self.said(source))
    }

    /// The nodes it knows.
    ///
    /// # Errors
    /// When it does not run or does not answer.
    pub async fn nodes(&self) -> Result<Nodes, FleetError> {
        self.client()?.get("/v1/nodes").await.map_err(|source| self.said(source))
    }

    /// What its process uses now.
    ///
    /// # Errors
    /// When it does not run.
    pub fn usage(&self) -> Result<Usage, FleetError> {
        let pid = self.file()?.pid;
        usage(pid).ok_or_else(|| FleetError::Down(self.name.clone()))
    }

    /// The wardens of its jobs by the names of these, as the processes of this host show them,
    /// whether it runs or not.
    #[must_use]
    pub fn wardens(&self) -> BTreeMap<String, Process> {
        guard::wardens(self.home.dir())
    }

    fn said(&self, source: ClientError) -> FleetError {
        FleetError::Client { name: self.name.clone(), source }
    }

    /// Sends a signal, if the process has not ended.
    fn signal(&mut self, signal: Signal) {
        if let Some(child) = &mut self.process
            && matches!(child.try_wait(), Ok(None))
        {
            // It is our child and not reaped, so its pid is nobody else's.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    /// Whether its process has ended, which is then reaped.
    fn ended(&mut self) -> bool {
        let running =
            self.process.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if !running {
            self.process = None;
            self.file = None;
        }
        !running
    }
}

/// What the process `pid` uses, as proc_pid_stat(5) says.
pub(crate) fn usage(pid: u32) -> Option<Usage> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_usage(&text, rustix::param::clock_ticks_per_second(), rustix::param::page_size() as u64)
}

/// The name in field 2 may hold anything, parentheses too: field 3 comes after the last one.
fn parse_usage(stat: &str, ticks_per_second: u64, page: u64) -> Option<Usage> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let ticks = number(14)?.saturating_add(number(15)?);
    Some(Usage {
        cpu: Duration::from_millis(ticks.saturating_mul(1000) / ticks_per_second.max(1)),
        resident: number(24)?.saturating_mul(page),
    })
}

/// How a fleet ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stopped {
    /// Nodes that did not stop by themselves in time and were killed.
    pub forced: usize,
    /// Jobs that still ran and were ended.
    pub jobs: usize,
}

/// A running fleet.
#[derive(Debug)]
pub struct Fleet {
    root: PathBuf,
    temporary: bool,
    program: PathBuf,
    founder: Founder,
    members: Vec<Member>,
    /// Where logs and wall clocks lie, if not in the nodes' directories.
    apart: Option<PathBuf>,
    age: Span,
    began: Option<Instant>,
    guard: Guard,
    _lock: File,
}

impl Fleet {
    /// Makes the directories, keys and certificates of a fleet; no node runs yet.
    ///
    /// A directory that held a fleet before is used again: its fabric and the nodes of the same
    /// names stay who they were.
    ///
    /// # Errors
    /// When the directory is in use or cannot be used, or the plan makes no sense.
    pub fn found(plan: Plan) -> Result<Self, FleetError> {
        let temporary = plan.dir.is_none();
        let root = make_root(plan.dir.as_deref())?;
        let lock = lock(&root)?;
        let guard = Guard::start(&plan.program, &root, temporary)?;
        let founder = founder(&root, &plan.fabric, ago(plan.age))?;
        let (program, age) = (plan.program, plan.age);
        let members = Vec::new();
        let (apart, began) = (None, None);
        let mut fleet = Self {
            root,
            temporary,
            program,
            founder,
            members,
            apart,
            age,
            began,
            guard,
            _lock: lock,
        };
        for config in plan.nodes {
            fleet.add(config)?;
        }
        Ok(fleet)
    }

    /// Founds a fleet and starts all of its nodes.
    ///
    /// # Errors
    /// When it cannot be founded, or a node does not start.
    pub async fn start(plan: Plan) -> Result<Self, FleetError> {
        let mut fleet = Self::found(plan)?;
        // What a fleet that was killed together with its guard left here.
        end_processes(&fleet.root).await?;
        fleet.start_all().await?;
        Ok(fleet)
    }

    /// Lets nodes that are added from now on write their logs to `dir`, as NAME.log, and read from
    /// NAME.wall in there how many milliseconds their wall clocks are wrong.
    pub fn keep_apart(&mut self, dir: PathBuf) {
        self.apart = Some(dir);
    }

    /// Admits one more node, which does not run yet, and gives its index.
    ///
    /// # Errors
    /// When its directory cannot be made, or its name is taken or is none.
    pub fn add(&mut self, config: Config) -> Result<usize, FleetError> {
        let name = config.node.name.clone();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let taken = self.members.iter().any(|member| member.name == name);
        if name.is_empty() || !name.chars().all(plain) || name == "fabric" || taken {
            let message =
                format!("'{name}' does not name a node: expected letters, digits and -, once each");
            return Err(FleetError::Plan(message));
        }
        let home = Home::at(self.root.join(&name));
        if !home.holds_node() {
            self.admit(&home, &name)?;
        }
        let file = |end: &str| Some(self.apart.as_ref()?.join(format!("{name}.{end}")));
        let (log, wall) = (file("log").unwrap_or_else(|| home.path("node.log")), file("wall"));
        self.members.push(Member { name, home, config, process: None, file: None, log, wall });
        Ok(self.members.len() - 1)
    }

    /// Makes a node's directory: who it is, and a tenant of its own in whose name it orders.
    fn admit(&self, home: &Home, name: &str) -> Result<(), FleetError> {
        home.create()?;
        let now = ago(self.age);
        home.put("charter", &self.founder.charter)?;
        let tenant = home.new_key("tenant.key", &Protection::Clear)?;
        let admitted = self.founder.admit(tenant.id(), Role::Tenant, name, now)?;
        home.put("tenant.certificate", &admitted)?;
        // With the node's key there, the directory holds a node: it comes after what may fail.
        let node = home.new_key("node.key", &Protection::Clear)?;
        home.put("certificate", &self.founder.admit(node.id(), Role::Node, name, now)?)?;
        let allowance = Allowance {
            max_hourly: Amount(u64::MAX),
            max_total: Amount(u64::MAX),
            max_term: MAX_TERM,
        };
        home.put("mandate", &mandate(&tenant, &admitted, node.id(), allowance, now)?)?;
        Ok(())
    }

    /// The nodes.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// One node.
    ///
    /// # Errors
    /// When there is none with this index.
    pub fn member(&self, index: usize) -> Result<&Member, FleetError> {
        self.members.get(index).ok_or_else(|| no_member(index))
    }

    /// Where the fleet lives.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The executable that plays the nodes.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// When its first process was started.
    #[must_use]
    pub const fn began(&self) -> Option<Instant> {
        self.began
    }

    /// Starts every node that does not run: first one for the others to join by, then the others,
    /// some at a time. Comes back when all of them listen.
    ///
    /// # Errors
    /// When a node does not start.
    pub async fn start_all(&mut self) -> Result<(), FleetError> {
        let mut waiting: Vec<usize> = (0..self.members.len())
            .filter(|index| self.members.get(*index).is_some_and(|m| m.process.is_none()))
            .rev()
            .collect();
        let running = self.members.iter().any(|member| member.file.is_some());
        if !running && let Some(seed) = waiting.pop() {
            self.start_one(seed).await?;
        }
        let mut starting: Vec<(usize, Instant)> = Vec::new();
        loop {
            while starting.len() < STARTING
                && let Some(index) = waiting.pop()
            {
                self.spawn(index)?;
                starting.push((index, Instant::now()));
            }
            let mut still = Vec::new();
            for (index, since) in starting {
                if !self.listens(index, since)? {
                    still.push((index, since));
                }
            }
            starting = still;
            if starting.is_empty() && waiting.is_empty() {
                return Ok(());
            }
            sleep(LOOK).await;
        }
    }

    /// Starts one node that does not run, and waits until it listens: on the ports that it had
    /// before, if it ran before.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_one(&mut self, index: usize) -> Result<(), FleetError> {
        self.spawn(index)?;
        let since = Instant::now();
        while !self.listens(index, since)? {
            sleep(LOOK / 4).await;
        }
        Ok(())
    }

    fn member_mut(&mut self, index: usize) -> Result<&mut Member, FleetError> {
        self.members.get_mut(index).ok_or_else(|| no_member(index))
    }

    /// Link addresses of running nodes to join by, the oldest first, where others reach them.
    fn joins(&self, but: usize) -> Vec<SocketAddr> {
        let others = self.members.iter().enumerate().filter(|(index, _)| *index != but);
        let running = others.filter_map(|(_, member)| Some((member, member.file.as_ref()?)));
        let links = running.filter_map(|(member, file)| {
            member.config.advertise.link.first().or(file.link.first())
        });
        links.take(JOINS).copied().collect()
    }

    /// Starts the process of one node that does not run; [`Fleet::listens`] says when it is up.
    ///
    /// # Errors
    /// When it runs, or cannot be started.
    pub fn spawn(&mut self, index: usize) -> Result<(), FleetError> {
        let joins = self.joins(index);
        let (program, root, temporary) = (self.program.clone(), self.root.clone(), self.temporary);
        let member = self.member_mut(index)?;
        if !member.ended() {
            return Err(FleetError::Plan(format!("{} runs already", member.name)));
        }
        member.config.fabric.join = joins;
        let text = toml::to_string(&member.config)
            .map_err(|source| FleetError::Config { name: member.name.clone(), source })?;
        let path = member.home.path(FILE);
        fs::write(&path, text).map_err(io_at(&path))?;
        // A killed node leaves its file; what is there from now on is the new one's.
        let path = member.home.path(NODE_FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_at(&path)(error));
            }
            _ => {}
        }
        let log = member.log();
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&log);
        let file = file.map_err(io_at(&log))?;
        let mut command = leasehold(&program);
        command.arg("up").arg("--dir").arg(member.home.dir());
        if temporary {
            // What a node publishes for its user's commands goes with the fleet.
            command.env("XDG_STATE_HOME", root.join("state"));
        }
        if let Some(wall) = &member.wall {
            command.env(clock::TEST_WALL, wall);
        }
        // Ctrl-C at a terminal goes to this process alone, which then stops the fleet in order.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let child = command
            .spawn()
            .map_err(|source| FleetError::Spawn { what: member.name.clone(), source })?;
        member.process = Some(child);
        self.began.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Whether a node that was started at `since` has come to listen.
    ///
    /// # Errors
    /// When it has ended instead, or takes too long.
    pub fn listens(&mut self, index: usize, since: Instant) -> Result<bool, FleetError> {
        let member = self.member_mut(index)?;
        let Some(child) = &mut member.process else {
            return Err(FleetError::Down(member.name.clone()));
        };
        let pid = child.id();
        if let Ok(Some(status)) = child.try_wait() {
            member.process = None;
            let (name, log) = (member.name.clone(), member.log());
            let tail = tail(&log);
            return Err(FleetError::Ended { name, status, log, tail });
        }
        // The file comes whole or not at all.
        let read = fs::read(member.home.path(NODE_FILE)).ok();
        let file = read.and_then(|text| serde_json::from_slice::<NodeFile>(&text).ok());
        let Some(file) = file.filter(|file| file.pid == pid) else {
            if since.elapsed() > LISTENS {
                let (name, log) = (member.name.clone(), member.log());
                return Err(FleetError::Silent { name, log });
            }
            return Ok(false);
        };
        // After a restart others should find it where they know it.
        let listen = &mut member.config.listen;
        listen.link = file.link.first().copied().unwrap_or(listen.link);
        listen.probe = file.probe;
        listen.data = file.data;
        listen.api = file.api;
        member.file = Some(file);
        Ok(true)
    }

    /// Waits until every running node sees every other running one up. Gives how long that took
    /// from the start of the first process on.
    ///
    /// # Errors
    /// When it takes longer than `patience` from now on.
    pub async fn map(&self, patience: Duration) -> Result<Duration, FleetError> {
        let begun = Instant::now();
        let all: Vec<(String, &str)> = self
            .members
            .iter()
            .filter_map(|member| Some((member.file.as_ref()?.id.to_string(), member.name.as_str())))
            .collect();
        for member in self.members.iter().filter(|member| member.file.is_some()) {
            loop {
                let seen = member.nodes().await;
                let up = |id: &str| {
                    let nodes = seen.iter().flat_map(|seen| &seen.nodes);
                    nodes.into_iter().any(|node| node.up && node.id == id)
                };
                let others = all.iter().filter(|(_, name)| *name != member.name);
                let missing: Vec<_> =
                    others.filter(|(id, _)| !up(id)).map(|(_, name)| *name).collect();
                match seen {
                    Ok(_) if missing.is_empty() => break,
                    Err(error) if begun.elapsed() > patience => return Err(error),
                    _ if begun.elapsed() > patience => {
                        let (name, missing) = (member.name.clone(), missing.join(", "));
                        return Err(FleetError::Map { name, missing, after: begun.elapsed() });
                    }
                    _ => sleep(LOOK).await,
                }
            }
        }
        Ok(self.began.unwrap_or(begun).elapsed())
    }

    /// Kills a node with SIGKILL and reaps it. Its jobs stay under their wardens.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self, index: usize) -> Result<(), FleetError> {
        let member = self.member_mut(index)?;
        let Some(mut child) = member.process.take() else {
            return Err(FleetError::Down(member.name.clone()));
        };
        member.file = None;
        let path = member.home.dir();
        child.kill().map_err(io_at(path))?;
        child.wait().map_err(io_at(path))?;
        Ok(())
    }

    /// Lets a node stand still (SIGSTOP). Its jobs go on under their wardens.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&mut self, index: usize) -> Result<(), FleetError> {
        self.running(index)?.signal(Signal::STOP);
        Ok(())
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    /// When it does not run.
    pub fn resume(&mut self, index: usize) -> Result<(), FleetError> {
        self.running(index)?.signal(Signal::CONT);
        Ok(())
    }

    fn running(&mut self, index: usize) -> Result<&mut Member, FleetError> {
        let member = self.member_mut(index)?;
        if member.process.is_none() {
            return Err(FleetError::Down(member.name.clone()));
        }
        Ok(member)
    }

    /// How a node ended that was not told to, if it did; then it is reaped.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn fallen(&mut self, index: usize) -> Result<Option<ExitStatus>, FleetError> {
        let member = self.member_mut(index)?;
        let status = member.process.as_mut().and_then(|child| child.try_wait().ok()?);
        if status.is_some() {
            (member.process, member.file) = (None, None);
        }
        Ok(status)
    }

    /// Stops a node as an operator would: SIGTERM, and SIGKILL where it does not stop in time.
    /// True when it stopped by itself. Its jobs stay under their wardens.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn stop_one(&mut self, index: usize) -> Result<bool, FleetError> {
        let member = self.member_mut(index)?;
        if member.process.is_none() {
            return Err(FleetError::Down(member.name.clone()));
        }
        Ok(stop_members(std::slice::from_mut(member)).await == 0)
    }

    /// Ends nodes and their jobs; the directory stays.
    ///
    /// # Errors
    /// When something does not end.
    pub async fn end(&mut self) -> Result<Stopped, FleetError> {
        let forced = stop_members(&mut self.members).await;
        let jobs = end_processes(&self.root).await?;
        Ok(Stopped { forced, jobs })
    }

    /// Ends everything: nodes, their jobs, the temporary directory.
    ///
    /// # Errors
    /// When something does not end, or the directory cannot be removed.
    pub async fn stop(mut self) -> Result<Stopped, FleetError> {
        let stopped = self.end().await?;
        unmount_below(&self.root).map_err(io_at(&self.root))?;
        if self.temporary {
            fs::remove_dir_all(&self.root).map_err(io_at(&self.root))?;
        }
        self.guard.dismiss();
        Ok(stopped)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // The guard ends everything in order; what it leaves as zombies is reaped here.
        self.guard.alarm();
        for member in &mut self.members {
            if let Some(mut child) = member.process.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// The longest term of a lease in a fleet.
const MAX_TERM: Span = Span::secs(24 * 3600);

fn ago(age: Span) -> Wall {
    Wall(clock::now().wall.0.saturating_sub(age.as_millis()))
}

fn no_member(index: usize) -> FleetError {
    FleetError::Plan(format!("the fleet has no node number {index}"))
}

/// Makes the fleet's directory, whose path is then absolute.
fn make_root(dir: Option<&Path>) -> Result<PathBuf, FleetError> {
    match dir {
        Some(dir) => {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(io_at(dir))?;
            dir.canonicalize().map_err(io_at(dir))
        }
        None => {
            let room = std::env::temp_dir();
            let made = tempfile::Builder::new().prefix("leasehold-testnet-").tempdir();
            // Kept: the fleet, or its guard, removes it.
            let root = made.map_err(io_at(&room))?.keep();
            root.canonicalize().map_err(io_at(&root))
        }
    }
}

/// Takes the directory for one fleet, for as long as the file is open.
fn lock(root: &Path) -> Result<File, FleetError> {
    let path = root.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(io_at(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(FleetError::InUse(root.into())),
        Err(fs::TryLockError::Error(error)) => Err(io_at(&path)(error)),
    }
}

/// The organisation of the fleet in this directory, founded now if there is none.
fn founder(root: &Path, fabric: &str, now: Wall) -> Result<Founder, FleetError> {
    let home = Home::at(root.join("fabric"));
    let organisation = ORGANISATION.to_string();
    if home.path("charter").exists() {
        let (root, charter) = (home.key("org.key")?, home.get("charter", "charter")?);
        return Ok(Founder { root, organisation, charter });
    }
    home.create()?;
    let founding = Founding {
        fabric: fabric.into(),
        currency: "USD".into(),
        organisation,
        max_term: MAX_TERM,
        max_order_life: Span::secs(3600),
    };
    let key = home.new_key("org.key", &Protection::Clear)?;
    let founder = Founder::found(key, &founding, now)?;
    home.put("charter", &founder.charter)?;
    Ok(founder)
}

/// A `leasehold` command, played by `program`, that takes nothing from this process's environment.
#[must_use]
pub fn leasehold(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg0("leasehold-testnet").arg(NODE);
    // As the daemon's own main does before its first thread: a model's engine shares its threads out.
    command.env("CANDLE_NUM_THREADS", "1");
    for (name, _) in std::env::vars_os() {
        if name.as_bytes().starts_with(b"LEASEHOLD_") {
            command.env_remove(name);
        }
    }
    command
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    const MOST: u64 = 2_000;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).trim_end().to_string()
}

/// Stops these nodes; gives how many had to be killed.
async fn stop_members(members: &mut [Member]) -> usize {
    for member in members.iter_mut() {
        member.signal(Signal::TERM);
    }
    let begun = Instant::now();
    loop {
        let running = members.iter_mut().filter_map(|member| (!member.ended()).then_some(member));
        let running: Vec<&mut Member> = running.collect();
        if running.is_empty() {
            return 0;
        }
        if begun.elapsed() > STOPS {
            let forced = running.len();
            for member in running {
                if let Some(mut child) = member.process.take() {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                member.file = None;
            }
            return forced;
        }
        sleep(LOOK / 2).await;
    }
}

/// If this process was started as a part of a fleet (a node or one of its commands, a job's warden
/// or runner, the guard), does that work and returns its exit code; otherwise returns none. To be
/// called first thing in `main`, before any thread is started; `args` are the process's arguments
/// without its own name.
#[must_use]
pub fn hidden(args: &[OsString]) -> Option<ExitCode> {
    let (first, rest) = args.split_first()?;
    if first == GUARD {
        return Some(guard_main(rest.iter()));
    }
    if first == NODE {
        if let Some(code) = work::hidden(rest.iter().cloned()) {
            return Some(code);
        }
        let exec = Exec { prefix: vec![NODE.into()], ..Exec::default() };
        let line = std::iter::once(OsString::from("leasehold")).chain(rest.iter().cloned());
        return Some(cli::main(line, exec));
    }
    work::hidden(args.iter().cloned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_measured_whatever_it_calls_itself() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 99 1000 42 0";
        let usage = parse_usage(stat, 100, 4096);
        assert_eq!(usage, Some(Usage { resident: 42 * 4096, cpu: Duration::from_secs(3) }));
        assert_eq!(parse_usage("7 (a) S 1", 100, 4096), None);
        assert_eq!(parse_usage("", 100, 4096), None);
        assert!(super::usage(std::process::id()).is_some_and(|usage| usage.resident > 1 << 20));
    }

    #[test]
    fn a_directory_takes_one_fleet_at_a_time() {
        let room = tempfile::tempdir().expect("room");
        let first = lock(room.path()).expect("free");
        assert!(matches!(lock(room.path()), Err(FleetError::InUse(_))));
        drop(first);
        lock(room.path()).expect("free again");
    }
}
