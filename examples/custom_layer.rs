//! A layer of one's own, at a named position of the default stack: a budget of calls for each principal.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use futures_util::{
    TryFutureExt as _,
    future::{BoxFuture, ready},
};
use portcullis::{
    BoxError, BoxMcpLayer, McpService,
    error::Refusal,
    gateway::Gateway,
    identity::Principal,
    protocol::{McpRequest, McpResponse, Method},
    stack::{Position, Stack},
};
use tower::{Layer, Service, ServiceExt as _, service_fn};

/// Settings, and what all services made from it share.
#[derive(Clone)]
struct BudgetLayer {
    calls: u32,
    spent: Arc<Mutex<HashMap<Principal, u32>>>,
}

#[derive(Clone)]
struct Budget<S> {
    inner: S,
    layer: BudgetLayer,
}

impl<S> Layer<S> for BudgetLayer {
    type Service = Budget<S>;

    fn layer(&self, inner: S) -> Budget<S> {
        Budget { inner, layer: self.clone() }
    }
}

impl<S: McpService> Service<McpRequest> for Budget<S> {
    type Response = McpResponse;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<McpResponse, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: McpRequest) -> Self::Future {
        if *request.method() == Method::ToolsCall && !self.layer.take(request.principal()) {
            let refusal = Refusal::new("budget_spent", format!("{} has no calls left", request.principal()));
            return Box::pin(ready(Err(refusal.into())));
        }
        Box::pin(self.inner.call(request).map_err(Into::into))
    }
}

impl BudgetLayer {
    fn take(&self, principal: &Principal) -> bool {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = spent.entry(principal.clone()).or_default();
        *spent += 1;
        *spent <= self.calls
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let upstream = service_fn(|request: McpRequest| async move {
        Ok::<_, BoxError>(McpResponse::raw(match request.method() {
            Method::ToolsList => r#"{"tools":[{"name":"ping"}]}"#,
            Method::Discover => r#"{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}"#,
            _ => r#"{"content":[]}"#,
        }))
    });
    let gateway = Gateway::builder().upstream("demo".parse()?, upstream).build();
    gateway.settled(std::time::Duration::from_secs(5)).await;
    let budget = BudgetLayer { calls: 2, spent: Arc::default() };
    // After access: a call to something that does not exist costs nothing.
    let service =
        Stack::new().foreign(Position::AfterAccess, BoxMcpLayer::new(budget)).edge(gateway, Arc::default());
    for _ in 0..3 {
        let answer =
            service.clone().oneshot(McpRequest::call_tool("demo_ping", serde_json::json!({}))).await?;
        println!("{}", answer.payload().to_value().unwrap_or_default());
    }
    Ok(())
}
