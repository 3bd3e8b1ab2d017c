//! Text to tokens and back, with the byte pairs of a model file.
//!
//! Control tokens (`<|im_end|>` and its like) are words of the template, not of people: text is
//! encoded without them, and only [`Tokenizer::encode_marked`] knows them, for text of which a
//! template wrote a part. How text is cut before bytes are paired is what the file names under
//! `tokenizer.ggml.pre`; a name that is not known here is refused, since every guess would quietly
//! give other tokens than the model learnt.

use std::collections::BTreeMap;

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use super::gguf::{File, LoadError, broken};

/// Why text cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// It is longer than any context.
    #[error("the text has {0} bytes, more than the {max} that are taken", max = MAX_TEXT)]
    TooLong(usize),
    /// The rules of the model could not be applied to it.
    #[error("the text cannot be encoded: {0}")]
    Failed(String),
}

/// The longest text that is taken, in bytes.
pub const MAX_TEXT: usize = 8 << 20;

/// The words of a model: made from its file, the same for all who use it.
#[derive(Debug)]
pub struct Tokenizer {
    pairs: tokenizers::Tokenizer,
    /// The bytes of all tokens, one after the other, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    kinds: Vec<Role>,
    /// What is looked for in a template's text, by its first byte, the longest first.
    control: BTreeMap<u8, Vec<(String, u32)>>,
    /// The same for text of people: what is a word of its own, but has no power.
    words: BTreeMap<u8, Vec<(String, u32)>>,
    begin: Option<u32>,
    end: Option<u32>,
    /// Whether plain text (not a chat) begins with `begin`.
    add_begin: bool,
    stops: Vec<u32>,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Text,
    /// Written by templates, and no text when it comes out.
    Control,
    /// A word that is never cut.
    Word,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// How text is cut, as llama.cpp does it under the same names: each pattern cuts what the one
/// before left.
fn patterns(name: &str) -> Option<&'static [&'static str]> {
    Some(match name {
        "gpt-2" | "gpt2" => &[GPT2],
        "smollm" => &[r"\p{N}", GPT2],
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => &[LLAMA3],
        "qwen2" => &[QWEN2],
        "default" => &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        _ => return None,
    })
}

