/*
 * Protocol 1 of PegaFlow, written down from its bytes.
 *
 * Frozen: this file, client.c and daemon.c share nothing with the crates and are never changed to
 * follow them. What they do, every later version does too, as long as it serves protocol 1
 * (docs/decisions/0016-protocol-versions.md).
 */
#ifndef PEGAFLOW_FROZEN_V1_WIRE_H
#define PEGAFLOW_FROZEN_V1_WIRE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define PROTOCOL 1
#define MAX_MESSAGE_BYTES (160 * 1024)
#define MAX_MESSAGE_FDS 4

/* Segments. */
#define C2D_MAGIC 0x3243574f4c464750ull /* "PGFLOWC2" */
#define D2C_MAGIC 0x3244574f4c464750ull /* "PGFLOWD2" */
#define SLEEP_EPOCH_OFFSET 256
#define CONSUMED_OFFSET 384
#define STATE_OFFSET 512
#define SLOTS_OFFSET 4096
#define SLOT_BYTES 64
#define CHUNK_BYTES 16384
#define SEGMENT_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)
#define REGION_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

enum state { STATE_ACTIVE = 1, STATE_DRAINING = 2, STATE_CLOSED = 3 };

struct segment_header {
    uint64_t magic;
    uint16_t layout_major; /* 1 */
    uint16_t layout_minor;
    uint32_t header_bytes;
    uint64_t total_bytes;
    uint64_t features;
    uint8_t boot_id[16]; /* D2C; zero in C2D */
    uint64_t session_id; /* D2C; zero in C2D */
    uint64_t slots_offset;
    uint32_t slots;
    uint32_t slot_stride;
    uint64_t arena_offset;
    uint32_t arena_chunks;
    uint32_t arena_chunk_bytes;
};

/* Descriptors: 56 bytes behind the slot's sequence number. */
enum op { NOP = 1, QUERY, LOAD, SAVE, RELEASE, RENEW, CANCEL };
enum { FLAG_MORE = 1, FLAG_BLOCK_RUNS = 2 };
enum reason { REASON_NONE = 0, REASON_ABSENT = 1 };
enum status {
    OK = 0,
    INVALID_ARGUMENT = 2,
    UNKNOWN_REGISTRATION = 4,
    UNKNOWN_LEASE = 6,
    LEASE_CONSUMED = 8,
    BLOCK_OUT_OF_RANGE = 9,
    DUPLICATE_BLOCK = 10,
    TOO_MANY = 11,
    COPY_FAILED = 15,
    UNKNOWN_REQUEST = 31
};

struct submission {
    uint8_t op;
    uint8_t flags;
    uint16_t group;
    uint32_t registration;
    uint64_t request_id;
    uint32_t payload_offset;
    uint32_t payload_bytes;
    uint32_t count;
    uint32_t total;
    uint64_t arg0;
    uint64_t arg1;
    uint64_t arg2;
};

struct completion {
    uint8_t op;
    uint8_t status;
    uint16_t reason;
    uint32_t count;
    uint64_t request_id;
    uint64_t lease;
    uint64_t bytes;
    uint32_t skipped;
    uint32_t dropped;
    uint64_t arg0;
    uint64_t daemon_ns;
};

_Static_assert(sizeof(struct segment_header) == 88, "88 bytes");
_Static_assert(offsetof(struct segment_header, slots_offset) == 56, "behind the session id");
_Static_assert(sizeof(struct submission) == 56, "seven words");
_Static_assert(offsetof(struct submission, arg0) == 32, "fifth word");
_Static_assert(sizeof(struct completion) == 56, "seven words");
_Static_assert(offsetof(struct completion, skipped) == 32, "fifth word");
_Static_assert(offsetof(struct completion, daemon_ns) == 48, "last word");

#define DIE(...)                                         \
    do {                                                 \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);  \
        fprintf(stderr, __VA_ARGS__);                    \
        fputc('\n', stderr);                             \
        exit(1);                                         \
    } while (0)

#define EXPECT(condition, ...) \
    do {                       \
        if (!(condition))      \
            DIE(__VA_ARGS__);  \
    } while (0)

/* ---- messages: JSON, any order of the members, unknown members ignored ---- */

