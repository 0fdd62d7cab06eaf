"""Language models made ready to train: base models, engines, adapters, families, packed attention."""
