//! Where an upstream is: `http://HOST:PORT`, with or without a path.

use std::fmt;
use std::str::FromStr;

use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::http::uri::PathAndQuery;
use thiserror::Error;

/// The longest address, in bytes.
const LONGEST: usize = 2_048;

/// Why an address is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// It is no address of a server.
    #[error("not of the form http://HOST:PORT or https://HOST:PORT, with a path or without")]
    Malformed,
    /// Names and passwords belong in a file.
    #[error("a key belongs in a file, not in the address")]
    Secret,
}

/// Where an upstream is.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    pub(super) secure: bool,
    /// Without brackets.
    pub(super) host: String,
    pub(super) port: u16,
    /// For the header of that name.
    pub(super) authority: HeaderValue,
    /// What stands before `/chat/completions`, usually `/v1`.
    base: String,
}

impl Address {
    /// The path of something below `/v1`, which is given with it: `/v1/models`.
    pub(super) fn api(&self, path: &str) -> Option<PathAndQuery> {
        let below = path.strip_prefix("/v1").unwrap_or(path);
        format!("{}{below}", self.base).parse().ok()
    }

    /// The path of something beside `/v1`: `/health`.
    pub(super) fn beside(&self, path: &str) -> Option<PathAndQuery> {
        let root = self.base.strip_suffix("/v1").unwrap_or(&self.base);
        format!("{root}{path}").parse().ok()
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        use AddressError::{Malformed, Secret};
        if text.len() > LONGEST {
            return Err(Malformed);
        }
        let uri: Uri = text.parse().map_err(|_| Malformed)?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(Malformed),
        };
        let authority = uri.authority().ok_or(Malformed)?;
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(Secret);
        }
        let host = authority.host();
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        if bare.is_empty() {
            return Err(Malformed);
        }
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let base = match uri.path().trim_end_matches('/') {
            "" => "/v1",
            path => path,
        };
        Ok(Self {
            secure,
            host: bare.to_owned(),
            port,
            authority: HeaderValue::from_str(authority.as_str()).map_err(|_| Malformed)?,
            base: base.to_owned(),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "https" } else { "http" };
        let authority = self.authority.to_str().unwrap_or(&self.host);
        write!(f, "{scheme}://{authority}{}", self.base)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read() {
        for (text, shown, models, health) in [
            ("http://h:1", "http://h:1/v1", "/v1/models", "/health"),
            ("https://h/v1/", "https://h/v1", "/v1/models", "/health"),
            ("http://[::1]:80/a/v1", "http://[::1]:80/a/v1", "/a/v1/models", "/a/health"),
            ("http://h/api", "http://h/api", "/api/models", "/api/health"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), shown);
            assert_eq!(address.api("/v1/models").unwrap(), models);
            assert_eq!(address.beside("/health").unwrap(), health);
        }
        assert_eq!("http://[::1]".parse::<Address>().unwrap().host, "::1");
        for text in ["", "h:1", "ftp://h", "http://", "http://a b", "//h", "unix:/x"] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Malformed), "{text}");
        }
        for text in ["http://a:b@h", "http://h/v1?key=x"] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Secret), "{text}");
        }
    }
}
