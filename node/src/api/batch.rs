//! `/v1/files` and `/v1/batches`, in OpenAI's shapes: see [`crate::batch`] for what becomes of them.

use std::collections::BTreeMap;
use std::io::Write as _;

use axum::Json;
use axum::extract::{Multipart, Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;

use super::openai::{Shared, refused};
use crate::batch::{Batch, Kept, MAX_FILE, Status};
use crate::openai::{Endpoint, Fault};

fn file_json(file: &Kept) -> Value {
    json!({
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created_at,
        "filename": file.filename, "purpose": file.purpose, "status": "processed",
    })
}

fn batch_json(batch: &Batch) -> Value {
    let at = |status: Status| (batch.status == status).then_some(batch.ended_at).flatten();
    let over = !batch.status.is_open();
    let file = |id: &str, count: u64| (over && count > 0).then(|| id.to_owned());
    let errors =
        (!batch.mistakes.is_empty()).then(|| json!({ "object": "list", "data": batch.mistakes }));
    json!({
        "id": batch.id, "object": "batch", "endpoint": batch.endpoint.path(), "errors": errors,
        "input_file_id": batch.input, "completion_window": "24h", "status": batch.status,
        "output_file_id": file(&batch.output, batch.completed),
        "error_file_id": file(&batch.error, batch.failed),
        "created_at": batch.created_at, "in_progress_at": batch.created_at,
        "expires_at": batch.expires_at, "finalizing_at": at(Status::Completed),
        "completed_at": at(Status::Completed), "failed_at": at(Status::Failed),
        "expired_at": at(Status::Expired), "cancelled_at": at(Status::Cancelled),
        "cancelling_at": null,
        "request_counts": {
            "total": batch.total, "completed": batch.completed, "failed": batch.failed,
        },
        "metadata": batch.metadata,
    })
}

fn answered(answer: Result<Value, Fault>) -> Response {
    answer.map_or_else(refused, |value| Json(value).into_response())
}

fn no_file(id: &str) -> Fault {
    let mut fault =
        Fault::invalid(Some("not_found"), format!("No such File object: {id}")).at("id");
    fault.status = 404;
    fault
}

fn no_batch(id: &str) -> Fault {
    let mut fault = Fault::invalid(Some("not_found"), format!("No batch found with id '{id}'."));
    fault.status = 404;
    fault
}

/// Takes a file: a form with `purpose` and `file`.
pub(super) async fn upload(
    State((service, guard)): Shared,
    headers: HeaderMap,
    form: Result<Multipart, axum::extract::multipart::MultipartRejection>,
) -> Response {
    let taking = async {
        let owner = service.owner(guard.as_deref(), &headers)?;
        let mut form = form.map_err(|error| Fault::invalid(None, error.body_text()))?;
        let wrong = |error: axum::extract::multipart::MultipartError| {
            if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
                return Fault::too_large(usize::try_from(MAX_FILE).unwrap_or(usize::MAX));
            }
            Fault::invalid(None, error.body_text())
        };
        let batches = service.batches();
        let (mut purpose, mut taken) = (None, None);
        while let Some(mut field) = form.next_field().await.map_err(wrong)? {
            match field.name() {
                Some("purpose") => purpose = Some(field.text().await.map_err(wrong)?),
                Some("file") if taken.is_none() => {
                    let name: String =
                        field.file_name().unwrap_or("file").chars().take(256).collect();
                    let (id, mut file) = batches.arriving()?;
                    let mut bytes = 0;
                    let mut broken = None;
                    loop {
                        match field.chunk().await.map_err(wrong) {
                            Ok(Some(piece)) => {
                                bytes += piece.len() as u64;
                                if bytes > MAX_FILE {
                                    let most = usize::try_from(MAX_FILE).unwrap_or(usize::MAX);
                                    broken = Some(Fault::too_large(most));
                                } else if file.write_all(&piece).is_err() {
                                    broken = Some(Fault::internal());
                                }
                            }
                            Ok(None) => break,
                            Err(fault) => broken = Some(fault),
                        }
                        if let Some(fault) = broken {
                            batches.forget(&id);
                            return Err(fault);
                        }
                    }
                    taken = Some((id, name, bytes, file));
                }
                // OpenAI lets files expire; here they are kept until they are deleted.
                _ => drop(field.bytes().await.map_err(wrong)?),
            }
        }
        let (id, filename, bytes, file) = taken.ok_or_else(|| Fault::missing("file"))?;
        if purpose.as_deref() != Some("batch") {
            batches.forget(&id);
            let why = "The only purpose of a file is 'batch'.";
            return Err(Fault::invalid(Some("invalid_value"), why).at("purpose"));
        }
        let purpose = "batch".to_owned();
        let kept = Kept { id: String::new(), owner, bytes, created_at: 0, filename, purpose };
        batches.keep(id, kept, &file).map(|kept| file_json(&kept))
    };
    answered(taking.await)
}

/// What of a list is wanted.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Page {
    limit: Option<usize>,
    after: Option<String>,
}

