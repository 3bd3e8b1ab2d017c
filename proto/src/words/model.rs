//! Hosted models: what an offer says of one, what a lease on one fixes, and the record of every
//! request that was served under it.
//!
//! ```text
//! offer (models) --order--> grant --claim--> request 1 --> served 1
//!                                            request 2 --> served 2 (hash of served 1)   ...
//!                                            receipt: tokens so far, hash of the last served
//! ```
//!
//! A lease on a model takes no capacity: it is a budget of tokens. Its lessor signs one [`Served`]
//! for every request, which binds what was asked, what was answered and how many tokens that took;
//! the records are chained by hash, and each receipt names the last one that it covers. So whoever
//! countersigned a receipt has agreed to every record before it.

use serde::{Deserialize, Serialize};

use super::contract::Class;
use crate::base::id::{Hash, LeaseId};
use crate::base::money::Amount;
use crate::base::time::{Span, Wall};

/// The runtime that a claim of a lease on a model names.
pub const MODEL: &str = "model";
/// How many tokens a price is for.
pub const PER: u64 = 1_000_000;
/// The most models that one node offers.
pub const MAX_MODELS: usize = 32;
/// The longest name of a model, in bytes.
pub const MAX_MODEL_NAME: usize = 64;

/// Prices in the charter's currency, for [`PER`] tokens.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct TokenRates {
    /// For what is asked.
    pub prompt: Amount,
    /// For what is answered.
    pub completion: Amount,
}

impl TokenRates {
    /// What so many tokens cost, rounded once, down; saturates.
    #[must_use]
    pub fn charge(&self, prompt_tokens: u64, completion_tokens: u64) -> Amount {
        let prompt = u128::from(self.prompt.0) * u128::from(prompt_tokens);
        let completion = u128::from(self.completion.0) * u128::from(completion_tokens);
        let exact = prompt.saturating_add(completion) / u128::from(PER);
        Amount(u64::try_from(exact).unwrap_or(u64::MAX))
    }

    /// So many thousandths of these prices, rounded down.
    #[must_use]
    pub fn permille(&self, permille: u16) -> Self {
        Self {
            prompt: self.prompt.permille(permille),
            completion: self.completion.permille(permille),
        }
    }

    /// The same prices with so many thousandths added, rounded up: what is sold on is not sold at a
    /// loss.
    #[must_use]
    pub fn with_markup(&self, permille: u32) -> Self {
        let dearer = |amount: Amount| {
            let exact = (u128::from(amount.0) * (1000 + u128::from(permille))).div_ceil(1000);
            Amount(u64::try_from(exact).unwrap_or(u64::MAX))
        };
        Self { prompt: dearer(self.prompt), completion: dearer(self.completion) }
    }
}

/// What a model is asked for: the paths of OpenAI's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/responses`, passed through to upstreams that have it.
    Responses,
}

impl Endpoint {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Chat, Self::Completions, Self::Embeddings, Self::Responses];

    /// The path, with `/v1`.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
        }
    }
}

/// Which model is sold, and at what price: an offer says it, an order names it, a grant repeats it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModelTerms {
    /// What it is called, as in the `model` field of a request.
    pub name: String,
    /// What it is: the BLAKE3 root of its weights, or of what its lessor says it is where an
    /// upstream server keeps them to itself.
    pub digest: Hash,
    /// What its tokens cost.
    pub rates: TokenRates,
}

/// How ready a model is.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// It answers at once.
    Warm,
    /// It is being loaded.
    Loading,
    /// The first request loads it.
    #[default]
    Cold,
}

/// A model as it is offered, with how its engine fared of late: rounded, so that an offer does not
/// change with every request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelOffer {
    /// Which, and at what price.
    pub terms: ModelTerms,
    /// What its tokens cost whoever can wait, under a slack lease: such a request is begun while the
    /// engine has little else to do. None where it is not sold so.
    pub slack: Option<TokenRates>,
    /// How its weights are kept (`Q8_0`, `bf16`); empty where that is not known.
    pub quantisation: String,
    /// The most tokens of prompt and answer together.
    pub context: u32,
    /// What can be asked of it, each once, in order.
    pub endpoints: Vec<Endpoint>,
    /// What it can do beyond plain text (tools, pictures, structured output, …), a bit for each: which
    /// stands for what is the API's to say, and never changes.
    pub abilities: u64,
    /// Whether it is there to show how things work, not to be of use.
    pub demo: bool,
    /// How ready it is.
    pub state: ModelState,
    /// How many requests it works on or has waiting.
    pub load: u32,
    /// Tokens that one request gets in a second; zero where that is not known yet.
    pub tokens_per_second: u32,
    /// How long the first token takes, with what waits before it; zero where that is not known yet.
    pub first_token: Span,
}

