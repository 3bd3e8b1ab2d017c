//! API keys: who may ask models through this node, which, how much, and for how long.
//!
//! ```text
//! request --key known?--> expired? --> model allowed? --> budget? --> requests, tokens a minute, at once
//!             401           401            403             402                 429, with Retry-After
//! ```
//!
//! A key is shown once, when it is made; kept is its hash, in `api-keys.json` in the node's directory,
//! with what its owner has spent. What is spent is written within a second, and when the node stops.
//! Limits per minute are buckets that fill evenly: a limit of 60 is one a second, and 60 at once.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use leasehold_keys::disk::{self, Existing};
use leasehold_proto::{Amount, Hash, Wall};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::openai::{Fault, Kind};

/// The file's name in the node's directory.
pub const FILE: &str = "api-keys.json";
/// The most keys of one node.
pub const MAX_KEYS: usize = 10_000;
/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;
/// How keys begin, so that they are known for what they are where they are found.
const PREFIX: &str = "lh-";
/// How often what was spent is written.
const WRITE: Duration = Duration::from_secs(1);
/// The most models that a key may name.
const MAX_MODELS: usize = 64;

/// What a key lets its owner do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Whom it is for.
    pub name: String,
    /// Only these models; empty: all.
    #[serde(default)]
    pub models: Vec<String>,
    /// Requests a minute.
    #[serde(default)]
    pub rpm: Option<u32>,
    /// Tokens a minute, both ways.
    #[serde(default)]
    pub tpm: Option<u32>,
    /// Requests at once.
    #[serde(default)]
    pub concurrency: Option<u32>,
    /// What it may cost in all, in billionths of the currency.
    #[serde(default)]
    pub budget: Option<Amount>,
    /// Until when it holds.
    #[serde(default)]
    pub expires: Option<Wall>,
}

/// A key as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// By which it is named: the beginning of its hash.
    pub id: String,
    /// The hash of the key.
    pub hash: Hash,
    /// What it allows.
    #[serde(flatten)]
    pub grant: Grant,
    /// When it was made.
    pub created: Wall,
    /// What was spent with it.
    #[serde(default)]
    pub spent: Amount,
    /// How many requests were answered.
    #[serde(default)]
    pub requests: u64,
    /// How many tokens they took, both ways.
    #[serde(default)]
    pub tokens: u64,
}

/// Why keys are not as they were to be. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What is wanted breaks a rule.
    #[error("{0}")]
    Rule(&'static str),
    /// The operating system has no randomness to give.
    #[error("the operating system gave no randomness")]
    Randomness,
    /// Too many keys.
    #[error("a node has at most {MAX_KEYS} API keys: remove one first")]
    Full,
}

/// The keys of a node. Clones share them.
#[derive(Clone, Debug)]
pub struct Keys {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Held by whoever writes the file, from before it reads what to write: nothing newer is
    /// written over. Taken before `state`, which no request waits for while a disk works.
    writing: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kept: BTreeMap<Hash, Kept>,
    used: BTreeMap<Hash, Used>,
    changed: bool,
}

/// How much of its limits a key has used, as time passes.
#[derive(Debug)]
struct Used {
    at: Instant,
    /// What is left of each bucket, in thousandths.
    requests: i64,
    tokens: i64,
    running: u32,
    /// What those that run may cost at most.
    aside: Amount,
}

