"""The house: which room may know which. Read from the imports themselves, those inside of functions and for types among them."""

import ast
import sys
from pathlib import Path

ADAPT = Path(__file__).resolve().parents[1] / "adapt"
CORE = ("settings", "spec", "tokens", "files", "noise", "attention", "model", "probe")
VERBS = ("conversion", "training", "planning", "export", "doctor", "generate")
MOST_FILES, MOST_FOLDERS, MOST_LINES = 10, 12, 300


def _modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(ADAPT).with_suffix("").parts) for path in ADAPT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """Modules of this package (and foreign packages, by their first name) that a module imports."""
    path, found = MODULES[name], set()
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - (node.level - 1)] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in MODULES else ".".join(base))
    return found - {name, ""}


IMPORTS = {name: _imports(name) for name in MODULES if name != "__init__"}


def _arrows(of: str, to: tuple[str, ...]) -> list[str]:
    def lies_in(module: str, room: str) -> bool:
        return module == room or module.startswith(f"{room}.")

    return [
        f"{module} -> {imported}"
        for module, targets in IMPORTS.items()
        if lies_in(module, of)
        for imported in targets
        if any(lies_in(imported, room) for room in to) and not lies_in(imported, of)
    ]


def test_no_module_imports_itself_by_a_detour() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for imported in IMPORTS.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_the_core_knows_no_verb() -> None:
    for room in CORE:
        assert not _arrows(room, (*VERBS, "decoding", "lm", "cli"))


def test_decoding_knows_the_model_alone_so_that_an_export_can_copy_it() -> None:
    rooms = {path.name for path in ADAPT.iterdir() if path.is_dir()} | {path.stem for path in ADAPT.glob("*.py")}
    allowed = {"decoding", "spec", "settings", "attention", "model", "noise", "objective"}
    assert not _arrows("decoding", tuple(rooms - allowed))
    foreign = {name for module in IMPORTS if module.startswith("decoding.") for name in IMPORTS[module]} & {
        "datasets", "peft", "deepspeed", "accelerate", "lm_eval", "jsonargparse",
    }  # fmt: skip
    assert not foreign


def test_what_a_setting_may_be_is_known_to_all_and_knows_nothing() -> None:
    assert IMPORTS["settings.bounds"] <= set(sys.stdlib_module_names)


def test_verbs_do_not_know_each_other_but_training_converts_and_planning_trains() -> None:
    assert not _arrows("conversion", ("training", "decoding", "planning", "export", "lm"))
    assert not _arrows("export", ("training", "planning"))
    assert not _arrows("training", ("planning", "export", "generate"))
    for room in (*CORE, "decoding", "conversion", "training", "export", "lm", "generate"):
        assert not _arrows(room, ("planning", "doctor", "cli"))


def test_data_objective_and_noise_know_no_trainer() -> None:
    assert not _arrows("training.data", tuple(f"training.{part}" for part in (
        "trainer", "train", "start_model", "lora", "bad_steps", "interruption", "loss", "engine", "checkpoints", "watch",
    )))  # fmt: skip
    for module in [m for m in MODULES if m.startswith("noise") or m == "objective"]:
        assert "transformers" not in IMPORTS.get(module, ())


def test_this_package_knows_those_beside_it_by_name_only() -> None:
    assert not [m for m, targets in IMPORTS.items() if targets & {"adapt_eval", "adapt_recipes", "adapt_launch"}]


def test_eval_does_not_train() -> None:
    for path in (ADAPT.parent / "eval").rglob("*.py"):
        assert "adapt.training" not in path.read_text(encoding="utf-8"), path


def test_the_hall_is_small_and_no_file_is_long() -> None:
    assert len(list(ADAPT.glob("*.py"))) <= MOST_FILES
    assert len([path for path in ADAPT.iterdir() if (path / "__init__.py").is_file()]) <= MOST_FOLDERS
    folders = ("adapt", "eval", "launch", "recipes", "benchmarks")
    files = [path for folder in folders for path in (ADAPT.parent / folder).rglob("*.py")]
    long = {str(path): n for path in files if (n := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES}
    assert not long
