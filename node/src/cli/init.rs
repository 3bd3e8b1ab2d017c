//! `leasehold init`: founds a fabric of one organisation on this host, with this node in it.

use std::path::PathBuf;

use clap::Args;
use leasehold_keys::exit::Exit;
use leasehold_keys::file::{Kdf, Protection};
use leasehold_keys::passphrase::Source;
use leasehold_proto::Span;
use leasehold_proto::words::charter::Role;

use crate::config::{Config, FILE};
use crate::home::{Allowance, Founder, Founding, Home, HomeError, generate, mandate};
use crate::{clock, quantity};

/// Found a fabric and make this host its first node.
///
/// Makes the organisation's root key, a charter, this node's key and certificate, and a tenant
/// with a mandate for this node, so that it can sell and order at once. The root and tenant keys
/// can be moved to an offline machine afterwards; the node needs neither to run.
#[derive(Args, Debug)]
pub struct Init {
    /// The node's name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The fabric's name
    #[arg(long, value_name = "NAME", default_value = "fabric")]
    fabric: String,
    /// The organisation's name
    #[arg(long, value_name = "NAME", default_value = "home")]
    organisation: String,
    /// The currency that all prices count in
    #[arg(long, value_name = "CODE", default_value = "USD")]
    currency: String,
    /// The longest term of any lease in the fabric
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = quantity::span)]
    max_term: Span,
    /// The most that one lease ordered by this node may cost per hour
    #[arg(long, value_name = "PRICE", default_value = "10", value_parser = quantity::price)]
    max_hourly: leasehold_proto::Amount,
    /// The most that one lease ordered by this node may cost in all
    #[arg(long, value_name = "AMOUNT", default_value = "100", value_parser = quantity::amount)]
    max_total: leasehold_proto::Amount,
    /// Sell what the host can spare, at the default prices
    #[arg(long)]
    sell: bool,
    /// Take the passphrase of the root and tenant keys from the first line of this 0600 file
    #[arg(long, value_name = "FILE", conflicts_with = "no_passphrase")]
    passphrase_file: Option<PathBuf>,
    /// Take it from this file descriptor
    #[arg(long, value_name = "N", conflicts_with_all = ["no_passphrase", "passphrase_file"])]
    passphrase_fd: Option<u32>,
    /// Store the root and tenant keys in clear
    #[arg(long)]
    no_passphrase: bool,
}

/// Why nothing was founded.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is a node already.
    #[error("{} holds a node already; give another --dir, or remove it if it is not needed", .0.display())]
    Exists(PathBuf),
    /// No lease could ever be made.
    #[error("--max-term: leases of no length can never be made; say 30d, 12h or 90m")]
    Term,
    /// The directory or a key.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The passphrase.
    #[error("passphrase: {0}")]
    Passphrase(#[from] leasehold_keys::passphrase::PassphraseError),
    /// The configuration.
    #[error("cannot write {path}: {source}")]
    Config {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl InitError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Exists(_) => Exit::Conflict,
            Self::Term => Exit::Usage,
            Self::Home(why) => why.exit(),
            Self::Passphrase(why) => why.exit(),
            Self::Config { .. } => Exit::Io,
        }
    }
}

/// What was founded.
#[derive(Debug, serde::Serialize)]
pub struct Founded {
    /// Where.
    pub dir: PathBuf,
    /// The fabric's id, which is its charter's fingerprint.
    pub fabric: String,
    /// The node's key.
    pub node: String,
    /// The lessee in whose name this node orders.
    pub lessee: String,
}

impl Init {
    /// Founds the fabric in `home`.
    ///
    /// # Errors
    /// When there is a node already, or something cannot be made.
    pub fn run(&self, home: &Home) -> Result<Founded, InitError> {
        if home.holds_node() {
            return Err(InitError::Exists(home.dir().into()));
        }
        if self.max_term == Span::ZERO {
            return Err(InitError::Term);
        }
        // Everything is made before anything is written: a name that breaks a rule leaves nothing
        // that the next try would stumble over.
        let now = clock::now().wall;
        let root = generate()?;
        let founding = Founding {
            fabric: self.fabric.clone(),
            currency: self.currency.clone(),
            organisation: self.organisation.clone(),
            max_term: self.max_term,
            max_order_life: Span::secs(3600),
        };
        let founder = Founder::found(root, &founding, now)?;
        let (tenant, node) = (generate()?, generate()?);
        let admitted = founder.admit(tenant.id(), Role::Tenant, "tenant", now)?;
        let name = self.name.clone().unwrap_or_else(crate::host::name);
        let certificate = founder.admit(node.id(), Role::Node, &name, now)?;
        let allowance = Allowance {
            max_hourly: self.max_hourly,
            max_total: self.max_total,
            max_term: self.max_term,
        };
        let mandate = mandate(&tenant, &admitted, node.id(), allowance, now)?;
        let protection = self.protection()?;
        home.create()?;
        home.put_key("org.key", &founder.root, &protection)?;
        home.put("charter", &founder.charter)?;
        home.put_key("tenant.key", &tenant, &protection)?;
        home.put("tenant.certificate", &admitted)?;
        home.put("certificate", &certificate)?;
        home.put("mandate", &mandate)?;
        let mut config = Config::default();
        config.node.name = name;
        config.offer.sell = self.sell;
        write_config(home, &config)?;
        // The node's key comes last: with it there, the directory holds a node.
        home.put_key("node.key", &node, &Protection::Clear)?;
        Ok(Founded {
            dir: home.dir().into(),
            fabric: founder.charter.id().to_string(),
            node: node.id().to_string(),
            lessee: tenant.id().to_string(),
        })
    }

    fn protection(&self) -> Result<Protection, InitError> {
        if self.no_passphrase {
            return Ok(Protection::Clear);
        }
        let source = match (&self.passphrase_file, self.passphrase_fd) {
            (Some(file), _) => Source::File(file.clone()),
            (None, Some(fd)) => Source::Descriptor(fd),
            (None, None) => Source::Terminal,
        };
        let passphrase = source.choose("the organisation's root key and the tenant key")?;
        Ok(Protection::Passphrase(passphrase, Kdf::DEFAULT))
    }
}

/// Writes the configuration with every field in it, for an operator to change.
pub(super) fn write_config(home: &Home, config: &Config) -> Result<(), InitError> {
    let path = home.path(FILE);
    let written = |source| InitError::Config { path: path.clone(), source };
    let text = toml::to_string(config).map_err(|error| written(std::io::Error::other(error)))?;
    let text = format!(
        "# Leasehold node. Every field, with its value; docs/configuration.md says what it means.\n\
         # A flag or environment variable of `leasehold up` goes before what stands here.\n\n{text}"
    );
    leasehold_keys::disk::write_atomic(
        &path,
        text.as_bytes(),
        0o600,
        leasehold_keys::disk::Existing::Replace,
    )
    .map_err(|error| written(std::io::Error::other(error)))
}