fn hash_of(key: &str) -> Hash {
    Hash(blake3::derive_key("leasehold api key 1", key.as_bytes()))
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keys {
    /// The keys in `dir`; none where there is no file yet.
    ///
    /// # Errors
    /// When there is a file and it does not read.
    pub fn open(dir: &Path) -> Result<Self, KeyError> {
        let path = dir.join(FILE);
        let io = |source| KeyError::Io { path: path.clone(), source };
        let list: Vec<Kept> = match std::fs::metadata(&path) {
            Ok(file) if file.len() > MAX_FILE => {
                return Err(io(io::Error::other("it is longer than 16 MiB")));
            }
            Ok(_) => {
                let bytes = std::fs::read(&path).map_err(io)?;
                serde_json::from_slice(&bytes).map_err(|error| io(error.into()))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io(error)),
        };
        let kept = list.into_iter().map(|kept| (kept.hash, kept)).collect();
        let state = Mutex::new(State { kept, ..State::default() });
        Ok(Self { inner: Arc::new(Inner { path, writing: Mutex::default(), state }) })
    }

    /// Every key.
    #[must_use]
    pub fn list(&self) -> Vec<Kept> {
        let mut list: Vec<_> = hold(&self.inner.state).kept.values().cloned().collect();
        list.sort_by(|one, next| (one.created, &one.id).cmp(&(next.created, &next.id)));
        list
    }

    /// Makes a key. The text is shown this once.
    ///
    /// # Errors
    /// When a rule is broken, or it cannot be kept.
    pub fn add(&self, grant: Grant) -> Result<(String, Kept), KeyError> {
        let plain = |text: &str| text.len() <= 128 && !text.chars().any(char::is_control);
        if grant.name.is_empty() || !plain(&grant.name) {
            return Err(KeyError::Rule("a key's name is 1 to 128 printable bytes"));
        }
        if grant.models.len() > MAX_MODELS || !grant.models.iter().all(|name| plain(name)) {
            return Err(KeyError::Rule("a key names at most 64 models"));
        }
        if [grant.rpm, grant.tpm, grant.concurrency].contains(&Some(0)) {
            return Err(KeyError::Rule(
                "a limit of nothing is none: leave it out, or remove the key",
            ));
        }
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|_| KeyError::Randomness)?;
        let key = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(secret));
        let hash = hash_of(&key);
        let id = hash.to_string().chars().take(12).collect();
        let created = clock::now().wall;
        let (spent, requests, tokens) = (Amount::ZERO, 0, 0);
        let kept = Kept { id, hash, grant, created, spent, requests, tokens };
        let writing = hold(&self.inner.writing);
        let mut list = self.list();
        if list.len() >= MAX_KEYS {
            return Err(KeyError::Full);
        }
        list.push(kept.clone());
        self.write(&writing, &list)?;
        hold(&self.inner.state).kept.insert(hash, kept.clone());
        Ok((key, kept))
    }

    /// Removes the key of this id, or name where only one has it. False when there is none.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub fn remove(&self, id: &str) -> Result<bool, KeyError> {
        let writing = hold(&self.inner.writing);
        let mut list = self.list();
        let mut named = list.iter().filter(|kept| kept.id == id || kept.grant.name == id);
        let (Some(hash), None) = (named.next().map(|kept| kept.hash), named.next()) else {
            return Ok(false);
        };
        list.retain(|kept| kept.hash != hash);
        self.write(&writing, &list)?;
        let mut state = hold(&self.inner.state);
        state.kept.remove(&hash);
        state.used.remove(&hash);
        Ok(true)
    }

    fn write(&self, _: &MutexGuard<'_, ()>, list: &[Kept]) -> Result<(), KeyError> {
        let path = &self.inner.path;
        let io = |source| KeyError::Io { path: path.clone(), source };
        let bytes = serde_json::to_vec_pretty(list).map_err(|error| io(error.into()))?;
        disk::write_atomic(path, &bytes, 0o600, Existing::Replace)
            .map_err(|error| io(io::Error::other(error)))
    }

    /// Writes what was spent, as long as the node runs and once when it stops.
    pub(crate) async fn keep(self, shutdown: CancellationToken) {
        loop {
            let stopping = tokio::select! {
                () = shutdown.cancelled() => true,
                () = tokio::time::sleep(WRITE) => false,
            };
            let keys = self.clone();
            let write = move || {
                let writing = hold(&keys.inner.writing);
                let changed = std::mem::take(&mut hold(&keys.inner.state).changed);
                if changed && let Err(error) = keys.write(&writing, &keys.list()) {
                    hold(&keys.inner.state).changed = true;
                    tracing::warn!(%error, "what API keys have spent cannot be kept");
                }
            };
            let _ = tokio::task::spawn_blocking(write).await;
            if stopping {
                return;
            }
        }
    }

    /// Who asks.
    ///
    /// # Errors
    /// 401 when the key is not one, or expired.
    pub fn find(&self, key: &str) -> Result<Hash, Fault> {
        let hash = hash_of(key);
        let state = hold(&self.inner.state);
        let kept = state.kept.get(&hash).ok_or_else(Fault::wrong_key)?;
        if kept.grant.expires.is_some_and(|until| until < clock::now().wall) {
            return Err(Fault::wrong_key());
        }
        Ok(hash)
    }

    /// Whether a key may ask this model.
    #[must_use]
    pub fn allows(&self, key: &Hash, model: &str) -> bool {
        let state = hold(&self.inner.state);
        let kept = state.kept.get(key);
        kept.is_some_and(|kept| {
            kept.grant.models.is_empty() || kept.grant.models.iter().any(|name| name == model)
        })
    }

    /// Lets one request of a key in, with about so many tokens and a cost of at most `worst`, or says
    /// why not. The last one may go beyond the key's budget; those beside it count with their worst.
    ///
    /// # Errors
    /// 401, 402, 403 or 429.
    pub fn enter(
        &self,
        key: &Hash,
        models: &[&str],
        (tokens, worst): (u64, Amount),
    ) -> Result<Entered, Fault> {
        if let Some(model) = models.iter().find(|model| !self.allows(key, model)) {
            return Err(Fault::forbidden(format!("This key may not use the model '{model}'.")));
        }
        let now = Instant::now();
        let mut state = hold(&self.inner.state);
        let State { kept, used, .. } = &mut *state;
        let kept = kept.get(key).ok_or_else(Fault::wrong_key)?;
        let Grant { rpm, tpm, concurrency, budget, .. } = kept.grant;
        let aside = used.get(key).map_or(Amount::ZERO, |used| used.aside);
        if let Some(budget) = budget
            && kept.spent.plus(aside) >= budget
        {
            return Err(if kept.spent >= budget {
                Fault::budget_spent("The budget of this key is spent.")
            } else {
                let why = "What is left of this key's budget is set aside for requests under way.";
                Fault::rate_limit(Kind::Requests, why, Duration::from_secs(1))
            });
        }
        let used = used.entry(*key).or_insert_with(|| Used {
            at: now,
            requests: full(rpm),
            tokens: full(tpm),
            running: 0,
            aside: Amount::ZERO,
        });
        used.pass(now, rpm, tpm);
        let wait = |missing: i64, limit: u32| {
            let ms = missing.max(0).saturating_mul(60) / i64::from(limit.max(1));
            Duration::from_millis(u64::try_from(ms).unwrap_or(0).max(1))
        };
        if let Some(limit) = rpm.filter(|_| used.requests < 1_000) {
            let why = format!("This key may make {limit} requests a minute.");
            return Err(Fault::rate_limit(Kind::Requests, why, wait(1_000 - used.requests, limit)));
        }
        let wanted = i64::try_from(tokens).unwrap_or(i64::MAX / 2_000).saturating_mul(1_000);
        // One that is larger than the whole bucket goes when that is full.
        let wanted = wanted.min(full(tpm));
        if let Some(limit) = tpm.filter(|_| used.tokens < wanted) {
            let why = format!("This key may use {limit} tokens a minute.");
            return Err(Fault::rate_limit(Kind::Tokens, why, wait(wanted - used.tokens, limit)));
        }
        if concurrency.is_some_and(|most| used.running >= most) {
            let why = format!("This key may have {} requests at once.", used.running);
            return Err(Fault::rate_limit(Kind::Requests, why, Duration::from_secs(1)));
        }
        used.requests -= 1_000;
        used.tokens -= wanted;
        used.running += 1;
        used.aside = used.aside.plus(worst);
        let limits = Limits::of(used, rpm, tpm);
        Ok(Entered {
            keys: self.clone(),
            key: *key,
            taken: wanted,
            aside: worst,
            charged: false,
            limits,
        })
    }
}

