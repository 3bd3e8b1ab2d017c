//! The frames of the data plane: what the first bytes of a stream say, byte for byte.
//!
//! A stream carries one request frame, then one response frame, then what the request was for.
//! Every integer is little-endian. A frame is a `u32` length followed by that many bytes; the
//! length is held against the bound of its kind before anything is allocated, and a frame that
//! has bytes left over after decoding is refused.
//!
//! ```text
//! request   Get      01  root[32]  size:u64  count:u16  count x (start:u64 end:u64)
//!           Open     02  channel:u8  body (the rest, at most 64 KiB)
//!           Have     03  root[32]  size:u64
//! response  Ready    00  size:u64
//!           Refused  why:u8 (not 00)  figure:u64  detail (the rest, UTF-8, at most 512 bytes)
//! ```
//!
//! After a `Get` and its `Ready` come the bytes of the BLAKE3 tree in pre-order (hash pairs and
//! 256 KiB groups, see [`crate::payload`]) for the ranges that were asked for, and the end of the
//! stream. After an `Open` and its `Ready` the stream belongs to whoever answers that channel. After
//! a `Have` and its `Ready` come frames that tell what is there, as it becomes more, and the end of
//! the stream when all is:
//!
//! ```text
//! told      Runs     count x (start:u32 end:u32)      groups that were not told of before
//! ```
//!
//! The layout is fixed by the ALPN name: another layout gets another name.

use std::{fmt, ops::Range};

use leasehold_proto::base::groups::{GROUP_BYTES, Groups};
use thiserror::Error;

use crate::payload::Root;

/// The protocol's name in the TLS handshake. It is also the version of the frames below.
pub const ALPN: &[u8] = b"leasehold/data/1";

/// The most bytes an `Open` may carry.
pub const MAX_BODY: usize = 64 * 1024;

/// The most ranges one `Get` may name.
pub const MAX_RANGES: usize = 1024;

/// The most bytes of text a refusal may carry.
pub const MAX_DETAIL: usize = 512;

/// The most runs of groups in one frame that tells what is there.
pub const MAX_TOLD: usize = 1024;

/// The longest frame that tells what is there, without its length.
pub(crate) const MAX_TOLD_BYTES: usize = 8 * MAX_TOLD;

/// The longest request frame, without its length: an `Open` with a full body.
pub(super) const MAX_REQUEST: usize = 2 + MAX_BODY;

/// The longest response frame, without its length.
pub(super) const MAX_RESPONSE: usize = 1 + 8 + MAX_DETAIL;

const GET: u8 = 1;
const OPEN: u8 = 2;
const HAVE: u8 = 3;
const READY: u8 = 0;

/// The first frame of a stream, from the side that opened it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    Get(Get),
    Open(Open),
    Have(Have),
}

/// Asks what of a payload is there, and to be told as it becomes more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Have {
    pub(super) root: Root,
    /// The payload's size in bytes, as the asker knows it.
    pub(super) size: u64,
}

/// Asks for a payload, or for parts of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Get {
    pub(super) root: Root,
    /// The payload's size in bytes, as the asker knows it from an order or a signed index.
    pub(super) size: u64,
    /// Which bytes: ascending, apart from each other, on group boundaries (the last may end at
    /// `size`). None at all means the whole payload.
    pub(super) ranges: Vec<Range<u64>>,
}

/// Asks for a stream to something that is not a payload: a job's output, a port, a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Open {
    /// What kind of stream; the node that answers knows the kinds.
    pub(super) channel: u8,
    /// What the kind needs to know, at most [`MAX_BODY`] bytes.
    pub(super) body: Vec<u8>,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Response {
    /// The content follows. `size` is the payload's size for a `Get` or `Have`, zero for an `Open`.
    Ready {
        size: u64,
    },
    Refused(Refused),
}

/// A refusal by the other side, with the figure behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub why: Refusal,
    /// The figure behind it: the holder's size in bytes for [`Refusal::WrongSize`], else zero.
    pub figure: u64,
    /// More for a person to read; written by the peer, free of control characters.
    pub detail: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.why)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

