"""Command lines: absl mains of at most 80 lines, and the shell scripts that start them."""
