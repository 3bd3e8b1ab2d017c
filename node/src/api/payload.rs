//! Routes about payloads: bytes go in and out as raw bodies, never whole in memory.

// The attribute for the description expands to paths longer than they need to be.
#![allow(unused_qualifications)]

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt as _, stream};
use leasehold_proto::Hash;
use leasehold_proto::base::groups::GROUP_BYTES;
use leasehold_proto::core::{Command, InUse};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio_util::io::StreamReader;
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use super::App;
use super::body::{Fetching, HolderLine, IndexStat, PayloadLine, PayloadStat, Payloads, Uploaded};
use super::error::{ApiError, ErrorBody};
use super::guard::Params;
use crate::data::{FetchError, FetchStats, Progress};
use crate::payload::{Declared, Payload, PayloadError, PayloadStore, Root, Stored};

/// An upload that brings nothing for this long is given up.
const STALL: Duration = Duration::from_secs(30);

/// How often it is said how far a fetch is.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// How much is read of an upload that is refused before it is read, and for how long.
const DRAIN: usize = 64 << 20;
const DRAIN_FOR: Duration = Duration::from_secs(3);

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
    let room = match params.size.or(length) {
        Some(size) => match app.handle.take_room(size).await {
            Ok(room) => Some(room),
            Err(error) => {
                drain(request.into_body()).await;
                return Err(error.into());
            }
        },
        None => None,
    };
    let source = arriving(request.into_body(), app.shutdown.clone());
    let source = StreamReader::new(Box::pin(source));
    let kept = match room {
        Some(room) => app.handle.payloads().import_into(room, source).await?,
        None => app.handle.payloads().import_stream(source, Declared::AtMost(u64::MAX)).await?,
    };
    let status = if kept.already_held { StatusCode::OK } else { StatusCode::CREATED };
    let (root, size) = (kept.root.to_string(), kept.size);
    Ok((status, Json(Uploaded { root, size, new: !kept.already_held })).into_response())
}

/// Reads some of a body that is not wanted: a client that is still sending it when the connection is
/// closed may never see why.
async fn drain(body: Body) {
    let mut pieces = body.into_data_stream();
    let mut left = DRAIN;
    let reading = async {
        while let Some(Ok(piece)) = pieces.next().await {
            left = left.saturating_sub(piece.len());
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_FOR, reading).await;
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
    (status = 200, body = Payloads), (status = 401, body = ErrorBody),
    (status = 503, body = ErrorBody)))]
pub(super) async fn list(State(app): State<App>) -> Result<Json<Payloads>, ApiError> {
    let in_use = app.handle.in_use(None).await?;
    let held = app.handle.payloads().list();
    let line = |Stored { root, size, index }| {
        let (pinned, leased) = kept(&in_use, root);
        let private = app.handle.payloads().is_private(root);
        PayloadLine { root: root.to_string(), size, pinned, leased, private, index }
    };
    Ok(Json(Payloads { payloads: held.into_iter().map(line).collect() }))
}

/// Whether the node holds a payload, and which others say that they do
#[utoipa::path(get, path = "/v1/payloads/{root}/holders", tag = "payloads",
    params(("root" = String, Path)), responses(
    (status = 200, body = PayloadStat), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody)))]
pub(super) async fn holders(
    State(app): State<App>,
    Path(root): Path<String>,
) -> Result<Json<PayloadStat>, ApiError> {
    let root = root_in(&root)?;
    let (in_use, view) = (app.handle.in_use(None).await?, app.handle.view().await?);
    let (pinned, leased) = kept(&in_use, root);
    let holders = app.handle.holders(root).await.into_iter().map(|key| {
        let name = view.nodes.iter().find(|node| node.id == key).map(|node| node.name.clone());
        HolderLine { id: key.to_string(), name: name.unwrap_or_default() }
    });
    let store = app.handle.payloads().clone();
    let index = blocking("reading an index", move || index_stat(&store, root)).await?;
    Ok(Json(PayloadStat {
        root: root.to_string(),
        size: app.handle.payloads().has(root),
        pinned,
        leased,
        index,
        holders: holders.collect(),
    }))
}

fn index_stat(store: &PayloadStore, root: Root) -> Option<IndexStat> {
    let index = store.index(root).ok()?;
    let payloads = index.payloads();
    let missing = payloads.iter().filter(|payload| store.has(payload.root.into()).is_none());
    Some(IndexStat {
        files: index.files().len(),
        payloads: payloads.len(),
        size: index.payload_bytes(),
        missing: missing.count(),
    })
}

/// How a payload is asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct FetchParams {
    /// How many bytes it has; where that is not said, a holder has to prove it.
    size: Option<u64>,
    /// Whether it is an index, and all that it names is wanted as well.
    #[serde(default)]
    index: bool,
}

