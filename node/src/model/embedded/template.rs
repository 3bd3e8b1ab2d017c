//! Renders the messages of a chat as the prompt that a model was trained on.
//!
//! The template comes with the model and writes control tokens between the messages. Text of
//! people must never become such a token, even where it spells one. Before rendering, a mark (a
//! character that occurs nowhere else) is put into everything in a message that spells a control
//! token, or could together with what stands beside it; encoding knows no token with a mark in it,
//! and then takes the marks out. So the template sees texts as they are, and may trim, split or
//! search them; only those that try something carry a mark.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use super::gguf::{LoadError, broken};
use super::tokenizer::{EncodeError, MAX_TEXT, Tokenizer};

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: system, user or assistant, or what else the model knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Why a chat cannot be rendered: the messages are not such as the model takes.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template did not take the messages.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// It has none, and its vocabulary is not that of a chat.
    #[error("the model has no chat template: it completes text only")]
    None,
    /// The prompt is longer than any context.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The messages use every private character of Unicode, which no text does.
    #[error("the messages hold too many private characters")]
    Private,
}

/// A model's template, parsed.
#[derive(Debug)]
pub(super) struct Template {
    environment: Environment<'static>,
    source: String,
}

/// The steps that a template may take: a long chat takes some thousand.
const FUEL: u64 = 2_000_000;
/// The longest template that is parsed, in bytes.
const MAX_SOURCE: usize = 1 << 18;
const NAME: &str = "chat";
/// For models that have the tokens, but no template: what most of them use.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl Template {
    /// Parses `source`, or takes the usual one where there is none and the tokens for it exist.
    pub(super) fn load(
        source: Option<&str>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>, LoadError> {
        let source = match source {
            Some(source) => source,
            None => {
                let has = |name| tokenizer.control().any(|token| token == name);
                if !has("<|im_start|>") || !has("<|im_end|>") {
                    return Ok(None);
                }
                CHATML
            }
        };
        if source.len() > MAX_SOURCE {
            return Err(LoadError::Unsupported("a chat template of more than 256 KiB".into()));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As Hugging Face's library sets it up, for which templates are written.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| broken!("{error}"))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| {
            Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_template_owned(NAME, source.to_owned()).map_err(|error| {
            LoadError::Unsupported(format!("the chat template cannot be read: {error}"))
        })?;
        Ok(Some(Self { environment, source: source.to_owned() }))
    }

    /// The tokens of the prompt for what the assistant says next.
    pub(super) fn render(
        &self,
        messages: &[Message],
        tokenizer: &Tokenizer,
    ) -> Result<Vec<u32>, TemplateError> {
        let bytes: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        if bytes > MAX_TEXT {
            return Err(EncodeError::TooLong(bytes).into());
        }
        let mark = self.mark(messages).ok_or(TemplateError::Private)?;
        let control: Vec<&str> = tokenizer.control().collect();
        let marked: Vec<Value> = messages
            .iter()
            .map(|message| {
                context! {
                    role => disarm(&message.role, &control, mark),
                    content => disarm(&message.content, &control, mark),
                }
            })
            .collect();
        let refused = |error: minijinja::Error| TemplateError::Refused(reason(&error));
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let context = context! {
            messages => marked,
            add_generation_prompt => true,
            bos_token => tokenizer.begin().unwrap_or_default(),
            eos_token => tokenizer.end().unwrap_or_default(),
        };
        let mut out = Bounded(Vec::new());
        template.render_captured_to(context, &mut out).map_err(refused)?;
        let prompt = String::from_utf8(out.0)
            .map_err(|_| TemplateError::Refused("it wrote what is no text".into()))?;
        Ok(tokenizer.encode_marked(&prompt, mark)?)
    }

    /// A character that stands nowhere in the messages or the template.
    fn mark(&self, messages: &[Message]) -> Option<char> {
        let mut used = vec![false; 0x1900];
        let texts = messages.iter().flat_map(|message| [&message.role, &message.content]);
        for c in texts.chain([&self.source]).flat_map(|text| text.chars()) {
            if let Some(used) = (c as usize).checked_sub(0xE000).and_then(|n| used.get_mut(n)) {
                *used = true;
            }
        }
        let free = used.iter().position(|used| !used)?;
        char::from_u32(0xE000 + free as u32)
    }
}

/// Puts the mark into each control token that the text spells, and into what at its ends might be
/// part of one together with other text.
fn disarm(text: &str, control: &[&str], mark: char) -> String {
    let names = || control.iter().filter(|name| !name.is_empty());
    let mut cuts: Vec<usize> = Vec::new();
    for name in names() {
        let first = name.chars().next().map_or(1, char::len_utf8);
        // Occurrences may overlap, so the search goes on within each.
        let mut from = 0;
        while let Some(at) = text[from..].find(*name) {
            // A token of one character cannot be cut: nothing but a character of its own has it.
            cuts.push(from + at + first);
            from += at + first;
        }
        let inner = || name.char_indices().map(|(at, _)| at).filter(|at| *at > 0);
        if let Some(at) = inner().filter(|at| text.ends_with(&name[..*at])).max() {
            cuts.push(text.len() - at + first);
        }
        if inner().any(|at| text.starts_with(&name[at..])) {
            cuts.push(0);
        }
    }
    if cuts.is_empty() {
        return text.to_owned();
    }
    cuts.sort_unstable();
    cuts.dedup();
    let mut out = String::with_capacity(text.len() + cuts.len() * mark.len_utf8());
    let mut from = 0;
    for cut in cuts {
        out.push_str(&text[from..cut]);
        out.push(mark);
        from = cut;
    }
    out.push_str(&text[from..]);
    out
}

/// What a template error says to whoever sent the messages: no more than a line.
fn reason(error: &minijinja::Error) -> String {
    let text = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    text.chars().take(300).collect()
}

/// Takes no more than the longest text.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT * 2 {
            return Err(io::Error::other("the prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
