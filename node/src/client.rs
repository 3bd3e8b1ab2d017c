//! The command line's side of the API: one HTTP/1.1 connection per request, every wait bounded.
//!
//! A body that streams says whether it came to its end: one that breaks off is an error, so that
//! the caller can ask again from where it stood.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, BodyStream, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::http::uri::{Authority, PathAndQuery, Scheme, Uri};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use leasehold_keys::exit::Exit;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::api::error::{Code, ErrorBody, ErrorInside};
use crate::api::token::Token;

/// Where a node's API is, when nothing else is said.
pub const DEFAULT_API: &str = "http://127.0.0.1:7700";
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take to begin: somewhat more than the node takes at most.
const ANSWER: Duration = Duration::from_secs(75);
/// A body of which nothing came for this long is given up.
const STALL: Duration = Duration::from_secs(30);
/// The longest JSON or text that is read: a whole proof fits.
const MAX_TEXT: usize = 96 << 20;

/// A body to be sent.
type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A node's API. Clones share nothing but the address and token.
#[derive(Clone, Debug)]
pub struct Client {
    authority: Authority,
    token: Option<Token>,
}

/// A request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none.
    #[error("'{0}' is no API address: expected http://HOST:PORT")]
    Url(String),
    /// Nobody answers there.
    #[error(
        "no node answers at {at}: {source}; start one with `leasehold up`, or say where it is \
         with --api URL or LEASEHOLD_API"
    )]
    Connect {
        /// Where.
        at: Authority,
        /// Why not.
        source: io::Error,
    },
    /// The token is missing or wrong.
    #[error(
        "the node at {at} does not take this token: say where its api.token is with \
         --token-file FILE or --dir DIR, or set LEASEHOLD_TOKEN"
    )]
    Token {
        /// Where.
        at: Authority,
    },
    /// The node said no.
    #[error("{}", .inside.message)]
    Answer {
        /// The status.
        status: StatusCode,
        /// What it said.
        inside: ErrorInside,
    },
    /// It took too long.
    #[error("the node at {at} took too long")]
    Slow {
        /// Where.
        at: Authority,
    },
    /// The connection broke.
    #[error("the connection to the node at {at} broke: {why}")]
    Broken {
        /// Where.
        at: Authority,
        /// How.
        why: io::Error,
    },
    /// The answer is not what this command understands.
    #[error("the node at {at} answered what this version does not understand: {why}")]
    Answered {
        /// Where.
        at: Authority,
        /// What is wrong with it.
        why: String,
    },
}

impl ClientError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Url(_) => Exit::Usage,
            Self::Token { .. } => Exit::Policy,
            Self::Answer { inside, .. } => match inside.code {
                Code::BadRequest
                | Code::TooLarge
                | Code::UnsupportedMediaType
                | Code::MethodNotAllowed => Exit::Usage,
                Code::NotFound => Exit::No,
                Code::Unauthorized
                | Code::WrongHost
                | Code::NoMandate
                | Code::NothingFits
                | Code::Refused => Exit::Policy,
                Code::Conflict | Code::Over => Exit::Conflict,
                Code::NoSpace => Exit::Io,
                Code::Busy
                | Code::Halted
                | Code::Stopping
                | Code::Unreachable
                | Code::Timeout
                | Code::Internal => Exit::Remote,
            },
            Self::Connect { .. }
            | Self::Slow { .. }
            | Self::Broken { .. }
            | Self::Answered { .. } => Exit::Remote,
        }
    }

    /// Whether the same request may succeed a moment later.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Slow { .. } | Self::Broken { .. } => true,
            Self::Answer { inside, .. } => matches!(
                inside.code,
                Code::Busy | Code::Stopping | Code::Halted | Code::Unreachable | Code::Timeout
            ),
            _ => false,
        }
    }

    /// What the node said, if it said no.
    #[must_use]
    pub const fn code(&self) -> Option<Code> {
        match self {
            Self::Answer { inside, .. } => Some(inside.code),
            _ => None,
        }
    }
}

/// Reads the address of an API: `http://HOST:PORT`.
///
/// # Errors
/// When it is none, or has a path.
pub fn parse_url(url: &str) -> Result<Authority, ClientError> {
    let wrong = || ClientError::Url(leasehold_keys::text::shown(url));
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let plain = uri.scheme() == Some(&Scheme::HTTP)
        && uri.path_and_query().is_none_or(|path| path == &PathAndQuery::from_static("/"));
    match uri.into_parts().authority {
        Some(authority) if plain && !authority.as_str().contains('@') => Ok(authority),
        _ => Err(wrong()),
    }
}

