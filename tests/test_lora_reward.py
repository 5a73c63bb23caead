"""A reward model of adapters and a head over a frozen run of sft.py."""
import pytest
import torch
from pairs import check_ten_and_ten, place  # noqa: F401 - place is a fixture

import reward
from common.checkpoint import load_checkpoint, load_model, load_reward_model
from common.lora import add_lora
from model import ScalarModel


def test_adapters_and_head_make_a_reward_model(place, tmp_path):  # noqa: F811
    """10 + 10 steps are 20; the checkpoint holds adapters and the head; what is loaded scores as adapters over the base."""
    root, _ = place
    cfg = reward.Config(data_dir=f"{root}/data", init_from=f"{root}/base", out_dir=f"{tmp_path}/run", lora_rank=2,
                        batch_size=4, lr=1e-2, min_lr=1e-2, warmup_steps=1, eval_every=10, device="cpu", dtype="float32")
    check_ten_and_ten(reward, cfg)
    checkpoint = load_checkpoint(cfg.out_dir)
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


def test_another_base_is_refused(place, tmp_path):  # noqa: F811
    root, _ = place
    cfg = reward.Config(data_dir=f"{root}/data", init_from=f"{root}/base", out_dir=f"{tmp_path}/run", lora_rank=2,
                        max_steps=1, device="cpu", dtype="float32")
    reward.main(cfg)
    path = f"{cfg.out_dir}/ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lora"]["base_hash"] = "0"
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match="has other weights now"):
        load_reward_model(cfg.out_dir)
