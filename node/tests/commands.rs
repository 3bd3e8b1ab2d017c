//! What a program is given and what a person sees of it: arguments, environment and inputs, its
//! output followed or read later, leases requested before, and payloads that cannot be had.

#[path = "common/processes.rs"]
mod processes;

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Output, Stdio};

use processes::{COPY, ENDLESS, Fabric, Node, WANT, program, stderr, until, want};
use serde_json::{Value, json};

/// Writes its arguments and `/in/data` to standard output and its environment to standard error;
/// exits with 44 where there is no `/in/data`.
const TELL: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $path_open
    (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes
    (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $env_sizes
    (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $env (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 2)
  (data (i32.const 64) "data")
  (func $write (param $fd i32) (param $at i32) (param $len i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $len))
    (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "_start")
    (drop (call $args_sizes (i32.const 1024) (i32.const 1028)))
    (drop (call $args (i32.const 2048) (i32.const 8192)))
    (call $write (i32.const 1) (i32.const 8192) (i32.load (i32.const 1028)))
    (drop (call $env_sizes (i32.const 1024) (i32.const 1028)))
    (drop (call $env (i32.const 2048) (i32.const 8192)))
    (call $write (i32.const 2) (i32.const 8192) (i32.load (i32.const 1028)))
    (if (call $path_open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 4)
          (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 32))
      (then (call $exit (i32.const 44))))
    (i32.store (i32.const 0) (i32.const 16384))
    (i32.store (i32.const 4) (i32.const 4096))
    (drop (call $fd_read (i32.load (i32.const 32)) (i32.const 0) (i32.const 1) (i32.const 16)))
    (call $write (i32.const 1) (i32.const 16384) (i32.load (i32.const 16)))))"#;

/// A seller, and a buyer that knows what it sells.
fn market(fabric: &Fabric) -> (Node, Node) {
    let seller = fabric.node("seller", "1", &[]);
    let buyer = fabric.node("buyer", "0", &[&seller]);
    buyer.sees_offer_of("seller");
    (seller, buyer)
}

fn file(fabric: &Fabric, name: &str, bytes: &[u8]) -> String {
    let path = fabric.room.path().join(name);
    std::fs::write(&path, bytes).expect("written");
    path.display().to_string()
}

/// A directory of these files, those called `run` executable.
fn directory(fabric: &Fabric, name: &str, files: &[(&str, &[u8])]) -> String {
    let dir = fabric.room.path().join(name);
    for (path, bytes) in files {
        let at = dir.join(path);
        std::fs::create_dir_all(at.parent().expect("a directory")).expect("made");
        std::fs::write(&at, bytes).expect("written");
        let mode = if path.ends_with("run") { 0o755 } else { 0o644 };
        std::fs::set_permissions(&at, PermissionsExt::from_mode(mode)).expect("set");
    }
    dir.display().to_string()
}

/// `leasehold run` with what is wanted and `more`.
fn run(buyer: &Node, more: &[&str]) -> Output {
    buyer.cli(&[&["run", "--yes"], &WANT[..], more].concat())
}

/// Starts a job that goes on by itself, and gives its lease.
fn detached(buyer: &Node, more: &[&str]) -> String {
    let output = run(buyer, &[&["-d"], more].concat());
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_string()
}

fn requested(buyer: &Node) -> String {
    let leased = buyer.cli_json(&[&["lease", "request", "--json"], &WANT[..]].concat());
    leased["lease"].as_str().expect("a lease").to_string()
}

/// Asserts that `output` ended with `code` and said all of `parts` on standard error.
fn ended(output: &Output, code: i32, parts: &[&str]) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    for part in parts {
        assert!(stderr(output).contains(part), "'{part}' in {}", stderr(output));
    }
}

/// The end of a lease, once it has one.
fn end_of(buyer: &Node, lease: &str) -> Value {
    until("the lease ends", || {
        let end = buyer.get(&format!("/v1/leases/{lease}/end?timeout_s=30")).json();
        (end["ended"] == true).then_some(end)
    })
}

