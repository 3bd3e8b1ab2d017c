//! What fuzzers, and the replay of what they found, give to the decoders of the data plane: each
//! takes any bytes at all, and panics where a promise of its decoder does not hold.
//!
//! The targets are in `node/fuzz`, what they found worth keeping in `node/fuzz/corpus`.

use std::path::{Component, Path};

use bao_tree::BaoTree;
use bao_tree::io::BaoContentItem;
use bao_tree::io::sync::DecodeResponseIter;
use leasehold_proto::words::index::Index;

use crate::data::chunk_ranges;
use crate::data::frame::{self, Request, Response};
use crate::payload::{GROUP, Root, marks_roundtrip};

/// A request frame: what decodes encodes to the same bytes.
pub fn request(bytes: &[u8]) {
    if let Ok(request) = Request::decode(bytes) {
        let again = request.encode().expect("what decodes also encodes");
        assert_eq!(again.get(4..), Some(bytes));
    }
}

/// A response frame, likewise.
pub fn response(bytes: &[u8]) {
    if let Ok(response) = Response::decode(bytes) {
        let again = response.encode().expect("what decodes also encodes");
        assert_eq!(again.get(4..), Some(bytes));
    }
}

/// A frame that tells what is there, likewise.
pub fn told(bytes: &[u8]) {
    if bytes.len() <= frame::MAX_TOLD_BYTES
        && let Ok(runs) = frame::heard(bytes, u64::MAX)
    {
        let again = frame::told(&runs.into_iter().collect()).expect("what decodes also encodes");
        assert_eq!(again.get(4..), Some(bytes));
    }
}

/// The marks of what has come of a payload: nothing that is not among its groups is believed.
pub fn marks(bytes: &[u8]) {
    marks_roundtrip(bytes);
}

/// An index: what decodes encodes to the same bytes, and leads nowhere but below its directory.
pub fn index(bytes: &[u8]) {
    if let Ok(index) = Index::from_bytes(bytes) {
        assert_eq!(index.to_bytes(), bytes);
        for file in index.files() {
            let below = Path::new(&file.path).components();
            assert!(below.clone().all(|part| matches!(part, Component::Normal(_))));
            assert_eq!(below.as_path().as_os_str().len(), file.path.len());
        }
    }
}

/// The content of a payload as it streams: root 32, size `u64`, start and end of a range `u64` each,
/// then the stream. Only groups of the range come out, and only those that match the root.
pub fn stream(bytes: &[u8]) {
    let Some((head, stream)) = bytes.split_first_chunk::<56>() else { return };
    let number = |at: usize| {
        let field = head.get(at..at + 8).and_then(|field| field.first_chunk());
        u64::from_le_bytes(field.copied().unwrap_or_default())
    };
    let mut root = [0; 32];
    root.copy_from_slice(&head[..32]);
    let (root, size) = (Root::from_bytes(root), number(32) % (1 << 40));
    let range = number(40) % (size + 1)..number(48) % (size + 1);
    let ranges = if range.start < range.end { vec![range] } else { Vec::new() };
    let chunks = chunk_ranges(&ranges, size);
    let mut came = 0;
    for item in DecodeResponseIter::new(root.hash(), BaoTree::new(size, GROUP), stream, &chunks) {
        match item {
            Ok(BaoContentItem::Leaf(leaf)) => {
                assert!(leaf.offset + leaf.data.len() as u64 <= size);
                came += leaf.data.len();
            }
            Ok(BaoContentItem::Parent(_)) => {}
            Err(_) => break,
        }
    }
    assert!(came <= stream.len());
}
