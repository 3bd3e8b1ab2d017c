//! How the API says no: one shape for every error, with a status that fits.
//!
//! ```json
//! {"error": {"code": "refused", "message": "…", "detail": …}}
//! ```
//!
//! `code` is stable and for programs, `message` is for people and says what to do, `detail` has
//! the figures where there are any.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use leasehold_keys::armor::SaveError;
use leasehold_proto::core::Failure;
use leasehold_proto::words::contract::Reason;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::want::NotUnderstood;
use crate::attach::AttachError;
use crate::data::FetchError;
use crate::handle::AskError;
use crate::payload::PayloadError;
use crate::records::ProofError;

/// What a client may do about a no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request is not understood; `detail.field` names the field where one is to blame.
    BadRequest,
    /// The token is missing or wrong.
    Unauthorized,
    /// The Host header names another host than this.
    WrongHost,
    /// This node has no mandate to order.
    NoMandate,
    /// There is no such thing.
    NotFound,
    /// The path takes other methods.
    MethodNotAllowed,
    /// The lease is in use already, or the same id came with another body.
    Conflict,
    /// The lease is over.
    Over,
    /// The body is too long.
    TooLarge,
    /// The body is no JSON by its content type.
    UnsupportedMediaType,
    /// No host offers what is wanted; `detail` says what spoke against each.
    NothingFits,
    /// Every host that was asked refused, or the lessor refused an act; `detail` says why.
    Refused,
    /// Too much at once: try again after what Retry-After says.
    Busy,
    /// The node takes on nothing now.
    Halted,
    /// The node is stopping.
    Stopping,
    /// Another node cannot be reached.
    Unreachable,
    /// It took too long.
    Timeout,
    /// The node's disk has no room.
    NoSpace,
    /// Something failed inside the node; its log says more.
    Internal,
}

/// An error as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorInside,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorInside {
    /// For programs.
    pub code: Code,
    /// For people.
    pub message: String,
    /// The figures behind it.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    #[schema(value_type = Object)]
    pub detail: Value,
}

/// A request came to nothing.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    inside: ErrorInside,
}

impl ApiError {
    /// An error without figures.
    pub(super) fn new(status: StatusCode, code: Code, message: impl Into<String>) -> Self {
        let inside = ErrorInside { code, message: message.into(), detail: Value::Null };
        Self { status, inside }
    }

    /// The same with figures.
    pub(super) fn with(mut self, detail: Value) -> Self {
        self.inside.detail = detail;
        self
    }

    /// A request that is not understood, with the field that is to blame.
    pub(super) fn field(field: &str, why: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Code::BadRequest, format!("{field}: {why}"))
            .with(json!({ "field": field }))
    }

    pub(super) fn not_found(what: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, Code::NotFound, what)
    }

    /// What it says, for where the status is sent already.
    pub(super) fn into_inside(self) -> ErrorInside {
        self.inside
    }

    pub(super) fn conflict(why: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, Code::Conflict, why)
    }

    pub(super) fn stopping() -> Self {
        let message = "the node is stopping: try again when it is back";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Code::Stopping, message)
    }

    pub(super) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, Code::Busy, message)
    }

    /// Something failed inside: the log has it, the client learns only that.
    pub(super) fn internal(doing: &'static str, error: &dyn std::fmt::Display) -> Self {
        tracing::error!(%error, "{doing} failed");
        let message = format!("{doing} failed: the node's log says more");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, Code::Internal, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let wait = match self.inside.code {
            Code::Busy => Some("1"),
            Code::Stopping | Code::Halted => Some("5"),
            _ => None,
        };
        let mut response = (self.status, Json(ErrorBody { error: self.inside })).into_response();
        if let Some(seconds) = wait {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer realm=\"leasehold\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

impl From<NotUnderstood> for ApiError {
    fn from(error: NotUnderstood) -> Self {
        Self::field(error.field, error.why)
    }
}

impl From<AskError> for ApiError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Failed(failure) => failure.into(),
            AskError::Stopped => Self::stopping(),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let said = failure.to_string();
        match failure {
            Failure::NoMandate => Self::new(
                StatusCode::FORBIDDEN,
                Code::NoMandate,
                format!("{said}: give it one, or send an order that the lessee signed"),
            ),
            Failure::NothingFits(against) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                Code::NothingFits,
                format!("{said}: ask for less, or see `leasehold explain`"),
            )
            .with(json!({ "against": against })),
            Failure::TooFew { have, need, against } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, Code::NothingFits, said)
                    .with(json!({ "have": have, "need": need, "against": against }))
            }
            Failure::Refused(heard) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, Code::Refused, said)
                    .with(json!({ "heard": heard }))
            }
            Failure::Act(reason) => Self::act(reason, said),
            Failure::Unreachable(_) => Self::new(StatusCode::BAD_GATEWAY, Code::Unreachable, said),
            Failure::UnknownLease => Self::not_found(said),
            Failure::Term { .. } => Self::field("ttl", said),
            Failure::Unanswered(_) => Self::new(StatusCode::CONFLICT, Code::Conflict, said),
            Failure::Over => Self::new(StatusCode::GONE, Code::Over, said),
            Failure::InUse => Self::new(StatusCode::CONFLICT, Code::Conflict, said),
            Failure::BadJob(why) => Self::field("job", why),
            Failure::BadOrder(why) => Self::field("order", why),
            Failure::BadRecord(_) => Self::conflict(said),
            Failure::DiskFull => Self::new(StatusCode::INSUFFICIENT_STORAGE, Code::NoSpace, said),
            Failure::Busy => Self::busy(said),
            Failure::Halted(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, Code::Halted, said),
        }
    }
}

