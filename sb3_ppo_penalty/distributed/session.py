"""Open and close the process group of a training on several ranks."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module

import torch as th
import torch.distributed as dist

from sb3_ppo_penalty.arguments import require_number
from sb3_ppo_penalty.distributed.team import Team
from sb3_ppo_penalty.updates.ranks import ALONE, RankError, Ranks, current, set_current

#: torch's own for gloo, in seconds
DEFAULT_TIMEOUT = 1800.0


def _asked_for() -> bool:
    """Tell whether a launcher has told this process that it is one of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def session(timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """
    Train on all processes that ``torchrun``, or any launcher that sets the same variables, has started.

    Models that are made inside are trained by all ranks together: each must make the same model and call the same ``learn``.
    Tensors on the CPU travel by gloo, on a GPU by nccl; a rank takes the GPU that ``LOCAL_RANK`` names. A process group that
    there is already is joined as it is, and outlives the session. In a process that was started by itself nothing is
    initialised, and models are trained as ever::

        with sb3_ppo_penalty.distributed.session() as ranks:
            model = PPOPenalty("MlpPolicy", "Pendulum-v1", seed=0)
            model.learn(100_000)
            if ranks.is_main_process:
                model.save("pendulum")

    ``n_steps``, ``batch_size`` and the environments are each rank's own. The k-th minibatch of an epoch is that of all ranks'
    k-th together, in which every transition counts the same: R ranks with ``batch_size`` B/R do what one process with B does.
    A rank with fewer transitions cuts them into as many minibatches as the rank with most. ``num_timesteps`` and
    ``total_timesteps`` count the steps of all ranks. Rank 0 alone logs.

    :param timeout: how long a rank waits for the others before it fails, in seconds. They wait for the slowest at the end of
        every rollout, also while rank 0 evaluates or a rank compiles
    :return: which of the processes this is
    :raises ValueError: for a timeout that is not above 0
    :raises RankError: if the ranks do not find each other in time
    """
    require_number("timeout", timeout, 0, open_below=True)
    if not _asked_for():
        yield ALONE
        return
    own, before = not dist.is_initialized(), current()
    _import_dynamo()
    if own:
        _initialise(timeout)
    try:
        set_current(Team(dist.get_rank(), dist.get_world_size()))
        yield current()
    finally:
        set_current(before)
        if own:
            # Also after an error: the others learn at once that nobody will answer
            dist.destroy_process_group()
            # A cycle of references that holds the group would hold its threads as well
            gc.collect()


def _import_dynamo() -> None:
    """
    Import torch._dynamo as if there were no process group yet.

    Making an optimizer imports it, and with it ``torch.distributed.nn``, whose functions take the process group of that
    moment as a default argument. They would keep the group and gloo's threads beyond ``destroy_process_group``, and a thread
    that releases a tensor while the interpreter ends aborts the process.
    """
    group, dist.group.WORLD = dist.group.WORLD, None
    try:
        import_module("torch._dynamo")
    finally:
        dist.group.WORLD = group


def _initialise(timeout: float) -> None:
    """
    Start torch's process group.

    :param timeout: in seconds
    :raises RankError: if the ranks do not find each other in time
    """
    backend = "gloo"
    if th.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        th.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % th.cuda.device_count())
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        raise RankError(f"the ranks did not find each other within {timeout:g} s: {error}") from error
