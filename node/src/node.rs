//! A node as a value: start, handle, shutdown. Everything it needs is passed in.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use leasehold_keys::exit::Exit;
use leasehold_proto::KeyId;
use leasehold_proto::core::{self, Core, Kept};
use leasehold_proto::minds::member::Timing;
use leasehold_proto::words::object::Body as _;
use leasehold_proto::words::sign::Signer;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::api_key::{KeyError, Keys};
use crate::batch::Batches;
use crate::config::{Config, ConfigError};
use crate::data::{self, Data, DataConfig};
use crate::gateway;
use crate::handle::{Facts, Handle, Hosted};
use crate::history::{History, HistoryError};
use crate::holders::{self, Holders};
use crate::home::{Home, HomeError, Identity};
use crate::infer::{INFER, RECORDS};
use crate::jobs::Jobs;
use crate::model::Models;
use crate::model::catalog::{Catalog, CatalogError};
use crate::net::{Limits, Net, NetConfig, NetError, NetEvent};
use crate::payload::{self, PayloadError, PayloadStore};
use crate::probe::{Probe, ProbeBindError, ProbeLimits};
use crate::run::{Admitted, Counts, Inputs, Loop};
use crate::store::{self, OpenError, Store};
use crate::verify::Verifiers;
use crate::work::{self, Exec, Work};
use crate::{clock, host};

/// How many inputs of one sort may wait for the loop.
const QUEUE: usize = 1_024;

/// A running node.
#[derive(Debug)]
pub struct Node {
    handle: Handle,
    shutdown: CancellationToken,
    /// None once it has ended.
    main: Option<JoinHandle<()>>,
    jobs: Jobs,
    data: Data,
}

