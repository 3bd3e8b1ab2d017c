//! The lessor's book: a table of what it decides, and what holds under any order of events.

#[path = "common/people.rs"]
mod people;

use std::collections::{BTreeMap, VecDeque};

use leasehold_proto::base::id::LeaseId;
use leasehold_proto::base::money::Amount;
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::{BootId, Now, Span, Wall};
use leasehold_proto::minds::book::{self, Acted, Book, Lent, Placed, Quote, Stage, Turn};
use leasehold_proto::minds::holdings::act_id;
use leasehold_proto::words::contract::{Claim, EndReason, Order, Reason, Release, Termination};
use leasehold_proto::words::sign::{Draft, Verified};
use leasehold_proto::words::usage::{Acknowledgement, Outcome, Receipt, Usage};
use people::{People, body_of, grant_of, job, now};
use proptest::prelude::*;

const SECOND: Span = Span::secs(1);

fn claim(people: &People, lease: LeaseId) -> Verified<Claim> {
    people.acts(lease.0, &Claim { lease, act: act_id(&lease, "claim"), job: job() })
}

fn release(people: &People, lease: LeaseId) -> Verified<Release> {
    people.acts(lease.0, &Release { lease, act: act_id(&lease, "release") })
}

fn ten_seconds(people: &People, request: u8) -> Verified<Order> {
    people.order(&people.order_body(request, 1, Span::secs(10), Span::secs(2)))
}

fn stage(book: &Book, lease: &LeaseId) -> Stage {
    book.get(lease).expect("it is known").kept.stage
}

#[test]
fn orders_are_judged_by_price_room_and_request() {
    let people = People::new();
    let base = people.order_body(1, 1, Span::secs(10), SECOND);
    let offer = people.offer();
    let rate = Some(Amount(36_000_000_000));
    let early = People::early();
    let good = Quote { offer: Some((&offer, rate, early)), sold: Ok(()) };
    let table = [
        ("no such offer", base.clone(), Quote { offer: None, sold: Ok(()) }, Reason::StaleOffer),
        (
            "not sold",
            base.clone(),
            Quote { offer: Some((&offer, rate, early)), sold: Err(Vec::new()) },
            Reason::NotOffered,
        ),
        (
            "no price",
            base.clone(),
            Quote { offer: Some((&offer, None, early)), sold: Ok(()) },
            Reason::NotOffered,
        ),
        (
            "too dear",
            Order { ceiling: Amount(1), ..base.clone() },
            Quote { offer: Some((&offer, rate, early)), sold: Ok(()) },
            Reason::Price,
        ),
        ("too large", people.order_body(1, 5, Span::secs(10), SECOND), good, Reason::Capacity),
    ];
    for (what, body, quote, expected) in table {
        let mut book = people.book(4, 1);
        match book.place(now(0), &people.order(&body), &quote) {
            Placed::Refused(reason, figures) => {
                assert_eq!(reason, expected, "{what}");
                let told = matches!(reason, Reason::Capacity | Reason::Price);
                assert_eq!(!figures.is_empty(), told, "{what}: a refusal carries the truth");
            }
            other => panic!("{what}: {other:?}"),
        }
        assert!(book.promised().is_nothing(), "{what}: a refusal promises nothing");
    }
}

#[test]
fn a_request_makes_one_lease_whatever_comes_after() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let order = ten_seconds(&people, 1);
    let (lease, grant) = people.granted(&mut book, now(0), &order);
    // The same order, at once and after the lease is over: the same bytes.
    for at in [1, 5_000] {
        for turn in book.due(now(at).boot) {
            assert_eq!(turn, Turn::Lapsed(lease));
            book.drain(now(at), &lease, EndReason::Lapsed, people.lessor.id());
            book.finish(now(at), &lease).expect("it ends");
        }
        match people.place(&mut book, now(at), &order) {
            Placed::Repeat(again) => assert_eq!(again, grant),
            other => panic!("{other:?}"),
        }
    }
    // Another order with the same request is a conflict, also when the first is over.
    let other = people.order(&people.order_body(1, 2, Span::secs(10), SECOND));
    let placed = people.place(&mut book, now(6_000), &other);
    assert!(matches!(placed, Placed::Refused(Reason::Conflict, _)), "{placed:?}");
    // Nor does it make a second lease once it is forgotten and the wall clock is set back.
    let late = Now { wall: people::WALL + Span::secs(40), ..now(7_000) };
    assert_eq!(book.prune(late, |_| true).len(), 1);
    for order in [&order, &other] {
        let placed = people.place(&mut book, now(7_001), order);
        assert!(matches!(placed, Placed::Refused(Reason::Expired, _)), "{placed:?}");
    }
    assert!(book.promised().is_nothing());
}

