"""What is found out before a cluster is started for it: folders, the base, the place of the store.

In a process of its own (`python -m peft_serve.cluster.preflight`, settings as JSON on stdin), as it loads what takes
seconds and memory; the command does without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

from peft_serve.config import Settings
from peft_serve.errors import ServeError, Unavailable


def require_startable(values: dict[str, Any], *, is_alone: bool) -> None:
    """Raise ValueError for a setting that no replica or front could start with, and Unavailable for what is in the way
    now. `is_alone`: no server of ours is to be there that has the store; else the new front waits for it."""
    told = json.dumps([values, is_alone])
    ran = subprocess.run([sys.executable, "-m", __name__], input=told, capture_output=True, text=True, check=False)
    found = ran.stdout.strip().splitlines()
    if ran.returncode or not found:
        last = ran.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        raise RuntimeError(f"the settings cannot be tried: {last[0]}")
    refusal, message = json.loads(found[-1])
    if refusal == "setting":
        raise ValueError(message)
    if refusal == "state":
        raise Unavailable(message)


def refusal_of(values: dict[str, Any], *, is_alone: bool) -> tuple[str, str]:
    """Its kind (`setting`, or `state` for what is in the way now) and its words; none where nothing is found."""
    from peft_serve.engine.adapter_places import local_folder, open_store
    from peft_serve.engine.before_loading import check_folders
    from peft_serve.model.loader import name_of, require_configuration

    settings = Settings(**values)
    try:
        check_folders(settings)
        require_configuration(settings.model, revision=settings.revision)
        with suppress(*(() if is_alone else (Unavailable,))):
            open_store(settings, local_folder(settings, settings.served_model_name or name_of(settings.model))).close()
    except ValueError as error:
        return "setting", str(error)
    except (ServeError, OSError) as error:
        return "state", str(error)
    return "", ""


if __name__ == "__main__":
    given, alone = json.load(sys.stdin)
    print(json.dumps(refusal_of(given, is_alone=alone)))
