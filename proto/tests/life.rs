//! The life of a lease after its claim, at its lessor: renewed, taken back, frozen, member of a
//! gang. And how a delegate brings a gang together.

#[path = "common/people.rs"]
mod people;

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::{Hash, KeyId, LeaseId, RequestId};
use leasehold_proto::base::money::Amount;
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::{Boot, Span};
use leasehold_proto::minds::assembly::{Assembly, Granted, Next};
use leasehold_proto::minds::book::{Acted, Book, Hold, Stage, Turn};
use leasehold_proto::minds::holdings::act_id;
use leasehold_proto::words::contract::{
    Claim, Class, Commit, EndReason, Gang, GangOf, Member, Order, Reason, Release, Renew, Renewal,
    Termination,
};
use leasehold_proto::words::sign::{Signer, Verified};
use leasehold_proto::words::usage::{Acknowledgement, Outcome, Receipt};
use people::{People, body_of, choice, job, now, want};

const SECOND: Span = Span::secs(1);

fn claim(people: &People, lease: LeaseId) -> Verified<Claim> {
    people.acts(lease.0, &Claim { lease, act: act_id(&lease, "claim"), job: job() })
}

fn renew(people: &People, lease: LeaseId, version: u64, seconds: u64) -> Verified<Renew> {
    let term = Span::secs(seconds);
    let act = act_id(&lease, &format!("renew {version} {term}"));
    people.acts(lease.0, &Renew { lease, act, version, term })
}

/// An order for ten seconds that may become a minute.
fn renewable(people: &People, request: u8) -> Order {
    let body = people.order_body(request, 1, Span::secs(10), Span::secs(2));
    Order { longest: Span::secs(60), ..body }
}

fn granted(people: &People, book: &mut Book, at: u64, body: &Order) -> LeaseId {
    let (lease, _) = people.granted(book, now(at), &people.order(body));
    lease
}

fn active(people: &People, book: &mut Book, at: u64, body: &Order) -> LeaseId {
    let lease = granted(people, book, at, body);
    assert!(matches!(book.claim(now(at), &claim(people, lease), true), Acted::Accepted(_)));
    lease
}

fn refused(acted: &Acted) -> Option<Reason> {
    match acted {
        Acted::Refused(reason, _) => Some(*reason),
        _ => None,
    }
}

// --- renewal ---

#[test]
fn a_renewal_moves_the_end_and_never_shortens() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let lease = active(&people, &mut book, 0, &renewable(&people, 1));
    let table = [
        ("shorter", renew(&people, lease, 0, 9), Some(Reason::Term)),
        ("beyond what was agreed", renew(&people, lease, 0, 61), Some(Reason::Term)),
        ("another version", renew(&people, lease, 1, 20), Some(Reason::Version)),
        ("as agreed", renew(&people, lease, 0, 20), None),
        ("the version before", renew(&people, lease, 0, 30), Some(Reason::Version)),
        ("the next one", renew(&people, lease, 1, 30), None),
        ("to the same term", renew(&people, lease, 2, 30), None),
    ];
    for (what, act, expected) in table {
        let before = book.get(&lease).expect("known").kept.clone();
        let acted = book.renew(now(5_000), &act);
        assert_eq!(refused(&acted), expected, "{what}");
        if let Acted::Accepted(answer) = &acted {
            let renewal: Renewal = body_of(answer);
            assert_eq!((renewal.version, renewal.term), (before.version + 1, act.body().term));
            assert_eq!(renewal.of, act.id());
            match book.renew(now(5_001), &act) {
                Acted::Repeat(again) => assert_eq!(&again, answer, "the same bytes"),
                other => panic!("{what}: {other:?}"),
            }
        } else {
            assert_eq!(before, book.get(&lease).expect("known").kept, "{what} changed nothing");
        }
    }
    let known = book.get(&lease).expect("known");
    assert_eq!((known.kept.version, known.kept.term), (3, Span::secs(30)));
    let ends = |at: u64, book: &mut Book| {
        book.due(now(at).boot).iter().any(|turn| matches!(turn, Turn::Drain(..)))
    };
    assert!(!ends(10_000, &mut book), "the old end is none any more");
    assert!(ends(30_000, &mut book));
}

