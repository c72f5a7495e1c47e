//! One answer on its way back.

use std::fmt;

use bytes::Bytes;
use http::{Extensions, HeaderMap, StatusCode};
use serde_json::Value;

use super::{Frame, FrameStream, ItemList, RawObject, RpcError};

/// What a service answers: one payload, and what layers leave for layers further out.
#[derive(Debug)]
pub struct McpResponse {
    payload: Payload,
    extensions: Extensions,
}

/// The answer itself.
pub enum Payload {
    /// A result nobody opened, as JSON.
    Raw(Bytes),
    /// An assembled list: filtered by name, never parsed.
    Items(ItemList),
    /// A result somebody opened or made.
    Value(Value),
    /// A JSON-RPC error, an upstream's own kept verbatim.
    Error(RpcError),
    /// Notifications and questions, then one of the others.
    Stream(FrameStream),
}

impl McpResponse {
    /// An answer.
    pub fn new(payload: Payload) -> Self {
        McpResponse { payload, extensions: Extensions::new() }
    }

    /// A result made here.
    pub fn value(value: Value) -> Self {
        Self::new(Payload::Value(value))
    }

    /// A result as JSON.
    pub fn raw(json: impl Into<Bytes>) -> Self {
        Self::new(Payload::Raw(json.into()))
    }

    /// An error.
    pub fn error(error: RpcError) -> Self {
        Self::new(Payload::Error(error))
    }

    /// The payload.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The payload, taken out.
    pub fn into_payload(self) -> Payload {
        self.payload
    }

    /// Payload and extensions.
    pub fn into_parts(self) -> (Payload, Extensions) {
        (self.payload, self.extensions)
    }

    /// From payload and extensions.
    pub fn from_parts(payload: Payload, extensions: Extensions) -> Self {
        McpResponse { payload, extensions }
    }

    /// Typed values left by layers further in.
    pub fn extensions(&self) -> &Extensions {
        &self.extensions
    }

    /// The same, to be changed.
    pub fn extensions_mut(&mut self) -> &mut Extensions {
        &mut self.extensions
    }

    /// Changes the result: the payload itself, or a stream's last frame. A layer that rewrites results uses this,
    /// so that it cannot forget the streams.
    #[must_use]
    pub fn map_final(self, mut change: impl FnMut(Payload) -> Payload + Send + 'static) -> Self {
        use futures_util::StreamExt as _;
        let payload = match self.payload {
            Payload::Stream(frames) => Payload::Stream(Box::pin(frames.map(move |frame| match frame {
                Ok(Frame::Final(payload)) => Ok(Frame::Final(change(payload))),
                other => other,
            }))),
            payload => change(payload),
        };
        McpResponse { payload, extensions: self.extensions }
    }
}

impl Payload {
    /// The result as a JSON value, read only now. `None` for an error or a stream, or when the upstream's JSON
    /// does not fit a [`Value`] (a number beyond `f64`).
    pub fn to_value(&self) -> Option<Value> {
        match self {
            Payload::Raw(json) => serde_json::from_slice(json).ok(),
            Payload::Items(list) => serde_json::from_slice(&list.to_json()).ok(),
            Payload::Value(value) => Some(value.clone()),
            Payload::Error(_) | Payload::Stream(_) => None,
        }
    }

    /// The result's members, scanned one level deep.
    pub fn to_object(&self) -> Option<RawObject> {
        match self {
            Payload::Raw(json) => RawObject::parse(json.clone()).ok(),
            Payload::Items(list) => RawObject::parse(list.to_json()).ok(),
            Payload::Value(value) => RawObject::parse(value.to_string().into()).ok(),
            Payload::Error(_) | Payload::Stream(_) => None,
        }
    }

    /// The result as JSON bytes, or the error. `None` for a stream.
    pub fn to_json(&self) -> Option<Result<Bytes, RpcError>> {
        match self {
            Payload::Raw(json) => Some(Ok(json.clone())),
            Payload::Items(list) => Some(Ok(list.to_json())),
            Payload::Value(value) => Some(Ok(value.to_string().into())),
            Payload::Error(error) => Some(Err(error.clone())),
            Payload::Stream(_) => None,
        }
    }

    /// Runs a stream to its end and gives its last frame; the frames before it are dropped and questions refused.
    /// For callers that have nobody to show progress to.
    pub async fn settle(self) -> Result<Payload, crate::BoxError> {
        use futures_util::StreamExt as _;
        let Payload::Stream(mut frames) = self else { return Ok(self) };
        while let Some(frame) = frames.next().await {
            if let Frame::Final(payload) = frame? {
                return Ok(payload);
            }
        }
        Err("the stream ended without a result".into())
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Payload::Raw(json) => write!(f, "Raw({} bytes)", json.len()),
            Payload::Items(list) => write!(f, "Items({} {})", list.len(), list.kind().member()),
            Payload::Value(_) => f.write_str("Value"),
            Payload::Error(error) => error.fmt(f),
            Payload::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// What an HTTP door should say around the payload: left in the response's extensions by whoever knows.
#[derive(Clone, Debug, Default)]
pub struct HttpHint {
    /// Instead of 200.
    pub status: Option<StatusCode>,
    /// Added to the door's own.
    pub headers: HeaderMap,
}
