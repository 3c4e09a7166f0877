"""The engine: its completions are those of generate one by one, whatever else is in the batch."""

import random
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from PIL import Image

from clip_phi.evaluation.generate import generate_texts
from clip_phi.serving.engine import Engine, EngineClosedError, Limits, QueueFullError, _choose, as_prompt
from clip_phi.serving.kv_cache import BatchCache, TensorCache
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor


@pytest.fixture
def make_engine(model, processor):
    """Engines of the shared tiny model, closed after the test."""
    engines = []

    def make(own=None, **limits):
        engines.append(Engine(own or model, processor, limits=Limits(**limits)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def random_image(seed):
    values = random.Random(seed)
    return Image.frombytes("RGB", (33 + seed % 5, 40), values.randbytes((33 + seed % 5) * 40 * 3))


def conversation(number):
    """(messages, images): of no, one or two images, one to three turns, short and long texts."""
    choose = random.Random(number)
    images, messages = [], []
    for turn in range(choose.choice((1, 1, 2, 3))):
        if turn:
            messages.append({"role": "assistant", "content": "yes a star"[: choose.randint(1, 10)]})
        content = [
            {"type": "text", "text": "a red circle and a blue square " * choose.randint(0, 2) + f"star {number}?"}
        ]
        if len(images) < 2 and choose.random() < 0.6:
            images.append(random_image(choose.randint(0, 3)))
            content.insert(choose.choice((0, 0, 1)), {"type": "image"})
        messages.append({"role": "user", "content": content})
    return messages, images


def one_by_one(model, processor, messages, images, max_new_tokens):
    """transformers' generate, of this request alone."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def expected(model, processor):
    found = {}

    def of(number, max_new_tokens):
        key = (number, max_new_tokens)
        if key not in found:
            found[key] = one_by_one(model, processor, *conversation(number), max_new_tokens)
        return found[key]

    return of


@pytest.mark.parametrize("seed", range(4))
def test_greedy_answers_are_those_of_generate_under_random_joins_and_leaves(seed, make_engine, expected):
    engine = make_engine(max_batch=5, prefill_tokens=200, image_bytes=(10**6, 4000)[seed % 2])
    choose = random.Random(seed)
    asked, given_up = [], []
    for _ in range(30):
        number, length = choose.randint(0, 24), choose.choice((1, 3, 9, 24))
        answer = engine.submit(*conversation(number), max_new_tokens=length)
        if choose.random() < 0.2:
            given_up.append(answer)
            threading.Timer(choose.random() / 20, answer.cancel).start()
        else:
            asked.append((answer, number, length))
        if choose.random() < 0.5:
            time.sleep(choose.random() / 50)
    for answer, number, length in asked:
        assert answer.result() == expected(number, length)
    assert {answer.finish_reason for answer in given_up for _ in answer} <= {None, "cancelled", "length", "stop"}
    assert engine.num_running == engine.num_waiting == 0
    assert (
        sum(engine.counts[reason] for reason in ("stop", "length", "cancelled")) == 30 and not engine.counts["failed"]
    )


def test_a_request_in_a_crowd_has_the_logits_it_has_alone(make_engine, monkeypatch):
    engine = make_engine()
    logits = {}

    def noted(found, requests):
        for request, of_request in zip(requests, found, strict=True):
            logits.setdefault(request.completion, []).append(of_request)
        return _choose(found, requests)

    monkeypatch.setattr("clip_phi.serving.engine._choose", noted)
    alone = engine.submit(*conversation(3), max_new_tokens=12)
    alone.result()
    crowd = [engine.submit(*conversation(number), max_new_tokens=20) for number in range(12)]
    together = engine.submit(*conversation(3), max_new_tokens=12)
    assert together.result() == alone.text
    for answer in crowd:
        answer.result()
    assert torch.allclose(torch.stack(logits[together]), torch.stack(logits[alone]), atol=1e-5)


def test_a_bare_caption_whose_prompt_is_the_image_alone_is_answered_from_the_cache(model, processor, make_engine):
    engine, image = make_engine(), random_image(1)
    expected = generate_texts(model, processor, [(as_prompt(None, image)[0], image)], 8)[0]
    assert ["".join(engine.caption(image, 8)).strip() for _ in range(4)] == [expected] * 4
    assert (engine.counts["images"], engine.counts["images_encoded"]) == (4, 1)


def test_an_image_goes_through_the_tower_once_and_is_processed_by_the_decoder_twice(make_engine, model, monkeypatch):
    engine, image, seen, read = make_engine(), random_image(2), [], []
    features, forward = model.get_image_features, engine.forward
    monkeypatch.setattr(
        model, "get_image_features", lambda pixels, **kw: seen.append(len(pixels)) or features(pixels, **kw)
    )
    engine.forward = lambda **inputs: read.append(inputs["position_ids"].shape[1]) or forward(**inputs)
    texts = [engine.submit(*as_prompt("a star?", image), max_new_tokens=1).result() for _ in range(4)]
    assert seen == [1] and len(set(texts)) == 1
    assert read[0] == read[1] and read[2] == read[3] == read[0] - engine.processor.num_image_tokens


def test_equal_images_that_come_together_go_through_the_tower_once(make_engine, model, monkeypatch):
    engine, seen = make_engine(), []
    features = model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda pixels, **kw: seen.append(len(pixels)) or features(pixels, **kw)
    )
    with engine._changed:  # nothing joins before all are there
        answers = [engine.submit(*as_prompt("a star?", random_image(2)), max_new_tokens=2) for _ in range(5)]
    assert len({answer.result() for answer in answers}) == 1 and sum(seen) == 1


def test_sampling_repeats_with_its_seed_whatever_else_is_in_the_batch(make_engine):
    engine = make_engine()
    options = {"max_new_tokens": 16, "temperature": 1.5, "top_p": 0.9}
    alone = engine.submit(*conversation(0), seed=7, **options).result()
    crowd = [engine.submit(*conversation(number), seed=number, **options) for number in range(20, 30)]
    again = engine.submit(*conversation(0), seed=7, **options)
    other = engine.submit(*conversation(0), seed=8, **options)
    assert again.result() == alone != other.result()
    for answer in crowd:
        answer.result()
    free = {engine.submit(*conversation(0), **options).result() for _ in range(5)}
    assert len(free) > 1  # without a seed, each is its own


class Asked:
    def __init__(self, temperature, top_p, seed=0):
        self.temperature, self.top_p, self.uniform = temperature, top_p, random.Random(seed)


def test_tokens_are_drawn_as_often_as_they_are_likely_and_only_from_the_nucleus():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    asked = Asked(0.5, 1.0)
    drawn = torch.tensor([_choose(logits, [asked])[0] for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 0.5).softmax(-1), atol=0.03)
    narrow = Asked(1.0, 0.7)  # 0.64 + 0.24 is the first to reach it
    assert {_choose(logits, [narrow])[0] for _ in range(300)} == {0, 1}
    assert {_choose(logits, [Asked(1.0, 1e-9, seed)])[0] for seed in range(20)} == {0}
    assert _choose(torch.tensor([[0.0, torch.nan], [1.0, 0.0]]), [asked, Asked(0, 1)]) == [None, 0]


def test_sampling_options_at_the_edge_of_float32_are_greedy_and_change_no_other_answer(make_engine, expected):
    engine = make_engine()
    with engine._changed:  # one batch
        edges = [
            engine.submit(*conversation(1), max_new_tokens=9, **options)
            for options in ({"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-300}, {"temperature": 2e-5})
        ]
        others = [engine.submit(*conversation(number), max_new_tokens=9) for number in (2, 3)]
    assert [answer.result() for answer in others] == [expected(2, 9), expected(3, 9)]
    assert [answer.result() for answer in edges] == [expected(1, 9)] * 3
    wrong = [("temperature", float("nan")), ("temperature", -1.0), ("top_p", 0.0), ("top_p", float("nan"))]
    for options in ({name: value} for name, value in [*wrong, ("max_new_tokens", 0)]):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            engine.submit(*conversation(1), **options)


def test_a_row_that_cannot_be_sampled_fails_alone(make_engine, expected, monkeypatch):
    engine = make_engine()

    def failing(logits, requests):
        if any(request.temperature for request in requests):
            raise RuntimeError("no memory to sort in")
        return _choose(logits, requests)

    monkeypatch.setattr("clip_phi.serving.engine._choose", failing)
    with engine._changed:
        good = [engine.submit(*conversation(number), max_new_tokens=9) for number in (2, 3)]
        bad = engine.submit(*conversation(1), temperature=1.0)
    assert [answer.result() for answer in good] == [expected(2, 9), expected(3, 9)]
    with pytest.raises(RuntimeError, match="no memory to sort in"):
        bad.result()


def test_log_probabilities_are_those_of_a_plain_forward_pass(make_engine, model, processor):
    engine = make_engine()
    messages, images = conversation(5)
    with engine._changed:
        others = [engine.submit(*conversation(number), max_new_tokens=12) for number in (1, 2, 3)]
        answer = engine.submit(messages, images, max_new_tokens=12, top_logprobs=3, temperature=1.0, seed=3)
    answer.result()
    assert others[0].result() and not others[0].logprobs
    tokens = [each.token for each in answer.logprobs]
    assert len(tokens) == answer.num_tokens == 12
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        plain = model(input_ids=inputs["input_ids"], pixel_values=inputs.get("pixel_values")).logits
    for found, logits in zip(answer.logprobs, plain[0, length - 1 : -1], strict=True):
        logprobs = logits.log_softmax(-1)
        assert abs(found.logprob - float(logprobs[found.token])) < 1e-4
        assert [token for token, _ in found.top] == logprobs.topk(3).indices.tolist()
        assert torch.allclose(torch.tensor([value for _, value in found.top]), logprobs.topk(3).values, atol=1e-4)


def test_several_completions_share_one_prompt(make_engine):
    engine = make_engine(max_batch=4)
    options = {"max_new_tokens": 9, "temperature": 1.3}
    alone = [engine.submit(*conversation(5), seed=7 + number, **options).result() for number in range(3)]
    before = engine.counts.copy()
    with engine._changed:
        other = engine.submit(*conversation(1), max_new_tokens=9)  # all of one batch, and one more than it holds
        together = engine.submit_many(*conversation(5), [None] * 3, seed=7, **options)
        last = engine.submit_many(*conversation(5), [None] * 2, **options)
    assert [answer.result() for answer in together] == alone and len(set(alone)) > 1
    assert other.result() and all(answer.result() for answer in last)
    prompts = other.num_prompt_tokens + 2 * together[0].num_prompt_tokens
    assert engine.counts["prompt_tokens"] - before["prompt_tokens"] == prompts
    cancelled = engine.submit_many(*conversation(5), [None] * 3, **options)
    cancelled[0].cancel()
    assert cancelled[1].result() and cancelled[2].result()
    with pytest.raises(ValueError, match="5 completions at once: the engine has room for 4"):
        engine.submit_many(*conversation(5), [None] * 5)


def test_a_long_text_is_refused_before_it_is_tokenised_and_without_a_lock(make_engine):
    engine = make_engine()
    with engine._encoding, pytest.raises(ValueError, match="30,000,003 characters of text: at most 4,096 here"):
        engine.submit([*conversation(1)[0], *as_prompt("a" * 30_000_000, None)[0]][-1:] + as_prompt("abc", None)[0])


def test_decoding_images_and_waiting_requests_have_a_budget_of_memory(model, processor, monkeypatch, tmp_path):
    random_image(1).save(tmp_path / "image.png")
    size = 34 * 40 * 16
    pixels = 3 * 32 * 32 * 4
    limits = Limits(max_batch=1, decoding_bytes=2 * size, waiting_bytes=2 * pixels)
    now, most = [], []

    def slow(source):
        now.append(source)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return random_image(1)

    with Engine(model, processor, limits=limits) as engine:
        monkeypatch.setattr("clip_phi.serving.engine.load_image", slow)
        threads = [threading.Thread(target=engine.read_image, args=(tmp_path / "image.png",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(most) == 2 and len(most) == 8 and engine._free_bytes == 2 * size
        monkeypatch.undo()
        with pytest.raises(ValueError, match="an image of 1,360 pixels: at most 1,000 here"):
            engine.read_image(tmp_path / "image.png", max_pixels=1000)
        with engine._changed:
            prepared = engine.read_image(tmp_path / "image.png")
            assert prepared.pixel_values.nbytes == pixels
            asked = [engine.submit(*as_prompt("a star?", random_image(number)), max_new_tokens=2) for number in (1, 2)]
            with pytest.raises(QueueFullError):
                engine.submit(*as_prompt("a star?", random_image(3)))
            asked.append(engine.submit(*as_prompt("a star?", None), max_new_tokens=2))
        assert all(answer.result() for answer in asked)


def test_stop_strings_and_lengths_end_an_answer_and_give_its_finish_reason(make_engine):
    engine = make_engine()
    whole = engine.submit(*conversation(1), max_new_tokens=24)
    text = whole.result()
    assert whole.finish_reason == "length" and whole.num_tokens == 24
    stop = text[5:8]
    began = time.monotonic()
    short = engine.submit(*conversation(1), max_new_tokens=24, stop=["never there", stop])
    assert short.result() == text[: text.find(stop)].rstrip()
    assert short.finish_reason == "stop" and short.num_tokens < 24
    assert 0 < short.first_token_seconds < time.monotonic() - began and whole.tokens_per_second > 0
    assert short.num_prompt_tokens == whole.num_prompt_tokens > 4


def test_the_end_token_ends_an_answer_and_is_counted(make_engine, fresh_model):
    with torch.no_grad():
        fresh_model.lm_head.bias[fresh_model.generation_config.eos_token_id] = 1e4
    answer = make_engine(fresh_model).submit(*conversation(1), max_new_tokens=24)
    assert (answer.result(), answer.finish_reason, answer.num_tokens) == ("", "stop", 1)


def test_a_cancelled_request_frees_its_place_for_the_next(make_engine):
    engine = make_engine(max_batch=1)
    slow = iter(engine.submit(*conversation(0), max_new_tokens=150))
    assert next(slow)
    queued, waiting = (engine.submit(*conversation(number), max_new_tokens=100) for number in (1, 2))
    waiting.cancel()  # while it is in the queue
    slow.close()
    reader = iter(queued)
    assert next(reader)
    reader.close()  # as an iterator that nobody reads on is
    assert engine.submit(*conversation(4), max_new_tokens=2).result()
    assert waiting.result() == "" and waiting.finish_reason == queued.finish_reason == "cancelled"
    assert engine.counts["tokens"] < 250


def test_a_full_queue_is_an_error_with_the_time_to_retry_after(make_engine, expected):
    engine = make_engine(max_batch=1, max_waiting=2)
    reader = iter(engine.submit(*conversation(0), max_new_tokens=100))
    assert next(reader)
    answers = [engine.submit(*conversation(number), max_new_tokens=3) for number in (1, 2)]
    with engine._changed, pytest.raises(QueueFullError, match="2 requests are in the queue already") as busy:
        while True:
            answers.append(engine.submit(*conversation(1), max_new_tokens=3))
    assert busy.value.retry_after >= 1
    assert answers[0].result() == expected(1, 3) and answers[1].result() == expected(2, 3)


def test_closing_fails_unfinished_requests_and_refuses_new_ones(model, processor):
    engine = Engine(model, processor, limits=Limits(max_batch=1))
    running, waiting = (engine.submit(*conversation(0), max_new_tokens=150) for _ in range(2))
    reader = iter(running)
    assert next(reader)
    engine.close()
    for pieces in (reader, waiting):
        with pytest.raises(EngineClosedError):
            list(pieces)
    with pytest.raises(EngineClosedError):
        engine.submit(*conversation(0))
    assert not engine.alive and not engine._thread.is_alive()


def test_a_request_that_fails_takes_no_other_with_it(make_engine, expected):
    engine = make_engine()
    forward = engine.forward
    bad = engine._encode(*[conversation(7)[0], len(conversation(7)[1])])

    def failing(**inputs):
        if "inputs_embeds" in inputs and (
            inputs["position_ids"].max() == len(bad) - 1 or len(inputs["inputs_embeds"]) > 1
        ):
            raise RuntimeError("out of memory")
        return forward(**inputs)

    engine.forward = failing
    with engine._changed:
        good = [(engine.submit(*conversation(number), max_new_tokens=5), number) for number in (1, 2, 3)]
        poisoned = engine.submit(*conversation(7), max_new_tokens=5)
    lengths = [answer.num_prompt_tokens for answer, _ in good]
    assert len(bad) not in lengths
    for answer, number in good:
        assert answer.result() == expected(number, 5)
    with pytest.raises(RuntimeError, match="out of memory"):
        poisoned.result()
    assert engine.counts["failed"] == 1


def test_a_reader_that_fails_and_a_step_that_fails_leave_the_engine_working(make_engine, expected):
    engine, ended = make_engine(), SimpleQueue()

    def broken(piece):
        ended.put(piece)
        raise RuntimeError("the connection is gone")

    engine.submit(*conversation(1), max_new_tokens=9, callback=broken)
    good = engine.submit(*conversation(2), max_new_tokens=9)
    assert good.result() == expected(2, 9) and ended.get() is not None
    forward, engine.forward = engine.forward, None
    engine.forward = lambda **inputs: forward(**inputs) if "inputs_embeds" in inputs else 1 / 0
    failed = [engine.submit(*conversation(number), max_new_tokens=9) for number in (1, 2)]
    for answer in failed:
        with pytest.raises(ZeroDivisionError):
            answer.result()
    engine.forward = forward
    assert engine.submit(*conversation(3), max_new_tokens=9).result() == expected(3, 9)


def test_logits_that_are_not_finite_are_an_error_of_that_request(make_engine, fresh_model):
    engine = make_engine(fresh_model)
    with torch.no_grad():
        fresh_model.lm_head.bias[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        engine.submit(*conversation(1), max_new_tokens=3).result()


def test_keys_and_values_stay_within_their_bytes(make_engine, expected):
    needed = 60 + 24
    engine = make_engine(cache_bytes=3 * needed * 2 * 2 * 32 * 4)
    most = []
    forward = engine.forward
    engine.forward = lambda **inputs: most.append(len(inputs["position_ids"])) or forward(**inputs)
    answers = [(engine.submit(*conversation(number), max_new_tokens=9), number) for number in range(8)]
    for answer, number in answers:
        assert answer.result() == expected(number, 9)
    held = sum(states.nbytes for layer in engine._cache.layers for states in layer.states)
    assert 1 < max(most) < 8 and held <= engine.cache_bytes * 2  # storage grows in rounded steps
    with pytest.raises(ValueError, match="more than the .* bytes that the engine has for keys and values"):
        make_engine(cache_bytes=1000).submit(*conversation(1), max_new_tokens=9)


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([{"role": "user", "content": "an <image>?"}], 0, "contains <image>"),
        ([{"role": "user", "content": "end<|endoftext|>"}], 0, "contains <|endoftext|>"),
        ([{"role": "user", "content": [{"type": "image"}]}], 0, "0 images, but 1 places"),
        ([{"role": "user", "content": "a star?"}], 1, "1 images, but 0 places"),
        ([{"role": "robot", "content": "a star?"}], 0, "role 'robot'"),
        ([{"role": "user", "content": "star " * 400}], 0, "do not fit the context"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_submission(messages, images, message, make_engine):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        make_engine().submit(messages, [random_image(0)] * images, max_new_tokens=5)


def test_many_threads_may_ask_at_once(make_engine, expected):
    engine, found = make_engine(max_batch=6), {}

    def ask(number):
        found[number] = engine.submit(*conversation(number), max_new_tokens=9).result()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: expected(number, 9) for number in range(16)}


def test_a_loaded_checkpoint_with_lora_answers_as_it_does_with_lora_folded_in(fresh_model, processor, tmp_path):
    from peft import LoraConfig

    fresh_model.add_adapter(LoraConfig(r=4, target_modules=r"model\.language_model\..*\.(q_proj|fc1)"))
    for name, parameter in fresh_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    fresh_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with Engine.from_pretrained(str(tmp_path), "cpu") as engine:
        assert not any("lora" in name for name, _ in engine.model.named_modules())
        loaded = ClipPhiForCausalLM.from_pretrained(tmp_path)
        assert any("lora" in name for name, _ in loaded.named_modules())
        found = engine.submit(*conversation(5), max_new_tokens=16).result()
        assert found == one_by_one(loaded, processor, *conversation(5), 16)


def test_four_bits_are_held_by_bitsandbytes(tmp_path):
    """Of the demo's decoder: bitsandbytes' kernels for a CPU want a width of at least 64."""
    backbones = [
        str(Path(__file__).parent.parent / "examples" / "demo_backbones" / part) for part in ("vision", "text")
    ]
    ClipPhiForCausalLM.from_backbones(*backbones).save_pretrained(tmp_path)
    ClipPhiProcessor.from_backbones(*backbones).save_pretrained(tmp_path)
    with Engine.from_pretrained(str(tmp_path), "cpu", "nf4") as engine:
        kinds = {type(module).__name__ for module in engine.model.model.language_model.modules()}
        assert "Linear4bit" in kinds
        assert engine.submit(*conversation(1), max_new_tokens=4).result() is not None
    with pytest.raises(ValueError, match="unknown quantization 'int3'"):
        Engine.from_pretrained(str(tmp_path), "cpu", "int3")


def test_sequences_move_grow_and_are_copied_without_touching_each_other():
    cache = BatchCache([(1, 4, 4)] * 2, torch.float32, torch.device("cpu"), max_bytes=10**6)
    states = torch.arange(2 * 1 * 3 * 4, dtype=torch.float32).reshape(2, 1, 3, 4)  # sequences, heads, tokens, width
    cache.reserve(2, 3)
    mask = cache.at(0, torch.tensor([[0, 1, 2], [0, 1, 2]]), 3)
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [True, True, True]]]] * 2
    for layer in range(2):
        keys, values = cache.update(states + layer, -states, layer)
        assert torch.equal(keys, states + layer) and torch.equal(values, -states)
    cache.reserve(3, 200)
    cache.at(2, torch.tensor([[0]]), 1)
    cache.update(states[:1, :, :1], states[:1, :, :1], 0)
    cache.update(states[:1, :, :1], states[:1, :, :1], 1)
    assert torch.equal(cache.layers[0].states[0][:2, :3].transpose(1, 2), states)
    prefix = cache.read(1, 2)
    assert prefix.shape == (2, 2 * 2 * 4)
    cache.move(1, 0, 3)
    cache.write(2, prefix)
    assert torch.equal(cache.read(0, 3), cache.read(1, 3)) and torch.equal(cache.read(2, 2), prefix)


def test_the_cache_shrinks_to_what_is_needed_before_it_exceeds_its_bytes():
    # 8 x 64 tokens of 28 bytes
    cache = BatchCache([(1, 4, 3)], torch.float32, torch.device("cpu"), max_bytes=8 * 64 * 28)
    cache.reserve(6, 10)
    cache.write(0, torch.ones(10, 7))
    cache.reserve(8, 10)
    assert [each.shape for each in cache.layers[0].states] == [(8, 64, 1, 4), (8, 64, 1, 3)]
    cache.reserve(2, 200)  # eight sequences of 200 tokens would be too much
    assert [each.shape for each in cache.layers[0].states] == [(2, 256, 1, 4), (2, 256, 1, 3)]
    assert cache.read(0, 10).eq(1).all() and cache.read(0, 11)[10:].eq(0).all()


def test_the_least_recently_used_tensors_are_dropped_beyond_the_bytes():
    cache = TensorCache(max_bytes=100)
    for name in "abc":
        cache.put(name, torch.zeros(10))  # 40 bytes
        assert cache.get("a" if name != "c" else "c") is not None
    assert cache.get("b") is None and cache.get("a") is not None and cache.num_bytes == 80
    cache.put("huge", torch.zeros(1000))
    assert cache.get("huge") is None and cache.num_bytes == 80
