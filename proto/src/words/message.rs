//! Everything one node can say to another over a link, as it travels and as it is understood.
//!
//! A [`Message`] is what travels: signed objects inside it are opaque bytes. [`Said`] is what the
//! core hears: the same with every signature checked. [`verify`] turns one into the other, at the
//! edge, in parallel; only messages that need no signature of their own pass unchanged (the link
//! already proves who speaks).

use serde::{Deserialize, Serialize};

use super::charter::Certificate;
use super::contract::{
    Acceptance, Authority, Claim, Commit, Gang, Grant, MAX_GANG, Mandate, Order, Refusal, Release,
    Renew, Renewal, Termination,
};
use super::equivocation::{Conviction, Equivocation, Reinstatement};
use super::object::Kind;
use super::record::{HostRecord, Offer, Payloads};
use super::sign::{Draft, Papers, Signed, Verified, VerifyError};
use super::usage::{Acknowledgement, Objection, Receipt};
use super::wire::{self, DecodeError, EncodeError, MAX_MESSAGE};
use crate::base::id::{FabricId, Hash, KeyId, LeaseId};

/// The most record names in one message.
pub const MAX_NAMES: usize = 2_048;
/// The most records in one message.
pub const MAX_RECORDS: usize = 256;
/// The most proofs of equivocation, or reinstatements, in one message.
pub const MAX_CONDUCT: usize = 64;
/// How many buckets the map of records is hashed into for reconciliation.
pub const BUCKETS: usize = 256;

/// Names one version of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RecordName {
    /// Whose record.
    pub key: KeyId,
    /// Which of its records.
    pub kind: Kind,
    /// The version: epoch first.
    pub epoch: u64,
    /// The version within the epoch.
    pub seq: u64,
    /// The first eight bytes of the object's hash: two records of one version that differ in it
    /// were signed by an equivocator, or by two nodes with one key.
    pub tag: u64,
}

/// What travels in one frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The first word on a link, each way: who speaks, admitted by whom. Answered with `Hello`.
    Hello {
        /// The charter known here.
        charter: Hash,
        /// The speaker's node certificate.
        certificate: Signed,
        /// The speaker's epoch.
        epoch: u64,
        /// The host record of the hearer's newest epoch that was ever seen here: its own signature
        /// under it is what proves that there was such an epoch.
        seen: Option<Box<Signed>>,
    },
    /// Versions of records that are new here. Answered with `Pull`.
    Announce(Vec<RecordName>),
    /// Which of them to send. Answered with `Records`, or an empty one is an end.
    Pull(Vec<RecordName>),
    /// Records. Answered with `Done`.
    Records(Vec<Signed>),
    /// A hash per bucket of all that is known here. Answered with `Differ`.
    Digest(Vec<u64>),
    /// The buckets that differ, and all names in them.
    Differ {
        /// Which buckets.
        buckets: Vec<u8>,
        /// What is known in them.
        names: Vec<RecordName>,
    },
    /// An order. Answered with `Granted` or `Refused`.
    Order(Signed),
    /// A grant.
    Granted(Signed),
    /// A refusal of an order or an act.
    Refused(Signed),
    /// A claim. Answered with `Accepted` or `Refused`.
    Claim(Signed),
    /// A release. Answered with `Accepted` or `Refused`.
    Release(Signed),
    /// An act was accepted.
    Accepted(Signed),
    /// A receipt. Answered with `Acknowledged` or `Objected`.
    Receipt(Signed),
    /// A receipt is countersigned.
    Acknowledged(Signed),
    /// A receipt is not countersigned.
    Objected(Signed),
    /// A lease ended. Answered with `Done`.
    Terminated(Signed),
    /// Asks how a lease stands: its latest receipt and its termination, if it ended. Answered
    /// with `Terminated`, `Receipt` or `Refused`.
    Inquire(LeaseId),
    /// Heard, nothing to say.
    Done,
    /// Makes a lease longer. Answered with `Renewed` or `Refused`.
    Renew(Signed),
    /// A lease was made longer.
    Renewed(Signed),
    /// A gang's certificate, to each member's lessor, with the claim of its lease, which then needs
    /// no further word. Answered with `Committed` or `Refused`.
    Gang(Signed, Option<Signed>),
    /// A lease is a member of the gang.
    Committed(Signed),
    /// The commits of other members, for this lease of the hearer's. Answered with `Commits`: what
    /// the hearer knows of that gang, or none.
    Commits(LeaseId, Vec<Signed>),
    /// Whose word does not count, with the proofs, and who was reinstated. Answered with `Done`.
    Conduct(Vec<Equivocation>, Vec<Signed>),
}

