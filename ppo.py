"""Fine-tune a pre-trained model with PPO on longer additions.  Run: python ppo.py --alpha 3

The state is the text so far, an action the next character, an episode one answer. The reward is 1
at the last action if the result is right, else 0. The prioritized KL penalty of kl.py holds the
policy near the pre-trained model, the reference.

B sequences, T actions, V vocabulary. Every (B, T) tensor is aligned to the actions.
"""
import argparse
import copy
import functools
import math
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from kl import certainty, prioritized_kl
from model import (autocast, generate, get_device, load_checkpoint, read, save_checkpoint, slices,
                   split_actions)
from pretrain import (Run, accuracy_table, add_run_options, answer_loss, check_finite, check_range,
                      default_folder, keep_freed_memory, print_table, sample_problems, solve,
                      to_batch)

SHIPPED = str(Path(__file__).resolve().parent / "assets/pretrained/n5_seed0.pt")


# ------------------------------------------------------------------ the algorithm
class ValueHead(nn.Sequential):
    """The critic, an MLP (128, 128): hidden state (B, T, C) -> expected reward (B, T)."""

    def __init__(self, n_embd, generator=None):
        super().__init__(nn.Linear(n_embd, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(),
                         nn.Linear(128, 1), nn.Flatten(-2))  # (B, T, 1) -> (B, T)
        for layer, std in (self[0], n_embd**-0.5), (self[2], 128**-0.5), (self[4], 0.0):
            nn.init.normal_(layer.weight, std=std, generator=generator)  # at first V(s) = 0
            nn.init.zeros_(layer.bias)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016), all (B, T); 0 outside the mask.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lam A_{t+1}
    A row's actions are those with mask 1, one after the other. After the last the episode has
    ended: V and A are 0 there. rewards 0, 1 and values 0, 0, gamma = lam = 1: advantages 1, 1.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t] * mask[:, t], advantages[:, t]
    return advantages


def masked_mean(x, mask):
    """Mean of x (B, T) over the actions with mask 1."""
    return (x * mask).sum() / mask.sum()


def normalize(advantages, mask):
    """Mean 0 and standard deviation 1 over the mask."""
    mean = masked_mean(advantages, mask)
    std = masked_mean((advantages - mean) ** 2, mask).sqrt()
    return (advantages - mean) / std.clamp(min=0.1)  # if all answers are right, do not learn noise


def ppo_loss(new_logp, old_logp, advantages, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), to be minimized. All (B, T) -> scalar.

    Mean over the mask of -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = pi_new / pi_old:
    ratio 1.5, A = 1 and clip 0.2 give -1.2. With one epoch of one minibatch the ratio is always 1,
    and the gradient that of -A log pi_new: PPO is then A2C, the paper's algorithm.
    """
    ratio = ((new_logp - old_logp) * mask).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)


def token_logp(logits, actions):
    """Log-probability of each action: logits (B, T, V), actions (B, T) -> (B, T)."""
    return F.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]


# ------------------------------------------------------------------ one iteration
def draw_problems(args, iteration, device):
    """The iteration's problems [(a, b)] and the generator of its samples: all its randomness."""
    rng = np.random.default_rng([args.seed, iteration])
    pairs = [data.sample_pair(rng, args.digits, "rl", args.extra_digits, task=args.task)
             for _ in range(args.episodes)]
    return pairs, torch.Generator(device).manual_seed(int(rng.integers(2**62)))


