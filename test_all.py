"""All tests.  Run: python test_all.py   (or: python test_all.py -k gae -v   or: pytest test_all.py)

Options: --slow runs the tests that take minutes, too; --handout DIR writes the students' copy of the exercises.

Each compares with an answer worked out by hand or by an independent route, never with a second copy of the code.
"""

import argparse
import ast
import contextlib
import csv
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ImportError:  # Windows
    resource = None

import analyze
import data
import kl
import model
import ppo
import pretrain
from model import GPT, GPTConfig, generate, split_actions

HERE = os.path.dirname(os.path.abspath(__file__))
SLOW = "--slow" in sys.argv  # also the tests that take minutes
sys.argv = [arg for arg in sys.argv if arg != "--slow"]
CPU = torch.device("cpu")
torch.set_num_threads(1)  # models as small as these only lose by sharing their work among threads


def tiny_model(seed=0, block_size=128, n_layer=2, n_embd=16, std=None):
    """A model of 9,000 parameters. std: spread of random weights; larger than GPT-2's, so that outputs differ."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, n_layer=n_layer, n_head=2, n_embd=n_embd)).eval()
    if std:
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, std)
    return model


def quiet(f, *args):
    """Call f with its printing kept back -> (what it returned, what it printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        result = f(*args)
    return result, out.getvalue()


def enter_a_new_folder(test):
    """Let a test work in a folder of its own, which goes away with it."""
    folder = tempfile.TemporaryDirectory()
    test.addCleanup(folder.cleanup)
    test.addCleanup(os.chdir, os.getcwd())
    os.chdir(folder.name)


def tensors_to_lists(x):
    """Nested dicts, lists and tensors -> without tensors, so that == compares every number."""
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {name: tensors_to_lists(value) for name, value in x.items()}
    return [tensors_to_lists(value) for value in x] if isinstance(x, (list, tuple)) else x


WORKED = """Input:
367+28
Target:
<scratch>
[3,6,7] + [2,8] , A=[] , C=0 , 7+8+0=15 , A->5 , C->1
[3,6] + [2] , A=[5] , C=1 , 6+2+1=9 , A->9 , C->0
[3] + [] , A=[9,5] , C=0 , 3+0+0=3 , A->3 , C->0
[] + [] , A=[3,9,5] C=0 , END
</scratch>
3 9 5
"""


# --------------------------------------------------------------------------- the exercises
# In the order of the pipeline: file, function, what to write, minutes. Each is judged by Exercises.test_exercise_<number>,
# run with `python test_all.py -k exercise_<number>`. `--handout DIR` makes a copy with these bodies taken out.
EXERCISES = [
    ("data.py", "answer", "the scratchpad, a line a digit", 40),
    ("data.py", "grade", "is the result in this text the sum?", 15),
    ("model.py", "attention", "causal self-attention", 30),
    ("model.py", "sample", "a token from logits, at a temperature", 15),
    ("kl.py", "certainty", "equation 2", 15),
    ("kl.py", "prioritized_kl", "equation 1", 15),
    ("ppo.py", "gae", "generalized advantage estimation", 40),
    ("ppo.py", "ppo_loss", "the clipped surrogate", 20),
]


COPIED = "pretrain.py analyze.py README.md LICENSE requirements.txt .gitignore .ci assets".split()  # as they are


def blank(source, name, number):
    """The source of a script with the body of one function replaced by `raise NotImplementedError`; its docstring stays."""
    function = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    lines = source.splitlines(keepends=True)
    todo = f'    raise NotImplementedError("exercise {number}: {name}")\n'
    return "".join([*lines[: function.body[0].end_lineno], todo, *lines[function.end_lineno :]])


def exercise_table():
    """The table of exercises, as the README has it."""
    head = "| exercise | file | function | what to write | minutes |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| `python test_all.py -k exercise_{number}` | {file} | `{function}` | {task} | {minutes} |\n"
        for number, (file, function, task, minutes) in enumerate(EXERCISES, 1)
    )


def handout(folder):
    """Write the student's copy: exercise bodies blank, without the solutions and the tests that hold them."""
    if os.path.exists(folder):
        raise pretrain.UserError(f"{folder} exists; give --handout a folder that does not")
    with open(os.path.join(HERE, "test_all.py"), encoding="utf-8") as f:
        source = f.read()
    lines = source.splitlines(keepends=True)
    judge = [node for node in ast.parse(source).body if getattr(node, "name", None) == "Judge"]
    if not judge:
        raise pretrain.UserError("this is a hand-out copy already; the original makes them")
    pretrain.make_folder(folder)
    for name in sorted({file for file, _, _, _ in EXERCISES} | set(COPIED)):
        copy = shutil.copytree if os.path.isdir(os.path.join(HERE, name)) else shutil.copy
        copy(os.path.join(HERE, name), os.path.join(folder, name))
    for number, (file, function, _, _) in enumerate(EXERCISES, 1):
        path = os.path.join(folder, file)
        with open(path, encoding="utf-8") as f:
            source = blank(f.read(), function, number)
        with open(path, "w", encoding="utf-8") as f:
            f.write(source)
    with open(os.path.join(folder, "test_all.py"), "w", encoding="utf-8") as f:
        f.write("".join(lines[: judge[0].lineno - 1] + lines[judge[0].end_lineno :]))
    print(f"wrote {folder}: {len(EXERCISES)} exercises, see its README; python test_all.py -k exercise_1 judges the first")


class Exercises(unittest.TestCase):
    """One test an exercise. What fails says which input, what was expected, and what came instead."""

    longMessage = False

    def equal(self, call, got, expected):
        self.assertEqual(got, expected, f"\n{call}\nshould be {expected!r}\nbut is   {got!r}")

    def same_text(self, call, got, expected):
        self.assertIsInstance(got, str, f"\n{call} should be a text, but is {got!r}")
        i = next((i for i, (x, y) in enumerate(zip(got, expected)) if x != y), min(len(got), len(expected)))
        self.assertEqual(got, expected, f"\n{call}\nshould be\n{expected}\nbut is\n{got}\nThey differ from character {i} on: "
                         f"{expected[i : i + 12]!r} became {got[i : i + 12]!r}")  # fmt: skip

    def close(self, call, got, expected, tolerance=1e-5):
        """Both tensors, or what a tensor can be made of; a nan is never close."""
        self.assertIsInstance(got, torch.Tensor, f"\n{call}\nshould be a tensor, but is {got!r}")
        expected = torch.as_tensor(expected, dtype=got.dtype)
        self.assertEqual(got.shape, expected.shape, f"\n{call}\nshould have the shape {tuple(expected.shape)}, "
                         f"but has {tuple(got.shape)}")  # fmt: skip
        good = ((got - expected).abs() <= tolerance).all().item()
        self.assertTrue(good, f"\n{call}\nshould be {expected.tolist()}\nbut is   {got.tolist()}")

    def test_exercise_1_answer(self):
        self.same_text("prompt(367, 28) + answer(367, 28)", data.prompt(367, 28) + data.answer(367, 28), WORKED)
        by_hand = "\n<scratch>\n[9,9] + [1] , A=[] , C=0 , 9+1+0=10 , A->0 , C->1\n"
        by_hand += "[9] + [] , A=[0] , C=1 , 9+0+1=10 , A->0 , C->1\n[] + [] , A=[0,0] C=1 , END\n</scratch>\n1 0 0\n"
        self.same_text("answer(99, 1), whose final carry shows only in the result", data.answer(99, 1), by_hand)
        zero = "\n<scratch>\n[0] + [0] , A=[] , C=0 , 0+0+0=0 , A->0 , C->0\n[] + [] , A=[0] C=0 , END\n</scratch>\n0\n"
        self.same_text("answer(0, 0)", data.answer(0, 0), zero)
        borrow = "\n<scratch>\n[5,2] - [7] , A=[] , C=0 , 2-7-0=-5 , A->5 , C->1\n"
        borrow += "[5] - [] , A=[5] , C=1 , 5-0-1=4 , A->4 , C->0\n[] - [] , A=[4,5] C=0 , END\n</scratch>\n4 5\n"
        self.same_text("answer(52, -7), the subtraction 52-7", data.answer(52, -7), borrow)
        zero = "\n<scratch>\n[1,2] - [5] , A=[] , C=0 , 2-5-0=-3 , A->7 , C->1\n"
        zero += "[1] - [] , A=[7] , C=1 , 1-0-1=0 , A->0 , C->0\n[] - [] , A=[0,7] C=0 , END\n</scratch>\n7\n"
        self.same_text("answer(12, -5), whose A has a leading zero, the result has not", data.answer(12, -5), zero)

    def test_exercise_2_grade(self):
        right = WORKED
        for text, good in (
            (right, True),
            ("</scratch>\n3 9 5\n", True),
            (right + "4 0 0\n", True),  # the episode ended before the second result
            ("", False),
            ("\n", False),
            ("3 9 5\n", False),
            (right[:-1], False),
            (right[:-2], False),
            (right.replace("3 9 5\n", "3 9 6\n"), False),
            (right.replace("3 9 5\n", "3 9 5 \n"), False),
            (right.replace("3 9 5\n", " 3 9 5\n"), False),
            (right.replace("3 9 5\n", "395\n"), False),
            (right.replace("3 9 5\n", "0 3 9 5\n"), False),
            (right.replace("3 9 5\n", "\n3 9 5\n"), False),
            (right.replace("3 9 5\n", "3 9 5\r\n"), False),
            (right.replace("3 9 5\n", "٣ ٩ ٥\n"), False),
            (right.replace("</scratch>\n3", "</scratch>3"), False),
            (right.replace("</scratch>\n", "</scratch>\n4 0 0\n"), False),  # the first result counts
            (right.replace("</scratch>\n", "</scratch>\n</scratch>\n"), False),
            ("</scratch>", False),
            ("</scratch>\n", False),
            ("\x00\ud800😀", False),
            ("</scratch>\n3\u20289 5\n", False),
        ):
            self.equal(f"grade({text!r}, 367, 28)", data.grade(text, 367, 28), good)
        self.equal("grade('</scratch>\\n0\\n', 0, 0)", data.grade("</scratch>\n0\n", 0, 0), True)
        self.equal("grade('</scratch>\\n4 5\\n', 52, -7)", data.grade("</scratch>\n4 5\n", 52, -7), True)

    def test_exercise_3_attention(self):
        # Two tokens, D = 4. Token 0 sees itself alone. Token 1: scores (log 3)*2 and 0, over sqrt(4): weights 3/4, 1/4.
        q = torch.tensor([[[[1.0, 0, 0, 0], [math.log(3), 0, 0, 0]]]])
        k = torch.tensor([[[[2.0, 0, 0, 0], [0.0, 0, 0, 0]]]])
        v = torch.tensor([[[[4.0, 0, 0, 8], [0.0, 4, 0, 0]]]])
        expected = [[[[4.0, 0, 0, 8], [3.0, 1, 0, 6]]]]
        call = f"attention(q={q.tolist()}, k={k.tolist()}, v={v.tolist()})"
        self.close(call, model.attention(q, k, v), expected)
        # All scores alike: token t has the mean of the values 0..t, in each of (B, H) = (2, 3) on its own.
        v = torch.arange(24.0).view(2, 3, 4, 1)
        q = torch.zeros(2, 3, 4, 1)
        expected = v.cumsum(2) / torch.tensor([1.0, 2, 3, 4]).view(4, 1)
        self.close(f"attention(q=0, k=0, v={v.tolist()})", model.attention(q, q, v), expected)
        got = model.attention(q.bfloat16(), q.bfloat16(), v.bfloat16())
        self.equal("the dtype of attention of bfloat16", got.dtype, torch.bfloat16)

    def test_exercise_4_sample(self):
        logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, 3.0]])
        self.close(f"sample({logits.tolist()}, temperature=0)", model.sample(logits, 0), [1, 0])
        logits = torch.tensor([0.0, 2.0, 4.0])
        for temperature in (0.5, 1.0, 2.0):
            generator = torch.Generator().manual_seed(0)
            drawn = model.sample(logits.expand(20000, 3), temperature, generator)
            self.assertEqual(drawn.shape, (20000,), f"\nsample(logits (20000, 3), ...) has the shape {tuple(drawn.shape)}")
            share = torch.bincount(drawn, minlength=3) / 20000
            expected = [math.exp(x / temperature) for x in (0, 2, 4)]
            expected = [x / sum(expected) for x in expected]  # 5 sigma of a share of 20,000 is at most 0.018
            call = f"the shares of 0, 1, 2 in 20,000 calls of sample([0, 2, 4], temperature={temperature})"
            self.close(call, share, expected, tolerance=0.018)
            again = model.sample(logits.expand(20000, 3), temperature, torch.Generator().manual_seed(0))
            self.assertTrue(torch.equal(drawn, again), "\nsample() drew other tokens with a generator of the same seed")

    def test_exercise_5_certainty(self):
        got = kl.certainty(torch.full((2, 3, 40), 1.7))
        self.assertEqual(got.tolist(), [[0.0] * 3] * 2, f"\ncertainty of uniform logits (2, 3, 40): exactly 0, not {got}")
        one_hot = torch.full((1, 1, 40), -torch.inf)
        one_hot[..., 3] = 0
        self.equal("certainty of a one-hot, logits 0 and -inf", kl.certainty(one_hot).tolist(), [[1.0]])
        coin = torch.tensor([[[0.0, 0.0, -torch.inf, -torch.inf]]])  # H = log 2, H_max = log 4
        self.close("certainty([[[0, 0, -inf, -inf]]])", kl.certainty(coin), [[0.5]])
        p = [0.7, 0.2, 0.1]
        by_hand = 1 + sum(x * math.log(x) for x in p) / math.log(3)
        near = 1e-4 * torch.randn(1, 1000, 40, generator=torch.Generator().manual_seed(0))
        self.assertTrue((kl.certainty(near) >= 0).all(), "\ncertainty of nearly uniform logits is below 0, by rounding")
        self.close(f"certainty(log({p}))", kl.certainty(torch.tensor([[p]]).log()), [[by_hand]])

    def test_exercise_6_prioritized_kl(self):
        coin = torch.tensor([[[0.0] * 2 + [-torch.inf] * 6]])  # certainty (log 8 - log 2) / log 8 = 2/3
        for alpha, expected in ((0, 9 / 2), (1, 3.0), (3, 4 / 3)):
            got = kl.prioritized_kl(torch.tensor([[-1.0]]), torch.tensor([[-4.0]]), coin, alpha)
            self.close(f"prioritized_kl(logp=-1, ref_logp=-4, certainty 2/3, alpha={alpha})", got, [[expected]])
        uniform = torch.zeros(1, 1, 4)
        got = kl.prioritized_kl(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), uniform, 0.0)
        self.close("prioritized_kl(logp=-1, ref_logp=-3, certainty 0, alpha=0): 0 ** 0 is 1", got, [[2.0]])
        x, y, z = (torch.full(shape, -1.5, requires_grad=True) for shape in ((1, 1), (1, 1), (1, 1, 8)))
        got = kl.prioritized_kl(x, y - 1, z + coin.clamp(-9), 2.0)
        self.assertTrue(got.requires_grad, "\nprioritized_kl has no gradient; it must flow through logp")
        got.sum().backward()
        self.assertIsNotNone(x.grad, "\nprioritized_kl has no gradient with respect to logp")
        self.assertIsNone(y.grad, "\nprioritized_kl: a gradient reached ref_logp; the reference is frozen")
        self.assertIsNone(z.grad, "\nprioritized_kl: a gradient reached ref_logits; the reference is frozen")

    def test_exercise_7_gae(self):
        for rewards, values, mask, gamma, lam, expected in (
            ([0.0, 1], [0.0, 0], [1.0, 1], 1, 1, [1.0, 1]),
            # delta_1 = 1 - 4 = -3; delta_0 = 0 + 4/2 - 2 = 0; A_0 = 0 + (1/2)(1/2)(-3)
            ([0.0, 1], [2.0, 4], [1.0, 1], 0.5, 0.5, [-0.75, -3]),
            # lambda 0: the deltas themselves, 0 + 3 - 1 and 5 - 3
            ([0.0, 5], [1.0, 3], [1.0, 1], 1, 0, [2.0, 2]),
            # gamma 1, lambda 1: return minus value; prompt before and padding after have 0 and are never looked at
            ([0.0, 0, 1, 0], [9.0, 0.25, 0.5, 7], [0.0, 1, 1, 0], 1, 1, [0.0, 0.75, 0.5, 0]),
        ):
            given = [torch.tensor([x]) for x in (rewards, values, mask)]
            got = ppo.gae(*given, gamma, lam)
            self.close(f"gae(rewards={rewards}, values={values}, mask={mask}, gamma={gamma}, lam={lam})", got, [expected])
            self.equal("gae changed its inputs: they", [x.tolist() for x in given], [[rewards], [values], [mask]])
        rewards, values, mask = [[0.0, 1, 0], [0, 0, 2]], [[0.5, 0.5, 9], [9, 1, 1]], [[1.0, 1, 0], [0, 1, 1]]
        got = ppo.gae(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), 1.0, 1.0)
        expected = [[0.5, 0.5, 0], [0, 1, 1]]
        self.close(f"gae(rewards={rewards}, values={values}, mask={mask}, gamma=1, lam=1)", got, expected)

    def test_exercise_8_ppo_loss(self):
        for ratio, advantage, expected in (
            # min(ratio A, clip(ratio) A) with clip 0.2, and the sign turned
            (1.0, 1.0, -1.0),
            (1.5, 1.0, -1.2),
            (1.5, -1.0, 1.5),
            (0.5, 1.0, -0.5),
            (0.5, -1.0, 0.8),
        ):
            log_ratio, one = torch.tensor([[math.log(ratio)]]), torch.ones(1, 1)
            got = ppo.ppo_loss(log_ratio - 2, 0 * one - 2, advantage * one, one, 0.2)
            self.close(f"ppo_loss at ratio {ratio}, advantage {advantage}, clip 0.2", got, expected)
        new, mask = torch.tensor([[1.5, 1.0, 3.0]]).log(), torch.tensor([[1.0, 1.0, 0.0]])
        got = ppo.ppo_loss(new, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 100.0]]), mask, 0.2)
        self.close("ppo_loss at ratios 1.5, 1, 3 (masked), advantages 1, -1, 100: the mean of -1.2 and 1", got, -0.1)
        new, old = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.0, -2.0]])
        got = ppo.ppo_loss(new, old, torch.tensor([[3.0, -5.0]]), torch.ones(1, 2), 0.2)
        self.assertTrue(got.requires_grad, "\nppo_loss has no gradient; it must flow through new_logp")
        got.backward()
        self.close("the gradient of ppo_loss at ratio 1, advantages 3, -5: -A / 2", new.grad, [[-1.5, 2.5]])


