//! `inspect`, `sign` and `verify` of single objects.

use leasehold_keys::armor::{self, Item};
use leasehold_keys::text::is_hostile;
use leasehold_keys::{pem, view};
use leasehold_proto::words::contract::Claim;
use leasehold_proto::words::object::{Body, Envelope, Kind};
use leasehold_proto::words::sign::{Draft, Signed, Signer};
use leasehold_proto::words::wire::{self, MAX_OBJECT};
use leasehold_proto::{Hash, Wall};

use crate::Desk;
use crate::story::{DELEGATE, LESSOR, ORGANISATION, START, Story, TENANT};

fn item(signed: &Signed) -> Item {
    Item::Signed(signed.clone())
}

fn draft(signed: &Signed) -> Draft {
    Draft { envelope: signed.envelope.clone() }
}

/// The same object with its envelope changed, signed by `seed`.
fn changed(signed: &Signed, seed: &[u8; 32], change: impl FnOnce(&mut Envelope)) -> Signed {
    let mut envelope = Envelope::decode(&signed.envelope).expect("an envelope");
    change(&mut envelope);
    envelope.header.signer = Signer::from_seed(seed).id();
    let envelope = wire::encode::<MAX_OBJECT>(&envelope).expect("it fits");
    Signer::from_seed(seed).sign(&Draft { envelope: envelope.into() }).expect("signed")
}

#[test]
fn every_kind_is_shown_for_people_and_as_json() {
    let desk = Desk::new();
    let story = Story::new();
    desk.objects("charter", &[item(&story.charter)]);
    for (name, signed) in story.objects() {
        desk.objects("x", &[item(&signed)]);
        let text = desk.run("inspect x --charter charter --now 1795478400000").ok();
        assert!(text.starts_with(&format!("signed {name} (the signature holds)\n")), "{text}");
        assert!(text.contains(&signed.id().to_string()), "{text}");
        assert!(!text.contains("unreadable") && !text.contains("UNVERIFIED"), "{text}");
        assert!(!text.contains("currency: see"), "{text}");
        let json = desk.run("inspect x --json").json();
        assert_eq!(json["kind"], name.as_str());
        assert_eq!(json["id"], signed.id().to_string().as_str());
        assert_eq!(json["signature_valid"], true, "{name}");
        assert!(json["body"].is_object());
        assert!(!json.to_string().contains("\"envelope\""), "nested objects are expanded");
    }
}

#[test]
fn objects_inside_objects_are_shown_in_place() {
    let desk = Desk::new();
    let story = Story::new();
    desk.objects("x", &[item(&story.charter), item(&story.order)]);
    let text = desk.run("inspect x").ok();
    for line in [
        "    mandate: signed mandate (the signature holds)",
        "      certificate: signed certificate (the signature holds)",
        "0.1 EUR per hour",
        "0.05 EUR",
        "2 cpu, 4GiB memory, 10GiB disk",
        "1h00m",
        "2026-11-24T00:01:00Z",
        "\"ada\" as a tenant",
    ] {
        let line = line.trim_start();
        assert!(text.contains(line), "{line}: {text}");
    }
    desk.objects("x", &[item(&story.order)]);
    assert!(desk.run("inspect x").ok().contains("0.1 (currency: see the fabric's charter)"));
    let json = desk.run("inspect x --json").json();
    let mandate = &json["body"]["authority"]["mandate"];
    assert_eq!((&mandate["kind"], &mandate["signature_valid"]), (&"mandate".into(), &true.into()));
    let certificate = &mandate["body"]["certificate"];
    assert_eq!(certificate["body"]["name"], "ada");
    let now = "--now 2027-01-01T00:00:00Z";
    assert!(desk.run(&format!("inspect x {now}")).ok().contains("(EXPIRED)"));
}

#[test]
fn what_does_not_verify_is_shown_and_marked() {
    let desk = Desk::new();
    let story = Story::new();
    let mut bad = story.grant.clone();
    bad.signature.0[0] ^= 1;
    desk.objects("x", &[item(&bad)]);
    let text = desk.run("inspect x").ok();
    assert!(text.starts_with("UNVERIFIED grant, not to be believed: the signature"), "{text}");
    let json = desk.run("inspect x --json").json();
    assert_eq!(json["signature_valid"], false);
    assert!(json["error"].as_str().is_some_and(|why| why.contains("does not hold")));
    desk.run("verify x").fails(1, "the signature does not hold");
    let run = desk.run("verify x --json");
    assert_eq!((run.code, &run.json()["verified"]), (1, &false.into()));
    // One bad object among good ones: nothing of the file counts.
    desk.objects("x", &[item(&story.order), item(&bad)]);
    desk.run("verify x").fails(1, "grant");
    desk.objects("x", &[Item::Draft(draft(&story.order))]);
    assert!(desk.run("inspect x").ok().starts_with("UNSIGNED draft: order"));
    assert_eq!(desk.run("inspect x --json").json()["type"], "draft");
    desk.run("verify x").fails(1, "unsigned draft");
    // A bad certificate inside a well-signed mandate is marked where it stands.
    let mut certificate = story.tenant_certificate.clone();
    certificate.signature.0[40] ^= 1;
    let mandate = with_certificate(&story.mandate, &certificate);
    desk.objects("x", &[item(&mandate)]);
    let text = desk.run("inspect x").ok();
    assert!(text.starts_with("signed mandate (the signature holds)"), "{text}");
    assert!(text.contains("certificate: UNVERIFIED certificate"), "{text}");
}

