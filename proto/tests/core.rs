//! A whole core, told what happens and asked what it wants, with peers played by the test.

mod common {
    pub mod people;
    pub mod shell;
}

use common::people::{People, WALL, body_of, job, sign, sign_until, want};
use common::shell::{Disk, Net, Shell, config};
use leasehold_proto::base::id::{Hash, KeyId, LeaseId, RequestId};
use leasehold_proto::base::money::{Amount, UNIT};
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::{Span, Wall};
use leasehold_proto::core::{
    Command, CommandId, Effect, Ended, Event, Failure, InUse, Kept, LentStage, Orphan, Orphans,
    Reply,
};
use leasehold_proto::words::charter::{Certificate, Role};
use leasehold_proto::words::contract::{EndReason, Grant, JobSpec, Reason, Refusal, Renew};
use leasehold_proto::words::equivocation::{Equivocation, Reinstatement};
use leasehold_proto::words::message::{self, Message, Utterance, Word};
use leasehold_proto::words::object::{Kind, body_in, key_subject};
use leasehold_proto::words::record::{Offer, Payloads};
use leasehold_proto::words::sign::{Hand, Signed, Signer};
use leasehold_proto::words::usage::{Outcome, Usage};
use leasehold_proto::words::want::Want;

fn disk(kept: impl IntoIterator<Item = Kept>) -> Disk {
    kept.into_iter().map(|kept| (kept.key(), kept)).collect()
}

fn lifted(people: &People, by: (&Signer, &str), key: KeyId, above: u64) -> Signed {
    let body = Reinstatement { organisation: by.1.into(), key, above };
    sign(people.fabric, by.0, key_subject(&key), &body)
}

/// Lifted by the organisation, above this epoch.
fn lift(shell: &mut Shell<'_>, above: u64) {
    let people = shell.people;
    let key = shell.me.id();
    let signed = lifted(people, (&people.root, "acme"), key, above);
    match shell.ask(Command::Reinstate(Box::new(signed))) {
        Ok(Reply::Reinstated(of, epoch)) => assert_eq!((of, epoch), (key, above)),
        other => panic!("{other:?}"),
    }
}

// --- payloads ---

/// The payload records that a node has signed, as lists of what stands for payloads.
fn payload_records(shell: &Shell<'_>) -> Vec<Vec<u64>> {
    let own = shell.own_records().into_iter();
    let said =
        own.filter_map(|signed| match message::verify_record(&signed, &shell.people.fabric) {
            Ok(message::RecordSaid::Payloads(record)) => Some(record.body().roots.clone()),
            _ => None,
        });
    said.collect()
}

#[test]
fn who_has_a_payload_is_known_to_all() {
    let people = People::new();
    let mut net = pair(&people);
    let [root, other] = [Hash::of(b"a program"), Hash::of(b"another")];
    let holders =
        |net: &mut Net<'_>, node: usize, root: Hash| match net.ask(node, Command::Holders(root)) {
            Ok(Reply::Holders(holders)) => holders,
            other => panic!("{other:?}"),
        };
    assert_eq!(holders(&mut net, LESSEE, root), []);
    let has = |roots: &[Hash]| Event::Payloads(roots.iter().map(Payloads::brief).collect());
    net.tell(LESSOR, has(&[root, other]));
    net.pass(Span::secs(1));
    let lessor = net.nodes[LESSOR].me.id();
    let at = net.nodes[LESSOR].core.data_addresses(&lessor);
    assert_eq!(holders(&mut net, LESSEE, root), [(lessor, at)]);
    // It does not ask itself.
    assert_eq!(holders(&mut net, LESSOR, root), []);
    net.tell(LESSOR, has(&[other]));
    net.pass(Span::secs(1));
    assert_eq!(holders(&mut net, LESSEE, root), []);
    assert_eq!(holders(&mut net, LESSEE, other).len(), 1);
    net.tell(LESSOR, has(&[]));
    net.pass(Span::secs(1));
    assert_eq!(holders(&mut net, LESSEE, other), []);
}

#[test]
fn what_a_node_said_of_its_payloads_is_known_again_or_foreign() {
    let people = People::new();
    let me = &people.lessor;
    let mut node = Shell::start(&people, me, disk([Kept::Epoch(5)]), 0);
    node.met(&people.delegate.id(), &people.delegate_certificate, None);
    let epoch = node.core.hand().epoch;
    for roots in [vec![7], vec![]] {
        node.tell(Event::Payloads(roots));
        node.pass(Span::secs(1));
    }
    let said: Vec<_> = node
        .own_records()
        .into_iter()
        .filter(|signed| signed.header().is_ok_and(|header| header.kind == Kind::Payloads))
        .collect();
    assert_eq!(said.len(), 2);
    // It has nothing to say any more, and forgets after two hours what it said; others may be later.
    node.pass(Span::secs(91 * 60));
    let tell = |node: &mut Shell<'_>, signed: &Signed| {
        let answer = Message::Records(vec![signed.clone()]);
        node.hears(people.delegate.id(), &answer);
        node.halted()
    };
    for signed in &said {
        assert_eq!(tell(&mut node, signed), None, "it is its own");
    }
    // What it never said is another's.
    let hand = Hand { fabric: people.fabric, me: me.id(), epoch };
    let draft = |seq: u64| {
        let until = WALL + Span::secs(92 * 60);
        let body = Payloads { roots: vec![9] };
        hand.draft(key_subject(&me.id()), seq, until, &body).expect("it fits")
    };
    for seq in [2, 3] {
        let mut node = Shell::start(&people, me, disk([Kept::Epoch(epoch - 1)]), 0);
        node.met(&people.delegate.id(), &people.delegate_certificate, None);
        for roots in [vec![7], vec![]] {
            node.tell(Event::Payloads(roots));
            node.pass(Span::secs(1));
        }
        let foreign = me.sign(&draft(seq)).expect("its own");
        assert!(tell(&mut node, &foreign).is_some(), "number {seq} is another's");
    }
}

