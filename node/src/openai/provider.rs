//! The `provider` object of a request, as OpenRouter has it: which serving nodes may answer.
//!
//! Each of its fields is honoured or refused by name, never ignored. Money is in the fabric's unit,
//! as integers of billionths.

use std::time::Duration;

use super::decimal;
use super::fault::{Fault, shown};
use super::read::{Field, Path, Sort as Shape, each};

/// How many names a list may have.
pub const NAMES: usize = 64;
/// The longest name of a node, in bytes.
pub const NAME: usize = 128;
/// How many quantisations may be listed.
const QUANTIZATIONS: usize = 32;

/// Which of the serving nodes that fit comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// The cheapest; the model suffix `:floor` says the same.
    Price,
    /// The one with most tokens a second; the suffix `:nitro`.
    Throughput,
    /// The one whose first token comes soonest.
    Latency,
}

/// The most that may be paid. What is None is not bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaxPrice {
    /// For a million tokens of prompt, in billionths.
    pub prompt: Option<u64>,
    /// For a million tokens produced, in billionths.
    pub completion: Option<u64>,
    /// For a request, in billionths. Nothing is charged for that, so every price keeps it.
    pub request: Option<u64>,
    /// For a picture, in billionths. Nothing is charged for that, so every price keeps it.
    pub image: Option<u64>,
}

/// Which serving nodes may answer, and in which order they are tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    /// What comes first.
    pub sort: Option<Sort>,
    /// The most that may be paid.
    pub max_price: MaxPrice,
    /// Names or ids of nodes to be tried first, in this order.
    pub order: Vec<String>,
    /// The only nodes that may answer; empty for all.
    pub only: Vec<String>,
    /// Nodes that may not answer.
    pub ignore: Vec<String>,
    /// Whether another node may answer when the first cannot, and others than those in `order`.
    pub allow_fallbacks: bool,
    /// Accepted quantisations in small letters; empty for all.
    pub quantizations: Vec<String>,
    /// Whether only nodes may answer that can do all that the request asks for. This fabric never
    /// drops what a request asks for, so it is kept either way.
    pub require_parameters: bool,
    /// Nodes with at least so many thousandths of a token a second are preferred.
    pub preferred_min_throughput: Option<u64>,
    /// Nodes whose first token comes within this are preferred.
    pub preferred_max_latency: Option<Duration>,
}

impl Default for Provider {
    fn default() -> Self {
        Self {
            sort: None,
            max_price: MaxPrice::default(),
            order: Vec::new(),
            only: Vec::new(),
            ignore: Vec::new(),
            allow_fallbacks: true,
            quantizations: Vec::new(),
            require_parameters: false,
            preferred_min_throughput: None,
            preferred_max_latency: None,
        }
    }
}

