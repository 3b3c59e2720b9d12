"""Runs a notebook's cells in this process and keeps what they show; a kernel and its packages are not needed for that.

python benchmarks/run_notebook.py examples/refinement.ipynb
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import io
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock


def execute(notebook: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The notebook with the outputs of its cells: what is printed, and the value of a last expression.

    Run in the notebook's folder, with `environment` added to this process' own. Whatever a cell raises is raised.
    """
    made = copy.deepcopy(json.loads(notebook.read_text()))
    names: dict[str, Any] = {"__name__": "__main__"}
    folder, here = notebook.parent.resolve(), Path.cwd()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, environment or {}), mock.patch.object(sys, "path", [str(folder), *sys.path]):
            for number, cell in enumerate((c for c in made["cells"] if c["cell_type"] == "code"), start=1):
                cell["execution_count"] = number
                cell["outputs"] = _outputs("".join(cell["source"]), names, number)
    finally:
        os.chdir(here)
    return made


def _outputs(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Of one cell, in the notebook's format."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
        )
    if value is not None:
        outputs.append(
            {"data": _data(value), "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        )
    return outputs


def _data(value: Any) -> dict[str, Any]:
    if hasattr(value, "_repr_png_"):
        return {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": ["a picture"]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(json.dumps(execute(file), indent=1, ensure_ascii=False) + "\n")