#[test]
fn who_may_not_renew_what_or_no_more() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let lease = active(&people, &mut book, 0, &renewable(&people, 1));
    let other =
        people::sign(people.fabric, &people.root, lease.0, renew(&people, lease, 0, 20).body());
    let other = other.verify(&people.fabric).expect("it is signed");
    assert_eq!(refused(&book.renew(now(1), &other)), Some(Reason::NotAdmitted));
    let none = LeaseId::default();
    assert_eq!(
        refused(&book.renew(now(1), &renew(&people, none, 0, 20))),
        Some(Reason::UnknownLease)
    );
    // At the end of its term it is over, noticed or not; and ended is final.
    assert_eq!(
        refused(&book.renew(now(10_000), &renew(&people, lease, 0, 20))),
        Some(Reason::Ended)
    );
    book.drain(now(10_000), &lease, EndReason::Term, people.lessor.id());
    assert_eq!(
        refused(&book.renew(now(9_000), &renew(&people, lease, 0, 20))),
        Some(Reason::Ended)
    );
    book.reaped(&lease, Outcome::Deadline);
    book.receipt(now(10_100), &lease);
    book.finish(now(10_100), &lease).expect("it ends");
    assert_eq!(
        refused(&book.renew(now(9_000), &renew(&people, lease, 0, 20))),
        Some(Reason::Ended)
    );
    assert_eq!(stage(&book, &lease), Stage::Ended);
    // One that the operator takes back is not made longer.
    let lease = active(&people, &mut book, 20_000, &renewable(&people, 2));
    let freeze = now(25_000).boot;
    let hold =
        Hold { why: EndReason::Revoked, by: people.lessor.id(), freeze, end: freeze + SECOND };
    assert!(book.hold(&lease, hold));
    let acted = book.renew(now(20_100), &renew(&people, lease, 0, 20));
    assert_eq!(refused(&acted), Some(Reason::Withdrawn), "revoke beats renew");
}

fn stage(book: &Book, lease: &LeaseId) -> Stage {
    book.get(lease).expect("known").kept.stage
}

#[test]
fn many_renewals_are_remembered_within_bounds() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let body = Order { longest: Span::secs(600), ..renewable(&people, 1) };
    let lease = active(&people, &mut book, 0, &body);
    for n in 0..100 {
        let acted = book.renew(now(100), &renew(&people, lease, n, 11 + n));
        assert!(matches!(acted, Acted::Accepted(_)), "{n}: {acted:?}");
    }
    let known = book.get(&lease).expect("known");
    assert!(known.kept.acts.len() <= leasehold_proto::minds::book::MAX_ACTS);
    // The claim is never forgotten, the newest renewal neither; an old one is refused.
    assert!(matches!(book.claim(now(200), &claim(&people, lease), true), Acted::Repeat(_)));
    assert!(matches!(book.renew(now(200), &renew(&people, lease, 99, 110)), Acted::Repeat(_)));
    let old = book.renew(now(200), &renew(&people, lease, 0, 11));
    assert_eq!(refused(&old), Some(Reason::Version));
}

#[test]
fn a_longer_term_is_billed_and_no_more() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let lease = active(&people, &mut book, 0, &renewable(&people, 1));
    book.renew(now(9_999), &renew(&people, lease, 0, 20));
    book.drain(now(25_000), &lease, EndReason::Term, people.lessor.id());
    book.reaped(&lease, Outcome::Deadline);
    let (_, receipt) = book.receipt(now(25_100), &lease).expect("the final one");
    assert_eq!(body_of::<Receipt>(&receipt).usage.billed, Span::secs(20));
}

// --- holds: taken back and frozen ---

