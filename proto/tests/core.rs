//! A whole core, told what happens and asked what it wants, with peers played by the test.

mod common {
    pub mod people;
    pub mod shell;
}

use common::people::{People, job, now, sign, want};
use common::shell::{Disk, Net, Shell, config};
use leasehold_proto::base::id::LeaseId;
use leasehold_proto::base::money::{Amount, UNIT};
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::Span;
use leasehold_proto::core::{
    Command, Effect, Ended, Failure, Kept, LentStage, Orphan, Orphans, Reply,
};
use leasehold_proto::words::contract::{EndReason, JobSpec};
use leasehold_proto::words::equivocation::Reinstatement;
use leasehold_proto::words::message::Message;
use leasehold_proto::words::object::key_subject;
use leasehold_proto::words::usage::{Outcome, Usage};
use leasehold_proto::words::want::Want;

fn disk(kept: impl IntoIterator<Item = Kept>) -> Disk {
    kept.into_iter().map(|kept| (kept.key(), kept)).collect()
}

/// Lifted by the organisation, above this epoch.
fn lift(shell: &mut Shell<'_>, above: u64) {
    let people = shell.people;
    let key = shell.me.id();
    let body = Reinstatement { organisation: "acme".into(), key, above };
    let signed = sign(people.fabric, &people.root, key_subject(&key), &body);
    match shell.ask(Command::Reinstate(Box::new(signed))) {
        Ok(Reply::Reinstated(of, epoch)) => assert_eq!((of, epoch), (key, above)),
        other => panic!("{other:?}"),
    }
}

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

/// A lessor and a lessee's delegate that know each other.
fn pair(people: &People) -> Net<'_> {
    let lessor = Shell::start(people, &people.lessor, disk([]), 1_000);
    let delegate = Shell::start(people, &people.delegate, disk([]), 1_000);
    let mut net = Net::of(vec![lessor, delegate]);
    net.pass(Span::secs(5));
    net
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
    let shell = &net.nodes[LESSOR];
    let view = shell.core.view(now(shell.at));
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
