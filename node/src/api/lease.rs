//! Routes about leases: plan, order, lease, claim, follow, release, and what proves it.

// The attribute for the description expands to paths longer than they need to be.
#![allow(unused_qualifications)]

use std::io;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{Stream, stream};
use leasehold_keys::armor::{self, Item};
use leasehold_keys::view as keys_view;
use leasehold_proto::core::{self, Command, Failure, Reply, View};
use leasehold_proto::words::contract::{JobSpec, MAX_GANG};
use leasehold_proto::words::message;
use leasehold_proto::words::sign::{Signed, Verified};
use leasehold_proto::words::usage::{Acknowledgement, Receipt};
use leasehold_proto::{FabricId, KeyId, LeaseId};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;

use super::App;
use super::body::{
    ChoiceLine, ClaimRequest, Claimed, EndLine, GangRequest, Ganged, HeardLine, JobLine, Jobs,
    LeaseLine, LeaseRequest, Leased, Leases, Money, OnLoss, OrderDraft, OrderRequest, Plan,
    PlanRequest, ReceiptLine, Receipts, Released, RenewRequest, Renewed, word,
};
use super::error::{ApiError, ErrorBody};
use super::guard::{Input, Params};
use super::payload;
use crate::attach::{self, Attached, Frame};
use crate::clock;
use crate::payload::Root;

/// The longest that a client may wait for a lease's end in one request, in seconds.
const MAX_WAIT_S: u64 = 300;
/// How long a client waits for it when it does not say.
const WAIT_S: u64 = 30;
/// Where nothing is to be followed: the output is over when nothing more came for this long.
const QUIET: Duration = Duration::from_secs(1);
/// The content type of a job's output: see [`crate::attach`] for its frames.
pub(super) const FRAMES: &str = "application/vnd.leasehold.frames";

pub(super) fn lease_id(text: &str) -> Result<LeaseId, ApiError> {
    text.parse().map_err(|error| ApiError::field("lease", error))
}

/// An answer that does not belong to its question: a bug, not a client's fault.
pub(super) fn unfitting(reply: &Reply) -> ApiError {
    ApiError::internal("answering a command", &format!("{reply:?}"))
}

pub(super) fn currency(app: &App) -> String {
    app.handle.facts().currency.clone()
}

/// Rank the hosts for what is wanted
#[utoipa::path(post, path = "/v1/plan", tag = "leases", request_body = PlanRequest, responses(
    (status = 200, body = Plan), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody)))]
pub(super) async fn plan(
    State(app): State<App>,
    Input(request): Input<PlanRequest>,
) -> Result<Json<Plan>, ApiError> {
    let want = request.want.parse()?;
    match app.handle.ask(Command::Plan(want)).await? {
        Reply::Plan(ranking) => Ok(Json(Plan::of(&ranking, currency(&app)))),
        other => Err(unfitting(&other)),
    }
}

/// Draft an order for a lessee to sign elsewhere
#[utoipa::path(post, path = "/v1/orders", tag = "leases", request_body = OrderRequest, responses(
    (status = 200, body = OrderDraft), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub(super) async fn order(
    State(app): State<App>,
    Input(request): Input<OrderRequest>,
) -> Result<Json<OrderDraft>, ApiError> {
    let want = request.want.parse()?;
    let lessee = request.lessee.parse().map_err(|error| ApiError::field("lessee", error))?;
    let certificate = one_signed("certificate", &request.certificate)?;
    let command = Command::DraftOrder { want, lessee, certificate };
    match app.handle.ask(command).await? {
        Reply::Drafted(draft, choice) => Ok(Json(OrderDraft {
            order: armor::encode(&Item::Draft(draft))?,
            choice: (&choice).into(),
            currency: currency(&app),
        })),
        other => Err(unfitting(&other)),
    }
}

