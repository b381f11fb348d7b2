"""What `pathrnn bench` writes and reads: result files, their Markdown, and what changed between two of them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .rows import CONTEXT, OURS, PARTS

SCHEMA = 1

#: A change of a ratio by less than this is no change, whatever the intervals say. They know the noise of one run; from
#: run to run, ours and the baselines slow down differently (bench/NOTES.md: by a tenth or so).
LEAST_CHANGE = 0.10

TITLES = {
    "kappa1": "κ⁽¹⁾",
    "kappa2": "κ⁽¹⁾ + κ⁽²⁾",
    "path_norm": "γ² and its gradient",
    "forward": "ReLURNN forward",
    "backward": "ReLURNN forward + backward",
    "update": "an optimiser's step on given gradients, and κ's call",
    "step": "training step, PathSGD or GatedPathSGD on ReLURNN",
    "memory": "peak memory of a call",
    "random": "ReLURNN forward + backward, random sizes",
}

_OF_ROW = (
    "part",
    "label",
    "axes",
    "hidden",
    "seq_len",
    "batch",
    "unit",
    "flops",
    "bytes",
    "figures",
    "ratios",
    "absent",
)


class ResultError(Exception):
    """A file that is no result file."""


def save(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a run that is cut off leaves the file before it."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path} is no result file of pathrnn bench: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ResultError(f"{path} is no result file of pathrnn bench with schema {SCHEMA}")
    if missing := [key for key in ("machine", "parts", "rows") if key not in result]:
        raise ResultError(f"{path} lacks {', '.join(missing)}")
    if not isinstance(result["rows"], list) or not all(isinstance(row, dict) for row in result["rows"]):
        raise ResultError(f"{path} is damaged: its rows are no list of objects")
    for row in result["rows"]:
        if missing := [key for key in _OF_ROW if key not in row]:
            raise ResultError(f"{path}: a row lacks {', '.join(missing)}")
    return result


# ---- text ------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else (f"{value:.3f}")
    )


def spread(values: list[float], unit: str = "") -> str:
    median, low, high = map(number, values)
    return f"{median}{unit} [{low}, {high}]"


def lines(row: dict[str, Any]) -> list[str]:
    """A row on the terminal, a line a baseline."""
    figures, unit = row["figures"], row["unit"]
    head = f"{row['part']:<10}{row['label']:<34}{number(figures[OURS][0]):>9} {unit}"
    found = [
        f"{name:<27}{number(figures[name][0]):>9} {unit}  {spread(ratio, 'x'):<26}"
        for name, ratio in row["ratios"].items()
    ] or [""]
    share = f"{row['roofline']:.0%} of roofline" if "roofline" in row else ""
    return [f"{head if i == 0 else '':<57}{text}{share if i == 0 else ''}".rstrip() for i, text in enumerate(found)]


def summary(rows: list[dict[str, Any]]) -> str | None:
    """The random sizes in one line."""
    ratios = {row["label"]: row["ratios"]["nn.RNN"][0] for row in rows if row["part"] == "random" and row["ratios"]}
    if not ratios:
        return None
    least = min(ratios, key=lambda label: ratios[label])
    return (
        f"{len(ratios)} random sizes, forward + backward against nn.RNN: "
        f"least {number(ratios[least])}x ({least}), median {number(statistics.median(ratios.values()))}x"
    )


def table(result: dict[str, Any], part: str) -> list[str]:
    rows = [row for row in result["rows"] if row["part"] == part]
    if not rows:
        return []
    unit = rows[0]["unit"]
    found = [
        f"| {TITLES[part]} | ours, {unit} | against | {unit} | ratio | of roofline |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = row["figures"]
        share = f"{row['roofline']:.0%}" if "roofline" in row else ""
        first = (row["label"], spread(figures[OURS]), share)
        for name, ratio in row["ratios"].items() or {"": None}.items():
            theirs, times = (spread(figures[name]), spread(ratio, "x")) if ratio else ("", "")
            found.append(f"| {first[0]} | {first[1]} | {name} | {theirs} | {times} | {first[2]} |")
            first = ("", "", "")
    return [*found, ""]


def behind(rows: list[dict[str, Any]]) -> list[str]:
    """Rows that a peer wins beyond noise, and of the paper's sizes the three furthest from the roofline."""
    found = [
        f"{TITLES[row['part']]}, {row['label']}: {name} is faster, {spread(ratio, 'x')}"
        for row in rows
        for name, ratio in row["ratios"].items()
        if ratio[2] < 1 and name not in CONTEXT and row["unit"] == "ms"
    ]
    furthest = sorted(
        (row for row in rows if "roofline" in row and "P" in row["axes"] and row["hidden"] >= 100),
        key=lambda row: row["roofline"],
    )[:3]
    return found + [f"{TITLES[row['part']]}, {row['label']}: {row['roofline']:.2%} of the roofline" for row in furthest]


