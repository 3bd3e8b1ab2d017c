//! One lease from charter to termination, with fixed seeds and times: every kind of signed
//! object, every message, and a proof that holds. The same bytes on every machine.
//!
//! ```text
//! org signs charter, certificates     tenant signs the mandate
//! lessor offers, grants, accepts, writes receipts, terminates
//! delegate orders, claims, acknowledges, releases
//! ```

use leasehold_proto::proof::Proof;
use leasehold_proto::words::chain::Chain;
use leasehold_proto::words::charter::{Certificate, Charter, Limits, Organisation, Role};
use leasehold_proto::words::contract::{
    Acceptance, Authority, Claim, Class, Commit, EarlyEnd, EndReason, Fence, Figure, Gang, GangOf,
    Grant, Input, JobSpec, Mandate, Member, Order, Reason, Refusal, Release, Renew, Renewal,
    Termination,
};
use leasehold_proto::words::equivocation::{Equivocation, Reinstatement};
use leasehold_proto::words::message::{BUCKETS, Message, RecordName};
use leasehold_proto::words::model::{
    Endpoint, Finish, ModelOffer, ModelState, ModelTerms, Sampling, Service, Tally, TokenRates,
};
use leasehold_proto::words::object::{Body, Envelope, Kind, key_subject, order_subject};
use leasehold_proto::words::record::{Addresses, HostRecord, Offer, Payloads};
use leasehold_proto::words::sign::{Draft, HeaderOf, Signed, Signer};
use leasehold_proto::words::usage::{
    Acknowledgement, Objection, ObjectionReason, Outcome, Receipt, Usage,
};
use leasehold_proto::{
    Amount, FabricId, GIB, GpuRate, Gpus, Hash, LeaseId, Payload, Rates, RequestId, Resources,
    Span, Wall,
};

/// The seeds of the four keys.
pub(crate) const ORGANISATION: [u8; 32] = [1; 32];
/// See [`ORGANISATION`].
pub(crate) const LESSOR: [u8; 32] = [2; 32];
/// See [`ORGANISATION`].
pub(crate) const DELEGATE: [u8; 32] = [3; 32];
/// See [`ORGANISATION`].
pub(crate) const TENANT: [u8; 32] = [4; 32];
/// When the story begins: 2026-11-24T00:00:00Z.
pub(crate) const START: Wall = Wall(1_795_478_400_000);

/// Every object of the story.
#[allow(dead_code)] // not every test needs each
pub(crate) struct Story {
    pub(crate) fabric: FabricId,
    pub(crate) charter: Signed,
    pub(crate) lessor_certificate: Signed,
    pub(crate) delegate_certificate: Signed,
    pub(crate) tenant_certificate: Signed,
    pub(crate) host: Signed,
    pub(crate) offer: Signed,
    pub(crate) mandate: Signed,
    pub(crate) order: Signed,
    pub(crate) grant: Signed,
    pub(crate) refusal: Signed,
    pub(crate) claim: Signed,
    pub(crate) acceptance: Signed,
    pub(crate) renew: Signed,
    pub(crate) renewal: Signed,
    pub(crate) gang: Signed,
    pub(crate) commit: Signed,
    pub(crate) reinstatement: Signed,
    pub(crate) payloads: Signed,
    pub(crate) served: Signed,
    pub(crate) receipts: Vec<Signed>,
    pub(crate) acknowledgements: Vec<Signed>,
    pub(crate) objection: Signed,
    pub(crate) release: Signed,
    pub(crate) termination: Signed,
}

/// Signs for one key in one fabric, numbering what it signs.
struct Pen {
    signer: Signer,
    fabric: FabricId,
    seq: u64,
}

impl Pen {
    fn of(seed: &[u8; 32], fabric: FabricId) -> Self {
        Self { signer: Signer::from_seed(seed), fabric, seq: 0 }
    }

