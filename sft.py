"""
Supervised fine-tuning: learn to answer, by continuing text in which only the assistant's words count.

    python sft.py config/poems_sft.py
    python sft.py config/poems_sft.py --lora_rank=8 --lr=1e-3 --out_dir=out/poems-lora
    torchrun --standalone --nproc_per_node=4 sft.py config/poems_sft.py --grad_accum=4

in:  data/<name>/ from prepare.py --kind=sft (train/val .bin .mask .idx, meta.json); a run to start from, out/<base>/
out: out/<run>/ckpt.pt (the last step; run the same command again to go on), best.pt (lowest validation loss),
     tokenizer.model, log.jsonl. With --lora_rank the weights are adapters alone, to be loaded over out/<base>/

Conversations are packed into rows; each sees only itself, counts positions from its own start and is shifted by itself,
so a row costs what its conversations cost one by one. The loss is the mean over all learned tokens of a step, however
it is split into micro-steps and processes.
"""
import bisect
import dataclasses
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import (all_sum, average_gradients, catch_signals, compile_model, load_model, log, lr_at, make_optimizers,
                    micro_steps, no_grad_eval, open_data, optimizer_step, peak_flops, peak_memory, resume,
                    save_checkpoint, set_lr, start)
from configurator import load_config
from lora import add_lora, lora_state_dict, weights_hash
from model import chunk_size
from tokenizer import render_chat


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-sft"
    init_from: str = "out/poems"   # run folder or checkpoint file whose weights and tokenizer we start from
    out_dir: str = "out/sft"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # adapters (lora.py)
    lora_rank: int = 0             # 0: train all weights
    lora_alpha: float = 16.0       # the adapters' product is scaled by alpha / rank
    lora_targets: str = "qkv|out|gate_up|down"  # regex: layers whose name ends so
    # batch: a step sees batch_size * grad_accum rows, whatever the number of processes
    seq_len: int = 0               # tokens in a row; 0: all the model can see
    packing: bool = True           # several conversations a row; False: one, the rest is padding
    batch_size: int = 16           # rows in a micro-step
    grad_accum: int = 1            # micro-steps in a step, all processes together
    # optimizer
    epochs: float = 2.0            # passes over the data
    max_steps: int = 0             # 0: as many as the epochs take
    optimizer: str = "adamw"       # adamw | muon
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 20
    schedule: str = "cosine"       # cosine | wsd (flat, then a linear fall over decay_steps)
    decay_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0         # 0: no clipping
    neftune_alpha: float = 0.0     # noise on the embeddings (arXiv 2310.05914: 5, 10 or 15); 0: none
    bias_rate: float = 0.001       # step of the router bias that balances experts (full tuning of MoE)
    # evaluation and saving
    eval_every: int = 100          # steps; 0: only at the end
    eval_rows: int = 500           # packed rows of the validation split, at most
    save_every: int = 100          # steps
    log_every: int = 1             # steps
    sample_every: int = 100        # steps; 0: never
    questions: str = "你是谁？|写一首五言绝句，题目是《春夜》。|“守株待兔”是什么意思？"  # to answer, split at |
    answer_tokens: int = 64        # longest answer to them
    # machine
    device: str = "auto"
    dtype: str = "auto"            # of products on a CPU: auto (bf16 where that is faster) | float32
    compile: bool = True
    seed: int = 1234


