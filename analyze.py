"""Tables and figures from checkpoints and run logs.

    python analyze.py tokens out/pretrain_n5_small_seed0/model.pt     Figure 5 and Table 1: where is the model unsure?
    python analyze.py curves out/ppo_alpha0_seed0 out/ppo_alpha3_seed0  learning curves of runs, side by side
    python analyze.py critical out/ppo_alpha0_seed0 out/ppo_alpha3_seed0  Figure 7: do the critical tokens come right?

    python analyze.py speed                                           how fast is it here, and how fast could it be?

Pictures go to out/figures.
"""
import copy
import csv
import json
import os
import sys
import time
from unittest import mock

import matplotlib
import numpy as np
import torch

from tqdm import tqdm

import data
import model
import ppo
import pretrain
from kl import certainty
from model import GPT, GPTConfig, PRESETS, generate
from pretrain import UserError, bootstrap, sample_problems, solve, within

matplotlib.use("Agg")  # pictures go to files: no screen is needed
import matplotlib.pyplot as plt


def save_figure(figure, folder, name):
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another folder with --out") from None
    plt.close(figure)
    print(f"saved {path}")


# --------------------------------------------------------------------------- tokens: Figure 5, Table 1
@torch.no_grad()
def token_certainty(model, text, prompt_len):
    """Certainty (len(text),) of the model's distribution at each character of the answer; 1 in the prompt."""
    logits, _ = model(torch.tensor([data.encode(text[:-1])], device=model.lm_head.weight.device))
    return np.concatenate([np.ones(prompt_len), certainty(logits)[0, prompt_len - 1 :].cpu().numpy()])


def table_1(texts, pairs, certainties, n_digits):
    """Certainty on a token minus the mean certainty on the answer's other tokens, critical and not.

    An answer counts up to and with its first wrong character: after it the positions mean something else.
    Returns {name: one value an answer}.
    """
    rows = {f"{kind} ({how})": [] for kind in ("critical", "non-critical") for how in ("mean", "least certain")}
    for text, (a, b), sure in zip(texts, pairs, certainties):
        error = data.first_error(text, a, b)
        answer = np.arange(len(data.prompt(a, b)), len(text) if error is None else min(error + 1, len(text)))
        if len(answer) < 2:
            continue
        is_critical = np.isin(answer, list(data.critical_positions(a, b, n_digits).values()))
        others_mean = (sure[answer].sum() - sure[answer]) / (len(answer) - 1)
        difference = sure[answer] - others_mean
        for name, chosen in (("critical", is_critical), ("non-critical", ~is_critical)):
            if chosen.any():
                rows[f"{name} (mean)"].append(difference[chosen].mean())
                rows[f"{name} (least certain)"].append(difference[chosen].min())
    return rows


def colour(sure):
    """Certainty -> RGB in 0..1: white when certain, through yellow, to red at 0.4 and below."""
    return matplotlib.colormaps["YlOrRd"](0.75 * min((1 - sure) / 0.6, 1))[:3] if sure < 0.99 else (1.0, 1.0, 1.0)


def in_colour(text, sure):
    """The text with ANSI background colours by certainty, for a terminal."""
    out = ""
    for char, s in zip(text, sure):
        if s < 0.99 and char != "\n":
            r, g, b = (int(255 * x) for x in colour(s))
            char = f"\033[48;2;{r};{g};{b}m\033[30m{char}\033[0m"
        out += char
    return out


def draw_tokens(texts, certainties, titles):
    """The same as a picture: one panel a text, each character on its colour."""
    lines = [text.split("\n") for text in texts]
    heights = [len(x) + 2 for x in lines]
    width = max(len(line) for x in lines for line in x)
    figure, axes = plt.subplots(len(texts), 1, figsize=(0.085 * width + 0.6, 0.17 * sum(heights) + 0.4), squeeze=False,
                                gridspec_kw=dict(height_ratios=heights, hspace=0.12))
    for axis, text, sure, title in zip(axes[:, 0], texts, certainties, titles):
        column, row = 0, 0
        for char, s in zip(text, sure):
            if s < 0.99:
                axis.add_patch(plt.Rectangle((column, row), 1, 1, color=colour(s), lw=0))
            if char == "\n":
                column, row = 0, row + 1
            else:
                axis.text(column + 0.5, row + 0.55, char, ha="center", va="center", family="monospace", fontsize=7)
                column += 1
        axis.set(xlim=(0, width), ylim=(row + 1, 0))
        axis.set_title(title, fontsize=8, loc="left")
        axis.axis("off")
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0.4, 1), matplotlib.colors.ListedColormap(
        [colour(s) for s in np.linspace(0.4, 1, 128)]))
    figure.colorbar(scale, ax=axes, fraction=0.02, pad=0.01, label="certainty of the model")
    return figure


