"""
PPO: raise the reward of the model's own answers without leaving the model it started from (InstructGPT, step 3).

    python ppo.py config/poems_ppo.py
    python ppo.py config/poems_ppo.py --out_dir=out/poems-rloo --advantage=rloo --group_size=4   # without a critic
    python ppo.py config/poems_ppo.py --out_dir=out/poems-rule --reward=rewards.py:quatrain      # reward by a function

in:  out/<sft run>, out/<reward run>, data/<name>/ of kind prompts (a document is a prompt)
out: out/<run>/ckpt.pt (actor, critic, optimizers), tokenizer.model, log.jsonl

One step: (1) generate answers, (2) score them, (3) log-probs of actor and reference and values of the critic,
(4) per-token rewards, (5) advantages, (6) a few epochs of clipped updates. What differs from the papers:
 1. log-probs of the generating policy are computed again by the training forward, so that the first ratio is 1;
 2. temperature divides the logits in every log-prob, not only while sampling: the tempered policy is the policy;
 3. the critic is a model of its own (started from the reward model), with its own optimizer;
 4. rloo and grpo share the clipped loss; with one epoch and one minibatch they are plain REINFORCE;
 5. grpo puts the KL penalty into the loss (k3), the others into the reward (k1).
"""
import dataclasses
import importlib.util
import itertools
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from common import (all_sum, average_gradients, catch_signals, collate, load_checkpoint, load_model, log, lr_at,
                    make_optimizers, micro_steps, model_from, open_data, optimizer_step, peak_memory, resume,
                    save_checkpoint, score_answers, set_lr, shuffled, start)
from configurator import load_config
from model import ScalarModel


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
    no_eos_penalty: float = 2.0             # taken off the score of an answer that was cut at max_new_tokens
    # KL penalty against the reference
    kl_coef: float = 0.1
    kl_target: float = 0.0                  # nats an answer; > 0: kl_coef adapts to reach it (Ziegler et al. 2019)
    # advantages
    advantage: str = "gae"                  # gae (with a critic) | rloo | grpo (answers to one prompt compared)
    group_size: int = 1                     # answers a prompt; rloo and grpo need at least 2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False            # divide rewards by their deviation, mean unshifted
    # batch: grad_accum * batch_size prompts a step, each answered group_size times
    batch_size: int = 64                    # prompts in a micro-step
    grad_accum: int = 1                     # micro-steps in a step, all processes together
    max_new_tokens: int = 96
    temperature: float = 1.0
    # update
    max_steps: int = 100
    ppo_epochs: int = 2                     # passes over a step's answers
    minibatches: int = 2                    # optimizer steps in a pass
    clip: float = 0.2                       # ratio stays within 1 ± clip
    value_clip: float = 0.2                 # values stay within old ± value_clip
    target_kl: float = 0.0                  # > 0: stop the step's updates once k3(old, new) a token exceeds it
    ptx_coef: float = 0.0                   # weight of the pretraining loss (PPO-ptx)
    ptx_dir: str = ""                       # its data, kind text
    ptx_rows: int = 4                       # rows of ptx_len tokens an update; a multiple of the processes
    ptx_len: int = 128
    # optimizer
    optimizer: str = "adamw"
    lr: float = 1e-5
    min_lr: float = 1e-6
    critic_lr: float = 1e-4
    warmup_steps: int = 5
    critic_warmup: int = 0                  # first steps that train the critic alone
    schedule: str = "cosine"
    decay_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    # evaluation and saving
    eval_every: int = 20
    eval_prompts: int = 64
    save_every: int = 20
    # machine
    offload: bool = False                   # keep reference and reward model in CPU memory while they do not work
    device: str = "auto"
    seed: int = 1234


# ---------------------------------------------------------------------------- maths


