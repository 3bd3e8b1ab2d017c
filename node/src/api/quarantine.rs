//! Routes about keys whose word does not count: the proofs, and what lets a key be believed again.

// The attribute for the description expands to paths longer than they need to be.
#![allow(unused_qualifications)]

use axum::Json;
use axum::extract::State;
use leasehold_keys::armor::{self, Item};
use leasehold_proto::core::{Command, Reply};

use super::App;
use super::body::{Quarantine, QuarantineLine, ReinstateRequest, Reinstated};
use super::error::{ApiError, ErrorBody};
use super::guard::Input;
use super::lease::{one_signed, unfitting};

/// Keys that were convicted of saying two different things, with the proofs
#[utoipa::path(get, path = "/v1/quarantine", tag = "nodes", responses(
    (status = 200, body = Quarantine), (status = 401, body = ErrorBody)))]
pub(super) async fn list(State(app): State<App>) -> Result<Json<Quarantine>, ApiError> {
    let view = app.handle.view().await?;
    let mut keys = Vec::new();
    for proof in &view.quarantine {
        let Ok(header) = proof.first.header() else { continue };
        let name = view.nodes.iter().find(|node| node.id == header.signer);
        keys.push(QuarantineLine {
            key: header.signer.to_string(),
            name: name.map(|node| node.name.clone()),
            kind: header.kind.name().into_owned(),
            epoch: header.epoch,
            number: header.seq,
            proof: armor::encode(&Item::Equivocation(Box::new(proof.clone())))?,
        });
    }
    Ok(Json(Quarantine { keys }))
}

/// Believe a quarantined key again, as its organisation has signed; every node of the fabric
/// hears of it
#[utoipa::path(post, path = "/v1/quarantine/reinstate", tag = "nodes",
    request_body = ReinstateRequest, responses(
    (status = 200, body = Reinstated), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody)))]
pub(super) async fn reinstate(
    State(app): State<App>,
    Input(request): Input<ReinstateRequest>,
) -> Result<Json<Reinstated>, ApiError> {
    let signed = one_signed("reinstatement", &request.reinstatement)?;
    match app.handle.ask(Command::Reinstate(Box::new(signed))).await? {
        Reply::Reinstated(key, above) => Ok(Json(Reinstated { key: key.to_string(), above })),
        other => Err(unfitting(&other)),
    }
}
