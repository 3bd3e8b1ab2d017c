//! Frames on a stream: one request one way, one response the other way, then the end.
//!
//! ```text
//!   stream, each direction:   length: u32 LE | length bytes | end of stream
//! ```
//! The length is checked before a byte is allocated for it, and the buffer grows with the bytes
//! that really come: a peer that announces much and sends little costs little. Bytes after the
//! frame are a broken rule. A stream that ends inside a frame is not: quinn ends a stream that
//! is dropped half-written in the same way.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{StreamProtocol, request_response};

use super::{
    Violation,
    stats::count,
    terms::{Hold, Terms},
};

/// The one protocol, its version included.
pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/leasehold/1");

/// What is allocated for a frame before its bytes are there.
const FIRST_READ: usize = 16 * 1024;

/// Frames up to this size are copied behind their length and written at once.
const JOINED_WRITE: usize = 16 * 1024;

/// Opaque bytes on their way between the wire and the loop.
#[derive(Debug)]
pub(super) struct Frame {
    bytes: Vec<u8>,
    /// The place in the budgets of a frame that was read; `None` for one to be written.
    hold: Option<Hold>,
}

impl Frame {
    pub(super) fn outgoing(bytes: Vec<u8>) -> Self {
        Self { bytes, hold: None }
    }

    /// The bytes; their place in the budgets is free again.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        drop(self.hold);
        self.bytes
    }
}

/// Where `Frames` lays the terms of the connection that is being set up.
pub(super) type Seat = Arc<Mutex<Option<Arc<Terms>>>>;

/// Reads and writes frames on the terms of one peer.
///
/// request-response knows no codec per connection: it clones the behaviour's codec while a
/// connection is set up, and that clone for each stream. So the behaviour's codec is a template
/// whose clone takes the terms that lie in the seat at that moment. A clone made while the seat
/// is empty has no terms and reads nothing: should the library ever clone at another moment, all
/// frames fail rather than some being read on a stranger's terms.
#[derive(Debug)]
pub(super) enum FrameCodec {
    Template(Seat),
    Bound(Arc<Terms>),
}

impl Clone for FrameCodec {
    fn clone(&self) -> Self {
        match self {
            Self::Bound(terms) => Self::Bound(Arc::clone(terms)),
            Self::Template(seat) => match &*seat.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(terms) => Self::Bound(Arc::clone(terms)),
                None => Self::Template(Arc::clone(seat)),
            },
        }
    }
}

impl FrameCodec {
    fn terms(&self) -> io::Result<&Arc<Terms>> {
        match self {
            Self::Bound(terms) => Ok(terms),
            Self::Template(_) => Err(io::Error::other("this stream belongs to no known peer")),
        }
    }
}

impl request_response::Codec for FrameCodec {
    type Protocol = StreamProtocol;
    type Request = Frame;
    type Response = Frame;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Frame>
    where
        T: AsyncRead + Unpin + Send,
    {
        let terms = self.terms()?;
        terms.request().await;
        read(io, terms).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Frame>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io, self.terms()?).await
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        frame: Frame,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &frame.bytes, self.terms()?).await
    }

    async fn write_response<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        frame: Frame,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &frame.bytes, self.terms()?).await
    }
}

/// Reads one frame and the end of the stream behind it.
async fn read<T>(io: &mut T, terms: &Arc<Terms>) -> io::Result<Frame>
where
    T: AsyncRead + Unpin + Send,
{
    let mut prefix = [0; 4];
    io.read_exact(&mut prefix).await?;
    let length = u32::from_le_bytes(prefix) as usize;
    terms.frame(length).await.map_err(broken)?;
    let Some(hold) = terms.hold(length) else {
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "too many bytes wait for this node's loop",
        ));
    };
    // One byte more than the frame is asked for: only the end of the stream may come there, and
    // with room for it kept the buffer is never grown just to see the end.
    let mut bytes = Vec::with_capacity(length.min(FIRST_READ) + 1);
    io.take(length as u64 + 1).read_to_end(&mut bytes).await?;
    if bytes.len() > length {
        return Err(broken(terms.violation(Violation::Trailing)));
    }
    if bytes.len() < length {
        count(&terms.stats().truncated);
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the stream ended inside a frame",
        ));
    }
    terms.stats().read(length);
    Ok(Frame { bytes, hold: Some(hold) })
}

