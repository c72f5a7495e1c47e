//! A JSON object whose members are known and whose values are not.
//!
//! This is what "raw first" rests on: one scan finds the top-level members and where their values lie; reading
//! one is a slice, and replacing one splices bytes without touching the others. A duplicate key is refused,
//! because two readers could then disagree about which one counts.

use std::{borrow::Cow, fmt, ops::Range};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _, MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// A JSON object, scanned one level deep.
///
/// ```
/// use portcullis::protocol::RawObject;
///
/// let mut object = RawObject::parse(r#"{ "b": 1e400, "a": "x" }"#.into())?;
/// object.set("a", r#""y""#);
/// assert_eq!(object.as_str(), r#"{ "b": 1e400, "a": "y" }"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone)]
pub struct RawObject {
    src: Bytes,
    members: Vec<Member>,
}

#[derive(Clone)]
struct Member {
    key: Key,
    value: Range<usize>,
}

/// Most keys have no escapes and are a slice of the source.
#[derive(Clone)]
enum Key {
    Span(Range<usize>),
    Unescaped(Box<str>),
}

impl RawObject {
    /// Scans `src`, which must be one JSON object.
    pub fn parse(src: Bytes) -> Result<Self, serde_json::Error> {
        let scanned: Scanned<'_> = serde_json::from_slice(&src)?;
        let base = src.as_ptr() as usize;
        let span = |text: &str| {
            let start = text.as_ptr() as usize - base;
            start..start + text.len()
        };
        let mut members: Vec<Member> = Vec::with_capacity(scanned.0.len());
        for (key, value) in &scanned.0 {
            let key = match key {
                Cow::Borrowed(text) => Key::Span(span(text)),
                Cow::Owned(text) => Key::Unescaped(text.as_str().into()),
            };
            members.push(Member { key, value: span(value.get()) });
        }
        drop(scanned);
        let object = RawObject { src, members };
        object.refuse_duplicates()?;
        Ok(object)
    }

    /// An object with no members.
    pub fn empty() -> Self {
        RawObject { src: Bytes::from_static(b"{}"), members: Vec::new() }
    }

    /// The raw JSON text of a member's value.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.find(key).map(|i| self.text(&self.members[i].value))
    }

    /// The raw JSON of a member's value, sharing this object's memory.
    pub fn get_bytes(&self, key: &str) -> Option<Bytes> {
        self.find(key).map(|i| self.src.slice(self.members[i].value.clone()))
    }

    /// A member that is a string, unescaped. `None` when it is absent or of another type.
    pub fn get_string(&self, key: &str) -> Option<Cow<'_, str>> {
        let raw = self.get(key)?;
        let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
        match inner.contains('\\') {
            false => Some(Cow::Borrowed(inner)),
            true => serde_json::from_str(raw).ok().map(Cow::Owned),
        }
    }

    /// A member that is an object. `None` when it is absent or of another type.
    pub fn get_object(&self, key: &str) -> Option<RawObject> {
        RawObject::parse(self.get_bytes(key)?).ok()
    }

    /// A member read as `T`. `None` when it is absent.
    pub fn get_as<T: DeserializeOwned>(&self, key: &str) -> Option<Result<T, serde_json::Error>> {
        self.get(key).map(serde_json::from_str)
    }

    /// The members in their order, as unescaped key and raw value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.members.iter().map(|m| (self.key(m), self.text(&m.value)))
    }

    /// How many members there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Replaces a member's value in place, or adds the member at the end. `json` must be one JSON value; the
    /// other members keep their bytes.
    pub fn set(&mut self, key: &str, json: impl AsRef<str>) {
        let json = json.as_ref();
        match self.find(key) {
            Some(i) => self.replace(i, json),
            None => self.append(key, json),
        }
    }

    /// Removes a member, if it is there.
    pub fn remove(&mut self, key: &str) {
        let Some(i) = self.find(key) else { return };
        let rest: Vec<(String, Bytes)> = self
            .members
            .iter()
            .enumerate()
            .filter(|(j, _)| *j != i)
            .map(|(_, m)| (self.key(m).to_owned(), self.src.slice(m.value.clone())))
            .collect();
        *self = RawObject::empty();
        for (key, value) in rest {
            self.append(&key, &String::from_utf8_lossy(&value));
        }
    }

    /// The object as JSON text.
    pub fn as_str(&self) -> &str {
        self.text(&(0..self.src.len()))
    }

    /// The object as JSON bytes.
    pub fn as_bytes(&self) -> &Bytes {
        &self.src
    }

    /// The object as JSON bytes.
    pub fn into_bytes(self) -> Bytes {
        self.src
    }

    fn find(&self, key: &str) -> Option<usize> {
        self.members.iter().position(|m| match &m.key {
            // Bytes against bytes: this is asked often, and needs no text.
            Key::Span(span) => self.src[span.clone()] == *key.as_bytes(),
            Key::Unescaped(text) => **text == *key,
        })
    }

    fn key<'a>(&'a self, member: &'a Member) -> &'a str {
        match &member.key {
            Key::Span(span) => self.text(span),
            Key::Unescaped(text) => text,
        }
    }

    fn text(&self, span: &Range<usize>) -> &str {
        std::str::from_utf8(&self.src[span.clone()]).expect("serde_json accepted this text, so it is UTF-8")
    }

    fn replace(&mut self, i: usize, json: &str) {
        let old = self.members[i].value.clone();
        let mut out = BytesMut::with_capacity(self.src.len() - old.len() + json.len());
        out.put_slice(&self.src[..old.start]);
        out.put_slice(json.as_bytes());
        out.put_slice(&self.src[old.end..]);
        self.src = out.freeze();
        self.members[i].value = old.start..old.start + json.len();
        let shift = |at: usize| at + json.len() - old.len();
        for member in &mut self.members[i + 1..] {
            member.value = shift(member.value.start)..shift(member.value.end);
            if let Key::Span(span) = &mut member.key {
                *span = shift(span.start)..shift(span.end);
            }
        }
    }

    fn append(&mut self, key: &str, json: &str) {
        let close = self.src.iter().rposition(|b| *b == b'}').expect("an object ends with a brace");
        let quoted = serde_json::to_string(key).expect("a string is always JSON");
        let mut out = BytesMut::with_capacity(self.src.len() + quoted.len() + json.len() + 2);
        out.put_slice(&self.src[..close]);
        if !self.members.is_empty() {
            out.put_u8(b',');
        }
        out.put_slice(quoted.as_bytes());
        out.put_u8(b':');
        let start = out.len();
        out.put_slice(json.as_bytes());
        out.put_slice(&self.src[close..]);
        self.src = out.freeze();
        self.members.push(Member { key: Key::Unescaped(key.into()), value: start..start + json.len() });
    }

    fn refuse_duplicates(&self) -> Result<(), serde_json::Error> {
        let twice = |key: &str| serde_json::Error::custom(format_args!("duplicate key `{key}`"));
        if self.members.len() > 32 {
            let mut seen = std::collections::HashSet::with_capacity(self.members.len());
            return match self.members.iter().find(|m| !seen.insert(self.key(m))) {
                Some(m) => Err(twice(self.key(m))),
                None => Ok(()),
            };
        }
        for (i, member) in self.members.iter().enumerate() {
            if self.members[..i].iter().any(|m| self.key(m) == self.key(member)) {
                return Err(twice(self.key(member)));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for RawObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets; which members there are is what one debugs with.
        f.debug_set().entries(self.iter().map(|(key, _)| key)).finish()
    }
}

impl PartialEq for RawObject {
    fn eq(&self, other: &Self) -> bool {
        self.src == other.src
    }
}

struct Scanned<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Scanned<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ScanVisitor).map(Scanned)
    }
}

