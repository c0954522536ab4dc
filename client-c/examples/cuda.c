/*
 * KV memory on a GPU: saved behind the stream that writes it, loaded ahead of the stream that reads
 * it, layer by layer, without a host thread that waits for either.
 *
 *   cc cuda.c -o cuda $(pkg-config --cflags --libs pegaflow) -I/usr/local/cuda/include -lcuda
 *   ./cuda
 *
 * The daemon has to see the same GPU. cudaMalloc() and cudaStream_t of the runtime API serve as
 * well as what is used here.
 */
#include <cuda.h>

#include "common.h"

#define LAYER_BYTES ((size_t)BLOCKS * BLOCK_BYTES)

/* Ends the program if a call of the driver failed. */
static void gpu(CUresult result, const char *what)
{
    if (result != CUDA_SUCCESS) {
        const char *name = "unknown";
        cuGetErrorName(result, &name);
        fprintf(stderr, "%s: %s\n", what, name);
        exit(1);
    }
}

int main(void)
{
    CUdevice device;
    CUcontext context;
    CUstream stream;
    gpu(cuInit(0), "cuInit");
    gpu(cuDeviceGet(&device, 0), "cuDeviceGet");
    gpu(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    gpu(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    gpu(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");

    /* The KV cache: LAYERS arrays of BLOCKS blocks. And pinned memory of the host to look at it. */
    CUdeviceptr cache;
    void *pinned;
    gpu(cuMemAlloc(&cache, LAYERS * LAYER_BYTES), "cuMemAlloc");
    gpu(cuMemHostAlloc(&pinned, LAYERS * LAYER_BYTES, 0), "cuMemHostAlloc");
    uint8_t *host = pinned;

    pega_options options;
    check(pega_options_init(&options, sizeof options), "pega_options_init");
    options.client_name = "example-cuda";
    pega_client *client = NULL;
    check(pega_connect(&options, &client), "pega_connect");
    /* A device pointer is the address of a segment like any other. */
    uint32_t registration = register_memory(client, (uint8_t *)(uintptr_t)cache);

    pega_hash hashes[BLOCKS];
    uint32_t blocks[BLOCKS];
    for (uint32_t block = 0; block < BLOCKS; block++) {
        hashes[block] = name_of(block);
        blocks[block] = block;
    }

    /* "Computes" all blocks. Nobody waits: the save is told to come after the stream's work. */
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        for (uint32_t block = 0; block < BLOCKS; block++) {
            uint8_t *to = host + layer * LAYER_BYTES + (size_t)block * BLOCK_BYTES;
            for (uint32_t at = 0; at < BLOCK_BYTES; at++) {
                to[at] = content(block, layer, at);
            }
        }
    }
    gpu(cuMemcpyHtoDAsync(cache, host, LAYERS * LAYER_BYTES, stream), "cuMemcpyHtoDAsync");
    pega_order after;
    memset(&after, 0, sizeof after);
    after.size = sizeof after;
    after.kind = PEGA_ORDER_STREAM;
    after.handle = stream;
    uint64_t request = 0;
    check(pega_save_after(client, registration, 0, hashes, blocks, BLOCKS, &after, &request),
          "pega_save_after");
    pega_completion saved = finish(client, request, "save");
    printf("saved %u blocks, %u were there\n", (unsigned)saved.count, (unsigned)saved.skipped);

    /* The blocks go to another use, and are wanted again, elsewhere. */
    gpu(cuMemsetD8Async(cache, 0, LAYERS * LAYER_BYTES, stream), "cuMemsetD8Async");
    memset(host, 0, LAYERS * LAYER_BYTES);
    check(pega_query(client, registration, 0, 1, hashes, BLOCKS, 0, NULL, 0, &request),
          "pega_query");
    pega_completion hit = finish(client, request, "query");
    if (hit.count != BLOCKS) {
        fprintf(stderr, "%u of %u blocks are cached\n", (unsigned)hit.count, BLOCKS);
        return 1;
    }
    for (uint32_t at = 0; at < BLOCKS; at++) {
        blocks[at] = BLOCKS - 1 - at;
    }
    check(pega_load_in_steps(client, registration, 0, hit.lease, 0, blocks, BLOCKS, &after, LAYERS,
                             &request),
          "pega_load_in_steps");

    /*
     * The forward pass: the work on each layer waits, on the GPU, for that layer's blocks. It can
     * be submitted at once, and begins while later layers are still on their way.
     */
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        check(pega_stream_wait(client, request, layer + 1, stream), "pega_stream_wait");
        gpu(cuMemcpyDtoHAsync(host + layer * LAYER_BYTES, cache + layer * LAYER_BYTES, LAYER_BYTES,
                              stream),
            "cuMemcpyDtoHAsync");
    }
    gpu(cuStreamSynchronize(stream), "cuStreamSynchronize");

    /* A load that fails lets the stream go on, too: its completion tells. */
    pega_completion loaded = finish(client, request, "load");
    unsigned wrong = 0;
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        for (uint32_t block = 0; block < BLOCKS; block++) {
            const uint8_t *from =
                host + layer * LAYER_BYTES + (size_t)blocks[block] * BLOCK_BYTES;
            for (uint32_t at = 0; at < BLOCK_BYTES; at++) {
                wrong += from[at] != content(block, layer, at);
            }
        }
    }
    printf("loaded %u blocks in %u steps: ", (unsigned)loaded.count, LAYERS);
    printf(wrong == 0 ? "every byte is right\n" : "%u bytes are wrong\n", wrong);

    check(pega_unregister(client, registration), "pega_unregister");
    check(pega_disconnect(client), "pega_disconnect");
    gpu(cuMemFreeHost(pinned), "cuMemFreeHost");
    gpu(cuMemFree(cache), "cuMemFree");
    gpu(cuStreamDestroy(stream), "cuStreamDestroy");
    gpu(cuDevicePrimaryCtxRelease(device), "cuDevicePrimaryCtxRelease");
    return wrong == 0 ? 0 : 1;
}