/// The one signed object in a text.
pub(super) fn one_signed(field: &'static str, text: &str) -> Result<Signed, ApiError> {
    let items = armor::decode(text.as_bytes()).map_err(|error| ApiError::field(field, error))?;
    match <[Item; 1]>::try_from(items) {
        Ok([Item::Signed(signed)]) => Ok(signed),
        Ok([Item::Draft(_)]) => {
            Err(ApiError::field(field, "it is not signed yet: run leasehold-keys sign on it"))
        }
        _ => Err(ApiError::field(field, "expected exactly one signed object")),
    }
}

/// Get a lease, by a want under the node's mandate or by an order that the lessee signed
#[utoipa::path(post, path = "/v1/leases", tag = "leases", request_body = LeaseRequest, responses(
    (status = 201, body = Leased), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
    (status = 422, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn request(
    State(app): State<App>,
    Input(request): Input<LeaseRequest>,
) -> Result<Response, ApiError> {
    let command = match (request.want, request.order) {
        (Some(want), None) => Command::Lease(want.parse()?),
        (None, Some(text)) => {
            let signed = one_signed("order", &text)?;
            let fabric = FabricId(app.handle.facts().charter.id());
            let papers = message::verify_order(&signed, &fabric)
                .map_err(|error| ApiError::field("order", error))?;
            Command::LeaseBy(Box::new(papers))
        }
        _ => return Err(ApiError::field("want", "say either a want or an order")),
    };
    match app.handle.ask(command).await? {
        Reply::Leased(leased) => {
            let body = leased_line(&app, &leased);
            Ok((StatusCode::CREATED, Json(body)).into_response())
        }
        other => Err(unfitting(&other)),
    }
}

fn leased_line(app: &App, leased: &core::Leased) -> Leased {
    Leased {
        lease: leased.lease.to_string(),
        order: leased.order.to_string(),
        choice: ChoiceLine::from(&leased.choice),
        heard: leased.heard.iter().map(HeardLine::from).collect(),
        currency: currency(app),
    }
}

/// A lessor fetches what a job needs from here: what is not here is said before anything else.
fn check_payloads(app: &App, job: &JobSpec) -> Result<(), ApiError> {
    for needed in job.payloads() {
        let root = Root::from_bytes(needed.root.0);
        match app.handle.payloads().has(root) {
            Some(size) if size == needed.size => {}
            Some(size) => {
                let why = format!("payload {root} has {size} bytes, not {}", needed.size);
                return Err(ApiError::field("job", why));
            }
            None => {
                let why = format!("this node does not hold payload {root}: upload it first");
                return Err(ApiError::field("job", why));
            }
        }
    }
    Ok(())
}

/// Which leases are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ListParams {
    /// Also those that are over.
    #[serde(default)]
    all: bool,
}

fn lines(view: &View) -> impl Iterator<Item = LeaseLine> + '_ {
    let now = clock::boot();
    let held = view.held.iter().map(|held| LeaseLine::held(held, view));
    held.chain(view.lent.iter().map(move |lent| LeaseLine::lent(lent, view, now)))
}

/// Leases that this node holds or granted, the latest last
#[utoipa::path(get, path = "/v1/leases", tag = "leases", params(ListParams), responses(
    (status = 200, body = Leases), (status = 401, body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Params(params): Params<ListParams>,
) -> Result<Json<Leases>, ApiError> {
    let view = app.handle.view().await?;
    let mut leases: Vec<_> = lines(&view).filter(|line| params.all || !line.is_over()).collect();
    // The latest comes last: these texts sort as the times do.
    leases.sort_by(|one, other| one.decided.cmp(&other.decided));
    Ok(Json(Leases { leases }))
}

