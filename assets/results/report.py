"""Our own results: assets/runs -> README.md and figures here.  Run: python assets/results/report.py

A setting is shown when its runs from all ten pre-trained models have finished; the last two
sections, on models of other N, show what has finished.
"""
import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ASSETS.parent))
import analyze  # noqa: E402
import ppo  # noqa: E402
from analyze import group_runs, outcomes, save_figure, table, title  # noqa: E402
from pretrain import run_script  # noqa: E402

MODELS = range(10)
BOTH = ["exponent/alpha0", "exponent/alpha3"]
ALPHAS = [f"exponent/alpha{alpha}" for alpha in (1, 10, 100, 1000)]
LESS = ["less/alpha0_half", "less/alpha0_quarter"]
HALVES = ["less/alpha0_half", "less/alpha3_half"]
DEALT = ["places/matched3", "places/shuffled3"]
FREED = ["places/threshold3", "places/oracle"]
AT_100 = ["exponent/alpha100", "places/matched100"]
SECTIONS = [  # figure; question; what others are compared with; settings it needs; more of them
    ("exponent", "Does weighting by certainty^alpha help?", "alpha 0", BOTH, ALPHAS),
    ("learning", "How fast is it learned?", "alpha 0", BOTH, ["exponent/alpha100", "less/none"]),
    ("less", "More than a smaller coefficient?", "alpha 3", BOTH + LESS, ["less/none"]),
    ("half", "And with half the coefficient?", "alpha 0, kl_coef 0.05", HALVES, []),
    ("places", "Does it matter where the penalty is small?", "alpha 3", ["exponent/alpha3", *DEALT],
     ["exponent/alpha0", *FREED]),
    ("places100", "And at alpha 100?", "alpha 100", AT_100, []),
    ("kl", "Is it how far the policy moves?", "alpha 0", [*BOTH, *LESS, "less/none"],
     [*ALPHAS, *DEALT, *FREED, "less/alpha3_half", "places/matched100"]),
    ("high_lr", "And at a learning rate of 5e-4?", "alpha 0", ["high_lr/alpha0", "high_lr/alpha3"],
     ["high_lr/alpha3_twice", "high_lr/none"]),
    ("longer", "And after 60 iterations?", "alpha 0", ["longer/alpha0", "longer/alpha3"],
     ["longer/none"])]


def is_whole(runs, name):
    """True if the runs of a setting from all models have finished."""
    return all((runs / f"{name}_model{m}" / "accuracies.json").exists() for m in MODELS)


def load_groups(runs, names, first):
    """group_runs of the named settings, the one with the label `first` in front."""
    groups = group_runs(analyze.load_runs(
        [str(runs / f"{name}_model{m}") for name in names for m in MODELS]))
    return {first: groups[first]} | groups


def command(run):
    """The command that made a setting's runs: its options are what differs from the defaults."""
    defaults = vars(ppo.parse_args([]))
    options = [f"--{name} {value}".removesuffix(".0") for name, value in run.settings.items()
               if name != "checkpoint" and value != defaults.get(name, value)]
    folder = "/".join(["out", *run.folder.parts[-2:]]).split("_model")[0]  # out/exponent/alpha3
    return " ".join(["python ppo.py --checkpoint $model --out", f"{folder}_model$m", *options])


def family(label):
    """The family of a setting."""
    if label == "no penalty" or label.split(",")[0] == "alpha 0":
        return "standard penalty, less and less of it"
    is_control = label.split(", ")[-1] in ("matched", "shuffled", "threshold", "oracle")
    return "controls" if is_control else "certainty^alpha"


def at_equal_kl(groups):
    """A row a setting: what it learned more than the standard penalty at the same KL: for each
    model, between alpha 0's coefficients and no penalty, linear in log KL; constant beyond them.
    """
    results = {label: (outcomes(runs, "kl"), outcomes(runs, "nk_identical"))
               for label, runs in groups.items()}
    standard = [x for label, x in results.items() if family(label).startswith("standard")]
    rows = [["setting (models)", f"{title('nk_identical', groups)}, minus alpha 0 at the same KL"]]
    for label, (kl, learned) in results.items():
        if not family(label).startswith("standard"):
            more = []
            for model in kl:
                points = sorted((math.log(x[model]), y[model]) for x, y in standard)
                more.append(learned[model] - np.interp(math.log(kl[model]), *zip(*points)))
            rows.append([f"{label} ({len(more)})", analyze.verdict(more)])
    return table(*rows)


