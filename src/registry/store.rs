//! The one book of servers, which every pen writes and the gateway reads.
//!
//! Writers are let in one at a time. Each decides on what is there, commits, and publishes the next
//! [`Snapshot`]; so a change that returned is what readers see, and one that failed changed nothing. Readers
//! never wait.

use std::{
    collections::{BTreeMap, HashSet},
    error::Error,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::sync::watch;

use super::{
    backend::{Backend, BackendError, CommitError, Expected, Version, Write},
    record::{CatalogRecord, Origin, ServerRecord},
    snapshot::{Snapshot, Unreadable},
    stored::{self, Placed, StoredCatalog, StoredServer, StoredSetting},
};
use crate::protocol::ServerName;

/// The registry: servers, their last-known catalogs, and small settings, over a [`Backend`].
///
/// Methods that change something wait for the disk: on the async side, call them in `spawn_blocking`.
/// [`snapshot`](Registry::snapshot) never waits.
///
/// ```
/// use std::sync::Arc;
///
/// use portcullis::{
///     registry::{MemoryBackend, Registry, ServerRecord},
///     upstream::UpstreamSpec,
/// };
///
/// let registry = Registry::open(Arc::new(MemoryBackend::new()))?;
/// let changed = registry.changed();
///
/// let spec = UpstreamSpec::http("https://mcp.example.com/mcp");
/// registry.create_server(ServerRecord::new("example".parse()?, spec))?;
///
/// assert_eq!(registry.snapshot().servers[0].name.as_str(), "example");
/// assert!(changed.has_changed()?);
/// # Ok::<(), portcullis::BoxError>(())
/// ```
pub struct Registry {
    backend: Arc<dyn Backend>,
    /// What writers decide on. Held while a writer commits.
    state: Mutex<State>,
    snapshot: ArcSwap<Snapshot>,
    revision: watch::Sender<u64>,
}

/// What happened to one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The revision of the first snapshot that shows it.
    pub revision: u64,
    /// The record that was there.
    pub before: Option<Arc<ServerRecord>>,
    /// The record that is there now. The same as `before`: nothing had to be done.
    pub after: Option<Arc<ServerRecord>>,
}

/// What reading the config file changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileChange {
    /// The revision of the first snapshot that shows it.
    pub revision: u64,
    /// New in the file.
    pub added: Vec<ServerName>,
    /// Changed in the file.
    pub changed: Vec<ServerName>,
    /// No longer in the file.
    pub removed: Vec<ServerName>,
    /// In the file, and added by hand too: the file's counts for as long as it is there.
    pub clashes: Vec<ServerName>,
    /// In the file, but the registry holds a record of that name that cannot be read: it was left as it is, and
    /// the server takes no part.
    pub skipped: Vec<Unreadable>,
}

/// Why the registry did not do it. Nothing changed.
#[derive(Debug)]
#[non_exhaustive]
pub enum RegistryError {
    /// A server of that name is there.
    Exists(ServerName),
    /// No server of that name is there.
    Missing(ServerName),
    /// The list names a server twice.
    Repeated(ServerName),
    /// What is there cannot be read, so it is not overwritten.
    Unreadable(Unreadable),
    /// The record cannot be written as text.
    Unwritable(serde_json::Error),
    /// Others kept changing the record.
    Contended {
        /// Where.
        key: String,
    },
    /// The storage failed.
    Backend(BackendError),
}

type Result<T, E = RegistryError> = std::result::Result<T, E>;

// === impl Registry ===

impl Registry {
    /// Reads what the backend holds.
    ///
    /// # Errors
    ///
    /// When the backend fails. A record that cannot be read is no error: it is in
    /// [`Snapshot::unreadable`], and in the log.
    pub fn open(backend: Arc<dyn Backend>) -> Result<Self> {
        let state = State::load(&*backend)?;
        for unreadable in state.unreadable.values() {
            tracing::warn!(key = unreadable.key, why = unreadable.why, "skipping an unreadable record");
        }
        Ok(Registry {
            backend,
            snapshot: ArcSwap::from_pointee(state.snapshot()),
            revision: watch::Sender::new(state.revision),
            state: Mutex::new(state),
        })
    }

    /// The servers as of now. Never waits.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Tells of every new [`Snapshot`], by its revision. When it does, [`snapshot`](Registry::snapshot) has it.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Reads the backend again, for backends that others write to as well. Gives whether anything was new.
    ///
    /// # Errors
    ///
    /// When the backend fails.
    pub fn refresh(&self) -> Result<bool> {
        let mut state = self.state();
        let before = self.snapshot();
        self.reload(&mut state)?;
        Ok(before.revision != self.snapshot().revision)
    }