impl Sort {
    const WORDS: [&'static str; 3] = ["price", "throughput", "latency"];

    fn read(field: &Field<'_, '_>) -> Result<Self, Fault> {
        Ok(match field.word(&Self::WORDS)? {
            "price" => Self::Price,
            "throughput" => Self::Throughput,
            _ => Self::Latency,
        })
    }

    /// Takes a suffix that sorts off a model's name: `m:nitro` is `m` by throughput, `m:floor` is
    /// `m` by price. Any other suffix belongs to the name.
    #[must_use]
    pub fn of_model(name: &str) -> (&str, Option<Self>) {
        for (suffix, sort) in [(":nitro", Self::Throughput), (":floor", Self::Price)] {
            if let Some(bare) = name.strip_suffix(suffix).filter(|bare| !bare.is_empty()) {
                return (bare, Some(sort));
            }
        }
        (name, None)
    }
}

impl Provider {
    pub(super) fn read(field: &Field<'_, '_>) -> Result<Self, Fault> {
        let mut this = Self::default();
        each(field, |key, field| {
            if field.is_null() {
                // Still only for names that are known.
                return Ok(KNOWN.contains(&key));
            }
            match key {
                "sort" => this.sort = read_sort(&field)?,
                "max_price" => this.max_price = MaxPrice::read(&field)?,
                "order" => this.order = names(&field)?,
                "only" => this.only = names(&field)?,
                "ignore" => this.ignore = names(&field)?,
                "allow_fallbacks" => this.allow_fallbacks = field.boolean()?,
                "quantizations" => this.quantizations = quantizations(&field)?,
                "require_parameters" => this.require_parameters = field.boolean()?,
                "preferred_min_throughput" => {
                    this.preferred_min_throughput = Some(median(&field)? / 1_000_000);
                }
                "preferred_max_latency" => {
                    this.preferred_max_latency = Some(Duration::from_nanos(median(&field)?));
                }
                "data_collection" => {
                    if field.word(&["allow", "deny"])? == "deny" {
                        return Err(not_promised(&field));
                    }
                }
                "zdr" => {
                    if field.boolean()? {
                        return Err(not_promised(&field));
                    }
                }
                "enforce_distillable_text" => {
                    if field.boolean()? {
                        let why = "this fabric does not know which models may be distilled.";
                        return Err(field.invalid("unsupported_value", why));
                    }
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(this)
    }
}

/// All fields that are read.
const KNOWN: [&str; 13] = [
    "sort",
    "max_price",
    "order",
    "only",
    "ignore",
    "allow_fallbacks",
    "quantizations",
    "require_parameters",
    "preferred_min_throughput",
    "preferred_max_latency",
    "data_collection",
    "zdr",
    "enforce_distillable_text",
];

impl MaxPrice {
    fn read(field: &Field<'_, '_>) -> Result<Self, Fault> {
        let mut this = Self::default();
        each(field, |key, field| {
            let place = match key {
                "prompt" => &mut this.prompt,
                "completion" => &mut this.completion,
                "request" => &mut this.request,
                "image" => &mut this.image,
                _ => return Ok(false),
            };
            if !field.is_null() {
                *place = Some(figure(&field)?);
            }
            Ok(true)
        })?;
        Ok(this)
    }
}

/// A word, or OpenRouter's object with `by` and `partition`.
fn read_sort(field: &Field<'_, '_>) -> Result<Option<Sort>, Fault> {
    if field.sort() != Shape::Object {
        return Sort::read(field).map(Some);
    }
    let mut by = None;
    each(field, |key, field| {
        match key {
            _ if field.is_null() => return Ok(matches!(key, "by" | "partition")),
            "by" => by = Some(Sort::read(&field)?),
            // Each of several models is tried with all its nodes before the next one is.
            "partition" => {
                if field.word(&["model", "none"])? == "none" {
                    let why = "nodes are sorted within each model only.";
                    return Err(field.invalid("unsupported_value", why));
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(by)
}

/// Whoever answers sees the prompt, and nothing can be promised for it.
fn not_promised(field: &Field<'_, '_>) -> Fault {
    let why = "the node that answers sees the prompt, and nobody can promise what it keeps. Name \
               nodes that you trust in 'provider.only' instead.";
    field.invalid("unsupported_value", why)
}

/// A decimal, as a number or a string, as billionths.
fn figure(field: &Field<'_, '_>) -> Result<u64, Fault> {
    let figure = match field.sort() {
        Shape::Number => decimal::billionths(field.raw.get()),
        Shape::String => decimal::billionths(&field.text(64)?),
        _ => return Err(field.wrong_type("a decimal")),
    };
    figure.map_err(|why| field.invalid("invalid_value", format_args!("{why}.")))
}

/// A figure, or OpenRouter's object of percentiles, of which this fabric measures the middle.
fn median(field: &Field<'_, '_>) -> Result<u64, Fault> {
    if field.sort() != Shape::Object {
        return figure(field);
    }
    let mut median = None;
    each(field, |key, field| {
        match key {
            "p50" => median = Some(figure(&field)?),
            "p75" | "p90" | "p99" => {
                let why = "only the median, p50, is measured.";
                return Err(field.invalid("unsupported_value", why));
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    median.ok_or_else(|| Fault::missing(Path::Key(&field.path, "p50")))
}

fn names(field: &Field<'_, '_>) -> Result<Vec<String>, Fault> {
    let mut names = Vec::new();
    for (at, raw) in field.items(NAMES, true)?.into_iter().enumerate() {
        let item = Field::new(raw, Path::Item(&field.path, at));
        let name = item.text(NAME)?;
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(item.invalid("invalid_value", "no name of a node."));
        }
        names.push(name.into_owned());
    }
    Ok(names)
}

fn quantizations(field: &Field<'_, '_>) -> Result<Vec<String>, Fault> {
    let mut words = Vec::new();
    for (at, raw) in field.items(QUANTIZATIONS, true)?.into_iter().enumerate() {
        let item = Field::new(raw, Path::Item(&field.path, at));
        let word = item.text(32)?;
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if word.is_empty() || !word.bytes().all(fits) {
            let why = format!("'{}' is no quantisation.", shown(&word));
            return Err(item.invalid("invalid_value", why));
        }
        words.push(word.to_ascii_lowercase());
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;

    fn read(text: &str) -> Result<Provider, Fault> {
        let raw: &RawValue = serde_json::from_str(text).unwrap();
        Provider::read(&Field::new(raw, Path::Key(&Path::Root, "provider")))
    }

    #[test]
    fn all_that_is_honoured_is_read() {
        assert_eq!(read("{}"), Ok(Provider::default()));
        let all = r#"{"sort":"latency","max_price":{"prompt":0.15,"completion":"0.6","request":0,
            "image":null},"order":["a","b"],"only":["a"],"ignore":[],"allow_fallbacks":false,
            "quantizations":["FP8","Q8_0"],"require_parameters":true,"data_collection":"allow",
            "zdr":false,"enforce_distillable_text":null,"preferred_min_throughput":{"p50":40.5},
            "preferred_max_latency":1.25}"#;
        let expected = Provider {
            sort: Some(Sort::Latency),
            max_price: MaxPrice {
                prompt: Some(150_000_000),
                completion: Some(600_000_000),
                request: Some(0),
                image: None,
            },
            order: vec!["a".into(), "b".into()],
            only: vec!["a".into()],
            ignore: vec![],
            allow_fallbacks: false,
            quantizations: vec!["fp8".into(), "q8_0".into()],
            require_parameters: true,
            preferred_min_throughput: Some(40_500),
            preferred_max_latency: Some(Duration::from_millis(1_250)),
        };
        assert_eq!(read(all), Ok(expected));
        assert_eq!(
            read(r#"{"sort":{"by":"price","partition":"model"}}"#).unwrap().sort,
            Some(Sort::Price)
        );
    }

    #[test]
    fn the_rest_is_refused_by_name() {
        let many = format!("{{\"only\":[{}\"a\"]}}", "\"a\",".repeat(NAMES));
        for (text, param, code) in [
            ("[]", "provider", "invalid_type"),
            (r#"{"sorted":"price"}"#, "provider.sorted", "unknown_parameter"),
            (r#"{"sorted":null}"#, "provider.sorted", "unknown_parameter"),
            (r#"{"sort":"best"}"#, "provider.sort", "invalid_value"),
            (
                r#"{"sort":{"by":"price","partition":"none"}}"#,
                "provider.sort.partition",
                "unsupported_value",
            ),
            (r#"{"data_collection":"deny"}"#, "provider.data_collection", "unsupported_value"),
            (r#"{"data_collection":"no"}"#, "provider.data_collection", "invalid_value"),
            (r#"{"zdr":true}"#, "provider.zdr", "unsupported_value"),
            (
                r#"{"enforce_distillable_text":true}"#,
                "provider.enforce_distillable_text",
                "unsupported_value",
            ),
            (r#"{"max_price":{"audio":1}}"#, "provider.max_price.audio", "unknown_parameter"),
            (r#"{"max_price":{"prompt":-1}}"#, "provider.max_price.prompt", "invalid_value"),
            (r#"{"max_price":{"prompt":true}}"#, "provider.max_price.prompt", "invalid_type"),
            (r#"{"max_price":{"prompt":1e99}}"#, "provider.max_price.prompt", "invalid_value"),
            (r#"{"only":"a"}"#, "provider.only", "invalid_type"),
            (r#"{"only":[""]}"#, "provider.only[0]", "invalid_value"),
            (r#"{"only":["a",1]}"#, "provider.only[1]", "invalid_type"),
            (&many, "provider.only", "array_above_max_length"),
            (r#"{"quantizations":["a b"]}"#, "provider.quantizations[0]", "invalid_value"),
            (
                r#"{"preferred_max_latency":{"p90":1}}"#,
                "provider.preferred_max_latency.p90",
                "unsupported_value",
            ),
            (
                r#"{"preferred_max_latency":{}}"#,
                "provider.preferred_max_latency.p50",
                "missing_required_parameter",
            ),
            (r#"{"zdr":false,"zdr":true}"#, "provider.zdr", "duplicate_parameter"),
        ] {
            let fault = read(text).unwrap_err();
            assert_eq!(fault.status, 400);
            assert_eq!(fault.param.as_deref(), Some(param), "{text}");
            assert_eq!(fault.code.as_deref(), Some(code), "{text}");
        }
    }

    #[test]
    fn suffixes_sort() {
        assert_eq!(Sort::of_model("a/b:nitro"), ("a/b", Some(Sort::Throughput)));
        assert_eq!(Sort::of_model("a:floor"), ("a", Some(Sort::Price)));
        assert_eq!(Sort::of_model("a:free"), ("a:free", None));
        assert_eq!(Sort::of_model(":floor"), (":floor", None));
    }
}
