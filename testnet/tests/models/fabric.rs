//! A fabric with models: real nodes, what they sell, and what both sides of a lease know of it.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use leasehold_keys::armor::{self, Item};
use leasehold_node::api::body::{LeaseLine, Leases, Side, Uploaded};
use leasehold_node::api::model::{ModelLine, ModelLines, ModelSpec, PriceText, UpstreamText};
use leasehold_node::api::token::{self, Token};
use leasehold_node::api::want::PayloadText;
use leasehold_node::client::{Client, escaped};
use leasehold_node::config::Config;
use leasehold_node::model::embedded::tiny::Tiny;
use leasehold_proto::proof::{self, Verdict};
use leasehold_testnet::fleet::{self, Fleet, Plan};

use super::PATIENCE;
use super::upstream::Upstream;
use super::web::{Web, until};

/// The node that clients talk to: the first one.
pub(crate) const ENTRY: usize = 0;

/// Nodes that see each other, of which the first sells nothing.
#[derive(Debug)]
pub(crate) struct Fabric {
    pub(crate) fleet: Fleet,
}

fn config(name: &str, sells: bool) -> Config {
    let mut config = fleet::config(name);
    config.offer.sell = sells;
    config.offer.disk = "1G".into();
    config.models.threads = 1;
    config.log.filter = "info".into();
    config
}

pub(crate) fn price(prompt: &str, completion: &str) -> PriceText {
    PriceText { prompt: prompt.into(), completion: completion.into() }
}

impl Fabric {
    pub(crate) async fn start(sellers: &[&str]) -> Self {
        Self::with(sellers, |_| ()).await
    }

    /// The same, with something changed at the entry node.
    pub(crate) async fn with(sellers: &[&str], change: impl FnOnce(&mut Config)) -> Self {
        let mut entry = config("entry", false);
        change(&mut entry);
        let nodes = sellers.iter().map(|name| config(name, true));
        let nodes = std::iter::once(entry).chain(nodes).collect();
        let program: PathBuf = env!("CARGO_BIN_EXE_leasehold-testnet").into();
        let fleet = Fleet::start(Plan { program, ..Plan::new(nodes) }).await.expect("starts");
        fleet.map(PATIENCE).await.expect("all see all");
        Self { fleet }
    }

    pub(crate) fn client(&self, node: usize) -> Client {
        self.fleet.member(node).expect("there").client().expect("runs")
    }

    /// A client of the entry node's models with the node's own token.
    pub(crate) fn web(&self) -> Web {
        let member = self.fleet.member(ENTRY).expect("there");
        let token = Token::read(&member.dir().join(token::FILE)).expect("reads");
        Web { at: member.file().expect("runs").api, key: Some(token.reveal().to_string()) }
    }

    pub(crate) async fn put(&self, node: usize, name: &str, spec: &ModelSpec) -> ModelLine {
        let path = format!("/v1/catalog/{}", escaped(name));
        self.client(node).put(&path, spec).await.expect("it is taken in")
    }

    /// Gives a node a tiny model of random weights, always the same, and has it sold.
    pub(crate) async fn tiny(&self, node: usize, name: &str, price: PriceText) -> ModelLine {
        let room = tempfile::tempdir().expect("room");
        let path = room.path().join("tiny.gguf");
        Tiny::default().write(&path).expect("written");
        let bytes = std::fs::read(&path).expect("read");
        let weights = self.upload(node, bytes).await;
        let (weights, price) = (Some(weights), Some(price));
        let spec = ModelSpec { weights, price, serve: Some(true), ..ModelSpec::default() };
        self.put(node, name, &spec).await
    }

    pub(crate) async fn upload(&self, node: usize, bytes: Vec<u8>) -> PayloadText {
        let path = format!("/v1/payloads?size={}", bytes.len());
        let source = futures::stream::iter([Ok(Bytes::from(bytes))]);
        let uploaded = self.client(node).upload::<Uploaded>(&path, source, PATIENCE).await;
        let Uploaded { root, size, .. } = uploaded.expect("it is kept");
        PayloadText { root, size }
    }

    /// Has a node sell a model that a server has under the name `there`.
    pub(crate) async fn upstream(
        &self,
        node: usize,
        (name, there): (&str, &str),
        upstream: &Upstream,
        price: PriceText,
    ) {
        let (url, model) = (upstream.url(), Some(there.to_owned()));
        let upstream = Some(UpstreamText { url, model, key_file: None });
        let (price, serve) = (Some(price), Some(true));
        let spec = ModelSpec { upstream, price, serve, ..ModelSpec::default() };
        self.put(node, name, &spec).await;
    }

    /// Waits until the entry node knows that so many nodes have the model ready.
    pub(crate) async fn offered(&self, model: &str, by: u64) {
        let web = self.web();
        let path = format!("/v1/models/{model}");
        until(&format!("{model} at {by} nodes"), PATIENCE, || async {
            let answer = web.get(&path).await;
            let said = answer.json();
            (said["warm"] == by).then_some(()).ok_or_else(|| said.to_string())
        })
        .await;
    }

    /// How a model fares at a node.
    pub(crate) async fn model(&self, node: usize, name: &str) -> ModelLine {
        let lines: ModelLines = self.client(node).get("/v1/catalog").await.expect("answers");
        lines.models.into_iter().find(|line| line.name == name).expect("it is there")
    }

