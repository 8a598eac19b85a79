"""GPT-2 as in nanoGPT, with its parameter names; generation with a cache; checkpoints.

B sequences, T tokens, V vocabulary, C embedding width, H attention heads of width D = C / H.
"""
import math
import os
import sys
import zipfile
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

from data import VOCAB, decode, is_complete

PRESETS = {
    "small": dict(n_layer=4, n_head=4, n_embd=128),  # 0.9M parameters: minutes on a laptop
    "narrow": dict(n_layer=4, n_head=4, n_embd=64),
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
    Returns (B, H, T, D) in the dtype of q, k, v and mask. Gradients flow to q, k and v.
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
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, H, T, D) each
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

        offset: added to all positions, a number or (B, 1). Pre-training draws it at random.
        cache: keys and values (n_layer, 2, B, H, S, D). Its first S - T places are those of the
            tokens before idx; the last T are written here. Without a cache S = T.
        """
        T = idx.shape[1]
        S = T if cache is None else cache.shape[4]
        assert S <= self.config.block_size, f"{S} tokens, a block of {self.config.block_size}"
        pos = torch.arange(S - T, S, device=idx.device) + offset
        mask = torch.full((T, S), float("-inf"), device=idx.device).triu(S - T + 1)  # causal
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else cache[i])
        hidden = self.transformer.ln_f(x).float()
        with torch.autocast(idx.device.type, enabled=False):  # bfloat16 rounds logits of 10 to 1/16
            return self.lm_head(hidden), hidden


# ------------------------------------------------------------------ reading and writing text
def split_actions(ids, prompt_len, lengths):
    """Texts as states and actions: the action in state ids[:, :t+1] is the next token, ids[:, t+1].

    ids (B, T), prompt_len (B,), lengths (B,) -> states, actions, mask (B, T-1); mask 1.0 where the
    action is the answer's, 0.0 at prompt and padding.
    """
    t = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (t >= prompt_len[:, None]) & (t < lengths[:, None])
    return ids[:, :-1], ids[:, 1:], mask.float()


def slices(rows, lengths):
    """-> [(indices of rows of like length, T)]: the first T tokens hold these rows' texts.

    As many rows as fit a CPU's cache or a GPU's memory. T is a multiple of 32: few shapes.
    """
    parts = rows[lengths[rows].argsort(stable=True)].split(8 if rows.device.type == "cpu" else 64)
    return [(part, math.ceil(int(lengths[part].max()) / 32) * 32) for part in parts]


@torch.no_grad()
def read(model, ids, lengths, temperature=1.0):
    """ids (B, T), lengths (B,) -> logits / temperature (B, T, V) and hidden states (B, T, C)."""
    logits = torch.zeros(*ids.shape, model.config.vocab_size, device=ids.device)
    hidden = torch.zeros(*ids.shape, model.config.n_embd, device=ids.device)
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
    config, device = model.config, model.lm_head.weight.device
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    T = min(config.block_size, max(map(len, prompts)) + max_new_tokens)
    ids = torch.zeros(len(prompts), T, dtype=torch.long, device=device)
    for row, p in zip(ids, prompts):
        row[: len(p)] = torch.tensor(p)
    complete = torch.tensor([is_complete(decode(p)) for p in prompts], device=device)
    lengths = torch.where(complete, prompt_len, (prompt_len + max_new_tokens).clamp(max=T))
    rows = (~complete).nonzero()[:, 0]  # the rows that have not ended
    shape = (config.n_layer, 2, len(rows), config.n_head, T, config.n_embd // config.n_head)
    cache = torch.zeros(shape, device=device)
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


# ------------------------------------------------------------------ devices and checkpoints
def stop(message):
    """End the script with one line on stderr and exit code 2, as argparse does."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # above a progress bar, if there is one
    raise SystemExit(2)


def get_device(name):
    """'auto' -> cuda, else mps, else cpu. A device that is not there ends the script."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there.get(name.partition(":")[0]):
        stop(f"there is no device {name!r} here; try --device cpu")
    return torch.device(name)


def autocast(device):
    """Matrix products in bfloat16 where the hardware has it; weights and sums stay in float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # not every release of PyTorch can tell
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def save(path, contents):
    """torch.save, with another name first: what is called `path` is always whole."""
    torch.save(contents, f"{path}.part")
    os.replace(f"{path}.part", path)


def load(path):
    """What `save` wrote, on the CPU. A file that is missing, damaged or foreign ends the script."""
    try:
        if zipfile.ZipFile(path).testzip() is None:  # every part has its checksum
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = "its checksum is wrong"
    except Exception as error:  # a damaged byte can raise almost anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    stop(f"cannot load {path} ({reason}); make it again with pretrain.py or ppo.py")


def save_checkpoint(path, model, dtype, **facts):
    """Weights in the dtype, config and vocabulary, and what else explains the checkpoint."""
    weights = {name: p.to("cpu", dtype) for name, p in model.state_dict().items()}
    save(path, dict(model=weights, config=asdict(model.config), vocab=VOCAB, **facts))


def load_checkpoint(path, device):
    """-> (model, in float32; dict of all that was saved)."""
    facts = load(path)
    if not isinstance(facts, dict) or facts.get("vocab") != VOCAB:
        stop(f"{path} is not a model.pt of pretrain.py or ppo.py with the vocabulary of data.py")
    try:
        model = GPT(GPTConfig(**facts["config"]))
        model.load_state_dict(facts["model"])
    except (KeyError, TypeError, RuntimeError) as error:  # model.py has changed since
        stop(f"{path} does not fit this code ({type(error).__name__}); pre-train the model again")
    return model.to(device), facts
