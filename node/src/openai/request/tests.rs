//! Requests in tables: what is read, what is refused and by which name, what goes on.

use serde_json::{Value, json};

use super::*;
use crate::openai::dice::Dice;

fn parse(endpoint: Endpoint, body: &Value) -> Result<Request, Fault> {
    Request::parse(endpoint, &body.to_string().into())
}

fn chat(more: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    merge(&mut body, more);
    body
}

fn merge(body: &mut Value, more: Value) {
    let (Value::Object(body), Value::Object(more)) = (body, more) else { panic!("objects") };
    body.extend(more);
}

#[test]
fn a_chat_is_read() {
    let body = json!({
        "model": "a/b:nitro",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "name": "ann", "content": [
                {"type": "text", "text": "what is "}, {"type": "text", "text": "this?"},
                {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
                "function": {"name": "f", "arguments": "{}"}}], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "1", "content": "4"}],
        "stream": true, "stream_options": {"include_usage": true},
        "temperature": 0.5, "top_p": 1, "n": 1, "seed": -3, "stop": ["a", "b"],
        "max_completion_tokens": 10, "presence_penalty": 0, "frequency_penalty": null,
        "logit_bias": {"50256": -100}, "logprobs": true, "top_logprobs": 3, "user": "u",
        "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto",
        "response_format": {"type": "text"}, "models": ["c"], "provider": {"only": ["n"]},
        "service_tier": "auto", "store": false, "metadata": {"a": "b"}, "modalities": ["text"],
        "parallel_tool_calls": true, "usage": {"include": true}});
    let request = parse(Endpoint::Chat, &body).unwrap();
    assert_eq!((request.model.as_str(), request.provider.sort), ("a/b", Some(Sort::Throughput)));
    assert_eq!(
        (request.models.as_slice(), &*request.provider.only),
        (&["c".into()][..], &["n".into()][..])
    );
    assert!(request.stream && request.include_usage);
    let expected = Sampling {
        temperature: Some(0.5),
        top_p: Some(1.0),
        n: Some(1),
        seed: Some(-3),
        stop: vec!["a".into(), "b".into()],
        max_tokens: Some(10),
        presence_penalty: Some(0.0),
        logit_bias: vec![(50_256, -100.0)],
        logprobs: Some(3),
        ..Sampling::default()
    };
    assert_eq!(request.sampling, expected);
    let Input::Messages(messages) = &request.input else { panic!("messages") };
    assert_eq!(messages[1].text(), "what is this?");
    assert_eq!(messages[1].name.as_deref(), Some("ann"));
    assert!(messages[2].parts.is_empty() && messages[2].tool_calls.is_some());
    assert_eq!(messages[3].tool_call_id.as_deref(), Some("1"));
    let needs = [Need::Tools, Need::Images, Need::Logprobs, Need::LogitBias];
    assert_eq!(request.needs(), needs.into_iter().collect());
    assert_eq!(request.check(Needs::PLAIN, "a/b").unwrap_err().param.as_deref(), Some("tools"));
}

