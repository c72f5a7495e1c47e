//! What one upstream offers, as it said so last.

use bytes::Bytes;
use futures_util::future::try_join_all;
use serde_json::value::RawValue;
use tower::ServiceExt as _;

use crate::{
    BoxError, BoxMcpService,
    error::{Fault, UpstreamError},
    protocol::{ItemKind, McpRequest, Method, Params, Payload, ProtocolVersion, RawObject, ServerName, code},
    registry::CatalogRecord,
};

/// An upstream that lists without end is cut off here.
const MOST_ITEMS: usize = 100_000;

/// Where last-known catalogs are kept. The registry is one.
pub trait CatalogStore: Send + Sync + 'static {
    /// The last-known catalog.
    fn load(&self, server: &ServerName) -> Option<CatalogRecord>;

    /// Keeps a catalog. A failure is the store's to report; the gateway goes on.
    fn save(&self, server: &ServerName, catalog: &CatalogRecord);
}

/// The definitions of one upstream, raw.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Catalog {
    /// The `server/discover` result; `None` when the upstream has never been seen.
    pub discover: Option<RawObject>,
    items: [Vec<Bytes>; ItemKind::ALL.len()],
}

impl Catalog {
    /// The definitions of one kind, as the upstream sent them.
    pub fn items(&self, kind: ItemKind) -> &[Bytes] {
        &self.items[kind as usize]
    }

    /// Whether the upstream has never been seen.
    pub fn is_unknown(&self) -> bool {
        self.discover.is_none()
    }

    /// The capabilities it declared.
    pub fn capabilities(&self) -> Option<RawObject> {
        self.discover.as_ref()?.get_object("capabilities")
    }

    /// The newest revision it speaks.
    pub(super) fn version(&self) -> Option<ProtocolVersion> {
        let versions = self.discover.as_ref()?.get_as::<Vec<String>>("supportedVersions")?.ok()?;
        versions.iter().filter_map(|version| version.parse().ok()).max()
    }

    /// From what the registry kept.
    pub fn from_record(record: &CatalogRecord) -> Self {
        let copy = |items: &[Box<RawValue>]| {
            items.iter().map(|item| Bytes::copy_from_slice(item.get().as_bytes())).collect()
        };
        let discover = record.discover.as_ref().map(|d| Bytes::copy_from_slice(d.get().as_bytes()));
        Catalog {
            discover: discover.and_then(|d| RawObject::parse(d).ok()),
            items: [
                copy(&record.tools),
                copy(&record.prompts),
                copy(&record.resources),
                copy(&record.templates),
                copy(&record.skills),
            ],
        }
    }

    /// For the registry to keep.
    pub fn to_record(&self) -> CatalogRecord {
        let copy = |kind| self.items(kind).iter().filter_map(raw_value).collect();
        CatalogRecord {
            discover: self.discover.as_ref().and_then(|d| raw_value(d.as_bytes())),
            tools: copy(ItemKind::Tools),
            prompts: copy(ItemKind::Prompts),
            resources: copy(ItemKind::Resources),
            templates: copy(ItemKind::Templates),
            skills: copy(ItemKind::Skills),
        }
    }

    /// Asks an upstream for everything.
    pub(super) async fn fetch(server: &ServerName, service: &BoxMcpService) -> Result<Catalog, BoxError> {
        let discover = ask(server, service, McpRequest::bare(Method::Discover)).await?;
        let capabilities = discover.get_object("capabilities").unwrap_or_else(RawObject::empty);
        let lists = ItemKind::ALL.map(|kind| {
            let offered = kind.is_offered(&capabilities);
            async move {
                match offered {
                    false => Ok(Vec::new()),
                    // An extension that fails takes nothing else along.
                    true if kind == ItemKind::Skills => {
                        Ok(list(server, service, kind).await.unwrap_or_else(|error| {
                            tracing::warn!(%server, %error, "cannot list skills");
                            Vec::new()
                        }))
                    }
                    true => list(server, service, kind).await,
                }
            }
        });
        let lists = try_join_all(lists).await?;
        let items = lists.try_into().expect("there is one list for each kind");
        Ok(Catalog { discover: Some(discover), items })
    }
}

/// All pages of one list.
async fn list(server: &ServerName, service: &BoxMcpService, kind: ItemKind) -> Result<Vec<Bytes>, BoxError> {
    let mut items = Vec::new();
    let mut params = Params::default();
    loop {
        let page = match ask(server, service, McpRequest::new(kind.list_method(), params)).await {
            Ok(page) => page,
            // Many servers with resources do not know templates.
            Err(e)
                if e.downcast_ref::<crate::protocol::RpcError>()
                    .is_some_and(|e| e.code() == code::METHOD_NOT_FOUND) =>
            {
                return Ok(items);
            }
            Err(e) => return Err(e),
        };
        let listed = page.get_bytes(kind.member()).unwrap_or_else(|| Bytes::from_static(b"[]"));
        let listed: Vec<&RawValue> = serde_json::from_slice(&listed)
            .map_err(|e| UpstreamError::new(server, Fault::Garbled, format!("`{}`: {e}", kind.member())))?;
        items.extend(listed.iter().map(|item| Bytes::copy_from_slice(item.get().as_bytes())));
        match page.get("nextCursor") {
            None | Some("null") => return Ok(items),
            Some(_) if items.len() >= MOST_ITEMS || listed.is_empty() => {
                tracing::warn!(%server, list = kind.member(), "the upstream lists without end; cut off");
                return Ok(items);
            }
            Some(cursor) => {
                params = Params::default();
                params.object_mut().set("cursor", cursor);
            }
        }
    }
}

/// One question of the gateway's own.
async fn ask(
    server: &ServerName,
    service: &BoxMcpService,
    request: McpRequest,
) -> Result<RawObject, BoxError> {
    let response = service.clone().oneshot(request).await?;
    match response.into_payload().settle().await? {
        Payload::Error(error) => Err(error.into()),
        payload => payload
            .to_object()
            .ok_or_else(|| UpstreamError::new(server, Fault::Garbled, "the result is not an object").into()),
    }
}

fn raw_value(json: &Bytes) -> Option<Box<RawValue>> {
    RawValue::from_string(std::str::from_utf8(json).ok()?.to_owned()).ok()
}
