"""A reward model of adapters and a head over a frozen run of sft.py."""
import pytest
import torch
from small_runs import run, settings

from common.checkpoint import load_model, load_reward_model
from common.lora import add_lora
from model import ScalarModel


def test_adapters_and_head_make_a_reward_model(place, tmp_path):
    """The checkpoint holds adapters and the head; what is loaded from it scores as the adapters over their base do."""
    cfg = settings(place[0], "reward", f"{tmp_path}/run", lora_rank=2, lr=1e-2)
    checkpoint, _ = run(cfg)
    assert all("lora_" in name or name.startswith("head.") for name in checkpoint["model"])
    assert checkpoint["model"]["trunk.blocks.0.attn.qkv.lora_b"].abs().max() > 0
    base, _, _ = load_model(cfg.init_from)
    adapted = ScalarModel(base.config)
    adapted.trunk.load_state_dict(base.state_dict())
    add_lora(adapted.trunk, 2, 16.0, cfg.lora_targets, rows=checkpoint["lora"]["rows"])
    adapted.load_state_dict(checkpoint["model"], strict=False)
    ids = torch.randint(0, 300, (3, 9))
    with torch.no_grad():
        assert torch.allclose(load_reward_model(cfg.out_dir)(ids), adapted(ids), atol=1e-5)
    # over other weights they are worth nothing
    path = f"{cfg.out_dir}/ckpt.pt"
    checkpoint["lora"]["base_hash"] = "0"
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match="has other weights now"):
        load_reward_model(cfg.out_dir)
