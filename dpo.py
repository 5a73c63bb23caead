"""
DPO: learn from ranked answers directly, without a reward model and without sampling (arXiv 2305.18290).

    python dpo.py config/poems_dpo.py
    python dpo.py config/poems_dpo.py --lora_rank=8 --lr=3e-4 --out_dir=out/poems-dpo-lora
    torchrun --standalone --nproc_per_node=4 dpo.py config/poems_dpo.py --grad_accum=4

in:  out/<SFT run>/ckpt.pt (policy and reference), data/<name>/ of kind pairs: two or more completions a prompt
out: out/<run>/ckpt.pt (run the same command again to go on), best.pt (lowest validation loss), tokenizer.model,
     log.jsonl

Differs from the papers: (1) K ranked answers give K - 1 pairs, the best against each other, so that what is raised is
always a best answer; (2) ipo, too, divides log-probs by the number of tokens, as its authors did in their experiments.
"""
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.checkpoint import catch_signals, find, finish, load_model, log, own, restore, save
from common.data import get_prompts, open_pairs, shuffled
from common.distributed import all_sum, batch_starts, check_finite, micro_steps, start
from common.lora import start_lora
from common.loss import answer_logps
from common.mixed import learn_mixed, open_mixed
from common.optim import lr_at, make_adamw, set_lr
from configurator import Count, NonNegative, Positive, Share, Whole, run

STAGE = "dpo"
# a run can only be resumed with the same values of these, and of batch_size * grad_accum, on the same model
SAME = ("seed", "data_dir", "init_from", "loss")


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-pairs"
    init_from: str = "out/poems-sft"  # a run of sft.py
    out_dir: str = "out/dpo"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # loss
    loss: Literal["dpo", "cdpo", "ipo", "simpo", "orpo"] = "dpo"  # the last two need no reference
    beta: NonNegative = 0.0        # strength of the pull to the reference (ipo: tau; simpo: scale; orpo: lambda);
                                   # 0: 0.1, with simpo 2.5
    label_smoothing: Share = 0.1   # cdpo: share of pairs taken to be the wrong way round
    simpo_gamma: NonNegative = 1.4  # simpo: beta times the lead, in nats per token, that the better answer must have
    nll_weight: NonNegative = 0.0  # adds this much of the better answer's loss per token (RPO, arXiv 2404.19733)
    # conversations mixed in, so that the model does not forget how to chat
    ptx_dir: str = ""              # data of kind sft or text; several folders, with commas between, take turns
    ptx_coef: NonNegative = 0.0    # weight of their loss; 0: none
    ptx_rows: Count = 8            # rows in a step
    # adapters (common/lora.py)
    lora_rank: Whole = 0           # 0: train all weights
    lora_alpha: Positive = 16.0    # what the adapters add is multiplied by alpha / rank
    lora_targets: str = "qkv|out|gate_up|down"  # regex: layers whose name ends with it get adapters
    # batch: a step sees batch_size * grad_accum prompts with all their completions, whatever the number of processes
    batch_size: Count = 16         # prompts in a micro-step
    grad_accum: Count = 1          # micro-steps in a step, all processes together
    # optimizer
    max_steps: Count = 200
    lr: Positive = 5e-6
    min_lr: NonNegative = 5e-7     # at the last step
    warmup_steps: Whole = 0        # 0: a tenth of the run, at most 100
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0   # 0: no clipping
    # every eval_every steps: the same numbers on held-out prompts, a checkpoint
    eval_every: Count = 50
    eval_prompts: Count = 500      # of the validation split, at most
    log_every: Count = 1
    # machine
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matmuls; auto: bf16 where it is fast
    seed: Whole = 1234


# settings that change nothing unless this holds
NEEDS = {
    "label_smoothing": "loss == 'cdpo'",
    "simpo_gamma": "loss == 'simpo'",
    "ptx_dir": "ptx_coef",
    "ptx_rows": "ptx_coef",
    "lora_alpha": "lora_rank",
    "lora_targets": "lora_rank"}


def best_against_each(sizes, device="cpu"):
    """Pairs of rows (chosen, rejected), each (P), and their weights, which sum to 1: every prompt counts the same.

    sizes: completions of each prompt, whose rows follow each other, best first.
    """
    chosen = []
    rejected = []
    weights = []
    first = 0
    for size in sizes:
        # row `first` holds the prompt's best answer, the rows behind it the others
        n_pairs = size - 1
        chosen += [first] * n_pairs
        rejected += range(first + 1, first + size)
        weights += [1 / n_pairs / len(sizes)] * n_pairs
        first += size
    columns = (chosen, rejected, weights)
    return [torch.tensor(column, device=device) for column in columns]


def log1mexp(x):
    """log(1 - exp(x)) of x < 0; where exp(x) rounds to 1 it stays finite, and so does its gradient."""
    x = x.clamp(max=-1e-6)
    return torch.log(-torch.expm1(x))


