"""GPT-2 as in nanoGPT, with its parameter names; how it reads, writes and solves; checkpoints.

B sequences, T tokens, V vocabulary, C embedding width, H attention heads of width D = C / H.
"""
import math
import os
import zipfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from data import VOCAB, decode, is_complete

PRESETS = {
    "narrow": dict(n_layer=4, n_head=4, n_embd=64),  # 0.23M parameters: minutes on a laptop
    "small": dict(n_layer=4, n_head=4, n_embd=128),  # twice as wide, 0.9M
    "paper": dict(n_layer=12, n_head=12, n_embd=768),  # 85M parameters: for a GPU
}


@dataclass
class GPTConfig:
    block_size: int  # the most tokens in a sequence: learned positions 0 .. block_size - 1
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = len(VOCAB)


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v: for each of T tokens a mean of the values it may look at.

    q (B, H, T, D); k and v (B, H, S, D); mask (T, S): 0 where a token may look, else -inf.
    Returns (B, H, T, D) in the dtype of q, k, v and mask. Gradients flow to q, k and v. Write out
    products and softmax; PyTorch's own attention does not count.
    """
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, H, T, S)
    scores += mask
    return F.softmax(scores, -1) @ v


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3C): queries, keys and values, each of all heads
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv
        if cache is not None:  # the new keys and values fill its last T places
            cache[..., -T:, :] = qkv[1:]
            k, v = cache
        with torch.autocast(x.device.type, enabled=False):  # so that softmax stays in q's dtype
            y = attention(q, k, v, mask.to(q.dtype))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C), c_proj=nn.Linear(4 * C, C)))

    def forward(self, x, mask, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        hidden = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")  # as in GPT-2
        return x + self.mlp.c_proj(hidden)


class GPT(nn.Module):
    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # GPT-2 ties input and output embeddings
        # GPT-2's initialization: standard deviation 0.02, scaled from its width of 768 to ours;
        # less for projections into the residual stream; biases 0.
        std = 0.02 * (768 / config.n_embd) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                less = (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=std / less, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # The learned positions start as sinusoids (Vaswani et al. 2017): near positions look alike,
        # so "the same place, one line up" is found in fewer steps.
        frequency = config.block_size ** (-torch.arange(0, config.n_embd, 2) / config.n_embd)
        angle = torch.arange(config.block_size)[:, None] * frequency
        self.transformer.wpe.weight.data = 0.1 * torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, idx, offset=0, cache=None):
        """idx (B, T) token ids -> logits (B, T, V) for the next token, hidden states (B, T, C).

        ValueError if the tokens, those in the cache included, are more than the block holds.

        offset: added to all positions, a number or (B, 1). Pre-training draws it at random.
        cache: keys and values (n_layer, 2, B, H, S, D). Its first S - T places are those of the
            tokens before idx; the last T are written here. Without a cache S = T.
        """
        T = idx.shape[1]
        S = T if cache is None else cache.shape[4]
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens do not fit into a block of {self.config.block_size}")
        pos = torch.arange(S - T, S, device=idx.device) + offset
        # Token i of the last T may look at all S - T before them, and at the first i + 1 of the T.
        causal = torch.full((T, S), float("-inf"), device=idx.device).triu(S - T + 1)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for i, block in enumerate(self.transformer.h):
            x = block(x, causal, None if cache is None else cache[i])
        hidden = self.transformer.ln_f(x)
        with torch.autocast(idx.device.type, enabled=False):  # bfloat16 rounds logits of 10 to 1/16
            return self.lm_head(hidden), hidden


# ------------------------------------------------------------------ text and tensors
def to_batch(pairs, device):
    """Worked problems -> ids (B, T), prompt_len (B,), lengths (B,); 0 after a row's end."""
    prompts = [data.prompt(a, b) for a, b in pairs]
    texts = [data.right_text(a, b) for a, b in pairs]
    ids = pad_sequence([torch.tensor(data.encode(text)) for text in texts], batch_first=True)
    prompt_len = torch.tensor([len(prompt) for prompt in prompts])
    lengths = torch.tensor([len(text) for text in texts])
    return ids.to(device), prompt_len.to(device), lengths.to(device)


def split_actions(ids, prompt_len, lengths):
    """Texts as states and actions: the action in state ids[:, :t+1] is the next token, ids[:, t+1].

    ids (B, T), prompt_len (B,), lengths (B,) -> states, actions, mask (B, T-1); mask 1.0 where the
    action is the answer's, 0.0 at prompt and padding.
    """
    t = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (t >= prompt_len[:, None]) & (t < lengths[:, None])
    return ids[:, :-1], ids[:, 1:], mask.float()


def token_logp(logits, actions):
    """Log-probability of each action: logits (B, T, V), actions (B, T) -> (B, T)."""
    return F.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]


