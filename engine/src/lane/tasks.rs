//! Copy tasks: cut to size, handed to the copy threads, and their ends.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pegaflow_shm::node::Counter;

use crate::cache::store::ShardScope;
use crate::cache::withdraw::Withdrawn;
use crate::control::hex;
use crate::copy::{
    BoundLayout, CopyDone, CopyError, CopyTask, CopyThreads, Direction, PageCopy, Signal, Step,
    Steps,
};
use crate::device::AfterEvent;
use crate::lane::api::SessionId;
use crate::lane::machine::Machine;
use crate::lane::run::Lane;
use crate::lane::session::LaneSession;
use crate::pool::PageAddr;
use crate::tier::StoreKey;

/// Bytes of one task: long enough that handing it over costs nothing, short enough that all copy
/// threads get their share of a request and that a cancellation is quick.
pub(super) const TASK_BYTES: u64 = 512 * 1024;

/// Bytes of one task of GPU memory: a device's thread is the only one to work on them, cuts them
/// itself, and does better the more of a request it sees at once. Each end wakes the lane, which
/// costs as much CPU as the copying of a hundred MiB.
const DEVICE_TASK_BYTES: u64 = 1 << 30;

/// Tasks of this many bytes of GPU memory take many times as long as the lane's way to sleep and
/// back, and no processor.
const LONG_DEVICE_BYTES: u64 = 8 << 20;

/// Pages of this size and more take longer to copy than the lane takes to sleep and wake up.
const LONG_PAGE_BYTES: u64 = 256 * 1024;

/// Whose copies a task makes.
#[derive(Clone, Copy, Debug)]
pub(super) struct TaskOwner {
    pub session: SessionId,
    pub registration: u32,
    pub request_id: u64,
    pub kind: TaskKind,
}

/// What a task copies.
#[derive(Clone, Copy, Debug)]
pub(super) enum TaskKind {
    Save(ShardScope),
    /// From this lease.
    Load(u64),
}

/// A task handed out.
pub(super) struct Task {
    owner: TaskOwner,
    /// Save: the block of each page.
    entries: Vec<u32>,
    page_bytes: u64,
    /// Came from the backlog.
    had_turn: bool,
    /// One step of its pages, of which other tasks copy the others.
    is_step: bool,
    /// A GPU is busy with it for long.
    is_long_on_device: bool,
}

/// What holds for all copies of a request.
#[derive(Clone, Copy)]
pub(super) struct TaskOrder<'a> {
    /// Set to stop them early.
    pub cancelled: &'a Arc<AtomicBool>,
    /// They begin only after this.
    pub after: Option<&'a AfterEvent>,
    /// The step of a load that they are.
    pub step: Option<&'a Step>,
}

/// Pages of one task that copies between the pool and this memory.
fn pages_of_task(target: &BoundLayout, host_bytes: u64) -> usize {
    let task_bytes = match target.device() {
        Some(_) => DEVICE_TASK_BYTES,
        None => host_bytes,
    };
    (task_bytes / target.layout().page_bytes().max(1)).max(1) as usize
}

/// Whether a task takes a place with the copy threads of all sessions. Copies of process and GPU
/// memory wait in queues of their own.
fn waits_its_turn(target: &BoundLayout) -> bool {
    !target.has_own_queue()
}

/// Tasks by tag.
#[derive(Default)]
pub(super) struct TaskTable {
    slots: Vec<Option<Task>>,
    free: Vec<usize>,
    /// Tasks of pages so large that copying one takes longer than a sleep and a wake-up.
    long: usize,
    /// Tasks that keep a GPU busy for long.
    long_on_device: usize,
    /// Tasks that somebody's process holds up, as of the last look.
    held_up: usize,
}

impl TaskTable {
    fn put(&mut self, task: Task) -> u64 {
        let position = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.long += usize::from(task.page_bytes >= LONG_PAGE_BYTES);
        self.long_on_device += usize::from(task.is_long_on_device);
        self.slots[position] = Some(task);
        position as u64
    }

    fn take(&mut self, tag: u64) -> Option<Task> {
        let task = self.slots.get_mut(tag as usize)?.take();
        if let Some(task) = &task {
            self.long -= usize::from(task.page_bytes >= LONG_PAGE_BYTES);
            self.long_on_device -= usize::from(task.is_long_on_device);
            self.free.push(tag as usize);
        }
        task
    }

