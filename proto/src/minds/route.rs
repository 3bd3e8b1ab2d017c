//! Which node answers a request to a model: whom to ask first, and who is next if that one fails.
//!
//! ```text
//! offers --what speaks against them--> those that fit --sort, two choices--> in order
//!                                                          ^
//!                       a node that knows the prompt's beginning, if it is not overloaded
//! ```
//!
//! Offers are a little old, and every entry node reads the same ones: to take the best would send
//! everybody to one node. So among those that are about equally good two are drawn and the less
//! loaded one is taken (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
//! 2001); where nothing is said about the order, a node is drawn by the inverse square of its price.
//! What this node has seen itself counts more than what is offered: how long the first token took,
//! how fast they came, what failed. One that failed is asked last for a while, not never.

use std::collections::{BTreeMap, VecDeque};

use crate::base::dice::Dice;
use crate::base::id::KeyId;
use crate::base::time::{Boot, Span};
use crate::words::contract::Class;
use crate::words::model::{Endpoint, ModelOffer, ModelState, ModelTerms, TokenRates};

/// How long a node that failed once is asked last; twice as long after each further time.
const PAUSE: Span = Span::secs(1);
/// At most so long.
const MAX_PAUSE: Span = Span::secs(60);
/// How much worse than the best, in thousandths, is still about as good.
const ABOUT: u64 = 100;
/// How many nodes and models are remembered.
const MAX_SEEN: usize = 4_096;
/// How many beginnings of prompts are remembered.
const MAX_PREFIXES: usize = 32_768;
/// How many requests more than the least loaded node may have that is kept to for a prompt's
/// beginning.
const SPARE: u64 = 4;
/// How many tokens an answer is reckoned with where nothing is said.
const USUAL_ANSWER: u64 = 256;

/// By what those that fit are put in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// By price, by chance, and by load.
    #[default]
    Balanced,
    /// The cheapest first.
    Price,
    /// The fastest first.
    Throughput,
    /// The one that begins soonest first.
    Latency,
}

/// In which class an answer is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// Now, at the firm price.
    #[default]
    Firm,
    /// When there is time, at the price of slack, or not at all.
    Slack,
    /// Likewise where nodes that may answer sell it so. At the firm price where none does, or all that
    /// do fail; not where they only have no time.
    SlackIfSold,
    /// Where there is time, else now at the firm price: those that had no time a moment ago are not asked
    /// for it again.
    SlackFirst,
}

/// What is asked of a model, as far as it decides who may answer.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The model's name.
    pub model: &'a str,
    /// What it is asked for.
    pub endpoint: Endpoint,
    /// What it must be able to do beyond plain text, as in [`ModelOffer::abilities`].
    pub needs: u64,
    /// About how many tokens are asked.
    pub prompt_tokens: u64,
    /// The most tokens of answer, if that was said.
    pub max_tokens: Option<u64>,
    /// In which class.
    pub class: Wanted,
    /// By what to choose.
    pub sort: Sort,
    /// The highest price for a million tokens each way, in the currency's billionths.
    pub max_price: (Option<u64>, Option<u64>),
    /// These nodes first, by name or key, in this order.
    pub order: &'a [String],
    /// Only these, where there are any.
    pub only: &'a [String],
    /// None of these.
    pub ignore: &'a [String],
    /// Whether others may be asked where the first choice fails.
    pub allow_fallbacks: bool,
    /// Only weights kept so, where any are named.
    pub quantizations: &'a [String],
    /// Those that are slower come last, in tokens a second.
    pub min_throughput: Option<u32>,
    /// Those that take longer to begin come last.
    pub max_latency: Option<Span>,
    /// What stands for the prompt's beginnings, the longest last.
    pub prefixes: &'a [u64],
}

/// A node that sells models.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// Its key.
    pub key: KeyId,
    /// Its name.
    pub name: &'a str,
    /// Whether it is held to be alive.
    pub up: bool,
    /// What it sells.
    pub models: &'a [ModelOffer],
}

impl Host<'_> {
    fn offer(&self, model: &str) -> Option<&ModelOffer> {
        self.models.iter().find(|offer| offer.terms.name == model)
    }
}

