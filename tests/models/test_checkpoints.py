"""Each half loads from every layout, reads only what is its own, and names what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
)

from aiodisagg import LanguageConfig, LanguageService
from aiodisagg.errors import CheckpointError, InvalidRequest
from aiodisagg.models import checkpoint, loading
from aiodisagg.models.base import ImagePart
from aiodisagg.models.loading import fingerprint, load_language, load_monolith, load_vision
from aiodisagg.models.plan import Qwen3VLPlanner
from aiodisagg.models.synthetic import TINY, Size, build_synthetic, build_tiny, build_tokenizer
from tests.models.halves import PROMPTS, Halves, chat, halves, png

Tiny = Callable[..., Path]
F32 = torch.float32


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Path:
    """A folder to break."""
    return Path(shutil.copytree(tiny(moe=True, levels=3), tmp_path / "broken"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


# -- layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"layout": "transformers"},
        {"shards": 3},
        {"layout": "transformers", "shards": 2},
        {"tied": True},
        {"tied": True, "moe": False, "shards": 2},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_every_layout_gives_the_monoliths_logits(tiny: Tiny, how: dict[str, Any]) -> None:
    both = halves(tiny(**{"moe": True, "levels": 2, **how}))
    asked = both.ask(PROMPTS["three images"])
    assert torch.equal(both.logits(asked), both.truth(asked))


def test_a_folder_that_transformers_saved_loads(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(moe=True, levels=3)
    folder = Path(shutil.copytree(source, tmp_path / "saved"))
    (folder / "model.safetensors").unlink()
    whole = Qwen3VLMoeForConditionalGeneration.from_pretrained(source)
    whole.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    again, before = Halves(folder, F32, F32), halves(source)
    asked = again.ask(PROMPTS["one image"])
    assert torch.equal(again.logits(asked), again.truth(asked))
    # Not to the bit: tensors lie elsewhere in the file, and some kernels round differently for other alignments.
    torch.testing.assert_close(again.logits(asked), before.logits(asked), rtol=0, atol=1e-5)
    assert fingerprint(folder) == fingerprint(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "cast"])
def test_a_tied_head_is_the_embedding_table_itself(tiny: Tiny, dtype: torch.dtype) -> None:
    half = load_language(tiny(moe=True, levels=2, tied=True), dtype=dtype)
    assert half.lm_head.weight is half.model.embed_tokens.weight


@pytest.mark.parametrize("moe", [True, False])
def test_a_head_that_is_stored_beside_the_table_it_is_tied_to(tiny: Tiny, tmp_path: Path, moe: bool) -> None:
    """One that was trained apart was left out, and every token of an answer was another."""
    folder = Path(shutil.copytree(tiny(moe=moe, levels=2, tied=True), tmp_path / "head"))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"].clone()}))
    half = load_language(folder)
    assert half.lm_head.weight is half.model.embed_tokens.weight
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"].flip(0)}))
    both = Halves(folder, F32, F32)
    asked = both.ask(PROMPTS["one image"])
    assert torch.equal(both.logits(asked), both.truth(asked))


@pytest.mark.parametrize("intermediate", [32, 64], ids=["2I == H", "I == H"])
@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_square_experts_are_told_apart(tmp_path: Path, intermediate: int, layout: Any) -> None:
    dims = Size(**{**{f: getattr(TINY, f) for f in Size.__dataclass_fields__}, "moe_intermediate": intermediate})
    same = build_synthetic(tmp_path / "same", dims, layout="transformers", seed=3)
    asked = build_synthetic(tmp_path / "asked", dims, layout=layout, seed=3)
    wanted, found = (load_language(f, dtype=F32).causal.state_dict() for f in (same, asked))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


class HostCopies(TorchDispatchMode):
    """Notes what operations make on the host, but not views of what lies in files."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        for one in tree_leaves(made):
            on_host = isinstance(one, torch.Tensor) and one.device.type == "cpu"
            if on_host and one.untyped_storage()._cdata not in inputs:
                self.sizes.append((str(func), one.nbytes))
        return made


