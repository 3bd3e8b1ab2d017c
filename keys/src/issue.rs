//! Drafts of what organisations and lessees sign, and the rules of what may be signed at all.
//!
//! Everything made here is a [`Draft`]: the key that will sign it may live on another machine.
//! The epoch of such an object is the time it was made, in milliseconds, and its number zero: a
//! person's key has no starts that could be counted, and two objects about one subject made in
//! one millisecond would be the same or a lie.
//!
//! [`signable`] is what keeps the tool from being an oracle: only charters, certificates,
//! mandates, orders and reinstatements are signed, of a version that is fully understood here, still valid, whose
//! subject and inner papers are what they should be.

use leasehold_proto::minds::admission::{Admission, CharterError};
use leasehold_proto::words::charter::{
    Certificate, Charter, Limits, MAX_ORGANISATIONS, Organisation, Role,
};
use leasehold_proto::words::contract::{Authority, Mandate, Order};
use leasehold_proto::words::equivocation::Reinstatement;
use leasehold_proto::words::object::{
    Body, Envelope, Header, Kind, draft_json, key_subject, order_subject,
};
use leasehold_proto::words::sign::{Draft, HeaderOf, Signed, VerifyError, is_usable};
use leasehold_proto::words::wire::{DecodeError, EncodeError};
use leasehold_proto::{Amount, FabricId, Hash, KeyId, Span, Wall};

use crate::exit::Exit;

/// When something that never ceases to be valid does so.
pub const NO_END: Wall = Wall(u64::MAX);

/// Why no draft was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// A rule of the object is broken.
    #[error("{0}")]
    Rule(&'static str),
    /// It does not fit.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The charter given founds no fabric.
    #[error("the charter given cannot be used: {0}")]
    Charter(#[from] CharterError),
    /// The charter names no such organisation.
    #[error("the charter names no organisation '{name}'; it names: {known}")]
    Organisation {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The certificate given does not verify.
    #[error("the certificate given cannot be used: {0}")]
    Certificate(VerifyError),
    /// The certificate is somebody else's, or for a node.
    #[error("the certificate given admits {key} as a {role}, not {lessee} as a tenant")]
    Lessee {
        /// Whom it admits.
        key: KeyId,
        /// As what.
        role: &'static str,
        /// Who should be admitted.
        lessee: KeyId,
    },
    /// A key is of small order or no point.
    #[error("{0} is not a usable Ed25519 key")]
    Key(KeyId),
}

impl IssueError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Rule(_) | Self::Organisation { .. } => Exit::Usage,
            Self::Encode(_) => Exit::Io,
            Self::Charter(_) | Self::Certificate(_) => Exit::No,
            Self::Lessee { .. } | Self::Key(_) => Exit::Policy,
        }
    }
}

fn draft<T: Body>(header: HeaderOf, body: &T) -> Result<Draft, IssueError> {
    body.validate().map_err(IssueError::Rule)?;
    Ok(Draft::new(header, body)?)
}

fn usable(key: &KeyId) -> Result<(), IssueError> {
    if is_usable(key) { Ok(()) } else { Err(IssueError::Key(*key)) }
}

/// What a first charter says.
#[derive(Clone, Debug)]
pub struct NewCharter {
    /// The fabric's name.
    pub name: String,
    /// The currency of every amount in it.
    pub currency: String,
    /// Who may admit nodes and tenants; the first one will sign, unless `signer` says another.
    pub organisations: Vec<Organisation>,
    /// What nobody may exceed.
    pub limits: Limits,
    /// The name of the organisation that will sign.
    pub signer: Option<String>,
}

/// A draft of the charter that founds a fabric. It has no end: later charters replace it.
///
/// # Errors
/// When it breaks a rule of charters, or names an unusable key.
pub fn charter(new: NewCharter, now: Wall) -> Result<Draft, IssueError> {
    let NewCharter { name, currency, organisations, limits, signer } = new;
    organisations.iter().try_for_each(|organisation| usable(&organisation.root))?;
    let body = Charter { name, currency, number: 1, previous: None, organisations, limits };
    body.validate().map_err(IssueError::Rule)?;
    let signer = match signer {
        Some(name) => organisation(&body, &name)?.root,
        None => body.organisations.first().map(|first| first.root).unwrap_or_default(),
    };
    let fabric = FabricId::default();
    let subject = Hash::default();
    draft(HeaderOf { fabric, signer, subject, epoch: now.0, seq: 0, not_after: NO_END }, &body)
}

fn organisation<'a>(charter: &'a Charter, name: &str) -> Result<&'a Organisation, IssueError> {
    let found = charter.organisations.iter().find(|organisation| organisation.name == name);
    found.ok_or_else(|| IssueError::Organisation {
        name: crate::text::shown(&name.chars().take(80).collect::<String>()),
        known: {
            let names = charter.organisations.iter().take(MAX_ORGANISATIONS);
            names.map(|o| crate::text::shown(&o.name)).collect::<Vec<_>>().join(", ")
        },
    })
}

