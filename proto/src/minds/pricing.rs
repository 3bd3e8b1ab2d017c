//! What this node sells and at what price: its offers, and which of them it still honours.
//!
//! ```text
//! free capacity changes --coalesced, token bucket--> new offer --honoured for HONOUR--> stale
//! ```
//!
//! Prices are flat per resource-hour in this version; what an order pays is fixed by the offer it
//! names. An older offer only promises its price, never capacity, so honouring it for a while
//! costs nothing and lets an order be signed on an offline machine. Age is judged by this node's
//! boot clock alone.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::base::id::Hash;
use crate::base::money::Amount;
use crate::base::resource::{Rates, Resources};
use crate::base::time::{Boot, Now, Span};
use crate::words::contract::{Class, EarlyEnd, Figure, Order};
use crate::words::model::ModelOffer;
use crate::words::object::key_subject;
use crate::words::record::Offer;
use crate::words::sign::{Draft, Hand};
use crate::words::wire::EncodeError;

/// How long an offer's price is honoured after it was made.
pub const HONOUR: Span = Span::secs(15 * 60);
/// How often an unchanged offer is made anew.
const REFRESH: Span = Span::secs(5 * 60);
/// How often a change may be told, in the long run.
const PACE: Span = Span::millis(500);
/// How many changes may be told in a row.
const BURST: u64 = 3;
/// The most offers remembered.
const MAX_ISSUED: usize = 4_096;

/// What the operator sells. A node sells nothing until told what and at what price.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Whether anything is sold at all.
    pub selling: bool,
    /// Prices per resource-hour.
    pub rates: Rates,
    /// What slack costs, in thousandths of the firm price; none is sold when absent.
    pub slack_permille: Option<u16>,
    /// What holds when this side ends a lease before its term.
    pub early: EarlyEnd,
    /// The longest term.
    pub max_term: Span,
    /// How long capacity may be held unclaimed, and unpaid.
    pub max_claim_within: Span,
    /// The runtimes that jobs can have here.
    pub runtimes: Vec<String>,
    /// What confines a job here.
    pub isolation: Vec<String>,
}

impl Policy {
    /// The classes that are sold.
    #[must_use]
    pub fn classes(&self) -> Vec<Class> {
        let slack = self.slack_permille.map(|_| Class::Slack);
        if self.selling { [Class::Firm].into_iter().chain(slack).collect() } else { Vec::new() }
    }
}

/// This node's offers.
#[derive(Debug)]
pub struct Pricing {
    policy: Policy,
    /// The models that are served, and how their engines fare, as the shell says.
    models: Vec<ModelOffer>,
    issued: VecDeque<Issued>,
    current: Option<Offer>,
    seq: u64,
    /// When the token bucket was last full, as in a virtual-scheduling rate limiter.
    paid_until: Boot,
    wanted: bool,
}

#[derive(Debug)]
struct Issued {
    at: Boot,
    id: Hash,
    draft: Draft,
    offer: Offer,
}

/// What an offer that is still honoured says about an order.
#[derive(Clone, Debug)]
pub struct Honoured<'a> {
    /// The offer.
    pub offer: &'a Draft,
    /// The price per hour; `None` when what is ordered has none.
    pub rate: Option<Amount>,
    /// What holds if the lease is ended early.
    pub early: EarlyEnd,
}

impl Pricing {
    /// Sells as `policy` says.
    #[must_use]
    pub const fn new(policy: Policy) -> Self {
        Self {
            policy,
            models: Vec::new(),
            issued: VecDeque::new(),
            current: None,
            seq: 0,
            paid_until: Boot(0),
            wanted: true,
        }
    }

    /// Something about the free capacity changed.
    pub const fn changed(&mut self) {
        self.wanted = true;
    }

    /// The current offer is to be made anew, whether or not it changed.
    pub fn restate(&mut self) {
        self.current = None;
        self.wanted = true;
    }

    /// When [`Pricing::publish`] is next due.
    #[must_use]
    pub fn next_wake(&self) -> Boot {
        let refresh = self.issued.back().map_or(Boot(0), |issued| issued.at + REFRESH);
        if self.wanted { self.paid_until - PACE_ROOM } else { refresh }
    }

