"""The task pointing: do the maps of an answer point at the object that the question is about?

The pointing game (arXiv 1608.00507): a map hits if the centre of its highest patch is in the object's box, or at most a
quarter of a patch away. Insertion and deletion (RISE, arXiv 1806.07421): the area under the answer's probability while
patches are put back into the image, or left out of it, the highest first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batching.images import load_image
from ..data.sample import images_of, user_message
from ..data.synthetic import ask_about_boxes
from .answer_metrics import exact_match
from .answers import ALONE, Decoding, Processes
from .bootstrap import by_group, margin_interval
from .chair import find_objects
from .evaluate import EvalResult, derange, shared_result
from .explain import DEFAULT_METHOD, METHODS, Box, Target, crop_box
from .generate import generate_answers
from .tasks import QUESTION, EvalSet, tables

STEPS = 8  # of insertion and deletion
METRICS = ("hit_rate", "insertion", "deletion")
MAPS = (*METHODS, "random", "centre", "shuffled")
SHOWN = {"score": DEFAULT_METHOD, "blind": "centre", "shuffled": "shuffled"}


def is_hit(heat: np.ndarray, crop: Box, boxes: Sequence[Box]) -> bool:
    """heat: float (rows, columns). crop: where the map lies. boxes: of the objects, COCO's: with width and height."""
    highest = np.array(np.unravel_index(heat.argmax(), heat.shape))[::-1]
    start, side = np.array(crop[:2]), np.subtract(crop[2:], crop[:2]) / heat.shape[::-1]
    low, high = start + (highest + 0.25) * side, start + (highest + 0.75) * side  # a quarter from the patch's centre
    return any((high >= box[:2]).all() and (low <= np.add(box[:2], box[2:])).all() for box in boxes)


def insertion_and_deletion(target: Target, heats: np.ndarray) -> np.ndarray:
    """Both areas for each map, in 0 to 1: float64 (maps, 2). heats: float (maps, rows, columns)."""
    ranks = (-heats.reshape(len(heats), -1)).argsort(1, kind="stable").argsort(1).reshape(heats.shape)
    counts = np.linspace(0, ranks[0].size, STEPS + 1).round()
    first = ranks[:, None] < counts[:, None, None]  # (maps, steps, rows, columns)
    likely = target.score_without(0, torch.from_numpy(np.stack([~first, first], axis=1)).flatten(0, 2)).sum(1).exp()
    return np.asarray(np.trapezoid(likely.double().cpu().reshape(len(heats), 2, -1), counts / counts[-1]))


def evaluate_pointing(
    model: Any, processor: Any, eval_set: EvalSet, decoding: Decoding, file: Path | None,
    processes: Processes = ALONE,
) -> EvalResult:  # fmt: skip
    """Score the maps of the model's own answers (of the reference, if an answer is empty). All processes call it.

    The controls: blind is the map that is highest in the centre; shuffled is the map of the same answer for another
    image. "methods" in the result has all maps, for the questions about one object that are answered right.

    model: a ClipPhiForCausalLM in eval mode. eval_set: an item for each image, which questions replace. file: COCO's
    instances of the images. Raises ValueError if it lacks an image, or no object can be asked about."""
    pairs = zip(eval_set.items, find_objects(eval_set, file), strict=True)
    asked = [(item, *each) for item, objects in pairs for each in ask_about_boxes(objects)]
    eval_set.items = [item._replace(question=text, references=(answer,)) for item, text, answer, _ in asked]
    if not asked or (decoding.prompt and QUESTION not in decoding.prompt):
        problem = f"{file}: no image has an object whose category is there once"
        raise ValueError(f"--prompt {decoding.prompt!r} must contain {QUESTION}" if asked else problem)
    partners, found = derange(eval_set.digests, decoding.seed), list[Any]()
    for number in processes.progress(range(processes.rank, len(asked), processes.world_size)):
        (item, text, reference, boxes), rng = asked[number], np.random.default_rng([decoding.seed, number])
        image, other = (load_image(images_of(eval_set.images[each])[0]) for each in (item.image, partners[item.image]))
        prompt = [user_message((decoding.prompt or QUESTION).replace(QUESTION, text), 1)], image
        (answer,) = generate_answers(model, processor, [prompt], decoding.max_new_tokens, decoding.num_beams)
        said = answer.text or reference
        target, shuffled = (Target(model, processor, prompt[0], [each], said) for each in (image, other))
        far = np.linalg.norm(np.indices(target.grid).T - (np.array(target.grid) - 1) / 2, axis=-1).T
        heats = [target.maps(method).sum(0)[0] for method in METHODS]
        heats += [rng.random(target.grid), rng.random(target.grid) * 1e-3 - far]  # ties are broken at random
        heats += [shuffled.maps(DEFAULT_METHOD).sum(0)[0]]
        crop = crop_box(processor.image_processor, image.size)
        hits = [float(is_hit(heat, crop, boxes)) for heat in heats]
        each = np.eye(far.size).reshape(-1, *target.grid)  # whose mean is the expected hit rate of a random map
        hits[MAPS.index("random")] = float(np.mean([is_hit(heat, crop, boxes) for heat in each]))
        areas = insertion_and_deletion(target, np.stack(heats))
        found.append((number, answer.text, np.column_stack([hits, areas]).tolist()))
    _, answers, rows = zip(*sorted(processes.gather(found)), strict=True)
    scores, digests = np.array(rows), np.array([eval_set.digests[item.image] for item, *_ in asked])
    shown = scores[:, [MAPS.index(name) for name in SHOWN.values()]]  # (items, 3, metrics)
    means = [dict(zip(SHOWN, values, strict=True)) for values in shown.mean(0).T.tolist()]
    result = shared_result(eval_set, means[0], *by_group(shown[..., 0], digests), decoding.seed)
    right = exact_match(answers, [item.references for item in eval_set.items]) > 0
    chosen = right & [len(boxes) == 1 for *_, boxes in asked]
    methods = {}
    for name, its in zip(MAPS, scores[chosen].swapaxes(0, 1), strict=True) if chosen.any() else ():
        interval = margin_interval(*by_group(its[:, :1] * [1, 0], digests[chosen]), decoding.seed)
        methods[name] = dict(zip(METRICS, its.mean(0).tolist(), strict=True)) | {"hit_rate_ci95": interval}
    result |= {"metrics": dict(zip(METRICS, means, strict=True)), "methods": methods, "method": DEFAULT_METHOD}
    result |= {"answered_right": float(right.mean()), "one_object_answered_right": int(chosen.sum())}
    result |= {"tables": tables(eval_set, answers, shown[:, 0, 0]), "decoding": decoding.about()}
    samples = []
    for (item, text, reference, boxes), answer, row in zip(asked, answers, rows, strict=True):
        maps = dict(zip(MAPS, row, strict=True))
        sample = {"question": text, "references": [reference], "answer": answer, "boxes": boxes, "maps": maps}
        sample |= {key: maps[name][0] for key, name in SHOWN.items()}
        samples.append(eval_set.describe_image(item.image) | sample)
    return EvalResult(result | {"prompt": decoding.prompt or QUESTION}, samples)
