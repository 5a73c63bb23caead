"""
弄坏一处，看会怎样：同一次短训练跑两遍，一遍对，一遍错一处，曲线画在一起。

    python -m learn.broken                  # 有哪些
    python -m learn.broken no_shift         # 跑一个：终端里的曲线，out/learn-broken/no_shift.png，哪个测试抓得住它
    python -m learn.broken all              # 全部，最后一张表

Each mistake is a function put in the place of ours while a stage of the project trains on learn/poems.txt. Everything
is measured afterwards by the right code.
"""
import contextlib
import json
import os
import time
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

import common.generate
import common.loss
import common.optim
import common.rollout
import common.rows
import dpo
import grpo
import model as model_file
import pretrain
import sft
import tokenizer as tokenizer_file
from common.checkpoint import load_model, load_reward_model
from common.data import get_prompts, open_data
from common.distributed import start
from common.loss import score_answers, text_loss
from configurator import check, run
from learn import draw, small

OUT = "out/learn-broken"


@dataclass
class Case:
    what: str                      # what is wrong
    stage: str
    curve: str                     # the field of log.jsonl that is drawn
    measure: Callable              # run folder -> a number, by the right code
    unit: str                      # what that number is
    seen: str                      # what a person would have seen
    test: str                      # of tests/test_formulas.py, which catches it
    replace: tuple = ()            # (module or class, name in it, the wrong function)
    both: dict = None              # settings of both runs
    wrong: dict = None             # settings of the wrong one
    data: str = ""                 # the wrong run's data are prepared with the mistake, as this kind


# ---------------------------------------------------------------------------- what is measured afterwards


def cpu_env():
    return start(pretrain.Config(device="cpu"), "float32", announce=False)


def continue_lines(model, tokenizer, poems, new_tokens=6):
    """Return the greedy continuations of the poems' first lines, as texts."""
    prompts = [[tokenizer.eot_id] + tokenizer.encode(poem[:6]) for poem in poems]
    new = common.generate.generate(model, prompts, new_tokens, temperature=0)
    return [tokenizer.decode(ids) for ids in new]


def recited(folder):
    """Share of 100 poems whose second line follows from the first, in per cent."""
    model, tokenizer, _ = load_model(folder)
    poems = small.POEMS[:100]
    lines = continue_lines(model, tokenizer, poems)
    return 100 * sum(line == poem[6:12] for line, poem in zip(lines, poems)) / len(poems)


def text_nats(folder):
    """Nats per token of the training text."""
    model, _, _ = load_model(folder)
    train, _, _ = open_data(small.make_data("text"), "text")
    with torch.no_grad():
        return text_loss(model, train, 64, 16, 3_000, cpu_env())[0]


def answer_nats(folder):
    """Nats per learned token of the training answers."""
    model, tokenizer, _ = load_model(folder)
    train, _, _ = open_data(small.make_data("sft"), "sft")
    rows = sft.pack(train.idx[1:] - train.idx[:-1] - 1, 96, 0)[:40]
    cfg = sft.Config(seq_len=96, batch_size=8)
    return sft.evaluate(model, train, rows, cfg, tokenizer.pad_id, cpu_env())