/// Why a request was refused. The numbers are the wire form and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// The payload is not here.
    NotHeld = 1,
    /// The payload is here, with another size than the request says.
    WrongSize = 2,
    /// The request is malformed, or asks for what no request may ask for.
    BadRequest = 3,
    /// Too much is going on; later, or elsewhere.
    Busy = 4,
    /// Something failed here that the asker cannot mend.
    Internal = 5,
    /// The asker may not have this.
    Denied = 6,
    /// Nobody answers this channel.
    Unsupported = 7,
}

impl Refusal {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::NotHeld,
            2 => Self::WrongSize,
            3 => Self::BadRequest,
            4 => Self::Busy,
            5 => Self::Internal,
            6 => Self::Denied,
            7 => Self::Unsupported,
            _ => return None,
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotHeld => "the payload is not held there",
            Self::WrongSize => "the payload has another size there",
            Self::BadRequest => "the request was found malformed",
            Self::Busy => "too busy",
            Self::Internal => "internal failure there",
            Self::Denied => "not allowed",
            Self::Unsupported => "nobody answers this channel there",
        })
    }
}

/// Codes with which a stream or a connection is cut short (QUIC application error codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// Nothing went wrong; also what QUIC says when a side just lets go.
    Done = 0,
    /// The peer's key is not admitted here.
    NotAdmitted = 1,
    /// More connections than one key, or all keys together, may have.
    TooMany = 2,
    /// The node is shutting down.
    Closing = 3,
    /// What was sent is not what the frames allow.
    Malformed = 4,
    /// Nothing moved for too long.
    Stalled = 5,
    /// Bytes that do not match their root.
    Corrupt = 6,
    /// The work was given up by the side that asked for it.
    Cancelled = 7,
    /// Something failed here that the peer cannot mend.
    Internal = 8,
    /// The connection was idle and its room is wanted.
    Idle = 9,
}

impl Code {
    pub(super) fn from_u64(code: u64) -> Option<Self> {
        Some(match code {
            0 => Self::Done,
            1 => Self::NotAdmitted,
            2 => Self::TooMany,
            3 => Self::Closing,
            4 => Self::Malformed,
            5 => Self::Stalled,
            6 => Self::Corrupt,
            7 => Self::Cancelled,
            8 => Self::Internal,
            9 => Self::Idle,
            _ => return None,
        })
    }

    /// The reason that travels with the code when a connection is closed.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::NotAdmitted => "this key is not admitted here",
            Self::TooMany => "too many connections",
            Self::Closing => "the node is shutting down",
            Self::Malformed => "malformed frames",
            Self::Stalled => "nothing moved for too long",
            Self::Corrupt => "bytes that do not match their root",
            Self::Cancelled => "given up",
            Self::Internal => "internal failure",
            Self::Idle => "the connection was idle",
        }
    }
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The length is over the bound of what is expected here.
    #[error("a frame of {len} bytes where at most {max} are allowed")]
    TooLong {
        /// The length announced or needed, in bytes.
        len: usize,
        /// The bound, in bytes.
        max: usize,
    },
    /// The frame ends inside a field.
    #[error("the frame ends inside a field")]
    Short,
    /// Bytes are left over after the last field.
    #[error("{0} bytes are left over at the frame's end")]
    Trailing(usize),
    /// A kind of frame, or a reason, that this version does not know.
    #[error("unknown kind {0}")]
    Unknown(u8),
    /// Ranges that overlap, touch, run backwards, or do not lie on group boundaries.
    #[error("the ranges are not ascending, separate and on group boundaries within the size")]
    Ranges,
    /// Text that is not UTF-8 or holds control characters.
    #[error("the text is not plain UTF-8")]
    Text,
}

/// The length of the frame that `prefix` announces, if it is within `max` bytes.
pub(super) fn announced(prefix: [u8; 4], max: usize) -> Result<usize, FrameError> {
    // A u32 fits every usize that this runs on; where it did not, the bound would say no.
    let len = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if len > max { Err(FrameError::TooLong { len, max }) } else { Ok(len) }
}