/// Fetch a payload from all who have it, and say how far it is: one JSON object a line
#[utoipa::path(post, path = "/v1/payloads/{root}/fetch", tag = "payloads",
    params(("root" = String, Path), FetchParams), responses(
    (status = 200, body = Fetching, content_type = "application/x-ndjson"),
    (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 404, body = ErrorBody), (status = 502, body = ErrorBody),
    (status = 507, body = ErrorBody)))]
pub(super) async fn fetch(
    State(app): State<App>,
    Path(root): Path<String>,
    Params(params): Params<FetchParams>,
) -> Result<Response, ApiError> {
    let root = root_in(&root)?;
    let size = match params.size {
        Some(size) => size,
        None => app.handle.size_of(root).await?,
    };
    app.handle.make_room_for(root, size).await?;
    let (lines, told) = mpsc::channel(1);
    // Given up when nobody reads any more.
    tokio::spawn(tell_fetch(app, (root, size), params.index, lines));
    let body = stream::unfold(told, |mut told| async move {
        let line: Fetching = told.recv().await?;
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Some((Ok::<_, io::Error>(Bytes::from(text)), told))
    });
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((headers, Body::from_stream(body)).into_response())
}

async fn tell_fetch(
    app: App,
    (root, size): (Root, u64),
    index: bool,
    lines: mpsc::Sender<Fetching>,
) {
    let (moving, mut moved) = watch::channel(Progress::default());
    let progress = |now| {
        moving.send_replace(now);
    };
    let fetching = async {
        if index {
            let (index, stats) = app.handle.fetch_index(root, size, progress).await?;
            Ok((size.saturating_add(index.payload_bytes()), stats))
        } else {
            Ok((size, app.handle.fetch(None, root, size, progress).await?))
        }
    };
    let telling = async {
        while moved.changed().await.is_ok() {
            let Progress { bytes, size, holders } = *moved.borrow_and_update();
            if lines.send(Fetching::Moving { bytes, size, holders }).await.is_err() {
                return;
            }
            tokio::time::sleep(TELL_EVERY).await;
        }
        std::future::pending().await
    };
    let last = tokio::select! {
        fetched = fetching => match fetched {
            Ok((size, FetchStats { bytes: received, took, holders, .. })) => {
                let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
                Fetching::Done { size, received, holders: holders.len(), took_ms }
            }
            Err::<_, FetchError>(error) => Fetching::Failed { error: ApiError::from(error).into_inside() },
        },
        () = telling => return,
        // Nobody reads any more.
        () = lines.closed() => return,
        () = app.shutdown.cancelled() => {
            Fetching::Failed { error: ApiError::stopping().into_inside() }
        }
    };
    let _ = lines.send(last).await;
}

/// How a payload is removed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct RemoveParams {
    /// Also where it is pinned, or belongs to a lease.
    #[serde(default)]
    force: bool,
    /// Whether it is an index, and what it names goes with it, but for what is pinned, belongs to a
    /// lease, or is named by another index.
    #[serde(default)]
    index: bool,
}

/// Remove a payload from this node
#[utoipa::path(delete, path = "/v1/payloads/{root}", tag = "payloads",
    params(("root" = String, Path), RemoveParams), responses(
    (status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn remove(
    State(app): State<App>,
    Path(root): Path<String>,
    Params(params): Params<RemoveParams>,
) -> Result<StatusCode, ApiError> {
    let root = root_in(&root)?;
    let in_use = app.handle.in_use(None).await?;
    let (pinned, leased) = kept(&in_use, root);
    if !params.force && pinned {
        return Err(ApiError::conflict(
            "it is pinned, or an index that names it is: unpin that first, or force it",
        ));
    }
    if !params.force && leased {
        return Err(ApiError::conflict(
            "it belongs to a lease, or an index that names it does: release that first, or force it",
        ));
    }
    let payloads = app.handle.payloads().clone();
    // What is kept for another reason than this index stays, also where that is forced away.
    let spared = match params.index {
        true => Some(app.handle.in_use(Some(root)).await?),
        false => None,
    };
    let removed = blocking("removing a payload", move || match spared {
        Some(InUse { pinned, leased }) => {
            let spared = pinned.into_iter().chain(leased).map(Root::from).collect();
            payloads.remove_index(root, &spared).map(|_| true)
        }
        None => payloads.remove(root),
    });
    match removed.await?? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(PayloadError::NotHeld(root).into()),
    }
}

/// What is to be cloned.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct CloneParams {
    /// Where the file lies on the node's host: an absolute path.
    path: String,
    /// How many bytes it has, exactly.
    size: u64,
}

