/*
 * pegaflow.h - C interface of the PegaFlow client library.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * An inference engine uses this to save KV-cache blocks to the node's daemon (pegaflowd), to ask
 * which blocks of a prompt are cached, and to load them back. docs/c-api.md explains the life of a
 * client, a registration and a request, and has a complete program; this file says what each
 * function does.
 *
 * Conventions
 *   - Functions return 0 (or a count, where they say so) on success and a negative status,
 *     -PEGA_..., on failure. pega_last_error() then has a sentence with names and values, per
 *     thread.
 *   - All functions may be called from any thread at any time, on one client too, except that
 *     nothing may use a client during or after pega_disconnect().
 *   - No function blocks without a bound. "Never blocks" means: a short lock at most, no system
 *     call that waits. Times are in milliseconds unless a name ends in _ns; sizes are in bytes.
 *   - Texts are UTF-8 and end in a zero byte. Text arguments are copied. NULL stands for "not
 *     given" where a function says so; elsewhere a NULL pointer gives -PEGA_INVALID_ARGUMENT.
 *   - Structs that you fill begin with `size`: set it to sizeof the struct, and all that you do not
 *     set to 0, which always means the default. So a program goes on working with a newer library.
 *   - A client belongs to the process that made it. In a fork()ed child every call on it fails with
 *     -PEGA_INVALID_ARGUMENT, except pega_disconnect(), which frees the child's copy and leaves the
 *     parent's session alone.
 */
#ifndef PEGAFLOW_H
#define PEGAFLOW_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- constants */

/* Version of this interface. It grows only; pega_abi_version() tells the library's. */
#define PEGA_ABI_VERSION 4

/* Status codes. Functions return them negated; completions carry them as they are. */
#define PEGA_OK 0                    /* The operation succeeded. */
#define PEGA_LOADING 1               /* Blocks are coming up from a slower tier: query again. */
#define PEGA_INVALID_ARGUMENT 2      /* An argument is malformed: see pega_last_error(). */
#define PEGA_NOT_READY 3             /* Not all ranks of the instance have registered yet. */
#define PEGA_UNKNOWN_REGISTRATION 4  /* No such registration: register first. */
#define PEGA_UNKNOWN_GROUP 5         /* The registration has no such cache group. */
#define PEGA_UNKNOWN_LEASE 6         /* The lease was consumed, released, or never given here. */
#define PEGA_LEASE_EXPIRED 7         /* The lease ran past its time to live: query again. */
#define PEGA_LEASE_CONSUMED 8        /* This worker has already loaded from the lease. */
#define PEGA_BLOCK_OUT_OF_RANGE 9    /* A block id is not below the group's num_blocks. */
#define PEGA_DUPLICATE_BLOCK 10      /* A block id occurs twice in one load. */
#define PEGA_TOO_MANY 11             /* The list is longer than a named limit: split it. */
#define PEGA_NO_SPACE 12             /* The pool is full of leased or unfinished blocks. */
#define PEGA_SAVE_ONLY 13            /* The registration is save-only: it cannot query or load. */
#define PEGA_NO_MEMORY 14            /* No KV memory registered: it cannot save or load. */
#define PEGA_COPY_FAILED 15          /* A copy of KV memory failed; nothing became visible. */
#define PEGA_CANCELLED 16            /* The request was cancelled; no copy of it runs any more. */
#define PEGA_DRAINING 17             /* The daemon is shutting down and takes no new work. */
#define PEGA_DISCONNECTED 18         /* The daemon is away: queries miss; the library reconnects. */
#define PEGA_TIMEOUT 19              /* The bound for waiting ran out; the request goes on. */
#define PEGA_AGAIN 20                /* No room now: poll completions, then submit again. */
#define PEGA_VERSION_MISMATCH 21     /* No common protocol version: upgrade client or daemon. */
#define PEGA_PERMISSION_DENIED 22    /* The daemon does not serve this user, or this model to it. */
#define PEGA_BAD_LAYOUT 23           /* The KV layout is impossible: see pega_last_error(). */
#define PEGA_ALREADY_REGISTERED 24   /* A live session already holds this rank of the instance. */
#define PEGA_NAMESPACE_MISMATCH 25   /* Ranks differ in namespace, world size or mode. */
#define PEGA_PROTOCOL_ERROR 26       /* The other side broke the protocol; the session is over. */
#define PEGA_SYSTEM_ERROR 27         /* A system call failed: see pega_last_error(). */
#define PEGA_INTERNAL 28             /* A defect in PegaFlow: please report it with the log. */
#define PEGA_NO_DAEMON 29            /* Nobody listens: start pegaflowd, or PEGAFLOW_AUTOSTART=1. */
#define PEGA_LIMIT 30                /* A maximum of the daemon is reached (sessions, leases...). */
#define PEGA_UNKNOWN_REQUEST 31      /* No such request, or its completion was consumed. */
#define PEGA_DEVICE_UNAVAILABLE 32   /* The daemon cannot use this GPU: see pega_last_error(). */