/// A full bucket.
fn full(limit: Option<u32>) -> i64 {
    limit.map_or(i64::MAX / 4, |limit| i64::from(limit).saturating_mul(1_000))
}

impl Used {
    /// The buckets fill as time passes.
    fn pass(&mut self, now: Instant, rpm: Option<u32>, tpm: Option<u32>) {
        let passed = now.saturating_duration_since(self.at);
        let ms = i64::try_from(passed.as_millis()).unwrap_or(i64::MAX).min(60_000);
        if ms == 0 {
            return;
        }
        self.at = now;
        for (bucket, limit) in [(&mut self.requests, rpm), (&mut self.tokens, tpm)] {
            // A limit of n a minute is n thousandths in 60 ms.
            let more = limit.map_or(0, |limit| i64::from(limit).saturating_mul(ms) / 60);
            *bucket = bucket.saturating_add(more).min(full(limit));
        }
    }
}

/// How a key's limits stand, as the headers of an answer say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests: a minute, left, and in how long all are there again.
    pub requests: Option<(u32, u32, Duration)>,
    /// Tokens, likewise.
    pub tokens: Option<(u32, u32, Duration)>,
}

impl Limits {
    fn of(used: &Used, rpm: Option<u32>, tpm: Option<u32>) -> Self {
        let stand = |left: i64, limit: Option<u32>| {
            let limit = limit?;
            let missing = u64::try_from(full(Some(limit)) - left).unwrap_or(0);
            let reset = Duration::from_millis(missing * 60 / u64::from(limit.max(1)));
            Some((limit, u32::try_from(left.max(0) / 1_000).unwrap_or(u32::MAX), reset))
        };
        Self { requests: stand(used.requests, rpm), tokens: stand(used.tokens, tpm) }
    }
}

