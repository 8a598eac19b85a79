"""Tables and figures from checkpoints and from the logs of runs.

    python analyze.py tokens assets/pretrained/n5_seed0.pt   where is a model unsure, and wrong?
    python analyze.py curves out/ppo_*                       learning curves
    python analyze.py compare out/ppo_*                      what was learned, paired by model
    python analyze.py report                                 assets/runs -> assets/results/README.md

A run is a folder that pretrain.py or ppo.py wrote. Runs that differ only in their pre-trained model
or seed make one setting. Its figures are means over the pre-trained models, with 95% intervals.
"""
import argparse
import glob
import json
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch.nn.utils.rnn import pad_sequence

import data
import ppo
import pretrain
from kl import certainty
from model import get_device, load_checkpoint, read, stop

ASSETS = Path(__file__).resolve().parent / "assets"
plt.switch_backend("Agg")  # pictures go to files: no screen is needed
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

# ------------------------------------------------------------------ statistics
T_QUANTILES = (  # 97.5% points of Student's t for 1 to 30 degrees of freedom; more count as 30
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042)


def interval(values):
    """Mean and 95% interval by Student's t -> (mean, low, high); of one value (value, nan, nan).

    0, 1, 2: mean 1, standard error 1 / sqrt(3), 2 degrees of freedom: 1 -+ 4.303 / sqrt(3).
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, math.nan, math.nan
    half = T_QUANTILES[min(n - 1, 30) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def share(k, n):
    """k of n and Wilson's 95% interval -> (share, low, high): 5 of 5 is 1 [0.57, 1]."""
    z = 1.96
    centre = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    return k / n, max(0.0, centre - half), min(1.0, centre + half)


def sign_flip_p(differences):
    """Exact two-sided p, if each difference is as likely to have the other sign.

    The share of all 2^n choices of signs whose |sum| is at least the observed one; never below
    2 / 2^n. 1, 2, 3: of the 8 choices +++ and --- reach 6, so p = 0.25.
    """
    sums = np.zeros(1)
    for x in differences:
        sums = np.concatenate([sums + x, sums - x])
    rounding = 1e-9 * np.sum(np.abs(differences))  # equal sums differ by it
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - rounding))


def pair(values, first):
    """{pre-trained model: value} of two settings -> [value - first's value of the same model]."""
    alone = sorted(set(values) ^ set(first))
    if alone:
        stop(f"cannot pair by pre-trained model: {alone[0]} has runs of one setting only")
    return [values[model] - first[model] for model in sorted(values)]


# ------------------------------------------------------------------ runs and settings
RunLog = namedtuple("RunLog", "folder settings log accuracies")


def load_runs(patterns):
    """Folders, or patterns of them, which not every shell expands -> [RunLog]. Empty cells of a log
    are nan; the accuracies are {} if the run is not finished.
    """
    runs = {}
    for pattern in patterns:
        found = glob.glob(pattern)
        if not found:
            stop(f"no folder matches {pattern}")
        found.sort(key=lambda name: re.sub(r"\d+", lambda x: x[0].zfill(9), name))  # 3 before 10
        for folder in map(Path, found):
            settings = json.loads((folder / "settings.json").read_text())
            log = np.genfromtxt(folder / "log.csv", delimiter=",", names=True, ndmin=1)
            final = folder / "accuracies.json"
            accuracies = json.loads(final.read_text()) if final.exists() else {}
            runs[folder] = RunLog(folder, settings, log, accuracies)
    return list(runs.values())


def in_words(settings):
    """The settings that have an effect, but for pre-trained model and seed: ["alpha 3", ...]."""
    words = {name: f"{name} {value}".removesuffix(".0") for name, value in settings.items()}
    words |= dict(seed="", pretrained="", kl_weight=settings.get("kl_weight"))
    if settings.get("kl_coef") == 0:
        words |= dict(alpha="", kl_coef="", kl_weight="no penalty")
    elif words["kl_weight"] == "oracle":
        words["alpha"] = ""
    elif words["kl_weight"] == "certainty":
        words["kl_weight"] = ""
    return [word for word in words.values() if word]


