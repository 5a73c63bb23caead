"""
How fast is it? Training and generation, side by side with transformers on the same weights.

    python bench.py train                 tokens a second, and their share of the machine's matrix-product rate
    python bench.py generate              new tokens a second at batch 1, 32 and 64, and for prompts of mixed lengths
    python bench.py rollout               answers of a trained model to 64 real prompts, as ppo.py makes them
    python bench.py train --vs=none --dim=1024 --n_layers=12 --n_heads=8 --n_kv_heads=8 --hidden_dim=2752 --seq_len=1024

Both sides take turns in one process (A B A B), so a busy machine slows them alike; each ratio compares neighbours in
time, and the median over all turns is printed with its smallest and largest. The matrix-product rate (a large square
product) takes its turn too. On a GPU products are in bf16 under autocast and memory is the GPU's; on a CPU in fp32.
"""
import dataclasses
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F

from common import compile_model, load_model, open_data, peak_memory, start
from configurator import load_config
from model import ModelConfig, Transformer
from ppo import rollout


@dataclass
class Config:
    what: str = "train"           # train | generate | rollout
    vs: str = "transformers"      # transformers | none
    # model
    vocab_size: int = 6400
    dim: int = 256
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 4
    hidden_dim: int = 768
    # train
    batch_size: int = 16          # rows
    seq_len: int = 256            # tokens
    # generate
    batches: str = "1,32,64"      # rows
    prompt_len: int = 16          # tokens
    new_tokens: int = 128         # a row
    temperature: float = 1.0      # 0: greedy
    # rollout
    run: str = "out/poems-sft"
    data_dir: str = "data/poems-prompts"
    group_size: int = 1           # answers to a prompt
    max_new_tokens: int = 96
    # machine
    repeats: int = 10             # turns each side takes
    warmup: int = 2               # turns before those, not counted
    device: str = "auto"
    compile: bool = True          # our model in training; generation runs uncompiled on both sides
    vs_compile: bool = False      # theirs in training too (as published it runs uncompiled)
    seed: int = 1234


def measure(sides, cfg, env):
    """Let each of {name: function} run in turn; return {name: [seconds, one a turn]}."""
    seconds = {name: [] for name in sides}
    sync = torch.cuda.synchronize if env.device.type == "cuda" else lambda: None
    for turn in range(cfg.warmup + cfg.repeats):
        for name, run in sides.items():
            sync()
            t = time.perf_counter()
            run()
            sync()
            if turn >= cfg.warmup:
                seconds[name].append(time.perf_counter() - t)
    return seconds


def spread(values, digits=0):
    """Return 'median (min – max)' of a list."""
    values = sorted(values)
    return f"{median(values):,.{digits}f} ({values[0]:,.{digits}f} – {values[-1]:,.{digits}f})"


def ratios(a, b):
    return [x / y for x, y in zip(a, b, strict=True)]


def load_transformers(model, cfg):
    """Return a LlamaForCausalLM with the weights of `model`, or None where transformers is missing or not wanted."""
    if cfg.vs not in ("transformers", "none"):
        raise SystemExit(f"error: vs={cfg.vs!r}, known are transformers and none")
    if cfg.vs == "none":
        return None
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("note: transformers is missing, so ours is measured alone (pip install -r requirements-dev.txt)")
        return None
    c = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=True, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=None))
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        qkv = block.attn.qkv.weight.split([c.n_heads * c.head_dim] + 2 * [c.n_kv_heads * c.head_dim])
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
        values = (*qkv, block.attn.out.weight, *block.ffn.gate_up.weight.chunk(2), block.ffn.down.weight,
                  block.attn_norm.weight, block.ffn_norm.weight)
        weights.update({f"model.layers.{i}.{name}.weight": value for name, value in zip(names, values, strict=True)})
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)  # the head is tied
    return theirs.to(model.embed.weight.device)


def train(model, theirs, cfg, env):
    """Print tokens a second of a whole training step: forward, backward, AdamW."""
    rows = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.seq_len + 1), device=env.device)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def stepper(module, loss_of):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

        def step():
            with env.autocast():
                loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()
        return step

    compile_model(model, cfg, env)
    sides = {"mingyue": stepper(model, lambda: model(x, y))}
    if theirs is not None:
        if cfg.vs_compile:
            theirs.compile()
        sides["transformers"] = stepper(theirs, lambda: F.cross_entropy(
            theirs(x, use_cache=False).logits.view(-1, cfg.vocab_size), y.view(-1)))
    for name, run in sides.items():  # compiling included; the loss shows that both compute the same thing
        t = time.perf_counter()
        loss = run()
        print(f"first step of {name:<13} {time.perf_counter() - t:6.1f} s, loss {loss:.5f}", flush=True)

    size = 8192 if env.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=env.device, dtype=env.dtype)
    seconds = measure({"product": lambda: a @ a, **sides}, cfg, env)
    product = [2 * size ** 3 / s for s in seconds.pop("product")]
    n_params, tokens = model.count()[1], cfg.batch_size * cfg.seq_len
    print(f"\n{'':<13} {'tokens/s':<26} {'ours is … × as fast':<26} 6·N·tokens/s, % of matrix-product rate")
    for name, s in seconds.items():
        share = ratios([100 * 6 * n_params * tokens / x for x in s], product)
        print(f"{name:<13} {spread([tokens / x for x in s]):<26} {spread(ratios(s, seconds['mingyue']), 2):<26} "
              f"{spread(share, 1)}")
    print(f"\nmatrix product of {size} x {size}, {str(env.dtype)[6:]}: {spread([p / 1e9 for p in product])} GFLOP/s")


