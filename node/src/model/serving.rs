//! One request of another node, from its first byte to its signed record.
//!
//! ```text
//! head --lease? budget? place?--> the rest of it --> engine --pieces--> done, record
//!   \--refused, with a reason          \--a fault: nothing is counted
//! ```
//!
//! Whoever asked hangs up by resetting its half of the stream, or by being gone: generation stops, and
//! what was produced until then is counted, as much as was seen of it.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use leasehold_proto::core::{Command, Reply};
use leasehold_proto::words::model::{Finish, Sampling, Service};
use leasehold_proto::{Hash, KeyId};
use tokio::io::AsyncReadExt as _;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::engine::{Ask, Piece};
use super::slack::Answering;
use super::{Admitted, Models, hold, worst_case};
use crate::data::frame::Refusal;
use crate::data::{Arriving, RecvHalf, SendHalf};
use crate::infer::{self, AnswerHash, Frame, Head};
use crate::openai::tally::{Bounds, Tally};
use crate::openai::{Counted, Fault, Request};
use crate::records;

/// How long the rest of a request may take.
const REQUEST: Duration = Duration::from_secs(60);
/// How long one who asked may leave what it asked for unread.
const UNREAD: Duration = Duration::from_secs(60);

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum No {
    /// No such lease of theirs admits requests now.
    Stranger,
    /// The lease stands still.
    Frozen,
    /// Its budget is spent.
    Spent,
    /// The model is not served any more.
    Gone,
    /// Too much at once.
    Busy,
}

impl No {
    const fn refusal(self) -> (Refusal, &'static str) {
        match self {
            Self::Stranger => (Refusal::Denied, "no lease of yours admits requests here"),
            Self::Frozen => (Refusal::Denied, "the lease stands still"),
            Self::Spent => (Refusal::Denied, "the lease's budget is spent"),
            Self::Gone => (Refusal::NotHeld, "the model is not served here any more"),
            Self::Busy => (Refusal::Busy, "too many requests at once"),
        }
    }
}

/// How an answer ended.
enum Ended {
    Done(Counted),
    /// Whoever asked wants no more of it.
    HungUp,
    /// What was written was not taken: nothing more can be said.
    Unread,
    Fault(Fault),
}

impl Models {
    /// Serves one request.
    pub(crate) async fn serve(self, arriving: Arriving) {
        let Some((head, first)) = Head::read(&arriving.body) else {
            arriving.refuse(Refusal::BadRequest, "not a request to a model");
            return;
        };
        let first = Bytes::copy_from_slice(first);
        let admitted = match self.admit(&head, arriving.peer) {
            Ok(admitted) => admitted,
            Err(no) => {
                let (why, detail) = no.refusal();
                arriving.refuse(why, detail);
                return;
            }
        };
        let peer = KeyId(arriving.peer);
        let Ok((mut send, recv)) = arriving.accept().await else { return };
        let requests = admitted.lease.requests.clone();
        let served =
            requests.track_future(self.answer(head.clone(), first, &admitted, &mut send, recv));
        if let Err(error) = served.await {
            tracing::debug!(lease = %head.lease, %peer, %error, "a request was not answered to its end");
            return;
        }
        send.finish();
    }

