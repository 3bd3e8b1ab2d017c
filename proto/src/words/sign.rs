//! Signatures: the only place that makes or checks one, and the only maker of [`Verified`].
//!
//! What is signed is a short domain-separated, length-prefixed text over the hash of the exact
//! bytes that travel (after DSSE's pre-authentication encoding):
//!
//! ```text
//! lp("leasehold/v1") lp(kind name) lp(fabric id) lp(blake3(envelope))     lp(x) = len as u64 LE, x
//! ```
//!
//! Verification is over what was received, then decoding; an object's identity is the hash of its
//! envelope and never includes the signature, so a malleable signature changes no identity.
//! Ed25519 is checked by `verify_strict` only (it refuses small-order points and non-canonical
//! scalars); `tests/ed25519.rs` pins that with the public edge cases.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::object::{Body, Envelope, Header, Kind};
use super::wire::{self, DecodeError, MAX_OBJECT};
use crate::base::id::{FabricId, Hash, KeyId};
use crate::base::time::Wall;

/// The domain that separates these signatures from any other use of the same key.
const DOMAIN: &[u8] = b"leasehold/v1";
/// The domain of liveness packets, which are signed as a whole.
const PACKET_DOMAIN: &[u8] = b"leasehold/packet/v1";

/// An Ed25519 signature.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signature(pub [u8; 64]);

/// A signed object as it travels: the exact envelope bytes and the signature over them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Signed {
    /// The encoded envelope, shared by all who hold it.
    #[serde(with = "wire::octets")]
    pub envelope: Arc<[u8]>,
    /// The signer's signature.
    pub signature: Signature,
}

/// An object that a mind has decided on and that the shell signs once it is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    /// The encoded envelope, shared by all who hold it.
    #[serde(with = "wire::octets")]
    pub envelope: Arc<[u8]>,
}

/// An object whose signature holds. Whether its signer is admitted is judged in the core.
pub struct Verified<T> {
    inner: Arc<Inner<T>>,
}

struct Inner<T> {
    header: Header,
    body: T,
    id: Hash,
    signed: Signed,
}

/// Why a signed object is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The envelope or body does not decode.
    #[error("not a signed object: {0}")]
    Decode(#[from] DecodeError),
    /// Another kind of object than expected.
    #[error("expected a signed {expected}, this is a {got}")]
    Kind {
        /// The kind that was expected.
        expected: Kind,
        /// The kind that was found.
        got: Kind,
    },
    /// The object belongs to another fabric.
    #[error("it belongs to fabric {got}, not to {expected}")]
    Fabric {
        /// This fabric.
        expected: FabricId,
        /// The object's.
        got: FabricId,
    },
    /// An extension that must be understood is not.
    #[error("it carries a critical extension ({0}) that this version does not know")]
    Extension(u16),
    /// A version of this kind that is not known here.
    #[error("version {0} of this kind of object is not known here")]
    Version(u16),
    /// The key bytes are no usable Ed25519 key.
    #[error("the signer's key is not a usable Ed25519 key")]
    Key,
    /// The signature does not hold.
    #[error("the signature does not hold: the bytes were changed or another key signed them")]
    Signature,
}

/// Holds a secret key and signs with it. The secret leaves memory when this is dropped.
pub struct Signer {
    key: SigningKey,
}

impl Signer {
    /// A signer from the 32-byte seed of an Ed25519 key (RFC 8032 §5.1.5).
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self { key: SigningKey::from_bytes(seed) }
    }

    /// The public half.
    #[must_use]
    pub fn id(&self) -> KeyId {
        KeyId(self.key.verifying_key().to_bytes())
    }

    /// Signs `draft`. Deterministic: the same draft gives the same bytes.
    ///
    /// # Errors
    /// When the draft does not decode or names another signer: such a signature would never
    /// verify.
    pub fn sign(&self, draft: &Draft) -> Result<Signed, VerifyError> {
        let header = Envelope::decode(&draft.envelope)?.header;
        if header.signer != self.id() {
            return Err(VerifyError::Key);
        }
        let text = signed_text(&header, &Hash::of(&draft.envelope));
        let signature = Signature(self.key.sign(&text).to_bytes());
        Ok(Signed { envelope: draft.envelope.clone(), signature })
    }

    /// Signs a liveness packet.
    #[must_use]
    pub fn sign_packet(&self, fabric: &FabricId, packet: &[u8]) -> Signature {
        Signature(self.key.sign(&packet_text(fabric, packet)).to_bytes())
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.id())
    }
}

