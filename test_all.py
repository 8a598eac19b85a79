"""All tests, and the course's exercises.  Run: python test_all.py   (pytest test_all.py works, too)

    python test_all.py -k exercise_05              the judge of exercise 5; -k gae: all about gae
    python test_all.py --points                    points for the exercises; --json for autograders

A test compares with an answer found by hand or by another route, never with a copy of the code.
"""
import argparse
import contextlib
import csv
import filecmp
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if "--points" in sys.argv or "--judge" in sys.argv:
    # No student's file is imported here: `judge_alone` imports the one that it judges. The others
    # have stand-ins, so that no mistake in one file costs the exercises of another.
    for name in "data", "model", "kl", "pretrain", "ppo", "analyze":
        sys.modules[name] = mock.MagicMock()
try:
    import data, model, kl, pretrain, ppo, analyze  # noqa: E401
    from model import GPT, GPTConfig, generate
except SystemExit as error:  # its exit code may be 0
    raise ImportError("a script ends Python when it is imported") from error

HERE = Path(__file__).resolve().parent
SLOW = "--slow" in sys.argv  # also the tests that take minutes
CPU = torch.device("cpu")


def setUpModule():  # unittest and pytest call it before the tests
    torch.set_num_threads(1)  # models as small as these only lose by sharing work among threads


# ------------------------------------------------------------------ helpers
class Case(unittest.TestCase):
    def setUp(self):  # each test works in a folder of its own
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)

    def patch(self, *args, **kwargs):  # until the test ends
        patcher = mock.patch(*args, **kwargs)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def in_float32(self):  # tolerances are narrow, and the same on every machine
        for name in ("model", "pretrain", "ppo"):
            self.patch(f"{name}.autocast", lambda device: contextlib.nullcontext())

    close = staticmethod(functools.partial(torch.testing.assert_close, atol=1e-4, rtol=0))

    def fails(self, script, argv, message):
        """A script ends with exit code 2 and one error line on stderr, which holds the message."""
        code, _, stderr = ended(script, argv)
        errors = [line for line in stderr.split("\n") if "error: " in line]
        self.assertEqual((code, len(errors)), (2, 1), stderr)
        self.assertIn(message, errors[0])

    def ends_well(self, script, argv, **known):
        """A script ends with a result or one line -> its exit code. known: what a failure shows."""
        with self.subTest(argv=argv, **known):
            code, _, _ = ended(script, argv)
            self.assertIn(code, (0, 2))
            return code

    def python(self, *argv, folder=".", code=0):
        """Run Python in a process of its own, up to this exit code -> stdout; if not 0, all."""
        done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True,
                              env=os.environ | dict(OMP_NUM_THREADS="1"))
        self.assertEqual(done.returncode, code, done.stderr[-3000:])
        return done.stdout + (done.stderr if code else "")


def quiet(f, *args):
    """Call f with its printing kept back -> (what it returned, what it printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return f(*args), out.getvalue()


def ended(script, argv):
    """Let a script run to its end -> (exit code, stdout, stderr)."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = script(argv)
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), errors.getvalue()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(seed=0, block_size=192, std=0.3):
    """std: of all weights; it is larger than GPT-2's, so that outputs differ more."""
    net, generator = GPT(GPTConfig(block_size, n_layer=2, n_head=2, n_embd=16)), seeded(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, std, generator)
    return net


def save_tiny(path, seed=0, std=0.3):  # a checkpoint for N = 1, k = 1
    model.save_checkpoint(path, tiny_model(seed, std=std), torch.float32, digits=1, task="add",
                          preset="tiny", seed=seed, accuracies={})


every_number = functools.partial(json.dumps, default=torch.Tensor.tolist)  # of nested tensors


def text_of(*path):
    return Path(*path).read_text(encoding="utf-8")


def load_script(path):
    """A script of assets, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, HERE / path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def read_log(folder):
    """The rows of log.csv, without what depends on the machine's speed."""
    return [row | dict(seconds="") for row in csv.DictReader(text_of(folder, "log.csv").split())]


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


# ------------------------------------------------------------------ the exercises
# A new exercise is its function's docstring and, last in this part, a judge with this decorator: a
# test of Exercises, which calls the function with positional arguments, as often as it needs to.
Exercise = namedtuple("Exercise", "number file function text minutes judge")
EXERCISES = []


def exercise(number, file, function, text, minutes):
    def add(judge):
        EXERCISES.append(Exercise(number, file, function, text, minutes, judge))
        setattr(Exercises, f"test_exercise_{number:02}_{function}", judge)
        return judge
    return add


