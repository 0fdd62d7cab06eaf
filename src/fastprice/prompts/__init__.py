"""Prompts: the one template, its loss mask, packs of token rows, and a preview of all of it."""
