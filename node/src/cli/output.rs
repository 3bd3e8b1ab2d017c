//! How a command writes: data on standard output, everything else on standard error.

use std::io::{self, IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use leasehold_keys::exit::Exit;
use leasehold_keys::text;
use leasehold_proto::Span;
use leasehold_proto::base::resource;
use serde::Serialize;

use super::Failure;
use crate::api::body::Quantity;

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal.
    Auto,
    /// Also into a pipe.
    Always,
    /// Not at all.
    Never,
}

/// The narrowest terminal for which cells are broken into lines, in columns.
const MIN_WIDTH: u16 = 60;

/// Nobody reads standard output any more: not an error of the command.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("standard output is closed")]
pub(crate) struct Closed;

/// Where a command writes to, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    /// One object on standard output.
    pub(crate) json: bool,
    /// Standard output is a terminal.
    terminal: bool,
    /// Standard error is a terminal.
    watched: bool,
    /// Colours on standard error.
    color: bool,
}

impl Out {
    pub(super) fn new(json: bool, color: Color) -> Self {
        let (terminal, watched) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let color = match color {
            Color::Auto => watched && !plain,
            Color::Always => true,
            Color::Never => false,
        };
        Self { json, terminal, watched, color }
    }

    /// Whether a person sees what is said.
    pub(crate) const fn watched(&self) -> bool {
        self.watched
    }

    /// Says something to the person.
    #[allow(clippy::unused_self)] // so that every way of writing reads the same
    pub(crate) fn tell(&self, message: &str) {
        // Where standard error is closed there is nobody to tell.
        let _ = writeln!(io::stderr(), "{}", message.trim_end());
    }

    /// Says what went wrong.
    pub(crate) fn error(&self, message: &str) {
        let word = self.red("error:");
        self.tell(&format!("{word} {}", text::shown(message)));
    }

    /// Says what a person should know although it went on.
    pub(crate) fn warn(&self, message: &str) {
        self.tell(&format!("{} {}", self.yellow("warning:"), text::shown(message)));
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }

    pub(crate) fn bold(&self, text: &str) -> String {
        self.painted("1", text)
    }

    fn red(&self, text: &str) -> String {
        self.painted("1;31", text)
    }

    fn yellow(&self, text: &str) -> String {
        self.painted("1;33", text)
    }

    /// Writes data.
    #[allow(clippy::unused_self)] // so that every way of writing reads the same
    pub(crate) fn data(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(why) if why.kind() == io::ErrorKind::BrokenPipe => {
                Err(Failure::new(Exit::Ok, Closed))
            }
            Err(why) => Err(Failure::say(Exit::Io, format!("cannot write the answer: {why}"))),
        }
    }

    /// Writes what a program wrote to standard error.
    #[allow(clippy::unused_self)] // so that every way of writing reads the same
    pub(crate) fn raw_stderr(&self, bytes: &[u8]) -> Result<(), Failure> {
        let written = io::stderr().lock().write_all(bytes);
        written.map_err(|why| Failure::say(Exit::Io, format!("standard error: {why}")))
    }

    /// Writes one JSON object on a line.
    pub(crate) fn object(&self, object: &impl Serialize) -> Result<(), Failure> {
        let value = serde_json::to_value(object)
            .map_err(|why| Failure::say(Exit::Io, format!("cannot write the answer: {why}")))?;
        self.data((text::json(&value) + "\n").as_bytes())
    }

    /// Writes an answer: the object with `--json`, else the text.
    pub(crate) fn answer(
        &self,
        object: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.json { self.object(object) } else { self.data(text().as_bytes()) }
    }

    /// Rows under a header: with lines on a terminal, plain columns in a pipe.
    pub(crate) fn table(&self, header: &[&str], rows: Vec<Vec<String>>) -> String {
        let mut table = Table::new();
        let style = if self.terminal { presets::UTF8_NO_BORDERS } else { presets::NOTHING };
        table.load_style(style);
        // A terminal that says no width, or next to none, is not written for.
        let fits = self.terminal && table.width().is_some_and(|width| width >= MIN_WIDTH);
        table.set_content_arrangement(if fits {
            ContentArrangement::Dynamic
        } else {
            ContentArrangement::Disabled
        });
        table.set_header(header.iter().map(ToString::to_string));
        for row in rows {
            // What another node says of itself must not steer this terminal.
            table.add_row(row.iter().map(|cell| text::shown(cell)));
        }
        if !self.terminal {
            table.column_iter_mut().for_each(|column| {
                column.set_padding((0, 2));
            });
        }
        table.trim_fmt() + "\n"
    }
}

/// Names and values, one a line.
pub(crate) fn page(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:width$}  {}\n", text::shown(value));
    lines.iter().map(line).collect()
}

/// A quantity in few characters.
pub(crate) fn shape(of: &Quantity) -> String {
    let (memory, disk) = (resource::bytes(of.memory), resource::bytes(of.disk));
    let mut text = format!("{} cpu, {memory} memory, {disk} disk", resource::cpu(of.cpu_milli));
    for (kind, count) in &of.gpus {
        text.push_str(&format!(", {count}x {kind}"));
    }
    text
}

/// Milliseconds as people read them.
pub(crate) fn span(ms: u64) -> String {
    Span::millis(ms).to_string()
}

/// The last eight characters of a key, the first twelve of an id: enough to tell them apart.
pub(crate) fn short_key(key: &str) -> String {
    let skip = key.chars().count().saturating_sub(8);
    key.chars().skip(skip).collect()
}

/// The first twelve digits of an id.
pub(crate) fn short_id(id: &str) -> String {
    id.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIPED: Out = Out { json: false, terminal: false, watched: false, color: false };

    #[test]
    fn a_piped_table_is_plain() {
        let rows = vec![vec!["alpha".into(), "1".into()], vec!["b\u{1b}[2J".into(), "22".into()]];
        let table = PIPED.table(&["NAME", "N"], rows);
        assert!(table.is_ascii() || table.contains('\u{fffd}'), "{table}");
        assert!(!table.contains('\u{1b}') && !table.contains('│'), "{table}");
        assert_eq!(table.lines().count(), 3, "{table}");
        assert_eq!(table.lines().next(), Some("NAME   N"), "{table}");
    }

    #[test]
    fn nothing_is_coloured_in_a_pipe() {
        assert_eq!(PIPED.bold("x"), "x");
        let colored = Out { color: true, ..PIPED };
        assert_eq!(colored.bold("x"), "\x1b[1mx\x1b[0m");
    }

    #[test]
    fn keys_and_ids_are_cut_to_what_tells_them_apart() {
        assert_eq!(short_key("12D3KooWabcdefgh"), "abcdefgh");
        assert_eq!(short_key("é"), "é");
        assert_eq!(short_id(&"ab".repeat(32)), "abababababab");
    }

    #[test]
    fn pages_line_up() {
        assert_eq!(page(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }
}
