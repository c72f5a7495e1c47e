//! What a subscription is to.

use serde_json::{Value, json};

use super::{Method, Notification, Params};

/// The filter of a `subscriptions/listen` request.
#[derive(Clone, Debug, Default)]
pub struct ListenFilter {
    /// Changes of the list of tools.
    pub tools: bool,
    /// Of prompts.
    pub prompts: bool,
    /// Of resources and templates.
    pub resources: bool,
    /// Updates of these resources.
    pub uris: Vec<String>,
}

impl ListenFilter {
    /// Reads it from the params.
    pub fn of(params: &Params) -> Self {
        let Some(filter) = params.get_object("notifications") else { return Self::default() };
        let flag = |key| filter.get(key) == Some("true");
        ListenFilter {
            tools: flag("toolsListChanged"),
            prompts: flag("promptsListChanged"),
            resources: flag("resourcesListChanged"),
            uris: filter.get_as("resourceSubscriptions").and_then(Result::ok).unwrap_or_default(),
        }
    }

    /// Whether a notification is one the filter asks for.
    pub fn wants(&self, notification: &Notification) -> bool {
        match notification.method {
            Method::ToolsChanged => self.tools,
            Method::PromptsChanged => self.prompts,
            Method::ResourcesChanged => self.resources,
            Method::ResourceUpdated => {
                notification.params.get_string("uri").is_some_and(|uri| self.uris.iter().any(|u| **u == *uri))
            }
            _ => false,
        }
    }

    /// The filter as JSON.
    pub fn to_value(&self) -> Value {
        let mut filter = serde_json::Map::new();
        for (key, on) in [
            ("toolsListChanged", self.tools),
            ("promptsListChanged", self.prompts),
            ("resourcesListChanged", self.resources),
        ] {
            if on {
                filter.insert(key.to_owned(), Value::Bool(true));
            }
        }
        if !self.uris.is_empty() {
            filter.insert("resourceSubscriptions".to_owned(), json!(self.uris));
        }
        Value::Object(filter)
    }

    /// The first message of the stream: what is honoured.
    pub fn acknowledged(&self) -> Notification {
        let params = Params::from_value(&json!({ "notifications": self.to_value() }));
        Notification { method: Method::Acknowledged, params }
    }
}
