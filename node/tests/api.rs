//! The API and the command line against real nodes: the `leasehold` binary as processes, on
//! ports of 127.0.0.1 that the system chooses.

#[path = "common/processes.rs"]
mod processes;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use leasehold_keys::armor::{self, Item};
use leasehold_keys::file::Secret;
use leasehold_node::home::Home;
use leasehold_proto::words::charter::Role;
use processes::{COPY, ENDLESS, Fabric, Node, SLOW, WANT, interrupt, program, stderr, until, want};
use serde_json::{Value, json};

// ---------------------------------------------------------------- the API by itself

#[test]
fn the_api_lets_in_only_whom_it_should_and_says_why_not() {
    let fabric = Fabric::new();
    let node = fabric.node("alone", "1", &[]);
    let api = node.file.api;
    let raw = |text: String| node.raw(text.as_bytes());
    let close = "Connection: close\r\n\r\n";

    for path in ["/healthz", "/readyz", "/openapi.json"] {
        let answer = raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{close}"));
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
    }
    for path in ["/v1/node", "/metrics", "/v1/leases", "/v1/payloads", "/nothing"] {
        let answer = raw(format!("GET {path} HTTP/1.1\r\nHost: {api}\r\n{close}"));
        assert_eq!((answer.status, answer.code().as_str()), (401, "unauthorized"), "{path}");
        assert!(answer.head.to_lowercase().contains("www-authenticate: bearer"), "{answer:?}");
    }
    let wrong = "Authorization: Bearer abcdefghijklmnopqrstuvwxyz";
    let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {api}\r\n{wrong}\r\n{close}"));
    assert_eq!(answer.status, 401);
    let token = format!("Authorization: Bearer {}", node.token());
    for host in ["evil.example", "evil.example:7700", "10.1.2.3"] {
        let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {host}\r\n{token}\r\n{close}"));
        assert_eq!((answer.status, answer.code().as_str()), (403, "wrong_host"), "{host}");
        let answer = raw(format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\n{close}"));
        assert_eq!(answer.status, 403, "also where no token is needed");
    }

    assert_eq!(node.get("/v1/node").json()["name"], "alone");
    assert_eq!(node.get("/v1/nothing").code(), "not_found");
    assert_eq!(node.call("DELETE /v1/node", &[], b"").code(), "method_not_allowed");
    assert_eq!(node.get("/v1/leases?al=true").code(), "bad_request");
    assert_eq!(node.get("/v1/leases/xyz").json()["error"]["detail"]["field"], "lease");
    let unknown = "ab".repeat(32);
    for what in ["", "/receipts", "/proof", "/output", "/end"] {
        let answer = node.get(&format!("/v1/leases/{unknown}{what}"));
        assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"), "{what}");
    }

    let plan = |body: Value| node.post("/v1/plan", &body);
    assert_eq!(plan(json!({ "want": want() })).status, 200);
    for (body, named) in [
        (json!({}), "want"),
        (json!({ "want": { "max_price": "1", "budget": "1", "cpus": 2 } }), "cpus"),
        (json!({ "want": { "max_price": "x", "budget": "1" } }), "want.max_price"),
        (json!({ "want": { "max_price": "1", "budget": "1", "cpu": [] } }), "want.cpu"),
    ] {
        let answer = plan(body.clone());
        assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{body}");
        assert!(answer.json()["error"].to_string().contains(named), "{answer:?}");
    }
    let text = ["Content-Type: text/plain"];
    assert_eq!(node.call("POST /v1/plan", &text, b"{}").code(), "unsupported_media_type");
    let json = ["Content-Type: application/json"];
    assert_eq!(node.call("POST /v1/plan", &json, b"{").code(), "bad_request");
    let long = vec![b' '; 300 * 1024];
    assert_eq!(node.call("POST /v1/plan", &json, &long).status, 413);
    let order = node.post("/v1/leases", &json!({ "order": "no armour" }));
    assert_eq!(order.json()["error"]["detail"]["field"], "order");
    let both = node.post("/v1/leases", &json!({ "order": "x", "want": want() }));
    assert_eq!(both.code(), "bad_request");
    let dear = node.post("/v1/leases", &json!({ "want": { "max_price": "0", "budget": "1" } }));
    assert_eq!((dear.status, dear.code().as_str()), (422, "nothing_fits"));

    let metrics = String::from_utf8(node.get("/metrics").body).expect("text");
    for line in ["leasehold_nodes{state=\"up\"} 1", "leasehold_store_syncs_total ", "# EOF"] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }

    // More header lines than are read, and a head that never ends.
    let many = "X: y\r\n".repeat(200);
    let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {api}\r\n{token}\r\n{many}{close}"));
    assert_eq!(answer.status, 431);
    let answer = raw(format!("GET /v1/node HTTP/1.1\r\nHost: {api}\r\nX: {}", "y".repeat(99_999)));
    assert_eq!(answer.status, 431);
}