def generate(model, theirs, cfg, env):
    """Print new tokens a second for each batch size; the last batch also with prompts of mixed lengths."""
    model.eval()
    batches = [int(b) for b in cfg.batches.split(",")]
    cases = [(B, str(B), [cfg.prompt_len] * B) for B in batches]
    lengths = torch.randint(1, 2 * cfg.prompt_len, (batches[-1],)).tolist()
    cases.append((batches[-1], f"{batches[-1]}, ragged", lengths))
    print(f"\n{'batch':<13} {'mingyue tokens/s':<26} {'transformers tokens/s':<26} ratio")
    for B, name, lengths in cases:
        prompts = [torch.randint(1, cfg.vocab_size, (n,)).tolist() for n in lengths]
        sides = {"mingyue": lambda: run_ours(model, prompts, cfg, env)}
        if theirs is not None:
            sides["transformers"] = lambda: run_theirs(theirs, prompts, cfg, env)
        seconds = measure(sides, cfg, env)
        rates = {side: spread([B * cfg.new_tokens / x for x in s]) for side, s in seconds.items()}
        ratio = spread(ratios(seconds["transformers"], seconds["mingyue"]), 2) if theirs is not None else ""
        print(f"{name:<13} {rates['mingyue']:<26} {rates.get('transformers', '-'):<26} {ratio}", flush=True)


def rollouts(model, tokenizer, theirs, cfg, env):
    """Print answer tokens a second of ppo.py's rollout, prompts of different lengths and answers that end by themselves,
    beside transformers with the same weights. Answers differ from turn to turn, so rates are compared, not seconds."""
    prompts = open_data(cfg.data_dir, "prompts", tokenizer.fingerprint)[0]
    prompts = [prompts.document(i)[0].tolist() for i in range(int(cfg.batches.split(",")[-1]))]
    stop_ids, pad_id, counts = [tokenizer.im_end_id, tokenizer.eot_id], tokenizer.pad_id, {}

    def ours():
        documents = rollout(model, prompts, stop_ids, pad_id, cfg, len(counts.get("mingyue", [])), env)
        counts.setdefault("mingyue", []).append(sum(sum(mask) for _, mask in documents))

    def others():
        new = run_theirs(theirs, prompts, cfg, env, pad_id, stop_ids)
        counts.setdefault("transformers", []).append((new != pad_id).sum().item())

    sides = {"mingyue": ours} | ({"transformers": others} if theirs is not None else {})
    seconds = measure(sides, cfg, env)
    rates = {side: ratios(counts[side][cfg.warmup:], s) for side, s in seconds.items()}
    for side, values in rates.items():
        print(f"{side:<13} {spread(values)} answer tokens/s, {spread([n / len(prompts) for n in counts[side]], 1)} an answer")
    if theirs is not None:
        print(f"ratio         {spread(ratios(*rates.values()), 2)}")


def run_ours(model, prompts, cfg, env):
    with env.autocast():
        model.generate(prompts, cfg.new_tokens, temperature=cfg.temperature, seed=cfg.seed)


def run_theirs(theirs, prompts, cfg, env, pad_id=0, stop_ids=None):
    """Return the new tokens (B, T); after a stop token, pad_id. Without stop_ids all rows are cfg.new_tokens long."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=env.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=env.device)
    how = {"do_sample": True, "temperature": cfg.temperature, "top_k": 0} if cfg.temperature else {"do_sample": False}
    new_tokens = cfg.max_new_tokens if stop_ids else cfg.new_tokens
    with env.autocast(), torch.inference_mode():
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=pad_id,
                              eos_token_id=stop_ids, **how)
    assert stop_ids or out.shape[1] == longest + new_tokens, f"{out.shape[1] - longest} new tokens, not {new_tokens}"
    return out[:, longest:]


def main(cfg):
    if cfg.what not in ("train", "generate", "rollout"):
        raise SystemExit(f"error: what={cfg.what!r}, known are train, generate and rollout")
    env = start(cfg)
    device = torch.cuda.get_device_name() if env.device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    tokenizer = None
    if cfg.what == "rollout":
        model, tokenizer, _ = load_model(cfg.run, env.device)
    else:
        names = {f.name for f in dataclasses.fields(ModelConfig)}
        model = Transformer(ModelConfig(
            max_seq_len=max(cfg.seq_len, 2 * cfg.prompt_len + cfg.new_tokens),
            **{k: v for k, v in dataclasses.asdict(cfg).items() if k in names})).to(env.device)
    print(f"{cfg.what}: {model.count()[0]:,} parameters, torch {torch.__version__} on {device}")
    theirs = load_transformers(model, cfg)
    if cfg.what == "rollout":
        rollouts(model, tokenizer, theirs, cfg, env)
    else:
        (train if cfg.what == "train" else generate)(model, theirs, cfg, env)
    print(f"peak memory of all this: {peak_memory(env) / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main(load_config(Config, positional="what"))
