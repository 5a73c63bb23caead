"""
Continuous batching: answers that begin and end at different times, decoded together, a token a row and step.

    engine = Engine(model, stop_ids, slots=16, queue=64, env=env)
    engine.thread.start()
    engine.submit([Row(prompt, max_new_tokens, Sampling(temperature=0), uniforms, top_logprobs=-1, put=print)])

tools/serve.py speaks HTTP for it. generate.py does the same for rows that begin together.

All rows share one KV cache, and a cache appends to all its rows at one column. So every row ends at the last filled
column, wherever it began; row i begins at column pad[i], and its positions and its mask depend on nothing else:

    column       0 1 2 3 4 5 6 7 8 | 9          a step fills column 9 of all rows
    row 0        . . a b c d e f g | h          pad 2
    row 1        . . . . . . p q r | s          pad 6: joined when column 8 was the last one
"""
import collections
import copy
import threading
import traceback
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch

from common.generate import filter_logits, pick
from model import KVCache


class Token(NamedTuple):
    id: int
    logprob: float = None            # None where nobody asked
    likeliest: tuple = ()            # (id, log-prob) of the likeliest tokens, best first


class Sampling(NamedTuple):
    """How a row's tokens are drawn, as generate() takes it."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(eq=False)
class Row:
    """One answer in the making."""
    prompt: list                     # token ids
    max_new_tokens: int              # with the prompt no more than the engine's room
    sampling: Sampling
    uniforms: list                   # a number in [0, 1) for each new token
    top_logprobs: int                # how many likeliest tokens to report; -1: no log-probs at all
    put: Callable                    # is given each Token, then "stop" or "length"; an exception if the engine fails
    new: list = field(default_factory=list)
    cancelled: bool = False          # nobody waits for the rest

    @property
    def columns(self):
        """How many columns of the cache it fills: the newest token has not been through the model yet."""
        return len(self.prompt) + len(self.new) - 1


class Full(Exception):
    """As many answers are under way as the engine takes."""


class Engine:
    """What a row says depends on its own prompt, settings and uniforms, not on its neighbours.

    But for rounding: sums over batches of other sizes differ in their last bit. In fp32 that decides only between
    tokens equally likely to seven digits, and draws as near to the edge between two; in bf16, between close ones.
    """

    def __init__(self, model, stop_ids, slots, queue, env):
        """slots: rows decoded at once. queue: how many more may wait. env: device and dtype, of common.start()."""
        self.model = model
        self.stop_ids = set(stop_ids)
        self.slots = slots
        self.capacity = slots + queue
        self.env = env
        self.room = model.trained_len               # tokens of a row; positions further on mean nothing to it
        self.rows = []                              # rows[i] is row i of the cache
        self.waiting = collections.deque()
        self.changed = threading.Condition()        # held by whoever changes what rows there are
        self.closed = False
        pad = torch.zeros(slots, dtype=torch.long, device=env.device)
        dtype = model.head_weight.dtype if env.dtype == torch.float32 else env.dtype
        self.cache = KVCache(model.config, pad, self.room, dtype)
        self.thread = threading.Thread(target=self.loop, daemon=True)

    # ---- called from other threads

    def submit(self, rows):
        """Let rows wait for their turn: all of them, or none (Full) where that would be too many."""
        with self.changed:
            self.waiting = collections.deque(row for row in self.waiting if not row.cancelled)
            decoding = sum(not row.cancelled for row in self.rows)
            if decoding + len(self.waiting) + len(rows) > self.capacity:
                raise Full()
            self.waiting.extend(rows)
            self.changed.notify()

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    # ---- the engine's own thread

    @torch.no_grad()
    def loop(self):
        # one autocast for good, since it keeps the weights that it has cast
        with self.env.autocast():
            while self.wait():
                try:
                    self.turn()
                except Exception as error:
                    # Out of memory, say. These clients hear of it, the next ones are served.
                    traceback.print_exc()
                    for row in self.rows:
                        row.put(error)
                    self.rows = []

    def wait(self):
        """Sleep until there is something to do; return False when the server ends."""
        with self.changed:
            self.changed.wait_for(lambda: self.rows or self.waiting or self.closed)
            return not self.closed

    def turn(self):
        """Newcomers first, so that they take part in this step; then one token for every row."""
        while self.admit():
            self.join(self.rows[-1])
        if self.rows:
            self.step()

    def admit(self):
        """Give the next one who waits a free row; return False where nobody waits or no row is free."""
        with self.changed:
            while self.waiting and len(self.rows) < self.slots:
                row = self.waiting.popleft()
                if not row.cancelled:
                    self.rows.append(row)
                    return True
        return False

    def join(self, row):
        """Compute the keys and values of a new row's prompt, copy them into the cache, draw the first token."""
        cache = self.cache
        n = len(self.rows) - 1                                                         # rows before this one
        T = len(row.prompt)
        # alone, as if there were no other rows: a prompt's keys depend on the prompt only
        device = cache.pad.device
        alone = KVCache(self.model.config, torch.zeros(1, dtype=torch.long, device=device), T, cache.k[0].dtype)
        hidden = self.model(torch.tensor([row.prompt], device=device), cache=alone)    # (1, T, C)
        # it must end where the others end; if it is longer than all of them, they move to the right first
        if n == 0:
            cache.length = T
        elif T > cache.length:
            self.shift(T - cache.length, n)
        # copy layer by layer
        begin = cache.length - T
        for ours, theirs in zip(cache.k + cache.v, alone.k + alone.v):
            ours[n, :, begin:cache.length] = theirs[0]
        cache.pad[n] = begin
        self.draw(hidden[:, -1], [row])
        self.leave()

    def step(self):
        """One more token for every row."""
        cache = self.cache
        n = len(self.rows)
        # Rows that have ended leave columns on the left that nobody uses. Move there when the cache is full, or when
        # more than half of it is unused, for attention reads unused columns too. A full cache always has some: the
        # longest row fills `room` columns only after its last token, which never comes here.
        unused = cache.length - max(row.columns for row in self.rows)
        if cache.length == self.room or 2 * unused > cache.length:
            self.shift(-unused, n)
        # the model sees the rows in use only; what it appends to these slices stands in the whole cache
        view = copy.copy(cache)
        view.k = [k[:n] for k in cache.k]
        view.v = [v[:n] for v in cache.v]
        view.pad = cache.pad[:n]
        view.ragged = True
        ids = torch.tensor([[row.new[-1]] for row in self.rows], device=cache.pad.device)
        hidden = self.model(ids, cache=view)                                           # (n, 1, C)
        cache.length += 1
        self.draw(hidden[:, 0], self.rows)
        self.leave()

    def shift(self, columns, n):
        """Move the first n rows to the right by this many columns (to the left, if negative)."""
        cache = self.cache
        for part in cache.k + cache.v:
            part[:n] = part[:n].roll(columns, dims=2)
        cache.pad[:n] += columns
        cache.length += columns

    def draw(self, hidden, rows):
        """Draw each row's next token and hand it over; hidden (n, C)."""
        logits = self.model.logits(hidden)                                             # (n, V)
        # rows with the same settings are filtered and drawn together
        groups = collections.defaultdict(list)
        for i, row in enumerate(rows):
            groups[row.sampling].append(i)
        ids = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        for sampling, members in groups.items():
            seen = None
            if sampling.repetition_penalty != 1.0:
                seen = torch.zeros(len(members), logits.size(1), dtype=torch.bool, device=logits.device)
                for line, i in enumerate(members):
                    seen[line, rows[i].prompt + rows[i].new] = True
            # each row has drawn its numbers beforehand: one for every token it may get
            uniforms = torch.tensor([rows[i].uniforms[len(rows[i].new)] for i in members], device=logits.device)
            allowed = filter_logits(logits[members], seen, *sampling)
            ids[members] = pick(allowed, uniforms, sampling.temperature)
        # tell each client
        for i, (row, id) in enumerate(zip(rows, ids.tolist())):
            row.new.append(id)
            token = Token(id)
            if row.top_logprobs >= 0:
                # of the model's own distribution, before temperature and filters
                logps = logits[i].log_softmax(-1)                                      # (V)
                best = logps.topk(row.top_logprobs)
                token = Token(id, float(logps[id]), tuple(zip(best.indices.tolist(), best.values.tolist())))
            row.put(token)

    def leave(self):
        """Take out the rows that have ended. The last row fills the place, so that rows 0 to n - 1 are those in use."""
        cache = self.cache
        for i in reversed(range(len(self.rows))):  # backwards: the last row has been looked at when it moves
            row = self.rows[i]
            stopped = row.new[-1] in self.stop_ids
            if not stopped and not row.cancelled and len(row.new) < row.max_new_tokens:
                continue
            # the last row's keys and values move to row i, no more of them than are in use
            mover = self.rows[-1]
            columns = slice(cache.length - mover.columns, cache.length)
            for part in cache.k + cache.v:
                part[i, :, columns] = part[len(self.rows) - 1, :, columns]
            cache.pad[i] = cache.pad[len(self.rows) - 1]
            with self.changed:
                self.rows[i] = mover
                self.rows.pop()
            # at the very end: its client may come again at once, and finds a place
            row.put("stop" if stopped else "length")
