//! How a command finds its node, the token for it, and a lease by the first digits of its id.
//!
//! The token comes from the first of these that there is: `--token-file`, `LEASEHOLD_TOKEN`, the
//! directory that was said with `--dir` or `LEASEHOLD_DIR`, what a running node of this user
//! published for the address, the default directory.

use std::net::{IpAddr, SocketAddr};

use hyper::http::uri::Authority;
use leasehold_keys::exit::Exit;
use leasehold_proto::LeaseId;

use super::{Failure, Global, Session};
use crate::api::body::{LeaseLine, Leases, Payloads};
use crate::api::token::{self, Token};
use crate::client::{self, Client};
use crate::payload::Root;

/// The fewest digits by which a lease is looked up.
const MIN_DIGITS: usize = 4;

/// The client for the node that is meant.
pub(super) fn client(global: &Global) -> Result<Client, Failure> {
    let authority = client::parse_url(&global.api)?;
    let token = token_for(global, &authority)?;
    Ok(Client::new(authority, token))
}

fn token_for(global: &Global, authority: &Authority) -> Result<Option<Token>, Failure> {
    if let Some(path) = &global.token_file {
        return Ok(Some(Token::read(path)?));
    }
    if let Some(text) = std::env::var_os("LEASEHOLD_TOKEN") {
        return Ok(Some(Token::parse(&text.to_string_lossy(), "LEASEHOLD_TOKEN")?));
    }
    if let Some(dir) = &global.dir {
        let path = dir.join(token::FILE);
        if path.symlink_metadata().is_ok() {
            return Ok(Some(Token::read(&path)?));
        }
    }
    for addr in addresses(authority) {
        let published = token::published_at(addr).filter(|path| path.symlink_metadata().is_ok());
        if let Some(path) = published {
            return Ok(Some(Token::read(&path)?));
        }
    }
    let path = global.directory().map(|dir| dir.join(token::FILE));
    match path.filter(|path| path.symlink_metadata().is_ok()) {
        Some(path) => Ok(Some(Token::read(&path)?)),
        // The node will say that it wants one, or that it is not there.
        None => Ok(None),
    }
}

/// The addresses that an API's authority may mean, without asking any name server.
fn addresses(authority: &Authority) -> Vec<SocketAddr> {
    let port = authority.port_u16().unwrap_or(80);
    let host = authority.host();
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let ips: Vec<IpAddr> = match bare.parse() {
        Ok(ip) => vec![ip],
        Err(_) if host.eq_ignore_ascii_case("localhost") => {
            vec![[127, 0, 0, 1].into(), [0u16, 0, 0, 0, 0, 0, 0, 1].into()]
        }
        Err(_) => Vec::new(),
    };
    ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
}

/// The lease that `text` names: a whole id, or its first digits where they fit one lease that the
/// node holds or granted.
pub(super) async fn lease(session: &Session, text: &str) -> Result<String, Failure> {
    if let Ok(id) = text.parse::<LeaseId>() {
        return Ok(id.to_string());
    }
    let digits = text.len() >= MIN_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !digits || text.len() > 64 {
        let message = "a lease is named by its id, or by four or more of its first digits";
        return Err(Failure::say(Exit::Usage, message));
    }
    let all: Leases = session.client.get("/v1/leases?all=true").await?;
    one_of(&all.leases, &text.to_ascii_lowercase())
}

fn one_of(leases: &[LeaseLine], digits: &str) -> Result<String, Failure> {
    let ids = leases.iter().filter_map(|line| line.lease.as_deref());
    let none = || format!("no lease {digits}… is held or granted by this node");
    only(ids, digits, "leases", none).map(str::to_string)
}

/// The payload that `text` names, and its size where the node holds it: a whole root, or its first
/// digits where they fit one payload that the node holds.
pub(super) async fn payload(session: &Session, text: &str) -> Result<(String, u64), Failure> {
    payload_in(&held(session).await?, text)
}

/// What the node holds.
pub(super) async fn held(session: &Session) -> Result<Payloads, Failure> {
    Ok(session.client.get("/v1/payloads").await?)
}

/// The same among what the node was found to hold.
pub(super) fn payload_in(held: &Payloads, text: &str) -> Result<(String, u64), Failure> {
    let size_of = |root: &str| held.payloads.iter().find(|line| line.root == root).map(|l| l.size);
    if let Ok(root) = text.parse::<Root>() {
        let root = root.to_string();
        let size = size_of(&root).unwrap_or(0);
        return Ok((root, size));
    }
    let digits = text.len() >= MIN_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !digits || text.len() > 64 {
        let message = "a payload is named by its root, or by four or more of its first digits";
        return Err(Failure::say(Exit::Usage, message));
    }
    let digits = text.to_ascii_lowercase();
    let roots = held.payloads.iter().map(|line| line.root.as_str());
    let none = || format!("no payload {digits}… is held by this node");
    let root = only(roots, &digits, "payloads", none)?;
    Ok((root.to_string(), size_of(root).unwrap_or(0)))
}

/// The one of `ids` that begins with `digits`.
fn only<'a>(
    ids: impl Iterator<Item = &'a str>,
    digits: &str,
    what: &str,
    none: impl Fn() -> String,
) -> Result<&'a str, Failure> {
    let mut fitting: Vec<_> = ids.filter(|id| id.starts_with(digits)).collect();
    // A node may hold a lease that it granted itself.
    fitting.sort_unstable();
    fitting.dedup();
    match fitting.as_slice() {
        [one] => Ok(one),
        [] => Err(Failure::say(Exit::No, none())),
        several => {
            let message = format!("{} {what} start with {digits}: say more digits", several.len());
            Err(Failure::say(Exit::Usage, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_means_these_addresses() {
        let of = |text: &str| addresses(&text.parse().expect("an authority"));
        assert_eq!(of("127.0.0.1:7700"), ["127.0.0.1:7700".parse().expect("an address")]);
        assert_eq!(of("[::1]:7700"), ["[::1]:7700".parse().expect("an address")]);
        assert_eq!(of("localhost:7700").len(), 2);
        assert!(of("example:7700").is_empty());
    }
}
