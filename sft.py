"""
Supervised fine-tuning: learn to answer, by continuing text in which only the assistant's words count.

    python sft.py config/poems_sft.py
    python sft.py config/poems_sft.py --lora_rank=32 --lora_alpha=32 --optimizer=adamw --lr=3e-3 --out_dir=out/lora
    python sft.py config/poems_sft.py --teacher=out/big --out_dir=out/poems-distilled
    torchrun --standalone --nproc_per_node=4 sft.py config/poems_sft.py --grad_accum=4

in:  data/<name>/ from prepare.py --kind=sft (train/val .bin .mask .idx, meta.json); a run to start from, out/<base>/
out: out/<run>/ckpt.pt (the last step; run the same command again to go on), best.pt (lowest validation loss),
     tokenizer.model, log.jsonl. With --lora_rank the weights are adapters alone, to be loaded over out/<base>/

Several conversations are packed into one row. Each sees only itself and counts positions from its own start, so the
loss is as with one conversation a row. It is the mean over all learned tokens of a step, with any number of processes.
"""
import bisect
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.checkpoint import catch_signals, find, finish, load_model, log, own, restore, save
from common.data import open_data
from common.distributed import all_sum, batch_starts, can_compile, check_finite, micro_steps, start
from common.lora import start_lora
from common.loss import cross_entropy, distillation_loss
from common.optim import lr_at, make_optimizers, set_lr
from common.sharding import shard_model
from configurator import Count, Fraction, NonNegative, Positive, Share, Whole, check, run
from tokenizer import render_chat

STAGE = "sft"
# a run can only be resumed with the same values of these, and of batch_size * grad_accum, on the same model
SAME = ("seed", "data_dir", "init_from", "seq_len", "optimizer", "teacher")


@dataclass
class Config:
    # files
    data_dir: str = "data/poems-sft"
    init_from: str = "out/poems"   # run folder or checkpoint file with the weights and tokenizer to start from
    out_dir: str = "out/sft"
    resume: bool = True            # go on from out_dir/ckpt.pt when it is there
    # adapters (common/lora.py)
    lora_rank: Whole = 0           # 0: train all weights
    lora_alpha: Positive = 16.0    # what the adapters add is multiplied by alpha / rank
    lora_targets: str = "qkv|out|gate_up|down"  # regex: layers whose name ends with it get adapters
    # distillation (Hinton et al. 2015)
    teacher: str = ""              # a run with the same tokenizer, whose probabilities are learned beside the data
    teacher_weight: Share = 0.5    # weight of the teacher's part of the loss; the data's part has the rest
    # batch: a step sees batch_size * grad_accum rows, whatever the number of processes
    seq_len: Whole = 0             # tokens in a row; 0: all the model can see
    batch_size: Count = 16         # rows in a micro-step
    grad_accum: Count = 1          # micro-steps in a step, all processes together
    # optimizer
    epochs: NonNegative = 0.0      # passes over the data; 0: 2, or more where these would be fewer than 100 steps
    max_steps: Whole = 0           # 0: as many as the epochs take
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 3e-4
    min_lr: NonNegative = 3e-5     # at the last step
    adam_lr: NonNegative = 0.0     # with muon: rate of embeddings, head and norm weights, which AdamW trains; 0: lr
    momentum: Fraction = 0.95      # muon
    warmup_steps: Whole = 0        # 0: a tenth of the run, at most 100
    decay_steps: Whole = 0         # 0: cosine; above 0: flat, then a linear fall in the last decay_steps steps (wsd)
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0   # 0: no clipping
    # every eval_every steps: validation loss, a checkpoint, answers to the questions (split at |)
    eval_every: Count = 100
    eval_rows: Count = 500         # packed rows of the validation split, at most
    questions: str = "你是谁？|写一首五言绝句，题目是《春夜》。|“守株待兔”是什么意思？"
    log_every: Count = 1
    # machine
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matmuls; auto: bf16 where it is fast
    compile: bool = True
    shard: bool = False            # split the model among the processes (FSDP2); it prints no answers
    seed: Whole = 1234


