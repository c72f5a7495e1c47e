//! The gateway as one route of an application that has others, and an authentication of its own.
//!
//! Whoever puts a [`Principal`] into the request's extensions has said who calls.

use std::net::SocketAddr;

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    middleware::{Next, from_fn},
    response::Response,
    routing::get,
};
use portcullis::{
    BoxError,
    gateway::Gateway,
    identity::Principal,
    server::{McpHttp, Options, Server, mount},
};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let gateway = Gateway::builder().build();
    let door = McpHttp::with_options(gateway, Options::default().allow_host("tools.example.com"));
    let app = Router::new()
        .merge(mount(door).layer(from_fn(authenticate)))
        .route("/", get(|| async { "not an MCP endpoint\n" }));

    let listen = std::env::args().nth(1).map_or(Ok(SocketAddr::from(([127, 0, 0, 1], 0))), |a| a.parse())?;
    let server = Server::bind(listen).await?;
    println!("listening on http://{}/mcp", server.local_addr()?);
    // With an address it serves; without one, this example only shows that it could.
    let serve = std::env::args().nth(1).is_some();
    server
        .serve(app, async move {
            if serve {
                std::future::pending().await
            }
        })
        .await?;
    Ok(())
}

/// A stand-in for yours: the key is the name.
async fn authenticate(mut request: Request, next: Next) -> Result<Response, StatusCode> {
    let key = request.headers().get("x-api-key").and_then(|key| key.to_str().ok());
    let principal = Principal::named(key.ok_or(StatusCode::UNAUTHORIZED)?.to_owned());
    request.extensions_mut().insert(principal);
    Ok(next.run(request).await)
}
