//! Who the people and nodes of a virtual fabric are: real keys, charter, certificates, mandates.

use leasehold_proto::base::dice::Dice;
use leasehold_proto::base::id::{FabricId, Hash, KeyId};
use leasehold_proto::base::money::{Amount, UNIT};
use leasehold_proto::base::time::{Span, Wall};
use leasehold_proto::words::charter::{Certificate, Charter, Limits, Organisation, Role};
use leasehold_proto::words::contract::Mandate;
use leasehold_proto::words::object::{Body, key_subject};
use leasehold_proto::words::sign::{Draft, HeaderOf, Signed, Signer, VerifyError};

use super::host::START;

/// How long what founds the fabric is valid.
const LIFE: Span = Span::secs(365 * 24 * 3600);

/// A fabric of one organisation.
#[derive(Debug)]
pub(super) struct Fabric {
    pub(super) id: FabricId,
    pub(super) charter: Signed,
    root: Signer,
    from: Wall,
}

/// A node with the lessee that it acts for.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) key: KeyId,
    pub(super) node: Signer,
    pub(super) certificate: Signed,
    pub(super) tenant: Signer,
    pub(super) tenant_certificate: Signed,
    pub(super) mandate: Signed,
}

/// Why a fabric cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// An object does not fit its envelope.
    #[error("an object of the fabric cannot be encoded: {0}")]
    Encode(#[from] leasehold_proto::words::wire::EncodeError),
    /// An object cannot be signed.
    #[error("an object of the fabric cannot be signed: {0}")]
    Sign(#[from] VerifyError),
}

fn signer(dice: &mut Dice) -> Signer {
    let mut seed = [0; 32];
    for part in seed.chunks_mut(8) {
        part.copy_from_slice(&dice.number().to_le_bytes());
    }
    Signer::from_seed(&seed)
}

impl Fabric {
    pub(super) fn found(dice: &mut Dice) -> Result<Self, FabricError> {
        // It was founded longer ago than any clock is set back.
        let from = Wall(START.0.saturating_sub(24 * 3_600_000));
        let root = signer(dice);
        let charter = Charter {
            name: "virtual".into(),
            currency: "EUR".into(),
            number: 1,
            previous: None,
            organisations: vec![Organisation {
                name: "acme".into(),
                root: root.id(),
                max_nodes: 10_000,
            }],
            limits: Limits {
                max_term: Span::secs(24 * 3600),
                max_order_life: Span::secs(24 * 3600),
            },
        };
        let fabric = FabricId::default();
        let header = HeaderOf {
            fabric,
            signer: root.id(),
            subject: Hash::default(),
            epoch: 0,
            seq: 1,
            not_after: from + LIFE,
        };
        let charter = root.sign(&Draft::new(header, &charter)?)?;
        Ok(Self { id: FabricId(charter.id()), charter, root, from })
    }

    fn sign<T: Body>(&self, by: &Signer, about: &KeyId, body: &T) -> Result<Signed, FabricError> {
        let header = HeaderOf {
            fabric: self.id,
            signer: by.id(),
            subject: key_subject(about),
            epoch: 0,
            seq: 1,
            not_after: self.from + LIFE,
        };
        Ok(by.sign(&Draft::new(header, body)?)?)
    }

    fn admit(&self, key: KeyId, role: Role, name: String) -> Result<Signed, FabricError> {
        let organisation = "acme".into();
        let body = Certificate { organisation, name, role, key, not_before: self.from };
        self.sign(&self.root, &key, &body)
    }

    pub(super) fn member(&self, dice: &mut Dice, nth: usize) -> Result<Identity, FabricError> {
        let (node, tenant) = (signer(dice), signer(dice));
        let key = node.id();
        let certificate = self.admit(key, Role::Node, format!("node-{nth}"))?;
        let tenant_certificate = self.admit(tenant.id(), Role::Tenant, format!("tenant-{nth}"))?;
        let mandate = Mandate {
            delegate: key,
            certificate: tenant_certificate.clone(),
            not_before: self.from,
            max_hourly: Amount(100 * UNIT),
            max_total: Amount(1_000 * UNIT),
            max_term: Span::secs(3600),
            lessors: Vec::new(),
        };
        let mandate = self.sign(&tenant, &key, &mandate)?;
        Ok(Identity { key, node, certificate, tenant, tenant_certificate, mandate })
    }
}
