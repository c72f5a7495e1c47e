//! Tasks: ids that lead back to their upstream, and are worth something to their creator only.
//!
//! The id a client gets holds the upstream, its own id and the tool, sealed and bound to the principal, the scope and the
//! kind of task. So nothing has to be remembered to route one, and an id that was made up, or was given to somebody else,
//! is the id of no task. Rules judge a task by its tool, each time.
//!
//! The extension of 2026-07-28 needs no more than that. The experiment of 2025-11-25 has `tasks/list` and notifications
//! without subscription, and an upstream may tell one session of another's tasks: it sees one client, us. For these the
//! ledger knows who created what through this process; what is not in it is not told.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future};
use memchr::memmem;
use serde_json::{json, value::RawValue};
use tower::ServiceExt as _;

use super::{
    Shared,
    capabilities::TaskKind,
    links::{Links, quoted},
    view::{Member, View},
};
use crate::{
    BoxError,
    error::{InvalidParams, Unimplemented, Unknown},
    identity::{AffinityKey, Caller, Client, Principal, Scope},
    layers::{InForce, Route, TaskRoute},
    protocol::{
        Era, Frame, FrameStream, McpRequest, McpResponse, Method, Notification, Params, Payload, RawObject,
        Reply, ResultType, RpcError, ServerName, ServerRequest, Target, code, extension, meta,
    },
    seal::Seal,
};

/// Tasks remembered of one client. The oldest are forgotten first.
const MOST_OF_ONE: usize = 1024;
/// Tasks remembered of all. Who has most of them forgets first.
const MOST_OF_ALL: usize = 65_536;
/// The longest id that is remembered.
const LONGEST_ID: usize = 1024;
/// Pages of one upstream's `tasks/list`.
const MOST_PAGES: usize = 100;

/// All that is known of tasks.
pub(super) struct Tasks {
    seal: Seal,
    ledger: Mutex<HashMap<Owner, VecDeque<Entry>>>,
}

/// Who created a task. Whoever is not authenticated is known by the session.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Owner {
    Named(Principal, Scope),
    Session(AffinityKey),
}

impl Owner {
    fn of(caller: &Caller) -> Owner {
        match caller.principal == Principal::anonymous() {
            true => Owner::Session(AffinityKey::of(caller)),
            false => Owner::Named(caller.principal.clone(), caller.scope.clone()),
        }
    }

    fn is_live(&self) -> bool {
        match self {
            Owner::Named(..) => true,
            Owner::Session(key) => key.is_live(),
        }
    }
}

#[derive(Clone)]
struct Entry {
    task: TaskRoute,
    id: String,
}

impl Tasks {
    /// With ids sealed under this key. Without one they are worth nothing after a restart.
    pub(super) fn new(key: Option<[u8; 32]>) -> Self {
        Tasks { seal: key.map_or_else(Seal::random, Seal::with_key), ledger: Mutex::default() }
    }

    /// The id under which the caller knows a task.
    fn close(&self, caller: &Caller, kind: TaskKind, task: &TaskRoute) -> String {
        let plain = json!([task.route.server, task.route.own, task.tool, task.exposed]).to_string();
        let (scope, kind) = (caller.scope.to_string(), kind.name());
        self.seal.close(
            plain.as_bytes(),
            &[b"task", kind.as_bytes(), caller.principal.as_str().as_bytes(), scope.as_bytes()],
        )
    }

    /// The task behind an id, if it is one this caller was given.
    pub(super) fn open(&self, id: &str, caller: &Caller) -> Option<TaskRoute> {
        let (scope, kind) = (caller.scope.to_string(), TaskKind::of_version(caller.client.version)?.name());
        let bound: [&[u8]; 4] =
            [b"task", kind.as_bytes(), caller.principal.as_str().as_bytes(), scope.as_bytes()];
        let plain = self.seal.open(id, &bound).ok()?;
        let (server, own, tool, exposed): (ServerName, Arc<str>, Arc<str>, Arc<str>) =
            serde_json::from_slice(&plain).ok()?;
        let route = Route { server, own, template: None, definition: None };
        Some(TaskRoute { route, tool, exposed })
    }

