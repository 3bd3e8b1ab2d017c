//! The bytes on the wire, pinned: one object of every kind, one message of every sort, a proof and
//! a liveness packet's signature, all with fixed seeds, against the hex files in `golden/`. A
//! change there is a change of the protocol.
//!
//! `LEASEHOLD_GOLDEN=write cargo test -p leasehold-proto --test wire` writes the files anew.

#[path = "common/story.rs"]
mod story;

use std::fmt::Write as _;
use std::path::PathBuf;

use leasehold_proto::proof::{self, Proof};
use leasehold_proto::words::index::{Index, IndexedFile};
use leasehold_proto::words::message::{self, BUCKETS, MAX_NAMES, MAX_RECORDS, Message, RecordName};
use leasehold_proto::words::object::{Envelope, Extension, Kind, Object, draft_json};
use leasehold_proto::words::sign::{Draft, Signature, Signed, Signer, VerifyError, verify_packet};
use leasehold_proto::words::wire::{self, DecodeError, MAX_MESSAGE, MAX_OBJECT};
use leasehold_proto::{FabricId, Hash, KeyId, Payload};
use proptest::prelude::*;
use story::Story;

/// Room for an envelope, its length and a signature.
const MAX_SIGNED: usize = MAX_OBJECT + 72;
const MAX_PROOF: usize = 1 << 20;

fn bytes_of(signed: &Signed) -> Vec<u8> {
    wire::encode::<MAX_SIGNED>(signed).expect("it fits")
}

/// Compares `bytes` with the golden file `name`, or writes it.
fn golden(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.hex"));
    let mut hex = String::new();
    for line in bytes.chunks(32) {
        for byte in line {
            write!(hex, "{byte:02x}").expect("a string");
        }
        hex.push('\n');
    }
    if std::env::var_os("LEASEHOLD_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, &hex).expect("written");
    }
    let pinned = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(pinned, hex, "{name} is encoded differently than in {}", path.display());
}

#[test]
fn signed_objects_are_encoded_as_ever() {
    for (name, signed) in Story::new().objects() {
        let bytes = bytes_of(&signed);
        golden(&name, &bytes);
        assert_eq!(wire::decode::<MAX_SIGNED, Signed>(&bytes), Ok(signed.clone()));
        let object = Object::verify(&signed).expect("it verifies");
        assert_eq!((object.header().kind.name(), object.id()), (name.into(), signed.id()));
    }
}

#[test]
fn no_kind_is_forgotten() {
    let kinds: Vec<u16> = Story::new()
        .objects()
        .iter()
        .map(|(_, signed)| signed.header().expect("an envelope").kind.number())
        .collect();
    for number in 0..1000 {
        let known = !matches!(Kind::from_number(number), Kind::Unknown(_));
        assert_eq!(kinds.contains(&number), known, "kind {number}");
    }
}

#[test]
fn messages_are_encoded_as_ever() {
    for (number, (name, message)) in (0u32..).zip(Story::new().messages()) {
        let bytes = message::encode(&message).expect("it fits");
        golden(&format!("message-{name}"), &bytes);
        assert_eq!(bytes[..4], number.to_le_bytes(), "{name} keeps its number");
        assert_eq!(message::decode(&bytes), Ok(message));
    }
}

#[test]
fn a_proof_is_encoded_as_ever_and_holds() {
    let proof = Story::new().proof();
    let bytes = wire::encode::<MAX_PROOF>(&proof).expect("it fits");
    golden("proof", &bytes);
    let verdict = proof::check(&proof).expect("it holds");
    assert_eq!((verdict.receipts, verdict.acknowledged), (3, 3));
    assert_eq!(verdict.charge, verdict.acknowledged_charge);
    assert!(verdict.price_checked);
}

#[test]
fn a_packet_is_signed_as_ever() {
    let (signer, fabric) = (Signer::from_seed(&story::LESSOR), FabricId(Hash([9; 32])));
    let signature = signer.sign_packet(&fabric, b"a packet");
    golden("packet-signature", &signature.0);
    assert_eq!(verify_packet(&fabric, &signer.id(), b"a packet", &signature), Ok(()));
    let other = FabricId(Hash([8; 32]));
    assert!(verify_packet(&other, &signer.id(), b"a packet", &signature).is_err());
    assert!(verify_packet(&fabric, &signer.id(), b"a packes", &signature).is_err());
}

