/*
 * A daemon that speaks protocol 1 and nothing else: `daemon SOCKET`.
 *
 * It serves one session after the other, in shared regions, and keeps what was saved from session
 * to session. An unknown message, or one that protocol 1 does not allow, ends it with a message on
 * standard error: what speaks to it must keep to protocol 1. SIGTERM ends it.
 */
#include "wire.h"

#include <signal.h>

enum { MAX_BLOCKS = 4096, MAX_LEASES = 256, MAX_REGIONS = 16, MAX_PARTS = 64, MAX_GROUPS = 4 };
enum { LEASE_TTL_MS = 30000, CHUNK_ITEMS = CHUNK_BYTES / 4, INDEX_BYTES = 3 * 4096 };

struct part {
    uint8_t *memory;
    uint64_t region_bytes, base, stride, bytes;
};

struct group {
    uint16_t number;
    uint32_t blocks;
    unsigned parts;
    struct part part[MAX_PARTS];
};

struct page {
    uint16_t group;
    uint8_t hash[32];
    uint8_t *bytes;
    uint64_t length;
};

struct lease {
    uint64_t id, key;
    uint16_t group;
    bool consumed, released;
    unsigned count;
    unsigned *pages;
};

struct list { /* the chunks of one request so far */
    uint64_t request_id;
    unsigned hashes, blocks;
    uint8_t hash[MAX_BLOCKS][32];
    uint32_t block[MAX_BLOCKS];
};

/* The cache: of all sessions. */
static struct page pages[MAX_BLOCKS];
static unsigned page_count;
static struct lease leases[MAX_LEASES];
static uint64_t last_lease;
static uint8_t boot_id[16];
static volatile sig_atomic_t stopping;

/* The session. */
static int sock;
static char text[MAX_MESSAGE_BYTES + 1];
static struct segment c2d, d2c;
static int session_bell, client_bell;
static uint64_t popped, posted;
static uint32_t rung, epoch;
static struct {
    uint64_t id;
    uint8_t *memory;
    uint64_t bytes;
} regions[MAX_REGIONS];
static struct group groups[MAX_GROUPS];
static unsigned group_count;
static uint32_t registration;
static bool registered;
static struct list list;

static void stop(int signal) {
    (void)signal;
    stopping = 1;
}

/* ---- messages ---- */

static void reply(const char *message) { send_packet(sock, message, NULL, 0); }

static void reply_done(uint64_t seq) {
    char message[64];
    snprintf(message, sizeof(message), "{\"type\":\"done\",\"seq\":%llu}",
             (unsigned long long)seq);
    reply(message);
}

/* An index of one bucket line and one entry, both empty: every probe misses. */
static int make_index(void) {
    struct {
        char magic[8];
        uint32_t layout_major, layout_minor;
        uint8_t boot_id[16];
        uint64_t seed, bucket_count, entry_capacity, buckets_offset, entries_offset, total_bytes;
        uint32_t line_bytes, entry_bytes, slots_per_line, max_probe_lines;
        uint64_t feature_bits, reserved[3];
    } header = {.magic = {'P', 'E', 'G', 'A', 'I', 'N', 'D', 'X'}, .layout_major = 1, .seed = 99,
                .bucket_count = 1, .entry_capacity = 1, .buckets_offset = 4096,
                .entries_offset = 8192, .total_bytes = INDEX_BYTES, .line_bytes = 64,
                .entry_bytes = 64, .slots_per_line = 7, .max_probe_lines = 1};
    _Static_assert(sizeof(header) == 128, "header of the index");
    memcpy(header.boot_id, boot_id, 16);
    int fd = memfd_create("frozen-index", MFD_CLOEXEC);
    EXPECT(fd >= 0 && ftruncate(fd, INDEX_BYTES) == 0, "index: %s", strerror(errno));
    EXPECT(pwrite(fd, &header, sizeof(header), 0) == sizeof(header), "index");
    return fd;
}

