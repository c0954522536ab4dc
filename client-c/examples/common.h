/* What save.c and load.c have in common: block names, block contents, the namespace. */
#ifndef EXAMPLE_COMMON_H
#define EXAMPLE_COMMON_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pegaflow.h"

#define BLOCK_BYTES 16384u /* of one layer */
#define LAYERS 2u
#define BLOCKS 64u

/* Ends the program if a call failed. */
static inline void check(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "%s: %s: %s\n", what, pega_status_label(result), pega_last_error());
        exit(1);
    }
}

/* A real engine hashes the tokens of the block and the hash of the block before. */
static inline pega_hash name_of(uint32_t block)
{
    pega_hash hash;
    memset(&hash, 0, sizeof hash);
    memcpy(hash.bytes, "example", 7);
    memcpy(hash.bytes + 8, &block, sizeof block);
    return hash;
}

/* Byte `at` of layer `layer` of the block called `block`. */
static inline uint8_t content(uint32_t block, uint32_t layer, uint32_t at)
{
    return (uint8_t)(block * 31u + layer * 7u + at % 251u);
}

/* Everything here, and the sizes of the segments, must be equal for blocks to be shared. */
static inline pega_namespace example_namespace(void)
{
    pega_namespace ns;
    memset(&ns, 0, sizeof ns);
    ns.size = sizeof ns;
    ns.block_tokens = 16;
    ns.model = "example/model";
    ns.dtype = "bfloat16";
    ns.kv_layout = "NHD";
    ns.hash_algorithm = "example-v1";
    return ns;
}

/*
 * Registers `memory` as LAYERS arrays of BLOCKS blocks, one after the other:
 *
 *   memory  | layer 0: block 0, block 1, ... | layer 1: block 0, block 1, ... |
 */
static inline uint32_t register_early(pega_client *client, uint8_t *memory)
{
    pega_namespace ns = example_namespace();
    pega_segment segments[LAYERS];
    memset(segments, 0, sizeof segments);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        segments[layer].size = sizeof segments[layer];
        segments[layer].address = memory + (size_t)layer * BLOCKS * BLOCK_BYTES;
        segments[layer].block_stride = BLOCK_BYTES;
        segments[layer].bytes = BLOCK_BYTES;
    }
    pega_group group;
    memset(&group, 0, sizeof group);
    group.size = sizeof group;
    group.num_blocks = BLOCKS;
    group.num_segments = LAYERS;
    group.segments = segments;

    pega_registration spec;
    memset(&spec, 0, sizeof spec);
    spec.size = sizeof spec;
    spec.instance = "example-engine";
    spec.ns = &ns;
    spec.world_size = 1;
    spec.rank = 0;
    spec.groups = &group;
    spec.num_groups = 1;

    uint32_t registration = 0;
    check(pega_register(client, &spec, &registration), "pega_register");
    return registration;
}

/* The same, and waits until there can be hits. */
static inline uint32_t register_memory(pega_client *client, uint8_t *memory)
{
    uint32_t registration = register_early(client, memory);
    check(pega_wait_ready(client, registration, 10000), "pega_wait_ready");
    return registration;
}

/* KV memory: shared with the daemon, or this process's own. */
static inline uint8_t *allocate(pega_client *client, int shared)
{
    size_t bytes = (size_t)LAYERS * BLOCKS * BLOCK_BYTES;
    void *memory = NULL;
    if (shared) {
        check(pega_alloc_host(client, bytes, &memory), "pega_alloc_host");
    } else {
        memory = calloc(1, bytes);
    }
    if (memory == NULL) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    return memory;
}

/* Frees what allocate() gave; no registration may use it any more. */
static inline void release(pega_client *client, uint8_t *memory, int shared)
{
    if (shared) {
        check(pega_free_host(client, memory), "pega_free_host");
    } else {
        free(memory);
    }
}

/* Waits for a request and ends the program unless it went well. */
static inline pega_completion finish(pega_client *client, uint64_t request, const char *what)
{
    pega_completion done;
    check(pega_wait(client, request, 10000, &done), what);
    if (done.status != PEGA_OK) {
        fprintf(stderr, "%s: %s\n", what, pega_status_text((int)done.status));
        exit(1);
    }
    return done;
}

#endif
