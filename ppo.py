"""
PPO: raise the reward of the model's own answers without leaving the model it started from (InstructGPT, step 3).

    python ppo.py config/poems_ppo.py
    python ppo.py config/poems_ppo.py --out_dir=out/poems-rloo --advantage=rloo --group_size=4   # without a critic
    python ppo.py config/poems_grpo.py                                                           # a rule as the reward

in:  out/<sft run>, out/<reward run>, data/<name>/ of kind prompts (a document is a prompt)
out: out/<run>/ckpt.pt (actor, critic, optimizers), tokenizer.model, log.jsonl

One step: (1) generate answers, (2) score them, (3) log-probs of actor and reference and values of the critic,
(4) per-token rewards, (5) advantages, (6) a few epochs of clipped updates. What differs from the papers:
 1. log-probs of the generating policy are computed again by the training forward, so that the first ratio is 1;
 2. temperature divides the logits in every log-prob, not only while sampling: the tempered policy is the policy;
 3. the critic is a model of its own (started from the reward model), with its own optimizer;
 4. rloo and grpo share the clipped loss; with one epoch and one minibatch they are plain REINFORCE;
 5. grpo puts the KL penalty into the loss (k3), the others into the reward (k1);
 6. losses are means over all answer tokens of a minibatch (as in DAPO), dr_grpo's over all places for tokens.
"""
import collections
import importlib.util
import math
import os
import time
from dataclasses import dataclass
from typing import Literal

# first, as it says how to install what is missing
from configurator import Count, NonNegative, Positive, Share, Whole, check, run

import numpy as np
import torch

from common import (
    all_sum, finish, load_model, load_reward_model,
    log, lr_at, make_optimizers, micro_steps,
    optimizer_step, parallel, resume, save,
    set_lr, start)
from data import collate, mixed_rows, open_data, open_mixed, shuffled
from generate import generate
from loss import answer_ends, cross_entropy, score_answers, token_logps


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-prompts"
    init_from: str = "out/poems-sft"        # actor and frozen reference
    reward_from: str = "out/poems-reward"   # reward model; the critic starts from it too
    out_dir: str = "out/ppo"
    resume: bool = True                     # go on from out_dir/ckpt.pt when it is there
    # reward
    reward: str = ""                        # FILE.py:FUNCTION(prompt, answer) -> float, instead of the reward model
    watch: str = ""                         # FILE.py:FUNCTION to follow in the log without training on it
    no_eos_penalty: NonNegative = 2.0       # taken off the score of an answer that was cut at max_new_tokens
    kl_coef: NonNegative = 0.1              # penalty a nat of distance from the reference
    # advantages
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo"] = "gae"  # gae has a critic, the others compare answers
    group_size: Count = 1                   # answers a prompt; all but gae need at least 2
    gamma: Share = 1.0
    lam: Share = 0.95
    skip_flat_groups: bool = False          # leave out prompts whose answers all got the same reward (DAPO)
    # batch: grad_accum * batch_size prompts a step, each answered group_size times
    batch_size: Count = 64                  # prompts in a micro-step
    grad_accum: Count = 1                   # micro-steps in a step, all processes together
    max_new_tokens: Count = 96
    temperature: Positive = 1.0
    # update
    max_steps: Count = 100
    ppo_epochs: Count = 2                   # passes over a step's answers
    minibatches: Count = 2                  # optimizer steps in a pass
    clip: Positive = 0.2                    # ratios stay within 1 ± clip, values within old ± clip
    clip_high: NonNegative = 0.0            # upper end of the ratio, 1 + clip_high (DAPO); 0: as clip
    ratio: Literal["token", "sequence"] = "token"  # of each token, or one of the whole answer (GSPO)
    surrogate: Literal["ppo", "cispo"] = "ppo"
    target_kl: NonNegative = 0.0            # > 0: end the step's updates once k3(old, new) a token exceeds it
    # text or conversations mixed in (PPO-ptx)
    ptx_dir: str = ""                       # data of kind sft or text; several folders, with commas between, take turns
    ptx_coef: NonNegative = 0.0             # weight of their loss; 0: none
    ptx_rows: Count = 8                     # an update
    # optimizer
    lr: Positive = 1e-5
    min_lr: NonNegative = 1e-6              # at the last step
    critic_lr: Positive = 1e-4
    warmup_steps: Whole = 5
    critic_warmup: Whole = 0                # first steps that train the critic alone
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0            # 0: no clipping
    # every eval_every steps: score and KL on held-out prompts, a checkpoint
    eval_every: Count = 20
    eval_prompts: Whole = 64                # 0: none
    # machine
    device: str = "auto"
    seed: Whole = 1234


