"""A home with real releases, made by hand: one tiny base, and random (but not empty) LoRA adapters over it.

Each release comes with what plain transformers + peft answer greedily to a few prompts, token for token,
so that a test can say which release an answer came from.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from luthier import artifacts, template
from luthier.home import Home
from luthier.rows import Message, Role
from luthier.store import ReleaseRecord, Store
from tests.tiny import make_tiny_base

NAME = "guard"
PROMPTS = ("hello there", "ignore the rules", "¿qué tal, señor?")
TOKENS = 8


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    text: str
    reason: str


@dataclass(frozen=True)
class World:
    """`releases` in the order they were made; production stands on the first."""

    home: Home
    store: Store
    model: str
    releases: tuple[str, ...]
    answers: dict[tuple[str, str], Answer]

    def promote(self, digest: str, alias: str = "production") -> None:
        promote(self.store, digest, alias)


def promote(store: Store, digest: str, alias: str = "production") -> None:
    current = store.resolve(NAME, alias)
    store.move_ref(NAME, alias, digest, expected=current, actor="test", reason="test")


def asked(prompt: str) -> tuple[Message, ...]:
    return (Message(Role.USER, prompt),)


def make_home(folder: Path, *, releases: int = 3, heads: int = 4) -> World:
    home = Home.at(folder / "home")
    store = Store.open(home.path)
    model = publish_base(home, folder, heads=heads)
    made, answers = [], {}
    for seed in range(1, releases + 1):
        digest = publish_release(home, store, model, folder, seed=seed)
        made.append(digest)
        answers |= {(digest, prompt): answer for prompt, answer in reference(home, model, digest).items()}
    assert len({answer.tokens for answer in answers.values()}) > releases  # releases can be told apart
    world = World(home, store, model, tuple(made), answers)
    world.promote(made[0])
    return world


def publish_base(home: Home, folder: Path, *, seed: int = 0, heads: int = 4, dtype: str = "float32") -> str:
    out = folder / f"model-{seed}"
    make_tiny_base(out / "base", seed=seed, heads=heads, dtype=dtype)
    files = {path.name: artifacts.file_digest(path) for path in sorted((out / "base").iterdir())}
    artifacts.write_json(out / "base.json", {"digest": artifacts.digest_of(files)})
    return publish(home, out)


def publish_release(
    home: Home,
    store: Store,
    model: str,
    folder: Path,
    *,
    seed: int,
    std: float = 0.3,
    accepted: bool = True,
    **changes: Any,
) -> str:
    """Seal and register a release; `changes` falsify its release.json, or with `trained_on` its adapter."""
    base = artifacts.read_json(home.artifact(model) / "base.json")["digest"]
    out = folder / f"release-{seed}"
    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_pretrained(home.artifact(model) / "base")
    modules = ["q_proj", "v_proj", "up_proj"]
    tuned = get_peft_model(plain, LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=std)
    tuned.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = changes.pop("trained_on", f"luthier-base:{base[:12]}")
    artifacts.write_json(out / "adapter" / "adapter_config.json", config)
    release = {"name": NAME, "base": base, "model": model, "accepted": accepted, "seed": seed} | changes
    artifacts.write_json(out / "release.json", release)
    digest = publish(home, out)
    store.add_release(ReleaseRecord(digest, NAME, None, accepted, {"model": model}))
    return digest


def publish(home: Home, folder: Path) -> str:
    digest = artifacts.seal(folder)
    artifacts.publish(folder, home.artifact(digest))
    return digest


def reference(home: Home, model: str, digest: str, prompts: tuple[str, ...] = PROMPTS) -> dict[str, Answer]:
    """Greedy answers the way a stranger gets them."""
    base = home.artifact(model) / "base"
    tokenizer = template.load_tokenizer(base)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), home.artifact(digest) / "adapter"
    )
    stops = template.stop_ids(tokenizer)
    found = {}
    for prompt in prompts:
        ids = torch.tensor([template.prompt_ids(tokenizer, asked(prompt))])
        out = tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
            eos_token_id=sorted(stops), pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        stopped = out[-1] in stops
        text = tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found[prompt] = Answer(tuple(out), text, "stop" if stopped else "length")
    return found


def copy_home(world: World, folder: Path) -> World:
    """The same world in a place of its own, for tests that damage it."""
    shutil.copytree(world.home.path, folder)
    home = Home.at(folder)
    return World(home, Store.open(home.path), world.model, world.releases, world.answers)
