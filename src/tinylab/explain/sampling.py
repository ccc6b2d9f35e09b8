"""Which images are looked at, and how sure the mean of what was found in them is."""

from collections.abc import Mapping

import numpy as np

from tinylab.exceptions import UserError

RESAMPLES = 2000  # the ends of an interval then wobble by a few percent of its width


def sample(tested: int, count: int | None, seed: int = 0) -> np.ndarray:
    """Return the first `count` of a permutation by `seed`, int64; None: all."""
    if count is not None and count < 0:
        raise UserError(f"count must be 0 or more, not {count}")
    return np.random.default_rng(seed).permutation(tested)[:count]


def bootstrap(measures: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, dict | None]:
    """Return mean, low and high (95 %) of each measure float (n,); None where there are no values.

    Percentiles of the means of 2,000 samples with replacement (Efron and Tibshirani 1993, section
    13.3). All measures see the same samples, so differences of two belong to the same images.
    """
    values = np.stack(list(measures.values()), axis=1).astype(np.float64)
    if (count := len(values)) == 0:
        return dict.fromkeys(measures)
    rng = np.random.default_rng(seed)
    # One sample at a time: all samples of 33,000 images would take half a gigabyte.
    drawn = (rng.integers(count, size=count) for _ in range(RESAMPLES))
    samples = np.stack([np.bincount(each, minlength=count) @ values for each in drawn]) / count
    means = values.mean(axis=0)
    low, high = np.quantile(samples, (0.025, 0.975), axis=0)
    # Of equal values, rounding alone could put the mean outside.
    ends = np.stack([means, np.minimum(low, means), np.maximum(high, means)], axis=1).tolist()
    named = [dict(zip(("mean", "low", "high"), each, strict=True)) for each in ends]
    return dict(zip(measures, named, strict=True))