/// A node to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its key.
    pub key: KeyId,
    /// Its name.
    pub name: String,
    /// In which class it is asked.
    pub class: Class,
    /// What it is asked for, and at what price.
    pub terms: ModelTerms,
    /// The most tokens of prompt and answer together.
    pub context: u32,
}

/// What a model cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    /// It is not asked this.
    #[error("it does not answer this sort of request")]
    Endpoint,
    /// These abilities.
    #[error("it cannot do all that is asked of it")]
    Abilities(u64),
    /// It looks back on so many tokens at most.
    #[error("its context is {0} tokens")]
    Context(u32),
    /// It cannot wait: it is not sold so.
    #[error("it sells no slack")]
    Slack,
}

/// Why nobody can be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Nobody {
    /// No node serves a model of this name.
    #[error("no node serves it")]
    Unknown,
    /// The model is served, and cannot do this on any node that serves it.
    #[error("{0}")]
    Unable(Lack),
    /// Something speaks against every node that serves it.
    #[error("{}", .0.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; "))]
    Against(Vec<(String, String)>),
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Went {
    /// It was answered: after how long the first token came, how many came, and how long those took.
    Well {
        /// Until the first token.
        first_token: Span,
        /// How many tokens came.
        tokens: u64,
        /// From the first token to the last.
        took: Span,
    },
    /// The node failed.
    Failed,
    /// It had no time for what can wait.
    NoTime,
    /// It says nothing about the node: who asked hung up, or asked for what cannot be.
    Neither,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    first_token_us: u64,
    per_second: u64,
    failures: u32,
    last_until: Boot,
    /// The same for what can wait, by how often there was no time for it.
    refusals: u32,
    no_time_until: Boot,
    running: u32,
    at: Boot,
}

/// What this entry node remembers of the nodes it asked.
#[derive(Debug, Default)]
pub struct Router {
    seen: BTreeMap<(KeyId, String), Seen>,
    prefixes: BTreeMap<u64, KeyId>,
    /// In the order in which they were remembered.
    known: VecDeque<u64>,
}

struct Fit<'a> {
    host: &'a Host<'a>,
    offer: &'a ModelOffer,
    rates: TokenRates,
    cost: u64,
    first_token_us: u64,
    per_second: u64,
    load: u64,
    last: bool,
}

