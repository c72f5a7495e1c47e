//! An upstream of 2024-11-05: one event stream, and a POST for each message.

use std::sync::{Arc, Mutex};

use axum::{
    Router,
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use futures_util::stream;
use portcullis::{BoxError, protocol::McpRequest, upstream::SseUpstream};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc};
use tower::ServiceExt as _;

/// The stream of the only connection, if there is one.
type Events = Arc<Mutex<Option<mpsc::UnboundedSender<String>>>>;

/// Serves one tool; `endpoint` is what the stream begins with.
async fn server(endpoint: &'static str) -> String {
    let events = Events::default();
    let (open, take) = (events.clone(), events);
    let app = Router::new()
        .route("/sse", get(move || std::future::ready(stream_of(&open, endpoint))))
        .route("/messages", post(move |body: Bytes| std::future::ready(answer(&take, &body))));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound port");
    tokio::spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}/sse")
}

fn stream_of(events: &Events, endpoint: &str) -> Response {
    let (sender, receiver) = mpsc::unbounded_channel();
    sender.send(format!("event: endpoint\ndata: {endpoint}\n\n")).expect("the receiver is here");
    *events.lock().expect("no panic") = Some(sender);
    let chunks = stream::unfold(receiver, |mut receiver| async {
        Some((Ok::<_, BoxError>(receiver.recv().await?), receiver))
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(chunks)).into_response()
}

fn answer(events: &Events, body: &[u8]) -> &'static str {
    let message: Value = serde_json::from_slice(body).expect("messages are JSON");
    let result = match message["method"].as_str().expect("a method") {
        "initialize" => json!({ "protocolVersion": "2024-11-05", "capabilities": { "tools": {} },
            "serverInfo": { "name": "old", "version": "1" } }),
        "tools/call" => json!({ "content": [{ "type": "text", "text": message["params"]["name"] }] }),
        "tools/list" => json!({ "tools": [{ "name": "t" }] }),
        _ => return "Accepted",
    };
    // Pretty JSON has line breaks, and an event has a line of data for each.
    let message = json!({ "jsonrpc": "2.0", "id": message["id"], "result": result });
    let pretty = serde_json::to_string_pretty(&message).expect("a value is JSON").replace('\n', "\ndata: ");
    let events = events.lock().expect("no panic");
    events
        .as_ref()
        .expect("the stream is open")
        .send(format!("data: {pretty}\n\n"))
        .expect("the stream is read");
    "Accepted"
}

#[tokio::test]
async fn a_server_of_the_oldest_transport_is_called() {
    let upstream = SseUpstream::new("old".parse().unwrap(), server("/messages?session=1").await);
    let answer = upstream.oneshot(McpRequest::call_tool("t", json!({}))).await.unwrap();
    let result = answer.into_payload().to_value().unwrap();
    assert_eq!(result["content"][0]["text"], "t");
}

#[tokio::test]
async fn an_endpoint_elsewhere_is_not_posted_to() {
    let upstream = SseUpstream::new("old".parse().unwrap(), server("http://127.0.0.1:9/messages").await);
    let error = upstream.oneshot(McpRequest::call_tool("t", json!({}))).await.unwrap_err();
    assert!(error.to_string().contains("same origin"), "{error}");
}
