//! A client of a node's models' API as a program in any language would be one: HTTP over a socket,
//! nothing of the node's own client.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::http::request::Builder;
use hyper::{HeaderMap, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use leasehold_node::openai::sse::Parser;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::PATIENCE;

/// Where models are asked, and as whom.
#[derive(Clone, Debug)]
pub(crate) struct Web {
    pub(crate) at: SocketAddr,
    pub(crate) key: Option<String>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|why| panic!("{why}: {} {:?}", self.status, self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// What an SDK reads of an error; the body must be OpenAI's, whatever went wrong.
    pub(crate) fn fault(&self) -> Value {
        let said = self.json();
        let error = said.get("error").and_then(Value::as_object);
        let error = error.unwrap_or_else(|| panic!("no error: {} {said}", self.status));
        let keys: Vec<_> = error.keys().map(String::as_str).collect();
        let fields = ["message", "type", "param", "code"];
        assert!(fields.iter().all(|field| keys.contains(field)), "{said}");
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{said}");
        assert!(error["type"].is_string(), "{said}");
        assert!(self.header("content-type").starts_with("application/json"), "{:?}", self.headers);
        assert!(self.header("x-request-id").starts_with("req-"), "{:?}", self.headers);
        said["error"].clone()
    }
}

/// An answer that comes in events.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    parser: Parser,
    connection: JoinHandle<()>,
}

/// To let go of it is to hang up.
impl Drop for Events {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// What a stream came to.
#[derive(Debug, Default)]
pub(crate) struct Streamed {
    pub(crate) chunks: Vec<Value>,
    /// Its last event was `[DONE]`.
    pub(crate) done: bool,
    /// It was cut off below HTTP.
    pub(crate) broken: bool,
}

impl Streamed {
    pub(crate) fn text(&self) -> String {
        let delta =
            |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
        self.chunks.iter().filter_map(delta).collect()
    }

    pub(crate) fn error(&self) -> Option<&Value> {
        self.chunks.iter().find_map(|chunk| chunk.get("error"))
    }

    pub(crate) fn usage(&self) -> Option<&Value> {
        self.chunks.iter().filter_map(|chunk| chunk.get("usage")).find(|usage| usage.is_object())
    }
}

impl Events {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// The data of the next event; none at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            if let Some(event) = self.parser.next_event().map_err(|why| why.to_string())? {
                return Ok(Some(event.data));
            }
            let frame = timeout(PATIENCE, self.body.frame()).await.map_err(|_| "silent")?;
            match frame {
                None => return Ok(None),
                Some(Err(why)) => return Err(why.to_string()),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.parser.push(data);
                    }
                }
            }
        }
    }

    pub(crate) async fn all(mut self) -> Streamed {
        let mut streamed = Streamed::default();
        loop {
            match self.next().await {
                Ok(Some(data)) => {
                    assert!(!streamed.done, "something comes after the end: {data:?}");
                    if &data[..] == b"[DONE]" {
                        streamed.done = true;
                    } else {
                        let chunk = serde_json::from_slice(&data);
                        streamed.chunks.push(chunk.unwrap_or_else(|why| panic!("{why}: {data:?}")));
                    }
                }
                Ok(None) => return streamed,
                Err(why) => {
                    assert_ne!(why, "silent", "nothing comes any more");
                    streamed.broken = true;
                    return streamed;
                }
            }
        }
    }

    /// The whole body of an answer that is no stream after all.
    pub(crate) async fn whole(mut self) -> Answer {
        let (status, headers) = (self.status, self.headers.clone());
        let mut body = Vec::new();
        while let Some(Ok(frame)) = timeout(PATIENCE, self.body.frame()).await.expect("it comes") {
            body.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        }
        Answer { status, headers, body: body.into() }
    }
}

impl Web {
    pub(crate) fn with_key(&self, key: impl Into<String>) -> Self {
        Self { at: self.at, key: Some(key.into()) }
    }

    fn request(&self, method: &str, path: &str) -> Builder {
        let request = Request::builder().method(method).uri(path);
        let request = request.header(header::HOST, self.at.to_string());
        match &self.key {
            Some(key) => request.header(header::AUTHORIZATION, format!("Bearer {key}")),
            None => request,
        }
    }

    /// Sends anything, well formed or not.
    pub(crate) async fn send(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Events {
        let stream = TcpStream::connect(self.at).await.expect("it listens");
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.expect("it speaks HTTP");
        let connection = tokio::spawn(async move {
            let _ = connection.await;
        });
        let request = self.request(method, path).header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Full::new(body.into())).expect("a request");
        let response = timeout(PATIENCE, sender.send_request(request)).await.expect("in time");
        let (parts, body) = response.expect("an answer").into_parts();
        let (status, headers) = (parts.status, parts.headers);
        Events { status, headers, body, parser: Parser::default(), connection }
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body.to_string()).await.whole().await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "").await.whole().await
    }

    /// A chat that is answered at once.
    pub(crate) async fn chat(&self, body: &Value) -> Answer {
        self.post("/v1/chat/completions", body).await
    }

    /// A chat that is answered in events.
    pub(crate) async fn stream(&self, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = true.into();
        self.send("POST", "/v1/chat/completions", body.to_string()).await
    }
}

/// Looks again and again, until what is awaited is there.
pub(crate) async fn until<T, F>(what: &str, patience: Duration, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let begun = Instant::now();
    loop {
        match look().await {
            Ok(seen) => return seen,
            Err(why) => {
                assert!(begun.elapsed() < patience, "{what} does not come: {why}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