def preference_loss(chosen, rejected, ref_chosen, ref_rejected, len_chosen, len_rejected, cfg):
    """Return the losses, and the implicit rewards of both answers (without gradient), each (P).

    chosen, rejected: log-probs of the answers, summed over tokens; ref_…: the reference's; len_…: tokens. All (P).
    """
    # log(policy / reference) of each answer; times beta it is the implicit reward (eq. 5)
    chosen_gain = chosen - ref_chosen
    rejected_gain = rejected - ref_rejected
    if cfg.loss not in ("dpo", "cdpo"):
        # the other losses compare log-probs per token; for simpo and orpo, ref_… are zeros: they use no reference
        chosen_gain = chosen_gain / len_chosen
        rejected_gain = rejected_gain / len_rejected
    # every loss wants chosen_gain above rejected_gain; they differ in how far above
    lead = chosen_gain - rejected_gain
    if cfg.loss == "dpo":            # arXiv 2305.18290, eq. 7
        losses = -F.logsigmoid(cfg.beta * lead)
    elif cfg.loss == "cdpo":         # Mitchell 2023, eq. 3
        right = -F.logsigmoid(cfg.beta * lead)
        wrong = -F.logsigmoid(-cfg.beta * lead)
        losses = (1 - cfg.label_smoothing) * right + cfg.label_smoothing * wrong
    elif cfg.loss == "ipo":          # arXiv 2310.12036, eq. 17
        losses = (lead - 1 / (2 * cfg.beta)) ** 2
    elif cfg.loss == "simpo":        # arXiv 2405.14734, eq. 6
        losses = -F.logsigmoid(cfg.beta * lead - cfg.simpo_gamma)
    elif cfg.loss == "orpo":         # arXiv 2403.07691, eq. 6 and 7: odds = p / (1 - p)
        log_odds = lead - log1mexp(chosen_gain) + log1mexp(rejected_gain)
        losses = -chosen_gain - cfg.beta * F.logsigmoid(log_odds)
    # the lead also grows when both answers become less likely, the worse one faster: this term works against it
    losses = losses - cfg.nll_weight * chosen / len_chosen
    return losses, cfg.beta * chosen_gain.detach(), cfg.beta * rejected_gain.detach()


@torch.no_grad()
def reference_logps(reference, batch):
    """Log-probs of all answers under the reference, (R); zeros for losses that need none."""
    if reference is None:
        return torch.zeros(len(batch[0]), device=batch[0].device)
    return answer_logps(reference, reference.head_weight, *batch)[0]


def batch_loss(logps, lengths, ref_logps, sizes, cfg):
    """Return the loss, and what the log says of it, {name: number}, both means over prompts.

    logps, lengths, ref_logps: of all answers, (R); sizes: how many of them each prompt has.
    """
    # an answer has one log-prob, and the best one is in several pairs: chosen and rejected are numbers of answers
    chosen, rejected, weights = best_against_each(sizes, logps.device)             # each (P)
    losses, chosen_reward, rejected_reward = preference_loss(
        logps[chosen],
        logps[rejected],
        ref_logps[chosen],
        ref_logps[rejected],
        lengths[chosen],
        lengths[rejected],
        cfg)
    margin = chosen_reward - rejected_reward
    stats = {
        "loss": losses,
        "accuracy": (margin > 0).float(),         # share of pairs won
        "margin": margin,                         # lead in implicit reward
        "chosen_logp": logps[chosen],             # of whole answers, in nats
        "rejected_logp": logps[rejected]}
    if cfg.loss not in ("simpo", "orpo"):
        stats["chosen_ratio"] = logps[chosen] - ref_logps[chosen]
        stats["rejected_ratio"] = logps[rejected] - ref_logps[rejected]
    return losses @ weights, {name: values.detach() @ weights for name, values in stats.items()}


def add_stats(sums, stats, weight):
    """Add weight * stats to the sums, both {name: number}."""
    for name, value in stats.items():
        sums[name] = sums.get(name, 0.0) + weight * value


@torch.no_grad()
def evaluate(model, reference, split, cfg, pad_id, env):
    """Return the statistics of batch_loss on the first eval_prompts of a split, shared among the processes."""
    n_prompts = min(cfg.eval_prompts, len(split.prompt_bounds()) - 1)
    sums = {}
    for first in batch_starts(n_prompts, cfg.batch_size, env, pad=True):
        prompts = range(min(first, n_prompts - 1), min(first + cfg.batch_size, n_prompts))
        batch, sizes = get_prompts(split, prompts, pad_id, env.device)
        with env.autocast():
            logps, lengths = answer_logps(model, model.head_weight, *batch)        # (R), (R)
            ref_logps = reference_logps(reference, batch)                          # (R)
        _, stats = batch_loss(logps, lengths, ref_logps, sizes, cfg)
        # a process that has no prompts left computes the last one again, with weight 0
        add_stats(sums, stats, max(0, min(cfg.batch_size, n_prompts - first)))
    totals = all_sum(list(sums.values()), env)
    return {f"val_{name}": total / n_prompts for name, total in zip(sums, totals)}