def answers(folder, n=40, temperature=0.0):
    """Return [(right answer, what the model says)] for training questions, and the share that ended."""
    model, tokenizer, _ = load_model(folder)
    pairs = [pair for poem in small.POEMS[:n // 2] for pair in small.lines_of(poem)]
    prompts = []
    for question, _ in pairs:
        turns = [{"role": "user", "content": question}]
        prompts.append(tokenizer_file.render_chat(tokenizer, turns, add_generation_prompt=True)[0])
    new = common.generate.generate(
        model, prompts, 24, temperature=temperature, stop_ids=[tokenizer.im_end_id], seed=1)
    said = [tokenizer.decode(ids, skip_special=True) for ids in new]
    ended = sum(ids[-1] == tokenizer.im_end_id for ids in new) / len(new)
    return [(right, answer) for (_, right), answer in zip(pairs, said)], ended


def ended_share(folder):
    """Share of answers that end, in per cent."""
    return 100 * answers(folder)[1]


def answered(folder):
    """Share of training questions answered with the right line, in per cent."""
    pairs, _ = answers(folder)
    return 100 * sum(answer.startswith(right[:5]) for right, answer in pairs) / len(pairs)


def moon_reward(folder):
    """Mean reward of sampled answers."""
    pairs, _ = answers(folder, temperature=1.0)
    return sum(small.moon("", answer) for _, answer in pairs) / len(pairs)


def last_value(name):
    """Return a function that reads a field from the last line of a run's log."""
    return lambda folder: read_log(folder)[-1][name]


def pairs_in_order(folder):
    """Share of held-out pairs in the right order, in per cent: the best answer above the two others."""
    model = load_reward_model(folder)
    _, val, _ = open_data(small.make_data("pairs"), "pairs")
    env = cpu_env()
    (ids, mask), sizes = get_prompts(val, range(len(val.prompt_bounds()) - 1), 0, env.device)
    with torch.no_grad():
        scores = score_answers(model, ids, mask, env).view(-1, sizes[0])
    return 100 * (scores[:, :1] > scores[:, 1:]).float().mean().item()


# ---------------------------------------------------------------------------- the mistakes


def attend_everywhere(q, k, v, mask):
    """No causal mask: every token sees the whole row, the answer included."""
    if q.size(2) == 1:
        return RIGHT_ATTEND(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


def batch_without_shift(tokens, cfg, step, micro_step, device):
    x, _ = RIGHT_GET_BATCH(tokens, cfg, step, micro_step, device)
    return x, x


def learn_everything(tok, messages, add_generation_prompt=False):
    ids, _ = RIGHT_RENDER_CHAT(tok, messages, add_generation_prompt)
    return ids, [1] * len(ids)


def without_end(tok, messages, add_generation_prompt=False):
    """The assistant's turns have no <|im_end|>."""
    ids, mask = RIGHT_RENDER_CHAT(tok, messages, add_generation_prompt)
    kept = [not (learned and i == tok.im_end_id) for i, learned in zip(ids, mask)]
    return [i for i, k in zip(ids, kept) if k], [m for m, k in zip(mask, kept) if k]


def pad_on_the_right(model, prompts, max_new_tokens, **settings):
    """The batch is made rectangular by tokens behind the short prompts, and the model goes on after those."""
    longest = max(map(len, prompts))
    pad_id = settings.pop("pad_id", 0)
    padded = [list(prompt) + [pad_id] * (longest - len(prompt)) for prompt in prompts]
    return RIGHT_GENERATE(model, padded, max_new_tokens, pad_id=pad_id, **settings)


def thirty_times(step, cfg, decay_steps=0):
    return 30 * RIGHT_LR_AT(step, cfg, decay_steps)


def attention_without_norm(self, config):
    RIGHT_ATTENTION_INIT(self, config)
    self.qk_norm = False


def no_divergence(logps, ref_logps):
    return 0.0 * logps


def raw_rewards(totals, group_size, kind):
    return totals.clone()


def no_reference(chosen, rejected, ref_chosen, ref_rejected, len_chosen, len_rejected, cfg):
    zero = torch.zeros_like(chosen)
    return RIGHT_PREFERENCE_LOSS(chosen, rejected, zero, zero, len_chosen, len_rejected, cfg)


def first_learned(mask):
    """The column of each row's first 1, where the score belongs to the last."""
    return mask.argmax(dim=1)


def rounding_optimizers(model, cfg, env):
    """After each step the weights are rounded to bf16, as if they lived in it."""
    optimizers = RIGHT_MAKE_OPTIMIZERS(model, cfg, env)

    def round_weights(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.data.copy_(p.data.bfloat16())

    for optimizer in optimizers:
        optimizer.register_step_post_hook(round_weights)
    return optimizers


RIGHT_ATTEND = model_file.attend
RIGHT_GET_BATCH = pretrain.get_batch
RIGHT_RENDER_CHAT = tokenizer_file.render_chat
RIGHT_GENERATE = common.generate.generate
RIGHT_LR_AT = common.optim.lr_at
RIGHT_ATTENTION_INIT = model_file.Attention.__init__
RIGHT_PREFERENCE_LOSS = dpo.preference_loss
RIGHT_MAKE_OPTIMIZERS = common.optim.make_optimizers


def renders_with(wrong):
    """render_chat under the two names by which data are made and read."""
    return ((tokenizer_file, "render_chat", wrong), (common.rows, "render_chat", wrong))


CASES = {
    "no_causal_mask": Case(
        "注意力没有因果掩码，每个字都看得见后文", "pretrain", "loss", text_nats, "用对的代码量，每个词元的损失",
        "损失快得可疑地降到 0 附近，采样却是乱的：它学会的是抄后文，而采样时没有后文",
        "test_attend_without_a_mask_sees_the_past", ((model_file, "attend", attend_everywhere),)),
    "no_shift": Case(
        "目标没有错开一位，要预测的就是输入自己", "pretrain", "loss", text_nats, "用对的代码量，每个词元的损失",
        "损失几十步就到 0，采样只会把最后一个字重复下去",
        "test_get_batch_shifts_by_one", ((pretrain, "get_batch", batch_without_shift),)),
    "loss_on_questions": Case(
        "问题也算进损失", "sft", "loss", answer_nats, "答案每个词元的损失",
        "日志里的损失看起来更低，因为每个问题的套话都一样、很好猜；该学的答案反而学得慢",
        "test_render_chat_by_hand", renders_with(learn_everything), data="sft"),
    "no_end_token": Case(
        "训练数据里，回答后面没有 <|im_end|>", "sft", "loss", ended_share, "会停下的回答，%",
        "损失一切正常；聊天时它答完了还一直说下去",
        "test_render_chat_by_hand", renders_with(without_end), data="sft"),
    "pad_right": Case(
        "一批长短不一的提示，补齐补在了右边", "pretrain", "recited", last_value("recited"), "成批背诵的下一句，%",
        "一次问一个时全对，一次问一批时只有最长的对",
        "test_answers_do_not_depend_on_the_batch", ((common.generate, "generate", pad_on_the_right),),
        both=dict(eval_every=50)),
    "lr_30": Case(
        "学习率大了 30 倍", "pretrain", "loss", text_nats, "每个词元的损失",
        "损失先猛跳，然后停在高处；梯度的范数 norm 也与平时不同",
        "test_lr_at_warms_up", ((pretrain, "lr_at", thirty_times), (common.optim, "lr_at", thirty_times))),
    "no_qk_norm": Case(
        "学习率很高，又没有 QK-norm", "pretrain", "loss", text_nats, "每个词元的损失",
        "q 和 k 越长越大，softmax 只剩一个字，损失卡住或反弹",
        "test_qk_norm_keeps_scores_from_growing", ((model_file.Attention, "__init__", attention_without_norm),),
        both=dict(lr=0.1, min_lr=0.01)),
    "no_kl": Case(
        "GRPO 没有 KL 惩罚", "grpo", "kl", last_value("val_kl"), "离 SFT 模型的 KL，nats",
        "奖励一样漂亮；KL 一直涨，不同的问题得到同一句回答",
        "test_k3_by_hand", ((grpo, "k3", no_divergence), (common.rollout, "k3", no_divergence)),
        both=dict(kl_coef=0.3, max_steps=30, eval_every=30)),
    "not_centred": Case(
        "优势没有减去一组的平均", "grpo", "score", moon_reward, "抽样回答的平均奖励",
        "奖励都不小于 0，于是什么回答都被推高，好坏分不开，学得慢",
        "test_group_advantages_by_hand", ((grpo, "group_advantages", raw_rewards),)),
    "dpo_no_reference": Case(
        "DPO 没有减去参考模型的 log-prob", "dpo", "chosen_logp", answered, "还答得对的训练问题，%",
        "准确率照样上升；看 chosen_logp：没有参考拉着，好的回答也越来越不可能",
        "test_preference_loss_begins_at_log_2", ((dpo, "preference_loss", no_reference),),
        both=dict(max_steps=80, lr=5e-4)),
    "reward_wrong_token": Case(
        "奖励在回答的第一个字上读", "reward", "accuracy", pairs_in_order, "没见过的提示里排对的，%",
        "准确率上升得慢，而且到不了顶：它只看见了回答的第一个字",
        "test_scores_are_read_at_the_end_of_the_answer", ((common.loss, "last_learned", first_learned),)),
    "bf16_weights": Case(
        "每一步之后，权重都舍入成 bf16", "pretrain", "loss", text_nats, "每个词元的损失",
        "开头一样快；学习率降下来以后，小的步子全被舍入掉，损失不再动",
        "test_small_steps_move_the_weights",
        ((pretrain, "make_optimizers", rounding_optimizers), (common.optim, "make_optimizers", rounding_optimizers)),
        both=dict(optimizer="adamw", lr=1e-3, min_lr=1e-5, max_steps=400, eval_every=400)),
}


# ---------------------------------------------------------------------------- running


@contextlib.contextmanager
def replaced(replace):
    """Context: wrong functions stand in the place of ours."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replace]
    try:
        for owner, name, wrong in replace:
            setattr(owner, name, wrong)
        yield
    finally:
        for owner, name, ours in before:
            setattr(owner, name, ours)


def read_log(folder):
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def log_recitals(model, tokenizer, cfg, env):
    """In the place of pretrain.print_sample: recite 40 poems from 4 to 9 characters in one batch, into the log."""
    poems = small.POEMS[:40]
    prompts = [[tokenizer.eot_id] + tokenizer.encode(poem[:4 + i % 6]) for i, poem in enumerate(poems)]
    new = common.generate.generate(model, prompts, 3, temperature=0)
    right = [tokenizer.decode(ids) == poem[4 + i % 6:7 + i % 6] for i, (ids, poem) in enumerate(zip(new, poems))]
    log = read_log(cfg.out_dir)
    log[-1]["recited"] = 100 * sum(right) / len(right)
    with open(os.path.join(cfg.out_dir, "log.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record) + "\n" for record in log)


def train_both(name, **changes):
    """Train the right run and the wrong one; return their folders."""
    case = CASES[name]
    folders = []
    for side in ("right", "wrong"):
        settings = {**(case.both or {}), **changes, "out_dir": f"{OUT}/{name}-{side}"}
        if case.curve == "recited":
            replace = ((pretrain, "print_sample", log_recitals),)
        else:
            replace = ()
        if side == "wrong":
            replace += case.replace
            settings.update(case.wrong or {})
        # the runs that both start from are right
        if case.stage != "pretrain":
            small.make_run("sft" if case.stage != "sft" else "pretrain")
        with replaced(replace):
            if case.data and side == "wrong":
                settings["data_dir"] = small.make_data(case.data, f"learn-broken-{name}")
            folders.append(small.train(case.stage, **settings))
    return folders


def curve_of(folder, field):
    return [(record["step"], record[field]) for record in read_log(folder) if field in record]


def show(name, **changes):
    """Run one case and draw it; return (right, wrong) numbers and the seconds it took."""
    case = CASES[name]
    began = time.perf_counter()
    print(f"{name}：{case.what}", flush=True)
    right, wrong = train_both(name, **changes)
    curves = {"·": curve_of(right, case.curve), "×": curve_of(wrong, case.curve)}
    draw.print_curves(curves)
    values = [case.measure(folder) for folder in (right, wrong)]
    path = f"{OUT}/{name}.png"
    saved = draw.save_curves({"right": curves["·"], "wrong": curves["×"]}, name, "step", case.curve, path)
    seconds = time.perf_counter() - began
    print(f"  日志里的 {case.curve}：· 对  × 错{'    ' + path if saved else '    （没有 matplotlib，不画 png）'}")
    print(f"  {case.unit}：对 {values[0]:.2f}，错 {values[1]:.2f}")
    print(f"  你会看到：{case.seen}")
    print(f"  抓住它的测试：tests/test_formulas.py 的 {case.test}    {seconds:.0f} 秒\n", flush=True)
    return values, seconds


@dataclass
class Config:
    name: str = ""  # the mistake, or all


def main(cfg):
    if not cfg.name:
        for name, case in CASES.items():
            print(f"{name:<20}{case.what}")
        return
    check(cfg.name in CASES or cfg.name == "all", f"没有 {cfg.name!r}：python -m learn.broken 列出全部")
    if cfg.name != "all":
        show(cfg.name)
        return
    rows = []
    for name, case in CASES.items():
        (right, wrong), seconds = show(name)
        rows.append(f"| `{name}` | {case.what} | {case.unit} | {right:.2f} | {wrong:.2f} | `{case.test}` | {seconds:.0f} |")
    print("| | 哪里错了 | 量什么 | 对 | 错 | 抓住它的测试 | 秒 |\n|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    run(main, Config, positional="name")
