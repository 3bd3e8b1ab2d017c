//! How words become bytes: bincode with fixed-width little-endian integers and a limit, always.
//!
//! The only file that names bincode. The crate is unmaintained (RUSTSEC-2025-0141), complete and
//! small; what makes it safe here: the configuration below never changes, every decode has a
//! limit that is checked before memory is taken, trailing bytes are an error, and golden bytes in
//! `tests/wire.rs` pin the layout, so another codec could replace it without a change on the wire.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Serialize, de::DeserializeOwned};

/// The longest encoding of one signed object, in bytes.
pub const MAX_OBJECT: usize = 64 * 1024;
/// The longest encoding of one message, in bytes.
pub const MAX_MESSAGE: usize = 256 * 1024;
/// The longest message from a peer that has not shown its certificate yet, in bytes.
pub const MAX_HELLO: usize = 16 * 1024;
/// The longest liveness packet, in bytes: it must fit one datagram on any path.
pub const MAX_PACKET: usize = 1_200;

/// Why bytes are not what they should be. Nothing was changed by the attempt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// More bytes than this type may have.
    #[error("{got} bytes where at most {limit} are allowed")]
    TooLong {
        /// How many bytes there were.
        got: usize,
        /// How many there may be.
        limit: usize,
    },
    /// The bytes do not decode.
    #[error("the bytes are malformed or cut short: {0}")]
    Malformed(String),
    /// The bytes go on after the value.
    #[error("{0} bytes follow where the value should end")]
    Trailing(usize),
    /// The value decodes but breaks a rule of its type.
    #[error("{0}")]
    Invalid(&'static str),
}

/// A value that could not be encoded within its bound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the value does not fit {limit} bytes on the wire: {why}")]
pub struct EncodeError {
    /// The bound, in bytes.
    pub limit: usize,
    /// What the encoder said.
    pub why: String,
}

const fn config<const LIMIT: usize>() -> Configuration<LittleEndian, Fixint, Limit<LIMIT>> {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<LIMIT>()
}

/// Encodes `value`.
///
/// # Errors
/// When the encoding would be longer than `LIMIT`.
pub fn encode<const LIMIT: usize>(value: &impl Serialize) -> Result<Vec<u8>, EncodeError> {
    let bytes = bincode::serde::encode_to_vec(value, config::<LIMIT>())
        .map_err(|error| EncodeError { limit: LIMIT, why: error.to_string() })?;
    if bytes.len() > LIMIT {
        return Err(EncodeError { limit: LIMIT, why: format!("it takes {}", bytes.len()) });
    }
    Ok(bytes)
}

/// Decodes exactly one value from `bytes`.
///
/// # Errors
/// When there are too many bytes, too few, or any left over.
pub fn decode<const LIMIT: usize, T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > LIMIT {
        return Err(DecodeError::TooLong { got: bytes.len(), limit: LIMIT });
    }
    let (value, used) = bincode::serde::decode_from_slice(bytes, config::<LIMIT>())
        .map_err(|error| DecodeError::Malformed(error.to_string()))?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(DecodeError::Trailing(left)),
    }
}

/// Decodes one value from the start of `bytes` and says how many bytes it took.
///
/// # Errors
/// When the bytes do not begin with a value.
pub fn decode_prefix<const LIMIT: usize, T: DeserializeOwned>(
    bytes: &[u8],
) -> Result<(T, usize), DecodeError> {
    bincode::serde::decode_from_slice(bytes, config::<LIMIT>())
        .map_err(|error| DecodeError::Malformed(error.to_string()))
}

/// Byte strings: one run of bytes on the wire, hex in JSON. For `#[serde(with = "octets")]`.
pub mod octets {
    use std::fmt;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    /// Writes `bytes`.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            let mut text = String::with_capacity(bytes.len() * 2);
            for byte in bytes {
                text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or_default());
                text.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or_default());
            }
            serializer.serialize_str(&text)
        } else {
            serializer.serialize_bytes(bytes)
        }
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// When the text is not hex, or those of the deserializer.
    pub fn deserialize<'de, T: From<Vec<u8>>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        read(deserializer).map(T::from)
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        if !deserializer.is_human_readable() {
            return deserializer.deserialize_byte_buf(Bytes);
        }
        let text = String::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|n| u8::try_from(n).ok());
        let pairs = text.as_bytes().chunks(2);
        pairs
            .map(|pair| match pair {
                [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
                _ => None,
            })
            .collect::<Option<_>>()
            .ok_or_else(|| de::Error::custom("expected an even number of hex digits"))
    }

    struct Bytes;

    impl de::Visitor<'_> for Bytes {
        type Value = Vec<u8>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes")
        }
        fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }
        fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }
    }
}