/// A request of a key that was let in. When it is dropped it counts no more as running.
#[derive(Debug)]
pub struct Entered {
    keys: Keys,
    key: Hash,
    taken: i64,
    aside: Amount,
    charged: bool,
    /// How the limits stood then.
    pub limits: Limits,
}

impl Entered {
    /// What the request came to.
    pub fn charge(&mut self, tokens: u64, cost: Amount) {
        self.charged = true;
        let mut state = hold(&self.keys.inner.state);
        if let Some(used) = state.used.get_mut(&self.key) {
            let really = i64::try_from(tokens).unwrap_or(i64::MAX / 2_000).saturating_mul(1_000);
            used.tokens = used.tokens.saturating_add(self.taken).saturating_sub(really);
            self.taken = really;
        }
        if let Some(kept) = state.kept.get_mut(&self.key) {
            kept.spent = kept.spent.plus(cost);
            kept.requests += 1;
            kept.tokens = kept.tokens.saturating_add(tokens);
            state.changed = true;
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = hold(&self.keys.inner.state);
        if let Some(used) = state.used.get_mut(&self.key) {
            used.running = used.running.saturating_sub(1);
            // What came to nothing took no tokens.
            if !self.charged {
                used.tokens = used.tokens.saturating_add(self.taken);
            }
            used.aside = Amount(used.aside.0.saturating_sub(self.aside.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(name: &str) -> Grant {
        Grant { name: name.into(), ..Grant::default() }
    }

    #[test]
    fn a_key_is_shown_once_and_known_after_a_restart() {
        let room = tempfile::tempdir().expect("room");
        let keys = Keys::open(room.path()).expect("opens");
        let (key, kept) = keys.add(grant("ada")).expect("made");
        let file = std::fs::read_to_string(room.path().join(FILE)).expect("reads");
        assert!(key.starts_with(PREFIX) && !file.contains(&key), "only its hash is kept");
        let again = Keys::open(room.path()).expect("opens");
        assert_eq!((again.find(&key).ok(), again.list()), (Some(kept.hash), vec![kept.clone()]));
        assert_eq!(again.find("lh-other").expect_err("unknown").status, 401);
        assert!(again.remove(&kept.id).expect("removed") && !again.remove("ada").expect("gone"));
        assert!(Keys::open(room.path()).expect("opens").list().is_empty());
    }

    #[test]
    fn requests_under_way_count_with_their_worst() {
        let room = tempfile::tempdir().expect("room");
        let keys = Keys::open(room.path()).expect("opens");
        let (key, _) = keys.add(Grant { budget: Some(Amount(100)), ..grant("ada") }).expect("made");
        let hash = keys.find(&key).expect("known");
        let mut one = keys.enter(&hash, &["m"], (1, Amount(60))).expect("all is left");
        let two = keys.enter(&hash, &["m"], (1, Amount(60))).expect("some is left");
        let busy = keys.enter(&hash, &["m"], (1, Amount(1))).expect_err("all is set aside");
        assert_eq!(busy.status, 429, "later there may be some again");
        drop(two);
        one.charge(1, Amount(40));
        drop(one);
        let last = keys.enter(&hash, &["m"], (1, Amount(900))).expect("60 are left");
        drop(last);
        keys.enter(&hash, &["m"], (1, Amount(1))).expect("nothing was charged for it");
    }

    #[tokio::test]
    async fn what_was_spent_is_kept_and_ends_a_budget() {
        let room = tempfile::tempdir().expect("room");
        let keys = Keys::open(room.path()).expect("opens");
        let budget = Some(Amount(100));
        let (key, _) = keys.add(Grant { budget, ..grant("ada") }).expect("made");
        let hash = keys.find(&key).expect("known");
        keys.enter(&hash, &["m"], (10, Amount::ZERO)).expect("let in").charge(10, Amount(60));
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        keys.clone().keep(shutdown).await;
        let keys = Keys::open(room.path()).expect("opens");
        assert_eq!(keys.list()[0].spent, Amount(60));
        keys.enter(&hash, &["m"], (10, Amount::ZERO)).expect("some is left").charge(10, Amount(60));
        assert_eq!(
            keys.enter(&hash, &["m"], (10, Amount::ZERO)).expect_err("it is spent").status,
            402
        );
    }

    #[test]
    fn limits_hold_and_say_when_to_come_again() {
        let room = tempfile::tempdir().expect("room");
        let keys = Keys::open(room.path()).expect("opens");
        let (key, _) = keys
            .add(Grant {
                models: vec!["m".into()],
                rpm: Some(3),
                concurrency: Some(2),
                ..grant("a")
            })
            .expect("made");
        let hash = keys.find(&key).expect("known");
        assert_eq!(
            keys.enter(&hash, &["n"], (1, Amount::ZERO)).expect_err("another model").status,
            403
        );
        let first = keys.enter(&hash, &["m"], (1, Amount::ZERO)).expect("let in");
        assert_eq!(first.limits.requests.map(|(limit, left, _)| (limit, left)), Some((3, 2)));
        let second = keys.enter(&hash, &["m"], (1, Amount::ZERO)).expect("let in");
        let third = keys.enter(&hash, &["m"], (1, Amount::ZERO)).expect_err("two at once");
        assert_eq!((third.status, third.kind), (429, Kind::Requests));
        drop((first, second));
        drop(keys.enter(&hash, &["m"], (1, Amount::ZERO)).expect("let in"));
        let fourth = keys.enter(&hash, &["m"], (1, Amount::ZERO)).expect_err("three a minute");
        let wait = fourth.retry_after.expect("it says when");
        assert!((Duration::from_secs(15)..=Duration::from_secs(20)).contains(&wait), "{wait:?}");

        let (key, _) = keys.add(Grant { tpm: Some(1_000), ..grant("b") }).expect("made");
        let hash = keys.find(&key).expect("known");
        let mut large = keys.enter(&hash, &["m"], (5_000, Amount::ZERO)).expect("the whole bucket");
        large.charge(400, Amount::ZERO);
        let under_way = keys.enter(&hash, &["m"], (500, Amount::ZERO)).expect("some is left");
        assert_eq!(under_way.limits.requests, None);
        let refused = keys.enter(&hash, &["m"], (500, Amount::ZERO)).expect_err("too many");
        assert_eq!((refused.status, refused.kind), (429, Kind::Tokens));
        // What came to nothing took no tokens.
        drop(under_way);
        assert!(keys.enter(&hash, &["m"], (500, Amount::ZERO)).is_ok());
        assert!(keys.add(Grant { rpm: Some(0), ..grant("c") }).is_err());
    }
}
