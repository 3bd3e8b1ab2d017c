//! Quantities as people write them, in configuration, on the command line and in the API's JSON:
//! `1.5` cores, `256M`, `60s`, `0.05/h`.

use leasehold_proto::{Amount, Span, Wall};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Reads CPU cores (`2`, `1.5`, `500m`) as thousandths of a core.
///
/// # Errors
/// What was expected.
pub fn cpu(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no number of cores: expected 2, 1.5 or 500m");
    if let Some(milli) = text.strip_suffix('m') {
        return milli.parse().map_err(|_| wrong());
    }
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(part) || part.len() > 3 {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let part: u64 = format!("{part:0<3}").parse().map_err(|_| wrong())?;
    whole.checked_mul(1000).and_then(|milli| milli.checked_add(part)).ok_or_else(wrong)
}

/// Reads bytes (`4096`, `256M`, `1.5G`, `2TiB`); K, M, G and T are binary, as in memory.
///
/// # Errors
/// What was expected.
pub fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size: expected 4096, 256M, 1.5G or 2TiB");
    let digits = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || part.len() > 6 || part.contains('.') {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let millionths: u64 = format!("{part:0<6}").parse().map_err(|_| wrong())?;
    let exact = (u128::from(whole) * 1_000_000 + u128::from(millionths)) << shift;
    u64::try_from(exact / 1_000_000).map_err(|_| wrong())
}

/// Reads a span of time (`500ms`, `60s`, `10m`, `1h`, `7d`).
///
/// # Errors
/// What was expected.
pub fn span(text: &str) -> Result<Span, String> {
    let wrong = || format!("'{text}' is no time: expected 500ms, 60s, 10m, 1h or 7d");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(factor).map(Span).ok_or_else(wrong)
}

/// Reads by when something is to be: in what time from now (`30m`), or an instant as RFC 3339
/// writes it (`2026-11-24T22:00:00Z`), which must lie ahead of `now`.
///
/// # Errors
/// What was expected.
pub fn by(text: &str, now: Wall) -> Result<Span, String> {
    let Ok(instant) = OffsetDateTime::parse(text, &Rfc3339) else {
        return span(text).map_err(|_| {
            format!(
                "'{text}' is no time: expected 60s, 10m or 1h from now, or 2026-11-24T22:00:00Z"
            )
        });
    };
    let ms = instant.unix_timestamp_nanos() / 1_000_000;
    let ahead = ms.checked_sub(now.0.into()).and_then(|ms| u64::try_from(ms).ok());
    ahead.map(Span).ok_or_else(|| format!("{text} is past"))
}

/// Reads a share of a price (`10%`, `12.5%`) as thousandths, at most all of it.
///
/// # Errors
/// What was expected.
pub fn share(text: &str) -> Result<u16, String> {
    let wrong = || format!("'{text}' is no share: expected 10% or 12.5%, at most 100%");
    let number = text.strip_suffix('%').ok_or_else(wrong)?;
    let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |s: &str, most: usize| {
        !s.is_empty() && s.len() <= most && s.bytes().all(|b| b.is_ascii_digit())
    };
    if !digits(whole, 3) || !digits(tenth, 1) {
        return Err(wrong());
    }
    let read = |s: &str| s.parse::<u16>().map_err(|_| wrong());
    let permille = read(whole)? * 10 + read(tenth)?;
    if permille > 1000 { Err(wrong()) } else { Ok(permille) }
}

/// Reads a price or an amount (`0.05`, `0.05/h`).
///
/// # Errors
/// What was expected.
pub fn price(text: &str) -> Result<Amount, String> {
    amount(text.strip_suffix("/h").unwrap_or(text))
}

/// An amount in all: `"0.01"`.
///
/// # Errors
/// What is wrong with it.
pub fn amount(text: &str) -> Result<Amount, String> {
    if text.ends_with("/h") {
        return Err("this is an amount in all, not one per hour".into());
    }
    text.parse().map_err(|error: leasehold_proto::ParseAmountError| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_write_it_so() {
        assert_eq!(["2", "1.5", "500m", "0.001"].map(cpu), [2000, 1500, 500, 1].map(Ok));
        assert_eq!(
            ["4096", "256M", "1.5G", "2TiB", "1k"].map(bytes),
            [4096, 256 << 20, 3 << 29, 2 << 40, 1024].map(Ok)
        );
        assert_eq!(
            ["500ms", "60s", "10m", "1h", "7d"].map(span),
            [500, 60_000, 600_000, 3_600_000, 604_800_000].map(|ms| Ok(Span(ms)))
        );
        assert_eq!(price("0.05/h"), Ok(Amount(50_000_000)));
        assert_eq!(["0%", "10%", "12.5%", "100%"].map(share), [0, 100, 125, 1000].map(Ok));
    }

    #[test]
    fn by_when_is_from_now_on_or_an_instant_ahead() {
        // 2026-11-24T22:00:00Z, half an hour before.
        let now = Wall(1_795_557_600_000 - 1_800_000);
        for text in
            ["30m", "2026-11-24T22:00:00Z", "2026-11-24T23:00:00+01:00", "2026-11-24T22:00:00.000Z"]
        {
            assert_eq!(by(text, now), Ok(Span(1_800_000)), "{text}");
        }
        for past in ["2026-11-24T21:29:59Z", "1969-01-01T00:00:00Z"] {
            assert!(by(past, now).expect_err(past).contains("past"));
        }
        for text in ["", "22:00", "2026-11-24", "2026-13-24T22:00:00Z", "tomorrow", "-5m"] {
            assert!(by(text, now).expect_err(text).contains("expected"), "{text}");
        }
    }

    #[test]
    fn nonsense_says_what_was_expected() {
        for text in ["", "-1", "1.2.3", "1.0001", "x", "99999999999999999999"] {
            assert!(cpu(text).expect_err(text).contains("expected"));
        }
        for text in ["", "M", "1X", "-1M", "1..2G", "99999999999T"] {
            assert!(bytes(text).expect_err(text).contains("expected"));
        }
        for text in ["", "10", "%", "-1%", "100.1%", "1.25%", "9999%"] {
            assert!(share(text).expect_err(text).contains("expected"));
        }
        for text in ["", "s", "1", "1.5h", "99999999999999999d"] {
            assert!(span(text).expect_err(text).contains("expected"));
        }
    }
}