def slices(rows, lengths):
    """Cut rows (indices) into slices of like length: yields (rows of the slice, T).

    The first T tokens hold the slice's texts; T is a multiple of 32, so that few different shapes
    occur. On a CPU 8 rows at once are no faster than 4, and take some 250 MB more in PPO's update.
    """
    size = 4 if rows.device.type == "cpu" else 64
    by_length = rows[lengths[rows].argsort(stable=True)]
    for part in by_length.split(size):
        longest = int(lengths[part].max())
        yield part, math.ceil(longest / 32) * 32


@torch.no_grad()
def read(model, ids, lengths, temperature=1.0):
    """ids (B, T), lengths (B,) -> logits / temperature (B, T, V) and hidden states (B, T, C)."""
    weight = model.lm_head.weight  # (V, C)
    logits = torch.zeros(*ids.shape, len(weight), dtype=weight.dtype, device=ids.device)
    hidden = torch.zeros(*ids.shape, model.config.n_embd, dtype=weight.dtype, device=ids.device)
    for rows, T in slices(torch.arange(len(ids), device=ids.device), lengths):
        with autocast(ids.device):
            logits[rows, :T], hidden[rows, :T] = model(ids[rows, :T])
    return logits / temperature, hidden


def sample(logits, temperature, generator=None):
    """Tokens drawn from softmax(logits / temperature): (..., V) -> (...). Temperature 0 is greedy:
    sample(torch.tensor([0.1, 0.3, 0.2]), 0) is tensor(1). Each token is a draw of its own; all
    random numbers come from `generator` if there is one, else from PyTorch's own.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = F.softmax(logits / temperature, -1).reshape(-1, logits.shape[-1])
    return torch.multinomial(probs, 1, generator=generator).view(logits.shape[:-1])


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, generator=None):
    """Continue prompts of different lengths, all in one batch.

    All rows start at position 0. A step gives each row that has not ended one token: the next of
    its prompt or, after the prompt, a sampled one. So there is never padding to mask.
    prompts: B lists of ids. A row ends where its answer is complete, after max_new_tokens, or with
    the block. Returns ids (B, T), 0 after a row's end, and lengths (B,).
    """
    config, weight = model.config, model.lm_head.weight
    device = weight.device
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    T = min(config.block_size, max(map(len, prompts)) + max_new_tokens)
    ids = torch.zeros(len(prompts), T, dtype=torch.long, device=device)
    for row, p in zip(ids, prompts):
        row[: len(p)] = torch.tensor(p)
    complete = torch.tensor([is_complete(decode(p)) for p in prompts], device=device)
    lengths = torch.where(complete, prompt_len, (prompt_len + max_new_tokens).clamp(max=T))
    rows = (~complete).nonzero()[:, 0]  # the rows that have not ended
    shape = (config.n_layer, 2, len(rows), config.n_head, T, config.n_embd // config.n_head)
    cache = torch.zeros(shape, dtype=weight.dtype, device=device)
    start, pos = 0, min(map(len, prompts))  # read so far; tokens start .. pos - 1 are read next
    while len(rows) and pos < T:
        logits, _ = model(ids[rows, start:pos], cache=cache[..., :pos, :])
        token = sample(logits[:, -1], temperature, generator)
        ids[rows, pos] = torch.where(pos < prompt_len[rows], ids[rows, pos], token)
        start, pos = pos, pos + 1
        going = pos < lengths[rows]
        for i in (ids[rows, start] == VOCAB.index("\n")).nonzero()[:, 0].tolist():
            if is_complete(decode(ids[rows[i], :pos].tolist())):
                lengths[rows[i]], going[i] = pos, False
        if not going.all():  # rows that have ended leave the batch
            rows, cache = rows[going], cache[:, :, going]
    return ids, lengths


# ------------------------------------------------------------------ a model answers problems
def read_ahead(model, pairs, temperature, generator):
    """The first part of the model's answers, in one pass instead of many -> lists of ids: prompt
    and answer up to and with the first wrong token or, without one, to the end.

    The model reads the right answers and chooses a token after each of their tokens. Up to its
    first wrong choice it has read what it would have written itself. So the right choices before
    that one, and that one, are its own (up to rounding).
    """
    ids, prompt_len, lengths = to_batch(pairs, model.lm_head.weight.device)
    _, right, mask = split_actions(ids, prompt_len, lengths)  # (B, T-1)
    logits, _ = read(model, ids, lengths)
    chosen = sample(logits, temperature, generator)[:, :-1]
    written = torch.where(mask > 0, chosen, right)  # prompt and padding are given
    n_right = (written == right).cumprod(1).sum(1)  # actions before the first wrong choice
    n_known = 1 + n_right + 1  # token 0, these, and the wrong choice
    n_known = torch.minimum(n_known, lengths)  # padding is never wrong: cut it off
    known = torch.cat([ids[:, :1], written], 1)  # action t is token t + 1
    return [row[:n] for row, n in zip(known.tolist(), n_known.tolist())]


def solve(model, pairs, temperature=0, seed=0):
    """Let the model answer all problems, 64 at a time, as the cache of keys and values takes memory
    -> (correct: bool (n,), texts: n prompts + answers).
    """
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    texts = []
    for i in range(0, len(pairs), 64):
        known = read_ahead(model, pairs[i : i + 64], temperature, generator)
        ids, lengths = generate(model, known, model.config.block_size, temperature, generator)
        texts += [decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    return np.array([data.grade(text, a, b) for text, (a, b) in zip(texts, pairs)]), texts


def cells_of(lengths):
    """Cells of accuracy_table: 5, 6 -> "identical 5", "varying 5", "identical 6", "varying 6"."""
    return [f"{mode} {length}" for length in lengths for mode in ("identical", "varying")]


def accuracy_table(model, cells, n_problems, task):
    """Greedy accuracies on held-out problems, as in the paper's Tables 4 and 5.

    cells: "identical 5", problems with two 5-digit numbers; "varying 5", with one or two.
    -> {"identical 5": share, ...}, {"identical 5": number of problems, ...}
    """
    accuracies, counts = {}, {}
    for cell in cells:
        mode, length = cell.split()
        problems = data.sample_problems(n_problems, int(length), mode, 1, task)
        correct, _ = solve(model, problems)
        accuracies[cell], counts[cell] = float(correct.mean()), len(problems)
    return accuracies, counts


# ------------------------------------------------------------------ devices, files, checkpoints
def get_device(name):
    """'auto' -> cuda, else cpu. ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):  # how PyTorch says that there is none
        raise ValueError(f"there is no device {name!r} here; try cpu") from None


