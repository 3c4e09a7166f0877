"""Run in vLLM's own environment: answers of vLLM, by its Python class and by its HTTP server with the openai client.

    python vllm_driver.py class|http MODEL REQUESTS.json ANSWERS.json

REQUESTS is a list of {"messages": OpenAI's, "prompt": the rendered text, "images": paths}; ANSWERS a list of texts.
"""

import base64
import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
NEW_TOKENS, SEQUENCES, PORT = 40, 32, 18473


def by_class(model: str, requests: list) -> list[str]:
    from PIL import Image
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": SEQUENCES, "max_model_len": 512}
    options |= {"model_impl": "transformers", "trust_remote_code": True, "limit_mm_per_prompt": {"image": 3}}
    engine = LLM(model, **options)
    prompts = []
    for request in requests:
        images = [Image.open(path).convert("RGB") for path in request["images"]]
        prompts.append({"prompt": request["prompt"], "multi_modal_data": {"image": images}})
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    return [output.outputs[0].text for output in outputs]


def by_http(model: str, requests: list) -> list[str]:
    from openai import OpenAI

    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(PORT)]
    command += ["--model-impl", "transformers", "--trust-remote-code", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", str(SEQUENCES), "--max-model-len", "512", "--limit-mm-per-prompt", '{"image": 3}']
    with subprocess.Popen(command) as server:
        try:
            wait_for(server)
            client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
            with ThreadPoolExecutor(SEQUENCES) as pool:
                return list(pool.map(lambda request: ask(client, model, request), requests))
        finally:
            server.terminate()


def wait_for(server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit("the server did not answer within 10 minutes")


def ask(client: object, model: str, request: dict) -> str:
    paths = iter(request["images"])
    messages = []
    for message in request["messages"]:
        content = []
        for item in message["content"]:
            if item["type"] == "image":
                data = base64.b64encode(Path(next(paths)).read_bytes()).decode()
                item = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
            content.append(item)
        messages.append({"role": message["role"], "content": content})
    options = {"model": model, "temperature": 0, "max_tokens": NEW_TOKENS}
    return client.chat.completions.create(messages=messages, **options).choices[0].message.content


if __name__ == "__main__":
    way, model, requests, answers = sys.argv[1:]
    found = {"class": by_class, "http": by_http}[way](model, json.loads(Path(requests).read_text()))
    Path(answers).write_text(json.dumps(found))
