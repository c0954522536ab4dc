/*
 * An engine that outlives its daemon: it starts without one, computes what is not cached, and goes
 * on whatever happens to the daemon, until its standard input ends.
 *
 *   cc outlive.c -o outlive $(pkg-config --cflags --libs pegaflow)
 *
 * Every step asks for a few blocks, loads what is cached, computes the rest, checks every byte, and
 * saves it. It prints a line with its counters when a step ends in another way than the one before.
 */
#include <poll.h>

#include "common.h"

#define STEP_BLOCKS 8u

static void count_line(void *user, uint32_t level, const char *line)
{
    (void)level;
    ++*(unsigned *)user;
    fprintf(stderr, "%s\n", line);
}

static uint8_t *place(uint8_t *memory, uint32_t layer, uint32_t block)
{
    return memory + ((size_t)layer * BLOCKS + block) * BLOCK_BYTES;
}

/* What the model would do. */
static void compute(uint8_t *memory, uint32_t block, uint32_t name)
{
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        uint8_t *bytes = place(memory, layer, block);
        for (uint32_t at = 0; at < BLOCK_BYTES; at++) {
            bytes[at] = content(name, layer, at);
        }
    }
}

static int is_right(uint8_t *memory, uint32_t block, uint32_t name)
{
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        const uint8_t *bytes = place(memory, layer, block);
        for (uint32_t at = 0; at < BLOCK_BYTES; at++) {
            if (bytes[at] != content(name, layer, at)) {
                return 0;
            }
        }
    }
    return 1;
}

/*
 * Waits for a request. A bound that runs out is no answer: its blocks are not ours yet. Only a
 * daemon that is stopped makes this take long.
 */
static pega_completion await(pega_client *client, uint64_t request)
{
    pega_completion done;
    int result;
    do {
        result = pega_wait(client, request, 1000, &done);
    } while (result == -PEGA_TIMEOUT);
    check(result, "pega_wait");
    return done;
}

/* Brings the blocks 0..STEP_BLOCKS-1 into memory; returns how many came from the cache. */
static uint32_t bring(pega_client *client, uint32_t registration, uint8_t *memory, uint64_t key)
{
    pega_hash names[STEP_BLOCKS];
    uint32_t blocks[STEP_BLOCKS];
    for (uint32_t at = 0; at < STEP_BLOCKS; at++) {
        names[at] = name_of(at);
        blocks[at] = at;
    }
    uint64_t request = 0;
    check(pega_query(client, registration, 0, key, names, STEP_BLOCKS, 0, NULL, 0, &request),
          "pega_query");
    pega_completion hit = await(client, request);
    uint32_t loaded = 0;
    if (hit.status == PEGA_OK && hit.count > 0) {
        /* A load that is not accepted has touched nothing. */
        if (pega_load(client, registration, 0, hit.lease, 0, blocks, hit.count, &request) == 0) {
            pega_completion done = await(client, request);
            loaded = hit.count;
            if (done.status != PEGA_OK) {
                uint32_t lost[STEP_BLOCKS];
                size_t count = 0;
                check(pega_unloaded_blocks(client, request, lost, STEP_BLOCKS, &count),
                      "pega_unloaded_blocks");
                for (size_t at = 0; at < count; at++) {
                    compute(memory, lost[at], lost[at]);
                }
                loaded -= (uint32_t)count;
            }
        }
    }
    for (uint32_t block = 0; block < STEP_BLOCKS; block++) {
        if (block >= hit.count || loaded == 0) {
            compute(memory, block, block);
        }
        if (!is_right(memory, block, block)) {
            fprintf(stderr, "block %u is wrong\n", block);
            exit(2);
        }
    }
    if (pega_save(client, registration, 0, names, blocks, STEP_BLOCKS, &request) == 0) {
        await(client, request);
    }
    return loaded;
}

int main(void)
{
    unsigned lines = 0;
    pega_options options;
    check(pega_options_init(&options, sizeof options), "pega_options_init");
    options.start_without_daemon = PEGA_ON;
    options.log = count_line;
    options.log_user = &lines;
    pega_client *client = NULL;
    check(pega_connect(&options, &client), "pega_connect");
    uint8_t *memory = allocate(client, 1);
    uint32_t registration = register_early(client, memory);

    uint32_t before = UINT32_MAX;
    struct pollfd input = {.fd = 0, .events = POLLIN, .revents = 0};
    for (uint64_t step = 1; poll(&input, 1, 5) == 0; step++) {
        for (uint32_t block = 0; block < STEP_BLOCKS; block++) {
            memset(place(memory, 0, block), 0xA5, BLOCK_BYTES);
        }
        uint32_t loaded = bring(client, registration, memory, step);
        if (loaded != before) {
            pega_stats stats;
            memset(&stats, 0, sizeof stats);
            stats.size = sizeof stats;
            check(pega_get_stats(client, &stats), "pega_get_stats");
            printf("loaded %u, away %llu times\n", loaded, (unsigned long long)stats.disconnects);
            fflush(stdout);
            before = loaded;
        }
    }
    check(pega_disconnect(client), "pega_disconnect");
    return lines > 0 ? 0 : 3;
}
