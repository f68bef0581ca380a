"""The arithmetic: pure functions on tensors, each with a plain reference beside its fast path. Knows nothing of
timm."""
