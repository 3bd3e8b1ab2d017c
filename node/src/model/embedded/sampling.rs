//! Chooses the next token from a model's logits, as OpenAI's parameters say.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How tokens are chosen. The default is what OpenAI's is: temperature 1, all tokens, no penalty.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token each time; up to 2 it becomes more random.
    pub temperature: f32,
    /// Only the likeliest tokens that together have this probability, above 0 up to 1.
    pub top_p: f32,
    /// The same seed with the same model and prompt gives the same text.
    pub seed: u64,
    /// Taken from the logit of each token that was chosen before, -2 to 2.
    pub presence_penalty: f32,
    /// The same for each time that it was chosen, -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of some tokens, -100 to 100 each; at most [`Sampling::MAX_BIASES`].
    pub logit_bias: Vec<(u32, f32)>,
    /// Whether to say how likely the chosen tokens were, and with how many others beside each, at
    /// most [`Sampling::MAX_LOGPROBS`].
    pub logprobs: Option<usize>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

impl Sampling {
    /// The most tokens that a bias can be given for.
    pub const MAX_BIASES: usize = 1024;
    /// The most tokens that are told beside the chosen one.
    pub const MAX_LOGPROBS: usize = 20;

    /// The likeliest token each time.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// What is wrong with it, in words for whoever sent it.
    pub(super) fn fault(&self, vocabulary: usize) -> Option<String> {
        let within = |x: f32, least: f32, most: f32| (least..=most).contains(&x);
        if !within(self.temperature, 0.0, 2.0) {
            return Some("temperature must be within 0 and 2".into());
        }
        if !within(self.top_p, 0.0, 1.0) {
            return Some("top_p must be within 0 and 1".into());
        }
        if !within(self.presence_penalty, -2.0, 2.0) || !within(self.frequency_penalty, -2.0, 2.0) {
            return Some("penalties must be within -2 and 2".into());
        }
        if self.logit_bias.len() > Self::MAX_BIASES {
            return Some(format!("at most {} tokens can have a bias", Self::MAX_BIASES));
        }
        if self.logit_bias.iter().any(|(_, bias)| !within(*bias, -100.0, 100.0)) {
            return Some("a bias must be within -100 and 100".into());
        }
        if let Some((id, _)) = self.logit_bias.iter().find(|(id, _)| *id as usize >= vocabulary) {
            return Some(format!("there is no token {id} to give a bias"));
        }
        if self.logprobs.is_some_and(|n| n > Self::MAX_LOGPROBS) {
            return Some(format!("at most {} logprobs are told", Self::MAX_LOGPROBS));
        }
        None
    }
}

/// How likely a token was, as natural logarithms at temperature 1, before penalties and biases.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens, the likeliest first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub(super) struct Sampler {
    sampling: Sampling,
    dice: ChaCha8Rng,
    /// How often each token was chosen.
    counts: BTreeMap<u32, u32>,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling) -> Self {
        let dice = ChaCha8Rng::seed_from_u64(sampling.seed);
        Self { sampling, dice, counts: BTreeMap::new() }
    }

    /// The next token; none when no logit is a number.
    pub(super) fn choose(&mut self, logits: &mut [f32]) -> Option<(u32, Option<Logprob>)> {
        // Whatever is not a number must not win by being compared.
        if logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        let raw = self.sampling.logprobs.map(|n| (log_sum(logits), likeliest(logits, n)));
        let unbiased = raw.is_some().then(|| logits.to_vec());
        for (id, count) in &self.counts {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= self.sampling.presence_penalty;
                *logit -= self.sampling.frequency_penalty * *count as f32;
            }
        }
        for (id, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        let id =
            if self.sampling.temperature == 0.0 { largest(logits) } else { self.draw(logits) }?;
        *self.counts.entry(id).or_default() += 1;
        let logprob = raw.zip(unbiased).map(|((sum, top), logits)| Logprob {
            chosen: logits[id as usize] - sum,
            top: top.into_iter().map(|(id, logit)| (id, logit - sum)).collect(),
        });
        Some((id, logprob))
    }

    fn draw(&mut self, logits: &[f32]) -> Option<u32> {
        let most = logits[largest(logits)? as usize];
        if !most.is_finite() {
            return largest(logits);
        }
        let weight = |logit: f32| f64::from((logit - most) / self.sampling.temperature).exp();
        let mut weights: Vec<(u32, f64)> =
            (0..).zip(logits).map(|(id, logit)| (id, weight(*logit))).collect();
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let top_p = f64::from(self.sampling.top_p);
        if top_p < 1.0 {
            // What is rarer than an even share of what is cut off is cut off for sure: the others
            // are few enough to be sorted.
            let least = (1.0 - top_p) / weights.len() as f64 * total;
            weights.retain(|(_, weight)| *weight >= least);
            weights.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let mut sum = 0.0;
            let enough = weights.iter().position(|(_, weight)| {
                sum += weight;
                sum >= top_p * total
            });
            weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        }
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        // 53 bits, as many as a double has: in [0, 1).
        let dice = (self.dice.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = dice * total;
        for (id, weight) in &weights {
            left -= weight;
            if left < 0.0 {
                return Some(*id);
            }
        }
        weights.last().map(|(id, _)| *id)
    }
}

