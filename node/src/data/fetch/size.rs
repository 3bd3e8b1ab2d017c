//! How large a payload is of which only the name is known.
//!
//! A holder says a size, and proves it by the last group: where a BLAKE3 tree has its last chunk is
//! part of its root, so what verifies there verifies for no other size.

use std::sync::Arc;

use bao_tree::{BaoTree, io::sync::DecodeResponseIter};
use leasehold_proto::base::groups::{GROUP_BYTES, groups_of};
use tokio::time::timeout;

use super::{FetchError, Holder, ready};
use crate::data::{
    Shared,
    dial::{Answered, LinkError},
    frame::{Code, Get, Have, Refusal, Refused, Request, Response},
    serve::chunk_ranges,
};
use crate::payload::{GROUP, Root};

/// The most hash pairs above one group.
const MAX_PAIRS: usize = 64;

/// Asks `holder` for the size of a payload, and for its proof.
pub(in crate::data) async fn of(
    shared: &Arc<Shared>,
    holder: &Holder,
    root: Root,
) -> Result<u64, FetchError> {
    let Holder { key: peer, addresses, .. } = holder;
    let ask = |request: Request| async move {
        let frame = request.encode().map_err(LinkError::Request)?;
        shared.request(*peer, addresses, &frame, true).await
    };
    // What it says is learnt from its no to another size; a payload may have none.
    let Answered { response, .. } = ask(Request::Have(Have { root, size: 0 })).await?;
    let size = match response {
        Response::Refused(Refused { why: Refusal::WrongSize, figure, .. }) => figure,
        other => ready(other, *peer, root, 0).map(|()| 0)?,
    };
    let last = groups_of(size) - 1;
    // No payload is so large that its end cannot be counted in bytes.
    let from = last.saturating_mul(GROUP_BYTES);
    let ranges: Vec<_> = (size > 0).then_some(from..size).into_iter().collect();
    let chunks = chunk_ranges(&ranges, size);
    let Answered { mut send, mut recv, response } =
        ask(Request::Get(Get { root, size, ranges })).await?;
    ready(response, *peer, root, size)?;
    let most = 64 * MAX_PAIRS + GROUP_BYTES as usize;
    let read = timeout(shared.config.stall, recv.stream.read_to_end(most)).await;
    let corrupt = FetchError::Corrupt { peer: *peer, root, offset: from };
    let body = match read {
        Ok(Ok(body)) => body,
        Ok(Err(quinn::ReadToEndError::TooLong)) => return Err(corrupt),
        Ok(Err(quinn::ReadToEndError::Read(error))) => {
            let reason = error.to_string();
            return Err(LinkError::Lost { peer: *peer, reason }.into());
        }
        Err(_) => return Err(FetchError::Stalled { peer: *peer, root, received: 0 }),
    };
    let tree = BaoTree::new(size, GROUP);
    let mut items = DecodeResponseIter::new(root.hash(), tree, &body[..], &chunks);
    if items.all(|item| item.is_ok()) {
        send.finish();
        Ok(size)
    } else {
        send.reset(Code::Corrupt);
        Err(corrupt)
    }
}