/// Brings a granted lease into a stage.
type Reach = fn(&People, &mut Book, LeaseId);

#[test]
fn acts_by_stage() {
    let people = People::new();
    let reach: [(&str, Reach); 4] = [
        ("granted", |_, _, _| {}),
        ("active", |people, book, lease| {
            assert!(matches!(book.claim(now(10), &claim(people, lease), true), Acted::Accepted(_)));
        }),
        ("draining", |people, book, lease| {
            book.claim(now(10), &claim(people, lease), true);
            assert!(book.drain(now(20), &lease, EndReason::Term, people.lessor.id()));
        }),
        ("ended", |people, book, lease| {
            book.drain(now(20), &lease, EndReason::Lapsed, people.lessor.id());
            book.finish(now(20), &lease).expect("it ends");
        }),
    ];
    // What another claim (other act, other bytes) and a release come to in each.
    let expected = [
        (None, None),
        (Some(Reason::InUse), None),
        (Some(Reason::Ended), None),
        (Some(Reason::Ended), Some(Reason::Ended)),
    ];
    for ((name, reach), (claims, releases)) in reach.into_iter().zip(expected) {
        for which in ["claim", "release"] {
            let mut book = people.book(4, 1);
            let (lease, _) = people.granted(&mut book, now(0), &ten_seconds(&people, 1));
            reach(&people, &mut book, lease);
            let acted = if which == "claim" {
                let act = act_id(&lease, "another");
                let other = people.acts(lease.0, &Claim { lease, act, job: job() });
                book.claim(now(30), &other, true)
            } else {
                book.release(now(30), &release(&people, lease))
            };
            let expected = if which == "claim" { claims } else { releases };
            match (acted, expected) {
                (Acted::Accepted(_), None) => {}
                (Acted::Refused(reason, _), Some(expected)) => assert_eq!(reason, expected),
                (acted, expected) => panic!("{which} when {name}: {acted:?}, not {expected:?}"),
            }
        }
    }
}

#[test]
fn acts_of_strangers_conflicts_and_late_claims_are_refused() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let (lease, _) = people.granted(&mut book, now(0), &ten_seconds(&people, 1));
    let stranger = people::sign(people.fabric, &people.root, lease.0, claim(&people, lease).body());
    let stranger = stranger.verify(&people.fabric).expect("it is signed");
    let acted = book.claim(now(1), &stranger, true);
    assert!(matches!(acted, Acted::Refused(Reason::NotAdmitted, _)), "{acted:?}");
    let unknown = LeaseId::default();
    let acted = book.claim(now(1), &claim(&people, unknown), true);
    assert!(matches!(acted, Acted::Refused(Reason::UnknownLease, _)), "{acted:?}");
    let acted = book.claim(now(1), &claim(&people, lease), false);
    assert!(matches!(acted, Acted::Refused(Reason::NotOffered, _)), "no such runtime: {acted:?}");
    // At `claim_within` it is over, even before the lapse was noticed.
    let acted = book.claim(now(2_000), &claim(&people, lease), true);
    assert!(matches!(acted, Acted::Refused(Reason::Ended, _)), "{acted:?}");

    let (lease, _) = people.granted(&mut book, now(3_000), &ten_seconds(&people, 2));
    let Acted::Accepted(first) = book.claim(now(3_001), &claim(&people, lease), true) else {
        panic!("it is in time");
    };
    match book.claim(now(9_000), &claim(&people, lease), true) {
        Acted::Repeat(again) => assert_eq!(again, first, "the same bytes"),
        other => panic!("{other:?}"),
    }
    let mut job = job();
    job.args.push("other".into());
    let other = people.acts(lease.0, &Claim { lease, act: act_id(&lease, "claim"), job });
    let acted = book.claim(now(9_000), &other, true);
    assert!(matches!(acted, Acted::Refused(Reason::Conflict, _)), "{acted:?}");
}

