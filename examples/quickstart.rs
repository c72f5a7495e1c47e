//! A governed gateway over one upstream, in a few lines.
//!
//! ```sh
//! cargo run --example quickstart -- http://127.0.0.1:3001/mcp 127.0.0.1:8000
//! ```
//!
//! Without arguments it serves an upstream of its own on a free port, asks it something, and ends.

use std::{net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use portcullis::{
    BoxError, BoxMcpService,
    gateway::Gateway,
    layers::AccessRules,
    protocol::{McpRequest, McpResponse, Method},
    server::{self, Server},
    stack::Stack,
    upstream::HttpUpstream,
};
use tower::{ServiceExt as _, service_fn};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(listen)) = (arguments.next(), arguments.next()) else { return demonstrate().await };
    let gateway =
        Gateway::builder().upstream("files".parse()?, HttpUpstream::new("files".parse()?, url)).build();
    let server = Server::bind(listen.parse()?).await?;
    println!("listening on http://{}/mcp", server.local_addr()?);
    Ok(server.serve(server::router(governed(gateway)?), std::future::pending()).await?)
}

/// The default stack, with one rule: nothing that deletes.
fn governed(gateway: Gateway) -> Result<BoxMcpService, BoxError> {
    let mut rules = AccessRules::default();
    rules.set_server("files".parse()?, None, &["*delete*".to_owned()])?;
    Ok(Stack::new().edge(gateway, Arc::new(ArcSwap::from_pointee(rules))))
}

async fn demonstrate() -> Result<(), BoxError> {
    let gateway = Gateway::builder().upstream("files".parse()?, service_fn(files)).build();
    let service = governed(gateway.clone())?;
    let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    println!("listening on http://{}/mcp", server.local_addr()?);

    let list = service.clone().oneshot(McpRequest::bare(Method::ToolsList)).await?;
    println!("visible: {}", list.payload().to_value().unwrap_or_default()["tools"]);
    let call = McpRequest::call_tool("files_delete", serde_json::json!({ "path": "/" }));
    println!("refused: {:?}", service.oneshot(call).await?.payload());
    server.serve(server::router(gateway), async {}).await?;
    Ok(())
}

/// Any service of the right shape is an upstream.
async fn files(request: McpRequest) -> Result<McpResponse, BoxError> {
    Ok(McpResponse::value(match request.method() {
        Method::Discover => {
            serde_json::json!({ "supportedVersions": ["2026-07-28"], "capabilities": { "tools": {} } })
        }
        Method::ToolsList => serde_json::json!({ "tools": [
            { "name": "read", "inputSchema": { "type": "object" } },
            { "name": "delete", "inputSchema": { "type": "object" } },
        ]}),
        _ => serde_json::json!({ "content": [{ "type": "text", "text": "done" }] }),
    }))
}
