"""
Tables and pictures of the runs that `field_protocol.py` has made: nothing is trained.

    python examples/field_protocol_report.py                 # results/field_protocol/{summary.md,summary.csv,*.png,*.pdf}

Every figure comes from the JSON files beside the tables. A run's return is the mean over the episodes that ended in the last
tenth of training; a method's is given as mean and standard deviation over seeds, as the field publishes it, and as
interquartile mean (IQM) with a 95 % bootstrap interval (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264). No interval
and no probability of improvement is given for fewer than three seeds.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from sb3_ppo_penalty.study.report import NO_VALUE
from sb3_ppo_penalty.study.statistics import (
    CONFIDENCE,
    RESAMPLES,
    improvement_interval,
    iqm,
    iqm_interval,
    probability_of_improvement,
)

OUT = Path(__file__).parent / "results" / "field_protocol"
BASELINE = "clip"
HEADERS = ("method", "seeds", "published", "return, mean ± std", "IQM [95 %]", "P(better than clip)", "without noise")
HEADERS += ("KL", "coefficient", "std")
#: The methods whose curves are drawn
DRAWN = ("clip", "adaptive", "truncated", "sampled")
#: Fewer seeds say nothing about a spread
FEWEST_SEEDS = 3
#: KLip-PPO (https://arxiv.org/abs/2606.23932), mean and standard deviation over 5 seeds, last tenth of training
PUBLISHED = {
    "Ant-v4": {"clip": (2193, 361), "adaptive": (159, 86)},
    "HalfCheetah-v4": {"clip": (1955, 312), "adaptive": (2207, 1117)},
    "Hopper-v4": {"clip": (2598, 278), "adaptive": (2236, 365)},
    "Humanoid-v4": {"clip": (660, 70), "adaptive": (553, 22)},
    "Walker2d-v4": {"clip": (3717, 425), "adaptive": (3639, 374)},
}
MEANINGS = {
    "clip": "the clip, 0.2 (stock PPO)",
    "clip-0.3": "the clip, 0.3",
    "clip-falling": "the clip, range falling to 0",
    "adaptive": "exact KL, paper's rule, target 0.02",
    "truncated": "exact KL, target falling, ratios truncated at 1.3",
    "sampled": "sampled penalty, target falling, no clip of any kind",
    "adaptive-falling": "exact KL, paper's rule, target falling",
    "proportional-falling": "exact KL, proportional rule, target falling",
    "truncation-alone": "ratios truncated at 1.3, no penalty",
    "truncated-adaptive": "as truncated, paper's rule",
    "truncated-constant": "as truncated, target 0.02 throughout",
    "truncated-1.2": "as truncated, at 1.2",
    "truncated-1.5": "as truncated, at 1.5",
    "truncated-2": "as truncated, at 2",
    "sampled-constant": "as sampled, target 0.02 throughout",
    "sampled-unweighted": "as sampled, not weighted by the advantage",
    "sampled-fixed": "as sampled, coefficient 5 throughout (SPO)",
    "weighted": "exact KL weighted by the advantage, target falling",
}


class Row(NamedTuple):
    """
    What a method came to on a task.

    :param env: id of the environment
    :param method: a key of :data:`MEANINGS`
    :param seeds: of its runs
    :param returns: of each run, over the last tenth of training
    :param without_noise: mean return of each run's final policy without noise
    :param final: mean over the last tenth of training of the updates' figures, by name
    """

    env: str
    method: str
    seeds: list[int]
    returns: np.ndarray[Any, Any]
    without_noise: np.ndarray[Any, Any]
    final: dict[str, float]


def read(out: Path) -> list[dict[str, Any]]:
    """Read every run's file."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/*.json"))]


