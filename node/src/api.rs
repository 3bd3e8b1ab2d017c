//! The HTTP API of a node: JSON over HTTP/1.1, described by `/openapi.json`.
//!
//! ```text
//! GET  /healthz  /readyz  /openapi.json                         no token
//! GET  /metrics                                                 Prometheus
//! GET  /v1/node  /v1/nodes  /v1/offers  /v1/jobs
//! POST /v1/payloads      GET /v1/payloads  /v1/payloads/{root}
//! POST /v1/plan  /v1/orders  /v1/leases
//! GET  /v1/leases  /v1/leases/{lease}
//! POST /v1/gangs
//! POST /v1/leases/{lease}/claim  …/renew  …/release  …/revoke
//! POST /v1/reclaim  /v1/drain  /v1/resume
//! GET  /v1/quarantine    POST /v1/quarantine/reinstate
//! GET  /v1/catalog  /v1/api-keys   PUT /v1/catalog/{name}   POST /v1/api-keys   see `model`
//! POST /v1/chat/completions  /v1/completions  /v1/embeddings  /v1/responses    see `openai`
//! GET  /v1/models  /v1/models/{id}
//! GET  /v1/leases/{lease}/end  …/output  …/outputs/{name}  …/receipts  …/proof
//! ```
//!
//! Everything but the first line wants `Authorization: Bearer` and the node's token, also on
//! loopback, and everything wants a Host that is the node's: see `guard`. Connections, headers,
//! bodies and time are bounded.

mod batch;
pub mod body;
mod ends;
pub mod error;
mod guard;
mod lease;
pub mod model;
mod node;
pub mod openai;
mod openapi;
mod operator;
mod payload;
mod quarantine;
pub mod tls;
pub mod token;
pub mod want;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware;
use axum::routing::{MethodRouter, delete, get, post, put};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::ends::Ends;
use self::error::{ApiError, Code};
use self::guard::Guard;
use self::token::Token;
use crate::handle::Handle;

/// Connections at once; more wait in the listener's queue.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take to send its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The most header lines of one request.
const MAX_HEADERS: usize = 64;
/// The most bytes of one request's head.
const MAX_HEAD: usize = 32 * 1024;
/// How long requests in flight get when the node stops.
const FAREWELL: Duration = Duration::from_secs(2);

/// What every handler has.
#[derive(Clone, Debug)]
struct App {
    handle: Handle,
    guard: Arc<Guard>,
    ends: Ends,
    shutdown: CancellationToken,
}

/// How long a route may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    /// Bounded as a whole.
    Quick,
    /// Bodies stream or the answer waits: each bounds itself.
    Slow,
}

/// One path with its methods: the only list of what is served.
struct Route {
    path: &'static str,
    #[allow(dead_code)] // read by the test that compares routes and description
    methods: &'static [&'static str],
    pace: Pace,
    serve: MethodRouter<App>,
}

fn routes() -> Vec<Route> {
    use Pace::{Quick, Slow};
    let route = |path, methods, pace, serve| Route { path, methods, pace, serve };
    vec![
        route("/healthz", &["get"], Quick, get(node::healthz)),
        route("/readyz", &["get"], Quick, get(node::readyz)),
        route("/metrics", &["get"], Quick, get(node::metrics)),
        route("/openapi.json", &["get"], Quick, get(openapi::document)),
        route("/v1/node", &["get"], Quick, get(node::info)),
        route("/v1/nodes", &["get"], Quick, get(node::list)),
        route("/v1/offers", &["get"], Quick, get(node::offers)),
        route("/v1/jobs", &["get"], Quick, get(lease::jobs)),
        route("/v1/payloads", &["get", "post"], Slow, get(payload::list).post(payload::upload)),
        route(
            "/v1/payloads/{root}",
            &["get", "delete"],
            Slow,
            get(payload::download).delete(payload::remove),
        ),
        route("/v1/payloads/{root}/holders", &["get"], Quick, get(payload::holders)),
        route("/v1/payloads/{root}/fetch", &["post"], Slow, post(payload::fetch)),
        route("/v1/payloads/{root}/clone", &["post"], Slow, post(payload::clone)),
        route("/v1/payloads/{root}/verify", &["post"], Slow, post(payload::verify)),
        route(
            "/v1/payloads/{root}/pin",
            &["put", "delete"],
            Quick,
            put(payload::pin).delete(payload::unpin),
        ),
        route(
            "/v1/payloads/{root}/private",
            &["put", "delete"],
            Quick,
            put(payload::keep_private).delete(payload::publish),
        ),
        route("/v1/plan", &["post"], Quick, post(lease::plan)),
        route("/v1/orders", &["post"], Quick, post(lease::order)),
        route("/v1/leases", &["get", "post"], Quick, get(lease::list).post(lease::request)),
        route("/v1/leases/{lease}", &["get"], Quick, get(lease::show)),
        route("/v1/leases/{lease}/claim", &["post"], Quick, post(lease::claim)),
        route("/v1/leases/{lease}/renew", &["post"], Quick, post(lease::renew)),
        route("/v1/leases/{lease}/release", &["post"], Quick, post(lease::release)),
        route("/v1/leases/{lease}/revoke", &["post"], Quick, post(operator::revoke)),
        route("/v1/gangs", &["post"], Quick, post(lease::gang)),
        route("/v1/reclaim", &["post"], Quick, post(operator::reclaim)),
        route("/v1/drain", &["post"], Quick, post(operator::drain)),
        route("/v1/quarantine", &["get"], Quick, get(quarantine::list)),
        route("/v1/quarantine/reinstate", &["post"], Quick, post(quarantine::reinstate)),
        route("/v1/resume", &["post"], Quick, post(operator::resume)),
        route("/v1/catalog", &["get"], Quick, get(model::list)),
        route(
            "/v1/catalog/{name}",
            &["put", "delete"],
            Quick,
            put(model::put).delete(model::remove),
        ),
        route("/v1/api-keys", &["get", "post"], Quick, get(model::keys).post(model::add_key)),
        route("/v1/api-keys/{id}", &["delete"], Quick, delete(model::remove_key)),
        route("/v1/leases/{lease}/end", &["get"], Slow, get(lease::end)),
        route("/v1/leases/{lease}/output", &["get"], Slow, get(lease::output)),
        route("/v1/leases/{lease}/outputs/{name}", &["get"], Slow, get(lease::file)),
        route("/v1/leases/{lease}/receipts", &["get"], Quick, get(lease::receipts)),
        route("/v1/leases/{lease}/proof", &["get"], Quick, get(lease::proof)),
    ]
}

