//! Routes for the host's operator: taking capacity back, emptying the host, selling again.

// The attribute for the description expands to paths longer than they need to be.
#![allow(unused_qualifications)]

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use leasehold_proto::core::{Command, Reply};
use leasehold_proto::{Resources, Span};
use serde_json::json;

use super::App;
use super::body::{DrainRequest, Quantity, ReclaimRequest, Reclaimed, Resumed};
use super::error::{ApiError, Code, ErrorBody};
use super::guard::Input;
use super::lease::{currency, lease_id, unfitting};
use super::want::Text;
use crate::quantity;

fn within(text: &Text) -> Result<Span, ApiError> {
    quantity::span(&text.0).map_err(|why| ApiError::field("within", why))
}

/// Take slack capacity back, cheapest credit first, and keep it out of new leases
#[utoipa::path(post, path = "/v1/reclaim", tag = "operator", request_body = ReclaimRequest,
    responses((status = 200, body = Reclaimed), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn reclaim(
    State(app): State<App>,
    Input(request): Input<ReclaimRequest>,
) -> Result<Json<Reclaimed>, ApiError> {
    let read = |field: &'static str, text: &Option<Text>, read: Read| match text {
        Some(text) => read(&text.0).map_err(|why| ApiError::field(field, why)),
        None => Ok(0),
    };
    let shape = Resources::new(
        read("cpu", &request.cpu, quantity::cpu)?,
        read("memory", &request.memory, quantity::bytes)?,
        read("disk", &request.disk, quantity::bytes)?,
    );
    if shape.is_nothing() {
        return Err(ApiError::field("cpu", "say how much is wanted back: cpu, memory or disk"));
    }
    let (within, dry_run) = (within(&request.within)?, request.dry_run);
    match app.handle.ask(Command::Reclaim { shape, within, dry_run }).await? {
        Reply::Reclaim(plan) if !plan.short.is_nothing() => {
            let short = Quantity::from(&plan.short);
            let message = format!(
                "{} cannot be had back within {within}: nothing was taken back; firm leases stay \
                 until their term, slack ones for their notice",
                plan.short
            );
            let plan = Reclaimed::of(&plan, true, currency(&app));
            Err(ApiError::new(StatusCode::CONFLICT, Code::Conflict, message)
                .with(json!({ "short": short, "plan": plan })))
        }
        Reply::Reclaim(plan) => Ok(Json(Reclaimed::of(&plan, dry_run, currency(&app)))),
        other => Err(unfitting(&other)),
    }
}

type Read = fn(&str) -> Result<u64, String>;

/// Grant and renew nothing any more, and take slack back; firm leases run to their term unless
/// they are to be revoked
#[utoipa::path(post, path = "/v1/drain", tag = "operator", request_body = DrainRequest,
    responses((status = 200, body = Reclaimed), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody)))]
pub(super) async fn drain(
    State(app): State<App>,
    Input(request): Input<DrainRequest>,
) -> Result<Json<Reclaimed>, ApiError> {
    let (within, DrainRequest { revoke, dry_run, .. }) = (within(&request.within)?, request);
    match app.handle.ask(Command::Drain { within, revoke, dry_run }).await? {
        Reply::Reclaim(plan) => Ok(Json(Reclaimed::of(&plan, dry_run, currency(&app)))),
        other => Err(unfitting(&other)),
    }
}

/// End a drain or reclaim: sell again, and leave what has not ended yet
#[utoipa::path(post, path = "/v1/resume", tag = "operator", responses(
    (status = 200, body = Resumed), (status = 401, body = ErrorBody)))]
pub(super) async fn resume(State(app): State<App>) -> Result<Json<Resumed>, ApiError> {
    match app.handle.ask(Command::Resume).await? {
        Reply::Resumed { lifted } => Ok(Json(Resumed { lifted })),
        other => Err(unfitting(&other)),
    }
}

/// Take back one lease that this node granted, after its notice
#[utoipa::path(post, path = "/v1/leases/{lease}/revoke", tag = "operator",
    params(("lease" = String, Path)), responses(
    (status = 200, body = Reclaimed), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    (status = 410, body = ErrorBody)))]
pub(super) async fn revoke(
    State(app): State<App>,
    Path(lease): Path<String>,
) -> Result<Json<Reclaimed>, ApiError> {
    match app.handle.ask(Command::Revoke(lease_id(&lease)?)).await? {
        Reply::Reclaim(plan) => Ok(Json(Reclaimed::of(&plan, false, currency(&app)))),
        other => Err(unfitting(&other)),
    }
}
