//! `leasehold explain`: per host, what speaks for it or against it.

use clap::Args;
use leasehold_keys::exit::Exit;

use super::output::short_key;
use super::want::WantArgs;
use super::{Failure, Session};
use crate::api::body::{Plan, PlanRequest};

/// Say per host what speaks for and against it.
#[derive(Debug, Args)]
pub(super) struct Explain {
    #[command(flatten)]
    want: WantArgs,
}

impl Explain {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let want = self.want.text(session).await?;
        let plan: Plan = session.client.post("/v1/plan", &PlanRequest { want }).await?;
        session.out.answer(&plan, || {
            let choices = (1..).zip(&plan.choices).map(|(rank, choice): (u32, _)| {
                vec![
                    rank.to_string(),
                    choice.name.clone(),
                    short_key(&choice.lessor),
                    format!("{} {}/h", choice.rate, plan.currency),
                    format!("{} {}", choice.worst_case, plan.currency),
                    choice.why.clone(),
                ]
            });
            let against = plan.against.iter().map(|against| {
                let (name, key) = (against.name.clone(), short_key(&against.lessor));
                let reasons = against.reasons.join("; ");
                vec!["-".into(), name, key, "-".into(), "-".into(), format!("no: {reasons}")]
            });
            let rows = choices.chain(against).collect();
            session.out.table(&["RANK", "NAME", "KEY", "PRICE", "AT MOST", "WHY"], rows)
        })?;
        if !session.out.json && plan.unsampled > 0 {
            let more = plan.unsampled;
            session.out.tell(&format!("{more} more hosts fit and were not in this sample"));
        }
        if plan.choices.is_empty() {
            session.out.warn("no host fits: ask for less, or allow a higher price");
            return Ok(Exit::No);
        }
        Ok(Exit::Ok)
    }
}
