"""Tables and figures from checkpoints and run logs.

    python analyze.py tokens out/pretrain_n5_small_seed0/model.pt     Figure 5 and Table 1: where is the model unsure?
    python analyze.py certainty out/pretrain_n5_small_seed0/model.pt  does it err there?
    python analyze.py errors out/pretrain_n5_small_seed0/model.pt     do failures begin at critical tokens?
    python analyze.py curves out/ppo_alpha0_seed0 out/ppo_alpha3_seed0   learning curves of runs, side by side
    python analyze.py critical, drift                                 the same for critical tokens (Figure 7), for KL and N
    python analyze.py accuracy out/ppo_alpha0_seed0 out/ppo_alpha3_seed0  Tables 4 and 5: what was learned?
    python analyze.py alpha, controls, frontier                       settings over seeds: Figure 6; paired; at what cost
    python analyze.py sweep out/alpha alpha=0,3 pretrain_seed=0,1,2   runs of ppo.py for all combinations
    python analyze.py all                                             all that is made of the logs in assets/runs
    python analyze.py speed                                           how fast is it here, and how fast could it be?

Pictures go to out/figures.
"""
import argparse
import copy
import csv
import glob
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import matplotlib
import numpy as np
import torch

from tqdm import tqdm

import data
import ppo
import pretrain
from kl import certainty
from model import GPT, GPTConfig, PRESETS, generate
from pretrain import UserError, bootstrap, sample_problems, solve, within

matplotlib.use("Agg")  # pictures go to files: no screen is needed
import matplotlib.pyplot as plt


MARKS = [mark + line for mark, line in zip(3 * "osv^DX*P", itertools.cycle(("-", "--", ":")))]  # legible in grey