    /// Adds a server.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Exists`] when there is one of that name.
    pub fn create_server(&self, record: ServerRecord) -> Result<Change> {
        self.update(|state| match state.servers.contains_key(&record.name) {
            true => Err(RegistryError::Exists(record.name.clone())),
            false => state.put(record.clone()),
        })
    }

    /// Adds a server, or replaces the one of that name. One that is replaced keeps its place; when it is reached
    /// in another way now, its catalog is forgotten.
    ///
    /// # Errors
    ///
    /// When the record cannot be kept.
    pub fn put_server(&self, record: ServerRecord) -> Result<Change> {
        self.update(|state| state.put(record.clone()))
    }

    /// Removes a server and its catalog, and what its name hides too.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Missing`] when there is none.
    pub fn remove_server(&self, name: &ServerName) -> Result<Change> {
        self.update(|state| {
            let before = state.server(name)?.clone();
            let change = Change { revision: 0, before: Some(before), after: None };
            Ok((Plan::of(vec![(name.clone(), None)]), change))
        })
    }

    /// Lets a server take part, or not. For one of the config file this lasts until the file is read again.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Missing`] when there is none.
    pub fn set_enabled(&self, name: &ServerName, enabled: bool) -> Result<Change> {
        self.update(|state| state.put(ServerRecord { enabled, ..(**state.server(name)?).clone() }))
    }

    /// Makes the config file's servers exactly these, in this order, in one commit. Those of other origins stay;
    /// where a name clashes, the file's counts, and the other comes back when the file lets go of the name.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Repeated`] when two have the same name.
    pub fn replace_file_servers(&self, records: Vec<ServerRecord>) -> Result<FileChange> {
        let mut names = HashSet::with_capacity(records.len());
        if let Some(twice) = records.iter().find(|record| !names.insert(&record.name)) {
            return Err(RegistryError::Repeated(twice.name.clone()));
        }
        self.update(|state| Ok(state.replace_file_servers(&records)))
    }

    /// Removes every server of an origin. Gives their names.
    ///
    /// # Errors
    ///
    /// When the backend fails.
    pub fn remove_origin(&self, origin: Origin) -> Result<Vec<ServerName>> {
        let removed: Removed = self.update(|state| {
            let of_origin =
                state.servers.iter().filter(|(_, entry)| entry.stored.top.server.origin == origin);
            let names = Vec::from_iter(of_origin.map(|(name, _)| name.clone()));
            let writes = names.iter().map(|name| (name.clone(), state.let_go(name))).collect();
            Ok((Plan::of(writes), Removed(names)))
        })?;
        Ok(removed.0)
    }

    /// The last-known catalog of a server. One that cannot be read is as good as none: it is logged.
    ///
    /// # Errors
    ///
    /// When the backend fails.
    pub fn catalog(&self, name: &ServerName) -> Result<Option<CatalogRecord>> {
        let key = catalog_key(name);
        let Some(found) = self.backend.get(&key)? else { return Ok(None) };
        match stored::decode(&found.value) {
            Ok(StoredCatalog { catalog }) => Ok(Some(catalog)),
            Err(why) => {
                tracing::warn!(key, why, "skipping an unreadable record");
                Ok(None)
            }
        }
    }

    /// Keeps a catalog. Gives whether it was kept: the server may be gone by now. This is no change of the
    /// servers, so [`changed`](Registry::changed) says nothing.
    ///
    /// # Errors
    ///
    /// When the catalog cannot be kept.
    pub fn put_catalog(&self, name: &ServerName, catalog: &CatalogRecord) -> Result<bool> {
        let key = catalog_key(name);
        let bytes = stored::encode(&StoredCatalog { catalog }).map_err(RegistryError::Unwritable)?;
        // Held, so that no removal comes between the look and the commit.
        let state = self.state();
        if !state.servers.contains_key(name) {
            return Ok(false);
        }
        if self.backend.get(&key)?.is_none_or(|found| found.value != bytes) {
            self.backend.commit(vec![Write::put(key, Expected::Any, bytes)]).map_err(RegistryError::from)?;
        }
        Ok(true)
    }

    /// A setting.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unreadable`] when it is there and cannot be read.
    pub fn setting(&self, name: &str) -> Result<Option<String>> {
        Ok(self.versioned_setting(&setting_key(name))?.map(|(_, value)| value))
    }

    /// Keeps a setting.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unreadable`] when what is there cannot be read.
    pub fn put_setting(&self, name: &str, value: &str) -> Result<()> {
        let key = setting_key(name);
        let bytes = encoded_setting(value)?;
        for _ in 0..ATTEMPTS {
            let expected = match self.versioned_setting(&key)? {
                Some((_, found)) if found == value => return Ok(()),
                Some((version, _)) => Expected::Version(version),
                None => Expected::Absent,
            };
            match self.backend.commit(vec![Write::put(&*key, expected, bytes.clone())]) {
                Err(CommitError::Conflict { .. }) => {}
                other => return other.map(drop).map_err(RegistryError::from),
            }
        }
        Err(RegistryError::Contended { key })
    }

