//! One place for each client session, or for those who share one: where legacy upstreams keep their sessions.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{runtime::Handle, time::Instant};

use crate::identity::{Affinity, AffinityKey, Caller};

/// A place several clients share is given up when nobody used it for this long.
const IDLE: Duration = Duration::from_secs(10 * 60);
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Values by [`AffinityKey`]. One that belongs to a client session is dropped at once when that ends; one that is
/// shared, when it was not used for ten minutes and nobody holds it.
pub(crate) struct Slots<T> {
    shared: Arc<Shared<T>>,
    home: Option<Handle>,
}

struct Shared<T> {
    slots: Mutex<Inner<T>>,
    most: usize,
}

struct Inner<T> {
    slots: HashMap<AffinityKey, Slot<T>>,
    sweeping: bool,
}

struct Slot<T> {
    value: Arc<T>,
    used: Instant,
}

impl<T: Send + Sync + 'static> Slots<T> {
    /// At most this many.
    pub(crate) fn new(most: usize) -> Self {
        let slots = Mutex::new(Inner { slots: HashMap::new(), sweeping: false });
        Slots { shared: Arc::new(Shared { slots, most }), home: Handle::try_current().ok() }
    }

    /// The caller's. `None` when there are too many, and all of them are in use.
    pub(crate) fn get(&self, caller: &Caller, make: impl FnOnce() -> T) -> Option<Arc<T>> {
        let key = AffinityKey::of(caller);
        // Dropped after the lock: what it does on its way out is its own business.
        let mut evicted = None;
        let mut inner = self.shared.lock();
        if let Some(slot) = inner.slots.get_mut(&key) {
            slot.used = Instant::now();
            return Some(slot.value.clone());
        }
        if inner.slots.len() >= self.shared.most {
            let idle = inner.slots.iter().filter(|(key, slot)| slot.is_idle(key));
            let oldest = idle.min_by_key(|(_, slot)| slot.used).map(|(key, _)| key.clone())?;
            evicted = inner.slots.remove(&oldest);
        }
        let value = Arc::new(make());
        inner.slots.insert(key.clone(), Slot { value: value.clone(), used: Instant::now() });
        let sweeping = std::mem::replace(&mut inner.sweeping, true);
        drop(inner);
        drop(evicted);
        if !sweeping {
            self.spawn(sweep(Arc::downgrade(&self.shared)));
        }
        if let Affinity::Session(token) = &caller.affinity {
            let shared = Arc::downgrade(&self.shared);
            token.on_end(move || {
                if let Some(shared) = shared.upgrade() {
                    let ended = shared.lock().slots.remove(&key);
                    drop(ended);
                }
            });
        }
        Some(value)
    }

    /// The caller's, if there is one.
    pub(crate) fn find(&self, caller: &Caller) -> Option<Arc<T>> {
        self.shared.lock().slots.get(&AffinityKey::of(caller)).map(|slot| slot.value.clone())
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.shared.lock().slots.len()
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        match &self.home {
            Some(home) => home.spawn(task),
            None => tokio::spawn(task),
        };
    }
}

impl<T> Slot<T> {
    /// Whether it can go without anybody losing anything but the time to make it again.
    fn is_idle(&self, key: &AffinityKey) -> bool {
        Arc::strong_count(&self.value) == 1 && (matches!(key, AffinityKey::Shared(..)) || !key.is_live())
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sweep<T>(shared: Weak<Shared<T>>) {
    let mut tick = tokio::time::interval(SWEEP_EVERY);
    loop {
        tick.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        let ended: Vec<Slot<T>> = {
            let mut inner = shared.lock();
            inner
                .slots
                .extract_if(|key, slot| slot.is_idle(key) && slot.used.elapsed() >= IDLE)
                .map(|(_, s)| s)
                .collect()
        };
        drop(ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Principal, SessionToken};

    fn named(name: &str) -> Caller {
        Caller { principal: Principal::named(name), ..(*Caller::anonymous()).clone() }
    }

    fn of_session() -> (Caller, Arc<SessionToken>) {
        let token = SessionToken::new();
        (Caller { affinity: Affinity::Session(token.clone()), ..named("a") }, token)
    }

    #[tokio::test]
    async fn a_session_takes_its_slot_along() {
        let slots = Slots::new(10);
        let (caller, token) = of_session();
        assert!(slots.find(&caller).is_none());
        let value = slots.get(&caller, || 1).unwrap();
        assert!(Arc::ptr_eq(&value, &slots.get(&caller, || 2).unwrap()));
        assert!(Arc::ptr_eq(&value, &slots.find(&caller).unwrap()));
        drop((caller, token));
        assert_eq!((slots.len(), Arc::strong_count(&value)), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_shared_one_goes_when_nobody_uses_or_holds_it() {
        let slots = Slots::new(10);
        let held = slots.get(&named("a"), || 1).unwrap();
        slots.get(&named("b"), || 2).unwrap();
        tokio::time::sleep(IDLE + SWEEP_EVERY * 2).await;
        assert_eq!(slots.len(), 1);
        drop(held);
        tokio::time::sleep(SWEEP_EVERY * 2).await;
        assert_eq!(slots.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_longest_unused_makes_room() {
        let slots = Slots::new(2);
        slots.get(&named("a"), || 1).unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
        let held = slots.get(&named("b"), || 2).unwrap();
        let third = slots.get(&named("c"), || 3).unwrap();
        assert_eq!((*third, slots.len()), (3, 2));
        assert!(slots.get(&named("d"), || 4).is_none());
        assert_eq!(*slots.get(&named("b"), || 5).unwrap(), *held);
    }
}
