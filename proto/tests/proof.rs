//! What a proof must not be able to say: each story below is signed by the right keys and lies in
//! one place only.

#[path = "common/story.rs"]
mod story;

use leasehold_proto::proof::{ProofError, check};
use leasehold_proto::words::contract::{EndReason, Grant, Order, Termination};
use leasehold_proto::words::object::{Body, Envelope};
use leasehold_proto::words::sign::{Draft, HeaderOf, Signed, Signer};
use leasehold_proto::{Span, Wall};
use story::{DELEGATE, LESSOR, Story};

/// `signed` again, with its body and end of validity changed, by the key of `seed`.
fn forge<T: Body>(
    signed: &Signed,
    seed: &[u8; 32],
    change: impl FnOnce(&mut T, &mut Wall),
) -> Signed {
    let mut body = signed.verify_anywhere::<T>().map(|verified| verified.body().clone_by_wire());
    let body = body.as_mut().expect("verifies");
    let header = Envelope::decode(&signed.envelope).expect("decodes").header;
    let mut not_after = header.not_after;
    change(body, &mut not_after);
    let header = HeaderOf { not_after, ..HeaderOf::from(&header) };
    let draft = Draft::new(header, body).expect("fits");
    Signer::from_seed(seed).sign(&draft).expect("signs")
}

/// Bodies need not be `Clone`: the wire copies them.
trait CloneByWire: Sized {
    fn clone_by_wire(&self) -> Self;
}

impl<T: Body> CloneByWire for T {
    fn clone_by_wire(&self) -> Self {
        use leasehold_proto::words::wire;
        let bytes = wire::encode::<{ wire::MAX_OBJECT }>(self).expect("encodes");
        wire::decode::<{ wire::MAX_OBJECT }, Self>(&bytes).expect("decodes")
    }
}

#[test]
fn a_billed_lease_did_not_lapse_nor_end_for_another_reason() {
    let story = Story::new();
    for reason in [EndReason::Lapsed, EndReason::Term, EndReason::Reclaimed] {
        let mut proof = story.proof();
        let end = forge::<Termination>(&story.termination, &LESSOR, |body, _| body.reason = reason);
        proof.termination = Some(end);
        assert!(
            matches!(check(&proof), Err(ProofError::Termination(_))),
            "{reason:?}: {:?}",
            check(&proof)
        );
    }
}

#[test]
fn an_order_that_had_expired_was_not_granted() {
    let story = Story::new();
    let decided = story.grant.verify_anywhere::<Grant>().expect("verifies").body().decided;
    let order = forge::<Order>(&story.order, &DELEGATE, |_, not_after| {
        *not_after = Wall(decided.0 - Span::secs(60).as_millis());
    });
    let mut proof = story.proof();
    proof.grant = forge::<Grant>(&story.grant, &LESSOR, |body, _| body.order = order.id());
    proof.order = order;
    assert!(matches!(check(&proof), Err(ProofError::Terms(_))), "{:?}", check(&proof));
}

#[test]
fn an_order_keeps_to_the_charters_limits() {
    let story = Story::new();
    let order = forge::<Order>(&story.order, &DELEGATE, |body, _| {
        body.placed = Wall(body.placed.0 - Span::secs(30 * 86_400).as_millis());
    });
    let mut proof = story.proof();
    proof.grant = forge::<Grant>(&story.grant, &LESSOR, |body, _| body.order = order.id());
    proof.order = order;
    assert!(matches!(check(&proof), Err(ProofError::Terms(_))), "{:?}", check(&proof));
}