    fn sign<T: Body>(&mut self, subject: Hash, body: &T) -> Signed {
        self.seq += 1;
        let header = HeaderOf {
            fabric: self.fabric,
            signer: self.signer.id(),
            subject,
            epoch: 7,
            seq: self.seq,
            not_after: START + Span::secs(86_400),
        };
        self.signer.sign(&Draft::new(header, body).expect("it fits")).expect("it is the signer")
    }
}

fn payload(bytes: &[u8]) -> Payload {
    Payload { root: Hash::of(bytes), size: bytes.len() as u64 }
}

#[allow(dead_code)] // not every test needs each
impl Story {
    /// Tells it.
    pub(crate) fn new() -> Self {
        let [root, node, delegate, tenant] =
            [ORGANISATION, LESSOR, DELEGATE, TENANT].map(|seed| Signer::from_seed(&seed).id());
        let charter = Charter {
            name: "harbour".into(),
            currency: "EUR".into(),
            number: 1,
            previous: None,
            organisations: vec![Organisation { name: "quay".into(), root, max_nodes: 16 }],
            limits: Limits { max_term: Span::secs(2_592_000), max_order_life: Span::secs(86_400) },
        };
        let charter = Pen::of(&ORGANISATION, FabricId::default()).sign(Hash::default(), &charter);
        let fabric = FabricId(charter.id());
        let [mut root_pen, mut node_pen, mut delegate_pen, mut tenant_pen] =
            [ORGANISATION, LESSOR, DELEGATE, TENANT].map(|seed| Pen::of(&seed, fabric));
        let mut admit = |name: &str, key, role| {
            let organisation = "quay".into();
            let body =
                Certificate { organisation, name: name.into(), role, key, not_before: START };
            root_pen.sign(key_subject(&key), &body)
        };
        let lessor_certificate = admit("crane", node, Role::Node);
        let delegate_certificate = admit("barge", delegate, Role::Node);
        let tenant_certificate = admit("ada", tenant, Role::Tenant);
        let shape = Resources::new(2_000, 4 * GIB, 10 * GIB);
        let gpus = vec![Gpus { kind: "nvidia-h100-80gb-hbm3".into(), count: 8 }];
        let all = Resources { gpus, ..Resources::new(64_000, 256 * GIB, 1024 * GIB) };
        let rates = Rates {
            cpu_hour: Amount(20_000_000),
            memory_gib_hour: Amount(4_000_000),
            disk_gib_hour: Amount(100_000),
            gpu_hour: vec![GpuRate {
                kind: "nvidia-h100-80gb-hbm3".into(),
                hour: Amount(2_000_000_000),
            }],
        };
        let address = |port: u16| {
            vec![([127, 0, 0, 1], port).into(), ([0, 0, 0, 0, 0, 0, 0, 1], port).into()]
        };
        let host = HostRecord {
            name: "crane".into(),
            version: "0.1.0".into(),
            addresses: Addresses { link: address(7000), probe: address(7001), data: address(7002) },
            hardware: all.clone(),
            processor: "a processor".into(),
            labels: vec![("rack".into(), "9".into()), ("zone".into(), "a".into())],
            cell: 0,
            returns: 2,
            certificate: lessor_certificate.clone(),
        };
        let host = node_pen.sign(key_subject(&node), &host);
        let terms = ModelTerms {
            name: "lantern-135m".into(),
            digest: Hash::of(b"weights"),
            rates: TokenRates { prompt: Amount(100_000_000), completion: Amount(400_000_000) },
        };
        let rate = rates.hourly(&shape).expect("every kind has a rate");
        let early =
            EarlyEnd { notice: Span::secs(30), freeze: Span::secs(5), credit_permille: 100 };
        let offer = Offer {
            models: vec![ModelOffer {
                terms: terms.clone(),
                slack: Some(terms.rates.permille(600)),
                quantisation: "Q8_0".into(),
                context: 8_192,
                endpoints: vec![Endpoint::Chat, Endpoint::Completions],
                abilities: 0b1000_0001,
                demo: true,
                state: ModelState::Warm,
                load: 2,
                tokens_per_second: 60,
                first_token: Span::millis(40),
            }],
            shapes: vec![all],
            rates,
            slack_permille: 600,
            early,
            classes: vec![Class::Firm, Class::Slack],
            max_term: Span::secs(86_400),
            runtimes: vec!["wasm".into()],
            isolation: vec!["wasm".into(), "landlock7".into()],
        };
        let offer = node_pen.sign(key_subject(&node), &offer);
        let mandate = Mandate {
            delegate,
            certificate: tenant_certificate.clone(),
            not_before: START,
            max_hourly: Amount(1_000_000_000),
            max_total: Amount(5_000_000_000),
            max_term: Span::secs(7_200),
            lessors: vec![node],
        };
        let mandate = tenant_pen.sign(key_subject(&delegate), &mandate);
        let request = RequestId::derive(&[b"the story"]);
        let order = Order {
            model: None,
            lessee: tenant,
            delegate,
            authority: Authority::Mandate(mandate.clone()),
            lessor: node,
            offer: offer.id(),
            request,
            shape: shape.clone(),
            class: Class::Firm,
            term: Span::secs(3_600),
            longest: Span::secs(7_200),
            gang: Some(GangOf { gang: RequestId::derive(&[b"the crew"]), size: 2 }),
            claim_within: Span::secs(10),
            ceiling: Amount(100_000_000),
            cap: Amount(50_000_000),
            exposure: Amount(1_000_000),
            receipt_every: Span::secs(10),
            placed: START + Span::secs(60),
        };
        let signed_order = delegate_pen.sign(order_subject(&tenant, &request), &order);
        let refusal = Refusal {
            of: signed_order.id(),
            reason: Reason::Capacity,
            figures: vec![Figure { of: "cpu_milli".into(), have: 1_000, need: 2_000 }],
            offer: Some(offer.clone()),
            referrals: vec![delegate],
        };
        let refusal = node_pen.sign(signed_order.id(), &refusal);
        let grant = Grant {
            model: None,
            order: signed_order.id(),
            lessee: tenant,
            delegate,
            shape,
            class: Class::Firm,
            rate,
            cap: order.cap,
            exposure: order.exposure,
            term: order.term,
            longest: order.longest,
            early,
            gang: order.gang,
            claim_within: order.claim_within,
            grace: Span::secs(5),
            receipt_every: order.receipt_every,
            fence: Fence { epoch: 7, number: 1 },
            decided: START + Span::secs(61),
            certificate: lessor_certificate.clone(),
        };
        let signed_grant = node_pen.sign(signed_order.id(), &grant);
        let lease = LeaseId(signed_grant.id());
        let act = |what: &[u8]| RequestId::derive(&[&lease.0.0, what]);
        let job = JobSpec {
            runtime: "wasm".into(),
            program: payload(b"a program"),
            args: vec!["--fast".into()],
            env: vec![("LANG".into(), "C".into())],
            stdin: Some(payload(b"")),
            inputs: vec![
                Input { name: "in.txt".into(), payload: payload(b"an input"), index: None },
                Input { name: "model".into(), payload: payload(b"an index"), index: Some(3 << 30) },
            ],
            outputs: vec!["out.txt".into()],
            release_after: true,
        };
        let claim = delegate_pen.sign(lease.0, &Claim { lease, act: act(b"claim"), job });
        let acceptance = Acceptance { lease, act: act(b"claim"), of: claim.id() };
        let acceptance = node_pen.sign(claim.id(), &acceptance);
        let release = delegate_pen.sign(lease.0, &Release { lease, act: act(b"release") });
        let term = Span::secs(5_400);
        let renew = Renew { lease, act: act(b"renew"), version: 0, term };
        let renew = delegate_pen.sign(lease.0, &renew);
        let renewal = Renewal { lease, act: act(b"renew"), of: renew.id(), version: 1, term };
        let renewal = node_pen.sign(lease.0, &renewal);
        let number = RequestId::derive(&[b"the crew"]);
        let other = Member { lessor: delegate, lease: LeaseId(Hash::of(b"another lease")) };
        let members = vec![Member { lessor: node, lease }, other];
        let gang = Gang { gang: number, lessee: tenant, delegate, members };
        let gang = delegate_pen.sign(order_subject(&tenant, &number), &gang);
        let commit = node_pen.sign(lease.0, &Commit { gang: gang.id(), lease });
        let organisation = "quay".into();
        let reinstatement = Reinstatement { organisation, key: node, above: 7 };
        let reinstatement = root_pen.sign(key_subject(&node), &reinstatement);
        let mut chain = Chain::default();
        let (mut receipts, mut acknowledgements) = (Vec::new(), Vec::new());
        for (seconds, end) in [(10, None), (20, None), (27, Some(EndReason::Released))] {
            let usage = Usage {
                billed: Span::secs(seconds),
                cpu: Span::millis(seconds * 900),
                memory_mib_ms: seconds * 512_000,
                memory_peak: GIB,
                ..Usage::default()
            };
            let at = START + Span::secs(62 + seconds);
            let receipt: Receipt = chain.next(lease, (&grant, term), usage, end, at);
            let signed = node_pen.sign(lease.0, &receipt);
            chain.advance(&receipt, signed.id());
            let (number, charge) = (receipt.number, receipt.charge);
            let acknowledgement = Acknowledgement { lease, number, receipt: signed.id(), charge };
            acknowledgements.push(delegate_pen.sign(lease.0, &acknowledgement));
            receipts.push(signed);
        }
        let (receipt, charge) = (chain.last, chain.charge);
        let objection = Objection { lease, receipt, reason: ObjectionReason::Time, charge };
        let objection = delegate_pen.sign(lease.0, &objection);
        let termination = Termination {
            lease,
            reason: EndReason::Released,
            by: delegate,
            at: START + Span::secs(89),
            billed: chain.usage.billed,
            charge,
            missed: Span::ZERO,
            credit: Amount::ZERO,
            receipt,
            outcome: Some(Outcome::Exited(0)),
        };
        let termination = node_pen.sign(lease.0, &termination);
        // After all that was there before them, so that the numbers of the others stay.
        let mut roots =
            [&b"a program"[..], b"an input"].map(|bytes| Payloads::brief(&Hash::of(bytes)));
        roots.sort_unstable();
        let payloads = node_pen.sign(key_subject(&node), &Payloads { roots: roots.to_vec() });
        let service = Service {
            endpoint: Endpoint::Chat,
            request: Hash::of(b"a request"),
            response: Hash::of(b"an answer"),
            sampling: Sampling {
                temperature_permille: Some(700),
                top_p_permille: None,
                seed: Some(-1),
                max_tokens: Some(64),
            },
            finish: Finish::Answered,
            prompt_tokens: 31,
            cached_tokens: 7,
            completion_tokens: 12,
        };
        let at = START + Span::secs(70);
        let served = Tally::default().next(lease, terms.digest, service, at);
        let served = node_pen.sign(lease.0, &served);
        Self {
            fabric,
            charter,
            lessor_certificate,
            delegate_certificate,
            tenant_certificate,
            host,
            offer,
            mandate,
            order: signed_order,
            grant: signed_grant,
            refusal,
            claim,
            acceptance,
            renew,
            renewal,
            gang,
            commit,
            reinstatement,
            payloads,
            served,
            receipts,
            acknowledgements,
            objection,
            release,
            termination,
        }
    }

