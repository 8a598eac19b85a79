"""The prioritized KL penalty: stay near the pre-trained model, but less where it is unsure.

"Ignore the KL Penalty! Boosting Exploration on Critical Tokens to Enhance RL Fine-Tuning"
(arXiv 2502.06533). B sequences, T tokens, V vocabulary; pi is the policy, pi_ref the frozen
pre-trained model. Our alpha is the exponent (the paper's beta).
"""
import math

import torch.nn.functional as F


def certainty(ref_logits):
    """Eq. 2: J(s) = (H_max - H(pi_ref(.|s))) / H_max with H_max = log V.  (B, T, V) -> (B, T).

    1 = certain, 0 = uniform. Two equally likely tokens of V = 4: J = 1 - log 2 / log 4 = 1/2; a
    token of probability 0, even one with a logit of -inf, adds nothing to H.
    """
    logp = F.log_softmax(ref_logits, -1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)  # in nats; p log p is 0 where p is 0
    return (1 - entropy / math.log(ref_logits.shape[-1])).clamp(0, 1)  # against rounding


def prioritized_kl(logp, ref_logp, weight):
    """Eq. 1 for each token taken: weight * k2, with weight = J(s)^alpha.  All (B, T) -> (B, T).

    k2 = (log pi - log pi_ref)^2 / 2 (Schulman 2020). On-policy, its mean gradient is that of the
    KL; ref_logp and weight are constants. alpha = 0: every weight is 1, the standard penalty, and
    the weight may then be the number 1.
    logp = -1, ref_logp = -3, weight = 1/2: (1/2) * 2^2 / 2 = 1.
    """
    return weight * (logp - ref_logp) ** 2 / 2
