"""The HTTP API, over a real socket: OpenAI's own client, malformed bodies, limits, and clients that disconnect."""

import base64
import io
import json
import random
import socket
import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import openai
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_phi.data.sample import SPOKEN_INSTRUCTION
from clip_phi.evaluation.generate import generate_texts
from clip_phi.serving.api import ApiLimits, create_app
from clip_phi.serving.detokenizer import token_bytes
from clip_phi.serving.engine import Engine, Limits, as_prompt
from clip_phi.serving.server import is_local_name, make_config, serve


@contextmanager
def serving(engine, **options):
    """The address of an application over the engine."""
    app = create_app(engine, "tiny", **options)
    server = uvicorn.Server(make_config(app, options.get("limits", ApiLimits()), log_level="warning"))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def engine(model, processor):
    with Engine(model, processor, limits=Limits(max_batch=8, max_waiting=300)) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine, limits=ApiLimits(max_body=200_000, max_pixels=10_000)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def random_image(seed=0, size=(40, 30)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def as_uri(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def about(image, text="a star?"):
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": as_uri(image)}}, {"type": "text", "text": text}],
        }
    ]


def greedy(model, processor, image, text="a star?", max_new_tokens=8, transcript=None):
    messages, _ = as_prompt(text, image, transcript)
    return generate_texts(model, processor, [(messages, image)], max_new_tokens)[0]


def idle(engine):
    deadline = time.monotonic() + 120
    while engine.num_running or engine.num_waiting:
        assert time.monotonic() < deadline, f"{engine.num_running} running, {engine.num_waiting} waiting"
        time.sleep(0.01)
    return True


# ---------------------------------------------------------------------- OpenAI's client


def test_openai_client_gets_the_greedy_answer_and_its_counts(client, model, processor, engine):
    found = client.chat.completions.create(model="tiny", messages=about(random_image()), max_tokens=8)
    choice = found.choices[0]
    assert choice.message.content == greedy(model, processor, random_image()) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and found.model == "tiny" and found.object == "chat.completion"
    prompt = len(engine._encode(as_prompt("a star?", random_image())[0], 1))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (
        prompt,
        8,
        prompt + 8,
    )
    assert found.timings["first_token_seconds"] > 0