impl ApiError {
    /// A lessor's no to a claim or a release.
    fn act(reason: Reason, said: String) -> Self {
        let (status, code) = match reason {
            Reason::UnknownLease => (StatusCode::NOT_FOUND, Code::NotFound),
            Reason::Ended => (StatusCode::GONE, Code::Over),
            Reason::InUse | Reason::Conflict | Reason::Version => {
                (StatusCode::CONFLICT, Code::Conflict)
            }
            Reason::Busy | Reason::NotReady => (StatusCode::TOO_MANY_REQUESTS, Code::Busy),
            _ => (StatusCode::UNPROCESSABLE_ENTITY, Code::Refused),
        };
        Self::new(status, code, said).with(json!({ "reason": reason }))
    }
}

impl From<AttachError> for ApiError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Stopped => Self::stopping(),
            AttachError::NotHeld(_) => Self::not_found(error.to_string()),
            AttachError::Link(_) | AttachError::Broken(_) | AttachError::Frame(_) => {
                Self::new(StatusCode::BAD_GATEWAY, Code::Unreachable, error.to_string())
            }
        }
    }
}

impl From<FetchError> for ApiError {
    fn from(error: FetchError) -> Self {
        let said = error.to_string();
        match error {
            FetchError::NotHeld { .. } | FetchError::NoHolder { .. } => Self::not_found(said),
            FetchError::Store(error) => Self::payload(&error),
            _ => Self::new(StatusCode::BAD_GATEWAY, Code::Unreachable, said),
        }
    }
}

impl From<PayloadError> for ApiError {
    fn from(error: PayloadError) -> Self {
        Self::payload(&error)
    }
}

impl ApiError {
    fn payload(error: &PayloadError) -> Self {
        let said = error.to_string();
        match error {
            PayloadError::NoSpace { need, available } => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, Code::NoSpace, said)
                    .with(json!({ "need": need, "available": available }))
            }
            PayloadError::TooLarge { limit } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, Code::TooLarge, said)
                    .with(json!({ "limit": limit }))
            }
            PayloadError::WrongSize { .. } => Self::field("size", said),
            PayloadError::NotAnIndex { .. } => Self::field("index", said),
            PayloadError::NotCloned(_) => Self::conflict(format!("{said}: send its bytes")),
            PayloadError::Source(_) => Self::field("body", said),
            PayloadError::NotHeld(_) | PayloadError::Arriving(_) | PayloadError::Corrupt(_) => {
                Self::not_found(said)
            }
            PayloadError::Io { .. } => Self::internal("keeping or reading a payload", &said),
        }
    }
}

impl From<ProofError> for ApiError {
    fn from(error: ProofError) -> Self {
        match error {
            ProofError::Unknown(_) | ProofError::NotGranted(_) => {
                Self::not_found(error.to_string())
            }
            other => Self::internal("reading a lease's papers", &other),
        }
    }
}

impl From<SaveError> for ApiError {
    fn from(error: SaveError) -> Self {
        Self::internal("writing signed objects as text", &error)
    }
}