    /// Waits until nothing is asked of a model any more.
    pub(crate) async fn idle(&self, node: usize, name: &str, patience: Duration) {
        until(&format!("the rest of {name}"), patience, || async {
            let line = self.model(node, name).await;
            let (active, queued) = (line.active, line.queued);
            (active + queued == 0).then_some(()).ok_or_else(|| format!("{active} {queued}"))
        })
        .await;
    }

    /// The leases on a model, as a node knows them.
    pub(crate) async fn leases(&self, node: usize, side: Side, model: &str) -> Vec<LeaseLine> {
        let leases: Leases =
            self.client(node).get("/v1/leases?all=true").await.expect("it answers");
        let of = |line: &LeaseLine| {
            let named = line.model.as_ref().is_some_and(|used| used.name == model);
            line.side == side && named && line.lease.is_some()
        };
        leases.leases.into_iter().filter(of).collect()
    }

    /// The one lease of the entry node on a model.
    pub(crate) async fn held(&self, model: &str) -> LeaseLine {
        let mut held = self.leases(ENTRY, Side::Held, model).await;
        assert_eq!(held.len(), 1, "{held:?}");
        held.remove(0)
    }

    async fn line(&self, node: usize, side: Side, lease: &str) -> Option<LeaseLine> {
        let leases: Leases = self.client(node).get("/v1/leases?all=true").await.ok()?;
        let mut lines = leases.leases.into_iter();
        lines.find(|line| line.side == side && line.lease.as_deref() == Some(lease))
    }

    /// Waits until both sides of a lease have counted so many requests and the lessee has
    /// countersigned all that the lessor wrote; gives the lessor's line.
    pub(crate) async fn agreed(&self, lessor: usize, lease: &str, requests: u64) -> LeaseLine {
        until(&format!("agreement on {requests} requests"), PATIENCE, || async {
            let lent = self.line(lessor, Side::Lent, lease).await;
            let held = self.line(ENTRY, Side::Held, lease).await;
            let (Some(lent), Some(held)) = (lent, held) else { return Err("no lease".into()) };
            let used = |line: &LeaseLine| {
                let model = line.model.as_ref().expect("on a model");
                (model.requests, model.prompt_tokens, model.completion_tokens, line.charge)
            };
            let both = used(&lent) == used(&held) && used(&lent).0 == requests;
            let signed = lent.receipts > 0 && lent.acknowledged == lent.receipts;
            let calm = lent.objection.is_none() && held.objection.is_none();
            if both && signed && calm { Ok(lent) } else { Err(format!("{lent:?} {held:?}")) }
        })
        .await
    }

    /// What a node exports of a lease, checked without any node.
    pub(crate) async fn verdict(&self, node: usize, lease: &str) -> Verdict {
        let text = self.client(node).text(&format!("/v1/leases/{lease}/proof")).await;
        let mut items = armor::decode(text.expect("exported").as_bytes()).expect("decodes");
        match (items.pop(), items.pop()) {
            (Some(Item::Proof(proof)), None) => proof::check(&proof).expect("it holds"),
            other => panic!("not one proof: {other:?}"),
        }
    }

    /// Both sides' proofs of a lease, of which each says the same of so many requests.
    pub(crate) async fn proven(&self, lessor: usize, lease: &str, requests: u64) -> Verdict {
        let lent = self.agreed(lessor, lease, requests).await;
        let (theirs, ours) = (self.verdict(lessor, lease).await, self.verdict(ENTRY, lease).await);
        for verdict in [&theirs, &ours] {
            assert_eq!(verdict.requests_checked, requests, "{verdict:?}");
            assert_eq!(verdict.charge, lent.charge.0, "{verdict:?}");
            assert_eq!(verdict.acknowledged_charge, verdict.charge, "{verdict:?}");
            assert_eq!(verdict.acknowledged, verdict.receipts, "{verdict:?}");
            assert_eq!(
                verdict.model.as_ref().map(|terms| terms.name.as_str()),
                lent.model.as_ref().map(|used| used.name.as_str())
            );
        }
        assert!(ours.price_checked || theirs.price_checked);
        assert_eq!((theirs.lease, theirs.lessor), (ours.lease, ours.lessor));
        ours
    }

    /// One figure of a node's metrics.
    pub(crate) async fn metric(&self, node: usize, name: &str) -> u64 {
        let text = self.client(node).text("/metrics").await.expect("answers");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|figure| figure.trim().parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    /// Whether a node is well.
    pub(crate) async fn is_well(&self, node: usize) {
        let at = self.fleet.member(node).expect("there").file().expect("runs").api;
        let answer = Web { at, key: None }.get("/healthz").await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// Ends all, and nothing of it may have fallen over meanwhile.
    pub(crate) async fn stop(mut self) {
        for node in 0..self.fleet.members().len() {
            let fallen = self.fleet.fallen(node).expect("there");
            let log = self.fleet.member(node).expect("there").log();
            let log = std::fs::read_to_string(log).unwrap_or_default();
            assert!(fallen.is_none() && !log.contains("panicked"), "{fallen:?}\n{log}");
        }
        self.fleet.stop().await.expect("stops");
    }
}
