//! Many upstreams as one MCP service.
//!
//! The gateway keeps a *catalog* of every upstream, merges them into one *view*, and routes by looking names up in
//! it; it never takes a name apart. Lists come from the view, so an upstream that is slow or gone delays nobody,
//! and its last-known tools stay listed. What the view shows was asked for by one task per upstream, which
//! connects, lists, listens for changes, and begins again when the connection ends.
//!
//! ```
//! use portcullis::{gateway::Gateway, protocol::{McpRequest, McpResponse, Method}};
//! use tower::ServiceExt as _;
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! // Any McpService can be an upstream; this one answers the same to everything.
//! let answer = r#"{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}},"tools":[{"name":"add"}]}"#;
//! let upstream = tower::service_fn(move |_: McpRequest| async move {
//!     Ok::<_, portcullis::BoxError>(McpResponse::raw(answer))
//! });
//! let gateway = Gateway::builder().upstream("math".parse()?, upstream).build();
//! let list = gateway.oneshot(McpRequest::bare(Method::ToolsList)).await?;
//! assert_eq!(list.payload().to_value().unwrap()["tools"][0]["name"], "math_add");
//! # Ok::<_, portcullis::BoxError>(()) }).unwrap();
//! ```

mod capabilities;
mod catalog;
mod links;
mod listen;
mod maintain;
mod router;
mod tasks;
mod uris;
mod vendor;
mod view;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub use catalog::{Catalog, CatalogStore};
pub use maintain::{Status, StatusKind};
use tasks::Tasks;
use view::View;

use crate::{
    BoxMcpService, McpService,
    layers::Directory,
    protocol::{ItemKind, ItemList, Naming, ServerName},
};

/// How long a list waits for upstreams that were just added and have never been seen before. After that, what is
/// known is listed, and the rest is announced when it comes.
const COLD_START: Duration = Duration::from_secs(1);

/// The gateway: an [`McpService`] over many. Clones are the same gateway.
#[derive(Clone)]
pub struct Gateway {
    shared: Arc<Shared>,
}

