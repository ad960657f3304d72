"""
Compile in a process of its own.

torch's compiler takes 90 MB of whatever process imports it, and never gives them back. Here it works in a short-lived
process beside the training one, which sends it what is to be compiled and loads the finished library from disk. Nothing runs
in the other process but the tracer and the compiler: no environment, no callback, no step.
"""

import contextlib
import copyreg
import hashlib
import io
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from torch.utils import _pytree as pytree

from sb3_ppo_penalty.compiled.module_state import UnfollowedError, evaluation_state

#: Takes and returns plain tensors
Graph = Callable[..., list[th.Tensor]]
#: Traces something, and says what tensors the graph takes
Draw = Callable[..., tuple[th.fx.GraphModule, list[th.Tensor]]]
#: Larger constants are the policy's own tensors, which may change in place: a library would keep what they are now
LITERAL_SIZE = 8
#: Of the code between the kernels, which is long and does little: a third less time to compile, 3 % more to run
OPTIONS = {"aot_inductor.compile_wrapper_opt_level": "O0"}
#: What the other process runs
SERVE = "import sys; sys.path[:] = {path!r}; from sb3_ppo_penalty.compiled.worker import serve; serve()"


class ApartError(Exception):
    """The other process made no library, for whatever reason."""


def each_tensor(tree: Any, change: Callable[[th.Tensor], th.Tensor]) -> Any:
    """
    :param tree: of tensors and other things
    :param change: what becomes of a tensor
    :return: the tree with its tensors changed, and what was one tensor in two places still one
    """
    made: dict[int, th.Tensor] = {}

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, th.Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = change(leaf)
        return made[id(leaf)]

    return pytree.tree_map(of, tree)


def hollow(tree: Any, device: str) -> Any:
    """
    :param tree: of tensors and other things
    :param device: ``meta`` to send them, ``cpu`` once they have arrived
    :return: the same with tensors of that kind that hold nothing
    """
    return each_tensor(tree, lambda leaf: th.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=device))


