"""
What the poems' runs are measured by (python -m tools.evaluate poems). All of it was in no training part, but the recitals.

in: out/<run>/ folders, data/poems/, data/poems-sft/, data/poems-pairs/, data/raw/poems-heldout/, data/raw/poems/

every run
    bits_per_byte     held-out poems, teacher-forced; lower is better, whatever the tokenizer
    idioms            four explanations, one true: largest log p(explanation | idiom) - log p(explanation); chance 25 %
a pretrained run
    free_equal_lines  samples that begin with the name of a form alone: all lines are equally long
    recital           how it goes on after 床前明月光, greedy (text)
a chat run, asked for a poem by form and held-out title
    form              exactly the asked number of lines and characters
    ends              ended by itself within 256 tokens
    rhymes            of those of the right form: the even lines rhyme (pypinyin, thirteen classes)
    reward            mean score of the reward model
    kl                nats per answer from the SFT model, at the sampling temperature
    examples          three of these poems (text)
a chat run, asked other things
    identity          who are you, in 20 phrasings, greedy: it says its name, and no clause twice
    identity_sampled  the same five times each, at temperature 0.7
    recited           the famous quatrains asked for by title, greedy: every character right
    unrepeated        answers to held-out questions, at sample.py's temperature of 0.8, in which no piece of 6 characters
                      comes twice;  unrepeated_greedy: greedy answers to the same questions. Many ask for the source of an
                      idiom that the model never saw: of a flat distribution the likeliest path runs in circles
    sft_bits          held-out answers of the instruction data, bits per byte
    sft_nats          the same, nats per token: the validation loss of sft.py
the reward model
    poem lists, idiom pairs, people    held-out pairs that it puts into the right order, by where they come from
"""
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.checkpoint import load_model, load_reward_model
from common.data import open_data, open_pairs, pad
from common.generate import generate
from common.loss import answer_logps, score_answers, text_loss
from recipes import smalltalk
from recipes.poems import FORMS, equal_lines, load_heldout, poem_form, rhyme
from tokenizer import load_tokenizer, render_chat

ANSWERS = 4           # poems to each title
FREE_SAMPLES = 100
QUESTIONS = 200       # of the instruction data, for `unrepeated`
@dataclass
class Material:
    """What the runs are asked, and whom they are compared with (None where that run is not there)."""
    titles: list            # held-out poems
    idioms: list            # held-out idioms
    quatrains: dict         # title: body of the famous ones
    reference: object       # the SFT model
    reward_model: object


# ---------------------------------------------------------------------------- text measures: pure functions


def names_itself(answer):
    """Does the answer say 明月, and no clause twice?"""
    clauses = re.split(r"[，。！？；：、,.!?;:\s]+", answer)
    clauses = [clause for clause in clauses if clause]
    twice = len(set(clauses)) < len(clauses)
    return "明月" in answer and not twice


def repeats(text, length=6):
    """Does a piece of `length` characters come twice? Six are more than a common phrase, fewer than a sentence."""
    pieces = [text[i:i + length] for i in range(len(text) - length + 1)]
    return len(set(pieces)) < len(pieces)


def famous_quatrains(raw_dir="data/raw"):
    """Return {title: body}; data/raw/poems/quatrains.jsonl has each in several layouts, the one with the form has all that is needed."""
    path = os.path.join(raw_dir, "poems", "quatrains.jsonl")
    quatrains = {}
    if not os.path.exists(path):
        return quatrains
    layout = re.compile(r"五言绝句《(.+?)》[^\n]*\n(.+)", flags=re.S)
    with open(path, encoding="utf-8") as f:
        for line in f:
            text = json.loads(line)["text"]
            found = layout.fullmatch(text)
            if found:
                title, body = found.groups()
                quatrains.setdefault(title, body)  # of two with one title, the first: as in the instruction data
    return quatrains


# ---------------------------------------------------------------------------- asking a model


def chat_prompt(tokenizer, question):
    ids, _ = render_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
    return ids


