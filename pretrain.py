"""Pre-train a GPT-2 from scratch on additions of 1..N digits.

Run:  python pretrain.py --digits 5 --preset small --seed 0

Writes out/<run>/model.pt (the checkpoint), log.csv and settings.json, and ends with the accuracies of the paper's
Tables 4 and 5. B sequences, T tokens, V vocabulary.
"""
import argparse
import contextlib
import copy
import csv
import json
import math
import os
import pickle
import struct
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from model import GPT, GPTConfig, PRESETS, generate, split_actions


# --------------------------------------------------------------------------- errors, device, checkpoints
class UserError(Exception):
    """Something the user can mend. Its one line names the problem and the way out; the exit code is 2."""


def run(main):
    """Run a script's main() so that a UserError ends in one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse, with our one-line errors, and defaults shown in --help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def within(kind, low, high):
    """An argparse type: int or float text to a number from low to high. nan is never within."""
    def parse(text):
        number = kind(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return number
    parse.__name__ = kind.__name__  # argparse names it for text that is no number at all
    return parse


COUNT, SEED = within(int, 1, 10**9), within(int, 0, 2**62)


def first_line(error):
    return (str(error).splitlines() or [""])[0]


def get_device(name):
    """'auto' -> cuda, else mps, else cpu; any other name is checked by making a tensor there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device, for one that is not there
        raise UserError(f"device {name!r} cannot be used ({first_line(error)}); try --device cpu") from None


def has_fast_bfloat16(device):
    """Whether the hardware multiplies matrices in bfloat16, and so about twice as fast or more."""
    if device.type == "cpu":  # AMX or AVX-512 BF16; older releases of PyTorch cannot tell
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device):
    """Matrix products in bfloat16 where that is fast; weights, losses and sums stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bfloat16(device) else contextlib.nullcontext()


def to_sample(model):
    """The model to generate with: where it is fast a bfloat16 copy, whose KV cache is half as long to read."""
    fast = has_fast_bfloat16(model.lm_head.weight.device)
    return copy.deepcopy(model).bfloat16() if fast else model


def save_checkpoint(path, model, **facts):
    """Weights, config and vocabulary, and what else explains the checkpoint; renamed into place when whole."""
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    checkpoint = dict(model=weights, config=asdict(model.config), vocab=data.VOCAB, **facts)
    try:
        torch.save(checkpoint, path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path} ({first_line(error)}); choose another folder with --out") from None


def load_checkpoint(path, device):
    """A checkpoint of ours -> (model in eval mode, the checkpoint's dict). Anything else is a UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["vocab"] != data.VOCAB:
            raise UserError(f"{path} has another vocabulary than data.py; pre-train again")
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        checkpoint["digits"]  # both scripts save it
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give the model.pt that pretrain.py made") from None
    except (EOFError, RuntimeError, pickle.UnpicklingError, struct.error, LookupError, TypeError, ValueError,
            AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is not a whole checkpoint of this project ({type(error).__name__}: "
                        f"{first_line(error)}); make it again with pretrain.py") from None
    return model.to(device).eval(), checkpoint


def default_folder(prefix, parser, args, unnamed):
    """out/<prefix>_<settings that differ from the defaults>_seed<seed>: runs with other settings never meet."""
    changed = [f"{name}{value}".replace(os.sep, "-") for name, value in vars(args).items()
               if value != parser.get_default(name) and name not in (*unnamed, "seed", "device", "out")]
    return "out/" + "_".join([prefix, *changed, f"seed{args.seed}"])


def start_log(folder, settings, columns):
    """Make the run's folder with settings.json and an empty log.csv -> the log's file and its csv.DictWriter."""
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "settings.json"), "w") as f:
            json.dump(settings, f, indent=1)
        f = open(os.path.join(folder, "log.csv"), "w", newline="")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from None
    log = csv.DictWriter(f, columns)
    log.writeheader()
    return f, log


# --------------------------------------------------------------------------- evaluation
def sample_problems(n, n_digits, mode, seed, extra_digits=1):
    """n held-out problems, the same for the same seed."""
    rng = np.random.default_rng([seed, n_digits])
    return [data.sample_pair(rng, n_digits, mode, extra_digits, test=True) for _ in range(n)]