    fn remember(&self, caller: &Caller, task: TaskRoute, id: String) {
        if task.route.own.len() > LONGEST_ID {
            return;
        }
        let owner = Owner::of(caller);
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if !ledger.contains_key(&owner) {
            ledger.retain(|owner, _| owner.is_live());
        }
        if ledger.values().map(VecDeque::len).sum::<usize>() >= MOST_OF_ALL
            && let Some(most) = ledger.values_mut().max_by_key(|entries| entries.len())
        {
            most.pop_front();
        }
        let entries = ledger.entry(owner).or_default();
        if entries.len() >= MOST_OF_ONE {
            entries.pop_front();
        }
        entries.push_back(Entry { task, id });
        ledger.retain(|_, entries| !entries.is_empty());
    }

    /// The id under which the caller knows a task of an upstream, if it is the caller's.
    fn id_of(&self, caller: &Caller, server: &ServerName, own: &str) -> Option<String> {
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = ledger.get(&Owner::of(caller))?.iter();
        let is_it = |route: &Route| route.server == *server && *route.own == *own;
        entries.find(|entry| is_it(&entry.task.route)).map(|entry| entry.id.clone())
    }

    /// What the caller created at an upstream.
    fn remembered(&self, caller: &Caller, server: &ServerName) -> HashMap<Arc<str>, Entry> {
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = ledger.get(&Owner::of(caller)).into_iter().flatten();
        let entries = entries.filter(|entry| entry.task.route.server == *server);
        entries.map(|entry| (entry.task.route.own.clone(), entry.clone())).collect()
    }
}

impl TaskKind {
    fn name(self) -> &'static str {
        match self {
            TaskKind::Extension => "extension",
            TaskKind::Experiment => "experiment",
        }
    }
}

/// Whether a client said that it understands tasks (the extension).
pub(super) fn declares_tasks(client: &Client) -> bool {
    let capabilities = &client.capabilities;
    // Nearly no client does; nothing is parsed to learn that.
    memmem::find(capabilities, extension::TASKS.as_bytes()).is_some()
        && RawObject::parse(capabilities.clone())
            .ok()
            .and_then(|c| c.get_object("extensions")?.get_object(extension::TASKS))
            .is_some()
}

/// What a client is told that did not.
pub(super) fn undeclared() -> RpcError {
    let required = json!({ "requiredCapabilities": { "extensions": { extension::TASKS: {} } } });
    RpcError::new(code::MISSING_CAPABILITY, "Missing required client capability").with_data(&required)
}

/// Whether any upstream has tasks of this kind.
pub(super) fn are_offered(view: &View, kind: TaskKind) -> bool {
    view.members().iter().any(|member| member.tasks == Some(kind))
}

/// The task of an id, if the rules in force let the caller see it.
pub(super) fn find(shared: &Shared, request: &McpRequest, id: &str) -> Option<TaskRoute> {
    let task = shared.tasks.open(id, request.caller())?;
    match request.extensions().get::<InForce>() {
        Some(InForce(rules)) => rules.allows(&task.route.server, &task.tool, &task.exposed).then_some(task),
        None => Some(task),
    }
}

