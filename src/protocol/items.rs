//! Lists assembled from many upstreams, filtered without parsing.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};

use super::{Cursor, Method, RawObject, ServerName, extension};

/// What a list is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ItemKind {
    /// Tools.
    Tools,
    /// Prompts.
    Prompts,
    /// Resources.
    Resources,
    /// Resource templates.
    Templates,
    /// Skills, of the extension.
    Skills,
}

impl ItemKind {
    /// All of them.
    pub const ALL: [ItemKind; 5] =
        [Self::Tools, Self::Prompts, Self::Resources, Self::Templates, Self::Skills];

    /// The member of the result that holds the list.
    pub fn member(self) -> &'static str {
        match self {
            ItemKind::Tools => "tools",
            ItemKind::Prompts => "prompts",
            ItemKind::Resources => "resources",
            ItemKind::Templates => "resourceTemplates",
            ItemKind::Skills => "skills",
        }
    }

    /// The member of an item that names it.
    pub fn name_member(self) -> &'static str {
        match self {
            ItemKind::Tools | ItemKind::Prompts => "name",
            ItemKind::Resources | ItemKind::Skills => "uri",
            ItemKind::Templates => "uriTemplate",
        }
    }

    /// The method that lists them.
    pub fn list_method(self) -> Method {
        match self {
            ItemKind::Tools => Method::ToolsList,
            ItemKind::Prompts => Method::PromptsList,
            ItemKind::Resources => Method::ResourcesList,
            ItemKind::Templates => Method::TemplatesList,
            ItemKind::Skills => Method::SkillsList,
        }
    }

    /// What `method` lists.
    pub fn of(method: &Method) -> Option<ItemKind> {
        Self::ALL.into_iter().find(|kind| kind.list_method() == *method)
    }

    /// Whether a server of these capabilities has such.
    pub fn is_offered(self, capabilities: &RawObject) -> bool {
        let has = |object: &RawObject, key| object.get(key).is_some_and(|value| value != "null");
        match self {
            ItemKind::Tools => has(capabilities, "tools"),
            ItemKind::Prompts => has(capabilities, "prompts"),
            ItemKind::Resources | ItemKind::Templates => has(capabilities, "resources"),
            ItemKind::Skills => {
                capabilities.get_object("extensions").is_some_and(|e| has(&e, extension::SKILLS))
            }
        }
    }
}

/// One tool, prompt, resource or template of one upstream.
#[derive(Clone, Debug)]
pub struct Item {
    /// The name, or URI, clients know it by.
    pub exposed: Arc<str>,
    /// The upstream it belongs to.
    pub server: ServerName,
    /// The name, or URI, the upstream knows it by.
    pub own: Arc<str>,
    /// The definition as JSON, with the exposed name.
    pub raw: Bytes,
}

/// An immutable list of items. Clones share everything, the encoded form included, so a list that does not
/// change is encoded once.
///
/// ```
/// use portcullis::protocol::{Item, ItemKind, ItemList};
///
/// let item = |name: &str| Item {
///     exposed: name.into(),
///     server: "files".parse().unwrap(),
///     own: name.into(),
///     raw: format!(r#"{{"name":"{name}"}}"#).into(),
/// };
/// let list = ItemList::new(ItemKind::Tools, vec![item("read"), item("delete")]);
/// let safe = list.filter(|item| &*item.own != "delete");
/// assert_eq!(&safe.items_json()[..], br#"[{"name":"read"}]"#);
/// ```
#[derive(Clone, Debug)]
pub struct ItemList {
    shared: Arc<Shared>,
    next: Option<Cursor>,
}

#[derive(Debug)]
struct Shared {
    kind: ItemKind,
    items: Vec<Item>,
    encoded: OnceLock<Bytes>,
}

impl ItemList {
    /// A list, in the order given.
    pub fn new(kind: ItemKind, items: Vec<Item>) -> Self {
        ItemList { shared: Arc::new(Shared { kind, items, encoded: OnceLock::new() }), next: None }
    }

    /// What it is a list of.
    pub fn kind(&self) -> ItemKind {
        self.shared.kind
    }

    /// The items.
    pub fn items(&self) -> &[Item] {
        &self.shared.items
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.shared.items.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.shared.items.is_empty()
    }

    /// Whether both are the same list in memory: then everything derived from one holds for the other.
    pub fn is_same(&self, other: &ItemList) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared) && self.next == other.next
    }

    /// The items that `keep` wants. The same list when it wants all.
    #[must_use]
    pub fn filter(&self, mut keep: impl FnMut(&Item) -> bool) -> Self {
        let items: Vec<Item> = self.items().iter().filter(|item| keep(item)).cloned().collect();
        if items.len() == self.len() {
            return self.clone();
        }
        ItemList { next: self.next.clone(), ..ItemList::new(self.kind(), items) }
    }

    /// At most `limit` items from `from` on, with the cursor of what follows.
    #[must_use]
    pub fn page(&self, from: usize, limit: usize) -> Self {
        let end = self.len().min(from.saturating_add(limit));
        if from == 0 && end == self.len() {
            return self.clone();
        }
        let items = self.items().get(from..end).unwrap_or_default().to_vec();
        let next = (end < self.len()).then(|| Cursor::after(end, items.last().map_or("", |i| &*i.exposed)));
        ItemList { next, ..ItemList::new(self.kind(), items) }
    }

    /// The cursor of the next page.
    pub fn next_cursor(&self) -> Option<&Cursor> {
        self.next.as_ref()
    }

    /// The JSON array of the items, encoded once.
    pub fn items_json(&self) -> &Bytes {
        self.shared.encoded.get_or_init(|| {
            let size: usize = self.items().iter().map(|item| item.raw.len() + 1).sum();
            let mut out = BytesMut::with_capacity(size + 2);
            out.put_u8(b'[');
            for (i, item) in self.items().iter().enumerate() {
                if i > 0 {
                    out.put_u8(b',');
                }
                out.put_slice(&item.raw);
            }
            out.put_u8(b']');
            out.freeze()
        })
    }

    /// The whole result as JSON, as a modern server answers it.
    pub fn to_json(&self) -> Bytes {
        let (open, close) = self.frame_json(true);
        [open.as_ref(), self.items_json(), close.as_ref()].concat().into()
    }

    /// What stands before and after [`ItemList::items_json`] in the result. Lists depend on who asks, so their
    /// scope is private, and they are never fresh for longer than now: a rule may change at any time.
    pub fn frame_json(&self, modern: bool) -> (Bytes, Bytes) {
        let hints = match modern {
            true => r#""resultType":"complete","ttlMs":0,"cacheScope":"private","#,
            false => "",
        };
        let open = format!(r#"{{{hints}"{}":"#, self.kind().member());
        let close = match &self.next {
            Some(cursor) => format!(r#","nextCursor":"{cursor}"}}"#),
            None => "}".to_owned(),
        };
        (open.into(), close.into())
    }
}
