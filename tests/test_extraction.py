"""The extraction task: the same bytes for a seed, disjoint splits, answers that stand in the text, and short."""

import hashlib
import json
import re
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from adapt.conversion.gguf import load_tokenizer
from adapt_recipes.quickstart import extraction
from adapt_recipes.quickstart.extraction import MAX_COMPLETION_CHARS, MAX_PROMPT_CHARS, TASK, examples, write_dataset
from adapt_recipes.quickstart.pools import POOLS, SCHEMAS
from adapt_recipes.quickstart.smollm2 import cached_smollm2

GOLDEN = {  # 40 training and 20 test examples of seed 0
    "train.jsonl": "b9f1c086bda6bf44a79b1d83cbd6397ef46a4acbd811375ed1948a098e9d4efe",
    "test.jsonl": "3dde3768e36c292ac345232af69d7ecc3964e8084190b6368a6123c0fa1451a9",
}

GOLDEN_FULL = "9f1e451251459b6a443e30dfdafbe7dd6fb5046a98a5e035f3bbf66d3b09cb7d"  # 3,000 training examples of seed 1


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("extraction"), train=1500, test=500, seed=0)


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path, train=40, test=20, seed=0)
    found = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in GOLDEN}
    assert found == GOLDEN


def test_the_quickstarts_own_data_are_the_same_bytes_too(tmp_path: Path) -> None:
    write_dataset(tmp_path, train=3000, test=500, seed=1)
    assert hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest() == GOLDEN_FULL


def test_seeds_differ_and_a_longer_split_begins_with_the_shorter(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "short", train=100, test=500, seed=0)
    write_dataset(tmp_path / "other", train=100, test=500, seed=1)
    assert (folder / "test.jsonl").read_bytes() == (tmp_path / "short" / "test.jsonl").read_bytes()
    assert (folder / "train.jsonl").read_bytes().startswith((tmp_path / "short" / "train.jsonl").read_bytes())
    assert rows(tmp_path / "other" / "train.jsonl") != rows(tmp_path / "short" / "train.jsonl")


def test_no_sentence_is_in_both_splits_or_twice(folder: Path) -> None:
    texts = [row["prompt"].split("\n")[0] for name in ("train", "test") for row in rows(folder / f"{name}.jsonl")]
    assert len(texts) == len(set(texts)) == 2000


def test_half_of_the_test_values_never_occur_in_training() -> None:
    held_out, total = 0, 0
    for example in islice(examples("test", seed=0), 500):
        for key, value in json.loads(example["completion"]).items():
            total += 1
            held_out += any(value in POOLS[s.fields[key]].held_out for s in SCHEMAS.values() if key in s.fields)
    assert 0.4 < held_out / total < 0.6
    for example in islice(examples("train", seed=0), 500):
        for key, value in json.loads(example["completion"]).items():
            assert any(value in POOLS[s.fields[key]].seen for s in SCHEMAS.values() if key in s.fields)


def test_answers_are_json_with_the_keys_asked_for_and_values_from_the_text(folder: Path) -> None:
    for row in rows(folder / "train.jsonl") + rows(folder / "test.jsonl"):
        text, keys = re.fullmatch(r"Text: (.+)\nKeys: (.+)\nJSON:", row["prompt"]).groups()
        answer = json.loads(row["completion"])
        assert row["completion"].startswith(" {")
        assert "\n" not in row["completion"]
        assert list(answer) == keys.split(", ")
        assert 3 <= len(answer) <= 4
        for value in answer.values():
            assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", text), (value, text)


def test_values_of_a_sentence_differ(folder: Path) -> None:
    for row in rows(folder / "test.jsonl"):
        values = [str(value) for value in json.loads(row["completion"]).values()]
        assert len(set(values)) == len(values)