#[test]
fn what_asks_for_nothing_needs_nothing() {
    for more in [
        json!({"tool_choice": "auto", "parallel_tool_calls": false, "tools": null}),
        json!({"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}),
        json!({"logprobs": false, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0}),
        json!({"response_format": {"type": "text"}, "modalities": ["text"], "store": false}),
        json!({"service_tier": "default", "verbosity": "medium", "metadata": {}}),
    ] {
        let request = parse(Endpoint::Chat, &chat(more.clone())).unwrap();
        assert!(request.needs().is_plain(), "{more}: {:?}", request.needs());
    }
    let request = parse(Endpoint::Chat, &chat(json!({"user": "ann", "tool_choice": "required"})));
    let request = request.unwrap();
    assert!(request.needs().has(Need::Tools));
    assert!(!format!("{request:?}").contains("hi"), "nothing of what is asked");
}

#[test]
fn what_can_wait_says_so_in_openais_word() {
    for (tier, class, needs) in [
        ("auto", Wanted::Firm, vec![]),
        ("default", Wanted::Firm, vec![]),
        ("flex", Wanted::Slack, vec![]),
        ("priority", Wanted::Firm, vec![Need::ServiceTier]),
    ] {
        let request = parse(Endpoint::Chat, &chat(json!({ "service_tier": tier }))).unwrap();
        assert_eq!(request.class, class, "{tier}");
        assert_eq!(request.needs(), needs.into_iter().collect(), "{tier}");
        let sent: Value = serde_json::from_slice(&request.forward("m", true)).unwrap();
        assert_eq!(sent.get("service_tier").is_some(), tier != "flex", "{tier}: the lease says it");
    }
}

#[test]
fn the_other_endpoints_are_read() {
    for (endpoint, body, prompts, needs) in [
        (Endpoint::Completions, json!({"prompt": "a"}), vec![Prompt::Text("a".into())], vec![]),
        (
            Endpoint::Completions,
            json!({"prompt": ["a", "b"], "max_tokens": 0, "logprobs": 5, "echo": true}),
            vec![Prompt::Text("a".into()), Prompt::Text("b".into())],
            vec![Need::Prompts, Need::Logprobs, Need::Echo],
        ),
        (
            Endpoint::Completions,
            json!({"prompt": [1, 2], "suffix": "x", "best_of": 2}),
            vec![Prompt::Tokens(vec![1, 2])],
            vec![Need::TokenPrompt, Need::Suffix, Need::BestOf],
        ),
        (
            Endpoint::Embeddings,
            json!({"input": ["a", "b"], "encoding_format": "base64", "dimensions": 64}),
            vec![Prompt::Text("a".into()), Prompt::Text("b".into())],
            vec![Need::Dimensions],
        ),
        (
            Endpoint::Embeddings,
            json!({"input": [[1], [2, 3]]}),
            vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])],
            vec![Need::TokenPrompt],
        ),
    ] {
        let mut body = body;
        merge(&mut body, json!({"model": "m"}));
        let request = parse(endpoint, &body).unwrap();
        assert_eq!(request.input, Input::Prompts(prompts), "{body}");
        assert_eq!(request.needs(), needs.into_iter().collect(), "{body}");
    }
    let body = json!({"model": "m", "input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": "x"}]}], "text": {"format": {"type": "json_schema",
        "name": "n", "schema": {}}}, "previous_response_id": "r", "max_output_tokens": 5});
    let request = parse(Endpoint::Responses, &body).unwrap();
    assert_eq!((&request.input, request.sampling.max_tokens), (&Input::Opaque, Some(5)));
    let needs = [Need::Images, Need::Structured, Need::Store];
    assert_eq!(request.needs(), needs.into_iter().collect());
}

