//! Following a job through the node: its output from where it stands, over breaks of the
//! connection and restarts of the node, and the end of its lease.

use std::time::{Duration, Instant};

use leasehold_keys::exit::Exit;
use tokio_util::io::StreamReader;

use super::Failure;
use crate::api::body::EndLine;
use crate::api::error::Code;
use crate::attach::{self, End, Frame};
use crate::client::{Client, ClientError};

/// How long a job is followed while nothing of it can be reached.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries, at first; doubled up to [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_millis(100);
/// Between two tries, at most.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// How long one question for the end waits at the node.
const WAIT: Duration = Duration::from_secs(30);

/// Where output goes.
pub(super) trait Sink {
    /// Takes bytes of standard output.
    fn stdout(&mut self, bytes: &[u8]) -> Result<(), Failure>;
    /// Takes bytes of standard error.
    fn stderr(&mut self, bytes: &[u8]) -> Result<(), Failure>;
}

/// Output kept for a JSON object, up to a limit.
#[derive(Debug, Default)]
pub(super) struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Kept {
    /// The most bytes that are kept of one stream.
    const MAX: usize = 1 << 20;

    pub(super) fn take(&mut self, bytes: &[u8]) {
        let room = Self::MAX - self.bytes.len();
        let fits = bytes.get(..room).unwrap_or(bytes);
        self.truncated |= fits.len() < bytes.len();
        self.bytes.extend_from_slice(fits);
    }

    /// Writes it into `object` as `name`, `name_encoding` and `name_truncated`: as text where it
    /// is UTF-8, else in base64.
    pub(super) fn put(&self, name: &str, object: &mut serde_json::Map<String, serde_json::Value>) {
        use base64::Engine as _;
        let (text, encoding) = match std::str::from_utf8(&self.bytes) {
            Ok(text) => (text.to_string(), "utf-8"),
            // Cut in the middle of a character: the text up to there.
            Err(error) if self.truncated && error.error_len().is_none() => {
                let whole = self.bytes.get(..error.valid_up_to()).unwrap_or_default();
                (String::from_utf8_lossy(whole).into_owned(), "utf-8")
            }
            Err(_) => (base64::engine::general_purpose::STANDARD.encode(&self.bytes), "base64"),
        };
        object.insert(name.into(), text.into());
        object.insert(format!("{name}_encoding"), encoding.into());
        object.insert(format!("{name}_truncated"), self.truncated.into());
    }
}

/// Pauses between tries that fail, until patience is over.
struct Tries {
    since: Instant,
    pause: Duration,
}

impl Tries {
    fn new() -> Self {
        Self { since: Instant::now(), pause: PAUSE }
    }

    /// Waits before the next try; no when that has been long enough.
    async fn again(&mut self) -> bool {
        if self.since.elapsed() > PATIENCE {
            return false;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        true
    }
}

/// Where in a job's output one stands.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    stdout: u64,
    stderr: u64,
}

/// Follows a job to its end. None when its output cannot be had any more: the lease is over.
pub(super) async fn output(
    client: &Client,
    lease: &str,
    sink: &mut (impl Sink + Send),
) -> Result<Option<End>, Failure> {
    let mut place = Place::default();
    let mut tries = Tries::new();
    loop {
        let before = place;
        let why = match once(client, lease, true, &mut place, sink).await? {
            Once::Ended(end) => return Ok(Some(end)),
            Once::Gone => return Ok(None),
            Once::Broken(why) => why.unwrap_or_else(|| "the output broke off".into()),
        };
        if (before.stdout, before.stderr) != (place.stdout, place.stderr) {
            tries = Tries::new();
        }
        if !tries.again().await {
            let message = format!(
                "the job could not be followed for {} s: {why}; unless its lease is \
                 over it goes on: `leasehold lease show {lease}` and `leasehold logs {lease}` tell",
                PATIENCE.as_secs()
            );
            return Err(Failure::say(Exit::Remote, message));
        }
    }
}

