//! What is wanted and what shall run, as people and scripts write it: the JSON bodies of the API
//! and, through the same parsers, the options of the command line.
//!
//! Quantities read as [`crate::quantity`] says: `1.5` cores, `256M`, `60s`, `0.05/h`.

use std::collections::BTreeMap;
use std::fmt;

use leasehold_keys::text;
use leasehold_proto::words::contract::{Class, Input, JobSpec};
use leasehold_proto::words::want::Want;
use leasehold_proto::{Amount, Gpus, Hash, KeyId, Payload, Resources, Span};
use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

use crate::quantity;

/// The most labels, lessors or isolation words of one want.
const MAX_LIST: usize = 64;

/// A quantity in the text forms of this module. JSON may give a string or a number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Text(pub String);

impl Text {
    fn of(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Text;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a number")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.into()))
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl utoipa::PartialSchema for Text {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
        OneOfBuilder::new()
            .item(ObjectBuilder::new().schema_type(Type::String))
            .item(ObjectBuilder::new().schema_type(Type::Number))
            .description(Some("A quantity as people write it."))
            .into()
    }
}

impl ToSchema for Text {}

/// So many GPUs of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuText {
    /// The kind, as offers name it.
    pub kind: String,
    /// How many devices.
    pub count: u32,
}

/// How firmly capacity is wanted.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum ClassText {
    /// Until its term.
    #[default]
    Firm,
    /// The operator may take it back, after a notice.
    Slack,
}

/// What is wanted. Money has no default: `max_price` and `budget` must be said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WantText {
    /// Cores.
    #[serde(default = "cpu")]
    #[schema(example = "1", default = "1")]
    pub cpu: Text,
    /// Bytes of memory.
    #[serde(default = "memory")]
    #[schema(example = "256M", default = "256M")]
    pub memory: Text,
    /// Bytes of disk.
    #[serde(default = "disk")]
    #[schema(example = "64M", default = "64M")]
    pub disk: Text,
    /// GPUs by kind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuText>,
    /// How firmly.
    #[serde(default)]
    pub class: ClassText,
    /// For how long.
    #[serde(default = "ttl")]
    #[schema(example = "60s", default = "10m")]
    pub ttl: Text,
    /// To what time it may be renewed at the same price; `ttl`, when not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "1h")]
    pub max_ttl: Option<Text>,
    /// Within what time it will be claimed; else it lapses and costs nothing.
    #[serde(default = "claim_within")]
    #[schema(example = "20s", default = "20s")]
    pub claim_within: Text,
    /// The most it may cost per hour.
    #[schema(example = "0.05")]
    pub max_price: Text,
    /// The most it may cost in all.
    #[schema(example = "0.01")]
    pub budget: Text,
    /// The most that may stand unacknowledged; the budget, when not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exposure: Option<Text>,
    /// How often a receipt is wanted.
    #[serde(default = "receipt_every")]
    #[schema(example = "1s", default = "1s")]
    pub receipt_every: Text,
    /// The runtime it needs.
    #[serde(default = "runtime")]
    #[schema(example = "wasm", default = "wasm")]
    pub runtime: String,
    /// Only these hosts, by key, asked in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lessors: Vec<String>,
    /// Only hosts with these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Only hosts that confine jobs in all of these ways.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub isolation: Vec<String>,
}

fn cpu() -> Text {
    Text::of("1")
}
fn memory() -> Text {
    Text::of("256M")
}
fn disk() -> Text {
    Text::of("64M")
}
fn ttl() -> Text {
    Text::of("10m")
}
fn claim_within() -> Text {
    Text::of("20s")
}
fn receipt_every() -> Text {
    Text::of("1s")
}
fn runtime() -> String {
    "wasm".into()
}

/// Why a want or a job is not understood: which field, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct NotUnderstood {
    /// The field, as the JSON names it.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// Names the field in which something is wrong.
fn within<T, E: ToString>(field: &'static str, result: Result<T, E>) -> Result<T, NotUnderstood> {
    result.map_err(|why| NotUnderstood { field, why: clipped(&why.to_string()) })
}

/// A message of bounded length that steers no terminal: it repeats what was given.
fn clipped(why: &str) -> String {
    text::shown(&why.chars().take(200).collect::<String>())
}

fn rule(field: &'static str, holds: bool, rule: &'static str) -> Result<(), NotUnderstood> {
    if holds { Ok(()) } else { Err(NotUnderstood { field, why: rule.into() }) }
}

