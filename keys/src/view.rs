//! Any object as a person reads it before trusting or signing it, and as JSON.
//!
//! What is shown is everything that is signed: each body is taken apart field by field, so that a
//! field which is added to a kind and forgotten here does not compile. Objects inside objects are
//! shown in place. What does not verify is shown too, and marked in its first line. Foreign text
//! cannot steer the terminal it is shown on ([`crate::text`]).

use std::fmt::{Display, Write as _};

use leasehold_proto::minds::admission::Admission;
use leasehold_proto::proof::{Proof, Verdict};
use leasehold_proto::words::charter::{Certificate, Charter, Limits, Organisation, Role};
use leasehold_proto::words::contract::{
    Acceptance, Authority, Claim, Class, Commit, EarlyEnd, Figure, Gang, GangOf, Grant, Input,
    JobSpec, Mandate, Member, Order, Refusal, Release, Renew, Renewal, Termination,
};
use leasehold_proto::words::equivocation::{Conviction, Reinstatement};
use leasehold_proto::words::model::{
    Finish, ModelOffer, ModelTerms, Sampling, Served, Service, Tally, TokenRates,
};
use leasehold_proto::words::object::{Body, Envelope, Header, Kind, Object, draft_json};
use leasehold_proto::words::record::{Addresses, HostRecord, Offer, Payloads};
use leasehold_proto::words::sign::Signed;
use leasehold_proto::words::usage::{Acknowledgement, Objection, Receipt, Usage};
use leasehold_proto::words::wire::{self, MAX_OBJECT};
use leasehold_proto::{Amount, FabricId, Hash, Payload, Rates, Wall, bytes};
use serde_json::{Map, Value, json};

use crate::armor::Item;
use crate::text::shown;

/// How deep objects are shown inside objects. Deeper ones are named only: no honest object nests
/// deeper than order, mandate, certificate.
const MAX_DEPTH: usize = 4;
/// The width of the column of names.
const NAMES: usize = 18;

/// What is known beside the object shown.
#[derive(Clone, Debug, Default)]
pub struct Context {
    currencies: Vec<(FabricId, String)>,
    now: Option<Wall>,
}

impl Context {
    /// A context that knows the time, so that what has expired is marked.
    #[must_use]
    pub const fn at(now: Wall) -> Self {
        Self { currencies: Vec::new(), now: Some(now) }
    }

    /// Learns a fabric's currency from its charter. One that founds no fabric teaches nothing.
    pub fn learn(&mut self, charter: &Signed) {
        if let Ok(admission) = Admission::found(charter) {
            let currency = admission.charter().currency.clone();
            self.currencies.push((admission.fabric(), currency));
        }
    }

    /// Learns from every charter in `items`.
    pub fn learn_from(&mut self, items: &[Item]) {
        for item in items {
            match item {
                Item::Signed(signed) if signed.header().is_ok_and(|h| h.kind == Kind::Charter) => {
                    self.learn(signed);
                }
                Item::Proof(proof) => self.learn(&proof.charter),
                Item::Signed(_) | Item::Draft(_) | Item::Equivocation(_) => {}
            }
        }
    }

    fn currency(&self, fabric: &FabricId) -> Option<&str> {
        let known = self.currencies.iter().find(|(of, _)| of == fabric);
        known.map(|(_, currency)| currency.as_str())
    }
}

/// `item` as a person reads it.
#[must_use]
pub fn text(item: &Item, context: &Context) -> String {
    let mut page = Page { text: String::new(), depth: 0, context, currency: None };
    match item {
        Item::Signed(signed) => page.signed("", signed),
        Item::Draft(draft) => page.draft(&draft.envelope),
        Item::Proof(proof) => page.proof(proof),
        Item::Equivocation(both) => {
            page.raw("two objects under one version ('verify' says whether they prove a lie)");
            page.depth = 1;
            page.signed("first", &both.first);
            page.signed("second", &both.second);
        }
    }
    page.text
}