/// What there is of a job's output now.
pub(super) async fn so_far(
    client: &Client,
    lease: &str,
    sink: &mut (impl Sink + Send),
) -> Result<Option<End>, Failure> {
    match once(client, lease, false, &mut Place::default(), sink).await? {
        Once::Ended(end) => Ok(Some(end)),
        Once::Broken(None) => Ok(None),
        Once::Gone => {
            let message = "there is no output of this lease any more";
            Err(Failure::say(Exit::No, message))
        }
        Once::Broken(Some(why)) => Err(Failure::say(Exit::Remote, why)),
    }
}

/// How far one try came.
enum Once {
    /// To the job's end.
    Ended(End),
    /// There is nothing to follow.
    Gone,
    /// It broke off.
    Broken(Reason),
}

/// Why it broke off; none when the node ended the body in order.
type Reason = Option<String>;

async fn once(
    client: &Client,
    lease: &str,
    follow: bool,
    place: &mut Place,
    sink: &mut (impl Sink + Send),
) -> Result<Once, Failure> {
    let Place { stdout, stderr } = *place;
    let path = format!("/v1/leases/{lease}/output?stdout={stdout}&stderr={stderr}&follow={follow}");
    let stream = match client.stream(&path, WAIT, None).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.code(), Some(Code::NotFound | Code::Over)) => {
            return Ok(Once::Gone);
        }
        Err(error) if error.may_pass() => return Ok(Once::Broken(Some(error.to_string()))),
        Err(error) => return Err(error.into()),
    };
    let mut reader = StreamReader::new(Box::pin(stream));
    loop {
        match attach::read(&mut reader).await {
            Ok(Some(Frame::Stdout(bytes))) => {
                sink.stdout(&bytes)?;
                place.stdout += bytes.len() as u64;
            }
            Ok(Some(Frame::Stderr(bytes))) => {
                sink.stderr(&bytes)?;
                place.stderr += bytes.len() as u64;
            }
            Ok(Some(Frame::End(end))) => return Ok(Once::Ended(end)),
            Ok(None) => return Ok(Once::Broken(None)),
            Err(error) => return Ok(Once::Broken(Some(error.to_string()))),
        }
    }
}

/// The end of a held lease, once it has one.
pub(super) async fn end(client: &Client, lease: &str) -> Result<EndLine, ClientError> {
    let path = format!("/v1/leases/{lease}/end?timeout_s={}", WAIT.as_secs());
    let mut tries = Tries::new();
    loop {
        match client.get_within::<EndLine>(&path, WAIT).await {
            Ok(line) if line.ended => return Ok(line),
            Ok(_) => tries = Tries::new(),
            Err(error) if error.may_pass() => {
                if !tries.again().await {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(kept: &Kept) -> serde_json::Map<String, serde_json::Value> {
        let mut object = serde_json::Map::new();
        kept.put("stdout", &mut object);
        object
    }

    #[test]
    fn kept_output_is_text_where_it_can_be() {
        let mut kept = Kept::default();
        kept.take("héllo".as_bytes());
        let object = put(&kept);
        assert_eq!(object["stdout"], "héllo");
        assert_eq!(object["stdout_encoding"], "utf-8");
        assert_eq!(object["stdout_truncated"], false);
        kept.take(&[0xff]);
        assert_eq!(put(&kept)["stdout_encoding"], "base64");
    }

    #[test]
    fn kept_output_is_bounded_and_says_so() {
        let mut kept = Kept::default();
        kept.take("é".repeat(Kept::MAX / 2 - 1).as_bytes());
        kept.take("xé".as_bytes());
        let object = put(&kept);
        assert_eq!(object["stdout_truncated"], true);
        assert_eq!(object["stdout_encoding"], "utf-8", "a cut character is no binary");
        kept.take(b"more");
        assert_eq!(kept.bytes.len(), Kept::MAX);
    }
}
