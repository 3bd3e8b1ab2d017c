//! Leases on models: from the offer to the proof, through two whole cores.

mod common {
    pub mod people;
    pub mod shell;
}

use common::people::{People, job, want};
use common::shell::{Disk, Net, Shell};
use leasehold_proto::base::id::{Hash, LeaseId};
use leasehold_proto::base::money::{Amount, UNIT};
use leasehold_proto::base::resource::Resources;
use leasehold_proto::base::time::Span;
use leasehold_proto::core::{
    Command, Effect, Event, Failure, HeldStage, Kept, LentStage, ModelLease, Orphans, Reply,
};
use leasehold_proto::proof::{self, Proof, ProofError};
use leasehold_proto::words::contract::{Class, EndReason, JobSpec, Reason};
use leasehold_proto::words::message::Message;
use leasehold_proto::words::model::{
    Endpoint, Finish, MODEL, ModelOffer, ModelState, ModelTerms, Sampling, Served, Service,
    TokenRates,
};
use leasehold_proto::words::sign::{Signed, Verified};
use leasehold_proto::words::usage::{ObjectionReason, Outcome, Usage};
use leasehold_proto::words::want::Want;

const LESSOR: usize = 0;
const LESSEE: usize = 1;
/// A thousandth for a token that is asked, four for one that is answered.
const RATES: TokenRates =
    TokenRates { prompt: Amount(UNIT * 1_000), completion: Amount(UNIT * 4_000) };

fn offered(name: &str) -> ModelOffer {
    let terms = ModelTerms { name: name.into(), digest: Hash::of(name.as_bytes()), rates: RATES };
    ModelOffer {
        terms,
        slack: Some(RATES.permille(500)),
        quantisation: "Q8_0".into(),
        context: 8_192,
        endpoints: vec![Endpoint::Chat],
        abilities: 0,
        demo: false,
        state: ModelState::Warm,
        load: 0,
        tokens_per_second: 50,
        first_token: Span::millis(20),
    }
}

/// A lessor that serves a model, and a lessee's delegate that knows of it.
fn pair(people: &People) -> Net<'_> {
    let nodes =
        [&people.lessor, &people.delegate].map(|key| Shell::start(people, key, Disk::new(), 1_000));
    let mut net = Net::of(nodes.into());
    net.tell(LESSOR, Event::Models(vec![offered("lantern")]));
    net.pass(Span::secs(5));
    net
}

fn wanted(budget: Amount) -> Want {
    Want {
        model: Some(offered("lantern").terms),
        shape: Resources::default(),
        runtime: MODEL.into(),
        term: Span::secs(600),
        longest: Span::secs(600),
        max_hourly: Amount::ZERO,
        budget,
        exposure: Amount(2 * UNIT),
        ..want()
    }
}

fn claim(lease: LeaseId) -> Command {
    Command::Claim { lease, job: JobSpec { runtime: MODEL.into(), ..job() } }
}

/// A lease on the model, in use, with what its lessor's shell was told of it.
fn used(net: &mut Net<'_>, budget: Amount) -> (LeaseId, ModelLease) {
    let lease = match net.ask(LESSEE, Command::Lease(wanted(budget))) {
        Ok(Reply::Leased(leased)) => leased.lease,
        other => panic!("{other:?}"),
    };
    let claimed = net.ask(LESSEE, claim(lease));
    assert!(matches!(claimed, Ok(Reply::Claimed(_))), "{claimed:?}");
    (lease, started(net, lease).expect("it is to be served"))
}

fn started(net: &Net<'_>, lease: LeaseId) -> Option<ModelLease> {
    let wanted = net.wanted.iter().rev();
    let mut starts = wanted.filter_map(|(by, effect)| match effect {
        Effect::StartJob(start) if *by == LESSOR && start.lease == lease => start.model.clone(),
        _ => None,
    });
    starts.next()
}

fn service(prompt_tokens: u64, completion_tokens: u64) -> Service {
    Service {
        endpoint: Endpoint::Chat,
        request: Hash([1; 32]),
        response: Hash([2; 32]),
        sampling: Sampling::default(),
        finish: Finish::Answered,
        prompt_tokens,
        cached_tokens: 0,
        completion_tokens,
    }
}