/// A request about a task, to the upstream that has it.
pub(super) async fn forward(
    shared: &Arc<Shared>,
    view: Arc<View>,
    mut request: McpRequest,
    target: Target,
) -> Result<McpResponse, BoxError> {
    let method = request.method().clone();
    let kind = TaskKind::of_version(request.caller().client.version).filter(|kind| match kind {
        TaskKind::Extension => method != Method::TasksResult,
        TaskKind::Experiment => method != Method::TasksUpdate,
    });
    let Some(kind) = kind.filter(|kind| are_offered(&view, *kind)) else {
        return Err(Unimplemented(method).into());
    };
    if kind == TaskKind::Extension && !declares_tasks(&request.caller().client) {
        return Ok(McpResponse::error(undeclared()));
    }
    let id = target.name().clone();
    let task = find(shared, &request, &id);
    let member = task.as_ref().and_then(|task| view.member(&task.route.server));
    let (Some(task), Some(member)) = (task, member.filter(|member| member.tasks == Some(kind))) else {
        return Err(Unknown(target).into());
    };
    let mut ids = Ids::new(shared, &request, kind, &task);
    ids.known.insert(task.route.own.to_string(), id.to_string());
    let mut params = request.params().clone();
    params.set_keeping_meta("taskId", &quoted(&task.route.own));
    request.set_params(ids.own_params(params));
    if request.extensions().get::<Route>().is_none() {
        request.extensions_mut().insert(task.route.clone());
    }
    let response = member.service.clone().oneshot(request).await?;
    let server = task.route.server;
    let response = response.map_final({
        let method = method.clone();
        move |payload| Links { view: &view, server: &server }.respell(&method, payload)
    });
    Ok(ids.over(response, method))
}

/// A `tools/call` at an upstream where it may begin a task.
pub(super) enum Call {
    /// It may, and its ids are ours to give.
    Tracked(Box<Ids>),
    /// It must not: the client would not know what to do with one.
    Guarded,
    /// It cannot.
    Plain,
}

impl Call {
    /// What kind of call it is. A wish for a task that cannot be fulfilled is taken out: tasks do not translate.
    pub(super) fn of(
        shared: &Arc<Shared>,
        member: &Member,
        request: &mut McpRequest,
        route: &Route,
        exposed: &Arc<str>,
    ) -> Call {
        let client = &request.caller().client;
        let kind = TaskKind::of_version(client.version).filter(|kind| member.tasks == Some(*kind));
        let wished = request.params().get("task").is_some();
        let tracked = match kind {
            Some(TaskKind::Extension) => declares_tasks(client),
            Some(TaskKind::Experiment) => wished,
            None => false,
        };
        if let (true, Some(kind)) = (tracked, kind) {
            let task = TaskRoute { route: route.clone(), tool: route.own.clone(), exposed: exposed.clone() };
            return Call::Tracked(Box::new(Ids::new(shared, request, kind, &task)));
        }
        if wished && member.era != Some(Era::Modern) && kind != Some(TaskKind::Experiment) {
            let mut params = request.params().clone();
            params.object_mut().remove("task");
            request.set_params(params);
        }
        match member.era {
            Some(Era::Legacy) => Call::Plain,
            _ => Call::Guarded,
        }
    }

    /// The answer, with ids the client may use.
    pub(super) fn answered(
        self,
        shared: &Arc<Shared>,
        caller: &Arc<Caller>,
        member: &Member,
        response: McpResponse,
    ) -> McpResponse {
        match self {
            Call::Plain => own_only(shared, caller, member, response),
            Call::Guarded => own_only(shared, caller, member, response)
                .map_final(|payload| if is_task(&payload) { Payload::Error(undeclared()) } else { payload }),
            Call::Tracked(ids) => ids.over(response, Method::ToolsCall),
        }
    }
}

/// Whether a result is the handle of a task (the extension).
fn is_task(payload: &Payload) -> bool {
    ResultType::of(payload) == ResultType::Other
        && payload.to_object().is_some_and(|r| r.get_string("resultType").as_deref() == Some("task"))
}

/// The ids in what one request brings about.
pub(super) struct Ids {
    shared: Arc<Shared>,
    caller: Arc<Caller>,
    kind: TaskKind,
    /// What tasks that begin here do. The id in it is nobody's.
    task: TaskRoute,
    /// The upstream's ids, and those the client knows.
    known: HashMap<String, String>,
}

impl Ids {
    fn new(shared: &Arc<Shared>, request: &McpRequest, kind: TaskKind, task: &TaskRoute) -> Self {
        let mut task = task.clone();
        task.route.template = None;
        task.route.definition = None;
        Ids { shared: shared.clone(), caller: request.caller().clone(), kind, task, known: HashMap::new() }
    }

