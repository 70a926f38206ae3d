"""Ray actors: thin shells that feed events to `timetier.cluster` and carry out its effects."""
