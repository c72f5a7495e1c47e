//! Reading server-sent events (WHATWG HTML, 9.2), one at a time and never more than allowed of one.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderValue;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::wire::{ReadError, TooLarge, gather};

/// One event that carries data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) data: Bytes,
}

/// An id longer than this is none: it is sent back as a header.
const LONGEST_ID: usize = 1024;
/// How long to wait before going on with a stream, where the server does not say.
const WAIT: Duration = Duration::from_secs(1);
/// A server that says less would be asked without pause.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How far a stream was read, and when the server wants to be asked for the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The id of the last event, with data or without.
    pub(super) id: Option<HeaderValue>,
    retry: Option<Duration>,
}

impl Cursor {
    /// How long to wait before asking for the rest.
    pub(super) fn wait(&self) -> Duration {
        self.retry.map_or(WAIT, |retry| retry.clamp(SHORTEST_WAIT, LONGEST_WAIT))
    }
}

/// Events out of a response body.
pub(super) struct Events {
    body: Incoming,
    parser: Parser,
}

impl Events {
    /// `limit`: how many bytes one event may have.
    pub(super) fn new(body: Incoming, limit: usize) -> Self {
        Events { body, parser: Parser::new(limit) }
    }

    /// The same as the rest of another stream, which was read that far.
    pub(super) fn after(mut self, cursor: Cursor) -> Self {
        self.parser.cursor = cursor;
        self
    }

    /// How far it was read.
    pub(super) fn cursor(&self) -> &Cursor {
        &self.parser.cursor
    }

    /// The next event with data; `None` at the end of the body.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, ReadError> {
        loop {
            if let Some(event) = self.parser.next()? {
                return Ok(Some(event));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(e)) => return Err(ReadError::Cut(e)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.parser.push(data);
                    }
                }
            }
        }
    }
}

/// The line machine.
struct Parser {
    buffer: BytesMut,
    /// How far into `buffer` no line ends.
    searched: usize,
    /// The last line ended with `\r`; a `\n` right after belongs to it.
    after_cr: bool,
    /// The only line of an event.
    data: Option<Bytes>,
    /// All lines of an event that has several.
    lines: BytesMut,
    /// The id of the event that is being read.
    id: Option<Bytes>,
    cursor: Cursor,
    limit: usize,
}

impl Parser {
    fn new(limit: usize) -> Self {
        Parser {
            buffer: BytesMut::new(),
            searched: 0,
            after_cr: false,
            data: None,
            lines: BytesMut::new(),
            id: None,
            cursor: Cursor::default(),
            limit,
        }
    }

    fn push(&mut self, data: Bytes) {
        match self.buffer.is_empty() {
            // The usual case: whole events in one chunk, which is then never copied.
            true => self.buffer = BytesMut::from(data),
            false => gather(&mut self.buffer, &data, self.limit),
        }
    }

    fn next(&mut self) -> Result<Option<Event>, TooLarge> {
        while let Some(line) = self.line() {
            if let Some(event) = self.take(line)? {
                return Ok(Some(event));
            }
        }
        // Of what is left no line has ended yet.
        self.check(self.buffer.len())?;
        Ok(None)
    }

    /// Whether the event has room for that much more.
    fn check(&self, more: usize) -> Result<(), TooLarge> {
        let held = self.data.as_ref().map_or(self.lines.len(), Bytes::len);
        match held + more > self.limit {
            true => Err(TooLarge { limit: self.limit }),
            false => Ok(()),
        }
    }

    fn line(&mut self) -> Option<Bytes> {
        if self.after_cr && !self.buffer.is_empty() {
            self.after_cr = false;
            if self.buffer[0] == b'\n' {
                self.buffer.advance(1);
                self.searched = self.searched.saturating_sub(1);
            }
        }
        let Some(end) = memchr::memchr2(b'\n', b'\r', &self.buffer[self.searched..]) else {
            self.searched = self.buffer.len();
            return None;
        };
        let line = self.buffer.split_to(self.searched + end).freeze();
        self.after_cr = self.buffer[0] == b'\r';
        self.buffer.advance(1);
        self.searched = 0;
        Some(line)
    }

    /// Takes one line in. An empty one ends the event.
    fn take(&mut self, line: Bytes) -> Result<Option<Event>, TooLarge> {
        if line.is_empty() {
            if let Some(id) = self.id.take() {
                self.cursor.id = usable_id(&id);
            }
            let lines = std::mem::take(&mut self.lines);
            let data = if lines.is_empty() { self.data.take() } else { Some(lines.freeze()) };
            return Ok(data.filter(|data| !data.is_empty()).map(|data| Event { data }));
        }
        let colon = memchr::memchr(b':', &line).unwrap_or(line.len());
        let mut value = line.slice((colon + 1).min(line.len())..);
        if value.first() == Some(&b' ') {
            value.advance(1);
        }
        match &line[..colon] {
            b"data" => {
                self.check(value.len())?;
                match (self.data.take(), self.lines.is_empty()) {
                    (None, true) => self.data = Some(value),
                    (first, _) => {
                        for part in [&*first.unwrap_or_default(), b"\n", &value] {
                            gather(&mut self.lines, part, self.limit);
                        }
                    }
                }
            }
            // A copy: a slice would keep all of the chunk.
            b"id" if value.len() <= LONGEST_ID => self.id = Some(Bytes::copy_from_slice(&value)),
            b"id" => self.id = Some(Bytes::new()),
            b"retry" => {
                if let Some(retry) = milliseconds(&value) {
                    self.cursor.retry = Some(retry);
                }
            }
            _ => {}
        }
        Ok(None)
    }
}

