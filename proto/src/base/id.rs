//! Names: keys, hashes and the ids made of them.
//!
//! A key's text form is libp2p's PeerId of that Ed25519 key (`12D3Koo…`), whether it is a node's
//! or a person's; a hash's text form is lower-case hex. On the wire both are 32 raw bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The multihash header of an inlined Ed25519 public key, after which its 32 bytes follow:
/// identity hash, 36 bytes, protobuf field 1 = Ed25519, field 2 = 32 bytes (libp2p peer-ids spec).
const PEER_ID_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// An Ed25519 public key: it names a node, an organisation or a lessee.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 32]);

/// A BLAKE3 hash: it names a signed object, a fabric or a payload.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

/// A fabric's id: the hash of its first charter's envelope.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct FabricId(pub Hash);

/// A lease's id: the hash of its grant's envelope.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct LeaseId(pub Hash);

/// Chosen by a lessee: at one lessor, one (lessee, request id) makes at most one lease.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub [u8; 16]);

/// Chosen by a lessee for one act under a lease (claim, release, …): a repeat of the same act is
/// answered with the same bytes.
pub type ActId = RequestId;

/// A payload: its BLAKE3 root and its size, which always come together and never from the sender.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Payload {
    /// The BLAKE3 hash of the bytes.
    pub root: Hash,
    /// How many bytes, exactly.
    pub size: u64,
}

/// Why a text is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text is not a PeerId of an Ed25519 key.
    #[error("'{0}' is no key: expected a PeerId that starts with 12D3Koo")]
    Key(String),
    /// The text is not hex of the expected length.
    #[error("'{text}' is no id: expected {digits} hex digits")]
    Hex {
        /// What was given.
        text: String,
        /// How many digits were expected.
        digits: usize,
    },
}

/// A text cut to a length that fits an error message.
fn clipped(text: &str) -> String {
    let mut cut: String = text.chars().take(80).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    cut
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [0u8; 38];
        bytes[..6].copy_from_slice(&PEER_ID_PREFIX);
        bytes[6..].copy_from_slice(&self.0);
        f.write_str(&bs58::encode(bytes).into_string())
    }
}

impl KeyId {
    /// The last eight characters of the text form: enough for a person to tell keys apart.
    #[must_use]
    pub fn short(&self) -> String {
        let text = self.to_string();
        text[text.len() - 8..].to_string()
    }
}

impl FromStr for KeyId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let mut bytes = [0u8; 38];
        match bs58::decode(text).onto(&mut bytes) {
            Ok(38) if bytes[..6] == PEER_ID_PREFIX => {
                let mut key = [0; 32];
                key.copy_from_slice(&bytes[6..]);
                Ok(Self(key))
            }
            _ => Err(ParseIdError::Key(clipped(text))),
        }
    }
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseIdError> {
    let wrong = || ParseIdError::Hex { text: clipped(text), digits: N * 2 };
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return Err(wrong());
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let value = |digit: u8| char::from(digit).to_digit(16);
        let (Some(high), Some(low)) = (value(pair[0]), value(pair[1])) else {
            return Err(wrong());
        };
        *byte = u8::try_from(high * 16 + low).unwrap_or_default();
    }
    Ok(out)
}

impl Hash {
    /// The BLAKE3 hash of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The first twelve hex digits: enough for a person to tell objects apart.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..12].to_string()
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl FromStr for Hash {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        parse_hex(text).map(Self)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl FromStr for RequestId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        parse_hex(text).map(Self)
    }
}

impl RequestId {
    /// An id derived from what it is for, so that a repeat after a crash has the same one.
    #[must_use]
    pub fn derive(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("leasehold request id v1");
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(id)
    }
}

macro_rules! text_outside_bytes_inside {
    ($name:ident) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
                } else {
                    Deserialize::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}
text_outside_bytes_inside!(KeyId);
text_outside_bytes_inside!(Hash);
text_outside_bytes_inside!(RequestId);

macro_rules! shown_as_its_hash {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                text.parse().map(Self)
            }
        }
    };
}
shown_as_its_hash!(FabricId);
shown_as_its_hash!(LeaseId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_as_libp2p_shows_it() {
        // From libp2p's peer-ids spec: an Ed25519 PeerId starts with 12D3Koo.
        let key = KeyId([7; 32]);
        let text = key.to_string();
        assert!(text.starts_with("12D3Koo"), "{text}");
        assert_eq!(text.parse::<KeyId>(), Ok(key));
    }

    #[test]
    fn wrong_names_say_what_is_wrong() {
        for text in ["", "12D3Koo", "Qm", &"1".repeat(4000), "é"] {
            let error = text.parse::<KeyId>().expect_err("no key");
            assert!(error.to_string().contains("12D3Koo"));
            assert!(error.to_string().len() < 400);
        }
        assert!("xy".repeat(32).parse::<Hash>().is_err());
        assert!("ab".repeat(31).parse::<Hash>().is_err());
        assert_eq!("ab".repeat(32).parse::<Hash>().map(|h| h.0), Ok([0xab; 32]));
    }
}
