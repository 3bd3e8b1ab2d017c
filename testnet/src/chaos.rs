//! `leasehold-testnet chaos`: real nodes, real jobs, and everything that may go wrong, at random from
//! a seed; then quiet; then the judge.
//!
//! ```text
//! plan (fault) --> run: load + faults --> put right --> quiet --> judge --> verdict
//!                    |        |                                     ^
//!              histories   outside, as the harness and its witness saw it
//! ```
//!
//! Nodes reach each other through a relay alone ([`crate::relay`]), some live on small file systems
//! of their own, and each reads its wall clock past a file that can set it wrong. The harness
//! judges nothing while it runs: all is written down, and a directory of it can be judged again
//! with `--judge`.

pub mod fault;
mod load;
mod witness;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use leasehold_node::clock;
use leasehold_node::config::Config;
use leasehold_proto::base::time::Span;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use self::fault::{Fault, Frame};
use self::load::{Load, Told};
use self::witness::Witness;
use crate::fleet::{self, Fleet, FleetError, Plan};
use crate::judge::{self, Case, Invariant, JudgeError, Outside, Sight, Verdict};
use crate::relay::{Places, Relay, Way};
use crate::signal;

/// How long the nodes may take to see each other at the start.
const SEES: Duration = Duration::from_secs(60);
/// The longest term of a lease in a long run.
const TERM: Duration = Duration::from_secs(16);
/// How long a job may take to end.
const GRACE: Duration = Duration::from_secs(2);
/// How much longer than the longest lease all must be quiet before it is looked whether it is.
const QUIET: Duration = Duration::from_secs(8);
/// How long it is waited for that at most.
const RESTS: Duration = Duration::from_secs(120);
/// The mean time between two orders of one lessee.
const EVERY: Duration = Duration::from_millis(1_500);
/// How much later than in an ideal world something may happen here.
const SLACK: Span = Span::secs(4);
/// How old the fabric is: older than any wall clock is set back.
const AGE: Span = Span::secs(2 * 3600);
/// Between two looks at what is due.
const TICK: Duration = Duration::from_millis(20);
/// How long until a node that did not start is started again.
const AGAIN: Duration = Duration::from_secs(1);
/// The size of a file system that can be filled: a node with some jobs needs less than half.
const DISK: &CStr = c"size=384m,mode=0700";
/// What fills it.
const BALLAST: &str = "ballast";
/// The file that says what a kept directory is about.
const CASE: &str = "case.json";
/// The file with what was seen from outside.
const OUTSIDE: &str = "outside.jsonl";
/// The file with what went wrong, when.
const FAULTS: &str = "faults.log";
/// The most nodes: each has an address, and one for its relay.
const MOST: u32 = 50;

/// Run real nodes and jobs, let things go wrong at random, and judge what they did.
#[derive(ClapArgs, Clone, Debug)]
pub struct Args {
    /// For how long things go wrong, in minutes
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// From which everything that goes wrong is derived
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(2..=i64::from(MOST)))]
    nodes: u32,
    /// Where histories are kept, whatever comes out [default: kept in a temporary directory where
    /// an invariant does not hold]
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Run nothing: judge the histories in this directory again
    #[arg(long, value_name = "DIR", conflicts_with_all = ["keep", "minutes", "seed", "nodes"])]
    judge: Option<PathBuf>,
    /// Print one JSON object on stdout, and nothing else there
    #[arg(long)]
    json: bool,
}

