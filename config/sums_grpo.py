# GRPO on sums: the reward is for the right number alone (recipes/sums.py), not for thinking.
#   python prepare.py sums-prompts --input=data/raw/sums/prompts.jsonl --kind=prompts --tokenizer=data/sums
#   python grpo.py config/sums_grpo.py
data_dir = "data/sums-prompts"
init_from = "out/sums-sft"
out_dir = "out/sums-grpo"
reward = "recipes/sums.py:right"
watch = "recipes/sums.py:thinks"

advantage = "grpo"
group_size = 8
skip_flat_groups = True
batch_size = 32            # questions a step, 256 answers
max_new_tokens = 72
max_steps = 30
minibatches = 2
kl_coef = 0.01
no_eos_penalty = 0.1
lr = 2e-4
min_lr = 2e-5
warmup_steps = 3

eval_every = 15
eval_prompts = 64
