"""What `espalier bench` measures; one module a case, each with `run(options) -> list[Result]`."""
