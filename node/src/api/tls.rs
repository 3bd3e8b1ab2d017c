//! HTTPS for the models' API: the certificate that is given, or one that is made for the node once and
//! kept, and what a client is told that comes without.
//!
//! A certificate of the node's own making vouches for nobody: clients have to be told to trust it
//! (`models.crt` in the node's directory). It is valid for ten years, for the node's name, localhost,
//! and the address that is listened on.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use leasehold_keys::disk::{self, Existing};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::openai::Fault;

/// The certificate of the node's own making, in its directory.
pub const CERTIFICATE: &str = "models.crt";
/// Its key.
pub const KEY: &str = "models.key";
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long one of the node's own making is valid, in days.
const DAYS: i64 = 3_650;

/// Why there is no HTTPS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{}: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Certificate and key do not go together, or are of no use.
    #[error("the certificate cannot be used: {0}")]
    Unusable(String),
    /// One of the two is missing.
    #[error("tls.certificate and tls.key are given together or not at all")]
    Half,
}

fn file(path: &Path, why: impl ToString) -> TlsError {
    TlsError::File { path: path.to_owned(), why: why.to_string() }
}

/// What takes TLS connections, by the files that are given, or those in `dir`, made if need be for
/// `name` and `address`.
///
/// # Errors
/// When they cannot be read, written or used.
pub fn acceptor(
    given: (&Path, &Path),
    dir: &Path,
    (name, address): (&str, SocketAddr),
) -> Result<TlsAcceptor, TlsError> {
    let none = |path: &Path| path.as_os_str().is_empty();
    let (certificate, key) = match given {
        (certificate, key) if none(certificate) && none(key) => own(dir, name, address)?,
        (certificate, key) if none(certificate) || none(key) => return Err(TlsError::Half),
        (certificate, key) => (certificate.to_owned(), key.to_owned()),
    };
    let chain = CertificateDer::pem_file_iter(&certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|why| file(&certificate, why))?;
    let secret = PrivateKeyDer::from_pem_file(&key).map_err(|why| file(&key, why))?;
    let unusable = |why: rustls::Error| TlsError::Unusable(why.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The node's own certificate and key, made where there are none.
fn own(dir: &Path, name: &str, address: SocketAddr) -> Result<(PathBuf, PathBuf), TlsError> {
    let paths = (dir.join(CERTIFICATE), dir.join(KEY));
    if paths.0.exists() && paths.1.exists() {
        return Ok(paths);
    }
    let unusable = |why: rcgen::Error| TlsError::Unusable(why.to_string());
    let mut names = vec!["localhost".to_owned(), address.ip().to_string()];
    // A name that is none of the DNS's is left out.
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if !name.is_empty() && name.chars().all(is_name) {
        names.push(name.to_owned());
    }
    let mut params = rcgen::CertificateParams::new(names).map_err(unusable)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("leasehold {name}"));
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::days(1);
    params.not_after = now + time::Duration::days(DAYS);
    let key = rcgen::KeyPair::generate().map_err(unusable)?;
    let certificate = params.self_signed(&key).map_err(unusable)?;
    let write = |path: &Path, text: String, mode: u32| {
        disk::write_atomic(path, text.as_bytes(), mode, Existing::Replace)
            .map_err(|why| file(path, why))
    };
    // The key first: a certificate without it would be taken for whole.
    write(&paths.1, key.serialize_pem(), 0o600)?;
    write(&paths.0, certificate.pem(), 0o644)?;
    Ok(paths)
}

/// Takes a connection. One that speaks plain HTTP is told that it must not: its key was on the wire for
/// all to read.
///
/// # Errors
/// When the handshake fails or takes too long.
pub async fn accept(
    acceptor: &TlsAcceptor,
    mut stream: TcpStream,
) -> io::Result<TlsStream<TcpStream>> {
    let mut first = [0];
    timeout(HANDSHAKE, stream.peek(&mut first)).await??;
    // A handshake begins with a record of kind 22.
    if first[0] != 22 {
        let why = "This address takes HTTPS only: a key that was sent to it without is known to \
                   others now, so remove it.";
        let body = Fault::forbidden(why).body();
        let head = format!(
            "HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n",
            body.len()
        );
        timeout(HANDSHAKE, stream.write_all(&[head.as_bytes(), &body].concat())).await??;
        timeout(HANDSHAKE, stream.shutdown()).await??;
        return Err(io::Error::other("plain HTTP"));
    }
    timeout(HANDSHAKE, acceptor.accept(stream)).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_made_once_and_taken_again() {
        let room = tempfile::tempdir().expect("room");
        let address = "127.0.0.1:8443".parse().expect("an address");
        let none = (Path::new(""), Path::new(""));
        assert!(acceptor(none, room.path(), ("node-1", address)).is_ok());
        let made = std::fs::read(room.path().join(CERTIFICATE)).expect("reads");
        assert!(acceptor(none, room.path(), ("node-1", address)).is_ok());
        assert_eq!(std::fs::read(room.path().join(CERTIFICATE)).expect("reads"), made);
        let (certificate, key) = (room.path().join(CERTIFICATE), room.path().join(KEY));
        assert!(acceptor((&certificate, &key), Path::new("/nowhere"), ("", address)).is_ok());
        let half = acceptor((&certificate, Path::new("")), room.path(), ("", address));
        assert!(matches!(half, Err(TlsError::Half)));
        let wrong = acceptor((&certificate, &certificate), room.path(), ("", address));
        assert!(matches!(wrong, Err(TlsError::File { .. })));
    }
}
