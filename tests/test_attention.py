"""Masks from the closed-form rule, for every kernel, and which layers have which window."""

import pytest
import torch
from tiny_models import WINDOW, config_of
from transformers import MistralConfig, Qwen2Config

from adapt.attention.layout import Layout
from adapt.attention.mask import attention_mask, mask_rule
from adapt.attention.windows import layer_windows
from adapt.model.forward import hidden_states

# prompt of 3, two canvases of 2 on it; another document of 2; padding
DOCUMENTS = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 2, 2, 0]])
VIEWS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 0, 1, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 0, 1, 0]])
ROW = Layout(DOCUMENTS, VIEWS, POSITIONS)


def _seen(layout: Layout, **options) -> list[str]:
    length = layout.position_ids.shape[1]
    zero = torch.zeros((), dtype=torch.long)
    rule = mask_rule(layout, layout, **options)
    seen = rule(zero, zero, torch.arange(length)[:, None], torch.arange(length)[None, :])
    return ["".join("x" if s else "." for s in row) for row in seen.tolist()]


def test_prompt_is_causal_and_canvases_are_blind_to_each_other_and_to_other_documents():
    assert _seen(ROW) == [
        "x.........",
        "xx........",
        "xxx.......",
        "xxxxx.....",
        "xxxxx.....",
        "xxx..xx...",
        "xxx..xx...",
        ".......x..",
        ".......xx.",
        ".........x",
    ]


def test_a_canvas_may_hang_off_the_middle_of_a_context_that_goes_on_beside_it():
    views, positions = torch.tensor([[0, 0, 0, 0, 1, 1, 0]]), torch.tensor([[0, 1, 2, 3, 2, 3, 0]])
    documents, lengths = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]), torch.tensor([[1, 2, 3, 4, 2, 2, 1]])
    layout = Layout(documents, views, positions, lengths)
    assert _seen(layout) == ["x......", "xx.....", "xxx....", "xxxx...", "xx..xx.", "xx..xx.", "......x"]
    assert torch.equal(layout.last(3).context_lengths, lengths[:, -3:])


def test_a_sliding_window_is_below_in_context_and_inclusive_in_a_canvas():
    causal = Layout(torch.ones(1, 5).long(), torch.zeros(1, 5).long(), torch.arange(5)[None])
    canvas = Layout(torch.ones(1, 5).long(), torch.ones(1, 5).long(), torch.arange(5)[None])
    assert _seen(causal, window=2) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert _seen(canvas, window=2) == ["xxx..", "xxxx.", "xxxxx", ".xxxx", "..xxx"]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_right_window_opens_from_causal_to_bidirectional(as_tensor):
    canvas = Layout(torch.ones(1, 4).long(), torch.ones(1, 4).long(), torch.arange(4)[None])

    def seen(window: int) -> list[str]:
        return _seen(canvas, right_window=torch.tensor(window) if as_tensor else window)

    assert seen(0) == ["x...", "xx..", "xxx.", "xxxx"]
    assert seen(1) == ["xx..", "xxx.", "xxxx", "xxxx"]
    assert seen(4) == _seen(canvas) == ["xxxx"] * 4


def test_left_padding_shifts_no_position_and_no_row_is_empty():
    layout = Layout.of("prefix", torch.tensor([[0, 0, 1, 1, 1]]), num_prompt_tokens=4)
    assert layout.position_ids.tolist() == [[0, 0, 0, 1, 2]]
    assert _seen(layout) == ["xx...", "xx...", "..x..", "..xx.", "..xxx"]


def test_eager_and_sdpa_masks_say_the_same_and_a_cache_needs_only_the_last_rows():
    config = config_of("llama")
    config._attn_implementation = "sdpa"
    boolean = attention_mask(config, ROW)
    config._attn_implementation = "eager"
    additive = attention_mask(config, ROW, dtype=torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, boolean)
    assert (additive[~boolean] == torch.finfo(torch.bfloat16).min).all()
    assert torch.equal(attention_mask(config, ROW, num_queries=4), attention_mask(config, ROW)[:, :, -4:])
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"model\.attn_implementation=flash_attention_2: "):
        attention_mask(config, ROW)


def test_windows_of_layers_are_read_from_every_way_of_saying_them():
    assert layer_windows(config_of("gemma3")) == {"full_attention": None, "sliding_attention": WINDOW}
    assert layer_windows(config_of("llama")) is None
    assert layer_windows(MistralConfig(sliding_window=7)) == 7
    assert layer_windows(Qwen2Config(sliding_window=7, use_sliding_window=False)) is None
    mixed = Qwen2Config(sliding_window=7, use_sliding_window=True, max_window_layers=1, num_hidden_layers=2)
    assert layer_windows(mixed) == {"full_attention": None, "sliding_attention": 7}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_eager_equals_sdpa(diffusion_lm, kind):
    model = diffusion_lm(kind, "prefix").model
    tokens = torch.arange(1, 11)[None]
    sdpa = hidden_states(model, tokens, ROW)
    try:
        model.set_attn_implementation("eager")
        torch.testing.assert_close(hidden_states(model, tokens, ROW), sdpa, rtol=1e-4, atol=1e-4)
    finally:
        model.set_attn_implementation("sdpa")


def test_flex_attention_masks_are_the_same_rule():
    config = config_of("gemma3")
    config._attn_implementation = "flex_attention"
    masks = attention_mask(config, ROW, num_queries=7)
    config._attn_implementation = "sdpa"
    dense = attention_mask(config, ROW, num_queries=7)
    b, q, k = torch.zeros(7, 10).long(), torch.arange(7)[:, None].expand(7, 10), torch.arange(10).expand(7, 10)
    for kind, block_mask in masks.items():
        assert (block_mask.shape, block_mask.seq_lengths) == ((1, 1, 7, 10), (7, 10))
        assert torch.equal(block_mask.mask_mod(b, b, q, k), dense[kind][0, 0])


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@torch.no_grad()
def test_flex_attention_equals_sdpa(diffusion_lm):
    import shutil

    if not torch.cuda.is_available() and shutil.which("g++") is None:
        pytest.skip("FlexAttention on a CPU is compiled with g++")
    model = diffusion_lm("gemma3", "prefix").model
    tokens = torch.arange(1, 11)[None]
    sdpa = hidden_states(model, tokens, ROW)
    try:
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(hidden_states(model, tokens, ROW), sdpa, rtol=1e-4, atol=1e-4)
    finally:
        model.set_attn_implementation("sdpa")
