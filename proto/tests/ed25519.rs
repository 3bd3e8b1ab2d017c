//! What counts as an Ed25519 signature here, pinned by public vectors and edge cases, so that no
//! update of a library changes it unseen.
//!
//! The rule is dalek's `verify_strict`: cofactorless, S < L, and neither the key nor R of small
//! order. Of the twelve vectors of Chalkias, Garillot and Nikolaenko, "Taming the many EdDSAs"
//! (SSR 2020, <https://eprint.iacr.org/2020/1244>, `golden/ed25519-speccheck.txt`) it accepts one.
//! Their messages are fixed, and what is signed here is a text of our own, so each case is also
//! built anew for that text and put through [`Signed::verify`] and [`verify_packet`]: small-order
//! keys and R, S + L, mixed order, encodings that are not canonical.

use curve25519_dalek::constants::{ED25519_BASEPOINT_POINT, EIGHT_TORSION};
use curve25519_dalek::edwards::{CompressedEdwardsY, EdwardsPoint};
use curve25519_dalek::scalar::Scalar;
use curve25519_dalek::traits::Identity;
use ed25519_dalek::{Verifier, VerifyingKey};
use leasehold_proto::words::contract::Acceptance;
use leasehold_proto::words::sign::{
    Draft, HeaderOf, Signature, Signed, Signer, VerifyError, is_usable, verify_packet,
};
use leasehold_proto::{FabricId, Hash, KeyId, LeaseId, RequestId, Wall};
use sha2::{Digest, Sha512};

const FABRIC: FabricId = FabricId(Hash([0xfa; 32]));
/// The order of the base point, little-endian: 2^252 + 27742317777372353535851937790883648493.
const L: [u8; 32] = [
    0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
];

fn bytes<const N: usize>(hex: &str) -> [u8; N] {
    let digits: Vec<u8> = hex
        .chars()
        .map(|digit| u8::try_from(digit.to_digit(16).expect("hex")).expect("a digit"))
        .collect();
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    bytes.try_into().expect("the right length")
}

fn anything(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| bytes::<1>(&hex[2 * i..2 * i + 2])[0]).collect()
}

