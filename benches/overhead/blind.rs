//! The blind proxy: hyper on both sides, bodies streamed through, nothing looked at.
//!
//! It is the yardstick. A proxy in a process of its own cannot cost much less with this HTTP library, so
//! what the gateway costs beyond it is the price of governing.

use anyhow::Context;
use hyper::body::Incoming;
use hyper::{Request, Uri};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;

use crate::process::{self, Announce};

/// Forwards everything to 127.0.0.1:`upstream` until stdin is closed.
pub(crate) fn main(upstream: u16) -> anyhow::Result<()> {
    // The same runtime as the daemon's: one worker a core.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let sockets = process::listen(1).await?;
        sockets.announce()?;
        let client = client();
        process::serve_until_stdin_closes(sockets, move |request| {
            let client = client.clone();
            async move { anyhow::Ok(client.request(redirect(request, upstream)?).await?) }
        })
        .await
    })
}

fn client() -> Client<HttpConnector, Incoming> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(connector)
}

fn redirect(mut request: Request<Incoming>, upstream: u16) -> anyhow::Result<Request<Incoming>> {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = Uri::builder()
        .scheme("http")
        .authority(format!("127.0.0.1:{upstream}"))
        .path_and_query(path)
        .build()
        .context("the target is a valid URI")?;
    Ok(request)
}
