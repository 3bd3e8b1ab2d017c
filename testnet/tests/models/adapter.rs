//! Servers behind adapters: what they do well is passed on, what they do badly is told in OpenAI's
//! words, and nobody pays for more than there can have been.

use std::time::Duration;

use leasehold_node::api::model::{KeyLines, KeyMade, KeySpec, ModelSpec, UpstreamText};
use leasehold_proto::Amount;
use serde_json::{Value, json};

use super::fabric::{ENTRY, Fabric, price};
use super::upstream::Upstream;
use super::web::{Web, until};
use super::{PATIENCE, hello};

const HOST: usize = 1;

/// A fabric with one host, which sells every one of these models from one server.
pub(crate) async fn hosting(models: &[&str]) -> (Fabric, Upstream) {
    let fabric = Fabric::start(&["host"]).await;
    let server = Upstream::start().await;
    for model in models {
        fabric.upstream(HOST, (model, model), &server, price("1", "4")).await;
    }
    for model in models {
        fabric.offered(model, 1).await;
    }
    (fabric, server)
}

/// What a key has spent, at the entry node.
async fn spent(fabric: &Fabric, name: &str) -> (String, u64) {
    let keys: KeyLines = fabric.client(ENTRY).get("/v1/api-keys").await.expect("answers");
    let line = keys.keys.into_iter().find(|line| line.name == name).expect("it is there");
    (line.spent, line.tokens)
}

