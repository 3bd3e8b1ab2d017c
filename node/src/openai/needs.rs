//! What a request needs of a model beyond plain text.
//!
//! A model says what it has, and a request that needs more is refused by name before anything is
//! paid for, instead of being answered as if the field had not been there.

use std::fmt;

use super::fault::Fault;

macro_rules! needs {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $word:literal, $param:literal;)*) => {
        /// Something that not every model can do.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Need { $($(#[$doc])* $name),* }

        impl Need {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its stable word, for offers and listings.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word),* }
            }

            /// The field that asks for it.
            #[must_use]
            pub const fn param(self) -> &'static str {
                match self { $(Self::$name => $param),* }
            }

            const fn bit(self) -> u64 {
                match self { $(Self::$name => 1 << $bit),* }
            }
        }
    };
}

// The bits travel in offers: a number keeps its meaning.
needs! {
    /// Tools or functions that the model may call.
    Tools = 0, "tools", "tools";
    /// Pictures in the prompt.
    Images = 1, "images", "messages";
    /// Sound in the prompt.
    Audio = 2, "audio", "messages";
    /// Films in the prompt.
    Video = 3, "video", "messages";
    /// Files in the prompt.
    Files = 4, "files", "messages";
    /// An answer as JSON, or by a schema.
    Structured = 5, "structured_output", "response_format";
    /// Several answers to one prompt.
    Choices = 6, "n", "n";
    /// Probabilities of tokens.
    Logprobs = 7, "logprobs", "logprobs";
    /// A bias for tokens.
    LogitBias = 8, "logit_bias", "logit_bias";
    /// A penalty for tokens that were there.
    PresencePenalty = 9, "presence_penalty", "presence_penalty";
    /// A penalty for tokens by how often they were there.
    FrequencyPenalty = 10, "frequency_penalty", "frequency_penalty";
    /// A factor against repetition.
    RepetitionPenalty = 11, "repetition_penalty", "repetition_penalty";
    /// Sampling among the likeliest few.
    TopK = 12, "top_k", "top_k";
    /// Sampling among what is likely enough beside the likeliest.
    MinP = 13, "min_p", "min_p";
    /// The best of several answers.
    BestOf = 14, "best_of", "best_of";
    /// The prompt repeated before the answer.
    Echo = 15, "echo", "echo";
    /// Text that is to follow the answer.
    Suffix = 16, "suffix", "suffix";
    /// A prompt given as numbers of tokens.
    TokenPrompt = 17, "token_prompt", "prompt";
    /// Several prompts in one request for a completion.
    Prompts = 18, "prompts", "prompt";
    /// Embeddings of another length than the model's own.
    Dimensions = 19, "dimensions", "dimensions";
    /// How much the model is to reason.
    Reasoning = 20, "reasoning", "reasoning_effort";
    /// Looking things up on the web.
    WebSearch = 21, "web_search", "web_search_options";
    /// A predicted answer.
    Prediction = 22, "prediction", "prediction";
    /// Spoken answers.
    AudioOut = 23, "audio_output", "modalities";
    /// Keeping the answer, or referring to one that was kept.
    Store = 24, "store", "store";
    /// Another class of service than the usual.
    ServiceTier = 25, "service_tier", "service_tier";
    /// How verbose the answer is to be.
    Verbosity = 26, "verbosity", "verbosity";
    /// Arguments of the chat template, as vLLM and llama-server take them.
    TemplateArgs = 27, "chat_template_kwargs", "chat_template_kwargs";
}

/// A set of needs: what a request needs, or what a model has.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Needs(u64);

impl Needs {
    /// Plain text and nothing else.
    pub const PLAIN: Self = Self(0);

    /// What an OpenAI-compatible server is taken to have when its operator says nothing else:
    /// what vLLM and llama-server do for a text model. Each model's own gifts (pictures, sound)
    /// and what only OpenAI's own service has are not among it.
    pub const UPSTREAM: Self = Self::PLAIN
        .with(Need::Tools)
        .with(Need::Structured)
        .with(Need::Choices)
        .with(Need::Logprobs)
        .with(Need::LogitBias)
        .with(Need::PresencePenalty)
        .with(Need::FrequencyPenalty)
        .with(Need::RepetitionPenalty)
        .with(Need::TopK)
        .with(Need::MinP)
        .with(Need::TokenPrompt)
        .with(Need::Prompts)
        .with(Need::Reasoning)
        .with(Need::TemplateArgs);

    /// The same and one more.
    #[must_use]
    pub const fn with(self, need: Need) -> Self {
        Self(self.0 | need.bit())
    }

    /// Whether it is among them.
    #[must_use]
    pub const fn has(self, need: Need) -> bool {
        self.0 & need.bit() != 0
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_plain(self) -> bool {
        self.0 == 0
    }

    /// What is in these and not in `offered`.
    #[must_use]
    pub const fn beyond(self, offered: Self) -> Self {
        Self(self.0 & !offered.0)
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = Need> {
        Need::ALL.iter().copied().filter(move |need| self.has(*need))
    }

    /// The same as bits, which keep their meaning from one release to the next.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// What bits mean; those that this release does not know are kept and never matter.
    #[must_use]
    pub const fn of_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Refuses the first of these that `model`, which has `offered`, lacks.
    ///
    /// # Errors
    /// 400 with the field that asks for it.
    pub fn check(self, offered: Self, model: &str) -> Result<(), Fault> {
        match self.beyond(offered).iter().next() {
            Some(need) => Err(Fault::unsupported(need.param(), model)),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(Need::word)).finish()
    }
}

impl FromIterator<Need> for Needs {
    fn from_iter<I: IntoIterator<Item = Need>>(needs: I) -> Self {
        needs.into_iter().fold(Self::PLAIN, Self::with)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_bit_and_a_word_of_its_own() {
        let all: Needs = Need::ALL.iter().copied().collect();
        assert_eq!(all.bits().count_ones() as usize, Need::ALL.len());
        assert_eq!(all.iter().count(), Need::ALL.len());
        let words: std::collections::BTreeSet<_> = Need::ALL.iter().map(|n| n.word()).collect();
        assert_eq!(words.len(), Need::ALL.len());
        assert_eq!(Needs::of_bits(all.bits()), all);
    }

    #[test]
    fn what_is_lacking_is_refused_by_name() {
        let needs = Needs::PLAIN.with(Need::Tools).with(Need::Images);
        assert_eq!(needs.check(needs, "m"), Ok(()));
        let fault = needs.check(Needs::UPSTREAM, "m").unwrap_err();
        assert_eq!(fault.param.as_deref(), Some("messages"));
        assert_eq!(fault.code.as_deref(), Some("unsupported_parameter"));
        assert_eq!(needs.check(Needs::PLAIN, "m").unwrap_err().param.as_deref(), Some("tools"));
        assert!(Needs::PLAIN.check(Needs::PLAIN, "m").is_ok());
    }
}
