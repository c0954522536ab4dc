/*
 * Loads what save.c saved and compares every byte.
 *
 *   cc load.c -o load $(pkg-config --cflags --libs pegaflow)
 *   ./load [own]      own: memory of the process itself instead of memory shared with the daemon
 */
#include "common.h"

int main(int argc, char **argv)
{
    int shared = argc < 2 || strcmp(argv[1], "own") != 0;

    pega_options options;
    check(pega_options_init(&options, sizeof options), "pega_options_init");
    options.client_name = "example-load";
    pega_client *client = NULL;
    check(pega_connect(&options, &client), "pega_connect");

    uint8_t *memory = allocate(client, shared);
    uint32_t registration = register_memory(client, memory);

    /* One block more than was saved: the prefix ends before it. */
    pega_hash hashes[BLOCKS + 1];
    for (uint32_t block = 0; block <= BLOCKS; block++) {
        hashes[block] = name_of(block);
    }

    /* The cheap look, without the daemon: is it worth asking? */
    uint32_t hits = 0;
    check(pega_probe(client, registration, 0, hashes, BLOCKS + 1, &hits), "pega_probe");
    printf("probe: %u of %u blocks are cached\n", (unsigned)hits, BLOCKS + 1);

    /* The lease holds what it found until it is loaded, released or expired. */
    uint64_t request = 0;
    check(pega_query(client, registration, 0, 1, hashes, BLOCKS + 1, 0, NULL, 0, &request),
          "pega_query");
    pega_completion hit = finish(client, request, "query");
    printf("query: %u hits, then %s\n", (unsigned)hit.count, pega_reason_label(hit.reason));
    if (hit.count != BLOCKS) {
        fprintf(stderr, "expected %u hits: run the save example first\n", BLOCKS);
        return 1;
    }

    /* Into other blocks than they came from: backwards. */
    uint32_t blocks[BLOCKS];
    for (uint32_t at = 0; at < BLOCKS; at++) {
        blocks[at] = BLOCKS - 1 - at;
    }
    check(pega_load(client, registration, 0, hit.lease, 0, blocks, BLOCKS, &request), "pega_load");
    pega_completion done = finish(client, request, "load");
    printf("loaded %u blocks, %llu bytes\n", (unsigned)done.count,
           (unsigned long long)done.bytes);

    unsigned wrong = 0;
    for (uint32_t block = 0; block < BLOCKS; block++) {
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            const uint8_t *from =
                memory + ((size_t)layer * BLOCKS + blocks[block]) * BLOCK_BYTES;
            for (uint32_t at = 0; at < BLOCK_BYTES; at++) {
                wrong += from[at] != content(block, layer, at);
            }
        }
    }
    printf(wrong == 0 ? "every byte is right\n" : "%u bytes are wrong\n", wrong);

    check(pega_unregister(client, registration), "pega_unregister");
    release(client, memory, shared);
    check(pega_disconnect(client), "pega_disconnect");
    return wrong == 0 ? 0 : 1;
}