/// Ends a process that a failed test would leave behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// ---------------------------------------------------------------- what a program is given

#[test]
fn a_program_is_given_what_the_command_line_says() {
    let fabric = Fabric::new();
    let (_seller, buyer) = market(&fabric);
    let tell = program(&fabric, "tell.wasm", TELL);
    let data = format!("data={}", file(&fabric, "data", b"from a file"));
    let given = ["--env", "COLOUR=blue", "--env", "EMPTY=", "--input", &data];
    let said = ["--", "-a", "b c", ""];
    let output = run(&buyer, &[&given[..], &[&tell], &said].concat());
    ended(&output, 0, &["COLOUR=blue\0EMPTY=\0", "cost "]);
    assert_eq!(output.stdout, b"program\0-a\0b c\0\0from a file");

    // Without the input it ends by its own word, which is the command's too.
    let output = run(&buyer, &[&tell]);
    ended(&output, 44, &["the program exited with 44", "cost "]);
    // What breaks a rule is said before anything is leased.
    let count =
        || buyer.cli_json(&["lease", "list", "--all", "--json"])["leases"].as_array().map(Vec::len);
    let before = count();
    let climbs = format!("../data={}", file(&fabric, "data", b"x"));
    for wrong in [["--input", &climbs], ["--env", "=x"], ["--output", "/etc/passwd"]] {
        let output = run(&buyer, &[&wrong[..], &[&tell]].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
    }
    let missing = run(&buyer, &["--input", "data=/no/such/file", &tell]);
    ended(&missing, 3, &["/no/such/file"]);
    assert_eq!(count(), before, "nothing was leased for these");
}

#[test]
fn a_program_finds_a_directory() {
    let fabric = Fabric::new();
    let (seller, buyer) = market(&fabric);
    let deep = TELL.replace("\"data\"", "\"data/sub/x\"");
    let deep = deep.replace("(i32.const 64) (i32.const 4)", "(i32.const 64) (i32.const 10)");
    let tell = program(&fabric, "deep.wasm", &deep);
    let dir = directory(&fabric, "dir", &[("a", b"a"), ("sub/x", b"from below"), ("sub/y", b"")]);
    let data = format!("data={dir}");
    let output = run(&buyer, &["--input", &data, &tell]);
    ended(&output, 0, &["cost "]);
    assert_eq!(output.stdout, b"program\0from below");
    // All of it is there already.
    let sent = || buyer.get("/v1/node").json()["payloads"]["sent"].clone();
    let before = sent();
    assert_eq!(run(&buyer, &["--input", &data, &tell]).stdout, b"program\0from below");
    assert_eq!(sent(), before, "nothing is sent twice");

    // What the order says of a directory's size binds, before anything of it is fetched.
    let other = directory(&fabric, "other", &[("large", &[3; 50_000])]);
    let imported = buyer.cli_json(&["blob", "import", "--json", &other])["payloads"][0].clone();
    let (index, size) = (&imported["root"], &imported["size"]);
    let bytes = std::fs::read(&tell).expect("reads");
    let root = blake3::hash(&bytes).to_string();
    let claim = |said: u64| {
        let lease = requested(&buyer);
        let job = json!({
            "runtime": "wasm", "program": { "root": root, "size": bytes.len() },
            "inputs": [{ "name": "data", "root": index, "size": size, "index": said }],
            "release_after": true,
        });
        let body = json!({ "job": job }).to_string();
        let path = format!("POST /v1/leases/{lease}/claim");
        let answer = buyer.call(&path, &["Content-Type: application/json"], body.as_bytes());
        (answer, lease)
    };
    let (answer, lease) = claim(10);
    assert_eq!(answer.status, 200, "{answer:?}");
    let outcome = end_of(&buyer, &lease)["outcome"].clone();
    assert_eq!(outcome["kind"], "not_runnable", "{outcome}");
    assert!(outcome.to_string().contains("more than the 10 bytes said"), "{outcome}");
    let large = blake3::hash(&[3; 50_000]).to_string();
    let held = seller.get("/v1/payloads").json().to_string();
    assert!(held.contains(index.as_str().expect("a root")) && !held.contains(&large), "{held}");
    let (answer, _) = claim(1 << 50);
    assert_eq!(answer.status, 400, "what has no room is refused: {answer:?}");
    drop(seller);
}

#[test]
fn a_lease_requested_before_is_used_once() {
    let fabric = Fabric::new();
    let (seller, buyer) = market(&fabric);
    let tell = program(&fabric, "tell.wasm", TELL);
    let data = format!("data={}", file(&fabric, "data", b"later"));
    let lease = requested(&buyer);
    // It is the buyer's to use, not the seller's.
    ended(&seller.cli(&["run", "--lease", &lease, &tell]), 5, &[&lease]);
    let both = [&["run", "--lease", &lease], &WANT[..], &[&tell]].concat();
    assert_eq!(buyer.cli(&both).status.code(), Some(2), "one or the other");
    // Its price was agreed to: nothing is asked, also without a terminal.
    let output = buyer.cli(&["run", "--lease", &lease[..8], "--input", &data, &tell]);
    ended(&output, 0, &["cost "]);
    assert_eq!(output.stdout, b"program\0later");
    let end = end_of(&buyer, &lease);
    assert_eq!((&end["reason"], &end["outcome"]["code"]), (&json!("released"), &json!(0)));

    ended(&buyer.cli(&["run", "--lease", &lease, &tell]), 7, &["over"]);
    let nobodys = "ab".repeat(32);
    ended(&buyer.cli(&["run", "--lease", &nobodys, &tell]), 1, &["lease"]);
    ended(&buyer.cli(&["run", "--lease", "xy", &tell]), 2, &["first digits"]);
}

// ---------------------------------------------------------------- what a person sees

#[test]
fn a_bad_end_is_said_in_words_and_both_sides_tell_the_same() {
    let fabric = Fabric::new();
    let (seller, buyer) = market(&fabric);
    let traps = "(module (func (export \"_start\") unreachable))";
    let output = run(&buyer, &[&program(&fabric, "traps.wasm", traps)]);
    ended(&output, 1, &["warning: the program", "unreachable", "cost "]);
    let listed = buyer.cli_json(&["lease", "list", "--all", "--json"]);
    let lease = listed["leases"][0]["lease"].as_str().expect("a lease").to_string();
    let receipts = |node: &Node| node.cli_json(&["receipts", "--json", &lease])["receipts"].clone();
    until("both hold the same receipts, countersigned", || {
        let (lent, held) = (receipts(&seller), receipts(&buyer));
        let signed = |one: &Value| one["countersigned"] == true;
        (lent == held && lent.as_array()?.iter().all(signed)).then_some(())
    });
    let last = receipts(&buyer).as_array().and_then(|all| all.last()).cloned().expect("a receipt");
    assert_eq!(last["end"], "released", "{last}");
}

#[test]
fn logs_are_read_while_the_job_runs_and_after_it() {
    let fabric = Fabric::new();
    let (_seller, buyer) = market(&fabric);
    let endless = program(&fabric, "endless.wasm", ENDLESS);
    let lease = detached(&buyer, &[&endless]);
    let mut logs = buyer.command();
    logs.args(["logs", "-f", &lease]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut logs = Running(logs.spawn().expect("starts"));
    let mut begun = [0; 6];
    let mut stdout = logs.0.stdout.take().expect("piped");
    stdout.read_exact(&mut begun).expect("it says that it began");
    assert_eq!(&begun, b"begun\n");
    assert!(logs.0.try_wait().expect("asked").is_none(), "it follows until the end");
    let released = buyer.cli(&["lease", "release", &lease]);
    assert!(released.status.success(), "{released:?}");
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).expect("it comes to the end");
    assert!(rest.is_empty(), "each byte once: {rest:?}");
    assert!(logs.0.wait().expect("ends").success());

    // Of one that has ended, both streams or one.
    let copy = program(&fabric, "copy.wasm", COPY);
    let input = file(&fabric, "input", b"to be copied");
    let lease = detached(&buyer, &["--stdin", &input, &copy]);
    let output = buyer.cli(&["logs", "-f", &lease]);
    ended(&output, 0, &["noted"]);
    assert_eq!(output.stdout, b"to be copied");
    let output = buyer.cli(&["logs", "--stderr", &lease[..12]]);
    assert_eq!((output.status.code(), output.stdout), (Some(0), b"noted".to_vec()));
    let logs = buyer.cli_json(&["logs", "--json", &lease]);
    assert_eq!((&logs["stdout"], &logs["stderr"]), (&json!("to be copied"), &json!("noted")));
    assert_eq!((&logs["ended"], &logs["outcome"]["code"]), (&json!(true), &json!(7)));
    ended(&buyer.cli(&["logs", &"ab".repeat(32)]), 1, &["lease"]);
}

#[test]
fn offers_of_nodes_that_are_down_are_shown_when_asked_for() {
    let fabric = Fabric::new();
    let (mut seller, buyer) = market(&fabric);
    let of_seller = |more: &[&str]| {
        let listed = buyer.cli_json(&[&["offers", "--json"], more].concat());
        let all = listed["offers"].as_array().expect("a list").clone();
        all.into_iter().find(|offer| offer["name"] == "seller")
    };
    assert!(of_seller(&[]).is_some_and(|offer| offer["up"] == true));
    seller.process.kill().expect("killed");
    seller.process.wait().expect("gone");
    until("the seller is seen to be down", || of_seller(&[]).is_none().then_some(()));
    let offer = of_seller(&["--all"]).expect("its offer is known still");
    assert_eq!((&offer["up"], &offer["prices"]["cpu_hour"]), (&json!(false), &json!("0.02")));
    // Nobody is sent there.
    let copy = program(&fabric, "copy.wasm", COPY);
    ended(&run(&buyer, &[&copy]), 5, &["no host"]);
}

#[test]
fn a_body_is_one_json_document_and_nothing_after_it() {
    let fabric = Fabric::new();
    let (_seller, buyer) = market(&fabric);
    let good = json!({ "want": want() }).to_string();
    let post = |path: &str, body: &str| {
        buyer.call(&format!("POST {path}"), &["Content-Type: application/json"], body.as_bytes())
    };
    for trailing in ["x", "{}", ",", "\0", &good] {
        for path in ["/v1/plan", "/v1/leases"] {
            let answer = post(path, &format!("{good}{trailing}"));
            let said = (answer.status, answer.code());
            assert_eq!(said, (400, "bad_request".into()), "{path} and {trailing}");
        }
    }
    assert_eq!(buyer.get("/v1/leases?all=true").json()["leases"], json!([]), "none was made");
    assert_eq!(post("/v1/plan", &format!(" {good}\r\n")).status, 200, "space is nothing");
    // Beyond the length that was announced stands another request, which must be one.
    let head = format!(
        "POST /v1/plan HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        buyer.token(),
        good.len()
    );
    let answer = buyer.raw(format!("{head}{good}no request at all\r\n\r\n").as_bytes());
    assert_eq!(answer.status, 200);
    let rest = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(rest.contains("HTTP/1.1 400"), "the second is refused: {rest}");
}

// ---------------------------------------------------------------- what cannot be had

#[test]
fn a_damaged_payload_runs_nowhere_and_is_replaced_by_a_good_one() {
    let fabric = Fabric::new();
    let (seller, buyer) = market(&fabric);
    let copy = program(&fabric, "copy.wasm", COPY);
    let bytes = std::fs::read(&copy).expect("read");
    let uploaded = buyer.call("POST /v1/payloads", &[], &bytes);
    assert_eq!(uploaded.status, 201, "{uploaded:?}");
    let root = blake3::hash(&bytes).to_string();
    let kept = buyer.dir.join("payloads").join(format!("{root}.data"));
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 2] ^= 1;
    std::fs::write(&kept, &damaged).expect("written");

    let output = run(&buyer, &[&copy]);
    ended(&output, 1, &["warning: the program", "cost "]);
    assert!(output.stdout.is_empty(), "{output:?}");
    let listed = buyer.cli_json(&["lease", "list", "--all", "--json"]);
    let lease = listed["leases"][0]["lease"].as_str().expect("a lease").to_string();
    assert_eq!(end_of(&buyer, &lease)["outcome"]["kind"], "no_payload");
    let holds = |node: &Node| {
        let listed = node.get("/v1/payloads").json();
        listed["payloads"].as_array().is_some_and(|all| all.iter().any(|one| one["root"] == *root))
    };
    assert!(!holds(&seller), "what does not match its root is not kept");
    for node in [&buyer, &seller] {
        let name = format!("{}.proof", node.file.name);
        let proof = fabric.room.path().join(name).display().to_string();
        assert!(node.cli(&["lease", "export", &lease, "--out", &proof]).status.success());
        assert_eq!(node.cli_json(&["verify", "--json", &proof])["verified"], true);
    }
    // Its holder has found out, and takes the good bytes when they are sent again.
    until("the damaged one is set aside", || (!holds(&buyer)).then_some(()));
    let input = file(&fabric, "input", b"once more");
    let output = run(&buyer, &["--stdin", &input, &copy]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(output.stdout, b"once more");
}

// ---------------------------------------------------------------- payloads by hand

#[test]
fn a_payload_goes_from_hand_to_hand() {
    let fabric = Fabric::new();
    let first = fabric.node("first", "1", &[]);
    let second = fabric.node("second", "0", &[&first]);
    let third = fabric.node("third", "0", &[&first, &second]);
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let path = file(&fabric, "weights", &bytes);
    let imported = first.cli_json(&["blob", "import", "--json", &path]);
    let root = imported["payloads"][0]["root"].as_str().expect("a root").to_string();
    // Nothing is sent where the file system can share the file's blocks with the node.
    let sent = &imported["payloads"][0]["sent"];
    assert!(*sent == 3_000_000 || *sent == 0, "{sent}");
    let again = first.cli_json(&["blob", "import", "--json", &path]);
    assert_eq!(again["payloads"][0]["sent"], 0);

    // Others hear of it, and can have it by its name alone.
    let holders = |node: &Node| {
        let stat = node.get(&format!("/v1/payloads/{root}/holders")).json();
        let names = stat["holders"].as_array().expect("holders").iter();
        names.map(|holder| holder["name"].as_str().expect("a name").to_string()).collect::<Vec<_>>()
    };
    until("the second has heard of it", || (holders(&second) == ["first"]).then_some(()));
    let out = fabric.room.path().join("out").display().to_string();
    let got = second.cli_json(&["blob", "get", "--json", &root, "-o", &out]);
    assert_eq!((&got["size"], &got["received"]), (&json!(3_000_000), &json!(3_000_000)));
    assert_eq!(std::fs::read(&out).expect("written"), bytes);
    let output = second.cli(&["blob", "get", &root]);
    ended(&output, 0, &["held it already"]);
    // A part of the name is enough for what is there.
    let output = second.cli(&["blob", "export", &root[..8], "-"]);
    assert!(output.status.success() && output.stdout == bytes, "{:?}", stderr(&output));

    // A flipped bit is found when it is looked for, and the payload can be had again.
    let data = second.dir.join("payloads").join(format!("{root}.data"));
    let mut rotten = std::fs::read(&data).expect("reads");
    rotten[1_234_567] ^= 1;
    std::fs::write(&data, rotten).expect("writes");
    let output = second.cli(&["blob", "verify"]);
    ended(&output, 7, &[&root, "no longer matches", "set aside"]);
    ended(&second.cli(&["blob", "export", &root, "-"]), 1, &["not held"]);
    second.cli_json(&["blob", "get", "--json", &root]);
    ended(&second.cli(&["blob", "verify", &root]), 0, &[]);

    // Who got it passes it on when the first is gone.
    drop(first);
    until("the third has heard of it", || holders(&third).contains(&"second".into()).then_some(()));
    third.cli_json(&["blob", "get", "--json", &root]);

    // What is pinned stays, also over a start.
    ended(&third.cli(&["blob", "pin", &root]), 0, &[]);
    ended(&third.cli(&["blob", "rm", &root]), 7, &["pinned"]);
    let list = third.cli_json(&["blob", "list", "--json"]);
    assert_eq!(
        (&list["payloads"][0]["root"], &list["payloads"][0]["pinned"]),
        (&json!(root), &json!(true))
    );
    ended(&third.cli(&["blob", "unpin", &root[..6]]), 0, &[]);
    ended(&third.cli(&["blob", "rm", &root, "ffff"]), 1, &["no payload ffff"]);
    assert_eq!(third.cli_json(&["blob", "list", "--json"]), json!({ "payloads": [] }));

    // What cannot be had is said.
    let nobodys = "0".repeat(63) + "1";
    ended(&third.cli(&["blob", "get", &nobodys]), 1, &["nobody is known who holds"]);
    ended(&third.cli(&["blob", "get", "abcd"]), 2, &["64"]);
    let wrong = third.cli(&["blob", "get", &root, "--size", "5"]);
    ended(&wrong, 6, &["3000000 bytes, not 5"]);
    let nowhere = fabric.room.path().join("no/such/out").display().to_string();
    third.cli_json(&["blob", "get", "--json", &root]);
    ended(&third.cli(&["blob", "export", &root, &nowhere]), 3, &["no/such/out"]);
    assert_eq!(third.cli(&["blob", "stat", &nobodys]).status.code(), Some(1));
}

#[test]
fn a_directory_goes_from_hand_to_hand() {
    let fabric = Fabric::new();
    let first = fabric.node("first", "1", &[]);
    let second = fabric.node("second", "0", &[&first]);
    let (large, small) = (vec![7u8; 700_000], vec![8u8; 5_000]);
    let files: [(&str, &[u8]); 5] =
        [("a", &large), ("bin/run", b"#!"), ("b/same", &large), ("b/c/d", &small), ("none", b"")];
    let dir = directory(&fabric, "dir", &files);
    let root_of =
        |imported: &Value| imported["payloads"][0]["root"].as_str().expect("a root").to_string();
    let imported = first.cli_json(&["blob", "import", "--json", &dir]);
    assert_eq!(imported["payloads"][0]["files"], 5);
    let root = root_of(&imported);
    let size = imported["payloads"][0]["size"].as_u64().expect("a size");
    assert_eq!(imported["payloads"][0]["sent"], 705_002 + size, "what is there twice goes once");
    let again = first.cli_json(&["blob", "import", "--json", &dir]);
    assert_eq!((root_of(&again), &again["payloads"][0]["sent"]), (root.clone(), &json!(0)));

    // The index alone tells what it is; with all that it names it is the directory again.
    until("the second has heard of it", || {
        let stat = second.get(&format!("/v1/payloads/{root}/holders")).json();
        (stat["holders"][0]["name"] == "first").then_some(())
    });
    ended(&second.cli(&["blob", "get", &root]), 0, &["an index of 5 files", "--index"]);
    ended(&second.cli(&["blob", "stat", &root]), 0, &[]);
    let stat = second.cli_json(&["blob", "stat", "--json", &root]);
    assert_eq!(stat["index"], json!({ "files": 5, "payloads": 4, "size": 705_002, "missing": 4 }));
    let out = fabric.room.path().join("out");
    let to = out.display().to_string();
    ended(&second.cli(&["blob", "export", "--index", &root, &to]), 1, &["not held"]);
    assert!(!out.exists(), "the whole directory or none");
    let got = second.cli_json(&["blob", "get", "--json", "--index", &root, "-o", &to]);
    assert_eq!((&got["received"], &got["size"]), (&json!(705_002), &json!(705_002 + size)));
    for (path, bytes) in files {
        let at = out.join(path);
        assert_eq!(std::fs::read(&at).expect("written"), bytes, "{path}");
        let mode = std::fs::metadata(&at).expect("there").permissions().mode();
        assert_eq!(mode & 0o100 != 0, path == "bin/run", "{path}");
    }
    let listed = second.cli_json(&["blob", "files", "--json", &root[..8]]);
    let paths: Vec<_> = listed["files"].as_array().expect("files").iter().collect();
    assert!(paths.iter().all(|file| file["held"] == true), "{listed}");
    assert_eq!(
        paths.iter().map(|file| file["path"].as_str().expect("a path")).collect::<Vec<_>>(),
        ["a", "b/c/d", "b/same", "bin/run", "none"]
    );

    // Of a directory that changed only what is new is sent.
    std::fs::write(out.join("new"), b"more").expect("written");
    let changed = second.cli_json(&["blob", "import", "--json", &to]);
    let changed_root = root_of(&changed);
    until("the first has heard of it", || {
        let stat = first.get(&format!("/v1/payloads/{changed_root}/holders")).json();
        (stat["holders"][0]["name"] == "second").then_some(())
    });
    let got = first.cli_json(&["blob", "get", "--json", "--index", &changed_root]);
    assert_eq!(got["received"], 4 + changed["payloads"][0]["size"].as_u64().expect("a size"));

    // What goes with an index is what nothing else names, and what nobody pinned.
    let new = blake3::hash(b"more").to_string();
    let roots = |node: &Node| {
        let listed = node.cli_json(&["blob", "list", "--json"]);
        let lines = listed["payloads"].as_array().expect("payloads").clone();
        let root = |line: &Value| line["root"].as_str().expect("a root").to_string();
        lines.iter().map(root).collect::<Vec<_>>()
    };
    assert_eq!(roots(&first).len(), 7);
    ended(&first.cli(&["blob", "rm", "--index", &changed_root]), 0, &[]);
    assert_eq!(roots(&first).len(), 5, "the other index and what it names");
    ended(&second.cli(&["blob", "pin", &changed_root]), 0, &[]);
    ended(&second.cli(&["blob", "rm", &new]), 7, &["pinned"]);
    ended(&second.cli(&["blob", "rm", "--index", &root]), 0, &[]);
    assert_eq!(roots(&second).len(), 6, "the pinned one and what it names");
    ended(&second.cli(&["blob", "rm", "--index", &changed_root]), 7, &["pinned"]);

    // What is wrong is said.
    ended(&second.cli(&["blob", "export", "--index", &changed_root, &to]), 7, &["not empty"]);
    ended(&second.cli(&["blob", "export", "--index", &changed_root, "-"]), 2, &["a directory"]);
    ended(&second.cli(&["blob", "files", &new]), 1, &["no index"]);
    ended(&second.cli(&["blob", "get", "--index", &new]), 2, &["no index"]);
    ended(&second.cli(&["blob", "rm", "--index", &new, "--force"]), 2, &["no index"]);
    std::os::unix::fs::symlink("b", out.join("link")).expect("linked");
    ended(&second.cli(&["blob", "import", &to]), 3, &["link to a directory"]);
}

#[test]
fn a_directory_of_many_files_comes_side_by_side() {
    let fabric = Fabric::new();
    let first = fabric.node("first", "1", &[]);
    let second = fabric.node("second", "0", &[&first]);
    let contents: Vec<_> = (0..300u32).map(|n| (n.to_string(), n.to_le_bytes())).collect();
    let files: Vec<_> = contents.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
    let dir = directory(&fabric, "dir", &files);
    let root = first.cli_json(&["blob", "import", "--json", &dir])["payloads"][0]["root"].clone();
    let root = root.as_str().expect("a root").to_string();
    until("the second has heard of it", || {
        let stat = second.get(&format!("/v1/payloads/{root}/holders")).json();
        (stat["holders"][0]["name"] == "first").then_some(())
    });
    let out = fabric.room.path().join("out");
    ended(
        &second.cli(&["blob", "get", "--index", &root, "-o", &out.display().to_string()]),
        0,
        &[],
    );
    for (name, bytes) in &contents {
        assert_eq!(std::fs::read(out.join(name)).expect("written"), bytes);
    }
}

#[test]
fn what_was_not_used_for_long_makes_room() {
    let fabric = Fabric::new();
    let home = fabric.home("small");
    let node = fabric.up(&home, "small", "0", &[], "127.0.0.1:0".parse().expect("address"));
    let config = node.dir.join("leasehold.toml");
    drop(node);
    let text = std::fs::read_to_string(&config).expect("reads");
    let text = text.replace("quota = \"\"", "quota = \"1000000\"");
    assert!(text.contains("1000000"), "{text}");
    std::fs::write(&config, text).expect("writes");
    let node = fabric.again(&home, "small");
    let import = |name: &str, byte: u8| {
        let path = file(&fabric, name, &[byte; 300_000]);
        node.cli(&["blob", "import", &path])
    };
    let root_of = |output: &Output| String::from_utf8_lossy(&output.stdout).trim().to_string();
    let roots: Vec<_> = (1..=3).map(|n| root_of(&import("x", n))).collect();
    ended(&node.cli(&["blob", "pin", &roots[0]]), 0, &[]);
    let fourth = root_of(&import("x", 4));
    let list = node.cli_json(&["blob", "list", "--json"]);
    let held: Vec<_> = list["payloads"].as_array().expect("payloads").iter().collect();
    let holds = |root: &str| held.iter().any(|line| line["root"] == root);
    assert!(holds(&roots[0]) && !holds(&roots[1]) && holds(&roots[2]) && holds(&fourth), "{list}");
    // More than there is room for, whatever goes.
    let path = file(&fabric, "large", &[9; 900_000]);
    ended(&node.cli(&["blob", "import", &path]), 3, &["no space for"]);
    assert_eq!(node.cli_json(&["blob", "list", "--json"]), list);

    // What a pinned index names stays with it.
    let dir = directory(&fabric, "dir", &[("a", &[5; 200_000]), ("b", &[6; 200_000])]);
    ended(&node.cli(&["blob", "unpin", &roots[0]]), 0, &[]);
    let index = root_of(&node.cli(&["blob", "import", &dir]));
    ended(&node.cli(&["blob", "pin", &index]), 0, &[]);
    for n in 10..14 {
        import("x", n);
    }
    let stat = node.cli_json(&["blob", "stat", "--json", &index]);
    assert_eq!((&stat["index"]["missing"], &stat["pinned"]), (&json!(0), &json!(true)));
    // A directory that does not fit is not said to be there.
    let dir = directory(&fabric, "more", &[("a", &[1; 400_000]), ("b", &[2; 400_000])]);
    let output = node.cli(&["blob", "import", &dir]);
    // Its files go side by side, or what came first had to go again.
    let said = stderr(&output);
    let right = match output.status.code() {
        Some(3) => said.contains("no space for"),
        Some(5) => said.contains("no room for all of it"),
        _ => false,
    };
    assert!(right, "{output:?}");
}