def by_setting(runs):
    """-> {what not all runs have in common: {pre-trained model: [the run of each seed]}}."""
    words, settings = [in_words(run.settings) for run in runs], {}
    for run, own in zip(runs, words):
        label = ", ".join(word for word in own if not all(word in other for other in words))
        model = run.settings.get("pretrained", f"seed {run.settings['seed']}")
        settings.setdefault(label or own[0], {}).setdefault(model, []).append(run)
    return settings


# ------------------------------------------------------------------ tables and figures
def table(*rows):
    """Rows of cells, the first are the titles -> Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    titles, *rows = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    line = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {row} |" for row in (titles, line, *rows))


def with_interval(values, form):
    """"1.0 [-1.5, 3.5]"; of one value "1.0", of none "-"."""
    if len(values) < 2:
        return "".join(f"{x:{form}}" for x in values) or "-"
    return "{:{form}} [{:{form}}, {:{form}}]".format(*interval(values), form=form)


def with_share(k, n):
    """"5 of 5: 100% [57%, 100%]"."""
    return f"{k} of {n}" + (": {:.0%} [{:.0%}, {:.0%}]".format(*share(k, n)) if n else "")


def style(i, n):
    """Colours of rising lightness and different markers: n settings that are legible in grey."""
    return dict(color=plt.get_cmap("viridis")(0.9 * i / max(n - 1, 1)), marker="os^DvPX*<>"[i % 10])


def save_figure(figure, folder, name):
    """Save it, with a legend below of what its first axes show."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=int(figure.get_figwidth() // 3.5), frameon=False, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=120, metadata={"Software": None})
    plt.close(figure)
    print(f"saved {folder / name}")


# ------------------------------------------------------------------ tokens
CLASSES = ("closed early", "copied digit", "elsewhere")
COLOURS = LinearSegmentedColormap.from_list("certainty", ["red", "gold", "white"])


def token_classes(a, b, n_digits):
    """{index: class}; "closed early": the paper's critical tokens; all others are "elsewhere"."""
    return {index: "copied digit" if name == "copied" else "closed early"
            for (_, _, name), index in data.critical_positions(a, b, n_digits).items()}


