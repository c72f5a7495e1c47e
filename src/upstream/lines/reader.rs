//! Lines of bounded length from a stream of bytes.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};

const CHUNK: usize = 8 * 1024;

pub(super) struct LineReader<R> {
    read: R,
    buffer: BytesMut,
    /// How much of the buffer holds no line end.
    scanned: usize,
    limit: usize,
}

pub(super) enum Line {
    /// Without its line end. Never empty.
    Text(Bytes),
    /// The last one, without a line end: it may have been cut short. Never empty.
    Rest(Bytes),
    /// More than the limit, and maybe much more: the rest was not read.
    TooLong,
    End,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    pub(super) fn new(read: R, limit: usize) -> Self {
        LineReader { read, buffer: BytesMut::new(), scanned: 0, limit }
    }

    /// The next line. Loses nothing when the future is dropped.
    pub(super) async fn next(&mut self) -> io::Result<Line> {
        loop {
            match memchr::memchr(b'\n', &self.buffer[self.scanned..]) {
                Some(at) if self.scanned + at > self.limit => return Ok(Line::TooLong),
                Some(at) => {
                    let line = self.buffer.split_to(self.scanned + at + 1).freeze();
                    self.scanned = 0;
                    match trimmed(&line) {
                        line if line.is_empty() => continue,
                        line => return Ok(Line::Text(line)),
                    }
                }
                None => self.scanned = self.buffer.len(),
            }
            if self.scanned > self.limit {
                return Ok(Line::TooLong);
            }
            self.buffer.reserve(CHUNK);
            if self.read.read_buf(&mut self.buffer).await? == 0 {
                self.scanned = 0;
                let line = trimmed(&self.buffer.split().freeze());
                return Ok(if line.is_empty() { Line::End } else { Line::Rest(line) });
            }
        }
    }
}

fn trimmed(line: &Bytes) -> Bytes {
    line.slice_ref(line.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(input: &'static str, limit: usize) -> Vec<String> {
        let mut reader = LineReader::new(input.as_bytes(), limit);
        let mut lines = Vec::new();
        loop {
            match reader.next().await.unwrap() {
                Line::Text(line) | Line::Rest(line) => {
                    lines.push(String::from_utf8(line.to_vec()).unwrap());
                }
                Line::TooLong => {
                    lines.push("too long".to_owned());
                    return lines;
                }
                Line::End => return lines,
            }
        }
    }

    #[tokio::test]
    async fn splits_skips_empty_lines_and_keeps_a_last_one_without_end() {
        assert_eq!(lines("a\r\n\n  \nb\nc", 10).await, ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn a_line_over_the_limit_is_not_gathered() {
        assert_eq!(lines("ok\n12345\n", 4).await, ["ok", "too long"]);
        assert_eq!(lines("1234\n", 4).await, ["1234"]);
        let endless = tokio::io::repeat(b'x');
        let mut reader = LineReader::new(endless, 100_000);
        assert!(matches!(reader.next().await.unwrap(), Line::TooLong));
        assert!(reader.buffer.capacity() < 400_000);
    }
}