/// What was found, as `--json` prints it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// What this is: `chaos`.
    pub chaos: &'static str,
    /// The seed.
    pub seed: u64,
    /// For how long things went wrong.
    pub minutes: f64,
    /// How many nodes there were.
    pub nodes: usize,
    /// Nodes that were killed.
    pub sigkills: u64,
    /// Nodes that were stopped and continued.
    pub sigstops: u64,
    /// Partitions: full, one way, and with a bridge.
    pub partitions: u64,
    /// Ways on which packets were late, lost, doubled and out of order.
    pub delays: u64,
    /// Disks that were filled.
    pub full_disks: u64,
    /// Wall clocks that were set wrong.
    pub clock_jumps: u64,
    /// Leases that were granted.
    pub leases: usize,
    /// Gangs of which a job was seen at work.
    pub gangs: usize,
    /// Gangs of which, under faults, not every member's job was seen at work.
    pub partial_gangs: usize,
    /// Jobs that nodes started.
    pub jobs: usize,
    /// Jobs that were seen at work from outside.
    pub witnessed: usize,
    /// Jobs that were lost with their node before they were seen at work.
    pub unbegun: usize,
    /// Starts of nodes.
    pub starts: usize,
    /// Nodes that ended by themselves where their disks were full, and were started again.
    pub fell: u64,
    /// Lines of histories.
    pub lines: usize,
    /// How many violations were found.
    pub violations: usize,
    /// Where the histories are, if they were kept.
    pub kept: Option<PathBuf>,
}

/// What a directory of histories is about.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// The seed.
    pub seed: u64,
    /// The names of the nodes: each has a NAME.jsonl.
    pub nodes: Vec<String>,
    /// From when on all was quiet, in microseconds of CLOCK_BOOTTIME.
    pub quiet: u64,
    /// When the case was closed.
    pub closed: u64,
    /// How much later than promptly things may be done, in milliseconds.
    pub slack_ms: u64,
    /// Whether the nodes adopt jobs when they start again.
    pub adopts: bool,
    /// Nodes, counted from zero, whose disks were filled.
    pub filled: Vec<usize>,
}

impl Kept {
    /// Reads what is kept in `dir`: the case, its histories, and what was seen from outside.
    ///
    /// # Errors
    /// When it is not there or does not read.
    pub fn read(dir: &Path) -> Result<(Self, Vec<PathBuf>, Vec<Outside>), ChaosError> {
        let path = dir.join(CASE);
        let text = fs::read(&path).map_err(io_at(&path))?;
        let unread = |error: serde_json::Error| io_at(&path)(error.into());
        let kept: Self = serde_json::from_slice(&text).map_err(unread)?;
        let histories = kept.nodes.iter().map(|name| dir.join(format!("{name}.jsonl"))).collect();
        let path = dir.join(OUTSIDE);
        let file = File::open(&path).map_err(io_at(&path))?;
        let mut outside = Vec::new();
        for line in BufReader::new(file).lines() {
            let line = line.map_err(io_at(&path))?;
            outside.push(serde_json::from_str(&line).map_err(|error| io_at(&path)(error.into()))?);
        }
        Ok((kept, histories, outside))
    }
}

/// Judges the histories that are kept in `dir`.
///
/// # Errors
/// When they cannot be read.
pub fn judge_kept(dir: &Path) -> Result<Verdict, ChaosError> {
    let (kept, histories, outside) = Kept::read(dir)?;
    Ok(judge::judge(&Case {
        histories: &histories,
        outside: &outside,
        slack: Span::millis(kept.slack_ms),
        adopts: kept.adopts.then_some(kept.filled.as_slice()),
        quiet: Some(kept.quiet),
        closed: kept.closed,
    })?)
}

/// Why there was no chaos, or nothing could be judged.
#[derive(Debug, thiserror::Error)]
pub enum ChaosError {
    /// The length makes no sense.
    #[error("--minutes {0}: give a number above 0 and up to 1000")]
    Minutes(f64),
    /// The fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The judge.
    #[error(transparent)]
    Judge(#[from] JudgeError),
    /// The programs.
    #[error("a program for jobs is not WebAssembly: {0}")]
    Program(#[from] wat::Error),
    /// A file or directory.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The relay has no place.
    #[error("the relay finds no free addresses on loopback: {0}")]
    Relay(io::Error),
    /// This process.
    #[error("cannot run: {0}")]
    Run(io::Error),
}

fn io_at(path: &Path) -> impl Fn(io::Error) -> ChaosError + '_ {
    move |source| ChaosError::Io { path: path.into(), source }
}

/// Runs the subcommand. Exits with 0 when all is well, 1 when a check said no, 2 on bad usage or
/// when it could not run. To be called before any thread is started.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    match run(args) {
        Ok(Some(summary)) => {
            if args.json {
                println!("{}", serde_json::to_string(&summary).unwrap_or_default());
            } else {
                say(&summary);
            }
            if summary.violations > 0 { ExitCode::from(1) } else { ExitCode::SUCCESS }
        }
        // The number that shells show for a program that Ctrl-C ended.
        Ok(None) => ExitCode::from(130),
        Err(error) => {
            eprintln!("leasehold-testnet chaos: {error}");
            ExitCode::from(2)
        }
    }
}

