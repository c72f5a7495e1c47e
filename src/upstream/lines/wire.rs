//! One connection: a task that reads and writes lines until either side is done.

use std::{future::pending, io, sync::Arc, time::Duration};

use bytes::{Buf as _, Bytes};
use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    task::AbortHandle,
    time::timeout,
};

use super::{
    calls::{Calls, End, Outbox, Outgoing},
    reader::{Line, LineReader},
};
use crate::{
    error::Fault,
    protocol::{Message, ServerName},
};

/// How long to read on when the other side stops reading, or its process has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What surrounds the two byte streams.
pub(crate) struct Surroundings {
    /// The longest line that is read.
    pub(crate) max_line: usize,
    /// Ready when whoever speaks on the other side has ended, and why.
    pub(crate) gone: BoxFuture<'static, String>,
    /// Ready when our side shall be closed. What was asked before may still be answered.
    pub(crate) closing: BoxFuture<'static, ()>,
}

pub(crate) struct Wire {
    calls: Arc<Calls>,
    task: AbortHandle,
}

impl Wire {
    /// Starts to read and write.
    pub(crate) fn start<R, W>(upstream: &ServerName, read: R, write: W, around: Surroundings) -> Self
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (calls, outbox) = Calls::new(upstream.clone());
        let run = run(calls.clone(), LineReader::new(read, around.max_line), write, outbox, around);
        Wire { calls, task: tokio::spawn(run).abort_handle() }
    }

    pub(super) fn calls(&self) -> &Arc<Calls> {
        &self.calls
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
        self.calls.end(End::new(Fault::Lost, "the gateway closed the connection"));
    }
}

async fn run<R, W>(
    calls: Arc<Calls>,
    reader: LineReader<R>,
    write: W,
    outbox: Outbox,
    mut around: Surroundings,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let end = {
        let mut reading = std::pin::pin!(read_all(&calls, reader, around.max_line));
        let writing = std::pin::pin!(write_all(&calls, write, outbox, around.closing));
        tokio::select! {
            end = &mut reading => end,
            error = writing => match timeout(LAST_WORDS, &mut reading).await {
                Ok(end) => end,
                Err(_) => Some(End::new(Fault::Lost, format!("it does not read any more: {error}"))),
            },
            reason = &mut around.gone => {
                calls.close();
                let end = timeout(LAST_WORDS, &mut reading).await.ok().flatten();
                around.gone = Box::pin(std::future::ready(reason));
                end
            }
        }
    };
    calls.close();
    let end = match end {
        Some(end) => end,
        None => {
            let reason = timeout(LAST_WORDS, around.gone).await;
            End::new(Fault::Lost, reason.unwrap_or_else(|_| "it closed its output".to_owned()))
        }
    };
    tracing::debug!(upstream = %calls.upstream(), reason = &*end.reason, "connection ended");
    calls.end(end);
}

/// Reads until the end. `None` is an orderly one.
async fn read_all<R: AsyncRead + Unpin>(
    calls: &Arc<Calls>,
    mut reader: LineReader<R>,
    max_line: usize,
) -> Option<End> {
    loop {
        match reader.next().await {
            Ok(Line::Text(line)) => calls.receive(line),
            // Cut short, it is nobody's answer: how the other side ended says more.
            Ok(Line::Rest(line)) if Message::parse(line.clone()).is_err() => {}
            Ok(Line::Rest(line)) => calls.receive(line),
            Ok(Line::End) => return None,
            Ok(Line::TooLong) => {
                return Some(End::new(
                    Fault::TooLarge,
                    format!("it sent a line of more than {max_line} bytes"),
                ));
            }
            Err(error) => return Some(End::new(Fault::Lost, format!("it cannot be read: {error}"))),
        }
    }
}

/// Writes until that fails, or until `closing`: then it lets the stream go and rests.
async fn write_all<W: AsyncWrite + Unpin>(
    calls: &Calls,
    mut write: W,
    outbox: Outbox,
    closing: BoxFuture<'static, ()>,
) -> io::Error {
    tokio::select! {
        error = write_lines(calls, &mut write, outbox) => return error,
        () = closing => {}
    }
    // An in-memory pipe wants to be told; a real one closes by itself.
    let _ = timeout(LAST_WORDS, write.shutdown()).await;
    drop(write);
    pending().await
}

async fn write_lines<W: AsyncWrite + Unpin>(calls: &Calls, write: &mut W, mut outbox: Outbox) -> io::Error {
    loop {
        // Fair to both: who asks without end must not keep our own calls from being written.
        let next = async {
            tokio::select! {
                Some(outgoing) = outbox.queue.recv() => Some(outgoing),
                Some(line) = outbox.replies.recv() => Some(Outgoing { call: None, line }),
                else => None,
            }
        };
        let line = tokio::select! {
            biased;
            Some(urgent) = outbox.urgent.recv() => urgent.into_line(),
            Some(outgoing) = next => match outgoing.call {
                Some(id) if !calls.begin_to_write(id) => continue,
                _ => outgoing.line,
            },
            else => return io::ErrorKind::BrokenPipe.into(),
        };
        if let Err(error) = write_line(write, line).await {
            return error;
        }
    }
}

async fn write_line<W: AsyncWrite + Unpin>(write: &mut W, line: Bytes) -> io::Result<()> {
    let line = one_line(line);
    write.write_all_buf(&mut line.chain(&b"\n"[..])).await?;
    write.flush().await
}

/// What somebody else wrote may have line breaks between its tokens. Sent as they are, they would break the message in
/// two, and a client could have a line be a message of its own, past everything that judges requests. Within strings
/// JSON has none.
fn one_line(line: Bytes) -> Bytes {
    if memchr::memchr2(b'\n', b'\r', &line).is_none() {
        return line;
    }
    line.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect()
}