    /// True when copies run that take longer than a sleep and a wake-up. What a process holds up
    /// does not run.
    pub(super) fn runs_long(&self) -> bool {
        self.long > self.held_up
    }

    /// True when a GPU copies for long: its end wakes the lane.
    pub(super) fn runs_long_on_device(&self) -> bool {
        self.long_on_device > self.held_up
    }

    /// Notes how many tasks are held up.
    pub(super) fn note_held_up(&mut self, tasks: usize) {
        self.held_up = tasks;
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// No task is handed out.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<M: Machine> Lane<M> {
    /// Cuts the pages at hand, `self.pages`, into tasks and hands them out; returns how many.
    /// `entries` has an element for each page of a save and none for a load.
    pub(super) fn dispatch(
        &mut self,
        session: &mut LaneSession,
        owner: TaskOwner,
        target: &Arc<BoundLayout>,
        entries: &[u32],
        order: TaskOrder<'_>,
    ) -> u32 {
        let mut pages = std::mem::take(&mut self.pages);
        let page_bytes = target.layout().page_bytes();
        let direction = match owner.kind {
            TaskKind::Save(_) => Direction::Save,
            TaskKind::Load(_) => Direction::Load,
        };
        let per_task = pages_of_task(target, self.task_bytes);
        let count = pages.len();
        let mut tasks = 0;
        for first in (0..count).step_by(per_task) {
            let mut part_pages = self.page_lists.pop().unwrap_or_default();
            if count <= per_task {
                std::mem::swap(&mut pages, &mut part_pages);
            } else {
                part_pages.extend_from_slice(&pages[first..count.min(first + per_task)]);
            }
            let mut part_entries = Vec::new();
            if !entries.is_empty() {
                part_entries = self.entry_lists.pop().unwrap_or_default();
                part_entries.extend_from_slice(&entries[first..first + part_pages.len()]);
            }
            let tag = self.tasks.put(Task {
                owner,
                entries: part_entries,
                page_bytes,
                had_turn: waits_its_turn(target),
                is_step: order.step.is_some(),
                is_long_on_device: target.device().is_some()
                    && part_pages.len() as u64 * page_bytes >= LONG_DEVICE_BYTES,
            });
            self.hand_out(CopyTask {
                session: owner.session,
                direction,
                target: target.clone(),
                pages: part_pages,
                tag,
                cancelled: order.cancelled.clone(),
                after: order.after.cloned(),
                step: order.step.cloned(),
            });
            tasks += 1;
        }
        self.hand_out_backlog();
        self.pages = pages;
        self.pages.clear();
        session.copies += tasks;
        if let Some(registration) = session.registration_mut(owner.registration) {
            registration.copies += tasks;
        }
        tasks
    }

    /// As [`Self::dispatch`] for a load whose signal is raised step by step: `targets` are the
    /// steps, each a stretch of the page.
    pub(super) fn dispatch_steps(
        &mut self,
        session: &mut LaneSession,
        owner: TaskOwner,
        targets: &[Arc<BoundLayout>],
        signal: Signal,
        order: TaskOrder<'_>,
    ) -> u32 {
        let pages = std::mem::take(&mut self.pages);
        let tasks_of = |target: &Arc<BoundLayout>| {
            let per_task = pages_of_task(target, self.task_bytes);
            pages.len().div_ceil(per_task) as u32
        };
        let steps = Steps::new(signal, targets.iter().map(tasks_of));
        let (mut tasks, mut page_offset) = (0, 0);
        for (number, target) in targets.iter().enumerate() {
            let step = Step {
                steps: steps.clone(),
                step: number as u16,
            };
            self.pages.clear();
            self.pages.extend(pages.iter().map(|page| PageCopy {
                pool_offset: page.pool_offset + page_offset,
                ..*page
            }));
            let order = TaskOrder {
                step: Some(&step),
                ..order
            };
            tasks += self.dispatch(session, owner, target, &[], order);
            page_offset += target.layout().page_bytes();
        }
        self.recycle_pages(pages);
        tasks
    }

    fn hand_out(&mut self, task: CopyTask) {
        if waits_its_turn(&task.target) {
            self.backlog.push(task);
        } else if let Err(task) = self.workers.submit(task) {
            tracing::error!(
                session = task.session,
                "copies after the end of the copy threads"
            );
        }
    }

    /// Hands out tasks as far as it is their sessions' turn and the copy threads have room.
    pub(super) fn hand_out_backlog(&mut self) {
        while let Some(task) = self.backlog.pop() {
            if let Err(task) = self.workers.submit(task) {
                self.backlog.give_back(task);
                break;
            }
        }
    }

    /// Handles finished copies; true when there was one.
    pub(super) fn take_done(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.workers.pop_done() {
            any = true;
            self.task_done(done);
        }
        if any {
            self.hand_out_backlog();
            self.settle_drain();
        }
        any
    }

    fn task_done(&mut self, done: CopyDone) {
        let Some(task) = self.tasks.take(done.tag) else {
            tracing::error!(tag = done.tag, "a copy ended that nobody asked for");
            return;
        };
        let owner = task.owner;
        self.ended_long = task.is_long_on_device;
        if task.had_turn {
            self.backlog.ended(owner.session);
        }
        let was_cancelled = matches!(done.result, Err(CopyError::Cancelled));
        if let Err(error @ CopyError::Checksum { offset, .. }) = &done.result {
            self.withdraw(PageAddr::from_offset(*offset), error);
        } else if let (Err(error), false) = (&done.result, was_cancelled) {
            tracing::warn!(session = owner.session, request = owner.request_id, %error, "copy failed");
        }
        self.count_copy_time(done.direction, done.busy_ns);
        let pages = done.pages.len();
        let pages_done = done.pages_done as usize;
        self.with_session(owner.session, |lane, session| {
            session.copies -= 1;
            if let Some(registration) = session.registration_mut(owner.registration) {
                registration.copies -= 1;
            }
            let outcome = match owner.kind {
                TaskKind::Save(scope) => lane.save_copied(
                    session,
                    owner.request_id,
                    &scope,
                    (&task.entries, &done.pages),
                    (pages_done, was_cancelled),
                ),
                TaskKind::Load(lease) => lane.load_copied(
                    session,
                    owner.request_id,
                    lease,
                    (pages_done, pages, was_cancelled),
                    (task.page_bytes, task.is_step),
                ),
            };
            lane.recycle(task.entries);
            outcome
        });
        self.recycle_pages(done.pages);
    }

    /// A page's bytes are not what was saved: its block is never served again.
    fn withdraw(&mut self, page: PageAddr, error: &CopyError) {
        self.tally.add(Counter::ChecksumMismatches, 1);
        match self.cache.withdraw(page) {
            Some(block) => self.tell_withdrawn(&block, page, error),
            None => tracing::debug!(offset = page.offset(), %error, "withdrawn before"),
        }
    }

    fn tell_withdrawn(&mut self, block: &Withdrawn, page: PageAddr, error: &CopyError) {
        let scope = self.cache.tier_scope(block.namespace);
        if let (Some(tier), Some(scope)) = (self.tier.as_mut(), scope) {
            // Nobody knows whether it was written before or after the page changed.
            tier.store.remove(&StoreKey {
                scope,
                group: block.group,
                hash: block.hash,
            });
        }
        tracing::warn!(
                namespace = block.namespace,
                group = block.group,
                hash = %hex(&block.hash),
                offset = page.offset(),
                %error,
                "a block is withdrawn: a page of it has changed since it was saved"
        );
    }

    /// Keeps a page list's memory for the next task.
    pub(super) fn recycle_pages(&mut self, mut pages: Vec<PageCopy>) {
        const KEEP: usize = 256;
        /// Longer than a host task's: of these, only a few.
        const LONG: usize = (TASK_BYTES / 512) as usize;
        const KEEP_LONG: usize = 16;
        let keep = if pages.capacity() > LONG {
            KEEP_LONG
        } else {
            KEEP
        };
        if self.page_lists.len() < keep {
            pages.clear();
            self.page_lists.push(pages);
        }
    }

    /// Counts what a copy cost, for the CPU figures.
    fn count_copy_time(&mut self, direction: Direction, nanos: u64) {
        let counter = match direction {
            Direction::Save => Counter::CopySaveNanos,
            Direction::Load => Counter::CopyLoadNanos,
        };
        self.tally.add(counter, nanos);
    }
}
