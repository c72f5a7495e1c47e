//! What a message is about: its method, classified once, and the name it addresses.

use std::{fmt, sync::Arc};

use super::Params;

macro_rules! methods {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// A method of MCP, of any revision. What is not listed is [`Method::Other`] and passes like the rest.
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Method {
            $($(#[$doc])* $variant,)*
            /// A method we have no name for.
            Other(Arc<str>),
        }

        impl Method {
            /// As it is written on the wire.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Method::$variant => $text,)*
                    Method::Other(text) => text,
                }
            }
        }

        impl From<&str> for Method {
            fn from(text: &str) -> Self {
                match text {
                    $($text => Method::$variant,)*
                    other => Method::Other(other.into()),
                }
            }
        }
    };
}

methods! {
    /// Opens a legacy session.
    Initialize = "initialize",
    /// Tells versions and capabilities.
    Discover = "server/discover",
    /// Legacy keep-alive.
    Ping = "ping",
    /// Lists tools.
    ToolsList = "tools/list",
    /// Calls a tool.
    ToolsCall = "tools/call",
    /// Lists prompts.
    PromptsList = "prompts/list",
    /// Renders a prompt.
    PromptsGet = "prompts/get",
    /// Lists resources.
    ResourcesList = "resources/list",
    /// Lists resource templates.
    TemplatesList = "resources/templates/list",
    /// Reads a resource.
    ResourcesRead = "resources/read",
    /// Legacy: asks for updates of a resource.
    ResourcesSubscribe = "resources/subscribe",
    /// Legacy: takes that back.
    ResourcesUnsubscribe = "resources/unsubscribe",
    /// Completes an argument.
    Complete = "completion/complete",
    /// Legacy: sets the session's log level.
    SetLevel = "logging/setLevel",
    /// Modern: opens a stream of change notifications.
    Listen = "subscriptions/listen",
    /// Reads a task.
    TasksGet = "tasks/get",
    /// Answers a task's question.
    TasksUpdate = "tasks/update",
    /// Ends a task.
    TasksCancel = "tasks/cancel",
    /// 2025-11-25: lists one's tasks.
    TasksList = "tasks/list",
    /// 2025-11-25: waits for a task's result.
    TasksResult = "tasks/result",
    /// Extension: lists skills.
    SkillsList = "skills/list",
    /// Extension: describes one skill.
    SkillsGet = "skills/get",
    /// Extension: lists what is in a directory.
    DirectoryRead = "resources/directory/read",
    /// Server to client: asks for a completion of its model.
    CreateMessage = "sampling/createMessage",
    /// Server to client: asks the person.
    Elicit = "elicitation/create",
    /// Server to client: asks for the roots.
    RootsList = "roots/list",
    /// Legacy: the handshake is over.
    Initialized = "notifications/initialized",
    /// The sender gave up on a request.
    Cancelled = "notifications/cancelled",
    /// How far a request is.
    Progress = "notifications/progress",
    /// A log line.
    LogMessage = "notifications/message",
    /// The tools changed.
    ToolsChanged = "notifications/tools/list_changed",
    /// The prompts changed.
    PromptsChanged = "notifications/prompts/list_changed",
    /// The resources or templates changed.
    ResourcesChanged = "notifications/resources/list_changed",
    /// A resource changed.
    ResourceUpdated = "notifications/resources/updated",
    /// Extension: how a task is.
    TaskChanged = "notifications/tasks",
    /// 2025-11-25: how a task is.
    LegacyTaskChanged = "notifications/tasks/status",
    /// First message on a listen stream.
    Acknowledged = "notifications/subscriptions/acknowledged",
}

impl Method {
    /// Whether the name says that nobody answers it.
    pub fn is_notification(&self) -> bool {
        self.as_str().starts_with("notifications/")
    }

    /// Removed in the modern era: a modern request for one is an unknown method.
    pub fn is_legacy_only(&self) -> bool {
        matches!(
            self,
            Method::Initialize
                | Method::Ping
                | Method::SetLevel
                | Method::ResourcesSubscribe
                | Method::ResourcesUnsubscribe
                | Method::TasksList
                | Method::TasksResult
        )
    }

    /// Whether a modern result must carry `ttlMs` and `cacheScope` (2026-07-28, server/utilities/caching).
    pub fn is_cacheable(&self) -> bool {
        matches!(
            self,
            Method::Discover
                | Method::ToolsList
                | Method::PromptsList
                | Method::ResourcesList
                | Method::TemplatesList
                | Method::ResourcesRead
                | Method::SkillsList
                | Method::SkillsGet
                | Method::DirectoryRead
        )
    }

    /// The params member that the `Mcp-Name` header mirrors (2026-07-28, streamable HTTP, and the tasks
    /// extension).
    pub fn name_member(&self) -> Option<&'static str> {
        match self {
            Method::ToolsCall | Method::PromptsGet => Some("name"),
            Method::ResourcesRead | Method::ResourcesSubscribe | Method::ResourcesUnsubscribe => Some("uri"),
            Method::TasksGet | Method::TasksUpdate | Method::TasksCancel => Some("taskId"),
            _ => None,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a request addresses by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Target {
    /// A tool's exposed name.
    Tool(Arc<str>),
    /// A prompt's exposed name.
    Prompt(Arc<str>),
    /// A resource's URI.
    Resource(Arc<str>),
    /// A resource template, as completion refers to it.
    Template(Arc<str>),
    /// A task's id.
    Task(Arc<str>),
}

impl Target {
    /// Reads the target out of the params. `None` when the method has none or the member is missing.
    pub fn of(method: &Method, params: &Params) -> Option<Target> {
        if *method == Method::Complete {
            return Target::of_completion(params);
        }
        // Named in the params, and in no header.
        let member = match method {
            Method::TasksResult => "taskId",
            Method::SkillsGet | Method::DirectoryRead => "uri",
            method => method.name_member()?,
        };
        let name: Arc<str> = params.get_string(member)?.into();
        Some(match method {
            Method::ToolsCall => Target::Tool(name),
            Method::PromptsGet => Target::Prompt(name),
            Method::TasksGet | Method::TasksUpdate | Method::TasksCancel | Method::TasksResult => {
                Target::Task(name)
            }
            _ => Target::Resource(name),
        })
    }

    fn of_completion(params: &Params) -> Option<Target> {
        let reference = params.get_object("ref")?;
        match reference.get_string("type")?.as_ref() {
            "ref/prompt" => Some(Target::Prompt(reference.get_string("name")?.into())),
            "ref/resource" => Some(Target::Template(reference.get_string("uri")?.into())),
            _ => None,
        }
    }

    /// The name, URI or id.
    pub fn name(&self) -> &Arc<str> {
        match self {
            Target::Tool(n)
            | Target::Prompt(n)
            | Target::Resource(n)
            | Target::Template(n)
            | Target::Task(n) => n,
        }
    }

    /// What kind of thing it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Target::Tool(_) => "tool",
            Target::Prompt(_) => "prompt",
            Target::Resource(_) => "resource",
            Target::Template(_) => "resource template",
            Target::Task(_) => "task",
        }
    }
}