/// What a certificate says.
#[derive(Clone, Debug)]
pub struct NewCertificate {
    /// The organisation that admits, as the charter names it: its root key will sign.
    pub organisation: String,
    /// What the key is called, for people.
    pub name: String,
    /// What it is admitted as.
    pub role: Role,
    /// The key.
    pub key: KeyId,
    /// For how long, from now on.
    pub valid: Span,
}

/// A draft of a certificate in the fabric that `charter` founds.
///
/// # Errors
/// When the charter cannot be used or names no such organisation, or the key is unusable.
pub fn certificate(charter: &Signed, new: NewCertificate, now: Wall) -> Result<Draft, IssueError> {
    let admission = Admission::found(charter)?;
    let NewCertificate { organisation: issuer, name, role, key, valid } = new;
    usable(&key)?;
    let signer = organisation(admission.charter(), &issuer)?.root;
    let fabric = admission.fabric();
    let not_after = now + valid;
    let subject = key_subject(&key);
    let header = HeaderOf { fabric, signer, subject, epoch: now.0, seq: 0, not_after };
    draft(header, &Certificate { organisation: issuer, name, role, key, not_before: now })
}

/// What a mandate says.
#[derive(Clone, Debug)]
pub struct NewMandate {
    /// Who borrows and owes: its key will sign.
    pub lessee: KeyId,
    /// Who may order in its name.
    pub delegate: KeyId,
    /// The most that one lease may cost per hour.
    pub max_hourly: Amount,
    /// The most that one lease may cost in all.
    pub max_total: Amount,
    /// The longest term of one lease.
    pub max_term: Span,
    /// With whom; empty: with any node of the fabric.
    pub lessors: Vec<KeyId>,
    /// For how long, from now on.
    pub valid: Span,
}

/// A draft of a mandate in the fabric of `certificate`, which admits the lessee as a tenant.
///
/// # Errors
/// When the certificate does not verify or is not the lessee's, or a key is unusable.
pub fn mandate(certificate: &Signed, new: NewMandate, now: Wall) -> Result<Draft, IssueError> {
    let admitted = certificate.verify_anywhere::<Certificate>();
    let admitted = admitted.map_err(IssueError::Certificate)?;
    let NewMandate { lessee, delegate, max_hourly, max_total, max_term, lessors, valid } = new;
    let Certificate { key, role, .. } = *admitted.body();
    if key != lessee || role != Role::Tenant {
        let role = if role == Role::Tenant { "tenant" } else { "node" };
        return Err(IssueError::Lessee { key, role, lessee });
    }
    usable(&delegate)?;
    lessors.iter().try_for_each(usable)?;
    let fabric = admitted.header().fabric;
    let not_after = now + valid;
    let subject = key_subject(&delegate);
    let header = HeaderOf { fabric, signer: lessee, subject, epoch: now.0, seq: 0, not_after };
    let certificate = certificate.clone();
    draft(
        header,
        &Mandate {
            delegate,
            certificate,
            not_before: now,
            max_hourly,
            max_total,
            max_term,
            lessors,
        },
    )
}

/// What a reinstatement says.
#[derive(Clone, Debug)]
pub struct NewReinstatement {
    /// The organisation, as the charter names it: its root key will sign.
    pub organisation: String,
    /// The key that is to be believed again.
    pub key: KeyId,
    /// What it signed in this epoch or before is void.
    pub above: u64,
    /// For how long nodes take this, from now on; what they took stays.
    pub valid: Span,
}

/// A draft of a reinstatement in the fabric that `charter` founds.
///
/// # Errors
/// When the charter cannot be used or names no such organisation, or the key is unusable.
pub fn reinstatement(
    charter: &Signed,
    new: NewReinstatement,
    now: Wall,
) -> Result<Draft, IssueError> {
    let admission = Admission::found(charter)?;
    let NewReinstatement { organisation: issuer, key, above, valid } = new;
    usable(&key)?;
    let signer = organisation(admission.charter(), &issuer)?.root;
    let fabric = admission.fabric();
    let (not_after, subject) = (now + valid, key_subject(&key));
    let header = HeaderOf { fabric, signer, subject, epoch: now.0, seq: 0, not_after };
    draft(header, &Reinstatement { organisation: issuer, key, above })
}

/// Why a draft is not signed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSignable {
    /// It is no draft.
    #[error("it is no draft of an object: {0}")]
    Decode(#[from] DecodeError),
    /// A kind that only a node signs, in its own name.
    #[error(
        "{0}: not signed here, only a charter, certificate, mandate, order or reinstatement is"
    )]
    Kind(Kind),
    /// A version of the kind that cannot be shown in full.
    #[error("version {0} of this kind is not known here, so it cannot be shown before signing")]
    Version(u16),
    /// Something that cannot be shown in full.
    #[error("it carries an extension ({0}) that is not known here and so cannot be shown")]
    Extension(u16),
    /// It would be born dead.
    #[error("it ceased to be valid at {0}: make a new one")]
    Expired(Wall),
    /// A rule that its kind has.
    #[error("{0}")]
    Rule(&'static str),
    /// A paper inside it does not verify.
    #[error("the {what} inside it does not verify: {why}")]
    Inside {
        /// Which.
        what: &'static str,
        /// Why not.
        why: VerifyError,
    },
    /// The key at hand is another one.
    #[error("it is to be signed by {signer}, and the key given is {key}")]
    Signer {
        /// Who should sign.
        signer: KeyId,
        /// Whose key it is.
        key: KeyId,
    },
}

