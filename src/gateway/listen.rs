//! `subscriptions/listen`: changes of the merged lists, told by the gateway itself, and updates of resources, told
//! by whoever has them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{StreamExt as _, future, stream};
use serde_json::json;
use tokio::sync::watch;
use tower::ServiceExt as _;

use super::{Shared, view::View};
use crate::{
    BoxMcpService,
    error::InvalidParams,
    protocol::{
        Frame, FrameStream, ItemKind, ListenFilter, McpRequest, McpResponse, Method, Notification, Params,
        Payload, ServerName, Target, Unsolicited,
    },
};

/// Each is at least one request to an upstream.
const MOST_RESOURCES: usize = 1024;
/// An upstream that does not answer a subscription in this time has none.
const OPEN_WITHIN: Duration = Duration::from_secs(5);
const REOPEN_AFTER: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The answer to a subscription: acknowledged first, then what happens, without end.
pub(super) async fn listen(shared: &Arc<Shared>, request: &McpRequest) -> Result<FrameStream, InvalidParams> {
    // Before the view is read: a change in between would be told to nobody.
    let revision = shared.revision.subscribe();
    let view = shared.view.load_full();
    let asked = ListenFilter::of(request.params());
    if asked.uris.len() > MOST_RESOURCES {
        return Err(InvalidParams(
            format!("more than {MOST_RESOURCES} resources in one subscription").into(),
        ));
    }
    let honoured = ListenFilter {
        tools: asked.tools,
        prompts: asked.prompts && view.offers("prompts"),
        resources: asked.resources && view.offers("resources"),
        uris: Vec::new(),
    };
    let (uris, mut updates) = resource_updates(shared, &view, request, &asked.uris).await;
    let honoured = ListenFilter { uris, ..honoured };
    updates.extend(unsolicited(&view, request));
    let first = stream::iter([Ok(Frame::Notification(honoured.acknowledged()))]);
    let changes = list_changes(shared, revision, honoured, view);
    Ok(Box::pin(first.chain(stream::select(changes, stream::select_all(updates)))))
}

/// One notification for each list that is not what it was.
fn list_changes(
    shared: &Arc<Shared>,
    revision: watch::Receiver<u64>,
    filter: ListenFilter,
    seen: Arc<View>,
) -> FrameStream {
    // The stream must not keep the gateway alive: a gateway that is dropped ends its streams.
    let weak = Arc::downgrade(shared);
    let changes = stream::unfold((revision, seen), move |(mut revision, seen)| {
        let (weak, filter) = (weak.clone(), filter.clone());
        async move {
            revision.changed().await.ok()?;
            let now = weak.upgrade()?.view.load_full();
            let frames: Vec<_> = changed(&seen, &now, &filter)
                .map(|method| Ok(Frame::Notification(Notification { method, params: Params::default() })))
                .collect();
            Some((stream::iter(frames), (revision, now)))
        }
    });
    Box::pin(changes.flatten())
}

fn changed(seen: &View, now: &View, filter: &ListenFilter) -> impl Iterator<Item = Method> + use<> {
    let differs = |kind: ItemKind| !seen.list(kind).is_same(now.list(kind));
    [
        (filter.tools && differs(ItemKind::Tools), Method::ToolsChanged),
        (filter.prompts && differs(ItemKind::Prompts), Method::PromptsChanged),
        (
            filter.resources && (differs(ItemKind::Resources) || differs(ItemKind::Templates)),
            Method::ResourcesChanged,
        ),
    ]
    .into_iter()
    .filter_map(|(told, method)| told.then_some(method))
}

/// One subscription at each upstream that has some of the resources. An upstream that has none to give, or does not
/// answer, is left out of the acknowledgement.
async fn resource_updates(
    shared: &Arc<Shared>,
    view: &View,
    request: &McpRequest,
    uris: &[String],
) -> (Vec<String>, Vec<FrameStream>) {
    let mut by_server: BTreeMap<ServerName, Vec<(String, String)>> = BTreeMap::new();
    for uri in uris {
        if let Some(route) = view.find(&Target::Resource(uri.as_str().into())) {
            by_server.entry(route.server).or_default().push((route.own.to_string(), uri.clone()));
        }
    }
    let opened = by_server.into_iter().map(|(server, uris)| async move {
        let updates = Updates { shared: Arc::downgrade(shared), server, uris, request: request.clone() };
        let frames = updates.open().await?;
        Some((updates, frames))
    });
    let mut honoured = Vec::new();
    let mut streams: Vec<FrameStream> = Vec::new();
    for (updates, frames) in future::join_all(opened).await.into_iter().flatten() {
        honoured.extend(updates.uris.iter().map(|(_, exposed)| exposed.clone()));
        streams.push(updates.keep_open(frames));
    }
    (honoured, streams)
}

