//! Opening shards, each on a thread of its own: any call on a file may take as long as its drive
//! does not answer, and whoever opens a tier waits no longer than [`Options::open_wait`].
//!
//! Threads keep in step as long as somebody waits for them. All files are looked at before any is
//! changed, so that one that cannot be used ends the opening and leaves the others as they were;
//! all are made and resized before any is told of the others. Who is late goes through the same
//! steps when its drive answers, is held against those that were in time, and joins the tier.

#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::error::OpenError;
use crate::file::{FileId, LOCK_WAIT, look_to_own};
use crate::format::{Id, Record, Superblock};
use crate::late::{LateIndex, Outsiders};
use crate::memory::PoolMemory;
use crate::open::{self, Identity, Wake};
use crate::options::Options;
use crate::shard::{Found, Shard};
use crate::tier::{OpenReport, ShardReport, Tier};

/// What happens to a shard next, for tests that hold it up there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its file is looked at.
    Look,
    /// It is made or resized.
    Prepare,
    /// It is told of its set, and its tables are read.
    Tables,
    /// It was late, and takes in what its file has.
    Join,
}

/// How long an opening that has failed waits for its threads to let go of their files.
const FAREWELL: Duration = Duration::from_secs(1);

/// Called before each step.
pub(crate) type Before = Arc<dyn Fn(Step, &Path) + Send + Sync>;

/// How far all that were in time are. Each has taken all steps before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Looking,
    Preparing,
    Reading,
    /// Nobody waits any more.
    Open,
    /// Nobody wants it any more.
    GivenUp,
}

/// How far one shard is.
enum Progress {
    /// At its file, or at the step behind a phase.
    Under,
    Looked(Looked),
    Prepared,
    Ready(Box<Opened>),
    /// It was late.
    Joining(Box<Joining>),
    Failed(OpenError),
    /// Its result was taken.
    Over,
}

/// What has a shard's name: its superblock, if it is one.
struct Looked(Option<Superblock>);

/// A shard that takes requests.
struct Opened {
    shard: Shard,
    report: ShardReport,
    /// What its file has, to be taken in with what others have.
    found: Found,
}

/// A shard that was late, and has taken in what its file has.
pub(crate) struct Joining {
    pub shard: Shard,
    pub report: ShardReport,
    pub index: LateIndex,
    pub last_write_id: u64,
}

impl Joining {
    fn new(opened: Opened) -> Self {
        let Opened {
            mut shard,
            mut report,
            found,
        } = opened;
        shard.came_late();
        Self {
            index: LateIndex::take_in(&mut shard, &found, &mut report),
            last_write_id: found.last_write_id(),
            shard,
            report,
        }
    }
}

struct State {
    phase: Phase,
    shards: Vec<Progress>,
    /// Who was not in time for some step: nobody waits for them any more.
    late: Vec<bool>,
    /// Which files were found, so that none is opened twice by two names.
    files: Vec<(usize, FileId)>,
    /// What the files say that were looked at and not refused.
    members: Vec<Option<Member>>,
    /// Late ones whose files are others' still.
    in_use: Vec<bool>,
    /// What cannot be opened.
    unusable: Vec<bool>,
    /// The name of the set, once it is known, and the file that says so; none if it is a new one.
    set: Option<(Id, Option<PathBuf>)>,
    /// Shards that have gone as far as being part of the set.
    here: BTreeSet<Id>,
    known: BTreeSet<Id>,
}

/// A file that was looked at: a shard of the set, or one to be made.
struct Member {
    path: PathBuf,
    shard: Id,
}