#[test]
fn what_is_pinned_or_leased_is_in_use() {
    let people = People::new();
    let mut net = pair(&people);
    let in_use = |net: &mut Net<'_>, node: usize| match net.ask(node, Command::InUse) {
        Ok(Reply::InUse(in_use)) => in_use,
        other => panic!("{other:?}"),
    };
    assert_eq!(in_use(&mut net, LESSEE), InUse::default());
    let root = Hash::of(b"precious");
    for pinned in [true, true, false, true] {
        let done = net.ask(LESSOR, Command::Pin(root, pinned));
        assert!(matches!(done, Ok(Reply::Pinned)), "{done:?}");
        assert_eq!(in_use(&mut net, LESSOR).pinned.contains(&root), pinned);
    }
    // It outlives the process, and so does its end.
    let lessor = net.nodes.remove(LESSOR).again();
    let mut lessor = lessor;
    let answer = lessor.ask(Command::InUse);
    assert!(matches!(&answer, Ok(Reply::InUse(of)) if of.pinned.contains(&root)), "{answer:?}");
    lessor.ask(Command::Pin(root, false)).expect("unpinned");
    let answer = lessor.again().ask(Command::InUse);
    assert!(matches!(&answer, Ok(Reply::InUse(of)) if of.pinned.is_empty()), "{answer:?}");

    // The lessee keeps what its lessor may come for, until the lease is over.
    let mut net = pair(&people);
    let lease = working(&mut net, false);
    let program = job().program.root;
    assert!(in_use(&mut net, LESSEE).leased.contains(&program));
    net.ask(LESSEE, Command::Release(lease)).expect("released");
    net.tell(LESSOR, Event::JobEnded(lease, Outcome::Stopped, Usage::default()));
    net.pass(Span::secs(10));
    assert_eq!(in_use(&mut net, LESSEE), InUse::default());
}

#[test]
fn what_changes_often_is_said_seldom_and_at_last_as_it_is() {
    let people = People::new();
    let mut node = Shell::start(&people, &people.lessor, Disk::new(), 0);
    node.pass(Span::secs(1));
    assert_eq!(payload_records(&node), Vec::<Vec<u64>>::new(), "there is nothing to say");
    // One that has little may say every change; one that has much says what some come to.
    for n in 0..20 {
        node.tell(Event::Payloads(vec![n]));
        node.pass(Span::millis(200));
    }
    assert_eq!(payload_records(&node).len(), 20);
    for n in 0..600 {
        node.tell(Event::Payloads((0..=n).rev().collect()));
        node.pass(Span::millis(200));
    }
    let bytes: usize = payload_records(&node).iter().map(|roots| 256 + 8 * roots.len()).sum();
    // 64 KiB at once, and 128 bytes a second for two minutes.
    assert!((60_000..=85_000).contains(&bytes), "{bytes}");
    node.pass(Span::secs(60));
    let said = payload_records(&node);
    let last = said.last().expect("it was said");
    // The newest, as many as one record names.
    assert!(last.iter().copied().eq(600 - 512..600), "{last:?}");
    let before = said.len();
    node.pass(Span::secs(20 * 60));
    assert_eq!(payload_records(&node).len(), before, "unchanged, it is not said again soon");
    node.pass(Span::secs(15 * 60));
    assert_eq!(payload_records(&node).len(), before + 1, "but before it is over");
}

// --- halts ---

#[test]
fn a_halt_outlives_every_start_until_the_organisation_lifts_it() {
    let people = People::new();
    let peer = people.delegate.id();
    let me = &people.lessor;
    // A peer has seen a later life; a note says of one; a record of this very epoch is foreign.
    let ways = [("a later life", 9, 0), ("a note", 0, 9), ("this epoch", 6, 0)];
    for (what, seen, noted_epoch) in ways {
        let start = disk([Kept::Epoch(5)]);
        let config = leasehold_proto::core::Config { noted_epoch, ..config(&people, me) };
        let mut node = Shell::start_with(&people, me, config, start, 0);
        let record = (seen > 0).then(|| Shell::record(&people, me, seen, 40, 7));
        node.met(&peer, &people.delegate_certificate, record.as_ref());
        assert!(node.halted().is_some(), "{what}");
        // Where there is another one, it is told: by an offer above everything that it can say.
        let last_word = node.own_records().into_iter().any(|record| {
            let header = record.header().expect("a header");
            header.kind == Kind::Offer && header.epoch == seen && header.seq > 1 << 32
        });
        assert_eq!(last_word, seen > 0, "{what}");
        let above = seen.max(noted_epoch);
        for _ in 0..3 {
            node = node.again();
            let why = node.halted().unwrap_or_else(|| panic!("{what}: it grants again"));
            assert!(why.contains(&format!("above epoch {above}")), "{what}: {why}");
        }
        lift(&mut node, above - 1);
        node = node.again();
        assert!(node.halted().is_some(), "{what}: what was seen is not void yet");
        lift(&mut node, above);
        assert!(node.halted().is_some(), "{what}: it goes on in a new epoch only");
        node = node.again();
        assert_eq!(node.halted(), None, "{what}");
        assert!(node.core.hand().epoch > above, "{what}");
    }
}

#[test]
fn of_several_reasons_for_a_halt_the_one_that_is_hardest_to_lift_counts() {
    let people = People::new();
    let me = &people.lessor;
    // Convicted of what it did in epoch 2, and a copy from epoch 3, while it is in 9 elsewhere.
    let [first, second] = [1, 2].map(|returns| Shell::record(&people, me, 2, 9, returns));
    let kept = disk([Kept::Epoch(3), Kept::Equivocation(first, second)]);
    let config = leasehold_proto::core::Config { noted_epoch: 9, ..config(&people, me) };
    let mut node = Shell::start_with(&people, me, config, kept, 0);
    assert!(node.halted().is_some_and(|why| why.contains("above epoch 9")), "{:?}", node.halted());
    lift(&mut node, 2);
    let mut node = node.again();
    assert!(node.halted().is_some_and(|why| why.contains("above epoch 9")), "{:?}", node.halted());
    // What is seen later may be harder to lift.
    let seen = Shell::record(&people, me, 70, 1, 0);
    node.met(&people.delegate.id(), &people.delegate_certificate, Some(&seen));
    assert!(node.halted().is_some_and(|why| why.contains("above epoch 70")), "{:?}", node.halted());
}