fn say(summary: &Summary) {
    let Summary { seed, nodes, minutes, leases, jobs, witnessed, starts, violations, .. } = summary;
    let Summary { gangs, partial_gangs, unbegun, .. } = summary;
    // What is judged again says nothing of its faults.
    if *minutes > 0.0 {
        let Summary { sigkills, sigstops, partitions, delays, full_disks, clock_jumps, .. } =
            summary;
        println!(
            "{minutes} min: {sigkills} SIGKILLs, {sigstops} SIGSTOPs, {partitions} partitions, \
             {delays} delays, {full_disks} full disks, {clock_jumps} clock jumps"
        );
    }
    println!(
        "seed {seed}, {nodes} nodes: {leases} leases, {gangs} gangs ({partial_gangs} not whole at \
         work), {jobs} jobs ({witnessed} seen at work, {unbegun} lost since \
         their node came back too late to begin them), {starts} starts, {violations} violations"
    );
}

/// Tells of what was found, and where to look.
fn tell(verdict: &Verdict, dir: &Path) {
    for violation in &verdict.violations {
        let at = verdict.began + violation.at_ms * 1000;
        eprintln!("  {violation} (\"at\":{at})");
    }
    if !verdict.violations.is_empty() {
        let dir = dir.display();
        eprintln!("  histories, logs and faults: {dir}");
        eprintln!("  judge them again: leasehold-testnet chaos --judge {dir}");
    }
}

/// None when it was interrupted.
fn run(args: &Args) -> Result<Option<Summary>, ChaosError> {
    if !(args.minutes > 0.0 && args.minutes <= 1_000.0) {
        return Err(ChaosError::Minutes(args.minutes));
    }
    if let Some(dir) = &args.judge {
        let verdict = judge_kept(dir)?;
        tell(&verdict, dir);
        let (kept, ..) = Kept::read(dir)?;
        let mut summary = Summary { chaos: "chaos", seed: kept.seed, ..Summary::default() };
        summary.nodes = kept.nodes.len();
        summary.kept = Some(dir.clone());
        summary.take(&verdict);
        return Ok(Some(summary));
    }
    let apart = own_mounts();
    if let Err(why) = &apart {
        eprintln!("no disk is filled: this process may not mount file systems ({why})");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(ChaosError::Run)?;
    runtime.block_on(chaos(args, apart.is_ok()))
}

/// Gives this process a view of its own of what is mounted, which is gone when its last child is.
#[allow(unsafe_code)]
fn own_mounts() -> io::Result<()> {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: unsafe only because of `UnshareFlags::FILES`, which is not passed.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", flags)?)
}

async fn chaos(args: &Args, mounts: bool) -> Result<Option<Summary>, ChaosError> {
    let mut stop = signal::Stop::listen().map_err(ChaosError::Run)?;
    let mut fleet = Fleet::found(Plan { age: AGE, ..Plan::new(Vec::new()) })?;
    let ran = {
        let run = async {
            let mut world = World::new(args, &mut fleet, mounts)?;
            world.run().await
        };
        tokio::select! {
            ran = run => Some(ran),
            () = stop.asked() => None,
        }
    };
    let judged = match ran {
        None => {
            eprintln!("interrupted: everything is being ended");
            fleet.stop().await?;
            return Ok(None);
        }
        Some(Err(error)) => {
            // The reason counts; what cannot be ended in order is ended by the fleet's drop.
            let _ = fleet.stop().await;
            return Err(error);
        }
        Some(Ok(ran)) => ran.judge(args, &mut fleet).await,
    };
    fleet.stop().await?;
    judged.map(Some)
}

/// How a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    Up,
    Paused,
    Starting(Instant),
    Down,
}

