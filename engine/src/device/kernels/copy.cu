// Gathers the pieces of pages inside the GPU's memory into a dense staging slot, and scatters them
// back. The slot goes over the bus by one DMA, so no kernel ever waits for the bus: a kernel that
// does starves the engine's own (docs/gpu.md has the figures).
//
// Compiled to copy.ptx by `make ptx`; the daemon embeds that and looks the two kernels up by name.
//
// Page p of the slot lies at staging + p * page_bytes. Its piece of part q lies at
// parts[q].base + blocks[p] * parts[q].block_stride in the engine's memory and at
// parts[q].page_offset in the page. Any grid and any block of whole warps will do; any alignment is
// right, and what is aligned to 16 bytes is fast.
//
// The caller guarantees: at least one part, none empty, the pieces of a page do not overlap, and a
// slot is smaller than 2 GiB. So the slices of all pieces count less than 2^31.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// Layout shared with the daemon, which fills it in: 24 bytes, no padding.
struct Part {
    u64 base;         // address of block 0's piece
    u64 block_stride; // bytes from a block's piece to the next block's
    u32 bytes;        // of one piece
    u32 page_offset;  // of the piece in its page
};
typedef char part_is_24_bytes[sizeof(Part) == 24 ? 1 : -1];

enum {
    WARP = 32,
    // Loads in flight per thread: with 1024 threads of 16-byte words, 64 KiB per multiprocessor,
    // more than its share of what hides the memory's latency.
    UNROLL = 4,
    // About what one warp moves before it looks for more work: pieces of more are cut into slices,
    // so that a few large pieces occupy every warp.
    SLICE_BYTES = 8192,
    // Block ids lie in the host's memory, a bus round trip away: fetched this many at a time.
    IDS = 1024
};

// Copies bytes / sizeof(Word) words. Reads pass the caches by: each byte is read once.
template <typename Word>
static __device__ __forceinline__ void copy_words(u8 *to, const u8 *from, u32 bytes, u32 lane)
{
    const Word *source = reinterpret_cast<const Word *>(from);
    Word *target = reinterpret_cast<Word *>(to);
    const u32 words = bytes / sizeof(Word);
#pragma unroll 1
    for (u32 first = lane; first < words; first += WARP * UNROLL) {
        Word held[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++)
            if (first + i * WARP < words)
                held[i] = __ldcs(source + first + i * WARP);
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++)
            if (first + i * WARP < words)
                target[first + i * WARP] = held[i];
    }
}

// One warp copies `bytes` with the widest words that both addresses allow, and the rest bytewise.
static __device__ __forceinline__ void copy_slice(u8 *to, const u8 *from, u32 bytes, u32 lane)
{
    const u32 unaligned = static_cast<u32>(reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from));
    u32 rest;
    if ((unaligned & 15) == 0) {
        copy_words<uint4>(to, from, bytes, lane);
        rest = bytes & 15;
    } else if ((unaligned & 3) == 0) {
        copy_words<u32>(to, from, bytes, lane);
        rest = bytes & 3;
    } else {
        copy_words<u8>(to, from, bytes, lane);
        rest = 0;
    }
    if (lane < rest)
        to[bytes - rest + lane] = from[bytes - rest + lane];
}

// A unit of work is one slice of one piece, numbered by page, then part, then slice. Each block of
// threads takes one contiguous range of units, so that it reads each block id about once.
template <bool INTO_STAGING>
static __device__ __forceinline__ void copy_pages(const Part *__restrict__ parts, u32 part_count,
                                           const u32 *blocks, u32 pages, u64 page_bytes,
                                           u8 *staging)
{
    __shared__ u32 ids[IDS];
    const u32 lane = threadIdx.x % WARP;
    const u32 warp = threadIdx.x / WARP;
    const u32 warps = blockDim.x / WARP;

    const u64 mean_bytes = page_bytes / part_count;
    const u32 slices = mean_bytes > SLICE_BYTES ? static_cast<u32>(mean_bytes / SLICE_BYTES) : 1;
    const u32 units_per_page = part_count * slices;
    const u64 units = static_cast<u64>(units_per_page) * pages;
    const u32 first = static_cast<u32>(units * blockIdx.x / gridDim.x);
    const u32 end = static_cast<u32>(units * (blockIdx.x + 1) / gridDim.x);
    if (first == end)
        return;

    const u32 end_page = (end - 1) / units_per_page + 1;
    for (u32 page0 = first / units_per_page; page0 < end_page; page0 += IDS) {
        const u32 page1 = min(page0 + IDS, end_page);
        __syncthreads(); // the ids of the round before are used up
        for (u32 i = threadIdx.x; i < page1 - page0; i += blockDim.x)
            ids[i] = blocks[page0 + i];
        __syncthreads();

        const u32 end_unit = min(end, page1 * units_per_page);
        for (u32 unit = max(first, page0 * units_per_page) + warp; unit < end_unit; unit += warps) {
            const u32 page = unit / units_per_page;
            const u32 in_page = unit - page * units_per_page;
            const u32 index = in_page / slices;
            const Part part = parts[index];
            // Slices of an aligned piece are aligned; the last may be short, or there may be none.
            const u32 slice_bytes = ((part.bytes - 1) / slices + 512) & ~511u;
            const u32 start = (in_page - index * slices) * slice_bytes;
            if (start >= part.bytes)
                continue;
            const u32 bytes = min(slice_bytes, part.bytes - start);
            u8 *piece = reinterpret_cast<u8 *>(part.base + ids[page - page0] * part.block_stride);
            u8 *dense = staging + page * page_bytes + part.page_offset;
            if (INTO_STAGING)
                copy_slice(dense + start, piece + start, bytes, lane);
            else
                copy_slice(piece + start, dense + start, bytes, lane);
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024)
    pega_gather(const Part *parts, u32 part_count, const u32 *blocks, u32 pages, u64 page_bytes,
                u8 *staging)
{
    copy_pages<true>(parts, part_count, blocks, pages, page_bytes, staging);
}

extern "C" __global__ void __launch_bounds__(1024)
    pega_scatter(const Part *parts, u32 part_count, const u32 *blocks, u32 pages, u64 page_bytes,
                 u8 *staging)
{
    copy_pages<false>(parts, part_count, blocks, pages, page_bytes, staging);
}