def save_figure(figure, folder, name, labelled=None, columns=3):
    """Save as folder/name, with a legend below of what the axes `labelled` show."""
    path = os.path.join(folder, name)
    if labelled is not None:
        figure.tight_layout()
        figure.legend(*labelled.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns,
                      frameon=False, fontsize=8)
    try:
        os.makedirs(folder, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another folder with --out") from None
    plt.close(figure)
    print(f"saved {path}")


# --------------------------------------------------------------------------- tokens: Figure 5, Table 1
@torch.no_grad()
def token_certainty(model, text, prompt_len, temperature=1.0):
    """Certainty (len(text),) of the model's distribution at each character of the answer; 1 in the prompt."""
    logits, _ = model(torch.tensor([data.encode(text[:-1])], device=model.lm_head.weight.device))
    return np.concatenate([np.ones(prompt_len), certainty(logits / temperature)[0, prompt_len - 1 :].cpu().numpy()])


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


def answers(args):
    """Let the checkpoint answer problems of N+k digits -> model, N, pairs, correct, texts; and how, in words."""
    if 0 < args.temperature < 1e-3:
        raise UserError(f"--temperature {args.temperature:g} is too low to sample with; give 0 for greedy")
    model, facts = pretrain.load_checkpoint(args.checkpoint, pretrain.get_device(args.device))
    long, task = facts["digits"] + args.extra_digits, facts["task"]
    if data.max_length(long, task) > model.config.block_size:
        raise UserError(f"{long} digits need a block of {data.max_length(long, task)}, {args.checkpoint} has "
                        f"{model.config.block_size}; give fewer --extra_digits")
    pairs = sample_problems(args.problems, long, "varying", args.seed, task)
    correct, texts = solve(model, pairs, args.temperature, args.seed)
    how = "greedy" if args.temperature == 0 else f"sampled at temperature {args.temperature:g}"
    how = f"{correct.mean():.1%} of {len(pairs)} problems of {long} digits right, {how}; pre-trained on 1..{facts['digits']}"
    return model, facts["digits"], pairs, correct, texts, how


def first_wrong(texts, pairs, n_digits):
    """Where each answer first leaves the right one: a list of "critical", "other" or None."""
    where = []
    for text, (a, b) in zip(texts, pairs):
        index = data.first_error(text, a, b)
        critical = index in data.critical_positions(a, b, n_digits).values()
        where.append(None if index is None else "critical" if critical else "other")
    return where


def tokens(args):
    model, n_digits, pairs, correct, texts, how = answers(args)
    certainties = [token_certainty(model, text, len(data.prompt(a, b)), args.temperature or 1.0)
                   for text, (a, b) in zip(texts, pairs)]

    order = np.argsort(correct, kind="stable")[: args.show]  # failures first: they show the most
    titles = [f"{pairs[i][0]}{pairs[i][1]:+}: {'right' if correct[i] else 'wrong'}" for i in order]
    for i, title in zip(order, titles):
        print(f"--- {title}")
        print(in_colour(texts[i], certainties[i]) if sys.stdout.isatty() else texts[i])

    print(f"\n{how}\n\nTable 1: certainty on the token minus the mean certainty on the answer's other tokens [95% interval]")
    for name, values in table_1(texts, pairs, certainties, n_digits).items():
        if values:
            print("  {:<30} {:+.4f} [{:+.4f}, {:+.4f}]".format(name, *bootstrap(values)))

    print("\nWhere the failures first went wrong")
    where = first_wrong(texts, pairs, n_digits)
    for i in np.flatnonzero(~correct):
        (a, b), index = pairs[i], data.first_error(texts[i], *pairs[i])
        sure = f", certainty {certainties[i][index]:.2f}" if index < len(texts[i]) else ""
        print(f"  {a}{b:+}: {data.describe_error(texts[i], a, b)}{sure}{', a critical token' * (where[i] == 'critical')}")
    print(f"  {sum(where[i] == 'critical' for i in np.flatnonzero(~correct))} of {(~correct).sum()} at a critical token")
    save_figure(draw_tokens([texts[i] for i in order], [certainties[i] for i in order], titles), args.out, "tokens.png")


# --------------------------------------------------------------------------- errors
def errors(args):
    """Do failures begin at critical tokens, and does a wrong critical token always end in a failure?"""
    _, n_digits, pairs, correct, texts, how = answers(args)
    where = np.array(first_wrong(texts, pairs, n_digits), dtype=object)
    print(how)
    for what, values in (
        ("of the failures, first wrong at a critical token", where[~correct] == "critical"),
        ("P(answer wrong | a critical token is its first wrong one)", ~correct[where == "critical"]),
        ("P(answer wrong | another token is its first wrong one)", ~correct[where == "other"]),
        ("P(answer wrong | no critical token is its first wrong one)", ~correct[where != "critical"]),
    ):
        if len(values):
            mean, low, high = bootstrap(values)
            print(f"  {what:<60} {mean:6.1%} [{low:.1%}, {high:.1%}]   {values.sum()} of {len(values)}")


# --------------------------------------------------------------------------- certainty
EXPONENTS = (0, 1, 3, 10, 30, 100, 300, 1000)  # the paper's Figure 6


@torch.no_grad()
def certainty_by_place(model, pairs, n_digits, temperature=1.0):
    """Fed the right answers: {place: [(certainty, 1.0 if the most likely token is wrong else 0.0, nats), ...]}.

    A place is data.place's ("line 1, operand 2"), and "critical" for the critical tokens in it. nats is -log of the right
    token's probability: what the KL to the model becomes there for a policy that always writes it.
    """
    places = {}
    for a, b in pairs:
        text, device = data.prompt(a, b) + data.answer(a, b), model.lm_head.weight.device
        ids = torch.tensor([data.encode(text)], device=device)
        logits = model(ids[:, :-1])[0] / temperature
        sure, wrong = certainty(logits)[0].tolist(), (logits.argmax(-1) != ids[:, 1:])[0].float().tolist()
        nats = (-ppo.token_logp(logits, ids[:, 1:]))[0].tolist()
        critical = data.critical_positions(a, b, n_digits).values()
        for index in range(len(data.prompt(a, b)), len(text)):
            places.setdefault(data.place(a, b, index) + ", critical" * (index in critical), []).append(
                (sure[index - 1], wrong[index - 1], nats[index - 1]))
    return places


def show_certainty(args):
    """Where the model is unsure, whether it errs more where it is, and how much of the KL a weight takes away."""
    model, n_digits, pairs, _, _, how = answers(args)
    places = certainty_by_place(model, pairs, n_digits, args.temperature or 1.0)
    print(f"{how}\n\nfed the right answers\n{'place':<30} {'tokens':>7} {'certainty':>10} {'lowest':>8} {'wrong':>7} {'nats':>7}")
    for place, values in sorted(places.items()):
        sure, wrong, nats = np.array(values).T
        print(f"{place:<30} {len(values):7} {sure.mean():10.4f} {sure.min():8.4f} {wrong.mean():7.1%} {nats.mean():7.3f}")
    sure, wrong, nats = np.array([x for values in places.values() for x in values]).T
    print(f"\nA policy that writes them all has a KL of {nats.sum() / len(pairs):.2f} nats an answer to this model. "
          "Of that, weighted by certainty^alpha, is left\nalpha " +
          "".join(f"{alpha:7g}" for alpha in EXPONENTS) + "\n      " +
          "".join(f"{(sure**alpha * nats).sum() / nats.sum():7.0%}" for alpha in EXPONENTS))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for critical, marker in ((False, "o"), (True, "^")):
        chosen = [np.mean(x, 0) for place, x in places.items() if place.endswith("critical") == critical]
        axes[0].scatter([1 - x[0] + 1e-6 for x in chosen], [x[1] for x in chosen], marker=marker,
                        color="0.2" if critical else "0.6", label="critical tokens" if critical else "other tokens")
    axes[0].set(xlabel="1 - mean certainty, a point a place", ylabel="share wrong", xscale="log", ylim=(-0.03, 1.1))
    edges = np.array([0, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1])
    bins = np.clip(np.digitize(sure, edges) - 1, 0, len(edges) - 2)
    for i in np.unique(bins):
        mean, low, high = bootstrap(wrong[bins == i])
        axes[1].errorbar(i, mean, [[mean - low], [high - mean]], fmt="o", color="0.2", capsize=3)
        axes[1].annotate(f"{(bins == i).sum():,}", (i, high), (0, 4), textcoords="offset points", ha="center", fontsize=7)
    axes[1].set_xticks(range(len(edges) - 1), [f"{low:g}\nto {high:g}" for low, high in zip(edges, edges[1:])], fontsize=7)
    axes[1].set(xlabel="certainty (above a point: tokens)", ylabel="share wrong", ylim=(-0.03, 1.1))
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, args.out, "certainty.png")


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