def test_every_template_is_used_and_names_only_its_schema(folder: Path) -> None:
    for name, schema in SCHEMAS.items():
        assert len(set(schema.templates)) >= 8, name
        assert set(schema.fields.values()) <= set(POOLS), name
        for template in schema.templates:
            slots = re.findall(r"\{(\w+)\}", template)
            assert len(slots) == len(set(slots)), template
            assert {slot.lstrip("_") for slot in slots} <= set(schema.fields), template
            assert sum(not slot.startswith("_") for slot in slots) >= 3, template
    asked = {tuple(json.loads(row["completion"])) for row in rows(folder / "train.jsonl")}
    assert len(asked) > 40


def test_held_out_values_are_not_seen() -> None:
    for name, pool in POOLS.items():
        assert pool.held_out, name
        assert not set(pool.seen) & set(pool.held_out), name


def test_lengths_in_characters(folder: Path) -> None:
    for row in rows(folder / "train.jsonl") + rows(folder / "test.jsonl"):
        assert len(row["completion"]) <= MAX_COMPLETION_CHARS
        assert len(row["prompt"]) <= MAX_PROMPT_CHARS


def test_lengths_in_smollm2_tokens(folder: Path) -> None:
    if (path := cached_smollm2()) is None:
        pytest.skip("SmolLM2's GGUF is not in the cache; `adapt quickstart` puts it there")
    tokenizer = load_tokenizer(path)
    data = rows(folder / "train.jsonl") + rows(folder / "test.jsonl")
    prompts, completions = (
        [len(ids) for ids in tokenizer([row[part] for row in data]).input_ids] for part in ("prompt", "completion")
    )
    assert max(completions) <= 40
    assert 22 <= sum(completions) / len(completions) <= 32
    assert max(prompts) <= 60
    assert 25 <= sum(prompts) / len(prompts) <= 50


def test_a_or_an_and_no_unfilled_slot(folder: Path) -> None:
    for row in rows(folder / "train.jsonl"):
        assert not re.search(r"[{}\[\]|]", row["prompt"])
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", row["prompt"])


@pytest.mark.parametrize("setting", [{"train": 0}, {"test": 0}, {"seed": -1}])
def test_bad_sizes_are_refused(setting: dict[str, int], tmp_path: Path) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        write_dataset(tmp_path / "data", **setting)
    assert not (tmp_path / "data").exists()


def test_module_runs_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extraction.main([str(tmp_path), "--train", "5", "--test", "3"])
    assert capsys.readouterr().out.strip() == str(tmp_path.resolve())
    assert len(rows(tmp_path / "train.jsonl")) == 5


@pytest.fixture
def lm_eval_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_loads_the_task_and_scores_a_right_answer(lm_eval_tasks: ModuleType, folder: Path) -> None:
    manager = lm_eval_tasks.TaskManager(include_path=str(folder), include_defaults=False)
    task = lm_eval_tasks.get_task_dict([TASK], manager)[TASK]
    doc = task.test_docs()[0]
    first = rows(folder / "test.jsonl")[0]
    assert task.doc_to_text(doc) == first["prompt"]
    assert task.doc_to_target(doc) == first["completion"].strip()
    assert task.config.generation_kwargs == {"until": ["\n"], "do_sample": False, "max_gen_toks": 48}
    # num_fewshot unset, not 0: lm-eval takes a 0 in the task for an order and ignores --num_fewshot.
    assert task.config.num_fewshot is None
    task.set_fewshot_seed(0)
    context = task.fewshot_context(doc, num_fewshot=2)
    assert context.endswith("\n\n" + first["prompt"])
    assert context.count('JSON: {"') == 2
    for answer, score in ((first["completion"], 1.0), (first["completion"] + " ", 1.0), (" {}", 0.0)):
        instances = task.construct_requests(doc, context)
        instances = instances if isinstance(instances, list) else [instances]
        for instance in instances:
            instance.resps = [answer]
        task._instances = instances
        task.apply_filters()
        assert task.process_results(doc, [instances[0].filtered_resps["strip"]])["exact_match"] == score
