"""The stops of learn/tour.py that ask and answer: the mask, the reward model, GRPO's group, DPO's pair."""
import os

import torch
import torch.nn.functional as F

import dpo
import grpo
from common.checkpoint import load_model, load_reward_model
from common.data import pad
from common.generate import generate
from common.loss import answer_logps, score_answers
from learn import draw, small
from learn.runs import QUESTION, QUICKSTART, next_line, ranked, read_next, run_of, show
from tokenizer import load_tokenizer, render_chat

SCENERY = "山水花月风云雪江"


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
        cells = [draw.fill(name, w) for name, w in zip(names, widths)]
        print("  " + "".join(f"\033[32m{cell}\033[0m" if m else cell for cell, m in zip(cells, learned[part])))
        print("  " + "".join(draw.fill(str(m), w) for w, m in zip(widths, learned[part])))
    with torch.no_grad():
        row = torch.tensor(ids)
        nll = F.cross_entropy(model.logits(model(row[None, :-1]))[0], row[1:], reduction="none")
    m = torch.tensor(learned)[1:].bool()
    print(f"\n{len(ids)} 个词元，学 {sum(learned)} 个。{folder}：答案每词元 {nll[m].mean():.2f} nats，其余 {nll[~m].mean():.2f}（不学）")
    read_next(("render_chat", "tokenizer.py"), ("get_batch", "sft.py"), ("pack", "sft.py"))


def reward(line):
    """两个回答，一个分数；好的比坏的高多少"""
    folder = run_of("reward")
    model = load_reward_model(folder)
    tokenizer = load_tokenizer(folder)
    question, texts = ranked(folder, line)
    turns = [{"role": "user", "content": question}]
    documents = [render_chat(tokenizer, turns + [{"role": "assistant", "content": text}]) for text in texts]
    ids, learned = pad(documents, tokenizer.pad_id)
    with torch.no_grad():
        scores = score_answers(model, ids, learned)
    print(f"{folder}，问：{turns[0]['content']}\n")
    for text, score in zip(texts, scores.tolist()):
        print(f"  {draw.fill(text.replace(chr(10), ''), 30)}{score:+.3f}")
    lead = (scores[0] - scores[1]).item()
    print(f"\n第一个比第二个高 {lead:+.3f}：模型认为它更好的概率是 sigmoid({lead:.3f}) = {torch.tensor(lead).sigmoid():.3f}，"
          f"损失 -ln 它 = {-F.logsigmoid(torch.tensor(lead)):.3f}")
    print("分数只有差有意义：都加 100，损失不变。")
    read_next(("ranking_loss", "reward.py"), ("score_answers", "common/loss.py"), ("ScalarModel", "model.py"))


def scenery(text):
    """A rule: half a point for each kind of scenery in a text, up to one."""
    return min(1.0, 0.5 * sum(char in text for char in SCENERY))


def group(line):
    """一个问题，八个回答，八个优势"""
    folder = run_of("sft")
    model, tokenizer, _ = load_model(folder)
    question, _ = ranked(folder, line)
    turns = [{"role": "user", "content": question}]
    prompt = render_chat(tokenizer, turns, add_generation_prompt=True)[0]
    new = generate(model, [prompt] * 8, 30, temperature=1.2, stop_ids=[tokenizer.im_end_id], seed=7)
    texts = [tokenizer.decode(ids, skip_special=True) for ids in new]
    rewards = torch.tensor([scenery(text) for text in texts])
    advantages = grpo.group_advantages(rewards, 8, "grpo")
    print(f"{folder}，问：{question}\n规则：写到“{SCENERY}”里的一样得 0.5 分，最多 1 分\n")
    print("  " + draw.fill("回答", 52) + "  奖励    优势")
    for text, r, a in zip(texts, rewards.tolist(), advantages.tolist()):
        sign = "不动"
        if abs(a) > 0.01:
            sign = "推高" if a > 0 else "压低"
        verse = text.replace("\n", "")[:26]
        print(f"  {draw.fill(verse, 52)}{r:6.2f}{a:+8.2f}  {sign}")
    print(f"\n平均 {rewards.mean():.3f}，标准差 {rewards.std():.3f}；优势 = (奖励 - 平均) / 标准差，加起来是 {advantages.sum():+.3f}")
    if rewards.std() < 1e-6:
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
    question, texts = ranked(policy_folder, line)
    turns = [{"role": "user", "content": question}]
    texts = texts[:2]
    documents = [render_chat(tokenizer, turns + [{"role": "assistant", "content": text}]) for text in texts]
    ids, learned = pad(documents, tokenizer.pad_id)
    logps, lengths = answer_logps(policy, policy.head_weight, ids, learned)
    ref_logps, _ = answer_logps(reference, reference.head_weight, ids, learned)
    print(f"策略 {policy_folder}，参考 {reference_folder}，问：{turns[0]['content']}\n")
    print(" " * 34 + "log p 策略  log p 参考      差")
    for name, text, a, b in zip(("好", "坏"), texts, logps.tolist(), ref_logps.tolist()):
        print(f"  {name} {draw.fill(text.replace(chr(10), ''), 28)}{a:11.2f}{b:12.2f}{a - b:+10.2f}")
    cfg = dpo.Config(beta=0.1)
    losses, good, bad = dpo.preference_loss(
        logps[:1], logps[1:], ref_logps[:1], ref_logps[1:], lengths[:1], lengths[1:], cfg)
    print(f"\n间隔 = β × (好的差 - 坏的差) = {cfg.beta} × {(good - bad).item() / cfg.beta:.2f} = {(good - bad).item():.3f}")
    print(f"损失 = -ln sigmoid(间隔) = {losses.item():.3f}；一步都没学时间隔是 0，损失是 ln 2 = 0.693")
    print("看第三列的符号：两个差可以都是负的。DPO 只管差，不管好的那个是不是也变得更不可能了")
    read_next(("preference_loss", "dpo.py"), ("answer_logps", "common/loss.py"))