    async fn answer(
        &self,
        head: Head,
        first: Bytes,
        admitted: &Admitted,
        send: &mut SendHalf,
        mut recv: RecvHalf,
    ) -> std::io::Result<()> {
        let request = timeout(REQUEST, whole(&head, first, &mut recv)).await??;
        let counts = &self.inner.counts;
        let Ok(asked) = Request::parse(head.endpoint, &request) else {
            // Whoever asks has parsed it as well.
            let fault = Fault::not_json("the request does not read");
            return infer::write(send, &Frame::Fault(fault)).await;
        };
        // Whoever asks knows what is offered; what is asked for beyond that nobody has agreed to.
        let (loaded, context) = (&admitted.loaded, admitted.loaded.context());
        let name = &loaded.entry.name;
        let checked = if loaded.endpoints().contains(&head.endpoint) {
            asked.check(loaded.entry.needs(), name)
        } else {
            Err(Fault::internal())
        };
        if checked.is_err() {
            // Its offer may have said otherwise a moment ago: others may have it.
            let why = format!("The serving node does not offer that of '{name}' now.");
            return infer::write(send, &Frame::Fault(Fault::unavailable(why))).await;
        }
        let ask = Ask { endpoint: head.endpoint, body: request.clone(), stream: head.stream };
        let mut hash = AnswerHash::default();
        let bounds = Bounds::of(head.endpoint, &request);
        let mut seen = Tally::new(head.endpoint, bounds);
        let mut prompt = 0;
        let stop = async {
            tokio::select! {
                () = hung_up(&mut recv) => Ended::HungUp,
                () = admitted.lease.stop.cancelled() => {
                    Ended::Fault(Fault::unavailable("The lease ended before the answer did."))
                }
            }
        };
        let worst = worst_case(&bounds, context, &admitted.lease.terms.rates);
        let Some(aside) = admitted.lease.set_aside(worst) else {
            return infer::write(send, &Frame::Fault(Fault::no_room())).await;
        };
        let read = (&mut hash, &mut seen, &mut prompt);
        let ended = pipe(admitted, (ask, bounds.answers), read, send, stop).await;
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        let density = &admitted.loaded.density;
        let (counted, finish) = match &ended {
            Ended::Done(counted) => {
                density.seen(asked.prompt_bytes(), &bounds, counted.prompt);
                (*counted, Finish::Answered)
            }
            Ended::HungUp | Ended::Unread => {
                counts.hung_up.fetch_add(1, relaxed);
                let counted = seen
                    .broken_off(prompt, || density.tokens(asked.prompt_bytes(), &bounds, context));
                (counted, Finish::HungUp)
            }
            Ended::Fault(fault) => {
                let refused = fault.is_no_slack();
                let counter = if refused { &counts.slack_refused } else { &counts.faults };
                counter.fetch_add(1, relaxed);
                // Before it is told: whoever asked may ask again for as much at once.
                drop(aside);
                return infer::write(send, &Frame::Fault(fault.clone())).await;
            }
        };
        counts.prompt_tokens.fetch_add(counted.prompt, relaxed);
        counts.completion_tokens.fetch_add(counted.completion, relaxed);
        // Whoever asked may be gone: it is counted all the same.
        let told = match ended {
            Ended::Unread => Err(std::io::ErrorKind::TimedOut.into()),
            _ => infer::write(send, &Frame::Done(counted)).await,
        };
        let service = Service {
            endpoint: head.endpoint,
            request: Hash::of(&request),
            response: hash.finish(),
            sampling: sampling_of(&asked),
            finish,
            prompt_tokens: counted.prompt,
            cached_tokens: counted.cached,
            completion_tokens: counted.completion,
        };
        let record = self.record(&head, service, admitted).await;
        drop(aside);
        let Some(record) = record else { return told };
        told?;
        infer::write(send, &Frame::Record(Box::new(record))).await
    }

    /// Gives records once more to whoever they are about.
    pub(crate) async fn records(self, arriving: Arriving) {
        let Some((lease, from)) = infer::asked_records(&arriving.body) else {
            arriving.refuse(Refusal::BadRequest, "not a question for records");
            return;
        };
        let (store, signer) = (&self.inner.store, &self.inner.signer);
        let kept = records::served(store, signer, lease, (from, infer::MAX_RECORDS)).await;
        // The same answer for what does not exist and for what is not theirs.
        let Some((_, kept)) = kept.ok().filter(|(delegate, _)| delegate.0 == arriving.peer) else {
            arriving.refuse(Refusal::Denied, "no lease of yours has records here");
            return;
        };
        let Ok((mut send, _recv)) = arriving.accept().await else { return };
        for record in kept {
            let frame = Frame::Record(Box::new(record));
            if !matches!(timeout(UNREAD, infer::write(&mut send, &frame)).await, Ok(Ok(()))) {
                return;
            }
        }
        send.finish();
    }

