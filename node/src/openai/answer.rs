//! Answers in OpenAI's shapes, as an engine of our own builds them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Serialize, Serializer};

use super::Counted;
use super::request::Encoding;

/// Why an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model was done, or came to a text that ends it.
    Stop,
    /// It came to the most tokens it may have.
    Length,
    /// It calls tools.
    ToolCalls,
    /// Something was left out.
    ContentFilter,
}

/// What stands above every answer.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `chatcmpl-…` or `cmpl-…`
    pub id: &'a str,
    /// When it was asked, in seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: &'a str,
    /// What model and engine these are, exactly: answers with the same seed are the same only
    /// while this is.
    pub fingerprint: Option<&'a str>,
}

/// A token and how probable it was.
#[derive(Clone, Debug)]
pub struct Likely {
    /// Its bytes, which alone need not be UTF-8.
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

/// A token that was chosen, and the likeliest in its place.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The one that was chosen.
    pub token: Likely,
    /// The likeliest, in order.
    pub top: Vec<Likely>,
}

/// One of the answers to a chat.
#[derive(Clone, Copy, Debug)]
pub struct ChatChoice<'a> {
    /// What was said.
    pub content: &'a str,
    /// Its tokens, if they were asked for.
    pub logprobs: Option<&'a [Chosen]>,
    /// Why it ends.
    pub finish: Finish,
}

/// One of the answers to a prompt.
#[derive(Clone, Copy, Debug)]
pub struct TextChoice<'a> {
    /// The text.
    pub text: &'a str,
    /// Its tokens, if they were asked for.
    pub logprobs: Option<&'a [Chosen]>,
    /// Where the first of these tokens stands in the whole answer, in characters.
    pub offset: usize,
    /// Why it ends; None in a chunk after which more comes.
    pub finish: Option<Finish>,
}

/// A whole chat answer.
#[must_use]
pub fn chat(head: Head<'_>, choices: &[ChatChoice<'_>], counted: Counted) -> Bytes {
    #[derive(Serialize)]
    struct Message<'a> {
        role: &'static str,
        content: &'a str,
        refusal: Option<()>,
    }
    #[derive(Serialize)]
    struct Choice<'a> {
        index: usize,
        message: Message<'a>,
        logprobs: Option<ChatLogprobs<'a>>,
        finish_reason: Finish,
    }
    let choices = choices.iter().enumerate().map(|(index, choice)| Choice {
        index,
        message: Message { role: "assistant", content: choice.content, refusal: None },
        logprobs: choice.logprobs.map(ChatLogprobs::new),
        finish_reason: choice.finish,
    });
    write(&Answer::new("chat.completion", head, choices.collect(), Some(Some(counted))))
}

/// A chunk of a chat answer. `usage_follows` says that the client asked for a chunk with the usage,
/// for which all others say that they have none.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Above it.
    pub head: Head<'a>,
    /// Which of several answers.
    pub index: u32,
    /// Whether the client asked for the usage.
    pub usage_follows: bool,
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl Chunk<'_> {
    /// The first: who speaks.
    #[must_use]
    pub fn begin(self) -> Bytes {
        self.with(Delta { role: Some("assistant"), content: Some("") }, None, None)
    }

    /// Text, with its tokens if they were asked for.
    #[must_use]
    pub fn text(self, content: &str, logprobs: Option<&[Chosen]>) -> Bytes {
        self.with(Delta { role: None, content: Some(content) }, logprobs, None)
    }

    /// The last of this answer: why it ends.
    #[must_use]
    pub fn end(self, finish: Finish) -> Bytes {
        self.with(Delta { role: None, content: None }, None, Some(finish))
    }

    fn with(self, delta: Delta<'_>, logprobs: Option<&[Chosen]>, finish: Option<Finish>) -> Bytes {
        #[derive(Serialize)]
        struct Choice<'a> {
            index: u32,
            delta: Delta<'a>,
            logprobs: Option<ChatLogprobs<'a>>,
            finish_reason: Option<Finish>,
        }
        let choice = Choice {
            index: self.index,
            delta,
            logprobs: logprobs.map(ChatLogprobs::new),
            finish_reason: finish,
        };
        let usage = self.usage_follows.then_some(None);
        write(&Answer::new("chat.completion.chunk", self.head, vec![choice], usage))
    }
}

