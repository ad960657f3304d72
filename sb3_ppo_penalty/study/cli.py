"""The command ``python -m sb3_ppo_penalty compare``: perform the runs that are missing and write the report."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sb3_ppo_penalty import zoo
from sb3_ppo_penalty.study.algorithms import ALGORITHMS, TUNED_ALGORITHMS

if TYPE_CHECKING:
    from sb3_ppo_penalty.study.execution import Backend
    from sb3_ppo_penalty.study.grid import Comparison, Task

#: Modules that the comparison needs besides those of RL Zoo
REQUIRED = ("joblib", "matplotlib", "pytablewriter", "scipy", "tqdm", "yaml")
#: Backends: processes of this machine, or a Ray cluster
LOCAL, RAY = "local", "ray"
DEFAULT_ALGOS = ("ppo_penalty", "ppo_clip", "ppo", "trpo")
#: (seeds, steps) of a first look, within five minutes on two cores, and of a study that can be quoted. RL Zoo's entries for
#: Pendulum-v1 were tuned for 100,000 steps; in much shorter runs their learning rate falls too fast. With fewer than ten seeds
#: bootstrap intervals are too narrow (Agarwal et al. 2021)
FIRST_LOOK, FULL = (2, 80_000), (10, 100_000)
#: Number of evaluations during training
EVALUATIONS = 20
PROGRAM = "python -m sb3_ppo_penalty compare"
#: Matches the name of an algorithm or of a variant
ALGORITHM_PATTERN = rf"(?:{'|'.join(ALGORITHMS)})(?:\+[\w.-]+)?"
EPILOG = f"""\
settings:
  ppo_penalty, ppo_clip and ppo_penalty_lstm take this package's entry for the environment, ppo, trpo and ppo_lstm RL Zoo's.
  Other entries: --conf-file, in RL Zoo's YAML format, or field_protocol, which has those of published MuJoCo results
  (--n-timesteps 999424).
  Single values: --hyperparams, as Python literals (1e-3, True) or as RL Zoo's strings (lin_0.001, "dict(covariance=0.3)").
  Both take an algorithm's name in front, or hold for all of them.

variants:
  One algorithm with several settings, each under a name of its own:
  --algos ppo_penalty ppo_penalty+dual --hyperparams ppo_penalty+dual:kl_controller=dual

how much:
  The plain command is a first look: {FIRST_LOOK[0]} seeds, {FIRST_LOOK[1]:,} steps, so that it ends within five minutes on two
  cores. So few seeds say little about the spread, and fewer than three get no intervals: what one may quote is
  --full, {FULL[0]} seeds of {FULL[1]:,} steps, about half an hour on two cores.

what comes out:
  --out gets report.md, results.csv, the plots, and a folder for each finished run. The same command again, after it was
  ended in any way, performs only what is missing. A run counts as done only if all that decides its result is the same:
  settings, seed, steps, evaluation, versions of the packages. Where this package's source differs from the one that made a
  finished run, a warning says so. One comparison at a time in a folder.
"""


def build_parser() -> argparse.ArgumentParser:
    """
    Build the parser of the command's arguments.

    :return: the parser
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train algorithms side by side over seeds, evaluate them on the same starts, and write a report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--env", default="Pendulum-v1", metavar="ID", help="environment (default: %(default)s)")
    names = f"any of {' '.join(ALGORITHMS)} (default: {' '.join(DEFAULT_ALGOS)}), also with a +NAME of your own"
    add("--algos", nargs="+", default=list(DEFAULT_ALGOS), type=_algorithm, metavar="ALGO", help=names)
    add("--full", action="store_true", help=f"{FULL[0]} seeds of {FULL[1]:,} steps, unless --seeds or --n-timesteps is given")
    add("--seeds", type=_positive, metavar="N", help=f"number of seeds (default: {FIRST_LOOK[0]})")
    add("--first-seed", type=int, default=0, metavar="S", help="the seeds are S, S+1, ... (default: %(default)s)")
    add("--n-timesteps", type=_positive, metavar="N", help=f"environment steps of a run (default: {FIRST_LOOK[1]})")
    jobs = "runs at a time, a core each; -1: as many as there are cores, here or in the cluster (default)"
    add("--n-jobs", type=_n_jobs, default=-1, metavar="N", help=jobs)
    where = "where the runs are performed: by processes of this machine, or by an existing Ray cluster (RAY_ADDRESS, else the "
    where += "one of this machine; default: %(default)s)"
    add("--backend", default=LOCAL, choices=[LOCAL, RAY], help=where)
    add("--out", metavar="FOLDER", help="default: runs/ and the environment's name, here runs/pendulum")
    add(
        "--conf-file",
        nargs="+",
        default=[],
        metavar="[ALGO:]FILE",
        help="hyperparameters, YAML as in RL Zoo, or field_protocol",
    )
    add("--hyperparams", nargs="+", default=[], metavar="[ALGO:]KEY=VALUE", help="overwrite single hyperparameters")
    same = "every algorithm gets this package's fixed-covariance policy, and all settings that are not its objective's, from "
    same += "the entry of ALGO (%(const)s if not said), so that only the objective differs; ppo_article stays as it is"
    add("--same-policy", nargs="?", const="ppo_clip", choices=TUNED_ALGORITHMS, metavar="ALGO", help=same)
    add("--threshold", type=float, metavar="R", help="return to be reached (default: -200 for Pendulum-v1, else Gymnasium's)")
    add("--eval-freq", type=_positive, metavar="N", help=f"steps between evaluations (default: 1/{EVALUATIONS} of the steps)")
    add("--n-eval-episodes", type=_positive, default=1000, metavar="N", help="in the last evaluation (default: %(default)s)")
    add("--device", default="cpu", help="device of the networks (default: %(default)s)")
    add("--gym-packages", nargs="+", default=[], metavar="MODULE", help="modules that register environments when imported")
    return parser


