"""Settings: what is accepted, and what is said about what is not."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pegaflow.connector.config import ConfigError, ConnectorConfig, ConnectorMode, parse
from pegaflow.connector.stats import COUNTERS

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "vllm.md"


def test_without_settings_all_is_as_documented() -> None:
    config, notes = parse({}, {})
    assert config == ConnectorConfig()
    assert config.mode is ConnectorMode.READ_WRITE
    assert config.mode.saves
    assert config.mode.loads
    assert not notes


def test_settings_are_read_with_their_types() -> None:
    config, _ = parse(
        {
            "pegaflow.mode": "save_only",
            "pegaflow.node": "n",
            "pegaflow.autostart": "true",
            "pegaflow.start_without_daemon": False,
            "pegaflow.lease_ttl_ms": "500",
            "pegaflow.salt": None,
        },
        {},
    )
    assert config == ConnectorConfig(
        mode=ConnectorMode.SAVE_ONLY,
        node="n",
        autostart=True,
        start_without_daemon=False,
        lease_ttl_ms=500,
    )
    assert config.mode.saves
    assert not config.mode.loads


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("pegaflow.mod", "'pegaflow.mode'"),
        ("pegaflow.sockets", "'pegaflow.socket'"),
        ("pegaflow.crosslayer_blocks", "'pegaflow.cross_layer_blocks'"),
        ("pegaflow.zzzzzz", "known are pegaflow.mode"),
        ("pegaflow.Mode", "'pegaflow.mode'"),
        ("PegaFlow.mode", "'pegaflow.mode'"),
        ("pegaflow_salt", "'pegaflow.salt'"),
        ("pegaflow", "known are pegaflow.mode"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_known_one(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near) as error:
        parse({key: 1}, {})
    assert repr(key) in str(error.value)


def test_a_forgotten_prefix_is_an_error_and_keys_of_others_are_not() -> None:
    with pytest.raises(ConfigError, match=r"'mode' is written 'pegaflow\.mode'"):
        parse({"mode": "save_only"}, {})
    assert parse({"connectors": [], "backends": ["UCX"]}, {})[0] == ConnectorConfig()


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("mode", "write", "read_write, save_only, load_only"),
        ("node", "", "not empty"),
        ("node", 7, "a text"),
        ("autostart", "maybe", "true or false"),
        ("start_without_daemon", 2, "true or false"),
        ("query_timeout_ms", 0, "from 1 to"),
        ("query_timeout_ms", True, "a whole number"),
        ("lease_ttl_ms", "soon", "a whole number"),
        ("max_saving_percent", 100, "from 1 to 90"),
    ],
)
def test_an_impossible_value_is_an_error_that_names_it(key: str, value: object, must: str) -> None:
    with pytest.raises(ConfigError, match=must) as error:
        parse({"pegaflow." + key: value}, {})
    assert f"pegaflow.{key}={value!r}" in str(error.value)


def test_keys_of_public_pegaflow_work_or_say_what_replaces_them() -> None:
    config, notes = parse(
        {"pegaflow.host": "http://127.0.0.1", "pegaflow.port": 50055, "pegaflow.mode": "save_only"},
        {"PEGAFLOW_HOST": "http://127.0.0.1"},
    )
    assert config.mode is ConnectorMode.SAVE_ONLY
    assert len(notes) == 3
    assert all("pegaflow.socket" in note or "PEGAFLOW_SOCKET" in note for note in notes)
    with pytest.raises(ConfigError, match="one daemon serves all ranks"):
        parse({"pegaflow.tp_shard_endpoints": ["a", "b"]}, {})
    assert parse({"pegaflow.pd_tail_save": False}, {})[0] == ConnectorConfig()
    assert not parse({}, {"PEGAFLOW_CROSS_LAYER_BLOCKS": "0"})[0].cross_layer_blocks


def test_a_program_to_start_and_no_autostart_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"pegaflow\.autostart is false"):
        parse({"pegaflow.daemon": "/bin/pegaflowd", "pegaflow.autostart": False}, {})


def test_the_documented_settings_and_metrics_are_those_that_exist() -> None:
    text = DOCUMENT.read_text()
    settings = re.findall(r"^\| `pegaflow\.(\w+)` \|", text, re.MULTILINE)
    assert settings == [field.name for field in fields(ConnectorConfig)]
    table = text[text.index("## Metrics") : text.index("## Releases")]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(COUNTERS)
