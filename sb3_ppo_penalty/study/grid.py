"""The runs of a comparison: the settings of each algorithm, where these come from, and what identifies a run."""

import ast
import hashlib
import importlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import gymnasium as gym
import rl_zoo3
import yaml  # type: ignore[import-untyped]
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager

import sb3_ppo_penalty
from sb3_ppo_penalty import ARTICLE_RECIPE, zoo
from sb3_ppo_penalty.study.algorithms import ALGORITHMS, ARTICLE, TUNED_ALGORITHMS, base_algorithm
from sb3_ppo_penalty.study.references import OPTIMA

#: Batch of the tutorial that the article follows; enlarged to whole episodes
ARTICLE_BATCH = 2048
#: Hyperparameters of the policy's objective; all others concern the policy, the critic or the optimizer
OBJECTIVE_SETTINGS = {
    *("clip_range", "target_kl", "kl_coef", "kl_min", "kl_max", "kl_coef_factor", "kl_coef_bounds"),
    *("kl_controller", "kl_penalty", "max_ratio", "guard"),
    *("cg_max_steps", "cg_damping", "line_search_shrinking_factor", "line_search_max_iter"),
    *("n_critic_updates", "sub_sampling_factor"),
}
#: Seed of the first evaluation episode; the k-th has this plus k. Far from the seeds of the training environments. On
#: Pendulum-v1 the best possible mean return over the first 50 of these starts, and over the first 1,000, is within 0.3 of that
#: over all starts (dynamic programming), so that a gap to the optimum is not due to the choice of starts
EVALUATION_SEED = 1_036_000
#: Number of parallel environments of an evaluation, and of episodes of each evaluation during training
EVALUATION_ENVS = 50
#: Packages whose versions decide a result, where they are installed
RECORDED_PACKAGES = (
    *("sb3-ppo-penalty", "stable-baselines3", "sb3-contrib", "rl_zoo3", "gymnasium", "torch", "numpy"),
    *("mujoco", "box2d", "ale-py"),
)


@dataclass(frozen=True)
class AlgorithmSettings:
    """
    The hyperparameters of one algorithm and where they come from.

    :param hyperparams: hyperparameters in the form of RL Zoo's files: strings such as ``lin_0.001`` are not evaluated
    :param source: where they come from, in words, for the report
    """

    hyperparams: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Task:
    """
    What all runs of a comparison have in common.

    :param env: id of the environment
    :param n_timesteps: environment steps of training; a run ends with the rollout that reaches them
    :param eval_freq: environment steps between two evaluations during training
    :param n_eval_episodes: episodes of the evaluation after training
    :param device: device of the networks
    :param gym_packages: modules that register environments when imported
    """

    env: str
    n_timesteps: int
    eval_freq: int
    n_eval_episodes: int
    device: str
    gym_packages: tuple[str, ...]

    @property
    def last_eval(self) -> int:
        """Environment steps at which the last evaluation during training is due."""
        return self.n_timesteps // self.eval_freq * self.eval_freq


@dataclass(frozen=True)
class Run:
    """
    One training run, with everything that decides its result.

    The package's source code is not part of it, because an edit would then make every finished run count as missing. It is
    recorded beside the result instead: see :func:`source_digest`.

    :param algo: name in :data:`~.ALGORITHMS`, or of a variant
    :param seed: seed of the networks and the actions; a training environment's seed is this plus its number
    :param hyperparams: hyperparameters in the form of RL Zoo's files
    :param task: what all runs have in common
    :param versions: version by package, of those that decide the result
    """

    algo: str
    seed: int
    hyperparams: dict[str, Any]
    task: Task
    versions: dict[str, str]

    @cached_property
    def settings(self) -> str:
        """All settings of the run and of its evaluation, as JSON with sorted keys."""
        evaluation = {"starts_seed": EVALUATION_SEED, "n_envs": EVALUATION_ENVS}
        return json.dumps({**asdict(self), "evaluation": evaluation}, default=str, sort_keys=True, indent=1)

    @cached_property
    def name(self) -> str:
        """Name of the run's folder; it ends with a hash of everything that decides the result."""
        return f"{self.algo}-seed{self.seed}-{hashlib.sha256(self.settings.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Comparison:
    """
    A comparison: its runs, what they have in common, and how to report on them.

    :param runs: all runs, finished or not
    :param task: what all runs have in common
    :param settings: settings by algorithm
    :param out: folder of the comparison
    :param threshold: return to be reached, None for none
    :param donor: the algorithm whose settings all others share, None if each has its own
    :param command: the command that makes it again
    """

    runs: list[Run]
    task: Task
    settings: dict[str, AlgorithmSettings]
    out: Path
    threshold: float | None
    donor: str | None
    command: str

    @property
    def optimum(self) -> float | None:
        """Best possible mean return, None where it is not known."""
        return OPTIMA.get(self.task.env)