def test_openai_client_streams_the_same_text_in_pieces(client, model, processor):
    options = {"model": "tiny", "messages": about(random_image(1)), "max_tokens": 24}
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert (
        "".join(pieces) == greedy(model, processor, random_image(1), max_new_tokens=24) and sum(map(bool, pieces)) > 3
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 24 and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_turns_with_two_images_and_a_system_message(client, model, processor, engine):
    messages = [
        {"role": "system", "content": "be brief"},
        *about(random_image(1), "what is it?"),
        {"role": "assistant", "content": "a star"},
        *about(random_image(2), "and this?"),
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices[0].message.content
    inside = [{"role": "system", "content": "be brief"}, as_prompt("what is it?", random_image(1))[0][0]]
    inside += [{"role": "assistant", "content": "a star"}, as_prompt("and this?", random_image(2))[0][0]]
    assert found == engine.submit(inside, [random_image(1), random_image(2)], max_new_tokens=8).result()


def test_seed_stop_and_sampling_reach_the_engine(client):
    options = {"model": "tiny", "messages": about(random_image()), "max_tokens": 16, "temperature": 1.5, "top_p": 0.95}

    def text(**more):
        return client.chat.completions.create(**options, **more).choices[0]

    first, again, other = text(seed=1), text(seed=1), text(seed=2)
    assert first.message.content == again.message.content != other.message.content
    stop = first.message.content[3:5]
    stopped = text(seed=1, stop=stop)
    assert stopped.message.content == first.message.content.partition(stop)[0].rstrip()
    assert stopped.finish_reason == "stop"


def test_an_image_alone_asks_for_a_caption_as_the_checkpoint_was_trained_to(client, fresh_model, model, processor):
    messages = about(random_image())
    messages[0]["content"].pop()
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices[0].message.content
    assert found == greedy(model, processor, random_image(), None)
    fresh_model.config.caption_instruction = "a red circle"
    with Engine(fresh_model, processor) as engine:
        asked = engine.add_default_instructions([{"role": "user", "content": [{"type": "image"}]}])
        assert asked[0]["content"][1] == {"type": "text", "text": "a red circle"}
        assert engine.add_default_instructions(asked) == asked


def test_openai_client_gets_log_probabilities_and_several_answers_whole_and_streamed(client, processor):
    options = {"model": "tiny", "messages": about(random_image()), "max_tokens": 8, "logprobs": True, "n": 3}
    options |= {"top_logprobs": 2, "temperature": 1.2, "seed": 4}
    whole = client.chat.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices) == 24
    for choice in whole.choices:
        spoken = [each for each in choice.logprobs.content if each.token not in ("<pad>", "<image>")]
        text = b"".join(bytes(each.bytes) for each in spoken).decode("utf-8", "replace")
        assert text.strip() == choice.message.content
        for each in choice.logprobs.content:
            assert each.logprob <= max(other.logprob for other in each.top_logprobs) and len(each.top_logprobs) == 2
    texts, tokens = ["", "", ""], [[], [], []]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += [each.token for each in choice.logprobs.content]
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [[each.token for each in choice.logprobs.content] for choice in whole.choices]
    first = client.chat.completions.create(**options | {"n": 1}).choices[0]
    assert first.message.content == texts[0] and [each.token for each in first.logprobs.content] == tokens[0]


def test_the_bytes_of_tokens_are_those_of_their_text(processor):
    tokenizer = processor.tokenizer
    text = " a red circle: “é” 🙂\n"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == text
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"<|endoftext|>" and token_bytes(tokenizer, 319) == b""


NAMES_OF_NOTHING = """tools functions tool_choice function_call logit_bias store metadata modalities service_tier audio
    prediction parallel_tool_calls web_search_options reasoning_effort verbosity moderation prompt_cache_options user
    stop seed temperature top_p max_tokens stream_options response_format logprobs top_logprobs n stream"""
NOTHING = [dict.fromkeys(NAMES_OF_NOTHING.split(), value) for value in (None, [], {}, False)]
NOTHING += [
    {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "top_logprobs": 0, "logprobs": False},
    {"modalities": ["text"], "service_tier": "auto", "parallel_tool_calls": True, "tool_choice": "auto"},
    {"response_format": {"type": "text"}, "user": "me", "safety_identifier": "x", "prompt_cache_key": "y"},
    {"max_tokens": 16.0, "temperature": 1, "top_p": 1},
    {"max_tokens": -1},
    {"max_completion_tokens": 10**9, "max_tokens": None},
]


def test_fields_that_ask_for_nothing_are_accepted(address):
    for fields in NOTHING:
        found = post(address, request() | fields)
        assert found.status_code == 200, (fields, found.text)


def test_a_message_goes_back_as_the_client_dumps_it(client, address):
    messages = request()["messages"]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices[0].message
    for dumped in (answer.model_dump(), answer.model_dump(exclude_unset=True), {"role": "assistant", "content": None}):
        messages = [{**messages[0], "name": "ann"}, dumped, {"role": "user", "content": "a star?"}]
        assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices[0].message
    messages = [{"role": "developer", "content": "be brief"}, *messages]
    messages[1]["content"] = [image(as_uri(random_image())) | {"cache_control": None}]
    messages[1]["content"][0]["image_url"]["detail"] = "high"
    assert post(address, request(messages=messages)).status_code == 200


def test_base64_of_every_kind_is_the_same_image(address):
    uri = as_uri(random_image(3))
    data = uri.partition(",")[2]
    lines = "\r\n".join(data[start : start + 76] for start in range(0, len(data), 76))
    safe = data.replace("+", "-").replace("/", "_")
    assert safe != data
    forms = [data, lines, safe.rstrip("="), data.replace("+", "%2B").replace("=", "%3D"), data + "\n"]
    urls = [f"data:image/png;base64,{form}" for form in forms]
    urls += [f"data:{kind};base64,{data}" for kind in ("IMAGE/PNG", "image/jpg", "image/png;charset=utf-8", "")]
    bodies = [user(image(url), {"type": "text", "text": "a star?"}) for url in urls] + [
        user({"type": "image_url", "image_url": uri}, {"type": "text", "text": "a star?"})
    ]
    texts = {post(address, body | {"max_tokens": 8}).json()["choices"][0]["message"]["content"] for body in bodies}
    assert len(texts) == 1


def test_openapi_names_the_statuses_that_there_are(address):
    found = get(address, "/openapi.json").json()
    operations = found["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "501"} <= operations["responses"].keys()
    assert "422" not in json.dumps(found)
    schema = operations["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatRequest"}
    schemas = found["components"]["schemas"]
    assert "logprobs" in schemas["ChatRequest"]["properties"]
    used = json.dumps(found).split('"#/components/schemas/')[1:]
    assert {name.partition('"')[0] for name in used} <= schemas.keys()


def test_models_are_listed_and_others_are_not_found(client):
    assert [each.id for each in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here, only 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=about(random_image()))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none/other")


def test_the_transcript_of_speech_is_before_the_instruction(model, processor, engine):
    recordings = []

    def transcribe(data):
        recordings.append(data)
        if data == b"noise":
            raise ValueError("no speech in the recording")
        return "is it red"

    def ask(data, *more):
        sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
        content = [*about(random_image())[0]["content"][:1], sound, *more]
        return client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8
        )

    with (
        serving(engine, transcribe=transcribe) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        found = ask(b"sound", {"type": "text", "text": "a star?"}).choices[0].message.content
        assert found == greedy(model, processor, random_image(), "a star?", transcript="is it red") and recordings == [
            b"sound"
        ]
        spoken = ask(b"sound").choices[0].message.content
        assert spoken == greedy(model, processor, random_image(), SPOKEN_INSTRUCTION, transcript="is it red")
        with pytest.raises(openai.BadRequestError, match="no speech"):
            ask(b"noise")


# ---------------------------------------------------------------------- what is refused


def get(address, path):
    return httpx.get(address + path, timeout=120)


def post(address, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{address}/v1/chat/completions", content=content, headers=headers, timeout=120, **options)


def request(**changes):
    return {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "a star?"}]} | changes


def user(*parts):
    return request(messages=[{"role": "user", "content": list(parts)}])


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


BAD = [
    (request(temperature=3), "temperature"),
    (request(temperature="0.5"), "temperature"),
    (request(top_p=0), "top_p"),
    (request(max_tokens=0), "max_tokens"),
    (request(max_tokens=1.5), "max_tokens: "),
    (request(max_completion_tokens=0), "max_tokens: must be at least 1"),
    (request(messages=[{"role": "user", "content": "a " * 260}]), "do not fit the context"),
    (request(n=9), "n: "),
    (request(top_logprobs=2), "top_logprobs: requires logprobs"),
    (request(logprobs=True, top_logprobs=21), "top_logprobs: "),
    (request(tools=[{"type": "function"}]), "tools: not supported"),
    (request(messages=[{"role": "tool", "content": "x"}]), "messages[0].role: "),
    (request(messages=[{"role": "user", "content": "x", "audio": {"id": "a"}}]), "messages[0].audio: not supported"),
    (request(messages=[{"role": "user"}]), "messages[0].content: required"),
    (request(stop=["a"] * 5), "at most 4"),
    (request(stop=""), "1 to 256 characters"),
    (request(seed=2**70), "seed"),
    (request(messages=[]), "the last message must be a user's"),
    (request(messages=[{"role": "assistant", "content": "yes"}]), "the last message must be a user's"),
    (request(messages=[{"role": "robot", "content": "yes"}]), "messages[0].role"),
    (request(messages=[{"role": "user", "content": None}]), "messages[0].content: required"),
    (request(messages=[{"role": "system", "content": [image("data:,")]}, *request()["messages"]]), "only a user's"),
    (request(messages=[{"role": "user", "content": []}]), "messages[0].content: required"),
    (request(messages=[{"role": "user", "content": "a" * 4097}]), "4,097 characters of text: at most 4,096 here"),
    (request(messages=[{"role": "user", "content": "hi"}] * 65), "more than 64 messages"),
    (request(messages=[{"role": "user", "content": "an <image>"}]), "contains <image>"),
    (request(messages=[{"role": "user", "content": "\ud800"}]), "escape"),
    (user({"type": "video_url", "video_url": {"url": "x"}}), "messages[0].content[0].type: must be one of text"),
    (user({"type": "text"}), "messages[0].content[0].text: required"),
    (user({"text": "x"}), "messages[0].content[0].type: must be one of text"),
    (user({"type": "image_url", "image_url": "data:"}), "messages[0].content[0].image_url.url: must be a data: URI"),
    (user({"type": "text", "text": "x"}, image(5)), "messages[0].content[1].image_url.url: "),
    (user(image("data:image/png;base64,AA")), "messages[0].content[0].image_url.url: "),
    (user(image("http://169.254.169.254/latest/meta-data")), "nothing is fetched from elsewhere"),
    (user(image("file:///etc/passwd")), "nothing is fetched from elsewhere"),
    (user(image("/etc/passwd")), "nothing is fetched from elsewhere"),
    (user(image("data:text/html;base64,YQ==")), "not an image"),
    (user(image("data:image/png;base64,!!!")), "not base64"),
    (user(image("data:image/png;base64,")), "empty image file"),
    (user(image("data:image/png;base64,YWJjZGVmZ2g=")), "not an image"),
    (user(image(as_uri(random_image()).replace("IDAT", "")[:90] + "A" * 40)), "image"),
    (user(*[image(as_uri(random_image(0, (4, 4))))] * 9), "more than 8 images"),
    (user(image(as_uri(Image.new("RGB", (101, 100))))), "an image of 10,100 pixels: at most 10,000 here"),
    (b"", "not json"),
    (b"{", "json"),
    (b"[]", "object"),
    (b"\xff\xfe", "json"),
    (b"[" * 100_000, "not json"),
    (b"[" * 100_001, "at most 100,000 json values"),
    (b'{"model": "tiny", "messages": [], "temperature": NaN}', "temperature"),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_body_is_a_400_that_names_what_is_wrong(body, message, address):
    found = post(address, body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert message.lower() in error["message"].lower() and error["type"] == "invalid_request_error"


def test_a_recording_without_speech_recognition_names_the_option(address):
    sound = {"type": "input_audio", "input_audio": {"data": "YQ==", "format": "wav"}}
    found = post(address, user(sound))
    assert found.status_code == 501 and "--speech_model" in found.json()["error"]["message"]


def test_bodies_have_a_largest_size_with_and_without_a_length(address):
    long = request(messages=[{"role": "user", "content": "a" * 200_000}])
    assert post(address, long).status_code == 413
    data = json.dumps(long).encode()
    found = httpx.post(
        f"{address}/v1/chat/completions",
        content=(data[start : start + 50_000] for start in range(0, len(data), 50_000)),
        headers={"Content-Type": "application/json"},
        timeout=120,
    )
    assert found.status_code == 413 and "at most 200,000 bytes" in found.json()["error"]["message"]


def test_unknown_paths_and_methods_have_the_same_error_format(address):
    for path, method, status in (
        ("/v1/embeddings", "POST", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/docs", "GET", 404),
    ):
        found = httpx.request(method, address + path, timeout=120)
        assert found.status_code == status and found.json()["error"]["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [
    "model",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
    "user",
]


@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(
    changes=st.dictionaries(st.sampled_from(NAMES), json_values, max_size=3),
    content=json_values,
    place=st.integers(0, 2),
)
def test_any_json_is_answered_or_refused_but_never_a_fault(changes, content, place, address):
    body = request() | changes
    if place:
        body["messages"] = [{"role": "user", "content": content if place == 1 else [content]}]
    found = post(address, body)
    assert found.status_code in (200, 400, 404), found.text


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=60), cut=st.integers(0, 300), place=st.integers(0, 300), value=st.integers(0, 255))
def test_any_bytes_as_an_image_are_an_image_or_refused(data, cut, place, value, address):
    png = bytearray(base64.b64decode(as_uri(random_image(0, (4, 4))).partition(",")[2]))
    png[place % len(png)] = value
    for each in (data, bytes(png[: cut % len(png) + 1])):
        found = post(address, user(image("data:image/png;base64," + base64.b64encode(each).decode())))
        assert found.status_code in (200, 400), found.text


def test_a_key_is_asked_for_where_one_is_set(engine):
    with serving(engine, api_key="secret") as address:
        for key in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer sécret".encode()},
        ):
            found = post(address, request(), headers=key)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
            assert found.headers["www-authenticate"] == "Bearer"
        assert post(address, request(), headers={"Authorization": "Bearer secret"}).status_code == 200
        assert get(address, "/v1/models").status_code == 401
        assert get(address, "/health").status_code == get(address, "/metrics").status_code == 200


def talk(address, data, seconds=20):
    """What a server sends after these bytes, until it closes the connection."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_key_and_size_are_checked_before_the_body_is_read(engine):
    with serving(engine, api_key="secret", limits=ApiLimits(max_body=1000)) as address:
        # the body never comes
        assert talk(address, HEAD + b"Content-Length: 900\r\n\r\n").startswith(b"HTTP/1.1 401")
        large = HEAD + b"Authorization: Bearer secret\r\nContent-Length: 1001\r\n\r\n"
        assert talk(address, large).startswith(b"HTTP/1.1 413")
        waiting = HEAD + b"Authorization: Bearer secret\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\nnot json!"
        assert talk(address, waiting.replace(b"Expect", b"Connection: close\r\nExpect")).startswith(b"HTTP/1.1 100")


def test_head_gives_the_headers_of_get(address):
    for path, status in (
        ("health", b"200"),
        ("metrics", b"200"),
        ("v1/models", b"200"),
        ("v1/chat/completions", b"405"),
    ):
        found = talk(address, f"HEAD /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status) and b"\r\ncontent-length: " in head and not body


def test_slow_clients_and_too_many_connections_are_ended(engine):
    limits = ApiLimits(header_seconds=0.3, body_seconds=0.3, max_connections=3)
    with serving(engine, limits=limits) as address:
        assert talk(address, b"") == talk(address, b"POST /v1/chat") == b""
        first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert talk(address, HEAD + b"Content-Length: 900\r\n\r\n{").startswith(b"HTTP/1.1 408")
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(first)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
            connection.sendall(b"GET /hea")  # a later request
            while connection.recv(65536):
                pass
            assert time.monotonic() - began < 4, "ended by the time for keep-alive"
        idle = [socket.create_connection((host, int(port))) for _ in range(3)]
        try:
            assert talk(address, first).startswith(b"HTTP/1.1 503")
        finally:
            for connection in idle:
                connection.close()
        deadline = time.monotonic() + 20
        while get(address, "/health").status_code != 200:
            assert time.monotonic() < deadline


def test_large_bodies_have_a_budget_together(engine, monkeypatch):
    monkeypatch.setattr("clip_phi.serving.server.SMALL_BODY", 100)
    with serving(engine, limits=ApiLimits(max_bodies=1000)) as address:
        found = post(address, request(user="x" * 2000))
        assert found.status_code == 429 and found.headers["retry-after"] == "1"
        assert post(address, request()).status_code == 200


def test_without_a_key_the_host_header_is_checked_and_cors_is_off(engine, address):
    for host, is_local in (
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:80", True),
        ("model.localhost", True),
        ("testserver", True),
        ("192.168.1.7:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("localhost.evil.example", False),
    ):
        assert is_local_name(host) == is_local, host
    assert post(address, request(), headers={"Host": "evil.example"}).status_code == 403
    page = {"Origin": "http://localhost:5173", "Access-Control-Request-Method": "POST"}
    page["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    refused = httpx.options(f"{address}/v1/chat/completions", headers=page, timeout=120)
    assert refused.status_code == 405 and not any("access" in name for name in refused.headers)
    text = post(address, request(), headers={"Content-Type": "text/plain"})  # a browser sends this without asking
    assert text.status_code == 415
    with serving(engine, hosts=["evil.example"], origins=["http://localhost:5173"], api_key=None) as other:
        assert post(other, request(), headers={"Host": "evil.example"}).status_code == 200
        allowed = httpx.options(f"{other}/v1/chat/completions", headers=page, timeout=120)
        assert allowed.headers["access-control-allow-origin"] == page["Origin"]
        found = post(other, request(), headers={"Origin": page["Origin"]})
        assert found.headers["access-control-allow-origin"] == page["Origin"]
        assert "access-control-allow-origin" not in post(other, request(), headers={"Origin": "http://x"}).headers


# ---------------------------------------------------------------------- many, and going away


def test_a_full_queue_answers_429_with_a_time_to_come_back(model, processor):
    with Engine(model, processor, limits=Limits(max_batch=1, max_waiting=1)) as engine, serving(engine) as address:
        running = iter(engine.submit(as_prompt("a star?", None)[0], max_new_tokens=200))
        assert next(running)
        with engine._changed:  # the engine takes nobody in while we look
            engine.submit(as_prompt("a star?", None)[0], max_new_tokens=2)
            found = post(address, request())
        assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
        assert found.json()["error"]["type"] == "rate_limit_error"
        running.close()
        assert post(address, request()).status_code == 200
        assert 'clip_phi_http_responses_total{status="429"} 1' in get(address, "/metrics").text


def test_clients_that_disconnect_free_their_places(address, engine):
    idle(engine)
    cancelled = engine.counts["cancelled"]
    body = request(max_tokens=230)
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}, timeout=120) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.05)
    assert idle(engine)
    assert engine.counts["cancelled"] >= cancelled + 1  # the second may have been complete before it was looked for


def test_fifty_clients_at_once_each_get_their_own_answer(address, engine, model, processor):
    expected = [greedy(model, processor, random_image(number), max_new_tokens=6) for number in range(5)]
    found = {}

    def ask(number):
        body = request(messages=about(random_image(number % 5)), max_tokens=6)
        found[number] = post(address, body).json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: expected[number % 5] for number in range(50)} and idle(engine)


def test_an_answer_that_fails_is_a_500_and_the_next_one_is_answered(fresh_model, processor):
    with Engine(fresh_model, processor) as engine, serving(engine) as address:
        forward, engine.forward = engine.forward, None
        engine.forward = lambda **inputs: 1 / 0
        found = post(address, request())
        assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"
        streamed = post(address, request(stream=True))
        assert streamed.status_code == 200 and '"server_error"' in streamed.text and "[DONE]" not in streamed.text
        engine.forward = forward
        assert post(address, request()).status_code == 200
        assert get(address, "/health").json() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}
        engine.close()
        assert get(address, "/health").status_code == post(address, request()).status_code == 503


def test_metrics_are_prometheus_text_and_count(address, client):
    def metrics():
        lines = get(address, "/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = metrics()
    client.chat.completions.create(model="tiny", messages=about(random_image(77)), max_tokens=5)
    client.chat.completions.create(model="tiny", messages=about(random_image(77)), max_tokens=5)
    after = metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["clip_phi_tokens_total"] == 10 and grown['clip_phi_requests_total{finish="length"}'] == 2
    assert grown["clip_phi_images_total"] == 2 and grown["clip_phi_images_encoded_total"] == 1
    assert grown['clip_phi_http_responses_total{status="200"}'] == 3  # the first look at the metrics, too
    assert after['clip_phi_first_token_seconds{quantile="0.5"}'] > 0


def test_a_port_in_use_is_an_error(engine, address):
    with pytest.raises(
        OSError, match="cannot listen at 127.0.0.1, port .*: Address already in use; try another --port"
    ):
        serve(create_app(engine, "tiny"), "127.0.0.1", int(address.rpartition(":")[2]))
