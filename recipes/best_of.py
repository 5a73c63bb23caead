"""
Best of N: the simplest use of a reward model, without any training. Ask N times, keep the answer that scores highest
(Stiennon et al. 2020, fig. 7):  python -m tools.evaluate best_of

in:  out/poems-sft (--reference) answers each of --n_titles held-out titles --samples times; the reward model in
     --reward_from chooses. Those runs in --runs that were trained by RL or DPO answer the same titles, to compare
out: a column for each N and each such run

    reward     mean score of the answers that were kept: what they were chosen by, so it must rise with N
    form       share with exactly as many lines and characters as asked: a rule that the reward model does not see
    rhymes     of those of the right form, the share that rhymes
    kl         how far the answers are from those of the model, in nats per answer: for a choice at most
               log N - (N - 1) / N; for a trained run it is measured, as in tools/evaluate.py
    seconds    to answer a title on this machine: N answers, and their scores

N = 1 is an answer without a choice. All M samples of a title are used for every N: best_of_weights() averages over all
ways to draw N of the M.
"""
import math
import random
import time
from math import comb

from common.checkpoint import load_model, load_reward_model
from configurator import check
from recipes.poems import load_heldout, poem_form, rhyme
from recipes.poems_eval import answer_all, chat_prompt, logps_of, scores_of


def best_of_weights(scores, n):
    """The chance of each of M answers to be the best of n drawn ones: the n - 1 others must be among those it beats, so
    C(number it beats, n - 1) / C(M, n)."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    weights = [0.0] * len(scores)
    for beaten, i in enumerate(order):
        weights[i] = comb(beaten, n - 1) / comb(len(scores), n)
    return weights


def answers_of(model, tokenizer, poems, count, judge, cfg, env):
    """Ask `count` times for each poem; return a list of records per title, all documents, and seconds per title."""
    began = time.perf_counter()
    prompts = []
    for poem in poems:
        question = f"写一首{poem['form']}，题目是《{poem['title']}》。"
        prompts += [chat_prompt(tokenizer, question)] * count
    new = answer_all(model, tokenizer, prompts, cfg.temperature, cfg, env)
    documents = []
    for prompt, ids in zip(prompts, new):
        mask = [0] * len(prompt) + [1] * len(ids)
        documents.append((prompt + ids, mask))
    scores = scores_of(judge, documents, tokenizer.pad_id, env)
    records = []
    for number, ids in enumerate(new):
        text = tokenizer.decode(ids, skip_special=True)
        form = poem_form(text) == poems[number // count]["form"]
        records.append({
            "reward": scores[number],
            "form": form,
            "rhymes": form and bool(rhyme(text)),
            "text": text})
    seconds = (time.perf_counter() - began) / len(poems)
    return [records[i:i + count] for i in range(0, len(records), count)], documents, seconds


def summarise(titles, n):
    """What the best of n answers has on average; form as a list with the share of each title."""
    sums = {"reward": [], "form": [], "rhymes": []}
    for records in titles:
        weights = best_of_weights([record["reward"] for record in records], n)
        for name in sums:
            parts = [weight * record[name] for weight, record in zip(weights, records)]
            sums[name].append(sum(parts))
    n_right = max(sum(sums["form"]), 1e-9)
    return {
        "reward": sum(sums["reward"]) / len(titles),
        "form": sums["form"],
        "rhymes": sum(sums["rhymes"]) / n_right}


def evaluate(runs, cfg, env):
    """Return {"best of 4" or a run: {measure: number or list of shares}}."""
    poems, _ = load_heldout()
    check(poems, "no held-out poems: python prepare.py poems, with npm installed")
    poems = random.Random(cfg.seed).sample(poems, min(cfg.n_titles, len(poems)))
    model, tokenizer, _ = load_model(cfg.reference, env.device)
    judge = load_reward_model(cfg.reward_from, env.device, tokenizer.fingerprint)
    titles, _, seconds = answers_of(model, tokenizer, poems, cfg.samples, judge, cfg, env)
    results = {}
    n = 1
    while n <= cfg.samples:
        record = summarise(titles, n)
        record["kl"] = math.log(n) - (n - 1) / n
        record["seconds"] = seconds * n / cfg.samples
        best = max(titles[0][:n], key=lambda answer: answer["reward"])
        record["example"] = best["text"]
        results[f"best of {n}"] = record
        n *= 2
    # trained runs answer as often, so that their means are equally certain
    for run in runs:
        trained, own, checkpoint = load_model(run, env.device)
        if checkpoint["stage"] in ("pretrain", "sft"):
            continue
        check(own.fingerprint == tokenizer.fingerprint, f"{run} was trained with another tokenizer than "
              f"{cfg.reference}: leave it out of --runs")
        answers, documents, seconds = answers_of(trained, tokenizer, poems, cfg.samples, judge, cfg, env)
        record = summarise(answers, 1)
        ours = logps_of(trained, documents, tokenizer.pad_id, env, cfg.temperature)
        theirs = logps_of(model, documents, tokenizer.pad_id, env, cfg.temperature)
        record["kl"] = (sum(ours) - sum(theirs)) / len(documents)
        record["seconds"] = seconds / cfg.samples
        record["example"] = answers[0][0]["text"]
        results[run] = record
    return results