class NoFusedAttention(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if "attention" in str(getattr(function, "__name__", function)):
            raise AssertionError("attention calls a library's; write out products and softmax")
        return function(*args, **kwargs or {})


def shown(x):
    """A tensor as lists of numbers with five decimals; anything else as it is."""
    if not torch.is_tensor(x):
        return x
    return (x.double().round(decimals=5) if x.is_floating_point() else x).tolist()


class Exercises(unittest.TestCase):
    """A judge for each exercise. A failure says the input, what was expected and what came."""
    longMessage = False

    def call(self, function, *given):
        """-> what the function returns, and the call as text. It must not change its inputs."""
        name = self._testMethodName.split("_", 3)[3]
        text = f"{name}({', '.join(repr(shown(x)) for x in given)})"
        tensors = [x for x in given if torch.is_tensor(x)]
        before = [x.detach().clone() for x in tensors]
        got = function(*given)
        if not all(map(torch.equal, tensors, before)):
            self.fail(f"\n{text} changes its inputs")
        return got, text

    def check(self, function, given, expected, hint="", tolerance=1e-5):
        self.compare(*self.call(function, *given), expected, hint, tolerance)

    def compare(self, got, text, expected, hint="", tolerance=1e-5):
        if isinstance(expected, (torch.Tensor, list)):
            expected = torch.as_tensor(expected)
            right = isinstance(got, torch.Tensor) and got.shape == expected.shape and bool(
                ((got - expected).abs() <= tolerance).all())  # nan is never close
            if isinstance(got, torch.Tensor) and got.shape != expected.shape:
                hint = f"Its shape should be {(*expected.shape,)} but is {(*got.shape,)}. {hint}"
        else:
            right = type(got) is type(expected) and got == expected
        if isinstance(expected, str) and isinstance(got, str) and not right:
            i = next(i for i in range(len(got + expected)) if got[i : i + 1] != expected[i : i + 1])
            hint = f"From character {i} on {expected[i : i + 12]!r} became {got[i : i + 12]!r}"
        if got is None:
            hint = "Is the return missing?"
        if not right:
            self.fail(f"\n{text}\nshould be {shown(expected)!r}\nbut is    {shown(got)!r}\n{hint}")


@exercise(1, "data.py", "answer", "the scratchpad, a line a digit", 40)
def judge_answer(self):
    for a, b, *lines in (
            (367, 28, *WORKED.split("\n")[4:8], "3 9 5"),
            (18, 9995, "[1,8] + [9,9,9,5] , A=[] , C=0 , 8+5+0=13 , A->3 , C->1",
             "[1] + [9,9,9] , A=[3] , C=1 , 1+9+1=11 , A->1 , C->1",
             "[] + [9,9] , A=[1,3] , C=1 , 0+9+1=10 , A->0 , C->1",
             "[] + [9] , A=[0,1,3] , C=1 , 0+9+1=10 , A->0 , C->1",
             "[] + [] , A=[0,0,1,3] C=1 , END", "1 0 0 1 3"),  # the result shows the final carry
            (0, 0, "[0] + [0] , A=[] , C=0 , 0+0+0=0 , A->0 , C->0",
             "[] + [] , A=[0] C=0 , END", "0"),
            (0, 10**20 - 1,  # neither a float nor an int64 holds it
             *(f"[{'0'[i:]}] + [{','.join('9' * (20 - i))}] , A=[{','.join('9' * i)}] , C=0 , "
               "0+9+0=9 , A->9 , C->0" for i in range(20)),
             f"[] + [] , A=[{','.join('9' * 20)}] C=0 , END", " ".join("9" * 20)),
            (105, -99, "[1,0,5] - [9,9] , A=[] , C=0 , 5-9-0=-4 , A->6 , C->1",
             "[1,0] - [9] , A=[6] , C=1 , 0-9-1=-10 , A->0 , C->1",
             "[1] - [] , A=[0,6] , C=1 , 1-0-1=0 , A->0 , C->0",
             "[] - [] , A=[0,0,6] C=0 , END", "6"),  # A keeps its leading zeros
            (15, -15, "[1,5] - [1,5] , A=[] , C=0 , 5-5-0=0 , A->0 , C->0",
             "[1] - [1] , A=[0] , C=0 , 1-1-0=0 , A->0 , C->0",
             "[] - [] , A=[0,0] C=0 , END", "0")):
        expected = "\n".join(["", "<scratch>", *lines[:-1], "</scratch>", lines[-1], ""])
        self.check(data.answer, (a, b), expected)


@exercise(2, "data.py", "grade", "is the result in this text the sum?", 15)
def judge_grade(self):
    end = "\n</scratch>\n"
    right = [WORKED, f"{end}3 9 5\n", f"{end}3 9 5\n4 0 0\n", f"{end}3 9 5{end}4 0 0\n"]
    wrong = ["4 0 0\n3 9 5\n", f"4 0 0{end}3 9 5\n", "3 9 5", "3 9\n", "3 9 6\n", "3 9 5 0\n",
             "395\n", "3  9 5\n", "3 9 5 \n", " 3 9 5\n", "0 3 9 5\n", "3 9 5\r\n", "\n3 9 5\n",
             "3 9 5\u2028\n", "٣ ٩ ٥\n", "\x00\ud800😀", ""]
    wrong = [end + x for x in wrong] + ["", "3 9 5\n", "</scratch> 3 9 5\n", "/scratch>\n3 9 5\n"]
    for text in right + wrong:
        self.check(data.grade, (text, 367, 28), text in right)
    for text, a, b in ("0", 0, 0), ("4 5", 52, -7), ("5 9", 52, -7):
        self.check(data.grade, (f"{end}{text}\n", a, b), text != "5 9")


@exercise(3, "model.py", "attention", "scaled dot-product attention with a mask", 30)
def judge_attention(self):
    # D = 9. Head 1: token 0 sees itself. Token 1 has scores 3 log 3 and 0, over sqrt(D):
    # weights 3/4 and 1/4. Head 2: all scores of token 1 are 200, so it has the mean of both values.
    *worked, means = F.pad(torch.tensor([
        [[[[1.0, 0], [math.log(3), 0]], [[-600.0, 0], [600, 0]]]],
        [[[[3.0, 0], [0, 0]], [[1.0, 1], [1, 2]]]], [[[[4.0, 8], [0, 4]], [[2.0, 0], [0, 6]]]],
        [[[[4.0, 8], [3, 7]], [[2.0, 0], [1, 3]]]]]), (0, 7))
    # As with a cache S > T, but T = 2 tokens see the first 3 and 4 of S = 5; B, H, D = 2, 3, 4.
    q, k, v = torch.randint(-9, 10, (3, 2, 3, 5, 4), generator=seeded()) / 4
    cached = [x.clone().requires_grad_() for x in (q[:, :, 3:], k, v)]
    for given, mask in (worked, torch.full((2, 2), -math.inf).triu(1)), (
            cached, torch.full((2, 5), -math.inf).triu(3)):
        if given is cached:
            means = F.scaled_dot_product_attention(*given, mask)
        with NoFusedAttention():
            got, call = self.call(model.attention, *given, mask)
        self.compare(got, call, means, tolerance=1e-4)
    self.assertTrue(got.requires_grad, "\nno gradient flows through attention")
    for name, x, expected in zip("qkv", *(
            torch.autograd.grad(y.square().sum(), given) for y in (got, means))):
        self.compare(x, f"the gradient for {name} of {call}", expected, tolerance=1e-3)
    got = model.attention(*(x.bfloat16() for x in (*given, mask)))
    self.assertEqual(got.dtype, torch.bfloat16, "\nq, k, v and mask were in bfloat16")
    self.compare(got.float(), f"in bfloat16, {call}", means, tolerance=0.05)


@exercise(4, "model.py", "sample", "a token from logits, at a temperature", 15)
def judge_sample(self):
    for shape in (), (1,), (4,), (1, 1), (2, 1), (1, 4), (2, 3):
        tokens = torch.arange(3, 3 + math.prod(shape)).view(shape) % 5
        for temperature in 0, 1.0:
            self.check(model.sample, (100.0 * F.one_hot(tokens, 5), temperature), tokens)
    near = torch.tensor([[0, 1e-12, 0]] * 8)
    self.check(model.sample, (near, 0), [1] * 8, "temperature 0 is greedy, exactly")
    logits = torch.tensor([0.0, 2.0, 4.0]).repeat(20000, 1)
    for temperature in (0.5, 1.0, 2.0):  # tolerance: 5 standard errors
        drawn, _ = self.call(model.sample, logits, temperature, seeded())
        e = [math.exp(x / temperature) for x in (0, 2, 4)]
        self.compare(torch.bincount(drawn, minlength=3) / 20000, "tokens' shares in 20,000 rows of "
                     f"sample([0, 2, 4], {temperature})", [x / sum(e) for x in e], "", 0.018)
        if not torch.equal(model.sample(logits, temperature, seeded()), drawn):
            self.fail("\nsample with a generator of the same seed draws other tokens")
    for again in seeded(), None:
        if torch.equal(*(model.sample(logits[:999], 2.0, again) for _ in range(2))):
            self.fail(f"\nsample with {'a' if again else 'no'} generator draws the same again")
    drawn = model.sample(torch.zeros(100, 100, 2), 1.0, seeded()).float()
    for means in drawn.mean(0), drawn.mean(1):  # 6 standard errors
        self.assertLess((means - 0.5).abs().max(), 0.3, "\nsample of logits (100, 100, 2) does not "
                        "draw each token on its own")


@exercise(5, "kl.py", "certainty", "equation 2", 15)
def judge_certainty(self):
    # Of 4 tokens: H_max = log 4. H of p, q and u is 7/4 log 2, 0.940448 and log 4.
    p, q, u = [0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1], [0.25] * 4
    logits = torch.tensor([[p, u, q], [q, p, p]]).log()
    logits += torch.tensor([[[2.0], [-1], [0]], [[3], [1], [9]]])
    self.check(kl.certainty, (logits,), [[0.125, 0, 0.3216102], [0.3216102, 0.125, 0.125]],
               "the softmax and the sum are over the last axis, the vocabulary")
    extreme = torch.tensor([[[0.0, -200, -200, -200], [-200, 0, 0, -200]]])
    for given in extreme, extreme + 100, extreme.masked_fill(extreme < 0, -math.inf) - 100:
        self.check(kl.certainty, (given,), [[1, 0.5]], "1 - log 2 / log 4. If it is nan: 0 log 0 "
                   "gives nan, but p log p is 0 where p is 0; and exp(100) is infinite", 1e-3)


@exercise(6, "kl.py", "prioritized_kl", "equation 1", 15)
def judge_prioritized_kl(self):
    logp, ref_logp, weight = torch.tensor([
        [[-1.0, -4, -2.5], [-0.5, -3, -1]], [[-8.0, -1, -2], [-0.5, -1, -4]],
        [[0.5, 1, 0], [1, 0.25, 0.75]]])
    leaf = logp.clone().requires_grad_()
    got, call = self.call(kl.prioritized_kl, leaf * 1, ref_logp, weight)
    self.compare(got, call, [[12.25, 4.5, 0], [0, 0.5, 3.375]], "weight * k2 of each token on its "
                 "own; the first is 1/2 * (-1 + 8)^2 / 2")
    self.assertTrue(got.requires_grad, f"\n{call} has no gradient; it flows through logp")
    got.sum().backward()
    self.compare(leaf.grad, f"the gradient for logp of {call}", [[3.5, -3, 0], [0, -0.5, 2.25]])
    self.check(kl.prioritized_kl, (logp, ref_logp, 1), [[24.5, 4.5, 0.125], [0, 2, 4.5]],
               "a weight may be a number")


@exercise(7, "ppo.py", "gae", "generalized advantage estimation", 40)
def judge_gae(self):
    for rewards, values, mask, gamma, lam, expected in (
            ([[0.0, 1]], [[0.0, 0]], [[1.0, 1]], 1, 1, [[1.0, 1]]),
            # delta_1 = 1 - 4 = -3, delta_0 = 0 + 4/2 - 2 = 0, A_0 = 0 + (1/2) lam (-3)
            ([[0.0, 1]], [[2.0, 4]], [[1.0, 1]], 0.5, 0, [[0.0, -3]]),
            ([[0.0, 1]], [[2.0, 4]], [[1.0, 1]], 0.5, 0.25, [[-0.375, -3]]),
            # Prompts before the answers and padding after them; gamma lam = 0.4. Row 0: delta is
            # 1, -3.5, 1; A_2 = -3.5 + 0.4 * 1, A_1 = 1 + 0.4 A_2. Row 1: delta is -1, -0.5, -2.
            ([[0.0, 1, 0, 2, 0], [0, 0, 0, 0, 1], [3, 0, 0, 0, 0]],
             [[9.0, 2, 4, 1, 7], [9, 9, 2, 2, 3], [1, 8, 8, 8, 8]],
             [[0.0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]], 0.5, 0.8,
             [[0.0, -0.24, -3.1, 1, 0], [0, 0, -1.52, -1.3, -2], [2, 0, 0, 0, 0]])):
        given = [torch.tensor(x) for x in (rewards, values, mask)]
        self.check(ppo.gae, (*given, gamma, lam), expected)


@exercise(8, "ppo.py", "ppo_loss", "the clipped surrogate", 20)
def judge_ppo_loss(self):
    one = torch.ones(1, 1)
    for ratio, A, expected in ((1.0, 1.0, -1.0), (1.5, 1.0, -1.2), (1.5, -1.0, 1.5),
                               (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)):
        got = ppo.ppo_loss(one * math.log(ratio) - 2, -2 * one, A * one, one, 0.2)
        self.compare(got, f"ppo_loss at ratio {ratio}, advantage {A}, clip 0.2",
                     torch.tensor(expected), "-min(ratio A, clip(ratio) A)")
    old = torch.tensor([[-1.0, -2, -1, -3], [-2, -1, -3, -1]])
    ratios = torch.tensor([[1.8, 0.25, 1.8, 3], [0.25, 3, 0.1, 1]])
    new = (old + ratios.log()).requires_grad_()
    advantages = torch.tensor([[1.0, -1, -2, 100], [4, 100, -100, 100]])
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    got, _ = self.call(ppo.ppo_loss, new, old, advantages, mask, 0.5)
    call = (f"ppo_loss at ratios {shown(ratios)}, advantages {advantages.tolist()}, mask "
            f"{mask.tolist()}, clip 0.5")
    self.compare(got, call, torch.tensor(0.4), "the mean of -1.5, 0.5, 3.6 and -1")
    self.assertTrue(got.requires_grad, f"\n{call} has no gradient; it flows through new_logp")
    got.backward()
    self.compare(new.grad, f"the gradient for new_logp of {call}", [
        [0, 0, 0.9, 0], [-0.25, 0, 0, 0]], "-ratio A / 4, but 0 where it is clipped or masked")


# ------------------------------------------------------------------ points
def judge(exercise, function=None):
    """What a judge says of the function in its file, or of another one: "" if it is right."""
    module, name = sys.modules[exercise.file[:-3]], exercise.function
    test = Exercises(f"test_exercise_{exercise.number:02}_{name}")
    with mock.patch.object(module, name, function or getattr(module, name, None), create=True):
        try:
            quiet(exercise.judge, test)
        except (Exception, SystemExit):
            return traceback.format_exc()
    return ""


def judge_alone(number, result):
    """In a process of its own: import an exercise's file, and write what its judge says."""
    torch.set_num_threads(1)
    exercise = next(x for x in EXERCISES if str(x.number) == number)
    name = exercise.file[:-3]
    del sys.modules[name]
    try:
        globals()[name] = __import__(name)
        failed = judge(exercise)
    except (Exception, SystemExit) as error:
        failed = (f"{traceback.format_exc()}\n{exercise.file} cannot be imported: "
                  f"{type(error).__name__}: {error}")
    Path(result).write_text(failed or "passed", encoding="utf-8", errors="backslashreplace")


def start_judge(exercise, limit):
    """Judge an exercise in a process of its own -> what failed, "" if it passed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        command = [sys.executable, HERE / "test_all.py", "--judge", str(exercise.number), result]
        no = subprocess.DEVNULL
        try:
            run = subprocess.run(command, cwd=folder, timeout=limit, stdin=no, stdout=no, stderr=no)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:g} seconds: an endless loop, or a busy machine?"
        if not result.exists():
            return f"Python ended before the judge did, with exit code {run.returncode}"
        failed = result.read_text(encoding="utf-8")
    return "" if failed == "passed" else failed


def points(exercises, limit, as_json):
    """Print a line an exercise and the total; as JSON in the form that Gradescope reads."""
    begin, tests = time.monotonic(), []
    for x in exercises:
        failed = start_judge(x, limit)
        score, why = 0 if failed else x.minutes, failed.strip().rpartition("\n")[2]
        if "AssertionError" in failed:
            why = f"python test_all.py -k exercise_{x.number:02}"
        if len(failed) > 2000:  # the call stands first, the reason last
            failed = f"{failed[:990]}\n[...]\n{failed[-990:]}"
        name = f"exercise {x.number}: {x.function} in {x.file}"
        tests.append(dict(name=name, score=score, max_score=x.minutes, output=failed))
        if not as_json:
            print(f"{score:2} of {x.minutes}  {name:<40}{why}".rstrip(), flush=True)
    score, most = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    seconds = round(time.monotonic() - begin, 1)
    print(json.dumps(dict(score=score, execution_time=seconds, tests=tests), indent=1) if as_json
          else f"{score} of {most} in all")


def some_exercises(text):
    """'5,6' -> these two exercises."""
    numbers = [x.strip() for x in text.split(",")]
    known = [str(x.number) for x in EXERCISES]
    if not set(numbers) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 5,6; there are "
                                         f"{', '.join(known)}")
    return [x for x in EXERCISES if str(x.number) in numbers]


def main(argv=None):
    ap = argparse.ArgumentParser(description="All tests and exercises.", allow_abbrev=False)
    add = ap.add_argument
    add("-k", metavar="NAME", action="append", default=[], help="run the tests with NAME in theirs")
    add("-v", action="store_true", help="name each test")
    add("-f", action="store_true", help="stop at the first failure")
    add("--slow", action="store_true", help="also run the tests that take minutes")
    add("--points", action="store_true", help="print points for the exercises; exit code 0")
    add("--json", action="store_true", help="print the points as JSON")
    add("--limit", type=float, default=60, help="seconds for an exercise's points (default 60)")
    add("--only", metavar="5,6", type=some_exercises, help="these exercises alone")
    add("--judge", nargs=2, help=argparse.SUPPRESS)
    ap.set_defaults(handout=None)
    if (HERE / "assets/course").exists():  # the students' copy makes no other
        add("--handout", metavar="DIR", help="write the students' copy, exercises blank, to DIR")
    args = ap.parse_args(argv)
    if args.judge:
        return judge_alone(*args.judge)
    if args.only and not args.points and args.handout is None:
        ap.error("--only goes with --points or --handout")
    if not 0 < args.limit < 1e6:
        ap.error("--limit is a number of seconds")
    if args.points:
        return points(args.only or EXERCISES, args.limit, args.json)
    if args.handout is not None:
        numbers = [x.number for x in args.only or EXERCISES]
        return load_script("assets/course/handout.py").main(args.handout, numbers)
    command = [sys.argv[0], *(word for name in args.k for word in ("-k", name))]
    for x in () if args.k else EXERCISES:
        if "NotImplementedError: exercise" in judge(x):
            print(f"exercise {x.number} is open: {x.function} in {x.file}. Its judge: "
                  f"python test_all.py -k exercise_{x.number:02}")
            command = [sys.argv[0], "Exercises"]  # the other tests need all of them
    result = unittest.main(argv=command, verbosity=1 + args.v, failfast=args.f, exit=False).result
    if not result.testsRun:
        ap.error(f"no test has {' or '.join(args.k)} in its name")
    sys.exit(0 if result.wasSuccessful() else 1)


class Solutions(Case):
    course = functools.cached_property(lambda self: load_script("assets/course/handout.py"))

    def test_table_and_solutions(self):
        self.assertEqual([x.number for x in EXERCISES], list(range(1, len(EXERCISES) + 1)))
        table = "|---|---|---|---|---|\n" + "".join(map(self.course.table_row, EXERCISES))
        self.assertTrue(table in text_of(HERE, "README.md"), "README.md lacks\n" + table)
        for x in EXERCISES:
            right, slips = self.course.SOLUTIONS[x.function].values()
            for source in right:
                self.assertEqual(judge(x, self.course.function_from(x, source)), "", source)
            wrong = self.course.slipped(x)
            self.assertEqual(set(slips) - set(wrong), set(), f"these do not change {x.function}")
            for name, source in wrong.items():
                with self.subTest(f"a slip in {x.function}: {name}"):
                    message = judge(x, self.course.function_from(x, source))
                    self.assertIn("Error", message)
                    self.assertNotRegex(message, "(Name|Syntax)Error", "the slip itself is wrong")

    def test_the_handout(self):
        """Whole docstrings, no line of a solution. A plain run names what is open; judges fail."""
        quiet(main, ["--handout", "copy"])
        self.assertNotRegex(text_of("copy/test_all.py"), "Solutions|one_epoch")
        texts = "\n".join(map(text_of, [*Path("copy").rglob("*.py"), Path("copy/README.md")]))
        for x in EXERCISES:
            ours, theirs = (self.course.function_node(text_of(folder, x.file), x)
                            for folder in (HERE, "copy"))
            self.assertEqual(theirs.body[0].value.value, ours.body[0].value.value)
            right = [self.course.solution(x), *self.course.SOLUTIONS[x.function]["right"]]
            for line in map(str.strip, "\n".join(right).split("\n")):
                self.assertFalse(len(line) > 16 and "def " not in line and line in texts, line)
        printed = self.python("test_all.py", folder="copy", code=1)
        for x in EXERCISES:
            self.assertIn(f"exercise {x.number} is open: {x.function} in {x.file}.", printed)
        failed = re.findall(r"^(?:ERROR|FAIL): (\w+)", printed, re.M)
        self.assertEqual(failed, [name for name in dir(Exercises) if name.startswith("test_ex")])

    def test_from_a_handout_to_a_fine_tuned_model(self):
        """Exercises 5 and 6 alone: while they are open ppo.py says so, and there are no points."""
        quiet(main, ["--handout", "copy", "--only", "6,5"])
        rows = [self.course.table_row(x) in text_of("copy", "README.md") for x in EXERCISES]
        self.assertEqual(rows, [x.number in (5, 6) for x in EXERCISES])
        save_tiny("copy/tiny.pt")
        tune = ["ppo.py", *RL, "--checkpoint", "tiny.pt", "--alpha", "3"]
        self.assertIn("5: certainty in kl.py is open", self.python(*tune, folder="copy", code=2))
        self.assertIn("0 of 30 in all", self.python("test_all.py", "--points", folder="copy"))
        shutil.copy(HERE / "kl.py", "copy/kl.py")
        self.assertIn("30 of 30 in all", self.python("test_all.py", "--points", folder="copy"))
        self.python(*tune, folder="copy")

    def test_points_of_a_bad_hand_in(self):
        """What goes wrong in an exercise costs no other one; what prints is no JSON."""
        quiet(main, ["--handout", "copy"])
        for file, more in (
                ("data.py", "import os\nos.write(1, b'here')\ndef answer(*args): os._exit(0)"),
                ("model.py", "def sample(*args):\n    while True: pass"), ("kl.py", "x = ("),
                ("ppo.py", "import os\nprint(score := 40)\ndef gae(*args): os.abort()")):
            Path("copy", file).write_text(text_of(HERE, file) + "\n" + more, encoding="utf-8")
        options = "test_all.py --points --json --only".split()
        got = json.loads(self.python(*options, "1,2,3,5,6,7,8", folder="copy"))
        self.assertEqual([x["score"] for x in got["tests"]], [0, 15, 30, 0, 0, 0, 20])
        self.assertEqual(set(got["tests"][0]), {"name", "score", "max_score", "output"})
        self.assertEqual((set(got), got["score"]), ({"tests", "score", "execution_time"}, 65))
        self.assertIn("exit code 0", got["tests"][0]["output"])
        self.assertIn("(kl.py, line ", got["tests"][3]["output"])
        got = json.loads(self.python(*options, "4", "--limit", "9", folder="copy"))
        self.assertIn("stopped after 9 seconds", got["tests"][0]["output"])

    def test_command_line(self):
        Path("file").touch()
        for options, message in (
                ("--points --only a", "'a' is not a list"), ("--points --only", "--only"),
                ("--points --only 5,", "'5,' is not"), ("--points --only=", "'' is not"),
                ("--points --limit 0", "seconds"), ("--only 5", "goes with"), ("--typo", "unrecog"),
                (f"--handout {HERE}/assets/copy", "inside"), ("--handout file", "File exists"),
                ("--handout file/copy", "cannot write"), ("--handout", "expected one argument")):
            self.fails(main, options.split(), message)


# ------------------------------------------------------------------ data.py
class Data(Case):
    def test_lengths(self):
        lengths = [118, 177, 242, 313, 390, 473, 562, 657, 758, 865]  # of the paper's format
        self.assertEqual([data.max_length(n) for n in range(1, 11)], lengths)
        for n, task in itertools.product((1, 2), data.TASKS):
            longest = max(len(data.right_text(a, b)) for a in range(10**n)
                          for b in (range(10**n) if task == "add" else range(-a, 0)))
            self.assertEqual(data.max_length(n, task), longest)

    def test_critical_and_copied_tokens(self):
        """By hand: 367+28 with N = 2, an operand one digit longer; 5+1234, two digits longer."""
        three, five = "copied comma1 digit1", "copied comma2 digit2 comma1 digit1"
        for a, b, operand, *lists in (
                (367, 28, 1, ("[3,6,7]", 3, three), ("[3,6] ", 1, three), ("[3] ", 1, "digit1")),
                (5, 1234, 2, ("[1,2,3,4]", 3, five), ("[1,2,3] ", 1, five),
                 ("[1,2] ", 1, "digit2 comma1 digit1"))):
            self.assertEqual(data.critical_positions(a, b, 2), {
                (line, operand, name): data.right_text(a, b).index(digits) + start + i
                for line, (digits, start, names) in enumerate(lists, 1)
                for i, name in enumerate(names.split())})
        for pair, operands in ((12, 34), set()), ((123, 456), {1, 2}):
            self.assertEqual({key[1] for key in data.critical_positions(*pair, 2)}, operands)

    def test_sample_pair(self):
        rng = np.random.default_rng(0)
        many = {mode: [tuple(len(str(x)) for x in data.sample_pair(rng, 3, mode, 2))
                       for _ in range(3000)] for mode in ("train", "identical", "varying", "rl")}
        self.assertEqual(set(many["train"]), set(itertools.product((1, 2, 3), repeat=2)))
        self.assertEqual(set(many["identical"]), {(3, 3)})
        self.assertEqual(set(many["varying"]), {(3, 1), (3, 2), (3, 3), (1, 3), (2, 3)})
        self.assertEqual({max(x) for x in many["rl"]}, {5})
        shares = [[min(x) == n for x in many["rl"]] for n in (1, 2, 3, 4, 5)]
        shares += [[x[0] == n for x in many["train"]] for n in (1, 2, 3)]
        shares += [[x[0] > x[1] for x in many[mode] if x[0] != x[1]] for mode in ("varying", "rl")]
        expected = [1 / 6] * 3 + [1 / 4] * 2 + [1 / 3] * 3 + [1 / 2] * 2
        np.testing.assert_allclose(list(map(np.mean, shares)), expected, atol=0.05)

    def test_held_out_problems(self):
        """A tenth of all problems, a+b whenever b+a; no training draws them, every test does."""
        every = [(a, b) for a in range(100) for b in range(100)]
        self.assertAlmostEqual(np.mean([data.held_out(a, b) for a, b in every]), 0.1, delta=0.008)
        self.assertTrue(all(data.held_out(a, b) == data.held_out(b, a) for a, b in every))
        rng = np.random.default_rng(0)
        for mode, task in itertools.product(("train", "identical", "varying", "rl"), data.TASKS):
            for test in (False, True) * 50:
                a, b = data.sample_pair(rng, 1, mode, test=test, task=task)
                self.assertEqual(data.held_out(a, b), test)
                self.assertTrue(b >= 0 if task == "add" else 0 < -b <= a)


# ------------------------------------------------------------------ model.py
class Model(Case):
    def test_gpt2_is_pytorchs(self):
        """Logits are those of PyTorch's own transformer layers."""
        net, ids = tiny_model(), torch.randint(0, 40, (3, 50), generator=seeded())
        w = net.transformer
        x = w.wte(ids) + w.wpe(torch.arange(50))
        for block in w.h:
            layer = torch.nn.TransformerEncoderLayer(
                16, 2, 64, 0.0, functools.partial(F.gelu, approximate="tanh"), batch_first=True,
                norm_first=True)
            names = "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj ln_1 ln_2".split()
            ours = (p for name in names for p in block.get_submodule(name).parameters())
            layer.load_state_dict(dict(zip(layer.state_dict(), ours)))
            x = layer(x, torch.full((50, 50), -math.inf).triu(1))
        self.close(net(ids)[0], w.ln_f(x) @ w.wte.weight.T, atol=1e-5)

    def test_cache_and_offset(self):
        """Steps of several widths; what the cache holds at later places does not matter."""
        net, ids = tiny_model(), torch.randint(0, 40, (3, 50), generator=seeded())
        with torch.no_grad():
            whole, _ = net(ids)
            cache = torch.full((2, 2, 3, 2, 50, 8), 100.0)
            for start, stop in itertools.pairwise((0, 7, 8, 9, 30, 50)):
                logits, _ = net(ids[:, start:stop], cache=cache[..., :stop, :])
                self.close(logits, whole[:, start:stop], atol=1e-5)
        moved, _ = net(ids[:, :20], offset=torch.tensor([[50], [0], [9]]))
        for row, offset in enumerate((50, 0, 9)):
            other = tiny_model()
            other.transformer.wpe.weight.data = net.transformer.wpe.weight[offset:]
            self.close(moved[row], other(ids[row : row + 1, :20])[0][0], atol=1e-5)
        self.assertRaisesRegex(ValueError, "block of 192", net, torch.zeros(1, 193).long())

    def test_generation_of_ragged_prompts(self):
        """Greedy: as one at a time, with the text read again for each token. A row ends at the
        second line break from </scratch> on (not at another tag), after 60, or with the block."""
        ends = ["</scratch>\n" + x for x in ("3", "+,", "[7", "9 9\n", " ", "1")]
        texts = [data.prompt(7, 5) + x for x in (*ends, "\n/scratch>\n</scratch\n4\n5\n")]
        prompts = list(map(data.encode, [*texts, *(WORKED[:n] for n in (28, 100, 110))]))
        for net in tiny_model(block_size=110), tiny_model(6):  # this one writes line breaks
            ids, lengths = generate(net, prompts, 60, 0)
            for row, n, text in zip(ids, lengths, prompts):
                size = min(len(text) + 60, net.config.block_size)
                while len(text) < size and not re.search("</scratch>\n.*\n", data.decode(text)):
                    text = text + [int(net(torch.tensor([text]))[0][0, -1].argmax())]
                self.assertEqual(row.tolist(), text + [0] * (len(row) - len(text)))
                self.assertEqual(n, len(text))
        taken = {int(n) - len(p) for n, p in zip(lengths, prompts)}
        self.assertGreater(len(taken), 3, "rows end at different steps")

    def test_distribution_with_and_without_reading_ahead(self):
        """Chi-squared of three characters. The model sees the last token alone, often is right."""
        start, right = len(data.prompt(1, 2)), data.encode(data.right_text(1, 2))
        table = 2 * torch.randn(40, 40, generator=seeded())
        for now, following in zip(right[start - 1 : start + 3], right[start:]):
            table[now, following] = table[now].max() + 0.5
        p = (table / 0.8).softmax(-1)
        exact = p[right[start - 1]][:, None, None] * p[:, :, None] * p[None]  # (40, 40, 40)
        self.assertGreater(exact[tuple(right[start : start + 3])].item(), 0.02)
        net, generator, n = GPT(GPTConfig(256, n_layer=1, n_head=1, n_embd=4)), seeded(), 20000
        net.forward = lambda ids, cache=None: (table[ids], torch.zeros(*ids.shape, 4))
        for begun in [right[:start]] * n, model.read_ahead(net, [(1, 2)] * n, 0.8, generator):
            ids, _ = generate(net, begun, 4, 0.8, generator)
            counts, expected = torch.zeros_like(exact), n * exact
            counts.index_put_(tuple(ids[:, start : start + 3].T), torch.ones(n), accumulate=True)
            often = expected > 5
            chi2, cells = ((counts - expected) ** 2 / expected)[often].sum(), int(often.sum())
            self.assertGreater(cells, 20)
            self.assertLess(abs(chi2 - cells), 5 * math.sqrt(2 * cells))


# ------------------------------------------------------------------ pretrain.py
class Pretrain(Case):
    def test_muon_makes_updates_orthogonal(self):
        """All singular values come out near 1. Momentum 0.95, Nesterov's: after gradients g and h,
        0.05 h + 0.95 (0.05 h + 0.95 * 0.05 g)."""
        for shape in (20, 8), (8, 20):
            p = torch.nn.Parameter(torch.ones(shape))
            g, h = torch.randn(2, *shape, generator=seeded()) * torch.logspace(0.5, -0.5, shape[1])
            muon = pretrain.Muon([p], lr=0.1, weight_decay=0.5)
            for p.grad in g, h:
                before = 0.95 * p.detach()  # weight decay: 1 - 0.1 * 0.5
                muon.step()
            update = (before - p.detach()) / (0.1 * 0.2 * 20**0.5)
            self.close(torch.linalg.svdvals(update), torch.ones(8), atol=0.4)
            u, _, v = torch.linalg.svd(0.0975 * h + 0.045125 * g, full_matrices=False)
            self.assertGreater(F.cosine_similarity(u @ v, update).mean().item(), 0.95)
        net = tiny_model()
        ours = [id(p) for optimizer in pretrain.make_optimizers(net, 0.1)
                for group in optimizer.param_groups for p in group["params"]]
        self.assertEqual(sorted(ours), sorted(map(id, net.parameters())), "each has one optimizer")

    def test_batches(self):
        """Whole worked problems, none held out, of like length, at places all over the block."""
        batches, used = pretrain.pretrain_batches(2, 4, 200, 0, CPU), set()
        starts, seen, spread = [], [], []
        for ids, prompt_len, lengths, offset in itertools.islice(batches, 200):
            seen.append([ids.tolist(), offset.tolist()])
            spread.append((lengths.max() - lengths.min()).item())
            for row, p, n, (o,) in zip(ids, *(x.tolist() for x in (prompt_len, lengths, offset))):
                a, b = map(int, re.findall(r"\d+", data.decode(row[:p])))
                self.assertEqual(data.decode(row[:n]), data.right_text(a, b))
                self.assertFalse(data.held_out(a, b))
                self.assertLessEqual(o + ids.shape[1], 200)
                used |= set(range(o, o + n))
                starts.append(o)
        self.assertEqual((used, len(set(map(str, seen)))), (set(range(200)), 200))
        self.assertLess(np.mean(spread), 10)
        self.assertAlmostEqual(np.mean(np.array(starts) == 0), 0.5, delta=0.08)  # 4 sigma: 0.07
        for start in (1, 63, 64, 130):
            ids, _, _, offset = next(pretrain.pretrain_batches(2, 4, 200, 0, CPU, start=start))
            self.assertEqual([ids.tolist(), offset.tolist()], seen[start], "as if never stopped")

    def test_answer_loss_and_learning_rate_by_hand(self):
        """The mean over the answers' tokens alone: neither prompts nor padding are predicted."""
        self.in_float32()
        net, pairs, offset = tiny_model(), [(1, 2), (3, 45)], torch.tensor([[0], [15]])
        ids, prompt_len, lengths = model.to_batch(pairs, CPU)
        with torch.no_grad():
            logp, terms = net(ids, offset)[0].log_softmax(-1), []
            for i, pair in enumerate(pairs):
                p, n = len(data.prompt(*pair)), len(data.right_text(*pair))
                terms += [-logp[i, t - 1, ids[i, t]].item() for t in range(p, n)]
            got = pretrain.answer_loss(net, ids, prompt_len, lengths, offset).item()
        self.assertAlmostEqual(got, np.mean(terms), places=4)
        rates = [pretrain.learning_rate(step, 1000, 2.0) for step in (0, 9, 99, 200, 600, 999)]
        np.testing.assert_allclose(rates, [0.02, 0.2, 2.0, 2.0, 1.0, 0.0025])


# ------------------------------------------------------------------ ppo.py
class PPO(Case):
    def setUp(self):
        self.in_float32()
        options = "--kl_coef 0.5 --alpha 2 --temperature 1.5 --entropy_coef 0".split()
        self.args = ppo.parse_args(options)
        self.pairs = [(12, 3), (34, 5), (6, 78), (90, 12), (3, 13), (8, 99), (50, 5), (44, 1)]
        self.policy, self.ref = tiny_model(), tiny_model(7, std=0.6)
        self.critic = ppo.ValueHead(16, seeded())
        torch.nn.init.normal_(self.critic[4].weight, generator=seeded(1))

    def rollout(self, **settings):
        vars(self.args).update(settings)
        return ppo.rollout(self.policy, self.critic, self.ref, self.pairs, 1, self.args, seeded())

    def update(self, batch, lr=0.0, **settings):
        """-> (the logged figures, the policy's gradient as one vector)"""
        args = argparse.Namespace(**(vars(self.args) | settings))
        stats = ppo.update(self.policy, self.critic, torch.optim.SGD(
            self.policy.parameters(), lr), batch, args, seeded())
        return stats, torch.cat([p.grad.flatten() for p in self.policy.parameters()])

    def test_rollout(self):
        """The reward comes with the last action; one temperature samples and scores; ref_logp."""
        with mock.patch.object(data, "grade", side_effect=[True, False] * 4), \
                mock.patch.object(ppo, "generate", side_effect=generate) as written:
            batch = self.rollout(gamma=0.99, gae_lambda=1.0)
        self.assertEqual(written.call_args.args[3], 1.5)
        self.assertEqual(batch["success"].tolist(), [1, 0] * 4)
        with torch.no_grad():
            logp, ref_logp = ((net(batch["states"])[0] / 1.5).log_softmax(-1).gather(
                -1, batch["actions"][..., None])[..., 0] for net in (self.policy, self.ref))
        for i, success in enumerate(batch["success"]):
            T, start = int(batch["n_actions"][i]), len(data.prompt(*self.pairs[i])) - 1
            mask = [float(start <= t < T) for t in range(batch["mask"].shape[1])]
            self.assertEqual(batch["mask"][i].tolist(), mask)
            returns = success * 0.99 ** torch.arange(T - start - 1, -1, -1.0)
            self.close(batch["returns"][i, start:T], returns)
            self.close(batch["old_logp"][i, :T], logp[i, :T])
            self.close(batch["ref_logp"][i, :T], ref_logp[i, :T])
        facts = dict(digits=1, task="add")
        first, second = (ppo.draw_problems(self.args, facts, i, CPU)[0] for i in (1, 2))
        self.assertFalse(first == second or any(data.held_out(*pair) for pair in first + second))

    def test_controls_of_the_weight(self):
        """Certainties 1, 1/2, 0, 1, ... with alpha 2: weights 1, 1/4, 0."""
        self.patch("ppo.certainty", lambda logits: torch.tensor([1.0, 0.5, 0.0])[
            torch.arange(logits[..., 0].numel()).view(logits.shape[:2]) % 3])
        got = [self.rollout(kl_weight=x) for x in ("certainty", "shuffled", "matched", "threshold")]
        expected, shuffled, matched, threshold = (x["weight"][x["mask"] > 0] for x in got)
        self.assertEqual(expected[:6].sort()[0].tolist(), [0, 0, 0.25, 0.25, 1, 1])
        self.close(matched, expected.mean().expand_as(expected))
        self.close(threshold, (expected == 1).float())
        self.close(shuffled.sort()[0], expected.sort()[0])
        self.assertAlmostEqual((shuffled == expected).float().mean().item(), 1 / 3, delta=0.1)

    def test_oracle(self):
        """12+3, N = 1: line 1's list [1,2] has the copied digit "1" and the critical ",2", line 2's
        list [1] the critical "1". They are free up to the first error, and with it."""
        right, self.pairs = data.right_text(12, 3), [(12, 3)]
        one, two = right.index("[1,2]"), right.index("[1] + []")
        places = [one + 1, one + 2, one + 3, two + 1]
        for at, wrong, n_free in ((0, "I", 4), (two - 1, " ", 3), (one + 2, "]", 2),
                                  (one + 1, "2", 1), (one, "-", 0)):
            ids = torch.tensor([data.encode(right[:at] + wrong + right[at + 1 :]) + [0] * 5])
            self.patch("ppo.generate", return_value=(ids, torch.tensor([len(right)])))
            weight = self.rollout(kl_weight="oracle")["weight"][0].tolist()
            self.assertEqual([i + 1 for i, x in enumerate(weight) if x == 0], places[:n_free])
            self.assertLessEqual(set(weight), {0, 1})

    def test_one_epoch_of_one_minibatch(self):
        """Over all answer tokens at once. The policy's gradient is A2C's, that of -A log pi +
        kl_coef J^alpha k2 - entropy_coef H, clipped to norm 1; none is the critic's. Figures of the
        rollout; then of actions now twice as likely to the policy, with twice the weight."""
        batch = self.rollout()
        here = batch["mask"] > 0
        batch["advantages"] += torch.randn(here.shape, generator=seeded())
        logits, hidden = self.policy(batch["states"])
        error = (self.critic(hidden) - batch["returns"])[here]
        pi, ref = (Categorical(logits=x[here]) for x in (logits / 1.5, batch["ref_logits"]))
        logp, a = pi.log_prob(batch["actions"][here]), batch["advantages"][here]
        k2 = (logp - ref.log_prob(batch["actions"][here])) ** 2 / 2
        weight = (1 - ref.entropy() / math.log(40)) ** 2
        terms = [-(a - a.mean()) / a.std(correction=0) * logp, 4 * weight * k2, -0.5 * pi.entropy()]
        parts = [torch.cat([g.flatten() for g in torch.autograd.grad(
            term.mean(), self.policy.parameters(), retain_graph=True)]) for term in terms]
        norms = [part.norm().item() for part in parts]
        self.assertGreater(min(norms), 0.3 * max(norms), "each term counts")
        got, gradient = self.update(batch, kl_coef=4.0, entropy_coef=0.5)
        self.close(gradient, sum(parts), atol=1e-6)
        self.assertGreater(self.critic[4].weight.grad.abs().sum().item(), 0)
        self.assertAlmostEqual(self.update(batch, kl_coef=1e3)[1].norm().item(), 1, places=4)
        for name, x in dict(kl=kl_divergence(pi, ref), penalty=weight * k2, entropy=pi.entropy(),
                            value_loss=error**2 / 2, weight=weight).items():
            self.assertGreater(abs(got[name]), 0.001, name)
            self.assertAlmostEqual(got[name] / x.mean().item(), 1, delta=0.001, msg=name)
        again, _ = self.update(batch | dict(old_logp=batch["old_logp"] - math.log(2),
                                            weight=2 * batch["weight"]))
        self.assertAlmostEqual(again["penalty"] / got["penalty"], 4, places=4)
        self.assertAlmostEqual(again["weight"] / got["weight"], 2, places=4)
        self.assertEqual((got["clip_fraction"], again["clip_fraction"]), (0, 1))

    def test_the_penalty_of_a_later_minibatch_has_the_kls_gradient(self):
        """All V actions of one state, drawn from an old policy: each row stands for one and weighs
        as often as it is drawn. With the ratio pi / pi_old the mean gradient is the exact KL's."""
        state = torch.tensor(data.encode("Input:\n1"))
        T, (old_logp, ref_logp) = len(state), torch.randn(2, 40, generator=seeded()).log_softmax(1)
        none, mask = torch.zeros(40), torch.eye(T)[-1:].expand(40, T)  # the last action alone
        batch = {name: x[:, None].expand(40, T) for name, x in dict(
            actions=torch.arange(40), old_logp=old_logp, ref_logp=ref_logp, returns=none,
            weight=40 * old_logp.exp(), advantages=none).items()}
        batch |= dict(states=state.expand(40, T), mask=mask, n_actions=torch.full((40,), T),
                      ref_logits=ref_logp.expand(40, T, 40))
        _, got = self.update(batch, kl_coef=0.001)
        pi = Categorical(logits=self.policy(state[None])[0][0, -1] / 1.5)
        kl = 0.001 * kl_divergence(pi, Categorical(logits=ref_logp))
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(kl, self.policy.parameters())])
        self.close(got, exact, atol=1e-4 * exact.norm().item())

    def test_slices_and_padding_change_nothing(self):
        """Gradients add up over slices of any size; rubbish beyond the answers does not matter."""
        batch = self.rollout()
        stats, expected = self.update(batch)
        rubbish = batch | {name: batch[name].masked_fill(batch["mask"] == 0, 3) for name in (
            "old_logp", "ref_logp", "weight", "advantages", "returns")}
        halves, _ = self.update(batch, minibatches=2)
        self.assertAlmostEqual(halves["weight"] / stats["weight"], 1, delta=0.3)
        for size, given in (1, batch), (3, batch), (100, rubbish):
            with mock.patch.object(ppo, "slices", lambda rows, lengths: [
                    (part, int(lengths[part].max())) for part in rows.split(size)]):
                again, gradient = self.update(given)
            self.close(gradient, expected, atol=1e-6)
            np.testing.assert_allclose(list(again.values()), list(stats.values()), rtol=1e-3)

    def test_nan_stops_before_the_weights_change(self):
        batch, before = self.rollout(), every_number(self.policy.state_dict())
        for name, bad in (("advantages", math.nan), ("ref_logp", math.inf), ("returns", math.inf)):
            wrong = batch[name].clone()
            wrong[3, batch["n_actions"][3] - 1] = bad
            self.fails(lambda x: self.update(x, lr=1.0), batch | {name: wrong}, "at this update")
            self.assertEqual(every_number(self.policy.state_dict()), before)

    def test_normalize_and_watch_critical_by_hand(self):
        """12+3 with N = 1: line 1 has one comma, one critical and one copied digit."""
        x, mask = torch.tensor([[0.0, 0.01, 5.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        self.close(ppo.normalize(x, mask)[:, :2], torch.tensor([[-0.05, 0.05]]))  # floor 0.1
        found = ppo.watch_critical(self.policy, [(12, 3)], 1, 1.5)
        ids = torch.tensor(data.encode(data.right_text(12, 3)))
        with torch.no_grad():
            p = (self.policy(ids[None])[0][0] / 1.5).softmax(-1)[range(len(ids) - 1), ids[1:]]
        at, line2 = data.decode(ids).index("[1,2]"), data.decode(ids).index("[1] ")
        for name, x in (("p_copied", p[at]), ("p_l1o1", p[at + 1]),
                        ("p_critical", p[[at + 1, at + 2, line2]].mean())):
            self.assertAlmostEqual(found[name], x.item(), places=5)
        known = pretrain.answer_loss(self.policy, *model.to_batch(self.pairs, CPU)).item()
        self.assertAlmostEqual(ppo.watch_known(self.policy, self.pairs), known, places=5)


# ------------------------------------------------------------------ runs and scripts
PRETRAIN = ("--digits 1 --preset tiny --steps 200 --batch_size 2 --eval_problems 4 --device cpu "
            "--out p").split()
RL = ("--checkpoint p/model.pt --iterations 3 --episodes 4 --minibatches 2 --eval_every 2 "
      "--eval_problems 2 --final_problems 2 --device cpu --out r").split()
TINY = dict(tiny=dict(n_layer=1, n_head=2, n_embd=16))


def save_each_time():
    """With it, 40 seconds go by between two looks at the clock."""
    return mock.patch("time.monotonic", side_effect=itertools.count(0, 40))


def run_killed(folder):
    """For a process without threads: both scripts, killed ever later -> the number of kills."""
    rename, rng = os.replace, np.random.default_rng(0)
    os.mkdir(folder)
    os.chdir(folder)
    for n in itertools.count(1):
        child = os.fork()
        if child == 0:
            # Killed before its first, second or third renaming: by and by, before each there is.
            left = itertools.count(n % 3, -1) if folder == "name" else itertools.count(1)
            os.replace = lambda *paths: (
                os.kill(os.getpid(), signal.SIGKILL) if next(left) == 0 else rename(*paths))
            try:
                with save_each_time(), mock.patch.dict(model.PRESETS, TINY):
                    quiet(pretrain.main, PRETRAIN)
                    quiet(ppo.main, RL)
                    os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        if "random" in folder:
            time.sleep(rng.uniform(0, 0.4 * n))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            os.chdir("..")
            return n - 1 if status == 0 else sys.exit(1)
        for path in Path().glob("[pr]/*.pt"):
            model.load(path)  # is whole


@mock.patch.dict(model.PRESETS, TINY)
class Scripts(Case):
    def setUp(self):
        super().setUp()
        os.mkdir("p")
        save_tiny("p/model.pt")

    @unittest.skipUnless(hasattr(os, "fork"), "Windows cannot fork")
    def test_killed_at_any_moment(self):
        """Before each renaming, so also between model.pt and accuracies.json; at random moments."""
        def results(folder):
            return every_number([[read_log(run), text_of(run, "accuracies.json"), *(
                model.load(run / name) | dict(seconds=0, log=0) for name in (
                    "state.pt", "model.pt"))] for run in (Path(folder, "p"), Path(folder, "r"))])

        folders = ["whole", "name", *[f"random{i}" for i in range(12 if SLOW else 1)]]
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_all\n"
        printed = self.python("-c", f"{code}print(*map(test_all.run_killed, {folders}))")
        kills = list(map(int, printed.split()))
        self.assertTrue(kills[0] == 0 and kills[1] > 10 and min(kills[2:]) > 0, kills)
        self.assertTrue(not SLOW or sum(kills) >= 60, kills)
        for folder in folders[1:]:
            self.assertTrue(results(folder) == results("whole"), folder)

    def finished(self, *options):
        """Run ppo.py to its end -> (its log and its results, what it printed)."""
        code, printed, errors = ended(ppo.main, [*RL, *options])
        self.assertEqual(code, 0, errors)
        return (read_log("r"), text_of("r/accuracies.json")), printed

    def test_damaged_files(self):
        """Results that were lost are measured again. Else a line names the file and --fresh."""
        results, _ = self.finished()
        self.assertEqual([row["iteration"] for row in results[0]], list("0123"))
        state, log = model.load("r/state.pt"), Path("r/log.csv").read_bytes()
        for damaged in "", "[]", '{"alpha": 3', '{"settings": []}', '{"settings": 5}':
            for name in "accuracies.json", "model.pt":
                Path("r", name).write_text(damaged)
                again, printed = self.finished()
                self.assertEqual((again, "r resumes after step 3" in printed), (results, True))
        os.remove("r/accuracies.json")
        nan = {name: x * math.nan for name, x in state["policy"].items()}
        small, adam = ppo.ValueHead(8).state_dict(), state["optimizer"]
        of_nan, of_five = (adam | dict(state={0: adam["state"][0] | dict(exp_avg=x)})
                           for x in (nan["transformer.wte.weight"], torch.zeros(5)))
        for other in [], dict(step=1), *(state | {name: x} for name, x in (
                ("log", 5), ("step", "x"), ("seconds", "x"), ("policy", nan), ("value_head", small),
                ("optimizer", of_nan), ("optimizer", of_five))):
            torch.save(other, "r/state.pt")
            self.fails(ppo.main, RL, "--fresh starts over")
        torch.save(state, "r/state.pt")
        for changed in (log[:-9], log.replace(b"\n", b"\r\n"),  # cut; saved by a spreadsheet
                        log + b"4,0.12"):  # half a row of after the last state
            Path("r/accuracies.json").unlink(missing_ok=True)
            Path("r/log.csv").write_bytes(changed)
            self.assertEqual(self.finished()[0], results)
            self.assertEqual(Path("r/log.csv").read_bytes(), log)
        Path("r/state.pt").write_bytes(b"")
        with mock.patch("ppo.rollout", None):
            self.finished()
        os.remove("r/accuracies.json")
        self.fails(ppo.main, RL, os.path.join("r", "state.pt"))
        torch.seed()  # whatever the global generator holds
        again, printed = self.finished("--fresh")
        self.assertEqual(again, results)
        self.assertIn("--fresh removes the run in r", printed)
        self.assertNotEqual(self.finished("--fresh", "--seed", "1")[0], results)

    def test_folders_in_use(self):
        """Two runs are never mixed, and what is no run of this script is never removed."""
        (_, results), _ = self.finished()
        state = model.load("r/state.pt")
        self.fails(ppo.main, [*RL, "--lr", "0.001"], "r holds a run with lr 0.0001, not 0.001")
        Path("r/accuracies.json").write_text(results.replace('"alpha": 3.0', '"alpha": 0.0'))
        self.fails(ppo.main, RL, "holds a run with alpha 0.0, not 3.0; choose another --out, or")
        os.remove("r/accuracies.json")
        torch.save(state | dict(settings=state["settings"] | dict(seed=1)), "r/state.pt")
        self.fails(ppo.main, RL, "seed 1, not 0")
        with contextlib.closing(sqlite3.connect("r/lock")) as other:
            other.execute("BEGIN EXCLUSIVE")
            for fresh in [], ["--fresh"]:
                self.fails(ppo.main, RL + fresh, "a run is going on there")
        Path("r/log.csv").write_text("mine")
        for change in (lambda x: x.write_text("// mine"), lambda x: x.write_text("{}"), os.remove):
            change(Path("r/settings.json"))
            for fresh in [], ["--fresh"]:
                self.fails(ppo.main, RL + fresh, "choose another --out")
        self.assertEqual((text_of("r/log.csv"), os.path.exists("r/model.pt")), ("mine", True))
        self.fails(ppo.main, [*RL, "--out", "p", "--fresh"], "holds the checkpoint in use")

    def test_two_that_write_one_file(self):
        """Each under a name of its own until it is whole; a run removes what a killed one left,
        and nobody else's."""
        def during(file):
            with mock.patch("os.getpid", return_value=1):
                model.write_file("r/one", lambda other: other.write(b"other"))
            file.write(b"mine")
        os.mkdir("r")
        model.write_file("r/one", during)
        self.assertEqual(text_of("r/one"), "mine")
        for name in "model.pt.1.part", "film.part":
            Path("r", name).touch()
        self.finished()
        self.assertEqual(list(Path("r").glob("*.part")), [Path("r/film.part")])

    def test_writes_that_fail(self):
        """The next write carries what was missed, or what somebody removed; the last is whole."""
        (expected, _), draw = self.finished(), ppo.draw_problems
        full = OSError(28, "No space left on device")

        def remove_log(args, facts, iteration, device):
            if iteration == 3:
                os.remove("r/log.csv")
            return draw(args, facts, iteration, device)
        # The writes: settings.json, then a row of the log, a state, a row, ...
        with mock.patch("os.fsync", side_effect=[None, None, full, full, *[None] * 99]):
            with mock.patch("ppo.draw_problems", remove_log), save_each_time():
                self.assertIn("the run goes on", self.finished("--fresh")[1])
        self.assertEqual(self.finished()[0], expected)
        for n in 8, 7:  # the last state fails, or the last row
            with mock.patch("os.fsync", side_effect=[None] * n + [full] * 99), save_each_time():
                self.fails(ppo.main, [*RL, "--fresh"], "(No space left on device)")
            self.assertEqual(list(Path("r").glob("*.part")), [])
            model.load("r/state.pt")  # is whole
            self.assertEqual(self.finished()[0], expected)

    def test_interrupts_and_pipes(self):
        with mock.patch("ppo.update", side_effect=KeyboardInterrupt):
            code, _, errors = ended(ppo.main, RL)
        self.assertEqual(code, 130)
        self.assertIn("interrupted; the same command, without --fresh, goes on", errors)
        for script in "pretrain.py", "ppo.py", "analyze.py":  # while it imports, or just after
            run = subprocess.Popen([sys.executable, script, "x"], cwd=HERE, stderr=subprocess.PIPE)
            time.sleep(0.5)
            run.send_signal(signal.SIGINT)
            self.assertNotIn(b"Traceback", run.communicate()[1])
        code = "import sys, pretrain; sys.exit(pretrain.run_script(print, 'text', ''))"
        with subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as run:
            run.stdout.close()  # who reads its output has ended
            self.assertEqual((run.stderr.read(), run.wait()), (b"", 141))

    def test_numbers_that_go_wrong(self):
        steps, loss = itertools.count(1), pretrain.answer_loss
        os.remove("p/model.pt")
        with save_each_time(), mock.patch("pretrain.answer_loss", lambda *args: (
                math.nan if next(steps) == 137 else 1) * loss(*args)):
            self.fails(pretrain.main, PRETRAIN, "loss is nan at step 200; lower --lr")
        steps = [row["step"] for row in read_log("p")], model.load("p/state.pt")["step"]
        self.assertEqual((steps, os.path.exists("p/model.pt")), ((["100"], 100), False))
        self.assertIn("p resumes after step 100", quiet(pretrain.main, PRETRAIN)[1])
        with save_each_time(), mock.patch("ppo.gae", lambda rewards, *args: rewards + math.inf):
            self.fails(ppo.main, RL, "at iteration 1; lower --lr")
        self.assertEqual((len(read_log("r")), model.load("r/state.pt")["step"]), (1, 0))

    def test_checkpoints_that_cannot_be_used(self):
        class Malicious:
            def __reduce__(self):
                return os.mkdir, ("owned",)

        whole = model.load("p/model.pt")
        nan = {name: x * math.nan for name, x in whole["model"].items()}
        wrong = [[1], {"model": {}}, torch.zeros(3), {"x": Malicious()}]
        wrong += [whole | {name: x} for name, x in (
            ("vocab", "ab"), ("model", {}), ("model", nan), ("config", {}), ("seed", "/../../x"),
            ("seed", 2**32), ("digits", 0), ("digits", 10**9), ("digits", "1"), ("preset", None),
            ("task", "multiply"), ("accuracies", [1]), ("accuracies", {"identical 1": math.nan}))]
        sizes = dict(n_layer=10**6, n_head=3, n_embd=10**5, block_size=-1, vocab_size=41)
        wrong += [whole | dict(config=whole["config"] | {name: x}) for name, x in sizes.items()]
        wrong += [{name: whole[name] for name in whole.keys() - {missing}} for missing in whole]
        for i, other in enumerate(wrong):
            torch.save(other, f"foreign{i}.pt")
            self.fails(ppo.main, ["--checkpoint", f"foreign{i}.pt"], f"cannot use foreign{i}.pt")
        self.fails(ppo.main, ["--checkpoint", "nowhere.pt"], "cannot use nowhere.pt (No such file")
        self.fails(ppo.main, ["--checkpoint", "p/model.pt", "--extra_digits", "2"], "3 digits")
        with mock.patch("os.sysconf", create=True, return_value=1183):  # 1.4 MB: to train
            self.fails(pretrain.main, PRETRAIN, "GiB of memory")
            self.fails(ppo.main, [*RL, "--final_problems", "64"], "GiB of memory")
        self.assertEqual([x for x in os.listdir() if os.path.isdir(x)], ["p"], "no code was run")

    def test_a_file_damaged_at_any_byte(self):
        """It is refused, or what it holds is right all the same."""
        model.write_file("good.pt", lambda file: torch.save(dict(x=torch.arange(5.0), y="a"), file))
        good, rng = Path("good.pt").read_bytes(), np.random.default_rng(0)
        for i in range(0, len(good), 1 if SLOW else 7):
            flipped = good[:i] + bytes([good[i] ^ 1 << rng.integers(8)]) + good[i + 1 :]
            for contents in (good[:i], flipped):
                Path("bad.pt").write_bytes(contents)
                with contextlib.suppress(OSError):
                    got = every_number(model.read_file("bad.pt", model.load, ""))
                    self.assertEqual(got, '{"x": [0.0, 1.0, 2.0, 3.0, 4.0], "y": "a"}')

    def test_settings_that_cannot_work(self):
        os.remove("p/model.pt")
        for script, options in (
                (pretrain, "digits=0 digits=five digits=4000 seed=-1 seed=4294967296 device=abacus "
                 f"device=cpu:x device=cpu:-1 steps=0 steps={'9' * 5000} lr=nan lr=-1 lr=1e308 "
                 "batch_size=0 task=multiply preset=huge unheard_of=1"),
                (ppo, "alpha=nan alpha=-1 kl_coef=inf lr=-1 clip=nan temperature=0 extra_digits=0 "
                 "extra_digits=4999 seed=1e3 episodes=0 minibatches=65 epochs=0 kl_weight=random "
                 "iterations=-1 digits=5")):
            for option in options.split():
                self.fails(script.main, [f"--{option}"], option.split("=")[0])
        self.fails(pretrain.main, ["--digits", "99"], "GiB of memory")
        self.assertEqual(os.listdir(), ["p"], "nothing was written")
        Path("file").touch()
        for out, fresh in itertools.product(("file", "file/run", "x" * 300, ""), ([], ["--fresh"])):
            self.fails(pretrain.main, [*PRETRAIN, "--out", out, *fresh], out[:4] or "out is empty")

    def test_fuzz(self):
        """Odd command lines, and runs whose files were damaged: a result or one line."""
        rng = np.random.default_rng(0)
        odd = ["0", "1", "2", "-1", "nan", "inf", "1e400", "", "x", "9" * 30, "p", "p/model.pt"]
        words = [*odd, "r", "*", "7", "3+4", "--show", "kl", "--problems", "--out", "--alpha",
                 "--temperature", "--device", "cpu:x"]
        verbs = ["answer", "tokens", "explain", "curves", "compare"]
        short = (pretrain, *PRETRAIN, "--steps=2", "--out=q"), (ppo, *RL, "--iterations=1")
        for i in range(1000 if SLOW else 40):
            script, *argv = short[i % 2]
            names = sorted(vars(script.parse_args([])).keys() - {"fresh"})
            changes = [f"--{name}={rng.choice(odd)}" for name in rng.choice(names, 2)]
            self.ends_well(script.main, [*argv, *changes, "--fresh"])
        self.finished("--fresh")
        for _ in range(400 if SLOW else 30):
            self.ends_well(analyze.main, [rng.choice(verbs), *rng.choice(words, rng.integers(5))])
        for _ in range(300 if SLOW else 10):
            copy = shutil.copytree("r", "copy")
            path = Path(copy, rng.choice(pretrain.Run.FILES))
            contents = np.fromfile(path, np.uint8)
            contents[rng.integers(0, len(contents), 3)] = rng.integers(0, 256, 3)
            contents[: rng.integers(1, 2 * len(contents))].tofile(path)
            for verb in verbs[2:]:
                self.ends_well(analyze.main, [verb, copy])
            if rng.random() < 0.7:
                os.remove("copy/accuracies.json")
            self.ends_well(ppo.main, [*RL, "--out", "copy"])
            shutil.rmtree(copy)

    def test_folder_names(self):
        """Short, legal on Windows, the same for the same settings and no others."""
        long, names = "--kl_coef 0.05 --lr 0.001 --value_lr 0.01 --temperature 1.2", []
        for options in ("", "--device cpu --checkpoint a/b\\c:d", "--lr 1e-05", "--lr 0.001",
                        "--kl_weight threshold", "--alpha 3.0000001", long, long + "5",
                        long + " --clip 0.1",
                        "--seed 7 --alpha 9 --lr 3e-05 --clip 0.15 --episodes 128"):
            args = ppo.parse_args(options.split())
            prefix = f"ppo_n5_seed0_ab67a433_alpha{args.alpha}"
            names.append(pretrain.folder_of(args, ppo.parse_args([]), prefix, ["alpha"]))
            self.assertRegex(names[-1], r"^out[/\\][\w.-]{1,80}$")
        self.assertEqual((names[1], len(set(names))), (names[0], len(names) - 1), names)

    def test_the_other_task(self):
        """Subtraction, named in data.py alone, end to end; explain rebuilds what comes next."""
        os.remove("p/model.pt")
        quiet(pretrain.main, [*PRETRAIN, "--task", "subtract", "--steps", "3"])
        quiet(ppo.main, [*RL, "--iterations", "1", "--alpha", "2"])
        quiet(analyze.main, ["tokens", "r/model.pt", "--problems", "4", "--device", "cpu"])
        for name in ("model.py", "kl.py", "pretrain.py", "ppo.py"):
            self.assertNotIn('"subtract"', text_of(HERE, name))
        _, printed = quiet(analyze.main, ["explain", "r", "--device", "cpu"])
        self.assertRegex(printed, r"(?s)Input:\n\d\d?-\d\d?\nTarget:.*J\^2 = ")
        save_tiny("other.pt", seed=1)
        self.fails(analyze.main, ["explain", "r", "--checkpoint", "other.pt"], "no run of ppo.py")
        os.truncate("r/state.pt", 2000)
        self.fails(analyze.main, ["explain", "r"], "state.pt")
        os.remove("r/state.pt")
        self.assertIn("k2 is 0", quiet(analyze.main, ["explain", "r", "--device", "cpu"])[1])
        self.fails(analyze.main, ["explain", "nothing"], "settings.json")

    def test_end_to_end(self):
        """Pre-training learns; its answers do not depend on reading ahead; PPO forgets nothing."""
        argv = "--digits 1 --preset narrow --steps 500 --eval_problems 20 --device cpu --out n"
        quiet(pretrain.main, argv.split())
        net, facts = model.load_checkpoint("n/model.pt", CPU)
        learned = [(a, b) for a in range(10) for b in range(10) if not data.held_out(a, b)]
        self.assertGreater(model.solve(net, learned)[0].mean(), 0.75)
        quiet(ppo.main, [*RL, "--checkpoint", "n/model.pt", "--episodes", "16"])
        self.assertEqual(json.loads(text_of("r/accuracies.json"))["before"], facts["accuracies"])
        tuned, _ = model.load_checkpoint("r/model.pt", CPU)
        self.assertGreater(model.solve(tuned, learned)[0].mean(), 0.6)
        quiet(analyze.main, ["curves", "r"])
        self.assertTrue(os.path.exists("out/figures/curves.png"))
        self.in_float32()
        problems = learned[:20] + data.sample_problems(20, 2, "varying", 1)
        correct, texts = model.solve(net, problems)
        self.assertTrue(correct.any() and not correct.all())
        ids, lengths = generate(net, [data.encode(data.prompt(*x)) for x in problems], 999, 0)
        self.assertEqual(texts, [data.decode(row[:n]) for row, n in zip(ids, lengths)])


# ------------------------------------------------------------------ analyze.py
class Analyze(Case):
    def write_run(self, folder, alpha=3.0, model="m0", after=0.5, rows=2, digits=5, **settings):
        """A run of ppo.py, k = 1, as it lies on disk; two numbers of N + 1 digits: 25% before."""
        path, new = Path(folder), f"identical {digits + 1}"
        path.mkdir(parents=True)
        settings = dict(alpha=alpha, kl_coef=0.1, kl_weight="certainty", digits=digits, seed=0,
                        extra_digits=1, task="add", pretrained=model, eval_every=5) | settings
        before = {f"identical {digits}": 1.0, f"varying {digits}": 1.0, new: 0.25,
                  f"varying {digits + 1}": 0.5}
        tables = dict(settings=settings, before=before, after=before | {new: after})
        (path / "settings.json").write_text(json.dumps(settings))
        (path / "accuracies.json").write_text(json.dumps(tables))
        (path / "log.csv").write_text(
            "iteration,episodes,kl,nk_identical,nk_varying,n_identical,success\n" + "".join(
                f"{i},{64 * i},{0.5 if i else ''},{0.25 + i / 10},{i / 50},1,{i / 100}\n"
                for i in range(rows)))
        return path

    def test_statistics_by_hand(self):
        for got, expected in (
                ([analyze.t_quantile(n) for n in (1, 2, 9, 30, 100, 1000)],  # scipy.stats.t.ppf
                 [12.706205, 4.302653, 2.262157, 2.042272, 1.983972, 1.962339]),
                (analyze.interval([0, 1, 2]), (1, 1 - 4.302653 / 3**0.5, 1 + 4.302653 / 3**0.5)),
                (analyze.interval([4]), (4, math.nan, math.nan)),
                (analyze.paired_differences(dict(m1=5, m0=1, m2=0), dict(m0=3, m1=4)), [1, -2])):
            np.testing.assert_allclose(got, expected, atol=2e-6)
        for differences, expected in (
                ([3, -1, 2], 4 / 8),  # sums of 4 or more: 6, 4, -4, -6
                ([0.1, 0.2, 0.3, -0.6], 1), ([0, 0], 1), ([], 1), ([2.0] * 40, 2 / 2**40),
                ([1.0] * 38 + [-1.0] * 2, 2 * (1 + 40 + 780) / 2**40)):  # 0, 1 or 2 signs less
            self.assertAlmostEqual(analyze.sign_flip_p(differences) / expected, 1, places=9)
        for differences in np.random.default_rng(0).normal(0.3, 1, (20, 7)).round(1):
            sums = [abs(np.dot(x, differences)) for x in itertools.product((1, -1), repeat=7)]
            expected = np.mean([x >= abs(differences.sum()) - 1e-9 for x in sums])
            self.assertEqual(analyze.sign_flip_p(differences), expected)
        for wrong in [1.0] * 41, [math.nan, 1], [math.inf, 1]:
            self.assertRaises(ValueError, analyze.sign_flip_p, wrong)

    def test_import_changes_nothing(self):
        self.python("-c", "import matplotlib, sys, torch; torch.set_num_threads(3); "
                    "before = list(dict.items(matplotlib.rcParams)); import analyze; "
                    "assert not {'matplotlib.pyplot', 'ppo'} & set(sys.modules); import test_all; "
                    "assert list(dict.items(matplotlib.rcParams)) == before; "
                    "assert torch.get_num_threads() == 3", folder=HERE)

    def test_one_thread(self):
        """So that a seed gives the same numbers however many cores there are."""
        self.addCleanup(torch.set_num_threads, 1)
        torch.set_num_threads(3)
        for given, expected in ({}, 1), (dict(OMP_NUM_THREADS="3"), 3):
            with mock.patch.dict(os.environ, given, clear=True):
                pretrain.run_script(lambda args: self.assertEqual(
                    torch.get_num_threads(), expected), None)
            self.assertEqual(torch.get_num_threads(), 3)

    def answers(self, unsure, n_digits, *wrong):
        """WORKED, each time with another character at an index, as read by a model of certainty 0
        before the characters at the indices `unsure`, else 1."""
        logits = 1000 * torch.eye(40)[:1].repeat(len(WORKED), 1)
        logits[unsure] = 0
        self.patch("analyze.read_logits", lambda model, texts: [logits] * len(texts))
        texts = [WORKED[:at] + char + WORKED[at + 1 :] for at, char in wrong] or [WORKED]
        return analyze.read_answers(None, [(367, 28)] * len(texts), texts, n_digits)

    def test_where_answers_go_wrong(self):
        """N = 2: in [3,6,7] 6 is the copied digit, ',7' are critical. Of three answers that err
        there the last has a right result, and two err at the comma, where certainty is 0."""
        six = WORKED.index("[3,6,7]") + 3
        answers = self.answers([six + 1], 2, (six + 1, "]"), (six + 2, "6"), (six + 1, "6"),
                               (six, "7"), (len(WORKED) - 2, "6"))
        found = analyze.first_wrong(answers, [False, False, True, False, False], 2)
        for name, counts in zip(analyze.CLASSES, ((3, 2, 1 / 3), (1, 1, 1), (1, 1, 1))):
            np.testing.assert_allclose(list(found[name].values()), counts, atol=1e-7)
        found = analyze.first_wrong(self.answers([], 2), [True], 2)
        self.assertEqual(found["elsewhere"], dict(answers=0, failures=0, certainty=None))

    def test_table_1_and_unsure_tokens(self):
        """Certainty 0 at line 1's last comma and at one other token, else 1. Lines 1 to 3 have the
        critical tokens ',7', ',6' and '3'. With L tokens the comma has 0 - (L - 2) / (L - 1), the
        four others 1 - (L - 3) / (L - 1)."""
        comma, L = WORKED.index("[3,6,7]") + 4, len(WORKED) - len(data.prompt(367, 28))
        unsure = [comma, len(WORKED) - 2]
        right = self.answers(unsure, 2)
        self.assertAlmostEqual(analyze.paper_table_1(right, 1), (-(L - 2) + 4 * 2) / (L - 1) / 5,
                               places=5)
        self.assertEqual(analyze.unsure_tokens(right, 2), dict(critical=7, unsure=2, both=1))
        wrong = self.answers(unsure, 2, (comma, "]"))  # it reaches one critical token, the comma
        self.assertAlmostEqual(analyze.paper_table_1(wrong, 1), -(L - 2) / (L - 1), places=5)
        self.assertAlmostEqual(analyze.paper_table_1(wrong, 1, whole=False), -1, places=5)
        self.assertIsNone(analyze.paper_table_1(self.answers(unsure, 3), 1))

    def test_answer_in_text_and_picture(self):
        comma = WORKED.index("[3,6,7]") + 4
        [wrong] = self.answers([comma], 2, (comma, "]"))
        lines = analyze.answer_lines(wrong, 2)
        self.assertEqual(analyze.answer_text(lines).split("\n")[:5], [
            "problem  367+28: line 1, operand 1: wrote ']' for ','", "         <scratch>",
            "wrote    [3,6]7] + [2,8] , A=[] , C=0 , 7+8+0=15 , A->5 , C->1", "             ^",
            "right    [3,6,7] + [2,8] , A=[] , C=0 , 7+8+0=15 , A->5 , C->1"])
        np.testing.assert_allclose(lines[2].sure[:6], [1, 1, 1, 1, 0, 1], atol=1e-6)
        outlined = analyze.draw_answers({"": [lines]}, 2).axes[0].patches
        self.assertEqual([patch.get_xy() for patch in outlined], [(3.5, 1.5), (3.5, 2.5)])
        self.patch("analyze.read_logits", lambda model, texts: [torch.zeros(len(texts[0]), 40)])
        for text in ("", "\n", WORKED[:30], WORKED[:-1], "x" * 300):  # whatever a model may write
            text = data.prompt(367, 28) + text.replace("x", "A")
            lines = analyze.answer_lines(*analyze.read_answers(None, [(367, 28)], [text], 2), 2)
            self.assertEqual(analyze.answer_text(lines).count("\nright "), 1)
            _, printed = quiet(analyze.draw_answers, dict(one=[lines] * 40), 2)
            self.assertIn("the picture shows 90 of ", printed)
        self.assertIn("130 of at most 300 characters", printed)

    def test_answer(self):
        save_tiny("a.pt")
        for words in (["12+3"], [" 12 + 3 "], ["12", "+", "3"], ["a.pt", "12+3"]):
            _, printed = quiet(analyze.main, ["answer", "a.pt", *words, "--device=cpu", "--out=f"])
            self.assertIn("12+3: ", printed)
            self.assertEqual(printed.count("operand 1: last comma "), 1 + ("a.pt" in words))
        self.assertGreater(os.path.getsize("f/answer.png"), 1000)
        for words, message in (
                *((f"a.pt {problem}", "is not a problem") for problem in (
                    "12-3", "12+3+4", "9" * 5000 + "+1", "\u0661+1")),
                *((f"a.pt {problem}", "no problem in 'a.pt") for problem in ("one", "12x3", "")),
                (f"a.pt {'9' * 400}+1", "no positions"), ("b.pt 1+2", "b.pt"),
                ("1+2", "name one or two"), ("a.pt a.pt a.pt 1+2", "name one or two")):
            self.fails(analyze.main, ["answer", *words.split(" ")], message)
        self.assertEqual(analyze.parse_problem("12 -5", "subtract"), (12, -5))
        if sys.platform == "linux":  # a name that is no UTF-8, nor a formula
            os.rename("a.pt", b"\xff$\\x$.pt")
            self.python(HERE / "analyze.py", "answer", b"\xff$\\x$.pt", "12+3", "--device=cpu")

    def test_tokens(self):
        """The json is there before the picture, with no NaN; a picture of bounded size."""
        save_tiny("a.pt")
        argv = ["tokens", "a.pt", "--problems", "6", "--device", "cpu", "--out", "f", "--show", "6"]
        quiet(analyze.main, argv + ["--after", "a.pt"])
        contents = json.loads(text_of("f/tokens.json"), parse_constant=self.fail)
        for name in "table_1", "table_1_reached":
            self.assertEqual((contents["problems"], list(contents[name])), (6, ["1", "2", "4"]))
        width, height = (int.from_bytes(Path("f/tokens.png").read_bytes()[i : i + 4])
                         for i in (16, 20))
        self.assertLess(max(width, height), 6000)
        os.remove("f/tokens.json")
        self.patch("analyze.draw_answers", side_effect=OSError("no picture"))
        self.fails(analyze.main, argv, "no picture")
        self.assertTrue(os.path.exists("f/tokens.json"))
        self.fails(analyze.main, argv + ["--extra_digits", "9"], "no positions")
        save_tiny("huge.pt", std=1e30)  # finite weights, but not its logits
        self.fails(analyze.main, ["tokens", "huge.pt", *argv[2:]], "logits are not finite")

    def test_explain(self):
        """It shows the right answer whose freed critical token costs most, and works out its J."""
        pairs = [(12, 3), (45, 1), (67, 8)]
        texts = [data.right_text(*pair) for pair in pairs]
        _, _, mask = model.split_actions(*model.to_batch(pairs, CPU))
        batch = {name: torch.zeros_like(mask) for name in ("old_logp", "ref_logp", "advantages")}
        batch |= dict(mask=mask, weight=mask / 2, ref_logits=torch.zeros(*mask.shape, 40),
                      success=torch.tensor([1.0, 1.0, 0.0]))
        critical = ppo.known_critical(texts, pairs, 1, mask)
        comma = data.critical_positions(45, 1, 1)[1, 1, "comma1"] - 1
        batch["ref_logp"][1:, comma] = torch.tensor([-2.0, -3.0])  # the last answer is wrong
        batch["ref_logp"][0, 40] = -3.0  # costs more, at a token that is not critical
        options = ppo.parse_args(["--alpha", "2", "--kl_coef", "0.5"])
        printed = analyze.explain_text(batch, pairs, texts, critical, options)
        self.assertIn("Input:\n45+1\nTarget:", printed)
        self.assertIn("* line 1, operand 1 ',' -2.0000 0.0000 2.0000 0.0000 0.5000 1.0000 0.0000 "
                      "0.5000", " ".join(printed.split()))  # loss: kl_coef 0.5 * weight 0.5 * k2 2
        self.assertRegex(printed, r"entropy H .*3\.6889.* = 0\.0000")  # log 40, J
        self.assertLessEqual(max(map(len, printed.splitlines())), 100)

    def test_compare(self):
        """Two 6-digit numbers: alpha 0 has 20, 30, 40%, alpha 3 10, 20, 30 more: 30, 50 and 20 -+
        4.303 * 10 / sqrt(3). Of 8 choices of signs +++ and --- reach 60: p = 1/4."""
        for alpha, m in itertools.product((3.0, 0.0), range(3)):
            after = 0.2 + m / 10 + (alpha > 0) * (m + 1) / 10
            self.write_run(f"runs/alpha{alpha:g}_{m}", alpha, f"m{m}", after, eval_every=m)
        _, printed = quiet(analyze.main, ["compare", "runs/*"])
        for text in ("30.0 [5.2, 54.8]", "50.0 [0.3, 99.7]", "+20.0 [-4.8, +44.8], p = 0.250",
                     "minus alpha 0 (models)", "two 6-digit numbers, %", "before (3)"):
            self.assertIn(text, printed)
        backwards = sorted(map(str, Path("runs").iterdir()))[::-1]
        self.assertEqual(quiet(analyze.main, ["compare", *backwards])[1], printed)
        _, printed = quiet(analyze.main, ["compare", "runs/alpha0_1", "runs/alpha3_1"])
        self.assertIn("One model cannot show", printed)
        self.assertNotIn("minus", printed)
        shutil.rmtree("runs/alpha3_2")  # a model of one setting only is left out of the pairs
        self.assertIn("| alpha 3 (2) ", quiet(analyze.main, ["compare", "runs/*"])[1])
        os.remove("runs/alpha0_0/accuracies.json")
        self.fails(analyze.main, ["compare", "runs/*"], "alpha0_0 is not a finished run")
        for m in range(41):
            self.write_run(f"many/{m}", 3.0, f"m{m}")
        self.fails(analyze.main, ["compare", "many/*"], "at most 40")

    def test_settings_in_words(self):
        """Their order, and what makes them differ."""
        kinds = [dict(), dict(alpha=10.0), dict(alpha=0.0), dict(kl_coef=0.0),
                 dict(kl_coef=0.0, alpha=0.0), dict(kl_coef=0.05), dict(kl_weight="oracle"),
                 dict(kl_weight="oracle", alpha=0.0), dict(kl_weight="matched")]
        for i, settings in enumerate(kinds):
            self.write_run(f"runs/{i}", model=f"m{i}", **settings)
        groups = analyze.group_runs(analyze.load_runs(["runs/*"]))
        self.assertEqual([f"{label}: {len(groups[label])}" for label in groups], [
            "alpha 0: 1", "alpha 3: 1", "alpha 3, kl_coef 0.05: 1", "alpha 10: 1",
            "alpha 3, matched: 1", "oracle: 2", "no penalty: 2"])
        self.write_run("runs/9", lr=0.01)
        self.write_run("runs/10", lr=0.002)
        labels = list(analyze.group_runs(analyze.load_runs(["runs/9", "runs/10"])))
        self.assertEqual(labels, ["alpha 3, lr 0.002", "alpha 3, lr 0.01"])
        self.assertEqual(ppo.parse_args([]).kl_coef, 0.1)  # what penalty_in_words leaves out

    def test_pictures(self):
        """Percentages between 0 and 100, a name at every setting, one look for each setting."""
        for alpha, m in itertools.product((0.0, 3.0, 7.0, 8.0), range(3)):
            self.write_run(f"runs/{alpha}_{m}", alpha, f"m{m}", after=m / 2)
        groups = analyze.group_runs(analyze.load_runs(["runs/*"]))
        figure = analyze.draw_compare(groups)
        learned, kept = figure.axes
        self.assertEqual([tick.get_text() for tick in learned.get_yticklabels()], list(groups))
        self.assertEqual((learned.get_xlim(), kept.get_xlim()), ((0, 100), (0, 100)))
        self.assertTrue(learned.get_title().startswith("learned: two 6-digit numbers, %"))
        self.assertIn("3 models, 95% interval", figure.get_suptitle())
        self.assertEqual(len({tuple(analyze.look(label).values()) for label in groups}), 4)
        [axis] = analyze.draw_curves(groups, ["nk_identical"]).axes
        self.assertEqual((axis.get_title(), axis.get_ylim()), ("two 6-digit numbers, %", (0, 100)))
        for label, x in zip(groups, axis.lines[::2]):  # after each curve comes its interval
            self.assertEqual((x.get_label(), x.get_color()), (label, analyze.look(label)["color"]))
            np.testing.assert_allclose(x.get_ydata(), [25, 35])
        shown, printed = quiet(analyze.legible, {i: -i for i in range(50)}, 30)
        self.assertEqual(shown, {i: -i for i in range(30)})
        self.assertIn("the first 30 of 50 settings", printed)

    def test_files_of_runs(self):
        """What is damaged ends in one line that names it; what is not there yet is left out."""
        run = self.write_run("runs/a [1]")
        empty, begun = self.write_run("runs/b", rows=0), self.write_run("runs/c", rows=1)
        os.remove(self.write_run("runs/d") / "log.csv")
        _, printed = quiet(analyze.main, ["curves", "runs/a [1]", "runs/?"])
        for path in (empty, begun, "runs/d"):
            self.assertIn(str(path), printed)
        (run / "log.csv").write_text(text_of(run, "log.csv") + "2,12")  # is being written
        self.assertEqual(len(analyze.load_run(run).log["kl"]), 2)
        for path, message in (("runs/d", "no iteration"), ("runs/d/settings.json", "is no folder"),
                              ("runs/x*", "no folder matches")):
            self.fails(analyze.main, ["curves", path], message)
        self.fails(analyze.main, ["curves", str(run), "--show", "loss"], "not all logged")
        for name, contents in itertools.product(
                ("settings.json", "log.csv", "accuracies.json"),
                ("", "{", "[]", "null", "{}", "[" * 100_000, "\0\xff", "a,b\n1\n", '{"after": 3}',
                 "iteration,episodes,kl\n1,inf,1\n", '{"seed": NaN, "digits": 1}')):
            with self.subTest(name=name, contents=contents[:20]):
                copy = shutil.copytree(run, "copy")
                Path(copy, name).write_text(contents, encoding="latin-1")
                self.fails(analyze.main, ["compare", copy], name)
                shutil.rmtree(copy)
        mixed = text_of(run, "settings.json").replace('"alpha": 3.0', '"alpha": 0.0')
        (run / "settings.json").write_text(mixed)
        self.fails(analyze.main, ["compare", str(run)], "mixes two runs")

    def test_fuzz(self):
        """Runs with odd values that agree in all of their files: a result or one line."""
        rng, codes = np.random.default_rng(0), []
        odd = [None, True, -1, 0, 0.5, 3, 7.5, 1e300, 2**70, math.nan, "", "mask", "a\nb", [], {},
               [1], {"a": 1}]
        self.write_run("run", alpha=0.0)
        for _ in range(1200 if SLOW else 90):
            path = self.write_run("copy", rows=int(rng.integers(0, 5)))
            tables = json.loads(text_of(path, "accuracies.json"))
            tables["after"]["sampled, training mix"] = 0.1
            table = tables[str(rng.choice(["settings", "settings", "before", "after"]))]
            name = str(rng.choice([*table, "new"]))  # a value that is odd, away, or new
            table[name] = odd[rng.integers(len(odd))]
            if rng.random() < 0.3:
                del table[name]
            (path / "settings.json").write_text(json.dumps(tables["settings"]))
            (path / "accuracies.json").write_text(json.dumps(tables))
            cells = re.split("([,\n])", text_of(path, "log.csv"))  # and what separates them
            if rng.random() < 0.5:
                cells[2 * rng.integers(len(cells) // 2)] = rng.choice(["", "x", "-3", "1e9"])
            (path / "log.csv").write_text("".join(cells))
            verb = str(rng.choice(["curves", "compare", "explain"]))
            others = ["run"] * int(rng.integers(2) * (verb != "explain"))
            files = [text_of(file) for file in path.iterdir()]
            codes.append(self.ends_well(analyze.main, [verb, "copy", *others], files=files))
            shutil.rmtree(path)
        self.assertGreater(codes.count(0) / len(codes), 0.15, "so few get past the readers")

    def test_report(self):
        """The second time as the first; a section without its runs is left out and named. Two
        models of N = 3, with 3 and 6 failures of 10; RL from one, alpha 3 ends 10 points higher.
        In 20 iterations 10.5%, in the next 30.5% right: 1.96 standard errors are 3.03 points."""
        report = load_script("assets/results/report.py")
        for x in 0, 3:
            self.write_run(f"runs/degrees/n3_alpha{x}_model0", float(x), "m0", 0.5 + x / 30, 8, 3)
            for m in report.MODELS:
                self.write_run(f"runs/exponent/alpha{x}_model{m}", float(x), f"m{m}", 0.2 + x / 10)
        os.mkdir("runs/plateaus")
        os.mkdir("runs/plateaus/n7_k2_before")
        folders = [self.write_run(f"runs/pretrained/n3_seed{m}", digits=3) for m in range(2)]
        folders += [Path("runs/plateaus/n7_k2_before"), *(self.write_run(
            f"runs/plateaus/n7_k2_alpha{x}_model0", float(x), rows=41, digits=7, extra_digits=2)
            for x in (0, 3))]
        for m, folder in enumerate(folders):
            failures = {name: dict(failures=i + m) for i, name in enumerate(analyze.CLASSES)}
            minus = {t: -m / 10 for t in "124"}
            (folder / "tokens.json").write_text(json.dumps(dict(
                problems=10, first_wrong=failures, table_1=minus, table_1_reached=minus)))
        Path("runs/README.md").write_text("# Results\n")
        for out in ("one", "two"):
            quiet(report.main, ["--runs", "runs", "--out", out])
        same, *others = filecmp.cmpfiles("one", "two", os.listdir("one"), shallow=False)
        self.assertEqual((others, sorted(same)), ([[], []], [
            "README.md", "degrees.png", "exponent.png", "learning.png", "plateaus.png"]))
        text = re.sub(" +", " ", text_of("one/README.md"))
        for part in ("# Results\n\n## Does weighting", "+30.0 [+30.0, +30.0], p = 0.002",
                     "\n| m9 | 25.0 | 20.0 | 50.0 |\n",
                     "-digit numbers, %: alpha 0 20, alpha 3 50](",
                     "\n- And with half the coefficient? less/alpha0_half, less/alpha3_half\n",
                     "| 3 (2) | 100.0 (100.0, 100.0) | 50.0 (50.0, 50.0) | - | - |",
                     "| 3 (2): all others | -0.33 | -0.050 [-0.685, +0.585] |",
                     "| 3 (2) | 9 of 20: 45% | 1 of 9: 11% | 3 of 9: 33% | 5 of 9: 56% |",
                     "| 3, 1, 3 (1) | 1.0 | 5.0 | 25.0 | 60.0 | 100.0 |",
                     "| alpha 3: 21 to 40 | 30.5 | +20.0 [+17.0, +23.0] | 80.0 | 425.0 | 100.0 |",
                     "| before RL | 9 of 10: 90% | 2 of 9: 22% | 3 of 9: 33% | 4 of 9: 44% |",
                     "| 3, 1 (1) | +10.0 | - | +0.0 |", "n3_alpha0_model$m --alpha 0\n"):
            self.assertIn(part, text)

    def test_report_at_equal_kl(self):
        """KL 2 is halfway from 1 to 4: alpha 0 has 30 and 35 points there, alpha 3 2 and 4 more."""
        report = load_script("assets/results/report.py")
        report.title = lambda name, groups: name
        report.outcomes = lambda runs, name: dict(enumerate(runs[name == "kl"]))
        text = report.at_equal_kl({"no penalty": [(50, 40), (4, 4)], "alpha 0": [(10, 30), (1, 1)],
                                   "alpha 3": [(32, 39), (2, 2)]})  # 3 -+ 12.706
        self.assertIn("| alpha 3 (2)      | +3.0 [-9.7, +15.7], p = 0.500 ", text)


if __name__ == "__main__":
    main()
