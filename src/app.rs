//! Registry, gateway and stacks put together: what the daemon runs, without its doors.
//!
//! Every pen (config file, command line, control socket) writes the registry; [`App::apply`] makes the gateway what
//! the registry says. A change through [`App`] is live when the method returns.
//!
//! ```
//! use std::sync::Arc;
//! use portcullis::{app::{App, Settings}, registry::{MemoryBackend, Registry, ServerRecord}, upstream::UpstreamSpec};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let registry = Registry::open(Arc::new(MemoryBackend::new()))?;
//! let app = App::start(registry, Settings::default());
//! app.add(ServerRecord::new("docs".parse()?, UpstreamSpec::http("http://127.0.0.1:9/mcp"))).await?;
//! assert_eq!(app.gateway().status().len(), 1);
//! # Ok::<_, portcullis::BoxError>(()) }).unwrap();
//! ```

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use tower::service_fn;

use crate::{
    BoxError, BoxMcpService, McpService, demo,
    error::{Fault, UpstreamError},
    gateway::{CatalogStore, Gateway},
    layers::AccessRules,
    protocol::{McpRequest, McpResponse, Naming, ServerName},
    registry::{CatalogRecord, Change, Registry, RegistryError, ServerRecord, Snapshot},
    stack::{self, Stack},
    upstream::{HttpUpstream, SseUpstream, StdioCommand, StdioUpstream, Transport, secret},
};

/// The setting that holds it.
const TASK_KEY: &str = "task-key";

/// What an [`App`] is started with.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How exposed names are made.
    pub naming: Naming,
    /// The edge, with foreign layers if there are any.
    pub stack: Stack,
}

/// The daemon without its doors. Clones are the same app.
#[derive(Clone)]
pub struct App {
    shared: Arc<Shared>,
}

struct Shared {
    registry: Arc<Registry>,
    gateway: Gateway,
    rules: Arc<ArcSwap<AccessRules>>,
    service: BoxMcpService,
    applied: Mutex<Applied>,
}

/// What the gateway runs on.
#[derive(Default)]
struct Applied {
    records: HashMap<ServerName, Arc<ServerRecord>>,
    children: HashMap<ServerName, StdioUpstream>,
}

impl App {
    /// Starts the gateway on what the registry holds. Needs a tokio runtime.
    pub fn start(registry: Registry, settings: Settings) -> App {
        let registry = Arc::new(registry);
        let store = Arc::new(Catalogs(registry.clone()));
        let mut gateway = Gateway::builder().naming(settings.naming).store(store);
        if let Some(key) = task_key(&registry) {
            gateway = gateway.key(key);
        }
        let gateway = gateway.build();
        let rules: Arc<ArcSwap<AccessRules>> = Arc::default();
        let service = settings.stack.edge(gateway.clone(), rules.clone());
        let applied = Mutex::default();
        let app = App { shared: Arc::new(Shared { registry, gateway, rules, service, applied }) };
        app.apply();
        app
    }

    /// The edge: what doors serve.
    pub fn service(&self) -> BoxMcpService {
        self.shared.service.clone()
    }

    /// The gateway.
    pub fn gateway(&self) -> &Gateway {
        &self.shared.gateway
    }

    /// The registry, to be read. Writers that are not methods of [`App`] call [`App::apply`] afterwards.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.shared.registry
    }

    /// What is registered now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.registry.snapshot()
    }

    /// Adds a server. An existing one of that name is an error.
    pub async fn add(&self, server: ServerRecord) -> Result<Change, RegistryError> {
        self.change(move |registry| registry.create_server(server)).await
    }

    /// Adds a server or replaces the one of that name.
    pub async fn put(&self, server: ServerRecord) -> Result<Change, RegistryError> {
        self.change(move |registry| registry.put_server(server)).await
    }

    /// Removes a server and what is known of it.
    pub async fn remove(&self, name: ServerName) -> Result<Change, RegistryError> {
        self.change(move |registry| registry.remove_server(&name)).await
    }

    /// Makes a server take part, or not.
    pub async fn set_enabled(&self, name: ServerName, enabled: bool) -> Result<Change, RegistryError> {
        self.change(move |registry| registry.set_enabled(&name, enabled)).await
    }

    /// Runs a change of the registry off the async threads, for it waits for the disk, and applies it.
    pub async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Registry) -> Result<T, RegistryError> + Send + 'static,
    ) -> Result<T, RegistryError> {
        let registry = self.shared.registry.clone();
        let outcome = tokio::task::spawn_blocking(move || change(&registry)).await;
        let changed = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        self.apply();
        Ok(changed)
    }

    /// Ends all child processes, and waits until they are gone. Nothing is served after that.
    pub async fn shutdown(&self) {
        let children = std::mem::take(&mut self.lock().children);
        join_all(children.values().map(StdioUpstream::shutdown)).await;
    }

    fn lock(&self) -> MutexGuard<'_, Applied> {
        self.shared.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the gateway what the registry says. Upstreams whose record did not change are not touched.
    pub fn apply(&self) {
        let mut applied = self.lock();
        let snapshot = self.shared.registry.snapshot();
        let wanted: HashMap<ServerName, Arc<ServerRecord>> =
            snapshot.enabled().map(|server| (server.name.clone(), server.clone())).collect();
        let Applied { records, children } = &mut *applied;
        // What goes, goes before its rules do; what comes, comes after them. A tool must not be seen for a moment
        // before it is hidden.
        for name in records.keys().filter(|name| !wanted.contains_key(*name)) {
            self.shared.gateway.remove(name);
            children.remove(name);
        }
        let changed = |before: &ServerRecord, after: &ServerRecord| before.spec != after.spec;
        let rules_changed =
            wanted.iter().any(|(name, now)| records.get(name).is_some_and(|was| was.rules != now.rules));
        for (name, now) in &wanted {
            if records.get(name).is_some_and(|was| was.rules != now.rules && changed(was, now)) {
                self.shared.gateway.remove(name);
            }
        }
        self.shared.rules.store(Arc::new(rules_of(&snapshot)));
        if rules_changed {
            self.shared.gateway.announce();
        }
        for server in snapshot.enabled() {
            if applied.records.get(&server.name).is_none_or(|before| before.spec != server.spec) {
                let client = Client::of(server);
                let service = stack::upstream(server.name.clone(), client.service, &server.spec);
                self.shared.gateway.put(server.name.clone(), service);
                applied.children.remove(&server.name);
                applied.children.extend(client.child.map(|child| (server.name.clone(), child)));
            }
        }
        let order: Vec<ServerName> = snapshot.enabled().map(|server| server.name.clone()).collect();
        self.shared.gateway.reorder(&order);
        applied.records = wanted;
    }
}