#[test]
fn a_hold_freezes_then_ends_and_pays_for_what_is_missed() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let body = people.order_body(1, 1, Span::secs(100), SECOND);
    let lease = active(&people, &mut book, 0, &Order { class: Class::Slack, ..body });
    let hold = book.get(&lease).expect("known").hold_within(
        now(20_000).boot,
        Span::secs(30),
        EndReason::Reclaimed,
        people.lessor.id(),
    );
    // Back within 30 s: 2 s to end its job and 2 s frozen are part of that.
    assert_eq!((hold.freeze, hold.end), (Boot(46_000), Boot(48_000)));
    assert!(book.hold(&lease, hold) && !book.hold(&lease, hold), "once");
    let turns = |at: u64, book: &mut Book| -> Vec<Turn> {
        let receipts = |turn: &Turn| matches!(turn, Turn::Receipt(_));
        book.due(now(at).boot).into_iter().filter(|turn| !receipts(turn)).collect()
    };
    assert_eq!(turns(45_999, &mut book), []);
    assert_eq!(turns(46_000, &mut book), [Turn::Freeze(lease)]);
    assert!(book.freeze(now(46_000).boot, &lease));
    assert_eq!(turns(47_999, &mut book), [], "frozen, it is not due for receipts either");
    let by = people.lessor.id();
    assert_eq!(turns(48_000, &mut book), [Turn::Drain(lease, EndReason::Reclaimed, by)]);
    book.drain(now(48_000), &lease, EndReason::Reclaimed, by);
    book.reaped(&lease, Outcome::Stopped);
    let (_, receipt) = book.receipt(now(48_100), &lease).expect("the final one");
    let receipt: Receipt = body_of(&receipt);
    assert_eq!(receipt.usage.billed, Span::secs(46), "frozen is unbilled");
    let end: Termination = body_of(&book.finish(now(48_100), &lease).expect("it ends"));
    assert_eq!((end.reason, end.missed), (EndReason::Reclaimed, Span::secs(54)));
    // Half of what 54 s cost, which is less than was charged for 46.
    assert_eq!(end.credit, Amount(27 * 10_000_000));
}

#[test]
fn a_lifted_hold_leaves_a_lease_as_it_was_but_for_the_pause() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let body = people.order_body(1, 1, Span::secs(100), SECOND);
    let lease = active(&people, &mut book, 0, &body);
    let (why, by) = (EndReason::Reclaimed, people.lessor.id());
    let hold = Hold { why, by, freeze: Boot(10_000), end: Boot(20_000) };
    assert!(book.hold(&lease, hold));
    assert_eq!(book.lift(Boot(9_000), &lease, why), Some(false), "it was not frozen yet");
    assert_eq!(book.lift(Boot(9_000), &lease, why), None, "nothing is left to lift");
    assert!(book.hold(&lease, hold));
    assert!(book.freeze(Boot(10_000), &lease));
    assert_eq!(book.lift(Boot(13_000), &lease, why), Some(true));
    let known = book.get(&lease).expect("known");
    assert_eq!((known.kept.paused, known.kept.frozen), (Span::secs(3), None));
    book.drain(now(20_000), &lease, EndReason::Released, people.delegate.id());
    book.reaped(&lease, Outcome::Stopped);
    let (_, receipt) = book.receipt(now(20_000), &lease).expect("the final one");
    assert_eq!(body_of::<Receipt>(&receipt).usage.billed, Span::secs(17));
}

