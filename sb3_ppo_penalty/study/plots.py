"""The plots of a comparison's report."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from sb3_ppo_penalty.study.algorithms import baseline_of
from sb3_ppo_penalty.study.grid import Comparison
from sb3_ppo_penalty.study.results import Results, curves_of, summary, updates_of
from sb3_ppo_penalty.study.run import TOTAL_STEPS
from sb3_ppo_penalty.study.statistics import MIN_SEEDS, iqm, iqm_interval

#: Colour and marker of an algorithm
LineStyle = tuple[str, str]
#: Okabe and Ito's palette, which colour-blind people can tell apart; the markers are for prints without colour
LINE_STYLES = {
    "ppo_penalty": ("#0072B2", "o"),
    "ppo_clip": ("#E69F00", "s"),
    "ppo": ("#D55E00", "^"),
    "trpo": ("#009E73", "D"),
    "ppo_article": ("#CC79A7", "v"),
    "ppo_penalty_lstm": ("#0072B2", "P"),
    "ppo_lstm": ("#D55E00", "X"),
}
#: Styles of the variants
VARIANT_COLORS = ("#56B4E9", "#882255", "#000000", "#999999", "#8B5A2B", "#5D3A9B")
VARIANT_MARKERS = ("P", "X", "<", ">", "h", "*", "p")
#: Of matplotlib, for all pictures of this project
STYLE = "sb3_ppo_penalty.study.pictures"
#: Endings of the files that each picture is written to
FORMATS = (".png", ".pdf")
#: Columns that hold a KL, exact ones first, and how each is measured
DIVERGENCES = (("train/kl", "exact"), ("train/approx_kl", "SB3's estimate"), ("train/kl_divergence_loss", "TRPO's own"))
WIDTH = 7.2
#: Largest number of columns of a legend
LEGEND_COLUMNS = 4
#: Largest number of characters on a line of a name, and height of a line in inches
NAME_WIDTH, LINE_HEIGHT = 22, 0.15


def line_styles(algos: Sequence[str]) -> dict[str, LineStyle]:
    """
    Give each algorithm a colour and a marker that no other algorithm of the comparison has.

    :param algos: names of the algorithms and variants that are compared
    :return: style by name; the algorithms themselves keep theirs in every comparison
    """
    free = [style for algo, style in LINE_STYLES.items() if algo not in algos]
    variants = ((color, marker) for marker in VARIANT_MARKERS for color in VARIANT_COLORS)
    spare = itertools.chain(free, variants)
    return {algo: LINE_STYLES[algo] if algo in LINE_STYLES else next(spare) for algo in algos}


def draw(comparison: Comparison, results: Results) -> dict[str, str]:
    """
    Draw all plots and save them in the comparison's folder.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: caption by file name
    """
    over = seeds_caption(results)
    pictures: dict[str, tuple[Callable[[Comparison, Results], Figure], str]] = {
        "intervals.png": (intervals, f"After training, and over it: {over}. Every seed is a dot."),
        "learning_curves.png": (learning_curves, f"Evaluation during training: {over}. Right: the same, close up."),
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
    with mpl.style.context(STYLE):
        for name, (picture, caption) in pictures.items():
            figure = picture(comparison, results)
            separate_ticks(figure)
            for ending in FORMATS:
                figure.savefig((comparison.out / name).with_suffix(ending))
            captions[name] = caption
    return captions


def seeds_caption(results: Results) -> str:
    """
    Say over how many seeds the figures are, and whether they have intervals.

    :param results: finished runs of the comparison
    :return: part of a caption
    """
    seeds = results.runs.groupby("algo").size()
    low, high = seeds.min(), seeds.max()
    if high == 1:
        return "a single seed, without an interval"
    count = f"{low}" if low == high else f"{low} to {high}"
    if high < MIN_SEEDS:
        return f"IQM over {count} seeds, too few for an interval"
    few = f" where there are {MIN_SEEDS} seeds" if low < MIN_SEEDS else ""
    return f"IQM over {count} seeds with its 95 % bootstrap interval{few}"


def wrap(name: str) -> str:
    """
    Break a long name into lines, between two words where it can.

    :param name: name of an algorithm or of a variant
    :return: lines of at most :data:`NAME_WIDTH` characters
    """
    most = f".{{1,{NAME_WIDTH}}}"
    return "\n".join(re.findall(rf"{most}(?:(?<=[+_.-])|$)|{most}", name))


def separate_ticks(figure: Figure) -> None:
    """
    Take fewer ticks on horizontal axes whose labels would touch each other.

    :param figure: the complete figure
    """
    crowded = figure.axes
    for n_intervals in (6, 5, 4, 3, 2, 1):
        # Matplotlib's own choice of ticks assumes labels of three characters
        for axes in crowded:
            axes.xaxis.set_major_locator(MaxNLocator(n_intervals, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
        figure.draw_without_rendering()
        crowded = [axes for axes in figure.axes if _overlap(_tick_boxes(axes))]
        if not crowded:
            return


def _tick_boxes(axes: Axes) -> list[Bbox]:
    """
    Measure the labels of a horizontal axis.

    :param axes: axes that have been drawn
    :return: bounding boxes of the labels in pixels, from left to right
    """
    low, high = sorted(axes.get_xlim())
    labels = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    return sorted((label.get_window_extent() for label in labels if label.get_visible()), key=lambda box: box.x0)


def _overlap(boxes: Sequence[Bbox]) -> bool:
    """
    Say whether two neighbouring labels stand too close to be read.

    :param boxes: bounding boxes of the labels in pixels, from left to right
    :return: whether less than a third of a line's height is between two of them
    """
    return any(right.x0 - left.x1 < left.height / 3 for left, right in itertools.pairwise(boxes))


def _format_steps(value: float, _: int) -> str:
    """
    Shorten a number of environment steps: 20000 to 20k.

    :param value: number of environment steps
    :return: label of a tick
    """
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _steps_axis(axes: Axes, limit: float) -> None:
    """
    Label a horizontal axis with environment steps.

    :param axes: the axes
    :param limit: environment steps at which it ends
    """
    axes.set_xlim(0, limit)
    axes.xaxis.set_major_formatter(FuncFormatter(_format_steps))
    axes.set_xlabel("environment steps")


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """
    Put one legend under the panels, and make the figure higher by its height.

    :param figure: the figure with its panels
    :param axes: axes that have the labelled lines
    """
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    for columns in range(min(len(entries), LEGEND_COLUMNS), 0, -1):
        legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
        size = legend.get_window_extent()
        if size.width <= figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            return
        legend.remove()


def _plot_seeds(axes: Axes, frame: pd.DataFrame, style: LineStyle, label: str, single_seeds: bool = False) -> None:
    """
    Draw the IQM over seeds, and either its interval or the single seeds.

    :param axes: axes to draw on
    :param frame: a row for each number of environment steps, a column for each seed
    :param style: colour and marker of the algorithm
    :param label: label of the legend
    :param single_seeds: draw a thin line for each seed instead of the interval
    """
    color, marker = style
    x, values = frame.index.to_numpy(), frame.to_numpy()
    every = max(len(x) // 6, 1)
    axes.plot(x, iqm(values, axis=1), color=color, marker=marker, markevery=(every // 2, every), ms=4, label=label, zorder=3)
    if single_seeds:
        axes.plot(x, values, color=color, linewidth=0.5, alpha=0.35)
    elif values.shape[1] >= MIN_SEEDS:
        axes.fill_between(x, *iqm_interval(values, axis=1), color=color, alpha=0.18, linewidth=0)


def _reference_line(line: Callable[..., Any], value: float | None, name: str, color: str, linestyle: str) -> None:
    """
    Mark a return of reference where it is known.

    :param line: method of the axes that draws the line, ``axhline`` or ``axvline``
    :param value: the return, None where it is not known
    :param name: name in the legend
    :param color: colour of the line
    :param linestyle: style of the line
    """
    if value is not None:
        # With the minus sign that matplotlib uses on axes
        label = f"{name} {value:g}".replace("-", "\N{MINUS SIGN}")
        line(value, color=color, linewidth=0.9, linestyle=linestyle, label=label)


def learning_curves(comparison: Comparison, results: Results) -> Figure:
    """
    Draw the return over environment steps, once whole and once close up.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: the figure
    """
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    whole, close = figure.subplots(1, 2)
    frames = {algo: curves_of(results, algo) for algo in results.algos}
    for axes in (whole, close):
        for algo, style in line_styles(results.algos).items():
            _plot_seeds(axes, frames[algo], style, wrap(algo))
        _reference_line(axes.axhline, comparison.optimum, "optimum", "black", "--")
        _reference_line(axes.axhline, comparison.threshold, "threshold", "gray", ":")
        _steps_axis(axes, max(comparison.task.n_timesteps, results.curves["steps"].max()))
    whole.set_ylabel("mean return of an evaluation")
    whole.set_title(comparison.task.env)
    middles = {algo: iqm(frame.to_numpy(), axis=1) for algo, frame in frames.items()}
    close.set_ylim(close_up_limits(list(middles.values()), comparison.optimum))
    close.set_title("close up")
    _legend_below(figure, [whole])
    return figure


def close_up_limits(curves: Sequence[np.ndarray[Any, Any]], optimum: float | None) -> tuple[float, float]:
    """
    Choose limits that show the last third of the better half of the algorithms, and never more than all there is.

    The optimum is shown where it is no further above the curves than these are apart; a distant one would flatten them.

    :param curves: IQM over seeds for each algorithm, each of shape (evaluations,)
    :param optimum: best possible return, None where it is not known
    :return: lower and upper limit, in the unit of the returns
    """
    ends = [curve[-max(len(curve) // 3, 1) :] for curve in curves]
    top, bottom = float(max(end.max() for end in ends)), float(np.median([end.min() for end in ends]))
    lowest, highest = float(min(curve.min() for curve in curves)), float(max(curve.max() for curve in curves))
    # A minimum height, for curves that have met or never move
    height = max(top - bottom, 0.02 * (highest - lowest), 0.01 * abs(top), 0.01)
    if optimum is not None and 0 <= optimum - top <= height:
        top = highest = max(highest, optimum)
    margin = 0.15 * max(top - bottom, height)
    return max(bottom - 3 * margin, lowest - margin), min(top + margin, highest + margin)


def divergence(comparison: Comparison, results: Results) -> Figure:
    """
    Draw the KL of each update with the controller's thresholds, and the penalty's coefficient.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: the figure
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for algo, style in line_styles(results.algos).items():
        measured = ((updates_of(results, algo, column), said) for column, said in DIVERGENCES)
        frame, said = next(((frame, said) for frame, said in measured if len(frame)), (pd.DataFrame(), ""))
        if len(frame):
            _plot_seeds(above, frame, style, f"{wrap(algo)} ({said})", single_seeds=True)
        coefficients = updates_of(results, algo, "train/kl_coef")
        if len(coefficients):
            _plot_seeds(below, coefficients, style, algo, single_seeds=True)
            low, high = (updates_of(results, algo, f"train/target_{name}").iloc[:, 0] for name in ("kl_min", "kl_max"))
            above.fill_between(low.index, low, high, color=style[0], alpha=0.13, linewidth=0)
            for threshold in (low, high):
                above.plot(threshold, color=style[0], linewidth=0.9, linestyle="--")
    for axes, label, base in ((above, "KL(old || new), nats", 10), (below, "penalty coefficient β", 2)):
        axes.set_ylabel(label)
        if axes.lines:
            axes.set_yscale("log", base=base)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            _mark_as_empty(axes)
    above.set_title(comparison.task.env)
    _steps_axis(below, _last_update(comparison, results))
    above.set_xlabel("")
    _legend_below(figure, [above])
    return figure


