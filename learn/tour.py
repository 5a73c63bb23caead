"""
跟着一句诗走：床前明月光。每一站打印你自己的模型里的数；没有模型，就先用几秒钟训练一个小的。

    python -m learn.tour                 # 有哪些站
    python -m learn.tour attention       # 走一站
    python -m learn.tour tokens --line=白日依山尽    # 换一句

The text that goes with it: learn/README.md
"""
import json
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import model as model_file
import pretrain
from common.checkpoint import load_checkpoint, load_model
from common.data import open_data
from common.generate import filter_logits, generate
from configurator import check, run
from learn import draw, tour_answers
from learn.runs import data_of, read_next, run_of, show
from model import Transformer
from tokenizer import load_tokenizer


def tokens(line):
    """字 → 字节 → 编号"""
    folder = run_of("pretrain")
    tokenizer = load_tokenizer(folder)
    print(f"{folder} 的词表有 {tokenizer.vocab_size} 个词元\n")
    for char in line:
        spelled = " ".join(f"{byte:02x}" for byte in char.encode())
        print(f"  {char}  字节 {spelled}   编号 {tokenizer.encode(char)}")
    ids = tokenizer.encode(line)
    rare = tokenizer.encode("龘")
    print(f"\n一句话的编号：{ids}，还原：{tokenizer.decode(ids)}")
    print(f"词表里没有的字用字节拼：龘 → {[show(tokenizer, i) for i in rare]}")
    read_next(("Tokenizer.encode", "tokenizer.py"), ("join", "recipes/bpe.py"))


def rows(line):
    """语料 → 行：输入和目标错开一位"""
    folder = data_of("text")
    tokenizer = load_tokenizer(folder)
    train, _, _ = open_data(folder, "text")
    print(f"{folder}/train.bin：{len(train.tokens):,} 个编号连成一行，每个 {train.tokens.itemsize} 字节\n")
    cfg = pretrain.Config(seq_len=12, batch_size=3)
    x, y = pretrain.get_batch(train.tokens, cfg, 0, 0, torch.device("cpu"))
    for inputs, targets in zip(x, y):
        print("  输入 " + " ".join(draw.fill(show(tokenizer, i), 3) for i in inputs))
        print("  目标 " + " ".join(draw.fill(show(tokenizer, i), 3) for i in targets) + "\n")
    print(f"x {tuple(x.shape)}，y {tuple(y.shape)}：每个位置都是一道题，这一批共 {y.numel()} 道")
    read_next(("get_batch", "pretrain.py"), ("open_data", "common/data.py"))


@torch.no_grad()
def attention(line):
    """词元 → 向量 → 注意力 → logits"""
    folder = run_of("pretrain")
    model, tokenizer, _ = load_model(folder)
    ids = torch.tensor([[tokenizer.eot_id] + tokenizer.encode(line)])
    names = [show(tokenizer, i) for i in ids[0]]
    names[0] = "始"
    seen = []  # what attend gets, layer by layer
    ours = model_file.attend

    def watch(q, k, v, mask):
        seen.append((q, k))
        return ours(q, k, v, mask)

    model_file.attend = watch
    hidden = model(ids)
    model_file.attend = ours
    c = model.config
    print(f"{folder}：词表 {c.vocab_size} × {c.dim} 个数，{c.n_layers} 层，每层 {c.n_heads} 个头，每头 {c.head_dim} 个数")
    print(f"“{line[0]}”查表得到的向量，前 6 个数：{[round(n, 3) for n in model.embed(ids)[0, 1, :6].tolist()]}")
    future = torch.ones(len(names), len(names)).triu(1) > 0
    heads = {}
    for layer, (q, k) in enumerate(seen, 1):
        k = k.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1)
        scores = q[0] @ k[0].mT / c.head_dim ** 0.5                                # (heads, T, T)
        for head, weights in enumerate(scores.masked_fill(future, -torch.inf).softmax(-1), 1):
            heads[layer, head] = weights
    # many heads look at the first token, which says nothing; show the one that does so least
    (layer, head), weights = min(heads.items(), key=lambda item: item[1][:, 0].sum())
    print(f"\n第 {layer} 层第 {head} 个头：一行是一个字在看谁（加起来是 1；后面的看不见）\n")
    print("       " + "".join(draw.fill(name, 6) for name in names))
    for name, row in zip(names, weights):
        cells = [f"{w:.2f}{draw.shade(w)} " if w > 0 else " ·    " for w in row.tolist()]
        print(f"  {draw.fill(name, 5)}" + "".join(cells))
    logits = model.logits(hidden)[0, -1]
    probs = logits.softmax(-1)
    print(f"\n最后一个字的 {len(logits)} 个 logits，softmax 后最可能的：")
    top = probs.topk(5)
    draw.print_bars([(show(tokenizer, i), p.item()) for p, i in zip(top.values, top.indices)])
    read_next(("attend", "model.py"), ("Attention.forward", "model.py"), ("Transformer.forward", "model.py"))


