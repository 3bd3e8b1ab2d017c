//! `leasehold lease`: request, show, list, renew, release, revoke, export.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use leasehold_keys::disk::{self, Existing};
use leasehold_keys::exit::Exit;
use leasehold_proto::base::resource;
use serde_json::json;

use super::output::{page, shape, short_id, short_key, span};
use super::want::{GangArgs, WantArgs};
use super::{Failure, Session, find, operator};
use crate::api::body::{
    GangRequest, Ganged, LeaseLine, LeaseRequest, Leased, Leases, ModelUse, Reclaimed, Released,
    RenewRequest, Renewed, Side,
};
use crate::api::want::{Text, WantText};

/// The longest order file that is read, in bytes.
const MAX_ORDER: usize = 256 * 1024;

/// Request, show, list, renew, release, revoke and export leases.
#[derive(Debug, Subcommand)]
pub(super) enum Lease {
    /// Get a lease and print its id
    Request(Box<Request>),
    /// Show one lease
    Show(One),
    /// List leases that the node holds or granted
    List(List),
    /// Make a lease longer, at its price
    Renew(Renew),
    /// Give a lease back
    Release(One),
    /// Take back a lease that this node granted, after its notice
    Revoke(One),
    /// Write everything that proves a lease to a file
    Export(Export),
}

/// Get a lease and print its id.
#[derive(Debug, Args)]
pub(super) struct Request {
    #[command(flatten)]
    want: Option<WantArgs>,
    /// Take this order, which the lessee signed, instead
    #[arg(long, value_name = "FILE", conflicts_with = "WantArgs")]
    order: Option<PathBuf>,
    #[command(flatten)]
    gang: GangArgs,
}

/// One lease.
#[derive(Debug, Args)]
pub(super) struct One {
    /// The lease, or its first digits
    lease: String,
}

/// Make a lease longer.
#[derive(Debug, Args)]
pub(super) struct Renew {
    /// The lease, or its first digits
    lease: String,
    /// Its new time in all, from when it was granted: 1h
    #[arg(long, value_name = "TIME")]
    ttl: String,
}

/// List leases that the node holds or granted.
#[derive(Debug, Args)]
pub(super) struct List {
    /// Also those that are over
    #[arg(long)]
    all: bool,
}

/// Write everything that proves a lease to a file.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The lease, or its first digits
    lease: String,
    /// Where to
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

impl Lease {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::Request(args) => args.run(session).await,
            Self::Show(args) => args.show(session).await,
            Self::List(args) => args.run(session).await,
            Self::Renew(args) => args.run(session).await,
            Self::Release(args) => args.release(session).await,
            Self::Revoke(args) => args.revoke(session).await,
            Self::Export(args) => args.run(session).await,
        }
    }
}

impl Request {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let mut request = LeaseRequest::default();
        match (&self.want, &self.order) {
            (_, Some(path)) => {
                let order = disk::read(path, MAX_ORDER)?;
                request.order = Some(String::from_utf8_lossy(&order).into_owned());
            }
            (Some(want), None) => request.want = Some(want.text(session).await?),
            (None, None) => {
                let message = "say what is wanted with --max-price and --budget, or --order FILE";
                return Err(Failure::say(Exit::Usage, message));
            }
        }
        if let (Some(nodes), Some(want)) = (self.gang.nodes, &request.want) {
            return self.gang(session, nodes, want.clone()).await;
        }
        let leased: Leased = session.client.post("/v1/leases", &request).await?;
        session.out.answer(&leased, || format!("{}\n", leased.lease))?;
        let (choice, currency) = (&leased.choice, &leased.currency);
        session.out.tell(&format!(
            "{} (…{}) lends at {} {currency}/h, at most {} {currency} in all: {}",
            leasehold_keys::text::shown(&choice.name),
            short_key(&choice.lessor),
            choice.rate,
            choice.worst_case,
            leasehold_keys::text::shown(&choice.why),
        ));
        Ok(Exit::Ok)
    }
}

impl Request {
    async fn gang(&self, session: &Session, nodes: u16, want: WantText) -> Result<Exit, Failure> {
        let request = GangRequest { want, nodes, job: None, on_loss: self.gang.on_loss };
        let ganged: Ganged = session.client.post("/v1/gangs", &request).await?;
        session.out.answer(&ganged, || {
            ganged.leases.iter().map(|leased| format!("{}\n", leased.lease)).collect()
        })?;
        for (rank, leased) in ganged.leases.iter().enumerate() {
            let (choice, currency) = (&leased.choice, &ganged.currency);
            session.out.tell(&format!(
                "rank {rank}: {} (…{}) lends at {} {currency}/h",
                leasehold_keys::text::shown(&choice.name),
                short_key(&choice.lessor),
                choice.rate,
            ));
        }
        Ok(Exit::Ok)
    }
}

impl Renew {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let request = RenewRequest { ttl: Text(self.ttl) };
        let path = format!("/v1/leases/{lease}/renew");
        let renewed: Renewed = session.client.post(&path, &request).await?;
        session.out.answer(&renewed, || {
            let (term, left) = (span(renewed.term_ms), span(renewed.left_ms));
            format!("{term} in all, {left} left\n")
        })?;
        Ok(Exit::Ok)
    }
}

