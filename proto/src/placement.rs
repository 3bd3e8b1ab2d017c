//! Whom to ask: a ranked choice among the offers heard, with a reason, as a pure function.
//!
//! The map is a hint; the host is the only judge of its own capacity. So never "the best of all":
//! on stale data everybody would herd to one host (Mitzenmacher, "How Useful Is Old Information?",
//! 2000). A random sample of what seems to fit is scored by price, fit and past behaviour, with
//! noise; the best few are asked in that order.

use serde::{Deserialize, Serialize};

use crate::base::dice::Dice;
use crate::base::id::KeyId;
use crate::base::money::Amount;
use crate::words::record::{HostRecord, Offer};
use crate::words::sign::Verified;
use crate::words::want::{Choice, Want};

/// How many hosts that seem to fit are scored.
const SAMPLE: usize = 64;
/// How much noise is added to a score, in thousandths of the cheapest price.
const NOISE: u64 = 80;
/// What having refused or failed a moment ago adds to a score: more than any difference in price.
const AVOIDED: u64 = 1_000_000;

/// A host as the map shows it.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// Its key.
    pub key: KeyId,
    /// What is known about it.
    pub host: Option<&'a HostRecord>,
    /// What it offers.
    pub offer: Option<&'a Verified<Offer>>,
    /// Whether it is held to be alive.
    pub up: bool,
    /// Whether it refused or failed a moment ago.
    pub avoided: bool,
    /// Whether it was convicted of saying two different things.
    pub quarantined: bool,
    /// How many of this node's leases there went wrong, out of how many.
    pub record: (u64, u64),
}

/// A host not worth asking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Against {
    /// Its key.
    pub lessor: KeyId,
    /// Its name.
    pub name: String,
    /// What spoke against it.
    pub reasons: Vec<String>,
}

/// The hosts, ranked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranking {
    /// Worth asking, best first.
    pub choices: Vec<Choice>,
    /// Not worth asking.
    pub against: Vec<Against>,
    /// How many fitted but were not in the sample.
    pub unsampled: usize,
}

/// Ranks `candidates` for `want`.
#[must_use]
pub fn rank(want: &Want, candidates: &[Candidate<'_>], dice: &mut Dice) -> Ranking {
    let mut ranking = Ranking::default();
    let mut fitting = Vec::new();
    for candidate in candidates {
        match objections(want, candidate) {
            Ok(fit) => fitting.push(fit),
            Err(reasons) => ranking.against.push(Against {
                lessor: candidate.key,
                name: name_of(candidate),
                reasons,
            }),
        }
    }
    dice.shuffle(&mut fitting);
    // Those with room come into the sample first.
    fitting.sort_by_key(|fit| fit.full);
    ranking.unsampled = fitting.len().saturating_sub(SAMPLE);
    fitting.truncate(SAMPLE);
    let cheapest = fitting.iter().map(|fit| fit.rate).min().unwrap_or_default().0.max(1);
    ranking.choices = fitting.iter().map(|fit| score(want, fit, cheapest, dice)).collect();
    // Who names hosts has chosen already: their order counts, and one that failed comes last.
    let place = |key: &KeyId| want.lessors.iter().position(|named| named == key);
    ranking
        .choices
        .sort_by_key(|choice| (choice.score >= AVOIDED, place(&choice.lessor), choice.score));
    ranking
}

struct Fit<'a> {
    candidate: &'a Candidate<'a>,
    offer: &'a Verified<Offer>,
    rate: Amount,
    /// Whether it had too little free when it was last heard of.
    full: bool,
}

fn name_of(candidate: &Candidate<'_>) -> String {
    candidate.host.map_or_else(|| candidate.key.short(), |host| host.name.clone())
}