def answer_all(model, tokenizer, prompts, temperature, cfg, env):
    """Continue all prompts (ids) by up to 256 tokens, as far as the model was trained, batch by batch; return the new
    ids, stop tokens among them."""
    room = model.trained_len - max(map(len, prompts))
    stop_ids = [tokenizer.im_end_id, tokenizer.eot_id]
    new = []
    for i in range(0, len(prompts), cfg.batch_size):
        batch = prompts[i:i + cfg.batch_size]
        with env.autocast():
            new += generate(model, batch, min(256, room), temperature=temperature, stop_ids=stop_ids,
                            pad_id=tokenizer.pad_id, seed=cfg.seed + i)
    return new


def ask(model, tokenizer, questions, temperature, cfg, env):
    """Return the answers as texts."""
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    new = answer_all(model, tokenizer, prompts, temperature, cfg, env)
    return [tokenizer.decode(ids, skip_special=True).strip() for ids in new]


@torch.no_grad()
def logps_of(model, documents, pad_id, env, temperature=1.0):
    """Summed log-prob of the learned tokens of each document (ids, mask), as far as the model was trained."""
    room = model.trained_len + 1
    documents = [(ids[:room], mask[:room]) for ids, mask in documents]
    with env.autocast():
        sums, _ = answer_logps(model, model.head_weight, *pad(documents, pad_id, env.device), temperature)
    return sums.tolist()


@torch.no_grad()
def scores_of(reward_model, documents, pad_id, env):
    """Score of each document (ids, mask)."""
    with env.autocast():
        return score_answers(reward_model, *pad(documents, pad_id, env.device)).tolist()


# ---------------------------------------------------------------------------- measures


def idiom_document(tokenizer, word, explanation, chat):
    """Return (ids, mask) with the mask on the explanation; without a word: the explanation of some idiom."""
    if chat:
        question = f"“{word}”是什么意思？" if word else "这个成语是什么意思？"
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": explanation}]
        return render_chat(tokenizer, turns)
    head = tokenizer.encode_start(f"成语：{word}\n释义：")
    body = tokenizer.encode(explanation)
    return head + body, [0] * len(head) + [1] * len(body)


def idiom_choice(model, tokenizer, idioms, chat, cfg, env):
    """Four explanations for each idiom, the true one and three of other held-out idioms; return hits.

    The score is the gain in log-prob that naming the idiom brings, so explanations that are likely anyway win nothing.
    """
    rng = random.Random(cfg.seed)
    idioms = idioms[:cfg.n_idioms]
    # each idiom with four explanations, the first one true; and each explanation without an idiom
    given = []
    prior = []
    choices = []
    for i, idiom in enumerate(idioms):
        others = []
        for j, other in enumerate(idioms):
            if other["explanation"] != idiom["explanation"]:
                others.append(j)
        four = [i] + rng.sample(others, 3)
        choices.append(four)
        for j in four:
            document = idiom_document(tokenizer, idiom["word"], idioms[j]["explanation"], chat)
            given.append(document)
        document = idiom_document(tokenizer, "", idiom["explanation"], chat)
        prior.append(document)
    given = logps_of(model, given, tokenizer.pad_id, env)
    prior = logps_of(model, prior, tokenizer.pad_id, env)
    # what does naming the idiom bring? A tie, or a NaN, is no hit
    hits = []
    for i, four in enumerate(choices):
        gains = [given[4 * i + c] - prior[j] for c, j in enumerate(four)]
        hits.append(all(gains[0] > gain for gain in gains[1:]))
    return hits


def measure_free_samples(model, tokenizer, cfg, env):
    """A pretrained run: poems of its own, and the most famous one by heart."""
    # nothing is given but the first word of a document, the form; title, author and poem are the model's own
    starts = []
    for form in FORMS:
        starts.append(tokenizer.encode_start(f"{form}《"))
    prompts = [starts[i % len(starts)] for i in range(FREE_SAMPLES)]
    new = answer_all(model, tokenizer, prompts, 0.8, cfg, env)
    equal = []
    for ids in new:
        heading, _, body = tokenizer.decode(ids, skip_special=True).partition("\n")
        equal.append(equal_lines(body))
    start = tokenizer.encode_start("床前明月光")
    new = generate(model, [start], 30, temperature=0, stop_ids=[tokenizer.eot_id])
    recital = tokenizer.decode(start + new[0], skip_special=True)
    return {"free_equal_lines": equal, "recital": recital}


