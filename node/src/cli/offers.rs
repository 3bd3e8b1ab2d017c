//! `leasehold offers`: what is free, and at what price.

use clap::Args;
use leasehold_keys::exit::Exit;

use super::output::{shape, short_key, span};
use super::{Failure, Session};
use crate::api::body;

/// List what is offered, and at what price.
#[derive(Debug, Args)]
pub(super) struct Offers {
    /// Also offers of nodes that are down
    #[arg(long)]
    all: bool,
}

impl Offers {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let mut offers: body::Offers = session.client.get("/v1/offers").await?;
        offers.offers.retain(|offer| self.all || offer.up);
        session.out.answer(&offers, || {
            let rows = offers.offers.iter().map(|offer| row(offer, &offers.currency)).collect();
            let header = [
                "NAME",
                "KEY",
                "LARGEST FREE",
                "PER HOUR",
                "SLACK",
                "TERM",
                "RUNTIMES",
                "ISOLATION",
                "AGE",
            ];
            session.out.table(&header, rows)
        })?;
        Ok(Exit::Ok)
    }
}

fn row(offer: &body::OfferLine, currency: &str) -> Vec<String> {
    let prices = &offer.prices;
    let mut price = format!(
        "{}/cpu {}/GiB {}/GiB disk",
        prices.cpu_hour, prices.memory_gib_hour, prices.disk_gib_hour
    );
    for (kind, hour) in &prices.gpu_hour {
        price.push_str(&format!(" {hour}/{kind}"));
    }
    vec![
        offer.name.clone(),
        short_key(&offer.lessor),
        offer.shapes.first().map_or_else(|| "nothing".into(), shape),
        format!("{price} {currency}"),
        offer.slack_percent.map_or_else(|| "-".into(), |percent| format!("{percent}% of it")),
        format!("{} at most", span(offer.max_term_ms)),
        offer.runtimes.join(" "),
        offer.isolation.join(" "),
        span(offer.age_ms),
    ]
}
