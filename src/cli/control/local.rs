//! The registry itself, when no gateway runs.

use std::{io, path::Path, sync::Arc};

use anyhow::{Result, anyhow};

use super::{
    Desk, Edit, Edited, PATIENCE, RETRY, ServerView, Servers, State,
    desk::{apply, edited_of, explain, unreadable},
};
use crate::{
    app::{App, Settings},
    cli::view,
    layers::AccessRules,
    protocol::{Naming, ServerName},
    registry::{BackendError, MemoryBackend, Origin, RedbBackend, Registry, ServerRecord},
};

/// The registry, opened for one operation.
pub(in crate::cli) struct Local {
    registry: Registry,
}

impl Local {
    pub(super) async fn servers(self) -> Result<Servers> {
        blocking(move || {
            let snapshot = self.registry.snapshot();
            let naming = recall_naming(&self.registry);
            let view = |server: &Arc<ServerRecord>| -> Result<ServerView> {
                let state = if server.enabled { State::NotRunning } else { State::Disabled };
                Ok(view::server(server, state, last_known_tools(&self.registry, server, &naming)?))
            };
            let servers = snapshot.servers.iter().map(view).collect::<Result<_>>()?;
            Ok(Servers { servers, unreadable: unreadable(&snapshot) })
        })
        .await
    }

    pub(super) async fn edit(self, edit: Edit) -> Result<Edited> {
        blocking(move || {
            let before = self.registry.snapshot();
            let outcome = edit.word();
            let change = apply(&self.registry, edit).map_err(|error| explain(error, &before))?;
            Ok(edited_of(outcome, &change))
        })
        .await
    }

    /// What is registered and known, in memory. The registry on disk is let go.
    pub(super) async fn copied(self) -> Result<(Registry, Naming)> {
        blocking(move || {
            let copy = Registry::open(Arc::new(MemoryBackend::new()))?;
            for server in &self.registry.snapshot().servers {
                copy.create_server(ServerRecord { origin: Origin::Cli, ..(**server).clone() })?;
                if let Some(catalog) = self.registry.catalog(&server.name)? {
                    copy.put_catalog(&server.name, &catalog)?;
                }
            }
            Ok((copy, recall_naming(&self.registry)))
        })
        .await
    }

    /// Starts the gateway in this process, without doors, and ends it when the work is done.
    pub(super) async fn at_desk<T>(self, work: impl AsyncFnOnce(&Desk) -> Result<T>) -> Result<T> {
        let naming = recall_naming(&self.registry);
        let app = App::start(self.registry, Settings { naming, ..Settings::default() });
        let outcome = work(&Desk::new(app.clone(), true)).await;
        app.shutdown().await;
        outcome
    }
}

/// The registry in `data_dir`. Waits a moment for a command that has it.
pub(in crate::cli) async fn open_registry(data_dir: &Path) -> Result<Registry> {
    let began = tokio::time::Instant::now();
    loop {
        match try_open(data_dir).await? {
            Some(local) => return Ok(local.registry),
            None if began.elapsed() < PATIENCE => tokio::time::sleep(RETRY).await,
            None => return Err(in_use(data_dir)),
        }
    }
}

/// `None` when somebody else has it.
pub(super) async fn try_open(data_dir: &Path) -> Result<Option<Local>> {
    let dir = data_dir.to_owned();
    blocking(move || {
        let opened = match RedbBackend::open(&dir) {
            // Two commands made the registry at once, and the other was faster: it is there now.
            Err(BackendError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                RedbBackend::open(&dir)
            }
            outcome => outcome,
        };
        let backend = match opened {
            Ok(backend) => backend,
            Err(BackendError::InUse { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let registry = Registry::open(Arc::new(backend))?;
        // A demonstration that was killed could not clean up.
        registry.remove_origin(Origin::Demo)?;
        Ok(Some(Local { registry }))
    })
    .await
}

pub(super) fn in_use(data_dir: &Path) -> anyhow::Error {
    BackendError::InUse { path: data_dir.to_owned() }.into()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(panic) => Err(anyhow!("the registry's work did not end well: {panic}")),
    }
}

/// How many tools clients would see, by what the server last offered.
fn last_known_tools(registry: &Registry, server: &ServerRecord, naming: &Naming) -> Result<Option<usize>> {
    let Some(catalog) = registry.catalog(&server.name)? else { return Ok(None) };
    let mut rules = AccessRules::default();
    let wanted = &server.rules;
    if rules.set_server(server.name.clone(), wanted.allow.as_deref(), &wanted.deny).is_err() {
        // Rules that cannot be read hide everything.
        return Ok(Some(0));
    }
    #[derive(serde::Deserialize)]
    struct Named {
        name: Arc<str>,
    }
    let named = catalog.tools.iter().filter_map(|tool| serde_json::from_str::<Named>(tool.get()).ok());
    let names: Vec<(ServerName, Arc<str>)> = named.map(|tool| (server.name.clone(), tool.name)).collect();
    let exposed = naming.expose(&names);
    let visible =
        names.iter().zip(exposed).filter(|((_, own), exposed)| rules.allows(&server.name, own, exposed));
    Ok(Some(visible.count()))
}

// === naming ===

/// Keeps how the gateway names tools, so that commands name them the same way after it ended.
pub(in crate::cli) fn remember_naming(registry: &Registry, naming: &Naming) -> Result<()> {
    registry.put_setting(NAMING_MODE, &naming.mode.to_string())?;
    registry.put_setting(SEPARATOR, &naming.separator)?;
    Ok(())
}

fn recall_naming(registry: &Registry) -> Naming {
    let mut naming = Naming::default();
    let setting = |name| registry.setting(name).ok().flatten();
    if let Some(mode) = setting(NAMING_MODE).and_then(|mode| mode.parse().ok()) {
        naming.mode = mode;
    }
    if let Some(separator) = setting(SEPARATOR) {
        naming.separator = separator;
    }
    naming
}

const NAMING_MODE: &str = "naming.mode";
const SEPARATOR: &str = "naming.separator";