#[test]
fn payloads_go_in_and_out_as_they_are() {
    let fabric = Fabric::new();
    let node = fabric.node("alone", "0", &[]);
    let bytes: Vec<u8> = (0..700_000u32).map(|n| (n % 251) as u8).collect();
    let root = blake3::hash(&bytes).to_string();
    let path = format!("/v1/payloads/{root}");
    assert_eq!(node.get(&path).status, 404);
    let sent = node.call("POST /v1/payloads", &[], &bytes);
    assert_eq!(sent.status, 201);
    assert_eq!(sent.json(), json!({ "root": root, "size": 700_000, "new": true }));
    let again = node.call("POST /v1/payloads?size=700000", &[], &bytes);
    assert_eq!((again.status, &again.json()["new"]), (200, &json!(false)));
    let got = node.get(&path);
    assert_eq!(got.body, bytes);
    let head = node.call(&format!("HEAD {path}"), &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    let listed = node.get("/v1/payloads").json();
    let line = json!({
        "root": root, "size": 700_000, "pinned": false, "leased": false, "private": false, "index": false,
    });
    assert_eq!(listed, json!({ "payloads": [line] }));
    assert_eq!(node.call("POST /v1/payloads?size=3", &[], b"four").code(), "bad_request");
    assert_eq!(node.get("/v1/payloads/xyz").json()["error"]["detail"]["field"], "root");
    // A file is had by its path only by one who knows what is in it.
    let clone = |path: &str, size: u64| {
        let at = format!("POST /v1/payloads/{root}/clone?size={size}&path={path}");
        let answer = node.call(&at, &[], b"");
        (answer.status, answer.code())
    };
    assert_eq!(clone("relative", 3), (400, "bad_request".into()));
    assert_eq!(clone("/etc/passwd", 700_000), (400, "bad_request".into()));
    assert_eq!(clone("/dev/zero", 0), (400, "bad_request".into()));
    assert_eq!(clone("/no/such", 700_000), (400, "bad_request".into()));
    // Chunks without any length, and a body that is cut.
    let head = format!(
        "POST /v1/payloads HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\
         Connection: close\r\n",
        node.token()
    );
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    assert_eq!(node.raw(chunked.as_bytes()).json()["root"], blake3::hash(b"abc").to_string());
    let mut stream = TcpStream::connect(node.file.api).expect("connects");
    stream.write_all(format!("{head}Content-Length: 9\r\n\r\nhalf").as_bytes()).expect("sent");
    drop(stream);
    until("nothing of a cut body is kept", || {
        let listed = node.get("/v1/payloads").json();
        (listed["payloads"].as_array()?.len() == 2).then_some(())
    });
}

// ---------------------------------------------------------------- the command line

#[test]
fn a_run_goes_on_over_a_killed_node() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let mut buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let slow = program(&fabric, "slow.wasm", SLOW);
    let mut args = vec!["run", "--yes"];
    args.extend(WANT);
    args.push(&slow);
    let mut run = buyer
        .command()
        .args(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut begun = [0; 6];
    run.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("it begins");
    buyer.process.kill().expect("killed");
    buyer.process.wait().expect("gone");
    let (home, api) = (Home::at(&buyer.dir), buyer.file.api);
    let _buyer = fabric.up(&home, "buyer", "0", &[&seller], api);
    let output = run.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(output.stdout, b"done\n", "each byte once");
    assert!(stderr(&output).contains("cost "), "{output:?}");
}

#[test]
fn an_order_signed_on_another_machine_gets_a_lease() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let lessee = Secret::generate().expect("randomness");
    let certificate =
        fabric.founder.admit(lessee.id(), Role::Tenant, "elsewhere", fabric.now).expect("admits");
    let file = |name: &str| fabric.room.path().join(name);
    let text = |name: &str| file(name).display().to_string();
    let keep = leasehold_keys::disk::Existing::Keep;
    armor::write_objects(&file("certificate"), &[Item::Signed(certificate)], keep)
        .expect("written");
    let (key, certificate, draft) = (lessee.id().to_string(), text("certificate"), text("draft"));
    let mut args = vec!["order", "new", "--lessee", &key, "--certificate", &certificate];
    args.extend(["--out", &draft]);
    args.extend(WANT);
    let output = buyer.cli(&args);
    assert!(output.status.success(), "{output:?}");

    let unsigned = buyer.cli(&["lease", "request", "--order", &draft]);
    assert_eq!(unsigned.status.code(), Some(2), "{unsigned:?}");
    assert!(stderr(&unsigned).contains("leasehold-keys sign"), "{unsigned:?}");
    let items = armor::read_objects(&file("draft")).expect("reads");
    let [Item::Draft(order)] = items.as_slice() else { panic!("{items:?}") };
    let signed = lessee.signer().sign(order).expect("signs");
    armor::write_objects(&file("order"), &[Item::Signed(signed)], keep).expect("written");
    let order = text("order");
    let leased = buyer.cli_json(&["lease", "request", "--json", "--order", &order]);
    assert_eq!(leased["choice"]["lessor"], seller.file.id.to_string());
    let lease = leased["lease"].as_str().expect("a lease");
    let shown = seller.cli_json(&["lease", "show", "--json", lease]);
    assert_eq!((&shown["side"], &shown["lessee"]), (&json!("lent"), &json!(key)));
    assert!(buyer.cli(&["lease", "release", lease]).status.success());
}