    /// A setting that is made on first use, such as a secret: all callers get the same value.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unreadable`] when it is there and cannot be read.
    pub fn setting_or_make(&self, name: &str, make: impl Fn() -> String) -> Result<String> {
        let key = setting_key(name);
        for _ in 0..ATTEMPTS {
            if let Some((_, value)) = self.versioned_setting(&key)? {
                return Ok(value);
            }
            let value = make();
            let write = Write::put(&*key, Expected::Absent, encoded_setting(&value)?);
            match self.backend.commit(vec![write]) {
                Err(CommitError::Conflict { .. }) => {}
                other => return other.map(|_| value).map_err(RegistryError::from),
            }
        }
        Err(RegistryError::Contended { key })
    }

    fn versioned_setting(&self, key: &str) -> Result<Option<(Version, String)>> {
        let Some(found) = self.backend.get(key)? else { return Ok(None) };
        match stored::decode(&found.value) {
            Ok(StoredSetting { value }) => Ok(Some((found.version, value))),
            Err(why) => Err(RegistryError::Unreadable(Unreadable { key: key.to_owned(), why })),
        }
    }

    /// Decides, commits, publishes. Decides again when somebody else wrote to the backend in between.
    fn update<A: Answer>(&self, decide: impl Fn(&State) -> Result<(Plan, A)>) -> Result<A> {
        let mut state = self.state();
        let mut contended = String::new();
        for _ in 0..ATTEMPTS {
            let (plan, answer) = decide(&state)?;
            if plan.servers.is_empty() {
                return Ok(answer.at(state.revision));
            }
            let writes = state.writes(&plan).map_err(RegistryError::Unwritable)?;
            match self.backend.commit(writes) {
                Ok(versions) => {
                    state.apply(plan, &versions);
                    self.publish(&state);
                    return Ok(answer.at(state.revision));
                }
                Err(CommitError::Conflict { key, .. }) => {
                    self.reload(&mut state)?;
                    contended = key;
                }
                Err(other) => return Err(other.into()),
            }
        }
        Err(RegistryError::Contended { key: contended })
    }

    fn reload(&self, state: &mut State) -> Result<()> {
        let mut found = State::load(&*self.backend)?;
        if found.servers == state.servers && found.unreadable == state.unreadable {
            return Ok(());
        }
        found.revision = found.revision.max(state.revision + 1);
        found.keep_unchanged(state);
        *state = found;
        self.publish(state);
        Ok(())
    }

    /// The snapshot first: who is told of a revision finds it.
    fn publish(&self, state: &State) {
        self.snapshot.store(Arc::new(state.snapshot()));
        self.revision.send_replace(state.revision);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A writer that panicked did so before it changed the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("snapshot", &self.snapshot.load()).finish_non_exhaustive()
    }
}

// === what writers decide on ===

/// The servers in the backend, as last seen.
#[derive(Default)]
struct State {
    revision: u64,
    servers: BTreeMap<ServerName, Entry>,
    /// By key.
    unreadable: BTreeMap<String, Unreadable>,
}

#[derive(Clone, PartialEq, Eq)]
struct Entry {
    version: Version,
    stored: StoredServer,
}

/// What to do: a record to put, or none to have.
struct Plan {
    servers: Vec<(ServerName, Option<StoredServer>)>,
}

impl Plan {
    fn of(servers: Vec<(ServerName, Option<StoredServer>)>) -> Self {
        Plan { servers }
    }
}

impl State {
    fn load(backend: &dyn Backend) -> Result<Self> {
        // Before the scan: what comes in between is then newer than we say, never older.
        let mut state = State { revision: *backend.watch().borrow(), ..State::default() };
        for (key, found) in backend.scan(SERVERS)? {
            match decode_server(&key, &found.value) {
                Ok((name, stored)) => {
                    state.servers.insert(name, Entry { version: found.version, stored });
                }
                Err(why) => {
                    state.unreadable.insert(key.clone(), Unreadable { key, why });
                }
            }
        }
        Ok(state)
    }

    fn snapshot(&self) -> Snapshot {
        let mut placed = Vec::from_iter(self.servers.values().map(|entry| &entry.stored.top));
        placed.sort_by_key(|placed| (rank(placed.server.origin), placed.ordinal, &placed.server.name));
        Snapshot {
            revision: self.revision,
            servers: placed.into_iter().map(|placed| placed.server.clone()).collect(),
            unreadable: self.unreadable.values().cloned().collect(),
        }
    }

