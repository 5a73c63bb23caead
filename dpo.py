"""
DPO: learn from ranked answers directly, without a reward model and without sampling (arXiv 2305.18290).

    python dpo.py config/poems_dpo.py
    python dpo.py config/poems_dpo.py --lora_rank=8 --lr=3e-4 --out_dir=out/poems-dpo-lora
    torchrun --standalone --nproc_per_node=4 dpo.py config/poems_dpo.py --grad_accum=4

in:  out/<SFT run>/ckpt.pt (policy and reference), data/<name>/ of kind pairs: two or more completions a prompt
out: out/<run>/ckpt.pt (run the same command again to go on), best.pt (lowest validation loss), tokenizer.model,
     reference.pt (log-probs of the answers under the reference, computed once), log.jsonl

Differs from the papers: (1) K ranked answers give K - 1 pairs, the best against each other, so that what is raised is
always a best answer; (2) ipo, too, divides log-probs by the number of tokens, as its authors did in their experiments.
"""
import dataclasses
import hashlib
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import (all_sum, answer_logps, average_gradients, catch_signals, collate, load_model, log, lr_at,
                    make_optimizers, micro_steps, no_grad_eval, open_pairs, optimizer_step, peak_memory, resume,
                    save_checkpoint, set_lr, shuffled, start)
from configurator import load_config
from lora import add_lora, lora_state_dict, weights_hash

# in the log: share of pairs won, lead in implicit reward, log-probs of whole answers (nats), these less the reference's
STATS = ("loss", "accuracy", "margin", "chosen_logp", "rejected_logp", "chosen_ratio", "rejected_ratio")


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-pairs"
    init_from: str = "out/poems-sft"  # a run of sft.py
    out_dir: str = "out/dpo"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # loss
    loss: str = "dpo"              # dpo | cdpo | ipo | simpo | orpo (the last two need no reference)
    beta: float = 0.1              # strength of the pull to the reference (ipo: tau; simpo: scale; orpo: lambda)
    label_smoothing: float = 0.1   # cdpo: share of pairs taken to be the wrong way round
    simpo_gamma: float = 0.5       # simpo: lead asked of the better answer
    nll_weight: float = 0.0        # adds this much of the better answer's loss a token (RPO, arXiv 2404.19733)
    cache_reference: bool = True   # False: a second model in memory computes its log-probs anew each step
    # adapters (lora.py)
    lora_rank: int = 0             # 0: train all weights
    lora_alpha: float = 16.0       # the adapters' product is scaled by alpha / rank
    lora_targets: str = "qkv|out|gate_up|down"  # regex: layers whose name ends so
    # batch: a step sees batch_size * grad_accum prompts with all their completions, whatever the number of processes
    batch_size: int = 16           # prompts in a micro-step
    grad_accum: int = 1            # micro-steps in a step, all processes together
    # optimizer
    max_steps: int = 200
    optimizer: str = "adamw"       # adamw | muon
    lr: float = 5e-6
    min_lr: float = 5e-7
    warmup_steps: int = 20
    schedule: str = "cosine"       # cosine | wsd (flat, then a linear fall over decay_steps)
    decay_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0         # 0: no clipping
    # evaluation and saving
    eval_every: int = 50           # steps; 0: only at the end
    eval_prompts: int = 500        # of the validation split, at most
    save_every: int = 100          # steps
    log_every: int = 1             # steps
    # machine
    device: str = "auto"
    dtype: str = "auto"            # of products on a CPU: auto (bf16 where that is faster) | float32
    seed: int = 1234


def get_batch(split, bounds, prompts, pad_id, env):
    """All completions of some prompts: (ids, targets, mask), each (R, T); documents (R); completions a prompt."""
    rows = [range(bounds[p], bounds[p + 1]) for p in prompts]
    documents = [i for row in rows for i in row]
    return collate([split.document(i) for i in documents], pad_id, env.device), documents, [len(row) for row in rows]


def best_against_each(sizes, device="cpu"):
    """Pairs of rows (chosen, rejected), each (P), and their weights, which sum to 1: every prompt counts the same.

    sizes: completions of each prompt, whose rows follow each other, best first.
    """
    starts = np.cumsum([0] + sizes[:-1]).tolist()
    pairs = [(s, s + k, 1 / (K - 1) / len(sizes)) for s, K in zip(starts, sizes) for k in range(1, K)]
    return [torch.tensor(column, device=device) for column in zip(*pairs)]


