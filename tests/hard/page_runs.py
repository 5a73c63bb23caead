"""
What the tests of tools/page.py share: pages with tiny random models inside, or with runs of your own. Not a test file.
"""
import contextlib
import os
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from common.checkpoint import save_checkpoint
from model import ModelConfig, ScalarModel, Transformer
from oracles import random_model
from page_hosts import Chromium, Node, chromium, read_page
from test_tokenizer import POEMS
from tokenizer import load_tokenizer, render_chat, train_tokenizer
from tools import page

REAL = [path for path in os.environ.get("PAGE_RUNS", "").split(",") if path]
JUDGE = os.environ.get("PAGE_REWARD", "")


@pytest.fixture(autouse=True)
def one_thread(repeatable):
    torch.set_num_threads(1)  # the browser wants a core, too


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def tok_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tok") / "tokenizer.model")
    train_tokenizer(POEMS * 50, path, 400, 1.0)
    return path


def save_run(folder, model, tok, stage):
    os.makedirs(folder, exist_ok=True)
    tok.save(os.path.join(folder, "tokenizer.model"))
    save_checkpoint(os.path.join(folder, "ckpt.pt"), {
        "stage": stage,
        "model": model.state_dict(),
        "model_config": vars(model.config),
        "fingerprint": tok.fingerprint})
    return str(folder)


def moved(model, by, seed):
    """Return a copy of a model whose weights are a little elsewhere, as after some training."""
    g = torch.Generator().manual_seed(seed)
    other = type(model)(model.config).eval()
    state = {}
    for name, w in model.state_dict().items():
        state[name] = w + by * w.abs().mean() * torch.randn(w.shape, generator=g)
    other.load_state_dict(state)
    return other


def write_runs(folder, tok, kind, room=96):
    """Write runs of three writers and a reward model; return (paths of the writers, path of the reward model)."""
    sft = random_model(kind, vocab_size=tok.vocab_size, max_seq_len=room)
    with torch.no_grad():
        sft.head_weight[tok.im_end_id] *= 1.5  # so that an answer ends now and then
    judge = ScalarModel(sft.config)
    judge.trunk.load_state_dict(sft.state_dict(), strict=False)
    paths = []
    for name, by, stage in (("poems", 1.0, "pretrain"), ("poems-sft", 0.0, "sft"), ("poems-ppo", 0.03, "ppo")):
        paths.append(save_run(folder / name, moved(sft, by, len(paths)), tok, stage))
    return paths, save_run(folder / "poems-reward", judge, tok, "reward")


def write_page(paths, judge, out):
    cfg = page.Config(runs=",".join(paths), reward_from=judge, out=str(out))
    page.main(cfg)
    return str(out)


def quantised_models(path):
    """Return torch's models with the int8 weights that lie in a page: (writers, reward model or None)."""
    about, dicts = read_page(path)
    models = []
    for meta, weights in zip(about["runs"], dicts):
        kind = ScalarModel if meta["stage"] == "reward" else Transformer
        model = kind(ModelConfig(**meta["config"]))
        if kind is ScalarModel and not meta["config"]["tie_embeddings"]:
            weights.pop("trunk.lm_head.weight", None)
        model.load_state_dict(weights, strict=True)
        models.append(model.eval())
    judges = [model for model in models if isinstance(model, ScalarModel)]
    return [model for model in models if model not in judges], judges[0] if judges else None


class Made(NamedTuple):
    page: str       # path of the HTML
    paths: list     # of the runs that write
    judge: str      # path of the reward model, or ""
    tok: object


@pytest.fixture(scope="session")
def make(tmp_path_factory, tok_file):
    """A function: kind of model -> Made, each made once."""
    made = {}

    def of_kind(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            paths, judge, tok = REAL, JUDGE, load_tokenizer(REAL[0] if REAL else tok_file)
            if not REAL:
                paths, judge = write_runs(folder, tok, kind)
            made[kind] = Made(write_page(paths, judge, folder / "page.html"), paths, judge, tok)
        return made[kind]

    return of_kind


@pytest.fixture(scope="session")
def made(make):
    return make("real" if REAL else "qwen3")


@contextlib.contextmanager
def opened_in(where, path, request, folder):
    """Open a page in node or in Chromium; there nothing may be said on the console, and nobody be asked."""
    if where == "node":
        yield Node(str(folder)).open(path)
        return
    host = Chromium(request.getfixturevalue("browser"))
    yield host.open(path)
    assert not host.said, "nothing is to be said on the console"
    assert all(url.startswith(("file:", "blob:")) for url in host.asked), "the page asks nobody"
    host.close()


HOSTS = [("node", "llama"), ("node", "llama_gqa"), ("node", "qwen2"), ("node", "qwen3"), ("node", "yarn"),
         ("chromium", "qwen3")]


@pytest.fixture(params=[("node", "real"), ("chromium", "real")] if REAL else HOSTS, ids="-".join)
def host(request, make, tmp_path):
    """An open page of every kind of model, with what is inside it as host.made."""
    where, kind = request.param
    with opened_in(where, make(kind).page, request, tmp_path) as host:
        host.made = make(kind)
        yield host


def prompts_of(tok, n, longest, seed=0):
    """Return n lists of ids: beginnings of texts, and questions in the chat template."""
    numbers = random.Random(seed)
    letters = "床前明月光疑是地上霜举头望低思故乡白日依山尽黄河入海流春风又秋水江雪，。\n"
    prompts = []
    for i in range(n):
        text = "".join(numbers.choices(letters, k=numbers.randrange(1, longest)))
        if i % 2:
            prompts.append(render_chat(tok, [{"role": "user", "content": text}], add_generation_prompt=True)[0])
        else:
            prompts.append([tok.eot_id] + tok.encode(text))
    return prompts


def logits_of(model, ids, seen=None):
    """Return the logits (T, V) of a row. seen gets: streams, [(1, T, C)]; the last token's attention, (L * H, T)."""
    if seen is None:
        return model.logits(model(torch.tensor([ids])))[0].double()
    streams = []
    queries = []
    hooks = [block.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for block in model.blocks]
    hooks.append(model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
    plain = F.scaled_dot_product_attention

    def listen(q, k, v, *rest, **named):
        k_all = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = (q[:, :, -1:] @ k_all.transpose(-1, -2)).squeeze(2) / q.size(-1) ** 0.5                 # (1, H, T)
        queries.append(scores[0].softmax(-1))
        return plain(q, k, v, *rest, **named)

    try:
        F.scaled_dot_product_attention = listen
        logits = model.logits(model(torch.tensor([ids])))[0].double()
    finally:
        F.scaled_dot_product_attention = plain
        for hook in hooks:
            hook.remove()
    seen.update(streams=streams, attention=torch.cat(queries))
    return logits


def answer_job(run, prompt, **settings):
    """Return a job of the page's worker: a greedy answer of one run."""
    plain = {"runs": [run], "prompt": prompt, "temperature": 0, "most": 64, "reference": -1, "judge": -1}
    return {"kind": "answer", **plain, **settings}
