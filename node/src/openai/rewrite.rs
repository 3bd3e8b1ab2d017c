//! What an entry node changes in an answer on its way to the client.
//!
//! The id and the model become the entry node's own, the usage becomes what is billed with its cost,
//! and the serving node is named. Everything else, whatever it may be, goes on byte for byte.

use bytes::Bytes;
use leasehold_proto::words::contract::Class;

use super::fault::Fault;
use super::json::{Object, push_field, push_key, push_string};
use super::{Counted, Endpoint, decimal, tally};

/// The longest chunk of a stream, in bytes.
pub const CHUNK: usize = 1 << 20;
/// The longest whole answer, in bytes.
pub const WHOLE: usize = 64 << 20;

/// What is billed for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bill<'a> {
    /// The tokens that are billed.
    pub counted: Counted,
    /// What they cost, in billionths of the currency.
    pub cost: u64,
    /// The currency.
    pub currency: &'a str,
}

/// Changes the pieces of one answer.
#[derive(Clone, Debug)]
pub struct Rewriter {
    endpoint: Endpoint,
    stream: bool,
    include_usage: bool,
    /// These three as JSON.
    id: Vec<u8>,
    model: Vec<u8>,
    provider: Vec<u8>,
    /// Whether it was asked in slack.
    slack: bool,
}

impl Rewriter {
    /// For the answer to a request: `id` and `model` in the entry node's own terms, `provider`
    /// the name of the serving node. `include_usage` is what the client asked for, and matters
    /// only to a stream.
    #[must_use]
    pub fn new(
        endpoint: Endpoint,
        stream: bool,
        include_usage: bool,
        id: &str,
        model: &str,
        provider: &str,
    ) -> Self {
        let json = |text| {
            let mut out = Vec::new();
            push_string(&mut out, text);
            out
        };
        let (id, model, provider) = (json(id), json(model), json(provider));
        Self { endpoint, stream, include_usage, id, model, provider, slack: false }
    }

    /// The same, of an answer in this class: in slack it says OpenAI's `flex` for it.
    #[must_use]
    pub fn of(self, class: Class) -> Self {
        Self { slack: class == Class::Slack, ..self }
    }

    /// Changes a piece: a chunk, or the whole answer. None when the client is not to see it,
    /// which is so for the chunk with the usage if it was not asked for. `bill` is told what the
    /// piece says was used, and says what is billed; it is asked only where usage stands.
    ///
    /// # Errors
    /// 502 when the piece is no JSON object or too long.
    pub fn rewrite<'b>(
        &self,
        piece: &[u8],
        mut bill: impl FnMut(Counted) -> Bill<'b>,
    ) -> Result<Option<Bytes>, Fault> {
        let most = if self.stream { CHUNK } else { WHOLE };
        if piece.len() > most {
            let why = format!("The serving node sent a piece of more than {most} bytes.");
            return Err(Fault::bad_upstream(why));
        }
        let garbage = || Fault::bad_upstream("The serving node sent something malformed.");
        let text = std::str::from_utf8(piece).map_err(|_| garbage())?;
        let object = Object::read(text).map_err(|_| garbage())?;
        let mut out = Vec::with_capacity(piece.len() + self.id.len() + self.model.len() + 128);
        Ok(self.object(&object, false, &mut bill, &mut out).then(|| out.into()))
    }

    /// Whether the client is to see it. What stands `within` an event goes no deeper.
    fn object<'b>(
        &self,
        object: &Object<'_>,
        within: bool,
        bill: &mut dyn FnMut(Counted) -> Bill<'b>,
        out: &mut Vec<u8>,
    ) -> bool {
        let chunks = matches!(self.endpoint, Endpoint::Chat | Endpoint::Completions);
        let drop_usage = chunks && self.stream && !self.include_usage;
        let usage_is = |raw: &str| raw.starts_with('{');
        if drop_usage
            && object.get("usage").is_some_and(|raw| usage_is(raw.get()))
            && object.get("choices").is_some_and(|raw| is_empty(raw.get()))
        {
            return false;
        }
        out.push(b'{');
        if chunks && object.get("id").is_none() {
            push_field(out, "id", &self.id);
        }
        for (key, raw) in &object.fields {
            let raw = raw.get();
            match key.as_ref() {
                "id" if chunks => push_field(out, key, &self.id),
                "model" => push_field(out, key, &self.model),
                "provider" => {}
                "service_tier" if self.slack => {}
                "usage" if drop_usage => {}
                "usage" if usage_is(raw) => {
                    push_key(out, key);
                    usage(raw, bill, out);
                }
                // Events of `/v1/responses` carry the response within.
                "response" if self.endpoint == Endpoint::Responses && !within => {
                    push_key(out, key);
                    match Object::read(raw) {
                        Ok(inner) => drop(self.object(&inner, true, bill, out)),
                        Err(_) => out.extend_from_slice(raw.as_bytes()),
                    }
                }
                _ => push_field(out, key, raw.as_bytes()),
            }
        }
        if !within {
            push_field(out, "provider", &self.provider);
        }
        // Events of `/v1/responses` have none; the response within them has.
        let has_tier = match self.endpoint {
            Endpoint::Chat => true,
            Endpoint::Responses => within || !self.stream,
            Endpoint::Completions | Endpoint::Embeddings => false,
        };
        if self.slack && has_tier {
            push_field(out, "service_tier", b"\"flex\"");
        }
        out.push(b'}');
        true
    }
}