/// What ids of tasks are sealed with, so that clients may ask for them after a restart. Without it, a key of the
/// process's own has to do.
fn task_key(registry: &Registry) -> Option<[u8; 32]> {
    let new = || {
        let mut key = [0; 32];
        getrandom::fill(&mut key).expect("the system has random numbers");
        URL_SAFE_NO_PAD.encode(key)
    };
    let kept = registry.setting_or_make(TASK_KEY, new);
    let kept = kept.inspect_err(|error| tracing::warn!(%error, "ids of tasks end with this process"));
    URL_SAFE_NO_PAD.decode(kept.ok()?).ok()?.try_into().ok()
}

/// Globs were checked when they were written. One that is bad all the same hides its whole server: a rule that
/// cannot be read must not allow anything.
fn rules_of(snapshot: &Snapshot) -> AccessRules {
    let mut rules = AccessRules::default();
    for server in snapshot.enabled() {
        let wanted = &server.rules;
        if let Err(error) = rules.set_server(server.name.clone(), wanted.allow.as_deref(), &wanted.deny) {
            tracing::error!(server = %server.name, %error, "bad rule; everything of this server is hidden");
            rules.set_server(server.name.clone(), Some(&[]), &[]).expect("no globs are good globs");
        }
    }
    rules
}

/// A client, and what it takes to end it.
struct Client {
    service: BoxMcpService,
    child: Option<StdioUpstream>,
}

impl Client {
    /// The client for a record's transport.
    fn of(server: &ServerRecord) -> Client {
        let name = server.name.clone();
        let transport = &server.spec.transport;
        if let Some(command) = StdioCommand::of(transport) {
            let child = StdioUpstream::new(name, command)
                .with_resolver(Arc::new(resolve))
                .with_isolation(server.spec.isolation);
            return Client { service: child.clone().boxed_mcp(), child: Some(child) };
        }
        let service = match transport {
            Transport::Http { url, headers } => headers
                .iter()
                .fold(HttpUpstream::new(name, url), |client, (name, value)| client.header(name, value))
                .boxed_mcp(),
            Transport::Builtin { kind } => {
                demo::service(kind).unwrap_or_else(|| unsupported(name, transport))
            }
            Transport::Sse { url, headers } => headers
                .iter()
                .fold(SseUpstream::new(name, url), |client, (name, value)| client.header(name, value))
                .boxed_mcp(),
            Transport::Stdio { .. } => unsupported(name, transport),
        };
        Client { service, child: None }
    }
}

/// References in a command are resolved when the child is started.
fn resolve(text: &str) -> Result<String, BoxError> {
    Ok(secret::expand(text, &secret::process_env)?.into_exposed())
}

/// Fails every request with one clear sentence.
fn unsupported(name: ServerName, transport: &Transport) -> BoxMcpService {
    let reason = format!("this build cannot reach `{}` servers", transport.kind());
    service_fn(move |_: McpRequest| {
        let error = UpstreamError::new(&name, Fault::Misconfigured, reason.clone());
        std::future::ready(Err::<McpResponse, BoxError>(error.into()))
    })
    .boxed_mcp()
}

/// The registry as the gateway's store of last-known catalogs.
struct Catalogs(Arc<Registry>);

impl CatalogStore for Catalogs {
    fn load(&self, server: &ServerName) -> Option<CatalogRecord> {
        self.0.catalog(server).ok().flatten()
    }

    fn save(&self, server: &ServerName, catalog: &CatalogRecord) {
        let (registry, server, catalog) = (self.0.clone(), server.clone(), catalog.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = registry.put_catalog(&server, &catalog) {
                tracing::warn!(%server, %error, "cannot keep the catalog");
            }
        });
    }
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App").field("gateway", &self.shared.gateway).finish_non_exhaustive()
    }
}