fn with_certificate(mandate: &Signed, certificate: &Signed) -> Signed {
    type Mandate = leasehold_proto::words::contract::Mandate;
    changed(mandate, &TENANT, |envelope| {
        let mut body: Mandate = wire::decode::<MAX_OBJECT, _>(&envelope.body).expect("a mandate");
        body.certificate = certificate.clone();
        envelope.body = wire::encode::<MAX_OBJECT>(&body).expect("it fits");
    })
}

#[test]
fn kinds_of_later_versions_are_named() {
    let desk = Desk::new();
    let later = changed(&Story::new().offer, &LESSOR, |envelope| {
        envelope.header.kind = Kind::Unknown(700);
    });
    desk.objects("x", &[item(&later)]);
    assert!(desk.read("x").contains("LEASEHOLD SIGNED UNKNOWN-700"));
    let text = desk.run("inspect x").ok();
    assert!(text.starts_with("signed unknown-700 (the signature holds)"), "{text}");
    desk.run("verify x").fails(1, "unknown-700");
}

#[test]
fn text_from_files_cannot_steer_the_terminal() {
    let desk = Desk::new();
    let story = Story::new();
    let evil = "\u{1b}[2J\u{9b}31m\r\u{202e}\u{7f}";
    let claim = changed(&story.claim, &DELEGATE, |envelope| {
        let mut body: Claim = wire::decode::<MAX_OBJECT, _>(&envelope.body).expect("a claim");
        body.job.args = vec![evil.into()];
        body.job.env = vec![(evil.into(), evil.into())];
        body.job.runtime = "\u{1b}c".into();
        body.validate().expect("nothing forbids it");
        envelope.body = wire::encode::<MAX_OBJECT>(&body).expect("it fits");
    });
    desk.objects("x", &[item(&claim)]);
    for line in ["inspect x", "inspect x --json"] {
        let out = desk.run(line).ok();
        let shown: Vec<_> = out.chars().filter(|c| is_hostile(*c) && *c != '\n').collect();
        assert!(shown.is_empty(), "{line}: {shown:?}");
    }
    let json = desk.run("inspect x --json").json();
    assert_eq!(json["body"]["job"]["args"][0], evil, "JSON says exactly what was signed");
}

#[test]
fn objects_nested_for_ever_are_shown_to_a_depth() {
    let desk = Desk::new();
    let story = Story::new();
    let mut mandate = story.mandate.clone();
    for _ in 0..15 {
        mandate = with_certificate(&story.mandate, &mandate);
    }
    desk.objects("x", &[item(&mandate)]);
    let text = desk.run("inspect x").ok();
    assert!(text.contains("too deep to show") && text.lines().count() < 200, "{text}");
    desk.run("inspect x --json").json();
}

#[test]
fn a_charter_says_whether_the_signer_counts() {
    let desk = Desk::new();
    let story = Story::new();
    desk.objects("charter", &[item(&story.charter)]);
    let now = format!("--now {}", START.0);
    for (name, signed) in story.objects() {
        desk.objects("x", &[item(&signed)]);
        let run = desk.run(&format!("verify x --charter charter --json {now}"));
        let json = run.json();
        assert_eq!((run.code, &json["verified"]), (0, &true.into()), "{name}: {run:?}");
        let says = ["charter", "certificate", "host", "mandate", "order", "grant", "reinstatement"];
        assert_eq!(json["admitted"] == true, says.contains(&name.as_str()), "{name}");
        let run = desk.run("verify x");
        assert!(run.err.contains("for you to compare"), "{run:?}");
    }
    // Well signed, but by nobody of the fabric.
    let stranger = changed(&story.tenant_certificate, &[9; 32], |_| {});
    desk.objects("x", &[item(&stranger)]);
    desk.run("verify x").ok();
    desk.run(&format!("verify x --charter charter {now}"))
        .fails(1, "not signed by an organisation");
    // Another fabric's charter.
    let other = changed(&story.charter, &ORGANISATION, |envelope| {
        envelope.header.not_after = Wall(1);
    });
    desk.objects("other", &[item(&other)]);
    desk.objects("x", &[item(&story.order)]);
    desk.run("verify x --charter other").fails(1, "it belongs to fabric");
    let fabric = Hash([1; 32]);
    desk.run(&format!("verify x --fabric {fabric}")).fails(1, "it belongs to fabric");
    desk.run("verify x --charter x").fails(3, "0 signed charters");
    // An order beyond its mandate.
    type Order = leasehold_proto::words::contract::Order;
    let greedy = changed(&story.order, &DELEGATE, |envelope| {
        let mut body: Order = wire::decode::<MAX_OBJECT, _>(&envelope.body).expect("an order");
        body.cap = leasehold_proto::Amount::MAX;
        envelope.body = wire::encode::<MAX_OBJECT>(&body).expect("it fits");
    });
    desk.objects("x", &[item(&greedy)]);
    desk.run("verify x --charter charter").fails(1, "exceeds the mandate's total price");
}