impl ModelTerms {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if is_name(&self.name) { Ok(()) } else { Err("a model's name is 1 to 64 printable bytes") }
    }
}

impl ModelOffer {
    /// What a lease on it fixes in `class`; none where it is not sold in that.
    #[must_use]
    pub fn terms_in(&self, class: Class) -> Option<ModelTerms> {
        let rates = self.rates_in(class)?;
        Some(ModelTerms { rates, ..self.terms.clone() })
    }

    /// What its tokens cost in `class`; none where it is not sold in that.
    #[must_use]
    pub const fn rates_in(&self, class: Class) -> Option<TokenRates> {
        match class {
            Class::Firm => Some(self.terms.rates),
            Class::Slack => self.slack,
        }
    }

    /// Whether it can stand in an offer.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn sound(&self) -> Result<(), &'static str> {
        self.check()
    }

    pub(super) fn check(&self) -> Result<(), &'static str> {
        self.terms.check()?;
        if self.endpoints.is_empty() || !self.endpoints.is_sorted_by(|one, next| one < next) {
            return Err("a model can be asked something, each endpoint named once, in order");
        }
        let TokenRates { prompt, completion } = self.terms.rates;
        if self.slack.is_some_and(|slack| slack.prompt > prompt || slack.completion > completion) {
            return Err("a model costs whoever can wait no more than others");
        }
        let quantisation = &self.quantisation;
        if !quantisation.is_empty() && !is_name(quantisation) {
            return Err("a quantisation is at most 64 printable bytes");
        }
        Ok(())
    }
}

fn is_name(name: impl AsRef<str>) -> bool {
    let name = name.as_ref();
    (1..=MAX_MODEL_NAME).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// What was served under a lease on a model so far.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Tally {
    /// How many requests.
    pub requests: u64,
    /// Tokens that were asked.
    pub prompt_tokens: u64,
    /// Tokens that were answered.
    pub completion_tokens: u64,
    /// The hash of the last request's [`Served`]; zero before the first.
    pub last: Hash,
}

/// With what a model chose its words, as far as the request says.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Sampling {
    /// The temperature, in thousandths.
    pub temperature_permille: Option<u32>,
    /// The share of probability that is chosen from, in thousandths.
    pub top_p_permille: Option<u32>,
    /// The seed of the dice.
    pub seed: Option<i64>,
    /// The most tokens of answer.
    pub max_tokens: Option<u64>,
}

/// How a request ended. What broke off on the serving side is not counted at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// It was answered.
    Answered,
    /// Who asked hung up: what was produced until then counts.
    HungUp,
}

/// One request as its lessor knows it: what [`Served`] says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// What was asked for.
    pub endpoint: Endpoint,
    /// The BLAKE3 hash of the request, as it came.
    pub request: Hash,
    /// The BLAKE3 hash of the answer: of its pieces, each after its length as four little-endian
    /// bytes.
    pub response: Hash,
    /// With what the words were chosen.
    pub sampling: Sampling,
    /// How it ended.
    pub finish: Finish,
    /// Tokens that were asked.
    pub prompt_tokens: u64,
    /// Of them, those that were still known from an earlier request.
    pub cached_tokens: u64,
    /// Tokens that were answered.
    pub completion_tokens: u64,
}

/// That a request was served, signed by the lessor. Subject: the lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Under which lease.
    pub lease: LeaseId,
    /// One for the first, then without gaps.
    pub number: u64,
    /// The record before this one; zero for the first.
    pub previous: Hash,
    /// Which model, by its digest.
    pub model: Hash,
    /// What was served.
    pub service: Service,
    /// All tokens asked under this lease, this request's included.
    pub prompt_total: u64,
    /// All tokens answered.
    pub completion_total: u64,
    /// When it ended, for observers.
    pub at: Wall,
}

