//! Who is at the other end: TLS 1.3 with libp2p certificates, so that a data connection proves
//! the same identity as a libp2p link.
//!
//! Both sides present one self-signed certificate that carries the node's Ed25519 key and that
//! key's signature (<https://github.com/libp2p/specs/blob/master/tls/tls.md>). The certificates
//! are libp2p-tls's; the configuration is ours, because libp2p-tls's own honours `SSLKEYLOGFILE`,
//! keeps resumption on, and prefers ChaCha20 where packets are sealed faster with AES-128-GCM.
//!
//! Resumption, tickets and early data are off: every connection is a full handshake with both
//! keys proven, and nothing that is sent can be replayed.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use libp2p::identity::{Keypair, PublicKey};
use libp2p_tls::certificate;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, NoKeyLog,
    ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
};
use thiserror::Error;

use super::frame::ALPN;

/// A node's key and the certificate that proves it, made anew at every start.
#[derive(Clone)]
pub(super) struct Identity {
    certified: Arc<SingleCertAndKey>,
    pub(super) public: [u8; 32],
}

/// The identity cannot be made into a certificate or a TLS configuration.
#[derive(Debug, Error)]
#[error("cannot set up TLS with the node's key: {0}")]
pub struct IdentityError(String);

impl IdentityError {
    fn of(cause: impl fmt::Display) -> Self {
        Self(cause.to_string())
    }
}

impl Identity {
    /// The identity of the Ed25519 secret key `seed`.
    pub(super) fn new(mut seed: [u8; 32]) -> Result<Self, IdentityError> {
        // Takes the seed out of this copy, too.
        let keypair = Keypair::ed25519_from_bytes(&mut seed).map_err(IdentityError::of)?;
        let public = keypair.public().try_into_ed25519().map_err(IdentityError::of)?.to_bytes();
        let (certificate, key) = certificate::generate(&keypair).map_err(IdentityError::of)?;
        let key = ring::sign::any_ecdsa_type(&key).map_err(IdentityError::of)?;
        let certified = CertifiedKey::new(vec![certificate], key);
        Ok(Self { certified: Arc::new(SingleCertAndKey::from(certified)), public })
    }

    /// For the side that answers: any Ed25519 key may come this far; who is admitted is asked
    /// after the handshake, when the key is proven.
    pub(super) fn server(&self) -> Result<QuicServerConfig, IdentityError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(IdentityError::of)?
            .with_client_cert_verifier(Arc::new(Verifier { expected: None, met: Met::default() }))
            .with_cert_resolver(self.certified.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.key_log = Arc::new(NoKeyLog);
        config.ignore_client_order = true;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        QuicServerConfig::try_from(config).map_err(IdentityError::of)
    }

    /// For a dial to the holder of `expected`, and of no other key. `met` gets the key that was
    /// met there.
    pub(super) fn client(
        &self,
        expected: [u8; 32],
        met: Met,
    ) -> Result<QuicClientConfig, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(IdentityError::of)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier { expected: Some(expected), met }))
            .with_client_cert_resolver(self.certified.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.key_log = Arc::new(NoKeyLog);
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        config.enable_sni = false;
        QuicClientConfig::try_from(config).map_err(IdentityError::of)
    }
}

/// The key that a dial met, for the message when it is not the expected one.
pub(super) type Met = Arc<OnceLock<[u8; 32]>>;

/// The Ed25519 key that the other end of a finished handshake has proven.
pub(super) fn peer_key(connection: &quinn::Connection) -> Option<[u8; 32]> {
    let identity = connection.peer_identity()?;
    let certificates = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let [certificate] = certificates.as_slice() else { return None };
    key_in(certificate).ok()
}

/// AES-128-GCM first: it is the fastest on hosts with AES instructions, and data-center hosts
/// have them.
fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    })
}

/// Parses and verifies a libp2p certificate and returns its node's key.
fn key_in(certificate: &CertificateDer<'_>) -> Result<[u8; 32], rustls::Error> {
    let bad = || rustls::Error::InvalidCertificate(CertificateError::BadEncoding);
    let peer_id = certificate::parse(certificate).map_err(|_| bad())?.peer_id();
    // An Ed25519 key is short enough for the id to hold the key itself (identity multihash).
    let multihash: &libp2p::multihash::Multihash<64> = peer_id.as_ref();
    let key = PublicKey::try_decode_protobuf(multihash.digest()).map_err(|_| bad())?;
    let key = key.try_into_ed25519().map_err(|_| {
        rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
    })?;
    Ok(key.to_bytes())
}

/// libp2p's rules for certificates: exactly one, self-signed, with the key extension; and where a
/// key is expected, that key.
#[derive(Debug)]
struct Verifier {
    expected: Option<[u8; 32]>,
    met: Met,
}

impl Verifier {
    fn verify(
        &self,
        certificate: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        if !more.is_empty() {
            return Err(rustls::Error::General("exactly one certificate is allowed".into()));
        }
        let key = key_in(certificate)?;
        let _ = self.met.set(key);
        match self.expected {
            Some(expected) if expected != key => Err(rustls::Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
            _ => Ok(()),
        }
    }

    fn verify_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let bad = || rustls::Error::InvalidCertificate(CertificateError::BadSignature);
        certificate::parse(certificate)
            .map_err(|_| bad())?
            .verify_signature(signed.scheme, message, signed.signature())
            .map_err(|_| bad())?;
        Ok(HandshakeSignatureValid::assertion())
    }

    /// What libp2p-tls's certificates are signed with: ECDSA over P-256, and what other libp2p
    /// implementations use.
    fn schemes() -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ]
    }

    fn too_old<T>() -> Result<T, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".into()))
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(certificate, more).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::too_old()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(certificate, more).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::too_old()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_yields_the_key_it_was_made_from() {
        let identity = Identity::new([7; 32]).expect("an identity");
        let keypair = Keypair::ed25519_from_bytes([7; 32]).expect("a key");
        let (certificate, _) = certificate::generate(&keypair).expect("a certificate");
        assert_eq!(key_in(&certificate).expect("its key"), identity.public);
    }

    #[test]
    fn what_is_no_sound_certificate_is_refused() {
        let keypair = Keypair::ed25519_from_bytes([7; 32]).expect("a key");
        let (certificate, _) = certificate::generate(&keypair).expect("a certificate");
        for end in 0..certificate.len() {
            let cut = CertificateDer::from(certificate[..end].to_vec());
            assert!(key_in(&cut).is_err(), "cut at {end}");
        }
        for at in 0..certificate.len() {
            let mut bytes = certificate.to_vec();
            bytes[at] ^= 0x20;
            // A flipped bit may at most leave the certificate with the same key, never another.
            if let Ok(key) = key_in(&CertificateDer::from(bytes)) {
                assert_eq!(key, Identity::new([7; 32]).expect("an identity").public);
            }
        }
    }

    #[test]
    fn only_the_expected_key_passes() {
        let keypair = Keypair::ed25519_from_bytes([7; 32]).expect("a key");
        let (certificate, _) = certificate::generate(&keypair).expect("a certificate");
        let public = Identity::new([7; 32]).expect("an identity").public;
        let verifier = |expected| Verifier { expected, met: Met::default() };
        assert!(verifier(None).verify(&certificate, &[]).is_ok());
        assert!(verifier(Some(public)).verify(&certificate, &[]).is_ok());
        let other = verifier(Some([0; 32]));
        assert!(other.verify(&certificate, &[]).is_err());
        assert_eq!(other.met.get(), Some(&public));
        assert!(verifier(None).verify(&certificate, std::slice::from_ref(&certificate)).is_err());
    }
}