DRIFT = {  # how far the policy has gone, and whether the old skill is still there
    "kl": PANELS["kl"], "greedy_n": PANELS["greedy_n"], "sampled_n": "accuracy on N, sampled (share)",
    "ce_old": PANELS["ce_old"],
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


SEEDS = {"seed", "pretrain_seed", "checkpoint"}  # runs that differ in nothing else are repeats


def group_runs(runs):
    """[(settings, what)] -> {label: [what, ...]}: a group for equal settings but the seeds, labelled by what differs.

    Where more than two settings differ, a label tells only those that are not the first run's; where more than three do,
    that of the first is "the first".
    """
    first, groups = runs[0][0], {}
    if len({str(settings) for settings, _ in runs}) < len(runs):
        raise UserError("two of these runs have the same settings and seeds, so they are no repeats; leave one out")
    names = [x for x in dict.fromkeys(x for settings, _ in runs for x in settings)
             if x not in SEEDS and len({str(settings.get(x)) for settings, _ in runs}) > 1]
    for settings, what in runs:
        told = {x: settings.get(x) for x in names if len(names) < 3 or settings.get(x) != first.get(x)}
        if not told and len(names) == 3:
            told = {x: first.get(x) for x in names}
        label = ", ".join(f"{x} {value:g}" if isinstance(value, float) else f"{x} {value}" for x, value in told.items())
        groups.setdefault(label or ("the first" if names else "all runs"), []).append(what)
    return groups


def units(values):
    """{(model, seed): value} -> [value, ...]: what is resampled for an interval.

    Runs from one pre-trained model are more alike than others, so each model counts once, with the mean over its RL
    seeds; of a single model, each seed does.
    """
    models = {}
    for (model, _), value in values.items():
        models.setdefault(model, []).append(value)
    return list(values.values()) if len(models) == 1 else [np.mean(x, 0) for x in models.values()]


def curves(args):
    runs = [load_run(folder) for folder in args.runs]
    logs = [log for _, log in runs]
    groups = group_runs([(settings, ((settings.get("checkpoint"), settings.get("seed")), log)) for settings, log in runs])
    names = dict(curves=PANELS, critical=CRITICAL, drift=DRIFT)[args.verb]
    panels = [name for name in names if all(name in log and not np.isnan(log[name]).all() for log in logs)]
    if not panels:
        raise UserError("these runs have no column in common to draw; give runs of one script")
    x_name = "episodes" if "episodes" in logs[0] else "step"
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False)
    styles = ["-", "--", ":", "-."]
    for axis, name in zip(axes.flat, panels):
        for i, (label, members) in enumerate(groups.items()):
            x = members[0][1][x_name]
            for _, log in members:
                x = x[np.isin(x, log[x_name][~np.isnan(log[name])])]
            y = {run: log[name][np.isin(log[x_name], x)] for run, log in members}  # (points,) each
            mean, low, high = np.array([bootstrap(values) for values in np.transpose(units(y))]).T  # the band is over models
            axis.plot(x, mean, styles[i % 4], color=f"C{i}", lw=1.5,
                      label=f"{label} ({len(members)} runs)" if len(members) > 1 else label)
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.2, lw=0)
        axis.set(xlabel=x_name, ylim=(0, 1.03) if "share" in names[name] else None)
        axis.set_title(names[name], fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    save_figure(figure, args.out, f"{args.verb}.png", axes.flat[0], columns=2)


# --------------------------------------------------------------------------- accuracy: Tables 4 and 5
def accuracy_rows(runs):
    """[(settings, (tables, log))] -> [(label, runs, [cell, ...], KL)]: a row for equal settings but the seeds.

    A cell is (mean, low, high) in %, its 95% interval over the pre-trained models (see units), or, of a single run, over
    its problems. Where RL began at other accuracies than in the rows above, a row "before" says so.
    """
    rows, began = [], None
    for name, members in group_runs([(settings, ((settings.get("checkpoint"), settings.get("seed")), *what))
                                     for settings, what in runs]).items():
        for when in ("before", "after"):
            tables = {run: tables[when] for run, tables, _ in members if when in tables}
            cells = []
            for cell in next(iter(tables.values()), ()):
                values = units({run: table[cell][0] for run, table in tables.items()})
                cells.append(100 * np.array(bootstrap(values) if len(tables) > 1 else tables[members[0][0]][cell]))
            means = [f"{mean:.1f}" for mean, _, _ in cells]
            if when == "before" and cells and means != began:
                began = means
                rows.append(("before", len(members), cells, ""))
        kl = f"{np.mean([log['kl'][-1] for *_, log in members]):.4f}" if "kl" in members[0][2] else ""
        rows.append((name, len(members), cells, kl))
    return rows


def from_n(cell, n_digits):
    """"varying 6" -> "varying N+1" for N = 5: so runs of different N fit one table."""
    mode, length = cell.split()
    return f"{mode} N+{int(length) - n_digits}".removesuffix("+0")


def load_finished(folders, columns=()):
    """Folders of finished runs, of one script -> [(settings, (tables, log))]; their logs need the columns.

    The tables are those of accuracies.json, their cells named by from_n.
    """
    runs = []
    for folder in dict.fromkeys(folders):
        settings, log = load_run(folder)
        try:
            with open(os.path.join(folder, "accuracies.json")) as f:
                tables = {when: {from_n(cell, settings["digits"]): x for cell, x in table.items()}
                          for when, table in json.load(f).items()}
            if list(tables["after"]) != list(runs[0][1][0]["after"] if runs else tables["after"]):
                raise UserError(f"{folder} has other tables than {folders[0]}; give runs of one script and one k")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder} is not the folder of a finished run ({error}); run its command again") from None
        if not set(columns) <= set(log):
            raise UserError(f"{folder} is not a run of ppo.py: its log has no {', '.join(columns)}; leave it out")
        if "kl" in log and len(log["kl"]) < 2:
            raise UserError(f"{folder} is a run without an iteration: there is nothing to compare; leave it out")
        runs.append((settings, (tables, log)))
    return runs


def accuracy(args):
    runs = load_finished(args.runs)
    names, rows = list(runs[0][1][0]["after"]), accuracy_rows(runs)
    print("| setting | runs | " + " | ".join([*names, "KL"]) + " |\n" + "| --- " * (3 + len(names)) + "|")
    for label, n, cells, kl in rows:
        print(f"| {label} | {n} | " + " | ".join([*map("{0[0]:.1f} [{0[1]:.1f}, {0[2]:.1f}]".format, cells), kl]) + " |")
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3), sharey=True)
    for axis, mode in zip(axes, ("identical", "varying")):  # Figure 2
        chosen = [i for i, name in enumerate(names) if name.startswith(mode)]
        for i, (label, _, cells, _) in enumerate(row for row in rows if row[0] != "before"):
            mean, low, high = np.array([cells[j] for j in chosen]).T
            axis.errorbar(range(len(chosen)), mean, [mean - low, high - mean], fmt=MARKS[i % 24], color=f"C{i}",
                          capsize=2, label=label)
        axis.set_xticks(range(len(chosen)), [names[j].split()[1] for j in chosen])
        axis.set(xlabel=f"digits, {mode}", ylim=(-3, 103))
    axes[0].set(ylabel="accuracy (%)")
    save_figure(figure, args.out, "accuracy.png", axes[0])


