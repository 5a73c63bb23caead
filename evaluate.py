"""
Measure trained models on what they never saw: held-out poems and idioms.

    python evaluate.py poems                                   # every run of the quickstart that is there
    python evaluate.py poems --runs=out/poems,out/poems-sft --seed=2

in:  out/<run>/ folders, data/poems/, data/poems-prompts/, data/raw/poems-heldout/
out: a table, and the same numbers in out/evaluate.json

bits/byte   held-out poems, teacher-forced (lower is better; does not depend on the tokenizer)
idioms      four explanations, one true: argmax of log p(explanation | idiom) - log p(explanation), chance 25 %
form        poems asked for by form and held-out title: exactly the asked number of lines and characters
ends        of the same answers: ended by themselves within 256 tokens
rhymes      of those of the right form: the even lines rhyme (pypinyin, thirteen classes); no stage is trained on this
reward      mean score of the reward model;   KL: nats an answer from the SFT model, at the sampling temperature
Shares come with 95 % Wilson intervals.
"""
import json
import math
import os
import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common import (answer_logps, collate, load_checkpoint, load_model, model_from, open_data, open_pairs,
                    score_answers, start)
from configurator import load_config
from model import ScalarModel
from recipes.poems import FORMS, equal_lines, load_heldout, poem_form, rhyme
from pretrain import evaluate as validation_loss
from tokenizer import load_tokenizer, render_chat


@dataclass
class Config:
    name: str = "poems"              # what to evaluate: poems
    runs: str = "out/poems,out/poems-sft,out/poems-ppo,out/poems-dpo"  # folders; those that are not there are left out
    reward_from: str = "out/poems-reward"
    reference: str = "out/poems-sft"  # what KL is measured from
    n_free: int = 100                # free samples of a pretrained model
    n_titles: int = 100              # held-out titles
    n_each: int = 4                  # answers to each
    n_idioms: int = 1000
    temperature: float = 1.0         # of chat answers
    free_temperature: float = 0.8    # of free samples
    batch_size: int = 64
    # fields that the validation loop of pretrain.py reads
    seq_len: int = 128
    eval_tokens: int = 1_000_000
    # machine
    device: str = "auto"
    seed: int = 1234


