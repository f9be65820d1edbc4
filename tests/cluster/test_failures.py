"""Out of what Serve tells of a start that failed comes the one line that is for people."""

from __future__ import annotations

from peft_serve.cluster.failures import failure_of, reason_in

MESSAGE = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or \
initial health check failing. See controller logs for details. Error:
ray::ServeReplica:peft-serve:Engine.initialize_and_get_metadata() (pid=7, ip=127.0.0.1, actor_id=6a)
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 456, in result
    return self.__get_result()
           ^^^^^^^^^^^^^^^^^^^
  File "deployments.py", line 66, in __init__
    parts, engine = await asyncio.to_thread(build, settings, _log.info, opens=open_store_to_read)
peft_serve.model.weight_files.BrokenFile: model.safetensors: is cut short: 12 of 15 MB are there
"""


def test_the_last_error_of_a_traceback_is_the_reason() -> None:
    assert reason_in(MESSAGE) == "model.safetensors: is cut short: 12 of 15 MB are there"
    assert reason_in("RuntimeError: first\n\nDuring handling of it:\n\nOSError: second\n") == "second"
    assert reason_in("ray.exceptions.RayTaskError(ValueError): no room") == "no room"
    assert reason_in("The deployment is waited for, and nothing else is known") == ""


def test_a_start_that_failed_says_whose_and_why() -> None:
    told = "Deploying application peft-serve failed: Failed to update the deployments ['Engine'].\n  more"
    assert failure_of(told, {"Engine": MESSAGE, "Front": ""}) == f"Engine: {reason_in(MESSAGE)}"
    assert failure_of(told, {}) == told.splitlines()[0]