impl Served {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let Service { cached_tokens, prompt_tokens, .. } = self.service;
        if self.number == 0 {
            return Err("requests are counted from one");
        }
        if cached_tokens > prompt_tokens {
            return Err("no more tokens are known than are asked");
        }
        Ok(())
    }

    /// The tally with this record, whose hash is `id`.
    #[must_use]
    pub const fn tally(&self, id: Hash) -> Tally {
        Tally {
            requests: self.number,
            prompt_tokens: self.prompt_total,
            completion_tokens: self.completion_total,
            last: id,
        }
    }
}

impl Tally {
    /// The record of the next request.
    #[must_use]
    pub const fn next(&self, lease: LeaseId, model: Hash, service: Service, at: Wall) -> Served {
        Served {
            lease,
            number: self.requests.saturating_add(1),
            previous: self.last,
            model,
            service,
            prompt_total: self.prompt_tokens.saturating_add(service.prompt_tokens),
            completion_total: self.completion_tokens.saturating_add(service.completion_tokens),
            at,
        }
    }

    /// Whether `served` is the record of the next request on this model.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn is_followed_by(&self, served: &Served, model: Hash) -> Result<(), &'static str> {
        let next = self.next(served.lease, model, served.service, served.at);
        if *served == next { Ok(()) } else { Err("it does not follow from the record before it") }
    }

    /// Whether a later tally of the same lease can say `later`.
    #[must_use]
    pub fn may_become(&self, later: &Self) -> bool {
        if later.requests == self.requests {
            return later == self;
        }
        later.requests > self.requests
            && later.prompt_tokens >= self.prompt_tokens
            && later.completion_tokens >= self.completion_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RATES: TokenRates = TokenRates { prompt: Amount(100), completion: Amount(400) };

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

    #[test]
    fn records_follow_each_other_and_nothing_else_does() {
        let (lease, model) = (LeaseId(Hash([3; 32])), Hash([4; 32]));
        let first = Tally::default().next(lease, model, service(10, 5), Wall(7));
        assert_eq!(Tally::default().is_followed_by(&first, model), Ok(()));
        let one = first.tally(Hash([5; 32]));
        let second = one.next(lease, model, service(1, 2), Wall(8));
        assert_eq!((second.number, second.prompt_total, second.completion_total), (2, 11, 7));
        assert_eq!(one.is_followed_by(&second, model), Ok(()));
        for (what, wrong) in [
            ("another number", Served { number: 3, ..second.clone() }),
            ("another one before it", Served { previous: Hash([9; 32]), ..second.clone() }),
            ("another model", Served { model: Hash([9; 32]), ..second.clone() }),
            ("more in all than was served", Served { prompt_total: 12, ..second.clone() }),
            ("less", Served { completion_total: 6, ..second.clone() }),
        ] {
            assert!(one.is_followed_by(&wrong, model).is_err(), "{what}");
        }
        assert!(one.may_become(&second.tally(Hash([6; 32]))));
        assert!(!second.tally(Hash([6; 32])).may_become(&one));
        assert!(!one.may_become(&Tally { last: Hash([9; 32]), ..one }), "another history");
    }

    #[test]
    fn a_markup_is_never_a_loss() {
        assert_eq!(RATES.with_markup(0), RATES);
        let dearer = RATES.with_markup(25);
        assert_eq!((dearer.prompt, dearer.completion), (Amount(103), Amount(410)));
    }

    proptest! {
        #[test]
        fn charges_are_rounded_once_and_grow(
            prompt in 0u64..1 << 40, completion in 0u64..1 << 40, more in 0u64..1 << 20,
            (asked, answered) in (0u64..1 << 40, 0u64..1 << 40),
        ) {
            let rates = TokenRates { prompt: Amount(asked), completion: Amount(answered) };
            let charge = rates.charge(prompt, completion);
            prop_assert!(charge <= rates.charge(prompt + more, completion));
            prop_assert!(charge <= rates.charge(prompt, completion + more));
            let parts = rates.charge(prompt, 0).plus(rates.charge(0, completion));
            prop_assert!(charge >= parts && charge.0 - parts.0 <= 1);
        }
    }
}
