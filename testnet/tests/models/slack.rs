//! What can wait: it costs less, is begun while there is little else to do, and never stands before
//! what cannot.

use leasehold_node::api::body::{LeaseLine, Side};
use leasehold_node::api::model::ModelSpec;
use leasehold_proto::Amount;
use serde_json::{Value, json};

use super::adapter;
use super::fabric::{ENTRY, Fabric};
use super::upstream::Upstream;
use super::web::until;
use super::{PATIENCE, hello};

const HOST: usize = 1;

/// A host that sells these models, to whoever can wait at half the price while fewer than two requests
/// are under way.
async fn hosting(models: &[&str]) -> (Fabric, Upstream) {
    let (fabric, server) = adapter::hosting(models).await;
    for model in models {
        let (slack, slack_requests) = (Some("50%".into()), Some(2));
        let spec = ModelSpec { slack, slack_requests, ..ModelSpec::default() };
        fabric.put(HOST, model, &spec).await;
        let (web, path) = (fabric.web(), format!("/v1/models/{model}"));
        until("that price", PATIENCE, || async {
            let listed = web.get(&path).await.json();
            let price = &listed["flex_pricing"]["completion"];
            (price == "0.000002").then_some(()).ok_or_else(|| listed.to_string())
        })
        .await;
    }
    (fabric, server)
}

fn flex(model: &str) -> Value {
    let mut body = hello(model);
    body["service_tier"] = "flex".into();
    body
}

/// The one lease of a class that the entry node holds on a model.
async fn held(fabric: &Fabric, model: &str, class: &str) -> LeaseLine {
    let mut held = fabric.leases(ENTRY, Side::Held, model).await;
    held.retain(|line| line.class == class);
    assert_eq!(held.len(), 1, "{class}: {held:?}");
    held.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_wait_costs_less_under_a_lease_of_its_own() {
    let (fabric, server) = hosting(&["works"]).await;
    let web = fabric.web();
    let listed = web.get("/v1/models/works").await.json();
    assert_eq!(listed["pricing"]["completion"], "0.000004", "{listed}");
    assert_eq!(listed["flex_pricing"]["completion"], "0.000002", "{listed}");
    // 11 and 5 tokens.
    for (body, cost, tier) in
        [(hello("works"), 0.000_031, Value::Null), (flex("works"), 0.000_015_5, json!("flex"))]
    {
        let answer = web.chat(&body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let said = answer.json();
        assert_eq!(
            (&said["usage"]["cost"], &said["service_tier"]),
            (&json!(cost), &tier),
            "{said}"
        );
        assert!(server.seen("works").last.get("service_tier").is_none(), "the lease says it");
    }
    for (class, prompt) in [("firm", 1_000_000_000), ("slack", 500_000_000)] {
        let lease = held(&fabric, "works", class).await.lease.expect("granted");
        let verdict = fabric.proven(HOST, &lease, 1).await;
        let terms = verdict.model.expect("on a model");
        assert_eq!((terms.rates.prompt, verdict.price_checked), (Amount(prompt), true), "{class}");
    }
    // Its price is what it is held against.
    let mut dear = flex("works");
    dear["provider"] = json!({"max_price": {"prompt": 0.6}});
    assert_eq!(web.chat(&dear).await.status, 200);
    dear["service_tier"] = "default".into();
    assert_eq!(web.chat(&dear).await.status, 503);
    assert_eq!(fabric.metric(HOST, "leasehold_model_slack_requests_total").await, 2);
    // What is not sold so is said by name.
    fabric
        .put(HOST, "works", &ModelSpec { slack: Some(String::new()), ..ModelSpec::default() })
        .await;
    until("the end of that", PATIENCE, || async {
        let listed = web.get("/v1/models/works").await.json();
        listed["flex_pricing"].is_null().then_some(()).ok_or_else(|| listed.to_string())
    })
    .await;
    let refused = web.chat(&flex("works")).await;
    assert_eq!(
        (refused.status.as_u16(), &refused.fault()["param"]),
        (400, &json!("service_tier")),
        "{refused:?}"
    );
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_wait_waits_while_there_is_something_else() {
    let (fabric, server) = hosting(&["endless"]).await;
    let web = fabric.web();
    let mut body = hello("endless");
    body["max_tokens"] = 100_000.into();
    let mut busy = Vec::new();
    for _ in 0..2 {
        let mut events = web.stream(&body).await;
        events.next().await.expect("more").expect("more");
        busy.push(events);
    }
    // It has come, and is not begun.
    body["service_tier"] = "flex".into();
    let (asker, asked) = (web.clone(), body.clone());
    let waiting = tokio::spawn(async move {
        let mut events = asker.stream(&asked).await;
        let first = events.next().await.expect("more").expect("more");
        (events, first)
    });
    until("its coming", PATIENCE, || async {
        let come = fabric.metric(HOST, "leasehold_model_slack_requests_total").await;
        (come == 1).then_some(()).ok_or_else(|| come.to_string())
    })
    .await;
    assert_eq!(server.seen("endless").asked, 2);
    // What cannot wait does not stand behind it.
    body["service_tier"] = "default".into();
    let mut third = web.stream(&body).await;
    third.next().await.expect("more").expect("more");
    assert_eq!(server.seen("endless").asked, 3);
    drop((busy, third));
    let (events, first) = waiting.await.expect("it is begun");
    let first: Value = serde_json::from_slice(&first).expect("JSON");
    assert_eq!(first["service_tier"], "flex", "{first}");
    // It goes on beside others; the next one waits until it is told to come again.
    body["service_tier"] = "default".into();
    let mut firm = web.stream(&body).await;
    firm.next().await.expect("more").expect("more");
    body["service_tier"] = "flex".into();
    let refused = web.chat(&body).await;
    assert_eq!(
        (refused.status.as_u16(), &refused.fault()["code"]),
        (429, &json!("resource_unavailable")),
        "{refused:?}"
    );
    assert!(refused.header("retry-after").parse::<u64>().is_ok(), "{refused:?}");
    assert_eq!(fabric.metric(HOST, "leasehold_model_slack_refused_total").await, 1);
    drop((events, firm));
    fabric.idle(HOST, "endless", PATIENCE).await;
    let slack = held(&fabric, "endless", "slack").await.lease.expect("granted");
    fabric.proven(HOST, &slack, 1).await;
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_disagreed_total").await, 0);
    fabric.stop().await;
}