/// A node as the harness knows it.
#[derive(Clone, Copy, Debug)]
struct Node {
    stands: Stands,
    /// Rises with each start: what was planned for an earlier life is void.
    life: u64,
    disk: Disk,
}

/// How a node's disk stands: a full one excuses a node that ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    /// It has had room for as long as this life lasts.
    Roomy,
    Full,
    /// It was full in this life. What the database could not write then comes to light when it is
    /// next looked after, which may be long after there was room again.
    WasFull,
}

/// Something that is due at some time.
#[derive(Clone, Copy, Debug)]
enum Act {
    Begin(usize),
    Start(usize),
    Resume(usize, u64),
    EndWays(u64),
    EmptyDisk(usize),
    RightClock(usize),
}

/// The fabric, while things go wrong.
struct World<'a> {
    fleet: &'a mut Fleet,
    relay: Relay,
    dir: PathBuf,
    faults: Vec<(Duration, Fault)>,
    began: Instant,
    length: Duration,
    term: Duration,
    agenda: BTreeMap<(Instant, u64), Act>,
    planned: u64,
    nodes: Vec<Node>,
    outside: Vec<Outside>,
    /// Nodes whose disks were filled.
    filled: BTreeSet<usize>,
    log: File,
    summary: Summary,
}

/// What a run left to be judged.
struct Ran {
    kept: Kept,
    dir: PathBuf,
    outside: Vec<Outside>,
    summary: Summary,
}

/// The sockets of a node or of its relay, on an address of this process's own on loopback.
fn places(net: [u8; 2], host: u8) -> Places {
    let address = Ipv4Addr::new(127, net[0], net[1], host);
    [7701, 7702, 7703].map(|port| SocketAddr::from((address, port)))
}

/// A relay for so many nodes, and the part of loopback that it and they are on.
fn relay(nodes: u8, seed: u64) -> Result<([u8; 2], Relay), ChaosError> {
    let pid = std::process::id().to_le_bytes();
    let mut last = io::ErrorKind::AddrInUse.into();
    for attempt in 0..16 {
        let net = [64 + pid[1] % 128, pid[0].wrapping_add(attempt)];
        let of = |n| (places(net, 100 + n), places(net, 10 + n));
        match Relay::start(&(0..nodes).map(of).collect::<Vec<_>>(), seed) {
            Ok(relay) => return Ok((net, relay)),
            Err(error) => last = error,
        }
    }
    Err(ChaosError::Relay(last))
}

fn config(name: &str, dir: &Path, net: [u8; 2], nth: u8) -> Config {
    let mut config = fleet::config(name);
    let [link, probe, data] = places(net, 10 + nth);
    let api = SocketAddr::new(link.ip(), 7700);
    (config.listen.link, config.listen.probe) = (link, probe);
    (config.listen.data, config.listen.api) = (data, api);
    let [link, probe, data] = places(net, 100 + nth).map(|place| vec![place]);
    (config.advertise.link, config.advertise.probe, config.advertise.data) = (link, probe, data);
    config.node.history = dir.join(format!("{name}.jsonl"));
    config.offer.memory = "1G".into();
    config.offer.disk = "128M".into();
    config.offer.min_disk_free = "32M".into();
    config.offer.grace = format!("{}s", GRACE.as_secs());
    (config.offer.notice, config.offer.freeze) = ("1s".into(), "1s".into());
    config.log.filter = "info,leasehold_node=debug".into();
    config
}

