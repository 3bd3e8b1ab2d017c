//! `leasehold model replay`: a sample of what was answered, asked once more of the same model here.
//!
//! An answer is the same each time only where nothing was left to chance: with the temperature at
//! nothing, or with a seed, on the same weights and the same engine. So a match says that the answer is
//! that of the model that was named, and a mismatch that it is not, or came from another engine: another
//! version, or a processor with other kernels.
//!
//! Tokens are counted once more as well: both ways where the answer is the same, and those of the prompt
//! also where the answer was left to chance. Here is the tokenizer that an entry node need not have, so
//! what was inflated within the bounds that it agrees to is found.

use std::path::PathBuf;

use clap::Args;
use leasehold_keys::armor::{self, Item};
use leasehold_keys::exit::Exit;
use leasehold_keys::judge;
use leasehold_proto::LeaseId;
use leasehold_proto::proof::Proof;
use leasehold_proto::words::model::{Endpoint, Finish, Served, Service};
use leasehold_proto::words::object::body_in;
use serde_json::{Value, json};

use super::{Failure, Session};
use crate::api::body::NodeInfo;
use crate::api::model::ModelLines;
use crate::transcript::Transcript;

/// How many requests are replayed where nothing is said.
const SAMPLE: usize = 8;

/// Ask a sample of a lease's requests again of the same model here, and compare.
#[derive(Debug, Args)]
pub(super) struct Replay {
    /// The lease, as `leasehold lease export` wrote it
    proof: PathBuf,
    /// Where the node kept what was asked and answered (models.transcripts)
    #[arg(long, value_name = "DIR")]
    transcripts: PathBuf,
    /// Only this request
    #[arg(long, value_name = "N")]
    number: Option<u64>,
    /// How many, spread evenly
    #[arg(long, value_name = "N", default_value_t = SAMPLE)]
    sample: usize,
}

/// What a replay says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// The answer is the same, and so are the tokens both ways.
    Match,
    /// The answer is another one.
    Mismatch,
    /// The tokens are not as many as the record says.
    Counts,
    /// The answer was left to chance; the tokens of the prompt are as many.
    Counted,
    /// Whoever asked hung up, and nobody knows where it would have ended; the tokens of the prompt are no
    /// more than they should be.
    HungUp,
    /// What it was asked for, `/v1/responses`, no embedded engine answers.
    Apart,
    /// What was kept is not there, or not what the record is about.
    NoTranscript,
}

impl Found {
    const fn word(self) -> &'static str {
        match self {
            Self::Match => "match",
            Self::Mismatch => "mismatch",
            Self::Counts => "other counts",
            Self::Counted => "left to chance, prompt counted alike",
            Self::HungUp => "broken off by whoever asked",
            Self::Apart => "not replayed",
            Self::NoTranscript => "no transcript",
        }
    }
}

impl Replay {
    pub(super) async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let items = armor::read_objects(&self.proof)?;
        let [Item::Proof(proof)] = items.as_slice() else {
            return Err(Failure::say(Exit::Usage, "the file does not hold one proof of a lease"));
        };
        let verdict = judge::proof(proof, None)
            .map_err(|why| Failure::say(Exit::No, format!("the proof does not hold: {why}")))?;
        let model = verdict.model.as_ref().ok_or_else(|| {
            Failure::say(Exit::Usage, "the lease is not on a model: there is nothing to replay")
        })?;
        let here: ModelLines = session.client.get("/v1/catalog").await?;
        let digest = model.digest.to_string();
        let here = here.models.into_iter().find(|known| known.digest == digest);
        let here = here.ok_or_else(|| {
            let message = format!(
                "this node does not have the model '{}' with the digest {digest}: add it first",
                model.name
            );
            Failure::say(Exit::No, message)
        })?;
        let node: NodeInfo = session.client.get("/v1/node").await?;
        let mut lines = Vec::new();
        for served in chosen(proof, self.number, self.sample) {
            let found =
                self.replay(session, &verdict.lease, &served, (&here.name, &node.id)).await?;
            session.out.tell(&format!("request {}: {}", served.number, found.word()));
            lines.push((served.number, found));
        }
        let count = |of: Found| lines.iter().filter(|(_, found)| *found == of).count();
        let counted = count(Found::Counted);
        let (same, other, counts) =
            (count(Found::Match), count(Found::Mismatch), count(Found::Counts));
        let objects: Vec<Value> = lines
            .iter()
            .map(|(number, found)| json!({ "number": number, "found": found.word() }))
            .collect();
        let object = json!({
            "lease": verdict.lease.to_string(), "model": model.name, "digest": digest,
            "matches": same, "mismatches": other, "other_counts": counts, "counted": counted,
            "requests": objects,
        });
        session.out.answer(&object, || {
            let more =
                if counted > 0 { format!(", {counted} counted alike") } else { String::new() };
            format!("{same} match{more}, {other} do not, {counts} have other counts\n")
        })?;
        // Nothing that could be compared is no yes.
        Ok(if other + counts == 0 && same + counted > 0 { Exit::Ok } else { Exit::No })
    }

    async fn replay(
        &self,
        session: &Session,
        lease: &LeaseId,
        served: &Served,
        (model, node): (&str, &str),
    ) -> Result<Found, Failure> {
        let service = &served.service;
        let greedy = service.sampling.temperature_permille == Some(0);
        let embeds = service.endpoint == Endpoint::Embeddings;
        let certain = greedy || service.sampling.seed.is_some() || embeds;
        let hung_up = service.finish != Finish::Answered;
        let certain = certain && !hung_up;
        if service.endpoint == Endpoint::Responses {
            return Ok(Found::Apart);
        }
        let Ok(kept) = Transcript::read(&self.transcripts, lease, served.number) else {
            return Ok(Found::NoTranscript);
        };
        if kept.hashes() != (service.request, service.response) {
            return Ok(Found::NoTranscript);
        }
        let asked = serde_json::from_str::<Value>(&kept.request).ok();
        let Some(Value::Object(mut asked)) = asked else { return Ok(Found::NoTranscript) };
        for apart in ["stream", "stream_options"] {
            asked.remove(apart);
        }
        if !certain {
            // The prompt is counted all the same.
            asked.remove("max_completion_tokens");
            asked.insert("max_tokens".into(), 1.into());
        }
        asked.insert("model".into(), model.into());
        asked.insert("provider".into(), json!({ "only": [node], "allow_fallbacks": false }));
        let again: Value = session.client.post(&kept.path, &Value::Object(asked)).await?;
        let before: Vec<Value> =
            kept.answer.iter().filter_map(|piece| serde_json::from_str(piece).ok()).collect();
        Ok(match compared(service, certain, &before, &again) {
            Found::Counted if hung_up => Found::HungUp,
            other => other,
        })
    }
}

