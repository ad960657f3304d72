"""Write a comparison's ``report.md`` and ``results.csv``."""

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]
from pytablewriter import MarkdownTableWriter, String

from sb3_ppo_penalty.study import plots
from sb3_ppo_penalty.study.algorithms import ALGORITHMS, ARTICLE, baseline_of
from sb3_ppo_penalty.study.grid import EVALUATION_ENVS, EVALUATION_SEED, Comparison, source_digest
from sb3_ppo_penalty.study.references import ARTICLE_ITERATIONS, ARTICLE_RETURN, OPTIMA
from sb3_ppo_penalty.study.results import Results, summary
from sb3_ppo_penalty.study.statistics import MIN_SEEDS

#: Stands in a cell without a value
NO_VALUE = "\N{EN DASH}"
REPORT, TABLE = "report.md", "results.csv"
ARTICLE_TEXT = f"""\
## The article's figure

The article closes with an average episodic return of {ARTICLE_RETURN}, after {ARTICLE_ITERATIONS:,} iterations. It is \
the mean of one training batch of about ten episodes, with exploration noise and random starts. On Pendulum-v1 single \
episodes differ by a standard deviation of 74 with their start alone, so the mean of eleven differs by 22 from batch to \
batch; and under the *optimal* policy, whose mean over random starts is {OPTIMA["Pendulum-v1"]}, such a batch beats \
{ARTICLE_RETURN} with a probability of 0.2 to 0.4 %. It is a lucky batch, not a level. In the article's own terms, and in \
this report's:
"""


def format_number(value: float, digits: int = 1) -> str:
    """
    Write a number with commas between thousands.

    :param value: the number
    :param digits: number of digits after the point
    :return: the text; a dash for NaN
    """
    return NO_VALUE if np.isnan(value) else f"{value:,.{digits}f}"


def format_interval(row: Mapping[str, Any], name: str, digits: int = 1) -> str:
    """
    Write a figure of the summary with its interval, if it has one.

    :param row: an algorithm's row of the summary
    :param name: name of the figure
    :param digits: number of digits after the point
    :return: the text
    """
    value, low, high = (row.get(key, np.nan) for key in (name, f"{name}_low", f"{name}_high"))
    if np.isnan(low):
        return format_number(value, digits)
    return f"{format_number(value, digits)} [{format_number(low, digits)}, {format_number(high, digits)}]"


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    Write a Markdown table.

    :param headers: headers of the columns
    :param rows: cells of each row
    :return: the table
    """
    texts = [String] * len(headers)  # otherwise the writer parses numbers and formats them anew
    values = [list(row) for row in rows]
    return str(MarkdownTableWriter(headers=list(headers), value_matrix=values, type_hints=texts, margin=1).dumps())


def table(comparison: Comparison, results: Results) -> str:
    """
    Write the report's main table.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: Markdown table with a row for each algorithm
    """
    figures = summary(results, comparison.optimum)
    baseline = baseline_of(results.algos)
    rows = [_cells(comparison, algo, row, baseline) for algo, row in figures.iterrows()]
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def _cells(comparison: Comparison, algo: str, row: pd.Series, baseline: str | None) -> dict[str, str]:
    """
    Write an algorithm's row of the main table.

    :param comparison: the comparison
    :param algo: name of the algorithm
    :param row: the algorithm's row of the summary
    :param baseline: the algorithm that the others are compared with
    :return: cells by header
    """
    cells = {
        "algorithm": algo,
        "final return": format_interval(row, "final_return"),
        "worst seed": format_number(row["worst_seed"]),
    }
    if comparison.optimum is not None:
        cells[f"gap to optimum {comparison.optimum}"] = format_number(row["gap_to_optimum"])
    if "improvement" in row:
        cells[f"P(better than {baseline})"] = format_interval(row, "improvement", digits=2)
    if comparison.threshold is not None:
        finite = np.isfinite(row["steps_to_threshold"])
        steps = format_number(row["steps_to_threshold"], 0) if finite else "not reached"
        cells[f"steps to {comparison.threshold:g}"] = f"{steps} ({row['reached_threshold']:.0f}/{row['seeds']:.0f} seeds)"
    cells["return over training"] = format_interval(row, "return_over_training")
    cells["steps/s"] = format_number(row["steps_per_second"], 0)
    return cells


def article_section(results: Results) -> str:
    """
    Compare the article's figure with runs of the article's recipe, by the measure that the article uses.

    :param results: finished runs, of the article's recipe among others
    :return: section of the report
    """
    runs = results.runs[results.runs["algo"] == ARTICLE]
    headers = ["seed", "steps", "mean return of the last batch", "of the best batch", "final return (no noise)"]
    columns = ["last_batch_return", "best_batch_return", "final_return"]
    rows = [
        [str(run["seed"]), format_number(run["steps"], 0), *(format_number(run[name]) for name in columns)]
        for _, run in runs.iterrows()
    ]
    rows.append(["the article", "about 20,000,000", str(ARTICLE_RETURN), NO_VALUE, NO_VALUE])
    return f"{ARTICLE_TEXT}\n{markdown(headers, rows)}"


def settings_section(comparison: Comparison) -> str:
    """
    List the hyperparameters of each algorithm and where they come from.

    :param comparison: the comparison
    :return: section of the report
    """
    parts = ["## Settings\n"]
    for algo, settings in comparison.settings.items():
        plain = json.loads(json.dumps(settings.hyperparams, default=str))
        parts.append(f"`{algo}`: {settings.source}\n\n```yaml\n{yaml.safe_dump(plain, sort_keys=True)}```\n")
    return "\n".join(parts)


def provenance(comparison: Comparison, results: Results) -> str:
    """
    State what the results come from: command, seeds, steps, versions, source code and machine.

    :param comparison: the comparison
    :param results: finished runs of the comparison
    :return: section of the report
    """
    seeds = sorted({run.seed for run in comparison.runs})
    versions = ", ".join(f"{name} {version}" for name, version in comparison.runs[0].versions.items())
    machine = f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores, Python {platform.python_version()}"
    sources = ", ".join(f"{source} ({count})" for source, count in results.runs["source"].value_counts().items())
    task = comparison.task
    return f"""\
