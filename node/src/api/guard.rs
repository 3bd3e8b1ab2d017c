//! What stands before every request: the Host, the token, and bounds on how much at once.
//!
//! ```text
//! request -> Host is ours?  -> token?  -> a place free? -> time limit -> handler
//!            403 wrong_host    401        429              504 timeout
//! ```
//!
//! The Host check stops DNS rebinding: a page whose name was made to resolve to this address
//! still says that name in its requests. Ports are not compared, so that tunnels work.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Json, Query, Request, State};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use super::App;
use super::error::{ApiError, Code};
use super::token::Token;

/// Paths that need no token; everything else does, known or not.
pub(super) const OPEN: [&str; 3] = ["/healthz", "/readyz", "/openapi.json"];
/// The longest JSON body, in bytes: a claim with everything at its limit is shorter.
pub(super) const MAX_JSON: usize = 256 * 1024;
/// Requests that are worked on at once.
const MAX_AT_ONCE: usize = 512;
/// How long an ordinary request may take: a lease may ask several hosts in turn.
const PATIENCE: Duration = Duration::from_secs(60);

/// What requests are checked against.
#[derive(Debug)]
pub(super) struct Guard {
    bound: IpAddr,
    token: Token,
    places: Arc<Semaphore>,
}

impl Guard {
    pub(super) fn new(bound: SocketAddr, token: Token) -> Self {
        let places = Arc::new(Semaphore::new(MAX_AT_ONCE));
        Self { bound: bound.ip().to_canonical(), token, places }
    }

    pub(super) fn check_host(&self, request: &Request) -> Result<(), ApiError> {
        let named = request.headers().get_all(header::HOST);
        let mut hosts = named.iter().map(|value| value.to_str().unwrap_or_default());
        let one = match (hosts.next(), hosts.next()) {
            (Some(host), None) => self.is_ours(host),
            _ => false,
        };
        // A request line with a full address says whom it is for as well.
        let also = request.uri().authority().is_none_or(|host| self.is_ours(host.as_str()));
        if one && also {
            return Ok(());
        }
        let message = "the Host header names another host: use the address that the node listens \
            at, or localhost";
        Err(ApiError::new(StatusCode::FORBIDDEN, Code::WrongHost, message))
    }

    fn is_ours(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else { return false };
        if authority.as_str().contains('@') {
            return false;
        }
        let name = authority.host();
        if name.eq_ignore_ascii_case("localhost") {
            return true;
        }
        let bare = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name);
        let Ok(ip) = bare.parse::<IpAddr>() else { return false };
        // Rebinding needs a name: where every address is bound, any address literal is ours.
        let ip = ip.to_canonical();
        self.bound.is_unspecified()
            || ip == self.bound
            || (ip.is_loopback() && self.bound.is_loopback())
    }

    /// Whether this is the node's token.
    pub(super) fn is_token(&self, token: &[u8]) -> bool {
        self.token.is(token)
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let refuse = |message: &str| {
            Err(ApiError::new(StatusCode::UNAUTHORIZED, Code::Unauthorized, message))
        };
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return refuse(
                "a token is needed: send Authorization: Bearer with what is in the \
                node's api.token file",
            );
        };
        let (scheme, token) = value.as_bytes().split_at_checked(7).unwrap_or_default();
        if scheme.eq_ignore_ascii_case(b"bearer ") && self.token.is(token.trim_ascii()) {
            return Ok(());
        }
        refuse("the token is not this node's: read its api.token file again")
    }
}

/// Lets a request through to its handler, or says why not.
pub(super) async fn check(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    app.guard.check_host(&request)?;
    if !OPEN.contains(&request.uri().path()) {
        app.guard.check_token(request.headers())?;
    }
    if app.shutdown.is_cancelled() {
        return Err(ApiError::stopping());
    }
    let Ok(_place) = app.guard.places.try_acquire() else {
        return Err(ApiError::busy("too many requests at once: try again"));
    };
    Ok(next.run(request).await)
}

/// Bounds the time of an ordinary request.
pub(super) async fn in_time(request: Request, next: Next) -> Result<Response, ApiError> {
    tokio::time::timeout(PATIENCE, next.run(request)).await.map_err(|_| {
        let message = "it took longer than 60 s: look at what came of it before trying again";
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, Code::Timeout, message)
    })
}

