"""Run an OpenAI script against a luthier server of its own, then end the server.

    python examples/served.py examples/openai_client.py --epochs 1

Starts `luthier serve --demo --port 0 --json`, waits for its line, and runs the script with OPENAI_BASE_URL
and OPENAI_API_KEY set, which is all that the official client reads. A script that worked
against OpenAI needs no other change than the name of its model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

LUTHIER = str(Path(sys.executable).parent / "luthier")


def main() -> int:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    server = subprocess.Popen(
        [LUTHIER, "serve", "--demo", "--port", "0", "--json"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line or "url" not in (ready := json.loads(line)):
            return server.wait() or 1
        print(f"{ready['model']} at {ready['url']}", flush=True)
        key = {"OPENAI_BASE_URL": ready["url"] + "/v1", "OPENAI_API_KEY": ready["key"]}
        return subprocess.run(
            [sys.executable, *sys.argv[1:]], env={**os.environ, **key}, check=False
        ).returncode
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
