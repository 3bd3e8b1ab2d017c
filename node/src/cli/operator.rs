//! `leasehold reclaim`, `drain`, `resume`: what the owner of a host wants back.

use clap::Args;
use leasehold_keys::exit::Exit;
use leasehold_proto::Span;
use serde_json::json;

use super::output::{shape, short_id, span};
use super::{Failure, Session};
use crate::api::body::{DrainRequest, ReclaimRequest, Reclaimed, Resumed};
use crate::api::want::Text;
use crate::{clock, quantity};

/// Take slack capacity back, cheapest credit first.
#[derive(Debug, Args)]
pub(super) struct Reclaim {
    /// Cores: 16, 500m
    #[arg(long, value_name = "CORES")]
    cpu: Option<String>,
    /// Memory: 64G
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Disk: 100G
    #[arg(long, value_name = "SIZE")]
    disk: Option<String>,
    /// In what time it must be back: jobs go on until they have to be told, and get their notice
    #[arg(long, value_name = "TIME")]
    within: String,
    /// Only say what that would come to
    #[arg(long)]
    dry_run: bool,
}

/// Grant and renew nothing any more, and empty the host.
#[derive(Debug, Args)]
pub(super) struct Drain {
    /// By when: in what time from now (30m), or an instant (2026-11-24T22:00:00Z)
    #[arg(long, value_name = "TIME", value_parser = by)]
    by: Span,
    /// Also take back firm leases that end later, after their notice and against their credit
    #[arg(long)]
    revoke: bool,
    /// Only say what that would come to
    #[arg(long)]
    dry_run: bool,
}

fn by(text: &str) -> Result<Span, String> {
    quantity::by(text, clock::now().wall)
}

/// End a drain or reclaim: sell again, and leave what has not ended yet.
#[derive(Debug, Args)]
pub(super) struct Resume {}

impl Reclaim {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let text = |text: Option<String>| text.map(Text);
        let request = ReclaimRequest {
            cpu: text(self.cpu),
            memory: text(self.memory),
            disk: text(self.disk),
            within: Text(self.within),
            dry_run: self.dry_run,
        };
        show(session, &session.client.post("/v1/reclaim", &request).await?)
    }
}

impl Drain {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let Self { by, revoke, dry_run } = self;
        let within = Text(format!("{}ms", by.as_millis()));
        let request = DrainRequest { within, revoke, dry_run };
        show(session, &session.client.post("/v1/drain", &request).await?)
    }
}

impl Resume {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let resumed: Resumed = session.client.post("/v1/resume", &json!({})).await?;
        session.out.answer(&resumed, || {
            format!("selling again; {} leases are not taken back after all\n", resumed.lifted)
        })?;
        Ok(Exit::Ok)
    }
}

/// Shows what is taken back, or would be.
pub(super) fn show(session: &Session, plan: &Reclaimed) -> Result<Exit, Failure> {
    session.out.answer(plan, || {
        let rows = plan.leases.iter().map(|lease| {
            vec![
                short_id(&lease.lease),
                lease.class.clone(),
                lease.reason.clone(),
                shape(&lease.shape),
                span(lease.within_ms),
                format!("{} {}", lease.credit, plan.currency),
            ]
        });
        let header = ["LEASE", "CLASS", "ENDS BY", "SHAPE", "BACK WITHIN", "CREDIT"];
        session.out.table(&header, rows.collect())
    })?;
    let would = if plan.dry_run { "would be " } else { "" };
    session.out.tell(&format!(
        "{} leases {would}taken back or ending, {} {} in credits; {} is free already",
        plan.leases.len(),
        plan.credit,
        plan.currency,
        shape(&plan.free),
    ));
    Ok(Exit::Ok)
}
