//! `new`, `show`, `import`, `export`: key files.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use leasehold_keys::disk;
use leasehold_keys::exit::Exit;
use leasehold_keys::file::{self, Kdf, Protection, Secret};
use leasehold_keys::pkcs8;
use leasehold_proto::KeyId;
use serde_json::json;

use super::{Answer, Failure, Protect, Unlock, existing, tell};

/// The longest file of another tool that is read, in bytes.
const MAX_FOREIGN: usize = 16 * 1024;

/// Make a key and print its id.
#[derive(Debug, Args)]
pub(super) struct New {
    /// Where to write it
    #[arg(long, value_name = "FILE", default_value = "leasehold.key")]
    out: PathBuf,
    #[command(flatten)]
    protect: Protect,
    /// Replace an existing file; the key in it is lost
    #[arg(long)]
    force: bool,
}

/// Show a key file.
#[derive(Debug, Args)]
pub(super) struct Show {
    /// The key file
    file: PathBuf,
}

/// The formats of other tools.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// An Ed25519 private key as RFC 8410 has it, in PEM, in clear
    Pkcs8,
}

/// Take a key of another tool.
#[derive(Debug, Args)]
pub(super) struct Import {
    /// The other tool's file (mode 0600)
    file: PathBuf,
    /// Its format
    #[arg(long, value_enum, default_value = "pkcs8")]
    format: Format,
    /// Where to write the key file
    #[arg(long, value_name = "FILE", default_value = "leasehold.key")]
    out: PathBuf,
    #[command(flatten)]
    protect: Protect,
    /// Replace an existing file; the key in it is lost
    #[arg(long)]
    force: bool,
}

/// Write a key for another tool.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The key file
    file: PathBuf,
    /// The format to write
    #[arg(long, value_enum, default_value = "pkcs8")]
    format: Format,
    /// Where to write it, in clear, with mode 0600
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    unlock: Unlock,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

fn stored(id: &KeyId, path: &Path, encrypted: bool) -> Answer {
    let json = json!({ "id": id, "file": path, "encrypted": encrypted });
    Answer::new(format!("{id}\n"), json)
}

/// Refuses before a passphrase is asked for; the write itself decides.
fn vacant(path: &Path, force: bool) -> Result<(), Failure> {
    if !force && path.symlink_metadata().is_ok() {
        return Err(disk::WriteError::Exists { path: path.into() }.into());
    }
    Ok(())
}

impl New {
    pub(super) fn run(self) -> Result<Answer, Failure> {
        vacant(&self.out, self.force)?;
        let protection = self.protect.protection(&self.out.display().to_string())?;
        let secret = Secret::generate().map_err(file::CreateError::from)?;
        let id = file::create(&self.out, &secret, &protection, existing(self.force))?;
        Ok(stored(&id, &self.out, matches!(protection, Protection::Passphrase(..))))
    }
}

impl Show {
    pub(super) fn run(self) -> Result<Answer, Failure> {
        let file::Described { id, kdf } = file::describe(&self.file)?;
        let protection = match kdf {
            None => "none: whoever reads the file has the key".to_string(),
            Some(Kdf { memory_kib, passes, lanes }) => format!(
                "passphrase, XChaCha20-Poly1305, Argon2id with {} MiB, {passes} passes, \
                 {lanes} lanes",
                memory_kib / 1024
            ),
        };
        let text = format!("id          {id}\nalgorithm   Ed25519\nprotection  {protection}\n");
        let json = json!({
            "id": id, "file": self.file, "algorithm": "ed25519",
            "encrypted": kdf.is_some(),
            "kdf": kdf.map(|Kdf { memory_kib, passes, lanes }| json!({
                "algorithm": "argon2id", "memory_kib": memory_kib, "passes": passes,
                "lanes": lanes,
            })),
        });
        Ok(Answer::new(text, json))
    }
}

impl Import {
    pub(super) fn run(self) -> Result<Answer, Failure> {
        let Format::Pkcs8 = self.format;
        vacant(&self.out, self.force)?;
        let text = disk::read_private(&self.file, MAX_FOREIGN)?;
        let secret = pkcs8::read(&text).map_err(|why| {
            Failure::new(Exit::Io, anyhow::Error::new(why).context(self.file.display().to_string()))
        })?;
        let protection = self.protect.protection(&self.out.display().to_string())?;
        let id = file::create(&self.out, &secret, &protection, existing(self.force))?;
        Ok(stored(&id, &self.out, matches!(protection, Protection::Passphrase(..))))
    }
}

impl Export {
    pub(super) fn run(self) -> Result<Answer, Failure> {
        let Format::Pkcs8 = self.format;
        vacant(&self.out, self.force)?;
        let secret = file::load(&self.file, &self.unlock.source())?;
        let text = pkcs8::write(&secret);
        disk::write_atomic(&self.out, text.as_bytes(), 0o600, existing(self.force))?;
        tell(&format!("warning: {} holds the key in clear", self.out.display()));
        Ok(stored(&secret.id(), &self.out, false))
    }
}
