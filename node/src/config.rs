//! What an operator decides: one TOML file, every field with a default and a reason.
//!
//! Flags and environment variables of `leasehold up` override it, unknown fields are refused by
//! name. A node sells nothing until `offer.sell` says so.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use leasehold_proto::minds::pricing::Policy;
use leasehold_proto::words::contract::EarlyEnd;
use leasehold_proto::words::model::TokenRates;
use leasehold_proto::words::record::Addresses;
use leasehold_proto::{Amount, GpuRate, Gpus, Rates, Resources, Span};
use serde::{Deserialize, Serialize};

use crate::gateway;
use crate::model::catalog::Prices;
use crate::quantity;

/// The file's name in the data directory.
pub const FILE: &str = "leasehold.toml";
/// The least that uploads may be limited to, in bytes a second: one transfer goes on with it.
const MIN_UPLOAD: u64 = 64 * 1024;
/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 256 * 1024;

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Who the node is.
    pub node: Node,
    /// Where it listens.
    pub listen: Listen,
    /// Where others reach it, if not where it listens.
    pub advertise: Advertise,
    /// Whom it joins.
    pub fabric: Fabric,
    /// What it sells.
    pub offer: Offer,
    /// What it keeps of programs, inputs and outputs.
    pub payloads: Payloads,
    /// The models it serves, and those that it asks of others.
    pub models: Models,
    /// With which certificate `listen.models` is served.
    pub tls: Tls,
    /// How it logs.
    pub log: Log,
}

/// `[node]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Node {
    /// What the host is called; empty: its host name. At most 64 bytes.
    pub name: String,
    /// What lessees may select by (`zone = "a"`). At most 32 labels of 64 bytes.
    pub labels: BTreeMap<String, String>,
    /// Where everything that it keeps, signs and is asked is written down as well, for tests and
    /// for looking into faults; empty: nowhere. See [`crate::history`].
    pub history: PathBuf,
}

/// `[listen]`: UDP but for `api`. Port 0 takes a free one, which suits tests; a node that others
/// join by needs fixed ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// Links between nodes (libp2p over QUIC).
    pub link: SocketAddr,
    /// Liveness packets.
    pub probe: SocketAddr,
    /// Payloads and job streams (QUIC).
    pub data: SocketAddr,
    /// The HTTP API (TCP). Loopback only: it has a token but no encryption.
    pub api: SocketAddr,
    /// The models' API for others than this host (TCP, HTTPS, API keys only); none where it is empty.
    pub models: String,
}

/// `[advertise]`: empty lists mean the addresses that are listened on, which an unspecified
/// address (`0.0.0.0`) cannot tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Advertise {
    /// Addresses for links, best first.
    pub link: Vec<SocketAddr>,
    /// Addresses for liveness packets, best first.
    pub probe: Vec<SocketAddr>,
    /// Addresses for payloads, best first.
    pub data: Vec<SocketAddr>,
}

/// `[fabric]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fabric {
    /// Link addresses of nodes to join by. A few are enough; the rest is gossip. Empty in the
    /// first node of a fabric.
    pub join: Vec<SocketAddr>,
}

/// `[offer]`: amounts as text (`"256M"`, `"0.05"`), prices in the charter's currency per hour.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Offer {
    /// Whether anything is sold. Nothing is until you say so.
    pub sell: bool,
    /// CPU cores to sell (`"3.5"`); empty: all but one, at least half a core.
    pub cpu: String,
    /// Memory to sell; empty: three quarters of the host's.
    pub memory: String,
    /// Disk to sell; empty: half of what is free in the data directory at the start.
    pub disk: String,
    /// GPUs to sell by kind; they are advertised only for runtimes that can attach them, of which
    /// this version has none.
    pub gpus: BTreeMap<String, u32>,
    /// Price of one core.
    pub cpu_hour: String,
    /// Price of one GiB of memory.
    pub memory_gib_hour: String,
    /// Price of one GiB of disk.
    pub disk_gib_hour: String,
    /// Prices of one GPU, by kind.
    pub gpu_hour: BTreeMap<String, String>,
    /// The longest term of one lease.
    pub max_term: String,
    /// How long a lease may be held without being claimed, and so without being paid.
    pub max_claim_within: String,
    /// How long a job may take to end after its lease before it is killed.
    pub grace: String,
    /// What slack capacity costs, of the firm price (`"60%"`); empty: no slack is sold.
    pub slack: String,
    /// How long before it stands still a job is told that its lease is taken back.
    pub notice: String,
    /// How long it then stands frozen, unbilled, before it is ended; a job whose tenant does not
    /// countersign is frozen for as long.
    pub freeze: String,
    /// What a lessee gets back of the price of the time it misses when this side ends its lease
    /// (`"10%"`), at most what it was charged.
    pub credit: String,
    /// Free disk space below which nothing new is promised.
    pub min_disk_free: String,
}