#[test]
fn a_halt_is_kept_before_the_epoch_that_would_hide_it() {
    use leasehold_proto::core::Core;
    let people = People::new();
    let me = &people.lessor;
    let config = leasehold_proto::core::Config { noted_epoch: 9, ..config(&people, me) };
    let (mut out, now) = (Vec::new(), common::people::now(0));
    Core::new(config, [Kept::Epoch(3)], &Orphans::new(), now, &mut out).expect("it starts");
    let kept: Vec<_> = out
        .iter()
        .filter_map(|effect| match effect {
            Effect::Keep(kept) => Some(kept.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(kept[..2], [Kept::Halted(9), Kept::Epoch(10)]);
}

#[test]
fn a_halted_node_begins_nothing() {
    let people = People::new();
    let mut net = pair(&people);
    let lease = leased(&mut net, &little());
    // Another of its key was seen: it may have begun the job.
    let seen = Shell::record(&people, &people.lessor, 70, 1, 0);
    net.nodes[LESSOR].met(&people.delegate.id(), &people.delegate_certificate, Some(&seen));
    let claimed = net.ask(LESSEE, Command::Claim { lease, job: job() });
    assert_eq!(claimed.err(), Some(Failure::Act(Reason::NotReady)));
    assert_eq!(started(&net), []);
    // What it had begun goes on, and a repeat of that claim gets its answer.
    let mut net = pair(&people);
    let lease = working(&mut net, false);
    net.nodes[LESSOR].met(&people.delegate.id(), &people.delegate_certificate, Some(&seen));
    let claimed = net.ask(LESSEE, Command::Claim { lease, job: job() });
    assert!(matches!(claimed, Ok(Reply::Claimed(_))), "{claimed:?}");
    assert_eq!(started(&net), [lease]);
    assert_eq!(lent(&net, &lease), LentStage::Active);
}

#[test]
fn what_a_peer_saw_in_this_epoch_is_known_again_or_foreign() {
    let people = People::new();
    let peer = people.delegate.id();
    let me = &people.lessor;
    let start = || {
        let mut node = Shell::start(&people, me, disk([Kept::Epoch(5)]), 0);
        // Its host record is said anew, so there are two of this epoch.
        node.pass(Span::secs(1900));
        node
    };
    let foreign = |seq| Shell::record(&people, me, 6, seq, 7);
    for seq in [1, 2, 3, 40] {
        let mut node = start();
        node.met(&peer, &people.delegate_certificate, Some(&foreign(seq)));
        assert!(node.halted().is_some(), "number {seq} is another's");
    }
    let node = start();
    let own = node.host_records();
    assert!(own.len() > 1, "{}", own.len());
    for record in own {
        let mut node = start();
        node.met(&peer, &people.delegate_certificate, Some(&record));
        assert_eq!(node.halted(), None, "it is this node's own");
    }
}

// --- leases of two nodes that talk ---

/// Nodes that know each other.
fn known<'a>(people: &'a People, keys: &[&'a Signer]) -> Net<'a> {
    let nodes = keys.iter().map(|key| Shell::start(people, key, disk([]), 1_000));
    let mut net = Net::of(nodes.collect());
    net.pass(Span::secs(5));
    net
}

/// A lessor and a lessee's delegate.
fn pair(people: &People) -> Net<'_> {
    known(people, &[&people.lessor, &people.delegate])
}

const LESSOR: usize = 0;
const LESSEE: usize = 1;

/// What the mandate of the delegate allows.
fn little() -> Want {
    let most = Amount(10 * UNIT);
    let shape = Resources::new(200, 1 << 28, 0);
    let claim_within = Span::secs(50);
    Want { shape, claim_within, budget: most, max_hourly: most, exposure: most, ..want() }
}

fn leased(net: &mut Net<'_>, want: &Want) -> LeaseId {
    match net.ask(LESSEE, Command::Lease(want.clone())) {
        Ok(Reply::Leased(leased)) => leased.lease,
        other => panic!("{other:?}"),
    }
}

/// Where a lease stands at its lessor.
fn lent(net: &Net<'_>, lease: &LeaseId) -> LentStage {
    let view = net.nodes[LESSOR].view();
    view.lent.iter().find(|lent| lent.id == *lease).expect("it is known").stage
}

#[test]
fn a_lease_is_given_back_however_often_that_goes_astray() {
    let people = People::new();
    let want = little();
    for restarts in [false, true] {
        let mut net = pair(&people);
        let lease = leased(&mut net, &want);
        net.lost = |_, said| matches!(said, Message::Release(_));
        let failed = net.ask(LESSEE, Command::Release(lease));
        assert!(matches!(failed, Err(Failure::Unreachable(_))), "{failed:?}");
        if restarts {
            net.restart(LESSEE, &Orphans::new());
        }
        let tries = |net: &Net<'_>| {
            net.said.iter().filter(|(_, said)| matches!(said, Message::Release(_))).count()
        };
        net.said.clear();
        net.pass(Span::secs(5));
        assert!((1..=5).contains(&tries(&net)), "it tries on, with pauses: {}", tries(&net));
        assert_eq!(lent(&net, &lease), LentStage::Granted);
        net.lost = |_, _| false;
        net.pass(Span::secs(10));
        assert_eq!(lent(&net, &lease), LentStage::Ended, "restarts: {restarts}");
        net.said.clear();
        net.pass(Span::secs(60));
        assert_eq!(tries(&net), 0, "it was given back");
    }
}

/// A claimed lease whose job has run for ten seconds.
fn working(net: &mut Net<'_>, release_after: bool) -> LeaseId {
    let lease = leased(net, &little());
    let claimed =
        net.ask(LESSEE, Command::Claim { lease, job: JobSpec { release_after, ..job() } });
    assert!(matches!(claimed, Ok(Reply::Claimed(_))), "{claimed:?}");
    assert!(net.wanted.iter().any(|(by, effect)| {
        *by == LESSOR && matches!(effect, Effect::StartJob(start) if start.lease == lease)
    }));
    net.pass(Span::secs(10));
    lease
}

/// How a lease ended, as its lessee was told.
fn end_of(net: &mut Net<'_>, lease: LeaseId) -> Ended {
    match net.ask(LESSEE, Command::AwaitEnd(lease)) {
        Ok(Reply::Ended(ended)) => ended,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_job_did_itself_while_no_node_watched_is_not_the_lessors_fault() {
    let people = People::new();
    let used = Usage { cpu: Span::millis(70), ..Usage::default() };
    // The outcome that was found, whether the lease goes with its job, and how it then ends.
    for (outcome, release_after, reason) in [
        (Outcome::Exited(3), true, EndReason::Released),
        (Outcome::Exited(3), false, EndReason::Term),
        (Outcome::Trapped("unreachable".into()), true, EndReason::Released),
        (Outcome::Trapped("unreachable".into()), false, EndReason::Term),
        (Outcome::OutOfMemory, false, EndReason::Term),
        (Outcome::OutOfDisk, false, EndReason::Term),
        (Outcome::Deadline, false, EndReason::Term),
        (Outcome::NoPayload("it is gone".into()), false, EndReason::Term),
        (Outcome::NotRunnable("no such thing".into()), false, EndReason::Term),
        (Outcome::Lost, true, EndReason::Lost),
        (Outcome::Stopped, false, EndReason::Lost),
    ] {
        let mut net = pair(&people);
        let lease = working(&mut net, release_after);
        net.restart(LESSOR, &Orphans::from([(lease, Orphan::Ended(outcome.clone(), used))]));
        let ended = end_of(&mut net, lease);
        assert_eq!(ended.reason, reason, "{outcome}");
        assert_eq!(ended.outcome, Some(outcome.clone()));
        assert_eq!(ended.credit > Amount::ZERO, reason == EndReason::Lost, "{outcome}");
    }
    // Its term passed meanwhile: that is how it ended, also where it goes with its job.
    let mut net = pair(&people);
    let lease = working(&mut net, true);
    for node in &mut net.nodes {
        node.at += 120_000;
    }
    net.restart(LESSOR, &Orphans::from([(lease, Orphan::Ended(Outcome::Deadline, used))]));
    let ended = end_of(&mut net, lease);
    assert_eq!((ended.reason, ended.credit), (EndReason::Term, Amount::ZERO));
}

#[test]
fn the_time_in_which_no_node_watched_is_not_billed_where_the_lease_goes_with_its_job() {
    let people = People::new();
    let mut net = pair(&people);
    let lease = working(&mut net, true);
    for node in &mut net.nodes {
        node.at += 40_000;
    }
    let ended = Orphan::Ended(Outcome::Exited(0), Usage::default());
    net.restart(LESSOR, &Orphans::from([(lease, ended)]));
    let ended = end_of(&mut net, lease);
    assert_eq!(ended.reason, EndReason::Released);
    let rate = People::rates().hourly(&little().shape).expect("it has a price");
    assert!(ended.charge <= rate.per_hour_over(Span::secs(11)), "{}", ended.charge);
}

/// A lease that its lessee released after 15 s, while its lessor's host goes down.
#[test]
fn a_reboot_leaves_the_bill_of_an_ending_lease_as_it_was() {
    let people = People::new();
    let mut net = pair(&people);
    let lease = working(&mut net, false);
    net.pass(Span::secs(5));
    net.lost = |_, said| matches!(said, Message::Receipt(_) | Message::Terminated(_));
    net.pass(Span::secs(3));
    assert!(matches!(net.ask(LESSEE, Command::Release(lease)), Ok(Reply::Released)));
    for node in &mut net.nodes {
        node.at += 300_000;
    }
    net.lost = |_, _| false;
    net.reboot(LESSOR, Span::secs(1));
    let ended = end_of(&mut net, lease);
    assert_eq!((ended.reason, ended.credit), (EndReason::Released, Amount::ZERO));
    let rate = People::rates().hourly(&little().shape).expect("it has a price");
    let (least, most) = (rate.per_hour_over(Span::secs(17)), rate.per_hour_over(Span::secs(19)));
    assert!((least..=most).contains(&ended.charge), "{least} to {most}: {}", ended.charge);
}

#[test]
fn a_lease_that_was_ending_ends_as_it_was_whatever_became_of_its_job() {
    let people = People::new();
    for orphan in [None, Some(Orphan::Ended(Outcome::Stopped, Usage::default()))] {
        let mut net = pair(&people);
        let lease = working(&mut net, false);
        net.lost = |_, said| matches!(said, Message::Receipt(_));
        net.pass(Span::secs(5));
        assert!(matches!(net.ask(LESSEE, Command::Release(lease)), Ok(Reply::Released)));
        net.lost = |_, _| false;
        // Its job is being stopped, and the node is killed over it.
        net.restart(LESSOR, &orphan.into_iter().map(|orphan| (lease, orphan)).collect());
        let ended = end_of(&mut net, lease);
        assert_eq!((ended.reason, ended.credit), (EndReason::Released, Amount::ZERO));
        let rate = People::rates().hourly(&little().shape).expect("it has a price");
        let whole = rate.per_hour_over(Span::secs(14));
        assert!(ended.charge > whole, "{} is owed up to the release, not {}", whole, ended.charge);
    }
}

// --- conduct ---

#[test]
fn what_is_heard_of_a_key_before_its_certificate_counts_once_that_is_there() {
    let people = People::new();
    let peer = people.lessor.id();
    let third = Signer::from_seed(&[6; 32]);
    let certificate = people.certificate(third.id(), "third");
    let record = |epoch, seq, returns| {
        let hand = Hand { fabric: people.fabric, me: third.id(), epoch };
        let mut body = config(&people, &people.lessor).host_record(returns);
        (body.name, body.certificate) = ("third".into(), certificate.clone());
        let until = WALL + Span::secs(3600);
        third
            .sign(&hand.draft(key_subject(&third.id()), seq, until, &body).expect("fits"))
            .expect("its own")
    };
    let proof = Equivocation { first: record(4, 9, 1), second: record(4, 9, 2) };
    let by = [(&people.root, "acme"), (&people.other_root, "emca")];
    let [own, foreign] = by.map(|by| lifted(&people, by, third.id(), 1 << 40));
    let start = || {
        let mut node = Shell::start(&people, &people.delegate, disk([]), 0);
        node.met(&peer, &people.lessor_certificate, None);
        node
    };
    // What is said first, and whether the key is quarantined and its record void after that.
    let proven = || Message::Conduct(vec![proof.clone()], Vec::new());
    let lifting = |by: &Signed| Message::Conduct(Vec::new(), vec![by.clone()]);
    for (what, said, quarantined, void) in [
        ("a proof", vec![proven()], true, false),
        ("a foreign word", vec![lifting(&foreign)], false, false),
        ("a proof and a foreign word", vec![proven(), lifting(&foreign)], true, false),
        ("its organisation's word", vec![lifting(&own)], false, true),
        ("a proof that was lifted", vec![proven(), lifting(&own)], false, true),
        ("one lifted before it is known", vec![lifting(&own), proven()], false, true),
    ] {
        let mut node = start();
        for said in &said {
            node.hears(peer, said);
        }
        assert_eq!(node.view().quarantine.len(), 0, "{what}: nobody vouches for the key");
        node.hears(peer, &Message::Records(vec![record(5, 1, 0)]));
        let view = node.view();
        assert_eq!(!view.quarantine.is_empty(), quarantined, "{what}");
        let listed = view.nodes.iter().any(|node| node.id == third.id());
        assert_eq!(listed, !void, "{what}");
        // So it is after a restart.
        let mut node = node.again();
        node.met(&peer, &people.lessor_certificate, None);
        node.hears(peer, &Message::Records(vec![record(5, 1, 0)]));
        let view = node.view();
        assert_eq!(!view.quarantine.is_empty(), quarantined, "{what}, after a restart");
        let listed = view.nodes.iter().any(|node| node.id == third.id());
        assert_eq!(listed, !void, "{what}, after a restart");
    }
    // However many such words come, few are remembered.
    let mut node = start();
    for n in 0..1_000_u32 {
        let [a, b, c, d] = n.to_le_bytes();
        let mut seed = [7; 32];
        seed[..4].copy_from_slice(&[a, b, c, d]);
        let key = Signer::from_seed(&seed).id();
        node.hears(peer, &lifting(&lifted(&people, by[0], key, 1)));
    }
    assert_eq!(node.disk.len(), 1, "only its epoch is kept");
    // And they do not push out what another one says.
    let mut node = start();
    let honest = Signer::from_seed(&[8; 32]).id();
    node.met(&honest, &people.certificate(honest, "honest"), None);
    node.hears(honest, &proven());
    for n in 0..100 {
        let key = Signer::from_seed(&[n + 100; 32]).id();
        node.hears(peer, &lifting(&lifted(&people, by[0], key, 1)));
    }
    node.hears(peer, &Message::Records(vec![record(5, 1, 0)]));
    assert_eq!(node.view().quarantine.len(), 1);
}

#[test]
fn a_key_is_reinstated_by_whose_certificate_it_carries_now() {
    let people = People::new();
    let peer = people.lessor.id();
    let third = Signer::from_seed(&[6; 32]);
    let hand = Hand { fabric: people.fabric, me: third.id(), epoch: 4 };
    let given = |by: (&Signer, &str), hours: u64, seq: u64| {
        let (organisation, name) = (by.1.to_string(), "third".to_string());
        let (role, key, not_before) = (Role::Node, third.id(), Wall(0));
        let body = Certificate { organisation, name, role, key, not_before };
        let until = WALL + Span::secs(hours * 3600);
        let certificate = sign_until(people.fabric, by.0, key_subject(&key), until, &body);
        let mut body = config(&people, &people.lessor).host_record(0);
        (body.name, body.certificate) = ("third".into(), certificate);
        let draft = hand.draft(key_subject(&key), seq, WALL + Span::secs(3600), &body);
        third.sign(&draft.expect("it fits")).expect("its own")
    };
    let [acme, emca] = [(&people.root, "acme"), (&people.other_root, "emca")];
    let mut node = Shell::start(&people, &people.delegate, disk([]), 0);
    node.met(&peer, &people.lessor_certificate, None);
    node.hears(peer, &Message::Records(vec![given(acme, 1, 1)]));
    node.hears(peer, &Message::Records(vec![given(emca, 2, 2)]));
    let mut lift = |by| {
        let signed = lifted(&people, by, third.id(), 1);
        node.ask(Command::Reinstate(Box::new(signed))).is_ok()
    };
    assert!(!lift(acme), "it has passed to another organisation");
    assert!(lift(emca));
}

#[test]
fn what_went_astray_about_conduct_is_said_again() {
    let people = People::new();
    let third = Signer::from_seed(&[6; 32]);
    let mut net = pair(&people);
    let records = [1, 2].map(|returns| {
        let hand = Hand { fabric: people.fabric, me: third.id(), epoch: 4 };
        let mut body = config(&people, &people.lessor).host_record(returns);
        (body.name, body.certificate) = ("third".into(), people.certificate(third.id(), "third"));
        let draft = hand.draft(key_subject(&third.id()), 9, WALL + Span::secs(3600), &body);
        third.sign(&draft.expect("it fits")).expect("its own")
    });
    net.lost = |_, said| matches!(said, Message::Conduct(..));
    let [first, second] = records;
    let peer = people.delegate.id();
    for record in [first, second] {
        net.nodes[LESSOR].hears(peer, &Message::Records(vec![record]));
    }
    assert_eq!(net.nodes[LESSOR].view().quarantine.len(), 1);
    net.pass(Span::secs(1));
    assert_eq!(net.nodes[LESSEE].view().quarantine.len(), 0);
    net.lost = |_, _| false;
    net.pass(Span::secs(70));
    assert_eq!(net.nodes[LESSEE].view().quarantine.len(), 1);
}

#[test]
fn a_renewal_that_never_left_is_not_agreed_to() {
    let people = People::new();
    let mut net = pair(&people);
    let want = Want { longest: Span::secs(200), exposure: Amount::MAX, ..little() };
    let lease = leased(&mut net, &want);
    let claimed = net.ask(LESSEE, Command::Claim { lease, job: job() });
    assert!(matches!(claimed, Ok(Reply::Claimed(_))), "{claimed:?}");
    net.pass(Span::secs(40));
    // The lessor is not there while it is to be asked, and is back when all is over.
    let lessor = people.lessor.id();
    let longer = || Command::Renew { lease, term: Span::secs(90) };
    let node = &mut net.nodes[LESSEE];
    node.tell(Event::Unlinked(lessor));
    node.tell(Event::Asked { command: CommandId(u64::MAX), what: longer() });
    // As often as it is tried.
    (0..9).for_each(|_| drop(node.tell(Event::DialFailed(lessor))));
    node.pass(Span::secs(40));
    node.met(&lessor, &people.certificate(lessor, "lessor"), None);
    let held = node.disk.values().find_map(|kept| match kept {
        Kept::Held(_, held) => Some(held.clone()),
        _ => None,
    });
    let held = held.expect("it is held");
    assert!(held.renew.is_some(), "it was asked for");
    let grant: Grant = body_in(&held.grant.expect("granted").envelope).expect("a grant");
    // What it would have to agree to had it asked: 70 s, of which 80 have passed.
    let usage = Usage { billed: Span::secs(70), ..Usage::default() };
    let receipt = held.chain.next(lease, (&grant, Span::secs(90)), usage, None, WALL);
    let signed = sign(people.fabric, &people.lessor, lease.0, &receipt);
    let answer = |node: &mut Shell<'_>| {
        let out = node.hears(lessor, &Message::Receipt(signed.clone()));
        let said = out.into_iter().find_map(|effect| match effect {
            Effect::Reply { what, .. } => Some(what),
            _ => None,
        });
        node.carry(said.expect("it answers"))
    };
    assert!(matches!(answer(node), Message::Objected(_)), "it was told of no renewal");
    // Once it has left, heard or not, it may be billed for; what a run before this one did is not
    // known.
    let mut again = Shell::start(&people, &people.delegate, node.disk.clone(), node.at);
    again.met(&lessor, &people.certificate(lessor, "lessor"), None);
    assert!(matches!(answer(&mut again), Message::Acknowledged(_)), "it may have been told");
}

/// Two different host records of a key under one version.
fn lie(people: &People, by: &Signer) -> Equivocation {
    let [first, second] = [1, 2].map(|returns| Shell::record(people, by, 1 << 20, 9, returns));
    Equivocation { first, second }
}

#[test]
fn a_delegate_that_was_convicted_gets_nothing_new() {
    let people = People::new();
    let mut net = pair(&people);
    let want = Want { longest: Span::secs(200), ..little() };
    let lease = leased(&mut net, &want);
    let proof = Message::Conduct(vec![lie(&people, &people.delegate)], Vec::new());
    net.nodes[LESSOR].hears(people.delegate.id(), &proof);
    let renewed = net.ask(LESSEE, Command::Renew { lease, term: Span::secs(90) });
    assert_eq!(renewed.err(), Some(Failure::Act(Reason::Quarantined)));
    // What was granted before stands: it can be used and given back.
    let claimed = net.ask(LESSEE, Command::Claim { lease, job: job() });
    assert!(matches!(claimed, Ok(Reply::Claimed(_))), "{claimed:?}");
    assert!(matches!(net.ask(LESSEE, Command::Release(lease)), Ok(Reply::Released)));
}

// --- early ends ---

#[test]
fn a_job_that_starts_under_a_notice_finds_it() {
    let people = People::new();
    let mut net = pair(&people);
    let lease = leased(&mut net, &little());
    let taken = net.ask(LESSOR, Command::Revoke(lease));
    assert!(matches!(taken, Ok(Reply::Reclaim(_))), "{taken:?}");
    net.wanted.clear();
    let claimed = net.ask(LESSEE, Command::Claim { lease, job: job() });
    assert!(matches!(claimed, Ok(Reply::Claimed(_))), "{claimed:?}");
    let told: Vec<_> = net
        .wanted
        .iter()
        .filter_map(|(_, effect)| match effect {
            Effect::StartJob(_) => Some(None),
            Effect::NotifyJob(_, told) => Some(*told),
            _ => None,
        })
        .collect();
    let [None, Some(told)] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(told.why, EndReason::Revoked);
}

#[test]
fn what_is_quoted_for_taking_back_is_paid_also_where_the_term_ends_first() {
    let people = People::new();
    let mut net = pair(&people);
    let lease = working(&mut net, false);
    // Ten seconds' notice, two frozen: the term of a minute ends in between.
    net.pass(Span::secs(39));
    let taken = net.ask(LESSOR, Command::Revoke(lease));
    let Ok(Reply::Reclaim(plan)) = taken else { panic!("{taken:?}") };
    net.pass(Span::secs(12));
    net.tell(LESSOR, Event::JobEnded(lease, Outcome::Stopped, Usage::default()));
    let ended = end_of(&mut net, lease);
    assert_eq!(ended.reason, EndReason::Revoked);
    assert!(ended.credit > Amount::ZERO);
    let apart = ended.credit.minus(plan.credit).plus(plan.credit.minus(ended.credit));
    assert!(
        apart <= Amount(ended.credit.0 / 10),
        "{} was quoted, {} is paid",
        plan.credit,
        ended.credit
    );
}

/// What stands against a renewal for a while.
#[derive(Clone, Copy, Debug)]
enum Obstacle {
    Drained,
    /// The lessor's wall clock is a minute ahead.
    Ahead,
}

/// A no to an act is a no for good: it was said over the lessor's signature, and the lessee has gone
/// on from there. What was refused and comes again, from a slow path or from somebody who kept it,
/// gets the same no, also once nothing would stand against it any more.
#[test]
fn an_act_that_was_refused_does_not_come_true_later() {
    let people = People::new();
    let cases = [(Obstacle::Drained, false), (Obstacle::Drained, true), (Obstacle::Ahead, false)];
    for (obstacle, restarts) in cases {
        let mut net = pair(&people);
        let lease = leased(&mut net, &Want { longest: Span::secs(120), ..little() });
        let reason = match obstacle {
            Obstacle::Drained => {
                let within = Span::secs(600);
                let drain = Command::Drain { within, revoke: false, dry_run: false };
                net.ask(LESSOR, drain).expect("it drains");
                Reason::Withdrawn
            }
            Obstacle::Ahead => {
                net.nodes[LESSOR].ahead = 60_000;
                Reason::Expired
            }
        };
        net.said.clear();
        let longer = || Command::Renew { lease, term: Span::secs(90) };
        let refused = net.ask(LESSEE, longer());
        let expected = matches!(&refused, Err(Failure::Act(why)) if *why == reason);
        assert!(expected, "{obstacle:?}: {refused:?}");
        let said = |net: &Net<'_>, by: usize| {
            let mut said = net.said.iter().filter(|(who, _)| *who == by);
            said.find_map(|(_, said)| {
                matches!(said, Message::Renew(_) | Message::Refused(_)).then(|| said.clone())
            })
        };
        let (renew, refusal) = (said(&net, LESSEE), said(&net, LESSOR));
        let (renew, refusal) = (renew.expect("it was asked"), refusal.expect("it was refused"));
        net.nodes[LESSOR].ahead = 0;
        if matches!(obstacle, Obstacle::Drained) {
            net.ask(LESSOR, Command::Resume).expect("it sells again");
        }
        if restarts {
            net.restart(LESSOR, &Orphans::new());
        }
        // The same bytes once more.
        let answer = answer_to(&mut net, people.delegate.id(), &renew);
        assert_eq!(answer, Some(refusal), "{obstacle:?}, restarts: {restarts}");
        let view = net.nodes[LESSOR].view();
        let lent = view.lent.iter().find(|lent| lent.id == lease).expect("it is known");
        assert_eq!((lent.version, lent.term), (0, Span::secs(60)));
        // Another one is judged anew.
        if !restarts {
            let renewed = net.ask(LESSEE, longer());
            assert!(matches!(renewed, Ok(Reply::Renewed { version: 1, .. })), "{renewed:?}");
        }
    }
}

/// What the lessor answers to a message.
fn answer_to(net: &mut Net<'_>, from: KeyId, message: &Message) -> Option<Message> {
    let heard = net.nodes[LESSOR].hears(from, message);
    heard.into_iter().find_map(|effect| match effect {
        Effect::Reply { what, .. } => Some(net.nodes[LESSOR].carry(what)),
        _ => None,
    })
}

/// To remember a no is a write: one that anybody could ask for would be a burden, and so would more
/// than a few.
#[test]
fn a_no_is_kept_for_those_whose_lease_it_is_and_for_a_few_of_their_acts() {
    let people = People::new();
    let mut net = pair(&people);
    let lease = leased(&mut net, &Want { longest: Span::secs(120), ..little() });
    let drain = Command::Drain { within: Span::secs(600), revoke: false, dry_run: false };
    net.ask(LESSOR, drain).expect("it drains");
    let kept = |net: &Net<'_>| format!("{:?}", net.nodes[LESSOR].disk);
    let renews = |net: &mut Net<'_>, by: &Signer, nth: u8| {
        let act = RequestId([nth; 16]);
        let renew = Renew { lease, act, version: 0, term: Span::secs(90) };
        let until = net.nodes[LESSOR].now().wall + Span::secs(30);
        let signed = sign_until(people.fabric, by, lease.0, until, &renew);
        answer_to(net, by.id(), &Message::Renew(signed))
    };
    let before = kept(&net);
    let refused = renews(&mut net, &people.lessor, 1);
    assert!(matches!(refused, Some(Message::Refused(_))), "{refused:?}");
    assert!(kept(&net) == before, "a stranger makes it write");
    let mut binding = 0;
    for nth in 0..20 {
        let before = kept(&net);
        match renews(&mut net, &people.delegate, nth) {
            Some(Message::Refused(_)) => binding += 1,
            Some(Message::Done) => assert!(kept(&net) == before, "{nth}: it writes in vain"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(binding, 8);
    // Once those are over, there is room for others.
    net.pass(Span::secs(45));
    let refused = renews(&mut net, &people.delegate, 30);
    assert!(matches!(refused, Some(Message::Refused(_))), "{refused:?}");
}

// --- gangs ---

/// A gang of two, whole at its delegate, whose members cannot hear of each other.
fn ganged<'a>(people: &'a People, third: &'a Signer) -> (Net<'a>, Vec<LeaseId>) {
    let mut net = known(people, &[&people.lessor, &people.delegate, third]);
    net.lost = |_, said| matches!(said, Message::Commits(..));
    let gang = Command::Gang { want: little(), size: 2, job: Some(job()), together: true };
    match net.ask(LESSEE, gang) {
        Ok(Reply::Ganged { leases, .. }) => {
            assert_eq!(started(&net).len(), 0, "no member has heard of the other");
            (net, leases.into_iter().map(|leased| leased.lease).collect())
        }
        other => panic!("{other:?}"),
    }
}

/// The leases whose jobs were started.
fn started(net: &Net<'_>) -> Vec<LeaseId> {
    let starts = net.wanted.iter().filter_map(|(_, effect)| match effect {
        Effect::StartJob(start) => Some(start.lease),
        _ => None,
    });
    starts.collect()
}

#[test]
fn members_that_cannot_hear_each_other_hear_of_each_other_from_their_delegate() {
    let people = People::new();
    let third = Signer::from_seed(&[6; 32]);
    let (mut net, leases) = ganged(&people, &third);
    net.pass(Span::secs(4));
    assert_eq!(started(&net).len(), 0);
    net.said.clear();
    // What the delegate says arrives now, whatever members say is lost.
    net.lost = |by, said| by != LESSEE && matches!(said, Message::Commits(..));
    net.pass(Span::secs(3));
    assert_eq!(started(&net).len(), leases.len());
    // Once they confirm it, it says so no more.
    net.lost = |_, _| false;
    net.pass(Span::secs(3));
    net.said.clear();
    net.pass(Span::secs(10));
    let again = net.said.iter().filter(|(_, said)| matches!(said, Message::Commits(..)));
    assert_eq!(again.count(), 0);
}

#[test]
fn a_gang_that_came_to_nothing_leaves_nothing() {
    let people = People::new();
    let third = Signer::from_seed(&[6; 32]);
    let mut net = known(&people, &[&people.lessor, &people.delegate, &third]);
    net.lost = |by, said| by == LESSOR && matches!(said, Message::Committed(_));
    let gang = Command::Gang { want: little(), size: 2, job: Some(job()), together: true };
    let failed = net.ask(LESSEE, gang);
    assert!(matches!(failed, Err(Failure::Refused(_))), "{failed:?}");
    assert!(net.said.iter().any(|(_, said)| matches!(said, Message::Gang(..))));
    let kept = net.nodes[LESSEE].disk.values();
    assert_eq!(kept.filter(|kept| matches!(kept, Kept::Gang(..))).count(), 0);
    net.lost = |_, _| false;
    net.pass(Span::secs(90));
    for lessor in [LESSOR, 2] {
        let view = net.nodes[lessor].view();
        // The jobs of a try whose members had heard of each other are being stopped.
        let over = [LentStage::Draining, LentStage::Ended];
        assert!(view.lent.iter().all(|lent| over.contains(&lent.stage)), "all is given back");
    }
}

#[test]
fn a_claim_that_went_with_a_gang_is_not_there_for_another_job() {
    let people = People::new();
    let third = Signer::from_seed(&[6; 32]);
    let (mut net, leases) = ganged(&people, &third);
    let lease = leases[0];
    let same = net.ask(LESSEE, Command::Claim { lease, job: job() });
    assert_eq!(same.err(), Some(Failure::Act(Reason::NotCommitted)));
    let other = JobSpec { args: vec!["another".into()], ..job() };
    let other = net.ask(LESSEE, Command::Claim { lease, job: other });
    assert_eq!(other.err(), Some(Failure::InUse));
    net.lost = |_, _| false;
    net.pass(Span::secs(3));
    assert_eq!(started(&net).len(), 2);
    let same = net.ask(LESSEE, Command::Claim { lease, job: job() });
    assert!(matches!(same, Ok(Reply::Claimed(_))), "{same:?}");
}

#[test]
fn a_gangs_job_that_was_not_begun_is_begun_once_it_is_known_where_the_others_are() {
    let people = People::new();
    let third = Signer::from_seed(&[6; 32]);
    for begun in [false, true] {
        let (mut net, leases) = ganged(&people, &third);
        net.lost = |_, _| false;
        net.pass(Span::secs(3));
        assert_eq!(started(&net).len(), leases.len());
        let lent = net.nodes[LESSOR].view().lent;
        let lease = lent.iter().find(|lent| leases.contains(&lent.id)).expect("a member").id;
        if begun {
            net.tell(LESSOR, Event::JobBegun(lease));
        }
        net.wanted.clear();
        net.restart(LESSOR, &Orphans::new());
        net.pass(Span::secs(5));
        let again = net.wanted.iter().find_map(|(_, effect)| match effect {
            Effect::StartJob(start) if start.lease == lease => Some(start.job.env.clone()),
            _ => None,
        });
        let hosts = |env: Vec<(String, String)>| {
            env.into_iter().find(|(name, _)| name == "LEASEHOLD_HOSTS").map(|(_, hosts)| hosts)
        };
        let expected = (!begun).then_some("127.0.0.1,127.0.0.1");
        assert_eq!(again.and_then(hosts).as_deref(), expected, "begun: {begun}");
    }
}

// --- refusals, and grants that come too late ---

/// A node's offer of all it has, at this many times the usual price.
fn offer(people: &People, by: &Signer, times: u64) -> Signed {
    let mut offer: Offer = body_of(&people.offer());
    offer.shapes = vec![Resources::new(4_000, 4 << 30, 0)];
    offer.rates.cpu_hour = Amount(offer.rates.cpu_hour.0 * times);
    let hand = Hand { fabric: people.fabric, me: by.id(), epoch: 3 };
    let until = WALL + Span::secs(3600);
    let draft = hand.draft(key_subject(&by.id()), 1, until, &offer).expect("it fits");
    by.sign(&draft).expect("its own")
}

#[test]
fn whom_a_refusal_names_is_asked_next() {
    let people = People::new();
    // Each costs twice as much as the one before: that is the order in which they are asked.
    let keys = [11u8, 12, 13, 14].map(|n| Signer::from_seed(&[n; 32]));
    let asked = |out: &[Effect]| {
        let orders = out.iter().filter_map(|effect| match effect {
            Effect::Ask { to, token, what: Utterance::Signs(Word::Order, order) } => {
                Some((*to, *token, order.clone()))
            }
            _ => None,
        });
        orders.collect::<Vec<_>>()
    };
    for (named, next) in [
        (vec![], 1),
        (vec![keys[3].id()], 3),
        (vec![keys[2].id(), keys[3].id()], 2),
        (vec![keys[0].id(), people.lessor.id()], 1),
    ] {
        let mut node = Shell::start(&people, &people.delegate, disk([]), 1_000);
        for (key, times) in keys.iter().zip([1, 2, 4, 8]) {
            let certificate = people.certificate(key.id(), &key.id().short());
            node.met(&key.id(), &certificate, None);
            let records = vec![Shell::record(&people, key, 3, 1, 0), offer(&people, key, times)];
            node.hears(key.id(), &Message::Records(records));
        }
        let want = Want { shape: Resources::new(20, 1 << 20, 0), ..little() };
        let what = Command::Lease(want);
        let out = node.tell(Event::Asked { command: CommandId(1), what });
        let [(first, token, order)] = &asked(&out)[..] else { panic!("{out:?}") };
        assert_eq!(*first, keys[0].id());
        let refusal = Refusal {
            of: order.id(),
            reason: Reason::Capacity,
            figures: Vec::new(),
            offer: None,
            referrals: named.clone(),
        };
        let signed = sign(people.fabric, &keys[0], order.id(), &refusal);
        let out = node.answered(keys[0].id(), *token, &Message::Refused(signed));
        let [(second, ..)] = &asked(&out)[..] else { panic!("{out:?}") };
        assert_eq!(*second, keys[next].id(), "after {named:?}");
    }
}

#[test]
fn a_grant_that_comes_too_late_for_its_gang_is_given_back_at_once() {
    let people = People::new();
    let hosts = [10u8, 11, 12].map(|n| Signer::from_seed(&[n; 32]));
    let mut lessors: Vec<_> =
        hosts.iter().map(|key| Shell::start(&people, key, disk([]), 1_000)).collect();
    let mut node = Shell::start(&people, &people.delegate, disk([]), 1_000);
    let delegate = people.delegate.id();
    for lessor in &mut lessors {
        let (key, name) = (lessor.me.id(), lessor.me.id().short());
        lessor.met(&delegate, &people.certificate(delegate, "delegate"), None);
        node.met(&key, &people.certificate(key, &name), None);
        let records = lessor.own_records();
        node.hears(key, &Message::Records(records));
    }
    let gang = Command::Gang { want: little(), size: 2, job: None, together: true };
    let out = node.tell(Event::Asked { command: CommandId(1), what: gang });
    let orders: Vec<_> = out
        .into_iter()
        .filter_map(|effect| match effect {
            Effect::Ask { to, token, what: what @ Utterance::Signs(Word::Order, _) } => {
                Some((to, token, node.carry(what)))
            }
            _ => None,
        })
        .collect();
    assert_eq!(orders.len(), 3, "two and a quarter more");
    // Two say no: the try is given up before the third has answered.
    let [no, other_no, late] = &orders[..] else { panic!("three") };
    for (to, token, order) in [no, other_no] {
        let Message::Order(order) = order else { panic!("an order") };
        let refusal = Refusal {
            of: order.id(),
            reason: Reason::Capacity,
            figures: Vec::new(),
            offer: None,
            referrals: Vec::new(),
        };
        let by = hosts.iter().find(|key| key.id() == *to).expect("one of them");
        let signed = sign(people.fabric, by, order.id(), &refusal);
        node.answered(*to, *token, &Message::Refused(signed));
    }
    let lessor = lessors.iter_mut().find(|lessor| lessor.me.id() == late.0).expect("it is there");
    let granted = lessor.hears(delegate, &late.2).into_iter().find_map(|effect| match effect {
        Effect::Reply { what, .. } => Some(lessor.carry(what)),
        _ => None,
    });
    let granted = granted.expect("it answers");
    assert!(matches!(granted, Message::Granted(_)), "{granted:?}");
    let out = node.answered(late.0, late.1, &granted);
    let released = out.iter().any(|effect| {
        matches!(effect, Effect::Ask { to, what: Utterance::Signs(Word::Release, _), .. }
            if *to == late.0)
    });
    assert!(released, "{out:?}");
}

#[test]
fn a_refused_order_that_was_signed_elsewhere_counts_from_its_first_sending() {
    let people = People::new();
    let mut net = pair(&people);
    let lessee = people.tenant.id();
    let drafted = net.ask(
        LESSEE,
        Command::DraftOrder {
            want: little(),
            lessee,
            certificate: people.tenant_certificate.clone(),
        },
    );
    let Ok(Reply::Drafted(draft, _)) = drafted else { panic!("{drafted:?}") };
    let order = people.tenant.sign(&draft).expect("its own");
    let papers = || {
        let papers = message::verify_order(&order, &people.fabric).expect("it holds");
        Command::LeaseBy(Box::new(papers))
    };
    let drained =
        net.ask(LESSOR, Command::Drain { within: Span::secs(60), revoke: false, dry_run: false });
    assert!(matches!(drained, Ok(Reply::Reclaim(_))), "{drained:?}");
    let refused = net.ask(LESSEE, papers());
    assert!(matches!(refused, Err(Failure::Refused(_))), "{refused:?}");
    let sent = net.nodes[LESSEE].at;
    assert!(net.ask(LESSOR, Command::Resume).is_ok());
    // Somebody else who has seen the order says it again: now it is granted.
    net.pass(Span::secs(5));
    net.nodes[LESSOR].hears(people.delegate.id(), &Message::Order(order.clone()));
    net.pass(Span::secs(5));
    let leased = net.ask(LESSEE, papers());
    let Ok(Reply::Leased(leased)) = leased else { panic!("{leased:?}") };
    let view = net.nodes[LESSEE].view();
    let held = view.held.iter().find(|held| held.id == Some(leased.lease)).expect("it is held");
    let until = net.nodes[LESSEE].at + held.left.as_millis();
    assert!(until <= sent + 60_000, "it relies on it until {until}, it was sent before {sent}");
}
