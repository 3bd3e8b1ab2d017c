//! Keys and socket addresses as this house has them, PeerIds and multiaddrs as libp2p has them;
//! and the book of which peer is where.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use super::PeerKey;

/// How the PeerId of an Ed25519 key begins: identity multihash (0x00) of 36 bytes, which are a
/// protobuf `PublicKey` with key type 1 (field 1) and 32 bytes of data (field 2).
/// <https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md>
const ED25519_PREFIX: [u8; 6] = [0x00, 36, 0x08, 0x01, 0x12, 32];

/// The raw Ed25519 public key inside a PeerId, or `None` if it is of another key type.
pub(super) fn key_of(peer: &PeerId) -> Option<PeerKey> {
    peer.to_bytes().strip_prefix(&ED25519_PREFIX)?.try_into().ok()
}

/// The PeerId of a raw Ed25519 public key.
pub(super) fn peer_of(key: &PeerKey) -> PeerId {
    let mut bytes = [0; ED25519_PREFIX.len() + 32];
    bytes[..ED25519_PREFIX.len()].copy_from_slice(&ED25519_PREFIX);
    bytes[ED25519_PREFIX.len()..].copy_from_slice(key);
    PeerId::from_bytes(&bytes).expect("an identity multihash of 36 bytes is a PeerId")
}

/// `/ip4/A/udp/P/quic-v1`, or the same with `/ip6/`.
pub(super) fn multiaddr_of(address: &SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Udp(address.port())).with(Protocol::QuicV1)
}

/// The UDP socket address that a multiaddr begins with.
pub(super) fn socket_of(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Udp(port) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// Which peer is where, as far as the loop has said or a dial has shown.
///
/// libp2p has such a book too, but keeps 100 peers and forgets an address whenever a dial to it
/// fails, which is just when a restarting node is asked again.
#[derive(Debug)]
pub(super) struct AddressBook {
    peers: HashMap<PeerId, Vec<SocketAddr>>,
    /// In the order in which they were first fed.
    order: VecDeque<PeerId>,
    most_peers: usize,
    most_addresses: usize,
}

impl AddressBook {
    pub(super) fn new(most_peers: usize, most_addresses: usize) -> Self {
        Self { peers: HashMap::new(), order: VecDeque::new(), most_peers, most_addresses }
    }

    /// Remembers addresses, the newest first.
    pub(super) fn add(&mut self, peer: PeerId, addresses: &[SocketAddr]) {
        if addresses.is_empty() || self.most_peers == 0 {
            return;
        }
        if !self.peers.contains_key(&peer) {
            while self.order.len() >= self.most_peers {
                if let Some(oldest) = self.order.pop_front() {
                    self.peers.remove(&oldest);
                }
            }
            self.order.push_back(peer);
        }
        let known = self.peers.entry(peer).or_default();
        for address in addresses.iter().take(self.most_addresses).rev() {
            known.retain(|other| other != address);
            known.insert(0, *address);
        }
        known.truncate(self.most_addresses);
    }

    pub(super) fn of(&self, peer: &PeerId) -> &[SocketAddr] {
        self.peers.get(peer).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    #[test]
    fn keys_go_to_peer_ids_and_back() {
        let pair = Keypair::ed25519_from_bytes([7; 32]).unwrap();
        let key = pair.public().try_into_ed25519().unwrap().to_bytes();
        let peer = pair.public().to_peer_id();
        assert_eq!(peer_of(&key), peer);
        assert_eq!(key_of(&peer), Some(key));
        assert_eq!(peer_of(&key).to_base58(), peer.to_base58());
    }

    #[test]
    fn other_key_types_have_no_key() {
        // A SHA-256 multihash, as RSA and ECDSA keys have.
        let mut hashed = vec![0x12, 32];
        hashed.extend([9; 32]);
        // A secp256k1 key: identity multihash of a protobuf with key type 2 and 33 bytes.
        let mut secp = vec![0x00, 37, 0x08, 0x02, 0x12, 33];
        secp.extend([2; 33]);
        for bytes in [hashed, secp] {
            assert_eq!(key_of(&PeerId::from_bytes(&bytes).unwrap()), None);
        }
        assert_eq!(key_of(&PeerId::random()), None);
    }

    #[test]
    fn addresses_go_to_multiaddrs_and_back() {
        for (text, multi) in [
            ("127.0.0.1:4001", "/ip4/127.0.0.1/udp/4001/quic-v1"),
            ("[::1]:9", "/ip6/::1/udp/9/quic-v1"),
        ] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(multiaddr_of(&address).to_string(), multi);
            assert_eq!(socket_of(&multiaddr_of(&address)), Some(address));
        }
        assert_eq!(socket_of(&"/ip4/127.0.0.1/tcp/1".parse().unwrap()), None);
        assert_eq!(socket_of(&"/dns/example/udp/1".parse().unwrap()), None);
        assert_eq!(socket_of(&Multiaddr::empty()), None);
    }

    #[test]
    fn the_book_is_bounded_and_newest_first() {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let peer = |n: u8| peer_of(&[n; 32]);
        let mut book = AddressBook::new(2, 3);
        book.add(peer(1), &[at(1), at(2)]);
        book.add(peer(1), &[at(3), at(2)]);
        assert_eq!(book.of(&peer(1)), [at(3), at(2), at(1)]);
        book.add(peer(1), &[at(4), at(5), at(6), at(7)]);
        assert_eq!(book.of(&peer(1)), [at(4), at(5), at(6)]);
        book.add(peer(2), &[at(1)]);
        book.add(peer(3), &[at(1)]);
        assert!(book.of(&peer(1)).is_empty(), "the peer fed first goes first");
        assert_eq!(book.of(&peer(3)), [at(1)]);
        book.add(peer(4), &[]);
        assert!(!book.of(&peer(2)).is_empty(), "nothing fed, nothing forgotten");
    }
}