impl<'a> World<'a> {
    fn new(args: &Args, fleet: &'a mut Fleet, mounts: bool) -> Result<Self, ChaosError> {
        let count = u8::try_from(args.nodes).unwrap_or(u8::MAX);
        let dir = match &args.keep {
            Some(dir) => dir.clone(),
            None => fleet.root().join("evidence"),
        };
        let make = |dir: &Path| DirBuilder::new().recursive(true).mode(0o700).create(dir);
        make(&dir).map_err(io_at(&dir))?;
        let dir = dir.canonicalize().map_err(io_at(&dir))?;
        let log = dir.join(FAULTS);
        let log = OpenOptions::new().append(true).create(true).open(&log).map_err(io_at(&log))?;
        let (net, relay) = relay(count, args.seed)?;
        fleet.keep_apart(dir.clone());
        let mut disks = Vec::new();
        for nth in 0..count {
            let name = format!("node-{}", nth + 1);
            let history = dir.join(format!("{name}.jsonl"));
            if history.exists() {
                let why = "there are histories already: choose another directory";
                return Err(io_at(&history)(io::Error::new(io::ErrorKind::AlreadyExists, why)));
            }
            if mounts && nth % 2 == 1 {
                let place = fleet.root().join(&name);
                make(&place).map_err(io_at(&place))?;
                match mount("tmpfs", &place, "tmpfs", MountFlags::empty(), DISK) {
                    Ok(()) => disks.push(usize::from(nth)),
                    Err(why) => eprintln!("the disk of {name} is not filled: {why}"),
                }
            }
            fleet.add(config(&name, &dir, net, nth))?;
        }
        let length = Duration::from_secs_f64(args.minutes * 60.0);
        let frame = Frame { nodes: usize::from(count), length, disks };
        let node = Node { stands: Stands::Up, life: 0, disk: Disk::Roomy };
        let summary = Summary {
            chaos: "chaos",
            seed: args.seed,
            minutes: args.minutes,
            nodes: usize::from(count),
            ..Summary::default()
        };
        Ok(Self {
            fleet,
            relay,
            dir,
            faults: fault::plan(args.seed, &frame),
            began: Instant::now(),
            length,
            // In a short run leases are short, too: some end before it does.
            term: TERM.min(length / 4).max(Duration::from_secs(5)),
            agenda: BTreeMap::new(),
            planned: 0,
            nodes: vec![node; usize::from(count)],
            outside: Vec::new(),
            filled: BTreeSet::new(),
            log,
            summary,
        })
    }

    async fn run(&mut self) -> Result<Ran, ChaosError> {
        self.fleet.start_all().await?;
        self.fleet.map(SEES).await?;
        let dirs = self.fleet.members().iter().map(|member| member.dir().to_path_buf());
        let witness = Witness::start(dirs.collect());
        self.began = Instant::now();
        self.load()?;
        for (nth, (at, _)) in self.faults.clone().iter().enumerate() {
            self.plan(*at, Act::Begin(nth));
        }
        while self.began.elapsed() < self.length {
            self.step(true).await?;
        }
        let quiet = self.put_right().await?;
        let closed = self.rest(quiet).await?;
        for (host, lease) in witness.there() {
            let what = format!("the job of {lease} is still there at the end");
            self.saw(host, Sight::Wrong(Invariant::BoundedLife, what));
        }
        let mut outside = std::mem::take(&mut self.outside);
        outside.extend(witness.tell());
        let relayed = self.relay.relayed();
        self.note(&format!("the relay: {relayed:?}"));
        let nodes = self.fleet.members().iter().map(|member| member.name().to_string());
        let (nodes, slack_ms) = (nodes.collect(), SLACK.as_millis());
        let filled = self.filled.iter().copied().collect();
        // Nodes adopt the jobs of an earlier run: a restart loses none.
        let (seed, adopts) = (self.summary.seed, true);
        let kept = Kept { seed, nodes, quiet, closed, slack_ms, adopts, filled };
        Ok(Ran { kept, dir: self.dir.clone(), outside, summary: self.summary.clone() })
    }

    fn load(&self) -> Result<(), ChaosError> {
        let (programs, told) = (Arc::new(load::programs()?), Arc::<Told>::default());
        let term_ms = u64::try_from(self.term.as_millis()).unwrap_or(u64::MAX);
        let load = Load { term_ms, every: EVERY, until: self.began + self.length };
        for (nth, member) in (1..).zip(self.fleet.members()) {
            let seed = self.summary.seed.wrapping_mul(1_000).wrapping_add(nth);
            let (client, load) = (member.client()?, load.clone());
            let (programs, told) = (Arc::clone(&programs), Arc::clone(&told));
            tokio::spawn(load::operator(member.client()?, !seed, load.until));
            tokio::spawn(load::lessee(client, seed, load, programs, told));
        }
        Ok(())
    }