# settings that change nothing unless this holds
NEEDS = {
    "teacher": "teacher_weight > 0",
    "teacher_weight": "teacher",
    "lora_alpha": "lora_rank",
    "lora_targets": "lora_rank",
    "adam_lr": "optimizer == 'muon'",
    "momentum": "optimizer == 'muon'",
    "epochs": "max_steps == 0"}


def pack(lengths, T, *seed):
    """Put conversations of these lengths into rows of T tokens; return for each row the numbers of its conversations.

    They come in a random order (seed). Each goes into the row with the least space that is enough (best fit), or into
    a new row; those longer than T are left out. In every group of 64 the longest come first, since short ones fit into
    the space that is left; sorting all of them would put only long ones together.
    """
    rng = np.random.default_rng(seed)
    usable = np.flatnonzero((lengths > 0) & (lengths <= T))
    order = rng.permutation(usable)
    # lexsort sorts by its last key, here the group of 64, and within equal ones by the key before
    group = np.arange(len(order)) // 64
    order = order[np.lexsort((-lengths[order], group))]
    rows = []
    rooms = []  # of each row that is not full: (free tokens, number of the row), sorted
    for i in order.tolist():
        # sorted, so the first that is large enough leaves the least space free
        best = bisect.bisect_left(rooms, (lengths[i],))
        if best == len(rooms):
            # no row has room enough: open a new one
            rooms.append((T, len(rows)))
            rows.append([])
        room, row = rooms.pop(best)
        rows[row].append(i)
        bisect.insort(rooms, (room - lengths[i], row))
        del rooms[:-1000]  # keep the 1,000 with the most space: a shorter list is faster
    return [rows[r] for r in rng.permutation(len(rows))]  # early rows are the fullest, so mix them


def get_batch(split, rows, T, pad_id, device):
    """Rows of conversations -> inputs, targets, mask (1 where the target is learned), docs, each (B, T).

    Inputs and targets are shifted inside each conversation, so its last token is no input. docs is the number of the
    conversation in its row, from 1; the rest of the row is padding, with number 0.
    """
    # begin with padding everywhere; conversations are written over it
    shape = (len(rows), T)
    ids = np.full(shape, pad_id, dtype=np.int64)
    targets = ids.copy()
    mask = np.zeros(shape, dtype=np.float32)
    docs = np.zeros_like(ids)
    for b, row in enumerate(rows):
        begin = 0
        for number, i in enumerate(row, 1):
            # one conversation after another. The mask says which targets are learned, so it is shifted like them
            tokens, learned = split.document(i)
            place = slice(begin, begin + len(tokens) - 1)
            ids[b, place] = tokens[:-1]
            targets[b, place] = tokens[1:]
            mask[b, place] = learned[1:]
            # a token sees only tokens with its own number
            docs[b, place] = number
            begin = place.stop
    batch = (ids, targets, mask, docs)
    return [torch.from_numpy(array).to(device) for array in batch]


@torch.no_grad()
def evaluate(model, split, rows, cfg, pad_id, env):
    """Return nats per learned token; rows are shared among the processes."""
    nats = torch.zeros((), device=env.device)
    count = 0
    for first in batch_starts(len(rows), cfg.batch_size, env, pad=True):
        part = rows[first:first + cfg.batch_size]
        # always whole batches, filled up with empty rows: one shape to compile
        part = part + [[]] * (cfg.batch_size - len(part))
        x, y, mask, docs = get_batch(split, part, cfg.seq_len, pad_id, env.device)
        with env.autocast():
            nats += cross_entropy(model(x, docs), model.head_weight, y, mask)
        count += mask.sum()
    # add up first, divide last: batches hold different numbers of learned tokens
    nats, count = all_sum([nats, count], env)
    return nats / max(count, 1)


