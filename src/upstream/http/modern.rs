//! One POST a request, and nothing to remember.

use std::sync::Arc;

use futures_util::stream;
use http::{HeaderMap, HeaderValue, StatusCode};

use super::{
    Endpoint, Shared,
    legacy::is_about_us,
    sse::Events,
    wire::{Answer, MCP_METHOD, MCP_NAME, PROTOCOL_VERSION},
};
use crate::{
    BoxError,
    error::{Fault, UpstreamError},
    protocol::{
        Frame, FrameStream, HttpHint, McpRequest, McpResponse, Message, Method, MirroredHeaders,
        Notification, ParamHeaders, Params, Payload, ProtocolVersion, RawObject, RequestId, Route,
        Unsolicited, encode_header, sign_result,
    },
    upstream::translate,
};

/// Sends the request and reads the answer. Dropping it closes the connection, which is how a modern request is
/// cancelled.
pub(super) async fn call(
    shared: &Arc<Shared>,
    endpoint: &Arc<Endpoint>,
    request: McpRequest,
) -> Result<McpResponse, BoxError> {
    if request.extensions().get::<Unsolicited>().is_some() {
        // There is no such thing here: what is said belongs to a request.
        return Ok(McpResponse::raw("{}"));
    }
    let params = translate::modern_params(&request, endpoint.version);
    let mut headers = headers(endpoint.post.clone(), endpoint.version, &request, &params);
    add_param_headers(&mut headers, &request);
    if request.id().is_none() && request.method().is_notification() {
        let body = crate::protocol::notification_json(request.method(), &params);
        shared.wire.post(&endpoint.uri, headers, body).await?;
        return Ok(McpResponse::raw("{}"));
    }
    // Every POST stands alone, so the client's own id does as well as any.
    let id = request.id().cloned().unwrap_or_else(|| RequestId::from(1));
    let body = crate::protocol::request_json(&id, request.method(), &params);
    let answer = shared.wire.post(&endpoint.uri, headers, body).await.inspect_err(|error| {
        if error.fault == Fault::Unreachable {
            shared.doubt(endpoint);
        }
    })?;
    match answer {
        Answer::Json(_, body) => Ok(McpResponse::new(response(shared, body, &id)?)),
        Answer::Events(_, events) => first_of(Reader { shared: shared.clone(), events, id }).await,
        Answer::Accepted => Err(shared.wire.error(Fault::Garbled, "an answer without a body").into()),
        Answer::Refused(status, _, body) if is_about_us(status) => {
            if status == StatusCode::UNAUTHORIZED {
                // The credentials may have been changed since they were read.
                shared.doubt(endpoint);
            }
            Err(shared.wire.refused(status, &body).into())
        }
        Answer::Refused(status, _, body) => match Message::parse(body.clone()) {
            Ok(Message::Response { id: answered, payload: Payload::Error(error) }) => {
                if answered.is_none() && status.is_client_error() {
                    // "No session", for one.
                    shared.doubt(endpoint);
                }
                let mut response = McpResponse::error(error);
                let status = (status != StatusCode::OK).then_some(status);
                response.extensions_mut().insert(HttpHint { status, ..HttpHint::default() });
                Ok(response)
            }
            _ => {
                shared.doubt(endpoint);
                Err(shared.wire.refused(status, &body).into())
            }
        },
    }
}

/// The headers that mirror the body.
pub(super) fn headers(
    mut headers: HeaderMap,
    version: ProtocolVersion,
    request: &McpRequest,
    params: &Params,
) -> HeaderMap {
    headers.insert(PROTOCOL_VERSION, HeaderValue::from_static(version.as_str()));
    if let Ok(method) = HeaderValue::from_str(request.method().as_str()) {
        headers.insert(MCP_METHOD, method);
    }
    let name = request.method().name_member().and_then(|member| params.get_string(member));
    if let Some(name) = name.and_then(|name| HeaderValue::from_str(&encode_header(&name)).ok()) {
        headers.insert(MCP_NAME, name);
    }
    headers
}

