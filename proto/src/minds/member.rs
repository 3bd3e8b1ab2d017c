//! Who is alive: SWIM (Das, Gupta, Motivala 2002) by `foca`, driven by packets and the boot clock.
//!
//! ```text
//!  alive --no ack, directly or through 3 others--> suspect --not refuted in time--> down
//!    ^------------------refutes: higher incarnation--'           (a restart has a higher epoch)
//! ```
//!
//! The only file that names foca. It does not authenticate who sent what; [`Membership::hear`]
//! does: a packet's source must be the key that signed it. A verdict is a hint: leases have
//! their own terms, so a wrong one costs a retry, never safety.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroUsize};

use bytes::{Buf, BufMut};
use foca::{Foca, Header, Identity, Member, NoCustomBroadcast, Notification, Timer};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng as _;
use serde::{Deserialize, Serialize};

use crate::base::id::KeyId;
use crate::base::time::{Boot, Span};
use crate::words::wire::{self, DecodeError, EncodeError, MAX_PACKET};

/// The room for a foca packet inside a signed datagram: the rest is signer and signature.
const MAX_INNER: usize = MAX_PACKET - 112;

/// How many comings back of a member are believed from others, beyond what is known of it.
const HEARSAY: u32 = 64;

/// How often a node that is held down comes back at most.
const REJOIN: Span = Span::secs(1);

/// How liveness is watched. The defaults notice a dead host within some 4 s at any size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How often one member is probed. Half a second finds a dead one in 0.8 s on average.
    pub probe_every: Span,
    /// How long a direct answer may take before others are asked to probe.
    pub probe_patience: Span,
    /// How long a suspect has to refute. Longer spares the slow, shorter finds the dead sooner.
    pub suspect_for: Span,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            probe_every: Span::millis(500),
            probe_patience: Span::millis(200),
            suspect_for: Span::millis(2_000),
        }
    }
}

/// A member: a key, in one life of its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The node's key.
    pub key: KeyId,
    /// Its epoch: a restart is another, later life.
    pub epoch: u64,
    /// Rises when the node finds itself declared down while it is alive.
    pub rejoin: u32,
    /// Where it takes liveness packets.
    pub probe: SocketAddr,
}

impl Identity for Peer {
    type Addr = KeyId;

    fn renew(&self) -> Option<Self> {
        Some(Self { rejoin: self.rejoin.checked_add(1)?, ..self.clone() })
    }

    fn addr(&self) -> KeyId {
        self.key
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        (self.epoch, self.rejoin) > (adversary.epoch, adversary.rejoin)
    }
}

/// What comes out of watching.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sign {
    /// A packet to sign and send.
    Packet {
        /// Where to.
        to: SocketAddr,
        /// What.
        bytes: Vec<u8>,
    },
    /// A member is alive.
    Up(KeyId),
    /// A member is down.
    Down(KeyId),
}

/// The watch over all members.
pub struct Membership {
    foca: Foca<Peer, Fixed, ChaCha8Rng, NoCustomBroadcast>,
    timers: BTreeMap<(Boot, u64), Timer<Peer>>,
    scheduled: u64,
    up: BTreeMap<KeyId, u64>,
    /// The latest life of each member, by its own packets or credible hearsay.
    lives: BTreeMap<KeyId, (u64, u32)>,
    refused: u64,
    /// When this node last found itself held down and came back in another identity.
    rejoined: Option<Boot>,
    muted: bool,
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership").field("up", &self.up).finish_non_exhaustive()
    }
}

/// foca's codec over this crate's wire encoding.
#[derive(Clone, Copy, Debug)]
struct Fixed;

/// Why a packet could not be coded.
#[derive(Debug, thiserror::Error)]
enum CodeError {
    #[error(transparent)]
    Encode(#[from] EncodeError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("the packet is full")]
    Full,
}

fn put(value: &impl Serialize, mut buf: impl BufMut) -> Result<(), CodeError> {
    let bytes = wire::encode::<MAX_INNER>(value)?;
    if buf.remaining_mut() < bytes.len() {
        return Err(CodeError::Full);
    }
    buf.put_slice(&bytes);
    Ok(())
}

fn get<T: serde::de::DeserializeOwned>(mut buf: impl Buf) -> Result<T, CodeError> {
    let (value, used) = wire::decode_prefix::<MAX_INNER, T>(buf.chunk())?;
    buf.advance(used);
    Ok(value)
}

impl foca::Codec<Peer> for Fixed {
    type Error = CodeError;