/// What the threads share with whoever opens and with the tier.
pub(crate) struct Shared {
    options: Options,
    pool: PoolMemory,
    wake: Wake,
    before: Before,
    state: Mutex<State>,
    changed: Condvar,
    /// A late shard has ended its opening.
    news: AtomicBool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// Opens the shards of `options`, and waits for those only whose drives answer in time.
pub(crate) fn open(
    options: Options,
    pool: PoolMemory,
    wake: Wake,
    before: Before,
) -> Result<(Tier, OpenReport), OpenError> {
    let started = Instant::now();
    open::check(&options)?;
    let count = options.shards.len();
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            phase: Phase::Looking,
            shards: (0..count).map(|_| Progress::Under).collect(),
            late: vec![false; count],
            files: Vec::new(),
            members: (0..count).map(|_| None).collect(),
            in_use: vec![false; count],
            unusable: vec![false; count],
            set: None,
            here: BTreeSet::new(),
            known: BTreeSet::new(),
        }),
        options,
        pool,
        wake,
        before,
        changed: Condvar::new(),
        news: AtomicBool::new(false),
    });
    let threads = shared.start_threads()?;
    match shared.lead() {
        Ok(opened) => Ok(assemble(started, &shared, opened)),
        Err(error) => {
            shared.give_up();
            // Their files are free again before the error is told; what is at a drive is not waited
            // for any longer.
            let end = Instant::now() + FAREWELL;
            while threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error)
        }
    }
}