def measure_poems(model, tokenizer, material, cfg, env):
    """A chat run: poems asked for by form and title."""
    forms = []
    prompts = []
    for poem in material.titles:
        question = f"写一首{poem['form']}，题目是《{poem['title']}》。"
        forms += [poem["form"]] * ANSWERS
        prompts += [chat_prompt(tokenizer, question)] * ANSWERS
    new = answer_all(model, tokenizer, prompts, cfg.temperature, cfg, env)
    # shape, end and sound of each answer; and what reward model and reference are to read, the mask on the answer
    answers = []
    documents = []
    result = {"form": [], "ends": [], "rhymes": []}
    for form, prompt, ids in zip(forms, prompts, new):
        answer = tokenizer.decode(ids, skip_special=True)
        right = poem_form(answer) == form
        result["form"].append(right)
        result["ends"].append(ids[-1] in (tokenizer.im_end_id, tokenizer.eot_id))
        if right:
            result["rhymes"].append(bool(rhyme(answer)))
        answers.append(answer)
        mask = [0] * len(prompt) + [1] * len(ids)
        documents.append((prompt + ids, mask))
    result["examples"] = "\n\n".join(answers[:3 * ANSWERS:ANSWERS])
    if material.reward_model is not None:
        scores = scores_of(material.reward_model, documents, tokenizer.pad_id, env)
        result["reward"] = sum(scores) / len(scores)
    if material.reference is not None:
        ours = logps_of(model, documents, tokenizer.pad_id, env, cfg.temperature)
        theirs = logps_of(material.reference, documents, tokenizer.pad_id, env, cfg.temperature)
        result["kl"] = (sum(ours) - sum(theirs)) / len(documents)
    return result


def measure_chat(model, tokenizer, material, cfg, env):
    """A chat run: does it know its name and what it learned by heart, does it loop, does it follow held-out answers?"""
    greedy = ask(model, tokenizer, smalltalk.HELD_OUT, 0.0, cfg, env)
    sampled = ask(model, tokenizer, smalltalk.HELD_OUT * 5, 0.7, cfg, env)
    result = {
        "identity": [names_itself(answer) for answer in greedy],
        "identity_sampled": [names_itself(answer) for answer in sampled]}
    if material.quatrains:
        bodies = material.quatrains.values()
        questions = [f"背诵《{title}》" for title in material.quatrains]
        recitals = ask(model, tokenizer, questions, 0.0, cfg, env)
        result["recited"] = [recital == body for recital, body in zip(recitals, bodies)]
    folder = f"data/{cfg.what}-sft"
    if os.path.exists(folder):
        result.update(measure_sft(model, tokenizer, folder, cfg, env))
    return result


def measure_sft(model, tokenizer, folder, cfg, env):
    """Held-out conversations: greedy answers to their first questions, and how likely their own answers are."""
    _, val, _ = open_data(folder, "sft", tokenizer.fingerprint)
    documents = [val.document(i) for i in range(len(val))]
    documents = [(ids, mask) for ids, mask in documents if len(ids) <= model.trained_len + 1]
    if len(documents) < len(val):
        print(f"note: {len(val) - len(documents)} of {len(val)} held-out conversations of {folder} are left out: they are "
              f"longer than the {model.trained_len} tokens that the model was trained on", file=sys.stderr)
    n_tokens = 0
    n_bytes = 0
    for ids, mask in documents:
        n_tokens += int(mask.sum())
        n_bytes += len(tokenizer.decode_bytes(ids[mask > 0], skip_special=True))
    nats = -sum(logps_of(model, documents, tokenizer.pad_id, env))
    # what stands before the first learned token is a question, ready to be answered
    some = random.Random(cfg.seed).sample(documents, min(QUESTIONS, len(documents)))
    prompts = [ids[:mask.argmax()].tolist() for ids, mask in some]
    fresh = {}
    for name, temperature in (("unrepeated", 0.8), ("unrepeated_greedy", 0.0)):
        new = answer_all(model, tokenizer, prompts, temperature, cfg, env)
        fresh[name] = [not repeats(tokenizer.decode(ids, skip_special=True)) for ids in new]
    return {
        **fresh,
        "sft_bits": nats / math.log(2) / n_bytes,
        "sft_nats": nats / n_tokens}