def read_texts(model, texts, temperature):
    """What the model thinks at each character of n texts -> n arrays (len(text), 3).

    Columns: its certainty before the character; 1 if its first choice is another one; -log p of
    the character in nats, the KL there of a policy that always writes it.
    """
    rows = [torch.tensor(data.encode(text)) for text in texts]
    ids = pad_sequence(rows, batch_first=True).to(model.lm_head.weight.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    logits, actions = read(model, ids, lengths, temperature)[0][:, :-1], ids[:, 1:]
    thoughts = torch.stack([certainty(logits), (logits.argmax(-1) != actions).float(),
                            -ppo.token_logp(logits, actions)], -1).cpu().numpy()
    return [np.insert(x[: len(text) - 1], 0, (1, 0, 0), 0) for x, text in zip(thoughts, texts)]


def in_colour(text, certainties):
    """The text with ANSI background colours by certainty, for a terminal."""
    out = ""
    for char, sure in zip(text, certainties):
        r, g, b = (int(255 * x) for x in COLOURS((sure - 0.6) / 0.4)[:3])
        out += char if sure > 0.99 else f"\033[48;2;{r};{g};{b}m\033[30m{char}\033[0m"
    return out


def draw_tokens(text, certainties):
    """The same as a picture (the paper's Figure 5)."""
    lines, i = text.rstrip().split("\n"), 0
    grid = np.ones((len(lines), max(map(len, lines))))
    figure, axis = plt.subplots(figsize=(0.085 * grid.shape[1] + 1, 0.17 * len(lines)))  # inches
    for row, line in enumerate(lines):
        grid[row, : len(line)] = certainties[i : i + len(line)]
        i += len(line) + 1  # with the line break
        for column, char in enumerate(line):
            axis.text(column, row, char, ha="center", va="center", family="monospace", size=7)
    image = axis.imshow(grid, COLOURS, vmin=0.6, vmax=1, aspect="auto")
    axis.axis("off")
    figure.colorbar(image, fraction=0.02, pad=0.01, label="certainty of the model")
    return figure


def class_table(classes):
    """A row a class, of what tokens.json holds; certainty and relative are lists here."""
    total = sum(x["failures"] for x in classes.values())
    rows = [[name, with_share(x["failures"], total), with_share(x["failures"], x["answers"]),
             with_interval(x["certainty"], ".3f"), with_interval(x["relative"], "+.4f")]
            for name, x in classes.items()]
    return table(["first wrong", "of the failures", "fatal", "certainty there", "Table 1"], *rows)


def tokens(args):
    """Write tokens.png and tokens.json. The json has for each class of tokens: answers, how many
    first go wrong there; failures, how many of these have a wrong result; certainty, the mean at
    the first wrong tokens; relative, the paper's Table 1: of all answers, up to the first error,
    the certainty of the class's tokens minus that of the answer's other tokens.
    """
    # 1. One set of greedy answers.
    model, facts = load_checkpoint(args.checkpoint, get_device(args.device))
    n, long = facts["digits"], facts["digits"] + args.extra_digits
    if data.max_length(long, facts["task"]) > model.config.block_size:
        stop(f"{args.checkpoint} has no positions for {long} digits; give fewer --extra_digits")
    pairs = pretrain.sample_problems(args.problems, long, "varying", 1, facts["task"])
    correct, texts = pretrain.solve(model, pairs)
    solutions = [data.prompt(a, b) + data.answer(a, b) for a, b in pairs]
    read_both = [read_texts(model, x, args.temperature) for x in (texts, solutions)]

    # 2. What the model wrote, up to the first error, and what it thinks of the right answer.
    classes = {name: dict(answers=0, failures=0, certainty=[], relative=[]) for name in CLASSES}
    shown, places, halved = [], {}, 0
    for (a, b), text, right, thoughts, on_right in zip(pairs, texts, correct, *read_both):
        sure = thoughts[:, 0]
        start, known = len(data.prompt(a, b)), token_classes(a, b, n)
        sure[:start] = 1.0  # the prompt is given
        title = f"{a}{b:+}: {data.describe_error(text, a, b)}"
        end = data.first_error(text, a, b)
        if end is not None:
            first = known.get(end, "elsewhere")
            title += f", certainty {sure[end]:.2f}, {first}"
            classes[first]["answers"] += 1
            classes[first]["failures"] += int(not right)
            classes[first]["certainty"].append(float(sure[end]))
            halved += int(not right and sure[end] ** 3 <= 0.5)
        shown.append((right, f"{title}\n{text}\n", [*np.ones(len(title) + 1), *sure, 1.0]))
        answer = sure[start : (end or len(sure)) + 1]
        relative = answer - (answer.sum() - answer) / max(1, len(answer) - 1)
        kinds = np.array([known.get(start + j, "elsewhere") for j in range(len(answer))])
        for name in set(kinds.tolist()):
            classes[name]["relative"].append(float(relative[kinds == name].mean()))
        for j in range(start, len(on_right)):
            places.setdefault((data.place(a, b, j), known.get(j, "")), []).append(on_right[j])

    # 3. Save it and show it.
    shown = sorted(shown, key=lambda x: x[0])[: args.show]  # failures first
    text, sure = "".join(x[1] for x in shown), sum((x[2] for x in shown), [])
    save_figure(draw_tokens(text, sure), args.out, "tokens.png")
    rows = [[*place, str(len(x)), *map("{:.4f}".format, np.mean(x, 0))]
            for place, x in sorted(places.items())]
    means = {name: x | {key: float(np.mean(x[key])) if x[key] else None
                        for key in ("certainty", "relative")} for name, x in classes.items()}
    contents = dict(digits=n, extra_digits=args.extra_digits, temperature=args.temperature,
                    problems=len(pairs), right=int(correct.sum()), classes=means)
    (args.out / "tokens.json").write_text(json.dumps(contents, indent=1))
    print(in_colour(text, sure) if sys.stdout.isatty() else text)
    print(f"{correct.sum()} of {len(pairs)} problems of {long} digits right, greedy\n\n"
          "Where answers first go wrong (closed early: at a critical token)\n"
          f"{class_table(classes)}\n{halved} failures begin at a token that keeps at most half of "
          "its penalty at alpha 3.\n\nEvery place, fed the right answers\n"
          f"{table(['place', 'class', 'tokens', 'certainty', 'wrong', 'nats'], *rows)}")


# ------------------------------------------------------------------ curves
VIEWS = {  # columns of log.csv
    "curves": "success nk_identical nk_varying n_identical p_critical kl loss".split(),
    "critical": "p_l1o1 p_l2o1 p_l3o1 p_l1o2 p_l2o2 p_l3o2 p_copied".split(),  # Figure 7
    "drift": "kl n_identical n_sampled n_nats".split()}
TITLES = dict(nk_identical="identical N+k", nk_varying="varying N+k", n_identical="identical N",
              p_critical="P(right critical token)", kl="KL, nats a token")


def draw_curves(settings, view):
    """Panels of a view, or of one column: mean over models and 95% band of each setting."""
    logs = [run.log for setting in settings.values() for run in sum(setting.values(), [])]
    x_name = "episodes" if "episodes" in logs[0].dtype.names else "step"
    panels = [name for name in VIEWS.get(view, [view]) if all(
        {x_name, name} <= set(log.dtype.names) and not np.isnan(log[name]).all() for log in logs)]
    if not panels:
        stop(f"not all of these runs have logged what --show {view} shows")
    columns, rows = min(3, len(panels)), math.ceil(len(panels) / 3)
    figure = plt.figure(figsize=(3.6 * max(columns, 1.5), 2.7 * rows + 0.6))
    for at, name in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, at, xlabel=x_name, title=TITLES.get(name, name))
        for i, (label, setting) in enumerate(settings.items()):
            x = min((run.log[x_name] for run in sum(setting.values(), [])), key=len)  # unfinished?
            y = [np.mean([run.log[name][: len(x)] for run in same], 0) for same in setting.values()]
            known, look = ~np.isnan(y).any(0), style(i, len(settings))
            mean, low, high = np.transpose([interval(values) for values in np.transpose(y)[known]])
            axis.plot(x[known], mean, **look, markersize=3, markevery=math.ceil(len(mean) / 20),
                      label=f"{label} (models: {len(y)})")
            axis.fill_between(x[known], low, high, color=look["color"], alpha=0.15, lw=0)
    return figure