impl Tokenizer {
    pub(super) fn load(file: &File) -> Result<Self, LoadError> {
        let model = file.text("tokenizer.ggml.model").unwrap_or("none");
        if model != "gpt2" {
            return Err(LoadError::Unsupported(format!(
                "the model's tokenizer is of the kind {model}; the embedded engine has byte \
                 pairs only (gpt2)"
            )));
        }
        let name = file.text("tokenizer.ggml.pre").unwrap_or("default");
        let patterns = patterns(name).ok_or_else(|| {
            LoadError::Unsupported(format!(
                "the model cuts its text by the rules of {name}; known are gpt-2, smollm, \
                 llama-bpe, smaug-bpe, qwen2 and default"
            ))
        })?;
        let tokens = file
            .texts("tokenizer.ggml.tokens")
            .ok_or_else(|| broken!("tokenizer.ggml.tokens is missing"))?;
        let count = u32::try_from(tokens.len())
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(|| broken!("a vocabulary of {} tokens", tokens.len()))?;
        let merges = file
            .texts("tokenizer.ggml.merges")
            .ok_or_else(|| broken!("tokenizer.ggml.merges is missing"))?;
        let pairs = pair_rules(tokens, merges, file, name)?;
        let pairs = cut_rules(pairs, patterns)?;

        let kinds = roles(file, tokens.len())?;
        let (bytes, ends) = table(tokens, &kinds);
        let (mut control, mut words) = (BTreeMap::new(), BTreeMap::new());
        for ((token, kind), id) in tokens.iter().zip(&kinds).zip(0..count) {
            if *kind != Role::Text {
                insert(&mut control, token, id);
            }
            if *kind == Role::Word {
                insert(&mut words, token, id);
            }
        }
        let special = |key: &str| -> Result<Option<u32>, LoadError> {
            match file.number(&format!("tokenizer.ggml.{key}")) {
                None => Ok(None),
                Some(id) if id < u64::from(count) => Ok(Some(id as u32)),
                Some(id) => Err(broken!("{key} is {id} of {count} tokens")),
            }
        };
        let (begin, end) = (special("bos_token_id")?, special("eos_token_id")?);
        let mut stops: Vec<u32> = end.into_iter().chain(special("eot_token_id")?).collect();
        // The names under which models end a turn, whatever their files say of it.
        for name in ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>"] {
            let found = control.get(&b'<').and_then(|all| all.iter().find(|(n, _)| n == name));
            stops.extend(found.map(|(_, id)| *id));
        }
        stops.sort_unstable();
        stops.dedup();
        let add_begin = file.flag("tokenizer.ggml.add_bos_token").unwrap_or(false);
        Ok(Self { pairs, bytes, ends, kinds, control, words, begin, end, add_begin, stops })
    }

    /// The number of tokens that there are.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.ends.len()
    }

    /// The tokens that end what a model says.
    #[must_use]
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// The text of the token that begins a text, if the model has one.
    #[must_use]
    pub fn begin(&self) -> Option<&str> {
        self.begin.and_then(|id| std::str::from_utf8(self.bytes(id)).ok())
    }

    /// The text of the token that ends a text, if the model has one.
    #[must_use]
    pub fn end(&self) -> Option<&str> {
        self.end.and_then(|id| std::str::from_utf8(self.bytes(id)).ok())
    }

    /// The bytes that a token stands for (none for an id that is no token). They need not be whole
    /// characters. For a control token, its name.
    #[must_use]
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..*end]
    }

    /// Whether a token is for the machine, and no text.
    #[must_use]
    pub fn is_control(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&Role::Control)
    }

    /// The names of the control tokens.
    pub(super) fn control(&self) -> impl Iterator<Item = &str> {
        self.control.values().flatten().filter_map(|(name, id)| {
            (self.kinds[*id as usize] == Role::Control).then_some(name.as_str())
        })
    }

    /// The tokens of a text in which nothing has power: `<|im_end|>` is ten characters. For a
    /// prompt, `begin` is put before it where the model wants that.
    ///
    /// # Errors
    /// When the text is longer than [`MAX_TEXT`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        self.encode_with(&self.words, text, None)
    }

    /// The tokens of a plain prompt: as [`Tokenizer::encode`], after the token that begins a text
    /// where the model was trained so.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let mut tokens: Vec<u32> = self.begin.filter(|_| self.add_begin).into_iter().collect();
        tokens.extend(self.encode(text)?);
        Ok(tokens)
    }

    /// The tokens of a text in which the names of control tokens are those tokens, unless `mark`
    /// stands within them. All marks are taken out.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_marked(&self, text: &str, mark: char) -> Result<Vec<u32>, EncodeError> {
        self.encode_with(&self.control, text, Some(mark))
    }

    fn encode_with(
        &self,
        names: &BTreeMap<u8, Vec<(String, u32)>>,
        text: &str,
        mark: Option<char>,
    ) -> Result<Vec<u32>, EncodeError> {
        if text.len() > MAX_TEXT {
            return Err(EncodeError::TooLong(text.len()));
        }
        let mut tokens = Vec::new();
        let plain = |text: &str, tokens: &mut Vec<u32>| {
            if text.is_empty() {
                return Ok(());
            }
            let unmarked = mark.map(|mark| text.replace(mark, ""));
            let text = unmarked.as_deref().unwrap_or(text);
            let encoding = self.pairs.encode_fast(text, false);
            let encoding = encoding.map_err(|error| EncodeError::Failed(error.to_string()))?;
            tokens.extend_from_slice(encoding.get_ids());
            Ok(())
        };
        let (mut from, mut at) = (0, 0);
        while at < text.len() {
            let rest = &text.as_bytes()[at..];
            let named = names
                .get(&rest[0])
                .and_then(|names| names.iter().find(|(name, _)| rest.starts_with(name.as_bytes())));
            let Some((name, id)) = named else {
                at += 1;
                continue;
            };
            plain(&text[from..at], &mut tokens)?;
            tokens.push(*id);
            at += name.len();
            from = at;
        }
        plain(&text[from..], &mut tokens)?;
        Ok(tokens)
    }
}

