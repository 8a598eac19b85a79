"""Fine-tune a pre-trained model with PPO on additions that are longer than any it has seen.

Run:  python ppo.py --alpha 3

The task as a Markov decision process: the state is the text so far, the action the next character, an episode one
answer. The reward is 0 until the end and there 1 if the result is right. The loss holds the policy near the
pre-trained model with the prioritized KL penalty of kl.py. Writes out/<run>/model.pt, log.csv, settings.json, state.pt,
and accuracies.json at the end.
B sequences, T actions, V vocabulary; every (B, T) tensor is aligned to the actions, see model.split_actions.
"""
import copy
import math
import os
import textwrap
import time

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import pretrain
from kl import certainty, prioritized_kl
from model import PRESETS, slices, split_actions
from pretrain import (COUNT, SEED, Parser, Run, UserError, answer_loss, autocast, bootstrap, check_finite,
                      sample_problems, solve, to_batch, within, write_answers)


# --------------------------------------------------------------------------- the algorithm, as pure functions
class ValueHead(nn.Sequential):
    """The critic: hidden state (B, T, C) -> expected reward (B, T). An MLP (128, 128), as in the paper."""

    def __init__(self, n_embd, generator=None):
        super().__init__(nn.Linear(n_embd, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1),
                         nn.Flatten(-2))  # (B, T, 1) -> (B, T)
        for layer, std in ((self[0], n_embd**-0.5), (self[2], 128**-0.5), (self[4], 0.0)):  # at first V(s) is 0
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016), all (B, T) -> advantages (B, T), 0 outside the mask.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lam A_{t+1}.  The inputs stay as they are.
    A row's actions are those with mask 1, one after the other. After the last of them the episode has ended: what would
    follow, in V as in A, is worth 0. Rewards 0, 1 and values 0, 0 with gamma = lam = 1 give advantages 1, 1.
    """
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    T = values.shape[1]
    for t in reversed(range(T)):
        # No bootstrap after the last action.
        next_value = values[:, t + 1] * mask[:, t + 1] if t + 1 < T else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = advantages[:, t] = (delta + gamma * lam * following) * mask[:, t]
    return advantages


def masked_mean(x, mask):
    """Mean of x (B, T) over the actions with mask 1."""
    return (x * mask).sum() / mask.sum()


def normalize(advantages, mask):
    """Mean 0 and standard deviation 1 over the mask. A floor on the deviation: where no answer was right, or all were,
    the critic's noise is not to be blown up into a signal."""
    mean = masked_mean(advantages, mask)
    return (advantages - mean) / masked_mean((advantages - mean) ** 2, mask).sqrt().clamp(min=0.1)


def ppo_loss(new_logp, old_logp, advantages, mask, clip):
    """The clipped surrogate (Schulman et al. 2017, eq. 7), negated to be minimized. All (B, T) -> a scalar.

    The mean over the mask of -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), with ratio = pi_new / pi_old: at
    ratio 1.5, A = 1 and clip 0.2 it is -1.2.
    While new_logp equals old_logp, the ratio is 1, nothing is clipped, and the gradient is that of the mean of
    -advantages * new_logp. With one epoch of one minibatch that is always so: PPO is then A2C, the paper's algorithm.
    """
    ratio = ((new_logp - old_logp) * mask).exp()
    return -masked_mean(torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def token_weights(ref_logits, mask, args, generator):
    """The penalty's weight for each token: ref_logits (B, T, V), mask (B, T) -> (B, T).

    --kl_weight "certainty" is equation 1's J(s)^alpha; the others are controls, to learn what it is that helps.
    "matched": the same for all tokens, their mean, so that only the total is the same; "shuffled": these very weights,
    dealt out at random over the batch's answer tokens; "mask": times 0 where J(s) is below --mask_below.
    """
    sure, answer = certainty(ref_logits), mask > 0
    weight = sure**args.alpha
    if args.kl_weight == "matched":
        weight[answer] = weight[answer].mean()
    elif args.kl_weight == "shuffled":
        weight[answer] = weight[answer][torch.randperm(int(answer.sum()), generator=generator).to(mask.device)]
    elif args.kl_weight == "mask":
        weight = weight * (sure >= args.mask_below)
    return weight


def kl_penalty(logp, batch, args):
    """Equation 1 for each token (B, T); as a control, the standard penalty with the control's weights."""
    if args.kl_weight == "certainty":
        return prioritized_kl(logp, batch["ref_logp"], batch["ref_logits"], args.alpha)
    return batch["weight"] * prioritized_kl(logp, batch["ref_logp"], batch["ref_logits"], 0)


def token_logp(logits, actions):
    """Log-probability of each action: logits (B, T, V), actions (B, T) -> (B, T)."""
    return F.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]