    fn encode_header(&mut self, header: &Header<Peer>, buf: impl BufMut) -> Result<(), CodeError> {
        put(header, buf)
    }
    fn decode_header(&mut self, buf: impl Buf) -> Result<Header<Peer>, CodeError> {
        get(buf)
    }
    fn encode_member(&mut self, member: &Member<Peer>, buf: impl BufMut) -> Result<(), CodeError> {
        put(member, buf)
    }
    fn decode_member(&mut self, buf: impl Buf) -> Result<Member<Peer>, CodeError> {
        get(buf)
    }
}

/// The packet without what it says of members that are not `credible`; none when it is malformed.
/// foca's layout: header, the number of members as u16 big-endian, the members.
fn sift(packet: &[u8], header: usize, credible: impl Fn(&Peer) -> bool) -> Option<Vec<u8>> {
    let (head, tail) = packet.split_at_checked(header)?;
    let Some((count, mut rest)) = tail.split_first_chunk::<2>() else {
        return Some(packet.to_vec());
    };
    let (mut kept, mut members) = (0u16, Vec::with_capacity(rest.len()));
    for _ in 0..u16::from_be_bytes(*count) {
        let (member, used) = wire::decode_prefix::<MAX_INNER, Member<Peer>>(rest).ok()?;
        let (bytes, after) = rest.split_at_checked(used)?;
        if credible(member.id()) {
            kept += 1;
            members.extend_from_slice(bytes);
        }
        rest = after;
    }
    Some([head, &kept.to_be_bytes(), &members, rest].concat())
}

/// Collects what foca wants of the world.
struct Wishes<'a> {
    now: Boot,
    timers: &'a mut BTreeMap<(Boot, u64), Timer<Peer>>,
    scheduled: &'a mut u64,
    up: &'a mut BTreeMap<KeyId, u64>,
    lives: &'a mut BTreeMap<KeyId, (u64, u32)>,
    rejoined: &'a mut Option<Boot>,
    out: &'a mut Vec<Sign>,
}

impl Wishes<'_> {
    fn lived(&mut self, peer: &Peer) {
        let known = self.lives.entry(peer.key).or_default();
        *known = (*known).max((peer.epoch, peer.rejoin));
    }
}

impl foca::Runtime<Peer> for Wishes<'_> {
    fn notify(&mut self, notification: Notification<'_, Peer>) {
        match notification {
            Notification::MemberUp(peer) => {
                self.lived(peer);
                self.up.insert(peer.key, peer.epoch);
                self.out.push(Sign::Up(peer.key));
            }
            Notification::MemberDown(peer) => {
                self.up.remove(&peer.key);
                self.out.push(Sign::Down(peer.key));
            }
            Notification::Rename(_, peer) => {
                self.lived(peer);
                if let Some(epoch) = self.up.get_mut(&peer.key) {
                    *epoch = peer.epoch;
                }
            }
            Notification::Rejoin(_) => *self.rejoined = Some(self.now),
            _ => {}
        }
    }

    fn send_to(&mut self, to: Peer, data: &[u8]) {
        self.out.push(Sign::Packet { to: to.probe, bytes: data.to_vec() });
    }

    fn submit_after(&mut self, event: Timer<Peer>, after: std::time::Duration) {
        *self.scheduled += 1;
        self.timers.insert((self.now + Span::from(after), *self.scheduled), event);
    }
}

