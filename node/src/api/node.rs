//! Routes about nodes: this one, those it knows, what they offer, and whether it is well.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use leasehold_proto::core::View;

use super::App;
use super::body::{Healthy, Moved, NodeInfo, NodeLine, Nodes, OfferLine, Offers, Planes, Ready};
use super::error::{ApiError, Code, ErrorBody};

/// How long the loop may take to answer a question about the node's health.
const PULSE: Duration = Duration::from_secs(2);

async fn pulse(app: &App) -> Result<View, ApiError> {
    match tokio::time::timeout(PULSE, app.handle.view()).await {
        Ok(view) => Ok(view?),
        Err(_) => {
            let message = "the node's loop does not answer within 2 s";
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Code::Timeout, message))
        }
    }
}

/// Whether the node answers
#[utoipa::path(get, path = "/healthz", tag = "health", security(()), responses(
    (status = 200, body = Healthy), (status = 503, body = ErrorBody)))]
pub(super) async fn healthz(State(app): State<App>) -> Result<Json<Healthy>, ApiError> {
    pulse(&app).await.map(|_| Json(Healthy { ok: true }))
}

/// Whether the node has joined its fabric and takes on leases; if not, why
#[utoipa::path(get, path = "/readyz", tag = "health", security(()), responses(
    (status = 200, body = Ready), (status = 503, body = Ready)))]
pub(super) async fn readyz(State(app): State<App>) -> Result<Response, ApiError> {
    let view = pulse(&app).await?;
    let mut why = Vec::new();
    if !view.joined {
        why.push("it has no link to any node of its fabric yet".to_string());
    }
    why.extend(view.halted);
    let ready = why.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((status, Json(Ready { ready, why })).into_response())
}

/// Figures for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "health", responses(
    (status = 200, body = String, content_type = "application/openmetrics-text"),
    (status = 401, body = ErrorBody)))]
pub(super) async fn metrics(State(app): State<App>) -> Result<Response, ApiError> {
    let view = pulse(&app).await?;
    let text = crate::metrics::render(&view, &app.handle)
        .map_err(|error| ApiError::internal("writing metrics", &error))?;
    Ok(([(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response())
}

/// This node
#[utoipa::path(get, path = "/v1/node", tag = "nodes", responses(
    (status = 200, body = NodeInfo), (status = 401, body = ErrorBody)))]
pub(super) async fn info(State(app): State<App>) -> Result<Json<NodeInfo>, ApiError> {
    let view = app.handle.view().await?;
    let facts = app.handle.facts();
    let (held, moved) = (app.handle.payloads().stats(), app.handle.data().stats());
    Ok(Json(NodeInfo {
        id: view.me.to_string(),
        name: facts.name.clone(),
        version: facts.version.into(),
        epoch: view.epoch,
        fabric: view.fabric.to_string(),
        fabric_name: view.fabric_name.clone(),
        currency: view.currency.clone(),
        joined: view.joined,
        halted: view.halted.clone(),
        can_order: facts.mandate.is_some(),
        addresses: Planes {
            link: facts.link.clone(),
            probe: vec![facts.probe],
            data: vec![facts.data],
        },
        links: view.links,
        records: view.records,
        capacity: (&view.capacity).into(),
        promised: (&view.promised).into(),
        withheld: (&view.withheld).into(),
        drained: view.drained,
        pursuits: view.pursuits,
        counters: (&view.counters).into(),
        payloads: Moved {
            held: held.payloads,
            bytes: held.bytes,
            bytes_sent: moved.payload_sent,
            bytes_received: moved.payload_received,
        },
    }))
}

/// Every node that this one knows
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes", responses(
    (status = 200, body = Nodes), (status = 401, body = ErrorBody)))]
pub(super) async fn list(State(app): State<App>) -> Result<Json<Nodes>, ApiError> {
    let view = app.handle.view().await?;
    let nodes = view.nodes.iter().map(NodeLine::from).collect();
    Ok(Json(Nodes { currency: view.currency, nodes }))
}

/// What the nodes that this one knows have free, and at what price
#[utoipa::path(get, path = "/v1/offers", tag = "nodes", responses(
    (status = 200, body = Offers), (status = 401, body = ErrorBody)))]
pub(super) async fn offers(State(app): State<App>) -> Result<Json<Offers>, ApiError> {
    let view = app.handle.view().await?;
    let offers = view.nodes.iter().filter_map(OfferLine::of).collect();
    Ok(Json(Offers { currency: view.currency, offers }))
}
