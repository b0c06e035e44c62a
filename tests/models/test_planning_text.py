"""A chat with a text model has the tokens that transformers' tokenizer gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, Qwen3Config

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
