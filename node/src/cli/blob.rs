//! `leasehold blob`: payloads, by hand: import, get, export, files, list, stat, pin, verify, remove.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use hyper::Method;
use leasehold_keys::exit::Exit;
use leasehold_proto::base::resource;
use leasehold_proto::words::index::MAX_BYTES;
use serde_json::{Value, json};

use super::output::{page, short_key, span};
use super::transfer::{self, Fetched};
use super::{Failure, Session, directory, find};
use crate::api::body::{IndexStat, PayloadStat, Payloads};
use crate::client::ClientError;
use crate::payload::Root;

/// Reading a payload against its name takes a second for so many bytes at least.
const VERIFY_RATE: u64 = 20 << 20;

/// How much longer than another answer the removal of an index and of all that it names may take.
const REMOVING: Duration = Duration::from_secs(300);

/// Payloads: bytes named by their BLAKE3 root.
#[derive(Debug, Subcommand)]
pub(super) enum Blob {
    /// Give a file or a directory to the node, and print its root
    Import(Import),
    /// Have the node fetch a payload from whoever has it
    Get(Get),
    /// Write a payload that the node holds to a file, or an index's files to a directory
    Export(Export),
    /// List the files that an index names
    Files(Files),
    /// List the payloads that the node holds
    #[command(alias = "ls")]
    List(List),
    /// Show whether the node holds a payload, and who else does
    Stat(One),
    /// Keep payloads, whatever else needs their room
    Pin(Several),
    /// Let payloads make room again
    Unpin(Several),
    /// Read payloads against their names, and set aside what does not match
    #[command(alias = "scrub")]
    Verify(Verify),
    /// Remove payloads from the node
    Rm(Remove),
}

/// Give a file or a directory to the node, and print its root: that of an index where it is a directory.
#[derive(Debug, Args)]
pub(super) struct Import {
    /// The files and directories; `-` is standard input
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// Have the node fetch a payload from whoever has it.
#[derive(Debug, Args)]
pub(super) struct Get {
    /// Its root, 64 hexadecimal digits
    root: Root,
    /// How many bytes it has, if you know: else a holder has to prove it
    #[arg(long, value_name = "BYTES")]
    size: Option<u64>,
    /// It is an index: fetch all that it names as well
    #[arg(long)]
    index: bool,
    /// Also write it to this file; `-` is standard output. With --index, its files to this directory,
    /// which must be new or empty
    #[arg(long, short, value_name = "PATH")]
    output: Option<PathBuf>,
}

/// Write a payload that the node holds to a file.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// Its root, or the first digits
    root: String,
    /// Where to: a file, or `-`, which is standard output; with --index a directory, new or empty
    #[arg(value_name = "PATH")]
    to: PathBuf,
    /// It is an index: write the files that it names
    #[arg(long)]
    index: bool,
}

/// List the files that an index names.
#[derive(Debug, Args)]
pub(super) struct Files {
    /// Its root, or the first digits of one that the node holds
    root: String,
}

/// List the payloads that the node holds.
#[derive(Debug, Args)]
pub(super) struct List {}

/// One payload.
#[derive(Debug, Args)]
pub(super) struct One {
    /// Its root, or the first digits of one that the node holds
    root: String,
}

/// Some payloads.
#[derive(Debug, Args)]
pub(super) struct Several {
    /// Their roots, or the first digits
    #[arg(required = true, value_name = "ROOT")]
    roots: Vec<String>,
}

/// Read payloads against their names.
#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Their roots, or the first digits [default: all that the node holds]
    #[arg(value_name = "ROOT")]
    roots: Vec<String>,
}

/// Remove payloads from the node.
#[derive(Debug, Args)]
pub(super) struct Remove {
    /// Their roots, or the first digits
    #[arg(required = true, value_name = "ROOT")]
    roots: Vec<String>,
    /// Also those that are pinned or belong to a lease
    #[arg(long)]
    force: bool,
    /// They are indexes: remove what they name as well, but for what is kept for other reasons
    #[arg(long)]
    index: bool,
}

impl Blob {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::Import(args) => args.run(session).await,
            Self::Get(args) => args.run(session).await,
            Self::Export(args) => args.run(session).await,
            Self::Files(args) => args.run(session).await,
            Self::List(_) => list(session).await,
            Self::Stat(args) => args.run(session).await,
            Self::Pin(args) => args.run(session, Method::PUT).await,
            Self::Unpin(args) => args.run(session, Method::DELETE).await,
            Self::Verify(args) => args.run(session).await,
            Self::Rm(args) => args.run(session).await,
        }
    }
}

