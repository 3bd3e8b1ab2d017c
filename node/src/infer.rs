//! Asking a model over the data plane: from the node that a client talks to, to the one that serves.
//!
//! ```text
//! entry --Open(INFER, lease | endpoint | stream | length | first bytes)--> serving
//!       --the rest of the request-->
//!       <--frame*--                          frame = kind u8 | length u32 LE | bytes
//!            1 piece: one JSON text          2 done: prompt, cached, completion, u64 LE each
//!            3 fault: an OpenAI error        4 record: a signed `Served`, the last frame
//!            5 prompt: its tokens, u64 LE, where the engine knows them before the end
//! ```
//!
//! The lease is the credential: only its delegate's key, which the connection proves, may ask. The
//! asking side keeps its half of the stream open until the answer is done; when it resets that half,
//! its client has hung up, and generation stops within one token: `done` and `record` still come, for
//! what was produced until then. After a fault nothing comes: what broke off is not counted.
//!
//! A record that did not come, or was not waited for, can be had again: `Open(RECORDS, lease | from)` is
//! answered with the records of that lease from that number on.
//!
//! Both sides hash the same bytes: the request as it was sent, and the answer as [`AnswerHash`] says.

use std::io;

use bytes::Bytes;
use leasehold_proto::words::sign::Signed;
use leasehold_proto::words::wire;
use leasehold_proto::{Hash, LeaseId};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::data::frame::MAX_BODY;
use crate::openai::{Counted, Endpoint, Fault};

/// The channel kind on the data plane.
pub const INFER: u8 = 2;
/// The channel kind for records that did not come.
pub const RECORDS: u8 = 3;
/// The most of them in one answer.
pub const MAX_RECORDS: usize = 1_024;
/// The longest request, in bytes: pictures come in it.
pub const MAX_REQUEST: usize = 32 << 20;
/// The longest piece, in bytes: a whole answer with many embeddings.
pub const MAX_PIECE: usize = 64 << 20;
/// The longest fault or record, in bytes.
const MAX_WORD: usize = 16 << 10;
/// What comes before the first bytes of a request.
const HEAD: usize = 32 + 1 + 1 + 4;
/// How many bytes of a request go with its beginning: so most requests take one round trip.
pub const FIRST: usize = MAX_BODY - HEAD;

/// The beginning of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Under which lease it is asked.
    pub lease: LeaseId,
    /// What is asked for.
    pub endpoint: Endpoint,
    /// Whether the answer is to come in chunks.
    pub stream: bool,
    /// How long the request is, in bytes; at most [`MAX_REQUEST`].
    pub length: usize,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A whole JSON text: a chunk of a stream, or the answer.
    Piece(Bytes),
    /// The answer is complete.
    Done(Counted),
    /// It came to nothing, or to no more.
    Fault(Fault),
    /// What was served, signed.
    Record(Box<Signed>),
    /// How many tokens were asked.
    Prompt(u64),
}

