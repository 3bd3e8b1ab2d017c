//! What of a payload a node has, told to those who want it, as it becomes more.
//!
//! Who has all of it says so and is done. Who is fetching it says which groups it has, again and
//! again, until all are there: so hosts that want the same payload at the same time feed each other.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use leasehold_proto::base::groups::{Groups, groups_of};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tracing::debug;

use super::{
    Shared,
    dial::{Answered, LinkError},
    fetch::{Event, FetchError, ready},
    frame::{self, Code, Have, MAX_TOLD_BYTES, Refusal, Request, Response},
    name,
    serve::{refuse, verdict},
    stream::{FrameReadError, RecvHalf, SendHalf, read_frame},
};
use crate::payload::{Part, Root};

/// The least time between two that tell what came in between.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// The least time between two that are listened to.
const LISTEN_EVERY: Duration = Duration::from_millis(20);

/// The most runs of groups that one holder's word is kept as: beyond, it is not taken note of.
const MAX_RUNS: usize = 8_192;

/// Answers who asks.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    peer: [u8; 32],
    have: Have,
    mut send: SendHalf,
    mut recv: RecvHalf,
) {
    let Have { root, size } = have;
    if shared.store.is_private(root) {
        return refuse(shared, &mut send, Refusal::NotHeld, 0, "").await;
    }
    // Looked for in this order: what arrives is held before it no longer arrives.
    let part = shared.store.part(root, size);
    let part = match (shared.store.has(root), part) {
        (Some(actual), _) if actual == size => None,
        (Some(actual), _) => {
            return refuse(shared, &mut send, Refusal::WrongSize, actual, "").await;
        }
        (None, Some(part)) => Some(part),
        (None, None) => {
            // Of another size than asked for, which some of it has proven.
            let other = shared.store.arriving_size(root);
            let why = other.map_or(Refusal::NotHeld, |_| Refusal::WrongSize);
            return refuse(shared, &mut send, why, other.unwrap_or(0), "").await;
        }
    };
    let telling = tell(shared, &mut send, (root, size), part);
    let told = tokio::select! {
        told = telling => told,
        // It wants to hear no more, or has said what it should not.
        _ = verdict(&mut recv) => Err(Code::Done),
    };
    match told {
        Ok(()) => send.finish(),
        Err(code) => {
            debug!(peer = %name(&peer), %root, reason = code.reason(), "told no further");
            send.reset(code);
        }
    }
}

/// Tells all that is here, and what comes, until all is.
async fn tell(
    shared: &Shared,
    send: &mut SendHalf,
    (root, size): (Root, u64),
    part: Option<Part>,
) -> Result<(), Code> {
    let ready = Response::Ready { size }.encode().map_err(|_| Code::Internal)?;
    write(shared, send, &ready).await?;
    let groups = groups_of(size);
    let mut told = Groups::new();
    if let Some(mut part) = part {
        loop {
            let news = part.news(&told);
            if !news.is_empty() {
                write(shared, send, &frame::told(&news).map_err(|_| Code::Internal)?).await?;
                told.extend(news.runs());
            }
            if told.len() >= groups {
                return Ok(());
            }
            sleep(TELL_EVERY).await;
            if !part.more().await {
                break;
            }
        }
        // Its transfer is over, one way or the other.
        if shared.store.has(root) != Some(size) {
            return Err(Code::Cancelled);
        }
    }
    let rest: Groups = told.gaps(0..groups).collect();
    write(shared, send, &frame::told(&rest).map_err(|_| Code::Internal)?).await
}

async fn write(shared: &Shared, send: &mut SendHalf, bytes: &[u8]) -> Result<(), Code> {
    let written = timeout(shared.config.stall, send.stream.write_all(bytes)).await;
    match written {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Code::Done),
        Err(_) => Err(Code::Stalled),
    }
}

/// Asks `peer` what it has of a payload, and passes on what it tells until it has told all.
pub(super) async fn ask(
    shared: &Arc<Shared>,
    peer: [u8; 32],
    addresses: &[SocketAddr],
    (root, size): (Root, u64),
    events: &mpsc::Sender<Event>,
) -> Result<(), FetchError> {
    // Streams that wait must not take the place of those that bring something. One that is too many
    // waits for another payload to be here, or to be given up.
    let watching = shared.watching_each.of(&peer);
    let _watching = watching.acquire().await.map_err(|_| LinkError::Closed)?;
    let frame = Request::Have(Have { root, size }).encode().map_err(LinkError::Request)?;
    let Answered { send, mut recv, response } =
        shared.request(peer, addresses, &frame, true).await?;
    ready(response, peer, root, size)?;
    if events.send(Event::Answers(peer)).await.is_err() {
        return Ok(());
    }
    let groups = groups_of(size);
    let mut known = Groups::new();
    while known.len() < groups {
        let frame = read_frame(&mut recv.stream, MAX_TOLD_BYTES).await.map_err(|e| match e {
            FrameReadError::Frame(error) => LinkError::Malformed { peer, error },
            FrameReadError::Read(quinn::ReadError::Reset(code)) => {
                LinkError::Reset { peer, code: Code::from_u64(code.into_inner()) }
            }
            e => LinkError::Lost { peer, reason: e.to_string() },
        })?;
        let runs = frame::heard(&frame, groups);
        let runs = runs.map_err(|error| LinkError::Malformed { peer, error })?;
        let mut news = Groups::new();
        for run in runs {
            if known.runs().len() < MAX_RUNS && known.insert(run.clone()) > 0 {
                news.insert(run);
            }
        }
        if !news.is_empty() && events.send(Event::Has(peer, news)).await.is_err() {
            break;
        }
        // However often it says something, it is listened to so often.
        if known.len() < groups {
            sleep(LISTEN_EVERY).await;
        }
    }
    drop(send);
    Ok(())
}
