//! The house rules of this crate: each layer knows only those before it, and nothing in here does
//! I/O, reads a clock, starts a thread or throws dice of its own.

use std::path::{Path, PathBuf};

/// The layers in order; a file may use its own layer (minds excepted) and those before it.
const LAYERS: [&str; 6] = ["base", "words", "minds", "placement", "core", "proof"];

fn sources() -> Vec<(String, String)> {
    fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).expect("the sources are there").flatten() {
            let path = entry.path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("a source is text");
        let name = path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
        (name, text)
    };
    paths.into_iter().map(read).collect()
}

/// The code without comments and without its tests.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// The layer of a file, and its room in there.
fn place(file: &str) -> Option<(usize, &str)> {
    let first = file.split('/').next()?.trim_end_matches(".rs");
    let layer = LAYERS.iter().position(|layer| *layer == first)?;
    let room = file.split('/').nth(1).unwrap_or(first).trim_end_matches(".rs");
    Some((layer, room))
}

/// Every path below `crate::` that the code names, as layer and module in it.
fn uses(code: &str) -> Vec<(String, String)> {
    let word = |text: &str| -> String {
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let path = &code[at + "crate::".len()..];
        // `use crate::{a::b, c::d}` would hide what is named: it is not written here.
        assert!(!path.starts_with('{'), "name each import by its layer");
        let layer = word(path);
        let rest = path[layer.len()..].trim_start_matches("::");
        match rest.strip_prefix('{') {
            Some(group) => {
                let group = group.split('}').next().unwrap_or_default();
                let names = group.split(',').map(|name| word(name.trim()));
                let names = names.filter(|name| !name.is_empty());
                found.extend(names.map(|name| (layer.clone(), name)));
            }
            None => found.push((layer, word(rest))),
        }
    }
    found
}

#[test]
fn layers_use_only_those_before_them() {
    let mut checked = 0;
    for (file, text) in sources() {
        let Some((layer, room)) = place(&file) else {
            assert_eq!(file, "lib.rs", "{file} belongs to no layer");
            continue;
        };
        let code = code(&text);
        for (used, module) in uses(&code) {
            let Some(other) = LAYERS.iter().position(|name| *name == used) else {
                panic!("{file} uses crate::{used}, which is no layer");
            };
            assert!(other <= layer, "{file} uses crate::{used}, which comes after it");
            let mind = LAYERS[layer] == "minds" && other == layer;
            assert!(!mind || module == room, "{file} uses the mind {module}: minds do not meet");
            checked += 1;
        }
        if LAYERS[layer] == "minds" {
            assert!(!code.contains("super::"), "{file} reaches beside itself");
        }
    }
    assert!(checked > 50, "the check found imports to check");
}

#[test]
fn nothing_in_here_reaches_the_world() {
    let forbidden = [
        "std::fs",
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "Instant",
        "SystemTime",
        "std::thread",
        "std::process",
        "std::env",
        "std::io",
        "HashMap",
        "HashSet",
        "RandomState",
        "println!",
        "thread_rng",
        "rand::rng",
    ];
    for (file, text) in sources() {
        let code = code(&text);
        for word in forbidden {
            assert!(!code.contains(word), "{file} names {word}");
        }
    }
}

#[test]
fn the_manifest_names_nothing_that_reaches_the_world() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &Path| std::fs::read_to_string(path).expect("a manifest is text");
    let (own, all) = (read(&root.join("Cargo.toml")), read(&root.join("../Cargo.toml")));
    let dependencies = own.split("\n[dependencies]\n").nth(1).expect("it has dependencies");
    let dependencies = dependencies.split("\n[").next().unwrap_or_default();
    let names = dependencies.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
    let names: Vec<_> = names.filter(|name| !name.is_empty() && !name.starts_with('#')).collect();
    let known = [
        "bincode",
        "blake3",
        "bs58",
        "bytes",
        "ed25519-dalek",
        "foca",
        "rand",
        "rand_chacha",
        "serde",
        "serde_json",
        "thiserror",
    ];
    assert!(names.len() >= known.len() - 2, "the manifest was read: {names:?}");
    for name in &names {
        assert!(known.contains(name), "{name} is new here: does it do I/O, or throw dice?");
    }
    // Those that could throw dice of their own are taken without the features for it.
    for name in ["rand", "rand_chacha", "foca"] {
        let line = all.lines().find(|line| line.starts_with(&format!("{name} ")));
        let line = line.unwrap_or_else(|| panic!("{name} has its version in the workspace"));
        assert!(line.contains("default-features = false"), "{line}");
        for feature in ["thread_rng", "sys_rng", "os_rng"] {
            assert!(!line.contains(feature), "{line}");
        }
    }
}
