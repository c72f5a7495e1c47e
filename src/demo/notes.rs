//! Notes, kept in memory, each a resource of its own.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::service_fn;

use super::{arguments, discover, failed, found, list, target, text_resource, unknown};
use crate::{
    BoxError, BoxMcpService, McpService as _,
    protocol::{Frame, FrameStream, McpRequest, McpResponse, Method, Notification, Params, Payload},
};

pub(super) fn service() -> BoxMcpService {
    let notes = Arc::new(Notes { texts: Mutex::default(), changed: watch::Sender::new(()) });
    service_fn(move |request: McpRequest| std::future::ready(Ok::<_, BoxError>(notes.answer(&request))))
        .boxed_mcp()
}

struct Notes {
    /// The first has the number 1.
    texts: Mutex<Vec<String>>,
    changed: watch::Sender<()>,
}

impl Notes {
    fn answer(&self, request: &McpRequest) -> McpResponse {
        match (request.method(), target(request)) {
            (Method::Discover, _) => discover(
                "portcullis-notes",
                "Keeps short notes until the gateway ends.",
                json!({ "tools": {}, "resources": { "listChanged": true } }),
            ),
            (Method::Listen, _) => McpResponse::new(Payload::Stream(self.changes())),
            (Method::ToolsList, _) => list("tools", tools()),
            (Method::ResourcesList, _) => list("resources", self.resources()),
            (Method::TemplatesList, _) => list("resourceTemplates", templates()),
            (Method::ToolsCall, "add") => self.add(request),
            (Method::ToolsCall, "list") => shown(&self.matching("")),
            (Method::ToolsCall, "search") => self.search(request),
            (Method::ResourcesRead, uri) => match self.at(uri) {
                Some(text) => text_resource(uri, &text),
                None => unknown(request),
            },
            _ => unknown(request),
        }
    }

    fn add(&self, request: &McpRequest) -> McpResponse {
        let arguments = arguments(request);
        let Some(text) = arguments.get("text").and_then(Value::as_str).filter(|text| !text.is_empty()) else {
            return failed("`text` is missing, empty, or no text");
        };
        if text.len() > LONGEST {
            return failed(format!("a note has at most {LONGEST} bytes"));
        }
        let number = {
            let mut texts = self.lock();
            if texts.len() == MOST {
                return failed(format!("there are {MOST} notes, and no more are kept"));
            }
            texts.push(text.to_owned());
            texts.len()
        };
        self.changed.send_replace(());
        found(format!("kept as note {number}"), json!({ "id": number, "uri": uri(number) }))
    }

    fn search(&self, request: &McpRequest) -> McpResponse {
        match arguments(request).get("query").and_then(Value::as_str) {
            Some(query) => shown(&self.matching(query)),
            None => failed("`query` is missing, or no text"),
        }
    }

    /// The notes that contain `query` in any case, with their numbers.
    fn matching(&self, query: &str) -> Vec<(usize, String)> {
        let query = query.to_lowercase();
        let texts = self.lock();
        let numbered = (1..).zip(texts.iter().cloned());
        numbered.filter(|(_, text)| text.to_lowercase().contains(&query)).collect()
    }

    fn resources(&self) -> Value {
        let resource = |(number, text): (usize, &String)| {
            let name: String = text.lines().next().unwrap_or_default().chars().take(60).collect();
            json!({ "uri": uri(number), "name": name, "mimeType": "text/plain" })
        };
        (1..).zip(self.lock().iter()).map(resource).collect()
    }

    fn at(&self, uri: &str) -> Option<String> {
        let number: usize = uri.strip_prefix("notes://")?.parse().ok()?;
        self.lock().get(number.checked_sub(1)?).cloned()
    }

    /// Tells of every change, until the notes are gone.
    fn changes(&self) -> FrameStream {
        let told = |method| Ok(Frame::Notification(Notification { method, params: Params::default() }));
        let changes = stream::unfold(self.changed.subscribe(), move |mut changed| async move {
            changed.changed().await.ok()?;
            Some((told(Method::ResourcesChanged), changed))
        });
        Box::pin(stream::iter([told(Method::Acknowledged)]).chain(changes))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const LONGEST: usize = 10_000;
const MOST: usize = 1000;

fn uri(number: usize) -> String {
    format!("notes://{number}")
}

fn shown(notes: &[(usize, String)]) -> McpResponse {
    let text = match notes {
        [] => "no notes".to_owned(),
        notes => Vec::from_iter(notes.iter().map(|(number, text)| format!("{number}. {text}"))).join("\n"),
    };
    let notes = Vec::from_iter(notes.iter().map(|(number, text)| json!({ "id": number, "text": text })));
    found(text, json!({ "notes": notes }))
}

fn tools() -> Value {
    json!([
        {
            "name": "add",
            "title": "Take a note",
            "description": "Keeps a note.",
            "inputSchema": {
                "type": "object",
                "properties": { "text": { "type": "string", "description": "the note" } },
                "required": ["text"],
                "additionalProperties": false,
            },
            "annotations": { "readOnlyHint": false, "destructiveHint": false, "openWorldHint": false },
        },
        {
            "name": "list",
            "title": "Show all notes",
            "description": "All notes, in the order they were taken.",
            "inputSchema": { "type": "object", "additionalProperties": false },
            "annotations": { "readOnlyHint": true, "openWorldHint": false },
        },
        {
            "name": "search",
            "title": "Find notes",
            "description": "The notes that contain a text, in upper or lower case.",
            "inputSchema": {
                "type": "object",
                "properties": { "query": { "type": "string", "description": "the text" } },
                "required": ["query"],
                "additionalProperties": false,
            },
            "annotations": { "readOnlyHint": true, "openWorldHint": false },
        },
    ])
}

fn templates() -> Value {
    let description = "A note by its number.";
    json!([{ "uriTemplate": "notes://{id}", "name": "note", "description": description, "mimeType": "text/plain" }])
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn a_note_is_found_and_is_a_resource() {
        let notes = service();
        let ask = |request: McpRequest| {
            let notes = notes.clone();
            async move { notes.oneshot(request).await.unwrap().payload().to_value().unwrap() }
        };
        ask(McpRequest::call_tool("add", json!({ "text": "Buy milk" }))).await;
        let hit = ask(McpRequest::call_tool("search", json!({ "query": "MILK" }))).await;
        assert_eq!(hit["structuredContent"]["notes"][0]["id"], 1);
        let params = Params::from_value(&json!({ "uri": "notes://1" }));
        let read = ask(McpRequest::new(Method::ResourcesRead, params)).await;
        assert_eq!(read["contents"][0]["text"], "Buy milk");
    }

    #[tokio::test]
    async fn a_new_note_is_announced() {
        let notes = service();
        let listen = McpRequest::bare(Method::Listen);
        let Payload::Stream(mut frames) = notes.clone().oneshot(listen).await.unwrap().into_payload() else {
            panic!()
        };
        let mut next = async || match frames.next().await {
            Some(Ok(Frame::Notification(notification))) => notification.method,
            other => panic!("{other:?}"),
        };
        assert_eq!(next().await, Method::Acknowledged);
        notes.oneshot(McpRequest::call_tool("add", json!({ "text": "x" }))).await.unwrap();
        assert_eq!(next().await, Method::ResourcesChanged);
    }
}
