"""Fine-tune a pre-trained model with PPO on additions that are longer than any it has seen.

Run:  python ppo.py --alpha 3

The task as a Markov decision process: the state is the text so far, the action the next character, an episode one
answer. The reward is 0 until the end and there 1 if the result is right. The loss holds the policy near the
pre-trained model with the prioritized KL penalty of kl.py. Writes out/<run>/model.pt, log.csv and settings.json.
B sequences, T actions, V vocabulary; every (B, T) tensor is aligned to the actions, see model.split_actions.
"""
import argparse
import copy
import csv
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import pretrain
from kl import certainty, prioritized_kl
from model import PRESETS, generate, split_actions
from pretrain import UserError, answer_loss, autocast, bootstrap, require, sample_problems, solve, to_batch


# --------------------------------------------------------------------------- the algorithm, as pure functions
class ValueHead(nn.Sequential):
    """The critic: hidden state (B, T, C) -> expected reward (B, T). An MLP (128, 128), as in the paper."""

    def __init__(self, n_embd):
        super().__init__(nn.Linear(n_embd, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1), nn.Flatten(-2))


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016), all (B, T) -> advantages (B, T), 0 outside the mask.

    delta_t = r_t + gamma V(s_t+1) - V(s_t);  A_t = delta_t + gamma lam A_t+1
    """
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    T = values.shape[1]
    for t in reversed(range(T)):
        # No bootstrap after the last action: the episode ended there, and what follows is worth 0.
        next_value = values[:, t + 1] * mask[:, t + 1] if t + 1 < T else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = advantages[:, t] = (delta + gamma * lam * following) * mask[:, t]
    return advantages


def masked_mean(x, mask):
    """Mean of x (B, T) over the actions with mask 1."""
    return (x * mask).sum() / mask.sum()


def ppo_loss(new_logp, old_logp, advantages, mask, clip):
    """The clipped surrogate (Schulman et al. 2017, eq. 7), negated to be minimized. All (B, T) -> a scalar.

    While new_logp equals old_logp, the ratio is 1, nothing is clipped, and the gradient is that of
    -advantages * new_logp. With one epoch of one minibatch that is always so: PPO is then A2C, the paper's algorithm.
    """
    ratio = (new_logp - old_logp).exp()
    return -masked_mean(torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def token_logp(logits, actions):
    """Log-probability of each action: logits (B, T, V), actions (B, T) -> (B, T)."""
    return F.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]


def explained_variance(returns, values, mask):
    """1 - Var(returns - values) / Var(returns) over the mask: 1 = perfect critic, 0 = no better than a constant."""
    returns, values = returns[mask > 0], values[mask > 0]
    variance = returns.var(correction=0)
    # Where all returns are equal, up to rounding, there is nothing to explain.
    return 1 - (returns - values).var(correction=0) / variance if variance > 1e-8 else torch.tensor(float("nan"))


# --------------------------------------------------------------------------- the three steps of an iteration
def logits_of(model, states, temperature):
    """(B, T) -> tempered logits (B, T, V) in float32, the one distribution that samples and scores, and hidden states."""
    with autocast(states.device):
        logits, hidden = model(states)
    return logits.float() / temperature, hidden.float()


def slices(n, device):
    """Indices 0..n-1 in slices that fit a CPU's cache, or a GPU's memory: gradients are summed over them."""
    return torch.arange(n).split(8 if device.type == "cpu" else 64)


@torch.no_grad()
def rollout(policy, value_head, reference, pairs, args, seed):
    """Let the policy answer; grade; score every token once -> a dict of (B, T) tensors, and the tokens generated."""
    device = policy.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
    ids, lengths = generate(policy, prompts, policy.config.block_size, args.temperature, generator)
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    states, actions, mask = split_actions(ids, prompt_len, lengths)

    texts = [data.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    success = torch.tensor([data.grade(text, a, b) for text, (a, b) in zip(texts, pairs)], dtype=torch.float, device=device)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(pairs)), lengths - 2] = success  # action t is token t + 1: the last is lengths - 2

    scores = []
    for rows in slices(len(pairs), device):
        ref_logits, _ = logits_of(reference, states[rows], args.temperature)
        logits, hidden = logits_of(policy, states[rows], args.temperature)
        scores.append((ref_logits, token_logp(ref_logits, actions[rows]), token_logp(logits, actions[rows]), value_head(hidden)))
    ref_logits, ref_logp, old_logp, values = (torch.cat(parts) for parts in zip(*scores))
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    return dict(states=states, actions=actions, mask=mask, ref_logits=ref_logits, ref_logp=ref_logp, old_logp=old_logp,
                advantages=advantages, values=values, returns=advantages + values, success=success), int(mask.sum())


def update(policy, value_head, optimizer, batch, args, generator):
    """Several epochs of minibatches over one batch of episodes -> means over all of them, by name.

    Every mean is over answer tokens. --epochs 1 --minibatches 1 is A2C: one gradient at the policy that acted.
    """
    mask, device = batch["mask"], batch["mask"].device
    mean = masked_mean(batch["advantages"], mask)
    std = masked_mean((batch["advantages"] - mean) ** 2, mask).sqrt()
    advantages = (batch["advantages"] - mean) / std.clamp(min=0.1)  # a floor: where no answer is right, noise stays small
    sums = {}
    for _ in range(args.epochs):
        for rows in torch.randperm(len(mask), generator=generator).tensor_split(args.minibatches):
            n_tokens = mask[rows].sum()
            optimizer.zero_grad()
            for part in slices(len(rows), device):
                b = {name: x[rows[part]] for name, x in batch.items()}
                logits, hidden = logits_of(policy, b["states"], args.temperature)  # (B, T, V), (B, T, C)
                all_logp = F.log_softmax(logits, -1)
                new_logp = token_logp(logits, b["actions"])  # (B, T)
                entropy = -(all_logp.exp() * all_logp).sum(-1)
                penalty = prioritized_kl(new_logp, b["ref_logp"], b["ref_logits"], args.alpha)
                # The critic learns on its own: its loss, of a reward 400 tokens away, would disturb the policy's trunk.
                value_loss = (value_head(hidden.detach()) - b["returns"]) ** 2 / 2
                loss = (ppo_loss(new_logp, b["old_logp"], advantages[rows[part]], b["mask"], args.clip)
                        + masked_mean(args.kl_coef * penalty - args.entropy_coef * entropy + value_loss, b["mask"]))
                share = b["mask"].sum() / n_tokens  # of this slice in the minibatch's mean
                (loss * share).backward()
                with torch.no_grad():
                    ratio = (new_logp - b["old_logp"]).exp()
                    kl = (all_logp.exp() * (all_logp - F.log_softmax(b["ref_logits"], -1))).sum(-1)  # exact: V is small
                    for name, x in dict(kl=kl, penalty=penalty, entropy=entropy, clip_fraction=((ratio - 1).abs() > args.clip).float(),
                                        value_loss=value_loss, weight=certainty(b["ref_logits"]) ** args.alpha).items():
                        sums[name] = sums.get(name, 0) + masked_mean(x, b["mask"]) * share / (args.epochs * args.minibatches)
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    return {name: x.item() for name, x in sums.items()}


# --------------------------------------------------------------------------- what is watched
CRITICAL = [(line, operand) for line in (1, 2, 3) for operand in (1, 2)]


@torch.no_grad()
def critical_tokens(model, pairs, n_digits, temperature):
    """Probability of the right token and certainty at the critical tokens, fed the right answer up to each.

    Returns {"p_critical", "certainty_critical": means over all of them; "p_l1o1", "certainty_l1o1", ...: over the
    commas of line 1, operand 1, ...: the six that the paper's Figure 7 follows}.
    """
    device = model.lm_head.weight.device
    ids, prompt_len, lengths = to_batch(pairs, device)
    states, actions, _ = split_actions(ids, prompt_len, lengths)
    p, sure = [], []
    for rows in slices(len(pairs), device):
        logits, _ = logits_of(model, states[rows], temperature)
        p.append(token_logp(logits, actions[rows]).exp())
        sure.append(certainty(logits))
    p, sure = torch.cat(p).cpu(), torch.cat(sure).cpu()
    places = [(row, index - 1, key) for row, (a, b) in enumerate(pairs)  # token i is action i - 1
              for key, index in data.critical_positions(a, b, n_digits).items()]
    groups = {"critical": places} | {f"l{line}o{operand}": [x for x in places if x[2][:2] == (line, operand) and "comma" in x[2][2]]
                                     for line, operand in CRITICAL}
    return {f"{name}_{group}": np.mean([x[row, t].item() for row, t, _ in members]) if members else float("nan")
            for name, x in (("p", p), ("certainty", sure)) for group, members in groups.items()}


@torch.no_grad()
def evaluate(policy, problems, old_problems, temperature):
    """Accuracy greedy and sampled on {"n": pairs, "nk": pairs}, and the cross-entropy on answers of 1..N digits."""
    found = {f"{how}_{name}": solve(policy, pairs, t)[0].mean() for name, pairs in problems.items()
             for how, t in (("greedy", 0), ("sampled", temperature))}
    return found | {"ce_old": float(np.mean([answer_loss(policy, *to_batch(old_problems[i : i + 8], policy.lm_head.weight.device)).item()
                                             for i in range(0, len(old_problems), 8)]))}


COLUMNS = (["iteration", "episodes", "success", "kl", "penalty", "entropy", "clip_fraction", "value_loss", "explained_variance", "weight"]
           + [f"{name}_{group}" for name in ("p", "certainty") for group in ["critical"] + [f"l{line}o{operand}" for line, operand in CRITICAL]]
           + ["greedy_n", "greedy_nk", "sampled_n", "sampled_nk", "ce_old", "tokens_per_s", "seconds"])


def parse_args(argv):
    ap = argparse.ArgumentParser(description="Fine-tune a pre-trained model with PPO on additions of N+k digits.",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = ap.add_argument
    add("--alpha", type=float, default=3.0, help="certainty exponent of the KL penalty (the paper's beta); 0 = standard KL")
    add("--kl_coef", type=float, default=1.0, help="coefficient of the KL penalty (the paper's alpha); 0 = none")
    add("--digits", type=int, default=5, help="N: the model was pre-trained on 1..N digits")
    add("--extra_digits", type=int, default=1, help="k: fine-tune on N+k digits")
    add("--preset", choices=PRESETS, default="small", help="model size: small for a laptop, paper for a GPU")
    add("--checkpoint", default="", help="pre-trained model; default: that of pretrain.py with these settings")
    add("--pretrain_seed", type=int, default=0, help="seed of the default pre-trained model")
    add("--iterations", type=int, default=40, help="of rollout and update")
    add("--episodes", type=int, default=64, help="answers a rollout")
    add("--epochs", type=int, default=1, help="passes over a rollout; 1 with 1 minibatch is A2C, the paper's algorithm")
    add("--minibatches", type=int, default=2, help="optimizer steps an epoch")
    add("--lr", type=float, default=1e-4, help="learning rate of the policy (Adam)")
    add("--value_lr", type=float, default=1e-3, help="learning rate of the critic (Adam)")
    add("--clip", type=float, default=0.2, help="the ratio new/old probability is clipped to 1 +- this")
    add("--entropy_coef", type=float, default=0.0005, help="coefficient of the entropy bonus")
    add("--gamma", type=float, default=1.0, help="discount")
    add("--gae_lambda", type=float, default=1.0, help="lambda of GAE; 1: the end's reward reaches all tokens alike")
    add("--temperature", type=float, default=1.0, help="of sampling and of all log-probabilities")
    add("--eval_every", type=int, default=10, help="iterations between evaluations on held-out problems")
    add("--eval_problems", type=int, default=100, help="held-out problems for each of these; 2.5 times as many before and after")
    add("--seed", type=int, default=0, help="of problems, sampling and minibatches")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
    add("--out", default="", help="folder for the run; default: out/ppo_<settings that differ from the defaults>")
    args = ap.parse_args(argv)
    args.name = "ppo_" + "_".join([f"alpha{args.alpha:g}"] + [
        f"{name}{value}" for name, value in vars(args).items()
        if value != ap.get_default(name) and name not in ("alpha", "seed", "device", "out", "checkpoint", "name")] + [f"seed{args.seed}"])
    return args


def main(argv=None):
    # 1. Settings, and the pre-trained model: the policy's start and, frozen, the reference
    args = parse_args(argv)
    require(args, alpha=0 <= args.alpha < math.inf, kl_coef=0 <= args.kl_coef < math.inf, digits=args.digits >= 1,
            extra_digits=args.extra_digits >= 1, iterations=args.iterations >= 0, episodes=args.episodes >= 1,
            epochs=args.epochs >= 1, minibatches=1 <= args.minibatches <= args.episodes, lr=0 <= args.lr < math.inf,
            value_lr=0 <= args.value_lr < math.inf, clip=0 < args.clip < math.inf, entropy_coef=math.isfinite(args.entropy_coef),
            gamma=0 <= args.gamma <= 1, gae_lambda=0 <= args.gae_lambda <= 1, temperature=0 < args.temperature < math.inf,
            eval_every=args.eval_every >= 1, eval_problems=args.eval_problems >= 1)
    device = pretrain.get_device(args.device)
    long = args.digits + args.extra_digits
    path = args.checkpoint or pretrain.default_folder(args.digits, args.preset, args.pretrain_seed) + "/model.pt"
    if not args.checkpoint and not os.path.exists(path):
        print(f"no pre-trained model at {path}: pre-training first")
        pretrain.main(["--digits", str(args.digits), "--preset", args.preset, "--seed", str(args.pretrain_seed), "--device", args.device])
    reference, facts = pretrain.load_checkpoint(path, device)
    if facts["digits"] != args.digits:
        raise UserError(f"{path} was pre-trained on 1..{facts['digits']} digits, not {args.digits}; give --digits {facts['digits']}")
    if data.max_length(long) > reference.config.block_size:
        raise UserError(f"{long} digits need a block of {data.max_length(long)}, {path} has {reference.config.block_size}; "
                        f"pre-train with --block_size {data.max_length(long)}")
    out = args.out or "out/" + args.name
    pretrain.make_folder(out, vars(args) | dict(checkpoint=path))

    torch.manual_seed(args.seed)
    reference.requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    value_head = ValueHead(policy.config.n_embd).to(device)
    optimizer = torch.optim.Adam([dict(params=policy.parameters(), lr=args.lr), dict(params=value_head.parameters(), lr=args.value_lr)])

    # 2. Where we start
    tests = {(mode, length): sample_problems(args.eval_problems * 5 // 2, length, mode, seed=1)
             for mode in ("identical", "varying") for length in (args.digits, long)}
    before = {cell: bootstrap(solve(policy, pairs)[0]) for cell, pairs in tests.items()}
    pretrain.print_table(before, "before: greedy")
    watched = {"n": sample_problems(args.eval_problems, args.digits, "varying", seed=2), "nk": sample_problems(args.eval_problems, long, "varying", seed=2)}
    old_problems = sample_problems(args.eval_problems, args.digits, "train", seed=3)
    critical_problems = sample_problems(32, args.digits, "rl", seed=4, extra_digits=args.extra_digits)

    # 3. Train
    started = time.time()
    with open(os.path.join(out, "log.csv"), "w", newline="") as f:
        log = csv.DictWriter(f, COLUMNS)
        log.writeheader()

        def write(row):
            log.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
            f.flush()

        write(dict(iteration=0, episodes=0, **critical_tokens(policy, critical_problems, args.digits, args.temperature),
                   **evaluate(policy, watched, old_problems, args.temperature)))
        bar = tqdm(range(1, args.iterations + 1), desc="ppo", unit="it", dynamic_ncols=True)
        for iteration in bar:
            # Every random number of an iteration follows from the seed and its number alone.
            rng, begun = np.random.default_rng([args.seed, iteration]), time.time()
            pairs = [data.sample_pair(rng, args.digits, "rl", args.extra_digits) for _ in range(args.episodes)]
            seed = int(rng.integers(2**62))
            # 3.1 roll out, grade, score, advantages   3.2 update
            batch, tokens = rollout(policy, value_head, reference, pairs, args, seed)
            stats = update(policy, value_head, optimizer, batch, args, torch.Generator().manual_seed(seed))
            seconds = time.time() - begun
            # 3.3 watch
            row = dict(iteration=iteration, episodes=iteration * args.episodes, success=batch["success"].mean().item(), **stats,
                       explained_variance=explained_variance(batch["returns"], batch["values"], batch["mask"]).item(),
                       tokens_per_s=tokens / seconds, **critical_tokens(policy, critical_problems, args.digits, args.temperature))
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                row |= evaluate(policy, watched, old_problems, args.temperature)
                pretrain.save_checkpoint(os.path.join(out, "model.pt"), policy, digits=args.digits, step=iteration, settings=vars(args))
            write(row | dict(seconds=time.time() - started))
            tqdm.write(f"{iteration:4d}  success {row['success']:.2f}  kl {row['kl']:.4f}  penalty {row['penalty']:.4f}  entropy {row['entropy']:.4f}  "
                       f"clip {row['clip_fraction']:.3f}  value loss {row['value_loss']:.3f}  ev {row['explained_variance']:.2f}  p critical {row['p_critical']:.3f}"
                       + (f"\n      greedy N {row['greedy_n']:.0%}, N+{args.extra_digits} {row['greedy_nk']:.0%}   sampled N {row['sampled_n']:.0%}, "
                          f"N+{args.extra_digits} {row['sampled_nk']:.0%}   cross-entropy on 1..N {row['ce_old']:.4f}" if "ce_old" in row else ""))
            bar.set_postfix_str(f"success {row['success']:.2f}, {row['tokens_per_s']:,.0f} tokens/s")

    # 4. Where we are
    after = {cell: bootstrap(solve(policy, pairs)[0]) for cell, pairs in tests.items()}
    pretrain.print_table(before, "before: greedy")
    pretrain.print_table(after, f"after {args.iterations * args.episodes:,} episodes: greedy")
    print(f"\ntrained in {(time.time() - started) / 60:.1f} minutes; saved {out}/model.pt")
    return before, after


if __name__ == "__main__":
    pretrain.run(main)
