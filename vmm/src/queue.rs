//! The event queue: wake-ups that devices have asked for, ordered by (due time, sequence number).

use std::collections::BTreeMap;

use orrery_devices::VirtualNs;
use serde::{Deserialize, Serialize};

/// A device's place in the machine; names it in the queue and in the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceId(pub u16);

/// A wake-up that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Whom to wake.
    pub device: DeviceId,
    /// The device's own name for the event.
    pub token: u32,
    /// When it was to happen.
    pub due: VirtualNs,
}

/// At most one pending event per (device, token).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Saved")]
pub struct EventQueue {
    sequence: u64,
    by_time: BTreeMap<(VirtualNs, u64), (DeviceId, u32)>,
    by_name: BTreeMap<(DeviceId, u32), (VirtualNs, u64)>,
}

/// The stored form, not trusted yet.
#[derive(Deserialize)]
struct Saved {
    sequence: u64,
    by_time: BTreeMap<(VirtualNs, u64), (DeviceId, u32)>,
    by_name: BTreeMap<(DeviceId, u32), (VirtualNs, u64)>,
}

impl TryFrom<Saved> for EventQueue {
    type Error = &'static str;

    fn try_from(saved: Saved) -> Result<EventQueue, &'static str> {
        let Saved { sequence, by_time, by_name } = saved;
        let paired = by_time.iter().all(|(key, name)| by_name.get(name) == Some(key) && key.1 < sequence);
        if !paired || by_time.len() != by_name.len() {
            return Err("the event queue contradicts itself");
        }
        Ok(EventQueue { sequence, by_time, by_name })
    }
}

impl EventQueue {
    /// Asks for an event; replaces an earlier request with the same name.
    pub fn schedule(&mut self, device: DeviceId, token: u32, due: VirtualNs) {
        self.cancel(device, token);
        let key = (due, self.sequence);
        self.sequence += 1;
        self.by_time.insert(key, (device, token));
        self.by_name.insert((device, token), key);
    }

    /// Takes back a request; does nothing if there is none.
    pub fn cancel(&mut self, device: DeviceId, token: u32) {
        if let Some(key) = self.by_name.remove(&(device, token)) {
            self.by_time.remove(&key);
        }
    }

    /// When the first event is due.
    #[inline]
    pub fn next_due(&self) -> Option<VirtualNs> {
        self.by_time.first_key_value().map(|((due, _), _)| *due)
    }

    /// Removes and returns the first event due at `now` or earlier.
    pub fn pop_due(&mut self, now: VirtualNs) -> Option<Event> {
        if self.next_due()? > now {
            return None;
        }
        let ((due, _), (device, token)) = self.by_time.pop_first()?;
        self.by_name.remove(&(device, token));
        Some(Event { device, token, due })
    }

    /// Pending events, first due first.
    pub fn iter(&self) -> impl Iterator<Item = Event> + '_ {
        self.by_time.iter().map(|((due, _), (device, token))| Event { device: *device, token: *token, due: *due })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordered_by_time_then_request() {
        let mut queue = EventQueue::default();
        queue.schedule(DeviceId(1), 0, VirtualNs(20));
        queue.schedule(DeviceId(2), 0, VirtualNs(10));
        queue.schedule(DeviceId(3), 0, VirtualNs(10));
        queue.schedule(DeviceId(2), 1, VirtualNs(5));
        queue.cancel(DeviceId(2), 1);
        assert_eq!(queue.pop_due(VirtualNs(9)), None);
        assert_eq!(queue.pop_due(VirtualNs(30)).unwrap().device, DeviceId(2));
        assert_eq!(queue.pop_due(VirtualNs(30)).unwrap().device, DeviceId(3));
        assert_eq!(queue.pop_due(VirtualNs(30)).unwrap().device, DeviceId(1));
        assert_eq!(queue.pop_due(VirtualNs(30)), None);
    }

    #[test]
    fn the_stored_form_is_checked() {
        let mut queue = EventQueue::default();
        queue.schedule(DeviceId(1), 7, VirtualNs(20));
        let bytes = postcard::to_stdvec(&queue).unwrap();
        assert_eq!(postcard::from_bytes::<EventQueue>(&bytes).unwrap(), queue);
        let lonely = EventQueue { by_name: BTreeMap::new(), ..queue.clone() };
        assert!(postcard::from_bytes::<EventQueue>(&postcard::to_stdvec(&lonely).unwrap()).is_err());
        let future = EventQueue { sequence: 0, ..queue };
        assert!(postcard::from_bytes::<EventQueue>(&postcard::to_stdvec(&future).unwrap()).is_err());
    }

    #[test]
    fn a_new_request_replaces_the_old() {
        let mut queue = EventQueue::default();
        queue.schedule(DeviceId(1), 7, VirtualNs(20));
        queue.schedule(DeviceId(1), 7, VirtualNs(40));
        assert_eq!(queue.iter().count(), 1);
        assert_eq!(queue.next_due(), Some(VirtualNs(40)));
    }
}