/// The chunk with the usage of a chat, after all others.
#[must_use]
pub fn chat_usage(head: Head<'_>, counted: Counted) -> Bytes {
    let usage = Some(Some(counted));
    write(&Answer::<()>::new("chat.completion.chunk", head, Vec::new(), usage))
}

/// A whole answer to prompts.
#[must_use]
pub fn text(head: Head<'_>, choices: &[TextChoice<'_>], counted: Counted) -> Bytes {
    let choices = choices.iter().enumerate();
    let choices = choices.map(|(index, choice)| LegacyChoice::new(index as u32, choice));
    write(&Answer::new("text_completion", head, choices.collect(), Some(Some(counted))))
}

/// A chunk of an answer to a prompt; the last of each answer says why it ends.
#[must_use]
pub fn text_chunk(
    head: Head<'_>,
    index: u32,
    choice: &TextChoice<'_>,
    usage_follows: bool,
) -> Bytes {
    let choices = vec![LegacyChoice::new(index, choice)];
    write(&Answer::new("text_completion", head, choices, usage_follows.then_some(None)))
}

/// The chunk with the usage of a completion, after all others.
#[must_use]
pub fn text_usage(head: Head<'_>, counted: Counted) -> Bytes {
    write(&Answer::<()>::new("text_completion", head, Vec::new(), Some(Some(counted))))
}

/// Embeddings, one for each text, in the order in which these were given.
#[must_use]
pub fn embeddings(model: &str, vectors: &[Vec<f32>], encoding: Encoding, prompt: u64) -> Bytes {
    #[derive(Serialize)]
    struct List<'a> {
        object: &'static str,
        data: Vec<Item<'a>>,
        model: &'a str,
        usage: Usage,
    }
    #[derive(Serialize)]
    struct Item<'a> {
        object: &'static str,
        index: usize,
        embedding: Vector<'a>,
    }
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Vector<'a> {
        Float(&'a [f32]),
        Base64(String),
    }
    #[derive(Serialize)]
    struct Usage {
        prompt_tokens: u64,
        total_tokens: u64,
    }
    let data = vectors.iter().enumerate().map(|(index, vector)| Item {
        object: "embedding",
        index,
        embedding: match encoding {
            Encoding::Float => Vector::Float(vector),
            Encoding::Base64 => Vector::Base64(base64_of(vector)),
        },
    });
    let usage = Usage { prompt_tokens: prompt, total_tokens: prompt };
    write(&List { object: "list", data: data.collect(), model, usage })
}

/// A vector as base64 of little-endian floats.
#[must_use]
pub fn base64_of(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

#[derive(Serialize)]
struct Answer<'a, T> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'a str>,
    choices: Vec<T>,
    /// The inner None is null.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: Details,
}

#[derive(Serialize)]
struct Details {
    cached_tokens: u64,
}

impl<'a, T> Answer<'a, T> {
    fn new(
        object: &'static str,
        head: Head<'a>,
        choices: Vec<T>,
        usage: Option<Option<Counted>>,
    ) -> Self {
        let usage = usage.map(|counted| {
            counted.map(|counted| Usage {
                prompt_tokens: counted.prompt,
                completion_tokens: counted.completion,
                total_tokens: counted.total(),
                prompt_tokens_details: Details { cached_tokens: counted.cached },
            })
        });
        let Head { id, created, model, fingerprint } = head;
        Self { id, object, created, model, system_fingerprint: fingerprint, choices, usage }
    }
}

