"""Addition with a scratchpad, as text: vocabulary, worked answers, critical tokens, problems.

A problem is a prompt and an answer, one token a character (format after Lee et al. 2024, "Teaching
arithmetic to small transformers"):

    Input:
    367+28
    Target:
    <scratch>
    [3,6,7] + [2,8] , A=[] , C=0 , 7+8+0=15 , A->5 , C->1
    [3,6] + [2] , A=[5] , C=1 , 6+2+1=9 , A->9 , C->0
    [3] + [] , A=[9,5] , C=0 , 3+0+0=3 , A->3 , C->0
    [] + [] , A=[3,9,5] C=0 , END
    </scratch>
    3 9 5

The answer is what follows "Target:". A second task, "subtract", shows how to add one: its b is
negative, and the problem is a - |b|.
"""
import zlib

import numpy as np

TASKS = ("add", "subtract")
VOCAB = "\n +,-/:<=>[]0123456789ACDEINTaceghnprstu"  # every character of the format; V = 40


def encode(text):
    """'1+2' -> [13, 2, 14]. ValueError for a character outside the vocabulary."""
    return [VOCAB.index(char) for char in text]


def decode(ids):
    """[13, 2, 14] -> '1+2'. IndexError for an id of V or more."""
    return "".join(VOCAB[i] for i in ids)


# ------------------------------------------------------------------ one problem
def prompt(a, b):
    """prompt(367, 28) == 'Input:\\n367+28\\nTarget:'"""
    return f"Input:\n{a}{b:+}\nTarget:"