/// Keep a file of the node's host as a payload without copying it, where its file system can share
/// blocks. Whoever asks knows its content: its root has to be said.
#[utoipa::path(post, path = "/v1/payloads/{root}/clone", tag = "payloads",
    params(("root" = String, Path), CloneParams), responses(
    (status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it cannot be cloned: send its bytes"),
    (status = 507, body = ErrorBody)))]
pub(super) async fn clone(
    State(app): State<App>,
    Path(root): Path<String>,
    Params(params): Params<CloneParams>,
) -> Result<StatusCode, ApiError> {
    let root = root_in(&root)?;
    let path = PathBuf::from(params.path);
    if !path.is_absolute() {
        return Err(ApiError::field("path", "it is not absolute"));
    }
    let room = app.handle.take_room(params.size).await?;
    let payloads = app.handle.payloads().clone();
    let cloned = blocking("cloning a payload", move || payloads.clone_path(&path, root, room));
    match cloned.await? {
        Ok(_) => Ok(StatusCode::NO_CONTENT),
        // What is there, if anything is, is not told apart.
        Err(PayloadError::Source(_) | PayloadError::WrongSize { .. }) => {
            Err(ApiError::field("path", "there is no file with these bytes that the node can read"))
        }
        Err(error) => Err(error.into()),
    }
}

/// Keep a payload from peers who ask for it; also before its bytes are here
#[utoipa::path(put, path = "/v1/payloads/{root}/private", tag = "payloads",
    params(("root" = String, Path)), responses(
    (status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub(super) async fn keep_private(
    State(app): State<App>,
    Path(root): Path<String>,
) -> Result<StatusCode, ApiError> {
    let (root, payloads) = (root_in(&root)?, app.handle.payloads().clone());
    blocking("keeping a payload from peers", move || payloads.keep_private(root)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// Let peers have a payload again
#[utoipa::path(delete, path = "/v1/payloads/{root}/private", tag = "payloads",
    params(("root" = String, Path)), responses(
    (status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub(super) async fn publish(
    State(app): State<App>,
    Path(root): Path<String>,
) -> Result<StatusCode, ApiError> {
    let (root, payloads) = (root_in(&root)?, app.handle.payloads().clone());
    blocking("letting peers have a payload", move || payloads.publish(root)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// Keep a payload, whatever else needs its room
#[utoipa::path(put, path = "/v1/payloads/{root}/pin", tag = "payloads",
    params(("root" = String, Path)), responses(
    (status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 404, body = ErrorBody)))]
pub(super) async fn pin(
    State(app): State<App>,
    Path(root): Path<String>,
) -> Result<StatusCode, ApiError> {
    let root = root_in(&root)?;
    if app.handle.payloads().has(root).is_none() {
        return Err(PayloadError::NotHeld(root).into());
    }
    app.handle.ask(Command::Pin(root.into(), true)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Let a payload make room again
#[utoipa::path(delete, path = "/v1/payloads/{root}/pin", tag = "payloads",
    params(("root" = String, Path)), responses(
    (status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub(super) async fn unpin(
    State(app): State<App>,
    Path(root): Path<String>,
) -> Result<StatusCode, ApiError> {
    let root = root_in(&root)?;
    app.handle.ask(Command::Pin(root.into(), false)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Read a payload against its name; one that does not match is set aside and no longer held
#[utoipa::path(post, path = "/v1/payloads/{root}/verify", tag = "payloads",
    params(("root" = String, Path)), responses(
    (status = 204), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn verify(
    State(app): State<App>,
    Path(root): Path<String>,
) -> Result<StatusCode, ApiError> {
    let root = root_in(&root)?;
    let payloads = app.handle.payloads().clone();
    match blocking("verifying a payload", move || payloads.verify(root)).await? {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error @ PayloadError::Corrupt(_)) => Err(ApiError::conflict(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// Does what may block on the disk where it may.
pub(super) async fn blocking<T: Send + 'static>(
    doing: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| ApiError::internal(doing, &error))
}

/// Whether a payload is pinned, and whether it belongs to a lease.
fn kept(in_use: &InUse, root: Root) -> (bool, bool) {
    let root = Hash::from(root);
    (in_use.pinned.contains(&root), in_use.leased.contains(&root))
}

fn root_in(text: &str) -> Result<Root, ApiError> {
    text.parse().map_err(|error| ApiError::field("root", error))
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
    let root = root_in(&root)?;
    send(app.handle.payloads().clone(), root, app.shutdown.clone()).await
}

/// A response with the bytes of a payload that is held.
pub(super) async fn send(
    store: PayloadStore,
    root: Root,
    shutdown: CancellationToken,
) -> Result<Response, ApiError> {
    let payload = blocking("opening a payload", move || store.open(root)).await??;
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
