//! Being asked to stop: Ctrl-C, SIGTERM, or the terminal that goes away.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Hears when this process is asked to stop. From [`Stop::listen`] on these signals do not end the
/// process by themselves, so that what it started can be ended in order.
#[derive(Debug)]
pub struct Stop {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Stop {
    /// Starts to listen.
    ///
    /// # Errors
    /// When the system does not let this process.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits until it is asked to stop.
    pub async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