    fn server(&self, name: &ServerName) -> Result<&Arc<ServerRecord>> {
        self.check_readable(name)?;
        match self.servers.get(name) {
            Some(entry) => Ok(&entry.stored.top.server),
            None => Err(RegistryError::Missing(name.clone())),
        }
    }

    fn check_readable(&self, name: &ServerName) -> Result<()> {
        match self.unreadable.get(&server_key(name)) {
            Some(unreadable) => Err(RegistryError::Unreadable(unreadable.clone())),
            None => Ok(()),
        }
    }

    fn put(&self, record: ServerRecord) -> Result<(Plan, Change)> {
        self.check_readable(&record.name)?;
        let name = record.name.clone();
        let found = self.servers.get(&name).map(|entry| &entry.stored);
        let before = found.map(|stored| stored.top.server.clone());
        if let (Some(same), true) = (&before, before.as_deref() == Some(&record)) {
            let change = Change { revision: 0, before: before.clone(), after: Some(same.clone()) };
            return Ok((Plan::of(Vec::new()), change));
        }
        let server = Arc::new(record);
        let change = Change { revision: 0, before, after: Some(server.clone()) };
        let stored = match found {
            Some(found) if found.top.server.origin == server.origin => StoredServer {
                top: Placed { ordinal: found.top.ordinal, server },
                beneath: found.beneath.clone(),
            },
            _ => StoredServer { top: Placed { ordinal: self.next_ordinal(), server }, beneath: None },
        };
        Ok((Plan::of(vec![(name, Some(stored))]), change))
    }

    fn replace_file_servers(&self, records: &[ServerRecord]) -> (Plan, FileChange) {
        let mut change = FileChange::default();
        let mut plan = Vec::new();
        let mut named = HashSet::with_capacity(records.len());
        for (ordinal, record) in (0..).zip(records) {
            let name = &record.name;
            named.insert(name);
            if let Some(unreadable) = self.unreadable.get(&server_key(name)) {
                change.skipped.push(unreadable.clone());
                continue;
            }
            let server = Arc::new(ServerRecord { origin: Origin::File, ..record.clone() });
            let found = self.servers.get(name).map(|entry| &entry.stored);
            let beneath = match found {
                Some(found) => match found.top.server.origin {
                    Origin::File => found.beneath.clone(),
                    Origin::Cli => Some(found.top.clone()),
                    // Ends with the process anyway.
                    Origin::Demo => None,
                },
                None => None,
            };
            if beneath.is_some() {
                change.clashes.push(name.clone());
            }
            match found {
                Some(found) if found.top.server == server => {}
                Some(_) => change.changed.push(name.clone()),
                None => change.added.push(name.clone()),
            }
            let stored = StoredServer { top: Placed { ordinal, server }, beneath };
            if found != Some(&stored) {
                plan.push((name.clone(), Some(stored)));
            }
        }
        for (name, entry) in &self.servers {
            if entry.stored.top.server.origin == Origin::File && !named.contains(name) {
                change.removed.push(name.clone());
                plan.push((name.clone(), self.let_go(name)));
            }
        }
        (Plan::of(plan), change)
    }

    /// What is under the name when its present owner lets go of it.
    fn let_go(&self, name: &ServerName) -> Option<StoredServer> {
        let beneath = self.servers.get(name)?.stored.beneath.clone()?;
        Some(StoredServer { top: beneath, beneath: None })
    }

    fn next_ordinal(&self) -> u64 {
        let placed =
            self.servers.values().flat_map(|entry| [Some(&entry.stored.top), entry.stored.beneath.as_ref()]);
        placed.flatten().map(|placed| placed.ordinal).max().map_or(0, |last| last.saturating_add(1))
    }

    /// The plan's writes, one per server in its order, and after them the catalogs that are no longer true.
    fn writes(&self, plan: &Plan) -> Result<Vec<Write>, serde_json::Error> {
        let mut writes = Vec::with_capacity(plan.servers.len());
        let mut catalogs = Vec::new();
        for (name, stored) in &plan.servers {
            let found = self.servers.get(name);
            let expected = found.map_or(Expected::Absent, |entry| Expected::Version(entry.version));
            let value = stored.as_ref().map(stored::encode).transpose()?;
            writes.push(Write { key: server_key(name), expected, value });
            let transport = |stored: &StoredServer| stored.top.server.spec.transport.clone();
            let before = found.map(|entry| transport(&entry.stored));
            if before.is_some() && before != stored.as_ref().map(transport) {
                catalogs.push(Write::delete(catalog_key(name), Expected::Any));
            }
        }
        writes.append(&mut catalogs);
        Ok(writes)
    }

