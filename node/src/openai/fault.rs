//! How the hosted models' API says no: OpenAI's error body, with a status that fits.
//!
//! ```json
//! {"error": {"message": "…", "type": "invalid_request_error", "param": "temperature", "code": "…"}}
//! ```
//!
//! `type` and `code` are the words that OpenAI uses, so that its SDKs raise the exceptions that
//! people wrote handlers for. Also reads what upstreams say, whatever their dialect.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

/// The longest message, in bytes.
const LONGEST: usize = 2_000;
/// The longest code, param, or word of a client or upstream in a message, in bytes.
const LONGEST_WORD: usize = 160;

/// What sort of fault: `type` in the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request is to blame, its key and its model included, as OpenAI has it.
    InvalidRequest,
    /// The key may not do this.
    Permission,
    /// The key's budget is spent.
    InsufficientQuota,
    /// Too many requests a minute, or at once.
    Requests,
    /// Too many tokens a minute.
    Tokens,
    /// An upstream's own limit.
    RateLimit,
    /// Something on our side.
    Server,
}

/// A request came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Fault {
    /// The HTTP status: 400 to 599.
    pub status: u16,
    /// `type`
    pub kind: Kind,
    /// A stable word for programs.
    pub code: Option<String>,
    /// The field that is to blame, as a path: `messages[0].content`.
    pub param: Option<String>,
    /// For people.
    pub message: String,
    /// When to try again, for the header of that name.
    pub retry_after: Option<Duration>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Inside<'a>,
}

#[derive(Serialize)]
struct Inside<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::InvalidRequest,
        Self::Permission,
        Self::InsufficientQuota,
        Self::Requests,
        Self::Tokens,
        Self::RateLimit,
        Self::Server,
    ];

    /// The word in the body.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request_error",
            Self::Permission => "permission_error",
            Self::InsufficientQuota => "insufficient_quota",
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::RateLimit => "rate_limit_error",
            Self::Server => "server_error",
        }
    }

    const fn of_status(status: u16) -> Self {
        match status {
            402 => Self::InsufficientQuota,
            403 => Self::Permission,
            408 | 500.. => Self::Server,
            429 => Self::RateLimit,
            _ => Self::InvalidRequest,
        }
    }
}

impl Fault {
    fn new(status: u16, kind: Kind, code: Option<&str>, message: impl Into<String>) -> Self {
        let mut message = message.into();
        clip(&mut message, LONGEST);
        let code = code.map(str::to_owned);
        Self { status, kind, code, param: None, message, retry_after: None }
    }

    /// The same, with the field that is to blame.
    #[must_use]
    pub fn at(mut self, param: impl fmt::Display) -> Self {
        let mut param = param.to_string();
        clip(&mut param, LONGEST_WORD);
        self.param = Some(param);
        self
    }

    /// The same, with when to try again.
    #[must_use]
    pub const fn after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// 400: the request is not understood.
    #[must_use]
    pub fn invalid(code: Option<&str>, message: impl Into<String>) -> Self {
        Self::new(400, Kind::InvalidRequest, code, message)
    }

    /// 400: the body is no JSON object.
    #[must_use]
    pub fn not_json(why: impl fmt::Display) -> Self {
        let why = format!("We could not parse the JSON body of your request: {why}.");
        Self::invalid(None, why)
    }

    /// 400: a field that this API does not know.
    #[must_use]
    pub fn unknown_parameter(name: &str) -> Self {
        let message = format!("Unrecognized request argument supplied: {}", shown(name));
        Self::invalid(Some("unknown_parameter"), message).at(shown(name))
    }

    /// 400: a field that must be there.
    #[must_use]
    pub fn missing(param: impl fmt::Display) -> Self {
        let message = format!("Missing required parameter: '{param}'.");
        Self::invalid(Some("missing_required_parameter"), message).at(param)
    }

    /// 400: the model cannot do what a field asks for.
    #[must_use]
    pub fn unsupported(param: &str, model: &str) -> Self {
        let message = format!(
            "Unsupported parameter: '{}' is not supported with the model '{}'.",
            shown(param),
            shown(model)
        );
        Self::invalid(Some("unsupported_parameter"), message).at(shown(param))
    }

    /// 400: the prompt and what is to come do not fit the model's context, in tokens.
    #[must_use]
    pub fn context_length(context: u64, prompt: u64, completion: u64) -> Self {
        let asked = prompt.saturating_add(completion);
        let message = format!(
            "This model's maximum context length is {context} tokens. However, you requested \
             {asked} tokens ({prompt} in the messages, {completion} in the completion). Please \
             reduce the length of the messages or completion."
        );
        Self::invalid(Some("context_length_exceeded"), message).at("messages")
    }

