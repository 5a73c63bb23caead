"""
Pretraining: learn to continue text, from random weights.

    python pretrain.py config/poems.py
    torchrun --standalone --nproc_per_node=4 pretrain.py config/baby.py
    python pretrain.py config/baby.py --estimate=True          # parameters, memory, hours; allocates nothing

in:  data/<name>/ from prepare.py (train.bin, val.bin, meta.json, tokenizer.model)
out: out/<run>/ckpt.pt (the last step; run the same command again to go on), best.pt (lowest validation loss),
     tokenizer.model, log.jsonl
"""
import dataclasses
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from common import (GPU_TFLOPS, all_sum, average_gradients, catch_signals, compile_model, log, lr_at, make_optimizers,
                    micro_steps, no_grad_eval, open_data, optimizer_step, peak_flops, peak_memory, resume,
                    save_checkpoint, set_lr, shuffled, start)
from configurator import load_config
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer


@dataclass
class Config:
    # files
    data_dir: str = "data/poems"
    out_dir: str = "out/pretrain"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # last stretch: in the final anneal_steps, anneal_rows of each micro-step come from anneal_dir (same tokenizer): the
    # texts to know by heart; the other rows keep the model from forgetting the rest
    anneal_dir: str = ""
    anneal_steps: int = 0
    anneal_rows: int = 4           # of the batch_size rows
    # model (the vocabulary comes from the data, rounded up to a multiple of 64)
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 0            # 0: as n_heads
    head_dim: int = 0              # 0: dim / n_heads
    hidden_dim: int = 0            # 0: 8/3 dim
    max_seq_len: int = 512         # tokens the model can ever see at once
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    n_experts: int = 0             # 0: dense
    n_active_experts: int = 2
    n_shared_experts: int = 1
    expert_hidden_dim: int = 0
    first_dense: int = 1
    bias_rate: float = 0.001       # step of the router bias that balances the experts
    # batch: a step sees batch_size * seq_len * grad_accum tokens, whatever the number of processes
    seq_len: int = 0               # tokens in a row; 0: max_seq_len
    batch_size: int = 16           # rows in a micro-step
    grad_accum: int = 1            # micro-steps in a step, all processes together
    # optimizer
    max_steps: int = 1000
    optimizer: str = "adamw"       # adamw | muon
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 50
    schedule: str = "cosine"       # cosine | wsd (flat, then a linear fall over decay_steps)
    decay_steps: int = 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0         # 0: no clipping
    # evaluation and saving
    eval_every: int = 250          # steps; 0: only at the end
    eval_tokens: int = 1_000_000   # of the validation split, at most
    save_every: int = 250          # steps
    log_every: int = 1             # steps
    sample_every: int = 0          # steps; 0: never
    sample_start: str = ""         # text that printed samples begin with
    # machine
    device: str = "auto"
    dtype: str = "auto"            # of products on a CPU: auto (bf16 where that is faster) | float32
    compile: bool = True
    seed: int = 1234
    estimate: bool = False         # print parameters, memory and hours, then leave


