//! A fabric founded and a lessee admitted on machines without a network: draft, sign, verify.

use leasehold_keys::armor::{self, Item};
use leasehold_proto::KeyId;
use leasehold_proto::minds::admission::Admission;
use leasehold_proto::words::charter::Certificate;
use leasehold_proto::words::charter::Role;
use leasehold_proto::words::contract::Mandate;
use leasehold_proto::words::sign::Signed;
use leasehold_proto::{Span, Wall};

use crate::Desk;

const NOW: &str = "--now 2026-11-24T00:00:00Z";
const NOW_MS: Wall = Wall(1_795_478_400_000);

fn signed(desk: &Desk, name: &str) -> Signed {
    match armor::read_objects(&desk.path(name)).expect("objects").remove(0) {
        Item::Signed(signed) => signed,
        other => panic!("{other:?}"),
    }
}

#[test]
fn from_nothing_to_a_mandate() {
    let desk = Desk::new();
    desk.put("word", "a passphrase\n");
    let key = |name: &str, how: &str| -> KeyId {
        desk.run(&format!("new {how} --out {name}.key")).ok().trim().parse().expect("a key id")
    };
    let root = key("root", "--passphrase-file word");
    let tenant = key("tenant", "--passphrase-file word");
    let node = key("node", "--node");

    // The charter.
    let run = desk.run(&format!(
        "charter new --name harbour --currency EUR --organisation quay={root} --max-term 10d \
         --out charter.draft {NOW}"
    ));
    assert!(run.err.contains("warning: taking 2026-11-24T00:00:00Z as the time"), "{run:?}");
    let fabric = run.ok().trim().to_string();
    let run = desk.run(&format!(
        "sign charter.draft --key root.key --passphrase-file word --yes --out charter {NOW}"
    ));
    for shown in ["UNSIGNED draft: charter", "harbour", "EUR", "240h00m", "no end"] {
        assert!(run.err.contains(shown), "{shown}: {run:?}");
    }
    assert_eq!(run.ok().trim(), fabric, "a charter's id is its fabric's");
    let admission = Admission::found(&signed(&desk, "charter")).expect("it founds a fabric");
    assert_eq!(admission.fabric().to_string(), fabric);
    let run = desk.run(&format!("verify charter --fabric {fabric}"));
    assert!(run.ok().contains("holds"));

    // Certificates.
    for (name, role, id) in [("node", "node", node), ("tenant", "tenant", tenant)] {
        desk.run(&format!(
            "certificate new --charter charter --organisation quay --role {role} --key {id} \
             --name {name} --valid 30d --out {name}.draft {NOW}"
        ))
        .ok();
        desk.run(&format!(
            "sign {name}.draft --key root.key --passphrase-file word --yes --out {name}.cert {NOW}"
        ))
        .ok();
        let run = desk.run(&format!("verify {name}.cert --charter charter --json {NOW}"));
        let json = run.json();
        assert_eq!((&json["verified"], &json["admitted"]), (&true.into(), &true.into()));
        assert_eq!(json["signer"].as_str(), Some(root.to_string().as_str()));
    }
    let certificate = signed(&desk, "node.cert").verify::<Certificate>(&admission.fabric());
    let certificate = certificate.expect("it verifies");
    assert_eq!(admission.admits(&certificate, &node, Role::Node, NOW_MS), Ok(()));
    assert_eq!(certificate.header().not_after, NOW_MS + Span::secs(30 * 86_400));
    assert_eq!((certificate.header().epoch, certificate.header().seq), (NOW_MS.0, 0));
    desk.run("verify node.cert --charter charter --now 2027-11-24T00:00:00Z")
        .fails(1, "the certificate has expired");
    desk.run("verify node.cert --charter charter --now 2025-11-24T00:00:00Z")
        .fails(1, "not valid yet");

    // The mandate.
    let new = format!(
        "mandate new --lessee {tenant} --delegate {node} --certificate tenant.cert \
         --max-hourly 0.50 --max-total 12 --max-term 2h --lessor {node} --valid 7d {NOW}"
    );
    let draft = desk.run(&new).ok();
    assert!(draft.starts_with("-----BEGIN LEASEHOLD UNSIGNED MANDATE-----"), "{draft}");
    desk.put("mandate.draft", draft);
    let run = desk.run(&format!(
        "sign mandate.draft --key tenant.key --passphrase-file word --yes --charter charter \
         --out mandate {NOW}"
    ));
    for shown in ["0.5 EUR", "12 EUR", "2h00m", "certificate: signed certificate", "\"tenant\""] {
        assert!(run.err.contains(shown), "{shown}: {run:?}");
    }
    run.ok();
    let mandate = signed(&desk, "mandate").verify::<Mandate>(&admission.fabric());
    let mandate = mandate.expect("it verifies");
    assert_eq!((mandate.signer(), mandate.body().delegate), (tenant, node));
    let json = desk.run(&format!("verify mandate --charter charter --json {NOW}")).json();
    assert_eq!((&json["kind"], &json["admitted"]), (&"mandate".into(), &true.into()));
    desk.run("verify mandate --charter charter --now 2026-12-24T00:00:00Z")
        .fails(1, "not valid at this time");
}

#[test]
fn drafts_that_cannot_count_are_not_made() {
    let desk = Desk::new();
    let story = crate::story::Story::new();
    desk.objects("charter", &[Item::Signed(story.charter.clone())]);
    desk.objects("tenant.cert", &[Item::Signed(story.tenant_certificate.clone())]);
    desk.objects("node.cert", &[Item::Signed(story.lessor_certificate.clone())]);
    let id = |seed: [u8; 32]| leasehold_proto::words::sign::Signer::from_seed(&seed).id();
    let (tenant, node) = (id(crate::story::TENANT), id(crate::story::LESSOR));
    let certificate = |more: &str| {
        desk.run(&format!("certificate new --charter charter --role node --name n {more} --out d"))
    };
    certificate(&format!("--organisation pier --key {node}")).fails(2, "it names: quay");
    let weak = KeyId([0; 32]);
    certificate(&format!("--organisation quay --key {weak}")).fails(5, "not a usable");
    let line = format!("--role node --name n --organisation quay --key {node} --out d");
    desk.run(&format!("certificate new --charter node.cert {line}")).fails(3, "0 signed charters");
    let mandate = |lessee: KeyId, certificate: &str| {
        desk.run(&format!(
            "mandate new --lessee {lessee} --delegate {node} --certificate {certificate} \
             --max-hourly 1 --max-total 1 --max-term 1h --out d"
        ))
    };
    mandate(node, "tenant.cert").fails(5, "as a tenant");
    mandate(node, "node.cert").fails(5, "as a node");
    let mut changed = story.tenant_certificate.clone();
    changed.signature.0[5] ^= 1;
    desk.objects("changed.cert", &[Item::Signed(changed)]);
    mandate(tenant, "changed.cert").fails(1, "signature does not hold");
    let run = mandate(tenant, "tenant.cert");
    assert!(run.err.contains("ends before the mandate"), "{run:?}");
    run.ok();
    mandate(tenant, "tenant.cert").fails(7, "exists");
    let many = format!("--organisation a={node} --organisation a={tenant}");
    desk.run(&format!("charter new --name n --currency EUR {many}")).fails(2, "each organisation");
}