/// A message as a mind utters it: objects in it are drafts, which the shell signs once they are
/// durable, or objects that others signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Utterance {
    /// Needs no signature of this node.
    Plain(Message),
    /// One object of this node's, still to be signed.
    Signs(Word, Draft),
    /// A gang's certificate and a claim under it, both still to be signed.
    Gang(Draft, Option<Draft>),
    /// Commits of others, and perhaps this node's own, for this lease of the hearer's.
    Commits(LeaseId, Vec<Signed>, Option<Draft>),
}

impl Utterance {
    /// The message to send, once what is to be signed is: by `sign`, after the barrier.
    ///
    /// # Errors
    /// What `sign` says.
    pub fn carry<E>(self, mut sign: impl FnMut(&Draft) -> Result<Signed, E>) -> Result<Message, E> {
        Ok(match self {
            Self::Plain(message) => message,
            Self::Signs(word, draft) => word.carry(sign(&draft)?),
            Self::Gang(gang, claim) => {
                Message::Gang(sign(&gang)?, claim.as_ref().map(&mut sign).transpose()?)
            }
            Self::Commits(lease, mut commits, own) => {
                commits.extend(own.as_ref().map(sign).transpose()?);
                Message::Commits(lease, commits)
            }
        })
    }
}

/// Which message an object of this node's travels in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// [`Message::Order`]
    Order,
    /// [`Message::Granted`]
    Granted,
    /// [`Message::Refused`]
    Refused,
    /// [`Message::Claim`]
    Claim,
    /// [`Message::Release`]
    Release,
    /// [`Message::Accepted`]
    Accepted,
    /// [`Message::Renew`]
    Renew,
    /// [`Message::Renewed`]
    Renewed,
    /// [`Message::Committed`]
    Committed,
    /// [`Message::Receipt`]
    Receipt,
    /// [`Message::Acknowledged`]
    Acknowledged,
    /// [`Message::Objected`]
    Objected,
    /// [`Message::Terminated`]
    Terminated,
}

impl Word {
    /// The message that carries `signed` under this word.
    #[must_use]
    pub const fn carry(self, signed: Signed) -> Message {
        match self {
            Self::Order => Message::Order(signed),
            Self::Granted => Message::Granted(signed),
            Self::Refused => Message::Refused(signed),
            Self::Claim => Message::Claim(signed),
            Self::Release => Message::Release(signed),
            Self::Accepted => Message::Accepted(signed),
            Self::Renew => Message::Renew(signed),
            Self::Renewed => Message::Renewed(signed),
            Self::Committed => Message::Committed(signed),
            Self::Receipt => Message::Receipt(signed),
            Self::Acknowledged => Message::Acknowledged(signed),
            Self::Objected => Message::Objected(signed),
            Self::Terminated => Message::Terminated(signed),
        }
    }
}

/// An order with everything that must hold for it, each signature checked.
#[derive(Clone, Debug)]
pub struct OrderPapers {
    /// The order.
    pub order: Verified<Order>,
    /// The mandate under which a delegate signed it.
    pub mandate: Option<Verified<Mandate>>,
    /// The certificate that admits the lessee.
    pub certificate: Verified<Certificate>,
}

/// A grant with the certificate that admits the lessor, both signatures checked.
#[derive(Clone, Debug)]
pub struct GrantPapers {
    /// The grant.
    pub grant: Verified<Grant>,
    /// The lessor's certificate.
    pub certificate: Verified<Certificate>,
}

