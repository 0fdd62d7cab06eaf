"""What any other package may use: files that appear whole, array types, plots as files. Imports errors alone."""
