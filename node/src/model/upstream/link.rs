//! Connections to an upstream: made when needed, kept for the next request, closed when a request
//! is given up.
//!
//! HTTP/1.1 has no way to take back a request but to close its connection, which every server
//! notices at once. So a [`Link`] that is dropped closes, and only one whose answer was read to the
//! end goes back among the idle ones.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use super::address::Address;

/// How many connections are kept idle.
const IDLE: usize = 64;
/// How long a connection is kept idle.
const IDLE_FOR: Duration = Duration::from_secs(90);

/// A request did not get an answer.
#[derive(Debug, Error)]
pub(super) enum LinkError {
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    #[error("the connection broke: {0}")]
    Broken(#[source] hyper::Error),
}

/// The connections to one upstream.
#[derive(Debug)]
pub(super) struct Links {
    address: Address,
    tls: Option<Secure>,
    connect: Duration,
    idle: Mutex<Vec<(Link, Instant)>>,
    pub(super) made: AtomicU64,
    pub(super) reused: AtomicU64,
}

/// How to speak TLS to the upstream.
struct Secure {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl std::fmt::Debug for Secure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Secure").field(&self.name).finish()
    }
}

/// One connection. Dropped, it closes.
#[derive(Debug)]
pub(super) struct Link {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        // The socket is the driver's.
        self.driver.abort();
    }
}

/// TLS cannot be set up.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The address has no host that a certificate could be for.
    #[error("'{0}' is no name that a certificate can be for")]
    Name(String),
    /// The host trusts no authority.
    #[error("no certificates of authorities are found on this host")]
    NoRoots,
    /// A given certificate is malformed, or TLS itself is not to be had.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

impl Secure {
    fn new(host: &str, extra: Vec<CertificateDer<'static>>) -> Result<Self, TlsError> {
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|_| TlsError::Name(host.to_owned()))?;
        let mut roots = RootCertStore::empty();
        for certificate in extra {
            roots.add(certificate)?;
        }
        // Some of the host's are often malformed; those are left out.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(TlsError::NoRoots);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), name })
    }
}

impl Links {
    pub(super) fn new(
        address: Address,
        connect: Duration,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, TlsError> {
        let tls = address.secure.then(|| Secure::new(&address.host, roots)).transpose()?;
        Ok(Self {
            address,
            tls,
            connect,
            idle: Mutex::default(),
            made: AtomicU64::new(0),
            reused: AtomicU64::new(0),
        })
    }

    pub(super) const fn address(&self) -> &Address {
        &self.address
    }

    /// Sends a request and waits for the head of its answer. The body comes over the link, which
    /// has to be kept for as long.
    ///
    /// A server may close an idle connection at the very moment at which it is used again. Then
    /// the request is sent once more over a new one: it changes nothing there to be asked twice.
    pub(super) async fn send(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Link), LinkError> {
        let again = request.clone();
        let Some(mut link) = self.idle() else { return self.send_new(request).await };
        match link.sender.send_request(request).await {
            Ok(response) => {
                self.reused.fetch_add(1, Ordering::Relaxed);
                Ok((response, link))
            }
            Err(error) if was_closed(&error) => self.send_new(again).await,
            Err(error) => Err(LinkError::Broken(error)),
        }
    }

    async fn send_new(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Link), LinkError> {
        let mut link = self.connect().await?;
        let response = link.sender.send_request(request).await.map_err(LinkError::Broken)?;
        Ok((response, link))
    }

    /// Keeps a link whose answer was read to the end.
    pub(super) async fn keep(&self, mut link: Link) {
        // A moment passes until the connection has noticed itself.
        if link.sender.ready().await.is_err() {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE {
            idle.push((link, Instant::now()));
        }
    }

    /// How many links wait for a request.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The link that was used last, so that those not needed grow old.
    fn idle(&self) -> Option<Link> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(link, since)| !link.sender.is_closed() && since.elapsed() < IDLE_FOR);
        idle.pop().map(|(link, _)| link)
    }

    async fn connect(&self) -> Result<Link, LinkError> {
        let late = || LinkError::Connect(io::ErrorKind::TimedOut.into());
        let link = timeout(self.connect, self.connect_now()).await.map_err(|_| late())??;
        self.made.fetch_add(1, Ordering::Relaxed);
        Ok(link)
    }

    async fn connect_now(&self) -> Result<Link, LinkError> {
        let to = (self.address.host.as_str(), self.address.port);
        let stream = TcpStream::connect(to).await.map_err(LinkError::Connect)?;
        // Requests are small and nothing follows them that could be sent along.
        stream.set_nodelay(true).map_err(LinkError::Connect)?;
        match &self.tls {
            None => shake(stream).await,
            Some(Secure { connector, name }) => {
                let stream = connector.connect(name.clone(), stream).await;
                shake(stream.map_err(LinkError::Connect)?).await
            }
        }
    }
}

/// Whether the connection was closed before anything of an answer came.
fn was_closed(error: &hyper::Error) -> bool {
    let reset = || std::error::Error::source(error).is_some_and(|source| source.is::<io::Error>());
    error.is_canceled() || error.is_closed() || error.is_incomplete_message() || reset()
}

async fn shake<S>(stream: S) -> Result<Link, LinkError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shaken = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = shaken.map_err(LinkError::Broken)?;
    let driver = tokio::spawn(async move {
        // How it ends is told to whoever waits for an answer.
        let _ = connection.await;
    });
    Ok(Link { sender, driver })
}
