//! Between the core's word and the work: fetches what a job needs, starts it, tells of its end,
//! and serves those who follow it.
//!
//! ```text
//! StartJob --> fetching --> running --> ended(outcome, outputs)      JobEnded exactly once
//!                  \--cannot be had, or stopped first--^
//! ```
//!
//! What the core says of a job afterwards (deadline, frozen or not, notice, stop) is written down as
//! `Wanted`, and one task for each job brings its warden there: one instruction at a time, again
//! after a pause while it fails, so that the last word is what is in force in the end, whatever
//! became of those before it.
//!
//! Bytes never pass through the core: programs and inputs come over the data plane by root, and
//! go from here straight into the job's directory; output goes from its log to the lessee.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use leasehold_proto::core::{Command, Event, Notified, Orphan, Orphans, Reply, StartJob};
use leasehold_proto::words::contract::{EndReason, Input};
use leasehold_proto::words::index::Index;
use leasehold_proto::words::usage::{Outcome, Usage};
use leasehold_proto::{Boot, Hash, KeyId, LeaseId, Payload, Span};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::attach::{self, End, Frame, MAX_FRAME, OutputFile, Request};
use crate::clock;
use crate::data::frame::Refusal;
use crate::data::{Arriving, FetchError, Holder, LinkError};
use crate::handle::Asked;
use crate::holders::Holders;
use crate::payload::{PayloadError, PayloadStore, Root};
use crate::work::{self, Spec, Stream, Work, WorkEvent};

#[cfg(test)]
mod tests;

/// How many ended jobs keep their logs for late readers.
const MAX_ENDED: usize = 256;
/// How many may follow one job at once.
const MAX_FOLLOWING: usize = 16;
/// How many jobs' outputs are made payloads at once: each is read, hashed and written whole.
const MAX_KEEPING: usize = 2;
/// How many processes and threads a program may have.
const PIDS: u64 = 32;
/// Between an instruction that a warden did not carry out and the same one again, at first.
const AGAIN: Duration = Duration::from_millis(500);
/// The longest pause between two times.
const MAX_AGAIN: Duration = Duration::from_secs(15);
/// How long a claim may be here before it is known where its delegate serves the payloads.
const FIND: Duration = Duration::from_secs(30);
/// Between two looks whether that is known, at first and at most.
const LOOK: Duration = Duration::from_millis(100);
const MAX_LOOK: Duration = Duration::from_secs(2);

/// Where a job stands.
#[derive(Clone, Debug)]
enum Phase {
    /// Until its warden answers.
    Fetching,
    Running,
    Ended(Arc<End>),
}

#[derive(Debug)]
struct Job {
    delegate: [u8; 32],
    phase: watch::Sender<Phase>,
    /// What its task brings about.
    wanted: watch::Sender<Wanted>,
    /// Room for those who follow it.
    following: Arc<Semaphore>,
}

/// What a job is to be like, by the core's last word about each of these.
#[derive(Clone, Debug)]
struct Wanted {
    deadline: Boot,
    /// How often the core wanted to know that the deadline is in force.
    asked: u64,
    /// None where nothing was said: then it stays as it is.
    frozen: Option<bool>,
    notice: Option<Option<work::Notice>>,
    stop: Option<EndReason>,
}

impl Wanted {
    const fn until(deadline: Boot) -> Self {
        Self { deadline, asked: 0, frozen: None, notice: None, stop: None }
    }
}

/// What a job's warden is known to have in force.
#[derive(Clone, Debug)]
struct Known {
    deadline: Boot,
    /// As many of the core's questions about the deadline are answered.
    answered: u64,
    /// None where that is not known: it was told nothing, or did not say whether it heard.
    frozen: Option<bool>,
    notice: Option<Option<work::Notice>>,
}

impl Known {
    const fn until(deadline: Boot) -> Self {
        Self { deadline, answered: 0, frozen: None, notice: None }
    }
}

/// Where a job's delegate serves its payloads, as far as is known.
#[derive(Debug)]
struct Found {
    sources: Vec<SocketAddr>,
    /// Until when it is looked for, once it was not there.
    until: Option<Instant>,
}

/// What the indexes among a job's inputs say, by their roots.
type Indexes = HashMap<Hash, Index>;

