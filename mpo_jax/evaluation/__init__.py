"""What tells whether a model is better: statistics of scores and win rates, baselines, reports."""
