"""GPT-2 as nanoGPT readers know it, with its parameter names; batch generation with a KV cache and drafts.

B sequences, T tokens, V vocabulary, C embedding width, H attention heads of width D = C / H.
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from data import VOCAB

PRESETS = {
    "small": dict(n_layer=4, n_head=4, n_embd=128),  # 0.9M parameters: learns to add in minutes on a laptop
    "narrow": dict(n_layer=4, n_head=4, n_embd=64),  # half its width
    "wide": dict(n_layer=4, n_head=4, n_embd=256),  # twice its width
    "paper": dict(n_layer=12, n_head=12, n_embd=768),  # 85M parameters: the paper's model, for a GPU
}


@dataclass
class GPTConfig:
    block_size: int  # the most tokens a sequence can have: learned positions 0 .. block_size - 1
    vocab_size: int = len(VOCAB)
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128


def attention(q, k, v):
    """Causal attention, softmax(q k^T / sqrt(D) + mask) v: three times (B, H, T, D) -> (B, H, T, D).

    The mask is 0 where a token may look, at itself and those before it, and -inf elsewhere. The softmax is over the
    tokens looked at. Without scores to tell them apart, token t has the mean of the values 0..t. All in the dtype of q.
    """
    T, D = q.shape[-2:]
    mask = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)  # 0 on and below the diagonal
    scores = q * D**-0.5 @ k.transpose(-2, -1)  # q is scaled, not the scores: it is smaller
    scores += mask  # in place: memory for one more (B, H, T, T) would take longer to get than to fill
    return F.softmax(scores, -1) @ v


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H)
        mask = None
        if isinstance(start, torch.Tensor):  # a step of fixed shape: attend to the whole cache, but not what is to come
            k, v = (old.index_copy_(2, start, new) for old, new in zip(cache, (k, v)))
            mask = (torch.arange(k.shape[2], device=x.device) <= start)[None]
        elif cache is not None:  # write the new keys and values in place, attend to all so far
            cache[0][:, :, start : start + T], cache[1][:, :, start : start + T] = k, v
            k, v = cache[0][:, :, : start + T], cache[1][:, :, : start + T]
        if x.is_cpu and q.dtype is torch.bfloat16 and cache is None:
            with torch.autocast("cpu", enabled=False):  # it would take the softmax to float32
                y = attention(q, k, v)
        else:  # The same in PyTorch's fused kernel, which in training is slower than ours on a CPU in bfloat16.
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1)  # a single token is the newest and sees all
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config, generator=None):
        """Weights are drawn with the generator."""
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
        # GPT-2's initialization, weights N(0, 0.02), biases 0, projections into the residual stream scaled down, with
        # 0.02 scaled from GPT-2's width of 768 to ours.
        std = 0.02 * (768 / config.n_embd) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=std / (2 * config.n_layer) ** 0.5, generator=generator)
            elif p.dim() == 2:
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # Except that the learned positions start as sinusoids (Vaswani et al. 2017): near positions look alike, so that
        # "the same place, one line up" is found in fewer steps.
        frequency = config.block_size ** (-torch.arange(0, config.n_embd, 2) / config.n_embd)
        angle = torch.arange(config.block_size)[:, None] * frequency
        with torch.no_grad():
            self.transformer.wpe.weight.copy_(0.1 * torch.cat([angle.sin(), angle.cos()], 1))

    def forward(self, idx, offset=None, cache=None, start=0):
        """idx (B, T) token ids -> logits (B, T, V) for the token after each, and hidden states (B, T, C).

        offset: (B,) position of each row's first token, default 0. Pre-training draws it at random.
        cache, start: keys and values of the tokens before position `start`, extended in place; see `generate`.
            start as a tensor (1,): all steps have one shape, for `record`; T is then 1, the whole cache is attended to under
            a mask, and nothing is checked.
        ValueError: the tokens do not fit the block, or come several at a time after others in the cache.
        """
        B, T = idx.shape
        if isinstance(start, int):
            if start + T > self.config.block_size:
                raise ValueError(f"{start + T} tokens do not fit the block of {self.config.block_size}")
            if start > 0 and T > 1:
                raise ValueError("with a cache that is not empty, the tokens come one at a time")
        pos = start + torch.arange(T, device=idx.device)
        pos = pos if offset is None else offset[:, None] + pos
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i], start)
        hidden = self.transformer.ln_f(x).float()
        # float32: bfloat16 would round logits of 10 to 1/16. (On MPS autocast is never on, and older PyTorch has none.)
        with contextlib.nullcontext() if idx.is_mps else torch.autocast(idx.device.type, enabled=False):
            return F.linear(hidden, self.lm_head.weight.float()), hidden


SLASH, LINE_BREAK = VOCAB.index("/"), VOCAB.index("\n")
UNKNOWN = -1  # a token that is still to be written


def sample(logits, temperature, generator=None):
    """One token for each row: logits (B, V) -> ids (B,), drawn from softmax(logits / temperature) with the generator.

    Temperature 0 is greedy: sample(torch.tensor([[0.1, 0.3, 0.2]]), 0) is tensor([1]).
    """
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]


def row_lengths(ids, most):
    """Where each row of ids (B, T) ends -> (B,): with the second line break after its first "/", or at `most` (B,).

    "</scratch>", line break, result, line break: that is how an answer ends.
    """
    breaks = ((ids == LINE_BREAK) & ((ids == SLASH).cumsum(1) > 0)).cumsum(1)
    return ((breaks < 2).sum(1) + 1).minimum(most)


def record(step, device):
    """step() as a CUDA graph: a function that launches all its kernels at once, on the same tensors; elsewhere step itself.

    One by one, the launches of a small model's step take longer than its kernels.
    """
    if device.type != "cuda":
        return step
    step()  # once before it is recorded: that chooses kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):  # waits until the GPU is done with all before
        result = step()

    def replay():
        graph.replay()
        return result
    return replay


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, generator=None, static=None):
    """Continue a batch of prompts of different lengths in one pass, with a cache of keys and values.

    prompts: list of B lists of ids. Rows are aligned at position 0. At each step a row still inside its prompt is
        fed its prompt's next token, the others their own last choice: no padding mask, no grouping by length.
    max_new_tokens: the most tokens to add to a row (fewer where the block ends).
    temperature: of the softmax that is sampled, with `generator`; 0 is greedy.
    static: take all steps but the first with one shape, as a recorded graph; by default on an NVIDIA GPU.
    A row ends where row_lengths says; a prompt that holds a whole answer ends there, too.
    Returns ids (B, T) on the model's device, T in whole 32s where block and max_new_tokens allow it, and lengths (B,): row
    b is ids[b, :lengths[b]], the rest is 0. ValueError: a prompt does not fit the block.
    """
    config, device = model.config, model.lm_head.weight.device
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(prompt_len.max())
    if longest > config.block_size:
        raise ValueError(f"a prompt of {longest} tokens does not fit the block of {config.block_size}")
    T = min(config.block_size, longest + max_new_tokens)
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True, padding_value=UNKNOWN)
    ids = F.pad(ids, (0, T - longest), value=UNKNOWN)
    ids, most = ids.to(device), (prompt_len + max_new_tokens).clamp(max=T)
    rows = (row_lengths(ids, most) > prompt_len).nonzero()[:, 0]  # those still in the batch

    shape = (config.n_layer, 2, len(rows), config.n_head, T, config.n_embd // config.n_head)
    cache = torch.zeros(shape, dtype=model.lm_head.weight.dtype, device=device)
    static = device.type == "cuda" if static is None else static
    step = None
    newest, at = ids.new_zeros(len(rows), 1), ids.new_zeros(1)  # what the recorded step reads: tokens, their position
    start, t = 0, int(prompt_len[rows].min()) if len(rows) else T  # in the cache: 0 .. start - 1; t is the next to fill
    while t < T:
        if static and start > 0:
            newest.copy_(ids[rows, start:t]), at.fill_(start)
            step = step or record(lambda: model(newest, cache=cache, start=at), device)
            logits, _ = step()
        else:
            logits, _ = model(ids[rows, start:t], cache=cache, start=start)
        choice = sample(logits[:, -1], temperature, generator)
        ids[rows, t] = torch.where(ids[rows, t] == UNKNOWN, choice, ids[rows, t])
        start, t = t, t + 1
        if t % 16 == 0:  # asking each time would leave a GPU without work meanwhile
            going = row_lengths(ids[rows], most[rows]) > t
            if not going.any():
                break
            if not static:  # the last rows take the places of those that have ended; nothing else is copied
                n = int(going.sum())
                ended, last = (~going[:n]).nonzero()[:, 0], n + going[n:].nonzero()[:, 0]
                cache[:, :, ended], rows[ended] = cache[:, :, last], rows[last]
                cache, rows = cache[:, :, :n], rows[:n]
    lengths = row_lengths(ids, most)
    T = min(T, math.ceil(int(lengths.max()) / 32) * 32)  # few widths: for each a CPU keeps kernels of its own
    return ids[:, :T].masked_fill(torch.arange(T, device=device) >= lengths[:, None], 0), lengths


def slices(rows, lengths):
    """Row numbers, shortest first, in slices that fit a CPU's cache or a GPU's memory -> [(rows, T)].

    The slice's tensors need only the first T tokens, the longest row's in whole 32s: little is padding, and there are
    few shapes, for each of which a CPU keeps kernels of its own.
    """
    parts = rows[lengths[rows].argsort(stable=True)].split(8 if rows.device.type == "cpu" else 64)
    return [(part, math.ceil(int(lengths[part].max()) / 32) * 32) for part in parts]


@torch.no_grad()
def speculate(model, prompts, drafts, temperature=1.0, generator=None):
    """What of each draft the model itself would write: speculative decoding (Leviathan et al. 2023).

    The model reads prompt and draft at once, instead of token by token, and chooses a token at each place, from what
    stands before it. Its own text is the draft up to its first other choice, and that choice: up to rounding, it is
    distributed as what `generate` writes, whatever the draft. A good one saves time.
    prompts, drafts: B lists of ids. Returns B lists: each prompt and its answer so far, for `generate` to continue.
    """
    device, block = model.lm_head.weight.device, model.config.block_size
    written = [p + draft[: block - len(p)] for p, draft in zip(prompts, drafts)]
    lengths = torch.tensor([len(row) for row in written], device=device)
    ids = pad_sequence([torch.tensor(row) for row in written], batch_first=True).to(device)
    for rows, T in slices(torch.arange(len(ids), device=device), lengths - 1):
        logits, _ = model(ids[rows, :T])
        choices = sample(logits.flatten(0, 1), temperature, generator).view(len(rows), -1).tolist()
        for i, choice in zip(rows.tolist(), choices):
            for t in range(len(prompts[i]), len(written[i])):
                if choice[t - 1] != written[i][t]:
                    written[i][t:] = [choice[t - 1]]
                    break
    return written


def split_actions(ids, prompt_len, lengths):
    """The one place where tokens are shifted: the action in state ids[:, :t+1] is the token ids[:, t+1].

    ids (B, T), prompt_len (B,), lengths (B,) -> states (B, T-1), to feed to the model; actions (B, T-1), what its
    logits are to predict; mask (B, T-1), 1.0 where the action belongs to the answer, 0.0 at prompt and padding.
    """
    t = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (t >= prompt_len[:, None]) & (t < lengths[:, None])
    return ids[:, :-1], ids[:, 1:], mask.float()
