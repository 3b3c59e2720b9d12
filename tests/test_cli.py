"""The `adapt` command: one line for the user's mistakes, and one for ours, which names the file with the traceback."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from email.message import Message
from pathlib import Path

import pytest

from adapt import cli
from adapt.doctor import bug_report

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FAKE_VERBS = """
import json, sys, yaml

def echo(argv):
    print(argv)

def three(argv):
    return 3

def usage(argv):
    raise SystemExit(2)

def missing_extra(argv):
    raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval.api")

def missing_other(argv):
    raise ModuleNotFoundError("No module named 'adapt.nowhere'", name="adapt.nowhere")

def setting(argv):
    raise ValueError("objective.block_size=48 must divide data.seq_len=2048;\\n  try 32 or 64")

def no_file(argv):
    open("nowhere/at all.yaml")

def bad_json(argv):
    json.loads("{")

def bad_yaml(argv):
    yaml.safe_load("a: [1")

def empty(argv):
    raise ValueError

def bug(argv):
    raise TypeError("ours")

def bottomless(argv):
    bottomless(argv)

class _Wordless(Exception):
    def __str__(self):
        raise RuntimeError

def wordless(argv):
    raise _Wordless

def greedy(argv):
    raise MemoryError

def interrupt(argv):
    raise KeyboardInterrupt

def flood(argv):
    while True:
        print("x" * 1000)
"""


@pytest.fixture
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_verbs.py").write_text(FAKE_VERBS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_verbs", raising=False)
    names = re.findall(r"^def (\w+)", FAKE_VERBS, flags=re.MULTILINE)
    monkeypatch.setattr(cli, "VERBS", {n: cli.Verb(f"fake_verbs:{n}", f"does {n}") for n in names})


@pytest.mark.parametrize(
    "verb, code, line",
    [
        ("setting", 1, "objective.block_size=48 must divide data.seq_len=2048; try 32 or 64"),
        ("no_file", 1, "nowhere/at all.yaml: No such file or directory"),
        ("bad_json", 1, "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("bad_yaml", 1, "while parsing a flow sequence in"),
        ("empty", 1, "ValueError"),
        ("missing_extra", 1, "needs lm_eval.api, which is not installed; run: pip install 'adapt-dlm[eval]'"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_a_users_error_is_one_line_and_no_traceback(verbs: None, capsys, verb: str, code: int, line: str) -> None:
    assert cli.main([verb]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"adapt {verb}: error: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "verb, error",
    [
        ("bug", "TypeError: ours"),
        ("missing_other", "ModuleNotFoundError: No module named 'adapt.nowhere'"),
        ("bottomless", "RecursionError: "),
        ("wordless", "_Wordless: ?"),
    ],
)
def test_our_own_bug_is_one_line_that_names_the_file_with_its_traceback(
    verbs: None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, verb: str, error: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main([verb, "--prompt", "it's"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"adapt {verb}: error: {bug_report.OURS} ({error}")
    [file] = tmp_path.glob("adapt-bug-*.txt")
    assert str(file) in err
    report = file.read_text()
    assert report.startswith(f"$ adapt {verb} --prompt 'it'\"'\"'s'\n")
    assert "Traceback (most recent call last)" in report
    assert "transformers" in report
    with pytest.raises(Exception):  # noqa: B017
        cli.main([verb, "--debug"])


def test_our_own_bug_is_one_line_where_no_file_can_be_written(
    verbs: None, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    assert cli.main(["bug"]) == 1
    assert capsys.readouterr().err.endswith("the same command with --debug at its end\n")


def test_the_issue_tracker_is_named_once_the_package_names_one(
    verbs: None, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = Message()
    named["Project-URL"] = "Issues, https://example.org/issues"
    monkeypatch.setattr(bug_report.metadata, "metadata", lambda name: named)
    cli.main(["bug"])
    assert " at https://example.org/issues with " in capsys.readouterr().err


def test_too_little_memory_is_no_bug(verbs: None, capsys) -> None:
    assert cli.main(["greedy"]) == 1
    assert capsys.readouterr().err.startswith("adapt greedy: error: too little memory")


@pytest.mark.parametrize("argv", [["--debug", "setting"], ["setting", "--debug"], ["setting", "a", "--debug", "b"]])
def test_debug_anywhere_gives_the_traceback(verbs: None, argv: list[str]) -> None:
    with pytest.raises(ValueError, match="must divide"):
        cli.main(argv)


def test_debug_does_not_reach_the_verb(verbs: None, capsys) -> None:
    assert cli.main(["echo", "a", "--debug", "--b=1"]) == 0
    assert capsys.readouterr().out == "['a', '--b=1']\n"


def test_exit_codes_pass_through(verbs: None) -> None:
    assert cli.main(["three"]) == 3
    with pytest.raises(SystemExit) as exited:
        cli.main(["usage"])
    assert exited.value.code == 2


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb_and_examples(capsys, argv: list[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", out, flags=re.MULTILINE)
    assert "\n  adapt quickstart\n" in out
    assert max(map(len, out.splitlines())) <= 120


def test_version_names_what_a_bug_report_needs(capsys) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(
        r"adapt \S+ \(Python 3\.\S+, torch \S+, transformers \S+, deepspeed \S+\)\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "typed, hint",
    [("convrt", "did you mean 'convert'? "), ("lm-eval", "did you mean 'lm_eval'? "), ("zzz", ""), ("--verbose", "")],
)
def test_unknown_verb_is_refused_with_the_nearest_one(capsys, typed: str, hint: str) -> None:
    assert cli.main([typed]) == 2
    err = capsys.readouterr().err
    assert err == f"adapt: error: unknown verb '{typed}': {hint}allowed: {', '.join(sorted(cli.VERBS))}\n"


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ("--help >&-", 0, ""),
        ("--help 2>&-", 0, ""),
        ("nosuch 2>&-", 2, ""),
        ("nosuch 2>/dev/full", 2, ""),
        (
            "--help >/dev/full",
            1,
            "adapt: error: output: cannot be written (No space left on device); give it another place\n",
        ),
    ],
)
def test_an_output_that_takes_nothing_ends_without_a_traceback(arguments: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -m adapt.cli {arguments}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_a_closed_pipe_is_quiet(verbs: None, tmp_path: Path) -> None:
    code = (
        "import sys; from adapt import cli\n"
        "cli.VERBS = {'flood': cli.Verb('fake_verbs:flood', '')}\n"
        "sys.exit(cli.main(['flood']))"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1000)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=600) == 141


def test_help_does_not_import_torch() -> None:
    code = "import sys, adapt.cli; adapt.cli.main([]); assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_its_function(verb: str) -> None:
    module, _, function = cli.VERBS[verb].target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text()).body
    assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_extras_of_modules_are_those_of_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bring = {
        name: {re.split(r"[\[<>=]", requirement)[0].replace("-", "_") for requirement in requirements}
        for name, requirements in extras.items()
        if name not in ("all", "dev")
    }
    assert set(cli._EXTRA_OF_MODULE) == set().union(*bring.values())
    for module, extra in cli._EXTRA_OF_MODULE.items():
        assert module in bring[extra]


def test_deepspeed_and_ninja_of_this_environment_are_found(verbs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert cli.main(["echo"]) == 0
    assert os.environ["PATH"] == f"{os.path.dirname(sys.executable)}{os.pathsep}/usr/bin"