class Judge(unittest.TestCase):
    """The tests of the exercises are tested: they fail on a blank body and on plausible wrong ones, and say why."""

    WRONG = {  # function: the reference with something changed
        "answer": [
            (' + int(f"{sign}{carry}")', ""),  # the carry is forgotten
            ("result.insert(0, str(total % 10))", "result.append(str(total % 10))"),  # digits in the wrong order
            ("}] C={carry}", "}] , C={carry}"),  # a comma that the format does not have
            ('" ".join(str(a + b))', "str(a + b)"),
            ('" ".join(str(a + b))', '" ".join(result)'),  # the final carry is lost
            ('" ".join(str(a + b))', '" ".join(["1"] * carry + result)'),  # leading zeros stay
        ],
        "grade": [
            ("bool(end_tag and line_break)", "bool(end_tag)"),  # an answer that was cut off
            ("result ==", "result.strip() =="),
            ('result == " ".join(str(a + b))', 'result.replace(" ", "") == str(a + b)'),
            ("text.partition", "text.rpartition"),  # the last result instead of the first
        ],
        "attention": [
            ("scores += mask", "pass"),
            (".triu(1)", ".triu(2)"),  # each token sees the next one
            (" * D**-0.5", ""),
            ("scores, -1)", "scores, -2)"),  # the softmax over the wrong axis
            (".triu(1)", ".tril(-1)"),  # the mask turned round
            ("D**-0.5", "D**0.5"),
        ],
        "sample": [
            ("logits / temperature", "logits * temperature"),
            ("argmax(-1)", "argmin(-1)"),
            (", generator=generator", ""),
            ("F.softmax(logits / temperature, -1)", "F.softmax(logits, -1)"),
            ("[:, 0]", ""),
        ],
        "certainty": [
            (" / h_max", ""),
            ("(h_max - entropy(ref_logits))", "entropy(ref_logits)"),  # uncertainty
            ("entropy(ref_logits))", "-(ref_logits.softmax(-1) * ref_logits.log_softmax(-1)).sum(-1))"),  # 0 log 0
            ("entropy(ref_logits))", "entropy(ref_logits.mT))"),  # the wrong axis
            (".clamp(0, 1)", ""),
        ],
        "prioritized_kl": [
            ("** alpha", "* alpha"),
            ("(logp - ref_logp.detach()) ** 2 / 2", "(logp - ref_logp.detach())"),  # k1
            (" / 2", ""),
            ("ref_logp.detach()", "ref_logp"),
            ("certainty(ref_logits.detach())", "(1 - certainty(ref_logits.detach()))"),
        ],
        "gae": [
            ("gamma * lam * following", "gamma * following"),
            ("- values[:, t]", "+ values[:, t]"),
            (" * mask[:, t + 1]", ""),  # the value of padding
            ("values[:, t + 1]", "values[:, t]"),
            ("following) * mask[:, t]", "following)"),
            ("mask[:, t]", "mask[:1, t]"),  # the first row's mask for all
            ("torch.zeros_like(values), ", "values, "),  # written over the values
        ],
        "ppo_loss": [
            ("torch.min", "torch.max"),
            ("return -", "return "),
            ("1 - clip, 1 + clip", "-clip, clip"),
            (", mask)", ", torch.ones_like(mask))"),  # the mask forgotten
            ("new_logp - old_logp", "old_logp - new_logp"),
            (".exp()", ".exp().detach()"),
        ],
    }

    def judge(self, number, source):
        """Run exercise `number`'s test with another source of its function -> the unittest.TestResult."""
        file, name, _, _ = EXERCISES[number - 1]
        module, found = sys.modules[file.removesuffix(".py")], {}
        exec(compile(source, f"<another {name}>", "exec"), vars(module), found)
        test = next(test for test in dir(Exercises) if test.startswith(f"test_exercise_{number}_"))
        result = unittest.TestResult()
        with mock.patch.object(module, name, found[name]):
            Exercises(test).run(result)
        return result

    def test_blank_wrong_and_right_solutions(self):
        self.assertEqual(list(self.WRONG), [name for _, name, _, _ in EXERCISES])
        for number, (file, name, _, _) in enumerate(EXERCISES, 1):
            source = inspect.getsource(getattr(sys.modules[file.removesuffix(".py")], name))
            self.assertTrue(self.judge(number, source).wasSuccessful(), name)
            result = self.judge(number, blank(source, name, number))
            self.assertEqual((len(result.errors), result.failures), (1, []), name)
            self.assertIn(f"NotImplementedError: exercise {number}: {name}", result.errors[0][1])
            self.assertGreaterEqual(len(self.WRONG[name]), 3)
            for old, new in self.WRONG[name]:
                with self.subTest(function=name, wrong=f"{old!r} -> {new!r}"):
                    head, doc, body = source.rpartition('"""')
                    self.assertIn(old, body, "the reference has what is changed")
                    result = self.judge(number, head + doc + body.replace(old, new))
                    self.assertEqual(len(result.failures) + len(result.errors), 1, "a wrong solution passes")
                    if result.failures:
                        self.assertIn(name, result.failures[0][1], "the message names the function")

    def test_the_handout_holds_no_solution(self):
        enter_a_new_folder(self)
        quiet(handout, "copy")
        with self.assertRaisesRegex(pretrain.UserError, "copy exists"):
            handout("copy")
        self.assertEqual(
            {name for name in os.listdir(HERE) if name.endswith((".py", ".md", ".txt"))},
            {name for name in os.listdir("copy") if name.endswith((".py", ".md", ".txt"))},
        )
        texts = {}
        for folder, _, names in os.walk("copy"):
            for name in names:
                if name.endswith((".py", ".md", "run")):
                    with open(os.path.join(folder, name), encoding="utf-8") as f:
                        texts[name] = f.read()
        for number, (file, name, _, _) in enumerate(EXERCISES, 1):
            source = inspect.getsource(getattr(sys.modules[file.removesuffix(".py")], name))
            body = source[source.index('"""', source.index('"""') + 3) + 3 :]
            for line in body.splitlines():
                for where, text in texts.items():
                    if len(line.split("#")[0].strip()) > 25:
                        self.assertNotIn(line.split("#")[0].strip(), text, f"{where} holds a line of {name}")
            self.assertIn(f'raise NotImplementedError("exercise {number}: {name}")', texts[file])
            self.assertIn(source[: source.index('"""', source.index('"""') + 3)], texts[file], "the docstring stays")
        command = [sys.executable, "test_all.py", "-k", "exercise"]
        done = subprocess.run(command, cwd="copy", capture_output=True, text=True)
        self.assertEqual(done.stderr.count("NotImplementedError: exercise"), len(EXERCISES), done.stderr[-500:])
        self.assertIn(f"FAILED (errors={len(EXERCISES)})", done.stderr)
        command = [sys.executable, "test_all.py", "--handout", "second"]
        done = subprocess.run(command, cwd="copy", capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr.count("\n"), os.path.exists("copy/second")), (2, 1, False))

    def test_the_readme_has_the_table_of_exercises(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
            self.assertTrue(exercise_table() in f.read(), "README.md lacks\n" + exercise_table())


class Data(unittest.TestCase):
    def test_lengths(self):
        lengths = [118, 177, 242, 313, 390, 473, 562, 657, 758, 865]  # of the paper's format, for nines
        self.assertEqual([data.max_length(n) for n in range(1, 11)], lengths)

    def test_max_length_is_the_maximum(self):
        self.assertEqual(max(len(data.prompt(a, b) + data.answer(a, b)) for a in range(100) for b in range(100)), 177)

    def test_vocabulary_round_trip(self):
        self.assertEqual(len(set(data.VOCAB)), len(data.VOCAB))
        self.assertEqual(data.decode(data.encode(WORKED)), WORKED)
        self.assertEqual(data.encode(data.VOCAB), list(range(len(data.VOCAB))))

    def test_unknown_characters_and_ids_are_named(self):
        with self.assertRaisesRegex(ValueError, "'é'"):
            data.encode("1+é")
        for bad in (-1, len(data.VOCAB)):
            with self.assertRaisesRegex(ValueError, str(bad)):
                data.decode([0, bad])

    def test_grade_any_text(self):
        rng = np.random.default_rng(0)
        for _ in range(2000):  # the right text with random characters cut, doubled and put in
            text = WORKED
            for _ in range(rng.integers(1, 4)):
                i = rng.integers(0, len(text) + 1)
                text = (
                    text[:i]
                    + "".join(chr(c) for c in rng.integers(0, 0x300, rng.integers(0, 3)))
                    + text[i + rng.integers(0, 3) :]
                )
            self.assertIn(data.grade(text, 367, 28), (True, False))

    def test_critical_positions_of_a_worked_example(self):
        text, found = WORKED, data.critical_positions(367, 28, 2)
        line1, line2, line3 = text.index("[3,6,7]"), text.index("[3,6] "), text.index("[3] ")
        self.assertEqual(
            found,
            {
                (1, 1, "comma1"): line1 + 4,
                (1, 1, "digit1"): line1 + 5,
                (2, 1, "comma1"): line2 + 2,
                (2, 1, "digit1"): line2 + 3,
                (3, 1, "digit1"): line3 + 1,
            },
        )
        self.assertEqual([text[i] for i in found.values()].count(","), 2)

    def test_critical_positions_two_digits_longer_and_second_operand(self):
        text, found = data.prompt(5, 1234) + data.answer(5, 1234), data.critical_positions(5, 1234, 2)
        at = text.index("[1,2,3,4]")
        self.assertEqual(
            {k: v - at for k, v in found.items() if k[0] == 1},
            {(1, 2, "digit1"): 7, (1, 2, "comma1"): 6, (1, 2, "digit2"): 5, (1, 2, "comma2"): 4},
        )
        self.assertTrue(all(operand == 2 for _, operand, _ in found))
        self.assertEqual(text[found[2, 2, "digit1"]], "3")  # line 2 begins "[] + [1,2,3]"
        self.assertEqual(data.critical_positions(12, 34, 2), {})
        self.assertEqual(set(data.critical_positions(12, 3, 1)), {(1, 1, "comma1"), (1, 1, "digit1"), (2, 1, "digit1")})

    def test_sample_pair(self):
        rng, digits = np.random.default_rng(0), lambda pair: [len(str(x)) for x in pair]
        many = {
            mode: [digits(data.sample_pair(rng, 3, mode, 2)) for _ in range(3000)]
            for mode in ("train", "identical", "varying", "rl")
        }
        self.assertEqual({tuple(x) for x in many["train"]}, set(itertools.product((1, 2, 3), repeat=2)))
        self.assertEqual({tuple(x) for x in many["identical"]}, {(3, 3)})
        self.assertEqual({tuple(x) for x in many["varying"]}, {(3, m) for m in (1, 2, 3)} | {(m, 3) for m in (1, 2)})
        self.assertEqual({max(x) for x in many["rl"]}, {5})
        # rl: the other operand's length is 1, 2, 3 with probability 1/6 each, 4, 5 with 1/4 each; 5 sigma is 0.04
        for length, share in ((1, 1 / 6), (2, 1 / 6), (3, 1 / 6), (4, 1 / 4), (5, 1 / 4)):
            self.assertAlmostEqual(np.mean([min(x) == length for x in many["rl"]]), share, delta=0.04)
        for length in (1, 2, 3):
            self.assertAlmostEqual(np.mean([x[0] == length for x in many["train"]]), 1 / 3, delta=0.045)
        self.assertAlmostEqual(np.mean([x[0] == 3 for x in many["varying"] if min(x) < 3]), 0.5, delta=0.06)
        with self.assertRaisesRegex(ValueError, "mode 'test'"):
            data.sample_pair(rng, 3, "test")

    def test_subtraction(self):
        """The second task by hand: 52-7 borrows once; 4000-7 borrows through zeros."""
        self.assertEqual(data.prompt(52, -7), "Input:\n52-7\nTarget:")
        self.assertEqual(
            data.answer(52, -7),
            "\n<scratch>\n[5,2] - [7] , A=[] , C=0 , 2-7-0=-5 , A->5 , C->1\n"
            "[5] - [] , A=[5] , C=1 , 5-0-1=4 , A->4 , C->0\n[] - [] , A=[4,5] C=0 , END\n</scratch>\n4 5\n",
        )
        self.assertIn("0-0-1=-1 , A->9 , C->1", data.answer(4000, -7))
        self.assertTrue(data.answer(4000, -7).endswith("C=0 , END\n</scratch>\n3 9 9 3\n"))
        self.assertTrue(data.grade("</scratch>\n4 5\n", 52, -7))
        self.assertFalse(data.grade("</scratch>\n5 9\n", 52, -7))
        for n in (1, 2):
            lengths = [len(data.prompt(a, -b) + data.answer(a, -b)) for a in range(10**n) for b in range(1, a + 1)]
            self.assertEqual(data.max_length(n, "subtract"), max(lengths))
        text = data.prompt(367, -28) + data.answer(367, -28)
        found = data.critical_positions(367, -28, 1)
        self.assertEqual(text[found[1, 2, "comma1"] :][:3], ",8]")
        rng = np.random.default_rng(0)
        for mode in ("train", "identical", "varying", "rl"):
            for _ in range(200):
                a, b = data.sample_pair(rng, 2, mode, task="subtract")
                self.assertTrue(0 < -b <= a and not data.held_out(a, b))
                data.encode(data.prompt(a, b) + data.answer(a, b))

    def test_training_never_draws_a_held_out_problem(self):
        rng = np.random.default_rng(0)
        for mode in ("train", "identical", "varying", "rl"):
            for _ in range(500):
                self.assertFalse(data.held_out(*data.sample_pair(rng, 1, mode)))
                self.assertTrue(data.held_out(*data.sample_pair(rng, 1, mode, test=True)))


def numpy_gpt2(weights, ids, n_head):
    """GPT-2 in float64 numpy, written from its definition, a token at a time: ids (T,) -> logits (T, V)."""
    w = {name: p.double().numpy() for name, p in weights.items()}

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w[name + ".bias"]

    xs = [w["transformer.wte.weight"][i] + w["transformer.wpe.weight"][t] for t, i in enumerate(ids)]
    layer = 0
    while f"transformer.h.{layer}.ln_1.weight" in w:
        h = f"transformer.h.{layer}."
        q, k, v = zip(*[np.split(linear(norm(x, h + "ln_1"), h + "attn.c_attn"), 3) for x in xs])
        size, new = len(q[0]) // n_head, []
        for t, x in enumerate(xs):
            heads = []
            for s in (slice(i * size, (i + 1) * size) for i in range(n_head)):
                weight = np.exp([q[t][s] @ k[u][s] / math.sqrt(size) for u in range(t + 1)])
                heads.append(sum(a * v[u][s] for u, a in enumerate(weight / weight.sum())))
            x = x + linear(np.concatenate(heads), h + "attn.c_proj")
            z = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
            gelu = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            new.append(x + linear(gelu, h + "mlp.c_proj"))
        xs, layer = new, layer + 1
    return np.array([w["lm_head.weight"] @ norm(x, "transformer.ln_f") for x in xs])


class Tape(TorchDispatchMode):
    """A CUDA graph's stand-in on a CPU: replays each tensor operation on the tensors, and with the numbers, of the recording."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}, func(*args, **(kwargs or {}))))
        return self.calls[-1][-1]

    def replay(self):
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class Model(unittest.TestCase):
    def setUp(self):
        self.model = tiny_model(std=0.3)
        rng = np.random.default_rng(0)
        self.pairs = [(7, 5), (123, 4), (12345, 678), (0, 0), (99, 1)]
        self.prompts = [data.encode(data.prompt(a, b)) for a, b in self.pairs]
        self.ids = torch.from_numpy(rng.integers(0, 40, (3, 50)))

    def test_logits_are_gpt2s(self):
        logits, hidden = self.model(self.ids)
        self.assertEqual((logits.shape, hidden.shape), ((3, 50, 40), (3, 50, 16)))
        for row, got in zip(self.ids.tolist(), logits):
            np.testing.assert_allclose(
                got.detach().numpy(), numpy_gpt2(self.model.state_dict(), row, n_head=2), atol=1e-4
            )

    def test_greedy_text_is_gpt2s(self):
        text = list(self.prompts[0])
        for _ in range(20):
            text.append(int(numpy_gpt2(self.model.state_dict(), text, n_head=2)[-1].argmax()))
        ids, lengths = generate(self.model, self.prompts[:1], 20, temperature=0)
        self.assertEqual(ids[0, : lengths[0]].tolist(), text[: lengths[0]])
        self.assertEqual(lengths[0], len(text))

    def test_another_librarys_gpt2(self):
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            self.skipTest("transformers is not installed; test_logits_are_gpt2s judges the same against numpy")
        peer = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=40, n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
            )
        ).eval()
        weights = {
            name: (
                p.T if any(x in name for x in ("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p
            )  # its Conv1D is transposed
            for name, p in self.model.state_dict().items()
        }
        peer.load_state_dict(weights)
        with torch.no_grad():
            torch.testing.assert_close(self.model(self.ids)[0], peer(self.ids).logits, atol=1e-4, rtol=0)
            ids, lengths = generate(self.model, self.prompts[:1], 40, temperature=0)
            prompt = torch.tensor(self.prompts[:1])
            theirs = peer.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
            )
        self.assertEqual(ids[0, : lengths[0]].tolist(), theirs[0, : lengths[0]].tolist())

    def test_causality(self):
        """In both attentions: the fused kernel, and ours by hand, in bfloat16."""
        changed = self.ids.clone()
        changed[:, 30:] = (changed[:, 30:] + 1) % 40
        for precision in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with precision:
                logits, again = self.model(self.ids)[0], self.model(changed)[0]
            torch.testing.assert_close(again[:, :30], logits[:, :30], atol=1e-6, rtol=0)
            self.assertGreater((again[:, 30:] - logits[:, 30:]).abs().max().item(), 0.1)

    def test_cache_equals_no_cache(self):
        """Row by row at a pace of its own; what the cache holds at later places, or a step reads beyond it, does not matter."""
        B, T = self.ids.shape
        with torch.no_grad():
            whole, _ = self.model(self.ids)
            cache = torch.full((2, 2, B, 2, T + 1, 8), 100.0)
            logits, start = torch.zeros(B, T + 9, 40), torch.zeros(B, dtype=torch.long)
            padded = F.pad(self.ids, (0, 9))
            for widths in ([7, 7, 7], [1, 3, 9], [9, 9, 1], [9, 1, 9], [9, 9, 9], [9, 9, 9], [9, 9, 9], [9, 9, 9]):
                place = start[:, None] + torch.arange(max(widths))
                own = torch.arange(max(widths)) < torch.tensor(widths)[:, None]  # what follows is wrong, and read again
                step, _ = self.model(torch.where(own, padded.gather(1, place), 7), offset=start, cache=cache)
                for row, n in enumerate(widths):
                    logits[row, start[row] : start[row] + n] = step[row, :n]
                start = (start + torch.tensor(widths)).clamp(max=T)
            self.assertEqual(start.tolist(), [T] * B)
            torch.testing.assert_close(logits[:, :T], whole, atol=1e-5, rtol=0)

    def test_offset_moves_the_positions(self):
        moved, _ = self.model(self.ids[:1, :20], offset=torch.tensor([50]))
        with torch.no_grad():
            self.model.transformer.wpe.weight[:20] = self.model.transformer.wpe.weight[50:70].clone()
        torch.testing.assert_close(moved, self.model(self.ids[:1, :20])[0])

    def test_both_attention_paths_agree(self):
        """bfloat16 with gradients on a CPU goes by hand, float32 through the fused kernel: equal to bfloat16's 3 digits."""
        model = tiny_model()
        with torch.autocast("cpu", torch.bfloat16):
            by_hand, _ = model(self.ids)
        torch.testing.assert_close(by_hand.float(), model(self.ids)[0], atol=0.05, rtol=0)

    def test_ragged_generation_equals_one_prompt_at_a_time(self):
        begun = data.encode(data.prompt(12345, 678) + data.answer(12345, 678))[:60]  # goes on when the others have ended
        prompts = [*self.prompts, begun]
        ids, lengths = generate(self.model, prompts, 60, temperature=0)
        for row, n, p in zip(ids, lengths, prompts):
            text = list(p)
            for _ in range(60):  # the slow way: the whole prefix again for each token, no cache
                text.append(int(self.model(torch.tensor([text]))[0][0, -1].argmax()))
                tail = text[len(p) :]
                slash = tail.index(data.VOCAB.index("/")) if data.VOCAB.index("/") in tail else len(tail)
                if tail[slash:].count(data.VOCAB.index("\n")) == 2:
                    break
            self.assertEqual(row[:n].tolist(), text)
            self.assertFalse(row[n:].any())
        for one, other in zip(generate(self.model, prompts, 60, temperature=0, static=True), (ids, lengths)):
            self.assertEqual(one.tolist(), other.tolist(), "as an NVIDIA GPU does it: all steps of one shape")

    def test_recorded_steps_write_the_same_text(self):
        ids, lengths = generate(self.model, self.prompts, 60, temperature=0)
        drafts = [row[len(p) : n].tolist() for row, p, n in zip(ids, self.prompts, lengths)]
        on_cuda = functools.partial(model.record, device=torch.device("cuda"))
        with mock.patch.multiple(torch.cuda, CUDAGraph=Tape, graph=lambda tape: tape, device=contextlib.nullcontext), \
                mock.patch("model.record", lambda step, _: on_cuda(step)):
            for given in (None, drafts):
                again = generate(self.model, self.prompts, 60, temperature=0, drafts=given, static=True)
                for one, other in zip(again, (ids, lengths)):
                    self.assertEqual(one.tolist(), other.tolist())

    def oracle(self, a, b):
        """A model that writes the right answer and would go on."""
        truth = torch.tensor(data.encode(data.prompt(a, b) + data.answer(a, b) + "0" * 100))

        class Oracle(GPT):
            def forward(self, idx, offset, cache):
                following = (offset[:, None] + 1 + torch.arange(idx.shape[1])).clamp(max=len(truth) - 1)
                return F.one_hot(truth[following], 40).float() * 100, None

        return Oracle(GPTConfig(block_size=256, n_layer=1, n_head=1, n_embd=4))

    def test_generation_ends_at_the_answers_last_line_break(self):
        text, oracle = data.prompt(12, 34) + data.answer(12, 34), self.oracle(12, 34)
        prompts = [data.encode(data.prompt(12, 34))] * 2
        for temperature in (0, 1.0):
            ids, lengths = generate(oracle, prompts, 200, temperature, torch.Generator().manual_seed(0))
            self.assertEqual([data.decode(row[:n]) for row, n in zip(ids, lengths)], [text, text])
        ids, lengths = generate(oracle, prompts, 10, 0)
        self.assertEqual(data.decode(ids[0, : lengths[0]]), text[: len(prompts[0]) + 10])

    def test_what_does_not_fit_the_block(self):
        with self.assertRaisesRegex(ValueError, "block of 128"):
            self.model(torch.zeros(1, 129, dtype=torch.long))
        with self.assertRaisesRegex(ValueError, "block of 128"):
            generate(self.model, [[0] * 129], 1)
        self.assertEqual(generate(self.model, [[0] * 128], 1)[1].tolist(), [128], "a full row stays as it is")

    def test_a_draft_changes_no_text(self):
        """Greedy, from any draft: right, cut off, wrong, empty, longer than the block."""
        ids, lengths = generate(self.model, self.prompts, 128, temperature=0)
        texts = [row[:n].tolist() for row, n in zip(ids, lengths)]
        right = [text[len(p) :] for text, p in zip(texts, self.prompts)]
        wrong = [[*x[:9], (x[9] + 1) % 40, *x[10:]] for x in right]
        mixed = [right[0], right[1][:20], wrong[2], [], right[4] + [5] * 200]
        for drafts in (right, wrong, mixed):
            for static in (False, True):
                again, n = generate(self.model, self.prompts, 128, temperature=0, drafts=drafts, static=static)
                self.assertEqual([row[:n].tolist() for row, n in zip(again, n)], texts)

    def test_a_good_draft_saves_steps(self):
        """Of an answer's 153 characters one is chosen with the prompt; then 8 a step with the draft, without one by one. A
        character that is wrong, missing or too much costs a few steps: so many find the place again."""
        prompt, right = data.encode(data.prompt(12, 34)), data.encode(data.answer(12, 34))
        wrong, missing, much = [*right[:20], (right[20] + 1) % 40, *right[21:]], right[:20] + right[21:], right[:20] + right[19:]
        for drafts, steps in (([right], 20), ([wrong], 24), ([missing], 24), ([much], 22), (None, 153), ([[]], 153)):
            oracle = self.oracle(12, 34)
            with mock.patch.object(oracle, "forward", side_effect=oracle.forward) as forward:
                generate(oracle, [prompt], 200, 0, drafts=drafts)
            starts = [int(call.args[1][0]) for call in forward.call_args_list]  # the last few may come after the end
            self.assertEqual(sum(start < len(prompt) + len(right) - 1 for start in starts), steps)

    def test_where_a_draft_goes_on(self):
        """Behind the three tokens written, at the place nearest to where it was expected; there if they are not in it."""
        draft = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 6]]).expand(5, -1)
        written = torch.tensor([[1, 2, 3], [1, 2, 3], [2, 3, 5], [3, 2, 1], [3, 5, 6]])
        self.assertEqual(model.go_on(draft, written, torch.tensor([4, 6, 1, 4, 2])).tolist(), [3, 7, 8, 4, 9])

    def test_a_draft_ends_where_the_answer_does(self):
        """The oracle of the right answer, with drafts that go on, stop short, or end at the wrong place, in one batch."""
        right, prompt = data.answer(12, 34), data.encode(data.prompt(12, 34))
        oracle, drafts = self.oracle(12, 34), [right, right + "0000", right + "\n\n/", right[:-1], right[:-3] + "\n", "",
                                               right[:5] + "/\n\n", right[:40]]
        drafts = [data.encode(x) for x in drafts]
        for temperature, static in ((0, False), (1.0, False), (0, True)):
            ids, lengths = generate(oracle, [prompt] * 8, 200, temperature, drafts=drafts, static=static)
            texts = [data.decode(row[:n]) for row, n in zip(ids, lengths)]
            self.assertEqual(texts, [data.prompt(12, 34) + right] * 8)
            self.assertFalse(any(row[n:].any() for row, n in zip(ids, lengths)))

    def test_a_draft_changes_no_distribution(self):
        """Two sampled tokens, drafted by what is likely and by what is not, against the exact probabilities."""
        model, prompt, n = tiny_model(block_size=5, std=0.3), [7, 8, 9], 20000
        with torch.no_grad():
            first = F.softmax(model(torch.tensor([prompt]))[0][0, -1] / 0.5, -1)  # (40,)
            second = F.softmax(model(torch.tensor([prompt + [t] for t in range(40)]))[0][:, -1] / 0.5, -1)  # (40, 40)
        likely = int(first.argmax())
        self.assertGreater(float(first[likely] * second[likely].max()), 0.03, "the draft is written often")
        for draft in ([likely, int(second[likely].argmax())], [int(first.argmin()), 0]):
            rng = torch.Generator().manual_seed(0)
            ids, _ = generate(model, [prompt] * n, 2, 0.5, rng, drafts=[draft] * n)
            pairs = torch.zeros(40, 40).index_put_((ids[:, 3], ids[:, 4]), torch.ones(n), accumulate=True) / n
            exact = first[:, None] * second
            self.assertLess((pairs - exact).abs().max().item(), 0.01)
            for what in (pairs.sum(1) - first, pairs.sum(0) - exact.sum(0)):
                self.assertLess(what.abs().max().item(), 0.015)
            self.assertLess((pairs[likely] / pairs[likely].sum() - second[likely]).abs().max().item(), 0.03)

    def test_split_actions(self):
        ids = torch.tensor([[5, 6, 7, 8, 0], [1, 2, 3, 4, 9]])
        states, actions, mask = split_actions(ids, torch.tensor([2, 3]), torch.tensor([4, 5]))
        self.assertEqual(states.tolist(), [[5, 6, 7, 8], [1, 2, 3, 4]])
        self.assertEqual(actions.tolist(), [[6, 7, 8, 0], [2, 3, 4, 9]])
        self.assertEqual(mask.tolist(), [[0, 1, 1, 0], [0, 0, 1, 1]])  # answers 7 8 and 4 9


