//! Sessions over HTTP: a header names them, and what a call has to say comes as events.

use std::sync::Arc;

use futures_util::StreamExt as _;
use http::{HeaderValue, Response, StatusCode};

use super::{
    Door, DoorBody, Head, Refused, SESSION_HEADER, VERSION_HEADER, apply_hint, body::Events,
    check_takes_events, drained, empty, events, json, method_not_allowed,
};
use crate::{
    McpService,
    protocol::{Message, Method, Params, ProtocolVersion, RequestId, code},
    server::{
        legacy::{self, Answer, Session},
        refusal::Refusal,
    },
};

const LAST_EVENT_ID: &str = "last-event-id";

pub(super) async fn serve<S: McpService>(
    service: S,
    door: &Arc<Door>,
    head: Head,
    message: Message,
) -> Result<Response<DoorBody>, Refused> {
    if let Message::Request { id, method: Method::Initialize, params } = &message {
        return initialize(service, door, head, id, params).await;
    }
    let id = match &message {
        Message::Request { id, .. } => Some(id),
        _ => None,
    };
    let session = find(door, &head, id)?;
    match message {
        Message::Request { id, method, params } => answer(service, session, id, method, params).await,
        Message::Notification { method, params } => {
            legacy::take_notification(service, &session, method, params).await;
            Ok(empty(StatusCode::ACCEPTED))
        }
        Message::Response { id, payload } => {
            if let Some(reply) = id.and_then(|id| session.answered(&id)) {
                reply.send(payload);
            }
            Ok(empty(StatusCode::ACCEPTED))
        }
    }
}

/// The stream for what belongs to no request.
pub(super) fn open_stream<S: McpService>(
    service: S,
    door: &Arc<Door>,
    head: Head,
) -> Result<Response<DoorBody>, Refused> {
    if !head.headers.contains_key(SESSION_HEADER) {
        return Err(method_not_allowed());
    }
    let session = find(door, &head, None)?;
    check_takes_events(&head.headers)?;
    let last = head.single(LAST_EVENT_ID).map_err(|why| {
        Refused::new(StatusCode::BAD_REQUEST, code::INVALID_REQUEST, format!("Last-Event-ID {why}"))
    })?;
    let reader = match last {
        // 404 would say that the session is gone.
        Some(last) => session.streams().resume(last).map_err(|_| {
            let why = "Last-Event-ID is of no event that is still kept in this session";
            Refused::new(StatusCode::BAD_REQUEST, code::INVALID_REQUEST, why)
        })?,
        None => {
            // First the stream, so that nothing comes before there is one.
            let reader = session.open_outbox(is_primed(&session));
            legacy::listen(service, &session);
            reader
        }
    };
    Ok(events(Events::Numbered(Box::pin(reader.take_until(drained(head.draining))))))
}

/// `DELETE`.
pub(super) fn end_session(door: &Arc<Door>, head: &Head) -> Result<Response<DoorBody>, Refused> {
    let Ok(Some(id)) = head.single(SESSION_HEADER) else { return Err(method_not_allowed()) };
    find(door, head, None)?;
    door.sessions.end(id);
    Ok(empty(StatusCode::OK))
}

fn find(door: &Door, head: &Head, id: Option<&RequestId>) -> Result<Arc<Session>, Refused> {
    let refuse = |status, message: String| Refused {
        status,
        refusal: Refusal::new(id.cloned(), code::INVALID_REQUEST, message),
        allow: None,
    };
    let version =
        head.single(VERSION_HEADER).map_err(|why| refuse(StatusCode::BAD_REQUEST, why.to_owned()))?;
    if let Some(version) = version.filter(|version| version.parse::<ProtocolVersion>().is_err()) {
        return Err(refuse(StatusCode::BAD_REQUEST, format!("unsupported protocol version {version:?}")));
    }
    let session = match head.single(SESSION_HEADER) {
        Ok(Some(session)) => session,
        Ok(None) => {
            let message =
                "Mcp-Session-Id is missing: send `initialize` first, or a request of MCP 2026-07-28";
            return Err(refuse(StatusCode::BAD_REQUEST, message.to_owned()));
        }
        Err(why) => return Err(refuse(StatusCode::BAD_REQUEST, format!("Mcp-Session-Id {why}"))),
    };
    door.sessions.get(session, &head.principal, &head.scope).ok_or_else(|| {
        refuse(StatusCode::NOT_FOUND, "there is no such session: send `initialize` again".to_owned())
    })
}

async fn initialize<S: McpService>(
    service: S,
    door: &Arc<Door>,
    head: Head,
    id: &RequestId,
    params: &Params,
) -> Result<Response<DoorBody>, Refused> {
    let open = |caller| door.sessions.open(caller);
    let (answer, session) = legacy::initialize(service, head.principal, head.scope, id, params, open).await?;
    let mut response = json(StatusCode::OK, answer);
    if let Some(session) = session {
        let session = HeaderValue::from_str(&session).expect("session ids are Base64");
        response.headers_mut().insert(SESSION_HEADER, session);
    }
    Ok(response)
}

async fn answer<S: McpService>(
    service: S,
    session: Arc<Session>,
    id: RequestId,
    method: Method,
    params: Params,
) -> Result<Response<DoorBody>, Refused> {
    Ok(match legacy::answer(service, session, id, method, params).await? {
        Answer::Message(message, hint) => {
            let mut response = json(StatusCode::OK, message);
            apply_hint(&mut response, hint, false);
            response
        }
        Answer::Talk(mut talk) => {
            let hint = talk.hint.take();
            let session = talk.session();
            let (outlet, reader) = session.streams().open(is_primed(session));
            tokio::spawn(talk.hold(outlet));
            let mut response = events(Events::Numbered(Box::pin(reader)));
            apply_hint(&mut response, hint, false);
            response
        }
        // HTTP wants an answer all the same.
        Answer::Nothing => empty(StatusCode::ACCEPTED),
    })
}

/// An event with an id and no data is for clients that know what it is: others stumble over it.
fn is_primed(session: &Session) -> bool {
    session.caller().client.version >= ProtocolVersion::V2025_11_25
}
