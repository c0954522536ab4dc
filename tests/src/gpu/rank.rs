//! One rank of an engine with GPU memory: a client, allocations, and what every byte of them should
//! be.

use std::ffi::c_void;
use std::ptr::without_provenance_mut;

use anyhow::Context as _;
use pegaflow::{
    BlockHash, Client, Completion, GroupMemory, MemoryKind, Mode, NamespaceSpec, Options, Order,
    Registration, RegistrationId, RequestId, SegmentMemory,
};
use pegaflow_tools::gpu::{
    DeviceMemory, Event, Gate, Gpu, PinnedMemory, Stream, store_to_an_illegal_address,
};
use serde::{Deserialize, Serialize};

use super::shape::{Arranged, GroupSizes, Piece, arrange, sizes};
use crate::SOON;
use crate::content::Shard;

/// What a rank allocates and registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GpuSpec {
    /// Number of its GPU.
    pub gpu: u32,
    /// Engine replica.
    pub instance: String,
    /// Part of the namespace; also decides the bytes of the blocks.
    pub salt: String,
    /// Ranks of the instance.
    pub world_size: u32,
    /// This rank.
    pub rank: u32,
    /// Sizes of the pieces of a block: see [`sizes`].
    pub sizes: u64,
    /// Where they lie: see [`arrange`].
    pub arrangement: u64,
    /// Bytes of all blocks, about.
    pub budget: usize,
    /// Memory of the VMM API, in chunks.
    pub mapped: bool,
    /// All ranks hold the same bytes.
    pub replicated: bool,
}

impl Default for GpuSpec {
    fn default() -> GpuSpec {
        GpuSpec {
            gpu: 0,
            instance: "engine".into(),
            salt: String::new(),
            world_size: 1,
            rank: 0,
            sizes: 0,
            arrangement: 0,
            budget: 4 << 20,
            mapped: false,
            replicated: false,
        }
    }
}

impl GpuSpec {
    /// The same of another instance, with another arrangement.
    pub fn instance(&self, instance: &str, arrangement: u64) -> GpuSpec {
        GpuSpec {
            instance: instance.into(),
            arrangement,
            ..self.clone()
        }
    }

    /// Sizes of its groups.
    pub fn groups(&self) -> Vec<GroupSizes> {
        sizes(self.sizes, self.budget)
    }
}

/// A byte of GPU memory is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which allocation.
    pub allocation: usize,
    /// Its byte.
    pub at: usize,
    /// What it should be.
    pub expected: u8,
    /// What it is.
    pub found: u8,
}

/// What memory is filled with before anything is written.
pub const BACKGROUND: u8 = 0xA5;

/// Blocks as they were read.
pub type Pages = Vec<Vec<u8>>;

/// A registered rank. The client goes first: after that nobody touches the memory.
pub struct Rank {
    /// Its client.
    pub client: Client,
    /// Its registration.
    pub registration: RegistrationId,
    /// What it registered.
    pub spec: GpuSpec,
    /// Its groups.
    pub groups: Vec<GroupSizes>,
    arranged: Arranged,
    expected: Vec<Vec<u8>>,
    stream: Stream,
    memories: Vec<DeviceMemory>,
    _gpu: Gpu,
}

impl Rank {
    /// Opens the GPU, connects, allocates, registers.
    ///
    /// # Errors
    /// As the driver and the library say.
    pub fn open(options: Options, spec: GpuSpec) -> anyhow::Result<Rank> {
        let gpu = Gpu::open(spec.gpu)?;
        let groups = spec.groups();
        let arranged = arrange(&groups, spec.arrangement);
        let mut memories = Vec::new();
        for bytes in &arranged.allocations {
            let memory = if spec.mapped {
                DeviceMemory::map(spec.gpu, *bytes)
            } else {
                DeviceMemory::allocate(*bytes)
            }?;
            memory.fill(BACKGROUND)?;
            memories.push(memory);
        }
        let expected = memories
            .iter()
            .map(|memory| vec![BACKGROUND; memory.bytes()])
            .collect();
        let client = Client::connect(options)?;
        let registration = client.register(&registration(&spec, &groups, &arranged, &memories))?;
        Ok(Rank {
            client,
            registration,
            groups,
            arranged,
            expected,
            stream: Stream::new()?,
            memories,
            _gpu: gpu,
            spec,
        })
    }

    /// Waits for a request.
    ///
    /// # Errors
    /// It is not answered in time.
    pub fn wait(&self, request: RequestId) -> Result<Completion, pegaflow::Error> {
        self.client.wait(request, SOON)
    }

    fn position(&self, group: u16) -> usize {
        let position = self.groups.iter().position(|known| known.group == group);
        position.expect("a group of this rank")
    }

