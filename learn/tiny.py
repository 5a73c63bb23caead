"""
A language model from nothing, through three stages, with torch alone: pretraining, SFT, GRPO. Half a minute.

    python learn/tiny.py

model.py gives the same logits with these weights; what it adds is speed and more kinds of models.
B batch, T time, C channels, H heads, D channels a head, V characters.
"""
import math
import pathlib

import torch
import torch.nn.functional as F

C = 128          # numbers that describe a token inside the model
H = 4            # attention heads
D = C // H
LAYERS = 1
HIDDEN = 320     # width of the feed-forward layer, between its two matmuls
END = "\n"       # stands between poems, and ends an answer
ASK = "："       # ends a question; no poem contains it

# ---------------------------------------------------------------- text and ids: a token is a character
# 300 Tang quatrains, each a line: 床前明月光，疑是地上霜。举头望明月，低头思故乡。
POEMS = pathlib.Path(__file__).with_name("poems.txt").read_text(encoding="utf-8").splitlines()
CHARS = sorted(set("".join(POEMS))) + [ASK, END]
ID = {char: number for number, char in enumerate(CHARS)}


def encode(text):
    return [ID[char] for char in text]


def decode(ids):
    return "".join(CHARS[i] for i in ids)


# ---------------------------------------------------------------- the model: names and shapes as in model.py
def make_weights():
    W = {"embed.weight": 0.02 * torch.randn(len(CHARS), C), "norm.weight": torch.ones(C)}
    for i in range(LAYERS):
        W[f"blocks.{i}.attn_norm.weight"] = torch.ones(C)
        W[f"blocks.{i}.attn.qkv.weight"] = 0.05 * torch.randn(3 * C, C)
        W[f"blocks.{i}.attn.out.weight"] = 0.05 * torch.randn(C, C)
        W[f"blocks.{i}.ffn_norm.weight"] = torch.ones(C)
        W[f"blocks.{i}.ffn.gate_up.weight"] = 0.05 * torch.randn(2 * HIDDEN, C)
        W[f"blocks.{i}.ffn.down.weight"] = 0.05 * torch.randn(C, HIDDEN)
    return {name: tensor.requires_grad_() for name, tensor in W.items()}


def norm(x, weight):  # RMSNorm: scale each token's vector to a mean square of 1
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x):
    """Turn each pair (x[i], x[i + D/2]) of x (B, H, T, D) by an angle that grows with the position."""
    frequency = 10000.0 ** -(torch.arange(0, D, 2) / D)                            # (D/2)
    angle = torch.outer(torch.arange(x.size(2)).float(), frequency)                # (T, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], dim=-1)


def attention(x, qkv, out):
    B, T, _ = x.shape
    q, k, v = (x @ qkv.T).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)               # each (B, H, T, D)
    scores = rotate(q) @ rotate(k).mT / math.sqrt(D)                               # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)                            # True above the diagonal
    y = scores.masked_fill(future, -math.inf).softmax(-1) @ v                      # (B, H, T, D)
    return y.transpose(1, 2).reshape(B, T, C) @ out.T