/// What a verified proof shows, as a person reads it.
#[must_use]
pub fn verdict(verdict: &Verdict) -> String {
    let Verdict {
        fabric,
        currency,
        lease,
        lessor,
        lessee,
        delegate,
        model,
        rate,
        term,
        worst_case,
        decided,
        receipts,
        usage,
        charge,
        acknowledged,
        acknowledged_charge,
        credit,
        end,
        requests_checked,
        price_checked,
    } = verdict;
    let context = Context::default();
    let currency = Some(currency.clone());
    let mut page = Page { text: String::new(), depth: 0, context: &context, currency };
    page.raw("the proof holds");
    page.depth = 1;
    page.line("fabric", fabric);
    page.line("lease", lease);
    page.line("lessor", lessor);
    page.line("lessee", lessee);
    page.line("delegate", delegate);
    page.line("granted", decided);
    let follows = if *price_checked { "recomputed from the offer" } else { "no offer inside" };
    if let Some(terms) = model {
        page.model(terms);
        page.line("price", follows);
        page.line("requests checked", format!("{requests_checked}, one by one"));
    } else {
        let rate = format!("{} per hour ({follows})", page.money(*rate));
        page.line("rate", rate);
    }
    page.line("term", term);
    page.amount("at most", *worst_case);
    page.line("receipts", receipts);
    page.usage(usage);
    page.amount("owed", *charge);
    let agreed = format!("{} up to receipt {acknowledged}", page.money(*acknowledged_charge));
    page.line("countersigned", agreed);
    page.amount("credit", *credit);
    page.line("ended", end.map_or_else(|| "not, as far as exported".into(), |end| word(&end)));
    page.text
}

/// `item` as JSON: objects inside it are expanded to
/// `{kind, id, signer, …, body, signature_valid}`.
#[must_use]
pub fn json(item: &Item) -> Value {
    match item {
        Item::Signed(signed) => signed_json(signed, 0),
        Item::Draft(draft) => {
            let mut object = envelope_json(&draft.envelope, 0);
            object.insert("type".into(), "draft".into());
            Value::Object(object)
        }
        Item::Proof(proof) => {
            let each = |list: &[Signed]| -> Vec<Value> {
                list.iter().map(|signed| signed_json(signed, 0)).collect()
            };
            let Proof { charter, offer, order, grant, renewals, .. } = &**proof;
            let Proof { receipts, acknowledgements, served, termination, .. } = &**proof;
            json!({
                "type": "proof",
                "charter": signed_json(charter, 0),
                "offer": offer.as_ref().map(|signed| signed_json(signed, 0)),
                "order": signed_json(order, 0),
                "grant": signed_json(grant, 0),
                "renewals": each(renewals),
                "receipts": each(receipts),
                "acknowledgements": each(acknowledgements),
                "served": each(served),
                "termination": termination.as_ref().map(|signed| signed_json(signed, 0)),
            })
        }
        Item::Equivocation(both) => json!({
            "type": "equivocation",
            "first": signed_json(&both.first, 0),
            "second": signed_json(&both.second, 0),
        }),
    }
}

/// What two contradicting objects prove, as a person reads it.
#[must_use]
pub fn conviction(conviction: &Conviction) -> String {
    let Header { kind, signer, epoch, seq, fabric, .. } = conviction.header();
    format!(
        "the proof holds: {signer}\n  signed two different {kind}s in epoch {epoch}, number {seq}\n  \
         in fabric {fabric}\n  at least one is a lie, or two nodes run with that key\n"
    )
}

/// Why the signature of `signed` does not hold, if it does not. Kinds that are not known here can
/// be checked too, only not read.
fn fault(signed: &Signed) -> Option<String> {
    match signed.header() {
        Err(why) => Some(why.to_string()),
        Ok(header) => match header.kind {
            Kind::Unknown(_) => signed.verify_opaque(&header.fabric).err(),
            _ => Object::verify(signed).err(),
        }
        .map(|why| why.to_string()),
    }
}

