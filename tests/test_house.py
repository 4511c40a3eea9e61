"""The rules of the house, read from the source (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "simpletuner"
FLOORS = {
    **dict.fromkeys(("errors", "types", "console", "plugins", "randomness", "relaxed_json", "__init__"), 1),
    **dict.fromkeys(("options", "diffusion"), 2),
    **dict.fromkeys(("models", "adapters", "memory", "optim", "data", "reporting", "importers"), 3),
    "training": 4,
    "cli": 5,
    "__main__": 6,
}
GROUND_FLOOR_MAY_USE = {"console": {"errors"}, "plugins": {"errors"}, "relaxed_json": {"errors"}}
LIBRARY_ROOMS = {
    "rich": ("console.py",),
    "argparse": ("cli/",),
    "prompt_toolkit": ("cli/wizard/terminal.py", "cli/wizard/screen.py"),
    "pydantic": ("options/", "data/backend.py", "data/checks.py"),
    "diffusers": ("models/",),
    "transformers": ("models/",),
    "lycoris": (
        *("adapters/kinds/lycoris.py", "adapters/factored.py"),
        *("adapters/folded_scales.py", "adapters/rank_masks.py", "adapters/steady_modules.py"),
    ),
    "peft": ("adapters/kinds/standard.py",),
    "optimum": ("memory/quantisers/",),
    "torchao": ("memory/quantisers/", "optim/"),
    "bitsandbytes": ("memory/quantisers/", "optim/"),
    "accelerate": ("training/", "cli/launch.py", "models/streaming.py"),
    "cv2": ("data/faces.py",),
    "yaml": ("importers/settings.py",),
    "wandb": ("reporting/trackers/wandb.py",),
    "requests": ("reporting/webhooks.py",),
}
TORCH_FREE = ("options/", "cli/", "errors.py", "types.py", "console.py", "plugins.py", "models/family.py", "models/families/", "optim/catalogue.py")
EXAMPLES = "examples/"
"""Recipes that ship as data: scripts, not rooms of the house."""


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not inside(path).startswith(EXAMPLES)]


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return inside(path).split("/")[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, ast.stmt, bool, bool]]:
    """Module name, statement, whether inside a function, whether for type checkers only."""

    def visit(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[tuple[str, ast.stmt, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child, in_function, typing_only
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{inside(path)}:{child.lineno} imports relatively"
                for alias in child.names:
                    deeper = child.module in ("simpletuner",) or str(child.module).endswith(("kinds", "families"))
                    yield f"{child.module}.{alias.name}" if deeper else str(child.module), child, in_function, typing_only
            else:
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, in_function or is_function, typing_only or is_typing)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False, False)


def test_imports_go_down_or_stay_in_their_room():
    wrong = []
    for path in sources():
        room = room_of(path)
        for name, statement, _, typing_only in imports_of(path):
            parts = name.split(".")
            if parts[0] != "simpletuner" or len(parts) == 1:
                continue
            target = parts[1]
            where = f"{inside(path)}:{statement.lineno} imports {name}"
            assert target in FLOORS or target == "__version__", where
            if target in ("__version__", room):
                continue
            if FLOORS[target] > FLOORS[room]:
                wrong.append(where + " (upward)")
            elif FLOORS[target] == FLOORS[room] == 1 and target not in GROUND_FLOOR_MAY_USE.get(room, set()):
                wrong.append(where + " (sideways on floor 1)")
            elif FLOORS[target] == FLOORS[room] == 3:
                wrong.append(where + " (a stranger)")
            elif room == "diffusion" and target == "options" and not typing_only:
                wrong.append(where + " (the maths sees no options)")
    assert not wrong, "\n".join(wrong)


def test_families_do_not_see_each_other():
    for path in (PACKAGE / "models" / "families").glob("*.py"):
        for name, statement, _, _ in imports_of(path):
            assert not name.startswith("simpletuner.models.families"), f"{path.name}:{statement.lineno}"


def test_data_and_diffusion_do_not_see_models():
    for room in ("data", "diffusion"):
        for path in (PACKAGE / room).rglob("*.py"):
            for name, statement, _, _ in imports_of(path):
                assert not name.startswith("simpletuner.models"), f"{inside(path)}:{statement.lineno}"


def test_our_modules_are_imported_inside_functions_in_commands_alone():
    for path in sources():
        for name, statement, in_function, _ in imports_of(path):
            if in_function and name.startswith("simpletuner"):
                assert inside(path).startswith(("cli/", "__main__")), f"{inside(path)}:{statement.lineno} imports {name} inside a function"


def test_a_library_has_one_room():
    for path in sources():
        for name, statement, _, typing_only in imports_of(path):
            rooms = LIBRARY_ROOMS.get(name.split(".")[0])
            if rooms and not typing_only:
                assert inside(path).startswith(rooms), f"{inside(path)}:{statement.lineno} imports {name}, which lives in {', '.join(rooms)}"


def test_torch_is_not_imported_at_the_top_where_facts_live():
    for path in sources():
        if inside(path).startswith(TORCH_FREE):
            for name, statement, in_function, typing_only in imports_of(path):
                assert in_function or typing_only or name.split(".")[0] != "torch", f"{inside(path)}:{statement.lineno}"


def test_the_facts_of_families_and_tables_load_no_torch():
    families = [f"simpletuner.models.families.{path.stem}" for path in (PACKAGE / "models/families").glob("[!_]*.py")]
    modules = [*families, "simpletuner.options.train_config", "simpletuner.optim.catalogue", "simpletuner.memory.precision", "simpletuner.data.plan"]
    code = "import importlib, sys\n" + "".join(f"importlib.import_module({name!r})\n" for name in modules) + "sys.exit('torch' in sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    assert result.returncode == 0, result.stderr or "torch was imported"


def test_importing_a_file_does_nothing_else():
    harmless = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.TypeAlias if sys.version_info >= (3, 12) else ast.Assign,
    )
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_guard = isinstance(node, ast.If) and any(word in ast.unparse(node.test) for word in ("TYPE_CHECKING", "__main__", "version_info"))
            assert isinstance(node, harmless) or is_docstring or is_guard, f"{inside(path)}:{node.lineno} does something at import"


@pytest.mark.parametrize("folder", ["simpletuner", "tests", "benchmarks"])
def test_no_file_is_over_400_lines(folder):
    long = {path.name: lines for path in (ROOT / folder).rglob("*.py") if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400}

    assert not long


def test_every_file_says_what_it_is_for():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), inside(path)


def test_functions_fit_a_screen():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 80, f"{inside(path)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
