"""pegaflow.h in ctypes: structs, prototypes, the version of the interface.

`tests/test_abi.py` compares all of it with the header, by a C compiler and by the symbol map.
"""

from __future__ import annotations

import ctypes as c
from typing import Any

#: PEGA_ABI_VERSION that this binding needs; the library's may be larger.
ABI_VERSION = 4

#: Bytes of a block's hash.
HASH_BYTES = 32

LOG_FUNCTION = c.CFUNCTYPE(None, c.c_void_p, c.c_uint32, c.c_char_p)


class pega_options(c.Structure):  # noqa: N801 (the header's names)
    _fields_ = [
        ("size", c.c_uint32),
        ("ring_slots", c.c_uint32),
        ("node", c.c_char_p),
        ("socket", c.c_char_p),
        ("client_name", c.c_char_p),
        ("daemon", c.c_char_p),
        ("arena_bytes", c.c_uint64),
        ("connect_timeout_ms", c.c_uint64),
        ("control_timeout_ms", c.c_uint64),
        ("spin_ns", c.c_uint64),
        ("completion_slots", c.c_uint32),
        ("autostart", c.c_uint32),
        ("reconnect", c.c_uint32),
        ("no_spin", c.c_uint32),
        ("start_without_daemon", c.c_uint32),
        ("log_level", c.c_uint32),
        ("log", LOG_FUNCTION),
        ("log_user", c.c_void_p),
    ]


class pega_namespace(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("block_tokens", c.c_uint32),
        ("model", c.c_char_p),
        ("revision", c.c_char_p),
        ("dtype", c.c_char_p),
        ("kv_layout", c.c_char_p),
        ("topology", c.c_char_p),
        ("hash_algorithm", c.c_char_p),
        ("salt", c.c_char_p),
    ]


class pega_segment(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("memory", c.c_uint32),
        ("address", c.c_void_p),
        ("block_stride", c.c_uint64),
        ("bytes", c.c_uint64),
    ]


class pega_group(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("group", c.c_uint32),
        ("num_blocks", c.c_uint32),
        ("num_segments", c.c_uint32),
        ("segments", c.POINTER(pega_segment)),
        ("replicated", c.c_uint32),
        ("reserved", c.c_uint32),
    ]


class pega_order(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("kind", c.c_uint32),
        ("handle", c.c_void_p),
    ]


class pega_query_options(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("fetch", c.c_uint32),
        ("ttl_ms", c.c_uint64),
        ("limit_ms", c.c_uint64),
    ]


class pega_registration(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("world_size", c.c_uint32),
        ("rank", c.c_int32),
        ("mode", c.c_uint32),
        ("instance", c.c_char_p),
        ("ns", c.POINTER(pega_namespace)),
        ("groups", c.POINTER(pega_group)),
        ("num_groups", c.c_uint32),
        ("reserved", c.c_uint32),
    ]


class pega_completion(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("op", c.c_uint32),
        ("status", c.c_uint32),
        ("reason", c.c_uint32),
        ("request", c.c_uint64),
        ("lease", c.c_uint64),
        ("count", c.c_uint32),
        ("skipped", c.c_uint32),
        ("dropped", c.c_uint32),
        ("reserved0", c.c_uint32),
        ("bytes", c.c_uint64),
        ("value", c.c_uint64),
        ("daemon_ns", c.c_uint64),
        ("reserved", c.c_uint64 * 3),
    ]


class pega_stats(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("state", c.c_uint32),
        ("submitted", c.c_uint64),
        ("completed", c.c_uint64),
        ("failed", c.c_uint64),
        ("again", c.c_uint64),
        ("probes", c.c_uint64),
        ("probed_blocks", c.c_uint64),
        ("probe_hits", c.c_uint64),
        ("loaded_bytes", c.c_uint64),
        ("saved_bytes", c.c_uint64),
        ("disconnects", c.c_uint64),
        ("reconnects", c.c_uint64),
        ("outstanding", c.c_uint64),
        ("away_ms", c.c_uint64),
        ("failed_attempts", c.c_uint64),
        ("refused_registrations", c.c_uint64),
        ("waited_orders", c.c_uint64),
    ]


