#!/usr/bin/env bash
# Five trainers, five default KL penalties: none, or in the reward, or in the loss with one of two
# opposite gradients.
#
# TRL 1.16.0 (GRPO), verl 0.9.1, OpenRLHF 0.11.2, SkyRL 0.3.0, AReaL 1.0.4. Seen:
# - TRL and verl have no KL penalty at all until it is switched on. OpenRLHF and AReaL have one in
#   the reward (k1; AReaL once a reference model is configured), SkyRL one in the loss (k3).
# - On-policy, the mean gradient of a plain k3 in the loss (verl, SkyRL) is that of the forward KL,
#   KL(pi_ref || pi). That of verl's "k3+" and of OpenRLHF with unbiased_gradient, whatever its
#   estimator, is that of the reverse KL, KL(pi || pi_ref), as is that of k1 in the reward. k1 in
#   the loss has no mean gradient, so it holds nothing back. (TRL: see trl_kl_ratio.sh.)
# - SkyRL averages the KL within an answer and then over answers, but the policy loss over all
#   tokens: in answers of 1 and 9 tokens, the token of the short one has 9 times the KL of one of
#   the long one's, at the same policy loss.
# The packages are not imported, because they need a GPU's libraries: the defaults are read from the
# released files, and the functions are compiled from there, unchanged, and called.
#
# Run by hand: findings/kl_defaults.sh   (Linux with Python 3.11 or 3.12; about 3 minutes)
# Output, Python 3.11:
#   defaults
#   TRL      beta, use_bias_correction_kl, loss_type: 0.0 True dapo
#   verl     use_kl_loss, its type and coef, loss_agg_mode: False low_var_kl 0.001 token-mean
#   verl     use_kl_in_reward, kl_penalty (its estimator there): False kl
#   OpenRLHF use_loss, estimator, coef, unbiased, loss_agg_mode: False k1 0.01 False token-mean
#   SkyRL    use_kl_loss, in_reward, estimator, coef, loss_reduction: True False k3 0.001 token_mean
#   AReaL    estimator, kl_ctl (in the reward): k1 0.1
#   on-policy, the mean gradient is that of the
#   verl     low_var_kl (k3), in the loss             forward KL
#   verl     k3+, in the loss                         reverse KL
#   verl     k2 (mse), in the loss                    reverse KL
#   verl     k1 (kl), in the loss                     none
#   SkyRL    k3, in the loss                          forward KL
#   OpenRLHF k3, in the loss                          forward KL
#   OpenRLHF k1 with unbiased_gradient, in the loss   reverse KL
#   OpenRLHF k1, in the reward                        reverse KL
#   AReaL    k1, in the reward                        reverse KL
#   SkyRL, the weight of a token of an answer of 1 and of an answer of 9 tokens
#   in the policy loss 0.1000 0.1000, in the KL 0.5000 0.0556
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
pip="$tmp/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.4.6 pyyaml==6.0.4
$pip --no-deps trl==1.16.0 verl==0.9.1 openrlhf==0.11.2 skyrl==0.3.0 areal==1.0.4

cat > "$tmp/check.py" <<'EOF'
import __future__
import ast
import sysconfig
import typing
from pathlib import Path

import torch
import yaml

site = Path(sysconfig.get_paths()["purelib"])


def definitions(file, *names):
    """Compile the top-level functions, classes and constants of these names -> {name: object}."""
    tree = ast.parse((site / file).read_text())
    named = [node for node in tree.body if getattr(node, "name", None) in names
             or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in names]
    space = dict(vars(typing), torch=torch)
    flags = __future__.annotations.compiler_flag  # annotations are not evaluated
    exec(compile(ast.Module(named, []), file, "exec", flags), space)
    return {name: space[name] for name in names}


def field_default(file, class_name, name):
    """The default of a dataclass's field, `x: t = 1` or `x: t = field(default=1)`."""
    tree = ast.parse((site / file).read_text())
    [cls] = [node for node in tree.body if getattr(node, "name", None) == class_name]
    [value] = [node.value for node in cls.body
               if isinstance(node, ast.AnnAssign) and node.target.id == name]
    if isinstance(value, ast.Call):
        [value] = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
    return ast.literal_eval(value)


