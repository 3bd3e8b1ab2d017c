//! `new`, `show`, `import`, `export`: what is made, and what is refused.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use leasehold_keys::file::{self, ENCRYPTED, Kdf};
use leasehold_keys::passphrase::Source;
use leasehold_keys::pem;
use leasehold_proto::KeyId;

use crate::Desk;

/// Sets mode bits.
fn chmod(desk: &Desk, name: &str, mode: u32) {
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(desk.path(name), permissions).expect("chmod");
}

fn id(text: &str) -> KeyId {
    text.trim().parse().expect("a key id")
}

#[test]
fn a_node_key_is_made_shown_and_loaded() {
    let desk = Desk::new();
    let made = id(&desk.run("new --node --out node.key").ok());
    let mode = std::fs::metadata(desk.path("node.key")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let shown = desk.run("show node.key").ok();
    assert!(shown.contains(&made.to_string()) && shown.contains("protection  none"), "{shown}");
    let json = desk.run("show node.key --json").json();
    assert_eq!(
        (json["id"].as_str(), json["encrypted"].as_bool()),
        (Some(&*made.to_string()), Some(false))
    );
    let secret = file::load(&desk.path("node.key"), &Source::Nowhere).expect("loaded");
    assert_eq!(secret.id(), made);
    assert_ne!(id(&desk.run("new --node --out other.key").ok()), made, "no two are alike");
    assert_eq!(desk.run("new --no-passphrase --json").json()["file"], "leasehold.key");
}

#[test]
fn an_encrypted_key_opens_with_its_passphrase_only() {
    let desk = Desk::new();
    desk.put("word", "correct horse\n");
    desk.put("ward", "correct house\n");
    let run = desk.run("new --passphrase-file word --out a.key --json");
    let made = run.json();
    assert_eq!(made["encrypted"], true);
    assert!(desk.read("a.key").starts_with(&format!("-----BEGIN {ENCRYPTED}-----")));
    let shown = desk.run("show a.key --json").json();
    assert_eq!(shown["id"], made["id"]);
    let Kdf { memory_kib, passes, lanes } = Kdf::DEFAULT;
    assert_eq!((memory_kib, passes, lanes), (65_536, 3, 4), "RFC 9106, second recommendation");
    assert_eq!(
        shown["kdf"],
        serde_json::json!({
            "algorithm": "argon2id", "memory_kib": memory_kib, "passes": passes, "lanes": lanes,
        })
    );
    desk.run("export a.key --passphrase-file word --out a.pem").ok();
    desk.run("export a.key --passphrase-file ward --out b.pem").fails(4, "wrong passphrase");
    assert!(!desk.path("b.pem").exists());
    let run = desk.run("export a.key --passphrase-file ward --out b.pem --json");
    assert_eq!((run.code, run.json()["exit"].as_u64()), (4, Some(4)));
    // By an open file descriptor; a line end is no part of the passphrase.
    let export = "export a.key --passphrase-fd 0 --out c.pem";
    desk.run_with(export, Some("correct horse\r\n")).ok();
    assert_eq!(desk.read("a.pem"), desk.read("c.pem"));
    desk.run("export a.key --passphrase-fd 77 --out d.pem").fails(3, "file descriptor 77");
}

#[test]
fn without_a_terminal_nothing_is_asked() {
    let desk = Desk::new();
    desk.put("word", "word");
    desk.run_without_terminal("new --out a.key").fails(2, "--passphrase-file");
    assert!(!desk.path("a.key").exists());
    desk.run("new --passphrase-file word --out a.key").ok();
    desk.run_without_terminal("export a.key --out a.pem").fails(4, "no terminal");
}

#[test]
fn empty_long_and_public_passphrases_are_refused() {
    let desk = Desk::new();
    let new = "new --passphrase-file word --out a.key";
    for empty in ["", "\n", "\r\n", "\nsecond line\n"] {
        desk.put("word", empty);
        desk.run(new).fails(2, "passphrase is empty");
        desk.run_with("new --passphrase-fd 0 --out a.key", Some("")).fails(2, "is empty");
    }
    desk.put("word", "x".repeat(1025));
    desk.run(new).fails(2, "longer than 1024");
    desk.put("word", "x".repeat(100_000));
    desk.run(new).fails(3, "longer than");
    desk.put("word", "fine");
    chmod(&desk, "word", 0o644);
    desk.run(new).fails(5, "chmod 600");
    desk.run("new --passphrase-file nowhere --out a.key").fails(3, "No such file");
    assert!(!desk.path("a.key").exists());
}

#[test]
fn a_key_is_never_overwritten_by_accident() {
    let desk = Desk::new();
    let first = desk.run("new --node --out a.key").ok();
    let kept = desk.read("a.key");
    desk.run("new --node --out a.key").fails(7, "--force");
    assert_eq!(desk.read("a.key"), kept);
    desk.put("in.pem", "whatever");
    desk.run("import in.pem --out a.key --node").fails(7, "exists");
    desk.run("export a.key --out in.pem").fails(7, "exists");
    let second = desk.run("new --node --out a.key --force").ok();
    assert_ne!(first, second);
    // A dangling link is something that exists, too.
    std::os::unix::fs::symlink(desk.path("void"), desk.path("b.key")).expect("linked");
    desk.run("new --node --out b.key").fails(7, "exists");
    desk.run("new --node --out no/such/dir/a.key").fails(3, "No such file");
}

#[test]
fn key_files_that_others_can_use_are_refused() {
    let desk = Desk::new();
    desk.put("word", "word");
    for protect in ["--node", "--passphrase-file word"] {
        desk.run(&format!("new {protect} --out a.key --force")).ok();
        for mode in [0o640, 0o604, 0o660, 0o777, 0o610] {
            chmod(&desk, "a.key", mode);
            desk.run("show a.key").fails(5, &format!("mode {mode:04o}"));
            desk.run("export a.key --passphrase-file word --out a.pem").fails(5, "chmod 600");
        }
        chmod(&desk, "a.key", 0o400);
        desk.run("show a.key").ok();
    }
    chmod(&desk, "a.key", 0o600);
    std::os::unix::fs::symlink(desk.path("a.key"), desk.path("link")).expect("linked");
    desk.run("show link").fails(5, "symbolic link");
    desk.run("show .").fails(3, "not a regular file");
    desk.run("show nothing").fails(3, "No such file");
    // Only root can give a file away; then whose it is counts.
    if std::os::unix::fs::chown(desk.path("a.key"), Some(65_534), None).is_ok() {
        desk.run("show a.key").fails(5, "belongs to user 65534");
    }
}

#[test]
fn damaged_and_foreign_files_are_named() {
    let desk = Desk::new();
    desk.run("new --node --out a.key").ok();
    let good = desk.read("a.key");
    for length in [0, 1, 30, good.len() / 2, good.len() - 10] {
        desk.put("cut.key", &good[..length]);
        desk.run("show cut.key").fails(3, "is no key file");
    }
    desk.put("twice.key", good.repeat(2));
    desk.run("show twice.key").fails(3, "2 blocks");
    desk.put("noise.key", [0x80, 0xff, 0x1b, 0x00]);
    desk.run("show noise.key").fails(3, "not a text file");
    desk.put("long.key", "#".repeat(4097));
    desk.run("show long.key").fails(3, "longer than 4096");
    desk.put("escape.key", pem::write("\u{1b}[2J\u{202e}", b"x").as_bytes());
    let run = desk.run("show escape.key");
    assert!(!run.err.contains(['\u{1b}', '\u{202e}']), "{run:?}");
    run.fails(3, "it holds a");
}

#[test]
fn a_file_cannot_ask_for_hours_or_for_all_memory() {
    let desk = Desk::new();
    desk.put("word", "word");
    desk.run("new --passphrase-file word --out a.key").ok();
    let block = pem::read(desk.read("a.key").as_bytes()).expect("a block").remove(0);
    // version u16, kdf u16, then memory, passes, lanes, u32 each
    for (at, value) in [(4, u32::MAX), (4, (2 << 20) + 1), (4, 0), (8, 11), (8, 0), (12, 17)] {
        let mut bytes = block.bytes.to_vec();
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        desk.put("bad.key", pem::write(ENCRYPTED, &bytes).as_bytes());
        desk.run("show bad.key").fails(5, "at most 2 GiB");
        desk.run("export bad.key --passphrase-file word --out o").fails(5, "at most 2 GiB");
    }
    let mut bytes = block.bytes.to_vec();
    bytes[2] = 2;
    desk.put("bad.key", pem::write(ENCRYPTED, &bytes).as_bytes());
    desk.run("show bad.key").fails(3, "key derivation (2)");
    bytes = block.bytes.to_vec();
    bytes[20] ^= 1;
    desk.put("bad.key", pem::write(ENCRYPTED, &bytes).as_bytes());
    desk.run("export bad.key --passphrase-file word --out o").fails(4, "the file was changed");
}

#[test]
fn keys_travel_to_other_tools_and_back() {
    let desk = Desk::new();
    let made = desk.run("new --node --out a.key").ok();
    let run = desk.run("export a.key --out a.pem");
    assert!(run.err.contains("in clear"), "{run:?}");
    assert_eq!(run.ok(), made);
    assert!(desk.read("a.pem").starts_with("-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEI"));
    assert_eq!(desk.run("import a.pem --node --out b.key").ok(), made);
    assert_eq!(desk.read("a.key"), desk.read("b.key"));
    // What another tool made, where there is one.
    let openssl = Command::new("openssl")
        .args(["genpkey", "-algorithm", "ed25519", "-out"])
        .arg(desk.path("o.pem"))
        .output();
    if openssl.is_ok_and(|output| output.status.success()) {
        chmod(&desk, "o.pem", 0o600);
        desk.run("import o.pem --node --out o.key").ok();
    }
    for (label, advice) in [
        ("ENCRYPTED PRIVATE KEY", "decrypt it first"),
        ("OPENSSH PRIVATE KEY", "only PKCS#8"),
        ("RSA PRIVATE KEY", "only a PKCS#8"),
        ("PRIVATE KEY", "RFC 8410"),
    ] {
        desk.put("x.pem", pem::write(label, &[1; 48]).as_bytes());
        desk.run("import x.pem --node --out x.key").fails(3, advice);
    }
    chmod(&desk, "a.pem", 0o644);
    desk.run("import a.pem --node --out x.key").fails(5, "chmod 600");
    assert!(!desk.path("x.key").exists());
}
