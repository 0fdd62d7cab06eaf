"""Items: reading, cleaning and splitting them; prices as people write them; a synthetic catalog."""
