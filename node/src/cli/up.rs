//! `leasehold up`: runs the node in this process until it is told to stop.
//!
//! Logs go to stderr. Once the node listens, `node.json` in its directory says where and who it
//! is, for scripts; it is gone when the node has stopped. SIGTERM and SIGINT stop it within five
//! seconds; jobs stay under their wardens.

use std::io::{ErrorKind, IsTerminal as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;

use clap::Args;
use leasehold_keys::disk::{Existing, write_atomic};
use leasehold_keys::exit::Exit;
use leasehold_proto::KeyId;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::api::{self, tls, token};
use crate::config::{Config, ConfigError, FILE, LogFormat};
use crate::home::Home;
use crate::node::{Node, StartError};
use crate::work::Exec;

/// The file that says where a running node listens.
pub const NODE_FILE: &str = "node.json";

/// Run the node.
///
/// Settings come from DIR/leasehold.toml; flags and environment variables go before it.
#[derive(Args, Debug, Default)]
pub struct Up {
    /// Another configuration file
    #[arg(long, value_name = "FILE", env = "LEASEHOLD_CONFIG")]
    config: Option<PathBuf>,
    /// The node's name
    #[arg(long, value_name = "NAME", env = "LEASEHOLD_NAME")]
    name: Option<String>,
    /// Where links are taken (UDP)
    #[arg(long, value_name = "IP:PORT", env = "LEASEHOLD_LISTEN_LINK")]
    listen_link: Option<SocketAddr>,
    /// Where liveness packets are taken (UDP)
    #[arg(long, value_name = "IP:PORT", env = "LEASEHOLD_LISTEN_PROBE")]
    listen_probe: Option<SocketAddr>,
    /// Where payloads and job streams are served (UDP)
    #[arg(long, value_name = "IP:PORT", env = "LEASEHOLD_LISTEN_DATA")]
    listen_data: Option<SocketAddr>,
    /// Where the HTTP API listens (TCP, loopback only)
    #[arg(long, value_name = "IP:PORT", env = "LEASEHOLD_LISTEN_API")]
    listen_api: Option<SocketAddr>,
    /// Link addresses of nodes to join by, besides those configured
    #[arg(long, value_name = "IP:PORT", env = "LEASEHOLD_JOIN", value_delimiter = ',')]
    join: Vec<SocketAddr>,
    /// Any setting, in place of the file's; may be repeated. Each also has a variable:
    /// LEASEHOLD_OFFER_MAX_TERM is offer.max_term
    #[arg(long, value_name = "SECTION.FIELD=VALUE")]
    set: Vec<String>,
    /// Sell what the configuration says may be sold
    #[arg(long, env = "LEASEHOLD_SELL")]
    sell: bool,
    /// Sell this model, which must be at the node (see `leasehold model`); may be repeated
    #[arg(long, value_name = "MODEL")]
    serve: Vec<String>,
    /// How log lines look: human or json
    #[arg(long, value_name = "FORMAT", env = "LEASEHOLD_LOG_FORMAT", value_parser = log_format)]
    log_format: Option<LogFormat>,
    /// What is logged, such as info or info,leasehold_node=debug
    #[arg(long, value_name = "FILTER", env = "LEASEHOLD_LOG")]
    log: Option<String>,
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "human" => Ok(LogFormat::Human),
        "json" => Ok(LogFormat::Json),
        _ => Err("expected human or json".into()),
    }
}

/// Where a running node listens and who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    /// Its key.
    pub id: KeyId,
    /// Its process.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// The HTTP API.
    pub api: SocketAddr,
    /// Links.
    pub link: Vec<SocketAddr>,
    /// Liveness packets.
    pub probe: SocketAddr,
    /// Payloads and job streams.
    pub data: SocketAddr,
    /// The models' API for others than this host, if it is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<SocketAddr>,
}

/// Why the node does not run.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    /// The configuration.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// The certificate of the models' API.
    #[error("the models' API: {0}")]
    Tls(#[from] tls::TlsError),
    /// The log filter.
    #[error("log filter '{filter}': {why}")]
    Filter {
        /// What was given.
        filter: String,
        /// Why it does not read.
        why: String,
    },
    /// The node.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The API would listen where others can reach it.
    #[error("the API has a token but no encryption: it listens on loopback only, not on {0}")]
    NotLoopback(SocketAddr),
    /// The API cannot listen.
    #[error("TCP {address} for the API: {source}; is another node running? see --listen-api")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The API's token.
    #[error("API token: {0}")]
    Token(#[from] token::TokenError),
    /// A file in the directory.
    #[error("{0}")]
    File(#[from] leasehold_keys::disk::WriteError),
    /// It ran, and could go on no more.
    #[error("the node could go on no more: its log says why; what it promised is on disk")]
    Ended,
    /// Signals cannot be heard.
    #[error("cannot listen for signals: {0}")]
    Signal(std::io::Error),
}

impl UpError {
    /// The exit code that says so.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Tls(_) => Exit::Io,
            Self::Config(_) | Self::Filter { .. } => Exit::Usage,
            Self::Start(why) => why.exit(),
            Self::NotLoopback(_) => Exit::Policy,
            Self::Listen { source, .. } if source.kind() == ErrorKind::AddrInUse => Exit::Conflict,
            Self::Listen { .. } | Self::Ended => Exit::Io,
            Self::Token(_) | Self::File(_) | Self::Signal(_) => Exit::Io,
        }
    }
}

