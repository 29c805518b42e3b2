"""Results as Markdown, from the same numbers as the JSON beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def short_name(device: str) -> str:
    """h100 of "NVIDIA H100 80GB HBM3", rtx-4090 of "NVIDIA GeForce RTX 4090"."""
    words = re.sub(r"[^\w.]+", " ", device).lower().split()
    dropped = r"nvidia|geforce|tesla|\d+gb|hbm\d\w*|pcie|sxm\d*|nvl"
    return "-".join(word for word in words if not re.fullmatch(dropped, word)) or "gpu"


def markdown(result: dict[str, Any]) -> str:
    """The page of one machine. `result` is what `Bench.result` gave, read back from JSON or not."""
    parts = [f"# {result['device']}\n", _machine(result)]
    if result["problems"]:
        parts.append("## Wrong or broken\n\n" + "\n".join(f"- {p}" for p in result["problems"]))
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        sections.setdefault(row["section"], []).append(row)
    parts += [f"## {name}\n\n{_rows(rows)}" for name, rows in sections.items()]
    if result.get("kmeans_assign"):
        parts.append("## kmeans_assign and bandwidth\n\n" + _bandwidth(result))
    if result.get("stages"):
        parts.append("## Checks on this machine\n\n" + _stages(result["stages"]))
    if result["sweeps"]:
        parts.append("## Alternatives\n\n" + _sweeps(result["sweeps"]))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _machine(result: dict[str, Any]) -> str:
    ceilings = result.get("ceilings", {})
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"- command: `{result['command']}`, {result['date']}, commit {result['commit']}",
        f"- {versions}, driver {result['driver']}",
        "- measured ceilings: "
        + ", ".join(f"{value:,.0f} {name}" for name, value in ceilings.items()),
        "- times are microseconds of a CUDA graph between two events, medians with quartiles, "
        "the L2 cache emptied before; in `warm` it is not. `times` is the better dense time over "
        "ours: above 1 ours is faster",
    ]
    if "microseconds of nothing" in result:
        lines.append(
            f"- an empty graph takes {result['microseconds of nothing']:.1f} us, "
            "which is in every time"
        )
    if "microseconds a call" in result:
        calls = ", ".join(f"{n} {us:.0f}" for n, us in result["microseconds a call"].items())
        lines.append(f"- a call from Python without a graph, us: {calls}")
    if "faiss" in result:
        lines.append(f"- faiss: {result['faiss']}")
    for what in result.get("left out for want of time", []):
        lines.append(f"- left out for want of time: {what}")
    return "\n".join(lines)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are set to the right."""
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(rows: list[dict[str, Any]]) -> str:
    labels = list(rows[0]["case"])
    headings = [
        *labels,
        "ours us",
        "dense us",
        "ours",
        "dense",
        "times",
        "target",
        "",
        "warm times",
    ]
    lines = []
    for row in rows:
        ours, peer = row["times"][row["ours"]], row["times"][row["peer"]]
        target = row["target"]
        met = "" if target is None else "met" if row["ratio"] >= target else "missed"
        lines.append(
            [
                *(_word(row["case"][label]) for label in labels),
                *(f"{t['us']:.1f} ({t['low']:.1f} to {t['high']:.1f})" for t in (ours, peer)),
                row["ours"].removeprefix("ours, "),
                row["peer"].removeprefix("dense "),
                f"{row['ratio']:.2f}",
                "" if target is None else f"{target:g}",
                met,
                f"{row['warm_ratio']:.2f}",
            ]
        )
    return table(headings, lines)


def _bandwidth(result: dict[str, Any]) -> str:
    lines = []
    for name, facts in result["kmeans_assign"].items():
        share, wanted = facts["share of copy"], facts["target share"]
        met = "met" if share >= wanted else "missed"
        lines.append([name, f"{facts['GB/s']:,.0f}", f"{share:.2f}", f"{wanted:g}", met])
    return table(["5 bytes a weight", "GB/s", "share of a copy", "target", ""], lines)


def _stages(stages: list[dict[str, Any]]) -> str:
    lines = [
        [
            s["name"],
            f"{s['seconds']:.0f}",
            s["outcome"],
            s["last_line"].strip("= ").replace("|", " "),
        ]
        for s in stages
    ]
    return table(["stage of `make gpu`", "s", "", "its last line"], lines)


def _sweeps(sweeps: list[dict[str, Any]]) -> str:
    parts = []
    for question in dict.fromkeys(sweep["question"] for sweep in sweeps):
        own = [s for s in sweeps if s["question"] == question]
        labels = [k for k in own[0] if k not in ("question", "us", "warm", "best")]
        names = list(dict.fromkeys(name for s in own for name in s["us"]))
        lines = [
            [*(_word(s[k]) for k in labels), *(_us(s["us"].get(n)) for n in names), s["best"]]
            for s in own
        ]
        parts.append(f"### {question}, us\n\n{table([*labels, *names, 'best'], lines)}")
    return "\n\n".join(parts)


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _word(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