impl Import {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let (mut lines, mut text) = (Vec::new(), String::new());
        for path in &self.paths {
            let (payload, sent, files) = if path.as_os_str() == "-" {
                let payload = transfer::upload_stdin(session).await?;
                let size = payload.size;
                (payload, size, None)
            } else if path.is_dir() {
                let directory = directory::hash(session, path).await?;
                let sent = directory::upload(session, &directory).await?;
                (directory.local.payload, sent, Some(directory.index.files().len()))
            } else {
                let local = transfer::hash(path).await?;
                let sent = transfer::upload(session, std::slice::from_ref(&local)).await?;
                (local.payload, sent, None)
            };
            text.push_str(&format!("{}\n", payload.root));
            lines.push(json!({
                "path": path, "root": payload.root, "size": payload.size, "sent": sent,
                "files": files,
            }));
        }
        session.out.answer(&json!({ "payloads": lines }), || text)?;
        Ok(Exit::Ok)
    }
}

impl Get {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let root = self.root.to_string();
        if let Some(path) = self.output.as_ref().filter(|_| self.index) {
            directory::check_new(path)?;
        }
        let Fetched { size, received, holders, took_ms } =
            transfer::get(session, &root, self.size, self.index).await?;
        let mut answer = json!({
            "root": root, "size": size, "received": received, "holders": holders,
            "took_ms": took_ms,
        });
        if let Some(path) = &self.output {
            // An index's own size is not that of all that was fetched.
            let (_, own) = find::payload(session, &root).await?;
            export(session, (&root, own), self.index, path).await?;
            answer["path"] = json!(path);
            if path.as_os_str() == "-" {
                return Ok(Exit::Ok);
            }
        }
        if received == 0 {
            session.out.tell("the node held it already");
        } else {
            let (bytes, took) = (resource::bytes(received), span(took_ms));
            let plural = if holders == 1 { "" } else { "s" };
            session.out.tell(&format!("{bytes} from {holders} holder{plural} in {took}"));
        }
        if !self.index && size <= MAX_BYTES as u64 {
            let stat: PayloadStat = stat(session, &root).await?;
            if let Some(IndexStat { files, missing: 1.., .. }) = stat.index {
                let message = format!("it is an index of {files} files: --index fetches them all");
                session.out.tell(&message);
            }
        }
        session.out.answer(&answer, || format!("{root}\n"))?;
        Ok(Exit::Ok)
    }
}

impl Export {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let (root, size) = find::payload(session, &self.root).await?;
        export(session, (&root, size), self.index, &self.to).await?;
        if self.to.as_os_str() != "-" {
            let answer = json!({ "root": root, "size": size, "path": self.to });
            session.out.answer(&answer, || format!("{}\n", self.to.display()))?;
        }
        Ok(Exit::Ok)
    }
}

/// Writes a payload that the node holds to a file, or an index's files to a directory; `size` is the
/// payload's own, in bytes.
async fn export(
    session: &Session,
    (root, size): (&str, u64),
    index: bool,
    to: &Path,
) -> Result<(), Failure> {
    if !index {
        transfer::export(session, root, size, to).await
    } else if to.as_os_str() == "-" {
        let message = "the files of an index cannot go to standard output: name a directory";
        Err(Failure::say(Exit::Usage, message))
    } else {
        directory::export(session, root, size, to).await
    }
}

impl Files {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let held = find::held(session).await?;
        let (root, size) = find::payload_in(&held, &self.root)?;
        let index = directory::index(session, &root, size).await?;
        let here: HashSet<_> = held.payloads.iter().map(|line| line.root.as_str()).collect();
        let files = index.files().iter().map(|file| {
            let root = file.payload.root.to_string();
            let here = here.contains(root.as_str());
            (file, root, here)
        });
        let lines = files.clone().map(|(file, root, here)| {
            json!({
                "path": file.path, "executable": file.executable, "root": root,
                "size": file.payload.size, "held": here,
            })
        });
        let answer = json!({ "root": root, "files": lines.collect::<Vec<_>>() });
        session.out.answer(&answer, || {
            let rows = files.map(|(file, root, here)| {
                let size = resource::bytes(file.payload.size);
                let here = if here { "yes" } else { "no" };
                vec![leasehold_keys::text::shown(&file.path), size, here.into(), root]
            });
            session.out.table(&["PATH", "SIZE", "HELD", "ROOT"], rows.collect())
        })?;
        Ok(Exit::Ok)
    }
}

async fn stat(session: &Session, root: &str) -> Result<PayloadStat, Failure> {
    Ok(session.client.get(&format!("/v1/payloads/{root}/holders")).await?)
}

