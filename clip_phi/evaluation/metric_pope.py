"""POPE as a metric of Hugging Face's evaluate.

evaluate.load("clip_phi/evaluation/metric_pope.py") works without a network. This file and vqa.py, side by side in a
Space, are the metric on the Hub.
"""

import datasets
import evaluate

from .answer_metrics import pope

DESCRIPTION = "Whether a model sees objects that are not there: accuracy, precision, recall, F1 and the share of yes."


class Pope(evaluate.Metric):
    """predictions: answers as they come; references: yes or no. compute() gives the scores by name."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="arXiv 2305.10355",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        return pope(predictions, references)
