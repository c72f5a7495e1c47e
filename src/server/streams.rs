//! Messages on their way to a client: bounded while it reads slowly, and remembered for a client that comes back.
//!
//! Whoever has something to say waits while its client is far behind, except for progress: then the newest takes the
//! place of an older one that is still unsent. Results and questions are never given up for room. A session over HTTP
//! also keeps the last of what it sent, so that a stream whose connection broke can be picked up where it was
//! (2025-11-25, transports, resumability). Nothing is allocated before there is a stream.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use futures_core::Stream;
use tokio::{sync::Notify, time::Instant};

use super::message::{self, Chunks};
use crate::protocol::{Method, Notification};

/// Messages of one stream that its client has not read yet. Whoever has more waits.
const UNREAD: usize = 64;
/// How many bytes they may have together. A single one may have more.
const UNREAD_BYTES: usize = 1 << 20;
/// The same for what nobody waits with: more is not taken.
const UNASKED: usize = 256;

/// How much of what was sent is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct Memory {
    events: usize,
    bytes: usize,
    /// For results that nobody has read yet.
    unread_bytes: usize,
    /// How long it is kept.
    pub(in crate::server) time: Duration,
}

impl Memory {
    /// Nothing: when the client is gone, all is over.
    pub(in crate::server) const NONE: Memory =
        Memory { events: 0, bytes: 0, unread_bytes: 0, time: Duration::ZERO };
    /// What a session over HTTP keeps.
    pub(in crate::server) const SESSION: Memory =
        Memory { events: 256, bytes: 256 << 10, unread_bytes: 4 << 20, time: Duration::from_secs(5 * 60) };
}

/// All streams of one session, or the one of a connection. Nobody is woken while the state is locked.
pub(in crate::server) struct Streams {
    memory: Memory,
    state: Mutex<State>,
    /// Told when a writer may find room.
    room: Notify,
}

#[derive(Default)]
struct State {
    /// In every event id, so that an id of another session is none of ours.
    tag: u64,
    /// The number of the last track.
    last: u64,
    /// The number of the last reader.
    readers: u64,
    events: usize,
    bytes: usize,
    tracks: BTreeMap<u64, Track>,
}

/// One stream.
#[derive(Default)]
struct Track {
    events: VecDeque<Event>,
    /// The number of the first of them; the first of all is 1.
    first: u64,
    /// How many of them its reader has taken.
    taken: usize,
    /// The number of the last that was ever given to a reader. A number always means the same event.
    given: u64,
    unread_bytes: usize,
    reader: Option<u64>,
    waker: Option<Waker>,
    /// Somebody waits for room.
    blocked: bool,
    /// Nothing will be added.
    ended: bool,
}

struct Event {
    message: Chunks,
    size: usize,
    at: Instant,
    /// Whose progress it is.
    progress: Option<Bytes>,
}

/// Which event of which stream of which session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct EventId {
    tag: u64,
    track: u64,
    number: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}-{}", self.tag, self.track, self.number)
    }
}

impl EventId {
    /// Only as we write them.
    fn parse(text: &str) -> Option<EventId> {
        let mut parts = text.splitn(3, '-');
        let tag = u64::from_str_radix(parts.next()?, 16).ok()?;
        let (track, number) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let id = EventId { tag, track, number };
        (id.to_string() == text).then_some(id)
    }
}

/// What a reader gets.
pub(in crate::server) struct Sent {
    /// To come back with; `None` when nothing is kept.
    pub(in crate::server) id: Option<EventId>,
    /// `None`: this is only for the id.
    pub(in crate::server) message: Option<Chunks>,
}

/// An event id that leads nowhere: made up, of another session, or of something that is no longer kept.
#[derive(Debug)]
pub(in crate::server) struct Unresumable;

impl Streams {
    pub(in crate::server) fn new(memory: Memory) -> Arc<Self> {
        Arc::new(Streams { memory, state: Mutex::default(), room: Notify::new() })
    }

