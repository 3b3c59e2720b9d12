"""What a setting may be: bounds beside every number, values held to them, and refusals before torch is there."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt.arguments import CommandParser
from adapt.conversion import settings as of_conversion
from adapt.decoding.settings import SamplerConfig
from adapt.files.user_text import user_json, user_text, user_yaml, yaml_text
from adapt.settings.bounds import Bounds, Device, MayBeEmpty, Rows, Seed, check_settings, check_value, hints, undeclared
from adapt.spec import DiffusionSpec
from adapt.training.command import _names_of
from adapt.training.model_section import LoraConfig, ModelConfig
from adapt.training.recipe import Recipe, parse_recipe, recipe_sections
from adapt.training.sections import DataConfig, NoiseConfig, ObjectiveConfig, TrainingConfig
from adapt_eval import checks, model_args

SECTIONS = (
    DataConfig,
    DiffusionSpec,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    SamplerConfig,
    TrainingConfig,
)
MINIMAL = {
    "model": {"base": "some/model"},
    "data": {"train": "owner/rows"},
    "training": {"output_dir": "out", "num_steps": 3},
}

# -- every number has bounds ------------------------------------------------------------------------------------------


def test_a_section_cannot_have_a_number_without_bounds() -> None:
    @dataclasses.dataclass
    class Section:
        num_steps: list[int] | None = None

        def __post_init__(self) -> None:
            check_settings(self, "")

    with pytest.raises(AssertionError, match=r"Section.num_steps: a number needs bounds"):
        Section()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_holds_its_fields_to_their_types(section: type) -> None:
    needed = {"base": "x", "train": "x", "output_dir": "x", "attention": "prefix", "mask_token_id": 0}
    given = {name: value for name, value in needed.items() if name in hints(section)}
    with pytest.raises(ValueError, match=r"=\{\}: must be"):
        section(**{**given, next(reversed(hints(section))): {}})


@pytest.mark.parametrize("table", [of_conversion.SETTINGS, checks.SETTINGS, model_args.HINTS])
def test_every_number_of_a_table_of_settings_has_bounds(table: dict[str, Any]) -> None:
    assert not [name for name, hint in table.items() if undeclared(hint)]


def test_an_option_cannot_be_a_number_without_bounds() -> None:
    with pytest.raises(AssertionError, match="--gpus: a number needs bounds"):
        CommandParser(prog="adapt nothing").option("--gpus", type=int | None, default=None)


@pytest.mark.parametrize(
    "hint", [int, float, int | None, list[int], dict[str, Annotated[int, "no bounds"]], dict[int, Rows]]
)
def test_a_number_without_bounds_is_seen_wherever_it_stands(hint: Any) -> None:
    assert undeclared(hint)


@pytest.mark.parametrize("hint", [Rows, Rows | None, list[Rows], dict[Seed, Rows], str, bool, Literal[1, 2], Any])
def test_what_is_no_number_or_has_bounds_is_declared(hint: Any) -> None:
    assert not undeclared(hint)


# -- values -----------------------------------------------------------------------------------------------------------

_OPEN = Annotated[float, Bounds(0, 1, low_is_open=True, high_is_open=True)]


@pytest.mark.parametrize(
    "value, hint, obstacle",
    [
        (True, Rows, "s=True: must be a whole number"),
        (1.0, Rows, "s=1.0: must be a whole number"),
        ("8", Rows | None, "s=8: must be a whole number"),
        (0, Rows, "s=0: must be from 1 to 1,048,576"),
        (2**70, Rows, "s=1180591620717411303424: must be from 1 to 1,048,576"),
        pytest.param(10**5000, Rows, "s=a number of thousands of digits: must be from 1 to 1,048,576", id="huge"),
        (math.nan, _OPEN, "s=nan: must be above 0 and below 1"),
        (-math.inf, _OPEN, "s=-inf: must be above 0 and below 1"),
        (0.0, _OPEN, "s=0.0: must be above 0 and below 1"),
        (1, _OPEN, "s=1: must be above 0 and below 1"),
        (False, _OPEN, "s=False: must be a number"),
        ("no", bool | None, "s=no: must be true or false"),
        (0, bool, "s=0: must be true or false"),
        ([1, True], list[Rows], "s=[1, True]: True in it must be a whole number"),
        ({"a": math.nan}, dict[str, _OPEN | str], "s={'a': nan}: nan in it must be above 0 and below 1"),
        ({0: 1}, dict[Rows, Rows], "s={0: 1}: 0 in it must be from 1 to 1,048,576"),
        (None, str, "s=None: must be text"),
        (3, str | list[str], "s=3: must be text or a list"),
        (" ", str, "s=' ': is empty; write something, or leave it out"),
        ("a\0b", str, "s='a\\x00b': holds a null byte; take it out"),
        ("\ud800", str, "s='\\ud800': is not UTF-8 text (a lone surrogate); write it in UTF-8"),
        ("x" * 99, Literal["x"], f"s={'x' * 60} ... (99 characters): choose one of x"),
        ("gpu 0", Device, "s=gpu 0: give cpu, cuda or cuda:N"),
    ],
)
def test_a_value_that_is_not_allowed_is_told_with_what_is(value: Any, hint: Any, obstacle: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_value("s", value, hint)
    assert str(refused.value) == obstacle


@pytest.mark.parametrize(
    "value, hint",
    [
        (1, Rows),
        (1, _OPEN | Rows),
        (None, Rows | None),
        ("", MayBeEmpty),
        ("cuda:7", Device),
        ({}, dict[str, Rows]),
        (False, bool),
    ],
)
def test_a_value_that_is_allowed_passes(value: Any, hint: Any) -> None:
    check_value("s", value, hint)


@given(st.floats(), st.booleans(), st.booleans())
@settings(deadline=None)
def test_no_bounds_hold_what_is_not_finite(value: float, low: bool, high: bool) -> None:
    hint = Annotated[float, Bounds(-1e9, 1e9, low, high)]
    if math.isfinite(value) and abs(value) < 1e9:
        check_value("s", value, hint)
    elif not math.isfinite(value) or abs(value) > 1e9:
        with pytest.raises(ValueError, match="s="):
            check_value("s", value, hint)


# -- files of a user --------------------------------------------------------------------------------------------------

NO_YAML = {
    "a key twice": ("a: {b: 1, c: 2, b: 3}", r"line 1: b is there twice, the first time in line 1; keep one"),
    "a section twice": ("a:\n  b: 1\na:\n  c: 1\n", "line 3: a is there twice, the first time in line 1; keep one"),
    "one number twice": ("{0: 1, 00: 2}", "line 1: 00 is there twice"),
    "an anchor": ("a: &x 1", "line 1: anchors and aliases are not read"),
    "an alias": ("a: *x", "line 1: anchors and aliases are not read"),
    "a merge": ("<<: {a: 1}", "line 1: a key must be a name or a number"),
    "a tag": ("a: !!python/object/apply:os.system [true]", "tags such as .*os.system are not read"),
    "a tag that PyYAML trips over": ("a: !!timestamp x", "line 1: tags such as .*timestamp are not read"),
    "a list for a key": ("? [a]\n: b", "a key must be a name or a number"),
    "a deep one": ("[" * 5000, "nested too deeply"),
    "a deep one of dashes": ("- " * 5000, "nested too deeply"),
    "a number of thousands of digits": ("a: " + "9" * 5000, "is no YAML"),
    "a character beyond Unicode": ('a: "\\UFFFFFFFF"', "is no YAML"),
    "a character just beyond it": ('a: "\\U00110000"', "is no YAML"),
    "open": ("a: [1", "is no YAML"),
    "two documents": ("a: 1\n---\na: 2", "is no YAML"),
    "a control character": ("a: \x07", "is no YAML"),
    "a tab": ("a:\n\tb: 1", r"line 2: found character '\\t'"),
    "too large": ("#" * (1 << 18) + "\n", "is larger than 256 KiB"),
}


@pytest.mark.parametrize("text, reason", NO_YAML.values(), ids=NO_YAML)
def test_yaml_that_is_dangerous_or_ambiguous_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as refused:
        user_yaml(path, "config", "a recipe")
    assert str(refused.value).startswith(f"config={path}: ")
    assert str(refused.value).endswith("; give a recipe")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"a: 1\nb: \xff", r"is not UTF-8 text \(line 2\)"),
        (b"\x00", "is no YAML"),
        (b"\xfe\xff\x00a", "is not UTF-8 text"),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        user_yaml(tmp_path / "f", "config", "a recipe")


@pytest.mark.parametrize("path, reason", [(".", "is a folder"), ("none.yaml", "no such file"), ("/dev/zero", "is larger than"),
                                          ("a\0b", "null byte"), ("x" * 300, "File name too long")])  # fmt: skip
def test_what_is_no_file_or_has_no_end_is_refused(path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        user_yaml(Path(path), "config", "a recipe")


def test_the_nearest_name_is_said(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ValueError, match=r"recipes.yaml: no such file; did you mean .*recipe.yaml\?"):
        user_text(tmp_path / "recipes.yaml", "config", "a recipe")


NO_JSON = {
    "a key twice": ('{"a": 1, "a": 2}', "'a' is there twice"),
    "a list": ("[1]", "holds a list"),
    "no number": ('{"a": NaN}', "NaN is no number"),
    "deep": ("[" * 10**5, "not valid JSON"),
    "open": ('{"a"', "line 1: "),
    "long": ("9" * 5000, "not valid JSON"),
}


@pytest.mark.parametrize("text, reason", NO_JSON.values(), ids=NO_JSON)
def test_json_that_is_ambiguous_or_no_object_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        user_json(tmp_path / "ds.json", "deepspeed", "DeepSpeed's config")


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)


@given(
    st.dictionaries(
        st.text("abc1e_-.", min_size=1), _scalars | st.lists(_scalars) | st.dictionaries(st.integers(0, 9), _scalars)
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_what_is_written_is_read_as_the_same(tmp_path: Path, content: dict) -> None:
    (tmp_path / "saved.yaml").write_text(yaml_text(content), encoding="utf-8")
    assert user_yaml(tmp_path / "saved.yaml", "config", "a recipe") == content


# -- recipes ----------------------------------------------------------------------------------------------------------


def _pipe(folder: Path, text: str) -> Path:
    path = folder / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=(text,), daemon=True).start()
    return path


def test_a_recipe_may_be_a_pipe_which_is_read_once(tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(_pipe(tmp_path, json.dumps(MINIMAL))), "--training.seed", "3"])
    assert (recipe.training.num_steps, recipe.training.seed) == (3, 3)


def test_prompts_may_be_a_pipe(tmp_path: Path) -> None:
    assert user_text(_pipe(tmp_path, "one\ntwo\n"), "prompts", "a text file") == "one\ntwo\n"


BAD_VALUES = [
    True,
    "no",
    "64",
    0.5,
    -1,
    2**80,
    math.inf,
    math.nan,
    "",
    "a\0b",
    "\ud800",
    [],
    {},
    [True],
    {"a": [1]},
    None,
]


def _settings_of(section: type) -> list[str]:
    return sorted(hints(section))


def _allowed(hint: Any, value: Any) -> bool:
    try:
        check_value("s", value, hint)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("section", ["data", "model", "noise", "objective", "training"])
def test_every_setting_of_a_recipe_refuses_what_its_type_does_not_say(tmp_path: Path, section: str) -> None:
    """Some 500 values, each refused in one line that names it."""
    file = tmp_path / "recipe.yaml"
    for name, hint in hints(hints(Recipe)[section]).items():
        for value in BAD_VALUES:
            if not _allowed(hint, value) and not (name == "lora" and value == {}):
                file.write_text(yaml_text({section: {name: value}}), encoding="utf-8")
                line = _refusal(lambda: recipe_sections(file))
                assert (line or "").startswith(f"config={file}: "), (name, value)
                assert f"{section}.{name}" in (line or ""), (name, value, line)


def _refusal(call: Callable[[], object]) -> str | None:
    """The words of the ValueError, in one line; None where there is none."""
    try:
        call()
    except ValueError as error:
        return _single(str(error))
    return None


def _single(line: str) -> str:
    assert len(line.rstrip("\n").split("\n")) == 1, line
    return line


def _parsed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> Recipe | str:
    """The recipe, or the one line that refuses it."""
    try:
        return parse_recipe(argv)
    except ValueError as error:
        return _single(str(error))
    except SystemExit:
        return _single(capsys.readouterr().err)


def _outcome(folder: Path, content: object, capsys: pytest.CaptureFixture[str]) -> Recipe | str:
    (folder / "recipe.yaml").write_text(yaml_text(content), encoding="utf-8")
    return _parsed(["--config", str(folder / "recipe.yaml")], capsys)


_names = st.sampled_from([name for section in ("data", "model", "noise", "objective", "training")
                          for name in (section, *_settings_of(hints(Recipe)[section]))])  # fmt: skip
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["auto", "block", "nelbo", "class_path"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(_names | st.text(max_size=5), _values, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_no_recipe_ends_in_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict) -> None:
    _outcome(tmp_path, {**MINIMAL, **changes}, capsys)
    _outcome(tmp_path, changes, capsys)
    for section in MINIMAL:
        _outcome(tmp_path, {**MINIMAL, section: {**MINIMAL[section], **changes}}, capsys)


@given(st.text() | st.binary())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_no_file_taken_for_a_recipe_ends_in_a_traceback(tmp_path: Path, capsys, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (tmp_path / "recipe.yaml").write_bytes(data)
    assert isinstance(_parsed(["--config", str(tmp_path / "recipe.yaml")], capsys), str)


def test_a_recipe_written_as_json_keeps_its_signs(tmp_path: Path) -> None:
    content = {**MINIMAL, "training": {**MINIMAL["training"], "sample_prompt": "\U0001f600 \u00e9"}}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    assert parse_recipe(["--config", str(tmp_path / "recipe.json")]).training.sample_prompt == "\U0001f600 \u00e9"


def test_a_text_that_looks_like_a_number_is_saved_as_text(tmp_path: Path) -> None:
    columns = {"prompt": "1e4", "completion": "2026-11-24"}
    recipe = Recipe(ModelConfig("a"), DataConfig("b", columns=columns), TrainingConfig("c", num_steps=1))
    recipe.save(tmp_path / "config.yaml")
    assert parse_recipe(["--config", str(tmp_path / "config.yaml")]) == recipe


@pytest.mark.parametrize("argument", ["[" * 30_000, "{a: " * 20_000, "- " * 30_000, "a\0b", "\udcff", "9" * 5000, "!!timestamp x",
                                      "!!int", "&a [*a]", "1:99:99", "0x", "{1: 2, 1: [}", '"\\UFFFFFFFF"',
                                      '"\\UFFFFFFFF' + "x" * 80 + '"'], ids=lambda argument: ascii(argument)[:24])  # fmt: skip
def test_an_argument_that_no_reader_takes_is_one_line(capsys: pytest.CaptureFixture[str], argument: str) -> None:
    """libyaml ends the process at 30,000 brackets."""
    for option in ("--training.num_steps", "--objective.block_sizes", "--model.shift_logits"):
        argv = ["--model.base", "a/b", "--data.train", "a/b", "--training.output_dir", "o", option, argument]
        assert isinstance(_parsed(argv, capsys), str)


@given(
    st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(SamplerConfig)]), _values, max_size=6)
)
@settings(deadline=None)
def test_no_sampler_ends_in_anything_but_a_value_error(changes: dict) -> None:
    assert (_refusal(lambda: SamplerConfig(**changes)) or "sampler.").startswith("sampler.")


@given(st.dictionaries(st.sampled_from(sorted(hints(DiffusionSpec))), _values, max_size=8))
@settings(deadline=None)
def test_no_section_of_a_checkpoint_ends_in_anything_but_a_value_error(changes: dict) -> None:
    section = {"attention": "prefix", "mask_token_id": 0, **changes}
    assert (_refusal(lambda: DiffusionSpec(**section)) or "diffusion.").startswith("diffusion.")


@given(st.dictionaries(st.sampled_from(sorted(model_args.MODEL_ARGS)) | st.text(max_size=4), _values, max_size=6))
@settings(deadline=None)
def test_no_model_args_end_in_anything_but_a_value_error(changes: dict) -> None:
    line = _refusal(lambda: model_args.check_model_args(changes))
    assert line is None or "=" in line or line.startswith("model_args: unknown")


# -- before torch is there --------------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Path], list[str]]] = {
    "convert": lambda yard: [str(yard / "nowhere"), str(yard / "out")],
    "plan": lambda yard: ["--config", str(yard / "recipe.yaml"), "--reserve", "2"],
    "train": lambda yard: ["--config", str(yard / "recipe.yaml"), "--training.learning_rate", ".inf"],
    "plot": lambda yard: [str(yard / "nowhere")],
    "generate": lambda yard: [str(yard / "nowhere"), "--prompt", "a"],
    "compare": lambda yard: ["--base", "./a", "--adapted", "./b", "--tasks", "c", "--out", str(yard / "out")],
    "lm_eval": lambda yard: ["--model", "adapt", "--model_args", "pretrained=./a,threshold=2", "--tasks", "c"],
    "export": lambda yard: [str(yard / "nowhere"), str(yard / "out")],
    "doctor": lambda yard: ["--ranks", "0"],
    "quickstart": lambda yard: ["--minutes", "0"],
}
_CODE = """
import json, sys
from adapt import cli
for argv in json.loads(sys.argv[1]):
    try:
        code = cli.main(argv)
    except SystemExit as exited:
        code = exited.code
    assert code == (0 if "--help" in argv else code) and code in (0, 1, 2), (argv, code)
    heavy = {"torch", "transformers", "datasets", "accelerate"} & set(sys.modules)
    assert not heavy, (argv, heavy)
"""


@pytest.mark.parametrize("file, enum", [("trainer_utils", "SchedulerType"), ("training_args", "OptimizerNames")])
def test_names_that_transformers_knows_are_read_without_importing_it(file: str, enum: str) -> None:
    known = getattr(importlib.import_module(f"transformers.{file}"), enum)
    assert _names_of(f"{file}.py", enum) == sorted({name.value for name in known})


def test_help_and_a_refusal_of_every_verb_come_before_torch_is_imported(tmp_path: Path) -> None:
    from adapt.cli import VERBS

    (tmp_path / "recipe.yaml").write_text(json.dumps(MINIMAL))
    assert set(REFUSED) == set(VERBS)
    calls = [call for verb, refused in REFUSED.items() for call in ([verb, "--help"], [verb, *refused(tmp_path)])]
    done = subprocess.run([sys.executable, "-c", _CODE, json.dumps(calls)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("adapt ")]
    assert [line.split(":")[0] for line in lines] == [f"adapt {verb}" for verb in REFUSED], done.stderr