# --------------------------------------------------------------------------- alpha, controls: Figure 6
COMPARED = {"identical": "identical N+k", "varying": "varying N+k", "kept": "identical N", "success": "success in training"}


def outcome(tables, log, level=0.8):
    """A run of ppo.py -> {name of COMPARED: measured}, and episodes to the level.

    Success is the area under the curve of the success rate over the iterations: its mean, 0 to 1. The level is one of
    greedy_nk, which is a straight line between evaluations; the episodes are nan if it never gets there.
    """
    known = ~np.isnan(log["greedy_nk"])
    x, y = log["episodes"][known], log["greedy_nk"][known]
    i = int((y >= level).argmax())  # the first, or 0 if there is none
    if y[i] < level:
        episodes = np.nan
    else:
        episodes = x[0] if i == 0 else x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1])
    final = {cell.split()[0]: x[0] for cell, x in tables["after"].items()}  # N+k comes after N
    kept = next(x[0] for cell, x in tables["after"].items() if cell.startswith("identical"))
    return final | dict(kept=kept, success=np.nanmean(log["success"])), episodes


def compare(args):
    """alpha and controls: a table of settings, each against the first, paired by model and seed, and its picture."""
    runs = []
    for settings, (tables, log) in load_finished(args.runs, ("episodes", "greedy_nk", "success")):
        runs.append((settings, ((settings.get("checkpoint"), settings["seed"]), settings["alpha"], *outcome(tables, log))))
    if args.verb == "alpha":
        alike = [settings | dict(alpha=0) | dict.fromkeys(SEEDS) for settings, _ in runs]
        if any(x != alike[0] for x in alike):
            raise UserError("these runs differ in more than alpha and the seeds; use controls, or leave some out")
        runs.sort(key=lambda run: run[1][1])
    print("| setting | runs | " + "".join(f"{name}, % | minus the first's | " for name in COMPARED.values()) +
          "reached 80% | after episodes |\n|" + (4 + 2 * len(COMPARED)) * "---|")
    groups = group_runs(runs)
    first = next(iter(groups.values()))
    shown = {name: [] for name in COMPARED}  # of each setting the mean, low, high
    for label, members in groups.items():
        cells = []
        for name in COMPARED:
            values, firsts = ({run: 100 * measured[name] for run, _, measured, _ in these} for these in (members, first))
            shown[name].append(bootstrap(units(values)))
            cells.append("{:.1f} [{:.1f}, {:.1f}]".format(*shown[name][-1]))
            differences = units({run: values[run] - firsts[run] for run in values if run in firsts})  # paired
            known = members is not first and len(differences) > 1
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*bootstrap(differences)) if known else "")
        episodes = [member[3] for member in members if member[3] == member[3]]
        cells += [f"{len(episodes)} of {len(members)}", f"{np.mean(episodes):,.0f}" if episodes else ""]
        print(f"| {label} | {len(members)} | " + " | ".join(cells) + " |")
    figure, axis = plt.subplots(figsize=(4.5, 3.2) if args.verb == "alpha" else (6.5, 0.5 * len(groups) + 1))
    for i, (name, means) in enumerate(shown.items()):
        mean, low, high = np.array(means).T
        if args.verb == "alpha":
            axis.errorbar([members[0][1] for members in groups.values()], mean, [mean - low, high - mean],
                          fmt=("o-", "s--", "^:", "v-.")[i], capsize=3, label=COMPARED[name])
        else:
            axis.barh(np.arange(len(groups)) + 0.2 * (i - 1.5), mean, 0.2, xerr=[mean - low, high - mean],
                      color=("0.3", "0.55", "0.8", "1.0")[i], edgecolor="0.2", capsize=2, label=COMPARED[name])
    if args.verb == "alpha":
        axis.set_xscale("symlog", linthresh=1)
        axis.set(xlabel="alpha (0 = standard KL)", ylabel="accuracy (%)", ylim=(0, 103))
    else:
        axis.set_yticks(range(len(groups)), groups, fontsize=8)
        axis.margins(y=0.02)
        axis.invert_yaxis()
        axis.set(xlabel="accuracy (%)", xlim=(0, 103))
    save_figure(figure, args.out, f"{args.verb}.png", axis, columns=2)


# --------------------------------------------------------------------------- frontier
COST = {"kl": ".4f", "ce_old": ".5f", "sampled_n": ".2f"}  # column of the log: how its mean is printed


def frontier_points(runs):
    """Finished runs -> {method: {kl_coef: [runs, {column: (mean, low, high)}]}}: what was learned, at what cost.

    The columns are the accuracies on N+k and those of COST, at the end; a method is what settings but kl_coef have in common.
    """
    last = list(runs[0][1][0]["after"])[-1].split()[1]
    groups = group_runs([(settings | dict(kl_coef=None, seed=(settings["seed"], settings["kl_coef"])), (settings, *what))
                         for settings, what in runs])
    points = {method: {} for method in groups}
    for method, members in groups.items():
        for coef in sorted({settings["kl_coef"] for settings, *_ in members}):
            values = {}  # column: {(model, seed): value}
            for settings, tables, log in members:
                if settings["kl_coef"] == coef:
                    columns = {cell: x[0] for cell, x in tables["after"].items() if cell.split()[1] == last}
                    for column, x in (columns | {name: log[name][-1] for name in COST}).items():
                        values.setdefault(column, {})[settings.get("checkpoint"), settings["seed"]] = x
            points[method][coef] = [len(values["kl"]), {column: bootstrap(units(x)) for column, x in values.items()}]
    return points


