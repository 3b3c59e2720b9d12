"""A part of this package as files that need only torch and transformers: what some of its functions use, and nothing else.

An export carries its decoding code with it, so that it runs where this package is not installed. That code is not a second
copy to be kept: it is cut out of these very modules when the export is written, definition by definition, unchanged.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import __version__

_AVAILABLE = {"torch", "transformers", *sys.stdlib_module_names}
Imported = dict[str, tuple[str, str]]  # name here -> (module of this package, its name there)


@dataclass
class _Module:
    """A module's statements, and which of them are wanted."""

    name: str
    lines: list[str]
    statements: list[ast.stmt]
    defined: dict[str, list[int]]
    """name -> the statements that make it"""
    imported: Imported
    foreign: dict[str, str]
    """name -> the package that it comes from"""
    wanted: set[int] = field(default_factory=set)
    used: set[str] = field(default_factory=set)


def standalone(entry: str, names: list[str]) -> dict[str, str]:
    """{module: source} of all that `names` of this package's module `entry` need, cut out of the modules they stand in.

    Imports of one module by another stay relative. AssertionError if something needs a package that is neither torch,
    transformers nor Python's own: that is for us to mend.
    """
    modules: dict[str, _Module] = {}
    open_names = [(entry, name) for name in names]
    while open_names:
        module_name, name = open_names.pop()
        assert module_name, f"`from . import {name}` is not found by transformers; import from that module by name"
        if module_name not in modules:
            module = modules[module_name] = _parsed(module_name)
            for i, statement in enumerate(module.statements):
                if isinstance(statement, ast.Expr) and not _is_string(statement):
                    open_names += _want(module, i)  # registers something when imported
        module = modules[module_name]
        if name in module.imported:
            open_names.append(module.imported[name])
        else:
            assert name in module.defined, f"{module_name}.{name} is not defined at the top of its module"
            for i in module.defined[name]:
                open_names += _want(module, i)
    return {name: _source(module, modules) for name, module in modules.items()}


def _parsed(name: str) -> _Module:
    text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    module = _Module(name, text.splitlines(), ast.parse(text).body, {}, {}, {})
    for i, statement in enumerate(module.statements):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            module.defined[statement.name] = [i]
        elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    module.defined.setdefault(node.id, []).append(i)
        elif isinstance(statement, ast.ImportFrom) and statement.level:
            module.imported |= _names_of(statement)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias in statement.names:
                of = alias.name if isinstance(statement, ast.Import) else str(statement.module)
                module.foreign[alias.asname or alias.name.partition(".")[0]] = of.partition(".")[0]
        else:
            assert isinstance(statement, ast.Expr) or _is_for_types(statement), f"{name}.py: {ast.unparse(statement)}"
    return module


def _is_string(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def _names_of(statement: ast.ImportFrom) -> Imported:
    assert statement.level == 1, "the modules of this package lie in one folder"
    return {alias.asname or alias.name: (statement.module or "", alias.name) for alias in statement.names}


def _want(module: _Module, i: int) -> list[tuple[str, str]]:
    """Takes a statement in; (module, name) of what it uses in turn."""
    if i in module.wanted:
        return []
    module.wanted.add(i)
    uses: list[tuple[str, str]] = []
    for node in ast.walk(module.statements[i]):
        if isinstance(node, ast.ImportFrom) and node.level:
            uses += _names_of(node).values()
        elif isinstance(node, ast.Name):
            module.used.add(node.id)
            if node.id in module.imported:
                uses.append(module.imported[node.id])
            elif node.id in module.defined:
                uses.append((module.name, node.id))
            elif node.id in module.foreign:
                package = module.foreign[node.id]
                assert package in _AVAILABLE, f"{module.name}.py: decoding needs {package}, which an export may not"
    return uses


def _source(module: _Module, modules: dict[str, _Module]) -> str:
    text = [f"# From adapt-dlm {__version__}, adapt/{module.name}.py: what decoding needs of it, unchanged.", ""]
    end, new_group = 0, False
    for i, statement in enumerate(module.statements):
        # What stands above a statement is its comment; a string below an assignment is its docstring.
        above = module.lines[end : statement.lineno - 1]
        lines = module.lines[end : statement.end_lineno]
        end = statement.end_lineno or end
        if i in module.wanted or (_is_string(statement) and (i == 0 or i - 1 in module.wanted)):
            text += lines
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            kept = _import(statement, _used(module, modules))
            new_group = new_group or bool(above)
            if kept:
                text += ["", *kept] if new_group else kept
                new_group = False
        elif isinstance(statement, ast.If):
            text += _type_imports(statement, module, modules)
    return "\n".join(text).rstrip() + "\n"


def _used(module: _Module, modules: dict[str, _Module]) -> set[str]:
    blocks = [s for s in module.statements if isinstance(s, ast.If) and _type_imports(s, module, modules)]
    return module.used | {"annotations"} | ({"TYPE_CHECKING"} if blocks else set())


def _import(statement: ast.stmt, used: set[str]) -> list[str]:
    assert isinstance(statement, (ast.Import, ast.ImportFrom))
    kept = [alias for alias in statement.names if (alias.asname or alias.name.partition(".")[0]) in used]
    if not kept:
        return []
    copy = ast.ImportFrom(**vars(statement)) if isinstance(statement, ast.ImportFrom) else ast.Import(**vars(statement))
    copy.names = kept
    return [ast.unparse(copy)]


def _type_imports(block: ast.If, module: _Module, modules: dict[str, _Module]) -> list[str]:
    """Imports for annotations alone, of what is there for other reasons."""
    lines: list[str] = []
    for statement in block.body:
        used = module.used
        if isinstance(statement, ast.ImportFrom) and statement.level:
            target = modules.get(statement.module or "")
            used = (
                used & {name for name, made in target.defined.items() if target.wanted & set(made)} if target else set()
            )
        lines += _import(statement, used)
    return ["", "if TYPE_CHECKING:", *(f"    {line}" for line in lines)] if lines else []
