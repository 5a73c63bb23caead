"""
LoRA (Hu et al. 2021): freeze the weights, learn a product of two thin matrices beside some of them.

    python sft.py config/poems_sft.py --lora_rank=32 --lora_alpha=32 --optimizer=adamw --lr=3e-3 --out_dir=out/lora
    python -m tools.export out/lora --to=merged --out=out/merged                # a checkpoint like any other

The run's ckpt.pt holds the adapters and names its base; checkpoint.load_model adds the two.

What differs from the paper and peft: (1) q, k, v are one matrix and share one A, as do gate and up; (2) no dropout;
(3) routed experts and the router are never adapted; of the embeddings, the rows of the chat tokens learn. No text of
pretraining holds these tokens, so their rows are equal. If they stayed frozen, no adapter could tell <|im_end|> from
the others, and answers would not end.
"""
import hashlib
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

from configurator import check


class LoRALinear(nn.Linear):
    """y = W x + alpha/rank · B A x (sec. 4.1). W keeps its name in the state dict; B starts at zero, A as in peft."""

    def __init__(self, linear, rank, alpha):
        super().__init__(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta")  # no memory: the weight is the one that is there
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        # B is 0, so at first nothing changes. If A were 0 as well, neither of them would get a gradient
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        # two thin matmuls instead of a change of W: rank * (in + out) numbers to learn instead of in * out
        thin = F.linear(x, self.lora_a)                                            # (..., rank)
        change = F.linear(thin, self.lora_b) * self.scale                          # (..., out)
        return super().forward(x) + change


class LearnedRows(nn.Module):
    """A matrix (V, C) with some rows of its own, which learn: registered on an embedding, as its weight."""

    def __init__(self, weight, rows):
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows, device=weight.device), persistent=False)
        self.lora_rows = nn.Parameter(weight[rows].detach().clone())               # (rows, C)

    def forward(self, weight):
        return weight.index_copy(0, self.rows, self.lora_rows)


def add_lora(model, rank, alpha, targets, base="", base_hash="", rows=()):
    """Freeze the model and put adapters on the block layers whose dotted name ends in a match of the regex targets.

    rows: token ids whose rows of the embedding (and of the head, where that is another matrix) learn. base, base_hash:
    where the frozen weights lie; kept with the rest in model.lora, which goes into the checkpoint.
    """
    layers = {}
    for name, module in model.named_modules():
        # the router's weight is read directly, not through its forward: an adapter on it would do nothing
        if isinstance(module, nn.Linear) and "blocks." in name and not name.endswith("router"):
            layers[name] = module
    try:
        pattern = re.compile(rf"(^|\.)({targets})$")
    except re.error as error:
        check(False, f"lora_targets={targets!r} is no regular expression: {error}")
    chosen = {name: layer for name, layer in layers.items() if pattern.search(name)}
    known = sorted({name.split(".")[-1] for name in layers})
    check(chosen and rank > 0, f"lora_targets={targets!r} and lora_rank={rank} adapt nothing; the rank must be 1 or "
          f"more, the layers are {', '.join(known)}")
    # freeze all of it first: only what is added from here on will learn
    model.requires_grad_(False)
    for name, layer in chosen.items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha))
    for table in filter(None, [model.embed, model.lm_head]):
        if rows:
            parametrize.register_parametrization(table, "weight", LearnedRows(table.weight, rows))
    model.lora = {
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "base": base,
        "base_hash": base_hash,
        "rows": list(rows)}
    return model


def start_lora(model, cfg, weights, tokenizer):
    """add_lora with the settings of a stage: lora_rank, lora_alpha, lora_targets over the run cfg.init_from, whose
    checkpoint holds `weights`. The chat tokens' rows learn, too."""
    # the path from one folder to the other, so that both can move together
    base = os.path.relpath(cfg.init_from, cfg.out_dir)
    rows = sorted(tokenizer.special_names)
    return add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, base, weights_hash(weights), rows)


def share_weights(model, other):
    """Let both models, which are equal, use one copy of their weights; adapters that come later are the first one's."""
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data = theirs.data


def adapters_of(model):
    """What of the model's state dict its checkpoint holds: adapters, and a reward model's head, which learns too."""
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name or name.startswith("head.")}


def merge_adapters(weights, adapters, scale, rows=()):
    """Return weights with each adapter's product added, W + scale * B A (LoRA, sec. 4.1), and the learned rows."""
    merged = dict(weights)
    for name in adapters:
        if name.endswith("lora_rows"):
            table = name.replace("parametrizations.weight.0.lora_rows", "weight")
            merged[table] = weights[table].index_copy(0, torch.tensor(rows), adapters[name])
        if name.endswith("lora_a"):
            layer = name.removesuffix("lora_a")
            product = adapters[layer + "lora_b"] @ adapters[layer + "lora_a"]
            merged[layer + "weight"] = weights[layer + "weight"] + scale * product
    return merged


def weights_hash(weights):
    """sha256 of the tensors of a checkpoint: adapters are worth nothing over another base, even of the same shape."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        numbers = weights[name].cpu().contiguous().reshape(-1)
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()
