//! Routes about payloads: bytes go in and out as raw bodies, never whole in memory.

// The attribute for the description expands to paths longer than they need to be.
#![allow(unused_qualifications)]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt as _, stream};
use leasehold_proto::base::groups::GROUP_BYTES;
use serde::Deserialize;
use tokio_util::io::StreamReader;
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use super::App;
use super::body::{PayloadLine, Payloads, Uploaded};
use super::error::{ApiError, ErrorBody};
use super::guard::Params;
use crate::payload::{Declared, Payload, PayloadStore, Root};

/// An upload that brings nothing for this long is given up.
const STALL: Duration = Duration::from_secs(30);

/// How an upload is declared.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct UploadParams {
    /// How many bytes come, exactly; needed only where Content-Length does not say so.
    size: Option<u64>,
}

/// Keep the body as a payload
#[utoipa::path(post, path = "/v1/payloads", tag = "payloads", params(UploadParams),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 200, body = Uploaded, description = "it was held before"),
    (status = 201, body = Uploaded), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 413, body = ErrorBody),
    (status = 507, body = ErrorBody)))]
pub(super) async fn upload(
    State(app): State<App>,
    Params(params): Params<UploadParams>,
    request: Request,
) -> Result<Response, ApiError> {
    let length = request.headers().get(header::CONTENT_LENGTH);
    let length = length.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if let (Some(size), Some(length)) = (params.size, length)
        && size != length
    {
        let why = format!("it says {size} bytes and Content-Length says {length}");
        return Err(ApiError::field("size", why));
    }
    let declared = match params.size.or(length) {
        Some(size) => Declared::Exactly(size),
        None => Declared::AtMost(u64::MAX),
    };
    let source = arriving(request.into_body(), app.shutdown.clone());
    let source = StreamReader::new(Box::pin(source));
    let kept = app.handle.payloads().import_stream(source, declared).await?;
    let status = if kept.already_held { StatusCode::OK } else { StatusCode::CREATED };
    let (root, size) = (kept.root.to_string(), kept.size);
    Ok((status, Json(Uploaded { root, size, new: !kept.already_held })).into_response())
}

/// The pieces of a body, until it stalls or the node stops.
fn arriving(body: Body, shutdown: CancellationToken) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(Some((body.into_data_stream(), shutdown)), |state| async {
        let (mut pieces, shutdown) = state?;
        let next = tokio::select! {
            () = shutdown.cancelled() => Some(Err(io::Error::other("the node is stopping"))),
            next = tokio::time::timeout(STALL, pieces.next()) => match next {
                Ok(next) => next.map(|piece| piece.map_err(io::Error::other)),
                Err(_) => Some(Err(io::Error::other("nothing came for 30 s"))),
            },
        };
        match next? {
            Ok(piece) => Some((Ok(piece), Some((pieces, shutdown)))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// Every payload that the node holds
#[utoipa::path(get, path = "/v1/payloads", tag = "payloads", responses(
    (status = 200, body = Payloads), (status = 401, body = ErrorBody)))]
pub(super) async fn list(State(app): State<App>) -> Json<Payloads> {
    let held = app.handle.payloads().list();
    let line = |(root, size): (Root, u64)| PayloadLine { root: root.to_string(), size };
    Json(Payloads { payloads: held.into_iter().map(line).collect() })
}

/// The bytes of a payload; HEAD asks whether the node holds it
#[utoipa::path(get, path = "/v1/payloads/{root}", tag = "payloads",
    params(("root" = String, Path, description = "its BLAKE3 root, 64 hex digits")), responses(
    (status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
    (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 404, body = ErrorBody)))]
pub(super) async fn download(
    State(app): State<App>,
    Path(root): Path<String>,
) -> Result<Response, ApiError> {
    let root = root.parse().map_err(|error| ApiError::field("root", error))?;
    send(app.handle.payloads().clone(), root, app.shutdown.clone()).await
}

/// A response with the bytes of a payload that is held.
pub(super) async fn send(
    store: PayloadStore,
    root: Root,
    shutdown: CancellationToken,
) -> Result<Response, ApiError> {
    let opened = tokio::task::spawn_blocking(move || store.open(root)).await;
    let payload = opened.map_err(|error| ApiError::internal("opening a payload", &error))??;
    let size = payload.size();
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_string()),
        (header::CONTENT_LENGTH, size.to_string()),
        (header::CONTENT_DISPOSITION, "attachment".to_string()),
        (header::ETAG, format!("\"{root}\"")),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_string()),
    ];
    let body = Body::from_stream(leaving(Arc::new(payload), shutdown));
    Ok((headers, body).into_response())
}

/// The pieces of a payload, until its end, a failing disk, or the node's stop.
fn leaving(
    payload: Arc<Payload>,
    shutdown: CancellationToken,
) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(Some((payload, 0u64, shutdown)), |state| async {
        let (payload, offset, shutdown) = state?;
        let left = payload.size().saturating_sub(offset).min(GROUP_BYTES);
        if left == 0 {
            return None;
        }
        if shutdown.is_cancelled() {
            return Some((Err(io::Error::other("the node is stopping")), None));
        }
        let length = usize::try_from(left).unwrap_or(0);
        let reader = Arc::clone(&payload);
        let read = tokio::task::spawn_blocking(move || reader.read_at(offset, length)).await;
        match read.map_err(io::Error::other).flatten() {
            Ok(piece) => Some((Ok(piece), Some((payload, offset + left, shutdown)))),
            Err(error) => Some((Err(error), None)),
        }
    })
}
