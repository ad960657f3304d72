"""
Compare ways to bound an update: controllers, cutoff, truncated ratios, guard and clip side by side on six small environments.

    python examples/trust_region_study.py                              # all of it: hours on two cores
    python examples/trust_region_study.py --envs CartPole-v1           # one environment
    python examples/trust_region_study.py --share 0.1 --seeds 1        # a tenth of the steps, to see how it looks

Every environment is one `python -m sb3_ppo_penalty compare --same-policy`: policy, network, minibatches, learning rate and all
else come from this package's entry for `ppo_clip`, and only the objective differs. Stock PPO, `ppo`, is then equal to PPOClip
bit for bit and represents both. Started again, the study continues with the runs that are missing. `summary.md` and
`summary.csv` have each algorithm's returns, and beside them figures of its updates over the last fifth of training.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sb3_ppo_penalty import ROBUST
from sb3_ppo_penalty.study import cli, grid, results
from sb3_ppo_penalty.study.report import NO_VALUE, format_interval, format_number, markdown
from sb3_ppo_penalty.study.statistics import MIN_SEEDS, iqm, iqm_interval

#: Stock PPO
BASELINE = "ppo"


class Scale(NamedTuple):
    """
    How long to train and to evaluate on an environment.

    :param n_timesteps: environment steps of a run
    :param n_eval_episodes: episodes of the last evaluation, and of those during training if they are fewer than 50
    """

    n_timesteps: int
    n_eval_episodes: int


#: Enough steps to show a difference
ENVIRONMENTS = {
    "Pendulum-v1": Scale(60_000, 200),
    "CartPole-v1": Scale(30_000, 50),
    "Acrobot-v1": Scale(50_000, 50),
    "MountainCarContinuous-v0": Scale(30_000, 20),
    "LunarLanderContinuous-v3": Scale(100_000, 30),
    "InvertedPendulum-v5": Scale(40_000, 20),
}
#: Arguments of every penalty, in place of those in this package's entry for the environment
PENALTY: dict[str, Any] = {
    **ROBUST,
    "kl_coef": 1.0,
    "kl_coef_bounds": (0.001, 1000.0),
    "kl_penalty": "old_new",
    "max_ratio": None,
    "guard": None,
}
#: Name of a variant -> its arguments, which override those of PENALTY
VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {"kl_controller": "adaptive"},
    "fixed": {"kl_controller": "fixed"},
    "proportional": {},
    "dual": {"kl_controller": "dual"},
    "clip": {"clip_range": 0.2},
    "cutoff": {"kl_penalty": {"cutoff_coef": 1000.0}},
    "per-state": {"kl_penalty": {"cutoff_coef": 100.0, "per_state": True}},
    "truncated": {"max_ratio": 2.0},
    "tight": {"max_ratio": 1.3, "guard": "rollback"},
    "guard": {"guard": "rollback"},
    "guard-max": {"guard": {"action": "rollback", "measure": "max", "max_kl_factor": 10.0}},
    "robust": ROBUST,
}
#: Figures of an update, averaged over the last fifth of training: log key -> header
DIAGNOSTICS = {
    "kl": "KL",
    "kl_p99": "99th percentile",
    "kl_max_state": "largest of a state",
    "kl_coef": "kl_coef",
    "max_ratio": "largest ratio",
    "effective_sample_size": "effective sample size",
    "std": "std",
}
#: Tables over all environments: title -> column
OVERVIEWS = {"Final return, without noise": "final_return", "Return with noise, last batch": "last_batch_return"}


def compare_arguments(env: str, names: Sequence[str], chosen: argparse.Namespace) -> list[str]:
    """
    Write the arguments of `python -m sb3_ppo_penalty compare` for one environment.

    :param env: id of the environment
    :param names: names of the variants
    :param chosen: parsed arguments of the command line
    :return: words of the command line
    """
    steps, episodes = ENVIRONMENTS[env]
    steps = max(int(steps * chosen.share), 1)
    algos = [BASELINE, *(f"ppo_penalty+{name}" for name in names)]
    given = {f"ppo_penalty+{name}": {**PENALTY, **VARIANTS[name]} for name in names}
    pairs = [f"{algo}:{key}={value!r}" for algo, own in given.items() for key, value in own.items()]
    words = ["--env", env, "--algos", *algos, "--same-policy", "--seeds", str(chosen.seeds)]
    words += ["--first-seed", str(chosen.first_seed), "--n-timesteps", str(steps), "--eval-freq", str(max(steps // 4, 1))]
    return [*words, "--n-eval-episodes", str(episodes), "--out", str(chosen.out / env), "--hyperparams", *pairs]


def measure_algorithms(comparison: grid.Comparison) -> pd.DataFrame:
    """
    Summarise the returns of each algorithm and the updates of the last fifth of its training.

    :param comparison: a finished comparison
    :return: a row for each algorithm
    """
    found = results.read(comparison.runs, comparison.out, comparison.threshold)
    rows = results.summary(found, comparison.optimum)
    rows.insert(0, "env", comparison.task.env)
    rows["steps"] = comparison.task.n_timesteps
    rows["source"] = found.runs.groupby("algo")["source"].agg(lambda digests: " ".join(sorted({*digests})))
    noisy = found.runs.groupby("algo")["last_batch_return"]
    rows["last_batch_return"] = noisy.apply(iqm).reindex(rows.index)
    ends = noisy.apply(iqm_interval).reindex(rows.index)
    rows["last_batch_return_low"], rows["last_batch_return_high"] = zip(*ends, strict=True)
    late = found.updates[found.updates["time/total_timesteps"] > 0.8 * comparison.task.n_timesteps]
    for name in DIAGNOSTICS:
        column = f"train/{name}"
        rows[name] = late.groupby("algo")[column].mean().reindex(rows.index) if column in late else np.nan
    return rows.reset_index()


def format_figure(value: float) -> str:
    """
    Write a diagnostic with three significant digits.

    :param value: value of the diagnostic
    :return: the text; a dash where nothing was logged
    """
    return f"{value:.3g}" if np.isfinite(value) else NO_VALUE


def variant_name(algo: str) -> str:
    """
    Shorten the name of a penalty to that of the variant.

    :param algo: name of an algorithm
    :return: the name without ``ppo_penalty+``
    """
    return algo.removeprefix("ppo_penalty+")


def table(rows: pd.DataFrame) -> str:
    """
    Write the table of one environment.

    :param rows: rows of that environment
    :return: Markdown table
    """
    headers = ["", "final return", "with noise, last batch", f"P(better than {BASELINE})", *DIAGNOSTICS.values()]
    lines = []
    for _, row in rows.iterrows():
        better = format_number(row.get("improvement", np.nan), 2)
        figures = [format_figure(row[diagnostic]) for diagnostic in DIAGNOSTICS]
        lines.append(
            [
                variant_name(row["algo"]),
                format_interval(row, "final_return"),
                format_interval(row, "last_batch_return"),
                better,
                *figures,
            ]
        )
    return markdown(headers, lines)


def overview(rows: pd.DataFrame, column: str) -> str:
    """
    Write the table of one figure over all environments.

    :param rows: rows of all environments
    :param column: name of the figure
    :return: Markdown table with a row for each algorithm
    """
    envs = list(dict.fromkeys(rows["env"]))
    figures = rows.pivot(index="algo", columns="env", values=column).reindex(dict.fromkeys(rows["algo"]))
    lines = [[variant_name(str(algo)), *(format_number(row[env]) for env in envs)] for algo, row in figures.iterrows()]
    return markdown(["", *(env.split("-")[0] for env in envs)], lines)


def write(rows: pd.DataFrame, comparisons: Sequence[grid.Comparison], out: Path) -> None:
    """
    Write the summary of all environments so far.

    :param rows: rows of all environments
    :param comparisons: the comparisons that they come from
    :param out: folder for the summary
    """
    sources = " and ".join(sorted({*" ".join(rows["source"]).split()}))
    made_with = {**comparisons[0].runs[0].versions, "source": sources}
    versions = ", ".join(f"{name} {version}" for name, version in made_with.items())
    parts = [f"# How the policy is held\n\n{versions}\n"]
    for title, column in OVERVIEWS.items():
        parts.append(f"## {title}\n\n{overview(rows, column)}")
    for comparison in comparisons:
        own = rows[rows["env"] == comparison.task.env]
        seeds = sorted({run.seed for run in comparison.runs})
        few = "" if len(seeds) >= MIN_SEEDS else " (too few for intervals)"
        head = f"## {comparison.task.env}\n\n{comparison.task.n_timesteps:,} steps, seeds {seeds[0]} to {seeds[-1]}{few}, "
        parts.append(f"{head}{comparison.task.n_eval_episodes} evaluation episodes.\n\n{table(own)}")
    (out / "summary.md").write_text("\n".join(parts), encoding="utf-8")
    rows.to_csv(out / "summary.csv", index=False, float_format="%.6g")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the comparisons and write the summary after each.

    :param arguments: words of the command line; default: this process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), metavar="ID")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="share of each environment's steps")
    parser.add_argument("--n-jobs", type=int, default=-1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/trust_region"))
    chosen = parser.parse_args(arguments)
    comparisons = []
    for env in chosen.envs:
        words = compare_arguments(env, chosen.variants, chosen)
        print(f"\n{shlex.join(words)}", flush=True)
        comparison = cli.build_comparison(cli.build_parser().parse_args(words), shlex.join([*cli.PROGRAM.split(), *words]))
        if cli.compare(comparison, chosen.n_jobs):
            raise SystemExit(f"{env}: a run failed, see above")
        comparisons.append(comparison)
        rows = pd.concat([measure_algorithms(comparison) for comparison in comparisons], ignore_index=True)
        write(rows, comparisons, chosen.out)
    print((chosen.out / "summary.md").read_text())


if __name__ == "__main__":
    main()
