"""adapter_config.json of a stranger: what peft would hang on, or take memory or files for."""

from __future__ import annotations

from typing import Any

import pytest

from adapt.files.adapter_config import check_adapter_config

LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))"
)

REFUSED: dict[str, dict[str, Any]] = {
    "nested repeats": {"target_modules": "(.*a)*b"},
    "nested, in braces": {"exclude_modules": "(a|a){40}b"},
    "many repeats": {"target_modules": ".*" * 20 + "z"},
    "many options": {"rank_pattern": {"a?" * 40: 8}},
    "no expression": {"target_modules": "(q_proj"},
    "no expression in a key": {"alpha_pattern": {"*": 8}},
    "a repeat that overflows": {"target_modules": "a{99999999999999999999}"},
    "a megabyte": {"layers_pattern": "a" * (1 << 20)},
    "a hang in modules_to_save": {"modules_to_save": ["(x+x+)+y"]},
    "many ranges of layers": {"layer_replication": [[0, 2]] * 100_000},
    "prompts that are loaded from a file": {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "prompt_tuning_init_state_dict_path": "/etc/passwd",
    },
    "no kind": {"peft_type": None},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_would_hang_on_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"^adapter=x: ") as refused:
        check_adapter_config(LORA | REFUSED[name], "adapter=x")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target_modules": "all-linear", "rank_pattern": {"model.layers.0.self_attn.q_proj": 4, r"^layers\.\d+\.x": 2}},
        {"target_modules": r".*\.layers\.[0-9]+\.(self_attn|mlp)\.(q|k|v|o)_proj$", "exclude_modules": "lm_head"},
        {"target_modules": r"^(?!.*visual).*(?:q_proj|k_proj)?.*", "modules_to_save": ["lm_head"]},
        {"target_modules": UNSLOTH, "layer_replication": [[0, 16], [8, 24]]},
        {"peft_type": "IA3"},
    ],
)
def test_what_adapters_of_today_say_is_taken(more: dict[str, Any]) -> None:
    check_adapter_config(LORA | more, "adapter=x")