/// Why a stream does not go on.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The stream broke.
    #[error("the stream broke: {0}")]
    Io(#[from] io::Error),
    /// A frame breaks the rules.
    #[error("the serving node sent {0}")]
    Frame(&'static str),
}

const fn number(endpoint: Endpoint) -> u8 {
    match endpoint {
        Endpoint::Chat => 0,
        Endpoint::Completions => 1,
        Endpoint::Embeddings => 2,
        Endpoint::Responses => 3,
    }
}

impl Head {
    /// The body of the opening frame for a request of these bytes, and what of it is left to send.
    #[must_use]
    pub fn open(&self, request: &Bytes) -> (Vec<u8>, Bytes) {
        let first = request.len().min(FIRST);
        let mut body = Vec::with_capacity(HEAD + first);
        body.extend_from_slice(&self.lease.0.0);
        body.push(number(self.endpoint));
        body.push(self.stream.into());
        body.extend_from_slice(&u32::try_from(self.length).unwrap_or(u32::MAX).to_le_bytes());
        body.extend_from_slice(request.get(..first).unwrap_or_default());
        (body, request.slice(first..))
    }

    /// Reads an opening body: the head, and the first bytes of the request. `None` when it is none.
    #[must_use]
    pub fn read(body: &[u8]) -> Option<(Self, &[u8])> {
        let (lease, rest) = body.split_first_chunk::<32>()?;
        let (&[endpoint, stream], rest) = rest.split_first_chunk::<2>()?;
        let (length, first) = rest.split_first_chunk::<4>()?;
        let endpoint = Endpoint::ALL.into_iter().find(|known| number(*known) == endpoint)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let whole = length <= MAX_REQUEST && first.len() == length.min(FIRST) && stream < 2;
        let lease = LeaseId(Hash(*lease));
        whole.then_some((Self { lease, endpoint, stream: stream == 1, length }, first))
    }
}

/// What asks for records: of which lease, from which number on.
#[must_use]
pub fn ask_records(lease: &LeaseId, from: u64) -> Vec<u8> {
    [&lease.0.0[..], &from.to_le_bytes()].concat()
}

/// Reads that.
#[must_use]
pub fn asked_records(body: &[u8]) -> Option<(LeaseId, u64)> {
    let (lease, from) = body.split_first_chunk::<32>()?;
    Some((LeaseId(Hash(*lease)), u64::from_le_bytes(from.try_into().ok()?)))
}

/// The hash of an answer: of its pieces, each after its length as four little-endian bytes.
#[derive(Clone, Debug, Default)]
pub struct AnswerHash(blake3::Hasher);

impl AnswerHash {
    /// A piece came, or goes.
    pub fn piece(&mut self, piece: &[u8]) {
        let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        self.0.update(&length.to_le_bytes()).update(piece);
    }

    /// The hash of all of them.
    #[must_use]
    pub fn finish(&self) -> Hash {
        Hash(*self.0.finalize().as_bytes())
    }
}

/// Writes one frame, as one write.
///
/// # Errors
/// Those of the stream; a record that does not encode.
pub async fn write(stream: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let (kind, bytes): (u8, Bytes) = match frame {
        Frame::Piece(piece) => (1, piece.clone()),
        Frame::Done(Counted { prompt, cached, completion }) => {
            let numbers = [prompt, cached, completion].map(|n| n.to_le_bytes());
            (2, numbers.concat().into())
        }
        Frame::Fault(fault) => (3, serde_json::to_vec(&FaultText::of(fault))?.into()),
        Frame::Prompt(tokens) => (5, tokens.to_le_bytes().to_vec().into()),
        Frame::Record(signed) => {
            let bytes = wire::encode::<MAX_WORD>(signed).map_err(io::Error::other)?;
            (4, bytes.into())
        }
    };
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut head = [kind, 0, 0, 0, 0];
    if let Some(place) = head.get_mut(1..) {
        place.copy_from_slice(&length.to_le_bytes());
    }
    if bytes.len() <= 16 << 10 {
        return stream.write_all(&[&head[..], &bytes].concat()).await;
    }
    stream.write_all(&head).await?;
    stream.write_all(&bytes).await
}

/// Reads one frame; none at the clean end of the stream.
///
/// # Errors
/// When the stream breaks or a frame breaks the rules; nothing longer than allowed is allocated.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Frame>, Broken> {
    let mut head = [0; 5];
    match stream.read(&mut head[..1]).await? {
        0 => return Ok(None),
        _ => stream.read_exact(&mut head[1..]).await?,
    };
    let [kind, length @ ..] = head;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > if kind == 1 { MAX_PIECE } else { MAX_WORD } {
        return Err(Broken::Frame("a frame longer than is allowed"));
    }
    // What is announced is only held once it comes.
    let mut bytes = Vec::with_capacity(length.min(64 << 10));
    let read = (&mut *stream).take(length as u64).read_to_end(&mut bytes).await?;
    if read < length {
        return Err(Broken::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(Some(match kind {
        1 => Frame::Piece(bytes.into()),
        2 => {
            let mut numbers = bytes.as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n));
            let (Some(prompt), Some(cached), Some(completion), 24) =
                (numbers.next(), numbers.next(), numbers.next(), length)
            else {
                return Err(Broken::Frame("a count that does not read"));
            };
            Frame::Done(Counted { prompt, cached, completion })
        }
        3 => {
            let text: FaultText = serde_json::from_slice(&bytes)
                .map_err(|_| Broken::Frame("a fault that does not read"))?;
            Frame::Fault(text.fault())
        }
        4 => {
            let signed = wire::decode::<MAX_WORD, Signed>(&bytes);
            Frame::Record(Box::new(signed.map_err(|_| Broken::Frame("a record that is none"))?))
        }
        5 => {
            let tokens = bytes.as_slice().try_into().map(u64::from_le_bytes);
            Frame::Prompt(tokens.map_err(|_| Broken::Frame("a count that does not read"))?)
        }
        _ => return Err(Broken::Frame("a frame of an unknown kind")),
    }))
}