static const char *skip_space(const char *at) {
    while (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')
        at++;
    return at;
}

static const char *skip_text(const char *at) {
    for (at++; *at && *at != '"'; at++)
        if (*at == '\\' && at[1])
            at++;
    return *at ? at + 1 : at;
}

/* What follows a value. */
static const char *skip_value(const char *at) {
    at = skip_space(at);
    if (*at == '"')
        return skip_text(at);
    if (*at != '{' && *at != '[') {
        while (*at && !strchr(",]} \n\t\r", *at))
            at++;
        return at;
    }
    int depth = 0;
    while (*at) {
        if (*at == '"') {
            at = skip_text(at);
            continue;
        }
        depth += (*at == '{' || *at == '[') - (*at == '}' || *at == ']');
        at++;
        if (depth == 0)
            break;
    }
    return at;
}

/* The value of a member of an object, or NULL. */
static inline const char *member(const char *object, const char *name) {
    if (!object || *(object = skip_space(object)) != '{')
        return NULL;
    const char *at = skip_space(object + 1);
    size_t length = strlen(name);
    while (*at == '"') {
        const char *end = skip_text(at);
        bool same = (size_t)(end - at) == length + 2 && memcmp(at + 1, name, length) == 0;
        at = skip_space(end);
        if (*at == ':')
            at = skip_space(at + 1);
        if (same)
            return at;
        at = skip_space(skip_value(at));
        if (*at == ',')
            at = skip_space(at + 1);
    }
    return NULL;
}

/* The n-th element of an array, or NULL. */
static inline const char *element(const char *array, unsigned number) {
    if (!array || *(array = skip_space(array)) != '[')
        return NULL;
    const char *at = skip_space(array + 1);
    for (; *at && *at != ']'; number--) {
        if (number == 0)
            return at;
        at = skip_space(skip_value(at));
        if (*at == ',')
            at = skip_space(at + 1);
    }
    return NULL;
}

static inline uint64_t number(const char *object, const char *name) {
    const char *at = member(object, name);
    EXPECT(at && *at >= '0' && *at <= '9', "no number %s in %s", name, object);
    return strtoull(at, NULL, 10);
}

static inline bool text_is(const char *object, const char *name, const char *wanted) {
    const char *at = member(object, name);
    size_t length = strlen(wanted);
    return at && *at == '"' && memcmp(at + 1, wanted, length) == 0 && at[length + 1] == '"';
}

/* ---- packets ---- */

static inline void send_packet(int socket, const char *text, const int *fds, unsigned count) {
    struct iovec part = {(void *)text, strlen(text)};
    char space[CMSG_SPACE(sizeof(int) * MAX_MESSAGE_FDS)] = {0};
    struct msghdr packet = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        packet.msg_control = space;
        packet.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *control = CMSG_FIRSTHDR(&packet);
        control->cmsg_level = SOL_SOCKET;
        control->cmsg_type = SCM_RIGHTS;
        control->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(control), fds, sizeof(int) * count);
    }
    ssize_t sent = sendmsg(socket, &packet, MSG_NOSIGNAL);
    EXPECT(sent == (ssize_t)part.iov_len, "sendmsg: %s", strerror(errno));
}

