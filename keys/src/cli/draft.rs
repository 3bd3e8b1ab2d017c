//! `charter new`, `certificate new`, `mandate new`, `reinstatement new`: drafts, to be signed
//! elsewhere.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use leasehold_keys::armor::{self, Item};
use leasehold_keys::exit::Exit;
use leasehold_keys::issue::{self, NewCertificate, NewCharter, NewMandate, NewReinstatement};
use leasehold_keys::text;
use leasehold_proto::words::charter::{Limits, Organisation, Role};
use leasehold_proto::words::object::{Envelope, Kind};
use leasehold_proto::words::sign::{Draft, Signed};
use leasehold_proto::{Amount, KeyId, Span, Wall};
use serde_json::json;

use super::{Answer, Failure, existing, tell};

/// Drafts of charters.
#[derive(Debug, Subcommand)]
pub(super) enum CharterCommand {
    /// A first charter, which founds a fabric
    New(CharterNew),
}

/// Drafts of certificates.
#[derive(Debug, Subcommand)]
pub(super) enum CertificateCommand {
    /// That an organisation admits a key
    New(CertificateNew),
}

/// Drafts of mandates.
#[derive(Debug, Subcommand)]
pub(super) enum MandateCommand {
    /// What a lessee lets a delegate order
    New(MandateNew),
}

/// Drafts of reinstatements.
#[derive(Debug, Subcommand)]
pub(super) enum ReinstatementCommand {
    /// That a quarantined key of an organisation is believed again
    New(ReinstatementNew),
}

/// Where a draft goes.
#[derive(Debug, Args)]
struct Out {
    /// Write the draft to this file and print its id; without it, print the draft
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

/// A first charter.
#[derive(Debug, Args)]
pub(super) struct CharterNew {
    /// The fabric's name
    #[arg(long)]
    name: String,
    /// The currency of every amount
    #[arg(long)]
    currency: String,
    /// An organisation and the key that signs its certificates; may be repeated
    #[arg(long, value_name = "NAME=KEYID", required = true, value_parser = organisation)]
    organisation: Vec<(String, KeyId)>,
    /// Which organisation signs the charter; the first when not said
    #[arg(long, value_name = "NAME")]
    signer: Option<String>,
    /// How many nodes each organisation may admit
    #[arg(long, value_name = "N", default_value_t = 1000)]
    max_nodes: u32,
    /// The longest term of a lease
    #[arg(long, value_name = "SPAN", default_value = "30d", value_parser = text::span)]
    max_term: Span,
    /// How far into the future an order's validity may reach
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = text::span)]
    max_order_life: Span,
    #[command(flatten)]
    out: Out,
}

