//! Checking signatures beside the loop: a few workers, a peer always at the same one.
//!
//! Verifying an order takes three signature checks; done in the loop they would bound it. A
//! peer's frames stay in order because one worker has them all. Certificates and mandates come
//! with every order, so what was checked is remembered by the hash of its exact bytes.

use leasehold_proto::core::{Ticket, Token};
use leasehold_proto::words::message::{self, Said};
use leasehold_proto::words::sign::{Papers, Signature, verify_packet};
use leasehold_proto::{FabricId, KeyId};
use tokio::sync::mpsc;

/// How many workers there are: enough to use a second core, few enough to leave it to others.
const WORKERS: usize = 2;
/// Frames that may wait at one worker; beyond, the loop waits, and with it the links.
const QUEUE: usize = 256;
/// Packets that may wait at one worker; beyond, they are dropped, as packets may be.
const PACKETS: usize = 256;

/// What was checked.
#[derive(Debug)]
pub(crate) enum Checked {
    /// A question whose every signature holds.
    Asked { from: KeyId, ticket: Ticket, said: Box<Said> },
    /// An answer whose every signature holds.
    Answered { from: KeyId, token: Token, said: Box<Said> },
    /// A question that is malformed or does not verify.
    BadQuestion { from: KeyId, ticket: Ticket, why: String },
    /// An answer that is malformed or does not verify.
    BadAnswer { token: Token, why: String },
    /// A liveness packet whose signature holds.
    Packet { from: KeyId, bytes: Vec<u8> },
    /// A packet that is malformed or does not verify.
    BadPacket,
}

enum Unchecked {
    Asked { from: KeyId, ticket: Ticket, frame: Vec<u8> },
    Answered { from: KeyId, token: Token, frame: Vec<u8> },
}

/// The workers.
#[derive(Debug)]
pub(crate) struct Verifiers {
    frames: Vec<mpsc::Sender<Unchecked>>,
    packets: mpsc::Sender<Vec<u8>>,
}

impl Verifiers {
    /// Starts the workers; what they checked goes to `checked`.
    pub(crate) fn start(fabric: FabricId, checked: &mpsc::Sender<Checked>) -> Self {
        let frames = (0..WORKERS)
            .map(|_| {
                let (sender, mut receiver) = mpsc::channel(QUEUE);
                let checked = checked.clone();
                tokio::spawn(async move {
                    let mut papers = Papers::default();
                    while let Some(frame) = receiver.recv().await {
                        if checked.send(check(&fabric, frame, &mut papers)).await.is_err() {
                            return;
                        }
                        // A long run of checks must not keep this thread from its other tasks.
                        tokio::task::consume_budget().await;
                    }
                });
                sender
            })
            .collect();
        let (packets, mut receiver) = mpsc::channel::<Vec<u8>>(PACKETS);
        let checked = checked.clone();
        tokio::spawn(async move {
            while let Some(packet) = receiver.recv().await {
                if checked.send(check_packet(&fabric, &packet)).await.is_err() {
                    return;
                }
                tokio::task::consume_budget().await;
            }
        });
        Self { frames, packets }
    }

    async fn give(&self, from: &KeyId, unchecked: Unchecked) {
        let worker = usize::from(from.0[31]) % self.frames.len().max(1);
        if let Some(worker) = self.frames.get(worker) {
            let _ = worker.send(unchecked).await;
        }
    }

    pub(crate) async fn asked(&self, from: KeyId, ticket: Ticket, frame: Vec<u8>) {
        self.give(&from, Unchecked::Asked { from, ticket, frame }).await;
    }

    pub(crate) async fn answered(&self, from: KeyId, token: Token, frame: Vec<u8>) {
        self.give(&from, Unchecked::Answered { from, token, frame }).await;
    }

    /// Gives a packet to be checked, or drops it when too many wait.
    pub(crate) fn packet(&self, packet: Vec<u8>) {
        let _ = self.packets.try_send(packet);
    }
}

fn said(fabric: &FabricId, frame: &[u8], papers: &mut Papers) -> Result<Box<Said>, String> {
    let message = message::decode(frame).map_err(|error| error.to_string())?;
    let said = message::verify_among(&message, fabric, papers);
    said.map(Box::new).map_err(|error| error.to_string())
}

fn check(fabric: &FabricId, unchecked: Unchecked, papers: &mut Papers) -> Checked {
    match unchecked {
        Unchecked::Asked { from, ticket, frame } => match said(fabric, &frame, papers) {
            Ok(said) => Checked::Asked { from, ticket, said },
            Err(why) => Checked::BadQuestion { from, ticket, why },
        },
        Unchecked::Answered { from, token, frame } => match said(fabric, &frame, papers) {
            Ok(said) => Checked::Answered { from, token, said },
            Err(why) => Checked::BadAnswer { token, why },
        },
    }
}

/// A packet is signer (32 bytes), signature (64 bytes), content.
fn check_packet(fabric: &FabricId, packet: &[u8]) -> Checked {
    let parts = packet.split_first_chunk::<32>().and_then(|(signer, rest)| {
        let (signature, bytes) = rest.split_first_chunk::<64>()?;
        Some((KeyId(*signer), Signature(*signature), bytes))
    });
    let Some((from, signature, bytes)) = parts else { return Checked::BadPacket };
    match verify_packet(fabric, &from, bytes, &signature) {
        Ok(()) => Checked::Packet { from, bytes: bytes.to_vec() },
        Err(_) => Checked::BadPacket,
    }
}

#[cfg(test)]
mod tests {
    use leasehold_proto::Hash;
    use leasehold_proto::words::sign::Signer;

    use super::*;

    #[test]
    fn a_packet_is_believed_as_it_was_signed_or_not_at_all() {
        let fabric = FabricId(Hash([1; 32]));
        let signer = Signer::from_seed(&[2; 32]);
        let signature = signer.sign_packet(&fabric, b"alive");
        let packet = [&signer.id().0[..], &signature.0, b"alive"].concat();
        let good = check_packet(&fabric, &packet);
        assert!(
            matches!(good, Checked::Packet { from, bytes } if from == signer.id() && bytes == b"alive")
        );
        let bad = |packet: &[u8], fabric: &FabricId| {
            matches!(check_packet(fabric, packet), Checked::BadPacket)
        };
        assert!((0..packet.len()).all(|cut| bad(&packet[..cut], &fabric)), "cut short");
        assert!(bad(&[&packet[..], b"!"].concat(), &fabric), "continued");
        for at in 0..packet.len() {
            let mut flipped = packet.clone();
            flipped[at] ^= 1;
            assert!(bad(&flipped, &fabric), "byte {at}");
        }
        assert!(bad(&packet, &FabricId(Hash([3; 32]))), "another fabric");
    }
}
