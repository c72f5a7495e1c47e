//! The operations, done on an app. What may be seen and called goes through the edge, so that rules hold here as
//! they do for clients.

use std::{collections::HashMap, time::Duration};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use serde_json::{Value, value::RawValue};
use tokio::time::Instant;
use tower::ServiceExt as _;

use super::{Arguments, Call, Called, Edit, Edited, Missing, ServerView, Servers, State, Tool, Tools};
use crate::{
    BoxMcpService,
    app::App,
    cli::view,
    gateway::StatusKind,
    protocol::{Item, McpRequest, Method, Params, Payload, RawObject, RpcError, ServerName, code},
    registry::{Change, Origin, Registry, RegistryError, Snapshot},
};

/// Whoever has the app does the work here. Clones are the same desk.
#[derive(Clone)]
pub(in crate::cli) struct Desk {
    app: App,
    keeps: bool,
}

impl Desk {
    /// On `app`. `keeps` says whether what is written outlives it.
    pub(in crate::cli) fn new(app: App, keeps: bool) -> Self {
        Desk { app, keeps }
    }

    /// The edge.
    pub(super) fn service(&self) -> BoxMcpService {
        self.app.service()
    }

    pub(super) async fn servers(&self) -> Result<Servers> {
        let counts = self.counts().await?;
        let snapshot = self.app.snapshot();
        let status = self.app.gateway().status();
        let servers = snapshot.servers.iter().map(|server| {
            let state = match status.get(&server.name) {
                _ if !server.enabled => State::Disabled,
                Some(status) => state(&status.kind),
                None => State::Connecting,
            };
            // A server nobody ever reached may have any number of tools.
            let count = counts.get(&server.name).copied();
            let tools = count.or_else(|| (state == State::Up).then_some(0));
            view::server(server, state, tools)
        });
        Ok(Servers { servers: servers.collect(), unreadable: unreadable(&snapshot) })
    }

    pub(super) async fn edit(&self, edit: Edit) -> Result<Edited> {
        let name = edit.name().clone();
        let before = self.app.snapshot();
        let outcome = edit.word();
        let edited = self.app.change(move |registry| apply(registry, edit)).await;
        let change = edited.map_err(|error| explain(error, &before))?;
        let server = match &change.after {
            Some(server) if server.enabled => {
                self.tried(&name, REPORT_WITHIN).await;
                self.server(&name).await?
            }
            _ => None,
        };
        Ok(Edited { server, kept: self.keeps, ..edited_of(outcome, &change) })
    }

    pub(super) async fn refresh(&self, name: &ServerName) -> Result<ServerView> {
        let snapshot = self.app.snapshot();
        let Some(server) = snapshot.server(name) else {
            return Err(explain(RegistryError::Missing(name.clone()), &snapshot));
        };
        if !server.enabled {
            return Err(anyhow!(
                "server `{name}` is disabled: let it take part with `portcullis enable {name}`"
            ));
        }
        let gateway = self.app.gateway();
        let was_down = !self.is_up(name);
        let refreshed = tokio::time::timeout(REFRESH_WITHIN, gateway.refresh(name)).await;
        // To a server that was down the first answer may be that it was.
        if was_down && matches!(refreshed, Ok(Err(_))) {
            self.until(REPORT_WITHIN, || self.is_up(name)).await;
        }
        let view = self.server(name).await?;
        match view.map(|view| (view.state.clone(), view)) {
            Some((State::Up, view)) if refreshed.is_ok() => Ok(view),
            Some((State::Down { error }, _)) => Err(anyhow!("server `{name}` is down: {error}")),
            Some(_) => Err(anyhow!("server `{name}` did not answer within {REFRESH_WITHIN:?}")),
            None => Err(anyhow!("server `{name}` was removed meanwhile")),
        }
    }

    pub(super) async fn tools(&self, wait: Duration) -> Result<Tools> {
        self.app.gateway().settled(wait).await;
        let visible = self.visible().await?;
        let tool = |item: &Item| Ok(Tool { server: item.server.clone(), definition: raw(&item.raw)? });
        let tools = visible.iter().map(tool).collect::<Result<_>>()?;
        Ok(Tools { tools, missing: self.missing(), servers: self.app.snapshot().enabled().count() })
    }

    pub(super) async fn call(&self, call: Call) -> Result<Called> {
        let mut visible = self.visible().await?;
        if !visible.iter().any(|item| *item.exposed == *call.tool) {
            // It may belong to a server that nobody reached yet.
            self.app.gateway().settled(call.wait).await;
            visible = self.visible().await?;
        }
        let Some(item) = visible.iter().find(|item| *item.exposed == *call.tool) else {
            return Ok(Called::Unknown { similar: similar(&call.tool, &visible), missing: self.missing() });
        };
        let params = params_of(&call, item)?;
        let response = self.app.service().oneshot(McpRequest::new(Method::ToolsCall, params)).await;
        let payload = match response.map_err(|error| anyhow!(error))?.into_payload().settle().await {
            Ok(payload) => payload,
            Err(error) => Payload::Error(RpcError::new(code::INTERNAL_ERROR, error.to_string())),
        };
        Ok(match payload.to_json() {
            Some(Ok(result)) => Called::Result(raw(&result)?),
            Some(Err(error)) => Called::Error(raw(error.as_bytes())?),
            None => return Err(anyhow!("the tool answered with another stream")),
        })
    }