#[test]
fn what_is_wrong_in_a_chat_is_refused_by_name() {
    let parts = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    for (more, param, code) in [
        (json!({"temprature": 1}), "temprature", "unknown_parameter"),
        (json!({"prompt": "a"}), "prompt", "unknown_parameter"),
        (json!({"best_of": 1}), "best_of", "unknown_parameter"),
        (json!({"model": null}), "model", "missing_required_parameter"),
        (json!({"model": 1}), "model", "invalid_type"),
        (json!({"model": ""}), "model", "invalid_value"),
        (json!({"model": "x".repeat(MODEL + 1)}), "model", "string_above_max_length"),
        (json!({"messages": null}), "messages", "missing_required_parameter"),
        (json!({"messages": []}), "messages", "empty_array"),
        (json!({"messages": "hi"}), "messages", "invalid_type"),
        (json!({"messages": ["hi"]}), "messages[0]", "invalid_type"),
        (json!({"messages": [{"content": "a"}]}), "messages[0].role", "missing_required_parameter"),
        (
            json!({"messages": [{"role": "king", "content": "a"}]}),
            "messages[0].role",
            "invalid_value",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            "messages[0].content",
            "missing_required_parameter",
        ),
        (
            json!({"messages": [{"role": "user", "content": 1}]}),
            "messages[0].content",
            "invalid_type",
        ),
        (
            json!({"messages": [{"role": "user", "content": []}]}),
            "messages[0].content",
            "empty_array",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "a"}]}),
            "messages[0].tool_call_id",
            "missing_required_parameter",
        ),
        (parts(json!({"text": "a"})), "messages[0].content[0].type", "missing_required_parameter"),
        (parts(json!({"type": "smell"})), "messages[0].content[0].type", "invalid_value"),
        (
            parts(json!({"type": "text"})),
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (parts(json!({"type": "text", "text": 1})), "messages[0].content[0].text", "invalid_type"),
        (
            parts(json!({"type": "image_url"})),
            "messages[0].content[0].image_url",
            "missing_required_parameter",
        ),
        (json!({"stream": "yes"}), "stream", "invalid_type"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", ""),
        (
            json!({"stream": true, "stream_options": {"x": 1}}),
            "stream_options.x",
            "unknown_parameter",
        ),
        (json!({"temperature": 2.1}), "temperature", "decimal_above_max_value"),
        (json!({"temperature": "1"}), "temperature", "invalid_type"),
        (json!({"top_p": -0.1}), "top_p", "decimal_below_min_value"),
        (json!({"n": 0}), "n", "integer_below_min_value"),
        (json!({"n": 129}), "n", "integer_above_max_value"),
        (json!({"n": 1.5}), "n", "invalid_type"),
        (json!({"seed": 1.5}), "seed", "invalid_type"),
        (json!({"stop": ["1", "2", "3", "4", "5"]}), "stop", "array_above_max_length"),
        (json!({"stop": [1]}), "stop[0]", "invalid_type"),
        (json!({"max_tokens": 0}), "max_tokens", "integer_below_min_value"),
        (json!({"max_tokens": 1u64 << 40}), "max_tokens", "integer_above_max_value"),
        (
            json!({"max_tokens": 1, "max_completion_tokens": 2}),
            "max_tokens",
            "invalid_parameter_combination",
        ),
        (json!({"presence_penalty": 3}), "presence_penalty", "decimal_above_max_value"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias", "invalid_value"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1", "decimal_above_max_value"),
        (json!({"logit_bias": []}), "logit_bias", "invalid_type"),
        (json!({"logprobs": 1}), "logprobs", "invalid_type"),
        (json!({"top_logprobs": 1}), "top_logprobs", ""),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "integer_above_max_value"),
        (json!({"tools": []}), "tools", "empty_array"),
        (json!({"tools": [{}]}), "tools[0].type", "missing_required_parameter"),
        (json!({"tool_choice": "maybe"}), "tool_choice", "invalid_value"),
        (json!({"response_format": "json"}), "response_format", "invalid_type"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "invalid_value"),
        (
            json!({"response_format": {"type": "json_schema"}}),
            "response_format.json_schema",
            "missing_required_parameter",
        ),
        (json!({"modalities": ["smell"]}), "modalities[0]", "invalid_value"),
        (json!({"metadata": {"a": 1}}), "metadata.a", "invalid_type"),
        (json!({"models": [""]}), "models[0]", "invalid_value"),
        (json!({"provider": {"zdr": true}}), "provider.zdr", "unsupported_value"),
        (json!({"usage": {"exclude": true}}), "usage.exclude", "unknown_parameter"),
        (json!({"user": "u".repeat(NAME + 1)}), "user", "string_above_max_length"),
    ] {
        let fault = parse(Endpoint::Chat, &chat(more.clone())).unwrap_err();
        assert_eq!(fault.status, 400);
        assert_eq!(fault.param.as_deref(), Some(param), "{more}: {fault}");
        assert_eq!(fault.code.as_deref().unwrap_or(""), code, "{more}: {fault}");
    }
}