def draw_kl(groups):
    """What was learned against the KL: means over models, 95% intervals. A family has one marker,
    hollow, as no setting has. The standard penalty is a curve, from its largest coefficient down
    to none. Names stand below its points, left of controls, on the intervals of certainty^alpha.
    """
    figure, [axis] = analyze.new_figure(1, 7.5, 5, analyze.models_in_words(groups))
    families = {  # marker, colour and line; where the names of its points stand
        "standard penalty, less and less of it": ("o", "black", "-", (5, -11), "left"),
        "certainty^alpha": ("s", "#2171b5", "", (0, 2), "right"),
        "controls": ("^", "#a63603", "", (-6, -3), "right")}
    for name, (marker, color, line, at, side) in families.items():
        points = []
        for label, runs in groups.items():
            if family(label) == name:
                kl = np.mean(list(outcomes(runs, "kl").values()))
                mean, *ends = analyze.interval(list(outcomes(runs, "nk_identical").values()))
                points.append((kl, mean))
                axis.plot([kl, kl], np.clip(ends, 0, 100), color=color, alpha=0.5, lw=1, zorder=0)
                short = label.removeprefix("alpha 3, " if name == "controls" else "alpha 0, ")
                y = min(ends[1], 95) if name == "certainty^alpha" else mean
                axis.annotate(short, (kl, y), at, textcoords="offset points", ha=side, size=7,
                              color=color)
        if points:
            axis.plot(*zip(*sorted(points)), marker=marker, color=color, ls=line, label=name,
                      markersize=7, markerfacecolor="white")
    axis.set_xlim(0, None)
    axis.set_ylim(0, 100)
    axis.set(title=f"learned: {title('nk_identical', groups)}", xlabel=title("kl", groups))
    analyze.add_legend(figure)
    return figure


def in_words(groups):
    """What was learned, for those who do not see a figure: "...: alpha 0 63, alpha 3 73"."""
    means = [f"{label} {np.mean(list(outcomes(runs, 'nk_identical').values())):.0f}"
             for label, runs in groups.items()]
    return f"{title('nk_identical', groups)}: {', '.join(means)}"


def each_model(groups):
    """What each model starts and ends with -> table."""
    before = outcomes(analyze.all_runs(groups), "nk_identical", "before")
    after = [outcomes(runs, "nk_identical") for runs in groups.values()]
    rows = [[model, *(f"{x[model]:.1f}" for x in (before, *after))] for model in sorted(before)]
    return f"Each model, {title('nk_identical', groups)}:\n\n" + table(
        ["model", "before", *groups], *rows)


def pretrained(runs, out):
    """Where the pre-trained models fail, all of them together."""
    found = analyze.load_runs([str(runs / "pretrained" / f"n5_seed{m}") for m in MODELS])
    tokens = [json.loads((run.folder / "tokens.json").read_text()) for run in found]
    cells = {name: name.replace("identical", "two").replace("varying", "one or two") + "-digit"
             for name in found[0].accuracies["after"]}
    solved = [[run.folder.name, *(f"{100 * run.accuracies['after'][cell]:.1f}" for cell in cells)]
              for run in found]
    columns = ["nk_varying", "n_identical", "loss"]
    save_figure(analyze.draw_curves(group_runs(found), columns), out, "pretrained.png")
    return ("\n## Where do the pre-trained models fail?\n\n" + analyze.tokens_text(tokens) +
            f"\n% solved by each of them:\n\n{table(['model', *cells.values()], *solved)}\n\n"
            "![At the end all models solve problems with two 5-digit numbers, and half of those "
            "with one or two 6-digit numbers](pretrained.png)\n")


# ------------------------------------------------------------------ degrees of pre-training
LENGTHS, SEEDS = (3, 4, 5, 6, 7), range(3)  # N; three models of each
PAPER_TABLE_1 = {3: "-0.33", 5: "-0.21", 7: "-0.13"}


