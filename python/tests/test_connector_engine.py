"""What the connector guarantees an engine, over a real daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pegaflow.client import Completion
from pegaflow.connector import names
from pegaflow.connector.config import ConnectorConfig, ConnectorMode
from pegaflow.connector.lookup import STEP_WAIT_MS
from pegaflow.connector.scheduler import Step

from .engine_support import BLOCK_TOKENS, Engine, Make, Request, tokens
from .support import Daemon, eventually


def test_what_one_engine_saved_another_loads_with_the_same_bytes(make: Make) -> None:
    one, other = make(), make()
    prompt = one.save_prompt()
    request = Request(prompt)
    assert other.find(request) == 96
    results = other.load(request, [[11, 12, 13, 14, 15, 16, 17]], 96)
    assert not results.failed
    other.verify(request, [[11, 12, 13, 14, 15, 16]], 96)


def test_the_last_token_of_a_prompt_is_left_to_compute(make: Make) -> None:
    engine = make()
    prompt = tokens(4 * BLOCK_TOKENS)
    engine.save(Request(prompt), [[1, 2, 3, 4]])
    assert engine.find(Request(prompt)) == 3 * BLOCK_TOKENS
    assert engine.find(Request([*prompt, 7])) == 4 * BLOCK_TOKENS


def test_a_repeated_question_gets_the_same_answer_and_no_second_lease(make: Make) -> None:
    engine = make()
    prompt = engine.save_prompt()
    request = Request(prompt)
    submitted = engine.client.stats().submitted
    assert [engine.find(request) for _ in range(50)] == [96] * 50
    assert engine.client.stats().submitted == submitted + 1


def test_only_what_the_engine_has_not_itself_is_loaded(make: Make) -> None:
    engine = make()
    prompt = engine.save_prompt()
    request = Request(prompt)
    assert engine.find(request, computed=32) == 64
    for block in (20, 21):
        engine.page(block)[:] = b"x" * len(engine.page(block))
    engine.load(request, [[20, 21, 22, 23, 24, 25]], 64)
    names = request.block_hashes
    for at, block in enumerate((22, 23, 24, 25), 2):
        assert engine.page(block) == engine.pattern(names[at], 0, 0)
    assert engine.page(20)[0] == ord("x")


def test_blocks_are_held_until_every_rank_has_saved_them(make: Make) -> None:
    engine = make(world_size=3)
    request = Request(tokens(64))
    meta = engine.scheduler.build(Step([], [], {}))
    engine.scheduler.allocated(request, [[1, 2, 3, 4]], 0)
    meta = engine.scheduler.build(
        Step([(request.request_id, [[1, 2, 3, 4]], 0)], [], {request.request_id: 64})
    )
    assert engine.pool.held == {1, 2, 3, 4}
    engine.scheduler.finished(request)
    for worker in engine.workers:
        assert engine.pool.held == {1, 2, 3, 4}
        worker.start_saves(meta.saves, None)

        def reported(worker: object = worker) -> bool:
            worker.results()  # type: ignore[attr-defined]
            report = worker.report()  # type: ignore[attr-defined]
            if report is not None:
                engine.scheduler.report(report)
            return not worker.busy  # type: ignore[attr-defined]

        eventually(reported, "the rank's save ends")
    assert not engine.pool.held


def test_blocks_that_fill_up_while_decoding_are_saved(make: Make) -> None:
    engine = make()
    request = Request(tokens(30))
    engine.run(request, [[1, 2]])
    engine.drain()
    saved = []
    for at in range(40):
        request.tokens.append(1000 + at)
        if request.num_tokens % BLOCK_TOKENS == 1:
            grown = [(request.request_id, [[3 + at // BLOCK_TOKENS]])]
        else:
            grown = []
        meta = engine.scheduler.build(Step([], grown, {request.request_id: 1}))
        blocks = [[1, 2, 3, 4, 5]]
        engine.compute(request, blocks, request.num_tokens)
        request.num_computed_tokens = request.num_tokens
        saved += [block for job in meta.saves for part in job.parts for block in part.blocks]
        engine.step(meta)
    assert saved == [2, 3, 4]
    engine.scheduler.finished(request)
    engine.drain()
    assert engine.find(Request([*request.tokens, 1])) == 64


def test_a_block_that_the_last_step_filled_is_saved_when_the_request_ends(make: Make) -> None:
    engine = make()
    request = Request(tokens(32))
    # As with asynchronous scheduling: the step was built before its predecessor's token was known.
    engine.scheduler.allocated(request, [[1, 2, 3]], 0)
    engine.scheduler.build(
        Step([(request.request_id, [[1, 2, 3]], 0)], [], {request.request_id: 31})
    )
    request.tokens.append(5)
    request.num_computed_tokens = 32
    engine.scheduler.finished(request)
    meta = engine.scheduler.build(Step([], [], {}))
    assert [part.blocks for job in meta.saves for part in job.parts] == [[2]]


def test_rejected_draft_tokens_are_not_part_of_a_saved_block(make: Make) -> None:
    engine = make()
    request = Request(tokens(14))
    engine.scheduler.allocated(request, [[1, 2]], 0)
    # Five tokens are scheduled, four of them drafts: the block would be full, but only 14 tokens
    # are known.
    request.num_computed_tokens = 13
    meta = engine.scheduler.build(
        Step([(request.request_id, [[1, 2]], 13)], [], {request.request_id: 5})
    )
    assert not meta.saves


def test_a_request_that_ends_before_it_is_scheduled_gives_its_lease_back(
    daemon: Daemon, make: Make
) -> None:
    engine = make()
    prompt = engine.save_prompt()
    request = Request(prompt)
    assert engine.find(request) == 96
    eventually(lambda: daemon.leases() == 1, "the lease is shown")
    engine.scheduler.finished(request)
    eventually(lambda: (engine.idle(), daemon.leases() == 0)[1], "the lease is given back")


def test_a_hit_that_vllm_does_not_take_gives_its_lease_back(daemon: Daemon, make: Make) -> None:
    engine = make()
    prompt = engine.save_prompt()
    request = Request(prompt)
    assert engine.find(request) == 96
    engine.scheduler.allocated(request, [[1, 2, 3, 4, 5, 6, 7]], 0)
    eventually(lambda: (engine.idle(), daemon.leases() == 0)[1], "the lease is given back")


def test_a_load_that_fails_names_exactly_its_blocks(daemon: Daemon, make: Make) -> None:
    engine = make()
    prompt = engine.save_prompt()
    request = Request(prompt)
    assert engine.find(request) == 96
    daemon.kill()
    eventually(lambda: engine.away, "the client notices")
    results = engine.load(request, [[21, 22, 23, 24, 25, 26, 27]], 96)
    assert results.loaded == results.failed == {request.request_id}
    assert results.failed_blocks == {21, 22, 23, 24, 25, 26}


def test_a_request_whose_load_failed_is_computed_and_not_loaded_again(
    daemon: Daemon, make: Make
) -> None:
    engine = make()
    prompt = engine.save_prompt()
    request = Request(prompt)
    assert engine.find(request) == 96
    daemon.kill()
    eventually(lambda: engine.away, "the client notices")
    engine.load(request, [[21, 22, 23, 24, 25, 26, 27]], 96)
    daemon.start()
    eventually(lambda: engine.find(Request(prompt)) == 96, "the hits are back")
    assert engine.find(request) == 0


def test_hits_come_back_with_the_daemon(daemon: Daemon, make: Make) -> None:
    engine = make()
    prompt = engine.save_prompt()
    daemon.kill()
    eventually(lambda: engine.away, "the client notices")
    assert engine.find(Request(prompt)) == 0
    # Saves while it is away are lost, and give their blocks back.
    engine.save(Request(tokens(64, seed=9)), [[31, 32, 33, 34]])
    assert not engine.pool.held
    daemon.start()
    eventually(lambda: engine.find(Request(prompt)) == 96, "the hits are back")
    eventually(lambda: engine.clients[1].stats().reconnects == 1, "the worker counts it")
    engine.workers[0].count_transitions()
    counted = engine.workers[0].counters.take()
    assert counted["daemon_losses"] == counted["daemon_returns"] == 1
    assert counted["save_failures"] == 1


def test_local_hits_that_the_daemon_has_not_are_saved(make: Make) -> None:
    engine = make()
    request = Request(tokens(64))
    engine.compute(request, [[1, 2, 3, 4]], 64)
    assert engine.find(request, computed=48) == 0
    meta = engine.run(request, [[1, 2, 3, 4]], computed=48)
    assert [part.blocks for job in meta.saves for part in job.parts] == [[1, 2, 3, 4]]
    engine.drain()
    # And what the daemon has is not offered again, only what was computed.
    again = Request(request.tokens)
    assert engine.find(again, computed=48) == 0
    meta = engine.run(again, [[1, 2, 3, 4]], computed=48)
    assert [part.blocks for job in meta.saves for part in job.parts] == [[4]]


def test_saves_hold_no_more_than_their_share_of_the_blocks(make: Make) -> None:
    engine = make(config=ConnectorConfig(max_saving_percent=10), blocks=40)
    request = Request(tokens(160))
    meta = engine.run(request, [list(range(1, 11))])
    assert [len(part.blocks) for job in meta.saves for part in job.parts] == [4]
    assert engine.scheduler.counters.take()["unsaved_blocks"] == 6


def test_save_only_saves_and_asks_nothing(make: Make) -> None:
    config = ConnectorConfig(mode=ConnectorMode.SAVE_ONLY)
    engine = make(config=config)
    request = Request(tokens(64))
    assert engine.scheduler.matched(request, 0) == (0, False)
    engine.save(request, [[1, 2, 3, 4]])
    assert not engine.pool.held
    reader = make()
    assert reader.find(Request([*request.tokens, 1])) == 64


def test_load_only_saves_nothing(make: Make) -> None:
    engine = make(config=ConnectorConfig(mode=ConnectorMode.LOAD_ONLY))
    request = Request(tokens(64))
    assert engine.find(request) == 0
    assert not engine.run(request, [[1, 2, 3, 4]]).saves


def test_after_a_reset_nothing_of_before_is_found(make: Make) -> None:
    engine, other = make(), make()
    prompt = engine.save_prompt()
    engine.scheduler.reset()
    assert engine.find(Request(prompt)) == 0
    engine.save(Request(prompt), [[11, 12, 13, 14, 15, 16, 17]])
    request = Request(prompt)
    assert engine.find(request) == 96
    engine.load(request, [[21, 22, 23, 24, 25, 26]], 96)
    engine.verify(request, [[21, 22, 23, 24, 25, 26]], 96)
    # Others see the blocks of before, and none of the new ones.
    assert other.find(Request(prompt)) == 96
    fresh = tokens(64, seed=4)
    engine.save(Request(fresh), [[31, 32, 33, 34]])
    assert other.find(Request([*fresh, 1])) == 0


def test_an_adapter_whose_files_cannot_be_read_shares_with_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(_path: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(names, "fingerprint", gone)
    lora = SimpleNamespace(lora_int_id=1, lora_name="adapter", lora_path="/gone")
    request = SimpleNamespace(lora_request=lora)
    one, other = names.Adapters(), names.Adapters()
    assert one.mask(request) == one.mask(request)
    assert one.mask(request) != other.mask(request)


def test_an_adapter_of_the_same_name_and_path_with_other_weights_shares_nothing(
    make: Make, tmp_path: Path
) -> None:
    engine, successor, other = make(), make(), make()
    lora = SimpleNamespace(lora_int_id=1, lora_name="adapter", lora_path=str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    prompt = tokens(100)
    engine.save(Request(prompt, lora_request=lora), [[1, 2, 3, 4, 5, 6, 7]])
    assert engine.find(Request(prompt, lora_request=lora)) == 96
    assert successor.find(Request(prompt, lora_request=lora)) == 96
    assert successor.find(Request(prompt)) == 0
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    assert other.find(Request(prompt, lora_request=lora)) == 0


def test_an_adapter_that_was_written_anew_is_not_cached_any_more(
    make: Make, tmp_path: Path
) -> None:
    engine, other = make(), make()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    lora = SimpleNamespace(lora_int_id=1, lora_name="adapter", lora_path=str(tmp_path))
    prompt = tokens(100)
    engine.save(Request(prompt, lora_request=lora), [[1, 2, 3, 4, 5, 6, 7]])
    # vLLM may compute with either.
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    assert engine.find(Request(prompt, lora_request=lora)) == 0
    engine.save(Request(prompt, lora_request=lora), [[11, 12, 13, 14, 15, 16, 17]])
    for one in (engine, other):
        assert one.find(Request(prompt, lora_request=lora)) == 0
    # Removed and added again, or loaded in place: blocks of the old weights are in vLLM's own cache
    # all the same, and such a request begins with them.
    for more in ({"lora_int_id": 2}, {"lora_int_id": 1, "load_inplace": True}):
        fresh = SimpleNamespace(**vars(lora) | more)
        begins = Request(prompt, lora_request=fresh)
        assert engine.find(begins, 64) == 0
        engine.run(begins, [[1, 2, 3, 4, 15, 16, 17]], 64)
        engine.scheduler.finished(begins)
        engine.drain()
        for one in (engine, other):
            assert one.find(Request(prompt, lora_request=fresh)) == 0


def test_an_adapter_with_a_path_of_its_own_is_another_one_where_vllm_takes_it_for_one(
    tmp_path: Path,
) -> None:
    requests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
        lora = SimpleNamespace(lora_int_id=1, lora_name="a", lora_path=str(tmp_path / name))
        requests.append(SimpleNamespace(lora_request=lora))
    one, two = requests
    adapters = names.Adapters(by_path=True)
    masks = [adapters.mask(request) for request in (one, two, one, two)]
    assert masks[0] != masks[1]
    assert masks[:2] == masks[2:]
    # An older vLLM begins requests of the second with blocks of the first.
    adapters = names.Adapters(by_path=False)
    first = adapters.mask(one)
    assert first == adapters.mask(one) == masks[0]
    assert len({first, *(adapters.mask(request) for request in (two, two, one))}) == 4


def test_what_no_hit_can_end_in_is_not_asked_for(make: Make) -> None:
    engine = make()
    engine.lookup.beyond = BLOCK_TOKENS
    prompt = tokens(100)
    engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6, 7]])
    engine.scheduler.counters.take()
    # The last whole block is only looked at, and all before it is vLLM's.
    assert engine.find(Request(prompt), 80) == 0
    assert "queries" not in engine.scheduler.counters.take()
    assert engine.find(Request(prompt), 64) == 16
    assert engine.scheduler.counters.take()["queries"] == 1


def test_a_question_that_is_not_answered_in_time_is_a_miss(daemon: Daemon, make: Make) -> None:
    engine = make(config=ConnectorConfig(query_timeout_ms=50))
    prompt = engine.save_prompt()
    with daemon.stopped():
        began = time.monotonic()
        assert engine.find(Request(prompt)) == 0
        assert time.monotonic() - began >= 0.05
    assert engine.scheduler.counters.take()["query_timeouts"] == 1
    # Its lease, answered late, is not kept.
    eventually(lambda: (engine.idle(), daemon.leases() == 0)[1], "the late lease is given back")


def test_the_late_answer_to_a_question_given_up_leaves_the_next_ones_lease_alone(
    daemon: Daemon, make: Make
) -> None:
    engine = make(config=ConnectorConfig(query_timeout_ms=200))
    prompt = engine.save_prompt()
    request = Request(prompt)
    with daemon.stopped():
        assert engine.find(request) == 0
        eventually(lambda: engine.scheduler.matched(request, 0)[0] is None, "asked once more")
    eventually(lambda: engine.find(request) == 96, "the daemon answers")
    # Its first step gives the late answer's lease back.
    results = engine.load(request, [[11, 12, 13, 14, 15, 16]], 96)
    assert not results.failed
    engine.verify(request, [[11, 12, 13, 14, 15, 16]], 96)


def test_a_hit_that_cannot_be_asked_for_anew_gives_its_lease_back(
    daemon: Daemon, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(config=ConnectorConfig(query_timeout_ms=50, lease_ttl_ms=600_000))
    prompt = engine.save_prompt()
    request = Request(prompt)
    assert engine.find(request) == 96
    eventually(lambda: daemon.leases() == 1, "the lease is shown")
    monkeypatch.setattr(engine.lookup, "_clock", lambda: time.monotonic() + 3600)
    with daemon.stopped():
        assert engine.find(request) == 0
    eventually(lambda: (engine.idle(), daemon.leases() == 0)[1], "the lease is given back")


def test_open_questions_hold_a_step_up_no_longer_the_more_there_are(
    daemon: Daemon, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    waits: list[int] = []
    wait = engine.client.wait

    def recorded(request: int, timeout_ms: int) -> Completion:
        waits.append(timeout_ms)
        return wait(request, timeout_ms)

    monkeypatch.setattr(engine.client, "wait", recorded)
    with daemon.stopped():
        for round_ in range(2):
            waits.clear()
            for at in range(20):
                request = Request(tokens(64, seed=round_ * 100 + at))
                assert engine.scheduler.matched(request, 0) == (None, False)
            assert 0 < sum(waits) <= STEP_WAIT_MS
            engine.scheduler.build(Step([], [], {}))


def test_blocks_of_before_a_preemption_are_not_saved_as_those_of_a_load_of_another_connector(
    make: Make,
) -> None:
    engine = make(config=ConnectorConfig(mode=ConnectorMode.SAVE_ONLY))
    request = Request(tokens(64))
    engine.scheduler.allocated(request, [[1, 2, 3, 4]], 0)
    engine.scheduler.build(
        Step([(request.request_id, [[1, 2, 3, 4]], 0)], [], {request.request_id: 16})
    )
    # Preempted; then another connector of a MultiConnector loads all of it into other blocks, and
    # the request is aborted in the middle of that.
    engine.scheduler.allocated(request, [[11, 12, 13, 14]], 0)
    request.num_computed_tokens = 48
    engine.scheduler.finished(request)
    assert not engine.scheduler.build(Step([], [], {})).saves


def test_blocks_are_told_once_every_rank_has_stored_them(make: Make) -> None:
    engine = make(world_size=2, with_events=True)
    request = Request(tokens(40))
    engine.run(request, [[1, 2, 3]])
    engine.scheduler.finished(request)
    engine.drain()
    (event,) = engine.scheduler.events()
    assert event.hashes == request.block_hashes
    assert (event.parent, event.token_ids) == (None, tokens(32))
    assert not engine.scheduler.events()


def test_blocks_that_were_not_stored_are_not_told(daemon: Daemon, make: Make) -> None:
    engine = make(with_events=True)
    daemon.kill()
    eventually(lambda: engine.away, "the client notices")
    engine.save(Request(tokens(40)), [[1, 2, 3]])
    assert not engine.scheduler.events()


def test_blocks_that_were_not_offered_are_not_told(make: Make) -> None:
    config = ConnectorConfig(max_saving_percent=10)
    engine = make(config=config, blocks=40, with_events=True)
    engine.save(Request(tokens(160)), [list(range(1, 11))])
    engine.save(Request(tokens(40, seed=3)), [[11, 12, 13]])
    (event,) = engine.scheduler.events()
    assert event.token_ids == tokens(40, seed=3)[:32]


def test_memory_that_goes_to_sleep_is_let_go_and_found_again(make: Make) -> None:
    engine = make()
    prompt = tokens(100)
    engine.run(Request(prompt), [[1, 2, 3, 4, 5, 6, 7]])
    engine.workers[0].suspend()
    engine.workers[0].suspend()
    engine.drain()
    assert engine.find(Request(prompt)) == 0
    engine.workers[0].resume()
    engine.workers[0].resume()
    request = Request(prompt)
    eventually(lambda: engine.find(request) == 96, "the instance is complete again")
    engine.load(request, [[11, 12, 13, 14, 15, 16]], 96)
    engine.verify(request, [[11, 12, 13, 14, 15, 16]], 96)


def test_vllm_cannot_load_what_was_not_offered(make: Make) -> None:
    engine = make()
    request = Request(tokens(100))
    with pytest.raises(RuntimeError, match="has not offered"):
        engine.scheduler.allocated(request, [[1, 2, 3]], 48)


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with a tier below its pool, which gets every block."""
    with Daemon("--ssd", f"{tmp_path / 'tier'}:512MiB", "--ssd-admit", "seal") as running:
        yield running


def lose_the_pool(daemon: Daemon) -> None:
    """Afterwards all blocks are below the pool, and none in it."""
    daemon.stop()
    shutil.rmtree(Path(os.environ.get("PEGAFLOW_SHM_DIR", "/dev/shm/pegaflow")) / daemon.node)
    daemon.start()


def test_blocks_that_come_up_from_a_drive_are_waited_for_and_loaded(drive: Daemon) -> None:
    prompt = tokens(100)
    with contextlib.closing(Engine(drive)) as engine:
        engine.save(Request(prompt), [[1, 2, 3, 4, 5, 6, 7]])
    lose_the_pool(drive)
    with contextlib.closing(Engine(drive)) as engine:
        request = Request(prompt)
        assert engine.find(request) == 96
        assert engine.find(request) == 96
        engine.load(request, [[11, 12, 13, 14, 15, 16]], 96)
        engine.verify(request, [[11, 12, 13, 14, 15, 16]], 96)
