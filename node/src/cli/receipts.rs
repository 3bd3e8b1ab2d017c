//! `leasehold receipts`: what was used under a lease, and what both agreed to.

use clap::Args;
use leasehold_keys::exit::Exit;
use leasehold_proto::base::resource;

use super::output::span;
use super::{Failure, Session, find};
use crate::api::body::{self, ReceiptLine};

/// List the receipts of a lease.
#[derive(Debug, Args)]
pub(super) struct Receipts {
    /// The lease, or its first digits
    lease: String,
}

impl Receipts {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let path = format!("/v1/leases/{lease}/receipts");
        let receipts: body::Receipts = session.client.get(&path).await?;
        session.out.answer(&receipts, || {
            let row = |receipt| row(receipt, &receipts.currency);
            let rows = receipts.receipts.iter().map(row).collect();
            session.out.table(
                &["NO", "AT", "BILLED", "CPU TIME", "PEAK", "CHARGE", "COUNTERSIGNED", "END"],
                rows,
            )
        })?;
        Ok(Exit::Ok)
    }
}

fn row(receipt: &ReceiptLine, currency: &str) -> Vec<String> {
    let countersigned = if receipt.countersigned { "yes" } else { "no" };
    vec![
        receipt.number.to_string(),
        receipt.at.clone(),
        span(receipt.used.billed_ms),
        span(receipt.used.cpu_ms),
        resource::bytes(receipt.used.memory_peak),
        format!("{} {currency}", receipt.charge),
        countersigned.into(),
        receipt.end.clone().unwrap_or_else(|| "-".into()),
    ]
}
