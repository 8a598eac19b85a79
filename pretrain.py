"""Pre-train a GPT-2 from scratch on additions of 1..N digits.  Run: python pretrain.py --seed 1

Writes model.pt and its logs to out/pretrain_n5_seed1. B sequences, T tokens, V vocabulary.
"""
import argparse
import csv
import ctypes
import io
import itertools
import json
import math
import os
import re
import signal
import sqlite3
import sys
import time
import zlib
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the script quietly while PyTorch loads
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import data
from model import (GPT, GPTConfig, PRESETS, accuracy_table, autocast, cells_of, get_device, load,
                   read_file, save_checkpoint, solve, split_actions, to_batch, write_file)

LOG = "step loss lr grad_norm n_identical nk_varying".split()  # columns of log.csv


# ------------------------------------------------------------------ settings
def parse_args(argv):
    ap = argparse.ArgumentParser(
        description="Pre-train a GPT-2 from scratch on additions of 1..N digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = ap.add_argument
    add("--digits", type=number(int, 1, 100), default=5, help="N: train on operands of 1..N digits")
    add("--extra_digits", type=number(int, 0, 100), default=1,
        help="k: leave positions for answers of N+k digits")
    add("--task", choices=data.TASKS, default="add", help="what the problems are")
    add("--preset", choices=PRESETS, default="narrow", help="model size; paper is for a GPU")
    add("--steps", type=number(int, 1, 10**9), default=4000,
        help="optimizer steps; 4000 take about 10 minutes for N = 3, 20 for 5, 30 for 7")
    add("--batch_size", type=number(int, 1, 10**5), default=8, help="worked problems a step")
    add("--lr", type=number(float, 0, 1), default=3e-3, help="peak learning rate, Muon and AdamW")
    add("--eval_problems", type=number(int, 1, 10**5), default=250,
        help="held-out problems for each final accuracy")
    add_run_options(ap)
    return ap.parse_args(argv)


# ------------------------------------------------------------------ batches, loss, optimizers
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
        # Of numbers between -1 and 1 half are negative: these rows start at 0.
        places = np.maximum(0, rng.uniform(-1, 1, (64, batch_size, 1)))
        first = max(0, start - 64 * pool)
        for i in range(first, 64):
            batch = pairs[order[i] * batch_size :][:batch_size]
            ids, prompt_len, lengths = to_batch(batch, device)
            n_places = block_size - ids.shape[1] + 1  # where a row of T tokens can start
            offset = (places[i] * n_places).astype(int)
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
            if tall:
                x = x.mT
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            with autocast(x.device):
                for _ in range(5):  # Newton-Schulz: a polynomial that takes singular values near 1
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            if tall:
                x = x.mT
            size = 0.2 * max(x.shape[-2:]) ** 0.5
            for p, update in zip(ps, x):
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


# ------------------------------------------------------------------ training
def train(args):
    # 1. Model and optimizers.
    device = args.device
    longest = args.digits + args.extra_digits
    block_size = math.ceil(data.max_length(longest, args.task) / 32) * 32
    config = GPTConfig(block_size, **PRESETS[args.preset])
    # Kept for the gradient: the attention scores of all layers, and their softmax. In an
    # evaluation: the keys and values of 64 answers.
    n_scores = config.n_head * args.batch_size * block_size**2
    n_keys = 64 * block_size * config.n_embd
    check_memory(8 * config.n_layer * max(n_scores, n_keys), device, "--digits or --batch_size")
    model = GPT(config, torch.Generator().manual_seed(args.seed)).to(device)
    muon, adamw = make_optimizers(model, args.lr)
    prefix = f"pretrain_n{args.digits}"
    run = Run(folder_of(args, parse_args([]), prefix, named=["digits"]), settings_of(args), LOG,
              args.fresh, dict(model=model, muon=muon, adamw=adamw))
    if run.finished:
        return
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"pre-training on 1..{args.digits} digits: {n_parameters:,} parameters, {args.steps} "
          f"steps of {args.batch_size} problems, on {device}")

    # 2. Train. Every random number follows from the seed and the step alone.
    watched = dict(
        n_identical=data.sample_problems(64, args.digits, "identical", 2, args.task),
        nk_varying=data.sample_problems(64, longest, "varying", 2, args.task))
    batches = pretrain_batches(args.digits, args.batch_size, block_size, args.seed, device,
                               args.task, start=run.step)
    losses, norms, measured = [], [], "not measured so far"
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
                measured = (f"two {args.digits}-digit {row['n_identical']:.0%}, "
                            f"one or two {longest}-digit {row['nk_varying']:.0%}")
            run.log(step, row, last=step == args.steps)
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {measured}")
            losses, norms = [], []

    # 3. Measure and save.
    model.bfloat16().float()  # it is saved in bfloat16, half the size: measure what is saved
    cells = cells_of(range(args.digits, longest + 1))
    accuracies, counts = accuracy_table(model, cells, args.eval_problems, args.task)
    save_checkpoint(run.folder / "model.pt", model, torch.bfloat16, digits=args.digits,
                    task=args.task, preset=args.preset, seed=args.seed, settings=run.settings,
                    accuracies=accuracies)
    print_table(accuracies, "after pre-training", counts)
    run.finish(after=accuracies, problems=counts)
    print(f"where it fails: python analyze.py tokens {run.folder / 'model.pt'}")