    /// A new stream, and who reads it. `primed`: the reader first gets an id to come back with.
    pub(in crate::server) fn open(self: &Arc<Self>, primed: bool) -> (Arc<Outlet>, Reader) {
        let mut state = self.lock();
        if state.tag == 0 && self.memory != Memory::NONE {
            state.tag = random();
        }
        state.last += 1;
        let track = state.last;
        state.tracks.insert(track, Track { first: 1, ..Track::default() });
        let outlet = Arc::new(Outlet { streams: self.clone(), track });
        (outlet, self.attach(state, track, primed))
    }

    /// Goes on with a stream behind the event that was received last. Whoever read it before is done.
    pub(in crate::server) fn resume(self: &Arc<Self>, last: &str) -> Result<Reader, Unresumable> {
        let id = EventId::parse(last).ok_or(Unresumable)?;
        let mut state = self.lock();
        if self.memory == Memory::NONE || state.tag == 0 || id.tag != state.tag {
            return Err(Unresumable);
        }
        let track = state.tracks.get_mut(&id.track).ok_or(Unresumable)?;
        // Everything after it must be there, and it must have been sent.
        let taken = id.number.checked_add(1).and_then(|next| next.checked_sub(track.first));
        let taken = taken.and_then(|taken| usize::try_from(taken).ok()).ok_or(Unresumable)?;
        // Of a stream that is over something must be left: a client that got an empty one would come again and again.
        let is_over = track.ended && taken >= track.events.len();
        if id.number > track.given || is_over {
            return Err(Unresumable);
        }
        track.taken = taken;
        track.unread_bytes = track.events.iter().skip(taken).map(|event| event.size).sum();
        let blocked = std::mem::take(&mut track.blocked);
        let reader = self.attach(state, id.track, false);
        if blocked {
            // There may be room now; whoever finds none waits again.
            self.room.notify_waiters();
        }
        Ok(reader)
    }

    fn attach(self: &Arc<Self>, mut state: MutexGuard<'_, State>, track: u64, primed: bool) -> Reader {
        state.readers += 1;
        let number = state.readers;
        let found = state.tracks.get_mut(&track);
        let before = found.and_then(|found| {
            found.reader = Some(number);
            found.waker.take()
        });
        drop(state);
        // The one before finds out.
        before.inspect(Waker::wake_by_ref);
        Reader { streams: self.clone(), track, number, primed }
    }