class KL(unittest.TestCase):
    def test_alpha_0_is_the_standard_penalty_to_the_last_bit(self):
        torch.manual_seed(0)
        logp, ref_logp, ref_logits = -torch.rand(2, 5), -torch.rand(2, 5), torch.randn(2, 5, 40)
        ref_logits[0, 0] = 0  # certainty 0: 0 ** 0 is 1
        self.assertTrue(torch.equal(kl.prioritized_kl(logp, ref_logp, ref_logits, 0.0), (logp - ref_logp) ** 2 / 2))

    def test_no_gradient_reaches_the_reference(self):
        logp, ref_logp, ref_logits = (
            torch.randn(2, 5, requires_grad=True),
            torch.randn(2, 5, requires_grad=True),
            torch.randn(2, 5, 40, requires_grad=True),
        )
        kl.prioritized_kl(logp, ref_logp, ref_logits, 2.0).sum().backward()
        self.assertIsNone(ref_logp.grad)
        self.assertIsNone(ref_logits.grad)
        self.assertGreater(logp.grad.abs().sum().item(), 0)

    def test_k2s_gradient_is_the_kls_and_k1s_is_zero(self):
        """Expectations over all V actions, enumerated, of the gradient of each estimator as a loss."""
        torch.manual_seed(0)
        logits, ref = torch.randn(40, dtype=torch.double, requires_grad=True), torch.randn(40, dtype=torch.double)
        logp, ref_logp = logits.log_softmax(0), ref.log_softmax(0)

        def gradient(loss):
            return torch.autograd.grad(loss, logits, retain_graph=True)[0]

        exact = gradient((logp.exp() * (logp - ref_logp)).sum())
        k2 = kl.prioritized_kl(logp[None], ref_logp[None], ref.expand(1, 40, 40), alpha=0)[0]
        torch.testing.assert_close(gradient((logp.exp().detach() * k2).sum()), exact)
        torch.testing.assert_close(
            gradient((logp.exp().detach() * (logp - ref_logp)).sum()), torch.zeros(40, dtype=torch.double)
        )
        self.assertGreater(exact.abs().max().item(), 0.01)
        # Drawn from an older policy, as in a second minibatch: only with the ratio, which is not differentiated.
        old = torch.randn(40, dtype=torch.double).softmax(0)
        torch.testing.assert_close(gradient((old * (logp.exp() / old).detach() * k2).sum()), exact)
        self.assertGreater((gradient((old * k2).sum()) - exact).abs().max().item(), 0.01)


