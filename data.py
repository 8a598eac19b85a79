"""Addition with a scratchpad, as text: vocabulary, problems, worked answers, critical tokens, grading.

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

The prompt ends after "Target:", the answer begins with the line break and ends with the one after the result.

A second task shows where another one goes: a problem (a, b) with b below 0 is the subtraction of -b, at most a. It
borrows where addition carries: 12-5 has the line "[1,2] - [5] , A=[] , C=0 , 2-5-0=-3 , A->7 , C->1".
"""
import zlib

TASKS = ("add", "subtract")
VOCAB = "\n +,-/:<=>[]0123456789ACDEINTaceghnprstu"  # every character of the format; V = 40
_ID = {char: i for i, char in enumerate(VOCAB)}


def encode(text):
    """'1+2' -> [13, 2, 14]. Raises ValueError naming a character outside the vocabulary."""
    try:
        return [_ID[char] for char in text]
    except KeyError as missing:
        raise ValueError(f"character {missing.args[0]!r} is not in the vocabulary {VOCAB!r}") from None


def decode(ids):
    """[13, 2, 14] -> '1+2'. Raises ValueError naming an id outside 0..V-1."""
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < len(VOCAB):
            raise ValueError(f"token id {i} is not in 0..{len(VOCAB) - 1}")
    return "".join(VOCAB[i] for i in ids)


# --------------------------------------------------------------------------- one problem
def prompt(a, b):
    """prompt(367, 28) == 'Input:\\n367+28\\nTarget:', prompt(367, -28) == 'Input:\\n367-28\\nTarget:'"""
    return f"Input:\n{a}{b:+}\nTarget:"


