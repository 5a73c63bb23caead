# 1.4 G parameters for GPUs of 24 GB: a LLaMA of 24 layers x 2048, 20 tokens a parameter.
#   torchrun --standalone --nproc_per_node=8 pretrain.py config/shapes/llama1b.py
# Never run by us. `tools.estimate`: 24.6 GiB alone, 8.8 GiB a process on 8 GPUs; 1,000 GPU hours of 4090, 170 of H100.
data_dir = "data/llama"
out_dir = "out/llama1b"

dim = 2048
n_layers = 24
n_heads = 16
max_seq_len = 2048
tie_embeddings = False

shard = True
checkpoint_blocks = True
batch_size = 4
grad_accum = 128           # 128 * 4 * 2048 = 1,048,576 tokens a step
max_steps = 27_000         # 28 G tokens
lr = 3e-4
min_lr = 3e-5
warmup_steps = 1000
eval_every = 500