def curves(args):
    figure = draw_curves(by_setting(load_runs(args.runs)), args.show)
    save_figure(figure, args.out, f"{args.show}.png")


# ------------------------------------------------------------------ compare
OUTCOMES = ("identical N+k", "varying N+k", "identical N")  # learned, learned, kept


def outcomes(setting, name):
    """{pre-trained model: value}: of OUTCOMES, in %; "KL", in the last iteration; or "alpha"."""
    def measure(run):
        if "before" not in run.accuracies:
            stop(f"{run.folder} is not a finished run of ppo.py; the command of a run resumes it")
        n, k = run.settings["digits"], run.settings["extra_digits"]
        cell = name.replace("N+k", str(n + k)).replace("N", str(n))
        others = {"KL": run.log["kl"][-1], "alpha": run.settings["alpha"]}
        return others[name] if name in others else 100 * run.accuracies["after"][cell]
    return {model: np.mean([measure(run) for run in runs]) for model, runs in setting.items()}


def verdict(points):
    """"higher: +2.0 [+0.5, +3.5] points, p = 0.031"; "not told apart" if the interval holds 0."""
    _, low, high = interval(points)
    word = "higher" if low > 0 else "lower"
    if not (low > 0 or high < 0):
        word = "not told apart"
    return f"{word}: {with_interval(points, '+.1f')} points, p = {sign_flip_p(points):.3f}"


