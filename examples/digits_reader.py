"""transformers' own modules, called without loops over images: the same numbers, some twenty times the speed on a GPU.

A training batch holds prompts of one wording and one image count, and all images have one size. Then the attention of
the tower is one batched call, positions are known from the wording alone, and DeepStack is a dense addition: no
``.tolist()``, no boolean index, nothing that makes the host wait for the device. ``tests/test_digits.py`` holds this
against the model's own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from digits_model import MERGE, PATCH, QUESTIONS, SYSTEM

from aiodisagg.data import IMAGE_SIZE

SIDE = IMAGE_SIZE // PATCH
ROWS = (SIDE // MERGE) ** 2
"""Visual tokens of one image."""


@dataclass(frozen=True)
class Wording:
    """One way to ask about ``images`` images."""

    images: int
    question: str
    images_first: bool = True
    system: bool = False

    def messages(self) -> list[dict[str, Any]]:
        pictures = [{"type": "image"}] * self.images
        words = [{"type": "text", "text": self.question}]
        user = {"role": "user", "content": pictures + words if self.images_first else words + pictures}
        return [{"role": "system", "content": SYSTEM}, user] if self.system else [user]


WORDINGS = tuple(
    Wording(images, question, first, system)
    for images in range(1, 7)
    for question in QUESTIONS
    for first, system in ((True, False), (True, False), (False, False), (True, True))
)


def prompt_ids(tokenizer: Any, wording: Wording) -> list[int]:
    """Token ids of the prompt, with one placeholder for each visual token."""
    text = tokenizer.apply_chat_template(wording.messages(), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * ROWS))["input_ids"])


class Reader:
    """Calls a model on the images and labels of one wording.

    It changes the methods of the model that it is given: afterwards only the ``state_dict`` is of use elsewhere.
    ``dense_experts`` runs every expert on every token: on a GPU cheaper than sorting tokens by expert.
    """

    def __init__(self, model: Any, tokenizer: Any, *, dense_experts: bool) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tower, self.text = model.model.visual, model.model.language_model
        self.router_logits: list[torch.Tensor] = []
        digits = [tokenizer.encode(str(digit)) for digit in range(10)]
        space = tokenizer.encode(" ")
        assert all(len(ids) == 1 for ids in (*digits, space)), "a digit and a space must be one token each"
        device = next(model.parameters()).device
        self.digit_ids = torch.tensor([ids[0] for ids in digits], device=device)
        self.space_id, self.end_id = space[0], int(tokenizer.eos_token_id)
        self.text._deepstack_process = lambda hidden, _mask, rows: hidden + rows
        for block in self.tower.blocks:
            block.attn.forward = MethodType(_attend_per_image, block.attn)
        for layer in self.text.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.router_logits.append(out[0]))
            if dense_experts:
                layer.mlp.experts.forward = MethodType(_every_expert, layer.mlp.experts)
        self._places = lru_cache(maxsize=None)(self._place)

    def encode(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Pixel values [n * 36, 1536] to the final rows and each DeepStack level, all [n * ROWS, h]."""
        tower = self.tower
        images = len(pixel_values) // SIDE**2
        # The learned grid is SIDE x SIDE: resampling is the identity and only the order by 2x2 cells remains.
        across = torch.arange(SIDE**2, device=pixel_values.device).view(SIDE // MERGE, MERGE, SIDE // MERGE, MERGE)
        order = across.transpose(1, 2).flatten()
        # One patch is the whole kernel, so the convolution is a matrix product, and a much faster one.
        filters = tower.patch_embed.proj
        x = F.linear(pixel_values, filters.weight.flatten(1), filters.bias)
        x = x + tower.pos_embed(order).to(x.dtype).repeat(images, 1)
        rope = tower.rotary_pos_emb(x, torch.stack([order // SIDE, order % SIDE], dim=1))
        levels = []
        for index, block in enumerate(tower.blocks):
            x = block(x, cu_seqlens=None, position_embeddings=rope)
            if index in tower.deepstack_visual_indexes:
                levels.append(tower.deepstack_merger_list[len(levels)](x))
        return [tower.merger(x), *levels]

    def logits(self, wording: Wording, rows: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Logits [B, 2 * images, vocabulary] of the answer's tokens, given ``rows`` of B * images images and ``labels``
        [B, images] as what was said before."""
        ids, positions, visual = self._places(wording)
        self.router_logits.clear()
        batch, answer = len(labels), self.answer_ids(labels)
        ids = torch.cat([ids.expand(batch, -1), answer[:, :-1]], dim=1)
        embedded = self.text.embed_tokens(ids)
        final, *levels = (part.view(batch, len(visual), -1).to(embedded.dtype) for part in rows)
        out = self.text(
            inputs_embeds=embedded.index_copy(1, visual, final),
            position_ids=positions.expand(3, batch, -1),
            deepstack_visual_embeds=[torch.zeros_like(embedded).index_copy(1, visual, level) for level in levels],
            use_cache=False,
        )
        logits: torch.Tensor = self.model.lm_head(out.last_hidden_state[:, -answer.shape[1] :])
        return logits

    def answer_ids(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels [B, n] to token ids [B, 2n]: a digit, a space, a digit ... and the end of the turn."""
        digits = self.digit_ids[labels]
        between = torch.full_like(digits, self.space_id)
        between[:, -1] = self.end_id
        return torch.stack([digits, between], dim=2).flatten(1)

    def balance_loss(self) -> torch.Tensor:
        """How unevenly the last call used the experts; 1 at best (Switch Transformer, equations 4 to 6)."""
        logits = torch.cat(self.router_logits).float()
        probabilities = logits.softmax(dim=-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2, dim=-1).indices, 1.0)
        return (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum() * logits.shape[1] / 2

    def _place(self, wording: Wording) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = torch.tensor([prompt_ids(self.tokenizer, wording)])
        visual = ids == self.model.config.image_token_id
        grid = torch.tensor([[1, SIDE, SIDE]] * wording.images)
        places, _ = self.model.model.get_rope_index(ids, visual.int(), image_grid_thw=grid)
        said = int(places.max()) + 1 + torch.arange(2 * wording.images - 1)
        places = torch.cat([places, said.expand(3, 1, -1)], dim=2)
        device = self.digit_ids.device
        return ids.to(device), places.to(device), visual[0].nonzero().flatten().to(device)


def _attend_per_image(self: Any, hidden: torch.Tensor, *, position_embeddings: Any, **_: Any) -> torch.Tensor:
    cos, sin = (part[:, None].to(hidden.dtype) for part in position_embeddings)
    q, k, v = self.qkv(hidden).view(-1, SIDE**2, 3, self.num_heads, self.head_dim).unbind(2)
    q, k = (x * cos + torch.cat([-x.chunk(2, dim=-1)[1], x.chunk(2, dim=-1)[0]], dim=-1) * sin for x in (q, k))
    q, k = q.to(v.dtype), k.to(v.dtype)
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return self.proj(mixed.transpose(1, 2).reshape(len(hidden), -1))


def _every_expert(self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    share = torch.zeros(len(hidden), self.num_experts, device=hidden.device, dtype=weights.dtype)
    share = share.scatter(1, chosen, weights).t().unsqueeze(2)
    gate, up = torch.matmul(hidden, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    each = torch.matmul(self.act_fn(gate) * up, self.down_proj.transpose(1, 2))
    return (each * share).sum(dim=0).to(hidden.dtype)