impl Request {
    /// The whole frame, its length included.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, FrameError> {
        match self {
            Self::Get(Get { root, size, ranges }) => {
                let count = u16::try_from(ranges.len()).ok().filter(|n| *n <= MAX_RANGES as u16);
                let count = count.ok_or(FrameError::TooLong {
                    len: ranges.len().saturating_mul(16),
                    max: MAX_RANGES * 16,
                })?;
                let mut body = Vec::with_capacity(43 + 16 * ranges.len());
                body.push(GET);
                body.extend_from_slice(root.as_bytes());
                body.extend_from_slice(&size.to_le_bytes());
                body.extend_from_slice(&count.to_le_bytes());
                for range in ranges {
                    body.extend_from_slice(&range.start.to_le_bytes());
                    body.extend_from_slice(&range.end.to_le_bytes());
                }
                framed(&body, MAX_REQUEST)
            }
            Self::Open(Open { channel, body }) => {
                let mut frame = Vec::with_capacity(2 + body.len().min(MAX_BODY));
                if body.len() > MAX_BODY {
                    return Err(FrameError::TooLong { len: body.len(), max: MAX_BODY });
                }
                frame.push(OPEN);
                frame.push(*channel);
                frame.extend_from_slice(body);
                framed(&frame, MAX_REQUEST)
            }
            Self::Have(Have { root, size }) => {
                let mut body = Vec::with_capacity(41);
                body.push(HAVE);
                body.extend_from_slice(root.as_bytes());
                body.extend_from_slice(&size.to_le_bytes());
                framed(&body, MAX_REQUEST)
            }
        }
    }

    /// Decodes a frame without its length.
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, FrameError> {
        let mut rest = Fields(frame);
        match rest.u8()? {
            GET => {
                let root = Root::from_bytes(rest.take()?);
                let size = rest.u64()?;
                let count = usize::from(u16::from_le_bytes(rest.take()?));
                if count > MAX_RANGES {
                    return Err(FrameError::TooLong { len: count * 16, max: MAX_RANGES * 16 });
                }
                let mut ranges = Vec::with_capacity(count);
                for _ in 0..count {
                    ranges.push(rest.u64()?..rest.u64()?);
                }
                rest.end()?;
                if !well_formed(&ranges, size) {
                    return Err(FrameError::Ranges);
                }
                Ok(Self::Get(Get { root, size, ranges }))
            }
            OPEN => {
                let channel = rest.u8()?;
                let body = rest.0;
                if body.len() > MAX_BODY {
                    return Err(FrameError::TooLong { len: body.len(), max: MAX_BODY });
                }
                Ok(Self::Open(Open { channel, body: body.to_vec() }))
            }
            HAVE => {
                let (root, size) = (Root::from_bytes(rest.take()?), rest.u64()?);
                rest.end()?;
                Ok(Self::Have(Have { root, size }))
            }
            kind => Err(FrameError::Unknown(kind)),
        }
    }
}

/// Frames that tell of `groups`, their lengths included. Groups are numbered with 32 bits, which is
/// a payload of 1 PiB; what lies behind is not told of.
pub(crate) fn told(groups: &Groups) -> Result<Vec<u8>, FrameError> {
    let numbered = |run: Range<u64>| {
        let end = u32::try_from(run.end).unwrap_or(u32::MAX);
        Some((u32::try_from(run.start).ok()?, end))
    };
    let runs: Vec<_> = groups.runs().filter_map(numbered).collect();
    let mut frames = Vec::with_capacity(4 + 8 * runs.len());
    for some in runs.chunks(MAX_TOLD) {
        let mut body = Vec::with_capacity(8 * some.len());
        for (start, end) in some {
            body.extend_from_slice(&start.to_le_bytes());
            body.extend_from_slice(&end.to_le_bytes());
        }
        frames.extend_from_slice(&framed(&body, MAX_TOLD_BYTES)?);
    }
    Ok(frames)
}

