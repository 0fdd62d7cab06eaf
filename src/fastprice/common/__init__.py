"""What every other package may use: files written whole, plots as files, array types."""