    /// Has a request counted and kept, and signs its record.
    async fn record(
        &self,
        head: &Head,
        service: Service,
        admitted: &Admitted,
    ) -> Option<leasehold_proto::words::sign::Signed> {
        {
            let mut state = hold(&admitted.lease.state);
            let tally = &mut state.tally;
            tally.prompt_tokens = tally.prompt_tokens.saturating_add(service.prompt_tokens);
            let completion = tally.completion_tokens.saturating_add(service.completion_tokens);
            tally.completion_tokens = completion;
        }
        let (reply, answer) = oneshot::channel();
        let command = Command::Serve(head.lease, service);
        self.inner.commands.send((command, reply)).await.ok()?;
        match answer.await {
            Ok(Ok(Reply::Served(draft))) => self.inner.signer.sign(&draft).ok(),
            Ok(other) => {
                tracing::warn!(lease = %head.lease, ?other, "a request was served and not counted");
                None
            }
            Err(_) => None,
        }
    }
}

/// The whole request, of which the first bytes are there.
async fn whole(head: &Head, first: Bytes, recv: &mut RecvHalf) -> std::io::Result<Bytes> {
    if first.len() == head.length {
        return Ok(first);
    }
    // What is announced is only held once it comes.
    let mut all = BytesMut::with_capacity((first.len() * 2).min(head.length));
    all.extend_from_slice(&first);
    while all.len() < head.length {
        let left = head.length - all.len();
        if recv.take(left as u64).read_buf(&mut all).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(all.freeze())
}

/// Passes the pieces of an answer on, until it is complete, comes to nothing, or `stop` resolves. What
/// is begun to be written is written whole: the record comes after it.
async fn pipe(
    admitted: &Admitted,
    (ask, answers): (Ask, u64),
    (hash, seen, prompt): (&mut AnswerHash, &mut Tally, &mut u64),
    send: &mut SendHalf,
    stop: impl Future<Output = Ended>,
) -> Ended {
    tokio::pin!(stop);
    let class = (admitted.lease.class, answers);
    let asked = tokio::select! {
        asked = admitted.loaded.ask(ask, class, Some(&admitted.lease.waiting)) => asked,
        ended = &mut stop => return ended,
    };
    let Answering { mut pieces, place: _place } = match asked {
        Ok(answering) => answering,
        Err(fault) => return Ended::Fault(fault),
    };
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            ended = &mut stop => return ended,
        };
        match piece {
            Some(Ok(Piece::Data(piece))) => {
                hash.piece(&piece);
                if let Err(fault) = seen.see(&piece) {
                    return Ended::Fault(fault);
                }
                let written = timeout(UNREAD, infer::write(send, &Frame::Piece(piece))).await;
                if !matches!(written, Ok(Ok(()))) {
                    return Ended::Unread;
                }
            }
            Some(Ok(Piece::Prompt(tokens))) => {
                *prompt = tokens;
                let written = timeout(UNREAD, infer::write(send, &Frame::Prompt(tokens))).await;
                if !matches!(written, Ok(Ok(()))) {
                    return Ended::Unread;
                }
            }
            Some(Ok(Piece::Done(counted))) => return Ended::Done(counted),
            Some(Err(fault)) => return Ended::Fault(fault),
            None => {
                let why = "The model's engine ended without an end.";
                return Ended::Fault(Fault::bad_upstream(why));
            }
        }
    }
}

/// Resolves when whoever asked wants no more.
async fn hung_up(recv: &mut RecvHalf) {
    let mut byte = [0];
    // Nothing comes but the end: a reset, or the connection's.
    let _ = recv.read(&mut byte).await;
}

/// With what a request wants its words chosen, as a record says it.
pub(crate) fn sampling_of(request: &Request) -> Sampling {
    // Both are within bounds: the request was read.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let permille = |value: Option<f64>| value.map(|value| (value * 1000.0).round() as u32);
    Sampling {
        temperature_permille: permille(request.sampling.temperature),
        top_p_permille: permille(request.sampling.top_p),
        seed: request.sampling.seed,
        max_tokens: request.sampling.max_tokens.map(u64::from),
    }
}