impl Router {
    /// Whom to ask, the first choice first.
    ///
    /// # Errors
    /// Why there is nobody.
    pub fn choose(
        &mut self,
        now: Boot,
        question: &Question<'_>,
        hosts: &[Host<'_>],
        dice: &mut Dice,
    ) -> Result<Vec<Choice>, Nobody> {
        let mut in_class = |class| self.in_class(now, (question, class), hosts, dice);
        let slack = match question.class {
            Wanted::Firm => Vec::new(),
            Wanted::Slack => in_class(Class::Slack)?,
            Wanted::SlackIfSold | Wanted::SlackFirst => in_class(Class::Slack).unwrap_or_default(),
        };
        let mut firm = match question.class {
            Wanted::Slack => Vec::new(),
            _ if slack.is_empty() => in_class(Class::Firm)?,
            _ => in_class(Class::Firm).unwrap_or_default(),
        };
        let hurries = question.class == Wanted::SlackFirst;
        let (first, mut slack) = (slack.first().or(firm.first()).map(|choice| choice.key), slack);
        if !question.allow_fallbacks && question.order.is_empty() {
            // One node alone, where it hurries in both classes.
            let both = hurries || slack.is_empty();
            slack.truncate(1);
            firm.retain(|choice| both && Some(choice.key) == first);
        }
        if hurries && !firm.is_empty() {
            slack.retain(|choice| !self.has_no_time(now, choice));
        }
        Ok(slack.into_iter().chain(firm).collect())
    }

    /// Whether it had no time a moment ago for what can wait.
    fn has_no_time(&self, now: Boot, choice: &Choice) -> bool {
        let seen = self.seen.get(&(choice.key, choice.terms.name.clone()));
        seen.is_some_and(|seen| seen.no_time_until > now)
    }

    fn in_class(
        &self,
        now: Boot,
        (question, class): (&Question<'_>, Class),
        hosts: &[Host<'_>],
        dice: &mut Dice,
    ) -> Result<Vec<Choice>, Nobody> {
        let mut fits = self.fitting(now, (question, class), hosts)?;
        dice.shuffle(&mut fits);
        let mut ordered = Vec::new();
        // Named first, in the order in which they are named.
        for named in question.order {
            if let Some(at) = fits.iter().position(|fit| is_named(fit.host, named)) {
                ordered.push(fits.remove(at));
            }
        }
        let named = ordered.len();
        if question.allow_fallbacks || question.order.is_empty() {
            let last = fits.iter().all(|fit| fit.last);
            // What failed a moment ago, or is not what is preferred, comes after all others.
            let (mut good, bad): (Vec<_>, Vec<_>) =
                fits.into_iter().partition(|fit| last || !fit.last);
            if let Some(kept_to) = self.kept_to(question, &good).filter(|_| named == 0) {
                ordered.push(good.remove(kept_to));
            }
            for mut group in [good, bad] {
                while !group.is_empty() {
                    let next = draw(question.sort, &group, dice);
                    ordered.push(group.swap_remove(next));
                }
            }
        }
        let choices = ordered.into_iter().map(|fit| Choice {
            key: fit.host.key,
            name: fit.host.name.to_owned(),
            class,
            terms: ModelTerms { rates: fit.rates, ..fit.offer.terms.clone() },
            context: fit.offer.context,
        });
        Ok(choices.collect())
    }

    fn fitting<'a>(
        &self,
        now: Boot,
        (question, class): (&Question<'_>, Class),
        hosts: &'a [Host<'a>],
    ) -> Result<Vec<Fit<'a>>, Nobody> {
        let (mut fits, mut against, mut served) = (Vec::new(), Vec::new(), false);
        let mut unable: Option<Lack> = None;
        let mut able = false;
        for host in hosts {
            let Some(offer) = host.offer(question.model) else { continue };
            served = true;
            match lacks((question, class), offer) {
                Some(what) => unable = Some(what),
                None => able = true,
            }
            match allowed((question, class), host, offer) {
                Err(why) => against.push((host.name.to_owned(), why)),
                Ok(rates) => {
                    fits.push(self.fit(now, (question, class), host, (offer, rates)));
                }
            }
        }
        match (served, unable) {
            _ if !fits.is_empty() => Ok(fits),
            (false, _) => Err(Nobody::Unknown),
            (true, Some(what)) if !able => Err(Nobody::Unable(what)),
            _ => Err(Nobody::Against(against)),
        }
    }

    fn fit<'a>(
        &self,
        now: Boot,
        (question, class): (&Question<'_>, Class),
        host: &'a Host<'a>,
        (offer, rates): (&'a ModelOffer, TokenRates),
    ) -> Fit<'a> {
        let seen = self.seen.get(&(host.key, offer.terms.name.clone())).copied();
        let seen = seen.unwrap_or_default();
        let or = |own: u64, said: u64| if own > 0 { own } else { said };
        let first_token_us = or(seen.first_token_us, offer.first_token.as_millis() * 1_000);
        let per_second = or(seen.per_second, u64::from(offer.tokens_per_second));
        let slow = question.min_throughput.is_some_and(|least| per_second < u64::from(least));
        let late =
            question.max_latency.is_some_and(|most| first_token_us > most.as_millis() * 1_000);
        let no_time = class == Class::Slack && seen.no_time_until > now;
        let cold = if offer.state == ModelState::Warm { 0 } else { SPARE };
        Fit {
            host,
            offer,
            rates,
            cost: cost(&rates, question),
            first_token_us,
            per_second,
            load: u64::from(offer.load).max(u64::from(seen.running)) + cold,
            last: seen.last_until > now || no_time || slow || late,
        }
    }

    /// The node that knows the longest beginning of the prompt, if it is not much more loaded than
    /// others, and about as good by what was asked for.
    fn kept_to(&self, question: &Question<'_>, fits: &[Fit<'_>]) -> Option<usize> {
        let least = fits.iter().map(|fit| fit.load).min()?;
        let best = fits.iter().map(|fit| worth(question.sort, fit)).min()?;
        question.prefixes.iter().rev().find_map(|prefix| {
            let key = self.prefixes.get(prefix)?;
            let at = fits.iter().position(|fit| fit.host.key == *key)?;
            let fit = fits.get(at)?;
            let good = question.sort == Sort::Balanced || about(worth(question.sort, fit), best);
            (good && fit.load <= least + SPARE).then_some(at)
        })
    }

