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
from ..data.coco import read_instances
from ..data.sample import images_of, user_message
from ..data.synthetic import ask_about_boxes
from .answer_metrics import exact_match
from .answers import Decoding, Processes
from .bootstrap import by_group, margin_interval
from .evaluate import EvalResult, derange, shared_result
from .explain import DEFAULT_METHOD, METHODS, Box, Target, crop_box
from .generate import generate_answers
from .tasks import QUESTION, EvalSet, question_kind, tables

STEPS = 8  # of insertion and deletion
METRICS = ("hit_rate", "insertion", "deletion")
MAPS = (*METHODS, "random", "centre", "shuffled")
SHOWN = {"score": DEFAULT_METHOD, "blind": "centre", "shuffled": "shuffled"}


def ask_about_instances(eval_set: EvalSet, file: Path | None) -> list[list[Box]]:
    """Replace the items, one for each image, by questions about its objects. Returns the boxes of each question.

    file: COCO's instances of the images. Raises ValueError if it lacks an image, or if nothing can be asked."""
    objects, items, boxes = read_instances(file)[1] if file else {}, [], list[list[Box]]()
    for item in eval_set.items:
        name = eval_set.describe_image(item.image)["image"]
        if (found := objects.get(item.id[1], objects.get(name))) is None:
            raise ValueError(f"{file or 'pointing'}: no objects of {name}; --objects FILE names the instances file")
        for question, answer, around in ask_about_boxes(found):
            items.append(item._replace(question=question, references=(answer,)))
            boxes.append([(x, y, x + width, y + height) for x, y, width, height in around])
    eval_set.items = items
    if not items:
        raise ValueError(f"{file}: no image has an object whose category is there once")
    return boxes


def is_hit(heat: np.ndarray, crop: Box, boxes: Sequence[Box]) -> bool:
    """heat: float (rows, columns). crop: where the map lies. boxes: of the objects, in pixels as well."""
    highest = np.array(np.unravel_index(heat.argmax(), heat.shape))[::-1]
    start, side = np.array(crop[:2]), np.subtract(crop[2:], crop[:2]) / heat.shape[::-1]
    near = start + (highest + 0.25) * side, start + (highest + 0.75) * side  # a quarter from the patch's centre
    return any((near[1] >= box[:2]).all() and (near[0] <= box[2:]).all() for box in boxes)


def insertion_and_deletion(target: Target, heats: np.ndarray) -> np.ndarray:
    """Both areas for each map, in 0 to 1: float64 (maps, 2). heats: float (maps, rows, columns)."""
    ranks = (-heats.reshape(len(heats), -1)).argsort(1, kind="stable").argsort(1).reshape(heats.shape)
    counts = np.linspace(0, ranks[0].size, STEPS + 1).round()
    first = ranks[:, None] < counts[:, None, None]  # (maps, steps, rows, columns)
    likely = target.score_without(0, torch.from_numpy(np.stack([~first, first], axis=1)).flatten(0, 2)).sum(1).exp()
    areas = np.trapezoid(likely.double().cpu().numpy().reshape(len(heats), 2, -1), counts / counts[-1])
    return np.asarray(areas)


def evaluate_pointing(
    model: Any, processor: Any, eval_set: EvalSet, decoding: Decoding, file: Path | None,
    processes: Processes | None = None,
) -> EvalResult:  # fmt: skip
    """Score the maps of the model's own answers (of the reference, if an answer is empty). All processes call it.

    The controls: blind is the map that is highest in the centre; shuffled is the map of the same answer for another
    image. "methods" in the result has all maps, for the questions about one object that are answered right.

    model: a ClipPhiForCausalLM in eval mode. eval_set, file: as of ask_about_instances."""
    processes, boxes = processes or Processes(), ask_about_instances(eval_set, file)
    partners, found = derange(eval_set.digests, decoding.seed), []
    for number in processes.progress(range(processes.rank, len(boxes), processes.world_size)):
        item, rng = eval_set.items[number], np.random.default_rng([decoding.seed, number])
        image, other = (load_image(images_of(eval_set.images[each])[0]) for each in (item.image, partners[item.image]))
        messages = [user_message((decoding.prompt or QUESTION).replace(QUESTION, str(item.question)), 1)]
        prompts = [(messages, image)]
        (answer,) = generate_answers(model, processor, prompts, decoding.max_new_tokens, decoding.num_beams)
        said = answer.text or item.references[0]
        target, shuffled = (Target(model, processor, messages, [each], said) for each in (image, other))
        far = np.linalg.norm(np.indices(target.grid).T - (np.array(target.grid) - 1) / 2, axis=-1).T
        heats = [target.maps(method).sum(0)[0] for method in METHODS]
        heats += [rng.random(target.grid), rng.random(target.grid) * 1e-3 - far]  # ties are broken at random
        heats += [shuffled.maps(DEFAULT_METHOD).sum(0)[0]]
        crop = crop_box(processor.image_processor, image.size)
        hits = [float(is_hit(heat, crop, boxes[number])) for heat in heats]
        areas = insertion_and_deletion(target, np.stack(heats))
        found.append((number, answer.text, np.column_stack([hits, areas]).tolist()))
    _, answers, rows = zip(*sorted(processes.gather(found)), strict=True)
    scores, digests = np.array(rows), [eval_set.digests[item.image] for item in eval_set.items]
    shown = scores[:, [MAPS.index(name) for name in SHOWN.values()]]  # (items, 3, metrics)
    means = [dict(zip(SHOWN, values, strict=True)) for values in shown.mean(0).T.tolist()]
    result = shared_result(eval_set, means[0], *by_group(shown[..., 0], digests), decoding.seed)
    right = exact_match(answers, [item.references for item in eval_set.items]) > 0
    chosen = [number for number, around in enumerate(boxes) if right[number] and len(around) == 1]
    methods = {}
    for place, name in enumerate(MAPS if chosen else ()):
        hits_and_zeros = scores[chosen, place, 0][:, None] * [1, 0]
        sums = by_group(hits_and_zeros, [digests[number] for number in chosen])
        methods[name] = dict(zip(METRICS, scores[chosen, place].mean(0).tolist(), strict=True))
        methods[name]["hit_rate_ci95"] = list(margin_interval(*sums, decoding.seed))
    result |= {"metrics": dict(zip(METRICS, means, strict=True)), "methods": methods, "method": DEFAULT_METHOD}
    result |= {"answered_right": float(right.mean()), "one_object_answered_right": len(chosen)}
    result |= {"tables": tables(eval_set, answers, shown[:, 0, 0]), "decoding": decoding.about()}
    samples = [
        eval_set.describe_image(item.image)
        | {"question": item.question, "type": question_kind(item.question), "references": list(item.references)}
        | {"answer": answer, "boxes": around, "maps": dict(zip(MAPS, row, strict=True))}
        | {key: row[MAPS.index(name)][0] for key, name in SHOWN.items()}
        for item, answer, around, row in zip(eval_set.items, answers, boxes, rows, strict=True)
    ]
    return EvalResult(result | {"prompt": decoding.prompt or QUESTION}, samples)