/// `[payloads]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Payloads {
    /// What all payloads together may take on disk (`"200G"`); empty: all but
    /// `offer.min_disk_free`. When more is wanted, those make room that were not used for longest,
    /// but for those that are pinned or belong to a lease.
    pub quota: String,
    /// How many bytes of payloads are sent to others per second, all together (`"100M"`); empty: as
    /// many as there are.
    pub upload: String,
}

/// `[models]`: amounts as text, in the charter's currency. Which models there are is not said here:
/// see `leasehold model`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Models {
    /// Models that are sold, whatever `leasehold model set` said of them before.
    pub serve: Vec<String>,
    /// Threads of the embedded engine, for each model; 0: as many as the host has cores.
    pub threads: u16,
    /// Price of a million tokens that are asked, of a model of which nothing else is said.
    pub prompt_million: String,
    /// Price of a million tokens that are answered, likewise.
    pub completion_million: String,
    /// What its tokens cost whoever can wait, of those prices (`"60%"`); empty: it is not sold so.
    pub slack: String,
    /// What a lease on a model of another node may cost: it is taken when a request wants it, and
    /// anew when it is used up.
    pub budget: String,
    /// For how long it is taken.
    pub term: String,
    /// A directory where what was asked of other nodes, and answered, is kept for `leasehold model
    /// replay`; empty: nowhere. Whoever reads it reads prompts.
    pub transcripts: PathBuf,
    /// What owners of API keys pay beyond what their answers cost this node (`"10%"`).
    pub markup: String,
}

/// `[tls]`: empty for a certificate that the node makes for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// The certificate and its chain (PEM).
    pub certificate: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `human` or `json`; JSON is one object a line.
    pub format: LogFormat,
    /// What is logged, as `tracing` filters say it: `info`, `info,leasehold_node::net=debug`.
    pub filter: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

impl Default for Listen {
    fn default() -> Self {
        let any = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Self {
            link: SocketAddr::new(any, 7701),
            probe: SocketAddr::new(any, 7702),
            data: SocketAddr::new(any, 7703),
            api: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7700),
            models: String::new(),
        }
    }
}

impl Default for Offer {
    fn default() -> Self {
        let text = str::to_string;
        Self {
            sell: false,
            cpu: String::new(),
            memory: String::new(),
            disk: String::new(),
            gpus: BTreeMap::new(),
            cpu_hour: text("0.02"),
            memory_gib_hour: text("0.004"),
            disk_gib_hour: text("0.0001"),
            gpu_hour: BTreeMap::new(),
            max_term: text("24h"),
            max_claim_within: text("5m"),
            grace: text("5s"),
            slack: text("60%"),
            notice: text("30s"),
            freeze: text("10s"),
            credit: text("10%"),
            min_disk_free: text("256M"),
        }
    }
}