def tokens(args):
    if 0 < args.temperature < 1e-3:
        raise UserError(f"--temperature {args.temperature:g} is too low to sample with; give 0 for greedy")
    device = pretrain.get_device(args.device)
    model, facts = pretrain.load_checkpoint(args.checkpoint, device)
    n_digits, long = facts["digits"], facts["digits"] + args.extra_digits
    if data.max_length(long, facts["task"]) > model.config.block_size:
        raise UserError(f"{long} digits need a block of {data.max_length(long, facts['task'])}, {args.checkpoint} has "
                        f"{model.config.block_size}; give fewer --extra_digits")
    pairs = sample_problems(args.problems, long, "varying", args.seed, facts["task"])
    correct, texts = solve(model, pairs, args.temperature, args.seed)
    certainties = [token_certainty(model, text, len(data.prompt(a, b))) for text, (a, b) in zip(texts, pairs)]

    order = np.argsort(correct, kind="stable")[: args.show]  # failures first: they show the most
    titles = [f"{pairs[i][0]}{pairs[i][1]:+}: {'right' if correct[i] else 'wrong'}" for i in order]
    for i, title in zip(order, titles):
        print(f"--- {title}")
        print(in_colour(texts[i], certainties[i]) if sys.stdout.isatty() else texts[i])

    how = "greedy" if args.temperature == 0 else f"sampled at temperature {args.temperature:g}"
    print(f"\n{correct.mean():.1%} of {len(pairs)} problems of {long} digits right, {how}; "
          f"pre-trained on 1..{n_digits}")
    print("\nTable 1: certainty on the token minus the mean certainty on the answer's other tokens [95% interval]")
    for name, values in table_1(texts, pairs, certainties, n_digits).items():
        if values:
            print("  {:<30} {:+.4f} [{:+.4f}, {:+.4f}]".format(name, *bootstrap(values)))

    print("\nWhere the failures first went wrong")
    n_critical = 0
    for i in np.flatnonzero(~correct):
        (a, b), index = pairs[i], data.first_error(texts[i], *pairs[i])
        critical = index in data.critical_positions(a, b, n_digits).values()
        n_critical += critical
        sure = f", certainty {certainties[i][index]:.2f}" if index < len(texts[i]) else ""
        print(f"  {a}{b:+}: {data.describe_error(texts[i], a, b)}{sure}{', a critical token' if critical else ''}")
    print(f"  {n_critical} of {(~correct).sum()} at a critical token")
    save_figure(draw_tokens([texts[i] for i in order], [certainties[i] for i in order], titles), args.out, "tokens.png")


# --------------------------------------------------------------------------- curves
PANELS = {  # column of log.csv: the panel's title, with the unit
    "success": "success in training (share)", "greedy_nk": "accuracy on N+k, greedy (share)",
    "greedy_n": "accuracy on N, greedy (share)", "kl": "KL to the pre-trained model (nats a token)",
    "p_critical": "probability of the right critical token", "ce_old": "cross-entropy on 1..N digits (nats a token)",
    "loss": "loss (nats a token)", "identical_n": "accuracy on N, identical (share)",
    "varying_n1": "accuracy on N+1, varying (share)",
}
CRITICAL = {  # the six places of the paper's Figure 7
    f"p_l{line}o{operand}": f"P(right comma), line {line}, operand {operand} (share)"
    for operand in (1, 2) for line in (1, 2, 3)
}


