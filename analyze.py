"""Tables and pictures from checkpoints and from the folders of runs.

    python analyze.py answer model.pt 123456+70   one problem: where is the model unsure, or wrong?
    python analyze.py tokens model.pt             many problems: where does it go wrong?
    python analyze.py explain out/ppo_...         the penalty of one answer, token by token
    python analyze.py curves out/ppo_*            learning curves
    python analyze.py compare out/ppo_*           what was learned and kept, paired by model

Runs that differ only in their pre-trained model, seed or evaluations are a group, which has one
setting (without a penalty, whatever its alpha). Its figures are means over the pre-trained models,
with 95% intervals.
B sequences, T tokens, V vocabulary.
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
import zlib
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
from pretrain import load_parts, number, run_script, stop, to_device


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


def signed_sums(values):
    """The sums for all choices of the values' signs: 1, 2 -> 3, 1 - 2, -1 + 2, -3 in any order."""
    sums = np.zeros(1)
    for x in values:
        sums = np.concatenate([sums + x, sums - x])
    return sums


def sign_flip_p(differences):
    """Exact two-sided p, if each of n <= 40 differences is as likely to have the other sign.

    The share of all 2^n choices of signs whose |sum| is at least the observed one; never below
    2 / 2^n. 1, 2, 3: of the 8 choices +++ and --- reach 6, so p = 0.25. ValueError for more than
    40 differences, and for nan or infinity.
    """
    differences = np.array(differences, float)
    if len(differences) > 40 or not np.isfinite(differences).all():
        raise ValueError("no exact p of more than 40 differences, or of nan or infinity")
    rounding = 1e-9 * np.abs(differences).sum()  # equal sums may differ by as much
    observed = abs(differences.sum()) - rounding
    if observed <= 0:
        return 1.0
    # 2^40 sums are too many, but 2^20 of each half are not. For each sum of the left half we look
    # up how many of the right half's reach `observed` together with it.
    n = len(differences)
    left, right = map(signed_sums, np.split(differences, [n // 2]))
    left.sort()  # neighbours look up neighbours: much faster
    right.sort()
    n_enough = int((len(right) - np.searchsorted(right, observed - left)).sum())
    return 2 * n_enough / 2**n  # as many choices reach -observed


# ------------------------------------------------------------------ the folders of runs
# What a run has written. model: the name of its pre-trained model.
Record = namedtuple("Record", "folder model settings log accuracies")
AGAIN = "make the run again, with --fresh or another --out"


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
    """-> Record, its accuracies {} if the run is not finished; None before its first iteration."""
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
    steps = log["step"] if "step" in log else log["iteration"]
    if len(steps) == 0 or not steps[-1] >= 1:  # nan is not
        return None
    model = str(settings.get("pretrained", f"seed {settings['seed']}"))
    return Record(folder, model, settings, log, accuracies)


def load_runs(names):
    """Folders, or patterns of them, which not every shell expands -> [Record], each folder once."""
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


# ------------------------------------------------------------------ groups of runs
PENALTY = {"alpha", "kl_coef", "kl_weight"}
SHORT = dict(digits="N =", extra_digits="k =")
POOLED = {"eval_every", "eval_problems", "final_problems", "checkpoint", "seed", "pretrained"}


def penalty_in_words(settings):
    """"alpha 3"; "alpha 0, kl_coef 0.05"; "alpha 3, matched"; "oracle"; "no penalty"."""
    if "kl_coef" not in settings:
        return "pre-training"
    if settings["kl_coef"] == 0:
        return "no penalty"
    control = str(settings.get("kl_weight", "certainty"))
    words = [] if control == "oracle" else [f"alpha {settings.get('alpha', 0):g}"]
    if settings["kl_coef"] != 0.1:  # the default
        words.append(f"kl_coef {settings['kl_coef']:g}")
    if control != "certainty":
        words.append(control)
    return ", ".join(words)


def group_runs(runs):
    """[Record] -> groups: {setting in words: [Record]}.

    The words are the penalty and all other settings in which the runs differ, but for those of
    POOLED. Order: by alpha, then from the largest coefficient down; controls, and last no penalty.
    """
    others = {name for run in runs for name in run.settings} - PENALTY - POOLED
    varying = [name for name in sorted(others)
               if len({str(run.settings.get(name)) for run in runs}) > 1]

    groups = {}
    for run in runs:
        words = [f"{SHORT.get(name, name)} {run.settings.get(name, '-')}" for name in varying]
        label = ", ".join([penalty_in_words(run.settings), *words])
        groups.setdefault(label, []).append(run)

    def place(label):
        x = groups[label][0].settings
        is_control = x.get("kl_weight", "certainty") != "certainty"
        by_number = re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", lambda x: f"{float(x[0]):020.9f}", label)
        return x.get("kl_coef") == 0, is_control, x.get("alpha", 0), -x.get("kl_coef", 0), by_number

    return {label: groups[label] for label in sorted(groups, key=place)}


def model_means(runs, value):
    """value(run), a number or (rows,), of runs -> {pre-trained model: its mean over the seeds}."""
    found = {}
    for run in runs:
        found.setdefault(run.model, []).append(value(run))
    return {model: np.mean(values, 0) for model, values in found.items()}


def n_models(runs):
    return len({run.model for run in runs})


def all_runs(groups):
    return [run for runs in groups.values() for run in runs]


# ------------------------------------------------------------------ words, tables, figures
TITLES = dict(  # columns of log.csv, and what accuracies.json has; shares end in %
    nk_identical="two {long}-digit numbers, %", nk_varying="one or two {long}-digit numbers, %",
    n_identical="two {n}-digit numbers, %",
    sampled_mix="sampled, training mix, %", success="right answers in training, %",
    p_critical="P(right critical token), %", p_copied="P(right copied digit), %",
    kl="KL, nats a token", loss="loss, nats a token",
    n_nats="loss on 1 to {n} digits, nats a token")
LOOKS = {  # colour and marker of a setting, the same in all figures
    "alpha 0": ("black", "o"), "alpha 1": ("#3f8fc4", "^"), "alpha 3": ("#2171b5", "s"),
    "alpha 10": ("#08306b", "D"), "alpha 100": ("#807dba", "p"), "alpha 1000": ("#3f007d", "*"),
    "alpha 0, kl_coef 0.05": ("0.35", "v"), "alpha 0, kl_coef 0.025": ("0.55", "<"),
    "alpha 3, kl_coef 0.05": ("#2b9aab", "h"), "no penalty": ("#cb181d", "X"),
    "alpha 3, matched": ("#b38600", "P"), "alpha 100, matched": ("#8c6d00", "P"),
    "alpha 3, shuffled": ("#e6550d", ">"), "alpha 3, threshold": ("#31a354", "d"),
    "oracle": ("#8c510a", "H")}
LOOKS |= {f"alpha 3, N = {n}": look for n, look in {  # light to dark
    3: ("#7a9a01", "o"), 4: ("#2f9e55", "^"), 5: ("#277f8e", "s"), 6: ("#365c8d", "D"),
    7: ("#440154", "v")}.items()}
MOST_ROWS, MOST_CURVES = 30, 8  # settings in a figure: more are not legible


def title(name, groups):
    """"nk_identical" -> "two 6-digit numbers, %"; "two N+k-digit numbers" if runs differ in N."""
    lengths = {(run.settings["digits"], run.settings["extra_digits"]) for run in all_runs(groups)}
    n, long = "N", "N+k"
    if len(lengths) == 1:
        [(n, k)] = lengths
        long = n + k
    return TITLES.get(name, name).format(n=n, long=long)


def is_share(name):
    """True if a column of log.csv is shown in %."""
    return TITLES.get(name, "").endswith("%") or name.startswith("p_")


def models_in_words(groups):
    """"mean of 10 models, 95% interval": what a figure shows of these settings."""
    counts = [n_models(runs) for runs in groups.values()]
    if max(counts) == 1:
        return "one model" if n_models(all_runs(groups)) == 1 else "one model each"
    few, many = min(counts), max(counts)
    models = str(many) if few == many else f"{few} to {many}"
    return f"mean of {models} models, 95% interval"


def look(label):
    """Colour and marker of a setting; those of a setting that is not in LOOKS follow from its name.
    """
    i = zlib.crc32(label.encode())
    spare = f"C{i % 10}", "os^vDP<X>"[i % 9]
    color, marker = LOOKS.get(label, spare)
    return dict(color=color, marker=marker)


def table(*rows):
    """Rows of cells, the first are the titles -> Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    titles, *rows = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    line = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {row} |" for row in (titles, line, *rows))


def with_interval(values, form):
    """"1.0 [-1.5, 3.5]"; of one value "1.0", of none "-"."""
    if len(values) == 0:
        return "-"
    mean, low, high = (format(x, form) for x in interval(values))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"


def legible(groups, most):
    """The first groups, at most as many as a figure can show; says what is left out."""
    if len(groups) > most:
        print(f"the picture shows the first {most} of {len(groups)} settings; the others are left "
              "out; name fewer folders")
    return dict(list(groups.items())[:most])


def new_figure(n_panels, width, height, heading):
    """A figure with panels of width x height inches, three in a row -> (figure, axes)."""
    columns, rows = min(n_panels, 3), math.ceil(n_panels / 3)
    figure = Figure((max(columns * width, 6), rows * height + 0.6), layout="constrained")
    axes = [figure.add_subplot(rows, columns, at) for at in range(1, n_panels + 1)]
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(heading, fontsize=9)
    return figure, axes


def add_legend(figure):
    """Below the panels, what the first one shows."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)


def save_figure(figure, folder, name):
    """Save a figure as a picture; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / name, lambda file: figure.savefig(file, format="png", dpi=120,
                                                          metadata={"Software": None}))
    print(f"saved {folder / name}")


# ------------------------------------------------------------------ a model reads and writes
CLASSES = ("critical token", "copied digit", "elsewhere")
# text: prompt + answer of L characters. logits (L, V): what the model expects before each.
# start: index of the answer; error: of the first wrong character, math.inf without one.
# classes (L,): that of each character, one of CLASSES.
Answer = namedtuple("Answer", "a b text logits start error classes")


def read_logits(model, texts):
    """The model reads texts -> logits (len(text), V) of each, on the CPU. Row i is what may follow
    text[:i]; row 0, with nothing before it, is 0: all alike. A model that overflows ends in a line.
    """
    found = []
    for start in range(0, len(texts), 64):
        rows = [torch.tensor(data.encode(text)) for text in texts[start : start + 64]]
        ids = pad_sequence(rows, batch_first=True).to(model.lm_head.weight.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        for row, logits in zip(rows, read(model, ids, lengths)[0].cpu()):
            if not logits[: len(row)].isfinite().all():
                stop("this model's logits are not finite, its weights are too large; use another")
            found.append(torch.cat([torch.zeros_like(logits[:1]), logits[: len(row) - 1]]))
    return found


def read_answers(model, pairs, texts, n_digits):
    """The model reads a text, right or wrong, to each problem (a, b) -> [Answer]."""
    answers = []
    for (a, b), text, logits in zip(pairs, texts, read_logits(model, texts)):
        classes = np.full(len(text), "elsewhere", dtype=object)
        for (_, _, name), index in data.critical_positions(a, b, n_digits).items():
            if index < len(text):  # it may have ended before
                classes[index] = "copied digit" if name == "copied" else "critical token"
        error = data.first_error(text, a, b)
        answers.append(Answer(a, b, text, logits, len(data.prompt(a, b)),
                              math.inf if error is None else error, classes))
    return answers


def solve_problems(model, pairs, n_digits):
    """Greedy answers -> (correct (n,), [Answer])."""
    correct, texts = solve(model, pairs)
    return correct, read_answers(model, pairs, texts, n_digits)


def check_fits(path, model, length):
    """Stop if the model has no positions for so many characters of prompt and answer."""
    if length > model.config.block_size:
        stop(f"{path} has no positions for {length} characters of problem and answer")


# ------------------------------------------------------------------ answers in text and picture
# mark: "problem", "wrote" (the line with the first error), "right" (as it should be) or "".
# sure: certainty before each character, None where the model wrote none. error: a column, or None.
Line = namedtuple("Line", "mark text sure error")
WHITE_TO_RED = LinearSegmentedColormap.from_list(
    "white to red", ["#7f0000", "#d7301f", "#fdbb84", "white"])
MOST_LINES, MOST_COLUMNS = 90, 130  # of characters in a picture: more are not legible


def answer_lines(answer, temperature):
    """-> [Line]: the problem, what the model wrote and, below its first error, the right line."""
    a, b, text, logits, start, error, _ = answer
    sure = certainty(logits / temperature).numpy()
    lines = [Line("problem", f"{a}{b:+}: {data.describe_error(text, a, b)}", None, None)]
    for line in text[start:].split("\n"):
        end = start + len(line)
        if start <= error <= end:
            right = data.right_text(a, b)[start:].partition("\n")[0]
            lines.append(Line("wrote", line, sure[start:end], error - start))
            lines.append(Line("right", right, None, error - start))
        elif line:
            lines.append(Line("", line, sure[start:end], None))
        start = end + 1
    return lines


def answer_text(lines):
    """[Line] for a terminal, with a ^ below the first error."""
    shown = []
    for line in lines:
        shown.append(f"{line.mark:<9}{line.text}")
        if line.mark == "wrote":
            shown.append(" " * (9 + line.error) + "^")
    return "\n".join(shown)


def draw_answers(columns, temperature):
    """Answers below each other, {title: [[Line] of each answer]} -> figure (the paper's Figure 5).

    The less certain the model was, the stronger the colour behind a character. The first wrong
    character is outlined, and so is, below it, the right one. What does not fit is named.
    """
    empty = Line("", "", None, None)
    pages = [[line for lines in answers for line in (*lines, empty)][:-1]
             for answers in columns.values()]
    longest, most = max(len(line.text) for page in pages for line in page), max(map(len, pages))
    width, height = min(longest, MOST_COLUMNS), min(most, MOST_LINES)
    if longest > width or most > height:
        print(f"the picture shows {height} of {most} lines, and {width} of at most {longest} "
              "characters of a line")
    figure = Figure((0.1 * (width + 9), len(pages) * (0.2 * height + 0.3) + 1),
                    layout="constrained")
    figure.suptitle("outlined: the first wrong character and, below, the right one", fontsize=9)
    axes = figure.subplots(len(pages), squeeze=False)[:, 0]
    certainties = [line.sure for page in pages for line in page if line.sure is not None]
    scale = Normalize(min(sure.min(initial=0.99) for sure in certainties), 1)
    for axis, name, page in zip(axes, columns, pages):
        grid = np.ones((height, width))
        for y, (mark, text, sure, error) in enumerate(page[:height]):
            if sure is not None:
                grid[y, : len(text)] = sure[:width]
            colour = "#00602b" if mark == "right" else "black"
            font = dict(va="center", family="monospace", size=9,
                        weight="bold" if mark in ("problem", "right") else "normal")
            axis.text(-1.5, y, mark, ha="right", color=colour, **font)
            for x, char in enumerate(text[:width]):
                on_dark = scale(grid[y, x]) < 0.5
                axis.text(x, y, char, ha="center", color="white" if on_dark else colour, **font)
            if error is not None and error < width:
                axis.add_patch(Rectangle((error - 0.5, y - 0.5), 1, 1, fill=False, lw=1.8,
                                         edgecolor=colour, clip_on=False))
        image = axis.imshow(grid, WHITE_TO_RED, scale, aspect="auto")
        axis.set_xlim(-9, width - 0.5)
        axis.set_axis_off()
        printable = name.encode(errors="backslashreplace").decode()  # a file may have any name
        axis.set_title(printable, fontsize=9, parse_math=False)
    figure.colorbar(image, ax=axes, location="bottom", fraction=0.03, pad=0.01, aspect=60,
                    label=f"certainty before the character, at temperature {temperature:g}")
    return figure


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


def place_table(answer, n_digits, temperature, alpha):
    """What the model expects at each critical token and copied digit of a right answer."""
    logits, text = answer.logits / temperature, answer.text
    probs, sure = logits.softmax(-1), certainty(logits)
    names = dict(copied="copied digit", comma1="last comma", digit1="last digit")
    rows = [["place", "right character", "likeliest", "certainty", f"weight at alpha {alpha:g}"]]
    places = data.critical_positions(answer.a, answer.b, n_digits)
    for line, operand, name in sorted(places, key=places.get):
        i = places[line, operand, name]
        best = int(probs[i].argmax())
        rows.append([f"line {line}, operand {operand}: {names.get(name, name)}",
                     f"{text[i]}  {probs[i, data.VOCAB.index(text[i])]:.1%}",
                     f"{data.VOCAB[best]!r:<5}{probs[i, best]:.1%}",
                     f"{sure[i]:.3f}", f"{sure[i] ** alpha:.3f}"])
    return table(*rows) if places else f"none: no number has more than {n_digits} digits"


def answer(args):
    """What one or two models write for one problem, and what they expect at critical tokens."""
    paths = [word for word in args.words if any(map(str.isalpha, word))]  # no problem has a letter
    problem = " ".join(word for word in args.words if word not in paths)
    if len(paths) not in (1, 2):
        stop(f"name one or two checkpoints and a problem like 123456+70, not {len(paths)} "
             "checkpoints")
    if not problem:
        stop(f"there is no problem in {' '.join(args.words)!r}; write one like 123456+70")
    columns = {}
    for when, path in zip(("before: ", "after: ") if len(paths) == 2 else ("",), paths):
        model, facts = load_checkpoint(path, args.device)
        a, b = parse_problem(problem, facts["task"])
        n = facts["digits"]
        check_fits(path, model, len(data.right_text(a, b)))
        [correct], [written] = solve_problems(model, [(a, b)], n)
        [right] = read_answers(model, [(a, b)], [data.right_text(a, b)], n)
        lines = answer_lines(written, args.temperature)
        columns[when + path] = [lines]
        print(f"{when}{path}\n{answer_text(lines)}\nThe result is "
              f"{'right' if correct else 'wrong'}. After the right text, at temperature "
              f"{args.temperature:g}, the model expects:\n\n"
              f"{place_table(right, n, args.temperature, args.alpha)}\n")
    save_figure(draw_answers(columns, args.temperature), args.out, "answer.png")


# ------------------------------------------------------------------ tokens
def first_wrong(answers, correct, temperature):
    """{class of the first wrong token: answers that go wrong there, failures (those with a wrong
    result), certainty (the mean at these tokens; None of none)}.
    """
    found = {name: [] for name in CLASSES}
    for answer, right in zip(answers, correct):
        if answer.error < len(answer.text):
            sure = certainty(answer.logits[answer.error] / temperature).item()
            found[answer.classes[answer.error]].append((sure, not right))
    return {name: dict(answers=len(x), failures=sum(int(failed) for _, failed in x),
                       certainty=float(np.mean([sure for sure, _ in x])) if x else None)
            for name, x in found.items()}


def unsure_tokens(answers, temperature):
    """Of the tokens of right answers: how many are critical tokens or copied digits, how many have
    a certainty below 0.9, and how many both -> {"critical", "unsure", "both"}.
    """
    counts = np.zeros(3, int)
    for answer in answers:
        critical = answer.classes[answer.start :] != "elsewhere"
        unsure = certainty(answer.logits[answer.start :] / temperature).numpy() < 0.9
        counts += critical.sum(), unsure.sum(), (critical & unsure).sum()
    return dict(zip(("critical", "unsure", "both"), counts.tolist()))


# In tokens.json: what the certainty at critical tokens is compared with.
TABLE_1 = dict(table_1="all others", table_1_reached="those up to the first error")


def paper_table_1(answers, temperature, whole=True):
    """The paper's Table 1: certainty at critical tokens minus that at all others (None of none).

    Of each critical token that an answer reaches without an error: its certainty minus the mean of
    the answer's other tokens, of the whole answer or (not `whole`) of those up to the first error.
    Means over an answer's tokens, then over the answers.
    """
    differences = []
    for answer in answers:
        sure = certainty(answer.logits[answer.start :] / temperature).numpy()  # (answer tokens,)
        is_reached = np.arange(answer.start, len(answer.text)) <= answer.error
        critical = is_reached & (answer.classes[answer.start :] == "critical token")
        counted = is_reached | whole
        others = (sure[counted].sum() - sure) / max(1, counted.sum() - 1)
        if critical.any():
            differences.append((sure - others)[critical].mean())
    return float(np.mean(differences)) if differences else None


def share(k, n):
    """"5 of 8: 62%"."""
    return f"{k} of {n}: {k / n:.0%}" if n else "0 of 0"


def tokens_text(models):
    """What the tokens.json of one or more models say: sums of counts, means over models."""
    def mean(values, form):
        return with_interval([x for x in values if x is not None], form)

    rows = [["first wrong token", "of the failures", "with a wrong result", "certainty there"]]
    n_failures = sum(x["first_wrong"][name]["failures"] for x in models for name in CLASSES)
    for name in CLASSES:
        found = [x["first_wrong"][name] for x in models]
        n_answers, n_failed = (sum(x[key] for x in found) for key in ("answers", "failures"))
        rows.append([name, share(n_failed, n_failures), share(n_failed, n_answers),
                     mean([x["certainty"] for x in found], ".3f")])
    critical, unsure, both = (sum(x["right_answers"][key] for x in models)
                              for key in ("critical", "unsure", "both"))
    temperatures = list(models[0]["table_1"])
    paper = table(["critical tokens minus, at temperature", *temperatures], *(
        [others, *(mean([x[name][t] for x in models], "+.3f") for t in temperatures)]
        for name, others in TABLE_1.items() if name in models[0]))
    return (f"{table(*rows)}\n\nCertainties are at temperature {models[0]['temperature']:g}, "
            "means over a model's first wrong tokens, then\nover models. In right answers, of the "
            f"critical tokens and copied digits, {share(both, critical)}\nhave a certainty below "
            f"0.9. Of all tokens below 0.9, {share(both, unsure)} are\nsuch tokens.\n\n"
            "The paper's Table 1 (there -0.33, -0.21, -0.13 for N = 3, 5, 7): means over the "
            "critical\ntokens of an answer, then over at most 50 greedy answers, then over models:"
            f"\n\n{paper}\n")


def tokens(args):
    """Where a model goes wrong, and how sure it is: tokens.json, tokens.png and tables."""
    model, facts = load_checkpoint(args.checkpoint, args.device)
    n, long = facts["digits"], facts["digits"] + args.extra_digits
    check_fits(args.checkpoint, model, data.max_length(long, facts["task"]))
    pairs = data.sample_problems(args.problems, long, "varying", 1, facts["task"])
    correct, answers = solve_problems(model, pairs, n)
    right = read_answers(model, pairs, [data.right_text(a, b) for a, b in pairs], n)
    contents = dict(
        digits=n, extra_digits=args.extra_digits, temperature=args.temperature,
        problems=len(pairs), right=int(correct.sum()),
        first_wrong=first_wrong(answers, correct, args.temperature),
        right_answers=unsure_tokens(right, args.temperature),
        table_1={str(t): paper_table_1(answers[:50], t) for t in (1, 2, 4)},
        table_1_reached={str(t): paper_table_1(answers[:50], t, False) for t in (1, 2, 4)})
    text = json.dumps(contents, indent=1, allow_nan=False)
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "tokens.json", lambda file: file.write(text.encode()))

    shown = np.argsort(correct, kind="stable")[: args.show]  # failures first
    columns = {f"before: {args.checkpoint}": [answers[i] for i in shown]}
    if args.after:
        model, facts = load_checkpoint(args.after, args.device)
        check_fits(args.after, model, data.max_length(long, facts["task"]))
        columns[f"after: {args.after}"] = solve_problems(model, [pairs[i] for i in shown],
                                                         n)[1]
    columns = {name: [answer_lines(x, args.temperature) for x in written]
               for name, written in columns.items()}
    save_figure(draw_answers(columns, args.temperature), args.out, "tokens.png")
    for name, written in columns.items():
        print("\n\n".join([f"\n{name}", *map(answer_text, written)]))
    print(f"\n{correct.sum()} of {len(pairs)} problems with one or two {long}-digit numbers are "
          f"right, greedy.\n\n{tokens_text([contents])}")


# ------------------------------------------------------------------ explain
def explain(args):
    """Let a run, as it stands, answer its next problems, and explain one of the answers."""
    import ppo  # no other verb needs it
    settings = read_file(args.run_folder / "settings.json", parse_settings, AGAIN)
    names = sorted(vars(ppo.parse_args([])).keys() & settings.keys())
    options = ppo.parse_args([f"--{name}={settings[name]}" for name in names])
    path = args.checkpoint or options.checkpoint
    reference, facts = load_checkpoint(path, args.device)
    reference.requires_grad_(False)
    if ppo.pretrained_name(reference, facts) != settings.get("pretrained"):
        stop(f"{args.run_folder} is no run of ppo.py from {path}; name its model with --checkpoint")
    longest = facts["digits"] + options.extra_digits
    check_fits(path, reference, data.max_length(longest, facts["task"]))
    policy, step = copy.deepcopy(reference), 0
    value_head = ppo.ValueHead(policy.config.n_embd).to(args.device)

    def load_state(path):
        state = load(path)
        load_parts(state, dict(policy=policy, value_head=value_head))
        if state["settings"] != settings:
            raise ValueError("it is of other settings")
        return int(state["step"])

    if (args.run_folder / "state.pt").exists():
        step = read_file(args.run_folder / "state.pt", load_state, AGAIN)
    else:
        print("nothing is saved so far: the policy is still the reference, and k2 is 0")
    pairs, generator = ppo.draw_problems(options, facts, step + 1, args.device)
    for model in (reference, policy):
        read_logits(model, [data.right_text(*pairs[0])])  # stops if they are not finite
    batch = ppo.rollout(policy, value_head, reference, pairs, facts["digits"], options, generator)
    batch["advantages"] = ppo.normalize(batch["advantages"], batch["mask"])
    ids = torch.cat([batch["states"][:, :1], batch["actions"]], 1).tolist()
    texts = [data.decode(row[: n + 1]) for row, n in zip(ids, batch["n_actions"].tolist())]
    critical = ppo.known_critical(texts, pairs, facts["digits"], batch["mask"])
    print(explain_text(batch, pairs, texts, critical, options))


def explain_text(batch, pairs, texts, critical, options):
    """One answer of a rollout, token by token, and what the reference expected at one token: the
    right answer with the largest k2 at a critical token or copied digit of weight 1/2 or less.

    critical (B, T): 1.0 at critical tokens and copied digits; options: alpha and kl_coef.
    """
    J = certainty(batch["ref_logits"])  # (B, T), as all that follows
    k2 = prioritized_kl(batch["old_logp"], batch["ref_logp"], 1)
    penalty = prioritized_kl(batch["old_logp"], batch["ref_logp"], batch["weight"])
    loss = -batch["advantages"] + options.kl_coef * penalty  # the ratio is 1; no entropy bonus
    # Before the first update every k2 is 0: then the least certain critical token decides.
    freed = (k2 * (batch["weight"] <= 0.5) + 1e-6 * (1 - J)) * critical
    wrong = batch["success"] < batch["success"].max()  # the wrong answers, if one is right
    i = int(freed.amax(1).masked_fill(wrong, -1).argmax())
    (a, b), text, at = pairs[i], texts[i], int(freed[i].argmax())

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
    probs, V, sure = logits.softmax(-1), len(logits), J[i, at].item()
    rows = [["token", "logit", "p", "-p log p"]]
    for token in probs.argsort(descending=True)[:4].tolist():
        p = probs[token].item()
        rows.append([repr(data.VOCAB[token]), f"{logits[token]:.3f}", f"{p:.4f}",
                     f"{-p * math.log(p):.4f}"])
    lines += ["", f"the reference at {data.place(a, b, at + 1)} (written: {text[at + 1]!r})",
              table(*rows)]
    lines.append(f"entropy H of all {V}: {(1 - sure) * math.log(V):.4f}; J = 1 - H / log {V} = "
                 f"{sure:.4f}; J^{options.alpha:g} = {sure**options.alpha:.4f}")
    return "\n".join(lines)


# ------------------------------------------------------------------ curves
def curve(runs, name):
    """A column of log.csv, in % where it is a share -> x (R,), points (R, 3): the mean over models
    and its 95% interval (low, high) in the rows where all runs have it.
    """
    x = min((run.log["episodes" if "episodes" in run.log else "step"] for run in runs), key=len)
    means = model_means(runs, lambda run: run.log[name][: len(x)])
    columns = np.array(list(means.values())).T  # (rows, models)
    known = ~np.isnan(columns).any(1)
    points = np.array([interval(values) for values in columns[known]]).reshape(-1, 3)
    return x[known], points * (100 if is_share(name) else 1)


def draw_curves(groups, names):
    """Learning curves of columns of log.csv -> figure: a panel a column, a curve a setting. Bands
    would hide each other, so the 95% intervals stand at the curves' ends, side by side.
    """
    logs = [run.log for run in all_runs(groups)]
    names = [name for name in names if all(name in log for log in logs)]
    if not names or len({"episodes" in log for log in logs}) > 1:
        stop("these runs have not all logged what is to be shown")
    width, height = (6.5, 3.8) if len(names) == 1 else (3.6, 2.6)
    figure, axes = new_figure(len(names), width, height, models_in_words(groups))
    for axis, name in zip(axes, names):
        axis.set_title(title(name, groups), fontsize=10)
        axis.set_xlabel("answers in training" if "episodes" in logs[0] else "training step")
        for i, (label, runs) in enumerate(groups.items()):
            (x, points), style = curve(runs, name), look(label)
            axis.plot(x, points[:, 0], **style, label=label, markersize=5,
                      markevery=1 + len(x) // 20, clip_on=False)
            for end, (_, low, high) in zip(x[-1:], points[-1:]):
                beside = end * (1.02 + 0.015 * i)
                axis.plot([beside] * 2, [low, high], color=style["color"], lw=2.5)
        if is_share(name):
            axis.set_ylim(0, 100)
    add_legend(figure)
    return figure


def curves(args):
    """Save the learning curves of runs."""
    groups = legible(group_runs(load_runs(args.runs)), MOST_CURVES)
    save_figure(draw_curves(groups, args.show), args.out, "curves.png")


# ------------------------------------------------------------------ compare
OUTCOMES = ("nk_identical", "sampled_mix", "n_identical")


def outcomes(runs, name, when="after"):
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

    means = model_means(runs, result)
    return {} if np.isnan(list(means.values())).any() else means


def paired_differences(values, first):
    """{pre-trained model: value} of two settings -> [value - first's] of the models in both."""
    return [values[model] - first[model] for model in values if model in first]


def verdict(differences):
    """"higher: +2.0 [+0.5, +3.5], p = 0.031"; without the word if the interval holds 0."""
    text = with_interval(differences, "+.1f")
    if len(differences) < 2:
        return text
    _, low, high = interval(differences)
    if low > 0:
        text = f"higher: {text}"
    if high < 0:
        text = f"lower: {text}"
    return f"{text}, p = {sign_flip_p(differences):.3f}"


def compare_text(groups):
    """The results of each setting, and how far each is from the first one on the same models."""
    first, *others = groups
    everything = all_runs(groups)
    names = [name for name in (*OUTCOMES, "kl")  # what no run has measured is left out
             if any(outcomes(runs, name) for runs in groups.values())]
    titles = [title(name, groups) for name in names]

    def row(label, runs, when="after"):
        cells = [with_interval(list(outcomes(runs, name, when).values()),
                               ".4f" if name == "kl" else ".1f") for name in names]
        return [f"{label} ({n_models(runs)})", *cells]

    text = table(["setting (models)", *titles], row("before", everything, "before"),
                 *(row(label, runs) for label, runs in groups.items()))
    if not others or n_models(everything) == 1:
        return text
    rows = []
    for label in others:
        points = [paired_differences(outcomes(groups[label], name), outcomes(groups[first], name))
                  for name in names[:-1]]
        rows.append([f"{label} ({len(points[0])})", *map(verdict, points)])
    return f"{text}\n\n{table([f'minus {first} (models)', *titles[:-1]], *rows)}"


def draw_compare(groups):
    """What was learned and what was kept, a row a setting -> figure. A dashed line goes through the
    mean of the first setting. Intervals are cut at 0 and 100%.
    """
    first = next(iter(groups))
    figure, axes = new_figure(
        2, 4.6, 0.36 * len(groups) + 0.9,
        f"large: {models_in_words(groups)}; small: each model; dashed: {first}")
    for axis, word, name in zip(axes, ("learned", "kept"), ("nk_identical", "n_identical")):
        for y, (label, runs) in enumerate(groups.items()):
            values, style = list(outcomes(runs, name).values()), look(label)
            if not values:
                continue
            mean, *ends = interval(values)
            axis.plot(values, [y + 0.3] * len(values), **style, ls="", ms=3, alpha=0.5,
                      clip_on=False)
            axis.plot(np.clip(ends, 0, 100), [y, y], color=style["color"], lw=2.5)
            axis.plot(mean, y, **style, ms=9, markeredgecolor="white", clip_on=False)
            axis.text(mean, y - 0.22, f"{mean:.0f}", ha="center", va="bottom", size=8,
                      bbox=dict(facecolor="white", edgecolor="none", pad=0.5))
            if label == first:
                axis.axvline(mean, color=style["color"], linestyle="--", lw=1)
        axis.set_yticks(range(len(groups)), groups if word == "learned" else [])
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.set_title(f"{word}: {title(name, groups)}", fontsize=10)
    return figure


def compare(args):
    """Print the results of runs and save them as a picture."""
    groups = group_runs(load_runs(args.runs))
    n = n_models(all_runs(groups))
    if n > 40:
        stop(f"the exact p of {n} models would take too long; compare at most 40")
    text = compare_text(groups)
    if n == 1:
        figure = draw_curves(legible(groups, MOST_CURVES), ["nk_identical"])
    else:
        figure = draw_compare(legible(groups, MOST_ROWS))
    save_figure(figure, args.out, "compare.png")
    print(f"\n{text}\n")
    if n == 1:
        print("One model cannot show which setting is better: from another model it may end the "
              "other way round.\nThe group next to you may have another model; compare takes the "
              "folders of all groups at once.")
    else:
        print("Brackets: 95% interval over pre-trained models. Differences: in points, of the same "
              "models.\nHigher, lower: the interval does not hold 0. p: the exact sign-flip test.")


# ------------------------------------------------------------------ the command line
def main(argv=None):
    ap = argparse.ArgumentParser(description="Tables and pictures from checkpoints and runs.")
    verbs = ap.add_subparsers(dest="verb", required=True)

    def add_verb(function, what):
        verb = verbs.add_parser(function.__name__, help=what, description=what,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        verb.set_defaults(run=function)
        if function != explain:
            verb.add_argument("--out", type=Path, default=Path("out/figures"),
                              help="folder for what it writes")
        if function in (answer, tokens, explain):
            verb.add_argument("--device", type=to_device, default="auto",
                              help="cpu, cuda, mps, or auto")
        if function in (answer, tokens):
            verb.add_argument("--temperature", type=number(float, 0.001, 1000), default=2.0,
                              help="of certainties and probabilities; 2 as in ppo.py")
        if function in (curves, compare):
            verb.add_argument("runs", nargs="+", help="folders of runs, or patterns like out/ppo_*")
        return verb.add_argument

    add = add_verb(answer, "what do one or two models write for one problem?")
    add("words", nargs="+", metavar="word",
        help="one or two checkpoints (before and after fine-tuning), then a problem like 123456+70")
    add("--alpha", type=number(float, 0, 1e6), default=3.0, help="exponent of the weight shown")
    add = add_verb(tokens, "where does a model go wrong, and how sure is it there?")
    add("checkpoint", help="a model.pt of pretrain.py or ppo.py")
    add("--after", help="a second one, whose answers are drawn beside those of the first")
    add("--problems", type=number(int, 1, 2000), default=200, help="held-out problems to solve")
    add("--extra_digits", type=number(int, 0, 1000), default=1, help="k: problems of N+k digits")
    add("--show", type=number(int, 1, 2000), default=3, help="answers to show, failures first")
    add = add_verb(explain, "the penalty of one answer of a run, token by token")
    add("run_folder", type=Path, metavar="run", help="folder of a run of ppo.py")
    add("--checkpoint", help="the model that it began with, if that is elsewhere now")
    add = add_verb(curves, "learning curves of runs")
    add("--show", nargs="+", metavar="column", help="columns of log.csv",
        default="success nk_identical nk_varying n_identical p_critical kl loss".split())
    add_verb(compare, "what was learned and kept in runs, paired by model")
    args = ap.parse_args(argv)
    return run_script(args.run, args, "nothing is lost; the same command starts over")


if __name__ == "__main__":
    sys.exit(main())
