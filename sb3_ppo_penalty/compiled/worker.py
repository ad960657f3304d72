"""
Compile in a process of its own.

torch's compiler takes 90 MB of whatever process imports it, and never gives them back. Here it works in a short-lived process
beside the training one, which sends it the program to compile and loads the finished library from disk. Only the tracer and
the compiler run in the other process: no environment, no callback, no step.
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

from sb3_ppo_penalty.compiled.module_state import UntraceableError
from sb3_ppo_penalty.compiled.trace import Graph, Program, map_tensors, trace

#: Constants of a graph that have more entries are the policy's own tensors, which may change in place later
MAX_LITERAL_SIZE = 8
#: What a machine that has never compiled spends most on is left out. Optimising the wrapper code: a third of the time, for 3 %
#: of a step. Trying the processor's vector instructions with three programs, instead of believing it. And precompiled headers,
#: 300 MB of them: four graphs later they would pay
COMPILE_OPTIONS = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": True,
}
#: Code that the other process runs
SERVE = "import sys; sys.path[:] = {path!r}; from sb3_ppo_penalty.compiled.worker import serve; serve()"


class CompileWorkerError(Exception):
    """The compiling process made no library, for whatever reason."""


def without_data(tree: Any, device: str) -> Any:
    """
    Replace each tensor by an uninitialised one of the same shape, strides and dtype.

    :param tree: tensors and other things, in tuples, lists and dicts
    :param device: ``meta`` to send the tensors, ``cpu`` once they have arrived
    """
    return map_tensors(tree, lambda leaf: th.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=device))


class ModelPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles a model as ``save`` does, but with its policy: the loss may depend on that, not on the environment."""

    def reducer_override(self, obj: Any) -> Any:
        """
        Say how to pickle an object; see :mod:`pickle`.

        :param obj: the object about to be pickled
        """
        if not isinstance(obj, BaseAlgorithm):
            return super().reducer_override(obj)
        left_out = {*obj._excluded_save_params()} - {"policy", "device"}
        kept = {name: value for name, value in vars(obj).items() if name not in left_out}
        return copyreg.__newobj__, (type(obj),), kept  # type: ignore[attr-defined]


def pickled(obj: Any) -> bytes:
    """
    Pickle an object that may refer to a model.

    :param obj: a module or a program
    """
    file = io.BytesIO()
    ModelPickler(file).dump(obj)
    return file.getvalue()


def with_numbers(traced: th.fx.GraphModule) -> th.fx.GraphModule:
    """
    Make the scalar constants of a graph in the graph itself: torch's compiler for libraries takes none that exist already.

    :param traced: as it was traced; changed in place
    :return: the same
    """
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, node.target, None)
        if isinstance(value, th.Tensor) and value.dim() == 0:
            with traced.graph.inserting_before(node):
                made = traced.graph.call_function(th.ops.aten.full.default, ([], value.item()), {"dtype": value.dtype})
            node.replace_all_uses_with(made)
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def build_library(traced: th.fx.GraphModule, examples: list[th.Tensor]) -> str:
    """
    Compile a traced program to a shared library, unless an equal one has been compiled before.

    :param traced: takes and returns tensors
    :param examples: the tensors it takes, on the CPU; their values do not matter
    :return: path of the library
    :raises CompileWorkerError: if the graph holds tensors of the policy that are not among the tensors it takes
    """
    from torch import _inductor as inductor
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    attributes = {name: value for name, value in vars(traced).items() if isinstance(value, th.Tensor)}
    constants = attributes | dict(traced.named_buffers())
    if any(value.numel() > MAX_LITERAL_SIZE for value in constants.values()):
        raise CompileWorkerError(f"the graph holds tensors that may change: {', '.join(constants)}")
    kinds = [(tensor.size(), tensor.stride(), tensor.dtype) for tensor in examples]
    literals = {name: (value.dtype, value.tolist()) for name, value in constants.items()}
    machine = (th.__version__, th.backends.cpu.get_cpu_capability(), th.get_num_threads(), inductor.config.get_hash())
    content = repr((machine, COMPILE_OPTIONS, kinds, literals, traced.code))
    known = Path(cache_dir(), "sb3_ppo_penalty", hashlib.sha256(content.encode()).hexdigest())
    if known.exists() and Path(known.read_text()).exists():
        return known.read_text()
    with th.no_grad():
        path = str(inductor.aot_compile(traced, tuple(examples), options=dict[str, Any](COMPILE_OPTIONS)))
    known.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that another run never reads half of it
    unfinished = known.with_suffix(f".{os.getpid()}")
    unfinished.write_text(path)
    unfinished.replace(known)
    return path


