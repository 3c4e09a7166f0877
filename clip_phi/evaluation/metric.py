"""The metrics as one metric of Hugging Face's evaluate, which loads without a network.

    evaluate.load("clip_phi/evaluation/metric.py", "captions")   # or "vqa", "pope"

This file, caption_metrics.py and answer_metrics.py are all that a Space with the metric needs.
"""

import datasets
import evaluate

from .answer_metrics import exact_match, pope, vqa_accuracy
from .caption_metrics import CaptionScorer

DESCRIPTIONS = {
    "captions": "BLEU-1 to 4, ROUGE-L and CIDEr (which is CIDEr-D) of captions, as in coco-caption, arXiv 1504.00325.",
    "vqa": "VQA accuracy by the official rules, arXiv 1505.00468, and exact match of short answers.",
    "pope": "Accuracy, precision, recall, F1 and the share of yes of answers about objects, arXiv 2305.10355.",
}


class ClipPhiMetric(evaluate.Metric):
    """predictions: texts. references: lists of texts; for "pope" yes or no. compute() gives the scores by name."""

    def _info(self):
        text = datasets.Value("string")
        references = text if self.config_name == "pope" else datasets.Sequence(text)
        features = datasets.Features({"predictions": text, "references": references})
        about = {"description": DESCRIPTIONS[self.config_name], "inputs_description": self.__doc__}
        return evaluate.MetricInfo(citation="", features=features, **about)

    def _compute(self, predictions, references):
        if self.config_name == "captions":
            return CaptionScorer(references)(predictions).corpus
        if self.config_name == "pope":
            return pope(predictions, references)
        return {each.__name__: float(each(predictions, references).mean()) for each in (vqa_accuracy, exact_match)}
