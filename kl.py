"""The prioritized KL penalty: hold the policy near the pre-trained model, except where that model is unsure.

"Ignore the KL Penalty! Boosting Exploration on Critical Tokens to Enhance RL Fine-Tuning" (arXiv 2502.06533).
B sequences, T tokens, V vocabulary. pi is the policy in training, pi_ref the frozen pre-trained model.
Our alpha is the exponent (the paper's beta); our kl_coef is the coefficient (the paper's alpha).
"""
import torch


def entropy(logits):
    """H(pi(.|s)) in nats: (..., V) -> (...). entr(p) = -p log p is 0 at p = 0, so a one-hot gives no NaN."""
    return torch.special.entr(torch.softmax(logits.float(), -1)).sum(-1)


def certainty(ref_logits):
    """Eq. 2: J(s) = (H_max - H(pi_ref(.|s))) / H_max.  (B, T, V) -> (B, T): exactly 0 = uniform, 1 = one-hot.

    H_max = log V, but taken from entropy() of V equal logits: it rounds as H does, and a uniform has exactly 0. What
    rounding leaves outside [0, 1] is clamped.
    Two equal choices of V = 4: H = log 2, H_max = log 4, J = 1/2.
    """
    h_max = entropy(torch.zeros_like(ref_logits))
    return ((h_max - entropy(ref_logits)) / h_max).clamp(0, 1)


def prioritized_kl(logp, ref_logp, ref_logits, alpha):
    """Eq. 1 for each token: J(s)^alpha * k2.  logp, ref_logp (B, T) of the tokens taken -> (B, T).

    k2 = (log pi - log pi_ref)^2 / 2 (Schulman 2020): on policy, the gradient of its mean is that of the KL itself.
    alpha = 0 is the standard penalty: x ** 0 is 1 for every x, 0 too. The gradient flows through logp alone.
    logp = -1, ref_logp = -3, J = 1/2, alpha = 1: (1/2) * 2^2 / 2 = 1.
    """
    weight = certainty(ref_logits.detach()) ** alpha
    return weight * (logp - ref_logp.detach()) ** 2 / 2