    /// Sizes of a group.
    pub fn group(&self, group: u16) -> &GroupSizes {
        &self.groups[self.position(group)]
    }

    /// The page that belongs to a hash.
    pub fn page_of(&self, group: u16, hash: &BlockHash) -> Vec<u8> {
        let rank = if self.spec.replicated {
            0
        } else {
            self.spec.rank
        };
        let shard = Shard {
            salt: &self.spec.salt,
            group,
            rank,
            hash,
        };
        shard.bytes(self.group(group).page_bytes())
    }

    /// Calls `each` for every piece of a block, with its place in the allocation and in the page.
    fn for_pieces(
        &self,
        group: u16,
        block: u32,
        mut each: impl FnMut(&Piece, usize, usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut in_page = 0;
        for piece in &self.arranged.groups[self.position(group)] {
            each(piece, piece.base + block as usize * piece.stride, in_page)?;
            in_page += piece.bytes;
        }
        Ok(())
    }

    /// From now on a block should hold this page.
    pub fn expect(&mut self, group: u16, block: u32, page: &[u8]) {
        let position = self.position(group);
        let mut rest = page;
        for piece in &self.arranged.groups[position] {
            let (part, after) = rest.split_at(piece.bytes);
            let at = piece.base + block as usize * piece.stride;
            self.expected[piece.allocation][at..at + piece.bytes].copy_from_slice(part);
            rest = after;
        }
    }

    /// What a block should hold by now.
    pub fn expected(&self, group: u16, block: u32) -> Vec<u8> {
        let mut page = Vec::with_capacity(self.group(group).page_bytes());
        for piece in &self.arranged.groups[self.position(group)] {
            let at = piece.base + block as usize * piece.stride;
            page.extend_from_slice(&self.expected[piece.allocation][at..at + piece.bytes]);
        }
        page
    }

    /// Writes a page into a block, as if the engine had computed it.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn put(&mut self, group: u16, block: u32, page: &[u8]) -> anyhow::Result<()> {
        self.expect(group, block, page);
        self.for_pieces(group, block, |piece, at, in_page| {
            let part = &page[in_page..in_page + piece.bytes];
            Ok(self.memories[piece.allocation].write(at, part)?)
        })
    }