def reward_accuracy(reward_model, tokenizer, idioms, cfg, env):
    """Held-out pairs that the reward model orders as they were ranked, by where they come from: lists of hits."""
    _, val, _ = open_pairs(f"data/{cfg.what}-pairs", tokenizer.fingerprint, reward_model.config.max_seq_len)
    documents = [val.document(i) for i in range(len(val))]
    scores = scores_of(reward_model, documents, tokenizer.pad_id, env)
    words = {idiom["word"] for idiom in idioms}
    bounds = val.prompt_bounds()
    hits = {"poem lists": [], "idiom pairs": [], "people": []}
    for first, end in zip(bounds, bounds[1:]):
        ids, mask = documents[first]
        question = tokenizer.decode(ids[mask == 0])
        if end - first > 2:
            kind = "poem lists"
        else:
            kind = "idiom pairs" if any(word in question for word in words) else "people"
        # the better answer stands before the worse one
        for i in range(first, end):
            hits[kind] += [scores[i] > scores[j] for j in range(i + 1, end)]
    return {kind: values for kind, values in hits.items() if values}


# ---------------------------------------------------------------------------- all of it


def evaluate_run(run, material, cfg, env):
    """Return {measure: number, text, or list of hits and misses} of one run."""
    model, tokenizer, checkpoint = load_model(run, env.device)
    chat = checkpoint["stage"] != "pretrain"
    _, val, _ = open_data(f"data/{cfg.what}", "text", tokenizer.fingerprint)
    # the windows in which pretrain.py validates, so that its log says the same
    _, bits = text_loss(model, val, 128, cfg.batch_size, 1_000_000, env)
    result = {"bits_per_byte": bits, "idioms": idiom_choice(model, tokenizer, material.idioms, chat, cfg, env)}
    if not chat:
        return {**result, **measure_free_samples(model, tokenizer, cfg, env)}
    if material.titles:  # there are none where the data was prepared without npm
        result.update(measure_poems(model, tokenizer, material, cfg, env))
    result.update(measure_chat(model, tokenizer, material, cfg, env))
    return result


def evaluate(runs, cfg, env):
    """Return {run: {measure: number, text, or list of hits and misses}}; the reward model's is about its own pairs."""
    poems, idioms = load_heldout()
    titles = random.Random(cfg.seed).sample(poems, min(cfg.n_titles, len(poems)))
    material = Material(titles, idioms, famous_quatrains(), None, None)
    if os.path.exists(f"{cfg.reference}/ckpt.pt"):
        material.reference, tokenizer, _ = load_model(cfg.reference, env.device)
        open_data(f"data/{cfg.what}", "text", tokenizer.fingerprint)  # else its probabilities are of other tokens
    if os.path.exists(f"{cfg.reward_from}/ckpt.pt"):
        _, _, meta = open_data(f"data/{cfg.what}", "text")
        material.reward_model = load_reward_model(cfg.reward_from, env.device, meta["fingerprint"])
    results = {}
    for run in tqdm(runs, unit="run", disable=None):
        results[run] = evaluate_run(run, material, cfg, env)
    if material.reward_model is not None and os.path.exists(f"data/{cfg.what}-pairs/meta.json"):
        tokenizer = load_tokenizer(cfg.reward_from)
        results[cfg.reward_from] = reward_accuracy(material.reward_model, tokenizer, idioms, cfg, env)
    return results