def preference_loss(chosen, rejected, ref_chosen, ref_rejected, len_chosen, len_rejected, cfg):
    """Return the losses, and the implicit rewards of both answers (without gradient), each (P).

    chosen, rejected: log-probs of the answers, summed over tokens; ref_…: the reference's; len_…: tokens. All (P).
    """
    beta, chosen_gain, rejected_gain = cfg.beta, chosen - ref_chosen, rejected - ref_rejected
    if cfg.loss not in ("dpo", "cdpo"):  # the others compare log-probs a token; the reference of simpo and orpo is 0
        chosen_gain, rejected_gain = chosen_gain / len_chosen, rejected_gain / len_rejected
    lead = chosen_gain - rejected_gain
    if cfg.loss in ("dpo", "cdpo"):  # arXiv 2305.18290, eq. 7; Mitchell 2023, eq. 3
        flipped = cfg.label_smoothing if cfg.loss == "cdpo" else 0.0
        losses = -(1 - flipped) * F.logsigmoid(beta * lead) - flipped * F.logsigmoid(-beta * lead)
    elif cfg.loss == "ipo":          # arXiv 2310.12036, eq. 17
        losses = (lead - 1 / (2 * beta)) ** 2
    elif cfg.loss == "simpo":        # arXiv 2405.14734, eq. 6
        losses = -F.logsigmoid(beta * lead - cfg.simpo_gamma)
    elif cfg.loss == "orpo":         # arXiv 2403.07691, eq. 6 and 7: odds = p / (1 - p)
        log_odds = lead - torch.log(-torch.expm1(chosen_gain)) + torch.log(-torch.expm1(rejected_gain))
        losses = -chosen_gain - beta * F.logsigmoid(log_odds)
    else:
        raise SystemExit(f"error: loss={cfg.loss!r}, known are dpo, cdpo, ipo, simpo and orpo")
    losses = losses - cfg.nll_weight * chosen / len_chosen
    return losses, beta * chosen_gain.detach(), beta * rejected_gain.detach()


def batch_loss(model, batch, sizes, reference, cfg, env):
    """Return the loss and STATS (7), both means over prompts. reference: the answers' log-probs under it (R)."""
    logps, lengths = answer_logps(model, batch, env)
    c, r, weight = best_against_each(sizes, env.device)
    losses, *rewards = preference_loss(logps[c], logps[r], reference[c], reference[r], lengths[c], lengths[r], cfg)
    ratios, margins = logps - reference, rewards[0] - rewards[1]
    stats = torch.stack([losses, (margins > 0).float(), margins, logps[c], logps[r], ratios[c], ratios[r]]).detach()
    return losses @ weight, stats @ weight


def evaluate(model, split, bounds, reference, cfg, pad_id, env):
    """Return STATS on the first eval_prompts of a split, shared among the processes."""
    n = min(cfg.eval_prompts, len(bounds) - 1)
    sums = torch.zeros(len(STATS), device=env.device)
    with no_grad_eval(model):
        for i in range(env.rank * cfg.batch_size, n, env.world * cfg.batch_size):
            batch, documents, sizes = get_batch(split, bounds, range(i, min(i + cfg.batch_size, n)), pad_id, env)
            sums += batch_loss(model, batch, sizes, reference(split, batch, documents), cfg, env)[1] * len(sizes)
    return [total / n for total in all_sum([*sums], env)]


def all_logps(model, split, cfg, pad_id, env):
    """Return the log-probs of all answers of a split (N), shared among the processes."""
    logps, size = torch.zeros(len(split), device=env.device), 2 * cfg.batch_size
    with no_grad_eval(model):
        for i in range(env.rank * size, len(split), env.world * size):
            documents = range(i, min(i + size, len(split)))
            batch = collate([split.document(j) for j in documents], pad_id, env.device)
            logps[i:i + size] = answer_logps(model, batch, env)[0]
    if env.world > 1:
        dist.all_reduce(logps)
    return logps


def cached_logps(model, splits, cfg, pad_id, env):
    """Return all_logps of each split, from out_dir/reference.pt if that was made by this model from this data."""
    digest = hashlib.sha256(f"{weights_hash(model.state_dict())} {env.dtype}".encode())
    for array in (a for split in splits for a in (split.tokens, split.mask, split.idx)):
        digest.update(array)
    path, key = os.path.join(cfg.out_dir, "reference.pt"), digest.hexdigest()
    cache = torch.load(path, map_location=env.device, weights_only=True) if os.path.exists(path) else {}
    if cache.get("key") == key:
        return cache["logps"]
    logps = [all_logps(model, split, cfg, pad_id, env) for split in splits]
    if env.main:
        save_checkpoint(path, {"key": key, "logps": logps})
    return logps