/// One lease that this node holds or granted
#[utoipa::path(get, path = "/v1/leases/{lease}", tag = "leases",
    params(("lease" = String, Path, description = "its id, 64 hex digits")), responses(
    (status = 200, body = LeaseLine), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn show(
    State(app): State<App>,
    Path(lease): Path<String>,
) -> Result<Json<LeaseLine>, ApiError> {
    let lease = lease_id(&lease)?.to_string();
    let view = app.handle.view().await?;
    let found = lines(&view).find(|line| line.lease.as_ref() == Some(&lease));
    let missing = || ApiError::not_found(format!("no lease {lease} is held or granted here"));
    found.map(Json).ok_or_else(missing)
}

/// Use a lease: start a job under it
#[utoipa::path(post, path = "/v1/leases/{lease}/claim", tag = "leases",
    params(("lease" = String, Path)), request_body = ClaimRequest, responses(
    (status = 200, body = Claimed), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody), (status = 410, body = ErrorBody)))]
pub(super) async fn claim(
    State(app): State<App>,
    Path(lease): Path<String>,
    Input(request): Input<ClaimRequest>,
) -> Result<Json<Claimed>, ApiError> {
    let lease = lease_id(&lease)?;
    let job = request.job.parse()?;
    check_payloads(&app, &job)?;
    match app.handle.ask(Command::Claim { lease, job }).await? {
        Reply::Claimed(lessor) => {
            Ok(Json(Claimed { lease: lease.to_string(), lessor: lessor.to_string() }))
        }
        other => Err(unfitting(&other)),
    }
}

/// Give a held lease back: its job is stopped
#[utoipa::path(post, path = "/v1/leases/{lease}/release", tag = "leases",
    params(("lease" = String, Path)), responses(
    (status = 200, body = Released), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    (status = 502, body = ErrorBody)))]
pub(super) async fn release(
    State(app): State<App>,
    Path(lease): Path<String>,
) -> Result<Json<Released>, ApiError> {
    let lease = lease_id(&lease)?;
    match app.handle.ask(Command::Release(lease)).await? {
        Reply::Released => Ok(Json(Released { lease: lease.to_string() })),
        other => Err(unfitting(&other)),
    }
}

/// Make a held lease longer, at its price
#[utoipa::path(post, path = "/v1/leases/{lease}/renew", tag = "leases",
    params(("lease" = String, Path)), request_body = RenewRequest, responses(
    (status = 200, body = Renewed), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody), (status = 410, body = ErrorBody),
    (status = 422, body = ErrorBody), (status = 502, body = ErrorBody)))]
pub(super) async fn renew(
    State(app): State<App>,
    Path(lease): Path<String>,
    Input(request): Input<RenewRequest>,
) -> Result<Json<Renewed>, ApiError> {
    let lease = lease_id(&lease)?;
    let term = crate::quantity::span(&request.ttl.0);
    let term = term.map_err(|why| ApiError::field("ttl", why))?;
    match app.handle.ask(Command::Renew { lease, term }).await? {
        Reply::Renewed { version, term, left } => Ok(Json(Renewed {
            lease: lease.to_string(),
            version,
            term_ms: term.as_millis(),
            left_ms: left.as_millis(),
        })),
        other => Err(unfitting(&other)),
    }
}

/// Get leases on several hosts, together or not at all, and start a job under each
#[utoipa::path(post, path = "/v1/gangs", tag = "leases", request_body = GangRequest, responses(
    (status = 201, body = Ganged), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
    (status = 422, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn gang(
    State(app): State<App>,
    Input(request): Input<GangRequest>,
) -> Result<Response, ApiError> {
    let want = request.want.parse()?;
    let job = request.job.map(|job| job.parse()).transpose()?;
    if let Some(job) = &job {
        check_payloads(&app, job)?;
    }
    let (size, together) = (request.nodes, request.on_loss == OnLoss::End);
    let in_bounds = size > 0 && usize::from(size) <= MAX_GANG;
    if !in_bounds {
        return Err(ApiError::field("nodes", format!("a gang has 1 to {MAX_GANG} members")));
    }
    match app.handle.ask(Command::Gang { want, size, job, together }).await? {
        Reply::Ganged { gang, leases, heard } => {
            let body = Ganged {
                gang: gang.to_string(),
                leases: leases.iter().map(|leased| leased_line(&app, leased)).collect(),
                heard: heard.iter().map(HeardLine::from).collect(),
                currency: currency(&app),
            };
            Ok((StatusCode::CREATED, Json(body)).into_response())
        }
        other => Err(unfitting(&other)),
    }
}

/// How long to wait.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct EndParams {
    /// At most this many seconds, 30 when not said and never more than 300.
    timeout_s: Option<u64>,
}