    fn plan(&mut self, after: Duration, act: Act) {
        self.planned += 1;
        self.agenda.insert((self.began + after, self.planned), act);
    }

    fn plan_in(&mut self, wait: Duration, act: Act) {
        self.plan(self.began.elapsed() + wait, act);
    }

    fn saw(&mut self, host: usize, saw: Sight) {
        self.outside.push(Outside { at: clock::boot_us(), host, saw });
    }

    /// Notes what goes wrong, for those who look into a failure.
    fn note(&mut self, what: &str) {
        let _ = writeln!(self.log, "{} {what}", clock::boot_us());
    }

    /// Does what is due, looks after the nodes, and waits a moment.
    async fn step(&mut self, faults: bool) -> Result<(), ChaosError> {
        while let Some(entry) = self.agenda.first_entry() {
            if entry.key().0 > Instant::now() {
                break;
            }
            match entry.remove() {
                Act::Begin(_) if !faults => {}
                act => self.act(act).await?,
            }
        }
        for node in 0..self.nodes.len() {
            self.look_after(node)?;
        }
        sleep(TICK).await;
        Ok(())
    }

    async fn act(&mut self, act: Act) -> Result<(), ChaosError> {
        match act {
            Act::Begin(nth) => {
                if let Some((_, fault)) = self.faults.get(nth).cloned() {
                    self.begin(nth, fault).await?;
                }
            }
            Act::Start(node) => self.start(node)?,
            Act::Resume(node, life) => self.resume(node, life)?,
            Act::EndWays(number) => self.relay.end(number),
            Act::EmptyDisk(node) => self.empty_disk(node)?,
            Act::RightClock(node) => self.set_clock(node, 0)?,
        }
        Ok(())
    }

    async fn begin(&mut self, nth: usize, fault: Fault) -> Result<(), ChaosError> {
        let number = nth as u64;
        match &fault {
            Fault::Kill { node, down } => {
                let Some(node) = self.pick(*node, |stands| stands != Stands::Down) else {
                    return Ok(());
                };
                self.fleet.kill(node)?;
                self.fell(node);
                self.summary.sigkills += 1;
                self.plan_in(*down, Act::Start(node));
            }
            Fault::Pause { node, lasts } => {
                let Some(node) = self.pick(*node, |stands| stands == Stands::Up) else {
                    return Ok(());
                };
                self.saw(node, Sight::Paused);
                self.fleet.pause(node)?;
                self.summary.sigstops += 1;
                let life = self.set(node, Stands::Paused);
                self.plan_in(*lasts, Act::Resume(node, life));
            }
            Fault::Cut { ways, lasts, .. } => {
                let cut = Way { cut: true, ..Way::default() };
                self.relay.begin(number, ways.iter().map(|(a, b)| (*a, *b, cut)).collect());
                self.summary.partitions += 1;
                self.plan_in(*lasts, Act::EndWays(number));
            }
            Fault::Rough { node, way, lasts } => {
                let others = (0..self.nodes.len()).filter(|other| other != node);
                let ways = others.flat_map(|other| [(*node, other, *way), (other, *node, *way)]);
                self.relay.begin(number, ways.collect());
                self.summary.delays += 1;
                self.plan_in(*lasts, Act::EndWays(number));
            }
            Fault::FillDisk { node, lasts } => {
                self.fill_disk(*node).await?;
                self.filled.insert(*node);
                self.summary.full_disks += 1;
                self.plan_in(*lasts, Act::EmptyDisk(*node));
            }
            Fault::SetClock { node, by, lasts } => {
                self.set_clock(*node, *by)?;
                self.summary.clock_jumps += 1;
                self.plan_in(*lasts, Act::RightClock(*node));
            }
        }
        self.note(&fault.to_string());
        Ok(())
    }

    /// The node that a fault is meant for, or the next one that it can meet.
    fn pick(&self, node: usize, fits: impl Fn(Stands) -> bool) -> Option<usize> {
        let count = self.nodes.len();
        let around = (0..count).map(|n| (node + n) % count);
        around.into_iter().find(|n| self.nodes.get(*n).is_some_and(|node| fits(node.stands)))
    }