#[test]
fn files_that_hold_no_objects_are_named() {
    let desk = Desk::new();
    let story = Story::new();
    desk.objects("good", &[item(&story.order)]);
    let good = desk.read("good");
    let block = pem::read(good.as_bytes()).expect("a block").remove(0);
    let labelled = |label: &str, bytes: &[u8]| pem::write(label, bytes).to_string();
    let mut wrong = block.bytes.to_vec();
    wrong[8] ^= 1; // the kind, after the envelope's length
    for (text, why) in [
        (String::new(), "no '-----BEGIN"),
        ("garbage\n".into(), "line 1"),
        (good[..good.len() / 2].into(), "cut short"),
        (good.replacen("BEGIN", "BEGAN", 1), "line 1"),
        (labelled("LEASEHOLD SIGNED ORDER", b"xyz"), "block 1"),
        (labelled("LEASEHOLD SIGNED GRANT", &block.bytes), "holds LEASEHOLD SIGNED ORDER"),
        (labelled("LEASEHOLD SIGNED ORDER", &wrong), "holds LEASEHOLD SIGNED GRANT"),
        (labelled("LEASEHOLD SIGNED ORDER", &[&block.bytes[..], &[0]].concat()), "1 bytes follow"),
        (labelled("LEASEHOLD PROOF", &block.bytes), "damaged"),
        (labelled("CERTIFICATE", b"xyz"), "expected a signed object"),
        (format!("{good}{}", labelled("CERTIFICATE", b"xyz")), "block 2"),
    ] {
        desk.put("x", text);
        desk.run("inspect x").fails(3, why);
        desk.run("verify x").fails(1, why);
        let run = desk.run("verify x --json");
        assert_eq!((run.code, &run.json()["verified"]), (1, &false.into()));
        let run = desk.run("inspect x --json");
        assert_eq!((run.code, run.json()["exit"].as_u64()), (3, Some(3)));
    }
    desk.run("inspect nothing").fails(3, "No such file");
    desk.run("verify nothing").fails(3, "No such file");
    let large = std::fs::File::create(desk.path("x")).expect("created");
    large.set_len(u64::try_from(armor::MAX_FILE + 1).expect("it fits")).expect("a sparse file");
    desk.run("inspect x").fails(3, "longer than");
    desk.run("verify x").fails(1, "longer than");
}

#[test]
fn armour_reads_what_it_wrote_and_survives_damage() {
    let story = Story::new();
    let mut items: Vec<Item> = story.objects().iter().map(|(_, signed)| item(signed)).collect();
    items.push(Item::Draft(draft(&story.mandate)));
    items.push(Item::Proof(Box::new(story.proof())));
    let texts: Vec<String> = items.iter().map(|one| armor::encode(one).expect("text")).collect();
    assert_eq!(armor::decode(texts.concat().as_bytes()), Ok(items.clone()));
    let text = texts.first().expect("a charter").as_bytes();
    for at in 0..text.len() {
        for value in [0, b'\n', b'-', b'A', 0xff] {
            let mut bad = text.to_vec();
            if std::mem::replace(&mut bad[at], value) == value {
                continue;
            }
            // Another charter, or none; never the same one read from other bytes.
            if let Ok(read) = armor::decode(&bad) {
                assert_ne!(read, items[..1], "byte {at} is {value}");
            }
        }
    }
}

