"""What learn/broken.py measures of a small run when it has ended, by the right code: {run folder} -> a number."""
import json
import os

import torch

import common.generate
import pretrain
import sft
import tokenizer as tokenizer_file
from common.checkpoint import load_model, load_reward_model
from common.data import get_prompts, open_data
from common.distributed import start
from common.loss import score_answers, text_loss
from learn import small


def read_log(folder):
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def curve_of(folder, field):
    return [(record["step"], record[field]) for record in read_log(folder) if field in record]


def cpu_env():
    return start(pretrain.Config(device="cpu"), "float32", announce=False)


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


def moon_reward(folder):
    """Mean reward of sampled answers."""
    pairs, _ = answers(folder, temperature=1.0)
    return sum(small.moon("", answer) for _, answer in pairs) / len(pairs)


def logged(name, at=-1):
    """Return a function that reads a field from a line of a run's log: the last one, or the first one at 0."""
    return lambda folder: read_log(folder)[at][name]


def pairs_in_order(folder):
    """Share of training pairs in the right order, in per cent: the best answer above the two others."""
    model = load_reward_model(folder)
    train, _, _ = open_data(small.make_data("pairs"), "pairs")
    (ids, mask), sizes = get_prompts(train, range(200), 0, "cpu")
    with torch.no_grad():
        scores = score_answers(model, ids, mask).view(-1, sizes[0])
    return 100 * (scores[:, :1] > scores[:, 1:]).float().mean().item()


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
