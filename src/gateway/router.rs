//! Where a request goes: one lookup in the view, then the upstream's own stack.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use serde_json::{json, value::RawValue};
use tower::{Service, ServiceExt as _};

use super::{Gateway, Shared, listen, view::View};
use crate::{
    BoxError,
    error::{HeaderMismatch, InvalidParams, Unimplemented, Unknown},
    layers::{Directory, Route},
    protocol::{
        ItemKind, McpRequest, McpResponse, Method, MirroredHeaders, ParamHeaders, Params, Payload, RawObject,
        Target, decode_header,
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
                    Ok(McpResponse::raw(shared.view.load().discover().clone()))
                }
                Method::Listen => {
                    Ok(McpResponse::new(Payload::Stream(listen::listen(&shared, &request).await?)))
                }
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
}

async fn list(shared: &Shared, kind: ItemKind) -> Result<McpResponse, BoxError> {
    shared.warm_up().await;
    let view = shared.view.load();
    match view.offers(kind.capability()) {
        true => Ok(McpResponse::new(Payload::Items(view.list(kind).clone()))),
        false => Err(Unimplemented(kind.list_method()).into()),
    }
}

/// To the upstream of what the request names; one that names nothing, to the only upstream there is.
async fn forward(shared: &Arc<Shared>, mut request: McpRequest) -> Result<McpResponse, BoxError> {
    let view = shared.view.load_full();
    let Some(target) = request.target().cloned() else {
        return forward_unnamed(&view, request).await;
    };
    let routed = request.extensions().get::<Route>().cloned().or_else(|| view.find(&target));
    let found = routed.and_then(|route| view.upstream(&route.server).map(|service| (route, service)));
    let Some((route, service)) = found else {
        return match (target, view.only_upstream()) {
            // Whose task it is, only its upstream can know; with one there is no doubt.
            (Target::Task(_), Some(service)) => service.oneshot(request).await,
            (target, _) => Err(Unknown(target).into()),
        };
    };
    check_param_headers(&request, &route)?;
    let renamed = (*route.own != **target.name()).then(|| target.name().clone());
    if renamed.is_some() {
        let params = rename(request.params().clone(), request.method(), &target, &route.own);
        request.set_params(params);
    }
    if request.extensions().get::<Route>().is_none() {
        request.extensions_mut().insert(route.clone());
    }
    let response = service.oneshot(request).await?;
    Ok(match (renamed, target) {
        // The answer names the URI again; the client asked for another spelling.
        (Some(exposed), Target::Resource(_)) => {
            response.map_final(move |p| rename_contents(p, &route.own, &exposed))
        }
        _ => response,
    })
}

async fn forward_unnamed(view: &View, request: McpRequest) -> Result<McpResponse, BoxError> {
    match request.method() {
        Method::ToolsCall | Method::PromptsGet => {
            Err(InvalidParams("`name` is missing or no string".into()).into())
        }
        Method::ResourcesRead => Err(InvalidParams("`uri` is missing or no string".into()).into()),
        Method::Complete => Err(InvalidParams("`ref` names neither a prompt nor a resource".into()).into()),
        method => match view.only_upstream() {
            Some(service) => service.oneshot(request).await,
            None => Err(Unimplemented(method.clone()).into()),
        },
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

/// `contents[].uri` as the client knows it; the rest of the result keeps its bytes.
fn rename_contents(payload: Payload, own: &str, exposed: &str) -> Payload {
    let Some(mut result) = payload.to_object() else { return payload };
    let contents = result.get_bytes("contents").unwrap_or_default();
    let Ok(contents) = serde_json::from_slice::<Vec<&RawValue>>(&contents) else { return payload };
    let renamed: Vec<String> = contents
        .iter()
        .map(|content| match RawObject::parse(content.get().to_owned().into()) {
            Ok(mut content) if content.get_string("uri").as_deref() == Some(own) => {
                content.set("uri", json!(exposed).to_string());
                content.as_str().to_owned()
            }
            _ => content.get().to_owned(),
        })
        .collect();
    result.set("contents", format!("[{}]", renamed.join(",")));
    Payload::Raw(result.into_bytes())
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