fn signed_json(signed: &Signed, depth: usize) -> Value {
    let mut object = envelope_json(&signed.envelope, depth);
    object.insert("type".into(), "signed".into());
    let fault = fault(signed);
    object.insert("signature_valid".into(), fault.is_none().into());
    if let Some(why) = fault {
        object.insert("error".into(), why.into());
    }
    Value::Object(object)
}

fn envelope_json(bytes: &[u8], depth: usize) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("id".into(), Hash::of(bytes).to_string().into());
    let Ok(envelope) = Envelope::decode(bytes) else {
        object.insert("kind".into(), Value::Null);
        return object;
    };
    if let Ok(Value::Object(header)) = serde_json::to_value(envelope.header) {
        object.extend(header);
    }
    object.insert("extensions".into(), json!(envelope.extensions));
    let body = draft_json(bytes).map(|(_, body)| expanded(body, depth));
    object.insert("body".into(), body.unwrap_or_default());
    object
}

/// Expands every signed object in a body.
fn expanded(value: Value, depth: usize) -> Value {
    match value {
        Value::Object(object) => {
            let is_signed = object.len() == 2
                && object.contains_key("envelope")
                && object.contains_key("signature");
            if is_signed {
                let value = Value::Object(object);
                return match serde_json::from_value::<Signed>(value.clone()) {
                    Ok(signed) if depth < MAX_DEPTH => signed_json(&signed, depth + 1),
                    _ => value,
                };
            }
            object.into_iter().map(|(name, value)| (name, expanded(value, depth))).collect()
        }
        Value::Array(list) => list.into_iter().map(|value| expanded(value, depth)).collect(),
        other => other,
    }
}

/// A word of an enumeration as it stands in JSON: `not_admitted` reads "not admitted".
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word.replace('_', " "),
        Ok(other) => other.to_string(),
        Err(_) => "?".into(),
    }
}

fn class(class: Class) -> &'static str {
    match class {
        Class::Firm => "firm, until its term",
        Class::Slack => "slack, may be reclaimed after a notice",
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Node => "node",
        Role::Tenant => "tenant",
    }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// What is written so far.
struct Page<'a> {
    text: String,
    depth: usize,
    context: &'a Context,
    currency: Option<String>,
}