    /// How a node stands now; gives which life that is.
    fn set(&mut self, node: usize, stands: Stands) -> u64 {
        let Some(node) = self.nodes.get_mut(node) else { return 0 };
        if matches!(stands, Stands::Starting(_)) {
            node.life += 1;
            if node.disk == Disk::WasFull {
                node.disk = Disk::Roomy;
            }
        }
        node.stands = stands;
        node.life
    }

    /// A node's process is gone, and waited for.
    fn fell(&mut self, node: usize) {
        self.saw(node, Sight::Stopped);
        self.set(node, Stands::Down);
    }

    fn start(&mut self, node: usize) -> Result<(), ChaosError> {
        if self.nodes.get(node).is_none_or(|node| node.stands != Stands::Down) {
            return Ok(());
        }
        self.fleet.spawn(node)?;
        self.set(node, Stands::Starting(Instant::now()));
        Ok(())
    }

    fn resume(&mut self, node: usize, life: u64) -> Result<(), ChaosError> {
        let still = |node: &&Node| node.life == life && node.stands == Stands::Paused;
        if self.nodes.get(node).filter(still).is_some() {
            self.fleet.resume(node)?;
            self.saw(node, Sight::Resumed);
            self.set(node, Stands::Up);
        }
        Ok(())
    }

    /// Notices that a node has come up, or has ended by itself.
    fn look_after(&mut self, node: usize) -> Result<(), ChaosError> {
        let Some(known) = self.nodes.get(node).copied() else { return Ok(()) };
        let ended = match known.stands {
            Stands::Down => return Ok(()),
            Stands::Up | Stands::Paused => match self.fleet.fallen(node)? {
                None => return Ok(()),
                Some(status) => status.to_string(),
            },
            Stands::Starting(since) => match self.fleet.listens(node, since) {
                Ok(false) => return Ok(()),
                Ok(true) => {
                    self.set(node, Stands::Up);
                    return Ok(());
                }
                Err(FleetError::Ended { status, .. }) => format!("{status} while it started"),
                Err(error) => {
                    self.fleet.kill(node)?;
                    error.to_string()
                }
            },
        };
        self.fell(node);
        self.note(&format!("{node} ended by itself: {ended}"));
        if known.disk != Disk::Roomy {
            self.summary.fell += 1;
        } else {
            self.saw(
                node,
                Sight::Wrong(Invariant::Liveness, format!("it ended by itself: {ended}")),
            );
        }
        self.plan_in(AGAIN, Act::Start(node));
        Ok(())
    }

    fn disk(&self, node: usize) -> Result<PathBuf, ChaosError> {
        Ok(self.fleet.member(node)?.dir().join(BALLAST))
    }

    async fn fill_disk(&mut self, node: usize) -> Result<(), ChaosError> {
        let path = self.disk(node)?;
        if let Some(known) = self.nodes.get_mut(node) {
            known.disk = Disk::Full;
        }
        let filled = tokio::task::spawn_blocking(move || -> io::Result<()> {
            let mut file = OpenOptions::new().append(true).create(true).open(path)?;
            // Ever smaller pieces, down to the last page.
            for size in [1 << 20, 1 << 12] {
                let piece = vec![0; size];
                loop {
                    match file.write_all(&piece) {
                        Ok(()) => {}
                        Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                        Err(error) => return Err(error),
                    }
                }
            }
            Ok(())
        });
        let path = self.disk(node)?;
        filled.await.map_err(io::Error::other).flatten().map_err(io_at(&path))
    }

