//! A request: the JSON as it came, and what it says.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use leasehold_proto::minds::route::Wanted;
use serde_json::value::RawValue;

use super::fault::{Fault, shown};
use super::json::{self, Object, push_field, push_key, push_string};
use super::message::{Message, Part, TOOLS};
use super::needs::{Need, Needs};
use super::prefix::Prefix;
use super::provider::{Provider, Sort};
use super::read::{Field, Path, Sort as Shape, each, repeated};
use super::sampling::{Pending, Sampling};
use super::{Endpoint, fields};

/// How many prompts, or texts to embed, one request may have.
pub const PROMPTS: usize = 2_048;
/// How many other models may be named to fall back on.
pub const FALLBACKS: usize = 16;
/// The longest name of a model, in bytes.
pub const MODEL: usize = 256;
/// The longest name of a person or of something to be remembered, in bytes.
const NAME: usize = 1_024;

/// A prompt, or a text to embed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As numbers of tokens.
    Tokens(Vec<u32>),
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A chat; at least one message.
    Messages(Vec<Message>),
    /// Prompts or texts to embed; at least one.
    Prompts(Vec<Prompt>),
    /// What `/v1/responses` takes, which only upstreams read.
    Opaque,
}

/// How embeddings are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// As numbers.
    #[default]
    Float,
    /// As base64 of little-endian floats of 32 bits.
    Base64,
}

/// A request.
#[derive(Clone)]
pub struct Request {
    /// What it was sent to.
    pub endpoint: Endpoint,
    /// The model's name, without a suffix that sorts.
    pub model: String,
    /// Other models to try when nobody can answer with the first, in this order, each as it was
    /// named; [`Sort::of_model`] takes a suffix off.
    pub models: Vec<String>,
    /// Whether the answer is to come in chunks.
    pub stream: bool,
    /// Whether the client wants a chunk with the usage; says nothing when `stream` is false.
    pub include_usage: bool,
    /// What is asked.
    pub input: Input,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// How embeddings are written.
    pub encoding: Encoding,
    /// The length of embeddings, if not the model's own.
    pub dimensions: Option<u32>,
    /// The person behind the request, as the client names them.
    pub user: Option<String>,
    /// Whether it can wait: `service_tier` is `flex` where it can.
    pub class: Wanted,
    /// Which serving nodes may answer. A suffix of the model's name is in `sort`.
    pub provider: Provider,
    needs: Needs,
    /// The JSON as it came, and where in it each field's value stands.
    body: Bytes,
    fields: Vec<(String, Range<usize>)>,
}

/// What is known while the fields are read.
#[derive(Debug)]
struct Draft {
    endpoint: Endpoint,
    model: Option<String>,
    sort: Option<Sort>,
    models: Vec<String>,
    stream: bool,
    /// Whether usage is wanted, where stream_options stand there.
    options: Option<bool>,
    input: Option<Input>,
    sampling: Sampling,
    pending: Pending,
    encoding: Encoding,
    dimensions: Option<u32>,
    user: Option<String>,
    class: Wanted,
    provider: Provider,
    needs: Needs,
}

impl Request {
    /// Reads the body of a request. How long it may be is the caller's to check; what is built
    /// from it is at most a few times its length; the bytes themselves are shared.
    ///
    /// # Errors
    /// 400, with the field that is to blame.
    pub fn parse(endpoint: Endpoint, body: &Bytes) -> Result<Self, Fault> {
        let text = std::str::from_utf8(body).map_err(|_| Fault::not_json("it is not UTF-8"))?;
        if json::is_deep(body) {
            let why = format!("arrays and objects stand more than {} deep", json::DEPTH);
            return Err(Fault::not_json(why));
        }
        let object = Object::read(text).map_err(Fault::not_json)?;
        if let Some(name) = object.repeated() {
            return Err(repeated(&Path::Key(&Path::Root, name)));
        }
        let unknown = object.fields.iter().find(|(key, _)| !fields::knows(endpoint, key));
        if let Some((name, _)) = unknown {
            return Err(Fault::unknown_parameter(name));
        }
        let mut draft = Draft::new(endpoint);
        let mut fields = Vec::with_capacity(object.fields.len());
        for (key, raw) in &object.fields {
            let field = Field::new(raw, Path::Key(&Path::Root, key));
            // SDKs write null for what was not said.
            if !field.is_null() {
                draft.take(key, &field)?;
            }
            let from = raw.get().as_ptr() as usize - text.as_ptr() as usize;
            fields.push((key.to_string(), from..from + raw.get().len()));
        }
        draft.finish(body.clone(), fields)
    }

