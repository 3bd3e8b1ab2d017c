//! `leasehold logs`: a job's output.

use clap::Args;
use leasehold_keys::exit::Exit;
use serde_json::{Map, Value};

use super::follow::{self, Kept, Sink};
use super::output::Out;
use super::{Failure, Session, find};
use crate::api::body::OutcomeLine;

/// Print a job's output: its standard output and standard error, each to ours.
#[derive(Debug, Args)]
pub(super) struct Logs {
    /// The lease, or its first digits
    lease: String,
    /// Go on until the job has ended
    #[arg(short, long)]
    follow: bool,
    /// Only standard error, to standard output
    #[arg(long)]
    stderr: bool,
}

/// Where a followed job's output goes.
struct Through {
    out: Out,
    /// Only standard error is wanted, on standard output.
    only_stderr: bool,
}

impl Sink for Through {
    fn stdout(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.only_stderr { Ok(()) } else { self.out.data(bytes) }
    }

    fn stderr(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.only_stderr { self.out.data(bytes) } else { self.out.raw_stderr(bytes) }
    }
}

#[derive(Default)]
struct Both {
    stdout: Kept,
    stderr: Kept,
}

impl Sink for Both {
    fn stdout(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stdout.take(bytes);
        Ok(())
    }

    fn stderr(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stderr.take(bytes);
        Ok(())
    }
}

impl Logs {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let lease = find::lease(session, &self.lease).await?;
        let client = &session.client;
        if session.out.json {
            let mut both = Both::default();
            let end = if self.follow {
                follow::output(client, &lease, &mut both).await?
            } else {
                follow::so_far(client, &lease, &mut both).await?
            };
            let mut object = Map::new();
            object.insert("lease".into(), lease.into());
            object.insert("ended".into(), end.is_some().into());
            let outcome = end.map(|end| OutcomeLine::from(&end.outcome));
            let outcome = serde_json::to_value(outcome).unwrap_or_default();
            object.insert("outcome".into(), outcome);
            both.stdout.put("stdout", &mut object);
            both.stderr.put("stderr", &mut object);
            session.out.object(&Value::Object(object))?;
            return Ok(Exit::Ok);
        }
        let mut through = Through { out: session.out, only_stderr: self.stderr };
        let end = if self.follow {
            follow::output(client, &lease, &mut through).await?
        } else {
            follow::so_far(client, &lease, &mut through).await?
        };
        if let Some(end) = end
            && session.out.watched()
        {
            session.out.tell(&format!(
                "the job {}",
                leasehold_keys::text::shown(&end.outcome.to_string())
            ));
        }
        Ok(Exit::Ok)
    }
}
