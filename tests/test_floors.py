"""The house: an import goes down or stays on its floor, never up."""

import ast

from conftest import ROOT

FLOORS = (
    ("utils",),
    ("data", "models"),
    ("curvature", "regularized_loss"),
    ("training",),
    ("estimate_curvature", "train_models"),
    ("experiments",),
    ("benchmarks",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(path) -> set[str]:
    """The rooms, or files of the top level, that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[0] for name in names}


def test_no_import_runs_up():
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")} | {path.stem for path in ROOT.glob("*.py")}
    assert rooms - {"tests"} == set(FLOOR)  # every room has a floor
    for path in (path for room in FLOOR for path in (*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/*.py"))):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        up = {name for name in imported(path) if FLOOR.get(name, -1) > FLOOR[room]}
        assert not up, f"{path.relative_to(ROOT)} imports {up}, which is above it"
