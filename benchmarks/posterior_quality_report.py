"""Tables, words and pictures of what posterior_quality.py has found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bayes_svdo.analysis import SimulatedCalibration, plot_sbc_ranks
from bayes_svdo.analysis.figures import styled

LEVELS = (0.5, 0.95)


def title(content: dict[str, Any], name: str) -> str:
    """Of a case."""
    return str(content["settings"]["cases"][name]["title"])


def calibration(content: dict[str, Any], name: str, of: str) -> SimulatedCalibration:
    """Of q, or of NUTS where it was run."""
    runs = content["sbc"][name]
    ranks = [
        r["rank"] if of == "q" else r["nuts"]["rank"] for r in runs if of == "q" or "nuts" in r
    ]
    return SimulatedCalibration(np.array(ranks), content["settings"]["sbc_draws"])


def subset(content: dict[str, Any], name: str, kept: bool) -> list[float]:
    """Coverage of q's intervals for the weights that are kept, or that are not."""
    found = calibration(content, name, "q")
    chosen = np.array([r["kept"] for r in content["sbc"][name]]) == kept
    part = SimulatedCalibration(found.ranks[chosen][:, None], found.num_draws)
    return [part.coverage(level) for level in LEVELS]


def sd_ratios(runs: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q's standard deviation in units of that of NUTS, its shift likewise, and what is kept."""
    both = [r for r in runs if "nuts" in r]
    nuts_sd = np.array([r["nuts"]["sd"] for r in both]).ravel()
    ratio = np.array([r["sd"] for r in both]).ravel() / nuts_sd
    difference = np.array([np.subtract(r["mean"], r["nuts"]["mean"]) for r in both]).ravel()
    return ratio, difference / nuts_sd, np.array([r["kept"] for r in both]).ravel()


def percent(value: float, error: float | None = None) -> str:
    """``94 %``, or ``94 ± 1 %``."""
    return f"{100 * value:.0f} %" if error is None else f"{100 * value:.0f} ± {100 * error:.0f} %"


def findings(content: dict[str, Any]) -> list[str]:
    """What the numbers say, in words; the words were written by somebody who had seen them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, found in content["shown"].items():
        for each in found["weights"]:
            if content["settings"]["cases"][name]["correlation"]:
                group = "correlated, pruned" if each["pruned"] else "correlated"
            elif each["pruned"]:
                group = "pruned"
            else:
                group = "clear" if abs(each["q_mean"]) > 3 * each["q_sd"] else "doubtful"
            groups.setdefault(group, []).append(each)

    def span(group: str, key: str) -> str:
        values = [
            each["q_sd"] / each["nuts_sd"] if key == "ratio" else 100 * each[key]
            for each in groups[group]
        ]
        unit, digits = ("", 2) if key == "ratio" else (" %", 0)
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}{unit}"

    khat = [found["khat"] for found in content["shown"].values()]
    return [
        "## In words",
        "",
        "Data sets above; sd of q over sd of NUTS, and the part of the NUTS draws in q's 95 %",
        "interval, of which 95 % would be right:",
        "",
        "| weights | number | sd ratio | in q's 95 % |",
        "| --- | --- | --- | --- |",
        *(
            f"| {label} | {len(groups[group])} | {span(group, 'ratio')} | {span(group, 'inside')} |"
            for group, label in (
                ("clear", "clearly relevant (3 sds of q or more from 0)"),
                ("doubtful", "doubtful (kept, but nearer to 0)"),
                ("pruned", "pruned"),
                ("correlated", "kept, features correlated 0.9"),
                ("correlated, pruned", "pruned, features correlated 0.9"),
            )
        ),
        "",
        "- **Relevant weights of uncorrelated features**: q is right to within a fifth of an sd.",
        "- **Doubtful weights**: the exact posterior has a spike at 0 and a shoulder at the least",
        "  squares estimate. A Gaussian lies over both or sits on the spike: too narrow, no skew.",
        "- **Pruned weights**: q shrinks towards a point mass at 0, while data and proper prior",
        "  leave a spike with wide tails. Exact zeros are a decision, no statement of certainty.",
        "- **Correlated features**: the width of q is that of a weight whose neighbours are known,",
        "  so it is too narrow, as every factorised Gaussian is; and it picks one explanation",
        "  where the data leave several.",
        f"- **k-hat** is {min(khat):.2f} to {max(khat):.2f}, {sum(k > 0.7 for k in khat)} of "
        f"{len(khat)} above 0.7: it judges all weights at once, and those that",
        "  are pruned are too narrow. Reweighting draws of q does not mend that.",
        "- **Where the prior levels off** (`low`) hardly matters for relevant weights, and decides",
        "  about the others: how much of their mass lies in the spike.",
        "",
    ]


def table(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings = content["settings"]
    machine, versions = content["environment"]["machine"], content["environment"]["versions"]
    lines = [
        "# How good is q",
        "",
        "Written by `benchmarks/posterior_quality.py`, which says how; numbers beside seeds and",
        "versions in `posterior_quality.json`. Numbers in sds are in standard deviations of NUTS.",
        "",
        f"{machine['cpu']}, one thread; {content['seconds'] / 60:.0f} minutes; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        "## One data set per case",
        "",
        f"q by `fit`; NUTS: {settings['chains']} chains of {settings['draws']:,} draws after "
        f"{settings['warmup']} steps of warm-up.",
        "Distance: 1-Wasserstein between marginals, in sds. \"In q's 95 %\": the part of the NUTS",
        "draws that lies in q's central 95 % interval. A star: `log α >= 3`, pruned in use.",
        "",
    ]  # fmt: skip
    for name, case in settings["cases"].items():
        if name not in content["shown"]:
            continue
        found = content["shown"][name]
        nuts = found["nuts"]
        lines += [
            f"### {case['title']} (N {case['num_data']}, D {case['num_features']}, "
            f"prior from {case['low']:g} to {case['high']:g})",
            "",
            f"k-hat of q: **{found['khat']:.2f}**. NUTS: worst R-hat {nuts['worst_rhat']:.3f}, "
            f"least ESS {nuts['least_ess']:.0f}, {nuts['divergences']} divergences; "
            f"{found['seconds']['nuts']:.0f} s, fit {found['seconds']['fit']:.0f} s.",
            "",
            "| weight | truth | q: mean ± sd | NUTS: mean ± sd | distance | in q's 95 % |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for each, truth in zip(found["weights"], found["truth"], strict=True):
            star = "*" if each["pruned"] else ""
            lines.append(
                f"| {each['place'][1]}{star} | {truth:.3f} | {each['q_mean']:.3f} ± "
                f"{each['q_sd']:.3f} | {each['nuts_mean']:.3f} ± {each['nuts_sd']:.3f} | "
                f"{each['distance']:.2f} | {percent(each['inside'])} |"
            )
        lines.append("")
        if "exact_q" in found:
            kept = np.array(found["exact_q"]["kept"])
            gap = np.abs(
                np.subtract([w["q_mean"] for w in found["weights"]], found["exact_q"]["mean"])
            )[kept]
            lines += [
                f"`fit` and the exact optimum (`fit_vdard_regression` keeps {kept.sum()} of "
                f"{len(kept)}): means of the kept weights differ by at most "
                f"{gap.max(initial=0):.3f}.",
                "",
            ]
        if "lows" in found:
            lines += [
                "The same posterior by NUTS, depending on where the prior levels off:",
                "",
                "| weight | truth | " + " | ".join(f"low {low}" for low in found["lows"]) + " |",
                "| --- | --- |" + " --- |" * len(found["lows"]),
            ]
            for index, truth in enumerate(found["truth"]):
                cells = [
                    f"{each['mean'][index]:.3f} ± {each['sd'][index]:.3f}"
                    for each in found["lows"].values()
                ]
                lines.append(f"| {index} | {truth:.2f} | {' | '.join(cells)} |")
            lines.append("")
    lines += [
        "## Simulation-based calibration",
        "",
        "Truths drawn from the truncated prior. Coverage of central intervals (± standard error",
        "over repetitions). q: the exact optimum for linear regression, where what it prunes is a",
        'point mass at 0; `fit` for logistic regression. "kept" and "pruned" are decided by q,',
        "from the data, so an exact posterior would have 50 % and 95 % in either group.",
        "",
        "| case | repetitions | 50 % interval | 95 % interval | kept | 50 %, kept | 95 %, kept "
        "| 50 %, pruned | 95 %, pruned |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in content["sbc"].items():
        if not runs:
            continue
        for of in ("q", "nuts"):
            found = calibration(content, name, of)
            cells = [
                percent(found.coverage(level), found.coverage_error(level)) for level in LEVELS
            ]
            if of == "q":
                cells.append(percent(float(np.mean([r["kept"] for r in runs]))))
                for kept in (True, False):
                    cells += [percent(value) for value in subset(content, name, kept)]
            else:
                cells += [""] * 5
            who = "q" if of == "q" else "NUTS"
            lines.append(
                f"| {title(content, name)}: {who} | {len(found.ranks)} | {' | '.join(cells)} |"
            )
    lines += [
        "",
        "q beside NUTS in the repetitions that have both: median (quartiles) over weights.",
        "",
        "| case | weights | sd of q / sd of NUTS | abs. difference of means, in sds | worst R-hat "
        "| divergences |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in content["sbc"].items():
        if not runs:
            continue
        both = [r["nuts"] for r in runs if "nuts" in r]
        ratio, shift, kept = sd_ratios(runs)
        for label, chosen in (("kept", kept), ("pruned", ~kept)):
            if not chosen.any():
                continue
            cells = [
                "{1:.2f} ({0:.2f} to {2:.2f})".format(*np.quantile(v[chosen], [0.25, 0.5, 0.75]))
                for v in (ratio, np.abs(shift))
            ]
            lines.append(
                f"| {title(content, name)}, {label} | {chosen.sum()} | {' | '.join(cells)} | "
                f"{max(r['worst_rhat'] for r in both):.2f} | "
                f"{sum(r['divergences'] for r in both)} of "
                f"{settings['nuts_sbc_draws'] * len(both):,} |"
            )
    pvalues = [  # chi-square wants five per bin
        f"{title(content, name)} {np.min(calibration(content, name, 'q').pvalues(10)):.1g}"
        for name, runs in content["sbc"].items()
        if len(runs) >= 50
    ]
    lines += [
        "",
        "Smallest of the weights' p-values that ranks of q are uniform (chi-square): "
        + "; ".join(pvalues) + ".",
        "",
        *findings(content),
    ]  # fmt: skip
    return "\n".join(lines)


def picture(content: dict[str, Any], out: Path) -> None:
    """Ranks of all cases."""
    shown = [name for name, runs in content["sbc"].items() if runs]
    with styled(None, (9.6, 5.2)) as figure:
        axes = figure.subplots(2, len(shown), squeeze=False)
        for column, name in enumerate(shown):
            for row, of in enumerate(("q", "nuts")):
                found = calibration(content, name, of)
                plot_sbc_ranks(
                    found, 20 if found.ranks.size >= 1000 else 5,
                    title=f"{title(content, name)}\n{'q' if of == 'q' else 'NUTS, the reference'}",
                    ax=axes[row, column],
                )  # fmt: skip
        figure.savefig(out.with_suffix(".png"), dpi=150)
