"""Items: reading, cleaning and splitting them; prices in text; a synthetic catalog."""