# ---------------------------------------------------------------------------- maths


def whiten(x, mask, env):
    """Shift and scale the entries of x (B, T) under mask to mean 0 and variance 1 over all processes."""
    # the size of a step should not depend on the scale of the rewards, nor its direction on their mean
    n, total, square = all_sum([
        mask.sum(),
        (x * mask).sum(),
        (x * x * mask).sum()], env)
    mean = total / max(n, 1)
    variance = max(square / max(n, 1) - mean ** 2, 0.0)
    return (x - mean) / (math.sqrt(variance) + 1e-8) * mask


def token_rewards(scores, logps, ref_logps, mask, kl_coef):
    """Rewards (B, T): minus kl_coef times k1 = log(pi/ref) at each answer token, plus the score (B) at the last one.

    Their sum over a row is score - kl_coef * log(pi(answer)/ref(answer)), the objective of Ziegler et al. 2019 (eq. 2).
    """
    rewards = -kl_coef * (logps - ref_logps) * mask
    # the score is of the whole answer, so it is known only where the answer ends
    rows = torch.arange(len(scores), device=mask.device)
    last = answer_ends(mask) - 1
    rewards[rows, last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), all (B, T); return advantages and returns.

    values[:, t] is the critic's word on the prefix before token t. What lies outside the mask counts as zero, so the
    last token of an answer is followed by nothing.
    """
    rewards = rewards * mask
    values = values * mask
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    # from the last token to the first, since each advantage builds on that of the token behind it
    for t in reversed(range(values.size(1))):
        # what this token brought, beyond what the critic had expected
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # lam 0: trust the critic's word on what comes next; lam 1: wait for what really came
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    # returns are what the critic should have said
    return advantages, (advantages + values) * mask


def group_advantages(totals, group_size, kind):
    """One advantage an answer from its reward (B), the answers to one prompt in a row.

    rloo: minus the mean of the prompt's other answers (Ahmadian et al. 2024, eq. 8).
    grpo: minus the group's mean, over its deviation (DeepSeekMath, sec. 4.1.2).
    dr_grpo: minus the group's mean: a deviation would favour prompts that are nearly solved (arXiv 2503.20783).
    """
    # no critic: what was to be expected of an answer, the other answers to its prompt say
    groups = totals.view(-1, group_size)                                           # (prompts, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        # the group's mean contains the answer itself; its lead over the n - 1 others is n / (n - 1) times as large
        advantages = advantages * group_size / (group_size - 1)
    if kind == "grpo":
        deviation = groups.std(dim=1, keepdim=True)
        advantages = advantages / (deviation + 1e-4)
    return advantages.view(-1)


def policy_loss(logps, old_logps, advantages, mask, cfg):
    """Clipped surrogate (PPO, eq. 7) and its variants, summed over answer tokens; return (loss, ratio (B, T))."""
    log_ratio = (logps - old_logps) * mask
    if cfg.ratio == "sequence":
        # GSPO (arXiv 2507.18071, eq. 7): the answer's ratio is the geometric mean of its tokens'
        length = mask.sum(1, keepdim=True).clamp(min=1)
        mean = log_ratio.sum(1, keepdim=True) / length
        log_ratio = mean * mask
    ratio = log_ratio.exp()
    low = 1 - cfg.clip
    high = 1 + (cfg.clip_high or cfg.clip)
    if cfg.surrogate == "cispo":
        # MiniMax-M1 (arXiv 2506.13585, eq. 4): the clipped ratio weighs REINFORCE, so no token's gradient is lost
        loss = -ratio.clamp(max=high).detach() * advantages * logps
    else:
        # the worse of two losses: a ratio that has left the range the way its advantage wants gains nothing by going on
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(low, high)
        loss = torch.max(plain, clipped)
    return (loss * mask).sum(), ratio


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, the larger of the clipped and the plain one, summed over answer tokens."""
    # the critic, too, gains nothing by moving further than clip in one step
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = (values - returns) ** 2
    clipped_error = (clipped - returns) ** 2
    worse = torch.max(error, clipped_error)
    return 0.5 * (worse * mask).sum()