def pack(lengths, cfg, *seed):
    """Share conversations out to rows of seq_len tokens, in an order drawn from seed; return lists of numbers.

    Each goes to the row with the least room that still holds it (best fit), else to a new row; those longer than a row
    are left out. In every 64 of the order the longest come first: sorting all would fill rows with one kind.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero((lengths > 0) & (lengths <= cfg.seq_len)))
    order = order[np.lexsort((-lengths[order], np.arange(len(order)) // 64))]
    rows, rooms = [], []  # rooms: (tokens left, row), sorted
    for i in order.tolist():
        k = bisect.bisect_left(rooms, (lengths[i],)) if cfg.packing else len(rooms)
        if k == len(rooms):
            rooms.append((cfg.seq_len, len(rows)))
            rows.append([])
        room, row = rooms.pop(k)
        rows[row].append(i)
        bisect.insort(rooms, (room - lengths[i], row))
        del rooms[:-1000]  # the fullest: what they still could take, another row can
    return [rows[r] for r in rng.permutation(len(rows))]  # early rows are the fullest


def get_batch(split, rows, cfg, pad_id, env):
    """Rows of conversations -> inputs, targets, mask (1 where the target is learned), docs, each (B, T).

    Every conversation is shifted inside itself, so its last token predicts nothing. docs numbers the conversations of a
    row from 1; what remains of the row is padding, document 0.
    """
    B, T = len(rows), cfg.seq_len
    ids, targets = np.full((B, T), pad_id, dtype=np.int64), np.full((B, T), pad_id, dtype=np.int64)
    mask, docs = np.zeros((B, T), dtype=np.float32), np.zeros((B, T), dtype=np.int64)
    for b, row in enumerate(rows):
        end = 0
        for number, i in enumerate(row, 1):
            tokens, learned = split.document(i)
            place = slice(end, end := end + len(tokens) - 1)
            ids[b, place], targets[b, place] = tokens[:-1], tokens[1:]
            mask[b, place], docs[b, place] = learned[1:], number
    return tuple(torch.from_numpy(a).to(env.device) for a in (ids, targets, mask, docs))


def neftune_noise(docs, dim, alpha, *seed):
    """Uniform noise in ±alpha / sqrt(L C) for embeddings (B, T, C); L: tokens of the own conversation (alg. 1)."""
    g = torch.Generator(docs.device).manual_seed(int(np.random.default_rng(seed).integers(2 ** 62)))
    lengths = (docs[:, :, None] == docs[:, None, :]).sum(-1, keepdim=True)        # (B, T, 1)
    return (torch.rand(*docs.shape, dim, generator=g, device=docs.device) * 2 - 1) * alpha / (lengths * dim).sqrt()


def answer_scores(model, ids, targets, mask, docs):
    """Over the learned targets, return the sum of nats, how many are the likeliest token, and how many there are."""
    x, targets = model.hidden(ids, docs)[mask > 0], targets[mask > 0]              # (N, C), (N)
    nats, right = x.new_zeros((), dtype=torch.float32), 0
    for i in range(0, len(x), chunk_size(model.config.vocab_size)):
        part = slice(i, i + chunk_size(model.config.vocab_size))
        logits = F.linear(x[part], model.head_weight).float()                      # (chunk, V)
        nats += F.cross_entropy(logits, targets[part], reduction="sum")
        right += (logits.argmax(-1) == targets[part]).sum()
    return nats, right, len(x)


def evaluate(model, split, rows, cfg, pad_id, env):
    """Return (nats a learned token, share of them that greedy decoding would get right); processes share the rows."""
    totals = torch.zeros(3, dtype=torch.float64)
    with no_grad_eval(model):
        for i in range(env.rank * cfg.batch_size, len(rows), env.world * cfg.batch_size):
            with env.autocast():
                scores = answer_scores(model, *get_batch(split, rows[i:i + cfg.batch_size], cfg, pad_id, env))
            totals += torch.tensor([float(s) for s in scores], dtype=torch.float64)
    nats, right, count = all_sum(list(totals), env)
    return nats / count, right / count


def print_answers(model, tokenizer, cfg, env):
    """Print the greedy answer to each of the fixed questions."""
    model.eval()
    questions = cfg.questions.split("|")
    prompts = [render_chat(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True)[0]
               for q in questions]
    room = model.config.max_seq_len - max(map(len, prompts))
    with env.autocast():
        answers = model.generate(prompts, min(cfg.answer_tokens, room), temperature=0, pad_id=tokenizer.pad_id,
                                 stop_ids=[tokenizer.im_end_id, tokenizer.eot_id])
    for question, answer in zip(questions, answers):
        print(f"question: {question}\n  answer: {tokenizer.decode(answer, skip_special=True)}", flush=True)
    model.train()


def main(cfg):
    # ------------------------------------------------------------------------ start
    env = start(cfg)
    caught = catch_signals()

    # ------------------------------------------------------------------------ model
    model, tokenizer, base = load_model(cfg.init_from)
    config = model.config
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets,
                 base=os.path.relpath(cfg.init_from, cfg.out_dir), base_hash=weights_hash(base["model"]))
    model.to(env.device)
    if cfg.neftune_alpha:
        model.embed.register_forward_hook(lambda m, _, out: out + m.noise.to(out.dtype) if m.training else out)
    compile_model(model, cfg, env)

    # ------------------------------------------------------------------------ data
    train, val, meta = open_data(cfg.data_dir, "sft", base["fingerprint"])
    cfg.seq_len = cfg.seq_len or config.max_seq_len
    if cfg.seq_len > config.max_seq_len:
        raise SystemExit(f"error: seq_len={cfg.seq_len} exceeds the {config.max_seq_len} tokens the model can see")
    lengths = np.diff(train.idx) - 1                                       # inputs of each conversation
    learned = np.add.reduceat(train.mask, train.idx[:-1], dtype=np.int64)  # and its learned targets
    rows, epoch = pack(lengths, cfg, cfg.seed, 0), 1
    if not rows:
        raise SystemExit(f"error: none of the {len(train):,} conversations of {cfg.data_dir} fits into a row of "
                         f"seq_len={cfg.seq_len}. Raise --seq_len, or prepare the data again with shorter ones")
    rows_a_step = cfg.batch_size * cfg.grad_accum
    rows_an_epoch, used = len(rows), np.concatenate(rows)
    cfg.max_steps = cfg.max_steps or math.ceil(cfg.epochs * rows_an_epoch / rows_a_step)
    while len(rows) < cfg.max_steps * rows_a_step:  # every epoch is packed anew, from (seed, epoch) alone
        rows += pack(lengths, cfg, cfg.seed, epoch)
        epoch += 1
    val_rows = pack(np.diff(val.idx) - 1, cfg, cfg.seed)[:cfg.eval_rows]
    if env.main:
        total = lengths[used].sum()
        print(f"{len(used):,} conversations ({len(train) - len(used):,} longer than a row left out), {total:,} tokens, "
              f"{100 * learned[used].sum() / total:.1f}% learned, in {rows_an_epoch:,} rows of {cfg.seq_len}\n"
              f"padding: {100 - 100 * total / rows_an_epoch / cfg.seq_len:.1f}% of positions "
              f"({100 - 100 * total / len(used) / cfg.seq_len:.1f}% with one conversation a row)")

    # ------------------------------------------------------------------------ optimizer
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    step, best_val, checkpoint = resume(cfg, env, {"model": model}, optimizers, scaler)
    if checkpoint:
        open_data(cfg.data_dir, "sft", checkpoint["fingerprint"])  # leaves where the tokenizer is another one now
    micro = micro_steps(cfg.grad_accum, env)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops, peak = model.flops_per_token(lengths[used].mean()), peak_flops(env) if env.main else 0
    if cfg.lora_rank:  # a frozen weight takes part in two products a token, not three
        flops -= 2 * (model.count()[1] - trained)
    # what is not learned needs no logits
    flops -= (4 if cfg.lora_rank else 6) * model.head_weight.numel() * (1 - learned[used].sum() / lengths[used].sum())
    if env.main:
        print(f"{trained:,} of {model.count()[0]:,} parameters learn, {cfg.max_steps:,} steps of {rows_a_step} rows = "
              f"{cfg.max_steps * rows_a_step / rows_an_epoch:.2f} epochs of {cfg.data_dir}")

    def save(name, **extra):
        adapters = {"model": lora_state_dict(model), "lora": model.lora} if cfg.lora_rank else {}
        save_checkpoint(os.path.join(cfg.out_dir, name), {
            "stage": "sft", "step": step, "model": model.state_dict(), "model_config": dataclasses.asdict(config),
            "config": dataclasses.asdict(cfg), "fingerprint": meta["fingerprint"], "best_val": best_val,
            **adapters, **extra,
        }, os.path.join(cfg.data_dir, meta["tokenizer"]))

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
        step_rows = rows[step * rows_a_step:(step + 1) * rows_a_step]
        documents = np.concatenate(step_rows)  # of all micro-steps and processes: the loss is a mean over all of them
        n_learned, n_tokens = max(1, int(learned[documents].sum())), int(lengths[documents].sum())
        loss = torch.zeros((), device=env.device)
        for i in micro:
            x, y, mask, docs = get_batch(train, step_rows[i * cfg.batch_size:(i + 1) * cfg.batch_size], cfg,
                                         tokenizer.pad_id, env)
            if cfg.neftune_alpha:
                model.embed.noise = neftune_noise(docs, config.dim, cfg.neftune_alpha, cfg.seed, step, i)
            with env.autocast():
                micro_loss = model(x, y, mask / n_learned, docs)
            scaler.scale(micro_loss * env.world).backward()  # average_gradients will divide by world
            loss += micro_loss.detach()
        average_gradients(model, env)
        loss, stop = all_sum([loss, float(bool(caught))], env)
        norm = optimizer_step(model, optimizers, scaler, cfg.grad_clip)
        if not math.isfinite(loss + (0 if scaler.is_enabled() else norm)):  # the scaler skips steps of infinite norm
            raise SystemExit(f"error: the loss is {loss} and the gradient's norm {norm} at step {step}. The last good "
                             f"checkpoint is {cfg.out_dir}/ckpt.pt; lower --lr (now {cfg.lr}) or raise --warmup_steps")
        if config.n_experts and not cfg.lora_rank:
            model.update_router_bias(cfg.bias_rate, dist.all_reduce if env.world > 1 else None)
        step += 1
        dt = time.perf_counter() - t
        seconds, steps_done = seconds + dt, steps_done + 1

        last = step == cfg.max_steps
        record = {"loss": loss, "lr": lr, "norm": norm, "tok/s": n_tokens / dt, "learned_share": n_learned / n_tokens,
                  "mfu": flops * n_tokens / dt / peak / env.world if peak else 0.0,
                  "left": seconds / steps_done * (cfg.max_steps - step)}
        if val_rows and (last or (cfg.eval_every and step % cfg.eval_every == 0)):
            record["val_loss"], record["val_accuracy"] = evaluate(model, val, val_rows, cfg, tokenizer.pad_id, env)
            if record["val_loss"] < best_val:
                best_val = record["val_loss"]
                if env.main:
                    save("best.pt")
        if last or stop or step % cfg.log_every == 0 or "val_loss" in record:
            log(cfg, env, step, record)
        if env.main and cfg.sample_every and cfg.questions and (last or step % cfg.sample_every == 0):
            print_answers(model, tokenizer, cfg, env)
        if last or stop or step % cfg.save_every == 0:
            save_last()
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