def main(cfg):
    # ------------------------------------------------------------------------ start
    # torchrun starts one process per GPU; each computes its share of a step's micro-steps
    env = start(cfg, cfg.dtype)
    micro = micro_steps(cfg.grad_accum, env)
    cfg.beta = cfg.beta or (2.5 if cfg.loss == "simpo" else 0.1)

    # ------------------------------------------------------------------------ models
    model, tokenizer, base = load_model(cfg.init_from, env.device)
    pad_id = tokenizer.pad_id
    # the reference is a second copy of the same model that never learns: the policy is compared with it
    reference = None
    if cfg.loss not in ("simpo", "orpo"):
        reference = load_model(cfg.init_from, env.device)[0].requires_grad_(False)
    if cfg.lora_rank:
        # freeze all weights, and learn a small change of some of the matrices
        start_lora(model, cfg, base["model"], tokenizer)
    del base
    # net is the model; with several processes its backward pass also averages their gradients
    net = model
    if env.world > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # ------------------------------------------------------------------------ data
    train, val, _ = open_pairs(cfg.data_dir, tokenizer.fingerprint, model.config.max_seq_len)
    n_prompts = len(train.prompt_bounds()) - 1
    if cfg.ptx_coef:
        ptx = open_mixed(cfg.ptx_dir, cfg.ptx_rows, tokenizer, model.config.max_seq_len, env)

    # ------------------------------------------------------------------------ optimizer
    optimizer = make_adamw(model.parameters(), cfg.lr, cfg.weight_decay)

    # ------------------------------------------------------------------------ run folder
    own(cfg, env, cfg.init_from)
    catch_signals(env)
    # where out_dir holds a checkpoint of this run: its weights, its optimizer's state, its step
    step, best_val = restore(find(STAGE, SAME, cfg, env, model, tokenizer), model, [optimizer], env)
    if env.is_main:
        epochs = cfg.max_steps * cfg.grad_accum * cfg.batch_size / n_prompts
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"{n_parameters:,} parameters, {n_prompts:,} prompts with {len(train):,} answers, "
              f"{epochs:.2f} epochs")

    # ------------------------------------------------------------------------ loop
    while step < cfg.max_steps:
        # the learning rate rises first, then falls. It is small: with large steps the policy forgets how to write
        began = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr([optimizer], lr / cfg.lr)

        # conversations mixed in come first: their gradients stay in p.grad, and those of the pairs are added
        if cfg.ptx_coef:
            ptx_loss = learn_mixed(net, model, ptx, step, cfg, pad_id, env)

        # gradients of all micro-steps add up in p.grad; with several processes each computes its share of them
        sums = {}
        for i in micro:
            first = (step * cfg.grad_accum + i) * cfg.batch_size
            # a prompt comes with all its answers
            prompts = shuffled(n_prompts, first, cfg.batch_size, cfg.seed)
            batch, sizes = get_prompts(train, prompts, pad_id, env.device)
            net.require_backward_grad_sync = i == micro[-1]  # processes average gradients in the last one alone
            # forward: log-probs of all answers under policy and reference, then the loss of every pair
            with env.autocast():
                logps, lengths = answer_logps(net, model.head_weight, *batch)      # (R), (R)
                ref_logps = reference_logps(reference, batch)                      # (R)
            loss, stats = batch_loss(logps, lengths, ref_logps, sizes, cfg)
            # backward: a mean over micro-steps; the scaler does something in fp16 only
            env.scaler.scale(loss / len(micro)).backward()
            add_stats(sums, stats, 1 / cfg.grad_accum)
        if cfg.ptx_coef:
            sums["ptx_loss"] = ptx_loss / env.world

        # clip
        env.scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
        check_finite(norm, cfg, env)
        # step, and make room for the next gradients
        env.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        env.scaler.update()
        step += 1

        # means over all processes, and whether one of them was asked to stop: then all must, after this very step
        *totals, stop = all_sum([*sums.values(), len(env.signals)], env)
        record = dict(zip(sums, totals))
        record["lr"] = lr
        record["norm"] = norm
        record["seconds"] = time.perf_counter() - began

        # measure on held-out prompts now and then, and at the end. Watch chosen_logp: if it falls together with the
        # loss, the better answers become less likely, too
        measure = step == cfg.max_steps or step % cfg.eval_every == 0
        if measure and len(val):
            record.update(evaluate(model, reference, val, cfg, pad_id, env))
        if measure or stop or step % cfg.log_every == 0:
            log(cfg, env, step, record)

        # best.pt is the lowest validation loss, ckpt.pt the place from which the same command goes on
        if record.get("val_loss", math.inf) < best_val:
            best_val = record["val_loss"]
            save("best.pt", STAGE, cfg, env, step, model, [optimizer], tokenizer, best_val=best_val)
        if measure or stop:
            save("ckpt.pt", STAGE, cfg, env, step, model, [optimizer], tokenizer, best_val=best_val)
        if stop:
            break
    finish(cfg, env, step, f"Try: python sample.py --chat --out_dir={cfg.out_dir}")


if __name__ == "__main__":
    run(main, Config)
