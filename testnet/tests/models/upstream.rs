//! A server as GPU hosts run one, for an adapter to stand before: it speaks OpenAI's API, and does
//! well or badly as the name of the model that it is asked for says.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What was seen of the requests for one model.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Requests that came.
    pub(crate) asked: usize,
    /// Of them, those that are being answered now.
    pub(crate) open: usize,
    /// The last one.
    pub(crate) last: Value,
    /// The chunks that were sent.
    pub(crate) chunks: usize,
}

type Book = Arc<Mutex<BTreeMap<String, Seen>>>;

fn hold(book: &Book) -> std::sync::MutexGuard<'_, BTreeMap<String, Seen>> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server that runs until it is dropped.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) at: SocketAddr,
    book: Book,
    serving: JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A request that is being answered: counted until whoever asked has hung up or has it all.
struct Open(Book, String);

impl Open {
    fn new(book: &Book, model: &str) -> Self {
        hold(book).entry(model.into()).or_default().open += 1;
        Self(Arc::clone(book), model.into())
    }

    fn chunk(&self) {
        hold(&self.0).entry(self.1.clone()).or_default().chunks += 1;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(seen) = hold(&self.0).get_mut(&self.1) {
            seen.open -= 1;
        }
    }
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        Self::on(listener)
    }

    fn on(listener: TcpListener) -> Self {
        let at = listener.local_addr().expect("an address");
        let book = Book::default();
        let shared = Arc::clone(&book);
        let serving = tokio::spawn(async move {
            // Aborted with it, so that a server that is gone answers nobody.
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let _ = stream.set_nodelay(true);
                let book = Arc::clone(&shared);
                let service = service_fn(move |request| answer(Arc::clone(&book), request));
                connections.spawn(async move {
                    let _ =
                        http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { at, book, serving }
    }

    /// As `model add --upstream` wants it.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1", self.at)
    }

    pub(crate) fn seen(&self, model: &str) -> Seen {
        hold(&self.book).get(model).cloned().unwrap_or_default()
    }
}

fn whole(status: u16, text: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(text.into()).map_err(|never| match never {}).boxed_unsync();
    let response = Response::builder().status(status);
    response.header(header::CONTENT_TYPE, "application/json").body(body).expect("a response")
}

fn events(
    pieces: impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static,
) -> Response<Body> {
    let body = BodyExt::boxed_unsync(StreamBody::new(pieces.map(|piece| piece.map(Frame::data))));
    let response = Response::builder().header(header::CONTENT_TYPE, "text/event-stream");
    response.body(body).expect("a response")
}

fn event(data: &Value) -> Bytes {
    format!("data: {data}\n\n").into()
}

fn chunk(text: &str, finish: Option<&str>) -> Value {
    json!({"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": "inside",
        "x_own": {"kept": true},
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})
}

fn usage(prompt: u64, completion: u64) -> Value {
    json!({"id": "up-1", "object": "chat.completion.chunk", "created": 1, "model": "inside",
        "choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
        "total_tokens": prompt + completion}})
}

fn completion(text: &str, prompt: u64, completion: u64) -> String {
    json!({"id": "up-1", "object": "chat.completion", "created": 1, "model": "inside",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
            "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion}})
    .to_string()
}

/// `/v1/responses`, whose events have names.
fn responses(asked: &Value) -> Response<Body> {
    if asked.get("input").is_none() {
        return whole(400, json!({"error": {"message": "no input"}}).to_string());
    }
    let response = |status: &str, text: &str| {
        let content = json!([{"type": "output_text", "text": text, "annotations": []}]);
        let message = json!({"type": "message", "id": "msg_1", "role": "assistant",
            "status": "completed", "content": content});
        json!({"id": "resp_1", "object": "response", "created_at": 1, "model": "inside",
            "status": status, "error": null, "incomplete_details": null, "instructions": null,
            "metadata": {}, "parallel_tool_calls": true, "tool_choice": "auto", "tools": [],
            "temperature": 1.0, "top_p": 1.0,
            "output": if text.is_empty() { json!([]) } else { json!([message]) },
            "usage": {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0}}})
    };
    let text = "Hello from the responses";
    if asked["stream"] != true {
        return whole(200, response("completed", text).to_string());
    }
    let at = json!({"item_id": "msg_1", "output_index": 0, "content_index": 0});
    let of = |kind: &str, more: Value| {
        let mut event = json!({"type": kind, "sequence_number": 1});
        for (key, value) in at.as_object().into_iter().chain(more.as_object()).flatten() {
            event[key] = value.clone();
        }
        event
    };
    let item = json!({"type": "message", "id": "msg_1", "role": "assistant",
        "status": "in_progress", "content": []});
    let part = json!({"type": "output_text", "text": "", "annotations": []});
    let mut all = vec![
        of("response.created", json!({"response": response("in_progress", "")})),
        of("response.output_item.added", json!({"item": item})),
        of("response.content_part.added", json!({"part": part})),
    ];
    for word in ["Hello", " from", " the", " responses"] {
        all.push(of("response.output_text.delta", json!({"delta": word, "logprobs": []})));
    }
    if asked["model"] == "responds-and-breaks" {
        all.truncate(5);
    } else {
        all.push(of("response.output_text.done", json!({"text": text, "logprobs": []})));
        all.push(of("response.completed", json!({"response": response("completed", text)})));
    }
    let named = |event: Value| {
        let name = event["type"].as_str().unwrap_or_default().to_owned();
        Ok(Bytes::from(format!("event: {name}\ndata: {event}\n\n")))
    };
    events(stream::iter(all.into_iter().map(named).collect::<Vec<_>>()))
}

async fn answer(book: Book, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    if path == "/v1/models" {
        let list = json!({"object": "list", "data": [{"id": "any", "object": "model"}]});
        return Ok(whole(200, list.to_string()));
    }
    if path == "/v1/responses" {
        let Ok(body) = request.into_body().collect().await else { return Ok(whole(400, "{}")) };
        return Ok(responses(&serde_json::from_slice(&body.to_bytes()).unwrap_or_default()));
    }
    if path != "/v1/chat/completions" {
        return Ok(whole(404, json!({"error": {"message": "no such path"}}).to_string()));
    }
    let Ok(body) = request.into_body().collect().await else { return Ok(whole(400, "{}")) };
    let asked: Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
    let model = asked["model"].as_str().unwrap_or_default().to_owned();
    {
        let mut book = hold(&book);
        let seen = book.entry(model.clone()).or_default();
        seen.asked += 1;
        seen.last.clone_from(&asked);
    }
    let open = Open::new(&book, &model);
    let stream = asked["stream"] == true;
    let said = |status: u16, message: &str| {
        let code = json!({"error": {"message": message, "type": "some_error", "code": status}});
        whole(status, code.to_string())
    };
    Ok(match model.as_str() {
        "refuses-401" => said(401, "the inner key sk-secret is wrong"),
        "refuses-429" => {
            let mut response = said(429, "slow down");
            response.headers_mut().insert(header::RETRY_AFTER, 7.into());
            response
        }
        "refuses-500" => said(500, "stack trace at 0xdeadbeef"),
        "refuses-400" => said(400, "temperature is not to our liking"),
        "garbage" if stream => events(stream::iter([Ok(Bytes::from_static(b"data: {]]\n\n"))])),
        "garbage" => whole(200, "<html>it works</html>"),
        "hangs" => {
            let _open = open;
            std::future::pending().await
        }
        // It reads, and then says nothing for ever.
        "hangs-inside" => {
            let first = stream::iter([Ok(event(&chunk("well", None)))]);
            events(first.chain(stream::once(async move {
                let _open = open;
                std::future::pending().await
            })))
        }
        "lies" if stream => events(stream::iter(
            [chunk("two", None), chunk(" words", Some("stop")), usage(1_000_000, 10_000)]
                .map(|value| Ok(event(&value)))
                .into_iter()
                .chain([Ok(Bytes::from_static(b"data: [DONE]\n\n"))]),
        )),
        "lies" => whole(200, completion("two words", 1_000_000, 10_000)),
        // The connection goes in the middle of an answer.
        "breaks" => events(
            stream::iter([Ok(event(&chunk("so", None))), Ok(event(&chunk(" far", None)))]).chain(
                stream::once(async {
                    // What was said before is to be on its way.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    Err(std::io::Error::other("planted"))
                }),
            ),
        ),
        "fails-inside" => events(stream::iter([
            Ok(event(&chunk("so", None))),
            Ok(event(&json!({"error": {"message": "out of memory", "code": 500}}))),
        ])),
        "tools" if stream => {
            let call = |arguments: &str, first: bool| {
                let mut call = json!({"index": 0, "function": {"arguments": arguments}});
                if first {
                    call["id"] = "call_1".into();
                    call["type"] = "function".into();
                    call["function"]["name"] = "weather".into();
                }
                let mut value = chunk("", None);
                value["choices"][0]["delta"] = json!({"tool_calls": [call]});
                value
            };
            let end = {
                let mut value = chunk("", Some("tool_calls"));
                value["choices"][0]["delta"] = json!({});
                value
            };
            let pieces = [call("{\"city\":", true), call("\"Rome\"}", false), end, usage(40, 12)];
            let done = [Ok(Bytes::from_static(b"data: [DONE]\n\n"))];
            events(stream::iter(pieces.map(|value| Ok(event(&value))).into_iter().chain(done)))
        }
        // Without an end, as fast as it is read, or every so often.
        "endless" | "flood" => {
            let slow = model == "endless";
            let text = if slow { "tick ".into() } else { "x".repeat(8 << 10) };
            let one = event(&chunk(&text, None));
            events(stream::unfold(open, move |open| {
                let one = one.clone();
                async move {
                    if slow {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    open.chunk();
                    Some((Ok(one), open))
                }
            }))
        }
        _ if stream => {
            let words = ["Hello", " from", " the", " other", " server"];
            let chunks = words.map(|word| chunk(word, None)).into_iter();
            let ends = [chunk("", Some("stop")), usage(11, 5)];
            let pieces = chunks.chain(ends).map(|value| Ok(event(&value)));
            let done = [Ok(Bytes::from_static(b"data: [DONE]\n\n"))];
            events(stream::iter(pieces.chain(done).collect::<Vec<_>>()))
        }
        _ => whole(200, completion("Hello from the other server", 11, 5)),
    })
}
