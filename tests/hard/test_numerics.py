"""What a formula does not show: memory, chunks, half precision, compiling, blocks that are computed twice, the GPU."""
import functools
import math
import shutil
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import C, KINDS, T, V, config_of, random_model
from small_runs import CPU, forget_run, run, settings
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import common.loss as loss_file
import model as model_file
import pretrain
import sft
from common.distributed import can_compile
from common.generate import generate
from common.loss import chunk_size, cross_entropy, token_logps
from common.optim import Muon
from model import ModelConfig, Transformer

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]


def largest(difference):
    return difference.abs().max().item()


def logits_of(model, ids):
    return model.logits(model(ids))


def loss_of(model, ids, targets, weights=None):
    return cross_entropy(model(ids), model.head_weight, targets, weights)


def logps_of(model, ids, mask):
    return token_logps(model(ids), model.head_weight, ids, mask)


# ---------------------------------------------------------------------------- chunks and memory


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_file, "chunk_size", lambda vocab_size, device: 7)


def test_chunk_size_bounds_memory():
    for vocab_size in (100, 6400, 64832, 152064):
        rows = chunk_size(vocab_size, torch.device("cpu"))
        assert rows >= 128 and (rows == 128 or rows * vocab_size * 4 <= 2 ** 24)


def test_a_gpu_is_kept_busy_with_few_large_chunks():
    """16 rows of 1,024 tokens, 65,536 words: 4 products of the head on a GPU, of 1 GiB of logits each; not 128."""
    rows = chunk_size(65536, torch.device("cuda"))
    assert math.ceil(16 * 1024 / rows) == 4
    assert rows * 65536 * 4 == 2 ** 30
    assert math.ceil(16 * 1024 / chunk_size(65536, torch.device("cpu"))) == 128


@pytest.mark.parametrize("kind", ["llama", "llama_gqa"])  # tied and untied
@pytest.mark.parametrize("how", ["mean", "weights", "logps"])
def test_loss_where_nothing_counts(kind, how):
    """Zero, and a gradient of zero for every parameter: DDP waits for all, also where a rank has padding alone."""
    model = random_model(kind)
    ids = torch.randint(0, V, (2, 5))
    if how == "mean":
        loss = loss_of(model, ids, torch.full((2, 5), -1))
    elif how == "weights":
        loss = loss_of(model, ids, ids, torch.zeros(2, 5))
    else:
        loss = logps_of(model, ids, torch.zeros(2, 5)).sum()
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters())


class Largest(TorchDispatchMode):
    """Context that notes the number of elements of the largest tensor made inside it."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_logits_never_exist_at_once(small_chunks):
    """Forward and backward of the loss and of logps make no tensor of rows * vocabulary elements."""
    model = random_model("llama_gqa", vocab_size=1000)
    ids, targets = torch.randint(0, V, (4, T)), torch.randint(0, V, (4, T))
    for run in (lambda: loss_of(model, ids, targets), lambda: logps_of(model, ids, torch.ones(4, T)).sum()):
        with Largest() as largest_tensor:
            run().backward()
        assert largest_tensor.elements == 1000 * C, "the largest should be the head's gradient, not logits"
    with Largest() as largest_tensor:
        F.cross_entropy(logits_of(model, ids).flatten(0, 1), targets.flatten()).backward()
    assert largest_tensor.elements == 4 * T * 1000


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_blocks_keeps_less_and_gives_the_same_gradients(kind):
    ids = torch.randint(0, V, (2, T))
    kept = {}
    gradients = {}
    for twice in (False, True):
        model = random_model(kind, 14, n_layers=4).train()
        model.checkpoint_blocks = twice
        kept[twice] = 0

        def pack(x):
            kept[twice] += 0 if isinstance(x, torch.nn.Parameter) else x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = loss_of(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients[twice] = {name: p.grad for name, p in model.named_parameters()}
    assert kept[True] < kept[False] / 4
    for name, wanted in gradients[False].items():
        assert largest(gradients[True][name] - wanted) < 1e-6, name
    # nothing to compute again where no gradients are wanted, and the cache works as ever
    with torch.no_grad():
        model.eval()
        wanted = generate(random_model(kind, 14, n_layers=4), [[1, 2, 3]], 5, temperature=0)
        assert generate(model, [[1, 2, 3]], 5, temperature=0) == wanted


# ---------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("learned_tokens", [256, 2 ** 16, 2 ** 20])
def test_no_gradient_is_lost_in_fp16(learned_tokens):
    """256 rows of a step of so many learned tokens: each weighs 1/N, times probabilities of 1/8192: in fp16 that is 0.
    No row of the head's gradient may be; each must be what fp32 gives, as well as fp16 can say."""
    x = torch.randn(256, C) + 0.3  # a common direction, so that no row's parts cancel
    weight = 0.02 * torch.randn(8192, C)
    targets = torch.randint(0, 10, (256,))  # most tokens never are the target: their gradient is small
    weights = torch.full((256,), 1 / learned_tokens)

    def gradients(dtype):
        ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = cross_entropy(*ours, targets, weights)
        scale = 65536.0
        (loss * scale).backward()
        return [tensor.grad / scale for tensor in ours]

    wanted_x, wanted_head = gradients(torch.float32)
    x_grad, head_grad = gradients(torch.float16)
    assert (wanted_head != 0).any(1).all() and (wanted_x != 0).any(1).all()
    assert (head_grad == 0).all(1).float().mean() == 0, "share of the head's rows without any gradient"
    assert (x_grad == 0).all(1).float().mean() == 0, "share of the tokens without any gradient"
    assert (head_grad - wanted_head).norm() < 0.01 * wanted_head.norm()
    assert (x_grad - wanted_x).norm() < 0.01 * wanted_x.norm()
    rows = (head_grad - wanted_head).norm(dim=1) / wanted_head.norm(dim=1)
    assert rows.max() < 0.01


