//! iroh-blobs, a peer of the benchmark of payloads: from one file store to another, by a program of its
//! own (`testnet/peers/iroh-blobs`), which has to be built before.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::{
    payload::{Process, limit},
    temporary,
};

/// What it is called in the lines, and which version its project pins.
pub(super) const NAME: &str = "iroh-blobs";
pub(super) const VERSION: &str = "0.104.0";
/// It leaves the choice to its TLS library, which prefers this one.
pub(super) const CIPHER: &str = "TLS_AES_256_GCM_SHA384";
/// Where the program lies if it was built as its manifest says.
pub(super) const PROGRAM: &str = "target/peers/release/iroh-blobs-peer";

/// The side that has the file. It serves until this is dropped.
pub(super) struct Serving {
    program: PathBuf,
    said: Serves,
    _process: Process,
    _store: tempfile::TempDir,
}

#[derive(Debug, Deserialize)]
struct Serves {
    id: String,
    address: String,
    hash: String,
}

#[derive(Debug, Deserialize)]
struct Fetched {
    seconds: f64,
    bytes: u64,
}

impl Serving {
    /// Imports `file`, whose store goes below `base`, and serves it.
    pub(super) fn start(program: &Path, file: &Path, base: &Path) -> anyhow::Result<Self> {
        ensure!(
            program.exists(),
            "{} is not there: build it as testnet/peers/iroh-blobs/Cargo.toml says, or say --peer",
            program.display()
        );
        let store = temporary(base)?;
        let args = ["serve".as_ref(), store.path().as_os_str(), file.as_os_str()];
        let mut process = Process::start_program(program, &args)?;
        let size = file.metadata()?.len();
        let said = process.says(limit(size)).context("iroh-blobs does not serve")?;
        Ok(Self { program: program.into(), said, _process: process, _store: store })
    }

    /// Fetches the file into a store below `base`. Gives the seconds.
    pub(super) fn fetch(&self, base: &Path, size: u64) -> anyhow::Result<f64> {
        let store = temporary(base)?;
        let Serves { id, address, hash } = &self.said;
        let args: [&OsStr; 5] = [
            "fetch".as_ref(),
            store.path().as_os_str(),
            id.as_ref(),
            address.as_ref(),
            hash.as_ref(),
        ];
        let mut process = Process::start_program(&self.program, &args)?;
        let fetched: Fetched = process.says(limit(size)).context("iroh-blobs does not fetch")?;
        ensure!(fetched.bytes == size, "iroh-blobs fetched {} of {size} bytes", fetched.bytes);
        Ok(fetched.seconds)
    }
}