/* Operations, pega_completion.op. */
#define PEGA_OP_NOP 1
#define PEGA_OP_QUERY 2
#define PEGA_OP_LOAD 3
#define PEGA_OP_SAVE 4
#define PEGA_OP_RELEASE 5
#define PEGA_OP_RENEW 6
#define PEGA_OP_CANCEL 7

/* Why the first position of a query that is not a hit is none, pega_completion.reason. */
#define PEGA_REASON_NONE 0          /* All positions are hits. */
#define PEGA_REASON_ABSENT 1        /* Never saved, or evicted. */
#define PEGA_REASON_INCOMPLETE 2    /* Some ranks' shards are in, others are not yet. */
#define PEGA_REASON_IN_FLIGHT 3     /* Its last copy is still running. */
#define PEGA_REASON_AFTER_MISS 4    /* After the first miss of a prefix query: not looked up. */
#define PEGA_REASON_NO_LEASE 5      /* The lease table or the pin limit was full. */
#define PEGA_REASON_DISCONNECTED 6  /* The daemon was away. */

/* pega_state(). */
#define PEGA_STATE_CONNECTED 1     /* A session is up. */
#define PEGA_STATE_DISCONNECTED 2  /* The daemon is away, or not there yet; the library tries on. */
#define PEGA_STATE_CLOSED 3        /* The daemon is away; this client does not reconnect. */

/* pega_registration.rank of a process without KV memory that only queries. */
#define PEGA_SCHEDULER (-1)

/* pega_registration.mode. */
#define PEGA_MODE_READ_WRITE 0  /* Saves, queries and loads. */
#define PEGA_MODE_SAVE_ONLY 1   /* Only saves: a prefill engine. */

/* pega_segment.memory */
#define PEGA_MEMORY_AUTO 0  /* The library finds out by the address. */
#define PEGA_MEMORY_HOST 1  /* No GPU memory: the CUDA driver is not asked. */
#define PEGA_MEMORY_CUDA 2  /* GPU memory of CUDA; anything else is refused. */

/* pega_order.kind */
#define PEGA_ORDER_NONE 0    /* Nothing is pending. */
#define PEGA_ORDER_STREAM 1  /* After all that a CUDA stream has at the moment of the call. */
#define PEGA_ORDER_EVENT 2   /* After a CUDA event, as it was recorded last. */

/* pega_query_options.fetch */
#define PEGA_FETCH_POLL 0   /* Fetch what is below the pool; PEGA_LOADING until it is in. */
#define PEGA_FETCH_NEVER 1  /* Take what is in the pool now. */
#define PEGA_FETCH_WAIT 2   /* Fetch what is below the pool, and complete when it is in. */

/* Switches in pega_options. */
#define PEGA_DEFAULT 0
#define PEGA_ON 1
#define PEGA_OFF 2

/* pega_options.log_level, and the level of a line. */
#define PEGA_LOG_OFF 1   /* Nothing. */
#define PEGA_LOG_WARN 2  /* The daemon is away, is back, or refuses something. */
#define PEGA_LOG_INFO 3  /* First connections, ends and failed attempts, too. */

/* ---------------------------------------------------------------- structs */

/* A connection to the node daemon that mends itself. */
typedef struct pega_client pega_client;

/* Name of a block inside its namespace and group: what the engine's hash function gave. */
typedef struct pega_hash {
    uint8_t bytes[32];
} pega_hash;

/*
 * Takes one line about a change of the connection (no line end; valid during the call). The
 * library's own thread of the client calls it, one line at a time, all signals blocked, from within
 * pega_connect() until pega_disconnect() has returned. While it runs, the library neither notices
 * the daemon's end nor reconnects, and pega_disconnect() waits for it: it must return soon. It must
 * not call pega_disconnect(), nor what waits for the daemon (pega_register, pega_unregister,
 * pega_alloc_host, pega_wait, pega_wait_ready) on this client, nor throw, nor longjmp.
 *
 * user   pega_options.log_user
 * level  PEGA_LOG_WARN or PEGA_LOG_INFO
 */
typedef void (*pega_log_fn)(void *user, uint32_t level, const char *line);