    fn empty_disk(&mut self, node: usize) -> Result<(), ChaosError> {
        let path = self.disk(node)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_at(&path)(error));
            }
            _ => {}
        }
        if let Some(known) = self.nodes.get_mut(node).filter(|node| node.disk == Disk::Full) {
            known.disk = Disk::WasFull;
        }
        Ok(())
    }

    fn set_clock(&self, node: usize, by: i64) -> Result<(), ChaosError> {
        let path = self.dir.join(format!("{}.wall", self.fleet.member(node)?.name()));
        fs::write(&path, by.to_string()).map_err(io_at(&path))
    }

    /// Ends everything that goes wrong, and waits until all nodes run. Gives when that was.
    async fn put_right(&mut self) -> Result<u64, ChaosError> {
        for number in 0..self.faults.len() {
            self.relay.end(number as u64);
        }
        for node in 0..self.nodes.len() {
            self.set_clock(node, 0)?;
            self.empty_disk(node)?;
            let life = self.nodes.get(node).map_or(0, |node| node.life);
            self.resume(node, life)?;
            self.start(node)?;
        }
        let begun = Instant::now();
        while self.nodes.iter().any(|node| node.stands != Stands::Up) && begun.elapsed() < RESTS {
            self.step(false).await?;
        }
        self.note("all is put right");
        Ok(clock::boot_us())
    }

    /// Waits until all has come to rest, or long enough. Gives when.
    async fn rest(&mut self, quiet: u64) -> Result<u64, ChaosError> {
        let least = self.term + GRACE + QUIET;
        let begun = Instant::now();
        let mut restless = Vec::new();
        while begun.elapsed() < least + RESTS {
            for _ in 0..50 {
                self.step(false).await?;
            }
            if begun.elapsed() < least {
                continue;
            }
            let from = quiet + u64::try_from(least.as_micros()).unwrap_or(u64::MAX);
            restless = self.restless(from)?;
            if restless.is_empty() {
                break;
            }
        }
        for what in restless {
            self.note(&format!("not at rest: {what}"));
        }
        Ok(clock::boot_us())
    }

    /// What has not come to rest, as nodes saw it after `from`.
    fn restless(&self, from: u64) -> Result<Vec<String>, ChaosError> {
        let mut views = Vec::new();
        for (host, member) in self.fleet.members().iter().enumerate() {
            match judge::newest_view(&member.config().node.history)? {
                Some((at, view)) if at >= from => views.push((host, view)),
                _ => return Ok(vec![format!("{} did not tell how things stand", member.name())]),
            }
        }
        Ok(judge::restless(&views))
    }
}

impl Ran {
    /// Writes down what was seen, ends the fleet, and judges.
    async fn judge(self, args: &Args, fleet: &mut Fleet) -> Result<Summary, ChaosError> {
        let Self { kept, dir, outside, mut summary } = self;
        let path = dir.join(OUTSIDE);
        let mut lines = Vec::new();
        for seen in &outside {
            let line = serde_json::to_vec(seen).map_err(|error| io_at(&path)(error.into()))?;
            lines.extend_from_slice(&line);
            lines.push(b'\n');
        }
        fs::write(&path, lines).map_err(io_at(&path))?;
        let path = dir.join(CASE);
        fs::write(&path, serde_json::to_vec(&kept).unwrap_or_default()).map_err(io_at(&path))?;
        fleet.end().await?;
        let judged = dir.clone();
        let judged = tokio::task::spawn_blocking(move || judge_kept(&judged)).await;
        let verdict = judged.map_err(|error| ChaosError::Run(io::Error::other(error)))??;
        summary.take(&verdict);
        let mut place = dir;
        if args.keep.is_none() && !verdict.violations.is_empty() {
            let (pid, seed) = (std::process::id(), summary.seed);
            let kept = std::env::temp_dir().join(format!("leasehold-chaos-{seed}-{pid}"));
            fs::rename(&place, &kept).map_err(io_at(&kept))?;
            place = kept;
        }
        if args.keep.is_some() || !verdict.violations.is_empty() {
            summary.kept = Some(place.clone());
        }
        tell(&verdict, &place);
        Ok(summary)
    }
}

impl Summary {
    fn take(&mut self, verdict: &Verdict) {
        self.leases = verdict.leases;
        self.jobs = verdict.jobs;
        (self.gangs, self.partial_gangs) = verdict.gangs;
        self.witnessed = verdict.witnessed;
        self.unbegun = verdict.unbegun;
        self.starts = verdict.starts;
        self.lines = verdict.lines;
        self.violations = verdict.violations.len();
    }
}