#[test]
fn a_tenant_who_comes_back_in_time_is_thawed() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let cent = 10_000_000;
    let body =
        Order { exposure: Amount(cent * 3), ..people.order_body(1, 1, Span::secs(60), SECOND) };
    let lease = active(&people, &mut book, 0, &body);
    let (mut at, mut last) = (0, None);
    while book.get(&lease).expect("known").kept.frozen.is_none() {
        at = book.next_wake().expect("something is due").0.max(at);
        for turn in book.due(Boot(at)) {
            match turn {
                Turn::Receipt(_) => last = book.receipt(now(at), &lease),
                Turn::Freeze(_) => assert!(book.freeze(Boot(at), &lease)),
                other => panic!("{other:?}"),
            }
        }
    }
    let (number, draft) = last.expect("it was asked");
    let charge = body_of::<Receipt>(&draft).charge;
    let ack = Acknowledgement { lease, number, receipt: draft.id(), charge };
    let ack = people.acts(lease.0, &ack);
    assert_eq!(book.acknowledge(Boot(at + 1_000), &ack), Some(true), "it goes on");
    let known = book.get(&lease).expect("known");
    assert_eq!((known.kept.paused, known.kept.holds.len()), (Span::secs(1), 0));
    let drains = book.due(Boot(at + 2_100));
    assert!(drains.iter().all(|turn| matches!(turn, Turn::Receipt(_))), "{drains:?}");
}

#[test]
fn slack_is_reclaimed_cheapest_credit_first_and_firm_never() {
    let people = People::new();
    let mut book = people.book(16, 1);
    let by = people.lessor.id();
    let order = |request: u8, cores: u64, term: u64, class: Class| Order {
        class,
        ..people.order_body(request, cores, Span::secs(term), SECOND)
    };
    let firm = active(&people, &mut book, 0, &order(1, 4, 1_000, Class::Firm));
    let soon = active(&people, &mut book, 0, &order(2, 1, 130, Class::Firm));
    let dear = active(&people, &mut book, 0, &order(3, 4, 900, Class::Slack));
    let cheap = active(&people, &mut book, 0, &order(4, 2, 200, Class::Slack));
    let small = active(&people, &mut book, 0, &order(5, 1, 160, Class::Slack));
    let leases = |need: u64, within: u64| {
        let need = Resources::new(need * 1000, 0, 0);
        let plan = book.reclaim_plan(Boot(100_000), &need, Span::secs(within));
        let names: Vec<_> = plan.leases.iter().map(|lease| lease.lease).collect();
        (names, plan.short.cpu_milli / 1000, plan.free.cpu_milli / 1000)
    };
    assert_eq!(leases(4, 60), (vec![], 0, 4), "what is free is enough");
    assert_eq!(leases(5, 60), (vec![soon], 0, 4), "then what ends by itself in time");
    assert_eq!(leases(6, 60), (vec![soon, small], 0, 4), "then the cheapest credit");
    assert_eq!(leases(8, 60), (vec![soon, small, cheap], 0, 4));
    assert_eq!(leases(12, 60), (vec![soon, small, cheap, dear], 0, 4));
    let (all, short, _) = leases(13, 60);
    assert_eq!(
        (all.contains(&firm), short),
        (false, 1),
        "firm leases stay, and it says what lacks"
    );
    assert_eq!(leases(9, 13), (vec![], 5, 4), "within less than their notice nothing is had");
    // A large one that is needed anyway makes the small ones before it needless.
    assert_eq!(leases(10, 60).0.len(), 3);
    let plan = book.reclaim_plan(Boot(100_000), &Resources::new(6000, 0, 0), Span::secs(60));
    let credit = plan.leases.iter().find(|lease| lease.lease == small).expect("it is").credit;
    let hold = book.get(&small).expect("known").hold_within(
        Boot(100_000),
        Span::secs(60),
        EndReason::Reclaimed,
        by,
    );
    book.hold(&small, hold);
    for at in (100_000..160_000).step_by(500) {
        for turn in book.due(Boot(at)) {
            match turn {
                Turn::Freeze(lease) => drop(book.freeze(Boot(at), &lease)),
                Turn::Drain(lease, reason, by) => drop(book.drain(now(at), &lease, reason, by)),
                Turn::Receipt(lease) => drop(book.receipt(now(at), &lease)),
                Turn::Lapsed(_) => panic!("all are claimed"),
            }
        }
    }
    book.reaped(&small, Outcome::Stopped);
    book.receipt(now(160_000), &small);
    let end: Termination = body_of(&book.finish(now(160_000), &small).expect("it ends"));
    assert_eq!((end.reason, end.credit), (EndReason::Reclaimed, credit), "as it was foretold");
}

