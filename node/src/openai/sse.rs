//! Server-sent events: read bit by bit within a bound, and written.
//!
//! The reader follows the HTML standard, "interpreting an event stream": lines end with `\n`,
//! `\r\n` or `\r`, wherever the bytes were split; a byte order mark at the very beginning, comments
//! and unknown fields count for nothing; an event that the end cuts off is none.

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;

use super::Endpoint;
use super::fault::Fault;
use super::json::{Key, Object};

/// The data of the last event of a stream.
pub const DONE: &[u8] = b"[DONE]";
/// The longest event that is read, in bytes: its data, its name and what is begun of a line.
pub const EVENT: usize = 1 << 20;
/// A comment that keeps a connection from looking dead.
pub const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";
/// The event that ends a stream, but for those of `/v1/responses`.
const END: &[u8] = b"data: [DONE]\n\n";

/// An event is longer than is read. The stream is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("an event has more than {0} bytes")]
pub struct TooLong(pub usize);

/// Something that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// `event`, where it was given; anything that is not UTF-8 in it was replaced.
    pub name: Option<String>,
    /// `data`, the lines of it joined by `\n`.
    pub data: Bytes,
}

impl Event {
    /// Whether it says that the stream is complete.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.data.trim_ascii() == DONE
    }
}

/// Reads events from bytes as they come.
#[derive(Debug)]
pub struct Parser {
    most: usize,
    /// What was given and is not read yet.
    given: Bytes,
    /// A line whose end has not come yet.
    line: BytesMut,
    /// The last byte read was `\r`: a `\n` belongs to it.
    after_cr: bool,
    /// Nothing was read yet, so a byte order mark may come.
    at_start: bool,
    name: Option<String>,
    data: Option<Data>,
    spoilt: bool,
}

/// The data of the event that is being read.
#[derive(Debug)]
enum Data {
    /// One line, which is not copied.
    One(Bytes),
    Many(BytesMut),
}

impl Data {
    fn len(&self) -> usize {
        match self {
            Self::One(line) => line.len(),
            Self::Many(lines) => lines.len(),
        }
    }
}

impl Default for Parser {
    fn default() -> Self {
        Self::new(EVENT)
    }
}

impl Parser {
    /// A reader of events of at most so many bytes.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            most,
            given: Bytes::new(),
            line: BytesMut::new(),
            after_cr: false,
            at_start: true,
            name: None,
            data: None,
            spoilt: false,
        }
    }

    /// Takes bytes. Events that they complete come from [`Parser::next_event`], which is to be
    /// asked until it has none before more is given: otherwise what waits is copied together.
    pub fn push(&mut self, bytes: Bytes) {
        if self.given.is_empty() {
            self.given = bytes;
        } else {
            let mut both = BytesMut::with_capacity(self.given.len() + bytes.len());
            both.extend_from_slice(&self.given);
            both.extend_from_slice(&bytes);
            self.given = both.freeze();
        }
    }

    /// The next event that is complete.
    ///
    /// # Errors
    /// When an event is too long, now and ever after.
    pub fn next_event(&mut self) -> Result<Option<Event>, TooLong> {
        if self.spoilt {
            return Err(TooLong(self.most));
        }
        while let Some(line) = self.next_line()? {
            if line.is_empty() {
                let name = self.name.take();
                let Some(data) = self.data.take() else { continue };
                let data = match data {
                    Data::One(line) => line,
                    Data::Many(lines) => lines.freeze(),
                };
                return Ok(Some(Event { name, data }));
            }
            self.field(line)?;
        }
        Ok(None)
    }

    /// Whether an event has begun that is not complete. At the end of a stream it was cut off.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.data.is_some() || !self.line.is_empty() || !self.given.is_empty()
    }

    fn next_line(&mut self) -> Result<Option<Bytes>, TooLong> {
        if self.after_cr && !self.given.is_empty() {
            self.after_cr = false;
            if self.given.first() == Some(&b'\n') {
                self.given.advance(1);
            }
        }
        let end = self.given.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        let Some(end) = end else {
            self.room(self.given.len())?;
            self.line.extend_from_slice(&self.given);
            self.given = Bytes::new();
            return Ok(None);
        };
        self.room(end)?;
        let mut line = self.given.split_to(end);
        self.after_cr = self.given.first() == Some(&b'\r');
        self.given.advance(1);
        if self.after_cr && self.given.first() == Some(&b'\n') {
            self.given.advance(1);
            self.after_cr = false;
        }
        if !self.line.is_empty() {
            self.line.extend_from_slice(&line);
            line = self.line.split().freeze();
        }
        if self.at_start {
            self.at_start = false;
            if line.starts_with(b"\xef\xbb\xbf") {
                line.advance(3);
            }
        }
        Ok(Some(line))
    }

    /// Whether so much more may stand in this event.
    fn room(&mut self, more: usize) -> Result<(), TooLong> {
        let name = self.name.as_ref().map_or(0, String::len);
        let data = self.data.as_ref().map_or(0, Data::len);
        if self.line.len() + name + data + more <= self.most {
            return Ok(());
        }
        self.spoilt = true;
        self.line = BytesMut::new();
        self.given = Bytes::new();
        self.data = None;
        Err(TooLong(self.most))
    }

    fn field(&mut self, mut line: Bytes) -> Result<(), TooLong> {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let field = line.split_to(colon);
        if !line.is_empty() {
            line.advance(1);
            if line.first() == Some(&b' ') {
                line.advance(1);
            }
        }
        match &field[..] {
            b"data" => {
                // A newline for each line, so that empty ones count as well.
                self.room(line.len() + 1)?;
                self.data = Some(match self.data.take() {
                    None => Data::One(line),
                    Some(Data::One(first)) => {
                        let mut lines = BytesMut::with_capacity(first.len() + line.len() + 1);
                        lines.extend_from_slice(&first);
                        lines.extend_from_slice(b"\n");
                        lines.extend_from_slice(&line);
                        Data::Many(lines)
                    }
                    Some(Data::Many(mut lines)) => {
                        lines.extend_from_slice(b"\n");
                        lines.extend_from_slice(&line);
                        Data::Many(lines)
                    }
                });
            }
            b"event" => self.name = Some(String::from_utf8_lossy(&line).into_owned()),
            // Comments, `id` and `retry` among them: nobody reconnects to a generation.
            _ => {}
        }
        Ok(())
    }
}