#[test]
fn what_is_wrong_elsewhere_is_refused_by_name() {
    for (endpoint, body, param) in [
        (Endpoint::Completions, json!({}), "prompt"),
        (Endpoint::Completions, json!({"prompt": {}}), "prompt"),
        (Endpoint::Completions, json!({"prompt": []}), "prompt"),
        (Endpoint::Completions, json!({"prompt": [1, "a"]}), "prompt"),
        (Endpoint::Completions, json!({"prompt": [-1]}), "prompt"),
        (Endpoint::Completions, json!({"prompt": ["a", 1]}), "prompt[1]"),
        (Endpoint::Completions, json!({"prompt": "a", "logprobs": 6}), "logprobs"),
        (Endpoint::Completions, json!({"prompt": "a", "n": 3, "best_of": 2}), "best_of"),
        (Endpoint::Completions, json!({"prompt": "a", "messages": []}), "messages"),
        (Endpoint::Embeddings, json!({}), "input"),
        (Endpoint::Embeddings, json!({"input": ""}), "input"),
        (Endpoint::Embeddings, json!({"input": [[]]}), "input"),
        (Endpoint::Embeddings, json!({"input": "a", "encoding_format": "hex"}), "encoding_format"),
        (Endpoint::Embeddings, json!({"input": "a", "dimensions": 0}), "dimensions"),
        (Endpoint::Embeddings, json!({"input": "a", "stream": true}), "stream"),
        (Endpoint::Embeddings, json!({"input": vec!["a"; PROMPTS + 1]}), "input"),
        (Endpoint::Responses, json!({"input": 1}), "input"),
        (Endpoint::Responses, json!({"messages": []}), "messages"),
    ] {
        let mut body = body;
        merge(&mut body, json!({"model": "m"}));
        let fault = parse(endpoint, &body).unwrap_err();
        assert_eq!((fault.status, fault.param.as_deref()), (400, Some(param)), "{fault}");
    }
}

#[test]
fn what_is_no_request_is_refused() {
    let deep = format!("{{\"model\":{}", "[".repeat(1 << 20));
    let twice = r#"{"model":"a","model":"b","messages":[{"role":"user","content":"a"}]}"#;
    let many = format!("{{{}\"a\":1}}", "\"a\":1,".repeat(10_000));
    for body in ["", "null", "[]", "\"\"", "{", "{}", "{\"model\":\"m\"}x", &deep, twice, &many] {
        let fault = Request::parse(Endpoint::Chat, &body.to_owned().into()).unwrap_err();
        assert_eq!(fault.status, 400);
        assert!(fault.body().len() < 4_096);
    }
    assert!(Request::parse(Endpoint::Chat, &Bytes::from_static(b"{\"model\":\"\xff\"}")).is_err());
}

#[test]
fn what_goes_on_is_what_came() {
    let body = r#" {"messages" : [ {"role":"user", "content":"h\u00e9"} ], "provider":{},
        "model":"a:floor", "temperature":1.0, "models":["b"], "stream":true,
        "stream_options":{"include_obfuscation":false,"include_usage":false}, "user":null} "#;
    let request = Request::parse(Endpoint::Chat, &body.into()).unwrap();
    assert_eq!(request.provider.sort, Some(Sort::Price));
    assert_eq!(
        request.forward("\"q", true),
        r#"{"messages":[ {"role":"user", "content":"h\u00e9"} ],"model":"\"q","temperature":1.0,"stream":true,"user":null,"stream_options":{"include_obfuscation":false,"include_usage":true}}"#
    );
    assert_eq!(request.forward("m", true), request.clone().forward("m", true));
    let as_it_came: Value = serde_json::from_slice(&request.forward("m", false)).unwrap();
    assert_eq!(as_it_came["stream_options"]["include_usage"], false);
    let whole = parse(Endpoint::Chat, &chat(json!({}))).unwrap();
    assert!(!String::from_utf8_lossy(&whole.forward("m", true)).contains("stream_options"));
    // What goes on is a request again.
    assert!(Request::parse(Endpoint::Chat, &request.forward("m", true)).is_ok());
}

