//! Who may see and call what.
//!
//! One predicate, [`AccessRules::allows`], decides for lists and for every request that names something. What it
//! denies does not exist for the caller: lists omit it, and asking for it by name gives the answer of a name that
//! was never there.
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

mod layer;
mod rules;

pub use layer::{Access, AccessFuture, AccessLayer};
pub use rules::{AccessRules, InvalidGlob};

pub use crate::protocol::Route;
use crate::protocol::Target;

/// Finds what a name stands for. The gateway is one.
pub trait Directory: Send + Sync + 'static {
    /// The upstream and the upstream's own name behind a target.
    fn find(&self, target: &Target) -> Option<Route>;
}