/// A request is served, and its record signed.
fn serve(net: &mut Net<'_>, lease: LeaseId, service: Service) -> Signed {
    match net.ask(LESSOR, Command::Serve(lease, service)) {
        Ok(Reply::Served(draft)) => net.nodes[LESSOR].me.sign(&draft).expect("its own"),
        other => panic!("{other:?}"),
    }
}

fn consume(net: &mut Net<'_>, record: &Signed) -> Result<Reply, Failure> {
    let record: Verified<Served> =
        record.verify(&net.nodes[LESSEE].people.fabric).expect("it is signed");
    net.ask(LESSEE, Command::Consume(Box::new(record)))
}

fn both(net: &mut Net<'_>, lease: LeaseId, service: Service) {
    let record = serve(net, lease, service);
    let agreed = consume(net, &record);
    assert!(matches!(agreed, Ok(Reply::Consumed)), "{agreed:?}");
}

fn lent(net: &Net<'_>, lease: LeaseId) -> leasehold_proto::core::view::LentView {
    let view = net.nodes[LESSOR].view();
    view.lent.into_iter().find(|lent| lent.id == lease).expect("it is known")
}

fn held(net: &Net<'_>, lease: LeaseId) -> leasehold_proto::core::view::HeldView {
    let view = net.nodes[LESSEE].view();
    view.held.into_iter().find(|held| held.id == Some(lease)).expect("it is held")
}

/// What a node keeps that proves a lease, as it is exported.
fn proof_of(net: &Net<'_>, node: usize, lease: LeaseId) -> Proof {
    let shell = &net.nodes[node];
    let sign = |draft: &leasehold_proto::words::sign::Draft| shell.me.sign(draft).expect("its own");
    let mut proof = None;
    let (mut receipts, mut acknowledgements, mut served) = (Vec::new(), Vec::new(), Vec::new());
    for kept in shell.disk.values() {
        match kept {
            Kept::Lent(id, lent) if *id == lease => {
                proof = Some(Proof {
                    charter: shell.people.charter.clone(),
                    offer: lent.offer.as_ref().map(sign),
                    order: lent.order.clone(),
                    grant: sign(&lent.grant),
                    renewals: Vec::new(),
                    receipts: Vec::new(),
                    acknowledgements: Vec::new(),
                    served: Vec::new(),
                    termination: lent.termination.as_ref().map(sign),
                });
            }
            Kept::Receipt(id, _, draft) if *id == lease => receipts.push(sign(draft)),
            Kept::Acknowledged(id, _, ack) if *id == lease => acknowledgements.push(ack.clone()),
            Kept::Served(id, _, draft) if *id == lease => served.push(sign(draft)),
            _ => {}
        }
    }
    Proof { receipts, acknowledgements, served, ..proof.expect("it was granted here") }
}