def print_table(accuracies, title, counts={}):
    """accuracies {"identical 5": share, ...}, counts {"identical 5": number of problems, ...}"""
    print(f"\n{title}: % solved of held-out problems, greedy if nothing else is said")
    for cell, accuracy in accuracies.items():
        words = re.sub(r"identical (\d+)", r"two \1-digit numbers", cell)
        words = re.sub(r"varying (\d+)", r"one or two \1-digit numbers", words)
        problems = f" of {counts[cell]} problems" if cell in counts else ""
        print(f"  {words:<28}{100 * accuracy:6.1f}{problems}")


def main(argv=None):
    return run_script(train, parse_args(argv))


# ------------------------------------------------------------------ files and the command line
# Nothing below is about learning. ppo.py and analyze.py use it, too.
NOT_SETTINGS = ("device", "out", "fresh")  # may change on resuming
RESUMES = "the same command, without --fresh, goes on from where it last saved"


class Run:
    """A run's folder: settings.json, log.csv, state.pt; when finished, model.pt, accuracies.json.

    The same command resumes from state.pt: what it holds is loaded into `parts`, modules and
    optimizers by name. On a CPU a resumed run ends with the weights of one that never stopped.
    state.pt and accuracies.json carry the settings that they belong to. A file "lock" stays there.
    OSError, in one line, for a file that is damaged, does not fit or cannot be written; results
    that were damaged after a run's end are made again.
    """
    FILES = ("settings.json", "log.csv", "state.pt", "model.pt", "accuracies.json")
    lock = None  # on the folder of the run that this process is making

    def __init__(self, folder, settings, columns, fresh, parts, first=1):
        """columns: of log.csv, without "seconds", which is added; first: its first row's number."""
        self.settings, self.columns, self.parts = settings, [*columns, "seconds"], parts
        self.folder = Path(folder)
        self.files = {name: self.folder / name for name in self.FILES}
        self.step, self.earlier = first - 1, 0.0  # where this process begins; earlier seconds
        self.text, self.on_disk = "", 0  # of log.csv; how many of its characters are on disk
        self.started = self.saved = time.monotonic()
        self.lock_folder()
        if any(path.exists() for path in self.files.values()):
            self.look_at_earlier_run(fresh)
        for name in self.FILES:
            for path in self.folder.glob(f"{name}.*.part"):  # a killed process left it
                path.unlink()
        self.finished = self.is_finished()
        if self.finished:
            print(f"{self.folder} is finished; --fresh starts over")
        elif self.files["state.pt"].exists():
            self.read("state.pt", self.load_state)
            self.append_rows()  # log.csv is written again as it was at the saved state
            print(f"{self.folder} resumes after step {self.step}; --fresh starts over")
        else:
            self.write_json("settings.json", settings)

    def lock_folder(self):
        """One run in a folder. A lock of SQLite works on every system and ends with the process."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            Run.lock = sqlite3.connect(self.folder / "lock", timeout=0)
            Run.lock.execute("BEGIN EXCLUSIVE")
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or str(error)
        else:
            return
        if "locked" in reason:
            reason = "a run is going on there; wait, or stop it, and the same command resumes"
        raise OSError(f"cannot use the folder {self.folder} ({reason}), or choose another --out")

    def look_at_earlier_run(self, fresh):
        """OSError if the folder holds anything but a run of this script. --fresh removes that."""
        elsewhere = "there is no run of this script; choose another --out"
        earlier = read_file(self.files["settings.json"], read_json, elsewhere)
        if earlier.keys() != self.settings.keys():
            raise OSError(f"{self.folder} holds another kind of run; choose another --out")
        if not fresh:
            return self.check_settings(earlier)
        print(f"--fresh removes the run in {self.folder}")
        for path in reversed(self.files.values()):  # settings.json last
            path.unlink(missing_ok=True)

    def check_settings(self, others):
        """OSError if a run with other settings is in the folder."""
        for name, value in self.settings.items():
            if others.get(name) != value and name != "checkpoint":  # it may have moved
                raise OSError(f"{self.folder} holds a run with {name} {others.get(name)}, not "
                              f"{value}; choose another --out, or --fresh to start over there")

    def is_finished(self):
        try:
            settings = self.read("accuracies.json", read_json).get("settings")
            self.read("model.pt", load)
        except OSError:  # one is missing, or was damaged by a power cut: it is made again
            return False
        if not isinstance(settings, dict):
            return False
        self.check_settings(settings)
        return True

    def load_state(self, path):
        state = load(path)
        self.check_settings(state["settings"])
        load_parts(state, self.parts)
        self.step, self.earlier, self.text = state["step"], float(state["seconds"]), state["log"]
        if type(self.step) is not int or type(self.text) is not str:
            raise ValueError("its step or its log")

    def read(self, name, parse):
        return read_file(self.files[name], parse, "the same command with --fresh starts over")

    def write_json(self, name, contents):
        text = json.dumps(contents, indent=1)
        write_file(self.files[name], lambda file: file.write(text.encode()))

    def seconds(self):
        return self.earlier + time.monotonic() - self.started

    def log(self, step, row, last):
        """Add a row {column: value} to log.csv. With the last row, or after 30 seconds, save the
        state, too. If writing fails, the next row tries again; after the last row it is an OSError.
        """
        row = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
        lines = io.StringIO()
        writer = csv.DictWriter(lines, self.columns, lineterminator="\n")
        if not self.text:
            writer.writeheader()
        writer.writerow(row | dict(seconds=f"{self.seconds():.1f}"))
        self.text += lines.getvalue()
        try:
            self.append_rows()
            if last or time.monotonic() - self.saved >= 30:
                self.save_state(step)
        except OSError as error:
            if last:
                raise
            tqdm.write(f"warning: {error}; the run goes on, the next row tries again")

    def append_rows(self):
        """Add to log.csv what it lacks. It is cut to what this process knows that it wrote."""
        try:
            with open(self.files["log.csv"], "ab") as file:
                whole = min(file.seek(0, os.SEEK_END), self.on_disk)
                file.truncate(whole)  # without half a row, and rows after the saved state
                file.write(self.text[whole:].encode())  # ASCII: a character is a byte
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self.files['log.csv']} ({error.strerror})") from None
        self.on_disk = len(self.text)

    def save_state(self, step):
        states = {name: part.state_dict() for name, part in self.parts.items()}
        state = dict(states, settings=self.settings, step=step, seconds=self.seconds(),
                     log=self.text)
        write_file(self.files["state.pt"], lambda file: torch.save(state, file))
        self.saved = time.monotonic()

    def finish(self, **tables):
        """Write accuracies.json: with it and model.pt the run is finished."""
        self.write_json("accuracies.json", dict(settings=self.settings, **tables))
        print(f"\nfinished in {self.seconds() / 60:.1f} minutes; saved {self.files['model.pt']}")


def load_parts(state, parts):
    """Load what a state.pt holds into modules and optimizers by name. ValueError if a number is not
    finite or an optimizer's moments have another shape, for which PyTorch does not look.
    """
    for name, part in parts.items():
        part.load_state_dict(state[name])
        if isinstance(part, torch.nn.Module):
            numbers = list(part.parameters())
        else:
            numbers = [x for moments in part.state.values() for x in moments.values()]
            for group in part.param_groups:
                for p in group["params"]:  # as p, a count of steps, or Muon's, of all matrices
                    shapes = [p.shape, (), (len(group["params"]), *p.shape)]
                    if any(x.shape not in shapes for x in part.state.get(p, {}).values()):
                        raise ValueError(f"a moment of {name} has another shape")
        if not all(x.isfinite().all() for x in numbers):
            raise ValueError(f"a number of {name} is not finite")


def read_json(path):
    contents = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(contents, dict):
        raise ValueError("it holds no names and values")
    return contents


def settings_of(args):
    return {name: x for name, x in vars(args).items() if name not in NOT_SETTINGS}


def folder_of(args, defaults, prefix, named):
    """--out or, if that is "auto", out/<prefix>_<settings that are not the defaults>_seed<seed>.

    named: settings that the prefix tells. A name of more than 76 characters ends in a checksum of
    all of it instead, so that no two settings share a folder.
    """
    if not args.out:
        stop("--out is empty; name a folder")
    if args.out != "auto":
        return args.out
    changed = [f"{name}{value}" for name, value in settings_of(args).items()
               if value != getattr(defaults, name) and name not in ("seed", "checkpoint", *named)]
    name = "_".join([prefix, *changed, f"seed{args.seed}"])
    if len(name) > 76:
        name = f"{name[:67]}_{zlib.crc32(name.encode()):08x}"
    return os.path.join("out", name)


def number(kind, low, high):
    """A type for argparse: an int or a float from low to high. nan is in no range."""
    def parse(text):
        try:
            x = kind(text)
        except ValueError:
            x = math.nan
        if not low <= x <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} from {low} to {high}, not {text:.30}")
        return x
    return parse


def to_device(name):
    """A type for argparse: a device that is there."""
    try:
        return get_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def add_run_options(ap):
    add = ap.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of every random number")
    add("--device", type=to_device, default="auto", help="cpu, cuda, mps; auto: cuda, else cpu")
    add("--out", default="auto", help="folder of the run; auto: out/<settings>")
    add("--fresh", action="store_true", help="start over instead of resuming the run")


def check_memory(n_bytes, device, options):
    """End the script if a size needs more memory than the device has."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows does not tell
        there = math.inf
    if n_bytes > there:
        stop(f"this needs {n_bytes / 2**30:,.0f} GiB of memory or more, and {device} has "
             f"{there / 2**30:,.0f}; give a smaller {options}")