/// An id that can be given back. An empty one takes the last one back.
fn usable_id(id: &[u8]) -> Option<HeaderValue> {
    (!id.is_empty()).then(|| HeaderValue::from_bytes(id).ok()).flatten()
}

/// Digits and nothing else; of any number of them.
fn milliseconds(value: &[u8]) -> Option<Duration> {
    let digits = std::str::from_utf8(value).ok()?;
    let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| Duration::from_millis(digits.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        read(chunks).0
    }

    fn read(chunks: &[&[u8]]) -> (Vec<String>, Cursor) {
        let mut parser = Parser::new(1000);
        let mut found = Vec::new();
        for chunk in chunks {
            parser.push(Bytes::copy_from_slice(chunk));
            while let Some(event) = parser.next().unwrap() {
                found.push(String::from_utf8(event.data.to_vec()).unwrap());
            }
        }
        (found, parser.cursor)
    }

    #[test]
    fn reads_every_line_ending_and_joins_data() {
        assert_eq!(
            events(&[b"data: a\n\ndata:b\r\n\r\ndata: c\r\rdata: d\ndata: e\n\n"]),
            ["a", "b", "c", "d\ne"]
        );
    }

    #[test]
    fn comments_and_empty_events_are_nothing() {
        assert_eq!(events(&[b": ping\n\nid: 7\ndata:\n\nretry: 5\n\nevent: message\ndata: x\n\n"]), ["x"]);
    }

    #[test]
    fn an_endless_line_is_an_error() {
        let mut parser = Parser::new(10);
        parser.push(Bytes::from_static(b"data: 0123456789"));
        assert!(parser.next().is_err());
    }

    #[test]
    fn all_lines_of_an_event_count() {
        let mut parser = Parser::new(10);
        parser.push(Bytes::from_static(b"data: 01234\ndata: 567"));
        assert!(parser.next().is_err(), "a line that has not ended counts as well");
        let mut parser = Parser::new(12);
        parser.push(Bytes::from_static(b"data: 012\ndata: 345\ndata: 67\n\ndata: 0123456789\n\n"));
        assert_eq!(parser.next().unwrap().unwrap().data, "012\n345\n67");
        assert_eq!(parser.next().unwrap().unwrap().data, "0123456789");
    }

    fn cursor_after(text: &'static str) -> Cursor {
        let mut parser = Parser::new(10_000);
        parser.push(Bytes::from_static(text.as_bytes()));
        while parser.next().unwrap().is_some() {}
        parser.cursor
    }

    #[test]
    fn the_last_id_counts_of_an_event_that_has_ended() {
        let id = |text| cursor_after(text).id.map(|id| id.to_str().unwrap().to_owned());
        assert_eq!(id("id: 1\ndata: x\n\nid: 2\ndata:\n\ndata: y\n\n").as_deref(), Some("2"));
        assert_eq!(id("id: 1\n\nid: 2\ndata: x\n").as_deref(), Some("1"), "cut before its end");
        assert_eq!(id("id: 1\n\nid\n\n"), None, "taken back");
        assert_eq!(id("id: 1\n\nid: \u{0}\n\n"), None, "no header can hold it");
        assert_eq!(id("data: x\n\n"), None);
    }

    #[test]
    fn the_wait_is_the_servers_within_bounds() {
        for (said, wait) in [
            ("", WAIT),
            ("retry: 500\n\n", Duration::from_millis(500)),
            ("retry: 500\n\nretry: soon\nretry:\nretry: -1\n\n", Duration::from_millis(500)),
            ("retry: 0\n\n", SHORTEST_WAIT),
            ("retry: 99999999999999999999999\n\n", LONGEST_WAIT),
        ] {
            assert_eq!(cursor_after(said).wait(), wait, "{said:?}");
        }
    }

    proptest! {
        #[test]
        fn where_chunks_are_cut_does_not_matter(
            text in "(data: [a-c]{0,3}|: x|id: [0-9]|retry: [0-9]|)(\n|\r\n|\r)",
            more in "((data: [a-c]{0,3}|: x|id: [0-9]|retry: [0-9]|)(\n|\r\n|\r)){0,8}",
            cut in any::<prop::sample::Index>(),
        ) {
            let text = text + &more;
            let at = cut.index(text.len() + 1);
            prop_assert_eq!(read(&[&text.as_bytes()[..at], &text.as_bytes()[at..]]), read(&[text.as_bytes()]));
        }
    }
}
