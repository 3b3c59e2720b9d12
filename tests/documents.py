"""What a document tells its reader to type: the command lines of its ```bash blocks, the files of its ```yaml blocks, its links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HISTORY = {"log.md", "ablations.md", "architectures.md"}  # what was run then; their commands belong to their revisions
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in HISTORY),
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """One command of a line, split as a shell does."""

    line: int
    environment: dict[str, str]
    argv: list[str]
    output: str | None = None
    """the file that its standard output goes to"""

    def __str__(self) -> str:
        return f"line {self.line}: {shlex.join(self.argv)}"


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(number of its first line, body) of each fenced block of that language."""
    found = [(text[: m.start()].count("\n") + 2, m[1], m[2]) for m in _FENCE.finditer(text)]
    return [(line, body) for line, name, body in found if name == language]


def commands(text: str) -> list[Command]:
    """The commands of a document's ```bash blocks, in their order; of a pipe each part."""
    found = []
    for first, body in blocks(text, "bash"):
        start, typed = 0, ""
        for number, line in enumerate(body.splitlines()):
            typed = f"{typed}\n{line}" if typed else line
            if typed.endswith("\\"):  # goes on
                continue
            try:
                words = shlex.split(typed.replace("\\\n", " "), comments=True)
            except ValueError:  # a quotation goes on
                continue
            found += [_command(first + start, part) for part in _parts(words)]
            start, typed = number + 1, ""
        assert not typed, f"line {first + start}: does not end: {typed}"
    return found


def inline_commands(text: str) -> list[Command]:
    """The commands and options that stand as `code` in a sentence or a table: `adapt export CKPT OUT`, `--data.train FILE`."""
    prose = _FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
    spans = [(prose[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"`([^`\n]+)`", prose)]
    typed = ("adapt ", "deepspeed ", "sbatch ", "python ", "make ", "--", "launch/")
    return [_command(line, shlex.split(code)) for line, code in spans if code.startswith(typed) and " " in code]


def named_files(text: str) -> dict[str, str]:
    """name -> body of the ```yaml blocks that begin with a comment that names a file, such as `# my_recipe.yaml`."""
    files = {}
    for _, body in blocks(text, "yaml"):
        if name := re.match(r"# ([\w/.-]+\.yaml)\b", body):
            files[name[1]] = body
    return files


def links(text: str) -> list[str]:
    """The targets of a document's links and pictures, without those inside code."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)


def anchors(text: str) -> set[str]:
    """What `#anchor` may name: GitHub's slugs of the headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _parts(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("|", "&&", ";"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def _command(line: int, words: list[str]) -> Command:
    environment = {}
    while words and re.match(r"[A-Z]\w*=", words[0]):
        name, value = words[0].split("=", 1)
        environment[name], words = value, words[1:]
    output = None
    if ">" in words:
        at = words.index(">")
        output, words = words[at + 1], words[:at]
    return Command(line, environment, words, output)