    /// What it needs of a model beyond plain text.
    #[must_use]
    pub const fn needs(&self) -> Needs {
        self.needs
    }

    /// Refuses what `model`, which has `offered`, cannot do.
    ///
    /// # Errors
    /// 400 with the field that asks for it.
    pub fn check(&self, offered: Needs, model: &str) -> Result<(), Fault> {
        self.needs.check(offered, model)
    }

    /// The value of a field as it came.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        let (_, range) = self.fields.iter().find(|(key, _)| key == name)?;
        std::str::from_utf8(self.body.get(range.clone())?).ok()
    }

    /// The bytes of all text that the model is to read, and so a bound for its tokens but for
    /// what the chat template adds, and for pictures and sounds.
    #[must_use]
    pub fn prompt_bytes(&self) -> usize {
        let written = |name| self.field(name).map_or(0, str::len);
        match &self.input {
            Input::Messages(messages) => {
                let said: usize = messages.iter().map(message_bytes).sum();
                said + written("tools") + written("functions")
            }
            Input::Prompts(prompts) => prompts.iter().map(Prompt::bytes).sum(),
            Input::Opaque => written("input") + written("instructions") + written("tools"),
        }
    }

    /// Numbers for the beginnings that this request may share with others, each standing for all
    /// before it; at most 64. Requests that share the most are best answered by the same node.
    #[must_use]
    pub fn prefix_keys(&self) -> Vec<u64> {
        let mut prefix = Prefix::new(match self.endpoint {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "completions",
            Endpoint::Embeddings => "embeddings",
            Endpoint::Responses => "responses",
        });
        // Templates put tools before the messages.
        for name in ["tools", "functions", "instructions"] {
            if let Some(text) = self.field(name) {
                prefix.push(text.as_bytes());
                prefix.mark(name);
            }
        }
        match &self.input {
            Input::Messages(messages) => {
                for message in messages {
                    if prefix.is_full() {
                        break;
                    }
                    for part in &message.parts {
                        match part {
                            Part::Text(text) | Part::Other(text) => prefix.push(text.as_bytes()),
                        }
                    }
                    if let Some(calls) = &message.tool_calls {
                        prefix.push(calls.as_bytes());
                    }
                    prefix.mark(message.role.word());
                }
            }
            // Several prompts have no common beginning; the first stands for them.
            Input::Prompts(prompts) => match prompts.first() {
                Some(Prompt::Text(text)) => {
                    prefix.push(text.as_bytes());
                    prefix.mark("text");
                }
                Some(Prompt::Tokens(tokens)) => {
                    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
                    prefix.push(&bytes);
                    prefix.mark("tokens");
                }
                None => {}
            },
            Input::Opaque => {
                let input = self.field("input").unwrap_or_default();
                match json::items(input, PROMPTS) {
                    Ok(items) => {
                        for item in items {
                            prefix.push(item.get().as_bytes());
                            prefix.mark("item");
                        }
                    }
                    Err(_) => {
                        prefix.push(input.as_bytes());
                        prefix.mark("input");
                    }
                }
            }
        }
        prefix.into_keys()
    }

    /// The JSON for a serving node's engine: `model` in the name that it has there, our own fields
    /// left out, and when the answer comes in chunks and `include_usage` is set, the usage asked
    /// for whether or not the client did. All else goes on as it came, in the same order: the
    /// same request always gives the same bytes.
    #[must_use]
    pub fn forward(&self, model: &str, include_usage: bool) -> Bytes {
        let chunks = matches!(self.endpoint, Endpoint::Chat | Endpoint::Completions);
        let force = include_usage && self.stream && chunks;
        let mut out = Vec::with_capacity(self.body.len() + 64 + model.len());
        out.push(b'{');
        let mut options = None;
        for (key, range) in &self.fields {
            if fields::OWN.contains(&key.as_str()) {
                continue;
            }
            let value = self.body.get(range.clone()).unwrap_or(b"null");
            match key.as_str() {
                "model" => {
                    push_key(&mut out, key);
                    push_string(&mut out, model);
                }
                // That it can wait is said by the lease.
                "service_tier" if self.class == Wanted::Slack => {}
                "stream_options" if force => options = Some(value),
                _ => push_field(&mut out, key, value),
            }
        }
        if force {
            push_key(&mut out, "stream_options");
            out.push(b'{');
            let options = options.and_then(|value| std::str::from_utf8(value).ok());
            if let Some(options) = options.and_then(|text| Object::read(text).ok()) {
                for (key, value) in options.fields.iter().filter(|(key, _)| key != "include_usage")
                {
                    push_field(&mut out, key, value.get().as_bytes());
                }
            }
            push_field(&mut out, "include_usage", b"true");
            out.push(b'}');
        }
        out.push(b'}');
        out.into()
    }
}