/// What an answer that was asked again says of the record of the first one.
fn compared(service: &Service, certain: bool, before: &[Value], again: &Value) -> Found {
    if certain && said(before) != said(std::slice::from_ref(again)) {
        return Found::Mismatch;
    }
    let usage = &again["usage"];
    let completion = usage["completion_tokens"].as_u64().unwrap_or_default();
    let counted = usage["prompt_tokens"].as_u64();
    // Of what was broken off early nobody may have counted them.
    let prompt = match service.finish {
        Finish::Answered => counted == Some(service.prompt_tokens),
        Finish::HungUp => counted.is_some_and(|counted| service.prompt_tokens <= counted),
    };
    match (prompt, certain) {
        (true, false) => Found::Counted,
        (true, true) if completion == service.completion_tokens => Found::Match,
        _ => Found::Counts,
    }
}

/// The records to replay: one, or some spread evenly.
fn chosen(proof: &Proof, number: Option<u64>, sample: usize) -> Vec<Served> {
    let all = proof.served.iter().filter_map(|signed| body_in::<Served>(&signed.envelope));
    match number {
        Some(number) => all.filter(|served| served.number == number).collect(),
        None => {
            let step = proof.served.len().div_ceil(sample.max(1)).max(1);
            all.step_by(step).collect()
        }
    }
}

/// What an answer says, whether it came in chunks or whole: its text, and its vectors to five digits.
fn said(pieces: &[Value]) -> (String, Vec<String>) {
    let (mut text, mut vectors) = (String::new(), Vec::new());
    for piece in pieces {
        for choice in piece["choices"].as_array().into_iter().flatten() {
            for at in ["/message/content", "/delta/content", "/text"] {
                text.push_str(choice.pointer(at).and_then(Value::as_str).unwrap_or_default());
            }
        }
        for item in piece["data"].as_array().into_iter().flatten() {
            match &item["embedding"] {
                Value::Array(numbers) => vectors.extend(
                    numbers.iter().map(|n| format!("{:.5}", n.as_f64().unwrap_or_default())),
                ),
                other => vectors.push(other.to_string()),
            }
        }
    }
    (text, vectors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_again() {
        let record = Service {
            endpoint: Endpoint::Chat,
            request: leasehold_proto::Hash::default(),
            response: leasehold_proto::Hash::default(),
            sampling: leasehold_proto::words::model::Sampling::default(),
            finish: Finish::Answered,
            prompt_tokens: 10,
            cached_tokens: 0,
            completion_tokens: 4,
        };
        let answer = |text: &str, prompt: u64, completion: u64| {
            json!({ "choices": [{ "message": { "content": text } }],
                "usage": { "prompt_tokens": prompt, "completion_tokens": completion } })
        };
        let before = [answer("good day", 10, 4)];
        for (certain, again, found) in [
            (true, answer("good day", 10, 4), Found::Match),
            (true, answer("bad day", 10, 4), Found::Mismatch),
            (true, answer("good day", 10, 2), Found::Counts),
            (true, answer("good day", 9, 4), Found::Counts),
            (false, answer("bad", 10, 1), Found::Counted),
            (false, answer("bad", 9, 1), Found::Counts),
            (true, json!({ "choices": [{ "message": { "content": "good day" } }] }), Found::Counts),
        ] {
            assert_eq!(compared(&record, certain, &before, &again), found, "{certain} {again}");
        }
    }

    #[test]
    fn an_answer_says_the_same_in_chunks_and_whole() {
        let whole = json!({ "choices": [{ "message": { "content": "good day" } }] });
        let chunk = |text: &str| json!({ "choices": [{ "delta": { "content": text } }] });
        let chunks = [chunk("good"), chunk(" day"), json!({ "choices": [], "usage": {} })];
        assert_eq!(said(&[whole]), said(&chunks));
        let vector = |n: f64| json!({ "data": [{ "embedding": [n] }] });
        assert_eq!(said(&[vector(0.123_451)]), said(&[vector(0.123_449)]));
        assert_ne!(said(&[vector(0.1)]), said(&[vector(0.2)]));
    }
}