static bool open_session(void) {
    int fds[MAX_MESSAGE_FDS], bell[2];
    unsigned count;
    if (!receive_packet(sock, text, fds, &count))
        return false;
    EXPECT(text_is(text, "type", "hello") && count == 1, "%s instead of hello", text);
    if (number(text, "protocol_min") > PROTOCOL || number(text, "protocol_max") < PROTOCOL) {
        reply("{\"type\":\"refused\",\"status\":\"version_mismatch\","
              "\"message\":\"this daemon speaks protocol 1 only: upgrade the older one\"}");
        return false;
    }
    EXPECT(member(text, "client_version") && member(text, "client_name"), "%s", text);
    c2d = open_segment(fds[0], C2D_MAGIC, number(text, "c2d_bytes"));
    uint32_t slots = (uint32_t)number(text, "completion_slots");
    d2c = make_segment("frozen-d2c", D2C_MAGIC, slots, 4, boot_id);
    *(uint32_t *)(void *)(d2c.memory + STATE_OFFSET) = STATE_ACTIVE;
    session_bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    EXPECT(session_bell >= 0 && pipe2(bell, O_CLOEXEC | O_NONBLOCK) == 0, "bells");
    client_bell = bell[1];
    char id[33];
    for (unsigned i = 0; i < 16; i++)
        snprintf(id + i * 2, 3, "%02x", boot_id[i]);
    char welcome[512];
    snprintf(welcome, sizeof(welcome),
             "{\"type\":\"welcome\",\"protocol\":1,\"daemon_version\":\"frozen 1\","
             "\"boot_id\":\"%s\",\"node\":\"frozen\",\"session\":1,\"daemon_pid\":%d,"
             "\"d2c_bytes\":%zu,\"index_bytes\":%d,\"lease_ttl_ms\":%d}",
             id, getpid(), d2c.bytes, INDEX_BYTES, LEASE_TTL_MS);
    int gifts[4] = {d2c.fd, session_bell, bell[0], make_index()};
    send_packet(sock, welcome, gifts, 4);
    close(bell[0]);
    close(gifts[3]);
    return true;
}

static void add_region(const char *message, int fd) {
    unsigned free_place = 0;
    while (free_place < MAX_REGIONS && regions[free_place].memory)
        free_place++;
    EXPECT(free_place < MAX_REGIONS, "too many regions");
    uint64_t bytes = number(message, "bytes");
    int seals = fcntl(fd, F_GET_SEALS);
    EXPECT((seals & REGION_SEALS) == REGION_SEALS, "seals %#x", seals);
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    EXPECT(memory != MAP_FAILED, "mmap: %s", strerror(errno));
    close(fd);
    regions[free_place].id = number(message, "region");
    regions[free_place].memory = memory;
    regions[free_place].bytes = bytes;
}

static bool is_used(uint64_t id) {
    for (unsigned i = 0; registered && i < MAX_REGIONS; i++)
        for (unsigned g = 0; regions[i].memory && regions[i].id == id && g < group_count; g++)
            for (unsigned p = 0; p < groups[g].parts; p++)
                if (groups[g].part[p].memory == regions[i].memory)
                    return true;
    return false;
}

static void remove_region(uint64_t id) {
    for (unsigned i = 0; i < MAX_REGIONS; i++)
        if (regions[i].memory && regions[i].id == id) {
            munmap(regions[i].memory, regions[i].bytes);
            regions[i].memory = NULL;
        }
}

static void read_part(struct part *part, const char *segment) {
    const char *memory = member(segment, "memory");
    EXPECT(memory && *memory == '{', "this daemon serves shared regions only: %s", segment);
    uint64_t id = number(memory, "region");
    for (unsigned i = 0; i < MAX_REGIONS; i++)
        if (regions[i].memory && regions[i].id == id) {
            part->memory = regions[i].memory;
            part->region_bytes = regions[i].bytes;
        }
    EXPECT(part->memory, "unknown region in %s", segment);
    part->base = number(segment, "base");
    part->stride = number(segment, "block_stride");
    part->bytes = number(segment, "bytes");
}

