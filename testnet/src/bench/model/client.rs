//! A client of a model: HTTP/1.1 on a connection that is kept, as an SDK has it.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{SendRequest, handshake},
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use crate::bench::{api::refused, load};

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(60);
/// The longest answer that is read.
const MAX_ANSWER: usize = 1 << 20;
const PATH: &str = "/v1/chat/completions";

/// Where a model is asked, by which name, and what opens it.
#[derive(Clone, Debug)]
pub(super) struct Target {
    at: SocketAddr,
    bearer: String,
    model: String,
}

/// What a stream's client saw.
#[derive(Debug)]
pub(super) struct Streamed {
    /// From the request to each piece of text, in order, and what the text was.
    pub(super) pieces: Vec<(Instant, String)>,
    pub(super) begun: Instant,
}

impl Streamed {
    /// Milliseconds until the first text was there.
    pub(super) fn first_ms(&self) -> Option<f64> {
        let (first, _) = self.pieces.first()?;
        Some((*first - self.begun).as_secs_f64() * 1e3)
    }

    /// Milliseconds from the first text to the last, for each text after the first.
    pub(super) fn each_ms(&self) -> Option<f64> {
        let ((first, _), (last, _)) = (self.pieces.first()?, self.pieces.last()?);
        let after = self.pieces.len().checked_sub(1).filter(|after| *after > 0)?;
        Some((*last - *first).as_secs_f64() * 1e3 / after as f64)
    }
}

impl Target {
    pub(super) fn new(at: SocketAddr, key: &str, model: &str) -> Self {
        Self { at, bearer: format!("Bearer {key}"), model: model.into() }
    }

    pub(super) async fn open(&self) -> anyhow::Result<Client> {
        let stream = TcpStream::connect(self.at).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        let driven = tokio::spawn(async move {
            // Why it broke is what the next request says.
            let _ = connection.await;
        });
        let whole = self.body("whole", 16, false);
        Ok(Client { target: self.clone(), whole, sender, driven })
    }

    fn body(&self, content: &str, max_tokens: u32, stream: bool) -> Bytes {
        let mut body = json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": content }],
            "max_tokens": max_tokens,
            "temperature": 0,
        });
        if stream {
            body["stream"] = true.into();
        }
        body.to_string().into()
    }
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Client {
    target: Target,
    /// A short request for a whole answer.
    whole: Bytes,
    sender: SendRequest<Full<Bytes>>,
    driven: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.driven.abort();
    }
}

impl Client {
    async fn send(&mut self, body: Bytes, accept: &str) -> anyhow::Result<Response<Incoming>> {
        let request = Request::post(PATH)
            .header(HOST, self.target.at.to_string())
            .header(ACCEPT, accept)
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, "leasehold-testnet")
            .header(AUTHORIZATION, &self.target.bearer)
            .body(Full::new(body))?;
        self.sender.ready().await?;
        Ok(self.sender.send_request(request).await?)
    }

    /// A whole answer to a short request.
    pub(super) async fn whole(&mut self) -> anyhow::Result<()> {
        let asked = async {
            let response = self.send(self.whole.clone(), "application/json").await?;
            read(response).await.map(drop)
        };
        timeout(ANSWER, asked).await.context("no answer came in time")?
    }

    /// An answer in pieces.
    pub(super) async fn stream(
        &mut self,
        content: &str,
        max_tokens: u32,
    ) -> anyhow::Result<Streamed> {
        let body = self.target.body(content, max_tokens, true);
        let asked = async {
            let begun = Instant::now();
            let response = self.send(body, "text/event-stream").await?;
            if response.status() != StatusCode::OK {
                read(response).await?;
                bail!("an answer that is neither");
            }
            let (mut body, mut events) = (response.into_body(), Events::default());
            let mut pieces = Vec::new();
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame?.into_data() else { continue };
                let now = Instant::now();
                events.came(&data, |text| pieces.push((now, text)))?;
            }
            ensure!(events.done, "the stream broke off");
            Ok(Streamed { pieces, begun })
        };
        timeout(ANSWER, asked).await.context("no answer came in time")?
    }
}

impl load::Client for Client {
    async fn ask(&mut self) -> anyhow::Result<Option<Instant>> {
        self.whole().await?;
        Ok(Some(Instant::now()))
    }

    async fn again(&mut self) -> anyhow::Result<()> {
        *self = self.target.clone().open().await?;
        Ok(())
    }
}

async fn read(response: Response<Incoming>) -> anyhow::Result<Bytes> {
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("reading the answer: {error}"))?.to_bytes();
    if status == StatusCode::OK { Ok(body) } else { Err(refused(PATH, status, &body)) }
}

/// Server-sent events as they come, in whatever parts.
#[derive(Debug, Default)]
struct Events {
    rest: BytesMut,
    done: bool,
}

impl Events {
    /// More of the stream came: `text` is told each piece of text in it.
    fn came(&mut self, data: &[u8], mut text: impl FnMut(String)) -> anyhow::Result<()> {
        self.rest.extend_from_slice(data);
        while let Some(end) = self.rest.windows(2).position(|two| two == b"\n\n") {
            let event = self.rest.split_to(end + 2);
            let Some(data) = event.strip_prefix(b"data: ") else { continue };
            if data.starts_with(b"[DONE]") {
                self.done = true;
                continue;
            }
            let chunk: serde_json::Value = serde_json::from_slice(data)?;
            ensure!(chunk.get("error").is_none(), "the stream ended with {chunk}");
            match chunk["choices"][0]["delta"]["content"].as_str() {
                Some(content) if !content.is_empty() => text(content.to_owned()),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_in_whatever_parts() {
        let stream = b": wait\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n\
            data: {\"choices\":[]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"bc\"}}]}\n\n\
            data: [DONE]\n\n";
        for size in 1..=stream.len() {
            let (mut events, mut texts) = (Events::default(), Vec::new());
            for part in stream.chunks(size) {
                events.came(part, |text| texts.push(text)).expect("sound");
            }
            assert_eq!((texts.join(" "), events.done), ("a bc".into(), true), "{size}");
        }
        let mut events = Events::default();
        assert!(events.came(b"data: {\"error\":{}}\n\n", |_| {}).is_err());
    }
}