def wilson(hits, n):
    """95 % interval of a share (Wilson 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def share(hits):
    """Record of a list of booleans: share, interval, count."""
    low, high = wilson(sum(hits), len(hits))
    return {"share": sum(hits) / max(1, len(hits)), "low": low, "high": high, "n": len(hits)}


@torch.no_grad()
def logps_of(model, documents, pad_id, env, temperature=1.0):
    """Summed log-prob of the learned tokens of each document (ids, mask)."""
    return answer_logps(model, collate(documents, pad_id, env.device), env, temperature)[0].tolist()


def idiom_choice(model, tokenizer, idioms, chat, cfg, env):
    """Four explanations for each idiom, the true one and three of other held-out idioms; return hits.

    The score is the gain in log-prob that naming the idiom brings, so explanations that are likely anyway win nothing.
    """
    def document(word, explanation):
        if chat:
            question = f"“{word}”是什么意思？" if word else "这个成语是什么意思？"
            ids, mask = render_chat(tokenizer, [{"role": "user", "content": question},
                                                {"role": "assistant", "content": explanation}])
            return ids, mask
        head = [tokenizer.eot_id] + tokenizer.encode(f"成语：{word}\n释义：")
        body = tokenizer.encode(explanation)
        return head + body, [0] * len(head) + [1] * len(body)

    rng, rows = random.Random(cfg.seed), idioms[:cfg.n_idioms]
    choices = []
    for i in range(len(rows)):
        others = rng.sample([j for j in range(len(rows)) if rows[j]["explanation"] != rows[i]["explanation"]], 3)
        choices.append([i] + others)
    limit = model.config.max_seq_len
    pairs = [document(rows[i]["word"], rows[j]["explanation"]) for i, four in enumerate(choices) for j in four]
    alone = [document("", row["explanation"]) for row in rows]
    pairs, alone = ([(ids[:limit], mask[:limit]) for ids, mask in docs] for docs in (pairs, alone))
    given = logps_of(model, pairs, tokenizer.pad_id, env)
    prior = logps_of(model, alone, tokenizer.pad_id, env)
    hits = []
    for i, four in enumerate(choices):
        gains = [given[4 * i + c] - prior[j] for c, j in enumerate(four)]
        hits.append(all(gains[0] > gain for gain in gains[1:]))  # a tie, or a NaN, is no hit
    return hits


def sample_all(model, prompts, stop_ids, pad_id, temperature, seed, cfg, env):
    """Continue all prompts by up to 256 tokens, batch by batch."""
    answers, room = [], model.config.max_seq_len - max(map(len, prompts))
    for i in range(0, len(prompts), cfg.batch_size):
        with env.autocast():
            answers += model.generate(prompts[i:i + cfg.batch_size], min(256, room), temperature=temperature,
                                      stop_ids=stop_ids, pad_id=pad_id, seed=seed + i)
    return answers


@torch.no_grad()
def scores_of(reward_model, documents, pad_id, env):
    """Score of each document (ids, mask)."""
    return score_answers(reward_model, collate(documents, pad_id, env.device), env).tolist()


def reward_accuracy(reward_model, tokenizer, idioms, cfg, env):
    """Share of held-out pairs that the reward model orders as they were ranked, by where they come from."""
    _, val, _, bounds, _ = open_pairs(f"data/{cfg.name}-pairs", tokenizer.fingerprint, reward_model.config.max_seq_len)
    documents = [val.document(i) for i in range(len(val))]
    scores = scores_of(reward_model, documents, tokenizer.pad_id, env)
    words, hits = {row["word"] for row in idioms}, {"poem lists": [], "idiom pairs": [], "people": []}
    for a, b in zip(bounds, bounds[1:]):
        question = tokenizer.decode([int(t) for t, m in zip(*documents[a]) if not m])
        kind = "poem lists" if b - a > 2 else "idiom pairs" if any(w in question for w in words) else "people"
        hits[kind] += [scores[i] > scores[j] for i in range(a, b) for j in range(i + 1, b)]
    return {kind: share(values) for kind, values in hits.items() if values}


def evaluate_run(folder, cfg, env, poems, idioms, reference, reward_model):
    """Return {measure: number or share} of one run."""
    model, tokenizer, checkpoint = load_model(folder, env.device)
    chat, pad_id, result = checkpoint["stage"] != "pretrain", tokenizer.pad_id, {"stage": checkpoint["stage"]}
    val = open_data(f"data/{cfg.name}", "text", tokenizer.fingerprint)[1]
    result["bits_per_byte"] = validation_loss(model, val, cfg, env)[1]
    result["idioms"] = share(idiom_choice(model, tokenizer, idioms, chat, cfg, env))
    model.eval()
    if not chat:
        # nothing is given but the first word of a document, the form; title, author and poem are the model's own
        starts = [[tokenizer.eot_id] + tokenizer.encode(f"{form}《") for form in FORMS]
        new = sample_all(model, [starts[i % len(starts)] for i in range(cfg.n_free)], [tokenizer.eot_id], pad_id,
                         cfg.free_temperature, cfg.seed, cfg, env)
        bodies = [tokenizer.decode(ids, skip_special=True).partition("\n")[2] for ids in new]
        result["free_equal_lines"] = share([equal_lines(body) for body in bodies])
        start_ids = [tokenizer.eot_id] + tokenizer.encode("床前明月光")
        new = model.generate([start_ids], 30, temperature=0, stop_ids=[tokenizer.eot_id])[0]
        result["recital"] = "床前明月光" + tokenizer.decode(new, skip_special=True)
        return result
    asked = [poem for poem in poems for _ in range(cfg.n_each)]
    prompts = [render_chat(tokenizer, [{"role": "user", "content": f"写一首{poem['form']}，题目是《{poem['title']}》。"}],
                           add_generation_prompt=True)[0] for poem in asked]
    stop_ids = [tokenizer.im_end_id, tokenizer.eot_id]
    new = sample_all(model, prompts, stop_ids, pad_id, cfg.temperature, cfg.seed, cfg, env)
    answers = [tokenizer.decode([t for t in ids if t not in stop_ids]) for ids in new]
    right = [poem_form(answer) == poem["form"] for answer, poem in zip(answers, asked)]
    result["form"] = share(right)
    result["ends"] = share([ids[-1] in stop_ids for ids in new])
    result["rhymes"] = share([bool(rhyme(answer)) for answer, ok in zip(answers, right) if ok])
    result["examples"] = answers[:3 * cfg.n_each:cfg.n_each]
    documents = [(p + ids, [0] * len(p) + [1] * len(ids)) for p, ids in zip(prompts, new)]
    if reward_model is not None:
        result["reward"] = sum(scores_of(reward_model, documents, pad_id, env)) / len(documents)
    if reference is not None:
        ours, theirs = (logps_of(m, documents, pad_id, env, cfg.temperature) for m in (model, reference))
        result["kl"] = sum(a - b for a, b in zip(ours, theirs)) / len(ours)
    return result


def cell(value):
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"{100 * value['share']:.1f}% [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(cfg):
    if cfg.name != "poems":
        raise SystemExit(f"error: no evaluation called '{cfg.name}', there is: poems")
    env = start(cfg, announce=False)
    runs = [run for run in cfg.runs.split(",") if os.path.exists(os.path.join(run, "ckpt.pt"))]
    if not runs:
        raise SystemExit(f"error: none of {cfg.runs} holds a checkpoint. Train first: bash runs/quickstart.sh")
    poems, idioms = load_heldout()
    titles = random.Random(cfg.seed).sample(poems, min(cfg.n_titles, len(poems)))
    reference = reward_model = None
    if os.path.exists(os.path.join(cfg.reference, "ckpt.pt")):
        reference = load_model(cfg.reference, env.device)[0]
    if os.path.exists(os.path.join(cfg.reward_from, "ckpt.pt")):
        reward_model = model_from(load_checkpoint(cfg.reward_from), ScalarModel).to(env.device).eval()
    results = {}
    for run in tqdm(runs, unit="run"):
        results[run] = evaluate_run(run, cfg, env, titles, idioms, reference, reward_model)
    columns = ["bits_per_byte", "idioms", "free_equal_lines", "form", "ends", "rhymes", "reward", "kl"]
    table = [["run", *columns]] + [[run, *(cell(r.get(c)) for c in columns)] for run, r in results.items()]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())
    for run, r in results.items():
        if "recital" in r:
            print(f"\n{run}, greedy:\n{r['recital']}")
        for poem in r.get("examples", []):
            print(f"\n{run}:\n{poem}")
    if reward_model is not None and os.path.exists(f"data/{cfg.name}-pairs/meta.json"):
        tokenizer = load_tokenizer(os.path.join(cfg.reward_from, "tokenizer.model"))
        results[cfg.reward_from] = reward_accuracy(reward_model, tokenizer, idioms, cfg, env)
        print("\nreward model, held-out pairs in the right order: "
              + ", ".join(f"{kind} {cell(value)}" for kind, value in results[cfg.reward_from].items()))
    os.makedirs("out", exist_ok=True)
    with open("out/evaluate.json", "w", encoding="utf-8") as f:
        json.dump(results, f, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    main(load_config(Config, positional="name"))