#[test]
fn the_end_of_a_term_is_due_once_and_billing_stops_there() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let (lease, grant) = people.granted(&mut book, now(0), &ten_seconds(&people, 1));
    book.claim(now(500), &claim(&people, lease), true);
    // The clock is read late: one end is due, not one for ever.
    assert_eq!(
        book.due(now(12_345).boot),
        [Turn::Drain(lease, EndReason::Term, people.lessor.id())]
    );
    assert_eq!(book.due(now(12_345).boot), [], "the caller has it");
    book.drain(now(12_345), &lease, EndReason::Term, people.lessor.id());
    assert!(book.finish(now(12_400), &lease).is_none(), "its job is there still");
    assert!(!book.promised().is_nothing(), "so is what it holds");
    assert!(book.reaped(&lease, Outcome::Deadline));
    let (_, receipt) = book.receipt(now(12_500), &lease).expect("the final one");
    let receipt: Receipt = body_of(&receipt);
    assert_eq!(receipt.usage.billed, Span::millis(9_500), "from the claim to the term's end");
    assert_eq!(receipt.charge, grant_of(&grant).rate.per_hour_over(Span::millis(9_500)));
    assert_eq!(receipt.end, Some(EndReason::Term));
    let end: Termination = body_of(&book.finish(now(12_500), &lease).expect("it ends"));
    assert_eq!((end.charge, end.billed), (receipt.charge, receipt.usage.billed));
    assert!(book.promised().is_nothing() && book.receipt(now(13_000), &lease).is_none());
    assert!(book.finish(now(13_000), &lease).is_none(), "ended is final");
}

#[test]
fn exposure_ends_nobody_who_answers_and_everybody_who_does_not() {
    let people = People::new();
    let cent = Amount(10_000_000);
    // One receipt in the whole term is all that was asked for.
    let body = Order {
        exposure: Amount(cent.0 * 4),
        receipt_every: Span::secs(60),
        ..people.order_body(1, 1, Span::secs(60), SECOND)
    };
    for answers in [true, false] {
        let mut book = people.book(4, 1);
        let (lease, _) = people.granted(&mut book, now(0), &people.order(&body));
        book.claim(now(0), &claim(&people, lease), true);
        let (mut receipts, mut ended, mut frozen) = (0, None, None);
        let mut at = 0;
        while let Some(next) = book.next_wake().filter(|next| next.0 < 100_000) {
            at = next.0.max(at);
            for turn in book.due(now(at).boot) {
                match turn {
                    Turn::Receipt(_) => {
                        let (number, draft) = book.receipt(now(at), &lease).expect("a receipt");
                        receipts += 1;
                        if answers {
                            let charge = body_of::<Receipt>(&draft).charge;
                            let receipt = draft.id();
                            let ack = Acknowledgement { lease, number, receipt, charge };
                            let ack = people.acts(lease.0, &ack);
                            assert_eq!(book.acknowledge(now(at + 1_500).boot, &ack), Some(false));
                        }
                    }
                    Turn::Drain(_, reason, _) => {
                        book.drain(now(at), &lease, reason, people.lessor.id());
                        ended = Some((reason, at));
                    }
                    Turn::Freeze(_) => {
                        frozen.get_or_insert(at);
                        assert!(book.freeze(now(at).boot, &lease));
                    }
                    Turn::Lapsed(_) => panic!("it was claimed"),
                }
            }
        }
        if answers {
            assert_eq!(ended, Some((EndReason::Term, 60_000)), "{receipts} receipts");
            assert!((25..40).contains(&receipts), "one for each half of the limit: {receipts}");
        } else {
            let (reason, at) = ended.expect("it ends");
            assert_eq!((reason, receipts), (EndReason::Exposure, 8), "no more are written");
            let frozen = frozen.expect("it stands still first");
            assert!((4_000..5_000).contains(&frozen), "at {frozen}");
            assert_eq!(at, frozen + 2_000, "it ends unless somebody answers meanwhile");
        }
    }
}