    /// 401: there is no key.
    #[must_use]
    pub fn no_key() -> Self {
        let message = "You didn't provide an API key. You need to provide your API key in an \
                       Authorization header using Bearer auth (i.e. Authorization: Bearer \
                       YOUR_KEY).";
        Self::new(401, Kind::InvalidRequest, None, message)
    }

    /// 401: the key is not one of this node's, or not any more. It is never repeated.
    #[must_use]
    pub fn wrong_key() -> Self {
        let message = "Incorrect API key provided: this node knows no such key, or it is over.";
        Self::new(401, Kind::InvalidRequest, Some("invalid_api_key"), message)
    }

    /// 402: the key's budget is spent.
    #[must_use]
    pub fn budget_spent(message: impl Into<String>) -> Self {
        Self::new(402, Kind::InsufficientQuota, Some("insufficient_quota"), message)
    }

    /// 403: the key is not for this model.
    #[must_use]
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, Kind::Permission, Some("model_not_allowed"), message)
    }

    /// 404: nobody serves such a model.
    #[must_use]
    pub fn model_not_found(model: &str) -> Self {
        let message =
            format!("The model '{}' does not exist or you do not have access to it.", shown(model));
        Self::new(404, Kind::InvalidRequest, Some("model_not_found"), message).at("model")
    }

    /// 404: there is no such path.
    #[must_use]
    pub fn no_such_path(method: &str, path: &str) -> Self {
        let message = format!("Invalid URL ({} {})", shown(method), shown(path));
        Self::new(404, Kind::InvalidRequest, Some("unknown_url"), message)
    }

    /// 408: it took too long.
    #[must_use]
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(408, Kind::Server, Some("request_timeout"), message)
    }

    /// 408: the client leaves unread what it is answered.
    #[must_use]
    pub fn unread() -> Self {
        let message = "The answer was not read as fast as it came.";
        Self::new(408, Kind::Server, Some("answer_not_read"), message)
    }

    /// Whether it says that.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        self.code.as_deref() == Some("answer_not_read")
    }

    /// 413: the body is longer than `most` bytes.
    #[must_use]
    pub fn too_large(most: usize) -> Self {
        let message = format!("Maximum content size limit ({most}) exceeded.");
        Self::new(413, Kind::InvalidRequest, Some("request_too_large"), message)
    }

    /// 429: too many requests ([`Kind::Requests`]) or tokens ([`Kind::Tokens`]) for this key.
    #[must_use]
    pub fn rate_limit(kind: Kind, message: impl Into<String>, wait: Duration) -> Self {
        Self::new(429, kind, Some("rate_limit_exceeded"), message).after(wait)
    }

    /// 500: something failed inside. What exactly is for the log, not for the client.
    #[must_use]
    pub fn internal() -> Self {
        let message = "The server had an error while processing your request. Sorry about that!";
        Self::new(500, Kind::Server, Some("internal_error"), message)
    }

    /// 502: the serving side answered something that is no answer, or broke off.
    #[must_use]
    pub fn bad_upstream(message: impl Into<String>) -> Self {
        Self::new(502, Kind::Server, Some("bad_upstream"), message)
    }

    /// 503: nobody can answer now.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, Kind::Server, Some("service_unavailable"), message)
    }

    /// 503: a lease's budget has no room for what a request may cost.
    #[must_use]
    pub fn no_room() -> Self {
        let message = "The lease's budget has no room for this request.";
        Self::new(503, Kind::Server, Some("lease_has_no_room"), message)
    }

    /// Whether it says that.
    #[must_use]
    pub fn is_no_room(&self) -> bool {
        self.code.as_deref() == Some("lease_has_no_room")
    }

    /// 503: whoever could answer has too much to do.
    #[must_use]
    pub fn overloaded(wait: Duration) -> Self {
        let message = "The model is currently overloaded with other requests.";
        Self::new(503, Kind::Server, Some("overloaded"), message).after(wait)
    }

    /// 429: nobody has time for what can wait. OpenAI says so of its `flex` tier.
    #[must_use]
    pub fn no_slack(wait: Duration) -> Self {
        let message = "The model has no time now for requests that can wait. Nothing was charged.";
        Self::new(429, Kind::RateLimit, Some("resource_unavailable"), message).after(wait)
    }

    /// Whether it says that.
    #[must_use]
    pub fn is_no_slack(&self) -> bool {
        self.status == 429 && self.code.as_deref() == Some("resource_unavailable")
    }

    /// Reads an error body of any dialect: OpenAI's, vLLM's, llama-server's, Ollama's,
    /// FastAPI's, or plain text. What it says is bounded and cleaned; what it does not say
    /// follows from the status, of which anything but 400 to 599 is taken for 502.
    #[must_use]
    pub fn from_json(status: u16, body: &[u8]) -> Self {
        match serde_json::from_slice::<Value>(body) {
            Ok(value) => Self::from_value(status, &value),
            Err(_) => {
                let text = String::from_utf8_lossy(&body[..body.len().min(LONGEST)]);
                // A page for people says nothing that fits one line.
                let text = if text.trim_start().starts_with('<') { "" } else { text.trim() };
                Self::said(status, text, None, None, None)
            }
        }
    }

    /// As [`Fault::from_json`], for a body that is read already.
    #[must_use]
    pub fn from_value(status: u16, body: &Value) -> Self {
        let inside = body.get("error").unwrap_or(body);
        let text = |key: &str| inside.get(key).and_then(Value::as_str);
        let detail = inside.get("detail").map(|detail| match detail {
            Value::String(text) => text.clone(),
            // FastAPI's list of what is wrong; the first is enough.
            other => {
                let first = other.get(0).unwrap_or(other);
                let said = first.get("msg").and_then(Value::as_str);
                said.map_or_else(|| first.to_string(), str::to_owned)
            }
        });
        let message = inside.as_str().or_else(|| text("message")).or(detail.as_deref());
        // Numbers repeat the status.
        Self::said(status, message.unwrap_or(""), text("type"), text("code"), text("param"))
    }

    fn said(
        status: u16,
        message: &str,
        kind: Option<&str>,
        code: Option<&str>,
        param: Option<&str>,
    ) -> Self {
        let status = if (400..600).contains(&status) { status } else { 502 };
        let kind = kind.and_then(|word| Kind::ALL.into_iter().find(|kind| kind.word() == word));
        let kind = kind.unwrap_or(Kind::of_status(status));
        let mut said: String = message.chars().take(LONGEST).map(plain).collect();
        if said.trim().is_empty() {
            said = format!("The server answered {status} without saying why.");
        }
        let code = code.map(shown).filter(|code| !code.is_empty());
        let fault = Self::new(status, kind, code.as_deref(), said);
        match param.filter(|param| !param.is_empty()) {
            Some(param) => fault.at(shown(param)),
            None => fault,
        }
    }

    /// The body as it travels.
    #[must_use]
    pub fn body(&self) -> Bytes {
        let inside = Inside {
            message: &self.message,
            kind: self.kind.word(),
            param: self.param.as_deref(),
            code: self.code.as_deref(),
        };
        // Strings alone cannot fail to be written.
        serde_json::to_vec(&Body { error: inside }).unwrap_or_default().into()
    }

    /// Whole seconds for the header `Retry-After`, rounded up and at least one.
    #[must_use]
    pub fn retry_after_seconds(&self) -> Option<u64> {
        let wait = self.retry_after?;
        Some(wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0)).max(1))
    }

    /// Whether another serving node may do better with the same request.
    #[must_use]
    pub const fn may_pass_elsewhere(&self) -> bool {
        matches!(self.status, 408 | 429 | 500..)
    }
}

