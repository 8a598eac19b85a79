"""Our own results: assets/runs -> README.md and figures here.  Run: python assets/results/report.py

A setting is shown when its runs from all ten pre-trained models have finished.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ASSETS.parent))
import analyze  # noqa: E402
import ppo  # noqa: E402
from analyze import by_setting, interval, outcomes, save_figure, table, title  # noqa: E402
from pretrain import run_script  # noqa: E402

MODELS = range(10)
ALPHAS = [f"exponent/alpha{alpha}" for alpha in (0, 1, 3, 10, 100, 1000)]
LESS = ["less/alpha0_half", "less/alpha0_quarter", "less/alpha3_half", "less/none"]
PLACES = [f"places/{name}" for name in "matched3 shuffled3 threshold3 oracle matched100".split()]
SECTIONS = [  # figure; question; what others are compared with; settings it needs; more of them
    ("exponent", "Does weighting by certainty^alpha help?", "alpha 0", [ALPHAS[0], ALPHAS[2]],
     ALPHAS),
    ("learning", "How fast is it learned?", "alpha 0", [ALPHAS[0], ALPHAS[2]],
     ["exponent/alpha100", "less/none"]),
    ("less", "More than a smaller coefficient?", "alpha 3",
     [ALPHAS[2], ALPHAS[0], "less/alpha0_half", "less/alpha0_quarter"], ["less/none"]),
    ("half", "And with half the coefficient?", "alpha 0, kl_coef 0.05",
     ["less/alpha0_half", "less/alpha3_half"], []),
    ("places", "Does it matter where the penalty is small?", "alpha 3",
     [ALPHAS[2], *PLACES[:2]], [ALPHAS[0], *PLACES[2:4]]),
    ("places100", "And at alpha 100?", "alpha 100", ["exponent/alpha100", "places/matched100"], []),
    ("kl", "Is it how far the policy moves?", "alpha 0", [ALPHAS[0], ALPHAS[2], *LESS[:2], LESS[3]],
     [*ALPHAS, *LESS, *PLACES]),
    ("high_lr", "And at a learning rate of 5e-4?", "alpha 0", ["high_lr/alpha0", "high_lr/alpha3"],
     ["high_lr/alpha3_twice", "high_lr/none"]),
    ("longer", "And after 60 iterations?", "alpha 0", ["longer/alpha0", "longer/alpha3"],
     ["longer/none"])]


def load_whole(runs, names, left_out):
    """by_setting of the settings whose runs from all models have finished; the other names are
    added to the list left_out.
    """
    found = []
    for name in names:
        folders = [runs / f"{name}_model{m}" for m in MODELS]
        if all((folder / "accuracies.json").exists() for folder in folders):
            found += folders
        else:
            left_out.append(name)
    return by_setting(analyze.load_runs(found)) if found else {}


def command(label, setting):
    """The command that made a setting's runs: its options are what differs from the defaults."""
    [run, *_] = next(iter(setting.values()))
    defaults = vars(ppo.parse_args([]))
    options = [f"--{name} {value}".removesuffix(".0") for name, value in run.settings.items()
               if name != "checkpoint" and value != defaults.get(name, value)]
    parts = run.folder.parts  # ..., "runs", "small", "exponent", "alpha3_model0"
    folder = "/".join(["assets", *parts[parts.index("runs"):]]).split("_model")[0]
    return " ".join(["python ppo.py --checkpoint $model --out", f"{folder}_model$m", *options])


def standard(settings):
    """The settings of the standard penalty at all its coefficients, and no penalty."""
    return [x for label, x in settings.items()
            if label == "no penalty" or label.split(",")[0] == "alpha 0"]


def at_equal_kl(settings):
    """A row a setting: what it learned more than the standard penalty at the same KL: for each
    model, between alpha 0's coefficients and no penalty, linear in log KL; constant beyond them.
    """
    curve = [(outcomes(x, "kl"), outcomes(x, "nk_identical")) for x in standard(settings)]
    rows = [["setting (models)",
             f"{title('nk_identical', settings)}, minus alpha 0 at the same KL"]]
    for label, setting in settings.items():
        if setting not in standard(settings):
            kl, learned, more = outcomes(setting, "kl"), outcomes(setting, "nk_identical"), []
            for model in kl:
                points = sorted((math.log(x[model]), y[model]) for x, y in curve)
                more.append(learned[model] - np.interp(math.log(kl[model]), *zip(*points)))
            rows.append([f"{label} ({len(more)})", analyze.verdict(more)])
    return table(*rows)


