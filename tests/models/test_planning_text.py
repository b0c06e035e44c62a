"""A chat has the tokens that transformers' tokenizer gives it, and nobody waits for those of others."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, Qwen3Config

from aiodisagg.errors import CheckpointError
from aiodisagg.models.plan import Qwen3VLPlanner
from aiodisagg.models.synthetic import build_tokenizer
from tests.models.halves import chat

BEGIN = "<|begin|>"


def _folder(folder: Path, template: str) -> Path:
    """Of a model whose tokenizer adds a token before every text, as those derived from other families do."""
    Qwen3Config(vocab_size=641, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
    build_tokenizer(640).save_pretrained(folder)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([BEGIN])
    made.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 640)])
    made.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": BEGIN}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    own = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template + own, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("template", "times"), [("{{ bos_token }}", 1), ("", 0)])
def test_what_begins_a_prompt_is_said_by_the_template_alone(tmp_path: Path, template: str, times: int) -> None:
    """It was said twice where the template says it, and once where it does not."""
    folder = _folder(tmp_path, template)
    said = [{"role": "user", "content": "Good morning."}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        said, add_generation_prompt=True, return_dict=False
    )
    tokens = Qwen3VLPlanner(folder).plan(chat("Good morning.")).input_ids.tolist()
    assert tokens == expected
    assert tokens.count(640) == times


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(moe=True, levels=3), tmp_path / "copied"))


def test_a_tokenizer_whose_file_says_to_cut_and_to_pad_does_neither(folder: Path) -> None:
    expected = Qwen3VLPlanner(folder).plan(chat("Good morning, good evening.")).input_ids.tolist()
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=100)
    made.save(str(folder / "tokenizer.json"))
    assert Qwen3VLPlanner(folder).plan(chat("Good morning, good evening.")).input_ids.tolist() == expected


def test_a_short_prompt_does_not_wait_for_the_tokens_of_a_long_one(folder: Path) -> None:
    """Two megabytes of text, which are then refused as too long, held up all other planning for seconds."""
    planner, began, go_on = Qwen3VLPlanner(folder), threading.Event(), threading.Event()
    encode = planner._encode

    def slow(text: str) -> list[int]:
        if "long" in text:
            began.set()
            assert go_on.wait(60)
        return encode(text)

    planner._encode = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as threads:
        long = threads.submit(planner.plan, chat("a long text"))
        try:
            assert began.wait(60)
            assert threads.submit(planner.plan, chat("short")).result(timeout=20).tokens > 0
            assert not long.done()
        finally:
            go_on.set()


@pytest.mark.parametrize("names", [("default", "tool_use"), ("rag", "tool_use")])
def test_of_several_templates_one_is_the_default_or_the_folder_is_refused(folder: Path, names: tuple[str, str]) -> None:
    """Every chat was refused, as if it was the client's mistake."""
    own = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = [{"name": name, "template": own} for name in names]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if "default" in names:
        assert Qwen3VLPlanner(folder).plan(chat("Good morning.")).tokens
        return
    with pytest.raises(CheckpointError, match="multiple chat templates with no default") as caught:
        Qwen3VLPlanner(folder)
    assert caught.value.name == "chat_template"
