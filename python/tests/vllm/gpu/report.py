"""Results as they come, and the table at the end: each figure beside the limit of its own round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

NONE = "none"
#: What must hold, as ratios.
WARM_LIMIT = 1.08
NO_REUSE_LIMIT = 1.01
DECODE_LIMIT = 1.03


def spread(values: Iterable[float], form: str) -> str:
    """The middle, the smallest and the largest."""
    ordered = sorted(values)
    low, middle, high = (format(one, form) for one in (ordered[0], median(ordered), ordered[-1]))
    return f"{middle} ({low} to {high})"


class Results:
    """Lines of results."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self.emit = emit
        self.lines: list[dict[str, Any]] = []

    def add(self, setup: str, what: str, **figures: Any) -> None:
        """Keeps a result and shows it at once."""
        line = {"setup": setup, "what": what, **figures}
        self.lines.append(line)
        self.emit(line)

    def failed(self) -> bool:
        """Something could not be measured, or outputs differ."""
        return any(line["what"] == "failed" for line in self.lines) or any(
            line["cold_differs"] or line["warm_differs"] for line in self.of(None, "identity")
        )

    def of(self, setup: str | None, what: str, **like: Any) -> list[dict[str, Any]]:
        """Results of one kind."""
        return [
            line
            for line in self.lines
            if line["what"] == what
            and setup in (None, line["setup"])
            and all(line[key] == value for key, value in like.items())
        ]

    def middle(self, setup: str, what: str, key: str, **like: Any) -> float | None:
        """The median of what was measured of a setup."""
        values = [line[key] for line in self.of(setup, what, **like) if key in line]
        return median(values) if values else None

    def pairs(self, setup: str, what: str, key: str, **like: Any) -> list[float]:
        """A setup's figure over that without a connector, of each round that has both."""
        ratios = []
        for part in dict.fromkeys(line["part"] for line in self.of(setup, what, **like)):
            own, without = (self.middle(one, what, key, part=part, **like) for one in (setup, NONE))
            if own is not None and without is not None:
                ratios.append(own / without)
        return ratios

    # ------------------------------------------------------------ the table

    def table(self) -> str:
        """All there is, for people to read."""
        gbps = next((line["gbps"] for line in self.of("machine", "link")), None)
        rows = ["", f"link {gbps:.1f} GB/s to the GPU" if gbps else "link not measured"]
        for name in dict.fromkeys(line["setup"] for line in self.lines):
            rows += [
                f"{name:16} identity        {line['prompts']} prompts: cold differs"
                f" {line['cold_differs']}, loaded differs {line['warm_differs']} (vLLM's own"
                f" cold against cached: {line['vllm_cold_against_cached']};"
                f" one altered block: {line['altered_differs']})"
                for line in self.of(name, "identity")
            ]
            rows += self.first_token(name, gbps)
            rows += self.many(name, gbps)
            rows += self.compared(name)
        for line in self.of(None, "left out") + self.of(None, "failed"):
            text = str(line.get("why") or line.get("error")).splitlines()[0]
            rows.append(f"{line['what']:16} {line['part']}: {text}")
        return "\n".join(rows)

    def first_token(self, name: str, gbps: float | None) -> list[str]:
        """First token of a prompt. The limit is vLLM's own cache and the bytes over the link."""
        rows = []
        for tokens in sorted({line["tokens"] for line in self.of(name, "ttft")}):
            lines = self.of(name, "ttft", tokens=tokens)
            cold, own_cache = (
                spread((line[key] for line in lines), ".1f") for key in ("cold", "own")
            )
            row = f"{name:16} ttft {tokens:6}     cold {cold} ms, own cache {own_cache}"
            hits = [line for line in lines if line.get("hit")]
            if hits and gbps:
                ratios = []
                for part in dict.fromkeys(line["part"] for line in hits):
                    own = self.middle(NONE, "ttft", "own", tokens=tokens, part=part)
                    warm = median(line["warm"] for line in hits if line["part"] == part)
                    if own is not None:
                        ratios.append(warm / (own + hits[0]["moved"] / gbps / 1e6))
                own = self.middle(NONE, "ttft", "own", tokens=tokens)
                row += f", loaded {spread((x['warm'] for x in hits), '.1f')}"
                if own is not None and ratios:
                    limit = own + hits[0]["moved"] / gbps / 1e6
                    warm = median(line["warm"] for line in hits)
                    row += (
                        f", limit {limit:.1f}: x{warm / limit:.3f}, rounds {spread(ratios, '.3f')}"
                    )
                row += f" (most x{WARM_LIMIT})" if tokens == 10_000 else ""
                # The same engine, the same prompt, a moment later: what the machine does to one it
                # does to the other.
                link = hits[0]["moved"] / gbps / 1e6
                pairs = [x["warm"] / (x["own"] + link) for x in hits]
                row += f"; of its own cache and link x{spread(pairs, '.3f')},"
                row += (
                    f" beyond them {spread((x['warm'] - x['own'] - link for x in hits), '.1f')} ms"
                )
                row += f" [{len(hits)} of {len(lines)} hit]"
            elif name != NONE:
                row += ", NO HIT"
            rows.append(row)
        return rows

    def many(self, name: str, gbps: float | None) -> list[str]:
        """Many requests at once."""
        lines = self.of(name, "at once")
        if not lines:
            return []
        row = f"{name:16} {lines[0]['count']} x {lines[0]['tokens']}       cold"
        row += f" {spread((line['cold'] for line in lines), '.0f')} ms"
        own = self.middle(NONE, "at once", "own")
        if name == NONE:
            return [row + f", own cache {spread((line['own'] for line in lines), '.0f')}"]
        row += f", loaded {spread((line['warm'] for line in lines), '.0f')}"
        row += f" (mean {median(line['warm_mean'] for line in lines):.0f})"
        if own is not None and gbps:
            limit = own + lines[0]["moved"] / gbps / 1e6
            row += f", limit {limit:.0f}: x{median(line['warm'] for line in lines) / limit:.3f}"
        return [row + ("" if all(line["hit"] for line in lines) else " NOT ALL HIT")]

    def compared(self, name: str) -> list[str]:
        """What is compared with no connector, round by round."""
        rows = []
        kinds = (
            ("no reuse", "ms", "ms", 1e-3, f" (most x{NO_REUSE_LIMIT})"),
            ("decode while saving", "tpot_ms", "gap_p99_ms", 1.0, f" (most x{DECODE_LIMIT})"),
            ("decode while loading", "tpot_ms", "gap_p99_ms", 1.0, f" (most x{DECODE_LIMIT})"),
        )
        for what, key, tail, scale, most in kinds:
            lines = self.of(name, what)
            if not lines:
                continue
            row = f"{name:16} {what:20}  {spread((x[key] * scale for x in lines), '.2f')}"
            ratios = self.pairs(name, what, key)
            if name != NONE and ratios:
                row += f", x{spread(ratios, '.4f')} of {len(ratios)}"
                if tail != key:
                    row += f"; p99 x{spread(self.pairs(name, what, tail), '.2f')}"
                row += most
            rows.append(row)
        return rows