def check_finite(when, figures):
    """Stop the run at the first of {name: value} that is nan or infinite."""
    for name, x in figures.items():
        if not math.isfinite(x):
            stop(f"{name} is {x} at {when}; lower --lr. What the run saved is from before")


def stop(message):
    """End the script with one line on stderr and exit code 2, as argparse does."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # above a progress bar, if there is one
    raise SystemExit(2)


def keep_freed_memory():
    """glibc keeps freed memory for the next tensors: new pages are a tenth of a step on a CPU."""
    if sys.platform == "linux":  # M_MMAP_THRESHOLD: up to 1 GiB from the heap; M_TRIM_THRESHOLD
        for option, value in (-3, 2**30), (-1, 2**31 - 1):
            ctypes.CDLL(None).mallopt(option, value)


def stop_at_open_exercise():
    """In a students' copy: say at once which exercise is open, not after minutes of training."""
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        if path.parent == Path(__file__).parent:
            text = path.read_text(encoding="utf-8")
            found = re.search(r'^    raise NotImplementedError\("(exercise .*)"\)', text, re.M)
            if found:
                stop(f"{found[1]} in {path.name} is open")


def run_script(function, args, hint=RESUMES):
    """function(args) -> exit code. What a user can get wrong ends in one line, without traceback.

    hint: how to go on after an interrupt (Ctrl-C).
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # PyTorch has loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a folder's name may hold what cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    # Several threads round sums in another order, and a run then ends elsewhere, by 14 points in
    # one case. With one thread a seed gives the same run on any number of cores.
    threads = torch.get_num_threads()
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    try:
        stop_at_open_exercise()
        function(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        tqdm.write(f"\ninterrupted; {hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads our output has ended, as in `python ppo.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        stop(error)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise  # a fault of ours
        stop("there is not enough memory for these sizes; give smaller ones")
    finally:  # a notebook's process goes on
        torch.set_num_threads(threads)
        if Run.lock:
            Run.lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