def load_library(path: str) -> Graph:
    """
    Load the graph that a library holds.

    :param path: path of the library
    """
    run = th._C._aoti.AOTIModelContainerRunnerCpu(path, 1).run

    # A function, because a deep copy of a model shares functions
    def graph(*tensors: th.Tensor) -> list[th.Tensor]:
        results: list[th.Tensor] = run(list(tensors))
        return results

    return graph


def answer(request: bytes) -> tuple[bool, str]:
    """
    Compile what a request asks for, in the compiling process.

    :param request: pickled settings of torch and a program without data, see :meth:`CompileWorker.__call__`
    :return: whether it worked, with the library's path or the error's class and message
    """
    try:
        (threads, dtype, precision), sent = pickle.loads(request)
        th.set_num_threads(threads)
        th.set_default_dtype(dtype)
        th.set_float32_matmul_precision(precision)
        program = without_data(sent, "cpu")
        return True, build_library(with_numbers(trace(program)), program.tensors())
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def serve() -> None:
    """Answer requests from stdin on stdout until stdin ends."""
    with os.fdopen(os.dup(1), "wb") as out:
        # Whatever a policy's module or a compiler prints goes to stderr: stdout carries the answers
        os.dup2(2, 1)
        with contextlib.suppress(EOFError):
            while True:
                pickle.dump(answer(pickle.load(sys.stdin.buffer)), out)
                out.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """
    End a process.

    :param process: a process that runs :func:`serve`
    """
    process.kill()
    process.communicate()


class CompileWorker:
    """The compiling process; started when it is first needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.end: Callable[[], Any] | None = None

    def _open(self) -> subprocess.Popen[bytes]:
        """Return the process, started if it is not running."""
        if self.process is None:
            # Not multiprocessing, which runs the user's script again unless that guards its main code
            command = [sys.executable, "-c", SERVE.format(path=sys.path)]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
            # Ends it also when the model is deleted, or when Python ends
            self.end = weakref.finalize(self, _end, self.process)
        return self.process

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self.end is not None:
            self.end()
        self.process = self.end = None

    def __call__(self, program: Program) -> Graph:
        """
        Compile a program.

        :param program: the program; of its own tensors only shape, strides and dtype are sent
        :return: its graph
        :raises UntraceableError: if the policy changes itself while it is evaluated
        :raises CompileWorkerError: if compiling failed for any other reason
        """
        torch_settings = (th.get_num_threads(), th.get_default_dtype(), th.get_float32_matmul_precision())
        try:
            request = pickled((torch_settings, without_data(program, "meta")))
            process = self._open()
            assert process.stdin is not None
            assert process.stdout is not None
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            worked, result = pickle.load(process.stdout)
            if worked:
                return load_library(result)
        except BaseException as error:
            # Also when the user interrupts: the pending answer would be taken for that of the next call
            self.close()
            if not isinstance(error, Exception):
                raise
            # An object that cannot be pickled, a process that cannot be started or has died, a library that does not load
            raise CompileWorkerError(f"{type(error).__name__}: {error}") from error
        kind, _, reason = result.partition(": ")
        raise UntraceableError(reason) if kind == UntraceableError.__name__ else CompileWorkerError(result)
