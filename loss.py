"""
How rows become losses, without ever holding all the logits: N tokens times a vocabulary of 150,000 would be gigabytes.

    cross_entropy(x, head_weight, targets, weights)    the loss of pretraining and SFT, its gradient made beside it
    token_logps(model, ids, targets, mask)             log-prob of each token, (B, T), with gradients: PPO
    answer_logps(model, batch, env)                    their sums over each row's answer: DPO
    score_answers(model, batch, env)                   a reward model's score of each row's answer
    text_loss(model, split, ...)                       nats a token and bits a byte of a text
"""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import all_sum, batch_starts, no_grad_eval
from model import product_dtype


def chunk_size(vocab_size, device):
    """Rows of logits to hold at once: on a GPU enough to keep it busy, on a CPU what stays in its cache (16 MB)."""
    return 4096 if device.type == "cuda" else max(128, 2 ** 22 // vocab_size)


# ---------------------------------------------------------------------------- cross entropy


def softmax_nll(logits, target):
    """logits (N, V), target (N, 1) -> nll (N) and its gradient softmax - onehot (N, V), in the dtype of the logits."""
    logps = logits.float().log_softmax(-1)
    nll = -logps.gather(1, target).squeeze(1)
    # softmax - onehot: at the target, one less
    gradient = logps.exp()
    minus_one = torch.full_like(target, -1, dtype=torch.float32)
    gradient = gradient.scatter_add(1, target, minus_one)
    return nll, gradient.to(logits.dtype)


@functools.cache  # made when it is first asked for: torch's compiler takes seconds to import
def compiled_softmax_nll():
    """softmax_nll in one pass over the logits instead of six."""
    return torch.compile(softmax_nll, dynamic=True)


class ChunkedCrossEntropy(torch.autograd.Function):
    """sum(weights * cross entropy(x @ head.T, targets)), chunk by chunk, the gradient made beside the loss.

    Per token d loss / d logits = weight * (softmax - onehot); making it in the forward pass saves the logits' memory
    (and on CPUs the time to fetch it) without computing them twice.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weights, with_grad, compiled):
        nll_and_gradient = compiled_softmax_nll() if compiled else softmax_nll
        dtype = product_dtype(x)
        rounded_head = head.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_head = torch.zeros_like(head) if with_grad else None
        # 1/N is too small for fp16: products see weights relative to the largest, which comes back in fp32
        scale = weights.amax().clamp(min=1e-30)
        relative = weights / scale
        rows = chunk_size(len(head), x.device)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            inputs = x[part].to(dtype)                                             # (rows, C)
            # the logits get no name here: a name would keep them while the next chunk's are made
            nll, grad = nll_and_gradient(                                          # (rows), (rows, V)
                F.linear(inputs, rounded_head),
                targets[part].clamp(min=0)[:, None])
            loss += (weights[part] * nll).sum()
            if with_grad:
                # a row's weight is cheaper put on its C channels than on V logits
                grad_x[part] = (grad @ rounded_head) * weights[part, None]
                weighted = (inputs * relative[part, None]).to(dtype)
                grad_head += (grad.T @ weighted).float() * scale
        if with_grad:
            ctx.save_for_backward(grad_x, grad_head)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # both are made already; what comes from above is one number, the factor on the loss
        grad_x, grad_head = ctx.saved_tensors
        grad_x = grad_x * grad_loss.to(grad_x.dtype)
        return grad_x, grad_head * grad_loss, None, None, None, None


def cross_entropy(x, head_weight, targets, weights=None, compiled=False):
    """Hidden states x (..., C), head_weight (V, C), targets (...) -> a scalar loss in nats.

    weights (...): the loss is sum(weights * nll), so the caller decides what it is a mean of; without weights it is the
    mean over targets that are not -1. compiled: fuse what happens between the products (torch.compile).
    """
    x = x.reshape(-1, x.size(-1))                                                  # (N, C)
    targets = targets.reshape(-1)                                                  # (N)
    if weights is None:
        weights = (targets >= 0).float()
        weights = weights / weights.sum().clamp(min=1)
    else:
        # what need not be learned needs no logits
        weights = weights.reshape(-1).float()
        learned = weights != 0
        x = x[learned]
        targets = targets[learned]
        weights = weights[learned]
    if len(x) == 0:
        return x.sum() * 0.0 + head_weight.sum() * 0.0  # nothing to learn, yet all parameters take part
    return ChunkedCrossEntropy.apply(
        x,
        head_weight,
        targets,
        weights,
        torch.is_grad_enabled(),
        compiled)


def chunk_divergence(x, head_weight, teacher_x, teacher_head, temperature):
    """KL(teacher || student) of each token, (N), both at this temperature."""
    student = F.linear(x, head_weight).float() / temperature                       # (N, V)
    teacher = F.linear(teacher_x, teacher_head).float() / temperature
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return divergence.sum(-1)


def distillation_loss(x, head_weight, teacher_x, teacher_head, weights, temperature):
    """Return sum(weights * T^2 KL(teacher || student)) (Hinton et al. 2015, sec. 2; T^2 keeps the gradient's size).

    x, teacher_x: hidden states (..., C) of both models; weights (...): 0 where nothing is learned.
    """
    learned = weights > 0
    x = x[learned]                                                                 # (N, C)
    teacher_x = teacher_x[learned]
    weights = weights[learned]
    loss = x.sum() * 0.0
    size = chunk_size(len(head_weight), x.device)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        # both models' logits of a chunk are forgotten and made again in the backward pass
        divergence = checkpoint(
            chunk_divergence,
            x[part],
            head_weight,
            teacher_x[part],
            teacher_head,
            temperature,
            use_reentrant=False)
        loss = loss + (weights[part] * divergence).sum()
    return temperature ** 2 * loss


def text_loss(model, split, seq_len, batch_size, max_tokens, env):
    """Return (nats a token, bits a byte) on the first max_tokens of a split; rows are shared among the processes.

    Bits a byte = sum of nats / ln 2 / UTF-8 bytes: comparable between tokenizers.
    """
    n_tokens = min(max_tokens, len(split.tokens) - 1)
    n_rows = math.ceil(n_tokens / seq_len)
    nats = torch.zeros((), device=env.device)
    with no_grad_eval(model):
        for first in batch_starts(n_rows, batch_size, env, even=True):
            # always whole batches, so that there is one shape to compile; -1 marks targets that do not count
            ids = np.zeros((batch_size, seq_len), dtype=np.int64)
            targets = np.full((batch_size, seq_len), -1, dtype=np.int64)
            start = first * seq_len
            n = max(0, min(batch_size * seq_len, n_tokens - start))
            ids.flat[:n] = split.tokens[start:start + n]
            targets.flat[:n] = split.tokens[start + 1:start + n + 1]
            x = torch.from_numpy(ids).to(env.device)                               # (B, T)
            y = torch.from_numpy(targets).to(env.device)
            # weights of 1 make the loss a sum: sums of batches and processes add up, means of unequal ones would not
            weights = (y >= 0).float()
            with env.autocast():
                nats += cross_entropy(model(x), model.head_weight, y, weights)
    total = all_sum([nats], env)[0]
    n_bytes = split.meta["bytes"] * n_tokens / len(split.tokens)
    return total / n_tokens, total / math.log(2) / n_bytes


# ---------------------------------------------------------------------------- log-probs and scores of answers


def chunk_logps(x, head_weight, targets, temperature):
    """x (N, C), head_weight (V, C), targets (N) -> log-prob of each target, (N), in fp32."""
    logits = F.linear(x, head_weight).float() / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


def token_logps(model, ids, targets, mask, temperature=1.0, docs=None):
    """Return log p(targets | ids), (B, T) in fp32, with gradients, where mask (B, T) is 1, and 0 elsewhere."""
    wanted = mask > 0
    x = model(ids, docs)[wanted]                                                   # (N, C)
    chosen = targets[wanted]
    logps = torch.zeros(targets.shape, device=x.device)
    if len(x) == 0:
        return logps + x.sum() * 0.0 + model.head_weight.sum() * 0.0
    # a chunk's logits are forgotten and made again in the backward pass
    size = chunk_size(len(model.head_weight), x.device)
    parts = []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        chunk = checkpoint(
            chunk_logps,
            x[part],
            model.head_weight,
            chosen[part],
            temperature,
            use_reentrant=False)
        parts.append(chunk)
    # back to where they stand in the rows
    return logps.masked_scatter(wanted, torch.cat(parts))


def answer_ends(mask):
    """Return how many targets each row has up to its last learned one, (R); mask (R, T)."""
    place = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return (mask * place).amax(dim=1).long()


def like_lengths(ends):
    """Split rows (R), of which only the first `ends` (R) tokens count, into groups of like length, so that little
    padding is computed: a limited number of tokens a group, padding included, and at least one row."""
    most = 65_536 if ends.is_cuda else 4_096
    order = ends.argsort(stable=True)
    sizes = [0]
    for length in ends[order].tolist():
        # sorted: this row is the longest so far, and all others of its group would be padded to it
        tokens = (sizes[-1] + 1) * length
        if sizes[-1] and tokens > most:
            sizes.append(0)
        sizes[-1] += 1
    return order.split(sizes)


def answer_logps(model, batch, env, temperature=1.0):
    """Return the log-prob of each row's answer with its <|im_end|>, prompt left out, and the answer's length, (R) each.

    batch: ids, targets, mask, each (R, T), of collate().
    """
    ids, targets, mask = batch
    ends = answer_ends(mask)
    sums = torch.zeros(len(ids), device=ids.device)
    for rows in like_lengths(ends):
        T = ends[rows].max()
        with env.autocast():
            logps = token_logps(                                                   # (rows, T)
                model,
                ids[rows, :T],
                targets[rows, :T],
                mask[rows, :T],
                temperature)
        sums = sums.index_put((rows,), logps.sum(dim=1))
    return sums, mask.sum(dim=1)


def score_answers(model, batch, env):
    """Return a reward model's score of each row (R), read at the answer's last token, the <|im_end|>.

    batch: of collate(). What stands behind a row's end cannot change its score: attention is causal.
    """
    ids, targets, mask = batch
    # undo the shift: the last token is no input of the language model, but the one that is scored
    ids = torch.cat([ids[:, :1], targets], dim=1)
    ends = answer_ends(mask)
    scores = torch.zeros(len(ids), device=ids.device)
    for rows in like_lengths(ends):
        T = ends[rows].max() + 1
        with env.autocast():
            values = model(ids[rows, :T])                                          # (rows, T)
        last = values.gather(1, ends[rows, None]).squeeze(1)                       # (rows)
        scores = scores.index_put((rows,), last)
    return scores