@torch.no_grad()
def loss(line):
    """logits → 损失：没学过的模型是 ln V"""
    folder = run_of("pretrain")
    model, tokenizer, _ = load_model(folder)
    ids = torch.tensor([[tokenizer.eot_id] + tokenizer.encode(line)])
    V = model.config.vocab_size
    torch.manual_seed(0)
    untrained = Transformer(model.config)
    print(f"先猜：什么都没学过时，{V} 个词元的概率都差不多，-ln(1/{V}) = ln {V} = {torch.tensor(V).log():.2f}\n")
    columns = {}
    for name, net in (("没学过", untrained), ("学过", model)):
        logits = net.logits(net(ids[:, :-1]))[0]
        columns[name] = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    print("  下一个    没学过    学过      概率")
    for i, before, after in zip(ids[0, 1:], *columns.values()):
        word = draw.fill(show(tokenizer, i), 8)
        print(f"  {word}{before:8.2f}{after:8.2f}{(-after).exp():10.4f}  {draw.bar(after, 9, 20)}")
    means = [column.mean().item() for column in columns.values()]
    n_bytes = len(line.encode())
    bits = columns["学过"].sum().item() / 0.693147 / n_bytes
    print(f"\n平均：没学过 {means[0]:.2f}，学过 {means[1]:.2f} nats 每词元；换成比特每字节：{bits:.2f}")
    read_next(("cross_entropy", "common/loss.py"), ("softmax_nll", "common/loss.py"), ("text_loss", "common/loss.py"))


def gradient(line):
    """损失 → 梯度 → 一个权重走一步"""
    folder = run_of("pretrain")
    model, tokenizer, _ = load_model(folder)
    ids = torch.tensor([[tokenizer.eot_id] + tokenizer.encode(line)])

    def loss_now():
        logits = model.logits(model(ids[:, :-1]))[0]
        return F.cross_entropy(logits, ids[0, 1:])

    before = loss_now()
    before.backward()
    weight = model.blocks[0].attn.out.weight
    grad = weight.grad[0, 0].item()
    old = weight[0, 0].item()
    print(f"这一句的损失：{before.item():.4f}")
    print(f"第 1 层 attn.out 的 weight[0, 0] = {old:+.6f}，它的梯度 {grad:+.2e}")
    # the meaning of a gradient: nudge the weight and look
    h = 1e-2
    with torch.no_grad():
        weight[0, 0] += h
        up = loss_now().item()
        weight[0, 0] -= 2 * h
        down = loss_now().item()
        weight[0, 0] += h
    print(f"把它加减 {h} 各算一次损失：({up:.5f} - {down:.5f}) / {2 * h} = {(up - down) / (2 * h):+.2e}，这就是梯度的意思\n")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    count = sum(p.numel() for p in model.parameters())
    print(f"所有 {count:,} 个权重的梯度合起来长 {norm:.2f}，裁到不超过 1")
    lr = 0.05
    with torch.no_grad():
        for p in model.parameters():
            p -= lr * p.grad
    after = loss_now().item()
    print(f"每个权重都逆着梯度走一小步（学习率 {lr}）：weight[0, 0] = {weight[0, 0].item():+.6f}，"
          f"损失 {before.item():.4f} → {after:.4f}")
    read_next(("clip: a gradient", "pretrain.py"), ("Muon.step", "common/optim.py"), ("lr_at", "common/optim.py"))


