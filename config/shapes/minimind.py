# 64 M parameters in the shape of minimind-3: 8 layers x 768, 8 query and 4 key/value heads, vocabulary 6,400, QK-norm.
#   python prepare.py minimind --input=YOUR_CORPUS --vocab_size=6400
#   torchrun --standalone --nproc_per_node=1 pretrain.py config/shapes/minimind.py
# Not trained to its end by us yet.
data_dir = "data/minimind"
out_dir = "out/minimind"

dim = 768
n_layers = 8
n_heads = 8
n_kv_heads = 4
hidden_dim = 2432
qk_norm = True
rope_theta = 1e6
max_seq_len = 512

batch_size = 64
grad_accum = 8             # 8 * 64 * 512 = 262,144 tokens a step
max_steps = 6_000
lr = 1e-3
min_lr = 1e-4
warmup_steps = 200
eval_every = 500
