# Mixture of experts beside a dense model of the same active size: dim 512, 8 layers; 16 routed experts of which a token
# uses 3, and one shared. The dense twin is this file with --n_experts=0 --out_dir=out/moe-dense.
#   python pretrain.py config/shapes/moe.py
# Not compared over a full run by us yet.
data_dir = "data/poems"
out_dir = "out/moe"

dim = 512
n_layers = 8
n_heads = 8
n_kv_heads = 4
hidden_dim = 1408
n_experts = 16
n_active_experts = 3
n_shared_experts = 1
expert_hidden_dim = 352    # (3 + 1) * 352 = 1408: as many multiplications a token as the dense layer
max_seq_len = 512

batch_size = 32
grad_accum = 4
max_steps = 2_000
lr = 1e-3
warmup_steps = 100