@torch.no_grad()
def rollout(policy, value_head, reference, pairs, args, generator):
    """Let the policy answer all problems, grade and score what it wrote -> dict of tensors."""
    # 1. Write the answers. Their tokens are the actions.
    prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
    ids, lengths = generate(policy, prompts, policy.config.block_size, args.temperature, generator)
    prompt_len = torch.tensor([len(p) for p in prompts], device=ids.device)
    states, actions, mask = split_actions(ids, prompt_len, lengths)
    n_actions = lengths - 1  # action i is token i + 1

    # 2. Grade them. The reward comes with the last action.
    texts = [data.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    success = [float(data.grade(text, a, b)) for text, (a, b) in zip(texts, pairs)]
    success = torch.tensor(success, device=ids.device)  # (B,)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(pairs), device=ids.device), n_actions - 1] = success

    # 3. Score each action under the reference and the policy, both at the sampling temperature.
    ref_logits, _ = read(reference, states, n_actions, args.temperature)  # (B, T, V)
    logits, hidden = read(policy, states, n_actions, args.temperature)
    values = value_head(hidden)
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda)

    # 4. The weight of each token's penalty.
    sure = certainty(ref_logits)
    weight = sure**args.alpha  # eq. 1
    if args.kl_weight == "matched":  # a control: everywhere the mean weight
        weight = masked_mean(weight, mask).expand_as(mask)
    elif args.kl_weight == "shuffled":  # a control: the same weights, at other answer tokens
        answer = weight[mask > 0]
        order = torch.randperm(len(answer), generator=generator, device=ids.device)
        weight[mask > 0] = answer[order]
    elif args.kl_weight == "mask":  # a control: none at all where the reference is not sure
        weight = weight * (sure >= 0.9)
    elif args.kl_weight == "oracle":  # a control: free critical tokens and copied digits alone
        weight = 1 - known_critical(texts, pairs, args.digits, mask)
    return dict(states=states, actions=actions, mask=mask, n_actions=n_actions, success=success,
                old_logp=token_logp(logits, actions), ref_logp=token_logp(ref_logits, actions),
                ref_logits=ref_logits, weight=weight, advantages=advantages,
                returns=advantages + values)


def known_critical(texts, pairs, n_digits, mask):
    """1.0 at the critical tokens and copied digits that a text reaches without an error (B, T)."""
    critical = torch.zeros_like(mask)
    for i, (text, (a, b)) in enumerate(zip(texts, pairs)):
        error = data.first_error(text, a, b)
        for index in data.critical_positions(a, b, n_digits).values():
            if error is None or index <= error:
                critical[i, index - 1] = 1.0  # token i is action i - 1
    return critical


def update(policy, value_head, optimizer, batch, args, generator, when="this update"):
    """Epochs of minibatches over one rollout -> {name: mean over minibatches and answer tokens}.

    The figures are those of the policy before each step. nan or infinity stops the run before it
    reaches the weights; `when` is for that message.
    """
    mask, totals = batch["mask"], defaultdict(float)
    batch = batch | dict(advantages=normalize(batch["advantages"], mask))
    for _ in range(args.epochs):
        order = torch.randperm(len(mask), generator=generator, device=mask.device)
        for rows in order.tensor_split(args.minibatches):
            optimizer.zero_grad()
            for part, T in slices(rows, batch["n_actions"]):  # gradients add up over the slices
                b = {name: x[part, :T] for name, x in batch.items() if x.dim() > 1}
                with autocast(mask.device):
                    logits, hidden = policy(b["states"])
                logits = logits / args.temperature
                all_logp = F.log_softmax(logits, -1)  # (B, T, V)
                new_logp = token_logp(logits, b["actions"])  # (B, T), as all that follows
                entropy = -(all_logp.exp() * all_logp).sum(-1)
                # k2 has the KL's gradient if the policy itself chose the actions. The old policy
                # chose these, so each counts pi / pi_old times.
                ratio = ((new_logp.detach() - b["old_logp"]) * b["mask"]).exp()
                penalty = ratio * prioritized_kl(new_logp, b["ref_logp"], b["weight"])
                # Detached: the critic's guesses, 400 tokens ahead, would disturb the policy.
                value_loss = (value_head(hidden.detach()) - b["returns"]) ** 2 / 2
                loss = ppo_loss(new_logp, b["old_logp"], b["advantages"], b["mask"], args.clip)
                loss = loss + masked_mean(args.kl_coef * penalty - args.entropy_coef * entropy
                                          + value_loss, b["mask"])
                # The slices' means times their shares add up to the minibatch's mean.
                share = b["mask"].sum() / mask[rows].sum()
                (loss * share).backward()
                with torch.no_grad():
                    ref_logp = F.log_softmax(b["ref_logits"], -1)
                    kl = (all_logp.exp() * (all_logp - ref_logp)).sum(-1)  # exact, in nats a token
                    clipped = ((ratio - 1).abs() > args.clip).float()
                    for name, x in dict(kl=kl, penalty=penalty, entropy=entropy,
                                        clip_fraction=clipped, value_loss=value_loss,
                                        weight=b["weight"]).items():
                        totals[name] += share * masked_mean(x, b["mask"])
            totals["grad_norm"] += nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            check_finite(when, totals)
            optimizer.step()
    return {name: x.item() / (args.epochs * args.minibatches) for name, x in totals.items()}