    /// A request goes to this node. What can wait is no load until it is begun, which shows in offers.
    pub fn begun(&mut self, now: Boot, (key, class): (KeyId, Class), model: &str) {
        self.forget();
        let seen = self.seen.entry((key, model.to_owned())).or_default();
        seen.running += u32::from(class == Class::Firm);
        seen.at = now;
    }

    /// It has ended; `prefixes` are the beginnings of its prompt, which the node knows now if it went
    /// well.
    pub fn ended(
        &mut self,
        now: Boot,
        (key, class): (KeyId, Class),
        model: &str,
        prefixes: &[u64],
        went: Went,
    ) {
        let seen = self.seen.entry((key, model.to_owned())).or_default();
        seen.running = seen.running.saturating_sub(u32::from(class == Class::Firm));
        seen.at = now;
        match went {
            Went::Well { first_token, tokens, took } => {
                // What waited says nothing of how soon the others begin.
                if class == Class::Firm {
                    let first = first_token.as_millis().max(1) * 1_000;
                    seen.first_token_us = smoothed(seen.first_token_us, first);
                } else {
                    (seen.refusals, seen.no_time_until) = (0, Boot(0));
                }
                if tokens > 1 && took > Span::ZERO {
                    let speed = (tokens - 1).saturating_mul(1_000) / took.as_millis();
                    seen.per_second = smoothed(seen.per_second, speed.max(1));
                }
                (seen.failures, seen.last_until) = (0, Boot(0));
                self.remember(prefixes, key);
            }
            Went::Failed => {
                seen.last_until = now + pause(seen.failures);
                seen.failures = seen.failures.saturating_add(1);
            }
            Went::NoTime => {
                seen.no_time_until = now + pause(seen.refusals);
                seen.refusals = seen.refusals.saturating_add(1);
            }
            Went::Neither => {}
        }
    }

    fn remember(&mut self, prefixes: &[u64], key: KeyId) {
        for prefix in prefixes {
            if self.prefixes.insert(*prefix, key).is_none() {
                self.known.push_back(*prefix);
            }
        }
        while self.known.len() > MAX_PREFIXES {
            if let Some(oldest) = self.known.pop_front() {
                self.prefixes.remove(&oldest);
            }
        }
    }

    fn forget(&mut self) {
        if self.seen.len() < MAX_SEEN {
            return;
        }
        let mut at: Vec<_> = self.seen.values().map(|seen| seen.at).collect();
        at.sort();
        let old = at.get(at.len() / 2).copied().unwrap_or_default();
        self.seen.retain(|_, seen| seen.running > 0 || seen.at > old);
    }
}

/// For how long one that failed so often before is asked last.
fn pause(failures: u32) -> Span {
    MAX_PAUSE.min(PAUSE.scale(1 << failures.min(6), 1))
}

/// A mean in which the newest counts a quarter.
const fn smoothed(known: u64, new: u64) -> u64 {
    if known == 0 { new } else { (known * 3 + new) / 4 }
}

fn is_named(host: &Host<'_>, name: &str) -> bool {
    host.name == name || host.key.to_string() == name
}

