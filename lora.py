"""
LoRA (Hu et al. 2021): freeze the weights, learn a product of two thin matrices beside some of them.

    python sft.py config/poems_sft.py --lora_rank=8 --out_dir=out/poems-lora     # trains adapters
    python lora.py out/poems-lora --out=out/poems-merged                         # a checkpoint like any other

in:  a run made with --lora_rank; its ckpt.pt holds the adapters and names its base. common.load_model merges the two
out: out/<run>/ckpt.pt with whole weights, tokenizer.model

What differs from the paper and peft: (1) q, k, v are one matrix and share one A, as do gate and up; (2) no dropout;
(3) routed experts, the router and the embeddings are never adapted.
"""
import math
import os
import re
from dataclasses import dataclass

# first, as it says how to install what is missing
from configurator import check, run

import torch.nn as nn
import torch.nn.functional as F

from common import load_model, save_checkpoint, weights_hash


@dataclass
class Config:
    run: str = ""   # folder of the LoRA run (the bare word)
    out: str = ""   # folder to write


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
        # with B = 0 the first step starts from the base itself; were A zero as well, neither would get a gradient
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        # two thin products instead of a change of W: rank * (in + out) numbers to learn instead of in * out
        thin = F.linear(x, self.lora_a)                                            # (..., rank)
        change = F.linear(thin, self.lora_b) * self.scale                          # (..., out)
        return super().forward(x) + change


def add_lora(model, rank, alpha, targets, base="", base_hash=""):
    """Freeze the model and put adapters on the block layers whose dotted name ends in a match of the regex targets.

    base, base_hash: where the frozen weights lie; kept with the rest in model.lora, which goes into the checkpoint.
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
    model.lora = {
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "base": base,
        "base_hash": base_hash}
    return model


def start_lora(model, cfg):
    """add_lora with the settings of a stage: lora_rank, lora_alpha, lora_targets over the run cfg.init_from."""
    # the path from one folder to the other, so that both can move together
    base = os.path.relpath(cfg.init_from, cfg.out_dir)
    return add_lora(
        model,
        cfg.lora_rank,
        cfg.lora_alpha,
        cfg.lora_targets,
        base,
        weights_hash(model.state_dict()))


def main(cfg):
    check(cfg.run and cfg.out, "name the run and a folder for the result: python lora.py out/poems-lora "
          "--out=out/poems-merged")
    model, tokenizer, checkpoint = load_model(cfg.run)
    check(checkpoint.get("lora"), f"{cfg.run} holds no adapters, but whole weights: there is nothing to merge")
    path = os.path.join(cfg.out, "ckpt.pt")
    check(not os.path.exists(path), f"{path} exists, and would be overwritten. Choose another --out")
    # load_model has merged them; what belongs to training is left behind
    merged = {
        **checkpoint,
        "model": model.state_dict(),
        "lora": None,
        "optimizers": [],
        "scaler": {}}
    save_checkpoint(path, merged)
    tokenizer.save(os.path.join(cfg.out, "tokenizer.model"))
    print(f"{path}: the weights of {cfg.run} with its adapters added")


if __name__ == "__main__":
    run(main, Config, positional="run")
