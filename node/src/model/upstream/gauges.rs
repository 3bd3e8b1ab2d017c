//! What an upstream says of itself at `/metrics`, in Prometheus' text format.
//!
//! Only the few lines that say how busy it is are looked at: vLLM's and llama-server's.

/// How busy an upstream says it is. What it does not say is None.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Requests being answered.
    pub running: Option<u64>,
    /// Requests that wait.
    pub waiting: Option<u64>,
    /// How full the memory for prompts is, in thousandths.
    pub cache_used: Option<u64>,
    /// Tokens of prompts that were looked for in the cache, since it started.
    pub cache_queries: Option<u64>,
    /// Tokens of prompts that were found there, since it started.
    pub cache_hits: Option<u64>,
    /// Tokens produced in a second, as llama-server averages them.
    pub tokens_per_second: Option<u64>,
}

impl Gauges {
    /// Reads them. None when nothing is there that is known.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let mut this = Self::default();
        for line in text.lines() {
            let Some((name, value)) = sample(line) else { continue };
            // Several lines of one name are several engines behind one server.
            match name {
                "vllm:num_requests_running" | "llamacpp:requests_processing" => {
                    add(&mut this.running, value);
                }
                "vllm:num_requests_waiting" | "llamacpp:requests_deferred" => {
                    add(&mut this.waiting, value);
                }
                "vllm:kv_cache_usage_perc"
                | "vllm:gpu_cache_usage_perc"
                | "llamacpp:kv_cache_usage_ratio" => {
                    let fuller = this.cache_used.unwrap_or(0).max((value * 1_000.0) as u64);
                    this.cache_used = Some(fuller.min(1_000));
                }
                "vllm:prefix_cache_queries_total"
                | "vllm:prefix_cache_queries"
                | "vllm:gpu_prefix_cache_queries_total"
                | "vllm:gpu_prefix_cache_queries" => add(&mut this.cache_queries, value),
                "vllm:prefix_cache_hits_total"
                | "vllm:prefix_cache_hits"
                | "vllm:gpu_prefix_cache_hits_total"
                | "vllm:gpu_prefix_cache_hits" => add(&mut this.cache_hits, value),
                // llama-server counts what it had to read apart from what it knew.
                "llamacpp:prompt_tokens_total" => add(&mut this.cache_queries, value),
                "llamacpp:prompt_tokens_cached_total" => {
                    add(&mut this.cache_queries, value);
                    add(&mut this.cache_hits, value);
                }
                "llamacpp:predicted_tokens_seconds" => add(&mut this.tokens_per_second, value),
                _ => {}
            }
        }
        (this != Self::default()).then_some(this)
    }
}

fn add(sum: &mut Option<u64>, value: f64) {
    *sum = Some(sum.unwrap_or(0).saturating_add(value as u64));
}

/// A line's name and value. What is no number, or below zero, is no line.
fn sample(line: &str) -> Option<(&str, f64)> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let name_ends = line.find(|char: char| char == '{' || char.is_whitespace())?;
    let (name, rest) = line.split_at(name_ends);
    // Labels are not looked at; their values may hold anything but the last brace.
    let rest = match rest.starts_with('{') {
        true => rest.get(rest.rfind('}')? + 1..)?,
        false => rest,
    };
    let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::dice::Dice;

    #[test]
    fn both_dialects_are_read() {
        let vllm = r#"
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a } b"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 2.0 1764367918
vllm:num_requests_waiting{engine="0"} 7.0
vllm:kv_cache_usage_perc{engine="0"} 0.254
vllm:kv_cache_usage_perc{engine="1"} 0.5
vllm:prefix_cache_queries_total{engine="0"} 1.2e+06
vllm:prefix_cache_hits_total{engine="0"} 300000.0
vllm:prefix_cache_hits_created{engine="0"} 1.76e+09
"#;
        let read = Gauges::read(vllm).unwrap();
        let expected = Gauges {
            running: Some(5),
            waiting: Some(7),
            cache_used: Some(500),
            cache_queries: Some(1_200_000),
            cache_hits: Some(300_000),
            tokens_per_second: None,
        };
        assert_eq!(read, expected);
        let llama = "llamacpp:predicted_tokens_seconds 81.3\r\nllamacpp:requests_processing 1\n\
                     llamacpp:requests_deferred 0\nllamacpp:prompt_tokens_total 33\n\
                     llamacpp:prompt_tokens_cached_total 31\n";
        let read = Gauges::read(llama).unwrap();
        assert_eq!((read.cache_queries, read.cache_hits), (Some(64), Some(31)));
        assert_eq!((read.tokens_per_second, read.running), (Some(81), Some(1)));
        assert_eq!(read.waiting, Some(0));
    }

    #[test]
    fn nonsense_says_nothing() {
        for text in [
            "",
            "{}{}{}",
            "\0\n}{ 1\nvllm:num_requests_running",
            "vllm:num_requests_running NaN",
            "vllm:num_requests_running -1",
            "vllm:num_requests_running{a=\"",
            "vllm:num_requests_running{a=\"} } x",
            "<html>",
        ] {
            assert_eq!(Gauges::read(text), None, "{text:?}");
        }
        let mut dice = Dice::new(3);
        for _ in 0..4_000 {
            let mut text = b"vllm:num_requests_running{a=\"} b\"} 3.0 1\n# x\nb 1e3\n".to_vec();
            dice.damage(&mut text);
            let _ = Gauges::read(&String::from_utf8_lossy(&text));
        }
        let huge = Gauges::read("vllm:num_requests_running 1e300").unwrap();
        assert_eq!(huge.running, Some(u64::MAX));
    }
}
