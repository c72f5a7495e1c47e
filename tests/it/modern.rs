//! Clients of 2026-07-28.

use serde_json::json;

use crate::support::{Fixture, Gateway};

#[tokio::test]
async fn a_call_reaches_the_upstream() {
    let fixture = Fixture::start().await;
    let gateway = Gateway::with([("fix", fixture.url())]).start().await;
    let answer = gateway.modern().call("fix_echo", json!({ "a": 1 })).await;
    assert_eq!(answer.result()["structuredContent"], json!({ "a": 1 }));
    let client = gateway.legacy().await;
    let answer = client.call("fix_echo", json!({ "a": 1 })).await;
    assert_eq!(answer.result()["structuredContent"], json!({ "a": 1 }));
}