/// Why a node does not start. Nothing was promised.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its directory is not usable.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Its configuration is not usable.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// What the node would tell about itself breaks a rule.
    #[error("configuration: {0}")]
    Record(&'static str),
    /// The host does not say what it has.
    #[error("cannot measure this host: {0}")]
    Host(std::io::Error),
    /// The operating system has no randomness to give.
    #[error("the operating system gave no randomness: {0}")]
    Randomness(getrandom::Error),
    /// The store does not open.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A kept record does not read.
    #[error("the store holds what this version cannot read: {0}")]
    Kept(#[from] core::kept::ReadError),
    /// The history cannot be written.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// The payloads do not open.
    #[error("payloads: {0}")]
    Payloads(#[from] PayloadError),
    /// The models do not open.
    #[error("models: {0}")]
    Models(#[from] CatalogError),
    /// The API keys do not open.
    #[error("API keys: {0}")]
    Keys(#[from] KeyError),
    /// The batches do not open.
    #[error("batches: {0}")]
    Batches(std::io::Error),
    /// The jobs of an earlier run cannot be looked at or ended.
    #[error("jobs of an earlier run: {0}")]
    Jobs(#[from] work::OpenError),
    /// The links cannot listen.
    #[error("links: {0}")]
    Net(#[from] NetError),
    /// The socket for liveness packets cannot listen.
    #[error("liveness packets: {0}")]
    Probe(#[from] ProbeBindError),
    /// The data plane cannot listen.
    #[error("data plane: {0}")]
    Data(#[from] data::StartError),
    /// Charter, certificate or mandate do not hold.
    #[error(transparent)]
    Core(#[from] core::StartError),
}

impl StartError {
    /// The exit code that says so.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Home(why) => why.exit(),
            Self::Config(_) | Self::Record(_) | Self::Net(NetError::KeyLog) => Exit::Usage,
            Self::Core(_) => Exit::Policy,
            Self::Store(OpenError::Locked { .. } | OpenError::Foreign { .. })
            | Self::Net(NetError::PortInUse { .. })
            | Self::Probe(ProbeBindError::PortInUse { .. }) => Exit::Conflict,
            Self::Data(data::StartError::Listen { source, .. })
                if matches!(source.kind(), std::io::ErrorKind::AddrInUse) =>
            {
                Exit::Conflict
            }
            _ => Exit::Io,
        }
    }
}

/// A node that has its directory, its ports and its papers, and has changed nothing yet: what else
/// may be taken or wrong can still be found out at no cost.
#[derive(Debug)]
pub struct Bound {
    home: Home,
    exec: Exec,
    identity: Identity,
    core: core::Config,
    isolation: Vec<String>,
    min_disk_free: u64,
    store: Store,
    saved: Vec<Kept>,
    history: History,
    payloads: PayloadStore,
    net: Net,
    net_events: mpsc::Receiver<NetEvent>,
    link: Vec<SocketAddr>,
    probe: Probe,
    packets: mpsc::Receiver<(SocketAddr, Vec<u8>)>,
    probe_at: SocketAddr,
    data: Data,
    arrivals: mpsc::Receiver<data::Arriving>,
    admitted: Admitted,
    catalog: Catalog,
    keys: Keys,
    batches: Batches,
    terms: gateway::Terms,
    threads: usize,
}

impl Node {
    /// Starts the node that lives in `home`.
    ///
    /// # Errors
    /// When anything it needs is missing, unusable or taken.
    pub async fn start(home: &Home, config: &Config, exec: Exec) -> Result<Self, StartError> {
        Self::bind(home, config, exec).await?.start().await
    }

    /// Takes the directory of the node that lives in `home`, its ports and its papers.
    ///
    /// # Errors
    /// When anything it needs is missing, unusable or taken. Nothing was changed.
    pub async fn bind(home: &Home, config: &Config, exec: Exec) -> Result<Bound, StartError> {
        let identity = home.identity()?;
        let measured = host::measure(home.dir()).map_err(StartError::Host)?;
        let capacity = config.capacity(&measured)?;
        let isolation = work::isolation();
        let policy = config.policy(isolation.clone())?;
        let (grace, min_disk_free) = (config.grace()?, config.min_disk_free()?);
        let labels = config.labels()?;
        // The store's lock is taken first: of two processes in one directory the second stops
        // here, with the reason that helps.
        let (store, saved) = open_store(home, &identity, min_disk_free).await?;
        let mut history = History::open(&config.node.history)?;
        history.read_back(&saved);
        let quota = config.payload_quota()?;
        let limits =
            payload::Limits { keep_free: min_disk_free, quota, ..payload::Limits::default() };
        let payloads = PayloadStore::open_dir(home.path("payloads"), limits)?;
        let catalog = Catalog::open(home.dir(), config.model_prices()?)?;
        config.models.serve.iter().try_for_each(|name| catalog.serve(name))?;
        let keys = Keys::open(home.dir())?;
        let batches = Batches::open(home.path("batches")).map_err(StartError::Batches)?;
        let (terms, threads) = (config.gateway()?, config.model_threads());
        let seed = *identity.secret.seed();
        let (net, net_events, link) = Net::start(NetConfig {
            seed,
            listen: vec![config.listen.link],
            limits: Limits::default(),
        })
        .await?;
        let (probe, packets, probe_at) = Probe::bind(config.listen.probe, ProbeLimits::default())?;
        let admitted: Admitted = Arc::new(RwLock::default());
        let admit = {
            let admitted = Arc::clone(&admitted);
            Arc::new(move |key: [u8; 32]| {
                admitted.read().unwrap_or_else(PoisonError::into_inner).contains(&key)
            })
        };
        let mut data_config = DataConfig::new(config.listen.data);
        data_config.upload_rate = config.upload_rate()?;
        let (data, arrivals) = Data::start(data_config, seed, payloads.clone(), admit)?;
        let addresses = config.addresses(&link, probe_at, data.local_addr())?;
        let mut dice = [0; 8];
        getrandom::fill(&mut dice).map_err(StartError::Randomness)?;
        let name =
            if config.node.name.is_empty() { host::name() } else { config.node.name.clone() };
        let core = core::Config {
            me: identity.secret.id(),
            name,
            boot: clock::boot_id(),
            charter: identity.charter.clone(),
            certificate: identity.certificate.clone(),
            mandate: identity.mandate.clone(),
            addresses,
            hardware: measured.hardware,
            capacity,
            processor: host::processor(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            labels,
            policy,
            timing: Timing::default(),
            grace,
            join: config.fabric.join.clone(),
            noted_epoch: home.noted_epoch(identity.secret.id())?,
            seed: u64::from_le_bytes(dice),
            plant: leasehold_proto::base::plant::Plant::NONE,
        };
        core.standing(clock::now())?;
        core.host_record(0).validate().map_err(StartError::Record)?;
        Ok(Bound {
            home: home.clone(),
            exec,
            identity,
            core,
            isolation,
            min_disk_free,
            store,
            saved,
            history,
            payloads,
            net,
            net_events,
            link,
            probe,
            packets,
            probe_at,
            data,
            arrivals,
            admitted,
            catalog,
            keys,
            batches,
            terms,
            threads,
        })
    }
}

impl Bound {
    /// Adopts the jobs of an earlier run that its book still speaks of, ends what else it left, and
    /// goes to work.
    ///
    /// # Errors
    /// When jobs of an earlier run cannot be looked at or ended, or what was kept does not read.
    pub async fn start(self) -> Result<Node, StartError> {
        let (events, work_events) = mpsc::channel(256);
        let work = Work::open(self.home.path("jobs"), self.exec.clone(), events)?;
        let adoptable = core::adoptable(&self.saved, self.core.boot);
        let adopted = work
            .adopt(|orphan| {
                let claim = orphan.lease.parse().ok().and_then(|lease| adoptable.get(&lease));
                let token = orphan.status.as_ref().map(|status| status.token.as_str());
                claim.is_some_and(|claim| token == Some(claim.to_string().as_str()))
            })
            .await?;
        if !adopted.running.is_empty() || !adopted.reaped.is_empty() {
            let (running, reaped) = (adopted.running.len(), adopted.reaped.len());
            tracing::info!(running, reaped, "jobs of an earlier run");
        }
        let orphans = Jobs::orphans(&adopted);
        let mut first = Vec::new();
        let Self { home, identity, store, payloads, net, probe, data, admitted, .. } = self;
        let core = Core::new(self.core, self.saved, &orphans, clock::now(), &mut first)?;
        let delegate = |lease: &str| lease.parse().ok().and_then(|id| core.delegate_of(&id));
        let reaped = adopted.reaped.into_iter().map(|job| (delegate(&job.lease), job));
        let reaped = reaped.map(|(delegate, job)| (job, delegate)).collect();
        let running = adopted.running.into_iter().filter_map(|status| {
            let delegate = delegate(&status.lease)?;
            Some((status, delegate))
        });
        let running = running.collect();
        let me = core.hand().me;
        let facts = Facts {
            me,
            name: core.name().to_string(),
            version: env!("CARGO_PKG_VERSION"),
            link: self.link,
            probe: self.probe_at,
            data: data.local_addr(),
            charter: identity.charter,
            currency: core.admission().charter().currency.clone(),
            mandate: identity.mandate,
        };
        let min_disk_free = self.min_disk_free;
        let isolation = self.isolation;
        let parts = Parts {
            store,
            payloads,
            data,
            net,
            probe,
            work,
            reaped,
            running,
            isolation,
            admitted,
            min_disk_free,
            history: self.history,
            catalog: self.catalog,
            keys: self.keys,
            batches: self.batches,
            terms: self.terms,
            threads: self.threads,
        };
        let (net_events, packets, arrivals) = (self.net_events, self.packets, self.arrivals);
        let streams = Streams { net_events, packets, work_events, arrivals };
        let seed = identity.secret.seed();
        Ok(Node::assemble(&home, core, first, seed, facts, parts, streams))
    }
}

impl Node {
    fn assemble(
        home: &Home,
        core: Core,
        first: Vec<core::Effect>,
        seed: &[u8; 32],
        facts: Facts,
        parts: Parts,
        streams: Streams,
    ) -> Self {
        let Parts { store, payloads, data, net, probe, work, reaped, running, .. } = parts;
        let Parts { isolation, admitted, min_disk_free, history, .. } = parts;
        let Parts { catalog, keys, batches, terms, threads, .. } = parts;
        let signer = Arc::new(Signer::from_seed(seed));
        let Streams { net_events, packets, mut work_events, mut arrivals } = streams;
        let (events, event_input) = mpsc::channel(QUEUE);
        let (checked, checked_input) = mpsc::channel(QUEUE);
        let (commands, command_input) = mpsc::channel(QUEUE);
        let shutdown = CancellationToken::new();
        tokio::spawn(holders::tell(payloads.clone(), events.clone(), shutdown.clone()));
        let inputs = (events, commands.clone());
        let holders = Holders::new(data.clone(), payloads.clone(), commands.clone());
        tokio::spawn(holders.clone().put_first(shutdown.clone()));
        let models = Models::new(
            catalog,
            (payloads.clone(), store.clone()),
            Arc::clone(&signer),
            inputs.clone(),
            threads,
        );
        tokio::spawn(models.clone().tell(shutdown.clone()));
        tokio::spawn(models.clone().tend(shutdown.clone()));
        tokio::spawn(keys.clone().keep(shutdown.clone()));
        let hosted = Hosted { models: models.clone(), keys, batches, terms, asked: Arc::default() };
        let store_of = (payloads.clone(), facts.me);
        let jobs = Jobs::new(work, holders.clone(), store_of, inputs, isolation);
        jobs.adopt(running);
        let counts = Arc::new(Counts::default());
        let handle = Handle::new(
            commands,
            facts,
            signer,
            store.clone(),
            payloads,
            (data.clone(), holders, hosted),
            Arc::clone(&counts),
        );
        let tell = jobs.clone();
        tokio::spawn(async move {
            while let Some(event) = work_events.recv().await {
                tell.heard(event).await;
            }
        });
        let closing_jobs = jobs.clone();
        let (serve, infer) = (jobs.clone(), models.clone());
        tokio::spawn(async move {
            while let Some(arriving) = arrivals.recv().await {
                if arriving.channel == INFER {
                    tokio::spawn(infer.clone().serve(arriving));
                } else if arriving.channel == RECORDS {
                    tokio::spawn(infer.clone().records(arriving));
                } else {
                    tokio::spawn(serve.clone().serve(arriving));
                }
            }
        });
        let node_loop = Loop {
            verifiers: Verifiers::start(core.hand().fabric, &checked),
            core,
            signer: Signer::from_seed(seed),
            store,
            net,
            probe,
            jobs,
            models,
            admitted,
            counts,
            min_disk_free,
            home: home.clone(),
            history,
            reaped,
        };
        let inputs = Inputs {
            net: net_events,
            packets,
            checked: checked_input,
            commands: command_input,
            events: event_input,
            shutdown: shutdown.clone(),
        };
        let main = tokio::spawn(Box::pin(node_loop.run(inputs, first)));
        Self { handle, shutdown, main: Some(main), jobs: closing_jobs, data }
    }

    /// The way to talk to it.
    #[must_use]
    pub const fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits until the node ends by itself, which it only does when it can go on no more.
    pub async fn ended(&mut self) {
        if let Some(main) = &mut self.main {
            let _ = main.await;
            self.main = None;
        }
    }

    /// Stops taking work, says goodbye, and closes everything; jobs stay under their wardens.
    pub async fn shutdown(self) {
        self.shutdown.cancel();
        if let Some(main) = self.main
            && tokio::time::timeout(Duration::from_secs(4), main).await.is_err()
        {
            tracing::warn!("the node did not stop in time; what it promised is on disk");
        }
        let _ = tokio::time::timeout(Duration::from_millis(500), self.jobs.close()).await;
        let _ = tokio::time::timeout(Duration::from_millis(500), self.data.close()).await;
    }
}

/// The edges, started.
struct Parts {
    store: Store,
    payloads: PayloadStore,
    data: Data,
    net: Net,
    probe: Probe,
    work: Work,
    reaped: Vec<(work::Reaped, Option<KeyId>)>,
    running: Vec<(work::Status, KeyId)>,
    isolation: Vec<String>,
    admitted: Admitted,
    min_disk_free: u64,
    history: History,
    catalog: Catalog,
    keys: Keys,
    batches: Batches,
    terms: gateway::Terms,
    threads: usize,
}

/// What the edges tell.
struct Streams {
    net_events: mpsc::Receiver<NetEvent>,
    packets: mpsc::Receiver<(SocketAddr, Vec<u8>)>,
    work_events: mpsc::Receiver<work::WorkEvent>,
    arrivals: mpsc::Receiver<data::Arriving>,
}

async fn open_store(
    home: &Home,
    identity: &Identity,
    min_disk_free: u64,
) -> Result<(Store, Vec<Kept>), StartError> {
    let mut config = store::Config::new(identity.secret.id().0);
    config.min_disk_free = min_disk_free;
    let dir: PathBuf = home.path("store");
    let opened = tokio::task::spawn_blocking(move || Store::open(&dir, config)).await;
    let (store, opened) =
        opened.map_err(|error| StartError::Host(std::io::Error::other(error)))??;
    tracing::info!(entries = opened.entries.len(), recovered = ?opened.recovered, "the store is open");
    let entries = opened.entries.iter();
    let saved = entries.map(|(key, value)| Kept::read(key, value)).collect::<Result<_, _>>()?;
    Ok((store, saved))
}
