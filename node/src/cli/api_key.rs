//! `leasehold api-key`: who may ask models through this node.

use std::time::Duration;

use clap::{Args, Subcommand};
use hyper::Method;
use leasehold_keys::exit::Exit;
use serde_json::json;

use super::{Failure, Session};
use crate::api::model::{KeyLine, KeyLines, KeyMade, KeySpec};
use crate::client::escaped;
use crate::quantity;

/// API keys of this node.
#[derive(Debug, Subcommand)]
pub(super) enum ApiKey {
    /// Make a key, and print it: it is shown this once
    Add(Add),
    /// List keys, with what was spent
    #[command(alias = "ls")]
    List(List),
    /// Remove keys
    Rm(Remove),
}

/// Make a key.
#[derive(Debug, Args)]
pub(super) struct Add {
    /// Whom it is for
    name: String,
    /// Only this model; may be said several times
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// Requests a minute
    #[arg(long, value_name = "N")]
    rpm: Option<u32>,
    /// Tokens a minute, both ways
    #[arg(long, value_name = "N")]
    tpm: Option<u32>,
    /// Requests at once
    #[arg(long, value_name = "N")]
    concurrency: Option<u32>,
    /// What it may cost in all, in the fabric's currency
    #[arg(long, value_name = "AMOUNT", value_parser = amount)]
    budget: Option<String>,
    /// For how long it holds (30d)
    #[arg(long, value_name = "SPAN", value_parser = span)]
    expires: Option<String>,
}

/// List keys.
#[derive(Debug, Args)]
pub(super) struct List {}

/// Remove keys.
#[derive(Debug, Args)]
pub(super) struct Remove {
    /// Their ids, or names
    #[arg(required = true, value_name = "KEY")]
    ids: Vec<String>,
}

fn amount(text: &str) -> Result<String, String> {
    quantity::amount(text).map(|_| text.to_owned())
}

fn span(text: &str) -> Result<String, String> {
    quantity::span(text).map(|_| text.to_owned())
}

impl ApiKey {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::Add(args) => args.run(session).await,
            Self::List(_) => list(session).await,
            Self::Rm(args) => {
                for id in &args.ids {
                    let path = format!("/v1/api-keys/{}", escaped(id));
                    session.client.act(Method::DELETE, &path, Duration::ZERO).await?;
                }
                session.out.answer(&json!({ "removed": args.ids }), String::new)?;
                Ok(Exit::Ok)
            }
        }
    }
}

impl Add {
    async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let Self { name, models, rpm, tpm, concurrency, budget, expires } = self;
        let spec = KeySpec { name, models, rpm, tpm, concurrency, budget, expires };
        let made: KeyMade = session.client.post("/v1/api-keys", &spec).await?;
        session.out.answer(&made, || format!("{}\n", made.key))?;
        session.out.tell("keep it: it is not shown again");
        Ok(Exit::Ok)
    }
}

async fn list(session: &Session) -> Result<Exit, Failure> {
    let keys: KeyLines = session.client.get("/v1/api-keys").await?;
    session.out.answer(&keys, || {
        let limit = |limit: Option<u32>| limit.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let rows = keys.keys.iter().map(|key| {
            let KeyLine { id, name, models, rpm, tpm, concurrency, budget, spent, .. } = key;
            let models = if models.is_empty() { "all".to_owned() } else { models.join(" ") };
            vec![
                id.clone(),
                name.clone(),
                models,
                limit(*rpm),
                limit(*tpm),
                limit(*concurrency),
                budget.clone().unwrap_or_else(|| "-".to_owned()),
                spent.clone(),
                key.expires.clone().unwrap_or_else(|| "-".to_owned()),
            ]
        });
        let spent = format!("SPENT {}", keys.currency);
        session.out.table(
            &["ID", "NAME", "MODELS", "RPM", "TPM", "AT ONCE", "BUDGET", &spent, "EXPIRES"],
            rows.collect(),
        )
    })?;
    Ok(Exit::Ok)
}
