#!/usr/bin/env bash
# Where certainty ** alpha goes in TRL: a subclass of 23 lines.
#
# TRL 1.16.0's GRPOTrainer has no weight for the KL of a token. Its subclass below gets the weights
# once for each batch of answers, from the reference's logits, and puts kl.py's penalty in the place
# of TRL's. What surprised: the KL term cannot be reached from outside (it stands in the middle of a
# method of 270 lines), but TRL carries every tensor that a batch holds through its shuffling and
# splitting, so that the weights may travel there. Seen:
# - It trains: one step of GRPO, a two-layer GPT-2 with random weights, a tokenizer of characters.
# - The gradient of its KL term is that of kl.py on the same tensors, got without TRL, on-policy
#   and off-policy (where each token counts pi / pi_old times).
# - With alpha 0 it is that of TRL's own KL term: the weights are all that differs.
# This script needs two files of this project, kl.py and data.py, beside its folder.
#
# Run by hand: findings/trl_certainty.sh   (Python 3.11 or later; about 4 minutes)
# Output, Python 3.11:
#   one step, mean reward 0.098, the weights moved by up to 0.0100
#   96 tokens, weights 0.010 to 0.392
#   on-policy: relative difference of the gradient from kl.py's 1.7e-06;
#     with alpha 0 from TRL's own 9.7e-07; from TRL's without use_bias_correction_kl 6.4e-01
#   off-policy: relative difference of the gradient from kl.py's 1.5e-06;
#     with alpha 0 from TRL's own 6.3e-07; from TRL's without use_bias_correction_kl 1.5e+01
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
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

import data
from kl import certainty, prioritized_kl


class PrioritizedGRPOTrainer(GRPOTrainer):
    alpha = 3.0

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        T = batch["completion_ids"].shape[1]
        with torch.no_grad():  # the logits for the answer's T tokens stand one place before them
            logits = self.ref_model(ids, attention_mask=mask).logits[:, -T - 1:-1]
        return batch | dict(kl_weight=certainty(logits / self.temperature) ** self.alpha)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.logp = result[0]  # (B, T); in the loss, the policy's
        return result

    def _compute_loss(self, model, inputs):
        beta, self.beta = self.beta, 0.0  # TRL's own KL term is off while it computes its loss
        loss = super()._compute_loss(model, inputs)
        self.beta = beta
        ratio = (self.logp - inputs.get("old_per_token_logps", self.logp)).exp().detach()
        kl = ratio * prioritized_kl(self.logp, inputs["ref_per_token_logps"], inputs["kl_weight"])
        window = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"] * window / self.accelerator.num_processes
        return loss + beta * (kl * inputs["completion_mask"]).sum() / tokens


# A tiny model, whose tokenizer gives data.py's ids.
transformers.logging.disable_progress_bar()
ids = {char: i for i, char in enumerate(data.VOCAB)}
tokenizer = Tokenizer(models.WordLevel(ids, "u"))
tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n", pad_token="\n")
assert tokenizer("Input:\n12+3")["input_ids"] == data.encode("Input:\n12+3")
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config(
    vocab_size=len(data.VOCAB), n_positions=32, n_embd=32, n_layer=2, n_head=2,
    bos_token_id=None, eos_token_id=None, initializer_range=0.8, resid_pdrop=0, embd_pdrop=0,
    attn_pdrop=0)).save_pretrained("model")


def digits(completions, **_):
    """The reward: the share of digits in an answer."""
    return [sum(char.isdigit() for char in text) / max(1, len(text)) for text in completions]


def make(trainer_class, **settings):
    args = GRPOConfig(output_dir="run", beta=0.1, max_steps=1, learning_rate=0.01, logging_steps=1,
                      per_device_train_batch_size=4, gradient_accumulation_steps=2,
                      num_generations=8, max_completion_length=12, temperature=2.0, use_cpu=True,
                      bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
                      **settings)
    trainer = trainer_class("model", reward_funcs=digits, args=args, processing_class=tokenizer,
                            train_dataset=Dataset.from_dict({"prompt": ["12+3=", "40+5="]}))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# 1. It trains.
trainer = make(PrioritizedGRPOTrainer)
before = [p.clone() for p in trainer.model.parameters()]
trainer.train()
moved = max((p - q).abs().max().item() for p, q in zip(trainer.model.parameters(), before))
print(f"one step, mean reward {trainer.state.log_history[0]['reward']:.3f}, "
      f"the weights moved by up to {moved:.4f}")
assert moved > 0


def kl_gradient(trainer, batch):
    """Of the trainer's loss; with advantages of 0 its KL term is all of it."""
    grads = torch.autograd.grad(trainer._compute_loss(trainer.model, batch),
                                trainer.model.parameters())
    return torch.cat([g.flatten() for g in grads])


def exact_gradient(model, reference, batch, weight):
    """0.1 times the mean of pi / pi_old times kl.py's penalty, from the models' logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    actions, mask = batch["completion_ids"], batch["completion_mask"]
    logp, ref_logp = [
        (m(ids).logits[:, -actions.shape[1] - 1:-1] / 2).log_softmax(-1).gather(
            -1, actions[..., None])[..., 0] for m in (model, reference)]
    ratio = (logp - batch.get("old_per_token_logps", logp)).exp().detach()
    penalty = ratio * prioritized_kl(logp, ref_logp.detach(), weight)
    grads = torch.autograd.grad(0.1 * (penalty * mask).sum() / mask.sum(), model.parameters())
    return torch.cat([g.flatten() for g in grads])


def relative(found, right):
    return ((found - right).norm() / right.norm()).item()


# 2. Its gradient, with a policy that the step has moved away from the reference.
policy = GPT2LMHeadModel.from_pretrained("model")
policy.load_state_dict(trainer.model.state_dict())
reference = GPT2LMHeadModel.from_pretrained("model")
batch = trainer._generate_and_score_completions([{"prompt": "12+3="}] * 8)
batch["advantages"] = torch.zeros(8)
batch_alpha0 = batch | dict(kl_weight=torch.ones_like(batch["kl_weight"]))
mask = batch["completion_mask"]
print(f"{int(mask.sum())} tokens, weights {batch['kl_weight'][mask > 0].min():.3f} to "
      f"{batch['kl_weight'][mask > 0].max():.3f}")
stock = {}
for on in (True, False):
    stock[on] = make(GRPOTrainer, use_bias_correction_kl=on)
    stock[on].train()  # sets what its loss needs
    stock[on].model.load_state_dict(trainer.model.state_dict())
for name in ("on-policy", "off-policy"):
    old = {} if name == "on-policy" else dict(old_per_token_logps=batch["ref_per_token_logps"])
    found = kl_gradient(trainer, batch | old)
    right = exact_gradient(policy, reference, batch | old, batch["kl_weight"])
    found0 = kl_gradient(trainer, batch_alpha0 | old)
    error = relative(found, right), *[relative(found0, kl_gradient(stock[on], batch | old))
                                      for on in (True, False)]
    print(f"{name}: relative difference of the gradient from kl.py's {error[0]:.1e};\n  with alpha "
          f"0 from TRL's own {error[1]:.1e}; from TRL's without use_bias_correction_kl "
          f"{error[2]:.1e}")
    assert error[0] < 1e-4 and error[1] < 1e-4 and error[2] > 0.01
    assert relative(found, found0) > 0.01  # the weights do something
EOF
cd "$tmp"  # the trainer writes here
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
export PYTHONPATH="$project"
"$tmp/venv/bin/python" check.py
