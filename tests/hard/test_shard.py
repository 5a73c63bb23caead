"""--shard=True: a model split among processes (FSDP2) learns, is saved and goes on as a whole one does."""
import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks import run_in_ranks
from small_runs import MOE, assert_same, read_log, run, settings

from common.checkpoint import load_checkpoint, load_model
from common.distributed import Env, shard_model
from common.loss import cross_entropy
from model import ModelConfig, Transformer


# what a run in shards must get right, each in one of three: tied embeddings, blocks computed again, Muon, experts
KINDS = {
    "dense": dict(checkpoint_blocks=True),
    "muon": dict(optimizer="muon", tie_embeddings=False),
    "experts": dict(MOE)}
STEPS = 6
HALF = 3


@pytest.fixture
def runs(place, tmp_path):
    """A function: of each kind the settings of a run of so many steps in folder `name`. The learning rate is flat, so
    that three and three steps are six."""
    def make(name, max_steps, **changes):
        return {kind: settings(place[0], "pretrain", f"{tmp_path}/{name}/{kind}", **{**kind_changes, **changes},
                               max_steps=max_steps, decay_steps=1, eval_every=HALF, batch_size=2, grad_accum=8, lr=1e-2)
                for kind, kind_changes in KINDS.items()}
    return make


def stages(runs):
    return [("pretrain", dataclasses.asdict(cfg)) for cfg in runs.values()]


def copies(runs, target):
    return [("copy", {"source": cfg.out_dir, "target": target[kind].out_dir}) for kind, cfg in runs.items()]


def test_shards_equal_one_process(runs, tmp_path, capsys):
    """Losses, norms, weights and optimizer state, of a run in two shards, and of one that is saved half-way and goes on
    with another number of them, or with none."""
    whole = runs("whole", STEPS)
    for cfg in whole.values():
        run(cfg)
    begun_alone = runs("begun alone", HALF)
    for cfg in begun_alone.values():
        run(cfg)

    # in two processes: half a run in shards, copied for all that shall go on from there; then its second half by DDP
    half = runs("shards, then DDP", HALF, shard=True)
    in_four = runs("two shards, then four", STEPS, shard=True)
    in_one = runs("shards, then one process", STEPS, shard=True)
    in_two = runs("shards, then DDP", STEPS)
    ends_in_shards = runs("begun alone", STEPS, shard=True)
    run_in_ranks(2, [*stages(half), *copies(half, in_four), *copies(half, in_one), *stages(in_two),
                     *stages(ends_in_shards)], tmp_path / "runs.json")
    run_in_ranks(4, stages(in_four), tmp_path / "runs.json")
    for cfg in in_one.values():
        run(cfg)  # alone there is nothing to share: --shard=True changes nothing
    assert "resuming" in capsys.readouterr().out
    for kind, cfg in whole.items():
        records, checkpoint = read_log(cfg.out_dir), load_checkpoint(cfg.out_dir)
        assert len(records) == STEPS and "val_loss" in records[-1]
        for others in (in_two, in_four, in_one, ends_in_shards):
            assert_same(records, read_log(others[kind].out_dir), atol=1e-5)
            other = load_checkpoint(others[kind].out_dir)
            assert all(type(weight) is torch.Tensor for weight in other["model"].values())
            assert_same(dict(checkpoint["model"]), dict(other["model"]), atol=1e-6)
            assert_same(checkpoint["optimizers"], other["optimizers"], atol=1e-5)
        load_model(in_four[kind].out_dir)  # as sample.py and tools/export.py do


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # on a GPU autocast takes the norms' weights back to fp32
@pytest.mark.parametrize("changes", [dict(), dict(n_experts=4, tie_embeddings=False)])
def test_blocks_travel_in_the_dtype_of_matmuls(tmp_path, changes):
    """Under autocast in bf16: the loss and the gradients, in fp32, of a model that is whole."""
    env = Env(0, 1, torch.device("cpu"), torch.bfloat16)
    ids = torch.randint(0, 64, (2, 16))
    results = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    for shard in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(vocab_size=64, dim=64, n_layers=2, n_heads=4, max_seq_len=16, **changes))
        if shard:
            model = shard_model(model, env)
            model.blocks[0].register_forward_pre_hook(
                lambda block, x: dtypes.update(p.dtype for p in block.parameters()))
        dtypes = set()
        with env.autocast():
            loss = cross_entropy(model(ids), model.head_weight, ids)
        loss.backward()
        grads = [getattr(p.grad, "full_tensor", lambda: p.grad)() for p in model.parameters()]
        results.append((loss.item(), grads))
    dist.destroy_process_group()
    assert dtypes == {torch.bfloat16}
    (whole, grads), (sharded, others) = results
    assert sharded == pytest.approx(whole, rel=1e-3)
    for ours, theirs in zip(grads, others, strict=True):
        assert theirs.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.02 * ours.norm()
