"""What the tests of the compiled step share."""

import pytest

from sb3_ppo_penalty.compiled import compiler as room
from sb3_ppo_penalty.compiled.worker import CompileWorker


@pytest.fixture(scope="module", autouse=True)
def worker():
    """Share one compiling process between all tests, because it takes seconds to start."""
    shared = CompileWorker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "CompileWorker", lambda: shared)
        patch.setattr(shared, "close", lambda: None)
        yield shared
    shared.close()