#[test]
fn a_program_runs_from_plan_to_proof() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let copy = program(&fabric, "copy.wasm", COPY);
    let input = fabric.room.path().join("input");
    std::fs::write(&input, b"what is to be copied").expect("written");
    let results = fabric.room.path().join("results");
    let (input, results) = (input.display().to_string(), results.display().to_string());

    let mut args = vec!["run", "--yes", "--json", "--stdin", &input, "--output", "copy"];
    args.extend(["--output-dir", &results]);
    args.extend(WANT);
    args.push(&copy);
    let output = buyer.cli(&args);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let run: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(run["exit_code"], 7);
    assert_eq!(run["stdout"], "what is to be copied");
    assert_eq!(run["stderr"], "noted");
    assert_eq!(run["outcome"]["kind"], "exited");
    assert_eq!(run["end"], "released");
    assert_eq!(run["lessor"], seller.file.id.to_string());
    assert!(run["receipts"].as_u64().expect("a count") >= 1, "{run}");
    assert!(run["bytes_uploaded"].as_u64().expect("a count") > 20, "{run}");
    let copied = std::fs::read(Path::new(&results).join("copy")).expect("the output");
    assert_eq!(copied, b"what is to be copied");

    // The same again, as a person sees it: data alone on standard output.
    let mut args = vec!["run", "-y", "--stdin", &input];
    args.extend(WANT);
    args.push(&copy);
    let output = buyer.cli(&args);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(output.stdout, b"what is to be copied");
    let said = stderr(&output);
    for part in ["plan", "seller", "noted", "cost ", "USD"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert!(!said.contains('\u{1b}'), "no colours into a pipe: {said}");

    // What was run can be shown, read and proven.
    let lease = run["lease"].as_str().expect("a lease");
    let shown = buyer.cli_json(&["lease", "show", "--json", &lease[..12]]);
    assert_eq!((&shown["stage"], &shown["charge"]), (&json!("ended"), &run["charge"]));
    let listed = buyer.cli_json(&["lease", "list", "--all", "--json"]);
    assert_eq!(listed["leases"].as_array().map(Vec::len), Some(2));
    assert_eq!(buyer.cli_json(&["lease", "list", "--json"])["leases"], json!([]));
    let receipts = buyer.cli_json(&["receipts", "--json", lease]);
    let last = receipts["receipts"].as_array().and_then(|all| all.last()).expect("a receipt");
    assert_eq!((&last["end"], &last["countersigned"]), (&json!("released"), &json!(true)));
    assert_eq!(last["charge"], run["charge"]);
    let proof = fabric.room.path().join("proof").display().to_string();
    let exported = buyer.cli(&["lease", "export", lease, "--out", &proof]);
    assert!(exported.status.success(), "{exported:?}");
    let again = buyer.cli(&["lease", "export", lease, "--out", &proof]);
    assert_eq!(again.status.code(), Some(7), "an existing file is not replaced");
    let verified = buyer.cli_json(&["verify", "--json", &proof]);
    assert_eq!(verified["verified"], true);
    assert_eq!(verified["items"][0]["lease"], lease);
    let other = "cd".repeat(32);
    let elsewhere = buyer.cli(&["verify", "--fabric", &other, &proof]);
    assert_eq!(elsewhere.status.code(), Some(1));
    for table in [vec!["nodes"], vec!["offers"], vec!["ps"], vec!["receipts", lease]] {
        let output = buyer.cli(&table);
        assert!(output.status.success() && !output.stdout.is_empty(), "{output:?}");
    }
    let mut explain = vec!["explain", "--json"];
    explain.extend(WANT);
    let plan = buyer.cli_json(&explain);
    assert_eq!(plan["choices"][0]["name"], "seller");
}

