//! Clients that ask what cannot be answered, and clients that do not read what they asked for.

use std::time::{Duration, Instant};

use leasehold_node::infer::MAX_REQUEST;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::fabric::{ENTRY, Fabric, price};
use super::upstream::Upstream;
use super::web::{Web, until};
use super::{PATIENCE, hello};

const HOST: usize = 1;
const CHAT: &str = "/v1/chat/completions";

/// A fabric with one host that sells a tiny model, whose context is 256 tokens.
async fn hosting() -> Fabric {
    let fabric = Fabric::start(&["host"]).await;
    fabric.tiny(HOST, "tiny", price("1", "4")).await;
    fabric.offered("tiny", 1).await;
    fabric
}

/// What is wrong, what is sent, and what it is answered: a status, a code or any, a field or any.
type Case = (&'static str, &'static str, String, u16, Option<&'static str>, Option<&'static str>);

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_asked_wrongly_is_answered_in_openais_words() {
    let fabric = hosting().await;
    let web = fabric.web();
    let with = |field: &str, value: Value| {
        let mut body = hello("tiny");
        body[field] = value;
        body.to_string()
    };
    let without = |field: &str| {
        let mut body = hello("tiny");
        body.as_object_mut().expect("an object").remove(field);
        body.to_string()
    };
    let said = |text: &str| json!([{"role": "user", "content": text}]);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let embed = |body: Value| body.to_string();
    let cases: Vec<Case> = vec![
        ("no JSON", CHAT, "{\"model\": ".into(), 400, None, None),
        ("nothing", CHAT, String::new(), 400, None, None),
        ("an array", CHAT, "[]".into(), 400, None, None),
        ("a number", CHAT, "7".into(), 400, None, None),
        ("too deep", CHAT, format!("{{\"messages\": {deep}}}"), 400, None, None),
        ("more behind it", CHAT, format!("{} x", hello("tiny")), 400, None, None),
        (
            "a field twice",
            CHAT,
            "{\"model\":\"tiny\",\"model\":\"tiny\"}".into(),
            400,
            None,
            Some("model"),
        ),
        (
            "an unknown field",
            CHAT,
            with("temprature", json!(1)),
            400,
            Some("unknown_parameter"),
            Some("temprature"),
        ),
        (
            "no model",
            CHAT,
            without("model"),
            400,
            Some("missing_required_parameter"),
            Some("model"),
        ),
        (
            "no messages",
            CHAT,
            without("messages"),
            400,
            Some("missing_required_parameter"),
            Some("messages"),
        ),
        ("messages as text", CHAT, with("messages", json!("hello")), 400, None, Some("messages")),
        ("no message", CHAT, with("messages", json!([])), 400, None, Some("messages")),
        ("a message of nobody", CHAT, with("messages", json!([{"content": "x"}])), 400, None, None),
        (
            "a role of its own",
            CHAT,
            with("messages", json!([{"role": "god", "content": "x"}])),
            400,
            None,
            Some("messages[0].role"),
        ),
        (
            "temperature as text",
            CHAT,
            with("temperature", json!("hot")),
            400,
            None,
            Some("temperature"),
        ),
        ("too hot", CHAT, with("temperature", json!(3)), 400, None, Some("temperature")),
        ("colder than cold", CHAT, with("temperature", json!(-1)), 400, None, Some("temperature")),
        (
            "hot beyond numbers",
            CHAT,
            hello("tiny").to_string().replace("\"temperature\":0", "\"temperature\":1e999"),
            400,
            None,
            None,
        ),
        ("top_p beyond one", CHAT, with("top_p", json!(1.5)), 400, None, Some("top_p")),
        ("less than no tokens", CHAT, with("max_tokens", json!(-5)), 400, None, Some("max_tokens")),
        ("half a token", CHAT, with("max_tokens", json!(0.5)), 400, None, Some("max_tokens")),
        (
            "tokens beyond numbers",
            CHAT,
            with("max_tokens", json!(1e30)),
            400,
            None,
            Some("max_tokens"),
        ),
        ("no answer", CHAT, with("n", json!(0)), 400, None, Some("n")),
        ("many answers", CHAT, with("n", json!(100_000)), 400, None, Some("n")),
        ("a hundred stops", CHAT, with("stop", json!(vec!["x"; 100])), 400, None, Some("stop")),
        ("stream as text", CHAT, with("stream", json!("yes")), 400, None, Some("stream")),
        (
            "options without a stream",
            CHAT,
            with("stream_options", json!({"include_usage": true})),
            400,
            None,
            Some("stream_options"),
        ),
        ("a bias of a million", CHAT, with("logit_bias", json!({"5": 1e6})), 400, None, None),
        (
            "tools of a model that has none",
            CHAT,
            with(
                "tools",
                json!([{"type": "function",
            "function": {"name": "f", "parameters": {}}}]),
            ),
            400,
            Some("unsupported_parameter"),
            Some("tools"),
        ),
        (
            "JSON of one that has none",
            CHAT,
            with(
                "response_format",
                json!({"type":
            "json_object"}),
            ),
            400,
            Some("unsupported_parameter"),
            Some("response_format"),
        ),
        (
            "a picture",
            CHAT,
            with(
                "messages",
                json!([{"role": "user", "content": [{"type":
            "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]),
            ),
            400,
            Some("unsupported_parameter"),
            Some("messages"),
        ),
        (
            "a provider's unknown field",
            CHAT,
            with("provider", json!({"cheapest": true})),
            400,
            None,
            None,
        ),
        (
            "a provider that cannot be promised",
            CHAT,
            with("provider", json!({"zdr": true})),
            400,
            None,
            None,
        ),
        (
            "an unknown model",
            CHAT,
            hello("gpt-9").to_string(),
            404,
            Some("model_not_found"),
            Some("model"),
        ),
        ("a model without a name", CHAT, hello("").to_string(), 400, None, Some("model")),
        (
            "a name beyond names",
            CHAT,
            hello(&"m".repeat(5_000)).to_string(),
            400,
            None,
            Some("model"),
        ),
        ("a name with control signs", CHAT, hello("a\u{0}\u{1b}[2J").to_string(), 400, None, None),
        (
            "too long a prompt",
            CHAT,
            with("messages", said(&"a b c d ".repeat(200))),
            400,
            Some("context_length_exceeded"),
            Some("messages"),
        ),
        (
            "far too long a prompt",
            CHAT,
            with("messages", said(&"long ".repeat(1_000_000))),
            400,
            Some("context_length_exceeded"),
            Some("messages"),
        ),
        (
            "many messages",
            CHAT,
            with(
                "messages",
                json!(vec![
                    json!({"role": "user", "content":
            "x"});
                    20_000
                ]),
            ),
            400,
            None,
            Some("messages"),
        ),
        (
            "a prompt that is no text",
            "/v1/completions",
            json!({"model": "tiny", "prompt":
            {"a": 1}})
            .to_string(),
            400,
            None,
            Some("prompt"),
        ),
        (
            "tokens that are none",
            "/v1/completions",
            json!({"model": "tiny", "prompt":
            [1, 2, 99_999_999]})
            .to_string(),
            400,
            None,
            None,
        ),
        (
            "embeddings of a model that has none",
            "/v1/embeddings",
            embed(json!({"model": "tiny",
            "input": "x"})),
            400,
            Some("unsupported_endpoint"),
            Some("model"),
        ),
        (
            "embeddings of nothing",
            "/v1/embeddings",
            embed(json!({"model": "tiny", "input": []})),
            400,
            None,
            Some("input"),
        ),
        (
            "an encoding that is none",
            "/v1/embeddings",
            embed(json!({"model": "tiny", "input": "x",
            "encoding_format": "morse"})),
            400,
            None,
            Some("encoding_format"),
        ),
        (
            "responses of a model without",
            "/v1/responses",
            json!({"model": "tiny", "input":
            "x"})
            .to_string(),
            400,
            None,
            None,
        ),
    ];
    let mut wrong = Vec::new();
    for (what, path, body, status, code, param) in cases {
        let begun = Instant::now();
        let answer = web.send("POST", path, body).await.whole().await;
        if answer.status == 200 {
            wrong.push(format!("{what}: it was answered: {}", answer.json()));
            continue;
        }
        let fault = answer.fault();
        let same =
            |field: &str, expected: Option<&str>| expected.is_none_or(|word| fault[field] == word);
        let right = answer.status == status && same("code", code) && same("param", param);
        if !right {
            wrong.push(format!(
                "{what}: {} and not {status} {code:?} {param:?}: {fault}",
                answer.status
            ));
        }
        if begun.elapsed() > Duration::from_secs(10) {
            wrong.push(format!("{what}: it took {:?}", begun.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");

    // The body itself.
    let answer = web.send("POST", CHAT, &b"\xff\xfe{}"[..]).await.whole().await;
    assert_eq!(answer.status, 400, "{answer:?}");
    answer.fault();
    let (status, fault) = announced(&web, MAX_REQUEST + 1).await;
    assert_eq!((status, fault["error"]["code"].as_str()), (413, Some("request_too_large")));
    // Methods.
    for (method, path) in
        [("GET", CHAT), ("DELETE", CHAT), ("PUT", "/v1/embeddings"), ("POST", "/v1/models")]
    {
        let answer = web.send(method, path, "{}").await.whole().await;
        assert_eq!(answer.status, 405, "{method} {path}");
        answer.fault();
    }
    let answer = web.get("/v1/models/gpt-9").await;
    assert_eq!((answer.status.as_u16(), &answer.fault()["code"]), (404, &json!("model_not_found")));
    // Keys.
    for key in [None, Some("lh-nobody"), Some("")] {
        let stranger = Web { at: web.at, key: key.map(str::to_owned) };
        for answer in [stranger.chat(&hello("tiny")).await, stranger.get("/v1/models").await] {
            assert_eq!(answer.status, 401, "{key:?}");
            answer.fault();
            assert!(answer.header("www-authenticate").starts_with("Bearer"), "{answer:?}");
        }
    }
    // Nothing of it has left anything behind.
    fabric.idle(HOST, "tiny", PATIENCE).await;
    for node in [ENTRY, HOST] {
        fabric.is_well(node).await;
    }
    // Who would take more than there is room for gets what there is room for.
    let answer = web.send("POST", CHAT, with("max_tokens", json!(100_000))).await.whole().await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let total = &answer.json()["usage"]["total_tokens"];
    assert!(total.as_u64().is_some_and(|total| total <= 256), "{total}");
    let lease = fabric.held("tiny").await.lease.expect("granted");
    // Only this one was answered, so only this one is billed.
    fabric.proven(HOST, &lease, 1).await;
    fabric.stop().await;
}

/// Says that a body of so many bytes follows, and reads what is answered before one has come.
async fn announced(web: &Web, length: usize) -> (u16, Value) {
    let mut stream = TcpStream::connect(web.at).await.expect("it listens");
    stream.write_all(head(web, length).as_bytes()).await.expect("written");
    let mut text = String::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut text)).await;
    let status = text.split(' ').nth(1).and_then(|word| word.parse().ok());
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status.unwrap_or(0), serde_json::from_str(body).unwrap_or_default())
}

fn head(web: &Web, length: usize) -> String {
    format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n",
        web.at,
        web.key.as_deref().unwrap_or_default(),
    )
}

/// Asks for a stream without an end, and reads nothing of it.
async fn never_reads(web: &Web) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    // So little fits that a server has to wait soon.
    socket.set_recv_buffer_size(4_096).expect("set");
    let mut stream = socket.connect(web.at).await.expect("it listens");
    let mut body = hello("flood");
    body["stream"] = true.into();
    body["max_tokens"] = 100_000.into();
    let body = body.to_string();
    let text = head(web, body.len()) + &body;
    stream.write_all(text.as_bytes()).await.expect("written");
    stream
}

/// A handful is enough to fill what one connection between two nodes carries, where each of them
/// may fill much of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_few_clients_that_never_read_hold_up_nobody() {
    never_reading(6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_that_never_read_hold_up_nobody() {
    const CLIENTS: usize = 1_000;
    // Both ends of each socket are open here, and both of each to the server behind.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let clients = limit.map_or(CLIENTS, |most| CLIENTS.min(most as usize / 4));
    never_reading(clients).await;
}

async fn never_reading(clients: usize) {
    let fabric = hosting().await;
    let server = Upstream::start().await;
    fabric.upstream(HOST, ("flood", "flood"), &server, price("0", "0")).await;
    fabric.offered("flood", 1).await;
    let web = fabric.web();
    assert_eq!(web.chat(&hello("tiny")).await.status, 200);
    let resident = |node: usize| {
        fabric.fleet.member(node).expect("there").usage().expect("runs").resident >> 20
    };
    let before = (resident(ENTRY), resident(HOST));
    let mut silent = Vec::new();
    for _ in 0..clients {
        silent.push(never_reads(&web).await);
    }
    // As many as the adapter lets through flow until they are full or given up; the others were
    // refused.
    until("the flood", PATIENCE, || async {
        let asked = server.seen("flood").asked;
        (asked >= clients.min(400)).then_some(()).ok_or_else(|| asked.to_string())
    })
    .await;
    let mut chunks = 0;
    until("a standstill", PATIENCE, || {
        let now = server.seen("flood").chunks;
        let still = std::mem::replace(&mut chunks, now) == now;
        async move {
            tokio::time::sleep(Duration::from_millis(500)).await;
            still.then_some(()).ok_or_else(|| now.to_string())
        }
    })
    .await;
    let after = (resident(ENTRY), resident(HOST));
    println!(
        "{clients} clients that never read: {} flow, {} MiB made; resident MiB at the entry node \
         {} to {}, at the host {} to {}",
        server.seen("flood").open,
        chunks * 8 / 1_024,
        before.0,
        after.0,
        before.1,
        after.1,
    );
    let each = |(before, after): (u64, u64)| after.saturating_sub(before) * 1_024 / clients as u64;
    for (who, kib) in [("entry", each((before.0, after.0))), ("host", each((before.1, after.1)))] {
        println!("{who}: {kib} KiB for each of them");
        if clients < 100 {
            // What a few of them hold is within what a node needs anyway.
            continue;
        }
        assert!(kib < 1_024, "{who} holds {kib} KiB for each client that does not read");
    }
    // Others are answered meanwhile, and not when a minute has passed and each side gives up.
    for _ in 0..5 {
        let begun = Instant::now();
        let answer = web.chat(&hello("tiny")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let streamed = web.stream(&hello("tiny")).await.all().await;
        assert!(streamed.done, "{streamed:?}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    }
    fabric.is_well(ENTRY).await;
    // Who leaves is not waited for.
    let half = silent.split_off(clients / 2);
    drop(silent);
    // And who stays is not served for ever: a minute is what each side waits for the other.
    let begun = Instant::now();
    until("the end of all of them", Duration::from_secs(150), || async {
        let open = server.seen("flood").open;
        (open == 0).then_some(()).ok_or_else(|| open.to_string())
    })
    .await;
    println!("all ended {} s after half of them left", begun.elapsed().as_secs());
    fabric.idle(HOST, "flood", PATIENCE).await;
    drop(half);
    for node in [ENTRY, HOST] {
        fabric.is_well(node).await;
    }
    assert_eq!(web.chat(&hello("tiny")).await.status, 200);
    fabric.stop().await;
}