impl WantText {
    /// A want with every default, which may cost this much per hour and in all.
    #[must_use]
    pub fn new(max_price: &str, budget: &str) -> Self {
        Self {
            cpu: cpu(),
            memory: memory(),
            disk: disk(),
            gpus: Vec::new(),
            class: ClassText::Firm,
            ttl: ttl(),
            max_ttl: None,
            claim_within: claim_within(),
            max_price: Text::of(max_price),
            budget: Text::of(budget),
            exposure: None,
            receipt_every: receipt_every(),
            runtime: runtime(),
            lessors: Vec::new(),
            labels: BTreeMap::new(),
            isolation: Vec::new(),
        }
    }

    /// The want that these texts say.
    ///
    /// # Errors
    /// The first field that is not understood or breaks a rule.
    pub fn parse(&self) -> Result<Want, NotUnderstood> {
        let cpu = within("want.cpu", quantity::cpu(&self.cpu.0))?;
        let memory = within("want.memory", quantity::bytes(&self.memory.0))?;
        let disk = within("want.disk", quantity::bytes(&self.disk.0))?;
        rule("want.cpu", cpu > 0, "some CPU must be asked for")?;
        rule("want.memory", memory > 0, "some memory must be asked for")?;
        let mut gpus: Vec<_> =
            self.gpus.iter().map(|gpu| Gpus { kind: gpu.kind.clone(), count: gpu.count }).collect();
        gpus.sort();
        let shape = Resources { gpus, ..Resources::new(cpu, memory, disk) };
        let gpu_rule = "at most 16 kinds, each named once, each with a count above zero";
        rule("want.gpus", shape.is_well_formed(), gpu_rule)?;
        let term = within("want.ttl", quantity::span(&self.ttl.0))?;
        rule("want.ttl", term > Span::ZERO, "it must be longer than nothing")?;
        let longest = match &self.max_ttl {
            Some(text) => within("want.max_ttl", quantity::span(&text.0))?,
            None => term,
        };
        rule("want.max_ttl", longest >= term, "it must not be shorter than ttl")?;
        let claim_within = within("want.claim_within", quantity::span(&self.claim_within.0))?;
        rule("want.claim_within", claim_within > Span::ZERO, "it must be longer than nothing")?;
        // A lease that is shorter than that is claimed within its term, if at all.
        let claim_within = claim_within.min(term);
        let budget = within("want.budget", quantity::amount(&self.budget.0))?;
        rule("want.budget", budget > Amount::ZERO, "it must be more than nothing")?;
        let exposure = match &self.exposure {
            Some(text) => within("want.exposure", quantity::amount(&text.0))?,
            None => budget,
        };
        let lists = [self.lessors.len(), self.isolation.len(), self.labels.len()];
        rule("want", lists.iter().all(|n| *n <= MAX_LIST), "its lists have at most 64 entries")?;
        let named = !self.runtime.is_empty() && self.runtime.len() <= 32;
        rule("want.runtime", named, "it must name a runtime, such as wasm")?;
        let lessors = self.lessors.iter().map(|text| text.parse::<KeyId>());
        Ok(Want {
            shape,
            model: None,
            class: match self.class {
                ClassText::Firm => Class::Firm,
                ClassText::Slack => Class::Slack,
            },
            term,
            longest,
            claim_within,
            max_hourly: within("want.max_price", quantity::price(&self.max_price.0))?,
            budget,
            exposure,
            receipt_every: within("want.receipt_every", quantity::span(&self.receipt_every.0))?,
            runtime: self.runtime.clone(),
            lessors: within("want.lessors", lessors.collect::<Result<_, _>>())?,
            labels: self.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            isolation: self.isolation.clone(),
        })
    }
}

/// A payload by its name and size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PayloadText {
    /// Its BLAKE3 root, as 64 hex digits.
    pub root: String,
    /// How many bytes, exactly.
    pub size: u64,
}

impl PayloadText {
    /// The name of `payload`.
    #[must_use]
    pub fn of(payload: &Payload) -> Self {
        Self { root: payload.root.to_string(), size: payload.size }
    }

    pub(super) fn parse(&self, field: &'static str) -> Result<Payload, NotUnderstood> {
        let root = within(field, self.root.parse::<Hash>())?;
        Ok(Payload { root, size: self.size })
    }
}

/// A file that a job finds under `/in`, or a directory of files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InputText {
    /// Its name.
    pub name: String,
    /// Its BLAKE3 root, as 64 hex digits.
    pub root: String,
    /// How many bytes, exactly.
    pub size: u64,
    /// Where it is an index and the directory of its files is wanted: how many bytes they have
    /// together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
}

/// What shall run under a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobText {
    /// The runtime.
    #[serde(default = "runtime")]
    #[schema(example = "wasm", default = "wasm")]
    pub runtime: String,
    /// The program.
    pub program: PayloadText,
    /// Its arguments, without the program's own name.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// What it reads from standard input; nothing when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<PayloadText>,
    /// Files and directories it finds under `/in`.
    #[serde(default)]
    pub inputs: Vec<InputText>,
    /// Names of files under `/out` that are kept for fetching.
    #[serde(default)]
    pub outputs: Vec<String>,
    /// Whether the lease is given back by itself once the job has ended. Else it is held, and
    /// paid, to its term or until it is released.
    #[serde(default)]
    pub release_after: bool,
}