class Sender(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles a model as ``save`` does, with its policy: what a loss may depend on, and no environment."""

    def reducer_override(self, obj: Any) -> Any:
        """
        :param obj: about to be pickled
        :return: how; see :mod:`pickle`
        """
        if not isinstance(obj, BaseAlgorithm):
            return super().reducer_override(obj)
        left_out = {*obj._excluded_save_params()} - {"policy", "device"}
        kept = {name: value for name, value in vars(obj).items() if name not in left_out}
        return copyreg.__newobj__, (type(obj),), kept  # type: ignore[attr-defined]


def pickled(obj: Any) -> bytes:
    """
    Pickle something that may refer to a model.

    :param obj: a module, or what goes with it
    :return: see :class:`Sender`
    """
    file = io.BytesIO()
    Sender(file).dump(obj)
    return file.getvalue()


def drawn(draw: Draw, module: th.nn.Module, *arguments: Any) -> tuple[th.fx.GraphModule, list[th.Tensor]]:
    """
    Trace a module, and refuse one that changes itself: a graph holds what it was at the time.

    :param draw: traces the module
    :param module: has a ``policy``
    :param arguments: of ``draw``, after the module
    :return: see :data:`Draw`
    :raises UnfollowedError: naming what has changed
    """
    policy: Any = module.policy
    before = evaluation_state(policy)
    found = draw(module, *arguments)
    after = evaluation_state(policy)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise UnfollowedError(f"evaluating the policy changes `{changed[0]}`, which a graph would not")
    return found


def library(traced: th.fx.GraphModule, examples: list[th.Tensor]) -> str:
    """
    :param traced: takes and returns tensors
    :param examples: such tensors, on the CPU; their data are not looked at
    :return: path of a library that does the same; an equal graph's from earlier where there is one
    :raises ApartError: for a graph that holds tensors of the policy's which are not among what it takes
    """
    from torch import _inductor as inductor
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    constants = {name: value for name, value in vars(traced).items() if isinstance(value, th.Tensor)} | dict(
        traced.named_buffers()
    )
    if any(value.numel() > LITERAL_SIZE for value in constants.values()):
        raise ApartError(f"the graph holds tensors that may change: {', '.join(constants)}")
    kinds = [(tensor.size(), tensor.stride(), tensor.dtype) for tensor in examples]
    literals = {name: (value.dtype, value.tolist()) for name, value in constants.items()}
    machine = (th.__version__, th.backends.cpu.get_cpu_capability(), th.get_num_threads(), inductor.config.get_hash())
    what = repr((machine, OPTIONS, kinds, literals, traced.code))
    known = Path(cache_dir(), "sb3_ppo_penalty", hashlib.sha256(what.encode()).hexdigest())
    if known.exists() and Path(known.read_text()).exists():
        return known.read_text()
    with th.no_grad():
        path = str(inductor.aot_compile(traced, tuple(examples), options=dict[str, Any](OPTIONS)))
    known.parent.mkdir(parents=True, exist_ok=True)
    # Renamed, so that another run never reads half of it
    unfinished = known.with_suffix(f".{os.getpid()}")
    unfinished.write_text(path)
    unfinished.replace(known)
    return path


def loaded(path: str) -> Graph:
    """
    :param path: of a library
    :return: what it holds
    """
    run = th._C._aoti.AOTIModelContainerRunnerCpu(path, 1).run

    # A function: a copy of a model shares it
    def graph(*tensors: th.Tensor) -> list[th.Tensor]:
        made: list[th.Tensor] = run(list(tensors))
        return made

    return graph


def answer(request: bytes) -> tuple[bool, str]:
    """
    :param request: see :meth:`Workshop.__call__`
    :return: whether it worked, with the library's path or what went wrong
    """
    try:
        (threads, dtype, precision), draw, module, arguments = pickle.loads(request)
        th.set_num_threads(threads)
        th.set_default_dtype(dtype)
        th.set_float32_matmul_precision(precision)
        return True, library(*drawn(draw, module, *hollow(arguments, "cpu")))
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def serve() -> None:
    """Answer on stdout what comes on stdin, until that ends."""
    with os.fdopen(os.dup(1), "wb") as out:
        # Whatever else is printed, by a policy's module or by a compiler, is not part of the answer
        os.dup2(2, 1)
        with contextlib.suppress(EOFError):
            while True:
                pickle.dump(answer(pickle.load(sys.stdin.buffer)), out)
                out.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """
    :param process: one that serves; it ends when its input does
    """
    process.kill()
    process.communicate()


class Workshop:
    """The other process; started when it is first needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.end: Callable[[], Any] | None = None

    def _open(self) -> subprocess.Popen[bytes]:
        """:return: the running process."""
        if self.process is None:
            # Not multiprocessing's, which would run a user's script again if it does not hide from that
            command = [sys.executable, "-c", SERVE.format(path=sys.path)]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
            # Also when the model is deleted, or Python ends
            self.end = weakref.finalize(self, _end, self.process)
        return self.process

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self.end is not None:
            self.end()
        self.process = self.end = None

    def __call__(self, draw: Draw, module: th.nn.Module, *arguments: Any) -> Graph:
        """
        :param draw: a function of a module's, that returns a graph and examples of what it takes
        :param module: its first argument
        :param arguments: its further ones; of their tensors only shape and type are sent
        :return: the graph, compiled
        :raises UnfollowedError: if the module changes itself
        :raises ApartError: if that did not work, for whatever other reason
        """
        surroundings = (th.get_num_threads(), th.get_default_dtype(), th.get_float32_matmul_precision())
        try:
            request = pickled((surroundings, draw, module, hollow(arguments, "meta")))
            process = self._open()
            assert process.stdin is not None
            assert process.stdout is not None
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            worked, found = pickle.load(process.stdout)
            if worked:
                return loaded(found)
        except BaseException as error:
            # Also when the user interrupts: the answer would be taken for the next one
            self.close()
            if not isinstance(error, Exception):
                raise
            # What cannot be pickled, a process that cannot be started or that died, a library that does not load
            raise ApartError(f"{type(error).__name__}: {error}") from error
        kind, _, reason = found.partition(": ")
        raise UnfollowedError(reason) if kind == UnfollowedError.__name__ else ApartError(found)
