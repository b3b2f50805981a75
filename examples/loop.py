"""Supervised fine-tuning with LoRA in one flat file: no luthier, no packing, no tricks, one row at a time.

    python examples/loop.py BASE_FOLDER ROWS.jsonl [STEPS]

It reads a model folder and chat rows ({"id", "messages"}), and prints the loss of each step. luthier's
engine packs rows, tiles the loss and survives crashes, and must give this very curve (a test compares them).
"""

import hashlib
import json
import math
import sys

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, ROWS_PER_STEP, LR, WARMUP, CLIP, SEED = 20, 8, 5e-3, 0.1, 1.0, 17
RANK, ALPHA = 4, 8


class LoRA(nn.Module):
    """y = W x + (alpha / r) B A x, with W frozen."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.zeros(RANK, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.a.T @ self.b.T) * (ALPHA / RANK)


def tokens(tokenizer, messages):
    """The row's tokens, and which of them are learnt: the last answer up to its stop token."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    stop = ids.index(tokenizer.eos_token_id, start)
    return ids, [start <= n <= stop for n in range(len(ids))]


def place(row_id, epoch):
    """Rows are shuffled by sorting them by a hash of seed, epoch and id."""
    return hashlib.sha256(f"{SEED}:{epoch}:{row_id}:0".encode()).digest()


def train(base, rows, steps=STEPS):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    adapters = {}
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        adapters[name] = LoRA(linear)
        setattr(model.get_submodule(parent), leaf, adapters[name])
    noise = torch.Generator().manual_seed(SEED)
    for name in sorted(adapters):  # A starts uniform within 1 / sqrt(d_in); B stays zero
        bound = adapters[name].base.in_features ** -0.5
        adapters[name].a.data.uniform_(-bound, bound, generator=noise)
    weights = [weight for name in sorted(adapters) for weight in (adapters[name].a, adapters[name].b)]
    adam = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)

    encoded = [tokens(tokenizer, row["messages"]) for row in rows]
    warm = round(WARMUP * steps)
    curve = []
    for step in range(1, steps + 1):
        total, count = 0.0, 0
        adam.zero_grad()
        for n in range((step - 1) * ROWS_PER_STEP, step * ROWS_PER_STEP):
            epoch, at = divmod(n, len(rows))
            order = sorted(range(len(rows)), key=lambda row, epoch=epoch: place(rows[row]["id"], epoch))
            ids, learnt = encoded[order[at]]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            targets = torch.where(torch.tensor(learnt), torch.tensor(ids), -100)[1:]
            loss = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            loss.backward()
            total, count = total + loss.item(), count + int((targets != -100).sum())
        for weight in weights:  # the mean over all learnt tokens of the step
            weight.grad /= count
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        rate = LR * (
            step / warm
            if step <= warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))
        )
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        curve.append(total / count)
    return curve


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for n, loss in enumerate(train(sys.argv[1], rows, int(sys.argv[3]) if sys.argv[3:] else STEPS), 1):
        print(f"step {n:4d}  loss {loss:.6f}")