/// The API of the node behind `handle`, for a listener bound to `bound`.
pub fn router(
    handle: Handle,
    models: openai::Service,
    bound: SocketAddr,
    token: Token,
    shutdown: CancellationToken,
) -> Router {
    let guard = Arc::new(Guard::new(bound, token));
    let models = models.router(Some(Arc::clone(&guard)));
    let app = App { handle, guard, ends: Ends::default(), shutdown };
    let mut router = Router::new();
    for Route { path, pace, serve, .. } in routes() {
        let serve = match pace {
            Pace::Quick => serve.layer(middleware::from_fn(guard::in_time)),
            Pace::Slow => serve,
        };
        router = router.route(path, serve);
    }
    router
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(guard::MAX_JSON))
        .layer(middleware::from_fn_with_state(app.clone(), guard::check))
        .with_state(app)
        .merge(models)
}

async fn no_path() -> ApiError {
    ApiError::not_found("no such path: /openapi.json lists them")
}

async fn no_method() -> ApiError {
    let message = "this path takes other methods: see /openapi.json";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Code::MethodNotAllowed, message)
}

/// Serves on `listener` until `shutdown`. Requests in flight then get two seconds; streams are
/// cut at once, so that a client sees that they are not whole.
///
/// # Errors
/// When the listener's own address cannot be read.
pub async fn serve(
    listener: TcpListener,
    handle: Handle,
    models: openai::Service,
    token: Token,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let bound = listener.local_addr()?;
    let router = router(handle, models, bound, token, shutdown.clone());
    take(listener, router, None, shutdown).await;
    Ok(())
}

/// Serves the models' API alone on `listener`, over HTTPS, until `shutdown`: for others than this host.
pub async fn serve_models(
    listener: TcpListener,
    models: openai::Service,
    tls: TlsAcceptor,
    shutdown: CancellationToken,
) {
    let router = models.router(None).fallback(openai::no_path);
    take(listener, router, Some(tls), shutdown).await;
}

/// Takes connections until `shutdown`.
async fn take(
    listener: TcpListener,
    router: Router,
    tls: Option<TlsAcceptor>,
    shutdown: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let open = TaskTracker::new();
    let cut = CancellationToken::new();
    loop {
        let place = tokio::select! {
            () = shutdown.cancelled() => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else { break };
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let serving = taken(stream, tls.clone(), router.clone(), shutdown.clone());
                let cut = cut.clone();
                open.spawn(async move {
                    let _place = place;
                    tokio::select! {
                        () = cut.cancelled() => {}
                        () = serving => {}
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: what is open may close meanwhile.
                tracing::warn!(%error, "cannot accept an API connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    open.close();
    if tokio::time::timeout(FAREWELL, open.wait()).await.is_err() {
        cut.cancel();
        open.wait().await;
    }
}

/// Serves a connection, over TLS where that is wanted.
async fn taken(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    shutdown: CancellationToken,
) {
    // Small answers should not wait for more to send with them.
    let _ = stream.set_nodelay(true);
    match tls {
        None => connection(stream, router, shutdown).await,
        Some(tls) => match tls::accept(&tls, stream).await {
            Ok(stream) => connection(stream, router, shutdown).await,
            Err(error) => tracing::debug!(%error, "an HTTPS connection was not taken"),
        },
    }
}

/// Serves one connection until it ends or the node stops.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    shutdown: CancellationToken,
) {
    let service = TowerToHyperService::new(router);
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = std::pin::pin!(serving);
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = shutdown.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "an API connection ended early");
    }
}
