/*
 * Saves BLOCKS blocks to the node's daemon; load.c, another process, loads them back.
 *
 *   cc save.c -o save $(pkg-config --cflags --libs pegaflow)
 *   ./save [own]      own: memory of the process itself instead of memory shared with the daemon
 */
#include "common.h"

int main(int argc, char **argv)
{
    int shared = argc < 2 || strcmp(argv[1], "own") != 0;

    pega_options options;
    check(pega_options_init(&options, sizeof options), "pega_options_init");
    options.client_name = "example-save";
    pega_client *client = NULL;
    check(pega_connect(&options, &client), "pega_connect");

    uint8_t *memory = allocate(client, shared);
    uint32_t registration = register_memory(client, memory);

    /* The forward pass of a real engine fills the blocks. */
    pega_hash hashes[BLOCKS];
    uint32_t blocks[BLOCKS];
    for (uint32_t block = 0; block < BLOCKS; block++) {
        hashes[block] = name_of(block);
        blocks[block] = block;
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            uint8_t *to = memory + ((size_t)layer * BLOCKS + block) * BLOCK_BYTES;
            for (uint32_t at = 0; at < BLOCK_BYTES; at++) {
                to[at] = content(block, layer, at);
            }
        }
    }

    uint64_t request = 0;
    check(pega_save(client, registration, 0, hashes, blocks, BLOCKS, &request), "pega_save");
    pega_completion done = finish(client, request, "save");
    printf("saved %u blocks, %u were there already, %u dropped, %llu bytes copied\n",
           (unsigned)done.count, (unsigned)done.skipped, (unsigned)done.dropped,
           (unsigned long long)done.bytes);

    check(pega_unregister(client, registration), "pega_unregister");
    release(client, memory, shared);
    check(pega_disconnect(client), "pega_disconnect");
    return done.dropped == 0 ? 0 : 1;
}