/* How to connect. 0 or NULL takes the default named here. */
typedef struct pega_options {
    uint32_t size;               /* sizeof(pega_options) */
    uint32_t ring_slots;         /* Submission ring; a power of two, 16..32768 [256]. */
    const char *node;            /* Node name [$PEGAFLOW_NODE, else "default"]. */
    const char *socket;          /* The daemon's socket [$PEGAFLOW_SOCKET, else by node name]. */
    const char *client_name;     /* Name in tables, at most 128 bytes [program and pid]. */
    const char *daemon;          /* Program for autostart [$PEGAFLOW_DAEMON, else searched]. */
    uint64_t arena_bytes;        /* Room for lists under way; 16 KiB times n, <= 1 GiB [4 MiB]. */
    uint64_t connect_timeout_ms; /* Bound of pega_connect(), autostart included [5000]. */
    uint64_t control_timeout_ms; /* Bound of register, unregister, alloc_host [30000]. */
    uint64_t spin_ns;            /* How long pega_wait() spins before it sleeps [40000]. */
    uint32_t completion_slots;   /* Most requests not consumed; power of two, 16..32768 [256]. */
    uint32_t autostart;          /* Start a daemon if none listens [on if PEGAFLOW_AUTOSTART=1]. */
    uint32_t reconnect;          /* Reconnect and re-register when the daemon was away [on]. */
    uint32_t no_spin;            /* PEGA_ON: sleep at once [off]. */
    uint32_t start_without_daemon; /* See pega_connect() [on if PEGAFLOW_START_WITHOUT_DAEMON=1]. */
    uint32_t log_level;          /* PEGA_LOG_* [$PEGAFLOW_CLIENT_LOG=off|warn|info, else warn]. */
    pega_log_fn log;             /* Takes the lines [NULL: they go to standard error]. */
    void *log_user;              /* First argument of `log`. */
} pega_options;

/*
 * The domain in which a hash names one run of bytes. Two engines share blocks only if all of this
 * and the sizes of their segments are equal. Texts are compared byte by byte, at most 1024 bytes
 * each.
 */
typedef struct pega_namespace {
    uint32_t size;              /* sizeof(pega_namespace) */
    uint32_t block_tokens;      /* Tokens in a block. Required. */
    const char *model;          /* Model name or path. Required. */
    const char *revision;       /* Revision, LoRA set, quantisation: what changes KV values. */
    const char *dtype;          /* Element type, such as "bfloat16". Required. */
    const char *kv_layout;      /* Layout of a block inside its segments, such as "NHD". */
    const char *topology;       /* Parallel topology beyond the world size, such as "tp4pp2". */
    const char *hash_algorithm; /* Algorithm, seed and input of the hashes. Required. */
    const char *salt;           /* Tenant or cache salt. */
} pega_namespace;

/*
 * One strided array: block b has `bytes` bytes at address + b * block_stride. It lies completely in
 * memory of pega_alloc_host() (then the daemon reaches it without system calls), or completely in
 * GPU memory of one allocation (then the daemon maps that allocation), or completely outside of
 * both (then through process_vm_readv and process_vm_writev). The segments of one registration lie
 * all in memory of one GPU, or none of them lies in a GPU's.
 *
 * GPU memory is that of cudaMalloc or cuMemAlloc, or of the VMM API (cuMemCreate, such as PyTorch's
 * expandable segments) if it was created with CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR. Managed
 * memory, cudaMallocAsync and VMM memory without that handle type are refused.
 */
typedef struct pega_segment {
    uint32_t size;         /* sizeof(pega_segment) */
    uint32_t memory;       /* PEGA_MEMORY_* */
    void *address;         /* First byte of block 0; needs no alignment. */
    uint64_t block_stride; /* Bytes from one block to the next. */
    uint64_t bytes;        /* Bytes of one block in this segment. */
} pega_segment;

/* KV memory of one cache group. A page is its segments' bytes one after the other. */
typedef struct pega_group {
    uint32_t size;                /* sizeof(pega_group) */
    uint32_t group;               /* 0 for full attention; at most 65535. */
    uint32_t num_blocks;          /* Block ids are 0..num_blocks-1. */
    uint32_t num_segments;        /* 1..1024 */
    const pega_segment *segments; /* In layer order. */
    uint32_t replicated;          /* PEGA_ON: all ranks hold the same bytes (MLA): stored once. */
    uint32_t reserved;            /* 0 */
} pega_group;

/*
 * What a save or load of GPU memory comes after: the engine's work on a stream, or an event of it.
 * The call does not wait. Set `size` to sizeof(pega_order).
 */
typedef struct pega_order {
    uint32_t size; /* sizeof(pega_order) */
    uint32_t kind; /* PEGA_ORDER_* */
    void *handle;  /* cudaStream_t or CUstream (NULL: default stream), cudaEvent_t or CUevent. */
} pega_order;

/*
 * What a query does about blocks that are not in the daemon's pool but in a tier below it (--ssd).
 * Set `size` to sizeof(pega_query_options).
 */
typedef struct pega_query_options {
    uint32_t size;     /* sizeof(pega_query_options) */
    uint32_t fetch;    /* PEGA_FETCH_* [PEGA_FETCH_POLL] */
    uint64_t ttl_ms;   /* As in pega_query(); of PEGA_FETCH_WAIT at most 2^32 - 1. */
    uint64_t limit_ms; /* PEGA_FETCH_WAIT: completes by then with what is in [no limit]. */
} pega_query_options;