impl Membership {
    /// Starts watching as `me`, with dice from `seed`.
    #[must_use]
    pub fn new(me: Peer, timing: &Timing, seed: u64) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Self {
            foca: Foca::new(me, config(timing), rng, Fixed),
            timers: BTreeMap::new(),
            scheduled: 0,
            up: BTreeMap::new(),
            lives: BTreeMap::new(),
            refused: 0,
            rejoined: None,
            muted: false,
        }
    }

    /// Says and hears nothing any more: another node holds this key, and each would find itself
    /// held down for the other's sake and come back, for ever.
    pub fn mute(&mut self) {
        self.muted = true;
        self.timers.clear();
    }

    /// Runs `act` on foca with a runtime that collects its wishes into `out`.
    fn with(
        &mut self,
        now: Boot,
        out: &mut Vec<Sign>,
        act: impl FnOnce(
            &mut Foca<Peer, Fixed, ChaCha8Rng, NoCustomBroadcast>,
            Wishes<'_>,
        ) -> Result<(), foca::Error>,
    ) {
        if self.muted {
            return;
        }
        let Self { foca, timers, scheduled, up, lives, rejoined, .. } = self;
        let wishes = Wishes { now, timers, scheduled, up, lives, rejoined, out };
        if act(foca, wishes).is_err() {
            self.refused += 1;
        }
    }

    /// Hears a packet that `signer` signed. One whose source is another key is refused. What it
    /// says about others is only believed as far as their own host record bears it out: `vouched`
    /// gives the member that it speaks of.
    pub fn hear(
        &mut self,
        now: Boot,
        signer: &KeyId,
        packet: &[u8],
        vouched: impl Fn(&KeyId) -> Option<Peer>,
        out: &mut Vec<Sign>,
    ) {
        let source = wire::decode_prefix::<MAX_INNER, Header<Peer>>(packet);
        let source = source.ok().filter(|(header, _)| header.src.key == *signer);
        let said = Cell::new(None);
        let sifted = source.and_then(|(header, used)| {
            let source = &header.src;
            let me = self.me();
            let about = |peer: &Peer| {
                if peer.key == me.key && peer.epoch == me.epoch {
                    said.set(said.get().max(Some(peer.rejoin)));
                }
                self.credible(peer, &vouched)
            };
            let sifted = sift(packet, used, about)?;
            let known = self.lives.entry(source.key).or_default();
            *known = (*known).max((source.epoch, source.rejoin));
            Some((header, sifted))
        });
        let Some((header, packet)) = sifted else {
            self.refused += 1;
            return;
        };
        // Everybody it speaks to answers one who is held down: coming back once is enough for all.
        let lately = self.rejoined.is_some_and(|at| now < at + REJOIN);
        if lately && matches!(header.message, foca::Message::TurnUndead) {
            return;
        }
        self.with(now, out, |foca, wishes| foca.handle_data(&packet, wishes));
        self.outdo(now, said.get(), out);
    }

    /// Whether hearsay about `peer` can be true: it is in no later life than its own record says,
    /// is reached where that says, and has come back not much more often than is known. Else one
    /// member could bury another under an identity that it can never win against.
    fn credible(&self, peer: &Peer, vouched: &impl Fn(&KeyId) -> Option<Peer>) -> bool {
        let me = self.me();
        if peer.key == me.key {
            return (peer.epoch, peer.rejoin) <= (me.epoch, me.rejoin);
        }
        let Some(own) = vouched(&peer.key) else { return false };
        let known = self.lives.get(&peer.key).filter(|(epoch, _)| *epoch == peer.epoch);
        let known = known.map_or(0, |(_, rejoin)| *rejoin);
        if peer.epoch < own.epoch {
            return peer.rejoin <= known.saturating_add(HEARSAY);
        }
        let most = known.max(own.rejoin).saturating_add(HEARSAY);
        peer.epoch == own.epoch && peer.probe == own.probe && peer.rejoin <= most
    }

    /// What others say of this node may run ahead of it: then somebody lies, or has it from one who
    /// does. It comes back beyond that, so that nobody is left who holds it down.
    fn outdo(&mut self, now: Boot, said: Option<u32>, out: &mut Vec<Sign>) {
        let me = self.me();
        let Some(rejoin) = said.filter(|said| *said > me.rejoin) else { return };
        let most = me.rejoin.saturating_add(HEARSAY);
        let next = Peer { rejoin: rejoin.min(most).saturating_add(1), ..me.clone() };
        self.with(now, out, |foca, wishes| foca.change_identity(next, wishes));
    }

    /// Asks `peer`, which is known to be reachable, for the members it knows.
    pub fn announce_to(&mut self, now: Boot, peer: Peer, out: &mut Vec<Sign>) {
        self.with(now, out, |foca, wishes| foca.announce(peer, wishes));
    }

    /// Takes `peer` as a member to watch, unless it is known already.
    pub fn learn(&mut self, now: Boot, peer: Peer, out: &mut Vec<Sign>) {
        if self.up.get(&peer.key) == Some(&peer.epoch) || peer.key == self.me().key {
            return;
        }
        self.with(now, out, |foca, wishes| {
            foca.apply_many(std::iter::once(Member::alive(peer)), false, wishes)
        });
    }

    /// Tells the others that this node leaves, so that nobody has to find out.
    pub fn leave(&mut self, now: Boot, out: &mut Vec<Sign>) {
        self.with(now, out, |foca, wishes| foca.leave_cluster(wishes));
    }

    /// Does what is due at `now`.
    pub fn wake(&mut self, now: Boot, out: &mut Vec<Sign>) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let timer = entry.remove();
            self.with(now, out, |foca, wishes| foca.handle_timer(timer, wishes));
        }
    }

    /// When [`Membership::wake`] is next due.
    #[must_use]
    pub fn next_wake(&self) -> Option<Boot> {
        self.timers.first_key_value().map(|((at, _), _)| *at)
    }

    /// This node, as it is known to the others.
    #[must_use]
    pub fn me(&self) -> &Peer {
        self.foca.identity()
    }

    /// Whether `key` is held to be alive.
    #[must_use]
    pub fn is_up(&self, key: &KeyId) -> bool {
        self.up.contains_key(key)
    }

    /// How many others are alive.
    #[must_use]
    pub fn count(&self) -> usize {
        self.up.len()
    }

    /// How many packets were refused.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused
    }
}

