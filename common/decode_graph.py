"""
Decoding on a GPU: one step, from hidden states to the next ones, is recorded as a CUDA graph and replayed.

    answers = decode(model, hidden, cache, choose, seen, uniforms, stops, on_token)

For one token a GPU takes some 400 kernels of two microseconds, and Python needs milliseconds to ask for them one by
one. What is recorded asks for all of them at once, but for the very same memory each time: so whatever a step reads or
writes stays where it is, and what changes from step to step (columns, the number of the step) is a number on the GPU.
Rows that have ended go on as well, and are not listened to.

On a CPU the same steps run unrecorded, which is slower than generate(): so tests can compare the answers of both.
"""
import torch

from model import KVCache

LOOK = 8  # steps between two looks at who has ended: to look, the CPU must wait for the GPU


class FixedCache(KVCache):
    """A KVCache of fixed shape: a step reads all columns, and a mask hides what is padding or not written yet."""
    filled = True
    ragged = True

    def __init__(self, cache):
        """Take over the keys and values of the prompts."""
        self.pad = cache.pad
        self.length = torch.tensor([cache.length], device=cache.pad.device)        # (1): tokens in a row, on the GPU
        self.k = cache.k
        self.v = cache.v

    def append(self, layer, k, v):
        self.k[layer].index_copy_(2, self.length, k)
        self.v[layer].index_copy_(2, self.length, v)
        return self.k[layer], self.v[layer]

    def is_token(self, length):
        columns = torch.arange(self.k[0].size(2), device=self.pad.device)
        return (columns >= self.pad[:, None]) & (columns < length)                 # (B, columns)


def can_record(model):
    """Whether decode() is the faster way here: on a GPU. The grouped matmul of experts may ask the CPU for its sizes,
    which cannot be recorded."""
    return model.head_weight.is_cuda and not model.config.n_experts


def decode(model, hidden, cache, choose, seen, uniforms, stops, on_token=None):
    """Continue rows whose prompts have gone through the model; return their new ids, a list a row.

    hidden (B, C): of each prompt's last token; cache: a KVCache of the prompts; choose(hidden, seen, uniforms) -> ids
    (B), by a column of uniforms (B, steps); seen (B, V): tokens already in the row; stops: ids that end a row.
    """
    device = hidden.device
    cache = FixedCache(cache)
    answers = torch.full(uniforms.shape, -1, device=device)                        # (B, steps), -1: the row has ended
    ended = torch.zeros(len(hidden), dtype=torch.bool, device=device)
    now = torch.zeros(1, dtype=torch.long, device=device)                          # number of the step

    def step():
        uniform = uniforms.index_select(1, now).squeeze(1)
        ids = choose(hidden, seen, uniform)                                        # (B)
        answers.index_copy_(1, now, ids.masked_fill(ended, -1)[:, None])
        ended.logical_or_((ids[:, None] == stops).any(dim=1))
        seen.scatter_(1, ids[:, None], True)
        hidden.copy_(model(ids[:, None], cache=cache)[:, 0])
        now.add_(1)

    graph = None
    for n in range(uniforms.size(1)):
        if graph:
            graph.replay()
        elif n == 0 or not hidden.is_cuda:
            step()  # the first time as it is: that loads every kernel, which cannot be done while recording
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()  # nothing is computed here: it is written down
            graph.replay()
        if on_token:
            on_token([None if token < 0 else token for token in answers[:, n].tolist()])
        if (on_token or (n + 1) % LOOK == 0) and ended.all():
            break
    return [[token for token in answer if token >= 0] for answer in answers.tolist()]