    // === what the above is made of ===

    async fn server(&self, name: &ServerName) -> Result<Option<ServerView>> {
        Ok(self.servers().await?.servers.into_iter().find(|server| server.name == *name))
    }

    /// Everything a client would find listed, over all pages.
    async fn visible(&self) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        let mut params = Params::default();
        loop {
            let request = McpRequest::new(Method::ToolsList, params);
            let response = self.app.service().oneshot(request).await.map_err(|error| anyhow!(error))?;
            let list = match response.into_payload() {
                Payload::Items(list) => list,
                // Nobody has tools.
                Payload::Error(error) if error.code() == code::METHOD_NOT_FOUND => return Ok(items),
                Payload::Error(error) => return Err(error.into()),
                other => return Err(anyhow!("the list of tools is not a list but {other:?}")),
            };
            items.extend_from_slice(list.items());
            let Some(cursor) = list.next_cursor() else { return Ok(items) };
            params = Params::from_value(&serde_json::json!({ "cursor": cursor.to_string() }));
        }
    }

    async fn counts(&self) -> Result<HashMap<ServerName, usize>> {
        let mut counts = HashMap::new();
        for item in self.visible().await? {
            *counts.entry(item.server).or_default() += 1;
        }
        Ok(counts)
    }

    fn missing(&self) -> Vec<Missing> {
        let status = self.app.gateway().status();
        let why = status.into_iter().filter_map(|(name, status)| match status.kind {
            StatusKind::Up => None,
            StatusKind::Down { error } => Some(Missing { name, why: format!("is down: {error}") }),
            _ => Some(Missing { name, why: "has not answered yet".to_owned() }),
        });
        why.collect()
    }

    fn is_up(&self, name: &ServerName) -> bool {
        self.app.gateway().status().get(name).is_some_and(|status| status.kind == StatusKind::Up)
    }

    /// Waits until a server was tried, or the limit has passed.
    async fn tried(&self, name: &ServerName, limit: Duration) {
        let tried = || {
            let status = self.app.gateway().status();
            status.get(name).is_none_or(|status| status.kind != StatusKind::Connecting)
        };
        self.until(limit, tried).await;
    }

    async fn until(&self, limit: Duration, done: impl Fn() -> bool) {
        let deadline = Instant::now() + limit;
        while !done() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// How long a change waits for news of the server, to report how many tools it has.
const REPORT_WITHIN: Duration = Duration::from_secs(3);
const REFRESH_WITHIN: Duration = Duration::from_secs(30);

/// Writes a change into the registry. Waits for the disk.
pub(super) fn apply(registry: &Registry, edit: Edit) -> Result<Change, RegistryError> {
    match edit {
        Edit::Add { server, replace: false } => registry.create_server(*server),
        Edit::Add { server, replace: true } => registry.put_server(*server),
        Edit::Remove { name } => registry.remove_server(&name),
        Edit::Enable { name } => registry.set_enabled(&name, true),
        Edit::Disable { name } => registry.set_enabled(&name, false),
    }
}

/// What a change came to, as far as the registry knows.
pub(super) fn edited_of(outcome: &str, change: &Change) -> Edited {
    let outcome = match outcome {
        _ if change.is_unchanged() => "unchanged",
        "added" if change.before.is_some() => "replaced",
        outcome => outcome,
    };
    // Whose it was is what decides whether the change lasts.
    let record = change.before.as_ref().or(change.after.as_ref());
    let origin = record.map_or(Origin::Cli, |server| server.origin);
    Edited { outcome: outcome.to_owned(), origin, server: None, kept: true }
}

/// What the registry refused, and what to do about it.
pub(super) fn explain(error: RegistryError, snapshot: &Snapshot) -> anyhow::Error {
    match error {
        RegistryError::Exists(name) => anyhow!(
            "server `{name}` exists already: change it with --replace, or take it away with `portcullis remove \
             {name}`"
        ),
        RegistryError::Missing(name) => {
            let names = snapshot.servers.iter().map(|server| server.name.as_str());
            match closest(name.as_str(), names).first() {
                Some(near) => anyhow!("there is no server `{name}`: did you mean `{near}`?"),
                None => anyhow!("there is no server `{name}`: `portcullis list` shows those there are"),
            }
        }
        other => other.into(),
    }
}

pub(super) fn unreadable(snapshot: &Snapshot) -> Vec<String> {
    snapshot.unreadable.iter().map(ToString::to_string).collect()
}

impl Edit {
    pub(super) fn name(&self) -> &ServerName {
        match self {
            Edit::Add { server, .. } => &server.name,
            Edit::Remove { name } | Edit::Enable { name } | Edit::Disable { name } => name,
        }
    }

    pub(super) fn word(&self) -> &'static str {
        match self {
            Edit::Add { .. } => "added",
            Edit::Remove { .. } => "removed",
            Edit::Enable { .. } => "enabled",
            Edit::Disable { .. } => "disabled",
        }
    }
}

