"""
Tables and pictures of the runs that `field_protocol.py` has made: nothing is trained.

    python examples/field_protocol_report.py                 # results/field_protocol/{summary.md,summary.csv,*.png,*.pdf}

Every figure comes from the JSON files beside the tables. A run's return is the mean over the episodes that ended in the last
tenth of training; a method's is given as mean and standard deviation over seeds, as the field publishes it, and as
interquartile mean (IQM) with a 95 % bootstrap interval (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264). No interval
and no probability of improvement is given for fewer than three seeds. Runs of other seeds than the reported ones, on which
settings were chosen, stand in tables of their own.
"""

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from sb3_ppo_penalty.study.report import NO_VALUE
from sb3_ppo_penalty.study.statistics import (
    CONFIDENCE,
    MIN_SEEDS,
    RESAMPLES,
    improvement_interval,
    iqm,
    iqm_interval,
    probability_of_improvement,
)

OUT = Path(__file__).parent / "results" / "field_protocol"
BASELINE = "clip"
HEADERS = ("method", "seeds", "published", "return, mean ± std", "IQM [95 %]", "P(better than clip)", "without noise")
FINAL = {"kl": "KL", "kl_coef": "coefficient", "std": "std", "max_ratio": "largest ratio"}
HEADERS += tuple(FINAL.values())
#: The methods whose curves are drawn
DRAWN = ("clip", "adaptive", "sampled-floor")
#: Methods of the front page's table, and what they are called there
FRONT = {
    "clip": "clip: stock PPO",
    "sampled-floor": "penalty, no clip of any kind: `**MUJOCO`",
    "adaptive": "the paper's adaptive rule",
}
#: Nothing was tuned on these
REPORTED = range(11, 16)
#: KLip-PPO (https://arxiv.org/abs/2606.23932), mean and standard deviation over 5 seeds, last tenth of training
PUBLISHED = {
    "Ant-v4": {"clip": (2193, 361), "adaptive": (159, 86)},
    "HalfCheetah-v4": {"clip": (1955, 312), "adaptive": (2207, 1117)},
    "Humanoid-v4": {"clip": (660, 70), "adaptive": (553, 22)},
    "Walker2d-v4": {"clip": (3717, 425), "adaptive": (3639, 374)},
    "Hopper-v4": {"clip": (2598, 278), "adaptive": (2236, 365)},
    "CartPole-v1": {"clip": (478, 18), "adaptive": (492, 9)},
    "LunarLander-v3": {"clip": (107, 8), "adaptive": (125, 20)},
}
#: What methods come to over all of these is given too
AGGREGATED = ("Ant-v4", "HalfCheetah-v4", "Humanoid-v4", "Walker2d-v4", "Hopper-v4")
MEANINGS = {
    "clip": "the clip, 0.2 (stock PPO)",
    "clip-0.3": "the clip, 0.3",
    "clip-falling": "the clip, range falling to 0",
    "adaptive": "exact KL, paper's rule, target 0.02",
    "sampled-floor": "sampled penalty, target 0.028, coefficient at least 2, no clip of any kind: `MUJOCO`",
    "clip-minibatch": "the clip, 0.2, advantages normalised over the minibatch, as SB3 does",
    "adaptive-minibatch": "as adaptive, advantages normalised over the minibatch",
    "sampled-floor-minibatch": "as sampled-floor, advantages normalised over the minibatch",
    "truncated": "exact KL, target falling, ratios truncated at 1.3",
    "sampled": "as sampled-floor, target falling, no floor",
    "adaptive-falling": "exact KL, paper's rule, target falling",
    "proportional-falling": "exact KL, proportional rule, target falling",
    "truncation-alone": "ratios truncated at 1.3, no penalty",
    "truncated-adaptive": "as truncated, paper's rule",
    "truncated-constant": "as truncated, target 0.02 throughout",
    "truncated-to-zero": "as truncated, target falling to 0 with the learning rate",
    "truncated-floor": "as truncated, target 0.028 throughout, coefficient at least 0.7",
    "truncated-1.2": "as truncated, at 1.2",
    "truncated-1.5": "as truncated, at 1.5",
    "truncated-2": "as truncated, at 2",
    "sampled-constant": "as sampled, target 0.02 throughout",
    "sampled-unweighted": "as sampled, not weighted by the advantage",
    "sampled-fixed": "as sampled, coefficient 5 throughout (SPO)",
    "sampled-fixed-2": "as sampled, coefficient 2 throughout",
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
    """Bring the runs of each method on each task together, in the order of :data:`PUBLISHED` and :data:`MEANINGS`."""
    rows = []
    for env in sorted({run["env"] for run in runs}, key=lambda env: (env not in PUBLISHED, [*PUBLISHED, env].index(env))):
        for method in MEANINGS:
            own = sorted((r for r in runs if (r["env"], r["method"]) == (env, method)), key=lambda run: run["seed"])
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
    return f"{mean} ± {values.std(ddof=1):,.0f}" if len(values) >= MIN_SEEDS else mean


def interquartile(values: np.ndarray[Any, Any]) -> str:
    """Write the interquartile mean with its interval."""
    if len(values) < MIN_SEEDS:
        return NO_VALUE
    low, high = iqm_interval(values)
    return f"{iqm(values):,.0f} [{low:,.0f}, {high:,.0f}]"


def improvement(values: np.ndarray[Any, Any], baseline: np.ndarray[Any, Any]) -> str:
    """Write the probability that a run beats one of the baseline, with its interval."""
    if min(len(values), len(baseline)) < MIN_SEEDS:
        return NO_VALUE
    low, high = improvement_interval(values, baseline)
    return f"{probability_of_improvement(values, baseline):.2f} [{low:.2f}, {high:.2f}]"


def published(env: str, method: str) -> str:
    """Write what KLip-PPO has."""
    found = PUBLISHED.get(env, {}).get(method)
    return f"{found[0]:,} ± {found[1]:,}" if found else ""


def front_table(rows: list[Row]) -> list[str]:
    """Write the README's table: a line for each task that the clip and another of :data:`FRONT` have learned."""
    lines = ["| | " + " | ".join(FRONT.values()) + " |", "|---" * (len(FRONT) + 1) + "|"]
    for env in PUBLISHED:
        own = {r.method: spread(r.returns) for r in rows if r.env == env and r.method in FRONT and len(r.seeds) >= MIN_SEEDS}
        if BASELINE in own and len(own) > 1:
            brackets = {method: f" ({known})" if (known := published(env, method)) else "" for method in FRONT}
            lines.append(f"| {env} | " + " | ".join(own.get(m, NO_VALUE) + brackets[m] for m in FRONT) + " |")
    return lines


def final_figures(row: Row) -> list[str]:
    """Write what the updates of the last tenth of training came to."""
    return [f"{row.final[name]:.2g}" if name in row.final else NO_VALUE for name in FINAL]


def markdown_lines(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a Markdown table without padding: headers, a rule, and a line for each row."""
    heading, *lines = ["| " + " | ".join(cells) + " |" for cells in (headers, *rows)]
    return [heading, "|---" * len(headers) + "|", *lines]


def task_table(rows: list[Row]) -> list[str]:
    """Write the table of one task in Markdown."""
    baseline = next((row.returns for row in rows if row.method == BASELINE), np.array([]))
    table = []
    for row in rows:
        beats = NO_VALUE if row.method == BASELINE else improvement(row.returns, baseline)
        cells = [f"`{row.method}`", f"{len(row.seeds)}", published(row.env, row.method)]
        cells += [spread(row.returns), interquartile(row.returns), beats, spread(row.without_noise), *final_figures(row)]
        table.append(cells)
    return markdown_lines(HEADERS, table)


def by_return(rows: list[Row]) -> list[Row]:
    """Sort methods, the best first."""
    return sorted(rows, key=lambda row: -row.returns.mean())


def ablation_table(rows: list[Row]) -> list[str]:
    """Write the table of one task on the seeds for choosing in Markdown: every run, the best method first."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    headers = ("method", "what it is", *(f"seed {seed}" for seed in seeds), "without noise", *FINAL.values())
    table = []
    for row in by_return(rows):
        found = dict(zip(row.seeds, row.returns, strict=True))
        each = [f"{found[seed]:,.0f}" if seed in found else NO_VALUE for seed in seeds]
        without_noise = f"{row.without_noise.mean():,.0f}"
        table.append([f"`{row.method}`", MEANINGS[row.method], *each, without_noise, *final_figures(row)])
    return markdown_lines(headers, table)


def scores_of(rows: list[Row], method: str, envs: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """Divide the returns of each run by the published clip's, an array for each task."""
    return [next(r.returns for r in rows if (r.env, r.method) == (env, method)) / PUBLISHED[env]["clip"][0] for env in envs]


def resampled(samples: Sequence[Sequence[np.ndarray[Any, Any]]], figure: Callable[..., float]) -> tuple[float, float, float]:
    """
    Work out a figure over all tasks, with a stratified bootstrap interval: the seeds of each task are resampled by themselves.

    :param samples: for each method, an array of runs for each task
    :param figure: takes the samples
    :return: the figure, lower and upper end of the 95 % interval
    """
    draw_from = np.random.default_rng(0).choice
    values = [figure([[draw_from(each, len(each)) for each in tasks] for tasks in samples]) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(figure(samples)), float(low), float(high)


def overall_iqm(samples: Sequence[Sequence[np.ndarray[Any, Any]]]) -> float:
    """Take the interquartile mean over all runs of one method."""
    return float(iqm(np.concatenate(samples[0])))


def overall_improvement(samples: Sequence[Sequence[np.ndarray[Any, Any]]]) -> float:
    """Average over tasks how probable it is that a run of the first method beats one of the second."""
    return float(np.mean([probability_of_improvement(own, other) for own, other in zip(*samples, strict=True)]))


def aggregate_table(rows: list[Row]) -> list[str]:
    """Write what methods come to over all tasks that they share with the baseline."""
    complete = [row for row in rows if len(row.seeds) >= MIN_SEEDS and row.env in AGGREGATED]
    envs_of = {method: [row.env for row in complete if row.method == method] for method in MEANINGS}
    table = []
    for method, envs in envs_of.items():
        shared = [env for env in envs if env in envs_of[BASELINE]]
        if shared and method != BASELINE:
            own, clip = (scores_of(complete, each, shared) for each in (method, BASELINE))
            figures = [
                resampled([own], overall_iqm),
                resampled([clip], overall_iqm),
                resampled([own, clip], overall_improvement),
            ]
            cells = [f"`{method}`", ", ".join(shared), *(f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in figures)]
            table.append(cells)
    return markdown_lines(
        ("method", "tasks", "normalised IQM [95 %]", "the clip's on the same tasks", "P(better than clip)"), table
    )


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
    # Before a part of training in which an episode of any seed ended there is nothing to draw
    curves: Any = np.ma.masked_invalid(filled)
    return curves.mean(axis=0).filled(np.nan), np.array([curves.min(axis=0).filled(np.nan), curves.max(axis=0).filled(np.nan)])


def draw_curves(axis: Any, runs: list[dict[str, Any]], pick: Callable[[dict[str, Any]], Any]) -> None:
    """
    Draw a curve for each method on one task, with a band from the lowest to the highest seed.

    :param axis: of matplotlib
    :param runs: of the task
    :param pick: gives a run's curve, None where it has none
    """
    for method in DRAWN:
        own = [run for run in runs if run["method"] == method and pick(run) is not None]
        if own:
            mean, band = curve_of(own, pick)
            steps = np.arange(1, len(mean) + 1) / len(mean) * own[0]["steps"] / 1e6
            (drawn,) = axis.plot(steps, mean, label=method, color=f"C{DRAWN.index(method)}", linewidth=1.4)
            axis.fill_between(steps, *band, color=drawn.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("million steps")


def draw_profile(axis: Any, rows: list[Row]) -> None:
    """
    Draw which share of all runs reaches a score, for each score (performance profile).

    :param axis: of matplotlib
    :param rows: of all tasks; those that every drawn method has count
    """
    drawn = [method for method in DRAWN if any(row.method == method for row in rows)]
    envs = [env for env in AGGREGATED if all(any((r.env, r.method) == (env, method) for r in rows) for method in drawn)]
    grid = np.linspace(0, 2.5, 251)
    for method in drawn if envs else []:
        scores = np.concatenate(scores_of(rows, method, envs))
        axis.plot(grid, [(scores >= each).mean() for each in grid], color=f"C{DRAWN.index(method)}", linewidth=1.4)
    axis.set_title(
        f"all runs on {', '.join(envs)}" if len(envs) < 3 else f"all runs on {len(envs)} MuJoCo tasks", loc="left", fontsize=10
    )
    axis.set_xlabel("return / published clip's, at least")
    axis.set_ylabel("share of runs")


def legend_above(figure: Any, axis: Any) -> None:
    """Put the legend of one panel above all of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def save(figure: Any, path: Path) -> None:
    """
    Write a picture as PNG and PDF.

    :param figure: of matplotlib
    :param path: of the picture, without ending
    """
    for ending in ("png", "pdf"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=110)
    plt.close(figure)


def draw_returns(runs: list[dict[str, Any]], rows: list[Row], path: Path) -> None:
    """
    Draw the return of every task, and the performance profile.

    :param runs: of all tasks
    :param rows: the same, by method
    :param path: of the picture, without ending
    """
    envs = list(dict.fromkeys(row.env for row in rows))
    columns = 4 if len(envs) in (6, 7) else 3
    lines = -(-(len(envs) + 1) // columns)
    size = (3.5 * columns, 0.6 + 2.7 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, env in zip(axes.flat, envs, strict=False):
        draw_curves(axis, [run for run in runs if run["env"] == env], lambda run: run["curve"])
        axis.set_title(env, loc="left", fontsize=10)
        axis.set_ylabel("return")
    draw_profile(axes.flat[len(envs)], rows)
    for axis in axes.flat[len(envs) + 1 :]:
        axis.set_axis_off()
    legend_above(figure, axes[0][0])
    save(figure, path)


def draw_updates(runs: list[dict[str, Any]], envs: Sequence[str], path: Path) -> None:
    """
    Draw divergence, coefficient and standard deviation of each task, a row for each.

    :param runs: of all tasks
    :param envs: the tasks
    :param path: of the picture, without ending
    """
    labels = {"kl": "KL(old ‖ new), nats", "kl_coef": "coefficient", "std": "standard deviation"}
    figure, axes = plt.subplots(len(envs), 3, figsize=(11, 0.6 + 2.5 * len(envs)), squeeze=False, layout="constrained")
    for line, env in zip(axes, envs, strict=True):
        own = [run for run in runs if run["env"] == env]
        for axis, (name, label) in zip(line, labels.items(), strict=True):
            draw_curves(axis, own, lambda run, name=name: run["updates"].get(name))
            axis.set_ylabel(label)
            axis.set_yscale("log")
            if not axis.lines:
                axis.set_axis_off()
        line[0].set_title(env, loc="left", fontsize=10)
    legend_above(figure, axes[0][0])
    save(figure, path)


def draw_ablation(rows: list[Row], path: Path) -> None:
    """
    Draw every run on the seeds for choosing, a line for each method, the best on top.

    :param rows: of these seeds
    :param path: of the picture, without ending
    """
    envs = list(dict.fromkeys(row.env for row in rows))
    most = max(sum(row.env == env for row in rows) for env in envs)
    size = (5.5 * len(envs), 0.9 + 0.24 * most)
    figure, axes = plt.subplots(1, len(envs), figsize=size, squeeze=False, layout="constrained")
    for axis, env in zip(axes.flat, envs, strict=True):
        own = by_return([row for row in rows if row.env == env])[::-1]
        for height, row in enumerate(own):
            color = f"C{DRAWN.index(row.method)}" if row.method in DRAWN else "0.5"
            axis.plot(row.returns, [height] * len(row.returns), "o", color=color, markersize=4)
        axis.set_yticks(range(len(own)), [row.method for row in own], fontsize=8)
        axis.set_title(env, loc="left", fontsize=10)
        axis.set_xlabel("return, last tenth of training")
        axis.set_xlim(left=0)
    save(figure, path)


def tables_of(rows: list[Row], heading: str, table: Callable[[list[Row]], list[str]]) -> list[str]:
    """Write a table for each task, under its heading."""
    lines = []
    for env in dict.fromkeys(row.env for row in rows):
        own = [row for row in rows if row.env == env]
        seeds = sorted({seed for row in own for seed in row.seeds})
        lines += [heading.format(env), "", f"Seeds {', '.join(map(str, seeds))}.", "", *table(own), ""]
    return lines


def origin_of(runs: list[dict[str, Any]]) -> str:
    """Say what made the runs, and what they cost."""
    versions = {f"{name} {number}" for run in runs for name, number in run["versions"].items()}
    hours = sum(run["processor_seconds"] for run in runs) / 3600
    return f"{len(runs)} runs, {hours:.1f} processor hours; {', '.join(sorted(versions))}."


def write(out: Path) -> None:
    """Write the tables and draw the pictures."""
    runs = read(out)
    reported = [run for run in runs if run["seed"] in REPORTED]
    rows, others = rows_of(reported), rows_of([run for run in runs if run["seed"] not in REPORTED])
    lines = ["Made by `python examples/field_protocol_report.py` from the files in `runs/`.", origin_of(runs), ""]
    if len(front := front_table(rows)) > 2:
        lines += [*front, "", "Mean ± standard deviation over seeds; in brackets what KLip-PPO has published.", ""]
    if len(overall := aggregate_table(rows)) > 2:
        lines += ["## All tasks", "", "Returns divided by the published clip's.", "", *overall, ""]
    lines += ["KL (nats), coefficient, std and largest ratio below are means over the last tenth of training.", ""]
    lines += tables_of(rows, "## {}", task_table)
    lines += tables_of(others, "## {}, seeds for choosing", ablation_table)
    lines += ["## The methods", "", *(f"- `{m}`: {MEANINGS[m]}" for m in MEANINGS if any(run["method"] == m for run in runs))]
    (out / "summary.md").write_text("\n".join(lines).rstrip("\n") + "\n")
    with (out / "summary.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["env", "method", "seed", "last_tenth", "without_noise"])
        for row in [*rows, *others]:
            table.writerows(
                [row.env, row.method, *each] for each in zip(row.seeds, row.returns, row.without_noise, strict=True)
            )
    with plt.style.context("sb3_ppo_penalty.study.pictures"):
        if rows:
            draw_returns(reported, rows, out / "returns")
            draw_updates(reported, list(dict.fromkeys(row.env for row in rows)), out / "updates")
        if others:
            draw_ablation(others, out / "ablation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    write(parser.parse_args().out)