    /// The id of a task that began here, which the client knows from now on. Only the result of the call makes one: on
    /// a connection that many share, anything else may be about somebody else's task.
    fn begun(&mut self, own: &str) -> String {
        if let Some(id) = self.known(own) {
            return id;
        }
        let route = Route { own: own.into(), ..self.task.route.clone() };
        let task = TaskRoute { route, ..self.task.clone() };
        let tasks = &self.shared.tasks;
        let id = tasks.close(&self.caller, self.kind, &task);
        if self.kind == TaskKind::Experiment {
            tasks.remember(&self.caller, task, id.clone());
        }
        self.known.insert(own.to_owned(), id.clone());
        id
    }

    /// The id under which the client knows a task, if it does.
    fn known(&self, own: &str) -> Option<String> {
        let remembered = || self.shared.tasks.id_of(&self.caller, &self.task.route.server, own);
        self.known.get(own).cloned().or_else(remembered)
    }

    /// Params on their way to the upstream: a task they are said to belong to is one of its own.
    fn own_params(&self, mut params: Params) -> Params {
        if let Some(mut m) = params.meta().cloned()
            && rename_related(&mut m, |id| self.own(id))
        {
            params.object_mut().set("_meta", m.as_str());
        }
        params
    }

    fn own(&self, id: &str) -> Option<String> {
        let task = self.shared.tasks.open(id, &self.caller)?;
        (task.route.server == self.task.route.server).then(|| task.route.own.to_string())
    }

    fn over(mut self, response: McpResponse, method: Method) -> McpResponse {
        let (payload, extensions) = response.into_parts();
        let payload = match payload {
            Payload::Stream(frames) => Payload::Stream(self.over_frames(frames, method)),
            payload => self.result(payload, &method),
        };
        McpResponse::from_parts(payload, extensions)
    }

    fn over_frames(mut self, frames: FrameStream, method: Method) -> FrameStream {
        Box::pin(frames.filter_map(move |frame| {
            let server = &self.task.route.server;
            let known = |own: &str| self.known(own);
            future::ready(match frame {
                Ok(Frame::Notification(n)) => {
                    rename_notification(server, n, known).map(|n| Ok(Frame::Notification(n)))
                }
                Ok(Frame::Request(q)) => rename_question(q, known).map(|q| Ok(Frame::Request(q))),
                Ok(Frame::Final(payload)) => Some(Ok(Frame::Final(self.result(payload, &method)))),
                Err(error) => Some(Err(error)),
            })
        }))
    }

    fn result(&mut self, payload: Payload, method: &Method) -> Payload {
        let flat = match method {
            Method::ToolsCall => is_task(&payload),
            Method::TasksGet | Method::TasksCancel | Method::TasksUpdate => true,
            _ => false,
        };
        if *method == Method::ToolsCall && !flat && self.kind == TaskKind::Extension {
            return payload;
        }
        let Some(mut result) = payload.to_object() else { return payload };
        let begins = *method == Method::ToolsCall;
        let mut name = |own: &str| if begins { Some(self.begun(own)) } else { self.known(own) };
        let mut changed = flat && rename(&mut result, "taskId", &mut name);
        if let (true, Some(mut task)) = (begins, result.get_object("task"))
            && rename(&mut task, "taskId", &mut name)
        {
            result.set("task", task.as_str());
            changed = true;
        }
        if let Some(mut m) = result.get_object("_meta")
            && rename_related(&mut m, &mut name)
        {
            result.set("_meta", m.as_str());
            changed = true;
        }
        changed |= flat && sign_questions(&self.task.route.server, &mut result);
        if changed { Payload::Raw(result.into_bytes()) } else { payload }
    }
}