#[test]
fn tokens_are_billed_agreed_on_and_proven() {
    let people = People::new();
    let mut net = pair(&people);
    let sellers = net.ask(LESSEE, Command::Sellers);
    let Ok(Reply::Sellers(sellers)) = sellers else { panic!("{sellers:?}") };
    assert_eq!(sellers.len(), 2, "every node");
    let selling: Vec<_> = sellers.iter().filter(|seller| !seller.models.is_empty()).collect();
    assert_eq!(selling.len(), 1);
    assert!(selling[0].up && selling[0].models == [offered("lantern")]);
    let free = net.nodes[LESSOR].view().promised;
    let (lease, told) = used(&mut net, Amount(10 * UNIT));
    assert_eq!(told.terms, offered("lantern").terms);
    assert_eq!(net.nodes[LESSOR].view().promised, free, "it takes no capacity");
    both(&mut net, lease, service(100, 50));
    both(&mut net, lease, service(200, 25));
    net.pass(Span::secs(5));
    // 300 thousandths and 75 times four.
    let cost = Amount(UNIT * 600 / 1_000);
    let (there, here) = (lent(&net, lease), held(&net, lease));
    assert_eq!((there.charge, here.charge), (cost, cost));
    assert_eq!((there.usage.tally.requests, there.acknowledged), (2, there.receipts));
    let receipts = there.receipts;
    net.pass(Span::secs(60));
    assert_eq!(lent(&net, lease).receipts, receipts, "nothing is agreed on while nobody asks");
    let released = net.ask(LESSEE, Command::Release(lease));
    assert!(matches!(released, Ok(Reply::Released)), "{released:?}");
    let stops = net.wanted.iter().any(
        |(by, effect)| matches!(effect, Effect::StopJob(of, _) if *by == LESSOR && *of == lease),
    );
    assert!(stops, "its requests are to be let go of");
    net.tell(LESSOR, Event::JobEnded(lease, Outcome::Stopped, Usage::default()));
    net.pass(Span::secs(5));
    assert_eq!(lent(&net, lease).stage, LentStage::Ended);
    assert_eq!(held(&net, lease).stage, HeldStage::Ended);
    let proof = proof_of(&net, LESSOR, lease);
    let verdict = proof::check(&proof).expect("it holds");
    assert_eq!((verdict.charge, verdict.acknowledged_charge), (cost, cost));
    assert_eq!((verdict.requests_checked, verdict.price_checked), (2, true));
    // Without its records the sums still follow from the receipts; with other records they do not.
    let bare = Proof { served: Vec::new(), ..proof.clone() };
    assert_eq!(proof::check(&bare).expect("it holds").requests_checked, 0);
    let fewer = Proof { served: proof.served[..1].to_vec(), ..proof.clone() };
    let reason = ObjectionReason::Tokens;
    let missing = proof::check(&fewer);
    assert!(matches!(missing, Err(ProofError::Receipt { reason: why, .. }) if why == reason));
    let swapped = Proof { served: proof.served.iter().rev().cloned().collect(), ..proof };
    assert!(matches!(proof::check(&swapped), Err(ProofError::Request { number: 1, .. })));
}

#[test]
fn what_one_side_does_not_know_is_not_agreed_on() {
    let people = People::new();
    let mut net = pair(&people);
    let (lease, _) = used(&mut net, Amount(10 * UNIT));
    // The receipt comes before the record: it waits.
    let first = serve(&mut net, lease, service(10, 10));
    net.pass(Span::secs(5));
    assert_eq!((held(&net, lease).receipts, held(&net, lease).objection), (0, None));
    consume(&mut net, &first).expect("it is agreed on");
    net.pass(Span::secs(5));
    assert_eq!(held(&net, lease).receipts, lent(&net, lease).receipts);
    // Records may overtake each other.
    let second = serve(&mut net, lease, service(1, 1));
    let third = serve(&mut net, lease, service(2, 2));
    consume(&mut net, &third).expect("it waits for the one before it");
    net.pass(Span::secs(5));
    assert_eq!(held(&net, lease).usage.tally.requests, 1);
    consume(&mut net, &second).expect("both are agreed on");
    consume(&mut net, &second).expect("a repeat changes nothing");
    net.pass(Span::secs(5));
    assert_eq!(held(&net, lease).usage.tally.requests, 3);
    // Another record with a number that was agreed on is refused.
    let again = Served { prompt_total: 1, ..body_in(&second) };
    let again = common::people::sign(people.fabric, &people.lessor, lease.0, &again);
    let refused = consume(&mut net, &again);
    assert!(matches!(refused, Err(Failure::BadRecord(_))), "{refused:?}");
    // What is never agreed on is not paid: the lease stands still, and then ends.
    for _ in 0..3 {
        serve(&mut net, lease, service(500, 500));
    }
    net.pass(Span::secs(10));
    let lent = lent(&net, lease);
    assert_eq!(lent.end, Some(EndReason::Exposure), "{lent:?}");
    assert_eq!(held(&net, lease).charge, Amount(UNIT * 65 / 1_000));
}

fn body_in(signed: &Signed) -> Served {
    leasehold_proto::words::object::body_in(&signed.envelope).expect("its body")
}

#[test]
fn a_budget_ends_a_lease_and_bounds_what_it_costs() {
    let people = People::new();
    let mut net = pair(&people);
    let (lease, told) = used(&mut net, Amount(UNIT));
    assert_eq!(told.cap, Amount(UNIT));
    both(&mut net, lease, service(100, 50));
    both(&mut net, lease, service(900, 0));
    net.pass(Span::secs(1));
    net.tell(LESSOR, Event::JobEnded(lease, Outcome::Stopped, Usage::default()));
    net.pass(Span::secs(5));
    let lent = lent(&net, lease);
    assert_eq!((lent.end, lent.charge), (Some(EndReason::Budget), Amount(UNIT)));
    let late = net.ask(LESSOR, Command::Serve(lease, service(1, 1)));
    assert!(matches!(late, Err(Failure::Over)), "{late:?}");
    proof::check(&proof_of(&net, LESSOR, lease)).expect("it holds");
}

