//! JSON objects whose fields keep their order and their exact text.
//!
//! A value of which nothing needs to be known stays a stretch of the text it came in: it is neither
//! copied nor built up in memory, and goes on byte for byte.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// How deep arrays and objects may stand in one another.
pub(super) const DEPTH: usize = 128;
/// How many fields an object may have whose fields are looked at.
const FIELDS: usize = 4_096;

/// The fields of an object as they came.
#[derive(Debug)]
pub(super) struct Object<'a> {
    pub(super) fields: Vec<(Cow<'a, str>, &'a RawValue)>,
}

impl<'a> Object<'a> {
    pub(super) fn read(text: &'a str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The field of that name; the last where there are several, as most readers have it.
    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        self.fields.iter().rev().find(|(key, _)| key == name).map(|(_, value)| *value)
    }

    /// A name that stands there more than once.
    pub(super) fn repeated(&self) -> Option<&str> {
        let mut names: Vec<&str> = self.fields.iter().map(|(key, _)| key.as_ref()).collect();
        names.sort_unstable();
        names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::with_capacity(16);
                while let Some(Key(key)) = map.next_key()? {
                    if fields.len() == FIELDS {
                        return Err(A::Error::custom(format!("more than {FIELDS} fields")));
                    }
                    fields.push((key, map.next_value()?));
                }
                Ok(Object { fields })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// A string, borrowed where it has no escapes.
pub(super) struct Key<'a>(pub(super) Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// The items of an array as they came, at most so many.
pub(super) fn items(text: &str, most: usize) -> Result<Vec<&RawValue>, TooMany> {
    struct Items(usize);
    impl<'de> Visitor<'de> for Items {
        type Value = Vec<&'de RawValue>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut items = Vec::new();
            while let Some(item) = seq.next_element()? {
                if items.len() == self.0 {
                    return Err(A::Error::custom("too many"));
                }
                items.push(item);
            }
            Ok(items)
        }
    }
    serde_json::Deserializer::from_str(text).deserialize_seq(Items(most)).map_err(|_| TooMany)
}

/// The array has more items than are read. It is well-formed: that was seen before.
#[derive(Debug)]
pub(super) struct TooMany;

/// Whether arrays and objects stand in one another more than [`DEPTH`] deep. Raw values are
/// skipped without recursion, so nothing else would notice; whoever reads them later would.
pub(super) fn is_deep(text: &[u8]) -> bool {
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    for byte in text {
        if quoted {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => quoted = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// Appends a string as JSON.
pub(super) fn push_string(out: &mut Vec<u8>, text: &str) {
    // Writing a string into memory cannot fail.
    let _ = serde_json::to_writer(out, text);
}

/// Appends a field of an object, with a comma unless it is the first.
pub(super) fn push_field(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    push_key(out, key);
    out.extend_from_slice(value);
}

/// Appends the name of a field, with a comma before it unless it is the first.
pub(super) fn push_key(out: &mut Vec<u8>, key: &str) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    push_string(out, key);
    out.push(b':');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_keep_order_and_text() {
        let text = r#" {"b": [1, 2] , "a":1.50,"\u0062":null} "#;
        let object = Object::read(text).unwrap();
        let fields: Vec<_> = object.fields.iter().map(|(key, raw)| (&**key, raw.get())).collect();
        assert_eq!(fields, [("b", "[1, 2]"), ("a", "1.50"), ("b", "null")]);
        assert_eq!(object.repeated(), Some("b"));
        assert_eq!(object.get("b").map(RawValue::get), Some("null"));
    }

    #[test]
    fn objects_and_arrays_are_bounded() {
        let many: Vec<String> = (0..=FIELDS).map(|n| format!("\"{n}\":0")).collect();
        assert!(Object::read(&format!("{{{}}}", many.join(","))).is_err());
        assert!(Object::read("[]").is_err());
        assert_eq!(items("[1, [2], 3]", 3).unwrap().len(), 3);
        assert!(items("[1,2,3,4]", 3).is_err());
    }

    #[test]
    fn depth_is_seen_outside_strings() {
        assert!(!is_deep(format!("{}{}", "[".repeat(DEPTH), "]".repeat(DEPTH)).as_bytes()));
        assert!(is_deep("[".repeat(DEPTH + 1).as_bytes()));
        assert!(is_deep("[{\"a\":".repeat(DEPTH).as_bytes()));
        assert!(!is_deep(format!("\"{}\\\"{}\"", "[".repeat(500), "{".repeat(500)).as_bytes()));
        assert!(!is_deep("[]".repeat(500).as_bytes()));
    }
}
