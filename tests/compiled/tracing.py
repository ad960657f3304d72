"""
The compiling process without C++, which takes seconds for each graph: what comes back is the graph as it was traced.

Programs are sent, traced, refused, checked and looked up as ever; only what torch's compiler makes of a graph is left out.
"""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_ppo_penalty.compiled import compiler, worker
from sb3_ppo_penalty.compiled.trace import Graph, Program, trace

#: For tests that compile nothing, or of which a compiler's library shows nothing more
TRACED = pytest.mark.parametrize("worker", ["traced"], indirect=True)


def save_traced(traced: th.fx.GraphModule, examples: tuple[th.Tensor, ...], options: dict[str, Any]) -> str:
    """Write a graph to a file, in the place of ``torch._inductor.aot_compile``."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with tempfile.NamedTemporaryFile(dir=cache_dir(), delete=False) as file:
        pickle.dump(traced, file)
    return file.name


def load_traced(path: str) -> Graph:
    """Read a graph, in the place of ``load_library``."""
    return as_graph(pickle.loads(Path(path).read_bytes()))


def trace_here(program: Program) -> Graph:
    """Trace in the training process, in the place of ``compile_here``."""
    copy: Any = program._replace(module=compiler.copy_module(program.module))
    return as_graph(trace(copy))


def as_graph(traced: th.fx.GraphModule) -> Graph:
    """A function, which a deep copy of a model shares, as it does that of a library."""

    def graph(*tensors: th.Tensor) -> list[th.Tensor]:
        with th.no_grad():
            return list(traced(*tensors))

    return graph


def serve() -> None:
    """What runs in the compiling process."""
    import torch._inductor

    torch._inductor.aot_compile = save_traced
    worker.serve()


def leave_out_the_compiler(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let new compiling processes trace only."""
    own_cache = f"import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(folder)!r}; "
    patch.setattr(worker, "SERVE", own_cache + "import sys; sys.path[:] = {path!r}; import tracing; tracing.serve()")
    patch.setattr(worker, "load_library", load_traced)
    patch.setattr(compiler, "compile_here", trace_here)
