//! What leaves a model as text, token by token.
//!
//! A token may end within a character, and a stop string may begin in one token and end in another:
//! so what might still become either is held back, and no more than that.

use super::tokenizer::Tokenizer;

/// The text of one sequence as it comes.
#[derive(Debug)]
pub(super) struct Text {
    /// The bytes of a character that is not whole yet.
    partial: Vec<u8>,
    /// Characters that may begin a stop string.
    held: String,
    stops: Vec<String>,
}

impl Text {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { partial: Vec::new(), held: String::new(), stops }
    }

    /// Takes a token in. Gives the text that may leave, and whether a stop string is complete (it
    /// and what comes after it never leave).
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> (String, bool) {
        if !tokenizer.is_control(token) {
            self.partial.extend_from_slice(tokenizer.bytes(token));
            whole(&mut self.partial, &mut self.held);
        }
        self.release()
    }

    /// No more tokens come: what was held back.
    pub(super) fn finish(&mut self) -> String {
        let partial = std::mem::take(&mut self.partial);
        self.held.push_str(&String::from_utf8_lossy(&partial));
        let (mut out, stopped) = self.release();
        if !stopped {
            out.push_str(&self.held);
        }
        self.held.clear();
        out
    }

    fn release(&mut self) -> (String, bool) {
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        if let Some(at) = found {
            let out = self.held[..at].to_owned();
            self.held.clear();
            self.partial.clear();
            return (out, true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// How many bytes at the end of `text` begin `stop`, but are not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len().saturating_sub(1));
    (1..=most)
        .rev()
        .find(|n| text.as_bytes()[text.len() - n..] == stop.as_bytes()[..*n])
        .unwrap_or(0)
}

/// Moves whole characters from `bytes` to `text`; bytes that can belong to none become U+FFFD.
fn whole(bytes: &mut Vec<u8>, text: &mut String) {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                at = bytes.len();
                break;
            }
            Err(error) => {
                let good = at + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[at..good]));
                at = good;
                // None: more bytes may complete it.
                let Some(bad) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                at += bad;
            }
        }
    }
    bytes.drain(..at);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pushed(stops: &[&str], pieces: &[&[u8]]) -> (String, bool) {
        let mut text = Text::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut out = String::new();
        for piece in pieces {
            text.partial.extend_from_slice(piece);
            whole(&mut text.partial, &mut text.held);
            let (more, stopped) = text.release();
            out.push_str(&more);
            if stopped {
                return (out, true);
            }
        }
        out.push_str(&text.finish());
        (out, false)
    }

    #[test]
    fn characters_leave_whole_however_they_come() {
        let text = "naïve 日本 😀 end";
        for size in 1..5 {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            assert_eq!(pushed(&[], &pieces), (text.to_owned(), false));
        }
        let broken: [&[u8]; 3] = [b"a\xff", b"\xf0\x9f", b"b\xe6\x97"];
        assert_eq!(pushed(&[], &broken).0, "a\u{fffd}\u{fffd}b\u{fffd}");
    }

    #[test]
    fn a_stop_string_is_found_across_tokens_and_never_leaves() {
        assert_eq!(pushed(&["STOP"], &[b"go ST", b"O", b"P on"]), ("go ".into(), true));
        assert_eq!(pushed(&["STOP"], &[b"go ST", b"AY"]), ("go STAY".into(), false));
        assert_eq!(pushed(&["STOP"], &[b"go ST"]), ("go ST".into(), false));
        assert_eq!(pushed(&["aab"], &[b"a", b"a", b"a", b"b"]), ("a".into(), true));
        assert_eq!(pushed(&["xyz", "b"], &[b"ab", b"xyz"]), ("a".into(), true));
        assert_eq!(pushed(&["\u{65e5}"], &[b"a\xe6", b"\x97\xa5"]), ("a".into(), true));
    }

    #[test]
    fn what_leaves_early_is_all_that_may() {
        let mut text = Text::new(vec!["\n\n".into()]);
        text.held.push_str("one\n");
        assert_eq!(text.release(), ("one".into(), false));
        text.held.push('x');
        assert_eq!(text.release(), ("\nx".into(), false));
    }
}