#[test]
fn what_is_withheld_is_not_granted() {
    let people = People::new();
    let mut book = people.book(4, 1);
    book.withhold(Resources::new(3_000, 3 << 30, 0));
    assert_eq!(book.free(), Resources::new(1_000, 1 << 30, 0));
    granted(&people, &mut book, 0, &people.order_body(1, 1, Span::secs(10), SECOND));
    let order = people.order(&people.order_body(2, 1, Span::secs(10), SECOND));
    let placed = people.place(&mut book, now(0), &order);
    assert!(format!("{placed:?}").contains("Capacity"), "{placed:?}");
}

// --- gangs, at a member's lessor ---

/// A gang of this book's lease and another lessor's, with that one's signer.
fn gang_of(people: &People, lease: LeaseId, size: u8) -> (Gang, Vec<Signer>) {
    let others: Vec<_> = (1..size).map(|n| Signer::from_seed(&[100 + n; 32])).collect();
    let mut members = vec![Member { lessor: people.lessor.id(), lease }];
    members.extend(others.iter().enumerate().map(|(n, signer)| {
        let lease = LeaseId(Hash::of(&[u8::try_from(n).expect("few")]));
        Member { lessor: signer.id(), lease }
    }));
    let (lessee, delegate) = (people.tenant.id(), people.delegate.id());
    (Gang { gang: RequestId([9; 16]), lessee, delegate, members }, others)
}

fn in_gang(people: &People, size: u16) -> Order {
    let gang = Some(GangOf { gang: RequestId([9; 16]), size });
    Order { gang, ..people.order_body(1, 1, Span::secs(10), Span::secs(2)) }
}

#[test]
fn a_member_starts_nothing_before_it_holds_every_word() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let lease = granted(&people, &mut book, 0, &in_gang(&people, 3));
    let (gang, others) = gang_of(&people, lease, 3);
    let certificate = people.acts(lease.0, &gang);
    let no = |book: &mut Book, at| refused(&book.claim(now(at), &claim(&people, lease), true));
    assert_eq!(no(&mut book, 1), Some(Reason::NotCommitted));
    let Acted::Accepted(word) = book.join(now(2), &lease, &certificate) else { panic!("it joins") };
    assert!(
        matches!(book.join(now(3), &lease, &certificate), Acted::Repeat(again) if again == word)
    );
    let say = |signer: &Signer, nth: usize, gang: Hash| -> Verified<Commit> {
        let lease = people_lease(&certificate, nth);
        let signed = people::sign(people.fabric, signer, lease.0, &Commit { gang, lease });
        signed.verify(&people.fabric).expect("it is signed")
    };
    fn people_lease(gang: &Verified<Gang>, nth: usize) -> LeaseId {
        gang.body().members[nth].lease
    }
    let id = certificate.id();
    let table = [
        ("about another gang", say(&others[0], 1, Hash::default()), false),
        ("a stranger's", say(&people.root, 1, id), false),
        ("one member's for another", say(&others[0], 2, id), false),
        ("the first", say(&others[0], 1, id), false),
        ("the first once more", say(&others[0], 1, id), false),
        ("the last", say(&others[1], 2, id), true),
    ];
    for (what, commit, whole) in table {
        assert_eq!(no(&mut book, 4), Some(Reason::NotCommitted), "before {what}");
        assert_eq!(book.committed(&lease, &commit), whole, "{what}");
    }
    assert!(matches!(book.claim(now(5), &claim(&people, lease), true), Acted::Accepted(_)));
}

