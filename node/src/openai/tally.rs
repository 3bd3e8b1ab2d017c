//! What an answer carried, counted from outside, and what can therefore be believed of its usage.
//!
//! A server says itself how many tokens it read and made, and is paid by that. Nobody outside can
//! count them exactly without its tokenizer, but everybody can see how much there could be: **a
//! token is at least one byte of text.** Text is what the answer says, refusals, reasoning and the
//! names and arguments of tool calls included. To that comes a little for tokens that have no text
//! (ends of turns, marks around tool calls), and never more than the request allowed. What a server
//! reports beyond that is cut down to it, and said so. What it reports within is not proved.
//!
//! For a prompt it is the same with the bytes of the request, and a little for the chat template,
//! and for each picture or sound, of which a short address may name a large one.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::fault::Fault;
use super::json::{self, Object};
use super::{Counted, Endpoint};

/// Tokens without text in each answer.
const PER_ANSWER: u64 = 64;
/// Tokens without text around each tool call.
const PER_CALL: u64 = 32;
/// What a chat template adds to a prompt, at most, in tokens.
const TEMPLATE: u64 = 1_024;
/// What it adds to each message.
const PER_MESSAGE: u64 = 16;
/// What a picture, sound, film or file is at most, in tokens.
const PER_MEDIUM: u64 = 32_768;

/// How many tokens a request can come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Of the prompt.
    pub prompt: u64,
    /// Of what is produced, where the request bounds it.
    pub completion: Option<u64>,
    /// How many answers it asks for.
    pub answers: u64,
    /// How many texts it brings that have the model's context each.
    pub texts: u64,
    /// How many pictures, sounds, films and files.
    pub media: u64,
}

impl Bounds {
    /// Reads them from a request as it goes to an engine. What is malformed there bounds nothing;
    /// the engine will refuse it.
    #[must_use]
    pub fn of(endpoint: Endpoint, body: &[u8]) -> Self {
        let text = std::str::from_utf8(body).unwrap_or_default();
        let fields = Object::read(text).unwrap_or(Object { fields: Vec::new() });
        let number = |name| fields.get(name)?.get().parse::<u64>().ok();
        let count = |name, most| {
            let items = fields.get(name).map(|raw| json::items(raw.get(), most));
            items.map(|items| items.map_or(most, |items| items.len()) as u64)
        };
        let messages = count("messages", 16_384).or_else(|| count("input", 16_384)).unwrap_or(1);
        let prompts = match fields.get("prompt").map(|raw| json::items(raw.get(), 2_048)) {
            Some(Ok(items)) if items.first().is_some_and(|item| !is_number(item)) => items.len(),
            _ => 1,
        };
        // Only where there are few, as in a chat: each is an object of its own.
        let media = [
            "\"image_url\"",
            "\"input_image\"",
            "\"input_audio\"",
            "\"audio_url\"",
            "\"video_url\"",
            "\"file\"",
            "\"input_file\"",
        ];
        let media: usize = match endpoint {
            Endpoint::Chat | Endpoint::Responses => {
                media.iter().map(|word| text.matches(word).count()).sum()
            }
            _ => 0,
        };
        let answers = number("n").unwrap_or(1).saturating_mul(prompts as u64).max(1);
        let most = ["max_completion_tokens", "max_tokens", "max_output_tokens"];
        let most = most.into_iter().find_map(number);
        Self {
            prompt: (body.len() as u64)
                .saturating_add(TEMPLATE)
                .saturating_add(messages.saturating_mul(PER_MESSAGE))
                .saturating_add((media as u64).saturating_mul(PER_MEDIUM)),
            completion: if endpoint == Endpoint::Embeddings {
                Some(0)
            } else {
                most.map(|most| most.saturating_mul(answers))
            },
            answers,
            texts: if endpoint == Endpoint::Embeddings { messages } else { prompts as u64 }.max(1),
            media: media as u64,
        }
    }
}

fn is_number(raw: &RawValue) -> bool {
    raw.get().starts_with(|first: char| first == '-' || first.is_ascii_digit())
}

