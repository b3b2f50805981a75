"""Plain transformers and peft behind HTTP: one request at a time, each one call of `generate`.

    python bench/serving/peft_serve.py '{"base": …, "made": …, "port": …, "threads": …}'

This is what serving adapters looks like without a batching engine, and the reference for one stream's speed.
Streams OpenAI's chunks; every answer goes on to max_tokens. It knows one client's needs: serving/load.py's.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

JOB = json.loads(sys.argv[1])
ADAPTERS = tuple(f"a{number}" for number in range(1, 9))
ONE_AT_A_TIME = threading.Lock()


def load() -> tuple[Any, Any]:
    torch.set_num_threads(JOB["threads"])
    base = AutoModelForCausalLM.from_pretrained(JOB["base"], dtype="auto")
    model = PeftModel.from_pretrained(base, f"{JOB['made']}/adapters/a1", adapter_name="a1")
    for name in ADAPTERS[1:]:
        model.load_adapter(f"{JOB['made']}/adapters/{name}", adapter_name=name)
    return model.eval(), AutoTokenizer.from_pretrained(JOB["base"])


MODEL, TOKENIZER = load()


class Door(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        ids = TOKENIZER.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        with ONE_AT_A_TIME, torch.inference_mode():
            tokens = self.answer(body, ids)
        usage = {"prompt_tokens": ids["input_ids"].shape[1], "completion_tokens": tokens}
        self.say({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, body: dict[str, Any], ids: Any) -> int:
        wanted = body["max_tokens"]
        streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
        options = {
            **ids, "max_new_tokens": wanted, "min_new_tokens": wanted, "do_sample": False,
            "streamer": streamer, "pad_token_id": TOKENIZER.eos_token_id,
        }  # fmt: skip
        if body["model"] in ADAPTERS:
            MODEL.set_adapter(body["model"])
            made: Any = MODEL.generate
        else:
            made = self.bare
        thread = threading.Thread(target=lambda: made(**options))
        thread.start()
        for text in streamer:
            self.say({"choices": [{"delta": {"content": text}}]})
        thread.join()
        return int(wanted)

    @staticmethod
    def bare(**options: Any) -> None:
        with MODEL.disable_adapter():
            MODEL.generate(**options)

    def say(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *words: Any) -> None:
        """Nothing: the load generator keeps the record."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", JOB["port"]), Door).serve_forever()