#[test]
fn only_what_people_say_is_signed() {
    let desk = Desk::new();
    let story = Story::new();
    for (name, seed) in
        [("org", ORGANISATION), ("node", LESSOR), ("delegate", DELEGATE), ("tenant", TENANT)]
    {
        desk.key(name, seed);
    }
    let now = format!("--now {}", START.0);
    for (name, signed) in story.objects() {
        desk.objects("x", &[Item::Draft(draft(&signed))]);
        let signer = signed.header().expect("an envelope").signer;
        let key = ["org", "node", "delegate", "tenant"]
            .into_iter()
            .find(|key| desk.run(&format!("show {key}")).ok().contains(&signer.to_string()))
            .expect("one of the four");
        let run = desk.run(&format!("sign x --key {key} --yes {now}"));
        let of_people = ["charter", "certificate", "mandate", "order", "reinstatement"];
        if of_people.contains(&name.as_str()) {
            let items = armor::decode(run.ok().as_bytes()).expect("armour");
            assert_eq!(items, [item(&signed)], "the same bytes as in the story");
            let other = if key == "org" { "node" } else { "org" };
            desk.run(&format!("sign x --key {other} --yes {now}")).fails(5, "to be signed by");
        } else {
            run.fails(5, &format!("{name}: not signed here"));
        }
    }
}

#[test]
fn what_is_signed_is_shown_first_and_asked_about() {
    let desk = Desk::new();
    let story = Story::new();
    desk.key("delegate", DELEGATE);
    desk.objects("charter", &[item(&story.charter)]);
    desk.objects("x", &[Item::Draft(draft(&story.order))]);
    let now = format!("--now {}", START.0);
    let sign = format!("sign x --key delegate --charter charter {now}");
    let run = desk.run_without_terminal(&sign);
    assert!(run.err.contains("UNSIGNED draft: order"), "{run:?}");
    assert!(run.err.contains("0.05 EUR"), "{run:?}");
    run.fails(2, "--yes");
    let run = desk.run(&format!("{sign} --yes --json --out y"));
    assert_eq!(run.json()["id"], story.order.id().to_string().as_str());
    let context = view::Context::default();
    let shown = view::text(&Item::Draft(draft(&story.order)), &context);
    assert!(run.err.contains(shown.lines().nth(1).expect("the id")), "{run:?}");
    desk.run(&format!("{sign} --yes --out y")).fails(7, "exists");
    desk.run(&format!("{sign} --yes --out y --force")).ok();
    desk.run(&format!("sign y --key delegate --yes {now}")).fails(5, "signed already");
    desk.run("sign x --key nothing --yes").fails(3, "No such file");
    desk.objects("two", &[Item::Draft(draft(&story.order)), Item::Draft(draft(&story.mandate))]);
    desk.run(&format!("sign two --key delegate --yes {now}")).fails(3, "holds 2 objects");
}

#[test]
fn drafts_that_say_two_things_are_not_signed() {
    let desk = Desk::new();
    let story = Story::new();
    for (name, seed) in [("org", ORGANISATION), ("delegate", DELEGATE), ("tenant", TENANT)] {
        desk.key(name, seed);
    }
    let refused = |signed: &Signed, key: &str, code: i32, why: &str| {
        desk.objects("x", &[Item::Draft(draft(signed))]);
        let line = format!("sign x --key {key} --yes --now {}", START.0);
        desk.run(&line).fails(code, why);
    };
    for (signed, seed, key) in [
        (&story.charter, ORGANISATION, "org"),
        (&story.tenant_certificate, ORGANISATION, "org"),
        (&story.mandate, TENANT, "tenant"),
        (&story.order, DELEGATE, "delegate"),
    ] {
        let with = |change: &dyn Fn(&mut Envelope)| changed(signed, &seed, change);
        let subject = with(&|envelope| envelope.header.subject = Hash([6; 32]));
        refused(&subject, key, 5, "subject is");
        refused(&with(&|e| e.header.version = 2), key, 5, "version 2");
        refused(&with(&|e| e.header.not_after = Wall(START.0 - 1)), key, 5, "ceased to be valid");
        refused(&with(&|e| e.body.push(0)), key, 3, "1 bytes follow");
        let extension = leasehold_proto::words::object::Extension {
            tag: 3,
            critical: false,
            bytes: b"hidden".to_vec(),
        };
        refused(&with(&|e| e.extensions = vec![extension.clone()]), key, 5, "extension (3)");
    }
    let mut certificate = story.tenant_certificate.clone();
    certificate.signature.0[3] ^= 1;
    let mandate = with_certificate(&story.mandate, &certificate);
    refused(&mandate, "tenant", 1, "certificate inside it does not verify");
    let mandate = with_certificate(&story.mandate, &story.lessor_certificate);
    refused(&mandate, "tenant", 5, "does not admit its signer");
    let stranger = changed(&story.charter, &TENANT, |_| {});
    refused(&stranger, "tenant", 5, "one of the organisations it names");
    let elsewhere = changed(&story.order, &DELEGATE, |envelope| {
        envelope.header.fabric = leasehold_proto::FabricId(Hash([8; 32]));
    });
    refused(&elsewhere, "delegate", 1, "the mandate inside it does not verify");
}