def load_run(folder):
    """A run's folder -> (settings dict, {column: (rows,) array with nan where nothing was logged})."""
    try:
        with open(os.path.join(folder, "settings.json")) as f:
            settings = dict(json.load(f))
        with open(os.path.join(folder, "log.csv"), newline="") as f:
            rows = list(csv.DictReader(f))
        return settings, {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{folder} is not the folder of a run with settings.json and log.csv ({error})") from None


def group_runs(runs):
    """[(settings, log)] -> {label: [log, ...]}: a group for equal settings but the seeds, labelled by what differs."""
    ignored = {"seed", "pretrain_seed", "checkpoint", "out", "device"}
    names = [name for name in runs[0][0]
             if name not in ignored and len({str(settings.get(name)) for settings, _ in runs}) > 1]
    groups = {}
    for settings, log in runs:
        values = [settings.get(name) for name in names]
        label = ", ".join(f"{name} {x:g}" if isinstance(x, float) else f"{name} {x}" for name, x in zip(names, values))
        label = label or "all runs"
        groups.setdefault(label, []).append(log)
    return groups


def curves(args):
    groups = group_runs([load_run(folder) for folder in args.runs])
    logs = [log for members in groups.values() for log in members]
    panels = [name for name in args.panels if all(name in log and not np.isnan(log[name]).all() for log in logs)]
    if not panels:
        raise UserError("these runs have no column in common to draw; give runs of one script")
    x_name = "episodes" if "episodes" in logs[0] else "step"
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False)
    styles = ["-", "--", ":", "-."]
    for axis, name in zip(axes.flat, panels):
        for i, (label, members) in enumerate(groups.items()):
            x = members[0][x_name]
            for log in members:
                x = x[np.isin(x, log[x_name][~np.isnan(log[name])])]
            y = np.array([log[name][np.isin(log[x_name], x)] for log in members])  # (seeds, points)
            line, = axis.plot(x, y.mean(0), styles[i % 4], color=f"C{i}", lw=1.5,
                              label=f"{label} ({len(members)} runs)" if len(members) > 1 else label)
            if len(members) > 1:
                band = np.array([bootstrap(column)[1:] for column in y.T])
                axis.fill_between(x, band[:, 0], band[:, 1], color=line.get_color(), alpha=0.2, lw=0)
        axis.set(xlabel=x_name, ylim=(0, 1.03) if "share" in args.panels[name] else None)
        axis.set_title(args.panels[name], fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2,
                  frameon=False)
    figure.tight_layout()
    save_figure(figure, args.out, f"{args.verb}.png")


