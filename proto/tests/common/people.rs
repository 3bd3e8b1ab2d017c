//! Signed objects for the tests of the state machines: a charter, a lessor, a lessee's delegate.
//! (A module of the other test files, not a test of its own.)
#![allow(dead_code, unreachable_pub)] // each test file uses its part

use leasehold_proto::base::id::{FabricId, Hash, KeyId, LeaseId, RequestId};
use leasehold_proto::base::money::{Amount, UNIT};
use leasehold_proto::base::plant::Plant;
use leasehold_proto::base::resource::{Rates, Resources};
use leasehold_proto::base::time::{Boot, BootId, Now, Span, Wall};
use leasehold_proto::minds::book::{Book, Placed, Quote};
use leasehold_proto::words::charter::{Certificate, Charter, Limits, Organisation, Role};
use leasehold_proto::words::contract::{
    Authority, Class, EarlyEnd, Grant, JobSpec, Mandate, Order,
};
use leasehold_proto::words::object::{Body, body_in, key_subject, order_subject};
use leasehold_proto::words::sign::{Draft, Hand, HeaderOf, Signed, Signer, Verified};
use leasehold_proto::words::want::{Choice, Want};

/// What the wall clock reads when the boot clock reads zero.
pub const WALL: Wall = Wall(1_790_000_000_000);

pub struct People {
    pub fabric: FabricId,
    pub charter: Signed,
    pub root: Signer,
    /// The root of another organisation of the same fabric, called "emca".
    pub other_root: Signer,
    pub lessor: Signer,
    pub lessor_certificate: Signed,
    pub delegate: Signer,
    pub delegate_certificate: Signed,
    pub tenant: Signer,
    pub tenant_certificate: Signed,
    pub mandate: Signed,
}

pub fn now(ms: u64) -> Now {
    Now { boot: Boot(ms), wall: WALL + Span::millis(ms) }
}

pub fn sign<T: Body>(fabric: FabricId, by: &Signer, subject: Hash, body: &T) -> Signed {
    sign_until(fabric, by, subject, WALL + Span::secs(3600), body)
}

pub fn sign_until<T: Body>(
    fabric: FabricId,
    by: &Signer,
    subject: Hash,
    not_after: Wall,
    body: &T,
) -> Signed {
    let header = HeaderOf { fabric, signer: by.id(), subject, epoch: 1, seq: 0, not_after };
    by.sign(&Draft::new(header, body).expect("it fits")).expect("it is its signer's")
}

impl People {
    pub fn new() -> Self {
        let [root, lessor, delegate, tenant, other_root] =
            [1u8, 2, 3, 4, 5].map(|n| Signer::from_seed(&[n; 32]));
        let organisations = [("acme", root.id()), ("emca", other_root.id())];
        let organisations = organisations
            .map(|(name, root)| Organisation { name: name.into(), root, max_nodes: 9 })
            .to_vec();
        let charter = Charter {
            name: "test".into(),
            currency: "EUR".into(),
            number: 1,
            previous: None,
            organisations,
            limits: Limits { max_term: Span::secs(3600), max_order_life: Span::secs(3600) },
        };
        let charter = sign(FabricId::default(), &root, Hash::default(), &charter);
        let fabric = FabricId(charter.id());
        let admit = |key: KeyId, role: Role, name: &str| {
            let (organisation, name) = ("acme".into(), name.into());
            let body = Certificate { organisation, name, role, key, not_before: Wall(0) };
            sign(fabric, &root, key_subject(&key), &body)
        };
        let lessor_certificate = admit(lessor.id(), Role::Node, "lessor");
        let delegate_certificate = admit(delegate.id(), Role::Node, "delegate");
        let tenant_certificate = admit(tenant.id(), Role::Tenant, "tenant");
        let mandate = Mandate {
            delegate: delegate.id(),
            certificate: tenant_certificate.clone(),
            not_before: Wall(0),
            max_hourly: Amount(10 * UNIT),
            max_total: Amount(10 * UNIT),
            max_term: Span::secs(600),
            lessors: Vec::new(),
        };
        let mandate = sign(fabric, &tenant, key_subject(&delegate.id()), &mandate);
        Self {
            fabric,
            charter,
            root,
            other_root,
            lessor,
            lessor_certificate,
            delegate,
            delegate_certificate,
            tenant,
            tenant_certificate,
            mandate,
        }
    }

    /// The certificate that the first organisation gives a node's key.
    pub fn certificate(&self, key: KeyId, name: &str) -> Signed {
        let (organisation, name) = ("acme".into(), name.into());
        let body = Certificate { organisation, name, role: Role::Node, key, not_before: Wall(0) };
        sign(self.fabric, &self.root, key_subject(&key), &body)
    }

    pub fn hand(&self, epoch: u64) -> Hand {
        Hand { fabric: self.fabric, me: self.lessor.id(), epoch }
    }

    /// Ten seconds' notice, two frozen, and half of what is missed.
    pub fn early() -> EarlyEnd {
        let (notice, freeze) = (Span::secs(10), Span::secs(2));
        EarlyEnd { notice, freeze, credit_permille: 500 }
    }

