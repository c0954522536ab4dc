// Runs copy.cu on the processor: threads for threads, a barrier for __syncthreads. Random shapes,
// every alignment; each gathered byte and each byte around the slot is compared, and scattering
// into fresh memory must give the engine's memory back and touch nothing else.
//
// `make test-kernels` runs it.

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__
#define __launch_bounds__(threads)
#define __shared__ static
#define __ldcs(pointer) (*(pointer))
struct uint4 {
    unsigned int x, y, z, w;
};
struct Index {
    unsigned int x;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::optional<std::barrier<>> together;
static void __syncthreads() { together->arrive_and_wait(); }
using std::max;
using std::min;

#include "copy.cu"

typedef void Kernel(const Part *, u32, const u32 *, u32, u64, u8 *);

static void launch(Kernel *kernel, u32 grid, u32 threads, const std::vector<Part> &parts,
                   const std::vector<u32> &blocks, u64 page_bytes, u8 *staging)
{
    blockDim.x = threads;
    gridDim.x = grid;
    // One block after the other: they share the `static` that stands for shared memory.
    for (u32 block = 0; block < grid; block++) {
        together.emplace(threads);
        std::vector<std::thread> running;
        for (u32 thread = 0; thread < threads; thread++)
            running.emplace_back([&, thread] {
                threadIdx.x = thread;
                blockIdx.x = block;
                kernel(parts.data(), parts.size(), blocks.data(), blocks.size(), page_bytes,
                       staging);
            });
        for (std::thread &thread : running)
            thread.join();
    }
}

static std::mt19937 rng(1);
static u32 pick(u32 low, u32 high) { return std::uniform_int_distribution<u32>(low, high)(rng); }

static bool round_trip()
{
    const u32 unit = 1u << 2 * pick(0, 2);
    const u32 part_count = pick(1, 5), pages = pick(1, 8) == 1 ? 1500 : pick(1, 12);
    const u32 most = pages > 100 ? 8 : pick(0, 3) == 0 ? 5000 : 60;
    const u32 ids = pages + pick(0, 9);

    std::vector<u32> blocks(ids);
    for (u32 i = 0; i < ids; i++)
        blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), rng);
    blocks.resize(pages);

    std::vector<Part> parts(part_count);
    std::vector<std::vector<u8>> memory(part_count);
    u64 page_bytes = 0;
    for (u32 q = 0; q < part_count; q++) {
        Part &part = parts[q];
        part.bytes = unit * pick(1, most);
        part.block_stride = part.bytes + unit * pick(0, 3);
        part.page_offset = page_bytes;
        page_bytes += part.bytes;
        const u32 lead = unit * pick(0, 3);
        memory[q].resize(lead + part.block_stride * ids);
        for (u8 &byte : memory[q])
            byte = pick(0, 255);
        part.base = reinterpret_cast<u64>(memory[q].data()) + lead;
    }

    const u32 guard = 64;
    std::vector<u8> slot(guard + page_bytes * pages + guard, 0xAA);
    std::vector<u8> expected = slot;
    for (u32 p = 0; p < pages; p++)
        for (const Part &part : parts)
            memcpy(&expected[guard + p * page_bytes + part.page_offset],
                   reinterpret_cast<u8 *>(part.base + blocks[p] * part.block_stride), part.bytes);
    const u32 grid = pick(1, 5), threads = 32 * pick(1, 3);
    launch(pega_gather, grid, threads, parts, blocks, page_bytes, &slot[guard]);
    if (slot != expected)
        return false;

    // Only the chosen blocks come back, the bytes between pieces stay.
    std::vector<std::vector<u8>> original = memory;
    for (u32 q = 0; q < part_count; q++)
        for (u32 p = 0; p < pages; p++)
            memset(reinterpret_cast<u8 *>(parts[q].base + blocks[p] * parts[q].block_stride), 0,
                   parts[q].bytes);
    launch(pega_scatter, grid, threads, parts, blocks, page_bytes, &slot[guard]);
    return memory == original && slot == expected;
}

int main()
{
    for (int round = 0; round < 300; round++)
        if (!round_trip()) {
            printf("round %d: the bytes differ\n", round);
            return 1;
        }
    puts("300 shapes: all bytes equal");
}