static void register_client(const char *message) {
    const char *spec = member(message, "registration");
    const char *name = member(spec, "namespace");
    EXPECT(member(name, "model") && member(name, "dtype") && member(name, "hash_algorithm") &&
               number(name, "block_tokens") > 0,
           "%s", message);
    EXPECT(number(spec, "world_size") == 1 && member(spec, "instance"), "%s", message);
    EXPECT(text_is(spec, "mode", "read_write"), "%s", message);
    const char *described = member(spec, "groups"), *segment, *group;
    memset(groups, 0, sizeof(groups));
    for (group_count = 0; (group = element(described, group_count)); group_count++) {
        EXPECT(group_count < MAX_GROUPS, "too many groups");
        struct group *into = &groups[group_count];
        into->number = (uint16_t)number(group, "group");
        into->blocks = (uint32_t)number(group, "num_blocks");
        const char *segments = member(group, "segments");
        for (; (segment = element(segments, into->parts)); into->parts++) {
            EXPECT(into->parts < MAX_PARTS, "too many segments");
            read_part(&into->part[into->parts], segment);
        }
    }
    char answer[96];
    registered = true;
    snprintf(answer, sizeof(answer), "{\"type\":\"registered\",\"seq\":%llu,\"registration\":%u}",
             (unsigned long long)number(message, "seq"), ++registration);
    reply(answer);
    snprintf(answer, sizeof(answer), "{\"type\":\"ready\",\"registration\":%u,\"namespace\":3}",
             registration);
    reply(answer);
}

/* False at the end of the session. */
static bool take_message(void) {
    int fds[MAX_MESSAGE_FDS];
    unsigned count;
    if (!receive_packet(sock, text, fds, &count))
        return false;
    bool adds = text_is(text, "type", "add_region");
    EXPECT(count == (adds ? 1 : 0), "%u descriptors with %s", count, text);
    if (text_is(text, "type", "register")) {
        register_client(text);
        return true;
    }
    if (adds)
        add_region(text, fds[0]);
    else if (text_is(text, "type", "remove_region")) {
        if (is_used(number(text, "region"))) {
            char answer[160];
            snprintf(answer, sizeof(answer),
                     "{\"type\":\"failed\",\"seq\":%llu,\"status\":\"invalid_argument\","
                     "\"message\":\"a registration uses the region\"}",
                     (unsigned long long)number(text, "seq"));
            reply(answer);
            return true;
        }
        remove_region(number(text, "region"));
    } else if (text_is(text, "type", "unregister")) {
        EXPECT(registered && number(text, "registration") == registration, "%s", text);
        registered = false;
    } else
        DIE("%s is not a word of protocol 1", text);
    reply_done(number(text, "seq"));
    return true;
}

/* ---- requests ---- */

static struct page *find_page(uint16_t group, const uint8_t *hash) {
    for (unsigned i = 0; i < page_count; i++)
        if (pages[i].group == group && memcmp(pages[i].hash, hash, 32) == 0)
            return &pages[i];
    return NULL;
}

static struct group *find_group(uint16_t wanted) {
    for (unsigned i = 0; i < group_count; i++)
        if (groups[i].number == wanted)
            return &groups[i];
    DIE("unknown group %u", wanted);
}

static void copy_block(struct group *group, uint32_t block, uint8_t *page, bool save) {
    EXPECT(block < group->blocks, "block %u of %u", block, group->blocks);
    for (unsigned i = 0; i < group->parts; i++) {
        struct part *part = &group->part[i];
        uint64_t at = part->base + block * part->stride;
        EXPECT(at + part->bytes <= part->region_bytes, "block %u lies outside", block);
        if (save)
            memcpy(page, part->memory + at, part->bytes);
        else
            memcpy(part->memory + at, page, part->bytes);
        page += part->bytes;
    }
}

static void read_blocks(const uint8_t *at, uint32_t bytes, bool runs, uint32_t count) {
    uint32_t word[2];
    for (unsigned i = 0; i < count;) {
        memcpy(word, at, runs ? 8 : 4);
        uint32_t step = runs ? word[1] : 1;
        EXPECT(step > 0 && i + step <= count && list.blocks + step <= MAX_BLOCKS, "bad runs");
        for (uint32_t n = 0; n < step; n++)
            list.block[list.blocks++] = word[0] + n;
        i += step;
        at += runs ? 8 : 4;
        EXPECT(bytes >= (runs ? 8u : 4u), "list too short");
        bytes -= runs ? 8 : 4;
    }
    EXPECT(bytes == 0, "list too long");
}

