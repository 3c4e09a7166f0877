"""The engine compared with transformers' generate one by one, and the HTTP API under load.

    python benchmarks/serving.py [--model DIR | --shape 135m] [--clients N] [--seconds N] [--hostile] [--json FILE]
                                 [--beside llamacpp|vllm|URL [--only_beside]]

Part 1 runs in this process. 16 threads request short captions of drawn scenes, each of a new image; transformers'
generate writes the same captions one by one, with the same weights. The texts are compared. The figures are the least
CPU time of several alternating runs on one thread.

Part 2 starts a `clip-phi serve` and sends requests of many sizes from --clients for --seconds. With --hostile, one
client in ten disconnects early, one request in ten is malformed, and one in fifty is an attack: megabytes of text,
images that are small files and large in memory, sampling options at the edge of float32, and connections that send
nothing. Errors are a status of 5xx, an accepted request without a complete answer, and a place in the batch that is
not freed. 429 is counted separately. Another process asks for /health all the time: worst_health_ms is its longest
wait.

With --beside, part 3 sends the same requests to `clip-phi serve` and to another server in turn, a kind at a time:
captions, questions with an answer of one word, and the same questions without an image. Each image is new. The texts,
without spaces around them, and the numbers of tokens are compared. A ratio is our requests per CPU second of the
server's processes, divided by the other's: above 1, ours is faster. It is the median of the pairs. _wall_ratios are
those of the seconds of the clock, which the client and everything else on the machine share.

`llamacpp` exports the model as GGUF with the same float32 weights, and starts llama.cpp's server on one thread with a
slot for each client. `vllm` exports the model for vLLM and starts vLLM's server of .venv-vllm on one thread, in
float32. A URL is that of a server on this machine with OpenAI's API; start it on one thread.

With --shape, the decoder has the shape of SmolLM2-135M and random weights, and the tower is the demo's.
"""

import argparse
import asyncio
import base64
import importlib.util
import io
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from clip_phi.batching.images import FORMATS
from clip_phi.data.synthetic import ask_count, ask_presence, draw_scene, sample_scene
from clip_phi.evaluation.generate import generate_texts
from clip_phi.serving.engine import Engine, as_prompt
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

# Tied as SmolLM2's, with weights large enough that a token does not repeat for ever.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }
}
ROOT = Path(__file__).parent.parent
DEMO = Path("outputs/demo/model")
BACKBONES = ROOT / "examples" / "demo_backbones"
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
INSTRUCTION = "Describe the image."
ONE_WORD = 4  # tokens: random weights do not end an answer
MALFORMED = (
    b"",
    b"{",
    b"[1, 2",
    b'{"model": "served"}',
    b'{"model": "served", "messages": "hello"}',
    b'{"model": "served", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b'{"model": "served", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "http://localhost/"}}]}]}',
    b'{"model": "served", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"model": "another", "messages": [{"role": "user", "content": "x"}]}',
    b"\xff" * 1000,
)


PROBE = """
import http.client, json, sys, time
connection, times = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60), []
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    began = time.monotonic()
    connection.request("GET", "/health")
    connection.getresponse().read()
    times.append(time.monotonic() - began)
    time.sleep(0.02)
print(json.dumps(sorted(times)))
"""

LLAMACPP = """
import signal, sys, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, options.mmproj.path = sys.argv[1] + "/text.gguf", sys.argv[1] + "/mmproj.gguf"
options.port, options.n_parallel = int(sys.argv[2]), int(sys.argv[3])
options.n_ctx = options.n_parallel * int(sys.argv[4])
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
options.cache_ram_mib = 0  # it would copy the state of each finished request
options.use_jinja, options.warmup, options.verbosity = True, False, 0
server = xllamacpp.Server(options)
signal.pause()
"""

