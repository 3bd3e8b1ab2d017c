//! Ed25519 keys as other tools write them: PKCS#8 in PEM (RFC 8410 §7), which is what
//! `openssl genpkey -algorithm ed25519` makes. Only this one form is read and written; its DER
//! is always the same 16 bytes and then the seed.

use zeroize::Zeroizing;

use crate::file::Secret;
use crate::pem::{self, PemError};

const LABEL: &str = "PRIVATE KEY";
/// SEQUENCE { INTEGER 0, SEQUENCE { OID 1.3.101.112 }, OCTET STRING { OCTET STRING (32 bytes) } }
const PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// Why a text is no key that can be imported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// It is no PEM.
    #[error("not a PKCS#8 file: {0}")]
    Pem(#[from] PemError),
    /// It is a key in another form.
    #[error("it holds a {label}: {advice}")]
    Label {
        /// What it holds.
        label: String,
        /// What to do.
        advice: &'static str,
    },
    /// It holds several blocks.
    #[error("it holds {0} blocks where one PRIVATE KEY is expected")]
    Blocks(usize),
    /// It is PKCS#8, but of another algorithm or with extra fields.
    #[error(
        "it is not a plain Ed25519 key of 48 bytes as RFC 8410 has it (another algorithm, or with \
         attributes or a public key inside): only what 'openssl genpkey -algorithm ed25519' makes \
         can be imported"
    )]
    NotEd25519,
}

/// Writes `secret` as PKCS#8 PEM, in clear.
#[must_use]
pub fn write(secret: &Secret) -> Zeroizing<String> {
    let mut der = Zeroizing::new([0; 48]);
    der[..16].copy_from_slice(&PREFIX);
    der[16..].copy_from_slice(secret.seed());
    pem::write(LABEL, &*der)
}

/// Reads PKCS#8 PEM of one Ed25519 key.
///
/// # Errors
/// When it is anything else.
pub fn read(text: &[u8]) -> Result<Secret, ImportError> {
    let blocks = pem::read(text)?;
    let [block] = blocks.as_slice() else { return Err(ImportError::Blocks(blocks.len())) };
    let advice = match block.label.as_str() {
        LABEL => None,
        "ENCRYPTED PRIVATE KEY" => Some("decrypt it first: openssl pkcs8 -in FILE -out CLEAR"),
        "OPENSSH PRIVATE KEY" => Some("OpenSSH's own format cannot be imported, only PKCS#8"),
        _ => Some("only a PKCS#8 PRIVATE KEY can be imported"),
    };
    if let Some(advice) = advice {
        return Err(ImportError::Label { label: crate::text::shown(&block.label), advice });
    }
    match block.bytes.split_first_chunk::<16>() {
        Some((prefix, seed)) if *prefix == PREFIX => {
            let seed: &[u8; 32] = seed.try_into().map_err(|_| ImportError::NotEd25519)?;
            Ok(Secret::from_seed(Zeroizing::new(*seed)))
        }
        _ => Err(ImportError::NotEd25519),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8410 §10.3, the first example key, and its public half from §10.1.
    const RFC: &str = "-----BEGIN PRIVATE KEY-----\n\
        MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
        -----END PRIVATE KEY-----\n";
    const RFC_PUBLIC: &str = "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1";

    #[test]
    fn the_example_of_rfc_8410_is_read_and_written() {
        let secret = read(RFC.as_bytes()).expect("a key");
        assert_eq!(leasehold_proto::Hash(secret.id().0).to_string(), RFC_PUBLIC);
        assert_eq!(&*write(&secret), RFC);
    }

    #[test]
    fn other_keys_are_refused_with_advice() {
        let refused = |text: &str| read(text.as_bytes()).expect_err("refused").to_string();
        for (label, advice) in [
            ("ENCRYPTED PRIVATE KEY", "decrypt it first"),
            ("OPENSSH PRIVATE KEY", "only PKCS#8"),
            ("RSA PRIVATE KEY", "only a PKCS#8"),
        ] {
            let error = refused(&pem::write(label, b"x"));
            assert!(error.contains(label) && error.contains(advice), "{error}");
        }
        // The second example of RFC 8410 §10.3: with attributes and a public key inside.
        let longer = "-----BEGIN PRIVATE KEY-----\n\
            MHICAQEwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
            oB8wHQYKKoZIhvcNAQkJFDEPDA1DdXJkbGUgQ2hhaXJzgSEAGb9ECWmEzf6FQbrB\n\
            Z9w7lshQhqowtrbLDFw4rXAxZuE=\n\
            -----END PRIVATE KEY-----\n";
        assert!(refused(longer).contains("RFC 8410"));
        for length in [0, 15, 16, 47, 49] {
            let mut der = [PREFIX.as_slice(), &[1; 40]].concat();
            der.truncate(length);
            assert!(refused(&pem::write(LABEL, &der)).contains("48 bytes"));
        }
    }
}
