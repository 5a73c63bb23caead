"""
What ppo.py and grpo.py share: prompts become answers, answers become scores and log-probs.

    prompts   ──generate──▶  documents [(ids, mask)]  ──pad, shift──▶  ids, targets, mask  (B, T)
    documents ──scorer───▶   scores (B)                                  mask is 1 on the answer's tokens
    ids       ──model────▶   log-probs of policy and reference (B, T)
"""
import importlib.util
import inspect
import math
import os
import sys

import numpy as np
import torch

from common.checkpoint import load_reward_model
from common.data import pad, shift, shuffled
from common.distributed import all_sum
from common.generate import generate
from common.loss import score_answers, token_logps
from configurator import check
from tokenizer import render_chat


def rollout(model, prompts, cfg, tokenizer, seed, env, environment=None):
    """Answer each prompt (ids); return documents [(ids, mask)] with mask 1 on what the model says.

    environment(text) -> reply: the tool's answer to a turn that calls a tool, or None. The reply is read, not learned,
    and the model goes on, up to cfg.turns turns:

        12+34=?  <tool_call>…</tool_call>  │ 46 │  46        ids: rows that call no tool are done, while others
        0000000  1111111111111111111111111  0000  11        mask    take their next turn

    Temperature, but no top-k or top-p: answers are sampled from exactly the distribution of which we compute log-probs.
    """
    documents = [(list(prompt), [0] * len(prompt)) for prompt in prompts]
    going = list(range(len(prompts)))  # numbers of the rows that take a turn
    turns = cfg.turns if environment else 1
    for turn in range(turns):
        with env.autocast():
            answers = generate(
                model,
                [documents[number][0] for number in going],
                cfg.max_new_tokens,
                temperature=cfg.temperature,
                stop_ids=[tokenizer.im_end_id, tokenizer.eot_id],
                pad_id=tokenizer.pad_id,
                # a row's own, whoever else goes on; a million apart, as torch takes the lower 32 bits of a seed alone
                seed=[seed + number + turn * 1_000_000 for number in going])
        calls = []
        for number, answer in zip(going, answers):
            ids, mask = documents[number]
            ids += answer
            mask += [1] * len(answer)
            reply = None
            if turn + 1 < turns and answer[-1] == tokenizer.im_end_id:
                reply = environment(tokenizer.decode(answer, skip_special=True))
            if reply is not None:
                message = {"role": "tool", "content": reply}
                header, _ = render_chat(tokenizer, [message], add_generation_prompt=True)
                told = tokenizer.encode("\n") + header
                ids += told
                mask += [0] * len(told)
                calls.append(number)
        going = calls
        if not going:
            break
    return documents


def step_prompts(split, group_size, cfg, step, micro):
    """Yield (prompts, seed) for each of a step's micro-steps that are this process's, each prompt group_size times. An
    answer's random numbers follow from its place among all answers of the step, so they do not depend on who generates
    it."""
    sequence = np.random.SeedSequence([cfg.seed, step])
    step_seed = int(sequence.generate_state(1)[0])
    for i in micro:
        first = (step * cfg.grad_accum + i) * cfg.batch_size
        numbers = shuffled(len(split), first, cfg.batch_size, cfg.seed)
        prompts = [split.document(n)[0].tolist() for n in numbers.repeat(group_size)]
        yield prompts, step_seed + i * cfg.batch_size * group_size


def check_prompts(splits, cfg, window, trained_len, env):
    """Exit where a prompt and its answer would exceed the `window` of tokens that all models can see; say where they
    would exceed what the policy was trained on."""
    longest = max(np.diff(split.idx).max(initial=0) for split in splits)
    check(longest + cfg.max_new_tokens <= window, f"{cfg.data_dir} has a prompt of {longest} tokens; with "
          f"max_new_tokens={cfg.max_new_tokens} that exceeds the {window} tokens the models can see. Prepare it again "
          "with a smaller --max_length, or lower --max_new_tokens")
    if longest + cfg.max_new_tokens > trained_len and env.is_main:
        print(f"note: a prompt of {longest} tokens and max_new_tokens={cfg.max_new_tokens} are more than the "
              f"{trained_len} tokens of the longest row the model was trained on")


# ---------------------------------------------------------------------------- scores


def load_function(spec):
    """Return the function that "file.py:name" names."""
    path, _, name = spec.partition(":")
    check(os.path.isfile(path) and name, f"{spec!r} is not FILE.py:FUNCTION (looked in {os.getcwd()})")
    module_spec = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    check(hasattr(module, name), f"{path} defines no function '{name}'")
    return getattr(module, name)