def compare_text(settings):
    """A table with a row a setting, then a line on what sets each of them off the first one."""
    first, rows, lines = next(iter(settings)), [], ""
    for label, setting in settings.items():
        solved = [with_interval(list(outcomes(setting, name).values()), ".1f") for name in OUTCOMES]
        kl = with_interval(list(outcomes(setting, "KL").values()), ".4f")
        rows.append([label, str(len(setting)), *solved, kl])
        if label != first:
            learned, kept = (verdict(pair(outcomes(setting, name), outcomes(settings[first], name)))
                             for name in ("identical N+k", "identical N"))
            lines += (f"- {label} against {first} (models: {len(setting)}): "
                      f"identical N+k {learned}; identical N {kept}\n")
    return f"{table(['setting', 'models', *OUTCOMES, 'KL'], *rows)}\n\n{lines}"


def at_equal_kl(settings):
    """A line a setting: what it learned more than the standard penalty at the same KL: for each
    model, between alpha 0's coefficients and no penalty, linear in log KL; constant beyond them.
    """
    text, measured = "", {label: [outcomes(setting, name) for name in ("KL", "identical N+k")]
                          for label, setting in settings.items()}
    standard = [x for label, x in measured.items() if re.match("alpha 0|no penalty", label)]
    for label, (kl, learned) in measured.items():
        if [kl, learned] not in standard:
            curves = {m: sorted((math.log(x[m]), y[m]) for x, y in standard) for m in kl}
            more = [learned[m] - np.interp(math.log(kl[m]), *zip(*curves[m])) for m in kl]
            text += f"- {label} against alpha 0 at the same KL: identical N+k {verdict(more)}\n"
    return text


def draw_compare(settings):
    """OUTCOMES against alpha if only it differs (the paper's Figure 6), else against the KL."""
    x_name, scale = "KL", dict(value="log", subs=[2, 5])
    if all(re.fullmatch(r"alpha \S+", label) for label in settings):
        x_name, scale = "alpha", dict(value="symlog", linthresh=1)
    figure, axes = plt.subplots(1, 3, figsize=(10.8, 3.6))
    for axis, name in zip(axes, OUTCOMES):
        for i, (label, setting) in enumerate(settings.items()):
            x, y = (list(outcomes(setting, what).values()) for what in (x_name, name))
            (mean, low, high), look = interval(y), style(i, len(settings))
            axis.plot(x, y, **look, linestyle="", markersize=3, alpha=0.4)  # models
            axis.errorbar(np.mean(x), mean, [[mean - low], [high - mean]], **look, linestyle="",
                          markeredgecolor="0.2", capsize=3, label=label)
        axis.set_xscale(**scale)
        axis.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axis.set(title=f"{name}, % solved", xlabel=TITLES.get(x_name.lower(), x_name))
    return figure


def compare(args):
    settings = by_setting(load_runs(args.runs))
    text = compare_text(settings)
    save_figure(draw_compare(settings), args.out, "compare.png")
    print(f"\n% solved, and KL in nats a token, [95% interval]; p: exact sign-flip test\n\n{text}")


# ------------------------------------------------------------------ report
SECTIONS = [  # figure; question; runs, the first setting is what others are compared with; view
    ("exponent", "Does weighting by certainty^alpha help?", "exponent/*", ""),
    ("learning", "How fast is it learned?", "*/alpha[03]_m* */alpha100_* less/n*", "nk_identical"),
    ("less", "More than a smaller coefficient?", "exponent/alpha3_* exponent/alpha0_* less/*", ""),
    ("free", "Is a large alpha more than no penalty?", "less/none_* exponent/alpha10*_*", ""),
    ("half", "And with half the coefficient?", "less/alpha0_half_* less/alpha3_half_*", ""),
    ("places3", "Does it matter which tokens are freed?", "exponent/alpha3_* places/*3_*", ""),
    ("places100", "And at alpha 100?", "exponent/alpha100_* places/*100_*", ""),
    ("oracle", "The idea or the detector?", "places/oracle_* exponent/alpha[03]_*", ""),
    ("kl", "Is it how far the policy moves?", "exponent/alpha0_* exponent/* less/* places/*", ""),
    ("high_lr", "Where is a penalty needed? (--lr 5e-4)", "high_lr/*0.1_* high_lr/none_*", ""),
    ("high_lr_less", "And half of it at 5e-4?", "high_lr/alpha3*[04-7] high_lr/*[04-7]", "")]


