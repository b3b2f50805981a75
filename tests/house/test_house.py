"""The shape of the house, kept by tests: sizes, first words, no doors for foreign code, quick verbs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import plugins

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "luthier").rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_LOADS = {"torch.load", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_IMPORTS = {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"}


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_no_function_is_longer_than_sixty_lines_without_its_docstring() -> None:
    long = []
    for path, tree in TREES.items():
        for function in _functions(tree):
            first = function.body[0]
            said = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if said else 0
            length = (function.end_lineno or 0) - function.lineno + 1 - docstring
            if length > 60:
                long.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name} {length}")
    assert not long


def test_every_module_opens_with_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path, tree in TREES.items()
        if path.stat().st_size and not ast.get_docstring(tree)
    ]
    assert not silent


def test_every_package_says_what_shelf_it_is() -> None:
    empty = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.name == "__init__.py" and not path.stat().st_size
    ]
    assert not empty


def test_nothing_is_unpickled_and_no_text_becomes_code() -> None:
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [
                    f"{path.name}:{node.lineno} {name}"
                    for name in modules
                    if name.split(".")[0] in FORBIDDEN_IMPORTS
                ]
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in FORBIDDEN_CALLS
            ):
                found.append(f"{path.name}:{node.lineno} {node.func.id}()")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_LOADS:
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found += [] if ast.unparse(node.value) == "False" else [f"{path.name}:{node.value.lineno}"]
    assert not found


def test_no_handler_is_bare_and_none_is_silent() -> None:
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            catches_all = isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) == "BaseException"
            )
            if catches_all and ast.unparse(node.body[-1]) != "raise":
                found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_engine_inference_and_forecast_know_no_part_by_name() -> None:
    names = {name for family in plugins.FAMILIES for name in plugins.names(family)}
    found = []
    for path, tree in TREES.items():
        if path.parent.name in {"engine", "inference", "forecast"}:
            docstrings = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}  # type: ignore[attr-defined]
            found += [
                f"{path.name}:{node.lineno} {node.value!r}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and node.value in names and id(node) not in docstrings
            ]
    assert not found


def _has_docstring(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    return bool(isinstance(body, list) and body and isinstance(body[0], ast.Expr))


def test_no_module_is_called_utils_and_no_class_a_manager() -> None:
    assert not [path for path in SOURCES if path.stem in {"utils", "helpers", "common", "misc"}]
    classes = [
        node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    assert not [name for name in classes if name.endswith(("Manager", "Helper", "Base", "Mixin"))]


def test_an_everyday_verb_never_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys, luthier, luthier.cli\n"
        "luthier.runs(home=sys.argv[1]), luthier.releases(home=sys.argv[1]), luthier.parts()\n"
        "heavy = {'torch', 'transformers', 'peft', 'sklearn', 'scipy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_import_rules_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    if not linter.exists():
        pytest.skip("import-linter is not installed: pip install -e '.[dev]'")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