impl Job {
    fn new(delegate: KeyId, phase: Phase, deadline: Boot) -> Self {
        Self {
            delegate: delegate.0,
            phase: watch::channel(phase).0,
            wanted: watch::channel(Wanted::until(deadline)).0,
            following: Arc::new(Semaphore::new(MAX_FOLLOWING)),
        }
    }
}

/// The jobs under leases that this node granted.
#[derive(Clone, Debug)]
pub(crate) struct Jobs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    work: Work,
    holders: Holders,
    payloads: PayloadStore,
    /// Whose jobs may have what is kept from peers.
    me: KeyId,
    events: mpsc::Sender<Event>,
    /// To ask the core where a delegate is.
    commands: mpsc::Sender<Asked>,
    jobs: Mutex<BTreeMap<LeaseId, Job>>,
    /// The jobs' tasks: they end with the node, before another run takes its jobs up.
    tasks: TaskTracker,
    closing: CancellationToken,
    ended: Mutex<std::collections::VecDeque<LeaseId>>,
    keeping: Semaphore,
    /// What confines a job here, as offered: a job that cannot be confined so does not run.
    isolation: Vec<String>,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lease_of(text: &str) -> Option<LeaseId> {
    text.parse().ok()
}

impl Jobs {
    pub(crate) fn new(
        work: Work,
        holders: Holders,
        (payloads, me): (PayloadStore, KeyId),
        (events, commands): (mpsc::Sender<Event>, mpsc::Sender<Asked>),
        isolation: Vec<String>,
    ) -> Self {
        let (jobs, ended) = (Mutex::default(), Mutex::default());
        let keeping = Semaphore::new(MAX_KEEPING);
        let inner = Inner {
            work,
            holders,
            payloads,
            me,
            events,
            commands,
            jobs,
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            ended,
            keeping,
            isolation,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Lets go of all jobs: no instruction is given any more, and none is begun. Waits for those
    /// that are being begun right now.
    pub(crate) async fn close(&self) {
        self.inner.closing.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// Starts a job: everything that follows is told through the events.
    pub(crate) fn start(&self, start: StartJob) {
        let job = Job::new(start.delegate, Phase::Fetching, start.deadline);
        let mut wanted = job.wanted.subscribe();
        hold(&self.inner.jobs).insert(start.lease, job);
        let jobs = self.clone();
        self.inner.tasks.spawn(async move {
            let lease = start.lease;
            let Some(begun) = jobs.begin(&start, &mut wanted).await else { return };
            match begun {
                Ok(known) => {
                    jobs.set_phase(&lease, Phase::Running);
                    let _ = jobs.inner.events.send(Event::JobBegun(lease)).await;
                    jobs.tend(lease, known, wanted).await;
                }
                Err(outcome) => {
                    let end = End { outcome, outputs: Vec::new(), dropped: 0 };
                    jobs.finish(lease, end, Usage::default()).await;
                }
            }
        });
    }

    /// Fetches what a job needs and starts its warden. None where the node is closing: what was not
    /// begun the next run begins.
    async fn begin(
        &self,
        start: &StartJob,
        wanted: &mut watch::Receiver<Wanted>,
    ) -> Option<Result<Known, Outcome>> {
        let fetched = self.inner.closing.run_until_cancelled(self.fetch_all(start, wanted)).await?;
        let (mut known, indexes) = match fetched {
            Ok(fetched) => fetched,
            Err(outcome) => return Some(Err(outcome)),
        };
        let now = wanted.borrow().clone();
        if now.stop.is_some() {
            return Some(Err(Outcome::Stopped));
        }
        // This node may have stood still meanwhile, or its host slept.
        if clock::boot() >= now.deadline {
            return Some(Err(Outcome::Deadline));
        }
        // From here on not given up half-way: a stop that comes meanwhile finds a job to stop, and
        // a deadline is in force once the warden that starts here has taken it.
        known.deadline = now.deadline;
        let spec = match self.spec(start, &indexes, now.deadline) {
            Ok(spec) => spec,
            Err(outcome) => return Some(Err(outcome)),
        };
        let started = self.inner.work.start(spec).await;
        let not_runnable = |error: work::StartError| Outcome::NotRunnable(clip(&error.to_string()));
        Some(started.map(|()| known).map_err(not_runnable))
    }

    async fn fetch_all(
        &self,
        start: &StartJob,
        wanted: &mut watch::Receiver<Wanted>,
    ) -> Result<(Known, Indexes), Outcome> {
        let fetch_all = async {
            let mut found = Found { sources: start.sources.clone(), until: None };
            for payload in [start.job.program].into_iter().chain(start.job.stdin) {
                self.fetch(start, &mut found, payload, None).await?;
            }
            let (mut indexes, mut files) = (Indexes::new(), 0);
            for Input { payload, index, .. } in &start.job.inputs {
                let read = self.fetch(start, &mut found, *payload, *index).await?;
                files += read.as_ref().map_or(1, |index| index.files().len());
                if files > work::MAX_INPUTS {
                    let most = work::MAX_INPUTS;
                    let why = format!("its inputs are more than {most} files");
                    return Err(Outcome::NotRunnable(why));
                }
                if let Some(read) = read {
                    indexes.insert(payload.root, read);
                }
            }
            Ok(indexes)
        };
        tokio::pin!(fetch_all);
        let mut known = Known::until(start.deadline);
        loop {
            tokio::select! {
                fetched = &mut fetch_all => return fetched.map(|indexes| (known, indexes)),
                // Fails only once the job is forgotten, and it is not before it has ended.
                _ = wanted.changed() => {
                    let now = wanted.borrow_and_update().clone();
                    if now.stop.is_some() {
                        return Err(Outcome::Stopped);
                    }
                    // There is nothing yet that it would end: the warden starts with it, below.
                    known.deadline = now.deadline;
                    self.answer(&start.lease, &now, &mut known).await;
                }
            }
        }
    }

    /// Sees to it that a job's warden does what is wanted, until the job has ended.
    async fn tend(&self, lease: LeaseId, known: Known, wanted: watch::Receiver<Wanted>) {
        let Some(mut phase) = self.phase(&lease) else { return };
        tokio::select! {
            () = self.bring_about(&lease, known, wanted) => {}
            () = self.inner.closing.cancelled() => {}
            _ = phase.wait_for(|phase| matches!(phase, Phase::Ended(_))) => {}
        }
    }

    async fn bring_about(
        &self,
        lease: &LeaseId,
        mut known: Known,
        mut wanted: watch::Receiver<Wanted>,
    ) {
        let (mut stopped, mut pause) = (wanted.clone(), AGAIN);
        loop {
            let now = wanted.borrow_and_update().clone();
            if let Some(why) = now.stop {
                // The end, whatever else is wanted: a warden that does not hear of it is killed.
                let released = why == EndReason::Released;
                let why = if released { "released by the lessee" } else { "lease ended" };
                self.inner.work.stop(&lease.to_string(), why).await;
                return;
            }
            let all = tokio::select! {
                all = self.tell(lease, &now, &mut known) => all,
                // It does not wait for a warden that takes its time.
                stopped = stopped.wait_for(|wanted| wanted.stop.is_some()) => match stopped {
                    Ok(_) => continue,
                    Err(_) => return,
                },
            };
            tokio::select! {
                changed = wanted.changed() => match changed {
                    Ok(()) => pause = AGAIN,
                    Err(_) => return,
                },
                () = sleep(pause), if !all => pause = (pause * 2).min(MAX_AGAIN),
            }
        }
    }

    /// Tells a warden what it does not have in force yet. Whether it has all of it now. Given up
    /// half-way, what it was being told counts as not known.
    async fn tell(&self, lease: &LeaseId, wanted: &Wanted, known: &mut Known) -> bool {
        // The deadline first: it must not end what is to be frozen or to be told something.
        if wanted.deadline > known.deadline && self.extend_now(lease, wanted.deadline).await {
            known.deadline = wanted.deadline;
        }
        self.answer(lease, wanted, known).await;
        if let Some(notice) = &wanted.notice
            && known.notice.as_ref() != Some(notice)
        {
            known.notice = None;
            if self.notify_now(lease, notice.clone()).await {
                known.notice = Some(notice.clone());
            }
        }
        if let Some(frozen) = wanted.frozen
            && known.frozen != Some(frozen)
        {
            known.frozen = None;
            if self.freeze_now(lease, frozen).await {
                known.frozen = Some(frozen);
            }
        }
        let told = (wanted.notice.is_none() || wanted.notice == known.notice)
            && (wanted.frozen.is_none() || wanted.frozen == known.frozen);
        wanted.deadline <= known.deadline && told
    }

    /// Tells whether the deadline is in force, if that was asked. Also where it is not: who waits
    /// for it asks again.
    async fn answer(&self, lease: &LeaseId, wanted: &Wanted, known: &mut Known) {
        if wanted.asked != known.answered {
            known.answered = wanted.asked;
            let in_force = wanted.deadline <= known.deadline;
            let event = Event::Extended(*lease, wanted.deadline, in_force);
            let _ = self.inner.events.send(event).await;
        }
    }

    /// Writes down what is wanted of a job, and tells where it stood then.
    fn want(&self, lease: &LeaseId, change: impl FnOnce(&mut Wanted)) -> Option<Phase> {
        let jobs = hold(&self.inner.jobs);
        let job = jobs.get(lease)?;
        job.wanted.send_modify(change);
        let phase = job.phase.borrow().clone();
        Some(phase)
    }

    /// Gives a job a later deadline, and tells when that is in force.
    pub(crate) fn extend(&self, lease: LeaseId, deadline: Boot) {
        let phase = self.want(&lease, |wanted| {
            wanted.deadline = wanted.deadline.max(deadline);
            wanted.asked += 1;
        });
        let done = match phase {
            Some(Phase::Fetching | Phase::Running) => return,
            Some(Phase::Ended(_)) => true,
            None => false,
        };
        let jobs = self.clone();
        tokio::spawn(async move {
            let _ = jobs.inner.events.send(Event::Extended(lease, deadline, done)).await;
        });
    }

    async fn extend_now(&self, lease: &LeaseId, deadline: Boot) -> bool {
        let name = lease.to_string();
        let in_force =
            |status: work::Status| status.state.ended() || status.deadline_boot_ms >= deadline.0;
        match self.inner.work.extend(&name, deadline.0).await {
            Ok(()) => true,
            // One that is later already, or a job that has ended, needs none.
            Err(error) => {
                let needless = self.inner.work.status(&name).is_some_and(in_force);
                if !needless {
                    tracing::warn!(lease = name, %error, "a warden did not take a new deadline");
                }
                needless
            }
        }
    }

    /// Freezes a job, or lets it go on.
    pub(crate) fn freeze(&self, lease: LeaseId, frozen: bool) {
        let _ = self.want(&lease, |wanted| wanted.frozen = Some(frozen));
    }

    async fn freeze_now(&self, lease: &LeaseId, frozen: bool) -> bool {
        let (work, name) = (&self.inner.work, lease.to_string());
        let done = if frozen { work.freeze(&name).await } else { work.thaw(&name).await };
        if let Err(error) = &done {
            tracing::warn!(lease = name, frozen, %error, "a job was not frozen or thawed");
        }
        done.is_ok()
    }

    /// Tells a job that its lease is taken back, or that it is not after all.
    pub(crate) fn notify(&self, lease: LeaseId, notified: Option<Notified>) {
        let notice = notified.map(|Notified { why, end }| {
            let reason = match why {
                EndReason::Reclaimed => "reclaimed",
                EndReason::Revoked => "revoked",
                _ => "ending",
            };
            work::Notice { reason: reason.into(), end_boot_ms: end.0 }
        });
        let _ = self.want(&lease, |wanted| wanted.notice = Some(notice));
    }

    async fn notify_now(&self, lease: &LeaseId, notice: Option<work::Notice>) -> bool {
        let (work, name) = (&self.inner.work, lease.to_string());
        let done = match notice {
            Some(notice) => work.notice(&name, notice).await,
            None => work.unnotice(&name).await,
        };
        if let Err(error) = &done {
            tracing::debug!(lease = name, %error, "a job was not told of its lease's end");
        }
        done.is_ok()
    }

    /// Fetches a payload from the delegate and whoever else has it; an index with all that it names,
    /// and what it says. A claim may be here before the delegate's record is, or
    /// before its newest one, above all when this node has just been started: then it is waited
    /// for, once for all payloads of a job.
    async fn fetch(
        &self,
        start: &StartJob,
        delegate: &mut Found,
        payload: Payload,
        index: Option<u64>,
    ) -> Result<Option<Index>, Outcome> {
        let (root, size) = (Root::from(payload.root), payload.size);
        self.may_have(start, root)?;
        loop {
            let (key, addresses) = (start.delegate.0, delegate.sources.clone());
            let holders = vec![Holder { key, addresses, whole: true }];
            let all = &self.inner.holders;
            // What an index names is looked at before anything of it is asked for.
            let named = match index {
                Some(_) => {
                    let fetched = all.fetch(holders.clone(), root, size, |_| {}).await;
                    if fetched.is_ok() {
                        self.may_have_named(start, root).await?;
                    }
                    fetched.map(|_| ())
                }
                None => Ok(()),
            };
            let fetched = if let Err(error) = named {
                Err(error)
            } else if let Some(most) = index {
                let fetched = all.fetch_index(holders, (root, size), most, |_| {}).await;
                fetched.map(|(index, stats)| (Some(index), stats))
            } else {
                let fetched = all.fetch(holders, root, size, |_| {}).await;
                fetched.map(|stats| (None, stats))
            };
            let error = match fetched {
                Ok((index, stats)) => {
                    tracing::debug!(lease = %start.lease, %root, ?stats, "payload is here");
                    return Ok(index);
                }
                Err(error) => error,
            };
            // The order is wrong about it, whoever brings it.
            if let (Some(most), FetchError::Store(wrong)) = (index, &error) {
                match **wrong {
                    PayloadError::TooLarge { limit } if limit == most => {
                        let why =
                            format!("the files of {root} have more than the {most} bytes said");
                        return Err(Outcome::NotRunnable(why));
                    }
                    PayloadError::NotAnIndex { .. } => {
                        return Err(Outcome::NotRunnable(clip(&error.to_string())));
                    }
                    _ => {}
                }
            }
            let unreachable = matches!(error, FetchError::Link(LinkError::Unreachable { .. }));
            let until = *delegate.until.get_or_insert_with(|| Instant::now() + FIND);
            if unreachable
                && Instant::now() < until
                && let Ok(Some(found)) =
                    timeout_at(until, self.elsewhere(start.delegate, &delegate.sources)).await
            {
                delegate.sources = found;
                continue;
            }
            return Err(Outcome::NoPayload(clip(&error.to_string())));
        }
    }

    /// Whether a job may have all that an index names.
    async fn may_have_named(&self, start: &StartJob, root: Root) -> Result<(), Outcome> {
        let payloads = self.inner.payloads.clone();
        let read = tokio::task::spawn_blocking(move || payloads.index(root));
        // What does not read as one is met where it is fetched.
        let Ok(Ok(read)) = read.await else { return Ok(()) };
        read.payloads().iter().try_for_each(|named| self.may_have(start, named.root.into()))
    }

    /// Whether a job may have a payload: what is kept from peers is as good as not here, whatever of it
    /// is named.
    fn may_have(&self, start: &StartJob, root: Root) -> Result<(), Outcome> {
        if start.delegate == self.inner.me || !self.inner.payloads.is_private(root) {
            return Ok(());
        }
        Err(Outcome::NoPayload(clip(&PayloadError::NotHeld(root).to_string())))
    }

    /// Where a node serves its data plane, once that is known; none where it is where it was
    /// looked for already, or nobody will tell.
    async fn elsewhere(&self, node: KeyId, tried: &[SocketAddr]) -> Option<Vec<SocketAddr>> {
        let mut pause = LOOK;
        loop {
            let (reply, answer) = oneshot::channel();
            self.inner.commands.send((Command::Reach(node), reply)).await.ok()?;
            let Ok(Ok(Reply::Reached(_, found))) = answer.await else { return None };
            if !found.is_empty() {
                return (found != tried).then_some(found);
            }
            sleep(pause).await;
            pause = (pause * 2).min(MAX_LOOK);
        }
    }

    fn spec(&self, start: &StartJob, indexes: &Indexes, deadline: Boot) -> Result<Spec, Outcome> {
        let job = &start.job;
        let path = |payload: &Payload| -> Result<PathBuf, Outcome> {
            self.may_have(start, payload.root.into())?;
            let path = self.inner.payloads.path(payload.root.into());
            path.ok_or_else(|| Outcome::NoPayload("it was removed before the job started".into()))
        };
        let mut inputs = Vec::with_capacity(job.inputs.len());
        for Input { name, payload, index } in &job.inputs {
            let Some(index) = index.and_then(|_| indexes.get(&payload.root)) else {
                inputs.push(work::Input { name: name.clone(), path: path(payload)? });
                continue;
            };
            for file in index.files() {
                let name = format!("{name}/{}", file.path);
                inputs.push(work::Input { name, path: path(&file.payload)? });
            }
        }
        let mut args = vec!["program".to_string()];
        args.extend(job.args.iter().cloned());
        Ok(Spec {
            lease: start.lease.to_string(),
            // By this a restarted node knows the warden of the job that its book speaks of.
            token: start.claim.to_string(),
            runtime: work::Runtime::Wasm,
            program: path(&job.program)?,
            args,
            env: job.env.clone(),
            stdin: job.stdin.as_ref().map(path).transpose()?,
            inputs,
            outputs: job.outputs.clone(),
            cpu_milli: start.shape.cpu_milli,
            memory: start.shape.memory,
            disk: start.shape.disk,
            pids: PIDS,
            deadline_boot_ms: deadline.0,
            grace_ms: start.grace.as_millis(),
            log_limit: work::DEFAULT_LOG_LIMIT,
            require: self.inner.isolation.clone(),
        })
    }

    /// Ends a job, or what is being fetched for it.
    pub(crate) fn stop(&self, lease: LeaseId, why: EndReason) {
        let _ = self.want(&lease, |wanted| wanted.stop = wanted.stop.or(Some(why)));
    }

    fn phase(&self, lease: &LeaseId) -> Option<watch::Receiver<Phase>> {
        hold(&self.inner.jobs).get(lease).map(|job| job.phase.subscribe())
    }

    fn set_phase(&self, lease: &LeaseId, phase: Phase) {
        if let Some(job) = hold(&self.inner.jobs).get(lease) {
            job.phase.send_if_modified(|now| {
                let open = !matches!(now, Phase::Ended(_));
                if open {
                    *now = phase;
                }
                open
            });
        }
    }

    async fn finish(&self, lease: LeaseId, end: End, usage: Usage) {
        let outcome = end.outcome.clone();
        self.set_phase(&lease, Phase::Ended(Arc::new(end)));
        let _ = self.inner.events.send(Event::JobEnded(lease, outcome, usage)).await;
    }

    /// How a job ended is kept: what is left of it may go. Not earlier, since a node that starts
    /// takes a job for one that was not begun where nothing is left of it.
    pub(crate) fn noted(&self, lease: LeaseId) {
        let jobs = self.clone();
        tokio::spawn(async move { jobs.remember(lease).await });
    }

    /// Keeps an ended job for late readers, in place of the oldest one.
    async fn remember(&self, lease: LeaseId) {
        let oldest = {
            let mut ended = hold(&self.inner.ended);
            ended.push_back(lease);
            if ended.len() > MAX_ENDED { ended.pop_front() } else { None }
        };
        if let Some(oldest) = oldest {
            self.forget(&oldest.to_string()).await;
            hold(&self.inner.jobs).remove(&oldest);
        }
    }

    /// Takes what the work tells.
    pub(crate) async fn heard(&self, event: WorkEvent) {
        match event {
            WorkEvent::Started { lease } => tracing::debug!(lease, "the program runs"),
            WorkEvent::Usage { lease, usage } => {
                if let Some(lease) = lease_of(&lease) {
                    let event = Event::Usage(lease, usage_of(&usage));
                    let _ = self.inner.events.send(event).await;
                }
            }
            // Beside the others: large outputs of one job must not hold up the end of another.
            WorkEvent::Ended { lease, outcome, usage } => {
                let Some(id) = lease_of(&lease) else { return };
                let jobs = self.clone();
                tokio::spawn(async move {
                    let end = jobs.conclude(&lease, &outcome, &usage).await;
                    jobs.finish(id, end, usage_of(&usage)).await;
                });
            }
        }
    }

    /// Keeps a job's outputs as payloads and writes down how it ended.
    async fn conclude(&self, lease: &str, outcome: &work::Outcome, usage: &work::Usage) -> End {
        if let Some(end) = self.inner.work.conclusion(lease) {
            return end;
        }
        let outputs = self.keep_outputs(lease).await;
        let end = End { outcome: outcome_of(outcome), outputs, dropped: usage.log_dropped };
        if let Err(error) = self.inner.work.conclude(lease, end.clone()).await {
            tracing::warn!(lease, %error, "the end of a job cannot be written down");
        }
        end
    }

    /// Takes back jobs of an earlier run that have ended, for late readers: those whose lease is
    /// known, with the delegate that may follow them. The others are forgotten.
    pub(crate) async fn take_back(self, reaped: Vec<(work::Reaped, Option<KeyId>)>) {
        // All are known before the first is looked into: nobody is turned away meanwhile.
        let mut known = Vec::new();
        for (job, delegate) in reaped {
            match (lease_of(&job.lease), delegate) {
                (Some(lease), Some(delegate)) => {
                    let open = Job::new(delegate, Phase::Fetching, Boot(0));
                    hold(&self.inner.jobs).insert(lease, open);
                    known.push((lease, job));
                }
                _ => self.forget(&job.lease).await,
            }
        }
        for (lease, job) in known {
            let end = self.conclude(&job.lease, &job.outcome, &job.usage).await;
            self.set_phase(&lease, Phase::Ended(Arc::new(end)));
            self.remember(lease).await;
        }
    }

    async fn forget(&self, lease: &str) {
        if let Err(error) = self.inner.work.forget(lease).await {
            tracing::warn!(lease, %error, "a job's directory stays");
        }
    }

    /// Makes payloads of the declared outputs, so that the lessee can fetch them by root.
    async fn keep_outputs(&self, lease: &str) -> Vec<OutputFile> {
        let names = self.inner.work.status(lease).map(|status| status.outputs).unwrap_or_default();
        let _turn = self.inner.keeping.acquire().await;
        let mut kept = Vec::with_capacity(names.len());
        for file in names {
            let Some(path) = self.inner.work.output_file(lease, &file.name) else { continue };
            let payloads = self.inner.payloads.clone();
            let size = tokio::fs::metadata(&path).await.map_or(0, |about| about.len());
            if let Err(error) = self.inner.holders.make_room(vec![size]).await {
                tracing::warn!(lease, name = file.name, %error, "there is no room for an output");
            }
            let imported = tokio::task::spawn_blocking(move || payloads.import_path(&path)).await;
            match imported {
                Ok(Ok(imported)) => {
                    self.inner.holders.awaits(imported.root);
                    let root = imported.root.into();
                    let payload = Payload { root, size: imported.size };
                    kept.push(OutputFile { name: file.name, payload });
                }
                Ok(Err(error)) => tracing::warn!(lease, name = file.name, %error, "output lost"),
                Err(error) => tracing::warn!(lease, name = file.name, %error, "output lost"),
            }
        }
        kept
    }

    /// What became of the jobs that an earlier run of this node left. The directories of those
    /// that ended stay until what follows from it is kept.
    pub(crate) fn orphans(adopted: &work::Adopted) -> Orphans {
        let ended = adopted.reaped.iter().filter_map(|job| {
            let ended = Orphan::Ended(outcome_of(&job.outcome), usage_of(&job.usage));
            Some((lease_of(&job.lease)?, ended))
        });
        let running = adopted.running.iter().filter_map(|status| {
            let running = Orphan::Adopted(usage_of(&status.usage), status.frozen);
            Some((lease_of(&status.lease)?, running))
        });
        ended.chain(running).collect()
    }

    /// Takes back jobs of an earlier run that run on under their wardens, with the delegate that
    /// may follow each.
    pub(crate) fn adopt(&self, running: Vec<(work::Status, KeyId)>) {
        for (status, delegate) in running {
            let Some(lease) = lease_of(&status.lease) else { continue };
            let deadline = Boot(status.deadline_boot_ms);
            let job = Job::new(delegate, Phase::Running, deadline);
            // What it was told of its lease's end does not stand in its status.
            let known = Known { frozen: Some(status.frozen), ..Known::until(deadline) };
            let wanted = job.wanted.subscribe();
            hold(&self.inner.jobs).insert(lease, job);
            let jobs = self.clone();
            self.inner.tasks.spawn(async move { jobs.tend(lease, known, wanted).await });
        }
    }

    /// Serves one who wants to follow a job.
    pub(crate) async fn serve(self, arriving: Arriving) {
        let request = Request::decode(&arriving.body);
        let (peer, channel) = (arriving.peer, arriving.channel);
        let Some(request) = request.filter(|_| channel == attach::ATTACH) else {
            arriving.refuse(Refusal::BadRequest, "not a request to follow a job");
            return;
        };
        let following = {
            let jobs = hold(&self.inner.jobs);
            let theirs = jobs.get(&request.lease).filter(|job| job.delegate == peer);
            theirs.map(|job| Arc::clone(&job.following))
        };
        let Some(following) = following else {
            // The same answer for what does not exist and for what is not theirs.
            arriving.refuse(Refusal::Denied, "no job of yours runs under this lease");
            return;
        };
        let Ok(_following) = following.try_acquire_owned() else {
            arriving.refuse(Refusal::Busy, "too many follow this job already");
            return;
        };
        let Ok((mut send, _recv)) = arriving.accept().await else { return };
        let unwanted = send.unwanted();
        let followed = tokio::select! {
            followed = self.follow(request, &mut send) => followed,
            // A job that says nothing for hours would not notice otherwise.
            () = unwanted => Err(std::io::ErrorKind::ConnectionReset.into()),
        };
        if let Err(error) = followed {
            tracing::debug!(lease = %request.lease, %error, "a follower went away");
            return;
        }
        send.finish();
    }

    async fn follow(
        &self,
        request: Request,
        send: &mut (impl tokio::io::AsyncWrite + Unpin),
    ) -> std::io::Result<()> {
        let gone = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let mut phase = self.phase(&request.lease).ok_or_else(gone)?;
        let begun = phase.wait_for(|phase| !matches!(phase, Phase::Fetching)).await;
        begun.map_err(|_| gone())?;
        let lease = request.lease.to_string();
        if let (Ok(mut out), Ok(mut err)) =
            (self.inner.work.output(&lease), self.inner.work.output(&lease))
        {
            let (mut at_out, mut at_err) = (request.stdout, request.stderr);
            let (mut more_out, mut more_err) = (true, true);
            while more_out || more_err {
                tokio::select! {
                    chunk = out.read(Stream::Stdout, at_out, MAX_FRAME), if more_out => {
                        let chunk = chunk?;
                        at_out += chunk.bytes.len() as u64;
                        more_out = !chunk.end;
                        attach::write(send, &Frame::Stdout(chunk.bytes)).await?;
                    }
                    chunk = err.read(Stream::Stderr, at_err, MAX_FRAME), if more_err => {
                        let chunk = chunk?;
                        at_err += chunk.bytes.len() as u64;
                        more_err = !chunk.end;
                        attach::write(send, &Frame::Stderr(chunk.bytes)).await?;
                    }
                }
            }
        }
        let ended = phase.wait_for(|phase| matches!(phase, Phase::Ended(_))).await;
        let end = match &*ended.map_err(|_| gone())? {
            Phase::Ended(end) => Arc::clone(end),
            _ => return Err(gone()),
        };
        attach::write(send, &Frame::End((*end).clone())).await
    }
}

/// A message of bounded length, for an outcome that travels.
fn clip(text: &str) -> String {
    text.chars().take(500).collect()
}

fn usage_of(usage: &work::Usage) -> Usage {
    Usage {
        // The lease is billed by the lessor's own clock, from claim to end, not by this meter.
        billed: Span::ZERO,
        cpu: Span(usage.cpu_ms),
        memory_mib_ms: usage.memory_mib_ms,
        memory_peak: usage.memory_peak,
        ..Usage::default()
    }
}

fn outcome_of(outcome: &work::Outcome) -> Outcome {
    match outcome {
        work::Outcome::Exited { code } => Outcome::Exited(*code),
        work::Outcome::Trapped { message } => Outcome::Trapped(clip(message)),
        work::Outcome::NotRunnable { message } => Outcome::NotRunnable(clip(message)),
        work::Outcome::OutOfMemory { .. } => Outcome::OutOfMemory,
        work::Outcome::OutOfDisk { .. } => Outcome::OutOfDisk,
        work::Outcome::Deadline => Outcome::Deadline,
        work::Outcome::Stopped { .. } => Outcome::Stopped,
        work::Outcome::Lost { .. } => Outcome::Lost,
    }
}
