"""Writes a comparison down: report.json, report.md, a self-contained report.html, and lm-eval's samples.

    from adapt_eval.report.page import write_report
    write_report(report, "runs/compare")            # report: the dict of docs/guide.md

Everything is computed from the dict, so a report.json can be rendered again:

    python -m adapt_eval.report.page runs/compare/report.json out_folder
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from adapt.files import marks
from adapt.files.outputs import KeptElsewhere, check_folder, check_new_folder, kept_elsewhere, scratch_beside

from . import plots
from .words import (
    ARM_WORDS,
    ARMS,
    difference,
    headline,
    is_percent,
    number,
    p_words,
    primary,
    score,
    sentences,
    speed_ratio,
    speed_row,
)

Samples = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
_SECTIONS = ("provenance", "quality", "likelihood", "speed", "pareto", "warnings")


def refuse_existing(out: str | Path, overwrite: bool) -> Path:
    """The output folder, tried out before the long work: absent, or a report of ours to replace, beside which a user's notes stay."""
    folder = Path(out)
    if not str(out) or not os.path.lexists(folder):
        return check_new_folder(out)
    if not overwrite:
        raise ValueError(f"out={out}: exists already; name another folder or add --overwrite")
    check_folder(out, "out")
    mark = marks.mark_of(folder)
    if folder.is_symlink() or (mark is None and any(folder.iterdir())):
        raise ValueError(f"out={out}: is no report that we wrote, so --overwrite leaves it alone; name another folder")
    listed = [] if mark is None else list(mark.files or ())
    marks.check_ours(folder, ["report.json", "report.md", "report.html", *listed], "out")
    return folder


def write_report(
    report: Mapping[str, Any],
    out: str | Path,
    *,
    samples: Samples | None = None,
    overwrite: bool = False,
) -> Path:
    """The folder with report.json, report.md, report.html and samples/ARM/TASK.jsonl; complete, or not there at all.

    `samples`: arm -> task -> lm-eval's logged samples. The folder is written beside `out` and renamed; of a report that is
    replaced, file by file, what we wrote. Where that fails, what was measured is kept, and the error names where.
    """
    folder = refuse_existing(out, overwrite)
    missing = [key for key in _SECTIONS if key not in report]
    if missing:
        raise ValueError(f"report: lacks {', '.join(missing)}; a report has {', '.join(_SECTIONS)}")
    clean = finite(report)
    try:
        if folder.exists():
            marks.adopt(folder)
            with scratch_beside(folder.with_name(f"{folder.name}.new")) as scratch:
                marks.replace_contents(folder, _write_files(clean, samples, scratch / "report"))
        else:
            with scratch_beside(folder) as scratch:
                marks.publish_marked(_write_files(clean, samples, scratch / "report"), folder)
    except Exception as error:
        kept = kept_elsewhere("report")
        _write_measured(clean, samples, kept)
        again = f"`python -m adapt_eval.report.page {kept / 'report.json'} FOLDER` writes the pages"
        raise KeptElsewhere(
            f"out={out}: could not be written ({' '.join(str(error).split())[:200]}); what was measured is in {kept}, and {again}"
        ) from error
    return folder


def _write_files(report: Mapping[str, Any], samples: Samples | None, folder: Path) -> Path:
    folder.mkdir()
    _write_measured(report, samples, folder)
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(render_html(report, examples(report, samples)), encoding="utf-8")
    return folder


def _write_measured(report: Mapping[str, Any], samples: Samples | None, folder: Path) -> None:
    """report.json and samples/, from which the pages can be written again."""
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for arm, tasks in (samples or {}).items():
        for task, rows in tasks.items():
            path = folder / "samples" / arm / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', task)}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(finite(row), ensure_ascii=False, default=_plain) for row in rows)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def examples(
    report: Mapping[str, Any],
    samples: Samples | None,
    count: int = 4,
) -> list[dict[str, Any]]:
    """The first items of the headline's task with what each arm answered (text for generation tasks only)."""
    row = primary(report)
    if row is None or not samples:
        return []
    metric, _, filter_name = row["metric"].partition(",")
    by_arm = {
        arm: {s["doc_id"]: s for s in tasks.get(row["task"], []) if s.get("filter", "none") == (filter_name or "none")}
        for arm, tasks in samples.items()
    }
    shown = []
    for doc_id, sample in list(by_arm.get("adapted", {}).items())[:count]:
        answers = []
        for arm in ARMS:
            item = by_arm.get(arm, {}).get(doc_id)
            if item is None:
                continue
            answer = item["resps"][0][0]
            if not isinstance(answer, str):
                return []
            answers.append({"arm": arm, "text": answer.strip(), "right": item.get(metric)})
        prompt = sample["arguments"][0][0]
        shown.append({"prompt": prompt[-600:], "cut": len(prompt) > 600, "target": str(sample["target"]).strip(),
                      "answers": answers})  # fmt: skip
    return shown


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's own; anything else that JSON does not know as text."""
    return value.item() if hasattr(value, "item") else str(value)


# -- rendering ------------------------------------------------------------------------------------------------------


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, p_words=p_words, mib=lambda b: number(b / 2**20 if b else None))
    environment.globals.update(
        score=score, difference=difference, is_percent=is_percent, arm_words=ARM_WORDS, speed_ratio=speed_ratio
    )
    # Not resources.files(__name__): run as a script this module is `__main__`.
    text = resources.files(__package__ or "adapt_eval.report").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown tables, for a pull request or a terminal."""
    return _render("report.md.j2", report=report, headline=headline(report), has_control=_has_control(report))


def render_html(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]] = ()) -> str:
    """The report as one HTML file without outside references; plots are embedded SVG."""
    row = primary(report)
    return _render(
        "report.html.j2",
        report=report,
        sentences=sentences(report),
        primary=row,
        smallest=min((r["batch_size"] for r in report["speed"]), default=None),
        adapted_speed=speed_row(report, "adapted"),
        ratios={arm: speed_ratio(report, arm) for arm in ("base", "control")},
        has_control=_has_control(report),
        examples=shown,
        plots={"quality": plots.quality(report), "speed": plots.speed(report), "pareto": plots.pareto(report)},
        colours=plots.COLOURS,
        provenance=json.dumps(report["provenance"], indent=2, ensure_ascii=False),
    )


def _has_control(report: Mapping[str, Any]) -> bool:
    return any(r.get("control") for r in report["quality"]) or any(r["arm"] == "control" for r in report["speed"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m adapt_eval.report.page REPORT_JSON OUT")
    print(write_report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2]))