    /// The lease with everything that proves it.
    pub(crate) fn proof(&self) -> Proof {
        Proof {
            served: Vec::new(),
            charter: self.charter.clone(),
            offer: Some(self.offer.clone()),
            order: self.order.clone(),
            grant: self.grant.clone(),
            renewals: vec![self.renew.clone(), self.renewal.clone()],
            receipts: self.receipts.clone(),
            acknowledgements: self.acknowledgements.clone(),
            termination: Some(self.termination.clone()),
        }
    }

    /// What the lessor must not sign: another offer under the same version.
    pub(crate) fn equivocation(&self) -> Equivocation {
        let envelope = Envelope::decode(&self.offer.envelope).expect("an envelope");
        let mut body: Offer = envelope.read().expect("an offer");
        body.max_term = Span::secs(1);
        let draft = Draft::new((&envelope.header).into(), &body).expect("it fits");
        let second = Signer::from_seed(&LESSOR).sign(&draft).expect("it is the signer");
        Equivocation { first: self.offer.clone(), second }
    }

    /// One object of every kind, by the kind's name.
    pub(crate) fn objects(&self) -> Vec<(String, Signed)> {
        [
            &self.charter,
            &self.tenant_certificate,
            &self.host,
            &self.offer,
            &self.mandate,
            &self.order,
            &self.grant,
            &self.refusal,
            &self.claim,
            &self.acceptance,
            &self.release,
            &self.termination,
            &self.receipts[2],
            &self.acknowledgements[2],
            &self.objection,
            &self.renew,
            &self.renewal,
            &self.gang,
            &self.commit,
            &self.reinstatement,
            &self.payloads,
            &self.served,
        ]
        .map(|signed| {
            let kind = signed.header().expect("an envelope").kind;
            (kind.name().into_owned(), signed.clone())
        })
        .to_vec()
    }

