//! An upstream that answers at once: what a client waits for is then what lies between.
//!
//! | asked with | it answers |
//! |---|---|
//! | no `stream` | a whole answer of ten tokens |
//! | `burst` | a stream of a hundred tokens, all at once |
//! | `paced` | the same, one in a millisecond |
//!
//! The text of each token of a stream is when it left, in microseconds since the upstream began:
//! whoever has both ends in one process sees how long it was under way.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, Either, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::sleep_until,
};

/// What its model is called.
pub(super) const MODEL: &str = "bench";
/// Tokens of a stream.
pub(super) const TOKENS: usize = 100;
/// Asks for a stream of tokens that come at once.
pub(super) const BURST: &str = "burst";
/// Asks for a stream of tokens that come one by one.
pub(super) const PACED: &str = "paced";
/// Between two of them.
const PACE: Duration = Duration::from_millis(1);
const LIST: &str =
    r#"{"object":"list","data":[{"id":"bench","object":"model","created":1,"owned_by":"bench"}]}"#;
const WHOLE: &str = concat!(
    r#"{"id":"chatcmpl-bench","object":"chat.completion","created":1,"model":"bench","#,
    r#""choices":[{"index":0,"message":{"role":"assistant","content":"#,
    r#""One two three four five six seven eight nine ten."},"finish_reason":"stop"}],"#,
    r#""usage":{"prompt_tokens":10,"completion_tokens":10,"total_tokens":20}}"#,
);

type Answer = Response<Either<Full<Bytes>, UnsyncBoxBody<Bytes, Infallible>>>;

/// An upstream that runs, on a thread of its own; it ends when dropped.
#[derive(Debug)]
pub(super) struct Mock {
    pub(super) at: SocketAddr,
    /// Of which its tokens tell how long it was ago.
    pub(super) began: Instant,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Mock {
    pub(super) fn start() -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let (at, began) = (listener.local_addr()?, Instant::now());
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || {
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener)?;
                tokio::select! {
                    failed = listen(listener, began) => failed,
                    _ = stopped => Ok(()),
                }
            })
        };
        let thread = thread::Builder::new().name("upstream".into()).spawn(run)?;
        Ok(Self { at, began, stop: Some(stop), thread: Some(thread) })
    }

    /// Milliseconds that a token was under way which came at `came`.
    pub(super) fn under_way_ms(&self, came: Instant, text: &str) -> anyhow::Result<f64> {
        let left: u64 = text.trim().parse().context("a token that the upstream did not send")?;
        let left = self.began + Duration::from_micros(left);
        Ok(came.saturating_duration_since(left).as_secs_f64() * 1e3)
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // That it failed was seen by whoever asked it.
            let _ = thread.join();
        }
    }
}

async fn listen(listener: TcpListener, began: Instant) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve(stream, began));
    }
}

async fn serve(stream: TcpStream, began: Instant) {
    let service = service_fn(move |request| answer(request, began));
    // A client may go whenever it likes.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: Request<Incoming>, began: Instant) -> Result<Answer, hyper::Error> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let body = request.into_body().collect().await?.to_bytes();
    let plain = |status: StatusCode, text: &'static str| {
        let mut answer = Response::new(Either::Left(Full::from(text)));
        *answer.status_mut() = status;
        let json = hyper::header::HeaderValue::from_static("application/json");
        answer.headers_mut().insert(CONTENT_TYPE, json);
        answer
    };
    let has = |word: &str| body.windows(word.len()).any(|part| part == word.as_bytes());
    Ok(match (method, path.as_str()) {
        (Method::GET, "/v1/models") => plain(StatusCode::OK, LIST),
        (Method::POST, "/v1/chat/completions")
            if has("\"stream\":true") || has("\"stream\": true") =>
        {
            let pace = if has(PACED) { PACE } else { Duration::ZERO };
            let events = events(began, pace, has("include_usage"));
            let mut answer = Response::new(Either::Right(events));
            let kind = hyper::header::HeaderValue::from_static("text/event-stream");
            answer.headers_mut().insert(CONTENT_TYPE, kind);
            answer
        }
        (Method::POST, "/v1/chat/completions") => plain(StatusCode::OK, WHOLE),
        _ => plain(StatusCode::NOT_FOUND, r#"{"error":{"message":"there is no such path"}}"#),
    })
}

fn events(began: Instant, pace: Duration, usage: bool) -> UnsyncBoxBody<Bytes, Infallible> {
    let first = tokio::time::Instant::now();
    let tokens = stream::unfold(0, move |token| async move {
        if token >= TOKENS {
            return None;
        }
        if !pace.is_zero() {
            sleep_until(first + pace * u32::try_from(token).unwrap_or(u32::MAX)).await;
        }
        let left = began.elapsed().as_micros();
        Some((chunk(&format!(r#"{{"content":"{left} "}}"#), "null"), token + 1))
    });
    let mut end = vec![chunk("{}", "\"stop\"")];
    if usage {
        end.push(
            concat!(
                r#"data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"#,
                r#""model":"bench","choices":[],"usage":{"prompt_tokens":10,"#,
                r#""completion_tokens":100,"total_tokens":110}}"#,
                "\n\n"
            )
            .into(),
        );
    }
    end.push("data: [DONE]\n\n".into());
    let all = futures::StreamExt::chain(tokens, stream::iter(end));
    let frames = futures::StreamExt::map(all, |event| Ok(Frame::data(Bytes::from(event))));
    StreamBody::new(frames).boxed_unsync()
}

fn chunk(delta: &str, finish: &str) -> String {
    format!(
        "data: {{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1,\
         \"model\":\"bench\",\"choices\":[{{\"index\":0,\"delta\":{delta},\
         \"finish_reason\":{finish}}}]}}\n\n"
    )
}

#[cfg(test)]
mod tests {
    use super::super::client::Target;
    use super::*;

    #[tokio::test]
    async fn it_answers_whole_and_in_pieces() {
        let mock = Mock::start().expect("starts");
        let mut client = Target::new(mock.at, "none", MODEL).open().await.expect("open");
        client.whole().await.expect("an answer");
        for content in [BURST, PACED] {
            let streamed = client.stream(content, 128).await.expect("a stream");
            assert_eq!(streamed.pieces.len(), TOKENS);
            assert!(streamed.first_ms() > Some(0.0));
            for (came, text) in &streamed.pieces {
                assert!(mock.under_way_ms(*came, text).expect("a time") >= 0.0);
            }
        }
    }
}
