"""Fine-tune a pre-trained model with PPO on longer additions.  Run: python ppo.py --alpha 3

The state is the text so far, an action the next character, an episode one answer. The reward is 1
at the last action if the result is right, else 0. The prioritized KL penalty of kl.py holds the
policy near the pre-trained model, the reference.

B sequences, T actions, V vocabulary. Every (B, T) tensor is aligned to the actions.
"""
import argparse
import copy
import os
import signal
import sys
import zlib
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the script quietly while PyTorch loads
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import data
from kl import certainty, prioritized_kl
from model import (accuracy_table, autocast, cells_of, generate, load_checkpoint, read,
                   save_checkpoint, slices, solve, split_actions, to_batch, token_logp)
from pretrain import (Run, add_run_options, check_finite, check_memory, folder_of, number,
                      print_table, run_script, settings_of, stop)

SHIPPED = Path(__file__).resolve().parent / "assets/pretrained/n5_seed0.pt"
LOG = ("iteration episodes success kl penalty entropy clip_fraction value_loss weight grad_norm "
       "p_critical p_copied p_l1o1 p_l1o2 p_l2o1 p_l2o2 p_l3o1 p_l3o2 n_identical nk_identical "
       "nk_varying n_nats").split()  # columns of log.csv


# ------------------------------------------------------------------ settings
def parse_args(argv):
    ap = argparse.ArgumentParser(
        description="Fine-tune a pre-trained model with PPO on additions of N+k digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    many, positive = number(int, 1, 10**9), number(float, 0, 1e6)
    add = ap.add_argument_group("penalty").add_argument
    add("--alpha", type=positive, default=3.0, help="exponent of the certainty; 0 = standard KL")
    add("--kl_coef", type=positive, default=0.1, help="coefficient of the penalty; 0 = no penalty")
    add("--kl_weight", choices=("certainty", "matched", "shuffled", "threshold", "oracle"),
        default="certainty", help="weight of a token's penalty: certainty^alpha, or a control: its "
        "mean everywhere; dealt out at random; 0 where the certainty is below 0.9; 0 at critical "
        "tokens and copied digits, else 1")
    add = ap.add_argument_group("PPO").add_argument
    add("--extra_digits", type=number(int, 1, 100), default=1,
        help="k: fine-tune on N+k digits; the checkpoint needs positions for them")
    add("--iterations", type=number(int, 0, 10**9), default=20,
        help="of rollout and update; 20 take about 3 minutes for 4 digits, 5 for 6, 10 for 8")
    add("--episodes", type=number(int, 1, 10**6), default=64, help="answers in a rollout")
    add("--epochs", type=many, default=1, help="passes over a rollout")
    add("--minibatches", type=many, default=1, help="optimizer steps a pass")
    add("--lr", type=number(float, 0, 1), default=1e-4, help="learning rate of the policy (Adam)")
    add("--value_lr", type=number(float, 0, 1), default=1e-3, help="that of the critic (Adam)")
    add("--clip", type=positive, default=0.2, help="clip the ratio new/old to 1 +- this")
    add("--entropy_coef", type=positive, default=0.0005, help="coefficient of the entropy bonus")
    add("--gamma", type=number(float, 0, 1), default=1.0, help="discount")
    add("--gae_lambda", type=number(float, 0, 1), default=1.0,
        help="lambda of GAE; 1: all tokens get the reward")
    add("--temperature", type=number(float, 1e-3, 1e3), default=2.0,
        help="of sampling, certainty, loss and KL")
    add = ap.add_argument_group("evaluation").add_argument
    add("--eval_every", type=many, default=5, help="iterations between evaluations")
    add("--eval_problems", type=number(int, 1, 500), default=64,
        help="held-out problems for each")
    add("--final_problems", type=number(int, 1, 10**5), default=250,
        help="held-out problems for each final accuracy")
    group = ap.add_argument_group("run")
    group.add_argument("--checkpoint", default=str(SHIPPED),
                       help="the pre-trained model; it sets N, task and size")
    add_run_options(group)
    args = ap.parse_args(argv)
    if args.minibatches > args.episodes:
        ap.error(f"{args.minibatches} minibatches of {args.episodes} episodes; lower --minibatches")
    return args


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
    """Generalized advantage estimation (Schulman et al. 2016). All (B, T); A is 0 outside the mask.

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
    """Mean 0 and standard deviation 1 over the mask; less, if that was below 0.1."""
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


# ------------------------------------------------------------------ one iteration
def draw_problems(args, facts, iteration, device):
    """The iteration's problems [(a, b)] and the generator of its samples: all its randomness.

    facts: of the pre-trained model's checkpoint, with its N ("digits") and task.
    """
    rng = np.random.default_rng([args.seed, iteration])
    pairs = [data.sample_pair(rng, facts["digits"], "rl", args.extra_digits, task=facts["task"])
             for _ in range(args.episodes)]
    return pairs, torch.Generator(device).manual_seed(int(rng.integers(2**62)))


@torch.no_grad()
def rollout(policy, value_head, reference, pairs, n_digits, args, generator):
    """Let the policy answer all problems, grade and score what it wrote -> dict of tensors."""
    # 1. Write the answers. Their tokens are the actions.
    prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
    ids, lengths = generate(policy, prompts, policy.config.block_size, args.temperature, generator)
    prompt_len = torch.tensor([len(p) for p in prompts], device=ids.device)
    states, actions, mask = split_actions(ids, prompt_len, lengths)
    n_actions = lengths - 1  # of a row without its padding; action i is token i + 1

    # 2. Grade them. The reward comes with the last action.
    texts = [data.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    success = [float(data.grade(text, a, b)) for text, (a, b) in zip(texts, pairs)]
    success = torch.tensor(success, device=ids.device)  # (B,)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(pairs), device=ids.device), n_actions - 1] = success

    # 3. Score each action under the reference and the policy, both at the sampling temperature.
    # The policy is read again: `generate` keeps no graph and no hidden states, which the critic
    # needs, and it computes in float32, where the update uses bfloat16 if the hardware can. The
    # ratio new / old is 1 at first only if both are read alike.
    ref_logits, _ = read(reference, states, n_actions, args.temperature)  # (B, T, V)
    logits, hidden = read(policy, states, n_actions, args.temperature)
    values = value_head(hidden)
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda)

    # 4. The weight of each token's penalty.
    J = certainty(ref_logits)
    weight = J**args.alpha  # the factor in eq. 1
    if args.kl_weight != "certainty":
        critical = known_critical(texts, pairs, n_digits, mask)
        weight = control_weight(args.kl_weight, weight, J, critical, mask, generator)
    return dict(states=states, actions=actions, mask=mask, n_actions=n_actions, success=success,
                old_logp=token_logp(logits, actions), ref_logp=token_logp(ref_logits, actions),
                ref_logits=ref_logits, weight=weight, advantages=advantages,
                returns=advantages + values)


def batch_slices(batch, rows):
    """Yields the batch's rows in slices of like length, without the padding that all share."""
    for part, T in slices(rows, batch["n_actions"]):
        yield {name: x[part, :T] for name, x in batch.items() if x.dim() > 1}


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
            for part in batch_slices(batch, rows):  # gradients add up over the slices
                with autocast(mask.device):
                    logits, hidden = policy(part["states"])
                logits = logits / args.temperature
                all_logp = F.log_softmax(logits, -1)  # (B, T, V)
                new_logp = token_logp(logits, part["actions"])  # (B, T), as all that follows
                ratio = ((new_logp.detach() - part["old_logp"]) * part["mask"]).exp()

                policy_loss = ppo_loss(new_logp, part["old_logp"], part["advantages"],
                                       part["mask"], args.clip)  # a mean; the others are (B, T)
                # k2 has the KL's gradient if the policy itself chose the actions. The old policy
                # chose these, so each counts pi / pi_old times.
                penalty = ratio * prioritized_kl(new_logp, part["ref_logp"], part["weight"])
                entropy = -(all_logp.exp() * all_logp).sum(-1)
                # Detached: the gradient of the critic's loss would disturb the policy.
                value_loss = (value_head(hidden.detach()) - part["returns"]) ** 2 / 2
                loss = policy_loss + masked_mean(
                    args.kl_coef * penalty - args.entropy_coef * entropy + value_loss, part["mask"])

                # Means of slices, times their fractions of the tokens, add up to the minibatch's.
                fraction = part["mask"].sum() / mask[rows].sum()
                (loss * fraction).backward()
                for name, x in figures(part, all_logp, ratio, penalty, entropy, value_loss,
                                       args.clip).items():
                    totals[name] += fraction * x
            totals["grad_norm"] += nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            check_finite(when, totals)
            optimizer.step()
    return {name: x.item() / (args.epochs * args.minibatches) for name, x in totals.items()}


@torch.no_grad()
def figures(part, all_logp, ratio, penalty, entropy, value_loss, clip):
    """What is logged of a slice -> {name: mean over its answer tokens}. kl is exact, in nats."""
    ref_logp = F.log_softmax(part["ref_logits"], -1)
    kl = (all_logp.exp() * (all_logp - ref_logp)).sum(-1)
    clipped = ((ratio - 1).abs() > clip).float()
    columns = dict(kl=kl, penalty=penalty, entropy=entropy, clip_fraction=clipped,
                   value_loss=value_loss, weight=part["weight"])
    return {name: masked_mean(x, part["mask"]) for name, x in columns.items()}


# ------------------------------------------------------------------ what is watched
def watch_critical(model, pairs, n_digits, temperature):
    """Probability of the right token, where the model has read the right answer up to there.

    Means over the critical tokens (p_critical), over the copied digits (p_copied), and over the
    last comma of each list (p_l1o1: line 1, operand 1), the six places of the paper's Figure 7.
    """
    ids, _, _ = to_batch(pairs, model.lm_head.weight.device)
    places = [data.critical_positions(a, b, n_digits) for a, b in pairs]
    n_read = torch.tensor([max(x.values()) + 1 for x in places], device=ids.device)  # to the last
    ids = ids[:, : n_read.max()]
    logits, _ = read(model, ids, n_read, temperature)
    p = token_logp(logits[:, :-1], ids[:, 1:]).exp().tolist()
    found = defaultdict(list)
    for row, positions in zip(p, places):
        for (line, operand, name), index in positions.items():
            p_right = row[index - 1]  # token i is action i - 1
            found["p_copied" if name == "copied" else "p_critical"].append(p_right)
            if name == "comma1":
                found[f"p_l{line}o{operand}"].append(p_right)
    return {name: np.mean(x) for name, x in found.items()}


def watch_known(model, pairs):
    """Mean cross-entropy in nats over the right answers' tokens: forgetting shows there first."""
    ids, prompt_len, lengths = to_batch(pairs, model.lm_head.weight.device)
    states, actions, mask = split_actions(ids, prompt_len, lengths)
    logits, _ = read(model, states, lengths - 1)
    return -masked_mean(token_logp(logits, actions), mask).item()


def final_accuracies(policy, facts, args):
    """The accuracies of model.accuracy_table and, as the paper's code evaluates, those of sampled
    answers to held-out problems like those of training -> {cell: share}, {cell: problems}.
    """
    n, k, task = facts["digits"], args.extra_digits, facts["task"]
    accuracies, counts = accuracy_table(policy, cells_of((n, n + k)), args.final_problems, task)
    problems = data.sample_problems(args.final_problems, n, "rl", 1, task, k)
    correct, _ = solve(policy, problems, args.temperature)
    accuracies["sampled, training mix"] = float(correct.mean())
    counts["sampled, training mix"] = len(problems)
    return accuracies, counts


# ------------------------------------------------------------------ training
def pretrained_name(model, facts):
    """A name that tells pre-trained models apart: "n5_seed0_ab67a433" ends in its weights' CRC."""
    weights = b"".join(p.cpu().numpy().tobytes() for p in model.parameters())
    return f"n{facts['digits']}_seed{facts['seed']}_{zlib.crc32(weights):08x}"


def train(args):
    # 1. The pre-trained model: where the policy starts and, frozen, the reference.
    device = args.device
    reference, facts = load_checkpoint(args.checkpoint, device)
    reference.requires_grad_(False)
    n, task, n_tokens = facts["digits"], facts["task"], reference.config.block_size
    longest = n + args.extra_digits
    if data.max_length(longest, task) > n_tokens:
        stop(f"{args.checkpoint} has no positions for {longest} digits; pre-train one with "
             f"--extra_digits {args.extra_digits}")
    # For each token of an answer: keys and values of all layers, and logits.
    n_floats = 2 * reference.config.n_layer * reference.config.n_embd + len(data.VOCAB)
    n_answers = max(args.episodes, min(64, max(args.eval_problems, args.final_problems)))
    check_memory(4 * n_floats * n_tokens * n_answers, device, "--episodes, or fewer problems")
    pretrained = pretrained_name(reference, facts)
    prefix = f"ppo_{pretrained}_alpha{args.alpha}".removesuffix(".0")
    folder = folder_of(args, parse_args([]), prefix, ["alpha"])
    if os.path.realpath(folder) == os.path.dirname(os.path.realpath(args.checkpoint)):
        stop(f"--out {folder} holds the checkpoint in use; choose another --out")
    policy = copy.deepcopy(reference).requires_grad_(True)
    value_head = ValueHead(policy.config.n_embd, torch.Generator().manual_seed(args.seed))
    value_head.to(device)
    optimizer = torch.optim.Adam([dict(params=policy.parameters(), lr=args.lr),
                                  dict(params=value_head.parameters(), lr=args.value_lr)])
    settings = settings_of(args) | dict(digits=n, task=task, preset=facts["preset"],
                                        pretrained=pretrained)
    run = Run(folder, settings, LOG, args.fresh,
              dict(policy=policy, value_head=value_head, optimizer=optimizer), first=0)
    if run.finished:
        return

    # 2. What is measured, on held-out problems, and what is printed of it.
    known_problems = data.sample_problems(args.eval_problems, n, "train", 2, task)
    critical_problems = data.sample_problems(args.eval_problems, n, "rl", 2, task,
                                             args.extra_digits)
    columns = dict(n_identical=f"identical {n}", nk_identical=f"identical {longest}",
                   nk_varying=f"varying {longest}")  # of log.csv: cells of the accuracies
    shown = dict(success=("success", ".1%"), nk_identical=(f"two {longest}-digit", ".1%"),
                 n_identical=(f"two {n}-digit", ".1%"), p_critical=("P(critical)", ".1%"),
                 weight=("weight", ".3f"), kl=("KL", ".4f"))  # column: title, format
    print_table(facts["accuracies"], "before")
    print(f"\nPPO on {longest} digits: alpha {args.alpha:g}, kl_coef {args.kl_coef:g}, "
          f"{args.iterations} iterations of {args.episodes} episodes, on {device}")
    print(" it" + "".join(f"{title:>13}" for title, _ in shown.values()))

    # 3. Train.
    bar = tqdm(range(run.step + 1, args.iterations + 1), desc="ppo", unit="it",
               initial=run.step + 1, total=args.iterations + 1, dynamic_ncols=True, leave=False)
    for iteration in bar:
        row = dict(iteration=iteration, episodes=iteration * args.episodes)
        if iteration > 0:  # row 0 of the log is the pre-trained model
            pairs, generator = draw_problems(args, facts, iteration, device)
            batch = rollout(policy, value_head, reference, pairs, n, args, generator)
            row |= update(policy, value_head, optimizer, batch, args, generator,
                          f"iteration {iteration}")
            row["success"] = batch["success"].mean().item()
        row |= watch_critical(policy, critical_problems, n, args.temperature)
        check_finite(f"iteration {iteration}", dict(p_critical=row["p_critical"]))
        if iteration == args.iterations:
            accuracies, counts = final_accuracies(policy, facts, args)
        elif iteration == 0:
            accuracies = facts["accuracies"]
        elif iteration % args.eval_every == 0:
            accuracies, _ = accuracy_table(policy, columns.values(), args.eval_problems, task)
        else:
            accuracies = {}
        if accuracies:
            row |= {name: accuracies[cell] for name, cell in columns.items() if cell in accuracies}
            row["n_nats"] = watch_known(policy, known_problems)
        cells = [format(round(row[name], 6) + 0.0, form) if name in row else "-"  # no -0.0000
                 for name, (_, form) in shown.items()]
        tqdm.write(f"{iteration:3d}" + "".join(f"{cell:>13}" for cell in cells))
        bar.set_postfix({name: f"{row[name]:.3f}" for name in ("success", "kl") if name in row})
        if iteration == 1 and row["success"] == 0:
            tqdm.write("    no answer was right: so far there is nothing to learn from; a model\n"
                       "    that was pre-trained on more digits may get some right")
        run.log(iteration, row, last=iteration == args.iterations)

    # 4. Measure, unless the loop did, and save.
    if run.step == args.iterations:  # all that was left to do after an interrupt
        accuracies, counts = final_accuracies(policy, facts, args)
    save_checkpoint(run.folder / "model.pt", policy, torch.float32, digits=n, task=task,
                    preset=facts["preset"], seed=facts["seed"], settings=run.settings,
                    accuracies=accuracies)
    print_table(accuracies, f"after {args.iterations * args.episodes:,} episodes", counts)
    run.finish(before=facts["accuracies"], after=accuracies, problems=counts)
    print(f"the learning curves: python analyze.py curves {run.folder}")


def main(argv=None):
    return run_script(train, parse_args(argv))


# ------------------------------------------------------------------ controls of the weight
def control_weight(kind, weight, J, critical, mask, generator):
    """Another weight (B, T), to test whether it matters *where* the penalty is small.

    weight, J (the certainty), critical (of known_critical) and mask are (B, T), too.
    """
    if kind == "matched":  # the mean weight, everywhere
        return masked_mean(weight, mask).expand_as(mask)
    if kind == "shuffled":  # the same weights, at other answer tokens
        dealt, of_answers = weight.clone(), weight[mask > 0]
        order = torch.randperm(len(of_answers), generator=generator, device=mask.device)
        dealt[mask > 0] = of_answers[order]
        return dealt
    if kind == "threshold":  # no penalty at all where the reference is not sure
        return weight * (J >= 0.9)
    return 1 - critical  # "oracle": no penalty at critical tokens and copied digits, else 1


def known_critical(texts, pairs, n_digits, mask):
    """1.0 at the critical tokens and copied digits that a text reaches without an error (B, T)."""
    critical = torch.zeros_like(mask)
    for i, (text, (a, b)) in enumerate(zip(texts, pairs)):
        error = data.first_error(text, a, b)
        for index in data.critical_positions(a, b, n_digits).values():
            if error is None or index <= error:
                critical[i, index - 1] = 1.0  # token i is action i - 1
    return critical


if __name__ == "__main__":
    sys.exit(main())
