# The baby: 218 M parameters (12 layers x 1024, 8 heads, 1024 tokens, ChatGLM2's 64,793 tokens), 14 G tokens.
#   python prepare.py baby --input=YOUR_CORPUS --tokenizer=chatglm2/tokenizer.model
#   torchrun --standalone --nproc_per_node=4 pretrain.py config/baby.py
# Not trained to its end by us yet. `python -m tools.estimate config/baby.py` prints memory and hours.
data_dir = "data/baby"
out_dir = "out/baby"

dim = 1024
n_layers = 12
n_heads = 8
max_seq_len = 1024

batch_size = 32
grad_accum = 16            # 16 * 32 * 1024 = 524,288 tokens a step
max_steps = 26_700         # 14 G tokens
optimizer = "muon"
lr = 6e-4
min_lr = 6e-5
warmup_steps = 500
eval_every = 500

sample_start = "床前明月光"