/* A worker rank with its KV memory, or a scheduler without. */
typedef struct pega_registration {
    uint32_t size;            /* sizeof(pega_registration) */
    uint32_t world_size;      /* Worker ranks of the instance, 1..128. */
    int32_t rank;             /* 0..world_size-1, or PEGA_SCHEDULER. */
    uint32_t mode;            /* PEGA_MODE_*; the same for all ranks. */
    const char *instance;     /* Name of the engine replica: its processes find each other by it. */
    const pega_namespace *ns; /* The same for all ranks. */
    const pega_group *groups; /* NULL for a scheduler. */
    uint32_t num_groups;      /* 0 for a scheduler, else 1..64. */
    uint32_t reserved;        /* 0 */
} pega_registration;

/*
 * The answer to one request. Its size never changes: new fields take from `reserved`, and `size`
 * says how much of it this library fills. Fields without a meaning for an operation are 0.
 */
typedef struct pega_completion {
    uint32_t size;      /* Bytes filled in by the library. */
    uint32_t op;        /* PEGA_OP_* */
    uint32_t status;    /* PEGA_OK or a (positive) status. */
    uint32_t reason;    /* Query: PEGA_REASON_* of the first position that is not a hit. */
    uint64_t request;   /* The request. */
    uint64_t lease;     /* Query: the lease, 0 without a hit. Load, release, renew: as named. */
    uint32_t count;     /* Query: hits. Load: blocks loaded. Save: blocks newly stored. */
    uint32_t skipped;   /* Save: already held or on their way in; not copied again. */
    uint32_t dropped;   /* Save: not stored: no room, or the copy failed. Load: copy failed. */
    uint32_t reserved0; /* 0 */
    uint64_t bytes;     /* Bytes copied. */
    uint64_t value;     /* What an error is about; query, renew: time to live in ms. */
    uint64_t daemon_ns; /* Time between the daemon seeing the request and its answer. */
    uint64_t reserved[3];
} pega_completion;

/* Counters of a client since it connected first. */
typedef struct pega_stats {
    uint32_t size;          /* sizeof(pega_stats) */
    uint32_t state;         /* PEGA_STATE_* */
    uint64_t submitted;     /* Requests accepted. */
    uint64_t completed;     /* Completions, consumed or not. */
    uint64_t failed;        /* Those with another status than PEGA_OK. */
    uint64_t again;         /* Submissions refused with PEGA_AGAIN. */
    uint64_t probes;        /* Probes answered. */
    uint64_t probed_blocks; /* Blocks that probes asked about. */
    uint64_t probe_hits;    /* Blocks that probes found. */
    uint64_t loaded_bytes;  /* Bytes copied by loads. */
    uint64_t saved_bytes;   /* Bytes copied by saves. */
    uint64_t disconnects;   /* Sessions lost. */
    uint64_t reconnects;    /* Sessions regained; the first one of a client does not count. */
    uint64_t outstanding;   /* Requests not yet consumed at this moment. */
    uint64_t away_ms;       /* Time without a session so far. */
    uint64_t failed_attempts;       /* Attempts to get a session that failed. */
    uint64_t refused_registrations; /* Registrations that the daemon refuses at this moment. */
    uint64_t waited_orders;         /* Saves and loads that waited in the call: see pega_order. */
} pega_stats;

/* Longest lists that this client can submit at all; beyond, submissions fail with PEGA_TOO_MANY. */
typedef struct pega_limits {
    uint32_t size;              /* sizeof(pega_limits) */
    uint32_t reserved;          /* 0 */
    uint64_t query_hashes;      /* In one query of group 0. */
    uint64_t membership_hashes; /* In one query of another group. */
    uint64_t save_blocks;       /* In one save. */
    uint64_t load_blocks;       /* In one load. */
    uint64_t requests;          /* Not yet consumed; 3/4 of ring_slots of them not yet finished. */
} pega_limits;

/* ---------------------------------------------------------------- versions and texts */

/* Version of the library, such as "0.1.0". Never NULL; valid for ever. */
const char *pega_version(void);

/* PEGA_ABI_VERSION of the library; at least that of this header, or the library is too old. */
uint32_t pega_abi_version(void);

/*
 * Why the last failing call of this thread failed: the thing, its value, the way out. Never NULL;
 * "" before the first failure. Valid until this thread's next failing call.
 */
const char *pega_last_error(void);

/* Short name of a status, positive or negative, such as "lease_expired". Never NULL; "unknown". */
const char *pega_status_label(int status);

/* A sentence on a status, positive or negative. Never NULL; "unknown". */
const char *pega_status_text(int status);

/* Short name of a PEGA_REASON_*. Never NULL; "unknown". */
const char *pega_reason_label(uint32_t reason);

/* Short name of a PEGA_OP_*. Never NULL; "unknown". */
const char *pega_op_label(uint32_t op);