impl Page<'_> {
    fn raw(&mut self, line: &str) {
        let indent = "  ".repeat(self.depth);
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{indent}{}", shown(line));
    }

    fn line(&mut self, name: &str, value: impl Display) {
        self.raw(format!("{name:<NAMES$}{value}").trim_end());
    }

    fn money(&self, amount: Amount) -> String {
        match &self.currency {
            Some(currency) => format!("{amount} {currency}"),
            None => format!("{amount} (currency: see the fabric's charter)"),
        }
    }

    fn amount(&mut self, name: &str, amount: Amount) {
        let money = self.money(amount);
        self.line(name, money);
    }

    fn early(&mut self, early: &EarlyEnd) {
        let EarlyEnd { notice, freeze, credit_permille } = early;
        let credit = percent(*credit_permille);
        self.line("taken back", format!("after {notice} of notice, then {freeze} frozen"));
        self.line("credit then", format!("{credit} of the price of the time missed"));
    }

    fn gang_of(&mut self, gang: Option<&GangOf>) {
        if let Some(GangOf { gang, size }) = gang {
            self.line("for gang", format!("{gang} of {size} members"));
        }
    }

    fn until(&mut self, name: &str, until: Wall) {
        let passed = self.context.now.is_some_and(|now| until < now);
        let note = if passed { " (EXPIRED)" } else { "" };
        match until {
            Wall(u64::MAX) => self.line(name, "no end"),
            until => self.line(name, format!("{until}{note}")),
        }
    }

    /// A signed object, indented below `name` when it stands inside another.
    fn signed(&mut self, name: &str, signed: &Signed) {
        let kind = signed.header().map(|header| header.kind.name());
        let what = kind.as_deref().unwrap_or("object");
        let at = if name.is_empty() { String::new() } else { format!("{name}: ") };
        if self.depth > MAX_DEPTH {
            return self.raw(&format!("{at}signed {what} {} (too deep to show)", signed.id()));
        }
        match fault(signed) {
            None => self.raw(&format!("{at}signed {what} (the signature holds)")),
            Some(why) => self.raw(&format!("{at}UNVERIFIED {what}, not to be believed: {why}")),
        }
        let currency = self.currency.take();
        self.depth += 1;
        self.envelope(&signed.envelope, "signed by");
        self.depth -= 1;
        self.currency = currency;
    }

    fn draft(&mut self, envelope: &[u8]) {
        let kind = Envelope::decode(envelope).map(|envelope| envelope.header.kind.name());
        let what = kind.as_deref().unwrap_or("object");
        self.raw(&format!("UNSIGNED draft: {what}"));
        self.depth += 1;
        self.envelope(envelope, "to be signed by");
        self.depth -= 1;
    }

    fn proof(&mut self, proof: &Proof) {
        let Proof { charter, offer, order, grant, renewals, .. } = proof;
        let Proof { receipts, acknowledgements, termination, .. } = proof;
        self.raw("proof of a lease (shown object by object; 'verify' says whether it holds)");
        self.depth += 1;
        self.signed("charter", charter);
        match offer {
            Some(offer) => self.signed("offer", offer),
            None => self.raw("offer: not inside"),
        }
        self.signed("order", order);
        self.signed("grant", grant);
        for renewal in renewals {
            self.signed("last renewal", renewal);
        }
        for (number, receipt) in (1..).zip(receipts) {
            self.signed(&format!("receipt {number}"), receipt);
        }
        for (number, acknowledgement) in (1..).zip(acknowledgements) {
            self.signed(&format!("acknowledgement {number}"), acknowledgement);
        }
        match termination {
            Some(termination) => self.signed("termination", termination),
            None => self.raw("termination: not inside"),
        }
        self.depth -= 1;
    }

    fn envelope(&mut self, bytes: &[u8], by: &str) {
        self.line("id", Hash::of(bytes));
        let envelope = match Envelope::decode(bytes) {
            Ok(envelope) => envelope,
            Err(why) => return self.line("unreadable", why),
        };
        let Header { kind, version, fabric, signer, subject, epoch, seq, not_after } =
            envelope.header;
        self.line(by, signer);
        if fabric == FabricId::default() {
            self.line("fabric", "the one that this founds");
        } else {
            self.line("fabric", fabric);
        }
        self.until("valid until", not_after);
        self.line("subject", subject);
        self.line("epoch, number", format!("{epoch}, {seq}"));
        if version != 1 {
            self.line("version", version);
        }
        for extension in &envelope.extensions {
            let must = if extension.critical { "critical" } else { "ignorable" };
            let length = extension.bytes.len();
            self.line("extension", format!("{} ({must}, {length} bytes)", extension.tag));
        }
        self.currency = self.context.currency(&fabric).map(str::to_string);
        self.body(kind, &envelope.body);
    }

    fn body(&mut self, kind: Kind, body: &[u8]) {
        match kind {
            Kind::Charter => self.of::<Charter>(body),
            Kind::Certificate => self.of::<Certificate>(body),
            Kind::HostRecord => self.of::<HostRecord>(body),
            Kind::Offer => self.of::<Offer>(body),
            Kind::Mandate => self.of::<Mandate>(body),
            Kind::Order => self.of::<Order>(body),
            Kind::Grant => self.of::<Grant>(body),
            Kind::Refusal => self.of::<Refusal>(body),
            Kind::Claim => self.of::<Claim>(body),
            Kind::Acceptance => self.of::<Acceptance>(body),
            Kind::Release => self.of::<Release>(body),
            Kind::Termination => self.of::<Termination>(body),
            Kind::Receipt => self.of::<Receipt>(body),
            Kind::Acknowledgement => self.of::<Acknowledgement>(body),
            Kind::Objection => self.of::<Objection>(body),
            Kind::Renew => self.of::<Renew>(body),
            Kind::Renewal => self.of::<Renewal>(body),
            Kind::Gang => self.of::<Gang>(body),
            Kind::Commit => self.of::<Commit>(body),
            Kind::Reinstatement => self.of::<Reinstatement>(body),
            Kind::Payloads => self.of::<Payloads>(body),
            Kind::Served => self.of::<Served>(body),
            Kind::Unknown(_) => {
                self.line("body", format!("{} bytes of an unknown kind", body.len()));
            }
        }
    }

    fn of<T: Body + Shown>(&mut self, body: &[u8]) {
        match wire::decode::<MAX_OBJECT, T>(body) {
            Ok(body) => body.show(self),
            Err(why) => self.line("unreadable", why),
        }
    }

    fn usage(&mut self, usage: &Usage) {
        let Usage { billed, cpu, memory_mib_ms, memory_peak, tally } = usage;
        if *tally != Tally::default() {
            let Tally { requests, prompt_tokens, completion_tokens, last } = tally;
            self.line("requests", requests);
            self.line("prompt tokens", prompt_tokens);
            self.line("completion tokens", completion_tokens);
            self.line("last request", last);
        }
        self.line("billed time", billed);
        self.line("cpu time", cpu);
        self.line("memory over time", format!("{memory_mib_ms} MiB·ms"));
        self.line("memory peak", bytes(*memory_peak));
    }

    fn model(&mut self, terms: &ModelTerms) {
        let ModelTerms { name, digest, rates } = terms;
        let TokenRates { prompt, completion } = rates;
        self.line("model", format!("{name:?}"));
        self.line("  digest", digest);
        self.amount("  1M prompt tokens", *prompt);
        self.amount("  1M completion", *completion);
    }

    fn payload(&mut self, name: &str, payload: &Payload) {
        let Payload { root, size } = payload;
        self.line(name, format!("{root} ({size} bytes)"));
    }

    fn job(&mut self, job: &JobSpec) {
        let JobSpec { runtime, program, args, env, stdin, inputs, outputs, release_after } = job;
        self.line("runtime", runtime);
        self.payload("program", program);
        for arg in args {
            self.line("argument", format!("{arg:?}"));
        }
        for (name, value) in env {
            self.line("variable", format!("{name}={value:?}"));
        }
        if let Some(stdin) = stdin {
            self.payload("standard input", stdin);
        }
        for Input { name, payload, index } in inputs {
            self.payload(&format!("input {name:?}"), payload);
            if let Some(size) = index {
                self.line("  index of files", format!("{size} bytes together"));
            }
        }
        for name in outputs {
            self.line("output", format!("{name:?}"));
        }
        self.line("release after it", if *release_after { "yes" } else { "no" });
    }

    fn rates(&mut self, rates: &Rates) {
        let Rates { cpu_hour, memory_gib_hour, disk_gib_hour, gpu_hour } = rates;
        self.amount("cpu-hour", *cpu_hour);
        self.amount("GiB-hour memory", *memory_gib_hour);
        self.amount("GiB-hour disk", *disk_gib_hour);
        for rate in gpu_hour {
            self.amount(&format!("{}-hour", rate.kind), rate.hour);
        }
    }
}

