//! The client of rmcp 3.9, as others use it, in each of its modes: in front of the gateway, in front of the fixture of
//! either era.

use std::sync::{Arc, Mutex};

use rmcp::{
    ClientHandler, ClientLifecycleMode, ClientServiceExt as _, ErrorData, RoleClient,
    model::{
        CallToolRequestParams, ClientCapabilities, ClientConfig, ElicitRequestParams, ElicitResult,
        ElicitationAction, GetPromptRequestParams, Implementation, ProgressNotificationParam,
        ProtocolVersion, ReadResourceRequestParams, SubscriptionFilter,
    },
    service::{NotificationContext, RequestContext, RunningService},
    transport::StreamableHttpClientTransport,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::stage::{Fixture, Gateway, PATIENCE, eventually};

/// A person who says yes, and a screen that shows progress.
#[derive(Clone, Default)]
struct Person {
    progress: Arc<Mutex<Vec<f64>>>,
    changes: Arc<Mutex<usize>>,
}

impl ClientHandler for Person {
    fn get_info(&self) -> ClientConfig {
        let capabilities = ClientCapabilities::builder().enable_elicitation().build();
        ClientConfig::new(capabilities, Implementation::new("person", "1"))
    }

    async fn create_elicitation(
        &self,
        _: ElicitRequestParams,
        _: RequestContext<RoleClient>,
    ) -> Result<ElicitResult, ErrorData> {
        let form = json!({ "username": "ann", "email": "ann@example.com" });
        Ok(ElicitResult::new(ElicitationAction::Accept).with_content(form))
    }

    async fn on_progress(&self, told: ProgressNotificationParam, _: NotificationContext<RoleClient>) {
        self.progress.lock().expect("no panic").push(told.progress);
    }

    async fn on_tool_list_changed(&self, _: NotificationContext<RoleClient>) {
        *self.changes.lock().expect("no panic") += 1;
    }
}

fn modes() -> [(&'static str, ClientLifecycleMode); 3] {
    let preferred_versions = vec![ProtocolVersion::V_2026_07_28];
    [
        ("legacy", ClientLifecycleMode::Initialize),
        ("modern", ClientLifecycleMode::Discover { preferred_versions: preferred_versions.clone() }),
        ("auto", ClientLifecycleMode::Auto { preferred_versions, legacy_version: None }),
    ]
}

async fn connect(
    gateway: &Gateway,
    person: &Person,
    mode: ClientLifecycleMode,
) -> RunningService<RoleClient, Person> {
    let transport = StreamableHttpClientTransport::from_uri(gateway.url());
    person.clone().serve_with_lifecycle(transport, mode).await.expect("a connection")
}

fn call(tool: &'static str, arguments: Value) -> CallToolRequestParams {
    let Value::Object(arguments) = arguments else { panic!("arguments are an object") };
    CallToolRequestParams::new(tool).with_arguments(arguments)
}

/// Every mode, in front of either era.
async fn everywhere(
    story: impl AsyncFn(&'static str, &Gateway, &Person, RunningService<RoleClient, Person>),
) {
    for fixture in [Fixture::legacy().await, Fixture::modern().await] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        for (name, mode) in modes() {
            let person = Person::default();
            let client = connect(&gateway, &person, mode).await;
            story(name, &gateway, &person, client).await;
        }
    }
}

#[tokio::test]
async fn it_lists_calls_reads_and_prompts() {
    everywhere(async |mode, _, _, client| {
        let tools = client.list_all_tools().await.expect("tools");
        assert!(tools.iter().any(|tool| tool.name == "fix_echo"), "{mode}");
        let echoed = client.call_tool(call("fix_echo", json!({ "a": 1 }))).await.expect("an answer");
        assert_eq!(echoed.structured_content, Some(json!({ "a": 1 })), "{mode}");
        let prompt = client.get_prompt(GetPromptRequestParams::new("fix_test_simple_prompt")).await;
        assert_eq!(prompt.expect("a prompt").messages.len(), 1, "{mode}");
        let read = client.read_resource(ReadResourceRequestParams::new("test://static-text")).await;
        assert_eq!(read.expect("a resource").contents.len(), 1, "{mode}");
        assert!(!client.list_all_resource_templates().await.expect("templates").is_empty(), "{mode}");
        let unknown = client.call_tool(call("fix_nope", json!({}))).await;
        assert!(unknown.expect_err("nobody has it").to_string().contains("fix_nope"), "{mode}");
        client.cancel().await.expect("a good end");
    })
    .await;
}

#[tokio::test]
async fn it_meets_the_era_it_asked_for() {
    everywhere(async |mode, _, _, client| {
        let seen = client.call_tool(call("fix_seen", json!({}))).await.expect("an answer");
        let seen = seen.structured_content.expect("what was seen");
        let spoken = client.peer_info().map(|info| info.protocol_version.to_string());
        match mode {
            "legacy" => assert_eq!(spoken.as_deref(), Some("2025-11-25"), "{seen}"),
            _ => assert_ne!(spoken.as_deref(), Some("2025-11-25"), "{seen}"),
        }
    })
    .await;
}

#[tokio::test]
async fn it_answers_questions() {
    // In the middle of a call a legacy upstream can ask a legacy client only.
    for (fixture, able) in [(Fixture::legacy().await, 1), (Fixture::modern().await, 3)] {
        let gateway = Gateway::with([("fix", fixture.url())]).start().await;
        for (name, mode) in modes().into_iter().take(able) {
            let client = connect(&gateway, &Person::default(), mode).await;
            let asked = call("fix_test_elicitation", json!({ "message": "Who?" }));
            let answer = client.call_tool(asked).await.expect("an answer");
            let answer = serde_json::to_string(&answer).expect("JSON");
            assert!(answer.contains("ann@example.com"), "{name}: {answer}");
        }
    }
}

#[tokio::test]
async fn it_sees_progress() {
    everywhere(async |mode, _, person, client| {
        client.call_tool(call("fix_test_tool_with_progress", json!({}))).await.expect("an answer");
        eventually(mode, async || *person.progress.lock().expect("no panic") == [0.0, 50.0, 100.0]).await;
    })
    .await;
}

#[tokio::test]
async fn it_hears_of_changes() {
    everywhere(async |mode, _, person, client| {
        let change = call("fix_add_tool", json!({ "name": format!("fresh-for-{mode}") }));
        match mode {
            "legacy" => {
                client.call_tool(change).await.expect("an answer");
                eventually(mode, async || *person.changes.lock().expect("no panic") > 0).await;
            }
            _ => {
                let filter = SubscriptionFilter::builder().tools_list_changed().build();
                let mut changes = client.listen(filter).await.expect("a subscription");
                assert_eq!(changes.acknowledged().tools_list_changed, Some(true));
                client.call_tool(change).await.expect("an answer");
                let heard = timeout(PATIENCE, changes.next()).await.expect("a change in time");
                assert!(heard.expect("a good stream").is_some(), "{mode}");
            }
        }
    })
    .await;
}
