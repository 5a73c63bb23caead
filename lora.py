"""
LoRA (Hu et al. 2021): freeze the weights, learn a product of two thin matrices beside some of them.

    python sft.py config/poems_sft.py --lora_rank=8 --out_dir=out/poems-lora     # trains adapters
    python lora.py out/poems-lora --out=out/poems-merged                         # a checkpoint like any other

in:  a run made with --lora_rank; its ckpt.pt holds the adapters and names its base. common.load_model merges the two
out: out/<run>/ckpt.pt with whole weights, tokenizer.model

What differs from the paper and peft: (1) q, k, v are one matrix and share one A, as do gate and up; (2) no dropout;
(3) routed experts, the router and the embeddings are never adapted.
"""
import hashlib
import math
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear


@dataclass
class Config:
    run: str = ""   # folder of the LoRA run (the bare word)
    out: str = ""   # folder to write


class LoRALinear(nn.Linear):
    """y = W x + alpha/rank · B A x (sec. 4.1). W keeps its name in the state dict; B starts at zero, A as in peft."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def add_lora(model, rank, alpha, targets, base="", base_hash=""):
    """Freeze the model and put adapters on the block layers whose dotted name ends in a match of the regex targets.

    base, base_hash: where the frozen weights lie; kept with the rest in model.lora, which goes into the checkpoint.
    """
    # the router's weight is read directly, not through its forward: an adapter on it would do nothing
    layers = {name: m for name, m in model.named_modules()
              if isinstance(m, nn.Linear) and "blocks." in name and not name.endswith("router")}
    chosen = {name: m for name, m in layers.items() if re.search(rf"(^|\.)({targets})$", name)}
    if not chosen or rank < 1:
        raise SystemExit(f"error: lora_targets={targets!r} and lora_rank={rank} adapt nothing; the rank must be 1 or "
                         f"more, the layers are {', '.join(sorted({name.split('.')[-1] for name in layers}))}")
    model.requires_grad_(False)
    for name, linear in chosen.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha))
    model.lora = {"rank": rank, "alpha": alpha, "targets": targets, "base": base, "base_hash": base_hash}
    return model


def lora_state_dict(model):
    return {name: t for name, t in model.state_dict().items() if "lora_" in name}


def load_lora(model, state):
    """Fill the adapters of a model that add_lora prepared; the names must be exactly the same."""
    different = lora_state_dict(model).keys() ^ state.keys()
    if different:
        raise SystemExit(f"error: the checkpoint's adapters are not this model's: {sorted(different)[:3]} …")
    model.load_state_dict(state, strict=False)
    return model


@torch.no_grad()
def merge_lora(model):
    """Add every adapter to its weight and make the layers plain again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            linear = Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            linear.weight += module.scale * (module.lora_b @ module.lora_a)
            model.set_submodule(name, linear)
    del model.lora
    return model.requires_grad_(True)


def weights_hash(state):
    """sha256 of a state dict: adapters are worth nothing over another base, even one of the same shape."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main(cfg):
    from common import load_model, save_checkpoint  # here: common imports this file
    model, _, checkpoint = load_model(cfg.run)
    for key in ("lora", "optimizers", "scaler"):
        checkpoint.pop(key, None)
    folder = cfg.run if os.path.isdir(cfg.run) else os.path.dirname(cfg.run)
    save_checkpoint(os.path.join(cfg.out, "ckpt.pt"), {**checkpoint, "model": model.state_dict()},
                    os.path.join(folder, "tokenizer.model"))
    print(f"{cfg.out}/ckpt.pt: the weights of {cfg.run} with its adapters added")


if __name__ == "__main__":
    from configurator import load_config
    main(load_config(Config, positional="run"))
