"""
Parts of gpu_check.sh that no tool measures.

    python runs/gpu_check.py decode      recorded steps against plain ones: equal answers, tokens a second
    python runs/gpu_check.py step        one training step: attention by cuDNN or not, alone, under DDP, in shards
"""
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from common import decode_graph, generate as generate_file  # noqa: E402
from common.distributed import Env, can_compile, choose_device, choose_dtype  # noqa: E402
from common.sharding import shard_model  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from tools.bench import SIZES, make_step, our_loss  # noqa: E402

SMOKE = bool(os.environ.get("SMOKE"))


def build(env):
    torch.manual_seed(1)
    shape = dict(SIZES["small"], dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64) if SMOKE else SIZES["baby"]
    return Transformer(ModelConfig(**shape)).to(env.device)


def seconds(function, turns):
    """Median seconds of a call, the GPU's work included; the first, which prepares, is not counted."""
    taken = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def answers(model, prompts, new, recorded, **how):
    generate_file.can_record = lambda model: recorded
    return generate_file.generate(model, prompts, new, **how)


def decode(env):
    model = build(env).eval()
    new = 8 if SMOKE else 128
    prompts = [torch.randint(1, 1000, (n,)).tolist() for n in (3, 17, 1, 40)]
    prompts += prompts[:2]  # equal ones are read once
    for how in (dict(temperature=0), dict(seed=1), dict(seed=2, top_p=0.9), dict(seed=3, top_k=50, stop_ids=range(0, 6400, 60)),
                dict(seed=4, min_p=0.05, repetition_penalty=1.2)):
        plain = answers(model, prompts, new, False, **how)
        recorded = answers(model, prompts, new, True, **how)
        equal = sum(a == b for a, b in zip(plain, recorded, strict=True))
        print(f"fp32, {how}: {equal} of {len(plain)} answers equal", flush=True)
    for B in (1, 2) if SMOKE else (1, 32, 64, 256):
        prompts = [torch.randint(1, 1000, (16,)).tolist() for _ in range(B)]
        rates = []
        with env.autocast():
            for recorded in (False, True):
                rates.append(B * new / seconds(lambda: answers(model, prompts, new, recorded, seed=1), 1 if SMOKE else 3))
        print(f"{B} rows: {rates[0]:,.0f} tokens/s plain, {rates[1]:,.0f} recorded, {rates[1] / rates[0]:.2f} x; "
              f"{1000 * B / rates[1]:.2f} ms a token", flush=True)


def step(env):
    B, T = (2, 16) if SMOKE else (32, 1024)
    dist.init_process_group("gloo" if SMOKE else "nccl", init_method=f"file:///tmp/gpu_check_{os.getpid()}", rank=0,
                            world_size=1)
    compiled = not SMOKE and can_compile(env)
    for name, cudnn, wrap in (("alone, flash attention", False, None), ("alone, cuDNN attention", True, None),
                              ("in DDP", True, "ddp"), ("in shards (FSDP2)", True, "shards")):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch._dynamo.reset()
        model = net = build(env)
        x = torch.randint(model.config.vocab_size, (B, T), device=env.device)
        for block in model.blocks if compiled else ():
            block.compile()
        if wrap == "ddp":
            net = DistributedDataParallel(model, gradient_as_bucket_view=True)
            net.head_weight = model.head_weight
        if wrap == "shards":
            net = shard_model(model, env)
        one = make_step(net, lambda module, x, y: our_loss(module, x, y, compiled), x, x, env)
        taken = seconds(one, 1 if SMOKE else 8)
        print(f"{name:<26} {B * T / taken:,.0f} tokens/s, {1000 * taken:.1f} ms", flush=True)
        del model, net, one
    dist.destroy_process_group()


if __name__ == "__main__":
    device = choose_device("cpu" if SMOKE else "cuda")
    env = Env(0, 1, device, choose_dtype("", device))
    {"decode": decode, "step": step}[sys.argv[1]](env)