#[test]
fn an_index_is_encoded_as_ever() {
    let file = |path: &str, executable: bool, content: &[u8]| {
        let payload = Payload { root: Hash::of(content), size: content.len() as u64 };
        IndexedFile { path: path.into(), executable, payload }
    };
    let files =
        vec![file("bin/run", true, b"#!/bin/sh"), file("a", false, b""), file("b", false, b"")];
    let index = Index::new(files).expect("an index");
    golden("index", &index.to_bytes());
    assert_eq!(Index::from_bytes(&index.to_bytes()), Ok(index));
}

#[test]
fn the_layout_of_an_envelope_is_what_its_head_says() {
    let story = Story::new();
    let envelope = &story.grant.envelope;
    let header = story.grant.header().expect("an envelope");
    assert_eq!(envelope[0..2], 7u16.to_le_bytes(), "kind");
    assert_eq!(envelope[2..4], 1u16.to_le_bytes(), "version");
    assert_eq!(envelope[4..36], story.fabric.0.0, "fabric");
    assert_eq!(envelope[36..68], header.signer.0, "signer");
    assert_eq!(envelope[68..100], header.subject.0, "subject");
    assert_eq!(envelope[100..108], header.epoch.to_le_bytes(), "epoch");
    assert_eq!(envelope[108..116], header.seq.to_le_bytes(), "seq");
    assert_eq!(envelope[116..124], header.not_after.0.to_le_bytes(), "not after");
    assert_eq!(envelope[124..132], 0u64.to_le_bytes(), "no extensions");
    let body = (envelope.len() - 140) as u64;
    assert_eq!(envelope[132..140], body.to_le_bytes(), "the body's length");
}

