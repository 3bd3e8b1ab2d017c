//! Tables of what the smaller minds decide: holdings, seeking, pricing, the map, admission.

#[path = "common/people.rs"]
mod people;

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::{Hash, KeyId, LeaseId};
use leasehold_proto::base::money::Amount;
use leasehold_proto::base::resource::{Rates, Resources};
use leasehold_proto::base::time::{Boot, Now, Span, Wall};
use leasehold_proto::minds::admission::{Admission, NotAdmitted, NotEntitled};
use leasehold_proto::minds::conduct::Conduct;
use leasehold_proto::minds::holdings::{Held, Holdings, Judged, Placed, Stage};
use leasehold_proto::minds::pricing::{HONOUR, Policy, Pricing};
use leasehold_proto::minds::seek::{Next, PATIENCE, Pursuit};
use leasehold_proto::minds::spread::{Spread, Taken};
use leasehold_proto::placement::{Candidate, rank};
use leasehold_proto::words::chain::Chain;
use leasehold_proto::words::charter::{Certificate, Role};
use leasehold_proto::words::contract::{
    Authority, Class, EndReason, Grant, Mandate, Order, Reason, Termination,
};
use leasehold_proto::words::equivocation::{Equivocation, NotEquivocation, Reinstatement};
use leasehold_proto::words::message::{RecordSaid, verify_record};
use leasehold_proto::words::object::{Kind, key_subject};
use leasehold_proto::words::record::{Addresses, HostRecord, Offer};
use leasehold_proto::words::sign::{Draft, Hand, Signed, Verified};
use leasehold_proto::words::usage::{ObjectionReason, Receipt, Usage};
use leasehold_proto::words::want::Want;
use people::{BOOT, People, WALL, body_of, choice, grant_of, now, want};

// --- holdings ---

/// A held lease whose order was sent at 1 s and granted; its claim was sent at 2 s.
fn held(people: &People) -> (Holdings, LeaseId, Grant) {
    let order = people.order(&people.order_body(1, 1, Span::secs(60), Span::secs(10)));
    let (lease, draft) = people.granted(&mut people.book(4, 1), now(1_500), &order);
    let grant: Verified<Grant> = people.says(&draft);
    let mut holdings = Holdings::default();
    holdings.ordered(Held {
        order: Placed::Elsewhere(order.signed().clone()),
        lessor: people.lessor.id(),
        offer: None,
        boot: BOOT,
        sent: Boot(1_000),
        grant: None,
        stage: Stage::Ordered,
        claim: None,
        claim_sent: None,
        claim_refused: false,
        release: None,
        term: Span::ZERO,
        version: 0,
        renew: None,
        renewal: None,
        gang: None,
        chain: Chain::default(),
        acknowledgement: None,
        objection: None,
        termination: None,
    });
    assert_eq!(holdings.granted(&order.id(), &grant), Some(lease));
    holdings.get_mut(&lease).expect("held").kept.claim_sent = Some((Boot(2_000), Wall(2_000)));
    (holdings, lease, grant_of(&draft))
}

fn receipt(lease: LeaseId, grant: &Grant, after: &Chain, billed: u64) -> Receipt {
    let usage = Usage { billed: Span::millis(billed), ..after.usage };
    after.next(lease, (grant, grant.term), usage, None, WALL)
}

fn says(people: &People, receipt: &Receipt) -> Verified<Receipt> {
    let hand = people.hand(1);
    let draft = hand.draft(receipt.lease.0, receipt.number, WALL + Span::secs(60), receipt);
    people.says(&draft.expect("it fits"))
}

fn judge(people: &People, holdings: &mut Holdings, at: Now, receipt: &Receipt) -> Judged {
    let hand = Hand { me: people.delegate.id(), ..people.hand(1) };
    holdings.judge(at, &hand, BOOT, &says(people, receipt))
}

#[test]
fn the_lessee_counts_from_its_own_sending() {
    let people = People::new();
    let (holdings, lease, _) = held(&people);
    let until = holdings.get(&lease).and_then(|held| held.relied_until()).expect("granted");
    // 60 s from the sending, less 50 ms and 200 ppm; the lessor honours it until 61.5 s.
    assert_eq!(until, Boot(1_000 + 60_000 - 50 - 12));
}

