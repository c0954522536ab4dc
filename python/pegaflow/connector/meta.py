"""What the scheduler tells the workers in each step, and what they tell it back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class GroupLoad:
    """Blocks of one group that a load fills: position `first + i` of the lease goes to
    `blocks[i]`."""

    group: int
    lease: int
    first: int
    blocks: list[int]


@dataclass
class LoadJob:
    """All that one request loads."""

    request_id: str
    parts: list[GroupLoad]
    #: Blocks that cannot be loaded: vLLM has to compute them.
    refused: list[int] = field(default_factory=list)


@dataclass
class GroupSave:
    """Blocks of one group to be saved, and their names, 32 bytes each."""

    group: int
    hashes: bytes
    blocks: list[int]


@dataclass
class SaveJob:
    """All that one step saves. Every rank answers for it once, whatever came of it."""

    job: int
    parts: list[GroupSave]


@dataclass
class StepMeta:
    """From the scheduler to every worker, once per step."""

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    #: Neither this step nor one that may still run computes anything: a worker that waits a little
    #: for a load holds nobody of this engine up.
    idle: bool = False


@dataclass
class WorkerReport:
    """From the workers to the scheduler, once per step; those of several ranks are added up."""

    #: By save job: how many ranks are through with it.
    saved: dict[int, int] = field(default_factory=dict)
    #: Those of them of which a rank has not stored all blocks.
    incomplete: set[int] = field(default_factory=set)
    #: Requests whose load failed on a rank.
    failed_loads: set[str] = field(default_factory=set)
    #: The namespace that each rank registered; in the first report of a rank only.
    namespaces: list[dict[str, str | int | None]] = field(default_factory=list)

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """Adds what another rank says."""
        for job, ranks in other.saved.items():
            self.saved[job] = self.saved.get(job, 0) + ranks
        self.incomplete |= other.incomplete
        self.failed_loads |= other.failed_loads
        self.namespaces += other.namespaces
        return self

    def __bool__(self) -> bool:
        return bool(self.saved or self.failed_loads or self.namespaces)
