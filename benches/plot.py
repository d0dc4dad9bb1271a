#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Draws requests per second and CPU time over queue depth, ours and the peer's, from what `run.py` has measured.

The same JSON gives the same SVG, byte for byte (with the same matplotlib).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
LINES: Final = {"ours": ("vhu-legacy", "#0b6e99", "o"), "qsd": ("qemu-storage-daemon", "#c8553d", "s")}
TITLES: Final = {"null": "null image (RAM)", "file": "file image (page cache)"}


def series(
    sweep: list[dict[str, Any]], image: str, name: str, pick: Callable[[dict[str, Any]], float | None]
) -> list[tuple[int, float, float, float]]:
    """Depth, minimum, median, maximum."""
    points = []
    for cell in sweep:
        if cell["image"] != image:
            continue
        values = [value for one in cell["samples"].get(name, []) if one and (value := pick(one)) is not None]
        if values:
            points.append((cell["depth"], min(values), statistics.median(values), max(values)))
    return sorted(points)


def draw(axes: Any, sweep: list[dict[str, Any]], image: str, pick: Callable[[dict[str, Any]], float | None]) -> None:
    for name, (label, colour, marker) in LINES.items():
        points = series(sweep, image, name, pick)
        depths = [point[0] for point in points]
        axes.plot(depths, [point[2] for point in points], color=colour, marker=marker, markersize=4, label=label)
        low, high = [point[1] for point in points], [point[3] for point in points]
        axes.fill_between(depths, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plot(result: dict[str, Any], output: Path) -> None:
    # only who draws needs it, and it has no types of its own
    mpl = importlib.import_module("matplotlib")
    mpl.use("svg")
    plt = importlib.import_module("matplotlib.pyplot")
    ticker = importlib.import_module("matplotlib.ticker")
    sweep, on, settings = result["sweep"], result["machine"], result["settings"]
    mpl.rcParams.update({"svg.hashsalt": "vhu-legacy", "svg.fonttype": "none", "font.family": "sans-serif"})
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure, grid = plt.subplots(2, 2, figsize=(8.2, 6.0), sharex=True)
    figure.patch.set_facecolor("white")
    depths = sorted({cell["depth"] for cell in sweep})
    for column, image in enumerate(TITLES):
        rate, cpu = grid[0][column], grid[1][column]
        draw(rate, sweep, image, lambda one: one["iops"] / 1e3)
        draw(cpu, sweep, image, lambda one: one["cpu_seconds_per_million"] or None)
        rate.set_title(TITLES[image])
        rate.set_ylim(bottom=0)
        cpu.set_yscale("log")
        cpu.set_xticks(depths, [str(depth) for depth in depths])
        cpu.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        cpu.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        for axis in (rate.xaxis, cpu.xaxis, cpu.yaxis):
            axis.set_minor_locator(ticker.NullLocator())
        cpu.set_xlabel("requests in flight")
    grid[0][0].set_ylabel("thousand requests per second")
    grid[1][0].set_ylabel("CPU seconds per million requests")
    grid[0][0].legend(frameon=False, loc="upper left")
    line = f"{on['cpus']} CPUs {on['cpu']}, {on['kernel']}, load {on['load']:.1f} at the start, {on['time'][:10]}"
    peer = f"{on['qemu_storage_daemon'].split(' (')[0]}; 4 KiB random reads, eventfd both ways, one thread each"
    rounds = f"median, minimum and maximum of {settings['rounds']} rounds of {settings['seconds']} s"
    figure.text(0.01, 0.008, f"{line}\n{peer}; {rounds}", fontsize=7, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="svg", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "target" / "bench.json", help="what run.py has written")
    parser.add_argument("--output", type=Path, default=ROOT / "target" / "iops-cpu-over-queue-depth.svg")
    options = parser.parse_args()
    try:
        result = json.loads(options.json.read_text())
        if not result["sweep"]:
            raise ValueError("no sweep in it (--only or --no-sweep was used)")
        plot(result, options.output)
    except (ImportError, OSError, ValueError, KeyError) as error:
        print(f"plot: {error!r}", file=sys.stderr)
        return 1
    print(f"plot: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