/// A question that belongs to a task, and so does its answer. `None` when the task is not the client's.
fn rename_question(
    question: ServerRequest,
    name: impl FnOnce(&str) -> Option<String>,
) -> Option<ServerRequest> {
    let ServerRequest { method, mut params, reply } = question;
    let related = params.meta().and_then(|m| m.get_object(meta::RELATED_TASK));
    let Some(own) = related.and_then(|related| Some(related.get_string("taskId")?.into_owned())) else {
        return Some(ServerRequest { method, params, reply });
    };
    let id = name(&own)?;
    let mut m = params.meta().cloned().unwrap_or_else(RawObject::empty);
    rename_related(&mut m, |_| Some(id.clone()));
    params.object_mut().set("_meta", m.as_str());
    let (ours, answer) = Reply::new();
    tokio::spawn(async move {
        if let Ok(answer) = answer.await {
            reply.send(own_answer(answer, &id, &own));
        }
    });
    Some(ServerRequest { method, params, reply: ours })
}

/// An answer on its way to the upstream.
fn own_answer(answer: Payload, id: &str, own: &str) -> Payload {
    let Some(mut result) = answer.to_object() else { return answer };
    let Some(mut m) = result.get_object("_meta") else { return answer };
    match rename_related(&mut m, |said| (said == id).then(|| own.to_owned())) {
        true => {
            result.set("_meta", m.as_str());
            Payload::Raw(result.into_bytes())
        }
        false => answer,
    }
}

/// A member that is an id becomes another. False when it stays.
fn rename(object: &mut RawObject, member: &str, name: impl FnOnce(&str) -> Option<String>) -> bool {
    let other = object.get_string(member).and_then(|id| name(&id));
    if let Some(other) = &other {
        object.set(member, quoted(other));
    }
    other.is_some()
}

/// The task that a `_meta` says a message belongs to.
fn rename_related(m: &mut RawObject, name: impl FnOnce(&str) -> Option<String>) -> bool {
    let Some(mut related) = m.get_object(meta::RELATED_TASK) else { return false };
    let renamed = rename(&mut related, "taskId", name);
    if renamed {
        m.set(meta::RELATED_TASK, related.as_str());
    }
    renamed
}

/// A notification under ids the client knows. `None` when it is about a task that is not the client's.
pub(super) fn rename_notification(
    server: &ServerName,
    mut notification: Notification,
    mut name: impl FnMut(&str) -> Option<String>,
) -> Option<Notification> {
    let params = &mut notification.params;
    if matches!(notification.method, Method::TaskChanged | Method::LegacyTaskChanged) {
        let own = params.get_string("taskId")?.into_owned();
        let id = name(&own)?;
        params.object_mut().set("taskId", quoted(&id));
        sign_questions(server, params.object_mut());
    }
    if let Some(mut m) = params.meta().cloned()
        && m.get(meta::RELATED_TASK).is_some()
    {
        if !rename_related(&mut m, name) {
            return None;
        }
        params.object_mut().set("_meta", m.as_str());
    }
    Some(notification)
}

/// A task's questions reach the person in the name of who asks, as those of a call do.
fn sign_questions(server: &ServerName, task: &mut RawObject) -> bool {
    let Some(mut questions) = task.get_object("inputRequests") else { return false };
    let read: Vec<(String, Bytes)> =
        questions.iter().map(|(key, question)| (key.to_owned(), question.to_owned().into())).collect();
    let mut changed = false;
    for (key, question) in read {
        let Ok(mut question) = RawObject::parse(question) else { continue };
        if question.get_string("method").as_deref() != Some(Method::Elicit.as_str()) {
            continue;
        }
        let Some(mut params) = question.get_object("params") else { continue };
        let signed = format!("[{server}] {}", params.get_string("message").unwrap_or_default());
        params.set("message", quoted(&signed));
        question.set("params", params.as_str());
        questions.set(&key, question.as_str());
        changed = true;
    }
    if changed {
        task.set("inputRequests", questions.as_str());
    }
    changed
}