/// A certificate.
#[derive(Debug, Args)]
pub(super) struct CertificateNew {
    /// The signed charter
    #[arg(long, value_name = "FILE")]
    charter: PathBuf,
    /// The organisation that admits the key; its root key signs
    #[arg(long, value_name = "NAME")]
    organisation: String,
    /// What the key is admitted as
    #[arg(long, value_enum)]
    role: RoleName,
    /// The key
    #[arg(long, value_name = "KEYID")]
    key: KeyId,
    /// What the key is called, for people
    #[arg(long)]
    name: String,
    /// For how long, from now on
    #[arg(long, value_name = "SPAN", default_value = "30d", value_parser = text::span)]
    valid: Span,
    #[command(flatten)]
    out: Out,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleName {
    /// A node: it may offer, grant and be a delegate
    Node,
    /// A lessee: it may sign mandates and orders
    Tenant,
}

/// A mandate.
#[derive(Debug, Args)]
pub(super) struct MandateNew {
    /// Who borrows and owes; its key signs
    #[arg(long, value_name = "KEYID")]
    lessee: KeyId,
    /// Who may order in its name: usually a node
    #[arg(long, value_name = "KEYID")]
    delegate: KeyId,
    /// The signed certificate that admits the lessee as a tenant
    #[arg(long, value_name = "FILE")]
    certificate: PathBuf,
    /// The most that one lease may cost per hour
    #[arg(long, value_name = "AMOUNT")]
    max_hourly: Amount,
    /// The most that one lease may cost in all
    #[arg(long, value_name = "AMOUNT")]
    max_total: Amount,
    /// The longest term of one lease
    #[arg(long, value_name = "SPAN", value_parser = text::span)]
    max_term: Span,
    /// With whom; may be repeated; with any node when not said
    #[arg(long, value_name = "KEYID")]
    lessor: Vec<KeyId>,
    /// For how long, from now on
    #[arg(long, value_name = "SPAN", default_value = "7d", value_parser = text::span)]
    valid: Span,
    #[command(flatten)]
    out: Out,
}

/// A reinstatement.
#[derive(Debug, Args)]
pub(super) struct ReinstatementNew {
    /// The signed charter
    #[arg(long, value_name = "FILE")]
    charter: PathBuf,
    /// The organisation that admits the key; its root key signs
    #[arg(long, value_name = "NAME")]
    organisation: String,
    /// The key
    #[arg(long, value_name = "KEYID")]
    key: KeyId,
    /// What it signed in this epoch or before is void: the highest one that anybody has seen of it
    #[arg(long, value_name = "EPOCH")]
    above: u64,
    /// For how long nodes take it, from now on
    #[arg(long, value_name = "SPAN", default_value = "7d", value_parser = text::span)]
    valid: Span,
    #[command(flatten)]
    out: Out,
}

#[derive(Debug, thiserror::Error)]
enum ParseOrganisationError {
    #[error("expected NAME=KEYID")]
    Form,
    #[error("{0}")]
    Key(#[from] leasehold_proto::ParseIdError),
}

fn organisation(text: &str) -> Result<(String, KeyId), ParseOrganisationError> {
    let (name, key) = text.rsplit_once('=').ok_or(ParseOrganisationError::Form)?;
    Ok((name.to_string(), key.parse()?))
}

/// The one signed object of `kind` in a file.
pub(super) fn the_signed(path: &Path, kind: Kind) -> Result<Signed, Failure> {
    let mut found = Vec::new();
    for item in armor::read_objects(path)? {
        if let Item::Signed(signed) = item
            && signed.header().is_ok_and(|header| header.kind == kind)
        {
            found.push(signed);
        }
    }
    match (found.pop(), found.len()) {
        (Some(signed), 0) => Ok(signed),
        (last, more) => {
            let count = more + usize::from(last.is_some());
            let path = path.display();
            let error =
                anyhow::anyhow!("{path} holds {count} signed {kind}s where one is expected");
            Err(Failure::new(Exit::Io, error))
        }
    }
}

impl Out {
    fn put(&self, draft: Draft) -> Result<Answer, Failure> {
        let id = draft.id();
        let header = Envelope::decode(&draft.envelope)
            .map_err(|why| Failure::from(armor::SaveError::from(why)))?
            .header;
        let item = Item::Draft(draft);
        let mut json = json!({
            "kind": header.kind, "id": id, "signer": header.signer, "fabric": header.fabric,
            "not_after": header.not_after,
        });
        let text = armor::encode(&item)?;
        if header.kind == Kind::Charter {
            json["fabric"] = json!(id);
        }
        if let Some(path) = &self.out {
            armor::write_objects(path, &[item], existing(self.force))?;
            json["file"] = json!(path);
            tell(&format!("next: leasehold-keys sign {} (by {})", path.display(), header.signer));
            return Ok(Answer::new(format!("{id}\n"), json));
        }
        json["draft"] = json!(text);
        Ok(Answer::new(text, json))
    }
}

impl CharterCommand {
    pub(super) fn run(self, now: Wall) -> Result<Answer, Failure> {
        let Self::New(args) = self;
        let max_nodes = args.max_nodes;
        let organisations = args.organisation.into_iter();
        let organisations =
            organisations.map(|(name, root)| Organisation { name, root, max_nodes }).collect();
        let limits = Limits { max_term: args.max_term, max_order_life: args.max_order_life };
        let (name, currency, signer) = (args.name, args.currency, args.signer);
        let new = NewCharter { name, currency, organisations, limits, signer };
        args.out.put(issue::charter(new, now)?)
    }
}

impl CertificateCommand {
    pub(super) fn run(self, now: Wall) -> Result<Answer, Failure> {
        let Self::New(args) = self;
        let charter = the_signed(&args.charter, Kind::Charter)?;
        let role = match args.role {
            RoleName::Node => Role::Node,
            RoleName::Tenant => Role::Tenant,
        };
        let CertificateNew { organisation, name, key, valid, .. } = args;
        let new = NewCertificate { organisation, name, role, key, valid };
        args.out.put(issue::certificate(&charter, new, now)?)
    }
}

impl ReinstatementCommand {
    pub(super) fn run(self, now: Wall) -> Result<Answer, Failure> {
        let Self::New(args) = self;
        let charter = the_signed(&args.charter, Kind::Charter)?;
        let ReinstatementNew { organisation, key, above, valid, .. } = args;
        let new = NewReinstatement { organisation, key, above, valid };
        args.out.put(issue::reinstatement(&charter, new, now)?)
    }
}

impl MandateCommand {
    pub(super) fn run(self, now: Wall) -> Result<Answer, Failure> {
        let Self::New(args) = self;
        let certificate = the_signed(&args.certificate, Kind::Certificate)?;
        let ends = certificate.header().map(|header| header.not_after);
        if ends.is_ok_and(|ends| ends < now + args.valid) {
            tell("warning: the certificate ends before the mandate would");
        }
        let MandateNew { lessee, delegate, max_hourly, max_total, max_term, valid, .. } = args;
        let lessors = args.lessor;
        let new = NewMandate { lessee, delegate, max_hourly, max_total, max_term, lessors, valid };
        args.out.put(issue::mandate(&certificate, new, now)?)
    }
}