async fn write<T>(io: &mut T, bytes: &[u8], terms: &Terms) -> io::Result<()>
where
    T: AsyncWrite + Unpin + Send,
{
    let length = u32::try_from(bytes.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a frame above 4 GiB"))?
        .to_le_bytes();
    if bytes.len() <= JOINED_WRITE {
        let mut joined = Vec::with_capacity(length.len() + bytes.len());
        joined.extend_from_slice(&length);
        joined.extend_from_slice(bytes);
        io.write_all(&joined).await?;
    } else {
        io.write_all(&length).await?;
        io.write_all(bytes).await?;
    }
    terms.stats().wrote(bytes.len());
    Ok(())
}

fn broken(violation: Violation) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, violation)
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use libp2p::PeerId;
    use proptest::prelude::*;

    use super::*;
    use crate::net::{Limits, NetStats, terms::Shared};

    /// Reads `bytes` as a stream, on the terms of an admitted peer.
    fn read_from(bytes: &[u8], limits: Limits) -> (io::Result<Vec<u8>>, Arc<NetStats>) {
        let stats = Arc::new(NetStats::default());
        let (shared, _told) = Shared::new(limits, Arc::clone(&stats));
        let terms = Terms::new(PeerId::random(), shared);
        terms.admit();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let frame = runtime.block_on(read(&mut Cursor::new(bytes), &terms));
        (frame.map(Frame::into_bytes), stats)
    }

    fn write_out(bytes: &[u8]) -> Vec<u8> {
        let (shared, _told) = Shared::new(Limits::default(), Arc::default());
        let terms = Terms::new(PeerId::random(), shared);
        let mut wire = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(write(&mut wire, bytes, &terms)).unwrap();
        wire
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(write_out(b"abc"), [3, 0, 0, 0, b'a', b'b', b'c']);
        assert_eq!(write_out(b""), [0, 0, 0, 0]);
        assert_eq!(PROTOCOL.as_ref(), "/leasehold/1");
    }

    #[test]
    fn frames_around_the_buffers_sizes_come_back_whole() {
        for length in [0, 1, FIRST_READ - 1, FIRST_READ, FIRST_READ + 1, 100_000, 256 * 1024] {
            let bytes: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let (read, stats) = read_from(&write_out(&bytes), Limits::default());
            assert_eq!(read.unwrap(), bytes);
            assert_eq!(stats.snapshot().bytes_in, length as u64);
        }
    }

    #[test]
    fn a_codec_without_terms_reads_nothing() {
        let template = FrameCodec::Template(Seat::default());
        assert!(template.clone().terms().is_err());
        let (shared, _told) = Shared::new(Limits::default(), Arc::default());
        let terms = Terms::new(PeerId::random(), shared);
        let seat = Seat::new(Mutex::new(Some(terms)));
        let bound = FrameCodec::Template(Arc::clone(&seat)).clone();
        *seat.lock().unwrap() = None;
        assert!(bound.terms().is_ok(), "the terms of the moment of the clone");
        assert!(bound.clone().terms().is_ok());
    }

    proptest! {
        /// Whatever comes, exactly the bytes of one whole frame are taken, or nothing.
        #[test]
        fn any_bytes_are_a_frame_or_refused(
            length in prop_oneof![0..40u32, any::<u32>()],
            bytes in proptest::collection::vec(any::<u8>(), 0..40),
            cut in 0..44usize,
        ) {
            let wire: Vec<u8> = length.to_le_bytes().into_iter().chain(bytes.clone()).collect();
            let wire = &wire[..wire.len().min(cut)];
            let limits = Limits { frame_admitted: 30, ..Limits::default() };
            let (read, stats) = read_from(wire, limits);
            let counts = stats.snapshot();
            let body = wire.get(4..);
            match read {
                Ok(frame) => {
                    prop_assert_eq!(Some(&frame[..]), body);
                    prop_assert_eq!(frame.len(), length as usize);
                    prop_assert!(length <= 30);
                    prop_assert_eq!(counts.frames_in, 1);
                }
                Err(_) => {
                    let whole = body.is_some_and(|body| body.len() == length as usize);
                    prop_assert!(!whole || length > 30);
                    prop_assert_eq!(counts.frames_in, 0);
                    prop_assert_eq!(counts.oversize == 1, body.is_some() && length > 30);
                }
            }
        }
    }
}