static void read_chunk(const struct submission *from) {
    if (list.request_id != from->request_id) {
        list.request_id = from->request_id;
        list.hashes = list.blocks = 0;
    }
    uint64_t end = (uint64_t)from->payload_offset + from->payload_bytes;
    EXPECT(end <= (uint64_t)c2d.header.arena_chunks * CHUNK_BYTES, "payload outside the arena");
    EXPECT(from->count <= CHUNK_ITEMS && from->payload_bytes <= CHUNK_BYTES, "a long chunk");
    static uint8_t chunk[CHUNK_BYTES];
    memcpy(chunk, c2d.memory + c2d.header.arena_offset + from->payload_offset,
           from->payload_bytes);
    uint32_t hash_bytes = from->op == LOAD ? 0 : from->count * 32;
    EXPECT(hash_bytes <= from->payload_bytes, "hashes do not fit");
    for (unsigned i = 0; i < hash_bytes / 32; i++) {
        EXPECT(list.hashes < MAX_BLOCKS, "a long list");
        memcpy(list.hash[list.hashes++], chunk + i * 32, 32);
    }
    if (from->op != QUERY)
        read_blocks(chunk + hash_bytes, from->payload_bytes - hash_bytes,
                    from->flags & FLAG_BLOCK_RUNS, from->count);
}

static void save(const struct submission *request, struct completion *done) {
    struct group *group = find_group(request->group);
    uint64_t length = 0;
    for (unsigned i = 0; i < group->parts; i++)
        length += group->part[i].bytes;
    for (unsigned i = 0; i < list.hashes; i++) {
        if (find_page(request->group, list.hash[i])) {
            done->skipped++;
            continue;
        }
        EXPECT(page_count < MAX_BLOCKS, "the cache is full");
        struct page *page = &pages[page_count++];
        page->group = request->group;
        page->length = length;
        memcpy(page->hash, list.hash[i], 32);
        page->bytes = malloc(length);
        EXPECT(page->bytes, "no memory");
        copy_block(group, list.block[i], page->bytes, true);
        done->count++;
        done->bytes += length;
    }
}

static void query(const struct submission *request, struct completion *done) {
    unsigned hits[MAX_BLOCKS], count = 0;
    uint8_t bitmap[MAX_BLOCKS / 8] = {0};
    for (unsigned i = 0; i < list.hashes; i++) {
        struct page *page = find_page(request->group, list.hash[i]);
        if (page) {
            hits[count++] = (unsigned)(page - pages);
            bitmap[i / 8] |= (uint8_t)(1 << i % 8);
            continue;
        }
        done->reason = REASON_ABSENT;
        if (request->group == 0)
            break;
    }
    if (request->group != 0) {
        uint64_t bytes = (list.hashes + 63) / 64 * 8;
        EXPECT(request->arg1 + bytes <= 4 * CHUNK_BYTES, "the result lies outside its arena");
        memcpy(d2c.memory + d2c.header.arena_offset + request->arg1, bitmap, bytes);
    }
    done->count = count;
    done->arg0 = request->arg2 ? request->arg2 : LEASE_TTL_MS;
    if (count == 0)
        return;
    /* The same question again: the same lease. */
    for (unsigned i = 0; i < MAX_LEASES; i++) {
        struct lease *had = &leases[i];
        bool live = had->id && !had->consumed && !had->released;
        if (live && had->key == request->arg0 && had->group == request->group &&
            had->count == count && memcmp(had->pages, hits, count * sizeof(*hits)) == 0) {
            done->lease = had->id;
            return;
        }
    }
    struct lease *lease = &leases[++last_lease % MAX_LEASES];
    free(lease->pages);
    *lease = (struct lease){.key = request->arg0, .group = request->group};
    lease->pages = malloc(count * sizeof(*hits));
    EXPECT(lease->pages, "no memory");
    memcpy(lease->pages, hits, count * sizeof(*hits));
    lease->count = count;
    done->lease = lease->id = last_lease;
}

static struct lease *find_lease(uint64_t id) {
    struct lease *lease = &leases[id % MAX_LEASES];
    return id != 0 && lease->id == id && !lease->released ? lease : NULL;
}