def explained_variance(returns, values, mask):
    """1 - Var(returns - values) / Var(returns) over the mask: 1 = perfect critic, 0 = no better than a constant."""
    returns, values = returns[mask > 0], values[mask > 0]
    variance = returns.var(correction=0)
    # Where all returns are equal, up to rounding, there is nothing to explain.
    return 1 - (returns - values).var(correction=0) / variance if variance > 1e-8 else torch.tensor(float("nan"))


# --------------------------------------------------------------------------- the two halves of an iteration
def tempered(model, states, temperature):
    """states (B, T) -> logits / temperature (B, T, V): what samples and what scores; and hidden states (B, T, C)."""
    with autocast(states.device):
        logits, hidden = model(states)
    return logits / temperature, hidden


def rollout(policy, value_head, reference, pairs, args, seed):
    """Let the policy answer all problems, and score what it wrote -> the dict of `score`."""
    generator = torch.Generator(policy.lm_head.weight.device).manual_seed(seed)
    answers = write_answers(policy, pairs, args.temperature, generator)
    return score(policy, value_head, reference, pairs, *answers, args, seed)


@torch.no_grad()
def score(policy, value_head, reference, pairs, ids, prompt_len, lengths, args, seed):
    """Grade answers, score each of their tokens -> a dict of what `update` needs, (B, T) tensors and others."""
    device = ids.device
    # 1. The actions: an answer's tokens.
    states, actions, mask = split_actions(ids, prompt_len, lengths)

    # 2. Grade the answer: the reward of 1 or 0 comes with the last action.
    texts = [data.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    success = torch.tensor([float(data.grade(text, a, b)) for text, (a, b) in zip(texts, pairs)], device=device)  # (B,)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(pairs), device=device), lengths - 2] = success  # the last token, as an action

    # 3. Score it under the reference and the policy, as they are before the update.
    ref_logits = torch.zeros(*mask.shape, policy.config.vocab_size, device=device)
    ref_logp, old_logp, values = torch.zeros(3, *mask.shape, device=device)
    for rows, T in slices(torch.arange(len(pairs), device=device), lengths - 1):
        ref_logits[rows, :T], _ = tempered(reference, states[rows, :T], args.temperature)
        logits, hidden = tempered(policy, states[rows, :T], args.temperature)
        ref_logp[rows, :T] = token_logp(ref_logits[rows, :T], actions[rows, :T])
        old_logp[rows, :T], values[rows, :T] = token_logp(logits, actions[rows, :T]), value_head(hidden)

    # 4. Advantages, and the penalty's weights.
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    weight = token_weights(ref_logits, mask, args, torch.Generator().manual_seed(seed))
    return dict(states=states, actions=actions, mask=mask, lengths=lengths - 1, success=success, values=values,
                advantages=advantages, returns=advantages + values, old_logp=old_logp, ref_logp=ref_logp,
                ref_logits=ref_logits, weight=weight)


def update(policy, value_head, optimizer, batch, args, generator, when="this update"):
    """Epochs of minibatches over one batch of episodes -> {name: mean over all minibatches and answer tokens}.

    The default, one epoch of one minibatch, is A2C, the paper's algorithm: one gradient step, at the policy that acted.
    The figures are those of the policy before each step: with one minibatch, of the policy that acted.
    A figure that is nan or infinite stops the run, before it gets into the weights; `when` is for that message.
    """
    mask = batch["mask"]
    check_finite(when, {name: batch[name].sum().item() for name in ("values", "advantages")}, args.out)
    batch = batch | dict(advantages=normalize(batch["advantages"], mask))
    totals = {}
    for _ in range(args.epochs):
        for rows in torch.randperm(len(mask), generator=generator).to(mask.device).tensor_split(args.minibatches):
            optimizer.zero_grad()
            for part, T in slices(rows, batch["lengths"]):
                b = {name: x[part, :T] for name, x in batch.items() if x.dim() > 1}
                logits, hidden = tempered(policy, b["states"], args.temperature)
                all_logp = F.log_softmax(logits, -1)  # (B, T, V)
                new_logp = token_logp(logits, b["actions"])  # (B, T), as all that follows
                entropy = -(all_logp.exp() * all_logp).sum(-1)
                # k2 has the KL's gradient over actions of the policy itself; these are the old one's, so each counts
                # as often as the policy would take it now. In the first minibatch the ratio is 1.
                ratio = ((new_logp.detach() - b["old_logp"]) * b["mask"]).exp()
                penalty = ratio * kl_penalty(new_logp, b, args)
                # The critic's gradient stops here: the loss of a guess made 400 tokens before the reward would
                # disturb the policy's trunk.
                value_loss = (value_head(hidden.detach()) - b["returns"]) ** 2 / 2
                loss = ppo_loss(new_logp, b["old_logp"], b["advantages"], b["mask"], args.clip) + masked_mean(
                    args.kl_coef * penalty - args.entropy_coef * entropy + value_loss, b["mask"])
                share = b["mask"].sum() / mask[rows].sum()  # this slice's part of the minibatch's mean
                (loss * share).backward()
                with torch.no_grad():
                    kl = (all_logp.exp() * (all_logp - F.log_softmax(b["ref_logits"], -1))).sum(-1)  # exact
                    clipped = (ratio - 1).abs() > args.clip
                    for name, x in dict(kl=kl, penalty=penalty, entropy=entropy, clip_fraction=clipped,
                                        value_loss=value_loss, weight=b["weight"]).items():
                        totals[name] = totals.get(name, 0) + share * masked_mean(x, b["mask"])
            totals["grad_norm"] = totals.get("grad_norm", 0) + nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            check_finite(when, totals, args.out)
            optimizer.step()
    return {name: x.item() / (args.epochs * args.minibatches) for name, x in totals.items()}


# --------------------------------------------------------------------------- what is watched
SPOTS = ["critical"] + [f"l{line}o{operand}" for line in (1, 2, 3) for operand in (1, 2)]


@torch.no_grad()
def critical_tokens(model, pairs, n_digits, temperature):
    """Probability of the right token, and certainty, at the critical tokens, fed the right answer up to each.

    Returns {"p_critical", "certainty_critical"}: means over all of them, and {"p_l1o1", "certainty_l1o1", ...}: over
    the commas of line 1, operand 1, and so on, the six places of the paper's Figure 7.
    """
    ids, prompt_len, lengths = to_batch(pairs, model.lm_head.weight.device)
    states, actions, _ = split_actions(ids, prompt_len, lengths)
    found = {f"{name}_{spot}": [] for name in ("p", "certainty") for spot in SPOTS}
    for rows, T in slices(torch.arange(len(pairs), device=ids.device), lengths - 1):
        logits, _ = tempered(model, states[rows, :T], temperature)
        p, sure = token_logp(logits, actions[rows, :T]).exp().tolist(), certainty(logits).tolist()
        for i, row in enumerate(rows.tolist()):
            for (line, operand, name), index in data.critical_positions(*pairs[row], n_digits).items():
                for spot in ["critical"] + [f"l{line}o{operand}"] * name.startswith("comma"):
                    found[f"p_{spot}"].append(p[i][index - 1])  # token i is action i - 1
                    found[f"certainty_{spot}"].append(sure[i][index - 1])
    return {name: float(np.mean(x)) if x else math.nan for name, x in found.items()}


@torch.no_grad()
def evaluate(policy, problems_n, problems_nk, old_problems, temperature):
    """Accuracies on N and N+k, greedy and sampled, and cross-entropy on answers of 1..N digits, in nats a token."""
    row = {}
    for name, t in (("greedy", 0), ("sampled", temperature)):
        right, _ = solve(policy, [*problems_n, *problems_nk], t)  # in one batch: faster than in two
        row[f"{name}_n"] = float(right[: len(problems_n)].mean())
        row[f"{name}_nk"] = float(right[len(problems_n) :].mean())
    ids, prompt_len, lengths = to_batch(old_problems, policy.lm_head.weight.device)
    n_tokens = lengths - prompt_len  # answer_loss is a mean over tokens: weighted by them, the slices do not matter
    ce = sum(answer_loss(policy, ids[rows, :T], prompt_len[rows], lengths[rows]) * n_tokens[rows].sum()
             for rows, T in slices(torch.arange(len(ids), device=ids.device), lengths)) / n_tokens.sum()
    return row | dict(ce_old=ce.item())


def explain(batch, pairs, args):
    """Print, of a rollout's answers without an error, the one with the largest penalty, token by token: where the models
    are sure, what a token costs and earns. If none is without an error, it is the first answer."""
    log_ratio, sure = batch["old_logp"] - batch["ref_logp"], certainty(batch["ref_logits"])
    penalty = kl_penalty(batch["old_logp"], batch, args)
    texts = [data.decode([state[0], *actions[:n]]) for state, actions, n in
             zip(batch["states"].tolist(), batch["actions"].tolist(), batch["lengths"].tolist())]
    flawless = [float(data.first_error(text, a, b) is None) for text, (a, b) in zip(texts, pairs)]
    i = int(((1 + (penalty * batch["mask"]).sum(1)) * penalty.new_tensor(flawless)).argmax())
    (a, b), text, T = pairs[i], texts[i], int(batch["lengths"][i])
    print(f"\n{text}")
    print(textwrap.fill(f"ids of the prompt: {data.encode(data.prompt(a, b))}", 100))
    print(f"reward {batch['success'][i]:.0f} ({data.describe_error(text, a, b)}); "
          f"mean reward of {len(pairs)} episodes {batch['success'].mean():.2f}\n")
    normalized = normalize(batch["advantages"], batch["mask"])
    loss = -normalized + args.kl_coef * penalty  # the ratio is 1; the entropy bonus and the critic's loss are left out
    print(" character id   logit logp_ref     logp  log-ratio certainty weight penalty   GAE  (norm.)     loss")
    hidden = 0
    for t in batch["mask"][i].nonzero()[:, 0].tolist():
        if sure[i, t] > 0.9 and abs(log_ratio[i, t]) < 0.2 and t + 1 < T:
            hidden += 1
            continue
        if hidden:
            print(f"    ... {hidden} where the models are sure, and agree")
        hidden, token = 0, batch["actions"][i, t].item()
        print(f"{data.decode([token])!r:>9} {token:3d} {batch['ref_logits'][i, t, token]:7.2f} "
              f"{batch['ref_logp'][i, t]:8.4f} {batch['old_logp'][i, t]:8.4f} {log_ratio[i, t]:10.4f} "
              f"{sure[i, t]:9.4f} {batch['weight'][i, t]:6.3f} {penalty[i, t]:7.4f} "
              f"{batch['advantages'][i, t]:5.2f} {normalized[i, t]:8.3f} {loss[i, t]:8.3f}")


COLUMNS = ["iteration", "episodes", "success", "kl", "penalty", "entropy", "clip_fraction", "value_loss",
           "explained_variance", "weight", "grad_norm", *[f"{x}_{spot}" for x in ("p", "certainty") for spot in SPOTS],
           "greedy_n", "greedy_nk", "sampled_n", "sampled_nk", "ce_old", "tokens_per_s", "seconds"]


def parse_args(argv):
    ap = Parser(description="Fine-tune a pre-trained model with PPO on additions of N+k digits.")
    add, positive, rate, share = ap.add_argument, within(float, 0, 1e9), within(float, 0, 1e3), within(float, 0, 1)
    add("--alpha", type=positive, default=3.0, help="certainty exponent (the paper's beta); 0 = standard KL")
    add("--kl_coef", type=positive, default=0.1, help="coefficient of the KL penalty (the paper's alpha); 0 = none")
    add("--kl_weight", choices=("certainty", "matched", "shuffled", "mask"), default="certainty",
        help="certainty^alpha, or a control: its mean for all tokens; dealt out at random; 0 where certainty is low")
    add("--mask_below", type=share, default=0.9, help="the certainty below which --kl_weight mask sets tokens free")
    add("--digits", type=within(int, 1, 25), default=5, help="N: the model was pre-trained on 1..N digits")
    add("--task", choices=data.TASKS, default=data.TASKS[0], help="what the problems are")
    add("--extra_digits", type=within(int, 1, 5), default=1, help="k: fine-tune on N+k digits")
    add("--preset", choices=PRESETS, default="small", help="model size: small (narrow, wide) for a laptop, paper for a GPU")
    add("--checkpoint", default="", help="pre-trained model (default: that of pretrain.py's settings%(default)s)")
    add("--pretrain_seed", type=SEED, default=0, help="seed of the default pre-trained model")
    add("--iterations", type=within(int, 0, 10**9), default=20, help="of rollout and update")
    add("--episodes", type=COUNT, default=64, help="answers a rollout")
    add("--epochs", type=COUNT, default=1, help="passes over a rollout; 1, of one minibatch, is A2C, as in the paper")
    add("--minibatches", type=COUNT, default=1, help="optimizer steps an epoch, at most one an episode")
    add("--lr", type=rate, default=1e-4, help="learning rate of the policy (Adam)")
    add("--value_lr", type=rate, default=1e-3, help="learning rate of the critic (Adam)")
    add("--clip", type=rate, default=0.2, help="the ratio new/old probability is clipped to 1 +- this")
    add("--entropy_coef", type=rate, default=0.0005, help="coefficient of the entropy bonus")
    add("--gamma", type=share, default=1.0, help="discount")
    add("--gae_lambda", type=share, default=1.0, help="lambda of GAE; 1: the final reward reaches all tokens alike")
    add("--temperature", type=within(float, 1e-3, 1e3), default=2.0, help="of sampling and of all log-probabilities")
    add("--eval_every", type=COUNT, default=5, help="iterations between evaluations on held-out problems")
    add("--eval_problems", type=COUNT, default=64, help="held-out problems in each of these")
    add("--final_problems", type=COUNT, default=250, help="held-out problems in each cell of the final tables")
    add("--seed", type=SEED, default=0, help="of problems, sampling and minibatches")
    add("--max_kl", type=positive, default=0.1, help="say so when the KL to the pre-trained model exceeds this")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
    add("--out", default="", help="folder for the run (default: out/ppo_<settings that differ%(default)s>)")
    add("--explain", action="store_true", help="show one episode token by token, as the run stands, and stop")
    add("--fresh", action="store_true", help="start over, instead of going on with an interrupted run")
    args = ap.parse_args(argv)
    if args.checkpoint and any(getattr(args, x) != ap.get_default(x) for x in ("preset", "pretrain_seed")):
        raise UserError("--checkpoint says which model; leave out --preset and --pretrain_seed")
    if args.minibatches > args.episodes:
        raise UserError(f"{args.minibatches} minibatches of {args.episodes} episodes; lower --minibatches")
    args.out = args.out or pretrain.default_folder(f"ppo_alpha{args.alpha:g}", ap, args, ("alpha",))
    return args


def pretrain_options(args):
    """The options of the pretrain.py that makes the model which these settings begin with."""
    options = dict(digits=args.digits, task=args.task, preset=args.preset, seed=args.pretrain_seed, device=args.device)
    if args.extra_digits > 1:
        options["block_size"] = pretrain.block_for(args.digits + args.extra_digits, args.task)
    return [x for name, value in options.items() for x in (f"--{name}", str(value))]


def main(argv=None):
    # 1. Settings, and the pre-trained model: where the policy starts and, frozen, the reference.
    args = parse_args(argv)
    device = pretrain.get_device(args.device)
    n, k, long = args.digits, args.extra_digits, args.digits + args.extra_digits
    if not args.checkpoint:
        settings = pretrain_options(args)
        args.checkpoint = pretrain.parse_args(settings).out + "/model.pt"
        if not os.path.exists(args.checkpoint):
            print(f"no pre-trained model at {args.checkpoint}: pre-training first")
            pretrain.make_folder(args.out)  # now, not after a pre-training of minutes
            pretrain.main(settings)
    reference, facts = pretrain.load_checkpoint(args.checkpoint, device)
    for name in ("digits", "task"):
        if facts[name] != getattr(args, name):
            raise UserError(f"{args.checkpoint} was pre-trained with --{name} {facts[name]}; give that here, too")
    needed = data.max_length(long, args.task)
    if needed > reference.config.block_size:
        raise UserError(f"{long} digits need a block of {needed}, {args.checkpoint} has "
                        f"{reference.config.block_size}; pre-train with --block_size {needed}")
    if os.path.abspath(args.out) == os.path.dirname(os.path.abspath(args.checkpoint)):
        raise UserError(f"--out {args.out} holds the pre-trained model itself; choose another folder")

    reference.requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    value_head = ValueHead(policy.config.n_embd, torch.Generator().manual_seed(args.seed)).to(device)
    optimizer = torch.optim.Adam([dict(params=policy.parameters(), lr=args.lr),
                                  dict(params=value_head.parameters(), lr=args.value_lr)])

    # 2. Held-out problems: for the tables before and after, for evaluations in between, for the critical tokens.
    tests = {(mode, length): sample_problems(args.final_problems, length, mode, 1, args.task)
             for mode in ("identical", "varying") for length in (n, long)}
    watched = (sample_problems(args.eval_problems, n, "varying", 2, args.task),
               sample_problems(args.eval_problems, long, "varying", 2, args.task),
               sample_problems(args.eval_problems, n, "train", 2, args.task))
    critical_problems = sample_problems(32, n, "rl", 2, args.task, extra_digits=k)
    run = Run(args, COLUMNS, reference=reference, policy=policy, value_head=value_head, optimizer=optimizer)
    if args.explain:
        pairs = sample_problems(args.episodes, n, "rl", 3, args.task, extra_digits=k)
        return explain(rollout(policy, value_head, reference, pairs, args, args.seed), pairs, args)
    title = f"greedy, {args.final_problems} held-out problems a cell"
    known = facts.get("accuracies", {})  # pretrain.py has measured it on these very problems
    before = {cell: known.get((args.final_problems, *cell)) or bootstrap(solve(reference, pairs)[0])
              for cell, pairs in tests.items()}
    pretrain.print_table(before, f"before: {title}")
    print(f"\nPPO on {long} digits: alpha {args.alpha:g}, kl_coef {args.kl_coef:g}, {args.iterations} iterations of "
          f"{args.episodes} episodes, on {device}")

    # 3. Train. Every random number of an iteration follows from the seed and the iteration alone.
    print(" it success      kl penalty entropy  clip  value expl.var weight  critical: p certainty  tokens/s")
    previous = {}
    for iteration in tqdm(range(len(run.rows), args.iterations + 1), desc="ppo", unit="it", dynamic_ncols=True,
                          initial=len(run.rows), total=args.iterations + 1):
        row, figures = dict(iteration=iteration, episodes=iteration * args.episodes), " " * 60
        if iteration > 0:  # row 0 of the log is the pre-trained model
            begun, rng = time.time(), np.random.default_rng([args.seed, iteration])
            pairs = [data.sample_pair(rng, n, "rl", k, task=args.task) for _ in range(args.episodes)]
            seed = int(rng.integers(2**62))
            batch = rollout(policy, value_head, reference, pairs, args, seed)
            row |= dict(success=batch["success"].mean().item())
            row |= update(policy, value_head, optimizer, batch, args, torch.Generator().manual_seed(seed),
                          f"iteration {iteration}")
            explained = explained_variance(batch["returns"], batch["values"], batch["mask"]).item()
            row |= dict(explained_variance=explained, tokens_per_s=batch["mask"].sum().item() / (time.time() - begun))
            figures = ("{success:7.2f} {kl:7.4f} {penalty:7.4f} {entropy:7.4f} {clip_fraction:5.3f} "
                       "{value_loss:6.3f} {explained_variance:8.2f} {weight:6.3f}").format_map(row)
        row |= critical_tokens(policy, critical_problems, n, args.temperature)
        check_finite(f"iteration {iteration}", dict(p_critical=row["p_critical"]), args.out)
        tqdm.write(f"{iteration:3d} {figures}  {row['p_critical']:11.3f} {row['certainty_critical']:9.3f}  "
                   f"{row.get('tokens_per_s', 0):8,.0f}")
        if row.get("success") == 0 and previous.get("success", 1) > 0:
            tqdm.write("    no answer was right: nothing to learn from; if it stays so, lower --lr or raise --kl_coef")
        if row.get("kl", 0) > args.max_kl >= previous.get("kl", 0):
            tqdm.write(f"    the KL is over --max_kl {args.max_kl:g}: the policy has left the pre-trained model; "
                       "lower --lr or raise --kl_coef")
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            row |= evaluate(policy, *watched, args.temperature)
            tqdm.write("    N: greedy {greedy_n:.0%}, sampled {sampled_n:.0%};  N+k: greedy {greedy_nk:.0%}, "
                       "sampled {sampled_nk:.0%};  cross-entropy on 1..N: {ce_old:.5f}".format_map(row))
            pretrain.save_checkpoint(os.path.join(args.out, "model.pt"), policy, digits=n, task=args.task,
                                     step=iteration, settings=vars(args))
        run.log(iteration, row, last=iteration == args.iterations)
        previous = row

    # 4. Where we are.
    after = {cell: bootstrap(solve(policy, pairs)[0]) for cell, pairs in tests.items()}
    pretrain.print_table(before, f"before: {title}")
    pretrain.print_table(after, f"after {args.iterations * args.episodes:,} episodes: {title}")
    pretrain.save_tables(args.out, before=before, after=after)
    print(f"\ntrained in {run.seconds() / 60:.1f} minutes; saved {args.out}/model.pt")
    return before, after


if __name__ == "__main__":
    pretrain.start(main)
