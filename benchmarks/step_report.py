"""Tables of what step.py has found."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_threads import chosen

# Groups of the profile: the first whose pattern fits an operation has it. A fused kernel's name
# tells what it does: the KL's has logarithms of |w|.
REST = "all else: activations, their noise added, the loss, copies, sums"
GROUPS = {
    "matrix products": r"aten::(add|b)?mm$",
    "KL and its gradient": r"graph_\w*_abs_\w*_log_",
    "Adam": r"(?i).*adam",
    "random numbers": r"aten::(normal_|randn)",
    "exp of log σ²": r"graph_\w*fused_(?!\w*(logsumexp|log_))\w*exp_",
    "the graph's call": r"## Call|AOTDispatcher",
    REST: "",
}
# What a deterministic step has nothing of.
OURS_ALONE = ("KL and its gradient", "random numbers", "exp of log σ²")


def write_table(folder: Path, device: str) -> None:
    """What the results files in a folder hold, as Markdown beside them."""
    found = {}
    for action in ("peers", "growth", "threads", "precision", "profile"):
        path = folder / f"step_{action}_{device}.json"
        if path.exists():
            found[action] = json.loads(path.read_text())
    lines = _opening(found, device)
    if "peers" in found:
        lines += _peers(found["peers"], device)
    if "profile" in found:
        lines += _profile(found["profile"], found.get("peers"))
    if "precision" in found:
        lines += _precision(found["precision"])
    if "growth" in found:
        lines += _growth(found["growth"])
    if "threads" in found:
        lines += _threads(found["threads"])
    name = "step.md" if device == "cpu" else f"step_{device}.md"
    (folder / name).write_text("\n".join(lines) + "\n")


def _opening(found: dict[str, Any], device: str) -> list[str]:
    """Where the numbers come from."""
    files = ", ".join(f"`step_{action}_{device}.json`" for action in found)
    any_of = next(iter(found.values()))
    machine = any_of["environment"]["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in any_of["environment"]["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores"
    if device != "cpu":
        where = f"{any_of['device']}; {where}"
    times = "processor time of one thread" if device == "cpu" else "wall time"
    return [
        "# A training step beside other libraries\n",
        f"Written by `benchmarks/step.py table{'' if device == 'cpu' else ' --device ' + device}` "
        f"from {files}, which hold every time. {where}; Python {any_of['environment']['python']}, "
        f"{versions}.\n",
        f"Milliseconds a step, {times} unless said otherwise: medians of rounds in which all take "
        "turns. A ratio is the median over rounds of what it is within a round; where there are "
        "several processes of each library, the median over these, each with the median of its "
        'rounds. "plain Adam" is `torch.optim.Adam` as it comes; all others of torch, but those '
        "that train through `pyro.optim`, have the fused one. Libraries that do not all fit into "
        "memory are measured in two groups, a table each. A table says how many cores other "
        "work kept busy meanwhile, on average, where that was recorded.",
    ]


def ratio(result: dict[str, Any], one: str, other: str) -> tuple[float, float, float]:
    """Median of one peer's time over another's, and its quartiles.

    Over rounds; where there were several processes, over theirs, each with the median of its
    rounds.
    """
    values = _by_process(result, lambda times: times[one] / times[other])
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return middle, low, high


def _by_process(result: dict[str, Any], of: Any) -> list[float]:
    """Something of all peers' times in each round, or in each process the median of its rounds."""
    times = result["milliseconds"]
    values = [of(dict(zip(times, row, strict=True))) for row in zip(*times.values(), strict=True)]
    if result["processes"] > 1:
        rounds = result["rounds"]
        values = [statistics.median(values[i : i + rounds]) for i in range(0, len(values), rounds)]
    return values