def checkpoint(line):
    """一次运行在磁盘上留下什么"""
    folder = run_of("pretrain")
    for name in sorted(os.listdir(folder)):
        size = os.path.getsize(os.path.join(folder, name))
        print(f"  {folder}/{name:<18}{size:>12,} 字节")
    saved = load_checkpoint(folder)
    print(f"\nckpt.pt 是一个字典：{', '.join(saved)}")
    print(f"stage {saved['stage']}，step {saved['step']}，词表指纹 {saved['fingerprint'][:12]}\n权重：")
    for name, tensor in list(saved["model"].items())[:6]:
        print(f"  {name:<30}{str(tuple(tensor.shape)):<14}{tensor.dtype}")
    total = sum(tensor.numel() for tensor in saved["model"].values())
    print(f"  …… 共 {len(saved['model'])} 个张量，{total:,} 个数，× 4 字节 = {4 * total:,}；其余是优化器的状态")
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        records = [json.loads(text) for text in f]
    print("\nlog.jsonl 里的损失：")
    draw.print_curves({"·": [(r["step"], r["loss"]) for r in records if "loss" in r]}, rows=8)
    read_next(("save", "common/checkpoint.py"), ("restore", "common/checkpoint.py"))


def sampling(line):
    """logits → 下一个字：温度、top-k、top-p"""
    folder = run_of("pretrain")
    model, tokenizer, _ = load_model(folder)
    prompt = [tokenizer.eot_id] + tokenizer.encode(line[:-1])
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt])))[:, -1]
    seen = torch.zeros_like(logits).bool()
    print(f"{folder}，已经有：{line[:-1]}，下一个字：\n")
    ways = (("temperature=1", (1.0, 0, 1.0)), ("temperature=0.5", (0.5, 0, 1.0)), ("temperature=2", (2.0, 0, 1.0)),
            ("top_k=3", (1.0, 3, 1.0)), ("top_p=0.5", (1.0, 0, 0.5)))
    top = logits[0].topk(6).indices
    print("  " + draw.fill("", 18) + "".join(draw.fill(show(tokenizer, i), 8) for i in top) + "还剩几种")
    for name, (temperature, top_k, top_p) in ways:
        filtered = filter_logits(logits, seen, temperature, top_k, top_p, 0.0, 1.0)
        probs = filtered.softmax(-1)[0]
        print(f"  {name:<18}" + "".join(f"{probs[i]:<8.3f}" for i in top) + f"{(probs > 0).sum()}")
    print()
    for temperature in (0, 0.8, 1.5):
        prompt = [tokenizer.eot_id] + tokenizer.encode(line)
        new = generate(model, [prompt], 19, temperature=temperature, stop_ids=[tokenizer.eot_id], seed=1)[0]
        text = tokenizer.decode(new, skip_special=True).replace("\n", "")
        print(f"  temperature {temperature:<4}{line}{text}")
    read_next(("filter_logits", "common/generate.py"), ("generate", "common/generate.py"), ("KVCache", "model.py"))


STOPS = {stop.__name__: stop for stop in (
    tokens, rows, attention, loss, gradient, checkpoint,
    tour_answers.mask, tour_answers.reward, tour_answers.group, tour_answers.pair, sampling)}


@dataclass
class Config:
    stop: str = ""              # where to go
    line: str = "床前明月光"     # which line goes there


def main(cfg):
    if not cfg.stop:
        for number, (name, stop) in enumerate(STOPS.items(), 1):
            print(f"{number:2d}  python -m learn.tour {name:<12}{stop.__doc__}")
        return
    check(cfg.stop in STOPS, f"没有 {cfg.stop!r} 这一站：python -m learn.tour 列出全部")
    check(len(cfg.line) > 1, f"--line={cfg.line!r}：至少两个字")
    print(f"── {STOPS[cfg.stop].__doc__}\n")
    STOPS[cfg.stop](cfg.line)


if __name__ == "__main__":
    run(main, Config, positional="stop")
