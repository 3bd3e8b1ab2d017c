//! The adapter against upstreams that do as they are told, good and bad.

mod mock;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use self::mock::{Mock, Reply, Step, ends, says, send};
use super::*;
use crate::model::engine::{Piece, WAITING};
use crate::openai::Counted;

/// Long enough for anything that is to happen.
const LONG: Duration = Duration::from_secs(20);
/// A wait that is to run out.
const SHORT: Duration = Duration::from_millis(80);

fn upstream(url: &str, change: impl FnOnce(&mut Config)) -> Upstream {
    let mut config = Config::new(url.parse().unwrap());
    change(&mut config);
    Upstream::new(config).unwrap()
}

fn chat(stream: bool, more: serde_json::Value) -> Ask {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}],
        "stream": stream});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Ask { endpoint: Endpoint::Chat, body: body.to_string().into(), stream }
}

/// All that comes: the data, and how it ends.
async fn all(mut pieces: Pieces) -> (Vec<String>, Option<Result<Counted, Fault>>) {
    let mut data = Vec::new();
    while let Some(piece) = timeout(LONG, pieces.recv()).await.expect("a piece or the end") {
        match piece {
            Ok(Piece::Prompt(_)) => {}
            Ok(Piece::Data(bytes)) => data.push(String::from_utf8(bytes.to_vec()).unwrap()),
            Ok(Piece::Done(counted)) => {
                assert!(pieces.recv().await.is_none(), "nothing after the end");
                return (data, Some(Ok(counted)));
            }
            Err(fault) => {
                assert!(pieces.recv().await.is_none(), "nothing after a fault");
                return (data, Some(Err(fault)));
            }
        }
    }
    (data, None)
}

async fn streamed(steps: Vec<Step>, more: serde_json::Value) -> (usize, Result<Counted, Fault>) {
    let mock = Mock::start(move |_| Reply::Stream(steps.clone())).await;
    let upstream = upstream(&mock.url, |_| {});
    let (data, end) = all(upstream.ask(chat(true, more)).await.unwrap()).await;
    (data.len(), end.expect("an end"))
}

const WHOLE: &str = r#"{"choices":[{"message":{"content":"hello"},"finish_reason":"stop"}],
    "usage":{"prompt_tokens":3,"completion_tokens":2}}"#;

fn whole(status: u16, body: &str) -> Reply {
    let json = vec![("content-type", "application/json")];
    Reply::Whole(status, json, Bytes::from(body.to_owned()))
}