def option_default(file, option):
    """The default of a command-line option of argparse."""
    for node in ast.walk(ast.parse((site / file).read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if node.args[0].value == option:
                [value] = [k.value for k in node.keywords if k.arg == "default"]
                return ast.literal_eval(value)


# 1. The defaults.
trl = [field_default("trl/trainer/grpo_config.py", "GRPOConfig", name)
       for name in ("beta", "use_bias_correction_kl", "loss_type")]
actor = yaml.safe_load((site / "verl/trainer/config/actor/actor.yaml").read_text())
algorithm = yaml.safe_load((site / "verl/trainer/config/ppo_trainer.yaml").read_text())["algorithm"]
verl = [actor["use_kl_loss"], actor["kl_loss_type"], actor["kl_loss_coef"], actor["loss_agg_mode"],
        algorithm["use_kl_in_reward"], algorithm["kl_penalty"]]
options = ("kl.use_loss", "kl.estimator", "kl.init_coef", "kl.unbiased_gradient")
openrlhf = [option_default("openrlhf/cli/train_ppo_ray.py", f"--algo.{name}") for name in options]
openrlhf.append(option_default("openrlhf/cli/train_ppo_ray.py", "--actor.loss_agg_mode"))
skyrl = [field_default("skyrl/train/config/config.py", "AlgorithmConfig", name) for name in
         ("use_kl_loss", "use_kl_in_reward", "kl_estimator_type", "kl_loss_coef", "loss_reduction")]
areal = [field_default("areal/api/cli_args.py", "PPOActorConfig", name)
         for name in ("kl_estimator", "kl_ctl")]
print("defaults")
print("TRL      beta, use_bias_correction_kl, loss_type:", *trl)
print("verl     use_kl_loss, its type and coef, loss_agg_mode:", *verl[:4])
print("verl     use_kl_in_reward, kl_penalty (its estimator there):", *verl[4:])
print("OpenRLHF use_loss, estimator, coef, unbiased, loss_agg_mode:", *openrlhf)
print("SkyRL    use_kl_loss, in_reward, estimator, coef, loss_reduction:", *skyrl)
print("AReaL    estimator, kl_ctl (in the reward):", *areal)
assert trl == [0.0, True, "dapo"]
assert verl == [False, "low_var_kl", 0.001, "token-mean", False, "kl"]
assert openrlhf == [False, "k1", 0.01, False, "token-mean"]
assert skyrl == [True, False, "k3", 0.001, "token_mean"]
assert areal == ["k1", 0.1]

# 2. The mean gradient over the policy's own tokens, with respect to its logits.
verl_kl = definitions("verl/trainer/ppo/core_algos.py", "kl_penalty", "kl_penalty_forward")
verl_kl = verl_kl["kl_penalty"]
openrlhf_kl = definitions("openrlhf/models/utils.py", "compute_approx_kl", "KL_IS_WEIGHT_CLIP")
openrlhf_kl = openrlhf_kl["compute_approx_kl"]
skyrl_kl = definitions("skyrl/backends/skyrl_train/utils/ppo_utils.py", "compute_approx_kl",
                       "apply_loss_reduction_to_advantages_minibatch")
skyrl_reduction = skyrl_kl["apply_loss_reduction_to_advantages_minibatch"]
skyrl_kl = skyrl_kl["compute_approx_kl"]
areal_kl = definitions("areal/utils/data.py", "KLEstimator")["KLEstimator"]("k1")

torch.manual_seed(0)
logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
ref_logp = torch.randn(6, dtype=torch.float64).log_softmax(-1)


def gradient(objective):
    logp = logits.log_softmax(-1)
    return torch.autograd.grad(objective(logp), logits)[0]


def in_loss(estimator):
    return gradient(lambda logp: (logp.exp().detach() * estimator(logp, ref_logp)).sum())


def in_reward(estimator):  # REINFORCE: minus reward times log-probability
    return gradient(lambda logp: (logp.exp() * estimator(logp, ref_logp)).detach() @ logp)


exact = {"reverse KL": gradient(lambda logp: (logp.exp() * (logp - ref_logp)).sum()),
         "forward KL": gradient(lambda logp: (ref_logp.exp() * (ref_logp - logp)).sum()),
         "none": torch.zeros(6, dtype=torch.float64)}


def kind(found):
    [name] = [name for name, right in exact.items() if (found - right).abs().max() < 1e-6]
    return name


print("on-policy, the mean gradient is that of the")
rows = [
    ("verl     low_var_kl (k3), in the loss", in_loss, lambda *x: verl_kl(*x, "low_var_kl"),
     "forward KL"),
    ("verl     k3+, in the loss", in_loss, lambda *x: verl_kl(*x, "k3+"), "reverse KL"),
    ("verl     k2 (mse), in the loss", in_loss, lambda *x: verl_kl(*x, "k2"), "reverse KL"),
    ("verl     k1 (kl), in the loss", in_loss, lambda *x: verl_kl(*x, "kl"), "none"),
    ("SkyRL    k3, in the loss", in_loss, skyrl_kl, "forward KL"),
    ("OpenRLHF k3, in the loss", in_loss, lambda *x: openrlhf_kl(*x, kl_estimator="k3"),
     "forward KL"),
    ("OpenRLHF k1 with unbiased_gradient, in the loss", in_loss,
     lambda *x: openrlhf_kl(*x, unbiased_gradient=True), "reverse KL"),
    ("OpenRLHF k1, in the reward", in_reward, openrlhf_kl, "reverse KL"),
    ("AReaL    k1, in the reward", in_reward, areal_kl, "reverse KL"),
]
for name, place, estimator, expected in rows:
    found = kind(place(estimator))
    print(f"{name:50}{found}")
    assert found == expected

# 3. SkyRL's two averages: the weight of each token in the policy loss and in the KL.
worker = (site / "skyrl/backends/skyrl_train/workers/worker.py").read_text()
assert "masked_mean(kl_loss, loss_mask, dim=-1).mean()" in worker
masked_mean = definitions("skyrl/backends/skyrl_train/utils/torch_utils.py", "masked_mean")
mask = torch.tensor([[1.0] + 8 * [0.0], 9 * [1.0]])  # answers of 1 and 9 tokens
policy_weight = skyrl_reduction(torch.ones(2, 9), mask, skyrl[-1], 2, 9) * mask
kl = torch.zeros(2, 9, requires_grad=True)
masked_mean["masked_mean"](kl, mask, dim=-1).mean().backward()
print("SkyRL, the weight of a token of an answer of 1 and of an answer of 9 tokens")
print(f"in the policy loss {policy_weight[0, 0]:.4f} {policy_weight[1, 0]:.4f}, "
      f"in the KL {kl.grad[0, 0]:.4f} {kl.grad[1, 0]:.4f}")
assert torch.isclose(policy_weight[0, 0], policy_weight[1, 0])
assert torch.isclose(kl.grad[0, 0], 9 * kl.grad[1, 0])
EOF
"$tmp/venv/bin/python" "$tmp/check.py"