```
{comparison.command}
```

- {len(results.runs)} of {len(comparison.runs)} runs: seeds {", ".join(map(str, seeds))}, {task.n_timesteps:,} environment \
steps each (a run ends with the rollout that reaches them)
- {versions}
- source of sb3_ppo_penalty (runs made with it): {sources}
- {machine}
"""


def caveats(results: Results) -> list[str]:
    """
    List the warnings that a reader of the table needs.

    :param results: finished runs of the comparison
    :return: sentences; none where there is nothing to beware of
    """
    return [text for text in (_few_seeds_warning(results), source_warning(list(results.runs["source"]))) if text]


def _few_seeds_warning(results: Results) -> str:
    """
    Warn where there are too few seeds to tell a difference from chance.

    :param results: finished runs of the comparison
    :return: a sentence; empty if every algorithm has enough seeds
    """
    seeds = results.runs.groupby("algo", sort=False).size()
    few = [f"{algo} ({count})" for algo, count in seeds.items() if count < MIN_SEEDS]
    if not few:
        return ""
    return (
        f"Fewer than {MIN_SEEDS} seeds: {', '.join(few)}. Where these are concerned there are neither intervals nor a "
        "P(better), and a difference may be chance."
    )


def source_warning(sources: Sequence[str]) -> str:
    """
    Warn where finished runs were made by another state of this package's source code than the present one.

    :param sources: digest of the source code for each finished run
    :return: a sentence; empty if there are no such runs
    """
    others = [source for source in sources if source != source_digest()]
    if not others:
        return ""
    return (
        f"{len(others)} of {len(sources)} finished runs were made by another source of sb3_ppo_penalty "
        f"({', '.join(sorted({*others}))}) than the present one ({source_digest()}), of the same version. If the difference "
        f"can change a result, delete their folders and give the command again; {TABLE} has the source of each."
    )


def explanation(comparison: Comparison) -> str:
    """
    Explain the columns of the main table.

    :param comparison: the comparison
    :return: a Markdown list
    """
    task, optimum, threshold = comparison.task, comparison.optimum, comparison.threshold
    lines = [
        f"Interquartile means (IQM) over seeds, in brackets 95 % bootstrap intervals over seeds, from {MIN_SEEDS} seeds on.",
        f"**final return**: mean over {task.n_eval_episodes:,} episodes after training, with deterministic actions, on the "
        f"same starts for every run (seeds from {EVALUATION_SEED:,} on); **worst seed**: the lowest of them.",
    ]
    if optimum is not None:
        lines.append(
            f"**gap to optimum**: {optimum} is the best possible mean over random starts, by dynamic programming. Over the "
            "default 1,000 starts it is within 0.3 of that; over n others it can be off by 74 / sqrt(n), equally for all."
        )
    baseline = baseline_of({run.algo for run in comparison.runs})
    if baseline is not None:
        stock = "sb3-contrib's RecurrentPPO" if ALGORITHMS[baseline].recurrent else "stock PPO"
        lines.append(
            f"**P(better than {baseline})**: probability that a run ends with a higher return than one of {stock}, a tie "
            f"counting half (Mann-Whitney); from {MIN_SEEDS} seeds of both on."
        )
    if threshold is not None:
        lines.append(
            f"**steps to {threshold:g}**: environment steps at the first of the evaluations during training (every "
            f"{task.eval_freq:,} steps, {min(EVALUATION_ENVS, task.n_eval_episodes)} episodes) whose mean reaches it. An "
            "evaluation is made as soon as a step of all environments is complete."
        )
    lines.append(
        f"**return over training**: area under the learning curve up to {task.last_eval:,} steps, divided by its length."
    )
    lines.append("**steps/s**: of a run on one thread, without its evaluations, beside the others that ran at the same time.")
    if comparison.donor is not None:
        lines.append(
            f"All settings but those of the objective itself come from the entry of `{comparison.donor}`, policy included: "
            "only the objective differs. TRPO has no use for some (epochs, entropy bonus); its learning rate and batch size "
            "are the critic's alone."
        )
    return "\n".join(f"- {line}" for line in lines)


def write(comparison: Comparison, results: Results, errors: Mapping[str, str]) -> None:
    """
    Write the report, its table and its plots into the comparison's folder.

    :param comparison: the comparison
    :param results: its finished runs, at least one
    :param errors: tracebacks of the runs that failed, by name
    """
    parts = [
        f"# {comparison.task.env}: {', '.join(results.algos)}\n",
        provenance(comparison, results),
        f"## Result\n\n{table(comparison, results)}",
        *(f"**{text}**\n" for text in caveats(results)),
        f"{explanation(comparison)}\n",
    ]
    for name, caption in plots.draw(comparison, results).items():
        parts.append(f"![{name}]({name})\n\n{caption}\n")
    if ARTICLE in results.algos and comparison.optimum is not None:
        parts.append(article_section(results))
    if errors:
        traces = "\n".join(f"### {name}\n\n```\n{error}```\n" for name, error in errors.items())
        parts.append(f"## Failed runs\n\nThey are not in the table.\n\n{traces}")
    parts.append(settings_section(comparison))
    results.runs.to_csv(comparison.out / TABLE, index=False)
    (comparison.out / REPORT).write_text("\n".join(parts), encoding="utf-8")