/// One case of a file of vectors: blank lines between cases, `name value` lines, a value that is
/// continued has its name again.
struct Case(Vec<(&'static str, String)>);

impl Case {
    fn all(text: &'static str) -> Vec<Self> {
        text.split("\n\n").map(Self::new).filter(|case| !case.0.is_empty()).collect()
    }

    fn new(text: &'static str) -> Self {
        let mut fields: Vec<(&str, String)> = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.split_once(' ').expect("a name and a value");
            match fields.last_mut() {
                Some((last, so_far)) if *last == name => so_far.push_str(value),
                _ => fields.push((name, value.to_string())),
            }
        }
        Self(fields)
    }

    fn get(&self, name: &str) -> &str {
        &self.0.iter().find(|(given, _)| *given == name).expect("it is there").1
    }

    fn signature(&self) -> ed25519_dalek::Signature {
        ed25519_dalek::Signature::from_bytes(&bytes(self.get("signature")))
    }

    fn message(&self) -> Vec<u8> {
        anything(self.get("message"))
    }
}

#[test]
fn the_vectors_of_rfc_8032_hold() {
    let cases = Case::all(include_str!("golden/ed25519-rfc8032.txt"));
    assert_eq!(cases.len(), 3);
    for case in cases {
        let signer = Signer::from_seed(&bytes(case.get("seed")));
        assert_eq!(signer.id(), KeyId(bytes(case.get("key"))));
        assert!(is_usable(&signer.id()));
        let key = VerifyingKey::from_bytes(&signer.id().0).expect("a key");
        assert!(key.verify_strict(&case.message(), &case.signature()).is_ok());
        // The same key over our own text: deterministic, as the RFC has it, and it holds.
        let (text, ours) = (packet_text(b"x"), signer.sign_packet(&FABRIC, b"x"));
        assert_eq!(verify_packet(&FABRIC, &signer.id(), b"x", &ours), Ok(()));
        let ours = ed25519_dalek::Signature::from_bytes(&ours.0);
        assert!(key.verify_strict(&text, &ours).is_ok());
    }
}

#[test]
fn the_vectors_of_taming_the_many_eddsas_are_judged_strictly() {
    let cases = Case::all(include_str!("golden/ed25519-speccheck.txt"));
    assert_eq!(cases.len(), 12);
    let mut lax = 0;
    for (number, case) in cases.iter().enumerate() {
        let (message, signature) = (case.message(), case.signature());
        let key = VerifyingKey::from_bytes(&bytes(case.get("key")));
        let holds = key.as_ref().is_ok_and(|key| key.verify_strict(&message, &signature).is_ok());
        assert_eq!(holds, case.get("strict") == "accepts", "vector {number}");
        lax += usize::from(key.is_ok_and(|key| key.verify(&message, &signature).is_ok()));
        // None of them is a signature over anything of ours.
        let (key, signature) = (KeyId(bytes(case.get("key"))), Signature(signature.to_bytes()));
        assert!(verify_packet(&FABRIC, &key, &message, &signature).is_err());
    }
    assert!(lax > 1, "a laxer rule would be noticed: plain `verify` takes {lax}");
}

fn length_prefixed(parts: &[&[u8]]) -> Vec<u8> {
    let mut text = Vec::new();
    for part in parts {
        text.extend_from_slice(&(part.len() as u64).to_le_bytes());
        text.extend_from_slice(part);
    }
    text
}

/// What is signed for a packet, written down a second time.
fn packet_text(packet: &[u8]) -> Vec<u8> {
    length_prefixed(&[b"leasehold/packet/v1", &FABRIC.0.0, packet])
}

/// What is signed for an object, written down a second time.
fn object_text(envelope: &[u8]) -> Vec<u8> {
    let id = blake3::hash(envelope);
    length_prefixed(&[b"leasehold/v1", b"acceptance", &FABRIC.0.0, id.as_bytes()])
}

fn draft(signer: KeyId, seq: u64) -> Draft {
    let (fabric, subject, not_after) = (FABRIC, Hash([5; 32]), Wall(1));
    let header = HeaderOf { fabric, signer, subject, epoch: 1, seq, not_after };
    let act = RequestId([2; 16]);
    let body = Acceptance { lease: LeaseId(Hash([3; 32])), act, of: Hash([4; 32]) };
    Draft::new(header, &body).expect("it fits")
}

#[test]
fn the_signed_text_is_what_its_head_says() {
    let seed = [7; 32];
    let (ours, theirs) = (Signer::from_seed(&seed), ed25519_dalek::SigningKey::from_bytes(&seed));
    let draft = draft(ours.id(), 0);
    let signed = ours.sign(&draft).expect("signed");
    let expected = ed25519_dalek::Signer::sign(&theirs, &object_text(&draft.envelope));
    assert_eq!(signed.signature.0, expected.to_bytes());
    assert!(signed.verify::<Acceptance>(&FABRIC).is_ok());
    let packet = ed25519_dalek::Signer::sign(&theirs, &packet_text(b"p"));
    assert_eq!(ours.sign_packet(&FABRIC, b"p").0, packet.to_bytes());
    let other = Signer::from_seed(&[8; 32]);
    assert!(other.sign(&draft).is_err(), "nobody signs in another's name");
}

/// One way to make a signature with more than a secret key: for a given text, a key and a
/// signature over it.
trait Forge {
    fn key(&self) -> [u8; 32];
    fn sign(&self, text: &[u8]) -> Signature;
}

fn challenge(r: &[u8; 32], key: &[u8; 32], text: &[u8]) -> Scalar {
    let hash = Sha512::new().chain_update(r).chain_update(key).chain_update(text).finalize();
    let mut wide = [0; 64];
    wide.copy_from_slice(&hash);
    Scalar::from_bytes_mod_order_wide(&wide)
}

fn joined(r: &[u8; 32], s: &[u8; 32]) -> Signature {
    let mut signature = [0; 64];
    signature[..32].copy_from_slice(r);
    signature[32..].copy_from_slice(s);
    Signature(signature)
}

/// A signature with secret scalar `a` and nonce `r`, key and R each with a torsion point added,
/// and the encodings of both chosen apart from what they encode.
struct Crafted {
    a: Scalar,
    key_torsion: EdwardsPoint,
    key_encoding: Option<[u8; 32]>,
    r: Scalar,
    r_torsion: EdwardsPoint,
    r_encoding: Option<[u8; 32]>,
    add_l: bool,
}

impl Default for Crafted {
    fn default() -> Self {
        Self {
            a: Scalar::from(123_456_789u64),
            key_torsion: EdwardsPoint::identity(),
            key_encoding: None,
            r: Scalar::from(987_654_321u64),
            r_torsion: EdwardsPoint::identity(),
            r_encoding: None,
            add_l: false,
        }
    }
}

impl Forge for Crafted {
    fn key(&self) -> [u8; 32] {
        let point = ED25519_BASEPOINT_POINT * self.a + self.key_torsion;
        self.key_encoding.unwrap_or(point.compress().0)
    }

    fn sign(&self, text: &[u8]) -> Signature {
        let point = ED25519_BASEPOINT_POINT * self.r + self.r_torsion;
        let r = self.r_encoding.unwrap_or(point.compress().0);
        let s = (self.r + challenge(&r, &self.key(), text) * self.a).to_bytes();
        joined(&r, &if self.add_l { plus(&s, &L) } else { s })
    }
}

fn plus(a: &[u8; 32], b: &[u8; 32]) -> [u8; 32] {
    let mut carry = 0u16;
    let mut sum = [0; 32];
    for ((out, a), b) in sum.iter_mut().zip(a).zip(b) {
        carry += u16::from(*a) + u16::from(*b);
        *out = carry.to_le_bytes()[0];
        carry >>= 8;
    }
    assert_eq!(carry, 0, "S + L fits 256 bits");
    sum
}

/// Of 64 objects and of 64 packets signed by `forge`: how many our functions accept.
fn accepted(forge: &dyn Forge) -> [usize; 2] {
    let key = KeyId(forge.key());
    let holds = |result: Result<(), VerifyError>| match result {
        Ok(()) => true,
        Err(VerifyError::Signature | VerifyError::Key) => false,
        Err(other) => panic!("{other}"),
    };
    let objects = (0..64).filter(|seq| {
        let Draft { envelope } = draft(key, *seq);
        let signature = forge.sign(&object_text(&envelope));
        holds(Signed { envelope, signature }.verify::<Acceptance>(&FABRIC).map(|_| ()))
    });
    let packets = (0..64u64).filter(|number| {
        let packet = number.to_le_bytes();
        let signature = forge.sign(&packet_text(&packet));
        holds(verify_packet(&FABRIC, &key, &packet, &signature))
    });
    [objects.count(), packets.count()]
}

/// Of the same 64 objects: how many a lax verifier would accept.
fn accepted_laxly(forge: &dyn Forge) -> usize {
    let key = VerifyingKey::from_bytes(&forge.key());
    (0..64)
        .filter(|seq| {
            let text = object_text(&draft(KeyId(forge.key()), *seq).envelope);
            let signature = ed25519_dalek::Signature::from_bytes(&forge.sign(&text).0);
            key.as_ref().is_ok_and(|key| key.verify(&text, &signature).is_ok())
        })
        .count()
}

#[test]
fn an_honest_signature_made_by_hand_is_accepted() {
    assert_eq!(accepted(&Crafted::default()), [64, 64]);
}

#[test]
fn s_plus_l_is_refused() {
    // The same signature in a second form: accepted, it would be malleable.
    assert_eq!(accepted(&Crafted { add_l: true, ..Crafted::default() }), [0, 0]);
}

#[test]
fn keys_of_small_order_sign_nothing() {
    let mut lax = 0;
    for key_torsion in EIGHT_TORSION {
        // With a = 0 the key is the torsion point alone: anyone can "sign" for it.
        let forge = Crafted { a: Scalar::ZERO, key_torsion, ..Crafted::default() };
        assert!(!is_usable(&KeyId(forge.key())));
        assert_eq!(accepted(&forge), [0, 0]);
        lax += accepted_laxly(&forge);
    }
    assert!(lax >= 64, "the forgery is one that a lax verifier takes: {lax}");
}

#[test]
fn small_order_r_is_refused() {
    let mut lax = 0;
    for r_torsion in EIGHT_TORSION {
        let forge = Crafted { r: Scalar::ZERO, r_torsion, ..Crafted::default() };
        assert_eq!(accepted(&forge), [0, 0]);
        lax += accepted_laxly(&forge);
    }
    assert_eq!(lax, 64, "with R the identity, a lax verifier takes each");
}

#[test]
fn keys_of_mixed_order_count_only_where_the_equation_holds_without_cofactor() {
    // A = aB + T: the equation holds only when k·T vanishes, for T of order 8 one time in eight.
    let forge = Crafted { key_torsion: EIGHT_TORSION[1], ..Crafted::default() };
    let [objects, packets] = accepted(&forge);
    assert!((1..=20).contains(&objects), "about an eighth of 64: {objects}");
    assert!((1..=20).contains(&packets), "about an eighth of 64: {packets}");
    assert_eq!(objects, accepted_laxly(&forge));
}

#[test]
fn r_of_mixed_order_is_refused_with_a_key_of_prime_order() {
    // A cofactored verifier would accept each of these.
    for r_torsion in &EIGHT_TORSION[1..] {
        let forge = Crafted { r_torsion: *r_torsion, ..Crafted::default() };
        assert_eq!(accepted(&forge), [0, 0]);
    }
}

/// The encodings of small-order points with y not below p = 2^255 - 19, or with the sign bit of a
/// zero x: what they decode to can be written otherwise.
fn not_canonical() -> Vec<[u8; 32]> {
    let p_plus = |n: u8, sign: u8| {
        let mut encoding = [0xff; 32];
        encoding[0] = 0xed + n;
        encoding[31] = 0x7f | sign;
        encoding
    };
    let with_sign = |mut encoding: [u8; 32]| {
        encoding[31] |= 0x80;
        encoding
    };
    let one = EdwardsPoint::identity().compress().0;
    let minus_one = EIGHT_TORSION[4].compress().0;
    vec![
        p_plus(0, 0),
        p_plus(0, 0x80),
        p_plus(1, 0),
        p_plus(1, 0x80),
        with_sign(one),
        with_sign(minus_one),
    ]
}

#[test]
fn encodings_that_are_not_canonical_are_refused() {
    for encoding in not_canonical() {
        let key = KeyId(encoding);
        assert!(!is_usable(&key), "{encoding:02x?}");
        let forge = Crafted { a: Scalar::ZERO, key_encoding: Some(encoding), ..Crafted::default() };
        assert_eq!(accepted(&forge), [0, 0], "as a key: {encoding:02x?}");
        let forge = Crafted { r: Scalar::ZERO, r_encoding: Some(encoding), ..Crafted::default() };
        assert_eq!(accepted(&forge), [0, 0], "as R: {encoding:02x?}");
    }
}

#[test]
fn what_is_no_point_is_no_key() {
    // y = 2 is not on the curve.
    let mut encoding = [0; 32];
    encoding[0] = 2;
    assert!(CompressedEdwardsY(encoding).decompress().is_none());
    assert!(!is_usable(&KeyId(encoding)));
    let Draft { envelope } = draft(KeyId(encoding), 0);
    let signed = Signed { envelope, signature: Signature([0; 64]) };
    assert_eq!(signed.verify::<Acceptance>(&FABRIC).err(), Some(VerifyError::Key));
}