class Pretrain(unittest.TestCase):
    def test_muon_makes_updates_orthogonal(self):
        """Singular values of all directions come out near 1 (times the size and the learning rate), whatever they were."""
        rng = torch.Generator().manual_seed(0)
        u, v = (torch.linalg.qr(torch.randn(n, 8, generator=rng))[0] for n in (20, 8))
        p = torch.nn.Parameter(torch.zeros(20, 8))
        p.grad = u @ torch.diag(torch.logspace(1, -0.5, 8)) @ v.T
        pretrain.Muon([p], lr=0.1, weight_decay=0.0).step()
        got = torch.linalg.svdvals(-p.detach()) / (0.1 * 0.2 * 20**0.5)
        self.assertTrue(((got > 0.6) & (got < 1.3)).all(), got)
        cosine = F.cosine_similarity((u @ v.T).flatten(), -p.detach().flatten(), dim=0)
        self.assertGreater(cosine.item(), 0.95)

    def test_muon_is_pytorchs(self):
        if not hasattr(torch.optim, "Muon"):
            self.skipTest("PyTorch has it from 2.9 on")
        start = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((6, 3), (3, 6), (3, 6))]
        ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
        mine = pretrain.Muon(ours, lr=0.1, weight_decay=0.1)
        peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for i in range(4):
            for p, q in zip(ours, theirs):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
                q.grad = p.grad.clone()
            mine.step(), peer.step()
        for p, q, before in zip(ours, theirs, start):
            self.assertGreater((q - before).abs().max().item(), 0.1)
            torch.testing.assert_close(p, q, atol=0.02, rtol=0)  # both round to bfloat16 on the way

    def test_batches(self):
        """Rows are whole worked problems, never held out, at offsets that reach the whole block."""
        batches = pretrain.pretrain_batches(2, 4, 200, 0, CPU)
        used, starts = set(), []
        for _ in range(200):
            ids, prompt_len, lengths, offset = next(batches)
            self.assertLess((lengths.max() - lengths.min()).item(), 70, "rows of a batch are of like length")
            for row, p, n, o in zip(ids, prompt_len.tolist(), lengths.tolist(), offset.tolist()):
                text = data.decode(row[:n])
                a, b = map(int, text[:p].removeprefix("Input:\n").removesuffix("\nTarget:").split("+"))
                self.assertEqual(text, data.prompt(a, b) + data.answer(a, b))
                self.assertFalse(data.held_out(a, b))
                self.assertLessEqual(o + ids.shape[1], 200)
                used |= set(range(o, o + n))
                starts.append(o)
        self.assertEqual(used, set(range(200)))
        self.assertAlmostEqual(np.mean(np.array(starts) == 0), 0.25, delta=0.07)  # 800 rows: 4 sigma is 0.06

    def test_answer_loss_by_hand(self):
        """The mean over the answers' tokens alone: neither the prompt's nor the padding's are predicted."""
        model = tiny_model(std=0.3)
        ids, prompt_len, lengths = pretrain.to_batch([(1, 2), (3, 45)], CPU)
        with torch.no_grad():
            logp = model(ids[:, :128])[0].log_softmax(-1)
            terms = [
                -logp[b, t - 1, ids[b, t]].item()
                for b in range(2)
                for t in range(int(prompt_len[b]), min(128, int(lengths[b])))
            ]
            got = pretrain.answer_loss(model, ids[:, :128], prompt_len, lengths.clamp(max=128)).item()
        self.assertAlmostEqual(got, sum(terms) / len(terms), delta=0.02)  # bfloat16

    def test_answer_loss_moves_with_the_offset(self):
        ids, prompt_len, lengths = pretrain.to_batch([(3, 4)], CPU)
        net = tiny_model(std=0.3)
        with torch.no_grad():
            here, there = (pretrain.answer_loss(net, ids, prompt_len, lengths, torch.tensor([o])) for o in (0, 8))
            moved = tiny_model(std=0.3)
            moved.transformer.wpe.weight[:120] = net.transformer.wpe.weight[8:].clone()
            self.assertNotEqual(here.item(), there.item())
            torch.testing.assert_close(pretrain.answer_loss(moved, ids, prompt_len, lengths), there)

    def test_compiled(self):
        """One graph, traced once, for rows of all lengths and offsets, with the same loss; if it cannot be, one line."""
        batches = list(itertools.islice(pretrain.pretrain_batches(2, 4, 192, 0, CPU), 3))
        net = tiny_model(block_size=192, std=0.3)
        traced = functools.partial(torch.compile, backend="eager")  # as for a GPU, but what it traced runs as it is
        with mock.patch("torch.compile", traced):
            fused = pretrain.compiled(net, next(pretrain.pretrain_batches(1, 4, 192, 0, CPU)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in batches:
                torch.testing.assert_close(pretrain.answer_loss(fused, *batch), pretrain.answer_loss(net, *batch))
        with mock.patch("torch.compile", side_effect=lambda *_, **__: mock.Mock(side_effect=OSError("no compiler\nat all"))):
            with self.assertRaisesRegex(pretrain.UserError, r"^--compile does not work .OSError: no compiler.; leave it out$"):
                pretrain.compiled(net, batches[0])

    def test_learning_rate(self):
        rates = [pretrain.learning_rate(step, 100, 1.0, 10) for step in range(100)]
        picked = [rates[i] for i in (0, 9, 19, 20, 60, 99)]
        np.testing.assert_allclose(picked, [0.1, 1.0, 1.0, 1.0, 0.5, 0.0125])


class PPO(unittest.TestCase):
    def setUp(self):
        self.args = ppo.parse_args(["--minibatches", "1", "--kl_coef", "0.5", "--alpha", "2", "--temperature", "1.5"])
        self.pairs = [(1, 2), (34, 5), (6, 78), (90, 12), (3, 3), (8, 99), (5, 5), (44, 1), (7, 0), (16, 61)]
        self.reference = tiny_model(std=0.25, block_size=48)
        self.policy = tiny_model(std=0.25, block_size=48)
        torch.manual_seed(1)
        self.value_head = ppo.ValueHead(16)
        torch.nn.init.normal_(self.value_head[4].weight)  # it starts at 0, and would say the same everywhere

    def rollout(self):
        batch = ppo.rollout(self.policy, self.value_head, self.reference, self.pairs, self.args, seed=0)
        # A random model never adds: give it rewards, so that there is something to learn.
        rewards = torch.zeros_like(batch["mask"])
        rewards[torch.arange(10), batch["mask"].cumsum(1).argmax(1)] = torch.arange(10) % 2 * 1.0
        batch["advantages"] = ppo.gae(rewards, batch["values"], batch["mask"], 1.0, 1.0)
        return batch

    def sgd(self):
        return torch.optim.SGD(self.policy.parameters(), lr=0.0)  # its gradients stay behind to be looked at

    def test_explained_variance(self):
        returns, mask = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        self.assertEqual(ppo.explained_variance(returns, returns.clone(), mask).item(), 1.0)
        self.assertEqual(ppo.explained_variance(returns, torch.full((1, 3), 0.3), mask).item(), 0.0)
        self.assertTrue(ppo.explained_variance(torch.ones(1, 3), returns, mask).isnan())

    def test_ratio_is_1_at_the_first_minibatch(self):
        batch = self.rollout()
        logits, _ = ppo.tempered(self.policy, batch["states"], self.args.temperature)
        ratio = (ppo.token_logp(logits, batch["actions"]) - batch["old_logp"]).exp()
        self.assertLess(((ratio - 1) * batch["mask"]).abs().max().item(), 1e-5)
        seen = []
        with mock.patch.object(
            ppo, "ppo_loss", side_effect=lambda new, old, a, mask, clip: seen.append((new - old) * mask) or new.sum()
        ):
            ppo.update(self.policy, self.value_head, self.sgd(), batch, self.args, torch.Generator().manual_seed(0))
        self.assertLess(max(x.abs().max().item() for x in seen), 1e-5)
        stats = ppo.update(self.policy, self.value_head, self.sgd(), batch, self.args, torch.Generator().manual_seed(0))
        self.assertEqual(stats["clip_fraction"], 0.0)
        self.assertLess(abs(stats["kl"]), 1e-5, "the policy is still the reference")

    def test_controls_of_the_weight(self):
        """Weights of three answer tokens, two rows, by hand: matched keeps the mean, shuffled the set, mask drops the low."""
        # V = 4: one-hot, uniform over 2, uniform over 4: certainty 1, 1/2, 0; squared 1, 1/4, 0.
        ref_logits = torch.tensor([[[99.0, 0, 0, 0], [9, 9, -99, -99]], [[0, 0, 0, 0], [5, 5, -99, -99]]])
        mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        weights = {}
        for kind in ("certainty", "matched", "shuffled", "mask"):
            args = argparse.Namespace(kl_weight=kind, alpha=2.0, mask_below=0.4)
            weights[kind] = ppo.token_weights(ref_logits, mask, args, torch.Generator().manual_seed(1))
        torch.testing.assert_close(weights["certainty"], torch.tensor([[1, 0.25], [0, 0.25]]))
        torch.testing.assert_close(weights["matched"][mask > 0], torch.full((3,), 1.25 / 3))
        self.assertEqual(sorted(weights["shuffled"][mask > 0].tolist()), sorted(weights["certainty"][mask > 0].tolist()))
        self.assertNotEqual(weights["shuffled"].tolist(), weights["certainty"].tolist())
        torch.testing.assert_close(weights["mask"], weights["certainty"])
        args.mask_below = 0.6
        torch.testing.assert_close(
            ppo.token_weights(ref_logits, mask, args, None), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        )
        # The penalty: logp -1, ref_logp -3 everywhere, k2 = 2, times the weight.
        logp = torch.full((2, 2), -1.0)
        batch = dict(ref_logp=logp - 2, ref_logits=ref_logits, weight=weights["matched"])
        args.kl_weight = "matched"
        torch.testing.assert_close(ppo.kl_penalty(logp, batch, args), 2 * weights["matched"])
        args.kl_weight = "certainty"
        torch.testing.assert_close(ppo.kl_penalty(logp, batch, args), 2 * weights["certainty"])

    def test_one_temperature(self):
        """The log-probabilities are those of the distribution that sampled: full forward, divided by the temperature."""
        with mock.patch.object(pretrain, "generate", side_effect=generate) as sampled:
            batch = self.rollout()
        self.assertEqual(sampled.call_args.args[3], 1.5)
        with torch.no_grad(), ppo.autocast(CPU):
            expected = (
                (self.policy(batch["states"])[0].float() / 1.5)
                .log_softmax(-1)
                .gather(-1, batch["actions"][..., None])[..., 0]
            )
        torch.testing.assert_close(batch["old_logp"], expected)
        torch.testing.assert_close(batch["ref_logp"], expected)

    def test_rollout(self):
        """Reward at the last token, discounted from there; the reference is scored, not the policy a second time."""
        self.args.gamma, self.args.gae_lambda = 0.9, 1.0
        self.reference = tiny_model(seed=7, std=0.25, block_size=48)
        with mock.patch.object(data, "grade", side_effect=[True, False] * 5):
            batch = ppo.rollout(self.policy, self.value_head, self.reference, self.pairs, self.args, seed=0)
        self.assertEqual(batch["success"].tolist(), [1.0, 0.0] * 5)
        for i, (success, mask) in enumerate(zip(batch["success"], batch["mask"])):
            T, start = int(batch["lengths"][i]), int(mask.argmax())
            self.assertEqual(mask.tolist(), [float(start <= t < T) for t in range(len(mask))])
            self.assertEqual(start, len(data.prompt(*self.pairs[i])) - 1)
            got = (batch["advantages"] + batch["values"])[i, start:T]
            torch.testing.assert_close(got, success * 0.9 ** torch.arange(T - start - 1, -1, -1.0), atol=1e-5, rtol=0)
            with torch.no_grad(), ppo.autocast(CPU):
                expected = self.reference(batch["states"][i : i + 1, :T])[0][0] / 1.5
            torch.testing.assert_close(batch["ref_logits"][i, :T], expected, atol=0.05, rtol=0)

    def test_logged_figures(self):
        """Those of one minibatch, against torch.distributions over all answer tokens at once."""
        self.reference = tiny_model(seed=7, std=0.25, block_size=48)
        batch = self.rollout()
        batch["ref_logits"] = batch["ref_logits"] * 8  # surer, so that its certainty is not nearly 0
        batch["weight"] = ppo.token_weights(batch["ref_logits"], batch["mask"], self.args, None)
        got = ppo.update(self.policy, self.value_head, self.sgd(), batch, self.args, torch.Generator().manual_seed(0))
        chosen = batch["mask"] > 0
        logits, hidden = ppo.tempered(self.policy, batch["states"], 1.5)
        pi, ref = (torch.distributions.Categorical(logits=x[chosen]) for x in (logits, batch["ref_logits"]))
        weight = (1 - ref.entropy() / math.log(40)) ** 2
        k2 = (pi.log_prob(batch["actions"][chosen]) - batch["ref_logp"][chosen]) ** 2 / 2
        error = self.value_head(hidden)[chosen] - batch["returns"][chosen]
        expected = dict(kl=torch.distributions.kl_divergence(pi, ref), penalty=weight * k2, entropy=pi.entropy())
        expected |= dict(value_loss=error**2 / 2, weight=weight)
        for name, x in expected.items():
            self.assertGreater(abs(got[name]), 0.001, name)
            self.assertAlmostEqual(got[name] / x.mean().item(), 1, delta=0.02, msg=name)
        batch["old_logp"] = batch["old_logp"] - math.log(2)  # actions that the policy takes twice as often by now
        again = ppo.update(self.policy, self.value_head, self.sgd(), batch, self.args, torch.Generator().manual_seed(0))
        self.assertAlmostEqual(again["penalty"] / got["penalty"], 2, delta=0.02)
        self.assertEqual((got["clip_fraction"], again["clip_fraction"]), (0, 1))
        with mock.patch.object(
            ppo, "solve", side_effect=lambda model, pairs, t: (np.array([a / 10 + (t > 0) / 100 for a, _ in pairs]), [])
        ):
            row = ppo.evaluate(tiny_model(block_size=128), [(1, 1)], [(2, 2)], [(3, 3)], 1.0)
        got = [row[x] for x in ("greedy_n", "sampled_n", "greedy_nk", "sampled_nk")]
        np.testing.assert_allclose(got, [0.1, 0.11, 0.2, 0.21])

    def test_one_epoch_of_one_minibatch_is_a2c(self):
        batch = self.rollout()
        self.args.kl_coef, self.args.entropy_coef = 0.5, 0.5
        with torch.no_grad():
            for p in self.policy.parameters():  # away from the reference, so that the KL penalty has a gradient
                p += 0.01 * torch.randn_like(p)
        batch["ref_logits"] = batch["ref_logits"] * 8  # surer, so that its certainty is not nearly 0
        batch["ref_logp"] = batch["ref_logp"] - 1
        batch["old_logp"] = ppo.token_logp(
            ppo.tempered(self.policy, batch["states"], 1.5)[0], batch["actions"]
        ).detach()
        before = [p.clone() for p in self.policy.parameters()]
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=1.0)
        ppo.update(self.policy, self.value_head, optimizer, batch, self.args, torch.Generator().manual_seed(0))
        updated = [p - q for p, q in zip(before, self.policy.parameters())]
        self.policy.load_state_dict(dict(zip(dict(self.policy.named_parameters()), before)), strict=False)

        # A2C, written out: -A log pi + kl_coef J^alpha (log pi - log ref)^2 / 2 - entropy_coef H, over all answer tokens at once.
        chosen = batch["mask"] > 0
        a = batch["advantages"][chosen]
        a = (a - a.mean()) / max(a.std(correction=0).item(), 0.1)
        dist = torch.distributions.Categorical(logits=ppo.tempered(self.policy, batch["states"], 1.5)[0][chosen])
        logp = dist.log_prob(batch["actions"][chosen])
        weight = (1 - torch.distributions.Categorical(logits=batch["ref_logits"][chosen]).entropy() / math.log(40)) ** 2
        terms = [-a * logp, 0.5 * weight * (logp - batch["ref_logp"][chosen]) ** 2 / 2, -0.5 * dist.entropy()]
        parts = []
        for term in terms:
            parts.append(torch.autograd.grad(term.mean(), self.policy.parameters(), retain_graph=True))
        norms = [torch.stack([g.norm() for g in part]).norm().item() for part in parts]
        self.assertGreater(min(norms), 0.1 * max(norms), "each term counts")
        expected = [sum(gradients) for gradients in zip(*parts)]
        norm = torch.stack([g.norm() for g in expected]).norm()
        for got, g in zip(updated, expected):  # 1% for bfloat16 and the order of summation
            torch.testing.assert_close(got, g * min(1.0, 1 / norm), atol=0.01 * min(1.0, norm.item()), rtol=0)

    def test_padding_changes_nothing(self):
        batch = self.rollout()
        means = []
        for extra in (0, 5):  # the same batch, then with five more columns of rubbish beyond every answer
            padded = {
                name: (
                    x
                    if x.dim() == 1
                    else torch.cat([x, torch.ones_like(x[:, :extra]) * (0 if name == "mask" else 3)], 1)
                )
                for name, x in batch.items()
            }
            policy = tiny_model(std=0.25, block_size=60)
            policy.load_state_dict(
                {name: F.pad(p, (0, 0, 0, 12)) if "wpe" in name else p for name, p in self.policy.state_dict().items()}
            )
            optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
            stats = ppo.update(policy, self.value_head, optimizer, padded, self.args, torch.Generator().manual_seed(0))
            means.append(list(stats.values()) + [policy.transformer.h[0].mlp.c_fc.weight.sum().item()])
        np.testing.assert_allclose(means[0], means[1], rtol=2e-3, atol=2e-3)

    def test_gradient_does_not_depend_on_slices(self):
        batch, gradients = self.rollout(), []
        for size in (1, 3, 100):
            slices = lambda rows, lengths: [(part, int(lengths[part].max())) for part in rows.split(size)]  # noqa: E731
            with mock.patch.object(ppo, "slices", slices):
                ppo.update(self.policy, self.value_head, self.sgd(), batch, self.args, torch.Generator().manual_seed(0))
            gradients.append(torch.cat([p.grad.flatten() for p in self.policy.parameters()]))
        for g in gradients[1:]:
            torch.testing.assert_close(g, gradients[0], atol=0.01 * gradients[0].norm().item(), rtol=0)

    def test_critic_leaves_the_policy_alone(self):
        batch, args = self.rollout(), ppo.parse_args(["--kl_coef", "0", "--entropy_coef", "0", "--minibatches", "1"])
        batch["returns"], batch["advantages"] = torch.full_like(batch["returns"], 50.0), torch.zeros_like(
            batch["advantages"]
        )
        self.value_head.zero_grad()
        ppo.update(self.policy, self.value_head, self.sgd(), batch, args, torch.Generator().manual_seed(0))
        self.assertEqual(sum(p.grad.abs().sum().item() for p in self.policy.parameters()), 0.0)
        self.assertGreater(self.value_head[4].weight.grad.abs().sum().item(), 0.0)

    def test_critical_tokens(self):
        """By hand for one problem, 12+3 with N = 1: line 1 has one comma, in operand 1."""
        found = ppo.critical_tokens(tiny_model(std=0.25, block_size=192), [(12, 3)], 1, 1.0)
        text = data.prompt(12, 3) + data.answer(12, 3)
        with torch.no_grad():
            logits = tiny_model(std=0.25, block_size=192)(torch.tensor([data.encode(text)]))[0][0]
        at = text.index("[1,2]") + 2
        self.assertAlmostEqual(found["p_l1o1"], logits[at - 1].softmax(-1)[data.VOCAB.index(",")].item(), delta=0.01)
        p = [logits[i - 1].softmax(-1)[data.encode(text[i])[0]].item() for i in (at, at + 1, text.index("[1] ") + 1)]
        self.assertAlmostEqual(found["p_critical"], sum(p) / 3, delta=0.01)
        self.assertTrue(math.isnan(found["p_l1o2"]))

    def test_explain_shows_the_flawless_answer_that_costs_most(self):
        pairs = [(12, 3), (45, 1), (7, 8)]
        ids, prompt_len, lengths = pretrain.to_batch(pairs, CPU)
        states, actions, mask = split_actions(ids, prompt_len, lengths)
        actions[2, lengths[2] - 2] = data.encode(" ")[0]  # the third costs more, but has an error
        zeros, ref_logp = torch.zeros_like(mask), -torch.tensor([[1.0], [2.0], [3.0]]) * mask
        batch = dict(states=states, actions=actions, mask=mask, lengths=lengths - 1, success=torch.tensor([1.0, 1.0, 0.0]),
                     old_logp=zeros, ref_logp=ref_logp, ref_logits=torch.zeros(*mask.shape, len(data.VOCAB)),
                     weight=mask, advantages=zeros)
        _, printed = quiet(ppo.explain, batch, pairs, ppo.parse_args(["--alpha", "0"]))
        self.assertIn("Input:\n45+1\nTarget:", printed)
        self.assertIn("reward 1 (no error)", printed)
        self.assertRegex(printed, r"2\.0000 +0\.0000 +1\.000 +2\.0000")  # log-ratio, certainty, weight, 2^2 / 2
        actions[0, lengths[0] - 2] = actions[2, lengths[2] - 2]  # before training nothing costs anything:
        _, printed = quiet(ppo.explain, batch | dict(ref_logp=zeros), pairs, ppo.parse_args(["--alpha", "0"]))
        self.assertIn("Input:\n45+1\nTarget:", printed, "the only one without an error")


class Analyze(unittest.TestCase):
    def test_first_error_and_where(self):
        right = WORKED
        self.assertIsNone(data.first_error(right, 367, 28))
        self.assertEqual(data.first_error(right[:50], 367, 28), 50)
        wrong = right.replace("[2,8]", "[2,2]")
        self.assertEqual(data.first_error(wrong, 367, 28), right.index("8] , A"))
        for part, where in (
            ("nput", "prompt"),
            ("scratch", "tag"),
            ("8] , A", "line 1, operand 2"),
            ("3,6,7", "line 1, operand 1"),
            ("15 , A", "line 1, sum"),
            ("6] + [2]", "line 2, operand 1"),
            ("[] + []", "line 4, operand 1"),
            ("</scr", "tag"),
            ("3 9 5", "result"),
        ):
            self.assertEqual(data.place(367, 28, right.index(part)), where)
        self.assertEqual(data.describe_error(wrong, 367, 28), "line 1, operand 2: wrote '2' for '8'")
        self.assertEqual(data.describe_error(right[:-1], 367, 28), "result: wrote '' for '\\n'")
        self.assertEqual(data.describe_error(right, 367, 28), "no error")

    def test_table_1_by_hand(self):
        text = WORKED
        sure = np.ones(len(text))
        critical = data.critical_positions(367, 28, 2)
        for i in critical.values():
            sure[i] = 0.5
        n = len(text) - len(data.prompt(367, 28))
        rows = analyze.table_1([text], [(367, 28)], [sure], 2)
        self.assertAlmostEqual(
            rows["critical (mean)"][0], 0.5 - (n - 5 + 4 * 0.5) / (n - 1)
        )  # four others are critical as well
        self.assertAlmostEqual(rows["non-critical (mean)"][0], 1 - (n - 6 + 5 * 0.5) / (n - 1))

    def test_table_1_counts_only_up_to_the_first_error(self):
        text, start = WORKED.replace("[3,6,7]", "[3,6,9]"), len(data.prompt(367, 28))
        sure = np.ones(len(text))
        sure[text.index("9]")] = 0.2  # the critical digit, wrong: the last token that counts
        sure[text.index("9]") + 1 :] = 0.0
        rows = analyze.table_1([text, "X"], [(367, 28), (367, 28)], [sure, np.ones(1)], 2)
        n = text.index("9]") - start + 1
        self.assertAlmostEqual(rows["critical (least certain)"][0], 0.2 - 1.0)  # all the others are certain
        self.assertAlmostEqual(
            rows["critical (mean)"][0], (0.2 - 1.0 + 1 - (n - 2 + 0.2) / (n - 1)) / 2
        )  # comma, digit
        self.assertEqual(len(rows["critical (mean)"]), 1, "an answer without tokens has no row")

    def test_errors_by_hand(self):
        """Six answers to 12+3 with N = 1: two right, two wrong from a critical comma on, of which one recovers, two others."""
        enter_a_new_folder(self)
        good = data.prompt(12, 3) + data.answer(12, 3)
        index = data.critical_positions(12, 3, 1)[1, 1, "comma1"]
        stray = good[:index] + "]" + good[index:]  # the list is closed early; the result is right all the same
        texts = [good, good, stray, good[:index] + "]", good[:-5], good.replace("1 5\n", "1 6\n")]
        pairs = [(12, 3)] * 6
        self.assertEqual(analyze.first_wrong(texts, pairs, 1), [None, None, "critical", "critical", "other", "other"])
        correct = np.array([data.grade(text, 12, 3) for text in texts])
        self.assertEqual(correct.tolist(), [True, True, True, False, False, False])
        with mock.patch.object(analyze, "answers", return_value=(None, 1, pairs, correct, texts, "how")):
            _, printed = quiet(analyze.main, ["errors", "model.pt"])
        counts = re.findall(r"(\d+) of (\d+)\n", printed)
        self.assertEqual(counts, [("1", "3"), ("1", "2"), ("2", "2"), ("2", "4")])

    def test_certainty_by_place(self):
        """A model that always expects the same token: every other one is wrong, and each token of the answer counts once."""
        model = tiny_model(block_size=192)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()  # all logits are 0: certainty 0, and the most likely token is the first, the line break
        places = analyze.certainty_by_place(model, [(12, 3)], 1)
        self.assertEqual(sum(map(len, places.values())), len(data.answer(12, 3)))
        self.assertEqual(len(places["line 1, operand 1, critical"]), 2)
        wrong = sum(wrong for values in places.values() for _, wrong, _ in values)
        self.assertEqual(wrong, len(data.answer(12, 3).replace("\n", "")))
        self.assertEqual({sure for values in places.values() for sure, _, _ in values}, {0.0})
        with torch.no_grad():  # logits 3 for the line break and 0 for the other 39: at temperature 3 its odds are e to 1
            model.transformer.ln_f.bias[0] = model.lm_head.weight[0, 0] = 3**0.5
        (_, _, nats), *_ = analyze.certainty_by_place(model, [(12, 3)], 1, temperature=3.0)["tag"]
        self.assertAlmostEqual(nats, math.log(math.e + 39) - 1, places=5)
        with torch.no_grad():
            model.lm_head.weight[0, 0] = 0.0
        enter_a_new_folder(self)
        with mock.patch.object(analyze, "answers", return_value=(model, 1, [(12, 3)], None, [], "how")):
            _, printed = quiet(analyze.main, ["certainty", "model.pt"])
        self.assertRegex(printed, r"line 1, operand 1, critical +2 +0.0000 +0.0000 +100.0% +3.689")  # log 40
        self.assertIn(f"a KL of {len(data.answer(12, 3)) * math.log(40):.2f} nats an answer", printed)
        self.assertRegex(printed, r"alpha +0 +1 +3 .*\n +100% +0% +0%")
        half = {"x": [(0.5, 0.0, 3.0), (1.0, 0.0, 1.0)]}  # left at alpha 1: (1.5 + 1) / 4; at 3: (3 / 8 + 1) / 4
        with mock.patch.object(analyze, "answers", return_value=(model, 1, [(12, 3)], None, [], "how")), \
             mock.patch.object(analyze, "certainty_by_place", return_value=half | {"x, critical": [(1.0, 1.0, 0.0)]}):
            _, printed = quiet(analyze.main, ["certainty", "model.pt"])
        self.assertRegex(printed, r"a KL of 4.00 nats(?s:.*)100% +62% +34% +25%")
        self.assertTrue(os.path.exists("out/figures/certainty.png"))

    def test_curves_with_a_band(self):
        with tempfile.TemporaryDirectory() as folder:
            for alpha, seed in itertools.product((0.0, 3.0), (0, 1)):
                run = f"{folder}/{alpha}_{seed}"
                args = argparse.Namespace(out=run, fresh=False, alpha=alpha, seed=seed)
                log = pretrain.Run(args, ["episodes", "success", "kl", "seconds"])
                for i in range(5):
                    log.log(i, dict(episodes=i, success=i / 10 + seed, kl=math.nan if i == 0 else alpha), last=i == 4)
            with mock.patch.object(analyze, "save_figure") as saved:
                analyze.main(["curves", *[f"{folder}/{name}" for name in sorted(os.listdir(folder))]])
        axis = saved.call_args.args[0].axes[0]
        np.testing.assert_allclose(axis.lines[1].get_ydata(), np.arange(5) / 10 + 0.5)  # the mean of two seeds
        self.assertEqual([line.get_label() for line in axis.lines], ["alpha 0 (2 runs)", "alpha 3 (2 runs)"])
        band = axis.collections[0].get_paths()[0].vertices
        self.assertEqual((band[:, 1].min(), band[:, 1].max()), (0.0, 1.4), "resampling two seeds reaches both")

    def test_accuracy_rows_by_hand(self):
        """Three runs: two seeds of one setting, averaged, and another setting, named by what differs."""
        def run(alpha, seed, score):
            table = {"varying 6": [score, score - 0.1, score + 0.1]}
            log = dict(kl=np.array([0, score / 10]))
            return dict(alpha=alpha, lr=0.1, seed=seed), (dict(before=table, after=table), log)
        def rounded(runs):
            return [(label, n, [x.round(6).tolist() for x in cells], kl) for label, n, cells, kl in analyze.accuracy_rows(runs)]
        self.assertEqual(rounded([run(0.0, 0, 0.5), run(0.0, 1, 0.5), run(3.0, 0, 0.25)]), [
            ("before", 2, [[50, 50, 50]], ""), ("alpha 0", 2, [[50, 50, 50]], "0.0500"),
            ("before", 1, [[25, 15, 35]], ""), ("alpha 3", 1, [[25, 15, 35]], "0.0250"),
        ])  # fmt: skip
        repeats = [(settings | dict(checkpoint=model), what) for model, seed, score in (("a", 0, 0.0), ("a", 1, 0.5), ("b", 0, 0.25))
                   for settings, what in [run(3.0, seed, score)]]
        self.assertEqual(rounded(repeats)[1][2], [[25, 25, 25]], "each model counts once")
        enter_a_new_folder(self)
        os.mkdir("r")
        pretrain.write_file("r/settings.json", b'{"digits": 1}')
        pretrain.write_file("r/log.csv", b"step,loss\n1,2\n")
        with self.assertRaisesRegex(pretrain.UserError, "^r is not the folder of a finished run"):
            analyze.main(["accuracy", "r"])
        pretrain.save_tables("r", after={("identical", 2): (0.25, 0.0, 1.0), ("varying", 2): (1.0, 1.0, 1.0)})
        _, printed = quiet(analyze.main, ["accuracy", "r"])
        self.assertIn("| setting | runs | identical N+1 | varying N+1 | KL |", printed)
        self.assertIn("| all runs | 1 | 25.0 [0.0, 100.0] | 100.0 [100.0, 100.0] |  |", printed)
        os.mkdir("s")
        pretrain.write_file("s/settings.json", b'{"digits": 4}')
        pretrain.write_file("s/log.csv", b"step,loss\n1,2\n")
        pretrain.save_tables("s", after={("identical", 5): (0.5, 0.25, 0.75), ("varying", 5): (0.5, 0.25, 0.75)})
        _, printed = quiet(analyze.main, ["accuracy", "r", "s"])  # N+1 is N+1, whatever N
        self.assertIn("| digits 1 | 1 | 25.0 [0.0, 100.0] | 100.0 [100.0, 100.0] |  |\n| digits 4 | 1 | 50.0 [25.0, 75.0] |", printed)
        self.assertEqual(os.listdir("out/figures"), ["accuracy.png"])
        pretrain.save_tables("s", after={("identical", 6): (0.5, 0.25, 0.75)})
        with self.assertRaisesRegex(pretrain.UserError, "^s has other tables than r"):
            analyze.main(["accuracy", "r", "s"])
        pretrain.write_file("s/log.csv", b"iteration,kl\n0,\n")
        with self.assertRaisesRegex(pretrain.UserError, "^s is a run without an iteration"):
            analyze.main(["accuracy", "s"])

    def test_groups_and_labels(self):
        runs = [(dict(alpha=a, seed=s, lr=1), {"x": a}) for a in (0, 3) for s in (0, 1)]
        self.assertEqual({k: len(v) for k, v in analyze.group_runs(runs).items()}, {"alpha 0": 2, "alpha 3": 2})

    def test_a_run_is_no_repeat_of_itself(self):
        with self.assertRaisesRegex(pretrain.UserError, "leave one out"):
            analyze.group_runs([(dict(alpha=0, seed=1), "x"), (dict(alpha=0, seed=1), "y")])
        groups = analyze.group_runs([(dict(alpha=0, seed=1), "x"), (dict(alpha=0, kl_weight="mask", seed=1), "y")])
        self.assertEqual(groups, {"kl_weight None": ["x"], "kl_weight mask": ["y"]})  # a log older than the option

    def test_labels_where_much_differs(self):
        runs = [(dict(a=1, b=0.5, c=3, seed=i), i) for i in range(2)] + [(dict(a=2, b=0.5, c=3, seed=0), 2)]
        runs += [(dict(a=1, b=0.25, c=3, seed=0), 3), (dict(a=1, b=0.5, c=4, seed=0), 4)]
        groups = {"a 1, b 0.5, c 3": [0, 1], "a 2": [2], "b 0.25": [3], "c 4": [4]}
        self.assertEqual(analyze.group_runs(runs), groups)
        groups = {"the first": [0, 1], "a 2": [2], "b 0.25": [3], "c 4": [4], "d 7": [5]}
        self.assertEqual(analyze.group_runs([*runs, (dict(a=1, b=0.5, c=3, d=7, seed=0), 5)]), groups)

    def test_compare_by_hand(self):
        """Made-up runs: greedy_nk 0.2, nan, 0.6, 1.0 at 0, 10, 20, 40 episodes, and final accuracies by seed."""
        log = dict(episodes=np.array([0.0, 10, 20, 40]), greedy_nk=np.array([0.2, np.nan, 0.6, 1.0]))
        log["success"] = np.array([np.nan, 0.2, 0.4, 0.9])
        tables = dict(after={"identical N": [0.9, 1, 1], "identical N+1": [0.3, 0, 1], "varying N": [1.0, 1, 1], "varying N+1": [0.7, 0.6, 0.8]})
        measured, episodes = analyze.outcome(tables, log)
        self.assertEqual({name: round(x, 9) for name, x in measured.items()}, dict(identical=0.3, varying=0.7, kept=0.9, success=0.5))
        self.assertAlmostEqual(episodes, 30)  # half-way from 0.6 at 20 to 1.0 at 40
        log["greedy_nk"] = np.array([0.2, np.nan, 0.6, 0.7])
        self.assertTrue(np.isnan(analyze.outcome(tables, log)[1]), "never reached")
        log["greedy_nk"] = np.array([0.9, np.nan, 0.6, 0.7])
        self.assertEqual(analyze.outcome(tables, log)[1], 0)
        self.assertEqual(analyze.units({("m0", 0): 1, ("m0", 1): 3, ("m1", 0): 10}), [2, 10], "a model counts once")
        self.assertEqual(analyze.units({("m0", 0): 1, ("m0", 1): 3}), [1, 3], "of one model, each seed")
        points = {("m0", 0): np.array([1, 2]), ("m0", 1): np.array([3, 4]), ("m1", 0): np.array([10, 10])}  # of a curve
        np.testing.assert_array_equal(analyze.units(points), [[2, 3], [10, 10]])
        enter_a_new_folder(self)
        for alpha, seed, final in ((0, 1, 0.5), (0, 2, 0.7), (100, 1, 0.9), (100, 2, 0.9)):
            folder = f"a{alpha}s{seed}"
            os.mkdir(folder)
            pretrain.write_file(f"{folder}/settings.json", json.dumps(dict(alpha=alpha, seed=seed, digits=5)).encode())
            pretrain.write_file(f"{folder}/log.csv", f"iteration,episodes,success,greedy_nk\n0,0,,0.4\n1,10,0.{alpha}1,\n2,20,0.{seed},0.8\n".encode())
            table = {(mode, n): (x, x, x) for mode, x in (("identical", final / 2), ("varying", final)) for n in (5, 6)}
            table["identical", 5] = (1 - alpha / 1000,) * 3
            pretrain.save_tables(folder, before=table, after=table)
        for verb in ("alpha", "controls"):
            _, printed = quiet(analyze.main, [verb, "a0s1", "a0s2", "a100s1", "a100s2"])
            first = "| alpha 0 | 2 | 30.0 [25.0, 35.0] |  | 60.0 [50.0, 70.0] |  | 100.0 [100.0, 100.0] |  | 8.0 [5.5, 10.5] |  | 2 of 2 | 20 |"
            self.assertIn(first, printed)  # success: (0.01 + 0.1) / 2 and (0.01 + 0.2) / 2
            row = ("| alpha 100 | 2 | 45.0 [45.0, 45.0] | +15.0 [+10.0, +20.0] | 90.0 [90.0, 90.0] | +30.0 [+20.0, +40.0] "
                   "| 90.0 [90.0, 90.0] | -10.0 [-10.0, -10.0] | 12.5 [10.0, 15.0] | +4.5 [+4.5, +4.5] | 2 of 2 | 20 |")
            self.assertIn(row, printed)  # (0.1001 + 0.1) / 2 and (0.1001 + 0.2) / 2
            self.assertTrue(os.path.exists(f"out/figures/{verb}.png"))
        _, printed = quiet(analyze.main, ["alpha", "a100s1", "a100s2", "a0s1", "a0s2"])
        self.assertIn(first, printed, "alpha begins with the smallest")
        _, printed = quiet(analyze.main, ["controls", "a100s1", "a100s2", "a0s1", "a0s2"])
        self.assertIn("| 90.0 [90.0, 90.0] |  |", printed, "controls with what is given first")

    def test_frontier_by_hand(self):
        """Two models, two coefficients and one run without a penalty; a model with two seeds counts once."""
        def run(alpha, coef, model, seed, score, kl):
            table = {"identical N": [1.0, 1, 1], "identical N+1": [score / 2, 0, 1], "varying N": [1.0, 1, 1], "varying N+1": [score, 0, 1]}
            log = dict(kl=np.array([0, kl]), ce_old=np.array([9, kl / 2]), sampled_n=np.array([0.3, 0.25]))
            return dict(alpha=alpha, kl_coef=coef, checkpoint=model, seed=seed), (dict(before=table, after=table), log)
        points = analyze.frontier_points([
            run(0.0, 0.1, "a", 0, 0.2, 0.5), run(0.0, 0.1, "a", 1, 0.4, 0.5), run(0.0, 0.1, "b", 0, 0.5, 1.5),
            run(0.0, 0.3, "a", 0, 0.1, 0.25), run(3.0, 0.0, "a", 0, 0.75, 2.0)])  # fmt: skip
        self.assertEqual({method: list(by_coef) for method, by_coef in points.items()}, {"alpha 0": [0.1, 0.3], "alpha 3": [0.0]})
        n, columns = points["alpha 0"][0.1]
        self.assertEqual((n, list(columns)), (3, ["identical N+1", "varying N+1", "kl", "ce_old", "sampled_n"]))
        means = {"identical N+1": 0.2, "varying N+1": 0.4, "kl": 1.0, "ce_old": 0.5, "sampled_n": 0.25}
        for column, mean in means.items():  # the model a has 0.3, the model b 0.5
            self.assertAlmostEqual(columns[column][0], mean)
        self.assertEqual(columns["kl"][1:], (0.5, 1.5), "resampling two models reaches both")
        self.assertEqual(points["alpha 3"][0.0][1]["varying N+1"], (0.75, 0.75, 0.75))

    def test_all_and_frontier(self):
        enter_a_new_folder(self)
        patterns = {pattern for patterns, _ in analyze.ALL.values() for pattern in patterns.split()}
        for seed, folder in enumerate(sorted({f"runs/{pattern.replace('*', str(i))}" for pattern in patterns for i in (0, 3)})):
            os.makedirs(folder)
            settings = dict(alpha=3.0 * folder.endswith("3"), kl_coef=0.1, seed=seed, digits=5)
            settings = settings if folder.split("/")[1] not in ("pretrain", "levels") else dict(seed=seed, digits=5)
            pretrain.write_file(f"{folder}/settings.json", json.dumps(settings).encode())
            log = "iteration,episodes,kl,success,greedy_n,sampled_n,greedy_nk,ce_old,p_critical,p_l1o1\n"
            log += f"0,0,,,1,1,0.4,0.1,0.5,0.5\n1,10,0.{1 + 3 * folder.endswith('3')},0.5,1,0.75,0.8,0.2,0.6,0.6\n"
            pretrain.write_file(f"{folder}/log.csv", log.encode())
            table = {("identical", 6): (0.25, 0.2, 0.3), ("varying", 6): (0.5, 0.4, 0.6)}
            pretrain.save_tables(folder, **(dict(before=table) if "alpha" in settings else {}), after=table)
        _, printed = quiet(analyze.main, ["all", "--runs", "runs"])
        self.assertIn("| alpha 3 | 0.1 | 2 | 0.250 [0.250, 0.250] | 0.500 [0.500, 0.500] | 0.4000 [0.4000, 0.4000] | 0.20000 [0.20000, 0.20000] | "
                      "0.75 [0.75, 0.75] |", printed)
        for name in ("exponents/alpha", "places/controls", "level7/curves", "temperature_1_curves/critical",
                     "default_curves/drift", "lr_5e-4_all/frontier"):
            self.assertTrue(os.path.exists(f"out/figures/{name}.png"), name)
        for verb in ("alpha", "controls", "frontier"):
            pretrain.write_file("runs/pretrain/0/log.csv", b"step,loss\n1,2\n")
            with self.assertRaisesRegex(pretrain.UserError, "^runs/pretrain/0 is not a run of ppo.py"):
                analyze.main([verb, "runs/results/alpha0_0", "runs/pretrain/0"])
        pretrain.save_tables("runs/pretrain/0", after={("varying", 3): (0.5, 0.4, 0.6)})
        with self.assertRaisesRegex(pretrain.UserError, "other tables"):
            analyze.main(["accuracy", "runs/results/alpha0_0", "runs/pretrain/0"])
        pretrain.write_file("runs/pretrain/0/accuracies.json", b"[1]")
        with self.assertRaisesRegex(pretrain.UserError, "not the folder of a finished run"):
            analyze.main(["accuracy", "runs/pretrain/0"])
        with self.assertRaisesRegex(pretrain.UserError, "^no runs are nowhere"):
            analyze.main(["all", "--runs", "nowhere"])
        pretrain.write_file("runs/results/alpha3_3/settings.json", b'{"alpha": 3, "seed": 0, "lr": 1, "digits": 5}')
        with self.assertRaisesRegex(pretrain.UserError, "more than alpha"):
            analyze.main(["alpha", "runs/results/alpha0_0", "runs/results/alpha3_3"])

    def test_speed(self):
        """Every row is there; the count of operations, worked out by hand."""
        config = GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=2)
        # 3 tokens: 2 * (2*6 + 2*2 + 2*8 + 8*2) for qkv, proj and the two of the MLP, 2 * 2*10 for the logits, 4 * 2 * 5 for attention
        self.assertEqual(analyze.operations(config, 3, 5), 3 * (2 * 48 + 40 + 40))
        tiny = dict(n_layer=1, n_head=2, n_embd=16)
        enter_a_new_folder(self)
        pretrain.save_checkpoint("model.pt", tiny_model(block_size=192), digits=1, task="add")
        options = "--repeats 1 --digits 1 --device cpu --checkpoint model.pt"
        with mock.patch.object(analyze, "SIZES", [("batch", 2), ("width", 64)]), mock.patch.dict(analyze.PRESETS, small=tiny):
            _, printed = quiet(analyze.main, ["speed", *options.split()])
        for row in ("pre-training, 8 steps", "plain:", "from drafts", "without a cache", "prefill", "decode", "score", "update", "batch   2",
                    "width   64", "  temperature 2, 0% right"):
            self.assertIn(row, printed)
        reached = [int(x) for x in re.findall(r" (\d+)%", printed)]
        self.assertGreaterEqual(len(reached), 6)

    def test_bootstrap(self):
        mean, low, high = pretrain.bootstrap(np.arange(100) < 30)
        self.assertEqual(mean, 0.3)
        self.assertAlmostEqual(low, 0.3 - 1.96 * math.sqrt(0.21 / 100), delta=0.02)  # the normal approximation
        self.assertAlmostEqual(high, 0.3 + 1.96 * math.sqrt(0.21 / 100), delta=0.02)