/// What people ask is nothing for a log.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("endpoint", &self.endpoint)
            .field("model", &self.model)
            .field("stream", &self.stream)
            .field("needs", &self.needs)
            .field("bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The JSON of a request with another name for the model, for a server that has its own.
///
/// # Errors
/// 400 when it is no JSON object.
pub fn with_model(body: &[u8], model: &str) -> Result<Bytes, Fault> {
    let text = std::str::from_utf8(body).map_err(|_| Fault::not_json("it is not UTF-8"))?;
    let object = Object::read(text).map_err(Fault::not_json)?;
    let mut out = Vec::with_capacity(body.len() + model.len());
    out.push(b'{');
    push_key(&mut out, "model");
    push_string(&mut out, model);
    for (key, value) in object.fields.iter().filter(|(key, _)| key != "model") {
        push_field(&mut out, key, value.get().as_bytes());
    }
    out.push(b'}');
    Ok(out.into())
}

impl Prompt {
    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            // A token stands for itself.
            Self::Tokens(tokens) => tokens.len(),
        }
    }
}

fn message_bytes(message: &Message) -> usize {
    let parts = message.parts.iter().map(|part| match part {
        Part::Text(text) => text.len(),
        // Pictures and sounds are no text, however long they are.
        Part::Other(_) => 0,
    });
    let calls = message.tool_calls.as_ref().map_or(0, String::len);
    let name = message.name.as_ref().map_or(0, String::len);
    parts.sum::<usize>() + calls + name
}