/// What was seen of an answer so far.
#[derive(Clone, Debug)]
pub struct Tally {
    endpoint: Endpoint,
    bounds: Bounds,
    text: u64,
    calls: u64,
    bearing: u64,
    finished: u64,
    usage: Option<Counted>,
}

/// What a piece of an answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Something was said in it.
    Text,
    /// Nothing was: a beginning, an end, the usage.
    Frame,
    /// The server says that it failed.
    Failed(Fault),
}

/// What is to be believed of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The tokens to be paid.
    pub counted: Counted,
    /// What the server reported, if it did.
    pub reported: Option<Counted>,
}

impl Settled {
    /// Whether the server reported more than can be.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.reported.is_some_and(|reported| reported != self.counted)
    }
}

impl Tally {
    /// For the answer to a request with these bounds.
    #[must_use]
    pub const fn new(endpoint: Endpoint, bounds: Bounds) -> Self {
        Self { endpoint, bounds, text: 0, calls: 0, bearing: 0, finished: 0, usage: None }
    }

    /// Looks at a piece: a chunk or a whole answer.
    ///
    /// # Errors
    /// When it is no JSON object, or one of another shape. 502
    pub fn see(&mut self, piece: &[u8]) -> Result<Seen, Fault> {
        let garbage =
            |_| Fault::bad_upstream("The serving node's engine sent something malformed.");
        // A string must be UTF-8, which reading from bytes would check bit by bit.
        let text = std::str::from_utf8(piece).map_err(|_| garbage(()))?;
        let said: Said<'_> = serde_json::from_str(text).map_err(|_| garbage(()))?;
        if let Some(error) = said.error {
            return Ok(Seen::Failed(failed(error)));
        }
        let before = self.text + self.calls;
        let choices = said.choices.unwrap_or_default();
        self.text = self.text.saturating_add(choices.text);
        self.calls = self.calls.saturating_add(choices.calls);
        self.finished = self.finished.saturating_add(choices.finished);
        if self.endpoint == Endpoint::Responses {
            if let Some(fault) = self.see_response(&said) {
                return Ok(Seen::Failed(fault));
            }
        } else if let Some(usage) = said.usage {
            self.usage = Some(usage.counted());
        }
        if self.text + self.calls == before {
            return Ok(Seen::Frame);
        }
        self.bearing += 1;
        Ok(Seen::Text)
    }

    /// The shapes of `/v1/responses`: an event, or the response itself.
    fn see_response(&mut self, said: &Said<'_>) -> Option<Fault> {
        let kind = said.kind.as_ref().map_or("", |Kind(kind)| kind.as_ref());
        if kind.ends_with(".delta") {
            self.text = self.text.saturating_add(said.delta.0);
        }
        if said.object.as_ref().is_some_and(|Kind(object)| object == "response") {
            self.text = self.text.saturating_add(said.output.0);
            self.usage = said.usage.as_ref().map(Usage::counted).or(self.usage);
            self.finished += 1;
        }
        match kind {
            "response.completed" | "response.incomplete" => self.finished += 1,
            // Neither of them stands at the top, where it was looked for.
            "response.failed" => {
                let error = said.response.as_ref().and_then(|response| response.error);
                return Some(error.map_or_else(|| Fault::from_json(502, b""), failed));
            }
            "error" => return Some(Fault::bad_upstream("The serving node's engine failed.")),
            _ => {}
        }
        let usage = said.response.as_ref().and_then(|response| response.usage.as_ref());
        self.usage = usage.map(Usage::counted).or(self.usage);
        None
    }

    /// Whether every answer that was asked for said why it ends.
    #[must_use]
    pub const fn is_finished(&self) -> bool {
        match self.endpoint {
            Endpoint::Responses => self.finished > 0,
            _ => self.finished >= self.bounds.answers,
        }
    }

    /// Pieces in which something was said: as many tokens, at least as most servers stream.
    #[must_use]
    pub const fn bearing(&self) -> u64 {
        self.bearing
    }

    /// Bytes of text seen.
    #[must_use]
    pub const fn text(&self) -> u64 {
        self.text
    }