/// A word from outside as it may stand in a message: short, on one line.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(LONGEST_WORD).map(plain).collect();
    clip(&mut shown, LONGEST_WORD);
    shown
}

fn plain(char: char) -> char {
    if char.is_control() { ' ' } else { char }
}

/// Cuts a text off at so many bytes, between characters.
fn clip(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most - '…'.len_utf8()));
        text.push('…');
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bodies_are_openais() {
        let fault = Fault::model_not_found("gpt-9");
        let body: Value = serde_json::from_slice(&fault.body()).unwrap();
        assert_eq!(
            body,
            json!({"error": {
                "message": "The model 'gpt-9' does not exist or you do not have access to it.",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }})
        );
        let body: Value = serde_json::from_slice(&Fault::no_key().body()).unwrap();
        assert_eq!(body["error"]["param"], Value::Null);
        assert_eq!(body["error"]["code"], Value::Null);
    }

    #[test]
    fn every_case_has_its_status_and_words() {
        let second = Duration::from_millis(1_200);
        for (fault, status, kind, code) in [
            (Fault::not_json("x"), 400, "invalid_request_error", None),
            (
                Fault::unknown_parameter("x"),
                400,
                "invalid_request_error",
                Some("unknown_parameter"),
            ),
            (Fault::no_key(), 401, "invalid_request_error", None),
            (Fault::wrong_key(), 401, "invalid_request_error", Some("invalid_api_key")),
            (Fault::budget_spent("x"), 402, "insufficient_quota", Some("insufficient_quota")),
            (Fault::forbidden("x"), 403, "permission_error", Some("model_not_allowed")),
            (Fault::model_not_found("x"), 404, "invalid_request_error", Some("model_not_found")),
            (Fault::timeout("x"), 408, "server_error", Some("request_timeout")),
            (Fault::too_large(1), 413, "invalid_request_error", Some("request_too_large")),
            (
                Fault::rate_limit(Kind::Tokens, "x", second),
                429,
                "tokens",
                Some("rate_limit_exceeded"),
            ),
            (Fault::no_slack(second), 429, "rate_limit_error", Some("resource_unavailable")),
            (Fault::internal(), 500, "server_error", Some("internal_error")),
            (Fault::bad_upstream("x"), 502, "server_error", Some("bad_upstream")),
            (Fault::unavailable("x"), 503, "server_error", Some("service_unavailable")),
        ] {
            assert_eq!(fault.status, status);
            assert_eq!(fault.kind.word(), kind);
            assert_eq!(fault.code.as_deref(), code);
        }
        let fault = Fault::rate_limit(Kind::Requests, "x", second);
        assert_eq!(fault.retry_after_seconds(), Some(2));
        assert_eq!(Fault::overloaded(Duration::ZERO).retry_after_seconds(), Some(1));
    }

    #[test]
    fn every_dialect_of_upstreams_is_read() {
        for (status, body, message, kind, code, param) in [
            (
                400,
                r#"{"error":{"message":"m","type":"invalid_request_error","param":"p","code":"c"}}"#,
                "m",
                Kind::InvalidRequest,
                Some("c"),
                Some("p"),
            ),
            (
                500,
                r#"{"error":{"code":500,"message":"m","type":"server_error"}}"#,
                "m",
                Kind::Server,
                None,
                None,
            ),
            (
                404,
                r#"{"object":"error","message":"m","type":"NotFoundError","param":null,"code":404}"#,
                "m",
                Kind::InvalidRequest,
                None,
                None,
            ),
            (
                404,
                r#"{"error":"model not found"}"#,
                "model not found",
                Kind::InvalidRequest,
                None,
                None,
            ),
            (
                422,
                r#"{"detail":[{"loc":["body"],"msg":"m"}]}"#,
                "m",
                Kind::InvalidRequest,
                None,
                None,
            ),
            (403, r#"{"detail":"m"}"#, "m", Kind::Permission, None, None),
            (502, "plain\r\ntext", "plain  text", Kind::Server, None, None),
            (
                503,
                "<html>busy</html>",
                "The server answered 503 without saying why.",
                Kind::Server,
                None,
                None,
            ),
            (429, "", "The server answered 429 without saying why.", Kind::RateLimit, None, None),
            (
                400,
                "[]",
                "The server answered 400 without saying why.",
                Kind::InvalidRequest,
                None,
                None,
            ),
            (200, r#"{"error":{"message":"m"}}"#, "m", Kind::Server, None, None),
        ] {
            let fault = Fault::from_json(status, body.as_bytes());
            assert_eq!(fault.message, message, "{body}");
            assert_eq!(fault.kind, kind, "{body}");
            assert_eq!(fault.code.as_deref(), code, "{body}");
            assert_eq!(fault.param.as_deref(), param, "{body}");
        }
        assert_eq!(Fault::from_json(200, b"{}").status, 502);
    }

    #[test]
    fn what_is_written_reads_back() {
        for fault in [
            Fault::unknown_parameter("x"),
            Fault::no_key(),
            Fault::budget_spent("b"),
            Fault::forbidden("f"),
            Fault::rate_limit(Kind::Tokens, "t", Duration::from_secs(1)),
            Fault::internal(),
            Fault::context_length(1, 2, 3),
        ] {
            let read = Fault::from_json(fault.status, &fault.body());
            assert_eq!(read, Fault { retry_after: None, ..fault });
        }
    }

    #[test]
    fn nothing_from_outside_grows_a_fault() {
        let long = "é\u{1}".repeat(100_000);
        let body = json!({"error": {"message": long, "code": long, "param": long}}).to_string();
        let fault = Fault::from_json(400, body.as_bytes());
        assert!(fault.message.len() <= LONGEST && !fault.message.contains('\u{1}'));
        assert!(fault.code.is_some_and(|code| code.len() <= LONGEST_WORD));
        assert!(fault.param.is_some_and(|param| param.len() <= LONGEST_WORD));
        assert!(Fault::unknown_parameter(&long).message.len() <= LONGEST);
        let deep = "[".repeat(100_000);
        assert_eq!(Fault::from_json(400, deep.as_bytes()).status, 400);
    }
}
