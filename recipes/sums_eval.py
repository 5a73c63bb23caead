"""
What the runs on sums are measured by: python -m tools.evaluate sums --runs=out/sums-sft,out/sums-grpo

in: --input=data/raw/sums/test.jsonl (or tools-test.jsonl), lines of {"digits", "prompt", "answer"}; runs of sft.py or
    grpo.py. A turn that calls the calculator is answered, and the model goes on

For each number of digits:
    greedy          right answers, at temperature 0
    greedy_thinks   answers that think first;  greedy_length: their tokens
    greedy_calls    calls of the calculator a question;  copied: those that ask for just what the question asks
    pass@k          at temperature 1: questions of which one of k answers is right, estimated from --samples answers each
                    to the first --n_sums questions (Chen et al. 2021, eq. 1); not where no greedy answer was right
    thinks, length, entropy     of these samples; entropy in nats per token, -log p of what was sampled
    thinking_right, plain_right     right answers among those that think, and among the others
    examples        the first greedy answer, and the first wrong one (text)
Intervals of pass@k are those of a share of so many questions: too wide rather than too narrow, as a mean of numbers
from 0 to 1 varies at most as much as a share.
"""
import json
from dataclasses import dataclass
from math import comb

import torch

from common.data import pad
from common.loss import answer_logps
from common.rollout import rollout
from configurator import check
from recipes.sums import called, calculator, said
from tokenizer import render_chat

AT = (1, 4, 16, 64)


@dataclass
class Sampling:
    """What rollout() asks of a Config."""
    temperature: float
    max_new_tokens: int
    turns: int = 2


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


def answer_all(model, tokenizer, prompts, temperature, n_answers, cfg, env):
    """Answer each prompt (ids) n_answers times, batch_size at a time; return documents [(ids, mask)] and their texts."""
    sampling = Sampling(temperature, min(128, model.trained_len - max(map(len, prompts))))
    rows = [prompt for prompt in prompts for _ in range(n_answers)]
    documents = []
    for first in range(0, len(rows), cfg.batch_size):
        part = rows[first:first + cfg.batch_size]
        documents += rollout(model, part, sampling, tokenizer, cfg.seed + first, env, calculator)
    texts = []
    for ids, mask in documents:
        ids = ids[mask.index(1):]
        # without the token that ends it; those between two turns are shown
        texts.append(tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.im_end_id else ids))
    return documents, texts


def learned(documents):
    """Tokens that the model said itself, of all documents."""
    return sum(sum(mask) for _, mask in documents)


def greedy_part(model, tokenizer, records, prompts, cfg, env):
    """Measures at temperature 0."""
    documents, texts = answer_all(model, tokenizer, prompts, 0, 1, cfg, env)
    right = []
    copied = []
    wrong = []
    for record, text in zip(records, texts):
        right.append(said(text) == record["answer"])
        if "<tool_call>" in text:
            copied.append(f"{called(text)}=?" == record["prompt"])
        if not right[-1]:
            wrong.append(f"{record['prompt']} wrong:\n{text}")
    result = {
        "greedy": right,
        "greedy_thinks": ["</think>" in text for text in texts],
        "greedy_length": learned(documents) / len(documents)}
    if copied:
        result["greedy_calls"] = sum(text.count("<tool_call>") for text in texts) / len(texts)
        result["copied"] = copied
    result["examples"] = "\n\n".join([f"{records[0]['prompt']}\n{texts[0]}", *wrong[:1]])
    return result


@torch.no_grad()
def sampled_part(model, tokenizer, records, prompts, cfg, env):
    """Measures at temperature 1, cfg.samples answers to each question."""
    N = cfg.samples
    documents, texts = answer_all(model, tokenizer, prompts, 1.0, N, cfg, env)
    right = [said(text) == records[row // N]["answer"] for row, text in enumerate(texts)]
    thought = ["</think>" in text for text in texts]
    # how many of its N answers are right, question by question
    counts = [sum(right[i:i + N]) for i in range(0, len(right), N)]
    result = {}
    for k in AT:
        if k <= N:
            result[f"pass@{k}"] = [pass_at(k, N, c) for c in counts]
    result["thinks"] = sum(thought) / len(thought)
    result["length"] = learned(documents) / len(documents)
    # surprise at its own answers: 0 where it would always say the same
    nats = 0.0
    for first in range(0, len(documents), cfg.batch_size):
        part = documents[first:first + cfg.batch_size]
        ids, mask = pad(part, tokenizer.pad_id, env.device)
        with env.autocast():
            logps, _ = answer_logps(model, model.head_weight, ids, mask)
        nats -= logps.sum().item()
    result["entropy"] = nats / learned(documents)
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
        if any(part["greedy"]):  # else sampling takes long, and finds nothing
            few = cfg.n_sums
            part.update(sampled_part(model, tokenizer, records[:few], prompts[:few], cfg, env))
        for name, value in part.items():
            result[f"{digits} digits, {name}"] = value
    return result
