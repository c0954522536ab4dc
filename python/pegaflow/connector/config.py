"""The settings under `pegaflow.*` of `kv_connector_extra_config`: the table in `docs/vllm.md`."""

from __future__ import annotations

import difflib
import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "pegaflow."


class ConfigError(ValueError):
    """A setting that is unknown or impossible; the text names it and the way out."""


class ConnectorMode(enum.Enum):
    """What this connector does with the cache."""

    READ_WRITE = "read_write"
    SAVE_ONLY = "save_only"
    LOAD_ONLY = "load_only"

    @property
    def saves(self) -> bool:
        """Computed blocks are saved."""
        return self is not ConnectorMode.LOAD_ONLY

    @property
    def loads(self) -> bool:
        """Cached blocks are looked up and loaded."""
        return self is not ConnectorMode.SAVE_ONLY


@dataclass(frozen=True)
class ConnectorConfig:
    """The settings, checked. Names are the keys without their prefix."""

    mode: ConnectorMode = ConnectorMode.READ_WRITE
    #: Name of the node's daemon; None: $PEGAFLOW_NODE, else "default".
    node: str | None = None
    #: Socket of the daemon; None: $PEGAFLOW_SOCKET, else by the node's name.
    socket: str | None = None
    #: Start a daemon where none listens; None: if PEGAFLOW_AUTOSTART=1.
    autostart: bool | None = None
    #: Program that `autostart` starts.
    daemon: str | None = None
    #: Without a daemon: True begins with a cache that misses, False refuses to start.
    start_without_daemon: bool = True
    #: Separates what is cached from all that has another salt.
    salt: str | None = None
    #: Name of the weights when the model's path does not tell them apart.
    model: str | None = None
    #: Let vLLM lay all layers of a block side by side, where it can.
    cross_layer_blocks: bool = True
    #: A query that is not answered by then is a miss.
    query_timeout_ms: int = 1000
    #: Blocks that have not come up from a slower tier by then are done without.
    loading_timeout_ms: int = 10_000
    #: Time to live of a query's lease; 0: the daemon's default.
    lease_ttl_ms: int = 0
    #: Most of vLLM's blocks that saves under way may hold; beyond, blocks are not saved.
    max_saving_percent: int = 50


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    raise ValueError("true or false")


def _mode(value: Any) -> ConnectorMode:
    try:
        return ConnectorMode(value)
    except ValueError:
        raise ValueError("one of " + ", ".join(mode.value for mode in ConnectorMode)) from None


def _number(least: int, most: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"a whole number from {least} to {most}")
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return number

    return parse


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "mode": _mode,
    "node": _text,
    "socket": _text,
    "autostart": _switch,
    "daemon": _text,
    "start_without_daemon": _switch,
    "salt": _text,
    "model": _text,
    "cross_layer_blocks": _switch,
    "query_timeout_ms": _number(1, 600_000),
    "loading_timeout_ms": _number(0, 3_600_000),
    "lease_ttl_ms": _number(0, 86_400_000),
    "max_saving_percent": _number(1, 90),
}

#: Keys of public PegaFlow whose meaning went away: what a line in the log says about each.
_REPLACED: dict[str, str] = {
    "host": "the daemon is reached by its socket: set pegaflow.node or pegaflow.socket",
    "port": "the daemon is reached by its socket: set pegaflow.node or pegaflow.socket",
    "transfer_backend": "the daemon chooses how it copies: see docs/gpu.md",
}

#: Keys of public PegaFlow that change what is cached; to go on without them would be wrong.
_REFUSED: dict[str, str] = {
    "wait_for_full_prefix": "a hit is what is cached when the request is scheduled",
    "tp_shard_endpoints": "one daemon serves all ranks of a node: set pegaflow.node",
    "pd_tail_save": "only whole blocks are cached",
    "pd_tail_load": "only whole blocks are cached",
}

#: Environment variables of public PegaFlow that have no effect.
_ENVIRONMENT = ("PEGAFLOW_HOST", "PEGAFLOW_PORT")


def parse(
    extra: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> tuple[ConnectorConfig, list[str]]:
    """The settings, and lines for the log about those that have no effect.

    Keys without the prefix belong to others and are left alone, unless the prefix was forgotten or
    is written otherwise.
    Raises ConfigError.
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    cross = environment.get("PEGAFLOW_CROSS_LAYER_BLOCKS")
    if cross is not None:
        found["cross_layer_blocks"] = _value("PEGAFLOW_CROSS_LAYER_BLOCKS", _switch, cross)
    for key, value in extra.items():
        if not key.startswith(PREFIX):
            if key in _PARSERS:
                raise ConfigError(f"kv_connector_extra_config: {key!r} is written {PREFIX + key!r}")
            if key.lower().startswith(PREFIX[:-1]):
                raise ConfigError(_unknown(key))
            continue
        name = key[len(PREFIX) :]
        if name in _PARSERS:
            if value is not None:
                found[name] = _value(key, _PARSERS[name], value)
        elif name in _REPLACED:
            notes.append(f"{key} has no effect here: {_REPLACED[name]}")
        elif name in _REFUSED:
            if value:
                raise ConfigError(f"{key}={value!r} is not supported: {_REFUSED[name]}")
        else:
            raise ConfigError(_unknown(key))
    notes += [
        f"{name} has no effect here: set PEGAFLOW_NODE or PEGAFLOW_SOCKET"
        for name in _ENVIRONMENT
        if environment.get(name)
    ]
    if found.get("daemon") and found.get("autostart") is False:
        raise ConfigError("pegaflow.daemon names a program, but pegaflow.autostart is false")
    return ConnectorConfig(**found), notes


def _value(key: str, parser: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parser(value)
    except ValueError as error:
        raise ConfigError(f"{key}={value!r}: it must be {error}") from None


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key[len(PREFIX) :].lower(), _PARSERS, n=1, cutoff=0.6)
    known = ", ".join(PREFIX + name for name in _PARSERS)
    hint = f"did you mean {PREFIX + near[0]!r}?" if near else f"known are {known}"
    return f"kv_connector_extra_config: unknown key {key!r}; {hint}"
