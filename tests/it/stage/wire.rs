//! HTTP as bytes: nothing between a story and what is on the wire. Each request has a connection of its own, so a
//! client that goes away is one that is dropped.

use std::{fmt, net::SocketAddr};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use super::PATIENCE;

/// A request to be sent.
#[derive(Clone)]
pub(crate) struct Request {
    address: SocketAddr,
    inner: http::Request<Bytes>,
}

impl Request {
    pub(crate) fn new(address: SocketAddr, method: Method, path: &str) -> Self {
        let mut inner = http::Request::new(Bytes::new());
        *inner.method_mut() = method;
        *inner.uri_mut() = path.parse().expect("a path");
        Request { address, inner }.header("host", &address.to_string())
    }

    /// A POST of a message, with the headers that every such has.
    pub(crate) fn post(address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Self {
        Request::new(address, Method::POST, path)
            .header("content-type", "application/json")
            .header("accept", "application/json, text/event-stream")
            .body(body)
    }

    /// Adds a header, beside any of that name.
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        let name = HeaderName::try_from(name).expect("a header name");
        let value = HeaderValue::from_bytes(value.as_bytes()).expect("a header value");
        self.inner.headers_mut().append(name, value);
        self
    }

    /// Puts a header in the place of those of that name.
    pub(crate) fn set(self, name: &str, value: &str) -> Self {
        self.without(name).header(name, value)
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.inner.headers_mut().remove(name);
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Bytes>) -> Self {
        *self.inner.body_mut() = body.into();
        self
    }

    /// The whole answer.
    pub(crate) async fn send(self) -> Answer {
        let answer = async {
            let (response, _connection) = self.exchange().await;
            let (parts, body) = response.into_parts();
            let body = body.collect().await.expect("the whole answer arrives").to_bytes();
            Answer { status: parts.status, headers: parts.headers, body }
        };
        timeout(PATIENCE, answer).await.expect("an answer in time")
    }

    /// The beginning of an answer whose events come one by one.
    pub(crate) async fn open(self) -> Stream {
        let (response, connection) =
            timeout(PATIENCE, self.exchange()).await.expect("the head of an answer in time");
        let (parts, body) = response.into_parts();
        Stream {
            status: parts.status,
            headers: parts.headers,
            body,
            buffer: BytesMut::new(),
            _connection: connection,
        }
    }

    async fn exchange(self) -> (http::Response<Incoming>, Connection) {
        let stream = TcpStream::connect(self.address).await.expect("a connection");
        stream.set_nodelay(true).expect("an open socket");
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.expect("a fresh connection");
        let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
        let response = sender.send_request(self.inner.map(Full::new)).await.expect("an answer");
        (response, connection)
    }
}

/// Closed when dropped.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A whole answer.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("a readable header"))
    }

    /// The body.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    /// The messages: one, or those of a stream.
    pub(crate) fn messages(&self) -> Vec<Bytes> {
        if self.header("content-type") != Some("text/event-stream") {
            return vec![self.body.clone()];
        }
        let mut buffer = BytesMut::from(&self.body[..]);
        std::iter::from_fn(|| next_event(&mut buffer)).collect()
    }

    /// The last message, which is the answer.
    pub(crate) fn message(&self) -> Bytes {
        self.messages().pop().expect("a message")
    }

    pub(crate) fn json(&self) -> Value {
        let message = self.message();
        serde_json::from_slice(&message).unwrap_or_else(|e| panic!("{e}: {self}"))
    }

    /// The result, where there has to be one.
    pub(crate) fn result(&self) -> Value {
        match self.json()["result"].take() {
            Value::Null => panic!("no result: {self}"),
            result => result,
        }
    }

    /// The error, where there has to be one.
    pub(crate) fn error(&self) -> Value {
        match self.json()["error"].take() {
            Value::Null => panic!("no error: {self}"),
            error => error,
        }
    }

    /// Status and JSON-RPC code of a refusal.
    pub(crate) fn refusal(&self) -> (u16, i64) {
        (self.status.as_u16(), self.error()["code"].as_i64().expect("a code"))
    }

    /// The text of the first content block.
    pub(crate) fn content(&self) -> String {
        let result = self.result();
        result["content"][0]["text"].as_str().unwrap_or_else(|| panic!("no text: {self}")).to_owned()
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {}", self.status, self.headers, String::from_utf8_lossy(&self.body))
    }
}

/// An answer under way. Dropping it closes its connection.
pub(crate) struct Stream {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    buffer: BytesMut,
    _connection: Connection,
}

impl Stream {
    /// The next message; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        if self.headers.get("content-type").is_some_and(|kind| kind == "application/json") {
            // No stream after all: one message is all there is.
            while let Some(frame) = timeout(PATIENCE, self.body.frame()).await.expect("the rest in time") {
                self.buffer
                    .extend_from_slice(&frame.expect("the whole answer").into_data().unwrap_or_default());
            }
            return Some(self.buffer.split().freeze()).filter(|body| !body.is_empty());
        }
        loop {
            if let Some(event) = next_event(&mut self.buffer) {
                return Some(event);
            }
            let frame = timeout(PATIENCE, self.body.frame()).await.expect("an event in time");
            let data = frame?.expect("the stream goes on").into_data();
            self.buffer.extend_from_slice(&data.unwrap_or_default());
        }
    }

    /// The next event as it stands on the wire.
    pub(crate) async fn event(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\n\n") {
                let event = self.buffer.split_to(end + 2);
                return Some(String::from_utf8(event.to_vec()).expect("UTF-8"));
            }
            let frame = timeout(PATIENCE, self.body.frame()).await.expect("an event in time");
            let data = frame?.expect("the stream goes on").into_data();
            self.buffer.extend_from_slice(&data.unwrap_or_default());
        }
    }

    pub(crate) async fn next_json(&mut self) -> Value {
        let message = self.next().await.expect("one more message");
        serde_json::from_slice(&message).expect("a message is JSON")
    }

    /// The next message of this method; others are passed over.
    pub(crate) async fn until(&mut self, method: &str) -> Value {
        loop {
            let message = self.next_json().await;
            if message["method"] == method {
                return message;
            }
        }
    }
}

/// Cuts one event with data off the front. All in these stories have one line of it.
fn next_event(buffer: &mut BytesMut) -> Option<Bytes> {
    loop {
        let end = buffer.windows(2).position(|w| w == b"\n\n")?;
        let event = buffer.split_to(end).freeze();
        buffer.advance(2);
        let data = event.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(b"data: "));
        if let Some(data) = data.filter(|data| !data.is_empty()) {
            return Some(event.slice_ref(data));
        }
    }
}
