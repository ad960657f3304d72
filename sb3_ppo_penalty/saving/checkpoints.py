"""Write checkpoints from which a killed training resumes bit for bit, find the latest and resume from it."""

import hashlib
import io
import math
import os
import re
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv

from sb3_ppo_penalty.arguments import ArgumentError, require, require_integer
from sb3_ppo_penalty.saving.training_state import RandomStates, VecEnvState, dumps, loads
from sb3_ppo_penalty.updates.ranks import ALONE, Ranks

#: Member of the zip file that holds the pickled ``CheckpointState``, beside SB3's own members
ENTRY = "resume.pkl"
#: The zip file's comment: the checkpoint's number in its folder, twice to be sure, and the SHA-256 of everything before
TRAILER = re.compile(rb"resumable checkpoint (\d{16}) \1 [0-9a-f]{64}")
DIGEST_LENGTH = 64
TRAILER_LENGTH = len("resumable checkpoint ") + 2 * (16 + 1) + DIGEST_LENGTH
#: gSDE's exploration matrices, which SB3 keeps outside the policy's ``state_dict``
NOISE = ("exploration_mat", "exploration_matrices")
#: Where sb3-contrib's recurrent algorithms keep the states of their memory, which no model file holds
MEMORY = "_last_lstm_states"
#: The logger's values that have not been written yet, how many were averaged in each, which outputs leave each out
LOG = ("name_to_value", "name_to_count", "name_to_excluded")


class CheckpointState(NamedTuple):
    """
    The state of a training that SB3's own file does not hold, or that its ``load`` does not bring back.

    :param algorithm: class of the model
    :param attributes: all attributes that SB3 would save except those with tensors, with Python's types kept
    :param n_calls: calls of the callback
    :param elapsed: time since ``learn`` began, in ns
    :param log: the logger's dicts of ``LOG``, by name
    :param random: states of the random generators
    :param noise: gSDE's exploration matrices, by name
    :param collecting: True before the first step of a rollout, False at the end of training
    :param env: state of the training environments
    :param memory: states of a recurrent policy's memory after the last step: the actor's and the critic's; else none
    """

    algorithm: type[OnPolicyAlgorithm]
    attributes: dict[str, Any]
    n_calls: int
    elapsed: int
    log: dict[str, dict[str, Any]]
    random: RandomStates
    noise: dict[str, th.Tensor]
    collecting: bool
    env: VecEnvState
    memory: Sequence[tuple[th.Tensor, ...]] = ()

    @classmethod
    def of(cls, model: OnPolicyAlgorithm, n_calls: int, collecting: bool) -> "CheckpointState":
        """
        Capture the state of a training without changing it.

        :param model: in training, between an update and a rollout
        :param n_calls: calls of the callback
        :param collecting: whether the rollout has begun
        :return: the state
        """
        assert model.env is not None
        states, variables = model._get_torch_save_params()
        tensors = {name.split(".")[0] for name in [*states, *variables]}
        left_out = tensors.union(model._excluded_save_params())
        return cls(
            algorithm=type(model),
            attributes={name: value for name, value in vars(model).items() if name not in left_out},
            n_calls=n_calls,
            elapsed=time.time_ns() - int(model.start_time),
            log={name: dict(getattr(model.logger, name)) for name in LOG},
            random=RandomStates.now(),
            noise={name: getattr(model.policy.action_dist, name).detach().cpu() for name in NOISE if model.use_sde},
            collecting=collecting,
            env=VecEnvState.of(model.env),
            memory=_memory_on(getattr(model, MEMORY, ()), th.device("cpu")),
        )


class Resumed(NamedTuple):
    """
    A training to go on with.

    :param model: the model as it was at the checkpoint, with its environments
    :param remaining_timesteps: steps that its ``learn`` still had to do
    """

    model: OnPolicyAlgorithm
    remaining_timesteps: int


