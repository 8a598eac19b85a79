"""Tables and pictures from checkpoints and from the folders of runs.

    python analyze.py answer model.pt 123456+70   one problem: where is the model unsure, or wrong?
    python analyze.py tokens model.pt             many problems: where does it go wrong?
    python analyze.py explain out/ppo_...         the penalty of one answer, token by token
    python analyze.py curves out/ppo_*            learning curves
    python analyze.py compare out/ppo_*           what was learned and kept, paired by model

Runs that differ only in their pre-trained model, seed or evaluations make one setting. Its figures
are means over the pre-trained models, with 95% intervals.
"""
import argparse
import copy
import csv
import functools
import glob
import json
import math
import re
import signal
import sys
from collections import namedtuple
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the script quietly while PyTorch loads
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.nn.utils.rnn import pad_sequence

import data
from kl import certainty, prioritized_kl
from model import load, load_checkpoint, read, read_file, solve, write_file
from pretrain import number, run_script, stop, to_device


# ------------------------------------------------------------------ statistics
@functools.cache
def t_quantile(freedom):
    """97.5% point of Student's t: 12.7062 for 1 degree of freedom, 2.2622 for 9.

    t = sqrt(freedom) * tan(angle), where the density of the angle is that of cos^(freedom - 1).
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])  # up to each angle
    angle = np.interp(0.95 * area[-1], area, angles)  # 95% of all |t| are smaller
    return math.sqrt(freedom) * math.tan(angle)


def interval(values):
    """Mean and 95% interval by Student's t -> (mean, low, high); of one value (value, nan, nan).

    0, 1, 2: mean 1, standard error 1 / sqrt(3), 2 degrees of freedom: 1 -+ 4.3027 / sqrt(3).
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, math.nan, math.nan
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def wilson_interval(k, n):
    """k of n and Wilson's 95% interval -> (k / n, low, high): 5 of 5 is 1 [0.57, 1]."""
    z = 1.959964
    centre = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    return k / n, max(0.0, centre - half), min(1.0, centre + half)