/// Wait until a held lease has ended, or for some seconds
#[utoipa::path(get, path = "/v1/leases/{lease}/end", tag = "leases",
    params(("lease" = String, Path), EndParams), responses(
    (status = 200, body = EndLine), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn end(
    State(app): State<App>,
    Path(lease): Path<String>,
    Params(params): Params<EndParams>,
) -> Result<Json<EndLine>, ApiError> {
    let lease = lease_id(&lease)?;
    let currency = currency(&app);
    let wait = Duration::from_secs(params.timeout_s.unwrap_or(WAIT_S).min(MAX_WAIT_S));
    tokio::select! {
        () = app.shutdown.cancelled() => Err(ApiError::stopping()),
        () = tokio::time::sleep(wait) => Ok(Json(EndLine::not_yet(currency))),
        ended = app.ends.of(&app.handle, lease) => Ok(Json(EndLine::of(&ended?, currency))),
    }
}

/// From where on output is wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct OutputParams {
    /// From this byte of standard output on.
    #[serde(default)]
    stdout: u64,
    /// From this byte of standard error on.
    #[serde(default)]
    stderr: u64,
    /// Whether to wait for more until the job has ended; else the body ends when nothing more
    /// came for a second.
    #[serde(default = "yes")]
    follow: bool,
}

const fn yes() -> bool {
    true
}

/// The output of the job under a held lease, as frames: `kind u8 | length u32 LE | bytes`, where
/// kind 1 is standard output, 2 standard error and 3 the end, a JSON object that comes last. A
/// body without it was cut: ask again from the offsets reached
#[utoipa::path(get, path = "/v1/leases/{lease}/output", tag = "leases",
    params(("lease" = String, Path), OutputParams), responses(
    (status = 200, body = Vec<u8>, content_type = FRAMES), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    (status = 502, body = ErrorBody)))]
pub(super) async fn output(
    State(app): State<App>,
    Path(lease): Path<String>,
    Params(params): Params<OutputParams>,
) -> Result<Response, ApiError> {
    let lease = lease_id(&lease)?;
    let attached = app.handle.attach(lease, params.stdout, params.stderr).await?;
    let quiet = (!params.follow).then_some(QUIET);
    let body = Body::from_stream(frames(attached, quiet, app.shutdown.clone()));
    Ok(([(header::CONTENT_TYPE, FRAMES)], body).into_response())
}