def frontier(args):
    """What was learned against what it cost: a line a method, a point a coefficient. Coefficient 0 is on all lines."""
    points = frontier_points(load_finished(args.runs, COST))
    none = {0: by_coef[0] for by_coef in points.values() if 0 in by_coef}
    columns = list(next(iter(next(iter(points.values())).values()))[1])
    learned = [column for column in columns if column not in COST]
    print("| setting | kl_coef | runs | " + " | ".join([*learned, "KL", "cross-entropy on 1..N", "sampled N"]) + " |\n" +
          "|---" * (3 + len(columns)) + "|")
    figure, axes = plt.subplots(len(learned), 3, figsize=(10.5, 3 * len(learned)), squeeze=False, sharey="row", sharex="col")
    for i, (method, by_coef) in enumerate(points.items()):
        for coef, (n, point) in by_coef.items():
            print(f"| {method} | {coef:g} | {n} | " + " | ".join(
                "{:{f}} [{:{f}}, {:{f}}]".format(*x, f=COST.get(column, ".3f")) for column, x in point.items()) + " |")
        by_coef = none | by_coef
        for row, column in enumerate(learned):
            for axis, cost in zip(axes[row], COST):
                x, y = (np.array([by_coef[coef][1][name] for coef in sorted(by_coef)]).T for name in (cost, column))
                axis.errorbar(x[0], y[0], abs(y[1:] - y[0]), abs(x[1:] - x[0]), MARKS[i % 24], color=f"C{i}",
                              elinewidth=0.5, markeredgecolor="0.2", label=method)
                for coef, at in zip(sorted(by_coef), zip(x[0], y[0])):
                    axis.annotate(f"{coef:g}", at, (4, 4), textcoords="offset points", fontsize=7)
    for cost, axis in zip(COST, axes[-1]):
        axis.set(xlabel=DRIFT[cost], xscale="linear" if cost == "sampled_n" else "log")
        axis.tick_params(axis="x", which="both", labelsize=7)
    for column, axis in zip(learned, axes[:, 0]):
        axis.set(ylabel=f"accuracy, {column} (share)")
    save_figure(figure, args.out, "frontier.png", axes[0, 0])


# --------------------------------------------------------------------------- sweep
def grid(text):
    """An argparse type: "alpha=0,3" -> ("alpha", ["0", "3"])."""
    name, _, values = text.partition("=")
    if name in ("", "out") or not values:  # the folders' names are the sweep's own
        raise argparse.ArgumentTypeError(f"{text!r} is not like alpha=0,3")
    return name, values.split(",")


def count_rows(folder):
    """Rows in the log of a run that may not have begun."""
    try:
        with open(os.path.join(folder, "log.csv")) as f:
            return sum(1 for _ in f) - 1
    except FileNotFoundError:
        return 0