def sign_flip_p(differences):
    """Exact two-sided p, if each of n <= 40 differences is as likely to have the other sign.

    The share of all 2^n choices of signs whose |sum| is at least the observed one; never below
    2 / 2^n. 1, 2, 3: of the 8 choices +++ and --- reach 6, so p = 0.25.
    """
    differences = np.array(differences, float)
    n = len(differences)
    if n > 40:
        raise ValueError(f"the exact p of {n} models would take too long; compare at most 40")
    if not np.isfinite(differences).all():
        raise ValueError("there is no p of differences that are nan or infinite")
    least = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()  # equal sums differ by 1e-16
    if least <= 0:
        return 1.0
    # All sums of each half, 2^(n/2), are listed. For each of the left half's sums we look up how
    # many of the right half's reach `least` together with it. As many choices reach -least.
    left, right = (functools.reduce(lambda sums, x: np.concatenate([sums + x, sums - x]), half,
                                    np.zeros(1)) for half in np.split(differences, [n // 2]))
    right.sort()
    left.sort()  # neighbours look up neighbours: much faster
    n_enough = len(right) - np.searchsorted(right, least - left)
    return 2 * int(n_enough.sum()) / 2**n


def paired_differences(values, first):
    """{pre-trained model: value} of two settings -> [value - first's] of the models in both."""
    return [values[model] - first[model] for model in sorted(values.keys() & first.keys())]


# ------------------------------------------------------------------ runs and settings
Run = namedtuple("Run", "folder settings log accuracies")
PENALTY = {"alpha", "kl_coef", "kl_weight"}
AGAIN = "make the run again, with --fresh or another --out"
POOLED = {"eval_every", "eval_problems", "final_problems", "checkpoint", "seed", "pretrained"}


def parse_settings(path):
    """settings.json -> {option: value}; an error if a number that we need is none."""
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in "digits", "extra_digits", "seed", *(settings.keys() & {"alpha", "kl_coef"}):
        if not 0 <= settings[name] < 2**63:
            raise ValueError(f"{name} is {settings[name]}")
    return settings


def parse_log(path):
    """log.csv -> {column: values (rows,)}; an empty cell is nan. A last line without a line break
    is still being written, and left out.
    """
    names, *rows = csv.reader(Path(path).read_text(encoding="utf-8").split("\n")[:-1])
    cells = np.array([[float(cell or "nan") for cell in row] for row in rows])
    log = dict(zip(names, cells.reshape(-1, len(names)).T))
    is_whole = "step" in log or {"iteration", "episodes", "kl"} <= log.keys()
    if not is_whole or np.isinf(cells).any():
        raise ValueError("a column is missing, or a cell is infinite")
    return log


def parse_accuracies(path):
    """accuracies.json -> {"settings": {}, "after": {cell: share}, from ppo.py also "before"}."""
    tables = json.loads(Path(path).read_text(encoding="utf-8"))
    shares = [*tables["after"].values(), *tables.get("before", {}).values()]
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError("a share is not between 0 and 1")
    return tables


def load_run(folder):
    """-> Run, its accuracies {} if it is not finished; None if it has no iteration so far."""
    if not folder.is_dir():
        stop(f"{folder} is no folder; a run is a folder that pretrain.py or ppo.py wrote")
    if not (folder / "log.csv").exists():
        return None
    settings = read_file(folder / "settings.json", parse_settings, AGAIN)
    log, accuracies = read_file(folder / "log.csv", parse_log, AGAIN), {}
    if (folder / "accuracies.json").exists():
        accuracies = read_file(folder / "accuracies.json", parse_accuracies, AGAIN)
        if accuracies.get("settings") != settings:
            stop(f"{folder} mixes two runs: accuracies.json has other settings than settings.json; "
                 f"{AGAIN}")
    steps = log["step" if "step" in log else "iteration"]
    return Run(folder, settings, log, accuracies) if len(steps) and steps[-1] >= 1 else None


def load_runs(names):
    """Folders, or patterns of them, which not every shell expands -> [Run], each folder once."""
    runs = {}
    for name in names:
        found = [name] if Path(name).exists() else sorted(glob.glob(name))  # a name may hold [ ]
        if not found:
            stop(f"no folder matches {name}")
        runs |= {Path(folder).resolve(): load_run(Path(folder)) for folder in found}
    empty = ", ".join(str(folder) for folder, run in runs.items() if run is None)
    if not any(runs.values()):
        stop(f"there is no iteration of a run so far in {empty}")
    if empty:
        print(f"left out, because there is no iteration so far: {empty}")
    return [run for run in runs.values() if run is not None]


def penalty_in_words(settings):
    """"alpha 3"; "alpha 0, kl_coef 0.05"; "alpha 3, matched"; "oracle"; "no penalty"."""
    if "kl_coef" not in settings:
        return "pre-training"
    if settings["kl_coef"] == 0:
        return "no penalty"
    control = str(settings.get("kl_weight", "certainty"))
    words = [control] if control == "oracle" else [f"alpha {settings.get('alpha', 0):g}"]
    if settings["kl_coef"] != 0.1:  # the default
        words.append(f"kl_coef {settings['kl_coef']:g}")
    if control not in ("oracle", "certainty"):
        words.append(control)
    return ", ".join(words)


def by_setting(runs):
    """-> {setting in words: {pre-trained model: [the run of each seed]}}.

    The words are the penalty and all other settings in which the runs differ, but for those of
    POOLED. Order: by alpha, then from the largest coefficient down; controls, and last no penalty.
    """
    others = sorted({name for run in runs for name in run.settings} - PENALTY - POOLED)
    varying = [name for name in others if len({str(run.settings.get(name)) for run in runs}) > 1]

    def in_words(run):
        words = [f"{name} {run.settings.get(name, '-')}" for name in varying]
        return ", ".join([penalty_in_words(run.settings), *words])

    def order(run):
        x = run.settings
        values = [x.get(name) for name in varying]
        return (x.get("kl_coef") == 0, x.get("kl_weight", "certainty") != "certainty",
                x.get("alpha", 0), -x.get("kl_coef", 0), str(x.get("kl_weight")),
                [(0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v)) for v in values])

    settings = {}
    for run in sorted(runs, key=order):
        model = str(run.settings.get("pretrained", f"seed {run.settings['seed']}"))
        settings.setdefault(in_words(run), {}).setdefault(model, []).append(run)
    return settings


def all_runs(settings):
    """What by_setting returns -> [Run]."""
    return [run for setting in settings.values() for runs in setting.values() for run in runs]


# ------------------------------------------------------------------ words, tables, figures
TITLES = dict(  # columns of log.csv, and what accuracies.json has
    nk_identical="two {long}-digit numbers, %", nk_varying="one or two {long}-digit numbers, %",
    n_identical="two {n}-digit numbers, %", n_sampled="two {n}-digit numbers, sampled, %",
    sampled_mix="sampled, training mix, %", success="right answers in training, %",
    p_critical="P(right critical token), %", p_copied="P(right copied digit), %",
    kl="KL, nats a token", loss="loss, nats a token",
    n_nats="loss on 1 to {n} digits, nats a token")
TITLES |= {f"p_l{line}o{operand}": f"P(last comma), line {line}, operand {operand}, %"
           for line in (1, 2, 3) for operand in (1, 2)}
LOOKS = {  # a setting has one colour and one marker in all figures
    "alpha 0": ("black", "o"), "alpha 1": ("#6baed6", "^"), "alpha 3": ("#2171b5", "s"),
    "alpha 10": ("#08306b", "D"), "alpha 100": ("#807dba", "p"), "alpha 1000": ("#3f007d", "*"),
    "alpha 0, kl_coef 0.05": ("0.35", "v"), "alpha 0, kl_coef 0.025": ("0.6", "<"),
    "alpha 3, kl_coef 0.05": ("#41b6c4", "h"), "no penalty": ("#cb181d", "X"),
    "alpha 3, matched": ("#d9a400", "P"), "alpha 100, matched": ("#8c6d00", "P"),
    "alpha 3, shuffled": ("#e6550d", ">"), "alpha 3, threshold": ("#31a354", "d"),
    "oracle": ("#8c510a", "H")}
SPARE = ("#1b9e77", "s"), ("#e7298a", "^"), ("#666666", "D"), ("#a6761d", "v"), ("#7570b3", "o")


def title(name, settings):
    """"nk_identical" -> "two 6-digit numbers, %"; "two N+k-digit numbers" if runs differ in N."""
    lengths = {(run.settings["digits"], run.settings["extra_digits"]) for run in all_runs(settings)}
    n, long = "N", "N+k"
    if len(lengths) == 1:
        [(n, k)] = lengths
        long = n + k
    return TITLES.get(name, name).format(n=n, long=long)


def table(*rows):
    """Rows of cells, the first are the titles -> Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    titles, *rows = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    line = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {row} |" for row in (titles, line, *rows))


def with_interval(values, form):
    """"1.0 [-1.5, 3.5]"; of one value "1.0", of none "-"."""
    if len(values) < 2:
        return "".join(format(x, form) for x in values) or "-"
    return "{:{form}} [{:{form}}, {:{form}}]".format(*interval(values), form=form)


def with_share(k, n):
    """"5 of 5: 100% [57%, 100%]"."""
    if n == 0:
        return "0 of 0"
    return "{} of {}: {:.0%} [{:.0%}, {:.0%}]".format(k, n, *wilson_interval(k, n))


def look(label, i):
    """Colour and marker of a setting, the i-th of a figure."""
    color, marker = LOOKS.get(label, SPARE[i % len(SPARE)])
    return dict(color=color, marker=marker)


def new_figure(n_panels, width, height, heading):
    """A figure with panels of width x height inches, three in a row -> (figure, axes)."""
    columns, rows = min(n_panels, 3), math.ceil(n_panels / 3)
    figure = Figure((max(columns * width, 6), rows * height + 0.6), layout="constrained")
    axes = [figure.add_subplot(rows, columns, at) for at in range(1, n_panels + 1)]
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(heading, fontsize=9)
    return figure, axes


def models_in_words(settings):
    """"mean of 10 models, 95% interval": what is shown of these settings."""
    counts = sorted({len(setting) for setting in settings.values()})
    models = " to ".join(str(n) for n in (counts[0], counts[-1])[-len(counts) :])
    return "one model" if counts == [1] else f"mean of {models} models, 95% interval"


def save_figure(figure, folder, name):
    """Save a figure as a picture; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / name, lambda file: figure.savefig(file, format="png", dpi=120,
                                                          metadata={"Software": None}))
    print(f"saved {folder / name}")


# ------------------------------------------------------------------ a model's answers
Answer = namedtuple("Answer", "a b text sure")  # sure: certainty before each character (len(text),)
COLOURS = LinearSegmentedColormap.from_list("certainty", ["#7f0000", "#d7301f", "#fdbb84", "white"])
MOST_LINES, MOST_COLUMNS = 90, 130  # of characters in a picture: more are not legible


def read_texts(model, texts, temperature):
    """What the model expects before each character -> log-probabilities, (len(text), V) for each
    text. Row i is what may follow text[:i]; row 0, with nothing before it, is uniform.
    """
    found = []
    for start in range(0, len(texts), 64):
        rows = [torch.tensor(data.encode(text)) for text in texts[start : start + 64]]
        ids = pad_sequence(rows, batch_first=True).to(model.lm_head.weight.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        logp = read(model, ids, lengths, temperature)[0].log_softmax(-1).cpu()
        uniform = torch.full((1, logp.shape[-1]), -math.log(logp.shape[-1]))
        found += [torch.cat([uniform, x[: len(row) - 1]]) for x, row in zip(logp, rows)]
    return found


def solve_problems(model, pairs, temperature):
    """Greedy answers to problems [(a, b)] -> (correct (n,), [Answer])."""
    correct, texts = solve(model, pairs)
    return correct, [Answer(*pair, text, certainty(logp).numpy()) for pair, text, logp in
                     zip(pairs, texts, read_texts(model, texts, temperature))]


def answer_lines(answer):
    """-> [(line, certainties (len(line),), place of the first wrong character in it)].

    The place is None in all lines but one. Below that stands the line as it should be; its
    certainties are None. On top stands what is wrong.
    """
    a, b, text, sure = answer
    right, error = data.prompt(a, b) + data.answer(a, b), data.first_error(text, a, b)
    lines = [(f"{a}{b:+}: {data.describe_error(text, a, b)}", None, None)]
    start = len(data.prompt(a, b))
    for line in text[start:].split("\n"):
        end = start + len(line)
        if error is not None and start <= error <= end:
            lines.append((line, sure[start:end], error - start))
            lines.append((right[start:].partition("\n")[0], None, None))
        elif line:
            lines.append((line, sure[start:end], None))
        start = end + 1
    return lines


def answer_text(answer):
    """The answer for a terminal: a ^ below the first wrong character, then the right line."""
    (heading, _, _), *lines = answer_lines(answer)
    shown = [heading]
    for line, sure, wrong in lines:
        mark = "" if wrong is None else "wrote"
        shown.append(f"{'right' if sure is None else mark:<7}{line}")
        if wrong is not None:
            shown.append(" " * (7 + wrong) + "^")
    return "\n".join(shown)


def draw_answers(columns, temperature):
    """Answers side by side, {title: [Answer]} -> figure (the paper's Figure 5).

    Colours reach from the least certain character to certainty 1. The first wrong character is
    outlined; below its line stands, in green, the right one. What is not legible is left out.
    """
    pages = [[line for answer in answers for line in (*answer_lines(answer), ("", None, None))]
             for answers in columns.values()]
    height = min(MOST_LINES, max(map(len, pages)))
    width = min(MOST_COLUMNS, max(len(line) for page in pages for line, _, _ in page))
    figure = Figure((len(pages) * (0.085 * width + 0.2) + 0.9, 0.175 * height + 0.8),
                    layout="constrained")
    figure.suptitle("outlined: the first wrong character; green: the right line", fontsize=9)
    axes = figure.subplots(1, len(pages), squeeze=False)[0]
    least = min(sure.min(initial=0.99) for page in pages for _, sure, _ in page if sure is not None)
    scale = Normalize(least, 1)
    for axis, name, page in zip(axes, columns, pages):
        grid = np.ones((height, width))
        for y, (line, sure, wrong) in enumerate(page[:height]):
            if sure is not None:
                grid[y, : len(line)] = sure[:width]
            is_right_line = y > 0 and page[y - 1][2] is not None
            for x, char in enumerate(line[:width]):
                colour = "#00602b" if is_right_line else "black"
                axis.text(x, y, char, ha="center", va="center", family="monospace", size=7.5,
                          color="white" if scale(grid[y, x]) < 0.5 else colour)
            if wrong is not None:
                axis.add_patch(Rectangle((wrong - 0.7, y - 0.6), 1.4, 1.2, fill=False, lw=1.5))
        image = axis.imshow(grid, COLOURS, scale, aspect="auto")
        axis.set_axis_off()
        axis.set_title(name, fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01,
                    label=f"certainty before the character,\nat temperature {temperature:g}")
    return figure


def check_fits(path, model, n_digits, task):
    """Stop if the model has no positions for the longest answer to numbers of n_digits digits."""
    if data.max_length(n_digits, task) > model.config.block_size:
        stop(f"{path} has no positions for answers to numbers of {n_digits} digits")


# ------------------------------------------------------------------ answer
def parse_problem(text, task):
    """"123456 + 70" -> (123456, 70); of the task "subtract", "12-5" -> (12, -5)."""
    sign = "+" if task == "add" else "-"
    found = re.fullmatch(r"([0-9]{1,999}) *([-+]) *([0-9]{1,999})", text.strip())
    if not found or found[2] != sign:
        stop(f"{text!r} is not a problem for this model; write one like 123456{sign}70")
    a, b = int(found[1]), int(sign + found[3])
    if task == "subtract" and not 0 < -b <= a:
        stop(f"{text!r}: the second number must be from 1 to the first one")
    return a, b


def place_table(model, a, b, n_digits, temperature, alpha):
    """What the model expects at each critical token and copied digit, after the right text."""
    text = data.prompt(a, b) + data.answer(a, b)
    [logp] = read_texts(model, [text], temperature)
    names = dict(copied="copied digit", comma1="last comma", digit1="last digit")
    rows = [["place", "right character", "likeliest", "certainty", f"weight at alpha {alpha:g}"]]
    places = data.critical_positions(a, b, n_digits).items()
    for (line, operand, name), i in sorted(places, key=lambda item: item[1]):
        sure, best = certainty(logp[i]).item(), int(logp[i].argmax())
        rows.append([f"line {line}, operand {operand}: {names.get(name, name)}",
                     f"{text[i]}  {logp[i, data.VOCAB.index(text[i])].exp():.1%}",
                     f"{data.VOCAB[best]!r:<5}{logp[i, best].exp():.1%}",
                     f"{sure:.3f}", f"{sure**alpha:.3f}"])
    return table(*rows) if len(rows) > 1 else f"none: no number has more than {n_digits} digits"


def answer(args):
    """What one or two models write for one problem, and what they expect at critical tokens."""
    n_models = 1
    if len(args.words) > 2 and re.search("[A-Za-z]", args.words[1]):  # no problem has a letter
        n_models = 2
    paths, problem = args.words[:n_models], " ".join(args.words[n_models:])
    columns = {}
    for name, path in zip(("before: ", "after: ") if n_models == 2 else ("",), paths):
        model, facts = load_checkpoint(path, args.device)
        a, b = parse_problem(problem, facts["task"])
        if len(data.prompt(a, b) + data.answer(a, b)) > model.config.block_size:
            stop(f"{path} has no positions for an answer as long as that to {problem}")
        [correct], [written] = solve_problems(model, [(a, b)], args.temperature)
        columns[name + path] = [written]
        print(f"{name}{path}\n{answer_text(written)}\nThe result is "
              f"{'right' if correct else 'wrong'}. After the right text, at temperature "
              f"{args.temperature:g}, the model expects:\n\n"
              f"{place_table(model, a, b, facts['digits'], args.temperature, args.alpha)}\n")
    save_figure(draw_answers(columns, args.temperature), args.out, "answer.png")


# ------------------------------------------------------------------ tokens
CLASSES = ("critical token", "copied digit", "elsewhere")


def token_classes(a, b, n_digits):
    """{index into prompt + answer: class}; what is not in it is "elsewhere"."""
    return {index: "copied digit" if name == "copied" else "critical token"
            for (_, _, name), index in data.critical_positions(a, b, n_digits).items()}


def first_wrong(answers, correct, n_digits):
    """{class of the first wrong token: answers that go wrong there, failures (those with a wrong
    result), certainty (the mean at these tokens; None of none)}.
    """
    found = {name: [] for name in CLASSES}
    for answer, right in zip(answers, correct):
        error = data.first_error(answer.text, answer.a, answer.b)
        if error is not None and error < len(answer.text):
            name = token_classes(answer.a, answer.b, n_digits).get(error, "elsewhere")
            found[name].append((not right, answer.sure[error]))
    return {name: dict(answers=len(x), failures=sum(int(failed) for failed, _ in x),
                       certainty=float(np.mean([sure for _, sure in x])) if x else None)
            for name, x in found.items()}


def unsure_tokens(model, pairs, n_digits, temperature):
    """Of the tokens of right answers: how many are critical tokens or copied digits, how many have
    a certainty below 0.9, and how many both -> {"critical", "unsure", "both"}.
    """
    counts = dict(critical=0, unsure=0, both=0)
    texts = [data.prompt(a, b) + data.answer(a, b) for a, b in pairs]
    for (a, b), text, logp in zip(pairs, texts, read_texts(model, texts, temperature)):
        critical = token_classes(a, b, n_digits).keys()
        below = (certainty(logp) < 0.9).nonzero()[:, 0].tolist()
        unsure = {i for i in below if i >= len(data.prompt(a, b))}
        for name, places in ("critical", critical), ("unsure", unsure), ("both", critical & unsure):
            counts[name] += len(places)
    return counts


def paper_table_1(model, answers, n_digits, temperature):
    """The paper's Table 1: certainty at critical tokens minus that at all others (None of none).

    Of each critical token that an answer reaches without an error: its certainty minus the mean of
    the whole answer's other tokens. Means over an answer's tokens, then over the answers.
    """
    differences, texts = [], [answer.text for answer in answers]
    for (a, b, text, _), logp in zip(answers, read_texts(model, texts, temperature)):
        start, error = len(data.prompt(a, b)), data.first_error(text, a, b)
        sure = certainty(logp[start:]).numpy()  # (answer tokens,)
        others = (sure.sum() - sure) / max(1, len(sure) - 1)
        last = len(text) - 1 if error is None else min(error, len(text) - 1)
        reached = [i - start for i, name in token_classes(a, b, n_digits).items()
                   if name == "critical token" and i <= last]
        if reached:
            differences.append((sure - others)[reached].mean())
    return float(np.mean(differences)) if differences else None


def tokens_text(models):
    """What the tokens.json of one or more models say: sums of counts, means over models."""
    def mean(values, form):
        return with_interval([x for x in values if x is not None], form)

    rows = [["first wrong token", "of the failures", "with a wrong result", "certainty there"]]
    n_failures = sum(x["first_wrong"][name]["failures"] for x in models for name in CLASSES)
    for name in CLASSES:
        found = [x["first_wrong"][name] for x in models]
        answers, failures = (sum(x[key] for x in found) for key in ("answers", "failures"))
        rows.append([name, with_share(failures, n_failures), with_share(failures, answers),
                     mean([x["certainty"] for x in found], ".3f")])
    critical, unsure, both = (sum(x["right_answers"][key] for x in models)
                              for key in ("critical", "unsure", "both"))
    paper = [["temperature", *models[0]["table_1"]], ["critical tokens minus others"] + [
        mean([x["table_1"][temperature] for x in models], "+.3f")
        for temperature in models[0]["table_1"]]]
    return (f"{table(*rows)}\n\nIn right answers, of the critical tokens and copied digits, "
            f"{with_share(both, critical)}\nhave a certainty below 0.9. Of all tokens below 0.9, "
            f"{with_share(both, unsure)} are\nsuch tokens.\n\nThe paper's Table 1, of 50 greedy "
            "answers (there -0.33, -0.21, -0.13 for N = 3, 5, 7):\n\n"
            f"{table(*paper)}\n")


def tokens(args):
    """Where a model goes wrong, and how sure it is: tokens.json, tokens.png and tables."""
    model, facts = load_checkpoint(args.checkpoint, args.device)
    n, long = facts["digits"], facts["digits"] + args.extra_digits
    check_fits(args.checkpoint, model, long, facts["task"])
    pairs = data.sample_problems(args.problems, long, "varying", 1, facts["task"])
    correct, answers = solve_problems(model, pairs, args.temperature)
    contents = dict(digits=n, extra_digits=args.extra_digits, temperature=args.temperature,
                    problems=len(pairs), right=int(correct.sum()),
                    first_wrong=first_wrong(answers, correct, n),
                    right_answers=unsure_tokens(model, pairs, n, args.temperature),
                    table_1={t: paper_table_1(model, answers[:50], n, int(t)) for t in "124"})
    text = json.dumps(contents, indent=1, allow_nan=False)
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "tokens.json", lambda file: file.write(text.encode()))

    shown = np.argsort(correct, kind="stable")[: args.show]  # failures first
    columns = {f"before: {args.checkpoint}": [answers[i] for i in shown]}
    if args.after:
        model, facts = load_checkpoint(args.after, args.device)
        check_fits(args.after, model, long, facts["task"])
        columns[f"after: {args.after}"] = solve_problems(model, [pairs[i] for i in shown],
                                                        args.temperature)[1]
    save_figure(draw_answers(columns, args.temperature), args.out, "tokens.png")
    for name, written in columns.items():
        print("\n\n".join([f"\n{name}", *map(answer_text, written)]))
    print(f"\nThe picture shows the first {MOST_LINES} lines at most.\n{correct.sum()} of "
          f"{len(pairs)} problems with one or two {long}-digit numbers are right, greedy.\n"
          f"Certainties are at temperature {args.temperature:g}, means over the first wrong tokens."
          f"\n\n{tokens_text([contents])}")


# ------------------------------------------------------------------ explain
def explain(args):
    """Let a run, as it stands, answer its next problems, and explain one of the answers."""
    import ppo  # no other verb needs it
    settings = read_file(args.run_folder / "settings.json", parse_settings, AGAIN)
    options = sorted(vars(ppo.parse_args([])).keys() & settings.keys())
    run = ppo.parse_args([f"--{name}={settings[name]}" for name in options])
    path = args.checkpoint or run.checkpoint
    reference, facts = load_checkpoint(path, args.device)
    reference.requires_grad_(False)
    if ppo.pretrained_name(reference, facts) != settings.get("pretrained"):
        stop(f"{args.run_folder} is no run of ppo.py from {path}; name its model with --checkpoint")
    check_fits(path, reference, facts["digits"] + run.extra_digits, facts["task"])
    policy, step = copy.deepcopy(reference), 0
    value_head = ppo.ValueHead(policy.config.n_embd).to(args.device)

    def load_state(path):
        state = load(path)
        policy.load_state_dict(state["policy"])
        value_head.load_state_dict(state["value_head"])
        finite = all(p.isfinite().all() for p in policy.parameters())
        if state["settings"] != settings or not finite:
            raise ValueError("it is of other settings, or a weight is not finite")
        return int(state["step"])

    if (args.run_folder / "state.pt").exists():
        step = read_file(args.run_folder / "state.pt", load_state, AGAIN)
    else:
        print("nothing is saved so far: the policy is still the reference, and k2 is 0")
    pairs, generator = ppo.draw_problems(run, facts, step + 1, args.device)
    batch = ppo.rollout(policy, value_head, reference, pairs, facts["digits"], run, generator)
    batch["texts"] = [data.decode([state[0], *actions[:n]]) for state, actions, n in zip(
        batch["states"].tolist(), batch["actions"].tolist(), batch["n_actions"].tolist())]
    batch["critical"] = ppo.known_critical(batch["texts"], pairs, facts["digits"], batch["mask"])
    batch["advantages"] = ppo.normalize(batch["advantages"], batch["mask"])
    print(explain_text(batch, pairs, run.alpha, run.kl_coef))


def explain_text(batch, pairs, alpha, kl_coef):
    """One answer of a rollout, token by token, and what the reference expected at one token: the
    right answer with the largest k2 at a critical token or copied digit of weight 1/2 or less.
    """
    J, critical = certainty(batch["ref_logits"]), batch["critical"]  # (B, T)
    k2 = prioritized_kl(batch["old_logp"], batch["ref_logp"], 1)
    penalty = prioritized_kl(batch["old_logp"], batch["ref_logp"], batch["weight"])
    # Before the first update every k2 is 0: then the least certain critical token decides.
    freed = (k2 * (batch["weight"] <= 0.5) + 1e-6 * (1 - J)) * critical
    wrong = batch["success"] < batch["success"].max()  # the wrong answers, if one is right
    i = int(freed.amax(1).masked_fill(wrong, -1).argmax())
    (a, b), text, at = pairs[i], batch["texts"][i], int(freed[i].argmax())
    loss = -batch["advantages"] + kl_coef * penalty  # the ratio is 1; no entropy bonus here
    columns = dict(logp_ref=batch["ref_logp"], logp=batch["old_logp"], k2=k2, J=J,
                   weight=batch["weight"], penalty=penalty, A=batch["advantages"], loss=loss)
    lines = [text, f"reward {batch['success'][i]:.0f} ({data.describe_error(text, a, b)}); mean "
             f"reward of {len(pairs)} answers {batch['success'].mean():.2f}", "",
             "*: a critical token or copied digit. J: certainty of the reference. A: advantage, "
             "normalized.", "loss = -A + kl_coef * weight * k2. Shown: J <= 0.9 or k2 >= 0.02, and "
             "all with *.",
             "", f"{'  place':<19} token" + "".join(f"{name:>9}" for name in columns)]
    error = data.first_error(text, a, b)
    for t in batch["mask"][i].nonzero()[:, 0].tolist():  # action t is character t + 1
        if J[i, t] <= 0.9 or k2[i, t] >= 0.02 or critical[i, t]:
            known = error is None or t + 1 <= error
            place = data.place(a, b, t + 1) if known else "after the error"
            lines.append(f"{'*' if critical[i, t] else ' '} {place:<17} {text[t + 1]!r:>5}"
                         + "".join(f"{x[i, t]:9.4f}" for x in columns.values()))
    logits = batch["ref_logits"][i, at]
    probs, V = logits.softmax(-1), len(logits)
    lines += ["", f"the reference at {data.place(a, b, at + 1)} (written: {text[at + 1]!r})",
              "  token   logit       p  -p log p"]
    for token in probs.argsort(descending=True)[:4].tolist():
        p = probs[token].item()
        lines.append(f"  {data.VOCAB[token]!r:>5} {logits[token]:7.3f} {p:7.4f} "
                     f"{-p * math.log(p):9.4f}")
    sure = J[i, at].item()
    lines.append(f"entropy H of all {V}: {(1 - sure) * math.log(V):.4f}; J = 1 - H / log {V} = "
                 f"{sure:.4f}; J^{alpha:g} = {sure**alpha:.4f}")
    return "\n".join(lines)


# ------------------------------------------------------------------ curves
VIEWS = {  # columns of log.csv
    "curves": "success nk_identical nk_varying n_identical p_critical kl loss".split(),
    "critical": "p_l1o1 p_l2o1 p_l3o1 p_l1o2 p_l2o2 p_l3o2 p_copied".split(),  # Figure 7
    "drift": "kl n_identical n_sampled n_nats".split()}


def curve(setting, name):
    """A column of log.csv, in % where it is a share -> (x (R,), mean, low, high (R, 3)): the means
    over models and 95% intervals in the rows where all runs have it.
    """
    logs = [run.log for run in all_runs(dict(setting=setting))]
    x = min((log["episodes" if "episodes" in log else "step"] for log in logs), key=len)
    of_models = np.array([np.mean([run.log[name][: len(x)] for run in runs], 0)
                          for runs in setting.values()])  # (models, rows)
    known = ~np.isnan(of_models).any(0)
    points = np.array([interval(values) for values in of_models[:, known].T]).reshape(-1, 3)
    return x[known], points * (100 if TITLES.get(name, "").endswith("%") else 1)


def draw_curves(settings, names, first=None):
    """Learning curves of columns of log.csv -> figure. One column of more than two settings: a
    panel a setting, in which the first one is repeated, dashed. Else: a panel a column.
    """
    logs = [run.log for run in all_runs(settings)]
    names = [name for name in names if all(name in log for log in logs)]
    if not names or len({"episodes" in log for log in logs}) > 1:
        stop("these runs have not all logged what is to be shown")
    labels, first = list(settings), first or next(iter(settings))
    panels = [(title(name, settings), name, labels) for name in names]
    heading = models_in_words(settings)
    if len(names) == 1 and len(labels) > 2:
        heading = f"{panels[0][0]}: {heading}; dashed: {first}"
        panels = [(label, names[0], [first, label]) for label in labels if label != first]
    figure, axes = new_figure(len(panels), 3.6, 2.6, heading)
    for axis, (panel, name, shown) in zip(axes, panels):
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("answers in training" if "episodes" in logs[0] else "training step")
        for label in shown:
            x, points = curve(settings[label], name)
            style = look(label, labels.index(label))
            dashed = label == first and shown is not labels
            axis.plot(x, points[:, 0], **style, linestyle="--" if dashed else "-", markersize=4,
                      markevery=1 + len(x) // 20, label=label, clip_on=False)
            if len(shown) <= 2:  # more bands would hide each other
                axis.fill_between(x, points[:, 1], points[:, 2], color=style["color"], alpha=0.2,
                                  lw=0)
        if TITLES.get(name, "").endswith("%"):
            axis.set_ylim(0, 100)
    if panels[0][2] is labels:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                      frameon=False)
    return figure


def curves(args):
    """Save the learning curves of runs."""
    settings = by_setting(load_runs(args.runs))
    figure = draw_curves(settings, VIEWS.get(args.show, [args.show]))
    save_figure(figure, args.out, f"{args.show}.png")


# ------------------------------------------------------------------ compare
OUTCOMES = ("nk_identical", "sampled_mix", "n_identical")


def outcomes(setting, name, when="after"):
    """{pre-trained model: result}: one of OUTCOMES, in %, or "kl" in the last iteration, in nats a
    token; {} if a run has no such result. when: "before" or "after" fine-tuning.
    """
    def result(run):
        if "before" not in run.accuracies:
            stop(f"{run.folder} is not a finished run of ppo.py; a run's own command resumes it")
        if name == "kl":
            return run.log["kl"][-1] if when == "after" else math.nan
        n, k = run.settings["digits"], run.settings["extra_digits"]
        cell = dict(nk_identical=f"identical {n + k}", sampled_mix="sampled, training mix",
                    n_identical=f"identical {n}")[name]
        return 100 * run.accuracies[when].get(cell, math.nan)

    means = {model: float(np.mean([result(run) for run in runs]))
             for model, runs in setting.items()}
    return {} if any(map(math.isnan, means.values())) else means


def verdict(differences):
    """"higher: +2.0 [+0.5, +3.5], p = 0.031"; without the word if the interval holds 0."""
    if len(differences) < 2:
        return with_interval(differences, "+.1f")
    _, low, high = interval(differences)
    word = ("higher: " if low > 0 else "") + ("lower: " if high < 0 else "")
    return f"{word}{with_interval(differences, '+.1f')}, p = {sign_flip_p(differences):.3f}"


def compare_text(settings, first=None):
    """The results of each setting, and how far each is from the first one on the same models."""
    first = first or next(iter(settings))
    models = {model: runs for setting in settings.values() for model, runs in setting.items()}
    titles = [title(name, settings) for name in (*OUTCOMES, "kl")]

    def row(label, setting, when="after"):
        values = [list(outcomes(setting, name, when).values()) for name in (*OUTCOMES, "kl")]
        return [f"{label} ({len(setting)})", *(with_interval(x, ".1f") for x in values[:-1]),
                with_interval(values[-1], ".4f")]

    text = table(["setting (models)", *titles], row("before", models, "before"),
                 *(row(label, setting) for label, setting in settings.items()))
    if len(settings) == 1 or len(models) == 1:
        return text
    rows = []
    for label in [label for label in settings if label != first]:
        points = [paired_differences(outcomes(settings[label], name),
                                     outcomes(settings[first], name)) for name in OUTCOMES]
        rows.append([f"{label} ({len(points[0])})", *map(verdict, points)])
    return f"{text}\n\n{table([f'minus {first} (models)', *titles[:-1]], *rows)}"


def draw_compare(settings, first=None):
    """What was learned and what was kept, a row a setting -> figure."""
    first = first or next(iter(settings))
    figure, axes = new_figure(2, 4.6, 0.33 * len(settings) + 0.9, "large: "
                              f"{models_in_words(settings)}; small: each model; dashed: {first}")
    for axis, word, name in zip(axes, ("learned", "kept"), ("nk_identical", "n_identical")):
        least = 100
        for y, (label, setting) in enumerate(settings.items()):
            values, style = list(outcomes(setting, name).values()), look(label, y)
            if not values:
                continue
            mean, *ends = interval(values)
            axis.plot(np.clip(ends, 0, 100), [y, y], color=style["color"], lw=2)
            axis.plot(values, [y] * len(values), **style, ls="", ms=4, alpha=0.35, clip_on=False)
            axis.plot(mean, y, **style, ms=9, markeredgecolor="white", clip_on=False)
            if label == first:
                axis.axvline(mean, color=style["color"], linestyle="--", lw=1)
            least = min(least, *values)
        axis.set_yticks(range(len(settings)), settings if word == "learned" else [])
        axis.set_ylim(len(settings) - 0.5, -0.5)
        axis.set_xlim(0 if word == "learned" else 10 * min(9, least // 10), 100)
        axis.set_title(f"{word}: {title(name, settings)}", fontsize=10)
    return figure


def compare(args):
    """Print the results of runs and save them as a picture."""
    settings = by_setting(load_runs(args.runs))
    n_models = len({model for setting in settings.values() for model in setting})
    if n_models > 40:
        stop(f"the exact p of {n_models} models would take too long; compare at most 40")
    text = compare_text(settings)
    figure = draw_compare(settings) if n_models > 1 else draw_curves(settings, ["nk_identical"])
    save_figure(figure, args.out, "compare.png")
    print(f"\n{text}\n")
    if n_models == 1:
        print("One model cannot show which setting is better: from another model it may end the "
              "other way round.\nThe group next to you may have another model; compare takes the "
              "folders of all groups at once.\n(The picture's points are of --eval_problems "
              "problems each, the table's figures of --final_problems.)")
    else:
        print("Brackets: 95% interval over pre-trained models. Differences: in points, of the same "
              "models.\nHigher, lower: the interval does not hold 0. p: the exact sign-flip test.")


# ------------------------------------------------------------------ the command line
def main(argv=None):
    ap = argparse.ArgumentParser(description="Tables and pictures from checkpoints and runs.")
    verbs, adders = ap.add_subparsers(dest="verb", required=True), {}
    for run, what in ((answer, "what do one or two models write for one problem?"),
                      (tokens, "where does a model go wrong, and how sure is it there?"),
                      (explain, "the penalty of one answer of a run, token by token"),
                      (curves, "learning curves of runs"),
                      (compare, "what was learned and kept in runs, paired by model")):
        verb = verbs.add_parser(run.__name__, help=what, description=what,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        verb.set_defaults(run=run)
        add = adders[run] = verb.add_argument
        if run in (curves, compare):
            add("runs", nargs="+", help="folders of runs, or patterns like out/ppo_*")
        else:
            add("--device", type=to_device, default="auto", help="cpu, cuda, mps, or auto")
        if run in (answer, tokens):
            add("--temperature", type=number(float, 0.001, 1000), default=2.0,
                help="of certainties and probabilities; 2 as in ppo.py")
        if run != explain:
            add("--out", type=Path, default=Path("out/figures"), help="folder for what it writes")
    add = adders[answer]
    add("words", nargs="+", metavar="word",
        help="one or two checkpoints (before and after fine-tuning), then a problem like 123456+70")
    verbs.choices["answer"].usage = "analyze.py answer [options] model.pt [model.pt] 123456+70"
    add("--alpha", type=number(float, 0, 1e6), default=3.0, help="exponent of the weight shown")
    add = adders[tokens]
    add("checkpoint", help="a model.pt of pretrain.py or ppo.py")
    add("--after", help="a second one, whose answers are drawn beside those of the first")
    add("--problems", type=number(int, 1, 2000), default=200, help="held-out problems to solve")
    add("--extra_digits", type=number(int, 0, 1000), default=1, help="k: problems of N+k digits")
    add("--show", type=number(int, 1, 2000), default=3, help="answers to show, failures first")
    add = adders[explain]
    add("run_folder", type=Path, metavar="run", help="folder of a run of ppo.py")
    add("--checkpoint", help="the model that it began with, if that is elsewhere now")
    add = adders[curves]
    add("--show", default="curves", help="curves, critical, drift, or a column of log.csv")
    args = ap.parse_args(argv)
    return run_script(args.run, args, "nothing is lost; the same command starts over")


if __name__ == "__main__":
    sys.exit(main())
