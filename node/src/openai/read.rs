//! Reads the fields of a request: the right type, within its range, or a fault that names the path.

use std::borrow::Cow;
use std::fmt;

use serde_json::value::RawValue;

use super::fault::{Fault, shown};
use super::json::{self, Key, Object};

/// Where in a request a value stands: `messages[0].content`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Path<'p> {
    Root,
    Key(&'p Path<'p>, &'p str),
    Item(&'p Path<'p>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Key(Path::Root, key) => f.write_str(&shown(key)),
            Self::Key(parent, key) => write!(f, "{parent}.{}", shown(key)),
            Self::Item(parent, at) => write!(f, "{parent}[{at}]"),
        }
    }
}

/// A value and where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field<'a, 'p> {
    pub(super) raw: &'a RawValue,
    pub(super) path: Path<'p>,
}

/// What sort of value it is, by its first byte, which tells it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    Null,
    Boolean,
    Number,
    String,
    Array,
    Object,
}

impl Sort {
    pub(super) fn of(raw: &RawValue) -> Self {
        match raw.get().as_bytes().first() {
            Some(b'n') => Self::Null,
            Some(b't' | b'f') => Self::Boolean,
            Some(b'"') => Self::String,
            Some(b'[') => Self::Array,
            Some(b'{') => Self::Object,
            _ => Self::Number,
        }
    }

    const fn words(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Boolean => "a boolean",
            Self::Number => "a number",
            Self::String => "a string",
            Self::Array => "an array",
            Self::Object => "an object",
        }
    }
}

impl<'a, 'p> Field<'a, 'p> {
    pub(super) const fn new(raw: &'a RawValue, path: Path<'p>) -> Self {
        Self { raw, path }
    }

    pub(super) fn sort(&self) -> Sort {
        Sort::of(self.raw)
    }

    pub(super) fn is_null(&self) -> bool {
        self.sort() == Sort::Null
    }

    /// A fault about this value.
    pub(super) fn invalid(&self, code: &str, why: impl fmt::Display) -> Fault {
        Fault::invalid(Some(code), format!("Invalid '{}': {why}", self.path)).at(self.path)
    }

    pub(super) fn wrong_type(&self, expected: &str) -> Fault {
        let message = format!(
            "Invalid type for '{}': expected {expected}, but got {} instead.",
            self.path,
            self.sort().words()
        );
        Fault::invalid(Some("invalid_type"), message).at(self.path)
    }

    /// A fault for a value that is none of a few words.
    pub(super) fn not_among(&self, got: &str, words: &[&str]) -> Fault {
        let message = format!(
            "Invalid value: '{}'. Supported values are: '{}'.",
            shown(got),
            words.join("', '")
        );
        Fault::invalid(Some("invalid_value"), message).at(self.path)
    }

    /// A string of at most so many bytes, its escapes read.
    pub(super) fn text(&self, most: usize) -> Result<Cow<'a, str>, Fault> {
        if self.sort() != Sort::String {
            return Err(self.wrong_type("a string"));
        }
        let text: Result<Key<'a>, _> = serde_json::from_str(self.raw.get());
        let Ok(Key(text)) = text else {
            return Err(self.invalid("invalid_value", "the string is not valid Unicode."));
        };
        if text.len() > most {
            let why = format!(
                "string too long. Expected a string with maximum length {most} bytes, but got a \
                 string with length {} instead.",
                text.len()
            );
            return Err(self.invalid("string_above_max_length", why));
        }
        Ok(text)
    }

    /// One of a few words.
    pub(super) fn word(&self, words: &[&'static str]) -> Result<&'static str, Fault> {
        let text = self.text(usize::MAX)?;
        let word = words.iter().find(|word| **word == text);
        word.copied().ok_or_else(|| self.not_among(&text, words))
    }

    pub(super) fn boolean(&self) -> Result<bool, Fault> {
        match self.raw.get() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(self.wrong_type("a boolean")),
        }
    }

    /// A number within bounds, both included.
    pub(super) fn decimal(&self, least: f64, most: f64) -> Result<f64, Fault> {
        if self.sort() != Sort::Number {
            return Err(self.wrong_type("a decimal"));
        }
        // What does not even fit a float is beyond any bound.
        let beyond = if self.raw.get().starts_with('-') { f64::MIN } else { f64::MAX };
        let number = serde_json::from_str(self.raw.get()).unwrap_or(beyond);
        if number < least {
            let why = format!(
                "decimal below minimum value. Expected a value >= {least}, but got {} instead.",
                shown(self.raw.get())
            );
            return Err(self.invalid("decimal_below_min_value", why));
        }
        if number > most {
            let why = format!(
                "decimal above maximum value. Expected a value <= {most}, but got {} instead.",
                shown(self.raw.get())
            );
            return Err(self.invalid("decimal_above_max_value", why));
        }
        Ok(number)
    }

    /// A whole number within bounds, both included.
    pub(super) fn integer(&self, least: i64, most: i64) -> Result<i64, Fault> {
        if self.sort() != Sort::Number {
            return Err(self.wrong_type("an integer"));
        }
        let text = self.raw.get();
        if text.contains(['.', 'e', 'E']) {
            let message = format!(
                "Invalid type for '{}': expected an integer, but got a decimal number instead.",
                self.path
            );
            return Err(Fault::invalid(Some("invalid_type"), message).at(self.path));
        }
        let number: Option<i64> = text.parse().ok();
        if number.map_or(text.starts_with('-'), |number| number < least) {
            let why = format!(
                "integer below minimum value. Expected a value >= {least}, but got {} instead.",
                shown(text)
            );
            return Err(self.invalid("integer_below_min_value", why));
        }
        let Some(number) = number.filter(|number| *number <= most) else {
            let why = format!(
                "integer above maximum value. Expected a value <= {most}, but got {} instead.",
                shown(text)
            );
            return Err(self.invalid("integer_above_max_value", why));
        };
        Ok(number)
    }

    /// A whole number from `least` to `most`, where `least` is not below zero.
    pub(super) fn count(&self, least: u32, most: u32) -> Result<u32, Fault> {
        let number = self.integer(i64::from(least), i64::from(most))?;
        Ok(u32::try_from(number).unwrap_or(most))
    }

    /// An object, none of whose fields stands there twice.
    pub(super) fn object(&self) -> Result<Object<'a>, Fault> {
        if self.sort() != Sort::Object {
            return Err(self.wrong_type("an object"));
        }
        let object = Object::read(self.raw.get());
        let object = object.map_err(|_| self.invalid("invalid_value", "too many fields."))?;
        if let Some(name) = object.repeated() {
            return Err(repeated(&Path::Key(&self.path, name)));
        }
        Ok(object)
    }

    /// The items of an array of at most so many, and at least one unless `empty` is allowed.
    pub(super) fn items(&self, most: usize, empty: bool) -> Result<Vec<&'a RawValue>, Fault> {
        if self.sort() != Sort::Array {
            return Err(self.wrong_type("an array"));
        }
        let Ok(items) = json::items(self.raw.get(), most) else {
            let why = format!("array too long. Expected an array with maximum length {most}.");
            return Err(self.invalid("array_above_max_length", why));
        };
        if items.is_empty() && !empty {
            let why = "empty array. Expected an array with minimum length 1, but got an empty \
                       array instead.";
            return Err(self.invalid("empty_array", why));
        }
        Ok(items)
    }
}

