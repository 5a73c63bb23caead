# DPO on poems-pairs from the SFT model.
#   python prepare.py poems-pairs
#   python dpo.py config/poems_dpo.py            (2 cores, fp32: 2 minutes)
# With adapters: --lora_rank=8 --lr=3e-4 --out_dir=out/poems-dpo-lora
data_dir = "data/poems-pairs"
init_from = "out/poems-sft"
out_dir = "out/poems-dpo"

loss = "dpo"
beta = 0.1
nll_weight = 0.1           # also learn the chosen answers as in SFT: else their log-probs fall with the rejected ones'

ptx_dir = "data/poems-sft" # also some conversations of SFT in every step, so that the model does not forget them
ptx_coef = 0.3
ptx_rows = 8

batch_size = 32            # about 100 answers, 6,600 tokens
max_steps = 80
lr = 4e-5
min_lr = 4e-6
warmup_steps = 10

eval_every = 40
eval_prompts = 300

log_every = 10
dtype = "float32"          # for CPUs: bf16 matmuls need time to prepare for every new shape, and shapes change here
