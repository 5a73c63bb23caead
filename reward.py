"""
Reward model: learn to score an answer, from answers to one prompt that were ranked.

    python reward.py config/poems_reward.py
    torchrun --standalone --nproc_per_node=4 reward.py config/poems_reward.py --grad_accum=4

in:  out/<SFT run>/ckpt.pt (the trunk starts from it), data/<name>/ of kind pairs: two or more completions a prompt
out: out/<run>/ckpt.pt (a ScalarModel; run the same command again to go on), best.pt (lowest validation loss),
     tokenizer.model, log.jsonl

The score of an answer is the scalar on its last token, the <|im_end|>. The loss is eq. 1 of InstructGPT.
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
from common.loss import score_answers
from common.optim import lr_at, make_adamw, set_lr
from configurator import Count, NonNegative, Positive, Whole, run
from model import ScalarModel

STAGE = "reward"
# a run can only be resumed with the same values of these, and of batch_size * grad_accum, on the same model
SAME = ("seed", "data_dir", "init_from", "centre")


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-pairs"
    init_from: str = "out/poems-sft"  # a run of sft.py (or of pretrain.py)
    out_dir: str = "out/reward"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # adapters (common/lora.py)
    lora_rank: Whole = 0           # 0: train all weights
    lora_alpha: Positive = 16.0    # what the adapters add is multiplied by alpha / rank
    lora_targets: str = "qkv|out|gate_up|down"  # regex: layers whose name ends with it get adapters
    # loss
    centre: NonNegative = 0.001    # weight of (chosen + rejected)^2: keeps scores near 0 (arXiv 2312.09244)
    # batch: a step sees batch_size * grad_accum prompts with all their completions, whatever the number of processes
    batch_size: Count = 16         # prompts in a micro-step
    grad_accum: Count = 1          # micro-steps in a step, all processes together
    # optimizer
    max_steps: Count = 500
    lr: Positive = 3e-5
    min_lr: NonNegative = 3e-6     # at the last step
    warmup_steps: Whole = 0        # 0: a tenth of the run, at most 100
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0   # 0: no clipping
    # every eval_every steps: loss and accuracy on held-out prompts, a checkpoint
    eval_every: Count = 100
    eval_prompts: Count = 1000     # of the validation split, at most
    log_every: Count = 1
    # machine
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matmuls; auto: bf16 where it is fast
    seed: Whole = 1234


# settings that change nothing without another one
NEEDS = {
    "lora_alpha": "lora_rank",
    "lora_targets": "lora_rank"}


def ranked_pairs(sizes, device="cpu"):
    """All pairs within each prompt. sizes: completions of each prompt, whose rows follow each other, best first.

    Return chosen, rejected, prompt, each (P): two rows and their prompt; rejected - chosen is their rank distance.
    """
    chosen = []
    rejected = []
    prompt = []
    first = 0
    for number, size in enumerate(sizes):
        # rows first … first + size - 1 answer this prompt: each against every worse one
        better, worse = torch.triu_indices(size, size, 1) + first
        chosen.append(better)
        rejected.append(worse)
        prompt.append(torch.full_like(better, number))
        first += size
    columns = (chosen, rejected, prompt)
    return [torch.cat(column).to(device) for column in columns]


def ranking_loss(scores, sizes, centre=0.0):
    """scores (R answers) -> loss (G prompts): mean over K(K-1)/2 pairs of -log sigmoid(r_chosen - r_rejected).

    InstructGPT, eq. 1; with K = 2 it is Bradley-Terry. A prompt counts once, however many pairs it makes. Differences
    do not change when all scores grow by one number; centre * (r_chosen + r_rejected)^2 keeps scores near 0.
    """
    # every answer has one score, and is in several pairs: chosen and rejected are numbers of answers
    chosen, rejected, prompt = ranked_pairs(sizes, scores.device)                  # each (P)
    # Bradley-Terry: the chosen one is better with probability sigmoid(difference); make that likely
    losses = -F.logsigmoid(scores[chosen] - scores[rejected])                      # (P)
    losses = losses + centre * (scores[chosen] + scores[rejected]) ** 2
    # a prompt's loss is the mean over its pairs: divide each by how many they are, then add them up
    losses = losses / prompt.bincount()[prompt]
    return scores.new_zeros(len(sizes)).index_add(0, prompt, losses)


def pair_stats(scores, sizes):
    """Return three numbers (3): pairs in the right order, the sum of r_chosen - r_rejected, pairs."""
    chosen, rejected, _ = ranked_pairs(sizes, scores.device)
    lead = (scores[chosen] - scores[rejected]).detach()
    return torch.stack([
        (lead > 0).sum(),
        lead.sum(),
        torch.ones_like(lead).sum()])


@torch.no_grad()
def evaluate(model, split, cfg, pad_id, env):
    """Return (mean loss, share of pairs in the right order) on held-out prompts, shared among the processes."""
    n_prompts = min(cfg.eval_prompts, len(split.prompt_bounds()) - 1)
    loss = torch.zeros((), device=env.device)
    stats = torch.zeros(3, device=env.device)
    for first in batch_starts(n_prompts, cfg.batch_size, env):
        prompts = range(first, min(first + cfg.batch_size, n_prompts))
        batch, sizes = get_prompts(split, prompts, pad_id, env.device)
        with env.autocast():
            scores = score_answers(model, *batch)                                  # (R)
        loss += ranking_loss(scores, sizes, cfg.centre).sum()
        stats += pair_stats(scores, sizes)
    # add up first, divide last: batches hold different numbers of prompts and pairs
    loss, right, _, pairs = all_sum([loss, *stats], env)
    return loss / n_prompts, right / pairs


def main(cfg):
    # ------------------------------------------------------------------------ start
    # torchrun starts one process per GPU; each computes its share of a step's micro-steps
    env = start(cfg, cfg.dtype)
    micro = micro_steps(cfg.grad_accum, env)

    # ------------------------------------------------------------------------ model
    # start from a model that can write answers: keep all of it but the head over the vocabulary, and put a new head
    # with one output in its place
    base, tokenizer, checkpoint = load_model(cfg.init_from)
    model = ScalarModel(base.config)
    weights = base.state_dict()
    weights.pop("lm_head.weight", None)
    model.trunk.load_state_dict(weights, strict=True)
    if cfg.lora_rank:
        # the trunk is frozen and gets adapters; the new head learns as usual
        model.lora = start_lora(model.trunk, cfg, checkpoint["model"], tokenizer).lora
    del base, weights, checkpoint
    # in differences of scores the bias cancels out: without the centre term its gradient would be rounding noise
    model.head.bias.requires_grad_(cfg.centre > 0)
    # net is the model; with several processes its backward pass also averages their gradients
    net = model.to(env.device)
    if env.world > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # ------------------------------------------------------------------------ data
    train, val, _ = open_pairs(cfg.data_dir, tokenizer.fingerprint, model.config.max_seq_len)
    n_prompts = len(train.prompt_bounds()) - 1

    # ------------------------------------------------------------------------ optimizer
    optimizer = make_adamw(model.parameters(), cfg.lr, cfg.weight_decay)

    # ------------------------------------------------------------------------ run folder
    own(cfg, env, cfg.init_from)
    catch_signals(env)
    # where out_dir holds a checkpoint of this run: its weights, its optimizer's state, its step
    step, best_val = restore(find(STAGE, SAME, cfg, env, model, tokenizer), model, [optimizer], env)
    if env.is_main:
        epochs = cfg.max_steps * cfg.grad_accum * cfg.batch_size / n_prompts
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {n_prompts:,} prompts with {len(train):,} "
              f"answers, {epochs:.2f} epochs")

    # ------------------------------------------------------------------------ loop
    while step < cfg.max_steps:
        # the learning rate of this step: it rises first (warmup), then falls
        began = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr([optimizer], lr / cfg.lr)

        # gradients of all micro-steps add up in p.grad; with several processes each computes its share of them
        loss = torch.zeros((), device=env.device)
        stats = torch.zeros(3, device=env.device)
        for i in micro:
            first = (step * cfg.grad_accum + i) * cfg.batch_size
            # a prompt comes with all its answers: they are compared with each other, never with those to another
            prompts = shuffled(n_prompts, first, cfg.batch_size, cfg.seed)
            batch, sizes = get_prompts(train, prompts, tokenizer.pad_id, env.device)
            net.require_backward_grad_sync = i == micro[-1]  # processes average gradients in the last one alone
            # forward: score every answer alone, then compare those to one prompt
            with env.autocast():
                scores = score_answers(net, *batch)                                # (R), the answers of all prompts
            micro_loss = ranking_loss(scores, sizes, cfg.centre).mean()
            # backward: a mean over micro-steps; the scaler does something in fp16 only
            env.scaler.scale(micro_loss / len(micro)).backward()
            loss += micro_loss.detach() / cfg.grad_accum
            stats += pair_stats(scores, sizes)

        # clip
        env.scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
        check_finite(norm, cfg, env)
        # step, and make room for the next gradients
        env.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        env.scaler.update()
        step += 1

        # sums over all processes, and whether one of them was asked to stop
        loss, right, lead, pairs, stop = all_sum([loss, *stats, len(env.signals)], env)
        record = {
            "loss": loss,
            "accuracy": right / pairs,
            "lead": lead / pairs,
            "lr": lr,
            "norm": norm,
            "seconds": time.perf_counter() - began}

        # measure on held-out prompts now and then, and at the end
        measure = step == cfg.max_steps or step % cfg.eval_every == 0
        if measure and len(val):
            # there are few ranked answers, soon memorized: if val_loss rises again, let PPO score with best.pt
            record["val_loss"], record["val_accuracy"] = evaluate(model, val, cfg, tokenizer.pad_id, env)
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
    finish(cfg, env, step)


if __name__ == "__main__":
    run(main, Config)