def get_batch(splits, cfg, step, micro_step, env):
    """Rows of micro-step (step, micro_step): inputs (B, T) and the tokens that follow them, targets (B, T).

    splits: [(split, rows to take from it), …], B rows in all.
    """
    T, x = cfg.seq_len, []
    for split, count in splits:
        first = (step * cfg.grad_accum + micro_step) * cfg.batch_size
        n_rows = max(1, (len(split.tokens) - 1) // T - 1)
        slack = len(split.tokens) - 1 - n_rows * T
        for i, r in enumerate(shuffled(n_rows, first, count, cfg.seed), first):
            # each epoch cuts the text into rows at other places, so that no text is learned by what stands before it
            start = r * T + np.random.default_rng([cfg.seed, i // n_rows]).integers(slack + 1)
            x.append(split.tokens[start:start + T + 1])
    x = torch.from_numpy(np.stack(x).astype(np.int64))
    if env.device.type == "cuda":
        x = x.pin_memory().to(env.device, non_blocking=True)
    return x[:, :-1].to(env.device), x[:, 1:].to(env.device)


def evaluate(model, split, cfg, env):
    """Return (nats a token, bits a byte) on the first eval_tokens of a split; rows are shared among the processes.

    Bits a byte = sum of nats / ln 2 / UTF-8 bytes: comparable between tokenizers.
    """
    T, n_tokens = cfg.seq_len, min(cfg.eval_tokens, len(split.tokens) - 1)
    starts = range(0, n_tokens, T)
    nats = torch.zeros((), device=env.device)
    with no_grad_eval(model):
        for i in range(env.rank * cfg.batch_size, len(starts), env.world * cfg.batch_size):
            ids = np.zeros((cfg.batch_size, T), dtype=np.int64)  # always whole batches: one shape, compiled once
            targets = np.full((cfg.batch_size, T), -1, dtype=np.int64)
            for row, s in enumerate(starts[i:i + cfg.batch_size]):
                end = min(s + T, n_tokens)
                ids[row, :end - s], targets[row, :end - s] = split.tokens[s:end], split.tokens[s + 1:end + 1]
            ids, targets = torch.from_numpy(ids).to(env.device), torch.from_numpy(targets).to(env.device)
            with env.autocast():
                nats += model(ids, targets, weights=(targets >= 0).float())
    total = all_sum([nats], env)[0]
    n_bytes = split.meta["bytes"] * n_tokens / len(split.tokens)
    return total / n_tokens, total / math.log(2) / n_bytes


def print_sample(model, tokenizer, cfg, env):
    """Print one sampled continuation of sample_start (after the token that begins every document)."""
    model.eval()
    prompt = [tokenizer.eot_id] + tokenizer.encode(cfg.sample_start)
    with env.autocast():
        new = model.generate([prompt], min(100, cfg.max_seq_len - len(prompt)), temperature=0.8, top_p=0.95,
                             stop_ids=[tokenizer.eot_id], seed=cfg.seed)[0]
    print(f"sample: {cfg.sample_start}{tokenizer.decode(new, skip_special=True)}", flush=True)
    model.train()


def estimate(model, cfg, env):
    """Print what a run needs, from the model on the meta device: parameters, FLOPs, memory, hours."""
    total, active = model.count()
    tokens = cfg.max_steps * cfg.grad_accum * cfg.batch_size * cfg.seq_len
    flops = model.flops_per_token(cfg.seq_len)
    c, size = model.config, 2 if env.device.type == "cuda" else 4
    width = 4 * c.dim + (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim * 2 + 3 * c.hidden_dim
    activations = cfg.batch_size * cfg.seq_len * c.n_layers * width * size
    print(f"parameters      {total:,} ({active:,} multiply each token)")
    print(f"tokens          {tokens:,} ({cfg.max_steps:,} steps of {tokens // cfg.max_steps:,})")
    print(f"training        {flops / 1e9:.3f} GFLOPs a token, {flops * tokens:.2e} in all")
    print(f"memory          {16 * total / 2**30:.1f} GiB for weights, gradients and AdamW, "
          f"about {activations / 2**30:.1f} GiB for activations (a process)")
    peaks = {"this device": peak_flops(env)} | {name: 1e12 * GPU_TFLOPS[name] for name in ("4090", "A100", "H100")}
    for name, peak in peaks.items():
        if peak:
            print(f"{name:<15} {flops * tokens / peak / 0.4 / 3600:,.2f} hours at 40% of {peak / 1e12:.1f} TFLOP/s")


def main(cfg):
    # ------------------------------------------------------------------------ start
    env = start(cfg)
    caught = catch_signals()

    # ------------------------------------------------------------------------ data
    train, val, meta = open_data(cfg.data_dir, "text")
    anneal = open_data(cfg.anneal_dir, "text", meta["fingerprint"])[0] if cfg.anneal_steps else None
    tokenizer_file = os.path.join(cfg.data_dir, meta["tokenizer"])
    tokenizer = load_tokenizer(tokenizer_file)
    cfg.seq_len = cfg.seq_len or cfg.max_seq_len
    if cfg.seq_len > cfg.max_seq_len:
        raise SystemExit(f"error: seq_len={cfg.seq_len} is more than the model can see, max_seq_len={cfg.max_seq_len}. "
                         "Lower the first or raise the second")
    if len(val.tokens) < 2:
        raise SystemExit(f"error: {cfg.data_dir} has no text held out for validation. Prepare it again with more text")
    if cfg.anneal_steps and not 0 < cfg.anneal_rows <= cfg.batch_size:
        raise SystemExit(f"error: anneal_rows={cfg.anneal_rows} must be from 1 to batch_size={cfg.batch_size}")
    for folder, split in ((cfg.data_dir, train), (cfg.anneal_dir, anneal)):
        if split is not None and len(split.tokens) <= cfg.seq_len:
            raise SystemExit(f"error: {folder} has {len(split.tokens):,} training tokens, fewer than one row of "
                             f"seq_len={cfg.seq_len}. Add text, or lower --seq_len")

    # ------------------------------------------------------------------------ model
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    config = ModelConfig(vocab_size=-(-meta["vocab_size"] // 64) * 64,
                         **{k: v for k, v in dataclasses.asdict(cfg).items() if k in names})
    if cfg.estimate:
        with torch.device("meta"):
            return estimate(Transformer(config), cfg, env)
    model = Transformer(config).to(env.device)
    compile_model(model, cfg, env)

    # ------------------------------------------------------------------------ optimizer
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    step, best_val, checkpoint = resume(cfg, env, {"model": model}, optimizers, scaler)
    if checkpoint:
        open_data(cfg.data_dir, "text", checkpoint["fingerprint"])  # leaves where the tokenizer is another one now
    micro = micro_steps(cfg.grad_accum, env)
    tokens_a_step = cfg.grad_accum * cfg.batch_size * cfg.seq_len
    flops, peak = model.flops_per_token(cfg.seq_len), peak_flops(env) if env.main else 0
    if env.main:
        print(f"{model.count()[0]:,} parameters, {cfg.max_steps:,} steps of {tokens_a_step:,} tokens = "
              f"{cfg.max_steps * tokens_a_step / max(1, len(train.tokens)):.2f} epochs of {cfg.data_dir}")

    def save(name, **extra):
        save_checkpoint(os.path.join(cfg.out_dir, name), {
            "stage": "pretrain", "step": step, "model": model.state_dict(), "model_config": dataclasses.asdict(config),
            "config": dataclasses.asdict(cfg), "fingerprint": meta["fingerprint"], "best_val": best_val, **extra,
        }, tokenizer_file)

    def save_last():
        if env.main:
            save("ckpt.pt", optimizers=[o.state_dict() for o in optimizers], scaler=scaler.state_dict())

    # ------------------------------------------------------------------------ loop
    model.train()
    seconds = 0.0  # of training alone, since this start
    steps_done = 0
    while step < cfg.max_steps:
        t = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr(optimizers, lr)
        splits = [(train, cfg.batch_size)]
        if step >= cfg.max_steps - cfg.anneal_steps:
            splits = [(anneal, cfg.anneal_rows), (train, cfg.batch_size - cfg.anneal_rows)]
        loss = torch.zeros((), device=env.device)
        for i in micro:
            x, y = get_batch(splits, cfg, step, i, env)
            with env.autocast():
                micro_loss = model(x, y)
            scaler.scale(micro_loss / len(micro)).backward()
            loss += micro_loss.detach() / cfg.grad_accum
        average_gradients(model, env)
        loss, stop = all_sum([loss, float(bool(caught))], env)
        norm = optimizer_step(model, optimizers, scaler, cfg.grad_clip)
        if not math.isfinite(loss + (0 if scaler.is_enabled() else norm)):  # the scaler skips steps of infinite norm
            raise SystemExit(f"error: the loss is {loss} and the gradient's norm {norm} at step {step}. The last good "
                             f"checkpoint is {cfg.out_dir}/ckpt.pt; lower --lr (now {cfg.lr}) or raise --warmup_steps")
        if config.n_experts:
            model.update_router_bias(cfg.bias_rate, dist.all_reduce if env.world > 1 else None)
        step += 1
        dt = time.perf_counter() - t
        seconds, steps_done = seconds + dt, steps_done + 1

        last = step == cfg.max_steps
        record = {"loss": loss, "lr": lr, "norm": norm, "tok/s": tokens_a_step / dt, "seconds": dt,
                  "mfu": flops * tokens_a_step / dt / peak / env.world if peak else 0.0,
                  "left": seconds / steps_done * (cfg.max_steps - step)}
        if last or (cfg.eval_every and step % cfg.eval_every == 0):
            record["val_loss"], record["val_bits_per_byte"] = evaluate(model, val, cfg, env)
            if record["val_loss"] < best_val:
                best_val = record["val_loss"]
                if env.main:
                    save("best.pt")
        if last or stop or step % cfg.log_every == 0 or "val_loss" in record:
            log(cfg, env, step, record)
        if env.main and cfg.sample_every and (last or step % cfg.sample_every == 0):
            print_sample(model, tokenizer, cfg, env)
        if last or stop or step % cfg.save_every == 0:
            save_last()
        if stop:
            if env.main:
                print(f"stopped by {caught[0] if caught else 'another process'} after step {step}; saved. "
                      "The same command goes on from here.")
            break

    if env.main:
        print(f"{cfg.out_dir}/ckpt.pt: step {step}, best validation loss {best_val:.4f}, "
              f"peak memory {peak_memory(env) / 2**30:.2f} GiB. Try: python sample.py --out_dir={cfg.out_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(load_config(Config))
