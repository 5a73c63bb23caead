"""Runs of adapters: small, over a base that must be there, and to start from like any other run."""
import pytest
import torch
from small_runs import refused, run, settings
from test_lora import tiny

from common.checkpoint import load_checkpoint, load_model
from common.lora import add_lora, share_weights


def test_a_run_of_adapters_is_small_and_loads_over_its_base(place, tmp_path, monkeypatch):
    """Its checkpoint has the adapters and their optimizer's state alone; the base is found from anywhere, a file as
    well as a folder, and adapters over adapters."""
    root, tok = place
    checkpoint, _ = run(settings(root, "sft", f"{tmp_path}/small", lora_rank=2, max_steps=3, lr=1e-2))
    assert checkpoint["model"] and all("lora_" in name for name in checkpoint["model"])
    numbers = sum(t.numel() for t in checkpoint["model"].values())
    moments = sum(t.numel() for s in checkpoint["optimizers"][0]["state"].values() for t in s.values() if t.dim())
    base = load_checkpoint(f"{root}/base")["model"]
    assert moments == 2 * numbers and numbers < 0.2 * sum(t.numel() for t in base.values())
    monkeypatch.chdir(tmp_path)
    model, tokenizer, _ = load_model("small")
    assert tokenizer.fingerprint == tok.fingerprint and list(model.state_dict()) == list(base)
    by_hand = load_model(f"{root}/base")[0]
    add_lora(by_hand, **checkpoint["lora"])
    by_hand.load_state_dict(checkpoint["model"], strict=False)
    ids = torch.randint(0, 400, (2, 20))
    assert (model.logits(model(ids)) - by_hand.logits(by_hand(ids))).abs().max() <= 1e-5
    for init_from in ("small", "small/best.pt"):
        over, _ = run(settings(root, "sft", f"{tmp_path}/over-{init_from[-2:]}", init_from=f"{tmp_path}/{init_from}",
                               lora_rank=2, max_steps=1))
        assert over["lora"]["base"] == f"../{init_from}"
        load_model(f"over-{init_from[-2:]}")


def test_another_base_or_rank_is_refused(place, tmp_path):
    root, _ = place
    checkpoint, _ = run(settings(root, "sft", f"{tmp_path}/run", lora_rank=2, max_steps=1))
    for rank, here in ((0, "None here"), (4, "'rank': 4")):
        words = refused(settings(root, "sft", f"{tmp_path}/run", lora_rank=rank))
        assert "is of another run: lora=" in words and "'rank': 2" in words and here in words
    checkpoint["lora"]["base_hash"] = "0" * 64
    torch.save(checkpoint, f"{tmp_path}/run/ckpt.pt")
    with pytest.raises(SystemExit, match="has other weights now"):
        load_model(f"{tmp_path}/run")


@pytest.mark.parametrize("stage", ["ppo", "grpo", "dpo"])
def test_a_stage_that_starts_from_adapters_or_a_file(place, tmp_path, stage):
    """Adapters of zero over the base are the base; best.pt can take the folder's place."""
    root, _ = place
    run(settings(root, "sft", f"{tmp_path}/zero", lora_rank=2, max_steps=1, lr=1e-30, min_lr=1e-30))
    ends = [run(settings(root, stage, f"{tmp_path}/{i}", init_from=start, max_steps=1))[0]["model"]
            for i, start in enumerate(("base", f"{tmp_path}/zero", f"{tmp_path}/zero/best.pt"))]
    for other in ends[1:]:
        assert all((other[name] - weight).abs().max() <= 1e-6 for name, weight in ends[0].items())


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_adapters_learn_over_a_base_that_stays(place, tmp_path, stage):
    """At the first step policy and reference are one, though the base lies in memory once."""
    root, _ = place
    checkpoint, records = run(settings(root, stage, f"{tmp_path}/lora", lora_rank=2, lr=1e-2))
    if stage == "dpo":
        assert abs(records[0]["margin"]) < 1e-5 and records[-1]["val_loss"] < records[3]["val_loss"]
    else:
        kl = [record["kl"] for record in records if "kl" in record]
        assert abs(kl[0]) < 1e-5 and abs(kl[-1]) > 1e-4
    assert checkpoint["lora"]["rank"] == 2 and all("lora_" in name for name in checkpoint["model"])
    merged, base = load_model(f"{tmp_path}/lora")[0].state_dict(), load_checkpoint(f"{root}/base")["model"]
    changed = {name.split(".", 2)[-1] for name in merged if not torch.equal(merged[name], base[name])}
    # the first are rows of the embedding
    assert changed == {"weight", "attn.qkv.weight", "attn.out.weight", "ffn.gate_up.weight", "ffn.down.weight"}


def test_shared_weights_are_one_in_memory():
    policy, reference = tiny(), tiny()
    share_weights(policy, reference)
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(policy.parameters(), reference.parameters()))
    add_lora(policy, 2, 4.0, "qkv")
    assert not any("lora" in name for name in reference.state_dict())


def test_a_is_drawn_as_kaiming_uniform():
    a = add_lora(tiny(dim=128), 16, 8.0, "down").blocks[0].ffn.down.lora_a
    bound = a.size(1) ** -0.5  # kaiming_uniform with a = sqrt(5)
    assert 0.95 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
