//! Doubly linked lists whose nodes are entry ids.
//!
//! All lists of a policy share one [`Links`] array, because an id is on at most one list. A link is
//! stored as `id + 1`, so that the all-zero array (which the allocator hands out without touching
//! it) says "on no list".

/// On no list.
const ABSENT: u32 = 0;
/// No neighbour on this side.
const END: u32 = u32::MAX;

const PREV: usize = 0;
const NEXT: usize = 1;

/// The neighbours of every id. `PREV` points towards the front.
pub(super) struct Links {
    links: Vec<[u32; 2]>,
}

impl Links {
    pub(super) fn new(capacity: u32) -> Self {
        assert!(
            capacity <= super::MAX_CAPACITY,
            "a policy orders at most 2^32 - 2 entries"
        );
        Self {
            links: vec![[ABSENT; 2]; capacity as usize],
        }
    }

    /// Whether `id` is on a list.
    pub(super) fn contains(&self, id: u32) -> bool {
        self.links[id as usize][PREV] != ABSENT
    }

    fn at(&mut self, link: u32) -> &mut [u32; 2] {
        &mut self.links[link as usize - 1]
    }
}

/// One list: the front is the newest, the back the oldest.
pub(super) struct List {
    front: u32,
    back: u32,
    len: u32,
}

impl List {
    pub(super) fn new() -> Self {
        Self {
            front: END,
            back: END,
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    /// The oldest id.
    pub(super) fn back(&self) -> Option<u32> {
        (self.back != END).then(|| self.back - 1)
    }

    /// Shows ids from the oldest on, until `visit` answers false.
    pub(super) fn visit_from_back(&self, links: &Links, visit: &mut dyn FnMut(u32) -> bool) {
        let mut link = self.back;
        while link != END && visit(link - 1) {
            link = links.links[link as usize - 1][PREV];
        }
    }

    /// Puts `id`, which must be on no list, at the front.
    pub(super) fn push_front(&mut self, links: &mut Links, id: u32) {
        debug_assert!(!links.contains(id));
        let link = id + 1;
        *links.at(link) = [END, self.front];
        match self.front {
            END => self.back = link,
            front => links.at(front)[PREV] = link,
        }
        self.front = link;
        self.len += 1;
    }

    /// Takes `id`, which must be on this list, off it.
    pub(super) fn unlink(&mut self, links: &mut Links, id: u32) {
        debug_assert!(links.contains(id));
        let [prev, next] = std::mem::replace(links.at(id + 1), [ABSENT; 2]);
        match prev {
            END => self.front = next,
            prev => links.at(prev)[NEXT] = next,
        }
        match next {
            END => self.back = prev,
            next => links.at(next)[PREV] = prev,
        }
        self.len -= 1;
    }

    /// Makes `id`, which must be on this list, the newest.
    pub(super) fn move_to_front(&mut self, links: &mut Links, id: u32) {
        if self.front != id + 1 {
            self.unlink(links, id);
            self.push_front(links, id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(list: &List, links: &mut Links) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut link = list.back;
        while link != END {
            ids.push(link - 1);
            link = links.at(link)[PREV];
        }
        ids
    }

    #[test]
    fn ids_leave_in_the_order_they_came_from_any_position() {
        let mut links = Links::new(5);
        let mut list = List::new();
        for id in 0..5 {
            list.push_front(&mut links, id);
        }
        assert_eq!(order(&list, &mut links), [0, 1, 2, 3, 4]);
        list.unlink(&mut links, 0);
        list.unlink(&mut links, 2);
        list.unlink(&mut links, 4);
        assert_eq!(order(&list, &mut links), [1, 3]);
        list.move_to_front(&mut links, 1);
        list.move_to_front(&mut links, 1);
        assert_eq!(order(&list, &mut links), [3, 1]);
        list.unlink(&mut links, 3);
        list.unlink(&mut links, 1);
        assert_eq!((list.back(), list.len()), (None, 0));
        assert!((0..5).all(|id| !links.contains(id)));
    }
}
