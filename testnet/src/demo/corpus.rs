//! The demo's input: some megabytes of real text, gathered from what a build of this repository
//! has on disk anyway: its own sources, documents and lock file, then sources of the crates it
//! depends on, in the order of the lock file, until there is enough.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// How much is gathered, where there is so much, in bytes.
const ENOUGH: usize = 6_000_000;
/// Less than this is not worth a demonstration, in bytes.
const LEAST: usize = 1_000_000;
/// Larger files are mostly tables that some program wrote, in bytes.
const LARGEST: u64 = 200_000;
/// How deep directories are looked into.
const DEEP: usize = 12;

/// A text and where it comes from.
#[derive(Debug)]
pub(super) struct Corpus {
    pub(super) text: Vec<u8>,
    from: String,
}

impl fmt::Display for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.from)
    }
}

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
pub(super) enum CorpusError {
    /// A file that was named.
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    /// Not enough was found.
    #[error("only {0} bytes of text are found in {1}: name a text of some megabytes with --input")]
    Little(usize, PathBuf),
}

impl Corpus {
    /// The text of one file.
    pub(super) fn read(path: &Path) -> Result<Self, CorpusError> {
        let text = fs::read(path);
        let text = text.map_err(|source| CorpusError::Read { path: path.into(), source })?;
        Ok(Self { text, from: path.display().to_string() })
    }

    /// What there is in `repository`, and in `registries`, the directories where cargo unpacks
    /// crates.
    pub(super) fn gather(repository: &Path, registries: &[PathBuf]) -> Result<Self, CorpusError> {
        let mut text = Vec::new();
        let mut own = 0;
        for part in ["proto", "keys", "node", "testnet", "docs", "README.md", "Cargo.lock"] {
            own += take(&repository.join(part), &mut text, DEEP);
        }
        let mut from = format!("{own} files of this repository");
        let lock = fs::read_to_string(repository.join("Cargo.lock")).unwrap_or_default();
        let (mut files, mut crates) = (0, 0);
        for name in dependencies(&lock) {
            if text.len() >= ENOUGH {
                break;
            }
            let unpacked = registries.iter().map(|registry| registry.join(&name).join("src"));
            if let Some(dir) = unpacked.into_iter().find(|dir| dir.is_dir()) {
                files += take(&dir, &mut text, DEEP);
                crates += 1;
            }
        }
        if crates > 0 {
            from.push_str(&format!(" and {files} of {crates} crates it is built from"));
        }
        if text.len() < LEAST {
            return Err(CorpusError::Little(text.len(), repository.into()));
        }
        Ok(Self { text, from })
    }
}

/// The directories where cargo unpacks crates, for the user of this process.
pub(super) fn registries() -> Vec<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = set("CARGO_HOME").or_else(|| Some(set("HOME")?.join(".cargo")));
    let sources = home.and_then(|home| fs::read_dir(home.join("registry/src")).ok());
    let mut found: Vec<_> = sources.into_iter().flatten().flatten().map(|e| e.path()).collect();
    found.sort();
    found
}

/// `name-version` of each package in a lock file that comes from a registry.
fn dependencies(lock: &str) -> Vec<String> {
    let parsed = lock.parse::<toml::Table>().unwrap_or_default();
    let packages = parsed.get("package").and_then(toml::Value::as_array);
    let named = packages.into_iter().flatten().filter_map(|package| {
        package.get("source")?;
        let text = |field| package.get(field)?.as_str();
        Some(format!("{}-{}", text("name")?, text("version")?))
    });
    named.collect()
}

/// Appends the texts at or below `path`, in the order of their names; gives how many files. What
/// cannot be read is left out: the demonstration is not about it.
fn take(path: &Path, text: &mut Vec<u8>, deep: usize) -> usize {
    if text.len() >= ENOUGH {
        return 0;
    }
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    if metadata.is_dir() && deep > 0 {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        return paths.iter().map(|path| take(path, text, deep - 1)).sum();
    }
    let ending = path.extension().and_then(|ending| ending.to_str());
    let is_text = ending.is_none_or(|e| matches!(e, "rs" | "md" | "toml" | "lock" | "json"));
    if !metadata.is_file() || !is_text || metadata.len() > LARGEST {
        return 0;
    }
    match fs::read(path) {
        Ok(bytes) if std::str::from_utf8(&bytes).is_ok() => {
            text.extend(bytes);
            1
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_of_a_registry_are_named_as_cargo_unpacks_them() {
        let lock = "version = 4\n[[package]]\nname = 'a'\nversion = '1.0.0'\nsource = 'r'\n\
            [[package]]\nname = 'mine'\nversion = '0.1.0'\n";
        assert_eq!(dependencies(lock), ["a-1.0.0"]);
        assert!(dependencies("nonsense").is_empty());
    }

    #[test]
    fn this_repository_is_a_text_of_some_size() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let corpus = Corpus::gather(&repository, &[]).expect("gathers");
        assert!(corpus.text.len() >= LEAST && std::str::from_utf8(&corpus.text).is_ok());
        assert!(corpus.to_string().contains("files of this repository"));
        // The same again: its root names it.
        assert_eq!(Corpus::gather(&repository, &[]).expect("gathers").text, corpus.text);
        let empty = tempfile::tempdir().expect("room");
        assert!(matches!(Corpus::gather(empty.path(), &[]), Err(CorpusError::Little(0, _))));
    }
}
