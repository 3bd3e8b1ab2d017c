//! `leasehold join`: makes a node for a fabric that exists, in two steps with its organisation.
//!
//! ```text
//! join --charter FILE --fingerprint ID --organisation NAME   -> certificate.request, to be signed
//! join --certificate FILE [--mandate FILE]                   -> installed: `leasehold up` can run
//! ```

use std::path::{Path, PathBuf};

use clap::Args;
use leasehold_keys::armor::{self, Item};
use leasehold_keys::disk::Existing;
use leasehold_keys::exit::Exit;
use leasehold_keys::file::Protection;
use leasehold_proto::minds::admission::{Admission, CharterError, NotAdmitted};
use leasehold_proto::words::charter::{Certificate, Role};
use leasehold_proto::words::contract::Mandate;
use leasehold_proto::words::sign::{Verified, VerifyError};
use leasehold_proto::{FabricId, KeyId};

use super::init::{InitError, write_config};
use crate::clock;
use crate::config::Config;
use crate::home::{Home, HomeError, certificate_draft, generate, read_one};

/// Make this host a node of a fabric that exists.
///
/// First with --charter and --fingerprint: makes the node's key and a certificate for the
/// organisation to sign (`leasehold-keys sign`). Then with --certificate: installs what came back.
#[derive(Args, Debug)]
pub struct Join {
    /// The fabric's charter, as its founder handed it out
    #[arg(long, value_name = "FILE", requires = "fingerprint")]
    charter: Option<PathBuf>,
    /// The fabric's id, learned from somebody you trust: the charter must have it
    #[arg(long, value_name = "ID")]
    fingerprint: Option<FabricId>,
    /// The organisation that will admit this node; may be left out where there is only one
    #[arg(long, value_name = "NAME")]
    organisation: Option<String>,
    /// The node's name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Link addresses of nodes to join by
    #[arg(long, value_name = "IP:PORT")]
    peer: Vec<std::net::SocketAddr>,
    /// The signed certificate to install
    #[arg(long, value_name = "FILE", conflicts_with = "charter")]
    certificate: Option<PathBuf>,
    /// A signed mandate to install: with it the node may order
    #[arg(long, value_name = "FILE", conflicts_with = "charter")]
    mandate: Option<PathBuf>,
}

/// Why it did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nothing to do was given.
    #[error("give --charter with --fingerprint to begin, or --certificate to finish")]
    Nothing,
    /// There is a node already.
    #[error("{} holds a node already; give another --dir", .0.display())]
    Exists(PathBuf),
    /// The charter is another fabric's.
    #[error("the charter founds fabric {got}, not {expected}: do not join by it")]
    Fingerprint {
        /// What was expected.
        expected: FabricId,
        /// What the charter says.
        got: FabricId,
    },
    /// The charter founds nothing.
    #[error("charter: {0}")]
    Charter(#[from] CharterError),
    /// There are several organisations.
    #[error("say which organisation admits this node, by --organisation: {0}")]
    Which(String),
    /// What is to be installed does not verify.
    #[error("{what}: {why}")]
    Verify {
        /// Which of them.
        what: &'static str,
        /// Why not.
        why: VerifyError,
    },
    /// The certificate does not admit this node.
    #[error("certificate: {0}")]
    NotAdmitted(#[from] NotAdmitted),
    /// The mandate is for another delegate.
    #[error("the mandate is for {0}, not for this node")]
    Delegate(KeyId),
    /// The directory.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] InitError),
}

impl JoinError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Nothing | Self::Which(_) => Exit::Usage,
            Self::Exists(_) => Exit::Conflict,
            Self::Fingerprint { .. } | Self::Charter(_) | Self::Verify { .. } => Exit::No,
            Self::NotAdmitted(_) | Self::Delegate(_) => Exit::Policy,
            Self::Home(why) => why.exit(),
            Self::Config(why) => why.exit(),
        }
    }
}

/// What was done.
#[derive(Debug, serde::Serialize)]
pub struct Joined {
    /// Where.
    pub dir: PathBuf,
    /// The node's key.
    pub node: String,
    /// The fabric's id.
    pub fabric: String,
    /// What the organisation is to sign, in the first step.
    pub request: Option<PathBuf>,
    /// Whether the node can run now.
    pub ready: bool,
}

impl Join {
    /// Does the step that the arguments ask for.
    ///
    /// # Errors
    /// When it cannot be done; nothing of it is left then but the directory.
    pub fn run(&self, home: &Home) -> Result<Joined, JoinError> {
        match (&self.charter, &self.fingerprint) {
            (Some(charter), Some(fingerprint)) => self.begin(home, charter, *fingerprint),
            _ if self.certificate.is_some() || self.mandate.is_some() => self.install(home),
            _ => Err(JoinError::Nothing),
        }
    }

    fn begin(&self, home: &Home, charter: &Path, expected: FabricId) -> Result<Joined, JoinError> {
        if home.holds_node() {
            return Err(JoinError::Exists(home.dir().into()));
        }
        let charter = read_one(charter, "charter")?;
        let admission = Admission::found(&charter)?;
        let got = admission.fabric();
        if got != expected {
            return Err(JoinError::Fingerprint { expected, got });
        }
        let organisations = &admission.charter().organisations;
        let organisation = match (&self.organisation, organisations.as_slice()) {
            (Some(name), _) => name.clone(),
            (None, [only]) => only.name.clone(),
            (None, several) => {
                let names: Vec<_> = several.iter().map(|org| org.name.as_str()).collect();
                return Err(JoinError::Which(leasehold_keys::text::shown(&names.join(", "))));
            }
        };
        let name = self.name.clone().unwrap_or_else(crate::host::name);
        let node = generate()?;
        let now = clock::now().wall;
        let draft = certificate_draft(&charter, &organisation, node.id(), Role::Node, &name, now)?;
        home.create()?;
        home.put("charter", &charter)?;
        let request = home.path("certificate.request");
        armor::write_objects(&request, &[Item::Draft(draft)], Existing::Replace)
            .map_err(HomeError::from)?;
        let mut config = Config::default();
        config.node.name = name;
        config.fabric.join.clone_from(&self.peer);
        write_config(home, &config)?;
        home.put_key("node.key", &node, &Protection::Clear)?;
        Ok(Joined {
            dir: home.dir().into(),
            node: node.id().to_string(),
            fabric: got.to_string(),
            request: Some(request),
            ready: false,
        })
    }

    fn install(&self, home: &Home) -> Result<Joined, JoinError> {
        let node = home.key("node.key")?.id();
        let admission = Admission::found(&home.get("charter", "charter")?)?;
        let fabric = admission.fabric();
        if let Some(path) = &self.certificate {
            let signed = read_one(path, "certificate")?;
            let certificate: Verified<Certificate> = signed
                .verify(&fabric)
                .map_err(|why| JoinError::Verify { what: "certificate", why })?;
            admission.admits(&certificate, &node, Role::Node, clock::now().wall)?;
            home.put("certificate", &signed)?;
        }
        if let Some(path) = &self.mandate {
            let signed = read_one(path, "mandate")?;
            let mandate: Verified<Mandate> =
                signed.verify(&fabric).map_err(|why| JoinError::Verify { what: "mandate", why })?;
            if mandate.body().delegate != node {
                return Err(JoinError::Delegate(mandate.body().delegate));
            }
            home.put("mandate", &signed)?;
        }
        Ok(Joined {
            dir: home.dir().into(),
            node: node.to_string(),
            fabric: fabric.to_string(),
            request: None,
            ready: home.path("certificate").exists(),
        })
    }
}
