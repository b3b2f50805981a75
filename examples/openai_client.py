"""The official OpenAI client, unmodified, fine-tunes and chats against luthier: only `base_url` differs.

    luthier serve --demo                                   in one terminal; it prints the url and the key
    python examples/openai_client.py --base-url http://127.0.0.1:8321/v1 --api-key lt-…

It uploads rows, trains a supervised job and a preference (dpo) job, follows their events, lists checkpoints,
talks with the result in a stream, cancels a third job, and deletes what it made. It needs `pip install
openai` and nothing of luthier; against OpenAI itself it was the same script. `make demo-openai` runs it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from openai import BadRequestError, NotFoundError, OpenAI

COLOURS = ("red", "green", "blue", "amber", "violet", "white", "black", "silver")
THINGS = ("door", "lamp", "chair", "boat")
ENDED = ("succeeded", "failed", "cancelled")


def question(colour: str, thing: str) -> dict[str, str]:
    return {"role": "user", "content": f"What colour is the {colour} {thing}?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chats() -> list[dict[str, Any]]:
    """Rows to learn from: the answer is one word."""
    return [{"messages": [question(colour, thing), answer(colour)]} for colour in COLOURS for thing in THINGS]


def pairs() -> list[dict[str, Any]]:
    """Preferences: the short answer before the long one."""
    return [
        {
            "input": {"messages": [question(colour, thing)]},
            "preferred_output": [answer(colour)],
            "non_preferred_output": [answer(f"The {thing} is {colour}, I think.")],
        }
        for colour in COLOURS
        for thing in THINGS[:2]
    ]


def upload(client: OpenAI, name: str, rows: list[dict[str, Any]]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    made = client.files.create(file=(name, data), purpose="fine-tune")
    print(f"uploaded {made.filename}: {made.id}, {made.bytes} bytes", flush=True)
    return made.id


def follow(client: OpenAI, job_id: str, minutes: float) -> Any:
    """Print every event once, in order, until the job has ended."""
    seen: set[str] = set()
    deadline = time.monotonic() + 60 * minutes
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        events = list(client.fine_tuning.jobs.list_events(job_id, limit=100))  # newest first
        for event in reversed(events):
            if event.id not in seen:
                seen.add(event.id)
                print(f"  {job_id[:14]}  {event.message}", flush=True)
        if job.status in ENDED:
            return job
        if time.monotonic() > deadline:
            raise SystemExit(f"{job_id} is still {job.status} after {minutes:g} minutes")
        time.sleep(1)


def tuned(client: OpenAI, minutes: float, **asked: Any) -> Any:
    """A job of ours, followed to its success."""
    job = client.fine_tuning.jobs.create(**asked)
    print(f"job {job.id}: {job.status}", flush=True)
    job = follow(client, job.id, minutes)
    if job.status != "succeeded":
        raise SystemExit(f"{job.id} {job.status}: {job.error}")
    return job


def said(client: OpenAI, model: str) -> str:
    """One answer, as it comes."""
    text = ""
    stream = client.chat.completions.create(
        model=model, messages=[question("green", "boat")], max_tokens=12, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
    return text


def method(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """The hyperparameters that this script sets; all others are the server's. A dpo job's learning rate
    begins at a tenth of a supervised one's: five times the multiplier, and a few rows change the answers."""
    rate = given.rate if kind == "supervised" else 5 * given.rate
    chosen: dict[str, Any] = {"n_epochs": given.epochs, "batch_size": 8, "learning_rate_multiplier": rate}
    return {"type": kind, kind: {"hyperparameters": chosen}}


def play(client: OpenAI, given: argparse.Namespace) -> dict[str, Any]:
    """The whole story; what it returns is what happened."""
    names = [model.id for model in client.models.list()]
    base = given.model or names[0]
    print(f"base {base}; before: {said(client, base)!r}", flush=True)
    refused = ""
    try:
        client.files.create(file=("bad.jsonl", b'{"messages": []}\n{oops}\n'), purpose="fine-tune")
    except BadRequestError as error:
        refused = str(error.body["message"]) if isinstance(error.body, dict) else str(error)
        print(f"a bad file is refused: {refused.splitlines()[0]}", flush=True)

    files = {
        "supervised": upload(client, "chats.jsonl", chats()),
        "dpo": upload(client, "pairs.jsonl", pairs()),
    }
    common = {"model": base, "seed": 7, "metadata": {"made_by": "examples/openai_client.py"}}
    told: dict[str, Any] = {"base": base, "refused": refused, "models": {}, "unavailable": []}
    for kind in given.methods.split(","):
        asked = {**common, "training_file": files[kind], "suffix": kind, "method": method(kind, given)}
        try:
            told["models"][kind] = looked_at(client, tuned(client, given.minutes, **asked))
        except BadRequestError as error:
            if error.code != "unsupported_method":
                raise
            told["unavailable"].append(kind)
            print(f"this server has no {kind} jobs", flush=True)

    other = client.fine_tuning.jobs.create(training_file=files["supervised"], **{**common, "seed": 8})
    told["cancelled"] = client.fine_tuning.jobs.cancel(other.id).status
    print(f"job {other.id}: {told['cancelled']}", flush=True)
    made = [model["name"] for model in told["models"].values()]
    for name in made:
        client.models.delete(name)
    for file in files.values():
        client.files.delete(file)
    print("models and files are deleted", flush=True)
    return told | {"gone": all(gone(client, name) for name in made)}


def looked_at(client: OpenAI, job: Any) -> dict[str, Any]:
    """What a job left: its model, which answers; its checkpoints, which answer too; its curve."""
    checkpoints = [
        one.fine_tuned_model_checkpoint for one in client.fine_tuning.jobs.checkpoints.list(job.id)
    ]
    answers = {name: said(client, name) for name in (job.fine_tuned_model, *checkpoints)}
    for name, text in answers.items():
        print(f"{name} says {text!r}", flush=True)
    curve = client.files.content(job.result_files[0]).text
    return {
        "name": job.fine_tuned_model,
        "answer": answers[job.fine_tuned_model],
        "checkpoints": checkpoints,
        "trained_tokens": job.trained_tokens,
        "curve_lines": len(curve.splitlines()),
    }


def gone(client: OpenAI, name: str) -> bool:
    try:
        said(client, name)
    except NotFoundError:
        return True
    return False


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--base-url", help="default: $OPENAI_BASE_URL")
    ask.add_argument("--api-key", help="default: $OPENAI_API_KEY")
    ask.add_argument("--model", help="the base to tune; default: the first that the server lists")
    ask.add_argument("--epochs", type=int, default=3)
    ask.add_argument("--rate", type=float, default=5.0, help="learning_rate_multiplier; of dpo five times it")
    ask.add_argument("--methods", default="supervised,dpo")
    ask.add_argument("--minutes", type=float, default=30, help="the most to wait for one job")
    given = ask.parse_args()
    with OpenAI(base_url=given.base_url, api_key=given.api_key) as client:
        print(json.dumps(play(client, given)))


if __name__ == "__main__":
    main()
