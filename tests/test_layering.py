"""Imports point down one list, the numeric rooms stand on jax and flax alone, and files stay short."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A module imports from its own room and from those before it.
ROOMS = "config rules files partition ops layers models data training convert analysis sweep cli".split()
NUMERIC = ("ops", "layers", "models")
MODULES = sorted((ROOT / "moejax").rglob("*.py"))
MAX_LINES = 400


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def room_of(path):
    """The first name below moejax/; None for the package itself."""
    name = path.relative_to(ROOT / "moejax").parts[0].removesuffix(".py")
    return None if name == "__init__" else name


def imports_of(path):
    """Dotted names of every module that the file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@every_module
def test_imports_point_down_the_list(path):
    room = room_of(path)
    assert room is None or room in ROOMS, f"{room} is a new room; give it a place in ROOMS and in the design"
    allowed = set() if room is None else set(ROOMS[: ROOMS.index(room) + 1])
    imported = {name.split(".")[1] for name in imports_of(path) if name.startswith("moejax.")}
    assert imported <= allowed, f"{name_of(path)} imports {', '.join(sorted(imported - allowed))}"


@every_module
def test_rooms_import_what_they_may(path):
    outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"moejax"}
    match room_of(path):
        case "ops":
            assert outside <= {"jax", "numpy"}
        case "layers" | "models" | "partition":
            assert outside <= {"jax", "flax", "numpy"}
        case "data":
            assert not outside & {"tensorflow", "tensorflow_datasets", "seqio", "torch", "jax"}
        case "config" | "rules" | "files" | None:
            assert not outside  # a launcher reads a config where no jax is installed


@every_module
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "configs").rglob("*.py"))], ids=name_of)
def test_files_are_at_most_400_lines(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{name_of(path)} has {num_lines} lines; split it by topic"


def test_the_walk_sees_imports_inside_functions_and_of_names(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b\n\ndef f():\n    from moejax import training\n    from moejax.data import corpora as c\n"
    )
    assert list(imports_of(path)) == ["a.b", "moejax.training", "moejax.data.corpora"]
    assert {room for room in map(room_of, MODULES) if room in NUMERIC} == set(NUMERIC)