    fn apply(&mut self, plan: Plan, versions: &[Version]) {
        for ((name, stored), version) in plan.servers.into_iter().zip(versions) {
            match stored {
                Some(stored) => self.servers.insert(name, Entry { version: *version, stored }),
                None => self.servers.remove(&name),
            };
        }
        let committed = versions.iter().max().map_or(0, |version| version.0);
        self.revision = committed.max(self.revision + 1);
    }

    /// Takes the `Arc`s of records that are as they were in `before`.
    fn keep_unchanged(&mut self, before: &State) {
        for (name, entry) in &mut self.servers {
            if let Some(known) = before.servers.get(name)
                && known.stored.top.server == entry.stored.top.server
            {
                entry.stored.top.server = known.stored.top.server.clone();
            }
        }
    }
}

/// An answer that says from which revision on it is true.
trait Answer {
    fn at(self, revision: u64) -> Self;
}

impl Answer for Change {
    fn at(self, revision: u64) -> Self {
        Change { revision, ..self }
    }
}

impl Answer for FileChange {
    fn at(self, revision: u64) -> Self {
        FileChange { revision, ..self }
    }
}

struct Removed(Vec<ServerName>);

impl Answer for Removed {
    fn at(self, _: u64) -> Self {
        self
    }
}

// === keys and records ===

const SERVERS: &str = "server/";

fn server_key(name: &ServerName) -> String {
    format!("{SERVERS}{name}")
}

fn catalog_key(name: &ServerName) -> String {
    format!("catalog/{name}")
}

fn setting_key(name: &str) -> String {
    format!("setting/{name}")
}

fn decode_server(key: &str, value: &[u8]) -> Result<(ServerName, StoredServer), String> {
    let stored: StoredServer = stored::decode(value)?;
    let name = stored.top.server.name.clone();
    if server_key(&name) != key {
        return Err(format!("it names another server, `{name}`"));
    }
    Ok((name, stored))
}

fn encoded_setting(value: &str) -> Result<Bytes> {
    stored::encode(&StoredSetting { value: value.to_owned() }).map_err(RegistryError::Unwritable)
}

/// The file is what somebody wrote down and can read again, so it goes first; the demonstration gets in nobody's
/// way.
fn rank(origin: Origin) -> u8 {
    match origin {
        Origin::File => 0,
        Origin::Cli => 1,
        Origin::Demo => 2,
    }
}

/// How often to decide again when others write too. Nobody does in a daemon, which owns its data directory.
const ATTEMPTS: usize = 16;

// === impl Change ===

impl Change {
    /// Whether nothing had to be done.
    pub fn is_unchanged(&self) -> bool {
        self.before == self.after
    }
}

// === impl RegistryError ===

impl fmt::Display for RegistryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegistryError::Exists(name) => write!(f, "server `{name}` exists already"),
            RegistryError::Missing(name) => write!(f, "there is no server `{name}`"),
            RegistryError::Repeated(name) => write!(f, "server `{name}` is named twice"),
            RegistryError::Unreadable(unreadable) => unreadable.fmt(f),
            RegistryError::Unwritable(error) => write!(f, "the record cannot be written: {error}"),
            RegistryError::Contended { key } => {
                write!(f, "`{key}` is being changed by somebody else: try again")
            }
            RegistryError::Backend(error) => error.fmt(f),
        }
    }
}

impl Error for RegistryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            RegistryError::Unwritable(error) => Some(error),
            RegistryError::Backend(error) => error.source(),
            _ => None,
        }
    }
}

impl From<BackendError> for RegistryError {
    fn from(error: BackendError) -> Self {
        RegistryError::Backend(error)
    }
}