#[test]
fn a_model_can_be_named_otherwise() {
    let body = with_model(br#"{"a": [1, 2],"model":"x","b":1.0}"#, "y").unwrap();
    assert_eq!(body, r#"{"model":"y","a":[1, 2],"b":1.0}"#);
    assert!(with_model(b"[]", "y").is_err());
}

#[test]
fn requests_that_begin_alike_share_numbers() {
    let keys = |messages: &[(&str, &str)], more: Value| {
        let messages: Vec<_> =
            messages.iter().map(|(role, text)| json!({"role": role, "content": text})).collect();
        let mut body = json!({"model": "m", "messages": messages});
        merge(&mut body, more);
        parse(Endpoint::Chat, &body).unwrap().prefix_keys()
    };
    let first = keys(&[("system", "s"), ("user", "a")], json!({}));
    let second = keys(&[("system", "s"), ("user", "a"), ("assistant", "b")], json!({"seed": 1}));
    assert_eq!((first.len(), &second[..2]), (2, &first[..]));
    let other = keys(&[("system", "s"), ("user", "c")], json!({}));
    assert!(other[0] == first[0] && other[1] != first[1]);
    let tools = json!({"tools": [{"type": "function"}]});
    assert_ne!(keys(&[("system", "s")], tools)[0], first[0]);
    let parts =
        json!({"messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}]});
    let parts = parse(Endpoint::Chat, &chat(parts)).unwrap();
    assert_eq!(parts.prefix_keys()[0], first[0], "however it is written");
    let long = keys(&[("user", &"x".repeat(1 << 20))], json!({}));
    assert_eq!(long.len(), 64);
}

#[test]
fn sizes_are_those_of_the_text() {
    let request = parse(Endpoint::Chat, &chat(json!({}))).unwrap();
    assert_eq!(request.prompt_bytes(), 2);
    let body = json!({"model": "m", "prompt": ["abc", "d"]});
    assert_eq!(parse(Endpoint::Completions, &body).unwrap().prompt_bytes(), 4);
}

/// Bodies with bytes changed, cut and doubled: each is read or refused, and what is read goes on
/// as something that is read as the same.
#[test]
fn no_body_does_harm() {
    let seeds = [
        (
            Endpoint::Chat,
            chat(json!({"tools": [{"type": "function", "function": {}}],
            "stop": ["a"], "logit_bias": {"1": 2}, "stream": true, "n": 2, "seed": 1,
            "provider": {"sort": "price", "max_price": {"prompt": 0.5}, "order": ["a"]}})),
        ),
        (Endpoint::Completions, json!({"model": "m", "prompt": [[1, 2], "a"], "echo": true})),
        (Endpoint::Embeddings, json!({"model": "m", "input": ["é", "\\"], "dimensions": 3})),
        (Endpoint::Responses, json!({"model": "m", "input": [{"content": [{"type": "x"}]}]})),
    ];
    let mut dice = Dice::new(42);
    for (endpoint, seed) in seeds {
        let seed = seed.to_string().into_bytes();
        for _ in 0..4_000 {
            let mut body = seed.clone();
            dice.damage(&mut body);
            match Request::parse(endpoint, &body.clone().into()) {
                Ok(request) => {
                    let again = Request::parse(endpoint, &request.forward("m", true)).unwrap();
                    assert_eq!(again.input, request.input);
                    assert_eq!(again.sampling, request.sampling);
                    assert_eq!(again.prefix_keys(), request.prefix_keys());
                }
                Err(fault) => assert_eq!(fault.status, 400),
            }
        }
    }
}