def k3(logps, ref_logps):
    """Unbiased, never negative estimate of KL(pi || ref) at samples of pi: ref/pi - 1 - log(ref/pi) (Schulman 2020)."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


# ---------------------------------------------------------------------------- answers and their scores


def rollout(actor, prompts, group_size, stop_ids, pad_id, cfg, seed, env):
    """Answer each prompt (ids) group_size times; return documents [(ids, mask)] with mask 1 on the answer.

    One temperature and no truncation: answers are samples of the very distribution that the log-probs speak of.
    """
    with env.autocast():
        answers = generate(
            actor,
            prompts,
            cfg.max_new_tokens,
            temperature=cfg.temperature,
            stop_ids=stop_ids,
            pad_id=pad_id,
            seed=seed,
            group_size=group_size)
    documents = []
    for number, answer in enumerate(answers):
        prompt = list(prompts[number // group_size])
        mask = [0] * len(prompt) + [1] * len(answer)
        documents.append((prompt + answer, mask))
    return documents


def function_scorer(spec, tokenizer):
    """Return a scorer, documents [(ids, mask)] -> scores (B), that asks the function named "file.py:name"."""
    path, _, name = spec.partition(":")
    check(os.path.isfile(path) and name, f"{spec!r} is not FILE.py:FUNCTION (looked in {os.getcwd()})")
    module_spec = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    check(hasattr(module, name), f"{path} defines no function '{name}'")
    function = getattr(module, name)

    def scorer(documents):
        scores = []
        for ids, mask in documents:
            # rules read text, not ids
            begin = mask.index(1)
            prompt = tokenizer.decode(ids[:begin], skip_special=True)
            answer = tokenizer.decode(ids[begin:], skip_special=True)
            reward = function(prompt, answer)
            try:
                score = float(reward)  # also of numpy's and torch's numbers
            except (TypeError, ValueError, OverflowError):
                score = math.nan
            check(math.isfinite(score), f"the reward of {answer!r} is {reward!r}: the function must return a finite "
                  "number")
            scores.append(score)
        return torch.tensor(scores, dtype=torch.float32)

    return scorer


def model_scorer(reward_model, pad_id, env):
    """Return a scorer, documents [(ids, mask)] -> scores (B), that asks a reward model."""

    @torch.no_grad()
    def scorer(documents):
        return score_answers(reward_model, collate(documents, pad_id, env.device), env)

    return scorer


@torch.no_grad()
def all_logps(model, batch, cfg, env):
    """Log-prob of each answer token under a model, (B, T), computed batch_size rows at a time."""
    # by the same function, and in parts of the same size, as in the update: otherwise the first ratio would not be 1
    parts = []
    for first in range(0, len(batch["ids"]), cfg.batch_size):
        rows = slice(first, first + cfg.batch_size)
        with env.autocast():
            logps = token_logps(                                                   # (rows, T)
                model,
                batch["ids"][rows],
                batch["targets"][rows],
                batch["mask"][rows],
                cfg.temperature)
        parts.append(logps)
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


def summary(batch, env):
    """Return means over the answers of all processes: score, KL from the reference in nats an answer, length, share
    that ended, and entropy (nats a token, estimated by -log p of what was sampled)."""
    log_ratio = (batch["logps"] - batch["ref_logps"]) * batch["mask"]
    rows = {
        "score": batch["score"],
        "kl": log_ratio.sum(1),
        "length": batch["mask"].sum(1),
        "eos_share": batch["ended"],
        "entropy": -batch["logps"].sum(1)}
    if "watched" in batch:
        rows["watched"] = batch["watched"]
    totals = [values.sum() for values in rows.values()]
    n, *sums = all_sum([len(log_ratio), *totals], env)
    means = {name: total / n for name, total in zip(rows, sums)}
    means["entropy"] /= max(means["length"], 1e-8)
    return means


def main(cfg):
    # ------------------------------------------------------------------------ start
    check(cfg.advantage == "gae" or cfg.group_size > 1, f"advantage={cfg.advantage} compares answers to one prompt: "
          f"give --group_size=4, not {cfg.group_size}")
    rows_a_micro_step = cfg.batch_size * cfg.group_size
    check(cfg.minibatches <= rows_a_micro_step, f"minibatches={cfg.minibatches} of only {rows_a_micro_step} answers in "
          "a micro-step (batch_size * group_size): lower --minibatches or raise --batch_size")
    # the same as in pretrain.py: a process a GPU, each with its share of a step's micro-steps
    env = start(cfg)
    if env.dtype == torch.float16:
        # there are many losses a step, and none of them is scaled against underflow
        env.dtype = torch.float32
    micro = micro_steps(cfg.grad_accum, env)

    # ------------------------------------------------------------------------ models
    # four models: the actor answers and learns; the reference is the actor as it was; the reward model scores whole
    # answers; the critic foretells the score from the answer's beginning
    # always in evaluation mode: there is no dropout, and the router bias of a mixture of experts stays frozen
    actor, tokenizer, _ = load_model(cfg.init_from, env.device)
    reference = load_model(cfg.init_from, env.device)[0].requires_grad_(False)
    critic = None
    windows = [actor.config.max_seq_len]  # tokens that each model can see
    if cfg.advantage == "gae":
        # a reward model's weights already know what raises a score
        critic = load_reward_model(cfg.reward_from, env.device, tokenizer.fingerprint)
        windows.append(critic.config.max_seq_len)
    if cfg.reward:
        scorer = function_scorer(cfg.reward, tokenizer)
    else:
        reward_model = load_reward_model(cfg.reward_from, env.device, tokenizer.fingerprint)
        scorer = model_scorer(reward_model, tokenizer.pad_id, env)
        windows.append(reward_model.config.max_seq_len)
    watcher = function_scorer(cfg.watch, tokenizer) if cfg.watch else None
    actor_net = parallel(actor, env)  # the model, plus the exchange of gradients between processes
    critic_net = parallel(critic, env) if critic else None

    # ------------------------------------------------------------------------ data
    train, val, _ = open_data(cfg.data_dir, "prompts", tokenizer.fingerprint)
    longest = max(np.diff(split.idx).max(initial=0) for split in (train, val))
    room = min(windows)
    check(longest + cfg.max_new_tokens <= room, f"{cfg.data_dir} has a prompt of {longest} tokens; with max_new_tokens="
          f"{cfg.max_new_tokens} that exceeds the {room} tokens the models can see. Prepare it again with a smaller "
          "--max_length, or lower --max_new_tokens")
    if cfg.ptx_coef:
        ptx = open_mixed(cfg.ptx_dir, cfg.ptx_rows, tokenizer, actor.config.max_seq_len, env)
    stop_ids = [tokenizer.im_end_id, tokenizer.eot_id]
    pad_id = tokenizer.pad_id

    def describe(documents):
        """Steps 2 and 3 on answers: a dict of tensors, (B, T) or (B)."""
        ids, targets, mask = collate(documents, pad_id, env.device)
        ended = [document[-1] in stop_ids for document, _ in documents]
        batch = {
            "ids": ids,
            "targets": targets,
            "mask": mask,
            "ended": torch.tensor(ended, device=env.device).float(),
            "score": scorer(documents).to(env.device)}
        if watcher:
            batch["watched"] = watcher(documents).to(env.device)
        # all of it before the first update: afterwards the actor is another
        batch["logps"] = all_logps(actor, batch, cfg, env)
        batch["ref_logps"] = all_logps(reference, batch, cfg, env)
        if critic:
            batch["values"] = all_values(critic, batch, cfg, env)
        return batch

    def evaluate():
        """Means on held-out prompts: the same prompts and random numbers every time."""
        n_prompts = min(cfg.eval_prompts, len(val))
        first = env.rank * n_prompts // env.world
        end = (env.rank + 1) * n_prompts // env.world
        prompts = [val.document(i)[0].tolist() for i in range(first, end)]
        documents = rollout(actor, prompts, 1, stop_ids, pad_id, cfg, cfg.seed + first, env)
        means = summary(describe(documents), env)
        return {f"val_{name}": value for name, value in means.items()}

    # ------------------------------------------------------------------------ optimizer
    # two optimizers with a rate each: the critic may move fast, the actor must not
    actor_optimizers = make_optimizers(actor, cfg)
    critic_optimizers = make_optimizers(critic, cfg, cfg.critic_lr) if critic else []
    optimizers = actor_optimizers + critic_optimizers
    step, _, _ = resume(cfg, env, actor, optimizers, tokenizer, critic)
    can_evaluate = min(cfg.eval_prompts, len(val)) >= env.world
    if step == 0 and can_evaluate:
        # where it starts from, to compare with
        log(cfg, env, step, evaluate())

    # ------------------------------------------------------------------------ loop
    while step < cfg.max_steps:
        # warm up, then come down, as in pretrain.py
        began = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr(optimizers, lr / cfg.lr)

        # (1) generate: each process answers the prompts of its micro-steps. An answer's random numbers follow from its
        # place among all answers of the step, so they do not depend on who generates it
        sequence = np.random.SeedSequence([cfg.seed, step])
        step_seed = int(sequence.generate_state(1)[0])
        documents = []
        for i in micro:
            first = (step * cfg.grad_accum + i) * cfg.batch_size
            numbers = shuffled(len(train), first, cfg.batch_size, cfg.seed)
            prompts = [train.document(n)[0].tolist() for n in numbers]
            seed = step_seed + i * rows_a_micro_step
            documents += rollout(actor, prompts, cfg.group_size, stop_ids, pad_id, cfg, seed, env)
        generated = time.perf_counter()

        # (2) score the answers, (3) log-probs of actor and reference, values of the critic
        batch = describe(documents)
        mask = batch["mask"]                                                       # (B, T): 1 on answer tokens
        record = summary(batch, env)
        scored = time.perf_counter()

        # (4) a reward for each token: the KL penalty everywhere, the score at the end
        # an answer that was cut is worth less than its score, or the model would learn never to end
        scores = batch["score"] - cfg.no_eos_penalty * (1 - batch["ended"])
        kl_in_loss = cfg.advantage in ("grpo", "dr_grpo")
        rewards = token_rewards(                                                   # (B, T)
            scores,
            batch["logps"],
            batch["ref_logps"],
            mask,
            0.0 if kl_in_loss else cfg.kl_coef)

        # (5) advantages: how much better than expected, by the critic or by the other answers to the prompt
        if critic:
            advantages, batch["returns"] = gae(rewards, batch["values"], mask, cfg.gamma, cfg.lam)
            batch["advantages"] = whiten(advantages, mask, env)
        else:
            totals = rewards.sum(1)                                                # (B)
            advantages = group_advantages(totals, cfg.group_size, cfg.advantage)
            # every token of an answer gets the answer's advantage
            batch["advantages"] = advantages[:, None] * mask                       # (B, T)
            if cfg.skip_flat_groups:
                # nothing can be learned where all answers are worth the same: such tokens do not count in the means
                flat = totals.view(-1, cfg.group_size).std(dim=1) < 1e-6           # (prompts)
                kept = (~flat).float().repeat_interleave(cfg.group_size)           # (B)
                batch["mask"] = mask * kept[:, None]

        # (6) update: a few passes over the answers, an optimizer step for each minibatch. Answers take long to make, so
        # they are used more than once: the ratio corrects for the actor having moved since, the clip limits how far
        stats = collections.Counter()
        learning = not critic or step >= cfg.critic_warmup
        first_ratio_error = 0.0
        updates = 0
        for update in range(cfg.ppo_epochs * cfg.minibatches):
            epoch, minibatch = divmod(update, cfg.minibatches)

            # of each micro-step the same share goes into a minibatch, whichever process holds it
            rows = []
            for place, i in enumerate(micro):
                rng = np.random.default_rng([cfg.seed, step, epoch, i])
                order = rng.permutation(rows_a_micro_step)
                rows.append(place * rows_a_micro_step + order[minibatch::cfg.minibatches])
            rows = torch.from_numpy(np.concatenate(rows)).to(env.device)
            n_tokens, n_rows = all_sum([batch["mask"][rows].sum(), len(rows)], env)
            # a loss is a mean over tokens of all processes, whose gradients are averaged: hence times their number
            weight = env.world / max(n_tokens, 1.0)
            if cfg.advantage == "dr_grpo":
                # a constant instead of the number of tokens: a long answer's tokens count as much as a short one's
                weight = env.world / (n_rows * cfg.max_new_tokens)
            parts = rows.split(cfg.batch_size)
            sums = collections.Counter()

            # text or conversations that the model should not forget; their gradients wait for those of the answers
            if cfg.ptx_coef and learning:
                number = step * cfg.ppo_epochs * cfg.minibatches + update
                x, y, weights = mixed_rows(ptx, number, cfg.ptx_rows, cfg.seed, pad_id, env)
                actor_net.require_backward_grad_sync = False
                with env.autocast():
                    loss = cross_entropy(actor_net(x), actor.head_weight, y, weights)
                (cfg.ptx_coef * loss * env.world).backward()
                sums["ptx_loss"] += loss.item() * env.world

            # a minibatch in parts that fit into memory; their gradients add up
            for part in parts:
                b = {name: tensor[part] for name, tensor in batch.items()}
                counted = b["mask"]                                                # (rows, T)
                last_part = part is parts[-1]  # processes exchange gradients in the last backward pass

                # actor: raise the log-probs of tokens that did better than expected
                actor_net.require_backward_grad_sync = last_part
                with torch.set_grad_enabled(learning):
                    with env.autocast():
                        logps = token_logps(                                       # (rows, T)
                            actor_net,
                            b["ids"],
                            b["targets"],
                            counted,
                            cfg.temperature)
                    loss, ratio = policy_loss(logps, b["logps"], b["advantages"], counted, cfg)
                    if kl_in_loss:
                        kl = k3(logps, b["ref_logps"])
                        loss = loss + cfg.kl_coef * (kl * counted).sum()
                if learning:
                    (loss * weight).backward()
                # what to watch: how many ratios were clipped, and how far this step's updates have moved the actor
                too_low = ratio < 1 - cfg.clip
                too_high = ratio > 1 + (cfg.clip_high or cfg.clip)
                outside = (too_low | too_high) * counted
                moved = k3(b["logps"], logps.detach()) * counted
                sums["policy_loss"] += loss.item() * weight
                sums["clip_share"] += outside.sum().item() * weight
                sums["step_kl"] += moved.sum().item() * weight
                if update == 0:
                    # nothing has been learned yet, so the ratio is 1, or the two ways to compute log-probs disagree
                    off = (ratio.detach() - 1).abs() * counted
                    first_ratio_error = max(first_ratio_error, off.max().item())

                # critic: learn to expect the returns
                if critic:
                    critic_net.require_backward_grad_sync = last_part
                    with env.autocast():
                        values = critic_net(b["ids"])
                    loss = value_loss(values, b["values"], b["returns"], counted, cfg.clip)
                    (loss * weight).backward()
                    sums["value_loss"] += loss.item() * weight

            # the means over all processes, and for all of them the same decision
            totals = all_sum(list(sums.values()), env)
            sums = {name: total / env.world for name, total in zip(sums, totals)}
            if cfg.target_kl and sums["step_kl"] > cfg.target_kl:
                # the policy has moved far enough: drop these gradients and end the step
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                break
            stats.update(sums)
            if learning:
                stats["norm"] += optimizer_step(actor, actor_optimizers, cfg, env)
            if critic:
                optimizer_step(critic, critic_optimizers, cfg, env)
            updates += 1
        stop = all_sum([len(env.signals)], env)[0]
        step += 1
        seconds = time.perf_counter() - began

        # one line in the log: what the answers were like, what was learned, where the time went
        for name, total in stats.items():
            record[name] = total / max(1, updates)
        record["updates"] = updates
        record["first_ratio_error"] = first_ratio_error
        record["lr"] = lr
        record["generate_share"] = (generated - began) / seconds
        record["score_share"] = (scored - generated) / seconds
        record["seconds"] = seconds
        measure = step == cfg.max_steps or step % cfg.eval_every == 0
        if measure and can_evaluate:
            # a score that rises while val_kl runs away is the reward model being fooled: read the answers
            record.update(evaluate())
        log(cfg, env, step, record)
        if measure or stop:
            extra = {"critic": critic.state_dict()} if critic else {}
            save("ckpt.pt", cfg, env, step, actor, optimizers, tokenizer, best_val=math.inf, **extra)
        if stop:
            break
    finish(cfg, env, step, f"Try: python sample.py --chat=True --out_dir={cfg.out_dir}")


if __name__ == "__main__":
    run(main, Config)
