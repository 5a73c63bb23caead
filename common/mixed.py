"""
Text or conversations mixed into a preference stage, so that the model does not forget what it learned before (PPO-ptx:
InstructGPT, eq. 2). ppo.py, grpo.py and dpo.py learn a few such rows beside each update, where --ptx_coef is above 0.
"""
import numpy as np

from common.data import open_data, pad, shift, shuffled
from common.loss import token_logps
from configurator import check

PIECE = 128  # tokens of a text that make one row


def open_mixed(folders, n_rows, tokenizer, max_seq_len, env):
    """Open the data to mix in: conversations (kind sft) or text, of one folder or of several with commas between them.
    Return their training splits."""
    check(n_rows % env.world == 0, f"ptx_rows={n_rows} must be a multiple of the {env.world} processes")
    splits = []
    for folder in folders.split(","):
        train, _, meta = open_data(folder, fingerprint=tokenizer.fingerprint)
        check(meta["kind"] in ("sft", "text"), f"ptx_dir={folder} holds data of kind {meta['kind']}: "
              "wanted sft or text")
        if train.idx is None:
            train.idx = np.arange(0, len(train.tokens), PIECE)  # treat each piece of a text as a document
        longest = np.diff(train.idx).max(initial=0)
        check(0 < longest <= max_seq_len, f"{folder} has {len(train.tokens)} tokens, in rows "
              f"of up to {longest}; wanted are rows of at most the {max_seq_len} that the model sees, and more tokens "
              f"than {PIECE}. Prepare it again with --max_length={max_seq_len}")
        splits.append(train)
    return splits


def mixed_rows(splits, number, n_rows, seed, pad_id, env):
    """The rows of batch `number` to mix in: conversations, or pieces of a text. Each batch is of one split, in turn.

    Return inputs, targets, weights, each (rows of this process, T); the weights sum to 1 over all processes.
    """
    split = splits[number % len(splits)]
    first = number // len(splits) * n_rows
    documents = []
    for i in shuffled(len(split), first, n_rows, seed):
        ids, mask = split.document(i)
        documents.append((ids, np.ones(len(ids)) if mask is None else mask))  # in a text every token is learned
    # each process learns its share of the rows; the weights are 1 / learned tokens in all rows
    n_learned = sum(mask[1:].sum() for _, mask in documents)
    ours = documents[env.rank::env.world]
    ids, targets, mask = shift(*pad(ours, pad_id, env.device))
    return ids, targets, mask / float(max(n_learned, 1))


def learn_mixed(net, model, splits, number, cfg, pad_id, env):
    """Add the gradients of ptx_coef * loss to p.grad, where those of the stage's own loss will be added to them; return
    the loss: the mean -log p of the learned tokens of batch `number`, of which this process has its share."""
    x, y, weights = mixed_rows(splits, number, cfg.ptx_rows, cfg.seed, pad_id, env)
    net.require_backward_grad_sync = False  # processes average gradients later, in backward() of the stage's own loss
    with env.autocast():
        logps = token_logps(net(x), model.head_weight, y, weights)
    # processes will average their gradients, that is, divide by their number: so multiply by it
    loss = -(weights * logps).sum() * env.world
    env.scaler.scale(cfg.ptx_coef * loss).backward()
    return loss.item()