/* ---------------------------------------------------------------- client */

/*
 * Writes the default options, with their values spelled out, for reading or changing.
 *
 * options  room for `size` bytes
 * size     sizeof(pega_options)
 *
 * -PEGA_INVALID_ARGUMENT: NULL, or an impossible size; nothing is written.
 */
int pega_options_init(pega_options *options, uint32_t size);

/*
 * Connects to the node's daemon and, if the options or PEGAFLOW_AUTOSTART=1 say so, starts one
 * where none listens. Starts a thread that keeps the client connected. Blocks up to
 * connect_timeout_ms.
 *
 * options  NULL for all defaults
 * client   gets the client, or NULL on failure
 *
 * With start_without_daemon, whatever keeps a session from coming about is no failure: the client
 * begins PEGA_STATE_DISCONNECTED, behaves as while a daemon is away, and keeps trying.
 * pega_register() and pega_alloc_host() then succeed without a daemon, now and whenever one is away
 * later, and the next daemon is told. Needs `reconnect`.
 *
 * -PEGA_NO_DAEMON: nobody listens, or autostart failed (the text names what was tried).
 * -PEGA_VERSION_MISMATCH, -PEGA_PERMISSION_DENIED, -PEGA_LIMIT, -PEGA_DRAINING: the daemon refused.
 * -PEGA_TIMEOUT: no answer in time.  -PEGA_PROTOCOL_ERROR: what answered is no PegaFlow daemon.
 * -PEGA_INVALID_ARGUMENT, -PEGA_SYSTEM_ERROR.
 */
int pega_connect(const pega_options *options, pega_client **client);

/*
 * Ends the session, its registrations and leases, frees all memory of pega_alloc_host(), and frees
 * the client. No other call on this client may run then or come after. Unfinished requests get no
 * completion; the daemon ends their copies before it forgets the memory, but a load may still write
 * for a moment: wait for loads, or unregister, before you reuse or unmap KV memory. Waits until the
 * daemon has taken notice, at most half a second, whatever the daemon does. NULL does nothing.
 *
 * Always 0.
 */
int pega_disconnect(pega_client *client);

/*
 * Whether a session is up: PEGA_STATE_CONNECTED, _DISCONNECTED or _CLOSED. Each change counts in
 * pega_stats and is one line of the log. A daemon that is stopped, not gone, stays connected: calls
 * then run into their bounds. Never blocks; costs one load.
 */
int pega_state(const pega_client *client);

/* Reads the counters. Set stats->size before. Never blocks. */
int pega_get_stats(const pega_client *client, pega_stats *stats);

/* Reads the limits. Set limits->size before. Never blocks. */
int pega_get_limits(const pega_client *client, pega_limits *limits);

/* ---------------------------------------------------------------- memory and registrations */

/*
 * Allocates KV memory that the daemon maps too, so that copies need no system call: zeroed,
 * page-aligned, populated. It stays valid across reconnections, until pega_free_host() or
 * pega_disconnect(). Blocks up to control_timeout_ms.
 *
 * bytes   at least 1, at most 16 TiB
 * memory  gets the address, or NULL on failure
 *
 * -PEGA_SYSTEM_ERROR: no memory (see `ulimit`, the cgroup, /dev/shm).  -PEGA_TIMEOUT, -PEGA_LIMIT.
 */
int pega_alloc_host(pega_client *client, uint64_t bytes, void **memory);

/*
 * Frees memory of pega_alloc_host(). NULL does nothing.
 *
 * -PEGA_INVALID_ARGUMENT: not such memory, or a registration still uses it.
 */
int pega_free_host(pega_client *client, void *memory);

/*
 * Registers a rank with its KV memory, or a scheduler. The id is good for the life of the client:
 * after a reconnect the library registers again by itself. All memory must stay mapped until
 * pega_unregister() or pega_disconnect() returned. Blocks up to control_timeout_ms.
 *
 * If a segment lies in memory of this process that is neither pega_alloc_host()'s nor a GPU's, the
 * daemon is allowed to access this process with prctl(PR_SET_PTRACER), which replaces an earlier
 * permission of that kind.
 *
 * GPU memory: the calling thread may have any CUDA context, or none; it is left as it was. The
 * memory must not be freed or remapped before pega_unregister() returned: the daemon maps it, and
 * the GPU gets it back only when both have let go. When a GPU fails at the daemon, registrations on
 * it are refused with PEGA_DEVICE_UNAVAILABLE until it is back; then the library registers again.
 *
 * spec          copied
 * registration  gets the id, never 0
 *
 * -PEGA_INVALID_ARGUMENT, -PEGA_BAD_LAYOUT: the text names the field and its value.
 * -PEGA_ALREADY_REGISTERED, -PEGA_NAMESPACE_MISMATCH, -PEGA_PERMISSION_DENIED, -PEGA_LIMIT: the
 * daemon refused.
 * -PEGA_DEVICE_UNAVAILABLE: the daemon has not this GPU, or cannot map memory of it: the text says
 * why.  -PEGA_VERSION_MISMATCH: the daemon is too old for GPU memory or replicated groups.
 * -PEGA_SYSTEM_ERROR: a call of the CUDA driver failed.
 * -PEGA_DISCONNECTED: no daemon at the moment (never with start_without_daemon: then the
 * registration is taken in, and pega_wait_ready() tells what a later daemon said to it).
 * -PEGA_TIMEOUT: no answer in time; nothing is registered.
 */