#[test]
fn a_detached_job_is_followed_and_ctrl_c_gives_its_lease_back() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let endless = program(&fabric, "endless.wasm", ENDLESS);

    let mut args = vec!["run", "--yes", "-d", "--on", "seller"];
    args.extend(WANT);
    args.push(&endless);
    let output = buyer.cli(&args);
    assert!(output.status.success(), "{output:?}");
    let lease = String::from_utf8(output.stdout).expect("text").trim().to_string();
    until("the job's output is there", || {
        let output = buyer.cli(&["logs", &lease]);
        (output.status.success() && output.stdout == b"begun\n").then_some(())
    });
    until("the job is listed on both sides", || {
        let on = |node: &Node| node.cli_json(&["ps", "--json"])["jobs"].as_array().map(Vec::len);
        (on(&buyer) == Some(1) && on(&seller) == Some(1)).then_some(())
    });
    let twice = buyer.post(
        &format!("/v1/leases/{lease}/claim"),
        &json!({ "job": { "program":
        { "root": blake3::hash(b"abc").to_string(), "size": 3 } } }),
    );
    assert_eq!(twice.status, 400, "a payload that is not here: {twice:?}");
    let released = buyer.cli(&["lease", "release", &lease]);
    assert!(released.status.success(), "{released:?}");
    let end = buyer.get(&format!("/v1/leases/{lease}/end?timeout_s=60")).json();
    assert_eq!((&end["ended"], &end["reason"]), (&json!(true), &json!("released")));
    assert_eq!(end["outcome"]["kind"], "stopped");

    // Attached, and interrupted.
    let mut args = vec!["run", "--yes"];
    args.extend(WANT);
    args.push(&endless);
    let mut run = buyer
        .command()
        .args(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut begun = [0; 6];
    run.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("it begins");
    assert_eq!(&begun, b"begun\n");
    interrupt(&run);
    let output = run.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(stderr(&output).contains("cost "), "{output:?}");
    until("the seller has its capacity back", || {
        let node = seller.get("/v1/node").json();
        (node["promised"]["cpu_milli"] == 0).then_some(())
    });
}

