"""The house's laws: who may import whom, one function one screen, and a docstring for every public name."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_ppo_penalty

PACKAGE = Path(sb3_ppo_penalty.__file__).parent
SB3 = "stable_baselines3"
#: room -> the package's own rooms and the foreign packages that it may import; the standard library is free
LAW = {
    "version": set(),
    "arguments": set(),
    "file_origin": {SB3, "arguments"},
    "kl_control": {"arguments"},
    "losses": {"torch"},
    "divergence": {"torch", SB3, "arguments"},
    "evaluation": {"torch", "numpy", "gymnasium", SB3, "divergence", "rollout"},
    "kl_penalty": {"torch", "arguments", "losses", "divergence"},
    "distributions": {"torch", "numpy", SB3, "divergence"},
    "policies": {"torch", "numpy", "gymnasium", SB3, "distributions"},
    "rollout": {"torch", "numpy", "gymnasium", SB3},
    "continuation": {"torch", "numpy", "gymnasium", SB3, "cloudpickle"},
    "checkpoints": {"torch", SB3, "arguments", "continuation"},
    "update": {"torch", SB3, "losses", "rollout"},
    # Data-parallel training; a single process goes through the same calls, which do nothing there
    "distributed": {"torch", SB3, "arguments", "checkpoints", "losses", "rollout", "update"},
    "module_state": {"torch", "numpy", "gymnasium"},
    "apart": {"torch", SB3, "cloudpickle", "module_state"},
    "compiled": {"torch", SB3, "apart", "losses", "module_state", "policies", "rollout", "update"},
    "safe_archive": {"torch", SB3},
    "safe_load": {"torch", "gymnasium", SB3, "arguments", "distributions", "guard", "kl_control", "kl_penalty", "policies"}
    | {"rollout", "safe_archive"},
    "guard": {"torch", SB3, "arguments", "distributed", "rollout", "update"},
    "proximal": {"torch", "numpy", "gymnasium", SB3, "arguments", "losses", "divergence", "policies", "rollout"}
    | {"update", "compiled", "distributed", "evaluation", "file_origin", "safe_load"},
    "ppo_clip": {"torch", SB3, "arguments", "divergence", "file_origin", "losses", "proximal", "rollout", "update"},
    "ppo_penalty": {"torch", SB3, "arguments", "divergence", "losses", "kl_control", "kl_penalty", "proximal", "rollout"}
    | {"file_origin", "guard", "update"},
    # Imported by nobody but the user: the package itself comes without sb3-contrib
    "maskable": {"torch", "numpy", "gymnasium", SB3, "sb3_contrib", "arguments", "divergence", "ppo_penalty", "rollout"},
    "__init__": {
        "checkpoints",
        "continuation",
        "divergence",
        "guard",
        "kl_control",
        "kl_penalty",
        "policies",
        "ppo_clip",
        "ppo_penalty",
        "rollout",
        "safe_archive",
        "version",
    },
}
#: The tools stand on the algorithms as a user sees them, never on the rooms behind them
TOOLS = {
    "zoo": {"public", "zoo", SB3, "gymnasium", "optuna", "rl_zoo3", "numpy", "torch"},
    # The algorithms do not know it
    "vec_envs": {"arguments", "vec_envs", SB3, "gymnasium", "numpy"},
    "study": {"public", "zoo", "study", SB3, "gymnasium", "joblib", "matplotlib", "numpy", "pandas", "rl_zoo3", "scipy"}
    | {"pytablewriter", "ray", "sb3_contrib", "torch", "tqdm", "yaml"},
}
FOREIGN_TO_THE_CORE = ["rl_zoo3", "joblib", "pandas", "matplotlib", "optuna", "ray", "scipy", "sb3_contrib"]


def imports_of(path: Path) -> set[str]:
    """Foreign packages by name, the package's own rooms by the room's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the room"
            names = [node.module or ""]
            if node.module == "sb3_ppo_penalty":
                public = {*sb3_ppo_penalty.__all__}
                names = [f"sb3_ppo_penalty.{'public' if a.name in public else a.name}" for a in node.names]
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "sb3_ppo_penalty" and len(parts) > 1 else parts[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", LAW)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert imports_of(PACKAGE / f"{room}.py") <= LAW[room]


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_stand_on_what_a_user_sees(tool: str) -> None:
    for path in (PACKAGE / tool).rglob("*.py"):
        assert imports_of(path) <= TOOLS[tool] | {"sb3_ppo_penalty"}, path.name


def test_only_the_cluster_needs_ray() -> None:
    assert [path.name for path in PACKAGE.rglob("*.py") if "ray" in imports_of(path)] == ["cluster.py"]


def test_every_room_has_a_law() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__main__"} == set(LAW)
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} <= {"zoo", "study", "vec_envs"}


def test_importing_the_package_imports_no_tool() -> None:
    code = f"import sys, sb3_ppo_penalty; print([m for m in {FOREIGN_TO_THE_CORE} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # SB3's results plotter brings pandas and matplotlib where they are installed; nothing else may come
    assert set(ast.literal_eval(run.stdout)) <= {"pandas", "matplotlib"}


def test_importing_the_package_leaves_the_compiler_alone() -> None:
    code = "import sys, stable_baselines3; a = {*sys.modules}; import sb3_ppo_penalty; print(len({*sys.modules} - a))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40


def functions_of(path: Path) -> list[tuple[str, int]]:
    sizes = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0] if ast.get_docstring(node) else None
            docstring = doc.end_lineno - doc.lineno + 1 if doc else 0
            sizes.append((node.name, node.end_lineno - node.lineno + 1 - docstring))
    return sizes


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_one_function_one_screen(path: Path) -> None:
    assert [(name, lines) for name, lines in functions_of(path) if lines > 50] == []


@pytest.mark.parametrize("name", [name for name in sb3_ppo_penalty.__all__ if inspect.isclass(getattr(sb3_ppo_penalty, name))])
def test_public_classes_and_methods_have_docstrings(name: str) -> None:
    cls = getattr(sb3_ppo_penalty, name)
    assert cls.__dict__.get("__doc__"), name
    for member_name, member in vars(cls).items():
        if inspect.isfunction(member) and not member_name.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{member_name}"


@pytest.mark.parametrize("room", ["losses", "divergence", "kl_control"])
def test_maths_is_documented_with_parameters_and_results(room: str) -> None:
    module = getattr(sb3_ppo_penalty, room)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ != module.__name__ or name.startswith("_"):
            continue
        text = inspect.getdoc(function) or ""
        assert ":return:" in text, name
        for parameter in inspect.signature(function).parameters:
            assert f":param {parameter}:" in text, f"{room}.{name}: {parameter}"