/// A way to spoil a gang's certificate: what it is, how, and what is said to it.
type Spoiled = (&'static str, fn(&mut Gang), Reason);

#[test]
fn a_gang_is_joined_in_time_as_ordered_and_once() {
    let people = People::new();
    let member = |book: &mut Book| {
        let lease = granted(&people, book, 0, &in_gang(&people, 2));
        (lease, gang_of(&people, lease, 2).0)
    };
    let table: [Spoiled; 5] = [
        ("another gang", |gang| gang.gang = RequestId([1; 16]), Reason::BadGang),
        ("of another size", |gang| gang.members.truncate(1), Reason::BadGang),
        ("without this lease", |gang| gang.members[0].lease = LeaseId::default(), Reason::BadGang),
        ("of somebody else", |gang| gang.lessee = KeyId([3; 32]), Reason::BadGang),
        ("with another delegate", |gang| gang.delegate = KeyId([3; 32]), Reason::BadGang),
    ];
    for (what, change, expected) in table {
        let mut book = people.book(4, 1);
        let (lease, mut gang) = member(&mut book);
        change(&mut gang);
        let acted = book.join(now(1), &lease, &people.acts(lease.0, &gang));
        assert_eq!(refused(&acted), Some(expected), "{what}");
        assert!(book.get(&lease).expect("known").kept.joined.is_none(), "{what}");
    }
    let mut book = people.book(4, 1);
    let (lease, gang) = member(&mut book);
    let certificate = people.acts(lease.0, &gang);
    let root = people::sign(people.fabric, &people.root, lease.0, &gang);
    let root = root.verify(&people.fabric).expect("it is signed");
    assert_eq!(refused(&book.join(now(1), &lease, &root)), Some(Reason::NotAdmitted));
    assert_eq!(refused(&book.join(now(2_000), &lease, &certificate)), Some(Reason::Ended));
    assert!(matches!(book.join(now(1), &lease, &certificate), Acted::Accepted(_)));
    let mut other = gang.clone();
    other.members[1].lease = LeaseId(Hash::of(b"another"));
    let acted = book.join(now(1), &lease, &people.acts(lease.0, &other));
    assert_eq!(refused(&acted), Some(Reason::Conflict), "one gang and no other");
    // The others may start at any moment, so it waits for their words beyond the time to claim,
    // though never beyond its term; not whole by then, it lapses like any other.
    assert_eq!(book.due(now(2_000).boot), []);
    assert_eq!(book.due(now(10_000).boot), [Turn::Lapsed(lease)]);
    // One that is being taken back joins none.
    let mut book = people.book(4, 1);
    let (lease, gang) = member(&mut book);
    let freeze = now(5_000).boot;
    let hold =
        Hold { why: EndReason::Revoked, by: people.lessor.id(), freeze, end: freeze + SECOND };
    assert!(book.hold(&lease, hold));
    let acted = book.join(now(1), &lease, &people.acts(lease.0, &gang));
    assert_eq!(refused(&acted), Some(Reason::Withdrawn));
    // One that is for no gang joins none.
    let mut book = people.book(4, 1);
    let lease = granted(&people, &mut book, 0, &renewable(&people, 1));
    let (gang, _) = gang_of(&people, lease, 2);
    let acted = book.join(now(1), &lease, &people.acts(lease.0, &gang));
    assert_eq!(refused(&acted), Some(Reason::BadGang));
}

#[test]
fn a_member_is_the_same_after_a_restart() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let lease = granted(&people, &mut book, 0, &in_gang(&people, 2));
    let (gang, others) = gang_of(&people, lease, 2);
    let certificate = people.acts(lease.0, &gang);
    let Acted::Accepted(word) = book.join(now(1), &lease, &certificate) else { panic!("it joins") };
    let kept = book.get(&lease).expect("known").kept.clone();
    let mut book = people.book(4, 2);
    book.restore(now(2).boot, kept, std::collections::VecDeque::new()).expect("it is read");
    assert!(
        matches!(book.join(now(3), &lease, &certificate), Acted::Repeat(again) if again == word)
    );
    let member = gang.members[1];
    let commit = Commit { gang: certificate.id(), lease: member.lease };
    let commit = people::sign(people.fabric, &others[0], member.lease.0, &commit);
    assert!(book.committed(&lease, &commit.verify(&people.fabric).expect("it is signed")));
}

