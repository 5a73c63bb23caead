"""
Pretraining: learn to continue text, from random weights.

    python pretrain.py config/poems.py
    torchrun --standalone --nproc_per_node=4 pretrain.py config/baby.py
    python -m tools.estimate config/baby.py                    # what it takes: parameters, memory, hours

in:  data/<name>/ from prepare.py (train.bin, val.bin, meta.json, tokenizer.model)
out: out/<run>/ckpt.pt (the last step; run the same command again to go on), best.pt (lowest validation loss),
     tokenizer.model, log.jsonl
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Literal

# first, as it says how to install what is missing
from configurator import Count, Fraction, NonNegative, Positive, Share, Whole, check, run

import numpy as np
import torch
import torch.distributed as dist

from common import (
    all_sum, compile_blocks, finish,
    log, lr_at, make_optimizers, micro_steps,
    no_grad_eval, optimizer_step, parallel, peak_flops,
    resume, save, set_lr, start)
from data import open_data, shuffled
from generate import generate
from loss import cross_entropy, text_loss
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
    anneal_steps: Whole = 0
    anneal_rows: Count = 4         # of the batch_size rows
    # model (the vocabulary comes from the data, rounded up to a multiple of 64)
    depth: Whole = 0               # one dial: layers, from which width, steps, batch and rates follow if not given
    dim: Count = 512
    n_layers: Count = 8
    n_heads: Count = 8
    n_kv_heads: Whole = 0          # 0: as n_heads
    head_dim: Whole = 0            # 0: dim / n_heads
    hidden_dim: Whole = 0          # 0: 8/3 dim
    max_seq_len: Count = 512       # tokens the model can ever see at once
    rope_theta: Positive = 10000.0
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    n_experts: Whole = 0           # 0: dense
    n_active_experts: Count = 2
    n_shared_experts: Whole = 1
    expert_hidden_dim: Whole = 0
    first_dense: Whole = 1
    # batch: a step sees batch_size * seq_len * grad_accum tokens, whatever the number of processes
    seq_len: Whole = 0             # tokens in a row; 0: max_seq_len
    batch_size: Count = 16         # rows in a micro-step
    grad_accum: Count = 1          # micro-steps in a step, all processes together
    # optimizer
    max_steps: Count = 1000
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    min_lr: NonNegative = 1e-4     # at the last step
    adam_lr: NonNegative = 0.0     # muon: of embeddings, head and gains, which stay with AdamW; 0: lr
    momentum: Fraction = 0.95      # muon
    warmup_steps: Whole = 50
    decay_steps: Whole = 0         # 0: cosine; else flat, then a linear fall over so many last steps (wsd)
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0   # 0: no clipping
    # every eval_every steps: validation loss, a checkpoint, a sample
    eval_every: Count = 250
    eval_tokens: Count = 1_000_000  # of the validation split, at most
    sample_start: str = ""         # text that printed samples begin with
    log_every: Count = 1
    # machine
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of products; auto: bf16 where it is fast
    compile: bool = True
    checkpoint_blocks: bool = False  # compute a block again in the backward pass: a third more time, far less memory
    shard: bool = False            # split the model among the processes (FSDP2), for those that one GPU cannot hold;
                                   # it prints no samples
    seed: Whole = 1234


def get_batch(split, n_rows, cfg, step, micro_step, env):
    """Return the first n_rows rows of a micro-step: inputs (n_rows, T) and the tokens that follow them."""
    # the text is one long line, cut every T tokens; one row less than there is room for, so that the cuts can move
    T = cfg.seq_len
    n_targets = len(split.tokens) - 1
    rows_in_epoch = max(1, n_targets // T - 1)
    slack = n_targets - rows_in_epoch * T
    # all rows of a run are numbered through, so (step, micro_step) says which ones these are, whoever asks
    first = (step * cfg.grad_accum + micro_step) * cfg.batch_size
    entries = shuffled(rows_in_epoch, first, n_rows, cfg.seed)
    rows = []
    for number, row in enumerate(entries, first):
        # each epoch cuts the text into rows at other places, so that no text is learned by what stands before it
        epoch = number // rows_in_epoch
        shift = np.random.default_rng([cfg.seed, epoch]).integers(slack + 1)
        begin = row * T + shift
        # a token more than a row has: every input, the last one too, is followed by its target
        rows.append(split.tokens[begin:begin + T + 1])
    rows = np.stack(rows).astype(np.int64)
    rows = torch.from_numpy(rows)                                                  # (n_rows, T + 1)
    if env.device.type == "cuda":
        # from pinned memory, rows travel while the GPU still computes
        rows = rows.pin_memory().to(env.device, non_blocking=True)
    rows = rows.to(env.device)
    return rows[:, :-1], rows[:, 1:]


def turn_dial(cfg):
    """Let the settings that were not given follow from cfg.depth: 64 channels a layer, in heads of 64; 20 tokens a
    parameter (Hoffmann et al. 2022, "Chinchilla"); batch and learning rate from the compute, by the power laws that
    DeepSeek LLM fitted to many small runs (arXiv 2401.02954, sec. 3.1)."""

    def choose(name, value):
        if name not in cfg.given:
            setattr(cfg, name, value)

    choose("n_layers", cfg.depth)
    choose("dim", 64 * cfg.depth)
    choose("n_heads", cfg.depth)
    # a block has 4 dim^2 in attention and 8 dim^2 in SwiGLU; embeddings do not count in these laws
    parameters = 12 * cfg.n_layers * cfg.dim ** 2
    tokens = 20 * parameters
    compute = 6 * parameters * tokens
    choose("lr", 0.3118 * compute ** -0.125)
    choose("min_lr", cfg.lr / 10)
    # a power of two of micro-steps, so that 2, 4 or 8 GPUs can share them
    micro_tokens = cfg.batch_size * (cfg.seq_len or cfg.max_seq_len)
    n_micro = max(1, 0.292 * compute ** 0.3271 / micro_tokens)
    choose("grad_accum", 2 ** round(math.log2(n_micro)))
    choose("max_steps", math.ceil(tokens / (cfg.grad_accum * micro_tokens)))


def model_config(cfg, vocab_size):
    """Return the ModelConfig that cfg describes."""
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    shape = {name: value for name, value in vars(cfg).items() if name in names}
    # GPUs multiply fastest in multiples of 64: a few tokens at the end never occur, and the model learns that first
    return ModelConfig(64 * math.ceil(vocab_size / 64), **shape)


def print_sample(model, tokenizer, cfg, env):
    """Print one sampled continuation of sample_start (after the token that begins every document)."""
    prompt = [tokenizer.eot_id] + tokenizer.encode(cfg.sample_start)
    prompt = prompt[:cfg.max_seq_len // 2]
    room = min(100, cfg.max_seq_len - len(prompt))
    with no_grad_eval(model), env.autocast():
        new = generate(
            model,
            [prompt],
            room,
            temperature=0.8,
            top_p=0.95,
            stop_ids=[tokenizer.eot_id],
            seed=cfg.seed)
    print(f"sample: {cfg.sample_start}{tokenizer.decode(new[0], skip_special=True)}", flush=True)


def main(cfg):
    # ------------------------------------------------------------------------ start
    # torchrun starts a process a GPU, and each runs this same function; rank 0 alone prints and saves
    env = start(cfg)
    if cfg.depth:
        turn_dial(cfg)
    # a large batch is worked off in micro-steps that fit into memory, and each process does its share of them
    micro = micro_steps(cfg.grad_accum, env)

    # ------------------------------------------------------------------------ data
    train, val, meta = open_data(cfg.data_dir, "text")
    tokenizer = load_tokenizer(cfg.data_dir)
    check(tokenizer.fingerprint == meta["fingerprint"], f"{cfg.data_dir}/tokenizer.model is not the vocabulary that "
          "its tokens were made with. Prepare the folder again")
    # a second text for the last steps, where there is one
    by_heart = train
    if cfg.anneal_steps:
        by_heart = open_data(cfg.anneal_dir, "text", meta["fingerprint"])[0]
        check(cfg.anneal_rows <= cfg.batch_size, f"anneal_rows={cfg.anneal_rows} exceeds batch_size={cfg.batch_size}")
    cfg.seq_len = cfg.seq_len or cfg.max_seq_len
    check(cfg.seq_len <= cfg.max_seq_len, f"seq_len={cfg.seq_len} is more than the model can see, max_seq_len="
          f"{cfg.max_seq_len}. Lower the first or raise the second")
    shortest = min(len(train.tokens), len(by_heart.tokens))
    check(shortest > cfg.seq_len, f"{cfg.data_dir} or {cfg.anneal_dir or 'it'} has {shortest:,} training tokens, fewer "
          f"than one row of seq_len={cfg.seq_len}. Add text, or lower --seq_len")

    # ------------------------------------------------------------------------ model
    config = model_config(cfg, meta["vocab_size"])
    model = Transformer(config)
    model.checkpoint_blocks = cfg.checkpoint_blocks
    compile_blocks(model, cfg, env)
    net = parallel(model, env, cfg.shard)  # model, plus the exchange of gradients between processes

    # ------------------------------------------------------------------------ optimizer
    optimizers = make_optimizers(model, cfg)
    # where out_dir holds a checkpoint of this run: its weights, its optimizers' state, its step
    step, best_val, _ = resume(cfg, env, model, optimizers, tokenizer)
    tokens_a_step = cfg.grad_accum * cfg.batch_size * cfg.seq_len
    flops_a_step = tokens_a_step * model.flops_per_token(cfg.seq_len)
    peak = env.world * peak_flops(env)
    if env.main:
        epochs = cfg.max_steps * tokens_a_step / len(train.tokens)
        print(f"{model.count()[0]:,} parameters, {cfg.max_steps:,} steps of {tokens_a_step:,} tokens = {epochs:.2f} "
              f"epochs of {cfg.data_dir}")
        if len(val.tokens) < 2:
            print(f"no held-out text: {cfg.data_dir} gives no validation loss, so there will be no best.pt")

    # ------------------------------------------------------------------------ loop
    model.train()
    while step < cfg.max_steps:
        # warm up slowly, since Adam's averages of the first few gradients are mostly noise; then come down
        began = time.perf_counter()
        lr = lr_at(step, cfg)
        set_lr(optimizers, lr / cfg.lr)

        # gradients of all micro-steps add up in p.grad, as if their rows had been one batch
        loss = torch.zeros((), device=env.device)
        for i in micro:
            x, y = get_batch(train, cfg.batch_size, cfg, step, i, env)             # (B, T), (B, T)
            if step >= cfg.max_steps - cfg.anneal_steps:
                # the last stretch: some rows are replaced by texts to know by heart
                n = cfg.anneal_rows
                heart_x, heart_y = get_batch(by_heart, n, cfg, step, i, env)
                x = torch.cat([heart_x, x[n:]])
                y = torch.cat([heart_y, y[n:]])
            # forward: hidden states, then how surprised the model is by each next token
            net.require_backward_grad_sync = i == micro[-1]  # processes exchange gradients in the last backward pass
            with env.autocast():
                micro_loss = cross_entropy(net(x), model.head_weight, y, compiled=cfg.compile)
            # backward: the step's gradient is the mean over all its micro-steps, here over those of this process. The
            # scaler keeps small fp16 gradients from vanishing (it does nothing in bf16 and fp32)
            env.scaler.scale(micro_loss / len(micro)).backward()
            loss += micro_loss.detach() / cfg.grad_accum

        # the mean loss of all processes, and whether one of them was asked to stop: then all must, after this very step
        loss, stop = all_sum([loss, len(env.signals)], env)
        # clip, step, and make place for the next gradients
        norm = optimizer_step(model, optimizers, cfg, env)
        if config.n_experts:
            # no gradient, a rule: experts that got few tokens are asked more; the steps shrink with the learning rate
            model.update_router_bias(0.01 * lr / cfg.lr, dist.all_reduce if env.world > 1 else None)
        step += 1
        seconds = time.perf_counter() - began

        # measure on held-out text now and then, and at the end
        record = {
            "loss": loss,
            "lr": lr,
            "norm": norm,
            "tok/s": tokens_a_step / seconds,
            "seconds": seconds}
        if peak:
            # model FLOPs utilisation: of what the GPUs could do at most, the share that went into the model
            record["mfu"] = flops_a_step / seconds / peak
        last = step == cfg.max_steps
        measure = last or step % cfg.eval_every == 0
        if measure and len(val.tokens) > 1:
            # training text comes again each epoch, until it is known by heart; from this text nothing is ever learned
            record["val_loss"], record["val_bits_per_byte"] = text_loss(
                model,
                val,
                cfg.seq_len,
                cfg.batch_size,
                cfg.eval_tokens,
                env)
        if measure or stop or step % cfg.log_every == 0:
            log(cfg, env, step, record)

        # save first, look at samples afterwards: what is only looked at must not cost the run
        if record.get("val_loss", math.inf) < best_val:
            best_val = record["val_loss"]
            save("best.pt", cfg, env, step, model, optimizers, tokenizer, best_val=best_val)
        if measure or stop:
            save("ckpt.pt", cfg, env, step, model, optimizers, tokenizer, best_val=best_val)
        if stop:
            break
        if measure and env.main and not cfg.shard:
            print_sample(model, tokenizer, cfg, env)
    finish(cfg, env, step, f"Try: python sample.py --out_dir={cfg.out_dir}")


if __name__ == "__main__":
    run(main, Config)
