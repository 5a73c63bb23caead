# 65 G parameters: the shape of LLaMA 65B (Touvron et al. 2023, table 2), its batch of 4 M tokens, 1.4 T tokens. On each
# of sixteen machines with eight GPUs of 80 GB, HOST being one of them:
# torchrun --nnodes=16 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py config/shapes/llama65b.py
# Never run by us. `tools.estimate`: 52 GiB a process on 128 GPUs; 390,000 GPU hours of H100: 127 days here.
data_dir = "data/llama"
out_dir = "out/llama65b"

dim = 8192
n_layers = 80
n_heads = 64
hidden_dim = 22016
max_seq_len = 2048
tie_embeddings = False

shard = True
checkpoint_blocks = True
batch_size = 4             # as many rows as fit: every micro-step waits for all weights to travel
grad_accum = 512           # 512 * 4 * 2048 = 4,194,304 tokens a step
max_steps = 333_800        # 1.4 T tokens
lr = 1.5e-4
min_lr = 1.5e-5
warmup_steps = 2000
eval_every = 1000