/// Thousandths as people read them.
fn percent(permille: u16) -> String {
    let (whole, tenth) = (permille / 10, permille % 10);
    if tenth == 0 { format!("{whole} %") } else { format!("{whole}.{tenth} %") }
}

/// Writes every field of a body.
trait Shown {
    fn show(&self, page: &mut Page<'_>);
}

impl Shown for Charter {
    fn show(&self, page: &mut Page<'_>) {
        let Self { name, currency, number, previous, organisations, limits } = self;
        page.line("name", name);
        page.line("currency", currency);
        page.line("charter number", number);
        if let Some(previous) = previous {
            page.line("replaces", previous);
        }
        for Organisation { name, root, max_nodes } in organisations {
            page.line("organisation", format!("{name} (admits at most {max_nodes} nodes)"));
            page.line("  root key", root);
        }
        let Limits { max_term, max_order_life } = limits;
        page.line("longest term", max_term);
        page.line("longest order", max_order_life);
    }
}

impl Shown for Certificate {
    fn show(&self, page: &mut Page<'_>) {
        let Self { organisation, name, role: admitted, key, not_before } = self;
        page.line("organisation", organisation);
        page.line("admits", format!("{name:?} as a {}", role(*admitted)));
        page.line("key", key);
        page.line("valid from", not_before);
    }
}

impl Shown for HostRecord {
    fn show(&self, page: &mut Page<'_>) {
        let Self { name, version, addresses, hardware, processor, labels, .. } = self;
        let Self { cell, returns, certificate, .. } = self;
        page.line("host", name);
        page.line("software", version);
        let Addresses { link, probe, data } = addresses;
        page.line("links", list(link));
        page.line("liveness", list(probe));
        page.line("data", list(data));
        page.line("hardware", hardware);
        page.line("processor", processor);
        page.line("labels", list(labels.iter().map(|(name, value)| format!("{name}={value}"))));
        page.line("cell", cell);
        page.line("comings back", returns);
        page.signed("certificate", certificate);
    }
}

impl Shown for Offer {
    fn show(&self, page: &mut Page<'_>) {
        let Self { shapes, rates, slack_permille, classes, early, max_term, .. } = self;
        let Self { runtimes, isolation, models, .. } = self;
        for shape in shapes {
            page.line("free", shape);
        }
        page.rates(rates);
        page.line("slack", format!("at {} of that", percent(*slack_permille)));
        page.early(early);
        page.line("classes", list(classes.iter().map(|one| class(*one))));
        page.line("longest term", max_term);
        page.line("runtimes", list(runtimes));
        page.line("isolation", list(isolation));
        for model in models {
            let ModelOffer {
                terms, slack, quantisation, context, endpoints, abilities, demo, ..
            } = model;
            let ModelOffer { state, load, tokens_per_second, first_token, .. } = model;
            page.model(terms);
            if let Some(TokenRates { prompt, completion }) = slack {
                page.amount("  slack prompt", *prompt);
                page.amount("  slack compl.", *completion);
            }
            page.line("  quantisation", quantisation);
            page.line("  context", format!("{context} tokens"));
            page.line("  endpoints", list(endpoints.iter().map(word)));
            page.line("  abilities", format!("{abilities:#x}"));
            page.line("  demo", if *demo { "yes" } else { "no" });
            page.line("  state", word(state));
            page.line("  load", format!("{load} requests"));
            page.line("  speed", format!("{tokens_per_second} tokens/s, first {first_token}"));
        }
    }
}

impl Shown for Served {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, number, previous, model, service, .. } = self;
        let Self { prompt_total, completion_total, at, .. } = self;
        let Service { endpoint, request, response, sampling, finish, .. } = service;
        let Service { prompt_tokens, cached_tokens, completion_tokens, .. } = service;
        page.line("lease", lease);
        page.line("request number", number);
        page.line("previous", previous);
        page.line("model digest", model);
        page.line("endpoint", word(endpoint));
        page.line("request", request);
        page.line("response", response);
        let Sampling { temperature_permille, top_p_permille, seed, max_tokens } = sampling;
        let thousandths = |value: &Option<u32>| value.map(|value| f64::from(value) / 1000.0);
        let said = [
            ("temperature", thousandths(temperature_permille).map(|value| value.to_string())),
            ("top_p", thousandths(top_p_permille).map(|value| value.to_string())),
            ("seed", seed.map(|value| value.to_string())),
            ("max_tokens", max_tokens.map(|value| value.to_string())),
        ];
        for (name, value) in said {
            if let Some(value) = value {
                page.line(name, value);
            }
        }
        let ended = match finish {
            Finish::Answered => "answered",
            Finish::HungUp => "who asked hung up",
        };
        page.line("ended", ended);
        page.line("prompt tokens", format!("{prompt_tokens}, {cached_tokens} of them known"));
        page.line("completion tokens", completion_tokens);
        let total = format!("{prompt_total} prompt, {completion_total} completion");
        page.line("so far", total);
        page.line("at", at);
    }
}

