"""Chooses the next token of each sequence, and reports log probabilities of answers and prompts."""
