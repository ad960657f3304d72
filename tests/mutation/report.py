"""What is left to cosmic-ray when mutmut has run (``leave``), and what came of the mutants of both (``table``)."""

import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

SURVIVORS = Path(__file__).with_name("survivors.md")
SESSION = "cosmic-ray.sqlite"
#: How pytest ends for mutmut where a test failed, where pytest itself did, and where the mutant took too long
KILLED = {1, 3, -24, 24, 36, 152, 255}


class Mutant(NamedTuple):
    """A mutant, and what became of it."""

    module: str
    tool: str
    killed: bool
    line: str


def changed_line(diff: str) -> str:
    """What the mutant has in the place of a line; where it only takes one away, that line with a minus."""
    added = [line[1:].strip() for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]
    removed = [line[1:].strip() for line in diff.splitlines() if re.match(r"-(?!--)", line)]
    return "\n".join(line for line in added if line not in removed) or f"-{removed[0]}"


def of_mutmut() -> dict[str, int | None]:
    """Its mutants by name, and how pytest ended."""
    files = sorted(Path("mutants/sb3_ppo_penalty").rglob("*.py.meta"))
    return {name: code for path in files for name, code in json.loads(path.read_text())["exit_code_by_key"].items()}


def leave() -> None:
    """Take from cosmic-ray's session every mutant in a function that mutmut has mutated."""
    done = {re.split(r"\.x_|ǁ", name.rsplit("__mutmut_", 1)[0])[-1] for name in of_mutmut()}
    with sqlite3.connect(SESSION) as session:
        jobs = session.execute("SELECT job_id, definition_name FROM mutation_specs").fetchall()
        for job, function in jobs:
            if function in done:
                session.execute("DELETE FROM mutation_specs WHERE job_id = ?", (job,))
                session.execute("DELETE FROM work_items WHERE job_id = ?", (job,))


def mutants() -> list[Mutant]:
    """Those of both tools."""
    found = []
    for name, code in of_mutmut().items():
        killed = code in KILLED
        diff = "" if killed else subprocess.run(["mutmut", "show", name], capture_output=True, text=True, check=True).stdout
        found.append(Mutant(name.split(".")[-2], "mutmut", killed, "" if killed else changed_line(diff)))
    query = "SELECT module_path, test_outcome, diff FROM mutation_specs JOIN work_results USING (job_id)"
    with sqlite3.connect(SESSION) as session:
        for path, outcome, diff in session.execute(query):
            found.append(Mutant(Path(path).stem, "cosmic-ray", outcome.lower() == "killed", changed_line(diff)))
    return found


def table() -> bool:
    """Print what came of them, and whether the survivors are those that are listed."""
    everyone = mutants()
    count = Counter((mutant.module, mutant.tool, mutant.killed) for mutant in everyone)
    print(f"{'module':14} {'tool':10} {'mutants':>7} {'killed':>6} {'survived':>8}")
    for module, tool in sorted({(mutant.module, mutant.tool) for mutant in everyone}):
        killed, survived = (count[module, tool, outcome] for outcome in (True, False))
        print(f"{module:14} {tool:10} {killed + survived:7} {killed:6} {survived:8}")
    killed = sum(mutant.killed for mutant in everyone)
    print(f"{killed} of {len(everyone)} killed, {100 * killed / len(everyone):.1f} %")
    survived = {mutant.line for mutant in everyone if not mutant.killed}
    listed = set(re.findall(r"^\+(.*)$", SURVIVORS.read_text(), flags=re.MULTILINE))
    for what, lines in (("survived and not listed", survived - listed), ("listed and killed", listed - survived)):
        for line in sorted(lines):
            print(f"{what}: {line}")
    return survived == listed


if __name__ == "__main__":
    if sys.argv[1] == "leave":
        leave()
    elif not table():
        sys.exit(1)
