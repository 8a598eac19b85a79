"""For teachers: the students' copy of the project, in which the exercises' functions are blank.
`python test_all.py --handout ../course` writes it.

This folder is not in the copy, because here are right and wrong solutions, on which the tests try
the judges.
"""
import ast
import itertools
import math
import re
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from pretrain import stop  # noqa: E402
from test_all import EXERCISES  # noqa: E402

COPIED = "analyze.py pretrain.py LICENSE requirements.txt .gitignore .ci assets".split()
EDITED = ["test_all.py", "README.md", *(x.file for x in EXERCISES)]
TELLING = {"Solutions", "test_one_epoch_of_one_minibatch"}  # tests that show solutions

# right: solutions other than ours. slips: changes of ours that make it wrong (old, new, old, new,
# ...; each old text everywhere), or wrong functions. The judge must refuse each slip and each pair
# of slips that can be combined.
SOLUTIONS = {
    "answer": dict(right=[], slips={
        "the carry is forgotten": (' + int(f"{sign}{carry}")', ""),
        "A grows at its end": ("insert(0, str(digit))", "append(str(digit))"),
        "a carry from 11 on": ("abs(total // 10)", "int(total > 10 or total < 0)"),
        "-10 is taken for a digit": ("total % 10", "(total % 10 if total > -10 else 1)"),
        "no last line break": ('str(a + b)) + "\\n"', "str(a + b))")}),
    "grade": dict(right=[], slips={
        "takes a text that was cut off": ('line_break == "\\n" and ', ""),
        "the last end tag": ("text.partition", "text.rpartition"),
        "any end tag": ("</scratch>\\n", "/scratch>\\n"),
        "ignores spaces": ("result ==", "result.replace(' ', '') ==", '" ".join', "str"),
        "no subtraction": ("str(a + b)", "str(a + abs(b))")}),
    "attention": dict(right=[
        "lambda q, k, v, mask: (torch.einsum('bhtd,bhsd->bhts', q, k) / q.size(-1) ** 0.5)."
        "masked_fill(mask != 0, -math.inf).softmax(3).matmul(v)"], slips={
        "no mask": ("scores += mask", "pass"),
        "a causal mask of its own": ("+= mask", "+= torch.full_like(mask, -1e9).triu("
                                     "1 + mask.shape[1] - len(mask))"),
        "exp of the scores": ("F.softmax(scores, -1)", "scores.exp() / scores.exp().sum(-1, True)"),
        "the root of T": ("q.shape[-1]", "q.shape[-2]"),
        "softmax over the queries": ("scores, -1", "scores, -2"),
        "a reshape": ("k.transpose(-2, -1)", "k.reshape(*k.shape[:2], -1, k.shape[2])"),
        "the first head's keys": ("k.transpose", "k[:, :1].transpose"),
        "the first text's values": ("@ v", "@ v[:1]"),
        "the gradient is cut": ("@ v", "@ v.detach()"),
        "no gradient": ("    return ", "    with torch.no_grad():\n        return "),
        "another dtype": ("return ", "return torch.ones(1) * "),
        "changes its input": ("q * q", "q.mul_(1.5) / 1.5 * q"),
        "a library's": "lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask)"}),
    "sample": dict(right=[  # Gumbel's trick
        "lambda x, t, generator=None: x.max(-1).indices if t == 0 else (x / t - (-torch.rand("
        "x.shape, generator=generator).log()).log()).argmax(-1)"], slips={
        "no temperature": (" / temperature", ""),
        "no generator": (", generator=generator)", ")"),
        "the same numbers at each call": ("generator=generator)", "generator=torch.Generator())"),
        "or without a generator": ("=generator)", "=generator or torch.Generator())"),
        "dimensions of 1 vanish": ("[:-1])", "[:-1]).squeeze()"),
        "softmax over the rows": ("temperature, -1", "temperature, 0"),
        "nearly 0": ("temperature == 0", "temperature < 0", "/ temperature",
                     "/ max(temperature, 1e-8)"),
        "one draw a row": ("torch.multinomial(probs, 1, generator=generator)", "(probs.cumsum(-1) "
                           "< torch.rand(logits.shape[:1], generator=generator).repeat_interleave("
                           "len(probs) // len(logits))[:, None]).sum(-1)"),
        "changes its input": ("    probs =", "    logits /= temperature\n    probs =")}),
    "certainty": dict(right=[
        "lambda x: 1 - torch.special.entr(x.softmax(-1)).sum(-1) / math.log(x.shape[-1])"], slips={
        "uncertainty": ("1 - entropy", "entropy"),
        "0 log 0": ("logp.masked_fill(p == 0, 0)", "p.log()"),
        "0 times a logit of -inf": ("logp.masked_fill(p == 0, 0)", "logp"),
        "softmax over the positions": ("ref_logits, -1", "ref_logits, 1"),
        "sum over the positions": ("sum(-1)", "sum(1)"),
        "exp of the logits": ("F.log_softmax(ref_logits, -1)",
                              "(ref_logits.exp() / ref_logits.exp().sum(-1, True)).log()"),
        "changes its input": ("logp =", "ref_logits -= ref_logits.amax(-1, True)\n    logp ="),
        "log T": ("ref_logits.shape[-1]", "ref_logits.shape[1]")}),
    "prioritized_kl": dict(right=[
        "lambda logp, ref_logp, weight: torch.square(ref_logp - logp).mul(0.5) * weight"], slips={
        "k1": (" ** 2 / 2", ""),
        "no half": (" / 2", ""),
        "no weight": ("weight * (", "("),
        "the gradient is cut": ("(logp -", "(logp.detach() -"),
        "a number is no weight": ("return weight *", "return weight.detach() *"),
        "changes its input": ("return weight *", "return weight.mul_(2) / 2 *"),
        "a mean": ("** 2 / 2", "** 2 / 2).mean()", "return ", "return (")}),
    "gae": dict(right=["""
def gae(rewards, values, mask, gamma, lam):
    out, n = torch.zeros_like(values), values.shape[1]
    delta = rewards + gamma * F.pad(values * mask, (0, 1))[:, 1:] - values
    for t, s in ((t, s) for t in range(n) for s in range(t, n)):
        out[:, t] += (gamma * lam) ** (s - t) * delta[:, s] * mask[:, s] * mask[:, t]
    return out
"""], slips={
        "padding has values": ("= values[:, t] * mask[:, t],", "= values[:, t],"),
        "padding has advantages": (") * mask[:, t]", ")"),
        "powers of lambda alone": ("gamma * lam", "lam"),
        "two steps": ("mask[:, t], advantages[:, t]", "mask[:, t], delta * mask[:, t]"),
        "one end for all rows": ("mask[:, t], adv", "mask[:, t].max(), adv"),
        "the mask of the first row": ("mask[:, t]", "mask[:1, t]"),
        "bootstraps": ("torch.zeros_like(values[:, 0])", "values[:, -1]")}),
    "ppo_loss": dict(right=[
        "lambda new, old, A, mask, clip: torch.max(-A * new.exp() / old.exp(), -A * torch.clamp("
        "new.exp() / old.exp(), 1 - clip, 1 + clip))[mask > 0].mean()"], slips={
        "the larger of the two": ("torch.min", "torch.max"),
        "clipped from above only": ("clamp(1 - clip, 1 + clip)", "clamp(max=1 + clip)"),
        "clip is always 0.2": ("clamp(1 - clip, 1 + clip)", "clamp(0.8, 1.2)"),
        "the ratio upside down": ("new_logp - old_logp", "old_logp - new_logp"),
        "the gradient is cut": (".exp()", ".exp().detach()"),
        "padding counts": ("), mask)", "), torch.ones_like(mask))"),
        "a mean of the rows' means": ("), mask)", "), mask / mask.sum(1, True))"),
        "changes its input": ("return -", "advantages *= mask\n    return -")})}