/// The runs that a frame tells of, without its length: ascending, apart from each other, and among
/// the `groups` that the payload has.
pub(crate) fn heard(frame: &[u8], groups: u64) -> Result<Vec<Range<u64>>, FrameError> {
    let mut rest = Fields(frame);
    let mut runs = Vec::with_capacity((frame.len() / 8).min(MAX_TOLD));
    let mut free_from = 0;
    while !rest.0.is_empty() {
        let run = u64::from(rest.u32()?)..u64::from(rest.u32()?);
        let apart = runs.is_empty() || run.start > free_from;
        if run.start >= run.end || run.end > groups || !apart {
            return Err(FrameError::Ranges);
        }
        free_from = run.end;
        runs.push(run);
    }
    if runs.is_empty() { Err(FrameError::Short) } else { Ok(runs) }
}

impl Response {
    /// The whole frame, its length included. A detail over [`MAX_DETAIL`] is cut.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let mut body = Vec::with_capacity(9);
        match self {
            Self::Ready { size } => {
                body.push(READY);
                body.extend_from_slice(&size.to_le_bytes());
            }
            Self::Refused(Refused { why, figure, detail }) => {
                body.push(*why as u8);
                body.extend_from_slice(&figure.to_le_bytes());
                let plain: String = detail.chars().filter(|c| !c.is_control()).collect();
                let cut = plain.floor_char_boundary(MAX_DETAIL);
                body.extend(plain.bytes().take(cut));
            }
        }
        framed(&body, MAX_RESPONSE)
    }

    /// Decodes a frame without its length.
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, FrameError> {
        let mut rest = Fields(frame);
        let kind = rest.u8()?;
        let figure = rest.u64()?;
        if kind == READY {
            rest.end()?;
            return Ok(Self::Ready { size: figure });
        }
        let why = Refusal::from_byte(kind).ok_or(FrameError::Unknown(kind))?;
        let text = rest.0;
        if text.len() > MAX_DETAIL {
            return Err(FrameError::TooLong { len: text.len(), max: MAX_DETAIL });
        }
        let detail = std::str::from_utf8(text).map_err(|_| FrameError::Text)?;
        if detail.chars().any(char::is_control) {
            return Err(FrameError::Text);
        }
        Ok(Self::Refused(Refused { why, figure, detail: detail.to_owned() }))
    }
}

/// Whether ranges are ascending, apart, not empty, within `size` and on group boundaries. Groups
/// are the unit of hashing: a part of one would cost the holder a hash of all of it.
pub(super) fn well_formed(ranges: &[Range<u64>], size: u64) -> bool {
    let mut free_from = 0;
    ranges.iter().enumerate().all(|(i, range)| {
        let starts_well = range.start % GROUP_BYTES == 0 && (i == 0 || range.start > free_from);
        let ends_well = range.end == size || (range.end < size && range.end % GROUP_BYTES == 0);
        free_from = range.end;
        starts_well && ends_well && range.start < range.end
    })
}

fn framed(body: &[u8], max: usize) -> Result<Vec<u8>, FrameError> {
    let too_long = FrameError::TooLong { len: body.len(), max };
    let len = u32::try_from(body.len()).ok().filter(|_| body.len() <= max).ok_or(too_long)?;
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(body);
    Ok(frame)
}

