//! `leasehold ps`: which jobs run.

use clap::Args;
use leasehold_keys::exit::Exit;

use super::output::{shape, short_id, short_key, span};
use super::{Failure, Session};
use crate::api::body::{JobLine, Jobs, Side};

/// List jobs that run on the node or under leases it holds.
#[derive(Debug, Args)]
pub(super) struct Ps {}

impl Ps {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let jobs: Jobs = session.client.get("/v1/jobs").await?;
        session.out.answer(&jobs, || {
            let rows = jobs.jobs.iter().map(row).collect();
            session.out.table(
                &["LEASE", "SIDE", "LESSOR", "LESSEE", "SHAPE", "LEFT", "CPU TIME", "CHARGE"],
                rows,
            )
        })?;
        Ok(Exit::Ok)
    }
}

fn row(job: &JobLine) -> Vec<String> {
    let side = match job.side {
        Side::Held => "held",
        Side::Lent => "lent",
    };
    vec![
        short_id(&job.lease),
        side.into(),
        short_key(&job.lessor),
        job.lessee.as_deref().map_or_else(|| "-".into(), short_key),
        shape(&job.shape),
        span(job.left_ms),
        span(job.used.cpu_ms),
        format!("{} {}", job.charge, job.currency),
    ]
}