/// Whether an array has no items.
fn is_empty(array: &str) -> bool {
    array.strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with(']'))
}

/// Writes the usage as it is billed; what else stands in it goes on as it came.
fn usage<'b>(raw: &str, bill: &mut dyn FnMut(Counted) -> Bill<'b>, out: &mut Vec<u8>) {
    let reported = tally::counted(raw).unwrap_or_default();
    let Bill { counted, cost, currency } = bill(reported);
    out.push(b'{');
    let fields = Object::read(raw).map(|object| object.fields).unwrap_or_default();
    for (key, value) in fields {
        let value = value.get();
        let number = match key.as_ref() {
            "prompt_tokens" | "input_tokens" => counted.prompt,
            "completion_tokens" | "output_tokens" => counted.completion,
            "total_tokens" => counted.total(),
            "cost" | "cost_currency" => continue,
            "prompt_tokens_details" | "input_tokens_details"
                if counted.cached != reported.cached =>
            {
                let cached = counted.cached.to_string();
                push_field(out, &key, format!("{{\"cached_tokens\":{cached}}}").as_bytes());
                continue;
            }
            _ => {
                push_field(out, &key, value.as_bytes());
                continue;
            }
        };
        push_field(out, &key, number.to_string().as_bytes());
    }
    push_field(out, "cost", decimal::of_billionths(cost).to_string().as_bytes());
    push_key(out, "cost_currency");
    push_string(out, currency);
    out.push(b'}');
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::{Value, json};

    use super::*;
    use crate::openai::dice::Dice;

    const BILL: Bill<'static> = Bill {
        counted: Counted { prompt: 5, cached: 1, completion: 7 },
        cost: 1_250,
        currency: "EUR",
    };

    fn rewriter(endpoint: Endpoint, stream: bool, include_usage: bool) -> Rewriter {
        Rewriter::new(endpoint, stream, include_usage, "chatcmpl-1", "m", "no\"de")
    }

    fn value(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn a_chunk_becomes_ours_and_keeps_the_rest() {
        let piece = br#"{"id":"x","object":"chat.completion.chunk","created":1.0,"model":"/w/m",
            "choices":[ {"delta":{"content":"a\u00e9"}, "new":1e2} ],"x_new":{"a":[1]},"usage":null}"#;
        let out = rewriter(Endpoint::Chat, true, true).rewrite(piece, |_| BILL).unwrap().unwrap();
        let text = std::str::from_utf8(&out).unwrap();
        assert_eq!(
            text,
            r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1.0,"model":"m","choices":[ {"delta":{"content":"a\u00e9"}, "new":1e2} ],"x_new":{"a":[1]},"usage":null,"provider":"no\"de"}"#
        );
        let out = rewriter(Endpoint::Chat, true, false).rewrite(piece, |_| BILL).unwrap().unwrap();
        assert!(value(&out).get("usage").is_none());
    }

    #[test]
    fn usage_is_what_is_billed() {
        let piece = br#"{"choices":[],"usage":{"prompt_tokens":99,"completion_tokens":98,
            "total_tokens":197,"prompt_tokens_details":{"cached_tokens":50},"more":true,"cost":4}}"#;
        let mut told = None;
        let chat = rewriter(Endpoint::Chat, true, true);
        let out = chat.rewrite(piece, |counted| {
            told = Some(counted);
            BILL
        });
        assert_eq!(told, Some(Counted { prompt: 99, cached: 50, completion: 98 }));
        assert_eq!(
            value(&out.unwrap().unwrap())["usage"],
            json!({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 1}, "more": true,
                "cost": 0.00000125, "cost_currency": "EUR"})
        );
        // Not asked for: the chunk is left out, and usage elsewhere, too.
        let chat = rewriter(Endpoint::Chat, true, false);
        assert_eq!(chat.rewrite(piece, |_| BILL), Ok(None));
        let ends = br#"{"choices":[{"index":0}],"usage":{"prompt_tokens":1}}"#;
        assert!(value(&chat.rewrite(ends, |_| BILL).unwrap().unwrap()).get("usage").is_none());
        // A whole answer has it in any case.
        let whole = rewriter(Endpoint::Embeddings, false, false);
        let piece = br#"{"object":"list","data":[],"model":"x","usage":{"prompt_tokens":9,"total_tokens":9}}"#;
        let out = value(&whole.rewrite(piece, |_| BILL).unwrap().unwrap());
        assert_eq!(out["usage"]["cost"], json!(0.00000125));
        assert_eq!(out["model"], "m");
        assert!(out.get("id").is_none(), "embeddings have none");
    }

    #[test]
    fn responses_carry_the_response_within() {
        let piece = br#"{"type":"response.completed","response":{"id":"resp_1","model":"x",
            "usage":{"input_tokens":9,"output_tokens":9,"total_tokens":18}}}"#;
        let out = rewriter(Endpoint::Responses, true, false).rewrite(piece, |_| BILL);
        let out = value(&out.unwrap().unwrap());
        assert_eq!(out["response"]["id"], "resp_1");
        assert_eq!(out["response"]["model"], "m");
        assert_eq!(out["response"]["usage"]["output_tokens"], 7);
    }

    #[test]
    fn what_was_asked_in_slack_says_so() {
        let tier = |endpoint, stream, class, piece: &[u8]| {
            let rewriter = rewriter(endpoint, stream, false).of(class);
            value(&rewriter.rewrite(piece, |_| BILL).unwrap().unwrap())
        };
        let piece = br#"{"id":"x","service_tier":"default","choices":[1]}"#;
        for stream in [true, false] {
            assert_eq!(tier(Endpoint::Chat, stream, Class::Slack, piece)["service_tier"], "flex");
            let firm = tier(Endpoint::Chat, stream, Class::Firm, piece);
            assert_eq!(firm["service_tier"], "default", "as it came");
        }
        let event = br#"{"type":"response.created","response":{"service_tier":"auto"}}"#;
        let event = tier(Endpoint::Responses, true, Class::Slack, event);
        assert_eq!(event["response"]["service_tier"], "flex");
        assert!(event.get("service_tier").is_none());
        assert_eq!(tier(Endpoint::Responses, false, Class::Slack, piece)["service_tier"], "flex");
        let text = tier(Endpoint::Completions, false, Class::Slack, br#"{"choices":[]}"#);
        assert!(text.get("service_tier").is_none());
    }

    #[test]
    fn garbage_is_a_fault() {
        let chat = rewriter(Endpoint::Chat, true, true);
        for piece in ["", "[]", "{", "{\"a\":}", "null"] {
            assert_eq!(chat.rewrite(piece.as_bytes(), |_| BILL).unwrap_err().status, 502);
        }
        assert!(chat.rewrite(b"{\"a\":\"\xff\"}", |_| BILL).is_err());
        assert!(chat.rewrite(&vec![b' '; CHUNK + 1], |_| BILL).is_err());
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(50_000), "]".repeat(50_000));
        assert!(chat.rewrite(deep.as_bytes(), |_| BILL).is_ok(), "what is not read goes on");
    }

    /// Pieces damaged anywhere: each is counted and changed, or refused, and what is changed is
    /// JSON again and comes to the same.
    #[test]
    fn no_piece_does_harm() {
        let seeds = [
            (
                Endpoint::Chat,
                true,
                r#"{"id":"x","choices":[{"index":0,"delta":{"content":"a\u00e9","tool_calls":
                [{"function":{"arguments":"{}"}}]},"finish_reason":null}],"usage":{"prompt_tokens":
                1,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}},"error":null}"#,
            ),
            (
                Endpoint::Completions,
                false,
                r#"{"id":"x","choices":[{"text":"a","logprobs":{"a":[1]}}],
                "usage":{"prompt_tokens":1}}"#,
            ),
            (
                Endpoint::Responses,
                true,
                r#"{"type":"response.completed","response":{"usage":{"input_tokens":1},
                "error":null}}"#,
            ),
        ];
        let mut dice = Dice::new(7);
        for (endpoint, stream, seed) in seeds {
            let ours = rewriter(endpoint, stream, true);
            for _ in 0..4_000 {
                let mut piece = seed.as_bytes().to_vec();
                dice.damage(&mut piece);
                let bounds = tally::Bounds::of(endpoint, &piece);
                let mut counts = tally::Tally::new(endpoint, bounds);
                if let Err(fault) = counts.see(&piece) {
                    assert_eq!(fault.status, 502);
                }
                assert!(counts.settle().counted.completion <= counts.bound());
                drop(Fault::from_json(400, &piece));
                if let Ok(Some(out)) = ours.rewrite(&piece, |_| BILL) {
                    let again = ours.rewrite(&out, |_| BILL).unwrap().unwrap();
                    assert_eq!(again, out, "{}", String::from_utf8_lossy(&piece));
                }
            }
        }
    }

    #[test]
    #[ignore = "a measurement: cargo test --release -- --ignored --nocapture"]
    fn how_long_a_chunk_takes() {
        let piece = br#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1764367918,"model":"meta-llama/Llama-3.1-8B-Instruct","choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}],"usage":null}"#;
        let chat = rewriter(Endpoint::Chat, true, true);
        let mut tally = tally::Tally::new(Endpoint::Chat, tally::Bounds::of(Endpoint::Chat, b"{}"));
        let (rounds, start) = (100_000, Instant::now());
        for _ in 0..rounds {
            std::hint::black_box(chat.rewrite(std::hint::black_box(piece), |_| BILL).unwrap());
        }
        println!("rewrite: {:?} each", start.elapsed() / rounds);
        let start = Instant::now();
        for _ in 0..rounds {
            std::hint::black_box(tally.see(std::hint::black_box(piece)).unwrap());
        }
        println!("tally: {:?} each", start.elapsed() / rounds);
    }
}
