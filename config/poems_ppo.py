# PPO on requests for poems: the reward is the reward model's score, minus a penalty for the KL from the SFT model.
# Without that penalty all poems become alike (runs/overoptimise.sh).
#   python prepare.py poems-prompts
#   python ppo.py config/poems_ppo.py            (2 cores, fp32: 2 minutes)
data_dir = "data/poems-prompts"
init_from = "out/poems-sft"
reward_from = "out/poems-reward"
out_dir = "out/poems-ppo"
watch = "recipes/rewards.py:quatrain"

batch_size = 64
max_new_tokens = 96
max_steps = 32
ppo_epochs = 2
minibatches = 2
kl_coef = 0.1
lr = 3e-4
min_lr = 3e-5
critic_lr = 3e-4
warmup_steps = 5
critic_warmup = 2

ptx_dir = "data/poems-sft" # also some conversations of SFT in every update, so that the model does not forget them
ptx_coef = 0.05
ptx_rows = 8

eval_every = 16
