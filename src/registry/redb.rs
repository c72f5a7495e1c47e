//! The registry on disk: one file, `registry.redb`, in the data directory.
//!
//! When a commit returns, it is on the disk: neither `kill -9` nor a power cut takes it back. The directory is
//! 0700 and the file 0600, before anything is in them. One process at a time has the file; a second one is told.
//!
//! The file gets its name only when it is whole, so a first start that is cut short leaves nothing that a later
//! one could stumble over.
//!
//! ```
//! use std::sync::Arc;
//!
//! use portcullis::registry::{RedbBackend, Registry};
//!
//! # let home = tempfile::tempdir()?;
//! # let data_dir = home.path().join("portcullis");
//! let registry = Registry::open(Arc::new(RedbBackend::open(&data_dir)?))?;
//! assert!(registry.snapshot().servers.is_empty());
//! # Ok::<(), portcullis::BoxError>(())
//! ```

use std::{
    collections::HashSet,
    fmt,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use redb::{
    Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
    TableError,
};
use tokio::sync::watch;

use super::backend::{Backend, BackendError, CommitError, Version, Versioned, Write};

/// Records in a redb file.
pub struct RedbBackend {
    database: Database,
    path: PathBuf,
    revision: watch::Sender<u64>,
}

// === impl RedbBackend ===

impl RedbBackend {
    /// The registry in `data_dir`; both are made if they are not there, and closed to others if they are open.
    ///
    /// # Errors
    ///
    /// One sentence that names the path: another process has it, it holds something else, or it cannot be used.
    pub fn open(data_dir: impl AsRef<Path>) -> Result<Self, BackendError> {
        let dir = data_dir.as_ref();
        let path = dir.join(FILE);
        make_private_dir(dir)?;
        if !path.try_exists().map_err(at(&path))? {
            create(dir, &path)?;
        }
        let (database, revision) = without_panic(&path, || {
            let database = open_file(dir, &path)?;
            let revision = initialise(&database, &path)?;
            read_through(&database)?;
            Ok((database, revision))
        })?;
        Ok(RedbBackend { database, path, revision: watch::Sender::new(revision) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for RedbBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbBackend")
            .field("path", &self.path)
            .field("revision", &*self.revision.borrow())
            .finish_non_exhaustive()
    }
}

impl Backend for RedbBackend {
    fn get(&self, key: &str) -> Result<Option<Versioned>, BackendError> {
        let records = self.database.begin_read().map_err(storage)?.open_table(RECORDS).map_err(storage)?;
        let found = records.get(key).map_err(storage)?;
        Ok(found.map(|found| versioned(found.value())))
    }

    fn scan(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, BackendError> {
        let records = self.database.begin_read().map_err(storage)?.open_table(RECORDS).map_err(storage)?;
        let mut found = Vec::new();
        for entry in records.range(prefix..).map_err(storage)? {
            let (key, value) = entry.map_err(storage)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            found.push((key.value().to_owned(), versioned(value.value())));
        }
        Ok(found)
    }

    fn commit(&self, writes: Vec<Write>) -> Result<Vec<Version>, CommitError> {
        if writes.is_empty() {
            return Ok(Vec::new());
        }
        let mut transaction = self.database.begin_write().map_err(storage)?;
        transaction.set_durability(Durability::Immediate).map_err(storage)?;
        let revision = {
            let mut records = transaction.open_table(RECORDS).map_err(storage)?;
            check(&records, &writes)?;
            let mut meta = transaction.open_table(META).map_err(storage)?;
            let revision = meta.get(REVISION).map_err(storage)?.map_or(0, |found| found.value()) + 1;
            meta.insert(REVISION, revision).map_err(storage)?;
            for Write { key, value, .. } in &writes {
                match value {
                    Some(value) => records.insert(&**key, (revision, &**value)).map_err(storage)?,
                    None => records.remove(&**key).map_err(storage)?,
                };
            }
            revision
        };
        transaction.commit().map_err(storage)?;
        // Committers may arrive here in another order than they committed.
        self.revision.send_if_modified(|now| {
            let newer = *now < revision;
            *now = revision.max(*now);
            newer
        });
        Ok(vec![Version(revision); writes.len()])
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}

// === transactions ===

/// Before the first write, so that a refused commit has nothing to undo.
fn check(
    records: &impl ReadableTable<&'static str, (u64, &'static [u8])>,
    writes: &[Write],
) -> Result<(), CommitError> {
    let mut named = HashSet::with_capacity(writes.len());
    for Write { key, expected, .. } in writes {
        let found = records.get(&**key).map_err(storage)?.map(|found| Version(found.value().0));
        if !expected.allows(found) {
            return Err(CommitError::Conflict { key: key.clone(), found });
        }
        if !named.insert(key) {
            return Err(CommitError::Repeated { key: key.clone() });
        }
    }
    Ok(())
}

fn versioned((version, value): (u64, &[u8])) -> Versioned {
    Versioned { version: Version(version), value: Bytes::copy_from_slice(value) }
}

/// Makes the tables of a new file, or checks that those of an old one are ours. Gives the revision.
fn initialise(database: &Database, path: &Path) -> Result<u64, BackendError> {
    let transaction = database.begin_read().map_err(storage)?;
    let meta = match transaction.open_table(META) {
        Ok(meta) => meta,
        Err(TableError::TableDoesNotExist(_))
            if transaction.list_tables().map_err(storage)?.next().is_none() =>
        {
            return make_tables(database);
        }
        Err(TableError::Storage(error)) => return Err(storage(error)),
        Err(_) => return Err(BackendError::NotARegistry { path: path.to_owned() }),
    };
    let number =
        |key: &str| Ok::<_, BackendError>(meta.get(key).map_err(storage)?.map(|found| found.value()));
    match number(FORMAT_KEY)? {
        Some(FORMAT) => Ok(number(REVISION)?.unwrap_or(0)),
        Some(_) => Err(BackendError::Newer { path: path.to_owned() }),
        None => Err(BackendError::NotARegistry { path: path.to_owned() }),
    }
}

fn make_tables(database: &Database) -> Result<u64, BackendError> {
    let transaction = database.begin_write().map_err(storage)?;
    transaction.open_table(RECORDS).map_err(storage)?;
    transaction.open_table(META).map_err(storage)?.insert(FORMAT_KEY, FORMAT).map_err(storage)?;
    transaction.commit().map_err(storage)?;
    Ok(0)
}

/// Reads every record once, so that damage shows at the start and not in the middle of the work.
fn read_through(database: &Database) -> Result<(), BackendError> {
    let records = database.begin_read().map_err(storage)?.open_table(RECORDS).map_err(storage)?;
    for entry in records.iter().map_err(storage)? {
        let (key, value) = entry.map_err(storage)?;
        let _ = (key.value(), value.value());
    }
    Ok(())
}

/// redb asserts what a damaged file can break; to its owner a damaged file is an error like any other.
fn without_panic<T>(path: &Path, open: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    panic::catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|_| {
        let source = "its pages contradict each other".into();
        Err(BackendError::Damaged { path: path.to_owned(), source })
    })
}

// === files ===

/// Makes a whole registry beside `path`, then names it so. A leftover of an attempt that was cut short never had
/// a record, and goes.
fn create(dir: &Path, path: &Path) -> Result<(), BackendError> {
    let draft = dir.join(DRAFT);
    let database = match open_file(dir, &draft) {
        Err(BackendError::NotARegistry { .. } | BackendError::Damaged { .. }) => {
            fs::remove_file(&draft).map_err(at(&draft))?;
            open_file(dir, &draft)?
        }
        other => other?,
    };
    initialise(&database, &draft)?;
    drop(database);
    match fs::hard_link(&draft, path) {
        // Another first start was faster: theirs it is.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        // Not every file system has links.
        Err(_) => fs::rename(&draft, path).map_err(at(path))?,
        Ok(()) => {}
    }
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&draft)(error)),
        _ => {}
    }
    // The name must last as long as what it names.
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

fn open_file(dir: &Path, path: &Path) -> Result<Database, BackendError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .open(path)
        .map_err(at(path))?;
    let metadata = file.metadata().map_err(at(path))?;
    if !metadata.is_file() {
        return Err(BackendError::NotARegistry { path: path.to_owned() });
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(FILE_MODE)).map_err(at(path))?;
    }
    redb::Builder::new().set_cache_size(CACHE).create_file(file).map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => BackendError::InUse { path: dir.to_owned() },
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
            BackendError::NotARegistry { path: path.to_owned() }
        }
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
            at(path)(error)
        }
        other => BackendError::Damaged { path: path.to_owned(), source: other.into() },
    })
}

