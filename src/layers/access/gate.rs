//! The predicate applied: to requests, to lists, and to what subscriptions tell.

use std::{
    hash::{BuildHasher as _, Hash as _, Hasher as _, RandomState},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use arc_swap::ArcSwap;

use super::{AccessRules, Directory, InForce};
use crate::{
    BoxError,
    error::Unknown,
    identity::Caller,
    protocol::{ItemKind, ItemList, McpRequest, Method, Target},
};

/// What all clones of the service share.
pub(super) struct Gate {
    directory: Arc<dyn Directory>,
    rules: Arc<ArcSwap<AccessRules>>,
    filtered: [Mutex<Option<Filtered>>; ItemKind::ALL.len()],
}

/// The last list filtered: as long as list and rules are the same, so is the outcome.
struct Filtered {
    rules: Arc<AccessRules>,
    whole: ItemList,
    visible: ItemList,
    /// Of the visible list, once somebody asked.
    print: Option<u64>,
}

impl Gate {
    pub(super) fn new(directory: Arc<dyn Directory>, rules: Arc<ArcSwap<AccessRules>>) -> Self {
        Gate { directory, rules, filtered: Default::default() }
    }

    /// Lets the request pass, with the route of what it names, or says why not.
    pub(super) fn admit(&self, request: &mut McpRequest) -> Result<(), BoxError> {
        let rules = self.rules.load();
        match request.target().cloned() {
            // Who may not ask for tasks at all is told so further in; an id that leads nowhere gets no route.
            Some(Target::Task(id)) => {
                if let Some(task) = self.directory.task(&id, request.caller())
                    && rules.allows(&task.route.server, &task.tool, &task.exposed)
                {
                    request.extensions_mut().insert(task.route);
                }
            }
            Some(target) => {
                let route = self.directory.find(&target).filter(|r| rules.allows_route(r, target.name()));
                let Some(route) = route else { return Err(Unknown(target).into()) };
                request.extensions_mut().insert(route);
                if *request.method() != Method::DirectoryRead {
                    return Ok(());
                }
            }
            None if *request.method() == Method::Listen => self.narrow(request, &rules),
            None => {}
        }
        if !rules.is_empty() {
            request.extensions_mut().insert(InForce(Arc::clone(&rules)));
        }
        Ok(())
    }

    /// Drops the resources that may not be seen from a subscription: as if they were not there.
    fn narrow(&self, request: &mut McpRequest, rules: &AccessRules) {
        let Some(mut filter) = request.params().get_object("notifications") else { return };
        let Some(Ok(wanted)) = filter.get_as::<Vec<String>>("resourceSubscriptions") else { return };
        let visible: Vec<&String> = wanted.iter().filter(|uri| self.may_read(uri, rules)).collect();
        if visible.len() == wanted.len() {
            return;
        }
        filter.set("resourceSubscriptions", serde_json::to_string(&visible).expect("strings are JSON"));
        let mut params = request.params().clone();
        params.object_mut().set("notifications", filter.as_str());
        request.set_params(params);
    }

    fn may_read(&self, uri: &str, rules: &AccessRules) -> bool {
        let route = self.directory.find(&Target::Resource(uri.into()));
        route.is_some_and(|route| rules.allows_route(&route, uri))
    }

    /// Whether a resource may be read by the rules of now.
    pub(super) fn shows_resource(&self, uri: &str) -> bool {
        self.may_read(uri, &self.rules.load())
    }

    /// Whether a task may be seen by the rules of now.
    pub(super) fn shows_task(&self, id: &str, caller: &Caller) -> bool {
        let rules = self.rules.load();
        // Without rules an id is as good as the one who made it says.
        rules.is_empty()
            || self
                .directory
                .task(id, caller)
                .is_some_and(|task| rules.allows(&task.route.server, &task.tool, &task.exposed))
    }

    /// What of the list may be seen. In the steady state that is a comparison of two pointers.
    pub(super) fn filter(&self, list: ItemList) -> ItemList {
        let rules = self.rules.load_full();
        match rules.is_empty() {
            true => list,
            false => self.filtered(rules, list, |filtered| filtered.visible.clone()),
        }
    }

    /// Tells one visible list from another. `None` when nobody here knows the list. Thousands of subscriptions ask
    /// after each change, and the first one's answer serves all.
    pub(super) fn print(&self, kind: ItemKind) -> Option<u64> {
        // The rules first: a list of later is never held against rules of before.
        let rules = self.rules.load_full();
        let list = self.directory.list(kind)?;
        Some(self.filtered(rules, list, |filtered| {
            let visible = &filtered.visible;
            *filtered.print.get_or_insert_with(|| print_of(visible))
        }))
    }

    fn filtered<T>(
        &self,
        rules: Arc<AccessRules>,
        whole: ItemList,
        read: impl FnOnce(&mut Filtered) -> T,
    ) -> T {
        let slot = &self.filtered[whole.kind() as usize];
        let mut last = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_mut().filter(|l| Arc::ptr_eq(&l.rules, &rules) && l.whole.is_same(&whole))
        {
            return read(last);
        }
        let visible = whole.filter(|item| rules.allows(&item.server, &item.own, &item.exposed));
        read(last.insert(Filtered { rules, whole, visible, print: None }))
    }

    pub(super) fn rules(&self) -> arc_swap::Guard<Arc<AccessRules>> {
        self.rules.load()
    }
}

/// The key is this process's own, so that nobody can write two lists that look the same.
fn print_of(list: &ItemList) -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    let mut hasher = KEY.build_hasher();
    for item in list.items() {
        (&item.exposed, &item.server, &item.raw).hash(&mut hasher);
    }
    hasher.finish()
}