#[test]
fn a_lease_whose_last_receipt_nobody_countersigns_is_not_remembered_for_ever() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let (lease, _) = people.granted(&mut book, now(0), &ten_seconds(&people, 1));
    book.claim(now(0), &claim(&people, lease), true);
    book.drain(now(1_000), &lease, EndReason::Released, people.delegate.id());
    book.reaped(&lease, Outcome::Exited(0));
    book.receipt(now(1_000), &lease).expect("the final one");
    book.finish(now(1_000), &lease).expect("a termination");
    assert!(book.prune(now(600_000), |_| true).is_empty(), "its countersignature may come");
    let kept = &book.get(&lease).expect("known").kept;
    assert!(!book::is_past(kept, now(2_000_000).wall), "a restart asks for it again");
    assert_eq!(book.prune(now(2_000_000), |_| true).len(), 1);
}

#[test]
fn budget_and_exposure_end_a_lease_before_its_term() {
    let people = People::new();
    let base = people.order_body(1, 1, Span::secs(60), SECOND);
    // 36 an hour is a hundredth a second.
    let cent = Amount(10_000_000);
    let table = [
        ("budget", Order { cap: Amount(cent.0 * 5 - 1), ..base.clone() }, EndReason::Budget),
        ("exposure", Order { exposure: Amount(cent.0 * 3), ..base }, EndReason::Exposure),
    ];
    for (what, body, expected) in table {
        let mut book = people.book(4, 1);
        let (lease, grant) = people.granted(&mut book, now(0), &people.order(&body));
        book.claim(now(0), &claim(&people, lease), true);
        let (mut ended, mut frozen) = (None, None);
        for at in (0..30_000).step_by(100) {
            for turn in book.due(now(at).boot) {
                match turn {
                    Turn::Receipt(_) => {
                        book.receipt(now(at), &lease);
                    }
                    Turn::Drain(_, reason, _) => {
                        book.drain(now(at), &lease, reason, people.lessor.id());
                        ended = Some((reason, at));
                    }
                    Turn::Freeze(_) => {
                        frozen.get_or_insert(at);
                        assert!(book.freeze(now(at).boot, &lease));
                    }
                    Turn::Lapsed(_) => panic!("it was claimed"),
                }
            }
        }
        let (reason, at) = ended.unwrap_or_else(|| panic!("{what} ends it"));
        assert_eq!(reason, expected);
        let stopped = frozen.unwrap_or(at);
        assert!((3_000..=5_100).contains(&stopped), "{what}: at {stopped}");
        book.reaped(&lease, Outcome::Stopped);
        let (_, last) = book.receipt(now(30_000), &lease).expect("the final one");
        let last: Receipt = body_of(&last);
        assert!(last.charge <= grant_of(&grant).cap, "{what}");
    }
}

#[test]
fn a_restart_knows_everything_that_was_kept() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let order = ten_seconds(&people, 1);
    let (lease, grant) = people.granted(&mut book, now(0), &order);
    let Acted::Accepted(answer) = book.claim(now(10), &claim(&people, lease), true) else {
        panic!("accepted");
    };
    let first = book.receipt(now(1_010), &lease).expect("a receipt");
    let kept = book.get(&lease).expect("known").kept.clone();
    // The next receipt reached the disk, the chain that holds it did not.
    let torn = book.receipt(now(2_010), &lease).expect("another");
    let mut book = people.book(4, 2);
    let receipts = VecDeque::from([torn, first.clone()]);
    assert_eq!(book.restore(now(0).boot, kept, receipts), Some(lease));
    assert_eq!(*book.promised(), Resources::new(1000, 1 << 30, 0));
    let known = book.get(&lease).expect("known");
    assert_eq!(known.unacknowledged, [first], "what never left is not sent now");
    assert!(known.running, "its job is to be accounted for");
    match people.place(&mut book, now(3_000), &order) {
        Placed::Repeat(again) => assert_eq!(again, grant),
        other => panic!("{other:?}"),
    }
    match book.claim(now(3_000), &claim(&people, lease), true) {
        Acted::Repeat(again) => assert_eq!(again, answer),
        other => panic!("{other:?}"),
    }
    let (number, second) = book.receipt(now(3_000), &lease).expect("the chain goes on");
    let second: Receipt = body_of(&second);
    assert_eq!((number, second.number), (2, 2));
    // What does not decode is said, not skipped.
    let mut broken: Lent = book.get(&lease).expect("known").kept.clone();
    broken.order.envelope = broken.order.envelope[..10].into();
    assert_eq!(people.book(4, 3).restore(now(0).boot, broken, VecDeque::new()), None);
}