fn make_private_dir(dir: &Path) -> Result<(), BackendError> {
    match DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(at(dir)(io::ErrorKind::NotADirectory.into()));
        }
        other => other.map_err(at(dir))?,
    }
    let mode = fs::metadata(dir).map_err(at(dir))?.permissions().mode();
    // `/tmp` and its like: closing it would take it from everybody else.
    if mode & STICKY != 0 {
        return Err(BackendError::Shared { path: dir.to_owned() });
    }
    if mode & 0o077 != 0 {
        fs::set_permissions(dir, Permissions::from_mode(DIR_MODE)).map_err(at(dir))?;
    }
    Ok(())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> BackendError {
    let path = path.to_owned();
    |source| BackendError::Io { path, source }
}

fn storage(error: impl std::error::Error + Send + Sync + 'static) -> BackendError {
    BackendError::Storage(error.into())
}

const RECORDS: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("records");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT_KEY: &str = "format";
const REVISION: &str = "revision";
/// Grows when an older release could no longer read the file.
const FORMAT: u64 = 1;

const FILE: &str = "registry.redb";
const DRAFT: &str = "registry.redb.new";
const FILE_MODE: u32 = 0o600;
const DIR_MODE: u32 = 0o700;
const STICKY: u32 = 0o1000;

/// Records are small and read at start; the snapshot is the cache.
const CACHE: usize = 2 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::registry::{backend::Expected, contract};

    fn open(dir: &Path) -> RedbBackend {
        RedbBackend::open(dir).unwrap()
    }

    fn refused(dir: &Path) -> String {
        RedbBackend::open(dir).unwrap_err().to_string()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn one_record(dir: &Path) {
        open(dir).commit(vec![Write::put("a", Expected::Any, "1")]).unwrap();
    }

    #[test]
    fn keeps_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = || tempfile::tempdir_in(&dir).unwrap().keep();
        contract::run(|| Arc::new(open(&fresh())));
        let place = fresh();
        contract::run_reopening(|| Arc::new(open(&place)));
    }

    #[test]
    fn is_closed_to_others_from_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/data");
        drop(open(&dir));
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(FILE)), 0o600);
        assert_eq!(mode(dir.parent().unwrap()), 0o700);
        assert!(!dir.join(DRAFT).exists());
    }

    #[test]
    fn closes_what_it_finds_open() {
        let dir = tempfile::tempdir().unwrap();
        one_record(dir.path());
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(dir.path().join(FILE), Permissions::from_mode(0o644)).unwrap();
        let backend = open(dir.path());
        assert_eq!((mode(dir.path()), mode(backend.path())), (0o700, 0o600));
        assert_eq!(backend.get("a").unwrap().unwrap().value, "1");
    }

    #[test]
    fn does_not_take_a_directory_from_everybody() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(
            refused(dir.path()),
            format!(
                "{} is shared by all users of this machine: choose a directory of its own with --data-dir",
                dir.path().display()
            )
        );
        assert_eq!(mode(dir.path()), 0o1777);
    }

    #[test]
    fn tells_a_second_one() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        assert_eq!(
            refused(dir.path()),
            format!(
                "the data directory {} is in use by another portcullis: stop that one, or choose another with \
                 --data-dir",
                dir.path().display()
            )
        );
        drop(first);
        open(dir.path());
    }

    #[test]
    fn leaves_other_files_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        for other in [&b"{}"[..], b"redb", &[0; 4096], &[0x55; 100_000]] {
            fs::write(&path, other).unwrap();
            assert_eq!(
                refused(dir.path()),
                format!("{} is not a registry of portcullis, and is left as it is", path.display())
            );
            assert_eq!(fs::read(&path).unwrap(), other);
        }
    }

    #[test]
    fn leaves_the_database_of_another_program_as_it_is() {
        const THEIRS: TableDefinition<'_, &str, &str> = TableDefinition::new("theirs");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let database = Database::create(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(THEIRS).unwrap().insert("k", "v").unwrap();
        transaction.commit().unwrap();
        drop(database);

        assert_eq!(
            refused(dir.path()),
            format!("{} is not a registry of portcullis, and is left as it is", path.display())
        );
        let database = Database::open(&path).unwrap();
        let theirs = database.begin_read().unwrap().open_table(THEIRS).unwrap();
        assert_eq!(theirs.get("k").unwrap().unwrap().value(), "v");
    }

    #[test]
    fn leaves_a_newer_format_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        one_record(dir.path());
        let path = dir.path().join(FILE);
        let set_format = |format: u64| {
            let database = Database::open(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction.open_table(META).unwrap().insert(FORMAT_KEY, format).unwrap();
            transaction.commit().unwrap();
        };
        set_format(FORMAT + 1);
        assert_eq!(
            refused(dir.path()),
            format!(
                "{} was written by a newer portcullis, and is left as it is: use that release, or choose another \
                 directory with --data-dir",
                path.display()
            )
        );
        set_format(FORMAT);
        assert_eq!(open(dir.path()).get("a").unwrap().unwrap().value, "1");
    }

    #[test]
    fn a_damaged_file_is_an_error_and_no_panic() {
        let dir = tempfile::tempdir().unwrap();
        one_record(dir.path());
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for length in [9, 10, 64, 320, 511, 512, 4096, 8192, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            let sentence = refused(dir.path());
            assert!(sentence.contains(&path.display().to_string()), "{length}: {sentence}");
        }
        fs::write(&path, &whole).unwrap();
        assert_eq!(open(dir.path()).get("a").unwrap().unwrap().value, "1");
    }

    #[test]
    fn opening_a_file_with_flipped_bits_does_not_panic() {
        let dir = tempfile::tempdir().unwrap();
        one_record(dir.path());
        let whole = fs::read(dir.path().join(FILE)).unwrap();
        for at in (0..whole.len()).step_by(61).take(120) {
            let dir = tempfile::tempdir().unwrap();
            let mut flipped = whole.clone();
            flipped[at] ^= 0xa5;
            fs::write(dir.path().join(FILE), &flipped).unwrap();
            // What the flip did not hinder from opening may still hinder redb from closing.
            if let Ok(backend) = RedbBackend::open(dir.path()) {
                std::mem::forget(backend);
            }
        }
    }

    #[test]
    fn a_first_start_that_was_cut_short_is_forgotten() {
        for leftover in [&b""[..], &[0; 100_000], b"redb\x1a\x0a\xa9\x0d\x0a"] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(DRAFT), leftover).unwrap();
            one_record(dir.path());
            assert!(!dir.path().join(DRAFT).exists());
            assert_eq!(open(dir.path()).get("a").unwrap().unwrap().value, "1");
        }
    }

    #[test]
    fn a_path_that_is_no_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        assert_eq!(refused(&path), format!("cannot use {}: not a directory", path.display()));
    }
}