    /// The most tokens that what was seen can be.
    #[must_use]
    pub fn bound(&self) -> u64 {
        if self.endpoint == Endpoint::Embeddings {
            return 0;
        }
        let bare = self.bounds.answers.saturating_mul(PER_ANSWER);
        let calls = self.calls.saturating_mul(PER_CALL);
        let seen = self.text.saturating_add(bare).saturating_add(calls);
        self.bounds.completion.map_or(seen, |most| most.min(seen))
    }

    /// What is to be paid. Where the server reported nothing, pieces with text count as one
    /// token each, and the prompt as none: what is not reported is not owed.
    #[must_use]
    pub fn settle(&self) -> Settled {
        let counted = match self.usage {
            Some(usage) => {
                let prompt = usage.prompt.min(self.bounds.prompt);
                Counted {
                    prompt,
                    cached: usage.cached.min(prompt),
                    completion: usage.completion.min(self.bound()),
                }
            }
            None => Counted { prompt: 0, cached: 0, completion: self.bearing.min(self.bound()) },
        };
        Settled { counted, reported: self.usage }
    }

    /// What is to be paid for an answer that was broken off. What was asked had to be read for the first
    /// word: where neither the server nor its engine (`known`, else zero) said how many tokens that
    /// was, it is what such prompts usually are.
    #[must_use]
    pub fn broken_off(&self, known: u64, usual: impl FnOnce() -> u64) -> Counted {
        let counted = self.settle().counted;
        let prompt = match counted.prompt.max(known) {
            0 if self.bearing > 0 => usual(),
            said => said,
        };
        Counted { prompt: prompt.min(self.bounds.prompt), ..counted }
    }
}

/// How many tokens a byte of prompt is, as it was seen of late: for prompts of which nobody says it.
#[derive(Debug, Default)]
pub struct Density(Mutex<Option<f64>>);

impl Density {
    /// Of how many prompts a new one counts as one.
    const PARTS: f64 = 16.0;

    /// A prompt of so many bytes had so many tokens. What has pictures or sounds in it says nothing.
    pub fn seen(&self, bytes: usize, bounds: &Bounds, tokens: u64) {
        if tokens == 0 || bytes == 0 || bounds.media > 0 {
            return;
        }
        // No text is thinner than that, and none denser.
        let density = (tokens as f64 / bytes as f64).clamp(1.0 / 16.0, 1.0);
        let mut mean = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *mean = Some(mean.map_or(density, |mean| mean + (density - mean) / Self::PARTS));
    }

    /// How many tokens a prompt of so many bytes has, about, and no more than the model's context for
    /// each of its answers: four bytes each where none was seen yet.
    #[must_use]
    pub fn tokens(&self, bytes: usize, bounds: &Bounds, context: u32) -> u64 {
        let density = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Neither is negative nor beyond what a u64 holds.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let about = (bytes as f64 * density.unwrap_or(0.25)) as u64;
        about.min(u64::from(context).saturating_mul(bounds.answers))
    }
}

/// Reads an `error` within an answer that began well.
fn failed(error: &RawValue) -> Fault {
    let body = format!("{{\"error\":{}}}", error.get());
    #[derive(serde::Deserialize)]
    struct Coded {
        code: Option<u16>,
    }
    // Some put the status that it would have had where OpenAI has a word.
    let coded = serde_json::from_str(error.get()).ok().and_then(|Coded { code }| code);
    Fault::from_json(coded.unwrap_or(502), body.as_bytes())
}

/// What is read of a piece. Nothing of it is kept, so nothing of it is built.
#[derive(serde::Deserialize)]
struct Said<'a> {
    choices: Option<Choices>,
    usage: Option<Usage>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow, rename = "type")]
    kind: Option<Kind<'a>>,
    #[serde(borrow)]
    object: Option<Kind<'a>>,
    #[serde(default)]
    delta: Text,
    #[serde(default)]
    output: Text,
    #[serde(borrow)]
    response: Option<Response<'a>>,
}

