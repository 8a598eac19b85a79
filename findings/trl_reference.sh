#!/usr/bin/env bash
# TRL's reference is not a copy of the model that it is given.
#
# TRL 1.16.0, GRPOTrainer(model, ...) with beta > 0 and without PEFT. The reference is loaded anew
# from the path that the model's config remembers (_name_or_path: where from_pretrained read it).
# So a model that was changed in memory since (weights converted from another format, more
# fine-tuning) is held near the weights on disk, not near those that it starts with. Seen:
# - After such a change, the reference has the weights on disk, and the first step, before any
#   update, logs a KL above 0.
# - Saved once more and loaded from there, the reference has the weights that the policy starts
#   with, and the first KL is 0: this is the way to do it.
# One step of GRPO, on a one-layer GPT-2 with random weights and a tokenizer of characters.
#
# Run by hand: findings/trl_reference.sh   (Python 3.11 or later; about 5 minutes)
# Output, Python 3.11:
#   changed in memory: the reference has the weights on disk: True;
#     the policy's first weights: False; first kl 0.8708
#   saved and loaded again: the policy's first weights: True; first kl 0.0000
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
pip="$tmp/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0  # where the default build is for CUDA, PyTorch's smaller CPU build does, too
$pip trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 tokenizers==0.23.3

cat > "$tmp/check.py" <<'EOF'
import torch
import transformers
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

transformers.logging.disable_progress_bar()
CHARS = "\n0123456789+="  # a token is a character; the line break ends an answer
tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(CHARS)}, "="))
tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n", pad_token="\n")


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(CHARS), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=None, initializer_range=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def same_weights(model, state):
    return all(torch.equal(model.state_dict()[name], p) for name, p in state.items())


def first_step(model):
    """-> (the trainer, the weights that its policy started with, the KL that step 1 logs)."""
    args = GRPOConfig(output_dir="run", beta=0.1, max_steps=1, logging_steps=1, use_cpu=True,
                      bf16=False, per_device_train_batch_size=8, num_generations=8,
                      max_completion_length=8, report_to="none", save_strategy="no",
                      disable_tqdm=True)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    trainer = GRPOTrainer(model, reward_funcs=lambda completions, **_: [float(len(text))
                                                                       for text in completions],
                          args=args, processing_class=tokenizer,
                          train_dataset=Dataset.from_dict({"prompt": ["1+2="]}))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer, start, float(trainer.state.log_history[0]["kl"])


on_disk, other = gpt2(0).state_dict(), gpt2(1).state_dict()
gpt2(0).save_pretrained("model")
model = GPT2LMHeadModel.from_pretrained("model")
model.load_state_dict(other)  # changed in memory
trainer, start, kl = first_step(model)
is_disk, is_start = [same_weights(trainer.ref_model, state) for state in (on_disk, start)]
print(f"changed in memory: the reference has the weights on disk: {is_disk};\n"
      f"  the policy's first weights: {is_start}; first kl {kl:.4f}")
assert is_disk and not is_start and kl > 0.01

model = GPT2LMHeadModel.from_pretrained("model")
model.load_state_dict(other)
model.save_pretrained("changed")
trainer, start, kl = first_step(GPT2LMHeadModel.from_pretrained("changed"))
is_start = same_weights(trainer.ref_model, start)
print(f"saved and loaded again: the policy's first weights: {is_start}; first kl {kl:.4f}")
assert is_start and abs(kl) < 1e-5
EOF
cd "$tmp"  # the trainer writes here
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
"$tmp/venv/bin/python" check.py
