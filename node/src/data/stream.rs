//! The two halves of a stream, as the rest of the node sees them, and the pace that a stream has
//! to keep.

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use quinn::VarInt;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, timeout},
};

use super::{
    dial::InUse,
    frame::{Code, FrameError, announced},
};

/// The sending half of a stream. It ends well only by [`SendHalf::finish`] or a shutdown: one
/// that is dropped half-way is reset, so that the other side never takes a torn end for the end.
pub struct SendHalf {
    pub(super) stream: quinn::SendStream,
    finished: bool,
    _in_use: Option<InUse>,
}

impl SendHalf {
    pub(super) fn new(stream: quinn::SendStream, in_use: Option<InUse>) -> Self {
        Self { stream, finished: false, _in_use: in_use }
    }

    /// Says that nothing more comes. What was written is still delivered.
    pub fn finish(&mut self) {
        self.finished = true;
        // Fails only where the stream is already over, one way or the other.
        let _ = self.stream.finish();
    }

    /// Resolves when the receiver wants nothing more, or the connection is gone.
    pub fn unwanted(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.stream.stopped();
        async move {
            let _ = stopped.await;
        }
    }

    /// Gives the stream up; what was not delivered yet may never be.
    pub fn reset(&mut self, code: Code) {
        self.finished = true;
        let _ = self.stream.reset(VarInt::from_u32(code as u32));
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        if !self.finished {
            self.reset(Code::Cancelled);
        }
    }
}

impl fmt::Debug for SendHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendHalf").field("finished", &self.finished).finish_non_exhaustive()
    }
}

impl AsyncWrite for SendHalf {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.get_mut().stream), cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.get_mut().stream), cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().finish();
        Poll::Ready(Ok(()))
    }
}

/// The receiving half of a stream. A stream that its sender gave up ends in an error of kind
/// [`io::ErrorKind::ConnectionReset`], never in a clean end.
pub struct RecvHalf {
    pub(super) stream: quinn::RecvStream,
    _in_use: Option<InUse>,
}

impl RecvHalf {
    pub(super) fn new(stream: quinn::RecvStream, in_use: Option<InUse>) -> Self {
        Self { stream, _in_use: in_use }
    }

    /// Tells the sender that nothing more is wanted.
    pub fn stop(&mut self, code: Code) {
        let _ = self.stream.stop(VarInt::from_u32(code as u32));
    }
}

impl fmt::Debug for RecvHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvHalf").finish_non_exhaustive()
    }
}

impl AsyncRead for RecvHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.get_mut().stream), cx, buffer)
    }
}

/// Why a frame could not be read.
#[derive(Debug, Error)]
pub(super) enum FrameReadError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the stream ended inside a frame")]
    Ended,
    #[error(transparent)]
    Read(#[from] quinn::ReadError),
}

/// Reads one frame of at most `max` bytes, without its length.
pub(super) async fn read_frame(
    stream: &mut quinn::RecvStream,
    max: usize,
) -> Result<Vec<u8>, FrameReadError> {
    let mut prefix = [0; 4];
    read_exact(stream, &mut prefix).await?;
    let mut frame = vec![0; announced(prefix, max)?];
    read_exact(stream, &mut frame).await?;
    Ok(frame)
}

async fn read_exact(
    stream: &mut quinn::RecvStream,
    buffer: &mut [u8],
) -> Result<(), FrameReadError> {
    stream.read_exact(buffer).await.map_err(|e| match e {
        quinn::ReadExactError::FinishedEarly(_) => FrameReadError::Ended,
        quinn::ReadExactError::ReadError(e) => FrameReadError::Read(e),
    })
}

/// Too little moved for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stalled;

/// Watches that a stream keeps moving: of every `window` of waiting for the other side, at least
/// `least` bytes must have come. Time spent elsewhere, such as on our own disk, does not count.
#[derive(Debug)]
pub(super) struct Pace {
    window: Duration,
    least: u64,
    waited: Duration,
    moved: u64,
}

impl Pace {
    /// At least `rate` bytes a second, and one byte, in every `window`.
    pub(super) fn new(window: Duration, rate: u64) -> Self {
        let least = rate.saturating_mul(window.as_secs()).max(1);
        Self { window, least, waited: Duration::ZERO, moved: 0 }
    }

    /// Waits for `step`, which moves bytes between us and the other side.
    pub(super) async fn during<T>(&mut self, step: impl Future<Output = T>) -> Result<T, Stalled> {
        let mut step = std::pin::pin!(step);
        loop {
            self.check()?;
            let start = Instant::now();
            let done = timeout(self.window - self.waited, step.as_mut()).await;
            self.waited += start.elapsed();
            if let Ok(done) = done {
                return Ok(done);
            }
            // A timer may fire a little early by the other clock: the window is over.
            self.waited = self.waited.max(self.window);
        }
    }

    /// Judges the window if it is over, and begins the next.
    fn check(&mut self) -> Result<(), Stalled> {
        if self.waited < self.window {
            return Ok(());
        }
        if self.moved < self.least {
            return Err(Stalled);
        }
        self.waited = Duration::ZERO;
        self.moved = 0;
        Ok(())
    }

    pub(super) fn moved(&mut self, bytes: u64) {
        self.moved = self.moved.saturating_add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn nothing_for_a_window_is_a_stall() {
        let mut pace = Pace::new(Duration::from_millis(20), 0);
        assert_eq!(pace.during(ready(1)).await, Ok(1));
        assert_eq!(pace.during(pending::<()>()).await, Err(Stalled));
    }

    #[test]
    fn a_trickle_under_the_rate_is_a_stall_and_one_over_it_is_not() {
        for (step, stalls) in [(0, true), (99, true), (100, false), (101, false)] {
            let mut pace = Pace::new(Duration::from_secs(10), 100);
            let mut keeps = true;
            for _ in 0..100 {
                keeps &= pace.check().is_ok();
                pace.waited += Duration::from_secs(1);
                pace.moved(step);
            }
            assert_eq!(keeps, !stalls, "{step} bytes a second");
        }
    }

    #[tokio::test]
    async fn our_own_slowness_is_not_the_peers() {
        let mut pace = Pace::new(Duration::from_millis(20), 0);
        for _ in 0..3 {
            // Long past the window, but not waiting for the peer.
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(pace.during(ready(())).await, Ok(()));
        }
    }
}
