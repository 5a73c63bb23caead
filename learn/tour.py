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

import dpo
import grpo
import model as model_file
import pretrain
from common.checkpoint import load_checkpoint, load_model, load_reward_model
from common.data import open_data, pad
from common.distributed import start
from common.generate import filter_logits, generate
from common.loss import answer_logps, score_answers
from configurator import check, run
from learn import draw, links, small
from model import Transformer
from tokenizer import load_tokenizer, render_chat

# the quickstart's runs; where one is missing, the small one takes its place
QUICKSTART = {"pretrain": "out/poems", "sft": "out/poems-sft", "reward": "out/poems-reward"}
DATA = {"text": "data/poems", "sft": "data/poems-sft"}
QUESTION = "“{line}”的下一句是什么？"


def run_of(stage):
    """Return the folder of the reader's own run of a stage, or of a small one."""
    folder = QUICKSTART[stage]
    if os.path.exists(os.path.join(folder, "ckpt.pt")):
        return folder
    small_folder = small.SETTINGS[stage]["out_dir"]
    if not os.path.exists(os.path.join(small_folder, "ckpt.pt")):
        print(f"没有 {folder}（bash runs/quickstart.sh 会训练它）：先训练一个小的，几秒钟……", flush=True)
    return small.make_run(stage)


def data_of(kind):
    if os.path.exists(os.path.join(DATA[kind], "meta.json")):
        return DATA[kind]
    return small.make_data(kind)


def show(tokenizer, i):
    """A token as a reader sees it."""
    text = tokenizer.pieces[int(i)].decode(errors="backslashreplace")
    return {"\n": "↵", " ": "␣"}.get(text, text)


def read_next(*places):
    """Say which lines of code to open now."""
    found = []
    for name, path in places:
        found.append(f"{path}:{links.line_of(name, os.path.join(links.ROOT, path))} {name}")
    print("接着读：" + "，".join(found))


def prompt_ids(tokenizer, line):
    """The chat's question about a line, up to where the assistant begins."""
    turns = [{"role": "user", "content": QUESTION.format(line=line)}]
    return render_chat(tokenizer, turns, add_generation_prompt=True)[0]


# ---------------------------------------------------------------------------- the stops


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
    layer = c.n_layers - 1
    q, k = seen[layer]
    k = k.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1)
    scores = q[0, 0] @ k[0, 0].T / c.head_dim ** 0.5
    future = torch.ones_like(scores).triu(1) > 0
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    print(f"\n第 {layer + 1} 层第 1 个头：一行是一个字在看谁（加起来是 1；后面的看不见）\n")
    print("       " + "".join(draw.fill(name, 6) for name in names))
    for name, row in zip(names, weights):
        cells = [f"{w:.2f}{draw.shade(w)[0]} " if j <= names.index(name) or w > 0 else " ·    " for j, w in enumerate(row)]
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
        print(f"  {draw.fill(show(tokenizer, i), 8)}{before:8.2f}{after:8.2f}{(-after).exp():10.4f}  {draw.bar(after, 9, 20)}")
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
    print(f"所有 {model.count()[0]:,} 个权重的梯度合起来长 {norm:.2f}，裁到不超过 1")
    lr = 0.05
    with torch.no_grad():
        for p in model.parameters():
            p -= lr * p.grad
    after = loss_now().item()
    print(f"每个权重都逆着梯度走一小步（学习率 {lr}）：weight[0, 0] = {weight[0, 0].item():+.6f}，损失 {before.item():.4f} → {after:.4f}")
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


def mask(line):
    """同一行，加上 SFT 的掩码"""
    folder = run_of("sft")
    model, tokenizer, _ = load_model(folder)
    answer = next_line(line)
    turns = [{"role": "user", "content": QUESTION.format(line=line)}, {"role": "assistant", "content": answer}]
    ids, learned = render_chat(tokenizer, turns)
    print("绿色（下面带 1 的）才算进损失：\n")
    for begin in range(0, len(ids), 14):
        part = slice(begin, begin + 14)
        names = [show(tokenizer, i).replace("<|im_start|>", "<开始>").replace("<|im_end|>", "<结束>") for i in ids[part]]
        widths = [max(draw.width(name), 2) + 1 for name in names]
        print("  " + "".join(("\033[32m" if m else "") + draw.fill(name, w) + ("\033[0m" if m else "")
                             for name, w, m in zip(names, widths, learned[part])))
        print("  " + "".join(draw.fill(str(m), w) for w, m in zip(widths, learned[part])))
    with torch.no_grad():
        row = torch.tensor(ids)
        nll = F.cross_entropy(model.logits(model(row[None, :-1]))[0], row[1:], reduction="none")
    m = torch.tensor(learned)[1:].bool()
    print(f"\n{len(ids)} 个词元，学 {sum(learned)} 个。{folder}：答案每词元 {nll[m].mean():.2f} nats，其余 {nll[~m].mean():.2f}（不学）")
    read_next(("render_chat", "tokenizer.py"), ("get_batch", "sft.py"), ("pack", "sft.py"))


def next_line(line):
    """The line that follows in poems.txt, or the best known one."""
    for poem in small.POEMS:
        for a in (0, 12):
            if poem[a:a + 5] == line:
                return poem[a + 6:a + 11] + "。"
    return "疑是地上霜。"


