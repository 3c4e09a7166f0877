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
from clip_phi.serving.api import ApiLimits, create_app, serve
from clip_phi.serving.engine import Engine, Limits, as_prompt


@contextmanager
def serving(engine, **options):
    """The address of an application over the engine."""
    server = uvicorn.Server(uvicorn.Config(create_app(engine, "tiny", **options), log_level="warning"))
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
    (request(max_tokens=5000), "max_tokens is at most 1024"),
    (request(max_tokens=1000), "do not fit the context"),
    (request(n=2), "n: "),
    (request(tools=[]), "tools: "),
    (request(stop=["a"] * 5), "at most 4"),
    (request(stop=""), "1 to 256 characters"),
    (request(seed=2**70), "seed"),
    (request(messages=[]), "the last message must be a user's"),
    (request(messages=[{"role": "assistant", "content": "yes"}]), "the last message must be a user's"),
    (request(messages=[{"role": "robot", "content": "yes"}]), "messages.0"),
    (request(messages=[{"role": "user", "content": None}]), "messages.0"),
    (request(messages=[{"role": "system", "content": [image("data:,")]}, *request()["messages"]]), "only a user's"),
    (request(messages=[{"role": "user", "content": []}]), "the conversation is empty"),
    (request(messages=[{"role": "user", "content": "hi"}] * 65), "more than 64 messages"),
    (request(messages=[{"role": "user", "content": "an <image>"}]), "contains <image>"),
    (request(messages=[{"role": "user", "content": "\ud800"}]), "half a character"),
    (user({"type": "video_url", "video_url": {"url": "x"}}), "messages.0"),
    (user(image("http://169.254.169.254/latest/meta-data")), "nothing is fetched from elsewhere"),
    (user(image("file:///etc/passwd")), "nothing is fetched from elsewhere"),
    (user(image("/etc/passwd")), "nothing is fetched from elsewhere"),
    (user(image("data:text/html;base64,YQ==")), "nothing is fetched from elsewhere"),
    (user(image("data:image/png;base64,!!!")), "not base64"),
    (user(image("data:image/png;base64,")), "empty image file"),
    (user(image("data:image/png;base64,YWJjZGVmZ2g=")), "not an image"),
    (user(image(as_uri(random_image()).replace("IDAT", "")[:90] + "A" * 40)), "image"),
    (user(*[image(as_uri(random_image(0, (4, 4))))] * 9), "more than 8 images"),
    (user(image(as_uri(Image.new("RGB", (101, 100))))), "101 x 100 is more than 10,000 pixels"),
    (b"", "required"),
    (b"{", "json"),
    (b"[]", "dict"),
    (b"\xff\xfe", "json"),
    (b"[" * 100_000, ""),
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
