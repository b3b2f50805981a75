"""The flat example is the oracle: the packed, tiled, micro-batched engine must give its very curve."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from luthier import template
from luthier.engine import base, batch, loop
from luthier.methods import lora
from luthier.objectives import sft
from luthier.rows import chat
from tests.stages.training import records

EXAMPLE = Path(__file__).parents[2] / "examples" / "loop.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_does_not_import_luthier() -> None:
    assert "import luthier" not in EXAMPLE.read_text() and "from luthier" not in EXAMPLE.read_text()


@pytest.mark.parametrize("micro_tokens", [4096, 120])
def test_the_engine_gives_the_curve_of_the_flat_example(tiny_base: Path, micro_tokens: int) -> None:
    flat = example()
    found = records(20)
    expected = flat.train(str(tiny_base), found, steps=12)
    tokenizer = template.load_tokenizer(tiny_base)
    rows = template.encode_all(tokenizer, [chat(row["messages"], row["where"]) for row in found])
    settings = loop.Settings(steps=12, lr=flat.LR, seed=flat.SEED, warmup=flat.WARMUP, clip=flat.CLIP)
    model = lora.attach(
        base.load(tiny_base, "float32"), lora.Params(r=flat.RANK, alpha=flat.ALPHA), flat.SEED
    )
    loader = batch.Loader(
        tuple(row.id for row in rows),
        {n: (row,) for n, row in enumerate(rows)},
        flat.ROWS_PER_STEP,
        micro_tokens,
        flat.SEED,
    )
    objective: Any = partial(sft.loss, params=sft.Params())
    steps = loop.train(model, loader, objective, loop.optimiser(model, settings), settings)
    assert [step.loss for step in steps] == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < 0.95 * expected[0]