def reward(line):
    """两个回答，一个分数；好的比坏的高多少"""
    folder = run_of("reward")
    model = load_reward_model(folder)
    tokenizer = load_tokenizer(folder)
    turns = [{"role": "user", "content": QUESTION.format(line=line)}]
    texts = [next_line(line), "花落知多少。" if line != "夜来风雨声" else "处处闻啼鸟。", line + "。"]
    documents = [render_chat(tokenizer, turns + [{"role": "assistant", "content": text}]) for text in texts]
    ids, learned = pad(documents, tokenizer.pad_id)
    with torch.no_grad():
        scores = score_answers(model, ids, learned, start(pretrain.Config(device="cpu"), "float32", announce=False))
    print(f"{folder}，问：{turns[0]['content']}\n")
    for text, score in zip(texts, scores.tolist()):
        print(f"  {draw.fill(text, 16)}{score:+.3f}")
    lead = (scores[0] - scores[1]).item()
    print(f"\n第一个比第二个高 {lead:+.3f}：模型认为它更好的概率是 sigmoid({lead:.3f}) = {torch.tensor(lead).sigmoid():.3f}，"
          f"损失 -ln 它 = {-F.logsigmoid(torch.tensor(lead)):.3f}")
    print("分数只有差有意义：都加 100，损失不变。")
    read_next(("ranking_loss", "reward.py"), ("score_answers", "common/loss.py"), ("ScalarModel", "model.py"))


def group(line):
    """一个问题，八个回答，八个优势"""
    folder = run_of("sft")
    model, tokenizer, _ = load_model(folder)
    prompt = prompt_ids(tokenizer, line)
    new = generate(model, [prompt], 12, temperature=1.2, stop_ids=[tokenizer.im_end_id], seed=7, group_size=8)
    texts = [tokenizer.decode(ids, skip_special=True) for ids in new]
    rewards = torch.tensor([small.moon("", text) for text in texts])
    advantages = grpo.group_advantages(rewards, 8, "grpo")
    print(f"{folder}，问：{QUESTION.format(line=line)}\n规则：一句五个不同的字 0.2 分，其中有“月”1 分\n")
    print("  回答                  奖励    优势")
    for text, r, a in zip(texts, rewards.tolist(), advantages.tolist()):
        sign = "推高" if a > 0 else "压低" if a < 0 else "不动"
        print(f"  {draw.fill(text.replace(chr(10), '↵')[:9], 20)}{r:6.2f}{a:+8.2f}  {sign}")
    print(f"\n平均 {rewards.mean():.3f}，标准差 {rewards.std():.3f}；优势 = (奖励 - 平均) / 标准差，加起来是 {advantages.sum():+.3f}")
    if rewards.std() == 0:
        print("八个奖励一样：优势全是 0，这个问题这一步什么也教不了。换一句试试")
    read_next(("group_advantages", "grpo.py"), ("policy_loss", "grpo.py"))


@torch.no_grad()
def pair(line):
    """一对回答，一个间隔：DPO"""
    policy_folder = "out/poems-dpo" if os.path.exists("out/poems-dpo/ckpt.pt") else ""
    reference_folder = run_of("sft")
    if not policy_folder or reference_folder != QUICKSTART["sft"]:
        reference_folder = small.make_run("sft")
        policy_folder = small.make_run("dpo")
    reference, tokenizer, _ = load_model(reference_folder)
    policy, _, _ = load_model(policy_folder)
    turns = [{"role": "user", "content": QUESTION.format(line=line)}]
    texts = [next_line(line), line + "。"]
    documents = [render_chat(tokenizer, turns + [{"role": "assistant", "content": text}]) for text in texts]
    ids, learned = pad(documents, tokenizer.pad_id)
    env = start(pretrain.Config(device="cpu"), "float32", announce=False)
    logps, lengths = answer_logps(policy, policy.head_weight, ids, learned, env)
    ref_logps, _ = answer_logps(reference, reference.head_weight, ids, learned, env)
    print(f"策略 {policy_folder}，参考 {reference_folder}，问：{turns[0]['content']}\n")
    print("                  log p 策略   log p 参考    差")
    for name, text, a, b in zip(("好", "坏"), texts, logps.tolist(), ref_logps.tolist()):
        print(f"  {name} {draw.fill(text, 14)}{a:10.2f}{b:12.2f}{a - b:+10.2f}")
    cfg = dpo.Config()
    losses, good, bad = dpo.preference_loss(
        logps[:1], logps[1:], ref_logps[:1], ref_logps[1:], lengths[:1], lengths[1:], cfg)
    print(f"\n间隔 = β × (好的差 - 坏的差) = {cfg.beta} × {(good - bad).item() / cfg.beta:.2f} = {(good - bad).item():.3f}")
    print(f"损失 = -ln sigmoid(间隔) = {losses.item():.3f}；一步都没学时间隔是 0，损失是 ln 2 = 0.693")
    print("看第三列的符号：两个差可以都是负的。DPO 只管差，不管好的那个是不是也变得更不可能了")
    read_next(("preference_loss", "dpo.py"), ("answer_logps", "common/loss.py"))


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
    tokens, rows, attention, loss, gradient, checkpoint, mask, reward, group, pair, sampling)}


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