    /// Forgets what is too old.
    pub(in crate::server) fn expire(&self) {
        let mut state = self.lock();
        if state.tracks.is_empty() {
            return;
        }
        let now = Instant::now();
        let State { tracks, events, bytes, .. } = &mut *state;
        for track in tracks.values_mut() {
            let is_old = |event: &Event| now.duration_since(event.at) >= self.memory.time;
            while track.may_forget(true) && track.events.front().is_some_and(is_old) {
                track.forget_first(events, bytes);
            }
            // The queue has the room of its longest time; an idle session shall not.
            if track.events.is_empty() {
                track.events = VecDeque::new();
            }
        }
        state.tidy();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Never 0, which says that there is none.
fn random() -> u64 {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    u64::from_ne_bytes(bytes) | 1
}

impl State {
    /// Lets go of what is more than is kept: the oldest first, and never what a reader has yet to get.
    fn trim(&mut self, memory: Memory) {
        while self.events > memory.events || self.bytes > memory.bytes {
            let hard = self.events > memory.events || self.bytes > memory.unread_bytes;
            let candidates = self.tracks.values_mut().filter(|track| track.may_forget(hard));
            let Some(oldest) = candidates.min_by_key(|track| track.events.front().map(|event| event.at))
            else {
                break;
            };
            oldest.forget_first(&mut self.events, &mut self.bytes);
        }
        self.tidy();
    }

    fn tidy(&mut self) {
        self.tracks.retain(|_, track| !track.ended || track.reader.is_some() || !track.events.is_empty());
    }
}

impl Track {
    fn unread(&self) -> usize {
        self.events.len() - self.taken
    }

    /// How many of the events here were ever given to a reader.
    fn given_here(&self) -> usize {
        (self.given + 1).saturating_sub(self.first) as usize
    }

    fn is_full(&self, most: usize, size: usize) -> bool {
        let unread = self.unread();
        unread > 0 && (unread >= most || self.unread_bytes + size > UNREAD_BYTES)
    }

    /// `hard`: the last message, which may be the result, is no exception when nobody has read it.
    fn may_forget(&self, hard: bool) -> bool {
        match self.events.len() {
            0 => false,
            _ if self.taken > 0 => true,
            1 => self.reader.is_none() && hard,
            _ => self.reader.is_none(),
        }
    }

    fn has_unsent(&self, message: &Chunks) -> bool {
        let wanted = message::join(&message.0);
        let mut unsent = self.events.iter().skip(self.given_here());
        unsent.any(|event| event.size == wanted.len() && message::join(&event.message.0) == wanted)
    }

    fn forget_first(&mut self, events: &mut usize, bytes: &mut usize) {
        let Some(event) = self.events.pop_front() else { return };
        self.first += 1;
        *events -= 1;
        *bytes -= event.size;
        match self.taken {
            0 => self.unread_bytes -= event.size,
            _ => self.taken -= 1,
        }
    }

    /// Puts newer progress in the place of what is still unsent of the same.
    fn replace(&mut self, event: &mut Option<Event>, bytes: &mut usize) -> bool {
        let Some(token) = event.as_ref().and_then(|event| event.progress.clone()) else { return false };
        let given = self.given_here();
        let unsent = self.events.iter_mut().skip(given).rev();
        let Some(older) = unsent.into_iter().find(|older| older.progress.as_ref() == Some(&token)) else {
            return false;
        };
        let Some(event) = event.take() else { return false };
        self.unread_bytes = self.unread_bytes - older.size + event.size;
        *bytes = *bytes - older.size + event.size;
        *older = event;
        true
    }
}

/// Where the messages of a stream go in. The stream ends when this is dropped.
pub(in crate::server) struct Outlet {
    streams: Arc<Streams>,
    track: u64,
}

impl Outlet {
    /// Takes a message, when there is room for it. `false`: nobody will ever read it. The client may be gone; whoever
    /// speaks need not care.
    pub(in crate::server) async fn send(&self, message: Chunks) -> bool {
        self.deliver(message, None).await
    }

    /// The same for a notification.
    pub(in crate::server) async fn notify(&self, notification: &Notification) -> bool {
        let progress = match notification.method {
            // A copy: what is kept must not hold on to a larger buffer.
            Method::Progress => {
                notification.params.get("progressToken").map(|token| Bytes::copy_from_slice(token.as_bytes()))
            }
            _ => None,
        };
        self.deliver(message::notification(notification), progress).await
    }

    /// Takes a message now or not at all. With `asks`, only when somebody is there to read it.
    pub(in crate::server) fn offer(&self, message: Chunks, asks: bool) -> bool {
        let state = self.streams.lock();
        let Some(track) = state.tracks.get(&self.track).filter(|track| !track.ended) else { return false };
        match track.reader {
            None if asks => return false,
            Some(_) if track.is_full(UNASKED, message.len()) => return false,
            // To a client that is away, saying the same twice says nothing.
            None if track.has_unsent(&message) => return true,
            _ => {}
        }
        self.push(state, self.event(message, None))
    }

    /// Nothing is taken any more. What was taken is still read.
    pub(in crate::server) fn end(&self) {
        let mut state = self.streams.lock();
        let reader = state.tracks.get_mut(&self.track).and_then(|track| {
            track.ended = true;
            track.blocked = false;
            track.waker.take()
        });
        state.tidy();
        drop(state);
        reader.inspect(Waker::wake_by_ref);
        self.streams.room.notify_waiters();
    }

    /// Whether somebody reads.
    pub(in crate::server) fn is_read(&self) -> bool {
        self.streams.lock().tracks.get(&self.track).is_some_and(|track| track.reader.is_some())
    }

    async fn deliver(&self, message: Chunks, progress: Option<Bytes>) -> bool {
        let mut event = Some(self.event(message, progress));
        loop {
            let mut room = std::pin::pin!(self.streams.room.notified());
            room.as_mut().enable();
            {
                let mut state = self.streams.lock();
                let State { tracks, bytes, .. } = &mut *state;
                let Some(track) = tracks.get_mut(&self.track).filter(|track| !track.ended) else {
                    return false;
                };
                let full = track.is_full(UNREAD, event.as_ref().map_or(0, |event| event.size));
                match full {
                    true if track.replace(&mut event, bytes) => return true,
                    true if track.reader.is_some() => track.blocked = true,
                    _ => return event.take().is_some_and(|event| self.push(state, event)),
                }
            }
            room.await;
        }
    }

    fn event(&self, mut message: Chunks, progress: Option<Bytes>) -> Event {
        let size = message.len();
        if self.streams.memory != Memory::NONE {
            // What is kept must not hold on to the larger buffers it was cut from.
            message = Chunks(message.joined().into());
        }
        Event { message, size, at: Instant::now(), progress }
    }

    fn push(&self, mut state: MutexGuard<'_, State>, event: Event) -> bool {
        let memory = self.streams.memory;
        let State { tracks, events, bytes, .. } = &mut *state;
        let Some(track) = tracks.get_mut(&self.track) else { return false };
        if track.reader.is_none() && memory == Memory::NONE {
            return false;
        }
        *events += 1;
        *bytes += event.size;
        track.unread_bytes += event.size;
        track.events.push_back(event);
        let reader = track.waker.take();
        if memory != Memory::NONE {
            state.trim(memory);
        }
        drop(state);
        reader.inspect(Waker::wake_by_ref);
        true
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.end();
    }
}

/// The messages of a stream, for the one client that reads it.
pub(in crate::server) struct Reader {
    streams: Arc<Streams>,
    track: u64,
    number: u64,
    primed: bool,
}

impl Stream for Reader {
    type Item = Sent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Sent>> {
        let streams = self.streams.clone();
        let memory = streams.memory;
        let mut state = streams.lock();
        let State { tracks, tag, events, bytes, .. } = &mut *state;
        let Some(track) = tracks.get_mut(&self.track).filter(|track| track.reader == Some(self.number))
        else {
            return Poll::Ready(None);
        };
        let id = |track: &Track| {
            let number = track.first + track.taken as u64 - 1;
            (memory != Memory::NONE).then_some(EventId { tag: *tag, track: self.track, number })
        };
        if self.primed {
            let id = id(track);
            self.primed = false;
            return Poll::Ready(Some(Sent { id, message: None }));
        }
        let Some(event) = track.events.get_mut(track.taken) else {
            if track.ended {
                return Poll::Ready(None);
            }
            track.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let message = match memory == Memory::NONE {
            true => std::mem::take(&mut event.message),
            false => event.message.clone(),
        };
        track.unread_bytes -= event.size;
        track.taken += 1;
        track.given = track.given.max(track.first + track.taken as u64 - 1);
        let sent = Sent { id: id(track), message: Some(message) };
        if memory == Memory::NONE {
            track.forget_first(events, bytes);
        }
        let room = track.unread() <= UNREAD / 2 && track.unread_bytes <= UNREAD_BYTES / 2;
        let told = track.blocked && room;
        track.blocked &= !told;
        drop(state);
        if told {
            streams.room.notify_waiters();
        }
        Poll::Ready(Some(sent))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.streams.lock();
        let memory = self.streams.memory;
        let Some(track) = state.tracks.get_mut(&self.track).filter(|t| t.reader == Some(self.number)) else {
            return;
        };
        track.reader = None;
        track.waker = None;
        let told = std::mem::take(&mut track.blocked);
        if memory == Memory::NONE {
            if let Some(track) = state.tracks.remove(&self.track) {
                state.events -= track.events.len();
                state.bytes -= track.events.iter().map(|event| event.size).sum::<usize>();
            }
        } else {
            state.trim(memory);
        }
        drop(state);
        if told {
            self.streams.room.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, StreamExt as _};
    use serde_json::json;

    use super::*;
    use crate::protocol::Params;

    fn chunks(text: &str) -> Chunks {
        Chunks(vec![Bytes::copy_from_slice(text.as_bytes())])
    }

    fn progress(token: u64, n: usize) -> Notification {
        let params = Params::from_value(&json!({ "progressToken": token, "progress": n }));
        Notification { method: Method::Progress, params }
    }

    fn text(sent: &Sent) -> String {
        let message = sent.message.as_ref().map(|message| message::join(&message.0).to_vec());
        String::from_utf8(message.unwrap_or_default()).unwrap()
    }

    /// What can be read now: ids and messages.
    fn read(reader: &mut Reader) -> Vec<(String, String)> {
        std::iter::from_fn(|| reader.next().now_or_never().flatten())
            .map(|sent| (sent.id.map(|id| id.to_string()).unwrap_or_default(), text(&sent)))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_picked_up_where_it_was_and_goes_on() {
        let streams = Streams::new(Memory::SESSION);
        let (outlet, mut reader) = streams.open(true);
        let (other, mut elsewhere) = streams.open(false);
        outlet.send(chunks("a")).await;
        outlet.send(chunks("b")).await;
        other.send(chunks("x")).await;
        let seen = read(&mut reader);
        assert_eq!(seen.iter().map(|(_, text)| &**text).collect::<Vec<_>>(), ["", "a", "b"]);
        assert_eq!(read(&mut elsewhere).len(), 1);
        drop(reader);
        outlet.send(chunks("c")).await;
        for (from, expected) in [(0, vec!["a", "b", "c"]), (1, vec!["b", "c"]), (2, vec!["c"])] {
            let mut reader = streams.resume(&seen[from].0).unwrap();
            let texts: Vec<String> = read(&mut reader).into_iter().map(|(_, text)| text).collect();
            assert_eq!(texts, expected);
        }
        // Going back and stopping there takes nothing away from what was given.
        drop(streams.resume(&seen[0].0).unwrap());
        let mut first = streams.resume(&seen[2].0).unwrap();
        let mut second = streams.resume(&seen[2].0).unwrap();
        assert!(first.next().now_or_never().unwrap().is_none(), "one message on one stream");
        outlet.send(chunks("d")).await;
        drop(outlet);
        let rest = read(&mut second);
        assert_eq!(rest.len(), 2);
        assert!(second.next().await.is_none());
        drop(second);
        assert!(streams.resume(&rest[0].0).is_ok(), "the last may have been lost on the way");
        assert!(streams.resume(&rest[1].0).is_err(), "there is nothing left");
    }

    #[tokio::test(start_paused = true)]
    async fn an_id_that_was_not_given_leads_nowhere() {
        let (streams, foreign) = (Streams::new(Memory::SESSION), Streams::new(Memory::SESSION));
        let (outlet, mut reader) = streams.open(true);
        let (_other, mut theirs) = foreign.open(true);
        outlet.send(chunks("a")).await;
        let id = read(&mut reader)[1].0.clone();
        let stranger = read(&mut theirs)[0].0.clone();
        assert!(streams.resume(&stranger).is_err());
        let upper = id.to_uppercase();
        let ahead = format!("{}2", &id[..id.len() - 1]);
        let nowhere = id.replace("-1-", "-9-");
        for bad in ["", "-", "1", "a-b-c", &*ahead, &*nowhere, &format!("{id}\n"), &format!("+{id}"), "0-1-1"]
        {
            assert!(streams.resume(bad).is_err(), "{bad:?}");
        }
        // Only when it has letters does it differ.
        assert!(upper == id || streams.resume(&upper).is_err());
        assert!(streams.resume(&format!("{:016x}-1-{}", u64::MAX, u64::MAX)).is_err());
        assert!(streams.resume(&id).is_ok());
        assert!(Streams::new(Memory::SESSION).resume("0000000000000000-0-0").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_is_bounded_and_what_is_gone_is_said_to_be() {
        let streams = Streams::new(Memory::SESSION);
        let (outlet, mut reader) = streams.open(true);
        let start = read(&mut reader)[0].0.clone();
        drop(reader);
        for n in 0..1000 {
            outlet.send(chunks(&n.to_string())).await;
        }
        assert_eq!(streams.lock().events, 256);
        assert!(streams.resume(&start).is_err());
        // Large ones count by their size.
        for _ in 0..10 {
            outlet.send(chunks(&"x".repeat(100 << 10))).await;
        }
        assert!(streams.lock().bytes <= 256 << 10);
        drop(outlet);
        tokio::time::advance(Memory::SESSION.time).await;
        streams.expire();
        let state = streams.lock();
        assert!(state.tracks.is_empty() && state.events == 0 && state.bytes == 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_result_waits_for_its_client_and_then_goes() {
        let streams = Streams::new(Memory::SESSION);
        let (outlet, mut reader) = streams.open(true);
        let start = read(&mut reader)[0].0.clone();
        drop(reader);
        outlet.send(chunks(&"x".repeat(1 << 19))).await;
        drop(outlet);
        let (second, _reader) = streams.open(false);
        second.send(chunks("y")).await;
        let mut reader = streams.resume(&start).unwrap();
        assert_eq!(read(&mut reader)[0].1.len(), 1 << 19);
        drop(reader);
        assert!(streams.lock().bytes <= 256 << 10, "it was read");
    }

    #[tokio::test(start_paused = true)]
    async fn progress_makes_room_for_newer_progress_and_nothing_else_does() {
        for memory in [Memory::NONE, Memory::SESSION] {
            let streams = Streams::new(memory);
            let (outlet, mut reader) = streams.open(false);
            outlet.send(chunks("question")).await;
            for n in 0..20_000 {
                assert!(outlet.notify(&progress(7, n)).await);
            }
            assert_eq!(streams.lock().events, UNREAD);
            let mut result = Box::pin(outlet.send(chunks("result")));
            assert!((&mut result).now_or_never().is_none(), "it waits");
            let seen = read(&mut reader);
            assert_eq!(seen.len(), UNREAD);
            assert!(seen[0].1 == "question" && seen[UNREAD - 1].1.contains("19999"));
            assert!(result.await);
            assert_eq!(read(&mut reader)[0].1, "result");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_client_that_is_gone() {
        for memory in [Memory::NONE, Memory::SESSION] {
            let streams = Streams::new(memory);
            let (outlet, reader) = streams.open(false);
            for _ in 0..UNREAD {
                outlet.send(chunks("m")).await;
            }
            let mut one_more = Box::pin(outlet.send(chunks("m")));
            assert!((&mut one_more).now_or_never().is_none());
            drop(reader);
            assert_eq!(one_more.await, memory != Memory::NONE);
            assert!(!outlet.is_read() && !outlet.offer(chunks("question"), true));
            assert!(streams.lock().events <= 256);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_number_always_means_the_same_event() {
        let streams = Streams::new(Memory::SESSION);
        let (outlet, mut reader) = streams.open(true);
        let start = read(&mut reader)[0].0.clone();
        for n in 0..UNREAD {
            outlet.notify(&progress(7, n)).await;
        }
        let given = read(&mut reader);
        // Back at the start all is unread again, and there is no room.
        let mut reader = streams.resume(&start).unwrap();
        assert!(outlet.notify(&progress(7, 1000)).now_or_never().is_none());
        assert_eq!(read(&mut reader), given);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_is_away_is_told_once() {
        let streams = Streams::new(Memory::SESSION);
        let (outlet, mut reader) = streams.open(true);
        let start = read(&mut reader)[0].0.clone();
        drop(reader);
        for n in 0..100 {
            outlet.offer(chunks(["tools changed", "prompts changed"][n % 2]), false);
        }
        assert_eq!(read(&mut streams.resume(&start).unwrap()).len(), 2);
        outlet.offer(chunks("tools changed"), false);
        assert_eq!(read(&mut streams.resume(&start).unwrap()).len(), 3, "it changed again since it was told");
    }

    #[tokio::test(start_paused = true)]
    async fn without_memory_nothing_stays() {
        let streams = Streams::new(Memory::NONE);
        let (outlet, mut reader) = streams.open(true);
        outlet.send(chunks("a")).await;
        assert_eq!(read(&mut reader), [(String::new(), String::new()), (String::new(), "a".to_owned())]);
        let state = streams.lock();
        assert_eq!((state.events, state.bytes, state.tag), (0, 0, 0));
    }
}