/// A fault as it travels: what the API says of it, and its status.
#[derive(serde::Serialize, serde::Deserialize)]
struct FaultText {
    status: u16,
    body: serde_json::Value,
    retry_after_s: Option<u64>,
}

impl FaultText {
    fn of(fault: &Fault) -> Self {
        let body = serde_json::from_slice(&fault.body()).unwrap_or_default();
        Self { status: fault.status, body, retry_after_s: fault.retry_after_seconds() }
    }

    fn fault(self) -> Fault {
        let status = if (400..600).contains(&self.status) { self.status } else { 502 };
        let mut fault = Fault::from_value(status, &self.body);
        let wait = self.retry_after_s.map(|s| std::time::Duration::from_secs(s.min(86_400)));
        fault.retry_after = wait.or(fault.retry_after);
        fault
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    async fn frames(bytes: &[u8]) -> Result<Vec<Frame>, Broken> {
        let (mut rest, mut frames) = (bytes, Vec::new());
        while let Some(frame) = read(&mut rest).await? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[tokio::test]
    async fn what_is_written_is_read() {
        let signed = Signed {
            envelope: vec![1, 2, 3].into(),
            signature: leasehold_proto::words::sign::Signature([4; 64]),
        };
        let said = [
            Frame::Piece(Bytes::from_static(b"{}")),
            Frame::Piece(vec![b' '; 40_000].into()),
            Frame::Done(Counted { prompt: 7, cached: 3, completion: u64::MAX }),
            Frame::Fault(Fault::model_not_found("m").after(std::time::Duration::from_secs(3))),
            Frame::Record(Box::new(signed)),
            Frame::Prompt(9),
        ];
        let mut bytes = Vec::new();
        for frame in &said {
            write(&mut bytes, frame).await.expect("written");
        }
        assert_eq!(frames(&bytes).await.expect("reads"), said);
        for cut in [1, 4, 6, bytes.len() - 1] {
            assert!(matches!(frames(&bytes[..cut]).await, Err(Broken::Io(_))), "{cut}");
        }
        let too_long = [&[1][..], &u32::MAX.to_le_bytes()].concat();
        assert!(matches!(frames(&too_long).await, Err(Broken::Frame(_))));
    }

    #[test]
    fn a_request_goes_with_its_beginning_as_far_as_it_fits() {
        for length in [0, 1, FIRST - 1, FIRST, FIRST + 1, 200_000] {
            let request: Bytes = vec![b'x'; length].into();
            let lease = LeaseId(Hash([9; 32]));
            let head = Head { lease, endpoint: Endpoint::Embeddings, stream: true, length };
            let (body, rest) = head.open(&request);
            assert!(body.len() <= MAX_BODY);
            let (read, first) = Head::read(&body).expect("reads");
            assert_eq!((read, first.len() + rest.len()), (head, length));
        }
        assert!(Head::read(&[0; 37]).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
            let _ = runtime.block_on(frames(&bytes));
            let _ = Head::read(&bytes);
        }
    }
}