/// A record whose signature holds.
#[derive(Clone, Debug)]
pub enum RecordSaid {
    /// A slow record with the certificate inside it.
    Host(Verified<HostRecord>, Verified<Certificate>),
    /// A fast record.
    Offer(Verified<Offer>),
    /// Which payloads a node has.
    Payloads(Verified<Payloads>),
    /// A kind that this version does not know: relayed unread.
    Unread(Verified<Vec<u8>>),
}

impl RecordSaid {
    /// Its version's name.
    #[must_use]
    pub fn name(&self) -> RecordName {
        let header = match self {
            Self::Host(record, _) => record.header(),
            Self::Offer(record) => record.header(),
            Self::Payloads(record) => record.header(),
            Self::Unread(record) => record.header(),
        };
        let (kind, epoch, seq) = (header.kind, header.epoch, header.seq);
        let id = match self {
            Self::Host(record, _) => record.id(),
            Self::Offer(record) => record.id(),
            Self::Payloads(record) => record.id(),
            Self::Unread(record) => record.id(),
        };
        let tag = id.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        RecordName { key: header.signer, kind, epoch, seq, tag }
    }

    /// The bytes as they travelled.
    #[must_use]
    pub fn signed(&self) -> &Signed {
        match self {
            Self::Host(record, _) => record.signed(),
            Self::Offer(record) => record.signed(),
            Self::Payloads(record) => record.signed(),
            Self::Unread(record) => record.signed(),
        }
    }
}

/// What the core hears: every signature in it holds.
#[derive(Clone, Debug)]
pub enum Said {
    /// See [`Message::Hello`].
    Hello {
        /// The charter known there.
        charter: Hash,
        /// The speaker's certificate.
        certificate: Verified<Certificate>,
        /// The speaker's epoch.
        epoch: u64,
        /// The host record of this node's newest epoch that was ever seen there.
        seen: Option<Box<RecordSaid>>,
    },
    /// See [`Message::Announce`].
    Announce(Vec<RecordName>),
    /// See [`Message::Pull`].
    Pull(Vec<RecordName>),
    /// See [`Message::Records`].
    Records(Vec<RecordSaid>),
    /// See [`Message::Digest`].
    Digest(Vec<u64>),
    /// See [`Message::Differ`].
    Differ {
        /// Which buckets.
        buckets: Vec<u8>,
        /// What is known in them there.
        names: Vec<RecordName>,
    },
    /// See [`Message::Order`].
    Order(Box<OrderPapers>),
    /// See [`Message::Granted`].
    Granted(Box<GrantPapers>),
    /// See [`Message::Refused`], with the newest offer it carries.
    Refused(Verified<Refusal>, Option<Verified<Offer>>),
    /// See [`Message::Claim`].
    Claim(Verified<Claim>),
    /// See [`Message::Release`].
    Release(Verified<Release>),
    /// See [`Message::Accepted`].
    Accepted(Verified<Acceptance>),
    /// See [`Message::Renew`].
    Renew(Verified<Renew>),
    /// See [`Message::Renewed`].
    Renewed(Verified<Renewal>),
    /// See [`Message::Gang`].
    Gang(Verified<Gang>, Option<Verified<Claim>>),
    /// See [`Message::Committed`].
    Committed(Verified<Commit>),
    /// See [`Message::Commits`].
    Commits(LeaseId, Vec<Verified<Commit>>),
    /// See [`Message::Conduct`]; what proves nothing is left out.
    Conduct(Vec<Conviction>, Vec<Verified<Reinstatement>>),
    /// See [`Message::Receipt`].
    Receipt(Verified<Receipt>),
    /// See [`Message::Acknowledged`].
    Acknowledged(Verified<Acknowledgement>),
    /// See [`Message::Objected`].
    Objected(Verified<Objection>),
    /// See [`Message::Terminated`].
    Terminated(Verified<Termination>),
    /// See [`Message::Inquire`].
    Inquire(LeaseId),
    /// See [`Message::Done`].
    Done,
}

