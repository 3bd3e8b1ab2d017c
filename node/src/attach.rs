//! Following a job: its output and its end, from lessor to lessee over the data plane.
//!
//! ```text
//! lessee --Open(ATTACH, lease | stdout offset | stderr offset)--> lessor
//!        <--frame*--                                    frame = kind u8 | length u32 LE | bytes
//!            1 stdout   2 stderr   3 end: a JSON object, the last frame
//! ```
//!
//! The lease is the credential: only the delegate's key, which the connection proves, may attach.
//! A frame has at most [`MAX_FRAME`] bytes, checked before a byte is allocated.

use std::net::SocketAddr;

use leasehold_proto::words::usage::Outcome;
use leasehold_proto::{Hash, KeyId, LeaseId, Payload};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::data::{Data, LinkError, RecvHalf};

/// The channel kind on the data plane.
pub const ATTACH: u8 = 1;
/// The longest frame, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;

/// One piece of a job's story.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes that it wrote to standard output.
    Stdout(Vec<u8>),
    /// Bytes that it wrote to standard error.
    Stderr(Vec<u8>),
    /// It has ended; nothing follows.
    End(End),
}

/// How a job ended, as the lessor tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// How.
    pub outcome: Outcome,
    /// The declared outputs that were kept, for fetching from the lessor.
    pub outputs: Vec<OutputFile>,
    /// Bytes of output that did not fit into the bounded logs.
    pub dropped: u64,
}

/// A declared output that was kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputFile {
    /// Its name under `/out`.
    pub name: String,
    /// Its bytes.
    pub payload: Payload,
}

/// Why a job cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopped,
    /// The lease is not held by this node.
    #[error("this node holds no lease {0}")]
    NotHeld(LeaseId),
    /// The lessor cannot be reached, or refuses.
    #[error("the lessor cannot be attached to: {0}")]
    Link(#[from] LinkError),
    /// The stream broke.
    #[error("the stream from the lessor broke: {0}")]
    Broken(#[from] std::io::Error),
    /// A frame breaks the rules.
    #[error("the lessor sent {0}")]
    Frame(&'static str),
}

/// A stream of frames.
#[derive(Debug)]
pub struct Attached {
    frames: RecvHalf,
}

/// Asks `lessor` for the output of the job under `lease`.
///
/// # Errors
/// When the lessor cannot be reached or refuses.
pub async fn open(
    data: &Data,
    lessor: KeyId,
    addresses: Vec<SocketAddr>,
    lease: LeaseId,
    stdout: u64,
    stderr: u64,
) -> Result<Attached, AttachError> {
    let body = Request { lease, stdout, stderr }.encode();
    let (mut send, frames) = data.open(lessor.0, addresses, ATTACH, body).await?;
    send.finish();
    Ok(Attached { frames })
}

impl Attached {
    /// The next frame; none after [`Frame::End`].
    ///
    /// # Errors
    /// When the stream breaks or a frame breaks the rules.
    pub async fn next(&mut self) -> Result<Option<Frame>, AttachError> {
        read(&mut self.frames).await
    }
}

/// What a lessee asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which lease's job.
    pub lease: LeaseId,
    /// From which byte of standard output on.
    pub stdout: u64,
    /// From which byte of standard error on.
    pub stderr: u64,
}

impl Request {
    /// The request's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.lease.0.0.to_vec();
        bytes.extend_from_slice(&self.stdout.to_le_bytes());
        bytes.extend_from_slice(&self.stderr.to_le_bytes());
        bytes
    }

    /// Reads a request; `None` when the bytes are not exactly one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (lease, rest) = bytes.split_first_chunk::<32>()?;
        let (stdout, rest) = rest.split_first_chunk::<8>()?;
        let stderr: &[u8; 8] = rest.try_into().ok()?;
        let (stdout, stderr) = (u64::from_le_bytes(*stdout), u64::from_le_bytes(*stderr));
        Some(Self { lease: LeaseId(Hash(*lease)), stdout, stderr })
    }
}

