//! What a node does at its start with the jobs of an earlier run: it takes running ones back, and
//! ends and reaps the others.
//!
//! ```text
//!   orphan --- its warden lives, the node wants it, the warden answers ---> a job like any other
//!      |
//!      +------ anything else ---> buried: its processes gone, its cgroup removed ---> has ended
//! ```
//!
//! A job taken back has what a job of this run has: its warden is watched (module `watched`), its
//! status is followed, its end is told once.

use std::io;
use std::path::{Path, PathBuf};

use futures::future::join_all;
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::spec::{JobFile, Outcome, State, Status, Usage, file, read_json};
use super::watched::Watched;
use super::{
    Following, Job, OpenError, Orphan, POLL, WARDEN_ANSWERS, Work, bury, disk, follow, hold, knock,
    lost,
};

/// How many orphans are buried at once: each takes a thread while it waits for processes to end.
const BURIED_AT_ONCE: usize = 32;

/// What became of the orphans, each list in the order of the leases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Jobs that go on, as their wardens say they stand.
    pub running: Vec<Status>,
    /// Jobs that have ended, by themselves or now.
    pub reaped: Vec<Reaped>,
}

/// What is left of an orphan once it is reaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reaped {
    /// The lease.
    pub lease: String,
    /// How it ended: as its warden said, or [`Outcome::Lost`] if it had to be killed.
    pub outcome: Outcome,
    /// What it used, up to the last thing known.
    pub usage: Usage,
}

/// What one orphan has become.
enum Became {
    Running(Box<Status>),
    Reaped(Reaped),
    /// Nothing: no warden had taken it up, and its directory is gone.
    Nothing,
}

impl Work {
    /// Takes those orphans back whose warden lives and which `keep` wants, and ends all others.
    ///
    /// One taken back is a job as if this run had started it: it can be asked and told the same,
    /// and there will be one [`WorkEvent::Ended`](super::WorkEvent::Ended). That it has started is
    /// not told again; one that had not yet, still tells. A warden that does not answer within
    /// some seconds is ended like the others: of these, the processes are gone and the cgroups
    /// removed when this returns, and each is a job that has ended: its output can be read, and it
    /// waits to be forgotten.
    ///
    /// All wardens are asked at once. `keep` is called in the order of the leases, once for each
    /// orphan with a live warden, before any is taken back or ended.
    ///
    /// # Errors
    /// Where one cannot be ended. Those that were taken back or ended by then are jobs already, and
    /// a second call does the rest.
    pub async fn adopt(&self, keep: impl Fn(&Orphan) -> bool + Send) -> Result<Adopted, OpenError> {
        // Two at once would follow one job twice.
        let _alone = self.inner.adopting.lock().await;
        let (wanted, unwanted): (Vec<Orphan>, Vec<Orphan>) =
            self.orphans().into_iter().partition(|orphan| orphan.live && keep(orphan));
        let burying = Semaphore::new(BURIED_AT_ONCE);
        let taking = wanted.into_iter().map(|orphan| (orphan, true));
        let ending = unwanted.into_iter().map(|orphan| (orphan, false));
        let all = taking.chain(ending).map(|(orphan, wanted)| {
            let burying = &burying;
            async move {
                if wanted && let Some(status) = self.take_back(&orphan).await {
                    return Ok(Became::Running(Box::new(status)));
                }
                // Never closed, so always granted.
                let _turn = burying.acquire().await;
                self.reap(orphan.lease, orphan.dir).await
            }
        });
        let mut adopted = Adopted::default();
        for became in join_all(all).await {
            match became? {
                Became::Running(status) => adopted.running.push(*status),
                Became::Reaped(reaped) => adopted.reaped.push(reaped),
                Became::Nothing => {}
            }
        }
        adopted.reaped.sort_by(|a, b| a.lease.cmp(&b.lease));
        Ok(adopted)
    }

    /// Ends all orphans: [`Work::adopt`] where none is wanted.
    pub async fn reap_orphans(&self) -> Result<Vec<Reaped>, OpenError> {
        Ok(self.adopt(|_| false).await?.reaped)
    }