def _peers(content: dict[str, Any], device: str) -> list[str]:
    lines = []
    memory_of = "MB of a step" if device == "cpu" else "MB reserved"
    for result in content["results"]:
        there = result["median_milliseconds"]
        rounds = f"{result['rounds']} rounds"
        if result["processes"] > 1:
            rounds += f" in each of {result['processes']} processes"
        lines += [
            f"\n**{result['network']}, batch {result['batch']}**, {rounds}{_others([result])}\n",
            f"| | ms, median | least | x deterministic | x LinearSVDO | {memory_of} |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for peer, value in there.items():
            ratios = [
                f"{ratio(result, peer, base)[0]:.2f}" if base in there else "-"
                for base in ("deterministic", "LinearSVDO")
            ]
            memory = result["peak_bytes_of_a_step"][peer]
            lines.append(
                f"| {peer} | {value:.2f} | {result['least_milliseconds'][peer]:.2f} "
                f"| {' | '.join(ratios)} | {'-' if memory is None else f'{memory / 1e6:.1f}'} |"
            )
        lines += [f"\n{peer}: {why}" for peer, why in result["missing"].items()]
    lines += ["\n| target | at most | found (quartiles) |", "| --- | --- | --- |"]
    for row in content["targets"]:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['network']}, batch {row['batch']}: {row['of']} / {row['over']} "
            f"| {row['at_most']} | {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
            f"{'' if row['met'] else ', missed'} |"
        )
    return lines


def _profile(content: dict[str, Any], peers: dict[str, Any] | None) -> list[str]:
    """Where the compiled step's time goes, and how far it is from twice the deterministic one."""
    case = content["network"], content["batch"]
    lines = [f"\n**Where the time of the compiled step goes: {case[0]}, batch {case[1]}**\n"]
    for result in peers["results"] if peers else []:
        if (result["network"], result["batch"]) == case:
            times = ratio(result, "ours, compiled", "deterministic")[0]
            beyond = statistics.median(
                _by_process(result, lambda t: t["ours, compiled"] - 2 * t["deterministic"])
            )
            lines.append(
                f"The step takes {times:.2f} x the deterministic one. Twice the matrix products "
                f"make 2.0 x the limit: the distance is {beyond:.2f} ms (medians over processes)."
            )
    operations = content["operations"]
    total = sum(row["milliseconds"] for row in operations)
    grouped: dict[str, list[dict[str, Any]]] = {name: [] for name in GROUPS}
    for row in operations:
        grouped[next(g for g, names in GROUPS.items() if re.match(names, row["operation"]))].append(
            row
        )
    sums = {name: sum(row["milliseconds"] for row in rows) for name, rows in grouped.items()}
    alone = sum(sums[name] for name in OURS_ALONE)
    lines += [
        f"A profile of another run: its {len(operations)} largest operations take {total:.2f} ms "
        "of wall time per step. A deterministic step has nothing of "
        f"{', '.join(OURS_ALONE[:-1])} and {OURS_ALONE[-1]}, which take {alone:.2f} ms of it.\n",
        "| | ms | % | the largest operations, ms |",
        "| --- | --- | --- | --- |",
    ]
    for name in sorted(GROUPS, key=lambda name: (name == REST, -sums[name])):
        largest = [
            f"`{_short(row['operation'])}` {row['milliseconds']:.2f}" for row in grouped[name][:3]
        ]
        lines.append(
            f"| {name} | {sums[name]:.2f} | {100 * sums[name] / total:.0f} | {', '.join(largest)} |"
        )
    return lines


def _short(operation: str) -> str:
    """The number of a fused kernel, instead of the list of all that is in it."""
    fused = re.fullmatch(r"graph_\d+_cpp_fused_\w*_(\d+)", operation)
    return f"fused kernel {fused[1]}" if fused else operation.strip("# ")


def _precision(content: dict[str, Any]) -> list[str]:
    results = content["results"]
    network, width = results[0]["network"], results[0]["width_of_limit"]
    lines = [
        f"\n**{network} in each precision**, {content['device']}\n",
        "Operations are those of the matrix products, a multiply-add counting as two; the limit is "
        f"the best product of matrices of {width} x {width} in that precision, in the same run. "
        "Under bf16 our products of variances stay in float32, or TF32 where that is said: the "
        "last column holds each product against the limit of its own precision.\n",
        "| precision, batch | | ms, median | x deterministic | GFLOP of a step | TFLOP/s | limit "
        "| % of the limit | % of the products' limits |",
        "|" + " --- |" * 9,
    ]
    for result in results:
        base = result["peers"]["deterministic"]["median_milliseconds"]
        for peer, row in result["peers"].items():
            lines.append(
                f"| {result['precision']}, {result['batch']} | {peer} "
                f"| {row['median_milliseconds']:.2f} | {row['median_milliseconds'] / base:.2f} "
                f"| {row['operations'] / 1e9:.4g} | {row['operations_per_second'] / 1e12:.4g} "
                f"| {result['limit'] / 1e12:.4g} | {100 * row['share_of_limit']:.0f} "
                f"| {100 * row['share_of_limits_of_the_products']:.0f} |"
            )
    return lines + [f"\n{name}: {why}" for name, why in content["left_out"].items()]


