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

use super::{Revision, Shared, capabilities::TaskKind, tasks, view::View};
use crate::{
    BoxError, BoxMcpService,
    error::InvalidParams,
    protocol::{
        Frame, FrameStream, ItemKind, ListenFilter, McpRequest, McpResponse, Method, Notification, Params,
        Payload, ServerName, Target, Unsolicited, is_within,
    },
};

/// Each is at least one request to an upstream.
const MOST_RESOURCES: usize = 1024;
/// Tasks in one subscription: each is opened with the key.
const MOST_TASKS: usize = 1024;
/// An upstream that does not answer a subscription in this time has none.
const OPEN_WITHIN: Duration = Duration::from_secs(5);
const REOPEN_AFTER: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The answer to a subscription: acknowledged first, then what happens, without end.
pub(super) async fn listen(shared: &Arc<Shared>, request: &McpRequest) -> Result<FrameStream, BoxError> {
    // Before the view is read: a change in between would be told to nobody.
    let mut revision = shared.revision.subscribe();
    let announced = revision.borrow_and_update().announcements;
    let view = shared.view.load_full();
    let asked = ListenFilter::of(request.params());
    if asked.uris.len() > MOST_RESOURCES {
        return Err(InvalidParams(
            format!("more than {MOST_RESOURCES} resources in one subscription").into(),
        )
        .into());
    }
    let honoured = ListenFilter {
        tools: asked.tools,
        prompts: asked.prompts && view.offers(ItemKind::Prompts),
        resources: asked.resources && view.offers(ItemKind::Resources),
        uris: Vec::new(),
    };
    let wanted = resources_of(&view, &asked.uris).into_iter().chain(tasks_of(shared, request)?);
    let opened = wanted.map(|(server, subject)| {
        let updates = Updates { shared: Arc::downgrade(shared), server, subject, request: request.clone() };
        async move { updates.open().await.map(|(honoured, frames)| (honoured, updates, frames)) }
    });
    let (mut uris, mut task_ids) = (Vec::new(), Vec::new());
    let mut updates: Vec<FrameStream> = Vec::new();
    for (honoured, opened, frames) in future::join_all(opened).await.into_iter().flatten() {
        match &opened.subject {
            Subject::Resources(_) => uris.extend(honoured),
            Subject::Tasks(_) => task_ids.extend(honoured),
        }
        updates.push(opened.keep_open(frames));
    }
    let honoured = ListenFilter { uris, ..honoured };
    for (member, frames) in view.members().iter().zip(unsolicited(&view, request)) {
        updates.push(match member.tasks {
            Some(TaskKind::Experiment) => tasks::told_unasked(shared, request.caller(), &member.name, frames),
            _ => frames,
        });
    }
    let first = stream::iter([Ok(Frame::Notification(acknowledged(&honoured, &task_ids)))]);
    let changes = list_changes(shared, (revision, announced), honoured, view);
    Ok(Box::pin(first.chain(stream::select(changes, stream::select_all(updates)))))
}

fn acknowledged(honoured: &ListenFilter, task_ids: &[String]) -> Notification {
    let mut filter = honoured.to_value();
    if !task_ids.is_empty() {
        filter["taskIds"] = json!(task_ids);
    }
    let params = Params::from_value(&json!({ "notifications": filter }));
    Notification { method: Method::Acknowledged, params }
}

/// One notification for each list that is not what it was.
fn list_changes(
    shared: &Arc<Shared>,
    (revision, announced): (watch::Receiver<Revision>, u64),
    filter: ListenFilter,
    seen: Arc<View>,
) -> FrameStream {
    // The stream must not keep the gateway alive: a gateway that is dropped ends its streams.
    let weak = Arc::downgrade(shared);
    let changes = stream::unfold((revision, seen, announced), move |(mut revision, seen, announced)| {
        let (weak, filter) = (weak.clone(), filter.clone());
        async move {
            revision.changed().await.ok()?;
            let announcements = revision.borrow_and_update().announcements;
            let now = weak.upgrade()?.view.load_full();
            let frames: Vec<_> = changed(&seen, &now, announcements != announced, &filter)
                .map(|method| Ok(Frame::Notification(Notification { method, params: Params::default() })))
                .collect();
            Some((stream::iter(frames), (revision, now, announcements)))
        }
    });
    Box::pin(changes.flatten())
}

/// What is told: the lists that differ, or all when everybody is to look again.
fn changed(
    seen: &View,
    now: &View,
    all: bool,
    filter: &ListenFilter,
) -> impl Iterator<Item = Method> + use<> {
    let differs = |kind: ItemKind| all || !seen.list(kind).is_same(now.list(kind));
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

/// What a subscription at one upstream is about: its own name for each thing, and the exposed one.
enum Subject {
    Resources(Vec<(String, String)>),
    Tasks(Vec<(String, String)>),
}

impl Subject {
    fn pairs(&self) -> &[(String, String)] {
        match self {
            Subject::Resources(pairs) | Subject::Tasks(pairs) => pairs,
        }
    }

    /// The member of the filter.
    fn member(&self) -> &'static str {
        match self {
            Subject::Resources(_) => "resourceSubscriptions",
            Subject::Tasks(_) => "taskIds",
        }
    }
}