    /// Makes an orphan a job of this run. None if it has ended, or its warden does not answer.
    async fn take_back(&self, orphan: &Orphan) -> Option<Status> {
        let (grace_ms, warden, stream, status) = match regain(orphan).await {
            Ok(regained) => regained?,
            Err(error) => {
                let lease = &orphan.lease;
                tracing::warn!(%lease, %error, "a job cannot be taken back and is ended");
                return None;
            }
        };
        let (show, view) = watch::channel(status.clone());
        let (lease, dir) = (orphan.lease.clone(), orphan.dir.clone());
        let job = Job { dir: dir.clone(), view, _lock: None };
        let started = status.state == State::Running;
        // Nothing is awaited between these, so none is done without the others.
        hold(&self.inner.jobs).insert(lease.clone(), job);
        hold(&self.inner.orphans).remove(&lease);
        let following = Following { dir, grace_ms, warden, show, started };
        tokio::spawn(follow(self.clone(), following, stream));
        Some(status)
    }

    /// Buries an orphan and makes it a job that has ended. One that no warden had taken up never
    /// was a job: its directory goes, and it can be started.
    async fn reap(&self, lease: String, dir: PathBuf) -> Result<Became, OpenError> {
        let at = dir.clone();
        let bury = move || {
            // A warden says who it is before it runs anything.
            let untouched = !at.join(file::STATUS).try_exists()?;
            let (status, lock) = bury(&at)?;
            let nothing = untouched && status.warden.pid == 0;
            if nothing {
                // While the lock is held: a late warden finds no job here any more.
                disk::clear(&at)?;
            }
            Ok((status, lock, nothing))
        };
        let buried = tokio::task::spawn_blocking(bury)
            .await
            .map_err(io::Error::other)
            .and_then(|buried: io::Result<_>| buried);
        let (status, lock, nothing) =
            buried.map_err(|source| OpenError { path: dir.clone(), source })?;
        if nothing {
            hold(&self.inner.orphans).remove(&lease);
            return Ok(Became::Nothing);
        }
        let outcome = status.outcome.clone().unwrap_or_else(lost);
        let reaped = Reaped { lease: lease.clone(), outcome, usage: status.usage };
        self.keep_ended(lease.clone(), dir, status, lock);
        hold(&self.inner.orphans).remove(&lease);
        Ok(Became::Reaped(reaped))
    }
}

type Regained = (u64, Watched, BufReader<UnixStream>, Status);

/// Finds an orphan's warden again and hears where its job stands. None if that has ended.
async fn regain(orphan: &Orphan) -> io::Result<Option<Regained>> {
    let Some(known) = &orphan.status else { return Ok(None) };
    // Held on to before anything is asked of it, so that it stays the one that is meant.
    let Some(mut warden) = Watched::adopted(known.warden)? else { return Ok(None) };
    let job: JobFile = read_json(&orphan.dir.join(file::JOB))?;
    let heard = timeout(WARDEN_ANSWERS, heard(&orphan.dir, &mut warden)).await;
    let Some((stream, status)) = heard.map_err(io::Error::from)? else { return Ok(None) };
    if status.state.ended() {
        return Ok(None);
    }
    let (lease, token) = (orphan.lease.as_str(), known.token.as_str());
    if (status.lease.as_str(), status.token.as_str(), status.warden) != (lease, token, known.warden)
    {
        return Err(io::Error::other("its warden answers for another job"));
    }
    Ok(Some((job.spec.grace_ms, warden, stream, status)))
}

/// Listens at a warden's door until it speaks; none once it is gone.
async fn heard(dir: &Path, warden: &mut Watched) -> Option<(BufReader<UnixStream>, Status)> {
    loop {
        if let Ok(heard) = knock(dir).await {
            return Some(heard);
        }
        // Its socket comes a little later than it does, and goes a little earlier.
        tokio::select! {
            () = warden.gone() => return None,
            () = sleep(POLL) => {}
        }
    }
}
