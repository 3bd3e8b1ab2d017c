//! A fabric of one organisation in a room of its own, and homes for its nodes.

use leasehold_keys::file::{Protection, Secret};
use leasehold_node::home::{Allowance, Founder, Founding, Home, mandate};
use leasehold_proto::words::charter::Role;
use leasehold_proto::{Amount, Span, Wall};

pub(crate) struct Fabric {
    pub(crate) founder: Founder,
    pub(crate) room: tempfile::TempDir,
    pub(crate) now: Wall,
}

impl Fabric {
    pub(crate) fn new() -> Self {
        let now = leasehold_node::clock::now().wall;
        let root = Secret::generate().expect("randomness");
        let founding = Founding {
            fabric: "test".into(),
            currency: "USD".into(),
            organisation: "acme".into(),
            max_term: Span::secs(3600),
            max_order_life: Span::secs(600),
        };
        let founder = Founder::found(root, &founding, now).expect("founds");
        Self { founder, room: tempfile::tempdir().expect("room"), now }
    }

    /// A home with a node in it that may order.
    pub(crate) fn home(&self, name: &str) -> Home {
        let home = Home::at(self.room.path().join(name));
        home.create().expect("home");
        let key = home.new_key("node.key", &Protection::Clear).expect("key");
        let certificate = self.founder.admit(key.id(), Role::Node, name, self.now).expect("admits");
        home.put("charter", &self.founder.charter).expect("charter");
        home.put("certificate", &certificate).expect("certificate");
        let tenant = Secret::generate().expect("randomness");
        let admitted = self.founder.admit(tenant.id(), Role::Tenant, "tenant", self.now);
        let admitted = admitted.expect("admits");
        let allowance = Allowance {
            max_hourly: Amount(u64::MAX),
            max_total: Amount(u64::MAX),
            max_term: Span::secs(3600),
        };
        let mandate = mandate(&tenant, &admitted, key.id(), allowance, self.now).expect("mandate");
        home.put("mandate", &mandate).expect("mandate");
        home
    }
}
