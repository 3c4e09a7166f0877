"""BLEU, ROUGE-L and CIDEr as a metric of Hugging Face's evaluate.

evaluate.load("clip_phi/evaluation/metric_captions.py") works without a network. This file and captions.py, side by
side in a Space, are the metric on the Hub.
"""

import datasets
import evaluate

from .caption_metrics import CaptionScorer

DESCRIPTION = (
    "Captions against references, as coco-caption scores them: BLEU-1 to 4, ROUGE-L, CIDEr (which is CIDEr-D)."
)


class Captions(evaluate.Metric):
    """predictions: texts; references: lists of texts. compute() gives the scores by name."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="arXiv 1504.00325",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        return CaptionScorer(references)(predictions).corpus