@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_weights_for_a_device_are_turned_and_cast_there(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """A host would need as much memory as the model has."""
    monkeypatch.setattr(loading, "_finish", lambda info, module, device: module)  # a meta device holds nothing
    folder = tiny(moe=True, levels=3, layout=layout)
    with HostCopies() as copies:
        half = load_language(folder, device="meta")
        tower = load_vision(folder, device="meta")
    assert {one.device.type for one in (*half.causal.parameters(), *tower.parameters())} == {"meta"}
    assert max(size for _, size in copies.sizes) <= 256, copies.sizes  # rope frequencies


def test_equal_seeds_give_equal_folders_and_leave_the_global_seed(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, two, other = (build_tiny(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(torch.rand(1), expected)
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)


def test_a_large_vocabulary_is_full() -> None:
    tokenizer = build_tokenizer(8192)
    assert len(tokenizer) == 8192
    assert all(tokenizer.decode([i]) for i in range(8192 - 7))


# -- one half only ----------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the tensors that were read."""
    names: list[str] = []
    original = checkpoint.Weights.tensor

    def spy(self: checkpoint.Weights, name: str) -> torch.Tensor:
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(checkpoint.Weights, "tensor", spy)
    yield names


def test_a_half_reads_only_its_own_tensors(tiny: Tiny, read: list[str]) -> None:
    folder = tiny(moe=True, levels=3)
    load_vision(folder)
    assert read and all(name.startswith("model.visual.") for name in read)
    read.clear()
    load_language(folder)
    assert read and all(name.startswith(("model.language_model.", "lm_head.")) for name in read)


def test_a_half_needs_no_shard_of_the_other(tiny: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny(moe=True, levels=3) / "model.safetensors")
    split = {"v.safetensors": "model.visual.", "t.safetensors": ("model.language_model.", "lm_head.")}
    weight_map = {name: shard for shard, own in split.items() for name in tensors if name.startswith(own)}
    for shard, load, other in (
        ("v.safetensors", load_vision, load_language),
        ("t.safetensors", load_language, load_vision),
    ):
        folder = Path(shutil.copytree(tiny(moe=True, levels=3), tmp_path / shard))
        (folder / "model.safetensors").unlink()
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        load(folder)
        with pytest.raises(CheckpointError, match="no such file"):
            other(folder)


# -- what is wrong is named -------------------------------------------------------------------------------------

VISION_TENSOR = "model.visual.blocks.1.attn.qkv.weight"
TEXT_TENSOR = "model.language_model.layers.2.mlp.gate.weight"
EXPERTS = "model.language_model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_vision, VISION_TENSOR),
        (load_language, TEXT_TENSOR),
        (load_language, EXPERTS),
        (load_language, "lm_head.weight"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(copied: Path, load: Callable[[Path], Any], name: str) -> None:
    edit_weights(copied, lambda t: t.update({name: t[name][..., :-1].contiguous()}))
    with pytest.raises(CheckpointError, match="shape") as caught:
        load(copied)
    assert caught.value.name == name
    edit_weights(copied, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match="missing") as caught:
        load(copied)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("load", "other", "name"),
    [
        (load_vision, load_language, "model.visual.blocks.9.norm1.weight"),
        (load_language, load_vision, "model.language_model.layers.4.input_layernorm.weight"),
    ],
)
def test_surplus_tensors_of_a_half_are_named(
    copied: Path, load: Callable[[Path], Any], other: Callable[[Path], Any], name: str
) -> None:
    edit_weights(copied, lambda t: t.update({name: torch.zeros(48)}))
    other(copied)
    with pytest.raises(CheckpointError, match="surplus") as caught:
        load(copied)
    assert caught.value.name == name


def test_broken_files_are_named(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_vision(copied)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_language(copied)
    index = copied / "model.safetensors.index.json"
    for content, said in (
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "../a"}}', "missing"),
        ('{"weight_map": 3}', "map"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=said):
            load_vision(copied)


def test_missing_folders_and_keys_are_named(copied: Path, tmp_path: Path) -> None:
    for load in (load_vision, load_language, load_monolith, fingerprint, Qwen3VLPlanner):
        with pytest.raises(CheckpointError, match="no such folder"):
            load(tmp_path / "nowhere")
    original = (copied / "config.json").read_text()
    changes: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("architectures", lambda c: c.pop("architectures")),
        ("LlavaForConditionalGeneration", lambda c: c.update(architectures=["LlavaForConditionalGeneration"])),
        ("vision_config", lambda c: c.pop("vision_config")),
        ("image_token_id", lambda c: c.pop("image_token_id")),
        ("text_config.hidden_size", lambda c: c["text_config"].pop("hidden_size")),
        ("vision_config.deepstack_visual_indexes", lambda c: c["vision_config"].pop("deepstack_visual_indexes")),
        ("vision_config.out_hidden_size", lambda c: c["vision_config"].update(out_hidden_size=32)),
        ("quantization_config", lambda c: c.update(quantization_config={"quant_method": "fp8"})),
        ("config.json", lambda c: c["text_config"].update(vocab_size="many")),
    ]
    for named, change in changes:
        (copied / "config.json").write_text(original)
        edit_json(copied, "config.json", change)
        for load in (load_vision, load_language, Qwen3VLPlanner):
            with pytest.raises(CheckpointError) as caught:
                load(copied)
            assert named in str(caught.value)
    (copied / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_vision(copied)


def test_folders_without_what_planning_needs_are_named(copied: Path) -> None:
    (copied / "preprocessor_config.json").rename(copied / "kept")
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        Qwen3VLPlanner(copied)
    (copied / "kept").rename(copied / "preprocessor_config.json")
    edit_json(copied, "preprocessor_config.json", lambda c: c.update(do_resize=False))
    with pytest.raises(CheckpointError, match="do_resize"):
        Qwen3VLPlanner(copied)
    edit_json(copied, "preprocessor_config.json", lambda c: c.update(do_resize=True))
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat_template"):
        Qwen3VLPlanner(copied)


# -- fingerprints -----------------------------------------------------------------------------------------------


def test_a_fingerprint_names_what_rows_depend_on(tiny: Tiny, copied: Path) -> None:
    original = fingerprint(tiny(moe=True, levels=3))
    assert (original.hidden_size, original.deepstack_levels, original.dtype) == (64, 3, "bfloat16")
    assert fingerprint(tiny(moe=True, levels=3), "float32").weights == original.weights
    sharded = tiny(moe=True, levels=3, shards=3, layout="transformers")
    assert fingerprint(sharded) == original
    edit_weights(copied, lambda t: t[TEXT_TENSOR].zero_())
    assert fingerprint(copied) == original  # the tower knows nothing of the text model
    edit_json(copied, "preprocessor_config.json", lambda c: c.update(image_mean=[0.4, 0.5, 0.5]))
    other_pixels = fingerprint(copied)
    edit_weights(copied, lambda t: t[VISION_TENSOR][0, 0].add_(1))
    other_weights = fingerprint(copied)
    assert len({original.weights, other_pixels.weights, other_weights.weights}) == 3


# -- text models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["dense", "moe"])
def text_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    sizes = {
        "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08, "eos_token_id": 633,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "dense":
            model: Any = Qwen3ForCausalLM(Qwen3Config(**sizes))
        else:
            moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **moe))
    model.save_pretrained(folder)
    build_tokenizer(640).save_pretrained(folder)
    return folder


@pytest.mark.anyio
async def test_a_peer_of_a_text_model_needs_no_encode_peer_to_be_ready(text_folder: Path) -> None:
    async with LanguageService(LanguageConfig(model=text_folder, pool_bytes=1 << 20, kv_bytes=1 << 20)) as peer:
        assert peer.ready() == (True, "ok")


def test_a_plain_text_model_works_unchanged(text_folder: Path) -> None:
    planner, half = Qwen3VLPlanner(text_folder), load_language(text_folder)
    assert half.layout.deepstack_levels == 0
    plan = planner.plan(chat("Good morning, good evening."))
    ids = torch.from_numpy(plan.input_ids)[None]
    with torch.inference_mode():
        hidden = half.model(
            inputs_embeds=half.embed(ids),
            position_ids=torch.from_numpy(plan.positions)[:, None],
            input_deepstack_embeds=torch.zeros(1, plan.tokens, 0),
        )
        assert hidden.past_key_values is None
        logits = half.lm_head(hidden.last_hidden_state)
        family = Qwen3MoeForCausalLM if "Moe" in fingerprint(text_folder).architecture else Qwen3ForCausalLM
        assert torch.equal(logits, family.from_pretrained(text_folder)(ids).logits)
        with pytest.raises(ValueError, match="DeepStack"):
            half.model(inputs_embeds=half.embed(ids), input_deepstack_embeds=torch.zeros(1, plan.tokens, 64))


def test_a_plain_text_model_takes_no_pictures(text_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="text only") as caught:
        Qwen3VLPlanner(text_folder).plan(chat("What?", ImagePart(png(64, 64))))
    assert caught.value.param == "messages[0].content[1]"
    for load in (load_vision, load_monolith):
        with pytest.raises(CheckpointError, match="architectures"):
            load(text_folder)


def test_tensors_of_a_text_model_are_checked_too(text_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_folder, tmp_path / "broken"))
    edit_weights(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_language(folder)
    assert caught.value.name == "model.norm.weight"
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(64), "model.more": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="unexpected") as caught:
        load_language(folder)
    assert caught.value.name == "model.more"
