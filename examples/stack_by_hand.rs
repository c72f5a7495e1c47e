//! The stack without [`Stack`](portcullis::stack::Stack): our layers and one's own in a plain `ServiceBuilder`.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use portcullis::{
    BoxError, McpService,
    gateway::Gateway,
    layers::{self, AccessLayer, AccessRules, Next, PaginateLayer, RescueLayer, TimeoutLayer, TraceLayer},
    protocol::{McpRequest, McpResponse, Method},
};
use tower::{ServiceBuilder, ServiceExt as _, service_fn};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let gateway = Gateway::builder().upstream("math".parse()?, upstream()).build();
    gateway.settled(Duration::from_secs(5)).await;
    let mut rules = AccessRules::default();
    rules.set_server("math".parse()?, Some(&["add".to_owned()]), &[])?;

    let service = ServiceBuilder::new()
        .layer(RescueLayer::new())
        .layer(TraceLayer::new())
        .layer(PaginateLayer::default())
        .layer(AccessLayer::new(gateway.directory(), Arc::new(ArcSwap::from_pointee(rules))))
        .layer(layers::from_fn(|request, next: Next| async move {
            println!("{} calls {}", request.principal(), request.method());
            next.run(request).await
        }))
        // Layers of tower's own fit, too.
        .concurrency_limit(64)
        .service(gateway);

    for tool in ["math_add", "math_divide"] {
        let answer = service.clone().oneshot(McpRequest::call_tool(tool, serde_json::json!({}))).await?;
        println!("{tool}: {:?}", answer.payload());
    }
    Ok(())
}

/// An upstream's own stack is made the same way.
fn upstream() -> impl McpService {
    let server = service_fn(|request: McpRequest| async move {
        Ok::<_, BoxError>(McpResponse::raw(match request.method() {
            Method::ToolsList => r#"{"tools":[{"name":"add"},{"name":"divide"}]}"#,
            Method::Discover => r#"{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}"#,
            _ => r#"{"content":[{"type":"text","text":"42"}]}"#,
        }))
    });
    ServiceBuilder::new().layer(TimeoutLayer::new(Duration::from_secs(10))).service(server)
}