def last_tenth(parts: Sequence[float | None]) -> float:
    """Average what the last tenth of training has."""
    known = [value for value in parts[-len(parts) // 10 :] if value is not None]
    return float(np.mean(known)) if known else float("nan")


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """Bring the runs of each method on each task together, in the order of :data:`MEANINGS`."""
    rows = []
    for env in dict.fromkeys(run["env"] for run in runs):
        for method in MEANINGS:
            own = [run for run in runs if (run["env"], run["method"]) == (env, method)]
            if not own:
                continue
            names = sorted(set.intersection(*(set(run["updates"]) for run in own)))
            final = {name: float(np.mean([last_tenth(run["updates"][name]) for run in own])) for name in names}
            returns = np.array([run["last_tenth"] for run in own])
            without_noise = np.array([np.mean(run["without_noise"]) for run in own])
            rows.append(Row(env, method, [run["seed"] for run in own], returns, without_noise, final))
    return rows


def spread(values: np.ndarray[Any, Any]) -> str:
    """Write mean and sample standard deviation as the field does; the mean alone of fewer than three."""
    mean = f"{values.mean():,.0f}"
    return f"{mean} ± {values.std(ddof=1):,.0f}" if len(values) >= FEWEST_SEEDS else mean


def interquartile(values: np.ndarray[Any, Any]) -> str:
    """Write the interquartile mean with its interval."""
    if len(values) < FEWEST_SEEDS:
        return NO_VALUE
    low, high = iqm_interval(values)
    return f"{iqm(values):,.0f} [{low:,.0f}, {high:,.0f}]"


def improvement(values: np.ndarray[Any, Any], baseline: np.ndarray[Any, Any]) -> str:
    """Write the probability that a run beats one of the baseline, with its interval."""
    if min(len(values), len(baseline)) < FEWEST_SEEDS:
        return NO_VALUE
    low, high = improvement_interval(values, baseline)
    return f"{probability_of_improvement(values, baseline):.2f} [{low:.2f}, {high:.2f}]"


def published(env: str, method: str) -> str:
    """Write what KLip-PPO has."""
    found = PUBLISHED.get(env, {}).get(method)
    return f"{found[0]:,} ± {found[1]:,}" if found else ""


def task_table(rows: list[Row]) -> list[str]:
    """Write the table of one task in Markdown."""
    baseline = next((row.returns for row in rows if row.method == BASELINE), np.array([]))
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
    for row in rows:
        final = [f"{row.final[name]:.2g}" if name in row.final else NO_VALUE for name in ("kl", "kl_coef", "std")]
        beats = NO_VALUE if row.method == BASELINE else improvement(row.returns, baseline)
        cells = [f"{MEANINGS[row.method]} (`{row.method}`)", f"{len(row.seeds)}", published(row.env, row.method)]
        cells += [spread(row.returns), interquartile(row.returns), beats, spread(row.without_noise), *final]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def aggregate(rows: list[Row], method: str, envs: Sequence[str]) -> tuple[float, float, float]:
    """
    Interquartile mean over tasks and seeds of the returns divided by the published clip's, with its interval.

    :param rows: of all tasks
    :param method: that all of the tasks have
    :param envs: the tasks; the seeds of each are resampled by themselves (stratified bootstrap)
    :return: the mean, lower and upper end of the 95 % interval
    """
    scores = [next(r.returns for r in rows if (r.env, r.method) == (env, method)) / PUBLISHED[env]["clip"][0] for env in envs]
    generator = np.random.default_rng(0)
    resampled = [iqm(np.concatenate([generator.choice(each, len(each)) for each in scores])) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(iqm(np.concatenate(scores))), float(low), float(high)


def aggregate_table(rows: list[Row]) -> list[str]:
    """Write what methods come to over all tasks that they share with the baseline."""
    complete = [row for row in rows if len(row.seeds) >= FEWEST_SEEDS and row.env in PUBLISHED]
    envs_of = {method: [row.env for row in complete if row.method == method] for method in MEANINGS}
    lines = ["| method | tasks | normalised IQM [95 %] | the clip's on the same tasks |", "|---|---|---|---|"]
    for method, envs in envs_of.items():
        shared = [env for env in envs if env in envs_of[BASELINE]]
        if shared and method != BASELINE:
            own, clip = (aggregate(complete, each, shared) for each in (method, BASELINE))
            cells = [f"`{method}`", ", ".join(shared), *(f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in (own, clip))]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def curve_of(runs: list[dict[str, Any]], pick: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """
    Average curves over seeds; a part of training without an episode takes the value before.

    :param runs: of one method on one task
    :param pick: gives a run's curve
    :return: mean, and lowest and highest of the seeds, shapes (parts,) and (2, parts)
    """
    filled = []
    for run in runs:
        values = np.array([np.nan if value is None else value for value in pick(run)])
        last = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
        filled.append(values[last])
    curves = np.array(filled)
    return np.nanmean(curves, axis=0), np.array([np.nanmin(curves, axis=0), np.nanmax(curves, axis=0)])


def draw(runs: list[dict[str, Any]], methods: Sequence[str], path: Path) -> None:
    """
    Draw return, divergence and coefficient of each task, a row for each.

    :param runs: of all tasks
    :param methods: to draw
    :param path: of the picture, without ending
    """
    envs = list(dict.fromkeys(run["env"] for run in runs))
    columns = {
        "return": lambda run: run["curve"],
        "KL(old ‖ new), nats": lambda run: run["updates"]["kl"],
        "coefficient": lambda run: run["updates"]["kl_coef"],
    }
    figure, axes = plt.subplots(len(envs), 3, figsize=(11, 0.6 + 2.6 * len(envs)), squeeze=False, layout="constrained")
    for line, env in zip(axes, envs, strict=True):
        for axis, (label, pick) in zip(line, columns.items(), strict=True):
            for method in methods:
                own = [run for run in runs if (run["env"], run["method"]) == (env, method)]
                own = [run for run in own if label != "coefficient" or "kl_coef" in run["updates"]]
                if own:
                    mean, band = curve_of(own, pick)
                    steps = np.arange(1, len(mean) + 1) / len(mean) * own[0]["steps"] / 1e6
                    (drawn,) = axis.plot(steps, mean, label=method, color=f"C{methods.index(method)}", linewidth=1.4)
                    axis.fill_between(steps, *band, color=drawn.get_color(), alpha=0.15, linewidth=0)
            axis.set_xlabel("million steps")
            axis.set_ylabel(label)
            if label != "return":
                axis.set_yscale("log")
        line[0].set_title(env, loc="left", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=110)
    plt.close(figure)


def write(out: Path) -> None:
    """Write the tables and draw the pictures."""
    runs = read(out)
    rows = rows_of(runs)
    lines = ["Made by `python examples/field_protocol_report.py` from the files in `runs/`.", ""]
    for env in dict.fromkeys(row.env for row in rows):
        own = [row for row in rows if row.env == env]
        seeds = sorted({seed for row in own for seed in row.seeds})
        lines += [f"## {env}", "", f"Seeds {', '.join(map(str, seeds))}.", ""]
        lines += [*task_table(own), ""]
    lines += ["## All tasks", "", "Returns divided by the published clip's.", "", *aggregate_table(rows)]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    with (out / "summary.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["env", "method", "seed", "last_tenth", "without_noise"])
        for row in rows:
            table.writerows(
                [row.env, row.method, *each] for each in zip(row.seeds, row.returns, row.without_noise, strict=True)
            )
    draw(runs, DRAWN, out / "curves")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    write(parser.parse_args().out)