#[test]
fn a_restart_on_either_side_forgets_no_request() {
    let people = People::new();
    for (node, known) in [(LESSOR, true), (LESSEE, true), (LESSOR, false)] {
        let mut net = pair(&people);
        let (lease, _) = used(&mut net, Amount(10 * UNIT));
        if known {
            net.pass(Span::secs(1));
        }
        both(&mut net, lease, service(10, 10));
        both(&mut net, lease, service(20, 20));
        net.wanted.clear();
        net.restart(node, &Orphans::new());
        if node == LESSOR {
            net.tell(LESSOR, Event::Models(vec![offered("lantern")]));
        }
        net.pass(Span::secs(15));
        if node == LESSOR {
            let told = started(&net, lease).expect("it is served again");
            assert_eq!(told.tally.requests, 2, "with what was served before");
        }
        both(&mut net, lease, service(30, 30));
        net.pass(Span::secs(5));
        let (lent, held) = (lent(&net, lease), held(&net, lease));
        assert_eq!(lent.stage, LentStage::Active, "{lent:?}");
        assert_eq!((lent.usage.tally, lent.acknowledged), (held.usage.tally, held.receipts));
        assert_eq!((held.usage.tally.requests, held.charge), (3, Amount(UNIT * 300 / 1_000)));
    }
}

#[test]
fn a_model_is_leased_as_it_is_offered_or_not_at_all() {
    let people = People::new();
    let mut net = pair(&people);
    let terms = offered("lantern").terms;
    let cheaper = TokenRates { prompt: Amount(1), completion: Amount(1) };
    for (what, model) in [
        ("another model", ModelTerms { name: "beacon".into(), ..terms.clone() }),
        ("other weights", ModelTerms { digest: Hash([9; 32]), ..terms.clone() }),
        ("another price", ModelTerms { rates: cheaper, ..terms.clone() }),
    ] {
        let want = Want { model: Some(model), ..wanted(Amount(UNIT)) };
        let refused = net.ask(LESSEE, Command::Lease(want));
        assert!(matches!(refused, Err(Failure::NothingFits(_))), "{what}: {refused:?}");
    }
    // What is not served any more is not granted, whatever the map says.
    net.lost = |_, said| matches!(said, Message::Announce(_) | Message::Records(_));
    net.tell(LESSOR, Event::Models(Vec::new()));
    let refused = net.ask(LESSEE, Command::Lease(wanted(Amount(UNIT))));
    let Err(Failure::Refused(heard)) = refused else { panic!("{refused:?}") };
    assert!(heard.iter().any(|heard| heard.reason == Some(Reason::NotOffered)), "{heard:?}");
    net.lost = |_, _| false;
    net.tell(LESSOR, Event::Models(vec![offered("lantern")]));
    net.pass(Span::secs(5));
    // A job does not run under it, nor a request under a lease on capacity.
    let leased = net.ask(LESSEE, Command::Lease(wanted(Amount(UNIT))));
    let Ok(Reply::Leased(leased)) = leased else { panic!("{leased:?}") };
    let refused = net.ask(LESSEE, Command::Claim { lease: leased.lease, job: job() });
    assert!(matches!(refused, Err(Failure::Act(Reason::BadJob))), "{refused:?}");
    let most = Amount(10 * UNIT);
    let shape = Resources::new(200, 1 << 28, 0);
    let capacity = Want { shape, budget: most, max_hourly: most, exposure: most, ..want() };
    let leased = net.ask(LESSEE, Command::Lease(capacity));
    let Ok(Reply::Leased(leased)) = leased else { panic!("{leased:?}") };
    let refused = net.ask(LESSEE, claim(leased.lease));
    assert!(matches!(refused, Err(Failure::Act(Reason::BadJob))), "{refused:?}");
    let served = net.ask(LESSOR, Command::Serve(leased.lease, service(1, 1)));
    assert!(matches!(served, Err(Failure::Over)), "{served:?}");
}