/// The frames of a job as bytes. A break shows as a broken body, never as an end.
fn frames(
    attached: Attached,
    quiet: Option<Duration>,
    shutdown: CancellationToken,
) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(Some((attached, shutdown)), move |state| async move {
        let (mut attached, shutdown) = state?;
        let silence = async {
            match quiet {
                Some(quiet) => tokio::time::sleep(quiet).await,
                None => std::future::pending().await,
            }
        };
        let next = tokio::select! {
            () = shutdown.cancelled() => Err(io::Error::other("the node is stopping")),
            () = silence => return None,
            next = attached.next() => next.map_err(io::Error::other),
        };
        match next {
            Ok(Some(frame)) => {
                let last = matches!(frame, Frame::End(_));
                let mut bytes = Vec::new();
                match attach::write(&mut bytes, &frame).await {
                    Ok(()) => {
                        let rest = (!last).then_some((attached, shutdown));
                        Some((Ok(Bytes::from(bytes)), rest))
                    }
                    Err(error) => Some((Err(error), None)),
                }
            }
            Ok(None) => Some((Err(io::Error::other("the lessor ended the stream early")), None)),
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// Which output file.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct FileParams {
    /// Its BLAKE3 root, from the end of the job's output.
    root: String,
    /// How many bytes, exactly.
    size: u64,
}

/// The bytes of a declared output, fetched from the lessor unless they are here already
#[utoipa::path(get, path = "/v1/leases/{lease}/outputs/{name}", tag = "leases",
    params(("lease" = String, Path), ("name" = String, Path), FileParams), responses(
    (status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
    (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 404, body = ErrorBody), (status = 502, body = ErrorBody)))]
pub(super) async fn file(
    State(app): State<App>,
    Path((lease, _name)): Path<(String, String)>,
    Params(params): Params<FileParams>,
) -> Result<Response, ApiError> {
    let lease = lease_id(&lease)?;
    let root: Root = params.root.parse().map_err(|error| ApiError::field("root", error))?;
    let view = app.handle.view().await?;
    let held = view.held.iter().find(|held| held.id == Some(lease));
    let lessor: KeyId = held.ok_or(Failure::UnknownLease)?.lessor;
    if app.handle.payloads().has(root).is_none() {
        app.handle.fetch(Some(lessor), root, params.size, |_| {}).await?;
    }
    payload::send(app.handle.payloads().clone(), root, app.shutdown.clone()).await
}

/// The receipts of a lease that this node holds or granted
#[utoipa::path(get, path = "/v1/leases/{lease}/receipts", tag = "leases",
    params(("lease" = String, Path)), responses(
    (status = 200, body = Receipts), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn receipts(
    State(app): State<App>,
    Path(lease): Path<String>,
) -> Result<Json<Receipts>, ApiError> {
    let lease = lease_id(&lease)?;
    let proof = app.handle.proof(lease).await?;
    let view = app.handle.view().await?;
    let unreadable = |error| ApiError::internal("reading a receipt", &error);
    let mut countersigned = 0;
    for signed in &proof.acknowledgements {
        let said: Verified<Acknowledgement> = signed.verify(&view.fabric).map_err(unreadable)?;
        countersigned = countersigned.max(said.body().number);
    }
    let mut receipts = Vec::new();
    for signed in &proof.receipts {
        let receipt: Verified<Receipt> = signed.verify(&view.fabric).map_err(unreadable)?;
        let body = receipt.body();
        receipts.push(ReceiptLine {
            number: body.number,
            receipt: receipt.id().to_string(),
            used: (&body.usage).into(),
            charge: Money(body.charge),
            at: body.at.to_string(),
            end: body.end.map(word),
            countersigned: body.number <= countersigned,
        });
    }
    Ok(Json(Receipts { lease: lease.to_string(), receipts, currency: view.currency }))
}

/// Everything that proves a lease, as text, or as JSON where Accept says application/json
#[utoipa::path(get, path = "/v1/leases/{lease}/proof", tag = "leases",
    params(("lease" = String, Path)), responses(
    (status = 200, content((String = "text/plain"), (Object = "application/json"))),
    (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
    (status = 404, body = ErrorBody)))]
pub(super) async fn proof(
    State(app): State<App>,
    Path(lease): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let item = Item::Proof(Box::new(app.handle.proof(lease_id(&lease)?).await?));
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    if accept.is_some_and(|accept| accept.contains("application/json")) {
        return Ok(Json(keys_view::json(&item)).into_response());
    }
    let text = armor::encode(&item)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response())
}

/// Jobs that run here under leases this node granted, or elsewhere under leases it holds
#[utoipa::path(get, path = "/v1/jobs", tag = "leases", responses(
    (status = 200, body = Jobs), (status = 401, body = ErrorBody)))]
pub(super) async fn jobs(State(app): State<App>) -> Result<Json<Jobs>, ApiError> {
    let view = app.handle.view().await?;
    Ok(Json(Jobs { jobs: lines(&view).filter_map(JobLine::of).collect() }))
}
