//! Whether bytes are one JSON object, found without building anything.
//!
//! An upstream's result goes to the client as it is, in an envelope of ours. If it were not one whole object, it could
//! close that envelope early and say something else in it. serde_json finds out, too, at a third of the speed: it
//! looks at every byte of a string, and most of a large result is one string.

use memchr::memchr_iter;
use serde_json::value::RawValue;

/// Deeper ones are left to serde_json.
const DEEPEST: u32 = 128;

/// Whether `json` is one object (RFC 8259), with nothing before or after it. Escapes within strings are taken as they
/// come.
pub(super) fn is_object(json: &[u8]) -> bool {
    if json.first() != Some(&b'{') || json.last() != Some(&b'}') {
        return false;
    }
    let whole = || serde_json::from_slice::<&RawValue>(json).is_ok();
    // Branchless, so that it is compiled to vector instructions.
    let printable = json.iter().fold(true, |all, byte| all & (byte.wrapping_sub(b' ') < 0x5f));
    if !printable {
        match std::str::from_utf8(json) {
            Err(_) => return false,
            // Between tokens they are fine, in strings they are not.
            Ok(_) if json.iter().any(|byte| *byte < b' ') => return whole(),
            Ok(_) => {}
        }
    }
    Scan { json, at: 0 }.object().unwrap_or_else(|deep| match deep {
        Stop::Wrong => false,
        Stop::Deep => whole(),
    })
}

struct Scan<'a> {
    json: &'a [u8],
    at: usize,
}

enum Stop {
    Wrong,
    Deep,
}

/// What may come next.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    CommaOrEnd,
}

