//! Clients that ask for one thing after the other, each as soon as it has its answer: what the
//! benchmarks of leases and of gangs have in common.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tokio::time::sleep;

use super::{percentile, rounded};

/// How many errors a client meets before it gives up.
const MAX_ERRORS: u64 = 1_000;
/// How long a client rests after one.
const REST: Duration = Duration::from_millis(20);

/// One who asks.
pub(super) trait Client {
    /// Asks for one thing, and gives when the answer came: what it does afterwards, such as giving
    /// back what it got, is not in the figure. None where the answer was a no, which the client
    /// counts itself.
    async fn ask(&mut self) -> anyhow::Result<Option<Instant>>;

    /// Connects anew, after an error.
    async fn again(&mut self) -> anyhow::Result<()>;
}

/// What clients met.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// How long each thing took, in milliseconds, that was asked for and came in the time that
    /// counts.
    pub(super) took_ms: Vec<f64>,
    /// The same of what was asked for in that time and came later: without it the slowest would be
    /// left out.
    pub(super) late_ms: Vec<f64>,
    /// All that came.
    pub(super) came: u64,
    /// All that did not, because something broke.
    pub(super) errors: u64,
}

impl Asked {
    /// Takes in what another one met.
    pub(super) fn add(&mut self, other: &Self) {
        self.took_ms.extend(&other.took_ms);
        self.late_ms.extend(&other.late_ms);
        self.came += other.came;
        self.errors += other.errors;
    }

    /// The times below which these shares of all lie, as a line shows them.
    pub(super) fn percentiles<const N: usize>(&self, shares: [f64; N]) -> [Option<f64>; N] {
        let mut sorted: Vec<f64> = self.took_ms.iter().chain(&self.late_ms).copied().collect();
        sorted.sort_by(f64::total_cmp);
        shares.map(|share| percentile(&sorted, share).map(|ms| rounded(ms, 2)))
    }
}

/// Lets all of them ask until `until`; what began before `from` does not count. Gives them back.
pub(super) async fn drive<C: Client>(
    clients: Vec<C>,
    from: Instant,
    until: Instant,
) -> anyhow::Result<(Vec<C>, Asked)> {
    let all = try_join_all(clients.into_iter().map(|client| one(client, from, until))).await?;
    let mut clients = Vec::with_capacity(all.len());
    let mut asked = Asked::default();
    for (client, its) in all {
        clients.push(client);
        asked.add(&its);
    }
    Ok((clients, asked))
}

async fn one<C: Client>(
    mut client: C,
    from: Instant,
    until: Instant,
) -> anyhow::Result<(C, Asked)> {
    let mut asked = Asked::default();
    loop {
        let start = Instant::now();
        if start >= until {
            return Ok((client, asked));
        }
        match client.ask().await {
            Ok(Some(end)) => {
                asked.came += 1;
                let of = if end <= until { &mut asked.took_ms } else { &mut asked.late_ms };
                if start >= from {
                    of.push((end - start).as_secs_f64() * 1e3);
                }
            }
            Ok(None) => sleep(REST).await,
            Err(error) => {
                asked.errors += 1;
                if asked.errors == 1 {
                    eprintln!("a client's first error: {error:#}");
                }
                if asked.errors >= MAX_ERRORS {
                    return Err(error);
                }
                sleep(REST).await;
                client.again().await?;
            }
        }
    }
}
