//! Reading server-sent events (WHATWG HTML, 9.2), one at a time and never more than allowed of one.

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::wire::{ReadError, TooLarge};

/// One event that carries data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) data: Bytes,
    /// The event id, for resumption.
    pub(super) id: Option<Bytes>,
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
    data: Option<Bytes>,
    /// All lines of an event that has several.
    lines: BytesMut,
    id: Option<Bytes>,
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
            limit,
        }
    }

    fn push(&mut self, data: Bytes) {
        match self.buffer.is_empty() {
            // The usual case: whole events in one chunk, which is then never copied.
            true => self.buffer = BytesMut::from(data),
            false => self.buffer.extend_from_slice(&data),
        }
    }

    fn next(&mut self) -> Result<Option<Event>, TooLarge> {
        while let Some(line) = self.line() {
            if let Some(event) = self.take(line)? {
                return Ok(Some(event));
            }
        }
        match self.buffer.len() > self.limit {
            true => Err(TooLarge { limit: self.limit }),
            false => Ok(None),
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
            let id = self.id.take();
            let lines = std::mem::take(&mut self.lines);
            let data = if lines.is_empty() { self.data.take() } else { Some(lines.freeze()) };
            self.data = None;
            let data = data.filter(|data| !data.is_empty());
            return Ok(data.map(|data| Event { data, id }));
        }
        let colon = memchr::memchr(b':', &line).unwrap_or(line.len());
        let mut value = line.slice((colon + 1).min(line.len())..);
        if value.first() == Some(&b' ') {
            value.advance(1);
        }
        match &line[..colon] {
            b"data" => match &self.data {
                None => self.data = Some(value),
                Some(first) => {
                    if self.lines.is_empty() {
                        self.lines.extend_from_slice(first);
                    }
                    if self.lines.len() + value.len() > self.limit {
                        return Err(TooLarge { limit: self.limit });
                    }
                    self.lines.extend_from_slice(b"\n");
                    self.lines.extend_from_slice(&value);
                }
            },
            b"id" => self.id = Some(value),
            _ => {}
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = Parser::new(1000);
        let mut found = Vec::new();
        for chunk in chunks {
            parser.push(Bytes::copy_from_slice(chunk));
            while let Some(event) = parser.next().unwrap() {
                found.push(String::from_utf8(event.data.to_vec()).unwrap());
            }
        }
        found
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

    proptest! {
        #[test]
        fn where_chunks_are_cut_does_not_matter(
            text in "(data: [a-c]{0,3}|: x|id: [0-9]|)(\n|\r\n|\r)",
            more in "((data: [a-c]{0,3}|: x|id: [0-9]|)(\n|\r\n|\r)){0,8}",
            cut in any::<prop::sample::Index>(),
        ) {
            let text = text + &more;
            let at = cut.index(text.len() + 1);
            prop_assert_eq!(events(&[&text.as_bytes()[..at], &text.as_bytes()[at..]]), events(&[text.as_bytes()]));
        }
    }
}
