"""The results as figures: ``python -m benchmarks.plots`` (``pip install '.[bench]'``) writes SVGs beside the tables.

``tpN.svg``: an operation's latency over the tokens, ours, the best peer of each cell and the floor. ``siteN.svg``: what
a site adds between two GEMMs, ours and each peer, with the meeting of the ranks that all of them pay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
HIDDEN = (4096, 8192)
PEERS = ("NCCL", "vLLM", "FlashInfer", "symm")
STYLES = {
    "ours": {"color": "#1b6e3c", "linewidth": 2.2, "marker": "o"},
    "best peer": {"color": "#b3411f", "marker": "s"},
    "floor": {"color": "#666666", "linestyle": "--"},
    "meeting": {"color": "#666666", "linestyle": "--"},
}


def is_peer(name: str) -> bool:
    return name.startswith(PEERS)


def latency_lines(results: dict[str, Any], hidden: int) -> dict[str, list[tuple[int, float]]]:
    """Tokens and µs by line, of the plain norm."""
    from benchmarks.timing import floor_microseconds

    quantised = ("FP8", "NVFP4", "MXFP8")
    lines: dict[str, list[tuple[int, float]]] = {"best peer": [], "ours": [], "floor": []}
    for key, row in results["us"].items():
        h, tokens = map(int, key.split("x"))
        if h != hidden:
            continue
        peers = [us for name, us in row.items() if is_peer(name) and not any(q in name for q in quantised)]
        if peers:
            lines["best peer"].append((tokens, min(peers)))
        lines["ours"].append((tokens, row["ours"]))
        lines["floor"].append((tokens, floor_microseconds(h * tokens * 2, results["world"])))
    return lines


def site_lines(results: dict[str, Any], layer: str) -> dict[str, list[tuple[int, float]]]:
    """Tokens and added µs by contender, of one layer's chain (``"llama-8b bf16"``)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, cell in results["cells"].items():
        chain, _, tokens = key.rpartition(" ")
        for name, (median, _, _) in cell["adds"].items() if chain == layer else ():
            if is_peer(name) or name in ("ours", "meeting"):
                lines.setdefault(name, []).append((int(tokens), median))
    return lines


def draw(axes: Any, lines: dict[str, list[tuple[int, float]]], title: str) -> None:
    for name, points in lines.items():
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True),
                label=name,
                **{"linewidth": 1.3, "marker": "."} | STYLES.get(name, {}),
            )
    tokens = sorted({t for points in lines.values() for t, _ in points})
    axes.set(title=title, xlabel="tokens", ylabel="µs", xscale="log", yscale="log", xticks=tokens)
    axes.set_xticklabels(list(map(str, tokens)), fontsize=7)
    lowest = min(us for points in lines.values() for _, us in points)
    highest = max(us for points in lines.values() for _, us in points)
    ticks = [2.0**i for i in range(math.floor(math.log2(max(lowest, 0.5))), math.ceil(math.log2(highest)) + 1)]
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def figure(path: Path, panels: Iterable[tuple[str, dict[str, list[tuple[int, float]]]]]) -> None:
    """One SVG with a panel a title."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "arfusion"  # the same figure, the same file
    import matplotlib.pyplot as plt

    shown = [(title, lines) for title, lines in panels if any(lines.values())]
    fig, row = plt.subplots(1, len(shown), figsize=(4.6 * len(shown) + 1.4, 3.4), squeeze=False)
    for axes, (title, lines) in zip(row[0], shown, strict=True):
        draw(axes, lines, title)
    handles, labels = row[0][0].get_legend_handles_labels()
    fig.tight_layout(rect=(0, 0, 0.86, 1))
    fig.legend(handles, labels, loc="center left", bbox_to_anchor=(0.86, 0.5), fontsize=8, frameon=False)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    print(path)


def main() -> None:
    for path in sorted(RESULTS.glob("tp[0-9].json")):
        results = json.loads(path.read_text())
        figure(
            path.with_suffix(".svg"),
            [(f"hidden {h}, {results['world']} GPUs, back to back", latency_lines(results, h)) for h in HIDDEN],
        )
    for path in sorted(RESULTS.glob("site[0-9].json")):
        results = json.loads(path.read_text())
        layers = dict.fromkeys(key.rpartition(" ")[0] for key in results["cells"] if " bf16 " in key)
        figure(
            path.with_suffix(".svg"),
            [
                (f"{layer}, {results['world']} GPUs, between GEMMs", site_lines(results, layer))
                for layer in list(layers)[:2]
            ],
        )


if __name__ == "__main__":
    main()