def function_scorer(spec, tokenizer, env):
    """Return a scorer, documents [(ids, mask)] -> scores (B), that calls the function named "file.py:name" with texts:

        prompt    "user\\n写一首五言绝句。\\nassistant\\n"      the rendered chat without its control tokens
        answer    "床前明月光，…"      without the <|im_end|> that ends it; control tokens inside it are shown

    Where its parameters are named prompts and answers, it is called once with all of them.

    Where it fails on an answer, that answer is printed and its score is nan: see must_stop().
    """
    function = load_function(spec)
    in_batches = list(inspect.signature(function).parameters)[:2] == ["prompts", "answers"]

    def scores_of(prompts, answers):
        """The scores of some answers; nan, and said why, where there are none."""
        try:
            rewards = function(prompts, answers) if in_batches else [function(prompts[0], answers[0])]
            scores = [float(reward) for reward in rewards]  # also of numpy's and torch's numbers
            if len(scores) == len(answers) and all(map(math.isfinite, scores)):
                return scores
            reason = f"returned {rewards!r:.100}, no finite number for each answer,"
        except Exception as error:
            reason = f"failed ({type(error).__name__}: {error})"
        print(f"error: {spec} {reason} on the answer {answers[0]!r} to {prompts[0]!r}", file=sys.stderr)
        return [math.nan] * len(answers)

    def scorer(documents):
        prompts = []
        answers = []
        for ids, mask in documents:
            begin = mask.index(1)
            prompts.append(tokenizer.decode(ids[:begin], skip_special=True))
            answer = ids[begin:]
            if answer[-1] in (tokenizer.im_end_id, tokenizer.eot_id):
                answer = answer[:-1]
            answers.append(tokenizer.decode(answer))
        size = len(documents) if in_batches else 1
        scores = []
        for i in range(0, len(documents), size):
            scores += scores_of(prompts[i:i + size], answers[i:i + size])
        return torch.tensor(scores, dtype=torch.float32, device=env.device)

    return scorer


def make_scorer(cfg, tokenizer, env):
    """Return the scorer that cfg names: the rule cfg.reward, or the reward model cfg.reward_from."""
    if cfg.reward:
        return function_scorer(cfg.reward, tokenizer, env)
    if not cfg.reward_from:
        return lambda documents: torch.zeros(len(documents), device=env.device)  # a teacher judges tokens, no answers
    reward_model = load_reward_model(cfg.reward_from, env.device, tokenizer.fingerprint)
    return model_scorer(reward_model, tokenizer.pad_id, env)


def model_scorer(reward_model, pad_id, env):
    """Return a scorer, documents [(ids, mask)] -> scores (B), that asks a reward model."""

    @torch.no_grad()
    def scorer(documents):
        with env.autocast():
            return score_answers(reward_model, *pad(documents, pad_id, env.device))

    return scorer


# ---------------------------------------------------------------------------- a batch, before the update


def make_batch(documents, tokenizer, scorer, watcher, env):
    """Return a dict of tensors: ids, targets, mask (B, T); ended, score and, with a watcher, watched (B)."""
    ids, targets, mask = shift(*pad(documents, tokenizer.pad_id, env.device))
    ends = [document[-1] in (tokenizer.im_end_id, tokenizer.eot_id) for document, _ in documents]
    batch = {
        "ids": ids,
        "targets": targets,
        "mask": mask,
        "ended": torch.tensor(ends, device=env.device).float(),
        "score": scorer(documents)}
    if watcher:
        batch["watched"] = watcher(documents).nan_to_num(0.0)  # only for the log, so nan must not end the run
    return batch


@torch.no_grad()
def all_logps(model, batch, cfg, env):
    """Log-prob of each answer token under a model, (B, T), computed batch_size rows at a time."""
    # as the update does it, in parts of the same size: otherwise rounding would make the first ratio differ from 1
    parts = []
    for first in range(0, len(batch["ids"]), cfg.batch_size):
        part = {name: batch[name][first:first + cfg.batch_size] for name in ("ids", "targets", "mask")}
        with env.autocast():
            hidden = model(part["ids"])                                            # (rows, T, C)
            parts.append(token_logps(hidden, model.head_weight, part["targets"], part["mask"], cfg.temperature))
    return torch.cat(parts)


@torch.no_grad()
def all_values(critic, batch, cfg, env):
    """The critic's value before each answer token, (B, T)."""
    parts = []
    for first in range(0, len(batch["ids"]), cfg.batch_size):
        rows = slice(first, first + cfg.batch_size)
        with env.autocast():
            values = critic(batch["ids"][rows])                                    # (rows, T)
        parts.append(values * batch["mask"][rows])
    return torch.cat(parts)


