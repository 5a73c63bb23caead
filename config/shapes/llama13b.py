# 13 G parameters: the shape of LLaMA 13B (Touvron et al. 2023, table 2), its batch of 4 M tokens, 1 T tokens. On each
# of four machines with eight GPUs of 80 GB, HOST being one of them:
#   torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py config/shapes/llama13b.py
# Never run by us. `tools.estimate`: 53 GiB a process on 32 GPUs, 71 on 8; 56,000 GPU hours of H100: 73 days here.
data_dir = "data/llama"
out_dir = "out/llama13b"

dim = 5120
n_layers = 40
n_heads = 40
hidden_dim = 13824
max_seq_len = 2048
tie_embeddings = False

shard = True
checkpoint_blocks = True
batch_size = 16            # as many rows as fit: every micro-step waits for all weights to travel
grad_accum = 128           # 128 * 16 * 2048 = 4,194,304 tokens a step
max_steps = 238_500        # 1 T tokens
lr = 3e-4
min_lr = 3e-5
warmup_steps = 2000
eval_every = 1000
