"""
What the runs on sums are measured by: python -m tools.evaluate sums --runs=out/sums-sft,out/sums-grpo

in: --input=data/raw/sums/test.jsonl, lines of {"digits", "prompt", "answer"}; runs of sft.py or grpo.py

For each number of digits:
    greedy          right answers, at temperature 0
    greedy_thinks   answers that think first;  greedy_length: their tokens
    pass@k          at temperature 1: questions of which one of k answers is right, estimated from --samples answers each
                    to the first --n_sums questions (Chen et al. 2021, eq. 1)
    thinks, length, entropy     of these samples; entropy in nats per token, -log p of what was sampled
    thinking_right, plain_right     right answers among those that think, and among the others
    examples        the first greedy answer, and the first wrong one (text)
Intervals of pass@k are those of a share of so many questions: too wide rather than too narrow, as a mean of numbers
from 0 to 1 varies at most as much as a share.
"""
import json
from math import comb

import torch

from common.data import pad
from common.generate import generate
from common.loss import answer_logps
from configurator import check
from recipes.sums import said
from tokenizer import render_chat

AT = (1, 4, 16, 64)


def pass_at(k, n, c):
    """Chance that of k answers, drawn from n of which c are right, one at least is: 1 - C(n - c, k) / C(n, k)."""
    return 1 - comb(n - c, k) / comb(n, k)


def read_tests(path):
    """Return {digits: [record]} in the order of the file."""
    tests = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            tests.setdefault(record["digits"], []).append(record)
    check(tests, f"{path} holds no question")
    return tests


def answer_all(model, tokenizer, prompts, temperature, group_size, cfg, env):
    """Continue each prompt (ids) group_size times; return a list of ids an answer, batch_size answers at a time."""
    stop_ids = [tokenizer.im_end_id, tokenizer.eot_id]
    size = max(1, cfg.batch_size // group_size)
    room = model.trained_len - max(map(len, prompts))
    answers = []
    for first in range(0, len(prompts), size):
        part = prompts[first:first + size]
        with env.autocast():
            answers += generate(
                model,
                part,
                min(room, 128),
                temperature=temperature,
                stop_ids=stop_ids,
                pad_id=tokenizer.pad_id,
                seed=cfg.seed + first * group_size,
                group_size=group_size)
    return answers


def greedy_part(model, tokenizer, records, prompts, cfg, env):
    """Measures at temperature 0."""
    answers = answer_all(model, tokenizer, prompts, 0, 1, cfg, env)
    result = {"greedy": [], "greedy_thinks": []}
    wrong = []
    for record, ids in zip(records, answers):
        text = tokenizer.decode(ids, skip_special=True)
        right = said(text) == record["answer"]
        result["greedy"].append(right)
        result["greedy_thinks"].append("</think>" in text)
        if not right:
            wrong.append(f"{record['prompt']} wrong:\n{text}")
    result["greedy_length"] = sum(map(len, answers)) / len(answers)
    text = tokenizer.decode(answers[0], skip_special=True)
    first = f"{records[0]['prompt']}\n{text}"
    result["examples"] = "\n\n".join([first, *wrong[:1]])
    return result


@torch.no_grad()
def sampled_part(model, tokenizer, records, prompts, cfg, env):
    """Measures at temperature 1, cfg.samples answers to each question."""
    N = cfg.samples
    answers = answer_all(model, tokenizer, prompts, 1.0, N, cfg, env)
    right = []
    thought = []
    documents = []
    for number, ids in enumerate(answers):
        record = records[number // N]
        prompt = prompts[number // N]
        text = tokenizer.decode(ids, skip_special=True)
        right.append(said(text) == record["answer"])
        thought.append("</think>" in text)
        mask = [0] * len(prompt) + [1] * len(ids)
        documents.append((prompt + ids, mask))
    # how many of its N answers are right, question by question
    counts = [sum(right[i:i + N]) for i in range(0, len(right), N)]
    result = {}
    for k in AT:
        if k <= N:
            result[f"pass@{k}"] = [pass_at(k, N, c) for c in counts]
    result["thinks"] = sum(thought) / len(thought)
    result["length"] = sum(map(len, answers)) / len(answers)
    # surprise at its own answers: 0 where it would always say the same
    nats = 0.0
    for first in range(0, len(documents), cfg.batch_size):
        part = documents[first:first + cfg.batch_size]
        ids, mask = pad(part, tokenizer.pad_id, env.device)
        logps, _ = answer_logps(model, model.head_weight, ids, mask, env)
        nats -= logps.sum().item()
    result["entropy"] = nats / sum(map(len, answers))
    for name, kind in (("thinking_right", True), ("plain_right", False)):
        hits = [ok for ok, think in zip(right, thought) if think == kind]
        if hits:
            result[name] = sum(hits) / len(hits)
    return result


def measure(model, tokenizer, cfg, env):
    """Return {"4 digits, greedy": hits and misses, …}: a measure, or a list to take the share of."""
    result = {}
    for digits, records in read_tests(cfg.input).items():
        prompts = []
        for record in records:
            turns = [{"role": "user", "content": record["prompt"]}]
            ids, _ = render_chat(tokenizer, turns, add_generation_prompt=True)
            prompts.append(ids)
        part = greedy_part(model, tokenizer, records, prompts, cfg, env)
        few = cfg.n_sums
        part.update(sampled_part(model, tokenizer, records[:few], prompts[:few], cfg, env))
        for name, value in part.items():
            result[f"{digits} digits, {name}"] = value
    return result