/// The updates of some resources of one upstream.
struct Updates {
    shared: Weak<Shared>,
    server: ServerName,
    /// The upstream's own URI and the exposed one.
    uris: Vec<(String, String)>,
    request: McpRequest,
}

impl Updates {
    async fn open(&self) -> Option<FrameStream> {
        let service = self.shared.upgrade()?.view.load().upstream(&self.server)?;
        let own: Vec<&str> = self.uris.iter().map(|(own, _)| own.as_str()).collect();
        let filter = json!({ "notifications": { "resourceSubscriptions": own } });
        let inner = McpRequest::new(Method::Listen, Params::from_value(&filter));
        let inner = inner.with_caller(self.request.caller().clone());
        match tokio::time::timeout(OPEN_WITHIN, service.oneshot(inner)).await {
            Ok(Ok(response)) => match response.into_payload() {
                Payload::Stream(frames) => Some(frames),
                _ => None,
            },
            Ok(Err(error)) => {
                tracing::debug!(server = %self.server, %error, "cannot subscribe to resources");
                None
            }
            Err(_) => None,
        }
    }

    /// The updates, also after the upstream was away: what was acknowledged holds until the client goes.
    fn keep_open(self, frames: FrameStream) -> FrameStream {
        Box::pin(stream::unfold((self, Some(frames)), |(updates, frames)| async move {
            let mut frames = frames;
            let mut wait = REOPEN_AFTER;
            loop {
                while let Some(open) = &mut frames {
                    match open.next().await {
                        Some(Ok(frame)) => {
                            if let Some(frame) = updated(frame, &updates.uris) {
                                return Some((Ok(frame), (updates, frames)));
                            }
                        }
                        Some(Err(_)) | None => frames = None,
                    }
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
                // Gone for good: the upstream was removed, or the gateway ended.
                updates.shared.upgrade()?.view.load().upstream(&updates.server)?;
                frames = updates.open().await;
            }
        }))
    }
}

/// What each upstream says to this client, and asks it, without being asked. None is waited for: the stream begins at
/// once, and each upstream's part when it can.
fn unsolicited(view: &View, request: &McpRequest) -> Vec<FrameStream> {
    if request.extensions().get::<Unsolicited>().is_none() {
        return Vec::new();
    }
    let told = |frame| {
        future::ready(match frame {
            Ok(Frame::Notification(n)) if n.method == Method::Acknowledged => None,
            Ok(frame @ (Frame::Notification(_) | Frame::Request(_))) => Some(Ok(frame)),
            Ok(Frame::Final(_)) | Err(_) => None,
        })
    };
    let open = |service: BoxMcpService| -> FrameStream {
        let mut inner = McpRequest::bare(Method::Listen).with_caller(request.caller().clone());
        inner.extensions_mut().insert(Unsolicited);
        let opened = async move {
            match service.oneshot(inner).await.map(McpResponse::into_payload) {
                Ok(Payload::Stream(frames)) => frames,
                _ => Box::pin(stream::empty()),
            }
        };
        Box::pin(stream::once(opened).flatten().filter_map(told))
    };
    view.upstreams().map(open).collect()
}

/// An update under the URI the client knows. Whatever else comes along that stream is the gateway's to tell.
fn updated(frame: Frame, uris: &[(String, String)]) -> Option<Frame> {
    let Frame::Notification(mut notification) = frame else { return None };
    if notification.method != Method::ResourceUpdated {
        return None;
    }
    let own = notification.params.get_string("uri")?.into_owned();
    let (_, exposed) = uris.iter().find(|(theirs, _)| *theirs == own)?;
    if *exposed != own {
        notification.params.object_mut().set("uri", json!(exposed).to_string());
    }
    Some(Frame::Notification(notification))
}
