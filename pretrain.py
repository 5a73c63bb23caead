"""
Pretraining: learn to continue text, from random weights.

    python pretrain.py config/poems.py
    torchrun --standalone --nproc_per_node=4 pretrain.py config/baby.py
    python pretrain.py --init_from=out/baby --data_dir=data/law --out_dir=out/baby-law --lr=1e-4    # go on
    python pretrain.py --init_from=out/poems --data_dir=data/poems --out_dir=out/poems-512 --rope_factor=4 --lr=1e-3
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.checkpoint import catch_signals, find, finish, load_checkpoint, log, own, restore, save
from common.data import open_data
from common.distributed import all_sum, can_compile, check_finite, micro_steps, start
from common.loss import cross_entropy, text_loss
from common.optim import lr_at, make_optimizers, set_lr
from common.sharding import shard_model
from configurator import Count, Fraction, NonNegative, Positive, Whole, changed, check, run
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer

STAGE = "pretrain"
# a run can only be resumed with the same values of these, and of batch_size * grad_accum, on the same model
SAME = ("seed", "data_dir", "init_from", "seq_len", "optimizer")


@dataclass
class Config:
    # files
    data_dir: str = "data/poems"
    init_from: str = ""            # a run to go on from with this text; empty: begin with random weights
    out_dir: str = "out/pretrain"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # model (the vocabulary comes from the data, rounded up to a multiple of 64)
    dim: Count = 512
    n_layers: Count = 8
    n_heads: Count = 8
    n_kv_heads: Whole = 0          # 0: as n_heads
    head_dim: Whole = 0            # 0: dim / n_heads
    hidden_dim: Whole = 0          # 0: 8/3 dim
    max_seq_len: Count = 512       # tokens the model can ever see at once
    rope_theta: Positive = 10000.0
    rope_factor: Positive = 1.0    # YaRN: read rows so many times longer than those init_from was trained on
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
    adam_lr: NonNegative = 0.0     # with muon: rate of embeddings, head and norm weights, which AdamW trains; 0: lr
    momentum: Fraction = 0.95      # muon
    warmup_steps: Whole = 0        # 0: a tenth of the run, at most 100
    decay_steps: Whole = 0         # 0: cosine; above 0: flat, then a linear fall in the last decay_steps steps (wsd)
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0   # 0: no clipping
    # every eval_every steps: validation loss, a checkpoint, a sample
    eval_every: Count = 250
    eval_tokens: Count = 1_000_000  # of the validation split, at most
    sample_start: str = ""         # text that printed samples begin with
    log_every: Count = 1
    # machine
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matmuls; auto: bf16 where it is fast
    compile: bool = True
    checkpoint_blocks: bool = False  # compute a block again in the backward pass: a third more time, far less memory
    shard: bool = False            # split the model among the processes (FSDP2), for those that one GPU cannot hold;
                                   # it prints no samples
    seed: Whole = 1234


# settings that change nothing unless this holds
NEEDS = {
    "rope_factor": "init_from",
    "adam_lr": "optimizer == 'muon'",
    "momentum": "optimizer == 'muon'",
    "n_active_experts": "n_experts",
    "n_shared_experts": "n_experts",
    "expert_hidden_dim": "n_experts",
    "first_dense": "n_experts"}


def get_batch(tokens, cfg, step, micro_step, device):
    """Return inputs and targets of a micro-step, (B, T) each: rows that begin anywhere in the text.

    Where they begin depends on (seed, step, micro_step) alone, so a run can go on from any step, and N processes
    together see the rows that one would.
    """
    T = cfg.seq_len
    rng = np.random.default_rng([cfg.seed, step])
    starts = rng.integers(len(tokens) - T, size=(cfg.grad_accum, cfg.batch_size))[micro_step]
    # cut T + 1 tokens, so that every input, also the last one, has a target: the token after it
    rows = np.stack([tokens[i:i + T + 1] for i in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)                                                  # (B, T + 1)
    if device.type == "cuda":
        # from pinned memory, rows are copied while the GPU still computes
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]


def model_config(cfg, vocab_size):
    """Return the ModelConfig that cfg describes."""
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    shape = {name: value for name, value in vars(cfg).items() if name in names}
    # GPUs multiply fastest when sizes are multiples of 64; the ids added at the end never occur in any text
    return ModelConfig(64 * math.ceil(vocab_size / 64), **shape)


def make_model(cfg, tokenizer, env):
    """Return the model to train: of the shape that cfg describes, with random weights; or with cfg.init_from that run's
    model. With cfg.rope_factor that model can read longer rows than before (YaRN)."""
    base = None
    if cfg.init_from:
        base = load_checkpoint(cfg.init_from)
        check(base["stage"] != "reward", f"{cfg.init_from} is a reward model: it scores answers and writes none")
        check(base["fingerprint"] == tokenizer.fingerprint and not base.get("lora"), f"{cfg.init_from} has another "
              f"tokenizer than {cfg.data_dir}, or holds adapters. Prepare the text with --tokenizer={cfg.init_from}; "
              "merge adapters with python -m tools.export --to=merged")
        shape = dict(base["model_config"])
        trained_len = base.get("trained_len") or shape["max_seq_len"]
        if cfg.rope_factor != 1:
            # YaRN: the same weights, but max_seq_len grows
            original_len = shape.get("rope_original_len") or trained_len
            new_len = int(original_len * cfg.rope_factor)
            check(new_len >= trained_len, f"rope_factor={cfg.rope_factor} times {original_len} is {new_len} tokens, "
                  f"fewer than the {trained_len} that {cfg.init_from} was trained on. Raise it")
            shape.update(rope_factor=cfg.rope_factor, rope_original_len=original_len, max_seq_len=new_len)
            if env.is_main:
                print(f"{cfg.init_from} was trained on rows of up to {trained_len} tokens, now sees {new_len}")
        ignored = {key: value for key, value in changed(cfg).items() if shape.get(key, value) != value}
        check(not ignored, f"{ignored} would change nothing: a run that goes on from {cfg.init_from} keeps its shape; "
              "what it sees grows with --rope_factor alone")
        config = ModelConfig(**shape)
    else:
        config = model_config(cfg, tokenizer.vocab_size)
    # on the meta device a model takes no memory: its weights come from a file, or from shard_model()
    without_memory = base or cfg.shard and env.world > 1
    with torch.device("meta" if without_memory else "cpu"):
        model = Transformer(config)
    model.trained_len = 0  # tokens of the longest row it has learned from
    if base:
        model.load_state_dict(base["model"], strict=True, assign=True)
        model.trained_len = trained_len
    return model


@torch.no_grad()
def print_sample(model, tokenizer, cfg, env):
    """Print a continuation of sample_start, made in the plainest way: for every new token all tokens so far go through
    the model. common/generate.py does the same faster, with a cache."""
    ids = tokenizer.encode_start(cfg.sample_start)
    generator = torch.Generator().manual_seed(cfg.seed)
    with env.autocast(), torch.compiler.set_stance("force_eager"):  # no compiling for every new length
        for _ in range(min(100, cfg.seq_len - len(ids))):
            hidden = model(torch.tensor([ids], device=env.device))                 # (1, T, C)
            # what may follow the last token; at a temperature below 1 the likely tokens become likelier
            probs = (model.logits(hidden[0, -1]) / 0.8).softmax(-1)                # (V)
            ids.append(torch.multinomial(probs.cpu(), 1, generator=generator).item())
            if ids[-1] == tokenizer.eot_id:
                break
    print(f"sample: {tokenizer.decode(ids, skip_special=True)}", flush=True)


def main(cfg):
    # ------------------------------------------------------------------------ start
    # torchrun starts one process per GPU, and each runs this same function; rank 0 alone prints and saves
    env = start(cfg, cfg.dtype)
    # a large batch is computed in parts that fit into memory, the micro-steps; each process computes its share of them
    micro = micro_steps(cfg.grad_accum, env)

    # ------------------------------------------------------------------------ data
    train, val, meta = open_data(cfg.data_dir, "text")
    tokenizer = load_tokenizer(cfg.data_dir)
    check(tokenizer.fingerprint == meta["fingerprint"], f"{cfg.data_dir}/tokenizer.model is not the vocabulary that "
          "the tokens beside it were made with. Prepare the folder again")

    # ------------------------------------------------------------------------ model
    model = make_model(cfg, tokenizer, env)
    config = model.config
    cfg.seq_len = cfg.seq_len or config.max_seq_len
    check(cfg.seq_len <= config.max_seq_len, f"seq_len={cfg.seq_len} is more than the model can see, max_seq_len="
          f"{config.max_seq_len}. Lower the first or raise the second")
    check(len(train.tokens) > cfg.seq_len, f"{cfg.data_dir} has {len(train.tokens):,} training tokens, fewer than one "
          f"row of seq_len={cfg.seq_len}. Add text, or lower --seq_len")
    model.trained_len = max(model.trained_len, cfg.seq_len)
    model.checkpoint_blocks = cfg.checkpoint_blocks
    compiled = cfg.compile and can_compile(env)
    if compiled:
        # block by block: one block is compiled once and serves for all
        for block in model.blocks:
            block.compile()
    # net is the model; with several processes its backward pass also averages their gradients
    if cfg.shard and env.world > 1:
        net = shard_model(model, env)
    else:
        net = model.to(env.device)
        if env.world > 1:
            net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # ------------------------------------------------------------------------ optimizer
    optimizers = make_optimizers(model, cfg, env)

    # ------------------------------------------------------------------------ run folder
    own(cfg, env, cfg.init_from)
    catch_signals(env)
    # where out_dir holds a checkpoint of this run: its weights, its optimizers' state, its step
    step, best_val = restore(find(STAGE, SAME, cfg, env, model, tokenizer), model, optimizers, env)
    tokens_a_step = cfg.grad_accum * cfg.batch_size * cfg.seq_len
    if env.is_main:
        epochs = cfg.max_steps * tokens_a_step / len(train.tokens)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"{n_parameters:,} parameters, {cfg.max_steps:,} steps of {tokens_a_step:,} tokens = {epochs:.2f} "
              f"epochs of {cfg.data_dir}")
        if len(val.tokens) < 2:
            print(f"no held-out text: {cfg.data_dir} gives no validation loss, so there will be no best.pt")

    # ------------------------------------------------------------------------ loop
    while step < cfg.max_steps:
        # the learning rate of this step: it rises first, since Adam's averages of few gradients are noisy, then falls
        began = time.perf_counter()
        lr = lr_at(step, cfg, cfg.decay_steps)
        set_lr(optimizers, lr / cfg.lr)

        # gradients of all micro-steps add up in p.grad, as if their rows had been one batch
        loss = torch.zeros((), device=env.device)
        for i in micro:
            x, y = get_batch(train.tokens, cfg, step, i, env.device)               # (B, T), (B, T)
            # forward: hidden states (B, T, C), then the loss: -log p of each next token, averaged
            net.require_backward_grad_sync = i == micro[-1]  # processes average gradients in the last one alone
            with env.autocast():
                micro_loss = cross_entropy(net(x), model.head_weight, y, compiled=compiled)
            # backward: divide by the number of micro-steps, so that the sum of their gradients is a mean. The scaler
            # keeps small fp16 gradients from becoming 0 (it does nothing in bf16 and fp32)
            env.scaler.scale(micro_loss / len(micro)).backward()
            loss += micro_loss.detach() / cfg.grad_accum

        # clip: a gradient longer than grad_clip is made shorter, so that one unusual batch cannot change too much
        for optimizer in optimizers:
            env.scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item()
        check_finite(norm, cfg, env)
        # step, and make room for the next gradients
        for optimizer in optimizers:
            if math.isfinite(norm):
                env.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        env.scaler.update()
        if config.n_experts:
            # a rule instead of a gradient: experts that got few tokens get more from now on; its step falls with lr
            model.update_router_bias(0.01 * lr / cfg.lr, dist.all_reduce if env.world > 1 else None)
        step += 1

        # the mean loss of all processes, and whether one of them was asked to stop: then all must, after this very step
        loss, stop = all_sum([loss, len(env.signals)], env)
        seconds = time.perf_counter() - began
        record = {"loss": loss, "lr": lr, "norm": norm, "tok/s": tokens_a_step / seconds, "seconds": seconds}

        # measure on held-out text now and then, and at the end
        measure = step == cfg.max_steps or step % cfg.eval_every == 0
        if measure and len(val.tokens) > 1:
            # the model reads the training text in every epoch and may memorize it; this text it never learns from
            record["val_loss"], record["val_bits_per_byte"] = text_loss(
                model, val, cfg.seq_len, cfg.batch_size, cfg.eval_tokens, env)
        if measure or stop or step % cfg.log_every == 0:
            log(cfg, env, step, record)

        # save before sampling: if sampling fails, no training is lost
        if record.get("val_loss", math.inf) < best_val:
            best_val = record["val_loss"]
            save("best.pt", STAGE, cfg, env, step, model, optimizers, tokenizer, best_val=best_val)
        if measure or stop:
            save("ckpt.pt", STAGE, cfg, env, step, model, optimizers, tokenizer, best_val=best_val)
        if stop:
            break
        if measure and env.is_main and not cfg.shard:
            print_sample(model, tokenizer, cfg, env)
    finish(cfg, env, step, f"Try: python sample.py --out_dir={cfg.out_dir}")


if __name__ == "__main__":
    run(main, Config)
