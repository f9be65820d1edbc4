"""What is found out before a cluster is started for it: folders, the base, the place of the store.

In a process of its own (`python -m peft_serve.cluster.preflight`, settings as JSON on stdin), as it loads what takes
seconds and memory; the command does without. What it logs meanwhile (the hub is asked again, say) is seen as it comes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

from peft_serve.config import Settings
from peft_serve.errors import ServeError, Unavailable
from peft_serve.logs import configure_logs


def require_startable(values: dict[str, Any], *, is_alone: bool) -> None:
    """Raise ValueError for a setting that no replica or front could start with, and Unavailable for what is in the way
    now. `is_alone`: no server of ours is to be there that has the store; else the new front waits for it."""
    told = json.dumps([values, is_alone])
    ran = subprocess.run([sys.executable, "-m", __name__], input=told, stdout=subprocess.PIPE, text=True, check=False)
    found = ran.stdout.strip().splitlines()
    if ran.returncode or not found:
        raise RuntimeError(f"the settings cannot be tried: the process that tries them ended with {ran.returncode}")
    refusal, message = json.loads(found[-1])
    if refusal == "setting":
        raise ValueError(message)
    if refusal == "state":
        raise Unavailable(message)


def refusal_of(values: dict[str, Any], *, is_alone: bool) -> tuple[str, str]:
    """Its kind (`setting`, or `state` for what is in the way now) and its words; none where nothing is found."""
    from peft_serve.engine.adapter_places import local_folder, open_store
    from peft_serve.engine.before_loading import check_folders, check_settings
    from peft_serve.model.loader import name_of, require_configuration

    settings = Settings(**values)
    try:
        check_settings(settings) if is_alone else check_folders(settings)  # machines of a cluster have other devices
        require_configuration(settings.model, revision=settings.revision)
        with suppress(*(() if is_alone else (Unavailable,))):
            open_store(settings, local_folder(settings, settings.served_model_name or name_of(settings.model))).close()
    except ValueError as error:
        return "setting", str(error)
    except (ServeError, OSError) as error:
        return "state", str(error)
    return "", ""


def main() -> None:
    """Tell of what is on stdin, in one line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches this process too, and the command tells of it
    told = sys.stdin.read()
    if not told:  # the command was told to stop before it could ask
        sys.exit(1)
    values, is_alone = json.loads(told)
    import_module("peft_serve.model.loader")  # libraries behind it set up logs of their own, which ours replace
    configure_logs(values["log_level"], values["log_format"])
    print(json.dumps(refusal_of(values, is_alone=is_alone)))


if __name__ == "__main__":
    main()
