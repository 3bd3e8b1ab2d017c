//! What lessees do: order, claim (or not, or too late), stop early (or not), order offline, ask
//! twice.

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::{Hash, LeaseId, Payload};
use leasehold_proto::base::money::{Amount, UNIT};
use leasehold_proto::base::resource::{GIB, Rates, Resources};
use leasehold_proto::base::time::Span;
use leasehold_proto::core::{Command, Failure, Reply};
use leasehold_proto::minds::pricing::Policy;
use leasehold_proto::words::contract::{Class, EarlyEnd, Grant, JobSpec, Order};
use leasehold_proto::words::message::verify_order;
use leasehold_proto::words::object::{Envelope, body_in};
use leasehold_proto::words::sign::Draft;
use leasehold_proto::words::want::Want;

use super::fabric::{Fabric, Identity};
use crate::scenario::Load;

/// Why a command was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To get a lease.
    Lease,
    /// To get an order to sign elsewhere.
    Draft,
    /// To use a lease, or end it, or see its end.
    Act(LeaseId, &'static str),
    /// To get leases on several hosts.
    Gang,
    /// To have capacity back, or to sell again.
    Operator,
    /// To look.
    Look,
}

/// A command to be given later.
#[derive(Debug)]
pub(super) struct Later {
    pub(super) after_us: u64,
    pub(super) purpose: Purpose,
    pub(super) command: Command,
}

fn span(dice: &mut Dice, (low, high): (Span, Span)) -> Span {
    let (low, high) = (low.as_millis(), high.as_millis().max(low.as_millis()));
    Span::millis(low + dice.below(high - low + 1))
}

/// How much a host has.
pub(super) fn hardware(dice: &mut Dice) -> Resources {
    let cores = 2 + dice.below(7);
    Resources::new(cores * 1000, cores * 2 * GIB, 50 * GIB)
}

/// What its operator asks for it.
pub(super) fn policy(dice: &mut Dice) -> Policy {
    Policy {
        selling: true,
        rates: Rates {
            cpu_hour: Amount(10_000_000 + dice.below(30_000_000)),
            memory_gib_hour: Amount(1_000_000 + dice.below(5_000_000)),
            disk_gib_hour: Amount(dice.below(100_000)),
            gpu_hour: Vec::new(),
        },
        slack_permille: Some(400 + u16::try_from(dice.below(601)).unwrap_or(0)),
        early: EarlyEnd {
            notice: Span::millis(500 + dice.below(5_000)),
            freeze: Span::millis(dice.below(3_000)),
            credit_permille: u16::try_from(dice.below(1_001)).unwrap_or(0),
        },
        max_term: Span::secs(3600),
        max_claim_within: Span::secs(300),
        runtimes: vec!["wasm".into()],
        isolation: vec!["wasm".into()],
    }
}

fn want(load: &Load, dice: &mut Dice) -> Want {
    let term = span(dice, load.term);
    let milli = 250 * (1 + dice.below(12));
    // Now and then a budget or a limit of exposure that ends the lease before its term.
    let budget = if dice.chance(1, 6) { 20_000 + dice.below(400_000) } else { 10 * UNIT };
    let exposure = if dice.chance(1, 10) { dice.below(100_000) } else { UNIT };
    Want {
        model: None,
        shape: Resources::new(milli, (1 + dice.below(8)) * GIB / 4, dice.below(4) * GIB),
        class: if dice.chance(1, 3) { Class::Slack } else { Class::Firm },
        term,
        longest: if dice.chance(1, 2) { term.scale(1 + dice.below(3), 1) } else { term },
        claim_within: span(dice, load.claim_within).min(term),
        max_hourly: Amount(10 * UNIT),
        budget: Amount(budget),
        exposure: Amount(exposure),
        receipt_every: Span::millis(500 + dice.below(10_000)),
        runtime: "wasm".into(),
        lessors: Vec::new(),
        labels: Vec::new(),
        isolation: Vec::new(),
    }
}

fn job(dice: &mut Dice) -> JobSpec {
    JobSpec {
        runtime: "wasm".into(),
        program: Payload { root: Hash::of(&dice.number().to_le_bytes()), size: 1_000 },
        args: vec!["--input".into(), "data".into()],
        env: Vec::new(),
        stdin: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
        release_after: false,
    }
}

/// A lessee wants something.
pub(super) fn begin(load: &Load, me: &Identity, dice: &mut Dice) -> (Purpose, Command) {
    let want = want(load, dice);
    match dice.below(1000) {
        n if n < load.offline => {
            let certificate = me.tenant_certificate.clone();
            let lessee = me.tenant.id();
            (Purpose::Draft, Command::DraftOrder { want, lessee, certificate })
        }
        n if (880..930).contains(&n) => {
            let size = u16::try_from(1 + dice.below(5)).unwrap_or(1);
            let claim_within = want.claim_within.max(Span::secs(3)).min(want.term);
            let want = Want { claim_within, ..want };
            let job = dice.chance(3, 4).then(|| job(dice));
            (Purpose::Gang, Command::Gang { want, size, job, together: dice.chance(1, 2) })
        }
        n if (930..960).contains(&n) => (Purpose::Operator, operate(dice)),
        n if n >= 980 => (Purpose::Look, Command::Plan(want)),
        n if n >= 960 => (Purpose::Look, Command::View),
        _ => (Purpose::Lease, Command::Lease(want)),
    }
}

