//! Other programs beside which something is measured, each a process that ends with its benchmark.
//!
//! ```text
//! benchmark --starts--> this executable, as `bench peer` --becomes--> the program
//! ```

use std::{
    ffi::OsStr,
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tokio::time::sleep;

/// What the executable is told that becomes a peer.
#[derive(Debug, Args)]
pub(super) struct Peer {
    /// Who started it, and is there still.
    #[arg(long)]
    parent: i32,
    /// What it becomes.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

impl Peer {
    /// Becomes the peer, which is killed when the process that started it is gone.
    pub(super) fn run(&self) -> anyhow::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have gone before.
        ensure!(getppid().map(Pid::as_raw_pid) == Some(self.parent), "nobody waits for this");
        let (program, args) = self.command.split_first().context("no command")?;
        let error = Command::new(program).args(args).exec();
        Err(error).with_context(|| format!("cannot run {program}"))
    }
}

/// Starts `program` by way of this executable, which sees to it that it ends when this process does.
pub(super) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(["bench", "peer", "--parent", &std::process::id().to_string(), "--"]);
    command.arg(program);
    command
}

/// A process that ends when this is dropped.
#[derive(Debug)]
pub(super) struct Running(Child);

impl Running {
    pub(super) fn start(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(Self)
    }

    pub(super) const fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Fails with what it said last, in `log`, when it has ended.
    pub(super) fn runs(&mut self, log: &Path) -> anyhow::Result<()> {
        if let Some(status) = self.0.try_wait()? {
            let log = std::fs::read_to_string(log).unwrap_or_default();
            bail!("it ended with {status}: {}", log.lines().last().unwrap_or_default());
        }
        Ok(())
    }

    /// Asks it every so often until it answers, it has ended, or so much time has passed.
    pub(super) async fn answers(
        &mut self,
        log: &Path,
        (every, within): (Duration, Duration),
        mut asked: impl AsyncFnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + within;
        loop {
            self.runs(log)?;
            match asked().await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error).context("no answer"),
                Err(_) => sleep(every).await,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