def _algorithm(text: str) -> str:
    """
    Check that a word names an algorithm or a variant of one.

    :param text: word of the command line
    :return: the same
    """
    if not re.fullmatch(ALGORITHM_PATTERN, text):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(ALGORITHMS)}, or one of them and +NAME, got {text}")
    return text


def _positive(text: str) -> int:
    """
    Read a number of at least 1.

    :param text: word of the command line
    :return: the number
    """
    number = int(float(text))
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _n_jobs(text: str) -> int:
    """
    Read a number of jobs that is not 0; joblib counts negative ones back from all cores.

    :param text: word of the command line
    :return: the number
    """
    if int(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, or -1 for as many as there are cores, got 0")
    return int(text)


def split_by_algo(words: Sequence[str], algos: Sequence[str]) -> list[tuple[str, str]]:
    """
    Split off the algorithm in front of each word; a word without one is for all algorithms.

    :param words: ``ALGO:REST`` or ``REST``
    :param algos: names of the algorithms that are compared
    :return: pairs (algorithm, rest), in order
    :raises ValueError: for an algorithm that is not compared
    """
    pairs: list[tuple[str, str]] = []
    for word in words:
        named = re.fullmatch(rf"({ALGORITHM_PATTERN}):(.+)", word)
        if named and named[1] not in algos:
            raise ValueError(f"{word}: {named[1]} is not among --algos {' '.join(algos)}")
        pairs += [(named[1], named[2])] if named else [(algo, word) for algo in algos]
    return pairs


def read_overrides(words: Sequence[str], algos: Sequence[str]) -> dict[str, dict[str, Any]]:
    """
    Read the hyperparameters that stand on the command line.

    :param words: ``[ALGO:]KEY=VALUE``
    :param algos: names of the algorithms that are compared
    :return: values by hyperparameter, by algorithm
    :raises ValueError: for a word of another form, or for ``n_timesteps``, which has an argument of its own
    """
    from sb3_ppo_penalty.study.grid import parse_value

    overrides: dict[str, dict[str, Any]] = {algo: {} for algo in algos}
    for algo, word in split_by_algo(words, algos):
        key, equals, value = word.partition("=")
        if not (key.isidentifier() and equals and value):
            raise ValueError(
                f"--hyperparams {word}: must be KEY=VALUE, with an algorithm of --algos and a colon in front or not"
            )
        if key == "n_timesteps":
            raise ValueError(f"--hyperparams {word}: all runs are equally long, see --n-timesteps")
        overrides[algo][key] = parse_value(value)
    return overrides


def build_task(arguments: argparse.Namespace) -> "Task":
    """
    Build what all runs have in common from the command line.

    :param arguments: parsed arguments, in which numbers of seeds and steps are filled in
    :return: the task
    :raises ValueError: for an environment that is not registered, or evaluations that lie further apart than a run is long
    """
    import gymnasium as gym

    from sb3_ppo_penalty.study.grid import Task, prepare

    prepare(arguments.gym_packages)
    if arguments.env not in gym.registry:
        raise ValueError(
            f"--env {arguments.env}: not registered; with --gym-packages the modules that register it can be named"
        )
    every = arguments.eval_freq or max(arguments.n_timesteps // EVALUATIONS, 1)
    if every > arguments.n_timesteps:
        raise ValueError(f"--eval-freq {every}: a run has only {arguments.n_timesteps} steps")
    packages = tuple(arguments.gym_packages)
    return Task(arguments.env, arguments.n_timesteps, every, arguments.n_eval_episodes, arguments.device, packages)


def build_comparison(arguments: argparse.Namespace, command: str) -> "Comparison":
    """
    Build the comparison that the command line describes.

    :param arguments: parsed arguments
    :param command: the command, for the report
    :return: the comparison
    :raises ValueError: for arguments that contradict each other or cannot be read
    """
    from pathlib import Path

    import gymnasium as gym

    from sb3_ppo_penalty.study import grid
    from sb3_ppo_penalty.study.references import THRESHOLDS

    preset = FULL if arguments.full else FIRST_LOOK
    arguments.seeds, arguments.n_timesteps = arguments.seeds or preset[0], arguments.n_timesteps or preset[1]
    algos = list(dict.fromkeys(arguments.algos))
    task = build_task(arguments)
    donor = arguments.same_policy
    conf_files = dict(split_by_algo(arguments.conf_file, [*algos, *([donor] if donor else [])]))
    overrides = read_overrides(arguments.hyperparams, algos)
    settings = grid.resolve_settings(algos, task, conf_files, overrides, donor)
    name = arguments.env.split("/")[-1].rpartition("-v")[0].lower() or arguments.env.lower()
    out = Path(arguments.out or f"runs/{name}{'-same-policy' if donor else ''}")
    threshold = arguments.threshold
    if threshold is None:
        threshold = THRESHOLDS.get(arguments.env, gym.spec(arguments.env).reward_threshold)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    return grid.Comparison(grid.plan_runs(settings, task, seeds), task, settings, out, threshold, donor, command)


def load_backend(name: str) -> "Backend":
    """
    Import the backend that performs the runs.

    :param name: :data:`LOCAL` or :data:`RAY`
    :return: its function that performs runs
    """
    # Imported here, because Ray is optional and takes a second to import
    if name == RAY:
        from sb3_ppo_penalty.study import ray_backend

        return ray_backend.perform_all
    from sb3_ppo_penalty.study import joblib_backend

    return joblib_backend.perform_all


def compare(comparison: "Comparison", n_jobs: int, backend: str = LOCAL) -> int:
    """
    Perform the runs that are missing, then report on all finished ones.

    :param comparison: the comparison to perform or to finish
    :param n_jobs: number of runs at a time, -1 for as many as there are cores
    :param backend: :data:`LOCAL` or :data:`RAY`
    :return: exit code: 1 if a run failed, else 0
    """
    from sb3_ppo_penalty.study.execution import execute
    from sb3_ppo_penalty.study.report import caveats, source_warning, table, write
    from sb3_ppo_penalty.study.results import read, sources

    before = sources(comparison.runs, comparison.out)
    say(f"{len(comparison.runs)} runs, {len(before)} of them finished before, in {comparison.out}")
    warning = source_warning(before)
    # Where nothing is left to perform, the report's warnings come at once
    if warning and len(before) < len(comparison.runs):
        say(f"Warning: {warning}")
    errors = execute(comparison.runs, comparison.out, n_jobs, load_backend(backend))
    results = read(comparison.runs, comparison.out, comparison.threshold)
    if results.algos:
        write(comparison, results, errors)
        warnings = [f"Warning: {text}\n" for text in caveats(results)]
        say("\n".join(["", table(comparison, results), *warnings]))
        say(f"{comparison.out / 'report.md'} has the plots and says how to read this.")
    if errors:
        say(f"{len(errors)} of {len(comparison.runs)} runs failed: {', '.join(errors)}. The same command tries them again.")
    return 1 if errors else 0


def say(text: str) -> None:
    """
    Print a message at once.

    :param text: the message
    """
    print(text, flush=True)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    :param argv: words of the command line, without the command's name; default: this process's
    :return: exit code: 0 if every run finished, 1 if one failed, 2 for wrong arguments, 130 if ended from the keyboard
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments = parser.parse_args(words)
    missing = [name for name in (*zoo.REQUIRED, *REQUIRED) if find_spec(name) is None]
    if missing:
        parser.exit(1, f"{zoo.MissingExtraError('compare', *missing)}\n")
    if arguments.backend == RAY and find_spec("ray") is None:
        parser.exit(1, f"{zoo.MissingExtraError('compare --backend ray', 'ray', extra='ray')}\n")
    try:
        comparison = build_comparison(arguments, shlex.join([*PROGRAM.split(), *words]))
    except ValueError as error:
        parser.error(str(error))
    # Imported here, because it imports modules that may be missing
    from sb3_ppo_penalty.study.execution import BackendError

    try:
        return compare(comparison, arguments.n_jobs, arguments.backend)
    except BackendError as error:
        parser.exit(1, f"{PROGRAM} --backend {arguments.backend}: {error}\n")
    except KeyboardInterrupt:
        say("\nEnded. What is finished is kept; the same command goes on from here.")
        return 130