#[test]
fn nothing_is_countersigned_that_was_never_claimed_or_cannot_have_passed() {
    let people = People::new();
    let (mut holdings, lease, grant) = held(&people);
    let whole = receipt(lease, &grant, &Chain::default(), 60_000);
    let short = receipt(lease, &grant, &Chain::default(), 1_000);
    let hand = Hand { me: people.delegate.id(), ..people.hand(1) };
    let other = leasehold_proto::base::time::BootId([8; 16]);
    let time = |judged: &Judged| match judged {
        Judged::Objected(answer) => {
            let objection: leasehold_proto::words::usage::Objection = body_of(answer);
            objection.reason == ObjectionReason::Time
        }
        _ => false,
    };
    // This host has rebooted 20 s after the claim was sent: its boot clock says nothing about it.
    let kept = &mut holdings.get_mut(&lease).expect("held").kept;
    let sent = now(2_000).wall;
    kept.claim_sent = Some((Boot(2_000), sent));
    let later = Now { boot: Boot(900_000), wall: sent + Span::secs(20) };
    assert!(time(&holdings.judge(later, &hand, other, &says(&people, &whole))));
    let agreed = holdings.judge(later, &hand, other, &says(&people, &short));
    assert!(matches!(agreed, Judged::Agreed(_, true)), "{agreed:?}");

    let (mut holdings, ..) = held(&people);
    holdings.get_mut(&lease).expect("held").kept.claim_sent = None;
    for receipt in [&short, &receipt(lease, &grant, &Chain::default(), 0)] {
        let judged = holdings.judge(now(50_000), &hand, BOOT, &says(&people, receipt));
        assert!(time(&judged), "never claimed: {judged:?}");
    }
    assert_eq!(holdings.get(&lease).expect("held").kept.stage, Stage::Granted);
}