fn length_prefixed(parts: &[&[u8]]) -> Vec<u8> {
    let mut text = Vec::with_capacity(parts.iter().map(|part| part.len() + 8).sum());
    for part in parts {
        text.extend_from_slice(&(part.len() as u64).to_le_bytes());
        text.extend_from_slice(part);
    }
    text
}

fn signed_text(header: &Header, id: &Hash) -> Vec<u8> {
    let kind = header.kind.name();
    length_prefixed(&[DOMAIN, kind.as_bytes(), &header.fabric.0.0, &id.0])
}

fn packet_text(fabric: &FabricId, packet: &[u8]) -> Vec<u8> {
    length_prefixed(&[PACKET_DOMAIN, &fabric.0.0, packet])
}

fn check(signer: &KeyId, text: &[u8], signature: &Signature) -> Result<(), VerifyError> {
    let key = VerifyingKey::from_bytes(&signer.0).map_err(|_| VerifyError::Key)?;
    let signature = ed25519_dalek::Signature::from_bytes(&signature.0);
    key.verify_strict(text, &signature).map_err(|_| VerifyError::Signature)
}

/// Whether `signature` is `signer`'s over a liveness packet of `fabric`.
///
/// # Errors
/// When the key is unusable or the signature does not hold.
pub fn verify_packet(
    fabric: &FabricId,
    signer: &KeyId,
    packet: &[u8],
    signature: &Signature,
) -> Result<(), VerifyError> {
    check(signer, &packet_text(fabric, packet), signature)
}

/// Whether `key` may be given out or admitted: a valid point that is not of small order.
#[must_use]
pub fn is_usable(key: &KeyId) -> bool {
    VerifyingKey::from_bytes(&key.0).is_ok_and(|key| !key.is_weak())
}

/// Papers whose signature was checked before: certificates and mandates come with every order and
/// grant, byte for byte the same. Holds at most two times [`Papers::MOST`] hashes.
#[derive(Debug, Default)]
pub struct Papers {
    recent: BTreeSet<Hash>,
    before: BTreeSet<Hash>,
}

impl Papers {
    /// After so many new papers, those that were not seen since are forgotten.
    pub const MOST: usize = 2_048;

    /// The exact bytes, signature included: what was changed by one bit is checked again.
    fn name(id: &Hash, signature: &Signature) -> Hash {
        let mut bytes = [0; 96];
        let (first, second) = bytes.split_at_mut(32);
        first.copy_from_slice(&id.0);
        second.copy_from_slice(&signature.0);
        Hash::of(&bytes)
    }

    fn hold(&mut self, name: Hash) {
        if self.recent.len() >= Self::MOST {
            self.before = std::mem::take(&mut self.recent);
        }
        self.recent.insert(name);
    }

    fn knows(&mut self, name: &Hash) -> bool {
        if self.recent.contains(name) {
            return true;
        }
        let known = self.before.contains(name);
        if known {
            self.hold(*name);
        }
        known
    }
}

impl Draft {
    /// Puts `body` into an envelope.
    ///
    /// # Errors
    /// When it is longer than its kind may be.
    pub fn new<T: Body>(header: HeaderOf, body: &T) -> Result<Self, wire::EncodeError> {
        let body = wire::encode::<MAX_OBJECT>(body)?;
        let envelope = Envelope { header: header.of_kind(T::KIND), extensions: Vec::new(), body };
        let envelope = wire::encode::<MAX_OBJECT>(&envelope)?;
        let (got, limit) = (envelope.len(), T::KIND.max_len());
        if got > limit {
            return Err(wire::EncodeError { limit, why: format!("it takes {got}") });
        }
        Ok(Self { envelope: envelope.into() })
    }

    /// The object's identity.
    #[must_use]
    pub fn id(&self) -> Hash {
        Hash::of(&self.envelope)
    }
}

/// Everything in a header but the kind, which the body's type decides.
#[derive(Clone, Copy, Debug)]
pub struct HeaderOf {
    /// The fabric it belongs to.
    pub fabric: FabricId,
    /// Who will sign it.
    pub signer: KeyId,
    /// What it is about.
    pub subject: Hash,
    /// The signer's epoch.
    pub epoch: u64,
    /// The number within (kind, subject, epoch).
    pub seq: u64,
    /// When it ceases to be valid.
    pub not_after: Wall,
}

impl From<&Header> for HeaderOf {
    fn from(of: &Header) -> Self {
        let Header { fabric, signer, subject, epoch, seq, not_after, .. } = *of;
        Self { fabric, signer, subject, epoch, seq, not_after }
    }
}