def installed_versions(gym_packages: Sequence[str] = ()) -> dict[str, str]:
    """
    Look up the versions of the packages that decide a result.

    :param gym_packages: modules that register environments; the packages that they belong to count as well
    :return: version by package, without packages that are not installed
    """
    providers = packages_distributions() if gym_packages else {}
    named = [name for module in gym_packages for name in providers.get(module.partition(".")[0], [])]
    found = {}
    for package in (*RECORDED_PACKAGES, *named):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def source_digest() -> str:
    """
    Hash this package's source code, to tell states apart that have the same version.

    Computed once, so that it stays the hash of what this process has imported when files are edited while it runs.

    :return: ten hexadecimal digits, over the names and contents of all Python files of the package
    """
    root, digest = Path(sb3_ppo_penalty.__file__).parent, hashlib.sha256()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        digest.update(f"{name}\0{hashlib.sha256((root / name).read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()[:10]


def prepare(gym_packages: Iterable[str]) -> None:
    """
    Register this package's algorithms in RL Zoo, and environments in Gymnasium, in this process.

    :param gym_packages: modules that register environments when imported
    """
    zoo.register()
    for package in gym_packages:
        importlib.import_module(package)


def closest_entry(entries: Mapping[str, Any], env: str) -> str:
    """
    Choose the entry of a hyperparameter file that fits an environment best.

    Its own, else that of another version of it, the newest first, else RL Zoo's ``atari`` or ``default``. RL Zoo itself does
    not look for other versions and would give ``HalfCheetah-v5`` untuned defaults where ``HalfCheetah-v4`` is tuned.

    :param entries: entries of the file by environment
    :param env: id of the environment
    :return: the entry's key
    :raises ValueError: if no entry fits
    """
    family = env.rpartition("-v")[0]
    versions = {
        key: int(key.rpartition("-v")[2]) for key in entries if family and key.startswith(f"{family}-v") and key[-1].isdigit()
    }
    wanted = [env, *sorted(versions, key=lambda key: versions[key], reverse=True)]
    wanted += ["atari"] * ExperimentManager.is_atari(env) + ["default"]
    for key in wanted:
        if key in entries:
            return key
    raise ValueError(f"has an entry neither for {env} nor `default`")


def zoo_settings(algo: str, env: str, conf_file: str | None) -> AlgorithmSettings:
    """
    Read an algorithm's settings from a hyperparameter file.

    :param algo: name of the algorithm
    :param env: id of the environment
    :param conf_file: YAML file in RL Zoo's format, or ``field_protocol``; None for this package's own file or RL Zoo's
    :return: the entry that fits best, see :func:`closest_entry`
    :raises ValueError: if the file cannot be read or no entry fits
    """
    own = base_algorithm(algo) in TUNED_ALGORITHMS
    path = (zoo.HYPERPARAMS if own else Path(rl_zoo3.__file__).parent / "hyperparams") / f"{base_algorithm(algo)}.yml"
    said = f"{'sb3_ppo_penalty.zoo' if own else 'rl_zoo3'}'s {path.name}"
    if conf_file is not None:
        path, said = Path(zoo.entries_file(conf_file, base_algorithm(algo))), conf_file
    try:
        entries = yaml.safe_load(path.read_text())
        key = closest_entry(entries, env)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"`--conf-file` for {algo}: {said}: {error}") from error
    return AlgorithmSettings(dict(entries[key]), f"entry `{key}` of {said}")


