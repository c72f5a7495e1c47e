//! Who may see and call what.
//!
//! One predicate, [`AccessRules::allows`], decides for lists, for every request that names something, and for what a
//! subscription tells as long as it is open. What it denies does not exist for the caller: lists omit it, a change of it
//! is no change, and asking for it by name gives the answer of a name that was never there.
//!
//! ```
//! use portcullis::layers::AccessRules;
//!
//! let mut rules = AccessRules::default();
//! rules.set_server("files".parse()?, Some(&["read*".into()]), &["*secret*".into()])?;
//! assert!(rules.allows(&"files".parse()?, "read_text", "files_read_text"));
//! assert!(!rules.allows(&"files".parse()?, "read_secret", "files_read_secret"));
//! # Ok::<(), portcullis::BoxError>(())
//! ```

mod gate;
mod layer;
mod rules;
mod watch;

use std::sync::Arc;

pub use layer::{Access, AccessFuture, AccessLayer};
pub(crate) use rules::decoded;
pub use rules::{AccessRules, InvalidGlob};

pub use crate::protocol::Route;
use crate::{
    identity::Caller,
    protocol::{ItemKind, ItemList, Target},
};

/// Finds what a name stands for. The gateway is one.
pub trait Directory: Send + Sync + 'static {
    /// The upstream and the upstream's own name behind a target.
    fn find(&self, target: &Target) -> Option<Route>;

    /// All there is of one kind, unfiltered: what a subscription to its changes is held against. A directory without
    /// lists leaves such subscriptions as they are.
    fn list(&self, _kind: ItemKind) -> Option<ItemList> {
        None
    }

    /// The task that `caller` was given under this id.
    fn task(&self, _id: &str, _caller: &Caller) -> Option<TaskRoute> {
        None
    }
}

/// Where a task is, and what it does. Rules judge a task by that: the result of a denied tool is denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskRoute {
    /// The upstream, and the upstream's own id.
    pub route: Route,
    /// The tool, as the upstream knows it.
    pub tool: Arc<str>,
    /// The tool, as clients knew it when the task began.
    pub exposed: Arc<str>,
}

/// In the extensions of a request that is not about one thing of one upstream: the rules it must not be a way around.
/// Whoever sends it on or merges answers goes by them. Absent when nothing is restricted.
#[derive(Clone, Debug)]
pub struct InForce(pub Arc<AccessRules>);
