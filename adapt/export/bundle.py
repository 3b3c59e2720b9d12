"""The decoding code of an export: a module of this package and all that it imports of it, copied whole.

transformers looks for the modules of a `custom_generate/` in one flat folder, so `attention/mask.py` becomes `attention_mask.py` and
imports say so; nothing else is changed. What may be imported there is kept by the rooms: decoding, probe, model, attention, noise
and spec need torch and transformers alone.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from .. import __version__

_ROOT = Path(__file__).parents[1]
_AVAILABLE = {"__future__", "torch", "transformers", *sys.stdlib_module_names}


def bundle(entry: str) -> dict[str, str]:
    """{name in the flat folder: source} of the module `entry` ("export.custom_generate") and of all that it imports from here.

    AssertionError if one of them needs a package that is neither torch, transformers nor Python's own: that is for us to mend.
    """
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if flat_name(module) not in sources:
            source, imported = _flattened(module)
            sources[flat_name(module)] = source
            waiting += imported
    return sources


def flat_name(module: str) -> str:
    """`attention.mask` -> `attention_mask`."""
    return module.replace(".", "_")


def _flattened(module: str) -> tuple[str, list[str]]:
    """(the module's source for the flat folder, the modules of this package that it imports)."""
    path = _ROOT / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            foreign = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            foreign = [str(node.module)]
        elif isinstance(node, ast.ImportFrom):
            assert node.module, (
                f"{path}: `from . import x` is not found by transformers; import from that module by name"
            )
            target = ".".join([*module.split(".")[: -node.level], node.module])
            spelled = f"from {'.' * node.level}{node.module} import"
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(spelled, f"from .{flat_name(target)} import")
            imported.append(target)
            continue
        else:
            continue
        alien = {name.partition(".")[0] for name in foreign} - _AVAILABLE
        assert not alien, f"{path}: decoding needs {', '.join(alien)}, which an export may not"
    return f"# From adapt-dlm {__version__}, adapt/{module.replace('.', '/')}.py\n{''.join(lines)}", imported