def run_all(script, runs, finished, jobs):
    """Run the script with each of {folder: (options, rows its log will have)}, `jobs` side by side, one thread each.

    Folders that hold the file `finished` are skipped; what a run prints goes to output.txt in its folder. Returns the
    folders of those that failed. Interrupted, it stops its runs; each goes on from there when it is started again.
    """
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    waiting = [folder for folder in runs if not os.path.exists(os.path.join(folder, finished))]
    running, failed = {}, []
    done = sum(count_rows(folder) for folder in runs)
    bar = tqdm(total=sum(rows for _, rows in runs.values()), initial=done, desc=os.path.basename(script), unit="row",
               mininterval=1, dynamic_ncols=True, disable=not waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                pretrain.make_folder(folder)
                with open(os.path.join(folder, "output.txt"), "w") as output:
                    running[folder] = subprocess.Popen([sys.executable, "-u", script, *runs[folder][0]], stdout=output,
                                                       stderr=output, env=os.environ | dict(OMP_NUM_THREADS="1"))
            time.sleep(0.2)
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                failed += [folder] if running.pop(folder).returncode else []
            bar.set_postfix_str(f"{len(running)} running, {len(waiting)} to come, {len(failed)} failed", refresh=False)
            bar.update(sum(count_rows(folder) for folder in runs) - bar.n)
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
            process.wait()
    return [folder for folder in runs if folder in failed]  # in their order, not in that in which they ended


def sweep(args):
    """ppo.py for each combination of the values, and pretrain.py first for the models that they need."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `kill` ends the sweep as Ctrl-C does
    models, runs = {}, {}  # folder: (options, rows of its log)
    for values in itertools.product(*[values for _, values in args.grid]):
        chosen = {name: value for (name, _), value in zip(args.grid, values)}
        folder = "_".join(name + value.replace(os.sep, "-") for name, value in chosen.items())
        folder = os.path.join(args.folder, folder)
        options = [x for name, value in chosen.items() for x in (f"--{name}", value)] + ["--out", folder]
        settings = ppo.parse_args(options)  # a wrong option or value is said now
        if folder in runs:
            raise UserError(f"two of the runs would be in {folder}; give each option and value once")
        runs[folder] = options, settings.iterations + 1
        if os.path.exists(os.path.join(folder, "accuracies.json")):
            for name, value in load_run(folder)[0].items():
                if name != "checkpoint" and getattr(settings, name, None) != value:
                    raise UserError(f"{folder} holds a run with {name} {value}; choose another folder for the sweep")
        elif not settings.checkpoint:
            options = ppo.pretrain_options(settings)
            model = pretrain.parse_args(options)
            models[model.out] = options, math.ceil(model.steps / 100)
    failed = run_all("pretrain.py", models, "model.pt", args.jobs) or run_all("ppo.py", runs, "accuracies.json", args.jobs)
    if failed:
        raise UserError(f"{len(failed)} of the runs failed; {failed[0]}/output.txt says why; the same command takes them up")
    print(f"all {len(runs)} runs are in {args.folder}; compare them: python analyze.py controls {args.folder}/*")


# --------------------------------------------------------------------------- all
ALL = {  # folder of the pictures: (runs under assets/runs, the first is what the others are compared with; what is made of them)
    "pretrain": ("pretrain/*", "accuracy"),
    "settings": ("settings/*", "accuracy"),
    "ratio": ("ratio/*", "accuracy"),
    "no_ratio": ("no_ratio/*", "accuracy"),
    "default": ("default/alpha3_* default/alpha0_* default/none_* default/kl0.05_* default/kl0.03_* default/alpha100_* "
                "default/matched_model*", "controls"),
    "default_curves": ("default/alpha0_* default/alpha3_* default/none_*", "curves drift"),
    "default_all": ("default/*", "accuracy frontier"),
    "places": ("default/alpha3_*seed0 default/matched_alpha3_* default/shuffled_* default/mask_model* default/mask_alpha3_*",
               "controls"),
    "exponents": ("default/alpha*_seed0", "alpha"),
    "temperature_1": ("results/alpha100_* results/alpha0_* results/alpha3_* results/alpha30_* results/alpha300_* "
                      "results/matched_* results/shuffled_* results/none_*", "controls frontier"),
    "temperature_1_curves": ("results/alpha0_* results/alpha3_* results/alpha100_* results/none_*", "curves critical drift"),
    "lr_2e-4": ("mid_lr*/kl0.1_alpha3_* mid_lr*/kl0.03_alpha0_* mid_lr*/kl0.1_mask_* mid_lr/none_*", "controls"),
    "lr_2e-4_all": ("mid_lr/*", "accuracy frontier"),
    "lr_3e-4": ("lr3e-4/kl0.03_alpha3_* lr3e-4/kl0.03_alpha0_* lr3e-4/kl0.1_mask_* lr3e-4/none_*", "controls"),
    "lr_3e-4_all": ("lr3e-4/*", "accuracy frontier"),
    "lr_5e-4": ("high_lr_*/kl0.1_alpha3_* high_lr_*/kl0.1_alpha0_* high_lr_*/kl0.05_* high_lr_t2/kl0.1_mask_* "
                "high_lr_t2/none_*", "controls"),
    "lr_5e-4_all": ("high_lr_t2/*", "accuracy frontier"),
    "lr_5e-4_temperature_1": ("high_lr/kl0.1_alpha100* high_lr/kl0.1_alpha0* high_lr/kl0.3_alpha100* high_lr/kl0.3_alpha0* "
                              "high_lr/none*", "controls drift"),
    "cool": ("cool/*", "controls"),
    "minibatches": ("minibatches/mb2_alpha3_* minibatches/mb2_alpha0_* default/alpha3_*seed0 default/alpha0_*seed0", "controls"),
    "levels": ("levels/*", "accuracy"),
    "level7": ("level7/*", "controls curves"),
    "sizes": ("sizes/narrow_alpha3_* sizes/narrow_alpha0_* sizes/narrow_kl0.05_* sizes/narrow_none_*", "controls"),
    "coarse": ("coarse/*", "accuracy"),
    "pilot": ("pilot/*", "accuracy"),
}


def everything(args):
    """The tables and figures that need no checkpoint, from the runs that the README tells of."""
    for name, (patterns, shown) in ALL.items():
        patterns = [os.path.join(args.runs, pattern) for pattern in patterns.split()]
        runs = [folder for pattern in patterns for folder in sorted(glob.glob(pattern))]
        if not runs:
            raise UserError(f"no runs are {' '.join(patterns)}; give the folder of the README's runs with --runs")
        for verb in shown.split():
            out = ["--out", os.path.join(args.out, name)]
            print("\npython analyze.py", verb, *patterns, *out)
            main([verb, *runs, *out])


# --------------------------------------------------------------------------- speed
def clock(f, device, repeats):
    """Median seconds of f(), after one call to warm up; a GPU is waited for."""
    wait = getattr(torch, device.type).synchronize
    times = []
    for _ in range(repeats + 1):
        wait()
        begun = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


def operations(config, tokens, seen):
    """Floating-point operations of a forward pass of `tokens` tokens that look at `seen` tokens each, on average."""
    C = config.n_embd
    return tokens * (2 * (12 * config.n_layer * C * C + C * config.vocab_size) + 4 * config.n_layer * C * seen)


def product_rate(config, B, T, dtype, device, repeats):
    """Operations a second that the machine reaches in a layer's matrix products, alone, at their own shapes."""
    C, H = config.n_embd, config.n_head
    shapes = [((B * T, C), (C, 3 * C)), ((B * T, C), (C, C)), ((B * T, C), (C, 4 * C)), ((B * T, 4 * C), (4 * C, C)),
              ((B * H, T, C // H), (B * H, C // H, T)), ((B * H, T, T), (B * H, T, C // H))]
    rng = torch.Generator(device).manual_seed(0)  # not ones: a GPU multiplies these faster
    pairs = [[torch.randn(shape, generator=rng, device=device, dtype=dtype) for shape in pair] for pair in shapes]
    seconds = clock(lambda: [a @ b for a, b in pairs], device, 4 * repeats)
    return sum(2 * a.numel() * b.shape[-1] for a, b in pairs) / seconds


class Work:
    """What a run does at one size, on random weights, as methods to be timed."""

    def __init__(self, config, n_digits, batch, device):
        self.device, rng = device, np.random.default_rng(0)
        # At so low a temperature random weights repeat a token for ever: no answer ends early, all take the same time.
        self.args = ppo.parse_args("--temperature 0.001 --lr 0 --value_lr 0".split())
        self.reference = GPT(config, torch.Generator().manual_seed(0)).to(device).requires_grad_(False)
        self.policy = copy.deepcopy(self.reference).requires_grad_(True)
        self.head = ppo.ValueHead(config.n_embd, torch.Generator().manual_seed(0)).to(device)
        self.adam = torch.optim.Adam([*self.policy.parameters(), *self.head.parameters()], lr=0.0)
        self.optimizers = pretrain.make_optimizers(self.policy, 0.0)
        self.batches = list(itertools.islice(pretrain.pretrain_batches(n_digits, 8, config.block_size, 0, device), 8))
        self.pairs = [data.sample_pair(rng, n_digits, "rl") for _ in range(batch)]
        self.prompts = [data.encode(data.prompt(a, b)) for a, b in self.pairs]

    def pretrain(self):
        for batch in self.batches:
            self.policy.zero_grad()
            pretrain.answer_loss(self.policy, *batch).backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()

    @torch.no_grad()
    def prefill(self):
        shortest = min(map(len, self.prompts))
        pretrain.to_sample(self.policy)(torch.tensor([p[:shortest] for p in self.prompts], device=self.device))

    def generate(self, drafts=None):
        self.ids, self.lengths = generate(pretrain.to_sample(self.policy), self.prompts, self.policy.config.block_size,
                                          0.001, drafts=drafts)

    def drafted(self):
        """From drafts that are right: those of its own text."""
        self.generate([row[len(p) : n] for row, p, n in zip(self.ids.tolist(), self.prompts, self.lengths.tolist())])

    @torch.no_grad()
    def without_cache(self):
        """60 tokens for one prompt, twice, the whole text read again for each, as in the paper's code."""
        model, ids = pretrain.to_sample(self.policy), torch.tensor([self.prompts[0], self.prompts[0]], device=self.device)
        for _ in range(60):
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], 1)

    def score(self):
        prompt_len = torch.tensor([len(p) for p in self.prompts], device=self.device)
        self.batch = ppo.score(self.policy, self.head, self.reference, self.pairs, self.ids, prompt_len, self.lengths,
                               self.args, 0)

    def update(self):
        ppo.update(self.policy, self.head, self.adam, self.batch, self.args, torch.Generator().manual_seed(0))

    def plain_step(self):
        """What a user would write first, as nanoGPT does: float32, full rows, Adam's step, which costs what AdamW's does."""
        ids = torch.zeros(16, self.policy.config.block_size, dtype=torch.long, device=self.device)
        self.policy.zero_grad()
        logits, _ = self.policy(ids)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        self.adam.step()


SIZES = [("batch", 16), ("batch", 64), ("batch", 256), ("batch", 512), ("digits", 3), ("digits", 5), ("digits", 7),
         ("digits", 10), ("width", 64), ("width", 128), ("width", 256), ("width", 768)]


def speed(args):
    device, repeats = pretrain.get_device(args.device), args.repeats
    dtype = torch.bfloat16 if pretrain.has_fast_bfloat16(device) else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} CPU threads"
    print(f"{name}, PyTorch {torch.__version__}, {args.preset} preset, N = {args.digits}; medians of {repeats}\n")

    # 1. What the machine can do.
    config = GPTConfig(block_size=data.max_length(args.digits + 1), **PRESETS[args.preset])
    decoding = pretrain.to_sample(GPT(config).to(device)).lm_head.weight.dtype
    large, small, plain = (product_rate(config, *shape, device, repeats)
                           for shape in ((8, 300, dtype), (64, 1, decoding), (8, 300, torch.float32)))
    x, y = torch.ones(2, 2**26, device=device)
    copy_rate = 2 * 4 * 2**26 / clock(lambda: y.copy_(x), device, repeats)
    print(f"matrix products of 8 x 300 tokens, {str(dtype)[6:]:<8} {large / 1e9:10,.0f} GFLOP/s")
    print(f"                   8 x 300 tokens, float32  {plain / 1e9:10,.0f} GFLOP/s")
    print(f"                    64 x 1 tokens, {str(decoding)[6:]:<8} {small / 1e9:10,.0f} GFLOP/s")
    print(f"memory, read and written in a copy         {copy_rate / 1e9:10,.1f} GB/s")

    # 2. The phases of a run, beside the floor: operations at the rate of the products, bytes at that of the copy.
    work = Work(config, args.digits, 64, device)
    seconds = {name: clock(getattr(work, name), device, repeats)
               for name in ("pretrain", "plain_step", "prefill", "generate", "drafted", "without_cache", "score", "update")}
    shortest, T = min(map(len, work.prompts)), work.batch["mask"].shape[1]
    decoded, trained, plain_tokens = 64 * (T - shortest), 64 * T, 16 * config.block_size
    cache_bytes = decoded * (T + shortest) / 2 * 2 * config.n_layer * config.n_embd * torch.finfo(decoding).bits // 8
    forward = operations(config, trained, T / 2) / large
    n = sum(ids.numel() for ids, *_ in work.batches)
    table = [  # phase, tokens, seconds, floor
        ("pre-training, 8 steps", n, seconds["pretrain"],
         sum(3 * operations(config, ids.numel(), ids.shape[1] / 2) for ids, *_ in work.batches) / large),
        ("  plain: float32, full rows, AdamW", plain_tokens, seconds["plain_step"],
         3 * operations(config, plain_tokens, config.block_size / 2) / plain),
        ("rollout: prefill", 64 * shortest, seconds["prefill"],
         operations(config, 64 * shortest, shortest / 2) / large),
        ("rollout: decode", decoded, seconds["generate"] - seconds["prefill"],
         max(operations(config, decoded, (T + shortest) / 2) / small, cache_bytes / copy_rate)),
        ("rollout: score, policy and reference", trained, seconds["score"], 2 * forward),
        ("update: forward and backward", trained, seconds["update"], 3 * forward)]
    iteration = seconds["generate"] + seconds["score"] + seconds["update"]
    print(f"\n{'phase':<38} {'tokens/s':>9} {'seconds':>9} {'floor':>9} {'reached':>8} {'share':>7}")
    for phase, tokens, took, floor in table:
        share = f"{took / iteration:7.0%}" if phase.startswith(("rollout", "update")) else ""
        print(f"{phase:<38} {tokens / took:9,.0f} {took:9.4f} {floor:9.4f} {floor / took:8.0%} {share}".rstrip())
    print("\npre-training tokens/s over the plain step's: "
          f"{n / seconds['pretrain'] / (plain_tokens / seconds['plain_step']):.2f}")
    print("one PPO iteration over (generation + its passes at the rate of the products): "
          f"{iteration / (seconds['generate'] + 5 * forward):.2f}")
    print("generated tokens/s over those of two rows without a cache: "
          f"{decoded / seconds['generate'] / (120 / seconds['without_cache']):.1f}")
    print(f"generation from drafts that are right: {seconds['generate'] / seconds['drafted']:.2f} times as fast as without")
    print(f"peak memory so far {peak_memory(device) / 2**30:.2f} GiB")

    # 3. What a draft saves depends on how much of it the model would write itself.
    if args.checkpoint:
        model, facts = pretrain.load_checkpoint(args.checkpoint, device)
        pairs = sample_problems(64, facts["digits"] + 1, "varying", 1, facts["task"])
        prompts = [data.encode(data.prompt(a, b)) for a, b in pairs]
        print(f"\n64 answers of {args.checkpoint} to problems of {facts['digits'] + 1} digits")
        for temperature in (0, 1.0, 2.0):
            right = solve(model, pairs, temperature)[0].mean()
            helped = clock(lambda: pretrain.write_answers(model, pairs, temperature, None), device, repeats)
            alone = clock(lambda: generate(pretrain.to_sample(model), prompts, model.config.block_size, temperature),
                          device, repeats)
            print(f"  temperature {temperature:g}, {right:.0%} right: {helped:.2f} s with drafts, {alone:.2f} s without: "
                  f"{alone / helped:.2f} times as fast")

    # 4. How it grows.
    print(f"\n{'tokens/s':<16} {'generate':>9} {'update':>9} {'pre-train':>10}")
    for what, value in tqdm(SIZES, desc="sizes", leave=False):
        n_digits = value if what == "digits" else args.digits
        shape = PRESETS[args.preset] | (dict(n_embd=value) if what == "width" else {})
        config = GPTConfig(data.max_length(n_digits + 1), **shape)
        work = Work(config, n_digits, value if what == "batch" else 64, device)
        generating = clock(work.generate, device, 1)
        work.score()
        tokens = work.batch["mask"].numel()
        rates = [tokens / generating, tokens / clock(work.update, device, 1),
                 sum(ids.numel() for ids, *_ in work.batches) / clock(work.pretrain, device, 1)]
        tqdm.write("{:<7} {:<8} {:9,.0f} {:9,.0f} {:10,.0f}".format(what, value, *rates))


def peak_memory(device):
    """The most memory that this process has had, on an NVIDIA GPU if it has one, in bytes; nan where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv=None):
    ap = pretrain.Parser(description="Tables and figures from checkpoints and run logs.")
    verbs = ap.add_subparsers(dest="verb", required=True)

    for name, run, problems, what in (("tokens", tokens, 50, "where is a model unsure? (Figure 5, Table 1)"),
                                      ("errors", errors, 500, "do failures begin at critical tokens, and do these decide?"),
                                      ("certainty", show_certainty, 100, "certainty and errors, place by place")):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("checkpoint", help="a model.pt of pretrain.py or ppo.py")
        verb.add_argument("--problems", type=pretrain.COUNT, default=problems, help="held-out problems to solve")
        verb.add_argument("--extra_digits", type=within(int, 0, 50), default=1, help="k: problems of N+k digits")
        verb.add_argument("--temperature", type=within(float, 0, 1e3), default=0.0,
                          help="of sampling and of certainties; 0 = greedy, with certainties at 1")
        verb.add_argument("--seed", type=pretrain.SEED, default=1, help="of the problems and the sampling")
        verb.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
        verb.set_defaults(run=run)
    verbs.choices["tokens"].add_argument("--show", type=pretrain.COUNT, default=3, help="answers to show, failures first")

    for name, run, what in (
        ("curves", curves, "learning curves; mean and 95%% band where seeds repeat (Figures 3, 4)"),
        ("critical", curves, "probability of six critical tokens over training (Figure 7)"),
        ("drift", curves, "how far the policy goes from the pre-trained model, and what it forgets"),
        ("accuracy", accuracy, "final accuracies of runs, a row a setting (Tables 4, 5, Figure 2)"),
        ("alpha", compare, "final accuracy against alpha, over seeds (Figure 6)"),
        ("controls", compare, "final accuracy of settings, each against the first, over seeds"),
        ("frontier", frontier, "what was learned against what it cost: a line a method, a point a coefficient"),
    ):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("runs", nargs="+", help="folders of runs of one script, finished where final accuracies are asked for")
        verb.set_defaults(run=run)

    verb = verbs.add_parser("sweep", help="many runs of ppo.py: all combinations of settings; goes on where it was")
    verb.add_argument("folder", help="for the runs, each in a folder of its own")
    verb.add_argument("grid", nargs="+", type=grid, metavar="OPTION=VALUE,...", help="such as alpha=0,3 pretrain_seed=0,1,2")
    verb.add_argument("--jobs", type=pretrain.COUNT, default=2, help="runs side by side, of one thread each: one a core")
    verb.set_defaults(run=sweep)

    verb = verbs.add_parser("all", help="the tables and figures that need no checkpoint, from the logs under a folder")
    verb.add_argument("--runs", default="assets/runs", help="the folder that holds them")
    verb.set_defaults(run=everything)

    verb = verbs.add_parser("speed", help="how fast each phase is on this machine, and how fast it could be")
    verb.add_argument("--digits", type=within(int, 1, 10), default=5, help="N")
    verb.add_argument("--preset", choices=PRESETS, default="small", help="model size")
    verb.add_argument("--repeats", type=pretrain.COUNT, default=5, help="of each measurement")
    verb.add_argument("--checkpoint", default="", help="a model.pt: by how much drafts speed up its answers%(default)s")
    verb.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: the fastest there is")
    verb.set_defaults(run=speed)

    for verb in [verbs.choices[name] for name in ("tokens", "certainty", "curves", "critical", "drift", "accuracy", "alpha",
                                              "controls", "frontier", "all")]:
        verb.add_argument("--out", default="out/figures", help="folder for the pictures")
    args = ap.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    pretrain.start(main)
