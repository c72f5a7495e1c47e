//! What is demanded of a [`Backend`], as code that runs.
//!
//! A new backend calls [`run`] in a test, and [`run_reopening`] too when it outlives the process. They panic with
//! a sentence about the first promise that is broken.
//!
//! ```
//! use std::sync::Arc;
//!
//! use portcullis::registry::{MemoryBackend, contract};
//!
//! contract::run(|| Arc::new(MemoryBackend::new()));
//! ```

use std::{sync::Arc, thread};

use bytes::Bytes;

use super::backend::{Backend, CommitError, Expected, Version, Versioned, Write};

/// Holds every promise against backends that `fresh` makes, each empty.
///
/// # Panics
///
/// When a promise is broken.
pub fn run(fresh: impl Fn() -> Arc<dyn Backend>) {
    an_empty_backend_has_nothing(&*fresh());
    what_is_committed_is_there(&*fresh());
    scans_are_in_byte_order_of_the_keys(&*fresh());
    expectations_are_held(&*fresh());
    a_conflict_names_its_key_and_changes_nothing(&*fresh());
    a_key_is_named_once_in_a_commit(&*fresh());
    versions_grow_and_never_come_back(&*fresh());
    empty_and_large_values_are_kept(&*fresh());
    the_watch_grows_with_every_commit(&*fresh());
    concurrent_committers_lose_nothing(&fresh());
}

/// Holds the promises of a lasting backend. `open` opens the same place every time, which is empty at first; what
/// an earlier call made is dropped before the next call.
///
/// # Panics
///
/// When a promise is broken.
pub fn run_reopening(open: impl Fn() -> Arc<dyn Backend>) {
    let backend = open();
    commit(&*backend, vec![put("a", "1"), put("b", ""), put("c", "3")]);
    commit(&*backend, vec![delete("c")]);
    let before = scan(&*backend, "");
    let revision = *backend.watch().borrow();
    drop(backend);

    let backend = open();
    assert_eq!(scan(&*backend, ""), before, "reopening changes no record and no version");
    assert!(*backend.watch().borrow() >= revision, "the revision does not go back when reopening");
    let version = commit(&*backend, vec![put("c", "again")])[0];
    let greatest = before.iter().map(|(_, found)| found.version).max();
    assert!(Some(version) > greatest && version.0 > revision, "versions grow across reopening");
    drop(backend);

    assert_eq!(get(&*open(), "c"), Some(Versioned { version, value: "again".into() }));
}

fn an_empty_backend_has_nothing(backend: &dyn Backend) {
    assert_eq!(get(backend, "a"), None);
    assert_eq!(scan(backend, ""), []);
    assert_eq!(commit(backend, vec![]), []);
}

fn what_is_committed_is_there(backend: &dyn Backend) {
    let versions = commit(backend, vec![put("a", "1"), put("b", "2")]);
    assert_eq!(versions.len(), 2, "a version for each write");
    assert_eq!(get(backend, "a"), Some(Versioned { version: versions[0], value: "1".into() }));
    assert_eq!(get(backend, "b"), Some(Versioned { version: versions[1], value: "2".into() }));

    let again = commit(backend, vec![put("a", "3"), delete("b"), delete("never there")]);
    assert_eq!(again.len(), 3, "a version for each delete");
    assert_eq!(scan(backend, ""), [("a".to_owned(), Versioned { version: again[0], value: "3".into() })]);
    assert_eq!(get(backend, "b"), None);
}

fn scans_are_in_byte_order_of_the_keys(backend: &dyn Backend) {
    let all = ["", "A", "a", "a-b", "a/", "a/1", "a/10", "a/2", "a0", "b", "ä", "日本"];
    commit(backend, all.iter().rev().map(|key| put(key, key)).collect());
    let keys = |prefix: &str| {
        Vec::from_iter(scan(backend, prefix).into_iter().map(|(key, found)| {
            assert_eq!(found.value, key, "a scan gives each key its own value");
            key
        }))
    };
    assert_eq!(keys(""), all);
    assert_eq!(keys("a/"), ["a/", "a/1", "a/10", "a/2"]);
    assert_eq!(keys("a/1"), ["a/1", "a/10"]);
    assert_eq!(keys("日"), ["日本"]);
    assert_eq!(keys("c"), [""; 0]);
}

fn expectations_are_held(backend: &dyn Backend) {
    let absent = |value: &str| Write::put("a", Expected::Absent, value.to_owned());
    let at = |version, value: &str| Write::put("a", Expected::Version(version), value.to_owned());

    let first = commit(backend, vec![absent("1")])[0];
    assert_eq!(conflict(backend, vec![absent("2")]), ("a".to_owned(), Some(first)));
    let second = commit(backend, vec![at(first, "2")])[0];
    assert_eq!(conflict(backend, vec![at(first, "3")]), ("a".to_owned(), Some(second)));
    let stale = Write::delete("a", Expected::Version(first));
    assert_eq!(conflict(backend, vec![stale]), ("a".to_owned(), Some(second)));
    assert_eq!(get(backend, "a").expect("a is there").value, "2");

    commit(backend, vec![Write::delete("a", Expected::Version(second))]);
    assert_eq!(conflict(backend, vec![at(second, "4")]), ("a".to_owned(), None));
    commit(backend, vec![Write::delete("a", Expected::Absent)]);
    commit(backend, vec![absent("5")]);
    assert_eq!(get(backend, "a").expect("a is there again").value, "5");
}

