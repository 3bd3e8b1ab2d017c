//! What dishonest nodes say: an honest core's words, changed on their way out and signed with the
//! node's own key, and acts that no core asks for.
//!
//! Nothing here reaches into a core. What a vice can do is what anybody can do who holds one
//! admitted key and has heard what goes over its links.

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::KeyId;
use leasehold_proto::base::money::{Amount, HOUR_MS};
use leasehold_proto::base::time::{Span, Wall};
use leasehold_proto::words::contract::{Claim, Grant, Release, Renew};
use leasehold_proto::words::message::{Message, Word};
use leasehold_proto::words::object::{Body, Envelope, Header, Kind};
use leasehold_proto::words::record::{HostRecord, Offer};
use leasehold_proto::words::sign::{Draft, HeaderOf, Signed};
use leasehold_proto::words::usage::Receipt;

use crate::scenario::Vice;

/// How long a forged act stays valid.
const ACT_LIFE: Span = Span::secs(30);

fn opened<T: Body>(envelope: &[u8]) -> Option<(Header, T)> {
    let envelope = Envelope::decode(envelope).ok()?;
    if envelope.header.kind != T::KIND {
        return None;
    }
    let body = envelope.read().ok()?;
    Some((envelope.header, body))
}

/// What a node with these vices signs in place of `draft`; none where it signs that.
pub(super) fn twisted(vices: &[Vice], draft: &Draft, dice: &mut Dice) -> Option<Draft> {
    if vices.contains(&Vice::Inflates)
        && let Some((header, receipt)) = opened::<Receipt>(&draft.envelope)
    {
        return Draft::new(HeaderOf::from(&header), &inflated(receipt, dice)).ok();
    }
    if vices.contains(&Vice::Backdates)
        && let Some((header, grant)) = opened::<Grant>(&draft.envelope)
        && dice.chance(1, 2)
    {
        // Either its day is another, or it is shorter than what was ordered.
        let grant = if dice.chance(1, 2) {
            let decided = Wall(grant.decided.0.saturating_sub(60_000));
            Grant { decided, ..grant }
        } else {
            Grant { term: grant.term.scale(1, 2), ..grant }
        };
        return Draft::new(HeaderOf::from(&header), &grant).ok();
    }
    None
}

/// More time than has passed, more money than that costs, or both.
fn inflated(mut receipt: Receipt, dice: &mut Dice) -> Receipt {
    let billed = receipt.usage.billed.as_millis();
    let more = Span::millis(2 * billed + 3_000);
    if dice.chance(2, 3) {
        // The rate is found in the receipt itself, where it bills anything.
        let charge = u128::from(receipt.charge.0) * u128::from(more.as_millis());
        let charge = charge.checked_div(u128::from(billed)).unwrap_or(0);
        receipt.charge = Amount(u64::try_from(charge).unwrap_or(u64::MAX));
        receipt.usage.billed = more;
    } else {
        receipt.charge = Amount(receipt.charge.0 + 1 + receipt.charge.0 / HOUR_MS.min(10));
    }
    receipt
}

/// Another record under the version of `signed`, for some of those who ask.
pub(super) fn contradicted(signed: &Signed) -> Option<Draft> {
    match signed.header().ok()?.kind {
        Kind::Offer => {
            let (header, offer) = opened::<Offer>(&signed.envelope)?;
            let mut rates = offer.rates.clone();
            rates.cpu_hour = Amount(rates.cpu_hour.0 / 2);
            Draft::new(HeaderOf::from(&header), &Offer { rates, ..offer }).ok()
        }
        Kind::HostRecord => {
            let (header, host) = opened::<HostRecord>(&signed.envelope)?;
            let processor = "another".into();
            Draft::new(HeaderOf::from(&header), &HostRecord { processor, ..host }).ok()
        }
        _ => None,
    }
}

/// What `me` makes of an act that went by, its own or somebody else's: a new one about the same
/// lease, at another time, of another version, for another term.
pub(super) fn forged(of: &Message, me: KeyId, wall: Wall, dice: &mut Dice) -> Vec<(Word, Draft)> {
    let header = |header: &Header, dice: &mut Dice| HeaderOf {
        signer: me,
        not_after: wall + ACT_LIFE,
        seq: header.seq + 1_000 + dice.below(1_000_000),
        ..HeaderOf::from(header)
    };
    let act = dice.request();
    match of {
        Message::Claim(signed) | Message::Gang(_, Some(signed)) => {
            let Some((was, claim)) = opened::<Claim>(&signed.envelope) else { return Vec::new() };
            let draft = Draft::new(header(&was, dice), &Claim { act, ..claim });
            draft.ok().map(|draft| (Word::Claim, draft)).into_iter().collect()
        }
        Message::Release(signed) => {
            let Some((was, release)) = opened::<Release>(&signed.envelope) else {
                return Vec::new();
            };
            let draft = Draft::new(header(&was, dice), &Release { act, ..release });
            draft.ok().map(|draft| (Word::Release, draft)).into_iter().collect()
        }
        Message::Renew(signed) => {
            let Some((was, renew)) = opened::<Renew>(&signed.envelope) else { return Vec::new() };
            // Once more under the version that is no more; then shorter; then beyond everything.
            let shorter = renew.term.saturating_sub(Span::millis(1 + dice.below(3_000)));
            let tries = [
                (renew.version, renew.term),
                (renew.version + 1, shorter),
                (renew.version + 1, Span::millis(u64::MAX)),
            ];
            let drafts = tries.into_iter().filter_map(|(version, term)| {
                let act = dice.request();
                let body = Renew { act, version, term, ..renew };
                Draft::new(header(&was, dice), &body).ok()
            });
            drafts.map(|draft| (Word::Renew, draft)).collect()
        }
        _ => Vec::new(),
    }
}
