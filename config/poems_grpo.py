# GRPO with a rule as the reward: poems that rhyme (recipes/rewards.py), which no other stage teaches. No reward model
# and no critic: eight answers to each title are compared with each other.
#   python prepare.py poems-prompts
#   python grpo.py config/poems_grpo.py          (2 cores: 7 to 10 minutes)
# Of the poems of the right form 49 % rhyme, 6 % before, and little of the rest is lost (docs/results.md).
data_dir = "data/poems-prompts"
init_from = "out/poems-sft"
out_dir = "out/poems-grpo"
reward = "recipes/rewards.py:rhyming"

advantage = "grpo"
group_size = 8
skip_flat_groups = True
batch_size = 16            # titles a step, 128 answers
max_new_tokens = 96
max_steps = 180
ppo_epochs = 1
minibatches = 2
kl_coef = 0.05
no_eos_penalty = 0.5
lr = 5e-4
min_lr = 1e-5
warmup_steps = 3

# also learn conversations in one update, poems in the next, so that the model forgets neither: with conversations alone
# poems needed 5 % more bits, with poems alone it no longer knew its name
ptx_dir = "data/poems-sft,data/poems"
ptx_coef = 0.08
ptx_rows = 16

eval_every = 60