/// Encodes a message for one frame.
///
/// # Errors
/// When it is longer than [`MAX_MESSAGE`].
pub fn encode(message: &Message) -> Result<Vec<u8>, EncodeError> {
    wire::encode::<MAX_MESSAGE>(message)
}

/// Decodes the message in one frame and checks its lists' bounds.
///
/// # Errors
/// When the frame is no message.
pub fn decode(frame: &[u8]) -> Result<Message, DecodeError> {
    let message: Message = wire::decode::<MAX_MESSAGE, _>(frame)?;
    match &message {
        Message::Announce(names) | Message::Pull(names) if names.len() > MAX_NAMES => {
            Err(DecodeError::Invalid("a message names at most 2048 records"))
        }
        Message::Differ { buckets, names }
            if names.len() > MAX_NAMES || buckets.len() > BUCKETS =>
        {
            Err(DecodeError::Invalid("a message names at most 256 buckets and 2048 records"))
        }
        Message::Records(records) if records.len() > MAX_RECORDS => {
            Err(DecodeError::Invalid("a message carries at most 256 records"))
        }
        Message::Commits(_, commits) if commits.len() > MAX_GANG => {
            Err(DecodeError::Invalid("a message carries at most 64 commits"))
        }
        Message::Conduct(proofs, lifted) if proofs.len().max(lifted.len()) > MAX_CONDUCT => {
            Err(DecodeError::Invalid("a message carries at most 64 proofs and reinstatements"))
        }
        Message::Digest(buckets) if buckets.len() != BUCKETS => {
            Err(DecodeError::Invalid("a digest has 256 buckets"))
        }
        _ => Ok(message),
    }
}

/// Checks every signature in `message`.
///
/// # Errors
/// At the first that does not hold; nothing of the message may be believed then.
pub fn verify(message: &Message, fabric: &FabricId) -> Result<Said, VerifyError> {
    verify_among(message, fabric, &mut Papers::default())
}

/// The same, with certificates and mandates that were met before not checked again.
///
/// # Errors
/// As for [`verify`].
pub fn verify_among(
    message: &Message,
    fabric: &FabricId,
    papers: &mut Papers,
) -> Result<Said, VerifyError> {
    Ok(match message {
        Message::Hello { charter, certificate, epoch, seen } => Said::Hello {
            charter: *charter,
            certificate: certificate.verify_among(fabric, papers)?,
            epoch: *epoch,
            seen: match seen {
                Some(seen) => Some(Box::new(record(seen, fabric, papers)?)),
                None => None,
            },
        },
        Message::Announce(names) => Said::Announce(names.clone()),
        Message::Pull(names) => Said::Pull(names.clone()),
        Message::Records(records) => Said::Records(
            records.iter().map(|r| record(r, fabric, papers)).collect::<Result<_, _>>()?,
        ),
        Message::Digest(buckets) => Said::Digest(buckets.clone()),
        Message::Differ { buckets, names } => {
            Said::Differ { buckets: buckets.clone(), names: names.clone() }
        }
        Message::Order(signed) => Said::Order(Box::new(order(signed, fabric, papers)?)),
        Message::Granted(signed) => Said::Granted(Box::new(grant(signed, fabric, papers)?)),
        Message::Refused(signed) => {
            let refusal: Verified<Refusal> = signed.verify(fabric)?;
            let offer = refusal.body().offer.as_ref().map(|offer| offer.verify(fabric));
            Said::Refused(refusal.clone(), offer.transpose()?)
        }
        Message::Claim(signed) => Said::Claim(signed.verify(fabric)?),
        Message::Release(signed) => Said::Release(signed.verify(fabric)?),
        Message::Accepted(signed) => Said::Accepted(signed.verify(fabric)?),
        Message::Renew(signed) => Said::Renew(signed.verify(fabric)?),
        Message::Renewed(signed) => Said::Renewed(signed.verify(fabric)?),
        Message::Gang(gang, claim) => {
            let claim = claim.as_ref().map(|claim| claim.verify(fabric)).transpose()?;
            Said::Gang(gang.verify(fabric)?, claim)
        }
        Message::Committed(signed) => Said::Committed(signed.verify(fabric)?),
        Message::Commits(lease, commits) => Said::Commits(
            *lease,
            commits.iter().map(|commit| commit.verify(fabric)).collect::<Result<_, _>>()?,
        ),
        Message::Receipt(signed) => Said::Receipt(signed.verify(fabric)?),
        Message::Acknowledged(signed) => Said::Acknowledged(signed.verify(fabric)?),
        Message::Objected(signed) => Said::Objected(signed.verify(fabric)?),
        Message::Terminated(signed) => Said::Terminated(signed.verify(fabric)?),
        Message::Conduct(proofs, lifted) => Said::Conduct(
            proofs.iter().filter_map(|proof| proof.check(fabric).ok()).collect(),
            lifted.iter().map(|signed| signed.verify(fabric)).collect::<Result<_, _>>()?,
        ),
        Message::Inquire(lease) => Said::Inquire(*lease),
        Message::Done => Said::Done,
    })
}

