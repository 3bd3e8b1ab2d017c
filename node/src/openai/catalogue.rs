//! The models that can be had: `GET /v1/models` and `GET /v1/models/{id}`.
//!
//! OpenAI's four fields, and beside them what OpenRouter's catalogue has and this fabric knows.

use serde::{Deserialize, Serialize};

use super::decimal;
use super::needs::Needs;

/// A list of models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalogue {
    /// `list`
    pub object: String,
    /// The models.
    pub data: Vec<Model>,
}

/// A model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Its name, by which it is asked for.
    pub id: String,
    /// `model`
    pub object: String,
    /// When it was first heard of, in seconds since 1970.
    pub created: u64,
    /// Who made it, or offers it.
    pub owned_by: String,
    /// How many tokens it can look back on.
    pub context_length: u32,
    /// What it costs at the entry node, at the cheapest.
    pub pricing: Pricing,
    /// What it costs there whoever can wait (`service_tier` `flex`, and batches), at the cheapest; none
    /// where nobody sells it so.
    pub flex_pricing: Option<Pricing>,
    /// The currency of the prices.
    pub currency: String,
    /// In which quantisations it is served.
    pub quantizations: Vec<String>,
    /// How many nodes serve it.
    pub providers: u32,
    /// How many of them have it loaded.
    pub warm: u32,
    /// The best state that it has anywhere: `cold`, `loading`, `warm` or `down`.
    pub state: String,
    /// The fields of a request that it honours.
    pub supported_parameters: Vec<String>,
    /// Whether it is here to try things out, and not for its answers.
    pub demo: bool,
}

/// Prices of one token, as decimals: floats would not be exact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pricing {
    /// Of a token of prompt.
    pub prompt: String,
    /// Of a token produced.
    pub completion: String,
}

impl Catalogue {
    /// A list of these.
    #[must_use]
    pub fn new(data: Vec<Model>) -> Self {
        Self { object: "list".to_owned(), data }
    }
}

impl Pricing {
    /// From prices of a million tokens in billionths.
    #[must_use]
    pub fn per_million(prompt: u64, completion: u64) -> Self {
        let per_token = |price| decimal::per_token(price).to_string();
        Self { prompt: per_token(prompt), completion: per_token(completion) }
    }
}

/// The fields of a chat or completion that every model honours.
const ALWAYS: [&str; 7] =
    ["max_completion_tokens", "max_tokens", "seed", "stop", "stream", "temperature", "top_p"];

/// The fields that a model with these gifts honours, in order.
#[must_use]
pub fn supported_parameters(offered: Needs) -> Vec<String> {
    let mut names: Vec<&str> = ALWAYS.to_vec();
    // What the prompt is made of is no parameter.
    let made_of = ["messages", "prompt", "input"];
    names.extend(offered.iter().map(|need| need.param()).filter(|name| !made_of.contains(name)));
    if offered.has(super::Need::Tools) {
        names.extend(["tool_choice", "parallel_tool_calls"]);
    }
    if offered.has(super::Need::Logprobs) {
        names.push("top_logprobs");
    }
    names.sort_unstable();
    names.dedup();
    names.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::openai::Need;

    #[test]
    fn the_catalogue_has_openais_shape_and_ours() {
        let model = Model {
            id: "m".into(),
            object: "model".into(),
            created: 1,
            owned_by: "leasehold".into(),
            context_length: 8_192,
            pricing: Pricing::per_million(150_000_000, 600_000_000),
            flex_pricing: Some(Pricing::per_million(90_000_000, 360_000_000)),
            currency: "EUR".into(),
            quantizations: vec!["q8_0".into()],
            providers: 2,
            warm: 1,
            state: "warm".into(),
            supported_parameters: supported_parameters(Needs::PLAIN.with(Need::Tools)),
            demo: true,
        };
        let value = serde_json::to_value(Catalogue::new(vec![model.clone()])).unwrap();
        assert_eq!(
            value,
            json!({"object": "list", "data": [{"id": "m", "object": "model", "created": 1,
                "owned_by": "leasehold", "context_length": 8192,
                "pricing": {"prompt": "0.00000015", "completion": "0.0000006"},
                "flex_pricing": {"prompt": "0.00000009", "completion": "0.00000036"},
                "currency": "EUR", "quantizations": ["q8_0"], "providers": 2, "warm": 1,
                "state": "warm", "demo": true,
                "supported_parameters": ["max_completion_tokens", "max_tokens",
                    "parallel_tool_calls", "seed", "stop", "stream", "temperature",
                    "tool_choice", "tools", "top_p"]}]})
        );
        assert_eq!(serde_json::from_value::<Catalogue>(value).unwrap().data, [model]);
    }
}