struct ScanVisitor;

impl<'de> Visitor<'de> for ScanVisitor {
    type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::with_capacity(4);
        while let Some(key) = map.next_key::<BorrowedKey<'de>>()? {
            members.push((key.0, map.next_value()?));
        }
        Ok(members)
    }
}

/// `Cow<str>` deserializes to an owned string always; this one borrows when it can.
struct BorrowedKey<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for BorrowedKey<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Cow<'de, str>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.to_owned()))
            }
        }
        deserializer.deserialize_str(KeyVisitor).map(BorrowedKey)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keeps_what_no_float_can_hold() {
        let text = r#"{"z":1e400,"n":18446744073709551617,"a":{"k":[1,{"y":null}]}}"#;
        let object = RawObject::parse(text.into()).unwrap();
        assert_eq!(object.as_str(), text);
        assert_eq!(object.get("n"), Some("18446744073709551617"));
    }

    #[test]
    fn refuses_duplicate_keys_however_they_are_spelled() {
        assert!(RawObject::parse(r#"{"name":1,"name":2}"#.into()).is_err());
        assert!(RawObject::parse(r#"{"name":1,"n\u0061me":2}"#.into()).is_err());
    }

    #[test]
    fn removing_keeps_the_others() {
        let mut object = RawObject::parse(r#"{"a":1, "b" : 1e400 ,"c":"x"}"#.into()).unwrap();
        object.remove("a");
        assert_eq!(object.as_str(), r#"{"b":1e400,"c":"x"}"#);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = RawObject::parse(bytes.into());
        }

        #[test]
        fn a_splice_touches_one_member(
            members in proptest::collection::btree_map("[a-z\"\\\\é]{0,6}", "[ -~é]{0,12}", 0..8),
            key in "[a-z\"\\\\é]{0,6}",
            value in "[ -~é]{0,12}",
        ) {
            let text = serde_json::to_string(&members).unwrap();
            let mut object = RawObject::parse(text.into()).unwrap();
            object.set(&key, serde_json::to_string(&value).unwrap());
            let mut expected = members.clone();
            expected.insert(key.clone(), value);
            let again = RawObject::parse(object.as_bytes().clone()).unwrap();
            prop_assert_eq!(again.len(), expected.len());
            for (k, v) in &expected {
                let found = again.get_string(k).map(Cow::into_owned);
                prop_assert_eq!(found.as_ref(), Some(v));
                let found = object.get_string(k).map(Cow::into_owned);
                prop_assert_eq!(found.as_ref(), Some(v));
            }
        }
    }
}
