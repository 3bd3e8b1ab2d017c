//! A lessor and a lessee, and leases between them: the fleet of the benchmarks that are about
//! leases, not about hosts.

use std::{
    cell::Cell,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use futures::future::try_join_all;
use leasehold_node::api::body::Leased;
use tempfile::TempDir;
use tokio::time::sleep;

use super::{
    api::{Door, Kept},
    temporary,
};
use crate::fleet::{Fleet, Member, Plan, config};

/// How long two nodes may take to see each other.
const MAP: Duration = Duration::from_secs(30);
/// How many leases are asked for, or given back, at once.
const AT_ONCE: usize = 32;
const LESSOR: usize = 0;
const LESSEE: usize = 1;

/// Two nodes, one of which sells all cores of this machine.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) fleet: Fleet,
    /// Where the fleet lives, unless in a directory of its own choice.
    _room: Option<TempDir>,
}

impl Pair {
    /// Starts them; they see each other. The lessor lets leases wait to be claimed for as long as
    /// `max_claim_within`, or the usual time.
    pub(super) async fn start(
        dir: Option<&Path>,
        max_claim_within: Option<&str>,
    ) -> anyhow::Result<Self> {
        let mut lessor = config("lessor");
        lessor.offer.cpu = cores().to_string();
        lessor.offer.memory = "1G".into();
        if let Some(span) = max_claim_within {
            lessor.offer.max_claim_within = span.into();
        }
        let mut lessee = config("lessee");
        lessee.offer.sell = false;
        let room = dir.map(temporary).transpose()?;
        let mut plan = Plan::new(vec![lessor, lessee]);
        plan.dir = room.as_ref().map(|room| room.path().to_path_buf());
        let pair = Self { fleet: Fleet::start(plan).await?, _room: room };
        pair.fleet.map(MAP).await?;
        Ok(pair)
    }

    pub(super) fn lessor(&self) -> anyhow::Result<&Member> {
        Ok(self.fleet.member(LESSOR)?)
    }

    pub(super) fn lessee(&self) -> anyhow::Result<&Member> {
        Ok(self.fleet.member(LESSEE)?)
    }

    /// Kills the lessor.
    pub(super) fn kill_lessor(&mut self) -> anyhow::Result<()> {
        Ok(self.fleet.kill(LESSOR)?)
    }

    /// Starts the lessor's process; [`Self::lessor_listens`] says when it is up.
    pub(super) fn spawn_lessor(&mut self) -> anyhow::Result<()> {
        Ok(self.fleet.spawn(LESSOR)?)
    }

    /// Whether the lessor, whose process was started at `since`, listens.
    pub(super) fn lessor_listens(&mut self, since: Instant) -> anyhow::Result<bool> {
        Ok(self.fleet.listens(LESSOR, since)?)
    }

    /// Kills both and starts them again.
    pub(super) async fn restart(&mut self) -> anyhow::Result<()> {
        for index in [LESSOR, LESSEE] {
            self.fleet.kill(index)?;
        }
        self.fleet.start_all().await?;
        self.fleet.map(MAP).await?;
        Ok(())
    }

    /// A lease of the lessor: so little that what limits is the protocol, not the host's size.
    pub(super) fn want(
        &self,
        milli: u64,
        memory: &str,
        ttl: &str,
        claim_within: &str,
    ) -> anyhow::Result<Bytes> {
        Ok(want(&self.lessor()?.file()?.id.to_string(), milli, memory, ttl, claim_within))
    }

    pub(super) async fn stop(self) -> anyhow::Result<()> {
        self.fleet.stop().await?;
        Ok(())
    }
}

/// Cores that the lessor sells.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn want(lessor: &str, milli: u64, memory: &str, ttl: &str, claim_within: &str) -> Bytes {
    let want = serde_json::json!({ "want": {
        "cpu": format!("{milli}m"), "memory": memory, "disk": "0", "ttl": ttl,
        "claim_within": claim_within, "max_price": "1000000", "budget": "1000000",
        "lessors": [lessor],
    } });
    Bytes::from(want.to_string())
}

/// Waits until a lease can be had: a map comes before a link, and an offer somewhat later.
pub(super) async fn ready(lessee: &mut Kept, want: &Bytes) -> anyhow::Result<String> {
    let deadline = Instant::now() + MAP;
    loop {
        match lease(lessee, want).await {
            Ok(lease) => return Ok(lease),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// One lease; gives its id.
pub(super) async fn lease(lessee: &mut Kept, want: &Bytes) -> anyhow::Result<String> {
    let leased: Leased = serde_json::from_slice(&lessee.create("/v1/leases", want).await?)?;
    Ok(leased.lease)
}

/// So many leases, held; gives their ids.
pub(super) async fn obtain(
    lessee: &Door,
    want: &Bytes,
    count: usize,
) -> anyhow::Result<Vec<String>> {
    let left = Cell::new(count);
    let some = async || {
        let mut kept = lessee.open().await?;
        let mut mine = Vec::new();
        while left.get() > 0 {
            left.set(left.get() - 1);
            mine.push(ready(&mut kept, want).await.context("a lease")?);
        }
        anyhow::Ok(mine)
    };
    let all = try_join_all((0..AT_ONCE.min(count)).map(|_| some())).await?;
    Ok(all.into_iter().flatten().collect())
}

/// Does something about each of these leases by way of the lessee, some at once.
pub(super) async fn each(
    lessee: &Door,
    leases: &[String],
    does: impl AsyncFn(&mut Kept, &str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let part = async |leases: &[String]| {
        let mut kept = lessee.open().await?;
        for lease in leases {
            does(&mut kept, lease).await?;
        }
        anyhow::Ok(())
    };
    let size = leases.len().div_ceil(AT_ONCE).max(1);
    try_join_all(leases.chunks(size).map(part)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use leasehold_node::api::body::LeaseRequest;

    use super::*;

    #[test]
    fn what_is_wanted_is_understood() {
        let key = leasehold_proto::words::sign::Signer::from_seed(&[3; 32]).id().to_string();
        let want = want(&key, 1, "64K", "60s", "250ms");
        let request: LeaseRequest = serde_json::from_slice(&want).expect("a request");
        let want = request.want.expect("a want").parse().expect("sound");
        assert_eq!((want.shape.cpu_milli, want.shape.memory), (1, 64 << 10));
    }
}
