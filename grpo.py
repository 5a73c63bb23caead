"""
GRPO and its family: reinforcement learning without a critic. Each prompt is answered several times, and each
answer is compared with the other answers to its prompt (DeepSeekMath, sec. 4.1; Ahmadian et al. 2024).

    python grpo.py config/poems_grpo.py                                            # a rule as the reward
    python grpo.py --reward_from=out/poems-reward --advantage=rloo --group_size=4 --out_dir=out/poems-rloo
    python grpo.py config/sums_grpo.py --reward= --teacher=out/sums-grpo --out_dir=out/sums-taught    # a teacher judges
    torchrun --standalone --nproc_per_node=4 grpo.py config/poems_grpo.py --grad_accum=4

in:  out/<sft run>; a reward function, out/<reward run> or a teacher; data/<name>/ of kind prompts
out: out/<run>/ckpt.pt, tokenizer.model, log.jsonl

    one prompt ──▶ eight answers ──▶ eight scores        1   0   0   1   0   0   0   0     mean 0.25
                                     advantages       +.75 -.25 -.25 +.75 ...              no critic needed

What differs from the papers:
 1. old log-probs are not taken from generation: the training code computes them again, so that the first ratio is 1;
 2. every log-prob is of the logits divided by the temperature, as in sampling, so it is that of the sampled policy;
 3. rloo shares the clipped loss; with one epoch and one minibatch it is plain REINFORCE;
 4. rloo puts the KL penalty into the reward (k1), grpo and dr_grpo put it into the loss (k3), where its gradient is
    that of KL(reference || policy): it pulls the policy back, but not to the optimum of reward minus KL;
 5. losses are means over all answer tokens of a minibatch (as in DAPO); dr_grpo divides by answers * max_new_tokens,
    --ratio=sequence by answers (GSPO).
"""
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.checkpoint import catch_signals, find, finish, load_model, log, own, restore, save
from common.data import open_data
from common.distributed import all_sum, check_finite, micro_steps, start
from common.lora import share_weights, start_lora
from common.loss import token_logps
from common.mixed import learn_mixed, open_mixed
from common.optim import lr_at, make_adamw, set_lr
from common.rollout import all_logps, check_minibatches, check_prompts, evaluate, function_scorer, k3, load_function
from common.rollout import make_batch, make_scorer, minibatch_rows, must_stop, rollout, step_prompts
from common.rollout import summary
from configurator import Count, NonNegative, Positive, Whole, check, run

STAGE = "grpo"
# a run can only be resumed with the same values of these, and of batch_size * grad_accum, on the same model
SAME = ("seed", "data_dir", "init_from", "advantage", "group_size")


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-prompts"
    init_from: str = "out/poems-sft"        # policy and frozen reference
    out_dir: str = "out/grpo"
    resume: bool = True                     # go on from out_dir/ckpt.pt when it is there
    # reward
    reward: str = ""                        # FILE.py:FUNCTION(prompt, answer) -> float
    reward_from: str = ""                   # or a run of reward.py
    teacher: str = ""                       # or a run that judges each token (on-policy distillation)
    watch: str = ""                         # FILE.py:FUNCTION whose mean is logged, without training on it
    no_eos_penalty: NonNegative = 0.5       # taken off the score of an answer that was cut; a teacher gives no score
    kl_coef: NonNegative = 0.05             # penalty per nat of distance from the reference
    # adapters (common/lora.py)
    lora_rank: Whole = 0                    # 0: train all weights
    lora_alpha: Positive = 16.0             # what the adapters add is multiplied by alpha / rank
    lora_targets: str = "qkv|out|gate_up|down"  # regex: layers whose name ends with it get adapters
    # advantages
    advantage: Literal["grpo", "rloo", "dr_grpo"] = "grpo"
    group_size: Count = 8                   # answers a prompt, at least 2
    skip_flat_groups: bool = False          # leave out prompts whose answers all got the same reward (DAPO)
    # batch: grad_accum * batch_size prompts a step, each answered group_size times
    batch_size: Count = 16                  # prompts in a micro-step
    grad_accum: Count = 1                   # micro-steps in a step, all processes together
    max_new_tokens: Count = 96              # of a turn
    environment: str = ""                   # FILE.py:FUNCTION(text) -> a tool's reply to the text, or None
    turns: Count = 4                        # with an environment: how often the model may speak
    temperature: Positive = 1.0
    # update
    max_steps: Count = 100
    ppo_epochs: Count = 1                   # passes over a step's answers
    minibatches: Count = 1                  # optimizer steps in a pass
    clip: NonNegative = 0.0                 # ratios stay within 1 ± clip; 0: 0.2, of whole answers 3e-4 (GSPO)
    clip_high: NonNegative = 0.0            # upper end of the ratio, 1 + clip_high (DAPO); 0: as clip
    ratio: Literal["token", "sequence"] = "token"  # of each token, or one of the whole answer (GSPO)
    surrogate: Literal["ppo", "cispo"] = "ppo"
    # text or conversations mixed in (PPO-ptx)
    ptx_dir: str = ""                       # data of kind sft or text; several folders, with commas between, take turns
    ptx_coef: NonNegative = 0.0             # weight of their loss; 0: none
    ptx_rows: Count = 8                     # rows in an update
    # optimizer
    lr: Positive = 1e-5
    min_lr: NonNegative = 1e-6              # at the last step
    warmup_steps: Whole = 0                 # 0: a tenth of the run, at most 100
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0            # 0: no clipping
    # every eval_every steps: score and KL on held-out prompts, a checkpoint
    eval_every: Count = 20
    eval_prompts: Whole = 64                # 0: none
    # machine
    device: str = "auto"
    seed: Whole = 1234