#[derive(serde::Deserialize)]
struct Response<'a> {
    usage: Option<Usage>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(serde::Deserialize)]
struct Kind<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Clone, Copy, Debug, Default, serde::Deserialize)]
struct Usage {
    #[serde(default, alias = "input_tokens")]
    prompt_tokens: Number,
    #[serde(default, alias = "output_tokens")]
    completion_tokens: Number,
    #[serde(alias = "input_tokens_details")]
    prompt_tokens_details: Option<Details>,
}

#[derive(Clone, Copy, Debug, Default, serde::Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: Number,
}

impl Usage {
    fn counted(&self) -> Counted {
        Counted {
            prompt: self.prompt_tokens.0,
            cached: self.prompt_tokens_details.unwrap_or_default().cached_tokens.0,
            completion: self.completion_tokens.0,
        }
    }
}

/// Reads the tokens of a `usage` object.
pub(super) fn counted(usage: &str) -> Option<Counted> {
    serde_json::from_str::<Usage>(usage).ok().as_ref().map(Usage::counted)
}

/// All choices of a piece together.
#[derive(Clone, Copy, Debug, Default)]
struct Choices {
    text: u64,
    calls: u64,
    finished: u64,
}

#[derive(serde::Deserialize)]
struct Choice {
    #[serde(alias = "message")]
    delta: Option<Delta>,
    #[serde(default)]
    text: Text,
    #[serde(default)]
    finish_reason: Text,
}

#[derive(Clone, Copy, Default, serde::Deserialize)]
struct Delta {
    #[serde(default)]
    content: Text,
    #[serde(default)]
    refusal: Text,
    #[serde(default)]
    reasoning_content: Text,
    #[serde(default)]
    reasoning: Text,
    #[serde(default)]
    tool_calls: Calls,
    #[serde(default)]
    function_call: Function,
}

/// The tool calls of a choice together.
#[derive(Clone, Copy, Default)]
struct Calls {
    count: u64,
    text: u64,
}

#[derive(serde::Deserialize)]
struct Call {
    #[serde(default)]
    function: Function,
}

/// The name and the arguments of a function: the bytes of all text in it.
type Function = Text;

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sum;
        impl<'de> Visitor<'de> for Sum {
            type Value = Choices;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of choices")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Choices, A::Error> {
                let mut sum = Choices::default();
                while let Some(choice) = seq.next_element::<Choice>()? {
                    let delta = choice.delta.unwrap_or_default();
                    // `reasoning` is the newer name of the same text; some servers send both.
                    let reasoning = delta.reasoning.0.max(delta.reasoning_content.0);
                    let said = choice.text.0 + delta.content.0 + delta.refusal.0 + reasoning;
                    sum.text += said + delta.tool_calls.text + delta.function_call.0;
                    sum.calls += delta.tool_calls.count;
                    sum.finished += u64::from(choice.finish_reason.0 > 0);
                }
                Ok(sum)
            }
        }
        deserializer.deserialize_seq(Sum)
    }
}

impl<'de> Deserialize<'de> for Calls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sum;
        impl<'de> Visitor<'de> for Sum {
            type Value = Calls;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of tool calls or null")
            }

            fn visit_unit<E>(self) -> Result<Calls, E> {
                Ok(Calls::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Calls, A::Error> {
                let mut sum = Calls::default();
                while let Some(call) = seq.next_element::<Call>()? {
                    sum.count += 1;
                    sum.text += call.function.0;
                }
                Ok(sum)
            }
        }
        deserializer.deserialize_any(Sum)
    }
}

