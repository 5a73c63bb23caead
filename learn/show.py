"""
卡片里的小实验，几秒钟一个。

    python -m learn.show kv_cache        # 有缓存和没有缓存：logits 一样，时间不一样
    python -m learn.show schedule        # 学习率的两种走法
    python -m learn.show optimizers      # AdamW 和 Muon，同样的步数
    python -m learn.show kl              # KL 的三种估计
    python -m learn.show intervals       # 100 道题里对了 60 道，到底是多少
    python -m learn.show experts         # 混合专家：谁得到了多少词元
"""
import math
import time
from dataclasses import dataclass

import torch

import pretrain
from common.checkpoint import load_model
from common.generate import generate
from common.optim import lr_at
from common.rollout import k3
from configurator import check, run
from learn import draw, small
from learn.measures import curve_of
from model import KVCache
from tools.evaluate import wilson

STEPS = {"optimizers": 200, "experts": 150}


def kv_cache():
    """Write 60 tokens in 32 rows twice: with the cache, and with everything computed anew for every token."""
    model, tokenizer, _ = load_model(small.make_run("pretrain"))
    prompt = [tokenizer.eot_id] + tokenizer.encode("床前明月光，")
    P, rows, new = len(prompt), 32, 60
    for _ in range(2):  # the first time is for warming up
        began = time.perf_counter()
        cached = generate(model, [prompt] * rows, new, temperature=0)
        with_cache = time.perf_counter() - began
        began = time.perf_counter()
        ids = torch.tensor([prompt] * rows)
        with torch.no_grad():
            for _ in range(new):
                logits = model.logits(model(ids)[:, -1])
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        without = time.perf_counter() - began
    print(f"{rows} 行各写 {new} 个新词元，两种做法写的一样：{cached == ids[:, P:].tolist()}")
    print(f"有缓存：{with_cache:.2f} 秒，每行算 {P + new} 个位置")
    print(f"没有缓存：{without:.2f} 秒，每行算 {sum(range(P, P + new)):,} 个位置")
    c = model.config
    numbers = 2 * c.n_layers * c.n_kv_heads * c.head_dim
    cache = KVCache(c, torch.zeros(1, dtype=torch.long), 96, torch.float32)
    size = sum(k.numel() + v.numel() for k, v in zip(cache.k, cache.v))
    print(f"每个词元记 2 × {c.n_layers} 层 × {c.n_kv_heads} 头 × {c.head_dim} = {numbers} 个数；96 个位置共 {size:,} 个")


def schedule():
    """Draw the two schedules."""
    cfg = pretrain.Config(lr=1.0, min_lr=0.05, max_steps=1000, warmup_steps=100)
    cosine = [(step, lr_at(step, cfg)) for step in range(0, 1000, 10)]
    wsd = [(step, lr_at(step, cfg, decay_steps=300)) for step in range(0, 1000, 10)]
    print("warmup_steps=100，max_steps=1000：· 余弦，× 先平后直线（decay_steps=300）\n")
    draw.print_curves({"·": cosine, "×": wsd})


def optimizers():
    """The small model with AdamW and with Muon."""
    curves = {}
    n_steps = STEPS["optimizers"]
    for mark, name, lr in (("·", "adamw", 1e-2), ("×", "muon", 2e-2)):
        folder = small.train("pretrain", optimizer=name, lr=lr, max_steps=n_steps, out_dir=f"out/learn-{name}")
        curves[mark] = curve_of(folder, "loss")
        half, end = curves[mark][n_steps // 2 - 1][1], curves[mark][-1][1]
        print(f"{name:<6} lr {lr}：第 {n_steps // 2} 步损失 {half:.2f}，第 {n_steps} 步 {end:.2f}", flush=True)
    print("\n· AdamW  × Muon")
    draw.print_curves(curves)


def kl():
    """Three estimates of KL(p || q) from samples of p, beside the true value."""
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = torch.tensor([0.4, 0.3, 0.2, 0.1])
    true = (p * (p / q).log()).sum()
    x = p.multinomial(100_000, replacement=True)
    logp = p.log()[x]
    logq = q.log()[x]
    estimates = {"k1 = log(p/q)": logp - logq, "k2 = log(p/q)²/2": (logp - logq) ** 2 / 2, "k3": k3(logp, logq)}
    print(f"真值 KL(p||q) = {true:.5f}\n")
    print("                    平均      标准差    最小")
    for name, values in estimates.items():
        print(f"  {name:<18}{values.mean():.5f}   {values.std():.5f}   {values.min():+.3f}")


def intervals():
    """Wilson intervals of 60 % at several sizes."""
    print("对了 60 % 时，95 % 的置信区间：")
    for n in (10, 100, 1000, 10_000):
        low, high = wilson(round(0.6 * n), n)
        line = " " * round(60 * low) + "─" * round(60 * (high - low))
        print(f"  {n:>6} 道题  {100 * low:5.1f} … {100 * high:5.1f} %  {line}")
    print("两个模型差 5 个百分点，100 道题说明不了什么，1,000 道题才刚够。")


def experts():
    """A small mixture of experts, and how many tokens each expert gets after training."""
    folder = small.train("pretrain", n_experts=8, n_active_experts=2, n_layers=3, max_steps=STEPS["experts"],
                         out_dir="out/learn-moe")
    model, tokenizer, _ = load_model(folder)
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for block in model.blocks:
        if hasattr(block.ffn, "load"):
            routed = block.ffn.gate_up.numel() + block.ffn.down.numel()
            idle += routed - routed * block.ffn.k // len(block.ffn.bias)
    print(f"{total:,} 个参数，一个词元只用其中 {total - idle:,} 个")
    ids = torch.tensor([tokenizer.encode(poem)[:24] for poem in small.POEMS])
    model(ids)  # counts the load, as in training
    for number, block in enumerate(model.blocks):
        if hasattr(block.ffn, "load"):
            share = block.ffn.load / block.ffn.load.sum()
            print(f"\n第 {number + 1} 层，{len(share)} 个专家各得多少（平均 {1 / len(share):.3f}）：")
            draw.print_bars([(f"专家 {i + 1}", value) for i, value in enumerate(share.tolist())], 24)


SHOWS = {show.__name__: show for show in (kv_cache, schedule, optimizers, kl, intervals, experts)}


@dataclass
class Config:
    name: str = ""


def main(cfg):
    check(cfg.name in SHOWS, f"没有 {cfg.name!r}，有：{' '.join(SHOWS)}")
    SHOWS[cfg.name]()


if __name__ == "__main__":
    run(main, Config, positional="name")