/// Puts the tier together from the shards that were in time.
fn assemble(
    started: Instant,
    shared: &Arc<Shared>,
    opened: Vec<Option<Box<Opened>>>,
) -> (Tier, OpenReport) {
    let options = &shared.options;
    let (mut shards, mut found, mut reports) = (Vec::new(), Vec::new(), Vec::new());
    let (mut late, mut last_write_id) = (Vec::new(), 0);
    for (place, opened) in opened.into_iter().enumerate() {
        let Some(opened) = opened else {
            late.push(place);
            continue;
        };
        last_write_id = last_write_id.max(opened.found.last_write_id());
        shards.push(opened.shard);
        reports.push(opened.report);
        found.push(opened.found);
    }
    let index = open::take_in(&mut shards, &found, &mut reports);
    // Newer than all there is, and than what a shard that is missing or late has.
    let unix_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let next_write_id = last_write_id.max(unix_ns).min(Record::WRITE_ID_MAX) + 1;
    let mut tier = Tier::assemble(started, options, &shared.pool, shards, index, next_write_id);
    let path = |place: &usize| options.shards[*place].path.clone();
    let late_paths: Vec<PathBuf> = late.iter().map(path).collect();
    let missing = shared.lock().missing() as usize;
    if !late.is_empty() {
        // One may have failed before anybody waited for news.
        shared.news.store(true, Ordering::Release);
        let outsiders = late.into_iter().zip(late_paths.iter().cloned());
        tier.wait_for(Outsiders::new(Arc::clone(shared), outsiders.collect()));
    }
    let report = OpenReport {
        shards: reports,
        // A late shard may be one of those that the others miss.
        missing_shards: missing.saturating_sub(late_paths.len()) as u32,
        late: late_paths,
        took: started.elapsed(),
    };
    (tier, report)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_threads(self: &Arc<Self>) -> Result<Vec<JoinHandle<()>>, OpenError> {
        let mut threads = Vec::new();
        for (place, spec) in self.options.shards.iter().enumerate() {
            let shared = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("ssd-open-{place}"))
                .spawn(move || shared.run(place));
            match thread {
                Ok(thread) => threads.push(thread),
                Err(source) => {
                    self.give_up();
                    return Err(OpenError::Io {
                        path: spec.path.clone(),
                        call: "start of a thread",
                        source,
                    });
                }
            }
        }
        Ok(threads)
    }

    /// Leads the threads through the phases. Gives what is open at the end; the others are late.
    fn lead(&self) -> Result<Vec<Option<Box<Opened>>>, OpenError> {
        let mut state = self.wait(self.lock(), |shard| !matches!(shard, Progress::Under))?;
        self.take_members(&mut state)?;
        if state.set.is_none() {
            // None can be made before it is known for which set.
            state.late.fill(true);
        }
        self.enter(&mut state, Phase::Preparing);
        let is_prepared = |shard: &Progress| {
            let behind = matches!(shard, Progress::Under | Progress::Looked(_));
            !behind
        };
        let mut state = self.wait(state, is_prepared)?;
        self.enter(&mut state, Phase::Reading);
        let is_ready = |shard: &Progress| matches!(shard, Progress::Ready(_));
        let mut state = self.wait(state, is_ready)?;
        let take = |shard: &mut Progress| match std::mem::replace(shard, Progress::Over) {
            Progress::Ready(opened) => Some(opened),
            other => {
                *shard = other;
                None
            }
        };
        let opened = state.shards.iter_mut().map(take).collect();
        self.enter(&mut state, Phase::Open);
        Ok(opened)
    }

    fn enter(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        self.changed.notify_all();
    }

    /// Waits until that is so of all that were in time so far. Who is not after a while is late.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        is_so: impl Fn(&Progress) -> bool,
    ) -> Result<MutexGuard<'a, State>, OpenError> {
        let deadline = Instant::now() + self.options.open_wait;
        let is_over = |shard: &Progress| is_so(shard) || matches!(shard, Progress::Failed(_));
        loop {
            let mut both = state.shards.iter().zip(&state.late);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || both.all(|(shard, late)| *late || is_over(shard)) {
                break;
            }
            let woken = self.changed.wait_timeout(state, left);
            (state, _) = woken.unwrap_or_else(PoisonError::into_inner);
        }
        for place in 0..state.shards.len() {
            if !is_over(&state.shards[place]) {
                state.late[place] = true;
            }
        }
        match state.first_failure() {
            Some(error) => Err(error),
            None => Ok(state),
        }
    }

    /// Nobody wants the shards any more: whoever is still at it ends without a further step.
    pub(crate) fn give_up(&self) {
        let mut state = self.lock();
        let dropped: Vec<Progress> = state.shards.drain(..).collect();
        self.enter(&mut state, Phase::GivenUp);
        drop(state);
        drop(dropped);
    }

    /// The late shards that have ended their opening since.
    pub(crate) fn take_news(&self) -> Vec<(usize, Result<Box<Joining>, OpenError>)> {
        // SYNC: ssd-late. Behind whatever is taken from under the lock.
        if !self.news.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        let mut state = self.lock();
        let ended = state.shards.iter_mut().enumerate();
        ended
            .filter_map(
                |(place, shard)| match std::mem::replace(shard, Progress::Over) {
                    Progress::Joining(joining) => Some((place, Ok(joining))),
                    Progress::Failed(error) => Some((place, Err(error))),
                    other => {
                        *shard = other;
                        None
                    }
                },
            )
            .collect()
    }

    /// Checks all that were looked at, in the order of the options, and makes them members.
    fn take_members(&self, state: &mut State) -> Result<(), OpenError> {
        for place in 0..state.shards.len() {
            let looked = match &state.shards[place] {
                Progress::Looked(Looked(superblock)) => superblock.clone(),
                _ => continue,
            };
            self.take_member(state, place, looked.as_ref())?;
        }
        state.name_set();
        Ok(())
    }

    /// A file is this node's, of the set, and no copy of another one: a member from now on.
    fn take_member(
        &self,
        state: &mut State,
        place: usize,
        superblock: Option<&Superblock>,
    ) -> Result<(), OpenError> {
        let path = self.options.shards[place].path.clone();
        let shard = match superblock {
            Some(superblock) => {
                if superblock.node != self.options.node {
                    return Err(OpenError::OtherNode {
                        path,
                        found: superblock.node.clone(),
                        expected: self.options.node.clone(),
                    });
                }
                if let Some((set, other)) = &state.set
                    && *set != superblock.set
                {
                    let other = other.clone().unwrap_or_default();
                    return Err(OpenError::OtherSet { path, other });
                }
                let mut others = state.members.iter().flatten();
                if let Some(other) = others.find(|member| member.shard == superblock.shard) {
                    let other = other.path.clone();
                    return Err(OpenError::SameShard { path, other });
                }
                state.set = Some((superblock.set, Some(path.clone())));
                superblock.shard
            }
            None => open::random_id(),
        };
        state.members[place] = Some(Member { path, shard });
        Ok(())
    }

    /// A shard's thread.
    fn run(&self, place: usize) {
        let mut ended = match self.caught(place, || self.open_one(place)) {
            Ok(Some(opened)) => Progress::Ready(opened),
            Ok(None) => return,
            Err(error) => Progress::Failed(error),
        };
        let mut state = self.lock();
        if state.phase == Phase::Open {
            drop(state);
            ended = match ended {
                Progress::Ready(opened) => self.join(place, *opened),
                other => other,
            };
            state = self.lock();
        }
        state.unusable[place] = matches!(ended, Progress::Failed(_));
        // If nobody wants it any more it has no place.
        let Some(shard) = state.shards.get_mut(place) else {
            return;
        };
        *shard = ended;
        let late = state.phase == Phase::Open;
        drop(state);
        self.changed.notify_all();
        if late {
            // SYNC: ssd-late.
            self.news.store(true, Ordering::Release);
            (self.wake)();
        }
    }

    /// Gives a shard that was late what its file has.
    fn join(&self, place: usize, opened: Opened) -> Progress {
        let joining = self.caught(place, || {
            (self.before)(Step::Join, &self.options.shards[place].path);
            Ok(Joining::new(opened))
        });
        match joining {
            Ok(joining) => Progress::Joining(Box::new(joining)),
            Err(error) => Progress::Failed(error),
        }
    }

    /// Does that for a shard, which is lost if it panics.
    fn caught<T>(
        &self,
        place: usize,
        work: impl FnOnce() -> Result<T, OpenError>,
    ) -> Result<T, OpenError> {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            Err(OpenError::Panicked {
                path: self.options.shards[place].path.clone(),
            })
        })
    }

    /// Opens a shard; none if nobody wants it any more.
    fn open_one(&self, place: usize) -> Result<Option<Box<Opened>>, OpenError> {
        let spec = &self.options.shards[place];
        (self.before)(Step::Look, &spec.path);
        let mine = |file| self.claim(place, file);
        let named = look_to_own(&spec.path, mine, &|so_far| self.waits_for(place, so_far))?;
        self.lock().in_use[place] = false;
        let geometry = open::plan_size(&self.options, spec, &named)?;
        let superblock = named.shard().map(|file| file.superblock.clone());
        let Some(identity) = self.meet_looked(place, superblock)? else {
            return Ok(None);
        };
        (self.before)(Step::Prepare, &spec.path);
        let (mut file, mut report) = open::prepare(&self.options, spec, named, geometry, identity)?;
        // It may have been made just now.
        self.claim(place, file.id()?)?;
        let Some((here, known)) = self.meet_prepared(place, &file.superblock) else {
            return Ok(None);
        };
        (self.before)(Step::Tables, &spec.path);
        open::write_members(&mut file, &here, &known)?;
        let found = open::read_tables(&file)?;
        let (options, wake) = (&self.options, &self.wake);
        let shard = open::start(options, place as u16, &file, &self.pool, wake, &mut report)?;
        Ok(Some(Box::new(Opened {
            shard,
            report,
            found,
        })))
    }

    /// A file is this shard's, unless it is another one's by another name.
    fn claim(&self, place: usize, file: FileId) -> Result<(), OpenError> {
        let mut state = self.lock();
        let mut others = state.files.iter();
        if let Some(&(other, _)) = others.find(|(other, at)| *other != place && *at == file) {
            let path = |place: usize| self.options.shards[place].path.clone();
            let (first, second) = (place.min(other), place.max(other));
            return Err(OpenError::SameFile {
                path: path(second),
                other: path(first),
            });
        }
        state.files.push((place, file));
        Ok(())
    }

    /// Whether the lock of a shard's file is tried once more after so long. A late one holds nobody
    /// up, and may be at a drive that has not ended yet what a killed daemon asked of it.
    fn waits_for(&self, place: usize, so_far: Duration) -> bool {
        let mut state = self.lock();
        state.in_use[place] = state.late[place];
        state.phase != Phase::GivenUp && (state.late[place] || so_far < LOCK_WAIT)
    }

    /// Whether a late shard's file is another process's still.
    pub(crate) fn is_in_use(&self, place: usize) -> bool {
        self.lock().in_use[place]
    }

    /// Waits until all have looked or nobody waits for them. None if nobody wants it any more.
    fn meet_looked(
        &self,
        place: usize,
        superblock: Option<Superblock>,
    ) -> Result<Option<Identity>, OpenError> {
        let mut state = self.lock();
        if state.phase == Phase::Looking {
            state.shards[place] = Progress::Looked(Looked(superblock));
            self.changed.notify_all();
            state = self.wait_while(state, |state| state.phase == Phase::Looking);
        } else if state.phase != Phase::GivenUp {
            self.take_member(&mut state, place, superblock.as_ref())?;
            state.name_set();
            self.changed.notify_all();
        }
        // Of which set a new shard is, one that is not looked at yet may have to say.
        state = self.wait_while(state, |state| {
            state.phase != Phase::GivenUp && state.set.is_none() && state.may_name_set()
        });
        if state.phase == Phase::GivenUp {
            return Ok(None);
        }
        let member = state.members[place].as_ref();
        let shard = member.map_or_else(open::random_id, |member| member.shard);
        let Some((set, _)) = state.set else {
            let unusable = state.unusable.iter().position(|unusable| *unusable);
            let path = |place: usize| self.options.shards[place].path.clone();
            return Err(OpenError::SetUnknown {
                path: path(place),
                other: unusable.map(path).unwrap_or_default(),
            });
        };
        Ok(Some(Identity { set, shard }))
    }

    /// Waits until all are prepared or nobody waits for them. Says which shards are there and which
    /// there are; none if nobody wants it any more.
    fn meet_prepared(
        &self,
        place: usize,
        superblock: &Superblock,
    ) -> Option<(BTreeSet<Id>, BTreeSet<Id>)> {
        let mut state = self.lock();
        state.here.insert(superblock.shard);
        state.known.insert(superblock.shard);
        state.known.extend(superblock.members.iter().copied());
        if state.phase < Phase::Open {
            state.shards[place] = Progress::Prepared;
            self.changed.notify_all();
            state = self.wait_while(state, |state| state.phase < Phase::Reading);
        }
        if state.phase == Phase::GivenUp {
            return None;
        }
        Some((state.here.clone(), state.known.clone()))
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        waits: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.changed
            .wait_while(state, |state| waits(state))
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The first that cannot be opened of those that were in time.
    fn first_failure(&mut self) -> Option<OpenError> {
        let both = self.shards.iter_mut().zip(&self.late);
        let mut failed = both
            .filter(|(shard, late)| !**late && matches!(shard, Progress::Failed(_)))
            .map(|(shard, _)| std::mem::replace(shard, Progress::Over));
        match failed.next() {
            Some(Progress::Failed(error)) => Some(error),
            _ => None,
        }
    }

    /// If all files are known and none is a shard, the set is a new one.
    fn name_set(&mut self) {
        if self.set.is_none() && self.members.iter().all(Option::is_some) {
            self.set = Some((open::random_id(), None));
        }
    }

    /// Whether a file that is not known yet may say which set it is.
    fn may_name_set(&self) -> bool {
        let mut both = self.members.iter().zip(&self.unusable);
        both.any(|(member, unusable)| member.is_none() && !unusable)
    }

    /// How many shards of the set are not there.
    fn missing(&self) -> u64 {
        self.known.difference(&self.here).count() as u64
    }
}
