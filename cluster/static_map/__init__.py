"""The static map from buckets to groups, for 1 to 1,000 groups."""