def _last_update(comparison: Comparison, results: Results) -> float:
    """
    Find the environment steps of the last update; a run ends with the rollout that reaches its number of steps.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: environment steps
    """
    return float(max(comparison.task.n_timesteps, results.updates[TOTAL_STEPS].max()))


def _mark_as_empty(axes: Axes) -> None:
    """
    Write into axes that none of the algorithms logs the figure.

    :param axes: axes without lines
    """
    axes.text(0.5, 0.5, "not logged by any of these", transform=axes.transAxes, ha="center", color="gray")


def importance_weights(comparison: Comparison, results: Results) -> Figure:
    """
    Draw the clip fraction and the effective sample size of each update.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: the figure
    """
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    panels = figure.subplots(1, 2)
    columns = (("train/clip_fraction", "clip fraction"), ("train/effective_sample_size", "effective sample size / batch"))
    for axes, (column, label) in zip(panels, columns, strict=True):
        for algo, style in line_styles(results.algos).items():
            frame = updates_of(results, algo, column)
            if len(frame):
                _plot_seeds(axes, frame, style, wrap(algo))
        axes.set_title(label)
        _steps_axis(axes, _last_update(comparison, results))
        if not axes.lines:
            _mark_as_empty(axes)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(max(panels[1].get_ylim()[0], 0), 1)
    _legend_below(figure, panels)
    return figure


