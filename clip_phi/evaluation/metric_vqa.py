"""VQA accuracy and exact match as a metric of Hugging Face's evaluate.

evaluate.load("clip_phi/evaluation/metric_vqa.py") works without a network. This file and vqa.py, side by side in a
Space, are the metric on the Hub.
"""

import datasets
import evaluate

from .answer_metrics import exact_match, vqa_accuracy

DESCRIPTION = "Short answers against what people answered: VQA accuracy by the official rules, and exact match."


class VqaAccuracy(evaluate.Metric):
    """predictions: texts; references: lists of texts, ten each in VQAv2. compute() gives vqa_accuracy, exact_match."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="arXiv 1505.00468",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        return {
            "vqa_accuracy": float(vqa_accuracy(predictions, references).mean()),
            "exact_match": float(exact_match(predictions, references).mean()),
        }