# ------------------------------------------------------------------ what is watched
def watch_critical(model, pairs, n_digits, temperature):
    """Probability of the right token, where the model has read the right answer up to there.

    Means over the critical tokens (p_critical), over the copied digits (p_copied), and over the
    last comma of each list (p_l1o1: line 1, operand 1), the six places of the paper's Figure 7.
    """
    ids, _, lengths = to_batch(pairs, model.lm_head.weight.device)
    logits, _ = read(model, ids, lengths, temperature)
    p = token_logp(logits[:, :-1], ids[:, 1:]).exp().tolist()
    found = defaultdict(list)
    for i, (a, b) in enumerate(pairs):
        for (line, operand, name), index in data.critical_positions(a, b, n_digits).items():
            found["p_copied" if name == "copied" else "p_critical"].append(p[i][index - 1])
            if name == "comma1":
                found[f"p_l{line}o{operand}"].append(p[i][index - 1])  # token i is action i - 1
    return {name: np.mean(x) for name, x in found.items()}


def evaluate(policy, problems, old_problems, temperature):
    """Accuracies on held-out problems {name: pairs}, greedy; on N also sampled; and n_nats, the
    cross-entropy on right answers of 1..N digits: forgetting shows there first.
    """
    correct, _ = solve(policy, [pair for pairs in problems.values() for pair in pairs])
    row = {name: x.mean() for name, x in zip(problems, np.split(correct, len(problems)))}
    row["n_sampled"] = solve(policy, problems["n_identical"], temperature)[0].mean()
    with torch.no_grad():
        loss = answer_loss(policy, *to_batch(old_problems, policy.lm_head.weight.device))
    return row | dict(n_nats=loss.item())


def explain(batch, pairs, args):
    """Print the penalty of one answer, token by token, and what the reference would have written: a
    right answer, if there is one, with the largest k2 at a critical token of weight 1/2 or less.
    """
    texts = [data.decode([state[0], *actions[:n]]) for state, actions, n in zip(
        batch["states"].tolist(), batch["actions"].tolist(), batch["n_actions"].tolist())]
    critical = known_critical(texts, pairs, args.digits, batch["mask"])
    sure = certainty(batch["ref_logits"])
    k2 = prioritized_kl(batch["old_logp"], batch["ref_logp"], 1)
    penalty = prioritized_kl(batch["old_logp"], batch["ref_logp"], batch["weight"])
    # Before the first update every k2 is 0: then the least certain critical token decides.
    freed = (k2 * (batch["weight"] <= 0.5) + 1e-6 * (1 - sure)) * critical
    others = batch["success"] < batch["success"].max()  # the wrong answers, if one is right
    i = int(freed.amax(1).masked_fill(others, -1).argmax())
    (a, b), text = pairs[i], texts[i]
    normalized = normalize(batch["advantages"], batch["mask"])
    loss = -normalized + args.kl_coef * penalty  # ratio 1; without entropy bonus and critic
    print(f"\n{text}\nreward {batch['success'][i]:.0f} ({data.describe_error(text, a, b)}); mean "
          f"reward of {len(pairs)} episodes {batch['success'].mean():.2f}\n\n"
          "* a critical token or copied digit; not shown: the reference is sure, k2 is small\n"
          "loss = -advantage (normalized) + kl_coef * weight * k2\n\n"
          "  place             token logp_ref    logp     k2 certainty weight penalty advantage    "
          "loss")
    error = data.first_error(text, a, b)
    for t in batch["mask"][i].nonzero()[:, 0].tolist():
        if sure[i, t] > 0.9 and k2[i, t] < 0.02 and not critical[i, t]:
            continue
        place = data.place(a, b, t + 1) if error is None or t + 1 <= error else "after the error"
        print(f"{'*' if critical[i, t] else ' '} {place:<17} {text[t + 1]!r:>5} "
              f"{batch['ref_logp'][i, t]:8.4f} {batch['old_logp'][i, t]:7.4f} {k2[i, t]:6.3f} "
              f"{sure[i, t]:9.4f} {batch['weight'][i, t]:6.3f} {penalty[i, t]:7.4f} "
              f"{normalized[i, t]:9.3f} {loss[i, t]:7.3f}")
    for at in freed[i].topk(2).indices.tolist():
        logits = batch["ref_logits"][i, at]
        probs = F.softmax(logits, -1)
        print(f"\nthe reference at {data.place(a, b, at + 1)} (written: {text[at + 1]!r})\n"
              "  token   logit       p  -p log p")
        for token in probs.argsort(descending=True)[:4].tolist():
            char, p = data.VOCAB[token], probs[token].item()
            print(f"  {char!r:>5} {logits[token]:7.3f} {p:7.4f} {-p * math.log(p):9.4f}")
        H = (1 - sure[i, at]) * math.log(len(probs))
        print(f"entropy H of all {len(probs)}: {H:.4f}; J = 1 - H / log {len(probs)} = "
              f"{sure[i, at]:.4f}; J^{args.alpha:g} = {sure[i, at] ** args.alpha:.4f}")


