//! What a person or a script reads of a command: lines, tables and one JSON object.
//!
//! With `--json` standard output carries the object alone and everything else goes to standard
//! error, as it does without for messages.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// How a command tells what it does.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    json: bool,
}

impl Report {
    /// For a person, or with `json` for a script.
    #[must_use]
    pub const fn new(json: bool) -> Self {
        Self { json }
    }

    /// Says one line, or several. Where nobody reads any more, it is dropped: a fleet must end in
    /// order also then.
    pub fn say(&self, text: impl std::fmt::Display) {
        let _ = if self.json {
            writeln!(io::stderr().lock(), "{text}")
        } else {
            writeln!(io::stdout().lock(), "{text}")
        };
    }

    /// Says lines, each indented below the last line that was said.
    pub fn detail(&self, text: impl std::fmt::Display) {
        for line in text.to_string().lines() {
            self.say(format_args!("    {line}"));
        }
    }

    /// Shows a command line as a person would type it.
    pub fn command(&self, line: &str) {
        self.say(format_args!("  $ {line}"));
    }

    /// Writes the object, where one is wanted.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn object(&self, object: &impl Serialize) -> io::Result<()> {
        if self.json { print_object(object) } else { Ok(()) }
    }
}

fn print_object(object: &impl Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, object)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// A table without lines, its columns as wide as they need to be.
#[must_use]
pub fn table<const N: usize>(
    head: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head);
    for row in rows {
        table.add_row(row);
    }
    // The first column begins where the line does.
    let text = table.trim_fmt();
    text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_aligned_columns() {
        let rows = [["a".into(), "1".into()], ["long".into(), "22".into()]];
        let text = table(["NAME", "N"], rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let column = lines[0].find('N').and_then(|_| lines[0].rfind('N'));
        assert_eq!(lines[1].find('1'), column);
        assert_eq!(lines[2].find("22"), column);
        assert!(lines[2].starts_with("long"));
    }
}
