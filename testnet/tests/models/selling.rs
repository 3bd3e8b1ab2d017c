//! What is sold, by whom it is answered, what it costs, and what both sides can prove afterwards,
//! also when a seller is killed between requests, within one, or comes back.

use std::time::Instant;

use leasehold_node::api::body::Side;
use leasehold_node::api::model::{KeyLines, KeyMade, KeySpec};
use leasehold_proto::Amount;
use leasehold_proto::words::contract::EndReason;
use leasehold_proto::words::model::TokenRates;
use serde_json::{Value, json};

use super::fabric::{ENTRY, Fabric, price};
use super::upstream::Upstream;
use super::web::until;
use super::{PATIENCE, hello};

const CHEAP: usize = 1;
const DEAR: usize = 2;

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// A chat that goes to the cheapest.
fn cheapest(model: &str) -> Value {
    let mut body = hello(model);
    body["provider"] = json!({"sort": "price"});
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cheap_one_answers_and_the_dear_one_takes_over_and_both_sides_prove_it() {
    let mut fabric = Fabric::start(&["cheap", "dear"]).await;
    fabric.tiny(CHEAP, "tiny", price("0.1", "0.4")).await;
    fabric.tiny(DEAR, "tiny", price("1", "4")).await;
    fabric.offered("tiny", 2).await;
    let web = fabric.web();
    let listed = web.get("/v1/models").await.json();
    let model = &listed["data"][0];
    assert_eq!((listed["object"].as_str(), model["id"].as_str()), (Some("list"), Some("tiny")));
    assert_eq!(model["providers"], 2, "{model}");
    assert_eq!(model["demo"], true, "so small a model is there to show how things work");

    // Whole.
    let answer = web.chat(&cheapest("tiny")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("x-leasehold-node"), "cheap");
    assert!(answer.header("x-request-id").starts_with("req-"), "{:?}", answer.headers);
    let said = answer.json();
    assert_eq!(said["object"], "chat.completion");
    assert_eq!((said["model"].as_str(), said["provider"].as_str()), (Some("tiny"), Some("cheap")));
    let text = said["choices"][0]["message"]["content"].as_str().expect("a text").to_owned();
    let usage = &said["usage"];
    let (prompt, completion) =
        (number(&usage["prompt_tokens"]), number(&usage["completion_tokens"]));
    assert!(prompt > 4 && (1..=8).contains(&completion), "{usage}");
    assert_eq!(number(&usage["total_tokens"]), prompt + completion);
    let rates = TokenRates { prompt: Amount(100_000_000), completion: Amount(400_000_000) };
    let cost = rates.charge(prompt, completion);
    assert_eq!(usage["cost"].as_f64().map(|cost| (cost * 1e9).round() as u64), Some(cost.0));
    assert_eq!(usage["cost_currency"], "USD");

    // In events; greedy, so with the same words.
    let mut body = cheapest("tiny");
    body["stream_options"] = json!({"include_usage": true});
    let events = web.stream(&body).await;
    assert_eq!(events.status, 200);
    assert!(events.header("content-type").starts_with("text/event-stream"), "{events:?}");
    assert_eq!(events.header("x-leasehold-node"), "cheap");
    assert!(events.header("x-request-id").starts_with("req-"), "{events:?}");
    let streamed = events.all().await;
    assert!(streamed.done && streamed.error().is_none(), "{streamed:?}");
    assert_eq!(streamed.text(), text);
    let billed = streamed.usage().expect("it was asked for");
    assert_eq!(
        (&billed["prompt_tokens"], &billed["completion_tokens"], &billed["cost"]),
        (&usage["prompt_tokens"], &usage["completion_tokens"], &usage["cost"])
    );
    // Who does not ask for usage gets none.
    let streamed = web.stream(&cheapest("tiny")).await.all().await;
    assert!(streamed.done && streamed.usage().is_none(), "{streamed:?}");
    // Once more, so that one lease serves several.
    assert_eq!(web.chat(&cheapest("tiny")).await.header("x-leasehold-node"), "cheap");

    let held = fabric.held("tiny").await;
    let lease = held.lease.clone().expect("granted");
    let lent = fabric.agreed(CHEAP, &lease, 4).await;
    assert_eq!(lent.charge.0, rates.charge(4 * prompt, 4 * completion));
    let running = fabric.proven(CHEAP, &lease, 4).await;
    assert_eq!(running.end, None);

    // The dear one on purpose, and a lease there.
    let mut body = hello("tiny");
    body["provider"] = json!({"only": ["dear"]});
    let answer = web.chat(&body).await;
    assert_eq!(answer.header("x-leasehold-node"), "dear", "{answer:?}");
    let by_price = answer.json()["usage"]["cost"].as_f64().expect("a cost");
    assert!((by_price * 1e9 - cost.0 as f64 * 10.0).abs() < 11.0, "{by_price} {cost:?}");

    // Between requests.
    fabric.fleet.kill(CHEAP).expect("runs");
    let killed = Instant::now();
    let answer = web.chat(&cheapest("tiny")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("x-leasehold-node"), "dear");
    println!("taken over {} ms after the kill", killed.elapsed().as_millis());
    let again = Instant::now();
    assert_eq!(web.chat(&cheapest("tiny")).await.header("x-leasehold-node"), "dear");
    assert!(again.elapsed().as_secs() < 5, "it is remembered: {:?}", again.elapsed());

    let dear = fabric.leases(ENTRY, Side::Held, "tiny").await;
    let dear: Vec<_> =
        dear.iter().filter_map(|line| line.lease.clone()).filter(|id| *id != lease).collect();
    assert_eq!(dear.len(), 1, "one lease for one seller: {dear:?}");
    fabric.agreed(DEAR, &dear[0], 3).await;
    let client = fabric.client(ENTRY);
    let path = format!("/v1/leases/{}/release", dear[0]);
    client.act(hyper::Method::POST, &path, PATIENCE).await.expect("released");
    until("the end of the lease", PATIENCE, || async {
        let end = fabric.verdict(DEAR, &dear[0]).await.end;
        (end == Some(EndReason::Released)).then_some(()).ok_or_else(|| format!("{end:?}"))
    })
    .await;
    fabric.proven(DEAR, &dear[0], 3).await;
    // A lease that ended is not used again.
    let answer = web.chat(&cheapest("tiny")).await;
    assert_eq!((answer.status.as_u16(), answer.header("x-leasehold-node")), (200, "dear"));
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_disagreed_total").await, 0);
    fabric.stop().await;
}

/// Kills the cheap one while a request waits there, and sees that the dear one answers it.
async fn killed_within(stream: bool) {
    let mut fabric = Fabric::start(&["cheap", "dear"]).await;
    let server = Upstream::start().await;
    fabric.upstream(CHEAP, ("m", "hangs"), &server, price("0.1", "0.4")).await;
    fabric.upstream(DEAR, ("m", "works"), &server, price("1", "4")).await;
    fabric.offered("m", 2).await;
    let web = fabric.web();
    let asking = tokio::spawn(async move {
        let mut body = cheapest("m");
        body["stream"] = stream.into();
        web.send("POST", "/v1/chat/completions", body.to_string()).await
    });
    until("the request at the cheap one", PATIENCE, || async {
        let seen = server.seen("hangs").asked;
        (seen == 1).then_some(()).ok_or_else(|| format!("{seen}"))
    })
    .await;
    fabric.fleet.kill(CHEAP).expect("runs");
    let killed = Instant::now();
    let events = asking.await.expect("asked");
    assert_eq!(events.status, 200);
    if stream {
        // A stream that waited for long has begun before anybody answered, and names the node in
        // its chunks alone.
        let streamed = events.all().await;
        assert!(streamed.done && streamed.error().is_none(), "{streamed:?}");
        assert_eq!(streamed.text(), "Hello from the other server");
        assert!(streamed.chunks.iter().all(|chunk| chunk["provider"] == "dear"), "{streamed:?}");
    } else {
        assert_eq!(events.header("x-leasehold-node"), "dear");
        let said = events.whole().await.json();
        assert_eq!(said["choices"][0]["message"]["content"], "Hello from the other server");
    }
    println!("stream {stream}: answered {} ms after the kill", killed.elapsed().as_millis());
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_fallbacks_total").await, 1);
    // One request, answered once and paid for once.
    let held = fabric.leases(ENTRY, Side::Held, "m").await;
    let dear = fabric.fleet.member(DEAR).expect("there").file().expect("runs").id.to_string();
    let (paid, lost): (Vec<_>, Vec<_>) = held.into_iter().partition(|line| line.lessor == dear);
    assert_eq!((paid.len(), lost.len()), (1, 1), "{paid:?} {lost:?}");
    let lease = paid[0].lease.clone().expect("granted");
    fabric.proven(DEAR, &lease, 1).await;
    assert_eq!(lost[0].charge.0, Amount::ZERO);
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_killed_before_its_answer_is_replaced() {
    killed_within(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_killed_before_the_first_word_of_a_stream_is_replaced() {
    killed_within(true).await;
}

/// Once a client has a word, nobody else goes on in the middle: it is told so instead, and owes
/// nothing for half an answer.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_killed_within_a_stream_is_not_replaced() {
    let mut fabric = Fabric::start(&["cheap", "dear"]).await;
    let server = Upstream::start().await;
    fabric.upstream(CHEAP, ("m", "endless"), &server, price("0.1", "0.4")).await;
    fabric.upstream(DEAR, ("m", "works"), &server, price("1", "4")).await;
    fabric.offered("m", 2).await;
    let spec = KeySpec { name: "ada".into(), ..KeySpec::default() };
    let made: KeyMade = fabric.client(ENTRY).post("/v1/api-keys", &spec).await.expect("made");
    let web = fabric.web().with_key(made.key);
    let mut body = cheapest("m");
    body["max_tokens"] = 100_000.into();
    let mut events = web.stream(&body).await;
    assert_eq!(events.header("x-leasehold-node"), "cheap");
    for _ in 0..5 {
        events.next().await.expect("more").expect("more");
    }
    fabric.fleet.kill(CHEAP).expect("runs");
    let killed = Instant::now();
    let streamed = events.all().await;
    println!("told {} ms after the kill", killed.elapsed().as_millis());
    assert!(!streamed.done && !streamed.broken, "{streamed:?}");
    assert_eq!(streamed.error().expect("it is told")["type"], "server_error");
    assert!(streamed.chunks.iter().all(|chunk| chunk["provider"] != "dear"), "{streamed:?}");
    assert_eq!(server.seen("works").asked, 0);
    let keys: KeyLines = fabric.client(ENTRY).get("/v1/api-keys").await.expect("answers");
    assert_eq!((keys.keys[0].tokens, keys.keys[0].spent.as_str()), (0, "0"));
    // The next one goes where somebody is.
    let answer = web.chat(&cheapest("m")).await;
    assert_eq!((answer.status.as_u16(), answer.header("x-leasehold-node")), (200, "dear"));
    fabric.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seller_that_comes_back_goes_on_counting_where_it_was() {
    let mut fabric = Fabric::start(&["seller"]).await;
    fabric.tiny(1, "tiny", price("0.1", "0.4")).await;
    fabric.offered("tiny", 1).await;
    let web = fabric.web();
    for _ in 0..3 {
        assert_eq!(web.chat(&hello("tiny")).await.status, 200);
    }
    let lease = fabric.held("tiny").await.lease.expect("granted");
    fabric.agreed(1, &lease, 3).await;
    fabric.fleet.kill(1).expect("runs");
    fabric.fleet.start_one(1).await.expect("starts again");
    fabric.fleet.map(PATIENCE).await.expect("all see all");
    let mut answered = 0;
    until("an answer after the restart", PATIENCE, || async {
        let answer = web.chat(&hello("tiny")).await;
        if answer.status == 200 { Ok(()) } else { Err(answer.fault().to_string()) }
    })
    .await;
    answered += 1;
    for _ in 0..2 {
        let answer = web.chat(&hello("tiny")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answered += 1;
    }
    // Whether it was taken up again or a new lease was taken: no request is lost, and none is
    // counted twice, on either side.
    let leases = fabric.leases(ENTRY, Side::Held, "tiny").await;
    let ids: Vec<_> = leases.iter().filter_map(|line| line.lease.clone()).collect();
    assert!(ids == [lease.as_str()], "the lease that was there is good for more: {ids:?}");
    let verdict = fabric.proven(1, &lease, 3 + answered).await;
    assert_eq!(verdict.end, None);
    assert_eq!(fabric.metric(ENTRY, "leasehold_gateway_disagreed_total").await, 0);

    // The other side comes back: it asks under a lease anew, and what it held is still proven.
    fabric.fleet.kill(ENTRY).expect("runs");
    fabric.fleet.start_one(ENTRY).await.expect("starts again");
    fabric.fleet.map(PATIENCE).await.expect("all see all");
    fabric.offered("tiny", 1).await;
    assert_eq!(fabric.web().chat(&hello("tiny")).await.status, 200);
    fabric.proven(1, &lease, 3 + answered).await;
    let leases = fabric.leases(ENTRY, Side::Held, "tiny").await;
    let new = leases.iter().filter_map(|line| line.lease.clone()).find(|id| *id != lease);
    if let Some(new) = new {
        fabric.proven(1, &new, 1).await;
    }
    fabric.stop().await;
}