/// `Mcp-Param-*`: those that the tool annotates are made anew from the arguments, whatever the client sent; those that
/// nobody here knows pass on.
fn add_param_headers(headers: &mut HeaderMap, request: &McpRequest) {
    if let Some(sent) = request.extensions().get::<MirroredHeaders>() {
        headers.extend(sent.params().map(|(name, value)| (name.clone(), value.clone())));
    }
    let Some(Route { definition: Some(definition), .. }) = request.extensions().get() else { return };
    let Ok(annotations) = ParamHeaders::of_definition(definition) else { return };
    if annotations.is_empty() {
        return;
    }
    let arguments = request.params().get_object("arguments").unwrap_or_else(RawObject::empty);
    for (name, value) in annotations.expected(&arguments) {
        match value.map(|value| HeaderValue::from_str(&encode_header(&value))) {
            Some(Ok(value)) => drop(headers.insert(name.clone(), value)),
            _ => drop(headers.remove(name)),
        }
    }
}

/// A JSON answer.
fn response(shared: &Shared, body: bytes::Bytes, id: &RequestId) -> Result<Payload, UpstreamError> {
    match Message::parse_response(body, id) {
        Ok(Message::Response { id: answered, payload }) if answers(&answered, &payload, id) => {
            Ok(sign_result(shared.wire.upstream(), payload))
        }
        Ok(_) => Err(shared.wire.error(Fault::Garbled, "an answer to something else")),
        Err(e) => Err(shared.wire.error(Fault::Garbled, e)),
    }
}

/// Whether an answer is one to `id`. An error may come without an id.
pub(super) fn answers(answered: &Option<RequestId>, payload: &Payload, id: &RequestId) -> bool {
    match answered {
        Some(answered) => answered == id,
        None => matches!(payload, Payload::Error(_)),
    }
}

struct Reader {
    shared: Arc<Shared>,
    events: Events,
    id: RequestId,
}

/// A stream whose first event is the result is no stream.
async fn first_of(mut reader: Reader) -> Result<McpResponse, BoxError> {
    match reader.next().await? {
        Frame::Final(payload) => Ok(McpResponse::new(payload)),
        first => Ok(McpResponse::new(Payload::Stream(reader.into_frames(first)))),
    }
}

impl Reader {
    fn into_frames(self, first: Frame) -> FrameStream {
        use futures_util::StreamExt as _;
        let rest = stream::unfold(Some(self), |reader| async move {
            let mut reader = reader?;
            let frame = reader.next().await;
            let more = matches!(frame, Ok(Frame::Notification(_)));
            Some((frame.map_err(Into::into), more.then_some(reader)))
        });
        Box::pin(stream::iter([Ok(first)]).chain(rest))
    }

    async fn next(&mut self) -> Result<Frame, UpstreamError> {
        let wire = &self.shared.wire;
        loop {
            let event = self.events.next().await.map_err(|e| wire.read_error(e))?;
            let Some(event) = event else {
                return Err(wire.error(Fault::Lost, "the stream ended before the result"));
            };
            match Message::parse_response(event.data, &self.id) {
                Ok(Message::Notification { method, params }) => {
                    return Ok(Frame::Notification(Notification { method, params }));
                }
                Ok(Message::Response { id, payload }) if answers(&id, &payload, &self.id) => {
                    return Ok(Frame::Final(sign_result(wire.upstream(), payload)));
                }
                Ok(Message::Response { .. }) => {
                    return Err(wire.error(Fault::Garbled, "an answer to something else"));
                }
                // A modern server asks nothing on its own; it has been told so by the specification.
                Ok(Message::Request { method, .. }) => log_stray(wire.upstream(), &method),
                Err(e) => return Err(wire.error(Fault::Garbled, e)),
            }
        }
    }
}

fn log_stray(upstream: &crate::protocol::ServerName, method: &Method) {
    tracing::debug!(%upstream, %method, "left out a request on a modern stream");
}