/* False at the end of the socket. `text` has room for MAX_MESSAGE_BYTES and a zero. */
static inline bool receive_packet(int socket, char *text, int *fds, unsigned *count) {
    struct iovec part = {text, MAX_MESSAGE_BYTES};
    char space[CMSG_SPACE(sizeof(int) * MAX_MESSAGE_FDS)] = {0};
    struct msghdr packet = {.msg_iov = &part, .msg_iovlen = 1};
    packet.msg_control = space;
    packet.msg_controllen = sizeof(space);
    ssize_t got;
    do {
        got = recvmsg(socket, &packet, MSG_CMSG_CLOEXEC);
    } while (got < 0 && (errno == EINTR || errno == ECONNRESET));
    EXPECT(got >= 0, "recvmsg: %s", strerror(errno));
    EXPECT(!(packet.msg_flags & (MSG_TRUNC | MSG_CTRUNC)), "a packet was cut off");
    text[got] = 0;
    *count = 0;
    struct cmsghdr *control = CMSG_FIRSTHDR(&packet);
    if (control && control->cmsg_type == SCM_RIGHTS) {
        *count = (unsigned)((control->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(control), sizeof(int) * *count);
    }
    return got > 0;
}

/* ---- segments and rings ---- */

struct segment {
    int fd;
    uint8_t *memory;
    size_t bytes;
    struct segment_header header; /* a private copy */
};

static inline size_t arena_offset(uint32_t slots) {
    return (SLOTS_OFFSET + (size_t)slots * SLOT_BYTES + 4095) / 4096 * 4096;
}

/* Creates, maps, then seals: this mapping stays the only one that can write. */
static inline struct segment make_segment(const char *name, uint64_t magic, uint32_t slots,
                                          uint32_t chunks, const uint8_t *boot_id) {
    struct segment segment = {0};
    struct segment_header *header = &segment.header;
    header->magic = magic;
    header->layout_major = 1;
    header->header_bytes = sizeof(*header);
    header->slots_offset = SLOTS_OFFSET;
    header->slots = slots;
    header->slot_stride = SLOT_BYTES;
    header->arena_offset = arena_offset(slots);
    header->arena_chunks = chunks;
    header->arena_chunk_bytes = CHUNK_BYTES;
    header->total_bytes = header->arena_offset + (uint64_t)chunks * CHUNK_BYTES;
    if (boot_id) {
        memcpy(header->boot_id, boot_id, 16);
        header->session_id = 1;
    }
    segment.bytes = header->total_bytes;
    segment.fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    EXPECT(segment.fd >= 0, "memfd_create: %s", strerror(errno));
    EXPECT(ftruncate(segment.fd, (off_t)segment.bytes) == 0, "ftruncate: %s", strerror(errno));
    EXPECT(fallocate(segment.fd, 0, 0, (off_t)segment.bytes) == 0, "fallocate");
    int both = PROT_READ | PROT_WRITE;
    segment.memory = mmap(NULL, segment.bytes, both, MAP_SHARED, segment.fd, 0);
    EXPECT(segment.memory != MAP_FAILED, "mmap: %s", strerror(errno));
    EXPECT(fcntl(segment.fd, F_ADD_SEALS, SEGMENT_SEALS) == 0, "seal: %s", strerror(errno));
    memcpy(segment.memory, header, sizeof(*header));
    return segment;
}

/* Maps the peer's segment read-only after the checks that protocol 1 asks for. */
static inline struct segment open_segment(int fd, uint64_t magic, uint64_t bytes) {
    struct segment segment = {.fd = fd, .bytes = bytes};
    int seals = fcntl(fd, F_GET_SEALS);
    EXPECT((seals & SEGMENT_SEALS) == SEGMENT_SEALS, "seals %#x", seals);
    struct stat found;
    EXPECT(fstat(fd, &found) == 0 && (uint64_t)found.st_size == bytes, "size of a segment");
    segment.memory = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    EXPECT(segment.memory != MAP_FAILED, "mmap: %s", strerror(errno));
    struct segment_header *header = &segment.header;
    memcpy(header, segment.memory, sizeof(*header));
    EXPECT(header->magic == magic, "magic %#llx", (unsigned long long)header->magic);
    EXPECT(header->layout_major == 1, "segment layout %u", header->layout_major);
    EXPECT(header->total_bytes == bytes, "announced size");
    EXPECT(header->slots_offset == SLOTS_OFFSET && header->slot_stride == SLOT_BYTES, "slots");
    EXPECT(header->arena_offset == arena_offset(header->slots), "arena");
    EXPECT(header->arena_chunk_bytes == CHUNK_BYTES, "chunks");
    return segment;
}

static inline void store64(struct segment *own, size_t offset, uint64_t value) {
    __atomic_store_n((uint64_t *)(void *)(own->memory + offset), value, __ATOMIC_RELEASE);
}

static inline uint64_t load64(const struct segment *segment, size_t offset) {
    return __atomic_load_n((uint64_t *)(void *)(segment->memory + offset), __ATOMIC_ACQUIRE);
}

static inline uint32_t load32(const struct segment *segment, size_t offset) {
    return __atomic_load_n((uint32_t *)(void *)(segment->memory + offset), __ATOMIC_ACQUIRE);
}

static inline size_t slot_at(const struct segment *segment, uint64_t position) {
    return SLOTS_OFFSET + (position & (segment->header.slots - 1)) * SLOT_BYTES;
}

/* The producer's side: the slot's words first, its number last. False when the ring is full. */
static inline bool ring_push(struct segment *own, const struct segment *peer, uint64_t *position,
                             const void *body) {
    if (*position - load64(peer, CONSUMED_OFFSET) >= own->header.slots)
        return false;
    size_t at = slot_at(own, *position);
    memcpy(own->memory + at + 8, body, 56);
    *position += 1;
    store64(own, at, *position);
    return true;
}

/* The consumer's side: `position + 1` is a published slot, an older lap's number an empty one. */
static inline bool ring_pop(struct segment *own, const struct segment *peer, uint64_t *position,
                            void *body) {
    size_t at = slot_at(peer, *position);
    uint64_t seq = load64(peer, at);
    if (seq != *position + 1) {
        uint64_t lap = peer->header.slots;
        uint64_t older = *position + 1 >= lap ? *position + 1 - lap : 0;
        EXPECT(seq == older || seq == 0, "slot %llu has number %llu",
               (unsigned long long)*position, (unsigned long long)seq);
        return false;
    }
    memcpy(body, peer->memory + at + 8, 56);
    *position += 1;
    store64(own, CONSUMED_OFFSET, *position);
    return true;
}

/* Announces a sleep; look at the ring once more before sleeping. */
static inline void bell_arm(struct segment *own, uint32_t epoch) {
    uint32_t *word = (uint32_t *)(void *)(own->memory + SLEEP_EPOCH_OFFSET);
    __atomic_store_n(word, epoch, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* After publishing: true if the peer sleeps and was not rung for this sleep. */
static inline bool bell_needed(const struct segment *peer, uint32_t *rung) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint32_t epoch = load32(peer, SLEEP_EPOCH_OFFSET);
    if (epoch == 0 || epoch == *rung)
        return false;
    *rung = epoch;
    return true;
}

#endif
