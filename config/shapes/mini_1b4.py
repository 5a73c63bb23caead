# 1.4 G parameters in Qwen's layout (bias in q, k, v; Qwen's 151,851 tokens). One GPU of 80 GB, or several.
#   python prepare.py mini --input=YOUR_CORPUS --tokenizer=qwen.tiktoken
#   torchrun --standalone --nproc_per_node=8 pretrain.py config/shapes/mini_1b4.py
# Not trained to its end by us yet. `python -m tools.estimate` prints memory and hours.
data_dir = "data/mini"
out_dir = "out/mini_1b4"

dim = 2048
n_layers = 22
n_heads = 16
hidden_dim = 5504
qkv_bias = True
max_seq_len = 2048

batch_size = 4
grad_accum = 128           # 128 * 4 * 2048 = 1,048,576 tokens a step
max_steps = 28_000         # 29 G tokens
optimizer = "muon"
lr = 4e-4
min_lr = 4e-5
warmup_steps = 1000
eval_every = 500