def _growth(content: dict[str, Any]) -> list[str]:
    lines = [
        "\n## Growth\n",
        "Exponents p, with their standard errors, and the part that does not grow are of a fit of "
        "`fixed + factor * size^p` to the least times of all sizes, least squares of logarithms; a "
        "time that does not double has none.",
    ]
    for name, curve in content["curves"].items():
        rows, fits = curve["rows"], curve["growth"]
        rounds = rows[0]["rounds"]
        lines += [
            f"\n**Against {name}**, least ms of {rounds} rounds{_others(rows)}\n",
            *_by_size(curve, lambda row, peer: f"{row['least_milliseconds'][peer]:.2f}"),
        ]
        found = list(fits.values())
        for title, text in (
            ("exponent", lambda fit: f"{fit['exponent']:.2f} ± {fit['standard_error']:.2f}"),
            ("fixed, ms", lambda fit: f"{fit['fixed_milliseconds']:.2f}"),
            ("farthest from the fit, %", lambda fit: f"{100 * fit['largest_deviation']:.0f}"),
        ):
            cells = ["-" if fit is None else text(fit) for fit in found]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        if len(rows) > 1:
            slopes = [f"{_last_slope(rows, peer):.2f}" for peer in fits]
            lines.append(f"| exponent between the last two | {' | '.join(slopes)} |")
        memory = [row["peak_bytes_of_a_step"] for row in rows]
        of = {"particles": "step", "draws": "call"}.get(curve["against"])
        if of is not None and None not in memory[0].values():
            lines += [
                f"\nMB that a {of} holds at most:\n",
                *_by_size(
                    curve, lambda row, peer: f"{row['peak_bytes_of_a_step'][peer] / 1e6:.1f}"
                ),
            ]
    return lines


def _by_size(curve: dict[str, Any], cell: Callable[[dict[str, Any], str], str]) -> list[str]:
    """A row for each size, a column for each peer."""
    peers = list(curve["growth"])
    lines = [f"| {curve['against']} | {' | '.join(peers)} |", f"| --- |{' --- |' * len(peers)}"]
    for row in curve["rows"]:
        lines.append(f"| {row['size']:,} | {' | '.join(cell(row, peer) for peer in peers)} |")
    return lines


def _last_slope(rows: list[dict[str, Any]], peer: str) -> float:
    sizes, times = zip(
        *((row["size"], row["least_milliseconds"][peer]) for row in rows[-2:]), strict=True
    )
    return math.log(times[1] / times[0]) / math.log(sizes[1] / sizes[0])


def _threads(content: dict[str, Any]) -> list[str]:
    numbers = [str(number) for number in content["threads"]]
    peers = list(next(iter(content["rows"][0]["least_milliseconds"].values())))
    lines = [
        "\n## Threads\n",
        "Least wall ms of a step by threads, and how many `fit` takes of those that there are"
        f"{_others(content['rows'])}.\n",
        "| network, batch | threads of `fit` | "
        + " | ".join(f"{peer}, {number}" for peer in peers for number in numbers)
        + " |",
        "| --- | --- |" + " --- |" * (len(peers) * len(numbers)),
    ]
    for row in content["rows"]:
        times = row["least_milliseconds"]
        cells = [f"{times[number][peer]:.2f}" for peer in peers for number in numbers]
        lines.append(
            f"| {row['network']}, {row['batch']} "
            f"| {chosen(row['network'], row['batch'], max(content['threads']))} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def _others(results: list[dict[str, Any]]) -> str:
    busy = [result.get("cores_busy_with_other_work") for result in results]
    known = [value for value in busy if value is not None]
    if len(known) < len(busy):
        return ""
    return f"; other work: {statistics.mean(known):.2f} cores"