/// The probabilities of a chat's tokens.
#[derive(Serialize)]
struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatToken<'a> {
    #[serde(flatten)]
    token: ChatLikely<'a>,
    top_logprobs: Vec<ChatLikely<'a>>,
}

struct ChatLikely<'a>(&'a Likely);

impl<'a> ChatLogprobs<'a> {
    fn new(tokens: &'a [Chosen]) -> Self {
        let content = tokens.iter().map(|chosen| ChatToken {
            token: ChatLikely(&chosen.token),
            top_logprobs: chosen.top.iter().map(ChatLikely).collect(),
        });
        Self { content: content.collect(), refusal: None }
    }
}

impl Serialize for ChatLikely<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;
        let mut out = serializer.serialize_struct("Token", 3)?;
        out.serialize_field("token", &String::from_utf8_lossy(&self.0.bytes))?;
        out.serialize_field("logprob", &finite(self.0.logprob))?;
        out.serialize_field("bytes", &self.0.bytes)?;
        out.end()
    }
}

#[derive(Serialize)]
struct LegacyChoice<'a> {
    text: &'a str,
    index: u32,
    logprobs: Option<LegacyLogprobs>,
    finish_reason: Option<Finish>,
}

/// The probabilities of a completion's tokens, as lists of the same length.
#[derive(Default, Serialize)]
struct LegacyLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Tops>,
    text_offset: Vec<usize>,
}

/// An object of tokens and their probabilities, the likeliest first.
struct Tops(Vec<(String, f32)>);

impl Serialize for Tops {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl<'a> LegacyChoice<'a> {
    fn new(index: u32, choice: &TextChoice<'a>) -> Self {
        let logprobs = choice.logprobs.map(|tokens| {
            let mut lists = LegacyLogprobs::default();
            let mut offset = choice.offset;
            for Chosen { token, top } in tokens {
                let text = legacy(&token.bytes);
                lists.text_offset.push(offset);
                offset += String::from_utf8_lossy(&token.bytes).chars().count();
                lists.token_logprobs.push(finite(token.logprob));
                let mut tops: Vec<(String, f32)> = Vec::with_capacity(top.len());
                for likely in top {
                    let name = legacy(&likely.bytes);
                    // An object has each name once: the likelier stays.
                    if tops.iter().all(|(known, _)| *known != name) {
                        tops.push((name, finite(likely.logprob)));
                    }
                }
                lists.top_logprobs.push(Tops(tops));
                lists.tokens.push(text);
            }
            lists
        });
        Self { text: choice.text, index, logprobs, finish_reason: choice.finish }
    }
}

/// A token by name: its text, or its bytes where these alone are none, as OpenAI writes them.
fn legacy(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{hex}")
        }
    }
}

/// JSON has no infinity; OpenAI writes this for what is all but impossible.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9_999.0 }
}

