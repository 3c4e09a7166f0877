"""Runs scripts in processes of their own, forked from one that has imported the libraries already.

An import of torch, transformers, peft and accelerate takes several seconds, and a run on tiny backbones one second.
Everything else is as with `python script.py`: arguments, environment, working directory, output, return code.

`run_forked` sends a request to the server, one line of json, and the server answers with one line of json.
"""

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

SECONDS = 600  # after which a process that hangs is killed
_server: list[subprocess.Popen] = []


def run_forked(script, arguments, cwd, environment, processes=1) -> subprocess.CompletedProcess:
    """Run a script, as torchrun would where there are several processes.

    Args:
        script: path of a Python file, or dotted name of a module.
        arguments: its command-line arguments.
        cwd: working directory.
        environment: all environment variables.
        processes: number of processes, which find each other at a free port of 127.0.0.1.

    Returns:
        Output of all processes, the first one's first, and the return code of the first process that failed, or 0.
    """
    if not _server:
        command = [sys.executable, __file__]
        _server.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        atexit.register(_server[0].stdin.close)
    with tempfile.TemporaryDirectory() as folder:
        request = {"script": str(script), "arguments": [*map(str, arguments)], "cwd": str(cwd), "folder": folder}
        request["environments"] = [environment | each for each in _ranks(processes)]
        print(json.dumps(request), file=_server[0].stdin, flush=True)
        code = json.loads(_server[0].stdout.readline())
        outputs = [
            "".join((Path(folder) / f"{rank}.{name}").read_text(errors="replace") for rank in range(processes))
            for name in ("stdout", "stderr")
        ]
    return subprocess.CompletedProcess([str(script), *map(str, arguments)], code, *outputs)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _ranks(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [{}]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    together |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(1, str(Path(__file__).parent.parent))
    _import_all()
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank, environment in enumerate(request["environments"]):
            child = os.fork()
            if not child:
                _run(request, rank, environment)
            os.setpgid(child, child)  # here and in the child, since either may be the first
            children.append(child)
        print(json.dumps(_wait(children)), file=answers, flush=True)


def _import_all() -> None:
    import transformers

    for name in ("CLIPImageProcessorPil", "CLIPVisionModel", "PhiForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    for part in ("batching", "commands", "data", "evaluation", "hub", "serving", "tools", "training"):
        package = importlib.import_module(f"clip_phi.{part}")
        for module in pkgutil.iter_modules(package.__path__):
            with contextlib.suppress(ImportError):  # of an extra
                importlib.import_module(f"clip_phi.{part}.{module.name}")


def _run(request: dict, rank: int, environment: dict) -> None:
    """The child's part: it never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{request['folder']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(request["cwd"])
        import huggingface_hub

        huggingface_hub.constants.HF_HOME = environment.get("HF_HOME", huggingface_hub.constants.HF_HOME)
        sys.argv = [request["script"], *request["arguments"]]
        is_file = request["script"].endswith(".py")
        sys.path[0] = os.path.dirname(request["script"]) if is_file else ""
        sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        try:
            (runpy.run_path if is_file else runpy.run_module)(request["script"], run_name="__main__")
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(children: list[int]) -> int:
    """The return code of the first that fails, after which the others are killed, or 0."""
    code, running, deadline = 0, set(children), time.monotonic() + SECONDS
    while running:
        for child in list(running):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                running.remove(child)
                code = code or os.waitstatus_to_exitcode(status)
        late = time.monotonic() > deadline
        if running and (code or late):
            code = code or -signal.SIGKILL
            for child in running:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    return code


if __name__ == "__main__":
    _serve()