def autocast(device):
    """Matrix products in bfloat16 where the hardware has it; weights and sums stay in float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # not every release of PyTorch can tell
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def read_file(path, parse, way_out):
    """parse(path). Whatever is wrong with a file ends in an OSError of one line: path, way out."""
    try:
        return parse(path)
    except Exception as error:  # a damaged byte can raise almost anything
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = (reason.splitlines() or ["?"])[0][:120]
    raise OSError(f"cannot use {path} ({reason}); {way_out}")


def write_file(path, write):
    """write(binary file) under another name first, the process's own: `path` is always whole.

    The bytes reach the disk before the name does. OSError of one line if they cannot.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise OSError(f"cannot write {path} ({reason})") from None
    finally:
        if os.path.isfile(part):  # it was not finished
            os.remove(part)


def load(path):
    """What torch.save wrote, on the CPU. Never runs code; raises on a damaged byte."""
    damaged = zipfile.ZipFile(path).testzip()  # every part of the file has its checksum
    if damaged:
        raise ValueError(f"its part {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_checkpoint(path, model, dtype, **facts):
    """Weights in the dtype, config and vocabulary, and what else explains the checkpoint."""
    weights = {name: p.to("cpu", dtype) for name, p in model.state_dict().items()}
    contents = dict(model=weights, config=asdict(model.config), vocab=VOCAB, **facts)
    write_file(path, lambda file: torch.save(contents, file))


def load_checkpoint(path, device):
    """-> (model, in float32; dict of all that was saved). OSError if it is no checkpoint of ours.

    What a file says is checked here, once: types, ranges, finite weights.
    """
    def check(condition, what):
        if not condition:
            raise ValueError(what)

    def is_whole(x, low, high):
        return type(x) is int and low <= x <= high

    def parse(path):
        facts = load(path)
        check(isinstance(facts, dict) and facts.get("vocab") == VOCAB, "no model of this project")
        config, weights = GPTConfig(**facts["config"]), facts["model"]
        check(all(is_whole(x, 1, 10**6) for x in asdict(config).values()), "its sizes")
        shape = tuple(weights["transformer.wpe.weight"].shape)
        check(shape == (config.block_size, config.n_embd), "its sizes are not its weights'")
        check(config.n_layer < len(weights), "its layers are not its weights'")
        check(config.n_embd % (2 * config.n_head) == 0, "its width")
        check(is_whole(facts["digits"], 1, 1000) and facts["task"] in data.TASKS
              and data.max_length(facts["digits"], facts["task"]) <= config.block_size, "its task")
        check(is_whole(facts["seed"], 0, 2**32 - 1) and type(facts["preset"]) is str, "its seed")
        accuracies = facts["accuracies"]
        check(type(accuracies) is dict and all(
            name.isascii() and name.isprintable() and type(x) in (int, float) and 0 <= x <= 1
            for name, x in accuracies.items()), "its accuracies")
        model = GPT(config)
        model.load_state_dict(weights)
        check(all(p.isfinite().all() for p in model.parameters()), "a weight is not finite")
        return model.to(device), facts

    return read_file(path, parse, "give another checkpoint, or make one with pretrain.py")