class ResumableCheckpointCallback(BaseCallback):
    """
    Write checkpoints from which a killed training resumes bit for bit.

    For ``PPOPenalty``, ``PPOClip`` and SB3's on-policy algorithms.
    One script starts the training and, run again after a crash, goes on with it::

        checkpoints = ResumableCheckpointCallback(save_freq=10_000, save_path="checkpoints")
        path = latest_checkpoint("checkpoints")
        if path is None:
            model = PPOPenalty("MlpPolicy", env, seed=0)
            model.learn(1_000_000, callback=checkpoints)
        else:
            model, remaining_timesteps = resume(path, env, checkpoints)
            model.learn(remaining_timesteps, callback=checkpoints, reset_num_timesteps=False)

    **When.** As with SB3's ``CheckpointCallback``, a checkpoint is due every ``save_freq`` calls; at each call all
    environments make one step. It is written before the next rollout or at the end of training, never within a rollout.
    Pass the callback to ``learn`` itself or in a list, not inside an ``EventCallback``, which does not tell when rollouts
    begin.

    **What.** ``{name_prefix}_{num_timesteps}_steps.zip`` is a model file of SB3, which ``load`` reads as any other. A further
    entry holds everything else that decides how training goes on: all attributes of the model that SB3 saves, among them
    ``kl_coef`` and the counters; the random generators of Python, numpy and torch; ``VecNormalize``'s statistics and the
    other VecEnv wrappers; the environments with their wrappers, random generators and spaces; gSDE's noise; the states of a
    recurrent policy's memory; the logger's values that have not been written yet; the callback's count of calls. Saving
    changes nothing in the training.

    **How.** The file is written under a temporary name in the same folder, flushed to the disk and renamed: a process that
    is killed leaves the earlier checkpoints and at most a temporary file, which the next training in the folder removes. Its
    last bytes are a SHA-256 of all the others: :func:`latest_checkpoint` skips a damaged file. Only one training at a time
    may write into a folder under one ``name_prefix``.

    **Exact** with the same versions on the same machine, ``DummyVecEnv`` and environments whose Python attributes are their
    state and can be pickled: Gymnasium's classic control, toy text and MuJoCo. An environment whose state lies elsewhere, for
    example in a simulator behind a handle, may define ``__getstate__`` and ``__setstate__``, which are then called on the
    environment in place. Objects that environments share with a callback or a global are restored as copies, and classes
    that a script itself defines are looked for in the script that resumes.

    **Exact with** ``SubprocVecEnv`` too if every environment is wrapped in :class:`~.ResumableEnv`. Without that wrapper SB3
    gives no safe access to an environment in another process: ``get_attr("__dict__")`` ends the process if anything in the
    environment cannot be pickled, and loses the state of MuJoCo environments, which are pickled as their constructor's
    arguments.

    **Not exact**, after a warning at the first checkpoint, if the environments cannot be pickled (Box2D's cannot): all else
    is restored, and the environments are reset with new seeds, which follow from the restored generators. The log's
    ``time/iterations`` and ``log_interval`` count from the start of each ``learn``, as always in SB3; other callbacks start
    with their counts at 0.

    .. warning::

        The file holds pickles, as SB3's own do, and :func:`resume` and ``load`` run the code in them: load only files that
        you trust. The checksum shows damage, not tampering.

    :param save_freq: number of calls between two checkpoints
    :param save_path: folder of the checkpoints; it is created if missing
    :param name_prefix: beginning of the file names
    :param keep: how many of the latest checkpoints stay in the folder; None for all
    :raises ValueError: naming the argument that has a wrong value
    """

    def __init__(self, save_freq: int, save_path: str | Path, name_prefix: str = "rl_model", keep: int | None = 3) -> None:
        super().__init__()
        require_integer("save_freq", save_freq, 1)
        require(Path(name_prefix).name == name_prefix, "name_prefix", name_prefix, "the beginning of a file name")
        if keep is not None:
            require_integer("keep", keep, 1)
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self.name_prefix = name_prefix
        self.keep = keep
        self._due = False
        self._collecting = False
        self._resumed: CheckpointState | None = None
        self._written: list[Path] = []
        self._number = 0

    def _init_callback(self) -> None:
        """Create the folder, remove temporary files and list the checkpoints that are there."""
        allowed = "an on-policy algorithm: a replay buffer would not be saved"
        require(isinstance(self.model, OnPolicyAlgorithm), "model", type(self.model), allowed)
        self.save_path.mkdir(parents=True, exist_ok=True)
        for path in _files(self.save_path, r"\.", self.name_prefix, r"\.\d+\.tmp"):
            path.unlink()
        self._written = [*complete_checkpoints(self.save_path, self.name_prefix)][::-1]
        self._number = int(_number(self._written[-1])) if self._written else 0

    def _on_training_start(self) -> None:
        """Restore what ``learn`` has just reset: the clock, the first step's number and the log."""
        require(self.parent is None, "callback", self.parent, "outside an EventCallback")
        if self._resumed is None:
            return
        state = self._resumed
        same = self.model.num_timesteps == state.attributes["num_timesteps"]
        require(same, "reset_num_timesteps", True, "False in the `learn` of the model that `resume` returned")
        # As if the time in between had not passed, for the log's frames per second
        self.model.start_time = time.time_ns() - state.elapsed
        self.model._num_timesteps_at_start = state.attributes["_num_timesteps_at_start"]
        for name, values in state.log.items():
            getattr(self.logger, name).update(values)
        if not state.collecting:
            state.random.restore()
            self._resumed = None

    def _on_rollout_start(self) -> None:
        """Restore gSDE's noise and the random generators after a resumption; write the checkpoint if one is due."""
        self._collecting = True
        if self._resumed is not None:
            # Only now: SB3 has drawn new gSDE noise since, and other callbacks may have drawn what they did the first time
            for name, matrices in self._resumed.noise.items():
                setattr(self.model.policy.action_dist, name, matrices.to(self.model.device))
            self._resumed.random.restore()
            self._resumed = None
        if self._due:
            self._save()

    def _on_step(self) -> bool:
        """Note whether a checkpoint is due; training always goes on."""
        self._due = self._due or self.n_calls % self.save_freq == 0
        return True

    def _on_rollout_end(self) -> None:
        self._collecting = False

    def _on_training_end(self) -> None:
        """Write the checkpoint if one is due, unless another callback has stopped the training within a rollout."""
        if self._due and not self._collecting:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint and remove the oldest ones beyond ``keep``."""
        self._due = False
        self._number += 1
        assert isinstance(self.model, OnPolicyAlgorithm)
        path = self.save_path / f"{self.name_prefix}_{self.model.num_timesteps}_steps.zip"
        state = CheckpointState.of(self.model, self.n_calls, self._collecting)
        _write_atomically(path, _content_of(self.model, state, self._number))
        self._written = [*(each for each in self._written if each != path), path]
        while self.keep is not None and len(self._written) > self.keep:
            self._written.pop(0).unlink(missing_ok=True)

    def _continue(self, state: CheckpointState) -> None:
        """Make the next ``learn`` go on with the training of that state."""
        self.n_calls = state.n_calls
        self._due = False
        self._resumed = state


def latest_checkpoint(folder: str | Path, name_prefix: str | None = None, ranks: Ranks = ALONE) -> Path | None:
    """
    Find the checkpoint to resume from.

    No checkpoint is loaded: files are read and their checksums compared.

    :param folder: ``save_path`` of :class:`ResumableCheckpointCallback`
    :param name_prefix: beginning of the file names; default: that of a single process, or ``ranks.name_prefix``
    :param ranks: the processes that train together, each of which writes its own checkpoints; called by all of them
    :return: the latest complete checkpoint of which every rank has its own, None if there is none; a damaged file is skipped
        with a warning
    """
    prefix = ranks.name_prefix if name_prefix is None else name_prefix
    if ranks.size == 1:
        return next(complete_checkpoints(folder, prefix), None)
    paths = {path.name.removeprefix(prefix): path for path in complete_checkpoints(folder, prefix)}
    found = ranks.gathered(list(paths))
    # Rank 0's order: the latest first
    common = [moment for moment in found[0] if all(moment in each for each in found)]
    return paths[common[0]] if common else None


def complete_checkpoints(folder: str | Path, name_prefix: str = "rl_model") -> Iterator[Path]:
    """
    Find the checkpoints to choose from, the latest first.

    :param folder: ``save_path`` of :class:`ResumableCheckpointCallback`; may be missing
    :param name_prefix: beginning of the file names
    :return: the complete checkpoints; a damaged file is skipped with a warning
    """
    for _, path in sorted(((_number(path), path) for path in _files(Path(folder), "", name_prefix, "")), reverse=True):
        if _is_complete(path.read_bytes()):
            yield path
        else:
            warnings.warn(f"{path} is torn, or no checkpoint of ResumableCheckpointCallback: it is skipped", stacklevel=3)


def resume(
    path: str | Path | None, env: GymEnv | str, callback: ResumableCheckpointCallback, device: th.device | str = "auto"
) -> Resumed:
    """
    Resume a training from a checkpoint of :class:`ResumableCheckpointCallback`, which says what is exact.

    ``learn(remaining_timesteps, callback=callback, reset_num_timesteps=False)`` then does what the killed ``learn`` still had
    to do, with the same schedules. Another number of steps ends them elsewhere, as it does in SB3.

    :param path: the checkpoint, as :func:`latest_checkpoint` returns it; it is unpickled: load only files that you trust
    :param env: made and wrapped as the first time; its state, including VecNormalize's statistics, is restored
    :param callback: made as the first time; pass it to ``learn``, where it restores what ``learn`` resets
    :param device: as for SB3's ``load``
    :return: the model and the number of steps that its ``learn`` still had to do
    :raises ValueError: if there is no file, if it is damaged, or if the environments are made differently
    """
    if path is None:
        raise ArgumentError("`path` must be a checkpoint, got None: `latest_checkpoint` found none to go on from")
    content = Path(path).read_bytes()
    allowed = "a complete checkpoint of ResumableCheckpointCallback (this file is torn, or something else)"
    require(_is_complete(content), "path", str(path), allowed)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        state: CheckpointState = loads(archive.read(ENTRY))
    venv = state.algorithm._wrap_env(maybe_make_env(env, verbose=0))
    if mismatch := state.env.mismatch(venv):
        raise ArgumentError(f"`env` must be {mismatch}")
    model = state.algorithm.load(io.BytesIO(content), env=venv, device=device)
    # Again, because `load` has seeded some of them anew, and has read tuples from JSON, where they are lists
    vars(model).update(state.attributes)
    model.action_space, model.observation_space = venv.action_space, venv.observation_space
    if state.memory:
        setattr(model, MEMORY, type(getattr(model, MEMORY))(*_memory_on(state.memory, model.device)))
    if mismatch := state.env.restore(venv):
        raise ArgumentError(f"`env` must be {mismatch}")
    state.random.restore()
    if isinstance(state.env.environments, str):
        warnings.warn(f"the environments start new episodes: they {state.env.environments}", stacklevel=2)
        venv.seed()
        model._last_obs = None
    callback._continue(state)
    return Resumed(model, max(model._total_timesteps - model.num_timesteps, 0))


def _memory_on(memory: Sequence[tuple[th.Tensor, ...]], device: th.device) -> list[tuple[th.Tensor, ...]]:
    """Bring the states of a recurrent policy's memory to a device."""
    return [tuple(state.to(device) for state in states) for states in memory]