def command(run):
    """The command that made a setting's runs: its options are what differs from the defaults."""
    defaults = vars(ppo.parse_args([])[1])
    options = [f"--{name} {value}".removesuffix(".0") for name, value in run.settings.items()
               if value != defaults.get(name, value)]
    folder = "assets/runs/" + "/".join(run.folder.parts[-2:]).split("_model")[0]
    return " ".join([f"python ppo.py --checkpoint $model --out {folder}_model$m", *options])


def pretrained(args):
    """Where the pre-trained models fail, all of them together."""
    runs, classes = load_runs([f"{args.runs}/pretrained/*"]), {}
    models = [json.loads((run.folder / "tokens.json").read_text())["classes"] for run in runs]
    for name in CLASSES:
        x = {key: [model[name][key] for model in models if model[name][key] is not None]
             for key in models[0][name]}
        classes[name] = x | dict(answers=sum(x["answers"]), failures=sum(x["failures"]))
    solved = [[run.folder.name, *(f"{100 * x:.1f}" for x in run.accuracies["after"].values())]
              for run in runs]
    save_figure(draw_curves(by_setting(runs), "curves"), args.out, "pretrained.png")
    return (f"\nModels: {len(runs)}.\n\n{class_table(classes)}\n\n% solved by each of them:\n\n"
            f"{table(['model', *runs[0].accuracies['after']], *solved)}\n\n"
            "![pretrained](pretrained.png)\n")


def report(args):
    """assets/runs/README.md, and what the runs in assets/runs say."""
    text = (args.runs / "README.md").read_text() + pretrained(args)
    for name, question, patterns, view in SECTIONS:
        text += f"\n## {question}\n\n"
        settings = by_setting(load_runs([f"{args.runs}/{x}" for x in patterns.split()]))
        figure = draw_curves(settings, view) if view else draw_compare(settings)
        save_figure(figure, args.out, f"{name}.png")
        commands = "\n".join(command(next(iter(x.values()))[0]) for x in settings.values())
        text += f"{compare_text(settings)}{at_equal_kl(settings) if name == 'kl' else ''}\n"
        text += f"![{name}]({name}.png)\n\n```\n{commands}\n```\n"
    (args.out / "README.md").write_text(text)


# ------------------------------------------------------------------ the command line
def main(argv=None):
    ap = argparse.ArgumentParser(description="Tables and figures from checkpoints and runs.")
    verbs = ap.add_subparsers(dest="verb", required=True)
    for run, what in ((tokens, "where is a model unsure, and does it err there?"),
                      (curves, "learning curves: mean over models, 95%% band"),
                      (compare, "what was learned and kept, paired by model"),
                      (report, "all of assets/runs -> assets/results/README.md")):
        verb = verbs.add_parser(run.__name__, help=what,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        verb.set_defaults(run=run)
        out = ASSETS / "results" if run == report else Path("out/figures")
        verb.add_argument("--out", type=Path, default=out, help="folder for what it writes")
        if run in (curves, compare):
            verb.add_argument("runs", nargs="+", help="folders of runs, or patterns (*)")
    add = verbs.choices["tokens"].add_argument
    add("checkpoint", help="a model.pt of pretrain.py or ppo.py")
    add("--problems", type=int, default=200, help="held-out problems to solve")
    add("--extra_digits", type=int, default=1, help="k: problems of N+k digits")
    add("--temperature", type=float, default=2.0, help="of the certainties; 2 as in ppo.py")
    add("--show", type=int, default=3, help="answers to show, failures first")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest")
    add = verbs.choices["curves"].add_argument
    add("--show", default="curves", help="curves, critical, drift, or a column of log.csv")
    verbs.choices["report"].add_argument("--runs", type=Path, default=ASSETS / "runs", help="input")
    args = ap.parse_args(argv)
    if args.run == tokens:
        pretrain.check_range(ap, args, 1, "problems", "show")
        pretrain.check_range(ap, args, 0, "extra_digits")
        pretrain.check_range(ap, args, 0.001, "temperature")
    try:
        args.run(args)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
