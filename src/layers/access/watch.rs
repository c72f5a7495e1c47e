//! A subscription, held against the rules as long as it lasts.
//!
//! What comes from within says "look again": a list changed, or the rules did. The client is told only when the list
//! it may see is another one than it was told of last.

use std::{mem, sync::Arc};

use futures_util::{StreamExt as _, stream};

use super::gate::Gate;
use crate::{
    BoxError,
    identity::Caller,
    protocol::{
        Frame, FrameStream, ItemKind, ListenFilter, McpRequest, Method, Notification, Params, is_within,
    },
};

/// One subscription.
pub(super) struct Watch {
    gate: Arc<Gate>,
    caller: Arc<Caller>,
    lists: Vec<Watched>,
    /// The resources whose updates were asked for.
    uris: Vec<String>,
}

/// One notification that was asked for, and the lists it is about, as the client was told of them.
struct Watched {
    method: Method,
    kinds: &'static [ItemKind],
    told: Vec<Option<u64>>,
}

impl Watched {
    /// Whether the client has to be told, as it then is.
    fn has_changed(&mut self, gate: &Gate) -> bool {
        let now = prints(gate, self.kinds);
        now != mem::replace(&mut self.told, now.clone())
    }

    fn is_known(&self) -> bool {
        self.told.iter().any(Option::is_some)
    }
}

fn prints(gate: &Gate, kinds: &[ItemKind]) -> Vec<Option<u64>> {
    kinds.iter().map(|kind| gate.print(*kind)).collect()
}

impl Watch {
    pub(super) fn new(gate: &Arc<Gate>, request: &McpRequest) -> Self {
        let filter = ListenFilter::of(request.params());
        let wanted: [(bool, Method, &'static [ItemKind]); 3] = [
            (filter.tools, Method::ToolsChanged, &[ItemKind::Tools]),
            (filter.prompts, Method::PromptsChanged, &[ItemKind::Prompts]),
            (filter.resources, Method::ResourcesChanged, &[ItemKind::Resources, ItemKind::Templates]),
        ];
        let lists = wanted.into_iter().filter(|(wanted, ..)| *wanted).map(|(_, method, kinds)| Watched {
            method,
            kinds,
            told: prints(gate, kinds),
        });
        Watch {
            gate: gate.clone(),
            caller: request.caller().clone(),
            lists: lists.collect(),
            uris: filter.uris,
        }
    }

    /// The frames that may be seen.
    pub(super) fn over(mut self, frames: FrameStream) -> FrameStream {
        Box::pin(frames.flat_map(move |frame| stream::iter(self.judge(frame))))
    }

    fn judge(&mut self, frame: Result<Frame, BoxError>) -> Vec<Result<Frame, BoxError>> {
        let Ok(Frame::Notification(notification)) = &frame else { return vec![frame] };
        match notification.method {
            Method::Acknowledged => {
                let missed = self.missed();
                std::iter::once(frame).chain(missed.into_iter().map(|n| Ok(Frame::Notification(n)))).collect()
            }
            ref method @ (Method::ToolsChanged | Method::PromptsChanged | Method::ResourcesChanged) => {
                let gate = &self.gate;
                let watched = self.lists.iter_mut().find(|watched| watched.method == *method);
                let told = watched.is_some_and(|w| !w.is_known() || w.has_changed(gate));
                if told { vec![frame] } else { Vec::new() }
            }
            _ if self.may_pass(notification) => vec![frame],
            _ => Vec::new(),
        }
    }

    /// What changed while the subscription was being opened.
    fn missed(&mut self) -> Vec<Notification> {
        let gate = &self.gate;
        let changed = self.lists.iter_mut().filter(|watched| watched.is_known());
        let changed = changed.filter_map(|watched| {
            watched
                .has_changed(gate)
                .then(|| Notification { method: watched.method.clone(), params: Params::default() })
        });
        changed.collect()
    }

    /// Rules of now, whenever the subscription began: who may not read a resource does not hear of it.
    fn may_pass(&self, notification: &Notification) -> bool {
        let params = &notification.params;
        match notification.method {
            Method::ResourceUpdated => {
                self.gate.rules().is_empty()
                    || params.get_string("uri").is_some_and(|uri| self.shows_update(&uri))
            }
            Method::TaskChanged | Method::LegacyTaskChanged => {
                params.get_string("taskId").is_some_and(|id| self.gate.shows_task(&id, &self.caller))
            }
            _ => true,
        }
    }

    /// Both count: what was updated, and the resource it is or is part of, which was subscribed to.
    fn shows_update(&self, uri: &str) -> bool {
        let about = |subscribed: &&String| **subscribed == *uri || is_within(uri, subscribed);
        self.gate.shows_resource(uri)
            && self.uris.iter().filter(about).any(|subscribed| self.gate.shows_resource(subscribed))
    }
}