# ------------------------------------------------------------------ training
def parse_args(argv):
    ap = argparse.ArgumentParser(
        description="Fine-tune a pre-trained model with PPO on additions of N+k digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = ap.add_argument_group("penalty").add_argument
    add("--alpha", type=float, default=3.0, help="exponent of the certainty; 0 = standard KL")
    add("--kl_coef", type=float, default=0.1, help="coefficient of the KL penalty; 0 = no penalty")
    add("--kl_weight", choices=("certainty", "matched", "shuffled", "mask", "oracle"),
        default="certainty", help="weight of a token's penalty: certainty^alpha, or a control: its "
        "mean everywhere; dealt out at random; 0 where the certainty is below 0.9; 0 at critical "
        "tokens and copied digits, else 1")
    add = ap.add_argument_group("PPO").add_argument
    add("--extra_digits", type=int, default=1, help="k: fine-tune on N+k digits")
    add("--iterations", type=int, default=20, help="of rollout and update")
    add("--episodes", type=int, default=64, help="answers in a rollout")
    add("--epochs", type=int, default=1, help="passes over a rollout")
    add("--minibatches", type=int, default=1, help="optimizer steps a pass")
    add("--lr", type=float, default=1e-4, help="learning rate of the policy (Adam)")
    add("--value_lr", type=float, default=1e-3, help="learning rate of the critic (Adam)")
    add("--clip", type=float, default=0.2, help="clip the ratio new/old to 1 +- this")
    add("--entropy_coef", type=float, default=0.0005, help="coefficient of the entropy bonus")
    add("--gamma", type=float, default=1.0, help="discount")
    add("--gae_lambda", type=float, default=1.0, help="lambda of GAE; 1: all tokens get the reward")
    add("--temperature", type=float, default=2.0, help="of sampling, certainty, loss and KL")
    add = ap.add_argument_group("evaluation").add_argument
    add("--eval_every", type=int, default=5, help="iterations between evaluations")
    add("--eval_problems", type=int, default=64, help="held-out problems for each")
    add("--final_problems", type=int, default=250, help="held-out problems for each final accuracy")
    group = ap.add_argument_group("run")
    group.add_argument("--checkpoint", default=SHIPPED,
                       help="the pre-trained model; it sets N, task and size")
    group.add_argument("--explain", action="store_true",
                       help="show one episode token by token, as the run stands, and stop")
    add_run_options(group)
    args = ap.parse_args(argv)
    check_range(ap, args, 0, "alpha", "kl_coef", "iterations", "lr", "value_lr", "clip",
                "entropy_coef", "gamma", "gae_lambda", "seed")
    check_range(ap, args, 1, "extra_digits", "episodes", "epochs", "minibatches", "eval_every",
                "eval_problems", "final_problems")
    check_range(ap, args, 0.001, "temperature")
    if args.explain and args.fresh:
        ap.error("--explain shows the run as it stands; leave out --fresh")
    if args.minibatches > args.episodes:
        ap.error(f"{args.minibatches} minibatches of {args.episodes} episodes; lower --minibatches")
    return ap, args


def main(argv=None):
    # 1. The pre-trained model: where the policy starts and, frozen, the reference.
    ap, args = parse_args(argv)
    device = get_device(args.device)
    keep_freed_memory()
    reference, facts = load_checkpoint(args.checkpoint, device)
    reference.requires_grad_(False)
    n, k, long = facts["digits"], args.extra_digits, facts["digits"] + args.extra_digits
    if data.max_length(long, facts["task"]) > reference.config.block_size:
        ap.error(f"{args.checkpoint} has no positions for {long} digits; pre-train one with "
                 f"--extra_digits {k}")
    if args.out == "auto":
        args.out = default_folder(ap, args, f"ppo_n{n}_model{facts['seed']}_alpha{args.alpha:g}",
                                  ("alpha",))
    args.digits, args.task, args.preset = n, facts["task"], facts["preset"]
    weights = b"".join(p.cpu().numpy().tobytes() for p in reference.parameters())
    args.pretrained = f"n{n}_seed{facts['seed']}_{zlib.crc32(weights):08x}"
    policy = copy.deepcopy(reference).requires_grad_(True)
    value_head = ValueHead(policy.config.n_embd, torch.Generator().manual_seed(args.seed))
    value_head.to(device)
    optimizer = torch.optim.Adam([dict(params=policy.parameters(), lr=args.lr),
                                  dict(params=value_head.parameters(), lr=args.value_lr)])
    run = Run(args, policy=policy, value_head=value_head, optimizer=optimizer)
    if args.explain:
        if not run.rows:
            print(f"no run in {args.out}: the policy is still the reference, and k2 is 0")
        pairs, generator = draw_problems(args, len(run.rows) or 1, device)
        return explain(rollout(policy, value_head, reference, pairs, args, generator), pairs, args)
    if run.finished:
        return

    # 2. Held-out problems for the evaluations.
    some = functools.partial(sample_problems, args.eval_problems, seed=2, task=args.task)
    problems = dict(n_identical=some(n, "identical"), nk_identical=some(long, "identical"),
                    nk_varying=some(long, "varying"))
    old_problems, critical_problems = some(n, "train"), some(n, "rl", extra_digits=k)
    print_table(facts["accuracies"], "before")
    print(f"\nPPO on {long} digits: alpha {args.alpha:g}, kl_coef {args.kl_coef:g}, "
          f"{args.iterations} iterations of {args.episodes} episodes, on {device}")
    shown = "success kl penalty entropy value_loss weight p_critical p_copied".split()
    print(" it" + "".join(f"{name:>11}" for name in shown))

    # 3. Train.
    measured = "N -, N+k -"
    bar = tqdm(range(len(run.rows), args.iterations + 1), desc="ppo", unit="it",
               initial=len(run.rows), total=args.iterations + 1, dynamic_ncols=True, leave=False)
    for iteration in bar:
        row = dict(iteration=iteration, episodes=iteration * args.episodes)
        if iteration > 0:  # row 0 of the log is the pre-trained model
            pairs, generator = draw_problems(args, iteration, device)
            batch = rollout(policy, value_head, reference, pairs, args, generator)
            row |= update(policy, value_head, optimizer, batch, args, generator,
                          f"iteration {iteration}")
            row["success"] = batch["success"].mean().item()
        row |= watch_critical(policy, critical_problems, n, args.temperature)
        check_finite(f"iteration {iteration}", dict(p_critical=row["p_critical"]))
        tqdm.write(f"{iteration:3d}" + "".join(
            f"{row[name]:11.4f}" if name in row else f"{'-':>11}" for name in shown))
        if row.get("success") == 0:
            tqdm.write("    no answer was right: there is nothing to learn from here")
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            row |= evaluate(policy, problems, old_problems, args.temperature)
            measured = "N {n_identical:.0%}, N+k {nk_identical:.0%}".format_map(row)
            tqdm.write("    greedy: N {n_identical:.0%}, N+k identical {nk_identical:.0%}, varying "
                       "{nk_varying:.0%}; N sampled {n_sampled:.0%}".format_map(row))
        run.log(iteration, row, last=iteration == args.iterations)
        bar.set_postfix_str(measured)

    # 4. Measure and save.
    table = accuracy_table(policy, (n, long), args.final_problems, args.task)
    save_checkpoint(run.folder / "model.pt", policy, torch.float32, digits=n, task=args.task,
                    preset=args.preset, seed=facts["seed"], settings=run.settings,
                    accuracies=table)
    print_table(table, f"after {args.iterations * args.episodes:,} episodes, {args.final_problems} "
                       "problems per cell")
    run.finish(before=facts["accuracies"], after=table)
    print(f"the learning curves: python analyze.py curves {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command resumes from where it last saved")