/// Appends an event. JSON that spans lines becomes as many `data` lines.
pub fn write(out: &mut BytesMut, name: Option<&str>, data: &[u8]) {
    if let Some(name) = name {
        out.extend_from_slice(b"event: ");
        // A line break would begin another field.
        out.extend(name.bytes().filter(|byte| !matches!(byte, b'\n' | b'\r')));
        out.extend_from_slice(b"\n");
    }
    out.reserve(data.len() + 8);
    let mut rest = data;
    loop {
        out.extend_from_slice(b"data: ");
        let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
            out.extend_from_slice(rest);
            out.extend_from_slice(b"\n\n");
            return;
        };
        out.extend_from_slice(&rest[..end]);
        out.extend_from_slice(b"\n");
        let crlf = rest[end..].starts_with(b"\r\n");
        rest = &rest[end + 1 + usize::from(crlf)..];
    }
}

/// The event with a piece of an answer. Those of `/v1/responses` are named by the `type` of what
/// they carry.
#[must_use]
pub fn piece(endpoint: Endpoint, data: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(data.len() + 64);
    if endpoint == Endpoint::Responses {
        let text = std::str::from_utf8(data).unwrap_or_default();
        let object = Object::read(text).ok();
        let kind = object.as_ref().and_then(|object| object.get("type"));
        let kind = kind.and_then(|kind| serde_json::from_str::<Key<'_>>(kind.get()).ok());
        write(&mut out, kind.as_ref().map(|Key(kind)| kind.as_ref()), data);
    } else {
        write(&mut out, None, data);
    }
    out.freeze()
}

/// What comes after the last piece. Of `/v1/responses` the last event says that it is.
#[must_use]
pub const fn end(endpoint: Endpoint) -> Bytes {
    Bytes::from_static(match endpoint {
        Endpoint::Responses => b"",
        Endpoint::Chat | Endpoint::Completions | Endpoint::Embeddings => END,
    })
}

/// The event that says within a stream that it failed. No [`end`] comes after it.
#[must_use]
pub fn error(endpoint: Endpoint, fault: &Fault) -> Bytes {
    let body = fault.body();
    if endpoint != Endpoint::Responses {
        return piece(endpoint, &body);
    }
    // As OpenAI sends it: an event of that type, with the body's error in it.
    let inside = body.strip_prefix(b"{").unwrap_or_default();
    piece(endpoint, &[&b"{\"type\":\"error\","[..], inside].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::dice::Dice;

    fn all(pieces: &[&[u8]], most: usize) -> Result<Vec<Event>, TooLong> {
        let mut parser = Parser::new(most);
        let mut events = Vec::new();
        for piece in pieces {
            parser.push(Bytes::copy_from_slice(piece));
            while let Some(event) = parser.next_event()? {
                events.push(event);
            }
        }
        Ok(events)
    }

    fn texts(events: &[Event]) -> Vec<String> {
        events.iter().map(|event| String::from_utf8_lossy(&event.data).into_owned()).collect()
    }

    #[test]
    fn events_are_read_as_the_standard_has_them() {
        for (stream, expected) in [
            ("data: a\n\ndata: b\n\n", vec!["a", "b"]),
            ("data:a\r\n\r\ndata:  b\r\r", vec!["a", " b"]),
            (": ping\n\ndata\n\ndata: x\ndata: y\n\n", vec!["", "x\ny"]),
            ("\u{feff}data: a\n\n\n\n", vec!["a"]),
            ("data: a\n\u{feff}data: b\n\n", vec!["a"]),
            ("id: 1\nretry: 2\nother\ndata: a\n\n", vec!["a"]),
            ("data: cut", vec![]),
            ("data: cut\n", vec![]),
            ("event: x\n\ndata: a\n\n", vec!["a"]),
            ("data: [DONE]\n\n", vec!["[DONE]"]),
            ("", vec![]),
        ] {
            let whole = all(&[stream.as_bytes()], 100).unwrap();
            assert_eq!(texts(&whole), expected, "{stream:?}");
            let bytes: Vec<&[u8]> = stream.as_bytes().chunks(1).collect();
            assert_eq!(all(&bytes, 100).unwrap(), whole, "{stream:?}, byte by byte");
        }
        let events = all(&[b"event: message\ndata: [DONE] \n\n"], 100).unwrap();
        assert_eq!(events[0].name.as_deref(), Some("message"));
        assert!(events[0].is_done());
    }

    #[test]
    fn long_events_are_refused_for_good() {
        assert!(all(&[b"data: 123456789\n\n"], 16).is_ok());
        let line = [b"data: ".as_slice(), &[b'x'; 100]].concat();
        let bits: Vec<&[u8]> = line.chunks(3).collect();
        assert_eq!(all(&bits, 32), Err(TooLong(32)));
        assert_eq!(all(&[&b"data: \n".repeat(100)], 32), Err(TooLong(32)));
        assert_eq!(all(&[&b":".repeat(100)], 32), Err(TooLong(32)));
        // Comments that end cost nothing, however many.
        assert!(all(&[&b": keep-alive\n\n".repeat(1_000)], 32).is_ok());
        let mut parser = Parser::new(4);
        parser.push(Bytes::from_static(b"data: too long\n\ndata: a\n\n"));
        assert!(parser.next_event().is_err() && parser.next_event().is_err());
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut out = BytesMut::new();
        write(&mut out, None, b"{\"a\":1}");
        write(&mut out, Some("na\nme"), b"{\n\"a\":\r\n1}\r");
        write(&mut out, None, b"");
        out.extend_from_slice(KEEP_ALIVE);
        out.extend_from_slice(&error(Endpoint::Chat, &Fault::internal()));
        out.extend_from_slice(&end(Endpoint::Chat));
        let events = all(&[&out], EVENT).unwrap();
        assert_eq!(events.len(), 5);
        assert_eq!(events[0].data, "{\"a\":1}");
        assert_eq!(events[1].name.as_deref(), Some("name"));
        assert_eq!(events[1].data, "{\n\"a\":\n1}\n");
        assert!(events[3].data.starts_with(b"{\"error\":{"));
        assert!(events[4].is_done());
    }

    #[test]
    fn events_of_responses_have_names() {
        let response = |data: &[u8]| piece(Endpoint::Responses, data);
        let event = response(br#"{"type":"response.done","a":1}"#);
        assert_eq!(event, "event: response.done\ndata: {\"type\":\"response.done\",\"a\":1}\n\n");
        assert_eq!(response(b"{\"type\":1}"), "data: {\"type\":1}\n\n");
        assert_eq!(response(b"x"), "data: x\n\n");
        assert!(end(Endpoint::Responses).is_empty());
        let failed = error(Endpoint::Responses, &Fault::internal());
        let failed = all(&[&failed], 4_096).expect("reads").remove(0);
        assert_eq!(failed.name.as_deref(), Some("error"));
        let said: serde_json::Value = serde_json::from_slice(&failed.data).expect("JSON");
        assert_eq!(
            (&said["type"], &said["error"]["code"]),
            (&"error".into(), &"internal_error".into())
        );
    }

    #[test]
    fn any_bytes_split_anywhere_give_the_same() {
        let mut dice = Dice::new(1);
        let mut roll = |sides| dice.roll(sides);
        let words: [&[u8]; 12] = [
            b"data",
            b":",
            b" ",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            b"event",
            b"\xef\xbb\xbf",
            b"\xff",
            b"[DONE]",
            b"{\"a\":\"b\"}",
        ];
        for _ in 0..3_000 {
            let stream: Vec<u8> =
                (0..roll(40)).flat_map(|_| words[roll(words.len())]).copied().collect();
            let whole = all(&[&stream], 64);
            let mut pieces = Vec::new();
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(1 + roll(rest.len()));
                pieces.push(now);
                rest = later;
            }
            assert_eq!(all(&pieces, 64).is_ok(), whole.is_ok());
            if let Ok(whole) = whole {
                assert_eq!(
                    all(&pieces, 64).unwrap(),
                    whole,
                    "{:?}",
                    String::from_utf8_lossy(&stream)
                );
            }
        }
    }
}