def draw_kl(settings):
    """What was learned and kept against the KL: means over models, 95% intervals, three families.
    The standard penalty is a curve, from its largest coefficient down to none.
    """
    figure, axes = analyze.new_figure(2, 5.4, 4, analyze.models_in_words(settings))
    families = {"standard penalty, less and less of it": "alpha 0", "certainty^alpha": "alpha 3",
                "controls": "alpha 3, shuffled"}  # name: the setting whose look it has
    for axis, word, name in zip(axes, ("learned", "kept"), ("nk_identical", "n_identical")):
        points = {family: [] for family in families}
        for label, setting in settings.items():
            x, values = (list(outcomes(setting, what).values()) for what in ("kl", name))
            (mean, low, high), kl = interval(values), np.mean(x)
            is_control = re.search("matched|shuffled|threshold|oracle", label)
            family = list(families)[2 if is_control else 0 if setting in standard(settings) else 1]
            points[family].append((kl, mean))
            axis.plot([kl, kl], np.clip([low, high], 0, 100), color="0.8", lw=1.5, zorder=0)
        for i, (family, example) in enumerate(families.items()):
            axis.plot(*zip(*sorted(points[family])), **analyze.look(example, i), label=family,
                      linestyle="" if i else "-", markersize=7, clip_on=False)
        axis.set_xlim(0, None)
        axis.set(title=f"{word}: {title(name, settings)}", xlabel=title("kl", settings))
        axis.set_ylim(0 if word == "learned" else None, 100)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)
    return figure


def pretrained(runs, out):
    """Where the pre-trained models fail, all of them together."""
    found = analyze.load_runs([str(runs / "pretrained" / f"n5_seed{m}") for m in MODELS])
    tokens = [json.loads((run.folder / "tokens.json").read_text()) for run in found]
    cells = {name: name.replace("identical", "two").replace("varying", "one or two") + "-digit"
             for name in found[0].accuracies["after"]}
    solved = [[run.folder.name, *(f"{100 * run.accuracies['after'][cell]:.1f}" for cell in cells)]
              for run in found]
    save_figure(analyze.draw_curves(by_setting(found), ["nk_varying", "n_identical", "loss"]), out,
                "pretrained.png")
    return ("\n## Where do the pre-trained models fail?\n\n" + analyze.tokens_text(tokens) +
            f"\n% solved by each of them:\n\n{table(['model', *cells.values()], *solved)}\n\n"
            "![The pre-trained models learn](pretrained.png)\n")


def beside(runs, out):
    """The runs of the model twice as wide beside those of the same settings here."""
    narrow, wide = (load_whole(folder, [*ALPHAS, *LESS, *PLACES], [])
                    for folder in (runs, runs / "small"))
    if "alpha 0" not in wide:
        return ""

    def cells(settings, label):
        if label not in settings:
            return ["-", "-"]
        learned = outcomes(settings[label], "nk_identical")
        standard = outcomes(settings.get("alpha 0", {}), "nk_identical")
        more = analyze.paired_differences(learned, standard)
        return [analyze.with_interval(list(learned.values()), ".1f"),
                analyze.with_interval(more, "+.1f")]

    rows = [[label, *cells(narrow, label), *cells(wide, label)] for label in wide]
    save_figure(analyze.draw_compare(wide, "alpha 0"), out, "wide.png")
    return ("\n## Twice the width\n\n" + table(
        [title("nk_identical", wide), "64 wide", "minus alpha 0", "128 wide", "minus alpha 0"],
        *rows) + "\n\n![The model twice as wide](wide.png)\n")


def report(args):
    """Write the page and its figures."""
    text, left_out = (args.runs / "README.md").read_text(encoding="utf-8"), []
    if all((args.runs / f"pretrained/n5_seed{m}/tokens.json").exists() for m in MODELS):
        text += pretrained(args.runs, args.out)
    else:
        left_out.append("Where do the pre-trained models fail?")
    for name, question, first, needed, more in SECTIONS:
        missing = []
        settings = load_whole(args.runs, dict.fromkeys(needed + more), missing)
        if missing:
            left_out.append(f"{question} {', '.join(missing)}")
        if set(missing) & set(needed):
            continue
        draw = dict(learning=lambda: analyze.draw_curves(settings, ["nk_identical"], first),
                    kl=lambda: draw_kl(settings))
        save_figure(draw.get(name, lambda: analyze.draw_compare(settings, first))(), args.out,
                    f"{name}.png")
        text += f"\n## {question}\n\n{analyze.compare_text(settings, first)}\n\n"
        if name == "kl":
            text += at_equal_kl(settings) + "\n\n"
        commands = "\n".join(command(label, setting) for label, setting in settings.items())
        text += f"![{question}]({name}.png)\n\n```\n{commands}\n```\n"
    text += beside(args.runs, args.out)
    if left_out:
        missing = "\n- ".join(["\n## Left out, because not all runs have finished\n", *left_out])
        print(missing)
        text += f"{missing}\n"
    analyze.write_file(args.out / "README.md", lambda file: file.write(text.encode()))


def main(argv=None):
    ap = argparse.ArgumentParser(description="assets/runs -> assets/results/README.md and figures")
    ap.add_argument("--runs", type=Path, default=ASSETS / "runs", help="folder of the runs")
    ap.add_argument("--out", type=Path, default=ASSETS / "results", help="folder for the report")
    return run_script(report, ap.parse_args(argv), "the same command starts over")


if __name__ == "__main__":
    sys.exit(main())
