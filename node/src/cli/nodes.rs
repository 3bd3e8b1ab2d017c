//! `leasehold nodes`: who is there.

use clap::Args;
use leasehold_keys::exit::Exit;

use super::output::{shape, short_key};
use super::{Failure, Session};
use crate::api::body;

/// List the nodes that the node knows.
#[derive(Debug, Args)]
pub(super) struct Nodes {}

impl Nodes {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let nodes: body::Nodes = session.client.get("/v1/nodes").await?;
        session.out.answer(&nodes, || {
            let rows = nodes.nodes.iter().map(row).collect();
            session.out.table(
                &["NAME", "KEY", "STATE", "LINK", "HARDWARE", "ORGANISATION", "VERSION"],
                rows,
            )
        })?;
        session.warn_if_halted().await?;
        Ok(Exit::Ok)
    }
}

fn row(node: &body::NodeLine) -> Vec<String> {
    let state = if node.up { "up" } else { "down" };
    let link = if node.linked { "yes" } else { "-" };
    vec![
        node.name.clone(),
        short_key(&node.id),
        state.into(),
        link.into(),
        shape(&node.hardware),
        node.organisation.clone(),
        node.version.clone(),
    ]
}