/// Checks a record's signature and, in a host record, the certificate's.
///
/// # Errors
/// When one does not hold, or a known kind breaks its rules.
pub fn verify_record(signed: &Signed, fabric: &FabricId) -> Result<RecordSaid, VerifyError> {
    record(signed, fabric, &mut Papers::default())
}

fn record(
    signed: &Signed,
    fabric: &FabricId,
    papers: &mut Papers,
) -> Result<RecordSaid, VerifyError> {
    match signed.header()?.kind {
        Kind::HostRecord => {
            let record: Verified<HostRecord> = signed.verify(fabric)?;
            let certificate = record.body().certificate.verify_among(fabric, papers)?;
            Ok(RecordSaid::Host(record, certificate))
        }
        Kind::Offer => signed.verify(fabric).map(RecordSaid::Offer),
        Kind::Payloads => signed.verify(fabric).map(RecordSaid::Payloads),
        Kind::Unknown(_) => signed.verify_opaque(fabric).map(RecordSaid::Unread),
        got => Err(VerifyError::Kind { expected: Kind::Offer, got }),
    }
}

/// Checks an order's signature and those of the papers inside it.
///
/// # Errors
/// When one does not hold, or the signer is neither the delegate nor the lessee.
pub fn verify_order(signed: &Signed, fabric: &FabricId) -> Result<OrderPapers, VerifyError> {
    order(signed, fabric, &mut Papers::default())
}

fn order(
    signed: &Signed,
    fabric: &FabricId,
    papers: &mut Papers,
) -> Result<OrderPapers, VerifyError> {
    let order: Verified<Order> = signed.verify(fabric)?;
    let (mandate, certificate) = match &order.body().authority {
        Authority::Mandate(mandate) => {
            let mandate: Verified<Mandate> = mandate.verify_among(fabric, papers)?;
            let certificate = mandate.body().certificate.verify_among(fabric, papers)?;
            (Some(mandate), certificate)
        }
        Authority::Lessee(certificate) => (None, certificate.verify_among(fabric, papers)?),
    };
    Ok(OrderPapers { order, mandate, certificate })
}

/// Checks a grant's signature and that of the lessor's certificate inside it.
///
/// # Errors
/// When one does not hold.
pub fn verify_grant(signed: &Signed, fabric: &FabricId) -> Result<GrantPapers, VerifyError> {
    grant(signed, fabric, &mut Papers::default())
}

fn grant(
    signed: &Signed,
    fabric: &FabricId,
    papers: &mut Papers,
) -> Result<GrantPapers, VerifyError> {
    let grant: Verified<Grant> = signed.verify(fabric)?;
    let certificate = grant.body().certificate.verify_among(fabric, papers)?;
    Ok(GrantPapers { grant, certificate })
}
