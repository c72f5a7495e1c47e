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
                let wanted = |uri: &str| self.uris.iter().any(|u| *u == *uri || is_within(uri, u));
                notification.params.get_string("uri").is_some_and(|uri| wanted(&uri))
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

/// Whether a resource is one within another: an update may be of a part of what was subscribed to (MCP 2025-11-25,
/// resources, subscriptions).
pub(crate) fn is_within(uri: &str, whole: &str) -> bool {
    let Some(rest) = uri.strip_prefix(whole).filter(|_| !whole.is_empty()) else { return false };
    !rest.is_empty() && (whole.ends_with('/') || rest.starts_with(['/', '?', '#']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_within_and_a_neighbour_is_not() {
        for part in ["a://b/c", "a://b#c", "a://b?c"] {
            assert!(is_within(part, "a://b"), "{part}");
        }
        assert!(is_within("a://b/c", "a://b/"));
        assert!(!is_within("a://bc", "a://b"));
        assert!(!is_within("a://b", "a://b"));
    }
}
