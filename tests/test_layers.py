"""The house rules that a linter does not know: which way imports point, and how long things get."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent

# Each layer, and the layers it may import besides itself; all may import onelabel and onelabel.errors.
ALLOWED: dict[str, set[str]] = {
    "onelabel": {"tasks"},  # for type checkers: at run time when it is asked for, see test_package.py
    "configs": set(),
    "imaging": {"configs"},
    "models": {"configs", "imaging"},
    "tasks": {"configs", "imaging", "models"},
    "cluster": {"configs"},
    "orchestrator": {"configs", "imaging", "models", "tasks", "cluster"},
}
THIRD_PARTY: dict[str, set[str]] = {
    "ray": {"tasks", "cluster", "orchestrator"},
    "torch": {"imaging", "models", "tasks", "orchestrator"},
}
# Hands what it catches to the driver, which raises it: Ray Data would take it for a worker's death.
HANDS_ON = {"tasks/score_pool.py"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

CODE = [path for folder in ALLOWED for path in sorted((REPO / folder).rglob("*.py"))]
ALL = CODE + [path for folder in ("tests", "benchmarks") for path in sorted((REPO / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported anywhere in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            elif node.module == "onelabel":
                yield from (f"onelabel.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def import_faults(path: Path, tree: ast.AST) -> list[str]:
    layer = path.relative_to(REPO).parts[0]
    faults = []
    for module in imported(tree):
        top, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if not top:
            faults.append("a relative import")
        elif top in ALLOWED and top != "onelabel":
            faults.append(f"a bare import of {module}")
        elif top == "mlflow" and name(path) != "orchestrator/tracking.py":
            faults.append(f"{module}, which belongs in orchestrator/tracking.py")
        elif top in THIRD_PARTY and layer in ALLOWED and layer not in THIRD_PARTY[top]:
            faults.append(f"{module}, which {layer} must do without")
        elif top == "onelabel" and layer in ALLOWED and target in ALLOWED and target not in ALLOWED[layer] | {layer}:
            faults.append(f"{module}, which lies above or beside {layer}")
    return faults


def catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(item, ast.Name) and item.id in {"Exception", "BaseException"} for item in caught)


def prints(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


@pytest.mark.parametrize("path", ALL, ids=name)
def test_imports_point_down(path: Path) -> None:
    # Tests and benchmarks may import any layer, but by its one name.
    assert import_faults(path, parse(path)) == []


@pytest.mark.parametrize("path", ALL, ids=name)
def test_files_and_functions_stay_short(path: Path) -> None:
    file_lines = path.read_bytes().count(b"\n")
    assert file_lines <= MAX_FILE_LINES
    long = {
        node.name: lines
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


@pytest.mark.parametrize("path", ALL, ids=name)
def test_nothing_catches_everything(path: Path) -> None:
    handlers = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ExceptHandler)]
    caught = [node.lineno for node in handlers if catches_everything(node)]
    assert len(caught) == (name(path) in HANDS_ON), f"in lines {caught}"


@pytest.mark.parametrize("path", [path for path in ALL if path.parent.name != "benchmarks"], ids=name)
def test_only_the_command_line_prints(path: Path) -> None:
    if name(path) != "orchestrator/cli.py":
        assert [node.lineno for node in ast.walk(parse(path)) if prints(node)] == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("models", "import ray.train"),
        ("models", "def f():\n    from onelabel.tasks.train import fit"),
        ("tasks", "from onelabel import orchestrator"),
        ("tasks", "from onelabel.cluster.runtime import connect"),
        ("configs", "import torch"),
        ("imaging", "from onelabel.models.losses import dice"),
        ("orchestrator", "import mlflow"),
        ("orchestrator", "from models.losses import dice"),
        ("cluster", "from . import runtime"),
        ("tests", "from tasks import cohort"),
    ],
)
def test_a_fault_is_found(layer: str, source: str) -> None:
    assert len(import_faults(REPO / layer / "sample.py", ast.parse(source))) == 1