impl Up {
    /// The configuration with the flags over it.
    ///
    /// # Errors
    /// When the file is not valid.
    pub fn config(&self, home: &Home) -> Result<Config, ConfigError> {
        let must_exist = self.config.is_some();
        let path = self.config.clone().unwrap_or_else(|| home.path(FILE));
        let config = Config::load(&path, must_exist)?;
        let mut config = config.overridden(|name| std::env::var(name).ok(), &self.set)?;
        if let Some(name) = &self.name {
            config.node.name.clone_from(name);
        }
        let listen = &mut config.listen;
        for (said, configured) in [
            (self.listen_link, &mut listen.link),
            (self.listen_probe, &mut listen.probe),
            (self.listen_data, &mut listen.data),
            (self.listen_api, &mut listen.api),
        ] {
            if let Some(address) = said {
                *configured = address;
            }
        }
        config.fabric.join.extend(&self.join);
        config.offer.sell |= self.sell;
        config.models.serve.extend(self.serve.iter().cloned());
        if let Some(format) = self.log_format {
            config.log.format = format;
        }
        if let Some(filter) = &self.log {
            config.log.filter.clone_from(filter);
        }
        Ok(config)
    }

    /// Runs the node of `home` until a signal stops it.
    ///
    /// # Errors
    /// When it cannot start.
    pub async fn run(&self, home: &Home, exec: Exec) -> Result<(), UpError> {
        let config = self.config(home)?;
        start_logging(&config)?;
        let mut stop = pin!(stop_signal()?);
        let address = config.listen.api;
        if !address.ip().is_loopback() {
            return Err(UpError::NotLoopback(address));
        }
        let bound = Node::bind(home, &config, exec).await?;
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| UpError::Listen { address, source })?;
        let api = listener.local_addr();
        let api = api.map_err(|source| UpError::Listen { address, source })?;
        let models = match config.listen_models()? {
            None => None,
            Some(address) => {
                let listen = |source| UpError::Listen { address, source };
                let listener = TcpListener::bind(address).await.map_err(listen)?;
                let at = listener.local_addr().map_err(listen)?;
                let given = (config.tls.certificate.as_path(), config.tls.key.as_path());
                let tls = tls::acceptor(given, home.dir(), (&config.node.name, at))?;
                Some((listener, tls, at))
            }
        };
        let secret = token::load_or_create(home.dir())?;
        // From here on jobs of an earlier run are ended and the epoch rises.
        let mut node = tokio::select! {
            started = bound.start() => started?,
            () = &mut stop => {
                tracing::info!("stopped before it was ready");
                return Ok(());
            }
        };
        let published = token::publish(api, &secret)?;
        let closing = CancellationToken::new();
        let handle = node.handle().clone();
        let service = api::openai::Service::of(&handle, closing.clone());
        let models_api = models.as_ref().map(|(_, _, at)| *at);
        if let Some((listener, tls, _)) = models {
            tokio::spawn(api::serve_models(listener, service.clone(), tls, closing.clone()));
        }
        let served = tokio::spawn(api::serve(listener, handle, service, secret, closing.clone()));
        let facts = node.handle().facts().clone();
        let file = NodeFile {
            id: facts.me,
            pid: std::process::id(),
            name: facts.name.clone(),
            api,
            link: facts.link.clone(),
            probe: facts.probe,
            data: facts.data,
            models: models_api,
        };
        let text = serde_json::to_vec_pretty(&file).unwrap_or_default();
        let path = home.path(NODE_FILE);
        write_atomic(&path, &text, 0o600, Existing::Replace)?;
        tracing::info!(node = %facts.me, name = facts.name, %api, link = ?facts.link, "ready");
        let told = tokio::select! {
            () = stop => {
                tracing::info!("stopping");
                true
            }
            () = node.ended() => {
                tracing::error!("the node can go on no more");
                false
            }
        };
        let _ = std::fs::remove_file(&path);
        drop(published);
        closing.cancel();
        node.shutdown().await;
        let _ = tokio::time::timeout(std::time::Duration::from_millis(500), served).await;
        tracing::info!("stopped");
        if told { Ok(()) } else { Err(UpError::Ended) }
    }
}

fn start_logging(config: &Config) -> Result<(), UpError> {
    let filter = &config.log.filter;
    let parsed = EnvFilter::try_new(filter);
    let parsed = parsed
        .map_err(|error| UpError::Filter { filter: filter.clone(), why: error.to_string() })?;
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let logs = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_ansi(colours)
        .with_writer(std::io::stderr);
    // A second start in one process keeps the first one's logs.
    let _ = match config.log.format {
        LogFormat::Human => logs.with_target(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// Resolves at SIGTERM or SIGINT.
fn stop_signal() -> Result<impl Future<Output = ()>, UpError> {
    let mut term = signal(SignalKind::terminate()).map_err(UpError::Signal)?;
    let mut int = signal(SignalKind::interrupt()).map_err(UpError::Signal)?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