type Pairs = BTreeMap<ServerName, Vec<(String, String)>>;

/// The resources by upstream.
fn resources_of(view: &View, uris: &[String]) -> Vec<(ServerName, Subject)> {
    let mut by_server = Pairs::new();
    for uri in uris {
        if let Some(route) = view.find(&Target::Resource(uri.as_str().into())) {
            by_server.entry(route.server).or_default().push((route.own.to_string(), uri.clone()));
        }
    }
    by_server.into_iter().map(|(server, pairs)| (server, Subject::Resources(pairs))).collect()
}

/// The tasks by upstream, as far as they are the caller's. Who does not understand tasks must not ask for them.
fn tasks_of(shared: &Shared, request: &McpRequest) -> Result<Vec<(ServerName, Subject)>, BoxError> {
    let filter = request.params().get_object("notifications");
    let Some(ids) = filter.and_then(|filter| filter.get_as::<Vec<String>>("taskIds")?.ok()) else {
        return Ok(Vec::new());
    };
    if !tasks::declares_tasks(&request.caller().client) {
        return Err(tasks::undeclared().into());
    }
    if ids.len() > MOST_TASKS {
        return Err(InvalidParams(format!("more than {MOST_TASKS} tasks in one subscription").into()).into());
    }
    let mut by_server = Pairs::new();
    for id in ids {
        if let Some(task) = tasks::find(shared, request, &id) {
            by_server.entry(task.route.server).or_default().push((task.route.own.to_string(), id));
        }
    }
    Ok(by_server.into_iter().map(|(server, pairs)| (server, Subject::Tasks(pairs))).collect())
}

/// The updates of some things of one upstream.
struct Updates {
    shared: Weak<Shared>,
    server: ServerName,
    subject: Subject,
    request: McpRequest,
}

impl Updates {
    /// What the upstream agreed to, under the exposed names, and what it tells. `None` when it has none to give, or does
    /// not answer; the acknowledgement leaves that out.
    async fn open(&self) -> Option<(Vec<String>, FrameStream)> {
        let service = self.shared.upgrade()?.view.load().upstream(&self.server)?;
        let own: Vec<&str> = self.subject.pairs().iter().map(|(own, _)| own.as_str()).collect();
        let filter = json!({ "notifications": { self.subject.member(): own } });
        let inner = McpRequest::new(Method::Listen, Params::from_value(&filter));
        let inner = inner.with_caller(self.request.caller().clone());
        let opened = async {
            let mut frames = match service.oneshot(inner).await {
                Ok(response) => match response.into_payload() {
                    Payload::Stream(frames) => frames,
                    _ => return None,
                },
                Err(error) => {
                    tracing::debug!(server = %self.server, %error, "cannot subscribe");
                    return None;
                }
            };
            let first = frames.next().await?;
            Some((first, frames))
        };
        let (first, frames) = tokio::time::timeout(OPEN_WITHIN, opened).await.ok().flatten()?;
        let agreed = match &first {
            Ok(Frame::Notification(n)) if n.method == Method::Acknowledged => {
                let agreed = n.params.get_object("notifications");
                agreed.and_then(|filter| filter.get_as::<Vec<String>>(self.subject.member())?.ok())
            }
            // One that does not say what it honours has agreed to all.
            _ => Some(own.iter().map(|own| (*own).to_owned()).collect()),
        };
        let agreed = agreed.unwrap_or_default();
        let honoured = self.subject.pairs().iter().filter(|(own, _)| agreed.contains(own));
        let honoured: Vec<String> = honoured.map(|(_, exposed)| exposed.clone()).collect();
        (!honoured.is_empty())
            .then(|| (honoured, Box::pin(stream::iter([first]).chain(frames)) as FrameStream))
    }

    /// What an upstream tells, under the names the client knows. Whatever else comes along that stream is the
    /// gateway's to tell.
    fn told(&self, frame: Frame) -> Option<Frame> {
        let Frame::Notification(notification) = frame else { return None };
        match &self.subject {
            Subject::Resources(uris) if notification.method == Method::ResourceUpdated => {
                self.updated(notification, uris)
            }
            Subject::Tasks(ids) if notification.method == Method::TaskChanged => {
                let exposed = |own: &str| Some(ids.iter().find(|(theirs, _)| theirs == own)?.1.clone());
                tasks::rename_notification(&self.server, notification, exposed).map(Frame::Notification)
            }
            _ => None,
        }
    }

    /// An update of a resource, or of one within it.
    fn updated(&self, mut notification: Notification, uris: &[(String, String)]) -> Option<Frame> {
        let own = notification.params.get_string("uri")?.into_owned();
        let exposed = match uris.iter().find(|(theirs, _)| *theirs == own) {
            Some((_, exposed)) => exposed.clone(),
            None => {
                uris.iter().find(|(theirs, _)| is_within(&own, theirs))?;
                let view = self.shared.upgrade()?.view.load_full();
                view.uris().spell(&self.server, &own).unwrap_or_else(|| own.clone())
            }
        };
        if exposed != own {
            notification.params.object_mut().set("uri", json!(exposed).to_string());
        }
        Some(Frame::Notification(notification))
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
                            if let Some(frame) = updates.told(frame) {
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
                frames = updates.open().await.map(|(_, frames)| frames);
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