# --------------------------------------------------------------------------- speed
def clock(f, device, repeats=5):
    """Median seconds of f(), after one call to warm up; a GPU is waited for."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


def operations(config, tokens, seen):
    """Floating-point operations of a forward pass of `tokens` tokens that look at `seen` tokens each, on average."""
    C = config.n_embd
    return tokens * (2 * (12 * config.n_layer * C * C + C * config.vocab_size) + 4 * config.n_layer * C * seen)


class Workload:
    """What the three phases do at one size, on random weights, ready to be timed."""

    def __init__(self, n_digits, width, batch, device, preset="small", new_tokens=None):
        torch.manual_seed(0)
        self.device, self.batch, self.n_digits = device, batch, n_digits
        shape = PRESETS[preset] | (dict(n_embd=width) if width else {})
        self.model = GPT(GPTConfig(block_size=data.max_length(n_digits + 1), **shape)).to(device)
        self.optimizers = pretrain.make_optimizers(self.model, 1e-3)
        batches = pretrain.pretrain_batches(n_digits, 8, self.model.config.block_size, 0, device)
        self.batches = [next(batches) for _ in range(8)]
        self.tokens = sum(ids.numel() for ids, *_ in self.batches)
        rng = np.random.default_rng(0)
        self.pairs = [data.sample_pair(rng, n_digits, "rl") for _ in range(batch)]
        self.prompts = [data.encode(data.prompt(a, b)) for a, b in self.pairs]
        longest = max(len(data.prompt(a, b) + data.answer(a, b)) for a, b in self.pairs)
        self.new_tokens = new_tokens or longest - max(map(len, self.prompts))

    def pretrain_steps(self):
        for batch in self.batches:
            self.model.zero_grad()
            pretrain.answer_loss(self.model, *batch).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()

    def prefill(self):
        shortest = min(map(len, self.prompts))
        sampler = pretrain.to_sample(self.model)
        with torch.no_grad():
            sampler(torch.tensor([p[:shortest] for p in self.prompts], device=self.device))

    def generate(self):
        with mock.patch.object(model, "SLASH", -1):  # no row ends early: all repeats do the same work
            return generate(pretrain.to_sample(self.model), self.prompts, self.new_tokens, 1.0)


def nanogpt_step(config, device, batch=16):
    """What a user would write first: float32, full rows, AdamW -> (f to be timed, its tokens)."""
    net = GPT(config).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    ids = torch.randint(config.vocab_size, (batch, config.block_size), device=device)

    def step():
        optimizer.zero_grad()
        logits, _ = net(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return step, ids.numel()


SIZES = [("batch", "batch", b) for b in (16, 64, 256, 512)] + [("digits", "n_digits", d) for d in (3, 5, 7, 10)]
SIZES += [("width", "width", w) for w in (64, 128, 256, 768)]


def speed(args):
    device = pretrain.get_device(args.device)
    dtype = torch.bfloat16 if pretrain.has_fast_bfloat16(device) else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, PyTorch {torch.__version__}; medians of {args.repeats}\n")

    # 1. What the machine can do
    n = 1024 if device.type == "cpu" else 8192
    rate = {}
    for kind in {torch.float32, dtype}:
        x = torch.randn(n, n, device=device, dtype=kind)
        rate[kind] = 2 * n**3 / clock(lambda: x @ x, device, args.repeats)
        print(f"matrix products, {n} x {n}, {str(kind)[6:]:<9} {rate[kind] / 1e9:10,.0f} GFLOP/s")
    x, y = torch.ones(2, 2**26, device=device)
    copy_rate = 2 * 4 * 2**26 / clock(lambda: y.copy_(x), device, args.repeats)
    print(f"memory, read and written in a copy    {copy_rate / 1e9:10,.1f} GB/s")

    # 2. The three phases of the default run, beside the floor: operations at the rate of the products, bytes at that of the copy
    work = Workload(args.digits, None, 64, device, args.preset)
    config, table = work.model.config, []
    needed = sum(3 * operations(config, ids.numel(), ids.shape[1] / 2) for ids, *_ in work.batches)
    table.append(("pre-training, 8 steps", work.tokens, clock(work.pretrain_steps, device, args.repeats),
                  needed / rate[dtype]))
    step, plain_tokens = nanogpt_step(config, device)
    table.append(("  plain: float32, full rows, AdamW", plain_tokens, clock(step, device, args.repeats),
                  3 * operations(config, plain_tokens, config.block_size / 2) / rate[torch.float32]))
    tokens = 64 * min(map(len, work.prompts))
    seconds = clock(work.prefill, device, args.repeats)
    table.append(("rollout: prefill", tokens, seconds, operations(config, tokens, tokens / 128) / rate[dtype]))
    tokens, seen = 64 * work.new_tokens, min(map(len, work.prompts)) + work.new_tokens / 2
    cache_bytes = tokens * seen * 2 * config.n_layer * config.n_embd * torch.finfo(dtype).bits // 8
    decode = clock(work.generate, device, args.repeats) - seconds
    table.append(("rollout: decode", tokens, decode,
                  max(operations(config, tokens, seen) / rate[dtype], cache_bytes / copy_rate)))
    ppo_args = ppo.parse_args(["--device", args.device])
    policy, reference = copy.deepcopy(work.model), work.model.requires_grad_(False)
    head = ppo.ValueHead(config.n_embd).to(device)
    optimizer = torch.optim.Adam([*policy.parameters(), *head.parameters()], lr=0.0)
    with mock.patch.object(model, "SLASH", -1):
        batch = ppo.rollout(policy, head, reference, work.pairs, ppo_args, 0)
        whole = clock(lambda: ppo.rollout(policy, head, reference, work.pairs, ppo_args, 0), device, args.repeats)
    tokens, seen = batch["mask"].numel(), batch["mask"].shape[1] / 2
    table.append(("rollout: score, policy and reference", tokens, whole - decode - seconds,
                  2 * operations(config, tokens, seen) / rate[dtype]))
    update = clock(lambda: ppo.update(policy, head, optimizer, batch, ppo_args, torch.Generator().manual_seed(0)),
                   device, args.repeats)
    table.append(("update: forward and backward", tokens, update, 3 * operations(config, tokens, seen) / rate[dtype]))
    print(f"\n{'phase':<38} {'tokens/s':>9} {'seconds':>9} {'floor':>9} {'reached':>8} {'share':>7}")
    for phase, tokens, seconds, floor in table:
        share = f"{seconds / (whole + update):7.0%}" if phase.startswith(("rollout", "update")) else ""
        print(f"{phase:<38} {tokens / seconds:9,.0f} {seconds:9.4f} {floor:9.4f} {floor / seconds:8.0%} {share}")
    passes = 5 * operations(config, batch["mask"].numel(), seen) / rate[dtype]
    print(f"\npre-training tokens/s over the plain step's: {table[0][1] / table[0][2] / (table[1][1] / table[1][2]):.2f}")
    print(f"one PPO iteration over (generation + passes at the rate of the products): "
          f"{(whole + update) / (decode + table[2][2] + passes):.2f}")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    print(f"peak memory so far {peak / 2**30:.2f} GiB")

    # 3. How it grows
    print(f"\n{'tokens/s, 64 new tokens a prompt':<38} {'generate':>9} {'pre-train':>10}")
    for what, name, value in tqdm(SIZES, desc="sizes", leave=False):
        work = Workload(**dict(n_digits=args.digits, width=None, batch=64, preset=args.preset) | {name: value}, device=device,
                        new_tokens=64)
        tokens = 64 * work.batch
        pre = work.tokens / clock(work.pretrain_steps, device, 1)
        tqdm.write(f"{what:<7} {value:<30} {tokens / clock(work.generate, device, 2):9,.0f} {pre:10,.0f}")


def peak_memory():
    """The most memory that this process has had, in bytes; nan where the system does not tell."""
    try:
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return float("nan")


def main(argv=None):
    ap = pretrain.Parser(description="Tables and figures from checkpoints and run logs.")
    verbs = ap.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser("tokens", help="where a model is unsure, where its failures begin (Figure 5, Table 1)")
    verb.add_argument("checkpoint", help="a model.pt of pretrain.py or ppo.py")
    verb.add_argument("--problems", type=pretrain.COUNT, default=50, help="held-out problems to solve")
    verb.add_argument("--extra_digits", type=within(int, 0, 50), default=1, help="k: problems of N+k digits")
    verb.add_argument("--temperature", type=within(float, 0, 1e3), default=0.0, help="0 = greedy")
    verb.add_argument("--show", type=pretrain.COUNT, default=3, help="answers to show in colour, failures first")
    verb.add_argument("--seed", type=pretrain.SEED, default=1, help="of the problems")
    verb.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
    verb.set_defaults(run=tokens)

    verb = verbs.add_parser("curves", help="learning curves; mean and 95%% band where seeds repeat")
    verb.add_argument("runs", nargs="+", help="folders of runs, all of pretrain.py or all of ppo.py")
    verb.set_defaults(run=curves, panels=PANELS)

    verb = verbs.add_parser("critical", help="probability of the right token at six critical places, over training (Figure 7)")
    verb.add_argument("runs", nargs="+", help="folders of runs of ppo.py")
    verb.set_defaults(run=curves, panels=CRITICAL)

    verb = verbs.add_parser("speed", help="how fast each phase is on this machine, and how fast it could be")
    verb.add_argument("--digits", type=within(int, 1, 10), default=5, help="N")
    verb.add_argument("--preset", choices=PRESETS, default="small", help="model size")
    verb.add_argument("--repeats", type=pretrain.COUNT, default=5, help="of each measurement")
    verb.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
    verb.set_defaults(run=speed)

    for verb in [verbs.choices[name] for name in ("tokens", "curves", "critical")]:
        verb.add_argument("--out", default="out/figures", help="folder for the pictures")
    args = ap.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    pretrain.start(main)