class Scripts(unittest.TestCase):
    """The scripts as a user calls them: what goes wrong, and one run that learns."""

    def setUp(self):
        enter_a_new_folder(self)

    def save(self, path="model.pt", digits=1, **config):
        pretrain.save_checkpoint(path, tiny_model(**config), digits=digits, task="add")
        return path

    def fails(self, script, argv, *words):
        with self.assertRaises(pretrain.UserError) as caught:
            quiet(script.main, argv)
        message = str(caught.exception)
        for word in words:
            self.assertIn(word, message)
        self.assertNotIn("\n", message)

    def test_settings_that_cannot_work(self):
        self.fails(pretrain, ["--digits", "9", "--block_size", "400"], "--block_size 758")
        self.fails(pretrain, ["--unheard_of", "1"], "--unheard_of", "--help")
        bad = {"digits": ["0", "-3", "5000", "five"], "seed": ["-1"], "device": ["abacus", "meta"]}
        bad_ppo = bad | {
            name: ["nan", "-1", "inf"] for name in ("alpha", "kl_coef", "lr", "value_lr", "entropy_coef", "clip")
        }
        bad_ppo |= dict(
            temperature=["0", "nan"], gamma=["1.1"], gae_lambda=["-0.1"], extra_digits=["0"], episodes=["0"]
        )
        bad_ppo |= dict(
            minibatches=["0", "65"], epochs=["0"], iterations=["-1"], eval_every=["0"], final_problems=["0"]
        )
        bad_pretrain = bad | dict(steps=["0"], batch_size=["0"], lr=["nan", "-1"], warmup=["0"], block_size=["-1"])
        for script, options in ((pretrain, bad_pretrain), (ppo, bad_ppo)):
            for name, values in options.items():
                for value in values:
                    self.fails(script, [f"--{name}", value], name, "")
        for options in (["--problems", "0"], ["--show", "0"], ["--temperature", "nan"], ["--extra_digits", "-5"]):
            self.fails(analyze, ["tokens", "model.pt", *options], options[0])
        self.assertEqual(os.listdir(), [], "nothing was written")

    def test_a_run_that_diverges_says_so(self):
        self.fails(
            pretrain,
            ["--digits", "1", "--steps", "6", "--lr", "1000", "--warmup", "1", "--device", "cpu"],
            "is nan at step",
            "--lr",
        )
        self.assertFalse([name for _, _, names in os.walk(".") for name in names if name == "model.pt"])

    def test_checkpoints_that_do_not_fit(self):
        path = self.save(block_size=192)
        self.fails(ppo, ["--checkpoint", "nowhere.pt"], "nowhere.pt", "pretrain.py")
        self.fails(ppo, ["--checkpoint", path, "--digits", "2"], "--digits 1")
        self.fails(ppo, ["--checkpoint", path, "--digits", "1", "--extra_digits", "2"], "--block_size 242")
        self.fails(analyze, ["tokens", path, "--extra_digits", "2"], "block of 242")
        self.fails(analyze, ["curves", "nowhere"], "nowhere")
        with open(path, "rb") as f:
            good = f.read()
        for cut in (0, 1, 100, len(good) // 2, len(good) - 1):
            with open("cut.pt", "wb") as f:
                f.write(good[:cut])
            self.fails(ppo, ["--checkpoint", "cut.pt", "--digits", "1"], "cut.pt", "pretrain.py")
        for foreign in (
            [1, 2, 3],
            {"model": {}},
            torch.zeros(3),
            {"vocab": data.VOCAB, "config": {"width": 3}, "model": {}},
            {"vocab": "abc"},
        ):
            pretrain.write_file("foreign.pt", pretrain.to_bytes(foreign))
            self.fails(ppo, ["--checkpoint", "foreign.pt", "--digits", "1"], "foreign.pt")
        with open("text.pt", "w") as f:
            f.write("not a checkpoint at all")
        self.fails(analyze, ["tokens", "text.pt"], "text.pt")

    def test_the_other_task_and_explain(self):
        """Subtraction from end to end, without its name anywhere but in data.py; then one episode token by token."""
        base = "--digits 1 --task subtract --device cpu --out".split()
        quiet(pretrain.main, [*base, "p", "--steps", "3", "--eval_problems", "4"])
        self.fails(ppo, ["--digits", "1", "--checkpoint", "p/model.pt"], "--task subtract")
        rl = [*base, "r", "--checkpoint", "p/model.pt", *"--episodes 4 --final_problems 4 --eval_problems 4".split()]
        quiet(ppo.main, [*rl, "--iterations", "1"])
        _, printed = quiet(ppo.main, [*rl, "--iterations", "1", "--explain"])
        self.assertRegex(printed, r"Input:\n\d\d?-\d\d?\nTarget:")
        self.assertRegex(printed, r"reward [01] .*; mean reward of 4 episodes")
        self.assertLessEqual(max(map(len, printed[printed.index("character") :].splitlines())), 100)
        quiet(analyze.main, ["tokens", "r/model.pt", "--problems", "4", "--device", "cpu"])
        for name in ("model", "kl", "pretrain", "ppo", "analyze"):
            with open(os.path.join(HERE, name + ".py")) as f:
                self.assertNotRegex(f.read(), '"(add|subtract)"')

    def test_a_pickle_that_would_run_code_is_refused(self):
        class Malicious:
            def __reduce__(self):
                return os.mkdir, ("owned",)

        pretrain.write_file("malicious.pt", pretrain.to_bytes({"vocab": data.VOCAB, "config": Malicious()}))
        self.fails(analyze, ["tokens", "malicious.pt"], "malicious.pt", "UnpicklingError")
        self.assertFalse(os.path.exists("owned"))

    def test_unwritable_output(self):
        with open("file", "w") as f:
            f.write("in the way")
        path = self.save(block_size=192)
        self.fails(pretrain, ["--out", "file/run"], "file/run", "--out")
        self.fails(ppo, ["--checkpoint", path, "--digits", "1", "--out", "file/run"], "--out")
        with open("file") as f:
            self.assertEqual(f.read(), "in the way")

    def test_exit_code_2_and_one_line(self):
        for script, argv in (
            ("ppo.py", ["--alpha", "nan"]),
            ("pretrain.py", ["--digits", "0"]),
            ("analyze.py", ["tokens", "nowhere.pt"]),
        ):
            done = subprocess.run([sys.executable, os.path.join(HERE, script), *argv], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1), done.stderr)
            self.assertTrue(done.stderr.startswith(f"{script}: error: "))

    def test_out_of_memory_is_one_line_and_other_errors_are_not(self):
        def run_out():
            torch.zeros(2**60)  # PyTorch's own error on a CPU
        for error in (MemoryError("all gone"), torch.cuda.OutOfMemoryError("all gone"), run_out):
            main = error if error is run_out else mock.Mock(side_effect=error)
            with mock.patch("sys.stderr", io.StringIO()) as stderr, self.assertRaises(SystemExit) as caught:
                pretrain.start(main)
            self.assertEqual(caught.exception.code, 2)
            self.assertRegex(stderr.getvalue(), r"^out of memory .*; lower the batch, the episodes or the block\n$")
        for error in (NotImplementedError("exercise 3"), RuntimeError("shapes do not fit")):
            with self.assertRaises(type(error)):
                pretrain.start(mock.Mock(side_effect=error))

    def test_checkpoint_round_trip(self):
        path = self.save(block_size=192, std=0.3)
        model, facts = pretrain.load_checkpoint(path, CPU)
        self.assertEqual(facts["digits"], 1)
        for name, p in tiny_model(block_size=192, std=0.3).state_dict().items():
            self.assertTrue(torch.equal(p, model.state_dict()[name]), name)
        self.assertEqual(os.listdir(), [path])

    def test_same_seed_same_run(self):
        tiny = "--digits 1 --preset narrow --steps 4 --batch_size 2 --eval_problems 4 --device cpu --out".split()
        rl = "--digits 1 --iterations 2 --episodes 4 --eval_problems 4 --final_problems 4 --eval_every 1 --device cpu"
        results = {}
        for name, seeds in (("a", "00"), ("same", "00"), ("other model", "10"), ("other rl", "01")):
            torch.seed()  # whatever the global generator holds
            quiet(pretrain.main, [*tiny, name, "--seed", seeds[0]])
            torch.seed()
            quiet(
                ppo.main, [*rl.split(), "--checkpoint", f"{name}/model.pt", "--seed", seeds[1], "--out", f"{name}/rl"]
            )
            with open(f"{name}/rl/log.csv", newline="") as f:
                log = [dict(row, seconds=0, tokens_per_s=0) for row in csv.DictReader(f)]
            self.assertEqual([int(row["iteration"]) for row in log], [0, 1, 2])
            self.assertEqual(list(log[0]), ppo.COLUMNS)
            weights = pretrain.load_checkpoint(f"{name}/rl/model.pt", CPU)[0].state_dict()
            results[name] = (log, [p.tolist() for p in weights.values()])
        self.assertEqual(results["a"], results["same"])
        self.assertNotEqual(results["a"][0], results["other model"][0])
        self.assertNotEqual(results["a"][0], results["other rl"][0])

    def test_sweep(self):
        """Two settings by two models: a broken run is named, the same command goes on, finished runs are left alone."""
        self.save("m0.pt", block_size=192)
        options = "sweep s checkpoint=m0.pt,m1.pt alpha=0,3 digits=1 iterations=1 episodes=2 eval_problems=2 final_problems=2 device=cpu"
        folders = [f"s/checkpointm{m}.pt_alpha{a}_digits1_iterations1_episodes2_eval_problems2_final_problems2_devicecpu"
                   for m in (0, 1) for a in (0, 3)]
        self.fails(analyze, options.split(), "2 of the runs failed", folders[2] + "/output.txt")
        self.assertEqual(sorted(os.listdir("s")), [os.path.basename(folder) for folder in folders])
        with open(folders[2] + "/output.txt") as f:
            self.assertIn("cannot read m1.pt", f.read())
        finished = [os.stat(folder + "/output.txt").st_mtime_ns for folder in folders[:2]]
        self.save("m1.pt", block_size=192)
        _, printed = quiet(analyze.main, options.split())
        self.assertIn("all 4 runs are in s;", printed)
        self.assertEqual([os.stat(folder + "/output.txt").st_mtime_ns for folder in folders[:2]], finished)
        settings = [analyze.load_finished([folder])[0][0] for folder in folders]
        self.assertEqual([x["alpha"] for x in settings], [0, 3, 0, 3])
        pretrain.write_file(folders[1] + "/settings.json", json.dumps(settings[1] | dict(lr=0.5)).encode())
        self.fails(analyze, options.split(), folders[1], "lr 0.5")
        for wrong in ("alpha", "alpha=", "alpha=-1", "alhpa=3", "alph=3", "out=x", "alpha=3,3"):
            self.fails(analyze, ["sweep", "t", wrong], "")
        self.assertFalse(os.path.exists("t"))

    def test_end_to_end(self):
        """Pre-training that really learns 1-digit addition, then PPO on 2 digits, then the figures of both."""
        _, printed = quiet(
            pretrain.main, "--digits 1 --preset narrow --steps 1000 --eval_problems 50 --device cpu".split()
        )
        self.assertIn("identical", printed)
        pretrained = "out/pretrain_n1_narrow_steps1000_eval_problems50_seed0/model.pt"
        all_pairs = [(a, b) for a in range(10) for b in range(10)]
        model, _ = pretrain.load_checkpoint(pretrained, CPU)
        self.assertGreaterEqual(pretrain.solve(model, all_pairs)[0].mean(), 0.8)  # 90 of the 100 were trained on
        rl = "--digits 1 --iterations 3 --episodes 16 --eval_problems 8 --final_problems 50 --eval_every 2 --device cpu"
        (before, after), _ = quiet(ppo.main, [*rl.split(), "--checkpoint", pretrained, "--out", "rl"])
        self.assertEqual(set(before), {(mode, length) for mode in ("identical", "varying") for length in (1, 2)})
        # The table before came with the checkpoint; measured again:
        problems = pretrain.sample_problems(50, 2, "varying", 1, "add")
        self.assertEqual(before["varying", 2], pretrain.bootstrap(pretrain.solve(model, problems)[0]))
        prompts = [data.encode(data.prompt(a, b)) for a, b in problems]  # and once more without showing it the answers
        ids, lengths = generate(pretrain.to_sample(model), prompts, 300, 0)
        undrafted = [data.grade(data.decode(row[:n]), a, b) for row, n, (a, b) in zip(ids, lengths, problems)]
        self.assertAlmostEqual(before["varying", 2][0], np.mean(undrafted), delta=0.1)
        self.assertGreaterEqual(after["identical", 1][0], before["identical", 1][0] - 0.2, "old skills are kept")
        tuned, _ = pretrain.load_checkpoint("rl/model.pt", CPU)
        self.assertFalse(torch.equal(tuned.lm_head.weight, model.lm_head.weight), "PPO changed the weights")
        run = "rl"
        with open(run + "/settings.json") as f:
            self.assertEqual(json.load(f)["alpha"], 3)
        _, printed = quiet(analyze.main, ["tokens", pretrained, "--problems", "5", "--device", "cpu"])
        self.assertIn("Table 1", printed)
        quiet(analyze.main, ["curves", run])
        quiet(analyze.main, ["curves", os.path.dirname(pretrained)])
        quiet(analyze.main, ["critical", run])
        self.assertEqual(sorted(os.listdir("out/figures")), ["critical.png", "curves.png", "tokens.png"])


