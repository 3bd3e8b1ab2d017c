//! What a node tells Prometheus (OpenMetrics text). Everything is read when it is asked for, from
//! the view and the edges' own counters, so that nothing is counted twice.

use std::fmt;
use std::sync::atomic::Ordering;

use leasehold_proto::Resources;
use leasehold_proto::core::View;
use leasehold_proto::minds::{book, holdings};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};

use crate::handle::Handle;
use crate::model::Listed;

/// The content type of what [`render`] writes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Gauges by label.
type ByLabel = Family<Vec<(&'static str, String)>, Gauge<f64, std::sync::atomic::AtomicU64>>;

/// Everything there is to tell about the node behind `handle`, whose view is `view`.
///
/// # Errors
/// When the text cannot be written.
pub fn render(view: &View, handle: &Handle) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    let fabric = registry.sub_registry_with_prefix("leasehold");
    membership(fabric, view);
    leases(fabric, view);
    inside(fabric, handle);
    models(fabric, handle);
    process(&mut registry);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn count(registry: &mut Registry, name: &str, help: &str, value: u64) {
    registry.register(name, help, ConstCounter::new(value));
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: impl TryInto<u64>) {
    registry.register(name, help, ConstGauge::new(value.try_into().unwrap_or(u64::MAX)));
}

// Gauges are floats in the exposition format; counts here stay below 2^53.
#[allow(clippy::cast_precision_loss)]
fn set(family: &ByLabel, labels: &[(&'static str, &str)], value: u64) {
    let labels = labels.iter().map(|(name, value)| (*name, (*value).to_string())).collect();
    family.get_or_create(&labels).set(value as f64);
}

fn membership(registry: &mut Registry, view: &View) {
    let up = view.nodes.iter().filter(|node| node.up).count();
    let nodes = ByLabel::default();
    set(&nodes, &[("state", "up")], up as u64);
    set(&nodes, &[("state", "down")], (view.nodes.len() - up) as u64);
    registry.register("nodes", "Nodes that are known, by whether they are held alive", nodes);
    let offering = view.nodes.iter().filter(|node| node.offer.is_some()).count();
    gauge(registry, "nodes_offering", "Nodes whose offer is known", offering);
    gauge(registry, "links", "Links that are up and admitted", view.links);
    gauge(registry, "records", "Records known of all nodes", view.records);
    gauge(registry, "joined", "Whether the node has joined", u64::from(view.joined));
    let halted = u64::from(view.halted.is_some());
    gauge(registry, "halted", "Whether the node grants nothing", halted);
    gauge(registry, "epoch", "The node's epoch: rises with each start", view.epoch);
    count(registry, "packets_refused", "Liveness packets refused", view.packets_refused);
}

fn leases(registry: &mut Registry, view: &View) {
    let lent = ByLabel::default();
    for (stage, word) in [
        (book::Stage::Granted, "granted"),
        (book::Stage::Active, "active"),
        (book::Stage::Draining, "draining"),
        (book::Stage::Ended, "ended"),
    ] {
        let n = view.lent.iter().filter(|lease| lease.stage == stage).count();
        set(&lent, &[("stage", word)], n as u64);
    }
    registry.register("leases_lent", "Leases this node granted and remembers, by stage", lent);
    let held = ByLabel::default();
    for (stage, word) in [
        (holdings::Stage::Ordered, "ordered"),
        (holdings::Stage::Granted, "granted"),
        (holdings::Stage::Claimed, "claimed"),
        (holdings::Stage::Ended, "ended"),
    ] {
        let n = view.held.iter().filter(|lease| lease.stage == stage).count();
        set(&held, &[("stage", word)], n as u64);
    }
    registry.register("leases_held", "Leases this node holds and remembers, by stage", held);
    let running = view.lent.iter().filter(|lease| lease.running).count();
    gauge(registry, "jobs_running", "Jobs whose processes exist here", running);
    gauge(registry, "pursuits", "Orders that wait for an answer", view.pursuits);

    let resources = ByLabel::default();
    for (word, quantity) in [("capacity", &view.capacity), ("promised", &view.promised)] {
        quantities(&resources, word, quantity);
    }
    let help = "What this node lends: cpu in thousandths of a core, memory and disk in bytes, \
        gpus by kind";
    registry.register("resources", help, resources);

    let of = &view.counters;
    for (name, help, value) in [
        ("orders", "Orders heard", of.orders),
        ("grants", "Grants given", of.grants),
        ("refusals", "Orders refused", of.refusals),
        ("leases_ended", "Leases ended", of.ended),
        ("leases_lapsed", "Leases that lapsed unclaimed", of.lapsed),
        ("receipts", "Receipts written", of.receipts),
        ("receipts_acknowledged", "Receipts countersigned by lessees", of.acknowledged),
        ("objections", "Objections heard", of.objections),
        ("offers_published", "Offers published", of.offers),
        ("equivocations", "Proofs of equivocation kept", of.equivocations),
    ] {
        count(registry, name, help, value);
    }
}

fn quantities(family: &ByLabel, word: &str, of: &Resources) {
    for (resource, value) in
        [("cpu_milli", of.cpu_milli), ("memory_bytes", of.memory), ("disk_bytes", of.disk)]
    {
        set(family, &[("resource", resource), ("is", word)], value);
    }
    for gpus in &of.gpus {
        let resource = format!("gpu_{}", gpus.kind);
        set(family, &[("resource", &resource), ("is", word)], u64::from(gpus.count));
    }
}

fn inside(registry: &mut Registry, handle: &Handle) {
    let counts = handle.counts();
    for (name, help, counter) in [
        ("loop_events", "Events that the loop handled", &counts.events),
        ("loop_batches", "Batches that the loop had kept", &counts.batches),
        ("rejected", "Frames and packets that did not verify", &counts.rejected),
        ("dropped", "Frames dropped because links were too busy", &counts.dropped),
    ] {
        count(registry, name, help, counter.load(Ordering::Relaxed));
    }
    let store = handle.store().stats();
    for (name, help, value) in [
        ("store_commits", "Batches made durable", store.commits),
        ("store_syncs", "Syncs of the journal; commits / syncs is the group size", store.syncs),
        ("store_journal_bytes", "Bytes written to the journal", store.bytes),
        ("store_checkpoints", "Checkpoints made", store.checkpoints),
        ("store_checkpoint_bytes", "Bytes written to checkpoints", store.checkpoint_bytes),
    ] {
        count(registry, name, help, value);
    }
    let (used, all) = (store.journal_used, store.journal_capacity);
    gauge(registry, "store_journal_used_bytes", "Bytes of the journal in use", used);
    gauge(registry, "store_journal_capacity_bytes", "Bytes that the journal has", all);

    let held = handle.payloads().stats();
    gauge(registry, "payloads", "Payloads held", held.payloads);
    gauge(registry, "payloads_bytes", "Their bytes on disk", held.bytes);
    gauge(registry, "payloads_reserved_bytes", "Room taken by what still arrives", held.reserved);
    count(registry, "payloads_set_aside", "Payloads that did not match", held.set_aside);

    let data = handle.data().stats();
    for (name, help, value) in [
        ("data_payload_sent_bytes", "Bytes of payloads sent", data.payload_sent),
        ("data_payload_received_bytes", "Bytes of payloads received", data.payload_received),
        ("data_accepted", "Connections taken up", data.accepted),
        ("data_not_admitted", "Connections and streams of keys not admitted", data.not_admitted),
        ("data_too_many", "Connections refused as too many", data.too_many),
        ("data_handshakes_failed", "Handshakes that failed", data.handshakes_failed),
        ("data_streams", "Streams that others opened", data.streams),
        ("data_fetched", "Payloads fetched", data.fetched),
        ("data_fetches_failed", "Fetches that failed", data.fetches_failed),
        ("data_bad_holders", "Holders that sent what was not the payload", data.bad_holders),
    ] {
        count(registry, name, help, value);
    }
    let connections = ByLabel::default();
    set(&connections, &[("side", "served")], data.serving as u64);
    set(&connections, &[("side", "dialed")], data.dialed as u64);
    registry.register(
        "data_connections",
        "Connections of the data plane that are open",
        connections,
    );
}

/// Hosted models: those of this node, and those that clients ask through it.
fn models(registry: &mut Registry, handle: &Handle) {
    let hosted = handle.hosted();
    let (served, asked) = (hosted.models.counts(), &hosted.asked);
    for (name, help, counter) in [
        ("model_requests", "Requests of other nodes to models here", &served.requests),
        ("model_slack_requests", "Of them, those that can wait", &served.slack),
        ("model_slack_refused", "Of those, refused for want of time", &served.slack_refused),
        ("model_faults", "Of them, those that came to nothing otherwise", &served.faults),
        ("model_hung_up", "Of them, those whose asker hung up", &served.hung_up),
        ("model_prompt_tokens", "Tokens that others asked", &served.prompt_tokens),
        ("model_completion_tokens", "Tokens that others were answered", &served.completion_tokens),
        ("gateway_requests", "Requests of clients to models", &asked.requests),
        ("gateway_faults", "Of them, those that came to nothing", &asked.faults),
        ("gateway_fallbacks", "Tries on another node after one had failed", &asked.fallbacks),
        ("gateway_hung_up", "Requests whose client hung up", &asked.hung_up),
        ("gateway_leases", "Leases on models taken", &asked.leases),
        ("gateway_disagreed", "Records not agreed on", &asked.disagreed),
        ("gateway_prompt_tokens", "Tokens that clients asked", &asked.prompt_tokens),
        ("gateway_completion_tokens", "Tokens they were answered", &asked.completion_tokens),
    ] {
        count(registry, name, help, counter.load(Ordering::Relaxed));
    }
    let (running, rates, cached) = (ByLabel::default(), ByLabel::default(), ByLabel::default());
    for Listed { entry, load, .. } in hosted.models.list() {
        let name = ("model", entry.name.as_str());
        for (word, n) in [("prefill", load.prefill_per_second), ("decode", load.tokens_per_second)]
        {
            set(&rates, &[name, ("of", word)], n.into());
        }
        if let Some(permille) = load.cached_permille {
            set(&cached, &[name], permille.into());
        }
        for (word, n) in [("active", load.active), ("queued", load.queued)] {
            set(&running, &[("model", &entry.name), ("is", word)], n.into());
        }
    }
    registry.register("model_load", "Requests that models here work on or have waiting", running);
    registry.register("model_tokens_per_second", "Of one request, read and written", rates);
    registry.register(
        "model_cached_permille",
        "Of the tokens asked, those known from an earlier request",
        cached,
    );
}

/// The names that Prometheus' own client libraries use; what the system does not say is left out.
fn process(registry: &mut Registry) {
    let Some(process) = Process::read() else { return };
    registry.register(
        "process_cpu_seconds",
        "User and system CPU time of the process",
        ConstCounter::new(process.cpu_seconds),
    );
    registry.register_with_unit(
        "process_resident_memory",
        "Resident memory of the process",
        Unit::Bytes,
        ConstGauge::new(process.resident_bytes),
    );
    gauge(registry, "process_threads", "Threads of the process", process.threads);
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        // One of them is the directory being read.
        let open = open.count().saturating_sub(1);
        gauge(registry, "process_open_fds", "Open file descriptors of the process", open);
    }
}

/// What proc(5) says of this process.
struct Process {
    cpu_seconds: f64,
    resident_bytes: u64,
    threads: u64,
}

impl Process {
    fn read() -> Option<Self> {
        let ticks = rustix::param::clock_ticks_per_second();
        let page = u64::try_from(rustix::param::page_size()).ok()?;
        Self::parse(&std::fs::read_to_string("/proc/self/stat").ok()?, ticks, page)
    }

    /// Reads a line of `/proc/PID/stat` (proc_pid_stat(5)): after the name in parentheses, which
    /// may hold anything, field 3 comes first.
    fn parse(stat: &str, ticks: u64, page: u64) -> Option<Self> {
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        #[allow(clippy::cast_precision_loss)] // ticks of CPU time stay below 2^53
        let cpu_seconds = (number(14)? + number(15)?) as f64 / ticks.max(1) as f64;
        Some(Self { cpu_seconds, threads: number(20)?, resident_bytes: number(24)? * page })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_measured() {
        let process = Process::read().expect("Linux has /proc");
        assert!(process.resident_bytes > 1 << 20 && process.threads > 0);
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 99 1000 42 0";
        let process = Process::parse(stat, 100, 4096).expect("a line");
        assert!((process.cpu_seconds - 3.0).abs() < f64::EPSILON);
        assert_eq!((process.threads, process.resident_bytes), (3, 42 * 4096));
        assert!(Process::parse("nonsense", 100, 4096).is_none());
        assert!(Process::parse("7 (a) S 1", 100, 4096).is_none());
    }
}