def answer(a, b):
    """The scratchpad and the result, as in the header above: one line a digit, last digit first.

    A line shows what is left of both numbers, the result's digits so far (A) and the carry (C);
    then the sum of the last digits (0 where none is left) and the carry; the digit that goes in
    front of A; the new carry. 99+1 ends in "A=[0,0] C=1 , END". A carry of a subtraction is
    borrowed: 12-5 begins with "[1,2] - [5] , A=[] , C=0 , 2-5-0=-3 , A->7 , C->1", and 0-9-1=-10
    gives the digit 0. A keeps all its digits: 105-99 ends in "A=[0,0,6] C=0 , END", but the result
    is 6. The text begins with the line break after "Target:" and ends with one.
    """
    sign = "-" if b < 0 else "+"
    x, y = list(str(a)), list(str(abs(b)))  # digits that are left, most significant first
    result, carry, lines = [], 0, []
    while x or y:
        left = f"[{','.join(x)}] {sign} [{','.join(y)}] , A=[{','.join(result)}] , C={carry}"
        p, q = x.pop() if x else "0", y.pop() if y else "0"
        total = int(p) + int(sign + q) + int(f"{sign}{carry}")
        digit, new_carry = total % 10, abs(total // 10)
        lines.append(f"{left} , {p}{sign}{q}{sign}{carry}={total} , A->{digit} , C->{new_carry}")
        result.insert(0, str(digit))
        carry = new_carry
    lines.append(f"[] {sign} [] , A=[{','.join(result)}] C={carry} , END")
    return "\n<scratch>\n" + "\n".join(lines) + "\n</scratch>\n" + " ".join(str(a + b)) + "\n"


def right_text(a, b):
    """All that a right model has read and written."""
    return prompt(a, b) + answer(a, b)


def max_length(n_digits, task="add"):
    """Characters of the longest prompt + answer for operands of up to n_digits digits: 5 -> 390."""
    a = b = 10**n_digits - 1
    if task == "subtract":  # 9000-1999 borrows in all lines but the last: 0-9-1=-10
        a, b = 9 * 10 ** (n_digits - 1), 1 - 2 * 10 ** (n_digits - 1)
    return len(right_text(a, b))


def is_complete(text):
    """True if the answer has ended: there is a line break after the line "</scratch>"."""
    tag = text.find("</scratch>\n")
    return tag >= 0 and text.count("\n", tag) > 1


def grade(text, a, b):
    """True if the line after the first line "</scratch>" is a + b, its digits separated by single
    spaces: grade("...\\n</scratch>\\n3 9 5\\n", 367, 28) is True, whatever the working says.
    False without the line break: "3 9 5" may be the beginning of "3 9 5 1".
    """
    result, line_break, _ = text.partition("</scratch>\n")[2].partition("\n")
    return line_break == "\n" and result == " ".join(str(a + b))


# ------------------------------------------------------------------ places in an answer
def first_error(text, a, b):
    """Index of the first character that is not that of the right prompt + answer, or None."""
    right = right_text(a, b)
    return next((i for i, wanted in enumerate(right) if text[i : i + 1] != wanted), None)


def place(a, b, index):
    """What stands at an index of the right answer: "line 2, operand 1", "line 2, sum", "result" or
    "tag". Before line 1 stand 4 others: "Input:", the problem, "Target:" and "<scratch>".
    """
    text = right_text(a, b)
    *above, line = text[:index].split("\n")  # `line`: its part before the index
    if len(above) < 4 or text.startswith("</scratch>", index - len(line)):
        return "tag"
    if "</scratch>" in above:
        return "result"
    lists_before = min(line.count("]"), 2)  # the third list, A, belongs to the sum
    return f"line {len(above) - 3}, {('operand 1', 'operand 2', 'sum')[lists_before]}"


def describe_error(text, a, b):
    """What is wrong with a text: "line 1, operand 2: wrote '1' for '8'"; else "no error"."""
    index = first_error(text, a, b)
    if index is None:
        return "no error"
    wanted = right_text(a, b)[index]
    return f"{place(a, b, index)}: wrote {text[index : index + 1]!r} for {wanted!r}"


def critical_positions(a, b, n_digits):
    """The paper's critical tokens for a model that was pre-trained on 1..n_digits digits, and the
    copied digits: {(line, operand, name): index into prompt + answer}.

    They stand in lines 1, 2 and 3 (as in the paper's Figure 7), in the lists of an operand with
    g > 0 digits more than n_digits: its last 2g tokens are critical, g times a comma and a digit;
    fewer in a shorter list. "comma1" and "digit1" are next to the "]", "comma2" and "digit2" before
    them. "copied" is the digit before all these: a model that never saw so long a list often writes
    the last digit there, '[3,7' for '[3,6,7'. The paper names this error, but not this token.
    n_digits = 2, 367+28: in '[3,6,7]' 6 is copied, ',7' comma1 and digit1; '[3]' has digit1 alone.
    """
    text, positions = right_text(a, b), {}
    bracket = text.index("<scratch>")
    for line in range(1, min(3, len(str(max(a, abs(b))))) + 1):
        for operand, number in (1, a), (2, abs(b)):
            bracket = text.index("]", bracket + 1)
            digits_here = len(str(number)) - line + 1
            g = min(len(str(number)) - n_digits, digits_here)
            for j in range(1, g + 1):
                positions[line, operand, f"digit{j}"] = bracket - 2 * j + 1
                if j < digits_here:  # the first digit of a list has no comma before it
                    positions[line, operand, f"comma{j}"] = bracket - 2 * j
            if 0 < g < digits_here:
                positions[line, operand, "copied"] = bracket - 2 * g - 1
        bracket = text.index("\n", bracket)
    return positions


# ------------------------------------------------------------------ many problems
def held_out(a, b):
    """True for the tenth of all problems that no training sees, a+b and b+a alike: the test set."""
    return zlib.crc32(f"{max(a, b)}{min(a, b):+}".encode()) % 10 == 0


def _number(rng, length):
    """Uniform over the numbers of exactly `length` digits; a 1-digit number may be 0."""
    digits = rng.integers(0, 10, length)  # digit by digit: no limit on the length
    if length > 1:
        digits[0] = rng.integers(1, 10)
    return int("".join(map(str, digits)))


def sample_pair(rng, n_digits, mode, extra_digits=1, test=False, task="add"):
    """One problem (a, b), drawn with `rng`, a numpy Generator.

    mode "train":     both lengths uniform in 1..n_digits
         "identical": both operands have exactly n_digits digits
         "varying":   one operand (either) has n_digits digits, the other 1..n_digits
         "rl":        one operand (either) has n_digits + extra_digits digits; the other's length is
                      uniform in 1..n_digits half of the time, else in the longer ones
    test: draw a held-out problem, else one of the others. In "subtract" the larger number is first.
    """
    while True:
        first, second = n_digits, rng.integers(1, n_digits + 1)
        if mode == "train":
            first = rng.integers(1, n_digits + 1)
        elif mode == "identical":
            second = n_digits
        elif mode == "rl":
            first = n_digits + extra_digits
            if rng.random() < 0.5:
                second = rng.integers(n_digits + 1, first + 1)
        a, b = _number(rng, first), _number(rng, second)
        if mode in ("varying", "rl") and rng.random() < 0.5:
            a, b = b, a
        if task == "subtract":
            a, b = max(a, b), -min(a, b)
        if held_out(a, b) == test and (b < 0) == (task == "subtract"):  # never a-0: it reads a+0
            return a, b


def sample_problems(n, n_digits, mode, seed, task="add", extra_digits=1):
    """n different held-out problems [(a, b)], the same for the same seed; all, if there are fewer.

    There are 6 of two 1-digit numbers. All are found when many draws bring no new one.
    """
    rng = np.random.default_rng([seed, n_digits])
    problems, repeats = {}, 0  # a dict, as its keys keep their order
    while len(problems) < n and repeats < 100 + 20 * len(problems):
        pair = sample_pair(rng, n_digits, mode, extra_digits, test=True, task=task)
        repeats = repeats + 1 if pair in problems else 0
        problems[pair] = None
    return list(problems)