# settings that change nothing unless this holds: ratios differ from 1 from the second update on
NEEDS = {
    "turns": "environment",
    "clip": "ppo_epochs * minibatches > 1",
    "clip_high": "ppo_epochs * minibatches > 1",
    "ratio": "ppo_epochs * minibatches > 1",
    "surrogate": "ppo_epochs * minibatches > 1",
    "lora_alpha": "lora_rank",
    "lora_targets": "lora_rank",
    "ptx_dir": "ptx_coef",
    "ptx_rows": "ptx_coef"}


# ---------------------------------------------------------------------------- maths


def group_advantages(totals, group_size, kind):
    """One advantage an answer from its reward (B), the answers to one prompt in a row.

    rloo: minus the mean of the prompt's other answers (Ahmadian et al. 2024, eq. 8).
    grpo: minus the group's mean, over its deviation (DeepSeekMath, sec. 4.1.2).
    dr_grpo: minus the group's mean: a deviation would favour prompts that are nearly solved (arXiv 2503.20783).
    """
    # no critic is needed: the mean of the group is what one could expect of an answer to this prompt
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
    """Clipped surrogate (PPO, eq. 7) and its variants, summed over answer tokens, with ratio="sequence" over answers;
    return (loss, ratio (B, T))."""
    log_ratio = (logps - old_logps) * mask
    weights = mask
    if cfg.ratio == "sequence":
        # GSPO (arXiv 2507.18071, eq. 7): the answer's ratio is the geometric mean of its tokens'
        length = mask.sum(1, keepdim=True).clamp(min=1)
        mean = log_ratio.sum(1, keepdim=True) / length
        log_ratio = mean * mask
        weights = mask / length  # each answer counts once
    ratio = log_ratio.exp()
    low = 1 - cfg.clip
    high = 1 + (cfg.clip_high or cfg.clip)
    if cfg.surrogate == "cispo":
        # MiniMax-M1 (arXiv 2506.13585, eq. 4): the clipped ratio weighs REINFORCE, so no token's gradient is lost
        loss = -ratio.clamp(max=high).detach() * advantages * logps
    else:
        # the larger of two losses. Where a ratio has passed low or high in the direction that its advantage asks for,
        # that is the constant one, without gradient; where it has passed them in the other direction, the plain one
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(low, high)
        loss = torch.max(plain, clipped)
    return (loss * weights).sum(), ratio