impl Default for Models {
    fn default() -> Self {
        let text = str::to_string;
        Self {
            serve: Vec::new(),
            threads: 0,
            prompt_million: text("0.05"),
            completion_million: text("0.20"),
            slack: text("60%"),
            budget: text("1"),
            term: text("1h"),
            transcripts: PathBuf::new(),
            markup: text("0%"),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Human, filter: "info".into() }
    }
}

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is no valid TOML, or has a field that does not exist.
    #[error("{path}: {why}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Line, column and reason.
        why: String,
    },
    /// An override names no field, or its value does not suit it.
    #[error("{said}: {why}")]
    Override {
        /// The flag or environment variable.
        said: String,
        /// Why not.
        why: String,
    },
    /// A value is not usable.
    #[error("{field}: {why}")]
    Value {
        /// Which field, with its section.
        field: &'static str,
        /// Why not.
        why: String,
    },
}

/// What the host has, as measured at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Cores, memory, disk and GPUs.
    pub hardware: Resources,
    /// Bytes free on the data directory's file system.
    pub disk_free: u64,
}

impl Config {
    /// Reads a file; defaults where there is none and `must_exist` is false.
    ///
    /// # Errors
    /// When it cannot be read or is not valid.
    pub fn load(path: &Path, must_exist: bool) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.into(), source };
        let text = match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > MAX_FILE => {
                let why = format!("longer than {MAX_FILE} bytes");
                return Err(ConfigError::Parse { path: path.into(), why });
            }
            Ok(_) => std::fs::read_to_string(path).map_err(read)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
                return Ok(Self::default());
            }
            Err(error) => return Err(read(error)),
        };
        toml::from_str(&text).map_err(|error| {
            let mut why = error.message().replace('\n', ", ");
            if let Some(before) = error.span().and_then(|span| text.get(..span.start)) {
                why = format!("line {}: {why}", before.matches('\n').count() + 1);
            }
            ConfigError::Parse { path: path.into(), why }
        })
    }

    /// The same with what environment variables and then `sets` (`offer.cpu=3.5`) say in place of
    /// what the file says. Every field has a variable: `LEASEHOLD_OFFER_MAX_TERM` is
    /// `offer.max_term`.
    ///
    /// # Errors
    /// When a name is no field's, or a value does not suit its field.
    pub fn overridden(
        self,
        variable: impl Fn(&str) -> Option<String>,
        sets: &[String],
    ) -> Result<Self, ConfigError> {
        let mut config = self;
        let fields = toml::Table::try_from(Self::default()).unwrap_or_default();
        for (section, of) in &fields {
            for field in of.as_table().into_iter().flat_map(toml::Table::keys) {
                let name = format!("LEASEHOLD_{section}_{field}").to_uppercase();
                if let Some(text) = variable(&name) {
                    config = config.with(&name, &[section, field], &text)?;
                }
            }
        }
        for set in sets {
            let said = format!("--set {set}");
            let Some((path, text)) = set.split_once('=') else {
                let why = "expected SECTION.FIELD=VALUE".to_string();
                return Err(ConfigError::Override { said, why });
            };
            let path: Vec<_> = path.trim().split('.').collect();
            config = config.with(&said, &path, text.trim())?;
        }
        Ok(config)
    }

    /// With one field changed: to a text where it takes one, else to what TOML makes of it.
    fn with(&self, said: &str, path: &[&str], text: &str) -> Result<Self, ConfigError> {
        let fault = |why: String| ConfigError::Override { said: said.into(), why };
        let (Some((field, sections)), true) = (path.split_last(), path.len() > 1) else {
            return Err(fault("expected SECTION.FIELD=VALUE".into()));
        };
        let read = format!("value = {text}").parse::<toml::Table>().ok();
        let read = read.and_then(|mut table| table.remove("value"));
        let mut why = String::new();
        for value in [Some(toml::Value::String(text.into())), read].into_iter().flatten() {
            let mut table = toml::Table::try_from(self).map_err(|e| fault(e.to_string()))?;
            let mut at = &mut table;
            for section in sections {
                let entry = at.entry(*section).or_insert_with(|| toml::Table::new().into());
                at = entry.as_table_mut().ok_or_else(|| fault("it has no fields".into()))?;
            }
            at.insert((*field).into(), value);
            match table.try_into() {
                Ok(config) => return Ok(config),
                Err(error) => why = error.message().to_string(),
            }
        }
        Err(fault(why))
    }

    /// What is sold of `measured`.
    ///
    /// # Errors
    /// When an amount does not read, or asks to sell more than there is.
    pub fn capacity(&self, measured: &Measured) -> Result<Resources, ConfigError> {
        let offer = &self.offer;
        let has = &measured.hardware;
        let cpu_milli = match offer.cpu.as_str() {
            "" => has.cpu_milli.saturating_sub(1000).max(has.cpu_milli / 2).max(500),
            text => quantity::cpu(text).map_err(|why| value("offer.cpu", why))?,
        };
        let memory = match offer.memory.as_str() {
            "" => has.memory / 4 * 3,
            text => quantity::bytes(text).map_err(|why| value("offer.memory", why))?,
        };
        let disk = match offer.disk.as_str() {
            "" => measured.disk_free / 2,
            text => quantity::bytes(text).map_err(|why| value("offer.disk", why))?,
        };
        for (field, want, have) in [
            ("offer.cpu", cpu_milli, has.cpu_milli),
            ("offer.memory", memory, has.memory),
            // Not what is free now: what was sold and used before a restart is not. Nothing new is
            // promised while there is too little, see `offer.min_disk_free`.
            ("offer.disk", disk, has.disk),
        ] {
            if want > have {
                return Err(value(field, format!("asks to sell {want}, this host has {have}")));
            }
        }
        for (kind, count) in &offer.gpus {
            let have = has.gpu_count(kind);
            if *count > have {
                let why = format!("asks to sell {count} {kind}, this host has {have}");
                return Err(value("offer.gpus", why));
            }
        }
        // No runtime of this version can attach a device, so none is offered.
        let gpus: Vec<Gpus> = Vec::new();
        Ok(Resources { cpu_milli, memory, disk, gpus })
    }

    /// Where the models' API is served to others, if it is.
    ///
    /// # Errors
    /// When it is no address.
    pub fn listen_models(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let text = self.listen.models.as_str();
        let address = (!text.is_empty()).then(|| text.parse::<SocketAddr>()).transpose();
        address.map_err(|why| value("listen.models", format!("'{text}': {why}")))
    }

    /// What a model costs where nothing is said.
    ///
    /// # Errors
    /// When a price does not read.
    pub fn model_prices(&self) -> Result<Prices, ConfigError> {
        let price = |field: &'static str, text: &str| {
            quantity::amount(text).map_err(|why| value(field, why))
        };
        let rates = TokenRates {
            prompt: price("models.prompt_million", &self.models.prompt_million)?,
            completion: price("models.completion_million", &self.models.completion_million)?,
        };
        Ok(Prices { rates, slack_permille: slack("models.slack", &self.models.slack)? })
    }

    /// On what terms models of other nodes are asked.
    ///
    /// # Errors
    /// When an amount, time or share does not read.
    pub fn gateway(&self) -> Result<gateway::Terms, ConfigError> {
        let Models { budget, term, markup, .. } = &self.models;
        let budget = quantity::amount(budget).map_err(|why| value("models.budget", why))?;
        let markup = quantity::share(markup).map_err(|why| value("models.markup", why))?;
        let term = self.span("models.term", term)?;
        if budget == Amount::ZERO || term < Span::secs(60) {
            let why = "a lease on a model has some budget, and a term of a minute at least".into();
            return Err(ConfigError::Value { field: "models.budget", why });
        }
        let kept = self.models.transcripts.clone();
        let transcripts = (!kept.as_os_str().is_empty()).then_some(kept);
        Ok(gateway::Terms { budget, term, markup_permille: markup.into(), transcripts })
    }

    /// How many threads an embedded engine may use.
    #[must_use]
    pub fn model_threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        match self.models.threads {
            0 => cores,
            threads => usize::from(threads),
        }
    }

    /// The policy behind the offers.
    ///
    /// # Errors
    /// When a price or a time does not read.
    pub fn policy(&self, isolation: Vec<String>) -> Result<Policy, ConfigError> {
        let offer = &self.offer;
        let price = |field: &'static str, text: &str| -> Result<Amount, ConfigError> {
            quantity::price(text).map_err(|why| value(field, why))
        };
        let share = |field: &'static str, text: &str| -> Result<u16, ConfigError> {
            quantity::share(text).map_err(|why| value(field, why))
        };
        let mut gpu_hour = Vec::new();
        for (kind, text) in &offer.gpu_hour {
            gpu_hour.push(GpuRate { kind: kind.clone(), hour: price("offer.gpu_hour", text)? });
        }
        Ok(Policy {
            selling: offer.sell,
            rates: Rates {
                cpu_hour: price("offer.cpu_hour", &offer.cpu_hour)?,
                memory_gib_hour: price("offer.memory_gib_hour", &offer.memory_gib_hour)?,
                disk_gib_hour: price("offer.disk_gib_hour", &offer.disk_gib_hour)?,
                gpu_hour,
            },
            slack_permille: slack("offer.slack", &offer.slack)?,
            early: EarlyEnd {
                notice: self.span("offer.notice", &offer.notice)?,
                freeze: self.span("offer.freeze", &offer.freeze)?,
                credit_permille: share("offer.credit", &offer.credit)?,
            },
            max_term: self.span("offer.max_term", &offer.max_term)?,
            max_claim_within: self.span("offer.max_claim_within", &offer.max_claim_within)?,
            runtimes: vec!["wasm".to_string()],
            isolation,
        })
    }

    /// How long a job may take to end.
    ///
    /// # Errors
    /// When it does not read.
    pub fn grace(&self) -> Result<Span, ConfigError> {
        self.span("offer.grace", &self.offer.grace)
    }

    /// What all payloads together may take on disk, in bytes.
    ///
    /// # Errors
    /// When it does not read.
    pub fn payload_quota(&self) -> Result<u64, ConfigError> {
        if self.payloads.quota.is_empty() {
            return Ok(u64::MAX);
        }
        quantity::bytes(&self.payloads.quota).map_err(|why| value("payloads.quota", why))
    }

    /// How many bytes of payloads are sent to others per second; none for as many as there are.
    ///
    /// # Errors
    /// When it does not read, or is nothing.
    pub fn upload_rate(&self) -> Result<Option<u64>, ConfigError> {
        let text = &self.payloads.upload;
        if text.is_empty() {
            return Ok(None);
        }
        let rate = quantity::bytes(text).map_err(|why| value("payloads.upload", why))?;
        if rate < MIN_UPLOAD {
            let why = format!("less than {MIN_UPLOAD} bytes a second are no use to anybody");
            return Err(value("payloads.upload", why));
        }
        Ok(Some(rate))
    }

    /// Free disk space below which nothing new is promised, in bytes.
    ///
    /// # Errors
    /// When it does not read.
    pub fn min_disk_free(&self) -> Result<u64, ConfigError> {
        quantity::bytes(&self.offer.min_disk_free).map_err(|why| value("offer.min_disk_free", why))
    }

    #[allow(clippy::unused_self)] // reads as a field of this configuration
    fn span(&self, field: &'static str, text: &str) -> Result<Span, ConfigError> {
        quantity::span(text).map_err(|why| value(field, why))
    }

    /// The labels, sorted, within the bounds of a host record.
    ///
    /// # Errors
    /// When there are too many, or one is too long.
    pub fn labels(&self) -> Result<Vec<(String, String)>, ConfigError> {
        let labels = &self.node.labels;
        let fits = labels.len() <= 32
            && labels.iter().all(|(name, value)| name.len() <= 64 && value.len() <= 64);
        if !fits {
            let why = "at most 32 labels of at most 64 bytes".to_string();
            return Err(value("node.labels", why));
        }
        Ok(labels.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    /// Where others reach the node, given where it really listens.
    ///
    /// # Errors
    /// When an unspecified address is listened on and nothing is said about how to reach it.
    pub fn addresses(
        &self,
        link: &[SocketAddr],
        probe: SocketAddr,
        data: SocketAddr,
    ) -> Result<Addresses, ConfigError> {
        let chosen = |field: &'static str, said: &[SocketAddr], bound: Vec<SocketAddr>| {
            if !said.is_empty() {
                return Ok(said.to_vec());
            }
            if bound.iter().any(|address| address.ip().is_unspecified()) {
                let why = "listening on every address: say by which one others reach this node";
                return Err(value(field, why.to_string()));
            }
            Ok(bound)
        };
        let say = &self.advertise;
        Ok(Addresses {
            link: chosen("advertise.link", &say.link, link.to_vec())?,
            probe: chosen("advertise.probe", &say.probe, vec![probe])?,
            data: chosen("advertise.data", &say.data, vec![data])?,
        })
    }
}