#[test]
fn after_a_reboot_a_lease_is_lost_and_billed_to_its_last_receipt() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let (lease, _) = people.granted(&mut book, now(100_000), &ten_seconds(&people, 1));
    book.claim(now(100_000), &claim(&people, lease), true);
    let receipt = book.receipt(now(104_000), &lease).expect("a receipt");
    let kept = book.get(&lease).expect("known").kept.clone();
    let mut book = people.book(4, 2);
    book.restore(now(0).boot, kept, VecDeque::from([receipt]));
    // The new boot's clock starts from nothing.
    book.rebase(&lease, BootId([8; 16]), now(300).boot);
    book.reaped(&lease, Outcome::Lost);
    book.drain_lost(now(300), &lease);
    let (_, last) = book.receipt(now(300), &lease).expect("the final one");
    let last: Receipt = body_of(&last);
    assert_eq!((last.usage.billed, last.end), (Span::secs(4), Some(EndReason::Lost)));
    assert!(book.finish(now(300), &lease).is_some());
    assert!(book.promised().is_nothing());
}

/// What can happen to a book.
#[derive(Clone, Debug)]
enum Happens {
    Order { request: u8, cores: u64, term: u64 },
    Claim(usize),
    Release(usize),
    Reaped(usize),
    Acknowledged(usize),
    Passed(u64),
    Restarted,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        4 => (0u8..40, 1u64..4, 1u64..20)
            .prop_map(|(request, cores, term)| Happens::Order { request, cores, term }),
        3 => (0usize..40).prop_map(Happens::Claim),
        2 => (0usize..40).prop_map(Happens::Release),
        3 => (0usize..40).prop_map(Happens::Reaped),
        2 => (0usize..40).prop_map(Happens::Acknowledged),
        5 => (0u64..4_000).prop_map(Happens::Passed),
        1 => Just(Happens::Restarted),
    ]
}

/// Everything that a book said, by which it is held to it.
#[derive(Default)]
struct Said {
    grants: BTreeMap<u8, (Verified<Order>, LeaseId, Draft)>,
    stages: BTreeMap<LeaseId, Stage>,
    receipts: BTreeMap<LeaseId, Vec<(u64, Draft)>>,
}