/// The answer of an upstream with tasks to a request that is not about any: what comes along about tasks is the
/// client's own, or is left out.
pub(super) fn own_only(
    shared: &Arc<Shared>,
    caller: &Arc<Caller>,
    member: &Member,
    response: McpResponse,
) -> McpResponse {
    let (payload, extensions) = response.into_parts();
    let payload = match payload {
        Payload::Stream(frames) if member.tasks.is_some() => {
            Payload::Stream(told_unasked(shared, caller, &member.name, frames))
        }
        payload => payload,
    };
    McpResponse::from_parts(payload, extensions)
}

/// What an upstream says without being asked, as far as it is about the caller's own tasks.
pub(super) fn told_unasked(
    shared: &Arc<Shared>,
    caller: &Arc<Caller>,
    server: &ServerName,
    frames: FrameStream,
) -> FrameStream {
    // The stream must not keep the gateway alive.
    let (weak, caller, server) = (Arc::downgrade(shared), caller.clone(), server.clone());
    Box::pin(frames.filter_map(move |frame| {
        let known = |own: &str| weak.upgrade()?.tasks.id_of(&caller, &server, own);
        let frame = match frame {
            Ok(Frame::Notification(n)) => {
                rename_notification(&server, n, known).map(Frame::Notification).map(Ok)
            }
            Ok(Frame::Request(q)) => rename_question(q, known).map(Frame::Request).map(Ok),
            other => Some(other),
        };
        future::ready(frame)
    }))
}

