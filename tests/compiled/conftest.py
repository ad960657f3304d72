"""What the tests of the compiled step share: one compiling process, which leaves out C++ unless ``.ci/run`` asks for it."""

import pytest
import tracing

from sb3_ppo_penalty.compiled import compiler as room
from sb3_ppo_penalty.compiled.worker import CompileWorker


@pytest.fixture(scope="module", autouse=True, params=["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def worker(request, tmp_path_factory):
    """Share one compiling process between all tests, because it takes seconds to start, as a graph takes to compile."""
    shared = CompileWorker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "CompileWorker", lambda: shared)
        patch.setattr(shared, "close", lambda: None)
        if request.param == "traced":
            tracing.leave_out_the_compiler(patch, tmp_path_factory.mktemp("graphs"))
        yield shared
    shared.close()