def finished(runs, names):
    """[Record] of those of these runs that are finished."""
    names = [runs / name for name in names if (runs / name / "accuracies.json").exists()]
    return analyze.load_runs(map(str, names)) if names else []


def percent(shares):
    """Shares of models -> "98.7 (99.2, 98.0, 98.8)", the mean, then each; "98.7" of one."""
    values = [f"{100 * share:.1f}" for share in shares]
    if len(values) < 2:
        return values[0] if values else "-"
    return f"{100 * np.mean(shares):.1f} ({', '.join(values)})"


def solved(models, kind, more):
    """The models' accuracies on problems of N + more digits, where they have positions for them."""
    cells = [(run.accuracies["after"], f"{kind} {run.settings['digits'] + more}") for run in models]
    return [after[cell] for after, cell in cells if cell in after]


def draw_degrees(models, found):
    """The paper's Figures 2 and 3: before RL, and learning curves with alpha 0 and with alpha 3."""
    alphas = sorted({alpha for _, k, alpha in found if k == 1})
    figure, (before, *axes) = analyze.new_figure(
        1 + len(alphas), 4.2, 3.2, f"mean of {len(SEEDS)} models of each N, too few for a "
        "useful 95% interval; small: each model")
    for n, of_n in models.items():
        shares = [100 * np.array(solved(of_n, "identical", more)) for more in range(4)]
        shares = [x for x in shares if len(x)]
        style = analyze.look(f"alpha 3, N = {n}")
        before.plot(range(len(shares)), [x.mean() for x in shares], **style, label=f"N = {n}",
                    clip_on=False)
        for more, x in enumerate(shares):
            before.plot([more] * len(x), x, **style, ls="", ms=3, alpha=0.5, clip_on=False)
    before.set_title("before RL: two numbers of N+k digits, %", fontsize=9)
    before.set_xlabel("k, digits more than in pre-training")
    before.set_xticks(range(4))
    for axis, alpha in zip(axes, alphas):
        for n in models:
            if (n, 1, alpha) in found:
                x, points = analyze.curve(found[n, 1, alpha], "nk_identical")
                style = analyze.look(f"alpha 3, N = {n}")
                axis.plot(x, points[:, 0], **style, clip_on=False)
                ends = list(outcomes(found[n, 1, alpha], "nk_identical").values())
                axis.plot([1.03 * x[-1]] * len(ends), ends, **style, ls="", ms=3, alpha=0.5,
                          clip_on=False)
        axis.set_title(f"RL, alpha {alpha}: two numbers of N+1 digits, %", fontsize=9)
        axis.set_xlabel("answers in training")
    for axis in (before, *axes):
        axis.set_ylim(0, 100)
    analyze.add_legend(figure)
    return figure


def failures_row(name, tokens):
    """Cells: a name; of what one or more tokens.json say, the failures and where they begin."""
    counts = [sum(x["first_wrong"][place]["failures"] for x in tokens) for place in analyze.CLASSES]
    n_problems = sum(x["problems"] for x in tokens)
    return [name, analyze.share(sum(counts), n_problems),
            *(analyze.share(count, sum(counts)) for count in counts)]


def before_rl(models):
    """{N, or its name: [Record]} of pre-training -> tables: what they solve, where they fail."""
    titles = ["N (models)", "N digits", "N+1", "N+2", "N+3"]
    two, one_or_two, failures = [titles], [titles], [["N (models)", "failures", *analyze.CLASSES]]
    unsure = [["N (models): critical tokens minus", "the paper's",
               *(f"temperature {t}" for t in "124")]]
    for n, of_n in models.items():
        name = f"{n} ({len(of_n)})"
        two.append([name, *(percent(solved(of_n, "identical", more)) for more in range(4))])
        one_or_two.append([name, *(percent(solved(of_n, "varying", more)) for more in range(4))])

        tokens = [json.loads((run.folder / "tokens.json").read_text()) for run in of_n]
        for key, others in analyze.TABLE_1.items():
            means = [analyze.with_interval([x[key][t] for x in tokens if x[key][t] is not None],
                                           "+.3f") for t in "124"]
            unsure.append([f"{name}: {others}", PAPER_TABLE_1.get(n, "-"), *means])
        failures.append(failures_row(name, tokens))
    return f"""Means over the models of an N, and each model's value. Two numbers of so many digits,
% solved:

{table(*two)}

One or two such numbers:

{table(*one_or_two)}

Certainty, the paper's Table 1, of at most 50 greedy answers to problems with N+1 digits:

{table(*unsure)}

Where failures on problems with N+1 digits begin:

{table(*failures)}
"""