@torch.no_grad()
def print_answers(model, tokenizer, cfg, env):
    """Print the answer to each of the fixed questions: token by token the likeliest, made in the plainest way
    (common/generate.py does the same faster, with a cache)."""
    for question in filter(None, cfg.questions.split("|")):
        ids, _ = render_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        begin = len(ids)
        if begin >= cfg.seq_len:
            print(f"question: {question[:20]}… has {begin} tokens, a row {cfg.seq_len}")
        with env.autocast(), torch.compiler.set_stance("force_eager"):  # no compiling for every new length
            for _ in range(min(64, cfg.seq_len - begin)):
                hidden = model(torch.tensor([ids], device=env.device))             # (1, T, C)
                ids.append(model.logits(hidden[0, -1]).argmax().item())
                if ids[-1] in (tokenizer.im_end_id, tokenizer.eot_id):
                    break
        print(f"question: {question}\n  answer: {tokenizer.decode(ids[begin:], skip_special=True)}", flush=True)


def main(cfg):
    # ------------------------------------------------------------------------ start
    # torchrun starts one process per GPU; each computes its share of a step's micro-steps
    env = start(cfg, cfg.dtype)
    micro = micro_steps(cfg.grad_accum, env)

    # ------------------------------------------------------------------------ model
    # pretraining has taught this model the language; here it learns to answer
    model, tokenizer, base = load_model(cfg.init_from)
    if cfg.lora_rank:
        # freeze all weights, and learn a small change of some of the matrices
        start_lora(model, cfg, base["model"], tokenizer)
    del base
    teacher = None
    if cfg.teacher:
        # the teacher's probabilities of all tokens say more than the one token that stands in the text
        teacher, teacher_tokenizer, _ = load_model(cfg.teacher, env.device)
        check(teacher_tokenizer.fingerprint == tokenizer.fingerprint, f"teacher={cfg.teacher} has another tokenizer "
              f"than {cfg.init_from}: their probabilities cannot be compared")
    compiled = cfg.compile and can_compile(env)
    if compiled:
        for block in model.blocks:
            block.compile()
    # net is the model; with several processes its backward pass also averages their gradients
    if cfg.shard and env.world > 1:
        net = shard_model(model, env)
    else:
        net = model.to(env.device)
        if env.world > 1:
            net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # ------------------------------------------------------------------------ data
    train, val, _ = open_data(cfg.data_dir, "sft", tokenizer.fingerprint)
    cfg.seq_len = cfg.seq_len or model.config.max_seq_len
    window = min(m.config.max_seq_len for m in (model, teacher or model))
    check(cfg.seq_len <= window, f"seq_len={cfg.seq_len} exceeds the {window} tokens that the model or its teacher can "
          "see")
    lengths = np.diff(train.idx) - 1                                       # inputs of each conversation
    learned = np.add.reduceat(train.mask, train.idx[:-1], dtype=np.int64)  # and its learned targets
    # several short conversations share a row, so that few positions are padding
    rows = pack(lengths, cfg.seq_len, cfg.seed, 0)
    check(rows, f"none of the {len(train):,} conversations of {cfg.data_dir} fits into a row of seq_len={cfg.seq_len}. "
          "Raise --seq_len, or prepare the data again with shorter ones")
    used = np.concatenate(rows)
    # packing decides how many rows there are, so the number of steps is known only now
    rows_an_epoch = len(rows)
    # a step uses no row twice, so few rows make a smaller batch; and the fewer rows there are, the more epochs
    cfg.batch_size = min(cfg.batch_size, math.ceil(rows_an_epoch / cfg.grad_accum))
    rows_a_step = cfg.batch_size * cfg.grad_accum
    epochs = cfg.epochs or max(2.0, 100 * rows_a_step / rows_an_epoch)
    cfg.max_steps = cfg.max_steps or math.ceil(epochs * rows_an_epoch / rows_a_step)
    epoch = 1
    while len(rows) < cfg.max_steps * rows_a_step:
        # every epoch is packed anew, from (seed, epoch) alone
        rows += pack(lengths, cfg.seq_len, cfg.seed, epoch)
        epoch += 1
    val_rows = pack(np.diff(val.idx) - 1, cfg.seq_len, cfg.seed)
    val_used = sum(map(len, val_rows))
    # the positions that the model learns end where the longest conversation ends
    model.trained_len = max(model.trained_len, int(lengths[used].max()))

    # ------------------------------------------------------------------------ optimizer
    optimizers = make_optimizers(model, cfg, env)

    # ------------------------------------------------------------------------ run folder
    own(cfg, env, cfg.init_from)
    catch_signals(env)
    # where out_dir holds a checkpoint of this run: its weights, its optimizers' state, its step
    step, best_val = restore(find(STAGE, SAME, cfg, env, model, tokenizer), model, optimizers, env)
    if env.is_main:
        n_learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        epochs = cfg.max_steps * rows_a_step / rows_an_epoch
        n_tokens = lengths[used].sum()
        padding = 1 - n_tokens / (rows_an_epoch * cfg.seq_len)
        print(f"{n_learning:,} parameters learn, {cfg.max_steps:,} steps of {rows_a_step} rows = {epochs:.2f} epochs "
              f"of {cfg.data_dir}\n{len(used):,} conversations ({len(train) - len(used):,} longer than a row left "
              f"out, held-out {len(val) - val_used:,}); {learned[used].sum() / n_tokens:.1%} of their tokens are "
              f"learned, {padding:.1%} of positions are padding")

    # ------------------------------------------------------------------------ loop
    while step < cfg.max_steps:
        # the learning rate of this step: it rises first (warmup), then falls
        began = time.perf_counter()
        lr = lr_at(step, cfg, cfg.decay_steps)
        set_lr(optimizers, lr / cfg.lr)

        # the loss is a mean over the learned tokens of all micro-steps and processes: count them first
        step_rows = rows[step * rows_a_step:(step + 1) * rows_a_step]
        documents = np.concatenate(step_rows)
        n_learned = max(1, int(learned[documents].sum()))
        n_tokens = int(lengths[documents].sum())

        # gradients of all micro-steps add up in p.grad; with several processes each computes its share of them
        loss = torch.zeros((), device=env.device)
        for i in micro:
            part = step_rows[i * cfg.batch_size:(i + 1) * cfg.batch_size]
            x, y, mask, docs = get_batch(train, part, cfg.seq_len, tokenizer.pad_id, env.device)    # each (B, T)
            net.require_backward_grad_sync = i == micro[-1]  # processes average gradients in the last one alone
            # forward: the questions are read, but only the mask's tokens, the answers, are learned
            weights = mask / n_learned
            with env.autocast():
                hidden = net(x, docs)                                              # (B, T, C)
                micro_loss = cross_entropy(hidden, model.head_weight, y, weights, compiled)
                if teacher:
                    # distillation: learn the teacher's probability of every token, not only which one stands here
                    with torch.no_grad():
                        teacher_hidden = teacher(x, docs)
                    # compare the tokenizer's V tokens: the rows behind them are padding, other in each model
                    V = tokenizer.vocab_size
                    divergence = distillation_loss(
                        hidden, model.head_weight[:V], teacher_hidden, teacher.head_weight[:V], weights)
                    micro_loss = torch.lerp(micro_loss, divergence, cfg.teacher_weight)
            # backward: the loss is the sum over all processes, but gradients are averaged: so times their number
            env.scaler.scale(micro_loss * env.world).backward()
            loss += micro_loss.detach()

        # clip
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
        # a rule, no gradient: experts that got few tokens get more; with adapters the router does not change
        if model.config.n_experts and not cfg.lora_rank:
            model.update_router_bias(0.01 * lr / cfg.lr, dist.all_reduce if env.world > 1 else None)
        step += 1

        # the loss of all processes, and whether one of them was asked to stop
        loss, stop = all_sum([loss, len(env.signals)], env)
        seconds = time.perf_counter() - began
        record = {"loss": loss, "lr": lr, "norm": norm, "tok/s": n_tokens / seconds, "seconds": seconds}

        # measure on held-out conversations now and then, and at the end
        measure = step == cfg.max_steps or step % cfg.eval_every == 0
        if measure and val_rows:
            # val_loss rises again when the model memorizes the training answers: then use best.pt
            record["val_loss"] = evaluate(model, val, val_rows[:cfg.eval_rows], cfg, tokenizer.pad_id, env)
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
            print_answers(model, tokenizer, cfg, env)
    finish(cfg, env, step, f"Try: python sample.py --chat --out_dir={cfg.out_dir}")


if __name__ == "__main__":
    run(main, Config)