impl Shown for Payloads {
    fn show(&self, page: &mut Page<'_>) {
        let Self { roots } = self;
        page.line("payloads", roots.len());
        for root in roots {
            // As the root itself begins.
            let begins: String = root.to_le_bytes().iter().map(|b| format!("{b:02x}")).collect();
            page.line("has one that begins", begins);
        }
    }
}

impl Shown for Mandate {
    fn show(&self, page: &mut Page<'_>) {
        let Self { delegate, certificate, not_before, max_hourly, max_total, max_term, lessors } =
            self;
        page.line("lets", delegate);
        page.raw("order leases in the signer's name and at its expense:");
        page.amount("a lease per hour", *max_hourly);
        page.amount("a lease in all", *max_total);
        page.line("a lease's term", max_term);
        page.line("valid from", not_before);
        if lessors.is_empty() {
            page.line("with", "any node of the fabric");
        }
        for lessor in lessors {
            page.line("with", lessor);
        }
        page.signed("certificate", certificate);
    }
}

impl Shown for Order {
    fn show(&self, page: &mut Page<'_>) {
        let Self {
            lessee,
            delegate,
            authority,
            lessor,
            offer,
            request,
            shape,
            model,
            class: asked,
            term,
            longest,
            gang,
            claim_within,
            ceiling,
            cap,
            exposure,
            receipt_every,
            placed,
        } = self;
        page.line("lessee", lessee);
        page.line("delegate", delegate);
        page.line("asks lessor", lessor);
        match model {
            Some(terms) => page.model(terms),
            None => page.line("for", shape),
        }
        page.line("class", class(*asked));
        page.line("term", term);
        page.line("renewable", format!("up to {longest}"));
        page.gang_of(gang.as_ref());
        let ceiling = format!("{} per hour", page.money(*ceiling));
        page.line("at most", ceiling);
        page.amount("and in all", *cap);
        page.amount("exposure", *exposure);
        page.line("offer", offer);
        page.line("request", request);
        page.line("to be claimed", format!("within {claim_within}"));
        page.line("receipts", format!("every {receipt_every}"));
        page.line("placed", placed);
        match authority {
            Authority::Mandate(mandate) => page.signed("mandate", mandate),
            Authority::Lessee(certificate) => page.signed("certificate", certificate),
        }
    }
}

