"""One rank of a training that several processes share: what torchrun starts, and its way back to the stage.

The job is a file that `train.run` wrote: the recipe's phase, the inputs as paths, and how to share the work.
It does not know what training is, nor who else takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier import artifacts
from luthier.engine import placement
from luthier.engine.launch import Line
from luthier.recipe import Phase
from luthier.stages import Event, Inputs, train


def main(job_file: str) -> None:
    line = Line()
    job = artifacts.read_json(Path(job_file))
    place = placement.join(job["placement"], job["timeout_s"])

    def tell(event: Event) -> None:
        if place.leads:
            line.say("event", asdict(event))

    with line.last_words():
        inputs = _inputs(job["inputs"], tell, line)
        facts = train.carry_out((Phase.model_validate(job["phase"]),), inputs, Path(job["out"]), place)
        if place.leads:
            line.say("result", facts)
    place.leave()


def _inputs(plain: Mapping[str, Any], tell: Any, line: Line) -> Inputs:
    """Undo `Inputs.as_dict`, with this rank's own ways to tell and to be stopped."""
    paths = {name: Path(plain[name]) for name in ("root", "cache", "scratch")}
    artefacts = {name: Path(path) for name, path in plain["artefacts"].items()}
    return Inputs(**{**plain, **paths, "artefacts": artefacts}, tell=tell, stopping=line.asked)


if __name__ == "__main__":
    main(sys.argv[1])