static void load(const struct submission *request, struct completion *done) {
    struct group *group = find_group(request->group);
    struct lease *lease = find_lease(request->arg0);
    done->status = !lease ? UNKNOWN_LEASE : lease->consumed ? LEASE_CONSUMED : OK;
    if (lease && request->arg1 + list.blocks > lease->count)
        done->status = TOO_MANY;
    for (unsigned i = 0; done->status == OK && i < list.blocks; i++)
        if (list.block[i] >= group->blocks) {
            done->status = BLOCK_OUT_OF_RANGE;
            done->arg0 = list.block[i];
        }
    for (unsigned i = 1; done->status == OK && i < list.blocks; i++)
        for (unsigned before = 0; before < i; before++)
            if (list.block[before] == list.block[i])
                done->status = DUPLICATE_BLOCK;
    if (done->status != OK)
        return;
    for (unsigned i = 0; i < list.blocks; i++) {
        struct page *page = &pages[lease->pages[request->arg1 + i]];
        copy_block(group, list.block[i], page->bytes, false);
        done->bytes += page->length;
        done->count++;
    }
    lease->consumed = true;
}

static void take_request(const struct submission *request) {
    EXPECT(request->op >= NOP && request->op <= CANCEL, "operation %u", request->op);
    EXPECT((request->flags & ~(FLAG_MORE | FLAG_BLOCK_RUNS)) == 0, "flags %#x", request->flags);
    EXPECT(request->request_id != 0, "request id 0");
    bool has_list = request->op == QUERY || request->op == LOAD || request->op == SAVE;
    EXPECT(has_list || (!request->payload_bytes && !request->total), "an unwanted list");
    struct completion done = {.op = request->op, .request_id = request->request_id};
    if (has_list) {
        read_chunk(request);
        if (request->flags & FLAG_MORE)
            return;
        unsigned items = list.hashes > list.blocks ? list.hashes : list.blocks;
        EXPECT(items == request->total, "%u items instead of %u", items, request->total);
        list.request_id = 0;
    }
    if (has_list && (!registered || request->registration != registration))
        done.status = UNKNOWN_REGISTRATION;
    else if (request->op == SAVE)
        save(request, &done);
    else if (request->op == QUERY)
        query(request, &done);
    else if (request->op == LOAD)
        load(request, &done);
    else if (request->op == CANCEL)
        done.status = UNKNOWN_REQUEST;
    else if (request->op != NOP && !find_lease(request->arg0))
        done.status = UNKNOWN_LEASE;
    else if (request->op == RELEASE)
        find_lease(request->arg0)->released = true;
    EXPECT(ring_push(&d2c, &c2d, &posted, &done), "the client has exceeded its credit");
    if (bell_needed(&c2d, &rung))
        (void)!write(client_bell, "!", 1);
}

static void serve(void) {
    if (!open_session())
        return;
    struct submission request;
    uint64_t rings;
    for (;;) {
        while (ring_pop(&d2c, &c2d, &popped, &request))
            take_request(&request);
        bell_arm(&d2c, ++epoch);
        bool more = ring_pop(&d2c, &c2d, &popped, &request);
        struct pollfd both[] = {{.fd = sock, .events = POLLIN},
                                {.fd = session_bell, .events = POLLIN}};
        if (!more)
            (void)poll(both, 2, 100);
        bell_arm(&d2c, 0);
        if (more)
            take_request(&request);
        (void)!read(session_bell, &rings, 8);
        if (both[0].revents && !take_message())
            return;
        if (stopping)
            return;
    }
}

static void end_session(void) {
    registered = false;
    for (unsigned i = 0; i < MAX_REGIONS; i++)
        if (regions[i].memory)
            remove_region(regions[i].id);
    if (c2d.memory) {
        munmap(c2d.memory, c2d.bytes);
        munmap(d2c.memory, d2c.bytes);
        close(c2d.fd);
        close(d2c.fd);
        close(session_bell);
        close(client_bell);
    }
    memset(&c2d, 0, sizeof(c2d));
    popped = posted = list.request_id = 0;
    rung = epoch = 0;
    close(sock);
}

int main(int argc, char **argv) {
    EXPECT(argc == 2, "usage: daemon SOCKET");
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    int random = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    EXPECT(read(random, boot_id, 16) == 16, "random numbers");
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", argv[1]);
    EXPECT(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0, "bind %s: %s",
           argv[1], strerror(errno));
    EXPECT(listen(listener, 8) == 0, "listen");
    while (!stopping) {
        sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (sock < 0)
            continue;
        serve();
        end_session();
    }
    unlink(argv[1]);
    return 0;
}