impl Shown for Grant {
    fn show(&self, page: &mut Page<'_>) {
        let Self {
            order,
            lessee,
            delegate,
            shape,
            model,
            class: lent,
            rate,
            cap,
            exposure,
            term,
            longest,
            early,
            gang,
            claim_within,
            grace,
            receipt_every,
            fence,
            decided,
            certificate,
        } = self;
        page.line("order", order);
        page.line("lessee", lessee);
        page.line("delegate", delegate);
        match model {
            Some(terms) => page.model(terms),
            None => page.line("lends", shape),
        }
        page.line("class", class(*lent));
        page.line("term", term);
        page.line("renewable", format!("up to {longest}"));
        page.early(early);
        page.gang_of(gang.as_ref());
        let rate = format!("{} per hour", page.money(*rate));
        page.line("rate", rate);
        page.amount("at most in all", *cap);
        page.amount("exposure", *exposure);
        page.line("to be claimed", format!("within {claim_within}"));
        page.line("grace", grace);
        page.line("receipts", format!("every {receipt_every}"));
        page.line("fence", format!("{}, {}", fence.epoch, fence.number));
        page.line("decided", decided);
        page.signed("certificate", certificate);
    }
}

impl Shown for Refusal {
    fn show(&self, page: &mut Page<'_>) {
        let Self { of, reason, figures, offer, referrals } = self;
        page.line("refuses", of);
        page.line("reason", word(reason));
        for Figure { of, have, need } in figures {
            page.line("figure", format!("{of}: have {have}, need {need}"));
        }
        for referral in referrals {
            page.line("try", referral);
        }
        if let Some(offer) = offer {
            page.signed("offer", offer);
        }
    }
}

