//! A whole core, told what happens and asked what it wants, with peers played by the test.

mod common {
    pub mod people;
    pub mod shell;
}

use common::people::{People, sign};
use common::shell::{Disk, Shell, config};
use leasehold_proto::base::time::Span;
use leasehold_proto::core::kept::Kept;
use leasehold_proto::core::{Command, Reply};
use leasehold_proto::words::equivocation::Reinstatement;
use leasehold_proto::words::object::key_subject;

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
