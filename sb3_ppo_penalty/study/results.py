"""Read finished runs back as tables, and summarise them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from sb3_ppo_penalty.study.algorithms import baseline_of
from sb3_ppo_penalty.study.execution import RUNS, is_finished
from sb3_ppo_penalty.study.grid import Run
from sb3_ppo_penalty.study.run import BATCH_RETURN, EVALUATIONS, PROGRESS, RESULT, TOTAL_STEPS
from sb3_ppo_penalty.study.statistics import (
    MIN_SEEDS,
    improvement_interval,
    iqm,
    iqm_interval,
    mean_over_training,
    probability_of_improvement,
    steps_to_threshold,
)


class Results(NamedTuple):
    """
    The tables of all finished runs of a comparison.

    :param runs: a row for each run
    :param curves: a row for each evaluation during training: ``algo``, ``seed``, ``steps``, ``return``
    :param updates: a row for each line of SB3's ``progress.csv``: its columns, ``algo`` and ``seed``
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    updates: pd.DataFrame

    @property
    def algos(self) -> list[str]:
        """Algorithms that have a finished run, in the order of the comparison."""
        return list(dict.fromkeys(self.runs["algo"])) if len(self.runs) else []


def read(runs: Iterable[Run], out: Path, threshold: float | None) -> Results:
    """
    Read the finished runs of a comparison.

    :param runs: runs of the comparison; those that are not finished are left out
    :param out: the comparison's folder
    :param threshold: return to be reached, None for none
    :return: their tables
    """
    finished = sorted((run for run in runs if is_finished(run, out)), key=lambda run: run.seed)
    order = list(dict.fromkeys(run.algo for run in finished))
    rows, curves, updates = [], [], []
    for run in sorted(finished, key=lambda run: order.index(run.algo)):
        folder = out / RUNS / run.name
        curve = _curve(run, folder)
        update = pd.read_csv(folder / PROGRESS).assign(algo=run.algo, seed=run.seed)
        rows.append(_row(run, folder, curve, update, threshold))
        curves.append(curve)
        updates.append(update)
    if not rows:
        return Results(pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
    return Results(*(pd.concat(parts, ignore_index=True) for parts in ([pd.DataFrame(rows)], curves, updates)))


def _curve(run: Run, folder: Path) -> pd.DataFrame:
    """
    Read a run's learning curve.

    :param run: a finished run
    :param folder: the run's folder
    :return: a row for each evaluation during training, at the step at which it was made: the first step of all environments at
        which it is due, so that evaluations lie further apart than ``--eval-freq`` where there are more environments than that
    """
    with np.load(folder / EVALUATIONS) as evaluations:
        steps, means = evaluations["timesteps"], evaluations["results"].mean(axis=1)
    return pd.DataFrame({"algo": run.algo, "seed": run.seed, "steps": steps, "return": means})


def _row(run: Run, folder: Path, curve: pd.DataFrame, update: pd.DataFrame, threshold: float | None) -> dict[str, Any]:
    """
    Read what a run came to.

    :param run: a finished run
    :param folder: the run's folder
    :param curve: the run's evaluations during training
    :param update: the run's ``progress.csv``
    :param threshold: return to be reached, None for none
    :return: its row of ``results.csv``
    """
    result = json.loads((folder / RESULT).read_text())
    steps, returns = curve["steps"], curve["return"]
    batches = update[BATCH_RETURN].dropna() if BATCH_RETURN in update else pd.Series(dtype=float)
    return {
        "env": run.task.env,
        "algo": run.algo,
        "seed": run.seed,
        "final_return": result["final_return"],
        "return_over_training": mean_over_training(steps, returns, run.task.last_eval),
        "steps_to_threshold": np.nan if threshold is None else steps_to_threshold(steps, returns, threshold),
        "last_batch_return": batches.iloc[-1] if len(batches) else np.nan,
        "best_batch_return": batches.max(),
        "steps": result["steps"],
        "training_seconds": result["training_seconds"],
        "steps_per_second": result["steps"] / result["training_seconds"],
        "run": run.name,
        "source": result["source"],
    }


def sources(runs: Iterable[Run], out: Path) -> list[str]:
    """
    Read which source of this package made each finished run.

    :param runs: runs of the comparison; those that are not finished are left out
    :param out: the comparison's folder
    :return: one digest for each finished run, see :func:`~.source_digest`
    """
    results = (out / RUNS / run.name / RESULT for run in runs if is_finished(run, out))
    return [json.loads(path.read_text())["source"] for path in results]


def curves_of(results: Results, algo: str) -> pd.DataFrame:
    """
    Lay the learning curves of an algorithm's seeds side by side.

    :param results: finished runs of the comparison
    :param algo: name of the algorithm
    :return: a row for each number of environment steps at which every seed was evaluated, a column for each seed
    """
    rows = results.curves[results.curves["algo"] == algo]
    return _side_by_side(rows, "steps", "return")


def _side_by_side(rows: pd.DataFrame, index: str, column: str) -> pd.DataFrame:
    """
    Give each seed a column; steps that are missing for a seed are left out, so that every mean is over all seeds.

    :param rows: rows of one algorithm
    :param index: name of the column with the environment steps
    :param column: name of the column with the figure
    :return: a row for each number of environment steps that all seeds have
    """
    return rows.pivot_table(index=index, columns="seed", values=column).dropna()


def updates_of(results: Results, algo: str, column: str) -> pd.DataFrame:
    """
    Lay a logged figure of an algorithm's seeds side by side.

    :param results: finished runs of the comparison
    :param algo: name of the algorithm
    :param column: name of a column of ``progress.csv``
    :return: a row for each number of environment steps at which every seed made an update, a column for each seed; empty if
        the algorithm does not log it
    """
    if column not in results.updates:
        return pd.DataFrame()
    rows = results.updates[results.updates["algo"] == algo].dropna(subset=[column])
    return _side_by_side(rows, TOTAL_STEPS, column)


def summary(results: Results, optimum: float | None) -> pd.DataFrame:
    """
    Summarise each algorithm over its seeds.

    :param results: finished runs of the comparison
    :param optimum: best possible mean return, None where it is not known
    :return: a row for each algorithm: IQMs over seeds with their 95 % intervals, and the other figures of the report's table;
        intervals and the probability of improvement are NaN below :data:`~.statistics.MIN_SEEDS` seeds
    """
    return pd.DataFrame([_summary_row(results, algo, optimum) for algo in results.algos]).set_index("algo")


def _summary_row(results: Results, algo: str, optimum: float | None) -> dict[str, Any]:
    """
    Summarise one algorithm over its seeds.

    :param results: finished runs of the comparison
    :param algo: name of the algorithm
    :param optimum: best possible mean return, None where it is not known
    :return: its row of the summary
    """
    runs = results.runs[results.runs["algo"] == algo]
    row: dict[str, Any] = {"algo": algo, "seeds": len(runs), "worst_seed": runs["final_return"].min()}
    for name in ("final_return", "return_over_training"):
        low, high = iqm_interval(runs[name])
        row |= {name: iqm(runs[name]), f"{name}_low": low, f"{name}_high": high}
    row["gap_to_optimum"] = np.nan if optimum is None else optimum - row["final_return"]
    row["reached_threshold"] = int(np.isfinite(runs["steps_to_threshold"]).sum())
    row["steps_to_threshold"] = iqm(runs["steps_to_threshold"])
    row["steps_per_second"] = iqm(runs["steps_per_second"])
    baseline = baseline_of(results.algos)
    if baseline not in (None, algo):
        samples = runs["final_return"], results.runs.loc[results.runs["algo"] == baseline, "final_return"]
        better = probability_of_improvement(*samples) if min(map(len, samples)) >= MIN_SEEDS else np.nan
        low, high = improvement_interval(*samples)
        row |= {"improvement": better, "improvement_low": low, "improvement_high": high}
    return row
