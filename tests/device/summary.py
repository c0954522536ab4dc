#!/usr/bin/env python3
"""One table of what tests/device/run.sh has measured: each line passes or fails by its target.

Usage: summary.py FOLDER, the folder with the outputs. The status is 1 if anything failed, or if
nothing was measured.
"""

import json
import pathlib
import sys

MIB = 1 << 20


def read(folder: pathlib.Path, name: str):
    """The last line of JSON that a step has printed, or None."""
    text = (folder / f"{name}.out").read_text()
    try:
        return json.loads(text)
    except ValueError:
        pass
    for line in reversed(text.splitlines()):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None


def bench_lines(report: dict):
    """Verdict (None for a figure without target), what, figure, of which limit, target."""
    for gpu in report["gpus"]:
        limit = gpu["limit"]
        yield None, f"GPU {gpu['gpu']}, {gpu['name']}: large copies", rates(limit), "", ""
    for joint in report["joint"]:
        gpus = ",".join(str(gpu) for gpu in joint["gpus"])
        yield None, f"GPUs {gpus} at once: large copies", rates(joint["limit"]), "", ""
    for row in report["rows"]:
        gpus = ",".join(str(gpu) for gpu in row["gpus"])
        digits = 1 if row["unit"] in ("GB/s", "ms", "us") else 3
        figure = f"{row['value']:.{digits}f} {row['unit']}"
        limit = target = ""
        is_rate = row["unit"] == "GB/s"
        if row["ratio"] is not None and is_rate:
            limit = f"{100 * row['ratio']:.1f} % of {row['limit']:.1f}"
        elif row["ratio"] is not None:
            limit = f"{row['ratio']:.3f} of the raw copies' {row['limit']:.3f} {row['unit']}"
        if row["target"] is not None and is_rate:
            target = f">= {100 * row['target']:.0f} %"
        elif row["target"] is not None:
            target = f"<= {row['target']:g} {row['unit']}"
        yield row["met"], f"GPU {gpus}: {row['case']}: {row['what']}", figure, limit, target


def times(beside: dict, alone: dict) -> str:
    median = beside["median_ns"] / alone["median_ns"]
    mean = beside["mean_ns"] / alone["mean_ns"]
    return f"x{median:.3f} (mean x{mean:.3f})"


def raw_lines(report: dict):
    for row in report.get("raw", []):
        what = f"GPU {row['gpu']}: raw copies, {row['name']}: {row['compute']}"
        figure = f"out {row['out_gbps']:.1f}, in {row['in_gbps']:.1f} GB/s"
        slower = [times(row[beside], row["alone"]) for beside in ("beside_out", "beside_in")]
        yield None, what, figure, " / ".join(slower), ""


def rates(limit: dict) -> str:
    names = (("out", "out_gbps"), ("in", "in_gbps"), ("both", "both_gbps"))
    return ", ".join(f"{name} {limit[key]:.1f}" for name, key in names) + " GB/s"


def curve_lines(report: dict):
    for point in report.get("curve", []):
        idle = f"save {point['save_gbps']:.1f}, load {point['load_gbps']:.1f} GB/s"
        yield None, f"way: {point['way']}: engine idle", idle, "", ""
        for compute, slow in point["beside"].items():
            alone = slow["alone"]
            figure = f"save {slow['save_gbps']:.1f}, load {slow['load_gbps']:.1f} GB/s"
            slower = [times(slow[part], alone) for part in ("saving", "loading")]
            yield None, f"way: {point['way']}: {compute}", figure, " / ".join(slower), ""


def soak_lines(name: str, summary: dict):
    tally = summary["tally"]
    good = not summary["faults"] and tally["loads"] > 0 and tally["saves"] > 0
    if summary["seconds"] >= 10:
        good = good and summary["killed"] > 0
    figure = (
        f"{len(summary['faults'])} faults in {summary['seconds']:.0f} s: {tally['saves']} saves, "
        f"{tally['loads']} loads, {tally['loaded_bytes'] / 1e9:.1f} GB compared"
    )
    deaths = (
        f"{summary['engines']} engines, {summary['killed']} killed, {summary['broken']} of them "
        f"broken, {summary['daemon_kills']} daemons killed, {tally['cancels']} cancels"
    )
    yield good, f"{name}: every byte compared", figure, deaths, "0 faults"
    held = summary["daemon_gpu_bytes"]
    for gpu, held_bytes in enumerate(held):
        what = f"{name}: daemon's memory of GPU {gpu} when its engines have gone"
        yield held_bytes <= 700 * MIB, what, f"{held_bytes / MIB:.0f} MiB", "", "<= 700 MiB"
    for fault in summary["faults"]:
        yield False, f"{name}: fault", fault[:200], "", ""


def lines(folder: pathlib.Path):
    for path in sorted(folder.glob("*.status")):
        name = path.stem
        status = int(path.read_text())
        report = read(folder, name) if name != "doctor" else None
        if isinstance(report, dict) and "rows" in report:
            yield from bench_lines(report)
            yield from raw_lines(report)
            yield from curve_lines(report)
        elif isinstance(report, dict) and "tally" in report:
            yield from soak_lines(name, report)
        elif status == 0 and name != "doctor":
            yield False, name, "said nothing that can be read", "", ""
        if status != 0:
            yield False, name, f"ended with status {status}", "", "0"


def main() -> int:
    folder = pathlib.Path(sys.argv[1])
    all_lines = list(lines(folder))
    words = {True: "PASS", False: "FAIL", None: ""}
    cells = [(words[met], *rest) for met, *rest in all_lines]
    widths = [max((len(row[at]) for row in cells), default=0) for at in range(4)]
    print()
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)), row[4])
    judged = [met for met, *_ in all_lines if met is not None]
    print(f"\n{sum(judged)} passed, {len(judged) - sum(judged)} failed")
    return 0 if judged and all(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
