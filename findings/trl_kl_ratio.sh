#!/usr/bin/env bash
# TRL's GRPO: one setting, which changes neither the loss nor the logged KL, turns its gradient from
# one KL to the other.
#
# TRL 1.16.0, GRPOTrainer with beta > 0. The estimator is k3, and use_bias_correction_kl (default:
# on) multiplies it by the ratio pi / pi_old. On-policy this ratio is exactly 1, so that the loss
# and the logged "kl" are the same with it and without it; but it is differentiable. Seen:
# - on: the mean gradient is that of the reverse KL, KL(pi || pi_ref), which the logged value
#   estimates. For each token it is the log-ratio times the gradient of log pi, as with k2.
# - off: it is that of the forward KL, KL(pi_ref || pi).
# - There is no clamp: where the policy has all but dropped a token that the reference likes, the
#   gradient is large, with it and without it.
# The trainer's own loss is called for each of the vocabulary's tokens as a one-token answer, on a
# one-layer GPT-2 with random weights. Advantages are 0, so that the KL is all of the loss.
#
# Run by hand: findings/trl_kl_ratio.sh   (Python 3.11 or later; about 4 minutes)
# Output, Python 3.11:
#   13 tokens, KL(pi || pi_ref) 0.6178, KL(pi_ref || pi) 0.6652
#   use_bias_correction_kl=True: mean loss 0.6178, logged kl 0.6178
#     relative difference of its gradient from the reverse KL's: 3.3e-07
#     relative difference of its gradient from the forward KL's: 7.8e-01
#     one token at log-ratio -5: gradient -5.00 times that of log pi
#   use_bias_correction_kl=False: mean loss 0.6178, logged kl 0.6178
#     relative difference of its gradient from the reverse KL's: 7.0e-01
#     relative difference of its gradient from the forward KL's: 4.3e-07
#     one token at log-ratio -5: gradient -147.41 times that of log pi
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
        eos_token_id=None, initializer_range=0.3))


gpt2(0).save_pretrained("model")
policy = gpt2(1).eval()  # it differs from the reference
reference = GPT2LMHeadModel.from_pretrained("model").eval()
prompt = torch.tensor([tokenizer("1+2=")["input_ids"]])
logp, ref_logp = [m(prompt).logits[0, -1].log_softmax(-1) for m in (policy, reference)]


def relative(found, right):
    return ((found - right).norm() / right.norm()).item()


def gradient(loss, model):
    grads = torch.autograd.grad(loss, model.parameters(), retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


exact = {"reverse KL": gradient((logp.exp() * (logp - ref_logp.detach())).sum(), policy),
         "forward KL": gradient((ref_logp.detach().exp() * (ref_logp.detach() - logp)).sum(),
                                policy)}
print(f"{len(CHARS)} tokens, KL(pi || pi_ref) {(logp.exp() * (logp - ref_logp)).sum():.4f}, "
      f"KL(pi_ref || pi) {(ref_logp.exp() * (ref_logp - logp)).sum():.4f}")

logged = {}
for on in (True, False):
    args = GRPOConfig(output_dir="run", beta=1.0, use_bias_correction_kl=on, num_generations=2,
                      per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none")
    trainer = GRPOTrainer("model", reward_funcs=lambda completions, **_: [0.0] * len(completions),
                          args=args, processing_class=tokenizer,
                          train_dataset=Dataset.from_dict({"prompt": ["1+2="]}))
    trainer.model.load_state_dict(policy.state_dict())
    trainer.model.eval()

    def loss_of(token, ref_token_logp):
        return trainer._compute_loss(trainer.model, dict(
            prompt_ids=prompt, prompt_mask=torch.ones_like(prompt),
            completion_ids=torch.tensor([[token]]), completion_mask=torch.ones(1, 1).long(),
            advantages=torch.zeros(1), ref_per_token_logps=ref_token_logp.view(1, 1),
            num_items_in_batch=torch.tensor(1)))

    total, mean_loss = 0, 0
    for token, p in enumerate(logp.exp().tolist()):  # the mean over the policy's own tokens
        loss = loss_of(token, ref_logp[token].detach())
        mean_loss += p * loss.item()
        total = total + p * gradient(loss, trainer.model)
    kl = sum(p * x for p, x in zip(logp.exp().tolist(), trainer._metrics["eval"]["kl"]))
    error = {name: relative(total, right) for name, right in exact.items()}
    token = 3
    along = gradient(logp[token], policy)  # the gradient of one token's log pi
    far = gradient(loss_of(token, logp[token].detach() + 5), trainer.model)
    factor = (far @ along / (along @ along)).item()
    print(f"use_bias_correction_kl={on}: mean loss {mean_loss:.4f}, logged kl {kl:.4f}")
    for name, x in error.items():
        print(f"  relative difference of its gradient from the {name}'s: {x:.1e}")
    print(f"  one token at log-ratio -5: gradient {factor:.2f} times that of log pi")
    logged[on] = kl, mean_loss
    assert error["reverse KL" if on else "forward KL"] < 1e-4
    assert error["forward KL" if on else "reverse KL"] > 0.1
    assert abs(factor - (-5 if on else 1 - 148.41)) < 0.1
assert max(abs(x - y) for x, y in zip(*logged.values())) < 1e-6
EOF
cd "$tmp"  # the trainer writes here
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
"$tmp/venv/bin/python" check.py