def answer(a, b):
    """The scratchpad and the result, as in the header above: one line a digit, least significant first.

    A line shows the digits of both numbers that are left, the result's digits so far (A) and the carry (C); then the
    last digits of both (0 where none is left) and the carry, added; the digit that goes in front of A; the new carry.
    There is a line for each digit of the longer number. The closing line has no comma between A and C. A final carry
    stays in C and is not put in front of A: 99+1 ends in "[] + [] , A=[0,0] C=1 , END". A subtraction has - for +
    everywhere, its carry, 0 or 1 as well, is what was borrowed. The result is a + b without leading zeros.
    """
    x, y, sign = list(str(a)), list(str(abs(b))), "-" if b < 0 else "+"  # digits still to add, most significant first
    result, carry, lines = [], 0, []
    while x or y:
        left = f"[{','.join(x)}] {sign} [{','.join(y)}] , A=[{','.join(result)}] , C={carry}"
        p, q = x.pop() if x else "0", y.pop() if y else "0"
        total = int(p) + int(sign + q) + int(f"{sign}{carry}")
        lines.append(f"{left} , {p}{sign}{q}{sign}{carry}={total} , A->{total % 10} , C->{abs(total // 10)}")
        result.insert(0, str(total % 10))
        carry = abs(total // 10)
    lines.append(f"[] {sign} [] , A=[{','.join(result)}] C={carry} , END")
    return "\n<scratch>\n" + "\n".join(lines) + "\n</scratch>\n" + " ".join(str(a + b)) + "\n"


def max_length(n_digits, task="add"):
    """Characters of the longest prompt + answer for operands of up to n_digits digits: 5 -> 390."""
    a = b = 10**n_digits - 1
    if task == "subtract":  # 9000-1999 borrows in all lines but the last: 0-9-1=-10
        a, b = 9 * 10 ** (n_digits - 1), 1 - 2 * 10 ** (n_digits - 1)
    return len(prompt(a, b) + answer(a, b))


def grade(text, a, b):
    """True if the result in a generated text is a + b; False for any other text, whatever it holds.

    The result is what stands between the first '</scratch>\\n' and the next line break, which ends the
    episode; it must be the digits of the sum separated by single spaces. What stands before the tag is not looked at.
    grade("...</scratch>\\n3 9 5\\n", 367, 28) is True, grade("3 9 5\\n", 367, 28) is False.
    """
    _, end_tag, rest = text.partition("</scratch>\n")
    result, line_break, _ = rest.partition("\n")
    return bool(end_tag and line_break) and result == " ".join(str(a + b))


def first_error(text, a, b):
    """Index of the first character where a text leaves the right prompt + answer (its length if cut short), or None."""
    right = prompt(a, b) + answer(a, b)
    same = next((i for i, (got, wanted) in enumerate(zip(text, right)) if got != wanted), min(len(text), len(right)))
    return same if same < len(right) else None


def place(a, b, index):
    """What stands at an index of the right prompt + answer: "line 2, operand 1", "line 3, sum", "result", ..."""
    text = prompt(a, b) + answer(a, b)
    first, end = text.index("<scratch>\n") + len("<scratch>\n"), text.index("</scratch>\n")
    if not first <= index < end:
        return "result" if index >= end + len("</scratch>\n") else "tag" if index >= len(prompt(a, b)) else "prompt"
    *above, line = text[first:index].split("\n")
    part = ("operand 1", "operand 2", "sum")[min(line.count("]"), 2)]
    return f"line {len(above) + 1}, {part}"


def describe_error(text, a, b):
    """What is wrong with a text: "line 1, operand 2: wrote '1' for '8'"; with a right one: "no error"."""
    index, right = first_error(text, a, b), prompt(a, b) + answer(a, b)
    if index is None:
        return "no error"
    return f"{place(a, b, index)}: wrote {text[index : index + 1]!r} for {right[index]!r}"


def critical_positions(a, b, n_digits):
    """Where a model that was pre-trained on 1..n_digits digits meets its critical tokens.

    An operand g digits longer than n_digits has them in lines 1, 2 and 3 of the scratchpad: the last 2g
    tokens before its list's closing bracket (a comma and a digit, g times), fewer where the list is shorter.
    Returns {(line, operand, name): index into prompt + answer}, with line in 1..3, operand in 1..2 and name
    "comma1" and "digit1" for the pair next to the bracket, "comma2" and "digit2" for the one before, ...
    An example, n_digits = 2, 367+28, line 1: '[3,6,7]' holds (1, 1, "comma1") and (1, 1, "digit1"), the ',7'.
    """
    text = prompt(a, b) + answer(a, b)
    positions, line_start = {}, text.index("<scratch>\n") + len("<scratch>\n")
    for line in range(1, min(3, len(str(max(a, abs(b))))) + 1):
        bracket = line_start
        for operand, number in ((1, a), (2, abs(b))):
            bracket = text.index("]", bracket + 1)
            list_start = text.rindex("[", 0, bracket)
            for j in range(1, len(str(number)) - n_digits + 1):
                comma, digit = bracket - 2 * j, bracket - 2 * j + 1
                if digit > list_start:
                    positions[line, operand, f"digit{j}"] = digit
                if comma > list_start:
                    positions[line, operand, f"comma{j}"] = comma
        line_start = text.index("\n", line_start) + 1
    return positions


# --------------------------------------------------------------------------- many problems
def held_out(a, b):
    """True for the tenth of all problems that no training ever sees: every accuracy is measured on these."""
    return zlib.crc32(f"{a}{b:+}".encode()) % 10 == 0


def _number(rng, length):
    """Uniform over the numbers of exactly `length` digits; a 1-digit number may be 0. Any length will do."""
    digits = rng.integers(0, 10, length)
    if length > 1:
        digits[0] = rng.integers(1, 10)
    return int("".join(map(str, digits)))


def sample_pair(rng, n_digits, mode, extra_digits=1, test=False, task="add"):
    """One problem (a, b), drawn with `rng`, a numpy Generator. In task "subtract" the larger number comes first.

    mode "train":     both lengths uniform in 1..n_digits
         "identical": both operands have exactly n_digits digits
         "varying":   one operand (either, at random) has n_digits digits, the other 1..n_digits
         "rl":        one operand (either) has n_digits + extra_digits; the other's length is, half of the time,
                      uniform in 1..n_digits and, half of the time, in n_digits+1..n_digits+extra_digits
    test: draw from the held-out problems; else from all the others.
    """
    while True:
        long = n_digits
        if mode == "train":
            long, short = rng.integers(1, n_digits + 1), rng.integers(1, n_digits + 1)
        elif mode == "identical":
            short = n_digits
        elif mode == "varying":
            short = rng.integers(1, n_digits + 1)
        elif mode == "rl":
            long = n_digits + extra_digits
            short = rng.integers(1, n_digits + 1) if rng.random() < 0.5 else rng.integers(n_digits + 1, long + 1)
        else:
            raise ValueError(f"mode {mode!r} is not one of train, identical, varying, rl")
        a, b = _number(rng, int(long)), _number(rng, int(short))
        if mode in ("varying", "rl") and rng.random() < 0.5:
            a, b = b, a
        if task == "subtract":
            a, b = max(a, b), -min(a, b)
        if held_out(a, b) == test and (b < 0) == (task == "subtract"):  # a-0 is not drawn: it would read a+0
            return a, b