    /// A new offer over `free`, if there is something new to say and it may be said now.
    ///
    /// # Errors
    /// When the offer does not fit an envelope.
    pub fn publish(
        &mut self,
        now: Now,
        free: &Resources,
        hand: &Hand,
    ) -> Result<Option<Draft>, EncodeError> {
        if self.next_wake() > now.boot {
            return Ok(None);
        }
        let offer = self.offer(free);
        let stale = self.issued.back().is_none_or(|issued| issued.at + REFRESH <= now.boot);
        self.wanted = false;
        if self.current.as_ref() == Some(&offer) && !stale {
            return Ok(None);
        }
        self.paid_until = self.paid_until.max(now.boot) + PACE;
        self.seq += 1;
        let not_after = now.wall + HONOUR;
        let draft = hand.draft(key_subject(&hand.me), self.seq, not_after, &offer)?;
        let id = draft.id();
        let (at, issued) = (now.boot, offer.clone());
        self.issued.push_back(Issued { at, id, draft: draft.clone(), offer: issued });
        if self.issued.len() > MAX_ISSUED {
            self.issued.pop_front();
        }
        while self.issued.front().is_some_and(|issued| issued.at + HONOUR < now.boot) {
            self.issued.pop_front();
        }
        self.current = Some(offer);
        Ok(Some(draft))
    }

    /// An offer of nothing.
    #[must_use]
    pub fn nothing(&self) -> Offer {
        self.offer(&Resources::default())
    }

    fn offer(&self, free: &Resources) -> Offer {
        let sells = self.policy.selling && free.cpu_milli > 0 && free.memory > 0;
        Offer {
            shapes: if sells { vec![free.clone()] } else { Vec::new() },
            rates: self.policy.rates.clone(),
            slack_permille: self.policy.slack_permille.unwrap_or(1000),
            classes: self.policy.classes(),
            early: self.policy.early,
            max_term: self.policy.max_term,
            runtimes: self.policy.runtimes.clone(),
            isolation: self.policy.isolation.clone(),
            models: self.models.clone(),
        }
    }

    /// What the offer that `order` names says about it, if it is still honoured. A model costs
    /// nothing per hour.
    #[must_use]
    pub fn quote(&self, now: Boot, order: &Order) -> Option<Honoured<'_>> {
        let issued = self.issued.iter().rev().find(|issued| issued.id == order.offer)?;
        let Issued { draft, offer, .. } = issued;
        let rate = match &order.model {
            Some(terms) => offer.sells_model(terms, order.class).then_some(Amount::ZERO),
            None => offer.hourly(&order.shape, order.class),
        };
        let early = offer.early;
        (issued.at + HONOUR >= now).then_some(Honoured { offer: draft, rate, early })
    }

    /// Whether model or class, term and intervals of `order` are sold here.
    ///
    /// # Errors
    /// The figures, in milliseconds, that are out of bounds; none when it is the model or class, or
    /// nothing is sold at all.
    pub fn sells(&self, order: &Order) -> Result<(), Vec<Figure>> {
        let sold = match &order.model {
            Some(terms) => self.serves(&terms.name, order.class),
            None => self.policy.classes().contains(&order.class),
        };
        if !sold {
            return Err(Vec::new());
        }
        let (policy, least) = (&self.policy, crate::words::contract::MIN_RECEIPT_EVERY);
        let claim_within = order.term.min(policy.max_claim_within);
        let figure = |of: &str, have: Span, need: Span| Figure {
            of: of.into(),
            have: have.as_millis(),
            need: need.as_millis(),
        };
        let figures: Vec<_> = [
            (order.longest > policy.max_term, figure("term_ms", policy.max_term, order.longest)),
            (
                order.claim_within > claim_within,
                figure("claim_within_ms", claim_within, order.claim_within),
            ),
            (order.receipt_every < least, figure("receipt_every_ms", least, order.receipt_every)),
        ]
        .into_iter()
        .filter_map(|(broken, figure)| broken.then_some(figure))
        .collect();
        if figures.is_empty() { Ok(()) } else { Err(figures) }
    }

    /// The newest offer's draft.
    #[must_use]
    pub fn latest(&self) -> Option<&Draft> {
        self.issued.back().map(|issued| &issued.draft)
    }

    /// Whether a model of that name is sold in `class` now.
    #[must_use]
    pub fn serves(&self, name: &str, class: Class) -> bool {
        let sold = |model: &ModelOffer| model.rates_in(class).is_some();
        self.models.iter().any(|model| model.terms.name == name && sold(model))
    }

    /// Which models are served from now on, sorted by name.
    pub fn set_models(&mut self, models: Vec<ModelOffer>) {
        if self.models != models {
            self.models = models;
            self.wanted = true;
        }
    }

    /// Whether jobs of `runtime` can run here.
    #[must_use]
    pub fn runs(&self, runtime: &str) -> bool {
        self.policy.runtimes.iter().any(|known| known == runtime)
    }

    /// What the operator sells.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Changes what the operator sells.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
        self.wanted = true;
    }
}

/// How far the bucket may run ahead: [`BURST`] changes less the one that is asked for.
const PACE_ROOM: Span = Span::millis(PACE.as_millis() * (BURST - 1));
