//! Money: integers in billionths of the charter's currency, never floats.
//!
//! A *rate* is an amount per hour. A charge is the rate times cumulative milliseconds in 128
//! bits, rounded once, down: computing it again from the same receipts gives the same number on
//! any machine.

use std::fmt;
use std::iter::Sum;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::time::Span;

/// Billionths in one unit of the currency.
pub const UNIT: u64 = 1_000_000_000;
/// Milliseconds in one hour, the unit of rates.
pub const HOUR_MS: u64 = 3_600_000;

/// An amount of money, in billionths of the charter's currency (so at most some 18 billion).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Amount(pub u64);

/// Why a text is no amount.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no amount: expected digits with at most 9 decimals, such as 0.05")]
pub struct ParseAmountError(pub String);

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// The largest amount that can be said.
    pub const MAX: Self = Self(u64::MAX);

    /// What this amount per hour comes to over `span`, rounded down; saturates.
    #[must_use]
    pub fn per_hour_over(self, span: Span) -> Self {
        let exact = u128::from(self.0) * u128::from(span.as_millis()) / u128::from(HOUR_MS);
        Self(u64::try_from(exact).unwrap_or(u64::MAX))
    }

    /// How long this amount lasts at `rate` per hour: the longest span whose charge does not
    /// exceed it. `None` when the rate is zero (it lasts for ever).
    #[must_use]
    pub fn lasts_at(self, rate: Self) -> Option<Span> {
        if rate.0 == 0 {
            return None;
        }
        // charge(ms) = floor(rate * ms / H) <= amount  <=>  rate * ms < (amount + 1) * H
        let limit = (u128::from(self.0) + 1) * u128::from(HOUR_MS) - 1;
        Some(Span(u64::try_from(limit / u128::from(rate.0)).unwrap_or(u64::MAX)))
    }

    /// So many thousandths of it, rounded down.
    #[must_use]
    pub fn permille(self, thousandths: u16) -> Self {
        let exact = u128::from(self.0) * u128::from(thousandths) / 1000;
        Self(u64::try_from(exact).unwrap_or(u64::MAX))
    }

    /// The sum, saturating.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, at least zero.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Sum for Amount {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Self::plus)
    }
}

impl fmt::Display for Amount {
    /// As a decimal in whole units, without trailing zeros: `0.05`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / UNIT, self.0 % UNIT);
        if part == 0 {
            return write!(f, "{whole}");
        }
        let digits = format!("{part:09}");
        write!(f, "{whole}.{}", digits.trim_end_matches('0'))
    }
}

impl FromStr for Amount {
    type Err = ParseAmountError;
    fn from_str(text: &str) -> Result<Self, ParseAmountError> {
        let wrong = || ParseAmountError(text.chars().take(40).collect());
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if (whole.is_empty() && part.is_empty()) || !digits(whole) || !digits(part) {
            return Err(wrong());
        }
        if part.len() > 9 || whole.len() > 20 {
            return Err(wrong());
        }
        let units: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| wrong())? };
        let billionths: u64 = format!("{part:0<9}").parse().map_err(|_| wrong())?;
        units
            .checked_mul(UNIT)
            .and_then(|whole| whole.checked_add(billionths))
            .map(Self)
            .ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn amounts_read_and_print() {
        for (text, billionths) in
            [("0.05", 50_000_000), ("1", UNIT), ("12.000000001", 12 * UNIT + 1), (".5", UNIT / 2)]
        {
            assert_eq!(text.parse(), Ok(Amount(billionths)));
        }
        assert_eq!(Amount(50_000_000).to_string(), "0.05");
        for text in ["", ".", "-1", "1.0000000001", "1e3", "0x1", "99999999999999999999", "1.2.3"] {
            assert!(text.parse::<Amount>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trips(n: u64) {
            prop_assert_eq!(Amount(n).to_string().parse(), Ok(Amount(n)));
        }

        #[test]
        fn a_budget_lasts_exactly_as_long_as_its_charge_fits(
            amount in 0u64..1 << 40, rate in 1u64..1 << 40,
        ) {
            let (amount, rate) = (Amount(amount), Amount(rate));
            let span = amount.lasts_at(rate).expect("rate is not zero");
            prop_assert!(rate.per_hour_over(span) <= amount);
            prop_assert!(rate.per_hour_over(span + Span(1)) > amount);
        }

        #[test]
        fn charges_grow_with_time(rate: u64, a in 0u64..1 << 50, b in 0u64..1 << 50) {
            let (early, late) = (a.min(b), a.max(b));
            let rate = Amount(rate);
            prop_assert!(rate.per_hour_over(Span(early)) <= rate.per_hour_over(Span(late)));
        }
    }
}
