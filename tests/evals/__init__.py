"""lm-evaluation-harness against a real server, compared with its own transformers model on the same checkpoint."""