/// The bytes of all strings in a value, names of fields left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Text(u64);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sum;
        impl<'de> Visitor<'de> for Sum {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.len() as u64))
            }

            fn visit_unit<E>(self) -> Result<Text, E> {
                Ok(Text(0))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Text, E> {
                Ok(Text(0))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Text, E> {
                Ok(Text(0))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Text, E> {
                Ok(Text(0))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Text, E> {
                Ok(Text(0))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Text, A::Error> {
                let mut sum = 0;
                while let Some(Text(bytes)) = seq.next_element()? {
                    sum += bytes;
                }
                Ok(Text(sum))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
                let mut sum = 0;
                while let Some((IgnoredAny, Text(bytes))) = map.next_entry()? {
                    sum += bytes;
                }
                Ok(Text(sum))
            }
        }
        deserializer.deserialize_any(Sum)
    }
}

/// A count; what is none (null, below zero, a fraction) is nothing.
#[derive(Clone, Copy, Debug, Default)]
struct Number(u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Count;
        impl<'de> Visitor<'de> for Count {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_unit<E>(self) -> Result<Number, E> {
                Ok(Number(0))
            }

            fn visit_u64<E>(self, count: u64) -> Result<Number, E> {
                Ok(Number(count))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Number, E> {
                Ok(Number(0))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Number, E> {
                Ok(Number(0))
            }
        }
        deserializer.deserialize_any(Count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: &str) -> Tally {
        Tally::new(Endpoint::Chat, Bounds::of(Endpoint::Chat, body.as_bytes()))
    }

    #[test]
    fn requests_bound_their_tokens() {
        for (endpoint, body, prompt, completion, answers) in [
            (Endpoint::Chat, r#"{"messages":[{},{}],"n":3,"max_tokens":10}"#, 32, Some(30), 3),
            (Endpoint::Completions, r#"{"prompt":["a","b"],"max_tokens":5}"#, 16, Some(10), 2),
            (Endpoint::Completions, r#"{"prompt":[1,2]}"#, 16, None, 1),
            (Endpoint::Embeddings, r#"{"input":"a"}"#, 262_144, Some(0), 1),
            (Endpoint::Chat, r#"{"messages":[{"image_url":1}]}"#, 16 + PER_MEDIUM, None, 1),
            (Endpoint::Chat, "nonsense", 16, None, 1),
        ] {
            let bounds = Bounds::of(endpoint, body.as_bytes());
            assert!(bounds.prompt <= body.len() as u64 + TEMPLATE + prompt, "{body}");
            assert_eq!(bounds.completion, completion, "{body}");
            assert_eq!(bounds.answers, answers, "{body}");
        }
    }

    #[test]
    fn every_sort_of_text_is_seen() {
        for (piece, text, seen) in [
            (r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, 0, Seen::Frame),
            (r#"{"choices":[{"delta":{"content":"h\u00e9"}}]}"#, 3, Seen::Text),
            (
                r#"{"choices":[{"delta":{"reasoning_content":"abc","reasoning":"abc"}}]}"#,
                3,
                Seen::Text,
            ),
            (
                r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"x","function":{"name":"f","arguments":"{}"}}]}}]}"#,
                3,
                Seen::Text,
            ),
            (
                r#"{"choices":[{"message":{"content":[{"type":"text","text":"abc"}]}}]}"#,
                7,
                Seen::Text,
            ),
            (r#"{"choices":[{"text":"abc","index":0,"logprobs":null}]}"#, 3, Seen::Text),
            (
                r#"{"choices":[{"delta":{"content":null,"tool_calls":null}}],"usage":null}"#,
                0,
                Seen::Frame,
            ),
            (r#"{"choices":[],"usage":{"prompt_tokens":1}}"#, 0, Seen::Frame),
            ("{}", 0, Seen::Frame),
        ] {
            let mut tally = chat("{}");
            assert_eq!(tally.see(piece.as_bytes()), Ok(seen), "{piece}");
            assert_eq!(tally.text(), text, "{piece}");
        }
    }

    #[test]
    fn failures_and_garbage_are_told_apart() {
        let mut tally = chat("{}");
        for (piece, status) in [
            (r#"{"error":{"message":"m","code":429}}"#, 429),
            (r#"{"error":{"message":"m","code":"c"}}"#, 502),
            (r#"{"error":"m"}"#, 502),
        ] {
            let Ok(Seen::Failed(fault)) = tally.see(piece.as_bytes()) else { panic!("{piece}") };
            assert_eq!((fault.status, fault.message.as_str()), (status, "m"), "{piece}");
        }
        let deep = format!("{{\"choices\":[{{\"text\":{}}}]}}", "[".repeat(10_000));
        for piece in ["", "[]", "1", "{", "{\"choices\":{}}", "{\"choices\":[1]}", "\u{1}", &deep] {
            assert_eq!(tally.see(piece.as_bytes()).unwrap_err().status, 502, "{piece}");
        }
        assert_eq!(tally.see(b"{\"a\":\"\xff\"}").unwrap_err().status, 502);
    }

    #[test]
    fn usage_is_believed_as_far_as_it_can_be() {
        let usage = |prompt: i64, cached: i64, completion: i64| {
            format!(
                r#"{{"choices":[],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion},
                "prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}"#
            )
        };
        let text = r#"{"choices":[{"delta":{"content":"0123456789"},"finish_reason":"stop"}]}"#;
        let body = r#"{"messages":[{}]}"#;
        let most = body.len() as u64 + TEMPLATE + PER_MESSAGE;
        for (said, counted, cut) in [
            ((7, 3, 5), (7, 3, 5), false),
            ((7, 9, 10 + 64), (7, 7, 10 + 64), true),
            ((7, 0, 1_000_000), (7, 0, 10 + 64), true),
            ((1 << 60, 0, 1), (most, 0, 1), true),
            ((-1, -1, -1), (0, 0, 0), false),
        ] {
            let mut tally = chat(body);
            tally.see(text.as_bytes()).unwrap();
            tally.see(usage(said.0, said.1, said.2).as_bytes()).unwrap();
            assert!(tally.is_finished());
            let settled = tally.settle();
            let expected = Counted { prompt: counted.0, cached: counted.1, completion: counted.2 };
            assert_eq!((settled.counted, settled.is_cut()), (expected, cut), "{said:?}");
        }
        let mut tally = chat(r#"{"max_tokens":4}"#);
        tally.see(text.as_bytes()).unwrap();
        assert_eq!(tally.settle().counted.completion, 1, "a piece with text, none reported");
        tally.see(usage(1, 0, 9).as_bytes()).unwrap();
        assert_eq!(tally.settle().counted.completion, 4);
        let mut tally = Tally::new(Endpoint::Embeddings, Bounds::of(Endpoint::Embeddings, b"{}"));
        tally.see(br#"{"data":[],"usage":{"prompt_tokens":2,"completion_tokens":9}}"#).unwrap();
        assert_eq!(tally.settle().counted, Counted { prompt: 2, cached: 0, completion: 0 });
    }

    #[test]
    fn responses_have_their_own_shapes() {
        let new = || Tally::new(Endpoint::Responses, Bounds::of(Endpoint::Responses, b"{}"));
        let mut tally = new();
        let delta = br#"{"type":"response.output_text.delta","delta":"abc","item_id":"x"}"#;
        assert_eq!(tally.see(delta), Ok(Seen::Text));
        let done = br#"{"type":"response.output_text.done","text":"abc"}"#;
        assert_eq!(tally.see(done), Ok(Seen::Frame));
        assert!(!tally.is_finished());
        let end = br#"{"type":"response.completed","response":{"object":"response","error":null,
            "usage":{"input_tokens":4,"output_tokens":2,"input_tokens_details":{"cached_tokens":1}}}}"#;
        assert_eq!(tally.see(end), Ok(Seen::Frame));
        assert!(tally.is_finished());
        assert_eq!(tally.settle().counted, Counted { prompt: 4, cached: 1, completion: 2 });
        let failed = br#"{"type":"response.failed","response":{"error":{"message":"m"}}}"#;
        assert!(matches!(new().see(failed), Ok(Seen::Failed(fault)) if fault.message == "m"));
        let mut tally = new();
        let whole = br#"{"object":"response","error":null,"output":[{"content":[{"text":"abc"}]}],
            "usage":{"input_tokens":4,"output_tokens":2}}"#;
        assert_eq!(tally.see(whole), Ok(Seen::Text));
        assert_eq!(tally.settle().counted.completion, 2);
    }
}