# ------------------------------------------------------------------ the students' copy
def table_row(exercise):
    """Its row in the README's table."""
    return "| {} | {} | `{}` | {} | {} |\n".format(*exercise[:5])


def function_node(source, exercise):
    return next(node for node in ast.parse(source).body
                if getattr(node, "name", None) == exercise.function)


def students_tests(source, numbers):
    """test_all.py with the judges of these exercises alone, and without the tests of TELLING."""
    left_out = TELLING | {x.judge.__name__ for x in EXERCISES if x.number not in numbers}
    nodes = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") in left_out]
    lines = source.splitlines(keepends=True)
    for node in sorted(nodes, key=lambda node: -node.lineno):  # from the last one up
        first = min(part.lineno for part in (node, *node.decorator_list)) - 1
        n_empty = 1 if node.col_offset else 2  # lines below a method, or below what is not indented
        del lines[first : node.end_lineno + n_empty]
    return "".join(lines)


def handout(folder, numbers):
    """Write the students' copy, in which the bodies of these exercises are taken out."""
    if ROOT in (folder.resolve(), *folder.resolve().parents):
        raise OSError("it would stand inside the project")
    folder.mkdir(parents=True)
    for path in (ROOT / name for name in COPIED):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    shutil.rmtree(folder / "assets/course")
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in EDITED}
    sources["test_all.py"] = students_tests(sources["test_all.py"], numbers)
    sources["README.md"] = re.sub(r"For teachers: .*?(?=\*\*Bug hunts)", "", sources["README.md"],
                                  flags=re.S)
    for x in EXERCISES:
        if x.number not in numbers:  # a solved one
            sources["README.md"] = sources["README.md"].replace(table_row(x), "")
            continue
        node, lines = function_node(sources[x.file], x), sources[x.file].splitlines(keepends=True)
        lines[node.body[0].end_lineno : node.end_lineno] = [
            f'    raise NotImplementedError("exercise {x.number}: {x.function}")\n']
        sources[x.file] = "".join(lines)
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")
    print(f"wrote {folder} with exercises {numbers} open")


def main(folder, numbers):
    try:
        handout(Path(folder), numbers)
    except OSError as error:
        stop(f"cannot write {folder}: {error}")


# ------------------------------------------------------------------ right and wrong solutions
def solution(exercise):
    """The source of the project's own function, without its docstring."""
    lines = (ROOT / exercise.file).read_text(encoding="utf-8").splitlines(keepends=True)
    node = function_node("".join(lines), exercise)
    return "".join([lines[node.lineno - 1], *lines[node.body[0].end_lineno : node.end_lineno]])


def function_from(exercise, source):
    names = dict(vars(sys.modules[exercise.file[:-3]]), math=math, torch=torch)
    exec(f"{exercise.function} = {source}" if source.startswith("lambda") else source, names)
    return names[exercise.function]


def slipped(exercise):
    """{name: source} of every wrong solution: with one slip, or two that go together."""
    wrong, right = {}, solution(exercise)
    slips = list(SOLUTIONS[exercise.function]["slips"].items())
    for chosen in [[slip] for slip in slips] + list(itertools.combinations(slips, 2)):
        source = right
        for _, change in chosen:
            if isinstance(change, str):  # a whole function
                change = (right, change)
            for old, new in zip(change[::2], change[1::2]):
                source = source.replace(old, new) if old in source else ""
        if source:
            wrong[" and ".join(name for name, _ in chosen)] = source
    return wrong
