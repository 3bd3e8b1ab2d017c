//! How tokens are chosen and when to stop: the fields of a request that say so.

use super::Endpoint;
use super::fault::{Fault, shown};
use super::needs::{Need, Needs};
use super::read::{Field, Path, Sort};

/// How many tokens may have a bias.
pub const BIASES: usize = 1_024;
/// How many texts may end an answer.
pub const STOPS: usize = 4;
/// The longest of them, in bytes.
pub const STOP: usize = 1_024;
/// The most tokens that may be asked for.
pub const TOKENS: u32 = i32::MAX as u32;

/// How tokens are chosen and when to stop. What is None was not said; what it is then is the
/// model's to say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0 to 2.
    pub temperature: Option<f64>,
    /// 0 to 1.
    pub top_p: Option<f64>,
    /// -1 or 0 for all, or among how many.
    pub top_k: Option<i32>,
    /// 0 to 1.
    pub min_p: Option<f64>,
    /// Above 0, up to 2.
    pub repetition_penalty: Option<f64>,
    /// -2 to 2.
    pub presence_penalty: Option<f64>,
    /// -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// Tokens and what is added to their logits, -100 to 100.
    pub logit_bias: Vec<(u32, f64)>,
    /// How many answers, 1 to 128.
    pub n: Option<u32>,
    /// The dice.
    pub seed: Option<i64>,
    /// Texts that end an answer, at most [`STOPS`].
    pub stop: Vec<String>,
    /// The most tokens to produce, by whichever name.
    pub max_tokens: Option<u32>,
    /// Probabilities of tokens, with so many alternatives for each.
    pub logprobs: Option<u32>,
}

/// What is decided only when all fields were seen.
#[derive(Debug, Default)]
pub(super) struct Pending {
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: bool,
    top_logprobs: Option<u32>,
    best_of: Option<u32>,
}

impl Sampling {
    /// Reads a field if it is one of these.
    pub(super) fn take(
        &mut self,
        pending: &mut Pending,
        endpoint: Endpoint,
        key: &str,
        field: &Field<'_, '_>,
        needs: &mut Needs,
    ) -> Result<bool, Fault> {
        let mut need = |needed: bool, need| {
            if needed {
                *needs = needs.with(need);
            }
        };
        match key {
            "temperature" => self.temperature = Some(field.decimal(0.0, 2.0)?),
            "top_p" => self.top_p = Some(field.decimal(0.0, 1.0)?),
            "top_k" => {
                let top = i32::try_from(field.integer(-1, 1 << 20)?).unwrap_or(0);
                self.top_k = Some(top);
                need(top > 0, Need::TopK);
            }
            "min_p" => {
                let least = field.decimal(0.0, 1.0)?;
                self.min_p = Some(least);
                need(least != 0.0, Need::MinP);
            }
            "repetition_penalty" => {
                let factor = field.decimal(0.01, 2.0)?;
                self.repetition_penalty = Some(factor);
                need(factor != 1.0, Need::RepetitionPenalty);
            }
            "presence_penalty" => {
                let penalty = field.decimal(-2.0, 2.0)?;
                self.presence_penalty = Some(penalty);
                need(penalty != 0.0, Need::PresencePenalty);
            }
            "frequency_penalty" => {
                let penalty = field.decimal(-2.0, 2.0)?;
                self.frequency_penalty = Some(penalty);
                need(penalty != 0.0, Need::FrequencyPenalty);
            }
            "logit_bias" => {
                self.logit_bias = biases(field)?;
                need(!self.logit_bias.is_empty(), Need::LogitBias);
            }
            "n" => {
                let n = field.count(1, 128)?;
                self.n = Some(n);
                need(n > 1, Need::Choices);
            }
            "best_of" => {
                let best = field.count(1, 20)?;
                pending.best_of = Some(best);
                need(best > 1, Need::BestOf);
            }
            "seed" => self.seed = Some(field.integer(i64::MIN, i64::MAX)?),
            "stop" => self.stop = stops(field)?,
            "max_tokens" => {
                // A completion may be asked for its prompt's probabilities alone.
                let least = u32::from(endpoint == Endpoint::Chat);
                pending.max_tokens = Some(field.count(least, TOKENS)?);
            }
            "max_completion_tokens" | "max_output_tokens" => {
                pending.max_completion_tokens = Some(field.count(1, TOKENS)?);
            }
            "logprobs" if endpoint == Endpoint::Completions => {
                self.logprobs = Some(field.count(0, 5)?);
                need(true, Need::Logprobs);
            }
            "logprobs" => {
                pending.logprobs = field.boolean()?;
                need(pending.logprobs, Need::Logprobs);
            }
            "top_logprobs" => {
                let top = field.count(0, 20)?;
                pending.top_logprobs = Some(top);
                need(top > 0, Need::Logprobs);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What follows from several fields together.
    pub(super) fn finish(&mut self, pending: &Pending, endpoint: Endpoint) -> Result<(), Fault> {
        let (older, newer) = (pending.max_tokens, pending.max_completion_tokens);
        if older.is_some() && newer.is_some() && older != newer {
            let why = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not \
                       supported.";
            return Err(Fault::invalid(Some("invalid_parameter_combination"), why).at("max_tokens"));
        }
        self.max_tokens = newer.or(older);
        if endpoint == Endpoint::Chat {
            if pending.top_logprobs.is_some() && !pending.logprobs {
                let why =
                    "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.";
                return Err(Fault::invalid(None, why).at("top_logprobs"));
            }
            self.logprobs = pending.logprobs.then(|| pending.top_logprobs.unwrap_or(0));
        }
        if pending.best_of.is_some_and(|best| best < self.n.unwrap_or(1)) {
            let why = "You requested that the server return more choices than it will generate \
                       ('best_of' must be at least 'n').";
            return Err(Fault::invalid(None, why).at("best_of"));
        }
        Ok(())
    }
}

fn biases(field: &Field<'_, '_>) -> Result<Vec<(u32, f64)>, Fault> {
    let object = field.object()?;
    if object.fields.len() > BIASES {
        let why = format!("more than {BIASES} tokens have a bias.");
        return Err(field.invalid("object_above_max_properties", why));
    }
    let mut biases = Vec::with_capacity(object.fields.len());
    for (key, raw) in &object.fields {
        let Ok(token) = key.parse() else {
            let why = format!("'{}' is no token.", shown(key));
            return Err(field.invalid("invalid_value", why));
        };
        let bias = Field::new(raw, Path::Key(&field.path, key)).decimal(-100.0, 100.0)?;
        biases.push((token, bias));
    }
    Ok(biases)
}

fn stops(field: &Field<'_, '_>) -> Result<Vec<String>, Fault> {
    match field.sort() {
        Sort::String => Ok(vec![field.text(STOP)?.into_owned()]),
        Sort::Array => {
            let items = field.items(STOPS, true)?.into_iter().enumerate();
            items
                .map(|(at, raw)| {
                    let item = Field::new(raw, Path::Item(&field.path, at));
                    Ok(item.text(STOP)?.into_owned())
                })
                .collect()
        }
        _ => Err(field.wrong_type("one of a string or array of strings")),
    }
}