fn a_conflict_names_its_key_and_changes_nothing(backend: &dyn Backend) {
    let found = commit(backend, vec![put("b", "old")])[0];
    let before = scan(backend, "");
    let revision = *backend.watch().borrow();

    let writes = vec![put("a", "new"), Write::put("b", Expected::Absent, "new"), put("c", "new")];
    assert_eq!(conflict(backend, writes), ("b".to_owned(), Some(found)));
    assert_eq!(scan(backend, ""), before, "all or nothing");
    assert_eq!(*backend.watch().borrow(), revision, "what did not happen is not announced");
}

fn a_key_is_named_once_in_a_commit(backend: &dyn Backend) {
    match backend.commit(vec![put("a", "1"), put("b", "1"), put("a", "2")]) {
        Err(CommitError::Repeated { key }) => assert_eq!(key, "a"),
        other => panic!("a repeated key is refused, got {other:?}"),
    }
    assert_eq!(scan(backend, ""), []);
}

fn versions_grow_and_never_come_back(backend: &dyn Backend) {
    let mut last = Version(0);
    for round in 0..10 {
        let writes = match round % 3 {
            2 => vec![delete("a"), put("b", "x")],
            _ => vec![put("a", "same"), put("c", "same")],
        };
        let versions = commit(backend, writes);
        let least = versions.iter().min().expect("a version for each write");
        assert!(*least > last, "{least:?} follows {last:?}");
        last = *versions.iter().max().expect("a version for each write");
    }
}

fn empty_and_large_values_are_kept(backend: &dyn Backend) {
    let large = Bytes::from_iter((0..3_000_000_u32).map(|n| n.to_le_bytes()[1]));
    let long = "k".repeat(400);
    let writes = vec![
        put("empty", ""),
        Write::put("large", Expected::Any, large.clone()),
        Write::put(long.clone(), Expected::Any, Bytes::from_static(b"\0\xff")),
    ];
    commit(backend, writes);
    let value = |key: &str| get(backend, key).expect("it was committed").value;
    assert_eq!(value("empty"), "");
    assert!(value("large") == large, "a large value comes back whole");
    assert_eq!(value(&long), b"\0\xff"[..]);
}

fn the_watch_grows_with_every_commit(backend: &dyn Backend) {
    let mut watch = backend.watch();
    watch.borrow_and_update();
    let seen = || watch.has_changed().expect("the backend is there");
    assert!(!seen());
    commit(backend, vec![]);
    assert!(!seen(), "no writes are no commit");

    for write in [put("a", "1"), put("a", "1"), delete("a")] {
        let before = *watch.borrow_and_update();
        commit(backend, vec![write]);
        assert!(watch.has_changed().expect("the backend is there"));
        assert!(*watch.borrow_and_update() > before, "the revision grows");
    }
    assert_eq!(*backend.watch().borrow(), *watch.borrow(), "a new watcher sees the present revision");
}

fn concurrent_committers_lose_nothing(backend: &Arc<dyn Backend>) {
    const THREADS: usize = 4;
    const ROUNDS: usize = 10;
    commit(&**backend, vec![put("count", "0")]);
    let committers = (0..THREADS).map(|thread| {
        let backend = backend.clone();
        thread::spawn(move || (0..ROUNDS).for_each(|round| count_one(&*backend, thread, round)))
    });
    for committer in Vec::from_iter(committers) {
        committer.join().expect("no committer panics");
    }
    let count = get(&**backend, "count").expect("the count is there").value;
    assert_eq!(count, (THREADS * ROUNDS).to_string(), "every commit happened once");
    assert_eq!(scan(&**backend, "done/").len(), THREADS * ROUNDS, "and happened whole");
}

/// Read, decide, commit; again when somebody was faster.
fn count_one(backend: &dyn Backend, thread: usize, round: usize) {
    loop {
        let found = get(backend, "count").expect("the count is there");
        let count: usize = String::from_utf8_lossy(&found.value).parse().expect("the count is a number");
        let writes = vec![
            Write::put("count", Expected::Version(found.version), (count + 1).to_string()),
            Write::put(format!("done/{thread}/{round}"), Expected::Absent, ""),
        ];
        match backend.commit(writes) {
            Ok(_) => return,
            Err(CommitError::Conflict { key, .. }) => assert_eq!(key, "count"),
            Err(other) => panic!("only conflicts are expected, got {other:?}"),
        }
    }
}

// === words ===

fn put(key: &str, value: &str) -> Write {
    Write::put(key, Expected::Any, value.to_owned())
}

fn delete(key: &str) -> Write {
    Write::delete(key, Expected::Any)
}

fn get(backend: &dyn Backend, key: &str) -> Option<Versioned> {
    backend.get(key).expect("get works")
}

fn scan(backend: &dyn Backend, prefix: &str) -> Vec<(String, Versioned)> {
    backend.scan(prefix).expect("scan works")
}

fn commit(backend: &dyn Backend, writes: Vec<Write>) -> Vec<Version> {
    backend.commit(writes).expect("the commit happens")
}

fn conflict(backend: &dyn Backend, writes: Vec<Write>) -> (String, Option<Version>) {
    match backend.commit(writes) {
        Err(CommitError::Conflict { key, found }) => (key, found),
        other => panic!("a conflict is expected, got {other:?}"),
    }
}