class pega_limits(c.Structure):  # noqa: N801
    _fields_ = [
        ("size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("query_hashes", c.c_uint64),
        ("membership_hashes", c.c_uint64),
        ("save_blocks", c.c_uint64),
        ("load_blocks", c.c_uint64),
        ("requests", c.c_uint64),
    ]


STRUCTS: tuple[type[c.Structure], ...] = (
    pega_options,
    pega_namespace,
    pega_segment,
    pega_group,
    pega_order,
    pega_query_options,
    pega_registration,
    pega_completion,
    pega_stats,
    pega_limits,
)

_client = c.c_void_p
_id = c.c_uint32
_group = c.c_uint16
# Lists go in as addresses: of `bytes`, of an array, of the caller's buffer. Nothing is copied here.
_list = c.c_void_p
_count = c.c_size_t
_request = c.POINTER(c.c_uint64)

#: Each function of the header: result, arguments.
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "pega_version": (c.c_char_p, ()),
    "pega_abi_version": (c.c_uint32, ()),
    "pega_last_error": (c.c_char_p, ()),
    "pega_status_label": (c.c_char_p, (c.c_int,)),
    "pega_status_text": (c.c_char_p, (c.c_int,)),
    "pega_reason_label": (c.c_char_p, (c.c_uint32,)),
    "pega_op_label": (c.c_char_p, (c.c_uint32,)),
    "pega_options_init": (c.c_int, (c.POINTER(pega_options), c.c_uint32)),
    "pega_connect": (c.c_int, (c.POINTER(pega_options), c.POINTER(c.c_void_p))),
    "pega_disconnect": (c.c_int, (_client,)),
    "pega_state": (c.c_int, (_client,)),
    "pega_get_stats": (c.c_int, (_client, c.POINTER(pega_stats))),
    "pega_get_limits": (c.c_int, (_client, c.POINTER(pega_limits))),
    "pega_alloc_host": (c.c_int, (_client, c.c_uint64, c.POINTER(c.c_void_p))),
    "pega_free_host": (c.c_int, (_client, c.c_void_p)),
    "pega_register": (c.c_int, (_client, c.POINTER(pega_registration), c.POINTER(c.c_uint32))),
    "pega_unregister": (c.c_int, (_client, _id)),
    "pega_wait_ready": (c.c_int, (_client, _id, c.c_uint64)),
    "pega_probe": (c.c_int, (_client, _id, _group, _list, _count, c.POINTER(c.c_uint32))),
    "pega_probe_membership": (
        c.c_int,
        (_client, _id, _group, _list, _count, c.c_void_p, _count, c.POINTER(c.c_uint32)),
    ),
    "pega_query": (
        c.c_int,
        (
            _client,
            _id,
            _group,
            c.c_uint64,
            _list,
            _count,
            c.c_uint64,
            c.c_void_p,
            _count,
            _request,
        ),
    ),
    "pega_query_with": (
        c.c_int,
        (
            _client,
            _id,
            _group,
            c.c_uint64,
            _list,
            _count,
            c.POINTER(pega_query_options),
            c.c_void_p,
            _count,
            _request,
        ),
    ),
    "pega_load": (
        c.c_int,
        (_client, _id, _group, c.c_uint64, c.c_uint32, _list, _count, _request),
    ),
    "pega_save": (c.c_int, (_client, _id, _group, _list, _list, _count, _request)),
    "pega_load_after": (
        c.c_int,
        (
            _client,
            _id,
            _group,
            c.c_uint64,
            c.c_uint32,
            _list,
            _count,
            c.POINTER(pega_order),
            _request,
        ),
    ),
    "pega_save_after": (
        c.c_int,
        (_client, _id, _group, _list, _list, _count, c.POINTER(pega_order), _request),
    ),
    "pega_load_in_steps": (
        c.c_int,
        (
            _client,
            _id,
            _group,
            c.c_uint64,
            c.c_uint32,
            _list,
            _count,
            c.POINTER(pega_order),
            c.c_uint32,
            _request,
        ),
    ),
    "pega_stream_wait": (c.c_int, (_client, c.c_uint64, c.c_uint32, c.c_void_p)),
    "pega_release": (c.c_int, (_client, _id, c.c_uint64, _request)),
    "pega_renew": (c.c_int, (_client, _id, c.c_uint64, c.c_uint64, _request)),
    "pega_cancel": (c.c_int, (_client, c.c_uint64, _request)),
    "pega_nop": (c.c_int, (_client, _request)),
    "pega_poll": (c.c_int, (_client, c.POINTER(pega_completion), _count)),
    "pega_wait": (c.c_int, (_client, c.c_uint64, c.c_uint64, c.POINTER(pega_completion))),
    "pega_unloaded_blocks": (
        c.c_int,
        (_client, c.c_uint64, _list, _count, c.POINTER(c.c_size_t)),
    ),
    "pega_completion_fd": (c.c_int, (_client,)),
}

#: Functions of the header that `Client` does not use, with the reason.
LEFT_OUT: dict[str, str] = {
    "pega_options_init": "Options has the defaults; the library takes 0 for each of them",
    "pega_load": "pega_load_after without an order is the same",
    "pega_save": "pega_save_after without an order is the same",
    "pega_status_label": "Status has the names",
    "pega_reason_label": "Reason has the names",
    "pega_op_label": "Op has the names",
}
