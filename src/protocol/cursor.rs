//! Where a page of a list ends, opaque to clients.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use super::ItemList;

/// The end of a page: how many items came before, and the last one's name. The name finds the place again when
/// the list has changed in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    offset: usize,
    last: String,
}

impl Cursor {
    /// After `offset` items, the last of which is `last`.
    pub fn after(offset: usize, last: &str) -> Self {
        Cursor { offset, last: last.to_owned() }
    }

    /// Where the next page of `list` begins.
    pub fn position_in(&self, list: &ItemList) -> usize {
        let items = list.items();
        let unmoved = self.offset.checked_sub(1).and_then(|i| items.get(i));
        if unmoved.is_some_and(|item| *item.exposed == *self.last) {
            return self.offset;
        }
        match items.iter().position(|item| *item.exposed == *self.last) {
            Some(i) => i + 1,
            None => self.offset.min(items.len()),
        }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(format!("{}:{}", self.offset, self.last)))
    }
}

impl FromStr for Cursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, InvalidCursor> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidCursor)?;
        let text = String::from_utf8(bytes).map_err(|_| InvalidCursor)?;
        let (offset, last) = text.split_once(':').ok_or(InvalidCursor)?;
        Ok(Cursor { offset: offset.parse().map_err(|_| InvalidCursor)?, last: last.to_owned() })
    }
}

/// Not a cursor this gateway gave out.
#[derive(Debug, PartialEq, Eq)]
pub struct InvalidCursor;

impl fmt::Display for InvalidCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("invalid cursor")
    }
}

impl std::error::Error for InvalidCursor {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::{Item, ItemKind};

    fn list(names: &[String]) -> ItemList {
        let item = |name: &String| Item {
            exposed: name.as_str().into(),
            server: "s".parse().unwrap(),
            own: name.as_str().into(),
            raw: "{}".into(),
        };
        ItemList::new(ItemKind::Tools, names.iter().map(item).collect())
    }

    #[test]
    fn finds_its_place_after_a_removal() {
        let before = list(&["a".into(), "b".into(), "c".into(), "d".into()]);
        let cursor = before.page(0, 2).next_cursor().unwrap().clone();
        assert_eq!(cursor.position_in(&list(&["b".into(), "c".into(), "d".into()])), 1);
    }

    proptest! {
        #[test]
        fn pages_add_up(count in 0usize..40, limit in 1usize..9) {
            let names: Vec<String> = (0..count).map(|i| format!("t:{i}é")).collect();
            let all = list(&names);
            let (mut from, mut seen) = (0, Vec::new());
            loop {
                let page = all.page(from, limit);
                seen.extend(page.items().iter().map(|i| i.exposed.to_string()));
                let Some(next) = page.next_cursor() else { break };
                from = next.to_string().parse::<Cursor>().unwrap().position_in(&all);
            }
            prop_assert_eq!(seen, names);
        }

        #[test]
        fn reading_one_never_panics(text in ".{0,40}") {
            let _ = text.parse::<Cursor>();
        }
    }
}