impl JobText {
    /// The job that these texts say.
    ///
    /// # Errors
    /// The first field that is not understood or breaks a rule.
    pub fn parse(&self) -> Result<JobSpec, NotUnderstood> {
        let input = |input: &InputText| {
            let root = within("job.inputs", input.root.parse::<Hash>())?;
            let payload = Payload { root, size: input.size };
            Ok(Input { name: input.name.clone(), payload, index: input.index })
        };
        let job = JobSpec {
            runtime: self.runtime.clone(),
            program: self.program.parse("job.program")?,
            args: self.args.clone(),
            env: self.env.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            stdin: self.stdin.as_ref().map(|stdin| stdin.parse("job.stdin")).transpose()?,
            inputs: self.inputs.iter().map(input).collect::<Result<_, NotUnderstood>>()?,
            outputs: self.outputs.clone(),
            release_after: self.release_after,
        };
        within("job", job.check())?;
        Ok(job)
    }
}

#[cfg(test)]
mod tests {
    use leasehold_proto::Amount;

    use super::*;

    #[test]
    fn a_want_reads_from_json_with_strings_or_numbers() {
        let text = r#"{"cpu": 1.5, "memory": "256M", "ttl": "60s", "max_price": 0.05,
            "budget": "0.01", "gpus": [{"kind": "b", "count": 1}, {"kind": "a", "count": 2}]}"#;
        let want: WantText = serde_json::from_str(text).expect("a want");
        let want = want.parse().expect("understood");
        assert_eq!(want.shape.cpu_milli, 1500);
        assert_eq!(want.shape.gpu_count("a"), 2);
        assert_eq!(want.term, Span::secs(60));
        assert_eq!(want.max_hourly, Amount(50_000_000));
        assert_eq!(want.exposure, want.budget);
        assert_eq!(want.class, Class::Firm);
    }

    #[test]
    fn what_is_wrong_with_a_want_is_named() {
        let good = || WantText::new("0.05", "0.01");
        let broken = |change: fn(&mut WantText)| {
            let mut want = good();
            change(&mut want);
            want.parse().expect_err("broken").to_string()
        };
        assert!(good().parse().is_ok());
        for (text, field) in [
            (broken(|want| want.cpu = Text::of("many")), "want.cpu: 'many'"),
            (broken(|want| want.cpu = Text::of("0")), "want.cpu: some CPU"),
            (broken(|want| want.memory = Text::of("1X")), "want.memory: '1X'"),
            (broken(|want| want.ttl = Text::of("60")), "want.ttl: '60'"),
            (broken(|want| want.ttl = Text::of("0s")), "want.ttl: it must"),
            (broken(|want| want.max_price = Text::of("x/h")), "want.max_price: 'x"),
            (broken(|want| want.budget = Text::of("-1")), "want.budget: '-1'"),
            (broken(|want| want.lessors = vec!["me".into()]), "want.lessors: 'me'"),
            (broken(|want| want.runtime = String::new()), "want.runtime: it must"),
            (
                broken(|want| {
                    want.gpus = vec![GpuText { kind: "a".into(), count: 1 }; 2];
                }),
                "want.gpus: at most",
            ),
        ] {
            assert!(text.starts_with(field), "{text}");
        }
        for unknown in [r#"{"max_price": 1, "budget": 1, "cpus": 1}"#, r#"{"budget": 1}"#] {
            let error = serde_json::from_str::<WantText>(unknown).expect_err("refused");
            let named = ["cpus", "max_price"].iter().any(|name| error.to_string().contains(name));
            assert!(named, "{error}");
        }
    }

    #[test]
    fn a_job_reads_and_its_rules_hold() {
        let root = "ab".repeat(32);
        let text = format!(
            r#"{{"program": {{"root": "{root}", "size": 7}}, "args": ["a"], "env": {{"K": "V"}}}}"#
        );
        let job: JobText = serde_json::from_str(&text).expect("a job");
        let spec = job.parse().expect("understood");
        assert_eq!((spec.program.size, spec.runtime.as_str()), (7, "wasm"));
        let escaping = JobText { outputs: vec!["../x".into()], ..job.clone() };
        assert!(escaping.parse().expect_err("broken").to_string().starts_with("job: "));
        let program = PayloadText { root: "xy".into(), size: 1 };
        let unnamed = JobText { program, ..job };
        assert!(unnamed.parse().expect_err("broken").to_string().starts_with("job.program: "));
    }
}