fn act_on(people: &People, book: &mut Book, said: &mut Said, at: Now, happens: Happens) {
    let nth = |said: &Said, n: usize| -> Option<LeaseId> {
        said.grants.values().nth(n % said.grants.len().max(1)).map(|(_, lease, _)| *lease)
    };
    match happens {
        Happens::Order { request, cores, term } => {
            let body = people.order_body(request, cores, Span::secs(term), SECOND);
            let order = people.order_until(&body, Wall(u64::MAX));
            match (people.place(book, at, &order), said.grants.get(&request)) {
                (Placed::Granted(lease, draft), None) => {
                    said.grants.insert(request, (order, lease, draft));
                }
                (Placed::Repeat(draft), Some((known, _, first))) => {
                    assert_eq!(known.id(), order.id(), "a repeat is of the same order");
                    assert_eq!(draft, *first, "and gets the same bytes");
                }
                (Placed::Refused(Reason::Conflict, _), Some((known, ..))) => {
                    assert_ne!(known.id(), order.id());
                }
                (Placed::Refused(Reason::Capacity, _), None) => {
                    assert!(!body.shape.fits(&book.free()));
                }
                (placed, known) => panic!("{placed:?} with {}", known.is_some()),
            }
        }
        Happens::Claim(n) => {
            if let Some(lease) = nth(said, n) {
                book.claim(at, &claim(people, lease), true);
            }
        }
        Happens::Release(n) => {
            let Some(lease) = nth(said, n) else { return };
            if let Acted::Accepted(_) = book.release(at, &release(people, lease)) {
                close(book, said, at, lease);
            }
        }
        Happens::Reaped(n) => {
            let Some(lease) = nth(said, n) else { return };
            if book.get(&lease).is_some_and(|known| known.running)
                && book.reaped(&lease, Outcome::Exited(0))
            {
                close(book, said, at, lease);
            }
        }
        Happens::Acknowledged(n) => {
            let Some(lease) = nth(said, n) else { return };
            let Some((number, draft)) = said.receipts.get(&lease).and_then(|r| r.last()) else {
                return;
            };
            let charge = body_of::<Receipt>(draft).charge;
            let ack = Acknowledgement { lease, number: *number, receipt: draft.id(), charge };
            book.acknowledge(at.boot, &people.acts(lease.0, &ack));
        }
        Happens::Passed(_) => {
            for turn in book.due(at.boot) {
                match turn {
                    Turn::Lapsed(lease) => {
                        book.drain(at, &lease, EndReason::Lapsed, people.lessor.id());
                        close(book, said, at, lease);
                    }
                    Turn::Drain(lease, reason, _) => {
                        book.drain(at, &lease, reason, people.lessor.id());
                        close(book, said, at, lease);
                    }
                    Turn::Freeze(lease) => {
                        assert!(book.freeze(at.boot, &lease));
                    }
                    Turn::Receipt(lease) => {
                        let usage = Usage { cpu: Span::millis(at.boot.0), ..Usage::default() };
                        book.report(&lease, usage);
                        said.receipts.entry(lease).or_default().extend(book.receipt(at, &lease));
                    }
                }
            }
            assert!(book.next_wake().is_none_or(|next| next > at.boot), "nothing is due twice");
        }
        Happens::Restarted => {
            let mut again = people.book(4, 1);
            for (id, lease) in book.leases() {
                let receipts = said.receipts.get(id).cloned().unwrap_or_default();
                assert_eq!(again.restore(at.boot, lease.kept.clone(), receipts.into()), Some(*id));
            }
            assert_eq!(again.promised(), book.promised());
            *book = again;
        }
    }
}

/// What the core does with a lease that drains.
fn close(book: &mut Book, said: &mut Said, at: Now, lease: LeaseId) {
    if book.get(&lease).is_some_and(|known| !known.running) {
        said.receipts.entry(lease).or_default().extend(book.receipt(at, &lease));
        book.finish(at, &lease);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whatever_happens_the_book_keeps_its_word(
        history in proptest::collection::vec(happens(), 1..80)
    ) {
        let people = People::new();
        let mut book = people.book(4, 1);
        let mut said = Said::default();
        let mut ms = 0;
        for happens in history {
            if let Happens::Passed(span) = happens {
                ms += span;
            }
            act_on(&people, &mut book, &mut said, now(ms), happens);
            let mut sum = Resources::default();
            for (id, lease) in book.leases() {
                if lease.kept.stage != Stage::Ended {
                    sum = sum.plus(&lease.terms.shape);
                }
                let was = said.stages.insert(*id, lease.kept.stage);
                prop_assert!(was <= Some(lease.kept.stage), "stages only rise");
                let over = lease.kept.stage == Stage::Ended;
                prop_assert!(!(over && lease.running), "nothing ends before its job is reaped");
            }
            prop_assert_eq!(book.promised(), &sum, "what is promised is the sum of it");
            prop_assert!(sum.fits(book.capacity()), "and never more than there is");
        }
        // Receipts chain, and what they bill fits the lease.
        for (_, lease, grant) in said.grants.values() {
            let mut chain = leasehold_proto::words::chain::Chain::default();
            for (_, draft) in said.receipts.get(lease).into_iter().flatten() {
                let receipt: Receipt = body_of(draft);
                let term = book.get(lease).map_or(Span::ZERO, |known| known.kept.term);
                prop_assert_eq!(chain.check(&grant_of(grant), term, &receipt), Ok(()));
                chain.advance(&receipt, draft.id());
            }
            prop_assert!(!chain.closed() || stage(&book, lease) == Stage::Ended);
        }
    }
}
