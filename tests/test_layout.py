"""The house's laws: who may import whom, one function one screen, and a docstring for every public name."""

import ast
import inspect
import subprocess
import sys
import textwrap
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO

import sb3_ppo_penalty

PACKAGE = Path(sb3_ppo_penalty.__file__).parent
SB3 = "stable_baselines3"
CORE = {"cloudpickle", "gymnasium", "numpy", SB3, "torch"}
#: room -> the rooms that it may import, in the order of one update; arrows run one way
ROOMS: dict[str, set[str]] = {
    "arguments": set(),
    "version": set(),
    "rollouts": set(),
    "objectives": {"arguments"},
    "policies": {"arguments", "objectives"},
    "updates": {"arguments", "objectives", "rollouts"},
    # These three do not know each other
    "compiled": {"objectives", "policies", "rollouts", "updates"},
    "distributed": {"arguments", "objectives", "rollouts", "updates"},
    "saving": {"arguments", "objectives", "policies", "rollouts", "updates"},
    "algorithms": {"arguments", "objectives", "policies", "rollouts", "updates", "compiled", "distributed", "saving"},
    # Knows SB3 and gymnasium only: the algorithms do not know it
    "vec_envs": {"arguments"},
    # The tools stand on the algorithms as a user sees them, never on the rooms behind them
    "zoo": {"public"},
    "study": {"public", "zoo"},
    "__main__": {"study", "zoo"},
    "__init__": {"algorithms", "objectives", "policies", "rollouts", "saving", "updates", "version"},
}
#: room -> the foreign packages that it may import beside those of the core
FOREIGN = {
    "algorithms": {"sb3_contrib"},
    "policies": {"sb3_contrib"},
    "zoo": {"optuna", "rl_zoo3"},
    "study": {"joblib", "matplotlib", "pandas", "pytablewriter", "ray", "rl_zoo3", "sb3_contrib", "scipy", "tqdm", "yaml"},
}
#: What nobody gets who only imports the package, by the module that brings it
ONLY_WHEN_ASKED_FOR = {
    *("rl_zoo3", "joblib", "optuna", "ray", "scipy", "sb3_contrib"),
    *("sb3_ppo_penalty.compiled", "sb3_ppo_penalty.distributed", "sb3_ppo_penalty.saving.safe_load"),
}


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]


def imports_of(path: Path) -> set[str]:
    """Foreign packages by name, the package's own rooms by the room's name; the standard library is free."""
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
    return found - set(sys.stdlib_module_names) - {"sb3_ppo_penalty"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for path in files_of(room):
        assert imports_of(path) - {room} <= ROOMS[room] | CORE | FOREIGN.get(room, set()), path.name


def test_every_room_has_a_law() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders | {path.stem for path in PACKAGE.glob("*.py")} == set(ROOMS)


@pytest.mark.parametrize(
    ("package", "name"), [("ray", "ray_backend.py"), ("joblib", "joblib_backend.py"), ("sb3_contrib", "maskable.py")]
)
def test_one_module_needs_an_optional_package(package: str, name: str) -> None:
    algorithms_and_study = [*files_of("algorithms"), *files_of("study")]
    assert name in [path.name for path in algorithms_and_study if package in imports_of(path)]


def test_tests_mirror_the_rooms() -> None:
    here = Path(__file__).parent
    tested = {path.parent.name for path in here.glob("*/test_*.py")}
    assert tested == {room for room in ROOMS if (PACKAGE / room).is_dir()}


def test_importing_the_package_brings_nothing_that_is_not_asked_for() -> None:
    code = f"import sys, sb3_ppo_penalty; print([m for m in {sorted(ONLY_WHEN_ASKED_FOR)} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(run.stdout) == []


def functions_of(path: Path) -> list[tuple[str, int]]:
    sizes = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0] if ast.get_docstring(node) else None
            # A signature with an argument a line is no code to follow
            body = node.body[1:] if doc else node.body
            sizes.append((node.name, node.end_lineno - body[0].lineno + 1 if body else 0))
    return sizes


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_one_function_one_screen(path: Path) -> None:
    assert [(name, lines) for name, lines in functions_of(path) if lines > 50] == []


def test_no_class_is_longer_than_seven_screens() -> None:
    classes = [
        (node.name, node.end_lineno - node.lineno + 1)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [(name, lines) for name, lines in classes if lines >= 350] == []


def code_lines(source: str) -> list[str]:
    """Lines of code without indentation, comments and docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["train", "collect_rollouts"])
@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO, RecurrentPPO])
def test_nothing_of_the_loops_of_sb3_and_sb3_contrib_is_copied(algorithm: type, name: str) -> None:
    """Of 40 to 70 lines at most 5 are in a module of ours, in their order, and no more than 3 of them in a row."""
    theirs = code_lines(inspect.getsource(getattr(algorithm, name)))
    assert len(theirs) >= 40
    for path in PACKAGE.rglob("*.py"):
        blocks = SequenceMatcher(None, theirs, code_lines(path.read_text()), autojunk=False).get_matching_blocks()
        sizes = [block.size for block in blocks]
        assert (sum(sizes) <= 5, max(sizes) <= 3) == (True, True), (path.name, sizes)


def test_every_docstring_begins_with_a_sentence() -> None:
    """The linter demands it of public names; here it is demanded of private ones too."""
    bare = [
        f"{path.name}: {getattr(node, 'name', 'module')}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module))
        if not (ast.get_docstring(node) or "A").lstrip()[:1].isalnum() and not (ast.get_docstring(node) or "").startswith("``")
    ]
    assert bare == []


@pytest.mark.parametrize("name", [name for name in sb3_ppo_penalty.__all__ if inspect.isclass(getattr(sb3_ppo_penalty, name))])
def test_public_classes_and_methods_have_docstrings(name: str) -> None:
    cls = getattr(sb3_ppo_penalty, name)
    assert cls.__dict__.get("__doc__"), name
    for member_name, member in vars(cls).items():
        if inspect.isfunction(member) and not member_name.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{member_name}"


@pytest.mark.parametrize("room", ["losses", "divergence", "kl_controllers"])
def test_maths_is_documented_with_parameters_and_results(room: str) -> None:
    module = getattr(sb3_ppo_penalty.objectives, room)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ != module.__name__ or name.startswith("_"):
            continue
        text = inspect.getdoc(function) or ""
        assert ":return:" in text, name
        for parameter in inspect.signature(function).parameters:
            assert f":param {parameter}:" in text, f"{room}.{name}: {parameter}"
