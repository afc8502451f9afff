"""Our train step in a process of its own, which answers how long it takes. Run by huge_pages.py:

    python -m launch.benchmarks.step_process MIXER WIDTH LAYERS ROWS LENGTH

It prints "ready", then reads lines "step RUNS", runs so many steps, and prints their seconds. A
step before them is not counted: a process that has waited finds its memory cold, and training never
waits.
"""

from __future__ import annotations

import sys
import time

from launch import cli, presets
from launch.benchmarks import problem, timing
from launch.benchmarks.problem import Options, Sizes


def main() -> None:
    mixer, *sizes = sys.argv[1:]
    width, layers, rows, length = map(int, sizes)
    chosen = Sizes(width=width, num_layers=layers, batch_size=rows, context_length=length)
    base = cli.read_config_file(presets.BASE).to_dict()
    options = Options(base=base, pairs=1, precision="float32", sizes=chosen)
    built = problem.built(options, mixer)
    batch = built.put(problem.batch(chosen))
    token_bytes = built.put_replicated(problem.token_bytes(chosen))
    compiled = problem.compiled_step(options, built)
    run = timing.thread(compiled, built.init(0), batch, token_bytes, built.numbers)
    print("ready", flush=True)
    for line in sys.stdin:
        _, runs = line.split()
        run()
        start = time.perf_counter()
        for _ in range(int(runs)):
            run()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