    /// Writes pages into blocks when `gate` is opened; the GPU does it, this thread goes on. What
    /// has to live until then is returned.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn put_later(
        &mut self,
        group: u16,
        pages: &[(u32, Vec<u8>)],
    ) -> anyhow::Result<(Gate, PinnedMemory)> {
        let page_bytes = self.group(group).page_bytes();
        let mut staged = PinnedMemory::allocate(pages.len() * page_bytes)?;
        for (number, (block, page)) in pages.iter().enumerate() {
            staged.put(number * page_bytes, page);
            self.expect(group, *block, page);
        }
        let gate = self.stream.hold()?;
        for (number, (block, _)) in pages.iter().enumerate() {
            self.for_pieces(group, *block, |piece, at, in_page| {
                let from = (&staged, number * page_bytes + in_page);
                let memory = &self.memories[piece.allocation];
                Ok(memory.write_from(at, from, piece.bytes, &self.stream)?)
            })?;
        }
        Ok((gate, staged))
    }

    /// Reads a block's pieces into pinned memory when the gate is opened.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn read_later(&self, group: u16, block: u32) -> anyhow::Result<(Gate, PinnedMemory)> {
        let target = PinnedMemory::allocate(self.group(group).page_bytes())?;
        let gate = self.stream.hold()?;
        self.for_pieces(group, block, |piece, at, in_page| {
            let memory = &self.memories[piece.allocation];
            Ok(memory.read_to(at, (&target, in_page), piece.bytes, &self.stream)?)
        })?;
        Ok((gate, target))
    }

    /// What comes after everything that is in the stream now.
    pub fn after_stream(&self) -> Order {
        // SAFETY: the stream lives as long as `self`, on the GPU of the registration.
        unsafe { Order::stream(self.stream.raw().cast::<c_void>()) }
    }

    /// Marks where the stream is, for [`Self::after_event`].
    ///
    /// # Errors
    /// The GPU fails.
    pub fn record(&self) -> anyhow::Result<Event> {
        let event = Event::new()?;
        event.record(&self.stream)?;
        Ok(event)
    }

    /// What comes after an event, which must outlive the call that gets this.
    pub fn after_event(event: &Event) -> Order {
        // SAFETY: by this function's words; the event is of the registration's GPU.
        unsafe { Order::event(event.raw().cast::<c_void>()) }
    }

    /// Loads pages into blocks in steps, each of which the stream waits for and reads at once;
    /// returns what it read, as pages, and the load's answer.
    ///
    /// # Errors
    /// As the library and the GPU say.
    pub fn load_in_steps(
        &self,
        group: u16,
        lease: u64,
        blocks: &[u32],
        steps: u16,
    ) -> anyhow::Result<(Pages, Result<Completion, pegaflow::Error>)> {
        let sizes = self.group(group);
        let (pieces, page_bytes) = (sizes.pieces.len(), sizes.page_bytes());
        let read = PinnedMemory::allocate(blocks.len() * page_bytes)?;
        let (client, registration) = (&self.client, self.registration);
        let after = self.after_stream();
        let request =
            client.load_in_steps(registration, group, lease, (0, blocks), after, steps)?;
        for step in 1..=usize::from(steps) {
            client.stream_wait(request, step as u32, self.after_stream())?;
            let first = (step - 1) * pieces / usize::from(steps);
            let end = step * pieces / usize::from(steps);
            for (number, block) in blocks.iter().enumerate() {
                let mut position = 0;
                self.for_pieces(group, *block, |piece, at, in_page| {
                    if (first..end).contains(&position) {
                        let memory = &self.memories[piece.allocation];
                        let to = (&read, number * page_bytes + in_page);
                        memory.read_to(at, to, piece.bytes, &self.stream)?;
                    }
                    position += 1;
                    Ok(())
                })?;
            }
        }
        // Nobody waits for the load itself before the stream is through.
        self.stream.synchronize()?;
        let answer = self.wait(request);
        let mut pages = vec![vec![0; page_bytes]; blocks.len()];
        for (number, page) in pages.iter_mut().enumerate() {
            read.get(number * page_bytes, page);
        }
        Ok((pages, answer))
    }

    /// Ends the context as a kernel with an illegal address does, whatever is under way.
    ///
    /// # Errors
    /// The driver has not let it end.
    pub fn break_context(&self) -> anyhow::Result<()> {
        let broken = store_to_an_illegal_address(&self.stream);
        let gone = self.stream.synchronize();
        anyhow::ensure!(gone.is_err(), "the context lives on: {broken:?}");
        Ok(())
    }

    /// A block as a page, from the GPU.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn page(&self, group: u16, block: u32) -> anyhow::Result<Vec<u8>> {
        let mut page = vec![0; self.group(group).page_bytes()];
        self.for_pieces(group, block, |piece, at, in_page| {
            let part = &mut page[in_page..in_page + piece.bytes];
            Ok(self.memories[piece.allocation].read(at, part)?)
        })?;
        Ok(page)
    }

    /// Compares every byte of every allocation, padding included.
    ///
    /// # Errors
    /// The GPU fails, or a byte differs.
    pub fn check(&self) -> anyhow::Result<()> {
        for (allocation, (memory, expected)) in self.memories.iter().zip(&self.expected).enumerate()
        {
            let mut found = vec![0; memory.bytes()];
            memory.read(0, &mut found)?;
            if found == *expected {
                continue;
            }
            let mut pairs = expected.iter().zip(&found);
            let at = pairs.position(|(expected, found)| expected != found);
            let at = at.context("they differ")?;
            let difference = Difference {
                allocation,
                at,
                expected: expected[at],
                found: found[at],
            };
            let differing = expected.iter().zip(&found).filter(|(e, f)| e != f).count();
            anyhow::bail!(
                "{difference:?}, {differing} bytes in all, of {:?}",
                self.spec
            );
        }
        Ok(())
    }
}

fn registration(
    spec: &GpuSpec,
    groups: &[GroupSizes],
    arranged: &Arranged,
    memories: &[DeviceMemory],
) -> Registration {
    let segment = |piece: &Piece| {
        let address = memories[piece.allocation].address() as usize + piece.base;
        // SAFETY: memory of a GPU, which no processor follows and which outlives the client.
        let segment = unsafe {
            SegmentMemory::at(
                without_provenance_mut(address),
                piece.stride as u64,
                piece.bytes as u64,
            )
        };
        segment.of_kind(MemoryKind::Cuda)
    };
    let groups = groups.iter().zip(&arranged.groups);
    Registration {
        instance: spec.instance.clone(),
        namespace: NamespaceSpec {
            model: "gpu-test-model".into(),
            dtype: "bytes".into(),
            hash_algorithm: "test".into(),
            salt: spec.salt.clone(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        },
        world_size: spec.world_size,
        rank: Some(spec.rank),
        mode: Mode::ReadWrite,
        groups: groups
            .map(|(sizes, pieces)| GroupMemory {
                group: sizes.group,
                num_blocks: sizes.blocks,
                segments: pieces.iter().map(segment).collect(),
                replicated: spec.replicated,
            })
            .collect(),
    }
}