def article_settings(env: str) -> AlgorithmSettings:
    """
    Return the article's recipe for an environment.

    Its batch is enlarged to whole episodes where episodes have a fixed length.

    :param env: id of the environment
    :return: the recipe in the form of RL Zoo's entries
    """
    length = gym.spec(env).max_episode_steps or 1
    batch = -(-ARTICLE_BATCH // length) * length
    recipe = {**ARTICLE_RECIPE, "policy": "MlpPolicy", "n_envs": 1, "n_steps": batch, "batch_size": batch}
    one = gym.make(env)
    if not isinstance(one.action_space, spaces.Box):
        recipe["policy_kwargs"] = {key: value for key, value in recipe["policy_kwargs"].items() if key != "covariance"}
    one.close()
    return AlgorithmSettings(recipe, "sb3_ppo_penalty.ARTICLE_RECIPE")


def constructor_arguments(algo: str) -> set[str]:
    """
    List the arguments that an algorithm's class takes.

    :param algo: name of the algorithm
    :return: names of the arguments
    """
    return set(inspect.signature(rl_zoo3.ALGOS[ALGORITHMS[base_algorithm(algo)].zoo_name]).parameters)


def with_same_policy(algo: str, own: AlgorithmSettings, donor: str, shared: AlgorithmSettings) -> AlgorithmSettings:
    """
    Take all settings from a shared entry, except those of the algorithm's own objective.

    The policy is this package's. An algorithm with the same objective as the donor takes that from the shared entry, too.
    Settings for which an algorithm has no argument (TRPO has no ``n_epochs``) are left out.

    :param algo: name of the algorithm
    :param own: settings of the algorithm's own entry
    :param donor: name of the algorithm whose entry is shared
    :param shared: settings of the donor's entry
    :return: the settings to run the algorithm with
    """
    hyperparams, source = dict(shared.hyperparams), shared.source
    if ALGORITHMS[base_algorithm(algo)].objective != ALGORITHMS[donor].objective:
        hyperparams = {key: value for key, value in hyperparams.items() if key not in OBJECTIVE_SETTINGS}
        hyperparams |= {key: value for key, value in own.hyperparams.items() if key in OBJECTIVE_SETTINGS}
        source = f"{source}; its objective's own: {own.source}"
    foreign = set().union(*map(constructor_arguments, ALGORITHMS)) - constructor_arguments(algo)
    hyperparams = {key: value for key, value in hyperparams.items() if key not in foreign}
    if "." not in hyperparams["policy"]:
        hyperparams["policy"] = f"{sb3_ppo_penalty.__name__}.{hyperparams['policy']}"
    return AlgorithmSettings(hyperparams, source)


def resolve_settings(
    algos: Iterable[str],
    task: Task,
    conf_files: Mapping[str, str],
    overrides: Mapping[str, Mapping[str, Any]],
    donor: str | None,
) -> dict[str, AlgorithmSettings]:
    """
    Find the settings of each algorithm: file entries, shared settings, and overrides of the command line.

    :param algos: names of the algorithms or of variants
    :param task: what all runs have in common
    :param conf_files: YAML file by algorithm, where it is not the default one
    :param overrides: hyperparameters of the command line, by algorithm
    :param donor: the algorithm whose entry all share under ``--same-policy``; None for each its own
    :return: settings by algorithm
    :raises ValueError: if an algorithm's file cannot be read or has no entry that fits, or one has a memory and the donor none
    """
    settings = {}
    for algo in algos:
        if donor is not None and ALGORITHMS[base_algorithm(algo)].recurrent != ALGORITHMS[donor].recurrent:
            raise ValueError(f"--same-policy {donor}: {algo} cannot have its policy, since only one of them has a memory")
        if base_algorithm(algo) == ARTICLE:
            found = article_settings(task.env)
        else:
            found = zoo_settings(algo, task.env, conf_files.get(algo))
            if donor is not None:
                found = with_same_policy(algo, found, donor, zoo_settings(donor, task.env, conf_files.get(donor)))
        own = overrides.get(algo, {})
        said = f"{found.source}; from the command line: {', '.join(own)}" if own else found.source
        settings[algo] = AlgorithmSettings({**found.hyperparams, "n_timesteps": task.n_timesteps, **own}, said)
    return settings


def parse_value(text: str) -> Any:
    """
    Read a value of the command line as a Python literal, or keep its text.

    :param text: word of the command line
    :return: ``1e-3`` as a number; text that is no literal, such as ``lin_0.001``, is left to RL Zoo
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def plan_runs(settings: Mapping[str, AlgorithmSettings], task: Task, seeds: Iterable[int]) -> list[Run]:
    """
    List the runs of a comparison seed by seed, so that a study that is ended early has as many of each algorithm.

    :param settings: settings by algorithm
    :param task: what all runs have in common
    :param seeds: seeds, the same for every algorithm
    :return: the runs
    """
    versions = installed_versions(task.gym_packages)
    return [Run(algo, seed, given.hyperparams, task, versions) for seed in seeds for algo, given in settings.items()]