def _content_of(model: BaseAlgorithm, state: CheckpointState, number: int) -> bytes:
    """
    Make a checkpoint's file: SB3's, with one more entry and a trailer.

    :param model: the model to save
    :param state: state of its training
    :param number: number of the checkpoint in its folder; later checkpoints have higher numbers
    :return: content of the file
    """
    file = io.BytesIO()
    model.save(file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(ENTRY, dumps(state))
        archive.comment = b"resumable checkpoint %016d %016d " % (number, number) + b"0" * DIGEST_LENGTH
    content = file.getvalue()[:-DIGEST_LENGTH]
    return content + hashlib.sha256(content).hexdigest().encode()


def _is_complete(content: bytes) -> bool:
    """Tell whether a file's content is a checkpoint as it was written."""
    trailer = TRAILER.fullmatch(content[-TRAILER_LENGTH:])
    digest = hashlib.sha256(memoryview(content)[:-DIGEST_LENGTH]).hexdigest()
    return trailer is not None and content.endswith(digest.encode())


def _number(path: Path) -> float:
    """Read a checkpoint's number; infinity from a file without one, which is then warned of first."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TRAILER_LENGTH, 0))
        trailer = TRAILER.fullmatch(file.read())
    return int(trailer[1]) if trailer else math.inf


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either all of the new content or the earlier file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _files(folder: Path, before: str, name_prefix: str, after: str) -> list[Path]:
    """
    Find a folder's checkpoints, or other files whose names contain a checkpoint's.

    :param folder: may be missing
    :param before: pattern of what stands before the checkpoint's name
    :param name_prefix: beginning of the checkpoint's name
    :param after: pattern of what stands after the checkpoint's name
    :return: paths
    """
    name = re.compile(rf"{before}{re.escape(name_prefix)}_\d+_steps\.zip{after}")
    return [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []
