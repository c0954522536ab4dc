/*
 * A complete client of protocol 1: `client SOCKET [wait]`.
 *
 * It goes through every message and every operation of the protocol, checks each byte that it
 * loads, and ends with 0 if every answer was the documented one. With `wait` it then says
 * "waiting" and listens until the daemon closes the session, which must happen in words of
 * protocol 1.
 */
#include "wire.h"

enum {
    SLOTS = 16,
    CHUNKS = 4,
    COMPLETION_SLOTS = 16,
    BLOCKS = 16,
    SEGMENT = 4096, /* bytes of a block in one segment */
    LAYERS = 2,
    REGION_BYTES = BLOCKS * SEGMENT * LAYERS,
    ANSWER_MS = 30000
};

static int sock;
static char text[MAX_MESSAGE_BYTES + 1];
static struct segment c2d, d2c;
static int daemon_bell, own_bell;
static uint64_t pushed, popped, last_request;
static uint32_t rung, epoch;
static uint8_t *region;

static void await(int fd, const char *what) {
    struct pollfd one = {.fd = fd, .events = POLLIN};
    int ready;
    do {
        ready = poll(&one, 1, ANSWER_MS);
    } while (ready < 0 && errno == EINTR);
    EXPECT(ready == 1, "%s did not come", what);
}

static void expect_message(const char *type) {
    int fds[MAX_MESSAGE_FDS];
    unsigned count;
    await(sock, type);
    EXPECT(receive_packet(sock, text, fds, &count), "the daemon left instead of %s", type);
    EXPECT(count == 0, "%u descriptors with %s", count, type);
    EXPECT(text_is(text, "type", type), "%s instead of %s", text, type);
}

static void say(const char *message) { send_packet(sock, message, NULL, 0); }

/* ---- requests ---- */

static struct submission request(enum op op, uint16_t group, uint32_t registration) {
    struct submission submission = {.op = op, .group = group, .registration = registration};
    submission.request_id = ++last_request;
    return submission;
}

static void push(const struct submission *submission) {
    EXPECT(ring_push(&c2d, &d2c, &pushed, submission), "the submission ring is full");
    uint64_t one = 1;
    if (bell_needed(&d2c, &rung))
        EXPECT(write(daemon_bell, &one, 8) == 8, "ringing: %s", strerror(errno));
}

/* The next completion: asleep on the bell, as the protocol wants it. */
static struct completion answer(const struct submission *to) {
    struct completion completion;
    while (!ring_pop(&c2d, &d2c, &popped, &completion)) {
        bell_arm(&c2d, ++epoch);
        if (!ring_pop(&c2d, &d2c, &popped, &completion)) {
            char rings[64];
            await(own_bell, "a completion");
            EXPECT(read(own_bell, rings, sizeof(rings)) > 0, "the bell");
            bell_arm(&c2d, 0);
            continue;
        }
        bell_arm(&c2d, 0);
        break;
    }
    EXPECT(completion.request_id == to->request_id && completion.op == to->op,
           "request %llu of operation %u was answered for %llu of %u",
           (unsigned long long)to->request_id, to->op, (unsigned long long)completion.request_id,
           completion.op);
    return completion;
}

static struct completion submit(const struct submission *submission) {
    push(submission);
    return answer(submission);
}

static void expect_status(const struct submission *submission, enum status wanted) {
    struct completion completion = submit(submission);
    EXPECT(completion.status == wanted, "operation %u: status %u instead of %u", submission->op,
           completion.status, wanted);
}

static uint8_t *chunk(unsigned number) {
    return c2d.memory + c2d.header.arena_offset + number * CHUNK_BYTES;
}

/* A 32-byte hash of its own for each group and number. */
static void put_hash(uint8_t *at, unsigned group, unsigned number) {
    memset(at, 0x5a, 32);
    at[0] = (uint8_t)number;
    at[1] = (uint8_t)group;
    at[31] = (uint8_t)~number;
}

static void put_u32(uint8_t *at, uint32_t value) { memcpy(at, &value, 4); }

/* Hashes `first..first+count` of a group, then their blocks as single ids. */
static void list_save(struct submission *submission, unsigned in, unsigned first, unsigned count,
                      uint32_t block) {
    uint8_t *at = chunk(in);
    for (unsigned i = 0; i < count; i++) {
        put_hash(at + i * 32, submission->group, first + i);
        put_u32(at + count * 32 + i * 4, block + i);
    }
    submission->payload_offset = in * CHUNK_BYTES;
    submission->payload_bytes = count * 36;
    submission->count = count;
}

static struct submission query(uint16_t group, uint32_t registration, unsigned count,
                               uint64_t key) {
    struct submission submission = request(QUERY, group, registration);
    for (unsigned i = 0; i < count; i++)
        put_hash(chunk(0) + i * 32, group, i);
    submission.payload_bytes = count * 32;
    submission.count = submission.total = count;
    submission.arg0 = key;
    return submission;
}

static struct submission load(uint16_t group, uint32_t registration, uint64_t lease,
                              const uint32_t *blocks, unsigned count) {
    struct submission submission = request(LOAD, group, registration);
    memcpy(chunk(0), blocks, count * 4);
    submission.payload_bytes = count * 4;
    submission.count = submission.total = count;
    submission.arg0 = lease;
    return submission;
}

/* ---- KV memory ---- */

static uint8_t *block_bytes(unsigned layer, unsigned block) {
    return region + ((size_t)layer * BLOCKS + block) * SEGMENT;
}

static uint8_t byte_of(unsigned group, unsigned name, unsigned layer, unsigned at) {
    return (uint8_t)(group * 31 + name * 7 + layer * 3 + at + at / 251);
}

static void compute(unsigned group, unsigned name, unsigned block) {
    for (unsigned layer = 0; layer < LAYERS; layer++)
        for (unsigned at = 0; at < SEGMENT; at++)
            block_bytes(layer, block)[at] = byte_of(group, name, layer, at);
}

static void verify(unsigned group, unsigned name, unsigned block) {
    for (unsigned layer = 0; layer < LAYERS; layer++)
        for (unsigned at = 0; at < SEGMENT; at++)
            EXPECT(block_bytes(layer, block)[at] == byte_of(group, name, layer, at),
                   "wrong byte %u of layer %u of block %u", at, layer, block);
}

/* ---- the steps ---- */

static void connect_to(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    EXPECT(connect(sock, (struct sockaddr *)&address, sizeof(address)) == 0, "connect to %s: %s",
           path, strerror(errno));
}

static void open_session(void) {
    c2d = make_segment("frozen-c2d", C2D_MAGIC, SLOTS, CHUNKS, NULL);
    char hello[512];
    snprintf(hello, sizeof(hello),
             "{\"type\":\"hello\",\"protocol_min\":1,\"protocol_max\":1,"
             "\"client_version\":\"frozen 1\",\"client_name\":\"frozen\","
             "\"c2d_bytes\":%zu,\"completion_slots\":%d}",
             c2d.bytes, COMPLETION_SLOTS);
    send_packet(sock, hello, &c2d.fd, 1);
    int fds[MAX_MESSAGE_FDS];
    unsigned count;
    await(sock, "welcome");
    EXPECT(receive_packet(sock, text, fds, &count), "the daemon left");
    EXPECT(text_is(text, "type", "welcome"), "%s instead of welcome", text);
    EXPECT(count == 4, "%u descriptors with welcome", count);
    EXPECT(number(text, "protocol") == PROTOCOL, "protocol %llu",
           (unsigned long long)number(text, "protocol"));
    d2c = open_segment(fds[0], D2C_MAGIC, number(text, "d2c_bytes"));
    EXPECT(d2c.header.slots == COMPLETION_SLOTS, "completion slots");
    EXPECT(d2c.header.session_id == number(text, "session"), "session id");
    char boot_id[33];
    for (unsigned i = 0; i < 16; i++)
        snprintf(boot_id + i * 2, 3, "%02x", d2c.header.boot_id[i]);
    EXPECT(text_is(text, "boot_id", boot_id), "boot id %s in the segment, %s", boot_id, text);
    EXPECT(number(text, "lease_ttl_ms") > 0 && number(text, "daemon_pid") > 0, "%s", text);
    EXPECT(member(text, "node") && member(text, "daemon_version"), "%s", text);
    EXPECT(load32(&d2c, STATE_OFFSET) == STATE_ACTIVE, "session state");
    daemon_bell = fds[1];
    own_bell = fds[2];
    struct stat index;
    EXPECT(fstat(fds[3], &index) == 0, "the index");
    EXPECT((uint64_t)index.st_size == number(text, "index_bytes"), "size of the index");
}

static uint32_t register_memory(void) {
    int fd = memfd_create("frozen-kv", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    EXPECT(fd >= 0 && ftruncate(fd, REGION_BYTES) == 0, "memfd: %s", strerror(errno));
    region = mmap(NULL, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    EXPECT(region != MAP_FAILED && fcntl(fd, F_ADD_SEALS, REGION_SEALS) == 0, "region");
    char message[2048];
    snprintf(message, sizeof(message),
             "{\"type\":\"add_region\",\"seq\":1,\"region\":7,\"bytes\":%d}", REGION_BYTES);
    send_packet(sock, message, &fd, 1);
    expect_message("done");
    EXPECT(number(text, "seq") == 1, "%s", text);
    char group[512], groups[1200];
    size_t used = 0;
    for (int number = 0; number < 2; number++) {
        int step = SEGMENT;
        snprintf(group, sizeof(group),
                 "{\"group\":%d,\"num_blocks\":%d,\"segments\":["
                 "{\"memory\":{\"region\":7},\"base\":0,\"block_stride\":%d,\"bytes\":%d},"
                 "{\"memory\":{\"region\":7},\"base\":%d,\"block_stride\":%d,\"bytes\":%d}]}",
                 number, BLOCKS, step, step, BLOCKS * SEGMENT, step, step);
        used += (size_t)snprintf(groups + used, sizeof(groups) - used, "%s%s", used ? "," : "",
                                 group);
    }
    /* A member that nobody knows is ignored. */
    snprintf(message, sizeof(message),
             "{\"type\":\"register\",\"seq\":2,\"unheard_of\":[1,{\"a\":2}],\"registration\":"
             "{\"instance\":\"frozen\",\"namespace\":{\"model\":\"frozen/model\","
             "\"dtype\":\"bfloat16\",\"hash_algorithm\":\"test\",\"block_tokens\":16},"
             "\"world_size\":1,\"rank\":0,\"mode\":\"read_write\",\"groups\":[%s]}}",
             groups);
    say(message);
    expect_message("registered");
    EXPECT(number(text, "seq") == 2, "%s", text);
    uint32_t registration = (uint32_t)number(text, "registration");
    expect_message("ready");
    EXPECT(number(text, "registration") == registration, "%s", text);
    EXPECT(member(text, "namespace"), "%s", text);
    return registration;
}

static void save_blocks(uint32_t registration) {
    for (unsigned name = 0; name < 6; name++)
        compute(0, name, name);
    /* A list in two chunks, all but the last flagged MORE, the second one's blocks as a run. */
    struct submission first = request(SAVE, 0, registration);
    first.total = 6;
    struct submission second = first;
    list_save(&first, 0, 0, 4, 0);
    first.flags = FLAG_MORE;
    list_save(&second, 1, 4, 2, 4);
    put_u32(chunk(1) + 2 * 32, 4);
    put_u32(chunk(1) + 2 * 32 + 4, 2);
    second.payload_bytes = 2 * 32 + 8;
    second.flags = FLAG_BLOCK_RUNS;
    push(&first);
    struct completion done = submit(&second);
    EXPECT(done.status == OK && done.count == 6 && done.skipped == 0 && done.dropped == 0,
           "save: status %u, %u stored, %u skipped", done.status, done.count, done.skipped);
    EXPECT(done.bytes == 6 * LAYERS * SEGMENT, "save: %llu bytes", (unsigned long long)done.bytes);
    struct submission again = request(SAVE, 0, registration);
    again.total = 4;
    list_save(&again, 0, 0, 4, 0);
    done = submit(&again);
    EXPECT(done.status == OK && done.count == 0 && done.skipped == 4 && done.bytes == 0,
           "second save: status %u, %u stored, %u skipped", done.status, done.count, done.skipped);
}

static void query_and_load(uint32_t registration) {
    struct submission asked = query(0, registration, 7, 100);
    struct completion found = submit(&asked);
    EXPECT(found.status == OK && found.count == 6 && found.lease != 0, "query: status %u, %u hits",
           found.status, found.count);
    EXPECT(found.reason == REASON_ABSENT, "query: reason %u", found.reason);
    EXPECT(found.arg0 > 0, "query: no time to live");
    struct submission repeated = query(0, registration, 7, 100);
    EXPECT(submit(&repeated).lease == found.lease, "the same query gives another lease");

    const uint32_t beyond[] = {BLOCKS};
    struct submission wrong = load(0, registration, found.lease, beyond, 1);
    struct completion refused = submit(&wrong);
    EXPECT(refused.status == BLOCK_OUT_OF_RANGE && refused.arg0 == BLOCKS, "load: status %u",
           refused.status);
    const uint32_t twice[] = {9, 9};
    wrong = load(0, registration, found.lease, twice, 2);
    expect_status(&wrong, DUPLICATE_BLOCK);

    /* What was refused has not used the lease up. */
    const uint32_t blocks[] = {15, 8, 9, 14, 10, 11};
    memset(region, 0, REGION_BYTES);
    struct submission wanted = load(0, registration, found.lease, blocks, 6);
    struct completion loaded = submit(&wanted);
    EXPECT(loaded.status == OK && loaded.count == 6, "load: status %u, %u blocks", loaded.status,
           loaded.count);
    EXPECT(loaded.bytes == 6 * LAYERS * SEGMENT, "load: %llu bytes",
           (unsigned long long)loaded.bytes);
    for (unsigned name = 0; name < 6; name++)
        verify(0, name, blocks[name]);
    wanted = load(0, registration, found.lease, blocks, 6);
    expect_status(&wanted, LEASE_CONSUMED);
}

static void renew_and_release(uint32_t registration) {
    struct submission asked = query(0, registration, 3, 101);
    struct completion found = submit(&asked);
    EXPECT(found.count == 3 && found.reason == REASON_NONE, "query: %u hits", found.count);
    struct submission renew = request(RENEW, 0, registration);
    renew.arg0 = found.lease;
    renew.arg1 = 5000;
    expect_status(&renew, OK);
    /* From position 1 of the lease on. */
    const uint32_t block = 12;
    struct submission part = load(0, registration, found.lease, &block, 1);
    part.arg1 = 1;
    EXPECT(submit(&part).status == OK, "load from the middle of a lease");
    verify(0, 1, 12);
    asked = query(0, registration, 3, 102);
    found = submit(&asked);
    struct submission release = request(RELEASE, 0, registration);
    release.arg0 = found.lease;
    expect_status(&release, OK);
    release.request_id = ++last_request;
    expect_status(&release, UNKNOWN_LEASE);
}

/* A group other than 0: each position on its own, the answer as a bitmap in the result arena. */
static void membership(uint32_t registration) {
    for (unsigned name = 0; name < 3; name += 2) {
        compute(1, name, name);
        struct submission save = request(SAVE, 1, registration);
        save.total = 1;
        list_save(&save, 0, name, 1, name);
        EXPECT(submit(&save).count == 1, "save in group 1");
    }
    struct submission asked = query(1, registration, 4, 103);
    asked.arg1 = 64; /* where in the result arena */
    struct completion found = submit(&asked);
    EXPECT(found.status == OK && found.count == 2, "membership: status %u, %u hits", found.status,
           found.count);
    uint64_t bits = load64(&d2c, d2c.header.arena_offset + 64);
    EXPECT((bits & 0xf) == 0x5, "membership: bitmap %#llx", (unsigned long long)bits);
    /* Positions of the lease are the hits alone. */
    const uint32_t blocks[] = {5, 6};
    struct submission wanted = load(1, registration, found.lease, blocks, 2);
    EXPECT(submit(&wanted).status == OK, "load of group 1");
    verify(1, 0, 5);
    verify(1, 2, 6);
}

static void refusals(uint32_t registration) {
    struct submission asked = query(0, registration + 1000, 1, 104);
    expect_status(&asked, UNKNOWN_REGISTRATION);
    struct submission cancel = request(CANCEL, 0, 0);
    cancel.arg0 = 999999;
    expect_status(&cancel, UNKNOWN_REQUEST);
}

/* Several laps of both rings. */
static void laps(void) {
    for (int lap = 0; lap < 5 * SLOTS; lap++) {
        struct submission nop = request(NOP, 0, 0);
        expect_status(&nop, OK);
    }
}

static void give_back(uint32_t registration) {
    char message[128];
    say("{\"type\":\"remove_region\",\"seq\":3,\"region\":7}");
    expect_message("failed");
    EXPECT(number(text, "seq") == 3 && member(text, "status") && member(text, "message"), "%s",
           text);
    snprintf(message, sizeof(message),
             "{\"type\":\"unregister\",\"seq\":4,\"registration\":%u}", registration);
    say(message);
    expect_message("done");
    EXPECT(number(text, "seq") == 4, "%s", text);
    say("{\"type\":\"remove_region\",\"seq\":5,\"region\":7}");
    expect_message("done");
    EXPECT(number(text, "seq") == 5, "%s", text);
}

/* Listens to the end, which must come in words that a client of protocol 1 knows. */
static void listen_to_the_end(void) {
    bool closing = false;
    int fds[MAX_MESSAGE_FDS];
    unsigned count;
    puts("waiting");
    fflush(stdout);
    while (await(sock, "the end"), receive_packet(sock, text, fds, &count)) {
        EXPECT(text_is(text, "type", "closing"), "%s is not a word of protocol 1", text);
        EXPECT(text_is(text, "status", "draining") && member(text, "message"), "%s", text);
        closing = true;
    }
    EXPECT(closing, "the daemon left without a word");
    uint32_t state = load32(&d2c, STATE_OFFSET);
    EXPECT(state == STATE_DRAINING || state == STATE_CLOSED, "session state %u", state);
}

int main(int argc, char **argv) {
    EXPECT(argc >= 2, "usage: client SOCKET [wait]");
    connect_to(argv[1]);
    open_session();
    uint32_t registration = register_memory();
    struct submission nop = request(NOP, 0, 0);
    expect_status(&nop, OK);
    save_blocks(registration);
    query_and_load(registration);
    renew_and_release(registration);
    membership(registration);
    refusals(registration);
    laps();
    if (argc > 2)
        listen_to_the_end();
    else
        give_back(registration);
    puts("protocol 1: every answer was right");
    return 0;
}