impl From<CommitError> for RegistryError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Conflict { key, .. } | CommitError::Repeated { key } => {
                RegistryError::Contended { key }
            }
            CommitError::Backend(error) => RegistryError::Backend(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;
    use crate::{registry::MemoryBackend, upstream::UpstreamSpec};

    fn registry() -> (Registry, Arc<MemoryBackend>) {
        let backend = Arc::new(MemoryBackend::new());
        (Registry::open(backend.clone()).unwrap(), backend)
    }

    fn name(name: &str) -> ServerName {
        name.parse().unwrap()
    }

    fn server(named: &str, url: &str) -> ServerRecord {
        ServerRecord::new(name(named), UpstreamSpec::http(url))
    }

    fn of(origin: Origin, named: &str) -> ServerRecord {
        ServerRecord { origin, ..server(named, "http://x") }
    }

    fn order(registry: &Registry) -> Vec<String> {
        registry.snapshot().servers.iter().map(|server| server.name.to_string()).collect()
    }

    fn names(names: &[ServerName]) -> Vec<&str> {
        names.iter().map(ServerName::as_str).collect()
    }

    fn catalog_with(tool: &str) -> CatalogRecord {
        let tool = RawValue::from_string(format!("{{\"name\":\"{tool}\"}}")).unwrap();
        CatalogRecord { tools: vec![tool], ..CatalogRecord::default() }
    }

    #[test]
    fn a_change_is_in_the_snapshot_when_the_method_returns() {
        let (registry, _) = registry();
        let mut changed = registry.changed();
        let before = registry.snapshot();
        let change = registry.create_server(server("a", "http://x")).unwrap();
        let after = registry.snapshot();
        assert_eq!((before.servers.len(), after.servers.len()), (0, 1));
        assert!(changed.has_changed().unwrap());
        assert_eq!(*changed.borrow_and_update(), after.revision);
        assert_eq!(change.revision, after.revision);
        assert_eq!(change.after.as_deref(), Some(&server("a", "http://x")));
    }

    #[test]
    fn what_is_already_so_is_no_change() {
        let (registry, backend) = registry();
        registry.put_server(server("a", "http://x")).unwrap();
        let before = (registry.snapshot(), *backend.watch().borrow());
        assert!(registry.put_server(server("a", "http://x")).unwrap().is_unchanged());
        assert!(registry.set_enabled(&name("a"), true).unwrap().is_unchanged());
        assert_eq!(registry.replace_file_servers(vec![]).unwrap().removed, []);
        let after = (registry.snapshot(), *backend.watch().borrow());
        assert!(Arc::ptr_eq(&before.0, &after.0));
        assert_eq!(before.1, after.1);
    }

    #[test]
    fn refusals_are_sentences() {
        let (registry, _) = registry();
        registry.create_server(server("a", "http://x")).unwrap();
        let refused = |result: Result<Change>| result.unwrap_err().to_string();
        assert_eq!(refused(registry.create_server(server("a", "http://y"))), "server `a` exists already");
        assert_eq!(refused(registry.remove_server(&name("b"))), "there is no server `b`");
        assert_eq!(refused(registry.set_enabled(&name("b"), true)), "there is no server `b`");
        let twice = registry.replace_file_servers(vec![server("c", "http://x"), server("c", "http://y")]);
        assert_eq!(twice.unwrap_err().to_string(), "server `c` is named twice");
        assert_eq!(order(&registry), ["a"]);
    }

    #[test]
    fn a_replaced_server_keeps_its_place() {
        let (registry, _) = registry();
        for named in ["c", "a", "b"] {
            registry.create_server(server(named, "http://x")).unwrap();
        }
        registry.put_server(server("c", "http://y")).unwrap();
        registry.set_enabled(&name("a"), false).unwrap();
        assert_eq!(order(&registry), ["c", "a", "b"]);
        registry.remove_server(&name("c")).unwrap();
        registry.create_server(server("c", "http://y")).unwrap();
        assert_eq!(order(&registry), ["a", "b", "c"]);
    }

    #[test]
    fn unchanged_servers_are_the_same_arc() {
        let (registry, _) = registry();
        registry.create_server(server("a", "http://x")).unwrap();
        let before = registry.snapshot();
        registry.create_server(server("b", "http://x")).unwrap();
        assert!(Arc::ptr_eq(&before.servers[0], &registry.snapshot().servers[0]));
    }

    #[test]
    fn the_file_owns_its_servers_and_no_others() {
        let (registry, _) = registry();
        registry.create_server(server("cli", "http://x")).unwrap();
        registry.create_server(of(Origin::Demo, "demo")).unwrap();
        let change =
            registry.replace_file_servers(vec![server("b", "http://x"), server("a", "http://x")]).unwrap();
        assert_eq!(names(&change.added), ["b", "a"]);
        assert_eq!(order(&registry), ["b", "a", "cli", "demo"]);

        let change = registry
            .replace_file_servers(vec![
                server("a", "http://y"),
                server("c", "http://x"),
                server("b", "http://x"),
            ])
            .unwrap();
        let FileChange { added, changed, removed, .. } = &change;
        assert_eq!((names(added), names(changed), names(removed)), (vec!["c"], vec!["a"], vec![]));
        assert_eq!(order(&registry), ["a", "c", "b", "cli", "demo"]);
        assert_eq!(change.revision, registry.snapshot().revision);

        let removed = registry.replace_file_servers(vec![]).unwrap().removed;
        assert_eq!(names(&removed), ["a", "b", "c"]);
        assert_eq!(order(&registry), ["cli", "demo"]);
        assert_eq!(names(&registry.remove_origin(Origin::Demo).unwrap()), ["demo"]);
        assert_eq!(order(&registry), ["cli"]);
    }

    #[test]
    fn the_file_wins_a_clash_until_it_lets_go() {
        let (registry, backend) = registry();
        registry.create_server(server("x", "http://by-hand")).unwrap();
        registry.create_server(server("y", "http://by-hand")).unwrap();
        let url = |registry: &Registry| {
            let snapshot = registry.snapshot();
            snapshot.server(&name("x")).unwrap().spec.transport.to_string()
        };
        for _ in 0..2 {
            let change = registry.replace_file_servers(vec![server("x", "http://file")]).unwrap();
            assert_eq!(names(&change.clashes), ["x"]);
            assert_eq!(url(&registry), "http://file");
        }
        let registry = Registry::open(backend).unwrap();
        registry.replace_file_servers(vec![]).unwrap();
        assert_eq!(url(&registry), "http://by-hand");
        assert_eq!(order(&registry), ["x", "y"]);
    }

    #[test]
    fn a_catalog_goes_with_what_it_describes() {
        let (registry, backend) = registry();
        let x = name("x");
        let tools = |registry: &Registry| {
            registry.catalog(&x).unwrap().map(|catalog| catalog.tools[0].get().to_owned())
        };
        assert!(!registry.put_catalog(&x, &catalog_with("t")).unwrap());
        assert_eq!(tools(&registry), None);

        registry.create_server(server("x", "http://x")).unwrap();
        assert!(registry.put_catalog(&x, &catalog_with("t")).unwrap());
        registry.set_enabled(&x, false).unwrap();
        assert_eq!(tools(&registry).unwrap(), r#"{"name":"t"}"#);
        registry.put_server(server("x", "http://elsewhere")).unwrap();
        assert_eq!(tools(&registry), None);

        assert!(registry.put_catalog(&x, &catalog_with("u")).unwrap());
        registry.remove_server(&x).unwrap();
        assert_eq!(backend.scan("").unwrap(), []);
    }

    #[test]
    fn a_catalog_is_no_change_of_the_servers() {
        let (registry, backend) = registry();
        registry.create_server(server("x", "http://x")).unwrap();
        let (snapshot, changed) = (registry.snapshot(), registry.changed());
        registry.put_catalog(&name("x"), &catalog_with("t")).unwrap();
        let revision = *backend.watch().borrow();
        registry.put_catalog(&name("x"), &catalog_with("t")).unwrap();
        assert_eq!(*backend.watch().borrow(), revision, "the same catalog is not written again");
        assert!(Arc::ptr_eq(&snapshot, &registry.snapshot()));
        assert!(!changed.has_changed().unwrap());
    }

    #[test]
    fn settings_are_kept_and_made_once() {
        let (registry, backend) = registry();
        assert_eq!(registry.setting("secret").unwrap(), None);
        assert_eq!(registry.setting_or_make("secret", || "one".to_owned()).unwrap(), "one");
        assert_eq!(registry.setting_or_make("secret", || "two".to_owned()).unwrap(), "one");
        registry.put_setting("secret", "three").unwrap();
        let registry = Registry::open(backend).unwrap();
        assert_eq!(registry.setting("secret").unwrap().as_deref(), Some("three"));
    }

    #[test]
    fn an_unreadable_record_is_reported_and_left_as_it_is() {
        let backend = Arc::new(MemoryBackend::new());
        let newer = r#"{"format":2,"record":{"magic":1}}"#;
        let swapped =
            r#"{"format":1,"record":{"ordinal":0,"server":{"name":"other","transport":"http","url":"u"}}}"#;
        let writes = [("server/new", newer), ("server/odd", "{"), ("server/swap", swapped)];
        let writes = writes.map(|(key, value)| Write::put(key, Expected::Any, value));
        backend.commit(writes.to_vec()).unwrap();
        let before = backend.scan("").unwrap();

        let registry = Registry::open(backend.clone()).unwrap();
        let said = Vec::from_iter(registry.snapshot().unreadable.iter().map(Unreadable::to_string));
        assert_eq!(
            said[0],
            "the record `server/new` cannot be read, and is left as it is: it has format 2, and this release \
             reads format 1"
        );
        assert!(said[1].starts_with("the record `server/odd` cannot be read"), "{said:?}");
        assert!(said[2].ends_with("it names another server, `other`"), "{said:?}");

        let new = name("new");
        let refused = [
            registry.create_server(server("new", "http://x")),
            registry.put_server(server("new", "http://x")),
            registry.remove_server(&new),
            registry.set_enabled(&new, true),
        ];
        for refused in refused {
            assert!(matches!(refused, Err(RegistryError::Unreadable(_))), "{refused:?}");
        }
        let change =
            registry.replace_file_servers(vec![server("new", "http://x"), server("a", "http://x")]).unwrap();
        assert_eq!(change.skipped[0].key, "server/new");
        assert_eq!(order(&registry), ["a"]);
        registry.replace_file_servers(vec![]).unwrap();
        assert_eq!(backend.scan("").unwrap(), before);
    }

    #[test]
    fn two_writers_on_one_backend_lose_nothing() {
        let backend = Arc::new(MemoryBackend::new());
        let [one, two] = [0, 1].map(|_| Registry::open(backend.clone()).unwrap());
        one.create_server(server("a", "http://x")).unwrap();
        two.create_server(server("b", "http://x")).unwrap();
        let late = two.create_server(server("a", "http://y")).unwrap_err();
        assert_eq!(late.to_string(), "server `a` exists already");
        assert!(one.refresh().unwrap());
        assert!(!one.refresh().unwrap());
        assert_eq!(one.snapshot().servers, two.snapshot().servers);
        assert_eq!(order(&one).len(), 2);
    }

    #[test]
    fn concurrent_writers_all_get_in() {
        let (registry, _) = registry();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let registry = &registry;
                scope.spawn(move || {
                    for n in 0..20 {
                        registry.create_server(server(&format!("s{thread}-{n}"), "http://x")).unwrap();
                    }
                });
            }
        });
        assert_eq!(registry.snapshot().servers.len(), 80);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Put(ServerRecord),
        Create(ServerRecord),
        Remove(ServerName),
        Enable(ServerName, bool),
        File(Vec<ServerRecord>),
        RemoveOrigin(Origin),
        Catalog(ServerName, String),
        Setting(String, String),
    }

    impl Op {
        /// Runs it, and tells what came of it.
        fn run(&self, registry: &Registry) -> String {
            match self.clone() {
                Op::Put(record) => format!("{:?}", registry.put_server(record)),
                Op::Create(record) => format!("{:?}", registry.create_server(record)),
                Op::Remove(name) => format!("{:?}", registry.remove_server(&name)),
                Op::Enable(name, on) => format!("{:?}", registry.set_enabled(&name, on)),
                Op::File(records) => format!("{:?}", registry.replace_file_servers(records)),
                Op::RemoveOrigin(origin) => format!("{:?}", registry.remove_origin(origin)),
                Op::Catalog(name, tool) => format!("{:?}", registry.put_catalog(&name, &catalog_with(&tool))),
                Op::Setting(name, value) => format!("{:?}", registry.put_setting(&name, &value)),
            }
        }
    }

    fn any_name() -> impl Strategy<Value = ServerName> {
        "[a-d]".prop_map(|text| name(&text))
    }

    fn any_origin() -> impl Strategy<Value = Origin> {
        prop_oneof![Just(Origin::Cli), Just(Origin::File), Just(Origin::Demo)]
    }

    fn any_server() -> impl Strategy<Value = ServerRecord> {
        (any_name(), "http://[xy]", any_origin(), any::<bool>()).prop_map(|(named, url, origin, enabled)| {
            ServerRecord { origin, enabled, ..server(named.as_str(), &url) }
        })
    }

    fn any_op() -> impl Strategy<Value = Op> {
        prop_oneof![
            any_server().prop_map(Op::Put),
            any_server().prop_map(Op::Create),
            any_name().prop_map(Op::Remove),
            (any_name(), any::<bool>()).prop_map(|(name, on)| Op::Enable(name, on)),
            proptest::collection::vec(any_server(), 0..4).prop_map(Op::File),
            any_origin().prop_map(Op::RemoveOrigin),
            (any_name(), "[tu]").prop_map(|(name, tool)| Op::Catalog(name, tool)),
            ("[st]", "[vw]").prop_map(|(name, value)| Op::Setting(name, value)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[cfg(feature = "redb")]
        #[test]
        fn every_backend_gives_the_same_and_reopening_changes_nothing(
            ops in proptest::collection::vec(any_op(), 0..24),
        ) {
            use crate::registry::RedbBackend;

            let dir = tempfile::tempdir().unwrap();
            let (mut memory, backend) = registry();
            let mut redb = Registry::open(Arc::new(RedbBackend::open(&dir).unwrap())).unwrap();
            for (turn, op) in ops.iter().enumerate() {
                prop_assert_eq!(op.run(&memory), op.run(&redb));
                prop_assert_eq!(memory.snapshot(), redb.snapshot());
                if turn % 5 == 4 {
                    let before = redb.snapshot();
                    drop(redb);
                    redb = Registry::open(Arc::new(RedbBackend::open(&dir).unwrap())).unwrap();
                    prop_assert_eq!(&before.servers, &redb.snapshot().servers);
                    prop_assert!(redb.snapshot().revision >= before.revision);
                    memory = Registry::open(backend.clone()).unwrap();
                }
            }
            for name in ["a", "b", "c", "d"].map(name) {
                let [one, other] = [&memory, &redb].map(|registry| registry.catalog(&name).unwrap());
                prop_assert_eq!(format!("{one:?}"), format!("{other:?}"));
            }
        }
    }
}