int pega_register(pega_client *client, const pega_registration *spec, uint32_t *registration);

/*
 * Ends a registration once no copy touches its memory any more. Blocks up to control_timeout_ms.
 *
 * -PEGA_UNKNOWN_REGISTRATION.  -PEGA_TIMEOUT: copies still run, or the daemon does not answer; the
 * registration stays, call again.
 */
int pega_unregister(pega_client *client, uint32_t registration);

/*
 * Waits until every rank of the registration's instance has registered: only then are there hits.
 * After a reconnect this is so again once all ranks are back. A timeout_ms of 0 only looks.
 *
 * -PEGA_TIMEOUT: timeout_ms ran out; the text says what is missing.  -PEGA_UNKNOWN_REGISTRATION.
 * -PEGA_PERMISSION_DENIED, -PEGA_NAMESPACE_MISMATCH, -PEGA_BAD_LAYOUT and others: the present
 * daemon refuses the registration; told at once. -PEGA_ALREADY_REGISTERED, -PEGA_LIMIT: the same,
 * but it may pass: told when timeout_ms ran out. The library tries on in any case.
 * -PEGA_DISCONNECTED: the state is PEGA_STATE_CLOSED.
 */
int pega_wait_ready(pega_client *client, uint32_t registration, uint64_t timeout_ms);

/* ---------------------------------------------------------------- probes */

/*
 * Counts how many of `count` hashes, from the first on, are cached without a gap, in any group.
 * Reads shared memory: no system call, no daemon. The answer is advice: only a query's lease holds
 * the blocks. 0 hits while the daemon is away or the instance is incomplete. Never blocks.
 *
 * hits  gets the count
 *
 * -PEGA_UNKNOWN_REGISTRATION.
 */
int pega_probe(pega_client *client, uint32_t registration, uint16_t group, const pega_hash *hashes,
               size_t count, uint32_t *hits);

/*
 * Sets bit i % 64 of bitmap[i / 64] for each cached hashes[i] and clears all other bits of the
 * bitmap. Otherwise like pega_probe().
 *
 * bitmap        at least (count + 63) / 64 words
 * bitmap_words  its length in words
 * hits          gets the number of bits set
 */
int pega_probe_membership(pega_client *client, uint32_t registration, uint16_t group,
                          const pega_hash *hashes, size_t count, uint64_t *bitmap,
                          size_t bitmap_words, uint32_t *hits);

/* ---------------------------------------------------------------- requests
 *
 * Each submits one request, gives it an id (never 0, never used twice by one client) and returns at
 * once. Lists are copied before the return. The request ends with exactly one completion, which
 * pega_poll() or pega_wait() hands out. None of them blocks. What only the daemon can judge (the
 * group, block ids, the lease) is the completion's status, not a failure of the call. All can fail
 * with
 *
 * -PEGA_AGAIN: ring, arena or credit has no room now: consume completions, then submit again.
 * -PEGA_TOO_MANY: the list is longer than pega_get_limits() allows: split it.
 * -PEGA_DISCONNECTED: no daemon at the moment (not pega_query(), which completes as a miss).
 * -PEGA_NOT_READY: after a reconnect, the registration is not back yet; the same applies.
 * -PEGA_UNKNOWN_REGISTRATION, -PEGA_INVALID_ARGUMENT.
 */

/*
 * Pins cached blocks and answers with a lease on them: for group 0 the longest cached prefix of the
 * list, for any other group every cached position. A repeated query with the same key and hashes
 * gives the same lease and no second pin; the same key with other hashes replaces it, and the old
 * lease is over. Without a hit there is no lease. While the daemon is away it completes at once:
 * status PEGA_DISCONNECTED, count 0.
 *
 * key           the engine's name of its request, any value. Keys of different groups do not meet;
 *               within a group all processes of an instance share them.
 * ttl_ms        time to live of the lease; 0 takes the daemon's default, and --lease-ttl-max bounds
 *               it: the completion's `value` is what it got
 * bitmap        group 0: NULL, or else left alone. Other groups: gets a bit for each position, as
 *               pega_probe_membership() writes them, when the completion is consumed (all 0 unless
 *               its status is PEGA_OK). It must stay valid until then, or until pega_disconnect()
 *               returned. Only the first (count + 63) / 64 words are written.
 * bitmap_words  its length, at least (count + 63) / 64
 * request       gets the id
 */
