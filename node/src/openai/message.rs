//! The messages of a chat.
//!
//! Fields of a message that are not read here are kept and sent on: programs hand back what a model
//! answered, with whatever its server had added.

use super::fault::{Fault, shown};
use super::json::Object;
use super::needs::{Need, Needs};
use super::read::{Field, Path, Sort};

/// How many messages a request may have.
pub const MESSAGES: usize = 16_384;
/// How many parts a message may have.
pub const PARTS: usize = 1_024;
/// How many tools or tool calls may be listed.
pub const TOOLS: usize = 512;
/// The longest name or id, in bytes.
const NAME: usize = 256;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The operator of the program.
    System,
    /// The same by its newer name.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called.
    Tool,
    /// The same by its older name.
    Function,
}

/// A piece of what is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text.
    Text(String),
    /// Anything else, as the JSON that came: pictures, sound, files.
    Other(String),
}

/// Something said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who said it.
    pub role: Role,
    /// What was said; empty for a message that only calls tools.
    pub parts: Vec<Part>,
    /// Which of several speakers of that role.
    pub name: Option<String>,
    /// The calls of tools, as the JSON that came.
    pub tool_calls: Option<String>,
    /// Which call this answers.
    pub tool_call_id: Option<String>,
}

impl Role {
    const WORDS: [&'static str; 6] =
        ["system", "developer", "user", "assistant", "tool", "function"];

    /// Its word in JSON and in chat templates.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
            Self::Function => "function",
        }
    }

    fn read(field: &Field<'_, '_>) -> Result<Self, Fault> {
        Ok(match field.word(&Self::WORDS)? {
            "system" => Self::System,
            "developer" => Self::Developer,
            "user" => Self::User,
            "assistant" => Self::Assistant,
            "tool" => Self::Tool,
            _ => Self::Function,
        })
    }
}

impl Message {
    /// All its text, one part after the other.
    #[must_use]
    pub fn text(&self) -> String {
        self.parts
            .iter()
            .filter_map(|part| match part {
                Part::Text(text) => Some(text.as_str()),
                Part::Other(_) => None,
            })
            .collect()
    }

    pub(super) fn read(field: &Field<'_, '_>, needs: &mut Needs) -> Result<Self, Fault> {
        let object = field.object()?;
        // Null is absent.
        let get = |name: &'static str| {
            let raw = object.get(name)?;
            Some(Field::new(raw, Path::Key(&field.path, name))).filter(|inner| !inner.is_null())
        };
        let missing = |name| Fault::missing(Path::Key(&field.path, name));
        let text = |name| get(name).map(|inner| inner.text(NAME).map(Into::into)).transpose();
        let role = Role::read(&get("role").ok_or_else(|| missing("role"))?)?;
        let tool_calls = match get("tool_calls") {
            Some(calls) => {
                calls.items(TOOLS, true)?;
                Some(calls.raw.get().to_owned())
            }
            None => get("function_call").map(|call| call.raw.get().to_owned()),
        };
        let parts = match get("content") {
            Some(content) => content_parts(&content, needs)?,
            None => {
                let said = ["tool_calls", "function_call", "audio", "refusal"];
                let may_be_silent =
                    role == Role::Assistant && said.iter().any(|it| get(it).is_some());
                if !may_be_silent {
                    return Err(missing("content"));
                }
                Vec::new()
            }
        };
        let tool_call_id = text("tool_call_id")?;
        if role == Role::Tool && tool_call_id.is_none() {
            return Err(missing("tool_call_id"));
        }
        let name = text("name")?;
        if role == Role::Function && name.is_none() {
            return Err(missing("name"));
        }
        if tool_calls.is_some() || matches!(role, Role::Tool | Role::Function) {
            *needs = needs.with(Need::Tools);
        }
        Ok(Self { role, parts, name, tool_calls, tool_call_id })
    }
}

/// The kinds of parts, with what a model needs for each.
const KINDS: [(&str, Option<Need>); 10] = [
    ("text", None),
    ("refusal", None),
    ("input_text", None),
    ("output_text", None),
    ("image_url", Some(Need::Images)),
    ("input_audio", Some(Need::Audio)),
    ("audio_url", Some(Need::Audio)),
    ("video_url", Some(Need::Video)),
    ("file", Some(Need::Files)),
    ("input_image", Some(Need::Images)),
];

fn content_parts(content: &Field<'_, '_>, needs: &mut Needs) -> Result<Vec<Part>, Fault> {
    match content.sort() {
        Sort::String => return Ok(vec![Part::Text(content.text(usize::MAX)?.into_owned())]),
        Sort::Array => {}
        _ => return Err(content.wrong_type("one of a string or array of objects")),
    }
    let mut parts = Vec::new();
    for (at, raw) in content.items(PARTS, false)?.into_iter().enumerate() {
        let field = Field::new(raw, Path::Item(&content.path, at));
        parts.push(part(&field, needs)?);
    }
    Ok(parts)
}

fn part(field: &Field<'_, '_>, needs: &mut Needs) -> Result<Part, Fault> {
    let object: Object<'_> = field.object()?;
    let missing = |name| Fault::missing(Path::Key(&field.path, name));
    let kind = object.get("type").ok_or_else(|| missing("type"))?;
    let kind_field = Field::new(kind, Path::Key(&field.path, "type"));
    let kind = kind_field.text(NAME)?;
    let Some((word, need)) = KINDS.iter().find(|(word, _)| *word == kind) else {
        let words: Vec<&str> = KINDS[..9].iter().map(|(word, _)| *word).collect();
        return Err(kind_field.not_among(&shown(&kind), &words));
    };
    // What is described must be there, under the name of its kind.
    let name = match *word {
        "input_text" | "output_text" => "text",
        "input_image" => "image_url",
        word => word,
    };
    let inner = object.get(name).ok_or_else(|| missing(name))?;
    let inner = Field::new(inner, Path::Key(&field.path, name));
    match need {
        None => Ok(Part::Text(inner.text(usize::MAX)?.into_owned())),
        Some(need) => {
            if inner.is_null() {
                return Err(missing(name));
            }
            *needs = needs.with(*need);
            Ok(Part::Other(field.raw.get().to_owned()))
        }
    }
}