def markdown(result: dict[str, Any], pictures: list[str]) -> str:
    found = [f"# {result['device']}, {result['date']}", ""]
    if not result["complete"]:
        found += ["**This run did not finish.**", ""]
    found += [
        f"`{result['command']}`, {result['minutes']:.1f} minutes. Medians with quartiles, in {result['rounds']}",
        "interleaved rounds; ratios are medians over the rounds with a 95 % interval, above 1 where ours is better.",
        "The roofline is the larger of a row's operations at the rate of a large product and its bytes at the rate of",
        "reading memory, both measured below; more than 100 % is possible where a kernel needs fewer steps than the",
        "definition, or where the caches hold its operands.",
        "",
        *(f"- {key}: {value}" for key, value in result["machine"].items()),
        *(f"- {key}: {value:.0f}" for key, value in result["ceilings"].items()),
        "",
    ]
    gate = result["gate"]
    found += [f"Gate: {gate['agree']} rows agree with the oracle in float64, {len(gate['disagree'])} do not.", ""]
    found += [f"- {label}: {why}" for label, why in gate["disagree"].items()]
    found += [f"- no figure for {label}: {why}" for label, why in result["withheld"].items()]
    for name in pictures:
        found += [f"![{Path(name).stem}]({name})", ""]
    for part in PARTS:
        if part != "random":
            found += table(result, part)
    if (text := summary(result["rows"])) is not None:
        found += [text[0].upper() + text[1:] + ".", ""]
    if places := behind(result["rows"]):
        found += ["## Where to look next", "", *(f"- {place}" for place in places), ""]
    reasons: dict[tuple[str, str], int] = {}
    for row in result["rows"]:
        for name, why in row["absent"].items():
            reasons[name, why] = reasons.get((name, why), 0) + 1
    if reasons:
        found += ["## Left out", "", *(f"- {name}, {n} rows: {why}" for (name, why), n in reasons.items()), ""]
    return "\n".join(found)


# ---- two runs --------------------------------------------------------------------------------------------------------


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[str]]:
    """What became slower or faster beyond noise, what is new or gone, and what of the machine differs.

    Compared are ratios to the first baseline that both runs have, since times move with the machine: one changed if
    its two intervals do not overlap and its medians differ by at least ``LEAST_CHANGE``.
    """
    before, after = ({(row["part"], row["label"]): row for row in result["rows"]} for result in (old, new))
    found: dict[str, list[str]] = {"slower": [], "faster": [], "gone": [], "new": [], "machine": []}
    # Parts that --only left out are not gone.
    found["gone"] = [" ".join(key) for key in before.keys() - after.keys() if key[0] in new["parts"]]
    for key, row in after.items():
        if key not in before:
            found["new"].append(" ".join(key))
            continue
        common = [name for name in before[key]["ratios"] if name in row["ratios"]]
        if not common:
            found["gone"].append(f"{' '.join(key)}: no baseline in common")
            continue
        a, b = (run["ratios"][common[0]] for run in (before[key], row))
        if min(a[2], b[2]) >= max(a[1], b[1]) or max(a[0] / b[0], b[0] / a[0]) < 1 + LEAST_CHANGE:
            continue
        text = f"{' '.join(key)} against {common[0]}: {spread(a, 'x')} → {spread(b, 'x')}"
        found["slower" if b[0] < a[0] else "faster"].append(text)
    for key in old["machine"].keys() | new["machine"].keys():
        a, b = (run["machine"].get(key, "nothing") for run in (old, new))
        if a != b and key not in ("commit", "load before"):
            found["machine"].append(f"{key}: {a} → {b}")
    return {kind: sorted(entries) for kind, entries in found.items()}


def changes(found: dict[str, list[str]]) -> list[str]:
    """The comparison in words, a line an entry."""
    titles = {
        "slower": "slower beyond noise",
        "faster": "faster beyond noise",
        "gone": "no figure any more",
        "new": "not in the earlier file",
        "machine": "another machine or build, so ratios may differ for that",
    }
    text = [f"{titles[kind]}: {entry}" for kind, entries in found.items() for entry in entries]
    return text if found["slower"] or found["faster"] else [*text, "nothing changed beyond noise"]