/// The fields of a frame that are not read yet.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(FrameError::Short)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u8(&mut self) -> Result<u8, FrameError> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        self.take().map(u64::from_le_bytes)
    }

    fn end(&self) -> Result<(), FrameError> {
        if self.0.is_empty() { Ok(()) } else { Err(FrameError::Trailing(self.0.len())) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(frame: &[u8]) -> Result<Request, FrameError> {
        let (prefix, body) = frame.split_first_chunk::<4>().expect("a prefix");
        assert_eq!(announced(*prefix, MAX_REQUEST).expect("within the bound"), body.len());
        Request::decode(body)
    }

    #[test]
    fn a_get_is_these_bytes() {
        let get = Request::Get(Get {
            root: Root::from_bytes([0xab; 32]),
            size: 0x0006_0001,
            ranges: vec![0..0x4_0000, 0x4_0000 + 0x4_0000..0x0006_0001 + 0x4_0000],
        });
        // The second range is only there to pin the layout; it is not well formed.
        let mut golden = vec![75, 0, 0, 0, 1];
        golden.extend([0xab; 32]);
        golden.extend([1, 0, 6, 0, 0, 0, 0, 0, 2, 0]);
        golden.extend([0; 8]);
        golden.extend([0, 0, 4, 0, 0, 0, 0, 0]);
        golden.extend([0, 0, 8, 0, 0, 0, 0, 0]);
        golden.extend([1, 0, 10, 0, 0, 0, 0, 0]);
        assert_eq!(get.encode().expect("encodes"), golden);
        assert_eq!(decoded(&golden), Err(FrameError::Ranges));
    }

    #[test]
    fn an_open_and_the_responses_are_these_bytes() {
        let open = Request::Open(Open { channel: 7, body: b"job".to_vec() });
        assert_eq!(open.encode().expect("encodes"), [5, 0, 0, 0, 2, 7, b'j', b'o', b'b']);
        let ready = Response::Ready { size: 258 };
        assert_eq!(ready.encode().expect("encodes"), [9, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
        let refused =
            Response::Refused(Refused { why: Refusal::WrongSize, figure: 3, detail: "no".into() });
        let golden = [11, 0, 0, 0, 2, 3, 0, 0, 0, 0, 0, 0, 0, b'n', b'o'];
        assert_eq!(refused.encode().expect("encodes"), golden);
        assert_eq!(Response::decode(&golden[4..]), Ok(refused));
    }

    #[test]
    fn a_have_and_what_it_is_told_are_these_bytes() {
        let have = Request::Have(Have { root: Root::from_bytes([0xcd; 32]), size: 258 });
        let mut golden = vec![41, 0, 0, 0, 3];
        golden.extend([0xcd; 32]);
        golden.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(have.encode().expect("encodes"), golden);
        assert_eq!(decoded(&golden), Ok(have));

        let groups: Groups = [0..3, 256..257].into_iter().collect();
        let golden = [16, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0];
        assert_eq!(told(&groups).expect("encodes"), golden);
        assert_eq!(heard(&golden[4..], 257), Ok(vec![0..3, 256..257]));
        assert_eq!(heard(&golden[4..], 256), Err(FrameError::Ranges));
        assert_eq!(heard(&golden[4..19], 257), Err(FrameError::Short));
        assert_eq!(heard(&[], 257), Err(FrameError::Short));
        for (first, second) in
            [((3, 3), (5, 6)), ((0, 3), (3, 4)), ((5, 6), (0, 1)), ((4, 3), (5, 6))]
        {
            let numbers: [u32; 4] = [first.0, first.1, second.0, second.1];
            let frame: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            assert_eq!(heard(&frame, 257), Err(FrameError::Ranges), "{first:?} {second:?}");
        }
        // More than one frame holds.
        let many: Groups = (0..MAX_TOLD as u64 + 1).map(|n| 2 * n..2 * n + 1).collect();
        let frames = told(&many).expect("encodes");
        assert_eq!(frames.len(), 4 + MAX_TOLD_BYTES + 4 + 8);
        let mut all = heard(&frames[4..4 + MAX_TOLD_BYTES], u64::MAX).expect("decodes");
        all.extend(heard(&frames[8 + MAX_TOLD_BYTES..], u64::MAX).expect("decodes"));
        assert_eq!(all.into_iter().collect::<Groups>(), many);
    }

    #[test]
    fn bounds_hold_before_anything_is_allocated() {
        assert_eq!(
            announced(u32::MAX.to_le_bytes(), MAX_REQUEST),
            Err(FrameError::TooLong { len: 0xffff_ffff, max: MAX_REQUEST })
        );
        assert_eq!(announced([2, 0, 1, 0], MAX_REQUEST), Ok(MAX_REQUEST));
        let open = Request::Open(Open { channel: 0, body: vec![0; MAX_BODY + 1] });
        assert!(matches!(open.encode(), Err(FrameError::TooLong { .. })));
        let root = Root::from_bytes([0; 32]);
        let ranges = vec![0..1; MAX_RANGES + 1];
        let get = Request::Get(Get { root, size: 1, ranges });
        assert!(matches!(get.encode(), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn broken_frames_are_named() {
        let whole = Request::Get(Get { root: Root::from_bytes([1; 32]), size: 9, ranges: vec![] });
        let frame = whole.encode().expect("encodes");
        let body = &frame[4..];
        for end in 0..body.len() {
            assert_eq!(Request::decode(&body[..end]), Err(FrameError::Short), "cut at {end}");
        }
        let mut longer = body.to_vec();
        longer.push(0);
        assert_eq!(Request::decode(&longer), Err(FrameError::Trailing(1)));
        assert_eq!(Request::decode(&[9]), Err(FrameError::Unknown(9)));
        assert_eq!(Response::decode(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), Err(FrameError::Trailing(1)));
        assert_eq!(Response::decode(&[99, 0, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::Unknown(99)));
        let bell = [1, 0, 0, 0, 0, 0, 0, 0, 0, 7];
        assert_eq!(Response::decode(&bell), Err(FrameError::Text));
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "one range is what is meant")]
    fn ranges_that_no_holder_should_serve() {
        const G: u64 = GROUP_BYTES;
        let size = 3 * G + 5;
        let good: [&[Range<u64>]; 4] = [&[], &[0..size], &[0..G, 2 * G..size], &[3 * G..size]];
        let backwards = Range { start: 2 * G, end: G };
        let bad: [&[Range<u64>]; 8] = [
            &[1..G],
            &[0..G - 1],
            &[0..0],
            &[0..size + 1],
            &[backwards],
            &[0..G, G..2 * G],
            &[0..2 * G, G..size],
            &[2 * G..size, 0..G],
        ];
        for ranges in good {
            assert!(well_formed(ranges, size), "{ranges:?}");
        }
        for ranges in bad {
            assert!(!well_formed(ranges, size), "{ranges:?}");
        }
        assert!(!well_formed(std::slice::from_ref(&(0..0)), 0));
    }

    proptest! {
        /// Whatever comes, decoding ends in a value or a named error, and what was decoded
        /// encodes to the same bytes: no two frames mean the same.
        #[test]
        fn decoding_never_panics_and_is_canonical(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            kind in 0u8..4,
        ) {
            let mut request = bytes.clone();
            request.insert(0, kind);
            if let Ok(value) = Request::decode(&request) {
                let encoded = value.encode().expect("what decodes also encodes");
                prop_assert_eq!(&encoded[4..], &request[..]);
            }
            if let Ok(runs) = heard(&bytes, u64::MAX) {
                let encoded = told(&runs.into_iter().collect()).expect("what decodes also encodes");
                prop_assert_eq!(&encoded[4..], &bytes[..]);
            }
            if let Ok(value) = Response::decode(&request) {
                let encoded = value.encode().expect("what decodes also encodes");
                prop_assert_eq!(&encoded[4..], &request[..]);
            }
        }

        #[test]
        fn requests_round_trip(
            root in any::<[u8; 32]>(),
            tail in 1u64..GROUP_BYTES,
            starts in proptest::collection::btree_set(0u64..100, 0..20),
            channel in any::<u8>(),
            body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            // Every other group at most, so that no two ranges touch.
            let ranges = starts.iter()
                .map(|s| s * 2 * GROUP_BYTES..(s * 2 + 1) * GROUP_BYTES).collect();
            let size = 200 * GROUP_BYTES + tail;
            let get = Request::Get(Get { root: Root::from_bytes(root), size, ranges });
            prop_assert_eq!(decoded(&get.encode().expect("encodes")), Ok(get));
            let open = Request::Open(Open { channel, body });
            prop_assert_eq!(decoded(&open.encode().expect("encodes")), Ok(open));
        }
    }
}