def whiten(x, mask, env, shift_mean=True):
    """Scale the entries of x (B, T) under mask to unit variance over all processes; shift_mean also centres them."""
    n, total, square = all_sum([mask.sum(), (x * mask).sum(), (x * x * mask).sum()], env)
    mean = total / max(n, 1)
    std = math.sqrt(max(square / max(n, 1) - mean ** 2, 0.0)) + 1e-8
    return ((x - mean) / std if shift_mean else (x - mean) / std + mean) * mask


def token_rewards(scores, logps, ref_logps, mask, kl_coef):
    """Rewards (B, T): minus kl_coef times k1 = log(pi/ref) at each answer token, plus the score (B) at the last one.

    Their sum over a row is score - kl_coef * log(pi(answer)/ref(answer)), the objective of Ziegler et al. 2019 (eq. 2).
    """
    rewards = -kl_coef * (logps - ref_logps) * mask
    last = (mask * torch.arange(mask.size(1), device=mask.device)).argmax(dim=1)
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), all (B, T); return advantages and returns.

    values[:, t] is the critic's word on the prefix before token t. What lies outside the mask counts as zero, so the
    last token of an answer is followed by nothing.
    """
    rewards, values = rewards * mask, values * mask
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        next_value = values[:, t + 1] if t + 1 < values.size(1) else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def group_advantages(totals, group_size, kind):
    """One advantage an answer from its reward (B), B/group_size prompts in a row.

    rloo: minus the mean of the prompt's other answers (Ahmadian et al. 2024, eq. 8).
    grpo: minus the group's mean, over its deviation (DeepSeekMath, sec. 4.1.2).
    """
    groups = totals.view(-1, group_size)
    mean = groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        return ((groups - mean) * group_size / (group_size - 1)).view(-1)
    return ((groups - mean) / (groups.std(dim=1, keepdim=True) + 1e-4)).view(-1)


def policy_loss(logps, old_logps, advantages, mask, clip):
    """Clipped surrogate (PPO, eq. 7), summed over answer tokens; return (loss, ratio (B, T), ratios clipped)."""
    ratio = ((logps - old_logps) * mask).exp()
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return (loss * mask).sum(), ratio, (((ratio - 1).abs() > clip) * mask).sum()


def value_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error, the larger of the clipped and the plain one, summed over answer tokens."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * (torch.max((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum()


def k3(logps, ref_logps):
    """Unbiased, never negative estimate of KL(pi || ref) at samples of pi: ref/pi - 1 - log(ref/pi) (Schulman 2020)."""
    return (ref_logps - logps).exp() - 1 - (ref_logps - logps)


def adapt_kl_coef(kl_coef, kl, target, n, horizon=10_000):
    """Move kl_coef towards the KL wanted (Ziegler et al. 2019, sec. 2.2); n answers were seen since the last move."""
    return kl_coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


# ---------------------------------------------------------------------------- rollouts


def load_function(spec):
    """Return the function that "file.py:name" names."""
    path, _, name = spec.partition(":")
    if not os.path.isfile(path) or not name:
        raise SystemExit(f"error: {spec!r} is not FILE.py:FUNCTION (looked for {path} in {os.getcwd()})")
    module_spec = importlib.util.spec_from_file_location("reward_function", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise SystemExit(f"error: {path} defines no function '{name}'")
    return getattr(module, name)


def function_scorer(function, tokenizer):
    """Turn FUNCTION(prompt, answer) -> float into a scorer: documents [(ids, mask)] -> scores (B)."""
    def scorer(documents):
        texts = [[tokenizer.decode([t for t, learned in zip(ids, mask) if learned == side], skip_special=True)
                  for side in (0, 1)] for ids, mask in documents]
        return torch.tensor([float(function(prompt, answer)) for prompt, answer in texts])
    return scorer


def model_scorer(reward_model, pad_id, cfg, env):
    """Turn a reward model into a scorer: documents [(ids, mask)] -> scores (B)."""
    def scorer(documents):
        reward_model.to(env.device)
        with torch.no_grad():
            scores = score_answers(reward_model, collate(documents, pad_id, env.device), env)
        if cfg.offload:
            reward_model.cpu()
        return scores
    return scorer


def rollout(actor, prompts, stop_ids, pad_id, cfg, seed, env):
    """Answer each prompt (ids) group_size times; return documents [(ids, mask)] with mask 1 on the answer.

    One temperature and no truncation: answers are samples of the very distribution that the log-probs speak of.
    """
    prompts = [list(p) for p in prompts for _ in range(cfg.group_size)]
    with env.autocast():
        answers = actor.generate(prompts, cfg.max_new_tokens, temperature=cfg.temperature, stop_ids=stop_ids,
                                 pad_id=pad_id, seed=seed)
    return [(p + a, [0] * len(p) + [1] * len(a)) for p, a in zip(prompts, answers)]


def collect(actor, reference, critic, scorer, prompts, stop_ids, pad_id, cfg, step, kl_coef, env, watcher=None):
    """Steps 1 to 5. prompts: {number of the first answer among those of all processes: prompts to answer at once}.

    Return a batch of tensors, (B, T) or (B), and the seconds spent on generating and on scoring. The random numbers of
    an answer and its place in a minibatch follow from its number ("row"), so they do not depend on who generated it.
    """
    t0, documents, rows = time.perf_counter(), [], []
    seed = int(np.random.SeedSequence([cfg.seed, step]).generate_state(1)[0])
    for first, part in prompts.items():                                                       # (1) generate
        documents += rollout(actor, part, stop_ids, pad_id, cfg, seed + first, env)
        rows += range(first, first + len(part) * cfg.group_size)
    t1 = time.perf_counter()
    ids, targets, mask = collate(documents, pad_id, env.device)
    ended = torch.tensor([document[-1] in stop_ids for document, _ in documents], device=env.device).float()
    batch = {"row": torch.tensor(rows, device=env.device), "ids": ids, "targets": targets, "mask": mask, "ended": ended,
             "score": scorer(documents).to(env.device)}                                       # (2) score
    if watcher:
        batch["watched"] = watcher(documents).to(env.device)
    reference.to(env.device)
    parts = []
    with torch.no_grad(), env.autocast():                                                     # (3) log-probs, values
        for i in range(0, len(ids), cfg.batch_size):
            x, y, m = (tensor[i:i + cfg.batch_size] for tensor in (ids, targets, mask))
            parts.append((actor.logps(x, y, m, cfg.temperature), reference.logps(x, y, m, cfg.temperature),
                          critic(x) * m if critic else torch.zeros_like(m)))
    for name, tensors in zip(("logps", "ref_logps", "values"), zip(*parts)):
        batch[name] = torch.cat(tensors)
    if cfg.offload:
        reference.cpu()
    scores = batch["score"] - (cfg.no_eos_penalty * (1 - ended) if stop_ids else 0)
    rewards = token_rewards(scores, batch["logps"], batch["ref_logps"], mask,                 # (4) rewards
                            0.0 if cfg.advantage == "grpo" else kl_coef)
    if cfg.advantage == "gae":                                                                # (5) advantages
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, env, shift_mean=False)
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, cfg.gamma, cfg.lam)
        batch["advantages"] = whiten(advantages, mask, env)
    else:
        batch["advantages"] = group_advantages(rewards.sum(1), cfg.group_size, cfg.advantage)[:, None] * mask
    return batch, t1 - t0, time.perf_counter() - t1


# ---------------------------------------------------------------------------- update


def update(actor, critic, batch, cfg, step, kl_coef, env, optimizers, critic_optimizers, ptx=None):
    """Step 6: epochs of minibatches over all processes' rows, each process working on its own rows among them.

    Losses are means over all answer tokens of a minibatch. ptx(number of the update) -> (ids, targets), rows of
    pretraining data. Return statistics: means over the updates, and the first minibatch's largest |ratio - 1|.
    """
    no_scaler, totals, updates, first_ratio_error = torch.amp.GradScaler(enabled=False), {}, 0, 0.0
    learning = critic is None or step >= cfg.critic_warmup
    n_rows = cfg.grad_accum * cfg.batch_size * cfg.group_size
    for epoch, m in itertools.product(range(cfg.ppo_epochs), range(cfg.minibatches)):
        order = torch.from_numpy(np.random.default_rng([cfg.seed, step, epoch]).permutation(n_rows))
        mine = torch.isin(batch["row"], order[m::cfg.minibatches].to(env.device)).nonzero().squeeze(1)
        # average_gradients divides by the processes: make each loss its share of the global mean, times the processes
        per_token = env.world / max(1.0, all_sum([batch["mask"][mine].sum()], env)[0])
        sums = dict.fromkeys(("policy_loss", "value_loss", "ptx_loss", "step_kl", "clip_share"), 0.0)
        for rows in mine.split(cfg.batch_size):
            b = {name: tensor[rows] for name, tensor in batch.items()}
            with env.autocast():
                logps = actor.logps(b["ids"], b["targets"], b["mask"], cfg.temperature)
                loss, ratio, clipped = policy_loss(logps, b["logps"], b["advantages"], b["mask"], cfg.clip)
                sums["policy_loss"] += loss.item() * per_token
                if cfg.advantage == "grpo":
                    loss = loss + kl_coef * (k3(logps, b["ref_logps"]) * b["mask"]).sum()
            if learning:
                (loss * per_token).backward()
            if critic:
                with env.autocast():
                    loss = value_loss(critic(b["ids"]), b["values"], b["returns"], b["mask"], cfg.value_clip)
                (loss * per_token).backward()
                sums["value_loss"] += loss.item() * per_token
            sums["step_kl"] += (k3(b["logps"], logps.detach()) * b["mask"]).sum().item() * per_token
            sums["clip_share"] += clipped.item() * per_token
            if epoch == m == 0:
                first_ratio_error = max(first_ratio_error, ((ratio.detach() - 1).abs() * b["mask"]).max().item())
        if ptx and learning:
            with env.autocast():
                loss = actor(*ptx((step * cfg.ppo_epochs + epoch) * cfg.minibatches + m))
            (cfg.ptx_coef * loss).backward()
            sums["ptx_loss"] += loss.item()
        sums = {name: total / env.world for name, total in zip(sums, all_sum(list(sums.values()), env))}
        if not all(map(math.isfinite, sums.values())):
            raise SystemExit(f"error: a loss is not finite at step {step}: {sums}. The last good checkpoint is "
                             f"{cfg.out_dir}/ckpt.pt; lower --lr (now {cfg.lr})")
        if cfg.target_kl and sums["step_kl"] > cfg.target_kl:  # leave before the optimizers step
            for optimizer in optimizers + critic_optimizers:
                optimizer.zero_grad(set_to_none=True)
            break
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
        if learning:
            average_gradients(actor, env)
            totals["norm"] = totals.get("norm", 0.0) + optimizer_step(actor, optimizers, no_scaler, cfg.grad_clip)
        if critic:
            average_gradients(critic, env)
            optimizer_step(critic, critic_optimizers, no_scaler, cfg.grad_clip)
        updates += 1
    return {name: total / max(1, updates) for name, total in totals.items()} | {
        "updates": updates, "first_ratio_error": first_ratio_error}


def summary(batch, env):
    """Return means over the answers of all processes (score, KL from the reference in nats an answer, length, share
    that ended), entropy (nats a token, estimated by -log p of what was sampled), and how much of the returns' variance
    the critic explains."""
    log_ratio, mask = batch["logps"] - batch["ref_logps"], batch["mask"]
    rows = {"score": batch["score"], "kl": (log_ratio * mask).sum(1),
            "kl_k3": (k3(batch["logps"], batch["ref_logps"]) * mask).sum(1),
            "length": mask.sum(1), "eos_share": batch["ended"], "entropy": -batch["logps"].sum(1)}
    if "watched" in batch:
        rows["watched"] = batch["watched"]
    n, *sums = all_sum([len(mask)] + [values.sum() for values in rows.values()], env)
    means = {name: total / n for name, total in zip(rows, sums)}
    means["entropy"] /= max(means["length"], 1e-8)
    if "returns" in batch:
        error = (batch["returns"] - batch["values"]) * mask
        n, r, r2, e, e2 = all_sum([x.sum() for x in (mask, batch["returns"], batch["returns"] ** 2, error, error ** 2)],
                                  env)
        means["explained_variance"] = 1 - (e2 / n - (e / n) ** 2) / max(r2 / n - (r / n) ** 2, 1e-8)
    return means


def main(cfg):
    # ------------------------------------------------------------------------ start
    if cfg.advantage not in ("gae", "rloo", "grpo"):
        raise SystemExit(f"error: advantage={cfg.advantage!r}, known are gae, rloo and grpo")
    if cfg.advantage != "gae" and cfg.group_size < 2:
        raise SystemExit(f"error: {cfg.advantage} compares answers to one prompt: give --group_size=4, not "
                         f"{cfg.group_size}")
    env = start(cfg)
    if env.dtype == torch.float16:  # many losses a step, and none of them scaled against underflow
        env.dtype = torch.float32
    caught = catch_signals()

    # ------------------------------------------------------------------------ models
    # always in evaluation mode: there is no dropout, and the router bias of a mixture of experts stays frozen
    actor, tokenizer, checkpoint = load_model(cfg.init_from, env.device)
    reference = load_model(cfg.init_from, env.device)[0].requires_grad_(False)
    critic = None
    if cfg.advantage == "gae" or not cfg.reward:
        reward_checkpoint = load_checkpoint(cfg.reward_from)
        if reward_checkpoint["fingerprint"] != checkpoint["fingerprint"]:
            raise SystemExit(f"error: {cfg.reward_from} was trained with another tokenizer than {cfg.init_from}")
    if cfg.advantage == "gae":
        critic = model_from(reward_checkpoint, ScalarModel).to(env.device).eval()
    if cfg.reward:
        scorer = function_scorer(load_function(cfg.reward), tokenizer)
    else:
        scorer = model_scorer(model_from(reward_checkpoint, ScalarModel).eval(), tokenizer.pad_id, cfg, env)
    watcher = function_scorer(load_function(cfg.watch), tokenizer) if cfg.watch else None

    # ------------------------------------------------------------------------ data
    train, val, _ = open_data(cfg.data_dir, "prompts", checkpoint["fingerprint"])
    longest = max(np.diff(split.idx).max(initial=0) for split in (train, val))
    if longest + cfg.max_new_tokens > actor.config.max_seq_len:
        raise SystemExit(f"error: {cfg.data_dir} has a prompt of {longest} tokens; with max_new_tokens="
                         f"{cfg.max_new_tokens} that exceeds the {actor.config.max_seq_len} tokens the model can see. "
                         "Prepare it again with a smaller --max_length, or lower --max_new_tokens")
    n_eval = min(cfg.eval_prompts, len(val))
    stop_ids, pad_id = [tokenizer.im_end_id, tokenizer.eot_id], tokenizer.pad_id
    if cfg.ptx_coef:
        ptx_tokens = open_data(cfg.ptx_dir, "text", checkpoint["fingerprint"])[0].tokens

    def ptx_rows(number):
        """Pretraining rows of an update (numbered over the whole run), those of this process."""
        n_rows = (len(ptx_tokens) - 1) // cfg.ptx_len
        rows = shuffled(n_rows, number * cfg.ptx_rows, cfg.ptx_rows, cfg.seed)[env.rank::env.world]
        x = np.stack([ptx_tokens[r * cfg.ptx_len:(r + 1) * cfg.ptx_len + 1] for r in rows]).astype(np.int64)
        return torch.from_numpy(x[:, :-1]).to(env.device), torch.from_numpy(x[:, 1:]).to(env.device)

    def prompts_of(step, micro):
        rows = shuffled(len(train), (step * cfg.grad_accum + micro) * cfg.batch_size, cfg.batch_size, cfg.seed)
        return [train.document(r)[0].tolist() for r in rows]

    # ------------------------------------------------------------------------ optimizer
    optimizers = make_optimizers(actor, cfg)
    critic_optimizers = make_optimizers(critic, cfg) if critic else []
    scaler = torch.amp.GradScaler(env.device.type, enabled=False)
    models = {"model": actor} | ({"critic": critic} if critic else {})
    step, _, saved = resume(cfg, env, models, optimizers + critic_optimizers, scaler)
    kl_coef = saved["kl_coef"] if saved and cfg.kl_target else cfg.kl_coef
    micro = micro_steps(cfg.grad_accum, env)

    def save():
        if env.main:
            save_checkpoint(os.path.join(cfg.out_dir, "ckpt.pt"), {
                "stage": "ppo", "step": step, **{name: model.state_dict() for name, model in models.items()},
                "model_config": dataclasses.asdict(actor.config), "config": dataclasses.asdict(cfg), "kl_coef": kl_coef,
                "optimizers": [o.state_dict() for o in optimizers + critic_optimizers], "scaler": scaler.state_dict(),
                "fingerprint": checkpoint["fingerprint"], "best_val": math.inf},
                os.path.join(cfg.init_from, "tokenizer.model"))

    def evaluate():
        """Return val_… means on held-out prompts: the same prompts and random numbers every time, without a critic."""
        first, end = (r * n_eval // env.world for r in (env.rank, env.rank + 1))
        prompts = {2 * first: [val.document(i)[0].tolist() for i in range(first, end)]}
        plain = dataclasses.replace(cfg, advantage="rloo", group_size=2)
        batch, _, _ = collect(actor, reference, None, scorer, prompts, stop_ids, pad_id, plain, 0, 0.0, env, watcher)
        return {f"val_{name}": value for name, value in summary(batch, env).items()}

    # ------------------------------------------------------------------------ loop
    seconds = steps_done = 0
    if step == 0 and cfg.eval_every and n_eval >= env.world:
        log(cfg, env, step, evaluate())
    while step < cfg.max_steps:
        t = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr(optimizers, lr)
        set_lr(critic_optimizers, cfg.critic_lr * lr / cfg.lr)
        prompts = {i * cfg.batch_size * cfg.group_size: prompts_of(step, i) for i in micro}
        batch, generate_s, score_s = collect(actor, reference, critic, scorer, prompts, stop_ids, pad_id, cfg, step,
                                             kl_coef, env, watcher)
        record = summary(batch, env)
        record |= update(actor, critic, batch, cfg, step, kl_coef, env, optimizers, critic_optimizers,
                         ptx_rows if cfg.ptx_coef else None)
        record |= {"lr": lr, "kl_coef": kl_coef}
        if cfg.kl_target:
            n = cfg.grad_accum * cfg.batch_size * cfg.group_size
            kl_coef = adapt_kl_coef(kl_coef, record["kl"], cfg.kl_target, n)
        step += 1
        dt = time.perf_counter() - t
        seconds, steps_done = seconds + dt, steps_done + 1
        record |= {"generate_share": generate_s / dt, "score_share": score_s / dt,
                   "train_share": 1 - (generate_s + score_s) / dt,
                   "left": seconds / steps_done * (cfg.max_steps - step)}
        last, stop = step == cfg.max_steps, all_sum([float(bool(caught))], env)[0]
        if n_eval >= env.world and (last or (cfg.eval_every and step % cfg.eval_every == 0)):
            record |= evaluate()
        log(cfg, env, step, record)
        if last or stop or step % cfg.save_every == 0:
            save()
        if stop:
            if env.main:
                print(f"stopped after step {step}; saved. The same command goes on from here.")
            break

    if env.main:
        print(f"{cfg.out_dir}/ckpt.pt: step {step}, peak memory {peak_memory(env) / 2**30:.2f} GiB. "
              f"Try: python sample.py --chat=True --out_dir={cfg.out_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(load_config(Config))