int pega_query(pega_client *client, uint32_t registration, uint16_t group, uint64_t key,
               const pega_hash *hashes, size_t count, uint64_t ttl_ms, uint64_t *bitmap,
               size_t bitmap_words, uint64_t *request);

/*
 * pega_query() that says what becomes of blocks below the pool; NULL options are those of
 * pega_query(). In each way, what has come up is pinned for the query until its answer, or until
 * it has not been repeated for as long as a lease lives by default.
 *
 * PEGA_FETCH_POLL   Completes at once. With PEGA_LOADING, `count` blocks are in so far, `value` are
 *                   still coming up, and there is no lease: repeat the query with the same key and
 *                   hashes until its status is another one.
 * PEGA_FETCH_NEVER  Completes at once with a lease on what is in the pool. Ends the fetching that
 *                   an earlier query of the same key began.
 * PEGA_FETCH_WAIT   Completes when the blocks are in, or after limit_ms with those that are. The
 *                   daemon bounds the wait, too: a block that does not come within its
 *                   --prefetch-timeout is done without. pega_cancel() ends it with PEGA_CANCELLED.
 *
 * A repeated query is answered with its live lease in each way, and fetches nothing more: release
 * a lease on less than all to ask anew. A block that cannot be read is a miss. pega_probe() looks
 * at the pool alone.
 */
int pega_query_with(pega_client *client, uint32_t registration, uint16_t group, uint64_t key,
                    const pega_hash *hashes, size_t count, const pega_query_options *options,
                    uint64_t *bitmap, size_t bitmap_words, uint64_t *request);

/*
 * Copies pages of a lease into the engine's blocks: the lease's position first + i goes to
 * blocks[i]. Each worker rank of the instance may load from a lease once; after the last one the
 * lease is over. The blocks must not be touched until the completion. After another status than
 * PEGA_OK their content is undefined.
 *
 * group  that of the query
 * lease  of a query of any process of the instance
 * first  position in the lease's list of hits, which has no gaps: for another group than 0, the
 *        number of bits set below a position in the query's bitmap
 */
int pega_load(pega_client *client, uint32_t registration, uint16_t group, uint64_t lease,
              uint32_t first, const uint32_t *blocks, size_t count, uint64_t *request);

/*
 * Copies blocks[i] into the pool under the name hashes[i]. The blocks must hold their final bytes
 * and must not change until the completion. A block becomes a hit once every rank has saved its
 * shard. Blocks already held are skipped; for want of room some may be dropped: the completion
 * counts both.
 */
int pega_save(pega_client *client, uint32_t registration, uint16_t group, const pega_hash *hashes,
              const uint32_t *blocks, size_t count, uint64_t *request);

/*
 * pega_load() and pega_save() of GPU memory that the engine's work is not through with: a load
 * overwrites its blocks, and a save reads them, only once `after` has happened. The engine's thread
 * does not wait, and no other request waits for it. pega_load() and pega_save() themselves stand
 * for PEGA_ORDER_NONE: nothing is pending.
 *
 * Where CUDA cannot share an event with the daemon (the library logs it once, and counts such calls
 * in pega_stats.waited_orders), the call itself waits for `after`, up to control_timeout_ms.
 *
 * after  NULL is PEGA_ORDER_NONE. The stream or event must live until the call has returned, and an
 *        event must not be recorded anew before. It may belong to any GPU of this process.
 *
 * -PEGA_INVALID_ARGUMENT: an order over a registration without GPU memory, or a stream that is
 * being captured into a graph.
 * -PEGA_AGAIN: too, while all events are in use: consume completions.
 * -PEGA_TIMEOUT: the call waited for `after`, see above; nothing was submitted.
 * -PEGA_SYSTEM_ERROR: a call of the CUDA driver failed; nothing was submitted.
 */
int pega_load_after(pega_client *client, uint32_t registration, uint16_t group, uint64_t lease,
                    uint32_t first, const uint32_t *blocks, size_t count, const pega_order *after,
                    uint64_t *request);

int pega_save_after(pega_client *client, uint32_t registration, uint16_t group,
                    const pega_hash *hashes, const uint32_t *blocks, size_t count,
                    const pega_order *after, uint64_t *request);

/*
 * pega_load_after() whose blocks come in `steps` steps, for which streams can wait on the GPU: the
 * engine's work on the first layers begins while the others are still on their way. Step n, counted
 * from 1, has the group's segments from (n - 1) * num_segments / steps on, up to
 * n * num_segments / steps, of all blocks.
 *
 * steps  1 up to the number of the group's segments, at most 256
 *
 * -PEGA_INVALID_ARGUMENT: another number of steps, or a registration without GPU memory.
 * -PEGA_AGAIN: too, while 256 such loads are under way: consume completions.
 */
