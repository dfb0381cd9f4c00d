"""One run: its settings in, its folder out."""