fn objections<'a>(want: &Want, candidate: &'a Candidate<'a>) -> Result<Fit<'a>, Vec<String>> {
    let Some(offer) = candidate.offer else { return Err(vec!["it offers nothing".into()]) };
    let body = offer.body();
    let mut reasons = Vec::new();
    if !candidate.up {
        reasons.push("it is down".into());
    }
    if !want.lessors.is_empty() && !want.lessors.contains(&candidate.key) {
        reasons.push("it is not among the hosts asked for".into());
    }
    let labels = candidate.host.map_or(&[][..], |host| &host.labels);
    for (name, value) in want.labels.iter().filter(|label| !labels.contains(label)) {
        reasons.push(format!("it is not labelled {name}={value}"));
    }
    if let Some(terms) = &want.model {
        if !body.sells_model(terms, want.class) {
            reasons.push(format!("it does not serve '{}' at that price", terms.name));
        }
        if candidate.quarantined {
            reasons.push("it was convicted of saying two different things".into());
        }
        if want.longest > body.max_term {
            reasons.push(format!("term: at most {}, asked for {}", body.max_term, want.longest));
        }
        let fit = Fit { candidate, offer, rate: Amount::ZERO, full: false };
        return if reasons.is_empty() { Ok(fit) } else { Err(reasons) };
    }
    // What is free changes faster than it is heard of: a host that could fit at all may be asked.
    let full = !body.fits(&want.shape);
    let possible = candidate.host.is_some_and(|host| want.shape.fits(&host.hardware));
    if full && !possible {
        let host = candidate.host.map(|host| want.shape.shortage(&host.hardware));
        reasons.extend(host.unwrap_or_else(|| vec!["it has nothing free".into()]));
    }
    if candidate.quarantined {
        reasons.push("it was convicted of saying two different things".into());
    }
    if body.classes.is_empty() {
        reasons.push("it sells nothing".into());
    } else if !body.classes.contains(&want.class) {
        reasons.push(format!("it does not sell {:?}", want.class).to_lowercase());
    }
    if want.longest > body.max_term {
        reasons.push(format!("term: at most {}, asked for {}", body.max_term, want.longest));
    }
    if !body.runtimes.contains(&want.runtime) {
        reasons.push(format!("it has no runtime '{}'", want.runtime));
    }
    for word in want.isolation.iter().filter(|word| !body.isolation.contains(word)) {
        reasons.push(format!("it does not confine jobs by {word}"));
    }
    let rate = body.hourly(&want.shape, want.class);
    match rate {
        None => reasons.push("it has no price for what is asked".into()),
        Some(rate) if rate > want.max_hourly => {
            reasons.push(format!("price: {rate}/h, at most {}/h allowed", want.max_hourly));
        }
        Some(_) => {}
    }
    match rate {
        Some(rate) if reasons.is_empty() => Ok(Fit { candidate, offer, rate, full }),
        _ => Err(reasons),
    }
}

fn score(want: &Want, fit: &Fit<'_>, cheapest: u64, dice: &mut Dice) -> Choice {
    let Fit { candidate, offer, rate, full } = fit;
    let price = u64::try_from(u128::from(rate.0) * 1000 / u128::from(cheapest)).unwrap_or(u64::MAX);
    // A tight fit leaves the large shapes to those who need them.
    let room = offer.body().shapes.iter().map(|s| s.cpu_milli).max().unwrap_or(0);
    let spare = room.saturating_sub(want.shape.cpu_milli) * 40 / room.max(1);
    let (bad, all) = candidate.record;
    // With no history nothing is known: one failure in two is assumed as if once observed.
    let risk = bad * 400 / (all + 2);
    let noise = dice.below(NOISE);
    // Not a veto: where nobody else fits, it is asked again.
    let last = if *full { 2 * AVOIDED } else { 0 };
    let avoided = if candidate.avoided { AVOIDED } else { 0 } + last;
    let mut why = vec![format!("{rate}/h")];
    if price > 1000 {
        let percent = (price - 1000).div_ceil(10);
        why.push(format!("{percent}% above the cheapest"));
    } else {
        why.push("the cheapest that fits".into());
    }
    if *full {
        why.push("it had too little free when it was last heard of".into());
    }
    if candidate.avoided {
        why.push("it refused or failed a moment ago".into());
    }
    if all > 0 {
        why.push(format!("{} of {all} leases there went well", all - bad.min(all)));
    }
    Choice {
        lessor: candidate.key,
        name: name_of(candidate),
        offer: offer.id(),
        rate: *rate,
        worst_case: match want.model {
            Some(_) => want.budget,
            None => rate.per_hour_over(want.term).min(want.budget),
        },
        score: price.saturating_add(spare + risk + noise + avoided),
        why: why.join(", "),
    }
}