class Survives(unittest.TestCase):
    """Interruptions, damaged files, numbers that go wrong, hostile input: nothing lost, nothing silently wrong."""

    PRETRAIN = "--digits 1 --preset narrow --steps 200 --batch_size 1 --eval_problems 2 --device cpu --out p".split()
    PPO = (
        "--digits 1 --iterations 4 --episodes 4 --eval_problems 2 --final_problems 2 --eval_every 2 --device cpu "
        "--checkpoint p/model.pt --out r"
    ).split()

    def setUp(self):
        enter_a_new_folder(self)
        os.mkdir("p")  # a small pre-trained model for ppo.py, wherever it need not know anything
        pretrain.save_checkpoint("p/model.pt", tiny_model(block_size=177), digits=1, task="add")  # not one to spare

    def start(self, code, folder="."):
        """Start Python code that knows the scripts, in a process of its own."""
        os.makedirs(folder, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", "import pretrain, ppo\n" + code],
            cwd=folder,
            env=os.environ | dict(PYTHONPATH=HERE, OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def results(self, folder):
        """All that the two runs left behind in a folder, but the times."""
        found = {}
        for name in ("p", "r"):
            with open(f"{folder}/{name}/log.csv", newline="") as f:
                rows = [dict(row, seconds=0, tokens_per_s=0) for row in csv.DictReader(f)]
            state = pretrain.read_file(f"{folder}/{name}/state.pt", dict)
            parts = {k: x for k, x in state.items() if k not in ("rows", "seconds")}
            found[name] = rows, repr(tensors_to_lists([parts, pretrain.read_file(f"{folder}/{name}/model.pt", dict)]))
        return found

    def test_killed_at_random_moments(self):
        """kill -9, and the same command again: the same end as if nothing had happened. Ten times with --slow."""
        code = "pretrain.SAVE_SECONDS = 0\n"
        code += f"pretrain.start(lambda: (pretrain.main({self.PRETRAIN}), ppo.main({self.PPO})))"
        begun, whole = time.time(), self.start(code, "whole")
        self.assertEqual((whole.communicate()[1][-300:], whole.returncode)[1], 0)
        seconds, rng, kills, rounds = time.time() - begun, np.random.default_rng(0), 0, 0
        while kills < (10 if SLOW else 1):
            rounds += 1
            for _ in range(20):
                process = self.start(code, f"killed{rounds}")
                try:
                    _, errors = process.communicate(timeout=rng.uniform(0.3, 1.0) * seconds)
                    self.assertEqual(process.returncode, 0, errors[-300:])
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    kills += 1
            self.assertEqual(self.results(f"killed{rounds}"), self.results("whole"))

    def test_a_closed_pipe_loses_nothing(self):
        process = self.start(f"pretrain.start(lambda: pretrain.main({self.PRETRAIN}))")
        process.stdout.close()
        errors = process.stderr.read()
        process.wait()
        process.stderr.close()
        self.assertEqual(process.returncode, 1)
        self.assertIn("goes on with the same command", errors)
        self.assertNotIn("Traceback", errors)
        _, printed = quiet(pretrain.main, self.PRETRAIN)
        self.assertIn("saved p/model.pt", printed)

    def test_other_settings_or_fresh(self):
        quiet(ppo.main, self.PPO)
        with self.assertRaisesRegex(pretrain.UserError, "r holds a run with lr 0.0001, not 0.001.*--fresh"):
            quiet(ppo.main, [*self.PPO, "--lr", "0.001"])
        _, printed = quiet(ppo.main, self.PPO)
        self.assertIn("going on after step 4", printed)
        _, printed = quiet(ppo.main, [*self.PPO, "--lr", "0.001", "--fresh"])
        self.assertNotIn("going on", printed)

    def test_a_file_cut_or_damaged_anywhere(self):
        """At each of its bytes: a checkpoint is refused in one line."""
        model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=2))
        pretrain.save_checkpoint("good.pt", model, digits=1, task="add")
        with open("good.pt", "rb") as f:
            good = f.read()
        rng, loaded = np.random.default_rng(0), 0
        for i in range(0, len(good), 1 if SLOW else 11):
            flipped = good[:i] + bytes([good[i] ^ 1 << rng.integers(8)]) + good[i + 1 :]
            for content in (good[:i], flipped):
                with open("bad.pt", "wb") as f:
                    f.write(content)
                try:
                    pretrain.read_file("bad.pt", dict)
                except pretrain.UserError as error:
                    self.assertRegex(str(error), r"^bad.pt .*\bmake it again")
                    self.assertNotIn("\n", str(error))
                else:
                    loaded += 1
        self.assertEqual(loaded, 0)

    def test_a_damaged_state_is_named(self):
        quiet(ppo.main, self.PPO)
        with open("r/state.pt", "r+b") as f:
            f.truncate(1000)
        with self.assertRaisesRegex(pretrain.UserError, "r/state.pt.*--fresh"):
            quiet(ppo.main, self.PPO)
        pretrain.load_checkpoint("r/model.pt", CPU)  # still there

    @unittest.skipUnless(resource, "limits on the size of a file are a Unix matter")
    def test_a_full_disk_keeps_the_last_good_file(self):
        pretrain.write_file("model.pt", b"good")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with self.assertRaisesRegex(pretrain.UserError, "^cannot write model.pt .*--out"):
                pretrain.save_checkpoint("model.pt", tiny_model(), digits=1, task="add")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual(sorted(os.listdir()), ["model.pt", "p"], "nothing half-written is left")
        with open("model.pt", "rb") as f:
            self.assertEqual(f.read(), b"good")

    def test_a_folder_that_vanishes(self):
        args = argparse.Namespace(out="run", fresh=False)
        run = pretrain.Run(args, ["a", "seconds"])
        shutil.rmtree("run")
        with self.assertRaisesRegex(pretrain.UserError, "^cannot write run/log.csv"):
            run.log(1, dict(a=1), last=True)

    def test_two_runs_in_one_folder(self):
        """Started at once with different settings: every file that is left is whole, and that of one of the two."""
        code = f"pretrain.SAVE_SECONDS = 0\npretrain.start(lambda: ppo.main({self.PPO} + ['--fresh', '--lr', '%s']))"
        runs = [self.start(code % lr) for lr in (0.001, 0.002)]
        for process in runs:
            self.assertNotIn("Traceback", process.communicate()[1])
        self.assertIn(0, [process.returncode for process in runs])
        state, (_, facts) = pretrain.read_file("r/state.pt", dict), pretrain.load_checkpoint("r/model.pt", CPU)
        self.assertIn(state["settings"]["lr"], (0.001, 0.002))
        self.assertIn(facts["settings"]["lr"], (0.001, 0.002))
        with open("r/log.csv", newline="") as f:
            self.assertEqual([row["iteration"] for row in csv.DictReader(f)], list("01234"))
        with open("r/settings.json") as f:
            self.assertIn(json.load(f)["lr"], (0.001, 0.002))

    def test_numbers_that_go_wrong(self):
        """The first bad quantity is named with its step; what was saved before stays."""
        steps = itertools.count(1)
        loss = pretrain.answer_loss
        with mock.patch.object(pretrain, "SAVE_SECONDS", 0), mock.patch.object(
            pretrain, "answer_loss", lambda *args: loss(*args) * (math.nan if next(steps) == 137 else 1)
        ):
            with self.assertRaisesRegex(pretrain.UserError, "^loss is nan at step 137; lower --lr"):
                quiet(pretrain.main, self.PRETRAIN)
        self.assertEqual(pretrain.read_file("p/state.pt", dict)["step"], 100)
        gae = ppo.gae
        with mock.patch.object(ppo, "gae", lambda *args: gae(*args) * math.inf):
            with self.assertRaisesRegex(pretrain.UserError, "^advantages is (nan|inf|-inf) at iteration 1; lower --lr"):
                quiet(ppo.main, self.PPO)
        for name, p in pretrain.load_checkpoint("r/model.pt", CPU)[0].state_dict().items():
            self.assertTrue(p.isfinite().all(), name)

    def test_extreme_settings(self):
        """A clean run without nan in its log, or a clean message."""
        ended = 0
        for extreme in (
            "--alpha 1e6", "--temperature 0.01", "--temperature 100", "--lr 1", "--lr 1000", "--kl_coef 1e6",
            "--episodes 1 --minibatches 1", "--clip 0", "--gamma 0 --gae_lambda 0", "--epochs 3 --minibatches 4",
        ):  # fmt: skip
            try:
                _, printed = quiet(ppo.main, [*self.PPO, "--iterations", "2", "--fresh", "--max_kl", "0", *extreme.split()])
                self.assertIn("no answer was right", printed)
                self.assertIn("the KL is over --max_kl", printed)
                ended += 1
            except pretrain.UserError as error:
                self.assertIn("lower --lr", str(error))
            if os.path.exists("r/log.csv"):
                with open("r/log.csv") as f:
                    self.assertNotRegex(f.read(), "nan|inf", extreme)
        self.assertGreaterEqual(ended, 8)

    def test_random_options(self):
        """Two options at random, with values good and bad, of every script and verb: never a traceback."""
        rng = np.random.default_rng(0)
        values = "0 1 2 -1 1e9 0.5 nan inf 1e-9 abc é / , paper".split() + [""]
        for script, base, first_step in (
            (pretrain, self.PRETRAIN, "sample_problems"), (ppo, self.PPO, "sample_problems"),
            (analyze, ["tokens", "p/model.pt"], "sample_problems"), (analyze, ["errors", "p/model.pt"], "sample_problems"),
            (analyze, ["speed"], "product_rate"),
            (analyze, ["certainty", "p/model.pt"], "sample_problems"), (analyze, ["all"], "load_finished"),
            *((analyze, [verb, "p"], "load_run") for verb in ("curves", "critical", "drift")),
            *((analyze, [verb, "p"], "load_finished") for verb in ("frontier", "alpha", "controls")),
        ):  # fmt: skip
            with self.assertRaises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as helptext:
                script.main([*base[: 1 if script is analyze else 0], "--help"])
            options = [x for x in re.findall(r"^  (--\w+)", helptext.getvalue(), re.M) if x not in ("--help", "--device")]
            self.assertTrue(options)
            for _ in range(200 if SLOW else 40):
                argv = [x for name in rng.choice(options, 2) for x in (name, str(rng.choice(values)))]
                with mock.patch.object(script, first_step, side_effect=KeyboardInterrupt):  # here it has begun
                    with contextlib.suppress(pretrain.UserError, KeyboardInterrupt):
                        quiet(script.main, [*base, *argv])

    def test_hostile_text(self):
        """100,000 random and mutated texts through the grader and the finders of errors and critical tokens."""
        rng, right = np.random.default_rng(0), data.prompt(367, 28) + data.answer(367, 28)
        alphabet = list(data.VOCAB) + ["é", "\u2028", "\x00", "😀", "\ud800", "</scratch>\n", "3 9 5\n"]
        graded = 0
        for picks in rng.integers(0, 2**31, (100_000, 4)).tolist():
            i, j = picks[0] % len(right), picks[1] % 7
            text = right[:i] + alphabet[picks[2] % len(alphabet)] * (picks[3] % 3) + right[i + j :]
            good = data.grade(text, 367, 28)
            graded += good
            self.assertIs(type(good), bool)
            self.assertEqual(good, bool(re.match(r"(?s)(?!.*?</scratch>\n.*</scratch>\n3 9 5)?.*?</scratch>\n3 9 5\n", text)) and
                             re.search(r"</scratch>\n([^\n]*)\n", text)[1] == "3 9 5", text)  # fmt: skip
            self.assertIsInstance(data.describe_error(text, 367, 28), str)
        self.assertTrue(0 < graded < 100_000)
        for length in rng.integers(0, 20, 2000).tolist():
            text = "".join(map(chr, rng.integers(0, 0x110000, length)))
            try:
                self.assertEqual(data.decode(data.encode(text)), text)
            except ValueError as error:
                self.assertIn("is not in the vocabulary", str(error))
        for a, b in rng.integers(0, 10**12, (2000, 2)).tolist():
            text = data.prompt(a, b) + data.answer(a, b)
            for (_, _, name), index in data.critical_positions(a, b, int(rng.integers(1, 12))).items():
                self.assertTrue(text[index] == "," if "comma" in name else text[index].isdigit())

    @unittest.skipUnless(SLOW, "takes minutes: python test_all.py --slow")
    def test_memory_is_flat(self):
        """500 iterations of PPO need hardly more memory than 100: by then the kernels of most shapes are there."""
        code = "import resource\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        code += f"base = {self.PPO}\nppo.main(base + ['--iterations', '100', '--fresh'])\nearly = peak()\n"
        code += "ppo.main(base + ['--iterations', '500', '--fresh'])\nprint('peak', early, peak())"
        output, errors = self.start(code).communicate()
        early, late = map(int, re.search(r"peak (\d+) (\d+)", output).groups())
        self.assertLess(late, 1.1 * early, errors[-300:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--handout"]:
        sys.argv[1:2] = []
        folder = sys.argv[1] if len(sys.argv) == 2 else "."
        pretrain.start(lambda: handout(folder))
    else:
        unittest.main()
