"""
PPO: raise the reward of the model's own answers, and stay close to the model it started from (InstructGPT, step 3).

    python ppo.py config/poems_ppo.py
    python ppo.py config/poems_ppo.py --reward=recipes/rewards.py:rhyming     # a rule as the reward

in:  out/<sft run>, out/<reward run>, data/<name>/ of kind prompts (a document is a prompt)
out: out/<run>/ckpt.pt (actor, critic, optimizers), tokenizer.model, log.jsonl

    actor      answers, and learns                            reward model   scores a whole answer
    reference  the actor as it was: KL is measured from it    critic         predicts the score from its beginning

One step: (1) generate answers, (2) score them, (3) log-probs of actor and reference, values of the critic,
(4) per-token rewards, (5) advantages, (6) a few epochs of clipped updates. What differs from the papers:
 1. old log-probs are not taken from generation: the training code computes them again, so that the first ratio is 1;
 2. every log-prob is of the logits divided by the temperature, as in sampling, so it is that of the sampled policy;
 3. the critic is a model of its own (started from the reward model), with its own optimizer and no clipped loss;
 4. the KL penalty is part of the reward (k1);
 5. losses are means over all answer tokens of a minibatch. Without a critic: grpo.py.
"""
import math
import time
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.checkpoint import catch_signals, find, finish, load_model, load_reward_model
from common.checkpoint import log, own, restore, save
from common.data import open_data
from common.distributed import all_sum, check_finite, micro_steps, start
from common.lora import share_weights, start_lora
from common.loss import last_learned, token_logps
from common.mixed import learn_mixed, open_mixed
from common.optim import lr_at, make_adamw, set_lr
from common.rollout import all_logps, all_values, check_minibatches, check_prompts, evaluate, function_scorer, k3
from common.rollout import make_batch, make_scorer, minibatch_rows, must_stop, rescale_critic, rollout, step_prompts
from common.rollout import summary
from configurator import Count, NonNegative, Positive, Share, Whole, check, run

STAGE = "ppo"
# a run can only be resumed with the same values of these, and of batch_size * grad_accum, on the same model
SAME = ("seed", "data_dir", "init_from")


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
    watch: str = ""                         # FILE.py:FUNCTION whose mean is logged, without training on it
    no_eos_penalty: NonNegative = 2.0       # taken off the score of an answer that was cut at max_new_tokens
    kl_coef: NonNegative = 0.1              # penalty per nat of distance from the reference
    # adapters of the actor (common/lora.py)
    lora_rank: Whole = 0                    # 0: train all weights
    lora_alpha: Positive = 16.0             # what the adapters add is multiplied by alpha / rank
    lora_targets: str = "qkv|out|gate_up|down"  # regex: layers whose name ends with it get adapters
    # advantages
    gamma: Share = 1.0                      # discount of later rewards; 1: none
    lam: Share = 0.95                       # 0: trust the critic's next value; 1: the rewards that came
    # batch: grad_accum * batch_size prompts a step, each answered once
    batch_size: Count = 64                  # prompts in a micro-step
    grad_accum: Count = 1                   # micro-steps in a step, all processes together
    max_new_tokens: Count = 96
    temperature: Positive = 1.0
    # update
    max_steps: Count = 100
    ppo_epochs: Count = 2                   # passes over a step's answers
    minibatches: Count = 2                  # optimizer steps in a pass
    clip: Positive = 0.2                    # ratios stay within 1 ± clip
    # text or conversations mixed in (PPO-ptx)
    ptx_dir: str = ""                       # data of kind sft or text; several folders, with commas between, take turns
    ptx_coef: NonNegative = 0.0             # weight of their loss; 0: none
    ptx_rows: Count = 8                     # rows in an update
    # optimizer
    lr: Positive = 1e-5
    min_lr: NonNegative = 1e-6              # at the last step
    critic_lr: Positive = 1e-4
    warmup_steps: Whole = 0                 # 0: a tenth of the run, at most 100
    critic_warmup: Whole = 0                # steps at the start that train only the critic
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
    "clip": "ppo_epochs * minibatches > 1",
    "lora_alpha": "lora_rank",
    "lora_targets": "lora_rank",
    "ptx_dir": "ptx_coef",
    "ptx_rows": "ptx_coef"}


# ---------------------------------------------------------------------------- maths


