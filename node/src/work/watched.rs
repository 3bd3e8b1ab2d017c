//! A warden as this node watches it: its own child, or the child of an earlier run, which only a
//! pidfd tells about.
//!
//! A pidfd becomes readable when its process ends (pidfd_open(2)), so nobody has to ask again and
//! again whether it has. What a process of others ended with, nobody can know; the job's status
//! says it.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;
use tokio::time::sleep;

use super::POLL;
use super::process::Process;

/// A warden that this node waits for.
#[derive(Debug)]
pub(super) enum Watched {
    /// This run of the node started it.
    Child(Child),
    /// An earlier run did.
    Adopted(Process, AsyncFd<OwnedFd>),
}

impl Watched {
    /// Watches a warden that an earlier run started; none if it is gone. To be called within the
    /// runtime.
    #[allow(unsafe_code)]
    pub(super) fn adopted(warden: Process) -> io::Result<Option<Self>> {
        let Some(fd) = warden.pidfd()? else { return Ok(None) };
        // SAFETY: an `OwnedFd` names one open descriptor for as long as it lives, and it lives in
        // the `AsyncFd`, which nothing takes it out of again.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Some(Self::Adopted(warden, fd)))
    }

    /// Waits until it has ended. Given up half-way, nothing is lost.
    pub(super) async fn gone(&mut self) {
        match self {
            // An error says that there is no such child any more.
            Self::Child(child) => drop(child.wait().await),
            // Never marked as not ready again: a process that has ended stays so.
            Self::Adopted(warden, fd) => {
                if fd.readable().await.is_err() {
                    // Nobody tells us any more. A warden that lives must not be taken for gone.
                    while warden.alive() {
                        sleep(POLL).await;
                    }
                }
            }
        }
    }

    /// Kills it, if it is still there.
    pub(super) fn kill(&mut self) {
        let killed = match self {
            Self::Child(child) => child.start_kill(),
            Self::Adopted(warden, _) => warden.kill(),
        };
        if let Err(error) = killed {
            tracing::error!(%error, "a warden cannot be killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn the_end_of_a_process_of_others_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let process = Process::of(i32::try_from(child.id()).expect("a pid")).expect("alive");
        let stranger = Process { start: process.start + 1, ..process };
        assert!(Watched::adopted(stranger).expect("asked").is_none(), "a recycled pid is watched");
        let mut watched = Watched::adopted(process).expect("asked").expect("alive");
        let early = tokio::time::timeout(Duration::ZERO, watched.gone()).await;
        assert!(early.is_err(), "it is said to be gone, and lives");
        watched.kill();
        // Nobody has reaped it yet: what has ended has ended.
        for _ in 0..2 {
            let gone = tokio::time::timeout(Duration::from_secs(60), watched.gone()).await;
            gone.expect("in time");
        }
        assert!(!process.alive());
        child.wait().expect("reaped");
        assert!(Watched::adopted(process).expect("asked").is_none());
    }
}
