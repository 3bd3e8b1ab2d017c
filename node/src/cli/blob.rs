//! `leasehold blob`: payloads, by hand: import, get, export, list, stat, pin, verify, remove.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use hyper::Method;
use leasehold_keys::exit::Exit;
use leasehold_proto::base::resource;
use serde_json::{Value, json};

use super::output::{page, short_key, span};
use super::transfer::{self, Fetched};
use super::{Failure, Session, find};
use crate::api::body::{PayloadStat, Payloads};
use crate::client::ClientError;
use crate::payload::Root;

/// Reading a payload against its name takes a second for so many bytes at least.
const VERIFY_RATE: u64 = 20 << 20;

/// Payloads: bytes named by their BLAKE3 root.
#[derive(Debug, Subcommand)]
pub(super) enum Blob {
    /// Give a file to the node, and print its root
    Import(Import),
    /// Have the node fetch a payload from whoever has it
    Get(Get),
    /// Write a payload that the node holds to a file
    Export(Export),
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

/// Give a file to the node, and print its root.
#[derive(Debug, Args)]
pub(super) struct Import {
    /// The files; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Have the node fetch a payload from whoever has it.
#[derive(Debug, Args)]
pub(super) struct Get {
    /// Its root, 64 hexadecimal digits
    root: Root,
    /// How many bytes it has, if you know: else a holder has to prove it
    #[arg(long, value_name = "BYTES")]
    size: Option<u64>,
    /// Also write it to this file; `-` is standard output
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Write a payload that the node holds to a file.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// Its root, or the first digits
    root: String,
    /// Where to; `-` is standard output
    file: PathBuf,
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
}

impl Blob {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::Import(args) => args.run(session).await,
            Self::Get(args) => args.run(session).await,
            Self::Export(args) => args.run(session).await,
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
        for path in &self.files {
            let (payload, sent) = if path.as_os_str() == "-" {
                let payload = transfer::upload_stdin(session).await?;
                let size = payload.size;
                (payload, size)
            } else {
                let local = transfer::hash(path).await?;
                let sent = transfer::upload(session, std::slice::from_ref(&local)).await?;
                (local.payload, sent)
            };
            text.push_str(&format!("{}\n", payload.root));
            lines.push(json!({
                "file": path, "root": payload.root, "size": payload.size, "sent": sent,
            }));
        }
        session.out.answer(&json!({ "payloads": lines }), || text)?;
        Ok(Exit::Ok)
    }
}

impl Get {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let root = self.root.to_string();
        let Fetched { size, received, holders, took_ms } =
            transfer::get(session, &root, self.size).await?;
        let mut answer = json!({
            "root": root, "size": size, "received": received, "holders": holders,
            "took_ms": took_ms,
        });
        if let Some(path) = &self.output {
            transfer::export(session, &root, size, path).await?;
            answer["file"] = json!(path);
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
        session.out.answer(&answer, || format!("{root}\n"))?;
        Ok(Exit::Ok)
    }
}

impl Export {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let (root, size) = find::payload(session, &self.root).await?;
        transfer::export(session, &root, size, &self.file).await?;
        if self.file.as_os_str() != "-" {
            let answer = json!({ "root": root, "size": size, "file": self.file });
            session.out.answer(&answer, || format!("{}\n", self.file.display()))?;
        }
        Ok(Exit::Ok)
    }
}

async fn list(session: &Session) -> Result<Exit, Failure> {
    let held = find::held(session).await?;
    session.out.answer(&held, || {
        let rows = held.payloads.iter().map(|payload| {
            let kept = match (payload.pinned, payload.leased) {
                (true, _) => "pinned",
                (false, true) => "leased",
                (false, false) => "-",
            };
            vec![payload.root.clone(), resource::bytes(payload.size), kept.into()]
        });
        session.out.table(&["ROOT", "SIZE", "KEPT"], rows.collect())
    })?;
    Ok(Exit::Ok)
}

impl One {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let root = match self.root.parse::<Root>() {
            Ok(root) => root.to_string(),
            Err(_) => find::payload(session, &self.root).await?.0,
        };
        let stat: PayloadStat = session.client.get(&format!("/v1/payloads/{root}/holders")).await?;
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
        let force = if self.force { "?force=true" } else { "" };
        let held = find::held(session).await?;
        each(session, &held, &self.roots, |root, _| {
            let path = format!("/v1/payloads/{root}{force}");
            async move { session.client.act(Method::DELETE, &path, Duration::ZERO).await }
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