/// A page of a list whose items have ids.
fn page(items: Vec<Value>, page: &Page) -> Value {
    let after = page.after.as_deref().unwrap_or_default();
    let skip = items.iter().position(|item| item["id"] == after).map_or(0, |at| at + 1);
    let limit = page.limit.unwrap_or(20).clamp(1, 10_000);
    let more = items.len() > skip + limit;
    let data: Vec<Value> = items.into_iter().skip(skip).take(limit).collect();
    let end = |item: Option<&Value>| item.map(|item| item["id"].clone());
    json!({
        "object": "list", "first_id": end(data.first()), "last_id": end(data.last()),
        "has_more": more, "data": data,
    })
}

pub(super) async fn files(
    State((service, guard)): Shared,
    headers: HeaderMap,
    Query(wanted): Query<Page>,
) -> Response {
    answered(service.sees(guard.as_deref(), &headers).map(|owner| {
        let files = service.batches().files(owner.as_deref());
        page(files.iter().map(file_json).collect(), &wanted)
    }))
}

pub(super) async fn file(
    State((service, guard)): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Response {
    answered(service.sees(guard.as_deref(), &headers).and_then(|owner| {
        let file = service.batches().file(owner.as_deref(), &id);
        file.map(|file| file_json(&file)).ok_or_else(|| no_file(&id))
    }))
}

pub(super) async fn remove(
    State((service, guard)): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Response {
    answered(service.sees(guard.as_deref(), &headers).and_then(|owner| {
        let removed = service.batches().remove(owner.as_deref(), &id)?;
        let gone = json!({ "id": id, "object": "file", "deleted": true });
        removed.then_some(gone).ok_or_else(|| no_file(&id))
    }))
}

pub(super) async fn content(
    State((service, guard)): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Response {
    let opening = async {
        let owner = service.sees(guard.as_deref(), &headers)?;
        let file = service.batches().file(owner.as_deref(), &id).ok_or_else(|| no_file(&id))?;
        let path = service.batches().content(&file);
        let opened = tokio::fs::File::open(path).await.map_err(|_| no_file(&id))?;
        let body = axum::body::Body::from_stream(ReaderStream::new(opened));
        let headers = [
            (header::CONTENT_TYPE, "application/jsonl".to_owned()),
            (header::CONTENT_LENGTH, file.bytes.to_string()),
        ];
        Ok((headers, body).into_response())
    };
    opening.await.unwrap_or_else(refused)
}

/// What a batch is made of.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    input_file_id: String,
    endpoint: String,
    completion_window: String,
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
}

pub(super) async fn make(
    State((service, guard)): Shared,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> Response {
    let making = async {
        let owner = service.owner(guard.as_deref(), &headers)?;
        let wanted: Wanted = serde_json::from_slice(&body).map_err(Fault::not_json)?;
        let endpoint = Endpoint::ALL.into_iter().find(|known| known.path() == wanted.endpoint);
        let endpoint = endpoint.ok_or_else(|| {
            let why = format!("There are no batches for '{}'.", wanted.endpoint);
            Fault::invalid(Some("invalid_value"), why).at("endpoint")
        })?;
        if wanted.completion_window != "24h" {
            let why = "The only completion_window is '24h'.";
            return Err(Fault::invalid(Some("invalid_value"), why).at("completion_window"));
        }
        let long = |text: &String| text.len() > 512;
        if wanted.metadata.iter().flatten().any(|(name, value)| long(name) || long(value)) {
            let why = "Metadata are texts of at most 512 bytes.";
            return Err(Fault::invalid(Some("invalid_value"), why).at("metadata"));
        }
        let batches = service.batches().clone();
        let make = move || batches.make(owner, endpoint, &wanted.input_file_id, wanted.metadata);
        let made = tokio::task::spawn_blocking(make).await.map_err(|_| Fault::internal())??;
        Ok(batch_json(&made))
    };
    answered(making.await)
}

pub(super) async fn list(
    State((service, guard)): Shared,
    headers: HeaderMap,
    Query(wanted): Query<Page>,
) -> Response {
    answered(service.sees(guard.as_deref(), &headers).map(|owner| {
        let batches = service.batches().list(owner.as_deref());
        page(batches.iter().map(batch_json).collect(), &wanted)
    }))
}

pub(super) async fn show(
    State((service, guard)): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Response {
    answered(service.sees(guard.as_deref(), &headers).and_then(|owner| {
        let batch = service.batches().get(owner.as_deref(), &id);
        batch.map(|batch| batch_json(&batch)).ok_or_else(|| no_batch(&id))
    }))
}

pub(super) async fn cancel(
    State((service, guard)): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Response {
    answered(service.sees(guard.as_deref(), &headers).and_then(|owner| {
        service.batches().get(owner.as_deref(), &id).ok_or_else(|| no_batch(&id))?;
        service.batches().cancel(owner.as_deref(), &id).map(|batch| batch_json(&batch))
    }))
}