def runs_of_lengths(runs):
    """{(N, k, alpha): [Record]} of the finished runs; N = 5 has positions for 6 digits alone."""
    found = {}
    for n, k, alpha in itertools.product(LENGTHS, (1, 2), (0, 3)):
        folder = f"degrees/n{n}_" if k == 1 else f"degrees/n{n}_k{k}_"
        folder = "exponent/" if (n, k) == (5, 1) else folder
        found[n, k, alpha] = finished(runs, [f"{folder}alpha{alpha}_model{m}" for m in SEEDS])
    return {key: of_key for key, of_key in found.items() if of_key}


def after_rl(found):
    """{(N, k, alpha): [Record]} -> tables: what RL started from and reached, alpha 3 against 0."""
    rows = [["N, k, alpha (models)", "right in training: iteration 1, %", "the last five, %",
             "two N+k digits: before, %", "after, %", "two N digits: after, %"]]
    differences = [["N, k (models)", "two N+k digits", "sampled, training mix", "two N digits"]]
    for (n, k, alpha), of_key in found.items():
        success = [run.log["success"] for run in of_key]
        measured = [[run.accuracies[when][f"identical {digits}"] for run in of_key]
                    for when, digits in (("before", n + k), ("after", n + k), ("after", n))]
        rows.append([f"{n}, {k}, {alpha} ({len(of_key)})", *map(percent, (
            [x[1] for x in success], [x[-5:].mean() for x in success], *measured))])
        if alpha == 3 and (n, k, 0) in found:
            points = [analyze.paired_differences(outcomes(of_key, name),
                                                 outcomes(found[n, k, 0], name))
                      for name in analyze.OUTCOMES]
            differences.append([f"{n}, {k} ({len(points[0])})", *map(analyze.verdict, points)])
    return f"""RL on N+k digits:

{table(*rows)}

Alpha 3 minus alpha 0, in points, paired by model:

{table(*differences)}
"""


def growth(success, last):
    """Right answers in 20 iterations, up to the row `last` of a log, minus those in the 20 before:
    difference of two shares in points, with its normal 95% interval -> "+1.2 [+0.3, +2.1]".
    """
    p = np.array([success[last - 39 : last - 19].mean(), success[last - 19 : last + 1].mean()])
    n_answers = 20 * 64  # in each of the two
    half = 1.96 * math.sqrt((p * (1 - p)).sum() / n_answers)
    low, mean, high = 100 * (p[1] - p[0] + half * np.array([-1, 0, 1]))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def plateaus(runs, out):
    """RL for 100 iterations: does it level off, what is left, and what is still known?"""
    names = [f"plateaus/n7_k2_alpha{alpha}_model0" for alpha in (0, 3)]
    groups = group_runs(finished(runs, names))
    columns = ["nk_varying", "nk_identical", "n_identical"]
    save_figure(analyze.draw_curves(groups, columns), out, "plateaus.png")
    rows = [["iterations", "right in training, %", "minus the 20 before",
             *(title(name, groups) for name in columns)]]
    folders = {"before RL": runs / "plateaus/n7_k2_before"}
    for label, [run] in groups.items():
        success = run.log["success"]
        for last in range(20, len(success), 20):
            rows.append([f"{label}: {last - 19} to {last}",
                         f"{100 * success[last - 19 : last + 1].mean():.1f}",
                         growth(success, last) if last > 20 else "-",
                         *(f"{100 * run.log[name][last]:.1f}" for name in columns)])
        folders[label] = run.folder
    failures = [["N = 7, 9 digits", "failures", *analyze.CLASSES]]
    for label, folder in folders.items():
        failures.append(failures_row(label, [json.loads((folder / "tokens.json").read_text())]))
    commands = "\n".join(command(run) for [run] in groups.values())
    return f"""
## Does RL level off?

One model of N = 7, N+2 = 9 digits, 100 iterations. Right in training: of 1,280 answers sampled in
20 iterations; their growth has a 95% interval over answers, not over models. The other columns are
of the last of the 20 iterations, of 64 problems, after the 100th of 250:

{table(*rows)}

Where the failures begin, of 250 problems with one or two 9-digit numbers, greedy
(`python analyze.py tokens $run/model.pt --problems 250 --extra_digits 2`; the runs' models ship):

{table(*failures)}

![Over 100 iterations one or two 9-digit numbers rise and level off, higher with alpha 3; two
9-digit numbers stay below 20%, two 7-digit numbers above 90%](plateaus.png)

```
{commands}
```
""".replace("$model", "assets/pretrained/n7_seed0.pt").replace("_model$m", "_model0")