    /// One message of every sort, by a name of its own.
    pub(crate) fn messages(&self) -> Vec<(&'static str, Message)> {
        let key = Signer::from_seed(&LESSOR).id();
        let lease = LeaseId(self.grant.id());
        let names = vec![
            RecordName { key, kind: Kind::HostRecord, epoch: 7, seq: 1, tag: 9 },
            RecordName { key, kind: Kind::Unknown(700), epoch: 7, seq: 2, tag: 8 },
        ];
        let buckets = (0..BUCKETS as u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        vec![
            (
                "hello",
                Message::Hello {
                    charter: self.charter.id(),
                    certificate: self.lessor_certificate.clone(),
                    epoch: 7,
                    seen: Some(Box::new(self.host.clone())),
                },
            ),
            ("announce", Message::Announce(names.clone())),
            ("pull", Message::Pull(names.clone())),
            ("records", Message::Records(vec![self.host.clone(), self.offer.clone()])),
            ("digest", Message::Digest(buckets)),
            ("differ", Message::Differ { buckets: vec![1, 7], names }),
            ("order", Message::Order(self.order.clone())),
            ("granted", Message::Granted(self.grant.clone())),
            ("refused", Message::Refused(self.refusal.clone())),
            ("claim", Message::Claim(self.claim.clone())),
            ("release", Message::Release(self.release.clone())),
            ("accepted", Message::Accepted(self.acceptance.clone())),
            ("receipt", Message::Receipt(self.receipts[0].clone())),
            ("acknowledged", Message::Acknowledged(self.acknowledgements[0].clone())),
            ("objected", Message::Objected(self.objection.clone())),
            ("terminated", Message::Terminated(self.termination.clone())),
            ("inquire", Message::Inquire(lease)),
            ("done", Message::Done),
            ("renew", Message::Renew(self.renew.clone())),
            ("renewed", Message::Renewed(self.renewal.clone())),
            ("gang", Message::Gang(self.gang.clone(), Some(self.claim.clone()))),
            ("committed", Message::Committed(self.commit.clone())),
            ("commits", Message::Commits(lease, vec![self.commit.clone()])),
            (
                "conduct",
                Message::Conduct(vec![self.equivocation()], vec![self.reinstatement.clone()]),
            ),
        ]
    }
}
