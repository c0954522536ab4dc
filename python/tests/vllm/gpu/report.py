"""Results as they come, and the table at the end: each figure beside the limit of its own run."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

#: What must hold, as ratios (see the table's last column).
WARM_LIMIT = 1.08
NO_REUSE_LIMIT = 1.01
DECODE_LIMIT = 1.03


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
            if setup in (None, line["setup"])
            and line["what"] == what
            and all(line[key] == value for key, value in like.items())
        ]

    def table(self) -> str:
        """What there is, for reading."""
        links = self.of(None, "link")
        gbps = links[0]["gbps"] if links else None
        rows = [f"\nlink {gbps:.1f} GB/s to the GPU" if gbps else "\nlink not measured"]
        names = list(dict.fromkeys(line["setup"] for line in self.lines))
        for name in names:
            rows += [
                f"{name:16} identity        {line['prompts']} prompts: cold differs"
                f" {line['cold_differs']}, loaded differs {line['warm_differs']} (vLLM's own"
                f" cold against cached: {line['vllm_cold_against_cached']};"
                f" {line['distinct_answers']} distinct answers)"
                for line in self.of(name, "identity")
            ]
            if gbps:
                rows += self.first_token(name, gbps)
                rows += self.many(name, gbps)
            rows += self.pairs(name)
            for line in self.of(name, "left out") + self.of(name, "failed"):
                text = str(line.get("why") or line.get("error")).splitlines()[0]
                rows.append(f"{name:16} {line['what']:15} {text}")
        return "\n".join(rows)

    def first_token(self, name: str, gbps: float) -> list[str]:
        """TTFT rows of one setup."""
        rows = []
        for tokens in dict.fromkeys(line["tokens"] for line in self.of(name, "ttft")):
            lines = self.of(name, "ttft", tokens=tokens)
            hits = [line for line in lines if line["hit"]]
            middle = {
                key: median(line[key] for line in lines)
                for key in ("none_cold", "none_own", "cold", "own")
            }
            limit = middle["none_own"] + lines[0]["moved"] / gbps / 1e6
            row = (
                f"{name:16} ttft {tokens:6}     cold {middle['cold']:7.1f} ms (none"
                f" {middle['none_cold']:.1f}), own cache {middle['own']:6.1f}"
                f" (none {middle['none_own']:.1f}), "
            )
            if hits:
                warm = median(line["warm"] for line in hits)
                row += f"warm {warm:7.1f}, limit {limit:6.1f}: x{warm / limit:.3f}"
                row += f" (most x{WARM_LIMIT})" if tokens == 10_000 else ""
                row += f" [{len(hits)} of {len(lines)} hit]"
            else:
                row += "NO HIT"
            rows.append(row)
        return rows

    def many(self, name: str, gbps: float) -> list[str]:
        """Rows of many requests at once."""
        rows = []
        for line in self.of(name, "at once"):
            limit = line["none_own"] + line["moved"] / gbps / 1e6
            rows.append(
                f"{name:16} {line['count']} x {line['tokens']}       cold {line['cold']:7.1f} ms,"
                f" warm {line['warm']:7.1f} (mean {line['warm_mean']:.1f}), limit {limit:.1f}:"
                f" x{line['warm'] / limit:.3f}" + ("" if line["hit"] else " NOT ALL HIT")
            )
        return rows

    def pairs(self, name: str) -> list[str]:
        """Rows of ratios taken in pairs."""
        rows = []
        lines = self.of(name, "no reuse")
        if lines:
            ratios = sorted(line["with"] / line["without"] for line in lines)
            rows.append(
                f"{name:16} no reuse        x{median(ratios):.4f} of {len(ratios)} pairs,"
                f" {ratios[0]:.4f} to {ratios[-1]:.4f}; without"
                f" {median(line['without'] for line in lines) / 1e3:.2f} s (most x{NO_REUSE_LIMIT})"
            )
        for what in ("saving", "loading"):
            lines = self.of(name, f"decode while {what}")
            if lines:
                ratios = sorted(line["with_"] / line["without"] for line in lines)
                p99 = median(line["with_p99"] / line["without_p99"] for line in lines)
                rows.append(
                    f"{name:16} decode, {what:7} x{median(ratios):.3f} of {len(ratios)},"
                    f" {ratios[0]:.3f} to {ratios[-1]:.3f}; p99 x{p99:.2f}; without"
                    f" {median(line['without'] for line in lines):.2f} ms"
                    f" (most x{DECODE_LIMIT})"
                )
        return rows
