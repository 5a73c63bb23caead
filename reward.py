"""
Reward model: learn to score an answer, from answers to one prompt that were ranked.

    python reward.py config/poems_reward.py
    torchrun --standalone --nproc_per_node=4 reward.py config/poems_reward.py --grad_accum=4

in:  out/<SFT run>/ckpt.pt (the trunk starts from it), data/<name>/ of kind pairs: two or more completions a prompt
out: out/<run>/ckpt.pt (a ScalarModel; run the same command again to go on), best.pt (lowest validation loss),
     tokenizer.model, log.jsonl

The score of an answer is the scalar on its last token, the <|im_end|>. The loss is eq. 1 of InstructGPT.
"""
import dataclasses
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import (all_sum, average_gradients, catch_signals, collate, load_model, log, lr_at, make_optimizers,
                    micro_steps, no_grad_eval, open_pairs, optimizer_step, peak_memory, resume, save_checkpoint,
                    score_answers, set_lr, shuffled, start)
from configurator import load_config
from model import ScalarModel


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-pairs"
    init_from: str = "out/poems-sft"  # a run of sft.py (or of pretrain.py)
    out_dir: str = "out/reward"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # loss
    margin: float = 0.0            # lead asked of the better answer, times the ranks between the two (Llama 2, eq. 2)
    centre: float = 0.0            # weight of (chosen + rejected)^2: scores near 0 (arXiv 2312.09244); try 0.01
    # batch: a step sees batch_size * grad_accum prompts with all their completions, whatever the number of processes
    batch_size: int = 16           # prompts in a micro-step
    grad_accum: int = 1            # micro-steps in a step, all processes together
    # optimizer
    max_steps: int = 500
    optimizer: str = "adamw"       # adamw | muon
    lr: float = 3e-5
    min_lr: float = 3e-6
    warmup_steps: int = 20
    schedule: str = "cosine"       # cosine | wsd (flat, then a linear fall over decay_steps)
    decay_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0         # 0: no clipping
    # evaluation and saving
    eval_every: int = 100          # steps; 0: only at the end
    eval_prompts: int = 1000       # of the validation split, at most
    shift_prompts: int = 1000      # training prompts, at most, whose best answers get mean score 0 in what is saved
    save_every: int = 100          # steps
    log_every: int = 1             # steps
    # machine
    device: str = "auto"
    dtype: str = "auto"            # of products on a CPU: auto (bf16 where that is faster) | float32
    seed: int = 1234


def get_batch(split, bounds, prompts, pad_id, env):
    """All completions of some prompts: (ids, targets, mask), each (R, T), and the number of completions of each."""
    rows = [range(bounds[p], bounds[p + 1]) for p in prompts]
    return collate([split.document(i) for row in rows for i in row], pad_id, env.device), [len(row) for row in rows]