async fn key(fabric: &Fabric, name: &str) -> Web {
    let spec = KeySpec { name: name.into(), ..KeySpec::default() };
    let made: KeyMade = fabric.client(ENTRY).post("/v1/api-keys", &spec).await.expect("made");
    fabric.web().with_key(made.key)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_does_well_is_passed_on() {
    let (fabric, server) = hosting(&["works", "tools"]).await;
    let web = fabric.web();
    let answer = web.chat(&hello("works")).await;
    assert_eq!((answer.status.as_u16(), answer.header("x-leasehold-node")), (200, "host"));
    let said = answer.json();
    assert_eq!(said["choices"][0]["message"]["content"], "Hello from the other server");
    assert_eq!(
        (&said["usage"]["prompt_tokens"], &said["usage"]["completion_tokens"]),
        (&json!(11), &json!(5))
    );
    assert_eq!(said["usage"]["cost"], json!(0.000_031));
    assert!(said["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{said}");

    let mut body = hello("works");
    body["stream_options"] = json!({"include_usage": true});
    // Ours, and nobody else's to see.
    body["provider"] = json!({"sort": "latency"});
    let streamed = web.stream(&body).await.all().await;
    assert!(streamed.done && streamed.error().is_none(), "{streamed:?}");
    assert_eq!(streamed.text(), "Hello from the other server");
    assert_eq!(streamed.chunks.len(), 7, "event by event: {streamed:?}");
    assert_eq!(streamed.chunks[0]["x_own"], json!({"kept": true}), "what we do not know stays");
    assert_eq!(streamed.usage().expect("asked for")["cost"], json!(0.000_031));
    let seen = server.seen("works").last;
    assert!(seen.get("provider").is_none() && seen["seed"] == 1, "{seen}");

    let tool = json!({"type": "function", "function": {"name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    let mut body = hello("tools");
    body["tools"] = json!([tool]);
    body["tool_choice"] = "auto".into();
    body["response_format"] = json!({"type": "json_object"});
    let streamed = web.stream(&body).await.all().await;
    assert!(streamed.done && streamed.error().is_none(), "{streamed:?}");
    let calls: Vec<&Value> = streamed
        .chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0])
        .filter(|call| call.is_object())
        .collect();
    assert_eq!(calls[0]["function"]["name"], "weather");
    let arguments: String =
        calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
    assert_eq!(arguments, r#"{"city":"Rome"}"#);
    let seen = server.seen("tools").last;
    assert_eq!(
        (&seen["tools"], &seen["tool_choice"], &seen["response_format"]),
        (&json!([tool]), &json!("auto"), &json!({"type": "json_object"}))
    );

    let lease = fabric.held("works").await.lease.expect("granted");
    fabric.proven(HOST, &lease, 2).await;
    let lease = fabric.held("tools").await.lease.expect("granted");
    fabric.proven(HOST, &lease, 1).await;
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_lies_is_paid_for_no_more_than_can_be() {
    let (fabric, _server) = hosting(&["lies"]).await;
    let web = key(&fabric, "ada").await;
    let mut body = hello("lies");
    body["max_tokens"] = Value::Null;
    // 10 000 tokens for two words, and a million for a prompt of a hundred bytes.
    let answer = web.chat(&body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let usage = answer.json()["usage"].clone();
    let most = |usage: &Value| {
        let (prompt, completion) =
            (usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64());
        assert!(prompt.is_some_and(|n| n < 1_500), "{usage}");
        // Each byte a token, and 64 that have no text.
        assert!(completion.is_some_and(|n| n <= 9 + 64), "{usage}");
        assert_eq!(usage["total_tokens"].as_u64(), Some(prompt.unwrap() + completion.unwrap()));
        let cost = prompt.unwrap() * 1_000 + completion.unwrap() * 4_000;
        assert_eq!(usage["cost"].as_f64().map(|c| (c * 1e9).round() as u64), Some(cost));
        cost
    };
    let first = most(&usage);
    body["stream_options"] = json!({"include_usage": true});
    let streamed = web.stream(&body).await.all().await;
    assert!(streamed.done && streamed.error().is_none(), "{streamed:?}");
    let second = most(streamed.usage().expect("asked for"));
    // The same is in the record, agreed on by both, and taken from the key.
    let lease = fabric.held("lies").await.lease.expect("granted");
    let verdict = fabric.proven(HOST, &lease, 2).await;
    let said = Amount(first + second);
    assert_eq!(verdict.charge, said, "{verdict:?}");
    until("the key's account", PATIENCE, || async {
        let (spent, _) = spent(&fabric, "ada").await;
        (spent == said.to_string()).then_some(()).ok_or(spent)
    })
    .await;
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_disagreed_total").await, 0);
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_does_badly_is_said_in_openais_words() {
    let refusing = ["refuses-400", "refuses-401", "refuses-429", "refuses-500", "garbage"];
    let breaking = ["breaks", "fails-inside"];
    let models: Vec<_> = refusing.into_iter().chain(breaking).chain(["works"]).collect();
    let (fabric, server) = hosting(&models).await;
    let web = key(&fabric, "ada").await;
    for (model, status, kind) in [
        ("refuses-400", 400, "invalid_request_error"),
        // The host's own key is not the client's.
        ("refuses-401", 503, "server_error"),
        ("refuses-429", 429, "rate_limit_error"),
        ("refuses-500", 502, "server_error"),
        ("garbage", 502, "server_error"),
    ] {
        for stream in [false, true] {
            let mut body = hello(model);
            body["stream"] = stream.into();
            let answer = web.chat(&body).await;
            let fault = answer.fault();
            assert_eq!(
                (answer.status.as_u16(), fault["type"].as_str()),
                (status, Some(kind)),
                "{model} {stream}: {fault}"
            );
            let message = fault["message"].as_str().expect("a text");
            for secret in ["sk-secret", "0xdeadbeef", "<html>"] {
                assert!(!message.contains(secret), "{model}: {fault}");
            }
            let wait = answer.header("retry-after");
            assert_eq!(wait == "7", status == 429, "{model} {stream}: '{wait}'");
        }
    }
    // In the middle there is no status any more: an event says it, and there is no [DONE].
    for model in breaking {
        let events = web.stream(&hello(model)).await;
        assert_eq!(events.status, 200);
        let streamed = events.all().await;
        assert!(!streamed.done && !streamed.broken, "{model}: {streamed:?}");
        assert!(streamed.text().starts_with("so"), "{model}: {streamed:?}");
        let error = streamed.error().unwrap_or_else(|| panic!("{model}: {streamed:?}"));
        assert_eq!(error["type"], "server_error", "{model}: {error}");
        assert!(streamed.chunks.last().is_some_and(|last| last.get("error").is_some()));
    }
    // Nothing of it is owed, by anybody.
    for model in refusing.into_iter().chain(breaking) {
        let held = fabric.held(model).await;
        let used = held.model.expect("on a model");
        assert_eq!((used.requests, held.charge.0), (0, Amount::ZERO), "{model}");
    }
    assert_eq!(spent(&fabric, "ada").await, (Amount::ZERO.to_string(), 0));
    // And all that goes well goes on.
    assert_eq!(web.chat(&hello("works")).await.status, 200);
    for model in &models {
        fabric.idle(HOST, model, PATIENCE).await;
        assert_eq!(server.seen(model).open, 0, "{model}");
    }
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_down_is_not_offered() {
    let (fabric, server) = hosting(&["works"]).await;
    let web = fabric.web();
    assert_eq!(web.chat(&hello("works")).await.status, 200);
    drop(server);
    // At once, before anybody has noticed.
    let answer = web.chat(&hello("works")).await;
    assert!([502, 503].contains(&answer.status.as_u16()), "{answer:?}");
    answer.fault();
    until("the end of the offer", PATIENCE, || async {
        let status = web.get("/v1/models/works").await.status;
        (status == 404).then_some(()).ok_or_else(|| status.to_string())
    })
    .await;
    // It may come again.
    let answer = web.chat(&hello("works")).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.fault()["code"]),
        (503, &json!("service_unavailable"))
    );
    // One that never was there neither.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}/v1", nobody.local_addr().expect("an address"));
    drop(nobody);
    let upstream = Some(UpstreamText { url, model: None, key_file: None });
    let spec = ModelSpec { upstream, serve: Some(true), ..ModelSpec::default() };
    fabric.put(HOST, "absent", &spec).await;
    assert_eq!(fabric.model(HOST, "absent").await.state, "down");
    assert_eq!(web.chat(&hello("absent")).await.status, 404);
    fabric.is_well(HOST).await;
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_ends_what_is_made_for_him_and_pays_for_what_was() {
    let (fabric, server) = hosting(&["endless", "hangs", "hangs-inside"]).await;
    let web = key(&fabric, "ada").await;
    // Before anything came, and where nothing comes any more.
    for model in ["hangs", "hangs-inside"] {
        let (asker, body) = (web.clone(), hello(model));
        let asking = tokio::spawn(async move {
            let mut events = asker.stream(&body).await;
            while let Ok(Some(_)) = events.next().await {}
        });
        until("the request", PATIENCE, || async {
            let open = server.seen(model).open;
            (open == 1).then_some(()).ok_or_else(|| open.to_string())
        })
        .await;
        asking.abort();
        until("the end of it there", PATIENCE, || async {
            let open = server.seen(model).open;
            (open == 0).then_some(()).ok_or_else(|| open.to_string())
        })
        .await;
        fabric.idle(HOST, model, PATIENCE).await;
    }
    // In the middle.
    let mut body = hello("endless");
    body["max_tokens"] = 100_000.into();
    for round in 1..=2_u64 {
        let mut events = web.stream(&body).await;
        for _ in 0..5 {
            events.next().await.expect("more").expect("more");
        }
        drop(events);
        let begun = std::time::Instant::now();
        until("the end of it there", Duration::from_secs(10), || async {
            let open = server.seen("endless").open;
            (open == 0).then_some(()).ok_or_else(|| open.to_string())
        })
        .await;
        println!("stopped {} ms after the hang-up", begun.elapsed().as_millis());
        fabric.idle(HOST, "endless", PATIENCE).await;
        let lease = fabric.held("endless").await.lease.expect("granted");
        let lent = fabric.agreed(HOST, &lease, round).await;
        let used = lent.model.expect("on a model");
        assert!(used.completion_tokens >= 5 * round, "{used:?}");
        // The server did not come to say how many: what such prompts usually are.
        assert!(used.prompt_tokens >= 2 * round, "{used:?}");
        assert!(used.completion_tokens <= server.seen("endless").chunks as u64, "{used:?}");
    }
    // Not only the lessor's word: the same lease, the same record, and the key has paid for it.
    let lease = fabric.held("endless").await.lease.expect("granted");
    let verdict = fabric.proven(HOST, &lease, 2).await;
    assert!(verdict.charge > Amount::ZERO);
    let (_, tokens) = spent(&fabric, "ada").await;
    assert!(tokens >= 10, "{tokens}");
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_disagreed_total").await, 0);
    fabric.stop().await;
}