struct Shared {
    naming: Naming,
    refresh_every: Duration,
    store: Option<Arc<dyn CatalogStore>>,
    /// In priority order. Only changed together with `view`.
    upstreams: Mutex<Vec<Arc<Upstream>>>,
    view: ArcSwap<View>,
    /// Fires after `view` was replaced, or when somebody says that everybody should look again.
    revision: watch::Sender<Revision>,
    tasks: Tasks,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Revision {
    views: u64,
    announcements: u64,
}

/// One upstream as the gateway holds it.
struct Upstream {
    name: ServerName,
    service: BoxMcpService,
    /// The same for requests of clients: when one cannot reach it, the maintaining task is told.
    heard: BoxMcpService,
    catalog: ArcSwap<Catalog>,
    status: watch::Sender<Status>,
    /// Asks the maintaining task to list again.
    refresh: Arc<Notify>,
    added: Instant,
    /// The maintaining task.
    task: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Upstream {
    /// One that nobody maintains yet.
    fn new(name: ServerName, service: BoxMcpService, catalog: Arc<Catalog>) -> Self {
        let status = watch::Sender::new(Status::connecting());
        let refresh: Arc<Notify> = Arc::default();
        Upstream {
            name,
            heard: maintain::heard(service.clone(), status.clone(), refresh.clone()),
            service,
            catalog: ArcSwap::new(catalog),
            status,
            refresh,
            added: Instant::now(),
            task: Mutex::new(None),
        }
    }

    /// Ends the maintaining task, which holds the upstream.
    fn retire(&self) {
        if let Some(task) = self.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

#[cfg(test)]
impl Upstream {
    /// One that nobody maintains.
    fn for_test(name: &str, catalog: Arc<Catalog>) -> Arc<Upstream> {
        let (service, _) = crate::testing::mock();
        Arc::new(Upstream::new(name.parse().unwrap(), service.boxed_mcp(), catalog))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.lock().iter().for_each(|upstream| upstream.retire());
    }
}

/// Makes a [`Gateway`].
#[must_use]
pub struct Builder {
    naming: Naming,
    refresh_every: Duration,
    store: Option<Arc<dyn CatalogStore>>,
    key: Option<[u8; 32]>,
    upstreams: Vec<(ServerName, BoxMcpService)>,
}

impl Builder {
    /// How exposed names are made.
    pub fn naming(mut self, naming: Naming) -> Self {
        self.naming = naming;
        self
    }

    /// How often catalogs are listed again even when nothing says they changed. 5 minutes by default.
    pub fn refresh_every(mut self, interval: Duration) -> Self {
        self.refresh_every = interval;
        self
    }

    /// Where last-known catalogs are kept over a restart.
    pub fn store(mut self, store: Arc<dyn CatalogStore>) -> Self {
        self.store = Some(store);
        self
    }

    /// What ids of tasks are sealed with. With the same key they are good after a restart; without one each gateway
    /// makes its own, and they end with it.
    pub fn key(mut self, key: [u8; 32]) -> Self {
        self.key = Some(key);
        self
    }

    /// An upstream; the first has the highest priority.
    pub fn upstream(mut self, name: ServerName, service: impl McpService) -> Self {
        self.upstreams.push((name, service.boxed_mcp()));
        self
    }

    /// The gateway. It begins to connect at once, so this must be called within a tokio runtime.
    pub fn build(self) -> Gateway {
        let shared = Shared {
            naming: self.naming,
            refresh_every: self.refresh_every,
            store: self.store,
            upstreams: Mutex::new(Vec::new()),
            view: ArcSwap::from_pointee(View::default()),
            revision: watch::Sender::new(Revision::default()),
            tasks: Tasks::new(self.key),
        };
        let gateway = Gateway { shared: Arc::new(shared) };
        for (name, service) in self.upstreams {
            gateway.put(name, service);
        }
        gateway
    }
}

impl Gateway {
    /// A gateway to be filled.
    pub fn builder() -> Builder {
        Builder {
            naming: Naming::default(),
            refresh_every: Duration::from_secs(300),
            store: None,
            key: None,
            upstreams: Vec::new(),
        }
    }

    /// Adds an upstream, or replaces the one of that name in its place; the last-known catalog stays.
    pub fn put(&self, name: ServerName, service: impl McpService) {
        let known = self.shared.store.as_ref().and_then(|store| store.load(&name));
        let mut upstreams = self.shared.lock();
        let place = upstreams.iter().position(|u| u.name == name);
        let catalog = match place {
            Some(i) => upstreams[i].catalog.load_full(),
            None => Arc::new(known.map(|record| Catalog::from_record(&record)).unwrap_or_default()),
        };
        let upstream = Arc::new(Upstream::new(name, service.boxed_mcp(), catalog));
        let task = tokio::spawn(maintain::run(Arc::downgrade(&self.shared), upstream.clone()));
        *upstream.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
        match place {
            Some(i) => std::mem::replace(&mut upstreams[i], upstream).retire(),
            None => upstreams.push(upstream),
        }
        self.shared.publish(&upstreams);
    }

    /// Removes an upstream; its tools are gone from the next list on.
    pub fn remove(&self, name: &ServerName) {
        let mut upstreams = self.shared.lock();
        upstreams.iter().filter(|u| u.name == *name).for_each(|u| u.retire());
        upstreams.retain(|u| u.name != *name);
        self.shared.publish(&upstreams);
    }

    /// Puts the upstreams into this order of priority. Those not named keep theirs, at the end.
    pub fn reorder(&self, order: &[ServerName]) {
        let mut upstreams = self.shared.lock();
        upstreams.sort_by_key(|u| order.iter().position(|name| *name == u.name).unwrap_or(order.len()));
        self.shared.publish(&upstreams);
    }

    /// Says "look again" to everybody who listens: after a change of rules, which only those outside of the gateway know
    /// of. [`AccessLayer`](crate::layers::AccessLayer) passes it on to clients for whom a list is now another one.
    pub fn announce(&self) {
        self.shared.revision.send_modify(|revision| revision.announcements += 1);
    }

    /// Lists an upstream again. Returns when it is done, or with what went wrong.
    pub async fn refresh(&self, name: &ServerName) -> Result<(), String> {
        let Some(upstream) = self.shared.lock().iter().find(|u| u.name == *name).cloned() else {
            return Err(format!("unknown server `{name}`"));
        };
        let mut status = upstream.status.subscribe();
        let before = status.borrow_and_update().tried;
        upstream.refresh.notify_one();
        // Held, it would keep the channel open when the upstream is removed.
        drop(upstream);
        let outcome = status.wait_for(|s| s.tried > before).await;
        match outcome.map(|s| s.kind.clone()) {
            Ok(StatusKind::Down { error }) => Err(error),
            Ok(_) => Ok(()),
            Err(_) => Err(format!("server `{name}` was removed")),
        }
    }

    /// Waits until every upstream was tried once, or `limit` has passed.
    pub async fn settled(&self, limit: Duration) {
        let upstreams = self.shared.lock().clone();
        let all = async {
            for upstream in upstreams {
                let mut status = upstream.status.subscribe();
                // An error says that the upstream was removed: nothing to wait for either.
                let _ = status.wait_for(|s| !matches!(s.kind, StatusKind::Connecting)).await;
            }
        };
        let _ = tokio::time::timeout(limit, all).await;
    }

    /// How each upstream is.
    pub fn status(&self) -> BTreeMap<ServerName, Status> {
        self.shared.lock().iter().map(|u| (u.name.clone(), u.status.borrow().clone())).collect()
    }

    /// The merged list of one kind, unfiltered.
    pub fn list(&self, kind: ItemKind) -> ItemList {
        self.shared.view.load().list(kind).clone()
    }

    /// What names stand for: for [`AccessLayer`](crate::layers::AccessLayer).
    pub fn directory(&self) -> Arc<dyn Directory> {
        Arc::new(self.clone())
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Upstream>>> {
        self.upstreams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a new view out of the catalogs as they are now. Called with `upstreams` locked, so views appear in the
    /// order of the changes.
    fn publish(&self, upstreams: &[Arc<Upstream>]) {
        let view = View::merge(&self.naming, upstreams, &self.view.load());
        self.view.store(Arc::new(view));
        self.revision.send_modify(|revision| revision.views += 1);
    }

    /// Upstreams that nothing is known of yet, and that are too new to be given up.
    fn cold(&self) -> Vec<Arc<Upstream>> {
        let cold = |u: &&Arc<Upstream>| u.added.elapsed() < COLD_START && u.catalog.load().is_unknown();
        self.lock().iter().filter(cold).cloned().collect()
    }

    /// Waits for the cold ones, each until it was tried or its time is over.
    async fn warm_up(&self) {
        for upstream in self.cold() {
            let mut status = upstream.status.subscribe();
            let tried = status.wait_for(|s| !matches!(s.kind, StatusKind::Connecting));
            let _ = tokio::time::timeout_at(upstream.added + COLD_START, tried).await;
        }
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<ServerName> = self.shared.lock().iter().map(|u| u.name.clone()).collect();
        f.debug_struct("Gateway").field("upstreams", &names).finish_non_exhaustive()
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("naming", &self.naming).finish_non_exhaustive()
    }
}
