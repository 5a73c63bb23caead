"""
What a run of pretrain.py takes: parameters, FLOPs, memory of a process, hours. With its settings, and at once.

    python -m tools.estimate config/baby.py
    python -m tools.estimate config/llama13b.py --batch_size=2

in: data/<name>/ for the size of the vocabulary. Nothing is written.
"""
import torch

from tools.machine import GPU_TFLOPS, count, flops_per_token
from common.distributed import start
from configurator import run
from common.data import open_data
from common.loss import chunk_size
from model import Transformer
from pretrain import Config, model_config


def main(cfg):
    env = start(cfg, cfg.dtype)
    cfg.seq_len = cfg.seq_len or cfg.max_seq_len
    _, _, meta = open_data(cfg.data_dir, "text")
    # tensors on the meta device have a shape and no memory
    with torch.device("meta"):
        model = Transformer(model_config(cfg, meta["vocab_size"]))
    total, active = count(model)
    c = model.config
    tokens = cfg.max_steps * cfg.grad_accum * cfg.batch_size * cfg.seq_len
    flops = flops_per_token(model, cfg.seq_len)
    # weights, gradients and two averages in fp32; Muon has one average, and copies of the matrices while it steps
    state = 16 * total
    # what the backward pass needs of a token in a block: inputs of its products, q, k, v before and after they are
    # turned, and the parts of SwiGLU. Compiled, some of it is computed again
    size = 4 if env.dtype == torch.float32 else 2
    attention = 3 * (c.n_heads + c.n_kv_heads) * c.head_dim
    width = 6 * c.dim + attention + 4 * c.hidden_dim
    logit = 16  # bytes: some of logits, log-probs and their gradient stand side by side
    if cfg.compile:
        width -= 2 * c.dim + c.hidden_dim
        logit = 10
    rows = cfg.batch_size * cfg.seq_len
    block = rows * width * size
    kept = c.n_layers * block
    if cfg.checkpoint_blocks:
        kept = block + c.n_layers * rows * c.dim * 4
    # the block at work has as much again; the loss has a chunk's logits, and the head's gradient in three parts
    activations = kept + block
    chunk = min(rows, chunk_size(c.vocab_size, env.device))
    loss = c.vocab_size * (logit * chunk + 12 * c.dim)
    rest = activations + loss
    if cfg.optimizer == "muon":
        rest = max(rest, 16 * total)
    if env.device.type == "cpu":
        # measured: memory that is free again is not always fit for use, and Python and torch take 0.3 GiB themselves
        rest = 1.1 * (rest + block) + 0.3 * 2**30
    # in shards (FSDP2) embedding and head are whole, and so are two blocks: at work, and on their way
    ends = total - sum(p.numel() for p in model.blocks.parameters())
    gathered = 8 * ends + 16 * (total - ends) / c.n_layers
    print(f"parameters      {total:,} ({active:,} multiply each token)")
    print(f"tokens          {tokens:,} ({cfg.max_steps:,} steps of {tokens // cfg.max_steps:,})")
    print(f"training        {flops / 1e9:.3f} GFLOPs a token, {flops * tokens:.2e} in all")
    print(f"memory          {(state + rest) / 2**30:.2f} GiB a process: {state / 2**30:.1f} GiB for weights, gradients "
          f"and optimizer, {activations / 2**30:.1f} for activations, {loss / 2**30:.1f} for the loss")
    for n in (8, 64):
        print(f"--shard=True    {(state / n + gathered + rest) / 2**30:.1f} GiB a process on {n} GPUs")
    # well fed, a GPU reaches about 40% of what its data sheet says
    for name in ("4090", "A100", "H100"):
        peak = 1e12 * GPU_TFLOPS[name]
        print(f"{name:<15} {flops * tokens / peak / 0.4 / 3600:,.1f} hours at 40% of {peak / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    run(main, Config)
