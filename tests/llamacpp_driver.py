"""Run in llama.cpp's own environment: answers and first log-probabilities by its server's chat route.

    python llamacpp_driver.py FOLDER REQUESTS.json ANSWERS.json

REQUESTS is a list of {"text": str or None, "images": paths}; ANSWERS a list of {"text", "ids": those of its tokens,
"logprobs": {id: float} of the first one}.
"""

import base64
import json
import sys
from pathlib import Path

import xllamacpp

NEW_TOKENS = 40


def start(folder: Path) -> xllamacpp.Server:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / "text.gguf")
    parameters.mmproj.path = str(folder / "mmproj.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 1024, 1, 1
    parameters.use_jinja, parameters.warmup, parameters.verbosity = True, False, 0
    return xllamacpp.Server(parameters)


def ask(server: xllamacpp.Server, request: dict) -> dict:
    content = []
    for path in request["images"]:
        data = base64.b64encode(Path(path).read_bytes()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    if request["text"] is not None:
        content.append({"type": "text", "text": request["text"]})
    asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": NEW_TOKENS}
    asked |= {"logprobs": True, "top_logprobs": 5, "cache_prompt": False}
    answer = server.handle_chat_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "choices" not in answer:
        raise SystemExit(f"the server answered {answer}")
    choice = answer["choices"][0]
    tokens = choice["logprobs"]["content"]
    first = {each["id"]: each["logprob"] for each in tokens[0]["top_logprobs"]}
    return {"text": choice["message"]["content"], "ids": [each["id"] for each in tokens], "logprobs": first}


if __name__ == "__main__":
    folder, requests, answers = map(Path, sys.argv[1:])
    server = start(folder)
    found = [ask(server, request) for request in json.loads(requests.read_text())]
    answers.write_text(json.dumps(found))