impl NotSignable {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Decode(_) => Exit::Io,
            Self::Inside { .. } => Exit::No,
            Self::Kind(_)
            | Self::Version(_)
            | Self::Extension(_)
            | Self::Expired(_)
            | Self::Rule(_)
            | Self::Signer { .. } => Exit::Policy,
        }
    }
}

/// Whether `key` may sign `draft` at `now`: the rules at the head of this file.
///
/// # Errors
/// The first rule that is broken.
pub fn signable(draft: &Draft, key: &KeyId, now: Wall) -> Result<Header, NotSignable> {
    let envelope = Envelope::decode(&draft.envelope)?;
    let header = envelope.header;
    if let Some(extension) = envelope.extensions.first() {
        return Err(NotSignable::Extension(extension.tag));
    }
    if header.version != 1 {
        return Err(NotSignable::Version(header.version));
    }
    // The body decodes and keeps the rules of its kind.
    draft_json(&draft.envelope)?;
    match header.kind {
        Kind::Charter => founding(&header, &envelope.read()?)?,
        Kind::Certificate => admitting(&header, &envelope.read()?)?,
        Kind::Mandate => mandating(&header, &envelope.read()?)?,
        Kind::Order => ordering(&header, &envelope.read()?)?,
        Kind::Reinstatement => reinstating(&header, &envelope.read()?)?,
        other => return Err(NotSignable::Kind(other)),
    }
    if header.not_after < now {
        return Err(NotSignable::Expired(header.not_after));
    }
    if header.signer != *key {
        return Err(NotSignable::Signer { signer: header.signer, key: *key });
    }
    Ok(header)
}

fn rule(holds: bool, broken: &'static str) -> Result<(), NotSignable> {
    if holds { Ok(()) } else { Err(NotSignable::Rule(broken)) }
}

fn inside<T: Body + Clone>(
    what: &'static str,
    signed: &Signed,
    fabric: &FabricId,
) -> Result<T, NotSignable> {
    let verified = signed.verify::<T>(fabric);
    verified.map(|object| object.body().clone()).map_err(|why| NotSignable::Inside { what, why })
}

fn founding(header: &Header, body: &Charter) -> Result<(), NotSignable> {
    rule(header.subject == Hash::default(), "a charter's subject is zero")?;
    rule(body.number == 1, "only a first charter is signed here")?;
    rule(header.fabric == FabricId::default(), "a first charter names no fabric: it founds one")?;
    rule(
        body.organisation_of(&header.signer).is_some(),
        "a charter is signed by one of the organisations it names",
    )?;
    rule(
        body.organisations.iter().all(|organisation| is_usable(&organisation.root)),
        "the charter names a root key that is not a usable Ed25519 key",
    )
}

fn admitting(header: &Header, body: &Certificate) -> Result<(), NotSignable> {
    rule(header.subject == key_subject(&body.key), "its subject is another key than it admits")?;
    rule(is_usable(&body.key), "it admits a key that is not a usable Ed25519 key")
}

fn reinstating(header: &Header, body: &Reinstatement) -> Result<(), NotSignable> {
    rule(header.subject == key_subject(&body.key), "its subject is another key than it reinstates")
}

fn mandating(header: &Header, body: &Mandate) -> Result<(), NotSignable> {
    let subject = key_subject(&body.delegate);
    rule(header.subject == subject, "its subject is another key than its delegate")?;
    rule(is_usable(&body.delegate), "its delegate is not a usable Ed25519 key")?;
    let papers: Certificate = inside("certificate", &body.certificate, &header.fabric)?;
    let admits = papers.role == Role::Tenant && papers.key == header.signer;
    rule(admits, "the certificate inside it does not admit its signer as a tenant")
}

fn ordering(header: &Header, body: &Order) -> Result<(), NotSignable> {
    let subject = order_subject(&body.lessee, &body.request);
    rule(header.subject == subject, "its subject is another lessee or request than it names")?;
    let (signer, certificate) = match &body.authority {
        Authority::Lessee(certificate) => (body.lessee, certificate.clone()),
        Authority::Mandate(mandate) => {
            let papers: Mandate = inside("mandate", mandate, &header.fabric)?;
            let delegated = papers.delegate == body.delegate;
            rule(delegated, "the mandate inside it is for another delegate")?;
            (body.delegate, papers.certificate)
        }
    };
    rule(header.signer == signer, "an order is signed by the one whom its papers entitle")?;
    let papers: Certificate = inside("certificate", &certificate, &header.fabric)?;
    let admits = papers.role == Role::Tenant && papers.key == body.lessee;
    rule(admits, "the certificate inside it does not admit its lessee as a tenant")
}
