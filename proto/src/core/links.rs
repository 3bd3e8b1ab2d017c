//! Links, membership and the map: who is there, who is admitted, what everybody offers.

use std::collections::BTreeSet;

use super::lessee::Verb;
use super::{
    Admitted, Core, DEGREE, Effect, Kept, Link, Notice, Pending, TICK, Ticket, Token, Waiting,
};
use crate::base::id::{Hash, KeyId};
use crate::base::resource::Resources;
use crate::base::time::{Boot, Now, SKEW, Span};
use crate::minds::conduct::Conduct;
use crate::minds::member::{Peer, Sign};
use crate::minds::spread::{Spread, Taken};
use crate::minds::{book, holdings};
use crate::words::charter::{Certificate, Role};
use crate::words::contract::Class;
use crate::words::equivocation::{Conviction, Equivocation, Reinstatement};
use crate::words::message::{
    MAX_CONDUCT, MAX_NAMES, Message, RecordName, RecordSaid, Said, Utterance,
};
use crate::words::object::{Kind, key_subject};
use crate::words::sign::{Hand, Signed, Verified};

/// How often everything known is compared with one neighbour.
const RECONCILE: Span = Span::secs(60);
/// How often the map is searched for what is over.
const EXPIRE: Span = Span::secs(10);
/// How often an unchanged host record is signed anew, and how long it is valid.
const HOST_REFRESH: Span = Span::secs(30 * 60);
const HOST_LIFE: Span = Span::secs(90 * 60);
/// How many host records of this run are remembered, to tell them from another's.
const MAX_SAID: usize = 256;
/// How many proofs one message holds: two objects of up to 24 KiB each.
const PROOFS_AT_ONCE: usize = 4;
/// How much is remembered of what was heard about keys that nobody has vouched for, and how much
/// of it by one peer. A proof takes up to 48 KiB.
const MAX_EARLY: usize = 256;
const MAX_EARLY_OF: usize = 16;
/// What a node says whose key was convicted.
pub(super) const CONVICTED: &str = "this node's key was convicted of saying two different things";
/// After how many comings back of this node its record says so.
const RETURNS: u32 = 16;
/// The number of the offer that ends a key with two holders.
const LAST_WORD: u64 = u64::MAX;
/// How often it is sent back to its key: links take the connections of one peer by turns.
const LAST_WORDS: usize = 4;
/// How many peers are met before something is granted, where so many are there, and how long a node
/// waits for them once the first has greeted.
const VOUCHERS: usize = 3;
const VOUCHING: Span = Span::secs(3);
/// The most peers remembered as met.
const MAX_GREETED: usize = 64;
/// How many records are pulled by one question: their answer must fit one message.
const PULL_AT_ONCE: usize = 100;
/// The most links kept; those beyond were dialled for one order and are closed when idle. Every
/// link carries every change of the map, so more than twice [`DEGREE`] cost more than they are
/// worth.
const MAX_LINKS: usize = 16;

/// What was heard about the conduct of a key before its certificate.
#[derive(Debug)]
pub(super) enum Early {
    Convicted(Box<Conviction>),
    Reinstated(Box<Verified<Reinstatement>>),
}