/// A name that stands in one object twice: two readers would take two values.
pub(super) fn repeated(path: &Path<'_>) -> Fault {
    let message = format!("Duplicate parameter: '{path}'.");
    Fault::invalid(Some("duplicate_parameter"), message).at(path)
}

/// Goes through the fields of an object. `read` says whether it knows the name; one that it does
/// not know is refused.
pub(super) fn each<'a>(
    field: &Field<'a, '_>,
    mut read: impl FnMut(&str, Field<'a, '_>) -> Result<bool, Fault>,
) -> Result<(), Fault> {
    let object = field.object()?;
    for (key, raw) in &object.fields {
        let inner = Field::new(raw, Path::Key(&field.path, key));
        if !read(key, inner)? {
            let message = format!("Unknown parameter: '{}'.", inner.path);
            return Err(Fault::invalid(Some("unknown_parameter"), message).at(inner.path));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on<T>(text: &str, read: impl Fn(Field<'_, '_>) -> Result<T, Fault>) -> Result<T, String> {
        let raw: &RawValue = serde_json::from_str(text).unwrap();
        let (root, items) = (Path::Root, Path::Key(&Path::Root, "a"));
        let _ = root;
        read(Field::new(raw, Path::Item(&items, 3))).map_err(|fault| {
            assert_eq!(fault.param.as_deref(), Some("a[3]"));
            fault.code.unwrap_or_default()
        })
    }

    #[test]
    fn numbers_keep_their_bounds() {
        for (text, expected) in [
            ("2", Ok(2)),
            ("-5", Ok(-5)),
            ("5", Ok(5)),
            ("6", Err("integer_above_max_value")),
            ("-6", Err("integer_below_min_value")),
            ("99999999999999999999", Err("integer_above_max_value")),
            ("-99999999999999999999", Err("integer_below_min_value")),
            ("1.0", Err("invalid_type")),
            ("1e3", Err("invalid_type")),
            ("\"1\"", Err("invalid_type")),
            ("true", Err("invalid_type")),
        ] {
            let got = on(text, |field| field.integer(-5, 5));
            assert_eq!(got.as_ref().map_err(String::as_str), expected.as_ref().map_err(|e| *e));
        }
        assert_eq!(on("9223372036854775807", |f| f.integer(0, i64::MAX)), Ok(i64::MAX));
        assert!(on("9223372036854775808", |f| f.integer(0, i64::MAX)).is_err());
        assert_eq!(on("-9223372036854775808", |f| f.integer(i64::MIN, 0)), Ok(i64::MIN));
        assert!(on("-9223372036854775809", |f| f.integer(i64::MIN, 0)).is_err());
        assert_eq!(on("0.5", |f| f.decimal(0.0, 2.0)), Ok(0.5));
        for text in ["1e999", "2.01", "-1e999", "-0.01", "null", "[]"] {
            assert!(on(text, |f| f.decimal(0.0, 2.0)).is_err(), "{text}");
        }
    }

    #[test]
    fn strings_are_read_and_bounded() {
        assert_eq!(on(r#""a\n\u00e9""#, |f| Ok(f.text(9)?.into_owned())), Ok("a\né".to_owned()));
        for (text, code) in [
            ("\"0123456789\"", "string_above_max_length"),
            (r#""\ud800""#, "invalid_value"),
            ("{}", "invalid_type"),
        ] {
            assert_eq!(on(text, |f| Ok(f.text(9)?.into_owned())), Err(code.to_owned()));
        }
        assert_eq!(on("\"b\"", |f| f.word(&["a", "b"])), Ok("b"));
        assert_eq!(on("\"c\"", |f| f.word(&["a", "b"])), Err("invalid_value".to_owned()));
    }
}