def solve(model, pairs, temperature=0, seed=0, batch_size=256):
    """Let the model answer all problems -> (correct: bool array (n,), texts: list of n prompts + answers)."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    model, texts = to_sample(model), []
    for i in range(0, len(pairs), batch_size):
        prompts = [data.encode(data.prompt(a, b)) for a, b in pairs[i : i + batch_size]]
        ids, lengths = generate(model, prompts, model.config.block_size, temperature, generator)
        texts += [data.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    return np.array([data.grade(text, a, b) for text, (a, b) in zip(texts, pairs)]), texts


def bootstrap(values, seed=0, resamples=1000):
    """Mean of values (n,) and its 95% interval by resampling -> (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return values.mean(), low, high


def accuracy_table(model, n_digits, n_problems):
    """The paper's Tables 4 and 5, greedy: L = N .. N+3, as far as the block holds L.

    Returns {(mode, L): (mean, low, high)} and the failures [(text, a, b)].
    """
    table, failures = {}, []
    for length in range(n_digits, n_digits + 4):
        for mode in ("identical", "varying"):
            if data.max_length(length) <= model.config.block_size:
                pairs = sample_problems(n_problems, length, mode, seed=1)
                correct, texts = solve(model, pairs)
                table[mode, length] = bootstrap(correct)
                failures += [(text, a, b) for text, (a, b), good in zip(texts, pairs, correct) if not good]
    return table, failures


def print_table(table, title):
    print(f"\n{title}: accuracy in % [95% interval]")
    for mode in ("identical", "varying"):
        cells = [f"{length} digits {100 * m:5.1f} [{100 * lo:.1f}, {100 * hi:.1f}]"
                 for (row, length), (m, lo, hi) in table.items() if row == mode]
        print(f"  {mode:<9}  " + "   ".join(cells))


# --------------------------------------------------------------------------- training
def to_batch(pairs, device):
    """Worked problems -> ids (B, T) padded with 0, prompt_len (B,), lengths (B,)."""
    prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
    rows = [p + data.encode(data.answer(a, b)) for p, (a, b) in zip(prompts, pairs)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    prompt_len, lengths = torch.tensor([len(p) for p in prompts]), torch.tensor([len(row) for row in rows])
    return ids.to(device), prompt_len.to(device), lengths.to(device)


def pretrain_batches(n_digits, batch_size, block_size, seed, device):
    """Endless batches (ids, prompt_len, lengths, offset) of worked problems of like length.

    64 batches' problems are drawn at once, sorted by the number of lines, cut into batches and shuffled: so little is
    padding. offset (B,) is the row's random place in the block: a row starts anywhere, so all positions are trained.
    """
    rng = np.random.default_rng([seed, 0])
    while True:
        pool = [data.sample_pair(rng, n_digits, "train") for _ in range(64 * batch_size)]
        pool.sort(key=lambda pair: len(str(max(pair))))
        for i in rng.permutation(64):
            ids, prompt_len, lengths = to_batch(pool[i * batch_size : (i + 1) * batch_size], device)
            offset = torch.from_numpy(rng.integers(0, block_size - ids.shape[1] + 1, len(ids))).to(device)
            yield ids, prompt_len, lengths, offset


def answer_loss(model, ids, prompt_len, lengths, offset=None):
    """Mean cross-entropy in nats over the answers' tokens; the prompt's are not the model's to predict."""
    states, actions, mask = split_actions(ids, prompt_len, lengths)
    with autocast(ids.device):
        logits, _ = model(states, offset)  # (B, T-1, V)
    loss = F.cross_entropy(logits.transpose(1, 2), actions, reduction="none")  # (B, T-1)
    return (loss * mask).sum() / mask.sum()


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then constant, then linear decay to 0 over the last 80% of the steps."""
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (0.8 * steps))


def block_for(n_digits):
    """The block that answers of n_digits digits need, in whole 32s: 6 -> 480."""
    return math.ceil(data.max_length(n_digits) / 32) * 32


def parse_args(argv):
    ap = Parser(description="Pre-train a GPT-2 from scratch on additions of 1..N digits.")
    add = ap.add_argument
    add("--digits", type=within(int, 1, 50), default=5, help="N: train on operands of 1..N digits")
    add("--preset", choices=PRESETS, default="small", help="model size: small for a laptop, paper for a GPU")
    add("--steps", type=COUNT, default=4000, help="optimizer steps")
    add("--batch_size", type=COUNT, default=8, help="worked problems a step")
    add("--lr", type=within(float, 0, 1e3), default=3e-3, help="peak learning rate of Muon and AdamW")
    add("--warmup", type=COUNT, default=100, help="steps of linear warm-up")
    add("--block_size", type=within(int, 0, 10**5), default=0,
        help="positions of the model; 0: what N+1 digits need, in whole 32s")
    add("--eval_problems", type=COUNT, default=250, help="held-out problems for each accuracy of the final table")
    add("--seed", type=SEED, default=0, help="of initialization and data")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
    add("--out", default="", help="folder for the run; default: out/pretrain_<settings>")
    args = ap.parse_args(argv)
    args.out = args.out or default_folder(f"pretrain_n{args.digits}_{args.preset}", ap, args, ("digits", "preset"))
    return args


def main(argv=None):
    # 1. Settings
    args = parse_args(argv)
    block_size, needed = args.block_size or block_for(args.digits + 1), data.max_length(args.digits)
    if needed > block_size:
        raise UserError(f"--digits {args.digits} needs --block_size {needed} or more, not {block_size}")
    device = get_device(args.device)

    # 2. Model and optimizer
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(block_size=block_size, **PRESETS[args.preset])).to(device)
    # Muon for the blocks' weight matrices takes fewer steps than AdamW, which has the embeddings, biases and norms.
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or ".h." not in name]
    optimizers = [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    batches = pretrain_batches(args.digits, args.batch_size, block_size, args.seed, device)
    print(f"pre-training on 1..{args.digits} digits: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"block {block_size}, {args.steps} steps of {args.batch_size} problems, on {device}")

    # 3. Train
    watched = dict(identical_n=sample_problems(64, args.digits, "identical", seed=2),
                   varying_n1=sample_problems(64, args.digits + 1, "varying", seed=2))
    accuracies = dict.fromkeys(watched, 0.0)
    started = since = time.time()
    losses, tokens = [], 0
    f, log = start_log(args.out, vars(args) | dict(block_size=block_size),
                       ["step", "loss", "lr", *watched, "tokens_per_s", "seconds"])
    with f:
        bar = tqdm(range(1, args.steps + 1), desc="pre-train", unit="step", mininterval=1, dynamic_ncols=True)
        for step in bar:
            lr = learning_rate(step - 1, args.steps, args.lr, args.warmup)
            ids, prompt_len, lengths, offset = next(batches)
            loss = answer_loss(model, ids, prompt_len, lengths, offset)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            losses.append(loss.detach())
            tokens += ids.numel()

            if step % 100 == 0 or step == args.steps:
                mean_loss = torch.stack(losses).mean().item()
                if not math.isfinite(mean_loss):
                    raise UserError(f"the loss is {mean_loss} at step {step}, nothing was saved; lower --lr {args.lr:g}")
                row = dict(step=step, loss=f"{mean_loss:.5f}", lr=f"{lr:.6f}",
                           tokens_per_s=f"{tokens / (time.time() - since):.0f}")
                if step % 1000 == 0:
                    accuracies = {name: solve(model, pairs)[0].mean() for name, pairs in watched.items()}
                    row |= accuracies
                since = time.time()
                log.writerow(row | dict(seconds=f"{since - started:.1f}"))
                f.flush()
                bar.set_postfix_str(f"loss {row['loss']}, N {accuracies['identical_n']:.0%}, "
                                    f"N+1 {accuracies['varying_n1']:.0%}, {row['tokens_per_s']} tokens/s")
                losses, tokens = [], 0

    # 4. Save, measure, show failures
    minutes = (time.time() - started) / 60
    model.eval()
    save_checkpoint(os.path.join(args.out, "model.pt"), model, digits=args.digits, step=args.steps, settings=vars(args))
    table, failures = accuracy_table(model, args.digits, args.eval_problems)
    print_table(table, f"greedy, {args.eval_problems} held-out problems a cell")
    print("\nthree failures, at their first wrong character")
    for text, a, b in failures[:: max(1, len(failures) // 3)][:3]:
        print(f"  {a}+{b}: {data.describe_error(text, a, b)}")
    print(f"\ntrained in {minutes:.1f} minutes; saved {args.out}/model.pt")
    return table


if __name__ == "__main__":
    run(main)
