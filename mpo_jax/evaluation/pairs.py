"""Scores of pairs, with what is known of each pair, enter; accuracy, calibration and their relations leave, as tables.

A pair's gap is its chosen score minus its rejected one. All in NumPy, on the host.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_CALIBRATION_BINS = 10
_HISTOGRAM_BINS = 20


def pair_report(scores: np.ndarray, response_lens: np.ndarray, confidence: np.ndarray | None = None) -> dict[str, Any]:
    """What a reward model's scores say about pairs.

    scores: f32 [pairs,2], chosen and rejected. response_lens: int [pairs,2], in tokens. confidence: f32 [pairs], NaN
    where unknown. The report: accuracy with its standard error, by confidence, calibration, gap histogram,
    correlation of score and length.
    """
    gap = np.asarray(scores[:, 0], np.float64) - scores[:, 1]
    known = np.zeros(len(gap), bool) if confidence is None else np.isfinite(confidence)
    report = {
        "pairs": len(gap),
        "accuracy": accuracy(gap),
        "accuracy_se": standard_error(accuracy(gap), len(gap)),
        "gap_mean": float(gap.mean()),
        "gap_std": float(gap.std()),
        "calibration": calibration(gap),
        "gap_histogram": histogram(gap),
        "score_length_correlation": correlation(scores.reshape(-1), np.asarray(response_lens).reshape(-1)),
    }
    if confidence is not None and known.any():
        report["by_confidence"] = [
            {"confidence": float(level), "pairs": int(here.sum()), "accuracy": accuracy(gap[here])}
            for level in np.unique(confidence[known])
            for here in [confidence == level]
        ]
    return report


def accuracy(gap: np.ndarray) -> float:
    """Share of pairs whose gap is positive; a gap of 0 counts half."""
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


def standard_error(share: float, count: int) -> float:
    """Of a share observed in `count` independent trials."""
    return math.sqrt(max(share * (1 - share), 0.0) / max(count, 1))


def of_bucket(judged: Mapping[str, float], bucket: str, pairs: int) -> tuple[float, float, int] | None:
    """A bucket's accuracy with its standard error and number of pairs. judged: an evaluation on `pairs` pairs; None
    where it has none of the bucket."""
    if f"{bucket}_accuracy" not in judged:
        return None
    count, share = round(judged[f"{bucket}_share"] * pairs), judged[f"{bucket}_accuracy"]
    return share, standard_error(share, count), count


def calibration(gap: np.ndarray) -> list[dict[str, float]]:
    """Predicted against observed preference, in bins of the predicted probability that the surer side wins.

    The model's probability that chosen beats rejected is sigmoid(gap); the surer side's is sigmoid(|gap|), from 0.5
    to 1, and it is right where the gap is positive.
    """
    predicted = 1 / (1 + np.exp(-np.abs(gap)))
    edges = np.linspace(0.5, 1, _CALIBRATION_BINS + 1)
    place = np.clip(np.digitize(predicted, edges) - 1, 0, _CALIBRATION_BINS - 1)
    rows = []
    for index in range(_CALIBRATION_BINS):
        here = place == index
        if here.any():
            rows.append(
                {
                    "from": float(edges[index]),
                    "to": float(edges[index + 1]),
                    "pairs": int(here.sum()),
                    "predicted": float(predicted[here].mean()),
                    "observed": accuracy(gap[here]),
                }
            )
    return rows


def by_gap_decile(gap: np.ndarray) -> list[dict[str, float]]:
    """Pairs in ten equal parts by the size of their gap, smallest first: how often the label agrees, and how often it
    would if the reward model knew its own certainty (the mean of sigmoid(|gap|)). gap: [pairs], chosen - rejected."""
    gap = np.asarray(gap, np.float64)
    order = np.argsort(np.abs(gap), kind="stable")
    rows = []
    for part in np.array_split(order, 10):
        if len(part):
            share = accuracy(gap[part])
            rows.append(
                {
                    "from": float(np.abs(gap[part]).min()),
                    "to": float(np.abs(gap[part]).max()),
                    "pairs": len(part),
                    "accuracy": share,
                    "standard_error": standard_error(share, len(part)),
                    "predicted": float(np.mean(1 / (1 + np.exp(-np.abs(gap[part]))))),
                }
            )
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]], observed: str = "accuracy") -> float:
    """Mean distance of predicted from observed agreement over parts of the pairs, weighted by their pairs (Guo et al.
    2017, equation 3). observed: what its key is called."""
    pairs = np.array([row["pairs"] for row in rows])
    distance = np.array([abs(row["predicted"] - row[observed]) for row in rows])
    return float((pairs * distance).sum() / pairs.sum())


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share observed in `count` independent trials, within 0 and 1 however extreme the share (Wilson
    1927); 95 % by default. A tie that counted half is half a trial won."""
    if count <= 0:
        return 0.0, 1.0
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def histogram(values: np.ndarray, bins: int = _HISTOGRAM_BINS) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=bins)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's; 0 where either side does not vary."""
    left, right = (np.asarray(x, np.float64) - np.mean(x) for x in (left, right))
    scale = math.sqrt(float((left**2).sum() * (right**2).sum()))
    return float((left * right).sum() / scale) if scale > 0 else 0.0


def shorter_wins(response_lens: np.ndarray) -> float:
    """Accuracy of "the shorter reply wins"; equal lengths count half. response_lens: int [pairs,2]."""
    return accuracy(np.asarray(response_lens[:, 1], np.float64) - response_lens[:, 0])


def tfidf_bradley_terry(train: list[tuple[str, str]], heldout: list[tuple[str, str]], seed: int = 0) -> float | None:
    """Held-out accuracy of a linear Bradley-Terry model on TF-IDF features of (chosen, rejected) texts.

    None where scikit-learn is not installed. A reward model that does no better has learned words, not replies.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([text for pair in train for text in pair])

    def differences(pairs):
        return vectorizer.transform([c for c, _ in pairs]) - vectorizer.transform([r for _, r in pairs])

    # Each pair once as it is and once turned around, so that the model needs no intercept.
    signs = np.where(np.random.default_rng(seed).random(len(train)) < 0.5, 1, -1)
    features = differences(train).multiply(signs[:, None]).tocsr()
    model = LogisticRegression(fit_intercept=False, C=1.0, max_iter=1000).fit(features, signs)
    return accuracy(model.decision_function(differences(heldout)))