#[test]
fn whoever_can_wait_pays_the_price_of_slack_and_nobody_else_does() {
    let people = People::new();
    let mut net = pair(&people);
    let (firm, slack) =
        (offered("lantern").terms, offered("lantern").terms_in(Class::Slack).expect("it is sold"));
    let order = |net: &mut Net<'_>, model: &ModelTerms, class: Class| {
        let want = Want { model: Some(model.clone()), class, ..wanted(Amount(10 * UNIT)) };
        net.ask(LESSEE, Command::Lease(want))
    };
    for (what, model, class) in [
        ("its price in the other class", &slack, Class::Firm),
        ("the firm price for what can wait", &firm, Class::Slack),
    ] {
        let refused = order(&mut net, model, class);
        assert!(matches!(refused, Err(Failure::NothingFits(_))), "{what}: {refused:?}");
    }
    let Ok(Reply::Leased(leased)) = order(&mut net, &slack, Class::Slack) else { panic!() };
    let lease = leased.lease;
    let claimed = net.ask(LESSEE, claim(lease));
    assert!(matches!(claimed, Ok(Reply::Claimed(_))), "{claimed:?}");
    let told = started(&net, lease).expect("it is to be served");
    assert_eq!((told.class, told.terms), (Class::Slack, slack.clone()));
    both(&mut net, lease, service(100, 50));
    net.pass(Span::secs(5));
    // Half of 100 thousandths and 50 times four.
    assert_eq!(held(&net, lease).charge, Amount(UNIT * 150 / 1_000));
    // Its operator takes back what was sold so, and keeps what it sold firmly.
    let (kept, _) = used(&mut net, Amount(10 * UNIT));
    let drained =
        net.ask(LESSOR, Command::Drain { within: Span::secs(60), revoke: false, dry_run: false });
    assert!(drained.is_ok(), "{drained:?}");
    net.pass(Span::secs(60));
    net.tell(LESSOR, Event::JobEnded(lease, Outcome::Stopped, Usage::default()));
    net.pass(Span::secs(5));
    assert_eq!(lent(&net, lease).end, Some(EndReason::Reclaimed));
    assert_eq!(lent(&net, kept).stage, LentStage::Active);
    let proof = proof_of(&net, LESSOR, lease);
    let verdict = proof::check(&proof).expect("it holds");
    assert_eq!((verdict.model.as_ref(), verdict.price_checked), (Some(&slack), true));
    // What is not sold so any more is not granted, whatever the map says.
    let resumed = net.ask(LESSOR, Command::Resume);
    assert!(resumed.is_ok(), "{resumed:?}");
    net.pass(Span::secs(5));
    net.lost = |_, said| matches!(said, Message::Announce(_) | Message::Records(_));
    net.tell(LESSOR, Event::Models(vec![ModelOffer { slack: None, ..offered("lantern") }]));
    let refused = order(&mut net, &verdict.model.expect("it was checked"), Class::Slack);
    let Err(Failure::Refused(heard)) = refused else { panic!("{refused:?}") };
    assert!(heard.iter().any(|heard| heard.reason == Some(Reason::NotOffered)), "{heard:?}");
}

#[test]
fn a_lessee_holds_only_so_many_leases_on_models() {
    let people = People::new();
    let mut net = pair(&people);
    let mut leases = Vec::new();
    let refused = loop {
        match net.ask(LESSEE, Command::Lease(wanted(Amount(UNIT)))) {
            Ok(Reply::Leased(leased)) => leases.push(leased.lease),
            other => break other,
        }
    };
    assert_eq!(leases.len(), 256, "{refused:?}");
    let Err(Failure::Refused(heard)) = refused else { panic!("{refused:?}") };
    assert!(heard.iter().any(|heard| heard.reason == Some(Reason::Busy)), "{heard:?}");
    // One that ends makes room.
    let released = net.ask(LESSEE, Command::Release(leases[0]));
    assert!(released.is_ok(), "{released:?}");
    net.pass(Span::secs(1));
    let leased = net.ask(LESSEE, Command::Lease(wanted(Amount(UNIT))));
    assert!(matches!(leased, Ok(Reply::Leased(_))), "{leased:?}");
}
