"""TimeTier: a strongly consistent, tiered store for timelines, at home in a Ray cluster."""

__version__ = "0.1.0"
