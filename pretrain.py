"""Pre-train a GPT-2 from scratch on additions of 1..N digits.

Run:  python pretrain.py --digits 5 --preset small --seed 0

Writes out/<run>/model.pt (the checkpoint), log.csv, settings.json, state.pt (to go on from) and, at the end, the
accuracies of the paper's Tables 4 and 5, accuracies.json. B sequences, T tokens, V vocabulary.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import errno
import io
import itertools
import json
import math
import os
import sys
import time
import zlib
from dataclasses import asdict

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from model import GPT, GPTConfig, PRESETS, generate, split_actions


# --------------------------------------------------------------------------- errors, device, checkpoints
class UserError(Exception):
    """Something the user can mend. Its one line names the problem and the way out; the exit code is 2."""


def start(main):
    """Run a script's main() so that a UserError ends in one line on stderr and exit code 2, without a traceback."""
    if sys.platform == "linux":  # Keep the memory of large tensors for the next ones (M_MMAP_ and M_TRIM_THRESHOLD):
        libc = ctypes.CDLL(None)  # getting it anew from the system, page by page, is a fifth of a step on a CPU.
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # older releases of glibc take 32 MiB at most
        libc.mallopt(-1, 2**31 - 1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention is silently wrong on some GPUs (PyTorch issue 193893)
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; a training run goes on with the same command, from where it last saved", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output is gone, as in `python ppo.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or closing it would raise once more
        sys.exit("the terminal or pipe was closed; a training run goes on with the same command")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise  # PyTorch has no name for running out of memory on a CPU
        print(f"out of memory ({first_line(error)}); lower the batch, the episodes or the block", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse, with our one-line errors, and defaults shown in --help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

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
    except (RuntimeError, AssertionError, ImportError) as error:  # any of these, by device, if it is not there
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
    """The model to generate with: where it is fast a bfloat16 copy, whose KV cache is half as long to read.

    On a CPU that takes AMX. Without it attention to a cache in bfloat16 is slower, even where large products are faster.
    """
    device = model.lm_head.weight.device
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return copy.deepcopy(model).bfloat16() if has_fast_bfloat16(device) and (amx or device.type != "cpu") else model


def make_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):  # found now, not after minutes of training
            raise PermissionError(errno.EACCES, "it is read-only")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from None


def write_file(path, content):
    """Write bytes beside `path` and rename them into place: no half-written file ever has the good one's name."""
    beside = f"{path}.{os.getpid()}"
    try:
        with open(beside, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())  # on the disk, before it gets its name: power may fail
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise UserError(f"cannot write {path} ({error.strerror}); make room there, or choose another folder with "
                        "--out; what was there before is unchanged") from None


def to_bytes(contents):
    """What torch.save would write to a file, and four bytes more: its checksum."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue() + zlib.crc32(buffer.getvalue()).to_bytes(4, "big")


def save_checkpoint(path, model, **facts):
    """Weights, config and vocabulary, and what else explains the checkpoint."""
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    write_file(path, to_bytes(dict(model=weights, config=asdict(model.config), vocab=data.VOCAB, **facts)))


def read_file(path, build):
    """build(the contents that to_bytes made the file of, on the CPU). Whatever is wrong with it is a UserError."""
    try:
        with open(path, "rb") as f:
            content = f.read()
        if zlib.crc32(content[:-4]).to_bytes(4, "big") != content[-4:]:
            raise ValueError("its checksum is wrong")  # torch.load itself would load a flipped bit
        return build(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give the model.pt that pretrain.py made") from None
    except Exception as error:  # a file cut off, damaged or foreign can go wrong in any way; the way is told
        raise UserError(f"{path} is not a whole file of this project ({type(error).__name__}: {first_line(error)}); "
                        "make it again: pretrain.py, ppo.py, with --fresh if it is a state.pt") from None


def load_checkpoint(path, device):
    """A checkpoint of ours -> (model in eval mode, the checkpoint's dict). Anything else is a UserError."""
    def build(checkpoint):
        if checkpoint["vocab"] != data.VOCAB:
            raise ValueError("its vocabulary is not that of data.py")
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        checkpoint["digits"], checkpoint["task"]  # both scripts save it
        return model.eval(), checkpoint
    model, checkpoint = read_file(path, build)
    return model.to(device), checkpoint


def check_finite(when, figures, folder):
    """Stop the run at the first of {name: value} that is nan or infinite."""
    for name, x in figures.items():
        if not math.isfinite(x):
            raise UserError(f"{name} is {x} at {when}; lower --lr, or the setting that you raised; "
                            f"what {folder} holds is from before")


NOT_SETTINGS = ("device", "compile", "out", "fresh", "explain")  # options that do not change what is asked


def default_folder(prefix, parser, args, unnamed):
    """out/<prefix>_<settings that differ from the defaults>_seed<seed>: runs with other settings never meet."""
    changed = [f"{name}{value}".replace(os.sep, "-") for name, value in vars(args).items()
               if value != parser.get_default(name) and name not in (*unnamed, "seed", *NOT_SETTINGS)]
    return "out/" + "_".join([prefix, *changed, f"seed{args.seed}"])


SAVE_SECONDS = 30.0  # a run that is killed loses no more than this, and what it did since its last row of the log


class Run:
    """A run's folder: settings.json, log.csv, and state.pt, from which the same command goes on after an interruption.

    Every random number of a step follows from the seed and the step alone, so a run that was interrupted ends with
    the weights and log of one that was not, bit for bit on a CPU.
    """

    def __init__(self, args, columns, **parts):
        """parts: modules and optimizers by name: those that training changes, and a reference, so that a run goes on with
        the one that it began with. A state.pt is loaded into them."""
        self.folder, self.columns, self.parts = args.out, columns, parts
        self.settings = {name: x for name, x in vars(args).items() if name not in NOT_SETTINGS}
        self.step, self.rows, self.earlier, self.started = 0, [], 0.0, time.time()  # earlier: seconds of former runs
        self.saved, path = time.time(), os.path.join(self.folder, "state.pt")
        if os.path.exists(path) and not args.fresh:
            read_file(path, self.restore)
            print(f"going on after step {self.step} of {self.folder}; --fresh starts over")
        elif not getattr(args, "explain", False):  # that one only looks
            make_folder(self.folder)
            for name in ["accuracies.json"] + ["state.pt", "log.csv", "model.pt"] * args.fresh:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, name))
            write_file(os.path.join(self.folder, "settings.json"), json.dumps(self.settings, indent=1).encode())

    def restore(self, state):
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise UserError(f"{self.folder} holds a run with {name} {state['settings'].get(name)}, not {value}; "
                                "choose another folder with --out, or --fresh to start over there")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.rows, self.earlier = state["step"], state["rows"], state["seconds"]

    def seconds(self):
        return self.earlier + time.time() - self.started

    def log(self, step, row, last):
        """Add a row to log.csv (nan: an empty cell); every SAVE_SECONDS and at the last step, save the state."""
        self.rows.append({name: "" if x != x else f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
                         | dict(seconds=f"{self.seconds():.1f}"))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self.columns)
        table.writeheader()
        table.writerows(self.rows)
        write_file(os.path.join(self.folder, "log.csv"), text.getvalue().encode())
        if last or time.time() - self.saved >= SAVE_SECONDS:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            write_file(os.path.join(self.folder, "state.pt"), to_bytes(
                dict(states, settings=self.settings, step=step, rows=self.rows, seconds=self.seconds())))
            self.saved = time.time()