/// What the model is asked for and cannot do there.
fn lacks((question, class): (&Question<'_>, Class), offer: &ModelOffer) -> Option<Lack> {
    if !offer.endpoints.contains(&question.endpoint) {
        return Some(Lack::Endpoint);
    }
    let lacks = question.needs & !offer.abilities;
    if lacks > 0 {
        return Some(Lack::Abilities(lacks));
    }
    // What is reckoned may be twice of what it is; exactly only the engine knows.
    if question.prompt_tokens / 2 > u64::from(offer.context) {
        return Some(Lack::Context(offer.context));
    }
    offer.rates_in(class).is_none().then_some(Lack::Slack)
}

/// What a node that may be asked takes for it, else what speaks against it.
fn allowed(
    (question, class): (&Question<'_>, Class),
    host: &Host<'_>,
    offer: &ModelOffer,
) -> Result<TokenRates, String> {
    let rates = offer.rates_in(class).unwrap_or_default();
    speaks_against((question, class), host, offer, &rates).map_or(Ok(rates), Err)
}

fn speaks_against(
    (question, class): (&Question<'_>, Class),
    host: &Host<'_>,
    offer: &ModelOffer,
    rates: &TokenRates,
) -> Option<String> {
    let dearer = |limit: Option<u64>, price: u64| limit.is_some_and(|limit| price > limit);
    let (prompt, completion) = question.max_price;
    if !host.up {
        Some("it is down".into())
    } else if let Some(what) = lacks((question, class), offer) {
        Some(what.to_string())
    } else if question.ignore.iter().any(|name| is_named(host, name)) {
        Some("it is to be ignored".into())
    } else if !question.only.is_empty() && !question.only.iter().any(|name| is_named(host, name)) {
        Some("it is not among those asked for".into())
    } else if !question.allow_fallbacks
        && !question.order.is_empty()
        && !question.order.iter().any(|name| is_named(host, name))
    {
        Some("it is not named, and no others are to be asked".into())
    } else if dearer(prompt, rates.prompt.0) || dearer(completion, rates.completion.0) {
        Some(format!("it takes {} and {} per 1M tokens", rates.prompt, rates.completion))
    } else if !question.quantizations.is_empty()
        && !question.quantizations.iter().any(|q| q.eq_ignore_ascii_case(&offer.quantisation))
    {
        Some(format!("its weights are kept as '{}'", offer.quantisation))
    } else {
        None
    }
}

/// What the request is reckoned to cost, in millionths of a billionth.
fn cost(rates: &TokenRates, question: &Question<'_>) -> u64 {
    let answer = question.max_tokens.unwrap_or(USUAL_ANSWER).min(USUAL_ANSWER * 16);
    let asked = question.prompt_tokens.max(1).saturating_mul(rates.prompt.0);
    asked.saturating_add(answer.saturating_mul(rates.completion.0))
}

/// Less is better.
const fn worth(sort: Sort, fit: &Fit<'_>) -> u64 {
    match sort {
        Sort::Balanced | Sort::Price => fit.cost,
        // What nobody has measured yet is neither fast nor slow.
        Sort::Throughput => 1_000_000_000 / if fit.per_second == 0 { 30 } else { fit.per_second },
        Sort::Latency => {
            if fit.first_token_us == 0 {
                200_000
            } else {
                fit.first_token_us
            }
        }
    }
}

const fn about(worth: u64, best: u64) -> bool {
    worth <= best.saturating_add(best / 1_000 * ABOUT)
}

/// Draws the next one out of `fits`, which has some.
fn draw(sort: Sort, fits: &[Fit<'_>], dice: &mut Dice) -> usize {
    let drawn = |dice: &mut Dice| match sort {
        Sort::Balanced => by_inverse_square(fits, dice),
        _ => {
            let best = fits.iter().map(|fit| worth(sort, fit)).min().unwrap_or_default();
            let good = |fit: &Fit<'_>| about(worth(sort, fit), best);
            let good: Vec<_> =
                (0..fits.len()).filter(|at| fits.get(*at).is_some_and(good)).collect();
            dice.pick(&good).copied().unwrap_or_default()
        }
    };
    let (one, other) = (drawn(dice), drawn(dice));
    let load = |at: usize| fits.get(at).map(|fit| fit.load);
    if load(other) < load(one) { other } else { one }
}

/// Draws one, a node of half the price four times as often.
fn by_inverse_square(fits: &[Fit<'_>], dice: &mut Dice) -> usize {
    let cheapest = fits.iter().map(|fit| fit.cost).min().unwrap_or_default().max(1);
    let weight = |fit: &Fit<'_>| {
        // In thousandths of the cheapest price: at most a thousand times as dear counts as that.
        let times = u128::from(fit.cost.max(1)) * 1_000 / u128::from(cheapest);
        let times = u64::try_from(times).unwrap_or(u64::MAX).min(1_000_000);
        (1_000_000_000_000 / (times * times)).max(1)
    };
    let mut left = dice.below(fits.iter().map(weight).sum::<u64>().max(1));
    for (at, fit) in fits.iter().enumerate() {
        match left.checked_sub(weight(fit)) {
            Some(rest) => left = rest,
            None => return at,
        }
    }
    0
}