/// What is sold to whoever can wait, in thousandths of the firm price; nothing where it is empty.
fn slack(field: &'static str, text: &str) -> Result<Option<u16>, ConfigError> {
    let share = |text| quantity::share(text).map_err(|why| value(field, why));
    (!text.is_empty()).then(|| share(text)).transpose()
}

const fn value(field: &'static str, why: String) -> ConfigError {
    ConfigError::Value { field, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_typo_is_refused_by_name() {
        let error = parse("[offer]\nsel = true\n").expect_err("no such field");
        assert!(error.contains("sel") && error.contains("sell"), "{error}");
        let error = parse("[ofer]\n").expect_err("no such section");
        assert!(error.contains("ofer"), "{error}");
    }

    #[test]
    fn variables_and_sets_go_before_the_file() {
        let file = parse("[offer]\nsell = true\ncpu = '2'\n").expect("parses");
        let variable = |name: &str| match name {
            "LEASEHOLD_OFFER_CPU" => Some("3.5".to_string()),
            "LEASEHOLD_FABRIC_JOIN" => Some("['127.0.0.1:1', '127.0.0.1:2']".to_string()),
            "LEASEHOLD_LOG_FORMAT" => Some("json".to_string()),
            _ => None,
        };
        let sets = ["offer.sell=false", "offer.gpus.h100 = 2", "node.labels.zone=5"];
        let config = file.clone().overridden(variable, &sets.map(String::from)).expect("reads");
        assert_eq!((config.offer.sell, config.offer.cpu.as_str()), (false, "3.5"));
        assert_eq!((config.fabric.join.len(), config.log.format), (2, LogFormat::Json));
        assert_eq!((config.offer.gpus["h100"], config.node.labels["zone"].as_str()), (2, "5"));
        for (wrong, names) in [
            ("offer.sel=true", "sel"),
            ("offer", "SECTION.FIELD"),
            ("offer=1", "SECTION.FIELD"),
            ("offer.sell=maybe", "--set offer.sell=maybe"),
            ("listen.link=localhost", "listen.link"),
            ("node.name.more=1", "no fields"),
        ] {
            let error = file.clone().overridden(|_| None, &[wrong.to_string()]).expect_err(wrong);
            assert!(error.to_string().contains(names), "{wrong}: {error}");
        }
    }

    #[test]
    fn defaults_write_and_read_back() {
        let text = toml::to_string(&Config::default()).expect("writes");
        assert_eq!(parse(&text), Ok(Config::default()));
    }

    #[test]
    fn selling_more_than_there_is_is_refused() {
        let measured =
            Measured { hardware: Resources::new(2000, 1 << 30, 1 << 40), disk_free: 1 << 30 };
        let config = |text| parse(text).expect("parses").capacity(&measured);
        assert!(config("[offer]\ncpu = '3'").expect_err("2 cores").to_string().contains("cpu"));
        assert!(config("[offer]\nmemory = '2G'").is_err());
        assert!(config("[offer]\ndisk = '2T'").is_err());
        // A node comes up also where what it sold has been used.
        assert_eq!(config("[offer]\ndisk = '2G'").expect("fits").disk, 2 << 30);
        let capacity = config("[offer]\ncpu = '1.5'\nmemory = '512M'").expect("fits");
        assert_eq!((capacity.cpu_milli, capacity.memory), (1500, 512 << 20));
        assert_eq!(config("").expect("defaults").cpu_milli, 1000);
    }
}