#[test]
fn what_is_cut_or_continued_is_refused() {
    let story = Story::new();
    for (name, message) in story.messages() {
        let bytes = message::encode(&message).expect("it fits");
        for length in 0..bytes.len() {
            assert!(message::decode(&bytes[..length]).is_err(), "{name} cut at {length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(message::decode(&longer), Err(DecodeError::Trailing(1)), "{name}");
    }
    for (name, signed) in story.objects() {
        let Signed { envelope, signature } = signed;
        for length in 0..envelope.len() {
            let cut = Signed { envelope: envelope[..length].into(), signature };
            assert!(Object::verify(&cut).is_err(), "{name} cut at {length}");
            assert!(draft_json(&cut.envelope).is_err(), "{name} cut at {length}");
        }
        let longer = Signed { envelope: [&envelope[..], &[0]].concat().into(), signature };
        let trailing = VerifyError::Decode(DecodeError::Trailing(1));
        assert_eq!(Object::verify(&longer).err(), Some(trailing), "{name}");
    }
}

/// An envelope that is well formed and signed, but whose body goes on after its end, is refused
/// too: the signature alone does not make it acceptable.
#[test]
fn a_signed_body_with_a_trailing_byte_is_refused() {
    let story = Story::new();
    for (name, signed) in story.objects() {
        let mut envelope = Envelope::decode(&signed.envelope).expect("an envelope");
        let seed = [story::ORGANISATION, story::LESSOR, story::DELEGATE, story::TENANT]
            .into_iter()
            .find(|seed| Signer::from_seed(seed).id() == envelope.header.signer)
            .expect("one of the four");
        let resign = |envelope: &Envelope| {
            let envelope = wire::encode::<MAX_OBJECT>(envelope).expect("it fits");
            Signer::from_seed(&seed).sign(&Draft { envelope: envelope.into() }).expect("signed")
        };
        assert_eq!(resign(&envelope), signed, "{name}: signing is deterministic");
        envelope.body.push(0);
        let error = Object::verify(&resign(&envelope)).expect_err("refused");
        assert_eq!(error, VerifyError::Decode(DecodeError::Trailing(1)), "{name}");
        envelope.body.pop();
        envelope.header.version = 2;
        let error = Object::verify(&resign(&envelope)).expect_err("refused");
        assert_eq!(error, VerifyError::Version(2), "{name}");
        envelope.header.version = 1;
        let extension = |critical| Extension { tag: 5, critical, bytes: vec![1] };
        envelope.extensions = vec![extension(true)];
        let error = Object::verify(&resign(&envelope)).expect_err("refused");
        assert_eq!(error, VerifyError::Extension(5), "{name}");
        envelope.extensions = vec![extension(false); 8];
        assert!(Object::verify(&resign(&envelope)).is_ok(), "{name}: ignorable ones are");
        envelope.extensions = vec![extension(false); 9];
        let encoded = wire::encode::<MAX_OBJECT>(&envelope).expect("it fits");
        assert!(Envelope::decode(&encoded).is_err(), "{name}: nine are too many");
    }
}

#[test]
fn every_flipped_bit_breaks_the_signature() {
    for (name, signed) in Story::new().objects() {
        let bytes = bytes_of(&signed);
        for at in 0..bytes.len() {
            // One bit of each byte, each time another; all bits of the signature.
            let in_signature = at >= bytes.len() - 64;
            for bit in if in_signature { 0..8 } else { at % 8..at % 8 + 1 } {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                let still = wire::decode::<MAX_SIGNED, Signed>(&flipped)
                    .is_ok_and(|signed| Object::verify(&signed).is_ok());
                assert!(!still, "{name}: byte {at}, bit {bit}");
            }
        }
    }
}

#[test]
fn an_object_of_another_kind_or_fabric_is_refused() {
    let story = Story::new();
    type Order = leasehold_proto::words::contract::Order;
    let error = story.grant.verify::<Order>(&story.fabric).expect_err("another kind");
    assert_eq!(error, VerifyError::Kind { expected: Kind::Order, got: Kind::Grant });
    let elsewhere = FabricId(Hash([1; 32]));
    assert!(matches!(story.order.verify::<Order>(&elsewhere), Err(VerifyError::Fabric { .. })));
}

#[test]
fn unknown_kinds_are_relayed_unread_but_not_unsigned() {
    let story = Story::new();
    let mut envelope = Envelope::decode(&story.offer.envelope).expect("an envelope");
    envelope.header.kind = Kind::Unknown(700);
    envelope.body = b"of a later version".to_vec();
    let envelope = wire::encode::<MAX_OBJECT>(&envelope).expect("it fits");
    let mut signed = Signer::from_seed(&story::LESSOR)
        .sign(&Draft { envelope: envelope.into() })
        .expect("signed");
    let opaque = signed.verify_opaque(&story.fabric).expect("it verifies");
    assert_eq!(opaque.body(), b"of a later version");
    assert!(message::verify_record(&signed, &story.fabric).is_ok());
    assert!(Object::verify(&signed).is_err(), "nobody here can read it");
    signed.signature.0[0] ^= 1;
    assert!(message::verify_record(&signed, &story.fabric).is_err());
}

#[test]
fn what_is_too_long_is_refused_before_it_is_read() {
    let got = MAX_MESSAGE + 1;
    let error = message::decode(&vec![0; got]).expect_err("too long");
    assert_eq!(error, DecodeError::TooLong { got, limit: MAX_MESSAGE });
    let got = MAX_OBJECT + 1;
    let error = Envelope::decode(&vec![0; got]).expect_err("too long");
    assert_eq!(error, DecodeError::TooLong { got, limit: MAX_OBJECT });

    let story = Story::new();
    let mut envelope = Envelope::decode(&story.claim.envelope).expect("an envelope");
    envelope.body = vec![0; MAX_OBJECT];
    assert!(wire::encode::<MAX_OBJECT>(&envelope).is_err(), "nor is it written");
    let many = vec![story.order.clone(); MAX_MESSAGE / story.order.envelope.len() + 1];
    assert!(message::encode(&Message::Records(many)).is_err(), "nor is it written");
}

#[test]
fn a_kind_has_a_bound_that_no_padding_passes() {
    let story = Story::new();
    for (name, signed) in story.objects() {
        let mut envelope = Envelope::decode(&signed.envelope).expect("an envelope");
        let limit = envelope.header.kind.max_len();
        assert!(signed.envelope.len() * 4 <= limit * 3, "{name}: there is room to grow");
        let padded = |envelope: &mut Envelope, len: usize| {
            envelope.extensions = vec![Extension { tag: 9, critical: false, bytes: vec![] }];
            let bare = wire::encode::<MAX_OBJECT>(envelope).expect("it fits").len();
            envelope.extensions[0].bytes = vec![0; len - bare];
            wire::encode::<MAX_OBJECT>(envelope).expect("it fits")
        };
        let at = padded(&mut envelope, limit);
        assert!(Envelope::decode(&at).is_ok(), "{name}: {limit} bytes are allowed");
        let got = limit + 1;
        let beyond = Envelope::decode(&padded(&mut envelope, got));
        assert_eq!(beyond, Err(DecodeError::TooLong { got, limit }), "{name}");
    }
}

#[test]
fn lists_have_bounds_of_their_own() {
    let name = RecordName { key: KeyId([0; 32]), kind: Kind::Offer, epoch: 0, seq: 0, tag: 0 };
    let small = Signed { envelope: [].into(), signature: Signature([0; 64]) };
    let round = |message: Message| {
        message::decode(&message::encode(&message).expect("it fits")).map(|_| ())
    };
    for (fits, message) in [
        (true, Message::Announce(vec![name; MAX_NAMES])),
        (false, Message::Announce(vec![name; MAX_NAMES + 1])),
        (true, Message::Pull(vec![name; MAX_NAMES])),
        (false, Message::Pull(vec![name; MAX_NAMES + 1])),
        (true, Message::Records(vec![small.clone(); MAX_RECORDS])),
        (false, Message::Records(vec![small; MAX_RECORDS + 1])),
        (true, Message::Digest(vec![0; BUCKETS])),
        (false, Message::Digest(vec![0; BUCKETS - 1])),
        (false, Message::Digest(vec![0; BUCKETS + 1])),
        (false, Message::Digest(vec![])),
    ] {
        assert_eq!(round(message).is_ok(), fits);
    }
}

/// A length that promises more than there is must cost neither memory nor time.
#[test]
fn promised_lengths_are_not_believed() {
    for length in [u64::MAX, u64::MAX / 2, 1 << 40, 1 << 20] {
        // Announce, Records, Digest: a list. Order: an envelope.
        for variant in [1u32, 3, 4, 6] {
            let bytes = [&variant.to_le_bytes()[..], &length.to_le_bytes()].concat();
            assert!(message::decode(&bytes).is_err());
        }
        let mut envelope = Story::new().grant.envelope.to_vec();
        for at in [124, 132] {
            envelope[at..at + 8].copy_from_slice(&length.to_le_bytes());
            assert!(Envelope::decode(&envelope).is_err());
        }
    }
}

/// Everything that reads foreign bytes, at once.
fn read_everything(bytes: &[u8]) {
    if let Ok(message) = message::decode(bytes) {
        let _ = message::verify(&message, &FabricId::default());
        assert!(message::encode(&message).is_ok(), "what is read can be written");
    }
    let _ = Envelope::decode(bytes);
    let _ = draft_json(bytes);
    if let Ok(signed) = wire::decode::<MAX_SIGNED, Signed>(bytes) {
        let _ = Object::verify(&signed).map(|object| object.body_json());
        let _ = signed.verify_opaque(&FabricId::default());
    }
    if let Ok(proof) = wire::decode::<MAX_PROOF, Proof>(bytes) {
        let _ = proof::check(&proof);
    }
    let signature = Signature([3; 64]);
    let _ = Object::verify(&Signed { envelope: bytes.into(), signature });
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        read_everything(&bytes);
    }

    /// Bytes that are nearly right reach deeper than random ones.
    #[test]
    fn damaged_words_are_read_without_panic(
        which: prop::sample::Index,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let story = Story::new();
        let mut words: Vec<Vec<u8>> = Vec::new();
        words.extend(story.messages().iter().map(|(_, m)| message::encode(m).expect("it fits")));
        for (_, signed) in story.objects() {
            words.extend([bytes_of(&signed), signed.envelope.to_vec()]);
        }
        words.push(wire::encode::<MAX_PROOF>(&story.proof()).expect("it fits"));
        let mut bytes = which.get(&words).clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            let cut = cut.index(bytes.len());
            bytes.truncate(cut);
        }
        read_everything(&bytes);
    }

    /// A body that decodes to anything at all is signed and read back the same.
    #[test]
    fn damaged_bodies_under_a_good_signature_are_read_without_panic(
        which: prop::sample::Index,
        at: prop::sample::Index,
        value: u8,
    ) {
        let story = Story::new();
        let objects = story.objects();
        let (_, signed) = which.get(&objects);
        let mut envelope = Envelope::decode(&signed.envelope).expect("an envelope");
        let at = at.index(envelope.body.len());
        envelope.body[at] = value;
        envelope.header.signer = Signer::from_seed(&story::LESSOR).id();
        let envelope = wire::encode::<MAX_OBJECT>(&envelope).expect("it fits");
        let signed = Signer::from_seed(&story::LESSOR).sign(&Draft { envelope: envelope.into() }).expect("signed");
        if let Ok(object) = Object::verify(&signed) {
            prop_assert!(object.body_json().is_object());
        }
        let _ = message::verify_record(&signed, &story.fabric);
        let _ = message::verify_order(&signed, &story.fabric);
        let _ = message::verify_grant(&signed, &story.fabric);
    }
}