impl Early {
    fn of(&self) -> KeyId {
        match self {
            Self::Convicted(conviction) => conviction.signer(),
            Self::Reinstated(lifted) => lifted.body().key,
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        self.of() == other.of() && std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// Whether it changes nothing.
    fn is_known(&self, conduct: &Conduct) -> bool {
        let (key, floor) = (self.of(), conduct.floor(&self.of()));
        match self {
            Self::Convicted(said) => {
                conduct.is_quarantined(&key) || floor > 0 && said.header().epoch <= floor
            }
            Self::Reinstated(lifted) => lifted.body().above <= floor,
        }
    }
}

impl Core {
    pub(super) fn admitted_links(&self) -> usize {
        self.links.values().filter(|link| link.admitted).count()
    }

    pub(super) fn linked(&mut self, peer: KeyId, out: &mut Vec<Effect>) {
        self.links.insert(peer, Link::default());
        let hello = self.hello_to(&peer);
        // Before admission `ask` would wait for it: the greeting itself goes at once.
        self.tokens += 1;
        let token = Token(self.tokens);
        self.pending.insert(token, Pending::Hello(peer));
        out.push(Effect::Ask { to: peer, token, what: hello });
    }

    fn hello_to(&self, peer: &KeyId) -> Utterance {
        Utterance::Plain(Message::Hello {
            charter: self.admission.charter_id(),
            certificate: self.certificate.signed().clone(),
            epoch: self.hand.epoch,
            seen: self.lives.get(peer).map(|(_, record)| Box::new(record.clone())),
        })
    }

    pub(super) fn unlinked(&mut self, peer: &KeyId, out: &mut Vec<Effect>) {
        self.links.remove(peer);
        self.spread.unlinked(peer);
        // What waits for this link gets another try by dialling anew.
        if self.waiting.contains_key(peer) {
            let addresses = self.link_addresses(peer);
            out.push(Effect::Dial { peer: Some(*peer), addresses });
        }
    }

    fn link_addresses(&self, peer: &KeyId) -> Vec<std::net::SocketAddr> {
        let host = self.spread.host(peer);
        host.map(|host| host.body().addresses.link.clone()).unwrap_or_default()
    }

    pub(super) fn dial_failed(&mut self, now: Now, peer: &KeyId, out: &mut Vec<Effect>) {
        if self.links.contains_key(peer) {
            return;
        }
        self.give_up_on(now, peer, "it cannot be dialled", out);
    }

    /// What waits for a link to `peer` will not be asked.
    fn give_up_on(&mut self, now: Now, peer: &KeyId, why: &str, out: &mut Vec<Effect>) {
        for Waiting { token, .. } in self.waiting.remove(peer).unwrap_or_default() {
            self.unanswered(now, token, why, out);
        }
    }

    pub(super) fn heard(
        &mut self,
        now: Now,
        from: KeyId,
        said: Said,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let reply = |what: Message| Effect::Reply { ticket, what: Utterance::Plain(what) };
        if let Said::Hello { charter, certificate, epoch, seen } = said {
            if self.greeted(now, from, charter, &certificate, (epoch, seen.as_deref()), out) {
                let what = self.hello_to(&from);
                out.push(Effect::Reply { ticket, what });
            }
            return;
        }
        let admitted =
            from == self.config.me || self.links.get(&from).is_some_and(|link| link.admitted);
        if !admitted {
            out.push(Effect::Disconnect(from, "it spoke before it showed its certificate"));
            return;
        }
        match said {
            Said::Announce(names) => {
                self.spread.known_to(&from, &names);
                out.push(reply(Message::Pull(self.spread.lacking(&names))));
            }
            Said::Records(records) => {
                for record in records {
                    self.take_record(now, record, Some(from), out);
                }
                out.push(reply(Message::Done));
            }
            Said::Pull(names) => {
                let batch = self.spread.batches(&names).into_iter().next().unwrap_or_default();
                out.push(reply(Message::Records(batch)));
            }
            Said::Digest(theirs) => {
                let (buckets, names) = self.spread.differing(&theirs);
                out.push(reply(Message::Differ { buckets, names }));
            }
            Said::Order(papers) => self.order(now, &papers, ticket, out),
            Said::Claim(claim) => self.hear_claim(now, &claim, ticket, out),
            Said::Release(release) => self.hear_release(now, &release, ticket, out),
            Said::Renew(renew) => self.hear_renew(now, &renew, ticket, out),
            Said::Gang(gang, claim) => {
                self.hear_gang(now, &gang, claim.as_ref(), ticket, out);
            }
            Said::Conduct(convictions, lifted) => {
                for lifted in lifted {
                    self.take_reinstatement(lifted, Some(from), out);
                }
                for conviction in convictions {
                    self.convict(conviction, Some(from), out);
                }
                out.push(reply(Message::Done));
            }
            Said::Commits(lease, commits) => {
                self.hear_commits(now, lease, &commits, ticket, out);
            }
            Said::Receipt(receipt) => self.hear_receipt(now, &receipt, ticket, out),
            Said::Terminated(end) => self.hear_termination(now, &end, ticket, out),
            Said::Inquire(lease) => self.inquired(now, from, lease, ticket, out),
            Said::Hello { .. }
            | Said::Differ { .. }
            | Said::Granted(_)
            | Said::Refused(..)
            | Said::Accepted(_)
            | Said::Renewed(_)
            | Said::Committed(_)
            | Said::Acknowledged(_)
            | Said::Objected(_)
            | Said::Done => {
                out.push(Effect::Disconnect(from, "it asked what is only ever an answer"));
            }
        }
    }

    /// Judges a greeting. True when the peer is admitted from here on.
    fn greeted(
        &mut self,
        now: Now,
        from: KeyId,
        charter: Hash,
        certificate: &Verified<Certificate>,
        (epoch, seen): (u64, Option<&RecordSaid>),
        out: &mut Vec<Effect>,
    ) -> bool {
        let known = self.admission.admits(certificate, &from, Role::Node, now.wall);
        let why = match known {
            Err(why) => Some(why.to_string()),
            Ok(()) if charter != self.admission.charter_id() => {
                Some("it follows another charter".to_string())
            }
            Ok(()) => None,
        };
        if let Some(why) = why {
            self.give_up_on(now, &from, "it is not admitted to this fabric", out);
            out.push(Effect::Notice(Notice::TurnedAway(from, why)));
            out.push(Effect::Disconnect(from, "it is not admitted to this fabric"));
            return false;
        }
        if let Some(said @ RecordSaid::Host(record, _)) = seen
            && record.signer() == self.config.me
        {
            let (name, mine) = (said.name(), self.hand.epoch);
            let foreign = || self.is_foreign(name.seq, record.id());
            if name.epoch > mine || name.epoch == mine && foreign() {
                self.found_twin(now, name, out);
            }
        }
        self.admit(from, certificate, out);
        if self.greeted.len() < MAX_GREETED {
            self.greeted.insert(from);
        }
        self.greeted_at.get_or_insert(now.boot);
        let Some(link) = self.links.get_mut(&from) else { return true };
        // A peer that was killed and came back greets over a link that is still up here, since its
        // old connection has not timed out yet. It has forgotten the map: all begins anew.
        let restarted = link.admitted && link.epoch < epoch;
        link.epoch = link.epoch.max(epoch);
        if !std::mem::replace(&mut link.admitted, true) || restarted {
            out.push(Effect::Admit(from));
            if restarted {
                out.push(Effect::Restarted(from));
            }
            self.spread.linked(from);
            // One side starts the comparison; it goes both ways.
            if self.config.me < from || restarted {
                self.reconcile_with(from, out);
            }
            self.tell_conduct(from, out);
            for Waiting { token, what } in self.waiting.remove(&from).unwrap_or_default() {
                self.leaves(from, token, what, out);
            }
            self.greet_member(now, &from, out);
        }
        true
    }

    fn admit(&mut self, key: KeyId, certificate: &Verified<Certificate>, out: &mut Vec<Effect>) {
        let until = certificate.header().not_after;
        let organisation = certificate.body().organisation.clone();
        match self.admitted.get_mut(&key) {
            // Of two certificates the longer one counts.
            Some(known) if known.until >= until => {}
            Some(known) => *known = Admitted { until, organisation },
            None => {
                self.admitted.insert(key, Admitted { until, organisation });
                self.admissions += 1;
                self.take_early(key, out);
            }
        }
    }

    /// Takes what was heard about a key before anybody vouched for it.
    fn take_early(&mut self, key: KeyId, out: &mut Vec<Effect>) {
        let all = std::mem::take(&mut self.early).into_iter();
        let (known, early): (Vec<_>, _) = all.partition(|(_, early)| early.of() == key);
        self.early = early.into();
        for (_, early) in known {
            match early {
                Early::Convicted(conviction) => self.convict(*conviction, None, out),
                Early::Reinstated(lifted) => {
                    let _ = self.take_reinstatement(*lifted, None, out);
                }
            }
        }
    }

    /// Keeps for later what was heard about a key that nobody has vouched for: of a joiner's
    /// neighbours the word about conduct may come before the map. Of each who says so a few are
    /// kept, so that nobody can push out what others say.
    fn hear_early(&mut self, from: Option<KeyId>, early: Early) {
        if early.is_known(&self.conduct) {
            return;
        }
        self.early.retain(|(by, known)| *by != from || !known.is_like(&early));
        let theirs = self.early.iter().filter(|(by, _)| *by == from).count() >= MAX_EARLY_OF;
        if theirs || self.early.len() >= MAX_EARLY {
            // Who says too much loses what it said first.
            let oldest = self.early.iter().position(|(by, _)| !theirs || *by == from);
            oldest.and_then(|oldest| self.early.remove(oldest));
        }
        self.early.push_back((from, early));
    }

    /// Whose certificate has expired belongs to the fabric no more.
    fn expire_admissions(&mut self, now: Now, out: &mut Vec<Effect>) {
        let me = self.config.me;
        let expired =
            self.admitted.iter().filter(|(key, by)| **key != me && by.until + SKEW < now.wall);
        let expired: Vec<_> = expired.map(|(key, _)| *key).collect();
        for key in expired {
            self.admitted.remove(&key);
            self.admissions += 1;
            if let Some(link) = self.links.get_mut(&key) {
                link.admitted = false;
                out.push(Effect::Disconnect(key, "its certificate has expired"));
            }
        }
    }

    fn saw_life(&mut self, said: &RecordSaid) {
        let RecordSaid::Host(record, _) = said else { return };
        let (epoch, signed) = (record.header().epoch, record.signed());
        match self.lives.get_mut(&record.signer()) {
            Some((seen, _)) if *seen >= epoch => {}
            Some(life) => *life = (epoch, signed.clone()),
            None => {
                self.lives.insert(record.signer(), (epoch, signed.clone()));
            }
        }
    }

    /// Whether a host record of this key and epoch is none that was said in this run.
    fn is_foreign(&self, seq: u64, id: Hash) -> bool {
        let oldest = self.said_hosts.front().map_or(0, |(seq, _)| *seq);
        // What was said too long ago to be remembered is not judged.
        seq >= oldest && !self.said_hosts.contains(&(seq, id))
    }

    /// Another node has this key, or this directory is an older copy: nothing is granted again.
    fn twin(&mut self, seen: u64, out: &mut Vec<Effect>) {
        // What its organisation has declared void says nothing against this life.
        let void = seen <= self.conduct.floor(&self.config.me);
        if void || self.config.plant.is("ignore-twin") {
            return;
        }
        let (mine, news) = (self.hand.epoch, self.halted.is_none());
        let why = format!(
            "a node with this key was seen in epoch {seen}, this one is in epoch {mine}: \
             either two nodes run with one key, or this data directory is an older copy"
        );
        self.halt(seen, why, out);
        if news {
            out.push(Effect::Notice(Notice::Twin { seen, mine }));
        }
    }

    /// Nothing is granted any more, in this run and later ones, until the key is reinstated above
    /// this epoch.
    pub(super) fn halt(&mut self, above: u64, why: String, out: &mut Vec<Effect>) {
        if self.halted_above < above {
            self.halted_above = above;
            out.push(Effect::Keep(Kept::Halted(above)));
        }
        self.halted.get_or_insert(why);
        self.pricing.set_policy(crate::minds::pricing::Policy {
            selling: false,
            ..self.pricing.policy().clone()
        });
    }

    /// Why nothing is granted, and what would change that.
    pub(super) fn halted(&self) -> Option<String> {
        let (why, above) = (self.halted.as_ref()?, self.halted_above);
        Some(format!(
            "{why}. Until its organisation reinstates its key above epoch {above}, it grants nothing"
        ))
    }

    /// Whether enough peers were met since the start to know of a later life of this node: each
    /// that greets shows the latest it has seen. Nobody is waited for who is not there.
    pub(super) fn is_vouched(&self, now: Boot) -> bool {
        if self.vouched {
            return true;
        }
        let me = &self.config.me;
        let up = self.spread.hosts().map(|host| host.signer());
        let up = up.filter(|key| key != me && self.is_up(key, None, now)).take(VOUCHERS).count();
        let need = up.max(usize::from(!self.config.join.is_empty()));
        let waited = self.greeted_at.is_some_and(|at| at + VOUCHING <= now);
        waited || self.greeted.len() >= need
    }

    /// A key said two different things under one version.
    pub(super) fn convict(
        &mut self,
        conviction: Conviction,
        from: Option<KeyId>,
        out: &mut Vec<Effect>,
    ) {
        let (key, proof) = (conviction.signer(), conviction.proof().clone());
        let epoch = conviction.header().epoch;
        if !self.is_admitted(&key) {
            return self.hear_early(from, Early::Convicted(Box::new(conviction)));
        }
        if !self.conduct.convict(conviction) {
            return;
        }
        self.counters.equivocations += 1;
        let Equivocation { first, second } = proof.clone();
        out.push(Effect::Keep(Kept::Equivocation(first, second)));
        out.push(Effect::Notice(Notice::Equivocation(key)));
        if key == self.config.me && !self.config.plant.is("ignore-twin") {
            self.halt(epoch, CONVICTED.into(), out);
        }
        let what = Message::Conduct(vec![proof], Vec::new());
        self.pass_on(from, &what, out);
        // Two nodes may be linked under the one name: each is to hear it.
        if self.links.get(&key).is_some_and(|link| link.admitted) {
            for _ in 1..LAST_WORDS {
                self.ask(key, Pending::Conduct, Utterance::Plain(what.clone()), out);
            }
        }
    }

    /// An organisation lets a key be believed again. False when it is not its own to say, or
    /// cannot be told yet.
    pub(super) fn take_reinstatement(
        &mut self,
        lifted: Verified<Reinstatement>,
        from: Option<KeyId>,
        out: &mut Vec<Effect>,
    ) -> bool {
        let key = lifted.body().key;
        if !self.admission.reinstates(&lifted) {
            return false;
        }
        match self.admitted.get(&key) {
            // Whose key it is its certificate says, which may come later.
            None => {
                self.hear_early(from, Early::Reinstated(Box::new(lifted)));
                return false;
            }
            Some(by) if by.organisation != lifted.body().organisation => return false,
            Some(_) => {}
        }
        let signed = lifted.signed().clone();
        if self.conduct.reinstate(lifted) {
            out.push(Effect::Keep(Kept::Reinstated(key, signed.clone())));
            self.pass_on(from, &Message::Conduct(Vec::new(), vec![signed]), out);
        }
        true
    }

    /// What is news here is news to all neighbours but the one it came from.
    fn pass_on(&mut self, from: Option<KeyId>, what: &Message, out: &mut Vec<Effect>) {
        let links = self.links.iter().filter(|(key, link)| link.admitted && Some(**key) != from);
        let links: Vec<_> = links.map(|(key, _)| *key).collect();
        for to in links {
            self.ask(to, Pending::Conduct, Utterance::Plain(what.clone()), out);
        }
    }

    /// A neighbour that was just met learns whose word does not count.
    fn tell_conduct(&mut self, to: KeyId, out: &mut Vec<Effect>) {
        let proofs = self.conduct.convictions().map(|known| known.proof().clone()).collect();
        let lifted = self.conduct.reinstatements().cloned().collect();
        self.tell_of(to, proofs, lifted, out);
    }

    /// A neighbour is told a part of it again: another one each time.
    fn tell_some_conduct(&mut self, to: KeyId, out: &mut Vec<Effect>) {
        let mut proofs: Vec<_> = self.conduct.convictions().map(|c| c.proof().clone()).collect();
        let mut lifted: Vec<_> = self.conduct.reinstatements().cloned().collect();
        self.dice.shuffle(&mut proofs);
        self.dice.shuffle(&mut lifted);
        proofs.truncate(PROOFS_AT_ONCE);
        lifted.truncate(MAX_CONDUCT);
        self.tell_of(to, proofs, lifted, out);
    }

    fn tell_of(
        &mut self,
        to: KeyId,
        proofs: Vec<Equivocation>,
        lifted: Vec<Signed>,
        out: &mut Vec<Effect>,
    ) {
        let lifted = lifted.chunks(MAX_CONDUCT).map(|chunk| (Vec::new(), chunk.to_vec()));
        let proofs = proofs.chunks(PROOFS_AT_ONCE).map(|few| (few.to_vec(), Vec::new()));
        for (proofs, lifted) in lifted.chain(proofs) {
            let what = Utterance::Plain(Message::Conduct(proofs, lifted));
            self.ask(to, Pending::Conduct, what, out);
        }
    }

    fn reconcile_with(&mut self, peer: KeyId, out: &mut Vec<Effect>) {
        let digest = Utterance::Plain(Message::Digest(self.spread.digest()));
        self.ask(peer, Pending::Digest(peer), digest, out);
    }

    pub(super) fn answered(
        &mut self,
        now: Now,
        from: KeyId,
        token: Token,
        said: Said,
        out: &mut Vec<Effect>,
    ) {
        let Some(about) = self.pending.remove(&token) else { return };
        match (about, said) {
            (Pending::Hello(_), Said::Hello { charter, certificate, epoch, seen }) => {
                self.greeted(now, from, charter, &certificate, (epoch, seen.as_deref()), out);
            }
            (Pending::Announce(to), Said::Pull(names)) => self.send_records(to, &names, out),
            (Pending::Pull, Said::Records(records)) => {
                for record in records {
                    self.take_record(now, record, Some(from), out);
                }
            }
            (Pending::Digest(to), Said::Differ { buckets, names }) => {
                if names.len() > MAX_NAMES / 2 {
                    // It may have told of as many buckets as fit: the rest is compared right after.
                    self.reconcile_at = self.reconcile_at.min(now.boot + Span::millis(200));
                }
                for chunk in self.spread.lacking(&names).chunks(PULL_AT_ONCE) {
                    let pull = Utterance::Plain(Message::Pull(chunk.to_vec()));
                    self.ask(to, Pending::Pull, pull, out);
                }
                let ahead = self.spread.ahead_of(&buckets, &names);
                self.send_records(to, &ahead, out);
            }
            (Pending::Records | Pending::Conduct, Said::Done) => {}
            (Pending::Order(order), Said::Granted(papers)) => {
                self.granted(now, &order, &papers, out);
            }
            (Pending::Order(order), Said::Refused(refusal, offer)) => {
                if let Some(offer) = offer {
                    self.take_record(now, RecordSaid::Offer(offer), Some(from), out);
                }
                self.refused(now, &order, from, &refusal, out);
            }
            (Pending::Claim(lease), Said::Accepted(acceptance)) => {
                self.claim_accepted(&lease, &acceptance, out);
            }
            (Pending::Claim(lease), Said::Refused(refusal, _)) => {
                self.claim_refused(now, &lease, &refusal, out);
            }
            (Pending::Release(lease), Said::Accepted(acceptance)) => {
                self.release_accepted(&lease, &acceptance, out);
            }
            (Pending::Release(lease), Said::Refused(refusal, _)) => {
                self.release_refused(&lease, &refusal, out);
            }
            (Pending::Renew(lease), Said::Renewed(renewal)) => {
                self.renewed(now, &lease, &renewal, out);
            }
            (Pending::Renew(lease), Said::Refused(refusal, _)) => {
                self.renew_refused(&lease, &refusal, out);
            }
            (Pending::Gang(lease), Said::Committed(commit)) => {
                self.gang_committed(now, &lease, &commit, out);
            }
            (Pending::Gang(lease), Said::Refused(refusal, _)) => {
                self.gang_refused(now, &lease, &refusal, out);
            }
            // It has them now, or is over.
            (Pending::Words(lease), Said::Commits(..) | Said::Refused(..)) => {
                self.passing.remove(&lease);
            }
            (Pending::Commits(lease), Said::Refused(refusal, _)) => {
                self.commits_refused(now, lease, &refusal, out);
            }
            (Pending::Commits(lease), Said::Commits(_, commits)) => {
                self.take_commits(now, lease, &commits, out);
            }
            (Pending::Receipt(lease), Said::Acknowledged(ack)) => {
                self.hear_acknowledgement(now, &lease, &ack, out);
            }
            (Pending::Receipt(lease), Said::Objected(objection)) => {
                self.hear_objection(now, &lease, &objection, out);
            }
            (Pending::Termination(lease), Said::Done) => {
                self.told(&lease);
            }
            (Pending::Inquire(lease), Said::Terminated(end)) => {
                self.inquiry_answered(now, &lease, Some(&end), out);
            }
            (Pending::Inquire(lease), Said::Receipt(_) | Said::Done) => {
                self.inquiry_answered(now, &lease, None, out);
            }
            (Pending::Inquire(lease), Said::Refused(refusal, _)) => {
                self.inquiry_refused(now, &lease, &refusal, out);
            }
            (about, _) => self.came_to_nothing(now, about, "it gave no proper answer", out),
        }
    }

    pub(super) fn unanswered(&mut self, now: Now, token: Token, why: &str, out: &mut Vec<Effect>) {
        if let Some(about) = self.pending.remove(&token) {
            self.came_to_nothing(now, about, why, out);
        }
    }

    fn came_to_nothing(&mut self, now: Now, about: Pending, why: &str, out: &mut Vec<Effect>) {
        match about {
            Pending::Hello(peer) => {
                // A link that died before this is no longer there to be closed.
                if self.links.get(&peer).is_some_and(|link| !link.admitted) {
                    self.give_up_on(now, &peer, "it did not show its certificate", out);
                    out.push(Effect::Disconnect(peer, "it did not show its certificate"));
                }
            }
            Pending::Announce(_)
            | Pending::Pull
            | Pending::Records
            | Pending::Conduct
            | Pending::Digest(_) => {
                // What went astray, such as over a connection to a peer that has restarted since,
                // is made up for soon and not in a minute.
                self.reconcile_at = self.reconcile_at.min(now.boot + Span::secs(1));
            }
            Pending::Order(order) => self.order_silent(now, &order, why, out),
            Pending::Claim(lease) => self.act_silent(Verb::Claim, &lease, why, out),
            Pending::Release(lease) => self.act_silent(Verb::Release, &lease, why, out),
            Pending::Renew(lease) => self.act_silent(Verb::Renew, &lease, why, out),
            Pending::Gang(lease) => self.gang_silent(now, &lease, out),
            Pending::Commits(_) => {}
            Pending::Words(lease) => self.words_astray(now, &lease),
            Pending::Inquire(lease) => self.inquiry_silent(&lease, why, out),
            Pending::Receipt(lease) => {
                let pause = Span::secs(2) + Span::millis(self.dice.below(1_000));
                self.receipts_out.insert(lease, Some(now.boot + pause));
            }
            Pending::Termination(lease) => {
                if let Some(tries) = self.untold.get(&lease).map(|tries| tries + 1) {
                    let pause = Span::secs(5).scale(u64::from(tries).min(12), 1);
                    self.tell_at(lease, now.boot + pause, tries);
                }
            }
        }
    }

    fn send_records(&mut self, to: KeyId, names: &[RecordName], out: &mut Vec<Effect>) {
        for batch in self.spread.batches(names) {
            let records = Utterance::Plain(Message::Records(batch));
            self.ask(to, Pending::Records, records, out);
        }
    }

    pub(super) fn own_record(&mut self, now: Now, said: RecordSaid) {
        self.spread.take(now.boot, now.wall, said, None);
    }

    fn take_record(
        &mut self,
        now: Now,
        said: RecordSaid,
        from: Option<KeyId>,
        out: &mut Vec<Effect>,
    ) {
        let name = said.name();
        if name.key == self.config.me {
            self.heard_of_myself(now, &said, name, out);
            return;
        }
        match &said {
            RecordSaid::Host(record, certificate) => {
                let key = record.signer();
                if self.admission.admits(certificate, &key, Role::Node, now.wall).is_err() {
                    return;
                }
                self.admit(key, certificate, out);
            }
            // Without a host record nobody vouches for the signer.
            _ if !self.is_admitted(&name.key) => return,
            _ => {}
        }
        // What its organisation has declared void is not shown to anybody any more.
        if name.epoch <= self.conduct.floor(&name.key) {
            return;
        }
        self.saw_life(&said);
        match self.spread.take(now.boot, now.wall, said, from.as_ref()) {
            Taken::New if name.kind == Kind::HostRecord => {
                self.learn_member(now, &name.key, out);
            }
            // Said by one holder of the key, perhaps over this very link: the other one, whose
            // connection is another under the same name, must hear it too.
            Taken::New if name.seq == LAST_WORD => {
                let linked = self.links.get(&name.key).is_some_and(|link| link.admitted);
                for _ in 0..if linked { LAST_WORDS } else { 0 } {
                    self.send_records(name.key, &[name], out);
                }
            }
            Taken::Equivocation(first, second) => {
                let proof = Equivocation { first, second };
                if let Ok(conviction) = proof.check(&self.hand.fabric) {
                    self.convict(conviction, None, out);
                }
            }
            _ => {}
        }
    }

    /// A record that this very key signed came back over a link.
    fn heard_of_myself(
        &mut self,
        now: Now,
        said: &RecordSaid,
        name: RecordName,
        out: &mut Vec<Effect>,
    ) {
        let (ahead, same) = (name.epoch > self.hand.epoch, name.epoch == self.hand.epoch);
        let id = said.signed().id();
        let foreign = match name.kind {
            Kind::Offer => self.spread.offer(&name.key).is_some_and(|(offer, _)| {
                let seq = offer.header().seq;
                name.seq > seq || (name.seq == seq && offer.id() != id)
            }),
            Kind::Payloads => self.stock.is_foreign(name.seq, id),
            _ => self.is_foreign(name.seq, id),
        };
        if ahead || same && foreign {
            self.found_twin(now, name, out);
        }
    }

    /// A record of this key that this run never said: the other one is told, too.
    fn found_twin(&mut self, now: Now, name: RecordName, out: &mut Vec<Effect>) {
        self.twin(name.epoch, out);
        self.last_word(now, name, out);
        if self.halted.is_some() {
            self.membership.mute();
        }
    }

    /// The other holder of this key may live in a newer epoch and would never hear of this one: an
    /// empty offer above everything it can say halts it as well, and ends both in everybody's map.
    fn last_word(&mut self, now: Now, name: RecordName, out: &mut Vec<Effect>) {
        let heard = name.seq == LAST_WORD && name.kind == Kind::Offer;
        if heard || self.last_word >= name.epoch || self.config.plant.is("ignore-twin") {
            return;
        }
        self.last_word = name.epoch;
        let hand = Hand { epoch: name.epoch, ..self.hand.clone() };
        let not_after = now.wall + crate::minds::pricing::HONOUR;
        let offer = self.pricing.nothing();
        if let Ok(draft) = hand.draft(key_subject(&hand.me), LAST_WORD, not_after, &offer) {
            out.push(Effect::Record(draft));
        }
    }

    fn learn_member(&mut self, now: Now, key: &KeyId, out: &mut Vec<Effect>) {
        if let Some(peer) = peer_in(&self.spread, key) {
            let mut signs = Vec::new();
            self.membership.learn(now.boot, peer, &mut signs);
            self.act_on(signs, out);
        }
    }

    /// A linked member is asked for the members that it knows.
    fn greet_member(&mut self, now: Now, key: &KeyId, out: &mut Vec<Effect>) {
        if let Some(peer) = peer_in(&self.spread, key) {
            let mut signs = Vec::new();
            self.membership.announce_to(now.boot, peer, &mut signs);
            self.act_on(signs, out);
        }
    }

    pub(super) fn packet(&mut self, now: Now, from: KeyId, bytes: &[u8], out: &mut Vec<Effect>) {
        if !self.is_admitted(&from) {
            return;
        }
        let mut signs = Vec::new();
        let vouched = |key: &KeyId| peer_in(&self.spread, key);
        self.membership.hear(now.boot, &from, bytes, vouched, &mut signs);
        self.act_on(signs, out);
    }

    fn act_on(&mut self, signs: Vec<Sign>, out: &mut Vec<Effect>) {
        for sign in signs {
            match sign {
                Sign::Packet { to, bytes } => out.push(Effect::Packet { to, bytes }),
                Sign::Up(key) => out.push(Effect::Notice(Notice::Up(key))),
                Sign::Down(key) => out.push(Effect::Notice(Notice::Down(key))),
            }
        }
    }

    pub(super) fn wake_links(&mut self, now: Now, out: &mut Vec<Effect>) {
        let mut signs = Vec::new();
        self.membership.wake(now.boot, &mut signs);
        self.act_on(signs, out);
        for (to, names) in self.spread.announcements(now.boot) {
            let announce = Utterance::Plain(Message::Announce(names));
            self.ask(to, Pending::Announce(to), announce, out);
        }
        let returns = self.membership.me().rejoin;
        if self.host_record_at <= now.boot || returns >= self.returns_said + RETURNS {
            self.host_record_at = now.boot + HOST_REFRESH;
            self.publish_host(now, out);
        }
        if !self.vouched && self.is_vouched(now.boot) {
            self.vouched = true;
            self.pricing.changed();
        }
        // What would be refused is not offered.
        let sells = self.vouched && !self.holdback.drained;
        let free = if sells { self.book.free() } else { Resources::default() };
        if let Ok(Some(draft)) = self.pricing.publish(now, &free, &self.hand) {
            self.counters.offers += 1;
            out.push(Effect::Record(draft));
        }
        if self.tick_at <= now.boot {
            self.tick_at = now.boot + TICK;
            self.tick(now, out);
        }
    }

    fn publish_host(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.host_seq += 1;
        self.returns_said = self.membership.me().rejoin;
        let record = self.config.host_record(self.returns_said);
        let subject = key_subject(&self.config.me);
        if let Ok(draft) = self.hand.draft(subject, self.host_seq, now.wall + HOST_LIFE, &record) {
            if self.said_hosts.len() == MAX_SAID {
                self.said_hosts.pop_front();
            }
            self.said_hosts.push_back((self.host_seq, draft.id()));
            out.push(Effect::Record(draft));
        }
    }

    fn tick(&mut self, now: Now, out: &mut Vec<Effect>) {
        if self.expire_at <= now.boot {
            self.expire_at = now.boot + EXPIRE;
            self.spread.expire(now.wall);
            self.expire_admissions(now, out);
        }
        self.watch_clock(now);
        self.seek_links(out);
        if self.reconcile_at <= now.boot {
            self.reconcile_at = now.boot + RECONCILE + Span::millis(self.dice.below(5_000));
            let admitted: Vec<_> =
                self.links.iter().filter(|(_, link)| link.admitted).map(|(key, _)| *key).collect();
            if let Some(peer) = self.dice.pick(&admitted).copied() {
                self.reconcile_with(peer, out);
                // What was said about conduct may have gone astray, too.
                if self.conduct_at <= now.boot {
                    self.conduct_at = now.boot + RECONCILE;
                    self.tell_some_conduct(peer, out);
                }
            }
        }
        self.tick_lessor(now, out);
        self.tick_lessee(now, out);
    }

    /// When the wall clock was set, what was signed by the old reading lives too long or too short,
    /// and what was refused by it may be good: all is said and compared anew.
    fn watch_clock(&mut self, now: Now) {
        let expected = self.clocks.wall + now.boot.since(self.clocks.boot);
        let step = now.wall.since(expected).max(expected.since(now.wall));
        self.clocks = now;
        if step > SKEW {
            self.pricing.restate();
            self.host_record_at = now.boot;
            self.restate_payloads(now);
            self.reconcile_at = now.boot;
        }
    }

    /// Keeps [`DEGREE`] links to random members, and to the nodes to join by until one is up.
    fn seek_links(&mut self, out: &mut Vec<Effect>) {
        let lonely = self.admitted_links() == 0;
        if lonely && !self.leaving {
            let me = &self.config.addresses.link;
            let seeds = self.config.join.iter().filter(|seed| !me.contains(seed));
            for seed in seeds.copied().collect::<Vec<_>>() {
                out.push(Effect::Dial { peer: None, addresses: vec![seed] });
            }
        }
        let lacking = DEGREE.saturating_sub(self.links.len());
        if lacking > 0 && !self.leaving {
            let up = |key: &KeyId| self.membership.is_up(key);
            let mut others: Vec<KeyId> = self
                .spread
                .hosts()
                .map(|host| host.signer())
                .filter(|key| *key != self.config.me && !self.links.contains_key(key) && up(key))
                .collect();
            self.dice.shuffle(&mut others);
            for key in others.into_iter().take(lacking) {
                let addresses = self.link_addresses(&key);
                out.push(Effect::Dial { peer: Some(key), addresses });
            }
        }
        if self.links.len() > MAX_LINKS {
            let used = self.in_use();
            let idle = self.links.keys().filter(|key| !used.contains(key));
            let idle: Vec<_> = idle.copied().collect();
            if let Some(key) = self.dice.pick(&idle).copied() {
                out.push(Effect::Disconnect(key, "too many links"));
            }
        }
    }

    /// The peers that a lease which has not ended binds to this node, or that are to be asked.
    fn in_use(&self) -> BTreeSet<KeyId> {
        let lent = self.book.leases().filter(|(_, lease)| lease.kept.stage != book::Stage::Ended);
        let held = self.holdings.all().filter(|(_, h)| h.kept.stage != holdings::Stage::Ended);
        self.waiting
            .keys()
            .copied()
            .chain(lent.map(|(_, lease)| lease.terms.delegate))
            .chain(held.map(|(_, holding)| holding.kept.lessor))
            .collect()
    }

    pub(super) fn leave(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.leaving = true;
        let mut signs = Vec::new();
        self.membership.leave(now.boot, &mut signs);
        self.act_on(signs, out);
    }

    pub(super) fn is_up(&self, key: &KeyId, heard: Option<Boot>, now: Boot) -> bool {
        // A node just heard of has not been probed yet: it counts as up for a moment.
        *key == self.config.me
            || self.membership.is_up(key)
            || heard.is_some_and(|heard| now.since(heard) < Span::secs(2) && !self.leaving)
                && self.links.contains_key(key)
    }
}

impl Core {
    pub(super) fn view_nodes(&self, now: Now) -> Vec<super::view::NodeView> {
        self.spread
            .certified()
            .map(|(record, certificate)| {
                let (key, host) = (record.signer(), record.body());
                let offer = self.spread.offer(&key);
                let body = offer.map(|(offer, _)| offer.body());
                super::view::NodeView {
                    id: key,
                    name: host.name.clone(),
                    up: self.is_up(&key, offer.map(|(_, heard)| heard), now.boot),
                    linked: self.links.get(&key).is_some_and(|link| link.admitted),
                    version: host.version.clone(),
                    organisation: certificate.body().organisation.clone(),
                    hardware: host.hardware.clone(),
                    shapes: body.map(|offer| offer.shapes.clone()).unwrap_or_default(),
                    rates: body.map(|offer| offer.rates.clone()),
                    slack_permille: body.and_then(|offer| {
                        let sold = offer.classes.contains(&Class::Slack);
                        sold.then_some(offer.slack_permille)
                    }),
                    early: body.map(|offer| offer.early).unwrap_or_default(),
                    offer: offer.map(|(offer, _)| offer.id()),
                    offer_age: offer.map(|(_, heard)| now.boot.since(heard)),
                    max_term: body.map(|offer| offer.max_term).unwrap_or_default(),
                    runtimes: body.map(|offer| offer.runtimes.clone()).unwrap_or_default(),
                    isolation: body.map(|offer| offer.isolation.clone()).unwrap_or_default(),
                    models: body.map(|offer| offer.models.clone()).unwrap_or_default(),
                    labels: host.labels.clone(),
                    quarantined: self.conduct.is_quarantined(&key),
                    addresses: host.addresses.clone(),
                }
            })
            .collect()
    }
}

/// The member that the host record of `key` speaks of.
fn peer_in(spread: &Spread, key: &KeyId) -> Option<Peer> {
    let host = spread.host(key)?;
    let probe = *host.body().addresses.probe.first()?;
    let (epoch, rejoin) = (host.header().epoch, host.body().returns);
    Some(Peer { key: *key, epoch, rejoin, probe })
}
