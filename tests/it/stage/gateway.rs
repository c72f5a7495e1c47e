//! A gateway with its doors open, put together from the library's public parts.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use portcullis::{
    BoxMcpLayer,
    gateway::{self, CatalogStore},
    identity::Principal,
    layers::AccessRules,
    protocol::{Naming, NamingMode},
    server::{McpHttp, Options, Server, mount},
    stack::{self, Position, Stack},
    upstream::{HttpUpstream, UpstreamSpec},
};
use serde_json::{Value, json};
use tokio::{sync::oneshot, task::JoinHandle};
use tower::util::MapRequestLayer;

use super::{Legacy, Modern, PATIENCE, Request};

/// A gateway on a port of its own; it ends when dropped.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    pub(crate) inner: gateway::Gateway,
    rules: Arc<ArcSwap<AccessRules>>,
    shutdown: Option<oneshot::Sender<()>>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Gateway {
    /// In front of these: a name and a URL each, the first with the highest priority.
    pub(crate) fn with<const N: usize>(upstreams: [(&str, String); N]) -> Builder {
        Builder {
            upstreams: upstreams.map(|(name, url)| (name.to_owned(), UpstreamSpec::http(url))).into(),
            naming: NamingMode::Prefix,
            rules: AccessRules::default(),
            options: Options::default(),
            stack: Stack::new(),
            store: None,
            settled: true,
        }
    }

    pub(crate) fn modern(&self) -> Modern {
        Modern::of(self.address)
    }

    pub(crate) async fn legacy(&self) -> Legacy {
        self.legacy_with(json!({})).await
    }

    /// A legacy client that declares these capabilities.
    pub(crate) async fn legacy_with(&self, capabilities: Value) -> Legacy {
        Legacy::open(self.address, capabilities).await
    }

    /// Hides these from now on, and nothing else of that server.
    pub(crate) fn deny(&self, server: &str, globs: &[&str]) {
        let globs: Vec<String> = globs.iter().map(|glob| (*glob).to_owned()).collect();
        let mut rules = AccessRules::clone(&self.rules.load());
        rules.set_server(server.parse().expect("a name"), None, &globs).expect("good globs");
        self.rules.store(Arc::new(rules));
        self.inner.announce();
    }

    /// A POST with nothing but what every POST has.
    pub(crate) fn post(&self, body: impl Into<bytes::Bytes>) -> Request {
        Request::post(self.address, "/mcp", body)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/mcp", self.address)
    }

    /// Begins an orderly end. What is returned is done when the end is reached.
    pub(crate) fn shut_down(&mut self) {
        let _ = self.shutdown.take().expect("it runs").send(());
    }

    pub(crate) async fn ended(&mut self) {
        let ended = tokio::time::timeout(PATIENCE, &mut self.serving).await;
        ended.expect("an end in time").expect("no panic").expect("a good end");
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Makes a [`Gateway`].
#[must_use]
pub(crate) struct Builder {
    upstreams: Vec<(String, UpstreamSpec)>,
    naming: NamingMode,
    rules: AccessRules,
    options: Options,
    stack: Stack,
    store: Option<Arc<dyn CatalogStore>>,
    settled: bool,
}

impl Builder {
    pub(crate) fn naming(mut self, mode: NamingMode) -> Self {
        self.naming = mode;
        self
    }

    /// Hides these from everybody.
    pub(crate) fn deny(mut self, server: &str, globs: &[&str]) -> Self {
        let globs: Vec<String> = globs.iter().map(|glob| (*glob).to_owned()).collect();
        self.rules.set_server(server.parse().expect("a name"), None, &globs).expect("good globs");
        self
    }

    pub(crate) fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    pub(crate) fn layer(mut self, position: Position, layer: BoxMcpLayer) -> Self {
        self.stack = self.stack.foreign(position, layer);
        self
    }

    pub(crate) fn page_size(mut self, size: usize) -> Self {
        self.stack = self.stack.page_size(size);
        self
    }

    /// How many requests each upstream may have under way.
    pub(crate) fn concurrency(mut self, most: usize) -> Self {
        self.upstreams.iter_mut().for_each(|(_, spec)| spec.concurrency = most);
        self
    }

    /// How long each upstream may take.
    pub(crate) fn timeout(mut self, limit: Duration) -> Self {
        self.upstreams.iter_mut().for_each(|(_, spec)| spec.timeout = limit);
        self
    }

    pub(crate) fn store(mut self, store: Arc<dyn CatalogStore>) -> Self {
        self.store = Some(store);
        self
    }

    /// Opens the doors at once, whatever the upstreams do.
    pub(crate) fn unsettled(mut self) -> Self {
        self.settled = false;
        self
    }

    /// Opens the doors, when every upstream was tried.
    pub(crate) async fn start(self) -> Gateway {
        let naming = Naming { mode: self.naming, ..Naming::default() };
        let mut builder = gateway::Gateway::builder().naming(naming);
        if let Some(store) = self.store {
            builder = builder.store(store);
        }
        let gateway = self.upstreams.iter().fold(builder, |builder, (name, spec)| {
            let name: portcullis::protocol::ServerName = name.parse().expect("a name");
            let client = HttpUpstream::new(name.clone(), spec.transport.to_string());
            builder.upstream(name.clone(), stack::upstream(name, client, spec))
        });
        let gateway = gateway.build();
        if self.settled {
            gateway.settled(PATIENCE).await;
        }
        let rules = Arc::new(ArcSwap::from_pointee(self.rules));
        let edge = self.stack.edge(gateway.clone(), rules.clone());
        let door = McpHttp::with_options(edge, self.options);
        let router = mount(door).layer(MapRequestLayer::new(identify));
        let server = Server::bind(([127, 0, 0, 1], 0).into()).await.expect("a free port");
        // As the daemon serves.
        let server = server.lanes(2);
        let address = server.local_addr().expect("it is bound");
        let (shutdown, ending) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.serve(router, async move { drop(ending.await) }));
        Gateway { address, inner: gateway, rules, shutdown: Some(shutdown), serving }
    }
}

/// Authentication, as far as stories need one: whoever says who they are is believed.
fn identify(mut request: axum::extract::Request) -> axum::extract::Request {
    let user = request.headers().get("x-user").and_then(|user| user.to_str().ok()).map(str::to_owned);
    if let Some(user) = user {
        request.extensions_mut().insert(Principal::named(user));
    }
    request
}
