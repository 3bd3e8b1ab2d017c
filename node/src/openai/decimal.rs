//! Decimal figures of money, read and written exactly: integers of billionths, never floats.

use std::fmt;

use thiserror::Error;

/// Digits after the point that a billionth has.
const BILLIONTHS: u32 = 9;
/// The longest decimal that is read.
const LONGEST: usize = 64;

/// Why a decimal is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecimalError {
    /// It is no decimal number.
    #[error("not a decimal number")]
    Malformed,
    /// It is below zero.
    #[error("must not be negative")]
    Negative,
    /// It is more than can be counted, which is about 18 billion.
    #[error("too large")]
    TooLarge,
}

/// Reads a decimal such as `0.15`, `1e-7` or `3` as billionths. What is finer than a billionth is
/// cut off, which leaves a maximum what it was: prices are whole billionths.
///
/// # Errors
/// When it is no number, negative, or too large.
pub fn billionths(text: &str) -> Result<u64, DecimalError> {
    use DecimalError::{Malformed, Negative, TooLarge};
    if text.len() > LONGEST {
        return Err(Malformed);
    }
    let (minus, rest) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (mantissa, exponent) = match rest.split_once(['e', 'E']) {
        None => (rest, 0),
        Some((mantissa, exponent)) => {
            let sign = if exponent.starts_with('-') { -1 } else { 1 };
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(Malformed);
            }
            // Beyond this, every mantissa that is read is nothing or too large.
            let digits = digits.trim_start_matches('0');
            let size = if digits.len() > 3 { 999 } else { digits.parse().unwrap_or(0) };
            (mantissa, sign * size)
        }
    };
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) {
        return Err(Malformed);
    }
    if minus && (whole.bytes().chain(part.bytes())).any(|digit| digit != b'0') {
        return Err(Negative);
    }
    // The digits of the mantissa, of which `places` stand before the figure's last billionth.
    let places = whole.len() as i64 + exponent + i64::from(BILLIONTHS);
    let mut figure: u64 = 0;
    let mut at = 0;
    for digit in whole.bytes().chain(part.bytes()) {
        if at >= places {
            break;
        }
        let more = figure.checked_mul(10).and_then(|ten| ten.checked_add(u64::from(digit - b'0')));
        figure = more.ok_or(TooLarge)?;
        at += 1;
    }
    while at < places && figure != 0 {
        figure = figure.checked_mul(10).ok_or(TooLarge)?;
        at += 1;
    }
    Ok(figure)
}

/// A figure of so many parts, each the tenth to the power of `places`, as a decimal without
/// trailing zeros. It is a JSON number as well.
#[derive(Clone, Copy, Debug)]
pub struct Decimal {
    /// How many parts.
    pub parts: u64,
    /// Digits after the point; at most 18.
    pub places: u32,
}

/// So many billionths as a decimal.
#[must_use]
pub const fn of_billionths(parts: u64) -> Decimal {
    Decimal { parts, places: BILLIONTHS }
}

/// A price in billionths for a million tokens, as a decimal for one token.
#[must_use]
pub const fn per_token(billionths_per_million: u64) -> Decimal {
    Decimal { parts: billionths_per_million, places: BILLIONTHS + 6 }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = self.places.min(18);
        let unit = 10_u64.pow(places);
        let (whole, part) = (self.parts / unit, self.parts % unit);
        write!(f, "{whole}")?;
        if part == 0 {
            return Ok(());
        }
        let part = format!("{part:0width$}", width = places as usize);
        write!(f, ".{}", part.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_read_exactly() {
        for (text, figure) in [
            ("0", 0),
            ("-0", 0),
            ("1", 1_000_000_000),
            ("0.15", 150_000_000),
            ("0.1500000000000", 150_000_000),
            ("0.0000000019", 1),
            ("1e-9", 1),
            ("1E+2", 100_000_000_000),
            ("12.5e-1", 1_250_000_000),
            ("0e999999999999999999999", 0),
            ("1e-99999", 0),
            ("18446744073.709551615", u64::MAX),
        ] {
            assert_eq!(billionths(text), Ok(figure), "{text}");
        }
        for (text, error) in [
            ("", DecimalError::Malformed),
            (".", DecimalError::Malformed),
            (".5", DecimalError::Malformed),
            ("1.", DecimalError::Malformed),
            ("1e", DecimalError::Malformed),
            ("+1", DecimalError::Malformed),
            ("1 ", DecimalError::Malformed),
            ("NaN", DecimalError::Malformed),
            ("--1", DecimalError::Malformed),
            ("-0.1", DecimalError::Negative),
            ("18446744073.709551616", DecimalError::TooLarge),
            ("1e300", DecimalError::TooLarge),
        ] {
            assert_eq!(billionths(text), Err(error), "{text}");
        }
    }

    #[test]
    fn decimals_write_exactly_and_read_back() {
        assert_eq!(of_billionths(0).to_string(), "0");
        assert_eq!(of_billionths(1).to_string(), "0.000000001");
        assert_eq!(of_billionths(2_500_000_000).to_string(), "2.5");
        assert_eq!(per_token(150_000_000).to_string(), "0.00000015");
        assert_eq!(per_token(u64::MAX).to_string(), "18446.744073709551615");
        let mut figure: u64 = 7;
        for _ in 0..1_000 {
            figure = figure.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            assert_eq!(billionths(&of_billionths(figure).to_string()), Ok(figure));
        }
    }
}