#[tokio::test]
async fn a_stream_passes_event_by_event() {
    let seen = Arc::new(Mutex::new(None));
    let told = seen.clone();
    let go = Arc::new(Notify::new());
    let wait = go.clone();
    let mock = Mock::start(move |asked| {
        *told.lock().unwrap() = Some(asked.clone());
        let mut steps = vec![
            send(": keep-alive\n\ndata: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\r\n\r\n"),
            says("he"),
            Step::Wait(wait.clone()),
            // One event in two pieces.
            send("data: {\"choices\":[{\"delta\":{\"conte"),
            send("nt\":\"llo\"}}],\"new\":1}\n\n"),
        ];
        steps.extend(ends(4, 2));
        Reply::Stream(steps)
    })
    .await;
    let upstream = upstream(&mock.url, |config| {
        config.key = Some(Key::new("secret\n").unwrap());
        config.model = Some("there/m".to_owned());
    });
    assert_eq!(upstream.load().state, State::Down);
    let mut pieces = upstream.ask(chat(true, json!({}))).await.unwrap();
    for _ in 0..2 {
        assert!(matches!(timeout(LONG, pieces.recv()).await, Ok(Some(Ok(Piece::Data(_))))));
    }
    // The second is here while the upstream has not made the third.
    assert_eq!(upstream.load().active, 1);
    go.notify_one();
    let (data, end) = all(pieces).await;
    assert_eq!(data[0], r#"{"choices":[{"delta":{"content":"llo"}}],"new":1}"#);
    assert_eq!(data.len(), 3);
    assert_eq!(end, Some(Ok(Counted { prompt: 4, cached: 1, completion: 2 })));
    let asked = seen.lock().unwrap().take().unwrap();
    assert_eq!(asked.path, "/v1/chat/completions");
    assert_eq!(asked.headers["authorization"], "Bearer secret");
    let body: serde_json::Value = serde_json::from_slice(&asked.body).unwrap();
    assert_eq!((&body["model"], &body["stream"]), (&json!("there/m"), &json!(true)));
    let load = upstream.load();
    assert_eq!((load.state, load.active), (State::Warm, 0));
    assert!(load.first_token > Duration::ZERO);
    assert!(!format!("{upstream:?}").contains("secret"));
}

#[tokio::test]
async fn connections_are_used_again() {
    let mock = Mock::start(|asked| {
        if asked.headers["accept"] == "text/event-stream" {
            Reply::Stream([vec![says("a")], ends(1, 1)].concat())
        } else if asked.path.ends_with("embeddings") {
            whole(400, r#"{"error":{"message":"no"}}"#)
        } else {
            whole(200, WHOLE)
        }
    })
    .await;
    let upstream = upstream(&mock.url, |_| {});
    for round in 0..12 {
        let mut ask = chat(round % 3 == 0, json!({}));
        if round % 3 == 1 {
            ask.endpoint = Endpoint::Embeddings;
            assert_eq!(upstream.ask(ask).await.unwrap_err().status, 400);
            continue;
        }
        let mut pieces = upstream.ask(ask).await.unwrap();
        while let Some(piece) = timeout(LONG, pieces.recv()).await.unwrap() {
            piece.unwrap();
        }
        // A stream's connection goes back a moment after its last piece.
        while upstream.inner.links.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(mock.connections(), 1);
    let counts = upstream.counts();
    assert_eq!((counts.connected, counts.reused, counts.asked), (1, 11, 12));
    assert_eq!((counts.failed, counts.dropped), (4, 0));
}

#[tokio::test]
async fn who_hangs_up_stops_the_generation() {
    let mock = Mock::start(|asked| match asked.headers["accept"].to_str() {
        Ok("text/event-stream") => Reply::Stream(vec![says("a"), Step::Hang]),
        _ => Reply::Never,
    })
    .await;
    let upstream = upstream(&mock.url, |_| {});
    // In the middle of a stream.
    let mut pieces = upstream.ask(chat(true, json!({}))).await.unwrap();
    assert!(timeout(LONG, pieces.recv()).await.unwrap().is_some());
    drop(pieces);
    timeout(LONG, mock.gone.notified()).await.expect("the upstream sees it");
    // While the answer is waited for.
    {
        let ask = upstream.ask(chat(false, json!({})));
        tokio::pin!(ask);
        while mock.asked.load(Ordering::SeqCst) < 2 {
            assert!(futures::poll!(&mut ask).is_pending());
            tokio::task::yield_now().await;
        }
    }
    timeout(LONG, mock.gone.notified()).await.expect("the upstream sees it");
    while upstream.load().active > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(upstream.counts().dropped, 2);
    assert_eq!(mock.connections(), 2, "neither connection was used again");
}

#[tokio::test]
async fn an_upstream_that_never_stops_by_itself_stops_with_its_reader() {
    let mock =
        Mock::start(|_| Reply::Stream(std::iter::repeat_n(says("a"), 100_000).collect())).await;
    let long = upstream(&mock.url, |_| {});
    let mut pieces = long.ask(chat(true, json!({}))).await.unwrap();
    assert!(timeout(LONG, pieces.recv()).await.unwrap().is_some());
    // Whoever does not read holds up the upstream, and no memory grows.
    while pieces.len() < WAITING {
        tokio::task::yield_now().await;
    }
    drop(pieces);
    timeout(LONG, mock.gone.notified()).await.expect("the upstream sees it");
    // One that neither reads nor goes away is given up as well.
    let short = upstream(&mock.url, |config| config.waits.stream = SHORT);
    let pieces = short.ask(chat(true, json!({}))).await.unwrap();
    timeout(LONG, mock.gone.notified()).await.expect("the upstream sees it");
    let (data, end) = all(pieces).await;
    assert!(data.len() <= WAITING + 1, "{}", data.len());
    assert_eq!(end.unwrap().unwrap_err().status, 502);
}

#[tokio::test]
async fn upstreams_that_hang_are_given_up() {
    let waits = |config: &mut Config| {
        config.waits = Waits { first: SHORT, between: SHORT, whole: SHORT, ..Waits::default() };
    };
    let never = Mock::start(|_| Reply::Never).await;
    let stuck = upstream(&never.url, waits);
    for stream in [true, false] {
        let fault = stuck.ask(chat(stream, json!({}))).await.unwrap_err();
        assert_eq!(fault.status, 408, "{fault}");
        timeout(LONG, never.gone.notified()).await.expect("the upstream sees it");
    }
    for (steps, pieces, status) in [
        (vec![Step::Hang], 0, 408),
        (vec![send(": hello\n\n"), Step::Hang], 0, 408),
        (vec![says("a"), Step::Hang], 1, 502),
    ] {
        let mock = Mock::start(move |_| Reply::Stream(steps.clone())).await;
        let stuck = upstream(&mock.url, waits);
        let (data, end) = all(stuck.ask(chat(true, json!({}))).await.unwrap()).await;
        assert_eq!((data.len(), end.unwrap().unwrap_err().status), (pieces, status));
        timeout(LONG, mock.gone.notified()).await.expect("the upstream sees it");
        assert_eq!(stuck.counts().failed, 1);
    }
}

#[tokio::test]
async fn lies_about_usage_are_cut_and_counted() {
    let long = "x".repeat(50);
    for (steps, more, completion, implausible) in [
        (ends(1, 50), json!({}), 50, 0),
        (ends(1, 1_000_000), json!({}), 50 + 64, 1),
        (ends(1, 40), json!({"max_tokens": 9}), 9, 1),
        (ends(1 << 40, 5), json!({}), 5, 1),
    ] {
        let steps = [vec![says(&long)], steps].concat();
        let mock = Mock::start(move |_| Reply::Stream(steps.clone())).await;
        let upstream = upstream(&mock.url, |_| {});
        let (_, end) = all(upstream.ask(chat(true, more)).await.unwrap()).await;
        let counted = end.unwrap().unwrap();
        assert_eq!(counted.completion, completion);
        assert!(counted.prompt < 4_096);
        assert_eq!(upstream.counts().implausible, implausible);
    }
    let lie = r#"{"choices":[{"message":{"content":"hello"}}],
        "usage":{"prompt_tokens":3,"completion_tokens":900}}"#;
    let mock = Mock::start(move |_| whole(200, lie)).await;
    let liar = upstream(&mock.url, |_| {});
    let (_, end) = all(liar.ask(chat(false, json!({}))).await.unwrap()).await;
    assert_eq!(end.unwrap().unwrap().completion, 5 + 64);
    assert_eq!(liar.counts().implausible, 1);
}

#[tokio::test]
async fn usage_that_is_missing() {
    let steps = vec![says("hello"), says(""), says("you"), send("data: [DONE]\n\n")];
    let mock = Mock::start(move |_| Reply::Stream(steps.clone())).await;
    let silent = upstream(&mock.url, |_| {});
    let (_, end) = all(silent.ask(chat(true, json!({}))).await.unwrap()).await;
    assert_eq!(end, Some(Ok(Counted { prompt: 0, cached: 0, completion: 2 })));
    assert_eq!(silent.counts().unreported, 1);
    let mock = Mock::start(|_| whole(200, r#"{"choices":[{"message":{"content":"a"}}]}"#)).await;
    let silent = upstream(&mock.url, |_| {});
    assert_eq!(silent.ask(chat(false, json!({}))).await.unwrap_err().status, 502);
}

#[tokio::test]
async fn what_breaks_in_the_middle_is_a_fault_and_never_done() {
    let huge = format!("data: {}\n\n", "x".repeat(2 << 20));
    let error = "data: {\"error\":{\"message\":\"out of memory\",\"code\":500}}\n\n";
    for (steps, status) in [
        (vec![says("a")], 502),
        (vec![says("a"), send("data: [DONE")], 502),
        (vec![says("a"), send(error)], 502),
        (vec![says("a"), send("data: {\"error\":{\"message\":\"busy\",\"code\":503}}\n\n")], 503),
        (vec![says("a"), send("data: {\"error\":{\"message\":\"long\",\"code\":400}}\n\n")], 400),
        (vec![says("a"), send("data: {\"error\":{\"message\":\"key\",\"code\":401}}\n\n")], 503),
        (vec![says("a"), send("data: garbage\n\n")], 502),
        (vec![says("a"), send("data: [1,2]\n\n")], 502),
        (vec![says("a"), Step::Send(Bytes::from_static(b"data: {\"a\":\"\xff\"}\n\n"))], 502),
        (vec![says("a"), send(huge)], 502),
    ] {
        let (pieces, end) = streamed(steps.clone(), json!({})).await;
        let fault = end.expect_err("no end");
        assert_eq!((pieces, fault.status), (1, status), "{steps:?}");
        assert!(!fault.message.contains("key") || fault.message.contains("refused its key"));
    }
    // The connection breaks, once the first piece is there.
    let go = Arc::new(Notify::new());
    let steps = vec![says("a"), Step::Wait(go.clone()), Step::Break];
    let mock = Mock::start(move |_| Reply::Stream(steps.clone())).await;
    let broken = upstream(&mock.url, |_| {});
    let mut pieces = broken.ask(chat(true, json!({}))).await.unwrap();
    assert!(matches!(timeout(LONG, pieces.recv()).await, Ok(Some(Ok(Piece::Data(_))))));
    go.notify_one();
    let (data, end) = all(pieces).await;
    assert_eq!((data.len(), end.unwrap().unwrap_err().status), (0, 502));
    // More than was asked for, without end.
    let steps = std::iter::repeat_n(says("a"), 5_000).collect();
    let (pieces, end) = streamed(steps, json!({"max_tokens": 10})).await;
    assert_eq!((pieces, end.unwrap_err().status), (2 * 10 + 1_024, 502));
}

#[tokio::test]
async fn an_end_without_done_counts_when_the_answer_was_finished() {
    let end = r#"data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1}}"#;
    let (pieces, counted) = streamed(vec![says("a"), send(format!("{end}\n\n"))], json!({})).await;
    assert_eq!((pieces, counted.unwrap().completion), (2, 1));
    // Responses have no other end.
    let steps = vec![
        send(
            "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"hi\"}\n\n",
        ),
        send(
            "data: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":3,\"output_tokens\":1}}}\n\n",
        ),
    ];
    let mock = Mock::start(move |_| Reply::Stream(steps.clone())).await;
    let upstream = upstream(&mock.url, |_| {});
    let body = Bytes::from_static(b"{\"model\":\"m\",\"input\":\"hi\",\"stream\":true}");
    let ask = Ask { endpoint: Endpoint::Responses, body, stream: true };
    let (data, end) = all(upstream.ask(ask).await.unwrap()).await;
    assert_eq!(data.len(), 2);
    assert_eq!(end, Some(Ok(Counted { prompt: 3, cached: 0, completion: 1 })));
}

#[tokio::test]
async fn errors_are_translated() {
    let openai = r#"{"error":{"message":"the client's","type":"invalid_request_error","param":"p","code":"c"}}"#;
    for (status, ours, passed) in [
        (400, 400, true),
        (404, 503, false),
        (408, 408, true),
        (413, 413, true),
        (422, 400, true),
        (429, 429, true),
        (401, 503, false),
        (402, 503, false),
        (403, 503, false),
        (405, 502, false),
        (302, 502, false),
        (500, 502, false),
        (502, 502, false),
        (503, 503, false),
        (504, 503, false),
    ] {
        let mock = Mock::start(move |_| {
            let headers = vec![("retry-after", "7")];
            Reply::Whole(status, headers, Bytes::from_static(openai.as_bytes()))
        })
        .await;
        let upstream = upstream(&mock.url, |_| {});
        let fault = upstream.ask(chat(true, json!({}))).await.unwrap_err();
        assert_eq!(fault.status, ours, "{status}");
        assert_eq!(fault.message == "the client's", passed, "{status}");
        assert_eq!(fault.param.is_some(), passed, "{status}");
        assert_eq!(fault.retry_after_seconds(), Some(7), "{status}");
    }
    for (stream, reply, status) in [
        (true, whole(200, "{}"), 502),
        (true, whole(200, r#"{"error":{"message":"m"}}"#), 502),
        (false, whole(200, "<html>"), 502),
        (false, whole(200, r#"{"error":{"message":"m","code":400}}"#), 400),
        (false, whole(200, ""), 502),
        (false, Reply::Stream(vec![says("a")]), 502),
    ] {
        let mock = Mock::start(move |_| reply.clone()).await;
        let upstream = upstream(&mock.url, |_| {});
        assert_eq!(upstream.ask(chat(stream, json!({}))).await.unwrap_err().status, status);
    }
}

#[tokio::test]
async fn nobody_there_and_nonsense_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = upstream(&format!("http://{}", listener.local_addr().unwrap()), |_| {});
    drop(listener);
    assert_eq!(nobody.ask(chat(true, json!({}))).await.unwrap_err().status, 503);
    assert_eq!(nobody.probe().await.unwrap_err().status, 503);
    assert_eq!(nobody.load().state, State::Down);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut some = [0; 16];
            let _ = stream.read(&mut some).await;
            let _ = stream.write_all(b"220 mail.example ESMTP\r\n\r\n").await;
        }
    });
    let mail = upstream(&url, |_| {});
    assert_eq!(mail.ask(chat(false, json!({}))).await.unwrap_err().status, 502);
}

/// A server that answers once on each connection and closes it when it is used again.
#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_made_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let made = Arc::new(AtomicUsize::new(0));
    let count = made.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let mut some = vec![0; 4_096];
                let _ = stream.read(&mut some).await;
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
                let answer = format!("{head}content-length: {}\r\n\r\n{WHOLE}", WHOLE.len());
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.read(&mut some).await;
            });
        }
    });
    let upstream = upstream(&url, |_| {});
    for asked in 1..=3 {
        let (_, end) = all(upstream.ask(chat(false, json!({}))).await.unwrap()).await;
        assert_eq!(end.unwrap().unwrap().completion, 2);
        assert_eq!(made.load(Ordering::SeqCst), asked);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_all_come_to_their_end() {
    let mock = Mock::start(|_| Reply::Stream([vec![says("a"); 20], ends(1, 20)].concat())).await;
    let upstream = upstream(&mock.url, |_| {});
    let asks = (0..300).map(|at| {
        let upstream = upstream.clone();
        tokio::spawn(async move {
            let pieces = upstream.ask(chat(true, json!({}))).await.unwrap();
            // Some give up.
            if at % 3 == 0 { None } else { Some(all(pieces).await) }
        })
    });
    for ask in futures::future::join_all(asks).await {
        if let Some((data, end)) = ask.unwrap() {
            assert_eq!(data.len(), 22);
            assert_eq!(end.unwrap().unwrap().completion, 20);
        }
    }
    while upstream.load().active > 0 {
        tokio::task::yield_now().await;
    }
    assert!(upstream.inner.links.waiting() <= 64);
    assert_eq!(upstream.counts().failed, 0);
}

#[tokio::test]
async fn no_more_than_so_many_at_once() {
    let mock = Mock::start(|_| Reply::Stream(vec![says("a"), Step::Hang])).await;
    let upstream = upstream(&mock.url, |config| config.most_active = 1);
    let first = upstream.ask(chat(true, json!({}))).await.unwrap();
    let fault = upstream.ask(chat(true, json!({}))).await.unwrap_err();
    assert_eq!((fault.status, fault.code.as_deref()), (503, Some("overloaded")));
    drop(first);
    while upstream.load().active > 0 {
        tokio::task::yield_now().await;
    }
    assert!(upstream.ask(chat(true, json!({}))).await.is_ok());
}

#[tokio::test]
async fn what_this_node_asks_is_counted_once() {
    let mock = Mock::start(|asked| match asked.path.as_str() {
        "/v1/models" => whole(200, r#"{"data":[{"id":"a","owned_by":"llamacpp"}]}"#),
        "/metrics" => whole(200, "llamacpp:requests_processing 2\nllamacpp:requests_deferred 4\n"),
        "/v1/chat/completions" => Reply::Stream(vec![says("a"), Step::Hang]),
        _ => whole(404, "{}"),
    })
    .await;
    let engine = upstream(&mock.url, |_| {});
    let mut own = Vec::new();
    for _ in 0..3 {
        own.push(engine.ask(chat(true, json!({}))).await.unwrap());
    }
    engine.probe().await.unwrap();
    // Of six two run and one waits for this node: three wait for others.
    let load = engine.load();
    assert_eq!((load.active, load.queued), (3, 3));
    drop(own);
    while engine.load().active > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(engine.load().queued, 3);
}

#[tokio::test]
async fn probes_find_out_what_is_there() {
    let metrics = "vllm:num_requests_running{engine=\"0\"} 3\nvllm:num_requests_waiting 2\n\
                   vllm:prefix_cache_queries_total 800\nvllm:prefix_cache_hits_total 200\n";
    let vllm = Mock::start(move |asked| match asked.path.as_str() {
        "/health" => whole(200, ""),
        "/v1/models" => whole(
            200,
            r#"{"object":"list","data":[{"id":"m","owned_by":"vllm","max_model_len":4096}]}"#,
        ),
        "/metrics" => whole(200, metrics),
        "/v1/responses" => whole(400, "{}"),
        _ => whole(404, "{}"),
    })
    .await;
    let engine = upstream(&vllm.url, |config| config.model = Some("m".into()));
    assert_eq!(engine.nature(), Nature::default());
    let found = engine.probe().await.unwrap();
    assert_eq!(found.models, [Listed { id: "m".into(), context: Some(4_096) }]);
    let (context, responses) = (Some(4_096), Some(true));
    assert_eq!(engine.nature(), Nature { context, responses, trouble: None });
    let load = engine.load();
    assert_eq!((load.state, load.active, load.queued), (State::Warm, 3, 2));
    assert_eq!(load.cached_permille, Some(250));
    engine.probe().await.unwrap();
    assert_eq!(vllm.asked.load(Ordering::SeqCst), 7, "the second time without responses");
    assert_eq!(vllm.connections(), 1);
    // What it does not have is not offered, and its operator is told.
    let engine = upstream(&vllm.url, |config| config.model = Some("n".into()));
    assert_eq!(engine.probe().await.unwrap().state, State::Down);
    let trouble = engine.nature().trouble.expect("it is wrong");
    assert_eq!(trouble, "the server does not list 'n': it has m");

    let llama = Mock::start(|asked| match asked.path.as_str() {
        "/health" => whole(200, r#"{"status":"ok"}"#),
        "/v1/models" => whole(200, r#"{"data":[{"id":"/w/a.gguf","owned_by":"llamacpp"}]}"#),
        "/props" => whole(200, r#"{"default_generation_settings":{"n_ctx":2048},"total_slots":4}"#),
        _ => whole(404, "{}"),
    })
    .await;
    let engine = upstream(&llama.url, |config| config.model = Some("any".into()));
    for _ in 0..2 {
        assert_eq!(engine.probe().await.unwrap().state, State::Warm, "it takes any name");
        let (context, responses) = (Some(2_048), Some(false));
        assert_eq!(engine.nature(), Nature { context, responses, trouble: None });
    }
    assert_eq!(llama.asked.load(Ordering::SeqCst), 8, "what does not change is asked once");

    let loaded = Arc::new(AtomicBool::new(false));
    let says_loaded = loaded.clone();
    let ollama = Mock::start(move |asked| match asked.path.as_str() {
        "/v1/models" => whole(
            200,
            r#"{"data":[{"id":"a:latest","owned_by":"library"},{"id":"","owned_by":"library"}]}"#,
        ),
        "/api/ps" if says_loaded.load(Ordering::SeqCst) => {
            whole(200, r#"{"models":[{"name":"a:latest","model":"a:latest"}]}"#)
        }
        "/api/ps" => whole(200, r#"{"models":[]}"#),
        _ => whole(404, "404 page not found"),
    })
    .await;
    let engine = upstream(&ollama.url, |config| config.model = Some("a".into()));
    let found = engine.probe().await.unwrap();
    assert_eq!((found.state, found.models.len(), found.gauges), (State::Cold, 1, None));
    assert_eq!(engine.nature(), Nature { responses: Some(false), ..Nature::default() });
    loaded.store(true, Ordering::SeqCst);
    assert_eq!(engine.probe().await.unwrap().state, State::Warm);
    // It may have it by another name: its operator is told, and it is tried.
    let engine = upstream(&ollama.url, |config| config.model = Some("c".into()));
    assert_eq!(engine.probe().await.unwrap().state, State::Cold);
    assert!(engine.nature().trouble.is_some_and(|why| why.contains("it has a:latest")));

    // What is not known to be one of these is asked nothing that it need not know, and believed little.
    let other = Mock::start(|asked| match asked.path.as_str() {
        "/v1/models" => whole(
            200,
            r#"{"data":[{"id":"m","owned_by":"vllm","context_length":0},
                {"id":"n","owned_by":5,"max_model_len":99999999999}]}"#,
        ),
        "/health" => whole(503, "{}"),
        _ => whole(200, "{}"),
    })
    .await;
    let engine = upstream(&other.url, |config| config.model = Some("x".into()));
    assert_eq!(engine.probe().await.unwrap().state, State::Warm);
    assert_eq!(engine.nature(), Nature::default());
    assert_eq!(other.asked.load(Ordering::SeqCst), 3);

    // One that works answers late, and is there all the same; while it loads it is what it was.
    let state = Arc::new(AtomicUsize::new(0));
    let now = state.clone();
    let busy = Mock::start(move |asked| match (now.load(Ordering::SeqCst), asked.path.as_str()) {
        (_, "/v1/models") => whole(200, r#"{"data":[{"id":"a","owned_by":"llamacpp"}]}"#),
        (2, _) => whole(503, "{}"),
        (1, _) => Reply::Never,
        (_, "/props") => whole(200, r#"{"default_generation_settings":{"n_ctx":2048}}"#),
        (_, "/v1/responses") => whole(400, "{}"),
        _ => whole(200, "llamacpp:requests_processing 3\n"),
    })
    .await;
    let engine = upstream(&busy.url, |config| config.waits.probe = SHORT);
    let nature = Nature { context: Some(2_048), responses: Some(true), trouble: None };
    for expected in [State::Warm, State::Warm, State::Loading] {
        assert_eq!(engine.probe().await.unwrap().state, expected);
        assert_eq!(engine.nature(), nature, "{expected:?}");
        state.fetch_add(1, Ordering::SeqCst);
    }

    for (path, status, state) in [
        ("/health", 503, Ok(State::Loading)),
        ("/v1/models", 503, Ok(State::Loading)),
        ("/v1/models", 401, Err(503)),
        ("/v1/models", 500, Err(502)),
    ] {
        let mock = Mock::start(move |asked| {
            let list = r#"{"data":[{"id":"a","owned_by":"llamacpp"}]}"#;
            if asked.path == path { whole(status, "{}") } else { whole(200, list) }
        })
        .await;
        let engine = upstream(&mock.url, |_| {});
        let found = engine.probe().await.map(|found| found.state).map_err(|fault| fault.status);
        assert_eq!(found, state);
    }
    for body in ["", "[]", "{\"data\":{}}", "{\"data\":[{\"id\":1}]}"] {
        let mock = Mock::start(move |_| whole(200, body)).await;
        assert_eq!(upstream(&mock.url, |_| {}).probe().await.unwrap_err().status, 502);
    }
    let stuck = Mock::start(|_| Reply::Never).await;
    let stuck = upstream(&stuck.url, |config| config.waits.probe = SHORT);
    assert_eq!(stuck.probe().await.unwrap_err().status, 408);
}

#[tokio::test]
async fn https_is_spoken_to_whoever_proves_its_name() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.key_pair.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let mock = Mock::start_with(|_| whole(200, WHOLE), Some(acceptor)).await;
    let known = upstream(&mock.url, |config| config.roots = vec![certificate.clone()]);
    for _ in 0..2 {
        let (_, end) = all(known.ask(chat(false, json!({}))).await.unwrap()).await;
        assert!(end.unwrap().is_ok());
    }
    assert_eq!(known.counts().connected, 1);
    let by_number = mock.url.replace("localhost", "127.0.0.1");
    let misnamed = upstream(&by_number, |config| config.roots = vec![certificate]);
    assert_eq!(misnamed.ask(chat(false, json!({}))).await.unwrap_err().status, 503);
}

#[test]
fn keys_are_read_and_never_shown() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key");
    std::fs::write(&path, " sk-abc \n").unwrap();
    let key = Key::read(&path).unwrap();
    assert_eq!(key, Key::new("sk-abc").unwrap());
    assert!(!format!("{key:?}").contains("abc"));
    for text in ["", " \n", "a b", "a\nb", "é", &"x".repeat(5_000)] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(Key::read(&path), Err(KeyError::Malformed)), "{text}");
    }
    assert!(matches!(Key::read(directory.path()), Err(KeyError::Io(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: cargo test --release -- --ignored --nocapture"]
async fn how_much_is_added() {
    let mock = Mock::start(|asked| match asked.headers["accept"].to_str() {
        Ok("text/event-stream") => {
            Reply::Stream([std::iter::repeat_n(says("a"), 100).collect(), ends(1, 100)].concat())
        }
        _ => whole(200, WHOLE),
    })
    .await;
    let engine = upstream(&mock.url, |_| {});
    let plain = Links::new(mock.url.parse().unwrap(), LONG, vec![]).unwrap();
    for stream in [false, true] {
        let mut ours = Vec::new();
        let mut bare = Vec::new();
        for _ in 0..1_000 {
            let start = std::time::Instant::now();
            let mut pieces = engine.ask(chat(stream, json!({}))).await.unwrap();
            while let Some(piece) = pieces.recv().await {
                std::hint::black_box(piece.unwrap());
            }
            ours.push(start.elapsed());
            // The same with hyper alone.
            let ask = chat(stream, json!({}));
            let path = path_of(&engine.inner, Endpoint::Chat);
            let accept = if stream { "text/event-stream" } else { "application/json" };
            let request = engine.inner.request(Method::POST, path, accept, ask.body).unwrap();
            let start = std::time::Instant::now();
            let (response, link) = plain.send(request).await.unwrap();
            http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
            bare.push(start.elapsed());
            plain.keep(link).await;
        }
        ours.sort_unstable();
        bare.sort_unstable();
        let at = |of: &[Duration], percent: usize| of[of.len() * percent / 100];
        println!(
            "stream {stream}: ours p50 {:?} p99 {:?}, hyper alone p50 {:?} p99 {:?}",
            at(&ours, 50),
            at(&ours, 99),
            at(&bare, 50),
            at(&bare, 99)
        );
    }
}
