"""The report's pictures."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sb3_ppo_penalty.study.algorithms import BASELINE
from sb3_ppo_penalty.study.grid import Comparison
from sb3_ppo_penalty.study.results import Results, summary, updates_of
from sb3_ppo_penalty.study.statistics import iqm, iqm_interval

#: Colour and marker
Look = tuple[str, str]
#: Okabe and Ito's palette, which colour-blind people can tell apart; a marker for who prints without colours
LOOKS = {
    "ppo_penalty": ("#0072B2", "o"),
    "ppo_clip": ("#E69F00", "s"),
    "ppo": ("#D55E00", "^"),
    "trpo": ("#009E73", "D"),
    "ppo_document": ("#CC79A7", "v"),
}
#: For variants of an algorithm: the palette's other colours, and greys
VARIANT_COLORS = ("#56B4E9", "#882255", "#000000", "#999999", "#8B5A2B", "#5D3A9B")
VARIANT_MARKERS = ("P", "X", "<", ">", "h", "*", "p")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 200,
}
#: Divergences by what is logged, exact ones first: (column, how it was measured)
DIVERGENCES = (("train/kl", "exact"), ("train/approx_kl", "SB3's estimate"), ("train/kl_divergence_loss", "TRPO's own"))
WIDTH = 7.2


def looks(algos: Sequence[str]) -> dict[str, Look]:
    """
    :param algos: of a comparison
    :return: an algorithm's own look, and for each variant one that nobody else in the comparison has
    """
    free = [look for algo, look in LOOKS.items() if algo not in algos]
    spare = itertools.chain(free, itertools.product(VARIANT_COLORS, VARIANT_MARKERS))
    return {algo: LOOKS[algo] if algo in LOOKS else next(spare) for algo in algos}


def draw(comparison: Comparison, results: Results) -> dict[str, str]:
    """
    :param comparison: what was asked for; the pictures go into its folder
    :param results: what there is of it
    :return: caption by file name
    """
    seeds = results.runs.groupby("algo").size()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    pictures: dict[str, tuple[Callable[[Comparison, Results], Figure], str]] = {
        "intervals.png": (intervals, "IQM over seeds, its 95 % bootstrap interval, and every seed as a dot."),
        "learning_curves.png": (
            learning_curves,
            f"Evaluation during training: IQM over {count} seeds with its 95 % bootstrap interval. Right: the same, close up.",
        ),
        "kl.png": (
            divergence,
            "Above: KL(old || new) of each update, IQM over seeds, thin lines single seeds; the band is ppo_penalty's "
            "[kl_min, kl_max]. The legend says how each is measured: this package's algorithms log the exact divergence of "
            "the whole batch after the last epoch, SB3's PPO an estimate from the actions during that epoch, TRPO the mean "
            "over states and action dimensions. Below: the penalty's coefficient.",
        ),
        "importance_weights.png": (
            importance_weights,
            "Left: share of importance weights outside the clip range (outside 1 ± 0.2 where nothing is clipped). Right: "
            "effective sample size of the weights after an update, as a share of the batch; only this package's algorithms "
            "log it.",
        ),
    }
    captions = {}
    with mpl.rc_context(STYLE):
        for name, (picture, caption) in pictures.items():
            figure = picture(comparison, results)
            figure.savefig(comparison.out / name)
            captions[name] = caption
    return captions


def _thousands(value: float, _: int) -> str:
    """
    :param value: environment steps
    :return: short
    """
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _minus(value: float) -> str:
    """
    :param value: to stand in a legend
    :return: with the sign that the axes have
    """
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _steps_axis(axes: Axes, limit: float) -> None:
    """
    :param axes: whose horizontal axis is in environment steps
    :param limit: where it ends
    """
    axes.set_xlim(0, limit)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel("environment steps")


def _legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """
    :param figure: gets one legend under its panels
    :param axes: where the labelled lines are
    :param columns: of the legend at most
    """
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), columns))


def _line(axes: Axes, frame: pd.DataFrame, look: Look, label: str, single_seeds: bool = False) -> None:
    """
    Draw the IQM over seeds and either its interval or the seeds themselves.

    :param axes: to draw on
    :param frame: a row for each number of environment steps, a column for each seed
    :param look: of the algorithm
    :param label: for the legend
    :param single_seeds: thin lines for the seeds, no band
    """
    color, marker = look
    x, values = frame.index.to_numpy(), frame.to_numpy()
    every = max(len(x) // 6, 1)
    axes.plot(x, iqm(values, axis=1), color=color, marker=marker, markevery=(every // 2, every), ms=4, label=label, zorder=3)
    if single_seeds:
        axes.plot(x, values, color=color, linewidth=0.5, alpha=0.35)
    elif values.shape[1] > 1:
        axes.fill_between(x, *iqm_interval(values, axis=1), color=color, alpha=0.18, linewidth=0)


def _reference_lines(axes: Axes, comparison: Comparison, horizontal: bool = True) -> None:
    """
    :param axes: one of whose axes is the return
    :param comparison: has an optimum or not
    :param horizontal: whether the return is on the vertical axis
    """
    if comparison.optimum is not None:
        line = axes.axhline if horizontal else axes.axvline
        line(comparison.optimum, color="black", linewidth=0.9, linestyle="--", label=f"optimum {_minus(comparison.optimum)}")


def learning_curves(comparison: Comparison, results: Results) -> Figure:
    """
    :param comparison: what was asked for
    :param results: what there is of it
    :return: return over steps, whole and near the end
    """
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    whole, close = figure.subplots(1, 2)
    frames = {algo: rows.pivot_table(index="steps", columns="seed", values="return") for algo, rows in _by_algo(results)}
    for axes in (whole, close):
        for algo, frame in frames.items():
            _line(axes, frame, looks(results.algos)[algo], algo)
        _reference_lines(axes, comparison)
        if comparison.threshold is not None:
            axes.axhline(
                comparison.threshold,
                color="gray",
                linewidth=0.9,
                linestyle=":",
                label=f"threshold {_minus(comparison.threshold)}",
            )
        _steps_axis(axes, comparison.task.n_timesteps)
    whole.set_ylabel("mean return of an evaluation")
    whole.set_title(comparison.task.env)
    middles = {algo: iqm(frame.to_numpy(), axis=1) for algo, frame in frames.items()}
    low, high = _close_up(list(middles.values()), comparison.optimum)
    close.set_ylim(low, high)
    close.set_title("close up")
    _legend_below(figure, [whole])
    return figure


def _by_algo(results: Results) -> list[tuple[str, pd.DataFrame]]:
    """
    :param results: of the comparison
    :return: evaluations of each algorithm, in the comparison's order
    """
    return [(algo, results.curves[results.curves["algo"] == algo]) for algo in results.algos]


def _close_up(curves: Sequence[np.ndarray[Any, Any]], optimum: float | None) -> tuple[float, float]:
    """
    :param curves: IQM over steps
    :param optimum: best possible return, if known
    :return: limits that show the last third of the better half of the algorithms
    """
    ends = [curve[-max(len(curve) // 3, 1) :] for curve in curves]
    top = max([*(end.max() for end in ends), *([optimum] if optimum is not None else [])])
    bottom = float(np.median([end.min() for end in ends]))
    margin = 0.15 * max(top - bottom, 1e-9 * max(abs(top), 1.0))
    return bottom - 3 * margin, top + margin


def divergence(comparison: Comparison, results: Results) -> Figure:
    """
    :param comparison: what was asked for
    :param results: what there is of it
    :return: divergence of each update against the thresholds, and the coefficient that follows
    """
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for algo, look in looks(results.algos).items():
        measured = ((updates_of(results, algo, column), said) for column, said in DIVERGENCES)
        frame, said = next(((frame, said) for frame, said in measured if len(frame)), (pd.DataFrame(), ""))
        if len(frame):
            _line(above, frame, look, f"{algo} ({said})", single_seeds=True)
        coefficients = updates_of(results, algo, "train/kl_coef")
        if len(coefficients):
            _line(below, coefficients, look, algo, single_seeds=True)
            low, high = (updates_of(results, algo, f"train/{name}").iloc[:, 0] for name in ("kl_min", "kl_max"))
            above.fill_between(low.index, low, high, color=look[0], alpha=0.13, linewidth=0)
            for threshold in (low, high):
                above.plot(threshold, color=look[0], linewidth=0.9, linestyle="--")
    for axes, label, base in ((above, "KL(old || new), nats", 10), (below, "penalty coefficient β", 2)):
        axes.set_ylabel(label)
        if axes.lines:
            axes.set_yscale("log", base=base)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            _nothing(axes)
    above.set_title(comparison.task.env)
    _steps_axis(below, comparison.task.n_timesteps)
    above.set_xlabel("")
    _legend_below(figure, [above], columns=3)
    return figure


def _nothing(axes: Axes) -> None:
    """:param axes: for which no algorithm logs anything."""
    axes.text(0.5, 0.5, "not logged by any of these", transform=axes.transAxes, ha="center", color="gray")


def importance_weights(comparison: Comparison, results: Results) -> Figure:
    """
    :param comparison: what was asked for
    :param results: what there is of it
    :return: clip fraction and effective sample size of each update
    """
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    panels = figure.subplots(1, 2)
    columns = (("train/clip_fraction", "clip fraction"), ("train/effective_sample_size", "effective sample size / batch"))
    for axes, (column, label) in zip(panels, columns, strict=True):
        for algo, look in looks(results.algos).items():
            frame = updates_of(results, algo, column)
            if len(frame):
                _line(axes, frame, look, algo)
        axes.set_title(label)
        _steps_axis(axes, comparison.task.n_timesteps)
        if not axes.lines:
            _nothing(axes)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(max(panels[1].get_ylim()[0], 0), 1)
    _legend_below(figure, panels)
    return figure


def intervals(comparison: Comparison, results: Results) -> Figure:
    """
    :param comparison: what was asked for
    :param results: what there is of it
    :return: IQMs with their intervals side by side
    """
    figures = summary(results, comparison.optimum)
    columns = [("final_return", "final return"), ("return_over_training", "return over training")]
    if "improvement" in figures:
        columns.append(("improvement", f"P(better than {BASELINE})"))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(figures)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True)
    for axes, (name, title) in zip(panels, columns, strict=True):
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.use_sticky_edges = False
        for height, (algo, row) in enumerate(figures.iterrows()):
            color, _ = looks(results.algos)[algo]
            if np.isfinite(row[f"{name}_low"]):
                axes.barh(
                    height,
                    row[f"{name}_high"] - row[f"{name}_low"],
                    left=row[f"{name}_low"],
                    height=0.55,
                    color=color,
                    alpha=0.35,
                )
            axes.plot([row[name]] * 2, [height - 0.28, height + 0.28], color=color, linewidth=2)
            if name in results.runs:
                seeds = results.runs.loc[results.runs["algo"] == algo, name]
                axes.plot(
                    seeds, [height] * len(seeds), "o", color=color, markersize=3, markeredgewidth=0.4, markeredgecolor="white"
                )
    _reference_lines(panels[0], comparison, horizontal=False)
    panels[0].set_yticks(range(len(figures)), figures.index)
    panels[0].invert_yaxis()
    if "improvement" in figures:
        panels[-1].axvline(0.5, color="black", linewidth=0.9, linestyle=":")
        panels[-1].set_xlim(-0.03, 1.03)
    return figure