def main(cfg):
    # ------------------------------------------------------------------------ start
    # torchrun starts one process per GPU; each computes its share of a step's micro-steps
    env = start(cfg)
    micro = micro_steps(cfg.grad_accum, env)
    G = cfg.group_size
    check(G > 1 or cfg.teacher, f"advantage={cfg.advantage} compares answers: give --group_size=4, not {G}")
    judges = [name for name in (cfg.reward, cfg.reward_from, cfg.teacher) if name]
    check(len(judges) == 1, "give one of --reward=FILE.py:FUNCTION, --reward_from=RUN and --teacher=RUN, not "
          f"{len(judges)}: {', '.join(judges)}")
    check_minibatches(cfg.minibatches, cfg.batch_size * G)
    cfg.clip = cfg.clip or {"token": 0.2, "sequence": 3e-4}[cfg.ratio]

    # ------------------------------------------------------------------------ models
    # the policy answers and learns; the reference is a frozen copy of it, or the teacher
    model, tokenizer, base = load_model(cfg.init_from, env.device)
    reference, same_tokenizer, _ = load_model(cfg.teacher or cfg.init_from, env.device)
    reference.requires_grad_(False)
    check(same_tokenizer.fingerprint == tokenizer.fingerprint, f"teacher={cfg.teacher} has another tokenizer than "
          f"{cfg.init_from}: their probabilities cannot be compared")
    if cfg.lora_rank:
        # only the adapters change, so policy and reference share one copy of the frozen weights
        if not cfg.teacher:
            share_weights(model, reference)
        start_lora(model, cfg, base["model"], tokenizer)
    del base
    scorer = make_scorer(cfg, tokenizer, env)
    watcher = function_scorer(cfg.watch, tokenizer, env) if cfg.watch else None
    environment = load_function(cfg.environment) if cfg.environment else None
    # net is the model; with several processes its backward pass also averages their gradients
    net = model
    if env.world > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # ------------------------------------------------------------------------ data
    train, val, _ = open_data(cfg.data_dir, "prompts", tokenizer.fingerprint)
    window = min(model.config.max_seq_len, reference.config.max_seq_len)
    check_prompts((train, val), cfg, window, model.trained_len, env)
    if cfg.ptx_coef:
        ptx = open_mixed(cfg.ptx_dir, cfg.ptx_rows, tokenizer, model.config.max_seq_len, env)

    # ------------------------------------------------------------------------ optimizer
    optimizer = make_adamw(model.parameters(), cfg.lr, cfg.weight_decay)

    # ------------------------------------------------------------------------ run folder
    own(cfg, env, cfg.init_from)
    catch_signals(env)
    # where out_dir holds a checkpoint of this run: its weights, its optimizer's state, its step
    step, _ = restore(find(STAGE, SAME, cfg, env, model, tokenizer), model, [optimizer], env)
    if step == 0:
        # where it starts from, to compare with
        log(cfg, env, step, evaluate(model, reference, val, scorer, watcher, tokenizer, cfg, env, environment))

    # ------------------------------------------------------------------------ loop
    while step < cfg.max_steps:
        # the learning rate of this step: it rises first (warmup), then falls
        began = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr([optimizer], lr / cfg.lr)

        # (1) generate: each process answers the prompts of its micro-steps, each G times
        documents = []
        for prompts, seed in step_prompts(train, G, cfg, step, micro):
            documents += rollout(model, prompts, cfg, tokenizer, seed, env, environment)
        generated = time.perf_counter()

        # (2) score the answers, and keep the log-probs of the policy before its update, and of the reference
        batch = make_batch(documents, tokenizer, scorer, watcher, env)
        if must_stop(batch, env):
            break
        mask = batch["mask"]                                                       # (B, T): 1 on answer tokens
        batch["logps"] = all_logps(model, batch, cfg, env)                         # (B, T)
        batch["ref_logps"] = all_logps(reference, batch, cfg, env)                 # (B, T)
        record = summary(batch, env)

        # (3) advantages: how much better an answer is than the others to its prompt
        # an answer cut at max_new_tokens loses some of its score, or the model would learn never to end
        scores = batch["score"] - cfg.no_eos_penalty * (1 - batch["ended"])        # (B)
        grouped = scores.view(-1, G)                                               # (prompts, G)
        if cfg.advantage == "rloo":
            scores = scores - cfg.kl_coef * ((batch["logps"] - batch["ref_logps"]) * mask).sum(1)
        if cfg.teacher:
            # the teacher judges every token: how much likelier it is for the teacher than for the policy. The mean over
            # the policy's own answers is -KL(policy || teacher), and to raise it is to come closer to the teacher
            batch["advantages"] = (batch["ref_logps"] - batch["logps"]) * mask              # (B, T)
        else:
            # every token of an answer gets the answer's advantage
            batch["advantages"] = group_advantages(scores, G, cfg.advantage)[:, None] * mask
        if cfg.skip_flat_groups and not cfg.teacher:
            # where all answers to a prompt have the same score, advantages are 0: leave their tokens out of the mean
            flat = grouped.std(dim=1) < 1e-6                                        # (prompts)
            batch["mask"] = mask * (~flat).float().repeat_interleave(G)[:, None]

        # the weight of a token in the loss: 1; with GSPO 1 / length of its answer, so that all answers count the same
        batch["weights"] = batch["mask"]
        if cfg.ratio == "sequence":
            batch["weights"] = batch["mask"] / mask.sum(1, keepdim=True).clamp(min=1)

        # (4) update, once or a few times. The ratio corrects for the policy having changed since it answered; the clip
        # limits that change
        stats = dict.fromkeys(("policy_loss", "loss_kl", "clip_share", "ptx_loss", "norm"), 0.0)
        first_ratio_error = 0.0
        for update in range(cfg.ppo_epochs * cfg.minibatches):
            epoch, minibatch = divmod(update, cfg.minibatches)
            rows = minibatch_rows(cfg, cfg.batch_size * G, step, epoch, minibatch, micro).to(env.device)
            # the loss is a mean over the tokens of all processes, but gradients are averaged over processes, that is,
            # divided by their number: so multiply by it
            n_tokens, n_rows = all_sum([batch["weights"][rows].sum(), len(rows)], env)
            weight = env.world / max(n_tokens, 1.0)
            if cfg.advantage == "dr_grpo" and cfg.ratio == "token":
                # a constant instead of the number of tokens: how long answers are does not change a token's weight
                weight = env.world / (n_rows * cfg.max_new_tokens)

            # text or conversations that the model should not forget: their gradients stay in p.grad
            if cfg.ptx_coef:
                number = step * cfg.ppo_epochs * cfg.minibatches + update
                stats["ptx_loss"] += learn_mixed(net, model, ptx, number, cfg, tokenizer.pad_id, env)

            # a minibatch, in parts that fit into memory; their gradients add up, too
            parts = rows.split(cfg.batch_size)
            for part in parts:
                b = {name: tensor[part] for name, tensor in batch.items()}         # its rows: (rows, T) or (rows)
                net.require_backward_grad_sync = part is parts[-1]  # processes average in the last part alone
                with env.autocast():
                    hidden = net(b["ids"])                                         # (rows, T, C)
                    logps = token_logps(hidden, model.head_weight, b["targets"], b["mask"], cfg.temperature)
                loss, ratio = policy_loss(logps, b["logps"], b["advantages"], b["mask"], cfg)
                kl = (k3(logps, b["ref_logps"]) * b["weights"]).sum()
                if cfg.advantage == "rloo":
                    kl = kl.detach()  # it is part of the reward already
                ((loss + cfg.kl_coef * kl) * weight).backward()
                # for the log: how many ratios were clipped
                outside = (ratio < 1 - cfg.clip) | (ratio > 1 + (cfg.clip_high or cfg.clip))
                stats["policy_loss"] += loss.item() * weight
                stats["loss_kl"] += kl.item() * weight
                stats["clip_share"] += (outside * b["weights"]).sum().item() * weight
                if update == 0:
                    # nothing has been learned yet: if a ratio is not 1, the two computations of log-probs differ
                    distance = (ratio.detach() - 1).abs() * b["mask"]
                    first_ratio_error = max(first_ratio_error, distance.max().item())

            # clip, step, and make room for the next gradients
            norm = clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
            check_finite(norm, cfg, env)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stats["norm"] += norm
        step += 1
        seconds = time.perf_counter() - began

        # one line in the log: what the answers were like, what was learned, where the time went
        totals = all_sum(list(stats.values()), env)
        record.update({name: total / env.world / (update + 1) for name, total in zip(stats, totals)})
        generate_share = (generated - began) / seconds
        record.update(first_ratio_error=first_ratio_error, lr=lr, generate_share=generate_share, seconds=seconds)
        measure = step == cfg.max_steps or step % cfg.eval_every == 0
        if measure:
            # where the score and val_kl both rise fast, the reward may be fooled: read the answers it prints
            record.update(evaluate(model, reference, val, scorer, watcher, tokenizer, cfg, env, environment))
        log(cfg, env, step, record)
        if measure:
            save("ckpt.pt", STAGE, cfg, env, step, model, [optimizer], tokenizer)
    if step < cfg.max_steps:
        # it was asked to stop: save what has been learned until the last finished step
        save("ckpt.pt", STAGE, cfg, env, step, model, [optimizer], tokenizer)
    finish(cfg, env, step, f"Try: python sample.py --chat --out_dir={cfg.out_dir}")


if __name__ == "__main__":
    run(main, Config)
