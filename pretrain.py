"""Pre-train a GPT-2 from scratch on additions of 1..N digits.  Run: python pretrain.py --seed 1

Writes model.pt and its logs to out/pretrain_n5_seed1. B sequences, T tokens, V vocabulary.
"""
import argparse
import ctypes
import itertools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from model import (GPT, GPTConfig, PRESETS, autocast, generate, get_device, load, read, sample,
                   save, save_checkpoint, split_actions, stop)


# ------------------------------------------------------------------ batches, loss, optimizers
def to_batch(pairs, device):
    """Worked problems -> ids (B, T), prompt_len (B,), lengths (B,); 0 after a row's end."""
    prompts = [data.prompt(a, b) for a, b in pairs]
    texts = [prompt + data.answer(a, b) for prompt, (a, b) in zip(prompts, pairs)]
    ids = pad_sequence([torch.tensor(data.encode(text)) for text in texts], batch_first=True)
    prompt_len, lengths = (torch.tensor([len(x) for x in xs]) for xs in (prompts, texts))
    return ids.to(device), prompt_len.to(device), lengths.to(device)


def pretrain_batches(n_digits, batch_size, block_size, seed, device, task="add", start=0):
    """Endless batches (ids, prompt_len, lengths, offset) of worked problems, from batch `start` on.

    64 batches' problems are drawn at once, sorted by length, cut into batches and shuffled, so a
    batch holds little padding. offset (B, 1): the row's place in the block. Half of the rows start
    at 0, as in every test; the others anywhere, so that all positions are trained. (If all rows
    start anywhere, N+1 digits are learned along with N, and nothing is left to RL.)
    """
    for pool in itertools.count(start // 64):
        rng = np.random.default_rng([seed, pool])
        pairs = [data.sample_pair(rng, n_digits, "train", task=task)
                 for _ in range(64 * batch_size)]
        pairs.sort(key=lambda pair: len(str(max(pair))))
        order = rng.permutation(64)
        places = np.maximum(0, rng.uniform(-1, 1, (64, batch_size, 1)))
        for i in range(max(0, start - 64 * pool), 64):
            batch = pairs[order[i] * batch_size :][:batch_size]
            ids, prompt_len, lengths = to_batch(batch, device)
            offset = (places[i] * (block_size - ids.shape[1] + 1)).astype(int)
            yield ids, prompt_len, lengths, torch.from_numpy(offset).to(device)


def answer_loss(model, ids, prompt_len, lengths, offset=0):
    """Mean cross-entropy in nats over the answers' tokens; the prompts are given."""
    states, actions, mask = split_actions(ids, prompt_len, lengths)
    with autocast(ids.device):
        logits, _ = model(states, offset)  # (B, T-1, V)
    loss = F.cross_entropy(logits.transpose(1, 2), actions, reduction="none")  # (B, T-1)
    return (loss * mask).sum() / mask.sum()


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonal update: for a matrix G = U S V^T, U V^T (Jordan et al. 2024).

    All directions move alike, not only those of a gradient's few large singular values: fewer steps
    are needed. Entries have AdamW's usual size, 0.2 (root mean square), so both take one learning
    rate. (PyTorch's own always multiplies in bfloat16: half a second a step on a CPU without it.)
    """

    def __init__(self, matrices, lr, weight_decay):
        shapes = {}
        for p in matrices:
            shapes.setdefault(p.shape, []).append(p)  # matrices of one shape are done at once
        super().__init__([dict(params=ps) for ps in shapes.values()],
                         dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            ps = group["params"]
            gradient = torch.stack([p.grad for p in ps])  # (matrices, rows, columns)
            momentum = self.state[ps[0]].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            x = gradient.lerp(momentum, 0.95)  # Nesterov's
            tall = x.shape[-2] > x.shape[-1]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            with autocast(x.device):
                for _ in range(5):  # Newton-Schulz: a polynomial that takes singular values near 1
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            size = 0.2 * max(x.shape[-2:]) ** 0.5
            for p, update in zip(ps, x.mT if tall else x):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * size)


def make_optimizers(model, lr):
    """Muon for the blocks' weight matrices, AdamW for embeddings, biases and norms."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or ".h." not in name]
    return [Muon(matrices, lr=lr, weight_decay=0.1),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


def learning_rate(step, steps, peak):
    """100 steps of linear warm-up, then constant, then linear decay to 0 over the last 80%."""
    return peak * min((step + 1) / 100, 1.0, (steps - step) / (0.8 * steps))


# ------------------------------------------------------------------ evaluation
def sample_problems(n, n_digits, mode, seed, task="add", extra_digits=1):
    """n held-out problems [(a, b)], the same for the same seed."""
    rng = np.random.default_rng([seed, n_digits])
    return [data.sample_pair(rng, n_digits, mode, extra_digits, test=True, task=task)
            for _ in range(n)]


def read_ahead(model, pairs, temperature, generator):
    """The first part of the model's answers, in one pass instead of many -> lists of ids.

    The model reads the right answers and samples a token after each of their tokens. Up to the
    first that differs, it has read what it would have written itself. So these tokens, the one that
    differs included, are its own (up to rounding). A right answer is then complete.
    """
    ids, prompt_len, lengths = to_batch(pairs, model.lm_head.weight.device)
    tokens = sample(read(model, ids, lengths)[0], temperature, generator)  # (B, T)
    _, right, mask = split_actions(ids, prompt_len, lengths)
    same = ((tokens[:, :-1] == right) | (mask == 0)).cumprod(1)  # 1 before the first difference
    n_known = torch.minimum(same.sum(1) + 2, lengths)  # + token 0 and what differs
    ids = torch.cat([ids[:, :1], torch.where(mask > 0, tokens[:, :-1], right)], 1)
    return [row[:n] for row, n in zip(ids.tolist(), n_known.tolist())]


def solve(model, pairs, temperature=0, seed=0, batch_size=256):
    """Let the model answer all problems -> (correct: bool (n,), texts: n prompts + answers)."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    texts = []
    for i in range(0, len(pairs), batch_size):
        known = read_ahead(model, pairs[i : i + batch_size], temperature, generator)
        ids, lengths = generate(model, known, model.config.block_size, temperature, generator)
        texts += [data.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    return np.array([data.grade(text, a, b) for text, (a, b) in zip(texts, pairs)]), texts


def accuracy_table(model, lengths, n_problems, task):
    """Greedy accuracies {"identical 5": share, "varying 5": ...} as in the paper's Tables 4, 5."""
    table = {}
    for length, mode in itertools.product(lengths, ("identical", "varying")):
        correct, _ = solve(model, sample_problems(n_problems, length, mode, 1, task))
        table[f"{mode} {length}"] = float(correct.mean())
    return table


def print_table(table, title):
    print(f"\n{title}: accuracy in %, greedy, on held-out problems")
    for cell, share in table.items():
        print(f"  {cell:<14}{100 * share:6.1f}")


# ------------------------------------------------------------------ training
def parse_args(argv):
    ap = argparse.ArgumentParser(
        description="Pre-train a GPT-2 from scratch on additions of 1..N digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = ap.add_argument
    add("--digits", type=int, default=5, help="N: train on operands of 1..N digits")
    add("--extra_digits", type=int, default=1, help="k: leave positions for answers of N+k digits")
    add("--task", choices=data.TASKS, default="add", help="what the problems are")
    add("--preset", choices=PRESETS, default="small", help="model size; paper is for a GPU")
    add("--steps", type=int, default=3200, help="optimizer steps")
    add("--batch_size", type=int, default=8, help="worked problems a step")
    add("--lr", type=float, default=3e-3, help="peak learning rate of Muon and AdamW")
    add("--eval_problems", type=int, default=250, help="held-out problems for each final accuracy")
    add_run_options(ap)
    args = ap.parse_args(argv)
    check_range(ap, args, 1, "digits", "steps", "batch_size", "eval_problems")
    check_range(ap, args, 0, "extra_digits", "lr", "seed")
    if args.out == "auto":
        args.out = default_folder(ap, args, f"pretrain_n{args.digits}", ("digits",))
    return args


def main(argv=None):
    # 1. Settings, model, optimizers.
    args = parse_args(argv)
    device = get_device(args.device)
    keep_freed_memory()
    long = args.digits + args.extra_digits
    block_size = math.ceil(data.max_length(long, args.task) / 32) * 32
    config = GPTConfig(block_size, **PRESETS[args.preset])
    model = GPT(config, torch.Generator().manual_seed(args.seed)).to(device)
    muon, adamw = make_optimizers(model, args.lr)
    run = Run(args, model=model, muon=muon, adamw=adamw)
    if run.finished:
        return
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"pre-training on 1..{args.digits} digits: {n_parameters:,} parameters, {args.steps} "
          f"steps of {args.batch_size} problems, on {device}")

    # 2. Train. Every random number follows from the seed and the step alone.
    watched = dict(n_identical=sample_problems(64, args.digits, "identical", 2, args.task),
                   nk_varying=sample_problems(64, long, "varying", 2, args.task))
    batches = pretrain_batches(args.digits, args.batch_size, block_size, args.seed, device,
                               args.task, start=run.step)
    losses, norms, measured = [], [], "N -, N+k -"
    bar = tqdm(range(run.step + 1, args.steps + 1), desc="pre-train", unit="step",
               initial=run.step, total=args.steps, dynamic_ncols=True, mininterval=1, leave=False)
    for step in bar:
        lr = learning_rate(step - 1, args.steps, args.lr)
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = lr
        loss = answer_loss(model, *next(batches))
        model.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        muon.step()
        adamw.step()
        losses.append(loss.detach())

        if step % 100 == 0 or step == args.steps:  # figures are fetched from a GPU only here
            row = dict(step=step, loss=torch.stack(losses).mean().item(), lr=lr,
                       grad_norm=torch.stack(norms).mean().item())
            check_finite(f"step {step}", row)
            if step % 500 == 0:
                row |= {name: solve(model, pairs)[0].mean() for name, pairs in watched.items()}
                measured = f"N {row['n_identical']:.0%}, N+k {row['nk_varying']:.0%}"
            run.log(step, row, last=step == args.steps)
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {measured}")
            losses, norms = [], []

    # 3. Measure and save.
    model.bfloat16().float()  # it is saved in bfloat16, half the size: measure what is saved
    table = accuracy_table(model, range(args.digits, long + 1), args.eval_problems, args.task)
    save_checkpoint(run.folder / "model.pt", model, torch.bfloat16, digits=args.digits,
                    task=args.task, preset=args.preset, seed=args.seed, settings=run.settings,
                    accuracies=table)
    print_table(table, f"{args.eval_problems} problems per cell")
    run.finish(after=table)
    print(f"where it fails: python analyze.py tokens {run.folder / 'model.pt'}")


# ------------------------------------------------------------------ what a run keeps on disk
def keep_freed_memory():
    """glibc keeps freed memory for the next tensors: new pages are a fifth of a step on a CPU."""
    if sys.platform == "linux":  # M_MMAP_THRESHOLD: up to 1 GiB from the heap; M_TRIM_THRESHOLD
        for option, value in (-3, 2**30), (-1, 2**31 - 1):
            ctypes.CDLL(None).mallopt(option, value)


def add_run_options(ap):
    ap.add_argument("--seed", type=int, default=0, help="seed of every random number")
    ap.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest")
    ap.add_argument("--out", default="auto", help="folder of the run; auto: out/<settings>")
    ap.add_argument("--fresh", action="store_true", help="start over instead of resuming the run")


def check_range(ap, args, low, *names):
    for name in names:
        if not low <= getattr(args, name) < math.inf:  # nan is in no range
            ap.error(f"--{name} must be {low} or more, not {getattr(args, name)}")


NOT_SETTINGS = ("checkpoint", "device", "out", "fresh", "explain")  # may change on resuming


def default_folder(ap, args, prefix, unnamed):
    """out/<prefix>_<settings that differ from their defaults>_seed<seed>, at most 80 characters."""
    changed = [f"{name}{value}" for name, value in vars(args).items()
               if value != ap.get_default(name) and name not in (*NOT_SETTINGS, *unnamed, "seed")]
    return os.path.join("out", "_".join([prefix, *changed])[:60] + f"_seed{args.seed}")


def check_finite(when, figures):
    """Stop the run at the first of {name: value} that is nan or infinite."""
    for name, x in figures.items():
        if not math.isfinite(x):
            stop(f"{name} is {x} at {when}; lower --lr. What the run saved is from before")


def write_text(path, text):
    Path(f"{path}.part").write_text(text)
    os.replace(f"{path}.part", path)  # whole, or as it was before


class Run:
    """A run's folder: settings.json, log.csv, state.pt and, when finished, accuracies.json.

    The same command resumes from state.pt: what it holds is loaded into `parts`, modules and
    optimizers by name. On a CPU a resumed run ends with the weights of one that never stopped.
    """

    def __init__(self, args, **parts):
        self.settings = {name: x for name, x in vars(args).items() if name not in NOT_SETTINGS}
        self.folder, self.parts = Path(args.out), parts
        self.step, self.rows, self.earlier = 0, [], 0.0  # earlier: seconds of interrupted runs
        self.started = self.saved = time.time()
        self.code = [zlib.crc32(Path(__file__).with_name(f"{name}.py").read_bytes())
                     for name in ("data", "model", "kl", "pretrain", "ppo")]
        if args.fresh:
            for name in ("accuracies.json", "state.pt", "settings.json", "log.csv", "model.pt"):
                (self.folder / name).unlink(missing_ok=True)
        if (self.folder / "settings.json").exists():
            others = json.loads((self.folder / "settings.json").read_text())
            for name, value in self.settings.items():
                if others.get(name) != value:
                    stop(f"{self.folder} holds a run with {name} {others.get(name)}, not {value}; "
                         "choose another --out, or --fresh to start over there")
        self.finished = (self.folder / "accuracies.json").exists()
        if self.finished:
            print(f"{self.folder} is finished; --fresh starts over")
        if (self.folder / "state.pt").exists():
            state = load(self.folder / "state.pt")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.rows, self.earlier = state["step"], state["rows"], state["seconds"]
            if not self.finished:
                print(f"{self.folder} resumes after step {self.step}; --fresh starts over")
            if state["code"] != self.code:
                print("note: the code has changed since that step")

    def log(self, step, row, last):
        """Add a row to log.csv. With the last row, or after 30 seconds, save the state, too."""
        seconds = self.earlier + time.time() - self.started
        row = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
        self.rows.append(row | dict(seconds=f"{seconds:.1f}"))
        columns = dict.fromkeys(name for row in self.rows for name in row)
        cells = [[str(row.get(name, "")) for name in columns] for row in self.rows]
        table = "".join(",".join(line) + "\n" for line in [columns, *cells])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "settings.json", json.dumps(self.settings, indent=1))
            write_text(self.folder / "log.csv", table)
        except OSError as error:
            stop(f"cannot write to {self.folder} ({error.strerror}); choose another --out")
        if last or time.time() - self.saved >= 30:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            save(self.folder / "state.pt", dict(states, step=step, rows=self.rows, seconds=seconds,
                                               code=self.code))
            self.saved = time.time()

    def finish(self, **tables):
        """Write accuracies.json: its presence says that the run is finished."""
        write_text(self.folder / "accuracies.json", json.dumps(tables, indent=1))
        minutes = (self.earlier + time.time() - self.started) / 60
        print(f"\nfinished in {minutes:.1f} minutes; saved {self.folder / 'model.pt'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command resumes from where it last saved")