/// foca's configuration. Its LAN preset would suspect for 4 log10(n) seconds; ours is explicit.
fn config(timing: &Timing) -> foca::Config {
    let three = NonZeroUsize::MIN.saturating_add(2);
    foca::Config {
        probe_period: timing.probe_every.duration(),
        probe_rtt: timing.probe_patience.duration(),
        num_indirect_probes: three,
        max_transmissions: NonZeroU8::MIN.saturating_add(9),
        suspect_to_down_after: timing.suspect_for.duration(),
        // Long enough that no gossip about the dead is still under way when they are forgotten.
        remove_down_after: Some(std::time::Duration::from_secs(3600)),
        max_packet_size: NonZeroUsize::new(MAX_INNER).unwrap_or(NonZeroUsize::MIN),
        notify_down_members: true,
        periodic_announce: Some(foca::PeriodicParams {
            frequency: std::time::Duration::from_secs(30),
            num_members: NonZeroUsize::MIN,
        }),
        // Heals partitions: one of those held down is asked now and then.
        periodic_announce_to_down_members: Some(foca::PeriodicParams {
            frequency: std::time::Duration::from_secs(20),
            num_members: NonZeroUsize::MIN.saturating_add(1),
        }),
        // Verdicts also travel by themselves, so that the last observer hears within a second.
        periodic_gossip: Some(foca::PeriodicParams {
            frequency: std::time::Duration::from_millis(500),
            num_members: three,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> Peer {
        let probe = SocketAddr::from(([127, 0, 0, n], 7000));
        Peer { key: KeyId([n; 32]), epoch: 1, rejoin: 0, probe }
    }

    /// Everybody's host record is known.
    #[allow(clippy::unnecessary_wraps)] // as the records of a fabric answer
    fn vouched(key: &KeyId) -> Option<Peer> {
        Some(peer(key.0[0]))
    }

    /// A handful of members in one address space, without loss.
    fn settle(members: &mut [Membership], alive: impl Fn(usize) -> bool, from: u64, until: u64) {
        for now in (from..until).step_by(10).map(Boot) {
            let mut packets = Vec::new();
            for (i, member) in members.iter_mut().enumerate() {
                if alive(i) {
                    let mut out = Vec::new();
                    member.wake(now, &mut out);
                    packets.extend(out.into_iter().map(|sign| (member.me().key, sign)));
                }
            }
            while let Some((from, sign)) = packets.pop() {
                let Sign::Packet { to, bytes } = sign else { continue };
                let at = members.iter().position(|m| m.me().probe == to);
                let Some(at) = at.filter(|at| alive(*at)) else { continue };
                let mut out = Vec::new();
                members[at].hear(now, &from, &bytes, vouched, &mut out);
                let key = members[at].me().key;
                packets.extend(out.into_iter().map(|sign| (key, sign)));
            }
        }
    }

    #[test]
    fn the_dead_are_noticed_by_all_within_five_seconds() {
        let mut members: Vec<_> =
            (1..=7).map(|n| Membership::new(peer(n), &Timing::default(), n.into())).collect();
        for n in 1..7 {
            let mut out = Vec::new();
            members[n].announce_to(Boot(0), peer(1), &mut out);
            let Some(Sign::Packet { bytes, .. }) = out.pop() else { panic!("announces") };
            let from = members[n].me().key;
            let mut reply = Vec::new();
            members[0].hear(Boot(0), &from, &bytes, vouched, &mut reply);
            for sign in reply {
                if let Sign::Packet { bytes, .. } = sign {
                    let from = KeyId([1; 32]);
                    members[n].hear(Boot(0), &from, &bytes, vouched, &mut Vec::new());
                }
            }
        }
        settle(&mut members, |_| true, 0, 3_000);
        assert!(members.iter().all(|m| m.count() == 6), "all see all");
        settle(&mut members, |i| i != 3, 3_000, 8_000);
        let dead = KeyId([4; 32]);
        let seen: Vec<_> = members.iter().map(|m| m.is_up(&dead)).collect();
        assert_eq!(seen.iter().filter(|up| **up).count(), 0, "{seen:?}");
    }

    #[test]
    fn a_packet_of_another_source_is_refused() {
        let mut a = Membership::new(peer(1), &Timing::default(), 1);
        let mut b = Membership::new(peer(2), &Timing::default(), 2);
        let mut out = Vec::new();
        a.announce_to(Boot(0), peer(2), &mut out);
        let Some(Sign::Packet { bytes, .. }) = out.pop() else { panic!("announces") };
        b.hear(Boot(0), &KeyId([9; 32]), &bytes, vouched, &mut out);
        assert_eq!((b.refused(), b.count()), (1, 0));
        for cut in 0..bytes.len() {
            b.hear(Boot(0), &KeyId([1; 32]), &bytes[..cut], vouched, &mut out);
        }
        b.hear(Boot(0), &KeyId([1; 32]), &[0xff; MAX_INNER], vouched, &mut out);
        assert_eq!(b.count(), 0, "nothing cut short counts");
        b.hear(Boot(0), &KeyId([1; 32]), &bytes, vouched, &mut out);
        assert_eq!(b.count(), 1);
    }

    #[test]
    fn hearsay_buries_nobody_and_invents_nobody() {
        let (liar, victim) = (peer(1), peer(3));
        let mut a = Membership::new(peer(2), &Timing::default(), 2);
        a.learn(Boot(0), liar.clone(), &mut Vec::new());
        a.learn(Boot(0), victim.clone(), &mut Vec::new());
        let (me, elsewhere) = (peer(2), SocketAddr::from(([127, 0, 0, 9], 9)));
        let told = |peer: Peer| {
            let src = liar.clone();
            let message = foca::Message::Gossip;
            let header = Header { src, src_incarnation: 0, dst: me.clone(), message };
            let mut packet = wire::encode::<MAX_INNER>(&header).expect("fits");
            packet.extend(1u16.to_be_bytes());
            packet.extend(wire::encode::<MAX_INNER>(&Member::alive(peer)).expect("fits"));
            packet
        };
        let only_known = |key: &KeyId| (key.0[0] <= 3).then(|| peer(key.0[0]));
        for lie in [
            Peer { epoch: u64::MAX, ..victim.clone() },
            Peer { epoch: 2, ..victim.clone() },
            Peer { rejoin: u32::MAX, ..victim.clone() },
            Peer { rejoin: HEARSAY + 1, ..victim.clone() },
            Peer { probe: elsewhere, rejoin: 1, ..victim.clone() },
            Peer { key: KeyId([77; 32]), ..victim.clone() },
        ] {
            a.hear(Boot(1), &liar.key, &told(lie), only_known, &mut Vec::new());
            assert_eq!((a.refused(), a.count()), (0, 2), "heard, not believed");
        }
        // Its own word, one coming back later, still counts.
        let back = Peer { rejoin: 1, ..victim.clone() };
        a.hear(Boot(2), &liar.key, &told(back), only_known, &mut Vec::new());
        assert_eq!(a.lives.get(&victim.key), Some(&(1, 1)), "what can be true is believed");
        assert!(a.is_up(&victim.key));
        // Of itself a node hears what it never was: it comes back beyond that, step by step.
        let ahead = Peer { rejoin: 9, ..me.clone() };
        a.hear(Boot(3), &liar.key, &told(ahead), only_known, &mut Vec::new());
        assert_eq!(a.me().rejoin, 10);
        let beyond = Peer { rejoin: u32::MAX, ..me.clone() };
        a.hear(Boot(4), &liar.key, &told(beyond), only_known, &mut Vec::new());
        assert_eq!(a.me().rejoin, 10 + HEARSAY + 1, "no lie uses up the numbers at once");
    }
}