    pub fn rates() -> Rates {
        Rates { cpu_hour: Amount(36_000_000_000), ..Rates::default() }
    }

    /// An order of `cores` for `term`, to be claimed within `claim`.
    pub fn order_body(&self, request: u8, cores: u64, term: Span, claim: Span) -> Order {
        Order {
            model: None,
            lessee: self.tenant.id(),
            delegate: self.delegate.id(),
            authority: Authority::Mandate(self.mandate.clone()),
            lessor: self.lessor.id(),
            offer: Hash::default(),
            request: RequestId([request; 16]),
            shape: Resources::new(cores * 1000, cores << 30, 0),
            class: Class::Firm,
            term,
            longest: term,
            gang: None,
            claim_within: claim,
            ceiling: Amount::MAX,
            cap: Amount(10 * UNIT),
            exposure: Amount(10 * UNIT),
            receipt_every: Span::secs(1),
            placed: WALL,
        }
    }

    pub fn order(&self, body: &Order) -> Verified<Order> {
        self.order_until(body, WALL + Span::secs(30))
    }

    pub fn order_until(&self, body: &Order, not_after: Wall) -> Verified<Order> {
        let subject = order_subject(&body.lessee, &body.request);
        let signed = sign_until(self.fabric, &self.delegate, subject, not_after, body);
        signed.verify(&self.fabric).expect("it holds")
    }

    /// An object that the delegate signs.
    pub fn acts<T: Body>(&self, subject: Hash, body: &T) -> Verified<T> {
        sign(self.fabric, &self.delegate, subject, body).verify(&self.fabric).expect("it holds")
    }

    /// A draft of the lessor's, signed and verified.
    pub fn says<T: Body>(&self, draft: &Draft) -> Verified<T> {
        let signed = self.lessor.sign(draft).expect("it is the lessor's");
        signed.verify(&self.fabric).expect("it holds")
    }

    /// A book over `cores`, planted with nothing.
    pub fn book(&self, cores: u64, epoch: u64) -> Book {
        let capacity = Resources::new(cores * 1000, cores << 30, 0);
        let certificate = self.lessor_certificate.clone();
        let grace = Span::secs(2);
        Book::new(self.hand(epoch), certificate, BOOT, grace, capacity, Plant::NONE)
    }

    pub fn offer(&self) -> Draft {
        use leasehold_proto::words::record::Offer;
        let offer = Offer {
            models: Vec::new(),
            shapes: Vec::new(),
            rates: Self::rates(),
            slack_permille: 500,
            early: Self::early(),
            classes: vec![Class::Firm],
            max_term: Span::secs(3600),
            runtimes: vec!["wasm".into()],
            isolation: Vec::new(),
        };
        let subject = key_subject(&self.lessor.id());
        self.hand(1).draft(subject, 1, WALL + Span::secs(900), &offer).expect("it fits")
    }

    /// Places `order` at `book` under an offer that it honours.
    pub fn place(&self, book: &mut Book, at: Now, order: &Verified<Order>) -> Placed {
        let offer = self.offer();
        let rate = Self::rates().hourly(&order.body().shape);
        let offer = Some((&offer, rate, Self::early()));
        book.place(at, order, &Quote { offer, sold: Ok(()) })
    }

    /// Places an order that must be granted.
    pub fn granted(&self, book: &mut Book, at: Now, order: &Verified<Order>) -> (LeaseId, Draft) {
        match self.place(book, at, order) {
            Placed::Granted(lease, draft) => (lease, draft),
            other => panic!("granted: {other:?}"),
        }
    }
}

pub const BOOT: BootId = BootId([7; 16]);

pub fn job() -> JobSpec {
    JobSpec {
        runtime: "wasm".into(),
        program: leasehold_proto::base::id::Payload::default(),
        args: Vec::new(),
        env: Vec::new(),
        stdin: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
        release_after: false,
    }
}

pub fn body_of<T: Body>(draft: &Draft) -> T {
    body_in(&draft.envelope).expect("its body")
}

pub fn grant_of(draft: &Draft) -> Grant {
    body_of(draft)
}

/// The host with this number, as it was ranked.
pub fn choice(n: u8) -> Choice {
    Choice {
        lessor: KeyId([n; 32]),
        name: format!("host-{n}"),
        offer: Hash([n; 32]),
        rate: Amount(1),
        worst_case: Amount(1),
        score: n.into(),
        why: String::new(),
    }
}

/// What a lessee wants of any of them.
pub fn want() -> Want {
    Want {
        model: None,
        shape: Resources::new(1000, 1 << 30, 0),
        class: Class::Firm,
        term: Span::secs(60),
        longest: Span::secs(60),
        claim_within: Span::secs(10),
        max_hourly: Amount::MAX,
        budget: Amount::MAX,
        exposure: Amount::MAX,
        receipt_every: Span::secs(1),
        runtime: "wasm".into(),
        lessors: Vec::new(),
        labels: Vec::new(),
        isolation: Vec::new(),
    }
}
