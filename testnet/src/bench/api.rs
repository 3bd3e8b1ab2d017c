//! One kept connection to a node's API: what a benchmark asks must cost the node little, and the
//! benchmark less.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Request, StatusCode,
    client::conn::http1::{SendRequest, handshake},
    header::{AUTHORIZATION, CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use leasehold_node::api::token::{self, Token};
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use crate::fleet::Member;

/// How long one answer may take: longer than a node looks for a lease or brings a gang together.
const ANSWER: Duration = Duration::from_secs(30);
/// The longest answer that is read.
const MAX_ANSWER: usize = 64 << 20;

/// Where a node's API is, and what opens it.
#[derive(Debug, Clone)]
pub(super) struct Door {
    at: SocketAddr,
    bearer: Option<String>,
}

impl Door {
    pub(super) fn of(member: &Member) -> anyhow::Result<Self> {
        let token = Token::read(&member.dir().join(token::FILE))?;
        let bearer = Some(format!("Bearer {}", token.reveal()));
        Ok(Self { at: member.file()?.api, bearer })
    }

    /// One that needs no token.
    pub(super) const fn open_to_all(at: SocketAddr) -> Self {
        Self { at, bearer: None }
    }

    /// What is at `path`, over a connection of its own: a node closes those on which nothing is
    /// asked for some seconds.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Bytes> {
        self.open().await?.get(path).await
    }

    pub(super) async fn open(&self) -> anyhow::Result<Kept> {
        let stream = TcpStream::connect(self.at).await.context("the node's API")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        let driven = tokio::spawn(async move {
            // Why it broke is what the next request says.
            let _ = connection.await;
        });
        Ok(Kept { door: self.clone(), sender, driven })
    }
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Kept {
    door: Door,
    sender: SendRequest<Full<Bytes>>,
    driven: JoinHandle<()>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.driven.abort();
    }
}

impl Kept {
    /// Opens it anew.
    pub(super) async fn again(&mut self) -> anyhow::Result<()> {
        *self = self.door.clone().open().await?;
        Ok(())
    }

    /// The answer's status and body.
    async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.door.at.to_string())
            .header(CONTENT_TYPE, "application/json");
        if let Some(bearer) = &self.door.bearer {
            request = request.header(AUTHORIZATION, bearer);
        }
        let request = request.body(Full::new(body))?;
        let asked = async {
            self.sender.ready().await?;
            let response = self.sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("reading the answer: {error}"))?;
            anyhow::Ok((status, body.to_bytes()))
        };
        match timeout(ANSWER, asked).await {
            Ok(answer) => answer,
            Err(_) => bail!("no answer from {path} within {} s", ANSWER.as_secs()),
        }
    }

    /// What is at `path`.
    pub(super) async fn get(&mut self, path: &str) -> anyhow::Result<Bytes> {
        let (status, body) = self.ask(Method::GET, path, Bytes::new()).await?;
        if status == StatusCode::OK { Ok(body) } else { Err(refused(path, status, &body)) }
    }

    /// Sends JSON; what comes back must be that something was created.
    pub(super) async fn create(&mut self, path: &str, json: &Bytes) -> anyhow::Result<Bytes> {
        let (status, body) = self.post(path, json).await?;
        if status == StatusCode::CREATED { Ok(body) } else { Err(refused(path, status, &body)) }
    }

    /// Sends JSON, and gives whatever comes back.
    pub(super) async fn post(
        &mut self,
        path: &str,
        json: &Bytes,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        self.ask(Method::POST, path, json.clone()).await
    }

    /// Gives a held lease back.
    pub(super) async fn release(&mut self, lease: &str) -> anyhow::Result<()> {
        let path = format!("/v1/leases/{lease}/release");
        let (status, body) = self.post(&path, &Bytes::new()).await?;
        if status == StatusCode::OK { Ok(()) } else { Err(refused(&path, status, &body)) }
    }
}

/// An answer that is not the one wanted.
pub(super) fn refused(path: &str, status: StatusCode, body: &[u8]) -> anyhow::Error {
    let text: String = String::from_utf8_lossy(body).chars().take(300).collect();
    anyhow::anyhow!("{path}: {status}: {text}")
}

/// A counter or gauge in Prometheus' text.
pub(super) fn metric(text: &[u8], name: &str) -> Option<f64> {
    let text = std::str::from_utf8(text).ok()?;
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let text = b"# TYPE a counter\na_total_more 3\na_total 17\nb 1.5\n";
        assert_eq!(metric(text, "a_total"), Some(17.0));
        assert_eq!(metric(text, "b"), Some(1.5));
        assert_eq!(metric(text, "a"), None);
        assert_eq!(metric(&[0xff], "a"), None);
    }
}