def whiten(x, mask, env):
    """Shift and scale the entries of x (B, T) under mask to mean 0 and variance 1 over all processes."""
    # so that neither the scale of the rewards nor their mean changes how the actor learns
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
    # the score belongs to the whole answer, so its last token gets it
    rows = torch.arange(len(scores), device=mask.device)
    last = last_learned(mask)
    rewards[rows, last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), all (B, T); return advantages and returns.

    values[:, t] is what the critic expects before token t: the sum of the rewards from here on. Outside the mask all is
    zero, so after the last token of an answer nothing is expected. It is computed backwards (here gamma is 1):

        rewards      0    0    0    1        advantage of a token = its delta + gamma lam * advantage of the next
        values      .2   .3   .5   .8        delta = reward + gamma * next value - value
        next value  .3   .5   .8    0
        delta       .1   .2   .3   .2
                    ◀────────────────
    """
    rewards = rewards * mask
    values = values * mask
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    # from the last token to the first, since each advantage needs that of the next token
    for t in reversed(range(values.size(1))):
        # how much better (or worse) things look after this token than the critic expected before it
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # lam 0: trust the critic's estimate of what comes next; lam 1: wait for what really came
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    # returns are what the critic should have predicted: its targets
    return advantages, (advantages + values) * mask


def policy_loss(logps, old_logps, advantages, mask, clip):
    """Clipped surrogate (PPO, eq. 7), summed over answer tokens; return (loss, ratio (B, T)). All inputs (B, T)."""
    ratio = ((logps - old_logps) * mask).exp()
    # the larger of two losses. Where a ratio has already passed 1 ± clip in the direction that its advantage asks for,
    # that is the constant one, without gradient; where it has passed it in the other direction, the plain one
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.max(plain, clipped)
    return (loss * mask).sum(), ratio


def main(cfg):
    # ------------------------------------------------------------------------ start
    # torchrun starts one process per GPU; each computes its share of a step's micro-steps
    env = start(cfg)
    micro = micro_steps(cfg.grad_accum, env)
    check_minibatches(cfg.minibatches, cfg.batch_size)

    # ------------------------------------------------------------------------ models
    actor, tokenizer, base = load_model(cfg.init_from, env.device)
    reference = load_model(cfg.init_from, env.device)[0].requires_grad_(False)
    if cfg.lora_rank:
        # only the adapters change, so actor and reference share one copy of the frozen weights
        share_weights(actor, reference)
        start_lora(actor, cfg, base["model"], tokenizer)
    del base
    # the critic starts as a copy of the reward model, which can already predict scores
    critic = load_reward_model(cfg.reward_from, env.device, tokenizer.fingerprint)
    scorer = make_scorer(cfg, tokenizer, env)
    watcher = function_scorer(cfg.watch, tokenizer, env) if cfg.watch else None
    # the nets are the models; with several processes their backward pass also averages their gradients
    nets = [actor, critic]
    if env.world > 1:
        nets = [DistributedDataParallel(m, gradient_as_bucket_view=True) for m in nets]
    actor_net, critic_net = nets

    # ------------------------------------------------------------------------ data
    train, val, _ = open_data(cfg.data_dir, "prompts", tokenizer.fingerprint)
    window = min(actor.config.max_seq_len, critic.config.max_seq_len)
    check_prompts((train, val), cfg, window, actor.trained_len, env)
    check(cfg.critic_warmup < cfg.max_steps, f"critic_warmup={cfg.critic_warmup}: the actor would never learn")
    if cfg.ptx_coef:
        ptx = open_mixed(cfg.ptx_dir, cfg.ptx_rows, tokenizer, actor.config.max_seq_len, env)

    # ------------------------------------------------------------------------ optimizer
    # two optimizers, each with its own learning rate: the critic's may be large, the actor's must be small
    actor_optimizer = make_adamw(actor.parameters(), cfg.lr, cfg.weight_decay)
    critic_optimizer = make_adamw(critic.parameters(), cfg.critic_lr, cfg.weight_decay)
    optimizers = [actor_optimizer, critic_optimizer]

    # ------------------------------------------------------------------------ run folder
    own(cfg, env, cfg.init_from)
    catch_signals(env)
    checkpoint = find(STAGE, SAME, cfg, env, actor, tokenizer)
    if checkpoint:
        critic.load_state_dict(checkpoint["critic"], strict=True)
    step, _ = restore(checkpoint, actor, optimizers, env)
    del checkpoint
    if step == 0:  # where it starts from, to compare with
        log(cfg, env, step, evaluate(actor, reference, val, scorer, watcher, tokenizer, cfg, env))

    # ------------------------------------------------------------------------ loop
    while step < cfg.max_steps:
        # the learning rate of this step: it rises first (warmup), then falls
        began = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr(optimizers, lr / cfg.lr)

        # (1) generate: each process answers the prompts of its micro-steps
        documents = []
        for prompts, seed in step_prompts(train, 1, cfg, step, micro):
            documents += rollout(actor, prompts, cfg, tokenizer, seed, env)
        generated = time.perf_counter()

        # (2) score the answers, (3) log-probs of actor and reference, values of the critic. All of it comes before the
        # first update, since updates change actor and critic
        batch = make_batch(documents, tokenizer, scorer, watcher, env)
        if must_stop(batch, env):
            break
        if step == 0:
            rescale_critic(critic, batch["score"], cfg, env)
        mask = batch["mask"]                                                       # (B, T): 1 on answer tokens
        batch["logps"] = all_logps(actor, batch, cfg, env)                         # (B, T)
        batch["ref_logps"] = all_logps(reference, batch, cfg, env)                 # (B, T)
        batch["values"] = all_values(critic, batch, cfg, env)                      # (B, T)
        record = summary(batch, env)

        # (4) a reward for each token: the KL penalty everywhere, the score at the end
        # an answer cut at max_new_tokens loses some of its score, or the model would learn never to end
        scores = batch["score"] - cfg.no_eos_penalty * (1 - batch["ended"])
        rewards = token_rewards(scores, batch["logps"], batch["ref_logps"], mask, cfg.kl_coef)    # (B, T)

        # (5) advantages: how much better than the critic had expected
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, cfg.gamma, cfg.lam)
        batch["advantages"] = whiten(advantages, mask, env)                        # (B, T)

        # (6) update: a few passes over the answers, an optimizer step for each minibatch. Generating is slow, so
        # answers are used more than once. The ratio corrects for the change of the actor since; the clip limits it
        stats = dict.fromkeys(("policy_loss", "value_loss", "clip_share", "step_kl", "ptx_loss", "norm"), 0.0)
        learning = step >= cfg.critic_warmup
        first_ratio_error = 0.0
        for update in range(cfg.ppo_epochs * cfg.minibatches):
            epoch, minibatch = divmod(update, cfg.minibatches)
            rows = minibatch_rows(cfg, cfg.batch_size, step, epoch, minibatch, micro).to(env.device)
            # the loss is a mean over the tokens of all processes, but gradients are averaged over processes, that is,
            # divided by their number: so multiply by it
            n_tokens = all_sum([mask[rows].sum()], env)[0]
            weight = env.world / max(n_tokens, 1.0)

            # text or conversations that the model should not forget: their gradients stay in p.grad
            if cfg.ptx_coef and learning:
                number = step * cfg.ppo_epochs * cfg.minibatches + update
                stats["ptx_loss"] += learn_mixed(actor_net, actor, ptx, number, cfg, tokenizer.pad_id, env)

            # a minibatch, in parts that fit into memory; their gradients add up, too
            parts = rows.split(cfg.batch_size)
            for part in parts:
                b = {name: tensor[part] for name, tensor in batch.items()}         # its rows: (rows, T) or (rows)
                actor_net.require_backward_grad_sync = part is parts[-1]  # average in the last part alone
                critic_net.require_backward_grad_sync = part is parts[-1]

                # actor: raise the log-probs of tokens that did better than expected
                with torch.set_grad_enabled(learning), env.autocast():
                    hidden = actor_net(b["ids"])                                   # (rows, T, C)
                    logps = token_logps(hidden, actor.head_weight, b["targets"], b["mask"], cfg.temperature)
                actor_loss, ratio = policy_loss(logps, b["logps"], b["advantages"], b["mask"], cfg.clip)
                if learning:
                    (actor_loss * weight).backward()

                # critic: learn to expect the returns
                with env.autocast():
                    values = critic_net(b["ids"])                                  # (rows, T)
                critic_loss = 0.5 * ((values - b["returns"]) ** 2 * b["mask"]).sum()
                (critic_loss * weight).backward()

                # for the log: how many ratios were clipped, and how far this step's updates have moved the actor
                distance = (ratio.detach() - 1).abs() * b["mask"]
                stats["policy_loss"] += actor_loss.item() * weight
                stats["value_loss"] += critic_loss.item() * weight
                stats["clip_share"] += (distance > cfg.clip).sum().item() * weight
                stats["step_kl"] += (k3(b["logps"], logps.detach()) * b["mask"]).sum().item() * weight
                if update == 0:
                    # nothing has been learned yet: if a ratio is not 1, the two computations of log-probs differ
                    first_ratio_error = max(first_ratio_error, distance.max().item())

            # clip, step, and make room for the next gradients; the actor waits until the critic has warmed up
            norm = clip_grad_norm_(actor.parameters(), cfg.grad_clip or math.inf).item()
            critic_norm = clip_grad_norm_(critic.parameters(), cfg.grad_clip or math.inf).item()
            check_finite(norm + critic_norm, cfg, env)
            if learning:
                actor_optimizer.step()
                actor_optimizer.zero_grad(set_to_none=True)
            critic_optimizer.step()
            critic_optimizer.zero_grad(set_to_none=True)
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
            # where the score and val_kl both rise fast, the reward model may be fooled: read the answers it prints
            record.update(evaluate(actor, reference, val, scorer, watcher, tokenizer, cfg, env))
        log(cfg, env, step, record)
        if measure:
            save("ckpt.pt", STAGE, cfg, env, step, actor, optimizers, tokenizer, critic=critic.state_dict())
    if step < cfg.max_steps:
        # it was asked to stop: save what has been learned until the last finished step
        save("ckpt.pt", STAGE, cfg, env, step, actor, optimizers, tokenizer, critic=critic.state_dict())
    finish(cfg, env, step, f"Try: python sample.py --chat --out_dir={cfg.out_dir}")


if __name__ == "__main__":
    run(main, Config)