VLLM_ENVIRONMENT = {  # GiB of keys and values; no log lines, no statistics to others, no pinning of threads to cores
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", help=f"folder or repository (default: {DEMO}; if absent, untrained weights of its size)"
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    parser.add_argument("--requests", type=int, default=192, help="requests per timed run (default: %(default)s)")
    parser.add_argument("--concurrent", type=int, default=16, help="threads that send requests (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=24, help="longest caption in tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="clients of the API (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20, help="duration of the load on the API (default: %(default)s)"
    )
    parser.add_argument(
        "--hostile", action="store_true", help="also clients that disconnect, malformed requests and attacks"
    )
    parser.add_argument(
        "--beside", metavar="llamacpp|vllm|URL", help="also the same requests to our server and to this one, in turn"
    )
    parser.add_argument("--only_beside", action="store_true", help="part 3 alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.beside == "llamacpp" and not importlib.util.find_spec("xllamacpp"):
        parser.error("--beside llamacpp needs the package xllamacpp: make test-llamacpp installs it")
    if options.beside == "vllm" and not VLLM.exists():
        parser.error("--beside vllm needs .venv-vllm: make .venv-vllm/installed")
    if options.beside not in (None, "llamacpp", "vllm"):
        try:
            _listener(options.beside)
        except ValueError as error:
            parser.error(str(error))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or (str(DEMO) if DEMO.is_dir() else None)
        if options.shape or not model:
            model = _untrained(folder, SHAPES.get(options.shape))
        result: dict[str, Any] = {}
        if not options.only_beside:
            result = race(model, options.requests, options.concurrent, options.new_tokens, options.repeats)
            result |= load(model, options.clients, options.seconds, options.hostile)
        if options.beside:
            work = (options.concurrent, options.requests, options.new_tokens, options.repeats)
            result |= beside(model, options.beside, *work)
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:{width}} {value:.4g}" if isinstance(value, int | float) else f"{name:{width}} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _untrained(folder: str, shape: dict[str, Any] | None = None) -> str:
    backbones = (str(BACKBONES / "vision"), str(BACKBONES / "text"))
    torch.manual_seed(0)
    if shape:
        backbones = backbones[0], _random_decoder(f"{folder}/text", shape)
    ClipPhiForCausalLM.from_backbones(*backbones).save_pretrained(folder)
    ClipPhiProcessor.from_backbones(*backbones).save_pretrained(folder)
    return folder


def _random_decoder(folder: str, shape: dict[str, Any]) -> str:
    """A Llama with the demo's tokenizer, whose vocabulary is filled with words that no prompt has."""
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(BACKBONES / "text" / "tokenizer_config.json", folder)
    tokenizer = json.loads((BACKBONES / "text" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    spare = 1  # for <image>
    vocabulary |= {f"Ġ{number}": number for number in range(len(vocabulary), config.vocab_size - spare)}
    Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def draw_images(count: int, seed: int = 0) -> list[Image.Image]:
    choose = random.Random(seed)
    return [draw_scene(sample_scene(choose, "val")) for _ in range(count)]


def race(model: str, requests: int, concurrent: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Compare the engine with generate, on equal weights and new images."""
    with Engine.from_pretrained(model, "cpu") as engine:
        instruction = engine.model.config.caption_instruction
        if instruction is None and model == str(DEMO):
            instruction = INSTRUCTION
        first_token: list[float] = []

        def one_by_one(images: list[Image.Image]) -> list[str]:
            prompts = [(as_prompt(instruction, image)[0], image) for image in images]
            return [generate_texts(engine.model, engine.processor, [prompt], new_tokens)[0] for prompt in prompts]

        def at_once(images: list[Image.Image]) -> list[str]:
            texts = [""] * len(images)

            def client(number: int) -> None:
                for place in range(number, len(images), concurrent):
                    answer = engine.submit(*as_prompt(instruction, images[place]), max_new_tokens=new_tokens)
                    texts[place] = answer.result()
                    first_token.append(answer.first_token_seconds or 0.0)

            threads = [threading.Thread(target=client, args=(number,)) for number in range(concurrent)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return texts

        at_once(draw_images(concurrent, seed=99))
        one_by_one(draw_images(2, seed=99))
        cpu: dict[str, list[float]] = {"one by one": [], "at once": []}
        wall: dict[str, list[float]] = {"one by one": [], "at once": []}
        same = total = 0
        tokens = engine.counts["tokens"]
        for repeat in range(repeats):
            images = draw_images(requests, seed=repeat)
            texts = {}
            for name, write in (("one by one", one_by_one), ("at once", at_once)):
                started, started_cpu = time.perf_counter(), time.process_time()
                texts[name] = write(images)
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - started_cpu)
            same += sum(a == b for a, b in zip(texts["one by one"], texts["at once"], strict=True))
            total += requests
        tokens = (engine.counts["tokens"] - tokens) // repeats
        alone = [_alone(engine, instruction, image, new_tokens) for image in draw_images(20, seed=77)]
    least = {name: min(seconds) for name, seconds in cpu.items()}
    print(f"{requests} captions, {tokens / requests:.1f} tokens each\n{'':12}{'CPU seconds':>12}{'captions/s':>12}")
    for name, seconds in least.items():
        print(f"{name:12}{seconds:12.3f}{requests / seconds:12.1f}")
    return {
        "throughput_vs_sequential": least["one by one"] / least["at once"],
        "throughput_vs_sequential_wall": min(wall["one by one"]) / min(wall["at once"]),
        "texts_identical": same / total,
        "tokens_per_caption": tokens / requests,
        "first_token_ms": 1000 * statistics.median(first_token),
        "first_token_alone_ms": 1000 * statistics.median(alone),
    }


def _alone(engine: Engine, instruction: str | None, image: Image.Image, new_tokens: int) -> float:
    answer = engine.submit(*as_prompt(instruction, image), max_new_tokens=new_tokens)
    answer.result()
    return answer.first_token_seconds or 0.0


def random_schema(choose: random.Random, depth: int = 0) -> dict[str, Any]:
    """A JSON schema of the kinds that `follows` knows, up to three levels deep."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern", "anyOf", "array", "object", "object"]
    kind = choose.choice(kinds if depth < 3 else kinds[:7])
    if kind == "enum":
        return {"enum": [choose.choice(["red", "blue", 3, None, True, 'a "b" é']) for _ in range(choose.randint(1, 4))]}
    if kind == "pattern":
        return {"type": "string", "pattern": choose.choice(["^[a-z]{3,5}$", "^a+b$", "^[0-9]{4}-[0-9]{2}$"])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(choose, depth + 1) for _ in range(2)]}
    if kind == "string":
        return {"type": kind} | choose.choice([{}, {"minLength": 2}, {"maxLength": 4}])
    if kind in ("integer", "number"):
        return {"type": kind} | choose.choice([{}, {"minimum": 100}, {"maximum": -10}, {"minimum": -5, "maximum": 5}])
    if kind == "array":
        size = choose.choice([{}, {"minItems": 2}, {"maxItems": 3}])
        return {"type": kind, "items": random_schema(choose, depth + 1)} | size
    if kind == "object":
        names = [f"k{number}" for number in range(choose.randint(0, 3))]
        required = [name for name in names if choose.random() < 0.6]
        properties = {name: random_schema(choose, depth + 1) for name in names}
        return {"type": kind, "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def follows(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is valid for a schema of random_schema."""
    if "anyOf" in schema:
        return any(follows(each, value) for each in schema["anyOf"])
    if "enum" in schema:
        return any(type(each) is type(value) and each == value for each in schema["enum"])
    kind = schema["type"]
    if kind == "string":
        sized = isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
        return sized and re.search(schema.get("pattern", ""), value) is not None
    if kind in ("integer", "number"):
        is_number = isinstance(value, int | float if kind == "number" else int) and not isinstance(value, bool)
        return is_number and schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if kind == "array":
        sized = isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)
        return sized and all(follows(schema["items"], each) for each in value)
    if kind == "object":
        is_whole = isinstance(value, dict) and set(schema["required"]) <= value.keys() <= schema["properties"].keys()
        return is_whole and all(follows(schema["properties"][name], each) for name, each in value.items())
    return value is None if kind == "null" else isinstance(value, bool)


def load(model: str, clients: int, seconds: float, hostile: bool) -> dict[str, Any]:
    """Start a server and send it requests. Returns the counts of the clients and the server's state afterwards."""
    with _started(_serve(model)) as (address, server):
        return asyncio.run(_load(address, server, clients, seconds, hostile))


def _serve(model: str) -> list[str]:
    command = [sys.executable, "-m", "clip_phi.cli", "serve", model, "--name", "served"]
    return [*command, "--device", "cpu", "--log_level", "error", "--port", "PORT"]


@contextmanager
def _started(command: list[str], **environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server on one thread, with a free port in place of PORT. Yields its address and process, and ends it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [port if word == "PORT" else word for word in command]
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        status = server.wait(timeout=60)
        if status not in (0, -15):
            raise SystemExit(f"the server ended with status {status}")


def beside(model: str, other: str, clients: int, requests: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Send the same requests to our server and to another one, in turn."""
    with ExitStack() as stack:
        address, server = stack.enter_context(_started(_serve(model)))
        servers = {"ours": (address, psutil.Process(server.pid))}
        if other == "llamacpp":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            export = [sys.executable, "-m", "clip_phi.cli", "export", model, folder, "--to", "gguf"]
            subprocess.run([*export, "--dtype", "float32"], check=True)
            command = [sys.executable, "-c", LLAMACPP, folder, "PORT", str(clients), str(256 + new_tokens)]
            address, server = stack.enter_context(_started(command))
            servers["theirs"] = (address, psutil.Process(server.pid))
        elif other == "vllm":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            export = [sys.executable, "-m", "clip_phi.cli", "export", model, folder, "--to", "vllm"]
            subprocess.run(export, check=True)
            words = "--port PORT --model-impl transformers --trust-remote-code --dtype float32"
            command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *words.split()]
            command += ["--limit-mm-per-prompt", '{"image": 4}', "--disable-uvicorn-access-log"]
            address, server = stack.enter_context(_started(command, **VLLM_ENVIRONMENT))
            servers["theirs"] = (address, psutil.Process(server.pid))
        else:
            servers["theirs"] = (other.rstrip("/").removesuffix("/v1"), _listener(other))
        return {"beside": other} | asyncio.run(_beside(servers, clients, requests, new_tokens, repeats))


def _listener(address: str) -> psutil.Process:
    """The process of this machine that listens at an address. Raises ValueError if there is none."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme != "http" or url.host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"--beside is llamacpp, vllm or an address like http://127.0.0.1:8000, not {address}")
    for each in psutil.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.laddr.port == (url.port or 80) and each.pid:
            return psutil.Process(each.pid)
    raise ValueError(f"no process that you may see listens at {address}: its CPU time cannot be measured")


def _runs(server: psutil.Process) -> bool:
    return server.is_running() and server.status() != psutil.STATUS_ZOMBIE


def _cpu_seconds(server: psutil.Process) -> float:
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times)


async def _beside(
    servers: dict[str, tuple[str, psutil.Process]], clients: int, requests: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120) as client:
        names = {}
        for name, (address, server) in servers.items():
            await _until(partial(_runs, server), client, address)
            names[name] = (await client.get(address + "/v1/models")).json()["data"][0]["id"]

        async def answer(name: str, bodies: list[dict[str, Any]]) -> list[tuple[str, int]]:
            """Texts and numbers of tokens, in order."""
            answers: list[tuple[str, int]] = [("", 0)] * len(bodies)

            async def one(number: int) -> None:
                for place in range(number, len(bodies), clients):
                    body = bodies[place] | {"model": names[name]}
                    response = await client.post(servers[name][0] + "/v1/chat/completions", json=body)
                    if response.status_code != 200:
                        raise SystemExit(f"{servers[name][0]} answered {response.status_code}: {response.text[:300]}")
                    answered = response.json()
                    content = answered["choices"][0]["message"]["content"]
                    answers[place] = content.strip(), answered["usage"]["completion_tokens"]

            await asyncio.gather(*map(one, range(clients)))
            return answers

        for kind in ("captions", "questions", "questions_without_image"):
            for name in servers:
                await answer(name, _bodies(kind, 2 * clients, new_tokens, seed=99))
            speeds: dict[str, list[float]] = {name: [] for name in servers}
            seconds: dict[str, list[float]] = {name: [] for name in servers}
            tokens: Counter[str] = Counter()
            same = 0
            for repeat in range(repeats):
                bodies, answers = _bodies(kind, requests, new_tokens, seed=repeat), {}
                for name, (_, server) in servers.items():
                    started, before = time.perf_counter(), _cpu_seconds(server)
                    answers[name] = await answer(name, bodies)
                    speeds[name].append(requests / max(_cpu_seconds(server) - before, 0.01))  # a tick
                    seconds[name].append(time.perf_counter() - started)
                    tokens[name] += sum(count for _, count in answers[name])
                same += sum(a == b for (a, _), (b, _) in zip(answers["ours"], answers["theirs"], strict=True))
            ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["theirs"], strict=True)]
            found |= {f"{kind}_compared": requests * repeats, f"{kind}_identical": same}
            for name in servers:
                found[f"{kind}_tokens_{name}"] = tokens[name]
                found[f"{kind}_per_cpu_second_{name}"] = statistics.median(speeds[name])
            wall = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
            found |= {f"{kind}_wall_ratio": statistics.median(wall), f"{kind}_wall_ratios": wall}
            found |= {f"{kind}_ratio": statistics.median(ratios), f"{kind}_ratios": ratios}
    return found


def _bodies(kind: str, count: int, new_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Requests about new drawn scenes, which are square: llama.cpp pads other images."""
    choose, bodies = random.Random(seed), []
    for number in range(count):
        scene = sample_scene(choose, "val")
        text = INSTRUCTION if kind == "captions" else (ask_presence, ask_count)[number % 2](scene, choose)[0]
        file = io.BytesIO()
        draw_scene(scene).save(file, "PNG")  # JPEG decoders differ
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
        content = [*(content if kind != "questions_without_image" else []), {"type": "text", "text": text}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        most = new_tokens if kind == "captions" else ONE_WORD
        bodies.append(body | {"max_tokens": most, "temperature": 0})
    return bodies


async def _load(address: str, server: Any, clients: int, seconds: float, hostile: bool) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as client:
        await _until(lambda: server.poll() is None, client)
        seen: Counter[str] = Counter()
        uris = [_as_uri(image, size) for image in draw_images(40, seed=5) for size in (64, 640)]
        attacks = make_attacks() if hostile else []  # which takes seconds itself
        end = time.perf_counter() + seconds
        resident: list[float] = []
        port = address.rpartition(":")[2]
        command = (sys.executable, "-c", PROBE, port, str(seconds))
        probe = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)

        async def watch() -> None:
            while time.perf_counter() < end:
                resident.append(_resident_mb(server.pid))
                await asyncio.sleep(min(1.0, seconds / 20))

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(_client(client, number, end, uris, attacks, seen) for number in range(clients)))
        await watching
        waits = json.loads((await probe.communicate())[0])
        left = await _places_left(client)
        resident.append(_resident_mb(server.pid))
        metrics = (await client.get("/metrics")).text
    faults = sum(count for name, count in seen.items() if name.startswith("fault"))
    for name, count in sorted(seen.items()):
        print(f"{name:40} {count}")
    warm = resident[len(resident) // 4]  # caches and allocators are full by then
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": sum(seen.values()),
        "answered": seen["answered"],
        "busy": seen["busy (429)"],
        "gone_away": seen["gone away"],
        "refused_malformed": seen["refused (4xx)"],
        "attacks": sum(count for name, count in seen.items() if name.startswith("attack")),
        "errors": faults + left,
        "places_left": left,
        "requests_per_second": sum(seen.values()) / seconds,
        "server_5xx": sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if 'status="5' in line),
        "memory_growth_mb": resident[-1] - warm,
        "memory_mb": resident[-1],
        "peak_mb": _resident_mb(server.pid, "VmHWM"),
        "worst_health_ms": 1000 * waits[-1],
        "health_99_ms": 1000 * waits[int(0.99 * len(waits))],
    }


async def _until(running: Callable[[], bool], client: Any, address: str = "") -> None:
    while True:
        try:
            if (await client.get(address + "/health")).status_code == 200:
                return
        except httpx.TransportError:
            if not running():
                raise SystemExit("the server did not start") from None
        await asyncio.sleep(0.2)


def make_attacks() -> list[bytes]:
    """Bodies that once held up other requests, or ended them."""

    def body(content: Any = "x", **options: Any) -> bytes:
        body = {"model": "served", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        return json.dumps(body | options).encode()

    def images(*files: bytes) -> bytes:
        urls = ("data:image/png;base64," + base64.b64encode(file).decode() for file in files)
        return body([{"type": "image_url", "image_url": {"url": url}} for url in urls])

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    bomb = saved(Image.new("RGBA", (5000, 5000), (9, 9, 9, 9)), "PNG")
    jpeg = saved(Image.new("RGB", (4000, 4000), "red"), "JPEG", progressive=True)
    scan = jpeg.rindex(b"\xff\xda")  # the last scan, which may come again and again
    return [
        body(temperature=1e-40),
        body(temperature=1.0, top_p=1e-300),
        body("word " * 480_000),
        body(["a"] * 200_000),
        images(*[bomb] * 8),
        images(jpeg[:-2] + jpeg[scan:-2] * 300 + jpeg[-2:]),
        images(saved(Image.new("RGB", (4000, 4000)), "AVIF", speed=10)) if "AVIF" in FORMATS else images(b"x"),
        images(saved(Image.new("RGB", (4900, 4900), "red"), "WEBP")),
    ]


async def _attack(client: Any, choose: random.Random, attacks: list[bytes]) -> str:
    if choose.random() < 0.2:  # a connection that sends no request; the server ends it
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n")
        await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return "attack (ended)"
    found = await client.post("/v1/chat/completions", content=choose.choice(attacks), headers=JSON)
    return f"attack ({found.status_code})" if found.status_code < 500 else f"fault: {found.status_code} of an attack"


async def _client(
    client: Any, number: int, end: float, uris: list[str], attacks: list[bytes], seen: Counter[str]
) -> None:
    choose = random.Random(number)
    while time.perf_counter() < end:
        fate = choose.random() if attacks else 1.0
        try:
            if fate > 0.98 and attacks:
                seen[await _attack(client, choose, attacks)] += 1
            elif fate < 0.1:
                content = choose.choice(MALFORMED)
                found = await client.post("/v1/chat/completions", content=content, headers=JSON)
                seen["refused (4xx)" if 400 <= found.status_code < 500 else f"fault: {found.status_code}"] += 1
            else:
                seen[await _ask(client, _body(choose, uris), leaves=fate < 0.2, choose=choose)] += 1
        except httpx.HTTPError as error:
            seen[f"fault: {type(error).__name__}"] += 1


JSON = {"Content-Type": "application/json"}


def _body(choose: random.Random, uris: list[str]) -> dict[str, Any]:
    """Make a request with a short or long question and up to three images."""
    content: list[dict[str, Any]] = []
    for _ in range(choose.choice((0, 1, 1, 1, 2, 3))):
        content.append({"type": "image_url", "image_url": {"url": choose.choice(uris)}})
    content.append({"type": "text", "text": "How many shapes are there? " * choose.choice((1, 1, 1, 10))})
    body: dict[str, Any] = {"model": "served", "messages": [{"role": "user", "content": content}]}
    body["max_tokens"] = choose.choice((1, 8, 16, 64))
    if choose.random() < 0.3:
        body |= {"temperature": 1.0, "top_p": 0.9, "seed": choose.randrange(100)}
    return body | {"stream": choose.random() < 0.5}


async def _ask(client: Any, body: dict[str, Any], leaves: bool, choose: random.Random) -> str:
    """Send one request. Returns the kind of its outcome."""
    if leaves:
        try:
            async with asyncio.timeout(choose.random() * 0.3):
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    async for _ in response.aiter_raw():
                        if choose.random() < 0.3:
                            break
        except TimeoutError:
            pass
        return "gone away"
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code == 429:
        await asyncio.sleep(min(float(response.headers["retry-after"]), 2.0))
        return "busy (429)"
    if response.status_code != 200:
        return f"fault: {response.status_code} {response.text[:100]}"
    if body["stream"]:
        whole = response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
    else:
        whole = response.json()["choices"][0]["finish_reason"] in ("stop", "length")
    return "answered" if whole else "fault: not whole"


async def _places_left(client: Any) -> int:
    """Count the requests in the server ten seconds after the last client has disconnected."""
    for _ in range(100):
        health = (await client.get("/health")).json()
        if (left := health["running"] + health["waiting"]) == 0:
            break
        await asyncio.sleep(0.1)
    return left


def _as_uri(image: Image.Image, size: int) -> str:
    file = io.BytesIO()
    image.resize((size, size)).save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _resident_mb(pid: int, name: str = "VmRSS") -> float:
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
