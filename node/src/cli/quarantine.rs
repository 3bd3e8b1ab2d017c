//! `leasehold quarantine`: keys whose word does not count, why, and until when.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use leasehold_keys::disk::{self, Existing};
use leasehold_keys::exit::Exit;

use super::output::short_key;
use super::{Failure, Session};
use crate::api::body::{Quarantine as Listed, QuarantineLine, ReinstateRequest, Reinstated};

/// The longest file of a reinstatement that is read, in bytes.
const MAX_FILE: usize = 64 * 1024;

/// Keys that were convicted of saying two different things.
#[derive(Debug, Subcommand)]
pub(super) enum Quarantine {
    /// List them
    List,
    /// Write the proof against one to a file, for `leasehold-keys verify`
    Export(Export),
    /// Let one be believed again, by what its organisation signed
    Reinstate(Reinstate),
}

/// Write the proof against one to a file.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The key, its last characters, or the name of its node
    key: String,
    /// Where to
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

/// Let one be believed again.
#[derive(Debug, Args)]
pub(super) struct Reinstate {
    /// The signed reinstatement
    file: PathBuf,
}

impl Quarantine {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::List => {
                let listed: Listed = session.client.get("/v1/quarantine").await?;
                session.out.answer(&listed, || {
                    let rows = listed.keys.iter().map(row).collect();
                    session.out.table(&["NAME", "KEY", "TWO OF", "EPOCH", "NUMBER"], rows)
                })?;
                session.warn_if_halted().await?;
            }
            Self::Export(args) => args.run(session).await?,
            Self::Reinstate(args) => args.run(session).await?,
        }
        Ok(Exit::Ok)
    }
}

fn row(line: &QuarantineLine) -> Vec<String> {
    vec![
        line.name.clone().unwrap_or_else(|| "-".into()),
        short_key(&line.key),
        line.kind.clone(),
        line.epoch.to_string(),
        line.number.to_string(),
    ]
}

impl Export {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        let listed: Listed = session.client.get("/v1/quarantine").await?;
        let named = |line: &&QuarantineLine| {
            line.key.ends_with(&self.key) || line.name.as_deref() == Some(&self.key)
        };
        let mut found = listed.keys.iter().filter(named);
        let (Some(line), None) = (found.next(), found.next()) else {
            let message = format!("no proof against exactly one key like '{}' is here", self.key);
            return Err(Failure::say(Exit::No, message));
        };
        let existing = if self.force { Existing::Replace } else { Existing::Keep };
        disk::write_atomic(&self.out, line.proof.as_bytes(), 0o644, existing)?;
        session.out.answer(line, || format!("{}\n", self.out.display()))
    }
}

impl Reinstate {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        let bytes = disk::read(&self.file, MAX_FILE)?;
        let reinstatement = String::from_utf8_lossy(&bytes).into_owned();
        let request = ReinstateRequest { reinstatement };
        let path = "/v1/quarantine/reinstate";
        let lifted: Reinstated = session.client.post(path, &request).await?;
        session.out.answer(&lifted, || format!("{}\n", lifted.key))?;
        session.out.tell(&format!(
            "believed again in epochs above {}: the node itself takes it up at its next start",
            lifted.above
        ));
        Ok(())
    }
}
