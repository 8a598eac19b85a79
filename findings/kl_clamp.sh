#!/usr/bin/env bash
# A KL loss clamped at 10 has no gradient where the policy is farthest from the reference.
#
# verl 0.9.1, OpenRLHF 0.11.2, SkyRL 0.3.0, AReaL 1.0.4: all four clamp k3 to [-10, 10] for each
# token (OpenRLHF and AReaL k1 and k2, too). Beyond a bound the clamp passes on no gradient, and
# nothing pulls the token back. Seen:
# - k3, in verl ("low_var_kl", its default type), SkyRL (its default) and OpenRLHF: no gradient once
#   a token's probability has fallen to 1/13.6 of the reference's (log-ratio -2.61), where it is
#   largest, -12.6, just before; nor once it has grown 60,000-fold (log-ratio 11).
# - k2, in OpenRLHF: no gradient beyond a log-ratio of 4.47 either way. With unbiased_gradient the
#   gradient is the log-ratio everywhere, whatever the estimator.
# - AReaL clamps as OpenRLHF does, but its KL is in the reward only: what is lost there is the
#   difference between a large penalty and a larger one.
# - verl's k2 ("mse") and "k3+" lose nothing: their gradient is the log-ratio everywhere.
# The packages are not imported, because they need a GPU's libraries: the functions are compiled
# from the released files, unchanged, and called.
#
# Run by hand: findings/kl_clamp.sh   (Linux with Python 3.11 or 3.12; 3 to 6 minutes)
# Output, Python 3.11:
#   gradient at log-ratio  -11.5   -5.0   -2.7   -2.6   -1.0    1.0    5.0   11.5   not 0 down to
#   verl k3                 0.00   0.00   0.00 -12.46  -1.72   0.63   0.99   0.00   -2.610, 1/13.6
#   SkyRL k3                0.00   0.00   0.00 -12.46  -1.72   0.63   0.99   0.00   -2.610, 1/13.6
#   OpenRLHF k3             0.00   0.00   0.00 -12.46  -1.72   0.63   0.99   0.00   -2.610, 1/13.6
#   OpenRLHF k2             0.00   0.00  -2.70  -2.60  -1.00   1.00   0.00   0.00   -4.472, 1/87.5
#   AReaL k2                0.00   0.00  -2.70  -2.60  -1.00   1.00   0.00   0.00   -4.472, 1/87.5
#   OpenRLHF k2 unbiased  -11.50  -5.00  -2.70  -2.60  -1.00   1.00   5.00  11.50   all
#   OpenRLHF k3 unbiased  -11.50  -5.00  -2.70  -2.60  -1.00   1.00   5.00  11.50   all
#   verl k2               -11.50  -5.00  -2.70  -2.60  -1.00   1.00   5.00  11.50   all
#   verl k3+              -11.50  -5.00  -2.70  -2.60  -1.00   1.00   5.00  11.50   all
#   AReaL, k1 in the reward, log-ratios -30 and -5: -10.0 -5.0
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
pip="$tmp/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.4.6
$pip --no-deps verl==0.9.1 openrlhf==0.11.2 skyrl==0.3.0 areal==1.0.4

cat > "$tmp/check.py" <<'EOF'
import __future__
import ast
import math
import sysconfig
import typing
from pathlib import Path

import torch

site = Path(sysconfig.get_paths()["purelib"])


def definitions(file, *names):
    """Compile the top-level functions, classes and constants of these names -> list of objects."""
    tree = ast.parse((site / file).read_text())
    named = [node for node in tree.body if getattr(node, "name", None) in names
             or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in names]
    space = dict(vars(typing), torch=torch)
    flags = __future__.annotations.compiler_flag  # annotations are not evaluated
    exec(compile(ast.Module(named, []), file, "exec", flags), space)
    return [space[name] for name in names]


verl, _ = definitions("verl/trainer/ppo/core_algos.py", "kl_penalty", "kl_penalty_forward")
openrlhf, _ = definitions("openrlhf/models/utils.py", "compute_approx_kl", "KL_IS_WEIGHT_CLIP")
[skyrl] = definitions("skyrl/backends/skyrl_train/utils/ppo_utils.py", "compute_approx_kl")
[areal] = definitions("areal/utils/data.py", "KLEstimator")
estimators = {
    "verl k3": lambda *x: verl(*x, "low_var_kl"),
    "SkyRL k3": lambda *x: skyrl(*x, kl_estimator_type="k3"),
    "OpenRLHF k3": lambda *x: openrlhf(*x, kl_estimator="k3"),
    "OpenRLHF k2": lambda *x: openrlhf(*x, kl_estimator="k2"),
    "AReaL k2": areal("k2"),
    "OpenRLHF k2 unbiased": lambda *x: openrlhf(*x, kl_estimator="k2", unbiased_gradient=True),
    "OpenRLHF k3 unbiased": lambda *x: openrlhf(*x, kl_estimator="k3", unbiased_gradient=True),
    "verl k2": lambda *x: verl(*x, "k2"),
    "verl k3+": lambda *x: verl(*x, "k3+"),
}
REF_LOGP = -1.0


def gradient(estimator, log_ratio):
    """Of one token's KL, with respect to its log-probability under the policy."""
    logp = torch.tensor([[REF_LOGP + log_ratio]], requires_grad=True)
    estimator(logp, torch.tensor([[REF_LOGP]])).sum().backward()
    return logp.grad.item()


def last_below(estimator):
    """The lowest log-ratio, in steps of 0.001, that still has a gradient; None if all to -15."""
    for step in range(1, 15001):
        if gradient(estimator, -step / 1000) == 0:
            return -(step - 1) / 1000


log_ratios = (-11.5, -5.0, -2.7, -2.6, -1.0, 1.0, 5.0, 11.5)
columns = "".join(f"{x:7.1f}" for x in log_ratios)
print(f"gradient at log-ratio{columns}   not 0 down to")
for name, estimator in estimators.items():
    found, lowest = [gradient(estimator, x) for x in log_ratios], last_below(estimator)
    print(f"{name:21}" + "".join(f"{x + 0.0:7.2f}" for x in found)
          + ("   all" if lowest is None else f"   {lowest:.3f}, 1/{math.exp(-lowest):.1f}"))
    if name.endswith("k3"):
        assert found[:3] == [0, 0, 0] and found[3] < -12 and found[-2] > 0.99 and found[-1] == 0
        assert abs(math.exp(-lowest) - 13.6) < 0.1
    elif name in ("OpenRLHF k2", "AReaL k2"):
        assert found[1] == 0 and found[2] < -2.69 and found[-3] > 0.99 and found[-2] == 0
        assert abs(lowest + math.sqrt(20)) < 0.002
    else:
        assert lowest is None
        assert all(abs(x - right) < 1e-4 for x, right in zip(found, log_ratios))
values = [areal("k1")(torch.tensor([x]), torch.tensor([0.0])).item() for x in (-30.0, -5.0)]
print("AReaL, k1 in the reward, log-ratios -30 and -5:", *values)
assert values == [-10, -5]
EOF
"$tmp/venv/bin/python" "$tmp/check.py"
