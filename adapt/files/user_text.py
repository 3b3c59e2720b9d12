"""A file that a user names: read once, as a pipe wants it, bounded, and UTF-8; and the YAML and JSON in it, no key twice.

    text = user_text(Path("/dev/fd/63"), "prompts", "a text file with one prompt a line")
    sections = user_yaml(Path("recipe.yaml"), "config", "a recipe")

ValueError: `config=recipe.yaml: is no YAML (line 3: ...); give a recipe`.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from .json_file import no_key_twice

MOST_YAML = 1 << 18  # bytes; the recipes that ship have 2,000
MOST_TEXT = 1 << 28  # bytes
_DEEPEST = 32  # collections inside of each other
_MOST_ALIASES = 8
_OF_VALUES = (OverflowError, ValueError)
"""what PyYAML raises for "\\UFFFFFFFF", a number of thousands of digits, a date that is none"""


def user_text(path: Path, setting: str, wanted: str, most: int = MOST_TEXT) -> str:
    """The text of a file or a pipe. setting: as the user typed it, without the value; wanted: what to give instead."""
    return _decoded(_bytes_of(path, setting, wanted, most), f"{setting}={path}", wanted)


def user_yaml(path: Path, setting: str, wanted: str) -> Any:
    """What a YAML file or pipe holds, as `plain_yaml` reads it."""
    text = user_text(path, setting, wanted, MOST_YAML)
    try:
        return plain_yaml(text)
    except ValueError as error:
        raise ValueError(f"{setting}={path}: is no YAML ({error}); give {wanted}") from None


def plain_yaml(text: str) -> Any:
    """What a YAML text holds; ValueError with what is wrong in it. Anchors, aliases, tags, merges and keys twice are refused."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{problem or 'a character that YAML does not take'}") from None
    except _OF_VALUES as error:
        raise ValueError(str(error)) from None


def user_json(path: Path, setting: str, wanted: str, most: int = MOST_TEXT) -> dict[str, Any]:
    """The JSON object in a file or pipe; the line names what is wrong and where."""
    text = user_text(path, setting, wanted, most)
    try:
        content = json.loads(text, object_pairs_hook=no_key_twice, parse_constant=_no_such_number)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{setting}={path}: not valid JSON (line {error.lineno}: {error.msg}); give {wanted}"
        ) from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{setting}={path}: not valid JSON ({reason}); give {wanted}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{setting}={path}: must hold one JSON object, holds a {type(content).__name__}; give {wanted}"
        )
    return content


def check_user_file(path: Path, setting: str, wanted: str) -> None:
    """ValueError where there is no file or pipe to read; nothing is read, so that a pipe still has all that it says."""
    if "\0" in str(path):
        raise ValueError(f"{setting}={str(path)!r}: holds a null byte; give {wanted}")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        near = _near(path) if isinstance(error, FileNotFoundError) else None
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or "cannot be read"
        raise ValueError(
            f"{setting}={path}: {reason}; {f'did you mean {near}?' if near else f'give {wanted}'}"
        ) from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{setting}={path}: is a folder; give {wanted}")


def _near(path: Path) -> Path | None:
    try:
        beside = [other.name for other in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, beside, n=1)
    return path.with_name(near[0]) if near else None


def _bytes_of(path: Path, setting: str, wanted: str, most: int) -> bytes:
    check_user_file(path, setting, wanted)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)  # never to the end of what has none
    except OSError as error:
        raise ValueError(f"{setting}={path}: {error.strerror or error}; give {wanted}") from None
    if len(content) > most:
        raise ValueError(f"{setting}={path}: is larger than {most >> 10:,} KiB; give {wanted}")
    return content


def _decoded(content: bytes, what: str, wanted: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{what}: is not UTF-8 text (line {line}); give {wanted}") from None


def _no_such_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class _PlainLoader(yaml.SafeLoader):
    """YAML without what makes it dangerous or ambiguous; 1e-4 is a number, and a date is text."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ComposerError(None, None, "anchors and aliases are not read; write it out", event.start_mark)
        if getattr(event, "tag", None) not in (None, "!"):
            raise ComposerError(None, None, f"tags such as {event.tag} are not read", event.start_mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ComposerError(None, None, "is nested too deeply", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                raise ComposerError(None, None, "a key must be a name or a number", key.start_mark)
            name = self.construct_object(key)
            if name in lines:
                twice = f"{key.value} is there twice, the first time in line {lines[name]}; keep one"
                raise ComposerError(None, None, twice, key.start_mark)
            lines[name] = line
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        try:  # JSON, which is YAML, writes a sign beyond the first 65,536 as two halves
            return value.encode("utf-16", "surrogatepass").decode("utf-16") if isinstance(value, str) else value
        except UnicodeDecodeError:
            return value  # a half alone; what reads the setting says so


# YAML 1.1 wants a dot and a signed exponent in a number, which nobody types, and reads 2026-11-24 as no text.
_FLOAT = r"[-+]?(\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def read_value(text: str) -> Any:
    """What a command line's value says, as YAML; ValueError with what is wrong in it. What is no YAML at all is text."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except ComposerError as error:
        raise ValueError(error.problem) from None
    except (yaml.YAMLError, *_OF_VALUES):
        return text


class _PlainDumper(yaml.SafeDumper):
    """Quotes what either reader, this one or PyYAML's own, would take for something else than text."""

    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers.copy()


_PlainDumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def yaml_text(content: Any) -> str:
    """YAML that `user_yaml` reads as the same."""
    return yaml.dump(content, Dumper=_PlainDumper, sort_keys=False)


def overgrown(text: str) -> bool:
    """Whether a text, taken for YAML, is nested so deeply that libyaml ends the process, or made of aliases of aliases."""
    depth = aliases = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent):
                aliases += 1
            if depth > _DEEPEST or aliases > _MOST_ALIASES:
                return True
    except (yaml.YAMLError, *_OF_VALUES):  # so it is a text
        pass
    return False
