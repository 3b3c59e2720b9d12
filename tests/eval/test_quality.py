"""Items are paired by document, and what the rows say is what lm-eval measured."""

from __future__ import annotations

import math

import pytest

from adapt_eval.measure.quality import evaluate, find_tasks, items_of, quality_rows


def sample(doc_id, filter_name="none", **metrics):
    return {"doc_id": doc_id, "doc_hash": f"hash{doc_id}", "filter": filter_name, "metrics": list(metrics), **metrics}


def result(task, samples, higher=None, aggregated=None):
    return {
        "samples": {task: samples},
        "higher_is_better": {task: higher or {}},
        "results": {task: aggregated or {}},
    }


def test_items_meet_by_document_whatever_their_order():
    base = [sample(0, exact_match=1.0), sample(1, exact_match=0.0), sample(2, exact_match=0.0)]
    adapted = [sample(2, exact_match=1.0), sample(0, exact_match=1.0), sample(1, exact_match=0.0)]
    rows, warnings = quality_rows({"base": result("t", base), "adapted": result("t", adapted)})
    assert warnings == []
    assert rows[0]["delta"] == pytest.approx(1 / 3)
    assert rows[0]["p_value"] == 1.0  # one discordant pair; taken by position there would be three


def test_filters_stay_apart_and_items_that_one_arm_lacks_are_left_out_aloud():
    base = [sample(0, "strict", exact_match=1), sample(0, "loose", exact_match=1), sample(1, "strict", exact_match=0)]
    adapted = [sample(0, "strict", exact_match=0), sample(0, "loose", exact_match=1)]
    rows, warnings = quality_rows({"base": result("t", base), "adapted": result("t", adapted)})
    assert {r["metric"]: (r["n"], r["delta"]) for r in rows} == {
        "exact_match,strict": (1, -1.0),
        "exact_match,loose": (1, 0.0),
    }
    assert warnings == ["t, exact_match,strict: 1 items were not scored by all arms and are left out."]


def test_a_document_that_changed_between_arms_is_not_paired():
    changed = sample(0, exact_match=1) | {"doc_hash": "other"}
    rows, warnings = quality_rows({"base": result("t", [sample(0, exact_match=1)]), "adapted": result("t", [changed])})
    assert rows == []
    assert "no item in common" in " ".join(warnings)


def test_perplexity_is_compared_by_its_log_likelihoods():
    found, _ = items_of([sample(0, perplexity=-2.0), sample(1, perplexity=-4.0)])
    assert list(found) == ["loglikelihood,none"]
    assert sorted(found["loglikelihood,none"].values()) == [-4.0, -2.0]


def test_bits_per_byte_of_the_items_average_to_that_of_the_corpus():
    pairs = [(-30.0, 10), (-5.0, 40)]
    found, _ = items_of([sample(i, bits_per_byte=p) for i, p in enumerate(pairs)])
    values = found["bits_per_byte,none"].values()
    assert sum(values) / 2 == pytest.approx(35 / 50 / math.log(2))


def test_corpus_metrics_are_skipped_aloud():
    samples = [sample(0, bleu=("a", "b"), exact_match=1)]
    rows, warnings = quality_rows({"base": result("t", samples), "adapted": result("t", samples)})
    assert [r["metric"] for r in rows] == ["exact_match,none"]
    assert "bleu" in warnings[0]


def test_a_metric_that_is_no_mean_of_its_items_is_skipped_aloud():
    one = result("t", [sample(0, odd=1.0), sample(1, odd=3.0)], aggregated={"odd,none": 3.0})
    rows, warnings = quality_rows({"base": one, "adapted": one})
    assert rows == []
    assert "does not take the mean" in warnings[0]


def test_direction_comes_from_lm_eval():
    one = result("t", [sample(0, wer=0.5)], higher={"wer": False})
    rows, _ = quality_rows({"base": one, "adapted": one})
    assert rows[0]["higher_is_better"] is False


def test_the_control_is_set_against_the_adapted_arm():
    arms = {"base": 0, "control": 1, "adapted": 1}
    rows, _ = quality_rows({a: result("t", [sample(i, acc=v) for i in range(8)]) for a, v in arms.items()})
    assert rows[0]["delta"] == 1.0
    assert rows[0]["vs_control"]["delta"] == 0.0
    assert rows[0]["control"]["value"] == 1.0


def test_unknown_tasks_are_refused_with_the_nearest_name(arms):
    with pytest.raises(ValueError, match="tasks=tiny_shuot: unknown task; did you mean tiny_shout"):
        find_tasks(["tiny_shuot"], arms.tasks)
    with pytest.raises(ValueError, match="include_path=nowhere: no such folder"):
        find_tasks(["tiny_shout"], "nowhere")
    with pytest.raises(ValueError, match="at least one"):
        find_tasks([], arms.tasks)


class Parrot:
    """An lm-eval model that answers every prompt with what the prompt's last line asks for."""

    rank, world_size = 0, 1

    def __init__(self):
        self.prompts = []

    def generate_until(self, requests):
        self.prompts += [r.args[0] for r in requests]
        return [r.args[0].splitlines()[-1].rstrip(":").upper() for r in requests]


def test_num_fewshot_holds_where_the_task_says_zero_and_all_arms_see_the_same_examples(arms):
    manager = find_tasks(["tiny_shout"], arms.tasks)
    first, second, none = Parrot(), Parrot(), Parrot()
    results = evaluate(first, manager, ["tiny_shout"], num_fewshot=2, limit=4, seed=3)
    evaluate(second, manager, ["tiny_shout"], num_fewshot=2, limit=4, seed=3)
    evaluate(none, manager, ["tiny_shout"], limit=4, seed=3)
    assert results["n-shot"]["tiny_shout"] == 2
    assert first.prompts == second.prompts
    assert [p.count(":") for p in first.prompts] == [3, 3, 3, 3]
    assert [p.count(":") for p in none.prompts] == [1, 1, 1, 1]
    assert results["results"]["tiny_shout"]["exact_match,none"] == 1.0