#[test]
fn a_detached_job_gives_its_lease_back_and_its_outputs_are_fetched() {
    let fabric = Fabric::new();
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    let copy = program(&fabric, "copy.wasm", COPY);
    let input = fabric.room.path().join("input");
    std::fs::write(&input, b"kept for later").expect("written");
    let (input, results) = (input.display().to_string(), fabric.room.path().join("results"));
    let results = results.display().to_string();
    let mut args = vec!["run", "--yes", "-d", "--stdin", &input, "--output", "copy"];
    args.extend(WANT);
    args.push(&copy);
    let output = buyer.cli(&args);
    assert!(output.status.success(), "{output:?}");
    let lease = String::from_utf8(output.stdout).expect("text").trim().to_string();
    let end = until("the lease ends by itself", || {
        let end = buyer.get(&format!("/v1/leases/{lease}/end?timeout_s=60")).json();
        (end["ended"] == true).then_some(end)
    });
    assert_eq!((&end["reason"], &end["outcome"]["code"]), (&json!("released"), &json!(7)));
    let fetched = buyer.cli_json(&["outputs", "--json", &lease, "--output-dir", &results]);
    assert_eq!(fetched["outputs"][0]["name"], "copy");
    let copied = std::fs::read(Path::new(&results).join("copy")).expect("the output");
    assert_eq!(copied, b"kept for later");
    let missing = buyer.cli(&["outputs", &lease, "--name", "nothing"]);
    assert_eq!(missing.status.code(), Some(1), "{missing:?}");
    let mut args = vec!["run", "--yes", "-d", "--output", "copy", "--output-dir", &results];
    args.extend(WANT);
    args.push(&copy);
    let refused = buyer.cli(&args);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(stderr(&refused).contains("leasehold outputs"), "{refused:?}");
}

#[test]
fn what_goes_wrong_says_what_to_do() {
    let fabric = Fabric::new();
    let node = fabric.node("alone", "0", &[]);
    let copy = program(&fabric, "copy.wasm", COPY);
    let code = |output: &Output| output.status.code().expect("a code");

    // No terminal and no --yes.
    let mut args = vec!["run"];
    args.extend(WANT);
    args.push(&copy);
    let output = node.cli(&args);
    assert_eq!(code(&output), 2, "{output:?}");
    assert!(stderr(&output).contains("--yes"), "{output:?}");

    // Nobody sells.
    args.insert(1, "--yes");
    let output = node.cli(&args);
    assert_eq!(code(&output), 5, "{output:?}");
    assert!(stderr(&output).contains("alone"), "it says what spoke against it: {output:?}");

    // No such program.
    let mut missing = vec!["run", "--yes"];
    missing.extend(WANT);
    missing.push("/nowhere.wasm");
    assert_eq!(code(&node.cli(&missing)), 3);

    // A wrong token, and none.
    let token = fabric.room.path().join("token");
    leasehold_keys::disk::write_atomic(
        &token,
        b"abcdefghijklmnopqrstuvwxyz",
        0o600,
        leasehold_keys::disk::Existing::Keep,
    )
    .expect("written");
    let output = node.cli(&["--token-file", token.to_str().expect("text"), "nodes"]);
    assert_eq!(code(&output), 5, "{output:?}");
    assert!(stderr(&output).contains("--token-file"), "{output:?}");
    let elsewhere = fabric.room.path().join("elsewhere");
    let output = node
        .command()
        .env("XDG_STATE_HOME", &elsewhere)
        .env("XDG_DATA_HOME", &elsewhere)
        .args(["nodes", "--json"])
        .output()
        .expect("runs");
    assert_eq!(code(&output), 5, "{output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(said["exit"], 5);

    // Nobody there.
    let api = format!("http://{}", node.file.api);
    let published = node.state.join("leasehold/api").join(format!(
        "{}-{}",
        node.file.api.ip(),
        node.file.api.port()
    ));
    assert!(published.exists());
    drop(node);
    assert!(!published.exists(), "the token goes with its node");
    let output = Command::new(env!("CARGO_BIN_EXE_leasehold"))
        .args(["--api", &api, "nodes"])
        .env("XDG_STATE_HOME", &elsewhere)
        .output()
        .expect("runs");
    assert_eq!(code(&output), 6, "{output:?}");
    assert!(stderr(&output).contains("leasehold up"), "{output:?}");
}
