"""What ranks exchange about their rollouts: steps, episodes, and the running statistics of ``VecNormalize``."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_ppo_penalty.updates.ranks import Ranks

#: Settings of ``VecNormalize`` that decide what policy and critic see
NORMALIZATION = ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")


class RolloutReport(NamedTuple):
    """
    What a rank tells the others about its rollout.

    :param steps: of its environments
    :param goes_on: whether no callback ended training
    :param episodes: episodes that ended, each with the number of the step
    :param successes: whether they succeeded, each with the number of the step
    :param statistics: of ``VecNormalize``, by name
    """

    steps: int
    goes_on: bool
    episodes: list[tuple[int, dict[str, Any]]]
    successes: list[tuple[int, Any]]
    statistics: dict[str, RunningMeanStd]


class StepCounter(BaseCallback):
    """
    Count the steps of all ranks and record finished episodes; runs before the user's callbacks.

    :param others: number of the other ranks' environments
    """

    def __init__(self, others: int) -> None:
        super().__init__()
        self.others = others
        self.episodes: list[tuple[int, dict[str, Any]]] = []
        self.successes: list[tuple[int, Any]] = []

    def _on_step(self) -> bool:
        """Count a step, and go on."""
        self.model.num_timesteps += self.others
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            if "episode" in info:
                self.episodes.append((self.n_calls, info["episode"]))
            if done and "is_success" in info:
                self.successes.append((self.n_calls, info["is_success"]))
        return True


def collect_together(
    ranks: Ranks, model: OnPolicyAlgorithm, callback: BaseCallback, collect: Callable[[BaseCallback], bool]
) -> bool:
    """
    Let each rank collect by itself, then bring together what they saw, also where a callback has ended training.

    :param ranks: that train the model
    :param model: being trained
    :param callback: of ``learn``
    :param collect: collects this rank's rollout, with a callback
    :return: False if a callback ended training, on whichever rank
    """
    counter = StepCounter(int(ranks.total([model.n_envs])[0]) - model.n_envs)
    both = CallbackList([counter, callback])
    counter.model = both.model = model
    episodes, successes = deepcopy((model.ep_info_buffer, model.ep_success_buffer))
    steps, statistics = model.num_timesteps, deepcopy(statistics_of(model))
    goes_on = collect(both)
    own = counter.n_calls * model.n_envs
    reports = ranks.gathered(RolloutReport(own, goes_on, counter.episodes, counter.successes, statistics_of(model)))
    # As counted, where it was estimated on the way: the others may have collected more, or fewer
    model.num_timesteps = steps + sum(report.steps for report in reports)
    for recent, name in ((episodes, "episodes"), (successes, "successes")):
        assert recent is not None
        # In the order of time, as one process with all the environments would have seen them
        ended = sorted((each for report in reports for each in getattr(report, name)), key=lambda each: each[0])
        recent.extend(what for _, what in ended)
    model.ep_info_buffer, model.ep_success_buffer = episodes, successes
    for name, live in statistics_of(model).items():
        merge_statistics(live, statistics[name], [report.statistics[name] for report in reports])
    return all(report.goes_on for report in reports)


def normalizers(model: OnPolicyAlgorithm) -> Iterator[VecNormalize]:
    """
    Find every ``VecNormalize`` around the training environments, from the outside in.

    :param model: to be trained
    :return: none, one or, where one normalises what another has stacked, several
    """
    env = model.env
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            yield env
        env = env.venv


def normalization_of(model: OnPolicyAlgorithm) -> list[dict[str, Any]] | None:
    """
    Describe how observations and rewards are normalised, which has to be the same on all ranks.

    :param model: to be trained
    :return: settings and normalised keys of each ``VecNormalize``; None if there is none
    """
    return [
        {**{name: vars(env)[name] for name in NORMALIZATION}, "statistics": sorted(_statistics_of_one(env))}
        for env in normalizers(model)
    ] or None


def _statistics_of_one(env: VecNormalize) -> dict[str, RunningMeanStd]:
    """
    Name the running means and variances of one ``VecNormalize``.

    :param env: which has no statistics of observations if it was made with ``norm_obs=False``
    :return: those of returns and those of observations, by key if they are dicts
    """
    # The attribute of this wrapper: `getattr` would find one further in
    seen = vars(env).get("obs_rms", {})
    observations = seen if isinstance(seen, dict) else {"": seen}
    return {"returns": env.ret_rms, **{f"observations {key}": each for key, each in observations.items()}}


def statistics_of(model: OnPolicyAlgorithm) -> dict[str, RunningMeanStd]:
    """
    Name the running means and variances of every ``VecNormalize``.

    :param model: with or without ``VecNormalize``
    :return: by place of the wrapper, and name
    """
    layers = enumerate(normalizers(model))
    return {f"{place} {name}": each for place, env in layers for name, each in _statistics_of_one(env).items()}


def merge_statistics(live: RunningMeanStd, before: RunningMeanStd, after: list[RunningMeanStd]) -> None:
    """
    Merge running statistics as if one process had seen all data.

    :param live: is changed, unless nobody saw anything: rounding would move statistics that are not in training
    :param before: the rollout, the same on all ranks
    :param after: the rollout, of every rank
    """
    if all(each.count == before.count for each in after):
        return
    count = sum(each.count for each in after) - (len(after) - 1) * before.count
    # Moments about the old mean add up; the old ones are in every rank's
    first = sum(each.count * (each.mean - before.mean) for each in after)
    second = sum(each.count * (each.var + (each.mean - before.mean) ** 2) for each in after)
    second = second - (len(after) - 1) * before.count * before.var
    live.mean = before.mean + first / count
    live.var = second / count - (first / count) ** 2
    live.count = count
