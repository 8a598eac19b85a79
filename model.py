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

    def forward(self, x, cache=None, pos=None, seen=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:  # write the new keys and values at their positions, in place; attend to what is there
            rows = torch.arange(B, device=x.device)[:, None]
            for kept, new in zip(cache, (k, v)):
                kept.transpose(1, 2)[rows, pos] = new.transpose(1, 2)
            k, v = cache
        if x.is_cpu and q.dtype is torch.bfloat16 and cache is None:
            with torch.autocast("cpu", enabled=False):  # it would take the softmax to float32
                y = attention(q, k, v)
        elif x.is_mps and cache is not None:  # some releases' fused kernel misreads such a mask (PyTorch pull request 184180)
            y = F.softmax((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).masked_fill(~seen, float("-inf")), -1) @ v
        else:  # The same in PyTorch's fused kernel, which in training is slower than ours on a CPU in bfloat16.
            y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)
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

    def forward(self, x, cache=None, pos=None, seen=None):
        x = x + self.attn(self.ln_1(x), cache, pos, seen)
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

    def forward(self, idx, offset=None, cache=None):
        """idx (B, T) token ids -> logits (B, T, V) for the token after each, and hidden states (B, T, C).

        offset: (B,) position of each row's first token, default 0. Pre-training draws it at random.
        cache: keys and values (n_layer, 2, B, H, S, D) of the tokens before these, for positions 0 .. S - 1; those of idx are
            written into it, in place, and each token attends to the positions up to its own. See `generate`.
        ValueError: more tokens than the block holds.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the block of {self.config.block_size}")
        pos = torch.arange(T, device=idx.device)
        pos, seen = pos if offset is None else offset[:, None] + pos, None
        if cache is not None:  # Tokens beyond it are written to its last place: that spoils only what follows there, the end.
            pos = pos.expand(B, T).clamp(max=cache.shape[4] - 1)
            seen = (torch.arange(cache.shape[4], device=idx.device) <= pos[..., None])[:, None]  # (B, 1, T, S)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache[i], pos, seen)
        hidden = self.transformer.ln_f(x).float()
        # float32: bfloat16 would round logits of 10 to 1/16. (On MPS autocast is never on, and older PyTorch has none.)
        with contextlib.nullcontext() if idx.is_mps else torch.autocast(idx.device.type, enabled=False):
            return F.linear(hidden, self.lm_head.weight.float()), hidden


SLASH, LINE_BREAK = VOCAB.index("/"), VOCAB.index("\n")
UNKNOWN = -1  # a token that is still to be written
DRAFTED, MATCH = 8, 3  # with drafts a step reads so many tokens of a row; so many alike tell where the draft goes on


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


def go_on(draft, written, near):
    """Where each row's draft goes on: draft (B, S), the row's last tokens (B, MATCH), indices (B,) -> indices (B,).

    After the tokens that were written, if they are in the draft, at the place nearest to `near`; else at `near`. So a row
    that leaves something out, or writes it twice, usually finds its way back in a few steps.
    """
    after = torch.arange(MATCH, draft.shape[1] + 1, device=draft.device)  # the index behind each window of MATCH tokens
    other = (draft.unfold(1, MATCH, 1) != written[:, None]).any(-1)  # (B, windows)
    distance, best = (after - near[:, None]).abs().masked_fill(other, draft.shape[1]).min(1)
    return torch.where(distance < draft.shape[1], after[best], near)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, generator=None, drafts=None, static=None):
    """Continue a batch of prompts of different lengths in one pass, with a cache of keys and values.

    prompts: list of B lists of ids, one at least. All rows begin at position 0 and go on at their own pace: a row still
        inside its prompt reads its prompt's next token, the others their own last choice. No padding mask, no grouping by
        length.
    max_new_tokens: the most tokens to add to a row (fewer where the block ends).
    temperature: of the softmax that is sampled, with `generator`; 0 is greedy.
    drafts: B lists of ids, guesses at what will be written: speculative decoding (Leviathan et al. 2023). A step then reads
        several tokens of a row, its last choice and the draft's next ones, and chooses a token after each. A choice counts
        as long as the tokens read before it are the row's own: up to and with the first that is not the draft's. So the
        rows are distributed as without drafts, up to rounding; good ones save steps.
    static: all steps but the first have one shape and are recorded as a graph; by default on an NVIDIA GPU.
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

    def table(rows):  # (B, T + 1): ids, then UNKNOWN; what does not count is written to the last column
        ids = pad_sequence([torch.tensor(row[:T]) for row in rows], batch_first=True, padding_value=UNKNOWN)
        return F.pad(ids, (0, T + 1 - ids.shape[1]), value=UNKNOWN).to(device)

    ids, draft = table(prompts), table([p + d for p, d in zip(prompts, drafts or [[]] * len(prompts))])
    most = (prompt_len + max_new_tokens).clamp(max=T)
    rows = (row_lengths(ids, most) > prompt_len).nonzero()[:, 0]  # those still in the batch, n of them
    shape = (config.n_layer, 2, len(rows), config.n_head, T, config.n_embd // config.n_head)
    cache = torch.zeros(shape, dtype=model.lm_head.weight.dtype, device=device)
    static = device.type == "cuda" if static is None else static
    start = torch.zeros_like(rows)  # (n,) how many tokens of each row are in the cache; the next one is known
    shift = torch.zeros_like(rows)  # (n,) token t of a row is expected at t + shift in its draft
    width = int(prompt_len[rows].min()) if len(rows) else 0  # tokens to read in a step: at first what all prompts have
    step, run = 0, None
    while len(rows):
        # 1. Read the tokens that are known, then those of the draft.
        i, places = rows[:, None], torch.arange(width, device=device)  # (n, 1), (width,)
        pos = start[:, None] + places
        pos, guess = pos.clamp(max=T), (pos + shift[:, None]).clamp(0, T)
        read = torch.where(ids[i, pos] == UNKNOWN, draft[i, guess], ids[i, pos])  # (n, width)
        if static and step > 0:
            if run is None:
                inputs = read.clone(), start.clone()
                run = record(lambda: model(inputs[0].clamp(min=0), inputs[1], cache), device)
            inputs[0].copy_(read), inputs[1].copy_(start)
            logits, _ = run()
        else:  # as much of the cache as there are tokens
            logits, _ = model(read.clamp(min=0), start, cache[..., : int(start.max()) + width, :])
        # 2. Choose a token after each; the prompt's own are given.
        chosen = sample(logits.flatten(0, 1), temperature, generator).view_as(read)
        after = (pos + 1).clamp(max=T)
        chosen = torch.where(ids[i, after] == UNKNOWN, chosen, ids[i, after])
        # 3. Keep the choices after tokens that are the row's own. The first one read is, and so is each other if it and all
        # before it were chosen: of 5 7 9 2 read and 7 9 4 1 chosen, 5 7 9 are its own, and 7 9 4 are kept.
        own = F.pad(read[:, 1:] != chosen[:, :-1], (1, 0)).cumsum(1) == 0
        ids[i, torch.where(own, after, T)] = chosen
        start, step = start + own.sum(1), step + 1
        width = 1
        if drafts:
            width = min(DRAFTED, T)
            written = ids[i, (start[:, None] + torch.arange(1 - MATCH, 1, device=device)).clamp(0, T)]
            shift = go_on(draft[rows], written, start + 1 + shift) - (start + 1)
        # 4. The last rows take the places of those that have ended. To ask each time would leave a GPU without work. A
        # recorded step keeps its shape: there rows that have ended write on, which is blanked out in the end.
        if step % 4 == 0:
            going = row_lengths(ids[rows], most[rows]) > start + 1
            if static and going.any():
                continue
            n = int(going.sum())
            ended, last = (~going[:n]).nonzero()[:, 0], n + going[n:].nonzero()[:, 0]
            for x in (rows, start, shift):
                x[ended] = x[last]
            cache[:, :, ended] = cache[:, :, last]
            cache, rows, start, shift = cache[:, :, :n], rows[:n], start[:n], shift[:n]
    lengths = row_lengths(ids[:, :T], most)
    T = min(T, math.ceil(int(lengths.max()) / 32) * 32)  # few widths: for each a CPU keeps kernels of its own
    return ids[:, :T].masked_fill(torch.arange(T, device=device) >= lengths[:, None], 0), lengths


def slices(rows, lengths):
    """Row numbers, shortest first, in slices that fit a CPU's cache or a GPU's memory -> [(rows, T)].

    The slice's tensors need only the first T tokens, the longest row's in whole 32s: little is padding, and there are
    few shapes, for each of which a CPU keeps kernels of its own.
    """
    parts = rows[lengths[rows].argsort(stable=True)].split(8 if rows.device.type == "cpu" else 64)
    return [(part, math.ceil(int(lengths[part].max()) / 32) * 32) for part in parts]


def split_actions(ids, prompt_len, lengths):
    """The one place where tokens are shifted: the action in state ids[:, :t+1] is the token ids[:, t+1].

    ids (B, T), prompt_len (B,), lengths (B,) -> states (B, T-1), to feed to the model; actions (B, T-1), what its
    logits are to predict; mask (B, T-1), 1.0 where the action belongs to the answer, 0.0 at prompt and padding.
    """
    t = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (t >= prompt_len[:, None]) & (t < lengths[:, None])
    return ids[:, :-1], ids[:, 1:], mask.float()