/// The owner of a host wants something.
fn operate(dice: &mut Dice) -> Command {
    let within = Span::millis(dice.below(15_000));
    let dry_run = dice.chance(1, 5);
    match dice.below(5) {
        0 => Command::Drain { within, revoke: dice.chance(1, 2), dry_run },
        1 | 2 => {
            let shape = Resources::new(500 * (1 + dice.below(6)), GIB / 4, 0);
            Command::Reclaim { shape, within, dry_run }
        }
        _ => Command::Resume,
    }
}

/// A command was replied to: what its giver does next.
pub(super) fn go_on(
    load: &Load,
    fabric: &Fabric,
    me: &Identity,
    purpose: &Purpose,
    reply: &Result<Reply, Failure>,
    dice: &mut Dice,
) -> Vec<Later> {
    match reply {
        Ok(Reply::Leased(leased)) => {
            let Some(grant) = body_in::<Grant>(&leased.grant.envelope) else { return Vec::new() };
            use_lease(load, leased.lease, &grant, dice)
        }
        Ok(Reply::Ganged { leases, .. }) => {
            let uses = leases.iter().filter_map(|leased| {
                Some((leased.lease, body_in::<Grant>(&leased.grant.envelope)?))
            });
            let uses: Vec<_> = uses.collect();
            uses.iter().flat_map(|(id, grant)| use_lease(load, *id, grant, dice)).collect()
        }
        // Who drained or reclaimed sells again after a while.
        Ok(Reply::Reclaim(_)) if *purpose == Purpose::Operator => {
            let after_us = 1_000_000 * (1 + dice.below(20));
            vec![Later { after_us, purpose: Purpose::Operator, command: Command::Resume }]
        }
        Ok(Reply::Drafted(draft, _)) => sign_elsewhere(fabric, me, draft, dice),
        // A file that got no answer is carried again.
        Err(Failure::Refused(_) | Failure::Unreachable(_)) if *purpose == Purpose::Draft => {
            Vec::new()
        }
        _ => Vec::new(),
    }
}

fn use_lease(load: &Load, lease: LeaseId, grant: &Grant, dice: &mut Dice) -> Vec<Later> {
    let (claim_within, term) = (grant.claim_within, grant.term);
    let mut plan = Vec::new();
    let mut later = |after: Span, command: Command| {
        let after_us = after.as_millis() * 1000;
        let act = match &command {
            Command::Claim { .. } => "claim",
            Command::Release(_) => "release",
            Command::Renew { .. } => "renew",
            _ => "await its end",
        };
        plan.push(Later { after_us, purpose: Purpose::Act(lease, act), command });
    };
    if dice.chance(1, 2) {
        later(Span::millis(dice.below(500)), Command::AwaitEnd(lease));
    }
    let claims = if dice.chance(load.unclaimed, 1000) {
        // Never, or around the last moment, or too late.
        match dice.below(3) {
            0 => None,
            _ => Some(Span::millis(claim_within.as_millis() * (80 + dice.below(60)) / 100)),
        }
    } else {
        Some(Span::millis(dice.below(claim_within.as_millis().clamp(1, 1_000))))
    };
    if let Some(after) = claims {
        let job = job(dice);
        if dice.chance(1, 10) {
            later(after + Span::millis(dice.below(50)), Command::Claim { lease, job: job.clone() });
        }
        later(after, Command::Claim { lease, job });
    }
    if grant.longest > term {
        // In steps, now and then too late, too long, or twice.
        let mut after = Span::millis(dice.below(term.as_millis()));
        for step in 1..=1 + dice.below(3) {
            let more = grant.longest.saturating_sub(term).scale(step, 3);
            let term = term + more + Span::secs(u64::from(dice.chance(1, 10)) * 10_000);
            later(after, Command::Renew { lease, term });
            if dice.chance(1, 5) {
                later(after + Span::millis(dice.below(300)), Command::Renew { lease, term });
            }
            after += Span::millis(dice.below(term.as_millis().min(60_000)));
        }
    }
    if dice.chance(load.released, 1000) {
        let after = Span::millis(dice.below(term.as_millis()));
        later(after, Command::Release(lease));
        if dice.chance(1, 10) {
            later(after + Span::millis(dice.below(2_000)), Command::Release(lease));
        }
    }
    plan
}

/// The lessee signs a drafted order on its own machine; sometimes it gives the file to its node
/// twice, and sometimes it signs another order with the same request id.
fn sign_elsewhere(fabric: &Fabric, me: &Identity, draft: &Draft, dice: &mut Dice) -> Vec<Later> {
    let mut drafts = vec![draft.clone()];
    if dice.chance(1, 2) {
        drafts.push(draft.clone());
    }
    if dice.chance(1, 2)
        && let Some(other) = with_other_term(draft)
    {
        drafts.push(other);
    }
    let signed = drafts.iter().filter_map(|draft| me.tenant.sign(draft).ok());
    let papers = signed.filter_map(|signed| verify_order(&signed, &fabric.id).ok());
    let commands = papers.map(|papers| Command::LeaseBy(Box::new(papers)));
    let mut after_us = 0;
    let later = |command| {
        after_us += 1_000 + dice.below(3_000_000);
        Later { after_us, purpose: Purpose::Lease, command }
    };
    commands.map(later).collect()
}

fn with_other_term(draft: &Draft) -> Option<Draft> {
    let envelope = Envelope::decode(&draft.envelope).ok()?;
    let order: Order = envelope.read().ok()?;
    let (term, longest) = (order.term + Span::secs(1), order.longest + Span::secs(1));
    let order = Order { term, longest, ..order };
    Draft::new((&envelope.header).into(), &order).ok()
}
