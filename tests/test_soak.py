"""The soak test itself, for a few seconds, and that it sees what it is there to see."""

import csv
import importlib.util
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_seconds(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soak.HYPERPARAMETERS, "n_steps", 64)
    arguments = ["--minutes", "0.02", "--learn-calls", "4", "--cycles", "8", "--out", str(tmp_path)]
    # So short a time is warm-up throughout
    assert soak.main([*arguments, "--max-growth", "25"]) == 0
    assert "Nothing was violated." in (tmp_path / "soak.md").read_text()
    with (tmp_path / "soak.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cycles"] for row in rows] == ["2", "4", "6", "8"]
    assert [row["reset"] for row in rows] == ["True", "False", "True", "False"]
    # As the kernel tells in another place; training has ended, but its memory has hardly been given back
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    for row in rows:
        assert int(row["updates"]) >= 1
        assert int(row["steps"]) > 256
        assert float(row["rss_mib"]) == pytest.approx(resident, rel=0.1)
        assert int(row["files"]) == pytest.approx(len(os.listdir("/proc/self/fd")), abs=3)
    assert soak.main([*arguments, "--max-growth", "-25"]) == 1
    assert "- resident memory grew by" in (tmp_path / "soak.md").read_text()
    with pytest.raises(SystemExit):
        soak.main(["--learn-calls", "3"])


def test_what_it_calls_a_violation(soak: ModuleType) -> None:
    good = soak.Row(1, True, 2048, 2, 0.001, 0.02, 0.5, 2.0, 5, 400.0, 7)
    rows = [replace(good, call=call, rss_mib=300.0 if call < 3 else 400.0) for call in range(1, 9)]

    def found(**changes: float) -> list[str]:
        return soak.violations([*rows[:4], replace(rows[4], **changes), *rows[5:]], (0.5, 2.0), 1.0)

    assert found() == []
    assert found(kl_max=math.nan) == ["call 5: a figure is not finite"]
    assert found(kl_coef_max=math.inf)[0] == "call 5: a figure is not finite"
    assert found(kl_max=1.5) == ["call 5: KL from 0.001 to 1.5, allowed is 0 to 1"]
    assert found(kl_min=-0.5) == ["call 5: KL from -0.5 to 0.02, allowed is 0 to 1"]
    assert found(kl_coef_min=0.25) == ["call 5: kl_coef from 0.25 to 2, allowed is (0.5, 2.0)"]
    assert found(kl_coef_max=4.0) == ["call 5: kl_coef from 0.5 to 4, allowed is (0.5, 2.0)"]
    assert found(files=8) == ["call 5: 8 open files, 7 after the warm-up"]
    # From calls 3 and 4 to calls 7 and 8, whatever it was before
    rows[6] = rows[7] = replace(good, rss_mib=404.0)
    assert found() == ["resident memory grew by 1.00 %, allowed is less than 1 %"]
    rows[6] = rows[7] = replace(good, rss_mib=403.9)
    assert found() == []


def test_a_model_that_loads_otherwise_than_it_was_saved(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = soak.PPOPenalty.load

    def forgetful(*arguments: object, **named: object) -> object:
        model = load(*arguments, **named)
        model.kl_coef = 1.0
        return model

    monkeypatch.setattr(soak.PPOPenalty, "load", forgetful)
    with pytest.raises(RuntimeError, match="loaded model differs from the saved one"):
        soak.main(["--minutes", "0", "--cycles", "20", "--out", str(tmp_path)])