impl Draft {
    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            model: None,
            sort: None,
            models: Vec::new(),
            stream: false,
            options: None,
            input: None,
            sampling: Sampling::default(),
            pending: Pending::default(),
            encoding: Encoding::default(),
            dimensions: None,
            user: None,
            class: Wanted::Firm,
            provider: Provider::default(),
            needs: Needs::PLAIN,
        }
    }

    fn need(&mut self, needed: bool, need: Need) {
        if needed {
            self.needs = self.needs.with(need);
        }
    }

    /// Reads a field that this endpoint knows and that is not null.
    fn take(&mut self, key: &str, field: &Field<'_, '_>) -> Result<(), Fault> {
        let Self { sampling, pending, endpoint, needs, .. } = self;
        if sampling.take(pending, *endpoint, key, field, needs)? {
            return Ok(());
        }
        if self.endpoint == Endpoint::Responses && self.take_of_responses(key, field)? {
            return Ok(());
        }
        match key {
            "model" => {
                let name = model(field)?;
                let (bare, sort) = Sort::of_model(&name);
                self.sort = sort;
                self.model = Some(bare.to_owned());
            }
            "models" => {
                for (at, raw) in field.items(FALLBACKS, true)?.into_iter().enumerate() {
                    self.models.push(model(&Field::new(raw, Path::Item(&field.path, at)))?);
                }
            }
            "provider" => self.provider = Provider::read(field)?,
            // OpenRouter's; an answer has its usage in any case.
            "usage" => each(field, |key, field| {
                Ok(key == "include" && (field.is_null() || field.boolean().map(|_| true)?))
            })?,
            "stream" => self.stream = field.boolean()?,
            "stream_options" => self.options = Some(stream_options(field)?),
            "messages" => self.input = Some(self.messages(field)?),
            "prompt" => self.input = Some(self.prompts(field)?),
            "input" => self.input = Some(self.prompts(field)?),
            "encoding_format" => {
                self.encoding = match field.word(&["float", "base64"])? {
                    "base64" => Encoding::Base64,
                    _ => Encoding::Float,
                };
            }
            "dimensions" => {
                self.dimensions = Some(field.count(1, 65_536)?);
                self.need(true, Need::Dimensions);
            }
            "user" => self.user = Some(field.text(NAME)?.into_owned()),
            "tools" | "functions" => {
                for (at, raw) in field.items(TOOLS, false)?.into_iter().enumerate() {
                    let item = Field::new(raw, Path::Item(&field.path, at));
                    let tool = item.object()?;
                    let name = if key == "tools" { "type" } else { "name" };
                    let inner = tool.get(name);
                    let inner = inner.ok_or_else(|| Fault::missing(Path::Key(&item.path, name)))?;
                    Field::new(inner, Path::Key(&item.path, name)).text(MODEL)?;
                }
                self.need(true, Need::Tools);
            }
            "tool_choice" | "function_call" => {
                let asks = match field.sort() {
                    // Without tools, to be free to call them asks for nothing.
                    Shape::String => field.word(&["none", "auto", "required"])? == "required",
                    _ => field.object().map(|_| true)?,
                };
                self.need(asks, Need::Tools);
            }
            "parallel_tool_calls" => {
                field.boolean()?;
            }
            "response_format" => {
                let structured = response_format(field)?;
                self.need(structured, Need::Structured);
            }
            "modalities" => {
                for (at, raw) in field.items(8, false)?.into_iter().enumerate() {
                    let item = Field::new(raw, Path::Item(&field.path, at));
                    let spoken = item.word(&["text", "audio"])? == "audio";
                    self.need(spoken, Need::AudioOut);
                }
            }
            "audio" => {
                field.object()?;
                self.need(true, Need::AudioOut);
            }
            "prediction" => {
                field.object()?;
                self.need(true, Need::Prediction);
            }
            "web_search_options" => {
                field.object()?;
                self.need(true, Need::WebSearch);
            }
            "chat_template_kwargs" => {
                field.object()?;
                self.need(true, Need::TemplateArgs);
            }
            "reasoning_effort" => {
                field.word(&["none", "minimal", "low", "medium", "high", "xhigh"])?;
                self.need(true, Need::Reasoning);
            }
            "verbosity" => {
                let usual = field.word(&["low", "medium", "high"])? == "medium";
                self.need(!usual, Need::Verbosity);
            }
            "service_tier" => {
                let tier = field.word(&["auto", "default", "flex", "scale", "priority"])?;
                if tier == "flex" {
                    self.class = Wanted::Slack;
                }
                self.need(matches!(tier, "scale" | "priority"), Need::ServiceTier);
            }
            "store" => {
                let keep = field.boolean()?;
                self.need(keep, Need::Store);
            }
            "metadata" => metadata(field)?,
            "echo" => {
                let echo = field.boolean()?;
                self.need(echo, Need::Echo);
            }
            "suffix" => {
                let follows = !field.text(usize::MAX)?.is_empty();
                self.need(follows, Need::Suffix);
            }
            "prompt_cache_key" | "prompt_cache_retention" | "safety_identifier" => {
                field.text(NAME)?;
            }
            // Only if a list in `fields` names what is not read here.
            _ => return Err(Fault::unknown_parameter(key)),
        }
        Ok(())
    }

    /// What `/v1/responses` has and the others have not, or have in another shape.
    fn take_of_responses(&mut self, key: &str, field: &Field<'_, '_>) -> Result<bool, Fault> {
        match key {
            "input" => {
                if field.sort() != Shape::String {
                    self.items_of_responses(field)?;
                }
                self.input = Some(Input::Opaque);
            }
            "instructions" => {
                field.text(usize::MAX)?;
            }
            "prompt" => {
                field.object()?;
                self.need(true, Need::Store);
            }
            "background" => {
                let later = field.boolean()?;
                self.need(later, Need::Store);
            }
            "conversation" | "previous_response_id" => self.need(true, Need::Store),
            "include" => {
                field.items(TOOLS, true)?;
            }
            "max_tool_calls" => {
                field.count(1, super::sampling::TOKENS)?;
            }
            "reasoning" => {
                field.object()?;
                self.need(true, Need::Reasoning);
            }
            "text" => {
                let object = field.object()?;
                if let Some(raw) = object.get("format") {
                    let format = Field::new(raw, Path::Key(&field.path, "format"));
                    let structured = !format.is_null() && response_format(&format)?;
                    self.need(structured, Need::Structured);
                }
            }
            "truncation" => {
                field.word(&["auto", "disabled"])?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Looks for what not every model can read among the items of `/v1/responses`.
    fn items_of_responses(&mut self, field: &Field<'_, '_>) -> Result<(), Fault> {
        for raw in field.items(super::message::MESSAGES, false)? {
            let Ok(object) = Object::read(raw.get()) else { continue };
            let Some(content) = object.get("content") else { continue };
            for part in json::items(content.get(), super::message::PARTS).unwrap_or_default() {
                let Ok(part) = Object::read(part.get()) else { continue };
                match part.get("type").map(RawValue::get) {
                    Some("\"input_image\"") => self.need(true, Need::Images),
                    Some("\"input_audio\"") => self.need(true, Need::Audio),
                    Some("\"input_file\"") => self.need(true, Need::Files),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn messages(&mut self, field: &Field<'_, '_>) -> Result<Input, Fault> {
        let items = field.items(super::message::MESSAGES, false)?;
        let mut messages = Vec::with_capacity(items.len());
        for (at, raw) in items.into_iter().enumerate() {
            let item = Field::new(raw, Path::Item(&field.path, at));
            messages.push(Message::read(&item, &mut self.needs)?);
        }
        Ok(Input::Messages(messages))
    }

    /// A string, an array of strings, an array of tokens, or an array of those.
    fn prompts(&mut self, field: &Field<'_, '_>) -> Result<Input, Fault> {
        let mut prompts = Vec::new();
        match field.sort() {
            Shape::String => prompts.push(Prompt::Text(field.text(usize::MAX)?.into_owned())),
            Shape::Array if holds_numbers(field.raw) => prompts.push(tokens(field)?),
            Shape::Array => {
                for (at, raw) in field.items(PROMPTS, false)?.into_iter().enumerate() {
                    let item = Field::new(raw, Path::Item(&field.path, at));
                    prompts.push(match item.sort() {
                        Shape::String => Prompt::Text(item.text(usize::MAX)?.into_owned()),
                        Shape::Array => tokens(&item)?,
                        _ => return Err(item.wrong_type("a string or array of tokens")),
                    });
                }
            }
            _ => return Err(field.wrong_type("one of a string, array of strings, or tokens")),
        }
        let counted = prompts.iter().any(|prompt| matches!(prompt, Prompt::Tokens(_)));
        self.need(counted, Need::TokenPrompt);
        if self.endpoint == Endpoint::Embeddings {
            if prompts.iter().any(|prompt| prompt.bytes() == 0) {
                return Err(field.invalid("invalid_value", "there must be something to embed."));
            }
        } else {
            self.need(prompts.len() > 1, Need::Prompts);
        }
        Ok(Input::Prompts(prompts))
    }

    fn finish(
        mut self,
        body: Bytes,
        fields: Vec<(String, Range<usize>)>,
    ) -> Result<Request, Fault> {
        self.sampling.finish(&self.pending, self.endpoint)?;
        if self.options.is_some() && !self.stream {
            let why = "The 'stream_options' parameter is only allowed when 'stream' is enabled.";
            return Err(Fault::invalid(None, why).at("stream_options"));
        }
        let model = self.model.ok_or_else(|| Fault::missing("model"))?;
        let input = match (self.input, self.endpoint) {
            (Some(input), _) => input,
            (None, Endpoint::Chat) => return Err(Fault::missing("messages")),
            (None, Endpoint::Completions) => return Err(Fault::missing("prompt")),
            (None, Endpoint::Embeddings) => return Err(Fault::missing("input")),
            // A stored prompt or conversation may say it all.
            (None, Endpoint::Responses) => Input::Opaque,
        };
        // What is said in so many words goes before a suffix.
        self.provider.sort = self.provider.sort.or(self.sort);
        Ok(Request {
            endpoint: self.endpoint,
            model,
            models: self.models,
            stream: self.stream,
            include_usage: self.options.unwrap_or(false),
            input,
            sampling: self.sampling,
            encoding: self.encoding,
            dimensions: self.dimensions,
            user: self.user,
            class: self.class,
            provider: self.provider,
            needs: self.needs,
            body,
            fields,
        })
    }
}

fn model(field: &Field<'_, '_>) -> Result<String, Fault> {
    let name = field.text(MODEL)?;
    if name.is_empty() || name.chars().any(char::is_control) {
        let why = format!("'{}' is no name of a model.", shown(&name));
        return Err(field.invalid("invalid_value", why));
    }
    Ok(name.into_owned())
}

/// Whether the usage is wanted.
fn stream_options(field: &Field<'_, '_>) -> Result<bool, Fault> {
    let mut usage = false;
    each(field, |key, field| {
        match key {
            _ if field.is_null() => {
                return Ok(matches!(key, "include_usage" | "include_obfuscation"));
            }
            "include_usage" => usage = field.boolean()?,
            "include_obfuscation" => {
                field.boolean()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(usage)
}

/// Whether the answer must have some structure.
fn response_format(field: &Field<'_, '_>) -> Result<bool, Fault> {
    let object = field.object()?;
    let kind = object.get("type");
    let kind = kind.ok_or_else(|| Fault::missing(Path::Key(&field.path, "type")))?;
    let kind = Field::new(kind, Path::Key(&field.path, "type"));
    let word = kind.word(&["text", "json_object", "json_schema"])?;
    if word == "json_schema" {
        // `/v1/responses` has the schema one level higher.
        let schema = object.get("json_schema").or_else(|| object.get("schema"));
        let schema = schema.ok_or_else(|| Fault::missing(Path::Key(&field.path, "json_schema")))?;
        Field::new(schema, Path::Key(&field.path, "json_schema")).object()?;
    }
    Ok(word != "text")
}

fn metadata(field: &Field<'_, '_>) -> Result<(), Fault> {
    let object = field.object()?;
    if object.fields.len() > 16 {
        return Err(field.invalid("object_above_max_properties", "more than 16 pairs."));
    }
    for (key, raw) in &object.fields {
        let inner = Field::new(raw, Path::Key(&field.path, key));
        if key.len() > 64 {
            return Err(inner.invalid("string_above_max_length", "a key has at most 64 bytes."));
        }
        inner.text(2_048)?;
    }
    Ok(())
}

/// Whether the first item of an array is a number.
fn holds_numbers(raw: &RawValue) -> bool {
    let inside = raw.get().get(1..).unwrap_or_default().trim_start();
    inside.starts_with(|first: char| first == '-' || first.is_ascii_digit())
}

fn tokens(field: &Field<'_, '_>) -> Result<Prompt, Fault> {
    match serde_json::from_str(field.raw.get()) {
        Ok(tokens) => Ok(Prompt::Tokens(tokens)),
        Err(_) => Err(field.wrong_type("an array of tokens")),
    }
}

#[cfg(test)]
mod tests;