def intervals(comparison: Comparison, results: Results) -> Figure:
    """
    Draw the IQMs of the algorithms side by side, with intervals and single seeds.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: the figure
    """
    figures = summary(results, comparison.optimum)
    columns = [("final_return", "final return"), ("return_over_training", "return over training")]
    compared = "improvement" in figures and figures["improvement"].notna().any()
    if compared:
        columns.append(("improvement", f"P(better than {baseline_of(results.algos)})"))
    names = [wrap(algo) for algo in figures.index]
    height = max(0.32, LINE_HEIGHT * max(1 + name.count("\n") for name in names) + 0.05)
    figure = Figure(figsize=(WIDTH, 0.9 + height * len(figures)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True)
    for axes, (name, title) in zip(panels, columns, strict=True):
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.use_sticky_edges = False
        for height, (algo, (color, _)) in enumerate(line_styles(results.algos).items()):
            row = figures.loc[algo]
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            if np.isfinite(low):
                axes.barh(height, high - low, left=low, height=0.55, color=color, alpha=0.35)
            axes.plot([row[name]] * 2, [height - 0.28, height + 0.28], color=color, linewidth=2)
            if name in results.runs:
                seeds = results.runs.loc[results.runs["algo"] == algo, name]
                axes.plot(seeds, [height] * len(seeds), "o", color=color, ms=3, mew=0.4, mec="white")
    _reference_line(panels[0].axvline, comparison.optimum, "optimum", "black", "--")
    panels[0].set_yticks(range(len(figures)), names)
    panels[0].invert_yaxis()
    if compared:
        panels[-1].axvline(0.5, color="black", linewidth=0.9, linestyle=":")
        panels[-1].set_xlim(-0.03, 1.03)
    return figure