/// A piece of a path or query, with everything escaped that is not unreserved (RFC 3986 §2.3).
#[must_use]
pub fn escaped(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

impl Client {
    /// A client of the API at `authority`.
    #[must_use]
    pub const fn new(authority: Authority, token: Option<Token>) -> Self {
        Self { authority, token }
    }

    /// Where the API is.
    #[must_use]
    pub const fn at(&self) -> &Authority {
        &self.authority
    }

    /// Reads JSON.
    ///
    /// # Errors
    /// When the node cannot be reached, says no, or answers something else.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let response = self.send(Method::GET, path, None, empty(), ANSWER).await?;
        self.json(response).await
    }

    /// Reads JSON that may take `wait` longer to come.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn get_within<T: DeserializeOwned>(
        &self,
        path: &str,
        wait: Duration,
    ) -> Result<T, ClientError> {
        let response = self.send(Method::GET, path, None, empty(), wait + ANSWER).await?;
        self.json(response).await
    }

    /// Sends JSON and reads JSON.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, ClientError> {
        self.tell(Method::POST, path, body).await
    }

    /// The same to change what is at `path`.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, ClientError> {
        self.tell(Method::PUT, path, body).await
    }

    async fn tell<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, ClientError> {
        let bytes = serde_json::to_vec(body).map_err(|error| self.answered(error.to_string()))?;
        let body = Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync();
        let response = self.send(method, path, Some("application/json"), body, ANSWER).await?;
        self.json(response).await
    }

    /// Whether there is something at `path`.
    ///
    /// # Errors
    /// When the node cannot be reached or says no for another reason.
    pub async fn has(&self, path: &str) -> Result<bool, ClientError> {
        match self.send(Method::HEAD, path, None, empty(), ANSWER).await {
            Ok(_) => Ok(true),
            Err(ClientError::Answer { status: StatusCode::NOT_FOUND, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends bytes as they come and reads JSON. `wait` bounds the whole.
    ///
    /// # Errors
    /// As for [`Client::get`], and when the source fails.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        source: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
        wait: Duration,
    ) -> Result<T, ClientError> {
        let body =
            BodyExt::boxed_unsync(StreamBody::new(source.map(|piece| piece.map(Frame::data))));
        let octets = Some("application/octet-stream");
        let response = self.send(Method::POST, path, octets, body, wait + ANSWER).await?;
        self.json(response).await
    }

    /// Reads a text.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn text(&self, path: &str) -> Result<String, ClientError> {
        let response = self.send(Method::GET, path, None, empty(), ANSWER).await?;
        let bytes = self.whole(response.into_body()).await?;
        String::from_utf8(bytes).map_err(|_| self.answered("text that is not UTF-8".into()))
    }

    /// Reads bytes as they come. An item that is an error is the last; `stall` bounds the wait
    /// for each, where one is given.
    ///
    /// # Errors
    /// When the node cannot be reached or says no.
    pub async fn stream(
        &self,
        path: &str,
        wait: Duration,
        stall: Option<Duration>,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>, ClientError> {
        let response = self.send(Method::GET, path, None, empty(), wait + ANSWER).await?;
        Ok(pieces(response.into_body(), stall))
    }

    /// Asks for something to be done that takes no body, and reads what is said about it as it
    /// comes, as for [`Client::stream`].
    ///
    /// # Errors
    /// When the node cannot be reached or says no.
    pub async fn follow(
        &self,
        path: &str,
        wait: Duration,
        stall: Option<Duration>,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>, ClientError> {
        let response = self.send(Method::POST, path, None, empty(), wait + ANSWER).await?;
        Ok(pieces(response.into_body(), stall))
    }

    /// Asks for something to be done that takes no body and is answered by none, within `wait`
    /// beyond the usual.
    ///
    /// # Errors
    /// When the node cannot be reached or says no.
    pub async fn act(&self, method: Method, path: &str, wait: Duration) -> Result<(), ClientError> {
        self.send(method, path, None, empty(), wait + ANSWER).await.map(drop)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        content: Option<&str>,
        body: Body,
        wait: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.authority.as_str())
            .header(header::USER_AGENT, concat!("leasehold/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        if let Some(content) = content {
            request = request.header(header::CONTENT_TYPE, content);
        }
        let request = request.body(body).map_err(|error| self.answered(error.to_string()))?;
        let stream = self.connect().await?;
        let shaken = http1::handshake::<_, Body>(TokioIo::new(stream)).await;
        let (mut sender, connection) = shaken.map_err(|error| self.broken(error))?;
        // Ends with the response's body, or when it is dropped.
        tokio::spawn(connection);
        let answered = timeout(wait, sender.send_request(request)).await;
        let answered = answered.map_err(|_| ClientError::Slow { at: self.authority.clone() })?;
        let response = answered.map_err(|error| self.broken(error))?;
        if response.status().is_success() { Ok(response) } else { Err(self.no(response).await) }
    }

    async fn connect(&self) -> Result<TcpStream, ClientError> {
        let failed = |source| ClientError::Connect { at: self.authority.clone(), source };
        let host = self.authority.host();
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let port = self.authority.port_u16().unwrap_or(80);
        let connected = timeout(CONNECT, TcpStream::connect((bare, port))).await;
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let stream = connected.map_err(|_| failed(late()))?.map_err(failed)?;
        // Small requests should not wait for more to send with them.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// What a response that is no success says.
    async fn no(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        if status == StatusCode::UNAUTHORIZED {
            return ClientError::Token { at: self.authority.clone() };
        }
        let body = match self.whole(response.into_body()).await {
            Ok(body) => body,
            Err(error) => return error,
        };
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error: mut inside }) => {
                inside.message = leasehold_keys::text::shown(&inside.message);
                ClientError::Answer { status, inside }
            }
            // An answer to HEAD has no body, and a proxy speaks otherwise.
            Err(_) => {
                let code = match status {
                    StatusCode::NOT_FOUND => Code::NotFound,
                    StatusCode::FORBIDDEN => Code::WrongHost,
                    StatusCode::TOO_MANY_REQUESTS => Code::Busy,
                    StatusCode::SERVICE_UNAVAILABLE => Code::Stopping,
                    StatusCode::BAD_REQUEST => Code::BadRequest,
                    _ => Code::Internal,
                };
                let message = format!("the node at {} answered {status}", self.authority);
                let detail = serde_json::Value::Null;
                ClientError::Answer { status, inside: ErrorInside { code, message, detail } }
            }
        }
    }

    async fn json<T: DeserializeOwned>(
        &self,
        response: Response<Incoming>,
    ) -> Result<T, ClientError> {
        let bytes = self.whole(response.into_body()).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.answered(error.to_string()))
    }

    async fn whole(&self, body: Incoming) -> Result<Vec<u8>, ClientError> {
        let mut pieces = std::pin::pin!(pieces(body, Some(STALL)));
        let mut whole = Vec::new();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|why| self.broken(why))?;
            if whole.len() + piece.len() > MAX_TEXT {
                return Err(self.answered("more than is read of one answer".into()));
            }
            whole.extend_from_slice(&piece);
        }
        Ok(whole)
    }

    fn answered(&self, why: String) -> ClientError {
        ClientError::Answered { at: self.authority.clone(), why }
    }

    fn broken(&self, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Broken { at: self.authority.clone(), why: io::Error::other(why) }
    }
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// The bytes of a body; an error is the last item.
fn pieces(body: Incoming, stall: Option<Duration>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    futures::stream::unfold(Some(BodyStream::new(body)), move |state| async move {
        let mut body = state?;
        loop {
            let next = match stall {
                Some(stall) => match timeout(stall, body.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        let late = io::Error::from(io::ErrorKind::TimedOut);
                        return Some((Err(late), None));
                    }
                },
                None => body.next().await,
            };
            match next? {
                Ok(frame) => {
                    // Anything else is a trailer, which this API does not send.
                    if let Ok(data) = frame.into_data() {
                        return Some((Ok(data), Some(body)));
                    }
                }
                Err(error) => return Some((Err(io::Error::other(error)), None)),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read() {
        for url in ["http://127.0.0.1:7700", "http://localhost:80/", "http://[::1]:7700"] {
            assert!(parse_url(url).is_ok(), "{url}");
        }
        for url in [
            "",
            "127.0.0.1:7700",
            "https://x:1",
            "http://x/y",
            "http://a@b:1",
            "http://",
            "ftp://x",
        ] {
            assert_eq!(parse_url(url).expect_err(url).exit(), Exit::Usage);
        }
    }

    #[test]
    fn whatever_stands_in_a_path_is_escaped() {
        assert_eq!(escaped("a-b_c.d~1"), "a-b_c.d~1");
        assert_eq!(escaped("a/b?c=d é"), "a%2Fb%3Fc%3Dd%20%C3%A9");
    }

    #[tokio::test]
    async fn nobody_there_is_said_with_what_to_do() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = listener.local_addr().expect("an address");
        drop(listener);
        let authority = parse_url(&format!("http://{at}")).expect("an address");
        let client = Client::new(authority, None);
        let error = client.get::<serde_json::Value>("/v1/node").await.expect_err("nobody");
        assert_eq!(error.exit(), Exit::Remote);
        assert!(error.to_string().contains("leasehold up"), "{error}");
    }
}