impl HeaderOf {
    const fn of_kind(self, kind: Kind) -> Header {
        let Self { fabric, signer, subject, epoch, seq, not_after } = self;
        Header { kind, version: 1, fabric, signer, subject, epoch, seq, not_after }
    }
}

/// Who signs, for which fabric, in which life.
#[derive(Clone, Debug)]
pub struct Hand {
    /// The fabric.
    pub fabric: FabricId,
    /// This node.
    pub me: KeyId,
    /// Its epoch.
    pub epoch: u64,
}

impl Hand {
    /// A draft of `body` about `subject`.
    ///
    /// # Errors
    /// When the body does not fit an envelope.
    pub fn draft<T: Body>(
        &self,
        subject: Hash,
        seq: u64,
        not_after: Wall,
        body: &T,
    ) -> Result<Draft, wire::EncodeError> {
        let Self { fabric, me, epoch } = self.clone();
        Draft::new(HeaderOf { fabric, signer: me, subject, epoch, seq, not_after }, body)
    }
}

/// An envelope whose signature holds.
struct Opened {
    header: Header,
    id: Hash,
    body: Vec<u8>,
}

impl Signed {
    /// The object's identity: the hash of the envelope, without the signature.
    #[must_use]
    pub fn id(&self) -> Hash {
        Hash::of(&self.envelope)
    }

    /// Reads the header without checking anything but its form.
    ///
    /// # Errors
    /// When the envelope does not decode.
    pub fn header(&self) -> Result<Header, DecodeError> {
        Envelope::decode(&self.envelope).map(|envelope| envelope.header)
    }

    /// Checks the signature and decodes the body of a known kind.
    ///
    /// # Errors
    /// Says what does not hold; nothing of the object may be believed then.
    pub fn verify<T: Body>(&self, fabric: &FabricId) -> Result<Verified<T>, VerifyError> {
        let opened = self.open(fabric, None)?;
        self.read(opened)
    }

    /// The same for what comes again and again: of bytes that held before, the signature is not
    /// checked again.
    ///
    /// # Errors
    /// As for [`Signed::verify`].
    pub fn verify_among<T: Body>(
        &self,
        fabric: &FabricId,
        papers: &mut Papers,
    ) -> Result<Verified<T>, VerifyError> {
        let opened = self.open(fabric, Some(papers))?;
        self.read(opened)
    }

    fn read<T: Body>(
        &self,
        Opened { header, id, body }: Opened,
    ) -> Result<Verified<T>, VerifyError> {
        if header.kind != T::KIND {
            return Err(VerifyError::Kind { expected: T::KIND, got: header.kind });
        }
        if header.version != 1 {
            return Err(VerifyError::Version(header.version));
        }
        let body: T = wire::decode::<MAX_OBJECT, T>(&body)?;
        body.validate().map_err(|why| VerifyError::Decode(DecodeError::Invalid(why)))?;
        Ok(self.verified(header, id, body))
    }

    /// Checks the signature of an object whose kind may be unknown here, and gives its raw body.
    ///
    /// # Errors
    /// As for [`Signed::verify`], except that any kind and version is taken.
    pub fn verify_opaque(&self, fabric: &FabricId) -> Result<Verified<Vec<u8>>, VerifyError> {
        let Opened { header, id, body } = self.open(fabric, None)?;
        Ok(self.verified(header, id, body))
    }

    /// Checks the signature of an object of any fabric: for charters, which found one, and for
    /// the offline tool, which reads the fabric from the charter beside it.
    ///
    /// # Errors
    /// As for [`Signed::verify`], except that any fabric is taken.
    pub fn verify_anywhere<T: Body>(&self) -> Result<Verified<T>, VerifyError> {
        let header = self.header()?;
        self.verify(&header.fabric)
    }

    fn open(&self, fabric: &FabricId, papers: Option<&mut Papers>) -> Result<Opened, VerifyError> {
        let envelope = Envelope::decode(&self.envelope)?;
        let header = envelope.header;
        if *fabric != header.fabric {
            return Err(VerifyError::Fabric { expected: *fabric, got: header.fabric });
        }
        if let Some(extension) = envelope.extensions.iter().find(|ext| ext.critical) {
            return Err(VerifyError::Extension(extension.tag));
        }
        let id = self.id();
        let text = signed_text(&header, &id);
        match papers {
            None => check(&header.signer, &text, &self.signature)?,
            Some(papers) => {
                let name = Papers::name(&id, &self.signature);
                if !papers.knows(&name) {
                    check(&header.signer, &text, &self.signature)?;
                    papers.hold(name);
                }
            }
        }
        Ok(Opened { header, id, body: envelope.body })
    }