/// Writes one frame; longer output is split.
///
/// # Errors
/// Those of the stream.
pub async fn write(stream: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> std::io::Result<()> {
    let end;
    let (kind, bytes) = match frame {
        Frame::Stdout(bytes) => (1, bytes),
        Frame::Stderr(bytes) => (2, bytes),
        Frame::End(said) => {
            end = serde_json::to_vec(said)?;
            (3, &end)
        }
    };
    for piece in bytes.chunks(MAX_FRAME) {
        let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        stream.write_u8(kind).await?;
        stream.write_u32_le(length).await?;
        stream.write_all(piece).await?;
    }
    Ok(())
}

/// Reads one frame; none at the clean end of the stream.
///
/// # Errors
/// When the stream breaks or a frame breaks the rules.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Frame>, AttachError> {
    let kind = match stream.read_u8().await {
        Ok(kind) => kind,
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let length = usize::try_from(stream.read_u32_le().await?).unwrap_or(usize::MAX);
    if length > MAX_FRAME {
        return Err(AttachError::Frame("a frame longer than is allowed"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    match kind {
        1 => Ok(Some(Frame::Stdout(bytes))),
        2 => Ok(Some(Frame::Stderr(bytes))),
        3 => {
            let end = serde_json::from_slice(&bytes);
            let end = end.map_err(|_| AttachError::Frame("an end that does not read"))?;
            Ok(Some(Frame::End(end)))
        }
        _ => Err(AttachError::Frame("a frame of an unknown kind")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REQUEST: Request = Request { lease: LeaseId(Hash([1; 32])), stdout: 7, stderr: u64::MAX };

    fn end() -> End {
        let payload = Payload { root: Hash([2; 32]), size: 9 };
        let outputs = vec![OutputFile { name: "a".into(), payload }];
        End { outcome: Outcome::Exited(3), outputs, dropped: 4 }
    }

    async fn frames(bytes: &[u8]) -> Result<Vec<Frame>, AttachError> {
        let (mut rest, mut frames) = (bytes, Vec::new());
        while let Some(frame) = read(&mut rest).await? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[tokio::test]
    async fn what_is_written_is_read() {
        let long = vec![5; MAX_FRAME + 1];
        let mut bytes = Vec::new();
        for frame in [Frame::Stdout(long.clone()), Frame::Stderr(vec![]), Frame::End(end())] {
            write(&mut bytes, &frame).await.expect("written");
        }
        let frames = frames(&bytes).await.expect("reads");
        let (first, second) = long.split_at(MAX_FRAME);
        let expected =
            [Frame::Stdout(first.to_vec()), Frame::Stdout(second.to_vec()), Frame::End(end())];
        assert_eq!(frames, expected, "longer output is split, none is not written");
    }

    #[tokio::test]
    async fn what_breaks_a_rule_is_an_error_before_it_is_held() {
        let framed = |kind: u8, length: u32, bytes: &[u8]| {
            [&[kind][..], &length.to_le_bytes(), bytes].concat()
        };
        let whole = framed(1, 3, b"abc");
        for cut in 1..whole.len() {
            assert!(matches!(frames(&whole[..cut]).await, Err(AttachError::Broken(_))), "{cut}");
        }
        for (what, bytes) in [
            ("too long", framed(1, 64 * 1024 + 1, b"")),
            ("far too long", framed(2, u32::MAX, b"")),
            ("unknown kind", framed(9, 1, b"x")),
            ("an end that is no JSON", framed(3, 2, b"{]")),
            ("an end that goes on", framed(3, 4, b"{} x")),
        ] {
            assert!(matches!(frames(&bytes).await, Err(AttachError::Frame(_))), "{what}");
        }
    }

    #[test]
    fn a_request_is_exactly_its_bytes() {
        let bytes = REQUEST.encode();
        assert_eq!(Request::decode(&bytes), Some(REQUEST));
        assert!((0..bytes.len()).all(|cut| Request::decode(&bytes[..cut]).is_none()));
        assert_eq!(Request::decode(&[&bytes[..], &[0]].concat()), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
            let _ = runtime.block_on(frames(&bytes));
            let _ = Request::decode(&bytes);
        }
    }
}