impl Scan<'_> {
    fn object(mut self) -> Result<bool, Stop> {
        // One bit a level: whether it is an object.
        let (mut levels, mut depth, mut next) = (0u128, 0u32, Next::Value);
        loop {
            self.skip_spaces();
            let byte = *self.json.get(self.at).ok_or(Stop::Wrong)?;
            self.at += 1;
            next = match (next, byte) {
                (Next::Value | Next::ValueOrEnd, b'{' | b'[') => {
                    if depth == DEEPEST {
                        return Err(Stop::Deep);
                    }
                    levels = levels << 1 | u128::from(byte == b'{');
                    depth += 1;
                    if byte == b'{' { Next::KeyOrEnd } else { Next::ValueOrEnd }
                }
                (Next::Value | Next::ValueOrEnd, b'"') => {
                    self.string()?;
                    Next::CommaOrEnd
                }
                (Next::Value | Next::ValueOrEnd, b't') => self.literal(b"rue")?,
                (Next::Value | Next::ValueOrEnd, b'f') => self.literal(b"alse")?,
                (Next::Value | Next::ValueOrEnd, b'n') => self.literal(b"ull")?,
                (Next::Value | Next::ValueOrEnd, b'-' | b'0'..=b'9') => self.number(byte)?,
                (Next::Key | Next::KeyOrEnd, b'"') => {
                    self.string()?;
                    self.skip_spaces();
                    self.literal(b":")?;
                    Next::Value
                }
                (Next::CommaOrEnd, b',') => {
                    if levels & 1 == 1 {
                        Next::Key
                    } else {
                        Next::Value
                    }
                }
                (Next::KeyOrEnd, b'}') | (Next::ValueOrEnd, b']') => self.end(&mut levels, &mut depth),
                (Next::CommaOrEnd, b'}') if levels & 1 == 1 => self.end(&mut levels, &mut depth),
                (Next::CommaOrEnd, b']') if levels & 1 == 0 => self.end(&mut levels, &mut depth),
                _ => return Err(Stop::Wrong),
            };
            if depth == 0 {
                return Ok(self.at == self.json.len());
            }
        }
    }

    fn end(&self, levels: &mut u128, depth: &mut u32) -> Next {
        *levels >>= 1;
        *depth -= 1;
        Next::CommaOrEnd
    }

    fn skip_spaces(&mut self) {
        while self.json.get(self.at) == Some(&b' ') {
            self.at += 1;
        }
    }

    fn literal(&mut self, rest: &[u8]) -> Result<Next, Stop> {
        match self.json[self.at..].starts_with(rest) {
            true => {
                self.at += rest.len();
                Ok(Next::CommaOrEnd)
            }
            false => Err(Stop::Wrong),
        }
    }

    /// The rest of a string, with its closing quote: the next quote that no backslash escapes. Text is full of escapes,
    /// and which they are changes nothing about where it ends; they are not looked at.
    fn string(&mut self) -> Result<(), Stop> {
        let rest = &self.json[self.at..];
        let ends = |quote: &usize| {
            // Mostly nothing is before it, or one backslash.
            rest[..*quote].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 0
        };
        self.at += memchr_iter(b'"', rest).find(ends).ok_or(Stop::Wrong)? + 1;
        Ok(())
    }

    /// The rest of a number whose first byte is `first`.
    fn number(&mut self, first: u8) -> Result<Next, Stop> {
        let leading = if first == b'-' { self.next_byte()? } else { first };
        match leading {
            b'0' => {}
            b'1'..=b'9' => self.digits(),
            _ => return Err(Stop::Wrong),
        }
        if self.json.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.some_digits()?;
        }
        if let Some(b'e' | b'E') = self.json.get(self.at) {
            self.at += 1;
            if let Some(b'+' | b'-') = self.json.get(self.at) {
                self.at += 1;
            }
            self.some_digits()?;
        }
        Ok(Next::CommaOrEnd)
    }

    fn next_byte(&mut self) -> Result<u8, Stop> {
        let byte = *self.json.get(self.at).ok_or(Stop::Wrong)?;
        self.at += 1;
        Ok(byte)
    }

    fn some_digits(&mut self) -> Result<(), Stop> {
        match self.next_byte()?.is_ascii_digit() {
            true => {
                self.digits();
                Ok(())
            }
            false => Err(Stop::Wrong),
        }
    }

    fn digits(&mut self) {
        while self.json.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What serde_json says.
    fn judged(json: &[u8]) -> bool {
        json.first() == Some(&b'{')
            && json.last() == Some(&b'}')
            && serde_json::from_slice::<&RawValue>(json).is_ok()
    }

    /// Both say the same, unless it is about an escape that JSON does not know.
    fn agrees(json: &[u8]) -> Result<(), TestCaseError> {
        let (ours, theirs) = (is_object(json), judged(json));
        let known = !json.contains(&b'\\');
        prop_assert!(ours == theirs || (ours && !known), "{}", String::from_utf8_lossy(json));
        Ok(())
    }

    #[test]
    fn what_closes_early_or_never_is_no_object() {
        for good in
            [r#"{}"#, r#"{ "a" : [ 1 , -0.5e+7 , "\u00e4\"}" , null ] , "b" : { } }"#, "{\n\t\"a\": 1\r}"]
        {
            assert!(is_object(good.as_bytes()), "{good}");
        }
        for bad in [
            r#"{"a":1},"id":2,"x":{}"#,
            r#"{hunter2}"#,
            r#"{"a":1}}"#,
            r#"{"a":01}"#,
            r#"{"a":1,}"#,
            r#"{"a":[}]"#,
            r#"{"a":"}"#,
            r#"{"a":"\"}"#,
            r#"{"a":"\\\"}"#,
            r#"{"a":"\\","b":"\"},"id":2,"x":{"c":""}"#,
            "{\"a\":\"\n\"}",
            " {}",
            "",
        ] {
            assert!(!is_object(bad.as_bytes()), "{bad}");
        }
        assert!(!is_object(b"{\"a\":\"\xff\"}"));
    }

    #[test]
    fn depth_is_no_way_around() {
        for depth in [1, 127, 128, 129, 1000] {
            let deep = format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
            assert!(is_object(deep.as_bytes()), "{depth}");
            assert!(!is_object(deep.replacen(']', "}", 1).as_bytes()), "{depth}");
        }
    }

    fn value() -> impl Strategy<Value = serde_json::Value> {
        use serde_json::Value;
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_says_what_serde_says(
            value in value(),
            pretty in any::<bool>(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<bool>(),
        ) {
            let object = serde_json::json!({ "a": value });
            let text = if pretty { format!("{object:#}") } else { object.to_string() };
            prop_assert!(is_object(text.as_bytes()));
            let mut changed = text.into_bytes();
            let at = at.index(changed.len());
            if cut { changed.remove(at); } else { changed[at] = byte; }
            agrees(&changed)?;
        }

        #[test]
        fn also_near_json(text in r#"\{[\[\]{}",:0-9\\ e.\-+truefalsn\n]{0,40}\}"#) {
            agrees(text.as_bytes())?;
        }
    }
}
