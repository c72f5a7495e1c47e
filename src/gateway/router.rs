//! Where a request goes: one lookup in the view, then the upstream's own stack.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use serde_json::json;
use tower::{Service, ServiceExt as _};

use super::{
    Gateway, Shared,
    links::{self, Links},
    listen,
    tasks::{self, Call},
    vendor,
    view::View,
};
use crate::{
    BoxError,
    error::{HeaderMismatch, InvalidParams, Unimplemented, Unknown},
    identity::Caller,
    layers::{Directory, InForce, Route, TaskRoute},
    protocol::{
        ItemKind, ItemList, McpRequest, McpResponse, Method, MirroredHeaders, ParamHeaders, Params, Payload,
        RawObject, RpcError, Target, decode_header,
    },
};

impl Service<McpRequest> for Gateway {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    /// Always: an upstream that is not ready has a cap of its own and refuses.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        let shared = self.shared.clone();
        Box::pin(async move {
            match request.method() {
                Method::Discover => {
                    shared.warm_up().await;
                    let version = request.caller().client.version;
                    Ok(McpResponse::raw(shared.view.load().discover(version).clone()))
                }
                Method::Listen => match listen::listen(&shared, &request).await {
                    Ok(frames) => Ok(McpResponse::new(Payload::Stream(frames))),
                    Err(error) => Ok(McpResponse::error(*error.downcast::<RpcError>()?)),
                },
                method => match ItemKind::of(method) {
                    Some(kind) => list(&shared, kind).await,
                    None => forward(&shared, request).await,
                },
            }
        })
    }
}

impl Directory for Gateway {
    fn find(&self, target: &Target) -> Option<Route> {
        self.shared.view.load().find(target)
    }

    fn list(&self, kind: ItemKind) -> Option<ItemList> {
        Some(Gateway::list(self, kind))
    }

    fn task(&self, id: &str, caller: &Caller) -> Option<TaskRoute> {
        self.shared.tasks.open(id, caller)
    }
}

async fn list(shared: &Shared, kind: ItemKind) -> Result<McpResponse, BoxError> {
    shared.warm_up().await;
    let view = shared.view.load();
    match view.offers(kind) {
        true => Ok(McpResponse::new(Payload::Items(view.list(kind).clone()))),
        false => Err(Unimplemented(kind.list_method()).into()),
    }
}

/// To the upstream of what the request names; one that names nothing, to whoever understands it.
async fn forward(shared: &Arc<Shared>, mut request: McpRequest) -> Result<McpResponse, BoxError> {
    let view = shared.view.load_full();
    let Some(target) = request.target().cloned() else {
        return forward_unnamed(shared, &view, request).await;
    };
    if matches!(target, Target::Task(_)) {
        return tasks::forward(shared, view, request, target).await;
    }
    let routed = request.extensions().get::<Route>().cloned().or_else(|| view.find(&target));
    let found = routed.and_then(|route| Some((view.member(&route.server)?, route)));
    let Some((member, route)) = found else { return Err(Unknown(target).into()) };
    check_param_headers(&request, &route)?;
    let renamed = (*route.own != **target.name()).then(|| target.name().clone());
    if renamed.is_some() {
        let params = rename(request.params().clone(), request.method(), &target, &route.own);
        request.set_params(params);
    }
    if request.extensions().get::<Route>().is_none() {
        request.extensions_mut().insert(route.clone());
    }
    let call = match target {
        Target::Tool(ref exposed) => Call::of(shared, member, &mut request, &route, exposed),
        _ => Call::Plain,
    };
    let method = request.method().clone();
    let rules = request.extensions().get::<InForce>().cloned();
    let caller = request.caller().clone();
    let response = member.service.clone().oneshot(request).await?;
    let response = call.answered(shared, &caller, member, response);
    let response = match renamed {
        // The answer names the URI again; the client asked for another spelling.
        Some(exposed) if method == Method::ResourcesRead => {
            let own = route.own.clone();
            response.map_final(move |p| links::rename_contents(p, &own, &exposed))
        }
        _ => response,
    };
    if !view.uris().respells(&route.server) && (method != Method::DirectoryRead || rules.is_none()) {
        return Ok(response);
    }
    Ok(response.map_final(move |payload| {
        let payload = Links { view: &view, server: &route.server }.respell(&method, payload);
        match (&method, &rules) {
            (Method::DirectoryRead, Some(InForce(rules))) => links::visible_entries(&view, rules, payload),
            _ => payload,
        }
    }))
}

async fn forward_unnamed(
    shared: &Arc<Shared>,
    view: &View,
    request: McpRequest,
) -> Result<McpResponse, BoxError> {
    let missing = |what: &'static str| Err(InvalidParams(what.into()).into());
    match request.method() {
        Method::ToolsCall | Method::PromptsGet => missing("`name` is missing or no string"),
        Method::ResourcesRead | Method::SkillsGet | Method::DirectoryRead => {
            missing("`uri` is missing or no string")
        }
        Method::Complete => missing("`ref` names neither a prompt nor a resource"),
        Method::TasksGet | Method::TasksUpdate | Method::TasksCancel | Method::TasksResult => {
            missing("`taskId` is missing or no string")
        }
        Method::TasksList => tasks::list(shared, view, &request).await,
        method if method.is_notification() && request.id().is_none() => Ok(vendor::tell(view, &request)),
        _ => vendor::ask(shared, view, request).await,
    }
}

/// The params with the upstream's own name in them.
fn rename(mut params: Params, method: &Method, target: &Target, own: &str) -> Params {
    let quoted = json!(own).to_string();
    match target {
        Target::Tool(_) => params.set_keeping_meta("name", &quoted),
        Target::Prompt(_) | Target::Template(_) if *method == Method::Complete => {
            if let Some(mut reference) = params.get_object("ref") {
                let member = if matches!(target, Target::Prompt(_)) { "name" } else { "uri" };
                reference.set(member, quoted);
                params.set_keeping_meta("ref", reference.as_str());
            }
        }
        Target::Prompt(_) => params.set_keeping_meta("name", &quoted),
        _ => params.set_keeping_meta("uri", &quoted),
    }
    params
}

/// Holds `Mcp-Param-*` against the arguments, when the request came with headers: some box in between may have
/// decided by them. Here is where the tool's definition is at hand.
fn check_param_headers(request: &McpRequest, route: &Route) -> Result<(), BoxError> {
    let Some(MirroredHeaders(headers)) = request.extensions().get() else { return Ok(()) };
    let Some(definition) = &route.definition else { return Ok(()) };
    // A tool whose annotations are invalid is not listed; none of them bind.
    let expected = ParamHeaders::of_definition(definition).unwrap_or_default();
    if expected.is_empty() {
        return Ok(());
    }
    let arguments = request.params().get_object("arguments").unwrap_or_else(RawObject::empty);
    for (name, wanted) in expected.expected(&arguments) {
        let mut given = headers.get_all(name).iter();
        let same = match (given.next(), wanted) {
            (None, None) => true,
            (Some(value), Some(wanted)) => {
                let value = value.to_str().ok().and_then(decode_header);
                given.next().is_none() && value.is_some_and(|value| is_same(&value, &wanted))
            }
            _ => false,
        };
        if !same {
            return Err(HeaderMismatch(format!("`{name}` does not say what the arguments say")).into());
        }
    }
    Ok(())
}

/// Integers are compared as numbers: `42.0` is `42`.
fn is_same(header: &str, wanted: &str) -> bool {
    header == wanted
        || matches!((header.parse::<f64>(), wanted.parse::<f64>()), (Ok(a), Ok(b)) if a == b && wanted.parse::<i64>().is_ok())
}