fn state(kind: &StatusKind) -> State {
    match kind {
        StatusKind::Up => State::Up,
        StatusKind::Down { error } => State::Down { error: error.clone() },
        _ => State::Connecting,
    }
}

// === arguments ===

fn params_of(call: &Call, item: &Item) -> Result<Params> {
    let arguments = match &call.arguments {
        Arguments::Json(json) => json.get().to_owned(),
        Arguments::Pairs(pairs) => typed(pairs, &item.raw).as_str().to_owned(),
    };
    let mut params = Params::default();
    params.object_mut().set("name", Value::from(&*item.exposed).to_string());
    params.object_mut().set("arguments", arguments);
    Ok(params)
}

/// `k=v` as JSON: what the schema calls a string is one, what is JSON is that, and the rest is a string.
fn typed(pairs: &[(String, String)], definition: &Bytes) -> RawObject {
    let definition = RawObject::parse(definition.clone()).ok();
    let schema = definition.and_then(|definition| definition.get_object("inputSchema"));
    let properties = schema.and_then(|schema| schema.get_object("properties"));
    let mut arguments = RawObject::empty();
    for (name, text) in pairs {
        let property = properties.as_ref().and_then(|properties| properties.get_object(name));
        let is_text = property.is_some_and(|property| wants_text(&property, text));
        match serde_json::from_str::<&RawValue>(text) {
            Ok(json) if !is_text => arguments.set(name, json.get()),
            _ => arguments.set(name, Value::from(text.as_str()).to_string()),
        }
    }
    arguments
}

fn wants_text(property: &RawObject, text: &str) -> bool {
    match property.get_as::<Value>("type") {
        Some(Ok(Value::String(kind))) => kind == "string",
        // One that may be other things too is read as the one it looks like, but not turned into a number.
        Some(Ok(Value::Array(kinds))) => {
            let may_be = |kind: &str| kinds.iter().any(|k| k == kind);
            may_be("string") && !(text == "null" && may_be("null"))
        }
        _ => false,
    }
}

// === names that are near ===

fn similar(wanted: &str, visible: &[Item]) -> Vec<String> {
    let near = closest(wanted, visible.iter().map(|item| &*item.exposed));
    if !near.is_empty() {
        return near;
    }
    // The upstream's own name is an honest mistake.
    let own = visible.iter().filter(|item| *item.own == *wanted).map(|item| item.exposed.to_string());
    own.take(SUGGESTED).collect()
}

/// The names most like `wanted`, the nearest first.
pub(super) fn closest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let wanted = wanted.to_lowercase();
    let mut near: Vec<(f64, &str)> = names
        .map(|name| (strsim::jaro_winkler(&wanted, &name.to_lowercase()), name))
        .filter(|(likeness, _)| *likeness > 0.85)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    near.into_iter().take(SUGGESTED).map(|(_, name)| name.to_owned()).collect()
}

const SUGGESTED: usize = 3;

fn raw(json: &Bytes) -> Result<Box<RawValue>> {
    Ok(serde_json::from_slice(json)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed_text(pairs: &[(&str, &str)]) -> String {
        let schema = r#"{"inputSchema":{"properties":{
            "s":{"type":"string"}, "n":{"type":"integer"}, "o":{"type":["string","null"]}}}}"#;
        let owned = Vec::from_iter(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        typed(&owned, &Bytes::from_static(schema.as_bytes())).as_str().to_owned()
    }

    #[test]
    fn the_schema_says_what_is_a_string() {
        assert_eq!(typed_text(&[("s", "12"), ("n", "12")]), r#"{"s":"12","n":12}"#);
        assert_eq!(typed_text(&[("o", "12")]), r#"{"o":"12"}"#);
        assert_eq!(typed_text(&[("o", "null")]), r#"{"o":null}"#);
    }

    #[test]
    fn what_the_schema_does_not_know_is_json_when_it_can_be() {
        assert_eq!(typed_text(&[("x", "[1]"), ("y", "a b"), ("z", "")]), r#"{"x":[1],"y":"a b","z":""}"#);
        assert_eq!(typed_text(&[("big", "18446744073709551616")]), r#"{"big":18446744073709551616}"#);
    }

    #[test]
    fn near_names_are_suggested_and_others_not() {
        let names = ["clock_now", "clock_add_days", "notes_add"];
        assert_eq!(closest("clock_nwo", names.into_iter())[0], "clock_now");
        assert!(closest("weather", names.into_iter()).is_empty());
    }
}
