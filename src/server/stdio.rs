//! One client on a pair of byte streams: stdin and stdout, a socket, a pipe.
//!
//! One message a line, either era. Whatever the service does, nothing but messages is written.

use std::{io, pin::pin, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{
    connection::{Connection, Who},
    refusal::Refusal,
    streams::{Reader, Sent},
};
use crate::{
    McpService,
    identity::{Principal, Scope},
    protocol::{Message, code},
};

/// How long what was said last may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// As much is written at once.
const WRITE: usize = 64 * 1024;
/// A piece of this size is not copied to be written with others.
const LARGE: usize = 16 * 1024;
const CHUNK: usize = 8 * 1024;

/// The door for one client that speaks in lines.
///
/// The client is served until its side ends or `shutdown` is done. Then subscriptions end, what is under way has a
/// grace, and the output is closed.
///
/// ```
/// use portcullis::{gateway::Gateway, server::McpStdio};
/// use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let (mut client, server) = tokio::io::duplex(1024);
/// let (input, output) = tokio::io::split(server);
/// let serving = McpStdio::new(Gateway::builder().build()).serve(input, output, std::future::pending());
/// let talking = async {
///     client.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n").await?;
///     client.shutdown().await?;
///     let mut said = String::new();
///     client.read_to_string(&mut said).await?;
///     assert_eq!(said, "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{}}\n");
///     Ok(())
/// };
/// let (served, talked): (_, std::io::Result<()>) = tokio::join!(serving, talking);
/// served.and(talked)
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct McpStdio<S> {
    service: S,
    who: Who,
    line_limit: usize,
    most_requests: u32,
    grace: Duration,
}

impl<S: McpService> McpStdio<S> {
    /// A door to `service` for an anonymous client.
    pub fn new(service: S) -> Self {
        let who = Who { principal: Principal::anonymous(), scope: Scope::Gateway, modern: true };
        // As large as a body on the HTTP door.
        McpStdio { service, who, line_limit: 4 << 20, most_requests: 256, grace: Duration::from_secs(5) }
    }

    /// Who the client is.
    pub fn principal(mut self, principal: Principal) -> Self {
        self.who.principal = principal;
        self
    }

    /// What of the gateway it sees.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.who.scope = scope;
        self
    }

    /// The longest line, in bytes. 4 MiB by default.
    pub fn line_limit(mut self, bytes: usize) -> Self {
        self.line_limit = bytes;
        self
    }

    /// The most requests under way at once, subscriptions among them. 256 by default; more are refused.
    pub fn most_requests(mut self, most: u32) -> Self {
        self.most_requests = most.max(1);
        self
    }

    /// How long requests under way have when the client's side ended. 5 seconds by default.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Serves until the input ends, or until `shutdown`; one that comes while requests under way have their grace takes
    /// it from them.
    ///
    /// # Errors
    ///
    /// When input or output fail. A client that closes them has only gone.
    pub async fn serve<R, W>(
        self,
        input: R,
        output: W,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()>
    where
        R: AsyncRead + Send + Unpin,
        W: AsyncWrite + Send + Unpin,
    {
        let (connection, said) = Connection::open(self.service, self.who, self.most_requests);
        let mut shutdown = pin!(shutdown.fuse());
        let talking = async {
            let mut lines = Lines::new(input, self.line_limit);
            let heard = tokio::select! {
                heard = hear(&connection, &mut lines) => heard,
                () = &mut shutdown => Ok(()),
            };
            tokio::select! {
                () = connection.drain(self.grace) => {}
                () = until(&mut shutdown) => {}
            }
            connection.close();
            heard
        };
        let mut writing = pin!(write(said, output));
        let outcome = tokio::select! {
            heard = talking => match tokio::time::timeout(LAST_WORDS, writing).await {
                Ok(written) => heard.and(written),
                // It does not read; what was left is lost.
                Err(_) => heard,
            },
            written = &mut writing => written,
        };
        connection.close();
        match outcome {
            Err(error) if is_gone(&error) => Ok(()),
            outcome => outcome,
        }
    }
}

/// A future that is done stays done.
async fn until<F: futures_util::future::FusedFuture<Output = ()> + Unpin>(done: &mut F) {
    if done.is_terminated() {
        // It was what began the end; there is no second one.
        std::future::pending().await
    }
    done.await
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

async fn hear<S: McpService, R: AsyncRead + Unpin>(
    connection: &std::sync::Arc<Connection<S>>,
    lines: &mut Lines<R>,
) -> io::Result<()> {
    loop {
        let refusal = match lines.next().await? {
            Line::End => return Ok(()),
            Line::TooLong => {
                let message = format!("a line is longer than {} bytes", lines.limit);
                Refusal::new(None, code::INVALID_REQUEST, message)
            }
            Line::Text(text) => match Message::parse(text) {
                Ok(message) => {
                    connection.take(message).await;
                    continue;
                }
                Err(error) => error.into(),
            },
        };
        connection.refuse(&refusal).await;
    }
}

/// Writes each message on a line of its own, until there will be no more.
async fn write<W: AsyncWrite + Unpin>(mut said: Reader, mut output: W) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    while let Some(sent) = said.next().await {
        let mut next = Some(sent);
        while let Some(Sent { message, .. }) = next {
            let mut message = message.unwrap_or_default();
            message.flatten();
            for chunk in message.0 {
                if chunk.len() < LARGE {
                    buffer.put_slice(&chunk);
                    continue;
                }
                output.write_all(&buffer).await?;
                buffer.clear();
                output.write_all(&chunk).await?;
            }
            buffer.put_u8(b'\n');
            next = match buffer.len() < WRITE {
                true => said.next().now_or_never().flatten(),
                false => None,
            };
        }
        output.write_all(&buffer).await?;
        output.flush().await?;
        match buffer.capacity() <= 2 * WRITE {
            true => buffer.clear(),
            false => buffer = BytesMut::new(),
        }
    }
    output.shutdown().await
}

/// Lines of bounded length. One that is too long is passed over.
struct Lines<R> {
    input: R,
    buffer: BytesMut,
    /// How much of the buffer holds no line end.
    scanned: usize,
    limit: usize,
    /// The rest of a long line is still to come.
    skipping: bool,
}

enum Line {
    /// Without its end, and never empty.
    Text(Bytes),
    TooLong,
    End,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    fn new(input: R, limit: usize) -> Self {
        Lines { input, buffer: BytesMut::new(), scanned: 0, limit, skipping: false }
    }

    async fn next(&mut self) -> io::Result<Line> {
        loop {
            while let Some(at) = memchr::memchr(b'\n', &self.buffer[self.scanned..]) {
                let line = self.buffer.split_to(self.scanned + at + 1).freeze();
                self.scanned = 0;
                let text = line.trim_ascii();
                match std::mem::take(&mut self.skipping) {
                    true => return Ok(Line::TooLong),
                    false if text.len() > self.limit => return Ok(Line::TooLong),
                    false if text.is_empty() => {}
                    false => return Ok(Line::Text(line.slice_ref(text))),
                }
            }
            self.scanned = self.buffer.len();
            // One more for the `\r` before the end.
            if self.skipping || self.scanned > self.limit + 1 {
                self.skipping = true;
                self.buffer.clear();
                self.scanned = 0;
            }
            self.buffer.reserve(CHUNK);
            if self.input.read_buf(&mut self.buffer).await? == 0 {
                return Ok(self.last());
            }
        }
    }

    /// The last line may lack its end.
    fn last(&mut self) -> Line {
        self.scanned = 0;
        let line = self.buffer.split().freeze();
        let text = line.trim_ascii();
        match std::mem::take(&mut self.skipping) {
            true => Line::TooLong,
            false if text.is_empty() => Line::End,
            false => Line::Text(line.slice_ref(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(input: &'static str, limit: usize) -> Vec<String> {
        let mut lines = Lines::new(input.as_bytes(), limit);
        let mut found = Vec::new();
        loop {
            match lines.next().await.unwrap() {
                Line::Text(line) => found.push(String::from_utf8(line.to_vec()).unwrap()),
                Line::TooLong => found.push("too long".to_owned()),
                Line::End => return found,
            }
        }
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_is_passed_over() {
        assert_eq!(lines("a\r\n\n  \nb\nc", 10).await, ["a", "b", "c"]);
        assert_eq!(lines("ok\n123456789\nok\n12345", 4).await, ["ok", "too long", "ok", "12345"]);
        assert_eq!(lines("1234\r\n", 4).await, ["1234"]);
    }

    #[tokio::test]
    async fn an_endless_line_takes_no_room() {
        let endless = tokio::io::repeat(b'x').take(10 << 20);
        let mut lines = Lines::new(endless, 100_000);
        assert!(matches!(lines.next().await.unwrap(), Line::TooLong));
        assert!(lines.buffer.capacity() < 400_000);
        assert!(matches!(lines.next().await.unwrap(), Line::End));
    }
}