/// A JSON body; what does not read is refused with the field that is to blame.
#[derive(Debug)]
pub(super) struct Input<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Input<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(refused_body(rejection.status(), &rejection.body_text())),
        }
    }
}

/// An error for a body that axum could not take.
fn refused_body(status: StatusCode, said: &str) -> ApiError {
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let message = format!("the JSON body is longer than {MAX_JSON} bytes");
            ApiError::new(status, Code::TooLarge, message)
        }
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            let message = "send JSON with content-type: application/json";
            ApiError::new(status, Code::UnsupportedMediaType, message)
        }
        _ => {
            // serde_path_to_error puts the path to the field before what is wrong with it.
            let why = said.split_once("target type: ").map_or(said, |(_, why)| why);
            let why: String = why.chars().take(400).collect();
            match why.split_once(": ") {
                Some((field, why)) if is_path(field) => ApiError::field(field, why),
                _ => ApiError::new(StatusCode::BAD_REQUEST, Code::BadRequest, why),
            }
        }
    }
}

fn is_path(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.[]".contains(c);
    !text.is_empty() && text.len() <= 80 && text.chars().all(plain)
}

/// The query of a request; an unknown parameter is refused by name.
#[derive(Debug)]
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => {
                let said = rejection.body_text();
                let why = said.split_once("query string: ").map_or(said.as_str(), |(_, why)| why);
                Err(ApiError::field("query", why.chars().take(400).collect::<String>()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn guard(bound: &str) -> Guard {
        Guard::new(bound.parse().expect("an address"), Token::generate().expect("randomness"))
    }

    fn request(uri: &str, hosts: &[&str]) -> Request {
        let mut request = Request::builder().uri(uri);
        for host in hosts {
            request = request.header(header::HOST, *host);
        }
        request.body(Body::empty()).expect("a request")
    }

    #[test]
    fn only_our_own_host_is_served() {
        let on_loopback = guard("127.0.0.1:7700");
        for host in ["127.0.0.1:7700", "localhost:7700", "LOCALHOST", "localhost:9", "[::1]:7700"] {
            assert!(on_loopback.check_host(&request("/v1/node", &[host])).is_ok(), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:7700",
            "localhost.evil.example",
            "10.0.0.1:7700",
            "127.0.0.1@evil.example",
            "a@127.0.0.1",
            "[::1",
        ] {
            assert!(on_loopback.check_host(&request("/v1/node", &[host])).is_err(), "{host}");
        }
        assert!(on_loopback.check_host(&request("/v1/node", &[])).is_err(), "no host");
        let twice = request("/", &["localhost", "evil.example"]);
        assert!(on_loopback.check_host(&twice).is_err(), "two hosts");
        let absolute = request("http://evil.example/v1/node", &["localhost"]);
        assert!(on_loopback.check_host(&absolute).is_err(), "another host in the request line");

        let anywhere = guard("0.0.0.0:7700");
        assert!(anywhere.check_host(&request("/", &["10.0.0.1:7700"])).is_ok());
        assert!(anywhere.check_host(&request("/", &["evil.example:7700"])).is_err());
        let there = guard("10.0.0.1:7700");
        assert!(there.check_host(&request("/", &["10.0.0.1:7700"])).is_ok());
        assert!(there.check_host(&request("/", &["127.0.0.1:7700"])).is_err());
    }

    #[test]
    fn only_the_token_opens() {
        let guard = guard("127.0.0.1:7700");
        let headers = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().expect("a value"));
            headers
        };
        let token = guard.token.reveal().to_string();
        assert!(guard.check_token(&headers(&format!("Bearer {token}"))).is_ok());
        assert!(guard.check_token(&headers(&format!("bearer {token}"))).is_ok());
        for value in ["", "Bearer", "Bearer ", "Basic x", &token, &format!("Bearer {token}x")] {
            assert!(guard.check_token(&headers(value)).is_err(), "{value}");
        }
        assert!(guard.check_token(&HeaderMap::new()).is_err());
    }
}