def degrees(runs, out):
    """What pre-training on more digits changes: before RL, and for RL."""
    models = {n: finished(runs, [f"pretrained/n{n}_seed{m}" for m in SEEDS]) for n in LENGTHS}
    control = finished(runs, [f"tried/n5_positions8_seed{m}" for m in SEEDS])
    models = {n: of_n for n, of_n in models.items() if of_n}
    found = runs_of_lengths(runs)
    save_figure(draw_degrees(models, found), out, "degrees.png")
    if control:
        models["5, positions for 8 digits"] = control
    commands = "\n".join(
        command(of_key[0]).replace("$model", f"assets/pretrained/n{n}_seed$m.pt")
        for (n, _, _), of_key in found.items())
    return f"""
## What does the degree of pre-training leave for RL?

{before_rl(models)}
{after_rl(found)}
![Left, before RL: with one digit more, N = 7 solves half, N = 3 and 4 nothing. Middle and right,
RL: N = 6 and 7 start and end highest, N = 4 stays low, N = 3 at 0](degrees.png)

The models are in assets/pretrained; those of N = 3, 4, 6 and 7, and the control, were made by
`python pretrain.py --digits $N --extra_digits 3 --seed $m`, certainties and failures measured by
`python analyze.py tokens assets/pretrained/n${{N}}_seed$m.pt --problems 250`.

```
{commands}
```
"""


def report(args):
    """Write the page and its figures."""
    text, left_out = (args.runs / "README.md").read_text(encoding="utf-8"), []
    if all((args.runs / f"pretrained/n5_seed{m}/tokens.json").exists() for m in MODELS):
        text += pretrained(args.runs, args.out)
    else:
        left_out.append("Where do the pre-trained models fail?")
    for name, question, first, needed, more in SECTIONS:
        missing = [setting for setting in needed + more if not is_whole(args.runs, setting)]
        if missing:
            left_out.append(f"{question} {', '.join(missing)}")
        if set(missing) & set(needed):
            continue
        groups = load_groups(args.runs, [x for x in needed + more if x not in missing], first)
        if name == "learning":
            figure = analyze.draw_curves(groups, ["nk_identical"])
        elif name == "kl":
            figure = draw_kl(groups)
        else:
            figure = analyze.draw_compare(groups)
        save_figure(figure, args.out, f"{name}.png")
        text += f"\n## {question}\n\n{analyze.compare_text(groups)}\n\n"
        if name == "exponent":
            text += each_model({label: groups[label] for label in ("alpha 0", "alpha 3")}) + "\n\n"
        if name == "kl":
            text += at_equal_kl(groups) + "\n\n"
        commands = "\n".join(command(runs[0]) for runs in groups.values())
        text += f"![{in_words(groups)}]({name}.png)\n\n```\n{commands}\n```\n"
    if (args.runs / "pretrained/n3_seed0/tokens.json").exists():
        text += degrees(args.runs, args.out)
    if (args.runs / "plateaus/n7_k2_alpha0_model0/tokens.json").exists():
        text += plateaus(args.runs, args.out)
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
