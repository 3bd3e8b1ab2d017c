//! What is wanted, as options: the same texts as in the API's JSON.

use clap::Args;
use leasehold_keys::exit::Exit;
use leasehold_proto::KeyId;

use super::{Failure, Session};
use crate::api::body::{Nodes, OnLoss};
use crate::api::want::{ClassText, GpuText, Text, WantText};
use crate::quantity;

/// What is wanted.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "What is wanted")]
pub(super) struct WantArgs {
    /// Cores: 1, 1.5, 500m
    #[arg(long, value_name = "CORES", default_value = "1", value_parser = checked_cpu)]
    cpu: String,
    /// Memory: 256M, 1.5G
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = checked_size)]
    memory: String,
    /// Disk: 64M, 10G
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = checked_size)]
    disk: String,
    /// GPUs of a kind; may be repeated
    #[arg(long, value_name = "KIND[:COUNT]", value_parser = gpu)]
    gpu: Vec<GpuText>,
    /// How firmly
    #[arg(long, value_enum, default_value_t)]
    class: ClassText,
    /// For how long: 60s, 10m, 1h
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = checked_span)]
    ttl: String,
    /// To what time it may be renewed at the same price [default: --ttl]
    #[arg(long, value_name = "TIME", value_parser = checked_span)]
    max_ttl: Option<String>,
    /// Within what time it will be used; else it lapses and costs nothing
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = checked_span)]
    claim_within: String,
    /// The most it may cost per hour: 0.05/h
    #[arg(long, value_name = "PRICE", value_parser = checked_price)]
    max_price: String,
    /// The most it may cost in all: 0.01
    #[arg(long, value_name = "AMOUNT", value_parser = checked_price)]
    budget: String,
    /// The most that may stand unacknowledged [default: the budget]
    #[arg(long, value_name = "AMOUNT", value_parser = checked_price)]
    exposure: Option<String>,
    /// How often a receipt is wanted
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = checked_span)]
    receipt_every: String,
    /// The runtime it needs
    #[arg(long, value_name = "NAME", default_value = "wasm")]
    pub(super) runtime: String,
    /// Only this host, by name or key; may be repeated: they are asked in this order
    #[arg(long, value_name = "NODE")]
    on: Vec<String>,
    /// Only hosts with this label; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    /// Only hosts that confine jobs in this way; may be repeated
    #[arg(long, value_name = "WORD")]
    isolation: Vec<String>,
}

/// On how many hosts.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "On several hosts, together or not at all")]
pub(super) struct GangArgs {
    /// On so many hosts at once, 1 to 64: all of them, or none
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) nodes: Option<u16>,
    /// What follows when one of them is lost
    #[arg(long, value_enum, default_value_t, requires = "nodes")]
    pub(super) on_loss: OnLoss,
}

fn checked<T>(read: impl Fn(&str) -> Result<T, String>) -> impl Fn(&str) -> Result<String, String> {
    move |text| read(text).map(|_| text.to_string())
}

fn checked_cpu(text: &str) -> Result<String, String> {
    checked(quantity::cpu)(text)
}

fn checked_size(text: &str) -> Result<String, String> {
    checked(quantity::bytes)(text)
}

fn checked_span(text: &str) -> Result<String, String> {
    checked(quantity::span)(text)
}

fn checked_price(text: &str) -> Result<String, String> {
    checked(quantity::price)(text)
}

fn gpu(text: &str) -> Result<GpuText, String> {
    let (kind, count) = text.rsplit_once(':').unwrap_or((text, "1"));
    let count = count.parse().ok().filter(|count| *count > 0);
    match count {
        Some(count) if !kind.is_empty() => Ok(GpuText { kind: kind.into(), count }),
        _ => Err("expected KIND or KIND:COUNT, such as nvidia-h100-80gb-hbm3:2".into()),
    }
}

/// Reads `NAME=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

impl WantArgs {
    /// The want, with the hosts' names looked up.
    pub(super) async fn text(&self, session: &Session) -> Result<WantText, Failure> {
        let text = |text: &String| Text(text.clone());
        let want = WantText {
            cpu: text(&self.cpu),
            memory: text(&self.memory),
            disk: text(&self.disk),
            gpus: self.gpu.clone(),
            class: self.class,
            ttl: text(&self.ttl),
            max_ttl: self.max_ttl.as_ref().map(text),
            claim_within: text(&self.claim_within),
            max_price: text(&self.max_price),
            budget: text(&self.budget),
            exposure: self.exposure.as_ref().map(text),
            receipt_every: text(&self.receipt_every),
            runtime: self.runtime.clone(),
            lessors: self.lessors(session).await?,
            labels: self.label.iter().cloned().collect(),
            isolation: self.isolation.clone(),
        };
        want.parse().map_err(|why| Failure::new(Exit::Usage, why))?;
        Ok(want)
    }

    async fn lessors(&self, session: &Session) -> Result<Vec<String>, Failure> {
        if self.on.iter().all(|on| on.parse::<KeyId>().is_ok()) {
            return Ok(self.on.clone());
        }
        let nodes: Nodes = session.client.get("/v1/nodes").await?;
        self.on.iter().map(|on| key_of(&nodes, on)).collect()
    }

    /// The limits, as a person typed them.
    pub(super) fn limits(&self) -> (&str, &str) {
        (self.max_price.trim_end_matches("/h"), &self.budget)
    }
}

/// The key of the one node that `on` names.
fn key_of(nodes: &Nodes, on: &str) -> Result<String, Failure> {
    if on.parse::<KeyId>().is_ok() {
        return Ok(on.into());
    }
    // A table shows the last characters of a key.
    let tail = |node: &&crate::api::body::NodeLine| on.len() >= 6 && node.id.ends_with(on);
    let mut named = nodes.nodes.iter().filter(|node| node.name == on || tail(node));
    match (named.next(), named.next()) {
        (Some(node), None) => Ok(node.id.clone()),
        (None, _) => {
            let message = format!("no node is named '{on}': `leasehold nodes` lists them");
            Err(Failure::say(Exit::Usage, message))
        }
        (Some(_), Some(_)) => {
            let message = format!(
                "several nodes are named '{on}': say the last characters of its key instead, as \
                 `leasehold nodes` shows them"
            );
            Err(Failure::say(Exit::Usage, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_read() {
        assert_eq!(gpu("h100:2"), Ok(GpuText { kind: "h100".into(), count: 2 }));
        assert_eq!(gpu("h100"), Ok(GpuText { kind: "h100".into(), count: 1 }));
        for text in ["", ":2", "h100:0", "h100:x"] {
            assert!(gpu(text).is_err(), "{text}");
        }
        assert_eq!(pair("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(pair("=b").is_err() && pair("a").is_err());
    }
}
