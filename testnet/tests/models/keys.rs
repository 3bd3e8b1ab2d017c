//! API keys at a running node: whom they let in, what for, how much, how long, and that what was
//! spent is still known after a node was killed.

use std::time::Duration;

use leasehold_node::api::model::{KeyLine, KeyLines, KeyMade, KeySpec};
use serde_json::json;

use super::fabric::{ENTRY, Fabric, price};
use super::upstream::Upstream;
use super::web::{Web, until};
use super::{PATIENCE, hello};

const HOST: usize = 1;

async fn made(fabric: &Fabric, spec: KeySpec) -> Web {
    let made: KeyMade = fabric.client(ENTRY).post("/v1/api-keys", &spec).await.expect("made");
    fabric.web().with_key(made.key)
}

fn named(name: &str) -> KeySpec {
    KeySpec { name: name.into(), ..KeySpec::default() }
}

async fn line(fabric: &Fabric, name: &str) -> KeyLine {
    let keys: KeyLines = fabric.client(ENTRY).get("/v1/api-keys").await.expect("answers");
    keys.keys.into_iter().find(|line| line.name == name).expect("it is there")
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_let_in_whom_they_are_for_and_no_more() {
    let markup = |config: &mut leasehold_node::config::Config| config.models.markup = "50%".into();
    let mut fabric = Fabric::with(&["host"], markup).await;
    let server = Upstream::start().await;
    for model in ["works", "other", "endless"] {
        fabric.upstream(HOST, (model, model), &server, price("1", "4")).await;
        fabric.offered(model, 1).await;
    }

    // Only some models.
    let some = made(&fabric, KeySpec { models: vec!["works".into()], ..named("some") }).await;
    let answer = some.chat(&hello("works")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    // 11 and 5 tokens at 1 and 4 a million, and half of that on top.
    assert_eq!(answer.json()["usage"]["cost"], json!(0.000_046_5));
    assert!(answer.header("x-ratelimit-limit-requests").is_empty(), "it has none: {answer:?}");
    let refused = some.chat(&hello("other")).await;
    assert_eq!(
        (refused.status.as_u16(), &refused.fault()["type"]),
        (403, &json!("permission_error"))
    );
    let mut fallback = hello("works");
    fallback["models"] = json!(["other"]);
    assert_eq!(some.chat(&fallback).await.status, 403, "no way around it");
    let seen = some.get("/v1/models").await.json();
    assert_eq!(seen["data"].as_array().map(Vec::len), Some(1), "{seen}");
    assert_eq!(seen["data"][0]["pricing"]["prompt"], "0.0000015", "with what is on top: {seen}");
    assert_eq!(some.get("/v1/models/other").await.status, 404);

    // It is for models, and not for anything of the node's own.
    for path in ["/v1/node", "/v1/leases", "/v1/api-keys", "/v1/catalog", "/metrics"] {
        assert_eq!(some.get(path).await.status, 401, "{path}");
    }

    // So many requests a minute.
    let few = made(&fabric, KeySpec { rpm: Some(2), ..named("few") }).await;
    let answer = few.chat(&hello("works")).await;
    assert_eq!(
        (
            answer.header("x-ratelimit-limit-requests"),
            answer.header("x-ratelimit-remaining-requests")
        ),
        ("2", "1"),
        "{answer:?}"
    );
    assert!(answer.header("x-ratelimit-reset-requests").ends_with("ms"), "{answer:?}");
    assert_eq!(few.chat(&hello("works")).await.status, 200);
    let refused = few.chat(&hello("works")).await;
    let fault = refused.fault();
    assert_eq!(
        (refused.status.as_u16(), &fault["code"], &fault["type"]),
        (429, &json!("rate_limit_exceeded"), &json!("requests"))
    );
    let wait: u64 = refused.header("retry-after").parse().expect("whole seconds");
    assert!((1..=30).contains(&wait), "{wait}");

    // So many tokens a minute.
    let short = made(&fabric, KeySpec { tpm: Some(30), ..named("short") }).await;
    let answer = short.chat(&hello("works")).await;
    assert_eq!(answer.header("x-ratelimit-limit-tokens"), "30", "{answer:?}");
    until("a refusal", PATIENCE, || async {
        let answer = short.chat(&hello("works")).await;
        if answer.status != 429 {
            return Err(answer.status.to_string());
        }
        assert_eq!(answer.fault()["type"], "tokens");
        assert!(answer.header("retry-after").parse::<u64>().is_ok(), "{answer:?}");
        Ok(())
    })
    .await;

    // So many at once; who hangs up makes room.
    let single = made(&fabric, KeySpec { concurrency: Some(1), ..named("single") }).await;
    let mut first = single.stream(&hello("endless")).await;
    first.next().await.expect("more").expect("more");
    let refused = single.chat(&hello("works")).await;
    assert_eq!(refused.status, 429, "{refused:?}");
    assert_eq!(refused.header("retry-after"), "1");
    drop(first);
    until("room", PATIENCE, || async {
        let status = single.chat(&hello("works")).await.status;
        (status == 200).then_some(()).ok_or_else(|| status.to_string())
    })
    .await;

    // For so long.
    let brief = made(&fabric, KeySpec { expires: Some("1s".into()), ..named("brief") }).await;
    assert_eq!(brief.chat(&hello("works")).await.status, 200);
    until("its end", PATIENCE, || async {
        let answer = brief.chat(&hello("works")).await;
        let code = &answer.json()["error"]["code"];
        let over = answer.status == 401 && code == "invalid_api_key";
        over.then_some(()).ok_or_else(|| answer.status.to_string())
    })
    .await;

    // So much, and not a request more once it is spent.
    let budget = Some("0.0001".into());
    let poor = made(&fabric, KeySpec { budget, ..named("poor") }).await;
    let mut answered = 0_u64;
    let refused = loop {
        let answer = poor.chat(&hello("works")).await;
        if answer.status != 200 {
            break answer;
        }
        answered += 1;
        assert!(answered <= 3, "0.0000465 fits twice in it, and the third begins");
    };
    assert_eq!(
        (refused.status.as_u16(), &refused.fault()["code"]),
        (402, &json!("insufficient_quota"))
    );
    assert_eq!(answered, 3);

    // What was spent is known after a kill, but for the last second's.
    let spent = line(&fabric, "poor").await;
    assert_eq!((spent.requests, spent.tokens, spent.spent.as_str()), (3, 48, "0.0001395"));
    let path = fabric.fleet.member(ENTRY).expect("there").dir().join("api-keys.json");
    until("the file", Duration::from_secs(5), || async {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let kept: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap_or_default();
        let poor = kept.iter().find(|key| key["name"] == "poor").cloned().unwrap_or_default();
        (poor["requests"] == 3).then_some(()).ok_or_else(|| poor.to_string())
    })
    .await;
    let text = std::fs::read_to_string(&path).expect("reads");
    let key = poor.key.clone().expect("it has one");
    assert!(!text.contains(&key), "only its hash is kept");
    fabric.fleet.kill(ENTRY).expect("runs");
    fabric.fleet.start_one(ENTRY).await.expect("starts again");
    fabric.fleet.map(PATIENCE).await.expect("all see all");
    fabric.offered("works", 1).await;
    assert_eq!(line(&fabric, "poor").await, spent);
    let poor = fabric.web().with_key(key);
    assert_eq!(poor.chat(&hello("works")).await.status, 402, "it is still spent");
    assert_eq!(poor.get("/v1/models").await.status, 200, "looking costs nothing");

    // And a key that was removed opens nothing.
    let id = line(&fabric, "some").await.id;
    let client = fabric.client(ENTRY);
    let path = format!("/v1/api-keys/{id}");
    client.act(hyper::Method::DELETE, &path, Duration::ZERO).await.expect("removed");
    assert_eq!(some.chat(&hello("works")).await.status, 401);
    fabric.stop().await;
}