def forward(W, ids):
    """ids (B, T) -> logits (B, T, V): a number for every character that may come next."""
    x = W["embed.weight"][ids]                                                     # (B, T, C)
    for i in range(LAYERS):
        name = f"blocks.{i}."
        h = norm(x, W[name + "attn_norm.weight"])
        x = x + attention(h, W[name + "attn.qkv.weight"], W[name + "attn.out.weight"])
        h = norm(x, W[name + "ffn_norm.weight"])
        gate, up = (h @ W[name + "ffn.gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ W[name + "ffn.down.weight"].T
    return norm(x, W["norm.weight"]) @ W["embed.weight"].T


# ---------------------------------------------------------------- what all stages use
def token_logps(W, rows):
    """rows (B, T + 1) -> log-prob of each character given those before it, (B, T)."""
    logps = forward(W, rows[:, :-1]).log_softmax(-1)         # the inputs: all but the last
    return logps.gather(2, rows[:, 1:, None]).squeeze(2)     # the targets: all but the first


@torch.no_grad()
def sample(W, rows, n_new, temperature=1.0):
    """rows (B, T) -> (B, T + n_new): draw the next character, append it, repeat. temperature 0: take the likeliest."""
    for _ in range(n_new):
        logits = forward(W, rows)[:, -1]                                           # (B, V)
        new = logits.argmax(-1, keepdim=True)
        if temperature:
            new = (logits / temperature).softmax(-1).multinomial(1)
        rows = torch.cat([rows, new], dim=1)
    return rows


def train(W, batch_loss, peak, steps):
    """The loop of every stage: loss, gradient, clip, step. batch_loss() returns a loss and a text to print."""
    optimizer = torch.optim.AdamW(W.values(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        # the learning rate rises, stays, and falls to 0
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        loss, text = batch_loss()
        if step % math.ceil(steps / 4) == 0 or step == steps - 1:
            print(f"  第 {step:3d} 步  {text}", flush=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(W.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- 1, pretraining: continue text
def pretrain(W, steps=360):
    tokens = torch.tensor(encode(END.join(POEMS[:-20])))
    unseen = torch.tensor([encode(END + poem + END) for poem in POEMS[-20:]])      # never learned
    def batch_loss():
        starts = torch.randint(len(tokens) - 32, (16,))
        rows = torch.stack([tokens[i:i + 33] for i in starts])                     # (16, 33)
        loss = -token_logps(W, rows).mean()                  # mean of -log p(next character), in nats
        with torch.no_grad():
            return loss, f"损失 {loss:.2f}  没学过的诗 {-token_logps(W, unseen).mean():.2f}"
    train(W, batch_loss, 5e-3, steps)


# ---------------------------------------------------------------- 2, SFT: answer, and stop
def questions_and_answers(poems):
    """Rows "床前明月光：疑是地上霜END", (2 a poem, 12): all of one length, so no padding is needed."""
    rows = [poem[a:a + 5] + ASK + poem[a + 6:a + 11] + END for poem in poems for a in (0, 12)]
    return torch.tensor([encode(row) for row in rows])


def answer_mask(rows):
    """(B, T): 1 where a target, rows[:, 1:], is part of the answer: after ASK, up to the first END, END included."""
    asked = (rows == ID[ASK]).cumsum(1)[:, :-1] > 0          # ASK stands before the target
    ended = (rows == ID[END]).cumsum(1)[:, :-1] > 0          # an END stands before it
    return (asked & ~ended).float()


def sft(W, data, steps=100):
    def batch_loss():
        rows = data[torch.randint(len(data), (48,))]
        mask = answer_mask(rows)                             # the questions are read, not learned
        loss = -(token_logps(W, rows) * mask).sum() / mask.sum()
        return loss, f"答案的损失 {loss:.2f}"
    train(W, batch_loss, 2e-3, steps)


# ---------------------------------------------------------------- 3, GRPO: a rule instead of examples
def reward(answer):
    """0.2 for five different characters and then the end, 1 where one of them is the moon."""
    line, end, _ = answer.partition(END)
    right_form = end and len(line) == len(set(line)) == 5
    return (0.2 + 0.8 * ("月" in line)) if right_form else 0.0


def grpo(W, data, steps=80, kl_coef=0.02):
    reference = {name: tensor.detach().clone() for name, tensor in W.items()}      # the model as it was
    def batch_loss():
        questions = data[torch.randint(len(data), (16,)), :6]
        rows = sample(W, questions.repeat_interleave(8, 0), 8)                     # (128, 14): 8 answers each
        rewards = torch.tensor([reward(decode(row[6:])) for row in rows.tolist()])
        groups = rewards.view(16, 8)
        # an answer better than the mean of its group shall become likelier, a worse one less likely
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        logps = token_logps(W, rows)                                               # (128, 13)
        kl = (logps - token_logps(reference, rows)).detach()     # log(model / reference): its mean is the KL
        mask = answer_mask(rows)
        loss = -(advantages.view(-1, 1) - kl_coef * kl) * logps  # the KL is a penalty on the reward
        return (loss * mask).sum() / mask.sum(), f"平均奖励 {rewards.mean():.2f}"
    train(W, batch_loss, 2e-3, steps)


def show(W, data):
    """Print the likeliest answers to three questions, and how many of all answers are alike."""
    rows = sample(W, data[:, :6], 8, temperature=0).tolist()
    answers = [decode(row[6:]).partition(END)[0] for row in rows]
    print("  " + "  ".join(decode(row[:6]) + answer for row, answer in zip(rows[:3], answers)))
    print(f"  {len(data)} 个问题，{len(set(answers))} 种回答，{sum('月' in answer for answer in answers)} 个有“月”")


if __name__ == "__main__":
    torch.manual_seed(1)
    W = make_weights()
    print(f"{len(POEMS)} 首诗，{len(CHARS)} 种字，{sum(tensor.numel() for tensor in W.values()):,} 个参数")
    print(f"1. 预训练：学会续写。什么都没学时，损失应该是 ln {len(CHARS)} = {math.log(len(CHARS)):.2f}")
    pretrain(W)
    print("  " + decode(sample(W, torch.tensor([encode("床前明月光，")]), 18, temperature=0)[0].tolist()))
    print("2. 指令微调：学会回答，并且停下")
    sft(W, questions_and_answers(POEMS[:-20]))
    show(W, questions_and_answers(POEMS[:-20]))
    print("3. GRPO：问没学过的诗；没有范文，只有一条规则：五个不同的字，里面要有“月”")
    grpo(W, questions_and_answers(POEMS[-20:]))
    show(W, questions_and_answers(POEMS[-20:]))
