//! Events of other processes, which say when a GPU has done what was asked of it there.
#![forbid(unsafe_code)]

use std::sync::{Arc, PoisonError, RwLock};

use pegaflow_shm::control::DeviceUuid;

use super::card::{Card, Leftover};
use super::driver::Event;

/// The events that a session has shared of one device, numbered in the order in which they came.
/// More can be added to it; those that are there stay until the last handle is dropped.
#[derive(Debug)]
pub struct DeviceEvents {
    card: Arc<Card>,
    generation: u64,
    events: RwLock<Vec<Event>>,
}

impl DeviceEvents {
    pub(super) fn new(card: Arc<Card>, generation: u64) -> Self {
        Self {
            card,
            generation,
            events: RwLock::default(),
        }
    }

    /// The device on which they are recorded.
    pub fn device(&self) -> DeviceUuid {
        self.card.info().uuid
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.read().is_empty()
    }

    pub(super) fn card(&self) -> &Arc<Card> {
        &self.card
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn get(&self, index: u32) -> Option<Event> {
        self.read().get(index as usize).copied()
    }

    pub(super) fn append(&self, opened: Vec<Event>) {
        let mut events = self.events.write().unwrap_or_else(PoisonError::into_inner);
        events.extend(opened);
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<Event>> {
        self.events.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DeviceEvents {
    fn drop(&mut self) {
        let events = self
            .events
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let events = std::mem::take(events);
        self.card.leave(self.generation, Leftover::Events(events));
    }
}

/// A copy comes after what this event stands for.
#[derive(Debug, Clone)]
pub struct AfterEvent {
    /// The session's events on the copy's device.
    pub events: Arc<DeviceEvents>,
    /// Which of them; smaller than their number.
    pub index: u32,
}