impl One {
    async fn revoke(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let path = format!("/v1/leases/{lease}/revoke");
        let plan: Reclaimed = session.client.post(&path, &json!({})).await?;
        operator::show(session, &plan)
    }

    async fn show(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let line: LeaseLine = session.client.get(&format!("/v1/leases/{lease}")).await?;
        session.out.answer(&line, || shown(&line))?;
        Ok(Exit::Ok)
    }

    async fn release(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let path = format!("/v1/leases/{lease}/release");
        let released: Released = session.client.post(&path, &json!({})).await?;
        session.out.answer(&released, || format!("{}\n", released.lease))?;
        Ok(Exit::Ok)
    }
}

fn side(line: &LeaseLine) -> &'static str {
    match line.side {
        Side::Held => "held",
        Side::Lent => "lent",
    }
}

fn shown(line: &LeaseLine) -> String {
    let money = |amount| format!("{amount} {}", line.currency);
    let mut lines = vec![
        ("lease", line.lease.clone().unwrap_or_else(|| "not granted yet".into())),
        ("order", line.order.clone()),
        ("side", side(line).into()),
        ("stage", line.stage.clone()),
        ("lessor", line.lessor.clone()),
    ];
    lines.extend(line.lessee.clone().map(|lessee| ("lessee", lessee)));
    match &line.model {
        Some(model) => {
            let (asked, answered) = (model.prompt_million, model.completion_million);
            let price =
                format!("{} asked, {} answered, per 1M tokens", money(asked), money(answered));
            lines.push(("model", model.name.clone()));
            lines.push(("price", price));
            let ModelUse { requests, prompt_tokens, completion_tokens, .. } = model;
            let used = format!("{requests} requests, {prompt_tokens} + {completion_tokens} tokens");
            lines.push(("used", used));
        }
        None => {
            lines.push(("shape", shape(&line.shape)));
            lines.push(("rate", format!("{}/h", money(line.rate))));
        }
    }
    lines.push(("class", line.class.clone()));
    lines.extend(line.worst_case.map(|amount| ("at most", money(amount))));
    lines.push(("granted", line.decided.clone()));
    let longer = match line.max_term_ms > line.term_ms {
        true => format!(", renewable up to {}", span(line.max_term_ms)),
        false => String::new(),
    };
    let term = format!("{}, {} left{longer}", span(line.term_ms), span(line.left_ms));
    lines.push(("term", term));
    if line.frozen == Some(true) {
        lines.push(("frozen", "its job stands still, unbilled".into()));
    }
    lines.extend(
        line.ends_early
            .as_ref()
            .map(|early| ("ends early", format!("{}, in {}", early.reason, span(early.in_ms)))),
    );
    let used = &line.used;
    lines.push((
        "used",
        format!(
            "{} billed, {} CPU time, {} memory at the peak",
            span(used.billed_ms),
            span(used.cpu_ms),
            resource::bytes(used.memory_peak)
        ),
    ));
    lines.push(("charge", money(line.charge)));
    let (receipts, agreed) = (line.receipts, line.acknowledged);
    lines.push(("receipts", format!("{receipts}, countersigned up to {agreed}")));
    lines.extend(line.objection.clone().map(|objection| ("objection", objection)));
    lines.extend(line.outcome.as_ref().map(|outcome| ("job", outcome.text.clone())));
    lines.extend(line.end.clone().map(|end| ("ended", end)));
    page(&lines)
}

impl List {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let leases: Leases = session.client.get(&format!("/v1/leases?all={}", self.all)).await?;
        session.out.answer(&leases, || {
            let rows = leases.leases.iter().map(row).collect();
            session.out.table(
                &[
                    "LEASE", "SIDE", "STAGE", "LESSOR", "LESSEE", "SHAPE", "GRANTED", "LEFT",
                    "RATE", "CHARGE",
                ],
                rows,
            )
        })?;
        Ok(Exit::Ok)
    }
}

fn row(line: &LeaseLine) -> Vec<String> {
    let dash = || "-".to_string();
    let stage = match &line.end {
        Some(end) => format!("{} ({end})", line.stage),
        None => line.stage.clone(),
    };
    vec![
        line.lease.as_deref().map_or_else(dash, short_id),
        side(line).into(),
        stage,
        short_key(&line.lessor),
        line.lessee.as_deref().map_or_else(dash, short_key),
        line.model.as_ref().map_or_else(|| shape(&line.shape), |model| model.name.clone()),
        // To the second: milliseconds tell a person nothing here.
        line.decided.split('.').next().unwrap_or_default().into(),
        span(line.left_ms),
        match &line.model {
            Some(model) => format!(
                "{}+{} {}/1M",
                model.prompt_million, model.completion_million, line.currency
            ),
            None => format!("{} {}/h", line.rate, line.currency),
        },
        format!("{} {}", line.charge, line.currency),
    ]
}

impl Export {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let proof = session.client.text(&format!("/v1/leases/{lease}/proof")).await?;
        let existing = if self.force { Existing::Replace } else { Existing::Keep };
        disk::write_atomic(&self.out, proof.as_bytes(), 0o644, existing)?;
        let object = json!({ "lease": lease, "out": self.out, "bytes": proof.len() });
        session.out.answer(&object, || format!("{}\n", self.out.display()))?;
        let file = self.out.display();
        session.out.tell(&format!("check it anywhere with `leasehold-keys verify {file}`"));
        Ok(Exit::Ok)
    }
}
