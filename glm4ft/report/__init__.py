"""What a person reads: text in the terminal, one HTML file, plots."""
