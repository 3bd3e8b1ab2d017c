//! An upstream that does as it is told, on a socket of its own.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

/// What it is told to answer.
#[derive(Clone, Debug)]
pub(super) enum Reply {
    /// A whole answer.
    Whole(u16, Vec<(&'static str, &'static str)>, Bytes),
    /// A stream of these.
    Stream(Vec<Step>),
    /// Nothing, ever.
    Never,
}

#[derive(Clone, Debug)]
pub(super) enum Step {
    /// These bytes.
    Send(Bytes),
    /// Nothing until it is told to.
    Wait(Arc<Notify>),
    /// Nothing more, with the connection open.
    Hang,
    /// The connection breaks.
    Break,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

type Script = dyn Fn(&Asked) -> Reply + Send + Sync;
type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The upstream.
pub(super) struct Mock {
    pub(super) url: String,
    /// Connections that were made to it.
    pub(super) connections: Arc<AtomicUsize>,
    /// Requests that it got.
    pub(super) asked: Arc<AtomicUsize>,
    /// Told for each answer that was given up in the middle.
    pub(super) gone: Arc<Notify>,
}

/// Tells when an answer is not wanted any more.
struct Wanted {
    gone: Arc<Notify>,
    complete: bool,
}

impl Wanted {
    fn complete(&mut self) {
        self.complete = true;
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        if !self.complete {
            self.gone.notify_one();
        }
    }
}

impl Mock {
    pub(super) async fn start(script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_with(script, None).await
    }

    pub(super) async fn start_with(
        script: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
        tls: Option<TlsAcceptor>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = match tls {
            None => format!("http://127.0.0.1:{port}"),
            Some(_) => format!("https://localhost:{port}/v1"),
        };
        let mock =
            Self { url, connections: Arc::default(), asked: Arc::default(), gone: Arc::default() };
        let (connections, asked) = (mock.connections.clone(), mock.asked.clone());
        let (gone, script): (_, Arc<Script>) = (mock.gone.clone(), Arc::new(script));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Small events must not wait for each other.
                stream.set_nodelay(true).unwrap();
                connections.fetch_add(1, Ordering::SeqCst);
                let (asked, gone, script) = (asked.clone(), gone.clone(), script.clone());
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, asked, gone, script).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, asked, gone, script).await;
                            }
                        }
                    }
                });
            }
        });
        mock
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn serve<S>(stream: S, asked: Arc<AtomicUsize>, gone: Arc<Notify>, script: Arc<Script>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let (asked, gone, script) = (asked.clone(), gone.clone(), script.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            asked.fetch_add(1, Ordering::SeqCst);
            let path = parts.uri.path().to_owned();
            let reply = script(&Asked { path, headers: parts.headers, body });
            Ok::<_, Infallible>(answer(reply, gone).await)
        }
    });
    let http = hyper::server::conn::http1::Builder::new();
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(reply: Reply, gone: Arc<Notify>) -> Response<Body> {
    let wanted = Wanted { gone, complete: false };
    match reply {
        Reply::Never => {
            futures::future::pending::<()>().await;
            drop(wanted);
            Response::default()
        }
        Reply::Whole(status, headers, body) => {
            let mut response = Response::builder().status(status);
            for (name, value) in headers {
                response = response.header(name, value);
            }
            let mut wanted = wanted;
            wanted.complete();
            let body = Full::new(body).map_err(|never| match never {}).boxed_unsync();
            response.body(body).unwrap()
        }
        Reply::Stream(steps) => {
            let pieces =
                stream::unfold((steps.into_iter(), wanted), |(mut steps, mut wanted)| async {
                    loop {
                        match steps.next() {
                            None => {
                                wanted.complete();
                                return None;
                            }
                            Some(Step::Send(bytes)) => {
                                return Some((Ok(Frame::data(bytes)), (steps, wanted)));
                            }
                            Some(Step::Wait(told)) => told.notified().await,
                            Some(Step::Hang) => futures::future::pending().await,
                            Some(Step::Break) => {
                                wanted.complete();
                                return Some((
                                    Err(io::Error::other("told to break")),
                                    (steps, wanted),
                                ));
                            }
                        }
                    }
                });
            let body = BodyExt::boxed_unsync(StreamBody::new(pieces));
            Response::builder()
                .header("content-type", "text/event-stream; charset=utf-8")
                .body(body)
                .unwrap()
        }
    }
}

/// Bytes to send.
pub(super) fn send(text: impl Into<String>) -> Step {
    Step::Send(Bytes::from(text.into()))
}

/// An event with a chunk that says something.
pub(super) fn says(text: &str) -> Step {
    let chunk = serde_json::json!({"choices": [{"index": 0, "delta": {"content": text}}]});
    send(format!("data: {chunk}\n\n"))
}

/// The events that end a stream: why it ends, what it used, and that it is done.
pub(super) fn ends(prompt: u64, completion: u64) -> Vec<Step> {
    let end = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
    let usage = serde_json::json!({"choices": [], "usage": {"prompt_tokens": prompt,
        "completion_tokens": completion, "prompt_tokens_details": {"cached_tokens": 1}}});
    vec![send(format!("data: {end}\n\ndata: {usage}\n\n")), send("data: [DONE]\n\n")]
}