int pega_load_in_steps(pega_client *client, uint32_t registration, uint16_t group, uint64_t lease,
                       uint32_t first, const uint32_t *blocks, size_t count,
                       const pega_order *after, uint32_t steps, uint64_t *request);

/*
 * What `stream` (a cudaStream_t or CUstream; NULL: default stream) gets from now on comes after the
 * first `steps` steps of a load of pega_load_in_steps(). No thread waits. Any number of streams may
 * wait for any of the steps.
 *
 * The stream goes on, too, when the load has failed, was cancelled, or its daemon is gone, and 30
 * to 40 seconds after the submission at the latest. So only the completion says that the bytes are
 * there: look at it before the results of the work behind the wait are used.
 *
 * request  of a load that is not consumed; where it has completed with PEGA_OK there is nothing to
 *          wait for
 *
 * -PEGA_UNKNOWN_REQUEST: no such load; -status: it has completed with another status than PEGA_OK.
 * -PEGA_DEVICE_UNAVAILABLE: the request is no load in steps, or driver or daemon cannot tell a
 * stream of it (the library logs why once): pega_wait() for it instead.
 * -PEGA_INVALID_ARGUMENT: more steps than the load has, or a stream that is being captured.
 */
int pega_stream_wait(pega_client *client, uint64_t request, uint32_t steps, void *stream);

/*
 * Gives a lease back without loading. If it is over already, completes with PEGA_UNKNOWN_LEASE,
 * PEGA_LEASE_CONSUMED or PEGA_LEASE_EXPIRED: harmless.
 */
int pega_release(pega_client *client, uint32_t registration, uint64_t lease, uint64_t *request);

/* Sets a lease's time to live to ttl_ms from now, with the defaults and bounds of pega_query(). */
int pega_renew(pega_client *client, uint32_t registration, uint64_t lease, uint64_t ttl_ms,
               uint64_t *request);

/*
 * Asks to cancel an unfinished request. Both complete: the cancelled one with PEGA_CANCELLED, or
 * with its result if that was faster; in either case no copy of it runs any more. Only loads and
 * saves can be cancelled: for all else, and where it comes too late, the cancel completes with
 * PEGA_UNKNOWN_REQUEST and the other request with its result.
 *
 * cancelled  the request to cancel
 * request    gets the id of the cancel itself
 *
 * -PEGA_UNKNOWN_REQUEST: it is finished, or was never submitted here.
 */
int pega_cancel(pega_client *client, uint64_t cancelled, uint64_t *request);

/* Does nothing, there and back: is the daemon alive, and how fast? */
int pega_nop(pega_client *client, uint64_t *request);

/* ---------------------------------------------------------------- completions */

/*
 * Hands out finished requests that no thread waits for with pega_wait(), oldest first. Never
 * blocks.
 *
 * completions  room for `capacity` of them
 *
 * Returns how many were written, 0..capacity, or a negative status; 0 also arms
 * pega_completion_fd().
 */
int pega_poll(pega_client *client, pega_completion *completions, size_t capacity);

/*
 * Waits for one request and hands out its completion. Spins for spin_ns, then sleeps. Several
 * threads may wait at once, each for its own request. While another thread polls the same client, a
 * request that finishes before this is called is handed to the poller: give each way of its own a
 * client, or look there.
 *
 * timeout_ms  0 only looks
 *
 * -PEGA_TIMEOUT: not finished yet; the request goes on and can be polled or waited for again.
 * -PEGA_UNKNOWN_REQUEST: its completion was consumed, or it was never submitted here.
 */
int pega_wait(pega_client *client, uint64_t request, uint64_t timeout_ms,
              pega_completion *completion);

/*
 * The blocks that a load was to fill, for a load whose completion was handed out with another
 * status than PEGA_OK: all blocks of its list. Their bytes are undefined: recompute them. Kept for
 * the latest failed loads: at most completion_slots of them, and together at most as many blocks as
 * all loads under way can name, so that no list is lost when a daemon dies. May be asked again.
 * Never blocks.
 *
 * blocks    room for `capacity` ids; NULL if capacity is 0
 * capacity  no more than this many are written
 * count     gets the number of blocks in the list, which may be more
 *
 * -PEGA_UNKNOWN_REQUEST: no load, not failed, its completion not yet consumed, or forgotten.
 */
int pega_unloaded_blocks(pega_client *client, uint64_t request, uint32_t *blocks, size_t capacity,
                         size_t *count);

/*
 * A descriptor for poll(2), epoll(7) or the engine's event loop, readable when pega_poll() has to
 * be called. The rule: call pega_poll() until it returns 0, then sleep on the descriptor. It
 * belongs to the client, stays the same across reconnections, and must not be read or closed.
 *
 * Returns the descriptor, or a negative status.
 */
int pega_completion_fd(pega_client *client);

#ifdef __cplusplus
}
#endif

#endif /* PEGAFLOW_H */