fn write(value: &impl Serialize) -> Bytes {
    // Nothing in these shapes can fail to be written: no maps but by strings, no readers.
    serde_json::to_vec(value).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const HEAD: Head<'static> =
        Head { id: "chatcmpl-1", created: 1_764_367_918, model: "m", fingerprint: Some("fp_1") };
    const COUNTED: Counted = Counted { prompt: 3, cached: 1, completion: 2 };

    fn value(bytes: &Bytes) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    fn tokens() -> Vec<Chosen> {
        let likely = |bytes: &[u8], logprob| Likely { bytes: bytes.to_vec(), logprob };
        vec![
            Chosen {
                token: likely("é".as_bytes(), -0.5),
                top: vec![likely("é".as_bytes(), -0.5), likely(b"\xc3", f32::NEG_INFINITY)],
            },
            Chosen { token: likely(b"!", -1.0), top: vec![] },
        ]
    }

    fn usage() -> Value {
        json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1}})
    }

    #[test]
    fn a_chat_has_openais_shape() {
        let choice = ChatChoice { content: "hi", logprobs: None, finish: Finish::Stop };
        assert_eq!(
            value(&chat(HEAD, &[choice], COUNTED)),
            json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 1_764_367_918,
                "model": "m", "system_fingerprint": "fp_1",
                "choices": [{"index": 0,
                    "message": {"role": "assistant", "content": "hi", "refusal": null},
                    "logprobs": null, "finish_reason": "stop"}],
                "usage": usage()})
        );
        let tokens = tokens();
        let choice = ChatChoice { logprobs: Some(&tokens), ..choice };
        assert_eq!(
            value(&chat(HEAD, &[choice], COUNTED))["choices"][0]["logprobs"],
            json!({"refusal": null, "content": [
                {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                    {"token": "\u{fffd}", "logprob": -9999.0, "bytes": [195]}]},
                {"token": "!", "logprob": -1.0, "bytes": [33], "top_logprobs": []}]})
        );
    }

    #[test]
    fn chunks_have_openais_shape() {
        let chunk = Chunk { head: HEAD, index: 0, usage_follows: false };
        let begin = value(&chunk.begin());
        assert_eq!(begin["object"], "chat.completion.chunk");
        assert_eq!(begin["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(begin["choices"][0]["finish_reason"], Value::Null);
        assert!(begin.get("usage").is_none());
        let text = value(&Chunk { usage_follows: true, ..chunk }.text("x", Some(&tokens())));
        assert_eq!(text["choices"][0]["delta"], json!({"content": "x"}));
        assert_eq!(text["choices"][0]["logprobs"]["content"][1]["token"], "!");
        assert_eq!(text.get("usage"), Some(&Value::Null));
        let end = value(&chunk.end(Finish::Length));
        assert_eq!(end["choices"][0]["delta"], json!({}));
        assert_eq!(end["choices"][0]["finish_reason"], "length");
        let last = value(&chat_usage(HEAD, COUNTED));
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage()));
    }

    #[test]
    fn completions_have_openais_shape() {
        let tokens = tokens();
        let choice = TextChoice {
            text: "é!",
            logprobs: Some(&tokens),
            offset: 4,
            finish: Some(Finish::Stop),
        };
        let whole = value(&text(HEAD, &[choice, choice], COUNTED));
        assert_eq!(whole["object"], "text_completion");
        assert_eq!(
            whole["choices"][1],
            json!({"text": "é!", "index": 1, "finish_reason": "stop", "logprobs": {
                "tokens": ["é", "!"], "token_logprobs": [-0.5, -1.0], "text_offset": [4, 5],
                "top_logprobs": [{"é": -0.5, "bytes:\\xc3": -9999.0}, {}]}})
        );
        let piece = TextChoice { text: "a", logprobs: None, offset: 0, finish: None };
        let piece = value(&text_chunk(HEAD, 3, &piece, true));
        assert_eq!(
            piece["choices"],
            json!([{"text": "a", "index": 3, "logprobs": null, "finish_reason": null}])
        );
        assert_eq!(value(&text_usage(HEAD, COUNTED))["usage"], usage());
    }

    #[test]
    fn embeddings_are_numbers_or_base64() {
        let vectors = [vec![1.0, -0.5], vec![0.0, 2.0]];
        let list = value(&embeddings("m", &vectors, Encoding::Float, 4));
        assert_eq!(
            list,
            json!({"object": "list", "model": "m",
                "usage": {"prompt_tokens": 4, "total_tokens": 4},
                "data": [
                    {"object": "embedding", "index": 0, "embedding": [1.0, -0.5]},
                    {"object": "embedding", "index": 1, "embedding": [0.0, 2.0]}]})
        );
        let list = value(&embeddings("m", &vectors, Encoding::Base64, 4));
        assert_eq!(list["data"][0]["embedding"], "AACAPwAAAL8=");
    }
}