fn insert(names: &mut BTreeMap<u8, Vec<(String, u32)>>, name: &str, id: u32) {
    let Some(first) = name.bytes().next() else { return };
    let all = names.entry(first).or_default();
    let at = all.partition_point(|(other, _)| other.len() >= name.len());
    all.insert(at, (name.to_owned(), id));
}

/// The rules by which bytes become tokens.
fn pair_rules(
    tokens: &[String],
    merges: &[String],
    file: &File,
    name: &str,
) -> Result<BPE, LoadError> {
    let vocabulary: Vec<(String, u32)> =
        tokens.iter().zip(0u32..).map(|(token, id)| (token.clone(), id)).collect();
    let mut rules = Vec::with_capacity(merges.len());
    for merge in merges {
        // A token may begin with a space only where it is a lone one.
        let rule = merge.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty());
        let (a, b) = rule.ok_or_else(|| broken!("'{merge}' is no pair"))?;
        rules.push((a.to_owned(), b.to_owned()));
    }
    let whole = file.flag("tokenizer.ggml.ignore_merges");
    let whole = whole.unwrap_or(matches!(name, "llama-bpe" | "llama3" | "llama-v3"));
    BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<tokenizers::models::bpe::Vocab>(), rules)
        .ignore_merges(whole)
        .build()
        .map_err(|error| broken!("its byte pairs do not fit together: {error}"))
}

fn cut_rules(pairs: BPE, patterns: &[&str]) -> Result<tokenizers::Tokenizer, LoadError> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| broken!("a rule for cutting text: {error}"))?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    let mut tokenizer = tokenizers::Tokenizer::new(pairs);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer
        .with_normalizer(None::<NormalizerWrapper>)
        .map_err(|error| broken!("the tokenizer: {error}"))?;
    Ok(tokenizer)
}

fn roles(file: &File, count: usize) -> Result<Vec<Role>, LoadError> {
    let Some(kinds) = file.numbers("tokenizer.ggml.token_type") else {
        return Ok(vec![Role::Text; count]);
    };
    let roles: Vec<Role> = kinds
        .map(|kind| match kind {
            // Unknown and control.
            2 | 3 => Role::Control,
            // What users of the model added.
            4 => Role::Word,
            _ => Role::Text,
        })
        .collect();
    if roles.len() != count {
        return Err(broken!("{} types for {count} tokens", roles.len()));
    }
    Ok(roles)
}

/// The bytes of each token. In the file those of text are written with one printable character for
/// each byte, as GPT-2 did.
fn table(tokens: &[String], roles: &[Role]) -> (Vec<u8>, Vec<usize>) {
    let byte_of = byte_of();
    let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(tokens.len()));
    for (token, role) in tokens.iter().zip(roles) {
        let start = bytes.len();
        let spelt = token.chars().map(|c| byte_of.get(&c).copied());
        if *role == Role::Text && spelt.clone().all(|byte| byte.is_some()) {
            bytes.extend(spelt.flatten());
        } else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
        }
        ends.push(bytes.len());
    }
    (bytes, ends)
}

/// The byte that each character of a spelling stands for: printable ones for themselves, the
/// others for 256 and up, in order.
fn byte_of() -> BTreeMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = '\u{100}'..;
    (0..=u8::MAX)
        .filter_map(|byte| {
            let c = if printable(byte) { char::from(byte) } else { others.next()? };
            Some((c, byte))
        })
        .collect()
}

/// The printable spelling of bytes, as the tokens of a file have it.
#[must_use]
pub fn spell(bytes: &[u8]) -> String {
    let mut spelling = ['\0'; 256];
    for (c, byte) in byte_of() {
        spelling[byte as usize] = c;
    }
    bytes.iter().map(|byte| spelling[*byte as usize]).collect()
}
