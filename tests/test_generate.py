"""`adapt generate`: text on standard output, figures on standard error, mistakes in one line."""

import io
import json
import re
import shutil

import pytest
import torch
from tiny_models import VOCABULARY
from transformers import AutoTokenizer

import adapt
from adapt.cli import main as cli
from adapt.decoding.settings import SETTINGS
from adapt.decoding.show import CanvasView
from adapt.generate import _prompts

FIGURES = r"^\d+ tokens, \d+ forwards, \d+\.\d\d tokens per forward, [\d.]+ tokens/s$"


@pytest.fixture(scope="module")
def folder(checkpoint_folder) -> str:
    return str(checkpoint_folder("qwen3", "prefix", True))


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli(["generate", *arguments, "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_prompt_is_continued_and_what_it_cost_is_said(folder, capsys):
    code, out, err = _run(capsys, folder, "--prompt", "The cat", "--max_new_tokens", "8", "--show")
    assert code == 0
    lm = adapt.load(folder, device="cpu")
    assert out.rstrip("\n") == lm.write("The cat", max_new_tokens=8).rstrip("\n")
    lines = err.strip().splitlines()
    assert re.match(FIGURES, lines[-1])
    assert int(re.findall(r"\d+", lines[-1])[1]) == err.count("round ")


def test_a_prompt_ends_where_its_line_does(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("one\u2028line\r\na page\x0cand the next\n\n".encode())
    assert _prompts(str(tmp_path / "prompts.txt")) == ["one\u2028line", "a page\x0cand the next"]


def test_a_file_of_prompts_gives_a_json_line_each_whatever_the_batch(folder, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("The cat\n\nOne, two and\nThe dog sat on the\n")
    arguments = (
        folder,
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--max_new_tokens",
        "6",
        "--sampler.threshold",
        "0.4",
    )
    written = {}
    for batch_size in ("1", "3"):
        code, out, err = _run(capsys, *arguments, "--batch_size", batch_size)
        written[batch_size] = [json.loads(line) for line in out.splitlines()]
        assert code == 0
        assert re.match(FIGURES, err.strip().splitlines()[-1])
    assert written["1"] == written["3"]
    assert [line["prompt"] for line in written["1"]] == ["The cat", "One, two and", "The dog sat on the"]


def test_infill_keeps_the_text_around_its_blanks(folder, capsys):
    code, out, _ = _run(capsys, folder, "--infill", "The [?] sat on the [?3].")
    assert code == 0
    assert re.match(r"(?s)The.* sat on the.*\.\n$", out)


@pytest.mark.parametrize("shift", [False, True])
def test_a_blank_takes_the_place_of_the_space_before_it(diffusion_lm, monkeypatch, shift):
    lm = diffusion_lm("qwen3", "prefix", shift)
    seen = []
    monkeypatch.setattr(
        type(lm), "infill", lambda self, ids, **_: seen.append(ids[0].tolist()) or lm_infill(self, ids, **_)
    )
    for text in ("The [?] sat [?2]", "[?] cat", "a[?]b"):
        lm.fill(text)
    mask, encode = VOCABULARY, lambda text: lm.tokenizer.encode(text, add_special_tokens=False)
    start = [lm.tokenizer.bos_token_id] if shift else []
    assert seen == [
        [*encode("The"), mask, *encode(" sat"), mask, mask],
        [*start, mask, *encode(" cat")],
        [*encode("a"), mask, *encode("b")],
    ]


lm_infill = adapt.DiffusionLM.infill


def test_a_chat_prompt_goes_through_the_template(folder, capsys, monkeypatch):
    prompts = []

    def record(self, input_ids, **options):
        prompts.append(self.tokenizer.decode(input_ids[0]))
        return lm_generate(self, input_ids, **options)

    monkeypatch.setattr(adapt.DiffusionLM, "generate", record)
    assert _run(capsys, folder, "--prompt", "Hello", "--chat", "true", "--max_new_tokens", "2")[0] == 0
    adapt.load(folder, device="cpu").write([{"role": "user", "content": "Hello"}], max_new_tokens=2)
    assert prompts == ["<|user|>Hello<|endoftext|><|assistant|>"] * 2


lm_generate = adapt.DiffusionLM.generate


def test_text_in_text_out_for_one_prompt_and_for_many(diffusion_lm):
    lm = diffusion_lm("qwen3", "prefix")
    prompts = ["The cat", "One, two and", "The dog sat on the"]
    one_by_one = [lm.write(prompt, max_new_tokens=6) for prompt in prompts]
    assert all(isinstance(text, str) for text in one_by_one)
    assert lm.write(prompts, max_new_tokens=6, batch_size=2) == one_by_one
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert lm.write(chats, max_new_tokens=2) == [lm.write(chat, max_new_tokens=2) for chat in chats]
    assert lm.write([]) == []
    texts = ["The [?] sat", "[?2] cat"]
    assert lm.fill(texts) == [lm.fill(text) for text in texts]
    assert re.fullmatch(r"(?s)The.* sat", lm.fill(texts[0]))
    with pytest.raises(ValueError, match="prompt='': is empty"):
        lm.write(["The cat", ""])


def test_a_model_that_was_only_converted_is_said_to_write_filler(folder, capsys, tmp_path):
    said = "is converted and not trained yet: it writes filler"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat\nThe dog\n")
    assert (
        _run(capsys, folder, "--prompts", str(prompts), "--max_new_tokens", "2", "--batch_size", "1")[2].count(said)
        == 1
    )
    lm = adapt.load(folder, device="cpu")
    lm.model.save_pretrained(tmp_path / "trained")  # as training does
    lm.tokenizer.save_pretrained(tmp_path / "trained")
    code, _, err = _run(capsys, str(tmp_path / "trained"), "--prompt", "The cat", "--max_new_tokens", "2")
    assert (code, said in err) == (0, False)


def test_a_newline_or_an_escape_that_was_kept_is_one_sign_of_the_canvas(diffusion_lm, monkeypatch):
    lm = diffusion_lm("qwen3", "prefix")
    monkeypatch.setattr(type(lm.tokenizer), "decode", lambda self, ids, **_: "a\n\tb\x1b[2J" if ids else "")
    file = io.StringIO()
    CanvasView(lm.tokenizer, lm.spec.mask_token_id, num_prompt=0, file=file).put(torch.tensor([[5]]))
    assert file.getvalue() == "round   1  a↵⇥b␛[2J\n"


def test_every_setting_of_the_sampler_is_an_option(folder, capsys, monkeypatch):
    """The number of tokens a round alone, without unsetting the threshold that nobody gave."""
    used = []

    def record(self, input_ids, *, sampler, **options):
        used.append(sampler)
        return lm_generate(self, input_ids, sampler=sampler, **options)

    monkeypatch.setattr(adapt.DiffusionLM, "generate", record)
    settings = {"order": "left_to_right", "canvas_length": 2, "temperature": 0.5, "top_p": 0.5}
    assert {*settings, "threshold", "tokens_per_step"} == set(SETTINGS)
    for rule in ({"tokens_per_step": 1}, {"threshold": 0.5}):
        given = [f"--sampler.{name}={value}" for name, value in (settings | rule).items()]
        assert _run(capsys, folder, "--prompt", "The cat", "--max_new_tokens", "2", *given)[0] == 0
        assert used[-1] == adapt.SamplerConfig(**(settings | rule))  # pyright: ignore[reportArgumentType]


def test_a_chat_for_a_model_without_template_is_refused_in_one_line(diffusion_lm, monkeypatch):
    lm = diffusion_lm("qwen3", "prefix")
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template; give the prompt as plain text"):
        lm.write([{"role": "user", "content": "Hello"}])


def test_the_package_lists_what_is_public():
    assert {"DiffusionLM", "SamplerConfig", "convert", "load", "noise", "train"} <= set(dir(adapt))
    for name in dir(adapt):
        assert getattr(adapt, name) is not None, name
    assert {"TYPE_CHECKING", "import_module"} & set(dir(adapt)) == set()
    assert adapt.noise.alpha(0.25) == 0.75


def test_on_a_terminal_a_round_is_drawn_over_the_last_one(diffusion_lm, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lm = diffusion_lm("qwen3", "prefix")
    monkeypatch.setattr("adapt.decoding.show.time.sleep", lambda _: None)
    monkeypatch.setattr("adapt.decoding.show.shutil.get_terminal_size", lambda: shutil.os.terminal_size((20, 24)))
    terminal = Terminal()
    view = CanvasView(lm.tokenizer, lm.spec.mask_token_id, num_prompt=0, file=terminal)

    mask, word = lm.spec.mask_token_id, lm.tokenizer.encode("a")[0]
    view.put(torch.tensor([[mask] * 30]))
    view.put(torch.tensor([[word] + [mask] * 29]))
    assert terminal.getvalue() == f"round   1  {'·' * 30}\n\033[3F\033[Jround   2  \033[1;32ma\033[0m{'·' * 29}\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give exactly one of --prompt, --prompts and --infill"),
        (
            ["--prompt", "a", "--infill", "b [?]"],
            "give exactly one of --prompt, --prompts and --infill, not prompt and infill",
        ),
        (["--prompt", ""], "prompt='': is empty"),
        (["--prompts", "nowhere.txt"], "prompts=nowhere.txt: no such file"),
        (["--prompts", ""], "prompts='': is empty"),
        (["--infill", "no blank"], "infill='no blank': has no blank; write [?] for one token"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens=0: must be from 1 to "),
        (["--prompt", "a", "--max_new_tokens", "500"], "more than the 128 positions that the model has"),
        (["--prompt", "a", "--batch_size", "0"], "batch_size=0: must be from 1 to "),
        (["--prompt", "a", "--dtype", "float8"], "dtype=float8: choose one of"),
        (["--prompt", "a", "--adapter", "nowhere"], "adapter=nowhere: not a PEFT folder"),
        (["--prompt", "a", "--sampler.threshold", "2"], "sampler.threshold=2.0: must be above 0 and at most 1"),
        (
            ["--prompt", "a", "--sampler.tokens_per_step", "2", "--sampler.threshold", "0.5"],
            "sampler.threshold=0.5 and sampler.tokens_per_step=2: are two rules for the same thing; give one of them",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(folder, capsys, arguments, said):
    code, out, err = _run(capsys, folder, *arguments)
    assert (code, out) == (1, "")
    assert err.strip().splitlines()[-1].startswith("adapt generate: error: ")
    assert said in err


@pytest.mark.parametrize(
    "what, said",
    [
        ("./nowhere", "checkpoint=./nowhere: no such folder"),
        ("base", "has no `diffusion` section; make it one with `adapt convert"),
        ("other tokenizer", "the tokenizer's mask token has the id None"),
        (
            "nobody/nothing-of-that-name",
            "checkpoint=nobody/nothing-of-that-name: no such folder here, and the Hub cannot be asked",
        ),
    ],
)
def test_a_folder_that_is_no_diffusion_checkpoint_is_refused(folder, base_folder, capsys, tmp_path, what, said):
    checkpoint = what
    if what == "base":
        checkpoint = str(base_folder("qwen3"))
    if what == "other tokenizer":
        checkpoint = str(shutil.copytree(folder, tmp_path / "mixed"))
        for file in base_folder("qwen3").glob("*token*"):
            shutil.copy(file, checkpoint)
    code, _, err = _run(capsys, checkpoint, "--prompt", "a")
    assert code == 1
    assert said in err


def test_a_device_that_is_not_here_is_refused(folder, capsys):

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert cli(["generate", folder, "--prompt", "a", "--device", "cuda"]) == 1
    assert "adapt generate: error: device=cuda: not usable here" in capsys.readouterr().err


def test_a_mask_token_beyond_the_embedding_is_refused(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    config = json.loads((copied / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens([f"<|more{i}|>" for i in range(config["vocab_size"])], special_tokens=True)
    tokenizer.add_special_tokens({"mask_token": f"<|more{config['vocab_size'] - 1}|>"})
    tokenizer.save_pretrained(copied)
    config["diffusion"]["mask_token_id"] = tokenizer.mask_token_id
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"mask_token_id is {tokenizer.mask_token_id}, but the embedding has \d+ rows"
    ):
        adapt.load(copied, device="cpu")
