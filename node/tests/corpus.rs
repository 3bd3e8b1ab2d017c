//! What fuzzers found worth keeping, given to the decoders again (node/fuzz/corpus).

use std::fs;
use std::path::Path;

type Target = fn(&[u8]);

#[test]
fn every_decoder_stands_what_was_found() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let targets: [(&str, Target); 6] = [
        ("request", leasehold_node::fuzz::request),
        ("response", leasehold_node::fuzz::response),
        ("told", leasehold_node::fuzz::told),
        ("marks", leasehold_node::fuzz::marks),
        ("index", leasehold_node::fuzz::index),
        ("stream", leasehold_node::fuzz::stream),
    ];
    for (name, target) in targets {
        let dir = corpus.join(name);
        let files: Vec<_> = fs::read_dir(&dir)
            .unwrap_or_else(|why| panic!("{}: {why}", dir.display()))
            .map(|entry| entry.expect("lists").path())
            .collect();
        assert!(!files.is_empty(), "nothing was kept for {name}");
        for file in files {
            let bytes = fs::read(&file).expect("reads");
            // Whatever is wrong with it is said together with the file's name.
            let stands = std::panic::catch_unwind(|| target(&bytes));
            assert!(stands.is_ok(), "{name} does not stand {}", file.display());
        }
    }
}