async fn list(session: &Session) -> Result<Exit, Failure> {
    let held = find::held(session).await?;
    session.out.answer(&held, || {
        let rows = held.payloads.iter().map(|payload| {
            let kept = match (payload.pinned, payload.leased, payload.private) {
                (true, _, true) => "pinned, private",
                (true, _, false) => "pinned",
                (false, true, true) => "leased, private",
                (false, true, false) => "leased",
                (false, false, true) => "private",
                (false, false, false) => "-",
            };
            let kind = if payload.index { "index" } else { "-" };
            vec![payload.root.clone(), resource::bytes(payload.size), kept.into(), kind.into()]
        });
        session.out.table(&["ROOT", "SIZE", "KEPT", "KIND"], rows.collect())
    })?;
    Ok(Exit::Ok)
}

impl One {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let root = match self.root.parse::<Root>() {
            Ok(root) => root.to_string(),
            Err(_) => find::payload(session, &self.root).await?.0,
        };
        let stat = stat(session, &root).await?;
        session.out.answer(&stat, || {
            let here = stat.size.map_or_else(
                || "not held".into(),
                |size| format!("{} ({size} bytes)", resource::bytes(size)),
            );
            let mut lines = vec![("root", stat.root.clone()), ("here", here)];
            if stat.pinned {
                lines.push(("kept", "pinned".into()));
            }
            if stat.leased {
                lines.push(("kept", "belongs to a lease".into()));
            }
            if let Some(IndexStat { files, payloads, size, missing }) = &stat.index {
                let bytes = resource::bytes(*size);
                let mut index = format!("{files} files in {payloads} payloads, {bytes}");
                if *missing > 0 {
                    index.push_str(&format!(", {missing} of them not here"));
                }
                lines.push(("index", index));
            }
            for holder in &stat.holders {
                lines.push(("holder", format!("{} ({})", holder.name, short_key(&holder.id))));
            }
            page(&lines)
        })?;
        Ok(if stat.size.is_none() && stat.holders.is_empty() { Exit::No } else { Exit::Ok })
    }
}

impl Several {
    async fn run(self, session: &Session, method: Method) -> Result<Exit, Failure> {
        let held = find::held(session).await?;
        each(session, &held, &self.roots, |root, _| {
            let (method, path) = (method.clone(), format!("/v1/payloads/{root}/pin"));
            async move { session.client.act(method, &path, Duration::ZERO).await }
        })
        .await
    }
}

impl Verify {
    async fn run(mut self, session: &Session) -> Result<Exit, Failure> {
        let held = find::held(session).await?;
        if self.roots.is_empty() {
            self.roots = held.payloads.iter().map(|payload| payload.root.clone()).collect();
        }
        each(session, &held, &self.roots, |root, size| {
            let path = format!("/v1/payloads/{root}/verify");
            let wait = Duration::from_secs(size / VERIFY_RATE);
            async move { session.client.act(Method::POST, &path, wait).await }
        })
        .await
    }
}

impl Remove {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let query = format!("force={}&index={}", self.force, self.index);
        let held = find::held(session).await?;
        each(session, &held, &self.roots, |root, _| {
            let path = format!("/v1/payloads/{root}?{query}");
            async move { session.client.act(Method::DELETE, &path, REMOVING).await }
        })
        .await
    }
}

/// Does the same with each payload, whatever comes of the others. The exit code is that of the first
/// that failed.
async fn each<F: Future<Output = Result<(), ClientError>>>(
    session: &Session,
    held: &Payloads,
    roots: &[String],
    act: impl Fn(String, u64) -> F,
) -> Result<Exit, Failure> {
    let (mut exit, mut lines, mut text) = (Exit::Ok, Vec::<Value>::new(), String::new());
    for named in roots {
        let done = match find::payload_in(held, named) {
            Ok((root, size)) => act(root.clone(), size).await.map(|()| root).map_err(Into::into),
            Err(failure) => Err(failure),
        };
        match done {
            Ok(root) => {
                text.push_str(&format!("{root}\n"));
                lines.push(json!({ "root": root, "error": null }));
            }
            Err(failure) => {
                let message = leasehold_keys::text::causes(failure.error.as_ref());
                session.out.error(&format!("{named}: {message}"));
                lines.push(json!({ "root": named, "error": message }));
                if exit == Exit::Ok {
                    exit = failure.exit;
                }
            }
        }
    }
    session.out.answer(&json!({ "payloads": lines }), || text)?;
    Ok(exit)
}