def ranked_pairs(sizes, device="cpu"):
    """All pairs within each prompt. sizes: completions of each prompt, whose rows follow each other, best first.

    Return chosen, rejected, prompt, each (P): two rows and their prompt; rejected - chosen is their rank distance.
    """
    starts = np.cumsum([0] + sizes[:-1]).tolist()
    chosen, rejected = torch.cat([torch.triu_indices(K, K, 1) + s for K, s in zip(sizes, starts)], dim=1).to(device)
    pairs = torch.tensor([K * (K - 1) // 2 for K in sizes])
    return chosen, rejected, torch.arange(len(sizes)).repeat_interleave(pairs).to(device)


def ranking_loss(scores, sizes, margin=0.0, centre=0.0):
    """scores (R) -> the loss of each prompt (G): mean over its K(K-1)/2 pairs of -log sigmoid(r_chosen - r_rejected).

    InstructGPT, eq. 1; with K = 2 it is Bradley-Terry. A prompt counts once, however many pairs it makes.
    """
    chosen, rejected, prompt = ranked_pairs(sizes, scores.device)
    ahead = scores[chosen] - scores[rejected] - margin * (rejected - chosen)
    losses = -F.logsigmoid(ahead) + centre * (scores[chosen] + scores[rejected]) ** 2
    losses = losses / prompt.bincount()[prompt]
    return scores.new_zeros(len(sizes)).index_add(0, prompt, losses)


def count_right(scores, sizes, longest):
    """Return (2, 2, longest): [right, all][prompts with two answers, lists][rank distance], numbers of pairs."""
    chosen, rejected, prompt = ranked_pairs(sizes, scores.device)
    right = (scores[chosen] > scores[rejected]).float()
    where = (torch.tensor(sizes, device=scores.device)[prompt] > 2).long(), rejected - chosen
    table = torch.zeros(2, 2, longest, device=scores.device)
    for part, values in zip(table, (right, torch.ones_like(right))):
        part.index_put_(where, values, accumulate=True)
    return table


def accuracies(table):
    """Name what count_right counted: accuracy_pairs; accuracy_lists, and accuracy_lists_1 (neighbours), _2, …"""
    right, pairs = table.double()
    record = {f"accuracy_{name}": (right[i].sum() / pairs[i].sum()).item()
              for i, name in enumerate(("pairs", "lists")) if pairs[i].sum()}
    return record | {f"accuracy_lists_{d}": (right[1, d] / n).item() for d, n in enumerate(pairs[1]) if n}


def evaluate(model, split, bounds, prompts, cfg, pad_id, env):
    """Return (mean loss, mean score of the best answers, accuracies) on some prompts, shared among the processes."""
    longest = int(np.diff(bounds).max())
    sums, table = torch.zeros(2, device=env.device), torch.zeros(2, 2, longest, device=env.device)
    with no_grad_eval(model):
        for i in range(env.rank * cfg.batch_size, len(prompts), env.world * cfg.batch_size):
            batch, sizes = get_batch(split, bounds, prompts[i:i + cfg.batch_size], pad_id, env)
            scores = score_answers(model, batch, env)
            best = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
            sums += torch.stack([ranking_loss(scores, sizes, cfg.margin, cfg.centre).sum(), scores[best].sum()])
            table += count_right(scores, sizes, longest)
    loss, best, *counts = all_sum([*sums, *table.flatten()], env)
    return loss / len(prompts), best / len(prompts), accuracies(torch.tensor(counts).view_as(table))


def main(cfg):
    # ------------------------------------------------------------------------ start
    env = start(cfg)
    caught = catch_signals()

    # ------------------------------------------------------------------------ model
    base, tokenizer, origin = load_model(cfg.init_from)
    config, pad_id = base.config, tokenizer.pad_id
    model = ScalarModel(config)
    model.trunk.load_state_dict({k: v for k, v in base.state_dict().items() if k != "lm_head.weight"}, strict=True)
    model.head.bias.requires_grad_(cfg.centre > 0)  # else the loss sees differences alone, and a bias learns rounding
    model = model.to(env.device)
    del base

    # ------------------------------------------------------------------------ data
    train, val, bounds, val_bounds, meta = open_pairs(cfg.data_dir, origin["fingerprint"], config.max_seq_len)
    n_prompts = len(bounds) - 1
    val_prompts = range(min(cfg.eval_prompts, len(val_bounds) - 1))
    some_prompts = shuffled(n_prompts, 0, min(cfg.shift_prompts, n_prompts), cfg.seed)

    # ------------------------------------------------------------------------ optimizer
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    step, best_val, checkpoint = resume(cfg, env, {"model": model}, optimizers, scaler)
    if checkpoint:  # train on from the bias that training had, not from the shifted one of a finished run
        model.head.bias.data += checkpoint["shift"]
    micro = micro_steps(cfg.grad_accum, env)
    if env.main:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {n_prompts:,} prompts with {len(train):,} "
              f"answers, {cfg.max_steps * cfg.grad_accum * cfg.batch_size / n_prompts:.2f} epochs")

    def save(name, shift, **extra):
        if not env.main:
            return
        state = {**model.state_dict(), "head.bias": model.head.bias.detach() - shift}
        save_checkpoint(os.path.join(cfg.out_dir, name), {
            "stage": "reward", "step": step, "model": state, "model_config": dataclasses.asdict(config), "shift": shift,
            "config": dataclasses.asdict(cfg), "fingerprint": meta["fingerprint"], "best_val": best_val, **extra,
        }, os.path.join(cfg.data_dir, meta["tokenizer"]))

    # ------------------------------------------------------------------------ loop
    model.train()
    seconds = 0.0  # of training alone, since this start
    steps_done = 0
    while step < cfg.max_steps:
        t = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr(optimizers, lr)
        loss, sums = torch.zeros((), device=env.device), torch.zeros(4, device=env.device)
        for i in micro:
            prompts = shuffled(n_prompts, (step * cfg.grad_accum + i) * cfg.batch_size, cfg.batch_size, cfg.seed)
            batch, sizes = get_batch(train, bounds, prompts, pad_id, env)
            scores = score_answers(model, batch, env)
            micro_loss = ranking_loss(scores, sizes, cfg.margin, cfg.centre).mean()
            scaler.scale(micro_loss / len(micro)).backward()
            loss += micro_loss.detach() / cfg.grad_accum
            chosen, rejected, _ = ranked_pairs(sizes, env.device)
            gap = (scores[chosen] - scores[rejected]).detach()
            sums += torch.stack([(gap > 0).sum(), gap.sum(), torch.ones_like(gap).sum(), (batch[0] != pad_id).sum()])
        average_gradients(model, env)
        loss, right, gap, pairs, tokens, stop = all_sum([loss, *sums, float(bool(caught))], env)
        if not math.isfinite(loss):
            raise SystemExit(f"error: the loss is {loss} at step {step}. The last good checkpoint is "
                             f"{cfg.out_dir}/ckpt.pt; lower --lr (now {cfg.lr}) or raise --warmup_steps")
        norm = optimizer_step(model, optimizers, scaler, cfg.grad_clip)
        step += 1
        dt = time.perf_counter() - t
        seconds, steps_done = seconds + dt, steps_done + 1

        last = step == cfg.max_steps
        shift = 0.0
        record = {"loss": loss, "accuracy": right / pairs, "gap": gap / pairs, "lr": lr, "norm": norm,
                  "tok/s": tokens / dt, "left": seconds / steps_done * (cfg.max_steps - step)}
        if val_prompts and (last or (cfg.eval_every and step % cfg.eval_every == 0)):
            record["val_loss"], _, shares = evaluate(model, val, val_bounds, val_prompts, cfg, pad_id, env)
            record.update({f"val_{name}": share for name, share in shares.items()})
        improved = record.get("val_loss", math.inf) < best_val
        if last or improved:
            shift = record["mean_chosen"] = evaluate(model, train, bounds, some_prompts, cfg, pad_id, env)[1]
        if improved:
            best_val = record["val_loss"]
            save("best.pt", shift)
        if last or stop or step % cfg.log_every == 0 or "val_loss" in record:
            log(cfg, env, step, record)
        if last or stop or step % cfg.save_every == 0:
            save("ckpt.pt", shift if last else 0.0, optimizers=[o.state_dict() for o in optimizers],
                 scaler=scaler.state_dict())
        if stop:
            if env.main:
                print(f"stopped by {caught[0] if caught else 'another process'} after step {step}; saved. "
                      "The same command goes on from here.")
            break

    if env.main:
        if steps_done and step == cfg.max_steps:
            print(f"the saved bias is lowered by {shift:.4f}, so that the mean score of the best answers to "
                  f"{len(some_prompts):,} training prompts is 0")
        print(f"{cfg.out_dir}/ckpt.pt: step {step}, best validation loss {best_val:.4f}, "
              f"peak memory {peak_memory(env) / 2**30:.2f} GiB")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(load_config(Config))