#[test]
fn release_and_lapse_are_as_for_any_lease() {
    let people = People::new();
    let mut book = people.book(4, 1);
    let lease = granted(&people, &mut book, 0, &in_gang(&people, 2));
    let (gang, _) = gang_of(&people, lease, 2);
    book.join(now(1), &lease, &people.acts(lease.0, &gang));
    let release = Release { lease, act: act_id(&lease, "release") };
    let acted = book.release(now(2), &people.acts(lease.0, &release));
    assert!(matches!(acted, Acted::Accepted(_)));
    assert!(book.receipt(now(2), &lease).is_none(), "it was never billed");
    let end: Termination = body_of(&book.finish(now(2), &lease).expect("it ends"));
    assert_eq!((end.charge, end.credit), (Amount::ZERO, Amount::ZERO));
    assert!(book.promised().is_nothing());
}

// --- bringing a gang together ---

struct Bench {
    assembly: Assembly,
    dice: Dice,
    people: People,
}

impl Bench {
    fn new(size: u16, hosts: u8) -> Self {
        let ranked = (1..=hosts).rev().map(choice).collect();
        let what = (want(), RequestId([1; 16]), size);
        let assembly = Assembly::new(Boot(0), what, (None, true), ranked);
        Self { assembly, dice: Dice::new(7), people: People::new() }
    }

    fn next(&mut self, at: u64) -> Next {
        self.assembly.next(Boot(at), &mut self.dice)
    }

    fn asks(&mut self, at: u64) -> Vec<u8> {
        match self.next(at) {
            Next::Ask(choices) => choices
                .into_iter()
                .map(|choice| {
                    let n = choice.lessor.0[0];
                    self.assembly.asked(Boot(at), Hash([n; 32]), choice);
                    n
                })
                .collect(),
            other => panic!("at {at}: {other:?}"),
        }
    }

    fn grants(&mut self, n: u8) {
        let signed = self.people.mandate.clone();
        self.assembly.granted(Hash([n; 32]), LeaseId(Hash([n; 32])), signed);
    }

    fn refuses(&mut self, n: u8) {
        self.assembly.refused(&Hash([n; 32]), Some(Reason::Capacity), String::new());
    }
}

fn names(granted: &[Granted]) -> Vec<u8> {
    granted.iter().map(|member| member.lease.0.0[0]).collect()
}

#[test]
fn a_gang_asks_for_a_quarter_more_and_gives_the_surplus_back() {
    let mut bench = Bench::new(4, 12);
    assert_eq!(bench.asks(0), [12, 11, 10, 9, 8], "four and a quarter, at once");
    assert!(matches!(bench.next(1), Next::Wait(Boot(150))));
    bench.refuses(11);
    assert_eq!(bench.asks(2), [7], "another one in its place");
    [12, 10, 9, 8].into_iter().for_each(|n| bench.grants(n));
    let Next::Commit(members, surplus) = bench.next(3) else { panic!("it is complete") };
    assert_eq!((names(&members), names(&surplus)), (vec![12, 10, 9, 8], vec![]));
    bench.assembly.committing(Boot(3), Hash([1; 32]));
    bench.grants(7);
    let Next::GiveBack(late) = bench.next(3) else { panic!("it came too late") };
    assert_eq!(names(&late), [7], "and is no member");
    let word = bench.people.mandate.clone();
    bench.assembly.committed(LeaseId(Hash([7; 32])), word.clone());
    for n in [12, 10, 9] {
        bench.assembly.committed(LeaseId(Hash([n; 32])), word.clone());
    }
    assert!(matches!(bench.next(4), Next::Wait(_)), "the surplus one's word does not count");
    let Next::Remind(silent) = bench.next(403) else { panic!("it asks again") };
    assert_eq!(silent.len(), 1);
    bench.assembly.committed(LeaseId(Hash([8; 32])), word);
    let Next::Whole(members, words) = bench.next(404) else { panic!("it is whole") };
    assert_eq!((members.len(), words.len()), (4, 4));
}