def main(cfg):
    # ------------------------------------------------------------------------ start
    env = start(cfg)
    caught = catch_signals()

    # ------------------------------------------------------------------------ model
    model, tokenizer, base = load_model(cfg.init_from, env.device)
    config, pad_id = model.config, tokenizer.pad_id

    # ------------------------------------------------------------------------ data
    train, val, bounds, val_bounds, meta = open_pairs(cfg.data_dir, base["fingerprint"], config.max_seq_len)
    n_prompts = len(bounds) - 1

    # ------------------------------------------------------------------------ reference
    free = cfg.loss in ("simpo", "orpo")
    cache = cached_logps(model, (train, val), cfg, pad_id, env) if cfg.cache_reference and not free else None
    frozen = None if cfg.cache_reference or free else load_model(cfg.init_from, env.device)[0].requires_grad_(False)
    names = STATS[:5] if free else STATS

    def reference(split, batch, documents):
        """The reference's log-probs of the answers in a batch (R), documents of a split; 0 for losses without one."""
        if cache:
            return cache[0 if split is train else 1][documents]
        with torch.no_grad():
            return answer_logps(frozen, batch, env)[0] if frozen else torch.zeros(len(documents), device=env.device)

    # ------------------------------------------------------------------------ optimizer
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets,
                 base=os.path.relpath(cfg.init_from, cfg.out_dir), base_hash=weights_hash(base["model"]))
    del base
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    step, best_val, _ = resume(cfg, env, {"model": model}, optimizers, scaler)
    micro = micro_steps(cfg.grad_accum, env)
    if env.main:
        print(f"{model.count()[0]:,} parameters, {n_prompts:,} prompts with {len(train):,} answers, "
              f"{cfg.max_steps * cfg.grad_accum * cfg.batch_size / n_prompts:.2f} epochs")

    def save(name, **extra):
        if not env.main:
            return
        if cfg.lora_rank:
            extra["lora"] = model.lora
        save_checkpoint(os.path.join(cfg.out_dir, name), {
            "stage": "dpo", "step": step, "model": lora_state_dict(model) if cfg.lora_rank else model.state_dict(),
            "model_config": dataclasses.asdict(config), "config": dataclasses.asdict(cfg),
            "fingerprint": meta["fingerprint"], "best_val": best_val, **extra,
        }, os.path.join(cfg.data_dir, meta["tokenizer"]))

    # ------------------------------------------------------------------------ loop
    model.train()
    seconds = 0.0  # of training alone, since this start
    steps_done = 0
    while step < cfg.max_steps:
        t = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr(optimizers, lr)
        sums, tokens = torch.zeros(len(STATS), device=env.device), 0
        for i in micro:
            prompts = shuffled(n_prompts, (step * cfg.grad_accum + i) * cfg.batch_size, cfg.batch_size, cfg.seed)
            batch, documents, sizes = get_batch(train, bounds, prompts, pad_id, env)
            loss, stats = batch_loss(model, batch, sizes, reference(train, batch, documents), cfg, env)
            scaler.scale(loss / len(micro)).backward()
            sums += stats / cfg.grad_accum
            tokens += sum(int(train.idx[d + 1] - train.idx[d]) for d in documents)
        average_gradients(model, env)
        *stats, tokens, stop = all_sum([*sums, tokens, float(bool(caught))], env)
        if not math.isfinite(stats[0]):
            raise SystemExit(f"error: the loss is {stats[0]} at step {step}. The last good checkpoint is "
                             f"{cfg.out_dir}/ckpt.pt; lower --lr (now {cfg.lr}) or raise --warmup_steps")
        norm = optimizer_step(model, optimizers, scaler, cfg.grad_clip)
        step += 1
        dt = time.perf_counter() - t
        seconds, steps_done = seconds + dt, steps_done + 1

        last = step == cfg.max_steps
        record = {**dict(zip(names, stats)), "lr": lr, "norm": norm, "tok/s": tokens / dt,
                  "left": seconds / steps_done * (cfg.max_steps - step)}
        if len(val) and (last or (cfg.eval_every and step % cfg.eval_every == 0)):
            val_stats = evaluate(model, val, val_bounds, reference, cfg, pad_id, env)
            record.update({f"val_{name}": value for name, value in zip(names, val_stats)})
            if record["val_loss"] < best_val:
                best_val = record["val_loss"]
                save("best.pt")
        if last or stop or step % cfg.log_every == 0 or "val_loss" in record:
            log(cfg, env, step, record)
        if last or stop or step % cfg.save_every == 0:
            save("ckpt.pt", optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict())
        if stop:
            if env.main:
                print(f"stopped by {caught[0] if caught else 'another process'} after step {step}; saved. "
                      "The same command goes on from here.")
            break

    if env.main:
        print(f"{cfg.out_dir}/ckpt.pt: step {step}, best validation loss {best_val:.4f}, "
              f"peak memory {peak_memory(env) / 2**30:.2f} GiB. "
              f"Try: python sample.py --chat=True --out_dir={cfg.out_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(load_config(Config))