# --------------------------------------------------------------------------- evaluation
def sample_problems(n, n_digits, mode, seed, task, extra_digits=1):
    """n held-out problems, the same for the same seed."""
    rng = np.random.default_rng([seed, n_digits])
    return [data.sample_pair(rng, n_digits, mode, extra_digits, test=True, task=task) for _ in range(n)]


def write_answers(model, pairs, temperature, generator):
    """Let the model answer all problems -> ids (B, T), prompt_len (B,), lengths (B,).

    The right answers are its drafts: what it would write alike is not written token by token. That tells it nothing: no
    choice depends on what stands behind it.
    """
    prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
    drafts = [data.encode(data.answer(a, b)) for a, b in pairs]
    ids, lengths = generate(to_sample(model), prompts, model.config.block_size, temperature, generator, drafts)
    return ids, torch.tensor([len(p) for p in prompts], device=ids.device), lengths


def solve(model, pairs, temperature=0, seed=0, batch_size=256):
    """Let the model answer all problems -> (correct: bool array (n,), texts: list of n prompts + answers)."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    texts = []
    for i in range(0, len(pairs), batch_size):
        ids, _, lengths = write_answers(model, pairs[i : i + batch_size], temperature, generator)
        texts += [data.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    return np.array([data.grade(text, a, b) for text, (a, b) in zip(texts, pairs)]), texts


def bootstrap(values, seed=0, resamples=1000):
    """Mean of values (n,) and its 95% interval by resampling -> (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def accuracy_table(model, n_digits, n_problems, task):
    """The paper's Tables 4 and 5, greedy: L = N .. N+3, as far as the block holds L.

    Returns {(mode, L): (mean, low, high)} and the failures [(text, a, b)].
    """
    table, failures = {}, []
    for length in range(n_digits, n_digits + 4):
        for mode in ("identical", "varying"):
            if data.max_length(length, task) <= model.config.block_size:
                pairs = sample_problems(n_problems, length, mode, 1, task)
                correct, texts = solve(model, pairs)
                table[mode, length] = bootstrap(correct)
                failures += [(text, a, b) for text, (a, b), good in zip(texts, pairs, correct) if not good]
    return table, failures


def print_table(table, title):
    print(f"\n{title}: accuracy in % [95% interval]\n  digits  {'identical':<24}varying")
    for length in sorted({length for _, length in table}):
        cells = [f"{100 * m:5.1f} [{100 * lo:.1f}, {100 * hi:.1f}]"
                 for m, lo, hi in (table[mode, length] for mode in ("identical", "varying"))]
        print(f"  {length:>6}  {cells[0]:<24}{cells[1]}")


def save_tables(folder, **tables):
    """Write {name: {(mode, L): (mean, low, high)}} to accuracies.json, for `analyze.py accuracy`."""
    cells = {name: {f"{mode} {length}": cell for (mode, length), cell in table.items()} for name, table in tables.items()}
    write_file(os.path.join(folder, "accuracies.json"), json.dumps(cells, indent=1).encode())


# --------------------------------------------------------------------------- training
def to_batch(pairs, device):
    """Worked problems -> ids (B, T) padded with 0, prompt_len (B,), lengths (B,)."""
    prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
    rows = [p + data.encode(data.answer(a, b)) for p, (a, b) in zip(prompts, pairs)]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    prompt_len, lengths = torch.tensor([len(p) for p in prompts]), torch.tensor([len(row) for row in rows])
    return ids.to(device), prompt_len.to(device), lengths.to(device)


def pretrain_batches(n_digits, batch_size, block_size, seed, device, task=data.TASKS[0], start=0):
    """Endless batches (ids, prompt_len, lengths, offset) of worked problems of like length, from batch `start` on.

    64 batches' problems are drawn at once, sorted by the number of lines, cut into batches and shuffled: so little is
    padding. offset (B,) is the row's place in the block: a quarter of the rows start at 0, as every test does, the
    others anywhere, so that all positions are trained. (If all start anywhere, N+1 digits are learned along with N.)
    """
    for pool in itertools.count(start // 64):
        rng = np.random.default_rng([seed, pool])
        pairs = [data.sample_pair(rng, n_digits, "train", task=task) for _ in range(64 * batch_size)]
        pairs.sort(key=lambda pair: len(str(max(pair))))
        order, places = rng.permutation(64), np.maximum(0, rng.uniform(-1 / 3, 1, (64, batch_size)))
        for i in range(start - 64 * pool if pool == start // 64 else 0, 64):
            ids, prompt_len, lengths = to_batch(pairs[order[i] * batch_size :][:batch_size], device)
            offset = torch.from_numpy((places[i] * (block_size - ids.shape[1] + 1)).astype(int)).to(device)
            yield ids, prompt_len, lengths, offset


def answer_loss(model, ids, prompt_len, lengths, offset=None):
    """Mean cross-entropy in nats over the answers' tokens; the prompt's are not the model's to predict."""
    states, actions, mask = split_actions(ids, prompt_len, lengths)
    with autocast(ids.device):
        logits, _ = model(states, offset)  # (B, T-1, V)
    loss = F.cross_entropy(logits.transpose(1, 2), actions, reduction="none")  # (B, T-1)
    return (loss * mask).sum() / mask.sum()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: for a matrix G = U S V^T, U V^T (Jordan et al. 2024).

    A gradient's few large singular values would drown all other directions; so all of them move alike, and fewer steps
    are needed. Entries have AdamW's usual size, 0.2 (root mean square), so that both take the same learning rate.
    PyTorch ships it from 2.9 on; here matrices of one shape are done at once, and older releases will do.
    """

    def __init__(self, matrices, lr, weight_decay):
        shapes = {}
        for p in matrices:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([dict(params=ps) for ps in shapes.values()], dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            gradient = torch.stack([p.grad for p in group["params"]])  # (matrices, rows, columns)
            momentum = self.state[group["params"][0]].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            x = gradient.lerp(momentum, 0.95)  # Nesterov's
            tall = x.shape[-2] > x.shape[-1]
            x = (x.mT if tall else x) / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            x = x.bfloat16() if has_fast_bfloat16(x.device) else x
            for _ in range(5):  # Newton-Schulz: an odd polynomial that takes all singular values near 1
                square = x @ x.mT
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            size = 0.2 * max(x.shape[-2:]) ** 0.5
            for p, update in zip(group["params"], x.mT if tall else x):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def make_optimizers(model, lr):
    """Muon for the blocks' weight matrices, in fewer steps than AdamW, which has the embeddings, biases and norms."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or ".h." not in name]
    # (On a Mac PyTorch 2.4 has no fused AdamW.)
    return [Muon(matrices, lr=lr, weight_decay=0.1),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=not others[0].is_mps)]


def compiled(model, batch):
    """The model with its kernels fused by torch.compile: one graph for all shapes, tried on the batch."""
    try:
        fused = torch.compile(model, dynamic=True, fullgraph=True)
        answer_loss(fused, *batch).backward()
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new for it, ...
        raise UserError(f"--compile does not work ({type(error).__name__}: {first_line(error)}); "
                        "leave it out") from None
    model.zero_grad()
    return fused


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then constant, then linear decay to 0 over the last 80% of the steps."""
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (0.8 * steps))


def block_for(n_digits, task):
    """The block that answers of n_digits digits need, in whole 32s: 6 -> 480."""
    return math.ceil(data.max_length(n_digits, task) / 32) * 32


def parse_args(argv):
    ap = Parser(description="Pre-train a GPT-2 from scratch on additions of 1..N digits.")
    add = ap.add_argument
    add("--digits", type=within(int, 1, 25), default=5, help="N: train on operands of 1..N digits")
    add("--task", choices=data.TASKS, default=data.TASKS[0], help="what the problems are")
    add("--preset", choices=PRESETS, default="small", help="model size: small (narrow, wide) for a laptop, paper for a GPU")
    add("--steps", type=COUNT, default=3500, help="optimizer steps")
    add("--batch_size", type=COUNT, default=8, help="worked problems a step")
    add("--lr", type=within(float, 0, 1e3), default=3e-3, help="peak learning rate of Muon and AdamW")
    add("--warmup", type=COUNT, default=100, help="steps of linear warm-up")
    add("--block_size", type=within(int, 0, 8192), default=0,
        help="positions of the model; 0: what N+1 digits need, in whole 32s")
    add("--eval_problems", type=COUNT, default=250, help="held-out problems for each accuracy of the final table")
    add("--seed", type=SEED, default=0, help="of initialization and data")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
    add("--compile", action="store_true", help="fuse the kernels of a step: one or two minutes first, then faster steps")
    add("--out", default="", help="folder for the run (default: out/pretrain_<settings>%(default)s)")
    add("--fresh", action="store_true", help="start over, instead of going on with an interrupted run")
    args = ap.parse_args(argv)
    args.out = args.out or default_folder(f"pretrain_n{args.digits}_{args.preset}", ap, args, ("digits", "preset"))
    return args


def main(argv=None):
    # 1. Settings
    args = parse_args(argv)
    needed = data.max_length(args.digits, args.task)
    block_size = args.block_size or block_for(args.digits + 1, args.task)
    if needed > block_size:
        raise UserError(f"--digits {args.digits} needs --block_size {needed} or more, not {block_size}")
    device = get_device(args.device)

    # 2. Model and optimizer
    config = GPTConfig(block_size=block_size, **PRESETS[args.preset])
    model = GPT(config, torch.Generator().manual_seed(args.seed)).to(device)
    optimizers = make_optimizers(model, args.lr)
    print(f"pre-training on 1..{args.digits} digits: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"block {block_size}, {args.steps} steps of {args.batch_size} problems, on {device}")

    # 3. Train
    watched = dict(identical_n=sample_problems(64, args.digits, "identical", 2, args.task),
                   varying_n1=sample_problems(64, args.digits + 1, "varying", 2, args.task))
    accuracies = dict.fromkeys(watched, 0.0)
    run = Run(args, ["step", "loss", "lr", "grad_norm", *watched, "tokens_per_s", "seconds"], model=model,
              **{type(optimizer).__name__: optimizer for optimizer in optimizers})
    batches = pretrain_batches(args.digits, args.batch_size, block_size, args.seed, device, args.task, start=run.step)
    trained = compiled(model, next(pretrain_batches(1, args.batch_size, block_size, 0, device))) if args.compile else model
    since, losses, norms, tokens = time.time(), [], [], 0
    bar = tqdm(range(run.step + 1, args.steps + 1), desc="pre-train", unit="step", mininterval=1, dynamic_ncols=True,
               initial=run.step, total=args.steps)
    for step in bar:
        lr = learning_rate(step - 1, args.steps, args.lr, args.warmup)
        ids, prompt_len, lengths, offset = next(batches)
        loss = answer_loss(trained, ids, prompt_len, lengths, offset)
        model.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        losses.append(loss.detach())
        tokens += ids.numel()

        if step % 100 == 0 or step == args.steps:  # figures are fetched from a GPU only here
            losses, norms = torch.stack(losses).tolist(), torch.stack(norms).tolist()
            for at, loss, norm in zip(range(step - len(losses) + 1, step + 1), losses, norms):
                check_finite(f"step {at}", dict(loss=loss, grad_norm=norm), args.out)
            row = dict(step=step, loss=np.mean(losses).item(), lr=lr, grad_norm=np.mean(norms).item(),
                       tokens_per_s=tokens / (time.time() - since))
            if step % 1000 == 0:
                accuracies = {name: float(solve(model, pairs)[0].mean()) for name, pairs in watched.items()}
                row |= accuracies
            run.log(step, row, last=step == args.steps)
            bar.set_postfix_str(f"loss {row['loss']:.5f}, N {accuracies['identical_n']:.0%}, "
                                f"N+1 {accuracies['varying_n1']:.0%}, {row['tokens_per_s']:,.0f} tokens/s")
            since, losses, norms, tokens = time.time(), [], [], 0

    # 4. Measure, save, show failures
    model.eval()
    table, failures = accuracy_table(model, args.digits, args.eval_problems, args.task)
    save_checkpoint(os.path.join(args.out, "model.pt"), model, digits=args.digits, task=args.task, step=args.steps,
                    settings=vars(args), accuracies={(args.eval_problems, *cell): x for cell, x in table.items()})
    save_tables(args.out, after=table)
    print_table(table, f"greedy, {args.eval_problems} held-out problems a cell")
    print("\nthree failures, at their first wrong character")
    for text, a, b in failures[:: max(1, len(failures) // 3)][:3]:
        print(f"  {a}{b:+}: {data.describe_error(text, a, b)}")
    print(f"\ntrained in {run.seconds() / 60:.1f} minutes; saved {args.out}/model.pt")
    return table


if __name__ == "__main__":
    start(main)