/// `tasks/list` of 2025-11-25: the caller's own, of all upstreams.
pub(super) async fn list(
    shared: &Arc<Shared>,
    view: &View,
    request: &McpRequest,
) -> Result<McpResponse, BoxError> {
    let kind = TaskKind::of_version(request.caller().client.version);
    let offered = view.capabilities(request.caller().client.version).get_object("tasks");
    if kind != Some(TaskKind::Experiment) || offered.is_none_or(|tasks| tasks.get("list").is_none()) {
        return Err(Unimplemented(Method::TasksList).into());
    }
    if request.params().get("cursor").is_some_and(|cursor| cursor != "null") {
        // All are on the first page.
        return Err(InvalidParams("Invalid cursor".into()).into());
    }
    let rules = request.extensions().get::<InForce>();
    let listed = view.members().iter().filter(|m| m.tasks == kind).map(|member| {
        let mut own = shared.tasks.remembered(request.caller(), &member.name);
        own.retain(|_, entry| {
            let (server, task) = (&entry.task.route.server, &entry.task);
            rules.is_none_or(|InForce(rules)| rules.allows(server, &task.tool, &task.exposed))
        });
        list_of(member, request, own)
    });
    let listed = future::join_all(listed).await.concat();
    Ok(McpResponse::raw(format!(r#"{{"tasks":[{}]}}"#, listed.join(","))))
}

/// The tasks of one upstream that are among these, under the ids the client knows.
async fn list_of(member: &Member, request: &McpRequest, own: HashMap<Arc<str>, Entry>) -> Vec<String> {
    let mut found = Vec::new();
    let mut cursor: Option<String> = None;
    if own.is_empty() {
        return found;
    }
    for _ in 0..MOST_PAGES {
        let mut params = request.params().clone();
        if let Some(cursor) = &cursor {
            params.object_mut().set("cursor", cursor);
        }
        let mut page = request.clone();
        page.set_params(params);
        let answer = match member.service.clone().oneshot(page).await {
            Ok(response) => response.into_payload().settle().await,
            Err(error) => Err(error),
        };
        let page = match answer.map(|payload| payload.to_object()) {
            Ok(Some(page)) => page,
            Ok(None) => return found,
            Err(error) => {
                tracing::debug!(server = %member.name, %error, "cannot list tasks");
                return found;
            }
        };
        let tasks = page.get_bytes("tasks").unwrap_or_default();
        for task in serde_json::from_slice::<Vec<&RawValue>>(&tasks).unwrap_or_default() {
            let Ok(mut task) = RawObject::parse(task.get().to_owned().into()) else { continue };
            if rename(&mut task, "taskId", |id| own.get(id).map(|entry| entry.id.clone())) {
                found.push(task.as_str().to_owned());
            }
        }
        match page.get("nextCursor") {
            None | Some("null") => return found,
            Some(next) => cursor = Some(next.to_owned()),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{identity::Affinity, identity::SessionToken, protocol::ProtocolVersion};

    fn caller(who: &str, group: Option<&str>, version: ProtocolVersion) -> Caller {
        Caller {
            principal: Principal::named(who),
            scope: group.map_or(Scope::Gateway, |group| Scope::Group(group.into())),
            client: Client { version, ..Client::gateway() },
            affinity: Affinity::Shared,
        }
    }

    fn task(server: &str, own: &str, tool: &str) -> TaskRoute {
        let route =
            Route { server: server.parse().unwrap(), own: own.into(), template: None, definition: None };
        TaskRoute { route, tool: tool.into(), exposed: format!("{server}_{tool}").into() }
    }

    proptest! {
        #[test]
        fn an_id_leads_its_creator_back_and_nobody_else_anywhere(
            own in any::<String>(),
            tool in any::<String>(),
            who in "[a-z]{1,6}", other in "[a-z]{1,6}",
            group in prop::option::of("[a-z]{0,3}"), elsewhere in prop::option::of("[a-z]{0,3}"),
            modern in any::<bool>(),
        ) {
            let tasks = Tasks::new(Some([7; 32]));
            let again = Tasks::new(Some([7; 32]));
            let version = |modern| if modern { ProtocolVersion::V2026_07_28 } else { ProtocolVersion::V2025_11_25 };
            let creator = caller(&who, group.as_deref(), version(modern));
            let kind = TaskKind::of_version(version(modern)).unwrap();
            let task = task("files", &own, &tool);
            let id = tasks.close(&creator, kind, &task);
            prop_assert!(id.is_ascii(), "it stands in a header");
            prop_assert_eq!(tasks.open(&id, &creator), Some(task.clone()));
            prop_assert_eq!(again.open(&id, &creator), Some(task.clone()), "also after a restart");
            prop_assert_eq!(Tasks::new(None).open(&id, &creator), None);
            prop_assert_eq!(tasks.open(&id, &caller(&who, group.as_deref(), version(!modern))), None);
            let same = who == other && group == elsewhere;
            let foreign = caller(&other, elsewhere.as_deref(), version(modern));
            prop_assert_eq!(tasks.open(&id, &foreign).is_some(), same);
        }

        #[test]
        fn made_up_ids_lead_nowhere(id in any::<String>()) {
            let caller = caller("a", None, ProtocolVersion::LATEST);
            prop_assert_eq!(Tasks::new(None).open(&id, &caller), None);
        }
    }

    #[test]
    fn the_ledger_forgets_the_oldest_and_ended_sessions() {
        let tasks = Tasks::new(None);
        let named = caller("a", None, ProtocolVersion::V2025_11_25);
        let server: ServerName = "files".parse().unwrap();
        for i in 0..=MOST_OF_ONE {
            tasks.remember(&named, task("files", &i.to_string(), "t"), i.to_string());
        }
        let known = tasks.remembered(&named, &server);
        assert_eq!((known.len(), known.contains_key("0")), (MOST_OF_ONE, false));
        let token = SessionToken::new();
        let nobody = Caller {
            principal: Principal::anonymous(),
            affinity: Affinity::Session(token.clone()),
            ..named.clone()
        };
        tasks.remember(&nobody, task("files", "x", "t"), "x".to_owned());
        assert_eq!(tasks.remembered(&nobody, &server).len(), 1);
        drop((nobody, token));
        tasks.remember(
            &caller("b", None, ProtocolVersion::V2025_11_25),
            task("files", "y", "t"),
            "y".to_owned(),
        );
        assert_eq!(tasks.ledger.lock().unwrap().len(), 2);
    }
}