    fn verified<T>(&self, header: Header, id: Hash, body: T) -> Verified<T> {
        Verified { inner: Arc::new(Inner { header, body, id, signed: self.clone() }) }
    }
}

impl<T> Verified<T> {
    /// Kind, signer, subject, epoch, seq and validity.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.inner.header
    }

    /// What was said.
    #[must_use]
    pub fn body(&self) -> &T {
        &self.inner.body
    }

    /// The object's identity.
    #[must_use]
    pub fn id(&self) -> Hash {
        self.inner.id
    }

    /// Who said it.
    #[must_use]
    pub fn signer(&self) -> KeyId {
        self.inner.header.signer
    }

    /// The bytes as they travelled.
    #[must_use]
    pub fn signed(&self) -> &Signed {
        &self.inner.signed
    }
}

impl<T> Clone for Verified<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<T: fmt::Debug> fmt::Debug for Verified<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verified")
            .field("id", &self.inner.id)
            .field("header", &self.inner.header)
            .field("body", &self.inner.body)
            .finish()
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({}…)", Hash::of(&self.0).short())
    }
}

impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let half = |range: std::ops::Range<usize>| {
            let mut bytes = [0u8; 32];
            bytes.copy_from_slice(&self.0[range]);
            Hash(bytes)
        };
        let (r, s) = (half(0..32), half(32..64));
        if serializer.is_human_readable() {
            serializer.collect_str(&format_args!("{r}{s}"))
        } else {
            (r, s).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (r, s): (Hash, Hash) = if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            let halves = text.get(..64).zip(text.get(64..));
            let (r, s) =
                halves.ok_or_else(|| de::Error::custom("a signature is 128 hex digits"))?;
            (r.parse().map_err(de::Error::custom)?, s.parse().map_err(de::Error::custom)?)
        } else {
            Deserialize::deserialize(deserializer)?
        };
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&r.0);
        bytes[32..].copy_from_slice(&s.0);
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::{LeaseId, RequestId};
    use crate::words::contract::Acceptance;

    const FABRIC: FabricId = FabricId(Hash([7; 32]));

    fn signed(act: u8) -> Signed {
        let signer = Signer::from_seed(&[1; 32]);
        let hand = Hand { fabric: FABRIC, me: signer.id(), epoch: 1 };
        let (lease, of) = (LeaseId(Hash([2; 32])), Hash([4; 32]));
        let body = Acceptance { lease, act: RequestId([act; 16]), of };
        let draft = hand.draft(Hash([3; 32]), 0, Wall(u64::MAX), &body).expect("fits");
        signer.sign(&draft).expect("signs")
    }

    #[test]
    fn papers_that_are_known_are_known_to_the_bit() {
        let mut papers = Papers::default();
        let sound = signed(1);
        let verify = |signed: &Signed, papers: &mut Papers| {
            signed.verify_among::<Acceptance>(&FABRIC, papers).map(|verified| verified.id())
        };
        for _ in 0..2 {
            assert_eq!(verify(&sound, &mut papers), Ok(sound.id()));
        }
        let mut forged = sound.clone();
        forged.signature.0[5] ^= 1;
        assert_eq!(verify(&forged, &mut papers), Err(VerifyError::Signature));
        let mut changed = sound.clone();
        let last = changed.envelope.len() - 1;
        Arc::make_mut(&mut changed.envelope)[last] ^= 1;
        assert_eq!(verify(&changed, &mut papers), Err(VerifyError::Signature));
        let other = FabricId(Hash([8; 32]));
        let elsewhere = sound.verify_among::<Acceptance>(&other, &mut papers);
        assert!(matches!(elsewhere, Err(VerifyError::Fabric { .. })));
        // What did not hold is not remembered as if it had.
        assert_eq!(verify(&forged, &mut papers), Err(VerifyError::Signature));
    }

    #[test]
    fn papers_forget_what_is_not_seen_again() {
        let mut papers = Papers::default();
        let name = |n: usize| Hash::of(&n.to_le_bytes());
        papers.hold(name(0));
        for n in 1..10 * Papers::MOST {
            papers.hold(name(n));
            // The first one is in use all the time.
            assert!(papers.knows(&name(0)));
            assert!(papers.recent.len() + papers.before.len() <= 2 * Papers::MOST);
        }
        assert!(!papers.knows(&name(1)));
    }
}
