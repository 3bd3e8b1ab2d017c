//! Durations and times as people type them, and foreign text as it is safe to show.

use leasehold_proto::{Span, Wall};

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no duration: expected a number and a unit, such as 500ms, 90s, 10m, 12h or 30d")]
pub struct ParseSpanError(String);

/// Why a text is no time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no time: expected UTC as 2026-11-24T00:00:00Z, or milliseconds since 1970")]
pub struct ParseWallError(String);

fn clipped(text: &str) -> String {
    shown(&text.chars().take(40).collect::<String>())
}

/// Reads a duration: a whole number followed by `ms`, `s`, `m`, `h` or `d`.
///
/// # Errors
/// When the text is anything else, or longer than 2^64 ms.
pub fn span(text: &str) -> Result<Span, ParseSpanError> {
    let wrong = || ParseSpanError(clipped(text));
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(ms).map(Span::millis).ok_or_else(wrong)
}

/// Reads an instant: UTC as RFC 3339 writes it with a `Z`, or milliseconds since 1970.
///
/// # Errors
/// When the text is anything else, or names no day of the calendar.
pub fn wall(text: &str) -> Result<Wall, ParseWallError> {
    let wrong = || ParseWallError(clipped(text));
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map(Wall).map_err(|_| wrong());
    }
    let shape = b"dddd-dd-ddTdd:dd:ddZ";
    let fits = text.len() == shape.len()
        && text.bytes().zip(shape).all(|(byte, form)| match form {
            b'd' => byte.is_ascii_digit(),
            other => byte == *other,
        });
    if !fits {
        return Err(wrong());
    }
    let number = |from: usize, to: usize| {
        text.get(from..to).and_then(|digits| digits.parse::<u64>().ok()).ok_or_else(wrong)
    };
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 if leap => 29,
        2 => 28,
        _ => return Err(wrong()),
    };
    if year < 1970 || !(1..=days).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return Err(wrong());
    }
    // Howard Hinnant's days_from_civil, for years from 1970 on.
    let y = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (y / 400, y % 400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let of_era = of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    let day = era * 146_097 + of_era - 719_468;
    Ok(Wall((((day * 24 + hour) * 60 + minute) * 60 + second) * 1000))
}

/// Whether `c` can change how a terminal shows what follows or what stands around it: controls,
/// and the marks that reorder text or have no width (Unicode TR 36).
#[must_use]
pub fn is_hostile(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// `text` as it is safe to show: whatever could move the cursor or reorder text is replaced.
#[must_use]
pub fn shown(text: &str) -> String {
    text.chars().map(|c| if is_hostile(c) { '\u{fffd}' } else { c }).collect()
}

/// JSON as it is safe to show: the same characters are written as escapes, which changes nothing
/// for who parses it (outside strings, JSON holds none of them but its own line ends).
#[must_use]
pub fn json(value: &serde_json::Value) -> String {
    use std::fmt::Write as _;
    let plain = value.to_string();
    let mut safe = String::with_capacity(plain.len());
    for c in plain.chars() {
        if is_hostile(c) {
            let mut units = [0u16; 2];
            for unit in c.encode_utf16(&mut units) {
                // Writing to a string cannot fail.
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

/// What went wrong and why, down to the first cause. A cause that the words before it already quote
/// is not said twice.
#[must_use]
pub fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut said = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !said.contains(&words) {
            said.push_str(": ");
            said.push_str(&words);
        }
        next = cause.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read() {
        for (text, ms) in
            [("0s", 0), ("500ms", 500), ("90s", 90_000), ("10m", 600_000), ("30d", 2_592_000_000)]
        {
            assert_eq!(span(text), Ok(Span(ms)), "{text}");
        }
        for text in ["", "1", "s", "-1s", "1.5h", "1 h", "1w", "99999999999999999999s", "1é"] {
            assert!(span(text).is_err(), "{text}");
        }
        assert!(span("18446744073709551615d").is_err(), "too long");
    }

    #[test]
    fn times_read_as_they_print() {
        for ms in [0, 951_782_400_000, 1_795_564_799_000, 4_107_542_400_000] {
            assert_eq!(wall(&Wall(ms).to_string()), Ok(Wall(ms)));
            assert_eq!(wall(&ms.to_string()), Ok(Wall(ms)));
        }
        let day = 86_400_000;
        for n in (0..60_000).step_by(17) {
            assert_eq!(wall(&Wall(n * day).to_string()), Ok(Wall(n * day)), "day {n}");
        }
        for text in [
            "",
            "now",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01 00:00:00Z",
            "1969-12-31T23:59:59Z",
            "2026-01-00T00:00:00Z",
            "2026-04-31T00:00:00Z",
            "99999999999999999999999",
            "２０２６-01-01T00:00:00Z",
        ] {
            assert!(wall(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nothing_that_is_shown_can_steer_a_terminal() {
        let evil = "a\x1b[2Jb\rc\u{9b}d\u{202e}e\u{200b}f\u{7f}";
        assert_eq!(shown(evil), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d\u{fffd}e\u{fffd}f\u{fffd}");
        let value = serde_json::json!({ evil: [evil, "\u{e0041}"] });
        let text = json(&value);
        assert!(!text.chars().any(is_hostile), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), value);
    }
}
