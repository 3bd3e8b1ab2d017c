//! `verify` of whole proofs: the true one holds, and no byte of it can be changed.

use leasehold_keys::armor::{self, Item, MAX_PROOF};
use leasehold_keys::{judge, pem};
use leasehold_proto::Hash;
use leasehold_proto::proof::Proof;
use leasehold_proto::words::wire;

use crate::Desk;
use crate::story::Story;

fn bytes(proof: &Proof) -> Vec<u8> {
    wire::encode::<MAX_PROOF>(proof).expect("it fits")
}

fn put(desk: &Desk, bytes: &[u8]) {
    desk.put("proof", pem::write("LEASEHOLD PROOF", bytes).as_bytes());
}

#[test]
fn a_true_proof_holds() {
    let desk = Desk::new();
    let story = Story::new();
    desk.objects("proof", &[Item::Proof(Box::new(story.proof()))]);
    desk.objects("charter", &[Item::Signed(story.charter.clone())]);
    let run = desk.run("verify proof");
    assert!(run.err.contains("for you to compare"), "{run:?}");
    let text = run.ok();
    for shown in ["the proof holds", "EUR", "recomputed from the offer", "released", "27s"] {
        assert!(text.contains(shown), "{shown}: {text}");
    }
    let fabric = story.fabric;
    let run = desk.run(&format!("verify proof --fabric {fabric} --charter charter --json"));
    let json = run.json();
    assert_eq!((run.code, &json["verified"], &json["kind"]), (0, &true.into(), &"proof".into()));
    assert_eq!((&json["receipts"], &json["acknowledged"]), (&3.into(), &3.into()));
    assert_eq!(json["fabric"], fabric.to_string().as_str());
    assert_eq!(json["charge"], json["acknowledged_charge"]);
    assert!(run.err.is_empty(), "{run:?}");
    let text = desk.run("inspect proof").ok();
    for part in ["charter: signed", "offer: signed", "receipt 3: signed", "termination: signed"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = desk.run("inspect proof --json").json();
    assert_eq!(json["receipts"].as_array().map(Vec::len), Some(3));
    assert_eq!(json["order"]["signature_valid"], true);
}

#[test]
fn a_proof_of_another_fabric_is_not_the_one_asked_for() {
    let desk = Desk::new();
    let story = Story::new();
    desk.objects("proof", &[Item::Proof(Box::new(story.proof()))]);
    let other = Hash([7; 32]);
    desk.run(&format!("verify proof --fabric {other}")).fails(1, "it belongs to fabric");
    let run = desk.run(&format!("verify proof --fabric {other} --json"));
    assert_eq!((run.code, &run.json()["verified"]), (1, &false.into()));
}

#[test]
fn no_byte_of_a_proof_can_be_changed() {
    let desk = Desk::new();
    let story = Story::new();
    let good = bytes(&story.proof());
    let holds = |bytes: &[u8]| {
        wire::decode::<MAX_PROOF, Proof>(bytes)
            .is_ok_and(|proof| judge::proof(&proof, None).is_ok())
    };
    assert!(holds(&good));
    // Every byte, by the function that the binary uses.
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(!holds(&bad), "byte {at} of {}", good.len());
    }
    // Some of them, and both ends, by the binary itself.
    let ends = (0..4).chain(good.len() - 4..good.len());
    for at in ends.chain((4..good.len()).step_by(211)) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        put(&desk, &bad);
        let run = desk.run("verify proof --json");
        let json = run.json();
        assert_eq!((run.code, &json["verified"]), (1, &false.into()), "byte {at}");
        assert!(json["error"].as_str().is_some_and(|why| !why.is_empty()));
    }
}

#[test]
fn a_proof_cut_or_continued_does_not_hold() {
    let desk = Desk::new();
    let good = bytes(&Story::new().proof());
    for length in (0..good.len()).step_by(97) {
        assert!(wire::decode::<MAX_PROOF, Proof>(&good[..length]).is_err(), "cut at {length}");
    }
    put(&desk, &good[..good.len() - 1]);
    desk.run("verify proof").fails(1, "damaged");
    put(&desk, &[&good[..], &[0]].concat());
    desk.run("verify proof").fails(1, "1 bytes follow");
}

#[test]
fn what_is_left_out_or_exchanged_is_noticed() {
    let desk = Desk::new();
    let story = Story::new();
    let refused = |change: &dyn Fn(&mut Proof), why: &str| {
        let mut proof = story.proof();
        change(&mut proof);
        desk.objects("proof", &[Item::Proof(Box::new(proof))]);
        desk.run("verify proof").fails(1, why);
    };
    refused(&|proof| drop(proof.receipts.remove(0)), "receipt 1");
    refused(&|proof| proof.receipts.swap(0, 1), "receipt 1");
    refused(&|proof| proof.receipts.push(story.receipts[0].clone()), "receipt 4");
    refused(&|proof| proof.receipts.truncate(2), "acknowledgement 3");
    refused(&|proof| proof.acknowledgements.push(story.objection.clone()), "acknowledgement 4");
    refused(&|proof| proof.termination = Some(story.release.clone()), "termination");
    refused(&|proof| proof.order = story.grant.clone(), "order");
    refused(&|proof| proof.offer = Some(story.host.clone()), "offer");
    refused(&|proof| proof.charter = story.order.clone(), "charter");
    refused(
        &|proof| {
            proof.receipts.truncate(2);
            proof.acknowledgements.truncate(2);
        },
        "termination",
    );
    // Less is not false: a lease still running, a price not recomputed, nothing countersigned.
    let mut proof = story.proof();
    proof.receipts.truncate(1);
    proof.acknowledgements.clear();
    (proof.termination, proof.offer) = (None, None);
    desk.objects("proof", &[Item::Proof(Box::new(proof))]);
    let json = desk.run("verify proof --json").json();
    assert_eq!((&json["verified"], &json["acknowledged"]), (&true.into(), &0.into()));
    assert_eq!((&json["price_checked"], &json["end"]), (&false.into(), &().into()));
}

#[test]
fn a_long_proof_is_read_within_its_bounds() {
    let desk = Desk::new();
    let story = Story::new();
    let mut proof = story.proof();
    proof.receipts = vec![story.receipts[0].clone(); 20_000];
    desk.objects("proof", &[Item::Proof(Box::new(proof))]);
    assert!(desk.read("proof").len() > 5 << 20);
    desk.run("verify proof").fails(1, "receipt 2");
    let mut proof = story.proof();
    proof.receipts = vec![story.receipts[0].clone(); 300_000];
    assert!(armor::encode(&Item::Proof(Box::new(proof))).is_err(), "more than 64 MiB");
}
