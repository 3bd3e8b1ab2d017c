//! `leasehold run --nodes`: the same program on several hosts at once, all of them or none.
//!
//! ```text
//! gang of leases, each with its job -> follow all -> fetch outputs, one directory a rank -> cost
//!                                          '-- Ctrl-C: all are given back
//! ```
//!
//! Each member finds its rank, how many there are and where the others are in its environment:
//! `LEASEHOLD_RANK`, `LEASEHOLD_SIZE`, `LEASEHOLD_HOSTS`, `LEASEHOLD_GANG`.

use std::time::Instant;

use futures::future::join_all;
use leasehold_keys::exit::Exit;
use leasehold_keys::text::shown;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::{Output, Run, Running, SIGNALLED, Told, exit_code, millis, outcome};
use crate::api::body::{EndLine, GangRequest, Ganged, Leased, OutcomeLine};
use crate::api::want::{JobText, WantText};
use crate::attach::End;
use crate::cli::output::span;
use crate::cli::{Failure, Session};

/// A gang that is being run.
pub(super) struct Launch<'a> {
    pub(super) args: &'a Run,
    pub(super) session: &'a Session,
    pub(super) stop: &'a CancellationToken,
    pub(super) begun: Instant,
    pub(super) uploaded: u64,
}

/// What became of one member.
struct Member {
    end: Option<End>,
    over: Option<EndLine>,
    outcome: Option<OutcomeLine>,
    sink: Output,
    fetched: Result<Vec<Value>, Failure>,
}

impl Launch<'_> {
    /// Runs it and gives the process's exit code: the highest of its members' own.
    pub(super) async fn run(self, want: WantText, nodes: u16, job: JobText) -> Result<u8, Failure> {
        let ordered = Instant::now();
        let on_loss = self.args.gang.on_loss;
        let request = GangRequest { want, nodes, job: Some(job), on_loss };
        let ganged: Ganged = self.session.client.post("/v1/gangs", &request).await?;
        let lease_ms = millis(ordered);
        if self.args.detach {
            return self.detached(&ganged, lease_ms);
        }
        let members = ganged.leases.iter().enumerate();
        let members = members.map(|(rank, leased)| self.member(rank, leased));
        let members = join_all(members).await.into_iter().collect::<Result<Vec<_>, _>>();
        let members = match members {
            Ok(members) => members,
            Err(failure) => {
                let stop = self.stop;
                let session = self.session;
                join_all(ganged.leases.iter().map(|leased| async move {
                    Running { session, leased, stop }.give_back().await;
                }))
                .await;
                return Err(failure);
            }
        };
        self.report(&ganged, members, lease_ms)
    }

    fn detached(&self, ganged: &Ganged, lease_ms: u64) -> Result<u8, Failure> {
        let leases: Vec<_> = ganged.leases.iter().map(|leased| &leased.lease).collect();
        let object = json!({
            "gang": ganged.gang, "leases": leases, "currency": ganged.currency,
            "bytes_uploaded": self.uploaded, "lease_ms": lease_ms,
        });
        self.session
            .out
            .answer(&object, || leases.iter().map(|lease| format!("{lease}\n")).collect())?;
        for (rank, leased) in ganged.leases.iter().enumerate() {
            self.session.out.tell(&format!("rank {rank} runs on {}", shown(&leased.choice.name)));
        }
        Ok(Exit::Ok.code())
    }

    /// Follows one member to its end.
    async fn member(&self, rank: usize, leased: &Leased) -> Result<Member, Failure> {
        let (session, stop) = (self.session, self.stop);
        let mut sink = Output::new(session.out, Some(format!("[{rank}] ")));
        let mut running = Running { session, leased, stop };
        let Told { end, over, interrupted } = running.follow(&mut sink).await?;
        sink.finish()?;
        let fetched = if interrupted || self.args.output.is_empty() {
            Ok(Vec::new())
        } else {
            let dir = self.args.output_dir.join(rank.to_string());
            match std::fs::create_dir_all(&dir) {
                Ok(()) => self.args.fetch(session, &leased.lease, &dir, end.as_ref()).await,
                Err(why) => Err(Failure::file("cannot make", &dir, &why)),
            }
        };
        let over = match over {
            Some(over) => Some(over),
            None => running.close(interrupted).await,
        };
        let outcome = outcome(end.as_ref(), over.as_ref());
        Ok(Member { end, over, outcome, sink, fetched })
    }

    fn report(&self, ganged: &Ganged, members: Vec<Member>, lease_ms: u64) -> Result<u8, Failure> {
        let interrupted = self.stop.is_cancelled();
        let codes = members.iter().map(|member| exit_code(member.outcome.as_ref(), interrupted));
        let code = codes.max().unwrap_or(SIGNALLED);
        let run_ms = millis(self.begun);
        let out = &self.session.out;
        let charges = members.iter().filter_map(|member| member.over.as_ref());
        let charge = charges.map(|over| over.charge.0).sum::<leasehold_proto::Amount>();
        if !out.json {
            for (rank, member) in members.iter().enumerate() {
                match &member.outcome {
                    Some(outcome) if outcome.code == Some(0) => {}
                    Some(outcome) => {
                        out.warn(&format!("rank {rank}: the program {}", outcome.text))
                    }
                    None => out.warn(&format!("rank {rank}: how the program ended is not known")),
                }
            }
            out.tell(&format!(
                "cost {charge} {} on {} hosts in {}",
                ganged.currency,
                members.len(),
                span(run_ms)
            ));
        }
        let mut failed = None;
        let mut lines = Vec::new();
        for (leased, member) in ganged.leases.iter().zip(members) {
            let Member { end, over, outcome, sink, fetched } = member;
            let mut object = Map::new();
            let mut put = |name: &str, value: Value| object.insert(name.into(), value);
            put("lease", leased.lease.clone().into());
            put("lessor_name", leased.choice.name.clone().into());
            put("outcome", json!(outcome));
            put("end", json!(over.as_ref().and_then(|over| over.reason.clone())));
            put("charge", json!(over.as_ref().map(|over| over.charge)));
            put("output_bytes_dropped", json!(end.map(|end| end.dropped)));
            put("outputs", fetched.as_ref().map_or(Value::Null, |fetched| json!(fetched)));
            sink.stdout.put("stdout", &mut object);
            sink.stderr.put("stderr", &mut object);
            lines.push(Value::Object(object));
            failed = failed.or(fetched.err());
        }
        if out.json {
            out.object(&json!({
                "gang": ganged.gang, "members": lines, "charge": charge.to_string(),
                "currency": ganged.currency, "bytes_uploaded": self.uploaded,
                "lease_ms": lease_ms, "run_ms": run_ms,
            }))?;
        }
        match failed {
            Some(failure) if !out.json && code == 0 => Err(failure),
            Some(failure) => {
                out.warn(&failure.error.to_string());
                Ok(if code == 0 { failure.exit.code() } else { code })
            }
            None => Ok(code),
        }
    }
}