def test_generate_in_bfloat16_autocast():
    """The cache takes the autocast dtype; nearly all greedy tokens agree with fp32."""
    model = random_model("llama_gqa", 3)
    prompts = torch.randint(0, V, (64, 6)).tolist()
    wanted = generate(model, prompts, 1, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        got = generate(model, prompts, 2, temperature=0)
    assert sum(a[0] == b[0] for a, b in zip(wanted, got)) >= 56


def count_weight_casts(model, run):
    """Run, and return how many times each parameter was cast to another dtype."""
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    counts = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in names:
                counts[names[args[0].data_ptr()]] += 1
            return func(*args, **(kwargs or {}))

    with Casts():
        run()
    return counts


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2"])  # of a mixture the experts are cast each time
def test_weights_are_cast_once_not_once_a_token(kind):
    """Under no_grad autocast keeps the weights it has cast; a token more must not cost another cast of the model."""
    model = random_model(kind, 3)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, PROMPTS, 12, temperature=0)

    counts = count_weight_casts(model, run)
    assert counts["blocks.0.attn.qkv.weight"] == counts["blocks.0.ffn.down.weight"] == 1, counts
    assert max(counts.values()) == 1, counts


def test_attention_on_cpus_is_in_fp32_under_autocast(monkeypatch):
    """Autocast would round q, k and v to bf16 again, in which attention takes three times as long there."""
    results = []
    real = model_file.attend

    def spy(*args):
        results.append(real(*args))
        return results[-1]

    monkeypatch.setattr(model_file, "attend", spy)
    model = random_model("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(0, model.config.vocab_size, (2, 8)))
    assert len(results) == model.config.n_layers and all(y.dtype == torch.float32 for y in results)


# ---------------------------------------------------------------------------- compiling


def test_the_compiled_loss_equals_the_plain_one(monkeypatch):
    """Loss and gradients, for any number of rows, and without compiling for each."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss_file.softmax_nll, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(loss_file, "compiled_softmax_nll", lambda: compiled)
    monkeypatch.setattr(loss_file, "chunk_size", lambda vocab_size, device: 20)
    for rows in (33, 20, 50, 47):
        results = []
        x = torch.randn(rows, C, requires_grad=True)
        weight = torch.randn(V, C, requires_grad=True)
        targets = torch.randint(-1, V, (rows,))
        for use in (False, True):
            loss = cross_entropy(x, weight, targets, compiled=use)
            results.append((loss, *torch.autograd.grad(loss, (x, weight))))
        for plain, fused in zip(*results):
            assert largest(plain - fused) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def train_a_little(model, steps, rows=2, autocast=False):
    """Train for some steps on random rows of 16 tokens; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        ids = torch.randint(0, V, (rows, 17), generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(model(ids[:, :-1]), model.head_weight, ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "update_router_bias"):
            model.update_router_bias(0.001)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind, autocast", [("llama_gqa", True), ("dots1", False)])
def test_blocks_are_compiled_whole_and_once(kind, autocast, fresh_dynamo):
    """No graph breaks (fullgraph), one graph for all blocks of a kind, and no other one in later steps."""
    model = random_model(kind, 1, n_layers=4).train()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    kinds = 2 if kind == "dots1" else 1  # the first block of dots1 is dense
    with torch._dynamo.config.patch(error_on_recompile=kinds == 1):
        losses = train_a_little(model, 1, autocast=autocast)
    assert fresh_dynamo["unique_graphs"] == kinds
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train_a_little(model, 4, autocast=autocast)
    assert fresh_dynamo["unique_graphs"] == kinds
    assert all(map(math.isfinite, losses))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", ["llama_gqa", "dots1"])
def test_blocks_that_keep_little_can_be_compiled(kind, fresh_dynamo):
    """--checkpoint_blocks and compile together: the losses of the plain model."""
    wanted = train_a_little(random_model(kind, 1).train(), 3)
    model = random_model(kind, 1).train()
    model.checkpoint_blocks = True
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert train_a_little(model, 3) == pytest.approx(wanted, abs=1e-5)


def test_sampling_compiles_nothing(fresh_dynamo):
    """A sample between two steps of a compiled run: a graph for each length of the cache would take minutes."""
    model = random_model("llama_gqa", 1).train()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    train_a_little(model, 1)
    graphs = fresh_dynamo["unique_graphs"]
    generate(model, [[1, 2, 3]], 12)
    generate(model, [[1, 2, 3], [4]], 12)
    train_a_little(model, 1)
    assert fresh_dynamo["unique_graphs"] == graphs


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_mixture_of_experts_trains_in_fp32(fresh_dynamo):
    """With the real compiler, which knows no grouped product in fp32 of its own: the losses of the plain model.
    The mixture alone, as compiling takes a while; test_pretrain.py compiles whole blocks."""
    changes = dict(n_layers=1, first_dense=0, n_shared_experts=0)
    wanted = train_a_little(random_model("dots1", 1, **changes).train(), 4)
    model = random_model("dots1", 1, **changes).train()
    model.blocks[0].ffn.compile(fullgraph=True)
    assert train_a_little(model, 4) == pytest.approx(wanted, abs=1e-4)
    assert fresh_dynamo["unique_graphs"] == 1


def test_without_a_compiler_it_runs_uncompiled(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile(CPU)
    assert "a C++ compiler is missing, so the model runs uncompiled" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [pretrain, sft])
def test_nothing_is_compiled_after_the_second_step(place, tmp_path, monkeypatch, fresh_dynamo, stage):
    """Training and measuring have a graph each; later steps use them as they are, whatever their rows hold."""
    cfg = settings(place[0], stage.__name__, str(tmp_path), max_steps=6, eval_every=2, compile=True)
    # the compiler proper takes long, and does not decide what is compiled anew
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    loss_file.compiled_softmax_nll.cache_clear()
    graphs = []
    monkeypatch.setattr(stage, "save", lambda *args, **extra: graphs.append(fresh_dynamo["unique_graphs"]))
    stage.main(cfg)
    forget_run()
    loss_file.compiled_softmax_nll.cache_clear()
    assert len(graphs) >= 3 and 0 < graphs[0] == graphs[-1]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(place, tmp_path):
    losses = {}
    for compile in (False, True):
        cfg = settings(place[0], "pretrain", f"{tmp_path}/{compile}", max_steps=4, n_layers=1, compile=compile)
        checkpoint, log = run(cfg)
        losses[compile] = [[r["loss"], r["norm"]] for r in log] + [[log[-1]["val_loss"]]]
    assert "blocks.0.attn.qkv.weight" in checkpoint["model"]
    assert not any("_orig_mod" in name for name in checkpoint["model"])
    for eager, compiled in zip(losses[False], losses[True]):
        assert compiled == pytest.approx(eager, abs=1e-3)


# ---------------------------------------------------------------------------- on a GPU, where there is one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu(kind):
    model = random_model(kind, 13)
    ids = torch.randint(0, V, (2, 33))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    logits, greedy = logits_of(model, ids).detach(), generate(model, prompts, 20, temperature=0)
    loss = loss_of(model, ids[:, :-1], ids[:, 1:])
    loss.backward()
    gradient = model.blocks[1].ffn.down.grad if kind == "dots1" else model.blocks[1].ffn.down.weight.grad
    cuda = random_model(kind, 13).cuda()
    gpu_ids = ids.cuda()
    assert largest(logits_of(cuda, gpu_ids).detach().cpu() - logits) < 1e-4
    assert generate(cuda, prompts, 20, temperature=0) == greedy
    gpu_loss = loss_of(cuda, gpu_ids[:, :-1], gpu_ids[:, 1:])
    gpu_loss.backward()
    there = cuda.blocks[1].ffn.down.grad if kind == "dots1" else cuda.blocks[1].ffn.down.weight.grad
    assert gpu_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert largest(there.cpu() - gradient) < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        half = loss_of(cuda, gpu_ids[:, :-1], gpu_ids[:, 1:])
        half.backward()
    assert half.item() == pytest.approx(loss.item(), abs=0.05)


def test_the_oracle_sees_every_switch():
    """Each special feature must change the logits: otherwise the parity above would not notice that it is missing."""
    ids = torch.randint(0, V, (1, T))
    with torch.no_grad():
        for kind, spoil in [("qwen2", lambda m: m.blocks[0].attn.qkv.bias.zero_()),
                            ("qwen3", lambda m: m.blocks[0].attn.k_norm.weight.fill_(1)),
                            ("llama", lambda m: m.blocks[1].ffn_norm.weight.fill_(1)),
                            ("dots1", lambda m: m.blocks[1].ffn.bias.zero_()),
                            ("dots1", lambda m: setattr(m.blocks[1].ffn, "scale", 1.0)),
                            ("dots1", lambda m: setattr(m.blocks[1].ffn, "shared", None))]:
            ours = random_model(kind, 1)
            before = logits_of(ours, ids)
            spoil(ours)
            assert largest(logits_of(ours, ids) - before) > 1e-3, kind


def test_rotation_at_far_positions():
    """The unit vector of pair i is turned by position * theta^(-2i/D), computed here in double precision."""
    config = ModelConfig(max_seq_len=32768, rope_theta=1e6, dim=64, n_heads=1)
    cos, sin = (table[:, None] for table in model_file.rope_table(config))
    for i in (0, 5, 31):
        turned = model_file.rotate(F.one_hot(torch.tensor(i), 64).float().expand(1, 32768, 1, 64), cos, sin)
        for position in (0, 1, 1000, 32767):
            angle = position * 1e6 ** (-2 * i / 64)
            wanted = torch.zeros(64)
            wanted[i], wanted[i + 32] = math.cos(angle), math.sin(angle)
            assert largest(turned[0, position, 0] - wanted) < 4e-3


def test_gradients_travel_while_the_backward_pass_still_runs(tmp_path):
    """The last layers' gradients travel before the first layers' are made; and only in the last micro-step."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    model = Transformer(config_of("llama", dim=128, n_layers=6, hidden_dim=512, tie_embeddings=False))
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    events = []

    def reduce(state, bucket):
        events.append("bucket")
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    net.register_comm_hook(None, reduce)
    model.blocks[0].attn.qkv.weight.register_post_accumulate_grad_hook(lambda p: events.append("first block"))
    ids = torch.randint(0, V, (2, 16))
    for sync in (True, True, False, True):
        events.clear()
        net.require_backward_grad_sync = sync
        cross_entropy(net(ids), model.head_weight, ids).backward()
        if not sync:
            assert events == ["first block"]
    # the first step has one bucket; from the second on DDP has several, in the order in which gradients are made
    assert events == ["bucket", "first block", "bucket"]
    dist.destroy_process_group()


def test_length_buckets_limit_padding():
    ends = torch.tensor([3000, 5, 2500, 5, 1200, 1100, 900, 5000])
    groups = loss_file.length_buckets(ends)
    assert sorted(torch.cat(groups).tolist()) == list(range(8))
    for rows in groups:
        assert len(rows) == 1 or len(rows) * ends[rows].max() <= 4096
    assert len(groups) == 5  # 5 5 900 1100 together would be 4,400 tokens


def test_muon_multiplies_in_the_dtype_of_matmuls():
    """Where matmuls are in bf16, Muon's are, and the step differs by no more than bf16 rounds."""
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 32))
        before = p.detach().clone()
        p.grad = torch.randn(64, 32)
        Muon([p], lr=0.1, dtype=dtype).step()
        assert p.dtype == torch.float32
        steps.append(p.detach() - before)
    exact, rounded = steps
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()