/// The first of the largest.
fn largest(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, logit) in (0..).zip(logits) {
        if best.is_none_or(|(_, best)| *logit > best) {
            best = Some((id, *logit));
        }
    }
    best.map(|(id, _)| id)
}

/// The `n` largest, the first of equals first.
fn likeliest(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    for (id, logit) in (0..).zip(logits) {
        if top.len() < n || top.last().is_some_and(|(_, least)| logit > least) {
            let at = top.partition_point(|(_, other)| other >= logit);
            top.insert(at, (id, *logit));
            top.truncate(n);
        }
    }
    top
}

/// The logarithm of the sum of all exponentials.
fn log_sum(logits: &[f32]) -> f32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    (f64::from(most) + sum.ln()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(sampling: Sampling, logits: &[f32], times: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling);
        (0..times).filter_map(|_| Some(sampler.choose(&mut logits.to_vec())?.0)).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(chosen(Sampling::greedy(), &[1.0, 3.0, 3.0, 2.0], 2), [1, 1]);
        assert!(chosen(Sampling::greedy(), &[f32::NAN, 1.0], 1).is_empty());
        assert!(chosen(Sampling::greedy(), &[], 1).is_empty());
    }

    #[test]
    fn the_same_seed_gives_the_same_and_shares_are_as_they_should_be() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let seeded = |seed| chosen(Sampling { seed, ..Sampling::default() }, &logits, 4000);
        assert_eq!(seeded(1), seeded(1));
        assert_ne!(seeded(1), seeded(2));
        for (id, share) in [(0, 500), (1, 1000), (2, 2500)] {
            let count = seeded(1).iter().filter(|other| **other == id).count();
            assert!(count.abs_diff(share) < 120, "{id} was chosen {count} times");
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        let logits = [0.0, 2f32.ln(), 5f32.ln(), -30.0];
        let only = |top_p| {
            let mut ids = chosen(Sampling { top_p, ..Sampling::default() }, &logits, 500);
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(only(0.0), [2]);
        assert_eq!(only(0.6), [2]);
        assert_eq!(only(0.7), [1, 2]);
        assert_eq!(only(0.99), [0, 1, 2]);
    }

    #[test]
    fn penalties_and_biases_move_the_choice() {
        let sampling = Sampling { presence_penalty: 1.5, ..Sampling::greedy() };
        assert_eq!(chosen(sampling, &[2.0, 1.0, 0.0], 3), [0, 1, 0]);
        let sampling = Sampling { frequency_penalty: 0.6, ..Sampling::greedy() };
        assert_eq!(chosen(sampling, &[2.0, 1.0, 0.0], 4), [0, 0, 1, 0]);
        let sampling = Sampling { logit_bias: vec![(2, 100.0)], ..Sampling::greedy() };
        assert_eq!(chosen(sampling, &[2.0, 1.0, 0.0], 1), [2]);
    }

    #[test]
    fn logprobs_are_of_the_raw_logits() {
        let sampling =
            Sampling { logprobs: Some(2), logit_bias: vec![(0, -100.0)], ..Sampling::greedy() };
        let logits = [0.0f32, 3f32.ln(), 4f32.ln()];
        let (id, logprob) = Sampler::new(sampling).choose(&mut logits.to_vec()).unwrap();
        let logprob = logprob.unwrap();
        assert_eq!(id, 2);
        assert!((logprob.chosen - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(logprob.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 1]);
        assert!((logprob.top[1].1 - 0.375f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        for sampling in [
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { temperature: 2.1, ..Sampling::default() },
            Sampling { top_p: -0.1, ..Sampling::default() },
            Sampling { logit_bias: vec![(9, 0.0)], ..Sampling::default() },
            Sampling { logprobs: Some(21), ..Sampling::default() },
        ] {
            assert!(sampling.fault(9).is_some(), "{sampling:?}");
        }
        assert_eq!(Sampling::default().fault(9), None);
    }
}