def k3(logps, ref_logps):
    """Unbiased, never negative estimate of KL(pi || ref) at samples of pi: ref/pi - 1 - log(ref/pi) (Schulman 2020)."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def summary(batch, env):
    """Return means over the answers of all processes: score, KL from the reference in nats per answer, length, share
    that ended, and entropy (nats per token, estimated by -log p of what was sampled)."""
    log_ratio = (batch["logps"] - batch["ref_logps"]) * batch["mask"]
    per_answer = {
        "score": batch["score"],
        "kl": log_ratio.sum(1),
        "length": batch["mask"].sum(1),
        "eos_share": batch["ended"],
        "entropy": -batch["logps"].sum(1)}
    if "watched" in batch:
        per_answer["watched"] = batch["watched"]
    totals = [values.sum() for values in per_answer.values()]
    n, *sums = all_sum([len(log_ratio), *totals], env)
    means = {name: total / max(n, 1) for name, total in zip(per_answer, sums)}
    means["entropy"] /= max(means["length"], 1e-8)
    return means


def rescale_critic(critic, scores, cfg, env):
    """Scale the critic's values to the mean and deviation of a rule's scores. The critic starts as a reward model,
    whose scores have another scale, and would need long to learn the new one. With a reward model nothing is to do."""
    if not cfg.reward:
        return
    n, total, square = all_sum([len(scores), scores.sum(), (scores.double() ** 2).sum()], env)
    mean = total / n
    variance = max(square / n - mean ** 2, 0.0)
    critic.head.weight.data *= math.sqrt(variance) or 1.0
    critic.head.bias.data.fill_(mean)


def must_stop(batch, env):
    """Whether a process was asked to stop, or a reward function failed: then nobody learns from this batch."""
    failed, signals = all_sum([batch["score"].isnan().any(), len(env.signals)], env)
    if failed:
        env.signals.insert(0, "a reward function that failed on an answer")
    return failed + signals > 0


@torch.no_grad()
def evaluate(model, reference, split, scorer, watcher, tokenizer, cfg, env, environment=None):
    """Return summary() on the first eval_prompts of a split, shared among the processes, as {"val_…": number}: the same
    prompts and random numbers every time. {} without held-out prompts."""
    n_prompts = min(cfg.eval_prompts, len(split))
    if n_prompts < env.world:
        if env.is_main and n_prompts:
            print(f"note: {n_prompts} held-out prompts for {env.world} processes: nothing is measured on them")
        return {}
    first = env.rank * n_prompts // env.world
    end = (env.rank + 1) * n_prompts // env.world
    prompts = [split.document(i)[0].tolist() for i in range(first, end)]
    documents = rollout(model, prompts, cfg, tokenizer, cfg.seed + first, env, environment)
    batch = make_batch(documents, tokenizer, scorer, watcher, env)
    batch["logps"] = all_logps(model, batch, cfg, env)
    batch["ref_logps"] = all_logps(reference, batch, cfg, env)
    if env.is_main:
        print_answers(documents[:3], batch["score"], tokenizer)
    return {f"val_{name}": value for name, value in summary(batch, env).items()}


def print_answers(documents, scores, tokenizer):
    """Print some prompts and answers with their scores. No number shows how a reward is fooled; the answers do."""
    for (ids, mask), score in zip(documents, scores.tolist()):
        texts = []
        for part in (ids[:mask.index(1)], ids[mask.index(1):]):
            words = tokenizer.decode(part, skip_special=True).split()
            texts.append(" ".join(words))  # on one line
        print(f"score {score:+.3f} | {texts[0]} | {texts[1]}", flush=True)


# ---------------------------------------------------------------------------- minibatches


def check_minibatches(minibatches, size):
    """Exit where the `size` answers of a micro-step are fewer than the minibatches they are shared out to."""
    check(minibatches <= size, f"minibatches={minibatches} of only {size} answers in a micro-step: lower --minibatches "
          "or raise --batch_size")


def minibatch_rows(cfg, size, step, epoch, minibatch, micro):
    """Return the numbers of a minibatch's rows in this process's batch, which holds `size` answers per micro-step. Each
    micro-step gives an equal share, in a random order that depends on (seed, step, epoch, micro_step) alone."""
    rows = []
    for place, i in enumerate(micro):
        order = np.random.default_rng([cfg.seed, step, epoch, i]).permutation(size)
        rows.append(place * size + order[minibatch::cfg.minibatches])
    return torch.from_numpy(np.concatenate(rows))