impl Shown for Claim {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, act, job } = self;
        page.line("lease", lease);
        page.line("act", act);
        page.job(job);
    }
}

impl Shown for Acceptance {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, act, of } = self;
        page.line("lease", lease);
        page.line("act", act);
        page.line("accepts", of);
    }
}

impl Shown for Release {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, act } = self;
        page.line("lease", lease);
        page.line("act", act);
    }
}

impl Shown for Renew {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, act, version, term } = self;
        page.line("lease", lease);
        page.line("act", act);
        page.line("in version", version);
        page.line("term", term);
    }
}

impl Shown for Renewal {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, act, of, version, term } = self;
        page.line("lease", lease);
        page.line("act", act);
        page.line("grants", of);
        page.line("now in version", version);
        page.line("term", term);
    }
}

impl Shown for Gang {
    fn show(&self, page: &mut Page<'_>) {
        let Self { gang, lessee, delegate, members } = self;
        page.line("gang", gang);
        page.line("lessee", lessee);
        page.line("delegate", delegate);
        for (rank, Member { lessor, lease }) in members.iter().enumerate() {
            page.line(&format!("rank {rank}"), format!("lease {lease} of {lessor}"));
        }
    }
}

impl Shown for Reinstatement {
    fn show(&self, page: &mut Page<'_>) {
        let Self { organisation, key, above } = self;
        page.line("organisation", organisation);
        page.line("believes again", key);
        page.line("in epochs above", above);
    }
}

impl Shown for Commit {
    fn show(&self, page: &mut Page<'_>) {
        let Self { gang, lease } = self;
        page.line("gang", gang);
        page.line("lease", lease);
    }
}

impl Shown for Termination {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, reason, by, at, billed, charge, missed, .. } = self;
        let Self { credit, receipt, outcome, .. } = self;
        page.line("lease", lease);
        page.line("reason", word(reason));
        page.line("by", by);
        page.line("at", at);
        page.line("billed time", billed);
        page.amount("owed", *charge);
        page.line("missed time", missed);
        page.amount("credit", *credit);
        page.line("final receipt", receipt);
        match outcome {
            Some(outcome) => page.line("the job", outcome),
            None => page.line("the job", "there was none"),
        }
    }
}

impl Shown for Receipt {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, number, previous, usage, charge, end, at } = self;
        page.line("lease", lease);
        page.line("receipt number", number);
        page.line("after", previous);
        page.usage(usage);
        page.amount("owed so far", *charge);
        page.line("final", end.map_or_else(|| "no".into(), |end| format!("yes: {}", word(&end))));
        page.line("at", at);
    }
}

impl Shown for Acknowledgement {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, number, receipt, charge } = self;
        page.line("lease", lease);
        page.line("receipt number", number);
        page.line("receipt", receipt);
        page.amount("agrees to owe", *charge);
    }
}

impl Shown for Objection {
    fn show(&self, page: &mut Page<'_>) {
        let Self { lease, receipt, reason, charge } = self;
        page.line("lease", lease);
        page.line("receipt", receipt);
        page.line("objects to", word(reason));
        page.amount("agrees to owe", *charge);
    }
}