#[test]
fn receipts_are_agreed_or_objected() {
    let people = People::new();
    let (_, lease, grant) = held(&people);
    let first = receipt(lease, &grant, &Chain::default(), 1_000);
    let wrong: [(&str, Receipt, ObjectionReason); 7] = [
        ("number", Receipt { number: 2, ..first.clone() }, ObjectionReason::Chain),
        ("previous", Receipt { previous: Hash([1; 32]), ..first.clone() }, ObjectionReason::Chain),
        (
            "charge",
            Receipt { charge: Amount(first.charge.0 + 1), ..first.clone() },
            ObjectionReason::Charge,
        ),
        (
            "more time than passed",
            receipt(lease, &grant, &Chain::default(), 1_100),
            ObjectionReason::Time,
        ),
        (
            "more time than the term",
            Receipt { usage: Usage { billed: Span::secs(61), ..first.usage }, ..first.clone() },
            ObjectionReason::Limit,
        ),
        (
            "more memory than leased",
            Receipt {
                usage: Usage { memory_peak: grant.shape.memory + 1, ..first.usage },
                ..first.clone()
            },
            ObjectionReason::Limit,
        ),
        (
            "charge of nothing",
            Receipt { charge: Amount(0), ..first.clone() },
            ObjectionReason::Charge,
        ),
    ];
    for (what, receipt, reason) in wrong {
        let (mut holdings, ..) = held(&people);
        match judge(&people, &mut holdings, now(3_000), &receipt) {
            Judged::Objected(answer) => {
                let objection: leasehold_proto::words::usage::Objection = body_of(&answer);
                assert_eq!(objection.reason, reason, "{what}");
                // The same receipt again: the same bytes, though time has passed.
                let again = judge(&people, &mut holdings, now(3_050), &receipt);
                assert!(matches!(again, Judged::Objected(same) if same == answer), "{what}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    let (mut holdings, ..) = held(&people);
    let agreed = judge(&people, &mut holdings, now(3_000), &first);
    let Judged::Agreed(one, true) = agreed else { panic!("{agreed:?}") };
    let chain = holdings.get(&lease).expect("held").kept.chain;
    let second = receipt(lease, &grant, &chain, 2_000);
    let agreed = judge(&people, &mut holdings, now(4_000), &second);
    let Judged::Agreed(two, true) = agreed else { panic!("{agreed:?}") };
    assert_ne!(one, two);
    // A repeat gets the same bytes; an older one that comes late the latest, and no objection.
    for late in [&second, &first] {
        let again = judge(&people, &mut holdings, now(9_000), late);
        assert!(matches!(&again, Judged::Agreed(same, false) if *same == two), "{again:?}");
    }
    assert_eq!(holdings.get(&lease).expect("held").kept.stage, Stage::Claimed);
}

#[test]
fn drift_of_honest_clocks_is_no_reason_to_object() {
    let people = People::new();
    let (_, lease, grant) = held(&people);
    for (billed, fine) in [(50_000, true), (50_010, true), (50_020, false)] {
        let (mut holdings, ..) = held(&people);
        let receipt = receipt(lease, &grant, &Chain::default(), billed);
        let judged = judge(&people, &mut holdings, now(52_000), &receipt);
        assert_eq!(matches!(judged, Judged::Agreed(..)), fine, "{billed}: {judged:?}");
    }
}

#[test]
fn only_the_lessor_ends_a_held_lease_and_only_once() {
    let people = People::new();
    let (mut holdings, lease, _) = held(&people);
    let body = Termination {
        lease,
        reason: EndReason::Term,
        by: people.lessor.id(),
        at: WALL,
        billed: Span::ZERO,
        charge: Amount::ZERO,
        missed: Span::ZERO,
        credit: Amount::ZERO,
        receipt: Hash::default(),
        outcome: None,
    };
    assert!(!holdings.terminated(&people.acts(lease.0, &body)), "not its delegate");
    let end = people::sign(people.fabric, &people.lessor, lease.0, &body);
    let end = end.verify(&people.fabric).expect("it is signed");
    assert!(holdings.terminated(&end));
    assert!(!holdings.terminated(&end) && !holdings.lost(&lease), "ended is final");
}

#[test]
fn an_end_that_contradicts_the_receipts_is_no_part_of_the_proof() {
    type Change = fn(&mut Termination);
    let people = People::new();
    let table: [(&str, Change, bool); 5] = [
        ("as the receipts say", |_| {}, true),
        ("after another receipt", |end| end.receipt = Hash([1; 32]), false),
        ("for another charge", |end| end.charge = Amount(1), false),
        ("for more time", |end| end.billed = Span::secs(50), false),
        ("for another reason", |end| end.reason = EndReason::Budget, false),
    ];
    for closed in [true, false] {
        for (what, change, fine) in table {
            let (mut holdings, lease, grant) = held(&people);
            let chain = Chain::default();
            let usage = Usage { billed: Span::secs(1), ..Usage::default() };
            let end = closed.then_some(EndReason::Released);
            let body = chain.next(lease, (&grant, grant.term), usage, end, WALL);
            let signed = people::sign(people.fabric, &people.lessor, lease.0, &body);
            let receipt = signed.verify(&people.fabric).expect("it is signed");
            let hand = Hand { me: people.delegate.id(), ..people.hand(1) };
            let judged = holdings.judge(now(4_000), &hand, BOOT, &receipt);
            assert!(matches!(judged, Judged::Agreed(..)), "{judged:?}");
            let mut end = Termination {
                lease,
                reason: EndReason::Released,
                by: people.delegate.id(),
                at: WALL,
                billed: Span::secs(1),
                charge: body.charge,
                missed: Span::ZERO,
                credit: Amount::ZERO,
                receipt: receipt.id(),
                outcome: None,
            };
            change(&mut end);
            let end = people::sign(people.fabric, &people.lessor, lease.0, &end);
            assert!(holdings.terminated(&end.verify(&people.fabric).expect("it is signed")));
            let kept = &holdings.get(&lease).expect("held").kept;
            let part = kept.closing() == Some(&end);
            assert_eq!(part, fine && closed, "{what}, with a final receipt: {closed}");
        }
    }
}

// --- seek ---

#[test]
fn the_best_is_asked_then_hedged_then_given_up() {
    let mut pursuit = Pursuit::new(Boot(0), want(), (1..=3).map(choice).collect());
    let order = |n: u8| Hash([n; 32]);
    let asks = |pursuit: &mut Pursuit, at: u64, n: u8| {
        assert_eq!(pursuit.next(Boot(at)), Next::Ask(choice(n)), "at {at}");
        pursuit.asked(Boot(at), order(n), choice(n));
    };
    asks(&mut pursuit, 0, 1);
    assert_eq!(pursuit.next(Boot(10)), Next::Wait(Boot(150)));
    asks(&mut pursuit, 150, 2);
    assert_eq!(pursuit.next(Boot(200)), Next::Wait(Boot(PATIENCE.as_millis())), "two at once");
    pursuit.refused(&order(1), Reason::Capacity, String::new());
    assert!(pursuit.waits_until().is_some_and(|at| at <= Boot(300)), "the next may be asked");
    asks(&mut pursuit, 300, 3);
    assert!(pursuit.awaits(&order(2)) && pursuit.overdue(Boot(4_149)).is_empty());
    assert_eq!(pursuit.overdue(Boot(4_150)), [order(2)]);
    pursuit.silent(&order(2), "nothing".into());
    pursuit.silent(&order(3), "nothing".into());
    assert_eq!(pursuit.next(Boot(4_400)), Next::Failed);
    assert_eq!(pursuit.heard().len(), 3);
}

#[test]
fn a_late_search_waits_and_does_not_spin() {
    let mut pursuit = Pursuit::new(Boot(0), want(), (1..=9).map(choice).collect());
    let order = |n: u8| Hash([n; 32]);
    for (at, n, silent) in [(0, 1, Some(1)), (14_000, 2, None), (14_150, 3, Some(2))] {
        assert_eq!(pursuit.next(Boot(at)), Next::Ask(choice(n)));
        pursuit.asked(Boot(at), order(n), choice(n));
        if let Some(silent) = silent {
            pursuit.silent(&order(silent), String::new());
        }
    }
    // The search is late, one answer is out and others could be asked: it waits for that one.
    let late = Boot(15_300);
    let wait = Boot(14_150 + PATIENCE.as_millis());
    assert_eq!(pursuit.next(late), Next::Wait(wait));
    assert_eq!(pursuit.waits_until(), Some(wait));
    pursuit.silent(&order(3), String::new());
    assert_eq!(pursuit.next(wait), Next::Failed);
}

// --- placement ---

#[test]
fn hosts_are_ranked_for_reasons_and_the_full_come_last() {
    let people = People::new();
    let offer = |free: u64, classes: Vec<Class>, cents: u64| -> Verified<Offer> {
        let offer = Offer {
            models: Vec::new(),
            shapes: if free > 0 {
                vec![Resources::new(free * 1000, free << 30, 0)]
            } else {
                vec![]
            },
            rates: Rates { cpu_hour: Amount(cents * 10_000_000), ..Rates::default() },
            slack_permille: 500,
            early: People::early(),
            classes,
            max_term: Span::secs(600),
            runtimes: vec!["wasm".into()],
            isolation: vec!["wasm".into()],
        };
        let hand = people.hand(1);
        let draft = hand.draft(key_subject(&hand.me), 1, WALL + Span::secs(60), &offer);
        people.says(&draft.expect("it fits"))
    };
    let host = |name: &str, cores: u64| HostRecord {
        name: name.into(),
        version: String::new(),
        addresses: Addresses::default(),
        hardware: Resources::new(cores * 1000, cores << 30, 0),
        processor: String::new(),
        labels: vec![("zone".into(), "a".into())],
        cell: 0,
        returns: 0,
        certificate: people.lessor_certificate.clone(),
    };
    let firm = || vec![Class::Firm];
    let small = offer(4, firm(), 1);
    let dear = offer(4, firm(), 2);
    let full = offer(0, firm(), 1);
    let idle = offer(0, Vec::new(), 1);
    let hosts = [
        ("cheap", host("cheap", 4), Some(&small), true, false),
        ("dear", host("dear", 4), Some(&dear), true, false),
        ("lately", host("lately", 4), Some(&small), true, true),
        ("full", host("full", 4), Some(&full), true, false),
        ("tiny", host("tiny", 1), Some(&full), true, false),
        ("down", host("down", 4), Some(&small), false, false),
        ("idle", host("idle", 4), Some(&idle), true, false),
        ("silent", host("silent", 4), None, true, false),
    ];
    let key = |n: usize| KeyId([u8::try_from(n).expect("few") + 1; 32]);
    let candidates: Vec<_> = (0..)
        .zip(&hosts)
        .map(|(n, (_, host, offer, up, avoided))| Candidate {
            key: key(n),
            host: Some(host),
            offer: *offer,
            up: *up,
            avoided: *avoided,
            quarantined: false,
            record: (0, 0),
        })
        .collect();
    let two = Want { shape: Resources::new(2000, 2 << 30, 0), ..want() };
    let names = |want: &Want| {
        let ranking = rank(want, &candidates, &mut Dice::new(7));
        let choices: Vec<_> = ranking.choices.iter().map(|c| c.name.clone()).collect();
        (choices, ranking)
    };
    let (chosen, ranking) = names(&two);
    assert_eq!(chosen, ["cheap", "dear", "lately", "full"]);
    assert!(ranking.choices[3].why.contains("too little free"), "{:?}", ranking.choices[3]);
    for (name, why) in
        [("tiny", "cpu"), ("down", "down"), ("idle", "sells nothing"), ("silent", "offers nothing")]
    {
        let against = ranking.against.iter().find(|host| host.name == name).expect(name);
        assert!(against.reasons.iter().any(|said| said.contains(why)), "{against:?}");
    }
    // Who names hosts says in which order; who was full or failed still comes last.
    let named = Want { lessors: vec![key(3), key(1), key(0), key(5)], ..two.clone() };
    assert_eq!(names(&named).0, ["dear", "cheap", "full"]);
    for (none, why) in [
        (Want { max_hourly: Amount(1), ..two.clone() }, "price"),
        (Want { longest: Span::secs(601), ..two.clone() }, "term"),
        (Want { runtime: "oci".into(), ..two.clone() }, "runtime"),
        (Want { labels: vec![("zone".into(), "b".into())], ..two.clone() }, "zone=b"),
        (Want { isolation: vec!["vm".into()], ..two.clone() }, "vm"),
        (Want { class: Class::Slack, ..two.clone() }, "slack"),
        (Want { shape: Resources::new(9000, 1 << 30, 0), ..two }, "cpu"),
    ] {
        let (chosen, ranking) = names(&none);
        assert_eq!(chosen, Vec::<String>::new(), "{why}");
        let against = ranking.against.iter().find(|host| host.name == "cheap").expect("cheap");
        assert!(against.reasons.iter().any(|said| said.contains(why)), "{why}: {against:?}");
    }
}

// --- pricing ---

#[test]
fn offers_follow_changes_within_their_pace_and_are_honoured_for_a_while() {
    let people = People::new();
    let policy = Policy {
        selling: true,
        rates: People::rates(),
        slack_permille: None,
        early: People::early(),
        max_term: Span::secs(60),
        max_claim_within: Span::secs(60),
        runtimes: vec!["wasm".into()],
        isolation: Vec::new(),
    };
    let mut pricing = Pricing::new(policy);
    let hand = people.hand(1);
    let free = |n: u64| Resources::new(n * 1000, n << 30, 0);
    let mut offers: Vec<(u64, Draft)> = Vec::new();
    for (n, at) in (0..4_000).step_by(10).enumerate() {
        pricing.changed();
        let offer = pricing.publish(now(at), &free(1 + n as u64), &hand).expect("it fits");
        offers.extend(offer.map(|offer| (at, offer)));
    }
    assert!((8..=11).contains(&offers.len()), "a burst, then two a second: {}", offers.len());
    let (at, first) = offers.first().expect("there is one");
    let id = first.id();
    let order = |offer| Order {
        offer,
        shape: free(1),
        ..people.order_body(1, 1, Span::secs(60), Span::secs(1))
    };
    let quoted = |at: u64| pricing.quote(Boot(at), &order(id)).and_then(|honoured| honoured.rate);
    assert_eq!(quoted(*at), People::rates().hourly(&free(1)));
    assert!(quoted(at + HONOUR.as_millis()).is_some());
    assert!(quoted(at + HONOUR.as_millis() + 1).is_none(), "too old");
    assert!(pricing.quote(Boot(0), &order(Hash::default())).is_none(), "not ours");
    // Nothing changed: nothing is said until it must be refreshed, or is restated.
    let say = |at: u64, pricing: &mut Pricing| {
        pricing.publish(now(at), &free(400), &hand).expect("it fits").is_some()
    };
    assert!(say(20_000, &mut pricing));
    assert!(!say(21_000, &mut pricing) && !say(300_000, &mut pricing));
    pricing.restate();
    assert!(say(301_000, &mut pricing));
    assert!(say(301_000 + 300_000, &mut pricing), "refreshed");
    let order = people.order_body(1, 1, Span::secs(60), Span::secs(1));
    let sold = [
        (order.clone(), true),
        (Order { longest: Span::secs(61), ..order.clone() }, false),
        (Order { class: Class::Slack, ..order.clone() }, false),
        (Order { claim_within: Span::secs(61), ..order.clone() }, false),
        (Order { receipt_every: Span::millis(1), ..order }, false),
    ];
    for (order, expected) in sold {
        assert_eq!(pricing.sells(&order).is_ok(), expected, "{order:?}");
    }
    assert!(pricing.nothing().shapes.is_empty());
}

// --- the map ---

fn offer(people: &People, epoch: u64, seq: u64, not_after: Wall, price: u64) -> RecordSaid {
    let mut offer: Offer = body_of(&people.offer());
    offer.rates.cpu_hour = Amount(price);
    let hand = Hand { epoch, ..people.hand(1) };
    let draft = hand.draft(key_subject(&hand.me), seq, not_after, &offer).expect("it fits");
    let signed = people.lessor.sign(&draft).expect("it is its signer's");
    verify_record(&signed, &people.fabric).expect("it holds")
}

#[test]
fn the_newest_record_wins_and_two_bodies_are_a_proof() {
    let people = People::new();
    let soon = WALL + Span::secs(600);
    let take = |spread: &mut Spread, said: RecordSaid| spread.take(Boot(0), WALL, said, None);
    let mut spread = Spread::default();
    let is = |taken: Taken, word: &str| {
        assert!(format!("{taken:?}").starts_with(word), "{taken:?} is no {word}");
    };
    is(take(&mut spread, offer(&people, 2, 5, soon, 1)), "New");
    is(take(&mut spread, offer(&people, 2, 5, soon, 1)), "Known");
    is(take(&mut spread, offer(&people, 2, 4, soon, 1)), "Known");
    is(take(&mut spread, offer(&people, 1, 9, soon, 1)), "Known");
    is(take(&mut spread, offer(&people, 2, 5, soon, 2)), "Equivocation");
    is(take(&mut spread, offer(&people, 3, 1, soon, 1)), "New");
    is(take(&mut spread, offer(&people, 3, 2, Wall(WALL.0 - 1), 1)), "Refused");
    is(take(&mut spread, offer(&people, 3, 2, WALL + Span::secs(9_000), 1)), "Refused");
    let newest = spread.offer(&people.lessor.id()).expect("known").0.header();
    assert_eq!((newest.epoch, newest.seq), (3, 1));
    spread.expire(soon + Span::millis(1));
    assert!(spread.is_empty());
}

#[test]
fn news_go_to_every_link_but_the_one_they_came_from() {
    let people = People::new();
    let soon = WALL + Span::secs(600);
    let [a, b] = [KeyId([1; 32]), KeyId([2; 32])];
    let mut spread = Spread::default();
    spread.linked(a);
    spread.linked(b);
    spread.take(Boot(0), WALL, offer(&people, 1, 1, soon, 1), Some(&a));
    let due = spread.next_wake().expect("there are news");
    assert!(spread.announcements(Boot(due.0 - 1)).is_empty(), "they are collected");
    let told: Vec<_> =
        spread.announcements(due).into_iter().filter(|(_, n)| !n.is_empty()).collect();
    assert_eq!(told.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [b]);
    assert_eq!(spread.next_wake(), None);
    // A new life is told to whoever sent it too: the link may lead to another holder of the key.
    spread.take(due, WALL, offer(&people, 2, 1, soon, 1), Some(&a));
    let due = spread.next_wake().expect("there are news");
    assert_eq!(spread.announcements(due).len(), 2);
}

#[test]
fn comparison_finds_what_is_missing_older_or_contradicted() {
    let people = People::new();
    let soon = WALL + Span::secs(600);
    let with = |said: Option<RecordSaid>| {
        let mut spread = Spread::default();
        if let Some(said) = said {
            spread.take(Boot(0), WALL, said, None);
        }
        spread
    };
    let newer = || offer(&people, 1, 2, soon, 1);
    // Theirs, whether we pull, whether we send.
    let table = [
        ("the same", Some(newer()), false, false),
        ("nothing there", None, false, true),
        ("older there", Some(offer(&people, 1, 1, soon, 1)), false, true),
        ("newer there", Some(offer(&people, 2, 1, soon, 1)), true, false),
        ("another body there", Some(offer(&people, 1, 2, soon, 2)), true, true),
    ];
    for (what, theirs, pulls, sends) in table {
        let (ours, theirs) = (with(Some(newer())), with(theirs));
        let (buckets, names) = theirs.differing(&ours.digest());
        assert_eq!(!ours.lacking(&names).is_empty(), pulls, "{what}");
        assert_eq!(!ours.ahead_of(&buckets, &names).is_empty(), sends, "{what}");
        let sent = ours.batches(&ours.ahead_of(&buckets, &names));
        assert_eq!(sent.iter().flatten().count() == 1, sends, "{what}");
    }
}

// --- admission ---

#[test]
fn certificates_admit_one_key_in_one_role_for_a_time() {
    let people = People::new();
    let admission = Admission::found(&people.charter).expect("it founds");
    let key = people.lessor.id();
    let body = Certificate {
        organisation: "acme".into(),
        name: "n".into(),
        role: Role::Node,
        key,
        not_before: WALL,
    };
    let until = WALL + Span::secs(100);
    let by = |signer, subject: Hash, body: &Certificate| -> Verified<Certificate> {
        let signed = people::sign_until(people.fabric, signer, subject, until, body);
        signed.verify(&people.fabric).expect("it is signed")
    };
    let subject = key_subject(&key);
    let good = by(&people.root, subject, &body);
    let table = [
        ("good", good.clone(), Role::Node, WALL, Ok(())),
        ("within patience", good.clone(), Role::Node, Wall(WALL.0 - 5_000), Ok(())),
        ("too early", good.clone(), Role::Node, Wall(WALL.0 - 5_001), Err(NotAdmitted::NotYet)),
        ("just over", good.clone(), Role::Node, until + Span::secs(5), Ok(())),
        ("over", good.clone(), Role::Node, until + Span::millis(5_001), Err(NotAdmitted::Expired)),
        ("another role", good, Role::Tenant, WALL, Err(NotAdmitted::Role)),
        (
            "by itself",
            by(&people.lessor, subject, &body),
            Role::Node,
            WALL,
            Err(NotAdmitted::Issuer),
        ),
        (
            "in another's name",
            by(&people.root, subject, &Certificate { organisation: "b".into(), ..body.clone() }),
            Role::Node,
            WALL,
            Err(NotAdmitted::Organisation),
        ),
        (
            "about another key",
            by(&people.root, key_subject(&people.tenant.id()), &body),
            Role::Node,
            WALL,
            Err(NotAdmitted::Key),
        ),
    ];
    for (what, certificate, role, at, expected) in table {
        assert_eq!(admission.admits(&certificate, &key, role, at), expected, "{what}");
    }
}

#[test]
fn papers_entitle_within_their_mandate() {
    let people = People::new();
    let admission = Admission::found(&people.charter).expect("it founds");
    let order = people.order_body(1, 1, Span::secs(60), Span::secs(1));
    let order = Order { ceiling: Amount(100), cap: Amount(100), ..order };
    let terms: Mandate = {
        let mandate: Verified<Mandate> = people.mandate.verify(&people.fabric).expect("signed");
        mandate.body().clone()
    };
    let tenant: Verified<Certificate> =
        people.tenant_certificate.verify(&people.fabric).expect("signed");
    let node: Verified<Certificate> =
        people.delegate_certificate.verify(&people.fabric).expect("signed");
    let judge = |terms: &Mandate, order: &Order, certificate: &Verified<Certificate>, at: Wall| {
        let subject = key_subject(&people.delegate.id());
        let mandate = people::sign(people.fabric, &people.tenant, subject, terms);
        let order = Order { authority: Authority::Mandate(mandate.clone()), ..order.clone() };
        let mandate: Verified<Mandate> = mandate.verify(&people.fabric).expect("signed");
        admission.entitles(&people.order(&order), Some(&mandate), certificate, at)
    };
    assert_eq!(judge(&terms, &order, &tenant, WALL), Ok(()));
    let late = WALL + Span::secs(3_700);
    let table = [
        ("not a tenant", judge(&terms, &order, &node, WALL)),
        ("over", judge(&terms, &order, &tenant, late)),
        (
            "other lessors",
            judge(
                &Mandate { lessors: vec![KeyId([9; 32])], ..terms.clone() },
                &order,
                &tenant,
                WALL,
            ),
        ),
        (
            "price",
            judge(&Mandate { max_hourly: Amount(99), ..terms.clone() }, &order, &tenant, WALL),
        ),
        (
            "total",
            judge(&Mandate { max_total: Amount(99), ..terms.clone() }, &order, &tenant, WALL),
        ),
        (
            "term",
            judge(&Mandate { max_term: Span::secs(59), ..terms.clone() }, &order, &tenant, WALL),
        ),
        (
            "another delegate",
            judge(&Mandate { delegate: KeyId([9; 32]), ..terms }, &order, &tenant, WALL),
        ),
    ];
    for (what, judged) in &table {
        assert!(judged.is_err(), "{what}");
    }
    assert_eq!(table[6].1, Err(NotEntitled::Parties));
    // Signed by the delegate, but said to be signed by the lessee.
    let authority = Authority::Lessee(people.tenant_certificate.clone());
    let order = people.order(&Order { authority, ..order });
    assert_eq!(admission.entitles(&order, None, &tenant, WALL), Err(NotEntitled::Signer));
}

#[test]
fn an_order_is_no_record() {
    let people = People::new();
    let order = people.order(&people.order_body(1, 1, Span::secs(60), Span::secs(1)));
    assert!(verify_record(order.signed(), &people.fabric).is_err());
}

// --- conduct ---

/// Two offers that one key signed under one version.
fn two_offers(people: &People, epoch: u64) -> Equivocation {
    let signed = |price| match offer(people, epoch, 1, WALL + Span::secs(60), price) {
        RecordSaid::Offer(offer) => offer.signed().clone(),
        _ => panic!("an offer"),
    };
    Equivocation { first: signed(1), second: signed(2) }
}

fn reinstated(people: &People, above: u64) -> Verified<Reinstatement> {
    let body = Reinstatement { organisation: "acme".into(), key: people.lessor.id(), above };
    let subject = key_subject(&people.lessor.id());
    let signed = people::sign(people.fabric, &people.root, subject, &body);
    signed.verify(&people.fabric).expect("it is signed")
}

#[test]
fn two_things_under_one_version_prove_it_and_nothing_else_does() {
    let people = People::new();
    let good = two_offers(&people, 3);
    let convicted = good.check(&people.fabric).expect("it proves it");
    assert_eq!((convicted.signer(), convicted.header().epoch), (people.lessor.id(), 3));
    let other = two_offers(&people, 4);
    let tampered = |change: fn(&mut Signed)| {
        let mut proof = good.clone();
        change(&mut proof.second);
        proof.check(&people.fabric)
    };
    assert_eq!(
        Equivocation { first: good.first.clone(), second: good.first.clone() }
            .check(&people.fabric),
        Err(NotEquivocation::Same)
    );
    assert_eq!(
        Equivocation { first: good.first.clone(), second: other.second }.check(&people.fabric),
        Err(NotEquivocation::Differ("their epoch"))
    );
    assert!(matches!(tampered(|s| s.signature.0[0] ^= 1), Err(NotEquivocation::Object(_))));
    assert!(matches!(
        tampered(|s| s.envelope = s.envelope[..9].into()),
        Err(NotEquivocation::Object(_))
    ));
    let zero = leasehold_proto::base::id::FabricId::default();
    assert!(matches!(good.check(&zero), Err(NotEquivocation::Object(_))), "of another fabric");
    // A lessee may word a request anew: both orders are its own affair.
    let order = |term| {
        let body = people.order_body(1, 1, Span::secs(term), Span::secs(1));
        people.order(&body).signed().clone()
    };
    let orders = Equivocation { first: order(10), second: order(11) };
    assert_eq!(orders.check(&people.fabric), Err(NotEquivocation::Kind(Kind::Order)));
}

#[test]
fn a_key_is_quarantined_until_it_is_reinstated_above_what_it_did() {
    let people = People::new();
    let key = people.lessor.id();
    let convict = |conduct: &mut Conduct, epoch| {
        let conviction = two_offers(&people, epoch).check(&people.fabric).expect("a proof");
        conduct.convict(conviction)
    };
    let mut conduct = Conduct::default();
    assert!(!conduct.is_quarantined(&key) && conduct.floor(&key) == 0);
    assert!(convict(&mut conduct, 5) && conduct.is_quarantined(&key));
    assert!(!convict(&mut conduct, 5) && !convict(&mut conduct, 4), "one proof is enough");
    assert!(conduct.reinstate(reinstated(&people, 4)), "it is news");
    assert!(conduct.is_quarantined(&key), "but not above what it did");
    assert!(conduct.reinstate(reinstated(&people, 5)) && !conduct.is_quarantined(&key));
    assert!(!conduct.reinstate(reinstated(&people, 3)) && conduct.floor(&key) == 5);
    assert_eq!(conduct.convictions().count(), 0, "what is forgiven is not told any more");
    assert!(!convict(&mut conduct, 5), "what was forgiven is no news");
    assert!(convict(&mut conduct, 6) && conduct.is_quarantined(&key), "a new lie is");
    assert_eq!((conduct.convictions().count(), conduct.reinstatements().count()), (1, 1));
}