#[test]
fn what_cannot_be_complete_is_given_back_at_once_and_tried_again() {
    let mut bench = Bench::new(4, 5);
    assert_eq!(bench.asks(0).len(), 5);
    bench.grants(5);
    bench.refuses(4);
    assert!(matches!(bench.next(1), Next::Wait(_)), "four can still come together");
    bench.refuses(3);
    let Next::GiveBack(back) = bench.next(2) else { panic!("they cannot") };
    assert_eq!(names(&back), [5], "though two have not answered yet");
    let Next::Wait(until) = bench.next(2) else { panic!("it rests") };
    assert!((Boot(22)..=Boot(42)).contains(&until), "{until:?}");
    assert!(!bench.assembly.awaits(&Hash([2; 32])), "a late yes is none of its own any more");
    assert!(matches!(bench.next(until.0), Next::Rank));
}

#[test]
fn whom_a_refusal_names_is_asked_next_unless_keys_say_the_order() {
    let mut dice = Dice::new(1);
    let what = (want(), RequestId([7; 16]), 1);
    let mut gang = Assembly::new(Boot(0), what, (None, true), (1..=5).map(choice).collect());
    let Next::Ask(first) = gang.next(Boot(0), &mut dice) else { panic!("it asks") };
    let asked: Vec<_> = first.iter().map(|choice| choice.lessor.0[0]).collect();
    assert_eq!(asked, [1, 2]);
    for choice in first {
        gang.asked(Boot(0), Hash([choice.lessor.0[0]; 32]), choice);
    }
    gang.refused(&Hash([1; 32]), Some(Reason::Capacity), String::new());
    // One that is asked already is not asked twice.
    gang.refer(vec![choice(2), choice(5), choice(4)]);
    let Next::Ask(next) = gang.next(Boot(1), &mut dice) else { panic!("it asks") };
    assert_eq!(next, [choice(5)]);
}

#[test]
fn competing_gangs_meet_at_the_lowest_key_in_the_end() {
    let mut bench = Bench::new(2, 4);
    let mut at = 0;
    for _ in 0..2 {
        assert!(bench.asks(at).len() > 1, "all at once at first");
        for n in 1..=4 {
            bench.refuses(n);
        }
        loop {
            match bench.next(at) {
                Next::GiveBack(_) => {}
                Next::Ask(choices) => {
                    for choice in choices {
                        let n = choice.lessor.0[0];
                        bench.assembly.asked(Boot(at), Hash([n; 32]), choice);
                        bench.refuses(n);
                    }
                }
                Next::Wait(until) => at = until.0,
                Next::Rank => break,
                other => panic!("{other:?}"),
            }
        }
        bench.assembly.rank((1..=4).rev().map(choice).collect());
    }
    assert_eq!(bench.asks(at), [1], "now the lowest key, alone");
    assert!(matches!(bench.next(at + 1), Next::Wait(_)));
    bench.grants(1);
    assert_eq!(bench.asks(at + 2), [2, 3], "who has it goes on with the others");
}

#[test]
fn a_gang_gives_up_in_the_end() {
    let mut bench = Bench::new(2, 2);
    let mut at = 0;
    for _ in 0..100_000 {
        match bench.next(at) {
            Next::Ask(choices) => {
                for choice in choices {
                    let n = choice.lessor.0[0];
                    bench.assembly.asked(Boot(at), Hash([n; 32]), choice);
                    bench.refuses(n);
                }
            }
            Next::GiveBack(_) => {}
            Next::Wait(until) => {
                assert!(until > Boot(at), "it does not spin");
                at = until.0;
            }
            Next::Rank => bench.assembly.rank((1..=2).map(choice).collect()),
            Next::Failed => {
                assert!((20_000..25_000).contains(&at), "at {at}");
                assert_eq!(bench.assembly.heard().len(), 2, "each host once");
                return;
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("it never gives up");
}
