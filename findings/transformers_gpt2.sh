#!/usr/bin/env bash
# Our checkpoint as a GPT-2 of transformers, and back; and how a wrong conversion loads silently.
#
# transformers 5.24.0. Its GPT-2 has nanoGPT's parameter names, as our model.py, but stores each
# matrix of a block as (inputs, outputs), the transpose of torch.nn.Linear's. Seen:
# - With the block's matrices transposed, the logits are equal to 1e-4, the greedy texts are the
#   same, and the way back gives the same bits.
# - A conversion that transposes only where the shapes differ loads with every key matched, as well:
#   attn.c_proj.weight is square. The logits are then wrong, with no error and no warning.
# - GPT2Config's default bos and eos are token 50256, also where the vocabulary has 40 tokens (it
#   warns): they must be None. `generate` then goes on to max_length, unless a StoppingCriteria says
#   where an answer is complete. Its default dropout is 0.1; our model has none.
# This script needs files of this project, beside its folder: model.py, data.py and the checkpoint
# assets/pretrained/n5_seed0.pt (or another, as its argument).
#
# Run by hand: findings/transformers_gpt2.sh [CHECKPOINT]   (Python 3.11 or later; about 4 minutes)
# Output, Python 3.11:
#   859,904 parameters, 368 tokens: logits from -13.0 to 24.2, largest difference 2.2e-05
#   saved by transformers, loaded and converted back: the same bits: True
#   greedy texts: 8 of 8 the same, 5 right
#   transposed only where the shapes differ: <All keys matched successfully>
#   largest difference 27.0
#   GPT2Config(vocab_size=40): bos 50256 eos 50256 dropout 0.1 0.1 0.1
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
checkpoint=$(realpath "${1:-$project/assets/pretrained/n5_seed0.pt}")
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
pip="$tmp/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0  # where the default build is for CUDA, PyTorch's smaller CPU build does, too
$pip transformers==5.24.0 numpy==2.4.6 tqdm==4.70.1

cat > "$tmp/check.py" <<'EOF'
import sys

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList

import data
import model


def transposed(weights):
    return {name: w.T if ".h." in name and w.dim() == 2 else w for name, w in weights.items()}


class AnswerComplete(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([data.is_complete(data.decode(ids)) for ids in input_ids.tolist()])


transformers.logging.disable_progress_bar()
gpt, facts = model.load_checkpoint(sys.argv[1], "cpu")
config = GPT2Config(**facts["config"], n_positions=gpt.config.block_size, bos_token_id=None,
                    eos_token_id=None, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
hf = GPT2LMHeadModel(config).eval()
hf.load_state_dict(transposed(gpt.state_dict()))
pairs = [(367, 28), (9, 9), (12345, 678), (99999, 1), (50505, 50505), (123456, 70),
         (458883, 91), (618767, 4321)]
prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
text = data.prompt(12345, 678) + data.answer(12345, 678)
ids = torch.tensor([data.encode(text)])

# 1. Logits, and the way back.
with torch.no_grad():
    ours, theirs = gpt(ids)[0], hf(ids).logits
    difference = (ours - theirs).abs().max().item()
print(f"{sum(p.numel() for p in gpt.parameters()):,} parameters, {ids.shape[1]} tokens: logits "
      f"from {ours.min():.1f} to {ours.max():.1f}, largest difference {difference:.1e}")
assert difference < 1e-4
hf.save_pretrained("gpt2")
back = model.GPT(gpt.config)
back.load_state_dict(transposed(GPT2LMHeadModel.from_pretrained("gpt2").state_dict()))
same = all(torch.equal(p, back.state_dict()[name]) for name, p in gpt.state_dict().items())
print("saved by transformers, loaded and converted back: the same bits:", same)
assert same

# 2. Greedy texts.
wanted, lengths = model.generate(gpt, prompts, gpt.config.block_size, temperature=0)
n_same = n_right = 0
for (a, b), prompt, row, n in zip(pairs, prompts, wanted.tolist(), lengths.tolist()):
    found = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                        do_sample=False, max_length=gpt.config.block_size,
                        stopping_criteria=StoppingCriteriaList([AnswerComplete()]))
    n_same += found[0].tolist() == row[:n]
    n_right += data.grade(data.decode(found[0].tolist()), a, b)
print(f"greedy texts: {n_same} of {len(pairs)} the same, {n_right} right")
assert n_same == len(pairs)

# 3. The conversion that transposes where it has to, to make the shapes fit.
wrong = GPT2LMHeadModel(config).eval()
shapes = {name: p.shape for name, p in wrong.state_dict().items()}
fitted = {name: w if w.shape == shapes[name] else w.T for name, w in gpt.state_dict().items()}
print("transposed only where the shapes differ:", wrong.load_state_dict(fitted))
with torch.no_grad():
    difference = (ours - wrong(ids).logits).abs().max().item()
print(f"largest difference {difference:.1f}")
assert difference > 0.1
default = GPT2Config(vocab_size=40)
print("GPT2Config(vocab_size=40): bos", default.bos_token_id, "eos", default.eos_token_id,
      "dropout", default.attn_pdrop, default.embd_pdrop, default.resid_pdrop)
assert default.bos_token_id == default.eos_token_id == 50256
assert default.attn_pdrop == default.embd_pdrop == default.resid_pdrop == 0.1
EOF
cd "$tmp"
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONPATH="$project"
"$tmp/venv/bin/python" check.py "$checkpoint"
