"""
Models that one GPU cannot hold: every process keeps a shard of each parameter, of its gradient and its averages.

    with torch.device("meta"):
        model = Transformer(config)              shapes without memory
    net = shard_model(model, env)                this process's shard of each parameter, and nowhere the whole model
    load_shards(folder, weights, optimizers)     reads what checkpoint.save() wrote, by any number of processes
    weights = read_shards(folder)                all of it, for tools/export.py

        layer's weights  ┌──────────┐  rank 0     forward, backward: all ranks send their rows, a layer is whole while
                         ├──────────┤  rank 1     it computes; then each gradient's rows are summed on their rank
                         └──────────┘
"""
import torch
import torch.distributed as dist


def shard_model(model, env):
    """Split weights, and with them gradients and optimizer state, among the processes (FSDP2; Zhao et al. 2023). A
    block's weights are gathered when it computes, and forgotten when it has. A model on the meta device is filled with
    the weights that it would have had elsewhere, one parameter at a time."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # seconds to import
    mesh = dist.init_device_mesh(env.device.type, (env.world,))
    # in the dtype of its matmuls a block travels in half the time; gradients are still averaged in fp32
    policy = MixedPrecisionPolicy(env.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # the rest (embedding, norm, head) stays whole from the forward pass to the backward: the loss uses head_weight
    fully_shard(model, mesh=mesh)
    if next(model.parameters()).is_meta:
        shards = {name: shard_like(whole, model.get_parameter(name)) for name, whole in model.initial_weights()}
        model.load_state_dict(shards, strict=False, assign=True)  # not strict: the buffers are there already
    return model


def is_shard(tensor):
    return hasattr(tensor, "placements")


def shard_like(whole, p):
    """Return this process's shard of a whole tensor where p is a shard, else the tensor as it is."""
    if not is_shard(p):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def load_shards(folder, weights, optimizers):
    """Read what checkpoint.save() has written to folder into these very tensors, whole ones or shards, also where they
    are cut otherwise than those that were saved."""
    from torch.distributed.checkpoint import load
    for optimizer in optimizers:
        # averages come to be in a step: one without gradients, whose result is overwritten by what is read
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    states = [optimizer.state_dict() for optimizer in optimizers]
    load({"model": weights, "optimizers": states}, checkpoint_id=folder, no_dist=True)


def read_shards(folder):
    """Return the whole weights in a folder that checkpoint.save() has written, {name: tensor}."""
    from torch.distributed.checkpoint import FileSystemReader, load
    weights = {}
    for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load({"model": weights}, checkpoint_id=folder, no_dist=True)
    return weights
