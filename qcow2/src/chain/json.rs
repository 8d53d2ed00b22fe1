//! Reads QEMU's `json:` names as flat options with dotted keys.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

/// The value of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum OptionValue {
    /// A string.
    Text(String),
    /// A number, a boolean or null, as printed.
    Other(String),
}

/// Reads what follows `json:` as one object and flattens it as QEMU does: `{"file": {"driver": "x"}}`
/// and `{"file.driver": "x"}` are the same. Strings may stand in single quotes, as in QEMU.
///
/// # Errors
/// The reason in words: text that is not one JSON object, an array in it, or a key that is given twice.
pub(super) fn flatten(text: &str) -> Result<BTreeMap<String, OptionValue>, String> {
    let text = with_double_quotes(text);
    let mut options = BTreeMap::new();
    let mut json = serde_json::Deserializer::from_str(&text);
    let seed = DottedKeys { options: &mut options, key: String::new() };
    seed.deserialize(&mut json).and_then(|()| json.end()).map_err(|e| format!("invalid json: {e}"))?;
    Ok(options)
}

/// Rewrites single-quoted strings, which QEMU's parser takes, as double-quoted ones.
fn with_double_quotes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '"' | '\'') => {
                quote = Some(c);
                out.push('"');
            }
            (Some(q), c) if c == q => {
                quote = None;
                out.push('"');
            }
            (Some(_), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                Some(escaped) => out.extend(['\\', escaped]),
                None => out.push('\\'),
            },
            (_, c) => out.push(c),
        }
    }
    out
}

struct DottedKeys<'a> {
    options: &'a mut BTreeMap<String, OptionValue>,
    /// The dotted key of the value that is being read; empty for the whole object.
    key: String,
}

impl DottedKeys<'_> {
    fn put<E: serde::de::Error>(self, value: OptionValue) -> Result<(), E> {
        if self.key.is_empty() {
            return Err(E::custom("not an object"));
        }
        match self.options.insert(self.key.clone(), value) {
            None => Ok(()),
            Some(_) => Err(E::custom(format!("'{}' is given twice", self.key))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for DottedKeys<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for DottedKeys<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of options")
    }
    fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<(), E> {
        self.put(OptionValue::Text(v.to_owned()))
    }
    fn visit_bool<E: serde::de::Error>(self, v: bool) -> Result<(), E> {
        self.put(OptionValue::Other(v.to_string()))
    }
    fn visit_i64<E: serde::de::Error>(self, v: i64) -> Result<(), E> {
        self.put(OptionValue::Other(v.to_string()))
    }
    fn visit_u64<E: serde::de::Error>(self, v: u64) -> Result<(), E> {
        self.put(OptionValue::Other(v.to_string()))
    }
    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<(), E> {
        self.put(OptionValue::Other(v.to_string()))
    }
    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.put(OptionValue::Other("null".to_owned()))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(A::Error::custom("lists are not expected"))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            let key = if self.key.is_empty() { name.clone() } else { format!("{}.{name}", self.key) };
            if !seen.insert(name) {
                return Err(A::Error::custom(format!("'{key}' is given twice")));
            }
            map.next_value_seed(DottedKeys { options: &mut *self.options, key })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> OptionValue {
        OptionValue::Text(s.to_owned())
    }

    #[test]
    fn nested_and_dotted_keys_are_the_same() {
        let nested = flatten(r#"{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}"#).unwrap();
        let dotted = flatten(r#" {"driver":"qcow2","file.driver":"file","file.filename":"/a"} "#).unwrap();
        assert_eq!(nested, dotted);
        assert_eq!(nested["file.filename"], text("/a"));
    }

    #[test]
    fn single_quotes_are_read_as_qemu_does() {
        let options = flatten(r#"{'a':'it\'s "x"', "b":"it's", 'c':'\u0041\\'}"#).unwrap();
        assert_eq!(options["a"], text("it's \"x\""));
        assert_eq!(options["b"], text("it's"));
        assert_eq!(options["c"], text("A\\"));
    }

    #[test]
    fn a_key_given_twice_is_refused_however_it_is_spelt() {
        for twice in [
            r#"{"driver":"qcow2","driver":"raw"}"#,
            r#"{"file":{"filename":"/a"},"file.filename":"/b"}"#,
            r#"{"file":{"filename":"/a"},"file":{"driver":"file"}}"#,
        ] {
            assert!(flatten(twice).unwrap_err().contains("given twice"), "{twice}");
        }
    }

    #[test]
    fn what_is_not_one_object_is_refused() {
        for bad in ["", "{", "[]", "5", "null", "\"x\"", "{} x", r#"{"a":[1]}"#, "{'a':'", "{'a':'\\"] {
            assert!(flatten(bad).is_err(), "{bad}");
        }
        let deep = format!("{}1{}", "{\"a\":".repeat(400), "}".repeat(400));
        assert!(flatten(&deep).is_err());
    }
}
