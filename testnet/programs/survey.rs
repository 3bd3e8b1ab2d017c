//! `survey`: what a text is made of. The program that the demo runs on leased capacity.
//!
//! Reads every file under `/in`, in the order of their names, as one text, and prints its size,
//! its words, the most frequent words and phrases of three words, and the entropy of a byte given
//! the bytes before it, which bounds how small any compressor of that memory could make the text.
//! Writes `/out/words.tsv`: every word with its count, the most frequent first.
//!
//! ```text
//! survey [--top N]        N words and phrases are printed, 8 when not said
//! ```
//!
//! Plain Rust with nothing but the standard library, so that any compiler with a WASI target
//! builds it (Rust 1.63 and later): see scripts/build-programs.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::exit;

/// Runs of letters that count as words, by length: a single letter is mostly part of something
/// else, and what is longer is data.
const WORD: std::ops::RangeInclusive<usize> = 2..=40;

fn main() {
    let top = match arguments() {
        Ok(top) => top,
        Err(why) => {
            eprintln!("survey: {}", why);
            exit(2);
        }
    };
    if let Err(why) = survey(top) {
        eprintln!("survey: {}", why);
        exit(1);
    }
}

fn arguments() -> Result<usize, String> {
    let mut top = 8;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg != "--top" {
            return Err(format!("no such argument: {}", arg));
        }
        let number = args.next().and_then(|text| text.parse().ok());
        top = number.ok_or_else(|| "--top wants a number".to_string())?;
    }
    Ok(top)
}

fn survey(top: usize) -> io::Result<()> {
    let (files, text) = read_all("/in")?;
    let counted = Counted::of(&text);
    let words = ranked(counted.words.iter().map(|word| word.count as u64).enumerate());

    let mut table = String::new();
    for &(id, count) in &words {
        let _ = writeln!(table, "{}\t{}", counted.words[id].text, count);
    }
    fs::write("/out/words.tsv", table)?;

    let mut said = String::new();
    let lines = text.iter().filter(|&&byte| byte == b'\n').count();
    let _ = writeln!(said, "{} in {} file(s), {} lines", size(text.len()), files, lines);
    let _ = writeln!(
        said,
        "{} words, {} of them distinct, {} distinct phrases of three",
        counted.total,
        counted.words.len(),
        counted.phrases.len()
    );
    let line: Vec<String> = words
        .iter()
        .take(top)
        .map(|&(id, count)| format!("{} {}", counted.words[id].text, count))
        .collect();
    let _ = writeln!(said, "words:   {}", line.join(", "));
    // Ties are broken by the words themselves, so that the same text gives the same lines.
    let mut phrases: Vec<(&[u32; 3], u32)> =
        counted.phrases.iter().map(|(phrase, count)| (phrase, *count)).collect();
    let name = |phrase: &[u32; 3]| {
        let words = phrase.iter().map(|&id| counted.words[id as usize].text.as_str());
        words.collect::<Vec<_>>().join(" ")
    };
    let key = |&(phrase, count): &(&[u32; 3], u32)| (u32::MAX - count, *phrase);
    phrases.sort_unstable_by_key(key);
    let line: Vec<String> =
        phrases.iter().take(top).map(|&(p, count)| format!("{} {}", name(p), count)).collect();
    let _ = writeln!(said, "phrases: {}", line.join(", "));
    let line: Vec<String> = (0..4).map(|order| format!("{:.3}", entropy(&text, order))).collect();
    let _ = writeln!(said, "entropy: {} bits a byte, given 0, 1, 2, 3 before", line.join(", "));
    io::stdout().write_all(said.as_bytes())
}

/// Every file under a directory as one text.
fn read_all(dir: &str) -> io::Result<(usize, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir)? {
        paths.push(entry?.path());
    }
    paths.sort();
    let mut text = Vec::new();
    for path in &paths {
        text.extend(fs::read(path)?);
    }
    Ok((paths.len(), text))
}

struct Word {
    text: String,
    count: u32,
}

/// The words of a text, each with a number, and its phrases as three such numbers.
struct Counted {
    words: Vec<Word>,
    total: u64,
    phrases: HashMap<[u32; 3], u32>,
}

impl Counted {
    fn of(text: &[u8]) -> Self {
        let mut counted = Counted { words: Vec::new(), total: 0, phrases: HashMap::new() };
        let mut ids: HashMap<String, u32> = HashMap::new();
        let mut last: Vec<u32> = Vec::new();
        let mut word = String::new();
        // One byte more than there is ends the last word.
        for &byte in text.iter().chain(b"\n") {
            if byte.is_ascii_alphabetic() {
                word.push(byte.to_ascii_lowercase() as char);
                continue;
            }
            if WORD.contains(&word.len()) {
                let id = match ids.get(&word) {
                    Some(&id) => id,
                    None => {
                        let id = counted.words.len() as u32;
                        ids.insert(word.clone(), id);
                        counted.words.push(Word { text: word.clone(), count: 0 });
                        id
                    }
                };
                counted.words[id as usize].count += 1;
                counted.total += 1;
                last.push(id);
                if let [.., a, b, c] = last[..] {
                    *counted.phrases.entry([a, b, c]).or_insert(0) += 1;
                }
                if last.len() > 3 {
                    last.remove(0);
                }
            }
            word.clear();
        }
        counted
    }
}

/// The most frequent first; equals in the order of their numbers.
fn ranked(counts: impl Iterator<Item = (usize, u64)>) -> Vec<(usize, u64)> {
    let mut ranked: Vec<(usize, u64)> = counts.collect();
    ranked.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked
}

/// Bits of a byte given `order` bytes before it, by the text's own frequencies: the conditional
/// entropy of Shannon's "A Mathematical Theory of Communication" (1948), section 7.
fn entropy(text: &[u8], order: usize) -> f64 {
    // An n-gram of at most four bytes is a number.
    let grams = |length: usize| {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for window in text.windows(length) {
            let gram = window.iter().fold(0, |gram, &byte| gram << 8 | byte as u32);
            *counts.entry(gram).or_insert(0) += 1;
        }
        counts
    };
    let bits = |counts: &HashMap<u32, u32>| {
        let total: f64 = counts.values().map(|&count| count as f64).sum();
        // Summed in a fixed order: the order of a map is another one in each run.
        let mut values: Vec<u32> = counts.values().copied().collect();
        values.sort_unstable();
        values.iter().map(|&count| count as f64 / total).map(|p| -p * p.log2()).sum::<f64>()
    };
    let before = if order == 0 { 0.0 } else { bits(&grams(order)) };
    (bits(&grams(order + 1)) - before).max(0.0)
}

fn size(bytes: usize) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}
