//! How quick an upstream is, as its requests have it: averages that forget.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Each new figure counts for one part in so many.
const PARTS: f64 = 8.0;

/// The averages.
#[derive(Debug, Default)]
pub(super) struct Measured {
    inner: Mutex<Averages>,
}

/// What is known; None before the first measurement.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Averages {
    first_token: Option<f64>,
    tokens_per_second: Option<f64>,
    prefill_per_second: Option<f64>,
}

/// One answer, as it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    /// From the request to its first token.
    pub(super) first: Duration,
    /// From there to the last.
    pub(super) rest: Duration,
    /// Tokens read, those from a cache left out.
    pub(super) read: u64,
    /// Tokens produced.
    pub(super) produced: u64,
}

impl Measured {
    pub(super) fn add(&self, timed: Timed) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let first = timed.first.as_secs_f64();
        average(&mut inner.first_token, first);
        // What took no time to speak of says nothing of speed.
        if timed.read > 0 && first > 1e-6 {
            average(&mut inner.prefill_per_second, timed.read as f64 / first);
        }
        let rest = timed.rest.as_secs_f64();
        if timed.produced > 1 && rest > 1e-6 {
            average(&mut inner.tokens_per_second, (timed.produced - 1) as f64 / rest);
        }
    }

    pub(super) fn now(&self) -> Averages {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Averages {
    pub(super) fn first_token(&self) -> Duration {
        Duration::from_secs_f64(self.first_token.unwrap_or(0.0))
    }

    pub(super) fn tokens_per_second(&self) -> Option<u32> {
        self.tokens_per_second.map(|rate| rate as u32)
    }

    pub(super) fn prefill_per_second(&self) -> Option<u32> {
        self.prefill_per_second.map(|rate| rate as u32)
    }
}

fn average(so_far: &mut Option<f64>, figure: f64) {
    *so_far = Some(match *so_far {
        None => figure,
        Some(so_far) => so_far + (figure - so_far) / PARTS,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_forget() {
        let measured = Measured::default();
        assert_eq!(measured.now().tokens_per_second(), None);
        let timed = |first, rest, produced| Timed {
            first: Duration::from_millis(first),
            rest: Duration::from_millis(rest),
            read: 50,
            produced,
        };
        measured.add(timed(100, 1_000, 101));
        let now = measured.now();
        assert_eq!(now.first_token(), Duration::from_millis(100));
        assert_eq!(now.tokens_per_second(), Some(100));
        assert_eq!(now.prefill_per_second(), Some(500));
        for _ in 0..100 {
            measured.add(timed(200, 0, 1));
        }
        let now = measured.now();
        assert!(now.first_token().abs_diff(Duration::from_millis(200)) < Duration::from_millis(1));
        assert_eq!(now.tokens_per_second(), Some(100), "one token says nothing of speed");
    }
}
